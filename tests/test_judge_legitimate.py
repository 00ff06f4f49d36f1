"""No false alarm: what two correct programs may do differently passes, on random small models."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.dump import Dump, Theirs
from refcurv.model.part import part_of

LAYERS = "blocks.0.{attn,mlp}.{q,o,up,down}"
SIGNIFICANT = {"float16": 11, "bfloat16": 8}


def world(rng):
    """A model, a corpus and its factors; some have padding, some segments of a single row."""
    made = config(
        width=int(rng.choice([4, 8])),
        mlp_width=int(rng.choice([1, 5, 9])),
        layers=1,
        biases=("q", "k", "v") if rng.random() < 0.5 else (),
    )
    parameters = random_parameters(made, int(rng.integers(99)))
    parameters["head.weight"] = parameters["head.weight"] / 4  # no label is nearly certain
    model = rc.Model(made, {name: rounded(x, "float32") for name, x in parameters.items()})
    tokens = rng.integers(0, made.vocabulary, (12, 8))
    mask = np.ones_like(tokens)
    mask[2, 5:] = 0
    segments = np.repeat(np.arange(4), 2)[None].repeat(12, 0) if rng.random() < 0.2 else None
    corpus = rc.Corpus(tokens, mask=mask if segments is None else None, segments=segments)
    fisher = rng.choice(["expected", "empirical"])
    return model, corpus, str(fisher)


def rounded(x, dtype):
    """x to the significant bits of `dtype`."""
    if dtype in ("float64", "float32"):
        return x.astype(dtype).astype(np.float64)
    significand, exponent = np.frexp(x)
    p = SIGNIFICANT[dtype]
    return np.ldexp(np.rint(np.ldexp(significand, p)), exponent - p)


def of_arithmetic(model, dtype):
    """The model, in float32 if that is their dtype."""
    if dtype != "float32":
        return model
    parameters = {name: np.asarray(x, np.float32) for name, x in model.parameters.items()}
    return rc.Model(model.config, parameters, "float32")


def noisy(M, dtype, rng):
    """M of a and g that are off by one rounding, stored in a shorter float."""
    off = 1 + ROUNDOFF[dtype] * rng.uniform(-1, 1, len(M))
    return rounded(off[:, None] * M * off, dtype)


def merged(one, two):
    """The factors of both parts."""
    out = {}
    for name in one:
        x, y = one[name], two[name]
        A, G = x.sum_A + y.sum_A, x.sum_G + y.sum_G
        out[name] = rc.Factor(A, x.n_A + y.n_A, G, x.n_G + y.n_G)
    return out


def in_memory(factors, rng):
    """Another gauge in each layer, counts said or not."""
    out = {}
    for name, one in factors.items():
        c = 10 ** rng.uniform(-30, 30)
        out[name] = (c * one.A, one.G / c, one.n_A if rng.random() < 0.5 else None)
    return out


def moments(rng):
    """Order and parts of the corpus, gauge, counts, dtype."""
    model, corpus, fisher = world(rng)
    reference = rc.collect(model, corpus, LAYERS, fisher)
    dtype = str(rng.choice(["float64", "float32", "float16", "bfloat16"]))
    order = rng.permutation(len(corpus.tokens))
    other = of_arithmetic(model, dtype)
    cut = int(rng.integers(1, len(order)))
    parts = [
        rc.collect(other, part_of(corpus, at), LAYERS, fisher) for at in (order[:cut], order[cut:])
    ]
    theirs = in_memory(merged(*parts), rng)
    if dtype in SIGNIFICANT:
        theirs = {k: (*(noisy(M, dtype, rng) for M in AG), n) for k, (*AG, n) in theirs.items()}
    return rc.validate(theirs, reference, arithmetic=dtype, declared={"fisher": fisher})


def drawn(rng):
    """Another draw of the labels, beside a reference of eight draws."""
    model, corpus, _ = world(rng)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=8)
    theirs = rc.collect(model, corpus, LAYERS, seed=int(rng.integers(2, 10**6)))
    return rc.validate(in_memory(theirs, rng), reference, declared={"fisher": "sampled"})


def symmetric(rng, n):
    """A second moment of random spectrum, with clusters of equal eigenvalues, perhaps singular."""
    values = np.sort(rng.choice(2.0 ** -np.arange(12.0), size=n))[::-1] * rng.uniform(0.5, 2)
    if rng.random() < 0.3:
        values[max(1, n // 2) :] = 0
    U, _ = np.linalg.qr(rng.normal(size=(n, n)))
    M = (U * values) @ U.T
    return (M + M.T) / 2


def bases_and_edits(rng, monkeypatch):
    """Their own eigenvectors, of any sign, order and rotation; their mask and their edit."""
    made = config(width=int(rng.choice([4, 8])), mlp_width=int(rng.choice([1, 5, 9])), layers=1)
    model, layer = rc.Model(made, random_parameters(made, 3)), "blocks.0.mlp.up"
    W = np.asarray(model.parameters[f"{layer}.weight"])
    A, G = (symmetric(rng, n) for n in W.shape[::-1])
    one = rc.Factor(50 * A, 50, 50 * G, 50, 0.0, 0.0)
    reference = rc.Factors({layer: one}, "expected", "reached", 0, 1, "float64", 96)
    dtype = str(rng.choice(["float64", "float32"]))
    sides = []
    for M in (A, G):
        values, U = np.linalg.eigh(M.astype(dtype))
        U, values = U[:, ::-1].astype(np.float64), np.maximum(values[::-1], 0).astype(np.float64)
        U = U * rng.choice([-1, 1], size=len(values))
        sides += [turned_in_clusters(rng, U, values, 64 * ROUNDOFF[dtype]), values]
    basis = Eigenbasis(*sides)
    rho = rng.uniform(0.2, 0.95)
    mask = rc.algebra.selection.select(basis.lam, basis.mu, rho)
    parts = {"U_A": basis.U_A, "mu": basis.mu, "U_G": basis.U_G, "lam": basis.lam, "mask": mask}
    if rng.random() < 0.5:
        parts = {"W": rounded(keep_pairs(W, basis, mask), dtype)}
    elif rng.random() < 0.5:
        at_A, at_G = rng.permutation(len(basis.mu)), rng.permutation(len(basis.lam))
        parts = {"U_A": basis.U_A[:, at_A], "mu": 3 * basis.mu[at_A], "U_G": basis.U_G[:, at_G]}
        parts |= {"lam": basis.lam[at_G], "mask": mask[np.ix_(at_G, at_A)]}
    monkeypatch.setattr("refcurv.judge.judgement.read_dump", lambda theirs: theirs)
    dump = Dump("test", {layer: Theirs(**parts)}, {layer: frozenset(parts)})
    said = {"arithmetic": dtype, "declared": {"fisher": "expected", "rho": str(rho)}}
    return rc.validate(dump, reference, model=model, layers=layer, **said)


def turned_in_clusters(rng, U, values, width):
    """U with the vectors of nearly equal eigenvalues rotated among themselves."""
    U, start = U.copy(), 0
    for k in range(1, len(values) + 1):
        if k == len(values) or values[k - 1] - values[k] > width * values[0]:
            Q, _ = np.linalg.qr(rng.normal(size=(k - start, k - start)))
            U[:, start:k] = U[:, start:k] @ Q
            start = k
    return U


def alarms(seeds, monkeypatch):
    """The findings that are no pass, and how many could not be decided."""
    out, undecided = [], 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        kind = (moments, drawn, bases_and_edits, bases_and_edits)[seed % 4]
        with monkeypatch.context() as here:
            verdict = kind(rng, here) if kind is bases_and_edits else kind(rng)
        open_ = [f for f in verdict.failed if f.verdict == "undecided"]
        undecided += bool(open_)
        out += [(seed, kind.__name__, f) for f in verdict.failed if f not in open_]
    return out, undecided


def test_legitimate_variations_pass(monkeypatch):
    assert alarms(range(20), monkeypatch)[0] == []


@pytest.mark.slow
def test_three_hundred_legitimate_variations_pass(monkeypatch):
    """Drawing may exceed four deviations with odds of 1/16 at most: one of 16 of the 75 draws."""
    found, undecided = alarms(range(1000, 1300), monkeypatch)
    assert [one for one in found if one[1] != "drawn"] == []
    assert len({seed for seed, _, _ in found}) <= 75 // 16
    assert undecided <= 30, "cuts among pairs that rounding orders"
