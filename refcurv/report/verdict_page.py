"""One page of HTML with what `validate` found: the causes, a table of layers, and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from html import escape

from refcurv.files.disk import write_bytes
from refcurv.judge.verdict import LABELS, UNDECIDED, is_fine
from refcurv.report import plots
from refcurv.report.cells import Json
from refcurv.report.html import document, facts, figure, html_table, prose, section
from refcurv.report.plots.verdict import differences
from refcurv.report.table import Table
from refcurv.report.verdict import (
    FINE,
    called,
    findings_table,
    headline,
    layer_table,
    marks,
    measured,
    unjudged,
)

ABOUT = (
    "Another program’s curvature factors beside those of refcurv, layer by layer. A/tr A and "
    "G/tr G compare the form of the factors, tr A · tr G their scale; no choice of where a "
    "constant is kept changes these three. An error is judged by the other program’s arithmetic."
)
NEAREST = 40
"""Excluded hypotheses that the page lists."""

ROWS = 30
"""Comparisons that did not pass, of which the page has a row."""

NAMED = 12
"""Layers that a cause names."""

SEE, READ = (
    "Where it differs.",
    "At the left, each point is a block of entries of the matrix over its trace: how far theirs is "
    "from ours, in units of the size of ours. At the right, the eigenvalues over the trace. Bands "
    "point to features or heads, one row and column to a bias, a diagonal to damping; spectra that "
    "agree while the map does not point to a permutation.",
)


def write_verdict_page(verdict: Json, path: str | os.PathLike[str]) -> None:
    """Write one self-contained page of HTML, atomically.

    Args:
        verdict: `Verdict.to_json()`, with "pictures" or without.
        path: of the page; its folder must exist.

    Raises:
        RefcurvError: matplotlib is not installed. SchemaError: no such folder. StorageError: the
            machine could not write.

    Proof:  tests/test_verdict_page.py::test_the_page_needs_nothing_else
    """
    write_bytes("report", path, verdict_page(verdict).encode("utf-8", "replace"))


def verdict_page(verdict: Json) -> str:
    """The page's text; the same for the same verdict."""
    title = escape(headline(verdict))
    head = [f"<h1>{title}</h1>\n<p>{escape(ABOUT)}</p>"]
    head += [f"<p><strong>{prose(text)}.</strong></p>" for text in unjudged(verdict)]
    return document(title, head, _sections(verdict), "Made by refcurv validate.")


def _sections(verdict: Json) -> Iterator[str]:
    known = zip(marks(verdict), verdict["causes"], strict=True)
    causes = [_cause(name, one, _all_layers(verdict)) for name, one in known]
    if not causes:
        causes = [f"<p>{_no_cause(verdict)}</p>"]
    yield section("Causes", *causes)
    yield section("Layers", html_table(_short(layer_table(verdict), "Layers: ")))
    bad, notes = findings_table(verdict, ROWS)
    if bad.rows:
        seen = "".join(f"<li>{prose(text)}</li>" for text in notes)
        table = html_table(_short(bad, "What did not pass "))
        yield section("What did not pass", table, f"<ol>{seen}</ol>" if seen else "")
    shown = verdict.get("pictures") or ()
    if shown:
        alt = "For each layer a map of the difference of the factors, and both spectra."
        yield section("In pictures", figure(plots.svg(differences(shown)), alt, SEE, READ))
    read = {
        "read as": str(verdict["program"]),
        "recipe": " ".join(verdict["recipe"]) or "none needed",
        "arithmetic": str(verdict["arithmetic"]),
        "accepted without a declaration": ", ".join(verdict["accepted"]) or "nothing",
    }
    for one in verdict["findings"]:  # of the dump as a whole
        if not one["layer"] and one["verdict"] in FINE and one["quantity"] not in ("", LABELS):
            read[str(one["quantity"])] = str(one["cause"])
    names = {o: f"their {t}" for o, t in verdict["matched"].items() if o != t}
    yield section(
        "How it was read", facts(read), facts({f"{o}": f"their {t}" for o, t in names.items()})
    )
    if verdict["excluded"]:
        tried = "".join(f"<li>{prose(text)}</li>" for text in verdict["excluded"][:NEAREST])
        more = len(verdict["excluded"]) - NEAREST
        rest = f"<p>And {more} more, in the JSON.</p>" if more > 0 else ""
        yield section("Tried, and excluded: the nearest first", f"<ul>{tried}</ul>", rest)


def _no_cause(verdict: Json) -> str:
    """What is said where no cause is."""
    if verdict["passed"]:
        return "Nothing needs one."
    accepted = verdict["accepted"]
    if all(
        f["verdict"] == UNDECIDED or is_fine(f["verdict"], accepted) for f in verdict["findings"]
    ):
        return "Nothing is known to be wrong, and not everything could be decided."
    return "No known fault explains this."


def _short(table: Table, heading: str) -> Table:
    """Without what the heading above it says already."""
    title = table.title.removeprefix(heading).strip("()").replace(") (", "; ")
    return replace(table, title=title[:1].upper() + title[1:])


def _all_layers(verdict: Json) -> list[str]:
    return list(dict.fromkeys(f["layer"] for f in verdict["findings"] if f["layer"]))


def _cause(name: str, one: Json, every: list[str]) -> str:
    text = f"<p><strong>{escape(name)}</strong> {prose(one['sentence'])} {prose(one['remedy'])}</p>"
    layers = one["layers"]
    some = ", ".join(layers[:NAMED]) + f" and {len(layers) - NAMED} more" * (len(layers) > NAMED)
    whole = len(layers) > 1 and set(layers) == set(every)
    pairs = {
        "layers": f"all {len(every)}" if whole else some,
        "error before": measured(one["before"]),
        "error after": measured(one["after"]) or "nothing to measure",
    }
    pairs = pairs if layers else {}  # it is about the labels, say, and no matrix
    if one["alike"]:
        pairs["cannot be told from"] = ", ".join(map(called, one["alike"]))
    return text + (facts(pairs) if pairs else "")
