"""Decoding with a cache against recomputing everything; populations of unequal rows."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, configs, random_parameters

from refcurv.evaluation import decode
from refcurv.evaluation.decode import batches, decode_population, greedy, suffixes, teacher_forced
from refcurv.evaluation.prompts import shared
from refcurv.law.checks import EmptyError, NonFiniteError, RangeError
from refcurv.model import transformer
from refcurv.model.config import ModelConfig, RopeScaling
from refcurv.model.corpus import Population
from refcurv.model.layers import DEFINITIONS, causal_layout
from refcurv.model.weights import Model
from refcurv.passes import parallel

NEAR = 1e-9
"""Two logits this close may change places between routes; over 422 draws the least
gap was 9e-5."""


def last_logits(config: ModelConfig, parameters: dict[str, np.ndarray], token: np.ndarray):
    """The second route's logits: the whole sequence forward, on the definitions."""
    ones = np.ones(token.shape, dtype=bool)
    layout = causal_layout(ones, np.zeros(token.shape, dtype=np.int64))
    final, _ = transformer.forward(config, parameters, token, layout, DEFINITIONS)
    return transformer.head_logits(config, parameters, final[:, -1])


def model_of(made: ModelConfig, parameters: dict[str, np.ndarray]) -> Model:
    """In the dtype of its arrays."""
    return Model(made, parameters, parameters["embed.weight"].dtype.name)


def greedy_without_cache(config, parameters, prompt, steps):
    token, gap = np.asarray(prompt, dtype=np.int64), np.inf
    for _ in range(steps):
        logit = last_logits(config, parameters, token)
        best = np.sort(logit, axis=-1)[:, -2:]
        gap = min(gap, (best[:, 1] - best[:, 0]).min())
        token = np.concatenate([token, logit.argmax(axis=-1)[:, None]], axis=1)
    return token[:, np.shape(prompt)[1] :], gap


@st.composite
def prompts(draw):
    made = draw(configs())
    positions = 12 if made.learned_positions else 0  # as many as any prompt grows to
    made = replace(made, causal=True, learned_positions=positions)
    if made.rope_scaling is not None:  # no prompt grows beyond the trained context
        made = replace(made, rope_scaling=replace(made.rope_scaling, original=40))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    prompt = rng.integers(0, made.vocabulary, (batch, length))
    return made, random_parameters(made, draw(st.integers(0, 9999))), prompt


@given(prompts(), st.integers(0, 7))
def test_cached_equals_recomputed(one, steps):
    made, parameters, prompt = one
    want, gap = greedy_without_cache(made, parameters, prompt, steps)
    got = greedy(model_of(made, parameters), prompt, steps)
    assert got.shape == (len(prompt), steps)
    assert got.dtype == np.int64
    if gap > NEAR:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cached_logits_equal_recomputed_ones(dtype):
    """Not only the argmax: the logits of every step, within the rounding of the dtype."""
    made = config(vocabulary=50, width=16, head_width=4, mlp_width=12)
    parameters = {n: x.astype(dtype) for n, x in random_parameters(made, 3).items()}
    prompt = np.random.default_rng(0).integers(0, 50, (3, 4))
    seen = []
    with mock.patch.object(
        decode, "head_logits", lambda *a: seen.append(transformer.head_logits(*a)) or seen[-1]
    ):
        out = greedy(model_of(made, parameters), prompt, 12)
    wide = {n: x.astype(np.float64) for n, x in parameters.items()}
    for n, logit in enumerate(seen):
        want = last_logits(made, wide, np.concatenate([prompt, out[:, :n]], axis=1))
        error = np.abs(logit - want).max() / np.abs(want).max()
        assert logit.dtype == dtype
        assert error < 200 * np.finfo(dtype).eps  # observed: 3 eps in float32, 6 in float64
    assert len(seen) == 12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_go_to_the_lowest_id(dtype):
    """A state of all ones before a head of exact zeros and minus ones: 2 and 5 tie at 0."""
    made = config(vocabulary=7)
    parameters = {n: np.zeros(s, dtype) for n, s in made.parameter_shapes().items()}
    parameters["embed.weight"][:] = 1
    parameters["final_norm.weight"][:] = 1
    parameters["head.weight"][:] = -1
    parameters["head.weight"][[2, 5]] = 0
    prompt = np.array([[6], [5]])
    np.testing.assert_array_equal(greedy(model_of(made, parameters), prompt, 3), np.full((2, 3), 2))


def test_frequencies_that_change_on_the_way_are_refused():
    """By 8 positions at most, or longrope from 9 on; a population counts its last token too."""
    long = RopeScaling(kind="longrope", original=8, short=(1.0,), long=(2.0,))
    dynamic = RopeScaling(kind="dynamic", factor=2.0, original=8)
    for scaling, prompt, steps, good in (
        (long, 6, 3, True), (long, 6, 4, False), (long, 9, 4, True), (long, 9, 0, True),
        (dynamic, 6, 3, True), (dynamic, 6, 4, False), (dynamic, 9, 1, True),
        (dynamic, 9, 2, False),
    ):  # fmt: skip
        made = config(rope_scaling=scaling)
        token = np.random.default_rng(3).integers(0, 7, (2, prompt))
        if not good:
            with pytest.raises(RangeError, match="rotary frequencies change beyond 8"):
                greedy(Model(made, random_parameters(made, 1)), token, steps)
            continue
        parameters = random_parameters(made, 1)
        want, _ = greedy_without_cache(made, parameters, token, steps)
        assert (greedy(model_of(made, parameters), token, steps) == want).all()
    token = np.zeros((1, 10), int)
    for kind, length, refused in (("text", 10, False), ("recite", 8, False), ("answer", 9, True)):
        one = Population(token, np.array([6]), np.array([length]), kind, "dev")
        with pytest.raises(RangeError, match="change beyond 8") if refused else nullcontext():
            decode.require_population("x", "y", one, config(rope_scaling=long))


def test_the_head_sees_chunks_of_rows_and_forgets_none():
    made = config(vocabulary=11)
    parameters = random_parameters(made, 1)
    prompt = np.random.default_rng(2).integers(0, 11, (9, 2))
    whole = greedy(model_of(made, parameters), prompt, 4)
    with mock.patch.object(decode, "HEAD_ROWS", 4):
        np.testing.assert_array_equal(greedy(model_of(made, parameters), prompt, 4), whole)


def test_refusals():
    made, parameters = config(), random_parameters(config(), 0)
    with pytest.raises(EmptyError, match="at least one token"):
        greedy(model_of(made, parameters), np.zeros((1, 0), int), 1)
    with pytest.raises(RangeError, match=r"\[0, 1\] is 7"):
        greedy(model_of(made, parameters), np.array([[0, 7]]), 1)
    with pytest.raises(RangeError, match="steps"):
        greedy(model_of(made, parameters), np.array([[0]]), -1)
    parameters["final_norm.weight"][0] = np.nan
    with pytest.raises(NonFiniteError, match="logits"):
        greedy(model_of(made, parameters), np.array([[0]]), 1)


# ------------------------------------------------------------------ populations


@st.composite
def populations(draw, vocabulary: int = 6, kind: str = "recite", width: int = 9):
    rows = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    prompt = rng.integers(1, width, rows)
    length = rng.integers(prompt + 1, width + 1)
    return Population(rng.integers(0, vocabulary, (rows, width)), prompt, length, kind, "test")


@given(populations(), st.integers(1, 40))
def test_batches_partition_the_rows(population, shard_tokens):
    prompts = population.kind != "text"

    def shard(width: int) -> int:
        return max(1, shard_tokens // width)

    def size(width: int) -> int:
        eight = max(1, shard_tokens // math.ceil(width / 8))
        return max(shard(width), min(3, eight)) if prompts else shard(width)

    with (
        mock.patch.object(decode, "shard_sequences", shard),
        mock.patch.object(decode, "PROMPTS", 3),
    ):
        parts = batches(population)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(population.tokens)))
    own = population.length - shared(population)
    for k, part in enumerate(parts):
        assert 1 <= len(part) <= size(own[part].max())
        if k:  # the batch before had no room for its first row
            fuller = np.append(parts[k - 1], part[0])
            assert len(fuller) > size(own[fuller].max())
    key = [(population.prompt_length[n], population.length[n], n) for part in parts for n in part]
    assert key == sorted(key)


@pytest.mark.parametrize(
    ("kind", "T", "rows"),
    [
        ("text", 48, 10),
        ("recite", 48, 64),
        ("answer", 8, 64),
        ("answer", 400, 10),
        ("recite", 2000, 2),
    ],
)
def test_prompts_pass_together(kind, T, rows):
    """Up to 64 in eight shards' positions; short ones as many as fill a shard."""
    own = np.zeros((150, T), np.int32)
    own[:, 0] = np.arange(150)  # nothing is shared
    one = Population(own, np.full(150, T // 2), np.full(150, T), kind, "test")
    assert len(batches(one)[0]) == rows


@given(populations(), st.integers(0, 99))
def test_population_rows_are_decoded_alone(population, seed):
    """Each row as if it were the only one, whatever lengths its neighbours have."""
    made = config(vocabulary=6)
    parameters = random_parameters(made, seed)
    calls = []
    with mock.patch.object(decode, "shard_sequences", lambda width: 2):
        got = decode_population(made, parameters, population, lambda: calls.append(1))
        assert len(calls) == len(batches(population))
    assert len(got) == len(population.tokens)
    for n, row in enumerate(population.tokens):
        prompt, length = population.prompt_length[n], population.length[n]
        want, gap = greedy_without_cache(made, parameters, row[None, :prompt], int(length - prompt))
        assert len(got[n]) == length - prompt
        if gap > NEAR:
            np.testing.assert_array_equal(got[n], want[0])
        np.testing.assert_array_equal(suffixes(population)[n], row[prompt:length])


def test_padding_and_suffix_are_never_read(rng):
    """Other ids there, even outside the vocabulary, change no bit of what is decoded."""
    made = config(vocabulary=6)
    parameters = random_parameters(made, 5)
    tokens = rng.integers(0, 6, (5, 8))
    prompt, length = np.array([2, 3, 2, 1, 3]), np.array([8, 5, 6, 4, 4])
    first = Population(tokens, prompt, length, "recite", "test")
    other = np.where(np.arange(8) < prompt[:, None], tokens, 10**6)
    second = Population(other, prompt, length, "recite", "test")
    for a, b in zip(
        decode_population(made, parameters, first),
        decode_population(made, parameters, second),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_threads_change_nothing(rng):
    made = config(vocabulary=6)
    parameters = random_parameters(made, 5)
    tokens = rng.integers(0, 6, (12, 8))
    population = Population(tokens, np.full(12, 3), np.full(12, 8), "recite", "test")
    out = []
    for threads in (1, 3):
        with (
            mock.patch.object(parallel, "cores", lambda n=threads: n),
            mock.patch.object(decode, "shard_sequences", lambda width: 2),
        ):
            out.append(np.stack(decode_population(made, parameters, population)))
    np.testing.assert_array_equal(*out)


@given(populations(kind="text"))
def test_teacher_forced_scores_the_suffix(population):
    """Every token of the suffix is the label of the position before it, and nothing else is."""
    row = batches(population)[0]
    token, label, layout = teacher_forced(config(), population, row)
    assert token.shape[1] == population.length[row].max()
    for b, n in enumerate(row):
        prompt, length = population.prompt_length[n], population.length[n]
        for t in range(token.shape[1]):
            assert token[b, t] == (population.tokens[n, t] if t < length else 0)
            scored = prompt <= t + 1 < length
            assert label[b, t] == (population.tokens[n, t + 1] if scored else -1)
            assert layout.last_BT[b, t] == (t if t < length else -1)
        assert not layout.first_BT[b].any()
