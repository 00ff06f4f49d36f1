"""What A and G are sums of: every sequence's share, and that of every kind of position in it.

If another program weights sequences or batches otherwise (B2, B3, B9, B41, B46), or counts other
positions, its A and G are sums of these with other coefficients, which non-negative least squares
finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.variants.collecting import (
    WORK,
    exactly,
    held,
    rows_of,
    sample,
    with_ones,
)
from refcurv.judge.diagnosis.variants.flows import Flow, flows
from refcurv.judge.diagnosis.variants.labels import choice
from refcurv.judge.diagnosis.variants.networks import changed
from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.judge.diagnosis.variants.setting import REFERENCE, Setting
from refcurv.law.checks import Array
from refcurv.model.config import TABLES

KINDS: Final = ("ordinary", "first", "prompts", "last", "pads")
"""Kinds of positions; each position is of the last of these that fits (`Positions.kinds`).

Under the rows `reached` the first three are the rows; `last` are real positions behind every label.
"""

CORNER = 64
"""Of how many of its coordinates a layer's parts are kept: their squares are 4,096 equations."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One layer's sums for each of N sequences and each of KINDS.

    Fields: at_A (s,), at_G (s,), the coordinates that are kept, in order; A (N, kinds, s, s), Σ a
    aᵀ restricted to them; G (N, kinds, s, s), Σ g gᵀ, over draws divided by these.
    """

    at_A: Array
    A: Array
    at_G: Array
    G: Array


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of some layers.

    Fields: sequences (N,), their rows in the corpus, ascending; rows (N, kinds), how many positions
    there are; kept (N,), rows of the reference; labels (N,), positions with a label; layers; share,
    exact: as in `Moments`.
    """

    sequences: Array
    rows: Array
    kept: Array
    labels: Array
    layers: Mapping[str, Part]
    share: float
    exact: bool

    def whole(self, layer: str, side: str, kinds: Sequence[str]) -> Array:
        """(N, s, s): what some kinds of positions add to S_A or S_G, sequence by sequence."""
        sums = getattr(self.layers[layer], side)
        return np.asarray(sums[:, [KINDS.index(kind) for kind in kinds]].sum(axis=1))


def parts(
    case: Case,
    layers: Sequence[str],
    setting: Setting = REFERENCE,
    limit: int | None = None,
    most: float = WORK,
) -> Parts:
    """The parts of some linear layers, recomputed from model and corpus.

    The other arguments are those of `moments`; of the setting labels and network matter
    (`Setting.run`).

    Cost: a forward and its backward passes over the sequences; little memory.
    Proof: tests/test_judge_variants.py::test_parts_add_up
    """
    assert case.model is not None and case.corpus is not None
    config = case.model.config
    at, share = sample(case, limit)
    names = [name for name in layers if name not in TABLES]
    one = exactly(choice(setting.run, case.reference), at, config, most)
    net = changed(config, held(case), setting.network, setting.pads, fast=not one.many)
    shapes = config.linear_layers()
    N = len(at.index_B)
    found = {
        name: Part(*_empty(N, shapes[name][1] + (name in case.joint)), *_empty(N, shapes[name][0]))
        for name in names
    }
    place = {int(index): n for n, index in enumerate(at.index_B)}
    for flow in flows(net, at, one, names):
        here = np.array([place[int(index)] for index in flow.at.index_B])
        kind_BT = kinds_of(flow.at)
        for name, part in found.items():
            a, g = flow.read[name], flow.taps[name].g
            a = with_ones(a) if name in case.joint else a
            if flow.first:
                _add(part.A, here, a[..., part.at_A], _kind(name, kind_BT, flow, a))
            g = g[..., part.at_G] / np.sqrt(one.counted)
            _add(part.G, here, g, _kind(name, kind_BT, flow, g))
        del flow  # before the next one is made
    rows = np.stack([(kinds_of(at) == k).sum(axis=1) for k in range(len(KINDS))], axis=1)
    labels = (at.label_BT >= 0).sum(axis=1)
    return Parts(at.index_B, rows, at.keep_BT.sum(axis=1), labels, found, share, one.exact)


def kinds_of(at: Positions) -> Array:
    """(B, T): the number in KINDS of each position's kind."""
    out = np.zeros(at.real_BT.shape, dtype=np.int64)
    for number, kind in enumerate(KINDS[1:], start=1):
        out[at.kinds[kind]] = number
    return out


def _empty(N: int, size: int) -> tuple[Array, Array]:
    """Some coordinates, by chance but always the same ones, and no sums yet."""
    some = np.random.default_rng(size).choice(size, min(size, CORNER), replace=False)
    return np.sort(some), np.zeros((N, len(KINDS), len(some), len(some)))


def _kind(layer: str, kind_BT: Array, flow: Flow, x: Array) -> Array:
    """The kinds of a layer's own rows; a pooled head has ordinary ones, for each label."""
    if layer != "head" or x.shape[1] == kind_BT.shape[1]:
        return kind_BT[:, -x.shape[1] :]  # patches stand behind the specials
    return np.where(rows_of(layer, np.ones(kind_BT.shape), flow, x) > 0, 0, -1)


def _add(sums: Array, here: Array, x: Array, kind_BT: Array) -> None:
    """Sequence by sequence; of one sequence all passes at once."""
    for b, n in enumerate(here):
        own = x if len(here) == 1 else x[b : b + 1]
        for kind in range(len(KINDS)):
            x_NX = own[:, kind_BT[b] == kind].reshape(-1, x.shape[-1])
            if len(x_NX):
                sums[n, kind] += x_NX.T @ x_NX
