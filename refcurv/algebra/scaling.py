"""Sums and norms that hold up to the ends of a float's range: powers of two bring them inside.

Squares of float64 leave its range at 1e-154 and 1e154. A power of two changes no digit, so what is
computed of 2^-k x is that of x.
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
"""Norms whose squares neither overflow nor lose a visible part below the smallest normal number."""


def exponent(x: Array) -> int:
    """The k with 2^k <= max |x| < 2^(k+1), of finite x; 0 if all of it is 0 or there is none."""
    if not x.size:
        return 0
    top = max(float(x.max()), -float(x.min()))
    return math.frexp(top)[1] - 1 if top else 0


def far_exponent(x: Array) -> int:
    """`exponent`, or 0 within 2^±256: there nothing that counts is squared out of the range.

    LAPACK too scales only what lies further out. So x as it comes and 2^-far_exponent(x) x are safe
    to compute with, and what is computed of ordinary numbers keeps its bits.
    """
    k = exponent(x)
    return 0 if abs(k) <= 256 else k


def shifted(x: ArrayLike, k: int) -> Array:
    """2^k x in float64: exact unless it leaves the range of normal numbers."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(np.asarray(x, np.float64), k)


def norm(x: Array, axis: int | None = None) -> Any:
    """‖x‖: Frobenius norm, or Euclidean norm along an axis, of finite x in float64.

    Infinite only where the norm itself is beyond float64. The definition is numpy.linalg.norm(x,
    axis=axis), whose bits it has wherever no square over- or underflows.

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
    """The correctly rounded sum (math.fsum) of finite numbers; infinite only if it is too large."""
    x = list(x)
    try:
        return math.fsum(x)
    except OverflowError:  # a partial sum, or the whole
        exact = sum(map(Fraction, x))
        try:
            return float(exact)
        except OverflowError:
            return math.inf if exact > 0 else -math.inf
