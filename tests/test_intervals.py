"""evaluation/intervals.py: by SciPy, by sums over tails, and by how often they cover."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from strategies import config, random_parameters

import refcurv as rc
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


def test_an_evaluations_intervals_are_by_its_items() -> None:
    """Of items right or wrong, not of their tokens; of a text by its documents, with their lengths.

    And p is of this model against the baseline, item by item.
    """
    made = config(vocabulary=5)
    model = rc.Model(made, random_parameters(made, 0))
    other = model.with_parameters({"head.weight": -model.parameters["head.weight"]})
    token = np.random.default_rng(0).integers(0, 5, (9, 8)).astype(np.int32)
    length = np.array([8, 3, 5, 8, 4, 6, 7, 3, 8])
    token[:7] = np.concatenate([token[:7, :2], rc.greedy(model, token[:7, :2], 6)], axis=1)
    token[7:, 2] = (rc.greedy(model, token[7:, :2], 1)[:, 0] + 1) % 5  # two of nine are wrong
    every = {kind: rc.Population(token, np.full(9, 2), length, kind, "test")
             for kind in ("text", "recite", "answer")}  # fmt: skip
    table = rc.evaluate(model, rc.Corpus(token, populations=every), baseline=other)
    found = {row.name: row for row in table.rows}
    want = binomtest(7, 9).proportion_ci(0.95, method="wilson")
    for kind in ("recite", "answer"):
        assert found[kind].interval == pytest.approx((want.low, want.high), abs=1e-12)
        right = found[kind].before["strict" if kind == "recite" else "accuracy"]
        assert right == 0 and found[kind].p == paired(np.arange(9) < 7, np.zeros(9, bool)) < 0.02
    nats = []
    for n in range(9):
        one = {"text": rc.Population(token[n : n + 1], [2], length[n : n + 1], "text", "test")}
        row = rc.evaluate(model, rc.Corpus(token, populations=one)).rows[0]
        nats.append(np.log(row.after["perplexity"]) * (length[n] - 2))
    want = np.exp(bootstrap(nats, length - 2))
    assert found["text"].interval == pytest.approx(tuple(want), rel=1e-12)
    assert len({*nats}) == 9


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
