"""Refuse what is no eigenbasis: given by a caller, or read from a file."""

from __future__ import annotations

import math

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    require_dtype,
    require_finite,
    require_shape,
)

PROBES = 8
"""How many random vectors orthogonality is measured on."""

MRRR = 128
"""U of fewer columns may be as far from orthonormal as of so many.  Chosen: dsyevr, SciPy's default
solver, is content where eigenvalues differ by 1e-3. So U may be off by about eps/1e-3 at any size,
which is 8 · 128 eps. Of small graded matrices it uses 80 % of that."""


def require_basis(who: str, layer: str, one: Eigenbasis) -> None:
    """Refuse what is no eigenbasis, whether a caller or a file gave it.

    Definition
        U square, finite, ‖UᵀU − I‖ <= budget·‖I‖; values finite, descending and >= 0 (ORDER).
        ‖UᵀU − I‖/‖I‖ is measured as ‖Uᵀ(U x) − x‖/‖x‖ over 8 normal x. Its square has the mean
        ‖UᵀU − I‖²/n. Errors of rank one spread most, like χ² with 8 degrees of freedom. So a U ten
        times over the budget passes at most once in 10⁷ draws: P(χ²₈ <= 8/100) = 1e-7.

    The budget is that of an eigensolver in the dtype of U, and the rounding of the two products. A
    product with U errs by gamma(n) ‖|U|‖₂ ‖x‖ at most, and ‖|U|‖₂ <= ‖U‖ = √n.

    Cost: O(n²) for each side, where UᵀU would take n³.
    Proof: tests/test_eigenbasis.py::test_what_is_no_basis_is_refused
    """
    for side, U, values in (("A", one.U_A, one.mu), ("G", one.U_G, one.lam)):
        spectrum, what = f"{'mu' if side == 'A' else 'lam'} of {layer!r}", f"U_{side} of {layer!r}"
        require_spectrum(who, spectrum, values)
        n = len(values)
        require_shape(who, what, U, (n, n), f"(n, n), n the length of {spectrum}")
        require_dtype(who, what, U, "f", "real numbers")
        require_finite(who, what, U)
        x = np.random.default_rng(0).standard_normal((n, PROBES))
        with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
            error = float(np.linalg.norm(U.T @ (U @ x) - x) / np.linalg.norm(x))
        solver = tolerance.eigenpair(max(n, MRRR), U.dtype)
        budget = solver + 2 * tolerance.gamma(n, np.float64) * math.sqrt(n)
        if not error <= budget:  # NaN if it overflows
            raise ConventionError(
                f"{who}: {what} has |UᵀU − I|/|I| = {error:.1e} > {budget:.1e}: its columns are "
                "not orthonormal. Were they scaled, or stored in a shorter float than their dtype?"
            )


def require_spectrum(who: str, what: str, values: Array) -> None:
    """Refuse eigenvalues unless they are a vector, finite, descending and >= 0 (ORDER)."""
    require_shape(who, what, values, (None,), "(n,)")
    require_dtype(who, what, values, "f", "real numbers")
    require_finite(who, what, values)
    if not len(values):
        raise EmptyError(f"{who}: {what} is empty.")
    wrong = np.flatnonzero((values < 0) | (np.diff(values, prepend=values[0]) > 0))
    if len(wrong):
        raise ConventionError(
            f"{who}: {what} must be descending and >= 0 (ORDER, NEGATIVE); entry {wrong[0]} is "
            f"{values[wrong[0]]:.6g} after {values[max(wrong[0] - 1, 0)]:.6g}. eigh ascends: was "
            "the order left as it came?"
        )
