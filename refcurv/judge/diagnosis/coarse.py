"""What of theirs is in a coarser dtype: what, so rounded, comes nearest to theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.compare import who_draws
from refcurv.judge.diagnosis.deciding import part
from refcurv.judge.diagnosis.ladders import FINE
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.search import NEARER, Chosen, Idea, Side, is_coarse
from refcurv.judge.diagnosis.variants import Setting
from refcurv.judge.diagnosis.variants.networks import COARSE, PRODUCTS
from refcurv.judge.diagnosis.variants.rounding import TF32
from refcurv.judge.diagnosis.variants.setting import HALVES
from refcurv.judge.diagnosis.work import is_large, linear

HALF = 0.5
"""Chosen. Of a part that does round, programs that round elsewhere in it left 0.25 of the errors at
most in the middle; of any other part the best left 0.64."""

SUMS: Final = tuple(Setting(tensor_A=f"operand in {d}", tensor_G=f"operand in {d}") for d in TF32)
"""The products of the sums alone are in TF32."""

EVERY: Final = (
    *(Setting(network=((name, 0.0),)) for name in COARSE if name not in PRODUCTS),
    *SUMS,
    *(
        Setting(tensor_A=one.tensor_A, tensor_G=one.tensor_G, network=((name, 0.0),))
        for one, name in zip(SUMS, PRODUCTS, strict=True)
    ),
)
"""What may be rounded; of the last, what every product reads, that of the sums too."""

BY_SIZE: Final = tuple(Setting(network=((name, 0.0),)) for name in COARSE if name[:3] == "all")
"""Of these sizes say more (`precision`)."""


def settle(case: Case, found: Mapping[str, Side]) -> None:
    """Where theirs is off as if something were rounded on the way: choose what rounds.

    Definition
        e is how far theirs is from ours, e_c how far from what is rounded as c says, b the finest
        budget. The score of c is the median of (e_c + b)/(e + b) over A and G, G where its labels
        are known, without those that are exact in both. So what rounds in c and is exact in theirs
        counts against it. The least score wins, and it must leave HALF.
        Where none does, sizes say in which dtype all of it is (`precision`).

    Proof: tests/test_judge_network.py::test_a_part_that_rounds_or_is_another_has_its_name,
        ::test_products_in_tf32_have_their_name
    """
    known = {"A": found["A"]} | ({} if any(who_draws(case)) else {"G": found["G"]})
    if not _rounds(found, known) or case.model is None or case.corpus is None or is_large(case):
        return
    wanted = [*EVERY, *dict.fromkeys(_in_float16(known))]
    layers = list(dict.fromkeys(x for side in found.values() for x in side.ladders))
    recompute(case, found, layers, [one for one in wanted if not _made(found, one)])
    scores = {one: _score(known, one) for one in wanted}
    best = min(scores, key=lambda one: scores[one])
    enough = scores[best] <= min(HALF, NEARER * _of_all(scores, best))
    for side in found.values():
        side.chosen = [one for one in side.chosen if not _is_rounding(one.idea.setting, known)]
        lefts, drawing = side.table.get(_idea(side, best), {}), side.side not in known
        ranks = {x: side.rank(x, side.plain(x)) for x in lefts}
        at_least = {x: side.ladders[x].by_drawing if drawing else 0 for x in lefts}
        moved = {x: y for x, y in lefts.items() if ranks[x] > at_least[x]}
        if best not in BY_SIZE and enough and moved:
            side.chosen.append(Chosen(_idea(side, best), moved))


def _of_all(scores: Mapping[Setting, float], part: Setting) -> float:
    """What a network leaves that is in the dtype of this part as a whole; infinite for TF32."""
    dtypes = {name.rsplit(" ", 1)[-1] for name, _ in part.network}
    whole = [scores[one] for one in BY_SIZE if one.network[0][0].rsplit(" ", 1)[-1] in dtypes]
    return min(whole, default=math.inf)


def _in_float16(known: Mapping[str, Side]) -> Iterator[Setting]:
    """Gradients in float16, as the search has found them."""
    for one in known["G"].chosen if "G" in known else ():
        if one.idea.setting is not None and one.idea.setting.tensor_G in HALVES:
            yield one.idea.setting


def _is_rounding(setting: Setting | None, known: Mapping[str, Side]) -> bool:
    """Is it something that rounds, and that can be told from the others?"""
    if setting is None or not is_coarse(setting):
        return False
    return "G" in known or setting.tensor_G not in HALVES


def _made(found: Mapping[str, Side], setting: Setting) -> bool:
    """Is it known already what it leaves, in every layer? The search asks of some alone."""
    ideas = [(side, _idea(side, setting)) for side in found.values()]
    return all(
        layer in side.table.get(idea, {})
        for side, idea in ideas
        if idea.faults
        for layer in linear(side.ladders)
    )


def _idea(side: Side, setting: Setting) -> Idea:
    own = part(setting, side.side)
    return Idea(own.faults, own)


def _rounds(found: Mapping[str, Side], known: Mapping[str, Side]) -> bool:
    """Is theirs ours, but for errors of the size of a dtype or a part that was found to round?"""
    chosen = [one.idea.setting for side in found.values() for one in side.chosen]
    if not all(_is_rounding(one, known) for one in chosen):
        return False
    ranks = [
        (side.rank(layer, side.plain(layer)), steps)
        for side in found.values()
        for layer, steps in side.ladders.items()
    ]
    sized = any(
        0 < rank < steps.by_drawing and steps.steps[rank][0] not in FINE for rank, steps in ranks
    )
    return sized or bool(chosen)


def _score(found: Mapping[str, Side], setting: Setting) -> float:
    """What it leaves of the errors, in the middle; infinite where it was not run."""
    shares = []
    for side in found.values():
        idea = _idea(side, setting)
        for layer in linear(side.ladders):
            b, e = side.ladders[layer].steps[0][1], side.plain(layer).error
            left = side.table.get(idea, {}).get(layer) if idea.faults else side.plain(layer)
            if left is None:
                return math.inf
            if math.isfinite(e) and max(e, left.error) > b:
                shares.append((left.error + b) / (e + b))
    return float(np.median(shares)) if shares else math.inf
