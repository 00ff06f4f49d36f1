"""The tables of `refcurv sweep`: a pattern each, a row for each edit."""

from __future__ import annotations

from collections.abc import Iterator

from refcurv.evaluation.intervals import paired
from refcurv.law.words import number_of
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
    whole,
)
from refcurv.report.table import MEASURES, SHARES, Table, interval_text, method_name
from refcurv.report.text import (
    GAP,
    NARROW,
    display_width,
    filled,
    format_rows,
    printable,
    shorten,
    terminal_width,
)

COLUMNS = 4
"""Populations side by side in a table of p."""

HEADING = 12
"""Columns of a population's name above its values, on a terminal."""

Column = tuple[str, ...]
"""A heading and its cells."""


def format_sweep(found: Json) -> str:
    """What each edit leaves, and how surely it differs from K-FAC's.

    Args:
        found: `Sweep.to_json()`.

    Proof: tests/test_sweep.py::test_the_command_line
    """
    texts = [f"{filled(one.title, NARROW)}\n"
             f"{format_rows(one.headers, one.rows, one.align)}"
             for one in sweep_tables(found)]  # fmt: skip
    return "\n\n".join([*texts, "\n".join(filled(note, NARROW) for note in _notes(found))])


def sweep_tables(found: Json) -> list[Table]:
    """For each pattern: what is left, and p of each method's doing as well as K-FAC.

    Proof: tests/test_sweep.py::test_a_table_is_no_wider_than_a_terminal
    """
    split = str(found["split"])
    known = found["baseline"][split]
    patterns = dict.fromkeys(str(one["layers"]) for one in found["edits"])
    tables = []
    for pattern in patterns:
        edits = [one for one in found["edits"] if one["layers"] == pattern]
        tables += _left(split, known, edits, pattern)
        judged = [name for name, one in known.items() if one["right"] is not None]
        tables += [_paired(split, edits, some) for some in _chunks(judged)]
    return [table for table in tables if table.rows]


def _chunks(names: list[str]) -> list[list[str]]:
    """As many populations as a table has room for."""
    return [names[begin : begin + COLUMNS] for begin in range(0, len(names), COLUMNS)]


def _left(split: str, base: Json, edits: list[Json], pattern: str) -> list[Table]:
    """A row for each edit of one pattern, and one of the unedited model.

    As many populations as have room stand side by side, the others in tables of their own.
    """
    found = [base, *(one["populations"][split] for one in edits)]
    stars = ["*" if one["front"] and one["method"] == "kfac" else "" for one in edits]
    names = ("", "unedited", *(f"{_name(one)}{x}" for one, x in zip(edits, stars, strict=True)))
    who = [names, ("ρ", "", *(plain(one["rho"]) for one in edits))]
    how: list[Column] = [
        ("removed", "", *map(_removed, edits)),
        ("kept", "", *(percent(one["kept"]) for one in edits)),
    ]
    verdicts = ("", "", *map(_verdict, edits))
    how += [verdicts] if any(verdicts) else []
    title, tables = f"{printable(pattern)}, split {split}", []
    shown = [_population(name, split, found) for name in base]
    while shown or how:
        columns = [*who, *how]
        fixed = len(columns)
        while shown and (len(columns) == 2 or _width([*columns, *shown[0]]) <= NARROW):
            columns += shown.pop(0)
        align = "lr" + "".join("l" if x is verdicts else "r" for x in columns[2:fixed])
        align += "r" * (len(columns) - fixed)
        headers, *rows = zip(*columns, strict=True)
        tables.append(Table(title, headers, tuple(rows), align))
        title, how = f"{printable(pattern)}, more populations", []
    return tables


def _population(name: str, split: str, found: list[Json]) -> list[Column]:
    """A population's values, the unedited model's first, and intervals where they are known."""
    base, heading = found[0][name], _heads([name], split)[0]
    values = (heading, *(_value(one[name], base if k else None) for k, one in enumerate(found)))
    known = [interval_text(str(base["kind"]), one[name].get("interval")) for one in found]
    n = f"n {whole(base.get('items'))}"
    return [values, (f"{n}, 95 %", *known)] if any(known) else [(f"{heading}, {n}", *values[1:])]


def _width(columns: list[Column]) -> int:
    """Of a table of these columns."""
    return sum(max(map(display_width, column)) + len(GAP) for column in columns) - len(GAP)


def _paired(split: str, edits: list[Json], names: list[str]) -> Table:
    """p of each method's being as often right as the K-FAC edit, item by item."""
    kfac = {one["rho"]: one["populations"][split] for one in edits if one["method"] == "kfac"}
    rows = tuple(
        (_name(one), plain(one["rho"]),
         *(_p(one["populations"][split][name], kfac[one["rho"]][name]) for name in names))
        for one in edits
        if one["method"] != "kfac"
    )  # fmt: skip
    title = "p of no difference from K-FAC, by the same items"
    return Table(title, ("", "ρ", *_heads(names, split)), rows, "lr" + "r" * len(names))


def _heads(names: list[str], split: str) -> list[str]:
    most = None if terminal_width() is None else HEADING
    return [shorten(printable(population_name(name, split)), most) for name in names]


def _p(one: Json, other: Json) -> str:
    if one["right"] is None or other["right"] is None:
        return MISSING
    flags = ([letter == "1" for letter in x["right"]] for x in (one, other))
    return f"{paired(*flags):.2g}"


def _name(one: Json) -> str:
    return method_name(str(one["method"]).replace("-", " "))


def _removed(one: Json) -> str:
    """As many digits as it takes."""
    return MISSING if one["removed"] is None else f"{100 * number(one['removed']):.3g} %"


def _verdict(one: Json) -> str:
    """Whether it costs what it should, where it does not."""
    return "" if one["verdict"] in ("given", "matched") else str(one["verdict"])


def _value(one: Json, base: Json | None) -> str:
    """The first measure of a population; of a perplexity also its rise."""
    measure = MEASURES[str(one["kind"])][0]
    value = one["values"][measure]
    if measure in SHARES:
        return percent(value)
    if value is None and "fault" not in one:
        return INFINITE
    rise = "" if base is None else f" {percent(relative(base['values'][measure], value), sign='+')}"
    return decimal(value, 2) + rise


def _notes(found: Json) -> Iterator[str]:
    """What the rows are."""
    yield "n: items; 95 %: the interval by the choice of items"
    yield "removed: of the curvature mass; SVD, of Σσ²; random pairs, of the pairs"
    if found["on"]:
        of = "perplexity" if found["match"] == "perplexity" else "nats a token"
        yield f"methods cost what K-FAC costs: equal {of} of {printable(found['on'])} (dev)"
    else:
        yield "every method has the same ρ, whatever it costs"
    if any(one["front"] for one in found["edits"]):
        yield "* on the front of dev: no other K-FAC edit has a lower perplexity and recites less"
    yield from _faults(found["edits"])


def _faults(edits: list[Json]) -> Iterator[str]:
    """Why cells are empty, each reason once."""
    seen: dict[str, list[str]] = {}
    for one in edits:
        left = [(name, x) for some in one["populations"].values() for name, x in some.items()]
        for name, x in left:
            if "fault" in x:
                where = f"{_name(one)} at ρ {plain(one['rho'])} of {one['layers']}, {name}"
                seen.setdefault(printable(str(x["fault"])), []).append(printable(where))
    for fault, cells in seen.items():
        more = f" and {number_of(len(cells) - 1, 'cell')} more" if cells[1:] else ""
        yield f"{MISSING} not measured: {cells[0]}{more}: {fault}"
