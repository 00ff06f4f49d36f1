""".npz files: a zip of arrays, each with a header of one line. Nothing is unpickled."""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np

from refcurv.files.disk import is_addressable, reading
from refcurv.files.paths import one_line
from refcurv.judge.foreign.stored import Stored
from refcurv.law.checks import Array, RefcurvError, SchemaError

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER: Final = 10_000  # bytes; NumPy's own bound
_PACKING: Final = 1100
"""How many times shorter deflate makes a text at most: 258 bytes in 2 bits are 1032."""


def open_npz(path: Path) -> dict[str, Stored]:
    """The arrays of an .npz file by name; each is read when asked for.

    A header that declares more bytes than its member has, or a member that cannot have come from so
    few, is refused before anything is read.

    Proof: tests/test_foreign.py::test_a_bomb_does_not_burst, ::test_noise_is_refused_in_one_line
    """
    found: dict[str, Stored] = {}
    with _opened(path) as file:
        for info in file.infolist():
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise SchemaError(f"validate: {str(path)!r} holds {name!r:.100} twice.")
            if info.filename == name:
                continue  # no array
            dtype, shape, _ = _header(path, file, info)
            found[name] = Stored(_named(dtype), shape, _Reader(path, info.filename))
    return found


class _Reader:
    """Reads one member anew at each call."""

    __slots__ = ("member", "path")

    def __init__(self, path: Path, member: str) -> None:
        self.path, self.member = path, member

    def __call__(self) -> Array:
        with _opened(self.path) as file, file.open(self.member) as stream:
            dtype, shape, fortran, _ = _parse(stream)
            nbytes = dtype.itemsize * math.prod(shape)
            data = stream.read(nbytes)
            if len(data) != nbytes or stream.read(1):  # the last byte checks the checksum
                raise SchemaError(f"validate: {str(self.path)!r} changed while it was read.")
        array = np.frombuffer(data, dtype)
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip; whatever its contents provoke becomes one line."""
    try:
        with reading("validate", path) as opened, zipfile.ZipFile(opened) as file:
            yield file
    except RefcurvError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, TypeError,
        SyntaxError, RuntimeError, OverflowError, RecursionError, MemoryError, NotImplementedError,
    ) as error:  # fmt: skip
        raise SchemaError(
            f"validate: {str(path)!r} is no .npz file, or damaged: {one_line(error)}."
        ) from None


def _header(
    path: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    """dtype, shape and order of a member, which has just as many bytes as they need."""
    where = f"validate: {str(path)!r}: {info.filename!r:.100}"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SchemaError(f"{where} is packed in a way that NumPy does not write.")
    if info.file_size > _PACKING * info.compress_size + _MAX_HEADER:
        raise SchemaError(
            f"{where} is said to hold {info.file_size} bytes in {info.compress_size}."
        )
    with file.open(info) as stream:
        dtype, shape, fortran, begin = _parse(stream)
    fits = begin + dtype.itemsize * math.prod(shape) == info.file_size
    if dtype.hasobject or not fits or not is_addressable(shape, dtype.itemsize):
        raise SchemaError(
            f"{where} is said to be {shape} of {dtype}; it has {info.file_size - begin} bytes."
        )
    return dtype, shape, fortran


def _parse(stream: IO[bytes]) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """The header of an array: dtype, shape, Fortran's order?, and where its numbers begin."""
    start = stream.read(8)
    if start[:6] != _MAGIC or len(start) < 8:
        raise ValueError("a member is no array of NumPy's")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    about = ast.literal_eval(stream.read(length).decode("latin1").strip())
    if not isinstance(about, dict) or set(about) != {"descr", "fortran_order", "shape"}:
        raise ValueError("a header without dtype, order and shape")
    descr, shape = about["descr"], about["shape"]
    natural = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not natural or len(shape) > 8:
        raise ValueError(f"shape {shape!r:.60}")
    if not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?[a-zA-Z]\d*", descr):
        raise ValueError(f"arrays of {descr!r:.60} are not read (objects would run code)")
    if descr.lstrip("<>|=")[0] == "O":
        raise ValueError("arrays of objects are not read: they would run code")
    return np.dtype(descr), shape, bool(about["fortran_order"]), 8 + width + length


def _named(dtype: np.dtype[np.generic]) -> str:
    if dtype.kind in "SU":
        return "text"
    if dtype.kind == "V":
        return f"{dtype} (bfloat16? NumPy has none: save it as float32)"
    return str(dtype.name)
