"""Hypothesis profiles, one BLAS thread, and what machine this is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_info, threadpool_limits

COMMON = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=25, **COMMON)
settings.register_profile("ci", max_examples=50, **COMMON)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_report_header() -> str:
    blas = ", ".join(
        f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', '?')})"
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    )
    jit = "off" if os.environ.get("NUMBA_DISABLE_JIT") == "1" else "on"
    return f"numpy {np.__version__}; BLAS {blas}, one thread; JIT {jit}"


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251024)
