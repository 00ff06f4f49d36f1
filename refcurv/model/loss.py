"""Cross-entropy in nats: value, gradient and Hessian, and the labels that it is taken against."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refcurv.law.checks import Array, overflow_hint, require_finite, require_seed
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
    """LOSS: nats −log p[label] per row, and their gradient p − onehot(label) by the logits.

    A row whose label is negative has neither: 0 nats, gradient 0. With k the likeliest entry and
    R = Σ_{v≠k} exp(z_v − z_k), all of it keeps its digits as p → 1 and p → 0:

        nats = log(1 + R) + (z_k − z_label)          p_v = exp(z_v − z_k) / (1 + R)
        the label's entry = p − 1, and where p > 1/2, which p − 1 would lose, −R / (1 + R)

    An entry's relative error is at most (V + c + |z_v − z_k|) roundings, c a few: the last is what
    a rounding of the logits themselves does to it.

    Raises:
        NonFiniteError: a logit is NaN or +inf. −inf is an entry that cannot come.

    Proof: tests/test_loss.py::test_every_digit_of_the_gradient_and_of_the_nats
    """
    nats_N = np.zeros(len(label_N), dtype=logit_NV.dtype)
    d_logit_NV = np.empty(logit_NV.shape, dtype=logit_NV.dtype)
    for rows in _few_rows(logit_NV):
        z_NV, p_NV, label_n = logit_NV[rows], d_logit_NV[rows], label_N[rows]
        k_N = _below_top(z_NV, p_NV)
        np.exp(p_NV, out=p_NV)
        others_N = _others(p_NV, k_N)
        p_NV /= (1 + others_N)[:, None]
        at = np.flatnonzero(label_n >= 0)
        label, R = label_n[at], others_N[at]
        with np.errstate(over="ignore"):  # beyond the largest number nats are infinite
            nats_N[rows][at] = _log1p(R) + (z_NV[at, k_N[at]] - z_NV[at, label])
        p = p_NV[at, label]
        p_NV[at, label] = np.where(p.real > 0.5, 0 - R / (1 + R), p - 1)
        p_NV[label_n < 0] = 0
    return nats_N, d_logit_NV


def hessian_product(logit_NV: Array, v_NV: Array) -> Array:
    """(diag p − p pᵀ) v per row: the Hessian of −log p[label] by the logits, for every label.

    Exact to roundings of each entry's terms, Σ_w |H_vw v_w|, as p → 1 too.

    Proof: tests/test_loss.py::test_O11_the_hessian_is_the_complex_step_of_the_gradient,
        ::test_every_digit_of_the_roots_and_of_the_hessian
    """
    out_NV = np.empty(v_NV.shape, np.result_type(logit_NV, v_NV))
    for rows in _few_rows(logit_NV):
        e_NV = np.empty_like(out_NV[rows])
        k_N = _below_top(logit_NV[rows], e_NV)
        np.exp(e_NV, out=e_NV)
        others_N = _others(e_NV, k_N)
        np.multiply(e_NV, v_NV[rows], out=out_NV[rows])
        _less_the_mean(out_NV[rows], e_NV, k_N, others_N)
        out_NV[rows] /= (1 + others_N)[:, None]
    return out_NV


def root_product(logit_NV: Array, e_NV: Array) -> Array:
    """S e per row, S = diag(√p) − p √pᵀ: a root of the Hessian, S Sᵀ = diag p − p pᵀ.

    Column v of S, √p_v (onehot(v) − p), is −√p_v times the gradient against label v, digit for
    digit. S e is exact to roundings of each entry's terms, Σ_w |S_vw e_w|, as p → 1 too.

    Proof: tests/test_loss.py::test_O11_the_root_times_its_transpose_is_the_hessian,
        ::test_every_digit_of_the_roots_and_of_the_hessian
    """
    out_NV = np.empty(e_NV.shape, np.result_type(logit_NV, e_NV))
    for rows in _few_rows(logit_NV):
        root_NV = out_NV[rows]
        k_N = _below_top(logit_NV[rows], root_NV)
        root_NV /= 2  # exp(x/2) is there long after exp(x) has underflowed
        np.exp(root_NV, out=root_NV)
        p_NV = root_NV * root_NV
        others_N = _others(p_NV, k_N)
        root_NV *= e_NV[rows]
        _less_the_mean(root_NV, p_NV, k_N, others_N)
        root_NV /= np.sqrt(1 + others_N)[:, None]
    return out_NV


def _below_top(z_NV: Array, x_NV: Array) -> Array:
    """Into x: z − z_k per row; returns k, the likeliest entry (the first of equals).

    All of z_k is subtracted, its imaginary part too, so that exp(x_k) = 1 in a complex step.
    Raises NonFiniteError for NaN or +inf, which would be the largest, and a row that is all −inf.
    """
    k_N = np.asarray(z_NV.real.argmax(axis=-1))
    top_N1 = np.take_along_axis(z_NV, k_N[:, None], axis=-1)
    if not np.isfinite(top_N1).all():
        what = "the largest logit of each row"
        require_finite("loss", what, top_N1[:, 0], overflow_hint(z_NV.dtype))
    with np.errstate(over="ignore"):  # so far below the largest that exp is 0
        np.subtract(z_NV, top_N1, out=x_NV)
    return k_N


def _others(e_NV: Array, k_N: Array) -> Array:
    """Σ e without entry k, which is 1: as p_k → 1 it is what tells p_k from 1."""
    n = np.arange(len(k_N))
    e_NV[n, k_N] = 0
    others_N = e_NV.sum(axis=-1)
    e_NV[n, k_N] = 1
    return np.asarray(others_N)


def _less_the_mean(t_NV: Array, p_NV: Array, k_N: Array, others_N: Array) -> None:
    """t − p Σ t / Σ p per row, in place; uses up p, of which p_k = 1 and the others' sum is given.

    Nearly all of t_k would cancel as p_k comes to be all of Σ p: t_k Σ_{v≠k} p_v / Σ p is left.
    """
    n = np.arange(len(k_N))
    own_N = t_NV[n, k_N]
    t_NV[n, k_N] = 0
    rest_N = t_NV.sum(axis=-1)
    p_NV *= ((own_N + rest_N) / (1 + others_N))[:, None]
    t_NV -= p_NV
    t_NV[n, k_N] = (own_N * others_N - rest_N) / (1 + others_N)


def _log1p(x: Array) -> Array:
    """log(1 + x); of complex x too, where NumPy's loses the digits of a small real part."""
    if x.dtype.kind != "c":
        return np.asarray(np.log1p(x))
    a, b = x.real, x.imag
    return np.asarray(np.log1p(a * (2 + a) + b * b) / 2 + 1j * np.arctan2(b, 1 + a))


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
