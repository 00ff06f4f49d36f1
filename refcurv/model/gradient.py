"""LOSS over a batch, and its gradient for every parameter: forward, head, backward."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.layers import DEFINITIONS, Layout, Ops
from refcurv.model.transformer import (
    Inputs,
    Parameters,
    Slope,
    Tap,
    backward,
    drain,
    forward,
    head_transpose,
)


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """What the head found: nats_BT, 0 where unlabelled; d_final_BTD, the gradient of their sum."""

    nats_BT: Array
    d_final_BTD: Array


def head_backward(
    config: ModelConfig,
    parameters: Parameters,
    final_BTD: Array,
    label_BT: Array,
    keep_BT: Array,
    ops: Ops = DEFINITIONS,
) -> Generator[Tap | Slope, None, HeadLoss]:
    """Loss over the kept rows, and its gradient; yields the steps of `head_transpose`."""
    label_N = label_BT.astype(np.int64).reshape(-1)
    nats_N = np.zeros_like(final_BTD, shape=label_N.shape)

    def slope(row_N: Array, logit_NV: Array) -> Array:
        nats_N[row_N], d_logit_NV = ops.cross_entropy(logit_NV, label_N[row_N])
        return d_logit_NV

    d_final_BTD = yield from head_transpose(config, parameters, final_BTD, keep_BT, slope, ops)
    return HeadLoss(nats_N.reshape(label_BT.shape), d_final_BTD)


def slope_of(config: ModelConfig, step: Tap | Slope) -> tuple[str, Array]:
    """The parameter that a step is about, and what it adds to its gradient: Σ g aᵀ of a Tap."""
    if isinstance(step, Slope):
        return step.name, step.d
    g_NO = step.g.reshape(-1, step.g.shape[-1])
    return config.weight_of(step.name), g_NO.T @ step.a.reshape(-1, step.a.shape[-1])


def loss_and_gradient(
    config: ModelConfig,
    parameters: Parameters,
    inputs: Inputs,
    label_BT: Array,
    layout: Layout,
    ops: Ops = DEFINITIONS,
) -> tuple[Array, dict[str, Array]]:
    """LOSS: the summed nats over labelled positions, and its gradient for every parameter.

    A linear layer's gradient is Σ g aᵀ over positions; a tied embedding receives the head's too.
    Labels are (B, T), or (B, 1) where the model pools.

    Proof: tests/test_transformer.py::test_gradient_of_every_parameter_equals_complex_step
    """
    gradient: dict[str, Array] = {}

    def take(step: Tap | Slope) -> None:
        name, d = slope_of(config, step)
        gradient[name] = gradient[name] + d if name in gradient else d

    final_BTD, trace = forward(config, parameters, inputs, layout, ops)
    head = head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0, ops)
    loss = drain(head, take)
    for step in backward(config, parameters, loss.d_final_BTD, trace, ops):
        take(step)
    for name, shape in config.parameter_shapes().items():
        gradient.setdefault(name, np.zeros_like(final_BTD, shape=shape))  # no label anywhere
    return loss.nats_BT.sum(), {name: gradient[name] for name in config.parameter_shapes()}
