"""Greedy decoding with a key-value cache: one batch of prompts, or a whole population."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    overflow_hint,
    require_dtype,
    require_finite,
    require_shape,
    require_token_ids,
)
from refcurv.law.conventions import HEAD_ROWS, NO_LABEL, shard_sequences
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Population
from refcurv.model.labels import shift_labels
from refcurv.model.layers import Layout
from refcurv.model.transformer import (
    KeysAndValues,
    Parameters,
    forward,
    head_logits,
    layout_of,
    require_positions,
)
from refcurv.passes import parallel
from refcurv.passes.fast import FAST
from refcurv.passes.forward import final_states

Result = TypeVar("Result")


def greedy(config: ModelConfig, parameters: Parameters, prompt: Array, steps: int) -> Array:
    """The `steps` tokens that the model continues each prompt with, each the likeliest next one.

    Definition
        y_n = argmax_v logits(prompt, y_0 .. y_{n-1})[last position, v]; lowest id on ties

    Each position is computed once: the blocks keep its keys and values for those that follow.

    Args:
        config: the model's shape.
        parameters: its parameters by name, in the dtype to compute in.
        prompt: (B, P) token ids, P >= 1; no padding.
        steps: how many tokens to decode, >= 0; there is no stop token.

    Returns:
        (B, steps) int64.

    Raises:
        EmptyError: the prompts have no token.
        RangeError: a token outside the vocabulary, or steps < 0.
        NonFiniteError: a logit is NaN or infinite: the argmax would mean nothing.

    Cost: (P + steps - 1) positions per sequence, and per step one copy of the keys and values.
    Source: METHOD, Recitation.
    Proof:  tests/test_decode.py::test_cached_equals_recomputed; ::test_ties_go_to_the_lowest_id
    """

    def choose(_: int, final_BD: Array) -> Array:
        return likeliest("greedy", config, parameters, final_BD)

    return continued("greedy", config, parameters, prompt, steps, choose)


def continued(
    who: str,
    config: ModelConfig,
    parameters: Parameters,
    prompt: Array,
    steps: int,
    choose: Callable[[int, Array], Array],
) -> Array:
    """(B, steps) tokens, the n-th of each row chosen by `choose(n, final_BD)` from what precedes.

    final_BD is what the head reads at the last position. Arguments, errors and cost as `greedy`.

    Proof:  tests/test_decode.py::test_cached_equals_recomputed;
            tests/validation/test_coherence.py::test_samples_are_drawn_from_the_recomputed_distribution
    """
    require_shape(who, "prompt", prompt, (None, None), "(B, P)")
    require_dtype(who, "prompt", prompt, "iu", "integer token ids")
    require_token_ids(who, "prompt", prompt, config.vocabulary)
    if prompt.shape[1] == 0:
        raise EmptyError(f"{who}: a prompt needs at least one token to continue; got none.")
    if steps < 0:
        raise RangeError(f"{who}: steps must be >= 0; got {steps}.")
    if not config.causal:
        raise ConventionError(f"{who}: only a causal model can be decoded from left to right.")
    require_positions(who, prompt.shape[1] + steps - 1, config.learned_positions)
    out_BN = np.empty((len(prompt), steps), dtype=np.int64)
    if not len(prompt):
        return out_BN
    cache: list[KeysAndValues | None] = [None] * config.layers
    token_BT, begin = prompt.astype(np.int64), 0
    for n in range(steps):
        final_BD = _advance(config, parameters, token_BT, begin, cache)
        out_BN[:, n] = choose(n, final_BD)
        begin += token_BT.shape[1]
        token_BT = out_BN[:, n : n + 1]
    return out_BN


def _advance(
    config: ModelConfig,
    parameters: Parameters,
    token_BT: Array,
    begin: int,
    cache: list[KeysAndValues | None],
) -> Array:
    """Positions begin .. begin + T - 1 through every block, (B, D) at the last; grows `cache`."""
    B, T = token_BT.shape
    position_BT = np.tile(np.arange(begin, begin + T), (B, 1))
    layout = Layout(position_BT, np.zeros_like(position_BT), position_BT)
    final_BTD, _ = forward(config, parameters, token_BT, layout, FAST, config.layers, cache)
    return np.asarray(final_BTD[:, -1])


def likeliest(who: str, config: ModelConfig, parameters: Parameters, final_BD: Array) -> Array:
    """(B,) id of each row's largest logit, the lowest on ties; HEAD_ROWS rows at a time.

    Raises NonFiniteError for a logit that is NaN or infinite: the largest would mean nothing.
    """
    out_B = np.empty(len(final_BD), dtype=np.int64)
    for begin in range(0, len(final_BD), HEAD_ROWS):
        chunk = slice(begin, begin + HEAD_ROWS)
        logit_NV = head_logits(config, parameters, final_BD[chunk])
        require_finite(who, "the logits", logit_NV, overflow_hint(logit_NV.dtype))
        out_B[chunk] = logit_NV.argmax(axis=-1)
    return out_B


def batches(population: Population) -> list[Array]:
    """The rows of a population that are decoded together; a fixed rule, so that the bits are too.

    Rows in order of (prompt length, length, row); one batch holds rows of one prompt length, at
    most shard_sequences(T) of them, T the population's width. Padding is thus never needed.

    Proof:  tests/test_decode.py::test_batches_partition_the_rows
    """
    size = shard_sequences(population.tokens.shape[1])
    order = np.lexsort((population.length, population.prompt_length))
    cuts = np.flatnonzero(np.diff(population.prompt_length[order])) + 1
    return [
        group[begin : begin + size]
        for group in np.split(order, cuts)
        for begin in range(0, len(group), size)
    ]


def teacher_forced(
    config: ModelConfig, population: Population, row: Array
) -> tuple[Array, Array, Layout]:
    """Some rows as the model reads them when it is told the truth: (tokens, labels, layout).

    Columns behind the longest row are cut off, padding becomes id 0 and is never attended.
    labels[b, t] is token t + 1 where that lies in [prompt_length, length), NO_LABEL elsewhere: the
    labelled positions are prompt_length - 1 .. length - 2.

    Proof:  tests/test_decode.py::test_teacher_forced_scores_the_suffix
    """
    length_B1 = population.length[row][:, None]
    index_T = np.arange(int(length_B1.max()))
    real_BT = index_T < length_B1
    token_BT = np.where(real_BT, population.tokens[row, : len(index_T)], 0).astype(np.int64)
    label_BT = shift_labels(token_BT, real_BT, np.zeros_like(token_BT))
    label_BT[index_T < population.prompt_length[row][:, None] - 1] = NO_LABEL
    return token_BT, label_BT, layout_of(config, real_BT, np.zeros_like(token_BT))


def at_scored(
    config: ModelConfig,
    parameters: Parameters,
    population: Population,
    take: Callable[[Array, Array], Result],
    done: Callable[[], object] = lambda: None,
) -> list[Result]:
    """What `take(logits (N, V), labels (N,))` makes of every scored position, in pieces.

    Positions come in the order of `batches`, row by row in each; a piece has at most HEAD_ROWS of
    them, so that no more logits exist at one time per thread.

    Proof:  tests/test_suite.py::test_text_is_the_naive_loop
    """

    def work(_: int, row: Array) -> list[Result]:
        token_BT, label_BT, layout = teacher_forced(config, population, row)
        scored_BT = label_BT >= 0
        final_ND = final_states(config, parameters, token_BT, layout)[scored_BT]
        label_N = label_BT[scored_BT]
        pieces = [slice(begin, begin + HEAD_ROWS) for begin in range(0, len(label_N), HEAD_ROWS)]
        return [take(head_logits(config, parameters, final_ND[p]), label_N[p]) for p in pieces]

    return [one for part in parallel.run(batches(population), work, done=done) for one in part]


def require_population(who: str, name: str, population: Population, config: ModelConfig) -> None:
    """Refuse token sequences that the model cannot read or be judged on; padding may hold any id.

    Raises:
        ConventionError: the model reads images, or is bidirectional: it would be told what is asked
        for. RangeError: a token outside the vocabulary, or more positions than the model has.
    """
    if config.image is not None:
        raise ConventionError(f"{who}: population {name!r} has tokens, but the model reads images.")
    if not config.causal:
        raise ConventionError(
            f"{who}: population {name!r} asks for next tokens, which a bidirectional model sees."
        )
    longest = int(population.length.max()) - (population.kind != "text")  # the last is only said
    require_positions(f"{who}: population {name!r}", longest, config.learned_positions)
    real = np.arange(population.tokens.shape[1]) < population.length[:, None]
    token = np.where(real, population.tokens, 0)
    require_token_ids(who, f"tokens of population {name!r}", token, config.vocabulary)


def suffixes(population: Population) -> list[Array]:
    """Each row's own continuation: the tokens from prompt_length up to length, without padding."""
    bounds = zip(population.tokens, population.prompt_length, population.length, strict=True)
    return [row[begin:end].astype(np.int64) for row, begin, end in bounds]


def decode_population(
    config: ModelConfig,
    parameters: Parameters,
    population: Population,
    done: Callable[[], object] = lambda: None,
) -> list[Array]:
    """Every row's prompt, continued greedily by exactly length - prompt_length tokens.

    Rows go through `greedy` in the `batches` of the population, several batches at a time; the
    number of threads changes no bit. A batch is decoded as far as its longest row needs.

    Args:
        config: the model's shape.
        parameters: its parameters by name, all in memory.
        population: prompts, and how much is to follow each; only the prompts are read.
        done: called once per finished batch (a progress bar's update).

    Returns:
        One int64 array per row, in the population's order, of length - prompt_length ids.

    Raises:
        EmptyError, RangeError, NonFiniteError: as `greedy`.

    Cost: one forward pass over the population's tokens, plus a copy of the cache per step.
    Source: METHOD, Files (populations).
    Proof:  tests/test_decode.py::test_population_rows_are_decoded_alone;
            tests/test_decode.py::test_padding_and_suffix_are_never_read
    """
    steps = population.length - population.prompt_length

    def work(_: int, row: Array) -> Array:
        prompt = population.tokens[row, : int(population.prompt_length[row[0]])]
        return greedy(config, parameters, prompt, int(steps[row].max()))

    parts = batches(population)
    out: list[Array] = [np.empty(0, dtype=np.int64)] * len(population.tokens)
    for row, decoded in zip(parts, parallel.run(parts, work, done=done), strict=True):
        for n, tokens in zip(row, decoded, strict=True):
            out[n] = tokens[: steps[n]]
    return out
