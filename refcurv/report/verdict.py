"""The text of `refcurv validate`: what is wrong first, then a line for each comparison."""

from __future__ import annotations

from refcurv.report.cells import Json, scientific
from refcurv.report.text import WIDTH, format_rows, printable


def format_verdict(verdict: Json) -> str:
    """The causes, and a table of every comparison.

    Args: verdict: `Verdict.to_json()`.
    """
    word = "passed" if verdict["passed"] else "FAILED"
    rows = []
    for one in verdict["findings"]:
        cause = " ".join(filter(None, (one["fault"], one["cause"])))
        numbers = [None if x is None else scientific(x) for x in (one["error"], one["budget"])]
        rows.append([one["layer"], one["quantity"], *numbers, one["verdict"], cause])
    causes = [
        f"{one['fault'] or '?'}: {one['sentence']} {one['remedy']}" for one in verdict["causes"]
    ]
    headers = ("layer", "quantity", "error", "budget", "verdict", "cause")
    table = format_rows(headers, rows, "llrrll", 2 * WIDTH)
    return "\n".join([f"{word}: {printable(verdict['program'])}", *map(printable, causes), table])
