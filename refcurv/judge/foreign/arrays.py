"""Named arrays → a dump: LAYER/A, LAYER/G, LAYER/n, ... of an .npz, HDF5 or safetensors file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from refcurv.files import store
from refcurv.files.lazy import Lazy
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.dump import Dump, Theirs, first_names
from refcurv.judge.foreign.npz import open_npz
from refcurv.judge.foreign.stored import (
    AXES,
    FLOATS,
    Stored,
    common,
    count,
    misfit,
    numbers,
    tensors,
)
from refcurv.law.checks import Array, ConventionError, SchemaError, require_choice
from refcurv.law.conventions import Fisher, Rows
from refcurv.law.dtypes import require_float

COUNTS: Final = ("n", "n_A", "n_G")
DTYPES: Final = ("model_dtype", "products_dtype", "sums_dtype", "solver_dtype")
SCALARS: Final = ("fisher", "rows", "draws", *DTYPES)
"""What a file may say of itself: texts, and the number `draws`."""

_KEY: Final = re.compile(rf"(.+)[/.]({'|'.join([*AXES, *COUNTS])})", re.DOTALL)
_KNOWN: Final = f"LAYER/A, LAYER/G, LAYER/n, and {', '.join([*AXES, *COUNTS][2:])}"


def read_npz(path: Path) -> Dump:
    """An .npz file.

    Proof: tests/test_foreign.py::test_a_file_of_arrays_holds_what_was_put_in
    """
    return dump_of("npz", path, open_npz(path), {})


def read_tensors(path: Path) -> Dump:
    """A safetensors file; what the file says of itself may stand in its header."""
    return dump_of("safetensors", path, *tensors(path))


def read_hdf5(path: Path) -> Dump:
    """An HDF5 file that refcurv did not write."""
    return dump_of("hdf5", path, *_hdf5(path))


def _hdf5(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    inside, given = store.open_foreign(path, SCALARS)

    def of(inner: str, outline: store.Outline) -> Stored:
        return Stored(
            outline.dtype, outline.shape, lambda: store.read_foreign(path, inner, outline)
        )

    return {inner: of(inner, one) for inner, one in inside.items()}, given


def arrays_of(path: Path, kind: str) -> dict[str, Array]:
    """Every array of numbers in a file, by its name there; floats become float64.

    Args: kind, "npz", "hdf5", "safetensors" or refcurv's own "trace".
    """
    if kind in ("hdf5", "trace"):
        found = _hdf5(path)[0]
    else:
        found = open_npz(path) if kind == "npz" else tensors(path)[0]
    return {
        name: numbers(name, one) if one.dtype in FLOATS else one.read()
        for name, one in found.items()
        if one.numeric
    }


def dump_of(
    program: str, path: Path, arrays: Mapping[str, Stored], given: Mapping[str, Any]
) -> Dump:
    """The dump in named arrays; `given` is what the file says of itself beside them.

    Raises:
        SchemaError: no array is named LAYER/A or the like.
    """
    problems: list[str] = []
    parts, others = _by_layer(arrays, problems)
    says = {key: given[key] for key in SCALARS if key in given}
    says |= {key: _scalar(key, arrays[key], problems) for key in SCALARS if key in arrays}
    left = [key for key in others if key not in SCALARS]
    counts = {name: _counts(name, held, problems) for name, held in parts.items()}
    held = {name: _usable(name, one, problems) for name, one in parts.items()}
    held = {name: one for name, one in held.items() if one}
    if not held:
        why = f" {problems[0]}." if problems else ""
        raise SchemaError(
            f"validate: {str(path)!r} holds no array that is named {_KNOWN}; it holds "
            f"{first_names(arrays)}.{why}"
        )
    declared, arithmetic = _said(says, problems)
    dtypes = [one[side].dtype for one in held.values() for side in ("A", "G") if side in one]
    stored = common(dtypes or [array.dtype for one in held.values() for array in one.values()])
    return Dump(
        program=program,
        layers=Lazy(list(held), lambda name: _read(name, held[name], counts[name])),
        holds={name: frozenset(one) | frozenset(counts[name]) for name, one in held.items()},
        recipe=(f"left aside: {first_names(left)}",) if left else (),
        declared=declared,
        arithmetic=Arithmetic(**arithmetic, stored=stored),
        problems=tuple(problems),
        shapes={name: sides(one) for name, one in held.items()},
    )


def sides(held: Mapping[str, Stored]) -> tuple[int | None, int | None]:
    """(O, I) of a layer's arrays, as far as they tell."""
    wide = [held[key].shape[-1] for key in ("A", "U_A", "mu", "Lambda", "mask", "W") if key in held]
    high = [held[key].shape[0] for key in ("G", "U_G", "lam", "Lambda", "mask", "W") if key in held]
    return (high[0] if high else None), (wide[0] if wide else None)


def _by_layer(
    arrays: Mapping[str, Stored], problems: list[str]
) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """Layer → its arrays by what they are; and the names that are none of a layer."""
    parts: dict[str, dict[str, Stored]] = {}
    others = []
    for key, stored in arrays.items():
        found = _KEY.fullmatch(key)
        if found is None:
            others.append(key)
        elif not key.isprintable():
            problems.append(f"the name {key!r:.100} cannot be printed")
        elif found[2] in parts.setdefault(found[1], {}):
            problems.append(f"{found[2]} of {found[1]!r:.100} is there twice")
        else:
            parts[found[1]][found[2]] = stored
    return parts, others


def _usable(name: str, held: Mapping[str, Stored], problems: list[str]) -> dict[str, Stored]:
    """The arrays that hold real numbers along the right number of axes."""
    good = {}
    for key, stored in held.items():
        if key in COUNTS:
            continue
        if not stored.numeric:
            problems.append(f"{key} of {name!r:.100} is {stored.dtype}; real numbers are needed")
        elif wrong := misfit(f"{key} of {name!r:.100}", key, stored.shape):
            problems.append(wrong)
        else:
            good[key] = stored
    return good


def _counts(name: str, held: Mapping[str, Stored], problems: list[str]) -> dict[str, float]:
    """n_A and n_G; `n` is both where it stands alone."""
    found: dict[str, float] = {}
    for key in COUNTS:
        if key not in held:
            continue
        stored, what = held[key], f"{key} of {name!r:.100}"
        one = stored.numeric and stored.shape in ((), (1,))
        number = count(
            what, stored.read() if one else f"{stored.shape} of {stored.dtype}", problems
        )
        if number is not None:
            found |= dict.fromkeys(("n_A", "n_G") if key == "n" else (key,), number)
    return found


def _read(name: str, held: Mapping[str, Stored], counts: Mapping[str, float]) -> Theirs:
    arrays: dict[str, Array] = {
        key: numbers(f"{key} of {name!r:.100}", stored) for key, stored in held.items()
    }
    if "mask" in arrays:
        mask = arrays["mask"]
        if not ((mask == 0) | (mask == 1)).all():
            raise SchemaError(f"validate: mask of {name!r:.100} must be bool, or 0 and 1.")
        arrays["mask"] = mask == 1
    given: dict[str, Any] = {**arrays, **counts}
    return Theirs(**given, stored={key: stored.dtype for key, stored in held.items()})


# ------------------------------------------------------------------ what a file says of itself


def _scalar(key: str, stored: Stored, problems: list[str]) -> Any:
    """A text or a number; None, and a problem, for anything else."""
    if stored.shape in ((), (1,)) and (stored.numeric or stored.dtype == "text"):
        value = stored.read().reshape(-1)[0].item()
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    problems.append(f"{key} must be a text or a number; it is {stored.dtype}, {stored.shape}")
    return None


def _said(says: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`Dump.declared`, and the fields of `Dump.arithmetic`; what the law does not know is said."""
    choices: dict[str, Iterable[str]] = {"fisher": list(Fisher), "rows": list(Rows)}
    choices |= dict.fromkeys(DTYPES, ROUNDOFF)
    declared: dict[str, str] = {}
    for key, value in says.items():
        if value is None:
            continue
        if key == "draws":
            number = count("draws", _number(value), problems)
            if number is not None:
                declared[key] = str(int(number))
            continue
        try:
            require = require_float if key in DTYPES else require_choice
            declared[key] = require("the dump", key, value, choices[key])
        except ConventionError as error:
            problems.append(str(error).rstrip("."))
    arithmetic = {
        key.removesuffix("_dtype"): declared.pop(key) for key in DTYPES if key in declared
    }
    return declared, arithmetic


def _number(value: Any) -> Any:
    """A text of digits as the number that it is: headers hold texts alone."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value
