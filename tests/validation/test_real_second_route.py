"""validation/real: every judged number of the page by a second route, in plain Python.

Reads README.md, claims.toml and results/ alone, and shares no code with what wrote the page.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from math import comb, log, sqrt
from pathlib import Path
from typing import Any

import pytest

HOUSE = Path(__file__).parents[2] / "validation/real"
CLAIMS = tomllib.loads((HOUSE / "claims.toml").read_text(encoding="utf-8"))
GROUPS: dict[str, Any] = CLAIMS["populations"]
Z, T4 = 1.959963984540054, 2.7764451051977987
"""Of 95 %: normal, and t of four degrees of freedom (five calibrations)."""
FIVE = "12345"
NOT = "not measured"
Rows = list[list[str]]


class Page:
    """One model's results, and its tables as they are printed."""

    def __init__(self, model: str, title: str) -> None:
        text = (HOUSE / f"results/{model}.jsonl").read_text(encoding="utf-8")
        self.rows = [json.loads(one) for one in text.splitlines()]
        page = (HOUSE / "README.md").read_text(encoding="utf-8").partition("real: end")[0]
        self.text = page.partition(f"\n## {title}")[2].partition("\n## ")[0]
        self.tables, self.sizes = self.found("table at equal perplexity"), self.found("sizes")
        self.before = self.tables["1"]["baseline"]["test"] if self.tables else {}

    def found(self, part: str) -> dict[str, Any]:
        return {row["key"]: row["found"] for row in self.rows if row["part"] == part}

    def section(self, heading: str) -> str:
        return self.text.partition(f"### {heading}")[2].partition("\n### ")[0]

    def table(self, heading: str, at: int = 0) -> Rows:
        """The cells of a section's table, without its head."""
        tables: list[Rows] = [[]]
        for line in self.section(heading).splitlines():
            if line.startswith("|"):
                tables[-1].append([cell.strip(" *`") for cell in line.strip("|").split("|")])
            elif tables[-1]:
                tables.append([])
        return tables[at][2:]

    def method(self, k: str, name: str, of: str = "perplexity") -> dict[str, Any]:
        edits = self.found(f"table at equal {of}")[k]["edits"]
        return dict(next(one for one in edits if one["method"] == name))

    def left(self, k: str, name: str) -> dict[str, Any]:
        return dict(self.method(k, name)["populations"]["test"])

    def sets(self, group: str) -> list[str]:
        named = GROUPS.get(group, [group])
        if isinstance(named, str):
            return [f"{group}_test"]
        return [f"{one}_test" for one in named if right(self.before[f"{one}_test"]) >= 50]

    def kept(self, after: dict[str, Any], names: list[str]) -> float:
        def known(some: dict[str, Any]) -> float:
            return sum(right(some[name]) - some[name]["chance"] * some[name]["items"]
                       for name in names)  # fmt: skip

        return known(after) / known(self.before) if names else math.nan

    def nats(self, k: str, name: str) -> float:
        after, before = self.left(k, name), self.before
        rise = log(worth(after, "clean", "perplexity") / worth(before, "clean", "perplexity"))
        return (worth(after, "recited", "nats") - worth(before, "recited", "nats")) / rise

    def band(self, k: str, kind: str, at: int) -> float:
        layers = [one for one in self.found("bands")[k][kind] if one["clean"][at]]
        return sum(one["memorised"][at] / one["clean"][at] for one in layers) / len(layers)

    def third(self, k: str, name: str) -> float:
        one = self.found("thirds")[k][name]
        return self.kept(one["left"], ["recited_test"]) if one["verdict"] == "matched" else math.nan


def right(one: dict[str, Any]) -> int:
    return int(one["right"].count("1"))


def worth(some: dict[str, Any], population: str, name: str) -> float:
    return float(some[f"{population}_test"]["values"][name])


def wilson(n: int, of: int) -> tuple[float, float]:
    middle, half = n / of + Z * Z / of / 2, Z * sqrt(n / of * (1 - n / of) / of + (Z / of / 2) ** 2)
    return (middle - half) / (1 + Z * Z / of), (middle + half) / (1 + Z * Z / of)


def mcnemar(one: str, other: str) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    few = min(pairs.count(("1", "0")), pairs.count(("0", "1")))
    return min(1.0, 2 * sum(comb(len(pairs), k) for k in range(few + 1)) / 2 ** len(pairs))


def percent(x: float) -> str:
    return "–" if math.isnan(x) else f"{100 * x:.0f} %"


def span(low: float, high: float) -> str:
    return f" ({100 * low:.0f}–{100 * high:.0f})"


@pytest.fixture(scope="module", params=[("smollm2", "SmolLM2"), ("gemma3", "Gemma 3")], ids=str)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(*request.param)


def number(page: Page, name: str, k: str) -> float:
    """The number of a claim, from one calibration; its sentence is in claims.toml."""

    def kept(group: str, method: str = "kfac") -> float:
        return page.kept(page.left(k, method), page.sets(group))

    tasks = ("arithmetic", "facts", "open_book", "logic", "copying", "ordering")
    of: dict[str, Any] = {
        "recited-falls": lambda: kept("recited"),
        "recited-falls-most": lambda: min(kept(x) for x in tasks if page.sets(x)) - kept("recited"),
        "arithmetic-falls": lambda: kept("arithmetic"),
        "arithmetic-below-facts": lambda: kept("facts") - kept("arithmetic"),
        "facts-below-open-book": lambda: kept("open_book") - kept("facts"),
        "open-book-stays": lambda: kept("open_book"),
        "logic-stays": lambda: kept("logic"),
        "facts-kept": lambda: kept("facts"),
        "rare-facts-fall-more": lambda: kept("facts_frequent") - kept("facts_rare"),
        "kfac-below-svd": lambda: math.nan if page.method(k, "svd")["verdict"] != "matched"
        else kept("recited", "svd") - kept("recited"),
        "flat-bands-recited": lambda: page.band(k, "input_rank", 3) - 1,
        "sharp-bands-clean": lambda: page.band(k, "input_rank", 0) - 1,
        "late-blocks": lambda: page.third(k, "middle") - page.third(k, "late"),
        "not-fragility": lambda: kept("own") - kept("recited"),
        "not-any-cut": lambda: page.nats(k, "kfac") - page.nats(k, "random-basis"),
        "not-any-pairs": lambda: page.nats(k, "kfac") - page.nats(k, "random-pairs"),
        "not-the-calibration": lambda: page.sizes[f"{k}, 1/2"]["kept"]
        / page.method(k, "kfac")["kept"],
    }  # fmt: skip
    return float(of[name]())


def test_claims(page: Page) -> None:
    shown = page.table("Claims")
    assert [row[0] for row in shown] == [one["says"] for one in CLAIMS["claim"]]
    for claim, (_, bound, found, word) in zip(CLAIMS["claim"], shown, strict=True):
        side = "below" if "below" in claim else "above"
        assert bound == f"{side} {claim[side]:g}"
        if "(n = 5)" not in found:
            continue  # fewer calibrations are not judged, which another test says
        x = [number(page, claim["id"], k) for k in FIVE]
        mean = sum(x) / 5
        half = T4 * sqrt(sum((one - mean) ** 2 for one in x) / 4 / 5)
        assert found == f"{mean:.2f} ± {half:.2f} (n = 5)", claim["id"]
        over = claim[side] - mean if side == "below" else mean - claim[side]
        want = "holds" if over > half else "holds in the mean" if over > 0 else "does not hold"
        assert word == want or "not complete" in word, claim["id"]


def test_dev_chose(page: Page) -> None:
    grid, blocks = page.found("grid"), page.found("models")["unedited"]["blocks"]
    if not grid:
        pytest.skip("not measured yet")
    at: dict[int, list[tuple[float, float, float]]] = {}
    for layers, found in grid.items():
        base = found["baseline"]["dev"]["clean_dev"]["values"]["perplexity"]
        begin = int(re.findall(r"\d+", layers)[0])
        for edit in found["edits"]:
            dev = edit["populations"]["dev"]
            cost = (dev["clean_dev"]["values"]["perplexity"] or math.inf) / base
            at.setdefault(begin, []).append(
                (dev["recited_dev"]["values"]["strict"], cost, edit["rho"])
            )
    for row in page.table("Layers × ρ"):
        begin = int(row[0].partition("–")[0])
        if begin in at and all(math.isfinite(cost) for _, cost, _ in at[begin]):
            said = [f"{100 * (cost - 1):+.1f} %, {percent(x)}" for x, cost, _ in at[begin]]
            assert row[1:] == said, begin
    late = 2 * blocks // 3

    def least(begins: list[int]) -> tuple[float, float, float, int]:
        some = [(*one, b) for b in begins for one in at[b]]
        cheap = [one for one in some if one[1] <= 1.06]
        return min(cheap) if cheap else min(some, key=lambda one: one[1])

    text = page.section("Layers × ρ")
    _, _, rho, begin = least(list(at))
    assert f"Chosen: `blocks.{{{begin}-{begin + 2}}}.mlp.{{gate,up}}` at ρ = {rho:g}" in text
    for name, some in (("middle third", [b for b in at if b + 3 <= late]),
                       ("late third", [b for b in at if b >= late])):  # fmt: skip
        if some:
            begin = least(some)[3]
            assert f"{name} `blocks.{{{begin}-{begin + 2}}}.mlp.{{gate,up}}`" in text


@pytest.mark.parametrize("of", ["perplexity", "forgetting"])
def test_table_one(page: Page, of: str) -> None:
    if "1" not in page.found(f"table at equal {of}"):
        pytest.skip("not measured yet")
    none, *shown = page.table(f"Table 1, at equal {of}")
    kfac, before = page.method("1", "kfac", of)["populations"]["test"], page.before
    assert none[3].startswith(f"{worth(before, 'clean', 'perplexity'):.2f} ")
    assert none[7] == f"{worth(before, 'recited', 'nats'):.2f}"
    for name, kept, match, text, said, _, _, nats, ratio, p in shown[:-1]:
        one = page.method("1", name, of)
        left = one["populations"]["test"]
        recited, clean = left["recited_test"], left["clean_test"]
        if clean["values"]["perplexity"] is None:
            continue
        assert (kept, match) == (percent(one["kept"]), one["verdict"])
        low, high = clean["interval"]
        assert text == f"{worth(left, 'clean', 'perplexity'):.2f} ({low:.2f}–{high:.2f})"
        n, items = right(recited), recited["items"]
        assert said == f"{percent(n / items)} of {items}{span(*wilson(n, items))}"
        assert nats == f"{worth(left, 'recited', 'nats'):.2f}"
        rise = log(worth(left, "clean", "perplexity") / worth(before, "clean", "perplexity"))
        assert (
            ratio
            == f"{(worth(left, 'recited', 'nats') - worth(before, 'recited', 'nats')) / rise:.1f}"
        )
        x = mcnemar(recited["right"], kfac["recited_test"]["right"])
        assert p == ("" if name == "kfac" else "< 0.001" if x < 0.001 else f"{x:.3f}")


def test_spectrum(page: Page) -> None:
    if not page.tables:
        pytest.skip("not measured yet")
    for name, n, *cells in page.table("The spectrum of abilities (Figure 3), at equal perplexity"):
        names = page.sets(name) if name in GROUPS else [f"{name}_test"]
        if not names:
            assert n == "not judged"
            continue
        was = sum(right(page.before[one]) for one in names)
        assert n == str(was)
        for method, cell in zip(
            ("kfac", "svd", "random-basis", "random-pairs"), cells, strict=True
        ):
            left = page.left("1", method)
            want = percent(page.kept(left, names))
            if method == "kfac":
                items = sum(left[one]["items"] for one in names)
                chance = sum(left[one]["items"] * left[one]["chance"] for one in names) / items
                ends = wilson(sum(right(left[one]) for one in names), items)
                want += span(*((end - chance) / (was / items - chance) for end in ends))
            assert cell == want, (name, method)


def test_answers(page: Page) -> None:
    answers = page.found("models").get("answers")
    if not answers or not page.tables:
        pytest.skip("not measured yet")
    shown = {tuple(row[:2]): row[2:] for row in page.table("Where a guess")}
    after = [page.left(k, "kfac") for k in FIVE if k in page.tables]
    after += [page.left("1", name) for name in ("svd", "random-basis", "random-pairs")]
    kinds = {(name, one) for name, some in answers.items() for one in some}
    assert shown.keys() == {(name.removesuffix("_test"), one) for name, one in kinds}
    for name, said in kinds:
        own = [one == said for one in answers[name]]
        *found, always = shown[name.removesuffix("_test"), said]
        marks = [some[name]["right"] for some in (page.before, *after)]
        assert found == [
            str(sum(x == "1" and y for x, y in zip(m, own, strict=True))) for m in marks
        ]
        n, chance = len(own), page.before[name]["chance"]
        known = right(page.before[name]) - chance * n
        assert always == percent((sum(own) - chance * n) / known)


def test_bands(page: Page) -> None:
    for at, kind in enumerate(("input_rank", "pair_mass")):
        for band, row in enumerate(page.table("Bands by", at) if page.found("bands") else []):
            some = zip(sorted(page.found("bands")), row[1:], strict=True)
            assert all(cell == f"{page.band(k, kind, band):.2f}" for k, cell in some), row


def test_calibrations_and_sizes(page: Page) -> None:
    recited, own = ["recited_test"], ["own_test"]
    for k, text, *cells in page.table("Five calibrations"):
        if text == NOT:
            assert k not in page.tables
            continue
        left = page.left(k, "kfac")
        assert text == f"{worth(left, 'clean', 'perplexity'):.2f}"
        some = [page.left(k, one) for one in ("kfac", "svd", "random-basis", "random-pairs")]
        want = [*(percent(page.kept(one, recited)) for one in some), percent(page.kept(left, own))]
        assert [cell.partition(",")[0] for cell in cells] == want, k
    shown = page.table("Size of the calibration") if page.tables else []
    assert len(shown) == len(page.tables) + len(page.sizes)
    for name, pairs, text, *cells in shown:
        k, _, part = name.partition(":")[0].partition(", ")
        one = page.method(k, "kfac") if part == "all" else page.sizes[f"{k}, {part}"]
        left = one["populations"]["test"] if part == "all" else one["left"]
        assert (pairs, text) == (percent(one["kept"]), f"{worth(left, 'clean', 'perplexity'):.2f}")
        assert cells == [percent(page.kept(left, some)) for some in (recited, own)], name


def test_passages(page: Page) -> None:
    if "recited" not in page.found("models"):
        pytest.skip("not measured yet")
    some = page.found("models")["recited"]["passages"]
    shown = {row[0]: row[1:] for row in page.table("What it is", 1)}
    for name, found in shown.items():
        of = [[one["document"] for one in some if one["split"] == x] for x in ("dev", "test")]
        if name == "from documents":
            assert found == [str(len(set(x))) for x in of]
        else:
            part = "" if name == "together" else name
            assert found == [str(sum(part in one for one in x)) for x in of], name


def test_doses(page: Page) -> None:
    doses = page.found("doses")
    if "none" not in doses:
        pytest.skip("not measured yet")
    assert doses["none"] == page.before
    for dose, text, nats, *cells in page.table("Doses of quantisation"):
        if text == NOT:
            continue
        left = doses[dose]
        assert text == f"{worth(left, 'clean', 'perplexity'):.2f}"
        assert nats == f"{worth(left, 'recited', 'nats'):.2f}"
        some = {group: page.sets(group) for group in GROUPS}
        want = [percent(page.kept(left, names)) if names else "not judged"
                for names in some.values()]  # fmt: skip
        assert cells == want, dose
