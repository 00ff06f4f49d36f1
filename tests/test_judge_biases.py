"""Dumps that join weight and bias: A is judged beside A_joint, and its corner beside 1."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.algebra.selection import select

WITH, WITHOUT = "blocks.0.mlp.up", "blocks.0.mlp.down"
JOINT = {"bias": "joint"}


@pytest.fixture(scope="module")
def factors():
    made = config(biases=("up",))
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    return rc.collect(model, rc.Corpus(tokens), f"{WITH},{WITHOUT}", "expected")


def dump_of(factors, change=lambda A: A, scale=1.0):
    A = change(factors[WITH].A_joint)
    return {
        name: (scale * (A if name == WITH else one.A), one.G / scale, one.n_A)
        for name, one in factors.items()
    }


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_joint_A_is_judged_beside_A_joint(factors, scale):
    for declared in (JOINT, {}):
        verdict = rc.validate(dump_of(factors, scale=scale), factors, declared=declared)
        assert verdict.passed, verdict.failed
        corners = [one for one in verdict.findings if one.quantity == "corner of A"]
        assert [one.layer for one in corners] == [WITH] and corners[0].error < 1e-13
        guessed = [text for text in verdict.recipe if "[a; 1]" in text]
        assert bool(guessed) == (not declared), "what is not declared is said"


def corner(value):
    def change(A):
        A = A.copy()
        A[-1, -1] = value
        return A

    return change


def first(A):
    order = np.roll(np.arange(len(A)), 1)
    return A[np.ix_(order, order)]


def column(A):
    """Σ a of other rows."""
    A = A.copy()
    A[-1, :-1] = A[:-1, -1] = 1.1 * A[-1, :-1]
    return A


FAULTS = {
    "the 1 of padding": ("B30", corner(1.25)),
    "a corner that is a sum": ("B30", corner(96.0)),
    "the 1 first": ("B31", first),
    "no 1 at all": ("B31", lambda A: A[:-1, :-1]),
    "another column": (None, column),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_bias_has_its_name(factors, name):
    fault, change = FAULTS[name]
    verdict = rc.validate(dump_of(factors, change), factors, declared=JOINT, arithmetic="float64")
    assert not verdict.passed
    assert {one.layer for one in verdict.failed} == {WITH}
    assert fault is None or fault in {one.fault for one in verdict.failed}
    corners = [one.fault for one in verdict.failed if one.quantity == "corner of A"]
    assert corners == (["B30"] if fault == "B30" else [])
    assert {"B30", "B31"} & {one.fault for one in verdict.failed} == ({fault} if fault else set())


def test_a_joint_basis_and_a_mask_are_of_the_wider_matrix(factors):
    bases = rc.decompose(factors, "joint")
    theirs = {
        name: {"A": one.A_joint, "G": one.G, "n": one.n_A, "U_A": bases[name].U_A,
               "mu": bases[name].mu, "U_G": bases[name].U_G, "lam": bases[name].lam}
        for name, one in factors.items()
    }  # fmt: skip
    verdict = rc.validate(theirs, factors)
    assert verdict.passed and "spaces of A" in {one.quantity for one in verdict.findings}
    assert rc.validate(theirs, factors, basis=rc.decompose(factors)).passed, "another basis"
    turned = {name: {**one, "U_A": one["U_A"][::-1]} for name, one in theirs.items()}
    assert not rc.validate(turned, factors).passed


def test_an_edit_of_weight_and_bias_is_judged_as_one_matrix(factors):
    made = config(biases=("up",))
    model = rc.Model(made, random_parameters(made, 3))
    whole = rc.decompose(factors, "joint")
    b = whole[WITH]
    W = np.column_stack([model.parameters[f"{WITH}.{part}"] for part in ("weight", "bias")])
    mask = select(b.lam, b.mu, 0.9)
    edited = b.U_G @ ((b.U_G.T @ W @ b.U_A) * mask) @ b.U_A.T
    one = factors[WITH]
    theirs = {"A": one.A_joint, "G": one.G, "n": one.n_A, "W": edited, "mask": mask}

    def found(**changes):
        given = {WITH: {**theirs, **changes}}
        return rc.validate(given, factors, model=model, layers=WITH)

    verdict = found()
    assert verdict.passed, verdict.failed
    assert {"W", "mask"} <= {f.quantity for f in verdict.findings if f.verdict == "pass"}
    alone = [f for f in found(W=edited[:, :-1]).findings if f.quantity == "W"]
    assert alone[0].verdict == "left out" and "give [W b]" in alone[0].cause
    assert not found(W=edited + 0.1 * W).passed
