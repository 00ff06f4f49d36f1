"""The only importer of numba: loops that NumPy is slow at. BLAS does the products.

Each kernel computes its definition, which its docstring names. It runs on one thread and without
the GIL. Parallelism is over shards, so that the number of threads changes no bit. `reassoc` lets
LLVM split a row's sum over the lanes of one register, always in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name
from numba import config, types
from numba.core.caching import FunctionCache
from numba.extending import overload

from refcurv.law.checks import Array


class _Kept(FunctionCache):
    """Compiled code kept on disk. Code that cannot be read from there is compiled again.

    Proof: tests/test_reports_files.py::test_compiled_code_that_was_cut_short_is_compiled_anew
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # a kill or a full disk cut the file short: unpickling may raise anything
            with suppress(Exception):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def njit(*, cache: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`; with `cache` the compiled code is kept on disk, where a folder allows it.

    Proof: tests/test_reports_files.py::test_compiled_code_that_can_be_kept_nowhere_is_compiled_anew
    """

    def compiled(function: Callable[..., Any]) -> Any:
        made = numba.njit(**options)(function)
        if cache and hasattr(made, "enable_caching"):  # else NUMBA_DISABLE_JIT is set
            with suppress(RuntimeError):  # the installation is read-only, and there is no home
                made._cache = _Kept(function)  # type: ignore[no-untyped-call]
        return made

    return compiled


_EXACT = {"contract", "nsz"}
_LANES = {"contract", "nsz", "reassoc"}


def jit() -> dict[str, Any]:
    """What decides how kernels are compiled: Numba's settings and its target CPU."""
    names = ("DISABLE_JIT", "CPU_FEATURES", "OPT", "ENABLE_AVX", "LOOP_VECTORIZE", "SLP_VECTORIZE")
    settings = {name.lower(): str(getattr(config, name, None)) for name in names}
    return {"cpu": getattr(config, "CPU_NAME", None) or get_host_cpu_name(), **settings}


# ------------------------------------------------------------------ functions of one number


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def _exp32(x: Any) -> Any:
    """e^x in float32 to 2 ulp: Cody-Waite reduction and a polynomial, so that loops vectorise.

    e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r = 1 + r + r² p(r). ln 2 is the
    sum of 0.693359375 = 355/512, whose product with n is exact, and −2.12194440e-4. 2^n is built
    from its bits, which needs n in [−126, 127]. So the result is 0 below x = −87 and infinite above
    88; the smallest normal float32 is e^-87.3, the largest e^88.7.

    Source: Moshier, Cephes Mathematical Library, expf.c: the constants and p.
    """
    low, high = x < np.float32(-87.0), x > np.float32(88.0)
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = (p * r * r + r + np.float32(1)) * power
    return np.float32(0) if low else np.float32(np.inf) if high else y


def exp(x: Any) -> Any:
    """np.exp of one number; in float32 0 below e^-87 and infinite above e^88."""
    return np.exp(x)


@overload(exp)
def _exp(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: _exp32(x)  # noqa: PLW0108
    return lambda x: math.exp(x)  # noqa: PLW0108


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def _normal32(z: Any, e: Any) -> Any:
    """Φ(z) in float32 to 3e-7, without branches, so that loops vectorise.

    erf(x) = 1 − (a_1 t + ... + a_5 t⁵) exp(−x²), t = 1/(1 + 0.3275911 x), x = |z|/√2, to 1.5e-7. Φ
    has half of that. Rounding adds the rest: the a_k alternate in sign, up to 1.45.

    Source: Abramowitz & Stegun 1964, 7.1.26.
    """
    one = np.float32(1)
    t = one / (one + np.float32(0.3275911 * math.sqrt(0.5)) * abs(z))
    p = np.float32(1.061405429) * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    tail = np.float32(0.5) * p * t * e
    return tail if z < 0 else one - tail


def normal(z: Any, e: Any) -> Any:
    """Φ(z) = (1 + erf(z/√2)) / 2 of one number, given e = exp(−z²/2)."""
    return 0.5 * (1 + math.erf(z * math.sqrt(0.5)))


@overload(normal)
def _normal(z, e):  # type: ignore[no-untyped-def]
    if z == types.float32:
        return lambda z, e: _normal32(z, e)  # noqa: PLW0108
    return lambda z, e: 0.5 * (1 + math.erf(z * math.sqrt(0.5)))


def number(x: float, like: Any) -> Any:
    """A constant in the dtype of another number."""
    return like.dtype.type(x)


@overload(number)
def _number(x, like):  # type: ignore[no-untyped-def]
    if like == types.float32:
        return lambda x, like: np.float32(x)
    return lambda x, like: x


# ------------------------------------------------------------------ accumulation


@njit(cache=True, nogil=True)
def fold_triangle(total_DD: Array, product_DD: Array) -> None:
    """total[i, :i+1] += product[i, :i+1], widened to float64: adds a shard's sum to a total.

    Definition: total += np.tril(product.astype(float64)).
    """
    for i in range(total_DD.shape[0]):
        for j in range(i + 1):
            total_DD[i, j] += np.float64(product_DD[i, j])


@njit(cache=True, nogil=True)
def mirror_triangle(total_DD: Array) -> None:
    """Copy the lower triangle to the upper, tile by tile: the result is exactly symmetric."""
    D, tile = total_DD.shape[0], 64
    for top in range(0, D, tile):
        for left in range(0, top + 1, tile):
            for i in range(top, min(top + tile, D)):
                for j in range(left, min(left + tile, i)):
                    total_DD[j, i] = total_DD[i, j]


# ------------------------------------------------------------------ layers


@njit(cache=True, nogil=True, fastmath=_LANES, error_model="numpy")
def rms_norm_forward(x_ND: Array, gain_D: Array, eps_N: Array, y_ND: Array, r_N: Array) -> None:
    """Definition: model.layers.rms_norm_forward at s = 1, r = 1 / sqrt(mean(x²) + eps) per row."""
    N, D = x_ND.shape
    for n in range(N):
        square = gain_D[0] * 0
        for d in range(D):
            square += x_ND[n, d] * x_ND[n, d]
        r = gain_D.dtype.type(1) / np.sqrt(square / gain_D.dtype.type(D) + eps_N[n])
        r_N[n] = r
        for d in range(D):
            y_ND[n, d] = x_ND[n, d] * r * gain_D[d]


@njit(cache=True, nogil=True, fastmath=_LANES, error_model="numpy")
def rms_norm_backward(
    d_y_ND: Array, x_ND: Array, gain_D: Array, r_N: Array, d_x_ND: Array, d_gain_D: Array
) -> None:
    """Definition: model.layers.rms_norm_backward at s = 1; d_gain is a sum in row order.

    Here x_hat = x r, so that x_hat mean(d_hat x_hat) = x · r² Σ d_hat x / D.
    """
    N, D = x_ND.shape
    for n in range(N):
        r = r_N[n]
        dot = r * 0
        for d in range(D):
            dot += d_y_ND[n, d] * gain_D[d] * x_ND[n, d]
        dot = dot * r * r / gain_D.dtype.type(D)
        for d in range(D):
            d_gain_D[d] += d_y_ND[n, d] * (x_ND[n, d] * r)
            d_x_ND[n, d] = r * (d_y_ND[n, d] * gain_D[d] - x_ND[n, d] * dot)


SILU, GELU, GELU_TANH, RELU = range(4)
"""The activations. A kernel takes one as a tuple of that length, `(0,) * GELU`. The length is part
of the tuple's type, and Numba compiles each type by itself: a loop without branches."""


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def activation(which: tuple[int, ...], z: Any) -> tuple[Any, Any]:
    """Definition: model.layers.ACTIVATIONS, f(z) and f'(z) of one number.

    gelu_tanh is z · sigmoid(2u), for (1 + tanh u) / 2 = 1 / (1 + exp(−2u)). silu is z · sigmoid(z).
    Both have the form z · s(x), s = sigmoid, with f' = s + z s (1 − s) x'.
    """
    kind, one, half = len(which), number(1.0, z), number(0.5, z)
    if kind == RELU:
        step = one if z > 0 else one - one
        return z * step, step
    if kind == GELU:
        e = exp(-half * z * z)
        Phi = normal(z, e)
        return z * Phi, Phi + z * e * number(1 / math.sqrt(2 * math.pi), z)
    x, slope = z, one
    if kind == GELU_TANH:
        w = min(max(z, number(-99.0, z)), number(99.0, z))  # there sigmoid(2u) is 0 or 1
        size, c = number(2 * math.sqrt(2 / math.pi), z), number(0.044715, z)
        x, slope = size * w * (one + c * w * w), size * (one + number(3.0, z) * c * w * w)
    s = one / (one + exp(-x))
    return z * s, s + z * s * (one - s) * slope


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def mlp_forward(which: tuple[int, ...], gate_N: Array | None, up_N: Array, h_N: Array) -> None:
    """Definition: model.layers.mlp_forward, on flat arrays."""
    for n in range(h_N.shape[0]):
        if gate_N is None:
            h_N[n] = activation(which, up_N[n])[0]
        else:
            h_N[n] = activation(which, gate_N[n])[0] * up_N[n]


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def mlp_backward(
    which: tuple[int, ...],
    d_h_N: Array,
    gate_N: Array | None,
    up_N: Array,
    d_gate_N: Array | None,
    d_up_N: Array,
) -> None:
    """Definition: model.layers.mlp_backward, on flat arrays."""
    for n in range(d_h_N.shape[0]):
        if gate_N is None:
            d_up_N[n] = d_h_N[n] * activation(which, up_N[n])[1]
        else:
            f, slope = activation(which, gate_N[n])
            d_gate_N[n] = d_h_N[n] * up_N[n] * slope  # type: ignore[index]  # there with its gate
            d_up_N[n] = d_h_N[n] * f


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def _exponentials(row: Array, top: Any, scale: Any) -> None:
    """In place: x → exp((x − top) scale). Forward and backward call it, and get the same bits."""
    for s in range(row.shape[0]):
        row[s] = exp((row[s] - top) * scale)


@njit(cache=True, nogil=True, fastmath=_LANES, error_model="numpy")
def softmax_forward(
    score_BHTS: Array,
    first_BT: Array,
    last_BT: Array,
    begin: Any,
    scale: Any,
    top_BHT: Array,
    total_BHT: Array,
) -> None:
    """In place: scores q·k → probabilities over the visible keys. Column s is key begin + s.

    Definition: model.layers.softmax_over(score * scale, visible). Each row's top = max q·k and
    total = Σ exp((q·k − top) scale) are kept: `softmax_backward` makes the same p from them.
    """
    B, H, T, S = score_BHTS.shape
    zero = number(0.0, scale)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                row = score_BHTS[b, h, t]
                low = max(first_BT[b, t] - begin, 0)
                high = max(min(last_BT[b, t] - begin + 1, S), low)
                row[:low] = 0
                row[high:] = 0
                top = row[low] if high > low else zero
                for s in range(low, high):
                    top = max(top, row[s])
                _exponentials(row[low:high], top, scale)
                total = zero
                for s in range(low, high):
                    total += row[s]
                for s in range(low, high):
                    row[s] /= total
                top_BHT[b, h, t] = top
                total_BHT[b, h, t] = total


@njit(cache=True, nogil=True, fastmath=_LANES, error_model="numpy")
def softmax_backward(
    score_BHTS: Array,
    d_p_BHTS: Array,
    first_BT: Array,
    last_BT: Array,
    begin: Any,
    scale: Any,
    size: Any,
    top_BHT: Array,
    total_BHT: Array,
) -> None:
    """In place: scores q·k → probabilities p, and d_p → d_score · size.

    d_score = p (d_p − Σ_s p d_p). First `start` is subtracted from d_p: its mean over the likeliest
    keys, those with exp(0) = 1. A row's visible keys are all here. See `attention_backward` in
    model.layers, which is the definition.
    """
    B, H, T, S = score_BHTS.shape
    zero, one = number(0.0, scale), number(1.0, scale)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                row, d_row = score_BHTS[b, h, t], d_p_BHTS[b, h, t]
                low = max(first_BT[b, t] - begin, 0)
                high = max(min(last_BT[b, t] - begin + 1, S), low)
                row[:low] = 0
                row[high:] = 0
                d_row[:low] = 0
                d_row[high:] = 0
                top, total = top_BHT[b, h, t], total_BHT[b, h, t]
                start, ties, delta = zero, zero, zero
                _exponentials(row[low:high], top, scale)
                for s in range(low, high):
                    start += d_row[s] if row[s] >= one else zero
                    ties += one if row[s] >= one else zero
                    row[s] /= total
                start /= max(ties, one)
                for s in range(low, high):
                    d_row[s] -= start
                    delta += row[s] * d_row[s]
                for s in range(low, high):
                    d_row[s] = row[s] * (d_row[s] - delta) * size


# ------------------------------------------------------------------ selection


@njit(cache=True, nogil=True)
def count_at_least(lam_O: Array, mu_I: Array, threshold: float, count_O: Array) -> None:
    """count[i] = #{j : fl(λ_i μ_j) ≥ threshold}; both spectra descending, so one walk suffices.

    Definition: ((lam[:, None] * mu) >= threshold).sum(axis=1).
    """
    j = mu_I.shape[0]
    for i in range(lam_O.shape[0]):
        while j > 0 and lam_O[i] * mu_I[j - 1] < threshold:
            j -= 1
        count_O[i] = j


@njit(cache=True, nogil=True)
def _two_sum(a: float, b: float) -> tuple[float, float]:
    """a + b = s + e exactly, s the rounded sum (Knuth)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


@njit(cache=True, nogil=True)
def prefix_sums(x_N: Array, high_N: Array, low_N: Array) -> None:
    """high[n] + low[n] ≈ the exact sum of x[:n], to n·2⁻¹⁰⁶ relative; high is its rounding; x >= 0.

    Only low + e rounds. Where high + x[n] lies in [2^m, 2^(m+1)), |low| and |e| are at most half an
    ulp, 2^(m−53). So low + e is at most 2^(m−52), and its half ulp at most 2^(m−106).
    """
    high, low = 0.0, 0.0
    high_N[0], low_N[0] = high, low
    for n in range(x_N.shape[0]):
        high, e = _two_sum(high, x_N[n])
        high, low = _two_sum(high, low + e)
        high_N[n + 1], low_N[n + 1] = high, low


@njit(cache=True, nogil=True)
def staircase_mass(lam_O: Array, prefix: Array, count_O: Array) -> tuple[float, float]:
    """(high, low): the sum over rows of fl(λ_i · prefix[count_i]), nearly exact; see SELECT."""
    high, low = 0.0, 0.0
    for i in range(lam_O.shape[0]):
        high, e = _two_sum(high, lam_O[i] * prefix[count_O[i]])
        high, low = _two_sum(high, low + e)
    return high, low
