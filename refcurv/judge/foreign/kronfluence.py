"""kronfluence's folders `factors_NAME`: one safetensors file for each kind of factor.

Its files hold sums and counts, so that a mean is one division. Partitions of the data are summed,
those of the modules joined. It appends a column of ones, the last, to A of a layer with a bias. Its
solver sorts eigenvalues upwards, with the eigenvectors as columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, Final

from refcurv.files.disk import parse_json, reading
from refcurv.files.lazy import Lazy
from refcurv.files.paths import machine_faults
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign.stored import Stored, common, count, misfit, numbers, tensors
from refcurv.law.checks import Array, RefcurvError, SchemaError

SUMS: Final = {
    "A": ("activation_covariance", "num_activation_covariance_processed"),
    "G": ("gradient_covariance", "num_gradient_covariance_processed"),
    "Lambda": ("lambda_matrix", "num_lambda_processed"),
}
"""Field → the kinds of files of its sum and of its count."""

BASES: Final = {
    "U_A": "activation_eigenvectors",
    "mu": "activation_eigenvalues",
    "U_G": "gradient_eigenvectors",
    "lam": "gradient_eigenvalues",
}
_ARGUMENTS: Final = "factor_arguments.json"
_PARTITION: Final = re.compile(r"(\w+?)_data_partition(\d{1,6})_module_partition(\d{1,6})")
_MOST: Final = 10_000_000  # bytes of the arguments


@dataclass(slots=True)
class _Folder:
    """What is in the folder: kind → (data, module partition) → tensors; () where there are none."""

    path: Path
    files: dict[str, dict[tuple[int, ...], dict[str, Stored]]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def is_kronfluence(folder: Path) -> bool:
    """Does the folder hold factors of kronfluence?"""
    kinds = "|".join([*(kind for pair in SUMS.values() for kind in pair), *BASES.values()])
    return any(re.match(rf"({kinds})(_data_p.*)?\.safetensors$", f.name) for f in folder.iterdir())


def read_kronfluence(folder: Path) -> Dump:
    """The dump in a folder `factors_NAME`.

    Proof: tests/test_foreign.py::test_kronfluence, ::test_a_missing_partition_is_named
    """
    found = _open(folder)
    problems = found.problems
    layers: dict[str, dict[str, tuple[list[Stored], float | None]]] = {}
    for key, (kind, number) in SUMS.items():
        parts, counts = _joined(found, kind), _joined(found, number)
        for name, pieces in parts.items():
            if wrong := misfit(f"{kind} of {name!r:.100}", key, pieces[0].shape):
                problems.append(wrong)
                continue
            rows = _count(f"{number} of {name!r:.100}", counts.get(name), problems)
            layers.setdefault(name, {})[key] = (pieces, rows)
    for key, kind in BASES.items():
        for name, pieces in _joined(found, kind).items():
            if wrong := misfit(f"{kind} of {name!r:.100}", key, pieces[0].shape):
                problems.append(wrong)
            else:
                layers.setdefault(name, {})[key] = (pieces, None)
    if not layers:
        why = f" {problems[0]}." if problems else ""
        raise SchemaError(f"validate: {str(folder)!r} holds no layer of kronfluence.{why}")
    declared, arithmetic = _choices(found, layers)
    return Dump(
        program="kronfluence",
        layers=Lazy(list(layers), lambda name: _theirs(name, layers[name])),
        holds={name: _holds(one) for name, one in layers.items()},
        recipe=_RECIPE,
        declared=declared,
        arithmetic=arithmetic,
        problems=tuple(problems),
        shapes={name: _shape(one) for name, one in layers.items()},
    )


_RECIPE: Final = (
    "A and G: the sums over their counts; partitions of the data are summed in float64",
    "eigenvalues and eigenvectors (columns) are turned round: theirs ascend",
    "Lambda (d_out, d_in): the sum over num_lambda_processed, which counts sequences; its rows and "
    "columns are turned round like the eigenvectors",
    "A of a layer with a bias has a last row and column for the bias",
)

_Parts = Mapping[str, tuple[list[Stored], float | None]]


def _holds(parts: _Parts) -> frozenset[str]:
    counts = {f"n_{key}" for key in ("A", "G") if key in parts and parts[key][1] is not None}
    return frozenset(key for key in parts if key in BASES or parts[key][1] is not None) | counts


def _shape(parts: _Parts) -> tuple[int | None, int | None]:
    high, wide = (
        next((parts[key][0][0].shape[axis] for key in keys if key in parts), None)
        for keys, axis in ((("G", "U_G", "lam", "Lambda"), 0), (("A", "U_A", "mu", "Lambda"), -1))
    )
    return high, wide


def _theirs(name: str, parts: _Parts) -> Theirs:
    given: dict[str, Any] = {}
    for key, (pieces, rows) in parts.items():
        what = f"{key} of {name!r:.100}"
        if key in BASES:
            given[key] = numbers(what, pieces[0])[..., ::-1]
        elif rows is not None:
            total: Array = numbers(what, pieces[0])
            for piece in pieces[1:]:
                total = total + numbers(what, piece)
            given[key] = total[::-1, ::-1] / rows if key == "Lambda" else total / rows
            if key != "Lambda":
                given[f"n_{key}"] = rows
    return Theirs(**given, stored={key: pieces[0].dtype for key, (pieces, _) in parts.items()})


# ------------------------------------------------------------------ files


def _open(folder: Path) -> _Folder:
    """The headers of all files, and the arguments that they were made by."""
    found = _Folder(folder)
    kinds = {kind for pair in SUMS.values() for kind in pair} | set(BASES.values())
    texts: dict[str, str] = {}
    with machine_faults("validate", folder):
        paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        split = _PARTITION.fullmatch(path.stem)
        kind, at = (split[1], (int(split[2]), int(split[3]))) if split else (path.stem, ())
        if kind not in kinds:
            continue
        held, said = tensors(path)
        good = {name: one for name, one in held.items() if one.numeric and name.isprintable()}
        if len(good) < len(held):
            found.problems.append(f"{path.name} holds what is no array of real numbers")
        found.files.setdefault(kind, {})[at] = good
        texts = texts or said
    found.arguments = _arguments(folder / _ARGUMENTS, texts, found.problems)
    for kind in sorted(found.files):
        _require_all(found, kind)
    return found


def _arguments(path: Path, texts: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """The arguments: of their JSON, or else of a header, where all are texts."""
    try:
        if path.is_file():
            with reading("validate", path) as file:
                return parse_json(f"validate: {_ARGUMENTS}", file.read(_MOST))
    except RefcurvError as error:
        problems.append(str(error).removeprefix("validate: ").rstrip("."))
    return dict(texts)


def _require_all(found: _Folder, kind: str) -> None:
    """Name the partitions that are missing: promised by the arguments, or left out in counting."""
    have = found.files[kind]
    if () in have:  # joined by kronfluence itself
        return
    which = "lambda" if "lambda" in kind else "covariance"
    lengths = [
        max(1 + max(at[axis] for at in have), _natural(found.arguments.get(f"{which}_{name}")))
        for axis, name in enumerate(("data_partitions", "module_partitions"))
    ]
    wanted = product(*map(range, lengths))
    absent = (f"_data_partition{i}_module_partition{j}" for i, j in wanted if (i, j) not in have)
    missing, more = list(islice(absent, 4)), lengths[0] * lengths[1] - len(have) - 4
    if missing:
        few = ", ".join(missing) + (f" and {more} more" if more > 0 else "")
        found.problems.append(f"{kind}: {few} missing; the sum is over a part of the data")


def _natural(value: object) -> int:
    text = str(value)
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 1


def _joined(found: _Folder, kind: str) -> dict[str, list[Stored]]:
    """Layer → the summands of its array: modules are joined, data partitions listed."""
    have = found.files.get(kind, {})
    if () in have:
        return {name: [one] for name, one in have[()].items()}
    out: dict[str, list[Stored]] = {}
    for at in sorted(have):
        for name, one in have[at].items():
            out.setdefault(name, []).append(one)
    for name, pieces in out.items():
        if len({piece.shape for piece in pieces}) > 1:
            raise SchemaError(
                f"validate: {kind} of {name!r:.100} has other shapes in other data partitions: "
                f"{', '.join(str(piece.shape) for piece in pieces[:4])}."
            )
    data = len({at[0] for at in have})
    short = [name for name, pieces in out.items() if len(pieces) != data]
    if short and len(have) % data == 0:
        found.problems.append(f"{kind}: {short[0]!r:.100} is not in all {data} data partitions")
    return out


def _count(what: str, pieces: Sequence[Stored] | None, problems: list[str]) -> float | None:
    if pieces is None:
        problems.append(f"{what} is missing, so that its sum cannot be divided")
        return None
    if any(piece.shape not in ((), (1,)) for piece in pieces):
        return count(what, f"of shape {pieces[0].shape}", problems)
    return count(what, float(sum(piece.read().reshape(-1)[0] for piece in pieces)), problems)


# ------------------------------------------------------------------ arguments


def _choices(found: _Folder, layers: Mapping[str, _Parts]) -> tuple[dict[str, str], Arithmetic]:
    """What the arguments declare, in our words; the sums' dtype is that of the files."""
    at = found.arguments
    declared = {"bias": "joint", "Lambda": "sequence", "Lambda_over": "sequences"}
    label = str(at.get("use_empirical_fisher", "")).lower()
    if label in ("true", "false"):
        declared["fisher"] = "empirical" if label == "true" else "sampled"
    dtypes = {one[side][0][0].dtype for one in layers.values() for side in "AG" if side in one}
    given = [_dtype(at.get(f"{side}_covariance_dtype")) for side in ("activation", "gradient")]
    sums = {one for one in given if one} if all(given) else dtypes & set(ROUNDOFF)
    coarse = max(sums, key=lambda dtype: ROUNDOFF[dtype], default=None)
    solver = _dtype(at.get("eigendecomposition_dtype"))
    model = _dtype(at.get("amp_dtype"))
    return declared, Arithmetic(model, coarse, coarse, solver, common(dtypes))


def _dtype(value: object) -> str | None:
    name = str(value).removeprefix("torch.")
    return name if name in ROUNDOFF else None
