"""Labels that are handed over beside factors: were they drawn from the model?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters

import refcurv as rc
from refcurv.judge import labelled
from refcurv.judge.labelled import not_drawn
from refcurv.report.verdict import format_verdict
from refcurv.report.verdict_page import verdict_page

N, T, V = 24, 12, 19


@pytest.fixture(scope="module")
def made():
    """A model, a corpus that is packed and padded in places, and logits."""
    own = config(vocabulary=V)
    model = rc.Model(own, random_parameters(own, 5))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, V, (N, T)), np.ones((N, T), int)
    mask[3, 7:] = mask[9, 4:] = 0
    corpus = rc.Corpus(tokens, mask=mask)
    return model, corpus, rc.logits(model, corpus.tokens)


def gumbel(rng, size):
    return -np.log(-np.log(rng.random(size)))


def labels_of(kind, corpus, logits, seed):
    """(N, T): labels of a kind where the corpus has one, by the Gumbel trick of JAX."""
    rng = np.random.default_rng(seed)
    noise = gumbel(rng, logits.shape)
    draw = {
        "drawn": noise,
        "argmax": 0 * noise,
        "cold": 0.6 * noise,
        "hot": 2.0 * noise,
        "one key": noise[:1],
        "one key for a batch of 4": np.tile(noise[:4], (N // 4, 1, 1)),
        "one key for all positions": noise[:, :1],
    }
    y = corpus.label if kind == "own" else (logits + draw[kind]).argmax(axis=-1)
    return np.where(corpus.label >= 0, y, -1)


def told(made, labels):
    model, corpus, _ = made
    return [one.fault for one in not_drawn(model, corpus, replace(corpus, labels=labels))]


@few(10)
@given(st.integers(0, 2**32 - 1))
def test_labels_that_are_drawn_pass(made, seed: int) -> None:
    """Of one label there is nothing to say."""
    drawn = labels_of("drawn", *made[1:], seed)
    assert told(made, drawn) == []
    one = np.full_like(drawn, -1)
    one[0, 0] = drawn[0, 0]
    assert told(made, one) == []


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("argmax", "B16"), ("own", "B15"), ("cold", "B21"), ("hot", "B21"), ("one key", "B17"),
     ("one key for a batch of 4", "B17"), ("one key for all positions", "B17")],
)  # fmt: skip
def test_labels_that_are_not_drawn_are_told(kind: str, fault: str, made) -> None:
    for seed in range(3):
        assert told(made, labels_of(kind, *made[1:], seed)) == [fault]


@pytest.mark.parametrize("kind", ["drawn", "argmax", "own", "one key"])
def test_labels_are_judged_where_all_else_agrees(kind: str, made) -> None:
    """Factors that are the truth for their labels passed whatever these were."""
    model, corpus, logits = made
    labels = labels_of(kind, corpus, logits, 1)
    theirs = rc.collect(model, replace(corpus, labels=labels), "**.mlp.*", "empirical")
    dump = {name: (one.A, one.G, one.n_A) for name, one in theirs.items()}
    what = {"model": model, "corpus": corpus, "labels": labels, "layers": "**.mlp.*"}
    found = rc.validate(dump, **what)
    faults = {"drawn": [], "argmax": ["B16"], "own": ["B15"], "one key": ["B17"]}[kind]
    assert [one.fault for one in found.causes] == faults and found.passed == (not faults)
    assert rc.validate(dump, **what, declared={"fisher": "empirical"}).passed
    if faults:
        text = " ".join(format_verdict(found.to_json()).split())
        assert f"FAILED: the dump of memory: {faults[0]}" in text
        assert "error before" not in verdict_page(found.to_json())
        assert ("--declare fisher=empirical" in text) == (kind == "own")


def test_without_room_for_probabilities_the_other_tests_remain(made, monkeypatch) -> None:
    """A vocabulary times a text may be more than ENTRIES, for one sequence too."""
    monkeypatch.setattr(labelled, "ENTRIES", T * V - 1)
    assert told(made, labels_of("one key", *made[1:], 0)) == []
    assert told(made, labels_of("argmax", *made[1:], 0)) == ["B16"]
    assert told(made, labels_of("hot", *made[1:], 0)) == ["B21"]


def test_chances_are_bounded_from_above(made) -> None:
    """Beside the share of many draws that are as far off."""
    model, corpus, logits = made
    config, read = model.config, dict(model.parameters)
    far = []
    for seed in range(200):
        y = labels_of("drawn", corpus, logits, seed)
        seen = labelled._seen(config, read, corpus, replace(corpus, labels=y))
        far.append(labelled._log_chance(seen))
    for share in (0.5, 0.1, 0.02):
        assert np.mean(np.array(far) <= np.log(share)) <= 2 * share  # on either side
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    has = corpus.label >= 0
    assert seen.count == has.sum() and seen.label.shape == (N, T)
    assert np.allclose(seen.p, p * has[..., None], atol=1e-6)
    of_y = np.take_along_axis(p, y.clip(0)[..., None], -1)[..., 0][has]
    assert seen.nats == pytest.approx(-np.log(of_y).sum()) == pytest.approx(-seen.of_own)
    assert seen.entropy == pytest.approx(-(p * np.log(p)).sum(-1)[has].sum())
    for k, slope in enumerate(labelled.SLOPES):
        assert seen.above[k] == pytest.approx(np.log((p ** (1 - slope)).sum(-1))[has].sum())
        assert seen.below[k] == pytest.approx(np.log((p ** (1 + slope)).sum(-1))[has].sum())
