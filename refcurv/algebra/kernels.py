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

from refcurv.algebra.buffers import require_compiler
from refcurv.law.checks import Array


class _Kept(FunctionCache):
    """Compiled code kept on disk. Code that cannot be read from there is compiled again.

    Code that was compiled under other settings (`jit`), which Numba would take, is other code.

    Proof: tests/test_reports_files.py::test_compiled_code_that_was_cut_short_is_compiled_anew,
        ::test_compiled_code_of_other_settings_is_other_code
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), *jit().items())  # type: ignore[no-untyped-call]

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

    Proof: tests/test_room.py::test_no_kernel_is_compiled_where_the_compiler_has_no_room,
        tests/test_reports_files.py::test_compiled_code_that_can_be_kept_nowhere_is_compiled_anew
    """

    def compiled(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(**options)(function)
        if not hasattr(made, "enable_caching"):  # NUMBA_DISABLE_JIT is set
            return made
        compile_it = made._compiler.compile

        def with_room(args: Any, return_type: Any) -> Any:
            require_compiler(function.__name__)
            return compile_it(args, return_type)

        made._compiler.compile = with_room
        if cache:
            with suppress(RuntimeError):  # the installation is read-only, and there is no home
                made._cache = _Kept(function)  # type: ignore[no-untyped-call]
        return made

    return compiled


EXACT = {"contract", "nsz"}
"""What LLVM may do to a kernel's arithmetic: a b + c is rounded once, and −0 may be 0."""
REORDERED = {*EXACT, "reassoc"}
"""And a sum may be split over lanes."""


def jit() -> dict[str, Any]:
    """What decides how kernels are compiled: Numba's settings and its target CPU."""
    names = ("DISABLE_JIT", "CPU_FEATURES", "OPT", "ENABLE_AVX", "LOOP_VECTORIZE", "SLP_VECTORIZE")
    settings = {name.lower(): str(getattr(config, name, None)) for name in names}
    return {"cpu": getattr(config, "CPU_NAME", None) or get_host_cpu_name(), **settings}


# ------------------------------------------------------------------ functions of one number


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
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


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
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


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def _tanh32(x: Any) -> Any:
    """tanh x in float32 to 3 ulp, without branches, so that loops vectorise.

    x + x³ p(x²) below 0.625, and 1 − 2/(e^2|x| + 1) with the sign of x above.

    Source: Moshier, Cephes Mathematical Library, tanhf.c: the constants and p.
    """
    one, z = np.float32(1), x * x
    p = np.float32(-5.70498872745e-3)
    p = p * z + np.float32(2.06390887954e-2)
    p = p * z - np.float32(5.37397155531e-2)
    p = p * z + np.float32(1.33314422036e-1)
    p = p * z - np.float32(3.33332819422e-1)
    large = one - np.float32(2) / (exp(np.float32(2) * abs(x)) + one)
    large = -large if x < 0 else large
    return x + x * z * p if abs(x) < np.float32(0.625) else large


def tanh(x: Any) -> Any:
    """np.tanh of one number."""
    return np.tanh(x)


@overload(tanh)
def _tanh(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: _tanh32(x)  # noqa: PLW0108
    return lambda x: math.tanh(x)  # noqa: PLW0108


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
def fold_triangle(total_P: Array, product_DD: Array, onto: bool) -> None:
    """Write a shard's sum, widened to float64, `onto` a total: the lower triangle, row after row.

    Definition: total = (onto ? total : 0) + product[np.tril_indices(D)].astype(float64).
    """
    begin = 0
    for i in range(product_DD.shape[0]):
        row_P = total_P[begin : begin + i + 1]
        if onto:
            for j in range(i + 1):
                row_P[j] += np.float64(product_DD[i, j])
        else:
            for j in range(i + 1):
                row_P[j] = 0.0 + np.float64(product_DD[i, j])
        begin += i + 1


@njit(cache=True, nogil=True)
def unfold_triangle(total_P: Array, whole_DD: Array) -> None:
    """The symmetric matrix of a packed lower triangle, tile by tile, so that both stay in cache.

    Definition: whole[np.tril_indices(D)] = total; whole.T[np.tril_indices(D)] = total.
    """
    D, tile = whole_DD.shape[0], 64
    for top in range(0, D, tile):
        for left in range(0, top + 1, tile):
            for i in range(top, min(top + tile, D)):
                row_P = total_P[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
                for j in range(left, min(left + tile, i + 1)):
                    whole_DD[i, j] = row_P[j]
                    whole_DD[j, i] = row_P[j]


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
def squares(x_NX: Array, less_NX: Array | None, out_N: Array) -> None:
    """Definition: ((x.astype(float64) - less) ** 2).sum(axis=-1), without `less` of x alone."""
    for n in range(x_NX.shape[0]):
        square = 0.0
        for j in range(x_NX.shape[1]):
            x = np.float64(x_NX[n, j])
            if less_NX is not None:
                x -= np.float64(less_NX[n, j])
            square += x * x
        out_N[n] = square


# ------------------------------------------------------------------ layers


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
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


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
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


@njit(cache=True, nogil=True)
def rotate(x_BTHE: Array, cos_BT1R: Array, sin_BT1R: Array, y_BTHE: Array) -> None:
    """Definition: model.layers.rotate, with its bits."""
    B, T, H, E = x_BTHE.shape
    R = cos_BT1R.shape[3]
    for b in range(B):
        for t in range(T):
            cos, sin = cos_BT1R[b, t, 0], sin_BT1R[b, t, 0]
            for h in range(H):
                x, y = x_BTHE[b, t, h], y_BTHE[b, t, h]
                for r in range(R):
                    y[r] = x[r] * cos[r] - x[r + R] * sin[r]
                    y[r + R] = x[r + R] * cos[r] + x[r] * sin[r]
                for e in range(2 * R, E):
                    y[e] = x[e]


SILU, GELU, GELU_TANH, RELU = range(4)
"""The activations. A kernel takes one as a tuple of that length, `(0,) * GELU`. The length is part
of the tuple's type, and Numba compiles each type by itself: a loop without branches."""


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
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


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def mlp_forward(which: tuple[int, ...], gate_N: Array | None, up_N: Array, h_N: Array) -> None:
    """Definition: model.layers.mlp_forward, on flat arrays."""
    for n in range(h_N.shape[0]):
        if gate_N is None:
            h_N[n] = activation(which, up_N[n])[0]
        else:
            h_N[n] = activation(which, gate_N[n])[0] * up_N[n]


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
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


# ------------------------------------------------------------------ logits


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def largest(row: Array) -> Any:
    """max(row), NaN or not: eight at a time, since a single maximum waits for each before it."""
    a = b = c = d = e = f = g = h = row[0]
    whole = row.shape[0] // 8 * 8
    for s in range(0, whole, 8):
        a, b, c, d = max(a, row[s]), max(b, row[s + 1]), max(c, row[s + 2]), max(d, row[s + 3])
        e, f, g, h = max(e, row[s + 4]), max(f, row[s + 5]), max(g, row[s + 6]), max(h, row[s + 7])
    for s in range(whole, row.shape[0]):
        a = max(a, row[s])
    return max(a, b, c, d, e, f, g, h)


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
def cross_entropy(logit_NV: Array, label_N: Array, nats_N: Array, d_logit_NV: Array) -> bool:
    """Definition: model.loss.cross_entropy. False if a logit is NaN, or a row's largest infinite.

    Here R = Σ_{z_v < z_k} exp(z_v − z_k) + (how many z_v = z_k) − 1.
    """
    one, zero = number(1.0, logit_NV[0, 0]), number(0.0, logit_NV[0, 0])
    for n in range(logit_NV.shape[0]):
        z_V, p_V, label = logit_NV[n], d_logit_NV[n], label_N[n]
        top, R, ties, others = largest(z_V), zero, 0, 0
        for v in range(z_V.shape[0]):
            p_V[v] = exp(z_V[v] - top)
        for v in range(z_V.shape[0]):
            R += p_V[v] if z_V[v] < top else zero
            ties += z_V[v] == top
            others += z_V[v] < top
        if not np.isfinite(top) or ties + others < z_V.shape[0]:
            return False
        R += number(ties - 1.0, zero)
        share = zero if label < 0 else one / (one + R)
        for v in range(z_V.shape[0]):
            p_V[v] *= share
        nats_N[n] = zero
        if label >= 0:
            nats_N[n] = math.log1p(np.float64(R)) + (top - z_V[label])
            small = p_V[label] <= number(0.5, zero)
            p_V[label] = p_V[label] - one if small else zero - R * share
    return True


STRETCH = 256
"""Entries whose exponentials `propose_labels` sums first; only one stretch is looked through."""


@njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
def _stretch(z_V: Array, m: int, top: Any, e_S: Array) -> int:
    """exp(z − top) of stretch m of a row, and how many entries it has."""
    size: int = min(STRETCH, z_V.shape[0] - m * STRETCH)
    z_S = z_V[m * STRETCH : m * STRETCH + size]
    for s in range(size):
        e_S[s] = exp(z_S[s] - top)
    return size


@njit(cache=True, nogil=True, fastmath=REORDERED, error_model="numpy")
def propose_labels(logit_NV: Array, uniform_N: Array, label_N: Array) -> None:
    """The labels of `model.sampling.draw_labels` where they are certain, −1 where they are not.

    With C = c_{V−1} the label is certain if u C is by more than `gap` from c_v and c_{v−1}. In
    float32 an entry e^x, x = z − max z, is off by 2 units for `exp` and |x|/2 for x, and
    Σ e^x |x| <= C log V. So c_v − u C is off by (2 + log V / 2) units of 2 u (1 − u) C, at most
    half of `gap`. The other half is for second orders and sums of float64, V of whose units are 1
    in float32 at V = 2²⁹. A row with a number that is not finite is never certain.
    """
    V = logit_NV.shape[1]
    units = (2 + math.log(V) / 2) * 2.0**-23
    until_M, e_S = np.empty(-(-V // STRETCH)), np.empty(STRETCH, logit_NV.dtype)
    for n in range(logit_NV.shape[0]):
        z_V, total = logit_NV[n], 0.0
        top = largest(z_V)
        for m in range(len(until_M)):
            size = _stretch(z_V, m, top, e_S)
            for s in range(size):
                total += np.float64(e_S[s])
            until_M[m] = total
        goal, gap, m = uniform_N[n] * total, units * total, 0
        while m < len(until_M) - 1 and until_M[m] <= goal:
            m += 1
        size = _stretch(z_V, m, top, e_S)
        before, s = until_M[m - 1] if m else 0.0, 0
        while s < size - 1 and before + e_S[s] <= goal:
            before += e_S[s]
            s += 1
        first = m == 0 and s == 0
        certain = before + e_S[s] > goal + gap and (first or before < goal - gap)
        label_N[n] = m * STRETCH + s if certain else -1


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
