"""One trial for each budget of `law.tolerance`: what errs, by how much of its budget.

A trial takes what was drawn and gives error / budget. The true value is known by balls, or exactly
by construction; an error is bounded above and a scale below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from hypothesis import strategies as st

from refcurv.algebra.balls import Balls, bits, exact
from refcurv.algebra.gram import add_gram
from refcurv.algebra.scaling import norm
from refcurv.law import tolerance
from validation.certified.draws import CHANCE, Array, Data, datas

BITS = 500
"""Products of two graded float64 and their sums lie in so many bits all but exactly."""


@dataclass(frozen=True)
class Trial:
    """One row of the table.

    Fields: name; bounds, what the budget bounds; ratio, data → error / budget; data, what is
    drawn; promised, whether the budget says that it holds on this data.
    """

    name: str
    bounds: str
    ratio: Callable[[Any], float]
    data: st.SearchStrategy[Any]
    promised: bool = True


def number(x: Array) -> Balls:
    """Floats of any dtype, longdouble too, as exact numbers."""
    wide = np.asarray(x)
    high = wide.astype(np.float64)
    if wide.dtype != np.longdouble:
        return exact(high)
    return exact(high) + exact((wide - high).astype(np.float64))


def share(error: float, allowed: float) -> float:
    """error / allowed; an error of 0 uses nothing of a budget of 0."""
    return error / allowed if allowed else (np.inf if error else 0.0)


# ------------------------------------------------------------------ sums


def summed(x: Array, y: Array, way: str) -> Any:
    """Σ x y in one of several orders."""
    if way == "in turn":
        return np.add.accumulate(x * y)[-1]
    if way == "backwards":
        return np.add.accumulate((x * y)[::-1])[-1]
    if way == "pairwise":
        return (x * y).sum()
    return (x[None] @ y[:, None])[0, 0] if way == "matmul" else np.dot(x, y)


SUMS = ("in turn", "backwards", "pairwise", "matmul", "dot")


def of_a_sum(one: Data, budget: Callable[[Array, float], float]) -> float:
    """The error of Σ x y over budget(terms, result)."""
    x, y = (one.array((one.rows, 2))[:, n] for n in (0, 1))
    got = summed(x.astype(one.real), y.astype(one.real), one.way)
    with bits(BITS):
        far = number(np.asarray(got)) - (exact(x[None]) @ exact(y[:, None]))[0, 0]
        return share(float(far.most()), budget(x * y, float(abs(got))))


def gamma(one: Data) -> float:
    return of_a_sum(
        one, lambda terms, _: tolerance.gamma(one.rows, one.real) * float(np.abs(terms).sum())
    )


def probable_sum(one: Data) -> float:
    def budget(terms: Array, result: float) -> float:
        size = np.hypot(result, float(np.linalg.norm(terms)))
        return tolerance.probable(one.rows, one.real) * float(size)

    return of_a_sum(one, budget)


def probable_products(one: Data) -> float:
    """Σ of products of so many numbers each: error over the root of the squared products."""
    x = one.rng.uniform(0.9, 1.1, (one.size, one.rows + 1))
    x = x.astype(np.float32 if one.dtype == "float32" else np.float64)
    got = np.multiply.accumulate(x.astype(one.real), axis=1)[:, -1]
    with bits(60 * one.rows + 200):
        truth = exact(x[:, 0].astype(np.float64))
        for n in range(one.rows):
            truth = truth * exact(x[:, n + 1].astype(np.float64))
        far = (number(got) - truth).sum().most()
        size = np.linalg.norm(truth.least())
    return share(float(far), tolerance.probable(one.rows, one.real) * float(size))


# ------------------------------------------------------------------ moments


def moment(x: Array, dtype: Any, way: str, shards: int = 1) -> Array:
    """xᵀ x of rows in a dtype, in shards that add up in float64; its lower triangle counts."""
    total = np.zeros((x.shape[1],) * 2)
    for part in np.array_split(x.astype(dtype), shards):
        if way == "syrk" and dtype != np.longdouble:
            S = np.zeros(total.shape, dtype)
            add_gram(np.ascontiguousarray(part), S, onto=False)
            total += np.tril(S)
        else:
            S = np.zeros(total.shape, dtype)
            for row in part:
                S = S + row[:, None] * row
            total += np.tril(S)
    return total + np.tril(total, -1).T


def gram_of(budget: Callable[..., float]) -> Callable[[Data], float]:
    """`gram` of tests/budgets.py: entry by entry, of |X|ᵀ|X|."""

    def ratio(one: Data) -> float:
        x, shards = one.array((one.rows, one.size)), 1 + one.seed % 3
        got = moment(x, one.real, one.way, shards)
        with bits(BITS):
            far = (exact(got) - exact(np.ascontiguousarray(x.T)) @ exact(x)).most()
        allowed = budget(-(-one.rows // shards), shards, one.real) * (np.abs(x).T @ np.abs(x))
        return max(share(e, a) for e, a in zip(far.flat, allowed.flat, strict=True))

    return ratio


def negative(one: Data) -> float:
    """A moment has no eigenvalue below 0: how far below it comes out."""
    M = moment(one.array((one.rows, one.size)), one.real, one.way)
    values = np.linalg.eigvalsh(M)
    allowed = tolerance.negative(one.size, one.rows, one.real) * max(float(values[-1]), 0.0)
    return share(max(-float(values[0]), 0.0), allowed)


def underflow(one: Data) -> float:
    """Rows whose products are about the smallest number of the dtype, or far above it."""
    info = np.finfo(one.real)
    k = int(np.log2(float(info.smallest_subnormal)))
    x = one.rng.uniform(-1.5, 1.5, (one.rows, one.size)) * 2.0 ** one.rng.integers(0, 3)
    x = np.ldexp(x, (k + 1) // 2).astype(one.real)
    with np.errstate(under="ignore"):
        M = moment(x.astype(np.float64), one.real, "loop")
        values = np.linalg.eigvalsh(np.ldexp(M, -k))
    allowed = float(np.ldexp(tolerance.underflow(one.size, one.rows, one.real), -k))
    allowed += tolerance.negative(one.size, one.rows, one.real) * max(float(values[-1]), 0.0)
    return share(max(-float(values[0]), 0.0), allowed)


def asymmetry(one: Data) -> float:
    """The halves of a moment, added up in two orders."""
    x = one.array((one.rows, one.size))
    order = np.arange(one.rows)[::-1] if one.way == "backwards" else one.rng.permutation(one.rows)
    here = moment(x, one.real, "loop")
    there = moment(x, one.real, "syrk") if one.way == "syrk" else moment(x[order], one.real, "loop")
    A = np.tril(here) + np.triu(there, 1)
    off = float(np.linalg.norm(A - A.T))
    return share(off, tolerance.asymmetry(one.rows, one.real) * float(np.linalg.norm(A)))


# ------------------------------------------------------------------ eigenvalues

SOLVERS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "numpy": np.linalg.eigh,
    **{d: lambda M, d=d: scipy.linalg.eigh(M, driver=d) for d in ("ev", "evd", "evr")},
}  # fmt: skip


def symmetric(one: Data) -> Array:
    """A moment, or a symmetric matrix of any sign, exactly so, in the dtype."""
    x = one.array((one.rows, one.size))
    M = np.ldexp(x.T @ x, -one.exponent) if one.seed % 2 else np.resize(x, (one.size,) * 2)
    M = np.tril(M) + np.tril(M, -1).T
    return M.astype(one.real)


def eigenpair(one: Data) -> float:
    M = symmetric(one)
    values, U = SOLVERS[one.way](M)
    allowed = tolerance.eigenpair(one.size, one.real)
    with bits(200):
        u, A = exact(U.astype(np.float64)), exact(M.astype(np.float64))
        residual = (A @ u - u * exact(values.astype(np.float64))).most()
        off = (u.T @ u - exact(np.eye(one.size))).most()
    return max(
        share(norm(residual), allowed * norm(M)),
        float(np.linalg.norm(off)) / (allowed * np.sqrt(one.size)),
    )


def two_solvers(one: Data) -> float:
    M = symmetric(one).astype(np.float64)
    first = np.linalg.eigvalsh(M)
    if one.way == "svd":
        first, other = np.sort(np.abs(first)), np.linalg.svd(M, compute_uv=False)[::-1]
    else:
        other = scipy.linalg.eigh(M, driver=one.way, eigvals_only=True)
    far = norm(first - other)
    return share(far, tolerance.eigenvalues(one.size) * norm(first))


def true_eigenvalues(one: Data) -> float:
    """H D H of Hadamard's H, or of its blocks, whose eigenvalues are D's exactly."""
    rng, H = one.rng, np.ones((1, 1))
    for _ in range(one.size):
        H = np.block([[H, H], [H, -H]])
    n = len(H)
    d = rng.integers(-(2**8), 2**8, n) * 2.0 ** rng.integers(-15, 15, n)
    d[rng.integers(0, n, n // 4)] = d[0]  # some are equal
    sign, order = rng.choice([-1, 1], n), rng.permutation(n)
    M = ((H * d) @ H / n * sign * sign[:, None])[np.ix_(order, order)]
    with bits(BITS):
        H_balls = exact(H * sign[:, None])
        truth = (H_balls * exact(d)) @ H_balls.T / n
        assert truth.contains(M[np.argsort(order)][:, np.argsort(order)]).all()
    values, _ = SOLVERS[one.way](np.ldexp(M, one.exponent))
    far = np.linalg.norm(np.ldexp(values, -one.exponent) - np.sort(d))
    return share(float(far), tolerance.eigenvalues(n) * float(np.linalg.norm(d)))


# ------------------------------------------------------------------ all of them

ALL = ("float64", "float32", "longdouble")
MOMENTS = ("syrk", "loop")


def trials(gram: Callable[..., float]) -> list[Trial]:
    """Every budget, with the data that it is tried on."""
    return [
        Trial("gamma", "a sum of products, in five orders", gamma, datas(1, 200, SUMS, ALL)),
        Trial("probable: sums", "a sum of products, by the root of its squared terms and itself",
              probable_sum, datas(1, 200, SUMS, ALL, CHANCE)),
        Trial("probable: products", "a sum of products of n numbers each, by its squared terms",
              probable_products, datas(3, 40, dtypes=ALL)),
        Trial("probable, against it", "the same, of roundings that were made to have one sign",
              probable_sum, datas(1, 2000, SUMS, ("float64", "float32"),
                                  ("swallowed", "repeated", "cancelling")), promised=False),
        Trial("eigenpair", "‖A U − U diag μ‖ and ‖UᵀU − I‖ of NumPy's eigh, dsyev and dsyevd",
              eigenpair, datas(10, 12, ("numpy", "ev", "evd"))),
        Trial("eigenpair, of MRRR", "the same, of dsyevr",
              eigenpair, datas(10, 12, ("evr",)), promised=False),
        Trial("eigenvalues: two solvers", "the eigenvalues of two drivers, or of the SVD",
              two_solvers, datas(24, 24, ("ev", "evd", "evr", "svd"), ("float64",))),
        Trial("eigenvalues: the true ones", "eigenvalues beside those of H D H, known exactly",
              true_eigenvalues, datas(4, 1, tuple(SOLVERS), ("float64",))),
        Trial("negative", "the least eigenvalue of a moment, below 0",
              negative, datas(24, 60, MOMENTS)),
        Trial("underflow", "the same, where products are about the smallest number",
              underflow, datas(12, 40, kinds=("normal",))),
        Trial("asymmetry", "the halves of a moment in two orders",
              asymmetry, datas(8, 60, ("backwards", "permuted", "syrk"))),
        Trial("gram (tests)", "a moment in one to three shards, entry by entry",
              gram_of(gram), datas(4, 60, MOMENTS)),
    ]  # fmt: skip
