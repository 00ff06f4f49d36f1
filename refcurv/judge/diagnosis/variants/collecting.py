"""A and G as another program may have added them up, from the flows of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from threading import Event
from typing import NamedTuple, TypeVar

import numpy as np

from refcurv.algebra import buffers
from refcurv.curvature.factors import Factors
from refcurv.curvature.room import available
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.variants.flows import (
    LOGITS,
    Flow,
    flows,
    input_tensor,
    output_tensor,
)
from refcurv.judge.diagnosis.variants.held import Held
from refcurv.judge.diagnosis.variants.labels import Choice, choice, passes
from refcurv.judge.diagnosis.variants.networks import Network, changed
from refcurv.judge.diagnosis.variants.positions import Positions, positions, turned, weights
from refcurv.judge.diagnosis.variants.setting import REDUCED, Setting
from refcurv.judge.diagnosis.variants.texts import text_of
from refcurv.law.checks import Array, NonFiniteError
from refcurv.law.conventions import NO_LABEL, SHARD_TOKENS, Fisher
from refcurv.model import transformer
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.sampling import draw_labels, uniforms
from refcurv.passes.groups import cores
from refcurv.passes.parallel import stream

Made = TypeVar("Made")

MORE = 8
"""Draws for each of theirs, at most.  Chosen: an eighth of their variance adds 6 % to an error."""

POSITIONS = 4096
"""Positions of a corpus of which every sequence is weighed by itself, at most."""

WORK = 2.0**33
"""Positions times parameters that a run may go through for an exact mean over labels; else that is
estimated by a few draws (`labels.ESTIMATES`).

Chosen: a few seconds.
"""


@dataclass(frozen=True, slots=True)
class Moments:
    """A and G of one layer under one setting, in the house's units (COUNTS).

    Fields: A (I, I), n_A, G (O, O), n_G; share, of the corpus's sequences that were recomputed:
    below 1 all is a sample, which theirs resembles and does not equal; exact, False where a mean
    over labels was estimated by a few draws.
    """

    A: Array
    n_A: float
    G: Array
    n_G: float
    share: float = 1.0
    exact: bool = True


class Side(NamedTuple):
    """One way to add up one side of a layer; settings that agree in it share the sums."""

    side: str
    layer: str
    tensor: str
    rows: str
    pooling: str
    batch: int


@dataclass(slots=True)
class Batch:
    """What is known of a batch that is not yet full (B44).

    Fields: joint (T, X), Σ over its sequences of what goes together; alone (X, X), the squares of
    what does not; row_T, how often each position is a row; held, its sequences.
    """

    joint: Array
    alone: Array
    row_T: Array
    held: int = 0


class Total:
    """The sums of one Side: Σ x xᵀ, Σ x and the count; and batches that are not yet full.

    ones: is the last coordinate of x 1 everywhere.
    """

    def __init__(self, way: Side, ones: bool = False) -> None:
        self.way, self.ones = way, ones
        self.square: Array = np.zeros(())
        self.plain: Array = np.zeros(())
        self.n = 0.0
        self._open: dict[int, Batch] = {}

    def add(self, x: Array, w_BT: Array, joint: bool, counted: bool, draw: int) -> None:
        """x (B, T, X) of B sequences with row weights (B, T); or x (passes, T, X) of one sequence.

        joint: do its sequences go together (`labels.Sent`). counted: do its rows count.
        """
        if self.way.pooling.startswith("batch"):
            for b, w_T in enumerate(w_BT):
                self._add_batch(x[b : b + 1] if joint else x, w_T, joint, counted, draw)
        elif self.way.pooling in REDUCED:
            size_B = w_BT.sum(axis=1)
            pooled = (w_BT[:, None, :] @ x)[:, 0]
            if self.way.pooling != "sum":
                kept = self.ones and self.way.pooling == "mean, ones summed"
                pooled[:, : -1 if kept else None] /= np.maximum(size_B, 1)[:, None]
            self._grow(pooled, joint)
            self.n += counted * float((size_B > 0).sum())
        else:
            w_N = np.broadcast_to(w_BT, x.shape[:2]).reshape(-1)
            x_NX = x.reshape(-1, x.shape[-1])
            for times in range(1, int(w_BT.max(initial=0)) + 1):
                self._grow(x_NX[w_N >= times], joint)
            self.n += counted * float(w_BT.sum())

    def _grow(self, x_NX: Array, joint: bool) -> None:
        self.square = self.square + x_NX.T @ x_NX
        self.plain = self.plain + (x_NX.sum(axis=0) if joint else 0)

    def _add_batch(self, x: Array, w_T: Array, joint: bool, counted: bool, draw: int) -> None:
        """One sequence, whose later passes do not count; the next one may find the batch full."""
        batch = self._open.get(draw)
        if batch and counted and batch.held == self.way.batch:
            self._close(self._open.pop(draw))
            batch = None
        if batch is None:
            T, X = x.shape[1:]
            batch = Batch(np.zeros((T, X)), np.zeros((X, X)), np.zeros(T))
            self._open[draw] = batch
        if counted:
            batch.row_T = batch.row_T + w_T
            batch.held += 1
        if joint:
            batch.joint += w_T[:, None] * x[0]
            return
        if self.way.pooling.startswith("batch and rows"):
            x_NX = w_T @ x
        else:
            x_NX = (w_T[:, None] * x).reshape(-1, x.shape[-1])
        batch.alone += x_NX.T @ x_NX

    def _close(self, batch: Batch) -> None:
        """The mean over the sequences at each position, or over all rows, enters the sums."""
        if self.way.pooling == "batch and rows":
            rows = max(batch.row_T.sum(), 1)
            mean, size, n = batch.joint.sum(axis=0, keepdims=True) / rows, rows, 1.0
        elif self.way.pooling.startswith("batch and rows"):  # the mean in each row's place
            n = batch.row_T.sum()
            size = math.sqrt(max(n, 1))
            mean = batch.joint.sum(axis=0, keepdims=True) / size
        elif self.way.pooling.endswith("row by row"):
            mean, n = batch.joint / np.sqrt(np.maximum(batch.row_T, 1))[:, None], batch.row_T.sum()
            size = math.nan if batch.alone.any() else 1.0  # how many rows each of these has
        else:
            mean, size, n = batch.joint / batch.held, batch.held, float((batch.row_T > 0).sum())
        self._grow(mean, joint=True)
        self.square = self.square + batch.alone / size**2
        self.n += n

    def finish(self) -> tuple[Array, Array, float]:
        """Σ x xᵀ, Σ x, n."""
        while self._open:
            self._close(self._open.popitem()[1])
        return self.square, self.plain, self.n


def moments(
    case: Case,
    wanted: Sequence[Setting],
    layers: Sequence[str],
    limit: int | None = None,
    most: float = WORK,
    through: Callable[[int], Array] | None = None,
    dtype: str | None = None,
) -> Iterator[tuple[Setting, dict[str, Moments]]]:
    """A and G of some layers as each setting makes them, recomputed from model and corpus.

    Definition
        As `curvature.definition`, but for what the setting says. `REFERENCE` gives the reference
        itself. Settings that agree in `Setting.run` share one forward and its backward passes, and
        come together, so that the order of `wanted` is not kept.

    Args:
        case: with a model and a corpus.
        wanted: settings. Those that leave the range of the dtype, and those whose positions no row
            is left of, are not yielded.
        layers: names of linear layers; tables are left out. A layer is missing from a result where
            it has no such tensor (`Setting.tensor_A`, `tensor_G`).
        limit: positions that are recomputed, at most, but one sequence at least; all by default.
            Sequences are spread evenly over the corpus. `Moments.share` says how many these are.
        most: positions times parameters that one run goes through, at most, for an exact mean over
            labels, each of whose passes is over a whole sequence.
        through: the size of a side → a matrix R of so many rows. Rᵀ A R and Rᵀ G R are then what
            is yielded, and A and G themselves are never made.
        dtype: of forward and backward; the model's own by default.

    Runs are worked on side by side, one to a core, and each by itself: no bit depends on how many.

    Cost: for each different `Setting.run` a forward and its backward passes over the sequences, and
        one product for each layer and Side; memory: the sums of all settings, and what flows over
        a shard of each run at work.
    Proof: tests/test_judge_variants.py::test_the_reference_itself,
        ::test_runs_side_by_side_are_the_same
    """
    assert case.model is not None
    config, parameters = case.model.config, held(case).as_dtype(dtype or case.model.dtype)
    at, share = sample(case, limit)
    at = with_given(case, at)
    names = [name for name in layers if name not in TABLES]
    runs: dict[Setting, list[Setting]] = {}
    for setting in wanted:
        runs.setdefault(setting.run, []).append(setting)

    def work(some: Sequence[Setting], over: Event) -> tuple[dict[Side, Total], Choice]:
        run = some[0].run
        read = text_of(at, run.text, run.token, config, rows)
        one = exactly(choice(run, drawn), read, config, most)
        net = changed(config, parameters, run.network, run.pads, fast=not one.many)
        return _added(net, read, one, names, some, through, joint, over), one

    rows, drawn, joint = case.reference.rows, few_draws(case), case.joint
    for members, (totals, one) in _side_by_side(runs.values(), work, _in_flight(config, at)):
        times = case.reference.draws / one.draws if one.counted > 1 else 1
        for setting in members if totals else ():
            found = {}
            for name in names:
                A, G = (
                    _mean(setting, totals[way], at, draws)
                    for way, draws in zip(ways(setting, name, at), (1, one.counted), strict=True)
                )
                if A is not None and G is not None:
                    found[name] = Moments(*A, G[0], G[1] * times, share, one.exact)
            if found:
                yield setting, found


def inputs(
    case: Case, wanted: Sequence[Setting], layers: Sequence[str], limit: int | None = None
) -> Iterator[tuple[Setting, dict[str, tuple[Array, float]]]]:
    """(A, n_A) of some layers as each setting makes them: `moments` without a backward pass.

    Settings that differ in labels alone have one forward.

    Proof: tests/test_judge_variants.py::test_inputs_alone_need_no_backward
    """
    assert case.model is not None
    config, parameters = case.model.config, held(case)
    at, _ = sample(case, limit)
    names = [name for name in layers if name not in TABLES]
    runs: dict[tuple[object, ...], list[Setting]] = {}
    for setting in wanted:
        key = setting.network, setting.pads, setting.text, setting.token
        runs.setdefault(key, []).append(setting)

    def work(some: Sequence[Setting], over: Event) -> dict[Side, Total]:
        one = some[0]
        net = changed(config, parameters, one.network, one.pads)
        read = text_of(at, one.text, one.token, config, rows)
        return _added(net, read, None, names, some, None, joint, over)

    rows, joint = case.reference.rows, case.joint
    for members, totals in _side_by_side(runs.values(), work, _in_flight(config, at)):
        for setting in members if totals else ():
            sides = {name: totals[ways(setting, name, at)[0]] for name in names}
            means = {name: _mean(setting, total, at, 1) for name, total in sides.items()}
            found = {name: mean for name, mean in means.items() if mean is not None}
            if found:
                yield setting, found


def _side_by_side(
    runs: Iterable[Sequence[Setting]],
    work: Callable[[Sequence[Setting], Event], Made],
    in_flight: int,
) -> Iterator[tuple[Sequence[Setting], Made]]:
    """Each run and what is made of it, in order; `work` is told when nobody waits any more."""
    every, over = list(runs), Event()
    made = stream(every, lambda _, some: work(some, over), in_flight=in_flight, stopping=over.set)
    return zip(every, made, strict=True)


def _in_flight(config: ModelConfig, at: Positions) -> int:
    """Runs at a time: one to a core, or as many as half of the free memory holds.

    Under a limit of the address space one, for which and for this thread BLAS has its buffers.
    """
    if buffers.address_space() is not None:
        buffers.with_buffers(2)
        return 1
    T = at.real_BT.shape[1] + (config.image.positions if config.image else 0)
    width = sum(map(sum, config.linear_layers().values()))
    each = max(T, SHARD_TOKENS) * (4 * width + 2 * config.layers * config.heads * T)  # numbers
    room = available()
    return cores() if room is None else max(1, min(cores(), room // 2 // (8 * each)))


def _added(
    net: Network,
    at: Positions,
    one: Choice | None,
    names: Sequence[str],
    members: Sequence[Setting],
    through: Callable[[int], Array] | None,
    joint: Set[str],
    over: Event,
) -> dict[Side, Total]:
    """The sums of all settings of one run; none if its numbers leave the range of the dtype.

    Args: joint, layers whose input has a last coordinate that is 1 (BIAS); over, does nobody wait
    for them any more?
    """
    every = (way for setting in members for name in names for way in ways(setting, name, at))
    ones = joint if through is None else frozenset()
    totals = {way: Total(way, way.side == "A" and way.layer in ones) for way in every}
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            for flow in flows(net, at, one, names):
                _take(flow, totals, through, joint)
                del flow  # before the next one is made
                if over.is_set():
                    return {}
    except NonFiniteError:
        return {}
    return totals


def held(case: Case) -> Held:
    """The parameters, read once for a case."""
    assert case.model is not None
    model = case.model
    return case.once("parameters", lambda: Held(model))


def sample(case: Case, limit: int | None) -> tuple[Positions, float]:
    """Sequences of the corpus, spread evenly, of at most `limit` positions; and their share."""
    assert case.model is not None and case.corpus is not None
    every = positions(case.corpus, case.model.config, case.reference.rows)
    N, T = every.real_BT.shape
    count = N if limit is None else min(N, max(1, limit // T))
    return every.of(np.linspace(0, N - 1, count).round().astype(int)), count / N


def with_given(case: Case, at: Positions) -> Positions:
    """The same with the labels that the reference draws, where theirs were given these.

    A network that is changed would draw others.
    """
    given = case.dump.declared.get("labels") == "given"
    if not given or case.reference.fisher is not Fisher.SAMPLED:
        return at
    key = "given", at.index_B.tobytes()
    return replace(at, drawn_BTN=case.once(key, lambda: _given(case, at)))


def _given(case: Case, at: Positions) -> Array:
    """(B, T, draws): the reference's labels at every position."""
    assert case.model is not None
    config, P, reference = case.model.config, held(case), case.reference
    net, (B, T) = changed(config, P, ()), at.real_BT.shape
    out = np.full((*at.label_BT.shape, reference.draws), NO_LABEL)
    step = max(1, LOGITS // (T * config.vocabulary))
    for begin in range(0, B, step):
        some = at.of(slice(begin, begin + step))
        inputs = some.inputs.astype(P["patch.weight"].dtype) if some.images else some.inputs
        final = transformer.forward(config, P, inputs, net.layout(some))[0]
        logit_NV = transformer.head_logits(config, P, final).reshape(-1, config.vocabulary)
        width = at.label_BT.shape[1]
        for draw in range(reference.draws):
            u = [uniforms(reference.seed, draw, int(n), width) for n in some.index_B]
            label_N = draw_labels(logit_NV, np.concatenate(u))
            out[begin : begin + step, :, draw] = label_N.reshape(-1, width)
    return out


def few_draws(case: Case) -> Factors:
    """The choices of the reference, but no more draws than MORE of each of theirs.

    Where theirs has fewer draws than the reference, its labels are others, and it varies by its own
    draws. Theirs that were given the labels of the reference have all of them.
    """
    ours, declared = case.reference.draws, case.dump.declared
    if ours <= MORE or declared.get("labels") == "given":
        return case.reference
    return replace(case.reference, draws=min(ours, MORE * case.draws()))


def exactly(one: Choice, at: Positions, config: ModelConfig, most: float) -> Choice:
    """The same choice, its mean over labels estimated where it would be too much work."""
    size = sum(math.prod(shape) for shape in config.linear_layers().values())
    work = passes(one, at, config.vocabulary) * at.real_BT.shape[1] * size
    return replace(one, exact=work <= most)


def ways(setting: Setting, layer: str, at: Positions) -> tuple[Side, Side]:
    """How a setting adds up A and G of a layer."""
    batch = setting.batch or len(at.index_B)
    return (
        Side("A", layer, setting.tensor_A, setting.rows_A, setting.pooling_A, 0),
        Side("G", layer, setting.tensor_G, setting.rows_G, setting.pooling_G, batch),
    )


def _take(
    flow: Flow,
    totals: Mapping[Side, Total],
    through: Callable[[int], Array] | None,
    joint: Set[str],
) -> None:
    """Add what flowed to every total that reads it."""
    row_BT = {way.rows: weights(way.rows, flow.at) for way in totals}
    drawn = flow.first or flow.draw > 0
    made: dict[tuple[str, str, str], Array | None] = {}
    for way in sorted(totals, key=lambda way: way.layer):  # block by block
        total = totals[way]
        if not (flow.first if way.side == "A" else flow.taps):
            continue
        of = input_tensor if way.side == "A" else output_tensor
        key = way.side, way.layer, way.tensor
        if key not in made:
            found = of(flow, way.layer, way.tensor)
            if found is not None and way.side == "A" and way.layer in joint:
                found = with_ones(found)
            small = None if through is None or found is None else found @ through(found.shape[-1])
            made[key] = found if through is None else small
        x = made[key]
        if x is None:
            continue
        w_BT = rows_of(way.layer, row_BT[way.rows], flow, x)
        if way.pooling.startswith("batch from the end") and w_BT.shape == flow.at.real_BT.shape:
            x, w_BT = (turned(y, flow.at.order_BT) for y in (x, w_BT))
        if way.side == "A":
            total.add(x, w_BT, joint=True, counted=True, draw=0)
        else:
            total.add(x, w_BT, flow.joint, drawn, flow.draw)


def with_ones(a: Array) -> Array:
    """[a; 1] of each position (BIAS)."""
    return np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)


def rows_of(layer: str, w_BT: Array, flow: Flow, x: Array) -> Array:
    """The weights of a layer's rows: patches stand behind the specials, a pooled head has one."""
    if layer == "head" and x.shape[1] != w_BT.shape[1]:
        return np.asarray((flow.at.label_BT >= 0).astype(np.float64))
    return w_BT[:, -x.shape[1] :]


def _mean(setting: Setting, total: Total, at: Positions, draws: int) -> tuple[Array, float] | None:
    """The mean square and its count, which is perhaps not that of the rows; None without rows."""
    square, plain, n = total.finish()
    if n <= 0 or not np.isfinite(square).all():
        return None
    other = {
        "reference": at.keep_BT.sum(),
        "sequences": at.keep_BT.any(axis=1).sum(),
        "every sequence": len(at.keep_BT),
        "labels": (at.label_BT >= 0).sum(),
        "positions": at.real_BT.size,
    }
    n = n if setting.count == "rows" else float(other[setting.count] * draws)
    X = square / n
    if total.way.pooling == "centred":
        X = X - np.outer(plain, plain) / n**2
    return X, n
