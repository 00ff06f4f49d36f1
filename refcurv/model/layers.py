"""The layers, each forward beside its hand-written backward. These are the definitions.

NumPy, in any of float32, float64, longdouble, complex128. A forward returns (output, saved); its
backward takes (gradient of the output, saved) and quotes the line that it differentiates. Both are
analytic, so that a complex step through either is exact. So nothing takes an absolute value, a
conjugate or a maximum of complex values, and branches look at the real part. π is 4 arctan(1),
which has all digits in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from scipy import special

from refcurv.law.checks import Array
from refcurv.model.config import Activation, RopeScaling, Scaling
from refcurv.model.loss import cross_entropy, root_product
from refcurv.model.sampling import draw_labels

Saved = Any
"""What a forward hands its own backward; nobody else looks inside."""


# ------------------------------------------------------------------ positions


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each position stands in its segment, and which keys it sees: first <= s <= last.

    Fields: position_BT, first_BT, last_BT (B, T) int64. A padded position sees nothing
    (last = -1). Nothing sees it either: all padding stands to the right of the real positions.
    """

    position_BT: Array
    first_BT: Array
    last_BT: Array
    seen_BTS: Array | None = None  # (B, T, S) bool, in the place of first and last: no run of keys


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


def full_layout(real_BT: Array, segment_BT: Array) -> Layout:
    """The layout of a bidirectional model: a position sees its whole segment."""
    causal = causal_layout(real_BT, segment_BT)
    index_T = np.arange(real_BT.shape[1])
    ends_BT = np.ones(real_BT.shape, dtype=bool)
    ends_BT[:, :-1] = (segment_BT[:, 1:] != segment_BT[:, :-1]) | ~real_BT[:, 1:]
    last_BT = np.where(ends_BT, index_T, len(index_T))
    last_BT = np.minimum.accumulate(last_BT[:, ::-1], axis=1)[:, ::-1]
    return Layout(causal.position_BT, causal.first_BT, np.where(real_BT, last_BT, -1))


def windowed(layout: Layout, window: int) -> Layout:
    """A causal layout in which a query sees only the last `window` positions, its own included."""
    first_BT = np.maximum(layout.first_BT, layout.last_BT - window + 1)
    return Layout(layout.position_BT, first_BT, layout.last_BT)


def lengths(layout: Layout) -> Array:
    """(B, T, 1, 1): of each position's segment the number of its real positions."""
    end_BT = full_layout(layout.last_BT >= 0, layout.first_BT).last_BT
    left_BT = end_BT - np.arange(end_BT.shape[1])
    return np.asarray(layout.position_BT + left_BT + 1)[:, :, None, None]


def rope_frequencies(
    width: int, theta: float, scaling: RopeScaling | None, dtype: np.dtype[Any], length: Any = 0
) -> Array:
    """f_j = theta^(-2j/width), j < width/2, stretched by `scaling`, (width/2,) in a real dtype.

    A frequency f makes original·f/2π turns in the trained context. `length` counts the positions of
    the text, or of each of several texts (..., 1). `scaling` replaces f by

        dynamic:  f' = f r^(−2j/(width − 2)),  r = 1 + factor (length/original − 1), at least 1
        longrope: f' = f / short, or f / long where length > original
        else      f' = s f/factor + (1 − s) f,      s between 0 and 1
        linear: s = 1
        llama3: s falls linearly with the turns, from 1 at `slow` turns to 0 at `fast`
        yarn:   s rises linearly with j, from 0 where f makes `fast` turns to 1 where `slow`
    """
    real = dtype.type
    f = real(theta) ** (-np.arange(0, width, 2).astype(dtype) / width)
    if scaling is None:
        return np.asarray(f)
    factor, two_pi = real(scaling.factor), 8 * np.arctan(real(1))
    if scaling.kind is Scaling.LINEAR:
        return np.asarray(f / factor)
    if scaling.kind is Scaling.DYNAMIC:
        r = 1 + factor * (np.maximum(length, scaling.original) / real(scaling.original) - 1)
        return np.asarray(f * r ** (-np.arange(0, width, 2).astype(dtype) / max(width - 2, 1)))
    if scaling.kind is Scaling.LONGROPE:
        by = np.where(length > scaling.original, scaling.long, scaling.short)
        return np.asarray(f / by)
    slow, fast = real(scaling.slow), real(scaling.fast)
    if scaling.kind is Scaling.LLAMA3:
        s = (fast - scaling.original * f / two_pi) / (fast - slow)
    else:
        # original·f_j/2π = n at j = width log(original / 2πn) / 2 log theta
        start, end = (
            width * np.log(scaling.original / (two_pi * n)) / (2 * np.log(real(theta)))
            for n in (fast, slow)
        )
        if scaling.truncate:
            start, end = np.floor(start), np.ceil(end)
        start, end = max(start, real(0)), min(end, real(width - 1))
        # a ramp of no width is a step; its 0.001 is that of transformers
        s = (np.arange(width // 2) - start) / (end - start if end != start else real(0.001))
    s = np.clip(s, 0, 1)
    return np.asarray(s * (f / factor) + (1 - s) * f)


def rope_tables(
    position_BT: Array, width: int, theta: float, dtype: np.dtype[Any],
    scaling: RopeScaling | None = None, length: Any = 0,
) -> tuple[Array, Array]:  # fmt: skip
    """cos and sin of position · f_j for the frequencies f_j, each (B, T, 1, width/2).

    Computed in float64 (longdouble for longdouble) and rounded once to the real part of `dtype`.
    """
    real = np.zeros(0, dtype).real.dtype
    wide = np.dtype(np.longdouble if real == np.longdouble else np.float64)
    frequency = rope_frequencies(width, theta, scaling, wide, length)
    angle = position_BT[:, :, None, None].astype(wide) * frequency
    size = 1.0 if scaling is None else scaling.attention
    return (size * np.cos(angle)).astype(real), (size * np.sin(angle)).astype(real)


def rotate(x_BTHE: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions, half-split: pairs are (x[j], x[j + R/2]), R = 2 · (entries of cos).

    Entries from R on stay as they are. Each pair is multiplied by [[cos, −sin], [sin, cos]]. The
    backward multiplies by its transpose, the inverse rotation: it is rotate(d, cos, -sin).
    """
    half = cos.shape[-1]
    x1, x2, rest = x_BTHE[..., :half], x_BTHE[..., half : 2 * half], x_BTHE[..., 2 * half :]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


# ------------------------------------------------------------------ images


def unfold(image_BCHW: Array, patch: int) -> Array:
    """Square patches, row by row, each flattened over (channel, row, column): (B, n, C·P·P).

    C, H and W are here the channels, the height and the width of the image, and P is `patch`.

    A convolution whose stride is its kernel is a linear layer on these (O5).
    """
    B, C, H, W = image_BCHW.shape
    split = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


# ------------------------------------------------------------------ RMSNorm


def rms_norm_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
    """y = gain · x / sqrt(mean(x²) + eps), over the last axis; eps inside the root.

    It is computed from u = s x and s² eps, where s is a power of two near 1/max(|x|, √eps): s
    cancels, and u² neither overflows nor vanishes. Where x² and eps are in range s changes no bit.
    """
    s = unit_scale(x, eps)
    u = x * s
    r = 1 / np.sqrt((u * u).mean(axis=-1, keepdims=True) + eps * s * s)
    x_hat = u * r
    return x_hat * gain, (x_hat, r, s, gain)


def rms_norm_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    """Gradients of `rms_norm_forward` with respect to x and gain."""
    x_hat, r, s, gain = saved
    # forward:  y = x_hat * gain;  x_hat = u * r;  r = (mean(u²) + s² eps)^(-1/2);  u = x * s
    # ∂r/∂u_j = −r³ u_j / D, so ∂x_hat_i/∂u_j = r (δ_ij − x_hat_i x_hat_j / D): symmetric
    d_hat = d_y * gain
    d_x = s * (r * (d_hat - x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True)))
    d_gain = (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)
    return d_x, d_gain


def unit_scale(x: Array, eps: float) -> Array:
    """A power of two s per row with max(|s x|, s √eps) in [1/2, 1), (..., 1) real.

    Where s would overflow it is the largest power of two. Where x and eps are 0 it is 1.
    """
    real = x.real.dtype.type
    largest = np.abs(x.real).max(axis=-1, keepdims=True)
    _, exponent = np.frexp(np.maximum(largest, np.sqrt(real(eps))))
    return np.asarray(np.ldexp(real(1), np.minimum(-exponent, np.finfo(real).maxexp - 1)))


def centre(x: Array) -> Array:
    """x − mean(x) over the last axis: LayerNorm is RMSNorm of this.

    It is its own backward, for its matrix I − 1 1ᵀ/D is symmetric.
    """
    y: Array = x - x.mean(axis=-1, keepdims=True)
    return y


# ------------------------------------------------------------------ attention


def visible_keys(layout: Layout, keys: int) -> Array:
    """(B, T, S) bool: may position t attend to key s?"""
    s = np.arange(keys)
    run_BTS = (layout.first_BT[..., None] <= s) & (s <= layout.last_BT[..., None])
    return run_BTS if layout.seen_BTS is None else layout.seen_BTS


def softmax_over(score: Array, visible: Array) -> Array:
    """Softmax over the last axis among the visible entries; a row that sees nothing is 0."""
    top = np.where(visible, score.real, -np.inf).max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    e = np.where(visible, np.exp(np.where(visible, score - top, 0)), 0)
    total = e.sum(axis=-1, keepdims=True)
    return np.asanyarray(e / np.where(visible.any(axis=-1, keepdims=True), total, 1))


def attention_forward(
    q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, layout: Layout, scale: float | None = None,
    cap: float | None = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """Grouped-query attention; query head h reads key-value head h div R, R = H / K.

    score = q kᵀ · scale over the visible keys, by default scale = 1/sqrt(E); with a soft-cap,
    cap · tanh(score / cap) in its place; context = softmax(score) v, (B, T, H, E).
    """
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_BKRTE = q_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    k_BK1SE = k_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    v_BK1SE = v_BSKE.transpose(0, 2, 1, 3)[:, :, None]
    real = q_BTHE.real.dtype.type
    size = 1 / np.sqrt(real(E)) if scale is None else real(scale)
    score_BKRTS = (q_BKRTE @ k_BK1SE.swapaxes(-1, -2)) * size
    if cap is not None:
        score_BKRTS, bend = soft_cap(score_BKRTS, cap)
        size = size * bend
    p_BKRTS = softmax_over(score_BKRTS, visible_keys(layout, S)[:, None, None])
    context_BKRTE = p_BKRTS @ v_BK1SE
    context_BTHE = context_BKRTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
    return context_BTHE, (q_BKRTE, k_BK1SE, v_BK1SE, p_BKRTS, size)


def attention_backward(d_context_BTHE: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """Gradients of `attention_forward` with respect to q, k and v.

    Many gradients of one sequence can be sent back at once: `saved` has then B = 1, and the axis
    of the gradients takes the place of B in d_context.
    """
    q_BKRTE, k_BK1SE, v_BK1SE, p_BKRTS, size = saved
    B, (K, R, T, E) = len(d_context_BTHE), q_BKRTE.shape[1:]
    d_context_BKRTE = d_context_BTHE.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    # forward:  context = p @ v
    d_p = d_context_BKRTE @ v_BK1SE.swapaxes(-1, -2)
    d_v = (p_BKRTS.swapaxes(-1, -2) @ d_context_BKRTE).sum(axis=2)
    # forward:  p = softmax(score), ∂p_r/∂score_s = p_r (δ_rs − p_s): J = diag(p) − p pᵀ, symmetric
    # d_score = J d_p = p (d_p − Σ p d_p). At a key with p near 1 this difference would cancel.
    # J 1 = 0, for Σ p = 1: so d_p of the likeliest keys may be subtracted from all of d_p first.
    real = p_BKRTS.real
    top = real == real.max(axis=-1, keepdims=True)
    ties = top.sum(axis=-1, keepdims=True, dtype=real.dtype)
    d_p = d_p - np.where(top, d_p, 0).sum(axis=-1, keepdims=True) / ties
    d_score = p_BKRTS * (d_p - (d_p * p_BKRTS).sum(axis=-1, keepdims=True))
    # forward:  score = cap(q @ kᵀ * scale); size = scale · cap'
    d_product = d_score * size
    # the heads of a group share k and v, so theirs add up
    d_q = d_product @ k_BK1SE
    d_k = (d_product.swapaxes(-1, -2) @ q_BKRTE).sum(axis=2)
    d_q_BTHE = d_q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    return d_q_BTHE, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def soft_cap(x: Array, cap: float) -> tuple[Array, Array]:
    """y = cap · tanh(x / cap), and its derivative 1 / cosh(x / cap)²."""
    u = x / cap
    # 1 / cosh² = 4 / (exp(u) + exp(−u))² = 4 e / (1 + e)², e = exp(−2|u|); 1 − tanh² would cancel
    e = np.exp(np.where(u.real >= 0, -2 * u, 2 * u))
    return cap * np.tanh(u), 4 * e / (1 + e) ** 2


def clip(x: Array, bound: float) -> tuple[Array, Array]:
    """x between −bound and bound, and its derivative, 1 inside and 0 outside."""
    outside = np.abs(x.real) > bound  # false for NaN, which stays NaN
    return np.where(outside, np.copysign(bound, x.real), x), ~outside


# ------------------------------------------------------------------ MLP


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), through the exponential that does not overflow."""
    positive = z.real >= 0
    e = np.exp(np.where(positive, -z, z))
    return np.asanyarray(np.where(positive, 1, e) / (1 + e))


def erf(z: Array) -> Array:
    """2/√π ∫₀ᶻ exp(−t²) dt; in longdouble, for which SciPy has no loop, from a series.

        erf(x) = 2/√π exp(−x²) Σ_n 2ⁿ x^(2n+1) / (1·3·5···(2n + 1))

    All terms have the sign of x, so nothing cancels.

    Source: NIST Digital Library of Mathematical Functions, 7.6.2.
    """
    if z.dtype == np.clongdouble:
        # a complex step: erf(x + ih) = erf(x) + ih erf'(x), erf'(x) = 2/√π exp(−x²), √π/2 = √(π/4)
        slope = np.exp(-z.real * z.real) / np.sqrt(np.arctan(np.longdouble(1)))
        return np.asanyarray(erf(z.real) + 1j * z.imag * slope)
    if z.dtype != np.longdouble:
        return np.asanyarray(special.erf(z))
    x = np.clip(z, -7, 7)  # erf(7) = 1 − 4e-23, which is 1 in a longdouble of 64 binary digits
    term, total, n = x, x, 0
    # at its end a term is less than half the one before: what follows adds less than one eps
    while (np.abs(term) > np.finfo(x.dtype).eps * np.abs(total)).any():
        n += 1
        term = term * (2 * x * x) / (2 * n + 1)
        total = total + term
    return np.asanyarray(np.exp(-x * x) * total / np.sqrt(np.arctan(x.dtype.type(1))))


def silu(z: Array) -> tuple[Array, Array]:
    """z · s and s (1 + z (1 − s)), s = sigmoid(z), for s' = s (1 − s)."""
    s = sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def gelu(z: Array) -> tuple[Array, Array]:
    """z · Φ and Φ + z φ, Φ = (1 + erf(z/√2))/2 and Φ' = φ = exp(−z²/2)/√(2π)."""
    real = z.real.dtype.type
    half, root = real(0.5), np.sqrt(real(2))
    Phi = half * (1 + erf(z / root))
    phi = np.exp(-half * z * z) / (root * 2 * np.sqrt(np.arctan(real(1))))  # √2 · 2 √(π/4) = √(2π)
    return z * Phi, Phi + z * phi


def gelu_tanh(z: Array) -> tuple[Array, Array]:
    """z (1 + t)/2 and (1 + t)/2 + z (1 − t²) u'/2, t = tanh u, u = √(2/π) (z + 0.044715 z³).

    Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415): t approximates erf(z/√2).
    """
    real = z.real.dtype.type
    half, root = real(0.5), 1 / np.sqrt(2 * np.arctan(real(1)))  # √(2/π)
    w, _ = clip(z, 99)  # z³ may overflow beyond; at |z| = 99 |u| is 34,690, and t ±1 in any dtype
    t = np.tanh(root * (w + real(0.044715) * w * w * w))
    slope = root * (1 + 3 * real(0.044715) * w * w)
    return half * z * (1 + t), half * (1 + t) + half * z * (1 - t * t) * slope


def relu(z: Array) -> tuple[Array, Array]:
    """z and 1 where z > 0, else 0 and 0; NaN stays NaN."""
    return np.where(z.real <= 0, 0, z), (z.real > 0).astype(z.dtype)


ACTIVATIONS: Final[Mapping[Activation, Callable[[Array], tuple[Array, Array]]]] = MappingProxyType({
    Activation.SILU: silu, Activation.GELU: gelu,
    Activation.GELU_TANH: gelu_tanh, Activation.RELU: relu,
})  # fmt: skip
"""f by name: z → (f(z), f'(z))."""


def mlp_forward(activation: Activation, gate: Array | None, up: Array) -> tuple[Array, Saved]:
    """h = f(gate) · up, or h = f(up) without a gate."""
    if gate is None:
        return ACTIVATIONS[activation](up)[0], (activation, None, up)
    return ACTIVATIONS[activation](gate)[0] * up, (activation, gate, up)


def mlp_backward(d_h: Array, saved: Saved) -> tuple[Array | None, Array]:
    """Gradients of `mlp_forward` with respect to gate (None without one) and up."""
    activation, gate, up = saved
    if gate is None:
        # forward:  h = f(up)
        return None, d_h * ACTIVATIONS[activation](up)[1]
    # forward:  h = f(gate) * up
    f, slope = ACTIVATIONS[activation](gate)
    return d_h * up * slope, d_h * f


# ------------------------------------------------------------------ the set of them


@dataclass(frozen=True, slots=True)
class Ops:
    """What the transformer runs on: definitions, kernels equal to them, or proofs (`certified`).

    mlp_forward may be asked for the same again (`transformer.hidden_of`), and gives the same.
    """

    rms_norm_forward: Callable[[Array, Array, float], tuple[Array, Saved]]
    rms_norm_backward: Callable[[Array, Saved], tuple[Array, Array]]
    centre: Callable[[Array], Array]
    rotate: Callable[[Array, Array, Array], Array]
    attention_forward: Callable[
        [Array, Array, Array, Layout, float | None, float | None], tuple[Array, Saved]
    ]
    attention_backward: Callable[[Array, Saved], tuple[Array, Array, Array]]
    mlp_forward: Callable[[Activation, Array | None, Array], tuple[Array, Saved]]
    mlp_backward: Callable[[Array, Saved], tuple[Array | None, Array]]
    rope_tables: Callable[..., tuple[Array, Array]] = rope_tables
    soft_cap: Callable[[Array, float], tuple[Array, Array]] = soft_cap
    clip: Callable[[Array, float], tuple[Array, Array]] = clip
    cross_entropy: Callable[[Array, Array], tuple[Array, Array]] = cross_entropy
    root_product: Callable[[Array, Array], Array] = root_product
    draw_labels: Callable[[Array, Array], Array] = draw_labels


DEFINITIONS = Ops(
    rms_norm_forward, rms_norm_backward, centre, rotate,
    attention_forward, attention_backward, mlp_forward, mlp_backward,
)  # fmt: skip
