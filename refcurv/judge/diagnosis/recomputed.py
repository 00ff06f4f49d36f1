"""Hypotheses that model and corpus make: which settings are tried, on what, and until when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.compared import Entry, by_setting, entries, sketched
from refcurv.judge.diagnosis.deciding import SIDES, part, parts, words
from refcurv.judge.diagnosis.search import Idea, Side
from refcurv.judge.diagnosis.variants import REFERENCE, Setting
from refcurv.judge.diagnosis.variants.setting import batches
from refcurv.judge.diagnosis.work import (
    MOST,
    WHOLE,
    cost,
    extent,
    few_positions,
    is_large,
    sequences,
    top,
)

PROMISING = 0.97
"""What a sample must leave of an error for a run on all.

Chosen. Where sequences differ independently, what the right setting changes in a share s of them
leaves √(1 − s) of the error: 0.96 where s is a twelfth, and WHOLE allows no smaller one.
"""

HOPEFUL = 0.99
"""The same where a run on all is cheap: of what is in one sequence of fifty a sample says no more.
"""

BEST = 4
"""Of what was tried on some sequences, so many are tried on all of them."""

CROWD, PART, FINALISTS = 128, 4, 16
"""Of more settings than CROWD, most of them pairs of faults, these come nearest on a PART of a
sample, and are tried on all of it."""

SAME = 1.01
"""Of what one setting that is enough leaves of a sample, as much is left by one that does the same.
Chosen: two that differ on no sequence leave the same, but for rounding."""


def recompute(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    sampled: bool = True,
    under: Setting = REFERENCE,
) -> None:
    """Enter what each setting leaves in these layers: all of it, or the best of a sample.

    Args: sampled: is a sample enough to leave a setting out? under: what all of them change too;
    of a sample, what they change beside is told the better.
    """
    assert case.model is not None and case.corpus is not None
    if not wanted or not layers:
        return
    if is_large(case):
        _recompute_large(case, found, layers, wanted, sampled)
        return
    positions, limit = extent(case), few_positions(case)
    if positions <= limit or (not sampled and len(wanted) <= BEST and positions <= MOST):
        _enter(found, entries(case, layers, wanted, positions))
        return
    most = HOPEFUL if sampled else math.inf
    on_some = _best(case, found, layers, wanted, limit, most, under)
    on_some = {one: left for one, left in on_some.items() if not _tried(found, layers, one)}
    if positions > MOST:
        return
    runs = [one.run for one in on_some]
    waiting = sorted(on_some, key=lambda one: runs.index(one.run))
    exact: dict[Setting, float] = {}  # run → what the worst that is enough leaves of the sample
    for one, some in by_setting(case, layers, waiting.copy(), positions):
        waiting.remove(one)
        if one.run in exact or on_some[one] <= SAME * min(exact.values(), default=math.inf):
            _enter(found, some)
            if _enough(found, layers, [one]):
                exact[one.run] = max(on_some[one], exact.get(one.run, 0.0))
        most = SAME * min(exact.values(), default=math.inf)
        if all(x.run not in exact and on_some[x] > most for x in waiting):
            return  # what leaves more of the sample is not what theirs is


def _tried(found: Mapping[str, Side], layers: Sequence[str], setting: Setting) -> bool:
    """Is it known what the setting leaves in each of these layers?"""
    tables = [found[side].table.get(Idea(own.faults, own), {}) for side, own in parts(setting)]
    return all(x in lefts for lefts in tables for x in layers)


def _enter(found: Mapping[str, Side], some: Iterable[Entry]) -> None:
    for side, layer, idea, left in some:
        found[side].add(idea, layer, left)


def _recompute_large(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    sampled: bool,
) -> None:
    """The best of a sample one after the other, in every layer, until one of them is enough."""
    assert case.corpus is not None
    positions, limit = extent(case), few_positions(case)
    for layer in case.matched:
        sketched(case, layer)
    case.forget()
    known: set[tuple[str, Setting]] = case.once("whole", set)
    wanted = [one for one in wanted if not parts(one) <= known]
    if wanted and sampled and positions > limit:
        wanted = [*_best(case, found, top(case, layers), wanted, limit)]
    if positions > MOST or cost(case) > WHOLE:
        return
    told = f", first on {sequences(case, limit)}, then on all" if positions > limit else ""
    every = [x for x in case.matched if any(x in side.ladders for side in found.values())]
    for run in dict.fromkeys(one.run for one in wanted):
        group = [one for one in wanted if one.run == run]
        for side, layer, idea, left in entries(case, every, group, positions):
            found[side].add(idea, layer, replace(left, note=left.note + told))
        known.update(*map(parts, group))
        if _enough(found, layers, group):
            return


def _enough(found: Mapping[str, Side], layers: Sequence[str], group: Sequence[Setting]) -> bool:
    """Does one of these settings leave no more than the finest rounding wherever it was tried?"""
    for side in found.values():
        for setting in group:
            own = part(setting, side.side)
            lefts = side.table.get(Idea(own.faults, own), {}) if own.faults else {}
            tried = [x for x in layers if x in lefts and side.rank(x, side.plain(x)) > 0]
            if tried and all(side.rank(x, lefts[x]) == 0 for x in tried):
                return True
    return False


def _best(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
    most: float = PROMISING,
    under: Setting = REFERENCE,
) -> dict[Setting, float]:
    """Those that leave least on some sequences, for each side, and how much; nearest first.

    Args: most, what they must leave of an error; of what `under` leaves, if they have that too.
    """
    if len(wanted) > CROWD and not is_large(case):
        errors = _on_some(case, found, layers, wanted, limit // PART, under)
        few_of = _nearest(found, layers, errors, FINALISTS)
        nearest = {one for few in few_of.values() for one in few}
        wanted = [one for one in wanted if one in nearest]
    errors = _on_some(case, found, layers, wanted, limit, under)
    if is_large(case):
        told = sequences(case, limit)
        for (side, own), (error, _) in errors.items():
            text = f"{words(own)}, on {told}"
            found[side].sampled[Idea(own.faults, own)] = (error, text)
    best: dict[Setting, float] = {}
    for few in _nearest(found, layers, errors, BEST).values():
        for setting, error in few.items():
            if error < most:
                best[setting] = min(error, best.get(setting, math.inf))
    return dict(sorted(best.items(), key=lambda pair: pair[1]))


Errors = dict[tuple[str, Setting], tuple[float, Setting]]
"""Side and what of a setting decides it → the worst that it leaves of an error; such a setting."""


def _on_some(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
    under: Setting = REFERENCE,
) -> Errors:
    """What they leave on so many positions; each is tried once."""
    known: dict[Setting, list[Entry]] = case.once(("on some", *layers, limit, under), dict)
    new = [one for one in wanted if one not in known]
    known |= {one: [] for one in new}
    known |= dict(by_setting(case, layers, new, limit, under))
    worst: Errors = {}
    for one in wanted:
        for side, layer, idea, left in known[one]:
            assert idea.setting is not None
            own = part(under, side)
            lefts = found[side].table.get(Idea(own.faults, own), {}) if own.faults else {}
            off = lefts.get(layer, found[side].plain(layer)).error
            error = left.error / (1.0 if math.isinf(off) else max(off, 1e-300))
            before, first = worst.get((side, idea.setting), (0.0, one))
            worst[side, idea.setting] = max(before, error), first
    return worst


def _nearest(
    found: Mapping[str, Side], layers: Sequence[str], errors: Errors, count: int
) -> dict[str, dict[Setting, float]]:
    """For each side that has something to explain, so many that leave least, nearest first."""
    out: dict[str, dict[Setting, float]] = {}
    for name in (s for s in SIDES if not found[s].settled(layers)):
        mine = [pair for (side, _), pair in errors.items() if side == name]
        few = sorted(mine, key=lambda pair: pair[0])[:count]  # of two as near the first comes first
        out[name] = {setting: error for error, setting in few}
    return out


def batched(case: Case, found: Mapping[str, Side], layers: Sequence[str]) -> None:
    """Enter what means over batches leave: of any size in one layer, of the nearest in all.

    Proof: tests/test_judge_weights.py::test_a_mean_over_a_batch_of_any_size_has_its_name
    """
    if is_large(case) or extent(case) > few_positions(case):
        return  # a sample holds no batch as a whole
    first, wanted = min(layers, key=lambda x: case.counts(x).shape[0]), list(batches(case))
    recompute(case, found, [first], wanted)
    lefts = [(found["G"].table.get(Idea(x.faults, x), {}).get(first), x) for x in wanted]
    near = sorted((left.error, k) for k, (left, _) in enumerate(lefts) if left is not None)
    recompute(case, found, layers, [wanted[k] for _, k in near[:BEST]])
