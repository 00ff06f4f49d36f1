"""Dumps in memory: {layer: (A, G, n)}, {layer: {"A": A, ...}}, and refcurv's own records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refcurv.curvature.bases import Bases
from refcurv.curvature.bases_file import kept_in
from refcurv.curvature.factors import Factors
from refcurv.files.lazy import Lazy
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign.arrays import COUNTS
from refcurv.judge.foreign.stored import AXES, common, count, misfit
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    as_array,
    require_choice,
    require_dtype,
)


def of_factors(factors: Factors) -> Dump:
    """refcurv's own, read layer by layer."""

    def read(name: str) -> Theirs:
        one = factors[name]
        return Theirs(A=one.A, n_A=one.n_A, G=one.G, n_G=one.n_G)

    return Dump(
        program="refcurv",
        layers=Lazy(list(factors), read),
        holds=dict.fromkeys(factors, frozenset({"A", "n_A", "G", "n_G"})),
        declared={"fisher": str(factors.fisher), "rows": str(factors.rows)},
        arithmetic=Arithmetic(factors.dtype, factors.dtype, "float64", "float64", "float64"),
    )


def of_bases(bases: Bases) -> Dump:
    """refcurv's own eigenbases, read layer by layer."""
    parts = ("U_A", "mu", "U_G", "lam")

    def read(name: str) -> Theirs:
        one = bases[name]
        own = {part: getattr(one, part) for part in parts}
        return Theirs(**own, stored={part: array.dtype.name for part, array in own.items()})

    return Dump(
        program="refcurv",
        layers=Lazy(list(bases), read),
        holds=dict.fromkeys(bases, frozenset({"U_A", "mu", "U_G", "lam"})),
        declared={"bias": str(bases.bias), "method": bases.method},
        arithmetic=Arithmetic(solver="float64", stored=kept_in(bases)),
    )


def of_arrays(layers: Mapping[str, Any]) -> Dump:
    """{layer: (A, G, n)}, means over n rows; or {layer: {"A": A, "G": G, "n": n, "U_A": ...}}.

    Anything may be None. An array is whatever NumPy makes one of: a torch tensor, a list of lists.

    Raises:
        EmptyError: no layer. ConventionError: neither a triple nor a mapping, or unknown keys.
        ShapeError, DTypeError: no array of real numbers.

    Proof: tests/test_foreign.py::test_what_is_no_dump_in_memory_is_refused
    """
    if not layers:
        raise EmptyError("validate: theirs is empty; give {layer: (A, G, n)}.")
    problems: list[str] = []
    found = {}
    for name, given in layers.items():
        if not isinstance(name, str):
            raise ConventionError(f"validate: a layer's name must be a text; got {name!r:.60}.")
        found[name] = _layer(name, _parts(name, given), problems)
    stored = [one.stored[side] for one in found.values() for side in "AG" if side in one.stored]
    return Dump(
        program="memory",
        layers=found,
        holds={
            name: frozenset(k for k in ("n_A", "n_G", *AXES) if getattr(one, k) is not None)
            for name, one in found.items()
        },
        arithmetic=Arithmetic(stored=common(stored)),
        problems=tuple(problems),
    )


def _parts(name: str, given: Any) -> Mapping[str, Any]:
    """What is given of one layer, by what it is."""
    if isinstance(given, Mapping):
        for key in given:
            require_choice("validate", f"what is given of {name!r:.100}", key, [*AXES, *COUNTS])
        return given
    if isinstance(given, tuple | list) and len(given) == 3:
        return dict(zip(("A", "G", "n"), given, strict=True))
    long = f" of {len(given)}" if isinstance(given, tuple | list) else ""
    raise ConventionError(
        f"validate: {name!r:.100} must be (A, G, n), or a mapping with the keys A, G, n; got "
        f"{type(given).__name__}{long}."
    )


def _layer(name: str, parts: Mapping[str, Any], problems: list[str]) -> Theirs:
    arrays: dict[str, Array] = {}
    counts: dict[str, float | None] = {}
    dtypes: dict[str, str] = {}
    for key in COUNTS:
        if parts.get(key) is not None:
            number = count(f"{key} of {name!r:.100}", parts[key], problems)
            counts |= dict.fromkeys(("n_A", "n_G") if key == "n" else (key,), number)
    for key in AXES:
        if parts.get(key) is None:
            continue
        array = _array(f"{key} of {name!r:.100}", parts[key])
        if wrong := misfit(f"{key} of {name!r:.100}", key, array.shape):
            problems.append(wrong)
            continue
        dtypes[key] = array.dtype.name
        arrays[key] = array.astype(bool if key == "mask" else np.float64)
    given: dict[str, Any] = {**arrays, **counts}
    return Theirs(**given, stored=dtypes)


def _array(what: str, given: Any) -> Array:
    """`given` as real numbers; DTypeError for texts, objects, complex or masked entries."""
    if "bfloat16" in str(getattr(given, "dtype", "")):
        raise DTypeError(f"validate: {what} is bfloat16, which NumPy has not; give float32 of it.")
    array = as_array("validate", what, given, "an array of numbers")
    require_dtype("validate", what, array, "fiub", "real numbers")
    return array
