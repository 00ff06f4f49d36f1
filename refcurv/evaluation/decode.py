"""Greedy decoding with a key-value cache: one batch of prompts, or a whole population."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.blas import one_blas_thread
from refcurv.evaluation.prompts import (
    Prompts,
    behind,
    from_position,
    prompts_of,
    shared,
    shared_past,
    turns_by_length,
)
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    as_integers,
    overflow_hint,
    require_dtype,
    require_finite,
    require_shape,
    require_token_ids,
)
from refcurv.law.conventions import HEAD_ROWS, NO_LABEL, shard_sequences
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig, Scaling
from refcurv.model.corpus import Population
from refcurv.model.given import require_model, require_whole
from refcurv.model.labels import shift_labels
from refcurv.model.layers import Layout
from refcurv.model.transformer import (
    Parameters,
    head_logits,
    layout_of,
    require_positions,
)
from refcurv.model.weights import Model
from refcurv.passes.forward import Reading, batchwise, each, final_states_each
from refcurv.passes.held import Held
from refcurv.passes.shards import BY_LENGTH

Result = TypeVar("Result")

MOST_STEPS = 2**31 - 1
"""Tokens that are decoded behind a prompt, at most: a position is an int32 everywhere."""


def greedy(model: Model, prompt: ArrayLike, steps: int) -> Array:
    """The `steps` tokens that the model continues each prompt with, each the likeliest next one.

    Definition
        y_n = argmax_v logits(prompt, y_0 .. y_{n-1})[last position, v]; lowest id on ties

    Each position is computed once: the blocks keep its keys and values for those that follow.

    Args:
        model: causal, of tokens; computes in its `dtype`.
        prompt: (B, P) token ids, P >= 1; no padding.
        steps: how many tokens to decode, >= 0; there is no stop token.

    Returns:
        (B, steps) int64.

    Raises:
        ConventionError: a model of images, or a bidirectional one.
        ShapeError, DTypeError: prompts that are not (B, P) integers.
        EmptyError: the prompts have no token.
        RangeError: a token outside the vocabulary, steps < 0, or more positions than were learned
            or than rotary frequencies are fixed for (dynamic, longrope).
        NonFiniteError: a logit is NaN or infinite: the argmax would mean nothing.

    Cost: (P + steps - 1) positions per sequence, and per step one copy of the keys and values.
    Source: METHOD, Recitation.
    Proof:  tests/test_decode.py::test_cached_equals_recomputed; ::test_ties_go_to_the_lowest_id
    """
    if require_model("greedy", model).config.image is not None:
        raise ConventionError("greedy: needs a model of tokens; this one reads images.")
    prompt_BP = as_integers("greedy", "prompt", prompt, (None, None), "(B, P)")
    require_whole("greedy", "steps", steps, 0, MOST_STEPS)
    parameters = Held(model, together=None)

    def choose(_: int, final_BD: Array) -> Array:
        return likeliest("greedy", model.config, parameters, final_BD)

    with one_blas_thread():
        return continued("greedy", model.config, parameters, prompt_BP, steps, choose)


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
    if prompt.shape[1] == 0:
        raise EmptyError(f"{who}: a prompt needs at least one token to continue; got none.")
    if steps < 0:
        raise RangeError(f"{who}: steps must be >= 0; got {steps}.")
    B, P = prompt.shape
    one = Prompts(prompt.astype(np.int64), np.full(B, P), np.full(B, steps))
    _require_prompts(who, config, one)
    if not B or not steps:
        return np.empty((B, steps), dtype=np.int64)
    return continued_each(config, parameters, [one], choose)[0]


def _require_prompts(who: str, config: ModelConfig, one: Prompts) -> None:
    """Refuse what cannot be continued by so many tokens."""
    require_token_ids(who, "prompt", one.token_BP, config.vocabulary)
    if not config.causal:
        raise ConventionError(f"{who}: only a causal model can be decoded from left to right.")
    end_B = one.length_B + one.steps_B - 1
    require_positions(who, int(end_B.max(initial=0)), config.learned_positions)
    for first, last in zip(one.length_B, end_B, strict=True):
        _require_one_turning(who, config, int(first), int(last))


def continued_each(
    config: ModelConfig,
    parameters: Parameters,
    prompts: Sequence[Prompts],
    choose: Callable[[int, Array], Array],
) -> list[Array]:
    """`continued` for several batches, which take each step together; each as far as its longest.

    Proof: tests/test_decode.py::test_population_rows_are_decoded_alone
    """
    out = [np.empty((len(one.length_B), one.steps), np.int64) for one in prompts]
    readings = {k: one.reading(config) for k, one in enumerate(prompts) if one.steps}
    for n in range(max(one.steps for one in prompts)):
        going = list(readings)
        finals = final_states_each(config, parameters, list(readings.values()))
        last = [
            final_BTD[:, -1] if n else prompts[k].last(final_BTD)
            for k, final_BTD in zip(going, finals, strict=True)
        ]
        chosen = each(parameters, last, partial(_at, choose, n))
        for k, chosen_B in zip(going, chosen, strict=True):
            out[k][:, n] = chosen_B
            past = readings.pop(k).past
            if past is not None and n + 1 < prompts[k].steps:
                readings[k] = prompts[k].next(chosen_B, n, past)
    return out


def _at(choose: Callable[[int, Array], Array], n: int, _: int, final_BD: Array) -> Array:
    return choose(n, final_BD)


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


PROMPTS = 64
"""Prompts that take a step together. A step reads all weights, and rows beside cost little."""


def _most(kind: str, T: int) -> int:
    """How many rows of T tokens pass together: a shard's; of prompts up to PROMPTS, in 8 shards."""
    if kind == "text":
        return shard_sequences(T)
    return max(shard_sequences(T), min(PROMPTS, shard_sequences(-(-T // 8))))


def batches(population: Population) -> list[Array]:
    """The rows of a population that pass together; a fixed rule, so that the bits are too.

    Rows in order of (prompt length, length, row). A batch takes rows as long as they fill a shard
    at most, max(1, 512 div T) of them, T the longest less what all prompts begin with; prompts up
    to 64 as long as they fill eight.

    Proof:  tests/test_decode.py::test_batches_partition_the_rows
    """
    order = np.lexsort((population.length, population.prompt_length))
    own = population.length[order] - shared(population)
    parts, begin = [], 0
    for end in range(1, len(order) + 1):
        more = own[begin : end + 1]
        if end == len(order) or len(more) > _most(str(population.kind), int(more.max())):
            parts.append(order[begin:end])
            begin = end
    return parts


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
    if population.kind != "text":  # the last token is only said
        token_BT, label_BT, real_BT = token_BT[:, :-1], label_BT[:, :-1], real_BT[:, :-1]
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
    them, so that no more logits exist at one time per thread. What all prompts begin with is read
    once.

    Proof:  tests/test_suite.py::test_text_is_the_naive_loop
    """

    def taken(_: int, found: tuple[Array, Array]) -> list[Result]:
        final_BTD, label_BT = found
        final_ND, label_N = final_BTD[label_BT >= 0], label_BT[label_BT >= 0]
        pieces = [slice(begin, begin + HEAD_ROWS) for begin in range(0, len(label_N), HEAD_ROWS)]
        return [take(head_logits(config, parameters, final_ND[p]), label_N[p]) for p in pieces]

    begin, past = shared_past(config, parameters, population)
    together = population.kind != "text" and not turns_by_length(config)

    def work(rows: list[Array]) -> list[list[Result]]:
        told = [teacher_forced(config, population, row) for row in rows]
        readings = [
            Reading(
                token_BT[:, begin:],
                from_position(layout, begin),
                behind(past, len(token_BT)) or None,
                token_BT[0, :begin],
                together,
                followed=False,
            )
            for token_BT, _, layout in told
        ]
        finals = final_states_each(config, parameters, readings)
        labels = [label_BT[:, begin:] for _, label_BT, _ in told]
        return each(parameters, list(zip(finals, labels, strict=True)), taken)

    found = batchwise(parameters, batches(population), work, done)
    return [one for part in found for one in part]


def by_item(population: Population, values: Array) -> Array:
    """(N,) the sum of each row's values, which come for every scored position as in `at_scored`."""
    order = np.concatenate(batches(population))
    tokens = (population.length - population.prompt_length)[order]
    return np.bincount(np.repeat(order, tokens), values, len(order))


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
    if population.kind != "text":
        for first, last in zip(population.prompt_length, population.length, strict=True):
            _require_one_turning(f"{who}: population {name!r}", config, int(first), int(last))
    real = np.arange(population.tokens.shape[1]) < population.length[:, None]
    token = np.where(real, population.tokens, 0)
    require_token_ids(who, f"tokens of population {name!r}", token, config.vocabulary)


def _require_one_turning(who: str, config: ModelConfig, first: int, last: int) -> None:
    """Refuse to decode from `first` to `last` positions where their frequencies change on the way.

    The keys of earlier positions would have to turn anew, by the frequencies of the longer text.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in BY_LENGTH:
        return
    settled = first > scaling.original and scaling.kind is Scaling.LONGROPE
    if last > max(first, scaling.original) and not settled:
        raise RangeError(
            f"{who}: {number_of(last, 'position')}, but with rope_scaling {str(scaling.kind)!r} "
            f"rotary frequencies change beyond {scaling.original}, also those of what was read "
            "before. Cut the sequences."
        )


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

    Rows go as through `greedy` in the `batches` of the population, several batches at a time; how
    many changes no bit. A batch is decoded as far as its longest row needs. What all prompts begin
    with is read once.

    Args:
        config: the model's shape.
        parameters: its parameters by name, all in memory or of one block (`passes.held`).
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

    def choose(_: int, final_BD: Array) -> Array:
        return likeliest("greedy", config, parameters, final_BD)

    steps = population.length - population.prompt_length
    begin, past = shared_past(config, parameters, population)

    def work(rows: list[Array]) -> list[Array]:
        prompts = [prompts_of(config, population, row, begin, past) for row in rows]
        for one in prompts:
            _require_prompts("greedy", config, one)
        return continued_each(config, parameters, prompts, choose)

    parts = batches(population)
    out: list[Array] = [np.empty(0, dtype=np.int64)] * len(population.tokens)
    for row, decoded in zip(parts, batchwise(parameters, parts, work, done), strict=True):
        for n, tokens in zip(row, decoded, strict=True):
            out[n] = tokens[: steps[n]]
    return out
