"""Factors in a file: written whole, read a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refcurv.curvature.factors import Factor, Factors
from refcurv.files import store
from refcurv.files.digest import recorded
from refcurv.files.disk import WRITING, machine_faults
from refcurv.files.lazy import Lazy
from refcurv.law.checks import SchemaError
from refcurv.law.conventions import Fisher, Rows
from refcurv.model.transformer import TABLES

_ERRORS = ("error_G", "error_trace_G", "rounding_G")
_PARTS = ("sum_A", "n_A", "sum_a", "sum_G", "n_G")


def save_factors(factors: Factors, path: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write a factors file: LAYER/{sum_A, n_A, sum_G, n_G}, float64 and int64 (DESIGN 4).

    With a bias also LAYER/sum_a. The errors that are known, of what was drawn and of rounding, are
    float64 attributes of sum_G. The `checkpoint` that they were collected with is deleted once they
    are on disk.

    Proof: tests/test_factors.py::test_what_was_collected_is_never_lost
    """
    attributes: dict[str, str | int | float] = {
        "fisher": str(factors.fisher),
        "rows": str(factors.rows),
        "seed": str(factors.seed),
        "draws": factors.draws,
        "dtype": factors.dtype,
        "shard_rows": factors.shard_rows,
        **({"weights": factors.weights} if factors.weights else {}),
    }

    def entries() -> Iterator[store.Entry]:
        for name, factor in factors.items():
            yield store.Entry(f"{name}.sum_A", factor.sum_A)
            yield store.Entry(f"{name}.n_A", np.asarray(factor.n_A, np.int64))
            if factor.sum_a is not None:
                yield store.Entry(f"{name}.sum_a", factor.sum_a)
            errors = {part: getattr(factor, part) for part in _ERRORS}
            known = {part: error for part, error in errors.items() if error is not None}
            yield store.Entry(f"{name}.sum_G", factor.sum_G, known)
            yield store.Entry(f"{name}.n_G", np.asarray(factor.n_G, np.int64))

    store.write(
        path,
        format="refcurv-factors",
        attributes=attributes,
        arrays=entries(),
        provenance=store.provenance(inputs=factors.source.get("inputs", {}), **attributes),
    )
    if checkpoint is not None:
        with machine_faults("collect", checkpoint, WRITING):
            Path(checkpoint).unlink(missing_ok=True)


def load_factors(path: str | Path) -> Factors:
    """Open a factors file; each layer's matrices are read, and their checksums verified, on use.

    Raises:
        SchemaError: not a factors file, or layers whose entries are missing or misshapen.
    """
    header = store.open_file(path, format="refcurv-factors")
    if "unfinished" in header.attributes:
        raise SchemaError(
            f"{path}: the checkpoint of an unfinished collection. Run the same command again to "
            "finish it."
        )
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in header.entries))
    if not names:
        raise SchemaError(f"{path}: holds no layer; was its collection interrupted?")
    for name in names:
        _require_shapes(header, name)
    at = header.attributes
    try:
        return Factors(
            Lazy(names, lambda name: _read_factor(header, name)),
            Fisher(str(at["fisher"])),
            Rows(str(at["rows"])),
            int(at["seed"]),
            int(at["draws"]),
            str(at["dtype"]),
            int(at["shard_rows"]),
            store.Source(header),
            recorded(header),
        )
    except (KeyError, ValueError) as error:
        raise SchemaError(
            f"{path}: root attributes are not those of a factors file: {error}."
        ) from None


def _require_shapes(header: store.Header, name: str) -> None:
    """Square matrices and numbers; of a table a vector of counts; sum_a as long as sum_A."""
    found = {part: header.entries.get(f"{name}.{part}") for part in _PARTS}
    shapes = {part: info.shape for part, info in found.items() if info}
    table = name in TABLES
    for part, dims in (("sum_A", 1 if table else 2), ("n_A", 0), ("sum_G", 2), ("n_G", 0)):
        shape = shapes.get(part)
        if shape is None or len(shape) != dims or len(set(shape)) > 1:
            raise SchemaError(
                f"{header.path}: layer {name!r} needs {part} as a "
                f"{('number', 'vector', 'square matrix')[dims]}; "
                f"got {'nothing' if shape is None else shape}."
            )
    if shapes.get("sum_a", shapes["sum_A"][:1]) != shapes["sum_A"][:1]:
        raise SchemaError(
            f"{header.path}: sum_a of {name!r} must be {shapes['sum_A'][:1]}, as sum_A is "
            f"{shapes['sum_A']}; got {shapes['sum_a']}."
        )


def _read_factor(header: store.Header, name: str) -> Factor:
    sum_A, n_A, sum_G, n_G = (
        store.read(header, f"{name}.{part}", finite=True)
        for part in ("sum_A", "n_A", "sum_G", "n_G")
    )
    if n_A < 1 or n_G < 1:
        raise SchemaError(f"{header.path}: layer {name!r} counts {n_A} and {n_G} rows.")
    at = header.entries[f"{name}.sum_G"].attributes
    try:
        errors = {part: float(at[part]) for part in _ERRORS if part in at}
    except ValueError as bad:
        raise SchemaError(f"{header.path}: sum_G of {name!r}: no standard error: {bad}") from None
    biased = f"{name}.sum_a" in header.entries
    sum_a = store.read(header, f"{name}.sum_a", finite=True) if biased else None
    return Factor(sum_A, int(n_A), sum_G, int(n_G), sum_a=sum_a, **errors)
