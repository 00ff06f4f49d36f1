"""The identities (METHOD, Identities) on the transformer's own rows; each test names its id."""

from __future__ import annotations

from dataclasses import replace

import budgets
import numpy as np
import pytest
from hypothesis import given
from strategies import Case, assert_within, case, cases, config

from refcurv.law import tolerance
from refcurv.model import layers, transformer
from refcurv.model.config import NormPlace, QKNorm
from refcurv.model.gradient import head_backward, loss_and_gradient
from refcurv.model.labels import shift_labels
from refcurv.model.layers import DEFINITIONS, causal_layout
from refcurv.model.transformer import Slope, Tap

ALL = [(place, qk) for place in NormPlace for qk in QKNorm]
LINEAR = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def taps(
    one: Case,
    label: np.ndarray | None = None,
    weight: object = 1.0,
    keep: np.ndarray | None = None,
) -> dict[str, Tap]:
    """Inputs and output gradients of every linear layer; `weight` multiplies the loss's terms.

    `keep` are the head's rows, by default all real positions.
    """
    final, trace = transformer.forward(one.config, one.parameters, one.token, one.layout)
    label = one.label if label is None else label
    out: dict[str, Tap] = {}

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Tap):
            out[step.name] = step

    head = head_backward(
        one.config, one.parameters, final, label, one.real if keep is None else keep
    )
    loss = transformer.drain(head, take)
    d_final = loss.d_final_BTD * weight
    for step in transformer.backward(one.config, one.parameters, d_final, trace):
        take(step)
    return out


def changed(one: Case, **fields: object) -> Case:
    """The same parameters and batch under another configuration."""
    return replace(one, config=replace(one.config, **fields))


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


@given(cases())
def test_O29_weight_gradient_is_the_sum_over_rows(one: Case) -> None:
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    for name, tap in taps(one, keep=one.label >= 0).items():  # the same bits: zeros stay zeros
        W = one.parameters[one.config.weight_of(name)]
        a, g = flat(tap.a), flat(tap.g)
        through_outputs = float((g * (a @ W.T)).sum())
        scale = float((np.abs(g) * (np.abs(a) @ np.abs(W).T)).sum())
        d = gradient[one.config.weight_of(name)]
        if name == "head" and one.config.tied:
            d = g.T @ a
        budget = tolerance.gamma(a.shape[0] + sum(W.shape), np.float64)
        assert_within((W * d).sum(), through_outputs, 2 * budget, scale, name)


@pytest.mark.parametrize(("place", "qk"), ALL)
def test_O30_positions_without_a_reachable_label_have_no_gradient(
    place: NormPlace, qk: QKNorm
) -> None:
    one = case(norm_place=place, qk_norm=qk, length=5)
    for name, tap in taps(one).items():
        g = tap.g.reshape(2, 5, -1)
        assert (g[:, -1] == 0).all(), name
        assert np.abs(g[:, :-1]).max() > 0, name


@pytest.mark.parametrize(("place", "qk"), ALL)
def test_O31_the_first_query_has_no_gradient(place: NormPlace, qk: QKNorm) -> None:
    one = case(norm_place=place, qk_norm=qk)
    g = taps(one)["blocks.1.attn.q"].g
    assert (g[:, 0] == 0).all()
    assert (np.abs(g[:, 1:-1]).max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("place", list(NormPlace))
def test_O32_rotated_key_gradients_sum_to_zero(place: NormPlace) -> None:
    """Adding one vector to all rotated keys shifts a query's scores alike: softmax ignores it."""
    one = case(norm_place=place, qk_norm=QKNorm.NONE)
    made = one.config
    g = taps(one)["blocks.1.attn.k"].g.reshape(*one.token.shape, made.kv_heads, made.head_width)
    rope = layers.rope_tables(one.layout.position_BT, made.head_width, made.rope_theta, g.dtype)
    rotated = layers.rotate(g, *rope)
    scale = np.abs(rotated).sum(axis=1)
    assert scale.min() > 0
    assert np.abs(rotated.sum(axis=1) / scale).max() < budgets.path(2, 64, np.float64)
    assert np.abs(g.sum(axis=1)).max() > 1e-3 * scale.max()  # before rotation it does not


def test_O33_a_key_value_head_sums_its_groups_copies() -> None:
    """Grouped queries = full attention whose key-value heads are copies, in repeat order."""
    one = case(qk_norm=QKNorm.NONE)
    made = one.config
    R, E = made.heads // made.kv_heads, made.head_width
    wide = config(qk_norm=QKNorm.NONE, kv_heads=made.heads)
    copied = dict(one.parameters)
    for i in range(made.layers):
        for name in ("k", "v"):
            W = one.parameters[f"blocks.{i}.attn.{name}.weight"].reshape(made.kv_heads, E, -1)
            copied[f"blocks.{i}.attn.{name}.weight"] = np.repeat(W, R, axis=0).reshape(
                -1, made.width
            )
    full = taps(Case(wide, copied, one.token, one.real, one.segment, one.label))
    few = taps(one)
    for name in ("blocks.0.attn.k", "blocks.1.attn.v"):
        copies = full[name].g.reshape(*one.token.shape, made.kv_heads, R, E)
        summed = copies.sum(axis=3).reshape(*one.token.shape, -1)
        assert_within(few[name].g, summed, tolerance.gamma(16, float), np.abs(copies).sum(), name)
        tiled = copies.reshape(*one.token.shape, R, made.kv_heads, E).sum(axis=2)
        assert np.abs(tiled.reshape(few[name].g.shape) - few[name].g).max() > 1e-3


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_O34_the_norm_defect_tells_where_eps_stands(eps: float, rng: np.random.Generator) -> None:
    """g_x·x = (g_ŷ·ŷ) · eps/(ms + eps), ŷ before the gain, with eps inside the root."""
    x, gain, d_y = rng.normal(size=(5, 8)), rng.normal(size=8), rng.normal(size=(5, 8))
    _, saved = layers.rms_norm_forward(x, gain, eps)
    d_x, _ = layers.rms_norm_backward(d_y, saved)
    ms = (x * x).mean(axis=1)
    y_hat = x / np.sqrt(ms + eps)[:, None]
    inside = (d_y * gain * y_hat).sum(axis=1) * eps / (ms + eps)
    scale = (np.abs(d_x) * np.abs(x)).sum(axis=1)
    assert_within((d_x * x).sum(axis=1), inside, tolerance.gamma(64, np.float64), scale, "defect")
    if eps == 0.1:
        outside = (d_y * gain * y_hat).sum(axis=1) * eps / (np.sqrt(ms) + eps)
        assert np.abs(inside - outside).max() > 1e-3  # the other convention is far away


@given(cases())
def test_O36_gate_and_up(one: Case) -> None:
    """g_up z_up = g_h h, g_gate = g_h z_up f'(z_gate), elementwise; without a gate g_up = g_h f'.

    f' by complex step.
    """
    found, f = taps(one), layers.ACTIVATIONS[one.config.activation]
    budget = tolerance.gamma(64, np.float64)

    def outputs(layer: str) -> tuple[np.ndarray, np.ndarray]:
        """z, and f'(z)."""
        z = found[layer].a @ one.parameters[f"{layer}.weight"].T
        z = z + one.parameters.get(f"{layer}.bias", 0)
        return z, f(z + 1e-30j)[0].imag / 1e-30

    for i in range(one.config.layers):
        at = f"blocks.{i}.mlp."
        down, W_down = found[f"{at}down"], one.parameters[f"{at}down.weight"]
        g_h, scale = down.g @ W_down, np.abs(down.g) @ np.abs(W_down)
        z_up, slope = outputs(f"{at}up")
        g_up = found[f"{at}up"].g
        if not one.config.gated:
            assert_within(g_up, g_h * slope, budget, scale * (1 + np.abs(z_up)), "up")
            continue
        z_gate, slope = outputs(f"{at}gate")
        assert_within(
            g_up * z_up, g_h * down.a, budget, scale * np.abs(z_up) * (1 + np.abs(z_gate)), "up"
        )
        g_gate, terms = found[f"{at}gate"].g, scale * np.abs(z_up) * (1 + np.abs(z_gate))
        assert_within(g_gate, g_h * z_up * slope, budget, terms, "gate")


def test_O37_layers_that_share_an_input_carry_the_same_array() -> None:
    found = taps(case())
    for i in (0, 1):
        at = f"blocks.{i}."
        assert found[at + "mlp.gate"].a is found[at + "mlp.up"].a
        assert found[at + "attn.q"].a is found[at + "attn.k"].a is found[at + "attn.v"].a
        assert found[at + "attn.o"].a.tobytes() != found[at + "attn.q"].a.tobytes()


@given(cases())
def test_O39_causality(one: Case) -> None:
    """A changed token leaves every earlier position's inputs and logits as they are, in bits."""
    one = changed(one, causal=True)
    t = one.token.shape[1] - 1
    other = one.token.copy()
    other[:, t] = (other[:, t] + 1) % one.config.vocabulary
    before, _ = transformer.forward(one.config, one.parameters, one.token, one.layout)
    after, _ = transformer.forward(one.config, one.parameters, other, one.layout)
    assert (before[:, :t] == after[:, :t]).all()
    moved = one.real[:, t] & (np.abs(before[:, t] - after[:, t]).max(axis=-1) > 0)
    differs = (
        one.parameters["embed.weight"][one.token[:, t]]
        != one.parameters["embed.weight"][other[:, t]]
    ).any(axis=1)
    assert not (moved & ~differs).any()


def test_a_changed_token_changes_its_own_position() -> None:
    one = case()
    other = one.token.copy()
    other[:, -1] = (other[:, -1] + 1) % one.config.vocabulary
    before, _ = transformer.forward(one.config, one.parameters, one.token, one.layout)
    after, _ = transformer.forward(one.config, one.parameters, other, one.layout)
    assert (np.abs(before[:, -1] - after[:, -1]).max(axis=-1) > 1e-3).all()


def expected_over_labels(one: Case, position: int) -> tuple[list[dict[str, Tap]], np.ndarray]:
    """Taps for every label that one position could have, and their probabilities (V, B)."""
    final, _ = transformer.forward(one.config, one.parameters, one.token, one.layout)
    logit = transformer.head_logits(one.config, one.parameters, final)[:, position]
    p = np.exp(logit - logit.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    label = np.full(one.token.shape, -1)
    every = []
    for v in range(one.config.vocabulary):
        label[:, position] = v
        every.append(taps(one, label.copy()))
    return every, p.T


@pytest.mark.parametrize("place", list(NormPlace))
def test_O40_fisher_gradients_have_mean_zero(place: NormPlace) -> None:
    """E over labels of g is 0 at every position of every layer."""
    one = case(norm_place=place, length=4)
    every, p_VB = expected_over_labels(one, 2)
    for name in every[0]:
        g = np.stack([found[name].g.reshape(*one.token.shape, -1) for found in every])
        mean = (g * p_VB[:, :, None, None]).sum(axis=0)
        scale = (np.abs(g) * p_VB[:, :, None, None]).sum(axis=0)
        assert_within(mean, 0 * mean, budgets.path(2, 8, np.float64), scale, name)
        assert scale.max() > 1e-3


def test_O8_the_heads_block_in_closed_form() -> None:
    """F = Σ_t (diag p − p pᵀ) ⊗ h hᵀ from logits alone = the expectation over labels of g gᵀ."""
    one = case(length=4)
    every, p_VB = expected_over_labels(one, 2)
    final, _ = transformer.forward(one.config, one.parameters, one.token, one.layout)
    for b in range(2):
        p, h = p_VB[:, b], final[b, 2]
        closed = np.kron(np.diag(p) - np.outer(p, p), np.outer(h, h))
        g = np.stack([found["head"].g.reshape(*one.token.shape, -1)[b, 2] for found in every])
        grads = np.stack([np.outer(x, h).ravel() for x in g])
        expected = np.einsum("v,vi,vj->ij", p, grads, grads)
        scale = np.abs(closed) + np.outer(p, p).max()
        assert_within(expected, closed, tolerance.gamma(16, float), scale, "head block")


def test_O41_the_heads_trace_by_kind_of_label() -> None:
    """E‖r‖² = 1 − Σp²; gold 1 − 2 p_y + Σp²; argmax 1 − 2 p_max + Σp², per position."""
    one = case(length=4)
    every, p_VB = expected_over_labels(one, 1)
    for b in range(2):
        p = p_VB[:, b]
        square = np.array(
            [(found["head"].g.reshape(*one.token.shape, -1)[b, 1] ** 2).sum() for found in every]
        )
        assert np.allclose(p @ square, 1 - (p * p).sum(), rtol=1e-13)
        assert np.allclose(square, 1 - 2 * p + (p * p).sum(), rtol=1e-12)
        assert np.isclose(square[p.argmax()], 1 - 2 * p.max() + (p * p).sum(), rtol=1e-12)


@given(cases())
def test_O16_head_gradients_sum_to_zero_over_the_vocabulary(one: Case) -> None:
    one = changed(one, logit_cap=None)  # it is the capped logits' gradients that do
    g = flat(taps(one)["head"].g)
    assert np.abs(g.sum(axis=-1)).max(initial=0) <= tolerance.gamma(2 * g.shape[-1], np.float64) * 2
    labelled = one.label[one.real] >= 0
    assert ((np.abs(g).max(axis=-1) > 0) | ~labelled | (one.config.vocabulary == 1)).all()


@given(cases())
def test_O44_a_weighted_loss_scales_g_linearly(one: Case) -> None:
    """Loss terms weighted by w: g by w, so G by w²; powers of two change no other bit."""
    plain, double = taps(one), taps(one, weight=2.0)
    for name in plain:
        if name != "head":
            assert (double[name].g == 2 * plain[name].g).all(), name


def test_O43_mean_loss_would_shrink_G_by_the_square_of_the_count() -> None:
    one = case()
    m = int((one.label >= 0).sum())
    total, mean = taps(one), taps(one, weight=1 / m)
    for name in ("blocks.0.mlp.up", "blocks.1.attn.k"):
        G, G_mean = (flat(x[name].g).T @ flat(x[name].g) for x in (total, mean))
        assert np.allclose(G_mean * m * m, G, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("place", "qk"), ALL)
def test_O51_padding_changes_no_real_position(place: NormPlace, qk: QKNorm) -> None:
    one = case(norm_place=place, qk_norm=qk, length=5)
    wider = np.concatenate([one.token, np.full((2, 3), 6)], axis=1)
    real = np.arange(8) < np.array([[5], [5]])
    segment = np.zeros_like(wider)
    padded = Case(
        one.config, one.parameters, wider, real, segment, shift_labels(wider, real, segment)
    )
    short, long = taps(one), taps(padded)
    for name in short:
        g = long[name].g.reshape(2, -1, long[name].g.shape[-1])
        a = long[name].a.reshape(2, -1, long[name].a.shape[-1])
        assert_within(g[:, :5], short[name].g.reshape(2, 5, -1), 1e-13, short[name].g, name)
        assert_within(a[:, :5], short[name].a.reshape(2, 5, -1), 1e-13, short[name].a, name)
        assert (g[:, 5:] == 0).all()


@pytest.mark.parametrize(("place", "qk"), ALL)
def test_O52_packed_documents_are_separate_documents(place: NormPlace, qk: QKNorm) -> None:
    one = case(norm_place=place, qk_norm=qk, batch=2, length=4)
    packed = one.token.reshape(1, 8)
    real = np.ones((1, 8), dtype=bool)

    def run(segment: np.ndarray) -> dict[str, Tap]:
        label = shift_labels(packed, real, segment)
        return taps(Case(one.config, one.parameters, packed, real, segment, label))

    apart = taps(one)
    together = run(np.repeat([[0, 1]], 4, axis=1))
    merged = run(np.zeros((1, 8), dtype=int))
    for name in LINEAR:
        key = f"blocks.1.{name}"
        want = apart[key].g.reshape(1, 8, -1)
        assert_within(together[key].g, want, 1e-13, want, key)
        assert np.abs(merged[key].g - want).max() > 1e-6, key  # without the mask it is not


def test_slopes_cover_every_parameter_that_is_no_linear_layer() -> None:
    one = case()
    token, label, layout = one.batch
    final, trace = transformer.forward(one.config, one.parameters, token, layout, DEFINITIONS)
    head = head_backward(one.config, one.parameters, final, label, label >= 0)
    loss = transformer.drain(head, lambda tap: None)
    steps = list(transformer.backward(one.config, one.parameters, loss.d_final_BTD, trace))
    slopes = {s.name for s in steps if isinstance(s, Slope)}
    linear = {one.config.weight_of(s.name) for s in steps if isinstance(s, Tap)} | {"head.weight"}
    assert slopes | linear == set(one.parameters)
    assert not slopes & linear


def test_the_scale_of_the_embedding_is_a_scale_of_its_table() -> None:
    """To the bit, for the scale is a power of two."""
    for scale in (2.0, 4.0):
        one = case(embed_scale=scale, tied=False)
        table = {"embed.weight": scale * one.parameters["embed.weight"]}
        other = replace(changed(one, embed_scale=1.0), parameters=one.parameters | table)
        loss, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
        want_loss, want = loss_and_gradient(other.config, other.parameters, *one.batch)
        want["embed.weight"] = scale * want["embed.weight"]
        assert loss == want_loss
        assert all((gradient[name] == want[name]).all() for name in want)


def test_layouts_by_hand() -> None:
    real = np.array([[True, True, True, True, False]])
    layout = causal_layout(real, np.array([[0, 0, 3, 3, 3]]))
    assert layout.position_BT.tolist() == [[0, 1, 0, 1, 2]]
    assert layout.first_BT.tolist() == [[0, 0, 2, 2, 2]]
    assert layout.last_BT.tolist() == [[0, 1, 2, 3, -1]]
