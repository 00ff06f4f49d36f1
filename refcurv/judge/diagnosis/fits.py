"""A quantity of the network that any number may stand for: the number that theirs has, fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.recomputed import is_large, recompute
from refcurv.judge.diagnosis.search import ROUNDING, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import fitted as best
from refcurv.judge.diagnosis.seen import see
from refcurv.judge.diagnosis.variants import Setting, inputs, moments
from refcurv.judge.diagnosis.variants.networks import CHANGES
from refcurv.law.checks import Array

CLEARLY = 0.5
"""What a first level must leave of every error.  Chosen: a wrong quantity rarely halves all."""

STEPS = 12
"""Chosen: the steps of a secant from a level that halves the error to the last digit are fewer."""


def fits(
    case: Case, side: Side, layers: Sequence[str], wanted: str | None = None
) -> Iterator[Setting]:
    """Settings whose quantity is fitted, of those that some level brought clearly nearer.

    Args: wanted, one of these changes alone.

    Definition
        Y(t) is what the network makes at level t; t goes to the least of Σ |T − r Y(t)|² / |r Y|²
        over the layers, by Gauss-Newton steps along the secant of the last two levels.

    Proof: tests/test_judge_network.py::test_a_quantity_is_fitted
    """
    assert case.model is not None
    for name, change in CHANGES.items():
        if change.own is None or wanted not in (None, name):
            continue
        levels = {
            idea.setting.network[0][1]: max(_share(side, x, left[x].error) for x in layers)
            for idea, left in side.table.items()
            if idea.setting is not None
            and idea.setting == Setting(network=idea.setting.network)
            and [n for n, _ in idea.setting.network] == [name]
            and all(x in left for x in layers)
        }
        first = min(levels, key=lambda level: levels[level], default=math.nan)
        if levels and levels[first] <= CLEARLY:
            make = partial(_made, case, side.side, layers, name)
            yield _of(name, _least(make, change.own(case.model.config), first))


def fitted(
    case: Case,
    found: Mapping[str, Side],
    side: Side,
    chosen: Chosen | None,
    known: Mapping[str, Idea],
) -> Chosen | None:
    """What was chosen, its quantity fitted: a level that is near enough here is not elsewhere.

    Args: known: layer → what was chosen on the other side, whose level stays as it is.

    Proof: tests/test_judge_network.py::test_a_level_that_is_near_enough_is_fitted
    """
    setting = None if chosen is None else chosen.idea.setting
    if chosen is None or setting is None or setting != Setting(network=setting.network[:1]):
        return chosen
    exact = all(left.error <= ROUNDING for left in chosen.left.values())
    if exact or is_large(case) or any(idea.setting == setting for idea in known.values()):
        return chosen
    layers = list(chosen.left)
    recompute(case, found, layers, list(fits(case, side, layers, setting.network[0][0])))
    return side.choose(layers, {layer: idea.faults for layer, idea in known.items()})


def _share(side: Side, layer: str, error: float) -> float:
    """What is left of the error of a layer that is off; 0 where it is not."""
    plain = side.plain(layer)
    return error / plain.error if side.rank(layer, plain) > 0 else 0.0


def _of(name: str, level: float) -> Setting:
    return Setting(network=((name, level),))


def _made(
    case: Case, side: str, layers: Sequence[str], name: str, level: float
) -> tuple[Array, Array] | None:
    """Y and T − Y of all layers, each over |Y|, theirs without its factor."""
    of: dict[str, Array] = {}
    if side == "A":
        for _, alone in inputs(case, [_of(name, level)], layers):
            of = {x: A for x, (A, _) in alone.items()}
    else:
        for _, both in moments(case, [_of(name, level)], layers):
            of = {x: one.G for x, one in both.items()}
    Y, D = [], []
    for layer in layers:
        if layer not in of:
            return None
        T, size = see(case, layer)[side].T, float(np.linalg.norm(of[layer])) or 1.0
        r = best(T, of[layer])[1]
        Y.append(of[layer].ravel() / size)
        D.append((T / r - of[layer]).ravel() / size)
    return np.concatenate(Y), np.concatenate(D)


def _least(make: Callable[[float], tuple[Array, Array] | None], own: float, first: float) -> float:
    """The level at which the difference is least."""
    before, here = make(own), make(first)
    if before is None or here is None:
        return first
    t0, t1, best = own, first, first
    for _ in range(STEPS):
        slope = (here[0] - before[0]) / (t1 - t0)
        step = float(here[1] @ slope) / (float(slope @ slope) or 1.0)
        t2 = t1 + step if t1 + step > 0 else t1 / 10
        if not math.isfinite(t2) or t2 == t1:
            break
        there = make(t2)
        if there is None:
            break
        t0, t1, before, here = t1, t2, here, there
        best = t2
        if abs(step) <= 1e-13 * abs(t2):
            break
    return best
