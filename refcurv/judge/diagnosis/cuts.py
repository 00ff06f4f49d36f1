"""Which rule explains another mask or another edited weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.diagnosis.rules import others, products, ranked, share_of
from refcurv.judge.verdict import Comparison
from refcurv.law import tolerance
from refcurv.law.checks import Array

Reason = tuple[str | None, str]
"""(fault, words)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a mask or an edit was made from.

    Fields:
        basis: descending and not negative: theirs where the dump holds all of it, else ours.
        C: U_Gᵀ W U_A in that basis; ones where nobody knows W. Lambda: theirs, if there is one.
        rho: the declared share, or None.
        raw: (λ, μ) of theirs in the same order, perhaps negative; None where the basis is ours.
        wrong: the comparison of their basis that does not pass, or None.
    """

    basis: Eigenbasis
    C: Array
    Lambda: Array | None
    rho: float | None
    raw: tuple[Array, Array] | None
    wrong: Comparison | None


# ------------------------------------------------------------------ masks


def follows(made: Cut, mask: Array, wrong: int) -> bool:
    """Is it the law's cut of their own eigenvalues? `wrong`: pairs that are not as ours decide."""
    kept = int(mask.sum())
    share = share_of(made.basis, kept) if made.rho is None else made.rho
    return int((cut_mask(made.basis, share) ^ mask).sum()) <= _most(kept, wrong)


def _most(kept: int, wrong: int) -> int:
    """Pairs in which a mask may differ from that of a rule which explains it."""
    return min(max(1, kept // 1000), wrong - 1)


def of_mask(made: Cut, mask: Array, wrong: int, stairs: bool) -> Reason | None:
    """What explains a mask in which `wrong` pairs are not as the law decides.

    Args: mask, in the order of `made`; stairs: is it the law's cut at the share that it keeps?

    Proof: tests/test_judge_edits.py::test_a_mask_of_the_law_passes_and_others_are_named
    """
    kept = int(mask.sum())

    def same(other: Array | None) -> bool:
        return other is not None and int((other ^ mask).sum()) <= _most(kept, wrong)

    if same(_with_negative(made)):
        return "B67", "it is the cut in which their negative eigenvalues count as mass"
    if made.rho == 1 and _dropped(made.basis, mask) <= float32_sum(mask.size):
        return STOPPED
    if stairs and made.rho is not None:
        return at_another_share(made, made.rho, kept)
    masks = [(one, one.mask(made.basis, made.C, kept)) for one in others(mask.shape, made.Lambda)]
    best, nearest = min(masks, key=lambda pair: int((pair[1] ^ mask).sum()))
    return (best.fault, best.sentence) if same(nearest) else None


def _with_negative(made: Cut) -> Array | None:
    """The cut by their own eigenvalues as they are, where some are negative and rho is declared."""
    if made.raw is None or made.rho is None or min(float(x.min()) for x in made.raw) >= 0:
        return None
    mass = made.raw[0][:, None] * made.raw[1]
    sums = np.cumsum(-np.sort(-mass, axis=None))
    enough = np.flatnonzero(sums >= made.rho * sums[-1])
    return ranked(mass, int(enough[0]) + 1) if len(enough) else None


def _dropped(basis: Eigenbasis, mask: Array) -> float:
    """The share of all mass that a mask drops."""
    mass = products(basis)
    return float(mass[~mask].sum() / mass.sum())


def float32_sum(terms: int) -> float:
    """How far a sum of so many terms may be off in float32, relative to it; as `moment_budget`."""
    return tolerance.LAMBDA * math.sqrt(terms / 3) * ROUNDOFF["float32"]


STOPPED: Reason = (
    "B68",
    "rho is 1, and pairs that weigh nothing are dropped: the loop ended at the rounded sum",
)


def at_another_share(made: Cut, rho: float, kept: int) -> Reason:
    """What a staircase is that keeps another share than the declared one."""
    lam, mu = made.basis.lam, made.basis.mu
    if cut(np.sqrt(lam), np.sqrt(mu), rho).kept == kept:
        return "B74", "the mass of a pair is √(λ μ), and not λ μ"
    share = share_of(made.basis, kept)
    theirs = cut(lam, mu, share)
    high, low = theirs.mass / theirs.total, (theirs.mass - theirs.last) / theirs.total
    off = max(rho - high, low - rho)  # the law keeps as many for rho between low and high
    if not off <= float32_sum(len(lam) * len(mu)):
        return None, f"it is the law's cut at rho = {share:.6g}, and {rho:.6g} is declared"
    words = f"the share that it keeps is {off:.1g} off, the size of a sum in float32"
    return ("B69" if made.raw is not None and made.wrong is None else None), words


# ------------------------------------------------------------------ edited weights


def of_weight(made: Cut, W: Array, edited: Array, near: float) -> Reason | None:
    """What explains an edited weight; `near`: how well, relative to |W|.

    Proof:
        tests/test_judge_edits.py::test_an_edited_weight_of_the_law_passes_and_others_are_named
    """
    size, basis = float(norm(W)), made.basis
    D = basis.U_G.T @ edited @ basis.U_A
    for fault, words, other in _edits(made, W, edited, D):
        if float(norm(D - other)) / size <= near:
            return fault, words
    return None


def _edits(made: Cut, W: Array, edited: Array, D: Array) -> Iterator[tuple[str | None, str, Array]]:
    """(fault, words, the coefficients that it gives); without a share, each at about their |W'|.

    Args: D, the coefficients of theirs.
    """
    basis, C = made.basis, made.C
    if made.raw is not None and made.wrong is not None:
        share = share_of_weight(basis, C, edited) if made.rho is None else made.rho
        words = f"it is the law's edit in their own basis: {made.wrong.cause}"
        yield made.wrong.fault, words, C * cut_mask(basis, share)
    if made.rho == 1:
        yield *STOPPED, np.where(cut_mask(basis, 1 - float32_sum(C.size)), C, D)
    for other in others(C.shape, made.Lambda):
        for mask in other.near(basis, C, reached(edited)):
            yield other.fault, other.sentence, C * mask
    declared = [] if made.rho is None else [made.rho]
    for share in (share_of_weight(basis, C, edited), *declared):
        own = keep_pairs(W, basis, cut_mask(basis, share))
        text = "it is the law's edit, written column by column and read row by row"
        yield "B33", text, basis.U_G.T @ own.T.reshape(own.shape) @ basis.U_A
    if C.shape[0] == C.shape[1]:
        turned = basis.U_G.T @ W.T @ basis.U_A
        shares = [share_of_weight(basis, turned, edited), *declared]
        text = "the edit was made of Wᵀ, or A and G changed places in it, which is the same (O60)"
        for share in shares:
            other_W = keep_pairs(W.T, basis, cut_mask(basis, share)).T
            yield "B33", text, basis.U_G.T @ other_W @ basis.U_A
    if made.rho is not None:
        mask = cut_mask(basis, share_of_weight(basis, C, edited))
        yield *at_another_share(made, made.rho, int(mask.sum())), C * mask


def cut_mask(basis: Eigenbasis, rho: float) -> Array:
    """The law's mask (O, I) at rho."""
    return cut(basis.lam, basis.mu, rho).mask(len(basis.mu))


def share_of_weight(own: Eigenbasis, C: Array, edited: Array) -> float:
    """The rho at which |W'| is theirs, as nearly as pairs allow."""
    target, low, high = reached(edited), (0.0, 0), (1.0, C.size)
    for _ in range(50):
        if high[1] - low[1] <= 1:
            break
        middle = (low[0] + high[0]) / 2
        found = cut(own.lam, own.mu, middle)
        tried, size = (middle, found.kept), float(norm(C[found.mask(C.shape[1])]))
        low, high = (tried, high) if size < target else (low, tried)
    return share_of(own, high[1])


def reached(edited: Array) -> float:
    """|W'|, less what its rounding may be: the pairs that make up W' weigh at least that."""
    return float(norm(edited)) * (1 - 2.0**-20)
