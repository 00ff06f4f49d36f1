"""`diagnose`: faults put into the truth come back by their names, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.faults import FAULTS

METHOD = Path(__file__).parents[1] / "validation" / "METHOD.md"


@pytest.fixture(scope="module")
def setting():
    """A small OLMo-2 with square MLPs, twelve sequences of eight labels, and the exact factors."""
    made = config(mlp_width=8)
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    corpus = rc.Corpus(tokens)
    return model, corpus, rc.collect(model, corpus, "**", "expected")


def bfloat16(X):
    bits = np.asarray(X, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x8000) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def damped(X):
    return X + 0.1 * np.trace(X) / len(X) * np.eye(len(X))


def rolled(X, *axes):
    for axis in axes:
        X = np.roll(X, len(X) // 2, axis)
    return X


def joint(A, corner):
    return np.block([[A, A[:, :1]], [A[:1], np.full((1, 1), corner)]])


CHANGES = {
    ("B1",): lambda A, G, n: (A, G / 96**2, n),
    ("B4",): lambda A, G, n: (A * n / 12, G * n / 12, n),
    ("B5",): lambda A, G, n: (A, 2 * G, n),
    ("B6",): lambda A, G, n: (A, G / 7, n),
    ("B11",): lambda A, G, n: (A, 4.0**16 * G, n),
    ("B12",): lambda A, G, n: (damped(A), damped(G), n),
    ("B30",): lambda A, G, n: (joint(A, 1.25), G, n),
    ("B31",): lambda A, G, n: (joint(A, 1.0), G, n),
    ("B32",): lambda A, G, n: (G, A, n),
    ("B39",): lambda A, G, n: (2 * A, G, n),
    ("B40",): lambda A, G, n: (A, G, 2 * n),
    ("B43",): lambda A, G, n: (A, G / 4**2, n),
    ("B47",): lambda A, G, n: (rolled(A, 0), G, n),
    ("B48",): lambda A, G, n: (0 * A, 0 * G, n),
    ("B58",): lambda A, G, n: (bfloat16(A * n) / n, bfloat16(G * n) / n, n),
    ("B61",): lambda A, G, n: (A, G + np.where(np.eye(len(G)) > 0, np.inf, 0), n),
    ("B1", "B5"): lambda A, G, n: (A, 2 * G / 96**2, n),
    ("B1", "B12"): lambda A, G, n: (damped(A), G / 96**2, n),
    ("B4", "B43"): lambda A, G, n: (8 * A, 8 * G / 9, n),
    ("B1", "B47"): lambda A, G, n: (rolled(A, 0, 1), G / 96**2, n),
}


@pytest.mark.parametrize("faults", CHANGES, ids=" ".join)
def test_each_fault_has_its_name(setting, faults):
    model, corpus, factors = setting
    change = CHANGES[faults]
    theirs = {name: change(one.A, one.G, one.n_A) for name, one in factors.items()}
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus)
    assert not verdict.passed
    assert sorted(cause.fault for cause in verdict.causes) == sorted(faults)
    named = {f.fault for f in verdict.failed if f.layer and not f.quantity.startswith("n_")}
    assert None not in named
    for cause in verdict.causes:
        assert cause.layers == tuple(factors) and cause.remedy


def test_factors_of_another_layer(setting):
    _, _, factors = setting
    names = [name for name in factors if name.startswith("blocks")]
    half = len(names) // 2
    swapped = dict(zip(names, names[half:] + names[:half], strict=True))
    theirs = {
        name: (factors[swapped[name]].A, factors[swapped[name]].G, one.n_A)
        for name, one in factors.items()
        if name in swapped
    }
    verdict = rc.validate(theirs, factors, layers="blocks.**")
    assert [cause.fault for cause in verdict.causes] == ["B38"]


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
