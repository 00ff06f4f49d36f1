"""Eigenvalues lie in their balls and subspaces within their angles, however X was found."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import flint
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import few
from test_balls import parts_of

from refcurv.algebra import eigen_enclosures
from refcurv.algebra.balls import Balls, around_zero, bits, exact
from refcurv.algebra.eigen_enclosures import Spectrum, enclose, refined


def holds(x: Balls, truth: Any) -> bool:
    """May the number be this one?"""
    *_, radius = x.split(4)
    if np.isinf(radius):
        return True
    parts, radius = parts_of(x)
    return abs(sum(parts) - truth) <= radius


# ------------------------------------------------------------------ matrices of known spectra


def rational(x: Any) -> Balls:
    """An array of fractions as balls."""
    made = np.empty(np.shape(x), object)
    fractions = (Fraction(one) for one in np.asarray(x, dtype=object).reshape(-1))
    made.reshape(-1)[:] = [flint.arb(flint.fmpq(*one.as_integer_ratio())) for one in fractions]
    return Balls(made)


def rotation(n: int, seed: int = 0) -> np.ndarray:
    """An orthogonal matrix of fractions: rotations by 3-4-5, and Hadamard's of four."""
    rng = np.random.default_rng(seed)
    Q = np.array([[Fraction(i == j) for j in range(n)] for i in range(n)])
    for i, j in (rng.permutation(n)[:2] for _ in range(2 if n > 1 else 0)):
        turn = np.array([[Fraction(3, 5), Fraction(4, 5)], [Fraction(-4, 5), Fraction(3, 5)]])
        Q[:, [i, j]] = Q[:, [i, j]] @ turn
    if n >= 4:
        h = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=object)
        four = rng.permutation(n)[:4]
        Q[:, four] = Q[:, four] @ (h * Fraction(1, 2))
    return Q


def known(values: list[Any], seed: int = 0) -> tuple[Balls, np.ndarray, list[Fraction]]:
    """Q diag(values) Qᵀ, Q, and the values, which descend."""
    d = [Fraction(x) for x in values]
    Q = rotation(len(d), seed)
    q = rational(Q)
    return q @ (rational(np.array(d)).reshape(-1, 1) * q.T), Q, d


TINY = Fraction(1, 10**9)
SPECTRA: dict[str, list[Any]] = {
    "one": [3],
    "apart": [5, 3, 1, Fraction(1, 7), -2],
    "a projector": [1, 1, 1, 0, 0, 0],
    "twice each": [2, 2, 1, 1, Fraction(1, 3), Fraction(1, 3)],
    "eight decades": [Fraction(1, 10**k) for k in range(9)],
    "below float64": [1, Fraction(1, 2), TINY, TINY**2 * 3, TINY**2 * 2, TINY**2, 0],
    "far below float64": [1, TINY**2 * 3, TINY**2 * 2, TINY * TINY * Fraction(2, 10**17)],
    "two that all but agree": [2, 1 + TINY * Fraction(1, 10**8), 1, Fraction(1, 2)],
    "nothing": [0, 0, 0],
}


def misses(
    A: Balls, truth: list[Any], X: Balls | None = None, made: Any = enclose, **k: Any
) -> bool:
    """Is an eigenvalue outside its ball?"""
    found = made(A, refined(A) if X is None else X, **k)
    return not all(holds(found.values[i], x) for i, x in enumerate(truth))


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_lie_in_their_balls(name: str) -> None:
    """Of fractions: thirds are no floats, so that A's own balls are wider than a point."""
    for precision, seed in ((100, 0), (260, 1)):
        with bits(precision):
            A, _, truth = known(SPECTRA[name], seed)
            assert not misses(A, truth)


@pytest.mark.parametrize("name", SPECTRA)
def test_steps_bring_the_digits_that_the_bits_have(name: str) -> None:
    """All but twenty of 260 bits, of the largest eigenvalue, also of what float64 cannot see."""
    with bits(260):
        A, _, truth = known(SPECTRA[name])
        radii = enclose(A, refined(A)).values.radii()
    assert radii.max() <= 2.0**-240 * float(max(map(abs, truth)))


def moment(seed: int, rows: int, n: int, decades: float = 0) -> np.ndarray:
    """Of rows of whole numbers, times powers of two: floats that hold it exactly."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, (rows, n)) * 2.0 ** -np.round(np.linspace(0, decades * 3.32, n))
    return x.T @ x


def truths(A: np.ndarray) -> list[Fraction]:
    """Sixty digits by mpmath's solver, as fractions, descending."""
    with mpmath.workdps(80):
        found = mpmath.eigsy(mpmath.matrix(A.tolist()), eigvals_only=True)
        return sorted((Fraction(mpmath.nstr(x, 70)) for x in found), reverse=True)


@few(10)
@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 7), st.sampled_from([0, 4]))
def test_eigenvalues_of_mpmath_lie_in_the_balls(seed: int, rows: int, n: int, decades: int) -> None:
    A = moment(seed, rows, n, decades)
    with bits(180):
        found = enclose(exact(A), refined(exact(A)), rank=rows)
        wide = found.values + around_zero(np.full(n, 1e-55 * max(1.0, A.max())))  # of the solver
        for i, x in enumerate(truths(A)):
            assert holds(wide[i], x)
        assert (found.values[rows:].most() == 0).all()


@pytest.mark.parametrize("decades", [14, 20, 26, pytest.param(40, marks=pytest.mark.slow)])
def test_eigenvalues_that_float64_takes_for_zeros_have_their_digits(decades: int) -> None:
    """Of graded rows, fewer than columns, whatever float64's eigenvectors are among them."""
    n, rank = 24, 16
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(rank, n)) * 10.0 ** np.linspace(0, -decades / 2, rank)[:, None]
        with bits(320):
            A = exact(rows).T @ exact(rows)
            found = enclose(A, refined(A), rank)
        some = found.values[:rank]
        assert (some.radii() < 1e-30 * some.rounded()).all()
        assert len(found.clusters) == rank + 1


def test_eigenvalues_that_are_near_by_way_of_others_are_turned_once() -> None:
    """The outer two are apart, and each is near the one between: one step finds all three."""
    A = exact(np.array([[0.0, 0, 1], [0, 2, 0], [1, 0, 4]]))
    with bits(200):
        begin = eigen_enclosures._straightened(A, exact(np.eye(3)))
        assert begin.near.tolist() == [[True, True, False], [True] * 3, [False, True, True]]
        after = eigen_enclosures._straightened(A, eigen_enclosures._bettered(begin))
    assert after.off < 1e-14


def test_hilberts_matrix() -> None:
    n = 6
    with bits(220):
        H = rational([[Fraction(1, i + j + 1) for j in range(n)] for i in range(n)])
        found = enclose(H, refined(H)).values + around_zero(np.full(n, 1e-55))
        with mpmath.workdps(80):
            near = mpmath.matrix(
                [[mpmath.mpf(1) / (i + j + 1) for j in range(n)] for i in range(n)]
            )
            want = sorted(mpmath.eigsy(near, eigvals_only=True), reverse=True)
            assert all(holds(found[i], Fraction(mpmath.nstr(x, 70))) for i, x in enumerate(want))
    assert found.radii().max() < 1e-54


@few(25)
@given(
    st.integers(0, 999),
    st.lists(st.integers(-20, 20), min_size=1, max_size=5),
    st.sampled_from([1.0, 1e-1, 1e-3, 1e-8]),
)
def test_columns_that_are_wrong_give_wide_balls_that_are_true(
    seed: int, values: list[int], size: float
) -> None:
    """Columns of noise, or good ones with noise; their midpoints are all that counts."""
    with bits(100):
        A, Q, truth = known(sorted(values, reverse=True), seed)
        noise = np.random.default_rng(seed).normal(size=Q.shape)
        X = exact(noise if size == 1 else Q.astype(float) + size * noise)
        assert not misses(A, truth, X)
        assert not misses(A, truth, X * (exact(np.array(1)) / 3 * 3))


def test_a_matrix_that_the_balls_hardly_know() -> None:
    """The true matrix lies anywhere in them; at its edge too."""
    with bits(100):
        for shift in (-1, 0, 1):
            A = exact(np.diag([3.0, 2.0, 2.0])) + around_zero(np.full((3, 3), 0.25))
            assert not misses(A, [3 + Fraction(shift, 4), *[2 + Fraction(shift, 4)] * 2])


@pytest.mark.parametrize("name", SPECTRA)
def test_more_bits_give_enclosures_inside(name: str) -> None:
    found = []
    for precision in (120, 240):
        with bits(precision):
            A, _, _ = known(SPECTRA[name])
            found.append(enclose(A, refined(A)).values)
    assert found[1].within(found[0]).all() or (found[0].most() == 0).all()


def test_permutations_and_rotations_change_no_eigenvalue() -> None:
    A = moment(3, 5, 6)
    with bits(160):
        values = enclose(exact(A), refined(exact(A))).values
        order = np.random.default_rng(0).permutation(6)
        moved = exact(A[np.ix_(order, order)])
        q = rational(rotation(6, 5))
        for other in (moved, q @ exact(A) @ q.T):
            found = enclose(other, refined(other)).values
            assert found.overlaps(values).all() and found.radii().max() < 1e-40 * A.max()


# ------------------------------------------------------------------ subspaces


def strays(A: Balls, Q: np.ndarray, X: Balls, made: Any = enclose) -> bool:
    """Is the projector on any set of neighbours further from X_S X_Sᵀ than is claimed?

    The 2-norm is at least the largest entry, and the Frobenius norm over the root of the rank.
    Or do columns of balls hold no basis of a cluster's subspace?
    """
    found: Spectrum = made(A, X)
    n = len(Q)
    for start, stop in found.clusters:
        q, v = Q[:, start:stop], found.vectors[:, start:stop]
        P, held = q @ q.T, v @ v.T
        if not all(holds(held[at], P[at]) for at in np.ndindex(n, n)):
            return True
    for start in range(n):
        for stop in range(start + 1, n + 1):
            own, q = found.X[:, start:stop], rational(Q[:, start:stop])
            off = q @ q.T - own @ own.T
            apart = max(off.least().max(), ((off * off).sum().sqrt() / n).least())
            if apart > found.far(start, stop):
                return True
    return False


@pytest.mark.parametrize("name", SPECTRA)
def test_subspaces_lie_within_their_angles(name: str) -> None:
    with bits(160):
        A, Q, truth = known(SPECTRA[name])
        good = refined(A)
        assert not strays(A, Q, good)
        noise = np.random.default_rng(1).normal(size=Q.shape)
        for size in (1e-9, 1e-3):
            assert not strays(A, Q, good + exact(size * noise))
        found = enclose(A, good)
        repeated = [i for i in range(1, len(truth)) if truth[i] == truth[i - 1]]
        for start, stop in found.clusters:
            assert found.far(start, stop) < 1e-12
            for middle in range(start + 1, stop):
                assert middle in repeated and found.far(start, middle) == np.inf
        assert sum(stop - start for start, stop in found.clusters) == len(truth)


@pytest.mark.parametrize(
    ("A", "square"), [([[1]], 0.1), ([[1]], 1.9), ([[0, 1], [1, 0]], 0.36), (np.eye(2), 2.4)]
)
def test_columns_of_another_length_are_as_far_as_is_said(A: Any, square: float) -> None:
    """Y = I, and X = √square I: nothing but lengths is wrong, and not by a little."""
    with bits(100):
        found = enclose(exact(np.array(A)), exact(np.sqrt(square) * np.eye(len(A))))
    off = A - square * np.diag(np.diag(A))
    assert found.error >= np.linalg.norm(off, 2) * (1 - 1e-12)
    assert found.slip >= abs(1 - square) * (1 - 1e-12)


# ------------------------------------------------------------------ planted


def planted(old: str, new: str) -> Any:
    """`enclose` of the module with one expression of its source changed."""
    source = inspect.getsource(eigen_enclosures)
    assert source.count(old) == 1, old
    module = ModuleType("planted_enclosures")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(source.replace(old, new), module.__dict__)
    return module.__dict__["enclose"]


def swap() -> tuple[Balls, list[Fraction]]:
    return exact(np.array([[0, 1], [1, 0]])), [Fraction(1), Fraction(-1)]


def grown() -> tuple[Balls, list[Fraction], Balls]:
    return exact(np.diag([2, 1])), [Fraction(2), Fraction(1)], exact(np.eye(2) * 1.0625)


def unsure() -> tuple[Balls, list[Fraction], Balls]:
    A = exact(np.diag([3, 2])) + around_zero(np.full((2, 2), 0.25))
    return A, [3 + Fraction(1, 4), 2 + Fraction(1, 4)], exact(np.eye(2))


PLANTED: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "the midpoint taken as exact": ("M, K = X.T @ (A @ X)", "M, K = X.T @ (A.midpoints() @ X)",
                                    unsure),
    "M's midpoints taken as exact": ("norm(M - _filled(D))", "norm(M.midpoints() - _filled(D))",
                                     unsure),
    "epsilon forgotten": ("(1 + around_zero(np.full(n, eps)))", "1", grown),
    "the norm without a row": ("norm(M - _filled(D))", "norm((M - _filled(D))[1:, 1:])",
                               lambda: (*swap(), exact(np.eye(2)))),
    "the norm forgotten": ("(D + around_zero(np.full(n, off)))", "D",
                           lambda: (*swap(), exact(np.eye(2)))),
    "ascending": ("midpoints().descending()", "midpoints().descending()[::-1]",
                  lambda: (exact(np.diag([1, 2])), [Fraction(2), Fraction(1)], exact(np.eye(2)))),
    "unsorted": ("midpoints().descending()", "midpoints().descending() * 0 + np.arange(n)",
                 lambda: (exact(np.diag([1, 2])), [Fraction(2), Fraction(1)], exact(np.eye(2)))),
    "a rank too low": ("values[rank:] = zeros((n - rank,))",
                       "values[rank - 1:] = zeros((n - rank + 1,))",
                       lambda: (exact(np.diag([2, 1, 0])), [Fraction(2), Fraction(1), Fraction(0)],
                                exact(np.eye(3)))),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_false_enclosure_is_caught(what: str) -> None:
    old, new, given_ = PLANTED[what]
    rank = {"rank": 2} if "rank" in what else {}
    with bits(100):
        A, truth, X = given_()
        assert not misses(A, truth, X, **rank)
        assert misses(A, truth, X, planted(old, new), **rank)


def test_a_rank_that_is_too_low_is_refused() -> None:
    """Rows counted once, of a sum over many passes, would make an eigenvalue 0 that is not."""
    with bits(100), pytest.raises(ValueError, match="more than 1 eigenvalue that are not 0"):
        enclose(exact(np.diag([2.0, 2.0**-60, 0])), exact(np.eye(3)), rank=1)


ANGLES: dict[str, tuple[str, str]] = {
    "no distance between X and Y": ("exact(np.array(self.slip))", "exact(np.array(0.0))"),
    "no gap": ("(exact(np.array(self.error)) / gap)", "exact(np.array(self.error))"),
    "the gap above alone": ("if stop < len(self.values):", "if False:"),
    "the gap below alone": ("if start > 0:", "if False:"),
    "vectors without their angle": ("1.5 * self.angle(start, stop)", "0.0"),
    "vectors without the distance of X from Y": (
        "(angle + around_zero(np.array(self.slip)))",
        "angle",
    ),
    "angles of columns that are exact": ("exact(np.array(angle)) +", ""),
}


@pytest.mark.parametrize("what", ANGLES)
def test_a_false_angle_is_caught(what: str) -> None:
    with bits(100):
        A, Q, _ = known([1, Fraction(63, 64), Fraction(1, 2), Fraction(1, 4)])
        q, noise = Q.astype(float), np.random.default_rng(1).normal(size=Q.shape)
        turn = np.eye(4)
        turn[:2, :2] = turn[2:, 2:] = [[4095 / 4097, -128 / 4097], [128 / 4097, 4095 / 4097]]
        alike, _, _ = known([1, 1, 1, 1])  # one cluster, which is at no angle to anything
        for X in (exact(q + 1e-4 * noise), exact(q * 1.03125), exact(q @ turn)):
            for one in (A, alike):
                assert not strays(one, Q, X)
                if strays(one, Q, X, planted(*ANGLES[what])):
                    return
    pytest.fail("not caught")
