"""Position perturbation: every prompt spelled out, by hand and by a loop without a cache."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters
from test_images import judged, vit
from test_suite import by_hand, counting_model, rows

import refcurv as rc
from refcurv.evaluation import decode
from refcurv.evaluation.perturb import perturbation
from refcurv.law.checks import ConventionError, NonFiniteError, RangeError
from refcurv.model.corpus import Population
from refcurv.passes import parallel

# ------------------------------------------------------------------ the definition, literally


def match_from(model: rc.Model, prompt: list[int], true: list[int]) -> int:
    """How many tokens in a row are right, the whole text read again before each."""
    for n, token in enumerate(true):
        said = int(rc.logits(model, [prompt + true[:n]])[0, -1].argmax())
        if said != token:
            return n
    return len(true)


def literally(model: rc.Model, text: list[int], n: int, t: int) -> tuple[int, list[int]]:
    """(original score, every variant's score); text is x_1 .. x_{n+L} with x_1 at index 1."""
    x = [None, *text]
    L = len(text) - n
    longer = [
        match_from(model, [x[j] for j in range(1, n + i + 1)], [*x[n + i + 1 :]])
        for i in range(1, min(t, L) + 1)
    ]
    windows = [
        match_from(model, [x[j] for j in range(n - w + 1, n + 1)], [*x[n + 1 :]])
        for w in range(t + 1, n)
    ]
    return match_from(model, [*x[1 : n + 1]], [*x[n + 1 :]]), longer + windows


@st.composite
def asked(draw):
    """A model, and items that it recites to the end, in part or not at all."""
    made = config(vocabulary=5, layers=1)
    seed = draw(st.integers(0, 9999))
    model = rc.Model(made, random_parameters(made, seed))
    rng, items, width = np.random.default_rng(seed), draw(st.integers(1, 3)), 9
    prompt = rng.integers(1, width, items)
    length = rng.integers(prompt + 1, width + 1)
    tokens = rng.integers(0, 5, (items, width))
    for row, n in zip(tokens, prompt, strict=True):  # as it would go on, then with slips
        row[n:] = decode.greedy(model, row[None, :n], width - n)[0]
    slip = rng.random(tokens.shape) < 0.15
    tokens = np.where(slip, rng.integers(0, 5, tokens.shape), tokens)
    return model, Population(tokens, prompt, length, "recite", "test")


@given(asked(), st.integers(1, 9))
@few(20)
def test_every_prompt_literally(one, t):
    model, population = one
    got = perturbation(model, population, t)
    for item, (row, n, length) in enumerate(
        zip(population.tokens, population.prompt_length, population.length, strict=True)
    ):
        original, variants = literally(model, row[:length].tolist(), int(n), t)
        assert got.original[item] == original
        assert got.stressed[item] == max(variants)
        assert got.variants[item] == len(variants)


# ------------------------------------------------------------------ by hand


def by_length(needed: int) -> mock._patch:
    """Decoding that counts upwards after prompts of just `needed` tokens, and else says 0."""

    def said(_config, _parameters, prompts, _choose):
        every = []
        for one in prompts:
            last = one.token_BP[np.arange(len(one.length_B)), one.length_B - 1]
            upwards = last[:, None] + 1 + np.arange(one.steps)
            every.append(np.where(one.length_B[:, None] == needed, upwards, 0))
        return every

    return mock.patch.object(decode, "continued_each", said)


@pytest.mark.parametrize(
    ("needed", "original", "stressed"),
    [
        (1, 0, 0),  # windows of t tokens or fewer are not asked
        (2, 0, 0),
        (3, 0, 5),  # the shortest window, t + 1, has the whole suffix to say
        (5, 0, 5),  # the longest, n - 1
        (6, 5, 0),  # the prompt itself is no variant
        (7, 0, 4),  # one token more: what remains is one token less
        (8, 0, 3),  # t more, the most
        (9, 0, 0),
    ],
)
def test_by_hand(needed, original, stressed):
    """n = 6, L = 5, t = 2; only prompts of one length are known by heart."""
    with by_length(needed):
        got = perturbation(counting_model(), rows("1 2 3 4 5 6 | 7 8 9 10 11"), 2)
    assert got.original.tolist() == [original]
    assert got.stressed.tolist() == [stressed]
    assert got.variants.tolist() == [2 + 3]


def test_a_model_that_counts():
    """A slip in the suffix ends a match; a prompt that reaches beyond it goes on."""
    population = rows("1 2 3 4 | 5 6 9 10 11", "5 | 6", "3 4 5 | 9 10 11", "1 2 3 | 4 5 6 7")
    got = perturbation(counting_model(), population, 3)
    assert got.original.tolist() == [2, 1, 0, 4]
    assert got.stressed.tolist() == [2, 0, 2, 3]
    assert got.variants.tolist() == [3, 1, 3, 3]
    assert (got.mean_original, got.mean_stressed) == (7 / 4, 7 / 4)
    assert json.loads(json.dumps(got.to_json())) == {
        "t": 3, "mean_original": 1.75, "mean_stressed": 1.75,
        "original": [2, 1, 0, 4], "stressed": [2, 0, 2, 3], "variants": [3, 1, 3, 3],
    }  # fmt: skip


def test_edges():
    """n = 1 has no windows; L = 1 has the one variant with nothing left to say, which scores 0."""
    got = perturbation(counting_model(), rows("3 | 4", "2 3 | 4"), 1)
    assert got.original.tolist() == [1, 1]
    assert got.stressed.tolist() == [0, 0]
    assert got.variants.tolist() == [1, 1]
    got = perturbation(counting_model(), rows("1 2 3 | 4 5"), 100)
    assert (got.stressed.tolist(), got.variants.tolist()) == ([1], [2])
    for array in (got.original, got.stressed, got.variants):
        assert array.dtype == np.int64
        assert not array.flags.writeable


# ------------------------------------------------------------------ the rest


def test_padding_threads_and_order_change_nothing(rng):
    made = config(vocabulary=3)
    model = rc.Model(made, random_parameters(made, 2))
    prompt, length = np.array([4, 2, 5, 1, 4, 3]), np.array([9, 6, 8, 9, 5, 9])
    tokens = rng.integers(0, 3, (6, 9))
    found = []
    for threads, order, filler in ((1, slice(None), 0), (3, slice(None, None, -1), 10**6)):
        filled = np.where(np.arange(9) < length[:, None], tokens, filler)[order]
        population = Population(filled, prompt[order], length[order], "recite", "test")
        with (
            mock.patch.object(parallel, "cores", lambda n=threads: n),
            mock.patch.object(decode, "shard_sequences", lambda width: 2),
        ):
            got = perturbation(model, population, 2)
        found.append([x[order].tolist() for x in (got.original, got.stressed, got.variants)])
    assert found[0] == found[1]
    assert max(found[0][1]) > 0


def test_progress_counts_batches():
    seen: list[tuple[int, int]] = []
    population = rows("1 2 3 | 4 5", "1 2 3 4 | 5 6")  # 3 variants and 4, each a batch
    with mock.patch.object(decode, "shard_sequences", lambda _: 1):
        perturbation(counting_model(), population, 1, progress=lambda *at: seen.append(at))
    assert seen == [(n, 7) for n in range(8)]


def test_refusals():
    model, asked = counting_model(), by_hand().populations
    for t in (0, -3, 2.0, "8", True, None):
        with pytest.raises(RangeError, match="t must be an integer of at least 1; got"):
            perturbation(model, asked["quotes"], t)
    with pytest.raises(ConventionError, match="'text' is not decoded"):
        perturbation(model, asked["prose"], 2)
    with pytest.raises(RangeError, match=r"tokens of population 'recite' \[1, 2\] is 99"):
        perturbation(model, rows("1 | 2", "1 2 | 99"), 2)
    one, images = vit(images=2)
    with pytest.raises(ConventionError, match="needs a Population of tokens; got images"):
        perturbation(model, judged(one, images)[0].populations["true"], 2)
    broken = model.with_parameters({"final_norm.weight": np.full(12, np.nan)})
    with pytest.raises(NonFiniteError, match="logits"):
        perturbation(broken, asked["quotes"], 2)
    assert perturbation(model, asked["sums"], np.int64(2)).t == 2
