"""Other rules than the law's by which a program may choose the pairs that it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.law.checks import Array

Key = Callable[[Eigenbasis, Array], Array]
"""What ranks the pairs, (O, I), from the basis and C: the largest are kept."""


@dataclass(frozen=True, slots=True)
class Other:
    """Another way to cut: the fault that it is, what it does, and the key of each pair.

    Fields: key, None of the rectangle; square: only a square matrix can be cut so.
    """

    fault: str
    sentence: str
    key: Key | None
    square: bool = False

    def mask(self, basis: Eigenbasis, C: Array, kept: int) -> Array:
        """The mask (O, I) of this rule that keeps `kept` pairs, or nearly so many."""
        return _rectangle(basis, kept) if self.key is None else ranked(self.key(basis, C), kept)

    def near(self, basis: Eigenbasis, C: Array, target: float) -> tuple[Array, Array]:
        """Its two masks whose |C ∘ M| are nearest to `target`, from below and from above."""
        if self.key is not None:
            order = np.argsort(-self.key(basis, C), axis=None, kind="stable")
            sums = np.cumsum((C / (float(norm(C)) or 1.0)).ravel()[order] ** 2)
            share = (target / (float(norm(C)) or 1.0)) ** 2
            kept = int(np.searchsorted(sums, share))
            return _first(order, kept, C.shape), _first(order, kept + 1, C.shape)
        low, high = 0, C.size
        while high - low > 1:
            middle = (low + high) // 2
            mask = self.mask(basis, C, middle)
            low, high = (middle, high) if float(norm(C[mask])) < target else (low, middle)
        return self.mask(basis, C, low), self.mask(basis, C, high)


def ranked(key: Array, kept: int) -> Array:
    """The `kept` pairs of largest key."""
    return _first(np.argsort(-key, axis=None, kind="stable"), kept, key.shape)


def _first(order: Array, kept: int, shape: tuple[int, ...]) -> Array:
    mask = np.zeros(order.size, dtype=bool)
    mask[order[:kept]] = True
    return np.asarray(mask.reshape(shape))


def _rectangle(basis: Eigenbasis, kept: int) -> Array:
    """The rectangle of one share for each side that keeps nearest to `kept` pairs."""
    shares = [np.cumsum(x) / x.sum() for x in (basis.lam, basis.mu)]
    best = min(
        np.unique(np.concatenate(shares)),
        key=lambda rho: abs(math.prod(int(np.searchsorted(s, rho)) + 1 for s in shares) - kept),
    )
    rows, columns = (np.arange(len(s)) <= np.searchsorted(s, best) for s in shares)
    return np.asarray(rows[:, None] & columns)


def products(basis: Eigenbasis) -> Array:
    """λ_i μ_j of each pair, (O, I)."""
    return np.asarray(basis.lam[:, None] * basis.mu)


OTHERS = (
    Other(
        "B65",
        "ascending eigenvalues were taken for descending: the flattest pairs are kept",
        lambda b, C: -products(b),
    ),
    Other(
        "B65",
        "the cut lies upside down: ascending eigenvalues were taken for descending",
        lambda b, C: products(b)[::-1, ::-1],
    ),
    Other(
        "B65",
        "the cut lies upside down in the outputs: ascending eigenvalues of G were taken for "
        "descending",
        lambda b, C: products(b)[::-1],
    ),
    Other(
        "B65",
        "the cut lies upside down in the inputs: ascending eigenvalues of A were taken for "
        "descending",
        lambda b, C: products(b)[:, ::-1],
    ),
    Other(
        "B78",
        "the mask lies the other way round: pairs are (A, G) where (G, A) is meant",
        lambda b, C: products(b).T,
        square=True,
    ),
    Other("B73", "a share of each side was kept, a rectangle, and no share of pairs", None),
    Other(
        "B74",
        "pairs are ranked by the curvature of the outputs alone",
        lambda b, C: np.repeat(b.lam[:, None], len(b.mu), axis=1),
    ),
    Other(
        "B74",
        "pairs are ranked by the curvature of the inputs alone",
        lambda b, C: np.repeat(b.mu[None], len(b.lam), axis=0),
    ),
    Other(
        "B74",
        "pairs are ranked by λ μ C², the damage of each, and not by λ μ",
        lambda b, C: products(b) * C**2,
    ),
    Other(
        "B74",
        "pairs are ranked by the size of the coefficient, C², and not by λ μ",
        lambda b, C: C**2,
    ),
)


def others(shape: tuple[int, int], Lambda: Array | None) -> tuple[Other, ...]:
    """Those that a matrix of this shape can be cut by; by EK-FAC's Λ too where it is known."""
    fit = tuple(one for one in OTHERS if shape[0] == shape[1] or not one.square)
    if Lambda is None:
        return fit
    words = "pairs are ranked by EK-FAC's Λ, and not by λ μ"
    return (*fit, Other("B74", words, lambda b, C: Lambda))


def share_of(own: Eigenbasis, kept: int) -> float:
    """The rho in the middle of those at which the law keeps `kept` pairs, or nearly so many."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rho = (low + high) / 2
        found = cut(own.lam, own.mu, rho)
        if found.kept == kept:  # so it does from the mass without the last pair up to all of it
            middle = (found.mass - found.last / 2) / found.total
            return middle if cut(own.lam, own.mu, middle).kept == kept else rho
        low, high = (rho, high) if found.kept < kept else (low, rho)
    return (low + high) / 2
