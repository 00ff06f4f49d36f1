"""bfloat16 in NumPy, which has no such dtype: the upper half of a float32, kept as uint16."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from refcurv.law.checks import Array

EXPONENT = np.uint16(0x7F80)
"""All exponent bits: a bfloat16 with every one of them set is infinite or NaN."""

QUIET_NAN = np.uint16(0x7FC0)

PANEL = 2**18
"""How many numbers are rounded or looked at together.  Chosen: the copies then stay in the cache,
and those of an embedding of 100,000 words take no memory."""


def panels(array: Array) -> Iterator[slice]:
    """The rows of an array of one axis or more, about PANEL numbers at a time."""
    rows = max(1, PANEL // max(1, math.prod(array.shape[1:])))
    return (slice(first, first + rows) for first in range(0, len(array), rows))


def widened(bits: Array, dtype: str) -> Array:
    """bfloat16 bits → `dtype`, float32 or float64, exactly: `from_bfloat16`, a panel at a time.

    Proof: tests/test_edit_room.py::test_panels_change_no_bit
    """
    given = np.atleast_1d(bits)
    out = np.empty(given.shape, dtype)
    for rows in panels(given):
        out[rows] = from_bfloat16(given[rows])
    return out.reshape(bits.shape)


def all_finite(bits: Array) -> bool:
    """Are all these bfloat16 finite?"""
    given = np.atleast_1d(bits)
    return not any(((given[rows] & EXPONENT) == EXPONENT).any() for rows in panels(given))


def from_bfloat16(bits: Array) -> Array:
    """uint16 bits → float32, exactly: sixteen zero bits are appended."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """float64 or float32 → uint16 bits of the nearest bfloat16, ties to the even one, rounded ONCE.

    Rounding a float64 to the nearest float32 first would round twice. The result would be wrong
    where the float32 is a tie. The float32 is therefore rounded to odd: it is cut towards zero, and
    its last bit is set if anything was cut off. It then lies on the same side of every tie as the
    value itself. Overflow gives infinity. NaN gives the quiet NaN 0x7FC0.

    Proof: tests/test_weights.py::test_bfloat16_is_the_nearest_with_ties_to_even,
        tests/test_edit_room.py::test_panels_change_no_bit
    """
    given = np.atleast_1d(values)
    out = np.empty(given.shape, np.uint16)
    for rows in panels(given):
        out[rows] = _rounded(given[rows])
    return out.reshape(np.shape(values))


def _rounded(values: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.asarray(values, order="C").astype(np.float32)
        bits = single.view(np.uint32)
        bits -= np.abs(single) > np.abs(values)
        bits |= single != values
    # nearest even: add half of the dropped unit, less one when the kept part is even
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), QUIET_NAN, rounded.astype(np.uint16))
