"""Attention in kernels: head by head, some queries at a time, all in the cache between products.

The scores of a tile (some queries, the keys that any of them sees) are made, turned into p and used
up before the next tile's. Nothing of the size (T, S) is ever there. BLAS does the products, on
arrays that are as it likes them: each head's rows are first copied to lie side by side.

The definition is `model.layers`: attention_forward, attention_backward, softmax_over, soft_cap.

Proof: tests/test_fast.py::test_attention_on_flat_and_saturated_heads,
    ::test_the_backward_has_the_forwards_probabilities, ::test_tiles_leave_out_what_nobody_sees
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refcurv.algebra.kernels import EXACT, REORDERED, exp, largest, njit, number, tanh
from refcurv.law.checks import Array

LANES = 32
"""So many keys LLVM's loops do at a time (chosen: four registers of eight float32). Tiles, and what
is done to a row, begin and end at multiples of it, so that no key is done by itself. What a row
does not see in between has the score −inf, and p = 0."""


# ------------------------------------------------------------------ one tile


@njit(cache=True, nogil=True)
def keys_of(first_T: Array, last_T: Array) -> tuple[int, int]:
    """The keys begin <= s < end that any of the queries sees, out to LANES; (0, 0) for none."""
    begin, end = 2**62, 0
    for t in range(first_T.shape[0]):
        if first_T[t] <= last_T[t]:
            begin, end = min(begin, first_T[t]), max(end, last_T[t] + 1)
    if not end:
        return 0, 0
    return begin // LANES * LANES, -(-end // LANES) * LANES


@njit(cache=True, nogil=True)
def _hide(row: Array, low: int, high: int) -> tuple[int, int]:
    """Scores other than low <= s < high: −inf out to LANES, which are returned, and 0 beyond."""
    begin, end = low // LANES * LANES, -(-high // LANES) * LANES
    row[:begin] = 0
    row[begin:low] = -np.inf
    row[high:end] = -np.inf
    row[end:] = 0
    return begin, end


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def _exponentials(row: Array, top: Any, scale: Any) -> None:
    """In place: x → exp((x − top) scale). Forward and backward call it, and get the same bits."""
    for s in range(row.shape[0]):
        row[s] = exp((row[s] - top) * scale)


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
def softmax_forward(
    score_TS: Array,
    first_T: Array,
    last_T: Array,
    begin: int,
    scale: Any,
    top_T: Array,
    total_T: Array,
) -> None:
    """In place: scores q·k → probabilities over the visible keys. Column s is key begin + s.

    Definition: model.layers.softmax_over(score * scale, visible). Each row's top = max q·k and
    total = Σ exp((q·k − top) scale) are kept: `softmax_backward` makes the same p from them. There
    must be a multiple of LANES columns, and more than the last visible key.
    """
    zero = number(0.0, scale)
    for t in range(score_TS.shape[0]):
        low, high = max(first_T[t] - begin, 0), last_T[t] - begin + 1
        top_T[t] = total_T[t] = zero
        if high <= low:
            score_TS[t] = 0
            continue
        left, right = _hide(score_TS[t], low, high)
        row, total = score_TS[t, left:right], zero
        top = largest(row)
        _exponentials(row, top, scale)
        for s in range(row.shape[0]):
            total += row[s]
        for s in range(row.shape[0]):
            row[s] /= total
        top_T[t], total_T[t] = top, total


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
def softmax_backward(
    score_TS: Array,
    d_p_TS: Array,
    first_T: Array,
    last_T: Array,
    begin: int,
    scale: Any,
    size: Any,
    top_T: Array,
    total_T: Array,
) -> None:
    """In place: scores q·k → probabilities p, and d_p → d_score · size.

    d_score = p (d_p − Σ_s p d_p). First `start` is subtracted from d_p: its mean over the likeliest
    keys, those with exp(0) = 1. A row's visible keys are all here. See `attention_backward` in
    model.layers, which is the definition.
    """
    zero, one = number(0.0, scale), number(1.0, scale)
    for t in range(score_TS.shape[0]):
        low, high = max(first_T[t] - begin, 0), last_T[t] - begin + 1
        if high <= low:
            score_TS[t] = 0
            d_p_TS[t] = 0
            continue
        left, right = _hide(score_TS[t], low, high)
        d_p_TS[t, :low] = 0
        d_p_TS[t, high:] = 0
        row, d_row, total = score_TS[t, left:right], d_p_TS[t, left:right], total_T[t]
        start, ties, delta = zero, zero, zero
        _exponentials(row, top_T[t], scale)
        for s in range(row.shape[0]):
            start += d_row[s] if row[s] >= one else zero
            ties += one if row[s] >= one else zero
            row[s] /= total
        start /= max(ties, one)
        for s in range(row.shape[0]):
            d_row[s] -= start
            delta += row[s] * d_row[s]
        for s in range(row.shape[0]):
            d_row[s] = row[s] * (d_row[s] - delta) * size


# ------------------------------------------------------------------ the soft-cap


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def bound(score_TS: Array, scale: Any) -> None:
    """In place: x → tanh(scale x)."""
    for t in range(score_TS.shape[0]):
        row = score_TS[t]
        for s in range(row.shape[0]):
            row[s] = tanh(row[s] * scale)


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def bend(score_TS: Array, scale: Any) -> Array:
    """The slope of tanh at scale x, 1 / cosh² = 4 e / (1 + e)², e = exp(−2 |scale x|)."""
    slope_TS, one, two = np.empty_like(score_TS), number(1.0, scale), number(2.0, scale)
    for t in range(score_TS.shape[0]):
        row, slope = score_TS[t], slope_TS[t]
        for s in range(row.shape[0]):
            e = exp(-two * abs(row[s] * scale))
            slope[s] = two * two * e / ((one + e) * (one + e))
    return slope_TS


@njit(cache=True, nogil=True)
def _scale(x_TS: Array, by_TS: Array) -> None:
    """In place: x → x · by."""
    for t in range(x_TS.shape[0]):
        for s in range(x_TS.shape[1]):
            x_TS[t, s] *= by_TS[t, s]


# ------------------------------------------------------------------ all heads


@njit(cache=True, nogil=True)
def _head(x_BTHE: Array, b: int, h: int, begin: int, end: int) -> Array:
    """The rows begin <= t < end of a head, side by side; 0 behind the last position."""
    out_TE = np.empty((end - begin, x_BTHE.shape[3]), x_BTHE.dtype)
    there = min(end, x_BTHE.shape[1]) - begin
    for n in range(there):
        for e in range(out_TE.shape[1]):
            out_TE[n, e] = x_BTHE[b, begin + n, h, e]
    out_TE[there:] = 0
    return out_TE


@njit(cache=True, nogil=True)
def _put(x_TE: Array, out_BTHE: Array, b: int, h: int, begin: int) -> None:
    """Write them back, those that have a position."""
    for n in range(min(x_TE.shape[0], out_BTHE.shape[1] - begin)):
        for e in range(x_TE.shape[1]):
            out_BTHE[b, begin + n, h, e] = x_TE[n, e]


@njit(cache=True, nogil=True)
def _add(x_SE: Array, out_SE: Array) -> None:
    """out += x; written out, for NumPy's way of saying it takes Numba seconds to compile."""
    for s in range(x_SE.shape[0]):
        for e in range(x_SE.shape[1]):
            out_SE[s, e] += x_SE[s, e]


@njit(cache=True, nogil=True)
def attention_forward(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    first_BT: Array,
    last_BT: Array,
    size: Any,
    cap: Any,
    rows: int,
    context_BTHE: Array,
    top_BHT: Array,
    total_BHT: Array,
) -> None:
    """Definition: model.layers.attention_forward, scale = size; a tile has `rows` queries.

    Into context, and for the backward into top and total (`softmax_forward`).
    """
    B, T, H, _ = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    padded = -(-S // LANES) * LANES
    for b in range(B):
        for g in range(K):
            k_SE, v_SE = _head(k_BSKE, b, g, 0, padded), _head(v_BSKE, b, g, 0, padded)
            for h in range(g * (H // K), (g + 1) * (H // K)):
                for t in range(0, T, rows):
                    end = min(t + rows, T)
                    sight = first_BT[b, t:end], last_BT[b, t:end]
                    kept = top_BHT[b, h, t:end], total_BHT[b, h, t:end]
                    left, right = keys_of(*sight)
                    p_TS, scale = np.dot(_head(q_BTHE, b, h, t, end), k_SE[left:right].T), size
                    if cap is not None:
                        bound(p_TS, size / cap)
                        scale = cap
                    softmax_forward(p_TS, *sight, left, scale, *kept)
                    _put(np.dot(p_TS, v_SE[left:right]), context_BTHE, b, h, t)


@njit(cache=True, nogil=True)
def attention_backward(
    d_context_BTHE: Array,
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    first_BT: Array,
    last_BT: Array,
    size: Any,
    cap: Any,
    rows: int,
    top_BHT: Array,
    total_BHT: Array,
    d_q_BTHE: Array,
    d_k_BSKE: Array,
    d_v_BSKE: Array,
) -> None:
    """Definition: model.layers.attention_backward, by the tiles of `attention_forward`."""
    B, T, H, _ = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    padded = -(-S // LANES) * LANES
    for b in range(B):
        for g in range(K):
            k_SE, v_SE = _head(k_BSKE, b, g, 0, padded), _head(v_BSKE, b, g, 0, padded)
            d_k_SE, d_v_SE = np.zeros_like(k_SE), np.zeros_like(v_SE)
            for h in range(g * (H // K), (g + 1) * (H // K)):
                for t in range(0, T, rows):
                    end = min(t + rows, T)
                    sight = first_BT[b, t:end], last_BT[b, t:end]
                    kept = top_BHT[b, h, t:end], total_BHT[b, h, t:end]
                    left, right = keys_of(*sight)
                    q_TE, d_TE = _head(q_BTHE, b, h, t, end), _head(d_context_BTHE, b, h, t, end)
                    keys = k_SE[left:right], v_SE[left:right]
                    p_TS, d_p_TS = _slopes(q_TE, d_TE, keys, sight, left, size, cap, kept)
                    _put(np.dot(d_p_TS, k_SE[left:right]), d_q_BTHE, b, h, t)
                    _add(np.dot(d_p_TS.T, q_TE), d_k_SE[left:right])
                    _add(np.dot(p_TS.T, d_TE), d_v_SE[left:right])
            _put(d_k_SE, d_k_BSKE, b, g, 0)
            _put(d_v_SE, d_v_BSKE, b, g, 0)


@njit(cache=True, nogil=True)
def _slopes(
    q_TE: Array,
    d_TE: Array,
    keys: tuple[Array, Array],
    sight: tuple[Array, Array],
    begin: int,
    size: Any,
    cap: Any,
    kept: tuple[Array, Array],
) -> tuple[Array, Array]:
    """The probabilities of one tile, and the gradients of its products q·k."""
    k_SE, v_SE = keys
    # forward:  p = softmax(cap(q @ kᵀ size));  context = p @ v
    p_TS, d_p_TS = np.dot(q_TE, k_SE.T), np.dot(d_TE, v_SE.T)
    if cap is None:
        softmax_backward(p_TS, d_p_TS, *sight, begin, size, size, *kept)
        return p_TS, d_p_TS
    slope_TS = bend(p_TS, size / cap)
    bound(p_TS, size / cap)
    softmax_backward(p_TS, d_p_TS, *sight, begin, cap, size, *kept)
    _scale(d_p_TS, slope_TS)
    return p_TS, d_p_TS
