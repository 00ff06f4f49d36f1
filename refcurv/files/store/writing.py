"""Arrays and attributes → a file, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import h5py
import numpy as np

from refcurv.files.disk import NewFile, replacing
from refcurv.files.paths import PathLike, mode_of
from refcurv.files.store.layout import (
    VERSION,
    Entry,
    Info,
    Scalar,
    declared,
    little_endian,
    sha256,
    to_path,
)
from refcurv.files.store.sink import Sink
from refcurv.law.checks import ConventionError


def write(
    path: PathLike,
    *,
    format: str,
    attributes: Mapping[str, Scalar],
    arrays: Iterable[Entry],
    provenance: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
    """Write a file, whole or not at all: a temporary one beside it takes its place at the end.

    Args:
        path: The file; one that exists is replaced. A symbolic link is followed.
        format: One of FORMATS.
        attributes: Root attributes besides format, version and provenance.
        arrays: Entries; may be a generator, so that one array at a time is in memory.
        provenance: JSON values, usually from `provenance()`; or a function, called when every array
            is written.

    Raises:
        ConventionError: A name that is not plain, or occurs twice.
        DTypeError: An array of another dtype than integers and floats of 1 to 8 bytes.
        SchemaError: The folder does not exist, or the path is no regular file.
        StorageError: Disk full, no permission, write error. The old file, if any, is untouched.
    """
    mode_of("write", path)
    root: dict[str, Scalar] = {"format": format, "version": VERSION, **attributes}

    def told() -> dict[str, Scalar]:
        facts = dict(provenance() if callable(provenance) else provenance)
        return {**root, "provenance": json.dumps(facts, ensure_ascii=False, allow_nan=False)}

    if not callable(provenance):
        told()  # what is no JSON is refused before the work
    with replacing("write", path) as raw:
        _fill(raw, told, arrays)


def _fill(raw: NewFile, told: Callable[[], Mapping[str, Scalar]], arrays: Iterable[Entry]) -> None:
    """The file's bytes. An array is made, checked and hashed outside HDF5, then handed to it."""
    sink = Sink(raw)
    found: dict[str, Info] = {}
    taken: set[str] = set()
    file = None
    try:
        with sink.shielded():
            file = h5py.File(sink, "w", libver=("v108", "v108"))
        sink.check()
        for entry in arrays:
            _claim(entry.name, taken)
            array = little_endian(entry.array)
            about = {"sha256": sha256(array), **_written(entry.attributes)}
            found[entry.name] = Info.of(array.shape, array.dtype.name, array.nbytes, about)
            with sink.shielded():
                dataset = file.create_dataset(to_path(entry.name), data=array)
                _write_attributes(dataset, about)
            sink.check()
        root = _written(told())
        with sink.shielded():
            _write_attributes(file, {**root, "sha256": declared(root, found)})
    finally:  # HDF5 dies at exit by SIGSEGV if it has to close the file itself
        with sink.shielded():
            if file is not None:
                file.close()
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
