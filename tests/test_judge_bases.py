"""Eigenvectors of others: signs, order and rotations in a cluster are free, the rest is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from strategies import config, random_parameters

import refcurv as rc
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.bases import _sines
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.eigenvectors import recomposition
from refcurv.judge.judgement import validate

LAYER = "blocks.0.mlp.up"


@pytest.fixture(scope="module")
def factors():
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    return rc.collect(model, rc.Corpus(tokens), "blocks.*.mlp.*", "expected")


def clustered(factors):
    """The factors with A of one layer replaced by one whose eigenvalues 2 to 4 are equal."""
    one = factors[LAYER]
    values, U = np.linalg.eigh(one.sum_A)
    values[2:5] = values[3]
    A = (U * values) @ U.T
    changed = rc.Factor((A + A.T) / 2, one.n_A, one.sum_G, one.n_G)
    return rc.Factors({LAYER: changed}, factors.fisher, factors.rows, 0, 1, "float64", 96)


def dump(**parts):
    return Dump("test", {LAYER: Theirs(**parts)}, {LAYER: frozenset(parts)})


def judged(factors, arithmetic="float64", **parts):
    verdict = validate(dump(**parts), factors, layers=LAYER, arithmetic=arithmetic)
    return {f.quantity: f for f in verdict.findings}, verdict


def parts_of(factors, change=lambda U, values: (U, values)):
    basis = rc.decompose(factors)[LAYER]
    U_A, mu = change(basis.U_A, basis.mu)
    return dict(U_A=U_A, mu=mu, U_G=basis.U_G, lam=basis.lam)


def rotated(U, values):
    """Signs changed, and the cluster of equal eigenvalues turned."""
    U = U * np.where(np.arange(len(values)) % 2, -1, 1)
    at = np.flatnonzero(np.isclose(values, values[4], rtol=1e-12))
    assert len(at) == 3
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    U = U.copy()
    U[:, at] = U[:, at] @ Q
    return U, values


CHANGES = {
    "none": lambda U, v: (U, v),
    "signs and a turned cluster": rotated,
    "ascending": lambda U, v: (U[:, ::-1], v[::-1]),
    "scaled": lambda U, v: (U, 3 * v),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_signs_and_rotations_in_a_cluster_are_no_difference(factors, change):
    made = clustered(factors)
    found, verdict = judged(made, **parts_of(made, change))
    assert verdict.passed, verdict.failed
    assert {"basis of A", "basis of G", "spaces of A", "orthogonality of U_A"} <= set(found)


def mixed(U, values):
    """The first and the last eigenvector turned into one another by a small angle."""
    U, angle = U.copy(), 1e-6
    U[:, 0], U[:, -1] = U[:, 0] + angle * U[:, -1], U[:, -1] - angle * U[:, 0]
    return U, values


FAULTS = {
    "basis of A": (lambda U, v: (U + 1e-9 * U.T, v), None),
    "orthogonality of U_A": (lambda U, v: (1.0001 * U, v), None),
    "spaces of A": (mixed, None),
}


@pytest.mark.parametrize("quantity", FAULTS)
def test_another_basis_fails(factors, quantity):
    change, fault = FAULTS[quantity]
    made = clustered(factors)
    found, verdict = judged(made, **parts_of(made, change))
    assert not verdict.passed
    assert found[quantity].verdict not in ("pass", "left out")
    assert found[quantity].fault == fault


def of_few_rows(factors):
    """Factors without full rank, so that rounding makes some of their eigenvalues negative."""
    one = factors[LAYER]
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(2, 3, len(one.sum_A)))
    changed = rc.Factor(rows[0].T @ rows[0], one.n_A, rows[1].T @ rows[1], one.n_G)
    return rc.Factors({LAYER: changed}, factors.fisher, factors.rows, 0, 1, "float64", 96)


def solved(M, change=lambda values: values):
    """Eigenvectors and eigenvalues, descending."""
    values, U = np.linalg.eigh(M)
    return U[:, ::-1].astype(float), change(values[::-1]).astype(float)


def short(M):
    return from_bfloat16(to_bfloat16(M)).astype(float)


def plus(values):
    return np.maximum(values, 0)


EXPLAINED = {
    "rows": ("B64", lambda one: (solved(one.A)[0].T, solved(one.A)[1]), "the rows of U_A"),
    "eigenvalues upside down": (
        "B65",
        lambda one: (solved(one.A)[0], solved(one.A)[1][::-1]),
        "mu is in the opposite order",
    ),
    "those of G": ("B32", lambda one: solved(one.G), "those of G"),
    "solver": ("B62", lambda one: solved(one.A.astype("f4")), "digits of float32"),
    "rounded": ("B62", lambda one: solved(one.A.astype("f4").astype(float)), "to float32"),
    "short": (None, lambda one: solved(short(one.A)), "rounded to bfloat16, which has"),
    "short sums": (None, lambda one: solved(short(one.sum_A)), "rounded to bfloat16, which has"),
    "cut off": ("B66", lambda one: solved(short(one.A), plus), "these are cut off"),
    "positive": ("B66", lambda one: solved(short(one.A), abs), "these are turned positive"),
    "noise": (None, lambda one: (solved(one.A)[0] + 1e-8, solved(one.A)[1]), "is not A"),
    "half": ("B66", lambda one: solved(one.A.astype("f2").astype(float), plus), "to float16"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_each_fault_of_a_basis_has_its_name(factors, name):
    fault, plant, words = EXPLAINED[name]
    made = of_few_rows(factors)
    one = made[LAYER]
    U_A, mu = plant(one)
    parts = {"A": one.A, "n_A": one.n_A, "G": one.G, "n_G": one.n_G, "U_A": U_A, "mu": mu}
    found, verdict = judged(made, **parts)
    bad = [f for f in verdict.failed if f.quantity != "names"]
    assert bad and {(f.verdict, f.fault) for f in bad} == {("fail", fault)}
    assert words in found["basis of A"].cause
    assert [c.fault for c in verdict.causes] == ([fault] if fault else [])


def test_the_basis_of_their_own_A_has_no_fault_of_its_own(factors):
    """What is wrong with A is wrong with its basis, and is said of A alone."""
    one = factors[LAYER]
    A = one.A + 0.1 * np.eye(len(one.A)) * np.trace(one.A)
    U_A, mu = solved(A)
    parts = {"A": A, "n_A": one.n_A, "G": one.G, "n_G": one.n_G, "U_A": U_A, "mu": mu}
    found, verdict = judged(factors, **parts)
    assert (found["basis of A"].verdict, found["basis of A"].fault) == ("fail", None)
    assert "their own A" in found["basis of A"].cause
    assert [c.fault for c in verdict.causes] == ["B12"]


@pytest.mark.parametrize("off", [{0: 0.1}, {0: -0.1, 3: 0.2}, {1: -0.3, 2: -0.1}])
def test_recomposition_is_that_of_numpy(factors, off):
    """With eigenvalues below zero too."""
    A = factors[LAYER].A
    values, U = np.linalg.eigh(A)
    assert recomposition(U, values, A) < 1e-14
    for at, much in off.items():
        values[at] += much * values.max()
    assert (values < 0).any() == (min(off.values()) < 0)
    want = (U * values) @ U.T / values.sum() - A / np.trace(A)
    assert recomposition(U, values, A) == pytest.approx(
        np.linalg.norm(want) / np.linalg.norm(A / np.trace(A)), rel=1e-10
    )


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_angles_of_leading_spaces_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    U, V = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    want = [np.sqrt((np.sin(subspace_angles(U[:, :k], V[:, :k])) ** 2).sum()) for k in range(1, n)]
    assert _sines(U.T @ V) == pytest.approx(want, abs=1e-12)
