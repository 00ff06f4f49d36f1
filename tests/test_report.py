"""Numbers that are read back from what people see: the table, the plots' artists, the page."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.text import Text

from refcurv.algebra.staircase import cut
from refcurv.editing.record import EditRecord, LayerEdit
from refcurv.evaluation.bands import MASS_EDGES, RANK_PERCENT, Bands, Quantity
from refcurv.evaluation.suite import Measured, Measurement, compare
from refcurv.files import store
from refcurv.files.disk import write_json
from refcurv.files.inspect import inspect_file
from refcurv.law.checks import EmptyError, RefcurvError, SchemaError, StorageError
from refcurv.law.conventions import describe
from refcurv.progress import size
from refcurv.report import cells, folder, page, plots, printed, table
from refcurv.report.plots import pareto
from refcurv.report.text import display_width, filled, format_rows, printable, shorten
from refcurv.terminal import streams

Terminal = Callable[[int], AbstractContextManager[None]]

POPULATIONS = {  # kind, items, chance, before, after
    "quotes_test": ("recite", 48, 0.0, (47 / 48, 1.0, 0.005), (0.0625, 0.3125, 0.412)),
    "language_test": ("text", 256, 0.0, (24.9512,), (26.4731,)),
    "facts_test": ("answer", 150, 0.025, (1.0,), (0.98,)),
    "open_book_test": ("answer", 2000, 0.25, (0.998,), (0.974,)),
    "copying_test": ("answer", 2000, 0.0, (0.99,), (0.905,)),
    "addition_test": ("answer", 2000, 0.01, (0.998,), (0.762,)),
    "boolean_test": ("answer", 600, 0.5, (0.865,), (0.852,)),
}
ORDER = ["quotes", "addition", "facts", "open book", "boolean", "copying"]
HOSTILE = '<script>alert("x")</script>\x1b[31m\n$x_{$' + "blocks" * 40 + "\u6f22\u5b57\ud800"


def measurement(which: int) -> Measurement:
    populations = {}
    for name, (kind, items, chance, *values) in POPULATIONS.items():
        named = dict(zip(table.MEASURES[kind], values[which], strict=True))
        top = np.arange(12)[:, None] + np.arange(10) if kind == "text" else None
        if top is not None and which:
            top = top[:, ::-1]
        populations[name] = Measured(kind, items, 3 * items, chance, named, top)
    return Measurement("test", 464, "float64", populations)


def some_bands(layer: str, quantity: Quantity, rng: np.random.Generator) -> dict[str, Any]:
    ranks = tuple(p / 100 for p in RANK_PERCENT)
    edges = MASS_EDGES if quantity is Quantity.PAIR_MASS else ranks
    n = len(edges) - 1
    hot, cold = rng.uniform(0.5, 2, n), rng.uniform(0.5, 2, n)
    return Bands(layer, quantity, edges, (7,) * n, tuple(hot), tuple(cold), True).to_json()


def some_controls() -> dict[str, Any]:
    """As `refcurv.judge.controls` returns them; SVD cannot be matched."""

    def left(recitation: float, perplexity: float) -> dict[str, Any]:
        values = {name: 0.5 for name in POPULATIONS}
        values |= {"quotes_test": recitation, "language_test": perplexity}
        return {"recitation": recitation, "perplexity": perplexity, "values": values}

    def one(method: str, removed: float, verdict: str, **values: float) -> dict[str, Any]:
        how = {"removed": removed, "kept": 0.4, "dev_perplexity": 26.4, "verdict": verdict}
        return {"method": method, **how, "matched": verdict == "matched", **left(**values)}

    def points(*found: tuple[float, float, float]) -> list[dict[str, float]]:
        return [dict(zip(("removed", "recitation", "perplexity"), x, strict=True)) for x in found]

    return {
        "split": "test",
        "populations": {"recitation": "quotes_test", "perplexity": "language_test"},
        "tolerance": 0.005,
        "unedited": left(47 / 48, 24.9512),
        "compared": [
            one("kfac", 0.15, "matched", recitation=0.0625, perplexity=26.4731),
            one("svd", 0.002, "overshoots", recitation=0.9, perplexity=27.1),
            one("random pairs", 0.0125, "matched", recitation=0.8, perplexity=26.5),
        ],
        "curves": {
            "kfac": points((0.07, 0.5, 25.5), (0.15, 0.0625, 26.4731), (0.3, 0.0, 29.0)),
            "svd": points((0.004, 0.7, 29.5), (0.002, 0.9, 27.1), (0.4, 0.0, 4000.0)),
            "random pairs": points((0.0125, 0.8, 26.5)),
        },
    }


@pytest.fixture
def results(rng: np.random.Generator) -> dict[str, Any]:
    return example(rng)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of these results, alone in its folder. Plots take a second."""
    folder = tmp_path_factory.mktemp("page")
    page.write_page(example(np.random.default_rng(20251024)), folder / "report.html")
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def example(rng: np.random.Generator) -> dict[str, Any]:
    """What `refcurv demo` hands over, made with the records whose JSON it is."""
    edited, spectrum = [], {}
    for block in (2, 3):
        mu = np.sort(rng.exponential(size=16) ** 2)[::-1]
        for name in (f"blocks.{block}.mlp.gate", f"blocks.{block}.mlp.up"):
            lam = np.sort(rng.exponential(size=48) ** 2)[::-1]
            stairs = cut(lam, mu, 0.85)
            share = stairs.mass / stairs.total
            kept = (768, stairs.kept, share, stairs.gap, 1, 0.8)
            edited.append(LayerEdit("kfac", name, 0.85, *kept))
            spectrum[name] = {"mu": mu.tolist(), "lam": lam.tolist()}
    kinds = ("gate", "up", "down")
    names = [f"blocks.{block}.mlp.{kind}" for block in range(4) for kind in kinds]
    made = {
        "title": "Memory and reasoning",
        "refcurv": "0.1.0",
        "settings": {
            "layers": "blocks.{2-3}.mlp.{gate,up}",
            "rho": 0.85,
            "fisher": "sampled",
            "seed": 0,
            "dtype": "float64",
            "split": "test",
            "calibration_tokens": 81920,
            "architecture": "OLMo-2, 4 blocks",
        },
        "edit": EditRecord(tuple(edited)).to_json(),
        "evaluation": compare(measurement(1), measurement(0)).to_json(),
        "controls": some_controls(),
        "bands": {n: some_bands(n, Quantity.PAIR_MASS, rng) for n in names},
        "input_bands": {n: some_bands(n, Quantity.INPUT_RANK, rng) for n in names},
        "spectrum": spectrum,
        "seconds": {"collect": 14.25, "edit": 0.09},
        "files": {"factors": "my factors.h5"},
        "provenance": {"refcurv": "0.1.0", "libraries": {"numpy": "2"}},
    }
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.fixture
def hostile(results: dict[str, Any]) -> dict[str, Any]:
    """Names to break out of a terminal, a plot or a page, and nulls where numbers were."""
    text = json.dumps(results)
    text = text.replace('"blocks.2.mlp.gate"', json.dumps(HOSTILE))
    text = text.replace('"quotes_test"', json.dumps(HOSTILE + "_quotes"))
    made = json.loads(text)
    made["title"] = made["refcurv"] = made["settings"]["architecture"] = HOSTILE
    made["provenance"][HOSTILE] = made["files"]["factors"] = HOSTILE
    made["settings"]["rho"] = {HOSTILE: 0.85, "blocks.3.mlp.*": None}
    rows = made["evaluation"]["rows"]
    rows[0]["retention"] = rows[1]["after"]["perplexity"] = rows[2]["retention"] = None
    rows[2]["retention_above_chance"] = rows[3]["before"]["accuracy"] = math.nan
    rows[1]["agreement"]["ndcg_code"] = None
    made["edit"][1] |= {"kept": 0, "gap": None, "mass": None}
    made["edit"][2] |= {"kept": None, "pairs": 0}
    made["bands"]["blocks.3.mlp.up"]["ratio"][0] = None
    made["spectrum"]["blocks.3.mlp.up"]["lam"] = [0.0] * 48
    made["controls"]["compared"][1] |= {"method": HOSTILE, "removed": None, "verdict": HOSTILE}
    made["controls"]["compared"][2] |= {"perplexity": None, "values": None}
    made["controls"]["curves"][HOSTILE] = made["controls"]["curves"].pop("svd")
    made["controls"]["curves"]["kfac"][2]["perplexity"] = None
    made["controls"]["curves"]["random pairs"][0] |= {"removed": None, "recitation": math.nan}
    made["spectrum"]["blocks.3.mlp.gate"]["mu"][5:] = [0.0] * 11
    return made


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------ table


def rows_of(text: str, title: str) -> list[list[str]]:
    """The rows of one table of a text, cut where two blanks stand."""
    lines = text.split(title, 1)[1].split("\n\n", maxsplit=1)[0].splitlines()[3:]
    return [re.split(r" {2,}", line.strip()) for line in lines]


def test_table_has_every_number(results: dict[str, Any]) -> None:
    text = printed.format_results(results)
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert rows_of(text, "Memory and reasoning, split test") == [
        ["quotes", "strict", "48", "97.9 %", "6.2 %", "-91.7 pt", "6.4 %"],
        ["loose", "100.0 %", "31.2 %", "-68.8 pt"],
        ["distance", "0.005", "0.412", "+0.407"],
        ["language", "perplexity", "256", "24.95", "26.47", "+6.1 %"],
        ["facts", "accuracy", "150", "100.0 %", "98.0 %", "-2.0 pt", "98.0 %", "97.9 %"],
        ["open book", "accuracy", "2,000", "99.8 %", "97.4 %", "-2.4 pt", "97.6 %", "96.8 %"],
        ["copying", "accuracy", "2,000", "99.0 %", "90.5 %", "-8.5 pt", "91.4 %"],
        ["addition", "accuracy", "2,000", "99.8 %", "76.2 %", "-23.6 pt", "76.4 %", "76.1 %"],
        ["boolean", "accuracy", "600", "86.5 %", "85.2 %", "-1.3 pt", "98.5 %", "96.4 %"],
    ]
    agreement = results["evaluation"]["rows"][1]["agreement"]
    paper, code = (f"{agreement[key]:.3f}" for key in ("ndcg_paper", "ndcg_code"))
    assert paper != code
    assert rows_of(text, "nDCG@10 of the likeliest tokens against the unedited model's") == [
        ["language", paper, code]
    ]
    controls = rows_of(text, "Other cuts at the dev perplexity of the K-FAC edit")
    assert controls == [
        ["cut away", "15 % of mass", "0.2 % of Σσ²", "1.25 % of pairs"],
        ["pairs or directions kept", "40.00 %", "40.00 %", "40.00 %"],
        ["perplexity, dev", "26.40", "26.40", "26.40"],
        ["matched", "overshoots", "matched"],
        ["quotes, strict", "97.9 %", "6.2 %", "90.0 %", "80.0 %"],
        ["language, perplexity", "24.95", "26.47", "27.10", "26.50"],
        *(
            [name, "50.0 %", "50.0 %", "50.0 %", "50.0 %"]
            for name in ("facts", "open book", "copying", "addition", "boolean")
        ),
    ]
    bands = rows_of(text, "sharp → flat")
    assert [row[0] for row in bands] == [row["layer"] for row in results["edit"]]
    for row in bands:
        assert row[1:] == [f"{ratio:.2f}" for ratio in results["bands"][row[0]]["ratio"]]


def test_edit_table(results: dict[str, Any]) -> None:
    text = "\n" + printed.format_edit(results["edit"])
    rows = rows_of(text, "K-FAC: pairs and curvature mass kept")
    for row, want in zip(rows, results["edit"], strict=True):
        layer, rho, pairs, kept, share, mass, gap, acceptable, norm = row
        assert (layer, rho, pairs, int(kept)) == (want["layer"], "0.85", "768", want["kept"])
        assert float(share.removesuffix(" %")) == pytest.approx(want["kept"] / 7.68, abs=0.051)
        assert float(mass.removesuffix(" %")) == pytest.approx(100 * want["mass"], abs=0.0051)
        assert float(gap) == pytest.approx(want["gap"], rel=0.06)
        assert (acceptable, norm) == ("1", "0.800")


def test_what_rounding_restored_is_shown_where_there_is_any(results: dict[str, Any]) -> None:
    (first, *rest) = results["edit"]
    for restored, shown in ((0.0, None), (1e-17, None), (3.14e-4, "3.1e-04")):
        text = printed.format_edit([{**first, "restored": restored}, *rest])
        assert ("restored" in text) == (shown is not None)
        if shown:
            rows = rows_of("\n" + text, "Beside it: what rounding gave back of the cut")
            wanted = [shown, *["0.0e+00"] * len(rest)]
            assert rows == [
                [row["layer"], x] for row, x in zip(results["edit"], wanted, strict=True)
            ]


def test_the_norm_against_the_original_is_shown_after_an_earlier_edit(
    results: dict[str, Any],
) -> None:
    first, *rest = results["edit"]
    assert table.past_table(results["edit"]).rows == ()
    again = table.past_table([{**first, "norm_original": 0.25}, *rest])
    assert again.headers == ("layer", "‖W'‖ of the original")
    assert again.rows[0] == (first["layer"], "0.250")
    assert [row[1] for row in again.rows[1:]] == ["-"] * len(rest)
    assert table.past_table([{**first, "norm_original": first["norm"]}]).rows == ()


def test_what_an_edit_starts_from_is_one_line() -> None:
    own, other = "a" * 64, "b" * 64
    row = {"rho": 0.6, "norm": 0.5, "restored": 0.0, "joint": False}
    past = {"method": "kfac", "weights": other, "made_for": other, "became": own, "forced": False}
    past["layers"] = {"blocks.0.mlp.up": row, "blocks.1.mlp.up": {**row, "rho": 0.75}}
    says = printed.format_start
    same = {"weights": own, "made_for": own, "forced": False, "earlier": []}
    assert says(same) == "starts from weights aaaaaaaaaaaa, of which no earlier edit is known"
    assert says({**same, "made_for": None}).endswith(
        "; the basis does not say which weights it was made from"
    )
    again = says({**same, "made_for": other, "forced": True, "earlier": [past, past]})
    one = "kfac 0.6 to 0.75 of blocks.0.mlp.up and 1 more"
    assert again == (
        f"starts from weights aaaaaaaaaaaa, edited before by {one}, then {one}; kept, mass and "
        "norm are of what that left; forced: what chose was made from others, bbbbbbbbbbbb"
    )
    hostile = {**past, "method": HOSTILE, "layers": {HOSTILE: row}}
    assert says({**same, "earlier": [hostile]}).isprintable()
    nothing = {**past, "layers": {}}
    assert "edited before by kfac" in says({**same, "earlier": [nothing]})


@pytest.mark.parametrize(
    ("method", "title", "words"),
    [
        ("svd", "SVD: singular directions", ("energy", "of directions", "Σσ²")),
        ("bsn", "BSN: weights", ("1 − ratio", "of weights", "Σw²")),
        ("random pairs", "Random pairs: pairs", ("share", "of pairs", "mass")),
        ("inputs only", "Inputs only: pairs", ("ρ", "of pairs", "mass")),
        (HOSTILE, printable(HOSTILE)[:12], ("ρ", "of pairs", "mass")),
    ],
)
def test_the_edit_table_names_its_method(
    method: str, title: str, words: tuple[str, ...], results: dict[str, Any]
) -> None:
    text = printed.format_edit([row | {"method": method} for row in results["edit"]])
    first, headers, *_ = text.splitlines()
    assert first.startswith(title)
    assert all(word in headers for word in words)
    assert first.isprintable()


def test_without_a_baseline_there_is_one_column() -> None:
    text = printed.format_evaluation(compare(measurement(1), None).to_json())
    rows = rows_of(text, "Memory and reasoning, split test")
    assert rows[0] == ["quotes", "strict", "48", "6.2 %"]
    assert rows[3] == ["language", "perplexity", "256", "26.47"]
    assert "nDCG" not in text
    assert "before" not in text


def test_unknown_is_a_dash() -> None:
    text = format_rows(["name", "x"], [["a", None], ["b", math.nan], ["c", 0]], "lr")
    assert text.splitlines()[2:] == ["a     -", "b     -", "c     0"]
    for value in (None, math.nan, math.inf, "x", True):
        assert cells.percent(value) == cells.decimal(value) == cells.whole(value) == "-"
    assert cells.percent(-0.0004) == cells.percent(0) == "0.0 %"
    assert cells.percent(422 / 884_736) == "0.05 %" and cells.percent(1e-9) == "1e-07 %"
    assert cells.percent(0.0004, sign="+") == "+0.0 %"  # a change, not a share
    assert cells.decimal(np.float32(0.5), 2) == "0.50"
    assert cells.percent(cells.relative(0, 3)) == "-"
    assert cells.decimal(12345678.0) == "1.235e+07"


def test_names_are_readable() -> None:
    assert cells.population_name("open_book_test", "test") == "open book"
    assert cells.population_name("open_book_test", "dev") == "open book test"
    assert cells.population_name("_test", "test") == " test"
    assert cells.rho_text({"blocks.*": 0.9, "head": 0.5}) == "blocks.* 0.9, head 0.5"


def test_nothing_is_cut_where_there_is_no_terminal(
    results: dict[str, Any], on_terminal: Terminal
) -> None:
    """On a terminal tables are as wide as that; also where `streams` stands before it."""
    long = "blocks.0." + "a_layer_of_a_long_name" * 8
    facts = {"path": f"{long}.h5", "format": "x", "version": 2, "nbytes": 0, "weights": None}
    facts |= {"entries": [], "attributes": {"config": long, "other": 1}}
    results["edit"][0]["layer"] = results["title"] = long
    made: list[Callable[[], str]] = [
        lambda: printed.format_inspect(facts),
        lambda: printed.format_results(results),
        lambda: printed.format_edit(results["edit"]),
    ]
    for text in made:
        whole = text()
        assert long in whole and "…" not in whole
        assert max(line.count("─") for line in whole.splitlines()) == 100
        for columns in (90, 150):
            with on_terminal(columns):
                assert columns - 40 < max(map(display_width, text().splitlines())) <= columns
            with on_terminal(columns), streams():
                assert "…" in text() != whole
    with mock.patch.object(sys, "stdout", None):
        assert made[0]().splitlines()[0] == f"{long}.h5"


def test_rows_are_aligned(on_terminal: Terminal) -> None:
    text = format_rows(["layer", "n"], [["漢字", 5], ["é" * 2 + "e\u0301", 12]], "lr")
    assert text.splitlines() == ["layer   n", "─" * 9, "漢字    5", "éée\u0301    12"]
    with on_terminal(30):
        long = format_rows(["layer", "n"], [["x" * 300, 1], ["y", 123456]], "lr")
    assert long.splitlines()[2] == "x" * 21 + "…       1"
    assert {len(line) for line in long.splitlines()[1:]} == {30}
    assert format_rows(["a"], [], "l") == "a\n─"
    with pytest.raises(ValueError, match="shorter"):
        format_rows(["a", "b"], [["only"]], "ll")


@pytest.mark.parametrize("width", [20, 40, 79, 80, 120])
def test_what_has_no_room_beside_a_name_stands_below(width: int, on_terminal: Terminal) -> None:
    """Every cell is shown, beside the name of its row, which is whole up to 32 columns."""
    names = [f"blocks.{i}.mlp.{kind}" for i in (2, 31) for kind in ("gate", "up")]
    headers = ["layer", *(f"column {n}" for n in range(9)), "what is said"]
    rows = [[name, *(f"{k}{n:05}" for n in range(9)), "x" * 90] for k, name in enumerate(names)]
    with on_terminal(width):
        text = format_rows(headers, rows, "l" + 9 * "r" + "l")
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert len(parts) == {20: 10, 40: 6, 79: 3, 80: 3, 120: 2}[width]
    assert all(display_width(line) <= width for part in parts for line in part)
    for k, row in enumerate(rows):
        lines = [part[2 + k] for part in parts]
        if width > 20:
            assert all(line.startswith(f"{row[0]} ") for line in lines)
        assert [cell for line in lines for cell in line.split()[1:]][:9] == row[1:10]
        assert lines[-1].endswith("x…")


def test_hostile_names_stay_on_their_line(hostile: dict[str, Any], on_terminal: Terminal) -> None:
    with on_terminal(130):
        text = printed.format_results(hostile)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(display_width, text.split("\n\n", 1)[1].splitlines())) <= 130
    rows = rows_of(text, "Memory and reasoning, split test")
    assert len(rows) == 9
    assert rows[0][-1] == "-"
    assert rows[3] == ["language", "perplexity", "256", "24.95", "∞", "-"]
    assert rows[4][-2:] == ["-", "-"]
    assert rows[5][3:6] == ["-", "97.4 %", "-"]


@given(st.text(st.sampled_from("ab\u0301\u4e00 "), max_size=30), st.integers(1, 20))
def test_a_text_is_shortened_to_as_many_columns_as_fit(text: str, width: int) -> None:
    found = shorten(text, width)
    if display_width(text) <= width:
        assert found == text
    else:
        fits = [text[:n] for n in range(len(text)) if display_width(text[:n]) < width]
        assert found == fits[-1] + "…"


def test_a_long_attribute_is_shown_at_once(on_terminal: Terminal) -> None:
    """In time that grows with its length: by its square, this test would take days."""
    facts = {"path": "x.h5", "format": "refcurv-basis", "version": 2, "nbytes": 0, "entries": []}
    for columns in (100, None):
        with nullcontext() if columns is None else on_terminal(columns):
            text = printed.format_inspect({**facts, "attributes": {"config": "x" * 10**6}})
        assert max(map(len, text.splitlines())) == (columns or len("weights  ") + 10**6)


def test_what_a_terminal_obeys_is_escaped() -> None:
    """As Python writes it, so that nothing is lost: newlines, escapes, half characters."""
    text = "a\n\tb\x1b[31m\u2028\u00a0\ud800é漢"
    assert printable(text) == r"a\n\tb\x1b[31m\u2028\xa0\ud800é漢"
    assert format_rows(["x"], [[text]], "l").splitlines()[2] == printable(text)


def test_inspect_shows_a_text_of_several_lines_on_one() -> None:
    """In a text as in JSON, where a newline is an escape already; in a path too."""
    facts = {"path": "a\nb.h5", "format": "x", "version": 2, "nbytes": 0, "entries": []}
    config = {"plain": "one\ntwo", "parsed": {"note": "one\ntwo"}}
    first, _, *lines = printed.format_inspect({**facts, "attributes": config}).splitlines()
    assert first == r"a\nb.h5"
    assert [re.split(r" {2,}", line) for line in lines[-2:]] == [
        ["plain", r"one\ntwo"],
        ["parsed", r"note one\ntwo"],
    ]


def test_inspect_says_which_decisions_of_the_law_were_others() -> None:
    facts = {"path": "a.h5", "format": "x", "version": 2, "nbytes": 0, "entries": []}
    ours = describe()

    def told(law: dict[str, str]) -> str:
        text = printed.format_inspect({**facts, "provenance": {"conventions": law}})
        (line,) = (x for x in text.splitlines() if x.startswith("conventions"))
        return line.removeprefix("conventions").strip()

    assert told(ours) == f"{len(ours)} decisions, word for word this version's"
    first, *rest = ours
    changed = {first: "x", **{name: ours[name] for name in rest[1:]}, "OLD": "y"}
    assert told(changed) == (
        f"3 decisions in other words than this version's: {first}; {rest[0]}; OLD"
    )


def test_inspect_shows_names_and_their_texts_without_brackets() -> None:
    assert printed._compact({"numpy": "2.4", "scipy": "1.17"}) == "numpy 2.4, scipy 1.17"
    assert printed._compact(["AVX", "AVX2"]) == "AVX, AVX2"
    assert printed._compact({"n": 1}) == '{"n": 1}'
    assert printed._compact([]) == "[]" and printed._compact({}) == "{}"


def test_inspect_names_every_array(tmp_path: Path) -> None:
    entries = [
        store.Entry("blocks.0.mlp.up.sum_A", np.ones((3, 4)), {"rows": 7}),
        store.Entry("n", np.int64(3)),
    ]
    store.write(
        tmp_path / "a.h5",
        format="refcurv-factors",
        attributes={"config": '{"width": 128}'},
        arrays=entries,
        provenance=store.provenance(seed=0),
    )
    text = printed.format_inspect(inspect_file(tmp_path / "a.h5"))
    lines = text.splitlines()
    assert "refcurv-factors, version 2: 2 arrays, 104 B, every checksum verified" in lines
    assert re.search(r'^config +\{"width": 128\}$', text, re.M)
    assert re.search(rf"^libraries +numpy {np.__version__}, scipy ", text, re.M)
    row = next(line for line in lines if line.startswith("blocks"))
    found = re.split(r" {2,}", row)
    assert found == ["blocks.0.mlp.up.sum_A", "3 × 4", "float64", "96 B", "rows 7"]
    assert next(line for line in lines if line.startswith("n  ")).endswith("8 B")
    long = [line for line in lines if not line.startswith("cpu_features")]
    assert "…" not in text and max(map(len, long)) < 300


def test_inspect_of_a_large_model_is_a_short_table() -> None:
    """Arrays share a line if the number of their block is all that tells them apart."""

    def entry(name: str, length: int, **more: Any) -> dict[str, Any]:
        return {"name": name, "shape": [length, 4], "stored": "float32", "nbytes": 1000,
                "attributes": more}  # fmt: skip

    entries = [entry("embed.weight", 9)]
    entries += [entry(f"blocks.{n}.up", 4, checkpoint_name=f"h.{n}.up", kind="F32" if n else "Q8")
                for n in (0, 1, 2, 4)]  # fmt: skip
    entries += [entry(f"blocks.{n}.gain", n, rows=n) for n in (5, 6)]
    facts = {"path": "w.h5", "format": "x", "version": 2, "nbytes": 0, "entries": entries}
    found = printed.format_inspect(facts).split("arrays\n")[1].splitlines()[2:]
    assert [re.split(r" {2,}", line.strip()) for line in found] == [
        ["embed.weight", "9 × 4", "float32", "1.0 kB"],
        ["blocks.0.up", "4 × 4", "float32", "1.0 kB", "checkpoint_name h.0.up, kind Q8"],
        ["blocks.{1-2,4}.up", "3 of 4 × 4", "float32", "3.0 kB",
         "checkpoint_name h.{1-2,4}.up, kind F32"],
        ["blocks.5.gain", "5 × 4", "float32", "1.0 kB", "rows 5"],
        ["blocks.6.gain", "6 × 4", "float32", "1.0 kB", "rows 6"],
    ]  # fmt: skip


def test_bytes_have_a_unit() -> None:
    """And none is "0.00 GB"."""
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999949: "999.9 kB", 10**6: "1.0 MB"}
    assert {n: size(n) for n in sizes} == sizes
    assert size(3.9e15) == "3,900.0 TB"


# ------------------------------------------------------------------ plots


def lines_of(ax: Any, *, hidden: bool = False) -> dict[str, Any]:
    return {x.get_label(): x for x in ax.get_lines() if hidden or x.get_label()[0] != "_"}


def test_spectrum_is_the_sorted_products(results: dict[str, Any]) -> None:
    figure = plots.spectrum(results)
    mass, lam_axes, mu_axes = figure.axes
    drawn = [line for line in mass.get_lines() if "keeps" in line.get_label()]
    assert len(drawn) == 4
    for line, (layer, one) in zip(drawn, results["spectrum"].items(), strict=True):
        assert line.get_label().startswith(f"{layer}: keeps ")
        products = np.sort(np.outer(one["lam"], one["mu"]).ravel())[::-1]
        curve = np.cumsum(products) / products.sum()
        share, held = line.get_data()
        assert share[0] == 1 / 768
        assert (share[-1], held[-1]) == (1, 1)
        count = np.rint(share * 768).astype(int)
        np.testing.assert_allclose(held, curve[count - 1], atol=1e-12)
        assert len(np.unique(count)) > 200
    for ax, name in ((lam_axes, "lam"), (mu_axes, "mu")):
        for line, one in zip(ax.get_lines(), results["spectrum"].values(), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), np.divide(one[name], one[name][0]))


def test_cut_is_marked(results: dict[str, Any]) -> None:
    mass = plots.spectrum(results).axes[0]
    marks = [line for line in mass.get_lines() if line.get_label() == "_cut"]
    for mark, row in zip(marks, results["edit"], strict=True):
        assert mark.get_xdata()[0] == row["kept"] / row["pairs"]
        assert mark.get_ydata()[0] == row["mass"]


def test_no_cut_hides_another(results: dict[str, Any]) -> None:
    """Marks at one place: each is open and smaller than the one below it."""
    for row in results["edit"]:
        row |= {"kept": 100, "mass": 0.85}
    mass = plots.spectrum(results).axes[0]
    marks = [line for line in mass.get_lines() if line.get_label() == "_cut"]
    assert len({tuple(mark.get_xydata()[0]) for mark in marks}) == 1 < len(marks)
    assert {mark.get_markerfacecolor() for mark in marks} == {"white"}
    for below, above in pairwise(marks):
        assert below.get_zorder() == above.get_zorder()  # then they are drawn in this order
        assert below.get_markersize() > above.get_markersize() + above.get_markeredgewidth() / 2
    named = [line for line in mass.get_lines() if "keeps" in line.get_label()]
    assert [x.get_marker() for x in named] == [x.get_marker() for x in marks]


def test_large_spectra_stay_small() -> None:
    lam, mu = (np.arange(1, n + 1.0) ** -2.0 for n in (11008, 4096))
    share, mass = plots.cumulative(lam, mu)
    assert len(share) <= plots.POINTS + 1
    assert (np.diff(share) >= 0).all()
    assert (np.diff(mass) >= -1e-12).all()
    assert plots.cumulative(np.zeros(3), mu)[0].size == 0
    ones = plots.cumulative(np.ones(3), np.ones(2))  # all tied: one step to everything
    assert set(ones[0]) == set(ones[1]) == {1.0}


def test_the_mask_is_the_cut(results: dict[str, Any]) -> None:
    """The area within the outline is the number of pairs kept, the veil is the rest."""
    axes = plots.mask(results).axes
    for ax, row in zip(axes, results["edit"], strict=False):
        assert ax.get_title("left") == row["layer"]
        steps = {patch.get_label(): patch.get_data() for patch in ax.patches}
        counts, edges, _ = steps["_kept"]
        assert counts @ np.diff(edges) == row["kept"]
        assert (np.diff(counts) < 0).all()  # a staircase, one step for each height
        columns, same_edges, below = steps["_dropped"]
        assert (columns - below) @ np.diff(same_edges) == row["pairs"] - row["kept"]
        assert ax.get_xlim() == (0, 16)
        assert ax.get_ylim() == (48, 0)  # the sharpest pair in the upper left corner
        said = ax.texts[0].get_text()
        assert f"kept: {cells.percent(row['kept'] / 768)} of the pairs" in said
        assert f"{cells.percent(row['mass'])} of the curvature" in said


def test_colours_are_decades(results: dict[str, Any]) -> None:
    """Each colour holds the pairs from its power of ten on, darker ones on top."""
    results["edit"][-1]["rho"] = 0.9999
    figure = plots.mask(results)
    depth = len(figure.axes[0].patches) - 2
    assert depth == max(_powers_of_ten(results)) + 2 > min(_powers_of_ten(results)) + 2
    for ax, one in zip(figure.axes, results["spectrum"].values(), strict=False):
        products = np.outer(one["lam"], one["mu"]) / (one["lam"][0] * one["mu"][0])
        drawn = [patch for patch in ax.patches if patch.get_label()[1:].isdigit()]
        assert [int(patch.get_label()[1:]) for patch in drawn] == list(range(depth, 0, -1))
        for patch in drawn:
            counts, edges, _ = patch.get_data()
            power = int(patch.get_label()[1:])
            assert counts @ np.diff(edges) == (products >= 10.0**-power).sum()
    assert [t.get_text() for t in figure.axes[-1].get_yticklabels()][-2:] == ["10⁻¹", "10⁰"]


def _powers_of_ten(results: dict[str, Any]) -> Iterator[int]:
    """From each layer's largest product down to its last one kept."""
    for row, one in zip(results["edit"], results["spectrum"].values(), strict=True):
        lam, mu = (np.array(one[name]) for name in ("lam", "mu"))
        yield math.ceil(math.log10(lam[0] * mu[0] / cut(lam, mu, row["rho"]).last))


def test_a_pair_on_a_power_of_ten_has_its_colour(results: dict[str, Any]) -> None:
    results["spectrum"] = {"blocks.2.mlp.up": {"lam": [1.0, 0.1], "mu": [1.0, 0.1, 0.0]}}
    drawn = plots.mask(results).axes[0].patches
    areas = {patch.get_label(): patch.get_data() for patch in drawn}
    counts, edges, _ = areas["_1"]
    assert (counts.tolist(), edges.tolist()) == ([2, 1], [0, 1, 2])
    assert areas["_2"][0].tolist() == [2]  # nothing is flat enough to be none of the colours


def test_bands_show_the_ratios(results: dict[str, Any]) -> None:
    results["input_bands"]["blocks.1.mlp.up"]["ratio"][2] = 25.0
    results["bands"]["blocks.1.mlp.up"]["ratio"][2] = None
    figure = plots.bands(results)
    layers = [f"blocks.{n}.mlp.{kind}" for n in range(4) for kind in ("gate", "up", "down")]
    for ax, key in zip(figure.axes, ("bands", "input_bands"), strict=False):
        ratio = np.array([results[key][layer]["ratio"] for layer in layers], dtype=float)
        (mesh,) = ax.collections
        shown = mesh.get_array().filled(np.nan)
        np.testing.assert_allclose(shown, np.log2(ratio), rtol=1e-15)
        low, high = mesh.get_clim()
        assert low == -high == -2  # 25 is beyond the colours
        texts = [text.get_text() for text in ax.texts]
        want = ["–" if math.isnan(x) else f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in ratio.flat]
        assert texts == want
        ticks = [label.get_text() for label in ax.get_xticklabels()]
        assert ticks == list(table.band_labels(results[key]["blocks.0.mlp.up"]["edges"]))
    names = figure.axes[0].get_yticklabels()
    assert [name.get_text() for name in names] == layers
    bold = [name.get_text() for name in names if name.get_weight() == "bold"]
    assert bold == [row["layer"] for row in results["edit"]]
    bars = [list(x.get_ydata()) for x in figure.axes[0].get_lines() if x.get_label() == "_edited"]
    assert bars == [[layers.index(name), layers.index(name) + 1] for name in bold]
    assert figure.axes[0].get_ylim() == (len(layers), 0)


def test_a_cell_has_the_text_that_can_be_read_on_it(results: dict[str, Any]) -> None:
    """Light on dark cells and dark on light ones, whatever their colour."""
    edges = results["bands"]["blocks.0.mlp.up"]["edges"]
    ratio, white = (
        [0.3, 0.43, 0.55, 1.0, 1.9, 2.15, 3.9],
        [True, True, False, False, False, True, True],
    )
    results["bands"] = {"blocks.0.mlp.up": {"ratio": ratio, "edges": edges}}
    results["input_bands"] = {}
    texts = plots.bands(results).axes[0].texts
    assert [text.get_color() == "white" for text in texts] == white
    assert {text.get_color() for text in texts} == {"white", plots.INK}


def test_no_mathematics_is_written_raw(results: dict[str, Any]) -> None:
    """Indices of what is drawn stand below the line; names of layers are not mathematics."""
    found = 0
    for draw in plots.FIGURES.values():
        for text in draw(results).findobj(Text):
            if "_" in text.get_text():
                assert text.get_parse_math() and text.get_text().count("$") == 2
                found += 1
    assert found == 3
    results["edit"][0]["layer"] = "a_b.$x_1$"
    results["spectrum"] = {"a_b.$x_1$": results["spectrum"]["blocks.2.mlp.gate"]}
    assert not plots.mask(results).axes[0].title.get_parse_math()


def test_names_keep_clear_of_the_bars_of_edited_layers(results: dict[str, Any]) -> None:
    figure = plots.bands(results)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    (bar, *_) = (x for x in ax.get_lines() if x.get_label() == "_edited")
    left = bar.get_window_extent().x0 - bar.get_linewidth() / 2 * figure.dpi / 72
    for name in ax.get_yticklabels():
        assert name.get_window_extent().x1 < left - 1


def test_colours_reach_twice_and_half_at_least(results: dict[str, Any]) -> None:
    for one in (*results["bands"].values(), *results["input_bands"].values()):
        one["ratio"] = [1.01] * len(one["ratio"])
    assert plots.bands(results).axes[0].collections[0].get_clim() == (-1, 1)
    for one in results["bands"].values():
        one["ratio"] = [None] * len(one["ratio"])
    results["input_bands"] = {}
    (ax, _) = plots.bands(results).axes
    assert ax.collections[0].get_array().mask.all()
    assert {text.get_text() for text in ax.texts} == {"–"}


def test_the_front_is_the_points(results: dict[str, Any]) -> None:
    """Each line runs from the unedited model through its points, weakest first."""
    (ax,) = plots.front(results).axes
    start = [(24.9512, 47 / 48)]
    lines = {label.split(":")[0]: line for label, line in lines_of(ax).items()}
    assert list(lines) == ["K-FAC", "SVD", "random pairs"]
    wanted = {
        "K-FAC": [*start, (25.5, 0.5), (26.4731, 0.0625), (29.0, 0.0)],
        "SVD": [*start, (27.1, 0.9), (29.5, 0.7), (math.nan, 0.0)],  # sorted; 4000 is far away
        "random pairs": [*start, (26.5, 0.8)],
    }
    for name, points in wanted.items():
        np.testing.assert_array_equal(lines[name].get_xydata(), points)
    title = ax.figure.legends[0].get_title().get_text()
    assert "matched on dev" in title and "dotted: that edit's on test" in title
    assert "a line ends where the next edit costs more" in title
    assert set(lines_of(ax)) == {"K-FAC: 6.2 %", "SVD: overshoots", "random pairs: 80.0 %"}
    marks = [x for x in ax.get_lines() if x.get_label() == "_compared"]
    assert [(x.get_xdata()[0], x.get_ydata()[0]) for x in marks] == [
        (one["perplexity"], one["recitation"]) for one in results["controls"]["compared"]
    ]
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_ls() == ":"] == [26.4731]
    low, high = ax.get_xlim()
    assert low < 24.9512 and 27.1 < high == pytest.approx(24.9512 + 4 * (26.4731 - 24.9512))
    ring = next(x for x in ax.get_lines() if x.get_label() == "_unedited")
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == start[0]


@pytest.mark.parametrize("base", [1.0, 23.8983, 7777.0])
def test_ticks_are_round_shares_of_the_unedited_perplexity(
    base: float, results: dict[str, Any]
) -> None:
    """Each stands where its two numbers say, and the unedited model's stands at +0 %."""
    scale = base / 24.9512
    found = results["controls"]
    points = [point for curve in found["curves"].values() for point in curve]
    for one in (found["unedited"], *found["compared"], *points):
        one["perplexity"] *= scale
    (ax,) = plots.front(results).axes
    places, low, high = ax.get_xticks(), *ax.get_xlim()
    assert 4 <= len(places) <= 8 and low <= min(places) and max(places) <= high
    texts = [text.get_text().split("\n") for text in ax.get_xticklabels()]
    for place, (value, rise) in zip(places, texts, strict=True):
        assert float(value) == pytest.approx(place, abs=0.00501)
        assert 1 + float(rise.removesuffix(" %")) / 100 == pytest.approx(place / base, rel=1e-12)
    ring = next(x for x in ax.get_lines() if x.get_label() == "_unedited").get_xdata()[0]
    assert dict(zip((rise for _, rise in texts), places, strict=True))["+0 %"] == ring


def test_a_line_leaves_the_axes_nowhere(results: dict[str, Any]) -> None:
    """The axis is widened for marks that cost somewhat more; before others a line ends."""
    found = results["controls"]["curves"]
    found["svd"][0]["perplexity"] = 35.0  # of 26.5 at the compared edit and 24.95 before
    figure = plots.front(results)
    (ax,) = figure.axes
    assert 35 < ax.get_xlim()[1] < 37
    for line in lines_of(ax).values():
        assert not np.nanmax(line.get_xdata()) > ax.get_xlim()[1]
    found["svd"].pop()
    assert "a line ends" not in plots.front(results).legends[0].get_title().get_text()


def test_an_interval_is_in_the_unit_of_its_value() -> None:
    assert table.interval_text("recite", [0.0312, 0.402]) == "3.1–40.2"
    assert table.interval_text("text", (22.104, 25.9)) == "22.10–25.90"
    assert table.interval_text("text", [22.104, None]) == "22.10–∞"
    assert table.interval_text("answer", None) == table.interval_text("text", [None, None]) == ""


def test_an_infinite_perplexity_is_no_unknown_one() -> None:
    """Wherever it stands: in JSON both it and what is not known are null."""
    one = {"kind": "text", "name": "clean_test", "items": 9, "chance": None, "interval": [7, None]}
    lost = {**one, "before": {"perplexity": 21.5}, "after": {"perplexity": None}, "p": None}
    made = {"split": "test", "rows": [lost]}
    assert table.evaluation_table(made).rows[0][3:6] == ("21.50", "∞", "-")
    assert table.certainty_table(made).rows[0][3:5] == ("∞", "7.00 to ∞")
    assert table.certainty_table({"rows": [{**lost, "interval": None}]}).rows[0][4] == "- to -"
    alone = table.evaluation_table({"rows": [{**lost, "before": None}]})
    assert alone.rows[0][3] == "∞"
    told = page._tiles({"evaluation": made})
    assert "∞" in told and "21.50 before the edit;" in told
    assert plots.abilities._perplexities([lost], "test") == "perplexity: clean 21.50 → ∞"
    assert plots.abilities._perplexities([{**lost, "after": {"perplexity": 22.0}}], "test") == (
        "perplexity: clean 21.50 → 22.00 (+2.3 %)"
    )
    compared = [{"method": "svd", "values": {"clean_test": None}}, {"method": "bsn", "values": {}}]
    found = {"controls": {"compared": compared, "unedited": None}, "evaluation": made}
    assert table.controls_table(found).rows[-1][1:] == ("-", "∞", "-")


def test_settings_that_are_not_known_are_left_out() -> None:
    given = {"rho": 0.6, "layers": "**", "dtype": "float32"}
    assert printed.settings_line(given) == "ρ 0.6 on **; float32"
    made = printed.settings_line({**given, "fisher": "sampled", "seed": 0})
    assert made == "ρ 0.6 on **; Fisher sampled, seed 0, float32"
    assert printed.settings_line({"rho": 0.6, "layers": "**"}) == "ρ 0.6 on **"


def test_lines_are_broken_at_the_ends_of_words() -> None:
    text = "one two three four five\n" + "x" * 30 + " six-seven"
    assert filled(text, 13) == "one two three\n  four five\n" + "x" * 30 + "\n  six-seven"
    assert filled("short", 80) == "short"


def test_n_and_intervals_are_shown_where_they_are_known(results: dict[str, Any]) -> None:
    """In the text, in the numbers that come first on the page, and in the trade-off."""
    assert "95 %" not in printed.format_results(results)
    for row in results["evaluation"]["rows"]:
        known = {"quotes_test": [0.02, 0.165], "language_test": [25.1, 28.0]}
        row["interval"] = known.get(row["name"])
    for one in results["controls"]["compared"]:
        one["intervals"] = {"quotes_test": [0.01, 0.95], "language_test": [20.0, 30.0]}
    results["controls"]["unedited"]["items"] = {"quotes_test": 48, "language_test": 256}
    assert "2.0 % to 16.5 %" in printed.format_results(results)
    text = page.page(results).replace("\u00a0", " ")
    assert "n 48, 95 % interval 2.0–16.5" in text
    assert "n 256, 95 % interval 25.10–28.00" in text and "2.0 % to 16.5 %" in text
    (ax,) = plots.front(results).axes
    bars = [one for one in ax.containers if one.get_label() == "_interval"]
    ends = [tuple(map(tuple, c.get_segments()[0])) for one in bars for c in one[2]]
    assert len(ends) == 6 and ((20.0, 0.0625), (30.0, 0.0625)) in [
        tuple(tuple(np.round(x, 9)) for x in pair) for pair in ends
    ]
    assert "(n 256)" in ax.get_xlabel() and "(n 48)" in ax.get_ylabel()


def test_a_control_that_costs_much_is_still_in_sight(results: dict[str, Any]) -> None:
    results["controls"]["compared"][1]["perplexity"] = 50.0
    assert plots.front(results).axes[0].get_xlim()[1] > 50
    results["controls"]["compared"][1]["perplexity"] = 5e6  # but not at any cost
    assert plots.front(results).axes[0].get_xlim()[1] == pytest.approx(3 * 26.4731)


def test_an_edit_that_lowers_perplexity_is_in_sight(results: dict[str, Any]) -> None:
    """So are its line and its mark; the axis is as wide as if it had risen as much."""
    found = results["controls"]
    found["compared"][0]["perplexity"] = 22.0
    found["curves"]["kfac"] = [
        {"removed": x, "recitation": 0.5, "perplexity": y} for x, y in ((0.1, 23.0), (0.3, 21.5))
    ]
    low, high = plots.front(results).axes[0].get_xlim()
    assert low < 21.5 and high == pytest.approx(24.9512 + 4 * (24.9512 - 22))
    found["curves"].pop("kfac")
    low, _ = plots.front(results).axes[0].get_xlim()
    assert low < 22.0


def test_bars_are_the_retentions(results: dict[str, Any]) -> None:
    figure = plots.retention(results)
    ax = figure.axes[0]
    rows = {row["name"].removesuffix("_test"): row for row in results["evaluation"]["rows"]}
    rows = {name.replace("_", " "): row for name, row in rows.items()}
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert [re.sub(r".*: |  \(n.*", "", name) for name in names] == ORDER
    assert names[0] == "memorised: quotes  (n = 48)"
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [rows[name]["retention"] for name in ORDER]
    above = next(x for label, x in lines_of(ax).items() if label.startswith("above chance"))
    want = [rows[n]["retention_above_chance"] if rows[n]["chance"] else math.nan for n in ORDER]
    np.testing.assert_array_equal(above.get_xdata(), want)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "perplexity: language 24.95 → 26.47 (+6.1 %)" in texts
    assert "97.9 → 6.2 %" in texts
    low, high = ax.get_xlim()
    assert low <= 0 < max(1.06, *widths) < high
    assert not [x for x in ax.get_lines() if x.get_label() == "_none left"]
    results["evaluation"]["rows"][0]["retention"] = 0.0  # nothing left is seen, unlike no bar
    ax = plots.retention(results).axes[0]
    (none,) = (x for x in ax.get_lines() if x.get_label() == "_none left")
    np.testing.assert_array_equal(none.get_xydata(), [[0, -0.25], [0, 0.25]])
    assert none.get_linewidth() > 1 and not none.get_clip_on()
    for row in results["evaluation"]["rows"]:  # then the legend does not speak of it
        row["chance"], row["retention_above_chance"] = 0.0, None
    figure = plots.retention(results)
    assert not [label for label in lines_of(figure.axes[0]) if label.startswith("above chance")]
    assert "chance" not in "".join(x.get_text() for x in figure.legends[0].get_texts())


def test_nothing_to_draw_is_said(results: dict[str, Any]) -> None:
    bare = {"evaluation": compare(measurement(1), None).to_json(), "settings": {}}
    for draw in plots.FIGURES.values():
        with pytest.raises(EmptyError, match="report: "):
            draw(bare)
    with pytest.raises(EmptyError, match="no text in dev"):
        plots.front(bare | {"controls": {"left_out": "no text in dev"}})
    only_inputs = results | {"bands": {}}
    ax, _ = plots.bands(only_inputs).axes
    assert ax.get_title("left").startswith("Mean layer input")
    assert len(ax.get_yticklabels()) == 12


def test_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    """Where this one has nothing for them; they would be taken for its own."""
    for name in plots.FIGURES:
        (tmp_path / f"{name}.png").write_bytes(b"of another edit")
    (tmp_path / "other.png").write_bytes(b"mine")
    bare = {"evaluation": compare(measurement(1), None).to_json(), "settings": {}}
    with mock.patch.object(folder, "page"):
        folder.draw(bare, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["other.png"]


@pytest.mark.slow
def test_hostile_results_are_drawn(hostile: dict[str, Any], tmp_path: Path) -> None:
    for draw in plots.FIGURES.values():
        plots.save(draw(hostile), tmp_path / "x.png")
        drawn = plots.svg(draw(hostile))
        assert b"<script" not in drawn
    widths = [bar.get_width() for bar in plots.retention(hostile).axes[0].patches]
    assert widths[0] == 0  # unknown: no bar
    lines = plots.retention(hostile).axes[0].get_lines()
    assert "_none left" not in {line.get_label() for line in lines}


@pytest.mark.parametrize("count", [1, pytest.param(80, marks=pytest.mark.slow)])
def test_few_and_many_layers_fit(count: int, results: dict[str, Any], tmp_path: Path) -> None:
    one, bands = results["spectrum"]["blocks.2.mlp.up"], results["bands"]["blocks.2.mlp.up"]
    edit = next(row for row in results["edit"] if row["layer"] == "blocks.2.mlp.up")
    names = [f"blocks.{n // 2}.mlp.{('gate', 'up')[n % 2]}" for n in range(count)]
    results["spectrum"] = dict.fromkeys(names, one)
    results["edit"] = [edit | {"layer": name} for name in names]
    results["bands"] = {name: bands | {"layer": name} for name in names}
    results["input_bands"] = {}
    for draw in (plots.spectrum, plots.mask, plots.bands):
        plots.save(draw(results), tmp_path / "x.png")
    heat = plots.bands(results)
    assert heat.get_size_inches()[1] < 11
    assert (len(heat.axes[0].texts) == 7) == (count == 1)  # numbers where they can be read
    shown = [text.get_text() for text in heat.axes[0].get_yticklabels()]
    assert shown == names[:: 1 if count == 1 else 2]
    masks = [ax.get_title("left") for ax in plots.mask(results).axes if ax.get_title("left")]
    assert len(masks) == min(count, 6)
    assert (masks[0], masks[-1]) == (names[0], names[-1])


def test_the_mask_of_a_large_layer_is_small(results: dict[str, Any]) -> None:
    lam, mu = (np.arange(1, n + 1.0) ** -0.7 for n in (11008, 4096))
    results["spectrum"] = {"blocks.2.mlp.up": {"lam": lam.tolist(), "mu": mu.tolist()}}
    assert len(plots.svg(plots.mask(results))) < 400_000


@pytest.mark.slow
def test_equal_results_give_equal_bytes(results: dict[str, Any], tmp_path: Path) -> None:
    again = copy.deepcopy(results)
    for draw in plots.FIGURES.values():
        first = plots.svg(draw(results))
        with rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
            assert plots.svg(draw(again)) == first
        assert b"dc:date" not in first
    plots.save(plots.mask(results), tmp_path / "a.png")
    with rc_context({"savefig.dpi": 20, "savefig.transparent": True}):
        plots.save(plots.mask(again), tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 9 * 150


@pytest.mark.slow
def test_pyplot_stays_away(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(results))
    code = (
        "import json, sys; from refcurv.report import page, plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert 'scipy.stats' not in sys.modules\n"  # half a second of every command's start
        f"page.write_page(json.load(open({str(tmp_path / 'r.json')!r})), "
        f"{str(tmp_path / 'r.html')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "r.html").read_text() == page.page(results)


def test_missing_matplotlib_is_one_line(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in plots.FIGURES.values():
        with pytest.raises(RefcurvError, match=r"pip install 'refcurv\[report\]'") as caught:
            draw(results)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ page


class Page(HTMLParser):
    """Tags that are open, addresses, alt texts, table cells and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.rows: list[list[str]] = []
        self.text, self.source = "", text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name == "alt":
                self.alts.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def test_page_needs_nothing_else(shown: Page) -> None:
    text, read = shown.source, shown
    assert read.open == []
    assert len(read.addresses) == len(read.alts) == 5
    assert all(read.alts)
    for address in read.addresses:
        kind, data = address.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data, validate=True).decode()
        assert not re.findall(r'(?:href|src)="(?!#)', svg)
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert "arXiv 2510.24256" in read.text
    assert {"details", "main", "header", "figcaption", "caption"} <= set(read.tags)


def test_page_has_the_table(shown: Page, results: dict[str, Any]) -> None:
    read = shown
    rows = [[cell.replace("\u00a0", " ").replace("−", "-") for cell in row] for row in read.rows]
    for one in table.tables(results):
        for row in one.rows:
            assert list(row) in rows
    assert "refcurv collect model.h5 corpus.h5 -o 'my factors.h5' --layers" in read.text
    assert "--rho 'blocks.{2-3}.mlp.{gate,up}=0.85'" in read.text
    assert "Time taken: collect 14.2 s, edit 0.1 s." in read.text
    assert "81,920" in read.text
    assert "matched on the dev split within 0.5 %" in read.text.replace("\u00a0", " ")
    assert "BalancedSubnet" in read.text


@pytest.mark.slow
def test_the_page_says_why_there_are_no_controls(results: dict[str, Any]) -> None:
    results["controls"] = {"left_out": "no population of kind <text> in split 'dev'."}
    read = Page(page.page(results))
    assert "no population of kind <text> in split 'dev'." in read.text
    assert len(read.alts) == 4
    assert not any(row.title.startswith("Other cuts") for row in table.tables(results))


def test_page_escapes(hostile: dict[str, Any], tmp_path: Path) -> None:
    page.write_page(hostile, tmp_path / "x.html")
    read = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "script" not in read.tags
    assert read.text.count("<script>alert") >= 6
    assert read.open == []


def test_a_warning_stands_above_the_numbers() -> None:
    results: dict[str, Any] = {"evaluation": compare(measurement(1), None).to_json()}
    assert "warning" not in page.page(results).split("</style>")[1]
    results["warnings"] = ["before <b>it</b>: `refcurv recite`"]
    text = page.page(results).split("</style>")[1]
    shown = '<p class="warning">before &lt;b&gt;it&lt;/b&gt;: <code>refcurv recite</code></p>'
    assert text.index(shown) < text.index('class="tiles"')
    assert "\n\nwarning: before <b>it</b>: `refcurv recite`\n\n" in printed.format_results(results)


def test_page_without_the_rest() -> None:
    read = Page(page.page({"evaluation": compare(measurement(1), None).to_json()}))
    assert "img" not in read.tags
    assert "26.47" in read.text


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"evaluation": compare(measurement(1), None).to_json()}
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            page.write_page(results, target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(SchemaError, match="does not exist"):
        page.write_page(results, tmp_path / "none" / "report.html")


def test_json_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json({"ρ": 0.5, "half": "\ud800"}, target)
    assert target.read_text(encoding="utf-8") == '{\n "ρ": 0.5,\n "half": "?"\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json({"x": math.nan}, target)
    assert json.loads(target.read_text(encoding="utf-8"))["ρ"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(SchemaError, match="does not exist"):
        write_json({}, tmp_path / "none" / "a.json")


def test_a_method_has_its_colour_in_every_figure() -> None:
    """Whichever others are drawn, and however its name is spelled; unknown ones have another."""
    known = {pareto._colour(method, 0) for method in pareto.METHODS}
    assert len(known) == len(pareto.METHODS)
    for place, method in enumerate(reversed(pareto.METHODS)):
        assert pareto._colour(method.replace("-", " "), place) == pareto._colour(method, 0)
    assert pareto._colour("another", 1) == pareto.PALETTE[1]


def test_bars_end_within_the_axes() -> None:
    """Of a sweep; what costs far more than the model is still left out."""
    assert pareto._sweep_range(23.0, [25.0, 28.0], [25.4, 28.8])[1] > 28.8
    assert pareto._sweep_range(23.0, [25.0], [np.nan])[1] < 26
    assert pareto._sweep_range(23.0, [25.0, 300.0], [26.0, 310.0])[1] < 80
