"""Which part of a network is in a coarser dtype: the one that, so run, comes nearest to theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.compare import who_draws
from refcurv.judge.diagnosis.recomputed import is_large, part, recompute
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.variants import Setting
from refcurv.judge.diagnosis.variants.networks import COARSE, PARTS

HALF = 0.5
"""Chosen. Of a part that does round, programs that round elsewhere in it left 0.25 of the errors at
most in the middle; of any other part the best left 0.64."""


def settle(case: Case, found: Mapping[str, Side]) -> None:
    """Where theirs is off as if something were rounded on the way: choose the part that rounds.

    Definition
        e is how far theirs is from ours, e_c how far from the network whose part c rounds, b the
        finest budget. The score of c is the median of (e_c + b)/(e + b) over A and G, G where its
        labels are known, without those that are exact in both. So what rounds in c and is exact in
        theirs counts against it. The least score wins, and a part of the network must leave HALF.
        Where none does, sizes say in which dtype all of it is (`precision`).

    Proof: tests/test_judge_network.py::test_a_part_that_rounds_or_is_another_has_its_name
    """
    if not _rounds(found) or case.model is None or case.corpus is None or is_large(case):
        return
    layers = list(dict.fromkeys(x for side in found.values() for x in side.ladders))
    wanted = {name: Setting(network=((name, 0.0),)) for name in COARSE}
    recompute(case, found, layers, list(wanted.values()))
    known = {"A": found["A"]} | ({} if any(who_draws(case)) else {"G": found["G"]})
    scores = {name: _score(known, one) for name, one in wanted.items()}
    best = min(scores, key=lambda name: scores[name])
    for side in found.values():
        side.chosen = [one for one in side.chosen if not _in_part(one.idea.setting)]
        lefts = side.table.get(_idea(side, wanted[best]), {})
        moved = {x: y for x, y in lefts.items() if side.rank(x, side.plain(x)) > 0}
        if best in PARTS and scores[best] <= HALF and moved:
            side.chosen.append(Chosen(_idea(side, wanted[best]), moved))


def _in_part(setting: Setting | None) -> bool:
    """Is it a part of the network that rounds?"""
    return setting is not None and any(name in COARSE for name, _ in setting.network)


def _idea(side: Side, setting: Setting) -> Idea:
    own = part(setting, side.side)
    return Idea(own.faults, own)


def _rounds(found: Mapping[str, Side]) -> bool:
    """Is theirs ours, but for errors of the size of a dtype or a part that was found to round?"""
    if any(not _in_part(one.idea.setting) for side in found.values() for one in side.chosen):
        return False
    ranks = [
        (side.rank(layer, side.plain(layer)), steps)
        for side in found.values()
        for layer, steps in side.ladders.items()
    ]
    sized = any(
        0 < rank < steps.by_drawing and steps.steps[rank][0] not in ("float64", "float32")
        for rank, steps in ranks
    )
    return sized or any(side.chosen for side in found.values())


def _score(found: Mapping[str, Side], setting: Setting) -> float:
    """What it leaves of the errors, in the middle; infinite where it was not run."""
    shares = []
    for side in found.values():
        lefts = side.table.get(_idea(side, setting), {})
        for layer, steps in side.ladders.items():
            b, e = steps.steps[0][1], side.plain(layer).error
            if layer not in lefts:
                return math.inf
            if math.isfinite(e) and max(e, lefts[layer].error) > b:
                shares.append((lefts[layer].error + b) / (e + b))
    return float(np.median(shares)) if shares else math.inf
