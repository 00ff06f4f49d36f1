"""Numbers and names as the cells of tables: each is rounded once, here.

What is not known (None, NaN) is "-".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

Json = Mapping[str, Any]

MISSING = "-"

INFINITE = "∞"


def number(value: object) -> float:
    """A JSON value as a float; NaN for None, infinities and anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return math.nan
    return float(value)


def decimal(value: object, digits: int = 3, sign: str = "") -> str:
    """A number with so many decimals ("-" if unknown); sign "+" writes the sign always."""
    x = number(value)
    if math.isnan(x):
        return MISSING
    return f"{x:{sign}.3e}" if abs(x) >= 1e6 else f"{x:{sign}z.{digits}f}"


def percent(value: object, digits: int = 1, sign: str = "") -> str:
    """A fraction in percent, "12.3 %"; "-" if unknown. A share above 0 is not "0.0 %"."""
    x = 100 * number(value)
    text = decimal(x, digits, sign)
    if x > 0 and not sign and float(text) == 0:
        text = f"{x:.1g}"
    return text if text == MISSING else f"{text} %"


def whole(value: object) -> str:
    """An integer with separators of thousands; "-" if unknown."""
    x = number(value)
    return MISSING if math.isnan(x) else f"{int(x):,}"


def relative(before: object, after: object) -> float:
    """after / before − 1; NaN if unknown or if `before` is not positive."""
    was = number(before)
    return number(after) / was - 1 if was > 0 else math.nan


def population_name(name: str, split: str = "") -> str:
    """`open_book_test` as "open book": underscores are spaces, the split's own suffix goes."""
    stem = name.removesuffix(f"_{split}") if split else name
    return (stem or name).replace("_", " ")


def rho_text(rho: object) -> str:
    """One share, or each pattern with its own."""
    if isinstance(rho, Mapping):
        return ", ".join(f"{pattern} {plain(share)}" for pattern, share in rho.items())
    return plain(rho)


def plain(value: object) -> str:
    """A number as short as it is: "0.6", "1e-05"; "-" if unknown."""
    x = number(value)
    return MISSING if math.isnan(x) else f"{x:g}"


def small(value: object) -> str:
    """One digit and the power of ten: "3.1e-04"; "-" if unknown."""
    x = number(value)
    return MISSING if math.isnan(x) else f"{x:.1e}"


def scientific(value: object) -> str:
    """As `small`, but "0" for none; a text as it is."""
    if isinstance(value, str):
        return value
    return "0" if number(value) == 0 else small(value)
