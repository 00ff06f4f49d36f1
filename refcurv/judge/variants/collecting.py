"""A and G as another program may have added them up, from the flows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.variants.flows import Flow, flows, input_tensor, output_tensor
from refcurv.judge.variants.labels import Choice, choice, passes
from refcurv.judge.variants.networks import changed
from refcurv.judge.variants.positions import Positions, positions, weights
from refcurv.judge.variants.setting import Setting
from refcurv.law.checks import Array, NonFiniteError
from refcurv.model.config import TABLES
from refcurv.model.weights import resident

POSITIONS = 4096
"""Positions of the corpus that are recomputed unless the caller says otherwise."""

PASSES = 2**14
"""Backward passes over single sequences, at most, for a mean over all labels; else it is estimated
by a few draws (`labels.ESTIMATES`)."""


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
    """The sums of one Side: Σ x xᵀ, Σ x and the count; and batches that are not yet full."""

    def __init__(self, way: Side) -> None:
        self.way = way
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
        elif self.way.pooling in ("sum", "mean"):
            size_B = w_BT.sum(axis=1)
            some = np.where(size_B > 0, size_B, 1) if self.way.pooling == "mean" else size_B * 0 + 1
            self._grow((w_BT[:, None, :] @ x)[:, 0] / some[:, None], joint)
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
        if self.way.pooling == "batch":
            x_NX = (w_T[:, None] * x).reshape(-1, x.shape[-1])
        else:
            x_NX = w_T @ x
        batch.alone += x_NX.T @ x_NX

    def _close(self, batch: Batch) -> None:
        """The mean over the sequences at each position, or over all rows, enters the sums."""
        if self.way.pooling == "batch":
            mean, size, n = batch.joint / batch.held, batch.held, float((batch.row_T > 0).sum())
        else:
            rows = max(batch.row_T.sum(), 1)
            mean, size, n = batch.joint.sum(axis=0, keepdims=True) / rows, rows, 1.0
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
    limit: int = POSITIONS,
    most: int = PASSES,
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
        limit: positions that are recomputed, at most, but one sequence at least: the sequences are
            spread evenly over the corpus. `Moments.share` says how many these are.
        most: passes over single sequences, at most, for an exact mean over labels.

    Cost: for each different `Setting.run` a forward and its backward passes over the sequences, and
        one product for each layer and Side; memory: the sums of all settings of one run.
    Proof: tests/test_judge_variants.py::test_the_reference_itself
    """
    assert case.model is not None and case.corpus is not None
    at, share = sample(case, limit)
    parameters = resident(case.model)
    names = [name for name in layers if name not in TABLES]
    runs: dict[Setting, list[Setting]] = {}
    for setting in wanted:
        runs.setdefault(setting.run, []).append(setting)
    for run, members in runs.items():
        one = exactly(choice(run, case.reference), at, case.model.config.vocabulary, most)
        net = changed(case.model.config, parameters, run.network, run.pads)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                totals = _totals(members, names, at)
                for flow in flows(net, at, one, names):
                    _take(flow, totals)
        except NonFiniteError:
            continue
        for setting in members:
            found = _finished(setting, names, totals, at, one, share)
            if found:
                yield setting, found


def sample(case: Case, limit: int) -> tuple[Positions, float]:
    """Sequences of the corpus, spread evenly, of at most `limit` positions; and their share."""
    assert case.model is not None and case.corpus is not None
    every = positions(case.corpus, case.model.config, case.reference.rows)
    N, T = every.real_BT.shape
    count = min(N, max(1, limit // T))
    return every.of(np.linspace(0, N - 1, count).round().astype(int)), count / N


def exactly(one: Choice, at: Positions, vocabulary: int, most: int) -> Choice:
    """The same choice, its mean over labels estimated where it would take too many passes."""
    return replace(one, exact=passes(one, at, vocabulary) <= most)


def ways(setting: Setting, layer: str, N: int) -> tuple[Side, Side]:
    """How a setting adds up A and G of a layer."""
    batch = setting.batch or N
    return (
        Side("A", layer, setting.tensor_A, setting.rows_A, setting.pooling_A, 0),
        Side("G", layer, setting.tensor_G, setting.rows_G, setting.pooling_G, batch),
    )


def _totals(members: Sequence[Setting], names: Sequence[str], at: Positions) -> dict[Side, Total]:
    N = len(at.index_B)
    return {way: Total(way) for s in members for name in names for way in ways(s, name, N)}


def _take(flow: Flow, totals: Mapping[Side, Total]) -> None:
    """Add what flowed to every total that reads it."""
    row_BT = {way.rows: weights(way.rows, flow.at) for way in totals}
    drawn = flow.first or flow.draw > 0
    for way, total in totals.items():
        if way.side == "A" and not flow.first:
            continue
        of = input_tensor if way.side == "A" else output_tensor
        x = of(flow, way.layer, way.tensor)
        if x is None:
            continue
        w_BT = rows_of(way.layer, row_BT[way.rows], flow, x)
        if way.side == "A":
            total.add(x, w_BT, joint=True, counted=True, draw=0)
        else:
            total.add(x, w_BT, flow.joint, drawn, flow.draw)


def rows_of(layer: str, w_BT: Array, flow: Flow, x: Array) -> Array:
    """The weights of a layer's rows: patches stand behind the specials, a pooled head has one."""
    if layer == "head" and x.shape[1] != w_BT.shape[1]:
        return np.asarray((flow.at.label_BT >= 0).astype(np.float64))
    return w_BT[:, -x.shape[1] :]


def _finished(
    setting: Setting, names: Sequence[str], totals: Mapping[Side, Total], at: Positions,
    one: Choice, share: float,
) -> dict[str, Moments]:  # fmt: skip
    out = {}
    for name in names:
        sides = [totals[way].finish() for way in ways(setting, name, len(at.index_B))]
        if not all(n > 0 and np.isfinite(square).all() for square, _, n in sides):
            continue
        (A, n_A), (G, n_G) = (
            _mean(setting, side, at, draws, pooling)
            for side, draws, pooling in zip(
                sides, (1, one.counted), (setting.pooling_A, setting.pooling_G), strict=True
            )
        )
        out[name] = Moments(A, n_A, G, n_G, share, one.exact)
    return out


def _mean(
    setting: Setting, side: tuple[Array, Array, float], at: Positions, draws: int, pooling: str
) -> tuple[Array, float]:
    """The mean square and its count, which is perhaps not that of the rows."""
    square, plain, n = side
    other = {
        "reference": at.keep_BT.sum(),
        "sequences": at.keep_BT.any(axis=1).sum(),
        "labels": (at.label_BT >= 0).sum(),
        "positions": at.real_BT.size,
    }
    n = n if setting.count == "rows" else float(other[setting.count] * draws)
    X = square / n
    if pooling == "centred":
        X = X - np.outer(plain, plain) / n**2
    return X, n
