"""Cross-entropy in nats: value and gradient, and the labels that it is taken against."""

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


def reached(label_BT: Array, real_BT: Array, segment_BT: Array) -> Array:
    """ROWS: real positions at or before the last labelled one of their segment, (B, T) bool."""
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
        top_N1 = z_NV.real.max(axis=-1, keepdims=True)
        e_NV = np.exp(z_NV - top_N1)
        total_N1 = e_NV.sum(axis=-1, keepdims=True)
        nats_N[rows][at_N] = np.log(total_N1[at_N, 0]) - (z_NV[at_N, label] - top_N1[at_N, 0])
        e_NV /= total_N1
        e_NV[at_N, label] -= 1
        d_logit_NV[rows][at_N] = e_NV[at_N]
    return nats_N, d_logit_NV


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
