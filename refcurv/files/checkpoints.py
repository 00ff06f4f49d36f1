"""A checkpoint directory as it lies on the disk: config.json, tensors, in one file or many.

A file is named plainly, inside the directory. If it is a link, as in the Hub's cache, it is
followed to its end, which must be a regular file.
"""

from __future__ import annotations

import errno
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from refcurv.files import safetensors
from refcurv.files.disk import file_sha256, parse_json, reading
from refcurv.files.mistaken import PICKLES, SHARD, no_config, no_weights
from refcurv.files.safetensors import Tensor
from refcurv.law.checks import SchemaError

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_MAX_TEXT: Final = 64_000_000
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_OTHER: Final = re.compile(r"adapter_.*|consolidated.*|optimizer.*|training_args.*")

BESIDE: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files of a tokenizer and of generation. They are no part of the model; others load them."""


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of a checkpoint by name, and the files with weights that were not read."""

    tensors: dict[str, Tensor]
    not_read: tuple[str, ...]


def inside(folder: Path, name: str) -> Path:
    """A regular file of the checkpoint, by its plain name; a link is followed to its end."""
    if not _FILE_NAME.fullmatch(name):
        raise SchemaError(f"convert: {name!r:.120} is no plain file name inside {str(folder)!r}.")
    path = folder / name
    link = f"is a link to {str(path.readlink())!r:.200}, " if path.is_symlink() else ""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SchemaError(f"convert: {str(path)!r} {link}which leads in a circle.") from None
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        if link:
            raise SchemaError(
                f"convert: {str(path)!r} {link}where there is nothing. Download it again."
            ) from None
        raise SchemaError(f"convert: there is no file {str(path)!r}.") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise SchemaError(f"convert: {str(path)!r} {link + 'which ' if link else ''}is {what}.")
    return path


def read_text(folder: Path, name: str) -> str:
    """A small text file of the checkpoint."""
    path = inside(folder, name)
    with reading("convert", path) as file:
        data = file.read(_MAX_TEXT + 1)
    try:
        if len(data) <= _MAX_TEXT:
            return data.decode()
    except UnicodeDecodeError:
        pass
    raise SchemaError(f"convert: {str(path)!r} is no UTF-8 text, or too long.")


def read_config_text(folder: Path) -> str:
    """The text of config.json. If there is none, the error says what the folder is instead."""
    if not there(folder / "config.json"):
        raise no_config(folder)
    return read_text(folder, "config.json")


def there(path: Path) -> bool:
    """Is there anything of this name? A link that leads nowhere counts."""
    return path.exists() or path.is_symlink()


def read_tensors(folder: Path) -> Found:
    """Every tensor of the checkpoint by its name, from one file or from the index's shards."""
    files = sorted(path.name for path in folder.iterdir())
    names = [name for name in files if name.endswith(".safetensors")]
    shard_of = _weight_map(folder, files) if there(folder / _INDEX) else None
    if shard_of is not None:
        tensors = _sharded(folder, shard_of)
    else:
        mine = [name for name in names if not _OTHER.fullmatch(name)]
        if _SINGLE not in names and (len(mine) != 1 or SHARD.fullmatch(mine[0])):
            raise no_weights(folder, mine or names)
        name = _SINGLE if _SINGLE in names else mine[0]
        tensors = {t.name: t for t in safetensors.read_header(inside(folder, name))}
    read = {tensor.path.name for tensor in tensors.values()}
    others = {name for name in files if name.endswith((*PICKLES, ".gguf"))}
    return Found(tensors, tuple(sorted((set(names) - read) | others)))


def beside(folder: Path) -> dict[str, str]:
    """The tokenizer's and generation files beside the weights, by name, with their SHA-256."""
    paths = [folder / name for name in BESIDE]
    return {path.name: file_sha256(path) for path in paths if path.is_file()}


def _weight_map(folder: Path, files: list[str]) -> dict[str, str] | None:
    """Tensor → shard, as the index says; None if the index is left over and its shards are gone.

    transformers' `save_pretrained` leaves the index when it replaces shards by model.safetensors.

    Proof: tests/test_huggingface.py::test_an_index_that_its_shards_left_behind
    """
    where = f"convert: {str(folder / _INDEX)!r}"
    shard_of = parse_json(where, read_text(folder, _INDEX)).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise SchemaError(f"{where} has no weight_map from tensor names to file names.")
    shards = set(shard_of.values())
    if _SINGLE not in files or _SINGLE in shards:
        return shard_of
    if here := sorted(shards & set(files)):
        raise SchemaError(
            f"{where} names {here[0]:.120} but not model.safetensors beside it. These are two sets "
            "of weights, of which transformers reads model.safetensors. Remove one."
        )
    return None


def _sharded(folder: Path, shard_of: dict[str, str]) -> dict[str, Tensor]:
    where = f"convert: {str(folder / _INDEX)!r}"
    tensors: dict[str, Tensor] = {}
    for shard, path in [(shard, inside(folder, shard)) for shard in sorted(set(shard_of.values()))]:
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
