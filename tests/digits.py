"""Numbers of many digits for `oracles`: mpmath's, with the methods by which NumPy calls them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np

Operator = Callable[["Digits", Any], Any]


def elementwise(made: Callable[[Any, Any], Any]) -> Operator:
    """An operator of two numbers; of a number and an array NumPy makes one of each entry."""

    def operator(one: Digits, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        return Digits(made(one.x, Digits(other).x))

    return operator


def middle(one: Any, at: tuple[int, ...]) -> Fraction:
    """The exact midpoint of an entry of an `Enclosed`."""
    return sum((Fraction(float(p)) for p in one.parts[(slice(None), *at)]), Fraction())


def lies_inside(one: Any, other: Any, at: tuple[int, ...]) -> bool:
    """Does a ball of an `Enclosed` lie inside that of another?"""
    far = abs(middle(one, at) - middle(other, at)) + Fraction(float(one.radius[at]))
    return far <= Fraction(float(other.radius[at]))


class Digits:
    """A number of mpmath's current precision. Floats and integers beside it are exact."""

    __slots__ = ("x",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, x: Any) -> None:
        if isinstance(x, np.integer | np.floating):
            x = x.item()
        self.x = x.x if isinstance(x, Digits) else mpmath.mpf(x)

    __add__ = elementwise(lambda x, y: x + y)
    __radd__ = elementwise(lambda x, y: y + x)
    __sub__ = elementwise(lambda x, y: x - y)
    __rsub__ = elementwise(lambda x, y: y - x)
    __mul__ = elementwise(lambda x, y: x * y)
    __rmul__ = elementwise(lambda x, y: y * x)
    __truediv__ = elementwise(lambda x, y: x / y)
    __rtruediv__ = elementwise(lambda x, y: y / x)
    __pow__ = elementwise(lambda x, y: x**y)

    def __neg__(self) -> Digits:
        return Digits(-self.x)

    def __abs__(self) -> Digits:
        return Digits(abs(self.x))

    def __lt__(self, y: Any) -> bool:
        return bool(self.x < Digits(y).x)

    def __gt__(self, y: Any) -> bool:
        return bool(self.x > Digits(y).x)

    def __eq__(self, y: object) -> bool:
        return bool(self.x == Digits(y).x)

    def __floor__(self) -> Digits:
        return Digits(mpmath.floor(self.x))

    def __ceil__(self) -> Digits:
        return Digits(mpmath.ceil(self.x))

    def exp(self) -> Digits:
        return Digits(mpmath.exp(self.x))

    def log(self) -> Digits:
        return Digits(mpmath.log(self.x))

    def sqrt(self) -> Digits:
        return Digits(mpmath.sqrt(self.x))

    def tanh(self) -> Digits:
        return Digits(mpmath.tanh(self.x))

    def cos(self) -> Digits:
        return Digits(mpmath.cos(self.x))

    def sin(self) -> Digits:
        return Digits(mpmath.sin(self.x))

    def arctan(self) -> Digits:
        return Digits(mpmath.atan(self.x))

    def erf(self) -> Digits:
        return Digits(mpmath.erf(self.x))


def of(array: np.ndarray) -> np.ndarray:
    """An array of them, exactly the numbers given."""
    out = np.empty(array.shape, object)
    out.reshape(-1)[:] = [Digits(one) for one in array.reshape(-1).tolist()]
    return out
