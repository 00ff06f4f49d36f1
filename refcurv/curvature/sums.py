"""Sums over rows, accumulated over shards in one fixed order (SHARD, BLOCK).

Of a layer's gradients Σ g gᵀ; of an input Σ a aᵀ, and Σ a where a layer with a bias reads it; of a
table how often each entry is read. What is added is one backward pass over one shard, in the
compute dtype; everything after it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from refcurv.algebra import blas, kernels
from refcurv.law.checks import (
    Array,
    ConventionError,
    RangeError,
    require_choice,
    require_draws,
    require_seed,
)
from refcurv.law.conventions import BLOCK_SHARDS, Fisher
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import TABLES, Tap
from refcurv.passes import memory
from refcurv.passes.parallel import Turnstile, run
from refcurv.passes.shards import Shard
from refcurv.progress import Progress, counter


class Moment:
    """Σ over shards of (X, X) matrices or (X,) vectors: to a block, blocks to a total (BLOCK).

    Of matrices only the lower triangles are kept up until `finish`. The first block's sum *is* the
    total until a second one is closed: 0 + x has the bits of x. `variance` is that of the sum and
    that of its trace, given the corpus: shards draw independently, so that theirs add up.
    """

    __slots__ = ("_block", "_total", "rows", "shape", "variance")

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self._block: Array | None = None  # made when its first shard comes
        self._total: Array | None = None
        self.rows = 0
        self.variance = np.zeros(2)

    def add(self, product: Array, rows: int, variance: Array | float = 0.0) -> None:
        """Fold one shard's sum, a matrix by its lower triangle; shards come in order."""
        if self._block is None:
            self._block = np.zeros(self.shape)
        _fold(self._block, product)
        self.rows += rows
        self.variance += variance

    def close(self) -> None:
        """End a block: its sum joins the total."""
        if self._block is not None and self._total is not None:
            _fold(self._total, self._block)
        elif self._block is not None:
            self._total = self._block
        self._block = None

    def state(self) -> Array:
        """The total of the closed blocks, of a matrix the lower triangle."""
        return np.zeros(self.shape) if self._total is None else self._total

    def restore(self, total: Array, rows: int, variance: Array) -> None:
        """Go on from a `state`."""
        self._total, self.rows = np.array(total, dtype=np.float64), rows
        self.variance = variance

    def finish(self) -> Array:
        """The sum, a matrix exactly symmetric; every block must be closed."""
        total = self.state()
        if total.ndim == 2:
            kernels.mirror_triangle(total)
        total.flags.writeable = False
        return total


def _fold(total: Array, product: Array) -> None:
    """`total += product`, widened to float64; of matrices the lower triangle."""
    if total.ndim == 2:
        kernels.fold_triangle(total, product)
    else:
        total += product


class _Passes:
    """The sum S = Σ P over the backward passes of one shard, and how much it varies.

    For M draws P, independent and equally distributed given the corpus, M/(M−1) (Σ|P|² − |S|²/M) is
    an unbiased estimate of E|S − E S|², in Frobenius norm as for the trace.
    """

    __slots__ = ("_draws", "_squares", "rows", "sum")

    def __init__(self, size: int, draws: int) -> None:
        self.sum = np.zeros((size, size))  # lower triangle
        self.rows = 0
        self._draws, self._squares = draws, np.zeros(2)

    def add(self, product: Array, rows: int) -> None:
        """Fold one pass's product, its lower triangle; passes come in order."""
        kernels.fold_triangle(self.sum, product)
        self.rows = rows  # the same in every pass
        if self._draws > 1:
            self._squares += _squares(product)

    def variance(self) -> Array:
        """Of the sum and of its trace; 0 unless there are draws to tell from."""
        M = self._draws
        with np.errstate(invalid="ignore"):  # of squares that overflowed, see SQUARED
            return np.zeros(2) if M == 1 else M / (M - 1) * (self._squares - _squares(self.sum) / M)


SQUARED = (2.0**-480, 2.0**500)
"""|Σ g gᵀ| whose square, and those of its parts, neither overflow nor vanish: beyond, `variance`
says nothing."""


def _squares(triangle: Array) -> Array:
    """(|M|², (tr M)²), Frobenius norm, float64, of the symmetric M that has this lower triangle."""
    diagonal, below, tile = triangle.diagonal().astype(np.float64), 0.0, 256
    with np.errstate(over="ignore", under="ignore"):
        for top in range(0, len(triangle), tile):
            rows = slice(top, top + tile)
            left = triangle[rows, :top].astype(np.float64)
            corner = np.tril(triangle[rows, rows], -1).astype(np.float64)
            below += float(np.vdot(left, left) + np.vdot(corner, corner))
        return np.array([2 * below + diagonal @ diagonal, diagonal.sum() ** 2])


MOST_PASSES = 2**16
"""Backward passes that `expected` may ask for, over all shards: labelled positions × entries."""


def sweep_of(who: str, names: Iterable[str], fisher: str, seed: int, draws: int) -> memory.Sweep:
    """The choices of a collection, checked."""
    kind = Fisher(require_choice(who, "fisher", fisher, list(Fisher)))
    require_draws(who, draws)
    if kind not in memory.DRAWN and draws != 1:
        raise ConventionError(f"{who}: `{kind}` draws nothing; draws must be 1, got {draws}.")
    return memory.Sweep(frozenset(names), kind, require_seed(who, seed), draws)


def require_few_passes(
    who: str, units: Iterable[Shard], job: memory.Sweep, vocabulary: int
) -> None:
    """Refuse an `expected` that would not end."""
    passes = sum(len(memory.labelled(unit)) for unit in units) * vocabulary
    if job.fisher is Fisher.EXPECTED and passes > MOST_PASSES:
        raise RangeError(
            f"{who}: `expected` needs {passes:,} backward passes, one for each labelled position "
            f"of a shard and vocabulary entry; at most {MOST_PASSES:,} are made. Give fewer "
            "tokens, or take `signed`: it estimates the same, and with draws >= 2 says how well.",
            passes=passes,
        )


def moments(config: ModelConfig, job: memory.Sweep) -> dict[str, Moment]:
    """Empty sums, by what is summed.

    "G layer"   Σ g gᵀ of each layer, (O, O)
    "A input"   Σ a aᵀ of what layers read, (I, I), shared by its readers; of a table the counts
                of its entries, (entries,)
    "a input"   Σ a, (I,), where a reader has a bias (BIAS)
    "e layer"   Σ |e|² over some rows, (1,), e the rounding error of g (NEGATIVE)
    """
    out: dict[str, Moment] = {}
    for name, (d_out, d_in) in (config.linear_layers() | tables(config)).items():
        if name in job.layers:
            read = config.input_of(name)
            out[f"G {name}"], out[f"e {name}"] = Moment(d_out, d_out), Moment(1)
            out.setdefault(f"A {read}", Moment(d_in) if name in TABLES else Moment(d_in, d_in))
            if config.has_bias(name):
                out.setdefault(f"a {read}", Moment(d_in))
    return out


def tables(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The model's tables of vectors, as the linear layers that they are: name → (D, entries)."""
    shapes = config.parameter_shapes()
    found = {name: shapes.get(f"{name}.weight") for name in TABLES}
    return {name: (shape[1], shape[0]) for name, shape in found.items() if shape}


class ShardSums:
    """One shard's products, opened in the compute dtype, folded in float64 when complete.

    A product is complete when the next layer's rows come, or the next pass's. With one backward
    pass it then joins the moment; with several it joins the shard's sum of G over the passes, which
    joins the moment at the end. Folding waits for its turn, so that shards in flight fold in their
    order.
    """

    def __init__(
        self,
        config: ModelConfig,
        moments: Mapping[str, Moment],
        turnstile: Turnstile,
        ordinal: int,
        job: memory.Sweep,
    ) -> None:
        self._config, self._moments, self._turnstile = config, moments, turnstile
        self._ordinal, self._job = ordinal, job
        self._open: dict[str, tuple[Array, int]] = {}
        self._passes: dict[str, _Passes] = {}
        self._spare: dict[tuple[int, np.dtype], list[Array]] = {}
        self._at = (-1, "")
        self._input: tuple[str, Array] | None = None

    def take(self, number: int, tap: Tap) -> None:
        """Add a layer's kept rows; an input that the previous layer read too is added once."""
        if (number, tap.name) != self._at:
            self._complete()
            self._at = (number, tap.name)
        self._add_gram(f"G {tap.name}", tap.g)
        read = self._config.input_of(tap.name)
        # in some models attention and MLP read one array, and each has its own sum of it
        known = self._input is not None and self._input[0] == read and self._input[1] is tap.a
        if number == 0 and not known:
            self._input = (read, tap.a)
            if tap.name in TABLES:
                entries = tables(self._config)[tap.name][1]
                self._add(f"A {read}", np.bincount(tap.a, minlength=entries), len(tap.a))
                return
            self._add_gram(f"A {read}", tap.a)
            if f"a {read}" in self._moments:
                self._add(f"a {read}", tap.a.sum(axis=0), len(tap.a))

    def _add(self, key: str, sum_X: Array, rows: int) -> None:
        before = self._open.get(key, (np.zeros_like(sum_X), 0))
        self._open[key] = (before[0] + sum_X, before[1] + rows)

    def _add_gram(self, key: str, x_NX: Array) -> None:
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
            if not key.startswith("G ") or self._job.one_pass:
                with self._turnstile.turn(key, self._ordinal):
                    self._moments[key].add(product, rows)
            else:
                if key not in self._passes:
                    self._passes[key] = _Passes(len(product), self._job.draws)
                self._passes[key].add(product, rows)
            if product.ndim == 2:
                self._spare.setdefault((len(product), product.dtype), []).append(product)
        self._open.clear()

    def finish(self) -> None:
        """Fold what is left: the last product, and the sums over several passes."""
        self._complete()
        for key, passes in self._passes.items():
            with self._turnstile.turn(key, self._ordinal):
                rows = passes.rows * self._job.draws
                self._moments[key].add(passes.sum, rows, passes.variance())
        self._passes.clear()


def add_gram(x_NX: Array, product_XX: Array, *, onto: bool) -> Array:
    """The product with xᵀ x added `onto` it, by lower triangle; it is used up.

    In its dtype; from the first rows on whose squares would vanish in it, in float64 (PRECISION):
    where no square is N X times the smallest normal number, what was lost could be seen.
    """
    none_before = not (onto and product_XX.diagonal().any())
    blas.add_gram(x_NX.astype(product_XX.dtype, copy=False), product_XX, onto=onto)
    seen = x_NX.size * np.finfo(product_XX.dtype).smallest_normal
    small = product_XX.dtype != np.float64 and product_XX.diagonal().max(initial=0) < seen
    if not (small and none_before and x_NX.any()):
        return product_XX
    wide_XX = np.empty(product_XX.shape)
    blas.add_gram(x_NX.astype(np.float64), wide_XX, onto=False)
    return wide_XX


# ------------------------------------------------------------------ over the shards


class Resume(Protocol):
    """Where a run puts its sums after each block, and goes on from (`checkpoint.Checkpoint`)."""

    def load(self, moments: Mapping[str, Moment], blocks: int) -> int:
        """How many blocks are done; their sums are in the moments."""

    def save(self, moments: Mapping[str, Moment], blocks: int) -> None:
        """Keep the sums of so many blocks."""

    def save_last(self, moments: Mapping[str, Moment], blocks: int) -> None:
        """Keep the sums of all blocks."""


def accumulate(
    units: Sequence[Shard],
    work: Callable[[int, Shard, Turnstile], None],
    totals: Mapping[str, Moment],
    in_flight: int | None,
    resume: Resume | None,
    progress: Progress,
) -> None:
    """Run the shards block by block; within a block several are in flight, folded in order.

    `work` adds one shard's sums to the totals, each when the turnstile lets its ordinal pass.
    """
    blocks = units[-1].number // BLOCK_SHARDS + 1
    begin = resume.load(totals, blocks) if resume else 0
    left = [unit for unit in units if unit.number // BLOCK_SHARDS >= begin]
    done = counter(progress, len(units), len(units) - len(left))
    progress(len(units) - len(left), len(units))
    for number, block in groupby(left, key=lambda unit: unit.number // BLOCK_SHARDS):
        gate = Turnstile()

        def one(ordinal: int, unit: Shard, gate: Turnstile = gate) -> None:
            work(ordinal, unit, gate)

        run(list(block), one, in_flight=in_flight, turnstile=gate, done=done)
        for total in totals.values():
            total.close()
        if resume:
            keep = resume.save if number + 1 < blocks else resume.save_last
            keep(totals, number + 1)
