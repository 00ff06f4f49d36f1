"""Cross-entropy in nats: value, gradient and Hessian, and the labels that it is taken against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refcurv.law.checks import Array, require_seed
from refcurv.law.conventions import NO_LABEL

CACHED = 2**17
"""Logits worked on at one time: a megabyte in float64, within a core's own cache."""


def shift_labels(token_BT: Array, real_BT: Array, segment_BT: Array) -> Array:
    """LABELS: the next token of the same segment; NO_LABEL at its last position and on padding."""
    label_BT = np.full(token_BT.shape, NO_LABEL, dtype=np.int64)
    follows = real_BT[:, 1:] & (segment_BT[:, 1:] == segment_BT[:, :-1])
    label_BT[:, :-1] = np.where(follows, token_BT[:, 1:], NO_LABEL)
    return label_BT


def reached(label_BT: Array, real_BT: Array, segment_BT: Array, causal: bool = True) -> Array:
    """ROWS: real positions from which a label of their segment is reached, (B, T) bool.

    Causal: those at or before the last labelled one. Bidirectional: all.
    """
    if not causal:
        at_or_before = reached(label_BT, real_BT, segment_BT)
        at_or_behind = reached(label_BT[:, ::-1], real_BT[:, ::-1], segment_BT[:, ::-1])[:, ::-1]
        return np.asarray(at_or_before | at_or_behind)
    out = np.zeros(label_BT.shape, dtype=bool)
    labelled = label_BT >= 0
    after = np.zeros(label_BT.shape[0], dtype=bool)
    for t in range(label_BT.shape[1] - 1, -1, -1):
        if t + 1 < label_BT.shape[1]:
            after &= segment_BT[:, t] == segment_BT[:, t + 1]
        after |= labelled[:, t]
        out[:, t] = after
    return np.asarray(out & real_BT)


def cross_entropy(logit_NV: Array, label_N: Array) -> tuple[Array, Array]:
    """Nats −log p[label] per row, and their gradient p − onehot(label) with respect to the logits.

    A row whose label is negative has neither: 0 nats, gradient 0.
    """
    nats_N = np.zeros(len(label_N), dtype=logit_NV.dtype)
    d_logit_NV = np.zeros_like(logit_NV)
    for rows in _few_rows(logit_NV):
        z_NV, at_N = logit_NV[rows], np.flatnonzero(label_N[rows] >= 0)
        label = label_N[rows][at_N]
        top_N1, e_NV, total_N1 = _exponentials(z_NV)
        nats_N[rows][at_N] = np.log(total_N1[at_N, 0]) - (z_NV[at_N, label] - top_N1[at_N, 0])
        e_NV /= total_N1
        e_NV[at_N, label] -= 1
        d_logit_NV[rows][at_N] = e_NV[at_N]
    return nats_N, d_logit_NV


def hessian_product(logit_NV: Array, v_NV: Array) -> Array:
    """(diag p − p pᵀ) v per row: the Hessian of −log p[label] by the logits, for every label.

    Proof: tests/test_loss.py::test_O11_the_hessian_is_the_complex_step_of_the_gradient
    """
    out_NV = np.empty(v_NV.shape, np.result_type(logit_NV, v_NV))
    for rows in _few_rows(logit_NV):
        _top, p_NV, total_N1 = _exponentials(logit_NV[rows])
        p_NV /= total_N1
        out_NV[rows] = p_NV * v_NV[rows]
        out_NV[rows] -= p_NV * out_NV[rows].sum(axis=-1, keepdims=True)
    return out_NV


def root_product(logit_NV: Array, e_NV: Array) -> Array:
    """S e per row, S = diag(√p) − p √pᵀ: a root of the Hessian, S Sᵀ = diag p − p pᵀ.

    Column v of S, √p_v (onehot(v) − p), is −√p_v times the gradient against label v.

    Proof: tests/test_loss.py::test_O11_the_root_times_its_transpose_is_the_hessian
    """
    out_NV = np.empty(e_NV.shape, np.result_type(logit_NV, e_NV))
    for rows in _few_rows(logit_NV):
        _top, p_NV, total_N1 = _exponentials(logit_NV[rows])
        p_NV /= total_N1
        out_NV[rows] = np.sqrt(p_NV) * e_NV[rows]
        out_NV[rows] -= p_NV * out_NV[rows].sum(axis=-1, keepdims=True)
    return out_NV


def _exponentials(z_NV: Array) -> tuple[Array, Array, Array]:
    """(top, e, total) per row: top = max z, e = exp(z − top), total = Σ e; p = e / total."""
    top_N1 = z_NV.real.max(axis=-1, keepdims=True)
    e_NV = np.exp(z_NV - top_N1)
    return top_N1, e_NV, e_NV.sum(axis=-1, keepdims=True)


def _few_rows(logit_NV: Array) -> Iterator[slice]:
    """Rows whose numbers stay in the cache while they are worked on; each row is by itself."""
    N, V = logit_NV.shape
    step = max(1, CACHED // V)
    return (slice(begin, begin + step) for begin in range(0, N, step))


def uniforms(seed: int, draw: int, index: int, length: int) -> Array:
    """SAMPLING: the uniforms of positions 0 .. length − 1 of sequence `index`, (length,)."""
    seed = require_seed("uniforms", seed)
    philox = np.random.Philox(key=seed, counter=[0, 0, draw, index])
    return np.random.Generator(philox).random(length)


def signs(seed: int, draw: int, index: int, t: int, vocabulary: int) -> Array:
    """SAMPLING: the signs of position t of sequence `index`, +1 or −1 per entry, (V,) int8."""
    seed = require_seed("signs", seed)
    philox = np.random.Philox(key=seed, counter=[0, 1 + t, draw, index])
    word = philox.random_raw(-(-vocabulary // 64)).astype("<u8")
    bit_V = np.unpackbits(word.view(np.uint8), count=vocabulary, bitorder="little")
    return 2 * bit_V.astype(np.int8) - 1


def draw_labels(logit_NV: Array, uniform_N: Array) -> Array:
    """SAMPLING: one label per row by inverting the sequential float64 cumsum of exp(z − max z)."""
    label_N = np.empty(len(uniform_N), dtype=np.int64)
    for rows in _few_rows(logit_NV):
        z_NV = logit_NV[rows].astype(np.float64)
        z_NV -= z_NV.max(axis=-1, keepdims=True)
        e_NV = np.exp(z_NV, out=z_NV)
        c_NV = np.cumsum(e_NV, axis=-1)
        label_N[rows] = (c_NV <= (uniform_N[rows] * c_NV[:, -1])[:, None]).sum(axis=-1)
        # u·c can round up to c itself: then no entry lies above it
        last_N = e_NV.shape[-1] - 1 - np.argmax(e_NV[:, ::-1] > 0, axis=-1)
        label_N[rows] = np.where(label_N[rows] < e_NV.shape[-1], label_N[rows], last_N)
    return label_N
