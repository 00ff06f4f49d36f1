"""Bands: they tile the weight, the norms are the definition's, and position is held equal."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, random_parameters

from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.evaluation import decode
from refcurv.evaluation.bands import (
    MASS_EDGES,
    RANK_PERCENT,
    Quantity,
    band_weights,
    bands,
    mass_bounds,
    rank_bounds,
)
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    NameUnknownError,
    RangeError,
    ShapeError,
)
from refcurv.model import transformer
from refcurv.model.corpus import Population
from refcurv.model.layers import DEFINITIONS, causal_layout
from refcurv.model.weights import Model

LAYERS = ("blocks.0.attn.q", "blocks.1.attn.o", "blocks.0.mlp.up", "blocks.1.mlp.down", "head")


def random_basis(O: int, I: int, seed: int, spread: float = 2.0) -> Eigenbasis:
    rng = np.random.default_rng(seed)
    U_A, U_G = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (I, O))
    mu, lam = (np.sort(np.exp(spread * rng.normal(size=n)))[::-1] for n in (I, O))
    return Eigenbasis(U_A, mu, U_G, lam)


def small_model(seed: int = 0, dtype: str = "float64") -> Model:
    made = config(vocabulary=9)
    parameters = {n: x.astype(dtype) for n, x in random_parameters(made, seed).items()}
    return Model(made, parameters, dtype=dtype)


def bases(model: Model) -> dict[str, Eigenbasis]:
    shapes = model.config.linear_layers()
    return {name: random_basis(*shapes[name], seed=n) for n, name in enumerate(LAYERS)}


def population(rng, prompt, length, kind="recite", width=8) -> Population:
    tokens = rng.integers(0, 9, (len(prompt), width))
    return Population(tokens, np.array(prompt), np.array(length), kind, "test")


# ------------------------------------------------------------------ the bands themselves


def mask_by_definition(basis: Eigenbasis) -> np.ndarray:
    """(bands, O, I): each pair's band, by sorting all products and adding them up."""
    pairs = sorted(
        ((lam * mu, -i, -j) for i, lam in enumerate(basis.lam) for j, mu in enumerate(basis.mu)),
        reverse=True,
    )
    total = math.fsum(p for p, _, _ in pairs)
    mask = np.zeros((len(MASS_EDGES) - 1, len(basis.lam), len(basis.mu)))
    taken: list[float] = []
    for n, (product, i, j) in enumerate(pairs):
        before = math.fsum(taken)
        # the pair belongs to the first edge that the pairs before it do not reach
        band = next(
            b for b, edge in enumerate(MASS_EDGES[1:]) if before < edge * total or edge == 1
        )
        assert n or band == 0
        mask[band, -i, -j] = 1
        taken.append(product)
    return mask


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.sampled_from([0.3, 2.0]))
def test_band_weights_sum_to_the_weight(O, I, seed, spread):
    basis = random_basis(O, I, seed, spread)
    W = np.random.default_rng(seed).normal(size=(O, I))
    parts = band_weights(W, basis)
    assert len(parts) == len(MASS_EDGES) - 1
    np.testing.assert_allclose(sum(parts), W, atol=1e-13)
    mask = mask_by_definition(basis)
    assert (mask.sum(axis=0) == 1).all()
    C = basis.U_G.T @ W @ basis.U_A
    for part, M in zip(parts, mask, strict=True):
        np.testing.assert_allclose(part, basis.U_G @ (C * M) @ basis.U_A.T, atol=1e-13)


def test_two_by_two_by_hand():
    """λ = (3, 1), μ = (4, 1): masses 12, 3, 4, 1 of 20 at (0,0), (0,1), (1,0), (1,1).

    In order 12, 4, 3, 1, cumulative .6, .8, .95, 1. (0,0) begins at 0 and reaches .6: band 0,
    bands 1 and 2 are empty. (1,0) begins at .6: band 3, to .8. (0,1) begins at .8: band 4, and
    reaches .95. (1,1) begins at .95: band 5, below .99. Band 6 is empty.
    """
    basis = Eigenbasis(np.eye(2), np.array([4.0, 1.0]), np.eye(2), np.array([3.0, 1.0]))
    W = np.array([[1.0, 2.0], [3.0, 4.0]])
    parts = band_weights(W, basis)
    want = np.zeros((7, 2, 2))
    want[0, 0, 0], want[3, 1, 0], want[4, 0, 1], want[5, 1, 1] = 1, 3, 2, 4
    np.testing.assert_array_equal(np.stack(parts), want)
    np.testing.assert_array_equal(mass_bounds(basis)[:, 0], [0, 1, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(mass_bounds(basis)[:, 1], [0, 0, 0, 0, 1, 1, 2, 2])


@given(st.integers(1, 400))
def test_rank_bounds(size):
    bounds = rank_bounds(size)
    assert bounds[0] == 0
    assert bounds[1] >= 1
    assert bounds[-1] == size
    for percent, bound in zip(RANK_PERCENT, bounds, strict=True):
        assert percent * size <= 100 * bound < percent * size + 100
    assert rank_bounds(40).tolist() == [0, 4, 10, 20, 40]
    assert rank_bounds(3).tolist() == [0, 1, 1, 2, 3]


# ------------------------------------------------------------------ what tokens do


def inputs_by_definition(model: Model, one: Population, columns=None):
    """Layer → (N, I): every row alone, on the definitions, suffix positions only."""
    out: dict[str, list[np.ndarray]] = {name: [] for name in LAYERS}
    for row, prompt, length in zip(one.tokens, one.prompt_length, one.length, strict=True):
        ones = np.ones((1, length), dtype=bool)
        layout = causal_layout(ones, np.zeros((1, length), dtype=int))
        final, trace = transformer.forward(
            model.config, model.parameters, row[None, :length], layout, DEFINITIONS
        )
        a, b = trace.blocks
        x = (
            a.attn.a,
            b.attn.context,
            a.mlp.a,
            transformer.hidden_of(model.config, b.mlp, DEFINITIONS),
            final,
        )
        seen = dict(zip(LAYERS, x, strict=True))
        for t in range(prompt - 1, length - 1):
            if columns is None or t in columns:
                for name in LAYERS:
                    out[name].append(seen[name][0, t])
    return {name: np.array(x) for name, x in out.items()}


@pytest.mark.parametrize("quantity", list(Quantity))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_are_the_definition(rng, quantity, dtype):
    """‖W_b x‖ and ‖P_b x‖ written out, rows of unequal prompts and lengths, small batches."""
    model = small_model(dtype=dtype)
    basis = bases(model)
    hot = population(rng, [3, 4, 3, 4, 3], [6, 7, 5, 5, 6])
    cold = population(rng, [1, 1, 2], [8, 4, 8], "text")
    with mock.patch.object(decode, "shard_sequences", lambda width: 2):
        got = bands(model, basis, hot, cold, quantity=quantity)
    assert list(got) == list(LAYERS)
    x_hot = inputs_by_definition(model, hot)
    x_cold = inputs_by_definition(model, cold, columns=range(2, 6))  # hot scores columns 2 .. 5
    for name, found in got.items():
        W = model.parameters[model.config.weight_of(name)].astype(np.float64)
        if quantity is Quantity.PAIR_MASS:
            maps = band_weights(W, basis[name])
        else:
            cut = rank_bounds(W.shape[1])
            U = basis[name].U_A
            maps = [U[:, a:b] @ U[:, a:b].T for a, b in pairwise(cut)]
        assert found.aligned
        assert len(found.edges) == len(found.sizes) + 1 == len(maps) + 1
        assert sum(found.sizes) == (W.size if quantity is Quantity.PAIR_MASS else W.shape[1])
        for b, M in enumerate(maps):
            m = np.mean([np.linalg.norm(M @ x) for x in x_hot[name].astype(np.float64)])
            c = np.mean([np.linalg.norm(M @ x) for x in x_cold[name].astype(np.float64)])
            rel = 1e-4 if dtype == "float32" else 1e-11
            assert found.memorised[b] == pytest.approx(m, rel=rel, abs=1e-12)
            assert found.clean[b] == pytest.approx(c, rel=rel, abs=1e-12)
            if found.sizes[b]:
                assert found.ratio[b] == pytest.approx(m / c, rel=2 * rel)
            else:
                assert math.isnan(found.ratio[b])


@pytest.mark.parametrize("quantity", list(Quantity))
def test_a_joint_basis_has_the_bands_of_weight_and_bias(rng, quantity):
    """[W b] and [x; 1] in the place of W and x."""
    made = config(vocabulary=9, biases=("up",))
    model, name = Model(made, random_parameters(made, 3)), "blocks.0.mlp.up"
    W_b = np.column_stack([model.parameters[f"{name}.{part}"] for part in ("weight", "bias")])
    basis = random_basis(*W_b.shape, seed=1)
    hot, cold = population(rng, [3, 4], [6, 7]), population(rng, [1, 2], [8, 8], "text")
    found = bands(model, {name: basis}, hot, cold, quantity=quantity)[name]
    x = np.array([[*v, 1.0] for v in inputs_by_definition(model, hot)[name]])
    U, rank = basis.U_A, rank_bounds(W_b.shape[1])
    maps = band_weights(W_b, basis)
    if quantity is Quantity.INPUT_RANK:
        maps = [U[:, a:b] @ U[:, a:b].T for a, b in pairwise(rank)]
    want = [np.mean([np.linalg.norm(M @ v) for v in x]) for M in maps]
    assert found.memorised == pytest.approx(want, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("quantity", ["pair_mass", "input_rank"])
def test_identical_populations(rng, quantity):
    """The same tokens as memorised and as clean: every ratio is 1, but for roundings.

    The last token of a passage is only said, that of a text is read.
    """
    model = small_model()
    hot = population(rng, [2, 3, 2], [6, 8, 4])
    cold = Population(hot.tokens, hot.prompt_length, hot.length, "text", "test")
    for found in bands(model, bases(model), hot, cold, quantity=quantity).values():
        for size, ratio in zip(found.sizes, found.ratio, strict=True):
            assert abs(ratio - 1) < 1e-12 if size else math.isnan(ratio)


def test_position_is_held_equal_where_possible(rng):
    """Clean tokens come from the memorised columns; without any there, from everywhere."""
    model = small_model()
    hot = population(rng, [4, 5], [7, 7])  # columns 3 .. 5
    cold = population(rng, [1], [8], "text")
    cut = Population(cold.tokens, [4], [7], "text", "test")  # the same sequence, columns 3 .. 5
    early = Population(cold.tokens, [1], [4], "text", "test")  # columns 0 .. 2
    basis = {"blocks.0.mlp.up": bases(model)["blocks.0.mlp.up"]}
    found = [bands(model, basis, hot, c)["blocks.0.mlp.up"] for c in (cold, cut, early)]
    assert [f.aligned for f in found] == [True, True, False]
    assert found[0].clean == pytest.approx(found[1].clean, rel=1e-12)
    x = inputs_by_definition(model, early)["blocks.0.mlp.up"]
    assert len(x) == 3
    parts = band_weights(model.parameters["blocks.0.mlp.up.weight"], basis["blocks.0.mlp.up"])
    want = [np.mean([np.linalg.norm(M @ v) for v in x]) for M in parts]
    assert found[2].clean == pytest.approx(want, rel=1e-11)


def test_layers_progress_and_json(rng):
    model = small_model()
    hot, cold = population(rng, [2, 3], [6, 8]), population(rng, [1], [8], "text")
    seen = []
    got = bands(
        model, bases(model), hot, cold, layers="blocks.*.mlp.*", progress=lambda *a: seen.append(a)
    )
    assert list(got) == ["blocks.0.mlp.up", "blocks.1.mlp.down"]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    data = json.loads(json.dumps(got["blocks.0.mlp.up"].to_json(), allow_nan=False))
    assert data["quantity"] == "pair_mass"
    assert data["edges"] == list(MASS_EDGES)
    assert len(data["ratio"]) == 7


def test_refusals(rng):
    model = small_model()
    basis = bases(model)
    hot, cold = population(rng, [2, 3], [6, 8]), population(rng, [1], [8], "text")
    silent = population(rng, [8], [8], "text")
    with pytest.raises(EmptyError, match="clean"):
        bands(model, basis, hot, silent)
    with pytest.raises(EmptyError, match="memorised"):
        bands(model, basis, silent, cold)
    with pytest.raises(ConventionError, match="quantity"):
        bands(model, basis, hot, cold, quantity="mass")
    with pytest.raises(NameUnknownError):
        bands(model, basis, hot, cold, layers="blocks.7.*")
    with pytest.raises(NameUnknownError):
        bands(model, {"blocks.9.mlp.up": basis["head"]}, hot, cold)
    with pytest.raises(ShapeError, match="another model"):
        bands(model, {"head": basis["blocks.0.mlp.up"]}, hot, cold)
    wild = Population(hot.tokens + 9, hot.prompt_length, hot.length, "recite", "test")
    with pytest.raises(RangeError, match="memorised"):
        bands(model, basis, wild, cold)
