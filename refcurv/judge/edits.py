"""Edited weights of another program: are they the law's edit? Else `diagnosis.cuts` says whose.

An edited weight does not say which share rho it was cut at. Where nobody declares it, rho is the
one at which our own edit keeps as much of the weight. Where the dump holds their eigenvectors and
mask too, the weight may be no more than what these make of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.bases import Before
from refcurv.judge.compare import Bounds, said
from refcurv.judge.diagnosis.cuts import cut_mask, of_weight, share_of_weight
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import known, solver_budget
from refcurv.judge.masks import NO_MASS, made_from
from refcurv.judge.verdict import FAIL, LEFT_OUT, PASS, UNDECIDED, Comparison
from refcurv.law.checks import Array


def compare_weight(
    bounds: Bounds,
    theirs: Theirs,
    own: Eigenbasis,
    W: Array,
    rho: float | None,
    before: Before,
    masked: Comparison | None,
) -> Comparison:
    """Their edited weight beside our edit of the same weight (P8).

    Definition: the error is |W' theirs − W' ours| over |W|. The budget is what it moves by if A and
    G move by their budgets in random directions, four times the largest of RUNS, and the rounding
    of what is stored.

    Args: W, the weight before the edit; rho, None where nobody declares it; masked, of their mask.

    Proof: tests/test_judge_edits.py::test_an_edited_weight_of_the_law_passes_and_others_are_named
    """
    edited, size = theirs.W, float(norm(W))
    assert edited is not None
    trouble = _unfit(bounds, edited, W, own, rho)
    if trouble is not None:
        return trouble
    C = own.U_G.T @ W @ own.U_A
    share = share_of_weight(own, C, edited) if rho is None else rho
    mask = cut_mask(own, share)
    ours = W if share == 1 else keep_pairs(W, own, mask)
    error = float(norm(edited - ours)) / size
    noise = _Noise(bounds, own, W, share, C, mask, ours)
    text = f"W' is not the law's edit at rho = {share:.4g}"
    unknown = 0 * bounds.drawing.norm  # NaN where nobody knows
    found = bounds.judged("W", error, text, budget_of=noise.budget, drawing=unknown)
    sharp = (found.budget or 0.0) <= UNSHARP
    same = error <= 16 * ROUNDOFF[bounds.case.arithmetic.stored or "float64"]
    if found.verdict != FAIL and (sharp or same):
        return found
    made = made_from(bounds, theirs, own, W, rho, before)
    if masked is not None and _follows(bounds, theirs, before, W):
        return _as_made(found, before, masked)
    near = max(1e-6, min(found.budget or 0.0, 1e-3))  # an unsharp cut is no excuse
    reason = of_weight(made, W, edited, near if sharp else 1e-6)
    if reason is not None:
        return replace(found, verdict=FAIL, fault=reason[0], cause=reason[1])
    if found.verdict == FAIL or sharp or error <= noise.budget("float64") / 100:
        return found
    return replace(found, verdict=UNDECIDED, cause=_UNSHARP)


def _follows(bounds: Bounds, theirs: Theirs, before: Before, W: Array) -> bool:
    """Is their W' what their own eigenvectors and mask make of W?"""
    mask, basis, arithmetic = theirs.mask, before.basis, bounds.case.arithmetic
    if mask is None or basis is None or mask.shape != W.shape:
        return False
    off = float(norm(theirs.W - keep_pairs(W, basis, mask.astype(bool)))) / float(norm(W))
    return off <= solver_budget(max(W.shape), arithmetic.filled(arithmetic.stored or "float64"))


def _as_made(found: Comparison, before: Before, masked: Comparison) -> Comparison:
    """A weight that follows from their basis and mask has no fault but theirs."""
    bad = [one for one in (masked, before.wrong) if one and one.verdict not in (PASS, LEFT_OUT)]
    bad.sort(key=lambda one: (one.verdict != FAIL, one.fault is None))
    words = "it is what their own eigenvectors and mask make of W"
    if not bad:
        return replace(found, verdict=PASS, cause=f"{words}, which pass")
    first = bad[0]
    cause = f"{words}: {first.cause}"
    return replace(found, verdict=first.verdict, fault=first.fault, cause=cause)


def _unfit(
    bounds: Bounds, edited: Array, W: Array, own: Eigenbasis, rho: float | None
) -> Comparison | None:
    """What is to be said where there is nothing to compare."""
    layer, size = bounds.layer, float(norm(W))
    if edited.shape != W.shape:
        return said(layer, "W", FAIL, f"W is {edited.shape}; ours is {W.shape}")
    if not np.isfinite(edited).all():
        return said(layer, "W", FAIL, "W is not finite everywhere")
    if edited.any() and not W.any():
        return said(layer, "W", FAIL, "W is 0 before the edit, and theirs is not")
    stored = ROUNDOFF[bounds.case.arithmetic.stored or "float64"]
    if rho != 1 and float(norm(edited - W)) <= 2 * stored * size:
        return said(layer, "W", LEFT_OUT, "this weight was not edited")
    massless = not (own.lam.any() and own.mu.any())
    return said(layer, "W", LEFT_OUT, NO_MASS) if massless else None


UNSHARP = 0.05
"""Chosen: where rounding moves an edit by more of |W|, the edit is not judged."""

_UNSHARP = "the cut lies among pairs that rounding orders; declare rho, or take another one"

RUNS = 2
"""Random directions in which A and G are moved."""

ORDERS = 16
"""Random errors of the eigenvalues alone. Of two pairs of one key either may be kept: that all of
these decide as we do, and theirs does not, has odds of 2^-16."""


class _Noise:
    """What an edit moves by when A and G move by their budgets; computed once for each dtype.

    C, mask and edited are those of our own edit of W.
    """

    def __init__(
        self,
        bounds: Bounds,
        own: Eigenbasis,
        W: Array,
        rho: float,
        C: Array,
        mask: Array,
        edited: Array,
    ) -> None:
        self._bounds, self._own, self._W, self._rho = bounds, own, W, rho
        self._C, self._mask, self._edited = C, mask, edited
        self._known: dict[str, float] = {}

    def budget(self, dtype: str) -> float:
        """Relative to |W|, if undeclared parts have this dtype."""
        if dtype not in self._known:
            filled = self._bounds.case.arithmetic.filled(dtype)
            moved = max(self._moved(dtype, seed) for seed in range(RUNS))
            moved = max(moved, *(self._reordered(dtype, seed) for seed in range(ORDERS)))
            self._known[dtype] = 4 * moved + 4 * ROUNDOFF[str(filled.stored)]
        return self._known[dtype]

    def _moved(self, dtype: str, seed: int) -> float:
        W, own, rng = self._W, self._own, np.random.default_rng(seed)
        sides = []
        for side, U, values in (("A", own.U_A, own.mu), ("G", own.U_G, own.lam)):
            share = self._share(dtype, side)
            E = rng.normal(size=U.shape)
            E = E + E.T
            M = (U * values) @ U.T + E * (share * float(norm(values)) / float(norm(E)))
            moved, vectors = np.linalg.eigh(M)
            sides.append((vectors[:, ::-1], np.maximum(moved[::-1], 0)))
        (U_A, mu), (U_G, lam) = sides
        turned = Eigenbasis(U_A, mu, U_G, lam)
        other = keep_pairs(W, turned, cut(lam, mu, self._rho).mask(W.shape[1]))
        return float(norm(self._edited - other)) / float(norm(W))

    def _reordered(self, dtype: str, seed: int) -> float:
        """What the edit moves by if eigenvalues move, each by its share of the budget."""
        rng, W = np.random.default_rng(seed), self._W
        spectra = [
            x + rng.normal(size=len(x)) * self._share(dtype, side) * float(norm(x)) / len(x) ** 0.5
            for side, x in (("G", self._own.lam), ("A", self._own.mu))
        ]
        lam, mu = (np.maximum(x, 0) for x in spectra)
        orders = [np.argsort(-x, kind="stable") for x in (lam, mu)]
        mask = np.zeros(W.shape, dtype=bool)
        mask[np.ix_(*orders)] = cut(lam[orders[0]], mu[orders[1]], self._rho).mask(W.shape[1])
        return float(norm(self._C[mask ^ self._mask])) / float(norm(W))

    def _share(self, dtype: str, side: str) -> float:
        """How far A or G may be off, relative to its norm: sums, solver and drawing."""
        case, layer = self._bounds.case, self._bounds.layer
        size = self._W.shape["GA".index(side)]
        drawn = known(self._bounds.drawing.norm) if side == "G" else 0.0
        solver = solver_budget(size, case.arithmetic.filled(dtype))
        return case.budget(layer, dtype, side) + solver + drawn
