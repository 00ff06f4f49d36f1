"""Rows of cells as lines: aligned, nothing that a terminal obeys, and no wider than a terminal.

Where standard output is no terminal nothing is cut: a program reads it, or a person with a pager.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

from refcurv.report.cells import MISSING

WIDTH = 100
"""Columns of the longest rule where there is no terminal."""

NARROW = 80
"""Columns of a sentence: those of the narrowest usual terminal."""

KEPT = 32
"""Columns to which a name or a text is shortened at most, for the sake of others."""

GAP = "  "


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None where it is none: nothing is cut.

    Proof: tests/test_report.py::test_nothing_is_cut_where_there_is_no_terminal
    """
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or NARROW
    except (AttributeError, OSError, ValueError):  # closed, a file or a pipe, none at all
        return None


def format_rows(headers: Sequence[object], rows: Iterable[Sequence[object]], align: str) -> str:
    """Aligned columns under one rule.

    Args:
        headers: one per column.
        rows: cells; None and NaN are shown as "-", anything else by `str`.
        align: "l" or "r" per column. On a terminal the widest left-aligned cells are shortened to
            fit it, to KEPT columns at least. What has no room then stands below, beside the first
            column again.

    Returns:
        Lines without trailing blanks, joined by newlines; control characters are escaped.

    Raises:
        ValueError: a row with another number of cells than `align` has letters.

    Proof:  tests/test_report.py::test_rows_are_aligned; ::test_hostile_names_stay_on_their_line;
        ::test_what_has_no_room_beside_a_name_stands_below
    """
    lines, width = [[_cell(cell) for cell in line] for line in (headers, *rows)], terminal_width()
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    if any(len(line) != len(align) for line in lines):
        raise ValueError(f"format_rows: {align!r} is for rows that are longer or shorter")
    parts = [list(range(len(align)))]
    if width is not None:
        _narrow(widths, align, width, min(KEPT, width // 2))
        parts = _beside_the_first(widths, width)
    return "\n\n".join(_table(lines, widths, align, part, width) for part in parts)


def continued(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows whose last cell, a sentence, goes on below where the terminal ends.

    Proof: tests/test_audit.py::test_an_identity_is_whole_however_narrow_the_terminal
    """
    width = terminal_width()
    if width is None or not rows:
        return list(rows)
    others = [max(map(display_width, column)) for column in zip(*rows, strict=True)][:-1]
    room = max(NARROW // 4, width - sum(others) - len(GAP) * len(others))
    out: list[Sequence[str]] = []
    for *cells, text in rows:
        first, *more = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        out += [(*cells, first), *((*("" for _ in cells), rest) for rest in more)]
    return out


def _table(
    lines: Sequence[Sequence[str]], widths: Sequence[int], align: str, part: Sequence[int],
    width: int | None,
) -> str:  # fmt: skip
    """Some of the columns."""
    head, *rest = (
        GAP.join(_padded(line[n], widths[n], align[n]) for n in part).rstrip() for line in lines
    )
    return "\n".join([head, "─" * min(_together(widths, part), width or WIDTH), *rest])


def _together(widths: Sequence[int], part: Sequence[int]) -> int:
    """The width of some columns beside one another."""
    return sum(widths[n] for n in part) + len(GAP) * (len(part) - 1)


def _narrow(widths: list[int], align: str, width: int, least: int) -> None:
    """Narrow the widest left-aligned column until all fit, but none below so many columns."""
    left = [n for n, side in enumerate(align) if side == "l"] or list(range(len(widths)))
    excess = _together(widths, range(len(widths))) - width
    while excess > 0 and max(widths[n] for n in left) > least:
        widths[max(left, key=lambda n: widths[n])] -= 1
        excess -= 1


def _beside_the_first(widths: list[int], width: int) -> list[list[int]]:
    """The columns in as many parts as have room one below the other, each with the first one."""
    parts = [[0]]
    for n in range(1, len(widths)):
        if len(parts[-1]) > 1 and _together(widths, [*parts[-1], n]) > width:
            parts.append([0])
        parts[-1].append(n)
        if len(parts[-1]) == 2 and (excess := _together(widths, parts[-1]) - width) > 0:
            widths[n] = max(4, widths[n] - excess)
    return parts


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return printable(str(value))


def filled(text: str, width: int = NARROW) -> str:
    """Lines that are broken at the ends of words, so that none is wider; a long word stays whole.

    Proof: tests/test_report.py::test_lines_are_broken_at_the_ends_of_words
    """
    lines = (
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False,
                      break_on_hyphens=False)
        for line in text.split("\n")
    )  # fmt: skip
    return "\n".join(lines)


def printable(text: str) -> str:
    r"""What a terminal would obey, or not show, as Python's escapes: a newline as \n.

    Proof: tests/test_report.py::test_what_a_terminal_obeys_is_escaped
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def display_width(text: str) -> int:
    """Terminal columns of a text."""
    return sum(_columns(c) for c in text)


def _columns(character: str) -> int:
    """Terminal columns of one character: 2 for wide ones, 0 for combining marks."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int | None) -> str:
    """A text, or as much of it as fits so many columns with an ellipsis behind it; None: all."""
    if width is None:
        return text
    used = fits = 0
    for n, character in enumerate(text, start=1):
        used += _columns(character)
        if used > width:
            return text[:fits] + "…"
        if used < width:
            fits = n
    return text


def _padded(text: str, width: int, side: str) -> str:
    text = shorten(text, width)
    blank = " " * (width - display_width(text))
    return blank + text if side == "r" else text + blank
