"""The eigenbasis of the block G ⊗ A: directions u_i v_jᵀ, with curvature λ_i μ_j (P4).

For each layer `decompose` takes `eigenbasis` of A = S_A / n_A and of G = S_G / n_G (COUNTS). With
bias="joint" the block is that of [W b] and A that of [a; 1] (BIAS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refcurv.algebra import blas
from refcurv.algebra.scaling import far_exponent, norm, shifted
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    NotPSDError,
    NotSymmetricError,
    RangeError,
    require_finite,
    require_shape,
)


@dataclass(frozen=True, slots=True)
class Eigenbasis:
    """A = U_A diag(mu) U_Aᵀ and G = U_G diag(lam) U_Gᵀ of one layer, by ORDER.

    Fields:
        U_A (I, I), mu (I,); U_G (O, O), lam (O,): float64 (by choice U float32), eigenvalues
            descending and >= 0. In a joint basis, of [W b], I is d_in + 1.
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


def eigenbasis(
    M: Array, shard_rows: int, dtype: str, what: str, own: bool = False
) -> tuple[Array, Array, int]:
    """(U, values, raised): M = U diag(values) Uᵀ, by ORDER and NEGATIVE.

    Args:
        M: (n, n) second moment, symmetric, positive semi-definite up to the rounding of its sums.
        shard_rows: rows of the products behind M, for the budget.
        dtype: of those products.
        what: name for messages, e.g. "A of 'blocks.0.mlp.up'".
        own: may the memory of M be used?

    Raises:
        ShapeError, NonFiniteError: of M.
        NotSymmetricError, NotPSDError: by more than rounding explains.
        RangeError: an eigenvalue that overflows. SolverError, RoomError: as `blas.eigh`.

    Cost: about 9 n³ flops, 3 n² float64 of memory, 2 n² with `own`; 5 n² above n = 32,766.
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
    with blas.one_blas_thread():
        values, U = blas.eigh(M, who, k, own)
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
    U.flags.writeable = values.flags.writeable = False
    return U, values, raised


def oriented(U: Array) -> Array:
    """U with each column's entry of largest magnitude made positive; see ORDER."""
    largest = np.abs(U).argmax(axis=0)
    return np.ascontiguousarray(U * np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0))
