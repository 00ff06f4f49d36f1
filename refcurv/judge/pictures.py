"""What a report shows of a layer: where theirs differs from ours, and the two spectra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.judge.case import Case
from refcurv.law.checks import Array

CELLS = 48
"""A map has at most so many rows."""

LARGEST = 1024
"""Wider matrices have a map, and no spectra: those would take longer than the judgement."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One side of one layer.

    Fields:
        layer, side: "A" or "G".
        difference: (k, k), X'/tr X' − X/tr X in root mean square over blocks of entries, over the
            root mean square of X/tr X; k is the size of X or at most CELLS.
        size: of the matrix.
        theirs, ours: eigenvalues, descending, over the trace; empty beyond LARGEST.
    """

    layer: str
    side: str
    difference: list[list[float]]
    size: int
    theirs: list[float]
    ours: list[float]

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {name: getattr(self, name) for name in self.__slots__}


def pictures(case: Case, layer: str) -> list[Picture]:
    """Of each side that can be compared.

    Proof: tests/test_verdict_page.py::test_the_figure_shows_every_picture
    """
    theirs, ours, out = case.theirs(layer), case.ours(layer), []
    for side, X, true in (("A", theirs.A, ours.A), ("G", theirs.G, ours.G)):
        fits = X is not None and true.ndim == 2 and X.shape == true.shape
        if not fits or X is None or not np.isfinite(X).all():
            continue
        # near 1 no trace and no square leaves the range of float64
        M, own = (shifted(x, -exponent(x)) for x in (X, true))
        traces = float(np.trace(M)), float(np.trace(own))
        if min(traces) <= 0:
            continue
        off = M / traces[0] - own / traces[1]
        size = float(norm(own)) / traces[1] / len(true)
        small = len(true) <= LARGEST
        spectra = [spectrum(x) for x in (M, own)] if small else [[], []]
        out.append(Picture(layer, side, (blocks(off) / size).tolist(), len(true), *spectra))
    return out


def blocks(M: Array) -> Array:
    """Root mean squares of the blocks of a square matrix, at most CELLS × CELLS of them."""
    edges = np.unique(np.linspace(0, len(M), min(len(M), CELLS) + 1).astype(int))
    sums = np.add.reduceat(np.add.reduceat(M**2, edges[:-1], axis=0), edges[:-1], axis=1)
    counts = np.diff(edges)
    return np.asarray(np.sqrt(sums / np.multiply.outer(counts, counts)))


def spectrum(M: Array) -> list[float]:
    """Eigenvalues of the symmetric part over the trace, descending."""
    values = np.linalg.eigvalsh((M + M.T) / 2)[::-1] / np.trace(M)
    return [float(v) for v in values]
