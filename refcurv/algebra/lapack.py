"""SciPy's symmetric eigensolver, called without the GIL so that matrices decompose side by side.

`scipy.linalg.eigh(driver="evd")` holds the interpreter's lock while LAPACK works. SciPy exports the
same routine, dsyevd, for other compilers through `scipy.linalg.cython_lapack`; ctypes releases the
lock around it. Same library, same routine, same bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import cython_lapack

from refcurv.law.checks import Array

_MOST = 32_766  # beyond it the workspace's size overflows LAPACK's 32-bit integers


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
    _dsyevd()(b"V", b"L", *(array.ctypes.data for array in operands))
    if info[0]:
        raise ArithmeticError(f"LAPACK dsyevd failed with info = {info[0]}.")
    return values, U


@cache
def _dsyevd() -> Any:
    """The routine behind SciPy's capsule; calling it releases the GIL."""
    capsule = cython_lapack.__pyx_capi__["dsyevd"]
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)(pointer(capsule, name(capsule)))
