"""Sums over rows, in float64 and one order (PRECISION, BLOCK): what is summed, how it varies.

One backward pass over one shard is added in the compute dtype. Everything after that is float64.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from refcurv.algebra import kernels
from refcurv.law.checks import Array
from refcurv.model.config import TABLES, ModelConfig
from refcurv.passes.sweep import Sweep


class Side(StrEnum):
    """What is summed over the kept rows of a layer.

    A   Σ a aᵀ of what layers read, (I, I), shared by its readers; for a table the counts of its
        entries, (entries,).
    a   Σ a, (I,), where a reader has a bias (BIAS).
    G   Σ g gᵀ of one layer, (O, O).
    noise   what rounding does to some rows, (5,): `passes.rounding.Noise` (NEGATIVE).
    A_half, G_half   the sums of A and G over every second shard (`curvature.halves`).
    """

    A = "A"
    a = "a"
    G = "G"
    noise = "noise"
    A_half = "A_half"
    G_half = "G_half"


HALF = {Side.A: Side.A_half, Side.G: Side.G_half}
"""The sums of which half is kept too, if that is asked for."""


class Key(NamedTuple):
    """One sum: the side, and the name of the layer (G, noise) or of what layers read (A, a)."""

    side: Side
    name: str


class RunningSum:
    """The sum over all shards of one quantity, an (X, X) matrix or an (X,) vector (BLOCK).

    Shards are added to the sum of their block, and blocks to the total. The first block's sum is
    itself the total until a second block is closed, because 0 + x has the bits of x. A matrix is
    kept as its lower triangle, row after row in one vector, until `finish` makes it whole.

    Fields: shape, of what is summed; size, how many numbers are kept; rows, how many rows were
    summed; variance (2,), of the sum and of its trace, given the corpus. Shards draw independently,
    so their variances add up.
    """

    __slots__ = ("_block", "_total", "rows", "shape", "size", "variance")

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.size = triangle(shape[0]) if len(shape) == 2 else shape[0]
        self._block: Array | None = None  # made when its first shard comes
        self._total: Array | None = None
        self.rows = 0
        self.variance = np.zeros(2)

    def add(self, product: Array, rows: int, variance: Array | float = 0.0) -> None:
        """Fold one shard's sum, of a matrix its lower triangle, packed or not; shards in order."""
        first = self._block is None
        block = np.empty(self.size) if self._block is None else self._block
        if product.ndim == 2:
            kernels.fold_triangle(block, product, not first)
        else:
            np.add(product, 0.0 if first else block, out=block)
        self._block = block
        self.rows += rows
        self.variance += variance

    def close(self) -> None:
        """End a block: its sum joins the total."""
        if self._block is not None and self._total is not None:
            self._total += self._block
        elif self._block is not None:
            self._total = self._block
        self._block = None

    def state(self) -> Array:
        """The total of the closed blocks, (size,): of a matrix the lower triangle."""
        return np.zeros(self.size) if self._total is None else self._total

    def diagonal(self) -> Array | None:
        """That of a matrix; None of a vector."""
        if len(self.shape) == 1:
            return None
        return self.state()[on_diagonal(self.shape[0])]

    def parts(self) -> tuple[Array | None, Array | None]:
        """The total of the closed blocks and the open block's sum, (size,), if there are any."""
        return self._total, self._block

    def restore(self, total: Array | None, block: Array | None, rows: int, variance: Array) -> None:
        """Go on from `parts`, which are this sum's own from now on."""
        self._total, self._block = total, block
        self.rows, self.variance = rows, variance

    def finish(self) -> Array:
        """The sum, a matrix exactly symmetric; every block must be closed."""
        total = self.state()
        if len(self.shape) == 2:
            total = np.empty(self.shape)
            kernels.unfold_triangle(self.state(), total)
        total.flags.writeable = False
        return total


def triangle(size: int) -> int:
    """How many numbers the lower triangle of a square matrix has."""
    return size * (size + 1) // 2


def on_diagonal(size: int) -> Array:
    """Where the diagonal of a square matrix stands in its lower triangle."""
    return np.arange(1, size + 1).cumsum() - 1


class PassSum:
    """The sum S = Σ P over the backward passes of one shard, and how much it varies.

    Given the corpus, the M draws P are independent and have one distribution. Then
    M/(M−1) (Σ|P|² − |S|²/M) is an unbiased estimate of E|S − E S|². It holds in Frobenius norm, and
    for the trace.
    """

    __slots__ = ("_draws", "_squares", "rows", "sum")

    def __init__(self, size: int, draws: int) -> None:
        self.sum = np.zeros(triangle(size))
        self.rows = 0
        self._draws, self._squares = draws, np.zeros(2)

    def add(self, product: Array, rows: int) -> None:
        """Fold one pass's product, its lower triangle; passes come in order."""
        kernels.fold_triangle(self.sum, product, True)
        self.rows = rows  # the same in every pass
        if self._draws > 1:
            self._squares += _squares(product)

    def variance(self) -> Array:
        """Of the sum and of its trace; 0 unless there are draws to tell from."""
        M = self._draws
        with np.errstate(invalid="ignore"):  # of squares that overflowed, see SQUARED
            return np.zeros(2) if M == 1 else M / (M - 1) * (self._squares - _packed(self.sum) / M)


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


def _packed(sum_P: Array) -> Array:
    """`_squares` of a packed triangle."""
    size = (math.isqrt(8 * len(sum_P) + 1) - 1) // 2
    diagonal = sum_P[on_diagonal(size)]
    with np.errstate(over="ignore", under="ignore"):
        twice = 2 * np.vdot(sum_P, sum_P)
        return np.array([twice - diagonal @ diagonal, diagonal.sum() ** 2])


def empty_sums(config: ModelConfig, job: Sweep) -> dict[Key, RunningSum]:
    """A sum of zero for everything that a collection adds up."""
    out: dict[Key, RunningSum] = {}
    for name, (d_out, d_in) in (config.linear_layers() | config.tables()).items():
        if name in job.layers:
            read = config.input_of(name)
            out[Key(Side.G, name)] = RunningSum(d_out, d_out)
            out[Key(Side.noise, name)] = RunningSum(5)
            shape = (d_in,) if name in TABLES else (d_in, d_in)
            out.setdefault(Key(Side.A, read), RunningSum(*shape))
            if config.has_bias(name):
                out.setdefault(Key(Side.a, read), RunningSum(d_in))
            if job.halves and name not in TABLES:
                out[Key(Side.G_half, name)] = RunningSum(d_out, d_out)
                out.setdefault(Key(Side.A_half, read), RunningSum(d_in, d_in))
    return out
