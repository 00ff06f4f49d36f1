"""The backward against complex step, in the budget that the path scale derives."""

from __future__ import annotations

from dataclasses import replace

import budgets
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Case,
    arrays_of,
    assert_within,
    case,
    cases,
    config,
    image_cases,
    random_parameters,
)

from refcurv.law import tolerance
from refcurv.model import layers, transformer
from refcurv.model.config import Image, NormPlace, QKNorm
from refcurv.model.gradient import head_backward, loss_and_gradient
from refcurv.model.layers import Ops
from refcurv.model.transformer import Tap
from refcurv.passes.fast import FAST

STEP = 1e-30
ANY = st.one_of(cases(), image_cases())


def complex_step_gradient(one: Case, name: str) -> np.ndarray:
    """d loss / d parameter, entry by entry: Im loss(θ + i h e)/h."""
    parameters = one.astype(np.complex128)
    out = np.zeros(parameters[name].shape)
    for index in np.ndindex(out.shape):
        kept = parameters[name][index]
        parameters[name][index] = kept + 1j * STEP
        out[index] = loss_of(one, parameters).imag / STEP
        parameters[name][index] = kept
    return out


def loss_of(one: Case, parameters: dict[str, np.ndarray]) -> np.complex128:
    token, label, layout = one.batch
    final, _ = transformer.forward(one.config, parameters, token, layout)
    head = head_backward(one.config, parameters, final, label, label >= 0)
    return transformer.drain(head, lambda step: None).nats_BT.sum()


def budget(one: Case, dtype: object = np.float64) -> float:
    widest = max(
        *one.config.linear_layers()["head"],
        one.config.mlp_width,
        one.token.size,
        one.token.shape[1],
    )
    return budgets.path(one.config.layers, widest, dtype)


@given(ANY)
def test_gradient_of_every_parameter_equals_complex_step(one: Case) -> None:
    # observed: 1.5 % of the budget; planted bugs: tests/test_planted_bugs.py
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    assert gradient.keys() == one.parameters.keys()
    for name in one.parameters:
        truth = complex_step_gradient(one, name)
        assert_within(gradient[name], truth, budget(one), scale[name], name)


@pytest.mark.parametrize("step", [6, 1, 4])
def test_the_forward_is_the_loops(step: int) -> None:
    """Scaled tokens and a table of positions whose first rows are nobody's; some tokens at once."""
    one = case(
        rope_theta=None, learned_positions=9, position_offset=2, embed_scale=3.0, logit_cap=2.0
    )
    past: list[layers.Array | None] = [None] * one.config.layers
    parts = []
    for begin in range(0, 6, step):
        index_BT = np.tile(np.arange(begin, min(begin + step, 6)), (2, 1))
        layout = layers.Layout(index_BT, np.zeros_like(index_BT), index_BT)
        token_BT = one.token[:, begin : begin + step]
        final_BTD, _ = transformer.forward(
            one.config, one.parameters, token_BT, layout, past=past if step < 6 else None
        )
        parts += [transformer.head_logits(one.config, one.parameters, x_TD) for x_TD in final_BTD]
    for b in range(2):
        got = np.concatenate(parts[b::2])
        want = oracles.logits(one.config, one.parameters, one.token[b])
        assert np.allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("places", ["learned", "rotary"])
def test_the_forward_of_images_is_the_loops(places: str) -> None:
    """What comes first, then the patches row by row."""
    image = Image(channels=2, height=4, width=6, patch=2)
    fields: dict[str, object] = dict(image=image, causal=False, pool="cls")
    if places == "learned":
        fields |= dict(rope_theta=None, learned_positions=7)
    made = config(**fields)
    parameters = random_parameters(made, 0)
    pixel = np.random.default_rng(1).normal(size=(2, 2, 4, 6))
    final_BTD, _ = transformer.forward(
        made, parameters, layers.unfold(pixel, image.patch), transformer.image_layout(made, 2)
    )
    for b in range(2):
        got = transformer.head_logits(made, parameters, final_BTD[b])
        assert np.allclose(got, oracles.logits(made, parameters, pixel[b]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 9])
def test_only_a_learned_position_of_padding_is_moved(rows: int) -> None:
    """Padding may lie behind the table; it reads the first row then, and nobody reads it."""
    real_BT = np.array([[False, False, True, True, True, False]])
    segment_BT = np.zeros((1, 6), int)
    made = transformer.layout_of(config(learned_positions=rows), real_BT, segment_BT)
    plain = layers.causal_layout(real_BT, segment_BT)
    assert plain.position_BT[~real_BT].any()
    want = plain.position_BT * (real_BT if rows else 1)
    assert np.array_equal(made.position_BT, want)


@given(ANY)
def test_scale_bounds_the_rounding(one: Case) -> None:
    """The same code in longdouble: what float64 rounding does; observed 2 % of the budget."""
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("longdouble is no wider than float64 on this platform")
    loss, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    wide_loss, wide = loss_and_gradient(one.config, one.astype(np.longdouble), *one.batch)
    assert wide_loss.dtype == np.longdouble
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    largest = max(float(np.abs(scale[n] * one.parameters[n]).sum()) for n in scale)
    assert abs(loss - wide_loss) <= budget(one) * max(largest, abs(wide_loss))
    for name in gradient:
        assert_within(gradient[name], wide[name], budget(one), scale[name], name)


@given(cases())
def test_the_scale_of_the_head_is_the_sum_of_its_magnitudes(one: Case) -> None:
    """Σ (p + 1 at the label) |a|, without a cap; and no gradient is larger than its scale."""
    one = replace(one, config=replace(one.config, logit_cap=None, tied=False))
    one.parameters.setdefault("head.weight", one.parameters["embed.weight"].copy())
    token, label, layout = one.batch
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    final, _ = transformer.forward(one.config, one.parameters, token, layout)
    z = transformer.head_logits(one.config, one.parameters, final)
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    want = np.zeros(gradient["head.weight"].shape)
    for b, t in np.argwhere(label >= 0):
        want += np.outer(p[b, t] + (np.arange(len(want)) == label[b, t]), np.abs(final[b, t]))
    assert scale["head.weight"] == pytest.approx(want, rel=1e-12)
    for name, d in gradient.items():
        assert (np.abs(d) <= scale[name] * (1 + 1e-12)).all(), name


@given(ANY)
def test_float32_stays_float32_and_within_its_budget(one: Case) -> None:
    # observed: 12 % of the budget
    loss, gradient = loss_and_gradient(one.config, one.astype(np.float32), *one.batch)
    _, truth = loss_and_gradient(one.config, one.parameters, *one.batch)
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    assert loss.dtype == np.float32
    for name in gradient:
        assert gradient[name].dtype == np.float32
        assert_within(gradient[name], truth[name], budget(one, np.float32), scale[name], name)


@pytest.mark.parametrize("place", list(NormPlace))
@pytest.mark.parametrize("qk_norm", list(QKNorm))
def test_structural_zeros(place: NormPlace, qk_norm: QKNorm) -> None:
    """One visible key makes the softmax constant: q, k and their gains get exactly nothing."""
    one = case(length=1, norm_place=place, qk_norm=qk_norm)
    one = Case(one.config, one.parameters, one.token, one.real, one.segment, one.token * 0 + 1)
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    for name, d in gradient.items():
        silent = any(part in name for part in (".q.", ".k.", ".q_norm.", ".k_norm."))
        assert (np.abs(d).max() == 0) == silent, name


def test_tokens_that_never_occur_have_no_embedding_gradient() -> None:
    one = case()
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    absent = np.setdiff1d(np.arange(one.config.vocabulary), one.token[:, :-1])
    assert (gradient["embed.weight"][absent] == 0).all()
    present = np.unique(one.token[:, :-1])
    assert (np.abs(gradient["embed.weight"][present]).max(axis=1) > 0).all()


def test_no_label_means_no_loss_and_no_gradient() -> None:
    one = case()
    loss, gradient = loss_and_gradient(
        one.config, one.parameters, one.token, np.full(one.token.shape, -1), one.layout
    )
    assert loss == 0
    assert gradient.keys() == one.parameters.keys()
    assert all((d == 0).all() for d in gradient.values())


def test_head_chunks_change_nothing() -> None:
    """More labelled rows than HEAD_ROWS: the same loss as all logits at once."""
    one = case(batch=9, length=80)
    token, label, layout = one.batch
    loss, gradient = loss_and_gradient(one.config, one.parameters, token, label, layout)
    final, _ = transformer.forward(one.config, one.parameters, token, layout)
    logit = transformer.head_logits(one.config, one.parameters, final)[label >= 0]
    assert len(logit) > 512
    p = np.exp(logit) / np.exp(logit).sum(axis=-1, keepdims=True)
    rows = np.arange(len(p))
    assert_within(loss, -np.log(p[rows, label[label >= 0]]).sum(), 1e-13, loss, "loss")
    p[rows, label[label >= 0]] -= 1
    assert_within(
        gradient["head.weight"],
        p.T @ final[label >= 0],
        tolerance.gamma(800, np.float64),
        np.abs(p).T @ np.abs(final[label >= 0]),
        "head",
    )


def test_the_backward_stops_where_the_trace_ends() -> None:
    one = case(layers=3)
    token, label, layout = one.batch
    final, trace = transformer.forward(one.config, one.parameters, token, layout, lowest=2)
    assert len(trace.blocks) == 1
    head = head_backward(one.config, one.parameters, final, label, label >= 0)
    loss = transformer.drain(head, lambda step: None)
    names = [
        s.name for s in transformer.backward(one.config, one.parameters, loss.d_final_BTD, trace)
    ]
    assert names[0] == "final_norm.weight"
    assert all(name.startswith("blocks.2.") for name in names[1:])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ops", [layers.DEFINITIONS, FAST], ids=["definitions", "fast"])
def test_downs_input_is_not_kept_and_is_made_again_bit_for_bit(ops: Ops, gated: bool) -> None:
    one = case(4, gated=gated)
    read: list[np.ndarray] = []

    def mlp_forward(*args: object) -> tuple[np.ndarray, object]:
        hidden, saved = ops.mlp_forward(*args)
        read.append(hidden)
        return hidden, saved

    watched = replace(ops, mlp_forward=mlp_forward)
    final, trace = transformer.forward(one.config, one.parameters, one.token, one.layout, watched)
    before = list(read)
    assert len(before) == one.config.layers
    kept = list(arrays_of(trace.blocks))
    assert not any(np.shares_memory(hidden, x) for hidden in before for x in kept)
    steps = transformer.blocks_backward(
        one.config, one.parameters, np.ones_like(final), trace, watched
    )
    downs = [step.a for step in steps if isinstance(step, Tap) and step.name.endswith("down")]
    assert [a.tobytes() for a in downs] == [hidden.tobytes() for hidden in reversed(before)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturated_logits_keep_the_slope_of_their_soft_cap(dtype: type) -> None:
    """Entry by entry to a few roundings, at 40 caps too; from the logits it is off by 6 % at 8."""
    cap, at = 2.0, np.array([[-3, 1.5, 0.25], [8, 8.25, -8], [12, -13, 11], [40, 20, -40]])
    made = case(width=3, heads=1, kv_heads=1, vocabulary=4, logit_cap=cap).config
    parameters = {"head.weight": (cap * at).astype(dtype)}  # (V, D): of the identity y is its rows
    final_BTD, label_BT = np.eye(3, dtype=dtype)[None], np.array([[0, 3, 2]])
    taps: list[transformer.Tap | transformer.Slope] = []
    head = head_backward(made, parameters, final_BTD, label_BT, label_BT >= 0)
    transformer.drain(head, taps.append)
    u = at.T.astype(np.longdouble)
    e = np.exp(cap * np.tanh(u))
    d_logit = e / e.sum(axis=1, keepdims=True)
    d_logit[range(3), label_BT[0]] -= 1
    want = d_logit / np.cosh(u) ** 2
    (tap,) = taps
    assert tap.g.dtype == dtype
    roundings = 8 + 2 * np.abs(u)  # of exp(2u), whose argument is rounded, and of what follows
    assert_within(
        (tap.g.reshape(3, 4) / want - 1) / roundings, np.zeros((3, 4)),
        np.finfo(dtype).eps, np.ones((3, 4)), "g",
    )  # fmt: skip
