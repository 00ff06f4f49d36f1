"""Labels that nobody knows: drawn by theirs where the reference has none (B19).

The labels of the reference are known. Each draw of the others gives a G_k, whose mean is M. If that
is what theirs did, it adds to ours what M adds, and it is no further from M than the G_k are.
`remainder` says when both hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.compared import collected
from refcurv.judge.diagnosis.deciding import words
from refcurv.judge.diagnosis.search import Idea, Side
from refcurv.judge.diagnosis.seen import Left, fitted
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, settings
from refcurv.judge.diagnosis.work import is_large
from refcurv.judge.drawn import DEVIATIONS
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher

DRAWS: Final = 8
"""Of the labels that nobody knows.  Chosen: a spread is then known to a quarter."""

MORE: Final = math.sqrt(1 + 1 / DRAWS)
"""What a new draw deviates from the mean of the others, in their standard deviations."""

FARTHER: Final = math.log((DRAWS + 1) / (DRAWS - 1)) / 2
"""A new draw is further from the mean of the others than they are, which are part of it."""

SMALL: Final = 1e-4
"""Chosen: bfloat16 leaves errors of about this size in the directions that are 0."""


def remainder(
    case: Case, found: Mapping[str, Side], layers: Sequence[str], wanted: Idea | None = None
) -> None:
    """Enter what the mean over unknown labels leaves of G, where theirs can be one of the draws.

    Definition
        X is ours. T°, X° and G° are T, X, G_k times M^-½ on both sides, which gives each direction
        its own size. E = I − X°. share = ⟨T° − X°, E⟩/⟨E, E⟩; it is 1 on average. far = log of
        |T° − I|. Both are means over layers.
        Theirs must be DEVIATIONS standard deviations of the G_k from their mean at most: in share
        both ways, and 0 must be further; in far upwards. The odds that one of the G_k is refused
        are about 1% (Student, DRAWS − 1 degrees of freedom). |T − M| must be within DEVIATIONS
        spreads in each layer. So where M adds nothing, theirs must be ours.

    Args: wanted, one of these hypotheses alone.
    """
    given = case.dump.declared.get("labels") == "given"
    if case.reference.fisher is not Fisher.SAMPLED or not given or is_large(case):
        return
    for one in (one for one in settings(case) if one.faults == ("B19",)):
        idea = Idea(one.faults, None, f"{words(one)}, padding sees {one.pads}")
        if wanted in (None, idea):
            lefts = _lefts(case, found["G"], layers, one, idea.name)
            for layer, left in lefts.items():
                found["G"].add(idea, layer, left)


def _lefts(
    case: Case, side: Side, layers: Sequence[str], place: Setting, note: str
) -> dict[str, Left]:
    """What M leaves in each layer; nothing if theirs is no such draw."""
    drawn = [replace(place, redraw=k + 1) for k in range(DRAWS)]
    out, shares, fars = {}, [], []
    for layer, (T, made) in collected(case, layers, [REFERENCE, *drawn], "G").items():
        if not made.keys() >= {REFERENCE, *drawn}:
            return {}
        ours, G = made[REFERENCE], np.stack([made[one] for one in drawn])
        M = G.mean(axis=0)
        each = float(norm(G - M)) / math.sqrt(DRAWS - 1) / float(norm(M))
        error, r = fitted(T, M)
        spread = DEVIATIONS * MORE * each
        if error > spread + side.ladders[layer].steps[0][1]:
            return {}
        if each > side.ladders[layer].steps[0][1]:
            root = _root(M)
            X, *some = (root.T @ one @ root for one in (ours, T, *G))
            shares.append([_share(one - X, root.T @ M @ root - X) for one in some])
            far = [_far(one - root.T @ M @ root) for one in some]
            fars.append([far[0], *(x + FARTHER for x in far[1:])])
        out[layer] = Left(error, r, f"{note}, the mean over {DRAWS} draws", (), None, spread)
    return out if shares and _fits(shares, fars) else {}


def _fits(shares: list[list[float]], fars: list[list[float]]) -> bool:
    """Are the means over layers of the first, theirs, as those of the others are?"""
    share, far = np.mean(shares, axis=0), np.mean(fars, axis=0)
    limit, reach = (DEVIATIONS * MORE * float(np.std(x[1:], ddof=1)) for x in (share, far))
    added = abs(share[0] - 1) <= limit < 1
    return bool(added and far[0] <= far[1:].mean() + reach)


def _root(M: Array) -> Array:
    """R with RᵀM R = I, but where eigenvalues of M are below SMALL of its largest."""
    value, U = np.linalg.eigh(M)
    return np.asarray(U / np.sqrt(np.maximum(value, SMALL * value[-1])))


def _share(D: Array, E: Array) -> float:
    """x of the x E that is nearest to D."""
    return float(np.vdot(D, E) / np.vdot(E, E))


def _far(D: Array) -> float:
    return math.log(float(norm(D)) + 1e-300)
