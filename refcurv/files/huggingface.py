"""A Hugging Face checkpoint directory (config.json, *.safetensors) ↔ a weights file. No torch.

Families differ in data only: where they normalise, and what their tensors are called. A key of
config.json is read, must have one value, or is known not to matter; any other key is an error,
for it might change the mathematics.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from refcurv.files import safetensors, store, weights
from refcurv.files.disk import (
    WRITING,
    PathLike,
    file_sha256,
    machine_faults,
    one_line,
    output_path,
    parse_json,
    sync_folder,
)
from refcurv.files.safetensors import Tensor
from refcurv.law.checks import Array, ConventionError, RefcurvError, SchemaError
from refcurv.model.config import ModelConfig, NormPlace, QKNorm


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` means: architecture, norms, and its names for our parameters."""

    model_type: str
    architecture: str
    norm_place: NormPlace
    qk_norm: QKNorm
    names: Mapping[str, str]


_SHARED: Final = {
    "embed": "model.embed_tokens",
    "blocks.*.attn.q": "model.layers.*.self_attn.q_proj",
    "blocks.*.attn.k": "model.layers.*.self_attn.k_proj",
    "blocks.*.attn.v": "model.layers.*.self_attn.v_proj",
    "blocks.*.attn.o": "model.layers.*.self_attn.o_proj",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

FAMILIES: Final = (
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        NormPlace.POST,
        QKNorm.FULL,
        _SHARED
        | {
            "blocks.*.attn.q_norm": "model.layers.*.self_attn.q_norm",
            "blocks.*.attn.k_norm": "model.layers.*.self_attn.k_norm",
            "blocks.*.attn_norm": "model.layers.*.post_attention_layernorm",
            "blocks.*.mlp_norm": "model.layers.*.post_feedforward_layernorm",
        },
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        NormPlace.PRE,
        QKNorm.NONE,
        _SHARED
        | {
            "blocks.*.attn_norm": "model.layers.*.input_layernorm",
            "blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        },
    ),
)

_SIZES: Final = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "mlp_width",
}
_ROPE: Final = ("rope_theta", "rope_parameters", "rope_scaling")
_READ: Final = frozenset({"model_type", "rms_norm_eps", "tie_word_embeddings", *_SIZES, *_ROPE})

_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "embedding_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0, None),
}
"""Keys that change the mathematics, and the values that do not."""

_IRRELEVANT: Final = frozenset(
    "architectures attn_implementation bos_token_id dtype eos_token_id finetuning_task id2label "
    "initializer_range is_decoder label2id max_length max_position_embeddings output_attentions "
    "output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id "
    "task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript "
    "transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache "
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path".split()
)
"""Keys of no consequence for a forward and backward pass on given tokens.

One has consequence in torch: it gives the embedding of `pad_token_id` no gradient. Here every
embedding has the gradient of the loss.
"""

_ROPE_THETA: Final = 10_000.0  # both families', where config.json is silent
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_IGNORED: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_MAX_TEXT: Final = 8_000_000
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Mapped:
    """One tensor of a checkpoint and the parameter that it became; `name` is None if ignored."""

    checkpoint_name: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str


def convert(directory: PathLike, path: PathLike) -> list[Mapped]:
    """Turn a checkpoint directory into a weights file.

    Definition
        Every tensor is copied bit for bit under its new name (LAYOUT: both families store
        (d_out, d_in) already); rotary buffers and the second copy of a tied head are ignored.

    Args:
        directory: Holds config.json (model_type olmo2 or llama) and model.safetensors, or shards
            with model.safetensors.index.json. A snapshot of the Hub's cache will do.
        path: The weights file to write.

    Returns:
        One Mapped for each parameter, in file order, then one for each ignored tensor.

    Raises:
        ConventionError: Another model_type, a configuration that refcurv does not compute, or a
            checkpoint in pickle format.
        SchemaError: A file is missing or damaged; a tensor is missing, unknown or misshapen.
        StorageError: The machine failed.

    Cost: One tensor in memory; reads each shard twice, once for its SHA-256.
    Source: transformers 5.23, models/olmo2 and models/llama.
    Proof:  tests/test_peers.py::test_logits_loss_gradients_and_factors
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise SchemaError(f"convert: there is no folder {str(folder)!r}.")
    with machine_faults("convert", folder):
        text = _text(folder, "config.json")
        family, config = read_config(f"convert: {str(folder / 'config.json')!r}", text)
        tensors = _tensors(folder)
    if config.layers > len(tensors):  # before as many names are made
        raise SchemaError(
            f"convert: {str(folder)!r}: config.json asks for {config.layers} layers, but there are "
            f"only {len(tensors)} tensors."
        )
    plan = _plan(folder, family, config, tensors)
    shards = sorted({tensor.path for tensor in tensors.values()})
    made_from = {
        "inputs": {p.name: file_sha256(p) for p in [folder / "config.json", *shards]},
        "checkpoint_config": text,
    }
    weights.write(path, config, _entries(plan), made_from)
    taken = {tensor.name for tensor in plan.values()}
    mapped = [Mapped(t.name, name, t.shape, t.stored) for name, t in plan.items()]
    return mapped + [
        Mapped(t.name, None, t.shape, t.stored) for t in tensors.values() if t.name not in taken
    ]


def export(path: PathLike, directory: PathLike) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads.

    Definition
        config.json is the checkpoint's own, verbatim, if it still describes the model, otherwise
        a minimal one; model.safetensors holds every tensor as stored, bit for bit.

    Args:
        path: A weights file.
        directory: A folder that does not exist or is empty; it appears whole or not at all.

    Raises:
        ConventionError: No known family normalises as this model does.
        SchemaError: Not a weights file; the folder is not empty.
        StorageError: The machine failed.

    Cost: One tensor in memory.
    Source: https://huggingface.co/docs/safetensors, the format.
    Proof:  tests/test_huggingface.py::test_round_trip
    """
    model = weights.load(path)
    header: store.Header = model.source["header"]
    family = _family_of(model.config)
    text = _config_text(header, family, model.config, model.stored)
    shapes = model.config.parameter_shapes()
    ours = {their_name(family, name): name for name in shapes}

    def read(name: str) -> Array:
        return store.read(header, weights.PARAMETERS + ours[name])

    rows = [(name, model.stored[mine], shapes[mine]) for name, mine in ours.items()]
    target = _new_folder(directory)
    partial = target.with_name(f".refcurv-{secrets.token_hex(6)}.partial")
    try:
        with machine_faults("export", target, WRITING):
            partial.mkdir()
            (partial / "config.json").write_text(text, encoding="utf-8", newline="")
            safetensors.write_file(partial / "model.safetensors", rows, read)
            sync_folder(partial)
            partial.rename(target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ------------------------------------------------------------------ names


def their_name(family: Family, name: str) -> str:
    """Our parameter's name → the family's."""
    layer, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if block is None:
        return f"{family.names[layer]}.{kind}"
    return f"{family.names[f'blocks.*.{block[2]}'].replace('*', block[1])}.{kind}"


def _plan(
    folder: Path, family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameter → tensor, each there in its shape, and no tensor left that could matter."""
    where = f"convert: {str(folder)!r}"
    plan: dict[str, Tensor] = {}
    for name, shape in config.parameter_shapes().items():
        theirs = their_name(family, name)
        if theirs not in tensors:
            hint = " Is tie_word_embeddings missing from config.json?" if name[:4] == "head" else ""
            raise SchemaError(f"{where} lacks the tensor {theirs!r} ({name}).{hint}")
        if tensors[theirs].shape != shape:
            raise SchemaError(
                f"{where}: tensor {theirs!r} has shape {tensors[theirs].shape}; config.json asks "
                f"for {shape}."
            )
        plan[name] = tensors[theirs]
    taken = {tensor.name for tensor in plan.values()}
    for name, tensor in tensors.items():
        if name in taken or _IGNORED.fullmatch(name):
            continue
        if name == "lm_head.weight" and config.tied:
            _require_same(where, tensor, plan["embed.weight"])
            continue
        raise SchemaError(f"{where} holds a tensor {name!r} that a {family.model_type} has not.")
    return plan


def _require_same(where: str, head: Tensor, embed: Tensor) -> None:
    """A tied checkpoint may store its head a second time, but not another one."""
    same = (head.shape, head.stored) == (embed.shape, embed.stored) and np.array_equal(
        safetensors.read_tensor(head).view(np.uint8), safetensors.read_tensor(embed).view(np.uint8)
    )
    if not same:
        raise ConventionError(
            f"{where}: config.json ties the head to the embedding, but {head.name!r} differs from "
            f"{embed.name!r}. Which one is meant? Delete one, or set tie_word_embeddings to false."
        )


def _entries(plan: Mapping[str, Tensor]) -> Iterator[store.Entry]:
    for name, tensor in tqdm(
        plan.items(), desc="convert", unit="tensor", disable=None, delay=1, leave=False
    ):
        raw = safetensors.read_tensor(tensor)
        yield weights.parameter_entry(name, raw, tensor.stored, tensor.name)


# ------------------------------------------------------------------ config.json


def read_config(where: str, text: str) -> tuple[Family, ModelConfig]:
    """The family and configuration that a config.json describes.

    Raises ConventionError for what refcurv does not compute, SchemaError for what is missing.
    """
    data = parse_json("convert", where, text)
    kinds = {family.model_type: family for family in FAMILIES}
    family = kinds.get(str(data.get("model_type")))
    if family is None:
        raise ConventionError(
            f"{where}: model_type is {data.get('model_type')!r}; known are {', '.join(kinds)}."
        )
    for key, value in data.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                raise ConventionError(
                    f"{where}: {key} is {value!r}; refcurv computes only {_ONLY[key][0]!r}."
                )
        elif key not in _READ and key not in _IRRELEVANT:
            raise ConventionError(
                f"{where}: the key {key!r} is unknown and might change the mathematics. Remove it "
                "if it does not."
            )
    fields = {
        **_sizes(where, data),
        "norm_place": family.norm_place,
        "qk_norm": family.qk_norm,
        "norm_eps": _required(where, data, "rms_norm_eps"),
        "rope_theta": _rope_theta(where, data),
        "tied": data.get("tie_word_embeddings", False),
    }
    try:
        return family, ModelConfig(**fields)
    except RefcurvError as error:
        raise SchemaError(f"{where}: {one_line(error)}.") from None


def _required(where: str, data: Mapping[str, Any], key: str) -> Any:
    if data.get(key) is None:
        raise SchemaError(f"{where} lacks the key {key!r}.")
    return data[key]


def _sizes(where: str, data: Mapping[str, Any]) -> dict[str, int]:
    """The seven sizes; head_dim and num_key_value_heads follow from the others if absent."""
    sizes: dict[str, Any] = dict(data)
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = _required(where, data, "num_attention_heads")
    if sizes.get("head_dim") is None:
        width, heads = (_required(where, data, k) for k in ("hidden_size", "num_attention_heads"))
        if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
            raise SchemaError(
                f"{where}: hidden_size {width!r} is no multiple of num_attention_heads {heads!r}, "
                "and head_dim is absent."
            )
        sizes["head_dim"] = width // heads
    return {ours: _required(where, sizes, theirs) for theirs, ours in _SIZES.items()}


def _rope_theta(where: str, data: Mapping[str, Any]) -> Any:
    """The one base of plain rotary positions, from transformers 5's keys or the older ones."""
    found = [data["rope_theta"]] if data.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        block = data.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            raise SchemaError(f"{where}: {key} must be an object; got {block!r}.")
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
        for inner, value in block.items():
            if inner == "rope_theta":
                found.append(value)
            elif inner not in plain or value != plain[inner]:
                raise ConventionError(
                    f"{where}: {key} has {inner} = {value!r}; refcurv computes plain rotary "
                    "positions only (rope_type 'default')."
                )
    if any(theta != found[0] for theta in found):
        raise ConventionError(f"{where}: rope_theta is given as {found}; which one is meant?")
    return found[0] if found else _ROPE_THETA


def _family_of(config: ModelConfig) -> Family:
    for family in FAMILIES:
        if (family.norm_place, family.qk_norm) == (config.norm_place, config.qk_norm):
            return family
    known = ", ".join(f"{f.model_type} ({f.norm_place}, {f.qk_norm})" for f in FAMILIES)
    raise ConventionError(
        f"export: no family known here has norm_place {config.norm_place} and qk_norm "
        f"{config.qk_norm}; known are {known}. refcurv itself reads the weights file."
    )


def _config_text(
    header: store.Header, family: Family, config: ModelConfig, stored: Mapping[str, str]
) -> str:
    """The checkpoint's own config.json if it still describes the model, else a minimal one."""
    kept = header.provenance.get("checkpoint_config")
    if isinstance(kept, str):
        try:
            if read_config("export: checkpoint_config", kept) == (family, config):
                return kept
        except RefcurvError:
            pass  # not ours to judge: a minimal one describes the model just as well
    used = set(stored.values())
    values = config.to_json()
    minimal = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": next(dtype for dtype in weights.STORED if dtype in used),
        **{theirs: values[ours] for theirs, ours in _SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return json.dumps(minimal, indent=2) + "\n"


# ------------------------------------------------------------------ the directory


def _inside(folder: Path, name: str) -> Path:
    """A file of the checkpoint, by its plain name; links may lead to the Hub cache's own blobs."""
    if not _FILE_NAME.fullmatch(name):
        raise SchemaError(f"convert: {name!r} is no plain file name inside {str(folder)!r}.")
    home = Path(os.path.realpath(folder))
    homes = {home}
    if home.parent.name == "snapshots":
        homes.add(home.parent.parent / "blobs")
    real = Path(os.path.realpath(folder / name))
    if real.parent not in homes:
        raise SchemaError(f"convert: {str(folder / name)!r} leads outside, to {str(real)!r}.")
    if not real.is_file():
        raise SchemaError(f"convert: there is no file {str(folder / name)!r}.")
    return folder / name


def _text(folder: Path, name: str) -> str:
    path = _inside(folder, name)
    with machine_faults("convert", path):
        data = path.read_bytes() if path.stat().st_size <= _MAX_TEXT else b"\xff"
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SchemaError(f"convert: {str(path)!r} is no UTF-8 text, or too long.") from None


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name, from one file or from the index's shards."""
    if (folder / _INDEX).exists():
        return _sharded(folder)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(names) == 1:
        return {t.name: t for t in safetensors.read_header(_inside(folder, names[0]))}
    if names:
        raise SchemaError(
            f"convert: {str(folder)!r} holds {len(names)} safetensors files but no {_INDEX}."
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ConventionError(
            f"convert: {str(folder / pickles[0])!r} is a pickle, which can run code when it is "
            "loaded. Load it where you trust it and save it with transformers' "
            "model.save_pretrained(folder), which writes safetensors."
        )
    raise SchemaError(f"convert: {str(folder)!r} holds no safetensors file.")


def _sharded(folder: Path) -> dict[str, Tensor]:
    where = f"convert: {str(folder / _INDEX)!r}"
    shard_of = parse_json("convert", where, _text(folder, _INDEX)).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise SchemaError(f"{where} has no weight_map from tensor names to file names.")
    shards = sorted(set(shard_of.values()))
    if (folder / "model.safetensors").exists() and "model.safetensors" not in shards:
        raise SchemaError(f"{where} does not mention model.safetensors beside it. Remove one.")
    tensors: dict[str, Tensor] = {}
    for shard, path in [(shard, _inside(folder, shard)) for shard in shards]:
        for tensor in safetensors.read_header(path):
            if shard_of.get(tensor.name) != shard:
                raise SchemaError(
                    f"{where}: {shard} holds {tensor.name!r}, which the index expects in "
                    f"{shard_of.get(tensor.name)!r}."
                )
            tensors[tensor.name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors:
            raise SchemaError(f"{where} expects {name!r} in {shard}, which does not hold it.")
    return tensors


def _new_folder(directory: PathLike) -> Path:
    target = output_path("export", directory)
    with machine_faults("export", target, WRITING):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SchemaError(
                f"export: {str(target)!r} exists and is no empty folder. Name another."
            )
    return target
