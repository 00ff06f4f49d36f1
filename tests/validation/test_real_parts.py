"""validation/real: each part takes the basis, layers and texts that its line says; no model."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import refcurv as rc
from refcurv import demo
from refcurv.evaluation.items import suffix_nats
from validation.real import fetch, files, parts, results
from validation.real.files import Files
from validation.real.parts import METHODS, PARTS, SIZES
from validation.real.plan import CALIBRATIONS, PLANS, SMALL
from validation.real.results import Results, plain
from validation.real.verdicts import AT_PERPLEXITY

PLAN = PLANS["smollm2"]
MIDDLE, LATE, RHO = PLAN.layers(12), PLAN.layers(21), 0.9


class Told(dict[str, Any]):
    """What a stand-in for a function of refcurv was given."""

    def to_json(self) -> dict[str, Any]:
        return dict(self)


def population(right: int) -> dict[str, Any]:
    return {"items": 10, "values": {"strict": right / 10, "perplexity": 10.0}}


def known() -> Results:
    """A grid of two runs: of the late one, at RHO, less is recited."""
    rows = []
    for layers, right in ((MIDDLE, 5), (LATE, 3)):
        left = {"dev": {"clean_dev": population(0), "recited_dev": population(right)}}
        found = {"baseline": left, "edits": [{"rho": RHO, "populations": left}]}
        rows.append(
            {"part": "grid", "key": layers, "claims": results.claims_sha256(), "found": found}
        )
    return Results(Path("nowhere"), rows)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dict[str, Any]]:
    """{(part, key): what it found}, of every part, with stand-ins for files and for refcurv.

    A basis is (calibration, pattern, tokens); an edited model is (model, basis, what is kept).
    """

    def edit(model: object, basis: object, kept: dict[str, float]) -> tuple[Any, Any]:
        return (model, basis, kept), SimpleNamespace(kept=basis)

    def cost(model: Any, _: object) -> float:
        (share,) = model[2].values()
        return float(1 - share)

    def search(measured: Any, target: float, **_: object) -> Any:
        assert measured(target) == target  # the share removed is the cost here
        return SimpleNamespace(strength=target, verdict="matched")

    def bands(model: object, basis: object, *pair: object, layers: str, quantity: str) -> Any:
        return {"all": Told(basis=basis, pair=pair, layers=layers, quantity=quantity)}

    def sweep(
        model: object, corpus: object, layers: Any, rho: Any, methods: Any, **more: Any
    ) -> Told:
        return Told(corpus=corpus, layers=layers, rho=rho, methods=methods, **more)

    stand_in = SimpleNamespace(
        load=lambda path, dtype="": path, load_bases=lambda path: path, edit=edit, sweep=sweep
    )
    monkeypatch.setattr(parts, "rc", stand_in)
    monkeypatch.setattr(parts, "text_perplexity", cost)
    monkeypatch.setattr(parts, "search_share", search)
    monkeypatch.setattr(parts, "bands", bands)
    monkeypatch.setattr(parts, "left", lambda edited, corpus, *names: (edited, corpus, names))
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def once(self: Results, part: str, key: str, _: Any, prepare: Any, make: Any) -> None:
        found[part, key] = make(*prepare())

    monkeypatch.setattr(Results, "once", once)
    texts = {name: name for name in ("recited_test", "clean_test", "clean_dev")}
    given: Any = SimpleNamespace(
        plan=PLAN, folder=Path("nowhere"), results=known(), weights=lambda: "weights",
        dev=lambda: "dev", judged=lambda: SimpleNamespace(populations=texts),
        basis=lambda k, layers, tokens: (k, layers, tokens),
    )  # fmt: skip
    for name in ("grid", "table", "bands", "replicates", "sizes"):
        PARTS[name](given)
    return found


def bases(k: int) -> tuple[int, str, int]:
    """Of the grid in the first calibration; in the others of the chosen run and the best ones."""
    return k, PLAN.grid if k == 1 else PLAN.together([12, 21]), PLAN.tokens


def test_the_grid_is_of_dev_and_of_the_first_calibration(told: Any) -> None:
    runs = [told["grid", PLAN.layers(at)] for at in PLAN.runs]
    assert [one["layers"] for one in runs] == [[PLAN.layers(at)] for at in PLAN.runs]
    for one in runs:
        assert (one["corpus"], one["split"], one["match"]) == ("dev", "dev", "rho")
        assert one["basis"] == bases(1) and one["methods"] == ["kfac"]
        assert one["rho"] == parts.claims()["choice"]["rho"]


def test_a_table_is_of_its_own_calibration(told: Any) -> None:
    every = [("table at equal forgetting", 1), *((AT_PERPLEXITY, k) for k in CALIBRATIONS)]
    for part, k in every:
        one = told[part, str(k)]
        assert one["basis"] == bases(k) and part.endswith(one["match"])
        assert (one["layers"], one["rho"], one["methods"]) == ([LATE], [RHO], METHODS)
        assert one.get("split", "test") == "test" and one["lines"].name.count(f"-{k}-") == 1
    assert len({told[part, str(k)]["lines"] for part, k in every}) == len(every)


def test_bands_are_recited_over_clean(told: Any) -> None:
    for k in CALIBRATIONS:
        for kind in ("input_rank", "pair_mass"):
            (one,) = told["bands", str(k)][kind]
            assert one == {"basis": bases(k), "pair": ("recited_test", "clean_test"),
                           "layers": LATE, "quantity": kind}  # fmt: skip


def test_each_third_is_its_own_run_at_the_cost_of_the_chosen_edit(told: Any) -> None:
    for k in CALIBRATIONS:
        found = told["thirds", str(k)]
        assert found["target"] == pytest.approx(1 - RHO)
        for third, layers in (("middle", MIDDLE), ("late", LATE)):
            (_, basis, kept), corpus, names = found[third]["left"]
            assert basis == bases(k) and names == ("recited_test",)
            assert kept == {layers: pytest.approx(RHO)} and found[third]["layers"] == layers
            assert "recited_test" in corpus.populations


def test_a_part_of_a_calibration_is_of_so_many_tokens_of_it(told: Any) -> None:
    asked = [(1, part) for part in SIZES] + [(k, SIZES[0]) for k in CALIBRATIONS[1:]]
    for k, part in asked:
        one = told["sizes", f"{k}, 1/{part}"]
        tokens = PLAN.tokens // part
        assert one["kept"] == (k, LATE, tokens) and one["tokens"] == tokens
        edited, _, names = one["left"]
        assert edited == ("weights", (k, LATE, tokens), {LATE: RHO})
        assert names == ("clean_test", "recited_test", "own_test")
    assert len([key for part, key in told if part == "sizes"]) == len(asked)


def test_what_each_calibration_costs_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two calibrations are two lines."""
    made = Files(PLANS[SMALL], tmp_path, Results(tmp_path / "results.jsonl"))
    config = SimpleNamespace(linear_layers=lambda: ["blocks.3.mlp.up"])
    monkeypatch.setattr(files, "rc", SimpleNamespace(load=lambda _: SimpleNamespace(config=config)))
    monkeypatch.setattr(Files, "weights", lambda _: "w.h5")
    monkeypatch.setattr(Files, "calibration", lambda *_: "c.h5")
    monkeypatch.setattr(results, "code", lambda: "")
    monkeypatch.setattr(
        files, "command", lambda *words: Path(words[words.index("-o") + 1]).touch()
    )  # fmt: skip
    for k in (2, 3):
        made.basis(k, "blocks.3.mlp.up", 100)
    steps = [key.partition(" ") for key in made.results.found("steps")]
    for step in ("collect", "decompose"):
        assert len([key for name, _, key in steps if name == step]) == 2
    assert not list(tmp_path.glob("*collect*"))


def test_what_is_left_is_of_test_and_its_nats_are_of_a_token() -> None:
    """Passages of 2, 9 and 5 tokens; those of dev are not measured."""
    model, corpus = rc.load(demo.MODEL, dtype="float32"), rc.load_corpus(demo.CORPUS)
    some = corpus.populations["quotes_test"]
    assert isinstance(some, rc.Population)
    prompt = some.prompt_length[:3]
    said = np.array([2, 9, 5], np.int32)
    few = rc.Population(some.tokens[:3], prompt, prompt + said, "recite", "test")
    both = {"recited_test": few, "recited_dev": replace(few, split="dev")}
    found = parts.left(model, replace(corpus, populations=both), *both)
    assert list(found) == ["recited_test"]
    one = found["recited_test"]
    assert (one["items"], one["tokens"], len(one["right"])) == (3, 16, 3)
    alone = [
        suffix_nats(model, rc.Population(some.tokens[n : n + 1], prompt[n : n + 1],
                                         few.length[n : n + 1], "recite", "test"))
        for n in range(3)
    ]  # fmt: skip
    assert one["values"]["nats"] == pytest.approx(float(np.sum(alone)) / 16, rel=1e-5)
    assert one["values"]["strict"] == one["right"].count("1") / 3


@pytest.mark.parametrize("model", fetch.MODELS)
def test_no_result_is_of_another_recipe_than_todays(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, sets, sizes, layers and rho: what a line was made of is what would be asked today."""
    of = results.load(model)
    asked: dict[tuple[str, str], Any] = {}

    def once(self: Results, part: str, key: str, inputs: Any, prepare: Any, make: Any) -> None:
        asked[part, key] = plain(inputs)

    monkeypatch.setattr(Results, "once", once)
    have = importlib.util.find_spec("gguf") is not None
    for name, part in PARTS.items():
        if name in ("models", "grid") or (of.found("grid") and (have or name != "doses")):
            part(Files(PLANS[model], tmp_path, of))
    made = [row for row in of.rows if row["part"] != "steps" and (have or row["part"] != "doses")]
    for row in made:
        assert row["inputs"] == asked[row["part"], row["key"]], (row["part"], row["key"])
    assert list(tmp_path.iterdir()) == []
