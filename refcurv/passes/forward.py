"""Forward passes with the whole model in memory."""

from __future__ import annotations

from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.gradient import head_backward
from refcurv.model.layers import Layout
from refcurv.model.transformer import Inputs, Parameters
from refcurv.passes.fast import FAST
from refcurv.passes.sweep import lowest_block


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
    head = head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0)
    return transformer.drain(head, lambda step: None).nats_BT


def layer_inputs(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout, layers: list[str]
) -> dict[str, Array]:
    """The inputs (B, T, I) of the named layers, from one forward pass."""
    lowest = lowest_block(config, layers)
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
