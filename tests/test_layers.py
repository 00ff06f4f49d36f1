"""Each layer's forward by hand or by loops; the backward is test_transformer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import scalings

from refcurv.law import tolerance
from refcurv.model import layers
from refcurv.model.config import Activation, Image, RopeScaling
from refcurv.model.layers import DEFINITIONS, Layout, Ops
from refcurv.passes.fast import FAST

BOTH = pytest.mark.parametrize("ops", [DEFINITIONS, FAST], ids=["definitions", "fast"])


@BOTH
def test_rms_norm_by_hand(ops: Ops) -> None:
    y, _ = ops.rms_norm_forward(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 0.5)
    r = 1 / math.sqrt(12.5 + 0.5)
    assert np.allclose(y, [[3 * r, 8 * r]], rtol=1e-15)


REALS = st.sampled_from([np.float32, np.float64, np.longdouble])


def norm(ops: Ops, x: np.ndarray, gain: np.ndarray, eps: float, d_y: np.ndarray) -> tuple:
    y, saved = ops.rms_norm_forward(x, gain, eps)
    d_x, d_gain = ops.rms_norm_backward(d_y, saved)
    return y, d_x, d_gain


def draws(seed: int, dtype: type, width: int) -> tuple[np.ndarray, ...]:
    """x and d_y of three rows, and a gain."""
    rng = np.random.default_rng(seed)
    x, d_y = rng.normal(size=(2, 3, width)).astype(dtype)
    return x, d_y, rng.normal(size=width).astype(dtype)


@BOTH
@given(REALS, st.integers(1, 9), st.integers(0, 99), st.floats(-1, 1))
def test_rms_norm_knows_no_scale(
    ops: Ops, dtype: type, width: int, seed: int, share: float
) -> None:
    """2ᵏ x with 4ᵏ eps: the same bits of y and of the gain's gradient, those of d_x times 2⁻ᵏ.

    Over the whole range of the dtype, in which the squares of most have no number.
    """
    if ops is FAST and dtype is np.longdouble:
        return
    x, d_y, gain = draws(seed, dtype, width)
    x[np.abs(x) < 2**-6] = 1
    number = np.finfo(dtype)
    k = int(share * (number.maxexp - 8))
    d_y = d_y if k < 0 else np.ldexp(d_y, k)  # so that d_x is a normal number as well
    for eps in (0.0, 0.25) if abs(2 * k) < min(number.maxexp, 1024) - 8 else (0.0,):
        y, d_x, d_gain = norm(ops, x, gain, eps, d_y)
        far = norm(ops, np.ldexp(x, k), gain, float(np.ldexp(eps, 2 * k)), d_y)
        assert (far[0] == y).all()
        assert (far[2] == d_gain).all()
        with np.errstate(over="ignore"):
            assert (far[1] == np.ldexp(d_x, -k)).all()


@BOTH
@given(REALS, st.integers(1, 9), st.integers(0, 99), st.floats(-1, 1))
def test_rms_norm_of_any_size_with_any_eps(
    ops: Ops, dtype: type, width: int, seed: int, share: float
) -> None:
    """y against numbers that hold the squares; eps may count for all or for nothing."""
    if dtype is np.longdouble:
        return
    x, _, gain = draws(seed, dtype, width)
    x *= dtype(10.0 ** (share * 0.95 * np.log10(float(np.finfo(dtype).max))))
    for eps in (1e-30, 1e-12, 1e-5, 0.1, 1e30):
        wide = x.astype(np.longdouble)
        want = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + dtype(eps)) * gain
        y, _ = ops.rms_norm_forward(x, gain, eps)
        smallest = np.finfo(dtype).smallest_normal
        within = (width + 8) * np.finfo(dtype).eps * np.abs(want) + smallest
        assert (np.abs(y - want) <= within).all(), eps


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rms_norm_of_the_smallest_and_the_largest_numbers(ops: Ops, dtype: type) -> None:
    """Subnormal ones too, whose reciprocals have no number."""
    number = np.finfo(dtype)
    for unit in (number.smallest_subnormal, number.smallest_normal, number.max / 4):
        for eps in (0.0, float(number.smallest_normal)):
            x = np.array([[3, -4, 0]], dtype) * unit
            root = np.sqrt(np.longdouble(25) / 3 * unit * unit + dtype(eps))
            y, _ = ops.rms_norm_forward(x, np.ones(3, dtype), eps)
            within = 8 * number.eps * np.abs(x / root) + number.smallest_subnormal
            assert (np.abs(y - x / root) <= within).all()


@given(REALS, st.integers(0, 99), st.sampled_from([0.0, 1e-30, 1e-6, 0.1]), st.floats(-1, 1))
def test_the_scale_of_a_norm_is_a_power_of_two(
    dtype: type, seed: int, eps: float, share: float
) -> None:
    number = np.finfo(dtype)
    x = np.ldexp(draws(seed, dtype, 5)[0], int(share * (number.maxexp - 8)))
    s = layers.unit_scale(x, eps)
    assert (np.frexp(s)[0] == 0.5).all()
    largest = s * np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.sqrt(dtype(eps)))
    assert ((largest >= 0.5) & (largest < 1)).all()
    assert layers.unit_scale(np.zeros((1, 2), dtype), 0.0) == 1
    tiny = np.array([[number.smallest_subnormal, 0]], dtype)
    assert layers.unit_scale(tiny, 0.0) == np.ldexp(dtype(1), number.maxexp - 1)


@given(REALS, st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.0, 1e-6, 0.1]))
def test_the_scale_of_a_norm_moves_no_bit(dtype: type, width: int, seed: int, eps: float) -> None:
    """Where squares are ordinary numbers, y and d_x are those of the formula as it is written."""
    x, d_y, gain = draws(seed, dtype, width)
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    x_hat, d_hat = x * r, d_y * gain
    y, d_x, _ = norm(DEFINITIONS, x, gain, eps, d_y)
    assert (y == x_hat * gain).all()
    assert (d_x == r * (d_hat - x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_of_a_fast_norm_is_by_itself(dtype: type) -> None:
    """An ordinary row keeps its bits beside rows whose squares overflow, vanish or are NaN."""
    x, d_y, gain = draws(0, dtype, 33)
    most = np.finfo(dtype).max
    beside = np.stack([x[0] * 0 + most, x[0] / most, x[0] * np.nan, x[0]])
    y, d_x, _ = norm(FAST, beside, gain, 1e-6, np.tile(d_y[0], (4, 1)))
    alone = norm(FAST, x[:1], gain, 1e-6, d_y[:1])
    assert (y[3] == alone[0][0]).all()
    assert (d_x[3] == alone[1][0]).all()
    assert np.isfinite(y[:2]).all()
    assert np.isnan(y[2]).all()


@pytest.mark.parametrize("share", [-0.9, -0.6, 0.0, 0.6, 0.9])
@pytest.mark.parametrize("dtype", [np.complex128, np.clongdouble])
def test_the_slope_of_a_norm_of_any_size_is_its_complex_step(dtype: type, share: float) -> None:
    real = np.zeros(0, dtype).real.dtype.type
    x, d_y, gain = draws(3, real, 7)
    step = draws(4, real, 7)[0]
    k = int(share * (np.finfo(real).maxexp - 100))
    x = np.ldexp(x, k)
    for eps in (0.0, 1e-6):
        y, _ = layers.rms_norm_forward(x + 1j * np.ldexp(step, k - 80), gain, eps)
        _, d_x, _ = norm(DEFINITIONS, x, gain, eps, d_y)
        got, want = (np.ldexp(y.imag, 80) * d_y).sum(), (np.ldexp(d_x, k) * step).sum()
        terms = np.abs(np.ldexp(y.imag, 80) * d_y).sum()
        assert abs(got - want) <= 64 * np.finfo(real).eps * terms


@BOTH
def test_what_is_no_number_stays_none(ops: Ops) -> None:
    """Nothing makes a number of NaN, and no norm of an infinite entry."""
    z = np.array([np.nan, 1.0])
    for name in Activation:
        assert np.isnan(ops.mlp_forward(name, None, z)[0][0])
        assert np.isnan(ops.mlp_forward(name, z, np.ones(2))[0][0])
    for bad in (np.nan, np.inf, -np.inf):
        x = np.array([[bad, 1.0], [1.0, bad]])
        with np.errstate(invalid="ignore"):
            y, _ = ops.rms_norm_forward(x, np.ones(2), 1e-5)
        assert np.isnan(y).any(axis=1).all()
    y, slope = layers.clip(np.array([np.nan, 9.0, 1.0]), 2.0)
    assert np.isnan(y[0]) and y[1:].tolist() == [2, 1]
    assert slope.tolist()[1:] == [0, 1]


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", list(Activation))
def test_activations_at_the_ends_of_the_range(ops: Ops, name: Activation, dtype: type) -> None:
    """0 and z, slopes 0 and 1, to the last bit: an exp that stops short of 0 would show here."""
    root = np.sqrt(np.finfo(dtype).max)
    for large in (dtype(2e4), root, root * 1000, np.finfo(dtype).max / 4):
        z, ones = np.array([-large, large], dtype), np.ones(2, dtype)
        with np.errstate(over="ignore"):
            h, saved = ops.mlp_forward(name, None, z)
            _, slope = ops.mlp_backward(ones, saved)
        assert h.tolist() == [0, large]
        assert slope.tolist() == [0, 1]


def test_centre_by_hand() -> None:
    assert (layers.centre(np.array([[1.0, 2, 6], [0, 0, 3]])) == [[-2, -1, 3], [-1, -1, 2]]).all()


@BOTH
def test_mlp_by_hand(ops: Ops) -> None:
    z, up = np.array([0.0, math.log(3)]), np.array([5.0, 2.0])
    h, _ = ops.mlp_forward(Activation.SILU, z, up)
    assert np.allclose(h, [0, math.log(3) * 0.75 * 2], rtol=1e-15)
    h, _ = ops.mlp_forward(Activation.SILU, None, z)
    assert np.allclose(h, [0, math.log(3) * 0.75], rtol=1e-15)


# ------------------------------------------------------------------ activations

POINTS = np.concatenate([np.linspace(-13, 13, 1001), [-1e4, -40, -1e-9, 0, 1e-9, 40, 1e4]])
H = np.finfo(np.longdouble).eps ** np.longdouble(0.25)
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
EACH = pytest.mark.parametrize("name", list(Activation))


@FLOATS
@EACH
def test_activations_are_the_oracle(name: Activation, dtype: type) -> None:
    """Within 8 roundings of |z| and of 1 + |z|, which bound the terms of f and f'.

    Observed: 1 of them, in longdouble 4.3 (erf), and 1.6. f' by central differences.
    """
    z = POINTS.astype(dtype)
    with np.errstate(all="raise", under="ignore"):
        f, slope = layers.ACTIVATIONS[name](z)
    assert f.dtype == slope.dtype == dtype
    wide, eps = z.astype(np.longdouble), tolerance.eps(dtype)
    assert (np.abs(f - oracles.activated(name, wide)) <= 8 * eps * np.abs(z)).all()
    near = wide[(np.abs(wide) < 14) & (np.abs(wide) > (1e-3 if name == "relu" else -1))]
    moved = [oracles.activated(name, near + h) for h in np.array([1, -1, 2, -2]) * H]
    differences = (8 * (moved[0] - moved[1]) - (moved[2] - moved[3])) / (12 * H)
    _, slope = layers.ACTIVATIONS[name](near.astype(dtype))
    within = 8 * eps + 1024 * tolerance.eps(np.longdouble) ** (3 / 4)
    assert (np.abs(slope - differences) <= within * (1 + np.abs(near))).all()


@pytest.mark.parametrize("dtype", [np.complex128, np.clongdouble])
@EACH
def test_the_slope_of_an_activation_is_its_complex_step(name: Activation, dtype: type) -> None:
    z = (POINTS + 1e-30j).astype(dtype)
    f, _ = layers.ACTIVATIONS[name](z)
    real, slope = layers.ACTIVATIONS[name](z.real)
    eps = np.finfo(dtype).eps
    assert (np.abs(f.real - real) <= 8 * eps * np.abs(POINTS) + 1e-59).all()
    assert (np.abs(f.imag / 1e-30 - slope) <= 8 * eps * (1 + np.abs(POINTS))).all()
    assert layers.relu(np.array([1e-30j], dtype))[1] == 0  # as at 0


def test_erf_in_longdouble_is_the_oracles() -> None:
    """Positive terms; alternating ones, or a continued fraction. exp(−x²) errs by x²/2 eps."""
    z = np.concatenate([np.linspace(-9, 9, 2001), [0, 1e-30, -50]]).astype(np.longdouble)
    want = np.array([oracles.erf(one) for one in z])
    got = layers.erf(z)
    assert got.dtype == np.longdouble
    within = (4 + np.minimum(z * z, 49) / 2) * np.finfo(np.longdouble).eps
    assert (np.abs(got - want) <= within * np.abs(want)).all()


def test_soft_cap_and_clip_and_their_slopes() -> None:
    x = np.array([-1e4, -30.0, -2.0, -0.5, 0, 0.3, 2.0, 2.1, 1e4])
    y, slope = layers.soft_cap(x, 2.0)
    assert np.allclose(y, [2 * math.tanh(one / 2) for one in x], rtol=1e-15)
    want = [1 / math.cosh(min(abs(one) / 2, 300)) ** 2 for one in x]
    assert np.allclose(slope, want, rtol=1e-15, atol=1e-200)
    assert np.allclose(layers.soft_cap(x + 1e-30j, 2.0)[0].imag / 1e-30, slope, atol=1e-15)
    y, slope = layers.clip(x, 2.0)
    assert (y == [-2, -2, -2, -0.5, 0, 0.3, 2, 2, 2]).all()
    assert (slope == [0, 0, 1, 1, 1, 1, 1, 0, 0]).all()
    assert (layers.clip(x + 1e-30j, 2.0)[0].imag / 1e-30 == slope).all()


# ------------------------------------------------------------------ positions


@given(
    st.integers(0, 500), st.integers(1, 3), st.integers(0, 3), st.sampled_from([10.0, 1e4]),
    st.integers(0, 99),
)  # fmt: skip
def test_rotary_positions_turn_pairs(
    position: int, half: int, rest: int, theta: float, seed: int
) -> None:
    """Of 2·half + rest entries the first 2·half turn, and turn back."""
    x = np.random.default_rng(seed).normal(size=2 * half + rest)
    cos, sin = layers.rope_tables(np.array([[position]]), 2 * half, theta, np.dtype(np.float64))
    got = layers.rotate(x[None, None, None], cos, sin).ravel()
    want = oracles.rotate(x, position, theta, 2 * half)
    assert np.allclose(got, want, rtol=0, atol=1e-12 * abs(x).max())
    assert (got[2 * half :] == x[2 * half :]).all()
    back = layers.rotate(layers.rotate(x[None, None, None], cos, sin), cos, -sin).ravel()
    assert np.allclose(back, x, rtol=0, atol=1e-15 * 8)


def by_the_package(j: int, width: int, theta: float, scaling: RopeScaling | None) -> float:
    return float(layers.rope_frequencies(width, theta, scaling, np.dtype(np.float64))[j])


def by_the_oracle(j: int, width: int, theta: float, scaling: RopeScaling | None) -> float:
    return float(oracles.frequency(j, width, theta, scaling, np.float64))


@pytest.mark.parametrize("frequency", [by_the_package, by_the_oracle])
def test_frequencies_by_hand(frequency: Callable[..., float]) -> None:
    """16 entries, theta = 10⁸: pair j turns by 10^-j, and n · 10^-j times in 628 positions."""
    turns, n = dict(factor=5.0, original=628, slow=1.0, fast=50.0), 628 / (2 * math.pi)
    for scaling, share in (
        (None, [0] * 8),
        (RopeScaling(kind="linear", factor=5.0), [1] * 8),
        # n = 99.9 turns of pair 0, 9.99 and 0.999 of the next
        (RopeScaling(kind="llama3", **turns), [0, (50 - n / 10) / 49, *[1] * 6]),
        # the ramp is from pair log10(n / 50) = 0.30 to pair log10(n) = 1.9998
        (
            RopeScaling(kind="yarn", truncate=False, **turns),
            [0, (1 - math.log10(n / 50)) / math.log10(50), *[1] * 6],
        ),
        # the same, from 0 to 2
        (RopeScaling(kind="yarn", **turns), [0, 0.5, *[1] * 6]),
    ):
        for j, s in enumerate(share):
            want = 10.0**-j * (1 - s + s / 5)
            assert frequency(j, 16, 1e8, scaling) == pytest.approx(want, rel=1e-14), (scaling, j)


@pytest.mark.parametrize("frequency", [by_the_package, by_the_oracle])
def test_yarns_ramp_ends_within_the_entries(frequency: Callable[..., float]) -> None:
    """4 entries, theta = 4: pair j turns by 2^-j, 64 · 2^-j times in 402 positions.

    64 turns are before pair 0, which starts the ramp there; 1 turn is pair 6, behind entry 3, which
    ends it.
    """
    scaling = RopeScaling(kind="yarn", factor=5.0, original=402, slow=1.0, fast=64.0)
    assert frequency(0, 4, 4.0, scaling) == 1
    third = 1 - 1 / 3 + (1 / 3) / 5
    assert frequency(1, 4, 4.0, scaling) == pytest.approx(third / 2, rel=1e-14)


@given(
    st.integers(1, 5), st.sampled_from([1.5, 3.0, 1e4, 1e6]), st.data(), st.integers(0, 99),
    st.integers(1, 9),
)  # fmt: skip
def test_frequencies_are_the_oracle(
    half: int, theta: float, data: st.DataObject, position: int, length: int
) -> None:
    wide, scaling = np.dtype(np.longdouble), data.draw(scalings(2 * half))
    got = layers.rope_frequencies(2 * half, theta, scaling, wide, length)
    want = [oracles.frequency(j, 2 * half, theta, scaling, wide.type, length) for j in range(half)]
    assert got.dtype == wide
    # llama3: a turn is off by roundings of itself, over the width of the ramp
    ramp = 1 + scaling.original / (scaling.fast - scaling.slow)
    assert (np.abs(got - want) <= 16 * ramp * tolerance.eps(wide) * np.abs(want)).all()
    x = np.arange(1.0, 2 * half + 1).astype(wide)
    tables = layers.rope_tables(np.array([[position]]), 2 * half, theta, wide, scaling, length)
    turned = layers.rotate(x[None, None, None], *tables).ravel()
    assert np.allclose(
        turned, oracles.rotate(x, position, theta, 0, scaling, length),
        rtol=0, atol=16 * ramp * tolerance.eps(wide) * (1 + position) * 2 * half * 2,
    )  # fmt: skip


@pytest.mark.parametrize("frequency", [layers.rope_frequencies, oracles.frequency])
def test_frequencies_by_the_length_of_the_text(frequency: Callable[..., np.ndarray]) -> None:
    """4 entries, theta = 100: 1 and 1/10 up to 8 positions.

    Of 20 and with factor 3 dynamic divides the slower by 1 + 3 (20/8 − 1) = 5.5; the fastest stays.
    """
    dynamic = RopeScaling(kind="dynamic", factor=3.0, original=8)
    long = RopeScaling(kind="longrope", original=8, short=(1.0, 1.25), long=(2.0, 8.0))
    for scaling, length, want in (
        (dynamic, 8, (1, 0.1)), (dynamic, 20, (1, 0.1 / 5.5)),
        (long, 8, (1, 0.08)), (long, 9, (0.5, 0.0125)),
    ):  # fmt: skip
        if frequency is oracles.frequency:
            got = [frequency(j, 4, 100.0, scaling, np.float64, length) for j in range(2)]
        else:
            got = frequency(4, 100.0, scaling, np.dtype(np.float64), length)
        assert np.allclose(got, want, rtol=1e-14, atol=0), (scaling, length)


SCALINGS = [
    None,
    RopeScaling(kind="linear", factor=3.0),
    RopeScaling(kind="llama3", factor=8.0, original=8, slow=1.0, fast=4.0),
    RopeScaling(kind="yarn", factor=4.0, original=32, slow=1.0, fast=8.0),
    RopeScaling(kind="dynamic", factor=3.0, original=8),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda one: one and one.kind.value)
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
@pytest.mark.parametrize("width", [2, 6])
def test_frequencies_in_their_dtype(scaling: RopeScaling | None, dtype: type, width: int) -> None:
    """Each is of its dtype, and as exact; of two entries there is one, which no length changes."""
    cases = [(scaling, 20)]
    if scaling is None:  # as many divisors as frequencies
        half = tuple(1 + 0.1 * j for j in range(width // 2))
        cases += [(RopeScaling(kind="longrope", original=8, short=half, long=half), 9)]
    for one, length in cases:
        got = layers.rope_frequencies(width, 10.0, one, np.dtype(dtype), np.int64(length))
        want = [oracles.frequency(j, width, 10.0, one, dtype, length) for j in range(width // 2)]
        assert got.dtype == dtype
        assert np.allclose(got, np.array(want, dtype), rtol=64 * tolerance.eps(dtype), atol=0)


@given(st.integers(1, 7), st.integers(0, 999))
def test_lengths_by_pairs(length: int, seed: int) -> None:
    """How many real positions the segment of each real position has."""
    rng = np.random.default_rng(seed)
    segment = np.cumsum(rng.random((2, length)) < 0.4, axis=1)
    real = np.arange(length) < rng.integers(1, length + 1, (2, 1))
    for layout in (layers.causal_layout(real, segment), layers.full_layout(real, segment)):
        found = layers.lengths(layout)
        assert found.shape == (2, length, 1, 1)
        for b, t in np.argwhere(real):
            assert found[b, t] == (real[b] & (segment[b] == segment[b, t])).sum()
    later = layers.Layout(np.array([[6]]), np.array([[0]]), np.array([[6]]))
    assert layers.lengths(later) == 7  # a step of a decoder, at position 6


@given(st.integers(1, 7), st.integers(0, 8), st.integers(0, 999))
def test_layouts_by_pairs(length: int, window: int, seed: int) -> None:
    """Who sees whom, causal, windowed and bidirectional, one pair at a time."""
    rng = np.random.default_rng(seed)
    segment = np.cumsum(rng.random((2, length)) < 0.4, axis=1)
    real = np.arange(length) < rng.integers(1, length + 1, (2, 1))
    causal, full = layers.causal_layout(real, segment), layers.full_layout(real, segment)
    models = {True: layers.windowed(causal, window) if window else causal, False: full}
    for is_causal, layout in models.items():
        config = SimpleNamespace(causal=is_causal, windows=(window,) if is_causal else ())
        visible = layers.visible_keys(layout, length)
        assert (layout.last_BT < length).all()
        assert (layout.last_BT[~real] == -1).all()
        for b, t, s in np.ndindex(2, length, length):
            want = real[b, t] and real[b, s] and oracles.sees(config, 0, segment[b], t, s)
            assert visible[b, t, s] == want, (is_causal, b, t, s)
        for b, t in np.argwhere(real):
            assert layout.position_BT[b, t] == (segment[b, :t] == segment[b, t]).sum()


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_unfold_by_loops(channels: int, down: int, across: int, patch: int, seed: int) -> None:
    image = Image(channels=channels, height=down * patch, width=across * patch, patch=patch)
    shape = (2, channels, image.height, image.width)
    pixel = np.random.default_rng(seed).normal(size=shape)
    got = layers.unfold(pixel, patch)
    assert got.shape == (2, image.patches, image.patch_size)
    assert all((got[b] == oracles.patches(image, pixel[b])).all() for b in range(2))


def test_rotary_tables_are_as_exact_as_their_dtype() -> None:
    position = np.array([[0, 1, 4095]])
    wide = layers.rope_tables(position, 8, 1e4, np.dtype(np.longdouble))
    for dtype in (np.float32, np.float64, np.complex128):
        for table, truth in zip(
            layers.rope_tables(position, 8, 1e4, np.dtype(dtype)), wide, strict=True
        ):
            assert table.dtype == np.zeros(1, dtype).real.dtype
            budget = np.finfo(dtype).eps + 4095 * np.finfo(np.float64).eps
            assert np.abs(table - truth).max() <= budget


@BOTH
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 999),
    st.sampled_from([None, 0.3]), st.sampled_from([None, 0.7]),
)  # fmt: skip
def test_attention_by_loops(
    ops: Ops, kv_heads: int, group: int, length: int, seed: int, scale: float | None,
    cap: float | None,
) -> None:  # fmt: skip
    """Grouped queries, segments and padding, scale and soft-cap, one number at a time."""
    rng = np.random.default_rng(seed)
    H, E = kv_heads * group, 4
    q = rng.normal(size=(1, length, H, E))
    k, v = rng.normal(size=(2, 1, length, kv_heads, E))
    starts = np.maximum.accumulate(np.where(rng.random(length) < 0.4, np.arange(length), 0))
    real = rng.integers(1, length + 1)
    last = np.where(np.arange(length) < real, np.arange(length), -1)
    layout = Layout((np.arange(length) - starts)[None], starts[None], last[None])
    s = np.arange(length)
    visible = (starts[:, None] <= s) & (s <= last[:, None])
    got, _ = ops.attention_forward(q, k, v, layout, scale, cap)
    want = oracles.attention(q[0], k[0], v[0], visible, scale, cap)
    assert np.abs(got[0] - want).max() < 1e-13
    assert (got[0, real:] == 0).all()


def test_softmax_of_huge_scores() -> None:
    """Rows far apart, a hidden score beyond all others, a row that sees nothing: no overflow."""
    score = np.array([[[1e4, 1e4 - 1, 3e4], [-1e4, -1e4 - 1, 0]], [[5, 6, 7], [-3e4, 0, 1e4]]])
    visible = np.array(
        [[[True, True, False], [True, True, False]], [[False] * 3, [True, False, True]]]
    )
    p = 1 / (1 + math.exp(-1))
    want = [[[p, 1 - p, 0], [p, 1 - p, 0]], [[0, 0, 0], [0, 0, 1]]]
    for dtype in (np.float64, np.complex128):
        with np.errstate(all="raise", under="ignore"):
            got = layers.softmax_over(score.astype(dtype), visible)
        assert np.allclose(got, want, rtol=1e-15, atol=1e-15)


def test_sigmoid_of_huge_numbers() -> None:
    for dtype in (np.float64, np.complex128):
        with np.errstate(all="raise", under="ignore"):
            got = layers.sigmoid(np.array([-1e4, 0, 1e4], dtype))
        assert (got == [0, 0.5, 1]).all()
