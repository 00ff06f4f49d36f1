"""What is judged, and by what: one record that `compare` and `diagnose` read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from scipy import special

from refcurv.algebra.scaling import norm
from refcurv.curvature.bases import Bases
from refcurv.curvature.factors import Factor, Factors
from refcurv.files.lazy import Recent
from refcurv.judge.arithmetic import Arithmetic, moment_budget
from refcurv.judge.drawn import DEVIATIONS, Drawing
from refcurv.judge.dump import Dump, Theirs
from refcurv.law.checks import Array
from refcurv.law.tolerance import eps
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.passes.rounding import EACH

Value = TypeVar("Value")

ALIKE = 3
"""So many rows that carry the error of G err like many, as κ says.  Chosen: then six standard
deviations of rows that are alike hold in 259 of 260 random models of widths 2 to 6; wider ones use
half of it. In the other one the rows of one sequence have all of the error, and err alike. Where
one or two rows carry it, they were short by up to 19 times.
"""

ROOM = 2**27
"""Bytes of layers, of each side, that are kept once read.  Chosen: one or two large layers."""


@dataclass(frozen=True, slots=True)
class Case:
    """A dump beside its reference.

    Fields:
        dump: theirs. reference: the truth, and the choices (fisher, rows, seed, draws) it was made
            by. matched: our layer → their name, of every layer that both have.
        arithmetic: what is declared of theirs; the rest is None.
        model, corpus: of the reference, where they are given: what diagnosis recomputes from.
        bases: of the reference, where a basis is given.
        noise: our layer → what one draw of labels for all rows varies by, where the reference does
            not tell: standard deviations of G over |G|, and of tr G over tr G.
        drawn: our layer → what drawing explains, where honest dumps were drawn to find out.
        joint: layers of ours that are judged with their bias as last column (BIAS).
        known: what `once` found out. say: called with what is being done.
    """

    dump: Dump
    reference: Factors
    matched: Mapping[str, str]
    arithmetic: Arithmetic
    model: Model | None = None
    corpus: Corpus | None = None
    bases: Bases | None = None
    noise: Mapping[str, tuple[float, float]] | None = None
    drawn: Mapping[str, Drawing] | None = None
    joint: Set[str] = frozenset()
    known: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    say: Callable[[str], object] = field(default=lambda _: None, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` gives, which is asked once; no matrix of a layer."""
        if key not in self.known:
            self.known[key] = make()
        found: Value = self.known[key]
        return found

    def theirs(self, layer: str) -> Theirs:
        """What the dump holds of our `layer`, read anew."""
        return self.dump.layers[self.matched[layer]]

    def ours(self, layer: str) -> Factor:
        """The reference's factor of a layer; A is A_joint where it is judged with its bias."""
        one = self.reference[layer]
        if layer not in self.joint or one.sum_a is None:
            return one
        column = one.sum_a[:, None]
        sum_A = np.block([[one.sum_A, column], [column.T, np.full((1, 1), float(one.n_A))]])
        return replace(one, sum_A=sum_A, sum_a=None)

    def means(self, layer: str) -> tuple[Array, Array]:
        """A and G of `ours`; those of the layer that was asked for last are kept."""
        kept = self.known.get("means")
        if kept is None or kept[0] != layer:
            self.known.pop("means", None)  # not two at a time
            one = self.ours(layer)
            kept = self.known["means"] = layer, (one.A, one.G)
        found: tuple[Array, Array] = kept[1]
        return found

    def forget(self) -> None:
        """Keep no layer in memory: what comes needs the room."""
        self.known.pop("means", None)
        for layers in (self.dump.layers, self.reference.layers):
            if isinstance(layers, Recent):
                layers.forget()

    def budget(self, layer: str, dtype: str, side: str = "G") -> float:
        """How far A or G of `layer` may lie from the truth; undeclared parts count as `dtype`.

        The reference's own error is part of it. What it knows of rounding is that of g, which may
        cancel on the way down; that of G covers A too. `simulated.know_kinks` may know more.
        """
        known = self.once(("rounding", layer), lambda: self._rounding(layer))
        rows, how = known[side]
        own = Arithmetic().filled(self.reference.dtype)
        limit = moment_budget(self.arithmetic.filled(dtype), rows, *how) + (
            moment_budget(own, self.reference.shard_rows, *how)
        )
        kinks: Mapping[tuple[str, str], float]
        kinks = self.known.get(("kinks", self.arithmetic.model), {})
        return max(limit, kinks.get((layer, side), 0.0))

    def _rounding(self, layer: str) -> dict[str, tuple[int, tuple[float | None, float, float]]]:
        """By side the rows, amplification, noise and flatness of `moment_budget`.

        Proof: tests/test_judge_bounds.py::test_the_rows_of_A_are_not_drawn_again
        """
        one, dtype = self.ours(layer), self.reference.dtype
        return {
            "A": (one.n_A, (None, _noise(one, dtype, "A"), _flat(one.sum_A))),
            "G": (one.n_G, (_amplification(one, dtype), _noise(one, dtype, "G"), _flat(one.sum_G))),
        }

    def counts(self, layer: str) -> Counts:
        """The rows of a layer, and its sizes."""
        return self.once(("counts", layer), lambda: _counts(self.theirs(layer), self.ours(layer)))

    def draws(self) -> int:
        """Draws of each label by theirs: as declared, or by the counts of the first layer of G.

        Where A counts more rows than ours has, these are no draws.
        """
        declared = self.dump.declared.get("draws")
        if declared is not None:
            return max(1, int(float(declared)))
        counts = (self.counts(layer) for layer in self.matched)
        ratios = (
            n / max(one.ours["A"], one.theirs["A"] or 0) for one in counts if (n := one.theirs["G"])
        )
        return max(1, round(next(ratios, 1.0)))


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of theirs and of ours, by side; (O, I) of ours."""

    theirs: Mapping[str, float | None]
    ours: Mapping[str, int]
    shape: tuple[int, int]


def _counts(theirs: Theirs, ours: Factor) -> Counts:
    return Counts(
        {"A": theirs.n_A, "G": theirs.n_G},
        {"A": ours.n_A, "G": ours.n_G},
        (len(ours.sum_G), len(ours.sum_A)),
    )


def _amplification(one: Factor, dtype: str) -> float | None:
    """κ: how many roundings g has, by the reference's own estimate (NEGATIVE)."""
    trace = float(one.sum_G.trace())
    if one.rounding_G is None or trace <= 0:
        return None
    return float((one.rounding_G / trace) ** 0.5 / (eps(dtype) / 2))


def _flat(S: Array) -> float:
    """tr S/|S|, 1 .. √d; 1 of zeros, and of a table's A: its rows are one-hot, without an error.

    Proof: tests/test_judge_bounds.py::test_rows_of_a_table_err_in_nothing
    """
    if S.ndim == 1:
        return 1.0
    size, trace = float(norm(S)), float(S.trace())
    return min(max(1.0, trace / size), math.sqrt(len(S))) if size else 1.0


def _noise(one: Factor, dtype: str, side: str) -> float:
    """How many roundings A or G may be off, over |A| or |G|, by the errors of single rows.

    0 where it is not known. |Δ|² is a sum over the rows that carry it, and its size is known from
    EACH random numbers a row: a quotient of Fisher's distribution, whose quantile has the odds of a
    normal number beyond DEVIATIONS. 0 for G, too, where ALIKE rows or more carry it.
    """
    S, spread, free = (
        (one.sum_A, one.noise_A, one.free_A)
        if side == "A"
        else (one.sum_G, one.noise_G, one.free_G)
    )
    size = float(norm(S))
    rows = (free or 0.0) / EACH
    if not spread or not rows or not size or (side == "G" and rows >= ALIKE):
        return 0.0
    more = special.fdtri(rows, rows * EACH, special.ndtr(DEVIATIONS))
    return math.sqrt(more) * spread / size / (eps(dtype) / 2)
