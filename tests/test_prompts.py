"""Prompts of unequal lengths behind what all begin with: read once, with the same result."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, configs, few, random_parameters
from test_decode import NEAR, greedy_without_cache
from threadpoolctl import threadpool_info, threadpool_limits

import refcurv as rc
from refcurv.evaluation import decode, prompts
from refcurv.evaluation.items import suffix_nats
from refcurv.evaluation.suite import measure
from refcurv.model import transformer
from refcurv.model.config import RopeScaling
from refcurv.model.corpus import Population
from refcurv.passes.below import Below
from refcurv.passes.held import Held

PREAMBLE = 6


@pytest.mark.parametrize(
    ("rows", "lengths", "count"),
    [
        ([[1, 2, 3, 4], [1, 2, 4, 4]], [3, 3], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3], 2),  # the last token of a prompt is read in any case
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [2, 3], 1),
        ([[1, 2, 3, 4], [2, 2, 3, 4]], [3, 3], 0),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [1, 3], 0),
        ([[1, 2, 3, 4]], [3], 0),  # nobody to share with
    ],
)
def test_what_is_shared_by_hand(rows: list[list[int]], lengths: list[int], count: int) -> None:
    tokens = np.array(rows)
    asked = Population(tokens, lengths, np.full(len(rows), 4), "answer", "test")
    assert prompts.shared(asked) == count


def test_batches_count_what_each_row_has_of_its_own() -> None:
    tokens = np.tile(np.arange(900), (300, 1))
    tokens[:, 894:] = np.random.default_rng(0).integers(0, 900, (300, 6))
    asked = Population(tokens, np.full(300, 898), np.full(300, 900), "answer", "test")
    own = 900 - prompts.shared(asked)
    assert own <= 6  # where 900 would be one row in each shard, and 5 in eight
    assert [len(part) for part in decode.batches(asked)][:2] == [512 // own] * 2


@st.composite
def tasks(draw):
    """Any causal model, and rows behind a preamble, of unequal prompts and suffixes."""
    made = replace(draw(configs()), causal=True, learned_positions=0)
    if made.rope_scaling is not None:
        made = replace(made, rope_scaling=replace(made.rope_scaling, original=40))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    rows = draw(st.integers(2, 6))
    tokens = rng.integers(0, made.vocabulary, (rows, PREAMBLE + 8))
    tokens[:, :PREAMBLE] = tokens[0, :PREAMBLE]
    prompt = PREAMBLE + rng.integers(1, 5, rows)
    length = prompt + rng.integers(1, 5, rows)
    learned = int(length.max()) - 1 if draw(st.booleans()) else 0  # the last token is only said
    made = replace(made, learned_positions=learned if made.rope(0) is None else 0)
    asked = Population(tokens, prompt, length, "answer", "test")
    return made, random_parameters(made, draw(st.integers(0, 9999))), asked


@few(60)
@given(tasks())
def test_each_row_is_decoded_as_if_alone(one) -> None:
    made, parameters, asked = one
    assert prompts.shared(asked) >= PREAMBLE
    read = []
    forward = transformer.block_forward

    def spied(*a):
        read.append(a[3].shape[:2])
        return forward(*a)

    with mock.patch.object(transformer, "block_forward", spied):
        got = decode.decode_population(made, parameters, asked)
    own = int(asked.prompt_length.max()) - prompts.shared(asked)
    if made.rope_scaling is None:
        assert read[:: made.layers][:2] == [(1, prompts.shared(asked)), (1, len(got) * own)]
    for n, row in enumerate(asked.tokens):
        P, L = int(asked.prompt_length[n]), int(asked.length[n])
        want, gap = greedy_without_cache(made, parameters, row[None, :P], L - P)
        assert len(got[n]) == L - P
        if gap > NEAR:
            np.testing.assert_array_equal(got[n], want[0])


@few(20)
@given(tasks())
def test_told_the_truth_a_row_has_the_nats_of_its_own_forward(one) -> None:
    made, parameters, asked = one
    model = rc.Model(made, parameters, "float64")
    got = suffix_nats(model, asked)
    for n, row in enumerate(asked.tokens):
        P, L = int(asked.prompt_length[n]), int(asked.length[n])
        z = rc.logits(model, row[None, : L - 1])[0, P - 1 :]
        want = np.logaddexp.reduce(z, axis=1) - z[np.arange(L - P), row[P:L]]
        assert got[n] == pytest.approx(want.sum(), rel=1e-11, abs=1e-11)


def test_a_prompt_that_comes_again_is_answered_the_same() -> None:
    """Behind a shared beginning that is longer than a window, from states that were kept."""
    made = config(layers=3, windows=(3, 0, 2), vocabulary=17)
    model = rc.Model(made, random_parameters(made, 0))
    token = np.random.default_rng(0).integers(0, 17, (6, 14)).astype(np.int32)
    token[:, :8] = token[0, :8]
    token[4] = token[1]
    told, length = np.array([9, 10, 9, 12, 10, 11]), np.full(6, 14)
    one = rc.Population(token, told, length, "recite", "test")
    corpus = rc.Corpus(token, populations={"first": one, "again": one})
    below = Below(2, {}, 2**30)
    for _ in range(2):
        found = measure(replace(model, parameters=Held(model, 3, 2, below)), corpus).populations
        assert below.bytes
        for n in range(6):
            want = rc.greedy(model, token[n : n + 1, : told[n]], int(14 - told[n]))[0]
            for name in corpus.populations:
                assert np.array_equal(found[name].said[n], want)


def test_every_product_has_one_thread() -> None:
    """With two threads BLAS may give other bits: what is read once is read as the batches are."""
    made = config(vocabulary=9)
    tokens = np.tile(np.arange(9), (3, 1))
    asked = Population(tokens, [6, 6, 7], [7, 8, 9], "answer", "test")
    seen = []
    forward = transformer.block_forward

    def spied(*a):
        seen.extend(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
        return forward(*a)

    with mock.patch.object(transformer, "block_forward", spied), threadpool_limits(2):
        decode.decode_population(made, random_parameters(made, 0), asked)
    assert seen and set(seen) == {1}


def test_frequencies_of_the_whole_length_are_not_shared() -> None:
    """By dynamic scaling the keys of a preamble turn with the length of what follows."""
    scaling = RopeScaling(kind="dynamic", factor=4.0, original=8)
    made = config(rope_scaling=scaling, vocabulary=9, head_width=4)  # the first never turns anew
    parameters = random_parameters(made, 1)
    tokens = np.tile(np.random.default_rng(0).integers(0, 9, 14), (3, 1))
    tokens[:, 9:] = np.random.default_rng(1).integers(0, 9, (3, 5))
    asked = Population(tokens, [11, 12, 12], [12, 13, 13], "answer", "test")
    assert prompts.shared_past(made, parameters, asked) == (0, ())
    for n, said in enumerate(decode.decode_population(made, parameters, asked)):
        prompt = tokens[n : n + 1, : asked.prompt_length[n]]
        want, _ = greedy_without_cache(made, parameters, prompt, 1)
        np.testing.assert_array_equal(said, want[0])


def test_rows_turn_by_their_own_length() -> None:
    """By dynamic scaling: each row is as long as was trained for, all together are longer."""
    scaling = RopeScaling(kind="dynamic", factor=4.0, original=8)
    made = config(rope_scaling=scaling, vocabulary=9, head_width=4)
    model = rc.Model(made, random_parameters(made, 1))
    tokens = np.random.default_rng(0).integers(0, 9, (3, 8))
    asked = Population(tokens, [5, 5, 6], [8, 7, 8], "answer", "test")
    got, said = suffix_nats(model, asked), decode.decode_population(made, model.parameters, asked)
    for n, row in enumerate(tokens):
        P, L = int(asked.prompt_length[n]), int(asked.length[n])
        z = rc.logits(model, row[None, : L - 1])[0, P - 1 :]
        want = np.logaddexp.reduce(z, axis=1) - z[np.arange(L - P), row[P:L]]
        assert got[n] == pytest.approx(want.sum(), rel=1e-11)
        alone, _ = greedy_without_cache(made, model.parameters, row[None, :P], L - P)
        np.testing.assert_array_equal(said[n], alone[0])
