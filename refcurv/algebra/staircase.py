"""The law's cut (SELECT): which products λ_i μ_j make up a share of their total mass.

Both spectra descend. So the first n pairs in key order always form a staircase (a Young diagram):
row i keeps its first c_i columns, and c_i never grows with i. A cut is then O numbers, and its mass
is a sum over rows.

The threshold is found by bisecting its bit pattern: floats >= 0 are in the order of their bits.
A key is below 4, whose bits are 0x401 · 2^52, a number below 2^63. So there are at most 63
halvings, each a walk of O + I steps. That is exact. Sorting all pairs would take O·I·log(O·I).

All of it is done on 2^-a λ and 2^-b μ, whose largest entries lie in [1, 2). No product of these
that weighs anything leaves the range of float64, whatever the units of A and G are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refcurv.algebra import kernels
from refcurv.algebra.scaling import exponent, shifted
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    require_finite,
    require_range,
)

_SMALLEST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Staircase:
    """A cut through the pairs (i, j) of two descending spectra.

    Fields:
        counts: (O,) int64, pairs kept in row i: (i, j) is kept if j < counts[i].
        kept: how many pairs are kept.
        mass: their mass by the law, and total: the mass of all pairs.
        last, first_out: key of the last pair kept and of the first one dropped (NaN if none).
        gap: (last − first_out) / last, how far apart these two are; NaN if one is missing.
    """

    counts: Array
    kept: int
    mass: float
    total: float
    last: float
    first_out: float
    gap: float

    def mask(self, columns: int) -> Array:
        """(O, columns) bool."""
        return np.asarray(np.arange(columns) < self.counts[:, None])


def cut(lam: Array, mu: Array, rho: float, name: str = "cut") -> Staircase:
    """The fewest first pairs, by descending fl(λ_i μ_j), whose mass reaches rho of the total.

    Args:
        lam: (O,) float64, descending, >= 0.
        mu: (I,) float64, likewise.
        rho: share of the mass, in [0, 1]; 0 keeps nothing and 1 everything, by definition.
        name: who is being cut, for messages.

    Raises:
        RangeError: rho outside [0, 1].
        ConventionError: a spectrum that is not descending or not >= 0; a total that overflows, or
        a largest product below the normal numbers.
        EmptyError: no mass to take a share of.

    Cost: O((O + I)·63) time, O(O + I) memory; about a millisecond at 4096 x 11008.
    Source: P6, P7; SELECT.
    Proof: tests/test_staircase.py::test_cut_equals_brute_force,
        ::test_O59_powers_of_two_change_no_pair
    """
    rho = require_range(name, "rho", rho, 0, 1)
    lam, mu = _spectrum(lam, f"{name}: lam"), _spectrum(mu, f"{name}: mu")
    if lam[0] == 0 or mu[0] == 0:
        raise EmptyError(
            f"{name}: the curvature mass is 0, so there is no share to take. Were all rows masked, "
            "or is the layer's gradient zero by theory?"
        )
    a, b = exponent(lam), exponent(mu)
    lam, mu = shifted(lam, -a), shifted(mu, -b)
    prefix = _prefix(mu)
    if rho in (0, 1):
        counts = np.full(len(lam), len(mu) if rho else 0, np.int64)
    else:
        target = (rho * math.fsum(lam)) * math.fsum(mu)
        counts = _counts(lam, mu, prefix, target)
    return _staircase(lam, mu, prefix, counts, (a + b, name))


def _counts(lam: Array, mu: Array, prefix: Array, target: float) -> Array:
    """Bisect the threshold on its bits, then share out the pairs tied at it in row-major order."""
    count = np.empty(len(lam), np.int64)

    def at_least(bits: int) -> Array:
        kernels.count_at_least(lam, mu, float(np.int64(bits).view(np.float64)), count)
        return count

    low, high = 0, int(np.float64(lam[0] * mu[0]).view(np.int64)) + 1
    if not _reaches(lam, prefix, at_least(low), target):
        return np.full(len(lam), len(mu), np.int64)  # rounding: even all pairs fall short
    while high - low > 1:
        middle = (low + high) // 2
        if _reaches(lam, prefix, at_least(middle), target):
            low = middle
        else:
            high = middle
    above = at_least(low + 1).copy()
    tied = at_least(low) - above
    before = np.cumsum(tied) - tied
    few, enough = 0, int(tied.sum())
    while enough - few > 1:
        middle = (few + enough) // 2
        if _reaches(lam, prefix, above + np.clip(middle - before, 0, tied), target):
            enough = middle
        else:
            few = middle
    return np.asarray(above + np.clip(enough - before, 0, tied))


def _reaches(lam: Array, prefix: Array, count: Array, target: float) -> bool:
    """Is fsum_i fl(λ_i · P[c_i]) >= target? A nearly exact sum decides unless it is too close.

    `high` and fsum both round the exact sum, up to n·2⁻¹⁰⁶ (`kernels.prefix_sums`). So they are
    equal or neighbours. A neighbour of `high` lies at most 2 spacings of the target away, unless
    `high` is at least twice the target. 2 spacings would suffice; 4 leave a factor of 2.
    """
    high, _ = kernels.staircase_mass(lam, prefix, count)
    if abs(high - target) > 4 * np.spacing(target):
        return bool(high > target)
    return math.fsum(lam * prefix[count]) >= target


def _prefix(mu: Array) -> Array:
    """P[n] = the correctly rounded sum of mu[:n], n = 0 .. I.

    `high` rounds high + low, and the exact sum is high + low up to n·2⁻¹⁰⁶ (`kernels.prefix_sums`).
    It could round to the neighbour only where |low| is that close to half of the gap to it. There
    math.fsum decides, ties included. 2⁻¹⁰⁰ leaves a factor of 64, and costs a few more calls.
    """
    high, low = np.empty(len(mu) + 1), np.empty(len(mu) + 1)
    kernels.prefix_sums(mu, high, low)
    toward = np.where(low < 0, 0.0, np.inf)
    with np.errstate(under="ignore"):  # whatever the caller chose
        half = np.abs(np.nextafter(high, toward) - high) / 2
    doubtful = np.abs(np.abs(low) - half) <= len(mu) * 2.0**-100 * high
    for n in np.flatnonzero(doubtful & (high > 0)):
        high[n] = math.fsum(mu[:n])
    return high


def _staircase(
    lam: Array, mu: Array, prefix: Array, counts: Array, unit: tuple[int, str]
) -> Staircase:
    """The record, with keys and masses multiplied by 2^k; `unit` is (k, who)."""
    k, name = unit
    inside, outside = counts > 0, counts < len(mu)
    last = (lam[inside] * mu[counts[inside] - 1]).min() if inside.any() else math.nan
    first_out = (lam[outside] * mu[counts[outside]]).max() if outside.any() else math.nan
    gap = float((last - first_out) / last) if last > 0 else math.nan
    counts.flags.writeable = False
    total, most = math.fsum(lam) * math.fsum(mu), lam[0] * mu[0]
    sizes = shifted([math.fsum(lam * prefix[counts]), total, last, first_out, most], k).tolist()
    for wrong, says in ((sizes[1] == math.inf, "over"), (sizes[4] < _SMALLEST, "under")):
        if wrong:
            raise ConventionError(f"{name}: the products of lam and mu {says}flow; rescale A or G.")
    mass, total, last, first_out, _ = sizes
    return Staircase(counts, int(counts.sum()), mass, total, last, first_out, gap)


def undecided(
    lam: Array, mu: Array, rho: float, errors: tuple[Array, Array], slack: float
) -> tuple[Array, Array]:
    """The pairs that slightly different spectra may decide otherwise: between two staircases.

    Definition
        least and greatest: the keys (λ_i − e_i)₊(μ_j − e_j)₊ and (λ_i + e_i)(μ_j + e_j).
        p is surely kept if the pairs q with greatest(q) >= least(p), without p itself, weigh less
        than the target − slack: in no order does enough come before p.
        p is surely dropped if the pairs q with least(q) > greatest(p) weigh at least the target +
        slack: in every order enough comes before p.

    Args:
        lam: (O,) as `cut` takes it, of total mass > 0.
        mu: (I,) likewise.
        rho: 0 < rho < 1.
        errors: e of each λ_i (O,) and each μ_j (I,), >= 0; λ − e and μ − e descend where positive.
        slack: by how much the mass of any set of pairs, less the target, may move. Rounding is
            added to it: see the comment.

    Returns:
        Counts per row, twice (O,): (i, j) is surely kept if j < sure[i], surely dropped if
        j >= possible[i], and acceptable between them.

    Cost: as `cut`.
    Source: ACCEPTABLE.
    Proof: tests/test_staircase.py::test_every_pair_that_changes_side_is_acceptable
    """
    prefix = np.concatenate([[0.0], np.cumsum(mu)])
    total = float(lam.sum()) * float(mu.sum())
    target = rho * total
    # Roundings, each of at most u · total. SELECT has 7: P, its product with λ and fsum in the
    # mass, two sums and two products in the target. Two programs have 14. The mass here has
    # O + I − 1. The 3 that remain are chosen: NumPy's sums in the target may take some 50. These
    # are small beside (16 (O + I) + 4) u · total, which the solvers' budgets put into `slack`.
    slack += tolerance.gamma(len(lam) + len(mu) + 16, np.float64) * total
    # above `top` no key and no slack: neither condition below can hold
    least = [np.maximum(x - e, 0) for x, e in zip((lam, mu), errors, strict=True)]
    greatest = [x + e for x, e in zip((lam, mu), errors, strict=True)]
    top = 2 * max(float(greatest[0][0] * greatest[1][0]), slack)

    def above(spectra: list[Array], key: float) -> Array:
        count = np.empty(len(lam), np.int64)
        kernels.count_at_least(spectra[0], spectra[1], key, count)
        return count

    def others_may_reach(key: float) -> bool:
        return float(lam @ prefix[above(greatest, key)]) - key + slack >= target

    def first_must_reach(key: float) -> bool:
        return float(lam @ prefix[above(least, _next(key))]) - slack >= target

    sure = above(least, _next(_largest(others_may_reach, top)))
    if not first_must_reach(0.0):
        return sure, np.full(len(lam), len(mu), np.int64)
    return sure, above(greatest, _next(_largest(first_must_reach, top)))


def _largest(holds: Callable[[float], bool], top: float) -> float:
    """The largest float below `top` at which `holds`. It holds at 0; once false it stays false."""
    low, high = 0, int(np.float64(top).view(np.int64))
    while high - low > 1:
        middle = (low + high) // 2
        if holds(float(np.int64(middle).view(np.float64))):
            low = middle
        else:
            high = middle
    return float(np.int64(low).view(np.float64))


def _next(key: float) -> float:
    return math.nextafter(key, math.inf)


def _spectrum(x: Array, what: str) -> Array:
    x = np.ascontiguousarray(x, dtype=np.float64)
    require_finite("cut", what, x)
    if x.ndim != 1 or not len(x):
        raise ConventionError(f"{what} must be a vector with at least one entry; got {x.shape}.")
    if (x < 0).any() or (x[1:] > x[:-1]).any():
        raise ConventionError(
            f"{what} must be descending and >= 0 (ORDER, NEGATIVE). "
            "eigh ascends: was the order left as it came?"
        )
    return x
