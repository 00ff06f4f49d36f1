"""The tables of `refcurv sweep`: a pattern each, a row for each edit."""

from __future__ import annotations

from collections.abc import Iterator

from refcurv.evaluation.intervals import paired
from refcurv.law.words import number_of
from refcurv.report.cells import (
    MISSING,
    Json,
    decimal,
    number,
    percent,
    plain,
    population_name,
    relative,
)
from refcurv.report.table import MEASURES, SHARES, Table, method_name
from refcurv.report.text import format_rows, printable, shorten

COLUMNS = 4
"""Populations side by side: chosen for a terminal of 100 columns."""


def format_sweep(found: Json) -> str:
    """What each edit leaves, and how surely it differs from K-FAC's.

    Args:
        found: `Sweep.to_json()`.

    Proof: tests/test_sweep.py::test_the_command_line
    """
    texts = [f"{one.title}\n{format_rows(one.headers, one.rows, one.align)}"
             for one in sweep_tables(found)]  # fmt: skip
    return "\n\n".join([*texts, "\n".join(_notes(found))])


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
        tables += [_left(split, known, edits, pattern, some) for some in _chunks(list(known))]
        judged = [name for name, one in known.items() if one["right"] is not None]
        tables += [_paired(split, edits, some) for some in _chunks(judged)]
    return [table for table in tables if table.rows]


def _chunks(names: list[str]) -> list[list[str]]:
    """As many populations as a table has room for."""
    return [names[begin : begin + COLUMNS] for begin in range(0, len(names), COLUMNS)]


def _left(split: str, base: Json, edits: list[Json], pattern: str, names: list[str]) -> Table:
    """A row for each edit of one pattern, and one of the unedited model."""
    rows = [("unedited", "", "", "", *(_value(base[name], None) for name in names), "")]
    for one in edits:
        own = one["populations"][split]
        star = "*" if one["front"] and one["method"] == "kfac" else ""
        rows.append(
            (f"{_name(one)}{star}", plain(one["rho"]), _removed(one), percent(one["kept"]),
             *(_value(own[name], base[name]) for name in names), _verdict(one))
        )  # fmt: skip
    headers = ("", "ρ", "removed", "kept", *_heads(names, split), "")
    title = f"{printable(pattern)}, split {split}"
    return Table(title, headers, tuple(rows), "lrrr" + "r" * len(names) + "l")


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
    return [shorten(printable(population_name(name, split)), 12) for name in names]


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
        return "∞"
    rise = "" if base is None else f" {percent(relative(base['values'][measure], value), sign='+')}"
    return decimal(value, 2) + rise


def _notes(found: Json) -> Iterator[str]:
    """What the rows are."""
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
