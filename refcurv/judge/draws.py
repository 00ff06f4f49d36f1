"""How far drawn labels take an honest program: honest dumps, drawn from model and corpus.

They are drawn until one lies as far from the reference as theirs, or MOST of them are all nearer.
Theirs, if honest, is one more of the same kind. It is the furthest of MOST + 1 with odds of
1/(MOST + 1), whatever the tails are, and over all numbers of all layers at once. So to stop at the
first that is as far costs nothing: no further one could make theirs the furthest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.factors import collect
from refcurv.curvature.factors_file import parts_of
from refcurv.judge.case import Case
from refcurv.judge.compare import NOISE_DRAWS, drawing, measure, one_draw, who_draws
from refcurv.judge.diagnosis.hypotheses import fitted
from refcurv.judge.diagnosis.recomputed import cost, few_positions, is_large
from refcurv.judge.diagnosis.search import spread
from refcurv.judge.diagnosis.variants.collecting import held
from refcurv.judge.drawn import NO_DRAWING, Drawing
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import as_columns
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model.part import part_of
from refcurv.model.transformer import Tap
from refcurv.model.weights import resident
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import sweep, sweep_of

PILOT: Final = 8
"""Honest dumps that say by how much each number of each layer varies. They are not counted."""

FEWEST: Final = 99
"""Honest dumps that are counted at least where theirs lacks G of a layer: what else it holds is
judged by limits that its G does not set."""

MOST: Final = 999
"""Honest dumps at most: an honest program fails by drawing with odds of 1/1000."""

CONFIRMED: Final = 399
"""Honest dumps of which none may look like theirs where theirs looks like a hypothesis. An honest
one, that looks so with odds q, is then taken for it with odds of q (1 − q)³⁹⁹ < 1/1000."""

WORK: Final = 2.0**32
"""Parameters times positions of all honest dumps, at most.  Chosen: some seconds."""

SEED: Final = 0x5EED_0FD2_A3D1
"""Of the honest dumps.  Chosen: a seed that nobody takes."""

TOGETHER: Final = 2**22
"""Numbers in the rows and sums of the dumps that are drawn at one time, at most.  Chosen: 32 MB."""

LAYERS: Final = 4
"""Layers of a large model of which a collection finds out how much drawing labels changes."""

SAMPLE: Final = 4096
"""Positions of which a collection finds out how much drawing labels changes."""


def with_drawing(case: Case) -> Case:
    """The case with what drawing explains in each layer, where model and corpus tell it.

    Where MOST dumps are too much work, fewer may show that theirs is honest. They do not show that
    it is not: then a standard error is all that is known.

    Proof: tests/test_judge_drawing.py::test_an_honest_dump_fails_as_often_as_is_stated
    """
    we, they = who_draws(case)
    if case.model is None or case.corpus is None or not (we or they):
        return case
    if they and case.reference.fisher is not Fisher.EMPIRICAL and not is_large(case):
        each = _draws(case)
        most = min(float(MOST), WORK / (cost(case) * each) - PILOT)
        drawn = _limits(case, each, int(most)) if most >= FEWEST else None
        if drawn is not None:
            return replace(case, drawn=drawn)
    return replace(case, noise=_noise(case))


def _draws(case: Case) -> int:
    """Draws of theirs: as declared, or by the counts of the first layer that has them."""
    declared = case.dump.declared.get("draws")
    if declared is not None:
        return max(1, int(declared))
    counts = (case.counts(layer) for layer in case.matched)
    ratios = (n / one.ours["A"] for one in counts if (n := one.theirs["G"]))
    return max(1, round(next(ratios, 1.0)))


def _limits(case: Case, each: int, most: int) -> dict[str, Drawing] | None:
    """Limits that all honest dumps lie within, and theirs too if one of them is as far.

    None where none is as far of fewer than MOST.
    """
    layers = [x for x in case.matched if case.ours(x).sum_G.any()]
    theirs = [_theirs(case, layer) for layer in layers]
    out = dict.fromkeys(case.matched, NO_DRAWING)
    if all(one is not None and one.max() <= 0 for one in theirs):
        return out  # then theirs has the labels of the reference
    case.say("how much drawing labels changes")
    dumps = _numbers(case, layers, each)
    mean, scale = _usual(np.stack(list(islice(dumps, PILOT))))
    goal = max((_far(x, m, s) for x, m, s in zip(theirs, mean, scale, strict=True)), default=0.0)
    least = FEWEST if any(one is None for one in theirs) else 1
    furthest, count = -math.inf, 0
    while count < least or (furthest < goal and count < most):
        furthest = max(furthest, float(((next(dumps) - mean) / scale).max()))
        count += 1
    if furthest < goal and count < MOST:
        return None
    limit = mean + furthest * scale
    for layer, (form, trace) in zip(layers, limit.tolist(), strict=True):
        out[layer] = Drawing((1 + trace) * form + trace, trace, form, count)
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


def _theirs(case: Case, layer: str) -> Array | None:
    """(form, trace) of theirs less what rounding explains; None without a G to compare.

    The trace is that of K, tr A · tr G, which no gauge changes; tr G where there is no A.
    """
    one, ours = case.theirs(layer), case.ours(layer)
    G = _matrix(case, layer, one)
    if G is None or G.shape != ours.sum_G.shape or not np.isfinite(G).all():
        return None
    found = measure(G, ours.G, None, 1)
    off = abs(found.ratio - 1)
    free = case.dump.scale_free or one.G is None  # eigenvalues may have any scale
    A = None if one.A is None else _square(one.A)
    if A is not None and A.shape == ours.sum_A.shape:
        off = abs(measure(A, ours.A, None, 1).ratio * found.ratio - 1)
    budget = case.budget(layer, case.arithmetic.stored or "float64")
    numbers = np.array([found.form - budget, 0.0 if free else off - 2 * budget])
    return np.asarray(np.nan_to_num(numbers, nan=np.inf, posinf=np.inf))


def _matrix(case: Case, layer: str, one: Theirs) -> Array | None:
    """G of theirs, or what its eigenvectors and eigenvalues make."""
    if one.G is not None:
        return _square(one.G)
    U, lam = as_columns(case, layer, one).U_G, one.lam
    if U is None or lam is None or U.shape != (len(lam), len(lam)):
        return None
    return np.asarray((U * lam) @ U.T)


def _square(X: Array) -> Array:
    return np.asarray(np.diag(X) if X.ndim == 1 else X)


def _numbers(case: Case, layers: Sequence[str], each: int) -> Iterator[Array]:
    """(layers, 2) of each honest dump: its form and its trace beside ours."""
    ours = {layer: case.ours(layer).G for layer in layers}
    for dumps in _honest(case, layers, each):
        found = [_beside(dumps[layer], ours[layer]) for layer in layers]
        yield from np.stack(found, axis=1)


def _beside(G_KOO: Array, ours: Array) -> Array:
    """`measure` of K matrices at once: (K, 2), form and |ratio − 1|."""
    trace_K = np.trace(G_KOO, axis1=1, axis2=2)
    own = float(np.trace(ours))
    unit_KOO = G_KOO / np.where(trace_K > 0, trace_K, 1)[:, None, None]
    apart_K = np.linalg.norm(unit_KOO - ours / own, axis=(1, 2))  # of 0 it is all of ours
    return np.stack([apart_K / (float(norm(ours)) / own), abs(trace_K / own - 1)], axis=1)


def honest(case: Case, layers: Sequence[str], each: int) -> Iterator[Mapping[str, Array]]:
    """G of some layers, from `each` draws of all labels, dump after dump without end."""
    for dumps in _honest(case, layers, each):
        for k in range(len(next(iter(dumps.values())))):
            yield {layer: G[k] for layer, G in dumps.items()}


def _honest(case: Case, layers: Sequence[str], each: int) -> Iterator[Mapping[str, Array]]:
    """As `honest`, (K, O, O) of K dumps at a time.

    Every draw is a copy of the corpus, whose sequences have indices of their own (SAMPLING). So one
    pass over all copies draws for each anew.
    """
    assert case.model is not None and case.corpus is not None
    model = case.model
    fisher = "signed" if case.dump.declared.get("fisher") == "signed" else "sampled"
    units = shards(case.corpus, model.config, case.reference.rows)
    parameters, job = resident(model), sweep_of("validate", layers, fisher, SEED, 1)
    sizes = {layer: len(case.ours(layer).sum_G) for layer in layers}
    rows = {layer: each * case.ours(layer).n_A for layer in layers}
    widest = max(unit.label_BT.size for unit in units)
    wide = model.config.vocabulary + sum(n for n in sizes.values())
    room = each * widest * wide + sum(n * n for n in sizes.values())
    dumps, drawn = max(1, min(PILOT + 8, TOGETHER // room)), 0
    while True:
        sums = {layer: np.zeros((dumps, n, n)) for layer, n in sizes.items()}
        for unit in units:
            copies = _copies(unit, dumps * each, drawn, len(case.corpus.label))
            taken: dict[str, list[Array]] = {layer: [] for layer in layers}
            sweep(model.config, parameters, copies, job, partial(_keep, taken))
            for layer, g in taken.items():
                g_KNO = np.concatenate(g).reshape(dumps, -1, sizes[layer])
                sums[layer] += g_KNO.swapaxes(1, 2) @ g_KNO
        yield {layer: one / rows[layer] for layer, one in sums.items()}
        drawn += dumps * each


def _copies(unit: Shard, count: int, drawn: int, sequences: int) -> Shard:
    """A shard `count` times, one behind the other; `drawn`, copies that there were before."""
    here = unit.of(np.tile(np.arange(len(unit.index_B)), count))
    copy = np.repeat(drawn + np.arange(count), len(unit.index_B))
    return replace(here, index_B=here.index_B + copy * sequences)


def _keep(taken: Mapping[str, list[Array]], _: int, tap: Tap) -> None:
    taken[tap.name].append(tap.g)


def unlike(case: Case, near: Mapping[str, float]) -> bool:
    """Has theirs G of all these layers nearer to a hypothesis than any honest dump to theirs?

    Where labels are nearly certain, honest ones are often those of a hypothesis, and prove nothing.

    Args: near, layer → how near an honest dump must come to theirs to be as good, up to a factor.
    """
    if case.drawn is None:
        return True
    theirs = {layer: _square(G) for layer in near if (G := case.theirs(layer).G) is not None}
    return not any(
        fitted(theirs[x], dump[x])[0] <= near[x]
        for dump in islice(honest(case, list(theirs), _draws(case)), CONFIRMED)
        for x in theirs
    )


def _untold(case: Case) -> list[str]:
    """Layers of which nothing tells how much drawing labels changes."""
    drawn = case.reference.fisher not in (Fisher.EMPIRICAL, Fisher.EXPECTED)
    told = parts_of(case.reference) if drawn else {}
    enough = {"error_G", "error_trace_G"}
    left = [name for name in case.matched if not enough <= told.get(name, frozenset())]
    return [name for name in left if not drawing(case, name, None).known]


def _noise(case: Case) -> dict[str, tuple[float, float]] | None:
    """`Case.noise`, from eight draws on a few sequences; of a large model, on LAYERS layers too.

    The other layers are then taken to vary as much as the one of these that varies most.
    """
    model, corpus = case.model, case.corpus
    unknown = _untold(case)
    if model is None or corpus is None or not unknown:
        return None
    some, positions, at_once = unknown, SAMPLE, None
    if is_large(case):
        some, positions, at_once = spread(unknown, LAYERS), few_positions(case), 1
        model = held(case).single(model)
    few = part_of(corpus, slice(0, max(1, positions // corpus.label.shape[1])))
    case.say(f"how much drawing labels changes, on {len(few.label)} sequences")
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
