"""Eigenbases: residuals and orthogonality within budget, order, sign, refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, opened_for_lies, random_parameters

import refcurv as rc
from refcurv.algebra import blas
from refcurv.algebra.staircase import cut
from refcurv.curvature.bases import Bases, decompose
from refcurv.curvature.bases_file import load_bases, save_bases
from refcurv.curvature.checks import MRRR, require_basis
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.curvature.factors import Factor, Factors
from refcurv.evaluation.bands import bands
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    NotPSDError,
    NotSymmetricError,
    RangeError,
    SchemaError,
    ShapeError,
    SolverError,
)
from refcurv.law.conventions import Fisher, Rows
from refcurv.model.config import QKNorm
from refcurv.model.corpus import Population


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


@pytest.mark.parametrize("rows", [64, 2048])
def test_a_moment_in_a_shorter_float_is_no_moment(rows: int) -> None:
    """float32 in one triangle, then in both: 1e-9 below zero, where rounding explains 2e-12."""
    M = moment(48, 20, 0, 0.1)
    eigenbasis(M, rows, "float64", "A")
    short = M.astype(np.float32).astype(np.float64)
    with pytest.raises(NotSymmetricError, match="Rounding cannot explain this"):
        eigenbasis(np.tril(M) + np.triu(short, 1), rows, "float64", "A")
    with pytest.raises(NotPSDError, match="averaged in a short float"):
        eigenbasis(short, rows, "float64", "A")


def test_hand_basis() -> None:
    U, values, _ = eigenbasis(np.array([[2.0, 1.0], [1.0, 2.0]]), 1, "float64", "A")
    assert np.allclose(values, [3, 1], rtol=1e-15)
    h = np.sqrt(0.5)
    assert np.allclose(U, [[h, h], [h, -h]], rtol=1e-15)


def test_a_zero_is_not_raised() -> None:
    _, values, raised = eigenbasis(np.diag([2.0, 0.0]), 1, "float64", "A")
    assert values.tolist() == [2, 0]
    assert raised == 0


@pytest.mark.parametrize("n", [1, 2, 3, 40, 129])
def test_the_lapack_door_has_scipys_bits(n: int) -> None:
    M = moment(n, n + 1, 3, 0.1)
    values, U = blas.eigh(M)
    want_values, want_U = scipy.linalg.eigh(M, driver="evd")
    assert values.tobytes() == want_values.tobytes()
    assert U.tobytes() == want_U.tobytes()
    assert np.array_equal(M, moment(n, n + 1, 3, 0.1))  # the argument is left alone


powers = st.one_of(st.integers(-500, 500), st.sampled_from([-500, -257, 0, 257, 500]))


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 999), st.floats(0, 2), powers)
def test_powers_of_two_change_no_bit(
    n: int, rows: int, seed: int, decay: float, power: int
) -> None:
    """2^k M has the same directions and 2^k its eigenvalues, from 1e-150 to 1e150."""
    M = moment(n, rows, seed, decay)
    U, values, raised = eigenbasis(M, rows, "float64", "A")
    got_U, got_values, got_raised = eigenbasis(M * 2.0**power, rows, "float64", "A")
    assert got_U.tobytes() == U.tobytes()
    assert got_values.tobytes() == (values * 2.0**power).tobytes()
    assert got_raised == raised


@given(st.integers(0, 999), powers, powers, st.floats(0.01, 0.999))
def test_powers_of_two_keep_the_same_pairs(seed: int, a: int, b: int, rho: float) -> None:
    """What is kept does not depend on the units of A and G."""
    kept, masses = [], []
    for unit_A, unit_G in ((1.0, 1.0), (2.0**a, 2.0**b)):
        A, G = moment(6, 30, seed, 0.5) * unit_A, moment(5, 30, seed + 1, 0.5) * unit_G
        mu, lam = (eigenbasis(M, 30, "float64", "M")[1] for M in (A, G))
        stairs = cut(lam, mu, rho)
        kept.append(stairs.counts.tolist())
        masses.append(stairs.mass / (unit_A * unit_G))
        assert stairs.kept == sum(kept[-1])
    assert kept[0] == kept[1]
    assert masses[0] == masses[1]


@given(powers, st.sampled_from([0, 580, -560]))
def test_asymmetry_is_seen_at_every_scale(power: int, more: int) -> None:
    """At 1e160 and 1e-160 the squares of M are infinite or 0, and so would be |M − Mᵀ|/|M|."""
    unit = np.ldexp(1.0, power // 2 + more)  # up to 2^±830
    with pytest.raises(NotSymmetricError, match=r"= 9\.1e-02 >"):
        eigenbasis(np.array([[1.0, 0.5], [0.4, 1.0]]) * unit, 10, "float64", "A")
    with pytest.raises(NotPSDError, match="eigenvalue -"):
        eigenbasis(np.diag([1.0, -1e-3]) * unit, 10, "float64", "A")
    with pytest.raises(NotSymmetricError):  # M − Mᵀ itself overflows
        eigenbasis(np.array([[1.0, 1.7e308], [-1.7e308, 1.0]]), 10, "float64", "A")


def test_an_eigenvalue_beyond_float64_is_refused() -> None:
    with pytest.raises(RangeError, match="A of 'up' has an eigenvalue beyond the largest"):
        eigenbasis(np.full((3, 3), 1e308), 10, "float64", "A of 'up'")
    _, values, _ = eigenbasis(np.full((3, 3), 1e308) / 3, 10, "float64", "A of 'up'")
    assert values[0] == pytest.approx(1e308)


def test_subnormal_moments_are_decomposed() -> None:
    U, values, _ = eigenbasis(np.array([[2.0, 1.0], [1.0, 2.0]]) * 2.0**-1060, 1, "float64", "A")
    assert values.tolist() == [3 * 2.0**-1060, 2.0**-1060]
    assert np.allclose(np.abs(U), np.sqrt(0.5))


@given(st.integers(9, 24), st.integers(1, 40), st.integers(0, 999), st.integers(-500, 500))
def test_numpys_route_for_large_matrices_agrees(n: int, rows: int, seed: int, power: int) -> None:
    """Above 32,766, here above 8: the same values and, where they stand apart, the same columns."""
    M = moment(n, rows, seed, 0.1) * 2.0**power
    U, values, _ = eigenbasis(M, rows, "float64", "A")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "MOST_SQUARE", 8)
        patch.setattr(np.linalg, "eigh", lambda M, eigh=np.linalg.eigh: calls.append(0) or eigh(M))
        V, other, _ = eigenbasis(M, rows, "float64", "A")
    assert calls == [0]
    budget = tolerance.eigenpair(n) * values[0]
    assert (np.abs(values - other) <= budget).all()
    size, inside = values[0], M / values[0]
    assert np.linalg.norm(inside @ V - V * (other / size)) <= tolerance.eigenpair(n) * np.sqrt(n)
    assert np.linalg.norm(V.T @ V - np.eye(n)) <= tolerance.eigenpair(n) * np.sqrt(n)
    largest = np.abs(V).argmax(axis=0)
    assert (V[largest, np.arange(n)] > 0).all()
    assert V.flags.c_contiguous and (np.diff(other) <= 0).all()
    gaps = np.diff(values, prepend=np.inf, append=-np.inf)
    alone = np.minimum(-gaps[:-1], -gaps[1:]) > 1e-3 * size
    # Davis & Kahan; the entry that fixes a sign may be the other of two equally large ones
    apart = np.minimum(np.linalg.norm(U - V, axis=0), np.linalg.norm(U + V, axis=0))
    assert (apart[alone] <= 4 * tolerance.eigenpair(n) * 1e3).all()


def test_whether_numpys_lapack_counts_in_64_bits() -> None:
    """As OpenBLAS says of itself; where it does not, wider matrices are refused."""
    about = np.show_config(mode="dicts")["Build Dependencies"]["lapack"]
    if "openblas configuration" not in about:
        pytest.skip(f"NumPy stands on {about.get('name')}, which does not say")
    assert blas.has_long_integers() == ("USE64BITINT" in about["openblas configuration"])


def test_a_solver_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    M = moment(4, 9, 0)

    def no_routine(*_: object) -> Callable[..., None]:
        def give_up(*operands: object) -> None:
            ctypes.c_int.from_address(operands[-1]).value = 3

        return give_up

    def no_eigh(M: np.ndarray) -> None:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    for name, change in (("routine", no_routine), ("MOST_SQUARE", 2)):
        monkeypatch.setattr(blas, name, change)
        monkeypatch.setattr(np.linalg, "eigh", no_eigh)
        with pytest.raises(SolverError, match=r"A of 'up' \(4 x 4, finite\).*not converge") as told:
            eigenbasis(M, 9, "float64", "A of 'up'")
        assert told.value.status == 3
        assert "OPENBLAS_CORETYPE" in str(told.value) and "\n" not in str(told.value)


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


def test_equal_sums_of_other_counts_are_other_moments() -> None:
    """The same Σ a aᵀ over twice the rows is half of A: no layer takes the other's mu."""
    gate, up = factors().layers.values()
    layers = {"blocks.0.mlp.gate": gate, "blocks.0.mlp.up": replace(up, n_A=2 * gate.n_A)}
    basis = decompose(replace(factors(), layers=layers))
    assert (basis["blocks.0.mlp.up"].mu == basis["blocks.0.mlp.gate"].mu / 2).all()


def test_basis_file_round_trip(tmp_path) -> None:
    basis = decompose(factors())
    name = "blocks.0.mlp.up"
    counted = replace(basis[name], raised_A=1, raised_G=2, rounding=0.5)
    basis = replace(basis, layers={**basis.layers, name: counted})
    save_bases(basis, tmp_path / "b.h5")
    back = load_bases(tmp_path / "b.h5")
    assert list(back) == list(basis)
    for name, one in basis.items():
        for part in ("U_A", "mu", "U_G", "lam"):
            assert getattr(back[name], part).tobytes() == getattr(one, part).tobytes()
        for part in ("raised_A", "raised_G", "rounding"):
            assert getattr(back[name], part) == getattr(one, part)


@pytest.mark.parametrize(
    ("M", "error", "says"),
    [
        (np.array([[1.0, 0.5], [0.4, 1.0]]), NotSymmetricError, "transpose"),
        (np.diag([1.0, -1e-3]), NotPSDError, "-1.000e-03"),
        (np.diag([1.0, np.nan]), NonFiniteError, r"\[1, 1\]"),
        (np.ones((2, 3)), ShapeError, r"\(2, 3\)"),
        (np.ones(3), ShapeError, r"\(3,\)"),
        (np.zeros((0, 0)), ShapeError, r"\(0, 0\)"),
        (np.float64(3), ShapeError, r"got \(\)"),
        (np.diag([1.0, -np.inf]), NonFiniteError, "-inf"),
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
    elif how == "overflows":
        U = np.sign(U) * 1.7e308
    elif how == "empty":
        U, mu = np.zeros((0, 0)), np.zeros(0)
    elif how == "integer values":
        mu = np.arange(len(mu))[::-1]
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
    "overflows": (ConventionError, r"U_A of '.*gate' has .* = nan >"),
    "empty": (EmptyError, r"mu of '.*gate' is empty"),
    "integer values": (DTypeError, r"mu of '.*gate' must hold real numbers; got int64"),
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
    solver = tolerance.eigenpair(max(n, MRRR), dtype)
    solver += 2 * tolerance.gamma(n, np.float64) * np.sqrt(n)
    off = rng.normal(size=(n, rng.integers(1, n + 1)))
    off = off @ off.T  # U (I + E/2) has UᵀU − I = E + E²/4
    E = 20 * solver * np.sqrt(n) * off / np.linalg.norm(off)
    wrong = (U.astype(np.float64) @ (np.eye(n) + E / 2)).astype(dtype)
    with pytest.raises(ConventionError, match="not orthonormal"):
        require_basis("test", "x", Eigenbasis(wrong[:, ::-1], one.mu, G, lam))


@pytest.mark.parametrize("seed", [933, 14])
def test_what_scipys_default_makes_of_a_small_graded_matrix_is_a_basis(seed: int) -> None:
    """dsyevr's columns are less orthonormal than 8 n eps; observed 1.5 of that."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, 8)) * 2.0 ** -rng.integers(0, 20, (8, 8))
    values, U = scipy.linalg.eigh(x.T @ x)
    one = np.ones((1, 1)), np.ones(1)
    require_basis("test", "x", Eigenbasis(U[:, ::-1], np.maximum(values[::-1], 0), *one))


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


def test_a_basis_file_that_lies_is_refused(tmp_path: Path) -> None:
    """Other dtypes and shapes when it is opened, attributes of another kind when they are read."""
    path = tmp_path / "b.h5"
    basis = decompose(factors())
    save_bases(basis, path)
    good = path.read_bytes()
    name = next(iter(basis))
    group = name.replace(".", "/")
    for part, value in (
        ("mu", np.zeros(0)), ("mu", np.zeros((6, 1))), ("mu", np.zeros(4)),
        ("U_A", np.zeros((5, 4))), ("U_A", np.zeros((6, 6), "f2")), ("lam", np.zeros(4, "i8")),
    ):  # fmt: skip
        path.write_bytes(good)
        with opened_for_lies(path) as file:
            attributes = dict(file[f"{group}/{part}"].attrs)
            del file[f"{group}/{part}"]
            file[f"{group}/{part}"] = value
            for key, found in attributes.items():
                file[f"{group}/{part}"].attrs[key] = found
        with pytest.raises(SchemaError, match=r"b\.h5"):
            load_bases(path)
    for part, key, value in (
        ("mu", "raised", np.inf), ("lam", "raised", np.bytes_("1")), ("lam", "rounding", np.nan),
    ):  # fmt: skip
        path.write_bytes(good)
        with opened_for_lies(path) as file:
            file[f"{group}/{part}"].attrs[key] = value
        with pytest.raises(SchemaError, match=f"{part} of .*attribute {key!r} must be"):
            load_bases(path)[name]


@pytest.mark.parametrize("power", range(-1100, -1000, 7))
def test_what_underflow_makes_negative_is_raised(power: int) -> None:
    """Of rank 7 in 20 dimensions, its sums at the lower end of the range."""
    rng = np.random.default_rng(power + 2000)
    x = rng.normal(size=(7, 20))
    M = np.ldexp(x.T @ x, power)
    U, values, _ = eigenbasis(M, 7, "float64", "G")
    error = np.abs((U * values) @ U.T - M).max()
    assert error <= 20 * tolerance.eigenpair(20) * values[0] + tolerance.underflow(20, 7, "float64")
