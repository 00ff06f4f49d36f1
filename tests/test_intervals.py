"""evaluation/intervals.py: by SciPy, by sums over tails, and by how often they cover."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from refcurv.evaluation.intervals import bootstrap, paired, wilson
from refcurv.law.checks import DTypeError, EmptyError, NonFiniteError, RangeError, ShapeError


@given(st.integers(1, 400), st.data())
def test_wilson_is_scipys(n: int, data) -> None:
    k, confidence = data.draw(st.integers(0, n)), data.draw(st.sampled_from([0.5, 0.95, 0.999]))
    want = binomtest(k, n).proportion_ci(confidence, method="wilson")
    found = wilson(np.arange(n) < k, confidence)
    assert found == pytest.approx((want.low, want.high), abs=1e-12)
    assert 0 <= found[0] <= k / n <= found[1] <= 1


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_paired_is_the_sum_over_binomial_tails(b: int, c: int, same: int) -> None:
    if b + c + same == 0:
        return
    one = np.array([True] * b + [False] * c + [True] * same)
    other = np.array([False] * b + [True] * c + [True] * same)
    n = b + c
    tail = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(b - c))
    assert paired(one, other) == pytest.approx(tail / 2**n, rel=1e-12)
    assert paired(one, other) == paired(other, one)


def test_bootstrap_covers_as_often_as_it_says(monkeypatch) -> None:
    """Of 200 samples of 40 documents, the true ratio is in about 95 % of the intervals."""
    monkeypatch.setattr("refcurv.evaluation.intervals.RESAMPLES", 400)
    rng, inside = np.random.default_rng(0), 0
    for seed in range(200):
        count = rng.integers(5, 50, 40)
        total = count * rng.normal(2.0, 0.3, 40)
        low, high = bootstrap(total, count, seed=seed)
        inside += low <= 2.0 <= high
        assert low < total.sum() / count.sum() < high
    assert 0.88 <= inside / 200 <= 0.98


def test_bootstrap_of_equal_documents_is_a_point() -> None:
    assert bootstrap([6.0, 3.0], [2, 1]) == (3.0, 3.0)
    assert bootstrap([1.0, 5.0], [1, 1]) == bootstrap([1.0, 5.0], [1, 1]) == (1.0, 5.0)


def test_refusals() -> None:
    with pytest.raises(EmptyError):
        wilson(np.empty(0, bool))
    with pytest.raises(DTypeError):
        wilson([0.5])
    with pytest.raises(RangeError):
        wilson([True], confidence=1)
    with pytest.raises(ShapeError):
        paired([True], [True, False])
    with pytest.raises(ShapeError):
        bootstrap([1.0], [1, 2])
    with pytest.raises(NonFiniteError):
        bootstrap([np.nan], [1])
    with pytest.raises(RangeError):
        bootstrap([1.0], [0])
