"""Labels, rows, sampling and cross-entropy, each against its definition in words."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

from refcurv.law.checks import RangeError
from refcurv.model.loss import cross_entropy, draw_labels, reached, shift_labels, uniforms


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 13))
def test_uniforms_are_philox_by_hand(seed: int, draw: int, index: int, length: int) -> None:
    got = uniforms(seed, draw, index, length)
    assert got.tolist() == [oracles.uniform(seed, draw, index, t) for t in range(length)]


def test_philox_by_hand_matches_the_published_vector() -> None:
    """Known-answer test of Random123 for Philox4x64-10: all zeros, and all ones."""
    assert oracles.philox4x64([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C
    ones = oracles.philox4x64([oracles.MASK] * 4, [oracles.MASK] * 2)
    assert ones[0] == 0x87B092C3013FE90B


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True])
def test_seeds_outside_64_bits_are_refused(seed: object) -> None:
    with pytest.raises(RangeError, match="seed"):
        uniforms(seed, 0, 0, 3)  # type: ignore[arg-type]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(0.1, 50))
def test_labels_are_drawn_by_the_law(seed: int, vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(20, vocabulary)) * spread
    u = rng.random(20)
    u[:2] = 0, 1 - 2**-53
    want = [oracles.draw_label(z, x) for z, x in zip(logits, u, strict=True)]
    assert draw_labels(logits, u).tolist() == want


def test_a_uniform_that_rounds_up_to_the_total_draws_the_last_possible_label() -> None:
    logits = np.array([[0.0, 0.0, 0.0, -2000.0]])
    assert draw_labels(logits, np.array([1.0])).tolist() == [2]  # 1.0 stands for u·c = c


def test_drawn_labels_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    u = uniforms(3, 0, 0, 40_000)
    share = np.bincount(draw_labels(np.tile(logits, (len(u), 1)), u)) / len(u)
    sigma = np.sqrt(0.25 / len(u))
    assert np.abs(share - [0.5, 0.3, 0.2]).max() < 4 * sigma  # p < 1e-4, seed fixed


def test_sampling_depends_on_position_and_sequence_only() -> None:
    """O53: whatever the batch, sequence 7 gets the labels of sequence 7."""
    long = uniforms(5, 1, 7, 100)
    assert (uniforms(5, 1, 7, 10) == long[:10]).all()
    assert not (uniforms(5, 1, 8, 100) == long).any()
    assert not (uniforms(5, 2, 7, 100) == long).any()
    assert not (uniforms(6, 1, 7, 100) == long).any()


@given(cases())
def test_reached_rows_by_brute_force(one: Case) -> None:
    got = reached(one.label, one.real, one.segment)
    assert (got == oracles.reached(one.label, one.real, one.segment)).all()


def test_default_labels_by_hand() -> None:
    token = np.array([[5, 6, 7, 8, 9]])
    real = np.array([[True, True, True, True, False]])
    segment = np.array([[0, 0, 1, 1, 1]])
    assert shift_labels(token, real, segment).tolist() == [[6, -1, 8, -1, -1]]


def test_cross_entropy_by_hand() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75]]))
    nats, slope = cross_entropy(logits, np.array([0, 1, -1]))
    assert np.allclose(nats, [np.log(4), np.log(4 / 3), 0], rtol=1e-15)
    assert np.allclose(slope, [[-0.75, 0.75], [0.25, -0.25], [0, 0]], rtol=1e-15)


def test_cross_entropy_survives_huge_logits() -> None:
    nats, slope = cross_entropy(np.array([[1e4, -1e4]]), np.array([1]))
    assert nats.tolist() == [2e4]
    assert slope.tolist() == [[1, -1]]
