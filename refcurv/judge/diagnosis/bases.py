"""Which fault explains another eigenbasis: of what matrix it is the basis, and by which solver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.arithmetic import ROUNDOFF
from refcurv.judge.compare import Bounds
from refcurv.judge.diagnosis.seen import fitted
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import SIDES, apart, limits_of, solver_budget
from refcurv.judge.verdict import FAIL, Comparison
from refcurv.law.checks import Array
from refcurv.law.words import number_of


@dataclass(frozen=True, slots=True)
class _Seen:
    """One side of one layer: U and spectrum are theirs, M is ours, own theirs (None where unfit).

    limit: how far a basis of M may be from M. skew: |UᵀU − 1| over √n; solver: its budget.
    """

    bounds: Bounds
    side: str
    U: Array
    spectrum: Array
    M: Array
    own: Array | None
    limit: float
    skew: Comparison


def explained(
    bounds: Bounds, side: str, theirs: Theirs, M: Array, found: Sequence[Comparison]
) -> list[Comparison]:
    """The comparisons of one side, those that fail with the fault that explains all of them.

    Args: found, orthogonality first, then the basis, then spaces.

    Proof: tests/test_judge_bases.py::test_each_fault_of_a_basis_has_its_name
    """
    vectors, values = SIDES[side]
    U, spectrum, own = (getattr(theirs, name) for name in (vectors, values, side))
    if spectrum is None:
        return list(found)
    if own is not None and (own.shape != M.shape or not np.isfinite(own).all()):
        own = None
    level = bounds.case.arithmetic.stored or "float64"
    limit = limits_of(bounds, side, len(U)).both(level)
    seen = _Seen(bounds, side, U, spectrum, M, own, limit, found[0])
    reason = next(_reasons(seen), None)
    if reason is None:
        return list(found)
    fault, words = reason
    return [replace(one, fault=fault, cause=words) if one.verdict == FAIL else one for one in found]


def _reasons(seen: _Seen) -> Iterator[tuple[str | None, str]]:
    """(fault, words) of everything that explains it; the simplest first."""
    (vectors, values), side = SIDES[seen.side], seen.side
    drawn = limits_of(seen.bounds, side, len(seen.U)).drawing
    near = seen.limit + (drawn if drawn < np.inf else 0.0)  # unknown drawing explains nothing
    if apart(seen.U.T, seen.spectrum, seen.M) <= near:
        yield "B64", f"the eigenvectors are the rows of {vectors}, not its columns"
    if apart(seen.U, seen.spectrum[::-1], seen.M) <= near:
        yield "B65", f"{values} is in the opposite order of the columns of {vectors}"
    if seen.own is not None and apart(seen.U, seen.spectrum, seen.own) <= seen.limit:
        yield None, f"it is the basis of their own {side}, which is not ours"
    ours, other = seen.bounds.case.ours(seen.bounds.layer), "G" if side == "A" else "A"
    N = ours.G if other == "G" else ours.A
    if N.shape == seen.M.shape and apart(seen.U, seen.spectrum, N) <= near:
        yield "B32", f"{vectors} and {values} are those of {other}"
    if _short_solver(seen):
        yield "B62", f"{vectors} has the digits of float32, and is off by what its eigensolver is"
    yield from _of_rounded(seen)


def _short_solver(seen: _Seen) -> bool:
    """Vectors with the digits of float32, orthonormal and right up to what its solver leaves.

    The size of the errors alone would be no sign: it is the size of many things.
    """
    case, size = seen.bounds.case, len(seen.U)
    filled = case.arithmetic.filled(case.arithmetic.stored or "float64")
    digits = bool((rounded(seen.U, "float32") == seen.U).all())
    if not digits or ROUNDOFF[str(filled.solver)] >= ROUNDOFF["float32"]:
        return False
    short = solver_budget(size, replace(filled, solver="float32"))
    M = seen.M if seen.own is None else seen.own
    return (seen.skew.error or 0.0) <= short and (
        apart(seen.U, seen.spectrum, M) <= 2 * short + seen.limit
    )


def _of_rounded(seen: _Seen) -> Iterator[tuple[str | None, str]]:
    """The basis of their matrix, or of its sums, in a shorter dtype.

    Its negative eigenvalues are left, cut off, or turned positive.
    """
    M, side = seen.M if seen.own is None else seen.own, seen.side
    n = seen.bounds.case.counts(seen.bounds.layer).theirs[side]
    for dtype in ("float32", "float16", "bfloat16"):
        for factor in (1.0, *([n] if n else [])):
            X = rounded(factor * M, dtype)
            if not np.isfinite(X).all():
                continue
            values = np.einsum("ij,ij->j", seen.U, X @ seen.U)
            if apart(seen.U, values, X) > seen.limit:
                continue
            words = f"it is the basis of {side} rounded to {dtype}"
            below = int((values < -seen.limit * norm(X)).sum())
            if below:
                words += f", which has {number_of(below, 'eigenvalue')} below 0"
            for known, fault, more in (
                (values, "B62" if dtype == "float32" else None, ""),
                (np.maximum(values, 0), "B66", "; these are cut off"),
                (np.abs(values), "B66", "; these are turned positive"),
            ):
                if fitted(seen.spectrum, known)[0] <= seen.limit:
                    yield fault, words + more


def rounded(X: Array, dtype: str) -> Array:
    """X in a shorter dtype, widened again."""
    if dtype == "bfloat16":
        return np.asarray(from_bfloat16(to_bfloat16(X)), np.float64)
    with np.errstate(over="ignore"):
        return X.astype(dtype).astype(np.float64)
