"""validation/certified: a slice of the trial of budgets; budgets and routes that are wrong show."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

import refcurv as rc
from refcurv.certified.certificate import Enclosed
from refcurv.law import tolerance
from validation.certified import budgets, page, routes
from validation.certified.passes import PASSES, shares
from validation.certified.trials import Trial

TRIALS = {trial.name: trial for trial in budgets.every()}
DRAWS = 20


def used(trial: Trial) -> list[float]:
    found, _ = budgets.batch(trial.data, lambda x: {"": [trial.ratio(x)]}, DRAWS, 0)
    return found[""]


@pytest.mark.parametrize("name", [name for name, trial in TRIALS.items() if trial.promised])
def test_no_budget_is_exceeded(name: str) -> None:
    some = used(TRIALS[name])
    assert len(some) == DRAWS and max(some) <= 1
    if name == "negative":
        assert used(TRIALS[name]) == some  # the seed decides


@pytest.mark.parametrize(
    "name",
    ["gamma", "probable", "eigenpair", "eigenvalues", "negative", "underflow", "asymmetry"],
)
def test_a_thousandth_of_a_budget_is_exceeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., float] = getattr(tolerance, name)
    monkeypatch.setattr(tolerance, name, lambda *sizes: right(*sizes) / 1000)
    for trial in TRIALS.values():
        if trial.promised and trial.name.split(":")[0] == name:
            assert max(used(trial)) > 1, trial.name


def test_passes_stay_within_their_budgets() -> None:
    found, _ = budgets.batch(PASSES, shares, 2, 1)
    assert any(found.values())
    assert all(max(some) <= 1 for some in found.values())


@pytest.mark.slow
def test_a_stopped_trial_goes_on(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn is kept by batches, of this code alone; the table is of all of them."""
    readme = tmp_path / "README.md"
    readme.write_text("x\n<!-- budgets: begin -->old<!-- budgets: end -->\ny", "utf-8")
    monkeypatch.setattr(page, "README", readme)
    monkeypatch.setattr(budgets, "DRAWS", tmp_path / "draws.jsonl")
    monkeypatch.setattr(budgets, "BATCH", 5)
    monkeypatch.setattr(budgets, "SEEDS", 1)
    asked = ["x", "--draws", "10", "--models", "0", "--only", "gamma"]
    ran = mock.Mock(side_effect=budgets.batch)
    with mock.patch("sys.argv", asked), mock.patch.object(budgets, "batch", ran):
        ran.side_effect = [({"gamma": [0.5] * 5}, "one"), KeyboardInterrupt]
        assert budgets.main() == 130 and "old" in readme.read_text("utf-8")
        ran.side_effect = [({"gamma": [0.25] * 4 + [2.0]}, "two")]
        assert budgets.main() == 1
    text = readme.read_text("utf-8")
    assert text.startswith("x\n") and text.endswith("\ny") and "old" not in text
    assert "| gamma | a sum of products, in five orders | 10 | 1 | 0.5 |" in text


def test_errors_are_counted_in_ulps_of_the_largest_entry() -> None:
    one = Enclosed(np.array([[4.0, 1.0, 0.0], [0, 0, 0]]), np.zeros(3))
    truth = rc.Certificate({"nats.0": one}, (), 100, 30)
    off = np.array([4.0, 1.0 + 2.0**-50, np.nan])
    assert routes.ulps(truth, {"nats.0": off}, "float64") == {"nats": pytest.approx(1.0)}


@pytest.mark.slow
def test_every_route_is_near_and_a_wrong_one_is_not() -> None:
    """Of one twin; a head that is off by 1e-10 stands out."""
    given = dict(routes.twins())["olmo2"]
    found = routes.measured(given, tuple(routes.ROUTES))
    for name, row in found.items():
        limit = 1e12 if "differences" in name else 1e4
        assert row and max(row.values()) < limit, (name, row)
    model, corpus = given
    wrong = {**model.parameters, "head.weight": model.parameters["head.weight"] * (1 + 1e-10)}
    truth = rc.certify(model, corpus, ("logits",))
    made = routes.fast("float64")((rc.Model(model.config, wrong), corpus))
    assert routes.ulps(truth, {"logits.0": made["logits.0"]}, "float64")["logits"] > 1e4


def test_a_table_of_other_code_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose changes no digest; a number does."""
    readme, one = tmp_path / "README.md", tmp_path / "one.py"
    monkeypatch.setattr(page, "README", readme)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "__file__", str(tmp_path / "page.py"))
    monkeypatch.setattr(page, "OWN", {"peers": ("one.py",)})
    monkeypatch.setattr(budgets, "versions", lambda: {False: "a" * 16, True: "b" * 16})
    one.write_text('"""Old."""\nx = 1\n', "utf-8")
    tables = {"budgets": "a" * 16, "budgets of passes": "b" * 16, "peers": page.of("peers")}
    lines = [f"<!-- {name}: begin -->code {digest}.<!-- -->" for name, digest in tables.items()]
    readme.write_text("".join(lines), "utf-8")
    assert page.stale() == []
    one.write_text('"""New."""\n\nx = 1  # one\n', "utf-8")
    assert page.stale() == []
    one.write_text('"""New."""\nx = 2\n', "utf-8")
    assert page.stale() == ["peers"]
    monkeypatch.setattr(budgets, "versions", lambda: {False: "a" * 16, True: "c" * 16})
    assert page.stale() == ["peers", "budgets of passes"]
