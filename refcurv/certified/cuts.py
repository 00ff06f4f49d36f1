"""The cut and the edited weight of the real numbers: pairs that are proved kept or cut, and W'."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate, groupby
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import Balls, around_zero, chosen, exact, precision
from refcurv.algebra.eigen_enclosures import Spectrum, is_positive, norm
from refcurv.algebra.scaling import exponent
from refcurv.law.checks import Array, EmptyError

FINE: Final = 1024
"""Keys are counted in 2^-FINE of the largest.  Chosen: finer than 200 digits, 665 bits."""


def decided(lam: Balls, mu: Balls, rho: float, layer: str) -> tuple[Array, Array]:
    """Twice (O, I) bool: the pairs that are proved kept, and those that are proved cut.

    Definition
        Keys of the real numbers are λ_i μ_j, their target is ρ Σλ Σμ, without a rounding (SELECT).
        Each key lies between two bounds. Pair p is kept if all others whose upper bound is p's
        lower bound or more weigh less than the target: no others can come before p. It is cut if
        those whose lower bound is above p's upper bound weigh the target or more: they all come
        before p. Where neither holds the pair is undecided (ACCEPTABLE, of enclosures in the place
        of two solvers' errors).

    A key that is exactly 0 is cut: the others hold all mass. Bounds are whole numbers of 2^-FINE of
    the largest key, rounded outwards, so that sums and comparisons are exact. No two pairs whose
    bounds overlap are decided differently.

    Raises:
        EmptyError: the mass is 0, or not proved to be above it.

    Cost: two sorts of the O·I pairs that are not 0.
    Source: P6, P7; SELECT.
    Proof: tests/test_certified_cuts.py::test_the_cut_of_fractions_is_proved
    """
    kept, dropped = (np.full((len(lam), len(mu)), bool(yes)) for yes in (rho == 1, rho == 0))
    if rho in (0, 1):
        return kept, dropped
    target = exact(np.array(rho)) * lam.sum() * mu.sum()
    if not is_positive(target):
        raise EmptyError(_without_mass(layer, target))
    some = np.ix_(lam.most() > 0, mu.most() > 0)  # the others are exactly 0
    dropped[:] = True
    keys = lam[some[0]] * mu[some[1]]
    k = FINE - exponent(keys.most())
    low, high = (np.maximum(x, 0) for x in keys.whole(k))
    least, most = target.whole(k)
    least = max(least, 1)  # it is above 0, and less than one unit is none
    highs, lows = (sorted(x.reshape(-1).tolist()) for x in (high, low))
    below_high, below_low = ([0, *accumulate(x)] for x in (highs, lows))

    def others_weigh_less(low: int, high: int) -> bool:
        return bool(below_high[-1] - below_high[bisect_left(highs, low)] - high < least)

    def first_weigh_enough(high: int) -> bool:
        return bool(below_low[-1] - below_low[bisect_right(lows, high)] >= most)

    kept[some] = np.frompyfunc(others_weigh_less, 2, 1)(low, high).astype(bool)
    dropped[some] = np.frompyfunc(first_weigh_enough, 1, 1)(high).astype(bool)
    return kept, dropped


def _without_mass(layer: str, target: Balls) -> str:
    """What is wrong, and what to do."""
    out = "leave it out (rho={pattern: share} names the others)"
    if target.most() == 0:
        return f"certify: the curvature mass of {layer!r} is 0, no share can be taken: {out}."
    return (
        f"certify: with {precision():,} bits the curvature mass of {layer!r} is not proved to be "
        f"above 0. If its gradient is 0 by theory, {out}; if it is only small, ask for more digits."
    )


def edited(W: Array, G: Spectrum, A: Spectrum, mask: Array) -> Balls:
    """W' = Σ u_i u_iᵀ W v_j v_jᵀ over the pairs of the mask, enclosed (P8).

    Definition
        Rows of the mask with the same count c > 0 of pairs are a set R of neighbours. They give
        P_R W Q_c, with P_R the projector on their eigenvectors of G and Q_c that on the first c of
        A. The columns X have it nearly: it is T W Z with T = X_R X_Rᵀ and Z likewise. As ‖Q‖ <= 1
        and ‖T‖ <= 2, ‖P W Q − T W Z‖ <= ‖P − T‖ ‖W‖ + 2 ‖W‖ ‖Q − Z‖.

    A set that is not proved to be apart from the others, where the mask parts a cluster, has no
    bound. rho = 1 is W itself, and not for this function.

    Args:
        W: (O, I) float, exact.
        G: the spectrum of G (O, O).
        A: that of A (I, I).
        mask: (O, I) bool, a staircase.

    Cost: six products of matrices.
    Proof: tests/test_certified_cuts.py::test_the_edit_of_fractions_lies_in_its_balls
    """
    count = mask.sum(axis=1)
    if (np.diff(count) > 0).any() or (mask != (np.arange(len(A.values)) < count[:, None])).any():
        raise ValueError("edited: the mask is no staircase")
    weight = exact(W)
    C = chosen(mask, G.X.T @ weight @ A.X, 0)
    size, far, start = exact(np.array(norm(weight))), exact(np.array(0)), 0
    for c, rows in groupby(count.tolist()):
        stop = start + len(list(rows))
        if c:
            far = far + size * (_ball(G.far(start, stop)) + 2 * _ball(A.far(0, c)))
        start = stop
    found: Balls = G.X @ C @ A.X.T + around_zero(np.full(W.shape, far.most()))
    return found


def _ball(bound: float) -> Any:
    """A bound that may be infinite."""
    return around_zero(np.array(bound))
