"""LOSS: cross-entropy in nats, its gradient, its Hessian and a root of it, by the logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refcurv.law.checks import Array, overflow_hint, require_finite

CACHED = 2**17
"""Logits worked on at one time: a megabyte in float64, within a core's own cache."""


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
    for rows in few_rows(logit_NV):
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
    for rows in few_rows(logit_NV):
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
    for rows in few_rows(logit_NV):
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


def few_rows(logit_NV: Array) -> Iterator[slice]:
    """Rows whose numbers stay in the cache while they are worked on; each row is by itself."""
    N, V = logit_NV.shape
    step = max(1, CACHED // V)
    return (slice(begin, begin + step) for begin in range(0, N, step))
