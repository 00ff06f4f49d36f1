"""Truncation by singular values: two routes to W', the nearest matrix of its rank (P10)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import assert_within, case
from test_biases import biased
from test_factors import model_of

import refcurv as rc
from refcurv.algebra import svd as solver
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.evaluation.bands import bands
from refcurv.files.weights import narrow, widen
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
)
from refcurv.model.corpus import Population

UP = "blocks.1.mlp.up"  # (m, 8): tall, square or wide as the mlp is
SIZES, SEEDS, SHARES = st.integers(1, 12), st.integers(0, 999), st.floats(0.001, 0.999)


def with_weight(W: np.ndarray, layer: str = UP) -> rc.Model:
    """A model whose `layer`, up (O, 8), is W."""
    made = case(mlp_width=len(W))
    return model_of(replace(made, parameters=made.parameters | {f"{layer}.weight": W}))


def truncated(W: np.ndarray, energy: float) -> tuple[np.ndarray, rc.EditRecord]:
    edited, record = rc.truncate(with_weight(W), {UP: energy})
    return edited.parameters[f"{UP}.weight"], record


def spread(O: int, seed: int) -> np.ndarray:
    """(O, 8) with singular values 0.8^j, in random directions: no two of them are near."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (O, 8))
    k = min(O, 8)
    return (U[:, :k] * 0.8 ** np.arange(k)) @ V[:, :k].T


@given(SIZES, SEEDS, SHARES)
def test_truncation_is_the_projection_by_the_eigenvectors_of_its_gram(
    O: int, seed: int, energy: float
) -> None:
    """W' = W V_k V_kᵀ, V and σ² from WᵀW; the cut and the record by adding up one by one."""
    W = spread(O, seed)
    square, V = (x[..., ::-1] for x in np.linalg.eigh(W.T @ W))
    mass = np.cumsum(square) / square.sum()
    assume(np.abs(mass - energy).min() > 1e-9)
    k = int(np.flatnonzero(mass >= energy)[0]) + 1
    got, record = truncated(W, energy)
    # Davis-Kahan: an error of the solver's budget turns the kept space by that over its gap
    small = square[k] if k < len(square) else 0.0
    budget = 2 * tolerance.eigenpair(8) * square[0] / (square[k - 1] - small)
    assert_within(got, W @ V[:, :k] @ V[:, :k].T, budget, W, "W V Vᵀ")
    (one,) = record.layers
    assert (one.method, one.layer, one.rho) == ("svd", UP, energy)
    assert (one.pairs, one.kept) == (min(O, 8), k)
    assert one.mass == pytest.approx(mass[k - 1], rel=1e-13)
    assert one.norm == pytest.approx(np.sqrt(mass[k - 1]), rel=1e-13)
    if k < one.pairs:
        assert one.gap == pytest.approx(1 - 0.8**2, rel=1e-10)
    else:
        assert np.isnan(one.gap)
    assert one.acceptable == 0  # no share within 1e-9 of the cut, no singular value near another


@given(SIZES, SEEDS, SHARES)
def test_the_error_is_the_tail_and_no_matrix_of_that_rank_is_nearer(
    O: int, seed: int, energy: float
) -> None:
    """Eckart and Young: ‖W − W'‖² = Σ_{j>=k} σ_j²; moves within the matrices of rank k lose."""
    W = spread(O, seed)
    got, record = truncated(W, energy)
    k = record.layers[0].kept
    tail = np.linalg.eigvalsh(W @ W.T)[::-1][k:]
    error = np.linalg.norm(W - got)
    budget = tolerance.eigenpair(12) * np.linalg.norm(W) ** 2
    assert abs(error**2 - tail.sum()) <= budget
    assert np.linalg.matrix_rank(got, 1e-12) == k
    rng = np.random.default_rng(seed)
    for size in (1e-4, 1e-2, 1.0):
        R, S = rng.normal(size=(O, O)), rng.normal(size=(8, 8))
        other = (np.eye(O) + size * R) @ got @ (np.eye(8) + size * S)
        assert np.linalg.norm(W - other) ** 2 >= error**2 - budget


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8), SEEDS, st.floats(0, 1))
def test_the_cut_equals_brute_force(sigma: list[int], seed: int, energy: float) -> None:
    """Whole singular values, some of them equal or 0, in permuted places: exact shares."""
    assume(any(sigma))
    rng = np.random.default_rng(seed)
    W = np.zeros((len(sigma), 8))
    W[np.arange(len(sigma)), rng.permutation(8)[: len(sigma)]] = sigma
    squares = sorted((Fraction(s) ** 2 for s in sigma), reverse=True)
    sums = [sum(squares[:k]) / sum(squares) for k in range(len(squares) + 1)]
    assume(energy in (0, 1) or min(abs(float(s) - energy) for s in sums) > 1e-12)
    k = len(sigma) if energy == 1 else next(k for k, s in enumerate(sums) if s >= energy)
    assert truncated(W, energy)[1].layers[0].kept == k


def test_equal_singular_values_at_the_cut_are_counted() -> None:
    W = np.diag([3.0, 2, 2, 2, 1, 0, 0, 0])
    got, record = truncated(W, 0.7)  # 9 + 4 + 4 of 22
    assert (record.layers[0].kept, record.layers[0].acceptable) == (3, 3)
    assert record.layers[0].gap == 0
    assert record.layers[0].mass == pytest.approx(17 / 22, rel=1e-15)
    assert np.linalg.matrix_rank(got) == 3


def test_what_another_solver_may_drop_is_counted_and_nothing_else() -> None:
    """Singular values as near as two solvers' errors, or a share that one of them may miss."""
    e = tolerance.eigenvalues(8) * np.sqrt(2.1)
    for distance, near in ((0.0, True), (1.3 * e, True), (5 * e, False)):
        sigma = [1.0, 1 - distance, 0.3, 0.1, 0, 0, 0, 0]
        assert truncated(np.diag(sigma), 0.4)[1].layers[0].acceptable == 2 * near
    squares = np.array([1.0, 0.25, 0.04])
    W = np.diag([*np.sqrt(squares), 0, 0, 0, 0, 0])
    for below, near in ((1e-14, True), (5e-13, False)):
        share = 1.25 / 1.29
        # a solver that finds a little less than the target keeps the next one, too
        assert truncated(W, share - below)[1].layers[0].acceptable == near
        # one that finds a little more does not need the last one
        assert truncated(W, share + below)[1].layers[0].acceptable == near


@given(SIZES, SEEDS, SHARES)
def test_twice_to_one_rank_is_once(O: int, seed: int, energy: float) -> None:
    once, record = truncated(spread(O, seed), energy)
    k = record.layers[0].kept
    least = 0.8 ** (2 * (k - 1)) / (0.8 ** (2 * np.arange(k))).sum()
    twice, again = truncated(once, 1 - least / 2)
    assert again.layers[0].kept == k
    assert_within(twice, once, tolerance.eigenpair(12), once, "twice is once")


def test_the_same_share_of_what_is_left_cuts_again() -> None:
    """The share is of the weight's own Σ σ²: so truncation is not the projection of a mask."""
    once, first = truncated(spread(8, 0), 0.7)
    _, second = truncated(once, 0.7)
    assert (first.layers[0].kept, second.layers[0].kept) == (3, 2)


@given(SIZES, SEEDS, SHARES)
def test_rotations_pass_through(O: int, seed: int, energy: float) -> None:
    """W → Q W P gives W' → Q W' P for orthogonal Q and P."""
    rng = np.random.default_rng(seed + 1)
    Q, P = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (O, 8))
    W = spread(O, seed)
    plain, record = truncated(W, energy)
    assume(abs(record.layers[0].mass - energy) > 1e-9)
    turned, _ = truncated(Q @ W @ P, energy)
    budget = 4 * tolerance.eigenpair(12) / (0.2 * 0.8 ** (record.layers[0].kept - 1))
    assert_within(turned, Q @ plain @ P, budget, W, "Q W' P")


def test_only_the_named_weights_change_and_in_their_own_dtype() -> None:
    one = biased()
    short = {"blocks.0.mlp.up.weight": "bfloat16"}
    model = rc.Model(one.config, one.parameters, "float64", short)
    layers = {"blocks.0.mlp.{up,gate}": 0.6, "blocks.1.mlp.up": 1, "blocks.1.mlp.down": 0}
    edited, record = rc.truncate(model, layers)
    assert [x.layer for x in record.layers] == [
        "blocks.0.mlp.gate", "blocks.0.mlp.up", "blocks.1.mlp.up", "blocks.1.mlp.down"
    ]  # fmt: skip
    changed = {n for n in one.parameters if edited.parameters[n] is not model.parameters[n]}
    # share 1 keeps W itself, and no bias is touched
    assert changed == {f"blocks.0.mlp.{k}.weight" for k in ("gate", "up")} | {
        "blocks.1.mlp.down.weight"
    }
    assert not edited.parameters["blocks.1.mlp.down.weight"].any()
    assert [x.norm for x in record.layers][2:] == [1, 0]
    assert [x.kept for x in record.layers][2:] == [5, 0]
    exact = rc.truncate(rc.Model(one.config, one.parameters), layers)[0]
    name = "blocks.0.mlp.up.weight"
    got, want = edited.parameters[name], exact.parameters[name]
    assert (got.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()
    assert (np.abs(got - want) <= 2.0**-8 * np.abs(want)).all()
    assert np.abs(got - want).max() > 0


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("O", [3, 8, 11])
def test_what_rounding_restores_is_the_brute_force(O: int, stored: str) -> None:
    """Along each dropped u vᵀ: the rounding's coefficient, over those of W."""
    W = narrow(spread(O, 4), stored)
    W = widen(W, stored, "float64")
    model = replace(with_weight(W), stored={f"{UP}.weight": stored})
    edited, record = rc.truncate(model, {UP: 0.6})
    exact, _ = rc.truncate(with_weight(W), {UP: 0.6})
    new, whole = (x.parameters[f"{UP}.weight"] for x in (edited, exact))
    U, sigma, Vt = np.linalg.svd(W)
    back = sum(
        (U[:, j] @ (new - whole) @ Vt[j]) ** 2 for j in range(record.layers[0].kept, len(sigma))
    )
    cut = np.linalg.norm(sigma[record.layers[0].kept :])
    assert record.layers[0].restored == pytest.approx(np.sqrt(back) / cut, rel=1e-6, abs=0)
    assert (record.layers[0].restored == 0) == (stored == "float64")
    assert rc.truncate(model, {UP: 1})[1].layers[0].restored == 0


# ------------------------------------------------------------------ singular vectors as a basis


@pytest.mark.parametrize("O", [3, 8, 11])
def test_singular_bases_are_eigenbases_of_the_two_grams(O: int) -> None:
    W = spread(O, 1)
    basis = rc.singular_bases(with_weight(W), UP)
    assert (basis.method, list(basis)) == ("svd", [UP])
    one = basis[UP]
    for M, U, values in ((W.T @ W, one.U_A, one.mu), (W @ W.T, one.U_G, one.lam)):
        n = len(M)
        budget = tolerance.eigenpair(n)
        assert_within(M @ U, U * values, budget, M, "residual")
        assert_within(U.T @ U, np.eye(n), budget, np.eye(n), "orthogonal")
        assert (np.diff(values) <= 0).all()
        assert values[min(O, 8) :].tolist() == [0] * (n - min(O, 8))
        largest = np.abs(U).argmax(axis=0)
        assert (U[largest, np.arange(n)] > 0).all()


def test_bands_over_right_singular_vectors() -> None:
    """P10: `bands` takes them as they are; the second route is the eigenbasis of WᵀW."""
    W = spread(11, 3)
    model = with_weight(W)
    rng = np.random.default_rng(0)
    hot, cold = (
        Population(rng.integers(0, 7, (6, 8)), np.full(6, 3), np.full(6, 7), kind, "test")
        for kind in ("recite", "text")
    )
    U, values, _ = eigenbasis(W.T @ W, 11, "float64", "WᵀW")
    gram = {UP: Eigenbasis(U, values, np.eye(11), np.ones(11))}
    got, want = (
        bands(model, basis, hot, cold, quantity="input_rank")[UP]
        for basis in (rc.singular_bases(model, UP), gram)
    )
    assert got.sizes == want.sizes == (1, 1, 2, 4)
    # each basis turns by the solver's budget over the least gap, 0.8^12 − 0.8^14 of σ_0²
    budget = 4 * tolerance.eigenpair(11) / (0.8**12 - 0.8**14)
    for which in ("memorised", "clean"):
        assert_within(
            getattr(got, which), getattr(want, which), budget, getattr(want, which), which
        )


# ------------------------------------------------------------------ refusals


def test_refusals() -> None:
    model = with_weight(spread(5, 0))
    with pytest.raises(RangeError, match=r"truncate: energy of '.*up' must lie in \[0, 1\]; got 2"):
        rc.truncate(model, {UP: 2})
    with pytest.raises(RangeError, match=r"energy of '.*up' must lie in .*; got nan"):
        rc.truncate(model, {UP: float("nan")})
    with pytest.raises(RangeError, match="must be a number; got 'much'"):
        rc.truncate(model, {UP: "much"})
    with pytest.raises(NameUnknownError, match=r"'blocks.9.mlp.up' matches none"):
        rc.truncate(model, {"blocks.9.mlp.up": 0.5})
    with pytest.raises(NameUnknownError, match=r"'embed' matches none"):
        rc.truncate(model, {"embed": 0.5})
    with pytest.raises(ConventionError, match=r"'blocks.1.mlp.up' is matched by two patterns"):
        rc.truncate(model, {UP: 0.5, "**.up": 0.5})
    with pytest.raises(ConventionError, match="energy must name its layers, PATTERN=SHARE"):
        rc.truncate(model, 0.7)
    with pytest.raises(EmptyError, match=r"up\.weight is all zeros; leave 'blocks.1.mlp.up' out"):
        rc.truncate(with_weight(np.zeros((5, 8))), {UP: 0.5})
    broken = with_weight(np.full((5, 8), np.nan))
    with pytest.raises(NonFiniteError, match=r"truncate: blocks.1.mlp.up.weight holds nan"):
        rc.truncate(broken, {UP: 0.5})
    with pytest.raises(NonFiniteError, match=r"singular_bases: blocks.1.mlp.up.weight holds nan"):
        rc.singular_bases(broken, UP)
    with pytest.raises(NameUnknownError, match="matches none"):
        rc.singular_bases(model, "up")
    rounding = rc.Model(
        model.config,
        {n: x.astype(np.float32) for n, x in model.parameters.items()},
        "float32",
        {f"{UP}.weight": "float64"},
    )
    with pytest.raises(
        DTypeError, match=r"truncate: .* stored in float64 but .* loaded as float32"
    ):
        rc.truncate(rounding, {UP: 0.5})
    tied = model_of(case(tied=True))
    with pytest.raises(ConventionError, match="truncate: the head is tied to the embedding"):
        rc.truncate(tied, {"**": 0.5})


@pytest.mark.parametrize("full", [False, True])
def test_numpys_route_for_large_matrices_agrees(full: bool, monkeypatch) -> None:
    """Where SciPy's integers are too short: σ within the budget, and the same shapes."""
    W = np.random.default_rng(0).normal(size=(5, 3))
    ours = solver.svd(W, full=full)
    monkeypatch.setattr(solver, "MOST_INT", 10)
    monkeypatch.setattr(solver.scipy.linalg, "svd", None)
    U, sigma, Vt = solver.svd(W, full=full)
    assert [x.shape for x in (U, sigma, Vt)] == [x.shape for x in ours]
    assert_within(sigma, ours[1], tolerance.eigenvalues(5), ours[1], "σ")
    assert_within(U[:, :3] * sigma @ Vt, W, tolerance.eigenpair(5), W, "W")
