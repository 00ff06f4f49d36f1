"""The fast layer functions against their definitions, in both dtypes, within the path budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import budgets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, image_cases, scaled
from test_factors import model_of

import refcurv as rc
from refcurv.algebra import attention, gram, kernels
from refcurv.algebra.attention import LANES
from refcurv.curvature.accumulate import add_gram
from refcurv.law import tolerance
from refcurv.law.checks import NonFiniteError
from refcurv.model import layers
from refcurv.model.config import Activation, Norm, NormPlace, QKNorm
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.layers import DEFINITIONS, Layout, Ops
from refcurv.passes.fast import FAST, QUERY_ROWS

FLOATS = [np.float64, np.float32]


def compare(one: Case, dtype: type) -> None:
    parameters = one.astype(dtype)
    loss, gradient = loss_and_gradient(one.config, parameters, *one.batch, ops=FAST)
    want_loss, want = loss_and_gradient(one.config, one.parameters, *one.batch, ops=DEFINITIONS)
    widest = max(one.config.mlp_width, one.config.vocabulary, one.token.size)
    budget = budgets.path(one.config.layers, widest, dtype)
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
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


# ------------------------------------------------------------------ the ends of the range


@pytest.mark.parametrize("kind", list(Norm))
@pytest.mark.parametrize("k", [-100, -60, 60, 100])
def test_a_stream_of_any_size_has_the_same_logits_and_factors(k: int, kind: Norm) -> None:
    """2ᵏ times the residual stream: in float32 its squares overflow or vanish, and 4⁻ᵏ G does.

    Not one bit of the logits and of 2ᵏ g differs. G is within the budget of its sums: where all of
    them would vanish in float32 they are float64's.
    """
    made = [scaled(2.0**n, norm=kind, biases=("down",)) for n in (0, k)]
    one, far = (model_of(c, "float32") for c in made)
    assert (rc.logits(far, made[1].token) == rc.logits(one, made[0].token)).all()
    (loss, gradient), (want_loss, want) = (
        rc.loss_and_gradient(m, made[0].token) for m in (far, one)
    )
    assert loss == want_loss
    assert (gradient["blocks.0.mlp.up.weight"] == want["blocks.0.mlp.up.weight"]).all()
    bias = "blocks.0.mlp.down.bias"
    assert (np.ldexp(gradient[bias], k) == want[bias]).all()
    if k == -100:  # g is huge, and there is no float32 for its squares
        for collect, what in ((rc.collect, "blocks.**"), (rc.collect_blocks, bias)):
            with pytest.raises(NonFiniteError, match="Try float64"):
                collect(far, rc.Corpus(made[1].token), what)
        return
    corpus = rc.Corpus(made[1].token)
    for draws in (1, 2):
        got, right = (rc.collect(m, corpus, "blocks.**", draws=draws) for m in (far, one))
        for name in right:
            power = 2 * k * name.endswith((".o", ".down"))
            size = np.sqrt(np.outer(*[np.diag(right[name].G)] * 2))
            error = np.abs(np.ldexp(got[name].G, power) - right[name].G)
            assert (error <= 2 * budgets.gram(got[name].n_G, 1, np.float32) * size).all()
            assert (got[name].A == right[name].A).all()
    blocks, right = (rc.collect_blocks(m, corpus, bias)[bias].F for m in (far, one))
    size = np.sqrt(np.outer(*[np.diag(right)] * 2))
    within = 2 * budgets.gram(len(corpus.tokens), 1, np.float32) * size
    assert (np.abs(np.ldexp(blocks, 2 * k) - right) <= within).all()


def entrances(one: Case, dtype: str) -> dict[str, Callable[[], object]]:
    """Everything that runs a model forward."""
    model = model_of(one, dtype)
    rows, at = one.token, np.full(len(one.token), 2)
    text = rc.Population(rows, at * 0 + 1, at * 3, "text", "test")
    said = rc.Population(rows, at, at * 3, "recite", "test")
    return {
        "logits": lambda: rc.logits(model, rows),
        "loss": lambda: rc.loss_and_gradient(model, rows),
        "collect": lambda: rc.collect(model, rc.Corpus(rows)),
        "signed": lambda: rc.collect(model, rc.Corpus(rows), "head", fisher="signed"),
        "blocks": lambda: rc.collect_blocks(model, rc.Corpus(rows)),
        "evaluate": lambda: rc.evaluate(model, rc.Corpus(rows, populations={"p": text})),
        "recite": lambda: rc.evaluate(model, rc.Corpus(rows, populations={"p": said})),
        "exact": lambda: rc.exact.ggn(model, rows, wrt="final_norm.weight"),
    }


@pytest.mark.parametrize("name", list(entrances(case(), "float32")))
@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")
def test_what_leaves_the_range_is_refused_in_one_line(name: str) -> None:
    """Named are the layer, the dtype and the way out; in float64 the same weights are fine."""
    broken = {
        "the input of 'blocks.1.mlp.down'": {"blocks.1.mlp.up.weight": 1e30, "gate": 1e30},
        "the input of 'blocks.0.attn.o'": {"blocks.0.attn.q.weight": 1e30, "attn.k": 1e30},
        "logit": {"final_norm.weight": 1e30, "head.weight": 1e30},
    }
    for says, sizes in broken.items():
        one = case(norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
        for part, size in sizes.items():
            for full in (n for n in one.parameters if part in n):
                one.parameters[full] = one.parameters[full] * size
        if name != "exact":
            with pytest.raises(NonFiniteError, match=says) as raised:
                entrances(one, "float32")[name]()
            assert "beyond the range of float32" in str(raised.value)
            assert "compute in float64" in str(raised.value)
            assert "\n" not in str(raised.value)
        if "attn" not in says:
            entrances(one, "float64")[name]()
        for full, array in one.parameters.items():
            if any(part in full for part in sizes):
                one.parameters[full] = array * 1e170
        with pytest.raises(NonFiniteError, match="beyond the range of float64: check the weights"):
            entrances(one, "float64")[name]()


def test_a_gradient_that_leaves_the_range_is_refused() -> None:
    """The norms divide by a stream so small that its reciprocal is no float32."""
    one = scaled(1e-40)
    with pytest.raises(NonFiniteError, match=r"the gradient of '.*' holds .*compute in float64"):
        rc.loss_and_gradient(model_of(one, "float32"), one.token)
    rc.loss_and_gradient(model_of(one), one.token)


# ------------------------------------------------------------------ attention by itself


@dataclass(frozen=True)
class Heads:
    """What one attention reads, in the dtype to compute in, and the gradient sent back to it."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d: np.ndarray
    layout: Layout
    cap: float | None

    def run(self, ops: Ops, dtype: type) -> tuple[tuple[np.ndarray, ...], layers.Saved]:
        """The gradients of q, k and v, and what the forward saved."""
        q, k, v, d = (x.astype(dtype) for x in (self.q, self.k, self.v, self.d))
        _, saved = ops.attention_forward(q, k, v, self.layout, None, self.cap)
        return ops.attention_backward(d, saved), saved


@st.composite
def heads(draw: st.DrawFn, dtype: type) -> Heads:
    """Heads of every shape, from flat to saturated: scores of 1 to 1e5."""
    B, T = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    K, R, E = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 80]))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    size = 10 ** draw(st.floats(0, 2))  # of q and of k
    lengths = rng.integers(1, T + 1, (B, 1)) if draw(st.booleans()) else np.full((B, 1), T)
    real = np.arange(T) < lengths
    segment = np.cumsum(rng.random((B, T)) < draw(st.sampled_from([0, 0.4, 1])), axis=1)
    if draw(st.booleans()):
        layout = layers.full_layout(real, segment)
    else:
        layout = layers.causal_layout(real, segment)
        window = draw(st.integers(0, 3))
        layout = layers.windowed(layout, window) if window else layout
    q, d = rng.normal(size=(2, B, T, K * R, E))
    k, v = rng.normal(size=(2, B, T, K, E))
    arrays = (x.astype(dtype) for x in (q * size, k * size, v, d))
    return Heads(*arrays, layout, draw(st.sampled_from([None, 0.7, 30.0])))


def rounding(one: Heads, saved: layers.Saved) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What rounding may do to each entry of the gradients of q, k and v; `saved` in longdouble.

    A score sums E products. An error of it is a relative one of e to its power: p is off by `off`,
    however small p is. One of a key with more than half of p is d_p[key] the start: then 1 − p is
    no term, neither of the other keys' gradients, p (d_p − start), nor of its own, minus their sum.
    What underflows is off by the smallest normal number.
    """
    q, k, v, p, _ = saved
    dtype, (E, S) = one.q.dtype, (q.shape[-1], k.shape[-2])
    size, unit = 1 / np.sqrt(np.longdouble(E)), tolerance.gamma(E + 8, dtype)
    score, (q, k, v) = (q @ k.swapaxes(-1, -2)) * size, (np.abs(x) for x in (q, k, v))
    d = np.abs(one.d).astype(p.dtype).reshape(q.transpose(0, 3, 1, 2, 4).shape)
    d = d.transpose(0, 2, 3, 1, 4)
    terms = (q @ k.swapaxes(-1, -2)) * size
    visible = layers.visible_keys(one.layout, S)[:, None, None]
    largest = np.where(visible, terms, 0).max(axis=-1, keepdims=True)
    off = np.expm1(2 * unit * (largest + (one.cap or 0))) + tolerance.gamma(S + 16, dtype)
    off_v, slope = off, size
    if one.cap is not None:
        slope = slope * layers.soft_cap(score, one.cap)[1]
        off = off + np.expm1(2 * unit * terms / one.cap)
    d_p = np.where(visible, d @ v.swapaxes(-1, -2), 0)
    first = p > 0.5
    start = np.where(first, d_p, 0).sum(axis=-1, keepdims=True)
    others = np.where(first, 0, p * (d_p + start))
    rest = others.sum(axis=-1, keepdims=True)
    d_score = np.where(first, rest, others + p * rest) * slope
    d_score *= 4 * (off + tolerance.gamma(2 * E + 3 * S, dtype))
    d_score += np.finfo(dtype).tiny * size * np.where(visible, 1 + d_p.sum(-1, keepdims=True), 0)
    d_v = (p * (off_v + tolerance.gamma(3 * S, dtype)) + np.finfo(dtype).tiny).swapaxes(-1, -2) @ d
    d_k = d_score.swapaxes(-1, -2) @ q
    return tuple(
        x.transpose(0, 3, 1, 2, 4).reshape(shape)
        for x, shape in (
            (d_score @ k, one.q.shape),
            (d_k.sum(axis=2, keepdims=True), one.k.shape),
            (d_v.sum(axis=2, keepdims=True), one.v.shape),
        )
    )


@pytest.mark.parametrize("ops", [DEFINITIONS, FAST], ids=["definition", "fast"])
@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_attention_on_flat_and_saturated_heads(dtype: type, ops: Ops, data: st.DataObject) -> None:
    """Each entry within the rounding of its own terms; what is exactly zero is exactly zero."""
    one = data.draw(heads(dtype))
    want, saved = one.run(DEFINITIONS, np.longdouble)
    got, _ = one.run(ops, dtype)
    for x, exact, budget in zip(got, want, rounding(one, saved), strict=True):
        assert x.dtype == dtype
        assert (np.abs(x - exact) <= budget).all()
    # a query that gives all of p to one key, in this dtype, has no slope; nor has an unseen key
    p = one.run(DEFINITIONS, dtype)[1][3]
    alone = ((p == 0) | (p == 1)).all(axis=-1)
    B, T, H = one.q.shape[:3]
    assert not got[0][alone.reshape(B, H, T).transpose(0, 2, 1)].any()
    assert not got[1][alone.all(axis=(2, 3)).reshape(B, -1, 1).repeat(T, 2).swapaxes(1, 2)].any()


@pytest.mark.parametrize("ops", [DEFINITIONS, FAST], ids=["definition", "fast"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_that_share_all_of_p_keep_the_digits_of_what_tells_them_apart(
    dtype: type, ops: Ops
) -> None:
    """Of two keys alike p is 1/2 each: what their values have in common leaves no rounding behind.

    A query's gradient is (d_1 − d_2) k / 4 and as much with the other sign: 0.
    """
    rng = np.random.default_rng(0)
    k = np.repeat(rng.normal(size=(1, 1, 1, 4)), 2, axis=1).astype(dtype)
    v = (1000 + rng.normal(size=(1, 2, 1, 4))).astype(dtype)
    q, d = rng.normal(size=(2, 1, 2, 8, 4)).astype(dtype)
    layout = layers.full_layout(np.ones((1, 2), bool), np.zeros((1, 2), int))
    _, saved = ops.attention_forward(q, k, v, layout, None, None)
    d_q, d_k, _ = ops.attention_backward(d, saved)
    apart = np.abs((d * (v[:, :1] - v[:, 1:])).sum(axis=-1)).max()
    assert np.abs(d_k).max() > apart / 100
    assert np.abs(d_q).max() <= 4 * tolerance.eps(dtype) * apart * np.abs(k).max()


@pytest.mark.parametrize("dtype", FLOATS)
@given(keys=st.integers(1, 70), size=st.floats(0.1, 200), seed=st.integers(0, 99))
def test_the_backward_has_the_forwards_probabilities(
    dtype: type, keys: int, size: float, seed: int
) -> None:
    """Bit for bit, wherever a row's keys begin and end."""
    rng = np.random.default_rng(seed)
    first, last = np.sort(rng.integers(0, keys, (2, 5)), axis=0)
    last[-1] = -1  # a row that sees nothing
    p = (rng.normal(size=(5, -(-keys // LANES) * LANES)) * size).astype(dtype)
    again, d_p, rows, score = p.copy(), p.copy(), np.empty((2, 5), dtype), p.astype(np.float64)
    scale = dtype(1 / np.sqrt(80))
    attention.softmax_forward(p, first, last, 0, scale, *rows)
    attention.softmax_backward(again, d_p, first, last, 0, scale, scale, *rows)
    assert again.tobytes() == p.tobytes()
    visible = (first[:, None] <= np.arange(p.shape[1])) & (np.arange(p.shape[1]) <= last[:, None])
    want = layers.softmax_over(score * scale, visible)
    assert np.abs(p - want).max() <= tolerance.gamma(keys + 20 + 9 * size, dtype)
    assert not p[~visible].any()
    assert not d_p[~visible].any()


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(-1, 150)), max_size=4))
def test_tiles_leave_out_what_nobody_sees(sight: list[tuple[int, int]]) -> None:
    """The least range of whole lanes that has all that is seen."""
    first, last = np.array(sight, np.int64).reshape(-1, 2).T.copy()
    lanes = {s // LANES for one, other in sight for s in range(one, other + 1)}
    want = (min(lanes, default=0) * LANES, (max(lanes, default=-1) + 1) * LANES)
    assert attention.keys_of(first, last) == want


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_is_nothing_to_see_behind_the_last_key(dtype: type) -> None:
    """A layout may say more keys than there are: then all of them are seen, and no padding."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 2, 4)).astype(dtype)
    seen = [Layout(*np.array([[[0, 1]], [[0, 0]], [[last] * 2]])) for last in (1, 40)]
    want, got = (FAST.attention_forward(q, k, v, layout)[0] for layout in seen)
    assert got.tobytes() == want.tobytes()


ONE_KEY = {"two positions": (2, 0), "windows of one": (5, 1)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ops", [DEFINITIONS, FAST], ids=["definition", "fast"])
@pytest.mark.parametrize("which", ONE_KEY)
def test_one_key_sends_nothing_to_queries_and_keys(which: str, ops: Ops, dtype: type) -> None:
    """All labels hang on positions that see one key: the gradients of q and k are exactly zero."""
    length, window = ONE_KEY[which]
    one = case(length=length, norm_place=NormPlace.PRE, windows=(window,) * 2)
    _, gradient = loss_and_gradient(one.config, one.astype(dtype), *one.batch, ops=ops)
    for name, slope in gradient.items():
        nothing = any(part in name for part in ("attn.q", "attn.k"))
        assert slope.any() != nothing, name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("half", [1, 3, 4])
def test_rotating_has_the_bits_of_the_definition(dtype: type, half: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(dtype)
    angle = np.random.default_rng(1).normal(size=(2, 5, 1, half)) * 9
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    assert FAST.rotate(x, cos, sin).tobytes() == layers.rotate(x, cos, sin).tobytes()
    assert FAST.rotate(x, cos, -sin).tobytes() == layers.rotate(x, cos, -sin).tobytes()


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


# ------------------------------------------------------------------ logits


@given(
    st.integers(0, 9999), st.sampled_from([1, 2, 7, 255, 256, 257]), st.floats(0, 60),
    st.booleans(),
)  # fmt: skip
def test_cross_entropy_by_the_kernel(seed: int, V: int, spread: float, ties: bool) -> None:
    """Each entry within V + 8 + |z_v − z_k| roundings of itself; what underflows is 0 or tiny."""
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(5, V)) * spread).astype(np.float32)
    z = np.round(z) if ties else z
    z[0, : V // 2] = -np.inf
    label = np.array([V - 1, 0, -1, int(z[3].argmax()), V // 2])
    nats, slope = FAST.cross_entropy(z, label)
    want_nats, want = layers.cross_entropy(z.astype(np.float64), label)
    below = np.minimum(z.max(axis=1, keepdims=True) - z, 200)
    unit, tiny = tolerance.eps(np.float32), np.finfo(np.float32).tiny
    assert nats.dtype == slope.dtype == np.float32
    p = np.exp(z - z.max(axis=1, keepdims=True).astype(np.float64))
    off = (V + 8 + below) * unit * p / p.sum(axis=1, keepdims=True) + 2 * tiny
    off[np.arange(5), z.argmax(axis=1)] = 0  # it is what is left of 1
    rest, most = off.sum(axis=1), np.abs(want).max(axis=1)
    off += np.where(off == 0, (rest + (V + 8) * unit * most)[:, None], 0)
    own = rest + (V + 8) * unit * np.abs(want[np.arange(5), label])
    off[np.arange(5), label] = np.maximum(off[np.arange(5), label], own)
    assert (np.abs(slope - want) <= off).all()
    assert (np.abs(nats - want_nats) <= rest + (V + 8) * unit * np.abs(want_nats)).all()
    assert not slope[2].any()
    z[4, -1] = np.nan
    with pytest.raises(NonFiniteError):
        FAST.cross_entropy(z, label)


@given(st.integers(0, 9999), st.sampled_from([1, 2, 255, 256, 257, 600]), st.floats(0, 40))
def test_labels_by_the_kernel_have_the_bits_of_the_definition(
    seed: int, V: int, spread: float
) -> None:
    """At any u, and at those where rounding decides: u c = c_v, and a few units beside it."""
    rng = np.random.default_rng(seed)
    z = np.repeat((rng.normal(size=(2, V)) * spread).astype(np.float32), 10, axis=0)
    e = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    c = np.cumsum(e, axis=1)
    at = c[np.arange(20), rng.integers(0, V, 20)] / c[:, -1]
    u = np.clip(at * (1 + rng.choice([0, 1, -1, 3], 20) * rng.choice([2**-53, 1e-8], 20)), 0, 1)
    u[::4] = rng.random(5)
    u[1] = 0
    assert (FAST.draw_labels(z, u) == layers.draw_labels(z, u)).all()


def test_most_labels_are_drawn_by_the_kernel() -> None:
    rng = np.random.default_rng(0)
    z, label = rng.normal(size=(60, 8192)).astype(np.float32), np.empty(60, np.int64)
    kernels.propose_labels(z, rng.random(60), label)
    assert (label >= 0).mean() > 0.95


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (200, 33), (0, 4), (2044, 130)])
def test_gram_is_the_lower_triangle_of_the_product(dtype: type, rows: int, size: int) -> None:
    rng = np.random.default_rng(0)
    x, before = rng.normal(size=(rows, size)).astype(dtype), rng.normal(size=(size, size))
    for onto in (False, True):
        total = before.astype(dtype)
        gram.add_gram(x, total, onto=onto)
        wide = x.astype(np.float64)
        want = np.tril(wide.T @ wide + onto * before)
        scale = np.abs(wide).T @ np.abs(wide) + np.abs(before)
        assert (np.abs(np.tril(total) - want) <= tolerance.gamma(rows + 2, dtype) * scale).all()
        again = before.astype(dtype)
        gram.add_gram(np.asfortranarray(x), again, onto=onto)
        assert again.tobytes() == total.tobytes()
    with pytest.raises(ValueError, match="add_gram"):
        gram.add_gram(x, np.zeros((size + 1, size + 1), dtype), onto=False)


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-20, 1e-9, 1.0]), min_size=1, max_size=4))
def test_products_that_would_vanish_in_float32_are_made_in_float64(sizes: list[float]) -> None:
    """Chunk by chunk, in any order; what was held in float32 stays there."""
    rng = np.random.default_rng(0)
    chunks = [(rng.normal(size=(5, 4)) * size).astype(np.float32) for size in sizes]
    got = np.empty((4, 4), np.float32)
    for n, x in enumerate(chunks):
        got = add_gram(x, got, onto=n > 0)
    wide = np.concatenate(chunks).astype(np.float64)
    budget = budgets.gram(len(wide), 1, np.float32) * np.linalg.norm(wide) ** 2
    assert np.linalg.norm(np.tril(got - wide.T @ wide)) <= budget
    first = next((size for size in sizes if size), 1.0)
    assert got.dtype == (np.float32 if first > 1e-15 else np.float64)


def test_small_products_are_kept_when_more_rows_follow() -> None:
    """One row whose squares float32 just holds, then many that it does not."""
    few, many = np.full((1, 2), 3.2e-19, np.float32), np.full((60, 2), 1e-22, np.float32)
    got = add_gram(many, add_gram(few, np.empty((2, 2), np.float32), onto=False), onto=True)
    wide = np.concatenate([few, many]).astype(np.float64)
    gap = np.abs(got.astype(np.float64) - wide.T @ wide) / 1e-37
    assert np.tril(gap).max() < 2e-5  # 60 squares of 1e-44 vanish beside it


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 200])
def test_folding_and_unfolding(size: int) -> None:
    rng, at = np.random.default_rng(0), np.tril_indices(size)
    product = rng.normal(size=(size, size)).astype(np.float32)
    product[:, 0] = -0.0
    for onto, before in ((True, rng.normal(size=len(at[0]))), (False, np.zeros(len(at[0])))):
        total = before.copy() if onto else np.full(len(before), np.nan)
        kernels.fold_triangle(total, product, onto)
        assert total.tobytes() == (before + product[at].astype(np.float64)).tobytes()
    whole, got = np.empty((2, size, size))
    whole[at] = whole.T[at] = total
    kernels.unfold_triangle(total, got)
    assert got.tobytes() == whole.tobytes()


def test_counting_kernel_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        lam, mu = -np.sort(-rng.integers(0, 5, 6) * 1.0), -np.sort(-rng.integers(0, 5, 7) * 1.0)
        for threshold in (0.0, 1.0, 3.0, 4.0, 16.0, 17.0):
            got = np.empty(6, np.int64)
            kernels.count_at_least(lam, mu, threshold, got)
            assert got.tolist() == (np.outer(lam, mu) >= threshold).sum(axis=1).tolist()


def test_the_exponential_and_normal_of_the_kernels_are_as_exact_as_they_say() -> None:
    """In float32: e^x to 2 ulp (observed 1.01), tanh to 3 (1.2), Φ to 3e-7 (observed 2.5e-7)."""
    for x in np.linspace(-87, 88, 2001, dtype=np.float32):
        want = math.exp(float(x))
        assert abs(float(kernels._exp32(x)) - want) <= 2 * np.spacing(np.float32(want))
    for x in np.linspace(-12, 12, 2001, dtype=np.float32):
        want = math.tanh(float(x))
        assert abs(float(kernels._tanh32(x)) - want) <= 3 * abs(np.spacing(np.float32(want)))
    for z in np.linspace(-8, 8, 2001, dtype=np.float32):
        e = np.float32(math.exp(-(float(z) ** 2) / 2))
        want = 0.5 * math.erfc(-float(z) * math.sqrt(0.5))
        assert abs(float(kernels._normal32(z, e)) - want) <= 3e-7
    assert kernels._exp32(np.float32(-87.1)) == 0
    assert kernels._exp32(np.float32(88.1)) == np.inf
