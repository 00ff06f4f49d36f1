"""The law's cut against brute force, and its properties (O55-O59)."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refcurv.algebra.staircase import count_between, cut
from refcurv.law.checks import ConventionError, EmptyError, NonFiniteError, RangeError

spread = st.floats(0, 60)
RHO = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1 - 2**-53, 1e-300, 0.999999]))


@st.composite
def spectra(draw: st.DrawFn, ties: bool = True) -> np.ndarray:
    """Descending, >= 0, not all zero: decaying, near-tied, or small integers with zeros."""
    n = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["decaying", "tied", "integers"] if ties else ["decaying"]))
    if kind == "decaying":
        x = np.exp(-rng.random(n) * draw(spread))
    elif kind == "tied":
        x = 1 + rng.integers(0, 3, n) * 2.0**-52
    else:
        x = rng.integers(0, 4, n).astype(float)
        x[0] = 3
    return -np.sort(-x)


@given(spectra(), spectra(), RHO)
def test_cut_equals_brute_force(lam: np.ndarray, mu: np.ndarray, rho: float) -> None:
    assert cut(lam, mu, rho).counts.tolist() == oracles.selection(lam, mu, rho).tolist()


@given(spectra(), spectra(), RHO)
def test_O57_the_cut_is_a_staircase(lam: np.ndarray, mu: np.ndarray, rho: float) -> None:
    got = cut(lam, mu, rho)
    assert (np.diff(got.counts) <= 0).all()
    assert got.kept == got.counts.sum() == got.mask(len(mu)).sum()


@given(spectra(), spectra(), st.floats(0.001, 0.999))
def test_O58_coverage_and_minimality(lam: np.ndarray, mu: np.ndarray, rho: float) -> None:
    got = cut(lam, mu, rho)
    keys = np.outer(lam, mu)
    inside = got.mask(len(mu))
    slack = 1e-12 * keys.sum()
    assert keys[inside].sum() >= rho * keys.sum() - slack
    assert keys[inside].sum() - got.last < rho * keys.sum() + slack
    assert math.isclose(got.mass, keys[inside].sum(), rel_tol=1e-13)
    assert got.last == keys[inside].min()
    if not inside.all():
        assert got.first_out == keys[~inside].max() <= got.last
        assert math.isclose(got.gap, 1 - got.first_out / got.last, abs_tol=1e-15)


@given(spectra(), spectra(), RHO, RHO)
def test_O55_cuts_are_nested(lam: np.ndarray, mu: np.ndarray, one: float, two: float) -> None:
    small, large = cut(lam, mu, min(one, two)), cut(lam, mu, max(one, two))
    assert (small.counts <= large.counts).all()


POWERS = st.one_of(st.integers(-500, 500), st.sampled_from([-500, 0, 500]))


@given(spectra(), spectra(), st.floats(1e-6, 1), POWERS, POWERS)
def test_O59_powers_of_two_change_no_pair(
    lam: np.ndarray, mu: np.ndarray, rho: float, a: int, b: int
) -> None:
    """Whatever the units of A and G: the same pairs and shares, and masses in those units."""
    lam, mu = lam / lam[0], mu / mu[0]
    want, got = cut(lam, mu, rho), cut(lam * 2.0**a, mu * 2.0**b, rho)
    assert got.counts.tolist() == want.counts.tolist()
    assert math.ldexp(want.mass, a + b) == got.mass
    assert math.ldexp(want.total, a + b) == got.total
    assert math.ldexp(want.last, a + b) == got.last
    assert want.gap == got.gap or (math.isnan(want.gap) and math.isnan(got.gap))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (-500, -500), (100, -1000), (-1000, 100)])
def test_keys_below_the_normal_numbers_are_told_apart(a: int, b: int) -> None:
    """2^-30 (1 + 2^-50) against 2^-30: at 2^-1000 both would be the same subnormal number."""
    lam, mu = np.array([1, 2.0**-20 * (1 + 2.0**-50)]), np.array([1, 2.0**-10, 2.0**-30])
    rho = 1 - 1.5 * 2.0**-30
    assert cut(lam * 2.0**a, mu * 2.0**b, rho).counts.tolist() == [2, 2]


@given(spectra(ties=False), spectra(ties=False), st.floats(0.01, 0.99))
def test_O60_transposing_swaps_the_sides(lam: np.ndarray, mu: np.ndarray, rho: float) -> None:
    """Without ties at the cut, and away from a mass that rounding decides."""
    one, two = cut(lam, mu, rho), cut(mu, lam, rho)
    if one.kept == two.kept and one.gap > 1e-9:
        assert (one.mask(len(mu)) == two.mask(len(lam)).T).all()
    assert abs(one.kept - two.kept) <= 1


def test_O56_the_ends_by_definition() -> None:
    lam, mu = np.array([2.0, 1.0, 0.0]), np.array([1.0, 0.0])
    assert cut(lam, mu, 1).counts.tolist() == [2, 2, 2]  # even null directions
    assert cut(lam, mu, 0).counts.tolist() == [0, 0, 0]
    assert cut(lam, mu, 1 - 2**-53).counts.tolist() == [1, 1, 0]


def test_ties_are_taken_in_row_major_order() -> None:
    got = cut(np.ones(3), np.ones(4), 0.5)
    assert got.counts.tolist() == [4, 2, 0]
    assert got.gap == 0


def test_O62_a_rectangle_of_the_same_mass_is_never_smaller() -> None:
    rng = np.random.default_rng(0)
    lam, mu = (-np.sort(-np.exp(-6 * rng.random(n))) for n in (12, 15))
    for rho in (0.3, 0.6, 0.9):
        got = cut(lam, mu, rho)
        best = min(
            r * s
            for r in range(1, 13)
            for s in range(1, 16)
            if lam[:r].sum() * mu[:s].sum() >= rho * lam.sum() * mu.sum()
        )
        assert got.kept <= best


def test_large_spectra_are_cut_exactly() -> None:
    """512 x 384 with heavy tails: as a full sort of the products decides."""
    rng = np.random.default_rng(1)
    lam, mu = (-np.sort(-(np.arange(1, n + 1) ** -a * np.exp(0.1 * rng.normal(size=n))))
               for n, a in ((512, 1.0), (384, 0.5)))  # fmt: skip
    for rho in (0.1, 0.6, 0.9, 0.999):
        got = cut(lam, mu, rho)
        keys = np.sort(np.outer(lam, mu).ravel())[::-1]
        n = int(np.searchsorted(np.cumsum(keys), rho * lam.sum() * mu.sum())) + 1
        assert abs(got.kept - n) <= 1  # the naive cumulative sum itself rounds
        assert got.last == keys[got.kept - 1]


def test_count_between() -> None:
    lam, mu = np.array([2.0, 1.0]), np.array([3.0, 2.0, 1.0])
    assert count_between(lam, mu, 2, 4) == 4  # 2·2, 2·1, 1·3, 1·2
    assert count_between(lam, mu, 7, 9) == 0


@pytest.mark.parametrize(
    ("lam", "mu", "rho", "error", "says"),
    [
        ([1.0, 2.0], [1.0], 0.5, ConventionError, "descending"),
        ([1.0, -1.0], [1.0], 0.5, ConventionError, "descending and >= 0"),
        ([0.0], [1.0], 0.5, EmptyError, "mass is 0"),
        ([np.nan], [1.0], 0.5, NonFiniteError, "nan"),
        ([1.0], [1.0], 1.5, RangeError, r"rho must lie in \[0, 1\]"),
        ([1.0], [1.0], float("nan"), RangeError, "rho"),
        ([1.0], [1.0], "much", RangeError, "rho must be a number"),
        ([1e200], [1e200], 0.5, ConventionError, "overflow"),
        ([1e308, 1e308], [1.0], 0.5, ConventionError, "overflow"),
        ([1e-200], [1e-200], 0.5, ConventionError, "underflow"),
        ([np.inf], [1.0], 0.5, NonFiniteError, "inf"),
        ([], [1.0], 0.5, ConventionError, "at least one"),
    ],
)
def test_bad_spectra(lam: list, mu: list, rho: object, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        cut(np.array(lam), np.array(mu), rho, "blocks.0.mlp.up")  # type: ignore[arg-type]
