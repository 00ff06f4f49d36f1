"""Named arrays and attributes in HDF5: written atomically, read with suspicion. The door to h5py.

A file is a root with the attributes `format`, `version`, `provenance` and those of its kind, and
datasets named with `/` where Python has dots. Each dataset is contiguous and little-endian and
carries the SHA-256 of its C-order bytes. Attributes are scalars or fixed-length UTF-8 strings; the
root's `sha256` is that of everything declared (`declared`): names, shapes, dtypes, attributes.

A file is input like any other: everything that it declares is checked before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, TypeVar

import h5py
import numpy as np

from refcurv.files.bfloat16 import from_bfloat16
from refcurv.files.disk import (
    WRITING,
    PathLike,
    file_sha256,
    identity,
    input_path,
    machine_faults,
    one_line,
    parse_json,
    replacing,
)
from refcurv.files.provenance import machine, provenance
from refcurv.law.checks import (
    PART,
    Array,
    ChecksumError,
    ConventionError,
    DTypeError,
    NameUnknownError,
    RefcurvError,
    SchemaError,
    require_finite,
)

__all__ = [
    "FORMATS",
    "VERSION",
    "Entry",
    "Header",
    "Info",
    "Source",
    "declared",
    "fact",
    "file_sha256",
    "machine",
    "open_file",
    "provenance",
    "read",
    "require_entry",
    "sha256",
    "to_name",
    "to_path",
    "verify",
    "write",
]

Scalar = str | int | float

VERSION: Final = 2
"""Of the files that are written. Version 1 lacks the root's `sha256`, and is read as well."""

FORMATS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "refcurv-weights": "`refcurv convert` or rc.save",
        "refcurv-corpus": "`refcurv corpus` or rc.save_corpus",
        "refcurv-factors": "`refcurv collect`",
        "refcurv-basis": "`refcurv decompose`",
    }
)
"""The kinds of file, and what writes each."""

BFLOAT16: Final = "bfloat16"
"""The one encoding: a uint16 dataset whose attribute `encoding` says so."""

_TYPES: Final = {
    "float16": h5py.h5t.IEEE_F16LE,
    "float32": h5py.h5t.IEEE_F32LE,
    "float64": h5py.h5t.IEEE_F64LE,
    "int8": h5py.h5t.STD_I8LE,
    "int16": h5py.h5t.STD_I16LE,
    "int32": h5py.h5t.STD_I32LE,
    "int64": h5py.h5t.STD_I64LE,
    "uint8": h5py.h5t.STD_U8LE,
    "uint16": h5py.h5t.STD_U16LE,
    "uint32": h5py.h5t.STD_U32LE,
    "uint64": h5py.h5t.STD_U64LE,
}
_LAYOUTS: Final = {
    h5py.h5d.CHUNKED: "chunked",
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.VIRTUAL: "virtual",
}
_MAX_DEPTH: Final = 16
_MAX_OBJECTS: Final = 200_000
_MAX_AXES: Final = 8
_MAX_ATTRIBUTES: Final = 64
_MAX_TEXT: Final = 1 << 24  # bytes in one attribute; a configuration or a provenance has thousands


@dataclass(frozen=True, slots=True)
class Entry:
    """One array on its way into a file: dotted name, array, scalar attributes."""

    name: str
    array: Array
    attributes: Mapping[str, Scalar] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Info:
    """What a file declares about one dataset. `attributes` are those beyond sha256 and encoding."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    encoding: str
    nbytes: int
    attributes: Mapping[str, Scalar]

    @classmethod
    def of(
        cls, shape: tuple[int, ...], dtype: str, nbytes: int, attributes: Mapping[str, Scalar]
    ) -> Info:
        """From all attributes of a dataset, sha256 and encoding among them."""
        rest = dict(attributes)
        checksum, encoding = rest.pop("sha256", None), rest.pop("encoding", "")
        return cls(shape, dtype, str(checksum), str(encoding), nbytes, MappingProxyType(rest))

    @property
    def stored(self) -> str:
        """The dtype that the numbers have: the encoding if there is one, else the dtype."""
        return self.encoding or self.dtype


@dataclass(frozen=True, slots=True)
class Header:
    """A file that passed every check: what it is, what it holds, and which file it was.

    `attributes` are the root's beyond format, version and provenance; `entries` lists the datasets
    in the order in which they lie in the file; `identity` changes when the file is replaced.
    """

    path: str
    format: str
    version: int
    attributes: Mapping[str, Scalar]
    provenance: Mapping[str, Any]
    entries: Mapping[str, Info]
    identity: tuple[int, ...]


class Source(Mapping[str, Any]):
    """What a record was read from: path, header, provenance, and sha256, hashed when asked for.

    Proof: tests/test_reports_files.py::test_a_change_within_a_tick_of_the_clock_is_noticed
    """

    __slots__ = ("_known",)
    _keys = ("path", "header", "provenance", "sha256")

    def __init__(self, header: Header) -> None:
        self._known: dict[str, Any] = {
            "path": header.path, "header": header, "provenance": header.provenance
        }  # fmt: skip

    def __getitem__(self, key: str) -> Any:
        if key == "sha256" and key not in self._known:
            header = self._known["header"]
            sha256 = file_sha256(header.path)
            if open_file(header.path) != header:  # the clock's ticks may hide a change: not this
                raise SchemaError(_replaced("sha256", header.path))
            self._known[key] = sha256
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def inputs(*sources: Mapping[str, Any]) -> dict[str, str]:
    """{file name: sha256} of the records that came from files, for the next file's provenance."""
    return {Path(s["path"]).name: s["sha256"] for s in sources if "path" in s}


# ------------------------------------------------------------------ names, checksums, texts


def to_path(name: str) -> str:
    """Dotted name → path in the file; ConventionError unless every part is a plain word."""
    parts = name.split(".")
    if len(parts) > _MAX_DEPTH or not all(PART.fullmatch(part) for part in parts):
        raise ConventionError(
            f"write: {name!r} cannot name a dataset: at most {_MAX_DEPTH} parts joined by dots, "
            "each 1 to 100 of the characters A-Z a-z 0-9 _ + -."
        )
    return "/".join(parts)


def to_name(path: str) -> str:
    """Path in the file → dotted name, the reverse of `to_path`."""
    return path.strip("/").replace("/", ".")


def sha256(array: Array) -> str:
    """SHA-256 of an array's C-order little-endian bytes, in hexadecimal."""
    return hashlib.sha256(_little_endian(array).reshape(-1).view(np.uint8).data).hexdigest()


def declared(root: Mapping[str, Scalar], entries: Mapping[str, Info]) -> str:
    """SHA-256 of all that a file declares: the root's `sha256`.

    Definition
        Fields, each as its length in bytes in decimal, ":", its bytes, "," (a netstring): for the
        root, whose name is empty, and then for every dataset by ascending dotted name: the name; of
        a dataset its dtype and its shape, as "3,4"; and for every attribute by ascending name,
        without the root's sha256: its name and its value, a text in UTF-8, an integer in decimal, a
        float as the 16 hexadecimal digits of its big-endian IEEE 754 double.

    Proof: tests/test_store.py::test_every_bit_of_an_attribute_is_checked
    """
    made = hashlib.sha256()

    def field(value: Scalar) -> None:
        if isinstance(value, float):
            value = struct.pack(">d", value).hex()
        data = str(value).encode()
        made.update(b"%d:%b," % (len(data), data))

    def object(name: str, facts: tuple[str, ...], attributes: Mapping[str, Scalar]) -> None:
        for fact in (name, *facts):
            field(fact)
        for key in sorted(attributes):
            field(key)
            field(attributes[key])

    object("", (), root)
    for name in sorted(entries):
        info = entries[name]
        known = {"sha256": info.sha256} | ({"encoding": info.encoding} if info.encoding else {})
        shape = ",".join(map(str, info.shape))
        object(name, (info.dtype, shape), {**info.attributes, **known})
    return made.hexdigest()


def _little_endian(array: Array) -> Array:
    array = np.asarray(array)
    if array.dtype.name not in _TYPES:
        raise DTypeError(f"write: files hold {', '.join(_TYPES)}; got {array.dtype}.")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _replaced(who: str, path: str) -> str:
    return f"{who}: {path!r} was replaced or changed after it was opened. Start again with it."


# ------------------------------------------------------------------ writing


class _Sink:
    """The file that HDF5 writes to: it keeps the first failure to itself and never fails.

    HDF5 does not survive a write that fails: it cannot close the file, retries at exit and dies
    there by SIGSEGV (seen with h5py 3.16, HDF5 2.0, under RLIMIT_FSIZE). After a failure this
    file takes everything and keeps nothing; `check` then raises what happened. Ctrl-C is such a
    failure: while HDF5 works it is only noted (`shielded`), since it would leave h5py's callbacks
    as a RuntimeError.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._failure: BaseException | None = None

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Within, an interrupt becomes this file's failure, and what follows from one is silent."""

        def note(_number: int, _frame: object) -> None:
            self._failure = self._failure or KeyboardInterrupt()

        main = threading.current_thread() is threading.main_thread()  # no other meets interrupts
        before = signal.signal(signal.SIGINT, note) if main else None
        try:
            yield
        except Exception:
            if self._failure is None:  # else HDF5 missed what this file did not keep
                raise
        finally:
            if main:
                signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self._failure is None and done < len(view):
                done += self._raw.write(view[done:])
        except BaseException as failure:
            self._failure = failure
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            if self._failure is None:
                return self._raw.truncate(size)
        except BaseException as failure:
            self._failure = failure
        return size or 0

    def read(self, size: int = -1) -> bytes:
        return self._raw.read(size)

    def readinto(self, buffer: Any) -> int:
        return self._raw.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def flush(self) -> None:
        """Nothing is buffered; `write` of the module syncs at the end."""


def write(
    path: PathLike,
    *,
    format: str,
    attributes: Mapping[str, Scalar],
    arrays: Iterable[Entry],
    provenance: Mapping[str, Any],
) -> None:
    """Write a file, whole or not at all: a temporary one beside it takes its place at the end.

    Args:
        path: The file; one that exists is replaced. A symbolic link is followed.
        format: One of FORMATS.
        attributes: Root attributes besides format, version and provenance.
        arrays: Entries; may be a generator, so that one array at a time is in memory.
        provenance: JSON values, usually from `provenance()`.

    Raises:
        ConventionError: A name that is not plain, or occurs twice.
        DTypeError: An array of another dtype than integers and floats of 1 to 8 bytes.
        SchemaError: The folder does not exist, or the path is no regular file.
        StorageError: Disk full, no permission, write error. The old file, if any, is untouched.
    """
    root: dict[str, Scalar] = {"format": format, "version": VERSION, **attributes}
    root["provenance"] = json.dumps(dict(provenance), ensure_ascii=False, allow_nan=False)
    with replacing("write", path) as raw:
        _fill(raw, path, root, arrays)


def _fill(
    raw: BinaryIO, target: PathLike, root: Mapping[str, Scalar], arrays: Iterable[Entry]
) -> None:
    """The file's bytes. An array is made, checked and hashed outside HDF5, then handed to it."""
    sink = _Sink(raw)
    found: dict[str, Info] = {}
    taken: set[str] = set()
    with sink.shielded():
        file = h5py.File(sink, "w", libver=("v108", "v108"))
    with machine_faults("write", target, WRITING):
        sink.check()
    try:
        for entry in arrays:
            _claim(entry.name, taken)
            array = _little_endian(entry.array)
            about = {"sha256": sha256(array), **_written(entry.attributes)}
            found[entry.name] = Info.of(array.shape, array.dtype.name, array.nbytes, about)
            with sink.shielded():
                dataset = file.create_dataset(to_path(entry.name), data=array)
                _write_attributes(dataset, about)
            with machine_faults("write", target, WRITING):
                sink.check()
        root = _written(root)
        with sink.shielded():
            _write_attributes(file, {**root, "sha256": declared(root, found)})
    finally:
        with sink.shielded():
            file.close()
    with machine_faults("write", target, WRITING):
        sink.check()


def _claim(name: str, taken: set[str]) -> None:
    """Refuse a name that was used, or that is a group already, or lies inside a dataset."""
    path = to_path(name)
    above = {path[:i] + "/" for i, letter in enumerate(path) if letter == "/"}
    if path in taken or path + "/" in taken or any(group[:-1] in taken for group in above):
        raise ConventionError(f"write: {name!r} occurs twice, or is inside or above another name.")
    taken |= above | {path}


def _written(attributes: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Attributes as they will be read: half a character in a text becomes its JSON escape."""

    def plain(value: Scalar) -> Scalar:
        if isinstance(value, str):
            return value.encode(errors="backslashreplace").decode()
        return float(value) if isinstance(value, float | np.floating) else int(value)

    return {key: plain(value) for key, value in attributes.items()}


def _write_attributes(where: Any, attributes: Mapping[str, Scalar]) -> None:
    for key, value in attributes.items():
        if isinstance(value, str):
            data = value.encode()
            kind = h5py.string_dtype("utf-8", max(1, len(data)))
            where.attrs.create(key, np.array(data, dtype=kind), dtype=kind)
        else:
            where.attrs.create(key, value, dtype="<f8" if isinstance(value, float) else "<i8")


# ------------------------------------------------------------------ opening


def open_file(path: PathLike, *, format: str | None = None) -> Header:
    """Open a file and check all that it declares, without reading any array.

    Args:
        path: The file.
        format: What it must be, one of FORMATS; None accepts each of them.

    Returns:
        Its Header.

    Raises:
        SchemaError: It does not exist, is damaged, foreign, of another format or version, or
            holds what a refcurv file never does: links other than hard ones, two links to one
            object, chunks, compression, external or virtual storage, other types, wrong sizes.
        StorageError: It cannot be read (permission, read error).
    """
    found = input_path(path)
    with machine_faults("open", found):
        which = identity(found)
    with _opened("open", found) as file:
        root = _attributes(found, "the root", file)
        checksum = root.pop("sha256", None)
        everything = dict(root)
        version, made = _require_format(found, root, format), root.pop("provenance")
        kind = str(root.pop("format"))
        entries = _entries(found, file)
    if (version > 1 or checksum is not None) and checksum != declared(everything, entries):
        raise ChecksumError(
            f"open: {str(found)!r}: its attributes, names or shapes do not match their SHA-256. "
            "The file was damaged or edited after it was written; copy or make it again."
        )
    return Header(
        path=str(found),
        format=kind,
        version=version,
        attributes=MappingProxyType(root),
        provenance=MappingProxyType(parse_json("open", f"{str(found)!r}: provenance", str(made))),
        entries=MappingProxyType(entries),
        identity=which,
    )


@contextmanager
def _opened(who: str, path: Path) -> Iterator[Any]:
    """The HDF5 file, read-only; whatever HDF5 says about its contents becomes one line.

    No locks: a file of ours is never changed in place, only replaced.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except RefcurvError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:
            with machine_faults(who, path):
                raise
        raise SchemaError(
            f"{who}: {str(path)!r} is not HDF5, or damaged: {one_line(error)}. "
            "Copy or make it again."
        ) from error


def _require_format(path: Path, root: dict[str, Scalar], format: str | None) -> int:
    where = f"open: {str(path)!r}"
    kind = root.get("format")
    if kind not in FORMATS:
        raise SchemaError(
            f"{where} is HDF5 but not a refcurv file: its attribute 'format' is {kind!r}; known "
            f"are {', '.join(FORMATS)}."
        )
    if format is not None and kind != format:
        raise SchemaError(
            f"{where} is a {kind} file (written by {FORMATS[str(kind)]}), but {format} is needed "
            f"here (written by {FORMATS[format]})."
        )
    version = root.pop("version", None)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise SchemaError(
            f"{where} has version {version!r}; this refcurv reads 1 to {VERSION}. Was it written "
            "by a newer one?"
        )
    if not isinstance(root.get("provenance"), str):
        raise SchemaError(f"{where} has no text attribute 'provenance' (JSON; '{{}}' will do).")
    return version


def _attributes(path: Path, what: str, node: Any) -> dict[str, Scalar]:
    """The attributes of one object: few, scalar, of bounded size."""
    where = f"open: {str(path)!r}: {what}"
    if h5py.h5a.get_num_attrs(node.id) > _MAX_ATTRIBUTES:
        raise SchemaError(f"{where} has more than {_MAX_ATTRIBUTES} attributes.")
    found: dict[str, Scalar] = {}
    for key in node.attrs:
        attribute = node.attrs.get_id(key)
        kind = attribute.get_type()
        if isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
            # HDF5 keeps these in a heap without checksums, and a damaged heap can hang it
            raise SchemaError(
                f"{where} has an attribute {key!r} of variable length; write texts with a fixed "
                "length (in h5py: numpy.bytes_)."
            )
        plain = (h5py.h5t.TypeStringID, h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)
        scalar = type(kind) in plain and attribute.shape == ()
        if not scalar or attribute.get_storage_size() > _MAX_TEXT:
            raise SchemaError(
                f"{where} has an attribute {key!r} that is no text or number of at most "
                f"{_MAX_TEXT} bytes."
            )
        value = node.attrs[key]
        found[key] = value.decode() if isinstance(value, bytes) else value.item()
    return found


def _entries(path: Path, file: Any) -> dict[str, Info]:
    """Every dataset below the root, in the order in which they lie in the file."""
    found: list[tuple[int, int, str, Info]] = []
    for inner, dataset in _datasets(path, file):
        info = _info(path, inner, dataset)
        found.append((dataset.id.get_offset() or 0, info.nbytes, to_name(inner), info))
    found.sort(key=lambda item: item[:3])
    size, end = path.stat().st_size, 0
    for offset, nbytes, name, _ in found:
        if nbytes and offset < end:
            raise SchemaError(f"open: {str(path)!r}: dataset {name!r} overlaps another one.")
        end = max(end, offset + nbytes)
    if end > size:
        raise SchemaError(
            f"open: {str(path)!r} declares data up to byte {end} but has {size}: it is cut short. "
            "Copy or make it again."
        )
    return {name: info for _, _, name, info in found}


def _datasets(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    """Walk the tree: hard links only, each object met once, so that no cycle is entered."""
    seen = {h5py.h5o.get_info(file.id).addr}
    waiting = [("", file)]
    while waiting:
        above, group = waiting.pop()
        for part in group:
            inner = f"{above}/{part}" if above else part
            node = _member(path, group, part, inner)
            address = h5py.h5o.get_info(node.id).addr
            if address in seen:
                raise SchemaError(f"open: {str(path)!r}: two links lead to the object {inner!r}.")
            seen.add(address)
            if len(seen) > _MAX_OBJECTS or inner.count("/") >= _MAX_DEPTH:
                raise SchemaError(
                    f"open: {str(path)!r}: more than {_MAX_OBJECTS} objects or {_MAX_DEPTH} levels."
                )
            if isinstance(node, h5py.Dataset):
                yield inner, node
            else:
                waiting.append((inner, node))


def _member(path: Path, group: Any, part: str, inner: str) -> Any:
    """The group or dataset behind one hard link; nothing else is followed."""
    where = f"open: {str(path)!r}: {inner!r}"
    if not PART.fullmatch(part):
        raise SchemaError(f"{where} is no plain name (A-Z a-z 0-9 _ + -, at most 100 of them).")
    link = group.get(part, getlink=True)
    if not isinstance(link, h5py.HardLink):
        kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
        raise SchemaError(f"{where} is {kind} link; only data inside the file itself is read.")
    node = group[part]
    if not isinstance(node, h5py.Group | h5py.Dataset):
        raise SchemaError(f"{where} is a {type(node).__name__}; only groups and datasets are read.")
    return node


def _info(path: Path, inner: str, dataset: Any) -> Info:
    """What a dataset declares, checked: plain type, contiguous storage of just its size."""
    where = f"open: {str(path)!r}: dataset {to_name(inner)!r}"
    dtype = _dtype(where, dataset.id.get_type())
    plist, shape = dataset.id.get_create_plist(), dataset.shape
    layout = plist.get_layout()
    if layout != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        kind = _LAYOUTS.get(layout, "stored in another file, or filtered,")
        raise SchemaError(f"{where} is {kind}; write it contiguous, without compression.")
    if shape is None or len(shape) > _MAX_AXES:
        raise SchemaError(f"{where} must have between 0 and {_MAX_AXES} axes; got shape {shape}.")
    nbytes = int(np.dtype(dtype).itemsize)
    for length in shape:
        nbytes *= int(length)
    if dataset.id.get_storage_size() != nbytes:
        raise SchemaError(
            f"{where} declares {nbytes} bytes of shape {shape} but stores "
            f"{dataset.id.get_storage_size()}. Was it written at all?"
        )
    attributes = _attributes(path, f"dataset {to_name(inner)!r}", dataset)
    checksum, encoding = attributes.get("sha256"), attributes.get("encoding", "")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise SchemaError(f"{where} has no attribute 'sha256' of 64 lowercase hexadecimal digits.")
    if encoding not in ("", BFLOAT16) or (encoding and dtype != "uint16"):
        raise SchemaError(
            f"{where}, {dtype}, has encoding {encoding!r}; known: bfloat16 in uint16."
        )
    return Info.of(tuple(map(int, shape)), dtype, nbytes, attributes)


def _same(one: Info, other: Info) -> bool:
    """Equal in every fact; NaN is NaN."""
    return declared({}, {"": one}) == declared({}, {"": other})


def _dtype(where: str, kind: Any) -> str:
    """The name of a little-endian integer or float; exactly those, not merely of their size."""
    for name, known in _TYPES.items():
        if kind.equal(known):
            return name
    what = type(kind).__name__.removeprefix("Type").removesuffix("ID").lower()
    number = isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)
    if number and kind.get_order() == h5py.h5t.ORDER_BE:
        what = "big-endian"
    raise SchemaError(
        f"{where} is of type {what}; write one of {', '.join(_TYPES)}, little-endian."
    )


# ------------------------------------------------------------------ reading


def read(header: Header, name: str, *, verify: bool = True, finite: bool = False) -> Array:
    """One array, as stored, if the file still is what `header` says.

    Args:
        header: From `open_file`.
        name: Dotted name of a dataset.
        verify: Compare the bytes with their SHA-256.
        finite: Refuse NaN and infinity, also those encoded as bfloat16.

    Raises:
        NameUnknownError: There is no such dataset.
        SchemaError: The file was replaced by one whose dataset differs.
        ChecksumError: The bytes are not those that were written.
        NonFiniteError: `finite`, and they hold NaN or infinity; names the first index.
        StorageError: The disk cannot be read.
    """
    if name not in header.entries:
        raise NameUnknownError(f"read: {header.path!r} has no dataset {name!r}.")
    info, path = header.entries[name], Path(header.path)
    with _opened("read", input_path(path)) as file:
        node = file
        for part in (parts := to_path(name).split("/")):
            if not isinstance(node, h5py.Group) or part not in node:
                raise SchemaError(_replaced("read", header.path))
            node = _member(path, node, part, "/".join(parts))
        if not isinstance(node, h5py.Dataset) or not _same(
            _info(path, "/".join(parts), node), info
        ):
            raise SchemaError(_replaced("read", header.path))
        array: Array = np.empty(info.shape, dtype=np.dtype(info.dtype).newbyteorder("<"))
        if info.nbytes:
            node.read_direct(array)
    if verify and sha256(array) != info.sha256:
        raise ChecksumError(
            f"read: {header.path!r}: the bytes of dataset {name!r} do not match their SHA-256. The "
            "file was damaged or edited after it was written; copy or make it again."
        )
    if finite:
        values = from_bfloat16(array) if info.encoding == BFLOAT16 else array
        require_finite(f"read: {header.path!r}", f"dataset {name!r}", values)
    return array


def require_entry(
    header: Header, name: str, dtype: str, shape: tuple[int | None, ...]
) -> tuple[int, ...]:
    """The shape of dataset `name`; SchemaError unless it has that dtype and shape, None any >= 1.

    Proof: tests/test_store.py::test_an_entry_is_what_is_asked_for_or_refused
    """
    info = header.entries.get(name)
    wanted = f"({', '.join('any' if n is None else str(n) for n in shape)}) of {dtype}"
    if info is None:
        raise SchemaError(f"open: {header.path!r} lacks {name!r}, {wanted}.")
    fits = len(info.shape) == len(shape) and all(
        (have >= 1) if want is None else want == have
        for want, have in zip(shape, info.shape, strict=True)
    )
    if info.stored != dtype or not fits:
        raise SchemaError(
            f"open: {header.path!r}: {name!r} must be {wanted}; got {info.shape} of {info.stored}."
        )
    return info.shape


Fact = TypeVar("Fact", str, int, float)


def fact(
    where: str,
    attributes: Mapping[str, Scalar],
    key: str,
    kind: type[Fact],
    *,
    finite: bool = True,
) -> Fact:
    """The attribute `key` as a text, an integer or a (finite) number; SchemaError for another.

    Proof: tests/test_store.py::test_an_attribute_is_what_is_asked_for_or_refused
    """
    value = attributes.get(key)
    if kind is float and isinstance(value, int | float) and (math.isfinite(value) or not finite):
        return kind(value)
    if kind is not float and isinstance(value, kind):
        return value
    what = {str: "a text", int: "an integer", float: "a finite number"}[kind]
    raise SchemaError(f"{where}: attribute {key!r} must be {what}; got {value!r:.80}.")


def verify(header: Header) -> list[tuple[str, bool]]:
    """For every dataset: its name, and whether its bytes match their SHA-256."""
    return [(name, _matches(header, name)) for name in header.entries]


def _matches(header: Header, name: str) -> bool:
    try:
        read(header, name)
    except ChecksumError:
        return False
    return True
