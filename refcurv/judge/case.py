"""What is judged, and by what: one record that `compare` and `diagnose` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refcurv.curvature.bases import Bases
from refcurv.curvature.factors import Factor, Factors
from refcurv.judge.arithmetic import Arithmetic, moment_budget
from refcurv.judge.dump import Dump, Theirs
from refcurv.law.tolerance import eps
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model


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
    """

    dump: Dump
    reference: Factors
    matched: Mapping[str, str]
    arithmetic: Arithmetic
    model: Model | None = None
    corpus: Corpus | None = None
    bases: Bases | None = None
    noise: Mapping[str, tuple[float, float]] | None = None

    def theirs(self, layer: str) -> Theirs:
        """What the dump holds of our `layer`, read anew."""
        return self.dump.layers[self.matched[layer]]

    def ours(self, layer: str) -> Factor:
        """The reference's factor of a layer."""
        return self.reference[layer]

    def budget(self, layer: str, dtype: str, side: str = "G") -> float:
        """How far A or G of `layer` may lie from the truth; undeclared parts count as `dtype`.

        The reference's own error is part of it. What it knows of rounding is that of g, which may
        cancel on the way down; that of G covers A too.
        """
        one = self.ours(layer)
        kappa = _amplification(one, self.reference.dtype) if side == "G" else None
        own = Arithmetic().filled(self.reference.dtype)
        return moment_budget(self.arithmetic.filled(dtype), one.n_G, kappa) + moment_budget(
            own, self.reference.shard_rows, kappa
        )


def _amplification(one: Factor, dtype: str) -> float | None:
    """κ: how many roundings g has, by the reference's own estimate (NEGATIVE)."""
    trace = float(one.sum_G.trace())
    if one.rounding_G is None or trace <= 0:
        return None
    return float((one.rounding_G / trace) ** 0.5 / (eps(dtype) / 2))
