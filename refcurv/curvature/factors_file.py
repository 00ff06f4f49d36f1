"""Factors in a file: written whole, read a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refcurv.curvature.factors import ERRORS, HALVES, Factor, Factors, require_factors
from refcurv.curvature.halves import require_half
from refcurv.files import store
from refcurv.files.digest import recorded
from refcurv.files.lazy import Lazy, Recent
from refcurv.files.paths import WRITING, as_path, machine_faults
from refcurv.law.checks import (
    DTypeError,
    SchemaError,
    require_choice,
    require_draws,
    require_finite,
    require_range,
    require_seed,
    require_shape,
)
from refcurv.law.conventions import COMPUTE_DTYPES, Estimator, Fisher, Rows
from refcurv.model.config import TABLES
from refcurv.model.given import require_whole

_SUMS = (Estimator.EXPAND, Estimator.REDUCE)
_UNREAD = np.zeros((0, 0))


def save_factors(factors: Factors, path: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write a factors file: LAYER/{sum_A, n_A, sum_G, n_G}, float64 and int64 (METHOD, Files).

    With a bias also LAYER/sum_a, and LAYER/{half_mu, half_lam} where halves were asked for. The
    errors that are known, of what was drawn and of rounding, are float64 attributes of sum_G. Of
    segments in the place of rows the root has the attribute `estimator` (ESTIMATOR).

    Args:
        factors: of `collect` or `estimators.reduce`.
        path: of the file, which is written whole or not at all.
        checkpoint: the file that they were collected with; it is deleted once they are on disk.

    Raises:
        RangeError, ShapeError, DTypeError, NonFiniteError: counts or sums that could not be
        loaded; no file is written. StorageError: the disk is full, or the path cannot be written.

    Cost: the sums once, one layer at a time.
    Proof: tests/test_factors.py::test_what_was_collected_is_never_lost,
        ::test_what_no_file_may_hold_is_not_saved
    """
    require_factors("save_factors", factors)
    collected = None if checkpoint is None else as_path("save_factors", checkpoint)
    attributes: dict[str, str | int | float] = {
        "fisher": str(factors.fisher),
        "rows": str(factors.rows),
        "seed": str(factors.seed),
        "draws": factors.draws,
        "dtype": factors.dtype,
        "shard_rows": factors.shard_rows,
        **({"weights": factors.weights} if factors.weights else {}),
        **({"estimator": "reduce"} if factors.estimator is Estimator.REDUCE else {}),
    }

    def entries() -> Iterator[store.Entry]:
        for name, factor in factors.items():
            _require_sound(name, factor)
            yield store.Entry(f"{name}.sum_A", factor.sum_A)
            yield store.Entry(f"{name}.n_A", np.asarray(factor.n_A, np.int64))
            if factor.sum_a is not None:
                yield store.Entry(f"{name}.sum_a", factor.sum_a)
            errors = {part: getattr(factor, part) for part in ERRORS}
            known = {part: error for part, error in errors.items() if error is not None}
            yield store.Entry(f"{name}.sum_G", factor.sum_G, known)
            yield store.Entry(f"{name}.n_G", np.asarray(factor.n_G, np.int64))
            for part in HALVES:
                if (values := getattr(factor, part)) is not None:
                    yield store.Entry(f"{name}.{part}", values)

    store.write(
        path,
        format="refcurv-factors",
        attributes=attributes,
        arrays=entries(),
        provenance=store.provenance(inputs=factors.source.get("inputs", {}), **attributes),
    )
    if collected is not None:
        with machine_faults("collect", collected, WRITING):
            collected.unlink(missing_ok=True)


def _require_sound(name: str, factor: Factor) -> None:
    """Refuse a layer that could not be loaded again."""
    who = "save_factors"
    d_in, d_out = (len(np.atleast_1d(x)) for x in (factor.sum_A, factor.sum_G))
    shapes = {
        "sum_A": ((d_in,) if name in TABLES else (d_in, d_in), "of inputs"),
        "sum_G": ((d_out, d_out), "of outputs"),
        "sum_a": ((d_in,), "of inputs"),
        "half_mu": ((d_in,), "of inputs"),
        "half_lam": ((d_out,), "of outputs"),
    }
    for part in ("n_A", "n_G"):
        require_whole(who, f"{part} of {name!r}", getattr(factor, part), 1, 2**63 - 1)
    for part, (shape, axes) in shapes.items():
        if getattr(factor, part) is None:
            continue
        what, values = f"{part} of {name!r}", np.asarray(getattr(factor, part))
        require_shape(who, what, values, shape, axes)
        if values.dtype != np.float64:
            raise DTypeError(f"{who}: {what} must be float64; got {values.dtype}.")
        require_finite(who, what, values)


def load_factors(path: str | Path) -> Factors:
    """Open a factors file; each layer's matrices are read, and their checksums verified, on use.

    Raises:
        SchemaError: not a factors file, that of an unfinished collection, or layers whose entries
        are missing or misshapen. ConventionError, RangeError: a choice that the law does not have.
        ChecksumError, NonFiniteError: on use: damaged bytes, NaN or infinity.
        StorageError: the disk cannot be read.
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
        _require_parts(header, name)
    where, at = f"load: {header.path!r}", header.attributes
    return Factors(
        Lazy(names, lambda name: _read_factor(header, name)),
        Fisher(require_choice(where, "fisher", at.get("fisher"), list(Fisher))),
        Rows(require_choice(where, "rows", at.get("rows"), list(Rows))),
        _seed(where, store.fact(where, at, "seed", str)),
        require_draws(where, store.fact(where, at, "draws", int)),
        require_choice(where, "dtype", at.get("dtype"), COMPUTE_DTYPES),
        int(require_range(where, "shard_rows", store.fact(where, at, "shard_rows", int), 1, 2**62)),
        store.Source(header),
        recorded(header),
        Estimator(require_choice(where, "estimator", at.get("estimator", "expand"), _SUMS)),
    )


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """(O, I) of every layer; of factors that lie in a file no matrix is read for it."""
    header = _header(factors)
    if header is not None:
        at = header.entries
        return {n: (at[f"{n}.sum_G"].shape[0], at[f"{n}.sum_A"].shape[0]) for n in factors}
    return {name: (len(one.sum_G), len(one.sum_A)) for name, one in factors.items()}


def parts_of(factors: Factors) -> dict[str, frozenset[str]]:
    """Which optional fields of `Factor` a layer has; of factors in a file no matrix is read."""
    header, optional = _header(factors), ("sum_a", *ERRORS, *HALVES)
    if header is None:
        return {
            name: frozenset(part for part in optional if getattr(one, part) is not None)
            for name, one in factors.items()
        }
    return {
        name: frozenset(
            part
            for part in optional
            if f"{name}.{part}" in header.entries
            or part in header.entries[f"{name}.sum_G"].attributes
        )
        for name in factors
    }


def of_side(factors: Factors, name: str, sides: str) -> Factor:
    """The factor of one layer; of one in a file only the sums of these `sides` are read.

    The other sums are empty then: "A" or "G" leaves the other out, "" both.
    """
    header = _header(factors)
    return factors[name] if header is None else _read_factor(header, name, sides)


def same_A(factors: Factors, name: str, other: str, joint: bool) -> bool:
    """Do two layers share A? gate and up do, and q, k, v (O37); jointly, not if one lacks a b.

    Of factors in a file the checksums of the sums are compared.
    """
    header = _header(factors)
    pair = [of_side(factors, one, "") for one in (name, other)]
    if header is None:
        biased = [one.sum_a is not None for one in pair]
        alike = pair[0].sum_A is pair[1].sum_A or np.array_equal(pair[0].sum_A, pair[1].sum_A)
    else:
        at = header.entries
        biased = [f"{one}.sum_a" in at for one in (name, other)]
        alike = at[f"{name}.sum_A"].sha256 == at[f"{other}.sum_A"].sha256
    return alike and pair[0].n_A == pair[1].n_A and not (joint and biased[0] != biased[1])


def _header(factors: Factors) -> store.Header | None:
    """Of the file that the layers are read from as they are asked for; None of others."""
    layers = factors.layers.base if isinstance(factors.layers, Recent) else factors.layers
    return factors.source.get("header") if isinstance(layers, Lazy) else None


def _seed(where: str, text: str) -> int:
    """A seed lies in the file as a text: it may be larger than HDF5's integers."""
    if not re.fullmatch("[0-9]{1,20}", text):
        raise SchemaError(
            f"{where}: attribute 'seed' must be a number in decimal; got {text!r:.80}."
        )
    return require_seed(where, int(text))


def _require_parts(header: store.Header, name: str) -> None:
    """float64 sums and int64 counts: square matrices, of a table a vector; sum_a fits sum_A."""
    square: tuple[int | None, ...] = (None, None)
    sides = {
        part: store.require_entry(header, f"{name}.{part}", "float64", wanted)
        for part, wanted in (("sum_A", square[: 1 if name in TABLES else 2]), ("sum_G", square))
    }
    for part, shape in sides.items():
        if len(set(shape)) > 1:
            raise SchemaError(
                f"open: {header.path!r}: {part} of layer {name!r} must be a square matrix; got "
                f"{shape}."
            )
    for part in ("n_A", "n_G"):
        store.require_entry(header, f"{name}.{part}", "int64", ())
    if f"{name}.sum_a" in header.entries:
        store.require_entry(header, f"{name}.sum_a", "float64", sides["sum_A"][:1])
    for part, side in zip(HALVES, ("sum_A", "sum_G"), strict=True):
        if f"{name}.{part}" in header.entries:
            store.require_entry(header, f"{name}.{part}", "float64", sides[side][:1])


def _read_factor(header: store.Header, name: str, sides: str = "AG") -> Factor:
    n_A, n_G = (store.read(header, f"{name}.{part}") for part in ("n_A", "n_G"))
    sum_A, sum_G = (
        store.read(header, f"{name}.sum_{side}", finite=True) if side in sides else _UNREAD
        for side in "AG"
    )
    if n_A < 1 or n_G < 1:
        raise SchemaError(f"{header.path}: rows of layer {name!r} are {n_A} and {n_G}.")
    at, where = header.entries[f"{name}.sum_G"].attributes, f"{header.path}: sum_G of {name!r}"
    errors: dict[str, Any] = {
        part: store.fact(where, at, part, float) for part in ERRORS if part in at
    }
    biased = f"{name}.sum_a" in header.entries and "A" in sides
    sum_a = store.read(header, f"{name}.sum_a", finite=True) if biased else None
    halves: dict[str, Any] = {
        part: require_half(
            f"{header.path}: {part} of {name!r}",
            store.read(header, f"{name}.{part}", finite=True),
            float(np.trace(x) / n) if side in sides else None,
        )
        for part, x, n, side in zip(HALVES, (sum_A, sum_G), (n_A, n_G), "AG", strict=True)
        if f"{name}.{part}" in header.entries
    }
    return Factor(sum_A, int(n_A), sum_G, int(n_G), sum_a=sum_a, **(errors | halves))
