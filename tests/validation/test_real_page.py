"""validation/real: its page is what its results say; dev chooses and claims are judged by rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from validation.paper.statistics import Interval, interval
from validation.real import fetch, page, results, verdicts
from validation.real.__main__ import names
from validation.real.choosing import MOST, best, chosen, is_complete
from validation.real.files import Files
from validation.real.parts import PARTS
from validation.real.plan import CALIBRATIONS, PLANS, SMALL, claims, claims_sha256
from validation.real.results import Results
from validation.real.verdicts import ABLE, NUMBERS

PLAN = PLANS["smollm2"]


def line(part: str, key: str, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"part": part, "key": key, "claims": claims_sha256(), "found": found, **more}


def grid(begin: int, **at: tuple[float | None, float]) -> dict[str, Any]:
    """A run's line; {"0.9": (perplexity, recited)} with a baseline of 10."""

    def dev(cost: float | None, strict: float) -> dict[str, Any]:
        return {"clean_dev": {"values": {"perplexity": cost}},
                "recited_dev": {"items": 9, "values": {"strict": strict}}}  # fmt: skip

    edits = [{"rho": float(rho), "populations": {"dev": dev(*one)}} for rho, one in at.items()]
    return line("grid", PLAN.layers(begin), {"baseline": {"dev": dev(10, 1)}, "edits": edits})


def known(*rows: dict[str, Any]) -> Results:
    return Results(Path("nowhere"), list(rows))


# ------------------------------------------------------------------ the page


def test_the_page_shows_the_results() -> None:
    text = page.README.read_text(encoding="utf-8")
    of = {model: results.load(model) for model in fetch.MODELS}
    assert page.with_block(page.README, text, page.BEGIN, page.END, page.block(of)) == text


def test_every_result_has_the_hash_of_the_claims_and_no_text() -> None:
    for model in fetch.MODELS:
        for row in results.load(model).rows:
            assert row["claims"] == claims_sha256(), "results of other claims"
            assert {"part", "key", "inputs", "date", "seconds", "peak", "code"} < row.keys()
            said = {key for key, one in _pairs(row) if not isinstance(one, int)}  # "prefix": 32 is
            assert not {"text", "prefix", "suffix", "prefix_ids", "said_ids"} & said  # a length


def _pairs(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [*value.items(), *(pair for one in value.values() for pair in _pairs(one))]
    return [pair for one in value for pair in _pairs(one)] if isinstance(value, list) else []


def test_what_is_not_measured_says_so() -> None:
    made = page.block({"smollm2": known()})
    for heading in page.sections(known(), PLAN):
        _, _, behind = made.partition(f"### {heading}\n\n")
        assert page.NOT in behind.partition("\n### ")[0], heading


def test_what_an_edit_costs_is_summed() -> None:
    cost = {"seconds": 0.0, "peak": 9, "date": "d", "code": "c"}
    edits = grid(21, **{"0.6": (11, 0.1), "0.9": (10, 0.5)}) | cost | {"seconds": 40.0}
    steps = {"collect 40 matrices": 100.0, "collect 6 matrices": 20.0, "decompose 40 matrices": 7.0}
    rows = [line("steps", key, {}) | cost | {"seconds": x} for key, x in steps.items()]
    judged = line("doses", "none", {}) | cost | {"seconds": 30.0}
    told = page.costs(known(*rows, judged, edits))
    assert "one evaluation of all that is judged: 137 processor seconds." in told
    assert "The grid: 2 edits on dev, 40 processor seconds." in told
    assert told.count("\n| ") == 6  # the head, and a line for each
    assert "judged" not in page.costs(known(*rows)) and "edits" not in page.costs(known(judged))


# ------------------------------------------------------------------ dev chooses


def test_dev_chooses_by_the_rule() -> None:
    cheap, dear = 10 * MOST - 0.01, 10 * MOST + 0.01
    rows = [grid(21, **{"0.6": (dear, 0.0), "0.9": (cheap, 0.3)}), grid(12, **{"0.9": (10.1, 0.4)})]
    assert chosen(known(*rows)) == (PLAN.layers(21), 0.9)
    tied = grid(25, **{"0.95": (10.2, 0.3)})
    assert chosen(known(*rows, tied)) == (PLAN.layers(25), 0.95)
    assert best(known(*rows, tied), PLAN, "middle") == PLAN.layers(12)
    assert best(known(*rows), PLAN, "late") == PLAN.layers(21)
    assert chosen(known(grid(21, **{"0.6": (dear + 1, 0.0), "0.9": (dear, 0.9)})))[1] == 0.9
    lost = grid(27, **{"0.6": (None, 0.0)})  # a perplexity that is no number is not cheap
    assert chosen(known(*rows, lost)) == (PLAN.layers(21), 0.9)


def test_the_rule_is_that_of_the_claims() -> None:
    choice = claims()["choice"]
    assert f"rises by {100 * (MOST - 1):.0f} % at most" in choice["rule"]
    assert f"fewer than {ABLE} items of test" in choice["able"]
    assert set(NUMBERS) == {claim["id"] for claim in claims()["claim"]}


def test_the_grid_is_all_runs_of_the_last_two_thirds() -> None:
    assert sorted(PLAN.runs) == list(range(10, 28)) and PLAN.runs[0] == PLAN.first
    thirds = {at: PLAN.third(at) for at in PLAN.runs}
    assert [at for at, one in sorted(thirds.items()) if one == "middle"] == list(range(10, 18))
    assert [at for at, one in sorted(thirds.items()) if one == "late"] == list(range(20, 28))
    assert PLAN.layers(21) == "blocks.{21-23}.mlp.{gate,up}"
    assert PLAN.together([3, 4]) == "blocks.{3,4,5,6}.mlp.{gate,up}"
    every = [grid(at, **{"0.9": (10, 0.5)}) for at in PLAN.runs]
    assert is_complete(known(*every), PLAN) and not is_complete(known(*every[1:]), PLAN)


# ------------------------------------------------------------------ claims


def population(right: str, chance: float = 0.0) -> dict[str, Any]:
    return {"items": len(right), "chance": chance, "right": right, "values": {}}


def table(k: int, word: str = "matched", **left: str) -> dict[str, Any]:
    """A calibration's line: what K-FAC and svd leave of the passages, as 0 and 1."""
    edits = [
        {"method": method, "verdict": verdict, "kept": 0.5,
         "populations": {"test": {"recited_test": population(left.get(method, "10")),
                                  "clean_test": {"values": {"perplexity": 10 + k}}}}}
        for method, verdict in (("kfac", "given"), ("svd", word), ("random-basis", word),
                                ("random-pairs", word))
    ]  # fmt: skip
    base = {"recited_test": population("11")}
    return line(verdicts.AT_PERPLEXITY, str(k), {"baseline": {"test": base}, "edits": edits})


def test_kept_by_hand() -> None:
    before = {"a": population("1111"), "b": population("1110", 0.5)}
    after = {"a": population("1001"), "b": population("1110", 0.5)}
    assert verdicts.share(before, after, ["a"]) == 0.5
    assert verdicts.share(before, after, ["b"]) == 1  # (3 − 2) / (3 − 2)
    assert verdicts.share(before, after, ["a", "b"]) == 3 / 5
    low, high = verdicts.share_interval(before, after, ["a"])
    assert 0 < low < 0.5 < high < 1


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.3, 0.1, "holds"), (0.1, 0.2, "holds in the mean"), (-0.1, 0.3, "does not hold")],
)
def test_a_claim_is_judged_by_its_rule(mean: float, half: float, word: str) -> None:
    assert verdicts.judged({"above": 0.0}, Interval(mean, half, 5)) == word
    assert verdicts.judged({"below": 0.0}, Interval(-mean, half, 5)) == word
    assert verdicts.judged({"above": 0.0}, interval([mean] * 5)) in (word, "holds")


def test_a_claim_is_not_judged_before_all_is_measured() -> None:
    every = [grid(at, **{"0.9": (10, 0.5)}) for at in PLAN.runs]
    tables = [table(k, kfac="11") for k in CALIBRATIONS]

    def word(*rows: dict[str, Any]) -> str:
        return verdicts.verdicts(known(*rows), PLAN)[0].word

    assert word() == page.NOT
    assert word(*every, *tables) == "does not hold"  # all of it is still recited
    assert word(*every, *tables[1:]) == "not judged: 4 of 5 calibrations"
    assert word(*every[1:], *tables) == "not judged: layers × ρ is not complete"


def test_sets_of_too_few_items_are_judged_nowhere() -> None:
    """Neither by a claim nor in a table: a group is the same sets everywhere."""
    few, enough = "1" * (ABLE - 1), "1" * ABLE
    before = {"addition_test": population(enough), "addition_words_test": population(few + "00"),
              "ordering_test": population(few)}  # fmt: skip
    assert verdicts.judged_sets(before, "arithmetic") == ["addition_test"]
    assert verdicts.judged_sets(before, "ordering") == []
    assert verdicts.judged_sets(before, "recited") == ["recited_test"]
    text = {"values": {"perplexity": 9.0}}
    said = population("11") | {"values": {"nats": 0.5}}
    more = {"clean_test": text, "recited_test": said, "own_test": said}
    after = before | {"addition_words_test": population("0" * (ABLE + 1))} | more
    doses = line("doses", "none", before | more), line("doses", "Q8_0", after)
    (row,) = [one for one in page.dosed(known(*doses)).splitlines() if "Q8_0" in one]
    cells = dict(zip(page.GROUPS, [x.strip() for x in row.split("|")][4:], strict=False))
    assert cells["arithmetic"] == "100 %" and cells["ordering"] == "not judged"


def test_what_does_not_reach_the_perplexity_is_not_compared_at_it() -> None:
    claim = next(one for one in claims()["claim"] if one["id"] == "kfac-below-svd")
    (run,) = verdicts.replicates(known(table(1, svd="11", kfac="10")))
    assert NUMBERS["kfac-below-svd"](run) == 0.5
    grids = [grid(at, **{"0.9": (10, 0.5)}) for at in PLAN.runs]

    def word(*tables: dict[str, Any]) -> str:
        every = verdicts.verdicts(known(*grids, *tables), PLAN)
        return next(one.word for one in every if one.claim == claim)

    far = [table(k, "falls short", svd="11") for k in CALIBRATIONS]
    near = [table(k, svd="11") for k in CALIBRATIONS]
    assert word(*near) == "holds" and word(*far) == "not matched"
    assert word(*far[:1], *near[1:]) == "not judged: 4 of 5 calibrations"
    assert "100 %, falls short" in page.repeated(known(*far))
    assert "falls short" not in page.repeated(known(*near))
    left = {"recited_test": population("01")}
    third = {name: {"verdict": "matched", "left": left} for name in ("middle", "late")}
    third["middle"] = {"verdict": "overshoots", "left": left}
    (run,) = verdicts.replicates(known(table(1), line("thirds", "1", third)))
    assert run.third("late") == 0.5 and math.isnan(run.third("middle"))


def test_a_calibration_stands_under_its_own_name() -> None:
    """Also where its line was made anew, and is the last."""
    tables = [table(k, kfac="1" * (k % 2) + "0") for k in (3, 2, 1)]
    rows = page.repeated(known(*tables)).splitlines()[2:5]
    found = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows]
    assert found == [["1", "11.00", "50 %"], ["2", "12.00", "0 %"], ["3", "13.00", "50 %"]]
    assert [one.kept("recited") for one in verdicts.replicates(known(*tables))] == [0.5, 0, 0.5]


def test_right_answers_are_counted_by_what_they_are() -> None:
    some = table(2), table(1)
    for at, row in enumerate(some):  # before all of yes, yes, no; after the second calibration: no
        test = [one["populations"]["test"] for one in row["found"]["edits"]]
        row["found"]["baseline"]["test"]["two_test"] = population("111", 0.5)
        for left in test:
            left["two_test"] = population("110" if at else "001", 0.5)
    asked = line("models", "answers", {"two_test": ["yes", "yes", "no"]})
    rows = page.answered(known(*some, asked)).splitlines()[2:]
    found = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    assert found == [["two", "no", "1", "0", "1", "0", "0", "0", "-33 %"],
                     ["two", "yes", "2", "2", "0", "2", "2", "2", "33 %"]]  # fmt: skip
    assert page.answered(known(*some)) == page.NOT


# ------------------------------------------------------------------ the run


def test_what_is_of_other_claims_is_not_found() -> None:
    of = known(table(1) | {"claims": "other"}, table(2))
    assert list(of.found(verdicts.AT_PERPLEXITY)) == ["2"]
    assert of.find(verdicts.AT_PERPLEXITY, "1") is None


def test_a_cost_is_all_processor_time(tmp_path: Path) -> None:
    of = Results(tmp_path / "m.jsonl")
    row = of.keep("p", "k", {}, {"user": 2.04, "system": 3.0, "seconds": 99.0, "peak": 7.6}, {})
    assert (row["seconds"], row["peak"]) == (5.0, 8)


def test_a_line_of_other_inputs_or_claims_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def once(inputs: dict[str, Any]) -> None:
        of = results.load("m", tmp_path)
        made = of.once("p", "k", inputs, lambda: (2,), lambda n: done.append(n) or {"n": (n,)})
        assert made == {"n": [2]}

    for inputs in ({"x": (1,)}, {"x": (1,)}, {"x": (2,)}):
        once(inputs)
    assert len(done) == 2
    monkeypatch.setattr(results, "claims_sha256", lambda: "other")
    once({"x": (2,)})
    assert len(done) == 3
    (row,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(row)["claims"] == "other"


def test_parts_are_named_in_their_order() -> None:
    assert names("table, models") == ["models", "table"]
    with pytest.raises(Exception, match="'tables' is none of models"):
        names("tables")


@pytest.mark.slow(seconds=90)
def test_every_part_runs_on_the_small_model_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="extra `gguf`")
    found = Results(tmp_path / "results.jsonl")
    for part in PARTS.values():
        part(Files(PLANS[SMALL], tmp_path, found))
    count = len(found.rows)
    words = {one.claim["id"]: one.word for one in verdicts.verdicts(found, PLANS[SMALL])}
    assert set(words.values()) <= {"holds", "holds in the mean", "does not hold"}, words
    assert words["kfac-below-svd"] == words["recited-falls"] == "holds"  # as the demo shows
    made = page.block({SMALL: found})
    bsn = [row for row in made.splitlines() if page.NOT in row]
    assert len(bsn) == 2 and all(row.startswith("| BSN") for row in bsn)

    def refuse(*_: Any) -> Any:
        raise AssertionError("done twice")

    monkeypatch.setattr(results, "measured", refuse)
    for part in PARTS.values():
        part(Files(PLANS[SMALL], tmp_path, found))
    assert len(found.rows) == count
    files = Files(PLANS[SMALL], tmp_path, found)
    before = [json.loads(line) for line in files.recited().read_text().splitlines()]
    files.recited().unlink()  # the search is not repeated either
    again = [json.loads(line) for line in files.recited().read_text().splitlines()]
    assert again == [{k: v for k, v in one.items() if k in again[0]} for one in before]
    assert len(again) == len(before) > 10
