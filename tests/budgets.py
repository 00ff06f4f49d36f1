"""Budgets that tests alone use, and how large a gradient's terms are before they cancel.

`gradient_scale` is the backward once more, with every product in absolute value: the sum over all
paths from the loss to a parameter of the magnitude of that path's product. A gradient that is zero
by theory, or that cancels, still has a large scale, and `path` times the scale bounds its error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from refcurv.judge.bench import attention_magnitudes
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig, Pool
from refcurv.model.layers import DEFINITIONS, Layout, Ops, Saved, softmax_over
from refcurv.model.transformer import Inputs, Parameters, Slope, Tap

OPERATIONS_PER_BLOCK = 64
"""Roundings on a path through one transformer block, outside its sums.

Chosen. A Llama block has about 35: two norms of 7, rotary 3, scale 1, softmax 5, gate 8, two
residual sums. Every option together makes about twice as many. Beside the sums this is little.
"""


def gram(rows: int, shards: int, dtype: DTypeLike) -> float:
    """A sum of outer products: `rows` in one shard in `dtype`, `shards` folded in float64.

    Relative to |X|ᵀ|X|, entry by entry. Cauchy-Schwarz makes that at most 1 on the diagonal.

    Kind: worst case, as `gamma`; of a hundred rows 4 % is used, of two thousand 1 %.
    """
    return tolerance.gamma(rows + 1, dtype) + tolerance.gamma(shards + 1, np.float64)


def path(depth: int, width: int, dtype: DTypeLike) -> float:
    """A value or gradient through `depth` transformer blocks, of sums of at most `width` terms.

    Relative to the sum over all paths of the magnitudes of their products (`gradient_scale`): the
    roundings on one path add up, whatever their order.

    The count is chosen, not proved. It has three sums a block: attention, up, down. In the worst
    case a path passes six forward and six backward, and the forward's own values have errors, which
    softmax enlarges where scores are large (`refcurv.passes.fast`). But roundings are of either
    sign, so that N of them add up like sqrt(N).

    Kind: chosen; gradients use 0.5 to 4 % of it.
    """
    return tolerance.gamma((depth + 1) * (3 * width + OPERATIONS_PER_BLOCK), dtype)


def _rms_norm_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    x_hat, r, s, gain = saved
    d_hat, x_hat = d_y * np.abs(gain), np.abs(x_hat)
    d_x = s * (r * (d_hat + x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True)))
    return d_x, (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)


def _centre(x: Array) -> Array:
    return np.asarray(x + x.mean(axis=-1, keepdims=True))


def _rotate(d_BTHE: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    d1, d2, rest = d_BTHE[..., :half], d_BTHE[..., half : 2 * half], d_BTHE[..., 2 * half :]
    cos, sin = np.abs(cos), np.abs(sin)
    return np.concatenate([d1 * cos + d2 * sin, d2 * cos + d1 * sin, rest], axis=-1)


def _mlp_backward(d_h: Array, saved: Saved) -> tuple[Array | None, Array]:
    """f and f' are sums too: |z| and 1 + |z| bound the terms of every activation's."""
    _activation, gate, up = saved
    if gate is None:
        return None, d_h * (1 + np.abs(up))
    return d_h * np.abs(up) * (1 + np.abs(gate)), d_h * np.abs(gate)


MAGNITUDES = Ops(
    DEFINITIONS.rms_norm_forward,
    _rms_norm_backward,
    _centre,
    _rotate,
    DEFINITIONS.attention_forward,
    attention_magnitudes,
    DEFINITIONS.mlp_forward,
    _mlp_backward,
)
"""The definitions forward; backward, of magnitudes, the magnitudes of all terms."""


def gradient_scale(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, label_BT: Array, layout: Layout
) -> dict[str, Array]:
    """For every parameter, the sum of the magnitudes of all terms of its gradient.

    Cost: one forward and two backward passes, N x V logits at once: for small models.
    Proof: tests/test_transformer.py::test_scale_bounds_the_rounding
    """
    final_BTD, trace = transformer.forward(config, parameters, inputs, layout)
    y_BTV = transformer.linear_forward(config, parameters, "head", final_BTD)
    logit_BTV = transformer.capped(config, y_BTV)
    d_logit = softmax_over(logit_BTV, np.ones(logit_BTV.shape, dtype=bool))
    b, t = np.nonzero(label_BT >= 0)
    d_logit[b, t, label_BT[b, t]] += 1
    d_logit[label_BT < 0] = 0
    g_BTV = transformer.uncapped(config, y_BTV, d_logit)
    positive = {name: np.abs(array) for name, array in parameters.items()}
    scale: dict[str, Array] = {}

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Slope):
            name, d = step.name, step.d
        else:
            g_NO = step.g.reshape(-1, step.g.shape[-1])
            name, a = config.weight_of(step.name), np.abs(step.a)
            if step.name == "head" and config.pool is Pool.MEAN:
                a = np.maximum(a, 1.0)  # normed vectors, of order 1, cancel in their mean
            d = g_NO.T @ a.reshape(-1, a.shape[-1])
        scale[name] = scale[name] + d if name in scale else d

    head = transformer.linear_backward(config, positive, "head", final_BTD, g_BTV)
    d_final_BTD = transformer.drain(head, take)
    for step in transformer.backward(config, positive, d_final_BTD, trace, MAGNITUDES):
        take(step)
    return scale
