"""The text of `refcurv validate --trace`: where two programs part."""

from __future__ import annotations

from refcurv.report.cells import Json, scientific
from refcurv.report.text import format_rows, printable


def format_divergences(table: Json) -> str:
    """One line that says where, then every tensor in order of computation.

    Args:
        table: {"agrees": bool, "tensors": a dictionary for each `judge.divergence.Divergence`}.

    Proof: tests/test_trace.py::test_a_trace_of_theirs_is_judged_on_the_command_line
    """
    rows, parted = [], ""
    for one in table["tensors"]:
        good = one["first"] is None and not one["trouble"]
        at = "" if one["first"] is None else "sequence {}, position {}".format(*one["first"])
        if not good and not parted:
            parted = f"{one['name']}: {one['trouble'] or at}"
        numbers = [
            None if one[key] is None else scientific(one[key]) for key in ("error", "budget")
        ]
        rows.append((one["name"], *numbers, "agrees" if good else "differs", one["trouble"] or at))
    headers = ("tensor", "error", "budget", "verdict", "first at")
    head = f"the two part at {printable(parted)}" if parted else "all tensors agree"
    before = "; all tensors before it agree" if parted and rows[0][0] not in parted else ""
    return f"{head}{before}\n\n" + format_rows(headers, rows, "lrrll")
