"""Which share of the pairs a share of the mass keeps, and with how many rows that settles.

With few rows the eigenvalues of a sample lie further apart than those of the whole population. So
the mass of a sample is held by fewer pairs, and a given rho keeps too few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refcurv.algebra.staircase import cut
from refcurv.law.checks import Array, ConventionError, EmptyError
from refcurv.law.words import number_of

SHARES = (0.6, 0.8, 0.9, 0.95, 0.99)
"""The rho at which the kept pairs are shown."""

SETTLED = 1 / 20
"""Of its limit, how much the kept share may still lack.  Chosen: edits of 0.95 and of 1.0 times as
many pairs are hard to tell apart."""

FEW = 10
"""Rows for each direction, below which the kept share is said to be an artefact.  Chosen: normal
rows whose spectra fall as i^-½ to i^-3/2 then keep 0.88 or more of the limit, and rows that come in
runs which are alike 0.7 or more."""

COUNTED = 100
"""Pairs that must be kept for an estimate.  Chosen: one pair more or less is then 1 %."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a layer's spectra were estimated from.

    Fields: rows, of the corpus; halves, (lam, mu) that half of them gives (`curvature.halves`),
    None if that was not kept.
    """

    rows: int
    halves: tuple[Array, Array] | None = None


@dataclass(frozen=True, slots=True)
class Settling:
    """Of one layer: how many pairs are kept at each of SHARES, and with how many rows they settle.

    Fields: layer; pairs, all there are; kept, at each of SHARES, empty where there is no curvature;
    rows, None if unknown; few, are they so few that `kept` is an artefact; settles, rows with which
    it settles, infinite if they are far more than can be told, None if unknown.
    """

    layer: str
    pairs: int
    kept: tuple[int, ...]
    rows: int | None = None
    few: bool = False
    settles: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For results.json: {rho: share of the pairs} beside the fields."""
        shares = {str(rho): n / self.pairs for rho, n in zip(SHARES, self.kept, strict=False)}
        told = self.settles is not None and math.isfinite(self.settles)
        settles = "far more" if self.settles == math.inf else self.settles
        return {
            "layer": self.layer,
            "pairs": self.pairs,
            "kept": shares,
            "rows": self.rows,
            "few": self.few,
            "settles": round(self.settles or 0) if told else settles,
        }


def settling(layer: str, lam: Array, mu: Array, sample: Sample | None = None) -> Settling:
    """How many pairs SELECT keeps at each of SHARES, and with how many rows that settles.

    Args:
        layer: its name.
        lam: (O,) descending, >= 0.
        mu: (I,) likewise.
        sample: what they were estimated from, if that is known.

    Proof: tests/test_settling.py::test_the_kept_pairs_are_those_of_an_edit,
        ::test_it_settles_where_it_is_said_to
    """
    pairs, kept = len(lam) * len(mu), _kept(lam, mu)
    if sample is None:
        return Settling(layer, pairs, kept)
    half = _kept(*sample.halves) if sample.halves else ()
    told = [
        rows_to_settle(n / pairs, h / pairs, sample.rows)
        for n, h in zip(kept, half, strict=False)
        if n >= COUNTED
    ]
    few = sample.rows < FEW * max(len(lam), len(mu))
    return Settling(layer, pairs, kept, sample.rows, few, max(told, default=None))


def rows_to_settle(whole: float, half: float, rows: int) -> float:
    """The rows with which a kept share settles, from that of all `rows` and that of half of them.

    Definition
        The least m with k(m) >= (1 − SETTLED) k(∞), where k(rows) = `whole`, k(rows/2) = `half` and
        1/√k(m) = 1/√k(∞) + c/m. Clamped: k(∞) <= 1, for no more than all pairs are kept; m >= 0,
        for half > whole would make it negative; and m = ∞ where half < whole/2.

    Why this k: with few rows, m, both spectra have about m entries, so that k ∝ m². With many, an
    eigenvalue that is separate from the others moves by terms of order 1/m. The form has both.
    `half` is at most `whole`: eigenvalues of a mean are majorised by the mean of the eigenvalues
    (Ky Fan), and what majorises needs fewer pairs for a share of its mass.

    Errors: it tells the order of magnitude. Simulated, with spectra of 192 and 128 entries, it is
    0.5 to 2.5 times what is needed for independent normal rows whose spectra fall as i^-½, i^-1,
    i^-3/2 or exponentially. It is 0.2 to 2 times that where rows are alike in runs of 32, or have
    heavy tails. Where eigenvalues are equal, k has terms of order 1/√m, and it may be a fifth of
    what is needed. So it says too little more often than too much.

    Returns:
        At least 0, and infinite where `half` is less than half of `whole`, from which nothing can
        be told.

    Proof: tests/test_settling.py::test_it_settles_where_it_is_said_to,
        ::test_the_form_is_solved_exactly
    """
    if half < whole / 2:
        return math.inf
    at_half, at_all = math.sqrt(1 / half), math.sqrt(1 / whole)
    limit = max(2 * at_all - at_half, 1.0)  # not more than all pairs
    return max(rows * (at_half - at_all) / (limit * (math.sqrt(1 / (1 - SETTLED)) - 1)), 0.0)


def warning_of(few: Iterable[Settling]) -> str:
    """What to say of layers whose rows are few; empty if there are none."""
    found = [one for one in few if one.few]
    if not found:
        return ""
    first, more = found[0], len(found) - 1
    others = f" and of {number_of(more, 'layer')} more" if more else ""
    return (
        f"{number_of(first.rows or 0, 'row')} are few for {first.layer!r}{others}: below about "
        f"{FEW} rows for each direction the share of the pairs that rho keeps is an artefact. "
        "Collect more text; with --halves, decompose estimates how much."
    )


def _kept(lam: Array, mu: Array) -> tuple[int, ...]:
    """At each of SHARES; empty where there is no mass to take a share of."""
    try:
        return tuple(cut(lam, mu, rho).kept for rho in SHARES)
    except (EmptyError, ConventionError):  # no curvature; products beyond float64
        return ()
