"""The only importer of numba: what NumPy is slow at. BLAS does the products.

Each kernel computes what the definition named in its docstring computes, on one thread and without
the GIL: parallelism is over shards, so that no thread count changes a bit. `reassoc` lets LLVM
split a row's sum over the lanes of one register, always in the same way.
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
    """Compiled code kept on disk; what cannot be read or kept there is compiled anew.

    Proof: tests/test_reports_files.py::test_compiled_code_that_was_cut_short_is_compiled_anew
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # whatever a file that a kill or a full disk cut short unpickles to
            with suppress(Exception):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def njit(*, cache: bool, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`, its compiled code kept on disk if `cache`, and where there is a place for it.

    Proof: tests/test_reports_files.py::test_compiled_code_that_can_be_kept_nowhere_is_compiled_anew
    """

    def compiled(function: Callable[..., Any]) -> Any:
        made = numba.njit(**options)(function)
        if cache and hasattr(made, "enable_caching"):  # else NUMBA_DISABLE_JIT is set
            with suppress(RuntimeError):  # a read-only installation, and no home
                made._cache = _Kept(function)  # type: ignore[no-untyped-call]
        return made

    return compiled


_EXACT = {"contract", "nsz"}
_LANES = {"contract", "nsz", "reassoc"}


def jit() -> dict[str, Any]:
    """What decides how kernels are compiled: Numba's settings, and the CPU that it compiles for."""
    names = ("DISABLE_JIT", "CPU_FEATURES", "OPT", "ENABLE_AVX", "LOOP_VECTORIZE", "SLP_VECTORIZE")
    settings = {name.lower(): str(getattr(config, name, None)) for name in names}
    return {"cpu": getattr(config, "CPU_NAME", None) or get_host_cpu_name(), **settings}


# ------------------------------------------------------------------ functions of one number


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def _exp32(x: Any) -> Any:
    """e^x in float32 to 2 ulp: Cody-Waite reduction and a polynomial, so that loops vectorise.

    0 below e^-87 and infinite above e^88, close to the smallest and the largest number there is.
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
    """Φ(z) in float32 to 0.8e-7: Abramowitz & Stegun 7.1.26, so that loops vectorise."""
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
    """total[i, :i+1] += product[i, :i+1], widened to float64: a shard's sum joins its block's.

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
    """Definition: model.layers.rms_norm_backward at s = 1; d_gain is a sum in row order."""
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
"""The activations. Which one a kernel is for is said by the length of a tuple, `(0,) * GELU`: that
is a type, and Numba compiles a loop without branches for each type."""


@njit(cache=True, nogil=True, fastmath=_EXACT, error_model="numpy")
def activation(which: tuple[int, ...], z: Any) -> tuple[Any, Any]:
    """Definition: model.layers.ACTIVATIONS, f(z) and f'(z) of one number.

    gelu_tanh is z · sigmoid(2u), for (1 + tanh u) / 2 = 1 / (1 + exp(−2u)).
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
    """In place: x → exp((x − top) scale), in forward and backward with the same bits."""
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
    """In place: scores q·k → probabilities over the visible keys; key s of the block is begin + s.

    Definition: model.layers.softmax_over(score * scale, visible); also each row's top = max q·k and
    total = Σ exp((q·k − top) scale), of which `softmax_backward` makes the same probabilities.
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
    """In place: scores q·k → the forward's probabilities, and their gradient → the scores', · size.

    d_score = p (d_p − Σ_s p d_p), d_p counted from the mean of the likeliest keys', whose e^0 is 1.
    All keys of a row lie in its block. Definition: model.layers.attention_backward.
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
    """high[n] + low[n] ≈ the exact sum of x[:n], to n·2⁻¹⁰⁶ relative; high is its rounding."""
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
