"""A file → its header: all that it declares is checked, and no array is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import h5py
import numpy as np

from refcurv.files.disk import identity, is_addressable, parse_json
from refcurv.files.mistaken import GGUF_ELSEWHERE, is_gguf
from refcurv.files.paths import PathLike, input_path, machine_faults, one_line, require_file
from refcurv.files.store.layout import (
    BFLOAT16,
    FORMATS,
    MAX_DEPTH,
    TYPES,
    VERSION,
    Header,
    Info,
    Scalar,
    declared,
    to_name,
)
from refcurv.law.checks import PART, ChecksumError, RefcurvError, SchemaError

_LAYOUTS: Final = {
    h5py.h5d.CHUNKED: "chunked",
    h5py.h5d.COMPACT: "compact",
    h5py.h5d.VIRTUAL: "virtual",
}
_MAX_OBJECTS: Final = 200_000
_MAX_AXES: Final = 8
_MAX_ATTRIBUTES: Final = 64
_MAX_TEXT: Final = 1 << 24  # bytes in one attribute; a configuration or a provenance has thousands


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
    if is_gguf(found):
        raise SchemaError(f"open: {str(found)!r} {GGUF_ELSEWHERE}")
    with machine_faults("open", found):
        which = identity(found)
    with opened("open", found) as file:
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
        provenance=MappingProxyType(parse_json(f"open: {str(found)!r}: provenance", str(made))),
        entries=MappingProxyType(entries),
        identity=which,
    )


@contextmanager
def opened(who: str, path: Path) -> Iterator[Any]:
    """The HDF5 file, read-only. Whatever HDF5 says about its contents becomes one line.

    It is opened without a lock: a file of ours is never changed in place, only replaced.
    """
    require_file(who, path)
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
    for inner, dataset in datasets(path, file):
        info = info_of(path, inner, dataset)
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


def datasets(path: Path, file: Any, names: re.Pattern[str] = PART) -> Iterator[tuple[str, Any]]:
    """Every dataset of the tree. Only hard links are followed, and an object may be met once."""
    seen = {h5py.h5o.get_info(file.id).addr}
    waiting = [("", file)]
    while waiting:
        above, group = waiting.pop()
        for part in group:
            inner = f"{above}/{part}" if above else part
            node = member(path, group, part, inner, names)
            address = h5py.h5o.get_info(node.id).addr
            if address in seen:
                raise SchemaError(f"open: {str(path)!r}: two links lead to the object {inner!r}.")
            seen.add(address)
            if len(seen) > _MAX_OBJECTS or inner.count("/") >= MAX_DEPTH:
                raise SchemaError(
                    f"open: {str(path)!r}: more than {_MAX_OBJECTS} objects or {MAX_DEPTH} levels."
                )
            if isinstance(node, h5py.Dataset):
                yield inner, node
            else:
                waiting.append((inner, node))


def member(path: Path, group: Any, part: str, inner: str, names: re.Pattern[str] = PART) -> Any:
    """The group or dataset behind one hard link; nothing else is followed."""
    where = f"open: {str(path)!r}: {inner!r}"
    if not names.fullmatch(part):
        raise SchemaError(f"{where} is no plain name ({names.pattern}).")
    link = group.get(part, getlink=True)
    if not isinstance(link, h5py.HardLink):
        kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
        raise SchemaError(f"{where} is {kind} link; only data inside the file itself is read.")
    node = group[part]
    if not isinstance(node, h5py.Group | h5py.Dataset):
        raise SchemaError(f"{where} is a {type(node).__name__}; only groups and datasets are read.")
    return node


def info_of(path: Path, inner: str, dataset: Any) -> Info:
    """What a dataset declares, checked: a plain type, and contiguous storage of the right size."""
    where = f"open: {str(path)!r}: dataset {to_name(inner)!r}"
    dtype = _dtype(where, dataset.id.get_type())
    plist, shape = dataset.id.get_create_plist(), dataset.shape
    layout = plist.get_layout()
    if layout != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        kind = _LAYOUTS.get(layout, "stored in another file, or filtered,")
        raise SchemaError(f"{where} is {kind}; write it contiguous, without compression.")
    itemsize = int(np.dtype(dtype).itemsize)
    if shape is None or len(shape) > _MAX_AXES or not is_addressable(shape, itemsize):
        raise SchemaError(f"{where} must have between 0 and {_MAX_AXES} axes; got shape {shape}.")
    nbytes = itemsize * math.prod(map(int, shape))
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


def _dtype(where: str, kind: Any) -> str:
    """The name of a little-endian integer or float. A type of the same size only is refused."""
    for name, known in TYPES.items():
        if kind.equal(known):
            return name
    what = type(kind).__name__.removeprefix("Type").removesuffix("ID").lower()
    number = isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)
    if number and kind.get_order() == h5py.h5t.ORDER_BE:
        what = "big-endian"
    raise SchemaError(f"{where} is of type {what}; write one of {', '.join(TYPES)}, little-endian.")
