"""Libraries that only some work needs: a missing one is told from a broken one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from refcurv.law.checks import RefcurvError


@contextmanager
def needed(library: str, missing: RefcurvError) -> Iterator[None]:
    """Around an import of a library: raise `missing` if it is not installed.

    One that is there and cannot be loaded raises what it raises, which says why.

    Proof: tests/test_libraries.py::test_a_missing_library_is_told_from_a_broken_one
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise missing from None
