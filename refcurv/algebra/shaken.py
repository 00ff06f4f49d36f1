"""Arrays that multiply every number they make by 1 + SHAKE ξ, ξ random with mean 0 and square 1.

The same NumPy code runs on them. To first order a result y then moves by SHAKE Σ_r ξ_r r ∂y/∂r over
all intermediate numbers r, which is about SHAKE times the root of

    Σ_r (r ∂y/∂r)²

the sum of the squares of its terms. Rounding does the same with 2⁻⁵³ in SHAKE's place. This is
Monte Carlo arithmetic (Parker 1997; Denis, de Oliveira Castro & Petit 2016), used for the size of
an error and not for the error itself.

Proof: tests/test_roundings.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refcurv.law.checks import Array

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
    """Random factors 1 + SHAKE ξ, each used once; ξ is even between −√3 and √3, its square 1.

    `drawn` counts them: so many numbers were shaken.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._pool: Array = np.empty(0)
        self.drawn = 0

    def factors(self, shape: tuple[int, ...]) -> Array:
        """The next ones, in that shape."""
        n = math.prod(shape)
        self.drawn += n
        if n > len(self._pool):
            xi = self._rng.random(max(n, POOL)) * 2 - 1
            self._pool = 1 + math.sqrt(3) * SHAKE * xi
        taken, self._pool = self._pool[:n], self._pool[n:]
        return taken.reshape(shape)

    def shake(self, x: Any) -> None:
        """Multiply each real number of an array by 1 + SHAKE ξ, in place."""
        for part in _parts(x):
            np.multiply(part, self.factors(part.shape), out=part)

    def shake_sums(self, x: Any, sizes: tuple[Array, ...]) -> None:
        """Add SHAKE ξ times the size of its terms to each real number of an array, in place."""
        for part, size in zip(_parts(x), sizes, strict=False):
            np.add(part, (self.factors(part.shape) - 1) * size, out=part)


class Shaken(np.ndarray):
    """An array whose every offspring is off by a relative SHAKE, entry by entry.

    Real and imaginary parts are shaken apart: the imaginary part of a complex step is a derivative,
    which has roundings of its own.
    """

    shakes: Shakes | None = None

    @classmethod
    def of(cls, x: Array, shakes: Shakes) -> Shaken:
        """A copy of an array, shaken once, whose offspring draws from there."""
        own = np.array(x).view(cls)
        own.shakes = shakes
        shakes.shake(_plain(own))
        return own

    def __array_finalize__(self, parent: Array | None) -> None:
        """Views and copies draw from where their parent draws."""
        self.shakes = getattr(parent, "shakes", None)

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        """The operation on plain arrays, and then the shake."""
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        inputs = tuple(map(_plain, inputs))
        options = {name: _plain(x) for name, x in options.items()}
        sizes = self.sizes(ufunc, method, inputs, options)
        result = getattr(ufunc, method)(*inputs, **options)
        if self.shakes is not None and ufunc not in EXACT:
            if sizes is None:
                self.shakes.shake(result)
            else:
                self.shakes.shake_sums(inputs[0] if method == "at" else result, sizes)
        return out[0] if out is not None else self._own(result)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        """Functions that choose and join return what they were given."""
        return self._own(super().__array_function__(function, types, arguments, options))

    def sizes(
        self, ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[Array, ...] | None:
        """How large the terms of a sum are, (real part, imaginary part); None: as its result is."""
        return None

    def _own(self, result: Any) -> Any:
        if type(result) is np.ndarray and result.dtype.kind in "fc":
            result = result.view(type(self))
            result.shakes = self.shakes
        return result


class ShakenSums(Shaken):
    """As `Shaken`, but sums and products of matrices are off by SHAKE times Σ |terms|.

    So large is what their roundings are relative to, in any order of summation, though the sum may
    cancel (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """

    def sizes(
        self, ufunc: np.ufunc, method: str, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[Array, ...] | None:
        """Σ |terms|."""
        if ufunc is np.matmul and method == "__call__":
            (a, *ia), (b, *ib) = ([abs(part) for part in _parts(x)] for x in inputs)
            if not ia and not ib:
                return (a @ b,)
            ia, ib = ia or [np.zeros_like(a)], ib or [np.zeros_like(b)]
            return a @ b + ia[0] @ ib[0], a @ ib[0] + ia[0] @ b
        if ufunc is np.add and method == "reduce":
            kept = {name: x for name, x in options.items() if name not in ("out", "dtype")}
            return tuple(np.add.reduce(abs(part), **kept) for part in _parts(inputs[0]))
        if ufunc is np.add and method == "at":
            x, at, terms = inputs
            sizes = tuple(np.zeros(x.shape) for _ in _parts(x))
            for size, part in zip(sizes, _parts(np.asarray(terms)), strict=False):
                np.add.at(size, at, abs(part))
            return sizes
        return None


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Shaken) else x


def _parts(x: Any) -> tuple[Array, ...]:
    """The real numbers of an array, or its real and imaginary parts; nothing of another kind."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return ()
    return (x.real, x.imag) if x.dtype.kind == "c" else (x,)
