"""A GGUF file → a weights file: every number as the package dequantises it, in float32.

Nothing is guessed in silence. Each tensor becomes a parameter or is known to be none; each key of
the metadata is read or known not to matter; what GGUF leaves out is assumed, said and recorded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from refcurv.files import store, weights
from refcurv.files.families import Family
from refcurv.files.gguf.architectures import Architecture, describe
from refcurv.files.gguf.reading import (
    Contents,
    Tensor,
    open_gguf,
    package_version,
    read_stored,
    read_tensor,
)
from refcurv.files.gguf.rotary import LONGROPE
from refcurv.files.huggingface import Conversion, Mapped, read_config
from refcurv.files.naming import tensors_of
from refcurv.files.paths import PathLike
from refcurv.files.slots import Form, Slot, split, tensor_shape
from refcurv.files.unchanged import inputs_unchanged
from refcurv.law.checks import Array, ConventionError, SchemaError, require_finite
from refcurv.model.config import ModelConfig, NormPlace, Scaling

_NAMES: Final = {
    "embed": "token_embd",
    "position": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q attn.k attn.v": "attn_qkv",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.gate mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""Our layers, fused ones together → GGUF's name."""

_AFTER: Final = _NAMES | {"attn_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"}
"""The same where a block normalises only behind its parts."""

_READ_ELSEWHERE: Final = {
    Scaling.LLAMA3: ("rope_freqs.weight",),
    Scaling.LONGROPE: LONGROPE,
}
"""Tensors that a scaling of rotary positions was read from."""

_BUFFERS: Final = r"blk\.\d+\.(attn_rot_embd\.weight|attn_norm_2\.unused)|.*\.inv_freq"
_EXPERTS: Final = r"blk\.\d+\.ffn_(gate|up|down)_(exps?|shexp|\d+)\..+|blk\.\d+\.ffn_gate_inp\..+"


@dataclass(frozen=True, slots=True)
class _Source:
    """A parameter is part `index` of a tensor, whose parts have the names `ours`."""

    tensor: Tensor
    slot: Slot
    ours: tuple[str, ...]
    index: int


def gguf_conversion(
    given: PathLike, path: PathLike, ignore_keys: Collection[str] = ()
) -> Conversion:
    """Turn a GGUF file into a weights file.

    Definition
        W = dequantise(tensor), by the package gguf, in float32, under our name. The rows of q and
        k of a `llama` are put back in the checkpoint's order. Fused tensors are split. A gain that
        holds 1 + w stays as it is, and the configuration has norm_offset false. Without an output
        matrix, or with one that is the embedding bit for bit, the head is tied.

    Raises:
        ConventionError: an architecture, a key or a type of numbers that is not built.
        SchemaError: damaged, or metadata and tensors contradict each other.
        NonFiniteError: a tensor holds NaN or infinity.

    Cost: One tensor in float32 in memory, twice that while it is dequantised.
    Proof: tests/test_gguf.py::test_the_same_model_as_from_safetensors
    """
    found = open_gguf(given)
    where = f"convert: {found.where}"
    described = describe(found, ignore_keys)
    tied = "output.weight" in found.tensors and _is_embedding(found)
    said = described.config | ({"tie_word_embeddings": True} if tied else {})
    family, config = read_config(where, json.dumps(said))
    config = replace(config, norm_offset=config.norm_offset and not described.architecture.shifted)
    sources, ignored = _plan(where, family, config, found)
    _require_known(where, config, ignored)
    facts = {
        "ignored_keys": sorted(ignore_keys),
        "gguf": {
            "architecture": found.get("general.architecture"),
            "package": package_version(),
            "dequantised": dict(sorted(Counter(t.kind for t in found.tensors.values()).items())),
            "to": "float32",
            "assumed": described.assumed,
        },
    }

    def made_from() -> dict[str, Any]:  # asked when every tensor was read
        return {"inputs": inputs_unchanged("convert", found.files), **facts}

    entries = _entries(described.architecture, config, sources)
    weights.write(path, config, entries, made_from)
    mapped = [(source.tensor, name) for name, source in sources.items()]
    rows = [
        Mapped(t.name, name, t.shape, t.kind)
        for t, name in [*mapped, *((t, None) for t in ignored)]
    ]
    assumed = tuple(f"{key} = {_short(value)}" for key, value in described.assumed.items())
    return Conversion(rows, "", tuple(sorted(ignore_keys)), (), (), assumed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _is_embedding(found: Contents) -> bool:
    """Is the output matrix the embedding, bit for bit?"""
    head, embed = found.tensors["output.weight"], found.tensors["token_embd.weight"]
    same = (head.shape, head.kind) == (embed.shape, embed.kind)
    return same and np.array_equal(read_stored(head).view("u1"), read_stored(embed).view("u1"))


# ------------------------------------------------------------------ which tensor is what


def gguf_name(config: ModelConfig, ours: tuple[str, ...]) -> str:
    """GGUF's name of the tensor that holds our parameters `ours`.

    Proof: tests/test_gguf.py::test_names_are_those_of_the_package
    """
    names = _AFTER if config.norm_place is NormPlace.POST else _NAMES
    plain, block = [], ""
    for name in ours:
        layer, _, kind = name.rpartition(".")
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", layer):
            block, layer = f"blk.{found[1]}.", found[2]
        plain.append(layer)
    return f"{block}{names[' '.join(plain)]}.{kind}"


def _plan(
    where: str, family: Family, config: ModelConfig, found: Contents
) -> tuple[dict[str, _Source], list[Tensor]]:
    """Parameter → source, in file order; and the tensors that are no parameters."""
    shapes = config.parameter_shapes()
    sources: dict[str, _Source] = {}
    wanted = set()
    for slot, ours in tensors_of(family, config).values():
        name = gguf_name(config, ours)
        wanted.add(name)
        tensor = found.tensors.get(name)
        if tensor is None:
            raise SchemaError(f"{where} lacks the tensor {name!r} ({', '.join(ours)}).")
        plain = replace(slot, form=Form.ROWS)
        shape = tensor_shape(plain, config, [shapes[one] for one in ours])
        if tensor.shape != shape:
            raise SchemaError(
                f"{where}: tensor {name!r} has shape {tensor.shape}; the metadata ask for {shape}."
            )
        sources |= {one: _Source(tensor, plain, ours, i) for i, one in enumerate(ours)}
    rest = [tensor for name, tensor in found.tensors.items() if name not in wanted]
    return {name: sources[name] for name in shapes}, rest


def _require_known(where: str, config: ModelConfig, rest: list[Tensor]) -> None:
    read = _READ_ELSEWHERE.get(config.rope_scaling.kind, ()) if config.rope_scaling else ()
    for tensor in rest:
        if re.fullmatch(_EXPERTS, tensor.name):
            raise ConventionError(
                f"{where}: tensor {tensor.name!r:.120} is a mixture of experts', which is not "
                "built yet."
            )
        tied = config.tied and tensor.name == "output.weight"
        if not tied and tensor.name not in read and not re.fullmatch(_BUFFERS, tensor.name):
            raise SchemaError(
                f"{where} holds a tensor {tensor.name!r:.120} that a model of its architecture "
                "and metadata has not."
            )


# ------------------------------------------------------------------ numbers


def _entries(
    architecture: Architecture, config: ModelConfig, sources: Mapping[str, _Source]
) -> Iterator[store.Entry]:
    shapes = config.parameter_shapes()
    for name, source in tqdm(
        sources.items(), desc="convert", unit="tensor", disable=None, delay=1, leave=False
    ):
        tensor = source.tensor
        array = read_tensor(tensor)
        require_finite(f"convert: {str(tensor.path)!r}", f"tensor {tensor.name!r}", array)
        array = split(
            source.slot, config, array, [shapes[one] for one in source.ours], source.index
        )
        heads = {"q": config.heads, "k": config.kv_heads}.get(name.rpartition(".")[0][-1:])
        if architecture.permuted and heads and ".attn." in name:
            array = unpermuted(array, heads)
        entry = weights.parameter_entry(name, array, "float32", tensor.name)
        yield replace(entry, attributes={**entry.attributes, "gguf_type": tensor.kind})


def unpermuted(rows: Array, heads: int) -> Array:
    """The rows of q or k of a `llama` as the checkpoint has them.

    Definition
        llama.cpp turns neighbouring entries of a head together, the checkpoint entry i and entry
        i + E/2. So row 2i + j of a head in the file is row i + j·E/2 of the checkpoint's.

    Proof: tests/test_gguf.py::test_the_same_model_as_from_safetensors
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
