"""`validate`: the truth passes, whatever its arithmetic; what differs is measured and said."""

from __future__ import annotations

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic, moment_budget, parse
from refcurv.judge.compare import measure


@pytest.fixture(scope="module")
def setting():
    """A model, a corpus and its factors, without drawing."""
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    corpus = rc.Corpus(tokens)
    return model, corpus, rc.collect(model, corpus, "blocks.*.mlp.*", "expected")


def in_memory(factors, change=lambda A, G, n: (A, G, n)):
    return {name: change(one.A, one.G, one.n_A) for name, one in factors.items()}


def test_the_truth_passes(setting):
    _, _, factors = setting
    for theirs in (factors, in_memory(factors)):
        verdict = rc.validate(theirs, factors)
        assert verdict.passed and len(verdict.findings) >= 8 * len(factors)


@pytest.mark.parametrize("side", ["A", "G"])
def test_a_factor_is_measured_and_fails(setting, side):
    _, _, factors = setting
    at = "AG".index(side)

    def twice(A, G, n):
        both = [A, G]
        both[at] = 2 * both[at]
        return (*both, n)

    verdict = rc.validate(in_memory(factors, twice), factors)
    bad = {f.quantity for f in verdict.failed}
    assert not verdict.passed
    assert bad >= {"tr A · tr G", side}, "the form agrees, the scale does not"
    assert f"{side}/tr {side}" not in bad
    assert all("times 2" in f.cause for f in verdict.failed if f.quantity == "tr A · tr G")


def test_the_gauge_is_no_fault(setting):
    _, _, factors = setting
    verdict = rc.validate(in_memory(factors, lambda A, G, n: (3 * A, G / 3, n)), factors)
    assert verdict.passed
    assert {f.fault for f in verdict.findings} == {None, "B8"}


def test_distances_are_what_numpy_says():
    rng = np.random.default_rng(1)
    X, Y = (a @ a.T for a in rng.normal(size=(2, 5, 7)))
    one = measure(Y, X, 14, 7)
    assert one.ratio == pytest.approx(np.trace(Y) / np.trace(X), rel=1e-14)
    form = Y / np.trace(Y) - X / np.trace(X)
    size = np.linalg.norm(X / np.trace(X))
    assert one.form == pytest.approx(np.linalg.norm(form) / size, rel=1e-13)
    assert one.whole == pytest.approx(np.linalg.norm(Y - X) / np.linalg.norm(X), rel=1e-14)
    assert one.rows == 2


def test_an_undeclared_dtype_is_no_pass(setting):
    model, corpus, factors = setting
    short = rc.collect(
        rc.Model(model.config, {k: v.astype(np.float32) for k, v in model.parameters.items()}),
        corpus,
        "blocks.*.mlp.*",
        "expected",
    )
    theirs = in_memory(short)
    verdict = rc.validate(theirs, factors)
    assert not verdict.passed
    assert {f.verdict for f in verdict.failed} == {"equal as float32"}
    assert rc.validate(theirs, factors, accept=["float32"]).passed
    assert rc.validate(theirs, factors, arithmetic="float32").passed
    assert not rc.validate(theirs, factors, arithmetic="float64", accept=["float32"]).passed


def test_another_draw_is_told_from_another_matrix(setting):
    model, corpus, _ = setting
    factors = rc.collect(model, corpus, "blocks.*.mlp.*", draws=8)
    other = rc.collect(model, corpus, "blocks.*.mlp.*", seed=1)
    assert rc.validate(other, factors).passed
    alone = rc.collect(model, corpus, "blocks.*.mlp.*")
    verdict = rc.validate(other, alone)
    assert {f.verdict for f in verdict.failed} == {"undecided"}
    assert rc.validate(other, alone, model=model, corpus=corpus).passed


def test_a_budget_is_the_sum_of_its_parts():
    u = ROUNDOFF["float32"]
    all_32 = Arithmetic().filled("float32")
    assert moment_budget(all_32, 100) == pytest.approx(u * (8 + 1.6 + 2 + 80 + 1), rel=1e-6)
    assert moment_budget(all_32, 100, 50) == pytest.approx(u * (8 + 20 + 2 + 80 + 1), rel=1e-4)
    mixed = parse("judge", "model=bfloat16, sums=float32").filled("float64")
    assert mixed == Arithmetic("bfloat16", "float64", "float32", "float64", "float64")
    assert Arithmetic().filled("bfloat16").sums == "float32"
    for text in ("float31", "size=float32", "sums=float32,sums=float64", "float32,sums=float64"):
        with pytest.raises(rc.RefcurvError):
            parse("judge", text)
