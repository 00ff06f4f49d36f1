"""The law's cut against brute force, and its properties (O55-O59)."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from unittest import mock

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refcurv.algebra.staircase import cut, undecided
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing import kfac
from refcurv.editing.kfac import _acceptable
from refcurv.law import tolerance
from refcurv.law.checks import ConventionError, EmptyError, NonFiniteError, RangeError

spread = st.floats(0, 60)
RHO = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1 - 2**-53, 1e-300, 0.999999]))


@st.composite
def spectra(draw: st.DrawFn) -> np.ndarray:
    """Descending, >= 0, not all zero: decaying, near-tied, or small integers with zeros."""
    n = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["decaying", "tied", "integers"]))
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


PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


@given(st.permutations(PRIMES), st.integers(1, 15), st.floats(0, 1))
def test_O60_transposing_swaps_the_sides(mixed: list[int], n: int, share: float) -> None:
    """Of different primes no two products tie and no sum rounds; the target is no whole number."""
    lam, mu = (-np.sort(-np.array(side, float)) for side in (mixed[:n], mixed[n:]))
    total = int(lam.sum() * mu.sum())
    rho = (int(share * (total - 1)) + 0.5) / total
    one, two = cut(lam, mu, rho), cut(mu, lam, rho)
    assert 0 < one.kept == two.kept
    assert (one.mask(len(mu)) == two.mask(len(lam)).T).all()


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


# ------------------------------------------------------------------ what another may decide


def acceptable(lam: np.ndarray, mu: np.ndarray, rho: float) -> np.ndarray:
    """ACCEPTABLE as `edit` counts it, (O, I) bool: budgets, then the two staircases."""
    e_G, e_A = (tolerance.eigenvalues(len(x)) * np.linalg.norm(x) for x in (lam, mu))
    (O, I), (L, M) = (len(lam), len(mu)), (lam.sum(), mu.sum())
    slack = max(rho, 1 - rho) * (I**0.5 * L * e_A + O**0.5 * M * e_G + (O * I) ** 0.5 * e_A * e_G)
    sure, possible = undecided(lam, mu, rho, (np.full(O, e_G), np.full(I, e_A)), slack)
    got, j = cut(lam, mu, rho).counts, np.arange(I)
    assert (sure <= got).all()
    assert (got <= possible).all()
    one = Eigenbasis(np.eye(I), mu, np.eye(O), lam)
    assert _acceptable(one, rho) == (possible - sure).sum()
    return np.asarray((sure[:, None] <= j) & (j < possible[:, None]))


def moved(x: np.ndarray, worst: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another solver's values of the same directions: off by the whole budget, in 2-norm.

    Along `worst`, or at random: all, by one size, or two of them apart.
    """
    two = np.zeros(len(x))
    two[rng.permutation(len(x))[:2]] = (1.0, -1.0)[: len(x)]
    move = (worst, -worst, two, rng.normal(size=len(x)), rng.choice([-1.0, 1.0], len(x)))[
        rng.integers(5)
    ]
    size = tolerance.eigenvalues(len(x)) - 2 * tolerance.eps(np.float64)  # less a key's rounding
    length = float(np.linalg.norm(move)) or 1.0
    return np.maximum(x + move * (size * np.linalg.norm(x) / length), 0)


def kept(lam: np.ndarray, mu: np.ndarray, rho: float) -> np.ndarray:
    """SELECT on spectra in any order: each is put in order, and the mask taken back."""
    rows, columns = (np.argsort(-x, kind="stable") for x in (lam, mu))
    mask = np.empty((len(lam), len(mu)), bool)
    mask[np.ix_(rows, columns)] = cut(lam[rows], mu[columns], rho).mask(len(mu))
    return mask


@st.composite
def doubtful(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """Spectra with ties to within the budget, or whose mass at the cut is the target to within."""
    lam, mu = draw(spectra()), draw(spectra())
    width = tolerance.eigenvalues(max(len(lam), len(mu)))
    tied = draw(st.booleans())
    if tied:
        near = 1 - draw(st.floats(0, 3)) * width
        lam = -np.sort(-np.append(lam, lam[draw(st.integers(0, len(lam) - 1))] * near))
    keys = np.sort(np.outer(lam, mu).ravel())[::-1]
    keys = keys[keys > 0]
    k = draw(st.integers(0, len(keys) - 1))
    share = (keys[:k].sum() + keys[k] * (0.5 if tied else 0)) / keys.sum()
    rho = float(share) * (1 + draw(st.floats(-1, 1)) * (0 if tied else width))
    return lam, mu, min(max(rho, 1e-9), 1 - 1e-12)


@given(doubtful(), st.integers(0, 9999))
def test_every_pair_that_changes_side_is_acceptable(
    made: tuple[np.ndarray, np.ndarray, float], seed: int
) -> None:
    """By brute force: solvers that err by their whole budget decide no other pair otherwise."""
    lam, mu, rho = made
    allowed, ours = acceptable(lam, mu, rho), kept(lam, mu, rho)
    rng = np.random.default_rng(seed)
    for _ in range(30):
        some = kept(lam, mu, rho * (1 - 1e-9)) if rng.random() < 0.5 else ours
        # what moves the mass of that set, less the target, the furthest
        of_lam, of_mu = some @ mu - rho * mu.sum(), lam @ some - rho * lam.sum()
        other = kept(moved(lam, of_lam, rng), moved(mu, of_mu, rng), rho)
        assert not ((other != ours) & ~allowed).any()


def test_a_clear_cut_has_no_acceptable_pair() -> None:
    """300 generic cuts; a gap of 1 (all that is dropped has no curvature); both ends."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        lam, mu = (-np.sort(-np.exp(-6 * rng.random(n))) for n in rng.integers(2, 30, 2))
        assert not acceptable(lam, mu, rng.uniform(0.05, 0.95)).any()
    null = np.array([1.0, 0, 0])
    assert cut(null, np.ones(1), 0.9).gap == 1
    assert not acceptable(null, np.ones(1), 0.9).any()
    one = Eigenbasis(np.eye(3), np.ones(3), np.eye(3), np.ones(3))
    assert [_acceptable(one, rho) for rho in (0, 1)] == [0, 0]


def test_what_is_near_the_cut_is_acceptable_and_nothing_else() -> None:
    """A tie, of keys or of mass and target, counts to within the budget and not beyond it."""
    tied = acceptable(np.ones(3), np.array([4.0, 1, 1]), 0.75)  # 4 of 6 keys of 1 are dropped
    assert tied.tolist() == [[False, True, True]] * 3
    mu = np.array([4.0, 2, 1, 0.5, 0.5])
    for above, count in ((0, 2), (1e-14, 2), (1e-12, 0)):
        # 4 + 2 + 1 of 8 is the target, which another may miss: then either of the two tied is kept
        assert acceptable(np.ones(1), mu, 7 / 8 - above).sum() == count
    assert acceptable(np.ones(1), mu, 7 / 8 + 1e-14).sum() == 2
    assert acceptable(np.ones(1), mu, 7 / 8 + 1e-12).tolist() == [[0, 0, 0, 1, 1]]  # a tie


@pytest.mark.parametrize("power", [-500, 500])
def test_units_change_no_acceptable_pair(power: int) -> None:
    """Of keys that overflow or vanish too: λ μ is 2^±1000 here, and its mass more."""
    mu = np.array([4.0, 2, 1, 0.5, 0.5])
    one = Eigenbasis(np.eye(5), mu, np.eye(5), mu)
    far = Eigenbasis(np.eye(5), np.ldexp(mu, power), np.eye(5), np.ldexp(mu, power))
    assert _acceptable(far, 0.75) == _acceptable(one, 0.75) > 0
    lam = np.ldexp(mu, 2 * power)
    assert _acceptable(replace(far, lam=lam), 0.75) == _acceptable(one, 0.75)


def test_the_budget_of_a_key_is_one_that_solvers_can_use() -> None:
    """Two directions a little less than √2 e apart, which a solver exchanges; 5 e are clear."""
    e = (tolerance.eigenvalues(2) - 2 * tolerance.eps(np.float64)) * math.sqrt(2)
    for distance, either in ((0.0, True), (1.3 * e, True), (5 * e, False)):
        lam, one = np.array([1.0, 1 - distance]), np.ones(1)
        other = lam + np.array([-e, e]) / math.sqrt(2)
        if either and distance:
            assert (kept(lam, one, 0.4) != kept(other, one, 0.4)).all()
        assert acceptable(lam, one, 0.4).sum() == 2 * either
        assert acceptable(one, lam, 0.4).sum() == 2 * either
        sure, possible = undecided(lam, one, 0.4, (np.full(2, e), np.zeros(1)), 0.0)
        assert (possible - sure).tolist() == [either, either]


@pytest.mark.parametrize(("O", "I"), [(2, 50), (50, 2)])
@pytest.mark.parametrize("rho", [0.1, 0.9])
def test_the_slack_is_what_flat_spectra_can_move(O: int, I: int, rho: float) -> None:
    """All pairs, less the target, or no pair, less it: whichever of the two moves further."""
    one = Eigenbasis(np.eye(I), np.ones(I), np.eye(O), np.ones(O))
    with mock.patch.object(kfac, "undecided", return_value=(np.ones(1), np.ones(1))) as told:
        _acceptable(one, rho)
    *_, (e_G, e_A), slack = told.call_args.args
    # the whole budget e of a side, in 2-norm, spread over its n values
    of_G, of_A = tolerance.eigenvalues(O) * math.sqrt(O), tolerance.eigenvalues(I) * math.sqrt(I)
    assert e_G == pytest.approx(np.full(O, of_G), rel=1e-12)
    assert e_A == pytest.approx(np.full(I, of_A), rel=1e-12)
    lam, mu = (n + Fraction(e * math.sqrt(n)) for n, e in ((O, of_G), (I, of_A)))
    assert slack == pytest.approx(max(rho, 1 - rho) * float(lam * mu - O * I), rel=1e-12)


def test_the_budget_of_the_mass_is_one_that_solvers_can_use() -> None:
    """Half of 64 directions weigh a little less, or more, than the target: one more, or less."""
    n, k = 64, 32
    mu, one = np.linspace(2, 1, n), np.ones(1)
    e = (tolerance.eigenvalues(n) - 2 * tolerance.eps(np.float64)) * np.linalg.norm(mu)
    for sign in (-1, 1):
        for share, either in ((0.8, True), (8.0, False)):
            rho = (mu[:k].sum() + sign * share * e * math.sqrt(n) / 2) / mu.sum()
            move = (np.arange(n) < k) - rho
            other = mu + sign * e * move / np.linalg.norm(move)
            ours = kept(one, mu, rho)
            assert ours.sum() == k + (sign > 0)
            allowed = acceptable(one, mu, rho)
            assert allowed.sum() == either
            if either:
                assert (allowed == (ours != kept(one, other, rho))).all()
            assert (acceptable(mu, one, rho).T == allowed).all()


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
