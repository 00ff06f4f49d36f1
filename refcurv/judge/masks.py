"""Masks of another program: is it the law's cut? `diagnosis.cuts` finds out whose rule it is else.

A mask does not say which share rho it was cut at. Where nobody declares it, rho is the one at which
the law keeps as many pairs.
"""

from __future__ import annotations

import math

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.algebra.staircase import undecided
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.judge.bases import Before, near_one
from refcurv.judge.compare import HOW_MUCH_DRAWING, Bounds, said
from refcurv.judge.diagnosis.cuts import Cut, Reason, follows, of_mask
from refcurv.judge.diagnosis.rules import share_of
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import known, solver_budget
from refcurv.judge.verdict import FAIL, LEFT_OUT, PASS, UNDECIDED, Comparison
from refcurv.law.checks import Array
from refcurv.law.words import number_of


def compare_mask(
    bounds: Bounds,
    theirs: Theirs,
    own: Eigenbasis,
    W: Array | None,
    rho: float | None,
    before: Before,
) -> Comparison:
    """Their pairs beside those of the law's cut at rho (SELECT, ACCEPTABLE).

    Their eigenvalues order their mask where the dump has them; else it is taken to be in ours. A
    pair whose key lies within budget of the cut may be decided either way.

    Args: rho, None where nobody declares it: then it is the one that keeps as many.

    Proof: tests/test_judge_edits.py::test_a_mask_of_the_law_passes_and_others_are_named
    """
    mask, layer = theirs.mask, bounds.layer
    assert mask is not None
    trouble = _unfit(layer, theirs, mask, own, rho)
    if trouble is not None:
        return trouble
    orders = _orders(theirs, own)
    mask = mask.astype(bool)[np.ix_(*orders)]
    kept, most = int(mask.sum()), mask.size / 2
    share = share_of(own, kept) if rho is None else rho
    wrong, free = _disputed(bounds, own, share, mask)
    if not wrong and free > most:
        return said(layer, "mask", UNDECIDED, "errors within budget decide most of its pairs")
    if not wrong:
        text = f"the law's cut at rho = {share:.6g}, up to pairs that rounding decides"
        return Comparison(layer, "mask", 0.0, 0.0, PASS, None, text)
    made = made_from(bounds, theirs, own, W, rho, before)
    if made.raw is not None and follows(made, mask, wrong):
        return _as_spectra(layer, wrong / max(kept, 1), before.wrong)
    stairs = not _disputed(bounds, own, share_of(own, kept), mask)[0]
    return _another(bounds, mask, wrong, of_mask(made, mask, wrong, stairs))


def _another(bounds: Bounds, mask: Array, wrong: int, reason: Reason | None) -> Comparison:
    """A mask that is not the law's, with what explains it."""
    kept = int(mask.sum())
    verdict = FAIL
    steps = (mask[:, 1:] & ~mask[:, :-1]).any() or (mask[1:] & ~mask[:-1]).any()
    every = number_of(mask.size, "pair")
    text = f"{wrong} of {every} are not as the law decides; the mask, of {kept}, is "
    text += "no staircase" if steps else "a staircase all the same"
    if reason is None and math.isnan(bounds.drawing.norm):
        verdict, text = UNDECIDED, HOW_MUCH_DRAWING
    fault, cause = reason or (None, text)
    return Comparison(bounds.layer, "mask", wrong / max(kept, 1), 0.0, verdict, fault, cause)


def _as_spectra(layer: str, error: float, wrong: Comparison | None) -> Comparison:
    """A mask that is the law's cut of their own eigenvalues has no fault but theirs."""
    words = "it is the law's cut of their own eigenvalues"
    if wrong is None:
        return Comparison(layer, "mask", error, 0.0, PASS, None, f"{words}, which pass")
    cause = f"{words}: {wrong.cause}"
    return Comparison(layer, "mask", error, 0.0, wrong.verdict, wrong.fault, cause)


def _orders(theirs: Theirs, own: Eigenbasis) -> list[Array]:
    """Their rows and columns by descending eigenvalue, as far as theirs tells; else as ours."""
    return [
        np.arange(len(x)) if v is None else np.argsort(-v, kind="stable")
        for x, v in ((own.lam, theirs.lam), (own.mu, theirs.mu))
    ]


def made_from(
    bounds: Bounds,
    theirs: Theirs,
    own: Eigenbasis,
    W: Array | None,
    rho: float | None,
    before: Before,
) -> Cut:
    """What their mask and edit were made from: their own basis where the dump holds all of it.

    Of their eigenvalues those that rounding makes negative are 0 (NEGATIVE).
    """
    basis, raw = own, None
    rows, columns = _orders(theirs, own)
    if before.basis is not None:
        one = before.basis
        lam, mu = (_cleaned(bounds, x) for x in (one.lam[rows], one.mu[columns]))
        if lam[0] > 0 and mu[0] > 0:
            raw, turned = (lam, mu), (one.U_A[:, columns], one.U_G[:, rows])
            basis = near_one(
                Eigenbasis(turned[0], np.maximum(mu, 0), turned[1], np.maximum(lam, 0))
            )
    C = np.ones((len(own.lam), len(own.mu))) if W is None else basis.U_G.T @ W @ basis.U_A
    L = theirs.Lambda
    Lambda = None if L is None or L.shape != C.shape else L[np.ix_(rows, columns)]
    return Cut(basis, C, Lambda, rho, raw, before.wrong)


def _cleaned(bounds: Bounds, values: Array) -> Array:
    """Descending eigenvalues near 1, without what rounding makes negative."""
    arithmetic = bounds.case.arithmetic
    budget = solver_budget(len(values), arithmetic.filled(arithmetic.stored or "float64"))
    values = shifted(values, -exponent(values))
    return np.where((values < 0) & (values >= -budget * float(norm(values))), 0.0, values)


def _unfit(
    layer: str, theirs: Theirs, mask: Array, own: Eigenbasis, rho: float | None
) -> Comparison | None:
    """What is to be said where there is nothing to compare."""
    if mask.shape != (len(own.lam), len(own.mu)):
        text = f"the mask is {mask.shape}; ours is {(len(own.lam), len(own.mu))}"
        return said(layer, "mask", FAIL, text)
    for values, ours in ((theirs.lam, own.lam), (theirs.mu, own.mu)):
        if values is not None and (values.shape != ours.shape or not np.isfinite(values).all()):
            return said(layer, "mask", FAIL, "the eigenvalues that order it are no spectrum of it")
    if not (own.lam.any() and own.mu.any()):
        return said(layer, "mask", LEFT_OUT, NO_MASS)
    if rho is None and (mask.all() or not mask.any()):
        text = "everything is kept" if mask.all() else "nothing is kept"
        return said(layer, "mask", LEFT_OUT, text)
    return None


def _disputed(bounds: Bounds, own: Eigenbasis, rho: float, mask: Array) -> tuple[int, int]:
    """How many pairs are not as the law decides, and how many errors within budget decide.

    The mass of a set of pairs, less the target, moves by at most Σ |λ'_i μ'_j − λ_i μ_j|, for the
    pairs in it have the weight 1 − rho and the others −rho.
    """
    if rho in (0, 1):
        return int((mask != bool(rho)).sum()), 0
    case, level = bounds.case, bounds.case.arithmetic.stored or "float64"
    filled = case.arithmetic.filled(level)
    spectra = [("G", own.lam, bounds.drawing.norm), ("A", own.mu, 0.0)]
    errors, moved = [], 1.0
    for side, spectrum, drawn in spectra:
        share = case.budget(bounds.layer, level, side)
        relative = share + solver_budget(len(spectrum), filled) + known(drawn)
        # by Hoffman and Wielandt, each one and the root of the sum of squares of all
        error = relative * float(norm(spectrum))
        errors.append(np.full(len(spectrum), error))
        moved *= 1 + error * math.sqrt(len(spectrum)) / float(spectrum.sum())
    total = float(own.lam.sum()) * float(own.mu.sum())
    sure, possible = undecided(own.lam, own.mu, rho, (errors[0], errors[1]), (moved - 1) * total)
    column = np.arange(mask.shape[1])
    wrong = (column < sure[:, None]) & ~mask | (column >= possible[:, None]) & mask
    return int(wrong.sum()), int((possible - sure).sum())


NO_MASS = "A or G of this layer is 0: there is no curvature to take a share of"
