"""The projection: W' = U_G (C ∘ M) U_Aᵀ, C = U_Gᵀ W U_A (P5-P8).

M keeps the pairs of directions (i, j) with the largest λ_i μ_j that hold a share rho of the total
curvature mass (SELECT). With a joint basis W stands for [W b], the bias its last column (BIAS).
"""

from __future__ import annotations

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.selection import select
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.law.checks import Array


def projected(W: Array, basis: Eigenbasis, rho: float) -> Array:
    """The definition of the edit of one matrix, unrounded: what `kfac.edit` must equal.

    Definition
        W' = U_G (C ∘ M) U_Aᵀ with C = U_Gᵀ W U_A and M of `select`. rho = 1 returns W itself.

    Args:
        W: (O, I), or [W b] for a joint basis.
        basis: of its layer.
        rho: the share of Σ λ_i μ_j that is kept, in [0, 1].

    Cost: 4·O·I·(O + I) flops, and a sort of O·I pairs: for small matrices.
    Source: P5-P8 (arXiv 2510.24256).
    Proof: tests/test_projection.py::test_the_edit_equals_its_definition
    """
    return W if rho == 1 else keep_pairs(W, basis, select(basis.lam, basis.mu, rho))


def keep_pairs(W: Array, basis: Eigenbasis, mask: Array) -> Array:
    """U_G (C ∘ M) U_Aᵀ with C = U_Gᵀ W U_A and M = mask, (O, I) bool; float64.

    W and the result are (O, I). It is an orthogonal projection: twice is once (O54).
    Cost: 4·O·I·(O + I) flops.
    Proof: tests/test_projection.py::test_O54_edit_is_an_orthogonal_projection
    """
    with one_blas_thread():
        C = basis.U_G.T @ W.astype(np.float64) @ basis.U_A
        C[~mask] = 0
        return np.asarray(basis.U_G @ C @ basis.U_A.T)


def project(W: Array, basis: Eigenbasis, counts: Array) -> Array:
    """`keep_pairs` of a staircase: M[i, j] = (j < counts[i])."""
    return keep_pairs(W, basis, np.arange(W.shape[1]) < counts[:, None])
