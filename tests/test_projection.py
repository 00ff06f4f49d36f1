"""The edit as an operator: projection, nesting, duality, refusals (O54-O60, O64, O65)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, case
from test_factors import corpus_of, model_of

import refcurv as rc
from refcurv.algebra.staircase import cut
from refcurv.curvature.eigenbasis import Bases, Eigenbasis, eigenbasis
from refcurv.editing.projection import keep_pairs, project, restored
from refcurv.law.checks import ConventionError, DTypeError, EmptyError, NameUnknownError, RangeError


def random_basis(O: int, I: int, seed: int) -> Eigenbasis:
    rng = np.random.default_rng(seed)
    made = []
    for n in (I, O):
        x = rng.normal(size=(n + 3, n)) * np.exp(-rng.random(n) * 3)
        made += eigenbasis(x.T @ x, n + 3, "float64", "M")[:2]
    return Eigenbasis(*made)


SIZES = st.integers(1, 9)


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0, 1))
def test_O54_edit_is_an_orthogonal_projection(O: int, I: int, seed: int, rho: float) -> None:
    """O54: idempotent, self-adjoint, Pythagoras; and equal to the sum over kept directions."""
    rng = np.random.default_rng(seed)
    basis = random_basis(O, I, seed)
    counts = cut(basis.lam, basis.mu, rho).counts
    W, X = rng.normal(size=(2, O, I))
    kept = project(W, basis, counts)
    size = np.linalg.norm(W)
    assert_within(project(kept, basis, counts), kept, 1e-14 * (O + I), size, "twice is once")
    assert abs((kept * X).sum() - (W * project(X, basis, counts)).sum()) < 1e-13 * size * 10
    assert abs((kept * (W - kept)).sum()) < 1e-13 * size**2
    gap = np.linalg.norm(kept) ** 2 + np.linalg.norm(W - kept) ** 2 - size**2
    assert abs(gap) < 1e-13 * size**2
    direct = np.zeros((O, I))
    for i, j in np.argwhere(np.arange(I) < counts[:, None]):
        u, v = basis.U_G[:, i], basis.U_A[:, j]
        direct += (u @ W @ v) * np.outer(u, v)
    assert_within(kept, direct, 1e-14 * (O + I), size, "definition")


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_O55_norms_are_monotone(O: int, I: int, seed: int, one: float, two: float) -> None:
    basis = random_basis(O, I, seed)
    W = np.random.default_rng(seed).normal(size=(O, I))
    low, high = (project(W, basis, cut(basis.lam, basis.mu, r).counts) for r in sorted((one, two)))
    assert np.linalg.norm(low) <= np.linalg.norm(high) + 1e-13
    assert np.linalg.norm(W - low) >= np.linalg.norm(W - high) - 1e-13


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0.01, 0.99))
def test_O60_transpose_duality(O: int, I: int, seed: int, rho: float) -> None:
    basis = random_basis(O, I, seed)
    W = np.random.default_rng(seed).normal(size=(O, I))
    stairs = cut(basis.lam, basis.mu, rho)
    turned = Eigenbasis(basis.U_G, basis.lam, basis.U_A, basis.mu)
    other = cut(turned.lam, turned.mu, rho)
    if stairs.kept == other.kept:  # rounding of the mass may decide one pair differently
        got = project(W.T, turned, other.counts).T
        assert_within(got, project(W, basis, stairs.counts), 1e-13, W, "transpose")


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0.01, 0.99))
def test_O59_signs_of_eigenvectors_do_not_matter(O: int, I: int, seed: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    basis = random_basis(O, I, seed)
    W = rng.normal(size=(O, I))
    counts = cut(basis.lam, basis.mu, rho).counts
    flipped = Eigenbasis(
        basis.U_A * rng.choice([-1, 1], I), basis.mu, basis.U_G * rng.choice([-1, 1], O), basis.lam
    )
    assert_within(project(W, flipped, counts), project(W, basis, counts), 1e-14, W, "signs")


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 999), st.floats(0.05, 0.95))
def test_rotated_inputs_leave_the_edited_function_unchanged(
    O: int, I: int, seed: int, rho: float
) -> None:
    """A → Q A Qᵀ and W → W Qᵀ: the edited layer computes the same outputs (O45)."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(I, I)))[0]
    a, g = rng.normal(size=(30, I)) * np.exp(-np.arange(I)), rng.normal(size=(30, O))
    W = rng.normal(size=(O, I))

    def edited(a: np.ndarray, W: np.ndarray) -> np.ndarray:
        U_A, mu, _ = eigenbasis(a.T @ a, 30, "float64", "A")
        U_G, lam, _ = eigenbasis(g.T @ g, 30, "float64", "G")
        basis = Eigenbasis(U_A, mu, U_G, lam)
        stairs = cut(lam, mu, rho)
        return project(W, basis, stairs.counts) @ a.T if stairs.gap > 1e-9 else np.zeros(0)

    plain, turned = edited(a, W), edited(a @ Q.T, W @ Q.T)
    if plain.size and turned.size:
        assert np.abs(plain - turned).max() < 1e-11 * np.abs(W).max() * np.abs(a).max()


@pytest.fixture(scope="module")
def made() -> tuple[rc.Model, Bases]:
    one = case(batch=4, length=12)
    model = model_of(one)
    return model, rc.decompose(rc.collect(model, corpus_of(one), layers="**"))


def test_edit_of_a_model(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    edited, record = rc.edit(model, basis, {"blocks.1.mlp.{gate,up}": 0.6, "blocks.0.mlp.down": 1})
    assert {x.method for x in record.layers} == {"kfac"}
    assert [x.layer for x in record.layers] == [
        "blocks.0.mlp.down", "blocks.1.mlp.gate", "blocks.1.mlp.up"
    ]  # fmt: skip
    down, gate, _up = record.layers
    assert (down.kept, down.norm) == (down.pairs, 1)
    assert down.mass == pytest.approx(1, abs=1e-15)
    assert (
        edited.parameters["blocks.0.mlp.down.weight"]
        is model.parameters["blocks.0.mlp.down.weight"]
    )
    assert edited.parameters["embed.weight"] is model.parameters["embed.weight"]
    one = basis["blocks.1.mlp.gate"]
    stairs = cut(one.lam, one.mu, 0.6)
    W = model.parameters["blocks.1.mlp.gate.weight"]
    want = project(W, one, stairs.counts)
    assert edited.parameters["blocks.1.mlp.gate.weight"].tobytes() == want.tobytes()
    assert gate.kept == stairs.kept
    assert 0.6 <= gate.mass < 1
    assert gate.norm == pytest.approx(np.linalg.norm(want) / np.linalg.norm(W))
    assert gate.acceptable == 0  # no key lies near the cut
    assert record.to_json()[1]["rho"] == 0.6


def test_O56_rho_one_returns_W_itself_and_zero_nothing(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    same, _ = rc.edit(model, basis, 1)
    none, record = rc.edit(model, basis, {"blocks.*.mlp.*": 0})
    for name in basis:
        assert same.parameters[f"{name}.weight"] is model.parameters[f"{name}.weight"]
    assert (none.parameters["blocks.0.mlp.up.weight"] == 0).all()
    assert record.layers[0].kept == 0


def test_O64_edits_of_different_layers_commute(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    one, two = {"blocks.0.mlp.up": 0.5}, {"blocks.1.attn.q": 0.7}
    forth, _ = rc.edit(rc.edit(model, basis, one)[0], basis, two)
    back, _ = rc.edit(rc.edit(model, basis, two)[0], basis, one)
    both, _ = rc.edit(model, basis, one | two)
    for name in model.parameters:
        first = forth.parameters[name].tobytes()
        assert first == back.parameters[name].tobytes() == both.parameters[name].tobytes()


def test_O65_edited_weights_have_the_dtype_of_their_source(made: tuple[rc.Model, Bases]) -> None:
    """bfloat16 sources are edited in float64, rounded once to nearest, 8 significant bits."""
    model, basis = made
    name = "blocks.0.mlp.up.weight"
    short = rc.Model(model.config, model.parameters, "float64", {name: "bfloat16"})
    got = rc.edit(short, basis, {"blocks.0.mlp.up": 0.6})[0].parameters[name]
    exact = rc.edit(model, basis, {"blocks.0.mlp.up": 0.6})[0].parameters[name]
    assert (got.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()
    assert got.dtype == np.float64
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact)).all()
    assert np.abs(got - exact).max() > 0


def test_what_was_cut_before_is_no_part_to_restore() -> None:
    """A second cut by one basis has nothing left to cut: no share of rounding by rounding."""
    rng = np.random.default_rng(0)
    basis = random_basis(8, 9, 0)
    mask = cut(basis.lam, basis.mu, 0.6).mask(9)
    once = keep_pairs(rng.normal(size=(8, 9)), basis, mask)
    exact = keep_pairs(once, basis, mask)
    assert restored(once, exact, exact.astype(np.float32), basis, mask) == 0
    W = rng.normal(size=(8, 9))
    exact = keep_pairs(W, basis, mask)
    assert restored(W, exact, exact.astype(np.float32), basis, mask) > 0


def test_a_tied_head_is_no_layer_to_edit() -> None:
    one = case(tied=True, batch=4, length=12)
    model = model_of(one)
    basis = rc.decompose(rc.collect(model, corpus_of(one), layers="**"))
    with pytest.raises(ConventionError, match="edit: the head is tied to the embedding"):
        rc.edit(model, basis, 0.5)
    edited, record = rc.edit(model, basis, {"blocks.**": 0.5})
    assert "head" not in {layer.layer for layer in record.layers}
    assert edited.parameters["embed.weight"] is model.parameters["embed.weight"]


def test_refusals(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    with pytest.raises(RangeError, match=r"rho of 'blocks.0.mlp.up' must lie in \[0, 1\]; got 2"):
        rc.edit(model, basis, {"blocks.0.mlp.up": 2})
    with pytest.raises(NameUnknownError, match=r"'blocks.9.mlp.up' matches none"):
        rc.edit(model, basis, {"blocks.9.mlp.up": 0.5})
    with pytest.raises(ConventionError, match="two patterns"):
        rc.edit(model, basis, {"blocks.0.mlp.up": 0.5, "**.up": 0.5})
    one = basis["blocks.0.mlp.up"]
    flat = Bases({"blocks.0.mlp.up": Eigenbasis(one.U_A, one.mu, one.U_G, 0 * one.lam)})
    with pytest.raises(EmptyError, match=r"'blocks.0.mlp.up': the curvature mass is 0"):
        rc.edit(model, flat, 0.5)
    foreign = Bases({"blocks.40.mlp.up": one})
    with pytest.raises(NameUnknownError, match="another model"):
        rc.edit(model, foreign, 0.5)
    narrow = rc.Model(
        model.config, model.parameters, "float32", {"blocks.0.mlp.up.weight": "float64"}
    )
    with pytest.raises(DTypeError, match="dtype"):
        rc.edit(narrow, basis, {"blocks.0.mlp.up": 0.5})
