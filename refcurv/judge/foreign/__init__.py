"""Other programs' files, read without running anything in them: `read_dump`, `match`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refcurv.curvature.factors import Factors
from refcurv.curvature.factors_file import load_factors
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays, of_factors
from refcurv.judge.foreign.names import match
from refcurv.judge.foreign.official import is_torch, of_torch
from refcurv.law.checks import SchemaError

__all__ = ["match", "read_dump"]


def read_dump(theirs: str | Path | Factors | Mapping[str, Any]) -> Dump:
    """The dump in a file or folder, or in memory; by what it is, not by its name's ending."""
    if isinstance(theirs, Factors):
        return of_factors(theirs)
    if isinstance(theirs, Mapping):
        return of_arrays(theirs)
    path = Path(theirs)
    if is_torch(path):
        return of_torch(path)
    if path.suffix == ".h5":
        return of_factors(load_factors(path))
    raise SchemaError(f"validate: {path} is no dump of a known format.")
