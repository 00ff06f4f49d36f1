"""How much was added to the loss: ε of label smoothing, c of c logsumexp², by least squares.

What is sent back is linear in such an amount x, so that G = G₀ + x G₁ + x² G₂. Collections at x,
−x and 0 give the three matrices. The amount is the one that brings a multiple of G nearest to
theirs, in all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import fitted
from refcurv.judge.diagnosis.recomputed import collected, recompute
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, combined
from refcurv.law.checks import Array

STEP: Final[Mapping[str, float]] = MappingProxyType({"smoothing": 0.5, "z_loss": 0.1})
"""Fields of a setting that are fitted, and at which amount G is collected.

Chosen: what is added then has about the size of the slope itself.
"""

AMOUNTS: Final = np.geomspace(1e-4, 0.9, 40)
"""Where the search begins.  Chosen: ε is below 1, and c is small beside it."""

STEPS = 20
"""Of Gauss and Newton, at most.  Chosen: they double the digits, and a grid begins them."""


class Curve(NamedTuple):
    """One layer: theirs T, and G of x as three matrices."""

    T: Array
    G: tuple[Array, Array, Array]

    def at(self, x: float) -> tuple[Array, Array]:
        """G(x) and its slope."""
        zero, one, two = self.G
        return zero + x * (one + x * two), one + 2 * x * two


def fit(
    case: Case, found: Mapping[str, Side], layers: Sequence[str], bases: Sequence[Setting]
) -> None:
    """Enter what each amount leaves in these layers at its best, on top of each base."""
    for base in bases or [REFERENCE]:
        ends: dict[str, tuple[Setting, Setting]] = {}
        for name, step in STEP.items():
            both = [combined(base, Setting(**{name: x})) for x in (step, -step)]  # type: ignore[arg-type]
            if both[0] is not None and both[1] is not None:
                ends[name] = both[0], both[1]
        wanted = [base, *(one for pair in ends.values() for one in pair)]
        made = collected(case, layers, wanted, "G")
        for name, (plus, minus) in ends.items():
            curves = [
                curve(T, each[base], each[plus], each[minus], STEP[name])
                for T, each in made.values()
                if {base, plus, minus} <= {*each}
            ]
            x = nearest(curves)
            one = combined(base, Setting(**{name: x})) if x else None  # type: ignore[arg-type]
            if one is not None:
                recompute(case, found, layers, [one])


def curve(T: Array, zero: Array, plus: Array, minus: Array, step: float) -> Curve:
    """G(x) from its values at 0, step and −step."""
    one = (plus - minus) / (2 * step)
    return Curve(T, (zero, one, ((plus - zero) + (minus - zero)) / (2 * step**2)))


def nearest(curves: Sequence[Curve]) -> float | None:
    """The amount above 0 where theirs is nearest to multiples of G; None if there is none."""
    if not curves:
        return None
    x = float(min(AMOUNTS, key=lambda x: sum(fitted(c.T, c.at(x)[0])[0] ** 2 for c in curves)))
    for _ in range(STEPS):
        top = below = 0.0
        for one in curves:
            G, slope = one.at(x)
            size = np.vdot(G, G)
            slope = slope - np.vdot(slope, G) / size * G  # what no factor makes up for
            top += float(np.vdot(one.T / fitted(one.T, G)[1] - G, slope) / size)
            below += float(np.vdot(slope, slope) / size)
        step = top / below if below > 0 else np.nan
        x += step
        if not 0 < x < 1:
            return None
        if abs(step) <= 1e-15 * x:
            break
    return x
