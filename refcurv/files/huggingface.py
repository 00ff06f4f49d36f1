"""A Hugging Face checkpoint directory (config.json, *.safetensors) ↔ a weights file. No torch.

Families differ in data only (families.py). A key of config.json is read, must have one value, or
is known not to matter; any other key is an error, for it might change the mathematics. So with
tensors: each becomes a parameter, or is known to be none.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from refcurv.files import checkpoints, safetensors, store, weights
from refcurv.files.disk import (
    WRITING,
    PathLike,
    file_sha256,
    machine_faults,
    one_line,
    parse_json,
    sync_folder,
)
from refcurv.files.families import FAMILIES, Family, Form, Slot, join, split, tensor_shape
from refcurv.files.keys import only
from refcurv.files.safetensors import Tensor
from refcurv.law.checks import (
    Array,
    ConventionError,
    RefcurvError,
    SchemaError,
    require_finite,
)
from refcurv.model.config import ModelConfig

_EVERYWHERE: Final = {
    rule.keys[0]: rule
    for rule in (
        only("pretraining_tp", 1, None),
        only("partial_rotary_factor", 1, None),
        only("clip_qkv", None),
        only("sliding_window", None),
        only("quantization_config", None),
        only("is_encoder_decoder", False, None),
        only("add_cross_attention", False, None),
        only("pruned_heads", {}, None),
        only("chunk_size_feed_forward", 0, None),
    )
}
"""What any config.json may say, where its family has no rule of its own for it."""

_IRRELEVANT: Final = frozenset(
    "architectures attn_implementation bos_token_id dtype eos_token_id finetuning_task id2label "
    "initializer_range is_decoder label2id max_length max_position_embeddings output_attentions "
    "output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id "
    "task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript "
    "transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache "
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path "
    "attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop "
    "embed_dropout embedding_dropout hidden_dropout hidden_dropout_prob resid_dropout "
    "resid_pdrop residual_dropout".split()
)
"""Keys of no consequence for a forward and backward pass on given tokens, without dropout.

One has consequence in torch: it gives the embedding of `pad_token_id` no gradient. Here every
embedding has the gradient of the loss.
"""


@dataclass(frozen=True, slots=True)
class Mapped:
    """One tensor of a checkpoint and a parameter that it became; `name` is None if ignored.

    A fused tensor has one for each of its parts. `shape` is the tensor's.
    """

    checkpoint_name: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str


def convert(directory: PathLike, path: PathLike) -> list[Mapped]:
    """Turn a checkpoint directory into a weights file.

    Definition
        Every number is copied bit for bit under its new name: Conv1D weights are turned (LAYOUT),
        fused tensors (q, k, v; gate, up) are split, the kernel of a patch embedding is flattened.
        Buffers, a pooler and the second copy of a tied head are ignored, and listed.

    Args:
        directory: Holds config.json (its model_type one of refcurv.files.families.FAMILIES) and
            model.safetensors, or shards with model.safetensors.index.json. A snapshot of the
            Hub's cache will do.
        path: The weights file to write.

    Returns:
        One Mapped for each parameter, in file order, then one for each ignored tensor.

    Raises:
        ConventionError: Another model_type, a configuration that refcurv does not compute, or a
            checkpoint in pickle format.
        SchemaError: A file is missing or damaged; a tensor is missing, unknown or misshapen.
        NonFiniteError: A tensor holds NaN or infinity.
        StorageError: The machine failed.

    Cost: One tensor in memory, and a copy of a part if it is fused; reads each shard twice, once
        for its SHA-256, and a fused tensor once for each part.
    Source: transformers 5.23, models/*/configuration_*.py and modeling_*.py.
    Proof:  tests/test_peers.py::test_logits_loss_gradients_and_factors
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise SchemaError(f"convert: there is no folder {str(folder)!r}.")
    with machine_faults("convert", folder):
        text = checkpoints.read_text(folder, "config.json")
        family, config = read_config(f"convert: {str(folder / 'config.json')!r}", text)
        tensors = checkpoints.read_tensors(folder)
    if config.layers > len(tensors):  # before as many names are made
        raise SchemaError(
            f"convert: {str(folder)!r}: config.json asks for {config.layers} layers, but there are "
            f"only {len(tensors)} tensors."
        )
    plan = _plan(f"convert: {str(folder)!r}", family, config, tensors)
    shards = sorted({tensor.path for tensor in tensors.values()})
    made_from = {
        "inputs": {p.name: file_sha256(p) for p in [folder / "config.json", *shards]},
        "checkpoint_config": text,
    }
    weights.write(path, config, _entries(config, plan), made_from)
    taken = {source.tensor.name for source in plan.values()}
    mapped = [(source.tensor, name) for name, source in plan.items()]
    ignored = [(tensor, None) for tensor in tensors.values() if tensor.name not in taken]
    return [Mapped(t.name, name, t.shape, t.stored) for t, name in [*mapped, *ignored]]


def export(path: PathLike, directory: PathLike) -> None:
    """Turn a weights file into a checkpoint directory that transformers loads.

    Definition
        config.json is the checkpoint's own, verbatim, if it still describes the model, otherwise
        a minimal one of its family, or of the first family that can describe it;
        model.safetensors holds every number as stored, bit for bit, where `convert` found it.

    Args:
        path: A weights file.
        directory: A folder that does not exist or is empty; it appears whole or not at all.

    Raises:
        ConventionError: No known family computes what this model does, or the parts of a fused
            tensor are stored in different dtypes.
        SchemaError: Not a weights file; the folder is not empty.
        StorageError: The machine failed.

    Cost: One tensor in memory, and its parts if it is fused.
    Source: https://huggingface.co/docs/safetensors, the format.
    Proof:  tests/test_huggingface.py::test_round_trip
    """
    model = weights.load(path)
    header: store.Header = model.source["header"]
    config = model.config
    family, text = _config_text(header, config, model.stored)
    slots = _named(header, family, tensors_of(family, config))
    shapes = config.parameter_shapes()
    rows = []
    for name, (slot, ours) in slots.items():
        kinds = sorted({model.stored[part] for part in ours})
        if len(kinds) > 1:
            raise ConventionError(
                f"export: {', '.join(ours)} make up {name!r}, but are stored as "
                f"{' and '.join(kinds)}. Store them alike."
            )
        rows.append((name, kinds[0], tensor_shape(slot, config, [shapes[p] for p in ours])))

    def read(name: str) -> Array:
        slot, ours = slots[name]
        return join(slot, config, [store.read(header, weights.PARAMETERS + p) for p in ours])

    target = checkpoints.new_folder(directory)
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

Tensors = dict[str, tuple[Slot, tuple[str, ...]]]
"""The checkpoint's name of a tensor → how it holds which of our parameters."""


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


def _whole(family: Family, names: list[str]) -> dict[str, str]:
    """A checkpoint's names → the same with the family's prefix, which the base model's lack."""
    if any(name.startswith(family.prefix) for name in names):
        return {name: name for name in names}
    heads = {slot.theirs for slot in family.slots if slot.ours == ("head",)}
    return {n: n if n.rpartition(".")[0] in heads else family.prefix + n for n in names}


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a parameter comes from: part `index` of a tensor whose parts are `ours`."""

    tensor: Tensor
    slot: Slot
    ours: tuple[str, ...]
    index: int


def _plan(
    where: str, family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, _Source]:
    """Parameter → source, each there in its shape, and no tensor left that could matter."""
    whole = {name: tensors[mine] for mine, name in _whole(family, list(tensors)).items()}
    shapes = config.parameter_shapes()
    sources: dict[str, _Source] = {}
    wanted = tensors_of(family, config)
    for theirs, (slot, ours) in wanted.items():
        tensor = whole.get(theirs)
        if tensor is None:
            raise SchemaError(
                f"{where} lacks the tensor {theirs!r} ({', '.join(ours)}).{_hint(ours)}"
            )
        shape = tensor_shape(slot, config, [shapes[name] for name in ours])
        if tensor.shape != shape:
            raise SchemaError(
                f"{where}: tensor {tensor.name!r} has shape {tensor.shape}; config.json asks "
                f"for {shape}."
            )
        if tensor.stored not in weights.STORED:
            raise SchemaError(
                f"convert: {str(tensor.path)!r}: tensor {tensor.name!r} is of type "
                f"{tensor.stored!r}; parameters are "
                f"{', '.join(weights.STORED)}. A quantised checkpoint must be dequantised first."
            )
        sources |= {name: _Source(tensor, slot, ours, i) for i, name in enumerate(ours)}
    for theirs, tensor in whole.items():
        if theirs in wanted or any(re.fullmatch(p, theirs) for p in family.ignored):
            continue
        head = next(slot.theirs for slot in family.slots if slot.ours == ("head",))
        if theirs == f"{head}.weight" and config.tied:
            _require_same(where, tensor, sources["embed.weight"].tensor)
            continue
        raise SchemaError(
            f"{where} holds a tensor {tensor.name!r} that a {family.model_type} of this "
            "config.json has not."
        )
    return {name: sources[name] for name in shapes}


def _hint(ours: tuple[str, ...]) -> str:
    if ours == ("head.weight",):
        return (
            " Is tie_word_embeddings missing from config.json, or was the base model saved, "
            "without its head?"
        )
    return ""


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


def _entries(config: ModelConfig, plan: Mapping[str, _Source]) -> Iterator[store.Entry]:
    shapes = config.parameter_shapes()
    for name, source in tqdm(
        plan.items(), desc="convert", unit="tensor", disable=None, delay=1, leave=False
    ):
        tensor, parts = source.tensor, [shapes[part] for part in source.ours]
        array = safetensors.read_tensor(tensor)
        raw = split(source.slot, config, array, parts, source.index)
        del array
        finite = (raw & 0x7F80) != 0x7F80 if tensor.stored == "bfloat16" else np.isfinite(raw)
        if not finite.all():
            wide = weights.widen(raw, tensor.stored, "float64")
            require_finite(f"convert: {str(tensor.path)!r}", f"tensor {tensor.name!r}", wide)
        yield weights.parameter_entry(name, raw, tensor.stored, tensor.name)


def _named(header: store.Header, family: Family, tensors: Tensors) -> Tensors:
    """The names that the checkpoint itself had, where they are recorded and those of `family`."""

    def recorded(name: str) -> str:
        attributes = header.entries[weights.PARAMETERS + name].attributes
        return str(attributes.get("checkpoint_name", ""))

    own = {theirs: {recorded(name) for name in ours} for theirs, (_, ours) in tensors.items()}
    flat = [name for names in own.values() for name in names]
    if len(flat) != len(tensors) or len(set(flat)) != len(flat):
        return tensors
    whole = _whole(family, flat)
    if any(whole[next(iter(names))] != theirs for theirs, names in own.items()):
        return tensors
    return {next(iter(own[theirs])): found for theirs, found in tensors.items()}


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
            f"{where}: model_type is {data.get('model_type')!r:.60}; known are {', '.join(kinds)}."
        )
    try:
        _require_known(family, data)
        fields: dict[str, Any] = {}
        for rule in family.rules:
            found = rule.read(data, fields)
            both = (*fields.get("biases", ()), *found.get("biases", ()))
            fields |= found | ({"biases": both} if both else {})
    except RefcurvError as error:
        kind = ConventionError if isinstance(error, ConventionError) else SchemaError
        raise kind(f"{where}: {one_line(error)}.") from None
    try:
        return family, ModelConfig(**fields)
    except RefcurvError as error:
        raise SchemaError(f"{where}: {one_line(error)}.") from None


def _require_known(family: Family, data: Mapping[str, Any]) -> None:
    """No key that might change the mathematics unread, and no class that computes otherwise."""
    own = {key for rule in family.rules for key in rule.keys} | {"model_type"}
    for key in data.keys() - own:
        if key in _EVERYWHERE:
            _EVERYWHERE[key].read(data, {})
        elif key not in _IRRELEVANT and key not in family.irrelevant:
            raise ConventionError(
                f"the key {key!r:.80} is unknown and might change the mathematics. Remove it if it "
                "does not"
            )
    classes = data.get("architectures")
    for name, reason in (family.refused or {}).items():
        if isinstance(classes, list) and name in classes:
            raise ConventionError(f"architectures has {name}: {reason}")


def _config_text(
    header: store.Header, config: ModelConfig, stored: Mapping[str, str]
) -> tuple[Family, str]:
    """A family and its config.json: the checkpoint's own if it still describes the model."""
    kept, families = header.provenance.get("checkpoint_config"), list(FAMILIES)
    if isinstance(kept, str):
        try:
            family, read = read_config("export: checkpoint_config", kept)
        except RefcurvError:
            pass  # not ours to judge: a minimal one describes the model just as well
        else:
            if read == config:
                return family, kept
            families.insert(0, family)
    for family in families:
        text = minimal_config(family, config, stored)
        try:
            if read_config("export", text)[1] == config:
                return family, text
        except RefcurvError:
            continue
    raise ConventionError(
        f"export: none of the families known here ({', '.join(f.model_type for f in FAMILIES)}) "
        "computes what this model does. refcurv itself reads the weights file."
    )


def minimal_config(family: Family, config: ModelConfig, stored: Mapping[str, str]) -> str:
    """A config.json with all that the family's rules can say about `config`."""
    used = set(stored.values())
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": next(dtype for dtype in weights.STORED if dtype in used),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    for rule in family.rules:
        values |= rule.write(config)
    return json.dumps(values, indent=2) + "\n"
