"""What theirs would be under a fault, made from the reference and the dump alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.diagnosis.seen import Seen, Try, fitted
from refcurv.judge.differences import apart
from refcurv.law.checks import Array
from refcurv.law.words import number_of


def tries(seen: Seen, heads: int | None, wanted: Container[str] | None = None) -> Iterator[Try]:
    """Every hypothesis of ours that fits the shapes; those of other matrices are in `others`.

    Args: heads, the width of one attention head, None if unknown; wanted: make these faults only.
    """
    fits = seen.T.shape == seen.X.shape
    if fits:
        yield Try((), "ours", seen.X)
    families: dict[str, Callable[[Seen], Iterator[Try]]] = {
        "B12": _damped,
        "B45": _centred,
        "B49": _one_row,
        "B47": partial(_permuted, heads=heads),
        "": _triangle,
    }
    if seen.joint:
        families = {"B31": _of_ones, **families}
    for fault, family in (families if fits else {"B31": _biased, "B47": misjoined}).items():
        alike = {"B47": ("B51",), "B31": ("B30",)}.get(fault, ())
        if wanted is None or any(id in wanted for id in (fault, *alike)):
            yield from family(seen)


def _damped(seen: Seen) -> Iterator[Try]:
    return damping(seen.T, seen.X)


def damping(T: Array, X: Array) -> Iterator[Try]:
    """T = r (X + δ I), δ > 0: least squares in r and r δ."""
    size = len(X)
    trace = float(np.trace(X))
    normal = np.array([[np.vdot(X, X), trace], [trace, size]])
    if size < 3 or np.linalg.matrix_rank(normal / (1 + abs(normal).max())) < 2:
        return
    r, shift = np.linalg.solve(normal, [np.vdot(X, T), np.trace(T)])
    if r > 0 and shift > 0:
        delta = float(shift / r)
        note = f"{delta:.3g} is added to the diagonal"
        Y = X + delta * np.eye(size)
        own = float(norm(X - trace / size * np.eye(size)))  # that alone tells r
        if own > 2**-40 * float(norm(Y)):  # chosen: less of X nobody sees
            yield Try(("B12",), note, Y, blur=max(1.0, float(norm(Y)) / own))


def _centred(seen: Seen) -> Iterator[Try]:
    """T = r (X − m mᵀ), m the mean; without m, what is missing has rank one and the rows agree."""
    if seen.mean is not None:
        Y = seen.X - np.outer(seen.mean, seen.mean)
        yield Try(("B45",), *unbiased(seen, Y, "without the mean"))
        for by in (1.0, _by_one_less(seen)) if seen.joint else ():
            Y = by * (seen.X - np.outer(seen.mean, seen.mean))
            Y[-1, -1] = 1
            yield Try(("B45",), "without the mean, before the column of ones was added", Y)
        return
    for r in (1.0, seen.n_X / max(seen.n_X - 1, 1)):
        found = _rank_one(seen.X, 1.0, seen.T, 1 / r)
        if found is not None and found[0] > 0:
            Y = seen.X - found[0] * np.outer(found[1], found[1])
            yield Try(("B45",), *unbiased(seen, Y, "a matrix of rank one is missing"))


def unbiased(seen: Seen, Y: Array, note: str) -> tuple[str, Array]:
    """A note, and Y; Y times n/(n − 1) where theirs is that, the usual divisor of a covariance.

    Theirs must be within a tenth of what this differs by.

    Proof: tests/test_judge_rows.py::test_a_covariance_may_have_one_row_less_for_divisor
    """
    by, r = _by_one_less(seen), fitted(seen.T, Y)[1]
    if by > 1 and abs(r - by) < 0.1 * (by - 1):
        return f"{note}, over n − 1", by * Y
    return note, Y


def _by_one_less(seen: Seen) -> float:
    return seen.n_X / (seen.n_X - 1) if seen.n_X > 1 else 1.0


def _one_row(seen: Seen) -> Iterator[Try]:
    """The sums differ by one direction, and the counts differ: a row that is always the same."""
    if seen.n_T is None or seen.n_T == seen.n_X or seen.side != "A":
        return
    found = _rank_one(seen.T, seen.n_T, seen.X, seen.n_X)
    if found is None or (found[0] > 0) != (seen.n_T > seen.n_X):
        return
    Y = (seen.n_X * seen.X + found[0] * np.outer(found[1], found[1])) / seen.n_T
    more = "more" if found[0] > 0 else "fewer"
    note = f"{number_of(abs(seen.n_T - seen.n_X), 'row')} {more}, all along one direction"
    yield Try(("B49",), note, Y, ("B27", "B28") if found[0] > 0 else ("B20",))


def _rank_one(X: Array, x: float, T: Array, t: float) -> tuple[float, Array] | None:
    """(λ, v) of the eigenvalue of D = x X − t T that is largest in magnitude, if D is about λ v vᵀ.

    D itself is not made.
    """
    size = t * apart(X, T, t / x)
    if len(X) < 3 or not size or not np.isfinite(size):
        return None
    squares = np.zeros(len(X))
    for k in range(0, len(X), 64):
        D = x * X[k : k + 64] - t * T[k : k + 64]
        squares += (D * D).sum(axis=0)
    widest = np.argmax(squares)
    v = x * X[:, widest] - t * T[:, widest]
    for _ in range(4):
        v = v / norm(v)
        v = x * (X @ v) - t * (T @ v)
    top = float(norm(v))
    if not top:
        return None
    v = v / top
    value = float(v @ (x * (X @ v) - t * (T @ v)))
    # |D − λ v vᵀ|² = |D|² − λ², for λ = vᵀ D v
    share = abs(value) / size
    return (value, v) if 4 * (1 - share) * (1 + share) < 1 else None


def _permuted(seen: Seen, heads: int | None) -> Iterator[Try]:
    """Rows of q and k for another rotary layout; rows, or rows and columns, in another order."""
    X, T = seen.X, seen.T
    rotary = seen.side == "G" and seen.layer.endswith((".attn.q", ".attn.k"))
    if rotary:
        for width in _widths(len(X), heads):
            halves = np.arange(len(X)).reshape(-1, 2, width // 2).swapaxes(1, 2).reshape(-1)
            for order in (halves, np.argsort(halves)):
                note = f"rows are permuted in heads of {width}"
                yield Try(("B51",), note, X[np.ix_(order, order)])
    order = _matched(np.diag(T), np.diag(X))
    if (order != np.arange(len(X))).any():
        Y = X[np.ix_(order, order)]
        yield Try(("B51",) if rotary else ("B47",), "rows and columns have another order", Y)
    if norm(T - T.T) > 1e-3 * norm(T):  # rounding does not do this, not even bfloat16's
        yield from _spread(T, X)
        rows = _rows_matched(T, X)
        if rows is not None:
            yield Try(("B47",), "rows have another order than columns", X[rows])


def _widths(size: int, heads: int | None) -> Iterable[int]:
    every = [w for w in range(4, size + 1, 2) if size % w == 0]
    return [heads] if heads in every else every


def _matched(theirs: Array, ours: Array) -> Array:
    """The order in which `ours` has the values of `theirs`, by rank; equal ones stay in order."""
    order = np.empty(len(ours), np.int64)
    order[np.argsort(theirs, kind="stable")] = np.argsort(ours, kind="stable")
    return order


def _spread(T: Array, X: Array) -> Iterator[Try]:
    """Row shards were padded with zeros, which stay between them; what is too many is cut off."""
    filled = np.abs(T).max(axis=1) > 0
    if filled.all() or not (np.abs(X).max(axis=1) > 0).all():
        return
    order = _nearest_rows(T[filled], X)
    if (np.diff(order) > 0).all():
        Y = np.zeros_like(T)
        Y[filled] = X[order]
        note = f"{number_of(int((~filled).sum()), 'row')} of zeros stand between rows of ours"
        yield Try(("B47",), note, Y)


def _rows_matched(T: Array, X: Array) -> Array | None:
    """For each row of T the row of X that it is a multiple of; None if two have the same."""
    order = _nearest_rows(T, X)
    return order if len(set(order.tolist())) == len(order) else None


def misjoined(seen: Seen) -> Iterator[Try]:
    """Row shards joined to a matrix of another shape, or some of them missing, or there twice."""
    X, size = seen.X, len(seen.X)
    if seen.T.ndim != 2 or size < 2:
        return
    for T, turned in ((seen.T, ""), (seen.T.T, ", transposed")):
        if T.shape[1] == size:
            yield from (replace(one, note=one.note + turned, T=T) for one in _spread(T, X))
        for rows, how in _undone(T, size):
            orders = [np.arange(len(rows))] if len(rows) <= size else []
            found = _nearest_rows(rows, X)
            if not orders or (found != orders[0]).any():
                orders.append(found)
            for order in orders:
                lost = len(set(range(size)) - {*order.tolist()})
                note = f"rows are joined {how}{turned}" + (f"; {lost} are missing" if lost else "")
                yield Try(("B47",), note, X[order], T=rows)


def _undone(T: Array, size: int) -> Iterator[tuple[Array, str]]:
    """What rows of `size` entries a matrix may be made of, and how they were joined."""
    height, width = T.shape
    parts = width // size
    if width % size == 0 and parts > 1:
        yield T.reshape(height, parts, size).swapaxes(0, 1).reshape(-1, size), "side by side"
    if width == size:
        yield T, "below one another"
    elif T.size == size * size:
        yield T.reshape(size, size), f"to the shape ({height}, {width})"


def _nearest_rows(T: Array, X: Array) -> Array:
    """For each row of T the row of X that it is nearest to a multiple of."""
    lengths = [np.maximum(norm(M, axis=1), np.finfo(float).tiny)[:, None] for M in (T, X)]
    return np.asarray(np.argmax((T / lengths[0]) @ (X / lengths[1]).T, axis=1))


def _triangle(seen: Seen) -> Iterator[Try]:
    """One triangle alone is filled, or the diagonal."""
    if _only_diagonal(seen.T) and not _only_diagonal(seen.X):
        yield Try((), "only the diagonal is filled", np.diag(np.diag(seen.T)))
        return
    for part, name in ((np.triu, "upper"), (np.tril, "lower")):
        if seen.T.any() and not (seen.T - part(seen.T)).any() and len(seen.T) > 1:
            yield Try((), f"only the {name} triangle is filled", part(seen.X))


def _only_diagonal(X: Array) -> bool:
    return len(X) > 2 and bool(X.any()) and not (X - np.diag(np.diag(X))).any()


def _biased(seen: Seen) -> Iterator[Try]:
    """A has one row and column more: of the bias, last or first."""
    T, X = seen.T, seen.X
    if seen.side != "A" or T.shape != (len(X) + 1, len(X) + 1):
        return
    for place, inner, corner in (
        ("last", T[:-1, :-1], T[-1, -1]),
        ("first", T[1:, 1:], T[0, 0]),
    ):
        r = fitted(inner, X)[1]
        known = "" if seen.mean is None else ", which is their [a; 1]"
        note = f"A has a column of ones, {place}{known}"
        fault = "B31"
        if r > 0 and abs(corner / r - 1) > CORNER:
            fault, note = "B30", f"{note}, and its corner is {corner / r:.6g} instead of 1"
        yield Try((fault,), note, X, T=inner)


def _of_ones(seen: Seen) -> Iterator[Try]:
    """Of a joint A: the bias first instead of last, or another corner than 1."""
    T, X = seen.T, seen.X
    order = np.roll(np.arange(len(X)), 1)
    yield Try(("B31",), "the column of ones is the first", X[np.ix_(order, order)])
    r = fitted(T[:-1, :-1], X[:-1, :-1])[1]
    corner = float(T[-1, -1]) / r if r > 0 else 1.0
    if abs(corner - 1) > CORNER:
        Y = X.copy()
        Y[-1, -1] = corner
        yield Try(("B30",), f"the corner of A is {corner:.6g} instead of 1", Y)


CORNER = 0.005
"""How far from 1 the corner of a joint A is a fault.  Chosen: bfloat16 rounds it by 0.002."""
