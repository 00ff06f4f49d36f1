"""Passes with the whole model in memory: every shard forward, and backward as far as is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import Model, ModelConfig
from refcurv.model.layers import Layout
from refcurv.model.loss import uniforms
from refcurv.model.transformer import Tap
from refcurv.passes.fast import FAST
from refcurv.passes.shards import Shard

Parameters = dict[str, Array]


def resident(model: Model) -> Parameters:
    """Every parameter, read once, in the model's dtype."""
    return {name: np.asarray(model.parameters[name]) for name in model.config.parameter_shapes()}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a pass is to do: for which layers, against whose labels, how many draws of them."""

    layers: frozenset[str]
    fisher: Fisher
    seed: int = 0
    draws: int = 1

    def lowest(self, config: ModelConfig) -> int:
        """The lowest block that a wanted layer belongs to; `config.layers` if none does."""
        blocks = [int(name.split(".")[1]) for name in self.layers if name.startswith("blocks.")]
        return min(blocks, default=config.layers)


Take = Callable[[int, Tap], None]
"""Receives (draw, Tap) with the kept rows of one wanted layer: a (N, I), g (N, O)."""


def sweep(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep, take: Take
) -> None:
    """One shard: forward once, backward once per draw; every wanted layer's rows go to `take`.

    They come top down (the head in chunks of HEAD_ROWS), in the same order for every shard and
    draw. Layers that read the same input carry the very same array `a`. Nothing below the lowest
    wanted layer is computed.
    """
    final_BTD, trace = transformer.forward(
        config, parameters, shard.token_BT, shard.layout, FAST, job.lowest(config)
    )
    want_head = "head" in job.layers
    rows = _Rows(shard.keep_BT)
    for draw in range(job.draws):
        uniform_BT = _uniforms(shard, job, draw) if job.fisher is Fisher.SAMPLED else None
        head = transformer.head_backward(
            config, parameters, final_BTD, shard.label_BT, shard.keep_BT, uniform_BT
        )
        loss = transformer.drain(head, partial(take, draw) if want_head else _ignore)
        last = draw == job.draws - 1
        steps = transformer.backward(config, parameters, loss.d_final_BTD, trace, FAST, last)
        missing = len(job.layers) - want_head
        while missing:
            step = next(steps)
            if isinstance(step, Tap) and step.name in job.layers:
                take(draw, Tap(step.name, rows.of_input(step.a), rows.of(step.g)))
                missing -= 1


def _ignore(_tap: Tap) -> None:
    """Nobody asked for the head's factors."""


class _Rows:
    """The kept rows of (B, T, X), (N, X); an input that two layers share is selected once."""

    def __init__(self, keep_BT: Array) -> None:
        self._keep_N = keep_BT.reshape(-1)
        self._all = bool(keep_BT.all())
        self._last: tuple[Array, Array] | None = None

    def of(self, x_BTX: Array) -> Array:
        x_NX = x_BTX.reshape(-1, x_BTX.shape[-1])
        return x_NX if self._all else x_NX[self._keep_N]

    def of_input(self, a_BTI: Array) -> Array:
        if self._last is None or self._last[0] is not a_BTI:
            self._last = (a_BTI, self.of(a_BTI))
        return self._last[1]


def _uniforms(shard: Shard, job: Sweep, draw: int) -> Array:
    length = shard.token_BT.shape[1]
    return np.stack([uniforms(job.seed, draw, int(i), length) for i in shard.index_B])


def final_states(
    config: ModelConfig, parameters: Parameters, token_BT: Array, layout: Layout
) -> Array:
    """What the head reads, (B, T, D); nothing is kept for a backward."""
    return transformer.forward(config, parameters, token_BT, layout, FAST, lowest=config.layers)[0]


def nats(
    config: ModelConfig, parameters: Parameters, token_BT: Array, label_BT: Array, layout: Layout
) -> Array:
    """Nats of every labelled position, 0 elsewhere, (B, T) in the model's dtype."""
    final_BTD = final_states(config, parameters, token_BT, layout)
    head = transformer.head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0)
    return transformer.drain(head, _ignore).nats_BT


def layer_inputs(
    config: ModelConfig, parameters: Parameters, token_BT: Array, layout: Layout, layers: list[str]
) -> dict[str, Array]:
    """The inputs (B, T, I) of the named MLP and attention layers, from one forward pass."""
    lowest = Sweep(frozenset(layers), Fisher.EMPIRICAL).lowest(config)
    final_BTD, trace = transformer.forward(config, parameters, token_BT, layout, FAST, lowest)
    reads = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "context"}
    reads |= {"gate": "mlp_in", "up": "mlp_in", "down": "hidden"}
    out: dict[str, Array] = {}
    for name in layers:
        if name == "head":
            out[name] = final_BTD
            continue
        _, block, _, layer = name.split(".")
        out[name] = getattr(trace.blocks[int(block) - lowest], reads[layer])
    return out
