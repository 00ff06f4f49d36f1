"""The eigenbasis of the block G ⊗ A: directions u_i v_jᵀ, with curvature λ_i μ_j (P4).

With bias="joint" the block is that of [W b] and A that of [a; 1] (BIAS).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra import blas
from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.scaling import far_exponent, norm, shifted
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NotPSDError,
    NotSymmetricError,
    RangeError,
    require_dtype,
    require_finite,
    require_shape,
)
from refcurv.law.conventions import Bias


@dataclass(frozen=True, slots=True)
class Eigenbasis:
    """A = U_A diag(mu) U_Aᵀ and G = U_G diag(lam) U_Gᵀ of one layer, by ORDER.

    Fields:
        U_A (I, I), mu (I,); U_G (O, O), lam (O,): float64, eigenvalues descending and >= 0. In a
            joint basis, of [W b], I is d_in + 1.
        raised_A, raised_G: how many eigenvalues rounding had made negative; they are 0 now.
        rounding: the part of Σ lam, the trace of G, that is rounding (NEGATIVE); None if unknown.
    """

    U_A: Array
    mu: Array
    U_G: Array
    lam: Array
    raised_A: int = 0
    raised_G: int = 0
    rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Bases(Mapping[str, Eigenbasis]):
    """The eigenbases of some layers, by name in file order.

    Fields:
        layers: the Eigenbasis of each layer, by name.
        source: for provenance.
        bias: separate, of W alone; joint, of [W b] for layers that have a b (BIAS).
        method: what made the bases; `decompose` says "kfac". An edit copies it into its record.
        weights: the digest of the model's weights (`refcurv.files.digest`); None if unknown.
    """

    layers: Mapping[str, Eigenbasis]
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bias: Bias = Bias.SEPARATE
    method: str = "kfac"
    weights: str | None = None

    def __getitem__(self, name: str) -> Eigenbasis:
        """The eigenbasis of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


def eigenbasis(M: Array, shard_rows: int, dtype: str, what: str) -> tuple[Array, Array, int]:
    """(U, values, raised): M = U diag(values) Uᵀ, by ORDER and NEGATIVE.

    Args:
        M: (n, n) second moment, symmetric, positive semi-definite up to the rounding of its sums.
        shard_rows: rows of the products behind M, for the budget.
        dtype: of those products.
        what: name for messages, e.g. "A of 'blocks.0.mlp.up'".

    Raises:
        ShapeError, NonFiniteError: of M.
        NotSymmetricError, NotPSDError: by more than rounding explains.
        RangeError: an eigenvalue that overflows. SolverError, RoomError: as `blas.eigh`.

    Cost: about 9 n³ flops, 3 n² float64 of memory; 5 n² above n = 32,766.
    Proof: tests/test_eigenbasis.py::test_reconstruction_orthogonality_and_order,
        ::test_powers_of_two_change_no_bit
    """
    who, n = f"decompose: {what}", max(len(M), 1) if np.ndim(M) else 1
    require_shape("decompose", what, M, (n, n), "(n, n)")
    require_finite("decompose", what, M)
    k = far_exponent(M)
    inside = shifted(M, -k) if k else M
    size, skew = norm(inside), norm(inside - inside.T)
    budget = tolerance.asymmetry(shard_rows, dtype)
    del inside
    if skew > budget * size:
        raise NotSymmetricError(
            f"{who} has |M - Mᵀ|/|M| = {skew / size:.1e} > {budget:.1e}. Rounding "
            "cannot explain this; look for a missed transpose or a partial (sharded) sum."
        )
    with one_blas_thread():
        values, U = blas.eigh(M, who, k)
    values, U = values[::-1].copy(), oriented(U[:, ::-1])
    underflow = float(shifted(tolerance.underflow(n, shard_rows, dtype), -k))
    least = -tolerance.negative(n, shard_rows, dtype) * max(values[0], 0.0) - underflow
    if values[-1] < least:
        lowest, bound, highest = shifted(np.array([values[-1], least, values[0]]), k)
        raise NotPSDError(
            f"{who} has eigenvalue {lowest:.3e} < {bound:.1e}, the largest being "
            f"{highest:.3e}. A second moment has none below 0; was it centred, averaged in a short "
            "float, or is it a difference of two?"
        )
    raised = int((values < 0).sum())
    values = shifted(np.where(values > 0, values, 0.0), k)
    if values[0] == np.inf:
        raise RangeError(f"{who} has an eigenvalue beyond the largest float64; rescale it.")
    for array in (U, values):
        array.flags.writeable = False
    return U, values, raised


def oriented(U: Array) -> Array:
    """U with each column's entry of largest magnitude made positive; see ORDER."""
    largest = np.abs(U).argmax(axis=0)
    return np.ascontiguousarray(U * np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0))


# ------------------------------------------------------------------ checks

PROBES = 8
"""How many random vectors orthogonality is measured on."""


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
        with one_blas_thread():
            error = float(np.linalg.norm(U.T @ (U @ x) - x) / np.linalg.norm(x))
        solver = tolerance.eigenpair(n, U.dtype)
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


def named(basis: Bases) -> str:
    """The basis and its file, for messages."""
    path = basis.source.get("path")
    return "the basis" + (f" {str(path)!r}" if path else "")
