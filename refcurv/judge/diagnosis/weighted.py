"""Hypotheses that weight sequences and batches otherwise: B2, B3, B9, B11, B39, B41, B43, B46.

Theirs is Σ w_n P_n, P_n what sequence n adds to the sums (`variants.parts`). Each hypothesis is a
rule for w; theirs is w's sum times any number if it holds. The parts are corners of the matrices,
and so what is left is measured on corners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.deciding import words
from refcurv.judge.diagnosis.divisors import FEW
from refcurv.judge.diagnosis.hypotheses import damping
from refcurv.judge.diagnosis.search import ROUNDING, SHARPER, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left, Seen, fitted, see, usable
from refcurv.judge.diagnosis.variants import REFERENCE, Parts, Setting, parts
from refcurv.judge.diagnosis.variants.collecting import POSITIONS, sample
from refcurv.judge.diagnosis.work import WHOLE, cost
from refcurv.law.checks import Array
from refcurv.law.words import number_of

KEPT = ("ordinary", "first", "prompts")
"""The kinds of positions that are rows where the reference has the rows `reached`."""

WEIGHTED: Final = ("B2", "B3", "B9", "B11", "B39", "B41", "B43", "B46")
"""Faults that weight sequences or batches."""

LEAST = 0.1
"""A decay below this is the last batch alone (B41).  Chosen: nobody averages over so little."""

FITTED = 0.5
"""What a decay leaves, at most, of what the first batch alone leaves, or it is that (B41).

Chosen: one number that is fitted to rounding takes less of it away.
"""

WORKERS = (2, 3, 4, 6, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights of sequences under a fault, or two: `base` is then the first, which counts rows.

    counts: may n count the rows that are added ("own"), all ("every"), or either. whole: it says
    what the factor is, and holds where none is left. size: sequences of a batch, or of a step.
    often: are rows counted as often as they are added?
    """

    faults: tuple[str, ...]
    name: str
    weight: Array
    alike: tuple[str, ...] = ()
    base: Rule | None = None
    counts: tuple[str, ...] = ("own",)
    whole: bool = False
    size: int = 1
    often: bool = False

    def within(self, wanted: Collection[str]) -> bool:
        """Is it wanted, or what it stands on?"""
        own = [self.name, self.base.name] if self.base else [self.name]
        return not wanted or any(x.startswith(name) for x in wanted for name in own)


def _pairs(of: Parts, every: Sequence[Rule], wanted: Collection[str]) -> Iterator[Rule]:
    """What weighs A, and what weighs G alone beside. A worker has batches of its own sequences."""
    alone = (("B2",), ("B3",))
    for one in every:
        if one.faults in alone or not any(x.startswith(one.name) for x in wanted):
            continue
        own = one.weight > 0
        beside = [two for two in every if two.faults in alone]
        if one.faults == ("B46",):
            beside += _means(of.labels.astype(float), own)
        for two in beside:
            weight = one.weight * two.weight
            if (weight[own] != weight[own][0]).any():
                name = f"{one.name}, and {two.name}"
                yield Rule((*one.faults, *two.faults), name, weight, base=one)


def _means(terms: Array, own: Array) -> Iterator[Rule]:
    """Means over batches of these sequences in order, where batches have unlike many terms."""
    place = np.maximum(np.cumsum(own) - 1, 0)
    for size in range(2, int(own.sum())):
        m = np.bincount(place // size, terms * own)
        weight = np.where(m > 0, 1 / np.maximum(m, 1) ** 2, 0)[place // size]
        if (weight[own] != weight[own][0]).any():  # else it is B1
            some = "" if own.all() else " of its own"
            name = f"means over batches of {number_of(size, 'sequence')}{some}"
            yield Rule(("B2",), name, weight, size=size)


def weighs(idea: Idea) -> bool:
    """Is it one of the rules for weights?"""
    return idea.setting is None and bool(idea.faults) and idea.faults[0] in WEIGHTED


def lone(one: Chosen, layers: Collection[str]) -> bool:
    """Are these weights that explain few of these layers?

    Batches and sequences weigh the same in all layers. A rule whose numbers are fitted leaves
    nothing of a matrix of few entries, whatever it is.

    Proof: tests/test_judge_residues.py::test_weights_of_one_layer_do_not_end_the_search
    """
    return weighs(one.idea) and 2 * len(one.left) < len(layers)


def leave_lone(side: Side) -> None:
    """Give up weights that explain few of the layers that are off, where others stay unexplained.

    Proof: tests/test_judge_residues.py::test_weights_of_one_layer_alone_are_none
    """
    off = {x for one in side.chosen for x in one.left} | {*side.open()}
    few = [one for one in side.chosen if lone(one, off)]
    if few and side.unexplained():
        side.chosen = [one for one in side.chosen if one not in few]


def weigh(
    case: Case,
    found: Mapping[str, Side],
    side: str,
    layers: Sequence[str],
    wanted: Collection[str] = (),
    decaying: bool = True,
    under: Setting = REFERENCE,
) -> None:
    """Enter what each rule leaves in these layers.

    Args: wanted, names of rules that were found before: these alone; decaying, are decays fitted?
        under, of which labels and network the sequences are, where a name does not say it.
    """
    if case.model is None or case.corpus is None or not layers:
        return
    if sample(case, POSITIONS)[1] < 1 or cost(case) > WHOLE:
        return  # weights of sequences that were not read are unknown
    case.say("batches and workers, on all sequences")
    under, more = _setting(case, wanted, under)
    of = parts(case, layers, under)
    those = list(_those(case, found, side, of))
    decays: dict[str, Decay] = case.once("decays", dict)
    if decaying and not wanted:
        for decay in _decays(of, those):
            decays.setdefault(decay.name, decay)  # few digits come first
    every = [*rules(of, side), *(decay.rule(of) for decay in decays.values())]
    every += [*_pairs(of, every, wanted), *_uncalled(of, wanted)] if side == "G" else ()
    for one in those:
        # layers of images have other rows than blocks: patches alone, or one for each image
        share = case.counts(one.layer).ours["A"] / max(1.0, float(of.kept.sum()))
        for rule in (rule for rule in every if rule.within(wanted)):
            counted = _counted(rule, of) * share
            if not counted:
                continue  # sequences without a row
            Y = np.tensordot(rule.weight, one.each, 1)
            error, r = fitted(one.T, Y / counted)
            wider = _wider(rule.weight, np.trace(one.each, axis1=1, axis2=2))
            note, faults = f"{rule.name}{more}", (*rule.faults, *under.faults)
            rows = _rows(one.seen, rule, {"own": counted, "every": float(of.kept.sum()) * share})
            left = Left(error, r, note, rule.alike, rows, wider=wider)
            if rule.whole and not found[side].unit(one.layer, left):
                continue
            found[side].add(Idea(faults, None, note), one.layer, left)
            drawn = found[side].ladders[one.layer].drawn > 0
            if one.budget < error < math.inf and not (drawn or more):
                _add_damped(found[side], rule, one, Y / counted, left)


def _setting(case: Case, wanted: Collection[str], under: Setting) -> tuple[Setting, str]:
    """The labels and the network of these rules, and how their names end."""
    known: dict[str, Setting] = case.once("settings of weights", dict)
    if under != REFERENCE:
        known[f", {words(under)}"] = under
        return under, f", {words(under)}"
    ends = (end for end in known if any(name.endswith(end) for name in wanted))
    more = next(ends, "")
    return known.get(more, REFERENCE), more


def _add_damped(side: Side, rule: Rule, one: _Layer, Y: Array, before: Left) -> None:
    """The same with damping beside, where that explains all that is left."""
    for damped in damping(one.T, Y):
        error, r = fitted(one.T, damped.Y)
        if error <= min(2 * one.budget, before.error / SHARPER):
            note = f"{rule.name}, and {damped.note}"
            left = replace(before, error=error, ratio=r, note=note, blur=damped.blur)
            idea = Idea((*rule.faults, *damped.faults), None, f"{rule.name}, and damping")
            side.add(idea, one.layer, left)


class _Layer(NamedTuple):
    """One layer: what is seen of it, a corner of theirs, and what each sequence adds to ours."""

    layer: str
    seen: Seen
    T: Array
    each: Array
    budget: float


def _those(case: Case, found: Mapping[str, Side], side: str, of: Parts) -> Iterator[_Layer]:
    """The layers that theirs and ours have in one shape."""
    for layer in of.layers:
        seen, steps = see(case, layer).get(side), found[side].ladders.get(layer)
        if seen is None or steps is None or not usable(seen) or seen.T.shape != seen.X.shape:
            continue
        at = of.layers[layer].at_A if side == "A" else of.layers[layer].at_G
        T, each = seen.T[np.ix_(at, at)], of.whole(layer, side, KEPT)
        yield _Layer(layer, seen, T, each, steps.steps[0][1])


def _wider(weight: Array, trace: Array) -> float:
    """How many times more than their plain sum a weighted sum of the sequences varies by drawing.

    The traces vary each by itself, in proportion to their size.
    """

    def share(w: Array) -> float:
        return float(np.sqrt(((w * trace) ** 2).sum()) / max((w * trace).sum(), 1e-300))

    return max(1.0, share(weight) / max(share(np.ones_like(weight)), 1e-300))


def _rows(seen: Seen, rule: Rule, counted: Mapping[str, float]) -> float | None:
    """Theirs over what a rule counts, the nearest to 1 of what it may count."""
    every = [seen.rows(counted[which]) for which in (rule.base or rule).counts]
    return min((x for x in every if x is not None), key=lambda x: max(x, 1 / x), default=None)


def _counted(rule: Rule, of: Parts) -> float:
    """Rows: of what is not left out where weights are 0 or 1, or so often; else all."""
    weight = (rule.base or rule).weight
    if set(np.unique(weight)) <= {0.0, 1.0} or (rule.base or rule).often:
        return float(of.kept @ weight)
    return float(of.kept.sum())


def rules(of: Parts, side: str) -> Iterator[Rule]:
    """Every rule that says something on this corpus, without a number to fit."""
    N, order = len(of.sequences), np.arange(len(of.sequences))
    terms = of.labels.astype(float)
    if side == "G":
        inverse = np.where(terms > 0, 1 / np.maximum(terms, 1) ** 2, 0)
        yield Rule(("B3",), "each sequence's loss is divided by its labels", inverse)
        yield from _means(terms, np.ones(N, bool))
        yield from _growing(order)
        yield from _tails(N)
    for size in range(1, N):
        begin = (N - 1) // size * size
        for first, more in ((begin, ""), (N - size, ", which does not divide them")):
            if first == begin or begin != N - size:
                name = f"the last batch of {number_of(size, 'sequence')} alone{more}"
                last = (order >= first).astype(float)
                yield Rule(("B41",), name, last, counts=("own", "every"))
    yield from _anew(order)
    yield from _tried(order) if side == "A" else ()
    for world in (w for w in WORKERS if w <= N):
        for rank in range(world):
            every = (order % world == rank).astype(float)
            yield Rule(("B46",), f"worker {rank} of {world} alone, every {world}th", every)
            block = (order * world // N == rank).astype(float)
            yield Rule(("B46",), f"worker {rank} of {world} alone, a block", block)
    for size in range(1, N):  # the count goes on, or it is a worker's block
        name = f"the first batch of {number_of(size, 'sequence')} alone"
        yield Rule(("B41",), name, (order < size).astype(float), counts=("every",))


def _growing(order: Array) -> Iterator[Rule]:
    """The scale of a loss that mixed precision doubles, or halves, after so many sequences."""
    N = len(order)
    for size in range(1, N):
        step = order // size
        yield Rule(
            ("B11",),
            f"a scale of the loss that doubles every {number_of(size, 'sequence')}",
            4.0**step,
            size=size,
        )
        if 2 * size < N:
            later = (order >= size).astype(float)
            name = f"a scale of the loss that doubles once, after {size}"
            yield Rule(("B11",), name, 4**later, size=size)
        later = (order < size).astype(float)
        name = f"a scale of the loss that halves once, after {size}"
        yield Rule(("B11",), name, 4**later, size=size)


def _anew(order: Array) -> Iterator[Rule]:
    """Hooks that are registered once more for each batch: the k-th is added k times."""
    for size in range(1, len(order)):
        times = order // size + 1.0
        name = f"the k-th batch of {number_of(size, 'sequence')} is added k times"
        yield Rule(("B39",), f"{name}, and counted so often", times, size=size, often=True)
        yield Rule(("B39",), f"{name}, and counted once", times, counts=("every",), size=size)


def _tried(order: Array) -> Iterator[Rule]:
    """Hooks that see a forward of the first batch, for shapes, before the passes: without a slope.

    Proof: tests/test_judge_weights.py::test_a_forward_for_shapes_that_hooks_see_has_its_name
    """
    for size in range(1, len(order)):
        times = 1.0 + (order < size)
        name = f"the first batch of {number_of(size, 'sequence')} is added twice"
        yield Rule(("B39",), f"{name}, and counted twice", times, size=size, often=True)
        yield Rule(("B39",), f"{name}, and counted once", times, counts=("every",), size=size)


def _uncalled(of: Parts, wanted: Collection[str]) -> Iterator[Rule]:
    """G beside an A of `_tried`: no slope is added twice, and one count divides both."""
    N = len(of.sequences)
    for one in _tried(np.arange(N)):
        if any(x.startswith(one.name) for x in wanted):
            yield Rule(one.faults, one.name, np.ones(N), base=one, size=one.size)


def _tails(N: int) -> Iterator[Rule]:
    """The loss divided by so many accumulated batches, and at the end by those that are left."""
    for size, steps in ((b, k) for b in range(1, N) for k in range(2, min(FEW, (N - 1) // b) + 1)):
        first = N // (size * steps) * size * steps
        left = math.ceil((N - first) / size)
        if 0 < left < steps:
            name = f"the loss is divided by {steps} accumulated batches of "
            name += f"{number_of(size, 'sequence')}, and by the {left} at the end"
            divisor = np.where(np.arange(N) < first, steps, left)
            yield Rule(("B43",), name, 1.0 / divisor**2, whole=True, size=size * steps)


class Decay(NamedTuple):
    """A moving average over batches of `size` sequences, of one of KINDS, with a decay."""

    size: int
    kind: str
    decay: float

    @property
    def name(self) -> str:
        """In words."""
        batches = number_of(self.size, "sequence")
        kind = "from zero" if self.kind == WHOLE_BATCH else self.kind
        name = f"a moving average over batches of {batches}, {kind}, with decay {self.decay:.6g}"
        return name if kind == self.kind else f"{name}, {WHOLE_BATCH} {1 - self.decay:.6g}"

    def rule(self, of: Parts) -> Rule:
        """The weight of each sequence."""
        batch, rows = np.arange(len(of.sequences)) // self.size, _by_batch(of, self.size)
        w = _weights(self.kind, np.array([self.decay]), len(rows))[0]
        return Rule(("B9",), self.name, np.asarray((w / rows)[batch] * of.kept.sum()))


def _weights(kind: str, decay: Array, batches: int) -> Array:
    """What each batch weighs, for each decay."""
    last = batches - 1
    w: Array = (1 - decay)[:, None] * decay[:, None] ** (last - np.arange(batches))
    if kind == "from the first":
        w[:, 0] = decay**last
    elif kind == CORRECTED:
        w = w / w.sum(axis=1, keepdims=True)
    elif kind == WHOLE_BATCH:
        w = w / (1 - decay[:, None])
    return w


KINDS = ("from zero", "from the first")

CORRECTED = "from zero and corrected"
"""The same as from zero but for its scale, so that the same decay fits."""

WHOLE_BATCH = "a new batch with weight 1 instead of"
"""As CORRECTED: from zero, with another scale."""


MOST: Final = 64
"""Sequences of a batch, at most.  Chosen: moving averages are of small batches."""

NEAREST: Final = 6
"""Sizes and kinds of a moving average that are fitted to the last digit.  Chosen: another comes
nearer than the true one through what other faults leave alone."""

GRID: Final = np.linspace(0.02, 0.999, 50)
"""Decays where the search begins."""


def _decays(of: Parts, those: Sequence[_Layer]) -> Iterator[Decay]:
    """Moving averages of batches of any size, whose decay is fitted to all these layers at once.

    Definition
        Σ log(e² + b²) is least, e being what is left of a layer and b its budget: a layer that has
        another fault too has little weight. Few digits are tried as well, as people write them.

    Proof: tests/test_judge_factors.py::test_a_moving_average_of_batches_of_any_size_has_its_name
    """
    for size, kind, near in _nearest(of, those):
        u = _by_batch(of, size)
        sums = [np.add.reduceat(x.each, _begins(of, size)) for x in those]

        def each(
            decay: float, kind: str = kind, u: Array = u, sums: list[Array] = sums
        ) -> list[float]:
            w = _weights(kind, np.array([decay]), len(u))[0] / u
            return [fitted(x.T, np.tensordot(w, Y, 1))[0] for x, Y in zip(those, sums, strict=True)]

        def off(decay: float, each: Callable[[float], list[float]] = each) -> float:
            left = zip(each(decay), those, strict=True)
            return sum(math.log(e**2 + x.budget**2) for e, x in left)

        bounds = GRID[max(near - 1, 0)], GRID[min(near + 1, len(GRID) - 1)]
        decay = float(minimize_scalar(
            off, bounds=bounds, method="bounded", options={"xatol": 1e-12}
        ).x)  # fmt: skip
        first = kind == KINDS[1] and all(
            FITTED * whole <= max(e, ROUNDING)
            for e, whole in zip(each(decay), each(1.0), strict=True)
        )
        if decay >= LEAST and not first:
            for value in dict.fromkeys([*(round(decay, k) for k in (2, 3, 4)), decay]):
                yield Decay(size, kind, value)
                if kind == "from zero":
                    yield from (Decay(size, same, value) for same in (CORRECTED, WHOLE_BATCH))


def _nearest(of: Parts, those: Sequence[_Layer]) -> list[tuple[int, str, int]]:
    """(size, kind, place in GRID) of what comes nearest: |T − r Y|² by inner products alone."""
    inner = []
    for x in those:
        P = x.each.reshape(len(x.each), -1)
        inner.append((P @ P.T, P @ x.T.ravel(), float(np.vdot(x.T, x.T)), x.budget**2))
    found = []
    for size in range(1, min(MOST, len(of.sequences) // 2) + 1) if those else ():
        u, at = _by_batch(of, size), _begins(of, size)
        each = [
            (np.add.reduceat(np.add.reduceat(M, at), at, 1), np.add.reduceat(t, at), T, b)
            for M, t, T, b in inner
        ]
        for kind in KINDS:
            w = _weights(kind, GRID, len(u)) / u
            total = sum(_log_left(w, *one) for one in each)
            place = int(np.argmin(total))
            found.append((float(np.asarray(total)[place]), size, kind, place))
    return [one[1:] for one in sorted(found)[:NEAREST]]


def _log_left(w: Array, M: Array, t: Array, T: float, b: float) -> Array:
    """log(e² + b²) of each row of weights, but for what inner products lose."""
    hit = np.maximum((w @ t) ** 2 / np.maximum(((w @ M) * w).sum(axis=1), 1e-300), 1e-300)
    return np.asarray(np.log(np.maximum(T - hit, 0) / hit + b + 1e-14))


def _begins(of: Parts, size: int) -> Array:
    return np.arange(0, len(of.sequences), size)


def _by_batch(of: Parts, size: int) -> Array:
    """The rows of each batch of so many sequences."""
    return np.maximum(np.add.reduceat(of.kept.astype(float), _begins(of, size)), 1)
