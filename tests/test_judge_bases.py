"""Eigenvectors of others: signs, order and rotations in a cluster are free, the rest is not."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.bases import recomposition
from refcurv.judge.dump import Dump, Theirs
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


def judged(factors, **parts):
    verdict = validate(dump(**parts), factors, layers=LAYER)
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
    "basis of A": (lambda U, v: (U.T, v), "B64"),
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


def test_recomposition_is_that_of_numpy(factors):
    A = factors[LAYER].A
    values, U = np.linalg.eigh(A)
    assert recomposition(U, values, A) < 1e-14
    values[0] += 0.1
    want = (U * values) @ U.T / values.sum() - A / np.trace(A)
    assert recomposition(U, values, A) == pytest.approx(
        np.linalg.norm(want) / np.linalg.norm(A / np.trace(A)), rel=1e-10
    )
