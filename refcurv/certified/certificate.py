"""Certificates: numbers, each with a radius that is proved, and what floats made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import Balls
from refcurv.algebra.scaling import norm
from refcurv.law.checks import Array, RangeError

ROUTES: Final = ("float64", "float32", "longdouble")
"""The dtypes whose results are put beside the enclosures."""

BUDGETS: Final = ("probable", "worst")
"""Kinds of budgets of what they give (`certified.budgets`)."""


@dataclass(frozen=True, slots=True)
class Enclosed:
    """An array of real numbers, each within `radius` of the exact sum of its `parts`.

    Fields: parts (k, *shape) float64, each part at most half an ulp of the one before; radius
    (*shape) float64, rounded upwards. Nothing of FLINT is needed to read it.
    """

    parts: Array
    radius: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.radius.shape

    @property
    def nearest(self) -> Array:
        """The float64 nearest to each midpoint."""
        return np.asarray(self.parts[0])

    @property
    def settled(self) -> Array:
        """bool array: is `nearest` proved to be the real number, correctly rounded?

        It is where the number lies nearer to it than half the gap to the next float64 towards 0,
        the narrower of the two.
        """
        near = np.abs(self.parts[0])
        gap = near - np.nextafter(near, 0)
        rest = np.abs(self.parts[1:]).sum(axis=0)
        exactly = (rest == 0) & (self.radius == 0)
        far = np.nextafter(np.nextafter(rest + self.radius, np.inf), np.inf)
        return np.asarray(exactly | (far < gap / 2))

    @property
    def largest(self) -> float:
        """A lower bound of the largest magnitude in the array."""
        least = np.abs(self.parts[0]) * (1 - 2**-50) - self.radius
        return float(max(least.max(initial=0.0), 0.0))

    def digits(self, size: float | None = None) -> float:
        """How many decimal digits are certain in every entry, counted from `size`.

        By default that is the largest entry. Infinite where all are exact; 0 where size is.
        """
        worst, size = float(self.radius.max(initial=0.0)), self.largest if size is None else size
        return certain(size, worst)

    def text(self, index: tuple[int, ...] = ()) -> str:
        """One entry in decimals, as far as it is certain: "0.1234567 ± 2e-31" or "|x| ≤ 3e-40".

        A number that is known exactly is "0.5 exactly", or a fraction where sixteen digits of it
        are not all. By default it is the first entry.

        RangeError: there is no such entry.
        """
        at = self._place(index)
        mid = sum(
            map(Fraction, self.parts.reshape(len(self.parts), -1)[:, at].tolist()), Fraction()
        )
        radius = float(self.radius.reshape(-1)[at])
        if radius == math.inf:
            return "nothing is known"
        if radius and abs(mid) <= Fraction(radius):
            return f"|x| ≤ {_up(Fraction(radius) + abs(mid))}"
        return _decimal(mid, Fraction(radius))

    def _place(self, index: Any) -> int:
        """Where an entry is in the flat array."""
        at = tuple(index) if isinstance(index, Iterable) else (index,)
        at = at or (0,) * len(self.shape)
        whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in at)
        if len(at) != len(self.shape) or not whole or not _inside(at, self.shape):
            raise RangeError(f"text: no entry {index!r:.60} in an array of shape {self.shape}.")
        return int(np.ravel_multi_index(at, self.shape)) if at else 0


def certain(size: float, radius: float) -> float:
    """log10(size / radius), 0 or more, and never a whole digit too many; infinite for radius 0."""
    if radius == 0:
        return math.inf
    if not size or radius == math.inf:
        return 0.0
    found = max(0.0, math.log10(size) - math.log10(radius))
    if Fraction(radius) * 10 ** math.floor(found) > Fraction(size):  # the logarithms rounded up
        return max(0.0, math.nextafter(math.floor(found), 0))
    return found


def _inside(at: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(0 <= i < n for i, n in zip(at, shape, strict=True))


def _nearest(x: Fraction) -> float:
    """Its float64; 0, which it is not, where that would be infinite."""
    try:
        return float(x)
    except OverflowError:
        return 0.0


def _up(x: Fraction) -> str:
    """A number above 0 in two digits, which are no smaller."""
    context = Context(prec=2, rounding=ROUND_CEILING)
    return f"{context.divide(Decimal(x.numerator), Decimal(x.denominator)):.1e}"


def _decimal(mid: Fraction, radius: Fraction) -> str:
    """mid with one digit more than is certain, and a radius that covers what is cut off."""
    if mid == 0:
        return "0"
    if radius == 0:
        short = repr(_nearest(mid))
        return f"{short if Fraction(short) == mid else mid} exactly"
    exponent = Decimal(float(radius)).adjusted()
    unit = Fraction(10) ** exponent
    rounded = round(mid / unit) * unit
    places = max(0, -exponent)
    scaled = abs(rounded) * 10**places
    whole, tail = divmod(int(scaled), 10**places)
    number = f"{'-' if mid < 0 else ''}{whole}" + (f".{tail:0{places}d}" if places else "")
    return f"{number} ± {_up(radius + abs(rounded - mid))}"


def enclosed(x: Balls, digits: float) -> Enclosed:
    """The balls as sums of float64, of so many that `digits` digits of each entry fit."""
    count = max(2, math.ceil((digits + 2) * math.log2(10) / 53))
    *parts, radius = x.split(count)
    return Enclosed(np.stack(parts), radius)


def sizes(numbers: Mapping[str, Enclosed]) -> dict[str, float]:
    """From what the digits of each array are counted: its largest entry, which is bounded below.

    An array may be 0 by theory: a bias of keys, which moves every score of a query alike, has no
    gradient. Where every ball holds 0, it is the largest entry of the same quantity, say of the
    gradient of the same sequence.
    """
    own = {name: one.largest for name, one in numbers.items()}
    group: dict[tuple[str, ...], float] = {}
    for name, largest in own.items():
        key = _quantity(name)
        group[key] = max(group.get(key, 0.0), largest)
    return {name: largest or group[_quantity(name)] for name, largest in own.items()}


def _quantity(name: str) -> tuple[str, ...]:
    """What an array is a part of: "A", or ("gradient", "0")."""
    kind, *rest = name.split(".")
    return (kind,) if kind in "AG" else (kind, *rest[:1])


@dataclass(frozen=True, slots=True)
class Route:
    """How far a float result is from the real numbers, and how far it may be.

    Fields:
        name, of the numbers; dtype.
        error: an upper bound of the largest error.
        spread: the root of the squares' sum of how far each entry is from its ball.
        probable, worst: the budgets of `spread` (`certified.budgets`); None where there is none.

    All are over what the array's digits are counted from (`sizes`).
    """

    name: str
    dtype: str
    error: float
    spread: float = math.inf
    probable: float | None = None
    worst: float | None = None

    @property
    def ulps(self) -> float:
        """error / eps."""
        return self.error / float(np.finfo(np.dtype(self.dtype)).eps)

    def used(self, budget: str) -> float | None:
        """The share of a budget, "probable" or "worst", that the error is; None without one."""
        allowed: float | None = getattr(self, budget)
        if allowed is None:
            return None
        if not self.spread:
            return 0.0
        return self.spread / allowed if allowed else math.inf

    @property
    def inside(self) -> bool | None:
        """Does it lie within the balls, widened by the probable budget? None without one."""
        used = self.used("probable")
        return None if used is None else used <= 1


def farthest(got: Array, truth: Enclosed) -> float:
    """An upper bound of the largest error of `got`.

    Differences of floats are taken in longdouble: got − parts[0] is exact where they are within a
    factor of 2 (Sterbenz), and elsewhere nothing cancels. So each of the six roundings here is of
    what it is small beside, by 2^-53 or less; 1e-15 more than covers them, and one step upwards
    what lies below float64.
    """
    far = np.abs(got.astype(np.longdouble) - truth.parts[0] - truth.parts[1].astype(np.longdouble))
    rest = np.abs(truth.parts[2:]).sum(axis=0) + truth.radius
    if not far.any() and not rest.any():
        return 0.0
    most = float(((far + rest) * (1 + 1e-15)).max())
    return math.inf if math.isnan(most) else math.nextafter(most, math.inf)


def outside(got: Array, truth: Enclosed) -> float:
    """The root of the squares' sum of how far `got` is from the balls, where it is not in them.

    A lower bound of its error: a ball that is too wide makes no float wrong.
    """
    far = np.abs(got.astype(np.longdouble) - truth.parts[0] - truth.parts[1].astype(np.longdouble))
    rest = np.abs(truth.parts[2:]).sum(axis=0) + truth.radius
    off = np.maximum(far * (1 - 1e-15) - rest, 0)
    return float(norm(off)) if np.isfinite(off).all() else math.inf


@dataclass(frozen=True, slots=True)
class Certificate(Mapping[str, Enclosed]):
    """Enclosures of what was asked for, by name: "nats.0", "gradient.0.embed.weight", "A.head".

    Fields:
        numbers: name → Enclosed.
        routes: what float64, float32 and longdouble gave, beside it.
        bits: of the balls. wanted: the digits that were asked for.
        rows: of each A and G. source: the files, the sequences, the choice of rows (ROWS), the
            direction of products, "signs" or its SHA-256, and `zeros`, {identity: the arrays with
            entries that it makes 0}.
        spectra, cuts: what is proved of each matrix's eigenvalues, "A.head", and of each cut layer
            (`spectra`).
    """

    numbers: Mapping[str, Enclosed]
    routes: tuple[Route, ...]
    bits: int
    wanted: float
    rows: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    spectra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    cuts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, name: str) -> Enclosed:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def digits(self) -> float:
        """The fewest certain digits of any array."""
        size = sizes(self.numbers)
        return min((one.digits(size[n]) for n, one in self.numbers.items()), default=math.inf)

    def to_json(self) -> dict[str, Any]:
        """What it says of each array, without the arrays."""
        size = sizes(self.numbers)
        return {
            "bits": self.bits,
            "digits": _finite(self.digits),
            "wanted": self.wanted,
            "numbers": {
                name: {
                    "shape": list(one.shape),
                    "digits": _finite(one.digits(size[name])),
                    "largest": one.largest,
                    "settled": int(one.settled.sum()),
                }
                for name, one in self.numbers.items()
            },
            "routes": [_said(route) for route in self.routes],
            "rows": dict(self.rows),
            "source": dict(self.source),
            "spectra": dict(self.spectra),
            "cuts": dict(self.cuts),
        }


def _said(route: Route) -> dict[str, Any]:
    return {
        "name": route.name,
        "dtype": route.dtype,
        "error": _finite(route.error),
        "ulps": _finite(route.ulps),
        "spread": _finite(route.spread),
        "budgets": {kind: _finite(getattr(route, kind)) for kind in BUDGETS},
        "used": {kind: _finite(route.used(kind)) for kind in BUDGETS},
        "inside": route.inside,
    }


def _finite(x: float | None) -> float | None:
    """JSON has no infinity: None says that all digits are certain, or none."""
    return None if x is None or not math.isfinite(x) else x
