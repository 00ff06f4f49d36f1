"""The tables of a run, made of the dictionary of results.json.

A `Table` holds finished cells; `refcurv.report.text` aligns them, `refcurv.report.page` makes HTML
of them, so that no number is rounded twice in two ways. A cell that has no meaning in its row is
empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from refcurv.report.cells import (
    INFINITE,
    MISSING,
    Json,
    decimal,
    number,
    percent,
    plain,
    population_name,
    relative,
    small,
    whole,
)
from refcurv.report.text import printable, shorten

MEASURES: Mapping[str, tuple[str, ...]] = {
    "recite": ("strict", "loose", "distance"),
    "answer": ("accuracy",),
    "text": ("perplexity",),
    "label": ("accuracy",),
}
"""What each kind of population measures, the retained one first."""

SHARES = ("strict", "loose", "accuracy")
"""Measures that are fractions of the items, shown in percent."""


@dataclass(frozen=True, slots=True)
class Table:
    """Finished cells: title; headers; rows; align, "l" or "r" per column."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str


def evaluation_table(evaluation: Json) -> Table:
    """Populations in the file's order; without a baseline one column of values."""
    split, rows = str(evaluation.get("split") or ""), evaluation["rows"]
    paired = any(row.get("before") is not None for row in rows)
    lines = [line for row in rows for line in _measured(row, split, paired)]
    title = "Memory and reasoning" + (f", split {split}" if split else "")
    if paired:
        headers = ("population", "measure", "items", "before", "after", "change")
        return Table(title, (*headers, "retention", "above chance"), tuple(lines), "llrrrrrr")
    return Table(title, ("population", "measure", "items", "value"), tuple(lines), "llrr")


def _measured(row: Json, split: str, paired: bool) -> list[tuple[str, ...]]:
    """The lines of one population, one per measure."""
    lines: list[tuple[str, ...]] = []
    measures = MEASURES.get(str(row["kind"])) or tuple(row["after"])
    for place, measure in enumerate(measures):
        head = (population_name(str(row["name"]), split), measure, whole(row.get("items")))
        head = head if place == 0 else ("", measure, "")
        before, after = row.get("before") or {}, row["after"]
        if not paired:
            lines.append((*head, measured(measure, after)))
            continue
        retained = _retained(row) if place == 0 else ("", "")
        values = (measured(measure, before), measured(measure, after))
        change = _change(measure, before.get(measure), after.get(measure))
        lines.append((*head, *values, change, *retained))
    return lines


def measured(measure: str, values: Json) -> str:
    """One of the measures of a population, "-" if unknown. In JSON an infinite number is null.

    Proof: tests/test_report.py::test_an_infinite_perplexity_is_no_unknown_one
    """
    if measure == "perplexity" and values.get(measure, 0) is None:
        return INFINITE
    return _value(measure, values.get(measure))


def _value(measure: str, value: object) -> str:
    if measure in SHARES:
        return percent(value)
    return decimal(value, 2 if measure == "perplexity" else 3)


def _change(measure: str, before: object, after: object) -> str:
    """Points for shares, percent of the old value for a perplexity, else the difference."""
    if measure == "perplexity":
        return percent(relative(before, after), sign="+")
    difference = number(after) - number(before)
    if measure in SHARES:
        text = decimal(100 * difference, 1, "+")
        return text if text == MISSING else f"{text} pt"
    return decimal(difference, 3, "+")


def _retained(row: Json) -> tuple[str, str]:
    """Retention and retention above chance; empty where the population has none."""
    if row["kind"] == "text":
        return "", ""
    has_chance = number(row.get("chance")) > 0
    above = percent(row.get("retention_above_chance")) if has_chance else ""
    return percent(row.get("retention")), above


def certainty_table(evaluation: Json) -> Table:
    """How far each first measure may be off by the choice of items, and whether an edit shows."""
    split, rows = str(evaluation.get("split") or ""), []
    for row in evaluation["rows"]:
        measure = (MEASURES.get(str(row["kind"])) or tuple(row["after"]))[0]
        ends = ({} if x is MISSING else {measure: x} for x in row.get("interval") or 2 * [MISSING])
        low, high = (measured(measure, end) for end in ends)
        p = "" if row.get("p") is None else f"{number(row['p']):.2g}"
        name = population_name(str(row["name"]), split)
        value = measured(measure, row["after"])
        rows.append((name, measure, whole(row.get("items")), value, f"{low} to {high}", p))
    headers = ("population", "measure", "items", "value", "95 % interval", "p of no change")
    return Table("How far off by the choice of items", headers, tuple(rows), "llrrrr")


def knows_intervals(evaluation: Json) -> bool:
    """Is there an interval of any population?"""
    return any(row.get("interval") is not None for row in evaluation["rows"])


def interval_text(kind: str, interval: object) -> str:
    """A first measure's interval in the unit of its value, `3.1–40.2`; empty if it is not known.

    Proof: tests/test_report.py::test_an_interval_is_in_the_unit_of_its_value
    """
    low, high = interval if isinstance(interval, Sequence) else (None, None)
    if low is None:
        return ""
    text = kind == "text"
    ends = (decimal(number(x) * (1 if text else 100), 2 if text else 1) for x in (low, high))
    return "–".join(INFINITE if end == MISSING else end for end in ends)


def agreement_table(evaluation: Json) -> Table:
    """nDCG@10 of the edited model's ranking against the baseline's, by both readings."""
    split = str(evaluation.get("split") or "")
    rows = tuple(
        (
            population_name(str(row["name"]), split),
            decimal(row["agreement"].get("ndcg_paper")),
            decimal(row["agreement"].get("ndcg_code")),
        )
        for row in evaluation["rows"]
        if row.get("agreement")
    )
    headers = ("population", "paper's reading (edited rank)", "code's reading (old rank)")
    title = "nDCG@10 of the likeliest tokens against the unedited model's"
    return Table(title, headers, rows, "lrr")


KEPT: Mapping[str, tuple[str, str, str, str]] = {
    "kfac": ("K-FAC: pairs and curvature mass kept", "ρ", "pairs", "mass"),
    "random pairs": ("Random pairs: pairs and curvature mass kept", "share", "pairs", "mass"),
    "svd": ("SVD: singular directions and Σσ² kept", "energy", "directions", "Σσ²"),
    "bsn": ("BSN: weights and Σw² kept", "1 − ratio", "weights", "Σw²"),
}
"""method → title, and what its share, its pairs and its mass are called (`LayerEdit`)."""


def kept_table(found: Sequence[Json]) -> Table:
    """Which share of its pairs each layer keeps at each ρ, and with how many rows that settles."""
    shares = tuple(next((one["kept"] for one in found if one["kept"]), {}))
    known = any(one["settles"] is not None for one in found)
    rows = tuple(
        (
            str(one["layer"]),
            *(percent(one["kept"].get(share)) for share in shares),
            whole(one["rows"]),
            *((about(one["settles"]),) if known else ()),
        )
        for one in found
    )
    headers = ("pairs kept at ρ", *shares, "rows", *(("settles at",) if known else ()))
    title = "Share of its pairs that a layer keeps at each ρ"
    return Table(title, headers, rows, "l" + "r" * (len(headers) - 1))


def about(count: object) -> str:
    """A number that is only an estimate, to two digits: "120,000"; a text as it is."""
    if isinstance(count, str):
        return count
    x = number(count)
    return MISSING if math.isnan(x) else f"{float(f'{x:.2g}'):,.0f}"


ROUNDING = 2.0**-52
"""A share of what was cut that is not worth a column: what float64 itself gives back."""


def edit_table(record: Sequence[Json]) -> Table:
    """What was kept of each edited layer, in the words of the record's method."""
    method = printable(str(record[0].get("method", "kfac"))) if record else "kfac"
    other = (f"{method[:1].upper()}{method[1:]}: pairs and curvature mass kept", *KEPT["kfac"][1:])
    title, share, pairs, mass = KEPT.get(method, other)
    rows = tuple(
        (
            str(row["layer"]),
            plain(row.get("rho")),
            whole(row.get("pairs")),
            whole(row.get("kept")),
            percent(share_of_pairs(row)),
            percent(row.get("mass"), 2),
            small(row.get("gap")),
            whole(row.get("acceptable")),
            decimal(row.get("norm")),
        )
        for row in record
    )
    headers = ("layer", share, pairs, "kept", f"of {pairs}", mass, "gap", "acceptable")
    return Table(title, (*headers, "‖W'‖/‖W‖"), rows, "lrrrrrrrr")


def past_table(record: Sequence[Json]) -> Table:
    """What rounding to the stored dtype restored of what was cut, and the norm before all edits.

    Each has a column where it says something; without both the table has no row.
    """
    gave_back = any(number(row.get("restored")) > ROUNDING for row in record)
    again = any(row.get("norm_original") not in (None, row.get("norm")) for row in record)
    rows = tuple(
        (
            str(row["layer"]),
            *((small(row.get("restored")),) if gave_back else ()),
            *((decimal(row.get("norm_original")),) if again else ()),
        )
        for row in record
        if gave_back or again
    )
    headers = ("layer", *(("restored",) * gave_back), *(("‖W'‖ of the original",) * again))
    words = ("what rounding gave back of the cut",) * gave_back
    words += ("the norm against that before all known edits",) * again
    title = f"Beside it: {' and '.join(words)}"
    return Table(title, headers, rows, "l" + "r" * (len(headers) - 1))


METHODS: Mapping[str, tuple[str, str]] = {
    "kfac": ("K-FAC", "mass"),
    "svd": ("SVD", "Σσ²"),
    "bsn": ("BSN", "weights"),
    "random pairs": ("random pairs", "pairs"),
    "random basis": ("random basis", "mass"),
}
"""method → its name in a heading, and what its strength is a share of."""


def method_name(method: str) -> str:
    """`kfac` as "K-FAC"; unknown ones as they are."""
    return METHODS.get(method, (method,))[0]


def controls_table(results: Json) -> Table:
    """A column per method: how strongly it cuts, and what it leaves of each population."""
    found, evaluation = results.get("controls") or {}, results["evaluation"]
    compared = found.get("compared") or ()
    names = [shorten(printable(method_name(str(one["method"]))), 16) for one in compared]
    verdicts = (shorten(printable(str(one.get("verdict") or MISSING)), 16) for one in compared)
    title = "Other cuts at the dev perplexity of the K-FAC edit"
    rows = [
        ("cut away", "", *map(_cut_away, compared)),
        ("pairs or directions kept", "", *(percent(one.get("kept"), 2) for one in compared)),
        ("perplexity, dev", "", *(decimal(one.get("dev_perplexity"), 2) for one in compared)),
        ("", "", *verdicts),
    ]
    split = str(evaluation.get("split") or "")
    for row in evaluation["rows"]:
        measure = MEASURES.get(str(row["kind"]), ("",))[0]
        label = population_name(str(row["name"]), split)
        label += "" if measure == "accuracy" else f", {measure}"
        columns = [found.get("unedited") or {}, *compared]
        values = (one.get("values") or {} for one in columns)
        each = ({measure: x[row["name"]]} if row["name"] in x else {} for x in values)
        rows.append((label, *(measured(measure, one) for one in each)))
    headers = ("", "unedited", *names)
    return Table(title, headers, tuple(rows) if compared else (), "l" + "r" * (len(names) + 1))


def _cut_away(one: Json) -> str:
    """`16 % of mass`, with as many digits as it takes."""
    what = METHODS.get(str(one["method"]), ("", "its strength"))[1]
    share = 100 * number(one.get("removed"))
    return MISSING if math.isnan(share) else f"{share:.3g} % of {what}"


def share_of_pairs(row: Json) -> float:
    """kept / pairs of one layer's edit; NaN if unknown."""
    pairs = number(row.get("pairs"))
    return number(row.get("kept")) / pairs if pairs > 0 else math.nan


def band_table(bands: Mapping[str, Json], layers: Sequence[str]) -> Table:
    """Ratio memorised / clean per band, sharpest to flattest, of the named layers."""
    shown = [bands[layer] for layer in layers if layer in bands]
    edges = band_labels(shown[0]["edges"]) if shown else ()
    rows = tuple(
        (str(one["layer"]), *(decimal(ratio, 2) for ratio in one["ratio"])) for one in shown
    )
    title = "Activation ratio, memorised / clean, by band of curvature mass in %, sharp → flat"
    return Table(title, ("layer", *edges), rows, "l" + "r" * len(edges))


def band_labels(edges: Sequence[float]) -> tuple[str, ...]:
    """Each band's range in percent: "0–20", "99–100"."""
    return tuple(f"{100 * a:.4g}–{100 * b:.4g}" for a, b in pairwise(edges))


def edited_layers(results: Json) -> list[str]:
    """Names of the edited layers, in the record's order."""
    return [str(row["layer"]) for row in results.get("edit") or ()]


def tables(results: Json) -> list[Table]:
    """Every table of a run that has rows, in the order of reading."""
    evaluation = results["evaluation"]
    found = [
        evaluation_table(evaluation),
        *([certainty_table(evaluation)] if knows_intervals(evaluation) else []),
        agreement_table(evaluation),
        controls_table(results),
        edit_table(results.get("edit") or ()),
        past_table(results.get("edit") or ()),
        kept_table(results.get("kept") or ()),
        band_table(results.get("bands") or {}, edited_layers(results)),
    ]
    return [table for table in found if table.rows]
