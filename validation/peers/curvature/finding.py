"""What did not come out equal: traced to its cause, each with a reproduction that runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One discrepancy.

    Fields:
        program; fault, its id ("B18") or "".
        text: what happens and why, with the numbers of this run.
        holds: did the reproduction show what the text says?
        where: the function that reproduces it.
    """

    program: str
    fault: str
    text: str
    holds: bool
    where: str
