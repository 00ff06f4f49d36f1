"""Passes with the whole model in memory: every shard forward, and backward as far as is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from refcurv.law.checks import Array, EmptyError
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import Model, ModelConfig
from refcurv.model.layers import Layout
from refcurv.model.loss import cross_entropy, draw_labels, root_product, signs, uniforms
from refcurv.model.transformer import (
    TABLES,
    Cotangent,
    Inputs,
    Parameters,
    Slope,
    Steps,
    Tap,
    Trace,
)
from refcurv.passes.fast import FAST
from refcurv.passes.shards import Shard, inputs_of


def resident(model: Model) -> dict[str, Array]:
    """Every parameter, read once, in the model's dtype."""
    return {name: np.asarray(model.parameters[name]) for name in model.config.parameter_shapes()}


DRAWN = (Fisher.SAMPLED, Fisher.SIGNED)
"""The Fishers that draw something: labels, or signs."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a pass is to do: for which layers, against whose labels, how many draws of them."""

    layers: frozenset[str]
    fisher: Fisher
    seed: int = 0
    draws: int = 1

    @property
    def one_pass(self) -> bool:
        """Is there one backward pass to a shard?"""
        return self.draws == 1 and self.fisher is not Fisher.EXPECTED

    @property
    def inputs(self) -> frozenset[str]:
        """The wanted layers below all blocks: patches, tables."""
        return self.layers & {"patch", *TABLES}

    def lowest(self, config: ModelConfig) -> int:
        """The lowest block that a wanted layer belongs to; `config.layers` if none does."""
        if self.inputs:
            return 0
        blocks = [int(name.split(".")[1]) for name in self.layers if name.startswith("blocks.")]
        return min(blocks, default=config.layers)


Take = Callable[[int, Tap], None]
"""Receives (backward pass, Tap) with the kept rows of one wanted layer: a (N, I), g (N, O)."""


def sweep(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep, take: Take
) -> None:
    """One shard: forward once, backward once per cotangent; every wanted layer's rows go to `take`.

    They come top down (the head in chunks of HEAD_ROWS), in the same order for every shard and
    pass. Layers that read the same input carry the very same array `a`. Nothing below the lowest
    wanted layer is computed.

    Raises EmptyError for patches of which no row is kept.
    """
    _require_patches(config, shard, job)
    final_BTD, trace = transformer.forward(
        config, parameters, inputs_of(config, shard), shard.layout, FAST, job.lowest(config)
    )
    want_head = "head" in job.layers
    rows = _Rows(shard.keep_BT)
    passes = cotangents(shard, job, config.vocabulary)
    for number, cotangent in enumerate(passes):
        head = transformer.head_transpose(config, parameters, final_BTD, shard.head_BT, cotangent)
        d_final_BTD = transformer.drain(
            head, partial(_take_taps, take, number) if want_head else _ignore
        )
        last = number == len(passes) - 1
        steps = transformer.blocks_backward(config, parameters, d_final_BTD, trace, FAST, last)
        for tap in _taps(config, trace, steps, job):
            take(number, Tap(tap.name, rows.of_input(tap.a), rows.of(tap.g)))


def _require_patches(config: ModelConfig, shard: Shard, job: Sweep) -> None:
    if config.image is None or "patch" not in job.layers:
        return
    if not shard.keep_BT[:, len(config.image.specials) :].any():
        raise EmptyError("collect: 'patch' has no row among rows='cls'. Take rows='all' for it.")


def _taps(config: ModelConfig, trace: Trace, steps: Steps, job: Sweep) -> Iterator[Tap]:
    """The wanted layers' Taps without the head's, and no step behind the last of them."""
    missing = len(job.layers - job.inputs - {"head"})
    while missing:
        step = next(steps)
        if isinstance(step, Tap) and step.name in job.layers:
            yield step
            missing -= 1
    if job.inputs:
        d_x_BTD = transformer.drain(steps, _ignore)
        for tap in transformer.input_taps(config, trace.inputs, trace.layout, d_x_BTD):
            if tap.name in job.inputs:
                yield tap


def _take_taps(take: Take, number: int, step: Tap | Slope) -> None:
    if isinstance(step, Tap):
        take(number, step)


def _ignore(_step: Tap | Slope) -> None:
    """Nobody asked for the head's factors."""


class _Rows:
    """The kept rows (N, X) of (B, T, X), (N,) of (B, T); an input of two layers is selected once.

    Patches have no rows for the specials before them.
    """

    def __init__(self, keep_BT: Array) -> None:
        self._keep_BT = keep_BT
        self._all = bool(keep_BT.all())
        self._last: tuple[Array, Array] | None = None

    def of(self, x_BTX: Array) -> Array:
        x_NX = x_BTX.reshape(-1, *x_BTX.shape[2:])
        return x_NX if self._all else x_NX[self._keep_BT[:, -x_BTX.shape[1] :].reshape(-1)]

    def of_input(self, a_BTI: Array) -> Array:
        if self._last is None or self._last[0] is not a_BTI:
            self._last = (a_BTI, self.of(a_BTI))
        return self._last[1]


# ------------------------------------------------------------------ what is sent back


def cotangents(shard: Shard, job: Sweep, vocabulary: int) -> list[Cotangent]:
    """FISHER: what a shard's backward passes send back at the logits, one entry per pass."""
    draws = range(job.draws)
    match job.fisher:
        case Fisher.EMPIRICAL:
            return [partial(_corpus_slope, shard)]
        case Fisher.SAMPLED:
            return [partial(_drawn_slope, shard, job.seed, draw) for draw in draws]
        case Fisher.SIGNED:
            return [partial(_signed_root, shard, job.seed, draw) for draw in draws]
        case Fisher.EXPECTED:
            entries = range(vocabulary)
            at = labelled(shard)
            if not at:  # its rows have g = 0
                return [partial(_corpus_slope, shard)]
            return [partial(_root_column, shard, t, v) for t in at for v in entries]


def labelled(shard: Shard) -> list[int]:
    """The positions that have a label in any sequence of the shard."""
    return [int(t) for t in np.flatnonzero((shard.label_BT >= 0).any(axis=0))]


def _corpus_slope(shard: Shard, row_N: Array, logit_NV: Array) -> Array:
    """The gradient of the nats against the corpus's labels."""
    return cross_entropy(logit_NV, shard.label_BT.reshape(-1)[row_N])[1]


def _drawn_slope(shard: Shard, seed: int, draw: int, row_N: Array, logit_NV: Array) -> Array:
    """The gradient against labels drawn from the model wherever the corpus has one (SAMPLING)."""
    T = shard.label_BT.shape[1]
    b_N, t_N = np.divmod(row_N, T)
    first, last = b_N[0], b_N[-1]  # rows ascend
    uniform_BT = np.stack(
        [uniforms(seed, draw, int(index), T) for index in shard.index_B[first : last + 1]]
    )
    drawn_N = draw_labels(logit_NV, uniform_BT[b_N - first, t_N])
    label_N = shard.label_BT.reshape(-1)[row_N]
    return cross_entropy(logit_NV, np.where(label_N >= 0, drawn_N, label_N))[1]


def _signed_root(shard: Shard, seed: int, draw: int, row_N: Array, logit_NV: Array) -> Array:
    """S ε wherever the corpus has a label, ε the signs of SAMPLING: E(S ε εᵀ Sᵀ) = S Sᵀ."""
    b_N, t_N = np.divmod(row_N, shard.label_BT.shape[1])
    at = np.flatnonzero(shard.label_BT[b_N, t_N] >= 0)
    sign_NV = np.empty((len(at), logit_NV.shape[1]), np.int8)
    for n, row in enumerate(at):
        index, t = int(shard.index_B[b_N[row]]), int(t_N[row])
        sign_NV[n] = signs(seed, draw, index, t, logit_NV.shape[1])
    d_logit_NV = np.zeros_like(logit_NV)
    d_logit_NV[at] = root_product(logit_NV[at], sign_NV)
    return d_logit_NV


def _root_column(shard: Shard, t: int, v: int, row_N: Array, logit_NV: Array) -> Array:
    """Column v of S at position t alone, of the sequences that have a label there; elsewhere 0."""
    b_N, t_N = np.divmod(row_N, shard.label_BT.shape[1])
    at = np.flatnonzero((t_N == t) & (shard.label_BT[b_N, t_N] >= 0))
    onehot_V = np.arange(logit_NV.shape[1]) == v
    d_logit_NV = np.zeros_like(logit_NV)
    d_logit_NV[at] = root_product(logit_NV[at], np.broadcast_to(onehot_V, (len(at), len(onehot_V))))
    return d_logit_NV


# ------------------------------------------------------------------ forward alone


def final_states(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout
) -> Array:
    """What the head reads, (B, T, D) or pooled (B, 1, D); nothing is kept for a backward."""
    return transformer.forward(config, parameters, inputs, layout, FAST, lowest=config.layers)[0]


def nats(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, label_BT: Array, layout: Layout
) -> Array:
    """Nats of every labelled position, 0 elsewhere, (B, T) in the model's dtype."""
    final_BTD = final_states(config, parameters, inputs, layout)
    head = transformer.head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0)
    return transformer.drain(head, _ignore).nats_BT


def layer_inputs(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout, layers: list[str]
) -> dict[str, Array]:
    """The inputs (B, T, I) of the named layers, from one forward pass."""
    lowest = Sweep(frozenset(layers), Fisher.EMPIRICAL).lowest(config)
    final_BTD, trace = transformer.forward(config, parameters, inputs, layout, FAST, lowest)
    out: dict[str, Array] = {}
    for name in layers:
        if name in ("head", "patch"):
            out[name] = final_BTD if name == "head" else trace.inputs
            continue
        _, block, part, layer = name.split(".")
        kept = getattr(trace.blocks[int(block) - lowest], part)
        out[name] = getattr(kept, {"o": "context", "down": "hidden"}.get(layer, "a"))
    return out
