"""Eigenvectors of another program beside our A and G: by what rotations in a cluster leave alone.

Single eigenvectors are compared nowhere: their signs are free, and where eigenvalues lie closer
together than rounding any rotation among them is as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.compare import Bounds, said
from refcurv.judge.dump import Theirs
from refcurv.judge.verdict import FAIL, Comparison
from refcurv.law.checks import Array

SIDES = {"A": ("U_A", "mu"), "G": ("U_G", "lam")}
"""The fields of eigenvectors and eigenvalues, by side."""


def solver_budget(size: int, arithmetic: Arithmetic) -> float:
    """|A U − U diag μ| over |A|, and |UᵀU − 1| over √n, of an eigensolver and of what it stored.

    As `tolerance.eigenpair`, of their dtypes. Kind: worst case; LAPACK uses 1 to 3 % of it.
    """
    solver, stored = (ROUNDOFF[str(name)] for name in (arithmetic.solver, arithmetic.stored))
    return 16 * size * solver + 4 * stored


def compare_bases(bounds: Bounds, theirs: Theirs, own: Eigenbasis | None) -> list[Comparison]:
    """Orthogonality, recomposition and spaces of each side that the dump has eigenvectors of.

    Args: own, our basis, for the spaces; without it they are left out.

    Proof: tests/test_judge_bases.py::test_signs_and_rotations_in_a_cluster_are_no_difference
    """
    out: list[Comparison] = []
    ours = bounds.case.ours(bounds.layer)
    for side, (vectors, values) in SIDES.items():
        U, spectrum = getattr(theirs, vectors), getattr(theirs, values)
        M = ours.A if side == "A" else ours.G
        if U is None or M.ndim == 1:
            continue
        if U.shape != M.shape or (spectrum is not None and spectrum.shape != M.shape[:1]):
            text = f"{vectors} is {U.shape}; ours is {M.shape}"
            out.append(said(bounds.layer, f"basis of {side}", FAIL, text))
            continue
        arrays = [U] if spectrum is None else [U, spectrum]
        if not all(np.isfinite(x).all() for x in arrays):
            text = f"{vectors} or {values} is not finite everywhere"
            out.append(said(bounds.layer, f"basis of {side}", FAIL, text))
            continue
        out += _one_side(bounds, side, U, spectrum, M)
        if own is not None and spectrum is not None:
            pair = (own.U_A, own.mu) if side == "A" else (own.U_G, own.lam)
            out.append(_spaces(bounds, side, U[:, np.argsort(-spectrum)], *pair))
    return out


def _one_side(
    bounds: Bounds, side: str, U: Array, spectrum: Array | None, M: Array
) -> list[Comparison]:
    (vectors, values), limits = SIDES[side], _limits(bounds, side, len(U))
    skew = float(norm(U.T @ U - np.eye(len(U)))) / math.sqrt(len(U))
    text = f"the columns of {vectors} are not orthonormal"
    orthogonal = bounds.judged(f"orthogonality of {vectors}", skew, text, budget_of=limits.solver)
    if spectrum is None:  # then U must make M diagonal
        rotated = U.T @ M @ U
        error = _share(float(norm(rotated - np.diag(rotated.diagonal()))), float(norm(M)))
        text = f"{vectors} does not make {side} diagonal"
    else:
        error = recomposition(U, spectrum, M)
        text = f"{vectors} diag({values}) {vectors}ᵀ is not {side}"
    found = bounds.judged(
        f"basis of {side}", error, text, budget_of=limits.both, drawing=limits.drawing
    )
    if found.verdict == FAIL and spectrum is not None:
        turned = bounds.judged(
            "", recomposition(U.T, spectrum, M), "", budget_of=limits.both, drawing=limits.drawing
        )
        if turned.verdict != FAIL:
            text = f"the eigenvectors are the rows of {vectors}, not its columns"
            found = replace(found, fault="B64", cause=text)
    return [orthogonal, found]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Budgets by the dtype of undeclared parts: of the solver, and of the matrix and the solver."""

    solver: Callable[[str], float]
    both: Callable[[str], float]
    drawing: float


def _limits(bounds: Bounds, side: str, size: int) -> _Limits:
    case = bounds.case

    def solver(dtype: str) -> float:
        return solver_budget(size, case.arithmetic.filled(dtype))

    def both(dtype: str) -> float:
        return 2 * (solver(dtype) + case.budget(bounds.layer, dtype, side))

    return _Limits(solver, both, bounds.drawing.norm if side == "G" else 0.0)


def recomposition(U: Array, spectrum: Array, M: Array) -> float:
    """|U diag(μ) Uᵀ / Σμ − M / tr M| over |M / tr M|; infinite where Σμ is not positive.

    0 where both are 0.
    """
    if not (spectrum.any() or M.any()):
        return 0.0
    total, trace = float(spectrum.sum()), float(np.trace(M))
    if total <= 0 or trace <= 0:
        return float("inf")
    return float(norm((U * (spectrum * (trace / total))) @ U.T - M)) / float(norm(M))


def _spaces(bounds: Bounds, side: str, theirs: Array, U: Array, values: Array) -> Comparison:
    """The spaces of the k leading eigenvectors, for each k, by Davis and Kahan (O63).

    |sin Θ| is at most 2 |E|/gap, the gap being that of one of the two (Yu, Wang and Samworth 2015).
    So |sin Θ| times the gap, over |M|, is an error of at most twice that of M; it is 0 inside a
    cluster, where the gap is. The largest of these is given.
    """
    squares = (U.T @ theirs) ** 2  # (ours, theirs)
    mixed = squares[::-1].cumsum(axis=0)[::-1].cumsum(axis=1)  # Σ over i >= k, j <= l
    sine = np.sqrt(np.diagonal(mixed, offset=-1))  # i >= k + 1 and j <= k
    gap = values[:-1] - values[1:]
    error = _share(float((sine * gap).max(initial=0.0)), float(norm(values)))
    text, limits = "the space of the leading eigenvectors is another", _limits(bounds, side, len(U))
    return bounds.judged(
        f"spaces of {side}", error, text, budget_of=limits.both, drawing=2 * limits.drawing
    )


def _share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if part else 0.0
