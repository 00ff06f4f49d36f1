"""Item by item: by hand, by naive loops, and the whole chain of the shipped model a second time."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import budgets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within
from test_images import judged, model_of, vit
from test_metrics import edit_distance, ndcg_by_definition
from test_suite import by_hand, counting_model, naive_text, random_model, random_text, rows

import refcurv as rc
from refcurv.demo import CORPUS, LAYERS, MODEL
from refcurv.evaluation import decode
from refcurv.evaluation.items import auc, distances, hits, suffix_nats
from refcurv.evaluation.metrics import perplexity
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.model.corpus import Corpus
from refcurv.model.weights import resident

# ------------------------------------------------------------------ by hand


def test_by_hand():
    """The model counts upwards; rows of unequal prompts come back in the population's order."""
    model, asked = counting_model(), by_hand().populations
    assert hits(model, asked["quotes"]).tolist() == [True, True, False, False, False]
    assert distances(model, asked["quotes"]).tolist() == [0, 0, 1 / 4, 2 / 5, 2 / 3]
    assert hits(model, asked["sums"]).tolist() == [True, True, True, False]
    assert hits(model, asked["quotes"]).dtype == bool
    # 1 2 3 are all expected; of 6 8 one is, the other is one of eleven that are not
    s, total = math.sqrt(12), math.log(math.exp(math.sqrt(12)) + 11)
    want = [3 * (total - s), (total - s) + total]
    assert_within(suffix_nats(model, asked["prose"]), want, tolerance.gamma(40, float), want, "")


def test_images_by_hand():
    one, images = vit(images=9)
    corpus, label, model = judged(one, images)
    said = rc.logits(model, images).argmax(axis=-1)
    for name, population in corpus.populations.items():
        assert hits(model, population).tolist() == (said == np.array(label[name])).tolist()
    assert hits(model, corpus.populations["memorised"]).sum() == 6


# ------------------------------------------------------------------ nats


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_suffix_nats_is_the_naive_loop(rng, dtype):
    """Rows of unequal lengths, pieces that cut a batch; a row without a suffix costs nothing."""
    model, text = random_model(1, dtype), random_text(rng)
    with (
        mock.patch.object(decode, "shard_sequences", lambda width: 3),
        mock.patch.object(decode, "HEAD_ROWS", 4),
    ):
        got = suffix_nats(model, text)
    every, _ = naive_text(model, text)
    ends = np.cumsum(text.length - text.prompt_length)
    want = [sum(part) for part in np.split(every, ends[:-1])]
    assert got.dtype == np.float64
    assert got[4] == 0 == want[4]
    budget = budgets.path(model.config.layers, model.config.width, dtype)
    assert_within(got, want, budget, want, "nats")  # observed: a hundredth of it


def test_means_are_the_tables():
    """Every value of `rc.evaluate` is a mean of these."""
    model, asked = counting_model(), by_hand()
    table = rc.evaluate(model, asked)
    quotes, sums, prose = (asked.populations[name] for name in ("quotes", "sums", "prose"))
    assert table["quotes"].after["strict"] == hits(model, quotes).mean()
    assert table["quotes"].after["distance"] == math.fsum(distances(model, quotes)) / 5
    assert table["sums"].after["accuracy"] == hits(model, sums).mean()
    tokens = int((prose.length - prose.prompt_length).sum())
    mean = perplexity(suffix_nats(model, prose), tokens)
    assert_within(table["prose"].after["perplexity"], mean, tolerance.gamma(20, float), mean, "")


def test_progress_counts_batches():
    asked = by_hand().populations
    for work, name in ((hits, "quotes"), (distances, "quotes"), (suffix_nats, "prose")):
        seen: list[tuple[int, int]] = []
        work(counting_model(), asked[name], progress=lambda *at, to=seen: to.append(at))
        total = len(decode.batches(asked[name]))
        assert seen == [(n, total) for n in range(total + 1)]


# ------------------------------------------------------------------ the area under the curve

scores = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf]), min_size=1)


@given(scores, scores)
def test_auc_is_the_mean_over_pairs(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc(positive, negative) == sum(pairs) / len(pairs)
    assert auc(np.array(negative), np.array(positive)) == pytest.approx(
        1 - auc(positive, negative), abs=2 * tolerance.eps(float)
    )


def test_auc_by_hand():
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 1], [1, 1, 1]) == 0.5
    assert auc([True, False], [False]) == 0.75


def test_auc_refusals():
    for error, text, groups in (
        (EmptyError, "negative has no scores", ([1.0], [])),
        (ShapeError, r"positive must be \(N,\)", ([[1.0]], [1.0])),
        (NonFiniteError, r"negative holds nan at \[1\]", ([1.0], [1.0, math.nan])),
        (DTypeError, "positive must hold real numbers", (["a"], [1.0])),
        (DTypeError, "negative must hold real numbers", ([1.0], [1j])),
    ):
        with pytest.raises(error, match=text):
            auc(*groups)


# ------------------------------------------------------------------ refusals


def test_refusals(rng):
    model, asked = counting_model(), by_hand().populations
    one, images = vit(images=2)
    pictures = judged(one, images)[0].populations["true"]
    for work in (hits, distances):
        with pytest.raises(ConventionError, match="'text' is not decoded; take suffix_nats"):
            work(model, asked["prose"])
    for work in (distances, suffix_nats):
        with pytest.raises(ConventionError, match="needs a Population of tokens; got images"):
            work(model, pictures)
        with pytest.raises(ConventionError, match="needs a Population of tokens; got Corpus"):
            work(model, by_hand())
    for work in (hits, distances, suffix_nats):
        with pytest.raises(RangeError, match=r"\[0, 1\] is 99, outside the model's vocabulary"):
            work(model, rows("1 99 | 2"))
        with pytest.raises(ConventionError, match="but the model reads images"):
            work(model_of(one), asked["quotes"])
        broken = model.with_parameters({"final_norm.weight": np.full(12, np.nan)})
        with pytest.raises(NonFiniteError, match="logits"):
            work(broken, asked["quotes"])
    with pytest.raises(ConventionError, match="has images, but the model reads tokens"):
        hits(model, pictures)


# ------------------------------------------------------------------ the whole chain, once more


def some(population: rc.Population, rows: int) -> rc.Population:
    """Rows at equal distances."""
    at = np.linspace(0, len(population.tokens) - 1, rows).astype(int)
    fields = {name: getattr(population, name)[at] for name in ("tokens", "prompt_length", "length")}
    return replace(population, **fields)


def said_without_cache(model: rc.Model, population: rc.Population) -> list[list[int]]:
    """The whole texts go through the model again for every token; all prompts are of one length."""
    (prompt,), (length,) = set(population.prompt_length.tolist()), set(population.length.tolist())
    text = population.tokens[:, :prompt].tolist()
    while len(text[0]) < length:
        for row, logit_TV in zip(text, rc.logits(model, text), strict=True):
            row.append(int(logit_TV[-1].argmax()))
    return [row[prompt:] for row in text]


def truths(population: rc.Population) -> list[list[int]]:
    bounds = zip(population.tokens, population.prompt_length, population.length, strict=True)
    return [row[prompt:length].tolist() for row, prompt, length in bounds]


def scored_logits(model: rc.Model, population: rc.Population) -> list[tuple[np.ndarray, list[int]]]:
    """Row by row: the logits before each token behind the prompt, and these tokens."""
    return [
        (rc.logits(model, row[None, :length])[0, prompt - 1 : length - 1], row[prompt:length])
        for row, prompt, length in zip(
            population.tokens, population.prompt_length, population.length, strict=True
        )
    ]


def nats_of(logit_TV: np.ndarray, token_T: list[int]) -> float:
    e_TV = np.exp(logit_TV - logit_TV.max(axis=1, keepdims=True))
    p_TV = e_TV / e_TV.sum(axis=1, keepdims=True)
    return -math.fsum(math.log(p_TV[t, v]) for t, v in enumerate(token_T))


@pytest.fixture(scope="module")
def shipped() -> tuple[rc.Model, rc.Model, Corpus]:
    """The shipped model, an edit of it by a rough collection, and a few items of each kind."""
    model, corpus = rc.load(MODEL), rc.load_corpus(CORPUS)
    factors = rc.collect(model, Corpus(corpus.tokens[:48]), LAYERS)
    edited, _ = rc.edit(model, rc.decompose(factors), {LAYERS: 0.9})
    wanted = {"quotes_test": 6, "facts_test": 8, "addition_test": 8, "language_test": 4}
    few = {name: some(corpus.populations[name], rows) for name, rows in wanted.items()}
    in_memory = (replace(m, parameters=resident(m)) for m in (model, edited))
    return *in_memory, Corpus(np.zeros((0, 1), np.int32), populations=few)


def test_the_whole_chain_by_another_route(shipped):
    """Shipped model → edit → every value of the table and of each item, with nothing of
    `refcurv.evaluation`: no cache, Levenshtein and nDCG by their definitions.
    """
    model, edited, corpus = shipped
    table = rc.evaluate(edited, corpus, baseline=model)
    budget = budgets.path(model.config.layers, model.config.mlp_width, "float64")
    for which, when in ((model, "before"), (edited, "after")):
        for name, population in corpus.populations.items():
            row = getattr(table[name], when)
            if population.kind == "text":
                want = [nats_of(*pair) for pair in scored_logits(which, population)]
                assert_within(suffix_nats(which, population), want, budget, want, name)
                mean = math.fsum(want) / int((population.length - population.prompt_length).sum())
                assert_within(math.log(row["perplexity"]), mean, budget, mean, name)
                continue
            said, true = said_without_cache(which, population), truths(population)
            d = [edit_distance(a, b) for a, b in zip(said, true, strict=True)]
            share = [x / len(b) for x, b in zip(d, true, strict=True)]
            assert hits(which, population).tolist() == [x == 0 for x in d]
            assert distances(which, population).tolist() == share
            strict = sum(x == 0 for x in d) / len(d)
            if population.kind == "answer":
                assert row == {"accuracy": strict}
                continue
            loose = sum(1 - x >= 0.75 for x in share) / len(d)
            assert row == {"strict": strict, "loose": loose, "distance": math.fsum(share) / len(d)}
    quotes = table["quotes_test"]
    assert 0 <= quotes.before["distance"] < quotes.after["distance"] < 1  # the edit was felt


def test_agreement_by_another_route(shipped):
    model, edited, corpus = shipped
    text = corpus.populations["language_test"]
    agreement = rc.evaluate(edited, corpus, baseline=model)["language_test"].agreement
    base, after = (np.concatenate([z for z, _ in scored_logits(m, text)]) for m in (model, edited))
    for gain in ("paper", "code"):
        want = ndcg_by_definition(base, after, 10, gain)
        assert_within(agreement[f"ndcg_{gain}"], want, tolerance.gamma(500, float), want, gain)
        assert 0.5 < want < 1
