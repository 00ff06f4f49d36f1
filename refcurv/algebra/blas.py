"""BLAS and LAPACK: on one thread, and without the interpreter's lock, so that shards run abreast.

SciPy's wrappers hold the GIL while the library works. SciPy exports the same routines for compilers
(`scipy.linalg.cython_blas`, `cython_lapack`), around which ctypes releases it. SciPy's LAPACK
counts in 32 bits: matrices too large for that go to NumPy's, which in its wheels counts in 64.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.linalg import LinAlgError, _umath_linalg
from scipy.linalg import cython_lapack
from scipy.sparse.linalg import ArpackError
from threadpoolctl import OpenBLASController, ThreadpoolController

from refcurv.algebra.scaling import shifted
from refcurv.law.checks import Array, RoomError, SolverError

MOST_SQUARE = 32_766  # beyond it dsyevd's workspace, 1 + 6 n + 2 n² numbers, exceeds 2³¹ − 1


_inside: list[Any] = []  # what was before, once for each that is inside: it is of the process
_at_once = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS and LAPACK on one thread: with two, some products and `eigh` change their bits.

    The last thread that leaves undoes it. Underflow is silent, whatever `np.seterr` says.

    Proof: tests/test_parallel.py::test_threads_of_the_caller_share_the_limit
    """
    with _at_once:
        _take_control()
        limit = _pools().limit(limits=1)
        _inside.append(_inside[0] if _inside else limit)
    try:
        with np.errstate(under="ignore"):
            yield
    finally:
        with _at_once:
            before = _inside.pop()
            if not _inside:
                _take_control()
                before.restore_original_limits()
                _take_control()


def _take_control() -> None:
    """From threadpoolctl 3.8 on what another thread set may be changed by that thread alone."""
    if hasattr(OpenBLASController, "clear_controlling_thread"):
        OpenBLASController.clear_controlling_thread(force=True)


_pools = cache(ThreadpoolController)  # finding them takes longer than a product


def eigh(M: Array, who: str = "", exponent: int = 0, own: bool = False) -> tuple[Array, Array]:
    """(values, U) with 2^-exponent M = U diag(values) Uᵀ, values ascending, U (n, n).

    M is (n, n) float64, and only its lower triangle is read. Up to n = 32,766 the definition is
    scipy.linalg.eigh(M, driver="evd"), with the same bits, beyond numpy.linalg.eigh(M). With `own`
    M may be lost: U takes its memory if M equals Mᵀ, which then has its lower triangle.

    Raises:
        SolverError: LAPACK did not converge. RoomError: n is too large for its integers.
    """
    n = len(M)
    require_solvable(who, n)
    if n > MOST_SQUARE:
        with solving(who, M):
            return np.linalg.eigh(shifted(M, -exponent))
    own = own and M.dtype == np.float64 and M.flags.carray and np.array_equal(M, M.T)
    U = M.T if own else np.array(M, dtype=np.float64, order="F")
    if exponent:
        np.ldexp(U, -exponent, out=U)
    if n < 2:
        return U.diagonal().copy(), np.ones_like(U)
    values, work = np.empty(n), np.empty(1 + 6 * n + 2 * n * n)
    iwork = np.empty(3 + 5 * n, np.intc)
    size, lwork, liwork, info = (np.array([k], np.intc) for k in (n, len(work), len(iwork), 0))
    operands = (size, U, size, values, work, lwork, iwork, liwork, info)
    routine(cython_lapack, "dsyevd", 11)(b"V", b"L", *(array.ctypes.data for array in operands))
    with solving(who, M):
        if info[0]:
            raise LinAlgError(f"dsyevd: info = {info[0]}")
    return values, U


def require_solvable(who: str, n: int) -> None:
    """Raise RoomError if an (n, n) matrix is too large for the integers of every LAPACK here."""
    if n > MOST_SQUARE:
        require_long_integers(who, f"{n:,} x {n:,}")


def has_long_integers() -> bool:
    """Does NumPy's LAPACK count in 64 bits (ILP64)? The one in its wheels does."""
    return bool(getattr(_umath_linalg, "_ilp64", False))


def require_long_integers(who: str, shape: str) -> None:
    """Raise RoomError for a matrix that only a LAPACK of 64-bit integers can take, without one."""
    if not has_long_integers():
        raise RoomError(
            f"{who} is {shape}, too large for a LAPACK that counts in 32 bits, and this NumPy has "
            "no other. Install NumPy's own wheel (pip install numpy), or collect without the layer "
            "(--layers)."
        )


@contextmanager
def solving(who: str, *matrices: Array) -> Iterator[None]:
    """Raise SolverError, in one sentence, where LAPACK or ARPACK fails on the matrices."""
    try:
        yield
    except (LinAlgError, ArpackError) as error:
        shapes = ", ".join(" x ".join(f"{n:,}" for n in M.shape) for M in matrices)
        finite = "finite" if all(np.isfinite(M).all() for M in matrices) else "not finite"
        raise SolverError(
            f"{who} ({shapes}, {finite}): the solver did not converge ({error}). For finite "
            "numbers this is a fault of the linear algebra library: try another kernel of it "
            "(OPENBLAS_CORETYPE=Haswell) or another version of NumPy and SciPy."
        ) from None


@cache
def routine(module: Any, name: str, arguments: int) -> Any:
    """The Fortran routine behind SciPy's capsule, taking pointers; calling it releases the GIL."""
    capsule = module.__pyx_capi__[name]
    name_of, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(
        pointer(capsule, name_of(capsule))
    )
