"""Singular values, by LAPACK."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from refcurv.algebra.blas import require_long_integers, solving
from refcurv.law.checks import Array

MOST_INT = 2**31 - 1
"""The largest number of SciPy's LAPACK."""


def svd(W: Array, who: str = "svd", *, full: bool = False) -> tuple[Array, Array, Array]:
    """(U, σ, Vᵀ) of a float64 W, σ descending; `full`: U (O, O) and Vᵀ (I, I) complete.

    The definition is scipy.linalg.svd(W, full, lapack_driver="gesdd"), or numpy.linalg.svd(W, full)
    if W's workspace is too large for the integers of SciPy's LAPACK.

    Raises:
        SolverError: LAPACK did not converge. RoomError: W is too large for its integers.
    """
    low, high = sorted(W.shape)
    # what gesdd asks for: 4 low² + 7 low numbers, and blocks of at most 128 columns
    asked = max(4 * low**2 + 128 * (low + high), high * (high if full else low))
    with solving(who, W):
        if asked <= MOST_INT:
            U, sigma, Vt = scipy.linalg.svd(W, full_matrices=full, check_finite=False)
        else:
            require_long_integers(who, f"{W.shape[0]:,} x {W.shape[1]:,}")
            U, sigma, Vt = np.linalg.svd(W, full_matrices=full)
    return U, sigma, Vt
