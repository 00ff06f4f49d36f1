"""Data that budgets are tried on: sizes, dtypes, scales, and kinds of numbers, some adversarial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = np.ndarray

EXPONENTS = {"float32": 20, "float64": 200, "longdouble": 200}
"""Scales are two to a power up to this, so that no product of two numbers leaves the range."""


@dataclass(frozen=True)
class Data:
    """What was drawn. size and rows; kind, one of KINDS; exponent, of the scale 2^exponent."""

    size: int
    rows: int
    dtype: str
    kind: str
    way: str
    exponent: int
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def real(self) -> Any:
        return np.dtype(self.dtype).type

    def array(self, shape: tuple[int, ...]) -> Array:
        """Numbers of float64 that the dtype holds exactly, by rows."""
        x = KINDS[self.kind](self.rng, shape, float(np.finfo(self.real).eps) / 2)
        narrow = np.float32 if self.dtype == "float32" else np.float64
        return np.asarray(np.ldexp(x.astype(narrow), self.exponent), dtype=np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    return rng.normal(size=shape)


def graded(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """Over six decades, each number by itself."""
    return rng.normal(size=shape) * 2.0 ** -rng.integers(0, 20, shape)


def columns(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """Columns over six decades, and of few directions."""
    x = rng.normal(size=(*shape[:-1], max(1, shape[-1] // 3)))
    return x @ rng.normal(size=(x.shape[-1], shape[-1])) * 2.0 ** -np.arange(shape[-1]).clip(0, 20)


def positive(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    return rng.uniform(1, 2, shape)


def cancelling(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """The second half of the rows is the first, all but opposite."""
    x = rng.normal(size=shape)
    half = len(x) // 2
    x[len(x) - half :] = -x[:half] * (1 + 64 * u * rng.normal(size=x[:half].shape))
    return x


def swallowed(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """A row of ±1, then rows whose squares are just below u: each is lost beside the first."""
    x = np.full(shape, np.sqrt(u * rng.uniform(0.9, 1)))
    x[0] = 1
    return x * rng.choice([-1, 1], shape[-1:])


def repeated(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """One row again and again, with few digits more than a sum keeps: roundings of one sign."""
    return np.broadcast_to(1 + u * rng.integers(0, 2**12, shape[-1:]), shape).copy()


def whole(rng: np.random.Generator, shape: tuple[int, ...], u: float) -> Array:
    """Small whole numbers, many of them 0."""
    return rng.integers(-2, 3, shape).astype(float)


KINDS: dict[str, Callable[..., Array]] = {
    f.__name__: f
    for f in (normal, graded, columns, positive, cancelling, swallowed, repeated, whole)
}
CHANCE = ("normal", "graded", "columns", "positive", "whole")
"""Kinds whose roundings are of either sign."""


def datas(
    size: int,
    rows: int,
    ways: tuple[str, ...] = ("",),
    dtypes: tuple[str, ...] = ("float64", "float32"),
    kinds: tuple[str, ...] = tuple(KINDS),
    least: int = 1,
) -> st.SearchStrategy[Data]:
    """Of sizes and rows up to these; rows in many magnitudes."""

    def of(dtype: str) -> st.SearchStrategy[Data]:
        k = EXPONENTS[dtype]
        return st.builds(
            Data,
            st.integers(least, size),
            st.one_of(st.integers(1, min(rows, 12)), st.integers(1, rows)),
            st.just(dtype),
            st.sampled_from(kinds),
            st.sampled_from(ways),
            st.one_of(st.just(0), st.integers(-k, k)),
            st.integers(0, 2**32 - 1),
        )

    return st.sampled_from(dtypes).flatmap(of)
