"""Prompts that are continued together: of unequal lengths, behind what all of them begin with.

Prompts are padded on the right while they are read. Then the keys and values of each row move to
the right end, so that the next token's key stands behind them in every row: what a position sees is
a run of keys, as `Layout` needs it. What all prompts of a population begin with is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Population
from refcurv.model.layers import Layout
from refcurv.model.transformer import KeysAndValues, Parameters
from refcurv.passes.forward import Reading, batchwise, final_states_each
from refcurv.passes.shards import BY_LENGTH

Past = Sequence[KeysAndValues]
"""Of each block the keys and values (1, S, K, E) of the S tokens that all rows begin with."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Some prompts, and how much is to follow each.

    Fields: token_BP, what lies behind length_B is 0; steps_B; past, of the first `begin` tokens,
    which all rows share and which are not read again: begin < length_B; side_by_side as for
    `Reading`.
    """

    token_BP: Array
    length_B: Array
    steps_B: Array
    begin: int = 0
    past: Past = ()
    side_by_side: bool = False

    @property
    def steps(self) -> int:
        """The most that is to follow a prompt."""
        return int(self.steps_B.max(initial=0))

    def reading(self, config: ModelConfig) -> Reading:
        """The prompts from `begin` on, as the model reads them."""
        index_T = np.arange(self.begin, self.token_BP.shape[1])
        real_BT = index_T < self.length_B[:, None]
        position_BT, last_BT = np.where(real_BT, index_T, 0), np.where(real_BT, index_T, -1)
        layout = Layout(position_BT, np.zeros_like(position_BT), last_BT)
        past = behind(self.past, len(self.length_B)) or [None] * config.layers
        told_S = self.token_BP[0, : self.begin]
        return Reading(self.token_BP[:, self.begin :], layout, past, told_S, self.side_by_side)

    def last(self, final_BTD: Array) -> Array:
        """(B, D) of the last token of each prompt, from what `reading` comes to."""
        return np.asarray(final_BTD[np.arange(len(final_BTD)), self.length_B - self.begin - 1])

    def next(self, token_B: Array, n: int, past: list[KeysAndValues | None]) -> Reading:
        """The n-th tokens behind the prompts, n from 0, as the model reads them.

        A row that has all its tokens goes on at its last position. Nobody reads what it says.
        """
        width = self.token_BP.shape[1]
        if n == 0:
            past[:] = [self._to_the_right(kept) for kept in past if kept is not None]
        at_B = np.maximum(self.length_B + np.minimum(n, self.steps_B - 2), 0)
        first_B = width - self.length_B
        layout = Layout(at_B[:, None], first_B[:, None], np.full((len(at_B), 1), width + n))
        return Reading(token_B[:, None], layout, past, side_by_side=self.side_by_side)

    def _to_the_right(self, kept: KeysAndValues) -> KeysAndValues:
        """Keys and values whose last real position is the last of the row; zeros before them."""
        width = self.token_BP.shape[1]
        if (self.length_B == width).all():
            return kept
        out = np.zeros_like(kept[0]), np.zeros_like(kept[1])
        for moved, x_BSKE in zip(out, kept, strict=True):
            for b, length in enumerate(self.length_B):
                moved[b, width - length :] = x_BSKE[b, :length]
        return out


def prompts_of(
    config: ModelConfig, population: Population, row: Array, begin: int, past: Past
) -> Prompts:
    """Some prompts of a population; past is that of its first `begin` tokens."""
    length_B = population.prompt_length[row].astype(np.int64)
    index_P = np.arange(int(length_B.max()))
    token_BP = np.where(index_P < length_B[:, None], population.tokens[row, : len(index_P)], 0)
    steps_B = population.length[row].astype(np.int64) - length_B
    token_BP, together = token_BP.astype(np.int64), not turns_by_length(config)
    return Prompts(token_BP, length_B, steps_B, begin, past, together)


def turns_by_length(config: ModelConfig) -> bool:
    """Do rotary frequencies depend on how long a row is in all?"""
    return config.rope_scaling is not None and config.rope_scaling.kind in BY_LENGTH


def from_position(layout: Layout, begin: int) -> Layout:
    """The layout of the positions from `begin` on; those before it are in the past."""
    return Layout(
        layout.position_BT[:, begin:], layout.first_BT[:, begin:], layout.last_BT[:, begin:]
    )


def behind(past: Past, rows: int) -> list[KeysAndValues | None]:
    """The same keys and values for so many rows, without a copy."""
    return [
        (np.broadcast_to(k, (rows, *k.shape[1:])), np.broadcast_to(v, (rows, *v.shape[1:])))
        for k, v in past
    ]


def shared(population: Population) -> int:
    """How many tokens all prompts begin with. The last one of a prompt is not among them.

    Proof: tests/test_prompts.py::test_what_is_shared_by_hand
    """
    if len(population.tokens) < 2:
        return 0
    least = int(population.prompt_length.min()) - 1
    same_T = (population.tokens[:, :least] == population.tokens[:1, :least]).all(axis=0)
    return int(np.argmin(np.append(same_T, False)))


def shared_length(config: ModelConfig, population: Population) -> int:
    """How many tokens are read once for all rows.

    None where rotary frequencies depend on the whole length, which these tokens do not know.
    """
    return 0 if turns_by_length(config) else shared(population)


def shared_past(
    config: ModelConfig, parameters: Parameters, population: Population
) -> tuple[int, Past]:
    """How many tokens are read once for all rows, and their keys and values."""
    count = shared_length(config, population)
    if not count:
        return 0, ()
    token = population.tokens[:1, :count].astype(np.int64)
    alone = Prompts(token, np.array([count]), np.array([0]))
    reading = alone.reading(config)
    batchwise(parameters, [reading], partial(final_states_each, config, parameters))
    return count, [kept for kept in reading.past or () if kept is not None]
