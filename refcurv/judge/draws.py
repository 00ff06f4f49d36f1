"""How far drawn labels take an honest program: honest dumps, drawn from model and corpus.

They are drawn until one lies as far from the reference as theirs, or MOST of them are all nearer.
Theirs, if honest, is one more of the same kind. It is the furthest of MOST + 1 with odds of
1/(MOST + 1), whatever the tails are, and over all numbers of all layers at once. So to stop at the
first that is as far costs nothing: no further one could make theirs the furthest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.factors import collect
from refcurv.curvature.factors_file import parts_of
from refcurv.judge.case import Case
from refcurv.judge.compare import (
    NOISE_DRAWS,
    drawing,
    factor_of,
    measure,
    one_draw,
    who_draws,
)
from refcurv.judge.diagnosis.search import spread
from refcurv.judge.diagnosis.variants.collecting import held
from refcurv.judge.diagnosis.work import cost, few_positions, is_large
from refcurv.judge.drawn import NO_DRAWING, Drawing
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import as_columns
from refcurv.judge.honest import series, source_of
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.law.words import number_of
from refcurv.model.part import part_of

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

WORK: Final = 2.0**33
"""Parameters times positions of all honest dumps, at most.  Chosen: some seconds."""

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
        each = case.draws()
        most = min(float(MOST), WORK / (cost(case) * each) - PILOT)
        drawn = _limits(case, each, int(most)) if most >= FEWEST else None
        if drawn is not None:
            return replace(case, drawn=drawn)
    return replace(case, noise=_noise(case))


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
    dumps = _numbers(case, each)
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
    small = [x for x in layers if (factor := _factor(case, x)) is not None and 2 * factor < 1]
    for layer, fewest in _least(case, each, small).items():
        out[layer] = replace(out[layer], below=min(out[layer].trace, 1 - fewest))
    return out


def _least(case: Case, each: int, layers: Sequence[str]) -> dict[str, float]:
    """The least factor of tr G that drawing explains in each of these layers.

    By |r − 1| no factor is further below 1 than 0 is, and few labels may well give twice G: then
    nothing would be too small. So r of theirs may be the square of the least of CONFIRMED honest
    dumps. These odds are squared then: near 0 a sum of squares has a density that is a power of r,
    and −ln r an exponential tail. 1/400 becomes 1/160,000 for each layer.

    Proof: tests/test_judge_drawing.py::test_nothing_is_too_small_by_drawing_alone
    """
    known = _traces(case, each) if layers else {}
    return {layer: max(min(known[layer]), 0.0) ** 2 for layer in layers if layer in known}


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
    found, factor = measure(G, ours.G, None, 1), _factor(case, layer)
    budget = case.budget(layer, case.arithmetic.stored or "float64")
    off = 0.0 if factor is None else abs(factor - 1) - 2 * budget
    numbers = np.array([found.form - budget, off])
    return np.asarray(np.nan_to_num(numbers, nan=np.inf, posinf=np.inf))


def _factor(case: Case, layer: str) -> float | None:
    """tr A · tr G of theirs over ours, tr G where there is no A; None if it may be any number."""
    one, ours = case.theirs(layer), case.ours(layer)
    if case.dump.scale_free or one.G is None:  # eigenvalues may have any scale
        return None
    G, A = _square(one.G), None if one.A is None else _square(one.A)
    if G.shape != ours.sum_G.shape:
        return None
    factor = factor_of(G, ours.G)
    if A is not None and A.shape == ours.sum_A.shape:
        factor *= factor_of(A, ours.A)
    return factor


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


def _numbers(case: Case, each: int) -> Iterator[Array]:
    """(layers, 2) of each honest dump: its form and its trace beside ours."""
    source = source_of(case, each)
    ours = {layer: case.ours(layer).G for layer in source.sizes}
    known = case.once("traces", dict[str, list[float]])
    for dumps in series(source):
        found = [_beside(dumps[layer], G) for layer, G in ours.items()]
        for layer, G in ours.items():
            ratio_K = np.trace(dumps[layer], axis1=1, axis2=2) / float(np.trace(G))
            known.setdefault(layer, []).extend(ratio_K.tolist())
        yield from np.stack(found, axis=1)


def traces(case: Case, layers: Sequence[str]) -> Array | None:
    """(N, layers): log tr G of honest dumps, less log tr of ours; N is CONFIRMED at least.

    None where none was drawn, or one has no trace. More are drawn where theirs was soon known to be
    no further than an honest one: the first few do not say how far these go.

    Proof: tests/test_judge_drawing.py::test_a_factor_is_known_from_many_honest_dumps
    """
    if case.drawn is None or not layers:
        return None
    each = case.draws()
    if not source_of(case, each).sizes.keys() >= {*layers}:
        return None
    known = _traces(case, each)
    of = np.array([known[layer] for layer in layers]).T
    return np.log(of) if (of > 0).all() else None


def _traces(case: Case, each: int) -> dict[str, list[float]]:
    """Layer → tr G of honest dumps over ours, CONFIRMED at least."""
    known = case.once("traces", dict[str, list[float]])
    if len(next(iter(known.values()), ())) < CONFIRMED:
        known.clear()
        deque(islice(_numbers(case, each), CONFIRMED), maxlen=0)  # it keeps them
    return known


def _beside(G_KOO: Array, ours: Array) -> Array:
    """`measure` of K matrices at once: (K, 2), form and |ratio − 1|."""
    trace_K = np.trace(G_KOO, axis1=1, axis2=2)
    own = float(np.trace(ours))
    unit_KOO = G_KOO / np.where(trace_K > 0, trace_K, 1)[:, None, None]
    apart_K = np.linalg.norm(unit_KOO - ours / own, axis=(1, 2))  # of 0 it is all of ours
    return np.stack([apart_K / (float(norm(ours)) / own), abs(trace_K / own - 1)], axis=1)


def unlike(case: Case, near: Mapping[str, float]) -> bool:
    """Has theirs G of all these layers nearer to a hypothesis than any honest dump to theirs?

    Where labels are nearly certain, honest ones are often those of a hypothesis, and prove nothing.

    Args: near, layer → how near an honest dump must come to theirs to be as good, up to a factor.
    """
    if case.drawn is None:
        return True
    given = {x: _square(G) for x in near if (G := case.theirs(x).G) is not None}
    theirs = {x: G / (float(norm(G)) or 1.0) for x, G in given.items()}  # it may be huge
    return not any(
        (apart(T, dumps[x]) <= near[x]).any()
        for dumps in confirmed(case)
        for x, T in theirs.items()
        if x in dumps and T.shape == dumps[x].shape[1:]
    )


def nearer(case: Case, Y: Mapping[str, Array], left: Mapping[str, float]) -> bool:
    """Is theirs nearer to Y, of some layers, than half of what any honest dump comes to it?

    Definition
        s(X) is the largest |X − Y| over the layers, each in units of the median of honest dumps.
        Theirs is named if 2 s(theirs) is below s of each of them, rounding included. An honest
        one, which is one more of them, is the nearest with odds of 1/(CONFIRMED + 1), and twice as
        near still more seldom. Where Y lies in the middle of them all none is far from it.

    Args: left, layer → what rounding may have taken of theirs, and what Y leaves of it.

    Proof: tests/test_judge_drawing.py::test_gold_labels_are_named_through_rounding
    """
    each: dict[str, list[Array]] = {layer: [] for layer in Y}
    for dumps in confirmed(case):
        for layer, found in each.items():
            if layer in dumps:  # of the others G is 0
                found.append(apart(dumps[layer], Y[layer]))
    far = {layer: np.concatenate(found) for layer, found in each.items() if found}
    unit = {layer: float(np.median(x)) for layer, x in far.items()}
    known = [layer for layer in far if unit[layer] > 0]
    if not known:
        return False
    own = max(left[layer] / unit[layer] for layer in known)
    return bool(2 * own < np.max([far[x] / unit[x] for x in known], axis=0).min())


def confirmed(case: Case) -> Iterator[Mapping[str, Array]]:
    """CONFIRMED honest dumps, some at a time."""
    left = CONFIRMED
    for dumps in series(source_of(case, case.draws())):
        yield {layer: G[:left] for layer, G in dumps.items()}
        left -= len(next(iter(dumps.values()), ()))
        if left <= 0 or not dumps:
            return


def apart(T: Array, Y: Array) -> Array:
    """The errors of `fitted` of many matrices at once, (..., O, O); one of the two may be alone.

    That is |T − r Y|/|r Y| of the r that fits best; inf where none above 0 does.
    """
    size = np.linalg.norm(Y, axis=(-2, -1))
    size = np.where(size > 0, size, 1)
    r = (T * Y).sum(axis=(-2, -1)) / size**2
    off = np.linalg.norm(T / np.where(r > 0, r, 1)[..., None, None] - Y, axis=(-2, -1)) / size
    return np.where(r > 0, off, np.inf)


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
    case.say(f"how much drawing labels changes, on {number_of(len(few.label), 'sequence')}")
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
