"""Files of torch.save: a zip archive of one pickle and of storages. Read without torch.

`prefix/data.pkl` is the pickle (`pickles`), `prefix/data/KEY` the numbers of a storage, and
`prefix/byteorder` says how these lie. torch compresses nothing, so that each storage is a stretch
of the file. Nothing is extracted: a member's name is a key and never becomes a path.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np

from refcurv.files.bfloat16 import from_bfloat16
from refcurv.files.disk import reading
from refcurv.files.paths import input_path
from refcurv.judge.foreign.pickles import MAX_BYTES, Tensor, item_bytes, parse
from refcurv.law.checks import Array, SchemaError

_ZIP: Final = b"PK\x03\x04"
_OLD: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that begins a file of torch before 1.6."""
_ENCRYPTED: Final = 0x1 | 0x40
_UTF_8: Final = 0x800
_CHUNK: Final = 2**20
_SAVE: Final = "Load it where you trust it, and save anew: torch.save(torch.load(path), new_path)."


@dataclass(frozen=True, slots=True)
class _Member:
    """A stretch of the file, and what CRC-32 its bytes must have."""

    begin: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A file of torch.save, opened.

    Fields:
        path: where it is. value: what was saved, as `pickles.parse` gives it.
        members: key of each storage → its stretch. order: "<" or ">", of its items' bytes.
        checked: the keys of which the CRC was seen to hold.
    """

    path: Path
    value: Any
    members: Mapping[str, _Member]
    order: Literal["<", ">"]
    checked: set[str] = field(default_factory=set)


def is_saved(path: Path) -> bool:
    """Is this regular file from torch.save, or a pickle? Asked of its bytes, not of its name."""
    with reading("validate", path) as file:
        start = file.read(30)
        if start[:4] == _ZIP and len(start) == 30:
            first = file.read(int.from_bytes(start[26:28], "little"))
            return first.endswith(b"/data.pkl") or any(
                name.endswith("/data.pkl") for name in _names(path)
            )
    return start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and start[4:8] != bytes(4)


def _names(path: Path) -> list[str]:
    try:
        with reading("validate", path) as opened, zipfile.ZipFile(opened) as archive:
            return archive.namelist()
    except _NO_ZIP:
        return []


_NO_ZIP: Final = (
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,
    OverflowError,
    EOFError,
    struct.error,
)
"""What zipfile raises for bytes that are no zip archive."""


def open_saved(path: str | os.PathLike[str]) -> Saved:
    """Read the pickle of a file, and find its storages; these are read by `read`.

    Raises:
        SchemaError: torch's format before 1.6, a bare pickle, or an archive that torch does not
            write: damaged, compressed, encrypted, with two members of one name or place.

    Proof: tests/test_foreign_pickles.py::test_hand_made_bytes_are_read,
        tests/test_foreign_pickles.py::test_archives_that_torch_does_not_write
    """
    found = input_path(path)
    where = f"validate: {str(found)!r:.200}"
    with reading("validate", found) as file:
        start = file.read(len(_OLD))
        if start[:4] != _ZIP:
            what = "torch's format before 1.6" if start == _OLD else "a bare pickle"
            raise SchemaError(f"{where} is {what}, which is not read. {_SAVE}")
        members = _members(where, file)
        pickled = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise SchemaError(f"{where} holds {len(pickled)} pickles NAME/data.pkl; one is needed.")
        prefix = pickled[0][: -len("data.pkl")]
        if members[pickled[0]].nbytes > MAX_BYTES:
            raise SchemaError(
                f"{where}: its pickle has {members[pickled[0]].nbytes} bytes; at most "
                f"{MAX_BYTES} are read. {_SAVE}"
            )
        data = _whole(where, file, members[pickled[0]])
        order: Literal["<", ">"] = "<"
        if (said := members.get(f"{prefix}byteorder")) is not None:
            text = _whole(where, file, said)
            if text not in (b"little", b"big"):
                raise SchemaError(f"{where}: its byteorder is {text!r:.40}, not little or big.")
            order = ">" if text == b"big" else "<"
    inner = f"{prefix}data/"
    storages = {n[len(inner) :]: m for n, m in members.items() if n.startswith(inner)}
    value = parse(where, data, {key: member.nbytes for key, member in storages.items()})
    return Saved(found, value, storages, order)


def _members(where: str, file: BinaryIO) -> dict[str, _Member]:
    """Name of each member → its stretch; all of them lie in the file and apart from one another."""
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except _NO_ZIP:
        raise SchemaError(
            f"{where} is a damaged zip archive, or cut short. Copy or save it again."
        ) from None
    found: dict[str, _Member] = {}
    end = 0
    for entry in sorted(entries, key=lambda one: one.header_offset):
        shown = f"{where}: its member {entry.filename!r:.80}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise SchemaError(f"{shown} is compressed, which torch does not do. {_SAVE}")
        if entry.flag_bits & _ENCRYPTED:
            raise SchemaError(f"{shown} is encrypted, which torch does not do. {_SAVE}")
        if entry.filename in found:
            raise SchemaError(f"{shown} occurs twice. {_SAVE}")
        begin = _begin(file, entry)
        if begin is None or entry.header_offset < end or begin + entry.file_size > size:
            raise SchemaError(
                f"{shown} is not where the archive says, or lies in another. Copy or save it again."
            )
        end = begin + entry.file_size
        found[entry.filename] = _Member(begin, entry.file_size, entry.CRC)
    return found


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin: after its own header, and the name and padding in it.

    None where its own header is not there, or has another name than the archive's directory: then
    two readers could see two files.
    """
    if entry.header_offset < 0:
        return None
    file.seek(entry.header_offset)
    start = file.read(30)
    if len(start) != 30 or start[:4] != _ZIP:
        return None
    length, padding = struct.unpack("<HH", start[26:30])
    name = file.read(length)
    if name != entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437"):
        return None
    return entry.header_offset + 30 + int(length) + int(padding)


def _whole(where: str, file: BinaryIO, member: _Member) -> bytes:
    """The bytes of a member, whose CRC is checked."""
    file.seek(member.begin)
    data = file.read(member.nbytes)
    if len(data) != member.nbytes or zlib.crc32(data) != member.crc:
        raise _damaged(where)
    return data


def _damaged(where: str) -> SchemaError:
    return SchemaError(
        f"{where} is damaged: its bytes do not have the CRC that it says. Copy it again; save it "
        "again if torch.serialization.set_crc32_options(False) was called before."
    )


def _check(where: str, file: BinaryIO, member: _Member) -> None:
    """`_whole` of a storage of which a part is wanted; a chunk is held at a time."""
    file.seek(member.begin)
    crc, left = 0, member.nbytes
    while left and (chunk := file.read(min(left, _CHUNK))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if left or crc != member.crc:
        raise _damaged(where)


def read(saved: Saved, tensor: Tensor) -> Array:
    """The numbers of a tensor, in its shape; a bfloat16 as a float32.

    Raises:
        SchemaError: the file is damaged, or changed since it was opened.

    Proof: tests/test_foreign_pickles.py::test_views_are_read_as_numpy_reads_them
    """
    where = f"validate: {str(saved.path)!r:.200}"
    key, width = tensor.storage.key, item_bytes(tensor.dtype)
    member = saved.members[key]
    with reading("validate", saved.path) as file:
        if tensor.span == tensor.storage.length:
            data = _whole(where, file, member)
        else:
            if key not in saved.checked:
                _check(where, file, member)
            file.seek(member.begin + tensor.offset * width)
            data = file.read(tensor.span * width)
    saved.checked.add(key)
    if len(data) != tensor.span * width:
        raise _damaged(where)
    raw = {"bfloat16": "uint16", "bool": "uint8"}.get(tensor.dtype, tensor.dtype)
    dtype = np.dtype(raw).newbyteorder(saved.order)
    strides = tuple(stride * width for stride in tensor.strides)
    if not tensor.span:
        return np.zeros(tensor.shape, "float32" if tensor.dtype == "bfloat16" else tensor.dtype)
    view: Array = np.ndarray(tensor.shape, dtype, data, 0, strides)  # NumPy checks the bounds again
    if tensor.dtype == "bfloat16":
        return from_bfloat16(view)
    if tensor.dtype == "bool":
        return np.asarray(view != 0)
    return view.astype(dtype.newbyteorder("="))
