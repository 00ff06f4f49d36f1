"""A Hugging Face checkpoint directory (config.json, *.safetensors) ↔ a weights file. No torch.

Families differ in data only (families.py). A key of config.json is read, or must have one value, or
is known not to matter. Any other key is an error, for it might change the mathematics. Each tensor
becomes a parameter, or is known to be none; any other tensor is an error too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from refcurv.files import checkpoints, safetensors, store, weights
from refcurv.files.bfloat16 import EXPONENT
from refcurv.files.disk import new_folder, parse_json, read_bytes, write_bytes
from refcurv.files.families import FAMILIES, Family
from refcurv.files.keys import same
from refcurv.files.known import require_known
from refcurv.files.mistaken import is_gguf, no_folder, unknown_model
from refcurv.files.naming import Source, Tensors, plan, tensors_of, whole
from refcurv.files.paths import (
    WRITING,
    PathLike,
    as_path,
    is_folder,
    machine_faults,
    one_line,
    output_path,
)
from refcurv.files.slots import join, split, tensor_shape
from refcurv.files.unchanged import inputs_unchanged, seen
from refcurv.law.checks import (
    Array,
    ConventionError,
    RefcurvError,
    SchemaError,
    require_finite,
)
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.model.given import require_list, shown

_CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_LONGEST: Final = 600
"""Letters of a sentence about config.json."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A tensor of a checkpoint, and a parameter that was made of it.

    `name` is the parameter's, None if the tensor is ignored. `shape` and `dtype` are the tensor's.
    A fused tensor has one record for each of its parts.
    """

    checkpoint_name: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a checkpoint.

    Fields:
        mapped: one for each parameter, in file order, then one for each ignored tensor.
        renamed: what was left out of all tensors' names, in a sentence, or "".
        ignored_keys: keys of config.json that the caller said to ignore.
        not_read: files with weights that are no part of the model.
        beside: files of a tokenizer and of generation that lie beside the weights.
        assumed: what a GGUF file leaves out and was assumed, as "key = value".
    """

    mapped: list[Mapped]
    renamed: str
    ignored_keys: tuple[str, ...]
    not_read: tuple[str, ...]
    beside: tuple[str, ...]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` did.

    Fields:
        files: the names of the files that it wrote.
        again: whether all of them were there already, just as they would be written.
        left: files of a tokenizer and of generation that lay beside the checkpoint when it was
            converted, and were not copied.
    """

    files: tuple[str, ...]
    again: bool
    left: tuple[str, ...]


def convert(directory: PathLike, path: PathLike, ignore_keys: Collection[str] = ()) -> list[Mapped]:
    """Turn a checkpoint directory, or a GGUF file, into a weights file.

    Definition
        Every number is copied bit for bit under its new name. Conv1D weights are transposed
        (ORIENTATION), fused tensors (q, k, v; gate, up) are split, and the kernel of a patch
        embedding is flattened. Buffers, a pooler and the second copy of a tied head are ignored,
        and listed.
        A prefix of all names that the family does not have is left out.
        A GGUF file is dequantised to float32 (refcurv.files.gguf.converting:gguf_conversion).

    Args:
        directory: A GGUF file, which needs the extra `gguf`. Or a folder that holds config.json
            (its model_type one of refcurv.files.families.FAMILIES) and model.safetensors, or shards
            with model.safetensors.index.json. An index whose shards are gone is left over, and is
            not read. A snapshot of the Hub's cache will do: links are followed.
        path: The weights file to write.
        ignore_keys: Unknown keys of config.json of which the caller says that they change nothing.
            The file's provenance lists them. A key that the family reads is refused.

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
    return conversion(directory, path, ignore_keys).mapped


def conversion(
    directory: PathLike, path: PathLike, ignore_keys: Collection[str] = ()
) -> Conversion:
    """`convert`, and all that it noticed."""
    folder = as_path("convert", directory)
    given = [ignore_keys] if isinstance(ignore_keys, str) else ignore_keys
    listed = require_list("convert", "ignore_keys", given, "['use_cache']")
    if other := [key for key in listed if not isinstance(key, str)]:
        raise ConventionError(f"convert: ignore_keys must be texts; got {shown(other[0])}.")
    keys = tuple(sorted(set(listed)))
    if is_gguf(folder):
        from refcurv.files.gguf.converting import gguf_conversion

        return gguf_conversion(folder, path, keys)
    if not is_folder("convert", folder):
        raise no_folder(directory)
    with machine_faults("convert", folder):
        there = seen("convert", (path for path in folder.iterdir() if path.is_file()))
        text = checkpoints.read_config_text(folder)
        family, config = read_config(f"convert: {str(folder / _CONFIG)!r}", text, keys)
        found = checkpoints.read_tensors(folder)
        beside = checkpoints.beside(folder)
    if config.layers > len(found.tensors):  # before as many names are made
        raise SchemaError(
            f"convert: {str(folder)!r}: config.json asks for "
            f"{number_of(config.layers, 'layer')}, but there are "
            f"only {number_of(len(found.tensors), 'tensor')}."
        )
    made = plan(f"convert: {str(folder)!r}", family, config, found.tensors)
    shards = sorted({tensor.path for tensor in found.tensors.values()})
    noticed = {
        "ignored_keys": list(keys),
        "renamed": made.renamed,
        "not_read": list(found.not_read),
        "beside": beside,
    }
    facts = {
        "checkpoint_config": text,
        **{name: value for name, value in noticed.items() if value},
    }

    def made_from() -> dict[str, Any]:  # asked when every tensor was read
        read = {path: there[path] for path in [folder / _CONFIG, *shards]}
        return {"inputs": inputs_unchanged("convert", read), **facts}

    weights.write(path, config, _entries(config, made.sources), made_from)
    mapped = [(source.tensor, name) for name, source in made.sources.items()]
    ignored = [(tensor, None) for tensor in made.ignored]
    rows = [Mapped(t.name, name, t.shape, t.stored) for t, name in [*mapped, *ignored]]
    return Conversion(rows, made.renamed, keys, found.not_read, tuple(beside))


def export(path: PathLike, directory: PathLike, tokenizer_from: PathLike | None = None) -> Exported:
    """Turn a weights file into a checkpoint directory that transformers loads.

    Definition
        config.json is the checkpoint's own, verbatim, if it still describes the model. Otherwise it
        is a minimal one of the checkpoint's family, or of the first family that can describe the
        model. model.safetensors holds every number as stored, bit for bit, under the name that
        `convert` found, without the prefix that it left out. A tokenizer is copied from
        `tokenizer_from` alone: no path that a weights file names is ever opened.

    Args:
        path: A weights file.
        directory: A folder that does not exist or is empty. It appears whole or not at all. One
            that holds just what would be written is left as it is.
        tokenizer_from: A folder, usually that of the checkpoint. Its files of a tokenizer and of
            generation (refcurv.files.checkpoints.BESIDE) are copied.

    Returns:
        Exported: the files; `again` if they were there; `left`, which files that lay beside the
        checkpoint were not copied.

    Raises:
        ConventionError: No known family computes what this model does, or the parts of a fused
            tensor are stored in different dtypes; a file of `tokenizer_from` is not the one that
            lay beside the checkpoint.
        SchemaError: Not a weights file; the folder is not empty; `tokenizer_from` has no such file.
        StorageError: The machine failed.

    Cost: One tensor in memory, and its parts if it is fused; another where the folder is there.
    Source: https://huggingface.co/docs/safetensors, the format.
    Proof:  tests/test_huggingface.py::test_round_trip
        tests/test_conversion.py::test_an_export_that_is_there_is_done
    """
    model = weights.load(path)
    header: store.Header = model.source["header"]
    config = model.config
    family, text = _config_text(header, config, model.stored)
    slots = _named(header, family, tensors_of(family, config))
    rows = _rows(config, slots, model.stored)

    def read(name: str) -> Array:
        slot, ours = slots[name]
        return join(slot, config, [store.read(header, weights.PARAMETERS + p) for p in ours])

    recorded = header.provenance.get("beside")
    seen = recorded if isinstance(recorded, dict) else {}
    kept = {name: seen[name] for name in checkpoints.BESIDE if name in seen}
    beside = None if tokenizer_from is None else as_path("export", tokenizer_from)
    copied = {} if beside is None else _beside(beside, kept)
    files = {_CONFIG: text.encode(), **copied}
    target = output_path("export", directory)
    left = tuple(name for name in kept if name not in copied)
    with machine_faults("export", target, WRITING):
        again = _is_there(target, files, rows, read)
    if not again:
        with new_folder("export", target) as folder:
            for name, data in files.items():
                write_bytes("export", folder / name, data)
            safetensors.write_file(folder / _WEIGHTS, rows, read)
    return Exported((_CONFIG, _WEIGHTS, *copied), again, left)


def _rows(config: ModelConfig, slots: Tensors, stored: Mapping[str, str]) -> safetensors.Rows:
    """Name, dtype and shape of each tensor to write."""
    shapes = config.parameter_shapes()
    rows = []
    for name, (slot, ours) in slots.items():
        kinds = sorted({stored[part] for part in ours})
        if len(kinds) > 1:
            raise ConventionError(
                f"export: {', '.join(ours)} make up {name!r}, but are stored as "
                f"{' and '.join(kinds)}. Store them alike."
            )
        rows.append((name, kinds[0], tensor_shape(slot, config, [shapes[p] for p in ours])))
    return rows


def _beside(folder: Path, recorded: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's and generation files of a folder, which must be those that convert saw."""
    if not is_folder("export", folder):
        raise SchemaError(f"export: there is no folder {str(folder)!r} to take a tokenizer from.")
    with machine_faults("export", folder):
        there = checkpoints.beside(folder)
        for name, sha256 in there.items():
            if recorded.get(name, sha256) != sha256:
                raise ConventionError(
                    f"export: {str(folder / name)!r} is not the file that lay beside the "
                    "checkpoint when it was converted. Name that folder, or copy it yourself."
                )
        if not there:
            raise SchemaError(
                f"export: {str(folder)!r} has no tokenizer.json or other file of a tokenizer."
            )
        return {name: read_bytes("export", folder / name) for name in there}


def _is_there(
    target: Path, files: Mapping[str, bytes], rows: safetensors.Rows, read: Callable[[str], Array]
) -> bool:
    """Does the folder hold just what would be written? SchemaError if it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    plain = all((target / n).is_file() and not (target / n).is_symlink() for n in names)
    if plain and names == {*files, _WEIGHTS}:
        alike = all(read_bytes("export", target / n) == data for n, data in files.items())
        if alike and safetensors.holds(target / _WEIGHTS, rows, read):
            return True
    raise SchemaError(f"export: {str(target)!r} exists and is no empty folder. Name another.")


def _entries(config: ModelConfig, sources: Mapping[str, Source]) -> Iterator[store.Entry]:
    shapes = config.parameter_shapes()
    for name, source in tqdm(
        sources.items(), desc="convert", unit="tensor", disable=None, delay=1, leave=False
    ):
        tensor, parts = source.tensor, [shapes[part] for part in source.ours]
        array = safetensors.read_tensor(tensor)
        raw = split(source.slot, config, array, parts, source.index)
        del array
        finite = (raw & EXPONENT) != EXPONENT if tensor.stored == "bfloat16" else np.isfinite(raw)
        if not finite.all():
            wide = weights.widen(raw, tensor.stored, "float64")
            require_finite(f"convert: {str(tensor.path)!r}", f"tensor {tensor.name!r}", wide)
        yield weights.parameter_entry(name, raw, tensor.stored, tensor.name)


def _named(header: store.Header, family: Family, tensors: Tensors) -> Tensors:
    """The names that the checkpoint itself had, if they are recorded and fit `family`."""

    def recorded(name: str) -> str:
        attributes = header.entries[weights.PARAMETERS + name].attributes
        return str(attributes.get("checkpoint_name", ""))

    own = {theirs: {recorded(name) for name in ours} for theirs, (_, ours) in tensors.items()}
    flat = [name for names in own.values() for name in names]
    if len(flat) != len(tensors) or len(set(flat)) != len(flat):
        return tensors
    full = whole(family, flat)
    if any(full[next(iter(names))] != theirs for theirs, names in own.items()):
        return tensors
    return {next(iter(own[theirs])): found for theirs, found in tensors.items()}


# ------------------------------------------------------------------ config.json


def read_config(where: str, text: str, ignore: Collection[str] = ()) -> tuple[Family, ModelConfig]:
    """The family and configuration that a config.json describes, read without the keys `ignore`.

    Raises ConventionError for what refcurv does not compute, SchemaError for what is missing.
    """
    data = parse_json(where, text)
    kinds = {family.model_type: family for family in FAMILIES}
    family = kinds.get(str(data.get("model_type")))
    if family is None:
        raise ConventionError(unknown_model(where, data, kinds))
    try:
        require_known(family, data, ignore)
        data = _without_aliases(family, data)
        fields: dict[str, Any] = {}
        for rule in family.rules:
            found = rule.read(data, fields)
            both = (*fields.get("biases", ()), *found.get("biases", ()))
            fields |= found | ({"biases": both} if both else {})
    except RefcurvError as error:
        kind = ConventionError if isinstance(error, ConventionError) else SchemaError
        text = " ".join(str(error).split())[:_LONGEST].rstrip(".")
        raise kind(f"{where}: {text}.") from None
    try:
        return family, ModelConfig(**fields)
    except RefcurvError as error:
        raise SchemaError(f"{where}: {one_line(error)}.") from None


def _without_aliases(family: Family, data: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with each alias replaced by its key; if both are there, they must agree."""
    found = dict(data)
    for alias, key in family.aliases.items():
        if alias in found:
            value = found.pop(alias)
            if value is not None and not same(found.setdefault(key, value), value):
                raise ConventionError(
                    f"{key} is {found[key]!r:.40} and {alias}, another name of it, is "
                    f"{value!r:.40}; which one is meant?"
                )
    return found


def _config_text(
    header: store.Header, config: ModelConfig, stored: Mapping[str, str]
) -> tuple[Family, str]:
    """A family and its config.json: the checkpoint's own if it still describes the model."""
    kept, families = header.provenance.get("checkpoint_config"), list(FAMILIES)
    ignored = header.provenance.get("ignored_keys")
    keys = [key for key in ignored if isinstance(key, str)] if isinstance(ignored, list) else []
    if isinstance(kept, str):
        try:
            family, read = read_config("export: checkpoint_config", kept, keys)
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
