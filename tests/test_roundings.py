"""How large the terms of a result are, against sums of squares by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sound import sound_model

from refcurv.algebra import shaken
from refcurv.algebra.shaken import SHAKE, Shaken, ShakenSums, Shakes
from refcurv.judge import bench, roundings


def size(result: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> float:
    """|terms| of a function of one parameter, by many runs."""

    def moved(n: int) -> np.ndarray:
        return np.asarray(result(roundings.shaken({"x": x}, [n])["x"]))

    here = np.asarray(result(x))
    return roundings.Runs(here, moved).size(400)


@pytest.mark.parametrize(
    ("result", "squares"),
    [
        # the difference and its rounding; y as it is read; the sum. x is in it twice, and cancels
        (lambda x: x[:1] + x[1:] - x[:1], 9 + 9 + 9 + 25),
        # the sum and its rounding; x and y as they are read, in two factors; their squares
        (lambda x: (x * x).sum(keepdims=True), 169 + 169 + 64 + 324 + 16 + 81),
        (np.negative, 4 + 9 + 4 + 9),  # rounds nothing
        (lambda x: np.tanh(x) * 0, 0),
    ],
    ids=["a sum that cancels", "squares", "an exact operation", "zeros"],
)
def test_sizes_are_the_root_of_the_sum_of_squares(
    result: Callable[[np.ndarray], np.ndarray], squares: float
) -> None:
    assert size(result, np.array([2.0, 3.0])) == pytest.approx(np.sqrt(squares), rel=0.1)


def test_the_two_parts_of_a_complex_number_are_shaken_apart() -> None:
    """Im z / z is 0 whatever z is multiplied by; but both of its terms are rounded."""

    def turned(x: np.ndarray) -> np.ndarray:
        z = 1 + 1e-30j * x
        return (z * 1.5 / z).imag

    assert size(turned, np.ones(1)) > 1e-30


def test_arrays_stay_shaken_through_everything_that_a_pass_does() -> None:
    x = roundings.shaken({"x": np.ones((2, 3))}, [0])["x"]
    assert type(x) is Shaken
    for y in (
        x[0], x.T, x.reshape(3, 2), x.real, x.copy(), np.where(x > 0, x, 0), np.exp(x), x @ x.T,
        np.concatenate([x, x]), x.sum(axis=0), x.mean(axis=-1), np.zeros_like(x), x * (1 + 1j),
        np.take_along_axis(x, np.zeros((2, 1), int), axis=1), np.asanyarray(x), 1 / x,
    ):  # fmt: skip
        assert type(y) is Shaken and y.shakes is x.shakes
    assert type(x > 0) is np.ndarray and type(np.isfinite(x)) is np.ndarray
    before, y = np.asarray(x).copy(), x.copy()
    y += 1
    assert type(y) is Shaken and (np.asarray(y) != before + 1).any()


def test_what_is_shaken_moves_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the shake moves gradients a sixteenth as far, of saturated heads too."""
    for seed in range(8):
        model, corpus = sound_model(seed)
        planned = bench.plan(model.config, corpus, 2**30)
        found = []
        for shake in (roundings.SHAKE, roundings.SHAKE / 16):
            with monkeypatch.context() as patch:
                patch.setattr(roundings, "SHAKE", shake)
                patch.setattr(shaken, "SHAKE", shake)
                made = bench.prepare(model.config, model.parameters, corpus, planned, 0)
                found.append(made.amplification)
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def added_at(x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x, shape=(1,))
    np.add.at(out, np.zeros(len(x), int), x)
    return out


@pytest.mark.parametrize(
    ("result", "size"),
    [
        (lambda x: x @ np.ones((2, 1)), 2),
        (lambda x: np.ones((1, 2)) @ x, 2),
        (lambda x: x.sum(keepdims=True), 2),
        (lambda x: x.mean(axis=-1, keepdims=True), 1),
        (added_at, 2),
        (lambda x: x + 1, 2),  # 2 and 0, each by itself
        (lambda x: ((x + 0j) @ (2j * np.ones((2, 1)))).imag, np.sqrt(16 + 2 * 4)),
        (lambda x: ((1j * x) @ (2 * np.ones((2, 1)))).imag, np.sqrt(16 + 2 * 4)),
        (lambda x: ((1j * x) @ (2j * np.ones((2, 1)))).real, np.sqrt(16 + 2 * 4)),
        (lambda x: (1j * x).sum(keepdims=True).imag, np.sqrt(4 + 2)),
    ],
    ids=["a product", "from the left", "a sum", "a mean", "a table", "no sum", "an imaginary part",
         "an imaginary part, of the left",
         "a real part", "an imaginary sum"],
)  # fmt: skip
def test_shaken_sums_move_by_the_size_of_their_terms(
    result: Callable[[np.ndarray], np.ndarray], size: float
) -> None:
    """1 − 1, of numbers that are exact themselves; complex ones are made, and shaken, before."""
    moves = []
    for n in range(400):
        x = np.array([1.0, -1.0]).view(ShakenSums)
        x.shakes = Shakes(np.random.default_rng(n))
        moves.append(np.asarray(result(x)) - np.asarray(result(np.array([1.0, -1.0]))))
        assert x.shakes.drawn
    assert np.sqrt(np.square(moves).sum() / 400) / SHAKE == pytest.approx(size, rel=0.1)
