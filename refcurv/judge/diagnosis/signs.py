"""Signs of a fault where no transformation of the truth was found that confirms it.

They are looked for last, and a cause that rests on them says so: its `after` is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import see
from refcurv.judge.diagnosis.search import PLAIN, Side
from refcurv.law.checks import Array

LARGEST = 2048
"""Matrices beyond this size have their rank not counted.  Chosen: some seconds each."""

NETWORK = ("B50", "B51", "B52", "B53", "B54", "B55", "B56")
"""Faults of the arithmetic, which also grow with depth."""


class Sign(NamedTuple):
    """A fault, in which layers of which side, how it shows, and what looks the same."""

    fault: str
    side: str
    layers: tuple[str, ...]
    words: str
    alike: tuple[str, ...]


def signs(case: Case, found: Mapping[str, Side]) -> Iterator[Sign]:
    """Lost ranks, and an A that drifts away with depth."""
    collapsed = {name: _collapsed(case, side) for name, side in found.items()}
    for name, ranks in collapsed.items():
        if ranks:
            layer, (theirs, ours) = next(iter(ranks.items()))
            words = f"In {layer}, {name} has rank {theirs}; ours has {ours}. Not confirmed"
            first = "B44" if name == "G" and not collapsed["A"] else "B36"
            other = {"B44": "B36", "B36": "B44"}[first]
            yield Sign(first, name, tuple(ranks), words, (other,))
    if not collapsed["A"]:
        yield from _drifting(found["A"])


def _collapsed(case: Case, side: Side) -> dict[str, tuple[int, int]]:
    """Layer → (rank of theirs, of ours), where theirs is at most two thirds of ours."""
    out = {}
    for layer in side.unexplained():
        seen = see(case, layer)[side.side]
        if seen.T.shape == seen.X.shape and len(seen.X) <= LARGEST:
            floor = side.ladders[layer].steps[0][1]
            theirs, ours = _rank(seen.T, floor), _rank(seen.X, floor)
            if 3 * theirs <= 2 * ours and theirs < ours:
                out[layer] = theirs, ours
    return out


def _rank(X: Array, floor: float) -> int:
    """Eigenvalues above what rounding explains."""
    X = X / max(float(abs(X).max()), 1e-300)  # LAPACK fails near the largest float
    values = np.abs(np.linalg.eigvalsh((X + X.T) / 2))
    return int((values > max(floor, 1e-13 * len(X)) * values.max(initial=0)).sum())


def _drifting(side: Side) -> Iterator[Sign]:
    """A is ours in the first layers alone, and further off behind them."""
    layers = side.unexplained()
    fine = [x for x in side.ladders if side.of(x)[0] == PLAIN and x not in layers]
    order = list(side.ladders)
    if not fine or not layers or max(map(order.index, fine)) > min(map(order.index, layers)):
        return
    errors = [side.plain(x).error for x in layers]
    if len(errors) > 1 and math.isfinite(max(errors)) and errors[-1] > errors[0]:
        words = f"A is ours up to {fine[-1]}, and {errors[0]:.1g} to {max(errors):.1g} off from "
        words += f"{layers[0]} on. Not confirmed"
        yield Sign("B57", "A", tuple(layers), words, NETWORK)
