"""What is looked at of one side of a layer, and what a hypothesis makes and leaves of it.

Theirs is Y times any number if a hypothesis holds. So forms are searched first; what the number is,
`scales` asks afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.differences import apart
from refcurv.law.checks import Array


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


def usable(seen: Seen) -> bool:
    """Is there a form to search: a matrix, finite and not 0?"""
    return seen.T.ndim == 2 and bool(math.isfinite(seen.T.sum()) and seen.T.any())
