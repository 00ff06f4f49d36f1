"""The text of `refcurv recite`."""

from __future__ import annotations

from collections.abc import Iterator

from refcurv.evaluation.recited import Recited
from refcurv.law.words import number_of
from refcurv.model.corpus import SPLITS


def format_recited(found: Recited) -> str:
    """How many passages of how many documents, what was left out, and how near the rest came.

    Proof: tests/test_recited.py::test_the_command_line
    """
    return "\n".join(_lines(found))


def _lines(found: Recited) -> Iterator[str]:
    documents = number_of(len(found.documents), "document")
    short = f", {found.short} of them too short for one" if found.short else ""
    yield f"{number_of(found.windows, 'window')} of {documents}{short}"
    for split in SPLITS:
        own = [one for one in found.passages if one.split == split]
        of = number_of(len({one.document for one in own}), "document")
        yield f"{split}: {number_of(len(own), 'passage')} of {of}"
        if found.passages and not own:
            yield f"{split} needs passages of other documents: give more, or a lower `--run`"
    if not found.passages and (most := _longest(found)):
        yield f"none is right to its end; `--run {most}` takes those with {most} right in a row"
    for count, why in (
        (found.repeats, "said again what stands before"),
        (found.doubles, "said what another document says"),
        (found.overlaps, "overlapped a longer or an earlier one"),
    ):
        if count:
            yield f"left out: {number_of(count, 'window')} that {why}"
    yield f"the likeliest token is the true one at {found.right:.1%} of what was asked for"
    yield f"right tokens in a row, of {len(found.runs) - 1}: " + ", ".join(
        f"{name} in {number_of(count, 'window')}" for name, count in _grouped(found)
    )


def _longest(found: Recited) -> int:
    """The most right tokens in a row of any window."""
    return max((run for run, count in enumerate(found.runs) if count), default=0)


def _grouped(found: Recited) -> Iterator[tuple[str, int]]:
    """Runs of 0, of 1, of 2 to 3, of 4 to 7, ..., and the longest alone."""
    most, low = len(found.runs) - 1, 0
    while low <= most:
        high = most if low == most else min(max(2 * low - 1, low), most - 1)
        name = f"{low}" if low == high else f"{low}-{high}"
        yield name, int(found.runs[low : high + 1].sum())
        low = high + 1
