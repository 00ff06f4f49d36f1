"""The fast layer functions: kernels and attention by tiles, equal to `model.layers` in value.

A score is a sum of products. exp(score) turns its absolute rounding error into a relative error of
p: where Σ|q||k| is 1e5, float32 knows p to a few per cent, in the definition as in the kernel. For
the p that was found, all that follows is right to rounding, however saturated a head is.

Proof: tests/test_fast.py compares each with its definition in float32 and float64, within the
budget of its sums.
"""

from __future__ import annotations

import numpy as np

from refcurv.algebra import attention, kernels
from refcurv.law.checks import Array
from refcurv.model.config import Activation
from refcurv.model.layers import Layout, Ops, Saved, centre, unit_scale
from refcurv.model.loss import cross_entropy
from refcurv.model.sampling import draw_labels

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


def _rotate(x_BTHE: Array, cos: Array, sin: Array) -> Array:
    x_BTHE, y_BTHE = np.ascontiguousarray(x_BTHE), np.empty(x_BTHE.shape, x_BTHE.dtype)
    kernels.rotate(x_BTHE, np.ascontiguousarray(cos), np.ascontiguousarray(sin), y_BTHE)
    return y_BTHE


def _attention_forward(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    layout: Layout,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Array, Saved]:
    B, T, H, E = q_BTHE.shape
    real = q_BTHE.dtype.type
    size = real(1 / np.sqrt(E) if scale is None else scale)
    heads = tuple(np.ascontiguousarray(x) for x in (q_BTHE, k_BSKE, v_BSKE))
    last_BT = np.minimum(layout.last_BT, k_BSKE.shape[1] - 1)
    sight = np.ascontiguousarray(layout.first_BT), np.ascontiguousarray(last_BT)
    how = (size, None if cap is None else real(cap), QUERY_ROWS)
    context_BTHE, (top_BHT, total_BHT) = np.empty_like(heads[0]), np.empty((2, B, H, T), real)
    attention.attention_forward(*heads, *sight, *how, context_BTHE, top_BHT, total_BHT)
    return context_BTHE, (*heads, *sight, *how, top_BHT, total_BHT)


def _attention_backward(d_context_BTHE: Array, saved: Saved) -> tuple[Array, Array, Array]:
    d_q_BTHE, d_k_BSKE, d_v_BSKE = (np.empty_like(x) for x in saved[:3])
    d = np.ascontiguousarray(d_context_BTHE)
    attention.attention_backward(d, *saved, d_q_BTHE, d_k_BSKE, d_v_BSKE)
    return d_q_BTHE, d_k_BSKE, d_v_BSKE


def _cross_entropy(logit_NV: Array, label_N: Array) -> tuple[Array, Array]:
    """By the kernel in float32. In float64, where NumPy's exp is the faster one, the definition."""
    if logit_NV.dtype == np.float32:
        logit_NV = np.ascontiguousarray(logit_NV)
        nats_N, d_logit_NV = np.empty(len(label_N), logit_NV.dtype), np.empty_like(logit_NV)
        if not len(label_N) or kernels.cross_entropy(logit_NV, label_N, nats_N, d_logit_NV):
            return nats_N, d_logit_NV
    return cross_entropy(logit_NV, label_N)


def _draw_labels(logit_NV: Array, uniform_N: Array) -> Array:
    """The kernel proposes; where a label hangs on rounding the definition decides (SAMPLING)."""
    if logit_NV.dtype != np.float32:
        return draw_labels(logit_NV, uniform_N)
    label_N = np.empty(len(uniform_N), np.int64)
    kernels.propose_labels(np.ascontiguousarray(logit_NV), uniform_N, label_N)
    near_N = np.flatnonzero(label_N < 0)
    label_N[near_N] = draw_labels(logit_NV[near_N], uniform_N[near_N])
    return label_N


FAST = Ops(
    _rms_norm_forward,
    _rms_norm_backward,
    centre,
    _rotate,
    _attention_forward,
    _attention_backward,
    _mlp_forward,
    _mlp_backward,
    cross_entropy=_cross_entropy,
    draw_labels=_draw_labels,
)
"""What every pass runs on; `model.layers.DEFINITIONS` is what it means."""
