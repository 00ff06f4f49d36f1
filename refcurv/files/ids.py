"""Files of token ids: .npy, and .bin as nanoGPT and llm.c write them; read with suspicion."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from refcurv.files.disk import read_bytes, reading
from refcurv.files.paths import mode_of, one_line
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    RangeError,
    SchemaError,
    ShapeError,
    require_choice,
)

WHO: Final = "build_corpus"
"""The name of the command, in errors."""

MAX_ID: Final = 2**31 - 1
"""The largest id: a corpus holds int32."""

TOKEN_DTYPES: Final = ("uint8", "uint16", "uint32", "uint64", "int32", "int64")
"""The dtypes of ids in a .bin, little-endian."""

SHARDS: Final = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""llm.c's shards: magic → (version, dtype of the ids).

A shard is a header of 256 int32, the third of them the number of ids, and then the ids.
"""

_HEADER: Final = 256 * 4  # bytes of a shard's header
_EVALUATION: Final = 20240522  # llm.c's magic of files that are no plain ids
_MEGATRON: Final = b"MMIDIDX"  # how the index beside a Megatron .bin begins


def require_text(where: str, key: str, text: str) -> str:
    """A text without half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SchemaError(f"{WHO}: {where}: {key!r}: {one_line(error)}.") from None
    return text


def npy_rows(path: Path) -> Iterator[tuple[str, Array]]:
    """Each document's name in an error, and its ids. A (T,) array is one document, (N, T) are N."""
    where = repr(str(path))
    with reading("open", path) as file:
        array = _read_npy(file, where)
    _require_ids(where, array)
    for n, row in enumerate(np.atleast_2d(array).astype(np.int32)):
        yield (where if array.ndim == 1 else f"{where} row {n}"), row


def read_bin(path: Path, token_dtype: str | None, vocabulary: int | None) -> Array:
    """The ids of a .bin: those of a shard of llm.c, or else the whole file as `token_dtype`.

    A dtype that is too narrow for the tokenizer's vocabulary is refused, if that is known: larger
    ids would have been written as other ones.
    """
    where = repr(str(path))
    data = read_bytes("open", path)
    _require_plain(path, where)
    dtype, data = _opened(where, data, token_dtype)
    if vocabulary and vocabulary - 1 > (top := np.iinfo(dtype).max):
        raise ConventionError(
            f"{WHO}: {where} holds {dtype}, and the tokenizer has {vocabulary} ids: those beyond "
            f"{top} were lost in writing. Write it anew, or leave the tokenizer out."
        )
    if len(data) % dtype.itemsize:
        raise SchemaError(f"{WHO}: {where} holds {len(data)} bytes, no whole number of {dtype}.")
    ids = np.frombuffer(data, dtype.newbyteorder("<"))
    _require_ids(where, ids)
    return ids.astype(np.int32)


def _opened(
    where: str, data: bytes, token_dtype: str | None
) -> tuple[np.dtype[np.integer[Any]], bytes]:
    """The dtype of the ids, and their bytes; refuse a file whose dtype is not certain."""
    magic, version, count = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic == _EVALUATION:
        raise SchemaError(f"{WHO}: {where} holds llm.c's questions, not plain ids. Give a .jsonl.")
    if magic not in SHARDS:
        if token_dtype is None:
            raise ConventionError(
                f"{WHO}: {where} does not say what it holds. If it is bare token ids, give their "
                "--token-dtype: uint16 as nanoGPT writes them, uint32 for larger vocabularies."
            )
        return np.dtype(require_choice(WHO, "token_dtype", token_dtype, TOKEN_DTYPES)), data
    known, own = SHARDS[magic]
    if version != known:
        raise SchemaError(f"{WHO}: {where} is llm.c's, of version {version}; {known} is known.")
    if token_dtype not in (None, own):
        raise ConventionError(
            f"{WHO}: {where} is a shard of llm.c that holds {own}, and token_dtype is "
            f"{token_dtype!r}. Give it in a run of its own, without --token-dtype."
        )
    dtype, data = np.dtype(own), data[_HEADER:]
    if count * dtype.itemsize != len(data):
        raise SchemaError(
            f"{WHO}: {where} declares {count} ids of {dtype}, and holds {len(data)} bytes of "
            "them. Copy or make it again."
        )
    return dtype, data


def _require_plain(path: Path, where: str) -> None:
    """Refuse the .bin of a Megatron data set: its documents are listed in the .idx beside it."""
    index = path.with_suffix(".idx")
    if stat.S_ISREG(mode_of("open", index)):
        with reading("open", index) as file:
            if file.read(len(_MEGATRON)) == _MEGATRON:
                raise SchemaError(
                    f"{WHO}: {where}: its documents are told by {index.name!r}, which is not "
                    "read. Write a .jsonl with an input_ids a line."
                )


def _require_ids(where: str, array: Array) -> None:
    if array.size and (array.min() < 0 or array.max() > MAX_ID):
        index = [int(i) for i in np.argwhere((array < 0) | (array > MAX_ID))[0]]
        raise RangeError(f"{WHO}: {where}: {index} is no id: {array[tuple(index)]}.")


def _read_npy(file: BinaryIO, where: str) -> Array:
    """The integers of a .npy file; its size must fit its header, and objects are never read."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers of Python 2
            shape, fortran, dtype = headers[np.lib.format.read_magic(file)](file)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header with Python's own parser
        raise SchemaError(
            f"{WHO}: {where} is no .npy file: {one_line(error)}. If it is bare token ids, as "
            "np.memmap writes them, name it .bin and give their --token-dtype."
        ) from None
    if dtype.kind not in "iu":
        raise DTypeError(f"{WHO}: {where} must hold integers; got {dtype}.")
    if len(shape) not in (1, 2):
        raise ShapeError(f"{WHO}: {where} must be (T,) or (N, T); got {shape}.")
    there = os.fstat(file.fileno()).st_size - file.tell()
    if not there and 0 in shape:
        raise EmptyError(f"{WHO}: {where} holds no token: its shape is {shape}.")
    if min(shape) < 1 or math.prod(shape) * dtype.itemsize != there:
        raise SchemaError(
            f"{WHO}: {where} declares {shape} of {dtype}, and holds {there} bytes. Copy or make "
            "it again."
        )
    data = np.frombuffer(file.read(there), dtype)
    return data.reshape(shape, order="F" if fortran else "C")
