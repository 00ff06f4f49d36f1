"""How much was added to the loss: ε of label smoothing, c of c logsumexp², by least squares.

What is sent back is linear in such an amount x, so that G = G₀ + x G₁ + x² G₂. Collections at x,
−x and 0 give the three matrices. The amount is the one that brings a multiple of G nearest to
theirs, in all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.compared import collected
from refcurv.judge.diagnosis.likely import likely
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import fitted
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, combined
from refcurv.judge.draws import confirmed
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


def drawn(case: Case, found: Mapping[str, Side], layers: Sequence[str]) -> Chosen | None:
    """What was added to the loss of these layers, whose labels theirs drew; None if nothing was.

    Definition
        s(G) is the mean over layers of log |G − r Y(x)|/|r Y(x)|, less the same at x = 0, at the
        amount x where it is least. Drawn labels make it less than 0 by chance. An amount is named
        if s(theirs) is below s of CONFIRMED honest dumps: theirs, if honest but for a factor, is
        one more of them, and the least with odds of 1/(CONFIRMED + 1). A dump of this amount must
        then often be as far from their mean as theirs (`likely`).

    Proof: tests/test_judge_loss.py::test_an_amount_beside_drawn_labels_has_its_name
    """
    curves = _curves(case, layers)
    layers = [x for x in layers if all(x in of and of[x].T.trace() > 0 for of in curves.values())]
    if not layers:
        return None
    dumps: dict[str, list[Array]] = {x: [] for x in layers}
    for some in confirmed(case):
        for x in layers:
            dumps[x].append(some[x])
    every = {x: np.concatenate([next(iter(curves.values()))[x].T[None], *dumps[x]]) for x in layers}
    below: dict[str, float] = {}
    for name, of in curves.items():
        s_K = _gained({x: (of[x], every[x]) for x in layers})
        below[name] = float(s_K[0] - s_K[1:].min())
    first = min(below, key=lambda name: below[name])
    amount = _of_traces([curves[first][x] for x in layers]) if below[first] < 0 else None
    one = Setting(**{first: amount}) if amount else None  # type: ignore[arg-type]
    if one is None or not likely(case, one, layers):
        return None
    recompute(case, found, list(found["G"].ladders), [one])
    side, idea = found["G"], Idea(one.faults, one)
    left = side.table.get(idea, {})
    whole = {k: side.ladders[k].whole(y) for k, y in left.items()}
    return Chosen(idea, {k: replace(y, spread=whole[k]) for k, y in left.items()})


def _curves(case: Case, layers: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Field of a setting → layer → theirs and G of its amount."""
    ends = {
        name: (Setting(**{name: x}), Setting(**{name: -x}))  # type: ignore[arg-type]
        for name, x in STEP.items()
    }
    every = [REFERENCE, *(one for pair in ends.values() for one in pair)]
    made = collected(case, layers, every, "G")
    out: dict[str, dict[str, Curve]] = {name: {} for name in STEP}
    for name, (plus, minus) in ends.items():
        for layer, (T, of) in made.items():
            if {REFERENCE, plus, minus} <= {*of}:
                out[name][layer] = curve(T, of[REFERENCE], of[plus], of[minus], STEP[name])
    return out


def _gained(of: Mapping[str, tuple[Curve, Array]]) -> Array:
    """s of each of K matrices, (K,): layer → its curve, and the matrices (K, O, O)."""
    total: Array = np.zeros(())
    for one, G_KOO in of.values():
        Y = np.stack([one.at(x)[0].ravel() for x in (0.0, *AMOUNTS)])
        T = G_KOO.reshape(len(G_KOO), -1)
        size = norm(T, axis=1)[:, None] * norm(Y, axis=1)
        cosine = (T @ Y.T) / np.where(size > 0, size, 1)
        error_2 = np.maximum(1 / np.maximum(cosine, 1e-6) ** 2 - 1, 1e-24)
        total = total + np.log(error_2) / 2 / len(of)
    return np.asarray(total[:, 1:].min(axis=1) - total[:, 0])


def _of_traces(curves: Sequence[Curve]) -> float | None:
    """The least amount of which theirs has the traces, on the mean of their logarithms.

    The form would say more than there is: an added part that is the same for all labels makes
    drawing less of the whole.
    """
    every = np.geomspace(AMOUNTS[0], AMOUNTS[-1], 400)
    off = np.zeros(len(every))
    for T, (zero, one, two) in curves:
        trace = np.trace(zero) + every * (np.trace(one) + every * np.trace(two))
        off += np.log(np.maximum(trace, 1e-300) / np.trace(T)) / len(curves)
    turns = np.flatnonzero(np.diff(np.sign(off)))
    if not len(turns):
        return None
    k = int(turns[0])
    share = off[k] / (off[k] - off[k + 1])
    return float(every[k] * (every[k + 1] / every[k]) ** share)


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
