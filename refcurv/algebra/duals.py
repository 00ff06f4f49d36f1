"""Dual numbers over balls: a number and its derivative along one direction, each enclosed.

What runs on balls runs on these as it stands. Then everything that comes out has beside it its
derivative along the direction that went in, by the rules of calculus: no step, no truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra.balls import Balls, exact, joined, pi, spread, zeros
from refcurv.algebra.balls import chosen as chosen_balls
from refcurv.algebra.guarded import ARITHMETIC, Guarded
from refcurv.law.checks import Array


class Duals(Guarded):
    """value + ε derivative, ε² = 0. Mixed with them are what balls are mixed with, and balls.

    Cost: three products for a product of two; twice a ball's work for anything else.
    Proof: tests/test_balls.py
    """

    __slots__ = ("derivative", "value")

    def __init__(self, value: Balls, derivative: Balls) -> None:
        self.value, self.derivative = value, derivative

    # -------------------------------------------------------------- shape

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """As NumPy's."""
        return self.value.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of objects."""
        return self.value.dtype

    @property
    def T(self) -> Duals:
        """As NumPy's."""
        return Duals(self.value.T, self.derivative.T)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, at: Any) -> Duals:
        return Duals(self.value[at], self.derivative[at])

    def __setitem__(self, at: Any, x: Any) -> None:
        self.value[at], self.derivative[at] = _value(x), _derivative(x)

    def reshape(self, *shape: Any) -> Duals:
        """As NumPy's."""
        return Duals(self.value.reshape(*shape), self.derivative.reshape(*shape))

    def transpose(self, *axes: Any) -> Duals:
        """As NumPy's."""
        return Duals(self.value.transpose(*axes), self.derivative.transpose(*axes))

    def swapaxes(self, one: int, two: int) -> Duals:
        """As NumPy's."""
        return Duals(self.value.swapaxes(one, two), self.derivative.swapaxes(one, two))

    # -------------------------------------------------------------- arithmetic

    def __neg__(self) -> Duals:
        return Duals(-self.value, -self.derivative)

    def __add__(self, x: Any) -> Duals:
        return _of(self.value + _value(x), self.derivative + _derivative(x))

    def __sub__(self, x: Any) -> Duals:
        return _of(self.value - _value(x), self.derivative - _derivative(x))

    def __rsub__(self, x: Any) -> Duals:
        return _of(_value(x) - self.value, _derivative(x) - self.derivative)

    def __mul__(self, x: Any) -> Duals:
        own = self.derivative * _value(x)
        theirs = own if not isinstance(x, Duals) else own + self.value * x.derivative
        return Duals(self.value * _value(x), theirs)

    def __truediv__(self, x: Any) -> Duals:
        q = self.value / _value(x)
        if not isinstance(x, Duals):
            return Duals(q, self.derivative / _value(x))
        return Duals(q, (self.derivative - q * x.derivative) / x.value)

    def __rtruediv__(self, x: Any) -> Duals:
        q = _value(x) / self.value
        return Duals(q, -q * self.derivative / self.value)

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, x: Any) -> Duals:
        own = self.derivative @ _value(x)
        theirs = own if not isinstance(x, Duals) else own + self.value @ x.derivative
        return Duals(self.value @ _value(x), theirs)

    def __rmatmul__(self, x: Balls) -> Duals:
        return Duals(x @ self.value, x @ self.derivative)

    def sum(self, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Duals:
        """As NumPy's."""
        return Duals(self.value.sum(axis, keepdims), self.derivative.sum(axis, keepdims))

    def mean(self, axis: int, keepdims: bool = False) -> Duals:
        """As NumPy's."""
        return Duals(self.value.mean(axis, keepdims), self.derivative.mean(axis, keepdims))

    # -------------------------------------------------------------- functions

    def exp(self) -> Duals:
        """e^x."""
        e = self.value.exp()
        return Duals(e, e * self.derivative)

    def log(self) -> Duals:
        """The natural logarithm."""
        return Duals(self.value.log(), self.derivative / self.value)

    def rsqrt(self) -> Duals:
        """1/√x, whose derivative is −1/(2 x √x)."""
        r = self.value.rsqrt()
        return Duals(r, -r / self.value / 2 * self.derivative)

    def tanh(self) -> Duals:
        """tanh x, whose derivative is 1 − tanh²."""
        t = self.value.tanh()
        return Duals(t, (1 - t * t) * self.derivative)

    def erf(self) -> Duals:
        """erf x, whose derivative is 2/√π exp(−x²)."""
        slope = 2 * pi().rsqrt() * (-(self.value * self.value)).exp()
        return Duals(self.value.erf(), slope * self.derivative)

    # -------------------------------------------------------------- decisions and bounds

    def above(self, bound: float) -> Array:
        """That of the values. A value that is exactly the bound is not above it."""
        return self.value.above(bound)

    def finite(self) -> Array:
        """bool array: has each a finite radius?"""
        return np.asarray(self.value.finite() & self.derivative.finite())

    def rounded(self) -> Array:
        """Midpoints of the values, as float64."""
        return self.value.rounded()

    @staticmethod
    def chosen(where: Array, one: Any, other: Any) -> Duals:
        """As numpy.where."""
        value = chosen_balls(where, _value(one), _value(other))
        return _of(value, chosen_balls(where, _derivative(one), _derivative(other)))

    # -------------------------------------------------------------- NumPy's functions

    def add_at(self, at: Any, x: Any) -> None:
        """As numpy.add.at."""
        self.value.add_at(at, _value(x))
        self.derivative.add_at(at, _derivative(x))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Duals) else x


def _derivative(x: Any) -> Any:
    return x.derivative if isinstance(x, Duals) else 0


def _of(value: Balls, derivative: Balls) -> Duals:
    """A constant that widened the value widens its derivative of 0."""
    if derivative.shape != value.shape:
        derivative = derivative + zeros(value.shape)
    return Duals(value, derivative)


def _concatenated(parts: Sequence[Any], axis: int = 0) -> Duals:
    duals = [x if isinstance(x, Duals) else Duals(x, zeros(x.shape)) for x in parts]
    return Duals(
        joined([x.value for x in duals], axis), joined([x.derivative for x in duals], axis)
    )


def _zeros_like(x: Duals, dtype: Any = None, shape: Any = None) -> Duals:
    wanted = x.shape if shape is None else shape
    return Duals(zeros(wanted), zeros(wanted))


Duals.UFUNCS = ARITHMETIC
Duals.FUNCTIONS = MappingProxyType(
    {
        np.concatenate: _concatenated,
        np.broadcast_to: lambda x, shape: Duals(
            spread(x.value, shape), spread(x.derivative, shape)
        ),
        np.zeros_like: _zeros_like,
        np.ones_like: lambda x, dtype=None, shape=None: exact(np.ones(shape or x.shape)),
    }
)
