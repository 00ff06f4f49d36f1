"""Is theirs a random pass of a network with dropout, or of other weights? A statistical test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.seen import see
from refcurv.judge.diagnosis.variants import Setting, inputs, moments
from refcurv.judge.diagnosis.variants.dropout import PLACES
from refcurv.judge.diagnosis.variants.networks import PASSES
from refcurv.judge.diagnosis.variants.shaken import WEIGHTS
from refcurv.judge.diagnosis.work import WHOLE, cost, is_large
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher

FEW = 4
"""Passes by which a rate is found, before the others are made."""


class Family(NamedTuple):
    """A change of the network that is random.

    Fields: fault; name, of the change, of a place and a number; places; first, the level that the
    search begins with; levels, that are believed; odds: does the spread grow as √(p/(1 − p)) of
    the level p, or in proportion to it; shifts: is the mean of many passes always another than
    ours.
    """

    fault: str
    name: str
    places: tuple[str, ...]
    first: float
    levels: tuple[float, float]
    odds: bool
    shifts: bool


DROPOUT = Family("B55", "dropout on {}, pass {}", PLACES, 0.1, (0.003, 0.6), True, True)
OTHERS = Family("B57", "other weights of {}, draw {}", WEIGHTS, 0.01, (1e-6, 0.3), False, False)

AGREES = 1.5
"""How far the middle distance may be from that of passes at the rate that was fitted to it."""

RAGGED = 1.5
"""Chosen. G of a pass has long tails, and 19 of them seldom show the longest: of five true passes
the raggedest was 1.28 times as ragged as theirs; what was dropped elsewhere was 1.7 times so."""

SHARP = 5.0
"""Deviations of the shift of passes, from 0 to their mean, with which it tells a pass."""

ODDS = 0.01
"""Of a true pass whose shift is refused, by Student's t.  Chosen."""

Matrices = dict[tuple[str, str], Array]
"""(layer, side) → A or G."""


class Random(NamedTuple):
    """A random change that explains theirs.

    Fields: place, of its family; p, its level; layers, that it moves; spread, how far passes are
    from their mean there, and theirs, how far theirs is: the largest, relative.
    """

    place: str
    p: float
    layers: tuple[str, ...]
    spread: float
    theirs: float


def random_pass(case: Case, found: Mapping[str, Side], family: Family) -> Random | None:
    """The random change of which theirs may be one pass, or None.

    Definition
        M is the mean of PASSES passes at a level p, X is ours. p is fitted so that |T − X| is, in
        the middle of all A and G, as large as |Y_k − X|; or, where passes differ less in it, so
        that theirs is shifted as they are (below). M would not do for X: at a level that is too
        high it is as far from theirs as a pass is. Theirs is one more pass where
        - |T − M| is, in the middle, as large as |Y_k − M without k|;
        - what the change does not move is ours, and what it moves is not;
        - log |T − M| over the A and G is no more ragged than that of the raggedest pass; RAGGED
          times as ragged, where the shift below is sharp, which says more;
        - where passes shift the mean, ⟨T − X, M − X⟩ over |M − X|², all A and G together, is that
          of a pass. It is about 1 for them, and about 0 for what has nothing to do with dropout.
        Of true passes at most 1 in PASSES + 1 fails the third, and ODDS of them the last. Of other
        weights an average alone shifts the mean, as its own weights are smaller; a change of the
        arithmetic that was not tried may look like the others.

    Proof: tests/test_judge_network.py::test_dropout_is_told_from_other_weights
    """
    theirs = _theirs(case, found)
    for place in family.places if theirs else ():
        p = family.first
        for count in (FEW, FEW, FEW, PASSES):
            made = _made(case, theirs, [family.name.format(place, n) for n in range(count)], p)
            moved = [at for at in theirs if all(at in one for one in made) and _moves(made, at)]
            if not moved or not _same_elsewhere(found, theirs, moved):
                break
            seen = [_seen(case, theirs, made, at) for at in moved]
            ratio = float(np.median([one.off / np.median(one.each) for one in seen]))
            if count == PASSES and 1 / AGREES < ratio < AGREES and _is_one(seen, family):
                layers = tuple(dict.fromkeys(layer for layer, _ in moved))
                spread = max(float(np.median(one.each)) for one in seen)
                return Random(place, p, layers, spread, max(one.off for one in seen))
            p = _next(family, p, float(np.median([one.away for one in seen])), seen)
            if not family.levels[0] < p < family.levels[1]:
                break
    return None


def _next(family: Family, p: float, ratio: float, seen: Sequence[Place]) -> float:
    """The level at which passes are `ratio` times as far away as at p, or shifted as theirs is.

    The shift grows as p/(1 − p), the spread as its root, and most of a distance is spread. What
    passes agree on better is taken, at the level that the distance tells.
    """
    if not family.odds:
        return p * ratio
    moved, each = _moved(seen)
    middle = np.median([one.each / np.median(one.each) for one in seen], axis=0)
    sharp = family.shifts and each.std() < 2 * middle.std() * abs(each.mean()) * ratio
    odds = p / (1 - p) * (moved / float(each.mean()) if sharp else ratio**2)
    return odds / (1 + odds)


def _moved(seen: Sequence[Place]) -> tuple[float, Array]:
    """How far theirs, and each pass, is shifted along what passes shift, all A and G together."""
    weight = 1 / np.array([np.median(one.each) ** 2 for one in seen])
    total = float(weight @ [one.shift for one in seen])
    return total, np.asarray(weight @ [one.shifts for one in seen])


def _theirs(case: Case, found: Mapping[str, Side]) -> Matrices:
    """Theirs: A, and G where its labels are known; none where passes take too long."""
    if case.model is None or case.corpus is None or is_large(case):
        return {}
    if PASSES * cost(case) > WHOLE:
        return {}
    known = case.reference.fisher is Fisher.EMPIRICAL
    known |= case.dump.declared.get("labels") == "given"
    return {
        (layer, name): see(case, layer)[name].T
        for name, side in found.items()
        if name == "A" or known
        for layer in side.ladders
        if see(case, layer)[name].T.shape == see(case, layer)[name].X.shape
    }


def _made(case: Case, theirs: Matrices, names: Sequence[str], p: float) -> list[Matrices]:
    """A and G of some passes; of one that leaves the range of the dtype none."""
    found: dict[Setting, Matrices] = {Setting(network=((name, p),)): {} for name in names}
    layers = list(dict.fromkeys(layer for layer, _ in theirs))
    if any(side == "G" for _, side in theirs):
        for one, both in moments(case, list(found), layers):
            found[one] = {at: getattr(both[at[0]], at[1]) for at in theirs if at[0] in both}
    else:
        for one, alone in inputs(case, list(found), layers):
            found[one] = {at: alone[at[0]][0] for at in theirs if at[0] in alone}
    return list(found.values())


def _moves(made: Sequence[Matrices], at: tuple[str, str]) -> bool:
    """Is it another one in every pass?"""
    return bool((made[0][at] != made[1][at]).any())


def _same_elsewhere(
    found: Mapping[str, Side], theirs: Matrices, moved: Sequence[tuple[str, str]]
) -> bool:
    """Is theirs ours where the change moves nothing, and not ours where it does?"""
    return all(
        (found[name].rank(layer, found[name].plain(layer)) > 0) == ((layer, name) in moved)
        for layer, name in theirs
    )


class Place(NamedTuple):
    """One A or G beside the passes, in units of |M|.

    Fields: off, |T − M|, and each, |Y_k − M without k|, both over what is expected of them with a
    variance of 1; shift, ⟨T − X, M − X⟩, and shifts, of each pass with the M of the others; size,
    |M − X|², and sizes, of the M of the others. away: |T − X| over the middle |Y_k − X|.
    """

    off: float
    each: Array
    shift: float
    shifts: Array
    size: float
    sizes: Array
    away: float


def _seen(case: Case, theirs: Matrices, made: Sequence[Matrices], at: tuple[str, str]) -> Place:
    X, T = see(case, at[0])[at[1]].X, theirs[at]
    every = np.array([one[at] for one in made])
    mean, n = every.mean(axis=0), len(made)
    unit = float(norm(mean))
    others = (n * mean - every) / (n - 1)
    each = norm((every - others).reshape(n, -1), axis=1) / np.sqrt(n / (n - 1))
    shifts = ((every - X) * (others - X)).sum(axis=(1, 2))
    return Place(
        float(norm(T - mean)) / unit / np.sqrt(1 + 1 / n),
        each / unit,
        float(((T - X) * (mean - X)).sum()) / unit**2,
        shifts / unit**2,
        float(norm(mean - X)) ** 2 / unit**2,
        norm((others - X).reshape(n, -1), axis=1) ** 2 / unit**2,
        float(norm(T - X) / np.median(norm((every - X).reshape(n, -1), axis=1))),
    )


def _is_one(seen: Sequence[Place], family: Family) -> bool:
    """Is theirs no more irregular than a pass may be, and shifted as all of them are?"""
    logs = np.log([one.each for one in seen])
    middle = np.median(logs, axis=1, keepdims=True)
    scale = np.maximum(np.sqrt(np.mean((logs - middle) ** 2, axis=1)), 1e-3)
    ragged = [_irregular(x, scale) for x in ((logs - middle) / scale[:, None]).T]
    here = (np.log([one.off for one in seen]) - middle[:, 0]) / scale
    rough = _irregular(here, scale) / max(ragged)
    weight = 1 / np.array([np.median(one.each) ** 2 for one in seen])
    moved = weight @ [one.shift for one in seen] / (weight @ [one.size for one in seen])
    each = weight @ [one.shifts for one in seen] / (weight @ [one.sizes for one in seen])
    sharp = bool(each.mean() >= SHARP * each.std(ddof=1))
    if rough > (RAGGED if sharp else 1) or not (sharp or family.shifts):
        return rough <= 1
    reach = float(special.stdtrit(len(each) - 1, 1 - ODDS / 2)) * np.sqrt(1 + 1 / len(each))
    off, reach = moved - each.mean(), reach * each.std(ddof=1)
    return bool(-min(reach, each.mean() / 2) <= off <= reach)  # nearer than what shifts nothing


def _irregular(z: Array, scale: Array) -> float:
    """How far the z are, in their own scales, from what one common factor of all passes makes."""
    shift = float((z / scale).sum() / (1 / scale**2).sum())
    return float(np.sqrt(np.mean((z - shift / scale) ** 2)))
