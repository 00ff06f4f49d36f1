"""Version 2 of a case, read and judged without balls: exact sums of what the file holds.

A number lies within `radius` of x + low, x the array NAME and low the array NAME_low, both float64.
The radius is `relative`·|x|. Where x is 0 and low is not, nothing is known of the number but that
it lies within `absolute` of low; where both are 0, it is 0. Both are attributes of NAME.

So what can be computed from the file is computed here with whole numbers, without any rounding, and
must lie as near as the radii allow. The readers in C and Node do the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray

BINARY = 1100
"""A float64 is a whole number of 2^-BINARY: the smallest is 2^-1074."""

LEAST = 1e-30
"""The largest radius, over the largest entry of an array: thirty digits."""

SLACK = 1 + 1e-9
"""More than float64 loses where it adds a few radii.  Chosen."""


@dataclass(frozen=True)
class Ball:
    """An array of a case. Fields: x, low; radius (of each entry), float64."""

    x: Array
    low: Array
    radius: Array

    def __getitem__(self, at: Any) -> Ball:
        return Ball(self.x[at], self.low[at], self.radius[at])

    @property
    def rows(self) -> Ball:
        """(n, last axis)."""
        return Ball(*(y.reshape(-1, y.shape[-1]) for y in self.parts))

    @property
    def column(self) -> Ball:
        """(n, 1)."""
        return Ball(*(y.reshape(-1, 1) for y in self.parts))

    @property
    def parts(self) -> tuple[Array, Array, Array]:
        """x, low and radius."""
        return self.x, self.low, self.radius

    @property
    def whole(self) -> Array:
        """x + low as whole numbers of 2^-BINARY."""
        return _whole(self.x) + _whole(self.low)


def _whole(x: Array) -> Array:
    made = np.empty(np.shape(x), object)
    ratios = (float(one).as_integer_ratio() for one in np.asarray(x).reshape(-1))
    made.reshape(-1)[:] = [n * (2**BINARY // d) for n, d in ratios]
    return made


def radii(x: Array, low: Array, relative: float, absolute: float) -> Array:
    """The radius of each entry, float64."""
    return np.where(x == 0, np.where(low == 0, 0.0, absolute), relative * np.abs(x) * SLACK)


def settled(ball: Ball) -> Array:
    """bool array: is x proved to be the number, correctly rounded?

    It is where the number is nearer to it than half the gap to the next float64 towards 0; and of a
    number that is known exactly and lies half-way, where its last bit is 0.
    """
    size, low = np.abs(ball.x), np.abs(ball.low)
    half = (size - np.nextafter(size, 0)) / 2
    even = np.asarray(ball.x, np.float64).view(np.int64) % 2 == 0
    return np.asarray(
        ((low + ball.radius) * SLACK < half) | ((ball.radius == 0) & (low == half) & even)
    )


def read(path: Path) -> tuple[dict[str, Ball], dict[str, Array], dict[str, float]]:
    """What is certified, what is given beside it, and how many entries of each are settled."""
    arrays: dict[str, Array] = {}
    attributes: dict[str, Mapping[str, Any]] = {}

    def take(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            arrays[name.replace("/", ".")] = np.asarray(node[()])
            attributes[name.replace("/", ".")] = dict(node.attrs)

    with h5py.File(path) as file:
        file.visititems(take)
    balls = {}
    for name, x in arrays.items():
        if f"{name}_low" in arrays:
            own = attributes[name]
            low = arrays[f"{name}_low"]
            balls[name] = Ball(x, low, radii(x, low, own["relative"], own["absolute"]))
    given = {n: x for n, x in arrays.items() if n.removesuffix("_low") not in balls}
    return balls, given, {name: float(attributes[name]["settled"]) for name in balls}


def wrong(folder: Path, name: str) -> list[str]:
    """What a case says and cannot be so, in sentences; none if all is as it should be.

    Proof: tests/test_cases_certified.py::test_every_certified_case_holds,
        ::test_a_wrong_digit_is_caught
    """
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    balls, given, counts = read(folder / f"{name}.h5")
    if missed := [*_lacking(balls, told["certificate"]["arrays"])]:
        return missed
    out = [
        f"{name}: {int(settled(one).sum())} entries are settled, not {counts[name]}"
        for name, one in balls.items()
        if int(settled(one).sum()) != counts[name]
    ]
    found = [pair for layer in told["layers"] for pair in _layer(balls, given, layer)]
    found.append(("loss", _outside(balls["loss"][None, None], *_summed(balls["nats"].column))))
    if told["certificate"]["logits are W a + b"]:
        found.append(("logits", _logits(balls, given)))
    said = "entries lie outside what its terms prove"
    return out + [f"{name}: {excess} {said}" for name, excess in found if excess]


def _lacking(balls: Mapping[str, Ball], told: Mapping[str, Any]) -> Iterator[str]:
    """Arrays without a certificate, with what is no number, or with fewer than thirty digits."""
    for name in told:
        if name not in balls:
            yield f"{name}: it is not certified in the file"
            continue
        one = balls[name]
        largest = np.abs(one.x).max(initial=0)
        widest = largest * LEAST if largest else np.finfo(np.float64).max
        if not np.isfinite([one.x, one.low]).all():
            yield f"{name}: an entry is no number"
        elif not ((one.radius >= 0) & (one.radius <= widest)).all():
            yield f"{name}: a radius leaves fewer than thirty digits"


def _layer(
    balls: Mapping[str, Ball], given: Mapping[str, Array], layer: str
) -> Iterator[tuple[str, int]]:
    """Each array that the rows of a layer make, and how many of its entries they refute."""
    keep = given[f"rows.{layer}.kept"] != 0
    a, g, drawn = (balls[f"rows.{layer}.{part}"] for part in ("a", "g", "g_sampled"))
    for name, one, other in (
        (f"factors.{layer}.sum_A", a[keep], a[keep]),
        (f"factors.{layer}.sum_G", drawn[keep], drawn[keep]),
        (f"empirical.{layer}.sum_G", g[keep], g[keep]),
        (f"gradients.{layer}.weight", g.rows, a.rows),
    ):
        if name in balls:  # a tied head has no gradient of its own
            yield name, _outside(balls[name], one, other)
    for name, one in ((f"factors.{layer}.sum_a", a[keep]), (f"gradients.{layer}.bias", g.rows)):
        if name in balls:
            yield name, _outside(balls[name].column, *_summed(one))


def _logits(balls: Mapping[str, Ball], given: Mapping[str, Array]) -> int:
    """W a + b, the head's, wherever it reads anything: padding has zeros."""
    tied = "weights.parameters.head.weight" not in given
    W = given[f"weights.parameters.{'embed' if tied else 'head'}.weight"]
    a, z = balls["rows.head.a"].rows, balls["logits"].rows
    seen = (a.x != 0).any(axis=1)
    a, one = _summed(a[seen])
    b = given.get("weights.parameters.head.bias", np.zeros(len(W)))
    W = np.column_stack([W, b])
    read = Ball(*(np.hstack(pair).T for pair in zip(a.parts, one.parts, strict=True)))
    return _outside(z[seen], read, Ball(W.T, *[np.zeros(W.T.shape)] * 2))


def _summed(one: Ball) -> tuple[Ball, Ball]:
    """Rows, and a 1 for each, by which they are summed."""
    return one, Ball(np.ones((len(one.x), 1)), *[np.zeros((len(one.x), 1))] * 2)


def _outside(claimed: Ball, one: Ball, other: Ball) -> int:
    """How many entries of `claimed` cannot be Σ one otherᵀ over rows (n, ·)."""
    apart = one.whole.T @ other.whole - claimed.whole * 2**BINARY
    x, y, r, s = np.abs(one.x), np.abs(other.x), one.radius, other.radius
    allowed = (x.T @ s + r.T @ y + 2 * r.T @ s + claimed.radius) * SLACK
    scale = 2 ** (2 * BINARY)
    far = [Fraction(abs(d), scale) > Fraction(float(e))
           for d, e in zip(apart.reshape(-1), allowed.reshape(-1), strict=True)]  # fmt: skip
    return sum(far)
