"""How large the terms of a result are: what budgets of whole passes are relative to.

A result that is zero by theory, or a difference of large numbers, is rounded at the size of what
it is made of, and its own size says nothing. So the same NumPy code runs again on arrays that
multiply every number they make by 1 + SHAKE ξ, ξ random with mean 0 and square 1. To first order
the result moves by SHAKE Σ_r ξ_r r ∂y/∂r over all intermediate numbers r, which is about SHAKE
times the root of

    Σ_r (r ∂y/∂r)²

the sum of the squares of its terms. Rounding does the same with 2⁻⁵³ in SHAKE's place, and so is
at most `tolerance.probable` of that root. This is Monte Carlo arithmetic (Parker 1997; Denis, de
Oliveira Castro & Petit 2016), used for the size of an error and not for the error itself.

Proof: tests/test_audit.py::test_budgets_cover_the_rounding_that_longdouble_shows,
    tests/test_sound_models.py::test_a_thousand_sound_models_pass
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array
from refcurv.model.transformer import Parameters

SHAKE = 2.0**-36
"""So small that what it moves moves in proportion, so large that rounding is not seen beside it."""

POOL = 2**16
"""Factors drawn at a time."""

EXACT = frozenset(
    {
        np.absolute, np.conjugate, np.copysign, np.fabs, np.maximum, np.minimum, np.negative,
        np.positive,
    }
)  # fmt: skip
"""Operations that round nothing."""


class Shakes:
    """Random factors 1 + SHAKE ξ, each used once; ξ is even between −√3 and √3, its square 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._pool: Array = np.empty(0)

    def factors(self, shape: tuple[int, ...]) -> Array:
        """The next ones, in that shape."""
        n = math.prod(shape)
        if n > len(self._pool):
            xi = self._rng.random(max(n, POOL)) * 2 - 1
            self._pool = 1 + math.sqrt(3) * SHAKE * xi
        taken, self._pool = self._pool[:n], self._pool[n:]
        return taken.reshape(shape)


class Shaken(np.ndarray):
    """An array whose every offspring is off by a relative SHAKE, entry by entry.

    Real and imaginary parts are shaken apart: the imaginary part of a complex step is a derivative,
    which has roundings of its own.
    """

    shakes: Shakes | None = None

    def __array_finalize__(self, parent: Array | None) -> None:
        """Views and copies draw from where their parent draws."""
        self.shakes = getattr(parent, "shakes", None)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        """The operation on plain arrays, and then the shake."""
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        result = getattr(ufunc, method)(
            *map(_plain, inputs), **{name: _plain(x) for name, x in options.items()}
        )
        if ufunc not in EXACT:
            _shake(result, self.shakes)
        return out[0] if out is not None else self._own(result)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        """Functions that choose and join return what they were given."""
        return self._own(super().__array_function__(function, types, arguments, options))

    def _own(self, result: Any) -> Any:
        if type(result) is np.ndarray and result.dtype.kind in "fc":
            result = result.view(Shaken)
            result.shakes = self.shakes
        return result


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Shaken) else x


def _shake(x: Any, shakes: Shakes | None) -> None:
    """Multiply each real number of an array by 1 + SHAKE ξ, in place."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc" or shakes is None:
        return
    for part in (x.real, x.imag) if x.dtype.kind == "c" else (x,):
        np.multiply(part, shakes.factors(part.shape), out=part)


RUNS = 8
"""Runs where one by chance may have moved a result too little: that all did so has no odds."""


def shaken(parameters: Parameters, seed: list[int]) -> Parameters:
    """The same parameters, shaken anew whenever they are read."""
    shakes = Shakes(np.random.default_rng(seed))

    def read(name: str) -> Array:
        own = np.array(parameters[name]).view(Shaken)
        own.shakes = shakes
        _shake(_plain(own), shakes)
        return own

    return Lazy(list(parameters), read)


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
