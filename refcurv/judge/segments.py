"""The gradients of single sequences in their eigenvectors: what sums of Λ may be made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from scipy.optimize import nnls

from refcurv.judge.case import Case
from refcurv.judge.eigenvectors import as_columns
from refcurv.law.checks import Array
from refcurv.model.transformer import Tap
from refcurv.model.weights import resident
from refcurv.passes.shards import shards
from refcurv.passes.sweep import sweep, sweep_of

MOST_SEQUENCES: Final = 64
"""Sequences whose gradients are looked at one by one.  Chosen: as many backward passes."""

_MOST_BYTES: Final = 2**27
_CLEAR: Final = 0.02
"""How far a weight may be from 0 or 1 to count as such.  Chosen: what float32 moves it by."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Of each sequence n: D (N, O, I), its gradient; tokens (N, O, I), Σ (u·g)² (v·a)²."""

    D: Array
    tokens: Array

    @property
    def squares(self) -> Array:
        """Λ per sequence of each sequence alone."""
        return self.D**2


def pieces_of(case: Case, layer: str) -> Pieces | None:
    """By the corpus's labels; None where there are too many sequences to look at."""
    assert case.model is not None and case.corpus is not None
    theirs = as_columns(case, layer, case.theirs(layer))
    count = len(case.corpus.label)
    assert theirs.U_A is not None and theirs.U_G is not None
    shape = len(theirs.U_G), len(theirs.U_A)
    if count > MOST_SEQUENCES or 24 * count * shape[0] * shape[1] > _MOST_BYTES:
        return None
    U_A, U_G = theirs.U_A, theirs.U_G
    width = case.model.config.linear_layers()[layer][1]
    D, tokens = np.zeros((2, count, *shape))
    config, parameters = case.model.config, resident(case.model)
    job = sweep_of("validate", [layer], "empirical", 0, 1)

    def take(n: int, _: int, tap: Tap) -> None:
        v_NI = tap.a.astype(np.float64) @ U_A[:width] + U_A[width:].sum(axis=0)
        u_NO = tap.g.astype(np.float64) @ U_G
        D[n] += u_NO.T @ v_NI
        tokens[n] += (u_NO * u_NO).T @ (v_NI * v_NI)

    for unit in shards(case.corpus, config, case.reference.rows):
        for at in range(len(unit.index_B)):
            n, one = int(unit.index_B[at]), unit.of(np.array([at]))
            if one.keep_BT.any():
                sweep(config, parameters, one, job, partial(take, n))
    return Pieces(D, tokens)


def batches(pieces: Pieces) -> Iterator[tuple[int, Array]]:
    """(size, Σ over batches of the square of the batch's gradient), of every size."""
    count = len(pieces.D)
    for size in range(1, count + 1):
        summed = np.add.reduceat(pieces.D, np.arange(0, count, size), axis=0)
        yield size, (summed**2).sum(axis=0)


def parts(L: Array, each: Array) -> Array | None:
    """The sequences whose Λ add up to L, up to one factor; None if no choice of some does."""
    count = len(each)
    if count < 2 or 2 * count > L.size:
        return None
    largest = float(each.max()) or 1.0
    weights, _ = nnls(each.reshape(count, -1).T / largest, L.reshape(-1) / (float(L.max()) or 1.0))
    weights = weights / (np.median(weights[weights > weights.max() / 2]) or 1.0)
    chosen = np.flatnonzero(weights > 0.5)
    clear = np.minimum(abs(weights), abs(weights - 1)).max() <= _CLEAR
    return chosen if clear and 0 < len(chosen) < count else None
