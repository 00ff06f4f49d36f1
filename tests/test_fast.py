"""The fast layer functions against their definitions, in both dtypes, within the path budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from strategies import Case, assert_within, case, cases, image_cases

from refcurv.algebra import blas, kernels
from refcurv.law import tolerance
from refcurv.model import layers, transformer
from refcurv.model.config import Activation, NormPlace, QKNorm
from refcurv.model.layers import DEFINITIONS
from refcurv.model.magnitudes import gradient_scale
from refcurv.passes.fast import FAST, QUERY_ROWS

FLOATS = [np.float64, np.float32]


def compare(one: Case, dtype: type) -> None:
    parameters = one.astype(dtype)
    loss, gradient = transformer.loss_and_gradient(one.config, parameters, *one.batch, ops=FAST)
    want_loss, want = transformer.loss_and_gradient(
        one.config, one.parameters, *one.batch, ops=DEFINITIONS
    )
    widest = max(one.config.mlp_width, one.config.vocabulary, one.token.size)
    budget = tolerance.path(one.config.layers, widest, dtype)
    scale = gradient_scale(one.config, one.parameters, *one.batch)
    assert abs(loss - want_loss) <= budget * max(abs(want_loss), one.token.size)
    for name in want:
        assert gradient[name].dtype == dtype
        assert_within(gradient[name], want[name], budget, scale[name], name)


@pytest.mark.parametrize("dtype", FLOATS)
@given(one=cases())
def test_fast_equals_the_definitions(dtype: type, one: Case) -> None:
    compare(one, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", list(NormPlace))
@pytest.mark.parametrize("qk_norm", list(QKNorm))
def test_long_packed_padded_sequences(dtype: type, place: NormPlace, qk_norm: QKNorm) -> None:
    """Several attention blocks, segments that end inside one, and padding beyond the last."""
    length = 2 * QUERY_ROWS + 37
    one = case(batch=3, length=length, norm_place=place, qk_norm=qk_norm)
    real = np.arange(length) < np.array([[length], [QUERY_ROWS], [190]])
    segment = np.cumsum(np.isin(np.arange(length), [60, 150, 260]))[None] * np.array(
        [[0], [1], [1]]
    )
    label = np.where(real, one.label, -1)
    compare(Case(one.config, one.parameters, one.token, real, segment, label), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_long_sequences_with_scale_cap_windows_and_partial_rotary(
    dtype: type, causal: bool, cap: float | None
) -> None:
    """A window that starts inside one attention block and ends in the next."""
    length = 2 * QUERY_ROWS + 37
    one = case(
        batch=2, length=length, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, head_width=4,
        rope_width=2, score_scale=0.9, score_cap=cap, causal=causal,
        windows=(QUERY_ROWS + 9, 0) if causal else (),
    )  # fmt: skip
    real = np.arange(length) < np.array([[length], [190]])
    segment = np.cumsum(np.isin(np.arange(length), [60, 260]))[None] * np.array([[0], [1]])
    label = np.where(real, one.label, -1)
    compare(Case(one.config, one.parameters, one.token, real, segment, label), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@given(one=image_cases())
def test_images(dtype: type, one: Case) -> None:
    compare(one, dtype)


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(Activation))
def test_activations_equal_their_definitions(name: Activation, dtype: type) -> None:
    """Within 8 roundings of |z| and 1 + |z|, the terms of f and f'; observed 2.1 and 5.4."""
    z = np.concatenate([np.linspace(-87, 87, 100_001), np.linspace(-9, 9, 100_001)]).astype(dtype)
    up, d_h = np.random.default_rng(0).normal(size=(2, len(z))).astype(dtype)
    f, slope = layers.ACTIVATIONS[name](z.astype(np.float64))
    most, eps = np.abs(z).astype(np.float64), 8 * tolerance.eps(dtype)
    h, saved = FAST.mlp_forward(name, None, z)
    none, d_z = FAST.mlp_backward(d_h, saved)
    assert h.dtype == d_z.dtype == dtype
    assert none is None
    assert (np.abs(h - f) <= eps * most).all()
    assert (np.abs(d_z - d_h * slope) <= eps * (1 + most) * np.abs(d_h)).all()
    h, saved = FAST.mlp_forward(name, z, up)
    d_gate, d_up = FAST.mlp_backward(d_h, saved)
    assert (np.abs(h - f * up) <= eps * most * np.abs(up)).all()
    assert (np.abs(d_up - d_h * f) <= eps * most * np.abs(d_h)).all()
    assert (np.abs(d_gate - d_h * up * slope) <= eps * (1 + most) * np.abs(d_h * up)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernels_exponential(dtype: type) -> None:
    """Relative error of exp over its range; observed 1.3e-7 in float32 and 3.0e-16."""
    z = np.linspace(-87, 87, 400_001).astype(dtype)
    h, _ = FAST.mlp_forward(Activation.SILU, z, np.ones_like(z))
    want = z.astype(np.longdouble) / (1 + np.exp(-z.astype(np.longdouble)))
    error = np.abs(h - want) / np.maximum(np.abs(want), np.finfo(dtype).tiny)
    assert error.max() <= 4 * tolerance.eps(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(Activation))
def test_extreme_arguments_stay_finite(name: Activation, dtype: type) -> None:
    """exp(-87) is where the float32 kernel stops: f(-1000) is -0, not NaN."""
    z, ones = np.array([-1000, -100, 100, 1000], dtype), np.ones(4, dtype)
    h, saved = FAST.mlp_forward(name, z, ones)
    assert np.isfinite(h).all()
    assert np.abs(h[:2]).max() < 1e-30
    assert (h[2:] == z[2:]).all()
    for got, want in zip(FAST.mlp_backward(ones, saved), ([0, 0, 1, 1], h), strict=True):
        assert np.allclose(got, want, rtol=0, atol=1e-30)


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (200, 33), (0, 4), (2044, 130)])
def test_gram_is_the_lower_triangle_of_the_product(dtype: type, rows: int, size: int) -> None:
    rng = np.random.default_rng(0)
    x, before = rng.normal(size=(rows, size)).astype(dtype), rng.normal(size=(size, size))
    for onto in (False, True):
        total = before.astype(dtype)
        blas.add_gram(x, total, onto=onto)
        wide = x.astype(np.float64)
        want = np.tril(wide.T @ wide + onto * before)
        scale = np.abs(wide).T @ np.abs(wide) + np.abs(before)
        assert (np.abs(np.tril(total) - want) <= tolerance.gamma(rows + 2, dtype) * scale).all()
    with pytest.raises(ValueError, match="add_gram"):
        blas.add_gram(x, np.zeros((size + 1, size + 1), dtype), onto=False)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 200])
def test_folding_and_mirroring(size: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, size)).astype(np.float32)
    total = np.tril(rng.normal(size=(size, size)))
    want = total + np.tril((x.T @ x).astype(np.float64))
    kernels.fold_triangle(total, x.T @ x)
    assert total.tobytes() == want.tobytes()
    kernels.mirror_triangle(total)
    assert total.tobytes() == (want + np.tril(want, -1).T).tobytes()


def test_counting_kernel_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        lam, mu = -np.sort(-rng.integers(0, 5, 6) * 1.0), -np.sort(-rng.integers(0, 5, 7) * 1.0)
        for threshold in (0.0, 1.0, 3.0, 4.0, 16.0, 17.0):
            got = np.empty(6, np.int64)
            kernels.count_at_least(lam, mu, threshold, got)
            assert got.tolist() == (np.outer(lam, mu) >= threshold).sum(axis=1).tolist()
