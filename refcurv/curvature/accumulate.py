"""Sums over shards: several in flight, one order (SHARD, BLOCK), a checkpoint from time to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from refcurv.algebra import gram
from refcurv.curvature.moments import HALF, Key, PassSum, RunningSum, Side
from refcurv.law.checks import Array
from refcurv.law.conventions import BLOCK_SHARDS
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.transformer import Tap
from refcurv.passes.parallel import Turnstile, stream
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep
from refcurv.progress import Progress, counter


class ShardSums:
    """The products of one shard (COUNTS): made in the compute dtype, added in float64.

    A product is complete when the rows of the next layer or of the next pass come. With one
    backward pass it is then added to the running sum. With several passes, G is first added over
    the passes of the shard, and that sum joins the running sum at the end. Each addition waits for
    its turn, so that shards in flight are added in their order.
    """

    def __init__(
        self,
        config: ModelConfig,
        sums: Mapping[Key, RunningSum],
        turnstile: Turnstile,
        ordinal: int,
        job: Sweep,
    ) -> None:
        self._config, self._sums, self._turnstile = config, sums, turnstile
        self._ordinal, self._job = ordinal, job
        self._open: dict[Key, tuple[Array, int]] = {}
        self._passes: dict[Key, PassSum] = {}
        self._spare: dict[tuple[int, np.dtype], list[Array]] = {}
        self._at = (-1, "")
        self._input: tuple[str, Array] | None = None

    def take(self, number: int, tap: Tap) -> None:
        """Add a layer's kept rows; an input that the previous layer read too is added once."""
        if (number, tap.name) != self._at:
            self._complete()
            self._at = (number, tap.name)
        self._add_gram(Key(Side.G, tap.name), tap.g)
        read = self._config.input_of(tap.name)
        # in some models attention and MLP read one array, and each has its own sum of it
        known = self._input is not None and self._input[0] == read and self._input[1] is tap.a
        if number == 0 and not known:
            self._input = (read, tap.a)
            if tap.name in TABLES:
                entries = self._config.tables()[tap.name][1]
                self._add(Key(Side.A, read), np.bincount(tap.a, minlength=entries), len(tap.a))
                return
            self._add_gram(Key(Side.A, read), tap.a)
            if Key(Side.a, read) in self._sums:
                self._add(Key(Side.a, read), tap.a.sum(axis=0), len(tap.a))

    def _add(self, key: Key, sum_X: Array, rows: int) -> None:
        before = self._open.get(key, (np.zeros_like(sum_X), 0))
        self._open[key] = (before[0] + sum_X, before[1] + rows)

    def _add_gram(self, key: Key, x_NX: Array) -> None:
        rows, size = x_NX.shape
        if key in self._open:
            product, before = self._open[key]
            self._open[key] = (add_gram(x_NX, product, onto=True), before + rows)
            return
        spare = self._spare.get((size, x_NX.dtype))
        product = spare.pop() if spare else np.empty((size, size), x_NX.dtype)
        self._open[key] = (add_gram(x_NX, product, onto=False), rows)

    def _complete(self) -> None:
        """Every open product goes where it belongs; a matrix's memory serves the next."""
        for key, (product, rows) in self._open.items():
            if key.side is not Side.G or self._job.one_pass:
                self._join(key, product, rows)
            else:
                if key not in self._passes:
                    self._passes[key] = PassSum(len(product), self._job.draws)
                self._passes[key].add(product, rows)
            if product.ndim == 2:
                self._spare.setdefault((len(product), product.dtype), []).append(product)
        self._open.clear()

    def finish(self) -> None:
        """Fold what is left: the last product, and the sums over several passes."""
        self._complete()
        for key, passes in self._passes.items():
            self._join(key, passes.sum, passes.rows * self._job.draws, passes.variance())
        self._passes.clear()

    def _join(self, key: Key, product: Array, rows: int, variance: Array | float = 0.0) -> None:
        """The sum of one shard joins those before it, when its turn comes; of odd ones twice."""
        with self._turnstile.turn(key, self._ordinal) as due:
            if due:
                self._sums[key].add(product, rows, variance)
        half = Key(HALF.get(key.side, key.side), key.name)
        if half != key and half in self._sums:
            with self._turnstile.turn(half, self._ordinal) as due:
                if due and self._ordinal % 2:
                    self._sums[half].add(product, rows)


def add_gram(x_NX: Array, product_XX: Array, *, onto: bool) -> Array:
    """The product with xᵀ x added `onto` it, by lower triangle; it is used up.

    In its dtype; from the first rows on whose squares would vanish in it, in float64 (PRECISION):
    where no square is N X times the smallest normal number, what was lost could be seen.
    """
    none_before = not (onto and product_XX.diagonal().any())
    gram.add_gram(x_NX.astype(product_XX.dtype, copy=False), product_XX, onto=onto)
    seen = x_NX.size * np.finfo(product_XX.dtype).smallest_normal
    small = product_XX.dtype != np.float64 and product_XX.diagonal().max(initial=0) < seen
    if not (small and none_before and x_NX.any()):
        return product_XX
    wide_XX = np.empty(product_XX.shape)
    gram.add_gram(x_NX.astype(np.float64), wide_XX, onto=False)
    return wide_XX


# ------------------------------------------------------------------ over the shards


class Place(NamedTuple):
    """How far a run has come: blocks that are closed, and shards of the next one.

    Fields: blocks; shards, those that every sum has; passed, how many each sum has.
    """

    blocks: int
    shards: int
    passed: Mapping[Any, int]


class Resume(Protocol):
    """Where a run puts its sums from time to time, and goes on from (`checkpoint.Checkpoint`)."""

    def load(self, sums: Mapping[Any, RunningSum], blocks: int) -> Place:
        """How far the run before came; `sums` holds its sums."""

    def due(self) -> bool:
        """Is it time to keep the sums?"""

    def keep(self, sums: Mapping[Any, RunningSum], blocks: int, gate: Turnstile) -> None:
        """Keep the sums of so many blocks and of what has passed the gate, if that can be done."""

    def keep_last(self, sums: Mapping[Any, RunningSum], blocks: int) -> None:
        """Keep the sums of all blocks."""


def accumulate(
    units: Sequence[Shard],
    work: Callable[[int, Shard, Turnstile], None],
    totals: Mapping[Any, RunningSum],
    in_flight: int | None,
    resume: Resume | None,
    progress: Progress,
) -> None:
    """Run the shards block by block; within a block several are in flight, folded in order.

    `work` adds one shard's sums to the totals, each when the turnstile lets its ordinal pass, and
    where its turn says that it is due. A checkpoint is taken while shards are in flight. They may
    have joined some sums and not yet others: each sum is kept with the number of shards that it
    has. A run that goes on begins with the first shard that a sum lacks.
    """
    blocks = units[-1].number // BLOCK_SHARDS + 1
    at = resume.load(totals, blocks) if resume else Place(0, 0, {})
    grouped = groupby(units, key=lambda unit: unit.number // BLOCK_SHARDS)
    left = [(number, list(block)) for number, block in grouped if number >= at.blocks]
    todo = sum(len(block) for _, block in left) - at.shards
    done = counter(progress, len(units), len(units) - todo)
    progress(len(units) - todo, len(units))
    for number, block in left:
        first, gate = at.shards, Turnstile(at.passed)

        def one(ordinal: int, unit: Shard, first: int = first, gate: Turnstile = gate) -> None:
            work(first + ordinal, unit, gate)

        keep = partial(resume.keep, totals, number, gate) if resume else _nothing
        found = stream(block[first:], one, in_flight=in_flight, turnstile=gate, stopping=keep)
        with closing(found):
            for _ in found:
                done()
                if resume and resume.due():
                    keep()
        for total in totals.values():
            total.close()
        at = Place(number + 1, 0, {})
    if resume:
        resume.keep_last(totals, blocks)


def _nothing() -> None:
    """No checkpoint is kept."""
