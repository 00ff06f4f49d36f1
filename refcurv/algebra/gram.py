"""Second moments xᵀ x, by BLAS."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cython_blas

from refcurv.algebra.blas import routine
from refcurv.law.checks import Array


def add_gram(x_NX: Array, sum_XX: Array, *, onto: bool) -> None:
    """Write xᵀ x to the lower triangle of sum_XX (syrk); with `onto`, add it to what is there.

    Definition: sum_XX[i, :i+1] = (onto ? sum_XX[i, :i+1] : 0) + Σ_n x[n, i] x[n, :i+1]. It takes
    half the work of a product of two matrices. The upper triangle stays as it is. float32, float64.
    """
    N, X = x_NX.shape
    x_NX = np.ascontiguousarray(x_NX)
    if x_NX.dtype != sum_XX.dtype or not sum_XX.flags.c_contiguous or sum_XX.shape != (X, X):
        raise ValueError("add_gram: sum_XX must be C-contiguous (X, X) of x's dtype.")
    if not N:
        sum_XX[:] = sum_XX if onto else 0
        return
    real = x_NX.dtype
    sizes = [np.array([n], np.intc) for n in (X, N, X, X)]
    one, beta = np.ones(1, real), np.array([1 if onto else 0], real)
    operands = (sizes[0], sizes[1], one, x_NX, sizes[2], beta, sum_XX, sizes[3])
    syrk = routine(cython_blas, "ssyrk" if real == np.float32 else "dsyrk", 10)
    # Fortran reads our rows as columns: x is (X, N) there, and the lower triangle is its upper one
    syrk(b"U", b"N", *(array.ctypes.data for array in operands))
