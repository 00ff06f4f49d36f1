"""What the tensors of a checkpoint are called, and which of our parameters they hold.

A family has one published name for each tensor. A checkpoint may differ from it in three ways: a
wrapper has put a prefix before every name, the base model's own prefix is missing, or the names
are those that the model has in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from refcurv.files import safetensors, weights
from refcurv.files.families import BUFFERS, Family
from refcurv.files.mistaken import require_plain_tensors
from refcurv.files.safetensors import Tensor
from refcurv.files.slots import Form, Slot, tensor_shape
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.model.config import ModelConfig

Tensors = dict[str, tuple[Slot, tuple[str, ...]]]
"""The checkpoint's name of a tensor → its slot, and the names of our parameters in it."""

_WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that torch wraps around others, at any depth."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: it is part `index` of a tensor, whose parts are `ours`."""

    tensor: Tensor
    slot: Slot
    ours: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every parameter comes from, in file order, and which tensors are no parameters.

    `renamed` is a sentence about what was left out of all names, or empty.
    """

    sources: dict[str, Source]
    ignored: tuple[Tensor, ...]
    renamed: str


def tensors_of(family: Family, config: ModelConfig) -> Tensors:
    """Every tensor that a checkpoint of this family and configuration has."""
    shapes = config.parameter_shapes()
    found: Tensors = {}
    for slot in family.slots:
        for block in map(str, range(config.layers)) if "*" in slot.theirs else ("",):
            for kind in ("weight", "bias"):
                ours = tuple(f"{name.replace('*', block)}.{kind}" for name in slot.ours)
                if not all(name in shapes for name in ours):
                    continue
                suffix = "" if slot.form is Form.BARE else f".{kind}"
                found[slot.theirs.replace("*", block) + suffix] = (slot, ours)
    named = {name for _, ours in found.values() for name in ours}
    assert named == set(shapes), f"{family.model_type}: no name for {set(shapes) - named}"
    return found


# ------------------------------------------------------------------ names


def whole(family: Family, names: Iterable[str]) -> dict[str, str]:
    """A checkpoint's names → the same with the family's prefix, where a base model's lack it."""
    names = list(names)
    if any(name.startswith(family.prefix) for name in names):
        return {name: name for name in names}
    heads = _heads(family)
    return {n: n if n.rpartition(".")[0] in heads else family.prefix + n for n in names}


def published(
    family: Family, wanted: Iterable[str], names: Iterable[str]
) -> tuple[dict[str, str], str]:
    """A checkpoint's names → the family's own, and a sentence about what was left out of them.

    The names are read in several ways: as they are, and without the leading parts that all of them
    share. In each way torch's wrappers are left out, the names in memory are replaced by the
    published ones, and the family's prefix is added where it is missing. The way that finds most
    of the `wanted` names counts; of equals, the first.
    """
    plain = {name: _unwrapped(name) for name in names}
    wrappers = sorted({part for name in names for part in name.split(".") if part in _WRAPPERS})
    shared = _shared_parts(
        [n for n in plain.values() if n.rpartition(".")[0] not in _heads(family)]
    )
    aim, most, prefix = set(wanted), -1, ""
    best: dict[str, str] = {}
    for count in range(len(shared) + 1):
        start = "".join(f"{part}." for part in shared[:count])
        bare = {name: n.removeprefix(start) for name, n in plain.items()}
        full = whole(family, bare.values())
        found = {name: _as_published(family, full[n]) for name, n in bare.items()}
        hits = len(aim & set(found.values()))
        if hits > most:
            best, most, prefix = found, hits, start
    parts = [f"{prefix!r:.80} before the names"] if prefix else []
    parts += [f"{wrapper!r} within names" for wrapper in wrappers]
    return best, f"left out {' and '.join(parts)}" if parts else ""


def _heads(family: Family) -> set[str]:
    named = {slot.theirs for slot in family.slots if slot.ours == ("head",)}
    return named | {mine for mine, theirs in family.in_memory.items() if theirs in named}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _shared_parts(names: list[str]) -> list[str]:
    """The first dotted parts that all names have, eight at most, never a whole name."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1][:8] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _as_published(family: Family, name: str) -> str:
    module, dot, kind = name.rpartition(".")
    for mine, theirs in family.in_memory.items():
        pattern = re.escape(mine).replace(r"\*", r"(\d+)")
        if match := re.fullmatch(pattern, module):
            return theirs.replace("*", match[1] if match.groups() else "") + dot + kind
    return name


# ------------------------------------------------------------------ the plan


def plan(where: str, family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Plan:
    """Parameter → source. Each must be there in its shape, and no tensor that matters be left."""
    wanted = tensors_of(family, config)
    names, renamed = published(family, wanted, tensors)
    found = _by_published_name(where, names, tensors)
    head = next(slot.theirs for slot in family.slots if slot.ours == ("head",)) + ".weight"
    if config.tied and head in found:  # one tensor, stored under its other name
        embed = next(theirs for theirs, (_, ours) in wanted.items() if ours == ("embed.weight",))
        found.setdefault(embed, found[head])
    patterns = (*BUFFERS, *family.ignored)
    strange = [
        name
        for name in found
        if name not in wanted
        and not (name == head and config.tied)
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    require_plain_tensors(where, strange)
    sources = _sources(where, config, wanted, found)
    if strange:
        raise SchemaError(
            f"{where} holds a tensor {found[strange[0]].name!r:.200} that a {family.model_type} of "
            "this config.json has not."
        )
    if config.tied and head in found:
        _require_same(where, found[head], sources["embed.weight"].tensor)
    taken = {source.tensor.name for source in sources.values()}
    ignored = tuple(tensor for tensor in tensors.values() if tensor.name not in taken)
    return Plan(sources, ignored, renamed)


def _sources(
    where: str, config: ModelConfig, wanted: Tensors, found: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Where each parameter comes from, in file order."""
    shapes = config.parameter_shapes()
    sources: dict[str, Source] = {}
    for theirs, (slot, ours) in wanted.items():
        tensor = found.get(theirs)
        if tensor is None:
            raise SchemaError(
                f"{where} lacks the tensor {theirs!r} ({', '.join(ours)}).{_hint(ours)}"
            )
        _require_readable(
            where, tensor, tensor_shape(slot, config, [shapes[name] for name in ours])
        )
        sources |= {name: Source(tensor, slot, ours, i) for i, name in enumerate(ours)}
    return {name: sources[name] for name in shapes}


def _by_published_name(
    where: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, theirs in names.items():
        if theirs in found:
            raise SchemaError(
                f"{where} holds a tensor {name!r:.120} and {found[theirs].name!r:.120}, two "
                f"names of one and the same. Remove one."
            )
        found[theirs] = tensors[name]
    return found


def _require_readable(where: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise SchemaError(
            f"{where}: tensor {tensor.name!r:.200} has shape {tensor.shape}; config.json asks "
            f"for {shape}.{'' if tensor.shape != (0,) else _PARTITIONED}"
        )
    if tensor.stored not in weights.STORED:
        raise SchemaError(
            f"convert: {str(tensor.path)!r}: tensor {tensor.name!r:.200} is of type "
            f"{tensor.stored!r}; parameters are "
            f"{', '.join(weights.STORED)}. A quantised checkpoint must be dequantised first."
        )


_PARTITIONED: Final = (
    " It is empty: a model that DeepSpeed's ZeRO-3 had partitioned was saved. Gather it first, "
    "with zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save."
)


def _hint(ours: tuple[str, ...]) -> str:
    if ours[0] in ("head.weight", "head.bias"):
        return (
            " Is tie_word_embeddings missing from config.json, or was the base model saved, an "
            "encoder without its head?"
        )
    return ""


def _require_same(where: str, head: Tensor, embed: Tensor) -> None:
    """A tied checkpoint may store the embedding again as the head; another head is refused."""
    if head.name == embed.name:
        return
    same = (head.shape, head.stored) == (embed.shape, embed.stored) and np.array_equal(
        safetensors.read_tensor(head).view(np.uint8), safetensors.read_tensor(embed).view(np.uint8)
    )
    if not same:
        raise ConventionError(
            f"{where}: config.json ties the head to the embedding, but {head.name!r} differs from "
            f"{embed.name!r}. Which one is meant? Delete one, or set tie_word_embeddings to false."
        )
