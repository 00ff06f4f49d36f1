"""What arrays with a radius refuse: to become a float, a bool or a NumPy array, and to be compared.

Balls and dual balls are such arrays. NumPy's functions reach them through tables of those that are
known: any other is a TypeError, for it would take their midpoints.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, NoReturn, Self

import numpy as np


def _refused(what: str) -> Callable[..., NoReturn]:
    """A method that says what balls have not."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a ball has no {what}: its radius would be lost")

    return refuse


class Guarded:
    """What balls and dual balls refuse, for a radius would be lost, and the way to their functions.

    A class says which of NumPy's functions are known of it: UFUNCS and FUNCTIONS.
    """

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    shape: Any
    UFUNCS: ClassVar[Mapping[Any, Callable[..., Any]]]
    FUNCTIONS: ClassVar[Mapping[Any, Callable[..., Any]]]

    __float__ = __int__ = __complex__ = _refused("float")
    __bool__ = _refused("truth")
    __array__ = _refused("NumPy array")
    __iter__ = _refused("iterator")
    __lt__ = __le__ = __gt__ = __ge__ = _refused("order")
    __eq__ = __ne__ = _refused("equality")

    def __repr__(self) -> str:
        """In an error: no address, and no midpoint without its radius."""
        return f"<{type(self).__name__} {self.shape}>"

    @property
    def real(self) -> Self:
        """Themselves."""
        return self

    def astype(self, *_: Any, **__: Any) -> Self:
        """Themselves: no other type holds a radius."""
        return self

    def add_at(self, at: Any, x: Any) -> None:
        """As numpy.add.at."""
        raise NotImplementedError

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kw: Any) -> Any:
        if method == "at" and ufunc is np.add and isinstance(inputs[0], Guarded):
            return inputs[0].add_at(*inputs[1:])
        made = self.UFUNCS.get(ufunc)
        if method != "__call__" or made is None or kw:
            raise TypeError(f"numpy.{ufunc.__name__} is not known of {type(self).__name__}")
        return made(*inputs)

    def __array_function__(self, function: Any, _: Any, args: Any, kwargs: Any) -> Any:
        made = self.FUNCTIONS.get(function)
        if made is None:
            raise TypeError(f"numpy.{function.__name__} is not known of {type(self).__name__}")
        return made(*args, **kwargs)


def _of_numpy(left: Callable[[Any, Any], Any], right: str) -> Callable[[Any, Any], Any]:
    """A ufunc of two: the operator, or what it is called on the right of an array of NumPy's."""
    return lambda x, y: left(x, y) if isinstance(x, Guarded) else getattr(y, right)(x)


ARITHMETIC: Final[Mapping[Any, Callable[..., Any]]] = MappingProxyType(
    {
        np.add: _of_numpy(operator.add, "__radd__"),
        np.subtract: _of_numpy(operator.sub, "__rsub__"),
        np.multiply: _of_numpy(operator.mul, "__rmul__"),
        np.true_divide: _of_numpy(operator.truediv, "__rtruediv__"),
        np.isfinite: lambda x: x.finite(),
    }
)
"""What NumPy asks for where one of its arrays stands on the left."""
