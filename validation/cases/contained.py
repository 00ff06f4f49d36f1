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

SHARES = {"rho50": 0.5, "rho90": 0.9}

UNDECIDED = 2
"""In a mask: a pair that is proved neither kept, 1, nor cut, 0 (ACCEPTABLE)."""

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
    def T(self) -> Ball:
        """As NumPy's."""
        return Ball(*(y.T for y in self.parts))

    @property
    def opposite(self) -> Ball:
        """-x."""
        return Ball(-self.x, -self.low, self.radius)

    def where(self, keep: Array) -> Ball:
        """Exactly 0 where `keep` is False."""
        return Ball(*(np.where(keep, y, 0.0) for y in self.parts))

    @property
    def whole(self) -> Array:
        """x + low as whole numbers of 2^-BINARY."""
        return _whole(self.x) + _whole(self.low)

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Between which whole numbers of 2^-BINARY it lies; neither is below 0."""
        return tuple(np.maximum(self.whole + k * _whole(self.radius), 0) for k in (-1, 1))  # type: ignore[return-value]


def _whole(x: Array) -> Array:
    part, exponent = np.frexp(np.asarray(x, np.float64))
    made = np.empty(np.shape(x), object)
    digits = np.ldexp(part, 53).astype(np.int64).reshape(-1).tolist()
    places = (exponent + (BINARY - 53)).reshape(-1).tolist()
    made.reshape(-1)[:] = [
        n << k if k >= 0 else n >> -k for n, k in zip(digits, places, strict=True)
    ]
    return made


def known(x: Array) -> Ball:
    """Numbers without a radius."""
    return Ball(x, np.zeros(np.shape(x)), np.zeros(np.shape(x)))


def stacked(*every: Ball) -> Ball:
    """One above the other."""
    return Ball(*(np.vstack(part) for part in zip(*(one.parts for one in every), strict=True)))


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
    found += [pair for layer in told["layers"] for pair in _basis(balls, given, layer)]
    found += [pair for layer in told["layers"] for pair in _edits(balls, given, layer, told)]
    found.append(("loss", _outside(balls["loss"][None, None], *_summed(balls["nats"].column))))
    if told["certificate"]["logits are W a + b"]:
        found.append(("logits", _logits(balls, given)))
    said = "entries lie outside what its terms prove"
    return out + [f"{name}: {excess} {said}" for name, excess in found if excess]


def _lacking(balls: Mapping[str, Ball], told: Mapping[str, Any]) -> Iterator[str]:
    """Arrays without a certificate, with what is no number, or with fewer than thirty digits."""
    for name, said in told.items():
        if "kept" in said:
            continue  # a mask has no digits; `_edits` reads it
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


def _basis(
    balls: Mapping[str, Ball], given: Mapping[str, Array], layer: str
) -> Iterator[tuple[str, int]]:
    """n Σλ = tr S and λ descends; S U = n U diag(λ), UᵀU = I: how many entries are otherwise."""
    for side, name in (("A", "mu"), ("G", "lam")):
        n = int(given[f"factors.{layer}.n_{side}"])
        S, U = balls[f"factors.{layer}.sum_{side}"], balls[f"basis.{layer}.U_{side}"]
        values, d = balls[f"basis.{layer}.{name}"], len(S.x)
        terms = stacked(*[values.column] * n, S[np.arange(d), np.arange(d)].column)
        signs = np.repeat([[1.0], [-1.0]], [n * d, d], axis=0)
        rises = int((np.diff(values.x) > 0).sum())
        yield (
            f"basis.{layer}.{name}",
            rises + _outside(known(np.zeros((1, 1))), terms, known(signs)),
        )
        bad = _outside(known(np.eye(U.x.shape[1])), U, U)
        for k in range(U.x.shape[1]):  # n terms −λ u, as n λ would be rounded
            terms = stacked(S, *[U[:, k : k + 1].T] * n)
            signs = stacked(U[:, k : k + 1], *[values[k : k + 1].column.opposite] * n)
            bad += _outside(known(np.zeros((d, 1))), terms, signs)
        yield f"basis.{layer}.U_{side}", bad


def _edits(
    balls: Mapping[str, Ball], given: Mapping[str, Array], layer: str, told: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Of a mask, how many rows keep other pairs than the manifest's first; is it SELECT's?

    And how many entries of W' are wrong.
    """
    W = given.get(f"weights.parameters.{layer}.weight")
    W = given["weights.parameters.embed.weight"] if W is None else W  # a tied head
    U, V = balls[f"basis.{layer}.U_G"], balls[f"basis.{layer}.U_A"]
    lam, mu = (balls[f"basis.{layer}.{values}"] for values in ("lam", "mu"))
    for share, rho in SHARES.items():
        mask, weight = f"edits.{share}.{layer}.mask", f"edits.{share}.{layer}.weight"
        if mask not in given:
            continue
        kept, counts = given[mask] == 1, np.array(told["certificate"]["arrays"][mask]["kept"])
        rows = int((kept != (np.arange(len(mu.x)) < counts[:, None])).any(axis=1).sum())
        sure = (given[mask] == UNDECIDED).any() or _selected(lam, mu, kept, rho)
        yield mask, rows + int((np.diff(counts) > 0).sum()) + (not sure)
        if weight in balls:
            yield weight, _of_edit(balls[weight], known(W), U, V, kept)


def _of_edit(claimed: Ball, W: Ball, U: Ball, V: Ball, kept: Array) -> int:
    """How many entries are not W' = U_G (C ∘ M) U_Aᵀ, or not those of W' edited once more (O54).

    And whether W' is not orthogonal to W − W'; the mask keeps none but the columns of U_G and U_A.
    """
    R, Q = U.x.shape[1], V.x.shape[1]
    bad = int(kept[R:].any()) + int(kept[:, Q:].any())
    for one in (W, claimed):
        C = product(product(U, one).T, V).where(kept[:R, :Q])
        bad += _outside(claimed, product(U.T, C).T, V.T)
    w = claimed.column
    along = stacked(W.column, w.opposite)
    return bad + _outside(known(np.zeros((1, 1))), stacked(w, w), along)


def _selected(lam: Ball, mu: Ball, kept: Array, rho: float) -> bool:
    """Are these pairs proved to be those of SELECT, of the real eigenvalues?

    Each is above all that are cut, they reach the share, and without the last they would not.
    """
    if not kept.any():
        return False
    (a, b), (c, d) = lam.bounds, mu.bounds
    low, high = np.multiply.outer(a, c), np.multiply.outer(b, d)
    least, most = Fraction(rho) * low.sum(), Fraction(rho) * high.sum()
    last = min(low[kept])
    if not kept.all() and not last > max(high[~kept]):
        return False
    return bool(low[kept].sum() >= most and high[kept].sum() - last < least)


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
    return _outside(z[seen], read, known(W.T))


def _summed(one: Ball) -> tuple[Ball, Ball]:
    """Rows, and a 1 for each, by which they are summed."""
    return one, known(np.ones((len(one.x), 1)))


def product(one: Ball, other: Ball) -> Ball:
    """Σ oneᵀ other over rows (n, ·), once more as two float64."""
    made, scale = one.whole.T @ other.whole, 2 ** (2 * BINARY)
    parts = []
    for _ in range(3):  # Python's quotient of whole numbers is the nearest float64
        parts.append((made / scale).astype(np.float64))
        made = made - _whole(parts[-1]) * 2**BINARY
    x, low, rest = parts
    return Ball(x, low, (_widths(one, other) + np.nextafter(np.abs(rest), 1)) * SLACK)


def _widths(one: Ball, other: Ball) -> Array:
    """How far Σ oneᵀ other may be from the sum of the middles."""
    x, y, r, s = np.abs(one.x), np.abs(other.x), one.radius, other.radius
    return np.asarray(x.T @ s + r.T @ y + 2 * r.T @ s)


def _outside(claimed: Ball, one: Ball, other: Ball) -> int:
    """How many entries of `claimed` cannot be Σ oneᵀ other over rows (n, ·)."""
    apart = one.whole.T @ other.whole - claimed.whole * 2**BINARY
    far = _whole((_widths(one, other) + claimed.radius) * SLACK) * 2**BINARY
    return int((abs(apart) > far).sum())
