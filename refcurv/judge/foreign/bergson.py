"""bergson's folders: `activation_sharded` and the like, each with shard_0.safetensors, shard_1, ...

Each rank writes its rows of every matrix, rank 0 also what is left over, so that shards may be
uneven. The matrices are sums over positions, and `total_processed.pt` counts these. The solver
sorts eigenvalues upwards, with the eigenvectors as columns. `factor_eig_a` and `factor_eig_g` hold
the eigenvalues of the means times √(positions / documents), and Λ is a mean over documents. Older
versions stored the root of the positions, and a sum, as if there were one document. No file says
how many there are; the traces do.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.files.disk import reading
from refcurv.files.lazy import Lazy
from refcurv.files.paths import machine_faults
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign.stored import Stored, all_in, common, numbers, tensors
from refcurv.law.checks import Array, SchemaError
from refcurv.law.words import number_of

FOLDERS: Final = {
    "A": "activation_sharded",
    "G": "gradient_sharded",
    "U_A": "eigen_activation_sharded",
    "mu": "factor_eig_a",
    "U_G": "eigen_gradient_sharded",
    "lam": "factor_eig_g",
    "Lambda": "eigenvalue_correction_sharded",
}
"""Field → the folder of its shards. Every shard of `factor_eig_a` is the whole."""

_SHARD: Final = re.compile(r"shard_(\d{1,6})\.safetensors")
_ASKEW: Final = 0.02
"""|M − Mᵀ| / |M| above which rows are in the wrong order. Chosen: sums in bfloat16, the coarsest,
are askew by 0.004; rows of another shard change a matrix by its own size."""
_MOST_SHARDS: Final = 6  # all orders of which are tried, 720
_MOST_BYTES: Final = 1 << 16  # of config.yaml that are read

Parts = Mapping[str, Sequence[Stored]]
"""Field → the shards of its array, in the order of ranks."""


def is_bergson(folder: Path) -> bool:
    """Does the folder hold sums of bergson?"""
    return any((folder / name).is_dir() for name in FOLDERS.values() if "sharded" in name)


def read_bergson(folder: Path) -> Dump:
    """The dump in a folder of bergson's.

    Proof: tests/test_foreign.py::test_bergson, ::test_shards_out_of_order_are_named
    """
    problems: list[str] = []
    total = _total(folder / "total_processed.pt")
    if total is None:
        problems.append(
            "total_processed.pt is missing or unreadable: A and G are sums that cannot be divided, "
            "and eigenvalues are left out"
        )
    layers: dict[str, dict[str, list[Stored]]] = {}
    for key, name in FOLDERS.items():
        if total is None and key in ("mu", "lam", "Lambda"):
            continue
        for layer, shards in _shards(folder / name, problems).items():
            layers.setdefault(layer, {})[key] = shards[:1] if key == "mu" else shards
    for layer, parts in layers.items():
        _require_whole(layer, parts, problems)
    layers = {layer: parts for layer, parts in layers.items() if parts}
    if not layers:
        why = f" {problems[-1]}." if problems else ""
        raise SchemaError(f"validate: {str(folder)!r} holds no layer of bergson.{why}")
    _require_order(layers, problems)
    declared, stored = _choices(folder, problems), _dtypes(layers)
    documents, told = _documents(layers, total, problems)
    if documents is None:
        declared["Lambda_over"] = "unknown"
    known = {"n_A": "A", "n_G": "G"} if total else {}
    return Dump(
        program="bergson",
        layers=Lazy(list(layers), lambda name: _theirs(name, layers[name], total, documents)),
        holds={
            name: frozenset(one) | {n for n, key in known.items() if key in one}
            for name, one in layers.items()
        },
        recipe=(*_RECIPE, told),
        scale_free=frozenset() if total else frozenset({"A", "G"}),
        declared=declared,
        arithmetic=Arithmetic(None, stored.products, stored.sums, "float64", stored.stored),
        problems=tuple(problems),
        shapes={name: _shape(one) for name, one in layers.items()},
    )


_RECIPE: Final = (
    "A and G: the rows of all ranks joined, over total_processed",
    "eigenvalues: factor_eig over √(total_processed / documents), turned round like the "
    "eigenvectors (columns): theirs ascend",
    "Lambda (d_out, d_in): a mean over documents of the square of each one's gradient; times "
    "documents over total_processed, which counts positions; turned round like the eigenvectors",
)
_ASTRAY: Final = 0.02
"""How far from a whole number the documents may be.  Chosen: traces in bfloat16 are off by 0.004,
and the documents by twice as much."""


def _documents(
    layers: Mapping[str, Parts], total: float | None, problems: list[str]
) -> tuple[float | None, str]:
    """How many documents Λ is a mean over, and what is said of it; None if nothing tells.

    Σ factor_eig is √(total / documents) times the trace of the mean. The smallest matrix is read.
    """
    found = [
        (one[side][0].shape[1], name, side, values)
        for name, one in layers.items()
        for side, values in (("A", "mu"), ("G", "lam"))
        if side in one and values in one
    ]
    if total is None or not found:
        return None, "documents: no file tells, so that the scale of Lambda is unknown"
    _, name, side, values = min(found)
    matrix, eigenvalues = (
        np.concatenate([numbers(f"{key} of {name!r:.100}", one) for one in layers[name][key]])
        for key in (side, values)
    )
    root = float(eigenvalues.sum()) * total / float(np.trace(matrix) or np.nan)
    documents = total / root**2 if root > 0 else math.nan
    whole = max(round(documents), 1) if math.isfinite(documents) else 1
    if not abs(documents / whole - 1) <= _ASTRAY:
        problems.append(
            f"{FOLDERS[values]}: the eigenvalues of {name!r:.100} are not those of {side}: they "
            f"would tell {number_of(documents, 'document')}"
        )
        return None, "documents: no whole number, so that the scale of Lambda is unknown"
    if whole == 1:
        text = "documents: 1, or an older layout, whose Lambda is a sum"
    else:
        text = f"documents: {whole}"
    return float(whole), f"{text}; inferred: Σ {FOLDERS[values]} is {root:.6g} times tr {side}"


def _shape(parts: Parts) -> tuple[int | None, int | None]:
    high, wide = (
        next((parts[key][0].shape[-1] for key in keys if key in parts), None)
        for keys in (("G", "U_G"), ("A", "U_A", "Lambda"))
    )
    return high, wide


def _theirs(name: str, parts: Parts, total: float | None, documents: float | None) -> Theirs:
    n = total or 1.0
    given: dict[str, Any] = {}
    for key, shards in parts.items():
        X = np.concatenate([numbers(f"{key} of {name!r:.100}", one) for one in shards])
        if key in ("A", "G"):
            given[key] = X / n
        elif key == "Lambda":
            given[key] = X[::-1, ::-1] * ((documents or n) / n)
        else:
            root = math.sqrt(n / (documents or 1.0)) if key in ("mu", "lam") else 1.0
            given[key] = X[..., ::-1] / root
    given |= {f"n_{key}": total for key in ("A", "G") if key in parts}
    return Theirs(**given, stored={key: one[0].dtype for key, one in parts.items()})


# ------------------------------------------------------------------ shards


def _shards(folder: Path, problems: list[str]) -> dict[str, list[Stored]]:
    """Layer → its array's shards in the order of ranks, of those that are there."""
    if not folder.is_dir():
        return {}
    with machine_faults("validate", folder):
        named = {int(m[1]): p for p in folder.iterdir() if (m := _SHARD.fullmatch(p.name))}
    ranks = sorted(named)
    missing = [k for k in range(ranks[-1] + 1 if ranks else 1) if k not in named][:4]
    if missing:
        which = ", ".join(f"shard_{k}.safetensors" for k in missing)
        problems.append(f"{folder.name}: {which} missing")
    out: dict[str, list[Stored]] = {}
    for rank in ranks:
        for name, one in tensors(named[rank])[0].items():
            if one.numeric and len(one.shape) in (1, 2) and name.isprintable():
                out.setdefault(name, []).append(one)
            else:
                problems.append(f"{folder.name}: {name!r:.100} of shard {rank} is no matrix")
    for name, shards in list(out.items()):
        if len(shards) != len(ranks) or len({one.shape[1:] for one in shards}) > 1:
            problems.append(f"{folder.name}: the shards of {name!r:.100} do not fit one another")
            del out[name]
    return out


def _require_whole(name: str, parts: dict[str, list[Stored]], problems: list[str]) -> None:
    """Take out arrays whose rows are too few or too many, or that have another number of axes."""
    for key, shards in list(parts.items()):
        axes = 1 if key in ("mu", "lam") else 2
        rows = sum(one.shape[0] for one in shards)
        square = key in ("A", "G", "U_A", "U_G")
        if len(shards[0].shape) != axes:
            problems.append(f"{FOLDERS[key]}: {name!r:.100} is {shards[0].shape}")
        elif square and rows != shards[0].shape[1]:
            problems.append(
                f"{FOLDERS[key]}: the {number_of(len(shards), 'shard')} of {name!r:.100} have "
                f"{number_of(rows, 'row')} of "
                f"{shards[0].shape[1]}; a shard is missing, or there twice"
            )
        else:
            continue
        del parts[key]


def _require_order(layers: Mapping[str, Parts], problems: list[str]) -> None:
    """Say so where the smallest sum is symmetric only in another order of its shards."""
    for key in ("A", "G"):
        split = {name: one[key] for name, one in layers.items() if len(one.get(key, ())) > 1}
        if not split:
            continue
        name = min(split, key=lambda layer: split[layer][0].shape[1])
        shards = [numbers(f"{key} of {name!r:.100}", one) for one in split[name]]
        if _askew(shards) <= _ASKEW:
            continue
        every = permutations(range(len(shards))) if len(shards) <= _MOST_SHARDS else ()
        right = [order for order in every if _askew([shards[k] for k in order]) <= _ASKEW]
        what = f"in the order {', '.join(map(str, right[0]))} they are" if right else "a sum is"
        problems.append(
            f"{FOLDERS[key]}: the rows of {name!r:.100}, in the order of the shards' names, are "
            f"not symmetric; {what}. Were shards renamed, or of different runs?"
        )


def _askew(shards: Sequence[Array]) -> float:
    M = np.concatenate(shards)
    size = float(norm(M))
    return float(norm(M - M.T)) / size if size else 0.0


def _dtypes(layers: Mapping[str, Parts]) -> Arithmetic:
    """bergson adds in the dtype that it stores (`hessian_dtype`)."""
    every = {one[key][0].dtype for one in layers.values() for key in ("A", "G") if key in one}
    return all_in("float64" if every == {"float64"} else common(every))


# ------------------------------------------------------------------ beside the shards


def _total(path: Path) -> float | None:
    """The count in `total_processed.pt`: a zip with one storage of eight bytes, an int64.

    The pickle beside it says no more than that, and is not read.
    """
    try:
        with reading("validate", path) as opened, zipfile.ZipFile(opened) as file:
            storages = [i for i in file.infolist() if re.fullmatch(r".+/data/\d+", i.filename)]
            orders = [i for i in file.infolist() if i.filename.endswith("/byteorder")]
            big = any(i.file_size == 3 and file.read(i) == b"big" for i in orders)
            if len(storages) != 1 or storages[0].file_size != 8:
                return None
            number = int.from_bytes(file.read(storages[0]), "big" if big else "little")
    except (
        zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError,
        NotImplementedError,
    ):  # fmt: skip
        return None
    return float(number) if 1 <= number < 2**53 else None


def _choices(folder: Path, problems: list[str]) -> dict[str, str]:
    """What config.yaml says, of the few lines that matter here."""
    path, declared = folder / "config.yaml", {"Lambda": "sequence", "Lambda_over": "rows"}
    if not path.is_file():
        return declared
    with reading("validate", path) as file:
        text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    found = dict(re.findall(r"(?m)^[ \t]*(\w+):[ \t]*([\w.]+)[ \t]*$", text))
    labels = {"true": "empirical", "false": "sampled"}.get(found.get("use_dataset_labels", ""))
    bias = {"true": "joint", "false": "separate"}.get(found.get("include_bias", ""))
    declared |= {k: v for k, v in (("fisher", labels), ("bias", bias)) if v}
    method = found.get("method", "kfac")
    if method != "kfac":
        problems.append(f"config.yaml: the method is {method}, whose sums are not A and G of K-FAC")
    return declared
