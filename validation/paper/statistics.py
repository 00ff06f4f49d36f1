"""Means over seeds and what they are worth: two-sided 95 % t intervals, of paired differences too.

A seed is one independent replicate: its own world, its own training. n seeds give n − 1 degrees of
freedom; items of one seed are never pooled as if they were independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """mean ± half: the t interval of LEVEL for the mean over `n` seeds; half is inf for n = 1."""

    mean: float
    half: float
    n: int

    @property
    def below_zero(self) -> bool:
        """Does the whole interval lie below 0?"""
        return self.mean + self.half < 0

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """`12.3 ± 4.5`."""
        half = f" ± {scale * self.half:.{digits}f}" if np.isfinite(self.half) else ""
        return f"{scale * self.mean:.{digits}f}{half}"


def interval(values: Sequence[float]) -> Interval:
    """mean ± t s/√n of one number per seed, s with n − 1.

    Proof: tests/validation/test_paper.py::test_t_interval_by_scipy_and_by_hand
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Interval(float(x.mean()), np.inf, len(x))
    t = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1))
    return Interval(float(x.mean()), t * float(x.std(ddof=1)) / len(x) ** 0.5, len(x))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The interval of ours − theirs, seed by seed."""
    return interval(np.subtract(ours, theirs))
