"""The text of `refcurv validate`: what is wrong and why first, then a line for each layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace

from refcurv.judge.verdict import EQUAL_AS, FAIL, LEFT_OUT, MISSING, PASS, UNDECIDED, is_fine
from refcurv.report.cells import Json, scientific
from refcurv.report.table import Table
from refcurv.report.text import WIDTH, format_rows, printable

FINE = (PASS, LEFT_OUT)
COLUMNS = ("A/tr A", "G/tr G", "tr A · tr G")
NEAREST = 6
"""Hypotheses that were tried and not enough are listed up to so many."""

SHOWN = 12
"""Findings that did not pass are listed one by one up to so many."""


def format_verdict(verdict: Json) -> str:
    """Headline, causes, a line for each layer, and what did not pass.

    Args:
        verdict: `Verdict.to_json()`.

    Proof: tests/test_verdict_page.py::test_the_text_says_what_is_wrong_first
    """
    layers, bad = layer_table(verdict), findings_table(verdict)
    parts = [headline(verdict), *_causes(verdict), _titled(layers)]
    parts.append("\n".join(_tried(verdict)))
    if bad.rows:
        parts.append(
            _titled(replace(bad, headers=bad.headers[:-1], rows=_numbers(bad), align="llrrl"))
        )
        parts.append("\n".join(_seen(bad)))
    parts.append("\n".join(_how(verdict)))
    return "\n\n".join(filter(None, parts))


def headline(verdict: Json) -> str:
    """One line: passed, undecided or failed, of how many layers, and the faults by name.

    What nothing decides has not failed, though it has not passed either.

    Proof: tests/test_verdict_page.py::test_what_is_undecided_is_not_called_failed
    """
    program = printable(str(verdict["program"]))
    bad = [f for f in _bad(verdict) if not is_fine(f["verdict"], verdict["accepted"])]
    layers = {f["layer"] for f in verdict["findings"] if f["layer"]}
    if verdict["passed"]:
        return f"passed: {len(layers)} layers of {program}"
    if all(f["verdict"] == LEFT_OUT for f in verdict["findings"]):
        return f"nothing was compared in {len(layers)} layers of {program}"
    wrong = [f for f in bad if f["verdict"] != UNDECIDED]
    if not wrong:
        return f"UNDECIDED: {_of(bad, layers)} of {program}: nothing is known to be wrong"
    return f"FAILED: {_of(wrong, layers)} of {program}: {_named(verdict, bad)}"


def _of(found: list[Json], layers: set[str]) -> str:
    """How many layers these are about; the dump itself where it is none."""
    some = {f["layer"] for f in found if f["layer"]}
    return f"{len(some)} of {len(layers)} layers" if some else "the dump"


def _named(verdict: Json, bad: list[Json]) -> str:
    """The faults; or, without a cause, the verdicts that say what it is; and what is undecided."""
    named = sorted({c["fault"] or "a cause without a number" for c in verdict["causes"]})
    words = sorted({f["verdict"] for f in bad} - {FAIL, UNDECIDED})
    if not named:
        plain = any(f["verdict"] == FAIL for f in bad)
        named = ["no known cause"] * plain + words
    open_ = {f["layer"] for f in bad} - {f["layer"] for f in bad if f["verdict"] != UNDECIDED}
    return ", ".join(named) + (f"; {len(open_)} more undecided" if open_ else "")


def _causes(verdict: Json) -> Iterator[str]:
    for one in verdict["causes"]:
        text = f"{one['fault'] or 'cause'}: {one['sentence']} {one['remedy']}"
        where = f"{len(one['layers'])} layers, {', '.join(one['quantities'])}"
        before, after = measured(one["before"]), measured(one["after"])
        left = f", with this explained {after}" if after else ""
        text += f" (error {before}{left}; {where})"
        if one["alike"]:
            text += f" Cannot be told from {', '.join(one['alike'])} in this dump."
        yield textwrap.fill(printable(text), WIDTH, subsequent_indent="  ")


def _tried(verdict: Json) -> Iterator[str]:
    """Where something stayed unexplained: what was tried, the nearest first, a line each."""
    tried = verdict["excluded"]
    if tried:
        yield f"No known fault explains all of it. The nearest of {len(tried):,} that were tried:\n"
    for text in tried[:NEAREST]:
        yield textwrap.fill(printable(f"- {text}"), WIDTH, subsequent_indent="  ")


def measured(value: float | str) -> str:
    """An error of a cause in JSON; empty where there is none to measure."""
    if isinstance(value, str):
        return "" if value == "nan" else value
    return f"{value:.1e}"


def layer_table(verdict: Json) -> Table:
    """A row for each layer: the errors that no scale changes, what else failed, the verdict."""
    layers: dict[str, list[Json]] = {}
    for one in verdict["findings"]:
        if one["layer"]:
            layers.setdefault(one["layer"], []).append(one)
    rows = []
    for layer, found in layers.items():
        errors = {f["quantity"]: f["error"] for f in found}
        cells = [scientific(e) if (e := errors.get(q)) is not None else "" for q in COLUMNS]
        bad = [f for f in found if f["verdict"] not in FINE]
        others = ", ".join(f["quantity"] for f in bad if f["quantity"] not in COLUMNS)
        faults = ", ".join(dict.fromkeys(f["fault"] for f in bad if f["fault"]))
        word = "pass" if not bad else _worst([f["verdict"] for f in bad])
        rows.append((layer, *cells, others, faults, word))
    headers = ("layer", *COLUMNS, "also", "fault", "verdict")
    title = "Layers: the errors that no choice of scale changes"
    return Table(title, headers, tuple(rows), "lrrrlll")


def _worst(verdicts: list[str]) -> str:
    order = (FAIL, MISSING, EQUAL_AS, UNDECIDED)
    return min(
        verdicts, key=lambda v: next(k for k, word in enumerate(order) if v.startswith(word))
    )


def _bad(verdict: Json) -> list[Json]:
    return [f for f in verdict["findings"] if f["verdict"] not in FINE]


def findings_table(verdict: Json) -> Table:
    """The comparisons that did not pass, at most SHOWN of them, those with a cause first."""
    bad = sorted(_bad(verdict), key=lambda f: (f["verdict"] == UNDECIDED, f["layer"] != ""))
    rows = []
    for one in bad[:SHOWN]:
        numbers = ["" if x is None else scientific(x) for x in (one["error"], one["budget"])]
        rows.append((one["layer"], one["quantity"], *numbers, one["verdict"], one["cause"]))
    title = "What did not pass (relative errors)"
    if len(bad) > SHOWN:
        title += f" ({SHOWN} of {len(bad)}; --json has all)"
    headers = ("layer", "quantity", "error", "budget", "verdict", "what was seen")
    return Table(title, headers, tuple(rows), "llrrll")


def _numbers(bad: Table) -> tuple[tuple[str, ...], ...]:
    """The rows without what was seen, which is too long for a column."""
    return tuple(row[:-1] for row in bad.rows)


def _seen(bad: Table) -> Iterator[str]:
    """Each sentence once, whole, with the rows that it is about."""
    rows: dict[str, list[str]] = {}
    for row in bad.rows:
        rows.setdefault(row[-1], []).append(f"{row[0]} {row[1]}".strip())
    for text, about in rows.items():
        more = f" and {len(about) - 2} more" if len(about) > 2 else ""
        line = printable(f"{', '.join(about[:2])}{more}: {text or 'nothing more is known'}")
        yield textwrap.fill(line, WIDTH, subsequent_indent="  ")


def _titled(table: Table) -> str:
    return f"{table.title}\n\n" + format_rows(table.headers, table.rows, table.align)


def _how(verdict: Json) -> Iterator[str]:
    for text in verdict["recipe"]:
        yield textwrap.fill(printable(f"recipe: {text}"), WIDTH, subsequent_indent="  ")
    if verdict["arithmetic"]:
        yield printable(f"their arithmetic: {verdict['arithmetic']}")
    for one in verdict["findings"]:
        if not one["layer"] and one["verdict"] in FINE and one["cause"]:
            yield textwrap.fill(printable(f"{one['quantity']}: {one['cause']}"), WIDTH)
