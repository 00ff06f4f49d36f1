"""Masks and edited weights of another program: is it the law's cut, and if not, whose rule is it?

A mask or an edited weight does not say which share rho it was cut at. Where nobody declares it, rho
is the one at which our own edit keeps as many pairs, or as much of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.algebra.staircase import cut, undecided
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.editing.projection import keep_pairs
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.bases import solver_budget
from refcurv.judge.compare import HOW_MUCH_DRAWING, Bounds, said
from refcurv.judge.dump import Theirs
from refcurv.judge.verdict import FAIL, LEFT_OUT, PASS, UNDECIDED, Comparison
from refcurv.law.checks import Array

Rule = Callable[[Eigenbasis, Array, int], Array]
"""The mask (O, I) of another rule that keeps about as many pairs: (basis, C, kept)."""


@dataclass(frozen=True, slots=True)
class Other:
    """Another way to cut: the fault that it is, what it does, its mask."""

    fault: str
    sentence: str
    mask: Rule


def _ranked(key: Array, kept: int) -> Array:
    """The `kept` pairs of largest key."""
    mask = np.zeros(key.size, dtype=bool)
    mask[np.argsort(-key, axis=None, kind="stable")[:kept]] = True
    return np.asarray(mask.reshape(key.shape))


def _marginal(basis: Eigenbasis, _: Array, kept: int) -> Array:
    """The rectangle of one share for each side that keeps nearest to `kept` pairs."""
    shares = [np.cumsum(x) / x.sum() for x in (basis.lam, basis.mu)]
    best = min(
        np.unique(np.concatenate(shares)),
        key=lambda rho: abs(math.prod(int(np.searchsorted(s, rho)) + 1 for s in shares) - kept),
    )
    rows, columns = (np.arange(len(s)) <= np.searchsorted(s, best) for s in shares)
    return np.asarray(rows[:, None] & columns)


def _pairs(basis: Eigenbasis) -> Array:
    return np.asarray(basis.lam[:, None] * basis.mu)


OTHERS = (
    Other(
        "B65",
        "ascending eigenvalues were taken for descending: the flattest pairs are kept",
        lambda b, _, kept: _ranked(-_pairs(b), kept),
    ),
    Other("B73", "a share of each side was kept, a rectangle, and no share of pairs", _marginal),
    Other(
        "B74",
        "pairs are ranked by the curvature of the outputs alone",
        lambda b, _, kept: _ranked(np.repeat(b.lam[:, None], len(b.mu), axis=1), kept),
    ),
    Other(
        "B74",
        "pairs are ranked by the curvature of the inputs alone",
        lambda b, _, kept: _ranked(np.repeat(b.mu[None], len(b.lam), axis=0), kept),
    ),
    Other(
        "B74",
        "pairs are ranked by λ μ C², the damage of each, and not by λ μ",
        lambda b, C, kept: _ranked(_pairs(b) * C**2, kept),
    ),
    Other(
        "B74",
        "pairs are ranked by the size of the coefficient, C², and not by λ μ",
        lambda _, C, kept: _ranked(C**2, kept),
    ),
)


def compare_mask(bounds: Bounds, theirs: Theirs, own: Eigenbasis, W: Array | None) -> Comparison:
    """Their pairs beside those of the law's cut that keeps as many (SELECT, ACCEPTABLE).

    Their eigenvalues order their mask where the dump has them; else it is taken to be in ours. A
    pair whose key lies within budget of the cut may be decided either way.

    Proof: tests/test_judge_edits.py::test_a_mask_of_the_law_passes_and_others_are_named
    """
    mask, layer = theirs.mask, bounds.layer
    assert mask is not None
    trouble = _unfit_mask(layer, theirs, mask, own)
    if trouble is not None:
        return trouble
    orders = [
        np.arange(len(x)) if v is None else np.argsort(-v, kind="stable")
        for x, v in ((own.lam, theirs.lam), (own.mu, theirs.mu))
    ]
    mask = mask.astype(bool)[np.ix_(*orders)]
    kept = int(mask.sum())
    rho = _share_of(own, kept)
    wrong, free = _disputed(bounds, own, rho, mask)
    if not wrong and free > mask.size / 2:
        return said(layer, "mask", UNDECIDED, "errors within budget decide most of its pairs")
    if not wrong:
        text = f"the law's cut at rho = {rho:.6g}, up to pairs that rounding decides"
        return Comparison(layer, "mask", 0.0, 0.0, PASS, None, text)
    C = np.ones_like(_pairs(own)) if W is None else own.U_G.T @ W @ own.U_A
    for other in OTHERS:
        if int((other.mask(own, C, kept) ^ mask).sum()) <= max(1, kept // 1000):
            return Comparison(layer, "mask", wrong / kept, 0.0, FAIL, other.fault, other.sentence)
    steps = (mask[:, 1:] & ~mask[:, :-1]).any() or (mask[1:] & ~mask[:-1]).any()
    if not bounds.drawing.known:
        return Comparison(layer, "mask", wrong / kept, 0.0, UNDECIDED, None, HOW_MUCH_DRAWING)
    text = f"{wrong} of {kept} pairs are not those of the law's cut; the mask is "
    text += "no staircase" if steps else "a staircase all the same"
    return Comparison(layer, "mask", wrong / kept, 0.0, FAIL, None, text)


def _unfit_mask(layer: str, theirs: Theirs, mask: Array, own: Eigenbasis) -> Comparison | None:
    """What is to be said where there is nothing to compare."""
    if mask.shape != (len(own.lam), len(own.mu)):
        text = f"the mask is {mask.shape}; ours is {(len(own.lam), len(own.mu))}"
        return said(layer, "mask", FAIL, text)
    for values, ours in ((theirs.lam, own.lam), (theirs.mu, own.mu)):
        if values is not None and (values.shape != ours.shape or not np.isfinite(values).all()):
            return said(layer, "mask", FAIL, "the eigenvalues that order it are no spectrum of it")
    if not (own.lam.any() and own.mu.any()):
        return said(layer, "mask", LEFT_OUT, _NO_MASS)
    if mask.all() or not mask.any():
        text = "everything is kept" if mask.all() else "nothing is kept"
        return said(layer, "mask", LEFT_OUT, text)
    return None


def _share_of(own: Eigenbasis, kept: int) -> float:
    """The rho in the middle of those at which the law keeps `kept` pairs, or nearly so many."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cut(own.lam, own.mu, middle).kept < kept:
            low = middle
        else:
            high = middle
    top = 1.0
    for _ in range(60):
        middle = (high + top) / 2
        if cut(own.lam, own.mu, middle).kept <= kept:
            high = middle
        else:
            top = middle
    return (low + high) / 2


def _disputed(bounds: Bounds, own: Eigenbasis, rho: float, mask: Array) -> tuple[int, int]:
    """How many pairs are not as the law decides, and how many errors within budget decide.

    The mass of a set of pairs, less the target, moves by at most Σ |λ'_i μ'_j − λ_i μ_j|, for the
    pairs in it have the weight 1 − rho and the others −rho.
    """
    case, level = bounds.case, bounds.case.arithmetic.stored or "float64"
    filled = case.arithmetic.filled(level)
    spectra = [("G", own.lam, bounds.drawing.norm), ("A", own.mu, 0.0)]
    errors, moved = [], 1.0
    for side, spectrum, drawn in spectra:
        share = case.budget(bounds.layer, level, side)
        relative = share + solver_budget(len(spectrum), filled) + _known(drawn)
        # by Hoffman and Wielandt, each one and the root of the sum of squares of all
        error = relative * float(norm(spectrum))
        errors.append(np.full(len(spectrum), error))
        moved *= 1 + error * math.sqrt(len(spectrum)) / float(spectrum.sum())
    total = float(own.lam.sum()) * float(own.mu.sum())
    sure, possible = undecided(own.lam, own.mu, rho, (errors[0], errors[1]), (moved - 1) * total)
    column = np.arange(mask.shape[1])
    wrong = (column < sure[:, None]) & ~mask | (column >= possible[:, None]) & mask
    return int(wrong.sum()), int((possible - sure).sum())


# ------------------------------------------------------------------ edited weights


def compare_weight(
    bounds: Bounds, edited: Array, own: Eigenbasis, W: Array, rho: float | None
) -> Comparison:
    """Their edited weight beside our edit of the same weight (P8).

    Definition: the error is |W' theirs − W' ours| over |W|. The budget is what it moves by if A and
    G move by their budgets in random directions, four times the largest of RUNS, and the rounding
    of what is stored.

    Args: W, the weight before the edit; rho, None where nobody declares it.

    Proof: tests/test_judge_edits.py::test_an_edited_weight_of_the_law_passes_and_others_are_named
    """
    layer, size = bounds.layer, float(norm(W))
    trouble = _unfit(bounds, edited, W)
    if trouble is not None:
        return trouble
    if not (own.lam.any() and own.mu.any()):
        return said(layer, "W", LEFT_OUT, _NO_MASS)
    C = own.U_G.T @ W @ own.U_A
    share = _share_of_weight(own, C, edited) if rho is None else rho
    mask = cut(own.lam, own.mu, share).mask(W.shape[1])
    ours = keep_pairs(W, own, mask)
    error = float(norm(edited - ours)) / size
    noise = _Noise(bounds, own, W, share, C, mask, ours)
    text = f"W' is not the law's edit at rho = {share:.4g}"
    unknown = 0 * bounds.drawing.norm  # NaN where nobody knows
    found = bounds.judged("W", error, text, budget_of=noise.budget, drawing=unknown)
    sharp = (found.budget or 0.0) <= UNSHARP
    same = error <= 16 * ROUNDOFF[bounds.case.arithmetic.stored or "float64"]
    if found.verdict != FAIL and (sharp or same):
        return found
    near = 1e-3 if sharp else 1e-6  # an unsharp cut is no excuse for another rule
    for fault, sentence, other in _otherwise(own, C, W, edited):
        if float(norm(edited - other)) / size <= near:
            return Comparison(layer, "W", error, found.budget, FAIL, fault, sentence)
    if found.verdict == FAIL or sharp or error <= noise.budget("float64") / 100:
        return found
    return replace(found, verdict=UNDECIDED, cause=_UNSHARP)


def _unfit(bounds: Bounds, edited: Array, W: Array) -> Comparison | None:
    """What is to be said where there is nothing to compare."""
    layer, size = bounds.layer, float(norm(W))
    if edited.shape != W.shape:
        return said(layer, "W", FAIL, f"W is {edited.shape}; ours is {W.shape}")
    if not np.isfinite(edited).all():
        return said(layer, "W", FAIL, "W is not finite everywhere")
    if edited.any() and not W.any():
        return said(layer, "W", FAIL, "W is 0 before the edit, and theirs is not")
    stored = ROUNDOFF[bounds.case.arithmetic.stored or "float64"]
    if float(norm(edited - W)) <= 2 * stored * size:
        return said(layer, "W", LEFT_OUT, "this weight was not edited")
    return None


_NO_MASS = "A or G of this layer is 0: there is no curvature to take a share of"


def _known(drawn: float) -> float:
    return 0.0 if math.isnan(drawn) else drawn


UNSHARP = 0.05
"""Chosen: where rounding moves an edit by more of |W|, the edit is not judged."""

_UNSHARP = "the cut lies among pairs that rounding orders; declare rho, or take another one"


def _share_of_weight(own: Eigenbasis, C: Array, edited: Array) -> float:
    """The rho at which |W'| is theirs, as nearly as pairs allow."""
    target, low, high = _reached(edited), 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        mask = cut(own.lam, own.mu, middle).mask(C.shape[1])
        low, high = (middle, high) if float(norm(C[mask])) < target else (low, middle)
    return _share_of(own, cut(own.lam, own.mu, high).kept)


def _reached(edited: Array) -> float:
    """|W'|, less what its rounding may be: the pairs that make up W' weigh at least that."""
    return float(norm(edited)) * (1 - 2.0**-20)


def _otherwise(
    own: Eigenbasis, C: Array, W: Array, edited: Array
) -> Iterator[tuple[str, str, Array]]:
    """(fault, sentence, the weight that it gives), each at about their |W'|."""
    target = _reached(edited)
    for other in OTHERS:
        low, high = 0, C.size
        while high - low > 1:
            middle = (low + high) // 2
            mask = other.mask(own, C, middle)
            low, high = (middle, high) if float(norm(C[mask])) < target else (low, middle)
        for kept in (low, high):
            yield other.fault, other.sentence, keep_pairs(W, own, other.mask(own, C, kept))
    if C.shape[0] == C.shape[1]:
        turned = own.U_G.T @ W.T @ own.U_A
        share = _share_of_weight(own, turned, edited)
        mask = cut(own.lam, own.mu, share).mask(len(W))
        text = "the edit was made of Wᵀ, or A and G changed places in it, which is the same (O60)"
        yield "B33", text, keep_pairs(W.T, own, mask).T


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
        drawn = _known(self._bounds.drawing.norm) if side == "G" else 0.0
        solver = solver_budget(size, case.arithmetic.filled(dtype))
        return case.budget(layer, dtype, side) + solver + drawn


def basis_of(bounds: Bounds) -> Eigenbasis:
    """Our basis of the layer: the given one, or that of the reference's factors.

    Spectra are multiplied by powers of two, which changes no pair (O59), so that no product leaves
    the range of float64.
    """
    case, layer = bounds.case, bounds.layer
    one, truth = case.ours(layer), case.reference
    given = None if case.bases is None else case.bases.get(layer)
    if given is not None and len(given.mu) == len(one.sum_A):
        return _near_one(given)
    facts = (truth.shard_rows, truth.dtype)
    U_A, mu, _ = eigenbasis(one.A, *facts, f"A of {layer!r}")
    U_G, lam, _ = eigenbasis(one.G, *facts, f"G of {layer!r}")
    return _near_one(Eigenbasis(U_A, mu, U_G, lam))


def _near_one(own: Eigenbasis) -> Eigenbasis:
    mu, lam = (shifted(x, -exponent(x)) for x in (own.mu, own.lam))
    return replace(own, mu=mu, lam=lam)
