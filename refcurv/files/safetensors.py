"""The safetensors format: eight bytes of length, a JSON header, the tensors' bytes. No torch.

The `safetensors` package is not used: it is an extra, and it gives NumPy no bfloat16. The format
has four rules, and each is checked. The header fits the file. Every dtype is known. A tensor has as
many bytes as its shape needs. All tensors together fill the file without gap or overlap, so that
there is no room for anything else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.files.disk import is_addressable, parse_json, reading, replacing
from refcurv.law.checks import Array, SchemaError

DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The format's names of dtypes → ours."""

OTHERS: Final = {
    **{name: 1 for name in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")},
    **{name: 2 for name in ("U16", "I16")},
    **{name: 4 for name in ("U32", "I32")},
    **{name: 8 for name in ("U64", "I64", "C64")},
}
"""Dtypes of masks and counters, in which no parameter is stored → bytes of an item."""

NUMBERS: Final = {
    "BOOL": "bool",
    **{
        f"{sign}{8 * n}": f"{kind}{8 * n}"
        for sign, kind in (("I", "int"), ("U", "uint"))
        for n in (1, 2, 4, 8)
    },
}
"""Those of OTHERS that NumPy has: masks and counters of other programs' files can be read."""

_MAX_HEADER: Final = 100_000_000  # the reference implementation's own bound
_MAX_AXES: Final = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint and where its bytes lie.

    `stored` is one of DTYPES' values, or a key of OTHERS for a tensor that is no parameter.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int


def raw_dtype(stored: str) -> np.dtype[Any]:
    """The dtype of the array that is read. NumPy has no bfloat16: its bits are read as uint16."""
    kind = "uint16" if stored == "bfloat16" else NUMBERS.get(stored, stored)
    return np.dtype(kind).newbyteorder("<")


def read_header(path: Path, who: str = "convert") -> list[Tensor]:
    """The tensors of one file in the order of their bytes; SchemaError for any broken rule."""
    return read_file(path, who)[0]


def read_file(path: Path, who: str) -> tuple[list[Tensor], dict[str, Any]]:
    """`read_header`, and the texts that the header holds besides."""
    where = f"{who}: {str(path)!r}"
    with reading(who, path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise SchemaError(
                f"{where} is a pointer of git-lfs, not the file: git lfs pull, or hf download."
            )
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise SchemaError(f"{where} is no safetensors file, or cut short. Download it again.")
        try:
            text = file.read(length).decode()
        except UnicodeDecodeError:
            raise SchemaError(f"{where}: the header is no UTF-8 text.") from None
    header = parse_json(f"{who}: the header of {str(path)!r}", text)
    texts = header.pop("__metadata__", None)
    tensors = [_tensor(where, path, 8 + length, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            raise SchemaError(f"{where}: tensor {tensor.name!r} leaves a gap or overlaps another.")
        end += tensor.nbytes
    if end != size:
        raise SchemaError(
            f"{where} has {size} bytes, its header describes {end}. Download it again."
        )
    return tensors, texts if isinstance(texts, dict) else {}


def _tensor(where: str, path: Path, start: int, name: str, entry: object) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SchemaError(f"{where}: tensor {name!r} must have just dtype, shape, data_offsets.")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in OTHERS):
        raise SchemaError(
            f"{where}: tensor {name!r} is of type {dtype!r:.40}; known are "
            f"{', '.join([*DTYPES, *OTHERS])}."
        )
    stored = DTYPES.get(dtype, dtype)
    shape, offsets = entry["shape"], entry["data_offsets"]
    itemsize = OTHERS.get(dtype) or raw_dtype(stored).itemsize
    if (
        not _naturals(shape)
        or len(shape) > _MAX_AXES
        or not _naturals(offsets)
        or len(offsets) != 2
        or (0 in shape and not is_addressable(shape, itemsize))
    ):
        raise SchemaError(
            f"{where}: tensor {name!r} has shape {shape!r:.80} at bytes {offsets!r:.80}."
        )
    nbytes = itemsize * math.prod(shape)
    if offsets[1] - offsets[0] != nbytes:
        raise SchemaError(
            f"{where}: tensor {name!r} of shape {shape} needs {nbytes} bytes; its offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}."
        )
    return Tensor(name, stored, tuple(shape), path, start + offsets[0], nbytes)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_tensor(tensor: Tensor, who: str = "convert") -> Array:
    """The stored numbers, or the bits of a bfloat16 as uint16."""
    array = np.empty(tensor.shape, dtype=raw_dtype(tensor.stored))
    with reading(who, tensor.path) as file:
        file.seek(tensor.begin)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != tensor.nbytes:
            raise SchemaError(f"{who}: {str(tensor.path)!r} became shorter while it was read.")
    return array


Rows = Sequence[tuple[str, str, tuple[int, ...]]]
"""Name, stored dtype and shape of each tensor of a file."""


def write_file(path: Path, tensors: Rows, read: Callable[[str], Array]) -> None:
    """Write the tensors to a file, whole or not at all; `read(name)` gives each one's raw array."""
    with replacing("export", path) as file:
        for chunk in _chunks(tensors, read):
            file.write(chunk)


def holds(path: Path, tensors: Rows, read: Callable[[str], Array]) -> bool:
    """Is the file at `path`, byte for byte, what `write_file` would write?"""
    with reading("export", path) as file:
        return all(file.read(len(c)) == c for c in _chunks(tensors, read)) and not file.read(1)


def _chunks(tensors: Rows, read: Callable[[str], Array]) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header, then tensor by tensor.

    The widest dtype comes first, so that every tensor is aligned to its own items.
    """
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    ordered = sorted(tensors, key=lambda item: -raw_dtype(item[1]).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored, shape in ordered:
        begin, end = end, end + raw_dtype(stored).itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": names[stored], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, stored, _shape in ordered:
        raw = np.asarray(read(name), dtype=raw_dtype(stored), order="C")
        yield raw.reshape(-1).view(np.uint8).data
