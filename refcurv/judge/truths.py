"""Our Λ of EK-FAC in *their* eigenvectors, and how near theirs is to one.

Λ belongs to the vectors that it was made in. So ours is computed in theirs, from model and corpus,
and no sign, order or rotation lies between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import Corrected, ekfac
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds
from refcurv.judge.diagnosis.seen import fitted
from refcurv.judge.drawn import reach
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import as_columns
from refcurv.law.checks import Array
from refcurv.law.conventions import Bias
from refcurv.model.fisher import DRAWN

FORM, WHOLE = "form of Lambda", "Lambda"
"""Quantities: Λ up to a factor, and Λ."""

RUNS: Final = 8
"""Draws of ours that say how much Λ of drawn labels varies.  Chosen: its variance is then known to
about a half, which `reach` covers."""

_MOST_BYTES: Final = 2**28
"""Of the Λ and bases of layers that are computed in one go.  Chosen: an eighth of 2 GB."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Our Λ of one layer over its rows, (O, I), in their eigenvectors.

    Fields: per, "token" or "sequence"; fisher; rows, segments that were summed; spread, how far
    one draw of labels may be from the mean of many, over |Λ|, and spread_sum, ΣΛ over itself, both
    as `reach` allows, 0 where nothing is drawn; runs, draws whose mean this is.
    """

    per: str
    fisher: str
    Lambda: Array
    rows: int
    segments: int
    spread: float = 0.0
    spread_sum: float = 0.0
    runs: int = 1

    def by_drawing(self, draws: float, sums: bool = False) -> float:
        """What drawing explains of Λ of so many draws; of its sum too where `sums`."""
        both = self.spread + (self.spread_sum if sums else 0.0)
        return both * math.sqrt(1 / draws + 1 / self.runs)


class Truths:
    """Our Λ in their eigenvectors: as many layers at a time as a bound of memory lets."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._bases: Bases | None = None
        self._known: dict[tuple[str, str], Mapping[str, Truth]] = {}

    def of(self, layer: str, per: str, fisher: str) -> Truth:
        """Λ of one layer. Raises RangeError for an `expected` of too many passes."""
        if self._bases is None or layer not in self._bases:
            self._bases, self._known = _bases_from(self._case, layer), {}
        key = per, fisher
        if key not in self._known:
            self._known[key] = _truths(self._case, self._bases, per, fisher)
        return self._known[key][layer]


def _bases_from(case: Case, first: str) -> Bases:
    """Their eigenvectors of this layer and of those behind it, joint or separate alike."""
    assert case.model is not None
    layers: dict[str, Eigenbasis] = {}
    size, order = 0, list(case.matched)
    for layer in order[order.index(first) :]:
        one = as_columns(case, layer, case.theirs(layer))
        alike = (layer in case.joint) == (first in case.joint)
        if unfit(case, layer, one) or not (alike or not case.model.config.has_bias(layer)):
            continue
        assert one.U_A is not None and one.U_G is not None
        O, I = len(one.U_G), len(one.U_A)  # noqa: E741
        size += 8 * (O * O + I * I + 4 * O * I)
        if layers and size > _MOST_BYTES:
            break
        layers[layer] = Eigenbasis(one.U_A, np.zeros(I), one.U_G, np.zeros(O))
    bias = Bias.JOINT if first in case.joint else Bias.SEPARATE
    return Bases(MappingProxyType(layers), bias=bias)


def _truths(case: Case, bases: Bases, per: str, fisher: str) -> Mapping[str, Truth]:
    assert case.model is not None and case.corpus is not None
    kept = case.reference.rows
    seeds = range(RUNS) if fisher in DRAWN else (0,)
    runs: dict[str, list[Corrected]] = {name: [] for name in bases}
    for seed in seeds:
        found = ekfac(case.model, case.corpus, bases, fisher, seed, per=per, rows=kept)
        for name, one in found.items():
            runs[name].append(one)
    numbers = 2 * len(case.matched)  # a form and a whole for each layer
    return {name: _truth(per, fisher, each, numbers) for name, each in runs.items()}


def _truth(per: str, fisher: str, runs: Sequence[Corrected], numbers: int) -> Truth:
    rows, segments = runs[0].rows, runs[0].segments
    each = [one.Lambda / rows for one in runs]
    mean: Array = sum(each[1:], each[0]) / len(each)
    size, total = float(norm(mean)) or math.inf, float(mean.sum()) or math.inf
    if len(each) == 1:
        return Truth(per, fisher, mean, rows, segments)
    share = reach(len(each) - 1, numbers) / math.sqrt(len(each) - 1)
    spread = math.sqrt(sum(float(norm(X - mean)) ** 2 for X in each)) / size
    sums = math.sqrt(sum(float((X - mean).sum()) ** 2 for X in each)) / total
    return Truth(per, fisher, mean, rows, segments, share * spread, share * sums, len(each))


def unfit(case: Case, layer: str, theirs: Theirs) -> str:
    """Why Λ cannot be compared; empty if it can."""
    L, U_A, U_G = theirs.Lambda, theirs.U_A, theirs.U_G
    if L is None:
        return "the dump has no Λ"
    if U_A is None or U_G is None:
        return "Λ belongs to eigenvectors (U_A, U_G), which the dump has not"
    one = case.ours(layer)
    if one.sum_A.ndim == 1:
        return "a table has no Λ here"
    shape = len(one.sum_G), len(one.sum_A)
    sides = (shape[1], shape[1]), (shape[0], shape[0])
    if L.shape != shape or (U_A.shape, U_G.shape) != sides:
        return f"Λ is {L.shape}, U_A {U_A.shape} and U_G {U_G.shape}; ours is {shape}"
    finite = all(np.isfinite(X).all() for X in (L, U_A, U_G))
    return "" if finite else "Λ, U_A or U_G is not finite everywhere"


@dataclass(frozen=True, slots=True)
class Near:
    """Theirs is r times `truth` up to `error`; `by_drawing`, how much of it drawing explains."""

    truth: Truth
    error: float
    r: float
    by_drawing: float


def near_of(bounds: Bounds, L: Array, truth: Truth) -> Near:
    """How near theirs is to this one."""
    error, r = fitted(L, truth.Lambda)
    return Near(truth, error, r, truth.by_drawing(draws(bounds)))


def draws(bounds: Bounds) -> float:
    """Draws of theirs, one at least."""
    return max(1.0, float(bounds.case.dump.declared.get("draws", "1")))
