"""Other programs' files, read without running anything in them: `read_dump`, `match`.

kinds        what lies at a path
stored       one array of a file
arrays       named arrays of a file → a dump; npz reads those of NumPy
kronfluence  its folders of factors
bergson      its folders of shards
memory       dumps in memory, and refcurv's own records
names        their layer names and ours
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from refcurv.curvature.bases import Bases
from refcurv.curvature.bases_file import load_bases
from refcurv.curvature.factors import Factors
from refcurv.curvature.factors_file import load_factors
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.arrays import arrays_of, read_hdf5, read_npz, read_tensors
from refcurv.judge.foreign.bergson import read_bergson
from refcurv.judge.foreign.edited import of_checkpoint, of_weights
from refcurv.judge.foreign.kinds import kind_of
from refcurv.judge.foreign.kronfluence import read_kronfluence
from refcurv.judge.foreign.memory import of_arrays, of_bases, of_factors
from refcurv.judge.foreign.names import match
from refcurv.judge.foreign.official import of_torch
from refcurv.judge.trace import load_tensors
from refcurv.law.checks import Array, ConventionError, SchemaError

__all__ = ["match", "read_arrays", "read_dump"]

_READERS: Final[Mapping[str, Callable[[Path], Dump]]] = MappingProxyType(
    {
        "factors": lambda path: of_factors(load_factors(path)),
        "basis": lambda path: of_bases(load_bases(path)),
        "npz": read_npz,
        "hdf5": read_hdf5,
        "safetensors": read_tensors,
        "kronfluence": read_kronfluence,
        "bergson": read_bergson,
        "weights": of_weights,
        "checkpoint": of_checkpoint,
        "torch": of_torch,
    }
)


def read_dump(theirs: str | Path | Factors | Mapping[str, Any] | Dump) -> Dump:
    """The dump in a file or folder, or in memory; by what it is, not by its name's ending.

    Proof: tests/test_foreign.py::test_what_is_no_dump_is_named
    """
    if isinstance(theirs, Dump):
        return theirs
    if isinstance(theirs, Factors):
        return of_factors(theirs)
    if isinstance(theirs, Bases):
        return of_bases(theirs)
    if isinstance(theirs, Mapping):
        return of_arrays(theirs)
    if not isinstance(theirs, str | os.PathLike):
        raise ConventionError(
            "validate: theirs must be a path, Factors, or {layer: (A, G, n)}; got "
            f"{type(theirs).__name__}."
        )
    path = Path(theirs)
    kind = kind_of(path)
    if kind == "trace":
        raise SchemaError(f"validate: {str(path)!r} is a trace; give it with --trace.")
    return _READERS[kind](path)


def read_arrays(path: str | Path) -> dict[str, Array]:
    """The arrays of a trace: an .npz, HDF5 or safetensors file, or one of `refcurv trace`.

    Proof: tests/test_trace.py::test_a_trace_of_theirs_is_judged_on_the_command_line
    """
    kind = kind_of(Path(path))
    if kind == "trace":
        return load_tensors(path)
    if kind not in ("npz", "hdf5", "safetensors"):
        raise SchemaError(
            f"trace: {str(path)!r} is no file of arrays LAYER/a, LAYER/g, logits, labels, nats."
        )
    return arrays_of(Path(path), kind)
