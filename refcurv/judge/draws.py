"""How far drawn labels take an honest program: honest dumps, drawn from model and corpus.

They are drawn until one lies as far from the reference as theirs, or MOST of them are all nearer.
Theirs, if honest, is one more of the same kind. It is the furthest of MOST + 1 with odds of
1/(MOST + 1), whatever the tails are, and over all numbers of all layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

import numpy as np

from refcurv.curvature.factors import collect
from refcurv.judge.case import Case
from refcurv.judge.compare import NOISE_DRAWS, drawing, measure, one_draw, who_draws
from refcurv.judge.diagnosis.hypotheses import fitted
from refcurv.judge.diagnosis.recomputed import cost, few_positions, is_large
from refcurv.judge.diagnosis.search import spread
from refcurv.judge.diagnosis.variants.collecting import held
from refcurv.judge.drawn import NO_DRAWING, Drawing
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model.part import part_of
from refcurv.model.transformer import Tap
from refcurv.model.weights import resident
from refcurv.passes.shards import shards
from refcurv.passes.sweep import sweep, sweep_of

PILOT: Final = 32
"""Honest dumps that say by how much each number of each layer varies. They are not counted."""

FEWEST: Final = 99
"""Honest dumps that are counted at least, so that limits are more than what theirs needs."""

MOST: Final = 999
"""Honest dumps at most: an honest program fails by drawing with odds of 1/1000."""

FAR: Final = 4.0
"""Where FEWEST dumps are all so many times nearer than theirs, no more are drawn, unless few labels
may weigh more than the rest (MANY).

Chosen. Each number is then some 14 standard deviations off, which a sum of MANY independent labels
is not in any number of dumps.
"""

MANY: Final = 20.0
"""Labels of equal weight that would make every tr G vary as it does, at least, for FAR to hold."""

CONFIRMED: Final = 399
"""Honest dumps of which none may look like theirs where theirs looks like a hypothesis. An honest
one, that looks so with odds q, is then taken for it with odds of q (1 − q)³⁹⁹ < 1/1000."""

WORK: Final = 2.0**36
"""Parameters times positions of all honest dumps, at most.  Chosen: half a minute."""

SEED: Final = 0x5EED_0FD2_A3D1
"""Of the honest dumps.  Chosen: a seed that nobody takes."""

ROOM: Final = 2**24
"""Numbers in the sums of the dumps that are drawn at one time, at most."""

LAYERS: Final = 4
"""Layers of a large model of which a collection finds out how much drawing labels changes."""

SAMPLE: Final = 4096
"""Positions of which a collection finds out how much drawing labels changes."""


def with_drawing(case: Case) -> Case:
    """The case with what drawing explains in each layer, where model and corpus tell it.

    Proof: tests/test_judge_drawing.py::test_an_honest_dump_fails_as_often_as_is_stated
    """
    we, they = who_draws(case)
    if case.model is None or case.corpus is None or not (we or they):
        return case
    if they and case.reference.fisher is not Fisher.EMPIRICAL:
        each = _draws(case)
        most = min(float(MOST), WORK / (cost(case) * each) - PILOT)
        if most >= FEWEST and not is_large(case):
            return replace(case, drawn=_limits(case, each, int(most)))
    return replace(case, noise=_noise(case))


def _draws(case: Case) -> int:
    """Draws of theirs: as declared, or by the counts of the first layer that has them."""
    declared = case.dump.declared.get("draws")
    if declared is not None:
        return max(1, int(declared))
    counts = (case.counts(layer) for layer in case.matched)
    ratios = (n / one.ours["A"] for one in counts if (n := one.theirs["G"]))
    return max(1, round(next(ratios, 1.0)))


def _limits(case: Case, each: int, most: int) -> dict[str, Drawing]:
    """Limits that all honest dumps lie within, and theirs too if one of them is as far."""
    layers = [x for x in case.matched if case.ours(x).sum_G.any()]
    theirs = [_theirs(case, layer) for layer in layers]
    out = dict.fromkeys(case.matched, NO_DRAWING)
    if all(one is not None and one.max() <= 0 for one in theirs):
        return out  # then theirs has the labels of the reference
    dumps = _numbers(case, layers, each)
    pilot = np.stack([next(dumps) for _ in range(PILOT)])  # (dumps, layers, numbers)
    mean, scale = _usual(pilot[..., :2])
    goal = max((_far(x, m, s) for x, m, s in zip(theirs, mean, scale, strict=True)), default=0.0)
    furthest, count, totals = -math.inf, 0, list(pilot[..., 2])
    while count < FEWEST or (furthest < goal and count < most):
        one = next(dumps)
        furthest = max(furthest, float(((one[:, :2] - mean) / scale).max()))
        count += 1
        totals.append(one[:, 2])
        if count == FEWEST and goal > FAR * furthest and _even(np.stack(totals)):
            break
    limit = mean + furthest * scale
    for layer, (form, trace) in zip(layers, limit, strict=True):
        out[layer] = Drawing((1 + trace) * form + trace, float(trace), float(form), count)
    return out


def _usual(pilot: Array) -> tuple[Array, Array]:
    """Mean and scale of each number over the pilot.

    The scale is the standard deviation, but a tenth of the largest of any layer at least: a few
    dumps may not show how much a number varies.
    """
    deviation = pilot.std(axis=0)
    least = np.maximum(0.1 * deviation.max(axis=0), 1e-9)
    return pilot.mean(axis=0), np.maximum(deviation, least)


def _far(theirs: Array | None, mean: Array, scale: Array) -> float:
    """How far theirs is in one layer, in scales; nothing is far of a G that is not there."""
    return -math.inf if theirs is None else float(((theirs - mean) / scale).max())


def _even(totals: Array) -> bool:
    """Do all traces vary no more than sums of MANY labels of one weight? totals (dumps, layers)."""
    variance = totals.var(axis=0)
    return bool((totals.mean(axis=0) ** 2 >= MANY * variance).all())


def _theirs(case: Case, layer: str) -> Array | None:
    """(form, trace) of theirs less what rounding explains; None without a G to compare.

    tr A · tr G is compared, or tr G, whichever is nearer: what is wrong with A is no drawing.
    """
    one, ours = case.theirs(layer), case.ours(layer)
    G = None if one.G is None else _square(one.G)
    if G is None or G.shape != ours.sum_G.shape or not np.isfinite(G).all():
        return None
    found = measure(G, ours.G, None, 1)
    off = abs(found.ratio - 1)
    free, A = case.dump.scale_free, None if one.A is None else _square(one.A)
    if A is not None and A.shape == ours.sum_A.shape:
        off = min(off, abs(measure(A, ours.A, None, 1).ratio * found.ratio - 1))
    budget = case.budget(layer, case.arithmetic.stored or "float64")
    numbers = np.array([found.form - budget, 0.0 if free else off - 2 * budget])
    return np.asarray(np.nan_to_num(numbers, nan=np.inf, posinf=np.inf))


def _square(X: Array) -> Array:
    return np.asarray(np.diag(X) if X.ndim == 1 else X)


def _numbers(case: Case, layers: Sequence[str], each: int) -> Iterator[Array]:
    """(layers, 3) of each honest dump: its form and its trace beside ours, and tr G over ours."""
    ours = {layer: case.ours(layer).G for layer in layers}
    for dump in honest(case, layers, each):
        found = [measure(dump[layer], ours[layer], None, 1) for layer in layers]
        yield np.array([(one.form, abs(one.ratio - 1), one.ratio) for one in found])


def honest(case: Case, layers: Sequence[str], each: int) -> Iterator[Mapping[str, Array]]:
    """G of some layers, from `each` draws of all labels, dump after dump without end."""
    assert case.model is not None and case.corpus is not None
    model = case.model
    fisher = "signed" if case.dump.declared.get("fisher") == "signed" else "sampled"
    units = shards(case.corpus, model.config, case.reference.rows)
    parameters = resident(model)
    sizes = {layer: len(case.ours(layer).sum_G) for layer in layers}
    rows = {layer: each * case.ours(layer).n_A for layer in layers}
    dumps = max(1, min(PILOT + 1, ROOM // sum(n * n for n in sizes.values())))
    seed = SEED
    while True:
        job = sweep_of("validate", layers, fisher, seed, dumps * each)
        sums = {layer: np.zeros((dumps, n, n)) for layer, n in sizes.items()}

        def take(number: int, tap: Tap, sums: Mapping[str, Array] = sums) -> None:
            sums[tap.name][number // each] += tap.g.T @ tap.g

        for unit in units:
            sweep(model.config, parameters, unit, job, take)
        for n in range(dumps):
            yield {layer: one[n] / rows[layer] for layer, one in sums.items()}
        seed += 1


def unlike(case: Case, near: Mapping[str, float]) -> list[str]:
    """The layers whose G theirs has nearer to a hypothesis than any honest dump comes to theirs.

    Where labels are nearly certain, honest ones are often those of a hypothesis, and prove nothing.

    Args: near, layer → how near an honest dump must come to theirs to be as good, up to a factor.
    """
    if case.drawn is None:
        return list(near)
    theirs = {layer: _square(G) for layer in near if (G := case.theirs(layer).G) is not None}
    left = list(theirs)
    for dump in islice(honest(case, left, _draws(case)), CONFIRMED):
        left = [x for x in left if fitted(theirs[x], dump[x])[0] > near[x]]
        if not left:
            break
    return left


def _noise(case: Case) -> dict[str, tuple[float, float]] | None:
    """`Case.noise`, from eight draws on a few sequences; of a large model, on LAYERS layers too.

    The other layers are then taken to vary as much as the one of these that varies most.
    """
    assert case.model is not None and case.corpus is not None
    model, corpus = case.model, case.corpus
    unknown = [n for n in case.matched if not drawing(case, n, None).known]
    if not unknown:
        return None
    some, positions, at_once = unknown, SAMPLE, None
    if is_large(case):
        some, positions, at_once = spread(unknown, LAYERS), few_positions(case), 1
        model = held(case).single(model)
    few = part_of(corpus, slice(0, max(1, positions // corpus.label.shape[1])))
    rows, draws = case.reference.rows, NOISE_DRAWS
    drawn = collect(
        model, few, ",".join(some), "sampled", draws=draws, rows=rows, in_flight=at_once
    )
    out = {}
    for name in some:
        single = one_draw(drawn[name], draws)
        if single is not None:
            fewer = math.sqrt(min(1, drawn[name].n_A / case.ours(name).n_A))
            out[name] = single[0] * fewer, single[1] * fewer
    if out and len(some) < len(unknown):
        norms, traces = zip(*out.values(), strict=True)
        out = dict.fromkeys(unknown, (max(norms), max(traces))) | out
    return out
