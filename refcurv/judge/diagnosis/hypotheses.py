"""What theirs would be under a fault, made from the reference and the dump alone.

Each hypothesis is a matrix Y, and theirs is Y times any number if it holds. So forms are searched
first; what the number is, `scales` asks afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.differences import apart
from refcurv.law.checks import Array
from refcurv.law.words import number_of
from refcurv.model.config import NormPlace


@dataclass(frozen=True, slots=True)
class Seen:
    """One side of one layer. T is theirs and X ours, means over rows; n_T and n_X their rows.

    `mean` is Σ a / n of ours, where it is known. joint: the last row and column are of the bias.
    draws: of ours over theirs.
    """

    layer: str
    side: str
    T: Array
    X: Array
    n_T: float | None
    n_X: int
    mean: Array | None = None
    joint: bool = False
    draws: float = 1.0

    def rows(self, n: float) -> float | None:
        """Theirs over n, which counts our draws or none (COUNTS); None where theirs is unsaid."""
        if self.n_T is None or self.n_T <= 0 or n <= 0:
            return None
        return min(self.n_T / n, self.n_T * self.draws / n, key=lambda r: max(r, 1 / r))


@dataclass(frozen=True, slots=True)
class Try:
    """A hypothesis: theirs is Y times a number. `note` says what Y is made of.

    blur: how many times more than the form that number may be off. spread: that of `Left`.
    of: the layer and side that Y is, where it is not its own.
    """

    faults: tuple[str, ...]
    note: str
    Y: Array
    alike: tuple[str, ...] = ()
    T: Array | None = None  # theirs as Y's rows and columns have it, where that is not all of it
    blur: float = 1.0
    spread: float = 0.0
    of: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """What a hypothesis leaves: `error`, |T − r Y| over |r Y| with the best r; `ratio`, this r.

    rows: theirs over what the hypothesis counts, None where nothing is counted. spread: how large
    an error labels that nobody knows explain. wider: how many times more than of ours drawing
    explains. trace: tr T over tr Y, NaN where nobody asked. drawn: may labels still be other ones?
    blur: that of the `Try`. roomy: how many times wider than of ours the budget of rounding is.
    """

    error: float
    ratio: float
    note: str = ""
    alike: tuple[str, ...] = ()
    rows: float | None = None
    spread: float = 0.0
    wider: float = 1.0
    trace: float = math.nan
    drawn: bool = True
    blur: float = 1.0
    roomy: float = 1.0


def fitted(T: Array, Y: Array) -> tuple[float, float]:
    """(error, r): r = ⟨T, Y⟩/⟨Y, Y⟩, the number by which Y comes nearest to T."""
    size = float(norm(Y))
    if not size:
        return (0.0, 1.0) if not T.any() else (np.inf, np.nan)
    if all(1e-100 < x < 1e100 for x in (size, float(norm(T)))):
        r = float(np.vdot(T, Y)) / size**2
    else:
        r = float(np.vdot(T / size, Y / size))
    return (apart(T, Y, r) / size, r) if r > 0 else (np.inf, r)


def see(case: Case, layer: str) -> dict[str, Seen]:
    """Both sides of a layer, whatever their shape; without what a dump has not."""
    theirs, ours, (A, G) = case.theirs(layer), case.ours(layer), case.means(layer)
    out = {}
    mean = None if ours.sum_a is None else ours.sum_a / ours.n_A
    if layer in case.joint:
        mean = ours.A[:, -1]  # of [a; 1]
    for side, T, X, n_T, n_X, m in (
        ("A", theirs.A, A, theirs.n_A, ours.n_A, mean),
        ("G", theirs.G, G, theirs.n_G, ours.n_G, None),
    ):
        if T is not None:
            joint = side == "A" and layer in case.joint
            theirs_draws = int(case.dump.declared.get("draws", "1"))
            draws = case.reference.draws / theirs_draws if side == "G" else 1.0
            out[side] = Seen(layer, side, _full(T), _full(X), n_T, n_X, m, joint, draws)
    return out


@dataclass(frozen=True, slots=True)
class State:
    """What must be known of one side before it is searched: of theirs, and `wanted`, of ours.

    Fields: finite; spilt, if not, does it look like overflow; filled, is any entry not 0; shape;
    same, is it that of ours; diagonal.
    """

    finite: bool
    spilt: bool
    filled: bool
    wanted: bool
    shape: tuple[int, ...]
    same: bool
    diagonal: Array


def states(case: Case, layer: str) -> dict[str, State]:
    """By side, looked at once."""

    def of(one: Seen) -> State:
        T, X = one.T, one.X
        finite = bool(np.isfinite(T).all())
        filled, wanted = bool(T.any()), bool(X.any())
        spilt, same = not finite and _spilt(T), T.shape == X.shape
        return State(finite, spilt, filled, wanted, T.shape, same, np.diag(T).copy())

    return case.once(
        ("states", layer), lambda: {side: of(one) for side, one in see(case, layer).items()}
    )


def _spilt(T: Array) -> bool:
    """Are there infinities, or whole rows that are not finite beside others that are?"""
    bad = ~np.isfinite(T)
    return bool(np.isinf(T).any() or (bad.all(axis=1).any() and not bad.all()))


def _full(X: Array) -> Array:
    """Of a table the diagonal alone is stored (EMBEDDING)."""
    return np.diag(X) if X.ndim == 1 else X


def tries(
    seen: Seen, index: Index, heads: int | None, wanted: Container[str] | None = None
) -> Iterator[Try]:
    """Every hypothesis that fits the shapes.

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
    for fault, family in (families if fits else {"B31": _biased, "B47": _misjoined}).items():
        alike = {"B47": ("B51",), "B31": ("B30",)}.get(fault, ())
        if wanted is None or any(id in wanted for id in (fault, *alike)):
            yield from family(seen)
    if not fits and (wanted is None or ("B34" in wanted and "B47" in wanted)):
        yield from index.misjoined(seen)
    if wanted is None or "B40" in wanted:
        yield from index.pooled(seen)
    if wanted is None or any(id in wanted for id in ("B32", "B34", "B35", "B38", "B42")):
        yield from index.others(seen)


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


def _misjoined(seen: Seen) -> Iterator[Try]:
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


class Index:
    """Diagonals of all our matrices, to find those which theirs may be, and these when asked."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._diagonals: dict[tuple[str, str], Array] = {}
        self._pool: tuple[object, Array] = (None, np.zeros(0))

    def others(self, seen: Seen, most: int = 2) -> Iterator[Try]:
        """Ours of other layers and of the other side that T is nearest to, by the diagonals."""
        if seen.T.ndim != 2 or seen.T.shape[0] != seen.T.shape[1]:
            return
        own = _shares(np.diag(seen.T))
        found = []
        for (layer, side), diagonal in self._read().items():
            if len(diagonal) == len(own) and (layer, side) != (seen.layer, seen.side):
                far = (layer != seen.layer, _kind(layer) != _kind(seen.layer))
                found.append((float(norm(_shares(diagonal) - own)), *far, layer, side))
        for *_, layer, side in sorted(found)[:most]:
            ours = self._case.ours(layer)
            Y = ours.A if side == "A" else ours.G
            Y = np.diag(Y) if Y.ndim == 1 else Y
            if Y.shape == seen.X.shape and np.array_equal(Y, seen.X):
                continue  # layers that read the same input
            fault, alike = self._of_another(seen, layer, side)
            note = f"it is our {side} of {layer}"
            yield Try((fault,), note, Y, alike, of=(layer, side))

    def misjoined(self, seen: Seen) -> Iterator[Try]:
        """Shards of G of another part of the same fused layer, joined to another shape."""
        own, known = fused(seen.layer), self._read()
        for layer in self._case.reference:
            if layer == seen.layer or seen.side == "A" or fused(layer) != own:
                continue
            if len(known[layer, "G"]) == len(seen.X):
                for one in _misjoined(replace(seen, X=self._case.ours(layer).G)):
                    note = f"it is our G of {layer}, whose {one.note}"
                    yield replace(one, faults=("B34", "B47"), note=note)

    def pooled(self, seen: Seen) -> Iterator[Try]:
        """The sums of several layers together, where that is nearer than ours.

        Of all of one kind and size; of those of one input and size, which programs may hold in one.
        """
        size, kind, known = len(seen.X), _kind(seen.layer), self._read()
        fits = [x for x in self._case.reference if len(known[x, seen.side]) == size]
        every = [x for x in fits if _kind(x) == kind]
        if seen.T.shape != seen.X.shape:
            return
        own, ours = _shares(np.diag(seen.T)), _shares(known[seen.layer, seen.side])
        both = [x for x in every if x in self._case.matched]
        parts = partners(seen.layer, fits)
        for names in dict.fromkeys((tuple(every), tuple(both), *parts)):
            diagonal = _shares(sum((known[x, seen.side] for x in names), np.zeros(size)))
            if len(names) < 2 or norm(diagonal - own) >= norm(ours - own):
                continue
            Y, note = (
                self._pooled(seen.side, names),
                f"the sums of {number_of(len(names), 'layer')} together",
            )
            times = len(names) * float(np.trace(Y))
            if abs(float(np.trace(seen.T)) - times) <= 0.5 * times / len(names):
                Y, note = Y * len(names), f"{note}, over the rows of one"
            yield Try(("B40",), note, Y)

    def _pooled(self, side: str, names: tuple[str, ...]) -> Array:
        """The mean over the rows of all of them; that of the last call is kept."""
        if self._pool[0] != (side, names):
            each = [self._case.ours(x) for x in names]
            total = sum(((x.sum_A if side == "A" else x.sum_G) for x in each), np.zeros(()))
            n = sum(x.n_A if side == "A" else x.n_G for x in each)
            self._pool = (side, names), total / n
        return self._pool[1]

    def _of_another(self, seen: Seen, layer: str, side: str) -> tuple[str, tuple[str, ...]]:
        """The fault of theirs being our `side` of `layer`."""
        if side != seen.side:
            return ("B32", ()) if layer == seen.layer else ("B32", ("B38",))
        if side == "G" and fused(seen.layer) == fused(layer):
            return "B34", ("B38",)  # another part of one matrix
        if self._wholly(seen, layer):
            return "B38", ()
        later = side == "A" and self._in_place(seen.layer, layer)
        if _kind(layer) == _kind(seen.layer):
            return "B38", ("B42",) if later else ()
        if later:
            return "B42", ("B34", "B38")
        return ("B34" if side == "A" else "B35"), ("B38",)

    def _wholly(self, seen: Seen, layer: str) -> bool:
        """Is the other side of theirs, too, nearest to that of `layer`?"""
        side, theirs = "AG".replace(seen.side, ""), self._case.theirs(seen.layer)
        T = theirs.A if side == "A" else theirs.G
        if T is None or T.ndim != 2 or T.shape[0] != T.shape[1]:
            return False
        own, known = _shares(np.diag(T)), self._read()
        fits = [x for x, s in known if s == side and len(known[x, s]) == len(own)]
        far = {x: float(norm(_shares(known[x, side]) - own)) for x in fits}
        return layer in far and far[layer] <= min(far.values())

    def _in_place(self, layer: str, later: str) -> bool:
        """Do both read the stream itself, `later` behind a sum that `layer` does not see?

        A sum in place then overwrites what `layer` read by what `later` reads.
        """
        model = self._case.model
        if model is None or model.config.norm_place is not NormPlace.POST:
            return False
        order = [fused(x) for x in model.config.linear_layers()]
        one, two = fused(layer), fused(later)
        return {one[1], two[1]} <= {*_FUSED.values()} and order.index(one) < order.index(two)

    def _read(self) -> Mapping[tuple[str, str], Array]:
        if not self._diagonals:
            for layer in self._case.reference:
                both = self._case.once(("diagonals", layer), partial(diagonals, self._case, layer))
                self._diagonals |= {(layer, side): both[side] for side in "AG"}
        return self._diagonals


def diagonals(case: Case, layer: str) -> dict[str, Array]:
    """Those of the sums of our A and G."""
    one = case.ours(layer)
    sums = {"A": one.sum_A, "G": one.sum_G}
    return {side: np.array(S if S.ndim == 1 else np.diag(S)) for side, S in sums.items()}


def _shares(diagonal: Array) -> Array:
    total = float(diagonal.sum())
    return diagonal / total if total > 0 else diagonal


_FUSED = dict.fromkeys(("q", "k", "v"), "qkv") | dict.fromkeys(("gate", "up"), "gate_up")


def fused(layer: str) -> tuple[str, str]:
    """Its block, and the matrix that programs may hold it in, with others of the same input."""
    block, _, kind = layer.rpartition(".")
    return block, _FUSED.get(kind, kind)


def partners(layer: str, others: Iterable[str]) -> list[tuple[str, ...]]:
    """The layer with one, and with all, of the others that one matrix may hold with it."""
    every = [x for x in others if fused(x) == fused(layer)]
    pairs = [tuple(x for x in every if x in (layer, y)) for y in every if y != layer]
    return [*pairs, tuple(every)]


def _kind(layer: str) -> str:
    """`mlp.up` of `blocks.3.mlp.up`."""
    return layer.split(".", 2)[-1] if layer.startswith("blocks.") else layer
