"""The layer functions over balls: what `model.layers` means, as formulas of real numbers.

Nothing here guards against overflow or cancellation: a ball that loses digits says so by its
radius. So each formula is the plain one. Exact are the numbers of the configuration (θ, eps,
scales, caps, literals) as the float64 values that they are; every function of them is the real one.
A decision that balls cannot make (ReLU, a clip, a bound of rotary scaling) is an UndecidedError.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refcurv.algebra.balls import chosen, exact, pi
from refcurv.law.checks import Array
from refcurv.model.config import Activation, RopeScaling, Scaling
from refcurv.model.layers import Layout, Ops, Saved, centre, rotate, visible_keys

Numbers = Any
"""Balls, or dual balls: what runs here runs on either."""

# ------------------------------------------------------------------ positions


def rope_tables(
    position_BT: Array,
    width: int,
    theta: float,
    dtype: Any,
    scaling: RopeScaling | None = None,
    length: Any = 0,
) -> tuple[Numbers, Numbers]:
    """cos and sin of position · f_j, each (B, T, 1, width/2); f_j as `rope_frequencies` has them.

    f_j = theta^(−2j/width) = exp(−(2j/width) log theta).
    """
    log_theta = exact(theta).log()
    j = exact(np.arange(width // 2))
    f = (-2 * j / width * log_theta).exp()
    if scaling is not None:
        f = _scaled(f, width, log_theta, scaling, np.asarray(length))
    angle = exact(position_BT[:, :, None, None]) * f
    size = 1.0 if scaling is None else float(scaling.attention)
    return angle.cos() * size, angle.sin() * size


def _scaled(
    f: Numbers, width: int, log_theta: Numbers, scaling: RopeScaling, length: Array
) -> Numbers:
    """f' = s f/factor + (1 − s) f, s as in `rope_frequencies`; or dynamic, or longrope."""
    factor = exact(float(scaling.factor))
    if scaling.kind is Scaling.LINEAR:
        return f / factor
    if scaling.kind is Scaling.DYNAMIC:
        r = 1 + factor * (exact(np.maximum(length, scaling.original)) / scaling.original - 1)
        return f * (-2 * exact(np.arange(width // 2)) / max(width - 2, 1) * r.log()).exp()
    if scaling.kind is Scaling.LONGROPE:
        by = np.where(length > scaling.original, scaling.long, scaling.short)
        return f / exact(by.astype(float))
    slow, fast = exact(float(scaling.slow)), exact(float(scaling.fast))
    original, two_pi = exact(scaling.original), 2 * pi()
    if scaling.kind is Scaling.LLAMA3:
        s = (fast - original * f / two_pi) / (fast - slow)
    else:
        start, end = (
            width * (original / (two_pi * n)).log() / (2 * log_theta) for n in (fast, slow)
        )
        if scaling.truncate:
            start, end = start.floor(), -(-end).floor()
        start = chosen(start.above(0), start, 0)
        end = chosen(end.above(width - 1), width - 1, end)
        # a ramp of no width is a step; its 0.001 is that of transformers
        ramp = chosen((end - start).is_zero(), exact(0.001), end - start)
        s = (exact(np.arange(width // 2)) - start) / ramp
    s = chosen(s.above(0), s, 0)
    s = chosen(s.above(1), 1, s)
    return s * (f / factor) + (1 - s) * f


# ------------------------------------------------------------------ norms


def rms_norm_forward(x: Numbers, gain: Numbers, eps: float) -> tuple[Numbers, Saved]:
    """y = gain · x / √(mean(x²) + eps)."""
    r = ((x * x).mean(axis=-1, keepdims=True) + eps).rsqrt()
    x_hat = x * r
    return x_hat * gain, (x_hat, r, gain)


def rms_norm_backward(d_y: Numbers, saved: Saved) -> tuple[Numbers, Numbers]:
    """Gradients of `rms_norm_forward` with respect to x and gain."""
    x_hat, r, gain = saved
    # forward:  y = x_hat * gain;  x_hat = x * r;  r = (mean(x²) + eps)^(-1/2)
    d_hat = d_y * gain
    d_x = r * (d_hat - x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True))
    d_gain = (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)
    return d_x, d_gain


# ------------------------------------------------------------------ attention


def softmax(score: Numbers, visible: Array) -> Numbers:
    """Softmax over the last axis among the visible entries; a row that sees nothing is 0.

    An exact number near the largest is subtracted first: it cancels, and exp stays in range.
    """
    visible = np.broadcast_to(visible, score.shape)
    shift = _largest(np.where(visible, score.rounded(), -np.inf))
    e = chosen(visible, chosen(visible, score - shift, 0).exp(), 0)
    total = chosen(
        np.asarray(visible.any(axis=-1, keepdims=True)), e.sum(axis=-1, keepdims=True), 1
    )
    return e / total


def _largest(near: Array) -> Numbers:
    """The largest number of each row, (..., 1), as exact; 0 where there is none that is finite."""
    top = near.max(axis=-1, keepdims=True)
    return exact(np.where(np.isfinite(top), top, 0))


def attention_forward(
    q_BTHE: Numbers,
    k_BSKE: Numbers,
    v_BSKE: Numbers,
    layout: Layout,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Numbers, Saved]:
    """softmax(cap(q kᵀ · scale)) v; query head h reads key-value head h div R."""
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_BKRTE = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    k_BK1SE = k_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    v_BK1SE = v_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    size: Any = exact(E).rsqrt() if scale is None else exact(float(scale))
    score = (q_BKRTE @ k_BK1SE.swapaxes(-1, -2)) * size
    if cap is not None:
        score, bend = soft_cap(score, cap)
        size = size * bend
    p = softmax(score, visible_keys(layout, S)[:, None, None])
    context = (p @ v_BK1SE).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
    return context, (q_BKRTE, k_BK1SE, v_BK1SE, p, size)


def attention_backward(d_context_BTHE: Numbers, saved: Saved) -> tuple[Numbers, Numbers, Numbers]:
    """Gradients of `attention_forward` with respect to q, k and v."""
    q, k, v, p, size = saved
    B, (K, R, T, E) = len(d_context_BTHE), q.shape[1:]
    d_context = d_context_BTHE.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    # forward:  context = p @ v
    d_p = d_context @ v.swapaxes(-1, -2)
    d_v = (p.swapaxes(-1, -2) @ d_context).sum(axis=2)
    # forward:  p = softmax(score), whose J = diag(p) − p pᵀ
    d_score = p * (d_p - (d_p * p).sum(axis=-1, keepdims=True))
    # forward:  score = cap(q @ kᵀ * scale); size = scale · cap'
    d_product = d_score * size
    d_q = d_product @ k
    d_k = (d_product.swapaxes(-1, -2) @ q).sum(axis=2)
    d_q_BTHE = d_q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    return d_q_BTHE, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def soft_cap(x: Numbers, cap: float) -> tuple[Numbers, Numbers]:
    """cap · tanh(x / cap), and its derivative 1 − tanh²."""
    t = (x / float(cap)).tanh()
    return t * float(cap), 1 - t * t


def clip(x: Numbers, bound: float) -> tuple[Numbers, Array]:
    """x between −bound and bound, and its derivative, 1 inside and 0 outside."""
    over, under = x.above(bound), (-x).above(bound)
    inside = ~(over | under)
    return chosen(over, exact(float(bound)), chosen(under, exact(-float(bound)), x)), inside


# ------------------------------------------------------------------ MLP


def activation(kind: Activation, z: Numbers) -> tuple[Numbers, Numbers]:
    """f(z) and f'(z), the real functions."""
    if kind is Activation.SILU:
        s = 1 / (1 + (-z).exp())
        return z * s, s * (1 + z * (1 - s))
    if kind is Activation.GELU:
        Phi = (1 + (z * exact(2).rsqrt()).erf()) / 2
        phi = (-(z * z) / 2).exp() / (2 * pi()).sqrt()
        return z * Phi, Phi + z * phi
    if kind is Activation.GELU_TANH:
        root = (2 / pi()).sqrt()
        t = (root * (z + 0.044715 * z * z * z)).tanh()
        slope = root * (1 + 3 * exact(0.044715) * z * z)
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) * slope / 2
    above = z.above(0)
    return chosen(above, z, 0), exact(above)


def mlp_forward(kind: Activation, gate: Numbers | None, up: Numbers) -> tuple[Numbers, Saved]:
    """h = f(gate) · up, or h = f(up) without a gate."""
    if gate is None:
        f, slope = activation(kind, up)
        return f, (f, slope, None)
    f, slope = activation(kind, gate)
    return f * up, (f, slope, up)


def mlp_backward(d_h: Numbers, saved: Saved) -> tuple[Numbers | None, Numbers]:
    """Gradients of `mlp_forward` with respect to gate (None without one) and up."""
    f, slope, up = saved
    if up is None:
        # forward:  h = f(up)
        return None, d_h * slope
    # forward:  h = f(gate) * up
    return d_h * up * slope, d_h * f


# ------------------------------------------------------------------ loss


def cross_entropy(logit_NV: Numbers, label_N: Array) -> tuple[Numbers, Numbers]:
    """LOSS: nats −log p[label] per row and p − onehot(label); 0 where the label is negative."""
    z = logit_NV - _largest(logit_NV.rounded())
    e = z.exp()
    total = e.sum(axis=-1, keepdims=True)
    at = np.flatnonzero(label_N >= 0)
    onehot = np.arange(logit_NV.shape[1]) == label_N[:, None]
    labelled = (label_N >= 0)[:, None]
    nats = np.zeros_like(total, shape=(len(label_N),))
    nats[at] = total[at, 0].log() - z[at, label_N[at]]
    return nats, chosen(np.broadcast_to(labelled, onehot.shape), e / total - onehot, 0)


def hessian_product(logit_NV: Numbers, v_NV: Numbers, label_N: Array) -> Numbers:
    """(diag p − p pᵀ) v per row; 0 where the label is negative."""
    p = softmax(logit_NV, np.broadcast_to((label_N >= 0)[:, None], logit_NV.shape))
    return p * (v_NV - (p * v_NV).sum(axis=-1, keepdims=True))


def root_product(logit_NV: Numbers, e_NV: Array) -> Numbers:
    """S e per row, S = diag(√p) − p √pᵀ, as `model.loss.root_product` means it."""
    half = ((logit_NV - _largest(logit_NV.rounded())) / 2).exp()
    root = half * (half * half).sum(axis=-1, keepdims=True).rsqrt()  # √p
    out = root * e_NV
    return out - root * root * out.sum(axis=-1, keepdims=True)


_EACH: Any = (
    rms_norm_forward, rms_norm_backward, centre, rotate, attention_forward, attention_backward,
    mlp_forward, mlp_backward, rope_tables, soft_cap, clip, cross_entropy,
    root_product,
)  # fmt: skip
BALLS = Ops(*_EACH)
"""`model.layers.DEFINITIONS`, over balls."""
