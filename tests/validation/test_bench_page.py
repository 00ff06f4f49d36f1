"""validation/bench: README.md is what the last runs wrote; targets, ratios and refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from validation.bench import __main__ as bench
from validation.bench import cost, page, shares, targets
from validation.bench.candidates import OFFICIAL, OURS, SHIPPED
from validation.bench.products import needed
from validation.bench.proxies import PROXIES
from validation.bench.timing import verdict

MACHINE = {"cores": 2, "cpu": "x", "memory_gib": 1, "versions": {}, "blas": []}


def passes(*seconds: float, peak: float = 100.0) -> list[dict[str, float]]:
    return [{"seconds": s, "peak": peak, "base": 10.0, "others": 0.0} for s in seconds]


def section(runs: dict, others: float = 0.0) -> dict:
    return {"date": "d", "command": "c", "machine": MACHINE, "others": others, "runs": runs}


def timed(**times: list) -> dict:
    fine = {"agree": True, "limit": 1e-4, "worst": {"A": ("l", 1e-6), "G": ("l", 2e-6)}}
    named = {
        {"ours": OURS, "official": OFFICIAL, "shipped": SHIPPED}[k]: v for k, v in times.items()
    }
    return {"missing": ["curvlinops"], "times": named, "checks": {OFFICIAL: fine}}


def alone(cores: int, wholes: list, floors: list, rates: list, on_one: list | None = None) -> dict:
    """Rounds of an hour in which the machine is now fast, now slow."""
    more = {targets.ON_ONE_CORE: passes(*on_one)} if on_one else {}
    return {
        "times": {OURS: passes(*wholes), **more},
        "floor": [[{"seconds": s, "gflops": 90.0}] * cores for s in floors],
        "sgemm": [[{"gflops": rate}] * cores for rate in rates],
    }


RESULTS = {
    "time": section({
        "all 1": timed(ours=passes(2, 1, 3), official=passes(3, 2, 4), shipped=passes(24)),
        "all 2": timed(ours=passes(2.5)),
    }),
    "products": section({
        "all 1": alone(1, [2.0, 1.0, 4.0], [1.4, 0.75, 3.6], [100.0, 200.0, 50.0]),
        "all 2": alone(2, [2.5, 1.25, 4.0], [1.5, 0.75, 2.0], [90.0, 180.0, 60.0], [4, 2, 9]),
    }),
    "memory": section({
        "all 1": {"times": {OURS: passes(1, peak=100.0), OFFICIAL: passes(1, peak=400.0)}},
        "all 2": {"times": {OURS: passes(1, peak=300.0), OFFICIAL: passes(1, peak=500.0)}},
    }),
}  # fmt: skip


def test_the_page_shows_the_last_results() -> None:
    results = bench.read_results()
    text = page.README.read_text(encoding="utf-8")
    assert page.page(text, results) == text
    for name, one in results.items():
        assert page.is_quiet(one) and bench.agree(one), name


def test_ratios_are_of_medians_with_their_spread() -> None:
    shown = page.times(RESULTS["time"])
    assert "3.00 s, 1.50 (1.33–2.00)" in shown
    assert "24.00 s, 12.00" in shown
    assert shown.count("not installed") == 2
    assert "all 1 agree" in shown
    assert page.memory(RESULTS["memory"]).count("4.00") == 1


@pytest.mark.parametrize(
    ("fault", "wrong"),
    {
        "G of a mean loss": lambda A, G, n: (A, G / n**2, n),
        "the last position is a row": lambda A, G, n: (A * (1 + 1 / n), G, n),
        "one row more is counted": lambda A, G, n: (A, G, n + 1),
        "not a number": lambda A, G, n: (A * np.nan, G, n),
        "rounding": None,
        "a layer is missing": "missing",
    }.items(),
)
def test_a_disagreement_of_one_layer_is_seen(fault: str, wrong: Any) -> None:
    rng = np.random.default_rng(0)
    ours = {name: (rng.random((3, 3)), rng.random((2, 2)), 32) for name in "ab"}
    theirs = {n: (A.astype(np.float32), G.astype(np.float32), k) for n, (A, G, k) in ours.items()}
    if wrong == "missing":
        del theirs["b"]
    elif wrong is not None:
        theirs["b"] = wrong(*ours["b"])
    assert verdict(ours, theirs)["agree"] == (fault == "rounding")


def test_a_busy_machine_gets_no_ratio_and_its_section_is_not_kept(monkeypatch, capsys) -> None:
    busy = RESULTS["time"] | {"others": 0.2}
    shown = page.times(busy)
    assert shown.count(page.NO_RATIO) == 2 and "1.50" not in shown
    assert "NOT QUIET" in page.stamp(busy) and "NOT QUIET" not in page.stamp(RESULTS["time"])
    kept: list[str] = []
    monkeypatch.setattr(bench, "keep", lambda name, _: kept.append(name))
    plan = bench.Plan(False, 1, (1,), (OURS,), Path())
    wrong = json.loads(json.dumps(RESULTS["time"]))
    wrong["runs"]["all 1"]["checks"][OFFICIAL]["agree"] = False
    for one, fine in ((RESULTS["time"], True), (busy, False), (wrong, False)):
        monkeypatch.setattr(bench, "measure", lambda *_, one=one: one)
        assert bench.run(plan, ["time"]) is fine
    assert kept == ["time"]
    monkeypatch.setattr(bench, "busy_now", lambda: 0.5)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="busy"):
        bench.main()
    capsys.readouterr()


def test_targets_are_found_and_judged() -> None:
    found = {what: (now, said) for what, _, now, _, _, said in targets.rows(RESULTS)}
    assert found["official as shipped: all layers"] == ("12 x", "goal met")
    assert found["official one pass: all layers"] == ("1.5 x", "**missed**")
    assert found["curvlinops MC: all layers"] == ("–", "not measured")
    assert found["products alone, of the whole, 1 core"] == ("0.75", "**missed**")
    # the median of rounds: 2 cores are 4 / 2.5 = 1.6 times as fast, two of sgemm 1.8 times
    assert found["2 cores, of 2 sgemm processes"] == (f"{1.6 / 1.8:.3g}", "**missed**")
    lost = 1.8 / 1.6 - 1
    assert found["16 cores, of 16 sgemm processes"][0] == f"{1 / (1 + 15 * lost):.3g}"
    assert found["16 cores, of 16 sgemm processes"][1].endswith("extrapolated")
    assert found["memory per further core"] == (f"{200 * 1.048576:.3g} MB", "least met")
    assert found["peak of official one pass, 1 core"] == ("0.25", "goal met")
    assert found["peak of official one pass, 16 cores"][0] == f"{(100 + 15 * 200) / 500:.3g}"
    assert {said for _, said in (found[what] for what in found if "streamed" in what)} == {
        "not measured"
    }


def test_a_share_is_of_one_round() -> None:
    """A machine that is slower in a later round changes no share, and the medians are shown."""
    shown = page.products(RESULTS["products"])
    for line in ("alone, seconds | 1.40 | 1.50 |", "collection, seconds | 2.00 | 2.50 |",
                 "together | 100 | 180 |"):  # fmt: skip
        assert line in re.sub(" +", " ", shown)
    steady = {
        "all 1": alone(1, [2.0, 4.0, 8.0], [1.5, 3.0, 6.0], [100.0, 50.0, 25.0]),
        "all 2": alone(2, [2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [100.0, 50.0, 25.0], [3, 6, 12]),
    }
    results = {"products": section(steady)}
    assert targets.floor_share(1)(results) == (0.75, True)
    assert targets.floor_share(2)(results) == (0.5, True)
    assert targets.scaling(2)(results) == (0.75, True)
    assert targets.scaling(16)(results) == (pytest.approx(1 / 6), False)
    results["products"]["runs"]["all 2"]["times"][targets.ON_ONE_CORE] = passes(5, 10, 20)
    assert targets.scaling(16)(results) == (1.0, False), "no core costs less than nothing"


@pytest.mark.parametrize(
    ("name", "mega"), [("all", 144.7 + 104.9), ("upper", 75.5 + 18.9 + 26.3), ("mid", 415.3)]
)
def test_the_needed_products_are_those_of_the_definition(name: str, mega: float) -> None:
    """MFLOP of one row, forward, backward and xᵀ x, by hand from the sizes."""
    proxy = PROXIES[name]
    D, M, V = proxy.size.width, proxy.size.mlp_width, proxy.size.vocabulary
    block, lowest = 4 * D * D + 3 * D * M, min(proxy.blocks)
    forward = proxy.size.layers * block + D * V
    backward = (proxy.size.layers - 1 - lowest) * block + D * M + D * V
    squares = len(proxy.blocks) * (3 * M * M + 2 * D * D)
    work = sum(n * p.work(1) for p, n in needed(proxy.size, proxy.blocks).items())
    assert work == 2 * (forward + backward) + squares
    assert work / 1e6 == pytest.approx(mega, rel=0.005)


@pytest.mark.parametrize(
    ("stack", "category"),
    [
        ("model.transformer:linear_forward model.transformer:mlp_forward", "products forward"),
        ("algebra.blas:gemm model.transformer:linear_backward passes.sweep:_taps",
         "products backward"),
        ("model.transformer:linear_forward model.transformer:head_transpose passes.sweep:sweep",
         "products of the head"),
        ("passes.fast:_attention_forward model.transformer:attention_forward", "attention"),
        ("algebra.gram:add_gram curvature.accumulate:add_gram", "xᵀ x (syrk)"),
        ("curvature.moments:_fold curvature.moments:add curvature.accumulate:_complete",
         "fold to float64"),
        ("model.sampling:draw_labels model.fisher:drawn_labels model.transformer:head_transpose",
         "cross-entropy and drawing"),
        ("model.transformer:linear_forward passes.rounding:rounding",
         "what rounding does (NEGATIVE)"),
        ("passes.parallel:stream curvature.factors:summed", shares.REST),
    ],
)  # fmt: skip
def test_a_stack_falls_under_its_rule(stack: str, category: str) -> None:
    assert shares.category(stack) == category
    assert {*shares.BEFORE["all"], *shares.BEFORE["upper"]} < {name for name, _ in shares.RULES}


def test_the_curves_are_drawn_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="extra `report`")
    runs = {
        f"{curve} {x}": {"times": {name: passes(x**0.5) for name in cost.NAMES[: 1 + (x < 9000)]}}
        for curve, (values, _) in cost.CURVES.items()
        for x in values
    }
    monkeypatch.setattr(cost, "PLOT", tmp_path / "cost.png")
    cost.draw(section(runs))
    assert cost.PLOT.stat().st_size > 10_000
    lines = [line for line in page.costs(section(runs)).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(runs)
    one = next(line for line in lines if "tokens 65536" in line)
    assert [cell.strip() for cell in one.split("|")[1:-1]] == ["tokens 65536", "256", "", ""]
    sizes = [cost.of_tokens(PROXIES["all"].size, x).rows for x in (1, 8, 64, 512, 65_536)]
    assert sizes == [1, 8, 64, 511, 128 * 511]
