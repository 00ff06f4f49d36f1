"""What eigenvectors are measured by: how far from those of a matrix, and by what budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds
from refcurv.judge.diagnosis.seen import fitted
from refcurv.judge.dump import Theirs
from refcurv.law.checks import Array

SIDES = {"A": ("U_A", "mu"), "G": ("U_G", "lam")}
"""The fields of eigenvectors and eigenvalues, by side."""


def solver_budget(size: int, arithmetic: Arithmetic) -> float:
    """|A U − U diag μ| over |A|, and |UᵀU − 1| over √n, of an eigensolver and of what it stored.

    As `tolerance.eigenpair`, of their dtypes. Kind: worst case; LAPACK uses 1 to 3 % of it.
    """
    solver, stored = (ROUNDOFF[str(name)] for name in (arithmetic.solver, arithmetic.stored))
    return 16 * size * solver + 4 * stored


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets by the dtype of undeclared parts: of the solver, and of the matrix and the solver."""

    solver: Callable[[str], float]
    both: Callable[[str], float]
    drawing: float


def limits_of(bounds: Bounds, side: str, size: int) -> Limits:
    """Of one side, a matrix of that size."""
    case = bounds.case

    def solver(dtype: str) -> float:
        return solver_budget(size, case.arithmetic.filled(dtype))

    def both(dtype: str) -> float:
        return 2 * (solver(dtype) + case.budget(bounds.layer, dtype, side))

    return Limits(solver, both, bounds.drawing.norm if side == "G" else 0.0)


def apart(U: Array, spectrum: Array | None, M: Array) -> float:
    """`recomposition`; without a spectrum what U leaves of M beside its diagonal, over |M|."""
    if spectrum is not None:
        return recomposition(U, spectrum, M)
    rotated = U.T @ M @ U
    return share(float(norm(rotated - np.diag(rotated.diagonal()))), float(norm(M)))


def recomposition(U: Array, spectrum: Array, M: Array) -> float:
    """|U diag(μ) Uᵀ / Σμ − M / tr M| over |M / tr M|; infinite where Σμ is not positive.

    0 where both are 0.
    """
    if not (spectrum.any() or M.any()):
        return 0.0
    total, trace = float(spectrum.sum()), float(np.trace(M))
    if total <= 0 or trace <= 0:
        return float("inf")
    root, minus = U * np.sqrt(abs(spectrum) * (trace / total)), spectrum < 0
    made = root @ root.T  # a matrix by its own transpose: half the work
    if minus.any():
        made -= 2 * (root[:, minus] @ root[:, minus].T)
    return float(norm(made - M)) / float(norm(M))


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if part else 0.0


def unfit(side: str, theirs: Theirs, M: Array) -> str:
    """Why eigenvectors or eigenvalues cannot be compared; empty if they can."""
    vectors, values = SIDES[side]
    U, spectrum = getattr(theirs, vectors), getattr(theirs, values)
    if U.shape != M.shape:
        return f"{vectors} is {U.shape}; ours is {M.shape}"
    if spectrum is not None and spectrum.shape != M.shape[:1]:
        return f"{values} is {spectrum.shape}; ours is {M.shape[:1]}"
    arrays = [U] if spectrum is None else [U, spectrum]
    finite = all(np.isfinite(x).all() for x in arrays)
    return "" if finite else f"{vectors} or {values} is not finite everywhere"


def as_columns(case: Case, layer: str, theirs: Theirs) -> Theirs:
    """Theirs with its eigenvectors in columns: transposed where only its rows are any (B64).

    By its own A and G where it holds them, else by ours: then no difference of these counts. A few
    random vectors decide, for the whole product of a large layer takes seconds.
    """
    ours, out = case.ours(layer), theirs
    for side, (vectors, values) in SIDES.items():
        U, spectrum, own = (getattr(theirs, name) for name in (vectors, values, side))
        true = ours.A if side == "A" else ours.G
        M = true if own is None or own.shape != true.shape or not np.isfinite(own).all() else own
        if U is None or spectrum is None or M.ndim == 1 or unfit(side, theirs, M):
            continue
        X = np.random.default_rng(0).normal(size=(len(M), PROBES))
        plain, turned = (fitted(V @ (spectrum[:, None] * (V.T @ X)), M @ X)[0] for V in (U, U.T))
        if turned <= ROWS and turned < plain / 10:
            turned_U = np.ascontiguousarray(U.T)
            out = replace(out, U_A=turned_U) if side == "A" else replace(out, U_G=turned_U)
    return out


PROBES = 8
"""Random vectors.  Chosen: the error of a few is that of the whole matrix up to a factor of 2."""

ROWS = 0.05
"""Chosen: rows that leave more of A than this are no eigenvectors of it."""


def known(drawn: float) -> float:
    """What drawing explains; 0 where nobody knows."""
    return 0.0 if math.isnan(drawn) else drawn
