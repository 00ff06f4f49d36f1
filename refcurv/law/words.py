"""How messages count: one of a thing, or several."""

from __future__ import annotations


def number_of(count: float, one: str, more: str = "") -> str:
    """So many: "1 layer", "12 layers", "0.5 rows"; several are `more`, or `one` and an s.

    Proof: tests/test_words.py::test_one_is_no_plural
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:,.12g}"
    return f"{number} {one if number == '1' else more or one + 's'}"
