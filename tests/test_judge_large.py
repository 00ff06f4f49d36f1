"""Where a model is large: little is read twice, and sketches stand for matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.factors_file import shapes_of
from refcurv.files import store
from refcurv.files.lazy import Lazy, Recent
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import recomputed
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.diagnosis.variants.held import Held
from refcurv.judge.dump import Dump

CONFIG = config(mlp_width=8)
MODEL = rc.Model(CONFIG, random_parameters(CONFIG, 3))
CORPUS = rc.Corpus(np.random.default_rng(0).integers(0, CONFIG.vocabulary, (12, 9)))


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


def test_shapes_are_known_without_reading(tmp_path, monkeypatch) -> None:
    made = rc.collect(MODEL, CORPUS, "**", "empirical")
    rc.save_factors(made, tmp_path / "f.h5")
    own = rc.load_factors(tmp_path / "f.h5")
    monkeypatch.setattr(store, "read", lambda *_, **__: pytest.fail("a matrix was read"))
    assert shapes_of(own) == {n: (len(x.sum_G), len(x.sum_A)) for n, x in made.items()}
    assert shapes_of(own) == shapes_of(made)


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


def test_a_sketch_is_that_of_the_matrices() -> None:
    reference = rc.collect(MODEL, CORPUS, "blocks.**", "empirical")
    here = Case(Dump("memory", {}, {}), reference, {}, Arithmetic(), MODEL, CORPUS)
    wanted = [Setting(rows_A="with last", rows_G="with last"), Setting(pooling_G="centred")]
    whole = dict(moments(here, wanted, list(here.reference)))
    for setting, of in moments(here, wanted, list(here.reference), through=recomputed.sketch):
        for layer, one in of.items():
            for side in "AG":
                M = getattr(whole[setting][layer], side)
                R = recomputed.sketch(len(M))
                near = R.T @ M @ R
                far = np.abs(getattr(one, side) - near).max()
                assert far <= 1e-12 * max(np.abs(near).max(), np.linalg.norm(M)), (setting, layer)


def test_the_norm_of_a_sketch_is_that_of_a_matrix() -> None:
    """Also of one with a large trace, which one-sided sketches overstate."""
    rng, k = np.random.default_rng(0), recomputed.WIDTH
    for power in (0.0, 0.5, 1.0, 3.0):
        U = np.linalg.qr(rng.normal(size=(300, 300)))[0]
        M = (U * np.arange(1.0, 301) ** -power) @ U.T
        R = recomputed.sketch(300)
        sketched = np.linalg.norm((R.T @ M @ R)[:k, k:]) / k
        assert abs(sketched / np.linalg.norm(M) - 1) < 0.25, power


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
    monkeypatch.setattr(recomputed, "ENTRIES", 1)
    assert said() == small
    asked = []
    origin = Side.add
    monkeypatch.setattr(Side, "add", lambda *a: (asked.append(a[1]), origin(*a))[1])
    monkeypatch.setattr(recomputed, "WHOLE", 0.0)
    assert "B15" not in {fault for fault, _ in said()}, "a corpus that is too large is left alone"
    assert not any(one.setting for one in asked)


def test_progress_ends_with_the_verdict() -> None:
    model, corpus = MODEL, CORPUS
    truth = rc.collect(model, corpus, "blocks.**", "empirical")
    calls: list[tuple[int, int]] = []
    for factor in (1.0, 2.0):
        calls.clear()
        theirs = {name: (one.A, factor * one.G, one.n_A) for name, one in truth.items()}
        rc.validate(theirs, truth, progress=lambda *now: calls.append(now))
        assert calls[-1][0] == calls[-1][1]
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
