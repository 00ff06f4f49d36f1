"""A checkpoint directory as it lies on the disk: config.json, tensors by name, in one file or many.

No name leads out of the directory but the links of a Hub snapshot, which end among its own blobs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from refcurv.files import safetensors
from refcurv.files.disk import WRITING, PathLike, machine_faults, output_path, parse_json
from refcurv.files.safetensors import Tensor
from refcurv.law.checks import ConventionError, SchemaError

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_MAX_TEXT: Final = 64_000_000
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")


def inside(folder: Path, name: str) -> Path:
    """A file of the checkpoint, by its plain name; links may lead to the Hub cache's own blobs."""
    if not _FILE_NAME.fullmatch(name):
        raise SchemaError(f"convert: {name!r:.120} is no plain file name inside {str(folder)!r}.")
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


def read_text(folder: Path, name: str) -> str:
    """A small text file of the checkpoint."""
    path = inside(folder, name)
    with machine_faults("convert", path):
        data = path.read_bytes() if path.stat().st_size <= _MAX_TEXT else b"\xff"
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SchemaError(f"convert: {str(path)!r} is no UTF-8 text, or too long.") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name, from one file or from the index's shards."""
    if (folder / _INDEX).exists():
        return _sharded(folder)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(names) == 1:
        return {t.name: t for t in safetensors.read_header(inside(folder, names[0]))}
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
    shard_of = parse_json("convert", where, read_text(folder, _INDEX)).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise SchemaError(f"{where} has no weight_map from tensor names to file names.")
    shards = sorted(set(shard_of.values()))
    if (folder / "model.safetensors").exists() and "model.safetensors" not in shards:
        raise SchemaError(f"{where} does not mention model.safetensors beside it. Remove one.")
    tensors: dict[str, Tensor] = {}
    for shard, path in [(shard, inside(folder, shard)) for shard in shards]:
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


def new_folder(directory: PathLike) -> Path:
    """Where a checkpoint is to be written: a folder that does not exist or is empty."""
    target = output_path("export", directory)
    with machine_faults("export", target, WRITING):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise SchemaError(
                f"export: {str(target)!r} exists and is no empty folder. Name another."
            )
    return target
