"""What lies at a path, by its first bytes and its names; never by a name's ending alone."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path
from typing import BinaryIO, Final

from refcurv.files import store
from refcurv.files.disk import HDF5, reading
from refcurv.files.paths import machine_faults, mode_of
from refcurv.judge.foreign.bergson import is_bergson
from refcurv.judge.foreign.kronfluence import is_kronfluence
from refcurv.judge.foreign.official import is_torch
from refcurv.law.checks import RefcurvError, SchemaError, StorageError

KNOWN: Final = (
    "Known are .npz, HDF5 and safetensors files with arrays LAYER/A and LAYER/G, refcurv's own "
    "factors, bases and weights, the official code's .pt, checkpoint directories, and folders of "
    "kronfluence and bergson"
)
_OTHERS: Final = (
    (b"\x93NUMPY", "is one array, an .npy; give an .npz with LAYER/A and LAYER/G"),
    (b"version https://git-lfs", "is a pointer of git-lfs, not the file: git lfs pull"),
    (b"\x1f\x8b", "is packed by gzip; unpack it first"),
    (b"GGUF", "is a model in the format GGUF, no factors; refcurv convert reads it"),
    (b"{", "looks like JSON, which holds no arrays"),
)
OURS: Final = {
    "refcurv-factors": "factors",
    "refcurv-basis": "basis",
    "refcurv-weights": "weights",
    "refcurv-trace": "trace",
}


def kind_of(path: Path) -> str:
    """The name of what lies at a path: "npz", "torch", "hdf5", "safetensors", or one below.

    "factors", "basis", "weights", "trace" (OURS), "checkpoint", "kronfluence", "bergson".

    Raises:
        SchemaError: anything else; it says what was found, and what is known.
    """
    mode = mode_of("validate", path)
    where = f"validate: {str(path)!r:.300}"
    if not mode:
        raise SchemaError(f"validate: there is nothing at {str(path)!r:.300}.")
    if stat.S_ISDIR(mode):
        return _of_folder(path)
    if not stat.S_ISREG(mode):
        raise SchemaError(f"{where} is no regular file.")
    with reading("validate", path) as file:
        start = file.read(32)
        file.seek(0)
        hdf5 = start.startswith(HDF5) or any(_at(file, 512 * 2**k) == HDF5 for k in range(4))
    if not start:
        raise SchemaError(f"{where} is empty.")
    if hdf5:
        return _of_hdf5(path, where)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _of_zip(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "torch"  # a bare pickle
    for magic, what in _OTHERS:
        if start.startswith(magic):
            raise SchemaError(f"{where} {what}. {KNOWN}.")
    raise SchemaError(f"{where} is of no known format. {KNOWN}.")


def _at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(len(HDF5))


def _of_hdf5(path: Path, where: str) -> str:
    ours = store.foreign_format(path)
    if ours is not None and ours in OURS:
        return OURS[ours]
    if ours is not None and ours in store.FORMATS:
        raise SchemaError(
            f"{where} is a {ours} file (written by {store.FORMATS[ours]}), which holds no factors. "
            f"{KNOWN}."
        )
    return "hdf5"


def _of_zip(path: Path) -> str:
    """A zip of torch has a data.pkl; any other is taken for an .npz, whose reader says why not."""
    try:
        with reading("validate", path) as opened, zipfile.ZipFile(opened) as file:
            names = file.namelist()
    except StorageError:
        raise
    except (RefcurvError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, KeyError):
        return "npz"
    return "torch" if any(name.endswith("data.pkl") for name in names) else "npz"


def _of_folder(folder: Path) -> str:
    where = f"validate: {str(folder)!r:.300}"
    with machine_faults("validate", folder):
        names = sorted(path.name for path in folder.iterdir())
        if not names:
            raise SchemaError(f"{where} is an empty folder.")
        if found := _its_kind(folder):
            return found
        if is_torch(folder):
            return "torch"
        inner = [p for p in _folders(folder) if _its_kind(p)]
        inner += [q for p in _folders(folder) for q in _folders(p) if _its_kind(q)]
    if inner:
        few = ", ".join(repr(str(path)) for path in inner[:3])
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        raise SchemaError(f"{where}: factors lie within, in {few}{more}. Give one of them.")
    if "config.json" in names:
        return "checkpoint"
    if any(name.startswith("scores_") for name in names):
        raise SchemaError(f"{where} holds scores of kronfluence, no factors. {KNOWN}.")
    few = ", ".join(f"{name!r:.60}" for name in names[:4]) + (" ..." if names[4:] else "")
    raise SchemaError(f"{where} is a folder with {few}: no known factors. {KNOWN}.")


def _its_kind(folder: Path) -> str | None:
    if is_kronfluence(folder):
        return "kronfluence"
    return "bergson" if is_bergson(folder) else None


def _folders(folder: Path, most: int = 100) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()][:most]
