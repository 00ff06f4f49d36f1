"""The layers, each forward beside its hand-written backward. These are the definitions.

Pure NumPy, any of float32, float64, longdouble, complex128. A forward returns (output, saved); its
backward takes (gradient of the output, saved) and quotes the line that it differentiates. All of
it is analytic, so that a complex step through either is exact: nothing takes an absolute value, a
conjugate or a maximum of complex values, and branches look at the real part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refcurv.law.checks import Array

Saved = Any
"""What a forward hands its own backward; nobody else looks inside."""


# ------------------------------------------------------------------ positions


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each position stands in its segment, and which keys it sees: first <= s <= last.

    Fields: position_BT, first_BT, last_BT (B, T) int64. A padded position sees nothing
    (last = -1), and nothing sees it, for it stands right of every real one.
    """

    position_BT: Array
    first_BT: Array
    last_BT: Array


def causal_layout(real_BT: Array, segment_BT: Array) -> Layout:
    """The layout of right-padded, packed sequences: causal within a segment, positions restart.

    Args:
        real_BT: (B, T) bool, False on the padding at the right.
        segment_BT: (B, T) int; each segment is one contiguous run.
    """
    _B, T = real_BT.shape
    index_T = np.arange(T)
    starts_BT = np.ones(real_BT.shape, dtype=bool)
    starts_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    first_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
    return Layout(index_T - first_BT, first_BT, np.where(real_BT, index_T, -1))


def rope_tables(
    position_BT: Array, head_width: int, theta: float, dtype: np.dtype
) -> tuple[Array, Array]:
    """cos and sin of position · theta^(-2j/E), j < E/2, each (B, T, 1, E/2).

    Computed in float64 (longdouble for longdouble) and rounded once to the real part of `dtype`.
    """
    real = np.zeros(0, dtype).real.dtype
    wide: Any = np.longdouble if real == np.longdouble else np.float64
    exponent: Array = np.arange(0, head_width, 2).astype(wide)
    angle = position_BT[:, :, None, None].astype(wide) * wide(theta) ** (-exponent / head_width)
    return np.cos(angle).astype(real), np.sin(angle).astype(real)


def rotate(x_BTHE: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions, half-split: pairs are (x[j], x[j + E/2]).

    Its backward is rotate(d, cos, -sin).
    """
    half = x_BTHE.shape[-1] // 2
    x1, x2 = x_BTHE[..., :half], x_BTHE[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


# ------------------------------------------------------------------ RMSNorm


def rms_norm_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
    """y = gain · x / sqrt(mean(x²) + eps), over the last axis; eps inside the root."""
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    x_hat = x * r
    return x_hat * gain, (x_hat, r, gain)


def rms_norm_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    """Gradients of `rms_norm_forward` with respect to x and gain."""
    x_hat, r, gain = saved
    # forward:  y = x_hat * gain;  x_hat = x * r;  r = (mean(x²) + eps)^(-1/2)
    d_hat = d_y * gain
    d_x = r * (d_hat - x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True))
    d_gain = (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)
    return d_x, d_gain


# ------------------------------------------------------------------ attention


def visible_keys(layout: Layout, keys: int) -> Array:
    """(B, T, S) bool: may position t attend to key s?"""
    s = np.arange(keys)
    return (layout.first_BT[..., None] <= s) & (s <= layout.last_BT[..., None])


def softmax_over(score: Array, visible: Array) -> Array:
    """Softmax over the last axis among the visible entries; a row that sees nothing is 0."""
    top = np.where(visible, score.real, -np.inf).max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    e = np.where(visible, np.exp(np.where(visible, score - top, 0)), 0)
    total = e.sum(axis=-1, keepdims=True)
    return np.asarray(e / np.where(visible.any(axis=-1, keepdims=True), total, 1))


def attention_forward(
    q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, layout: Layout
) -> tuple[Array, Saved]:
    """Grouped-query attention; query head h reads key-value head h div R, R = H / K.

    score = q kᵀ / sqrt(E) over the visible keys; context = softmax(score) v, (B, T, H, E).
    """
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_BKRTE = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    k_BK1SE = k_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    v_BK1SE = v_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    scale = 1 / np.sqrt(np.asarray(E, dtype=q_BTHE.real.dtype))
    score_BKRTS = (q_BKRTE @ k_BK1SE.swapaxes(-1, -2)) * scale
    p_BKRTS = softmax_over(score_BKRTS, visible_keys(layout, S)[:, None, None])
    context_BKRTE = p_BKRTS @ v_BK1SE
    context_BTHE = context_BKRTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
    return context_BTHE, (q_BKRTE, k_BK1SE, v_BK1SE, p_BKRTS, scale)


def attention_backward(d_context_BTHE: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """Gradients of `attention_forward` with respect to q, k and v.

    Of one sequence, several gradients can be undone at once: their axis takes the batch's place.
    """
    q_BKRTE, k_BK1SE, v_BK1SE, p_BKRTS, scale = saved
    B, (K, R, T, E) = len(d_context_BTHE), q_BKRTE.shape[1:]
    d_context_BKRTE = d_context_BTHE.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    # forward:  context = p @ v
    d_p = d_context_BKRTE @ v_BK1SE.swapaxes(-1, -2)
    d_v = (p_BKRTS.swapaxes(-1, -2) @ d_context_BKRTE).sum(axis=2)
    # forward:  p = softmax(score)
    d_score = p_BKRTS * (d_p - (d_p * p_BKRTS).sum(axis=-1, keepdims=True))
    # forward:  score = (q @ kᵀ) * scale; the heads of a group share k and v, so theirs add up
    d_q = (d_score @ k_BK1SE) * scale
    d_k = (d_score.swapaxes(-1, -2) @ q_BKRTE).sum(axis=2) * scale
    d_q_BTHE = d_q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    return d_q_BTHE, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


# ------------------------------------------------------------------ SwiGLU


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), through the exponential that does not overflow."""
    positive = z.real >= 0
    e = np.exp(np.where(positive, -z, z))
    return np.asarray(np.where(positive, 1, e) / (1 + e))


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Saved]:
    """h = silu(gate) · up, silu(z) = z · sigmoid(z)."""
    return gate * sigmoid(gate) * up, (gate, up)


def swiglu_backward(d_h: Array, saved: Saved) -> tuple[Array, Array]:
    """Gradients of `swiglu_forward` with respect to gate and up."""
    gate, up = saved
    s = sigmoid(gate)
    # forward:  h = gate * s(gate) * up;  s' = s (1 - s)
    return d_h * up * s * (1 + gate * (1 - s)), d_h * gate * s


# ------------------------------------------------------------------ the set of them


@dataclass(frozen=True, slots=True)
class Ops:
    """The layer functions that the transformer runs on: definitions, or kernels equal to them."""

    rms_norm_forward: Callable[[Array, Array, float], tuple[Array, Saved]]
    rms_norm_backward: Callable[[Array, Saved], tuple[Array, Array]]
    rotate: Callable[[Array, Array, Array], Array]
    attention_forward: Callable[[Array, Array, Array, Layout], tuple[Array, Saved]]
    attention_backward: Callable[[Array, Saved], tuple[Array, Array, Array]]
    swiglu_forward: Callable[[Array, Array], tuple[Array, Saved]]
    swiglu_backward: Callable[[Array, Saved], tuple[Array, Array]]


DEFINITIONS = Ops(
    rms_norm_forward,
    rms_norm_backward,
    rotate,
    attention_forward,
    attention_backward,
    swiglu_forward,
    swiglu_backward,
)
