"""How sure a share or a mean of items is, and whether two models differ on the same items."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtri

from refcurv.law.checks import (
    Array,
    EmptyError,
    RangeError,
    ShapeError,
    as_array,
    require_dtype,
    require_finite,
    require_range,
)
from refcurv.law.words import number_of

RESAMPLES = 10_000
"""Chosen: the ends of a 95 % interval then move by a 50th of its width from seed to seed."""

MOST_DRAWN = 2**20
"""Chosen: counts that exist at one time, 8 MiB; no draw depends on it."""


def wilson(right: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, from items that are right or wrong.

    Args:
        right: (N,) bool, N >= 1; items are taken as independent.
        confidence: in (0, 1).

    Returns:
        (low, high) in [0, 1]; it holds the share, also of 0 and of N right.

    Raises:
        EmptyError: no items. DTypeError: they are not bool. RangeError: confidence.

    Source: Wilson 1927.
    Proof:  tests/test_intervals.py::test_wilson_is_scipys
    """
    right_N = _flags("wilson", "right", right)
    _require_confidence("wilson", confidence)
    n, p = len(right_N), float(right_N.mean())
    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    middle, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    low, high = ((middle + end * half) / (1 + z2 / n) for end in (-1, 1))
    return min(max(low, 0.0), p), max(min(high, 1.0), p)


def bootstrap(
    total: ArrayLike, count: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of Σ total / Σ count, by drawing documents again.

    Args:
        total: (N,) sums of each document, such as its nats.
        count: (N,) what they are sums over, such as its tokens; > 0 in all.
        confidence: in (0, 1).
        seed: of the draws: RESAMPLES of N documents each, with replacement.

    Returns:
        (low, high), in the unit of total / count; exp of both are the ends of a perplexity's.

    Raises:
        EmptyError, ShapeError, DTypeError, NonFiniteError, RangeError: arguments that are not this.

    Cost: O(RESAMPLES N) time; memory of MOST_DRAWN counts, or of N.
    Source: Efron 1979.
    Proof:  tests/test_intervals.py::test_bootstrap_covers_as_often_as_it_says
    """
    total_N, count_N = (_numbers(what, x) for what, x in (("total", total), ("count", count)))
    if total_N.ndim != 1 or total_N.shape != count_N.shape:
        raise ShapeError(f"bootstrap: total is {total_N.shape}, count {count_N.shape}, not (N,).")
    if not len(total_N):
        raise EmptyError("bootstrap: there is no document to draw.")
    for what, x in (("total", total_N), ("count", count_N)):
        require_finite("bootstrap", what, x)
    if not count_N.sum() > 0 or (count_N < 0).any():
        raise RangeError("bootstrap: counts must be >= 0 and not all 0.")
    _require_confidence("bootstrap", confidence)
    random = np.random.default_rng(seed)
    times_N = np.full(len(total_N), 1 / len(total_N))
    pairs = np.stack([total_N, count_N], axis=1)
    sums, step = np.empty((RESAMPLES, 2)), max(1, MOST_DRAWN // len(total_N))
    for begin in range(0, RESAMPLES, step):
        some = min(step, RESAMPLES - begin)
        sums[begin : begin + some] = random.multinomial(len(total_N), times_N, some) @ pairs
    above_R, below_R = sums[sums[:, 1] > 0].T
    ratio_R = above_R / below_R
    edge = (1 - confidence) / 2
    low, high = np.quantile(ratio_R, (edge, 1 - edge))
    return float(low), float(high)


def _numbers(what: str, x: ArrayLike) -> Array:
    array = as_array("bootstrap", what, x, "(N,)")
    require_dtype("bootstrap", what, array, "fiub", "real numbers")
    return array.astype(np.float64)


def paired(one: ArrayLike, other: ArrayLike) -> float:
    """The p of two models' being equally often right, from the same items (McNemar's exact test).

    Definition
        b = #{one right, other wrong}, c = #{one wrong, other right}
        p = P(|X − (b + c)/2| >= |b − c|/2), X binomial of b + c items with share 1/2

    Args:
        one: (N,) bool, right or wrong.
        other: (N,) bool, the same items by the other model.

    Returns:
        p in (0, 1]; 1 where they differ on no item.

    Raises:
        EmptyError, DTypeError: as `wilson`. ShapeError: not as many.

    Source: McNemar 1947.
    Proof:  tests/test_intervals.py::test_paired_is_the_sum_over_binomial_tails
    """
    one_N, other_N = _flags("paired", "one", one), _flags("paired", "other", other)
    if one_N.shape != other_N.shape:
        some = number_of(len(one_N), "item")
        raise ShapeError(f"paired: {some} of one model, {len(other_N)} of the other.")
    b, c = int((one_N & ~other_N).sum()), int((~one_N & other_N).sum())
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5))) if b + c else 1.0


def _flags(who: str, what: str, x: ArrayLike) -> Array:
    array = as_array(who, what, x, "(N,)")
    if array.ndim != 1:
        raise ShapeError(f"{who}: {what} must be (N,), a flag for each item; got {array.shape}.")
    if not array.size:
        raise EmptyError(f"{who}: {what} has no items.")
    require_dtype(who, what, array, "b", "flags (bool)")
    return array


def _require_confidence(who: str, confidence: float) -> None:
    if not 0 < require_range(who, "confidence", confidence, 0, 1) < 1:
        raise RangeError(f"{who}: confidence must lie between 0 and 1; got {confidence!r}.")
