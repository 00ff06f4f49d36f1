"""Balls: real numbers, each known up to a radius. The one door to FLINT (extra `certified`).

A ball [m ± r] holds a real number that nobody needs to know. Every operation gives a ball that
holds the exact result for every number of its operands, so that a radius is a proof. What could
lose it is refused: a ball becomes no float, no bool and no NumPy array, it has no order, and a
float of NumPy's is never taken as a number, for it may be the rounded result of something. Exact
numbers come in by `exact`; bounds go out by `rounded` and `radii`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cmp_to_key
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra.guarded import ARITHMETIC, Guarded
from refcurv.law.checks import Array, NonFiniteError, RefcurvError

try:
    import flint
except ImportError:  # the extra is not installed; `require_flint` says so
    flint: Any = None  # type: ignore[no-redef]


class UndecidedError(RefcurvError):
    """Balls overlap where a decision was needed. More bits make them smaller."""


class MissingFlintError(RefcurvError):
    """python-flint is not installed."""


def require_flint() -> None:
    """Raise MissingFlintError, with the way out, unless python-flint is there."""
    if flint is None:
        raise MissingFlintError(
            "certify: python-flint is not installed. Install it: pip install 'refcurv[certified]'"
        )


@contextmanager
def bits(precision: int) -> Iterator[None]:
    """Midpoints of results have so many bits, inside.

    It is FLINT's one setting of the process: in another thread it changes the bits too. Radii hold
    whatever the bits are.
    """
    require_flint()
    before = flint.ctx.prec
    flint.ctx.prec = precision
    try:
        yield
    finally:
        flint.ctx.prec = before


def precision() -> int:
    """The bits of midpoints now."""
    require_flint()
    return int(flint.ctx.prec)


class Balls(Guarded):
    """An array of balls, with the part of NumPy's interface that a transformer needs.

    Mixed with balls are balls, whole numbers and bools, and plain Python floats, which are the
    numbers of a configuration and exact. NumPy's floats are refused (`exact` takes them).

    Cost: a product of matrices is FLINT's; anything else is a call for each entry.
    Proof: tests/test_balls.py
    """

    __slots__ = ("_x",)

    def __init__(self, x: Array) -> None:
        self._x = x

    # -------------------------------------------------------------- shape

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self._x.shape

    @property
    def ndim(self) -> int:
        """As NumPy's."""
        return self._x.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of objects."""
        return self._x.dtype

    @property
    def T(self) -> Balls:
        """As NumPy's."""
        return Balls(self._x.T)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, at: Any) -> Balls:
        return _wrapped(self._x[at])

    def __setitem__(self, at: Any, value: Any) -> None:
        self._x[at] = _operand(value)

    def reshape(self, *shape: Any) -> Balls:
        """As NumPy's."""
        return Balls(self._x.reshape(*shape))

    def transpose(self, *axes: Any) -> Balls:
        """As NumPy's."""
        return Balls(self._x.transpose(*axes))

    def swapaxes(self, one: int, two: int) -> Balls:
        """As NumPy's."""
        return Balls(self._x.swapaxes(one, two))

    # -------------------------------------------------------------- arithmetic

    def __neg__(self) -> Balls:
        return Balls(-self._x)

    def __add__(self, other: Any) -> Any:
        return NotImplemented if _wider(other) else _wrapped(self._x + _operand(other))

    def __sub__(self, other: Any) -> Any:
        return NotImplemented if _wider(other) else _wrapped(self._x - _operand(other))

    def __rsub__(self, other: Any) -> Balls:
        return _wrapped(_operand(other) - self._x)

    def __mul__(self, other: Any) -> Any:
        return NotImplemented if _wider(other) else _wrapped(self._x * _operand(other))

    def __truediv__(self, other: Any) -> Any:
        return NotImplemented if _wider(other) else _wrapped(self._x / _operand(other))

    def __rtruediv__(self, other: Any) -> Balls:
        return _wrapped(_operand(other) / self._x)

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: Any) -> Any:
        return NotImplemented if _wider(other) else _product(self, other)

    def sum(self, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Balls:
        """As NumPy's."""
        total: Any = np.add.reduce  # from an exact 0, which is also the sum of nothing
        return _wrapped(total(self._x, axis=axis, keepdims=keepdims, initial=flint.arb(0)))

    def mean(self, axis: int, keepdims: bool = False) -> Balls:
        """As NumPy's: the sum, divided by how many there are."""
        return _wrapped((self.sum(axis, keepdims) / self.shape[axis])._x)

    # -------------------------------------------------------------- functions, each the real one

    def exp(self) -> Balls:
        """e^x."""
        return _each(self, "exp")

    def log(self) -> Balls:
        """The natural logarithm."""
        return _each(self, "log")

    def sqrt(self) -> Balls:
        """√x."""
        return _each(self, "sqrt")

    def rsqrt(self) -> Balls:
        """1/√x."""
        return _each(self, "rsqrt")

    def tanh(self) -> Balls:
        """tanh x."""
        return _each(self, "tanh")

    def erf(self) -> Balls:
        """2/√π ∫₀ˣ exp(−t²) dt."""
        return _each(self, "erf")

    def cos(self) -> Balls:
        """cos x."""
        return _each(self, "cos")

    def sin(self) -> Balls:
        """sin x."""
        return _each(self, "sin")

    # -------------------------------------------------------------- decisions and bounds

    def floor(self) -> Balls:
        """The largest whole number that is not above; UndecidedError where it may be another."""
        return _wrapped(_FLOOR(self._x))

    def is_zero(self) -> Array:
        """bool array: is each number exactly 0? UndecidedError where a ball merely holds 0."""
        return np.asarray(_ZERO(self._x), dtype=bool)

    def midpoints(self) -> Balls:
        """Their middles, without a radius: exact numbers near the real ones."""
        return _each(self, "mid")

    def above(self, bound: float) -> Array:
        """bool array: is each number > bound? UndecidedError where a ball holds both sides."""
        return np.asarray(_ABOVE(self._x, flint.arb(bound)), dtype=bool)

    def finite(self) -> Array:
        """bool array: has each ball a finite radius?"""
        return np.asarray(_FINITE(self._x), dtype=bool)

    def rounded(self) -> Array:
        """Midpoints, correctly rounded to float64: infinite or NaN where float64 has none."""
        return np.asarray(_NEAREST(self._x), dtype=np.float64)

    def radii(self) -> Array:
        """Radii, rounded upwards to float64: every number is within them of the midpoint."""
        return np.asarray(_RADIUS(self._x), dtype=np.float64)

    def descending(self) -> Array:
        """Indices that sort a vector, the largest first; equal exact numbers stay in order.

        UndecidedError where balls overlap: of `midpoints` none do.
        """
        x: Any = self._x
        order = sorted(range(len(x)), key=cmp_to_key(lambda i, j: _order(x[j], x[i])))
        return np.array(order, np.int64)

    def whole(self, k: int) -> tuple[Array, Array]:
        """Two arrays of Python's whole numbers: at or below, at or above 2^k times each number.

        NonFiniteError where a ball has no bound.
        """
        if not self.finite().all():
            raise NonFiniteError("certify: a ball has no bound: more bits are needed.")
        return _DOWN(self._x, k), -_DOWN(-self._x, k)

    def split(self, count: int) -> list[Array]:
        """So many float64 whose exact sum is near each number, then how far it is at most.

        Each part is the float64 nearest to what those before it leave of the midpoint. A ball
        without bound, or beyond the range of float64, is 0 ± ∞.
        """
        with bits(64 * (count + 2)):
            found = [_split(x, count) for x in self._x.reshape(-1)]
        parts = np.array(found, dtype=np.float64).reshape(-1, count + 1)
        return [parts[:, k].reshape(self.shape) for k in range(count + 1)]

    def most(self) -> Array:
        """Upper bounds of the magnitudes, as float64."""
        return np.asarray(_MOST(self._x), dtype=np.float64)

    def magnitudes(self) -> Balls:
        """Upper bounds of the magnitudes, as exact numbers."""
        return _each(self, "abs_upper")

    def least(self) -> Array:
        """Lower bounds of the magnitudes, as float64."""
        return np.asarray(_LEAST(self._x), dtype=np.float64)

    def contains(self, x: Array) -> Array:
        """bool array: may each number be this one? `exact` says which are taken."""
        return np.asarray(_HOLDS(self._x, exact(x)._x), dtype=bool)

    def within(self, other: Balls) -> Array:
        """bool array: does each ball lie inside that of `other`?"""
        return np.asarray(_INSIDE(self._x, other._x), dtype=bool)

    def overlaps(self, other: Balls) -> Array:
        """bool array: may the two numbers be one?"""
        return np.asarray(_OVERLAP(self._x, other._x), dtype=bool)

    def texts(self, digits: int) -> Array:
        """Decimal midpoints of so many digits, as text; the radius is not in them."""
        return np.asarray(_TEXT(self._x, digits), dtype=object)

    # -------------------------------------------------------------- NumPy's functions

    def add_at(self, at: Any, x: Any) -> None:
        """As numpy.add.at."""
        np.add.at(self._x, at, _operand(x))


# ------------------------------------------------------------------ in


def exact(x: Any) -> Balls:
    """The numbers of an array, taken as exact: floats as the binary fractions that they are.

    Raises NonFiniteError for NaN and infinity, RefcurvError for what is no float or whole number;
    for a list too, of which NumPy would make one dtype, and round.
    """
    require_flint()
    if isinstance(x, list | tuple):
        raise RefcurvError("certify: numbers of a list are not taken as exact. Give an array.")
    array = np.asarray(x)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise RefcurvError(f"certify: numbers of {array.dtype} are not taken as exact.")
    if not np.isfinite(array).all():
        raise NonFiniteError("certify: a number is NaN or infinite.")
    kind = float if array.dtype.kind == "f" else int
    made = np.empty(array.shape, object)
    made.reshape(-1)[:] = [flint.arb(kind(one)) for one in array.reshape(-1).tolist()]
    return Balls(made)


def pi() -> Balls:
    """π."""
    require_flint()
    return _wrapped(flint.arb.pi())


def zeros(shape: tuple[int, ...]) -> Balls:
    """Exact zeros."""
    return Balls(np.full(shape, flint.arb(0), object))


def around_zero(radius: Array) -> Balls:
    """Numbers of which nothing is known but upper bounds of their magnitudes, float64."""
    require_flint()
    made = np.empty(np.shape(radius), object)
    made.reshape(-1)[:] = [flint.arb(0, flint.arb(r)) for r in np.ravel(radius).tolist()]
    return Balls(made)


def joined(parts: Sequence[Balls], axis: int = 0) -> Balls:
    """As numpy.concatenate."""
    return Balls(np.concatenate([part._x for part in parts], axis=axis))


def spread(x: Balls, shape: tuple[int, ...]) -> Balls:
    """As numpy.broadcast_to."""
    return Balls(np.broadcast_to(x._x, shape))


def chosen(where: Array, one: Any, other: Any) -> Any:
    """As numpy.where; `where` is an array of bools, so that nothing is decided here."""
    if np.asarray(where).dtype != bool:
        raise TypeError("balls are chosen by an array of bools")
    for x in (one, other):
        if _wider(x):
            return x.chosen(where, one, other)
    return _wrapped(np.where(where, _operand(one), _operand(other)))


# ------------------------------------------------------------------ inside


def _wrapped(x: Any) -> Balls:
    """An entry alone becomes an array without axes."""
    if isinstance(x, np.ndarray):
        return Balls(x)
    made = np.empty((), object)
    made[()] = x
    return Balls(made)


def _wider(x: Any) -> bool:
    """Has it a derivative besides (`algebra.duals`)? Then it does the arithmetic."""
    return hasattr(x, "derivative")


def _operand(x: Any) -> Any:
    """What arithmetic takes besides balls: whole numbers, bools, and plain Python floats."""
    if isinstance(x, Balls):
        return x._x
    if type(x) in (int, float, bool):
        return flint.arb(x)
    if isinstance(x, np.integer | np.bool_):
        return flint.arb(int(x))
    if isinstance(x, np.ndarray) and x.dtype.kind in "iub":
        return exact(x)._x
    raise TypeError(f"{type(x).__name__} is not taken as exact: it may be a rounded result")


def _product(one: Any, other: Any) -> Balls:
    if not (isinstance(one, Balls) and isinstance(other, Balls)):
        raise TypeError("a matrix of balls is multiplied by balls alone; `exact` makes them")
    batch = np.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    (n, k), (inner, m) = one.shape[-2:], other.shape[-2:]
    if k != inner:
        raise ValueError(f"a product of matrices {one.shape} and {other.shape}")
    count = math.prod(batch)
    x = np.broadcast_to(one._x, (*batch, n, k)).reshape(count, n * k)
    y = np.broadcast_to(other._x, (*batch, k, m)).reshape(count, k * m)
    out = np.empty((count, n * m), object)
    for b in range(count):
        product = flint.arb_mat(n, k, x[b].tolist()) * flint.arb_mat(k, m, y[b].tolist())
        out[b] = product.entries()
    return Balls(out.reshape(*batch, n, m))


def _each(x: Balls, name: str) -> Balls:
    return _wrapped(np.frompyfunc(lambda one: getattr(one, name)(), 1, 1)(x._x))


def _is_above(x: Any, bound: Any) -> bool:
    if x > bound:
        return True
    if x <= bound:
        return False
    raise UndecidedError(f"certify: {x} is neither above {bound} nor below: more bits are needed.")


def _order(x: Any, y: Any) -> int:
    """1 if x > y, -1 if x < y, 0 if both are one exact number."""
    if x > y or x < y:
        return 1 if x > y else -1
    if x == y:
        return 0
    raise UndecidedError(f"certify: which is larger, {x} or {y}? More bits are needed.")


def _down(x: Any, k: int) -> int:
    """The whole number at or below 2^k times the lower bound of a ball."""
    mantissa, exponent = (int(part) for part in x.lower().man_exp())
    places = exponent + k
    return mantissa << places if places >= 0 else mantissa >> -places


def _floor(x: Any) -> Any:
    whole = x.floor()
    if whole.is_exact():
        return whole
    raise UndecidedError(f"certify: which whole number lies below {x}? More bits are needed.")


def _is_zero(x: Any) -> bool:
    if x.is_zero():
        return True
    if not x.contains(0):
        return False
    raise UndecidedError(f"certify: {x} may be 0, or not: more bits are needed.")


def _nearest(x: Any) -> float:
    return float(x.mid())


def _split(x: Any, count: int) -> tuple[float, ...]:
    parts = []
    for _ in range(count):
        parts.append(float(x.mid()))
        if not math.isfinite(parts[-1]):
            return *[0.0] * count, math.inf
        x = x - parts[-1]
    return *parts, _above(x.abs_upper().mid())


def _above(r: Any) -> float:
    """The float64 at or above an exact number that is not negative; ∞ for NaN."""
    up = math.inf if r.is_nan() else float(r)
    while up < math.inf and not r <= flint.arb(up):
        up = math.nextafter(up, math.inf)
    return up


def _below(r: Any) -> float:
    """The float64 at or below an exact number that is not negative; 0 for NaN."""
    down = 0.0 if r.is_nan() else float(r)
    while down > 0 and not r >= flint.arb(down):
        down = math.nextafter(down, 0)
    return down


_FLOOR = np.frompyfunc(_floor, 1, 1)
_ZERO = np.frompyfunc(_is_zero, 1, 1)
_ABOVE = np.frompyfunc(_is_above, 2, 1)
_FINITE = np.frompyfunc(lambda x: x.is_finite(), 1, 1)
_DOWN = np.frompyfunc(_down, 2, 1)
_NEAREST = np.frompyfunc(_nearest, 1, 1)
_RADIUS = np.frompyfunc(lambda x: _above(x.rad().mid()), 1, 1)
_MOST = np.frompyfunc(lambda x: _above(x.abs_upper().mid()), 1, 1)
_LEAST = np.frompyfunc(lambda x: _below(x.abs_lower().mid()), 1, 1)
_HOLDS = np.frompyfunc(lambda x, y: x.contains(y), 2, 1)
_INSIDE = np.frompyfunc(lambda x, y: y.contains(x), 2, 1)
_OVERLAP = np.frompyfunc(lambda x, y: x.overlaps(y), 2, 1)
_TEXT = np.frompyfunc(lambda x, digits: x.mid().str(digits, radius=False), 2, 1)


def _zeros_like(x: Balls, dtype: Any = None, shape: Any = None) -> Balls:
    return zeros(x.shape if shape is None else shape)


Balls.UFUNCS = MappingProxyType({**ARITHMETIC, np.matmul: _product})
Balls.FUNCTIONS = MappingProxyType(
    {
        np.concatenate: joined,
        np.broadcast_to: spread,
        np.zeros_like: _zeros_like,
        np.ones_like: lambda x, dtype=None, shape=None: _zeros_like(x, dtype, shape) + 1,
    }
)
