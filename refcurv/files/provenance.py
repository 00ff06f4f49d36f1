"""What a file was made with and from. Every file records it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from functools import cache
from typing import Any

import threadpoolctl

from refcurv.algebra.kernels import jit
from refcurv.law.conventions import describe


def provenance(**made_from: Any) -> dict[str, Any]:
    """What a file was made with and from, as JSON values. It has no date: equal runs are equal.

    Args:
        made_from: Anything that belongs to this file: inputs ({file name: sha256}), seed, dtype.

    Returns:
        What `machine` says, platform, BLAS threads, the law (`conventions`), and the items of
        `made_from`.
    """
    return {
        **machine(),
        "platform": platform.platform(),
        "blas_threads": 1,  # every pass limits it (METHOD, Determinism)
        "conventions": describe(),
        **made_from,
    }


def machine() -> dict[str, Any]:
    """What decides the bits, besides inputs, choices and law: versions, BLAS kernels, CPU, JIT.

    It is the same in every run on one machine; the libraries may be loaded in any order.
    """
    blas = [
        {key: library.get(key) for key in ("internal_api", "version", "architecture")}
        for library in threadpoolctl.threadpool_info()
        if library.get("user_api") == "blas"
    ]
    return {
        "refcurv": _version("refcurv"),
        "libraries": {name: _version(name) for name in ("numpy", "scipy", "numba", "h5py")},
        "python": platform.python_version(),
        "blas": sorted(blas, key=lambda library: sorted(map(str, library.values()))),
        "cpu_features": _cpu_features(),
        "jit": jit(),
    }


def _cpu_features() -> list[str]:
    """The features of the CPU that NumPy found. NumPy has no public name for them."""
    umath = importlib.import_module("numpy._core._multiarray_umath")
    return sorted(
        name for name, present in getattr(umath, "__cpu_features__", {}).items() if present
    )


@cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
