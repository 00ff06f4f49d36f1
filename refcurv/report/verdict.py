"""The text of `refcurv validate`: what is wrong and why first, then a line for each layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.verdict import (
    EQUAL_AS,
    FAIL,
    LABELS,
    LEFT_OUT,
    MISSING,
    PASS,
    UNDECIDED,
    is_fine,
)
from refcurv.law.words import number_of
from refcurv.report.cells import Json, scientific
from refcurv.report.table import Table
from refcurv.report.text import NARROW, format_rows, printable

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

    Proof: tests/test_verdict_page.py::test_the_text_says_what_is_wrong_first,
        ::test_a_cause_is_said_once
    """
    layers, (bad, notes) = layer_table(verdict), findings_table(verdict)
    head = [textwrap.fill(headline(verdict), NARROW), *map(_filled, unjudged(verdict))]
    parts = [*head, *_causes(verdict), _titled(layers)]
    parts.append("\n".join(_tried(verdict)))
    if bad.rows:
        parts.append(_titled(bad))
        parts.append("\n".join(_filled(f"{k}: {text}") for k, text in enumerate(notes, 1)))
    parts.append("\n".join(_how(verdict)))
    return "\n\n".join(filter(None, parts))


def headline(verdict: Json) -> str:
    """One line: passed, undecided or failed, of how many layers, and the faults by name.

    What nothing decides has not failed, though it has not passed either.

    Proof: tests/test_verdict_page.py::test_what_is_undecided_is_not_called_failed,
        ::test_layers_that_are_not_there_are_told_from_those_that_fail
    """
    program = printable(str(verdict["program"]))
    bad = [f for f in _bad(verdict) if not is_fine(f["verdict"], verdict["accepted"])]
    layers = {f["layer"] for f in verdict["findings"] if f["layer"]}
    if verdict["passed"]:
        but = "; whose labels they have is not judged" if unjudged(verdict) else ""
        return f"passed: {number_of(len(layers), 'layer')} of {program}{but}"
    if all(f["verdict"] == LEFT_OUT for f in verdict["findings"]):
        return f"nothing was compared in {number_of(len(layers), 'layer')} of {program}"
    wrong = [f for f in bad if f["verdict"] != UNDECIDED]
    if not wrong:
        return f"UNDECIDED: {_of(bad, layers)} of {program}: nothing is known to be wrong"
    absent = all(f["verdict"] == MISSING and f["layer"] not in verdict["matched"] for f in bad)
    held = layers - {f["layer"] for f in bad}
    but = "; it does not hold these, and what it holds passes" if absent and held else ""
    return f"FAILED: {_of(wrong, layers)} of {program}: {_named(verdict, bad)}{but}"


def unjudged(verdict: Json) -> list[str]:
    """Sentences on what could not be judged, and on what would tell it."""
    found = (f for f in verdict["findings"] if f["quantity"] == LABELS)
    return [str(f["cause"]) for f in found if f["verdict"] == LEFT_OUT]


def _of(found: list[Json], layers: set[str]) -> str:
    """How many layers these are about; the dump itself where it is none."""
    some = {f["layer"] for f in found if f["layer"]}
    return f"{len(some)} of {number_of(len(layers), 'layer')}" if some else "the dump"


def _named(verdict: Json, bad: list[Json]) -> str:
    """The faults; or, without a cause, the verdicts that say what it is; and what is undecided."""
    own = zip(marks(verdict), verdict["causes"], strict=True)
    named = sorted({mark if one["fault"] else f"see {mark}" for mark, one in own})
    words = sorted({f["verdict"] for f in bad} - {FAIL, UNDECIDED})
    if not named:
        plain = any(f["verdict"] == FAIL for f in bad)
        named = ["no known cause"] * plain + words
    open_ = {f["layer"] for f in bad} - {f["layer"] for f in bad if f["verdict"] != UNDECIDED}
    return ", ".join(named) + (f"; {len(open_)} more undecided" if open_ else "")


def _causes(verdict: Json) -> Iterator[str]:
    for name, one in zip(marks(verdict), verdict["causes"], strict=True):
        text = " ".join(filter(None, (f"{name}: {one['sentence']}", one["remedy"])))
        text += f" ({'; '.join(filter(None, (_errors(one), _where(verdict, one))))})"
        if one["alike"]:
            text += f" Cannot be told from {', '.join(map(called, one['alike']))} in this dump."
        yield _filled(text)


def _errors(cause: Json) -> str:
    """Without the hypothesis and with it; empty of what is not there."""
    before, after = measured(cause["before"]), measured(cause["after"])
    if {*cause["quantities"]} <= {"names", LABELS}:
        return ""
    explained = after and after != before  # what is unknown explains none of it
    return f"error {before}" + (f", with this explained {after}" if explained else "")


def _where(verdict: Json, cause: Json) -> str:
    """How many layers it is about, and which quantities."""
    layers = [number_of(len(cause["layers"]), "layer")] if cause["layers"] else []
    return ", ".join([*layers, *_explained(verdict, cause)])


def called(fault: str) -> str:
    """An id with what it is: `B4 (wrong divisor)`."""
    return f"{fault} ({FAULTS[fault].name})" if fault in FAULTS else fault


def _explained(verdict: Json, cause: Json) -> list[str]:
    """The quantities that a cause speaks of, those that passed left out, and that there is none."""
    layers = {*cause["layers"]}
    bad = {f["quantity"] for f in _bad(verdict) if f["layer"] in layers}
    some = [q for q in cause["quantities"] if q in bad] or list(cause["quantities"])
    return [q for q in some if q != "names"]


def _filled(text: str) -> str:
    """A paragraph of the terminal."""
    return textwrap.fill(printable(text), NARROW, subsequent_indent="  ")


def marks(verdict: Json) -> list[str]:
    """What each cause is called: by its id, one without by its place."""
    causes = verdict["causes"]
    return [str(one["fault"] or f"cause {place}") for place, one in enumerate(causes, 1)]


def refers(verdict: Json, finding: Json) -> tuple[str, str]:
    """The cause of a finding by its mark, and what the finding says beside that cause."""
    text = str(finding["cause"])
    for name, one in zip(marks(verdict), verdict["causes"], strict=True):
        about = finding["layer"] in one["layers"] and finding["quantity"] in one["quantities"]
        if about and finding["fault"] == one["fault"]:
            own = text.replace(one["sentence"], "").strip(" .")
            return name, "" if own in one["sentence"] else own
    return str(finding["fault"] or ""), text


def _tried(verdict: Json) -> Iterator[str]:
    """Where something stayed unexplained: what was tried, the nearest first, a line each."""
    tried = verdict["excluded"]
    if tried:
        yield f"No known fault explains all of it. The nearest of {len(tried):,} that were tried:\n"
    for text in tried[:NEAREST]:
        yield _filled(f"- {text}")


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
        others = ", ".join(f["quantity"] for f in bad if f["quantity"] not in (*COLUMNS, "names"))
        causes = ", ".join(filter(None, dict.fromkeys(refers(verdict, f)[0] for f in bad)))
        word = "pass" if not bad else _worst([f["verdict"] for f in bad])
        rows.append((layer, *cells, others, causes, word))
    headers = ("layer", *COLUMNS, "also wrong", "cause", "verdict")
    title = "Layers: the relative errors that no choice of scale changes"
    return _used(Table(title, headers, tuple(rows), "lrrrlll"), ("also wrong", "cause"))


def _worst(verdicts: list[str]) -> str:
    order = (FAIL, MISSING, EQUAL_AS, UNDECIDED)
    return min(
        verdicts, key=lambda v: next(k for k, word in enumerate(order) if v.startswith(word))
    )


def _bad(verdict: Json) -> list[Json]:
    return [f for f in verdict["findings"] if f["verdict"] not in FINE]


def findings_table(verdict: Json, most: int = SHOWN) -> tuple[Table, list[str]]:
    """The comparisons that did not pass, at most so many of them, those with a cause first.

    Returns: the table, and notes. A row names its cause by its mark, and by its number the note of
    what was seen beside that; so each sentence is said once.
    """
    bad = sorted(_bad(verdict), key=lambda f: (f["verdict"] == UNDECIDED, f["layer"] != ""))
    rows, notes = [], {"": ""}
    for one in bad[:most]:
        numbers = ["" if x is None else scientific(x) for x in (one["error"], one["budget"])]
        cause, seen = refers(verdict, one)
        note = notes.setdefault(seen if seen or cause else NOTHING, str(len(notes)))
        rows.append((one["layer"], one["quantity"], *numbers, one["verdict"], cause, note))
    title = "What did not pass (relative errors)"
    if len(bad) > most:
        title += f" ({most} of {len(bad)}; --json has all)"
    headers = ("layer", "quantity", "error", "budget", "verdict", "cause", "note")
    table = _used(Table(title, headers, tuple(rows), "llrrlll"), ("cause", "note"))
    return table, list(notes)[1:]


def _used(table: Table, optional: tuple[str, ...]) -> Table:
    """Without those of the optional columns that no row uses."""
    columns = list(enumerate(table.headers))
    kept = [k for k, name in columns if name not in optional or any(row[k] for row in table.rows)]
    rows = tuple(tuple(row[k] for k in kept) for row in table.rows)
    align = "".join(table.align[k] for k in kept)
    return Table(table.title, tuple(table.headers[k] for k in kept), rows, align)


NOTHING = "nothing more is known"


def _titled(table: Table) -> str:
    return f"{table.title}\n\n" + format_rows(table.headers, table.rows, table.align)


def _how(verdict: Json) -> Iterator[str]:
    for text in verdict["recipe"]:
        yield _filled(f"recipe: {text}")
    if verdict["arithmetic"]:
        yield _filled(f"their arithmetic: {verdict['arithmetic']}")
    for one in verdict["findings"]:
        if not one["layer"] and one["verdict"] in FINE and one["quantity"] not in ("", LABELS):
            yield _filled(f"{one['quantity']}: {one['cause']}")
