"""What a file of torch.save holds, as layers: a user's own dictionaries, whatever their form.

{layer: {A, G, n}}, {layer: (A, G, n)}, {"A": {layer: A}, "G": {layer: G}} and {"layer.A": A} are
read alike. `SPELLINGS` are the keys that are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.files.lazy import Lazy
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign.archive import Saved, open_saved, read
from refcurv.judge.foreign.pickles import Tensor
from refcurv.judge.foreign.stored import misfit
from refcurv.law.checks import SchemaError
from refcurv.law.words import number_of

SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "A": ("A", "a", "aa", "A_cov", "cov_A", "activation_covariance", "input_covariance"),
    "G": ("G", "g", "gg", "G_cov", "cov_G", "gradient_covariance", "output_covariance"),
    "sum_A": ("sum_A", "S_A", "A_sum"),
    "sum_G": ("sum_G", "S_G", "G_sum"),
    "n": ("n", "N", "n_tokens", "num_tokens", "n_rows", "rows", "count", "num_samples"),
    "n_A": ("n_A", "n_a", "num_activation_covariance_processed"),
    "n_G": ("n_G", "n_g", "num_gradient_covariance_processed"),
    **{name: (name,) for name in ("U_A", "mu", "U_G", "lam", "Lambda", "mask", "W")},
}
"""What a layer may hold → the keys by which it is known."""

_MEANING: Final = {key: meaning for meaning, keys in SPELLINGS.items() for key in keys}
_COUNTS: Final = ("n", "n_A", "n_G")
_FEW: Final = 5
"""How many of the keys that mean nothing here are named."""
_MOST: Final = 100
"""How many problems are told. Chosen: a hostile file has as many as it likes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer holds, by meaning (a key of SPELLINGS), and the file where it lies."""

    saved: Saved
    entry: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """The layers of some files.

    Fields: layers, by name; problems, a sentence for each; left, keys that mean nothing here.
    """

    layers: dict[str, Layer]
    problems: list[str]
    left: list[str]


def gather(files: Iterable[Path]) -> Found:
    """The layers of all these files; no tensor is read yet.

    Raises:
        SchemaError: as `open_saved`; a file without a layer, or one layer in two files.
    """
    found = Found({}, [], [])
    for file in files:
        for name, layer in _layers(open_saved(file), found).items():
            if name in found.layers:
                both = f"{found.layers[name].saved.path.name!r:.200} and {file.name!r:.200}"
                raise SchemaError(f"validate: layer {name!r:.80} is in both {both}.")
            found.layers[name] = layer
    return found


def dump_of(
    found: Found,
    program: str = "torch",
    recipe: tuple[str, ...] = ("A and G are means as they stand; sums are over their counts.",),
    *,
    scale_free: frozenset[str] = frozenset(),
    declared: Mapping[str, str] | None = None,
) -> Dump:
    """The layers as a dump; each is read when it is asked for."""
    if found.left:
        more = " and others" if len(found.left) > _FEW else ""
        names = ", ".join(f"{name!r:.60}" for name in found.left[:_FEW])
        recipe = (*recipe, f"Left aside: {names}{more}.")
    unsaid = len(found.problems) - _MOST
    problems = found.problems[:_MOST] + (
        [f"and {number_of(unsaid, 'more problem')}"] if unsaid > 0 else []
    )
    layers = found.layers
    return Dump(
        program=program,
        layers=Lazy(list(layers), lambda name: _theirs(name, layers[name])),
        holds={name: frozenset(_fields(layer.entry)) for name, layer in layers.items()},
        recipe=recipe,
        scale_free=scale_free,
        declared=declared or {},
        arithmetic=Arithmetic(stored=_stored(layers.values())),
        problems=tuple(problems),
        shapes={name: _shape(layer.entry) for name, layer in layers.items()},
    )


# ------------------------------------------------------------------ the forms of a file


def _layers(saved: Saved, found: Found) -> dict[str, Layer]:
    """The layers of a file. What is meant for one and cannot be read is a problem."""
    where = f"validate: {str(saved.path)!r:.200}"
    if not isinstance(saved.value, dict):
        raise SchemaError(f"{where} holds a {type(saved.value).__name__}; a dictionary is needed.")
    layers: dict[str, Layer] = {}
    for name, given in _by_layer(saved.value, found.left).items():
        entry, wrong = _entry(saved, name, given)
        if not name.isprintable():
            found.problems.append(f"the name {name!r:.100} cannot be printed")
        elif entry.keys() - _COUNTS:
            layers[name] = Layer(saved, entry)
            found.problems.extend(wrong)
        elif given.keys() & {"A", "G"}:
            found.problems.extend(wrong)
    if not layers:
        why = f" {found.problems[0]}." if found.problems else ""
        keys = ", ".join(f"{key!r:.40}" for key in islice(saved.value, 4)) or "none"
        raise SchemaError(
            f"{where} holds no factors; its keys are {keys}.{why} Save {{layer: {{'A': A, 'G': G, "
            "'n': n}}."
        )
    return layers


def _by_layer(given: Mapping[str, Any], left: list[str]) -> dict[str, dict[str, Any]]:
    """Layer → {key of SPELLINGS: value}, whichever of the four forms it has."""
    found: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    unknown: Iterator[str]
    for name, value in given.items():
        layer, _, key = re.sub(r"/(?=[^/]*$)", ".", name).rpartition(".")
        if isinstance(value, dict):
            known = {k: value[k] for k in _MEANING if k in value}
            if name in _MEANING and not known:  # {"A": {layer: A}}
                for of, part in value.items():
                    found.setdefault(of, {})[name] = part
                continue
            found.setdefault(name, {}).update(known)
            unknown = (f"{name}.{k}" for k in value if k not in known) if known else iter([name])
        elif isinstance(value, tuple | list) and any(isinstance(X, Tensor) for X in value[:2]):
            found.setdefault(name, {}).update(zip(("A", "G", "n"), value, strict=False))
            unknown = (f"{name}[{k}]" for k in range(3, len(value)))
        elif layer and key in _MEANING:
            found.setdefault(layer, {})[key] = value
            unknown = iter([])
        else:  # a count of all layers, or nothing that is known
            common |= {name: value} if _MEANING.get(name) in _COUNTS else {}
            unknown = iter([] if name in common else [name])
        left += islice(unknown, max(0, _FEW + 1 - len(left)))
    return {layer: common | entry for layer, entry in found.items()}


def _entry(saved: Saved, name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What one layer holds, by meaning, and what of it cannot be read."""
    entry: dict[str, Any] = {}
    wrong = []
    for key, part in given.items():
        meaning, what = _MEANING[key], f"{key} of {name!r:.80}"
        if part is None:
            continue
        if meaning in entry:
            wrong.append(f"{what} says again what {meaning} is")
        elif meaning not in _COUNTS and not isinstance(part, Tensor):
            wrong.append(f"{what} is a {type(part).__name__}, not a tensor")
        elif meaning not in _COUNTS:
            if misfits := misfit(what, meaning.removeprefix("sum_"), part.shape):
                wrong.append(misfits)
            else:
                entry[meaning] = part
        elif (count := _count(saved, part)) is not None:
            entry[meaning] = count
        else:
            wrong.append(f"{what} is no number of rows")
    for side in ("A", "G"):
        if f"sum_{side}" in entry and not entry.keys() & {"n", f"n_{side}"}:
            wrong.append(f"sum_{side} of {name!r:.80} has no count, and is taken as it stands")
    return entry, wrong


def _count(saved: Saved, value: Any) -> float | None:
    """A number of rows, of a number or of a tensor with one entry; None for anything else."""
    if isinstance(value, Tensor) and math.prod(value.shape) == 1:
        value = read(saved, value).item()
    whole = type(value) in (int, float) and 1 <= value < 1e18 and value == int(value)
    return float(value) if whole else None


# ------------------------------------------------------------------ what a layer holds


def _fields(entry: Mapping[str, Any]) -> set[str]:
    """The fields of `Theirs` that an entry fills."""
    have = {name.removeprefix("sum_") for name in entry if name != "n"}
    return have | ({"n_A", "n_G"} if "n" in entry else set())


def _shape(entry: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(O, I), as far as the tensors tell."""
    wide = [entry[key].shape for key in ("A", "sum_A", "U_A", "Lambda", "W") if key in entry]
    high = [entry[key].shape for key in ("G", "sum_G", "U_G", "Lambda", "W") if key in entry]
    return (high[0][0] if high and high[0] else None), (wide[0][-1] if wide and wide[0] else None)


def _theirs(name: str, layer: Layer) -> Theirs:
    """The tensors of a layer, read now, in float64."""
    entry = layer.entry
    counts = {side: entry.get(f"n_{side}", entry.get("n")) for side in ("A", "G")}
    tensors = {key: part for key, part in entry.items() if isinstance(part, Tensor)}
    arrays: dict[str, Any] = {
        key: read(layer.saved, tensor).astype(np.float64) for key, tensor in tensors.items()
    }
    for side in ("A", "G"):
        if (total := arrays.pop(f"sum_{side}", None)) is not None:
            arrays.setdefault(side, total / (counts[side] or 1.0))
    if "mask" in arrays:
        if not np.isin(arrays["mask"], (0, 1)).all():
            raise SchemaError(f"validate: mask of {name!r:.80} must be bool, or 0 and 1.")
        arrays["mask"] = arrays["mask"] == 1
    stored = {key.removeprefix("sum_"): tensor.dtype for key, tensor in tensors.items()}
    return Theirs(n_A=counts["A"], n_G=counts["G"], stored=stored, **arrays)


def _stored(layers: Iterable[Layer]) -> str | None:
    """The dtype of every tensor, where they have one and it is shorter than float64."""
    parts = [part for layer in layers for part in layer.entry.values()]
    dtypes = {part.dtype for part in parts if isinstance(part, Tensor)} - {"bool"}
    short = dtypes & {"float32", "float16", "bfloat16"}
    return short.pop() if len(dtypes) == 1 and short else None
