"""Each item of a population, graded: more than right or wrong, which one token decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refcurv.curvature import room
from refcurv.evaluation.decode import (
    at_scored,
    batches,
    by_item,
    decode_population,
    require_population,
    suffixes,
)
from refcurv.evaluation.held import held
from refcurv.evaluation.metrics import edit_distances
from refcurv.law.checks import (
    Array,
    EmptyError,
    RoomError,
    ShapeError,
    as_integers,
    overflow_hint,
    require_finite,
)
from refcurv.law.words import number_of
from refcurv.model.corpus import Population
from refcurv.model.given import (
    require_callable,
    require_list,
    require_model,
    require_text,
    require_whole,
)
from refcurv.model.loss import cross_entropy
from refcurv.model.transformer import Parameters
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, silent, size


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """What a model does with each of N items; every array is in the population's order.

    Fields:
        tokens: (N,), how many are asked for.
        nats: (N,) [nats], Σ −log p of the true tokens, each given those before it.
        right: (N,), at how many of them the likeliest token is the true one.
        rank: (N,), the mean over them of the true token's place among all, 1 for the likeliest.
        said: the greedy continuation of each prompt, as many tokens as are asked for; None for a
            population of kind `text`.
        distance: (N,), their Levenshtein distance from the true ones, in tokens; None likewise.
    """

    tokens: Array
    nats: Array
    right: Array
    rank: Array
    said: tuple[Array, ...] | None
    distance: Array | None

    @property
    def strict(self) -> Array:
        """(N,) bool: is every token right?  Decoding then says the true ones."""
        return np.asarray((self.right == self.tokens) & (self.tokens > 0))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each item as plain values."""
        for n in range(len(self.tokens)):
            row: dict[str, Any] = {
                "tokens": int(self.tokens[n]), "nats": float(self.nats[n]),
                "right": int(self.right[n]),
                "rank": float(self.rank[n]) if self.tokens[n] else None,
            }  # fmt: skip
            if self.said is not None and self.distance is not None:
                row |= {"strict": bool(self.strict[n]), "distance": int(self.distance[n]),
                        "said_ids": self.said[n].tolist()}  # fmt: skip
            yield row


def items(
    model: Model,
    population: Population,
    *,
    said: Sequence[Array] | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Items:
    """Every item of a population of tokens, graded.

    Definition
        z_t = logits(tokens before t)           t = prompt_length .. length − 1, y_t the true token
        nats = Σ_t logsumexp(z_t) − z_t[y_t]
        rank = mean_t 1 + #{v : z_t[v] > z_t[y_t]} + #{v < y_t : z_t[v] = z_t[y_t]}
        right = #{t : rank_t = 1}, so that ties go to the lowest id, as in decoding
        said = the greedy continuation of tokens[: prompt_length]

    Where all are right, decoding says the true tokens, and it is not done again.

    Args:
        model: causal, of tokens; computes in its `dtype`, nats add up in float64.
        population: of any kind of tokens; of `text`, nothing is decoded.
        said: the model's greedy continuations, where they are known: they are not decoded again.
        memory: bytes that the process may take, as for `rc.evaluate`; by default what is free.
        progress: called with (batches done, batches).

    Returns:
        Items. An item without a token to ask for has rank NaN.

    Raises:
        ConventionError: images, a model of images, or a bidirectional one. RangeError: a token
            outside the vocabulary, or more positions than were learned.
        NonFiniteError: a logit is NaN or infinite. RoomError: as `rc.evaluate`.

    Cost: one forward pass over the population's tokens, and one over those not all right.
    Source: METHOD, Recitation; METHOD, Perplexity.
    Proof:  tests/test_graded.py::test_by_definition, ::test_what_is_said_is_what_is_decoded
    """
    require_model("items", model)
    require_text("items", "the population", population)
    require_callable("items", "progress", progress)
    said = None if said is None else _known("items", said, population)
    require_population("items", population.kind, population, model.config)
    parameters, parts = held("items", model, [population], memory), batches(population)
    progress(0, len(parts))
    done = counter(progress, len(parts))
    found = at_scored(model.config, parameters, population, _grades, done)
    tokens = (population.length - population.prompt_length).astype(np.int64)
    nats, rank, right = (
        by_item(population, np.concatenate([np.empty(0), *(one[k] for one in found)]))
        for k in range(3)
    )
    with np.errstate(invalid="ignore"):
        grades = Items(tokens, nats, right.astype(np.int64), rank / tokens, None, None)
    if population.kind == "text":
        return grades
    if said is None:
        said = _said(model, parameters, population, ~grades.strict)
    distance = np.array([d for d, _ in edit_distances(said, suffixes(population))])
    return replace(grades, said=tuple(said), distance=distance)


def _known(who: str, said: Sequence[Array], population: Population) -> list[Array]:
    """Continuations that the caller knows, each of as many tokens as are asked for."""
    each = require_list(who, "said", said, "[[5, 2], [3, 1]], a list for each item")
    asked = population.length - population.prompt_length
    if len(each) != len(asked):
        rows = number_of(len(asked), "item")
        raise ShapeError(f"{who}: said must have one list for each of {rows}; got {len(each)}.")
    return [
        as_integers(who, f"said[{n}]", one, (int(count),), "one token for each that is asked for")
        for n, (one, count) in enumerate(zip(each, asked, strict=True))
    ]


def _grades(logit_NV: Array, label_N: Array) -> tuple[Array, Array, Array]:
    """Nats, rank and whether it is 1, of each position, in float64."""
    require_finite("items", "the logits", logit_NV, overflow_hint(logit_NV.dtype))
    true_N1 = np.take_along_axis(logit_NV, label_N[:, None], axis=1)
    ahead_NV = (logit_NV > true_N1) | (
        (logit_NV == true_N1) & (np.arange(logit_NV.shape[1]) < label_N[:, None])
    )
    rank_N = 1.0 + ahead_NV.sum(axis=1)
    return cross_entropy(logit_NV, label_N)[0].astype(np.float64), rank_N, (rank_N == 1) * 1.0


def _said(
    model: Model, parameters: Parameters, population: Population, wrong: Array
) -> list[Array]:
    """The true suffix of each item, or where something is wrong what is decoded."""
    said = suffixes(population)
    if wrong.any():
        some = _of(population, np.flatnonzero(wrong))
        for n, tokens in zip(
            np.flatnonzero(wrong),
            decode_population(model.config, parameters, some),
            strict=True,
        ):
            said[n] = tokens
    return said


def _of(population: Population, rows: Array) -> Population:
    names = ("tokens", "prompt_length", "length")
    return replace(population, **{name: getattr(population, name)[rows] for name in names})


# ------------------------------------------------------------------ the control


def _require_room(model: Model, rows: int, length: int) -> None:
    """Refuse what memory does not hold: ids, three times, and keys and values of one row."""
    config, free = model.config, room.available()
    pair = 2 * config.layers * config.kv_heads * config.head_width * np.dtype(model.dtype).itemsize
    need = length * (12 * rows + pair)
    if free is not None and need > free:
        raise RoomError(
            f"own_continuations: {number_of(rows, 'row')} of {number_of(length, 'token')} take "
            f"{size(need)}, and {size(free)} are free. Give a smaller count, or fewer texts."
        )


def own_continuations(
    model: Model,
    text: Population,
    *,
    prompt: int = 32,
    count: int = 16,
    progress: Progress = silent,
) -> Population:
    """What a model itself says behind the beginnings of texts: a control of recitation.

    An edit that takes recited text away moves other greedy continuations too: any damage does. So
    what it leaves of these, which nobody memorised, is what fragility alone takes.

    Definition
        tokens = the first `prompt` of a row, then `count` of the greedy continuation

    Args:
        model: the unedited one.
        text: clean text, of kind `text`; rows shorter than `prompt` are left out.
        prompt: tokens that are given, >= 1.
        count: tokens that are decoded, >= 1.
        progress: called with (batches done, batches).

    Returns:
        Population of kind `recite` and of the text's split; the model recites all of it.

    Raises:
        EmptyError: no row is so long. RangeError: prompt or count < 1. RoomError: memory does not
        hold what would be decoded. Others as `items`.

    Cost: one forward pass over the prompts and what is said.
    Source: METHOD, Controls.
    Proof:  tests/test_graded.py::test_a_model_recites_its_own_continuations,
        ::test_continuations_that_memory_does_not_hold
    """
    require_model("own_continuations", model)
    require_text("own_continuations", "the text", text)
    require_callable("own_continuations", "progress", progress)
    for what, value in (("prompt", prompt), ("count", count)):
        require_whole("own_continuations", what, value, 1)
    rows = np.flatnonzero(text.length >= prompt)
    if not len(rows):
        raise EmptyError(
            f"own_continuations: no row has {number_of(prompt, 'token')}; the longest has "
            f"{text.length.max()}. Give a smaller `prompt`, or longer texts."
        )
    _require_room(model, len(rows), prompt + count)
    given = np.zeros((len(rows), prompt + count), np.int32)
    given[:, :prompt] = text.tokens[rows, :prompt]
    prompts, lengths = (np.full(len(rows), n, np.int32) for n in (prompt, prompt + count))
    asked = Population(given, prompts, lengths, "recite", text.split)
    require_population("own_continuations", "text", asked, model.config)
    parts = batches(asked)
    progress(0, len(parts))
    done: Callable[[], object] = counter(progress, len(parts))
    given[:, prompt:] = decode_population(
        model.config, held("own_continuations", model, [asked]), asked, done
    )
    return replace(asked, tokens=given)
