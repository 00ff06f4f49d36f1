"""Where a model is large: little is read twice, and sketches stand for matrices."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.factors_file import parts_of, shapes_of
from refcurv.files import store
from refcurv.files.lazy import Lazy, Recent
from refcurv.judge import judgement
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import compared, hypotheses, recomputed, work
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.diagnosis.variants.held import Held
from refcurv.judge.dump import Dump

CONFIG = config(mlp_width=8)
MODEL = rc.Model(CONFIG, random_parameters(CONFIG, 3))
CORPUS = rc.Corpus(np.random.default_rng(0).integers(0, CONFIG.vocabulary, (12, 9)))


def by_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every model is a large one."""
    for module in (work, compared):
        monkeypatch.setattr(module, "ENTRIES", 1)


def test_what_was_read_last_is_kept_within_a_bound() -> None:
    read: list[str] = []

    def make(name: str) -> np.ndarray:
        read.append(name)
        return np.zeros(10)

    kept = Recent(Lazy("abc", make), 170)  # two arrays of 80 bytes
    for name in "abab":
        assert kept[name] is kept[name]
    assert read == ["a", "b"]
    assert kept["c"].size == kept["b"].size
    assert read == ["a", "b", "c"]
    assert kept["a"].size
    assert read == ["a", "b", "c", "a"]
    assert list(kept) == ["a", "b", "c"]
    small = Recent(Lazy("a", make), 0)
    assert small["a"] is small["a"], "the last one is kept whatever its size"
    before = small["a"]
    small.forget()
    assert small["a"] is not before


def test_shapes_are_known_without_reading(tmp_path, monkeypatch) -> None:
    biased = config(biases=("up",))
    made = rc.collect(rc.Model(biased, random_parameters(biased, 3)), CORPUS, "**", "empirical")
    rc.save_factors(made, tmp_path / "f.h5")
    own = rc.load_factors(tmp_path / "f.h5")
    monkeypatch.setattr(store, "read", lambda *_, **__: pytest.fail("a matrix was read"))
    assert shapes_of(own) == {n: (len(x.sum_G), len(x.sum_A)) for n, x in made.items()}
    assert shapes_of(own) == shapes_of(made)
    assert parts_of(own) == parts_of(replace(own, layers=Recent(own.layers, 0))) == parts_of(made)
    for name, parts in parts_of(made).items():
        assert parts == {p for p in vars_of(made[name]) if getattr(made[name], p) is not None}


def vars_of(one: rc.Factor) -> tuple[str, ...]:
    return tuple(f.name for f in fields(one) if f.default is None)


def test_held_parameters_are_the_models() -> None:
    model = MODEL
    names = list(model.parameters)
    short = model.parameters[names[0]].astype(np.float32).astype(np.float64)
    mixed = replace(model, parameters={**model.parameters, names[0]: short})
    held = Held(mixed)
    for name in names:
        assert held[name].dtype == np.float64
        np.testing.assert_array_equal(held[name], mixed.parameters[name])
    single = held.single(mixed)
    assert single.dtype == "float32"
    assert single.parameters[names[-1]].dtype == np.float32
    assert held.as_dtype("float32")[names[-1]].dtype == np.float32


def test_a_sketch_is_that_of_the_matrices() -> None:
    reference = rc.collect(MODEL, CORPUS, "blocks.**", "empirical")
    here = Case(Dump("memory", {}, {}), reference, {}, Arithmetic(), MODEL, CORPUS)
    wanted = [Setting(rows_A="with last", rows_G="with last"), Setting(pooling_G="centred")]
    whole = dict(moments(here, wanted, list(here.reference)))
    for setting, of in moments(here, wanted, list(here.reference), through=compared.sketch):
        for layer, one in of.items():
            for side in "AG":
                M = getattr(whole[setting][layer], side)
                R = compared.sketch(len(M))
                near = R.T @ M @ R
                far = np.abs(getattr(one, side) - near).max()
                assert far <= 1e-12 * max(np.abs(near).max(), np.linalg.norm(M)), (setting, layer)


def test_the_norm_of_a_sketch_is_that_of_a_matrix() -> None:
    """Also of one with a large trace, which one-sided sketches overstate."""
    rng, k = np.random.default_rng(0), compared.WIDTH
    for power in (0.0, 0.5, 1.0, 3.0):
        U = np.linalg.qr(rng.normal(size=(300, 300)))[0]
        M = (U * np.arange(1.0, 301) ** -power) @ U.T
        R = compared.sketch(300)
        sketched = np.linalg.norm((R.T @ M @ R)[:k, k:]) / k
        assert abs(sketched / np.linalg.norm(M) - 1) < 0.25, power


@pytest.mark.slow
def test_a_large_model_gets_the_same_cause(monkeypatch) -> None:
    model, corpus = MODEL, CORPUS
    truth = rc.collect(model, corpus, "blocks.**", "sampled", draws=4)
    gold = rc.collect(model, corpus, "blocks.**", "empirical")
    theirs = {name: (one.A, one.G, one.n_A) for name, one in gold.items()}

    def said() -> list[tuple[str | None, tuple[str, ...]]]:
        found = rc.validate(theirs, truth, model=model, corpus=corpus)
        return [(one.fault, one.layers) for one in found.causes]

    small = said()
    assert [fault for fault, _ in small] == ["B15"]
    by_sketches(monkeypatch)
    assert said() == small
    asked = []
    origin = Side.add
    monkeypatch.setattr(Side, "add", lambda *a: (asked.append(a[1]), origin(*a))[1])
    monkeypatch.setattr(recomputed, "WHOLE", 0.0)
    assert "B15" not in {fault for fault, _ in said()}, "a corpus that is too large is left alone"
    assert not any(one.setting for one in asked)


@pytest.mark.slow
def test_a_cause_found_on_a_sample_says_which_sequences(monkeypatch) -> None:
    """And it is confirmed on all; what the sample does not speak for is tried there alone."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (48, 9))
    corpus = rc.Corpus(tokens)
    truth = rc.collect(MODEL, corpus, "blocks.**", "sampled", draws=4)
    gold = rc.collect(MODEL, corpus, "blocks.**", "empirical")
    theirs = {name: (one.A, one.G, one.n_A) for name, one in gold.items()}
    by_sketches(monkeypatch)
    monkeypatch.setattr(work, "WORK", 1.0)
    asked: list[tuple[int, int]] = []
    origin = compared.moments

    def counted(case, wanted, layers, limit, **options):
        asked.append((limit, len(wanted)))
        return origin(case, wanted, layers, limit, **options)

    monkeypatch.setattr(compared, "moments", counted)
    found = rc.validate(theirs, truth, model=MODEL, corpus=corpus)
    assert [one.fault for one in found.causes] == ["B15"]
    assert "on 28 of 48 sequences (0, 2, 3, 5, 7, 9, 10, 12, ...), then on all" in (
        found.causes[0].sentence
    )
    whole = [count for limit, count in asked if limit >= tokens.size]
    assert whole and sum(whole) < sum(count for limit, count in asked if limit < tokens.size) / 3
    monkeypatch.setattr(recomputed, "WHOLE", 0.0)
    more = rc.collect(MODEL, rc.Corpus(tokens, np.zeros_like(tokens)), "blocks.**", "empirical")
    last = {name: (more[name].A, one.G, more[name].n_A) for name, one in truth.items()}
    left = rc.validate(last, truth, model=MODEL, corpus=corpus).excluded
    assert any("`with last`, on 28 of 48 sequences" in text for text in left)


def test_a_rank_of_one_is_seen_without_the_difference() -> None:
    rng = np.random.default_rng(1)
    v = rng.normal(size=90)
    T = rng.normal(size=(90, 90))
    T, one = T @ T.T, np.outer(v, v)
    for x, t in ((1.0, 1.0), (3.0, 2.0)):
        found = hypotheses._rank_one((t * T + one) / x, x, T, t)
        assert found is not None and np.isclose(found[0], v @ v)
        np.testing.assert_allclose(found[0] * np.outer(found[1], found[1]), one, atol=1e-9)
    two = np.outer(v[::-1], v[::-1])
    assert hypotheses._rank_one(T + one + two, 1.0, T, 1.0) is None
    assert hypotheses._rank_one(T, 1.0, T, 1.0) is None


@pytest.mark.parametrize("named", [True, False])
def test_nothing_is_read_again_where_everything_fails(tmp_path, monkeypatch, named) -> None:
    """Every layer is read for the comparison, and a few of a large model to be searched."""
    made = rc.collect(MODEL, CORPUS, "blocks.**", "empirical")
    rc.save_factors(made, tmp_path / "f.h5")
    own = rc.load_factors(tmp_path / "f.h5")
    wrong = {n: (one.A, one.G[::-1, ::-1], one.n_A) for n, one in made.items()}
    if not named:
        rng = np.random.default_rng(0)
        wrong = {n: (A, np.cov(rng.normal(size=(len(G), 99))), k) for n, (A, G, k) in wrong.items()}
    by_sketches(monkeypatch)
    monkeypatch.setattr(judgement, "ROOM", 0)
    read: list[str] = []
    origin = store.read

    def counted(header, name, **options):
        read.append(name)
        return origin(header, name, **options)

    monkeypatch.setattr(store, "read", counted)
    found = rc.validate(wrong, own)
    assert not found.passed
    times = [read.count(f"{name}.sum_A") for name in made]
    assert any(one.fault for one in found.causes) == named
    if named:
        assert min(times) == 2, "to be compared, and for what was found to be tried"
    assert sum(times) <= 2 * len(made) + 24


def test_progress_ends_with_the_verdict() -> None:
    model, corpus = MODEL, CORPUS
    truth = rc.collect(model, corpus, "blocks.**", "empirical")
    calls: list[tuple[int, int]] = []
    for factor in (1.0, 2.0):
        calls.clear()
        theirs = {name: (one.A, factor * one.G, one.n_A) for name, one in truth.items()}
        rc.validate(theirs, truth, progress=lambda *now: calls.append(now))
        assert calls[-1][0] == calls[-1][1] == len(truth)
        assert len(calls) == len(truth) + (factor != 1)  # once more behind the search for causes
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
