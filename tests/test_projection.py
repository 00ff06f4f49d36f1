"""The edit as an operator: projection, nesting, duality, refusals (O54-O60, O64, O65)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, case, opened_for_lies
from test_biases import biased
from test_factors import corpus_of, model_of

import refcurv as rc
from refcurv.algebra.staircase import cut
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.curvature.resumed_bases import decompose_to
from refcurv.editing.kfac import restored
from refcurv.editing.projection import keep_pairs, project, projected
from refcurv.editing.record import joined, matrix_parts
from refcurv.editing.variants import CONTROLS, control
from refcurv.evaluation.bands import bands
from refcurv.files.digest import digest
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NameUnknownError,
    RangeError,
    SchemaError,
)
from refcurv.law.conventions import Bias
from refcurv.model.corpus import Population

UP = "blocks.0.mlp.up"


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


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0, 1))
def test_O60_transpose_duality(O: int, I: int, seed: int, share: float) -> None:
    """The target lies in the middle of a key, so that no rounding of the mass decides a pair."""
    basis = random_basis(O, I, seed)
    W = np.random.default_rng(seed).normal(size=(O, I))
    keys = np.sort(np.outer(basis.lam, basis.mu), axis=None)[::-1]
    k = int(share * (keys > 1e-9 * keys[0]).sum() * 0.999)
    rho = float((keys[:k].sum() + keys[k] / 2) / keys.sum())
    stairs = cut(basis.lam, basis.mu, rho)
    turned = Eigenbasis(basis.U_G, basis.lam, basis.U_A, basis.mu)
    other = cut(turned.lam, turned.mu, rho)
    assert stairs.kept == other.kept == k + 1
    got = project(W.T, turned, other.counts).T
    assert_within(got, project(W, basis, stairs.counts), tolerance.gamma(64, float), W, "W")


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0.01, 0.99))
def test_O59_signs_of_eigenvectors_do_not_matter(O: int, I: int, seed: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    basis = random_basis(O, I, seed)
    W = rng.normal(size=(O, I))
    counts = cut(basis.lam, basis.mu, rho).counts
    flipped = Eigenbasis(
        basis.U_A * rng.choice([-1, 1], I), basis.mu, basis.U_G * rng.choice([-1, 1], O), basis.lam
    )
    assert (project(W, flipped, counts) == project(W, basis, counts)).all()


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


@pytest.mark.parametrize(("apart", "count"), [(0.0, 2), (1e-15, 2), (1e-12, 0)])
def test_an_edit_counts_the_pairs_that_another_program_may_decide(
    made: tuple[rc.Model, Bases], apart: float, count: int
) -> None:
    """Two sharpest directions, equal but for so much: the cut keeps one of them."""
    model, basis = made
    one = basis[UP]
    lam, mu = (np.zeros(len(x)) for x in (one.lam, one.mu))
    lam[0], mu[:2] = 1, (1, 1 - apart)
    record = rc.edit(model, Bases({UP: Eigenbasis(one.U_A, mu, one.U_G, lam)}), 0.4)[1]
    assert (record.layers[0].kept, record.layers[0].acceptable) == (1, count)


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
    forth, _ = rc.edit(rc.edit(model, basis, one)[0], basis, two, force=True)
    back, _ = rc.edit(rc.edit(model, basis, two)[0], basis, one, force=True)
    both, _ = rc.edit(model, basis, one | two)
    for name in model.parameters:
        first = forth.parameters[name].tobytes()
        assert first == back.parameters[name].tobytes() == both.parameters[name].tobytes()


def test_O65_edited_weights_have_the_dtype_of_their_source(made: tuple[rc.Model, Bases]) -> None:
    """bfloat16 sources are edited in float64, rounded once to nearest, 8 significant bits."""
    model, basis = made
    name = "blocks.0.mlp.up.weight"
    short = rc.Model(model.config, model.parameters, "float64", {name: "bfloat16"})
    got = rc.edit(short, basis, {"blocks.0.mlp.up": 0.6}, force=True)[0].parameters[name]
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


# ------------------------------------------------------------------ which weights, and what before


def of_file(model: rc.Model, path: Path, stored: str = "float32") -> rc.Model:
    """The model's weights in a file of that dtype, read again."""
    short = dict.fromkeys(model.parameters, stored)
    rc.save(rc.Model(model.config, model.parameters, "float64", short), path)
    return rc.load(path)


@pytest.mark.slow
def test_a_basis_of_another_model_is_refused(tmp_path: Path) -> None:
    """By everyone who takes a basis (or scores) and a model; `force` means it, and is recorded."""
    one = case(batch=4, length=12)
    model, other = (of_file(model_of(case(seed)), tmp_path / f"{seed}.h5") for seed in (0, 1))
    rc.save_factors(rc.collect(model, corpus_of(one), UP), tmp_path / "f.h5")
    rc.save_bases(rc.decompose(rc.load_factors(tmp_path / "f.h5")), tmp_path / "b.h5")
    basis = rc.load_bases(tmp_path / "b.h5")
    assert basis.weights == digest(model) == rc.load_factors(tmp_path / "f.h5").weights
    decompose_to(rc.load_factors(tmp_path / "f.h5"), tmp_path / "b2.h5")
    assert rc.load_bases(tmp_path / "b2.h5").weights == basis.weights
    tokens, prompt = one.token, np.full(4, 3)
    hot, cold = (
        Population(tokens, prompt, prompt + 4, kind, "test") for kind in ("recite", "text")
    )
    scores = rc.train_scores(model, UP, hot, corpus_of(one), ratio=0.2, steps=1)
    takers = {
        "edit": lambda x, **k: rc.edit(x, basis, 0.5, **k),
        "random_pairs": lambda x, **k: rc.random_pairs(x, basis, 0.5, 0, **k),
        **{kind: lambda x, kind=kind, **k: control(x, basis, 0.5, kind, **k) for kind in CONTROLS},
        "bands": lambda x, **k: bands(x, basis, hot, cold, **k),
        "svd bands": lambda x, **k: bands(
            x, rc.singular_bases(model, UP), hot, cold, quantity="input_rank", **k
        ),
        "prune": lambda x, **k: rc.prune(x, scores, **k),
    }
    same = [model, rc.load(tmp_path / "0.h5", "float32"),
            rc.Model(model.config, dict(model.parameters), "float64", model.stored)]  # fmt: skip
    for who, take in takers.items():
        for mine in same:
            take(mine)
        with pytest.raises(ConventionError) as caught:
            take(other)
        says = str(caught.value)
        assert f"made from weights {basis.weights[:12]}, but the model" in says, who
        assert f"1.h5' has {digest(other)[:12]}. Make it anew" in says
        assert ("b.h5" in says) == (who not in ("svd bands", "prune"))
        assert "\n" not in says
        found = take(other, force=True)
        if "bands" not in who:
            edited, record = found
            start = record.start
            assert (start.forced, start.made_for, start.weights) == (
                True, basis.weights, digest(other)
            )  # fmt: skip
            rc.save(edited, tmp_path / "e.h5")
            (told,) = rc.load(tmp_path / "e.h5").source["provenance"]["edits"]
            assert (told["forced"], told["made_for"]) == (True, basis.weights)


def test_a_basis_that_does_not_say_is_taken_and_the_record_says_so(
    made: tuple[rc.Model, Bases], tmp_path: Path
) -> None:
    model, basis = made
    rc.save_bases(basis, tmp_path / "b.h5")
    with opened_for_lies(tmp_path / "b.h5") as file:
        del file.attrs["weights"]
    older = rc.load_bases(tmp_path / "b.h5")
    assert older.weights is None
    start = rc.edit(model, older, {UP: 0.5})[1].start
    assert (start.weights, start.made_for, start.forced) == (digest(model), None, False)
    for wrong in ("", "x" * 64, 3):
        with opened_for_lies(tmp_path / "b.h5") as file:
            file.attrs["weights"] = np.bytes_(wrong) if isinstance(wrong, str) else wrong
        with pytest.raises(SchemaError, match="attribute 'weights' must be 64 hexadecimal digits"):
            rc.load_bases(tmp_path / "b.h5")


@pytest.mark.parametrize("in_a_file", [False, True])
def test_an_edit_of_edited_weights_says_what_it_starts_from(
    made: tuple[rc.Model, Bases], in_a_file: bool, tmp_path: Path
) -> None:
    """The chain: digests link, methods, shares and layers are there, norms are of the original."""
    model, basis = made
    first = model

    def pause(edited: rc.Model) -> rc.Model:
        if not in_a_file:
            return edited
        rc.save(edited, tmp_path / "e.h5")
        return rc.load(tmp_path / "e.h5")

    gate, down = "blocks.0.mlp.gate", "blocks.1.mlp.down"
    steps = [
        lambda x: rc.edit(x, basis, {UP: 0.6, gate: 0.7}),
        lambda x: rc.truncate(x, {UP: 0.5}),
        lambda x: rc.edit(x, basis, {UP: 1}, force=True),
        lambda x: rc.random_pairs(x, basis, {UP: 0.9, down: 0.9}, 3, force=True),
    ]
    for n, step in enumerate(steps):
        edited, record = step(model)
        assert record.start.earlier == model.edits
        assert record.start.weights == digest(model)
        assert len(model.edits) == min(n, 2)  # what keeps W itself is no edit
        for row in record.layers:
            old, start, new = (x.parameters[f"{row.layer}.weight"] for x in (first, model, edited))
            assert row.norm == pytest.approx(np.linalg.norm(new) / np.linalg.norm(start), rel=1e-13)
            whole = np.linalg.norm(new) / np.linalg.norm(old)
            assert row.norm_original == pytest.approx(whole, rel=1e-13)
        if n != 2:
            told = edited.edits[-1]
            assert (told["weights"], told["became"]) == (digest(model), digest(edited))
            assert told["method"] == record.layers[0].method
            assert {k: v["rho"] for k, v in told["layers"].items()} == {
                row.layer: row.rho for row in record.layers
            }
        model = pause(edited)
    assert [edit["method"] for edit in model.edits] == ["kfac", "svd", "random pairs"]
    assert [edit["forced"] for edit in model.edits] == [False, False, True]
    moved = {f"{gate}.weight": model.parameters[f"{gate}.weight"] * 2}
    _, record = rc.truncate(model.with_parameters(moved), {UP: 0.9})
    assert math.isnan(record.layers[0].norm_original)  # they were changed otherwise, too
    assert record.to_json()[0]["norm_original"] is None


def test_norms_of_weight_and_of_weight_and_bias_are_not_multiplied() -> None:
    one = biased()
    model = model_of(one)
    factors = rc.collect(model, corpus_of(one), f"{UP},blocks.0.mlp.gate")
    joint, separate = rc.decompose(factors, "joint"), rc.decompose(factors)
    for bases, known in ((joint, True), (separate, False)):
        edited, _ = rc.edit(model, joint, 0.8)
        _, record = rc.edit(edited, bases, 0.6, force=True)
        found = {row.layer: not math.isnan(row.norm_original) for row in record.layers}
        assert found == {UP: known, "blocks.0.mlp.gate": True}  # gate has no bias


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
    with pytest.raises(RangeError, match="must be a number; got 1000"):
        rc.edit(model, basis, 10**400)
    with pytest.raises(EmptyError, match="edit: rho names no layer"):
        rc.edit(model, basis, {})
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
    short = {name: x.astype(np.float32) for name, x in model.parameters.items()}
    narrow = rc.Model(model.config, short, "float32", {"blocks.0.mlp.up.weight": "float64"})
    with pytest.raises(DTypeError, match="dtype"):
        rc.edit(narrow, basis, {"blocks.0.mlp.up": 0.5}, force=True)


@pytest.mark.parametrize("rho", [0, 0.3, 0.83, 0.999, 1])
def test_the_edit_equals_its_definition(rho: float) -> None:
    """The staircase's edit of a model, and the projection with a mask from sorting: one matrix."""
    one = case(biases=("up", "o"))
    model = model_of(one)
    for bias in Bias:
        basis = rc.decompose(rc.collect(model, corpus_of(one), "**", draws=2), bias)
        edited, _ = rc.edit(model, basis, rho)
        for name in basis:
            W = joined(matrix_parts("test", model, name, bias))
            want = projected(W, basis[name], rho)
            got = joined(matrix_parts("test", edited, name, bias))
            assert (got == want).all(), name
