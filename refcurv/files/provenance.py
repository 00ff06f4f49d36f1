"""What a file was made with and from: written into every one of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import threadpoolctl

from refcurv.law.conventions import describe


def provenance(**made_from: Any) -> dict[str, Any]:
    """What a file was made with and from, as JSON values; no clock, so that runs can be compared.

    Args:
        made_from: Anything that belongs to this file: inputs ({file name: sha256}), seed, dtype.

    Returns:
        Versions, platform, BLAS libraries with core type and threads, CPU features, the law
        (`conventions`), and the items of `made_from`.
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
        "platform": platform.platform(),
        "blas": blas,
        "blas_threads": 1,  # every pass limits it (DESIGN §6)
        "cpu_features": _cpu_features(),
        "conventions": describe(),
        **made_from,
    }


def _cpu_features() -> list[str]:
    """What NumPy found the CPU to have; it has no public name for that."""
    umath = importlib.import_module("numpy._core._multiarray_umath")
    return sorted(
        name for name, present in getattr(umath, "__cpu_features__", {}).items() if present
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
