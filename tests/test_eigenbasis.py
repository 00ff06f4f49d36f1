"""Eigenbases: residuals and orthogonality within budget, order, sign, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, random_parameters

import refcurv as rc
from refcurv.algebra import blas
from refcurv.curvature.eigenbasis import (
    Bases,
    Eigenbasis,
    decompose,
    eigenbasis,
    load_bases,
    require_basis,
    save_bases,
)
from refcurv.curvature.factors import Factor, Factors
from refcurv.evaluation.bands import bands
from refcurv.files.corpus import Population
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    NonFiniteError,
    NotPSDError,
    NotSymmetricError,
    ShapeError,
)
from refcurv.law.conventions import Fisher, Rows
from refcurv.model.config import QKNorm


def moment(
    n: int, rows: int, seed: int, decay: float = 1.0, dtype: object = np.float64
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, n)) * np.exp(-decay * np.arange(n))).astype(dtype)
    return (x.T @ x).astype(np.float64)


@given(st.integers(1, 24), st.integers(1, 40), st.integers(0, 999), st.floats(0, 2))
def test_reconstruction_orthogonality_and_order(n: int, rows: int, seed: int, decay: float) -> None:
    M = moment(n, rows, seed, decay)
    U, values, raised = eigenbasis(M, rows, "float64", "A")
    budget = tolerance.eigenpair(n)
    assert np.linalg.norm(M @ U - U * values) <= budget * np.linalg.norm(M) + 1e-300
    assert np.linalg.norm(U.T @ U - np.eye(n)) <= budget * np.sqrt(n)
    assert (np.diff(values) <= 0).all()
    assert (values >= 0).all()
    assert raised <= max(0, n - min(n, rows))  # O25: only null directions can be pushed below 0
    largest = np.abs(U).argmax(axis=0)
    assert (U[largest, np.arange(n)] > 0).all()


def test_float32_products_push_null_eigenvalues_below_zero_within_budget() -> None:
    """NEGATIVE: the share of the budget that rounding uses; observed 0.0008 (c = 4)."""
    worst = 0.0
    for seed in range(40):
        M = moment(48, 20, seed, 0.1, np.float32)
        values = np.linalg.eigvalsh(M)
        worst = max(worst, -values[0] / (values[-1] * tolerance.negative(48, 20, np.float32)))
        _, kept, raised = eigenbasis(M, 20, "float32", "A")
        assert raised > 0
        assert (kept >= 0).all()
    assert 0 < worst < 1


def test_hand_basis() -> None:
    U, values, _ = eigenbasis(np.array([[2.0, 1.0], [1.0, 2.0]]), 1, "float64", "A")
    assert np.allclose(values, [3, 1], rtol=1e-15)
    h = np.sqrt(0.5)
    assert np.allclose(U, [[h, h], [h, -h]], rtol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 40, 129])
def test_the_lapack_door_has_scipys_bits(n: int) -> None:
    M = moment(n, n + 1, 3, 0.1)
    values, U = blas.eigh(M)
    want_values, want_U = scipy.linalg.eigh(M, driver="evd")
    assert values.tobytes() == want_values.tobytes()
    assert U.tobytes() == want_U.tobytes()
    assert np.array_equal(M, moment(n, n + 1, 3, 0.1))  # the argument is left alone


def factors(seed: int = 0) -> Factors:
    A = moment(6, 30, seed)
    layers = {
        "blocks.0.mlp.gate": Factor(A, 30, moment(4, 30, seed + 1), 30),
        "blocks.0.mlp.up": Factor(A.copy(), 30, moment(4, 30, seed + 2), 30),
    }
    return Factors(layers, Fisher.EMPIRICAL, Rows.REACHED, 0, 1, "float64", 30)


def test_decompose_divides_by_the_counts_and_shares_equal_inputs() -> None:
    made = factors()
    basis = decompose(made)
    gate, up = basis["blocks.0.mlp.gate"], basis["blocks.0.mlp.up"]
    assert gate.U_A is up.U_A
    assert not np.array_equal(gate.U_G, up.U_G)
    A = made["blocks.0.mlp.up"].A
    assert np.allclose(up.U_A * up.mu @ up.U_A.T, A, rtol=0, atol=1e-14 * np.abs(A).max())
    assert np.isclose(up.mu.sum(), np.trace(A), rtol=1e-14)


def test_basis_file_round_trip(tmp_path) -> None:
    basis = decompose(factors())
    save_bases(basis, tmp_path / "b.h5")
    back = load_bases(tmp_path / "b.h5")
    assert list(back) == list(basis)
    for name, one in basis.items():
        for part in ("U_A", "mu", "U_G", "lam"):
            assert getattr(back[name], part).tobytes() == getattr(one, part).tobytes()
        assert (back[name].raised_A, back[name].raised_G) == (one.raised_A, one.raised_G)


@pytest.mark.parametrize(
    ("M", "error", "says"),
    [
        (np.array([[1.0, 0.5], [0.4, 1.0]]), NotSymmetricError, "transpose"),
        (np.diag([1.0, -1e-3]), NotPSDError, "-1.000e-03"),
        (np.diag([1.0, np.nan]), NonFiniteError, r"\[1, 1\]"),
        (np.ones((2, 3)), ShapeError, r"\(2, 3\)"),
    ],
)
def test_refusals(M: np.ndarray, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        eigenbasis(M, 10, "float64", "A of 'blocks.0.mlp.up'")


def broken(one: Eigenbasis, how: str) -> Eigenbasis:
    """A basis with one fault in it."""
    U, mu, lam = one.U_A.copy(), one.mu.copy(), one.lam.copy()
    if how == "a row is missing":
        return replace(one, U_A=U[1:])
    if how == "a column is missing":
        return replace(one, U_A=U[:, 1:])
    if how == "a column is scaled":
        U[:, 2] *= 1 + 1e-9
    elif how == "a column is there twice":
        U[:, 2] = U[:, 1]
    elif how == "of float32":
        U = U.astype(np.float32).astype(np.float64)
    elif how == "NaN in U":
        U[1, 2] = np.nan
    elif how == "integers":
        return replace(one, U_A=np.eye(len(mu), dtype=int))
    elif how == "ascending":
        lam = lam[::-1].copy()
    elif how == "negative":
        lam[-1] = -lam[0]
    elif how == "infinite":
        mu[0] = np.inf
    elif how == "no vector":
        return replace(one, lam=lam[:, None])
    return replace(one, U_A=U, mu=mu, lam=lam)


FAULTS = {
    "a row is missing": (ShapeError, r"U_A of '.*gate' must be \(6, 6\) .*got \(5, 6\)"),
    "a column is missing": (ShapeError, r"U_A of '.*gate' must be \(6, 6\) .*got \(6, 5\)"),
    "a column is scaled": (ConventionError, r"U_A of '.*gate' has .*e-\d+ > .*not orthonormal"),
    "a column is there twice": (ConventionError, r"U_A of '.*gate' has .*not orthonormal"),
    "of float32": (ConventionError, r"U_A of '.*gate' has .*shorter float"),
    "NaN in U": (NonFiniteError, r"U_A of '.*gate' holds nan at \[1, 2\]"),
    "integers": (DTypeError, r"U_A of '.*gate' must hold real numbers; got int64"),
    "ascending": (ConventionError, r"lam of '.*gate' must be descending .* entry 1 is"),
    "negative": (ConventionError, r"lam of '.*gate' must be descending and >= 0 .* entry 3 is -"),
    "infinite": (NonFiniteError, r"mu of '.*gate' holds inf at \[0\]"),
    "no vector": (ShapeError, r"lam of '.*gate' must be \(any\) = \(n,\); got \(4, 1\)"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_what_is_no_basis_is_refused(how: str, tmp_path) -> None:
    """By everyone who takes one from a caller, in one line that names the layer."""
    made = config(width=6, heads=3, kv_heads=3, mlp_width=4, qk_norm=QKNorm.NONE)
    model = rc.Model(made, random_parameters(made, 0))
    name = "blocks.0.mlp.gate"
    bases = Bases({name: broken(decompose(factors())[name], how)})
    rng = np.random.default_rng(0)
    hot, cold = (
        Population(rng.integers(0, 7, (2, 8)), np.full(2, 3), np.full(2, 7), kind, "test")
        for kind in ("recite", "text")
    )
    takers = {
        "edit": lambda: rc.edit(model, bases, 0.5),
        "random_pairs": lambda: rc.random_pairs(model, bases, 0.5, 0),
        "random_basis": lambda: rc.random_basis(bases, 0),
        "one_sided": lambda: rc.one_sided(bases, "inputs"),
        "bands": lambda: bands(model, bases, hot, cold, quantity="input_rank"),
        "save_bases": lambda: save_bases(bases, tmp_path / "b.h5"),
    }
    error, says = FAULTS[how]
    for who, take in takers.items():
        with pytest.raises(error, match=f"^{who}: {says}") as caught:
            take()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 60), st.integers(0, 999), st.sampled_from(["float64", "float32"]))
def test_what_a_solver_makes_is_a_basis(n: int, seed: int, dtype: str) -> None:
    """Judged by the eps of its own dtype; ten budgets off is seen, of whatever rank."""
    rng = np.random.default_rng(seed)
    M = moment(n, n + 2, seed, 0.1)
    values, U = np.linalg.eigh(M.astype(dtype))
    lam, G = np.ones(1), np.ones((1, 1))
    one = Eigenbasis(U[:, ::-1], np.maximum(values[::-1], 0), G, lam)
    require_basis("test", "x", one)
    solver = tolerance.eigenpair(n, dtype) + 2 * tolerance.gamma(n, np.float64) * np.sqrt(n)
    off = rng.normal(size=(n, rng.integers(1, n + 1)))
    off = off @ off.T  # U (I + E/2) has UᵀU − I = E + E²/4
    E = 20 * solver * np.sqrt(n) * off / np.linalg.norm(off)
    wrong = (U.astype(np.float64) @ (np.eye(n) + E / 2)).astype(dtype)
    with pytest.raises(ConventionError, match="not orthonormal"):
        require_basis("test", "x", Eigenbasis(wrong[:, ::-1], one.mu, G, lam))


@given(st.integers(2, 12), st.integers(0, 999), st.floats(1e-9, 1e-2))
def test_O63_davis_kahan(n: int, seed: int, size: float) -> None:
    """A perturbation E turns the leading k directions by at most sin θ ≤ ‖E‖ / gap."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(0, 1, n))[::-1]
    k = int(np.argmax(values[:-1] - values[1:])) + 1  # where the gap is widest
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    A = (Q * values) @ Q.T
    A = (A + A.T) / 2
    E = rng.normal(size=(n, n))
    E = size * values[0] * (E @ E.T) / np.linalg.norm(E @ E.T, 2)
    one, two = (eigenbasis(M, 1, "float64", "A") for M in (A, A + E))
    # the k leading of A against the others of A + E: the distance that they keep is their gap
    gap = values[k - 1] - two[1][k]
    sine = np.linalg.norm(one[0][:, :k].T @ two[0][:, k:], 2)
    rounding = tolerance.eigenpair(n) * values[0]
    assert gap > 0
    assert sine <= (np.linalg.norm(E, 2) + rounding) / gap
