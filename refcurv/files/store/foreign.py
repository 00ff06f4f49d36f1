"""HDF5 files that refcurv did not write: other names, either order of bytes, but plain arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from refcurv.files.disk import is_addressable
from refcurv.files.paths import PathLike, input_path
from refcurv.files.store.layout import MAX_DEPTH, Scalar
from refcurv.files.store.opening import datasets, member, opened
from refcurv.law.checks import Array, SchemaError

_NAMES: Final = re.compile(r"[^\x00-\x1f\x7f/]{1,200}")
_REPACK: Final = "h5repack -l CONTI -f NONE OLD NEW makes it so"
_MAX_TEXT: Final = 1000  # bytes of a text; the name of a dtype has ten


@dataclass(frozen=True, slots=True)
class Outline:
    """What a foreign file declares of one dataset; `dtype` is NumPy's name, "text", or a reason.

    Fields: usable, can it be read?
    """

    dtype: str
    shape: tuple[int, ...]
    usable: bool


def open_foreign(
    path: PathLike, keys: Collection[str]
) -> tuple[dict[str, Outline], dict[str, Scalar]]:
    """{path in the file: outline} of every dataset, and those of the root's attributes in `keys`.

    Raises:
        SchemaError: it is no HDF5, is damaged, or holds links other than hard ones, two links to
            one object, or a dataset that is said to be larger than the file.

    Proof: tests/test_foreign.py::test_hdf5_of_others_is_read_with_suspicion
    """
    found = input_path(path)
    with opened("open", found) as file:
        size = found.stat().st_size
        inside = {inner: _outline(node, size) for inner, node in datasets(found, file, _NAMES)}
        inside = {inner: inside[inner] for inner in sorted(inside)}
        given = {key: _attribute(found, file, key) for key in keys if key in file.attrs}
    return inside, given


def foreign_format(path: PathLike) -> str | None:
    """The root's attribute `format`, of refcurv's own files; None if there is none, or no text."""
    found = input_path(path)
    with opened("open", found) as file:
        if "format" not in file.attrs:
            return None
        kind = file.attrs.get_id("format").get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
            return None
        return str(_attribute(found, file, "format"))


def read_foreign(path: PathLike, inner: str, outline: Outline) -> Array:
    """The numbers of one dataset, or its texts, if the file still is what it was."""
    found = input_path(path)
    with opened("read", found) as file:
        node = file
        for part in inner.split("/")[:MAX_DEPTH]:
            if not isinstance(node, h5py.Group) or part not in node:
                raise SchemaError(f"read: {str(found)!r} was replaced after it was opened.")
            node = member(found, node, part, inner, _NAMES)
        same = isinstance(node, h5py.Dataset) and _outline(node, found.stat().st_size) == outline
        if not same:
            raise SchemaError(f"read: {str(found)!r} was replaced after it was opened.")
        array: Array = np.empty(outline.shape, dtype=node.dtype)
        if array.size:
            node.read_direct(array)
    return array


def _outline(dataset: Any, size: int) -> Outline:
    """What can be known of a dataset without reading it; `size` is the file's."""
    kind, plist, shape = dataset.id.get_type(), dataset.id.get_create_plist(), dataset.shape
    dtype, usable = _dtype(kind, dataset)
    if shape is None or len(shape) > 8 or not is_addressable(shape, int(kind.get_size())):
        return Outline("of no shape, of more than 8 axes, or larger than any file", (), False)
    shape = tuple(map(int, shape))
    plain = plist.get_layout() in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT)
    if plist.get_external_count() or plist.get_layout() == h5py.h5d.VIRTUAL:
        return Outline("stored in another file", shape, False)
    if not plain or plist.get_nfilters():
        return Outline(f"in chunks or compressed; {_REPACK}", shape, False)
    nbytes = math.prod(shape) * int(kind.get_size())
    if usable and (nbytes > size or dataset.id.get_storage_size() != nbytes):
        return Outline(f"of {nbytes} bytes, which the file has not", shape, False)
    return Outline(dtype, shape, usable)


def _dtype(kind: Any, dataset: Any) -> tuple[str, bool]:
    """NumPy's name of a type, and whether it is one of plain numbers, bools or fixed texts."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        if kind.is_variable_str() or kind.get_size() > _MAX_TEXT:
            return "a text of variable length; write it as numpy.bytes_", False
        return "text", True
    if isinstance(kind, h5py.h5t.TypeFloatID):
        every = (16, 32, 64)
        known = [getattr(h5py.h5t, f"IEEE_F{n}{order}") for n in every for order in ("LE", "BE")]
        if not any(kind.equal(one) for one in known):
            return "a float that NumPy has not", False
    elif isinstance(kind, h5py.h5t.TypeEnumID):
        if dataset.dtype != np.dtype(bool):
            return "an enumeration", False
    elif not isinstance(kind, h5py.h5t.TypeIntegerID):
        return f"{type(kind).__name__.removeprefix('Type').removesuffix('ID').lower()}", False
    return str(dataset.dtype.name), True


def _attribute(path: Path, node: Any, key: str) -> Scalar:
    attribute = node.attrs.get_id(key)
    kind = attribute.get_type()
    number = isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID)
    text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if attribute.shape != () or not (number or text) or attribute.get_storage_size() > _MAX_TEXT:
        raise SchemaError(
            f"open: {str(path)!r}: attribute {key!r} must be a number, or a text of fixed length "
            "(in h5py: numpy.bytes_)."
        )
    value = node.attrs[key]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item()
