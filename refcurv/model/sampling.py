"""SAMPLING: labels and signs, drawn by a counter from the seed, the draw and the position."""

from __future__ import annotations

import numpy as np

from refcurv.law.checks import Array, require_seed
from refcurv.model.loss import few_rows


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
    for rows in few_rows(logit_NV):
        z_NV = logit_NV[rows].astype(np.float64)
        z_NV -= z_NV.max(axis=-1, keepdims=True)
        e_NV = np.exp(z_NV, out=z_NV)
        c_NV = np.cumsum(e_NV, axis=-1)
        label_N[rows] = (c_NV <= (uniform_N[rows] * c_NV[:, -1])[:, None]).sum(axis=-1)
        # u·c can round up to c itself: then no entry lies above it
        last_N = e_NV.shape[-1] - 1 - np.argmax(e_NV[:, ::-1] > 0, axis=-1)
        label_N[rows] = np.where(label_N[rows] < e_NV.shape[-1], label_N[rows], last_N)
    return label_N
