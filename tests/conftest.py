"""Hypothesis profiles, one BLAS thread, and what machine this is."""

from __future__ import annotations

import json
import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, settings
from proofs import Proofs
from threadpoolctl import ThreadpoolController, threadpool_info

COMMON = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=20, **COMMON)
settings.register_profile("ci", max_examples=50, **COMMON)
settings.register_profile("proofs", max_examples=5, **COMMON)  # what a test executes
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write each test's error nearest to its budget to this JSON file (with -n 0)"
    parser.addoption("--measured", metavar="PATH", help=text)
    text = "run the tests that Proof: lines name, and see that they execute it"
    parser.addoption("--proofs", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measured") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--measured sees one process alone: give -n 0 too")
    if config.getoption("--proofs"):
        settings.load_profile("proofs")
        config.pluginmanager.register(Proofs())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is known to take long (`slow(seconds=...)`) begins first: the others fill the end."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("slow")
        return 0.0 if mark is None else float(mark.kwargs.get("seconds", 0))

    items.sort(key=seconds, reverse=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--measured")
    if path:
        found = {test: list(pair) for test, pair in sorted(strategies.MEASURED.items())}
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pytest_report_header() -> str:
    blas = ", ".join(
        f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', '?')})"
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    )
    jit = "off" if os.environ.get("NUMBA_DISABLE_JIT") == "1" else "on"
    return f"numpy {np.__version__}; BLAS {blas}, one thread; JIT {jit}"


@pytest.fixture
def on_terminal() -> Callable[[int], AbstractContextManager[None]]:
    """`with on_terminal(n)`: standard output is a terminal of n columns."""

    @contextmanager
    def of(columns: int) -> Iterator[None]:
        mine, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        with os.fdopen(mine), os.fdopen(theirs, "w") as out, mock.patch.object(sys, "stdout", out):
            yield

    return of


@cache
def _pools(of_torch: bool) -> ThreadpoolController:
    """Every BLAS of this process. Finding them takes a millisecond, longer than many a test."""
    return ThreadpoolController()


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    with _pools("torch" in sys.modules).limit(limits=1):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251024)
