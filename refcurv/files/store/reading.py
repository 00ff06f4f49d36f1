"""A header → its arrays and attributes, each read when asked for; what a record was read from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from refcurv.files.bfloat16 import from_bfloat16
from refcurv.files.disk import file_sha256, identity
from refcurv.files.paths import input_path
from refcurv.files.store.layout import BFLOAT16, Header, Info, Scalar, declared, sha256, to_path
from refcurv.files.store.opening import info_of, member, open_file, opened
from refcurv.law.checks import (
    Array,
    ChecksumError,
    NameUnknownError,
    SchemaError,
    require_finite,
)


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
    with opened("read", input_path(path)) as file:
        node = file
        for part in (parts := to_path(name).split("/")):
            if not isinstance(node, h5py.Group) or part not in node:
                raise SchemaError(_replaced("read", header.path))
            node = member(path, node, part, "/".join(parts))
        if not isinstance(node, h5py.Dataset) or not _same(
            info_of(path, "/".join(parts), node), info
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


def holds(header: Header, name: str, array: Array | None) -> bool:
    """Is that dataset this array, by its checksum; or is there none, as of None?

    Proof: tests/test_certified_hostile.py::test_a_certificate_names_only_files_that_it_is_of
    """
    info = header.entries.get(name)
    if info is None or array is None:
        return info is None and array is None
    alike = (array.shape, array.dtype) == (info.shape, np.dtype(info.dtype))
    return alike and sha256(array) == info.sha256


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


def _same(one: Info, other: Info) -> bool:
    """Are two datasets declared alike? NaN equals NaN."""
    return declared({}, {"": one}) == declared({}, {"": other})


def _replaced(who: str, path: str) -> str:
    return f"{who}: {path!r} was replaced or changed after it was opened. Start again with it."


# ------------------------------------------------------------------ where a record came from


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


def changed(*sources: Mapping[str, Any]) -> list[str]:
    """The files that are not any more what they were when they were opened.

    Proof: tests/test_checkpoint.py::test_a_file_that_changes_during_the_run_is_noticed
    """
    headers = [source["header"] for source in sources if "header" in source]
    return [one.path for one in headers if not _is_still(one)]


def _is_still(header: Header) -> bool:
    try:
        return identity(Path(header.path)) == header.identity
    except OSError:  # it is gone
        return False


def inputs(*sources: Mapping[str, Any]) -> dict[str, str]:
    """{file name: sha256} of the records that came from files, for the next file's provenance.

    Files of one name, in two folders, have their paths.
    """
    found = {str(s["path"]): s["sha256"] for s in sources if "path" in s}
    names = [Path(path).name for path in found]
    return {p if names.count(n) > 1 else n: found[p] for p, n in zip(found, names, strict=True)}
