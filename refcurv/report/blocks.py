"""Rows of a table that differ in the number of a block alone, as one row."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

MARK = "\0"
"""Stands for the number of a block."""


def by_block(
    rows: Iterable[Sequence[str]], names: Collection[int]
) -> list[tuple[list[str], list[int]]]:
    """Rows that are alike but for the block that their first cell names, and which rows these are.

    Their names become the pattern of all of them: `blocks.{0-29}.attn.q.weight`. A row is where the
    first of its kind was.

    Args: names, the cells that name the block, if they are names; the first is one.

    Proof: tests/test_conversion.py::test_rows_of_one_kind_are_one_row
    """
    groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for at, row in enumerate(rows):
        block = _marked(row[0])[1]
        cells = list(row)
        for n in names:
            text, number = _marked(row[n])
            cells[n] = text if number == block else row[n]
        members, blocks = groups.setdefault(tuple(cells), ([], []))
        members.append(at)
        if block is not None:
            blocks.append(block)
    return [
        ([cell.replace(MARK, _runs(blocks)) for cell in key], members)
        for key, (members, blocks) in groups.items()
    ]


def _marked(name: str) -> tuple[str, int | None]:
    """A name with the first number among its dotted parts replaced by a mark, and the number."""
    found = re.search(r"(?<![^.])\d{1,9}(?![^.])", name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}{MARK}{name[found.end() :]}", int(found[0])


def _runs(numbers: Sequence[int]) -> str:
    """[3] → "3", [0, 1, 2, 5] → "{0-2,5}"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return "".join(texts) if len(numbers) < 2 else "{" + ",".join(texts) + "}"
