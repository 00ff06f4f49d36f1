"""Results as plain text: what a terminal shows, and the cells that the page shows too.

A `Table` holds finished cells; `format_rows` aligns them, `refcurv.report.page` makes HTML of
them, so that no number is rounded twice in two ways. What is not known (None, NaN) is "-"; a cell
that has no meaning in its row is empty.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

Json = Mapping[str, Any]

MISSING = "-"
WIDTH = 100
GAP = "  "

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


# ------------------------------------------------------------------ numbers and names


def number(value: object) -> float:
    """A JSON value as a float; NaN for None, infinities and anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return math.nan
    return float(value)


def decimal(value: object, digits: int = 3, sign: str = "") -> str:
    """A number with so many decimals ("-" if unknown); sign "+" writes the sign always."""
    x = number(value)
    if math.isnan(x):
        return MISSING
    return f"{x:{sign}.3e}" if abs(x) >= 1e6 else f"{x:{sign}z.{digits}f}"


def percent(value: object, digits: int = 1, sign: str = "") -> str:
    """A fraction in percent, "12.3 %"; "-" if unknown."""
    text = decimal(100 * number(value), digits, sign)
    return text if text == MISSING else f"{text} %"


def whole(value: object) -> str:
    """An integer with separators of thousands; "-" if unknown."""
    x = number(value)
    return MISSING if math.isnan(x) else f"{int(x):,}"


def relative(before: object, after: object) -> float:
    """after / before − 1; NaN if unknown or if `before` is not positive."""
    was = number(before)
    return number(after) / was - 1 if was > 0 else math.nan


def kept_share(row: Json) -> float:
    """kept / pairs of one layer's edit; NaN if unknown."""
    pairs = number(row.get("pairs"))
    return number(row.get("kept")) / pairs if pairs > 0 else math.nan


def population_name(name: str, split: str = "") -> str:
    """`open_book_test` as "open book": underscores are spaces, the split's own suffix goes."""
    stem = name.removesuffix(f"_{split}") if split else name
    return (stem or name).replace("_", " ")


def rho_text(rho: object) -> str:
    """One share, or each pattern with its own."""
    if isinstance(rho, Mapping):
        return ", ".join(f"{pattern} {_plain(share)}" for pattern, share in rho.items())
    return _plain(rho)


def _plain(value: object) -> str:
    x = number(value)
    return MISSING if math.isnan(x) else f"{x:g}"


# ------------------------------------------------------------------ tables of a run


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
        after = row["after"].get(measure)
        if not paired:
            lines.append((*head, _value(measure, after)))
            continue
        before = (row.get("before") or {}).get(measure)
        retained = _retained(row) if place == 0 else ("", "")
        values = (_value(measure, before), _value(measure, after))
        lines.append((*head, *values, _change(measure, before, after), *retained))
    return lines


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
    return Table("nDCG@10 against the unedited model", headers, rows, "lrr")


KEPT: Mapping[str, tuple[str, str, str, str]] = {
    "kfac": ("K-FAC: pairs and curvature mass kept", "ρ", "pairs", "mass"),
    "random pairs": ("Random pairs: pairs and curvature mass kept", "share", "pairs", "mass"),
    "svd": ("SVD: singular directions and Σσ² kept", "energy", "directions", "Σσ²"),
    "bsn": ("BSN: weights and Σw² kept", "1 − ratio", "weights", "Σw²"),
}
"""method → title, and what its share, its pairs and its mass are called (`LayerEdit`)."""


ROUNDING = 2.0**-52
"""A share of what was cut that is not worth a column: what float64 itself gives back."""


def edit_table(record: Sequence[Json]) -> Table:
    """What was kept of each edited layer, in the words of the record's method."""
    method = _printable(str(record[0].get("method", "kfac"))) if record else "kfac"
    other = (f"{method[:1].upper()}{method[1:]}: pairs and curvature mass kept", *KEPT["kfac"][1:])
    title, share, pairs, mass = KEPT.get(method, other)
    rows = tuple(
        (
            str(row["layer"]),
            _plain(row.get("rho")),
            whole(row.get("pairs")),
            whole(row.get("kept")),
            percent(kept_share(row)),
            percent(row.get("mass"), 2),
            _small(row.get("gap")),
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
            *((_small(row.get("restored")),) if gave_back else ()),
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
    names = [_shorten(_printable(method_name(str(one["method"]))), 16) for one in compared]
    verdicts = (_shorten(_printable(str(one.get("verdict") or MISSING)), 16) for one in compared)
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
        values = [(one.get("values") or {}).get(row["name"]) for one in columns]
        rows.append((label, *(_value(measure, value) for value in values)))
    headers = ("", "unedited", *names)
    return Table(title, headers, tuple(rows) if compared else (), "l" + "r" * (len(names) + 1))


def _cut_away(one: Json) -> str:
    """`16 % of mass`, with as many digits as it takes."""
    what = METHODS.get(str(one["method"]), ("", "its strength"))[1]
    share = 100 * number(one.get("removed"))
    return MISSING if math.isnan(share) else f"{share:.3g} % of {what}"


def _small(value: object) -> str:
    x = number(value)
    return MISSING if math.isnan(x) else f"{x:.1e}"


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
    """Every table of a run that has rows: evaluation, agreement, controls, edit, bands."""
    evaluation = results["evaluation"]
    found = [
        evaluation_table(evaluation),
        agreement_table(evaluation),
        controls_table(results),
        edit_table(results.get("edit") or ()),
        past_table(results.get("edit") or ()),
        band_table(results.get("bands") or {}, edited_layers(results)),
    ]
    return [table for table in found if table.rows]


# ------------------------------------------------------------------ text


def format_results(results: Json) -> str:
    """Everything a run found, as one text of at most 100 columns.

    Args:
        results: the dictionary of `refcurv demo`, results.json.

    Returns:
        Title, settings, then the tables: populations in the file's order, nDCG@10, the controls,
        pairs and mass kept per edited layer, band ratios of the edited layers. No newline at the
        end.

    Proof:  tests/test_report.py::test_table_has_every_number
    """
    head = [_shorten(_printable(str(results.get("title") or "refcurv")), WIDTH)]
    settings = results.get("settings") or {}
    if settings:
        head.append(_shorten(_printable(settings_line(settings)), WIDTH))
    return "\n\n".join(["\n".join(head), *map(_titled, tables(results))])


def settings_line(settings: Json) -> str:
    """ρ, layers, Fisher, seed and dtype on one line."""
    rho = settings.get("rho")
    where = "" if isinstance(rho, Mapping) else f" on {settings.get('layers', MISSING)}"
    return (
        f"ρ {rho_text(rho)}{where}; Fisher {settings.get('fisher', MISSING)}, "
        f"seed {settings.get('seed', MISSING)}, {settings.get('dtype', MISSING)}"
    )


def format_evaluation(evaluation: Json) -> str:
    """The table of `refcurv evaluate`, with or without a baseline.

    Args:
        evaluation: `Evaluation.to_json()`.

    Proof:  tests/test_report.py::test_without_a_baseline_there_is_one_column
    """
    both = (evaluation_table(evaluation), agreement_table(evaluation))
    return "\n\n".join(_titled(table) for table in both if table.rows)


def format_edit(record: Sequence[Json]) -> str:
    """The table of `refcurv edit`, and what rounding and earlier edits add to it.

    Args:
        record: `EditRecord.to_json()`.

    Proof:  tests/test_report.py::test_edit_table
    """
    past = past_table(record)
    return "\n\n".join(map(_titled, [edit_table(record), *([past] if past.rows else [])]))


def format_start(start: Json) -> str:
    """One line: which weights an edit started from, and what had been done to them before.

    Args:
        start: `Start.to_json()` of the record.

    Proof:  tests/test_report.py::test_what_an_edit_starts_from_is_one_line
    """
    line = f"starts from weights {digest_text(start.get('weights'))}"
    if earlier := start.get("earlier") or ():
        line += f", edited before by {', then '.join(map(_past_edit, earlier))}"
        line += "; kept, mass and norm are of what that left"
    else:
        line += ", of which no earlier edit is known"
    if start.get("forced"):
        line += f"; forced: what chose was made from others, {digest_text(start.get('made_for'))}"
    elif start.get("made_for") is None:
        line += "; the basis does not say which weights it was made from"
    return _printable(line)


def digest_text(digest: object) -> str:
    """The first letters of a digest; "unknown" without one."""
    return str(digest)[:12] if digest else "unknown"


def _past_edit(edit: Json) -> str:
    """`kfac 0.6 of blocks.0.mlp.up and 1 more`."""
    layers: Json = edit["layers"]
    shares = sorted({number(row["rho"]) for row in layers.values()})
    first = next(iter(layers), MISSING)
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    share = " to ".join(_plain(x) for x in dict.fromkeys((shares[0], shares[-1]))) if shares else ""
    forced = " (forced)" if edit.get("forced") else ""
    return f"{edit['method']} {share} of {first}{more}{forced}"


def format_inspect(facts: Json) -> str:
    """The text of `refcurv inspect`: what a file is, what it was made with, what it holds.

    Args:
        facts: of `refcurv.files.inspect.inspect_file`; long values are shortened to the width.

    Proof:  tests/test_report.py::test_inspect_names_every_array
    """
    entries = facts["entries"]
    which = "every checksum" if facts["version"] > 1 else "the arrays' checksums"
    head = (
        f"{facts['path']}\n{facts['format']}, version {facts['version']}: {len(entries)} arrays, "
        f"{size(facts['nbytes'])}, {which} verified"
    )
    if facts.get("weights"):
        head += f"\nweights {digest_text(facts['weights'])}"
    if edits := facts.get("edits") or ():
        head += f", edited by {', then '.join(map(_past_edit, edits))}"
    pairs = [(what, dict(facts.get(what) or {})) for what in ("attributes", "provenance")]
    if facts["format"] in MADE_FROM:
        pairs[0][1].setdefault("weights", "not recorded: made by an older refcurv")
    tables = [
        Table(what, ("name", "value"), tuple((k, _compact(v)) for k, v in found.items()), "ll")
        for what, found in pairs
    ]
    rows = tuple(
        (
            str(one["name"]),
            " × ".join(map(str, one["shape"])) or "scalar",
            str(one["stored"]),
            size(one["nbytes"]),
            ", ".join(f"{k} {_compact(v)}" for k, v in one["attributes"].items()),
        )
        for one in entries
    )
    tables += [_past_table(edit) for edit in edits]
    tables.append(Table("arrays", ("name", "shape", "stored as", "size", ""), rows, "lllrl"))
    lines = [_shorten(_printable(line), WIDTH) for line in head.split("\n")]
    return "\n\n".join(["\n".join(lines), *(_titled(table) for table in tables if table.rows)])


MADE_FROM = ("refcurv-factors", "refcurv-basis")
"""Files that say which weights they were made from."""


def _past_table(edit: Json) -> Table:
    """What a past edit left of each layer."""
    title = f"edited by {_printable(str(edit['method']))}, {digest_text(edit.get('weights'))} → "
    title += digest_text(edit.get("became")) + (", forced" if edit.get("forced") else "")
    rows = tuple(
        (name, _plain(row["rho"]), decimal(row["norm"]), _small(row["restored"]))
        for name, row in edit["layers"].items()
    )
    return Table(title, ("layer", "share", "‖W'‖/‖W‖", "restored"), rows, "lrrr")


def size(count: object) -> str:
    """Bytes with a decimal unit: "512 B", "3.9 MB"."""
    x, units = number(count), ["TB", "GB", "MB", "kB", "B"]
    while len(units) > 1 and x >= 999.95:
        x /= 1000
        units.pop()
    return f"{decimal(x, 0 if units[-1] == 'B' else 1)} {units[-1]}"


def _compact(value: object) -> str:
    """A text as it is, anything else as JSON on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def format_audit(audit: Json) -> str:
    """The text of `refcurv audit`: each identity, what failed and where, what was not checked.

    Args:
        audit: `Audit.to_json()`.

    Proof:  tests/test_audit.py::test_the_text_names_what_failed_and_what_was_left_out
    """
    findings, plan = audit["findings"], audit["plan"]
    rows = [
        (f["verdict"], f["id"], _scientific(f["error"]), _scientific(f["budget"]), f["statement"])
        for f in findings
    ]
    counts = {v: sum(f["verdict"] == v for f in findings) for v in ("pass", "fail", "left out")}
    lines = [
        f"{plan['sequences']} sequences of {plan['width']} positions; errors are relative, budgets "
        f"from float64",
        "",
        format_rows(("", "id", "error", "budget", "identity"), rows, "llrrl"),
        "",
    ]
    for finding in findings:
        if finding["verdict"] == "fail":
            where = _printable(finding["where"])
            lines.append(f"FAIL {finding['id']}: {finding['statement']} Not so: {where}.")
    lines += [f"not checked: {_printable(reason)}" for reason in plan["left_out"]]
    lines.append(
        f"{counts['pass']} hold, {counts['fail']} fail, {counts['left out']} do not occur or fit; "
        f"{audit['seconds']:.0f} s"
    )
    return "\n".join(lines)


def _scientific(value: object) -> str:
    """An error: "0" for none, one digit and the power of ten; "-" if unknown."""
    if isinstance(value, str):
        return value
    x = number(value)
    return MISSING if math.isnan(x) else "0" if x == 0 else f"{x:.1e}"


def format_rows(
    headers: Sequence[object], rows: Iterable[Sequence[object]], align: str, width: int = WIDTH
) -> str:
    """Aligned columns under one rule.

    Args:
        headers: one per column.
        rows: cells; None and NaN are shown as "-", anything else by `str`.
        align: "l" or "r" per column.
        width: columns of the terminal; the widest left-aligned cells are shortened to fit.

    Returns:
        Lines without trailing blanks, joined by newlines; control characters are replaced.

    Raises:
        ValueError: a row with another number of cells than `align` has letters.

    Proof:  tests/test_report.py::test_rows_are_aligned; ::test_hostile_names_stay_on_their_line
    """
    lines = [[_cell(cell) for cell in line] for line in (headers, *rows)]
    widths = _widths(lines, align, width)
    texts = []
    for line in lines:
        cells = zip(line, widths, align, strict=True)
        texts.append(GAP.join(_padded(cell, size, side) for cell, size, side in cells).rstrip())
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    return "\n".join([texts[0], rule, *texts[1:]])


def _titled(table: Table) -> str:
    return f"{table.title}\n{format_rows(table.headers, table.rows, table.align)}"


def _widths(lines: Sequence[Sequence[str]], align: str, width: int) -> list[int]:
    """Widest cell per column, then the widest left-aligned column narrowed until all fit."""
    columns = zip(*lines, strict=True)
    widths = [max(map(_display_width, column)) for column in columns]
    left = [n for n, side in enumerate(align) if side == "l"] or list(range(len(widths)))
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0 and max(widths[n] for n in left) > 4:
        widths[max(left, key=lambda n: widths[n])] -= 1
        excess -= 1
    return widths


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return _printable(str(value))


def _printable(text: str) -> str:
    """A terminal obeys control characters in a name; we do not print them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _display_width(text: str) -> int:
    return sum(_columns(c) for c in text)


def _columns(character: str) -> int:
    """Terminal columns of one character: 2 for wide ones, 0 for combining marks."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shorten(text: str, width: int) -> str:
    used = fits = 0
    for n, character in enumerate(text, start=1):
        used += _columns(character)
        if used > width:
            return text[:fits] + "…"
        if used < width:
            fits = n
    return text


def _padded(text: str, width: int, side: str) -> str:
    text = _shorten(text, width)
    blank = " " * (width - _display_width(text))
    return blank + text if side == "r" else text + blank
