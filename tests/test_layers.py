"""Each layer's forward by hand or by loops; the backward is test_transformer's."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refcurv.model import layers
from refcurv.model.layers import DEFINITIONS, Layout, Ops
from refcurv.passes.fast import FAST

BOTH = pytest.mark.parametrize("ops", [DEFINITIONS, FAST], ids=["definitions", "fast"])


@BOTH
def test_rms_norm_by_hand(ops: Ops) -> None:
    y, _ = ops.rms_norm_forward(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 0.5)
    r = 1 / math.sqrt(12.5 + 0.5)
    assert np.allclose(y, [[3 * r, 8 * r]], rtol=1e-15)


@BOTH
def test_swiglu_by_hand(ops: Ops) -> None:
    h, _ = ops.swiglu_forward(np.array([0.0, math.log(3)]), np.array([5.0, 2.0]))
    assert np.allclose(h, [0, math.log(3) * 0.75 * 2], rtol=1e-15)


@given(st.integers(0, 500), st.integers(1, 3), st.sampled_from([10.0, 1e4]), st.integers(0, 99))
def test_rotary_positions_turn_pairs(position: int, half: int, theta: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=2 * half)
    cos, sin = layers.rope_tables(np.array([[position]]), 2 * half, theta, np.dtype(np.float64))
    got = layers.rotate(x[None, None, None], cos, sin).ravel()
    assert np.allclose(got, oracles.rotate(x, position, theta), rtol=0, atol=1e-12 * abs(x).max())
    back = layers.rotate(layers.rotate(x[None, None, None], cos, sin), cos, -sin).ravel()
    assert np.allclose(back, x, rtol=0, atol=1e-15 * 8)


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
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 999))
def test_attention_by_loops(ops: Ops, kv_heads: int, group: int, length: int, seed: int) -> None:
    """Grouped queries, segments and padding, one number at a time."""
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
    got, _ = ops.attention_forward(q, k, v, layout)
    want = oracles.attention(q[0], k[0], v[0], visible)
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
