"""The fast layer functions against their definitions, in both dtypes, within the path budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from strategies import Case, assert_within, case, cases

from refcurv.algebra import blas, kernels
from refcurv.law import tolerance
from refcurv.model import layers, transformer
from refcurv.model.config import NormPlace, QKNorm
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
def test_the_kernels_exponential(dtype: type) -> None:
    """Relative error of exp over its range; observed 1.3e-7 in float32 and 3.0e-16."""
    z = np.linspace(-87, 87, 400_001).astype(dtype)
    half = np.empty_like(z)
    kernels.swiglu_forward(np.full_like(z, 1), np.ones_like(z), half)
    assert np.allclose(half, 1 / (1 + np.exp(-1.0)), rtol=4 * tolerance.eps(dtype))
    gate, up, h = z.copy(), np.ones_like(z), np.empty_like(z)
    kernels.swiglu_forward(gate, up, h)
    want = z.astype(np.longdouble) / (1 + np.exp(-z.astype(np.longdouble)))
    error = np.abs(h - want) / np.maximum(np.abs(want), np.finfo(dtype).tiny)
    assert error.max() <= 4 * tolerance.eps(dtype)


def test_extreme_gates_stay_finite() -> None:
    """exp(-87) is where the float32 kernel stops: silu(-1000) is -0, not NaN."""
    for dtype in FLOATS:
        gate = np.array([-1000, -100, 100, 1000], dtype)
        h, _ = FAST.swiglu_forward(gate, np.ones_like(gate))
        assert np.isfinite(h).all()
        assert np.abs(h[:2]).max() < 1e-30
        assert (h[2:] == gate[2:]).all()
        back = FAST.swiglu_backward(np.ones_like(gate), (gate, np.ones_like(gate)))
        want = layers.swiglu_backward(np.ones(4), (gate.astype(float), np.ones(4)))
        for got, expected in zip(back, want, strict=True):
            assert np.allclose(got, expected, rtol=1e-5, atol=1e-30)


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
