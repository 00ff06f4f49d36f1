"""BLAS and LAPACK: on one thread, and without the interpreter's lock, so that shards run abreast.

SciPy's own wrappers hold the GIL while the library works. SciPy exports the same routines for other
compilers (`scipy.linalg.cython_blas`, `cython_lapack`), and ctypes releases the lock around them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import cython_blas, cython_lapack
from threadpoolctl import ThreadpoolController

from refcurv.law.checks import Array

_MOST = 32_766  # beyond it dsyevd's workspace overflows LAPACK's 32-bit integers


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS and LAPACK on one thread: with two, some products and `eigh` change their bits."""
    with _pools().limit(limits=1):
        yield


@cache
def _pools() -> ThreadpoolController:
    """The thread pools of NumPy's and SciPy's BLAS; finding them takes longer than a product."""
    return ThreadpoolController()


def add_gram(x_NX: Array, sum_XX: Array, *, onto: bool) -> None:
    """The lower triangle of sum_XX becomes xᵀ x, added `onto` what it holds or not (syrk).

    Definition: sum_XX[i, :i+1] = (onto ? sum_XX[i, :i+1] : 0) + Σ_n x[n, i] x[n, :i+1]. Half the
    work of a product of two matrices; the upper triangle is left as it is. float32 or float64.
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
    routine = _routine(cython_blas, "ssyrk" if real == np.float32 else "dsyrk", 10)
    # Fortran reads our rows as columns: x is (X, N) there, and the lower triangle is its upper one
    routine(b"U", b"N", *(array.ctypes.data for array in operands))


def eigh(M: Array) -> tuple[Array, Array]:
    """(values, U) with M = U diag(values) Uᵀ, values ascending, U (n, n) Fortran-ordered.

    Reads the lower triangle of M, (n, n) float64. The definition is
    scipy.linalg.eigh(M, driver="evd"), whose bits it has (tests/test_eigenbasis.py).

    Raises:
        ArithmeticError: LAPACK did not converge.
    """
    n = len(M)
    if n < 2 or n > _MOST:
        values, U = scipy.linalg.eigh(M, driver="evd", check_finite=False)
        return values, U
    U = np.array(M, dtype=np.float64, order="F")
    values, work = np.empty(n), np.empty(1 + 6 * n + 2 * n * n)
    iwork = np.empty(3 + 5 * n, np.intc)
    size, lwork, liwork, info = (np.array([k], np.intc) for k in (n, len(work), len(iwork), 0))
    operands = (size, U, size, values, work, lwork, iwork, liwork, info)
    _routine(cython_lapack, "dsyevd", 11)(b"V", b"L", *(array.ctypes.data for array in operands))
    if info[0]:
        raise ArithmeticError(f"LAPACK dsyevd failed with info = {info[0]}.")
    return values, U


@cache
def _routine(module: Any, name: str, arguments: int) -> Any:
    """The Fortran routine behind SciPy's capsule, taking pointers; calling it releases the GIL."""
    capsule = module.__pyx_capi__[name]
    name_of, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(
        pointer(capsule, name_of(capsule))
    )
