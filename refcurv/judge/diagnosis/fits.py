"""Quantities of the network that any number may stand for: the numbers that theirs has, fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.search import ROUNDING, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import fitted as best
from refcurv.judge.diagnosis.seen import see
from refcurv.judge.diagnosis.variants import Setting, inputs, moments
from refcurv.judge.diagnosis.variants.networks import CHANGES
from refcurv.judge.diagnosis.work import extent, few_positions, is_large
from refcurv.law.checks import Array

NEARER = 0.9
"""What one change more must leave of the worst error, at most, and steps of the whole error.
Chosen: what is not theirs leaves more.
"""

STILL = 0.99
"""What a step may leave of it to be the last.  Chosen: of what can be fitted others leave less."""

FIRST = 3
"""So many steps are the first."""

STEPS = 16
"""Chosen: the steps from a first level to the last digit are fewer."""

NUDGE = 1e-3
"""By which share a level is moved to see what it changes.  Chosen: later steps correct it."""

NEAREST = 2
"""So many of what changes something beside a quantity are fitted.  Chosen: each is many passes."""


def fits(case: Case, side: Side, layers: Sequence[str]) -> Iterator[Setting]:
    """Each quantity, all else as ours, from the level that came nearest, or else from our own.

    Of a large corpus that alone which came nearest.

    Definition
        Y(t) is what the network makes at levels t; t goes to the least of Σ |T − r Y(t)|² / |r Y|²
        over the layers, by Gauss-Newton steps along Broyden's secants.

    Proof: tests/test_judge_network.py::test_a_quantity_is_fitted
    """
    assert case.model is not None
    firsts = []
    for shares in _shares(side, layers, beside=False):
        share, first = min(shares, key=lambda pair: pair[0])
        (name, _), own = first.network[0], CHANGES[first.network[0][0]].own
        if share > 1 and own is not None:
            share, first = 1.0, Setting(network=((name, own(case.model.config)),))
        firsts.append((share, first))
    if extent(case) > few_positions(case):
        firsts = sorted((one for one in firsts if one[0] < NEARER), key=lambda pair: pair[0])[:1]
    for _, first in firsts:
        yield from _least(case, side, layers, first)


def fits_beside(case: Case, side: Side, layers: Sequence[str]) -> Iterator[Setting]:
    """Quantities where something else changes as well, or another quantity: all at once.

    Of those that leave less than the quantities alone do, the nearest.

    Proof: tests/test_judge_network.py::test_two_quantities_are_fitted_at_once
    """
    alone = {one: share for x in _shares(side, layers, beside=False) for share, one in x}
    best = []
    for shares in _shares(side, layers, beside=True):
        share, first = min(shares, key=lambda pair: pair[0])
        quantities = [Setting(network=(first.network[k],)) for k in _free(first)]
        least_alone = min((alone[one] for one in quantities if one in alone), default=1.0)
        if share <= NEARER * min(1.0, least_alone):
            best.append((share, first))
    count = 1 if extent(case) > few_positions(case) else NEAREST
    for _, first in sorted(best, key=lambda pair: pair[0])[:count]:
        yield from _least(case, side, layers, first)


def _shares(
    side: Side, layers: Sequence[str], beside: bool
) -> Iterable[list[tuple[float, Setting]]]:
    """What each level that was tried leaves of the worst error; together what differs in levels."""
    out: dict[Setting, list[tuple[float, Setting]]] = {}
    for idea, left in side.table.items():
        one = idea.setting
        if one is None or not _free(one) or not all(x in left for x in layers):
            continue
        if (one != Setting(network=one.network[:1])) == beside:
            share = max(_share(side, x, left[x].error) for x in layers)
            out.setdefault(_at(one, np.zeros(len(_free(one)))), []).append((share, one))
    return out.values()


def fitted(
    case: Case,
    found: Mapping[str, Side],
    side: Side,
    chosen: Chosen | None,
    known: Mapping[str, Idea],
) -> Chosen | None:
    """What was chosen, its quantities fitted: a level that is near enough here is not elsewhere.

    Args: known: layer → what was chosen on the other side, whose levels stay as they are.

    Proof: tests/test_judge_network.py::test_a_level_that_is_near_enough_is_fitted
    """
    setting = None if chosen is None else chosen.idea.setting
    if chosen is None or setting is None or not _free(setting):
        return chosen
    exact = all(left.error <= ROUNDING for left in chosen.left.values())
    if exact or is_large(case) or any(idea.setting == setting for idea in known.values()):
        return chosen
    layers = list(chosen.left)
    recompute(case, found, layers, list(_least(case, side, layers, setting)))
    return side.choose(layers, known)


def _share(side: Side, layer: str, error: float) -> float:
    """What is left of the error of a layer that is off; 0 where it is not."""
    plain = side.plain(layer)
    off = 1.0 if math.isinf(plain.error) else plain.error  # where ours is no multiple of theirs
    return error / off if side.rank(layer, plain) > 0 else 0.0


def _free(setting: Setting) -> list[int]:
    """Which of its changes have a quantity that any number may stand for."""
    return [k for k, (name, _) in enumerate(setting.network) if CHANGES[name].own is not None]


def _at(setting: Setting, levels: Array) -> Setting:
    """The setting with these levels of what is free."""
    network = [*setting.network]
    for k, level in zip(_free(setting), levels.tolist(), strict=True):
        network[k] = network[k][0], level
    return replace(setting, network=tuple(network))


def _least(case: Case, side: Side, layers: Sequence[str], first: Setting) -> Iterator[Setting]:
    """The setting at whose levels the difference is least; none where it is hardly less."""
    assert case.model is not None
    config = case.model.config
    levels = [first.network[k] for k in _free(first)]
    own = np.array([own(config) for name, _ in levels if (own := CHANGES[name].own) is not None])
    begin = np.array([level for _, level in levels])
    make = partial(_made, case, side.side, layers)
    t, _ = least(lambda t: make(_at(first, t)), begin, own)
    if (t != begin).any():
        yield _at(first, t)


def _made(case: Case, side: str, layers: Sequence[str], setting: Setting) -> Made:
    """Y and T − Y of all layers, each over |Y|, theirs without its factor."""
    of: dict[str, Array] = {}
    if side == "A":
        for _, alone in inputs(case, [setting], layers):
            of = {x: A for x, (A, _) in alone.items()}
    else:
        for _, both in moments(case, [setting], layers):
            of = {x: one.G for x, one in both.items()}
    Y, D = [], []
    for layer in layers:
        T = see(case, layer)[side].T
        if layer not in of or T.shape != of[layer].shape:
            return None
        size = float(np.linalg.norm(of[layer])) or 1.0
        r = best(T, of[layer])[1]
        if not r > 0:
            return None
        Y.append(of[layer].ravel() / size)
        D.append((T / r - of[layer]).ravel() / size)
    return np.concatenate(Y), np.concatenate(D)


Made = tuple[Array, Array] | None
"""Y(t), and theirs less Y(t)."""


def least(make: Callable[[Array], Made], first: Array, own: Array) -> tuple[Array, float]:
    """The levels t ≥ 0 at which the difference D of Y(t) and theirs is least; what of it is left.

    The first levels where nothing can be made, or where the steps leave most of the difference.

    Args: make, t → (Y, D); own, levels of the size to be expected, where the first is 0.

    Cost: `make` of the first levels, of one more for each level, and of each step
    Proof: tests/test_judge_network.py::test_the_least_of_several_levels
    """
    scale = np.select([first > 0, own > 0], [first, own], NUDGE)  # a level counts in units of this
    t, here = first, make(first)
    nudged = [make(first + NUDGE * scale * unit) for unit in np.eye(len(first))]
    if here is None or None in nudged:
        return first, 1.0
    J = np.stack([(one[0] - here[0]) / NUDGE for one in nudged if one is not None], axis=1)
    begin = size = float(np.linalg.norm(here[1]))
    for number in range(STEPS):
        step = np.linalg.lstsq(J, here[1])[0] * scale
        new = np.where(t + step > 0, t + step, t / 10)
        s = (new - t) / scale
        there = make(new) if np.isfinite(s).all() and s.any() else None
        if there is None:
            break
        J += np.outer(there[0] - here[0] - J @ s, s) / float(s @ s)
        before, left = size, float(np.linalg.norm(there[1]))
        if left < size:
            t, here, size = new, there, left
        if STILL * before < left and (left < before or np.abs(s).max() < NUDGE):
            break
        if number == FIRST - 1 and size > NEARER * begin:
            break
    return (t, size / (begin or 1.0)) if size <= NEARER * begin else (first, 1.0)
