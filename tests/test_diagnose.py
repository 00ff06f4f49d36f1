"""`diagnose`: what is no fault has no name, what is unknown is said. Faults: test_injected."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.model.part import part_of

METHOD = Path(__file__).parents[1] / "validation" / "METHOD.md"


@pytest.fixture(scope="module")
def setting():
    """A small OLMo-2 with square MLPs, twelve sequences of eight labels, and the exact factors."""
    made = config(mlp_width=8)
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    corpus = rc.Corpus(tokens)
    return model, corpus, rc.collect(model, corpus, "**", "expected")


def test_what_is_unknown_is_said_with_what_was_excluded(setting):
    _, _, factors = setting
    theirs = {name: (np.cos(one.A), one.G, one.n_A) for name, one in factors.items()}
    verdict = rc.validate(theirs, factors, arithmetic="float64")
    assert not verdict.passed and not verdict.causes
    assert any("B12" in text and "leaves" in text for text in verdict.excluded)
    assert {f.fault for f in verdict.failed} == {None}


def test_the_registry_has_the_words_of_the_method():
    rows = re.findall(r"^\| (B\d+) \| (.+?) \| (.+) \|$", METHOD.read_text("utf-8"), re.M)
    assert [(id, one.name, one.shows) for id, one in FAULTS.items()] == rows
    assert len(FAULTS) == 82 and all(one.remedy.endswith(".") for one in FAULTS.values())


# ------------------------------------------------------------------ with model and corpus


@pytest.fixture(scope="module")
def gappy():
    """Sequences of many lengths, some with a prompt, and their factors by the corpus's labels."""
    made = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7)
    model = rc.Model(made, random_parameters(made, 5))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, made.vocabulary, (10, 8))
    length, prompt = rng.integers(4, 9, 10)[:, None], rng.integers(0, 3, 10)[:, None]
    at = np.arange(8)
    label = np.full(tokens.shape, -1)
    label[:, :-1] = tokens[:, 1:]
    label[(at >= length - 1) | (at < prompt)] = -1
    corpus = rc.Corpus(tokens, labels=label, mask=(at < length).astype(np.uint8))
    layers = "blocks.*.mlp.{gate,down},blocks.*.attn.v,head"
    return model, corpus, rc.collect(model, corpus, layers, "empirical")


def judged(setting, theirs, **options):
    model, corpus, factors = setting
    options = {"arithmetic": "float64", "declared": {"fisher": "empirical"}} | options
    return rc.validate(theirs, factors, model=model, corpus=corpus, **options)


def alone(setting):
    """Each sequence's sums: {layer: (sum_A (N, I, I), sum_G (N, O, O))}."""
    model, corpus, _ = setting
    each = [
        rc.collect(model, part_of(corpus, slice(n, n + 1)), ",".join(FEW), "empirical")
        for n in range(len(corpus.label))
    ]
    return {
        name: tuple(np.stack([getattr(one[name], side) for one in each]) for side in SUMS)
        for name in FEW
    }


FEW = ("blocks.0.mlp.gate", "head")
SUMS = ("sum_A", "sum_G")


def of_rows(setting):
    """Rows of each sequence: the positions at or before its last label."""
    label = setting[1].label >= 0
    return label.shape[1] - np.argmax(label[:, ::-1], axis=1)


def legitimate(rng, one, size):
    """The same A and G, summed in another order and rounded as another dtype rounds."""
    out = []
    for X in (one.A, one.G):
        noise = rng.normal(size=X.shape) * size
        order = rng.permutation(len(X))
        turned = X[np.ix_(order, order)]  # and back, which rounds nothing
        back = np.argsort(order)
        out.append(turned[np.ix_(back, back)] * (1 + (noise + noise.T) / 2))
    return (*out, one.n_A)


@pytest.mark.parametrize("times", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_alarm_where_nothing_is_wrong(gappy, times):
    """Noise of the declared dtype is never a cause. Of sums by shards, `merge` is what is tried."""
    factors = gappy[2]
    for n in range(times):
        rng = np.random.default_rng(n)
        dtype = ("float64", "float32", "bfloat16")[n % 3]
        size = ROUNDOFF[dtype] * rng.uniform(0.2, 2)
        names = ["blocks.0.mlp.gate", "blocks.1.attn.v"]
        theirs = {name: legitimate(rng, factors[name], size) for name in names}
        verdict = rc.validate(
            theirs,
            factors,
            layers=",".join(names),
            arithmetic=dtype,
            declared={"fisher": "empirical"},
        )
        assert verdict.passed and not verdict.causes, (n, verdict.failed)


@pytest.mark.slow
def test_other_draws_batches_and_gauges_are_no_fault(gappy):
    """Another seed, another order of sequences and shards merged by hand, with model and corpus."""
    model, corpus, _ = gappy
    names = ",".join(FEW)
    reference = rc.collect(model, corpus, names, draws=8)
    for seed in range(1, 3):
        drawn = rc.collect(model, corpus, names, seed=seed)
        verdict = rc.validate(drawn, reference, model=model, corpus=corpus)
        assert verdict.passed and not verdict.causes, verdict.failed
    of = alone(gappy)
    order = np.random.default_rng(0).permutation(10)
    n = of_rows(gappy).sum()
    merged = {
        name: (A[order].sum(axis=0) / n, G[order].sum(axis=0) / n, n) for name, (A, G) in of.items()
    }
    few = ",".join(FEW)
    assert judged(gappy, merged, layers=few).passed
    gauge = {name: (3 * A, G / 3, n) for name, (A, G, n) in merged.items()}
    verdict = judged(gappy, gauge, layers=few)
    assert verdict.passed and not verdict.causes


def test_labels_of_the_corpus_are_known_from_drawn_ones(gappy):
    """The corpus's labels come from the model, so that drawing explains theirs. But theirs is G of
    these labels exactly, which says more.
    """
    model, _, _ = gappy
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, model.config.vocabulary, (10, 8))
    logit = rc.logits(model, tokens)
    labels = (logit + rng.gumbel(size=logit.shape)).argmax(axis=-1)
    corpus, names = rc.Corpus(tokens, labels=labels), ",".join(FEW)
    reference = rc.collect(model, corpus, names, draws=4)
    empirical = rc.collect(model, corpus, names, "empirical")
    theirs = {name: (one.A, one.G, one.n_A) for name, one in empirical.items()}
    first = rc.validate(theirs, reference, arithmetic="float64")
    assert {f.verdict for f in first.failed} == {"undecided"} and not first.causes, first.failed
    said = {"arithmetic": "float64", "model": model, "corpus": corpus}
    verdict = rc.validate(theirs, reference, **said)
    assert not verdict.passed
    assert [cause.fault for cause in verdict.causes] == ["B15"]


def test_the_size_of_an_error_names_the_precision(gappy):
    _, _, factors = gappy
    rng = np.random.default_rng(0)
    theirs = {name: legitimate(rng, one, 2.0**-10) for name, one in factors.items()}
    said = {"fisher": "empirical"}
    for arithmetic in ("float32", ""):
        verdict = rc.validate(theirs, factors, arithmetic=arithmetic, declared=said)
        assert not verdict.passed
        assert {c.fault for c in verdict.causes} <= {"B59", "B60"}
        assert verdict.causes
        equal = {f.verdict.startswith("equal as") for f in verdict.failed}
        assert equal == {not arithmetic}


def test_signs_are_said_to_be_no_proof(gappy):
    """Without a model: a rank that is lost, and an error that grows with depth."""
    factors = gappy[2]
    rng = np.random.default_rng(0)

    def low(X):
        x = rng.normal(size=(len(X), 2))
        return x @ x.T

    theirs = {name: (low(one.A), one.G, one.n_A) for name, one in factors.items()}
    verdict = rc.validate(theirs, factors, arithmetic="float64", declared={"fisher": "empirical"})
    assert [cause.fault for cause in verdict.causes] == ["B36"]
    assert np.isnan(verdict.causes[0].after) and "Not confirmed" in verdict.causes[0].sentence
    theirs = {}
    for k, (name, one) in enumerate(factors.items()):
        x = rng.normal(size=one.A.shape) * np.trace(one.A) * 0.1 * k
        theirs[name] = (one.A + x + x.T, one.G, one.n_A)
    verdict = rc.validate(theirs, factors, arithmetic="float64", declared={"fisher": "empirical"})
    assert [cause.fault for cause in verdict.causes] == ["B57"]
