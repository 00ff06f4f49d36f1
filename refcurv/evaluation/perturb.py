"""Position perturbation: is recitation gone, or does another prompt still bring it out?

A memorised text that an edit has hidden may come back when its prompt is cut elsewhere (Huang et
al. 2024). Each item is asked again with other prompts, and the best answer counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refcurv.evaluation.decode import suffixes
from refcurv.evaluation.items import decoded_rows, require_decoded
from refcurv.law.checks import Array
from refcurv.model.corpus import Population
from refcurv.model.given import require_whole
from refcurv.model.weights import Model
from refcurv.progress import Progress, silent


@dataclass(frozen=True, slots=True, eq=False)
class Perturbation:
    """How many tokens of each suffix are recited in a row, after its own prompt and after others.

    Fields:
        t: how far prompts were moved.
        original: (N,) int64, the match after the item's own prompt.
        stressed: (N,) int64, the largest match over its variants.
        variants: (N,) int64, how many variants there are; the item's own prompt is not one.
    """

    t: int
    original: Array
    stressed: Array
    variants: Array

    @property
    def mean_original(self) -> float:
        """Mean over items."""
        return float(self.original.mean())

    @property
    def mean_stressed(self) -> float:
        """Mean over items."""
        return float(self.stressed.mean())

    def to_json(self) -> dict[str, Any]:
        """The fields and the means as plain JSON values."""
        per_item = ("original", "stressed", "variants")
        arrays = {name: getattr(self, name).tolist() for name in per_item}
        means = {name: getattr(self, name) for name in ("mean_original", "mean_stressed")}
        return {"t": self.t, **means, **arrays}


def perturbation(
    model: Model,
    population: Population,
    t: int,
    *,
    progress: Progress = silent,
) -> Perturbation:
    """The longest match of each item with and without position perturbation.

    Definition
        An item has the prompt x_1 .. x_n and the suffix x_{n+1} .. x_{n+L}. Its variants:

            longer    x_1 .. x_{n+i}          i = 1 .. min(t, L)       truth x_{n+i+1} ..
            window    x_{n-w+1} .. x_n        w = t + 1 .. n − 1       truth x_{n+1} ..

        The score of a prompt is the number of tokens of its greedy continuation that equal the
        truth before the first that does not. stressed is the largest score over the variants,
        original that of x_1 .. x_n alone.

    A prompt with n <= t + 1 has no windows. The variant i = L is the whole text: it counts, with
    score 0 by definition, and nothing is decoded. With t >= 1 and L >= 1 there is always a variant.
    A window is a text of its own: its positions begin at 0, and it lacks a token that starts every
    prompt.

    Args:
        model: computes in its `dtype`.
        population: of kind `recite` or `answer`.
        t: >= 1; 20 in the paper, for n = 64 and L = 48.
        progress: called with (batches done, batches).

    Returns:
        Perturbation, per item in the population's order.

    Raises:
        RangeError: t is not an integer >= 1; a token outside the vocabulary, or more positions
            than were learned.
        ConventionError: a population of kind `text` or of images; a model that is bidirectional or
            reads images.
        NonFiniteError: a logit is NaN or infinite.

    Cost: 1 + min(t, L) + max(0, n − 1 − t) texts an item, decoded as `decode_population`.
    Source: METHOD, Position perturbation; Huang et al. 2024.
    Proof:  tests/test_perturb.py::test_every_prompt_literally; ::test_by_hand; ::test_edges
    """
    t = require_whole("perturbation", "t", t, 1)
    require_decoded("perturbation", model, population)
    asked, item = _prompts(population, t)
    score = _matches(decoded_rows(model, asked, progress), suffixes(asked))
    N = len(population.tokens)
    original, stressed = score[:N].copy(), np.zeros(N, dtype=np.int64)
    np.maximum.at(stressed, item[N:], score[N:])
    n, L = _lengths(population)
    variants = np.minimum(t, L) + np.maximum(0, n - 1 - t)
    for array in (original, stressed, variants):
        array.flags.writeable = False
    return Perturbation(int(t), original, stressed, variants)


def _lengths(population: Population) -> tuple[Array, Array]:
    """(n, L) of each item, int64."""
    n = population.prompt_length.astype(np.int64)
    return n, population.length - n


def _prompts(population: Population, t: int) -> tuple[Population, Array]:
    """Rows to decode, and the item of each row: first the N own prompts, then the variants."""
    sizes = list(enumerate(zip(*map(np.ndarray.tolist, _lengths(population)), strict=True)))
    cuts = [(item, 0, n) for item, (n, _) in sizes]
    cuts += [(item, begin, end) for item, (n, L) in sizes for begin, end in _variants(n, L, t)]
    item, begin, end = np.array(cuts).T
    length = population.length[item] - begin
    tokens = np.zeros((len(cuts), int(length.max())), dtype=np.int32)
    for row, source, first, size in zip(tokens, item, begin, length, strict=True):
        row[:size] = population.tokens[source, first : first + size]
    return Population(tokens, end - begin, length, population.kind, population.split), item


def _variants(n: int, L: int, t: int) -> Iterator[tuple[int, int]]:
    """The prompts tokens[begin:end] of an item's variants, without the whole text."""
    yield from ((0, n + i) for i in range(1, min(t, L) + 1) if i < L)
    yield from ((n - w, n) for w in range(t + 1, n))


def _matches(decoded: Sequence[Array], truth: Sequence[Array]) -> Array:
    """(N,) int64: how many tokens are equal before the first that differs."""
    rows = [np.append(said != true, True) for said, true in zip(decoded, truth, strict=True)]
    return np.array([int(np.argmax(row)) for row in rows], dtype=np.int64)
