"""How far two matrices are apart, large ones without a third."""

from __future__ import annotations

import math

from refcurv.algebra.scaling import norm
from refcurv.law.checks import Array

_AT_ONCE = 2**17
"""Entries of a matrix that are looked at together: a mebibyte.  Chosen: a cache holds three."""


def apart(X: Array, Y: Array, r: float = 1.0) -> float:
    """‖X / r − Y‖, matrices of finite numbers; of large ones a few rows at a time.

    So it is found in the cache, and takes no memory.

    Proof: tests/test_scaling.py::test_a_difference_is_measured_a_few_rows_at_a_time
    """
    step = max(1, _AT_ONCE // max(1, X.shape[-1]))
    some = (slice(k, k + step) for k in range(0, len(X), step))
    return math.hypot(*(float(norm(X[rows] / r - Y[rows])) for rows in some))
