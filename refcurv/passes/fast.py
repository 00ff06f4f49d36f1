"""The fast layer functions: kernels and attention by tiles, equal to `model.layers` in value.

A score is a sum of products. exp(score) turns its absolute rounding error into a relative error of
p: where Σ|q||k| is 1e5, float32 knows p to a few per cent, in the definition as in the kernel. For
the p that was found, all that follows is right to rounding, however saturated a head is.

Proof: tests/test_fast.py compares each with its definition in float32 and float64, within the
budget of its sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refcurv.algebra import kernels
from refcurv.law.checks import Array
from refcurv.model.config import Activation
from refcurv.model.layers import Layout, Ops, Saved, centre, rotate, unit_scale

QUERY_ROWS = 128
"""Queries of one tile of attention: their scores against the needed keys fit the cache."""


def _rms_norm_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
    """The kernel on x; where squares overflow or vanish, again on s x with s² eps."""
    x_ND = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y_ND, r_N = np.empty_like(x_ND), np.empty(len(x_ND), x.dtype)
    kernels.rms_norm_forward(x_ND, gain, np.full(len(x_ND), eps, x.dtype), y_ND, r_N)
    if _ordinary(r_N):
        return y_ND.reshape(x.shape), (x_ND, gain, r_N, None)
    s_N1 = unit_scale(x_ND, eps)
    x_ND, eps_N = x_ND * s_N1, (eps * s_N1 * s_N1)[:, 0]
    kernels.rms_norm_forward(x_ND, gain, eps_N, y_ND, r_N)
    return y_ND.reshape(x.shape), (x_ND, gain, r_N, s_N1)


def _ordinary(r_N: Array) -> bool:
    """Is every mean(x²) + eps = 1/r² finite, and far above squares that lose digits or vanish?"""
    number = np.finfo(r_N.dtype)
    return bool(((r_N > 0) & (r_N <= np.sqrt(number.eps / number.smallest_normal))).all())


def _rms_norm_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    x_ND, gain, r_N, s_N1 = saved
    d_x_ND, d_gain = np.empty_like(x_ND), np.zeros_like(gain)
    d_y_ND = np.ascontiguousarray(d_y).reshape(x_ND.shape)
    kernels.rms_norm_backward(d_y_ND, x_ND, gain, r_N, d_x_ND, d_gain)
    if s_N1 is not None:
        d_x_ND *= s_N1
    return d_x_ND.reshape(d_y.shape), d_gain


_WHICH = {
    Activation.SILU: (0,) * kernels.SILU,
    Activation.GELU: (0,) * kernels.GELU,
    Activation.GELU_TANH: (0,) * kernels.GELU_TANH,
    Activation.RELU: (0,) * kernels.RELU,
}
"""How the kernels are told which activation they are for."""


def _mlp_forward(activation: Activation, gate: Array | None, up: Array) -> tuple[Array, Saved]:
    h = np.empty(up.shape, up.dtype)
    kernels.mlp_forward(_WHICH[activation], _flat(gate), up.reshape(-1), h.reshape(-1))
    return h, (activation, gate, up)


def _mlp_backward(d_h: Array, saved: Saved) -> tuple[Array | None, Array]:
    activation, gate, up = saved
    d_gate = None if gate is None else np.empty(gate.shape, gate.dtype)
    d_up = np.empty(up.shape, up.dtype)
    kernels.mlp_backward(
        _WHICH[activation],
        d_h.reshape(-1),
        _flat(gate),
        up.reshape(-1),
        _flat(d_gate),
        d_up.reshape(-1),
    )
    return d_gate, d_up


def _flat(x: Array | None) -> Array | None:
    return None if x is None else x.reshape(-1)


def _heads(x_BTHE: Array, kv_heads: int) -> Array:
    """(B, T, H, E) → (B, K, R, T, E), a view: query head h belongs to key-value head h div R."""
    B, T, H, E = x_BTHE.shape
    return x_BTHE.reshape(B, T, kv_heads, H // kv_heads, E).transpose(0, 2, 3, 1, 4)


def _tiles(layout: Layout, keys: int) -> list[tuple[slice, slice]]:
    """Ranges of queries, each with the range of keys that any of them sees."""
    out = []
    for begin in range(0, layout.first_BT.shape[1], QUERY_ROWS):
        query = slice(begin, begin + QUERY_ROWS)
        last = min(int(layout.last_BT[:, query].max()) + 1, keys)
        first = min(int(layout.first_BT[:, query].min()), max(last - 1, 0))
        out.append((query, slice(first, max(last, first + 1))))
    return out


def _attention_forward(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    layout: Layout,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Array, Saved]:
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    size = q_BTHE.dtype.type(1 / np.sqrt(E) if scale is None else scale)
    q, k, v = _heads(q_BTHE, K), _heads(k_BSKE, K), _heads(v_BSKE, K)
    context_BTHE = np.empty_like(q_BTHE)
    context = _heads(context_BTHE, K)
    top_BHT, total_BHT = np.empty((2, B, H, T), q_BTHE.dtype)
    for t, s in _tiles(layout, S):
        p = q[..., t, :] @ k[..., s, :].swapaxes(-1, -2)
        inner = _cap(p, size, cap)
        kernels.softmax_forward(
            p.reshape(B, H, *p.shape[-2:]),
            layout.first_BT[:, t],
            layout.last_BT[:, t],
            s.start,
            inner,
            top_BHT[:, :, t],
            total_BHT[:, :, t],
        )
        context[..., t, :] = p @ v[..., s, :]
    return context_BTHE, (q, k, v, top_BHT, total_BHT, layout, size, cap)


def _cap(p: Array, size: Any, cap: float | None) -> Any:
    """Products q·k → x in place, tanh(q·k size / cap) with a soft-cap; returns c: score = c x."""
    if cap is None:
        return size
    p *= size / p.dtype.type(cap)
    np.tanh(p, out=p)
    return p.dtype.type(cap)


def _bend(p: Array, size: Any, cap: float | None) -> Array | None:
    """The soft-cap's derivative at products q·k, 1 / cosh²."""
    if cap is None:
        return None
    e = np.exp(np.abs(p) * (-2 * size / p.dtype.type(cap)))
    return np.asarray(4 * e / (1 + e) ** 2)


def _attention_backward(d_context_BTHE: Array, saved: Saved) -> tuple[Array, Array, Array]:
    q, k, v, top_BHT, total_BHT, layout, size, cap = saved
    B, K, R, T, E = q.shape
    S = k.shape[3]
    d_context = _heads(d_context_BTHE, K)
    d_q_BTHE = np.empty((B, T, K * R, E), q.dtype)
    d_q = _heads(d_q_BTHE, K)
    d_k, d_v = np.zeros((B, K, S, E), q.dtype), np.zeros((B, K, S, E), q.dtype)
    for t, s in _tiles(layout, S):
        p = q[..., t, :] @ k[..., s, :].swapaxes(-1, -2)
        # forward:  score = cap(q·k size)
        bend, inner = _bend(p, size, cap), _cap(p, size, cap)
        d_p = d_context[..., t, :] @ v[..., s, :].swapaxes(-1, -2)
        kernels.softmax_backward(
            p.reshape(B, K * R, *p.shape[-2:]),
            d_p.reshape(B, K * R, *p.shape[-2:]),
            layout.first_BT[:, t],
            layout.last_BT[:, t],
            s.start,
            inner,
            size,
            top_BHT[:, :, t],
            total_BHT[:, :, t],
        )
        if bend is not None:
            d_p *= bend
        d_q[..., t, :] = d_p @ k[..., s, :]
        d_k[:, :, s] += (d_p.swapaxes(-1, -2) @ q[..., t, :]).sum(axis=2)
        d_v[:, :, s] += (p.swapaxes(-1, -2) @ d_context[..., t, :]).sum(axis=2)
    return d_q_BTHE, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


FAST = Ops(
    _rms_norm_forward,
    _rms_norm_backward,
    centre,
    rotate,
    _attention_forward,
    _attention_backward,
    _mlp_forward,
    _mlp_backward,
)
"""What every pass runs on; `model.layers.DEFINITIONS` is what it means."""
