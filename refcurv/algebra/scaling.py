"""Sums and norms that are right up to the ends of the range of float64.

Squares leave that range below 1e-154 and above 1e154. To multiply by a power of two changes no
digit. So the digits of a result for 2^-k x are those for x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refcurv.law.checks import Array

_PLAIN = (2.0**-480, 2.0**511)
"""Norms between these are sound without scaling.

Below 2^511 the sum of squares is below 2^1022. Above 2^-480 it is above 2^-960. Squares below the
smallest normal number lose at most 2^-1075 each: n of them 2^-115 n of the sum.
"""


def exponent(x: Array) -> int:
    """The k with 2^k <= max |x| < 2^(k+1) for finite x; 0 if x is empty or all 0."""
    if not x.size:
        return 0
    top = max(float(x.max()), -float(x.min()))
    return math.frexp(top)[1] - 1 if top else 0


def far_exponent(x: Array) -> int:
    """`exponent`, or 0 if it lies within ±256. Then squares lie within 2^±512, and are safe.

    2^-far_exponent(x) x is always safe to square, and ordinary numbers are left as they are. 256 is
    chosen: far inside 2^±485, beyond which LAPACK's eigensolver scales by itself.
    """
    k = exponent(x)
    return 0 if abs(k) <= 256 else k


def shifted(x: ArrayLike, k: int) -> Array:
    """2^k x in float64: exact unless it leaves the range of normal numbers."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(np.asarray(x, np.float64), k)


def norm(x: Array, axis: int | None = None) -> Any:
    """‖x‖: Frobenius norm, or Euclidean norm along an axis, of finite x in float64.

    It is infinite only if the norm itself is beyond float64. The definition is
    numpy.linalg.norm(x, axis=axis), with the same bits wherever no square over- or underflows.

    Proof: tests/test_scaling.py::test_norms_are_right_up_to_the_ends_of_the_range
    """
    x = np.asarray(x, np.float64)
    with np.errstate(over="ignore", under="ignore"):
        plain = np.linalg.norm(x if axis is not None else x.ravel(order="K"), axis=axis)
        sound = (plain > _PLAIN[0]) & (plain < _PLAIN[1])
        if sound.all():
            return plain
        top = np.abs(x).max(axis=axis, keepdims=True, initial=0)
        k = np.frexp(top)[1]
        inside = np.linalg.norm(np.ldexp(x, -k), axis=axis)
        return np.where(sound, plain, np.ldexp(inside, k.reshape(np.shape(inside))))[()]


def total(x: Iterable[float]) -> float:
    """The correctly rounded sum (math.fsum) of finite numbers; infinite if beyond float64."""
    x = list(x)
    try:
        return math.fsum(x)
    except OverflowError:  # of a partial sum, or of the whole
        exact = sum(map(Fraction, x))
        try:
            return float(exact)
        except OverflowError:
            return math.inf if exact > 0 else -math.inf
