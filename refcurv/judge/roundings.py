"""How large the terms of a result are: what budgets of whole passes are relative to.

A result that is zero by theory, or a difference of large numbers, is rounded at the size of what
it is made of, and its own size says nothing. So the same NumPy code runs again on arrays that shake
every number they make (`algebra.shaken`). How far the result moves is the root of the sum of the
squares of its terms. Rounding is at most `tolerance.probable` of that root.

Proof: tests/test_audit.py::test_budgets_cover_the_rounding_that_longdouble_shows,
    tests/test_sound_models.py::test_more_sound_models_pass
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.shaken import SHAKE, Shaken, Shakes
from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array
from refcurv.model.transformer import Parameters

RUNS = 8
"""Runs where one by chance may have moved a result too little: that all did so has no odds."""


def shaken(parameters: Parameters, seed: list[int]) -> Parameters:
    """The same parameters, shaken anew whenever they are read."""
    shakes = Shakes(np.random.default_rng(seed))
    return Lazy(list(parameters), lambda name: Shaken.of(parameters[name], shakes))


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """A result as it is, and as it comes out when everything is shaken, run n by its own seed."""

    here: Array
    again: Callable[[int], Array]
    moved: list[Array] = field(default_factory=list)

    def size(self, runs: int, part: Callable[[Array], Array] = np.asarray) -> float:
        """The root of the sum of squares of the terms of (a linear part of) the result.

        Its own size is among them, for it is rounded itself.
        """
        while len(self.moved) < runs:
            self.moved.append(np.asarray(self.again(len(self.moved))))
        moves = [float(norm(part(x - self.here))) for x in self.moved[:runs]]
        return math.hypot(norm(part(self.here)), math.hypot(*moves) / math.sqrt(runs) / SHAKE)
