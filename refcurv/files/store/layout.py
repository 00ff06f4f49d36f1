"""What a file holds: its records, its names, its checksums."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import h5py
import numpy as np

from refcurv.law.checks import PART, Array, ConventionError, DTypeError

Scalar = str | int | float

VERSION: Final = 2
"""Of the files that are written. Version 1 lacks the root's `sha256`; it is read as well."""

FORMATS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "refcurv-weights": "`refcurv convert` or rc.save",
        "refcurv-corpus": "`refcurv corpus` or rc.save_corpus",
        "refcurv-factors": "`refcurv collect`",
        "refcurv-basis": "`refcurv decompose`",
        "refcurv-trace": "`refcurv trace`",
        "refcurv-case": "`refcurv cases`",
        "refcurv-certificate": "`refcurv certify`",
    }
)
"""The kinds of file, and what writes each."""

BFLOAT16: Final = "bfloat16"
"""The one encoding: a uint16 dataset whose attribute `encoding` says so."""

TYPES: Final = {
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
"""The dtypes that a file can hold, little-endian."""

"""One part of a name."""

MAX_DEPTH: Final = 16
"""Parts of a name, at most."""


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


# ------------------------------------------------------------------ names, checksums


def to_path(name: str) -> str:
    """Dotted name → path in the file; ConventionError unless every part is a plain word."""
    parts = name.split(".")
    if len(parts) > MAX_DEPTH or not all(PART.fullmatch(part) for part in parts):
        raise ConventionError(
            f"write: {name!r} cannot name a dataset: at most {MAX_DEPTH} parts joined by dots, "
            "each 1 to 100 of the characters A-Z a-z 0-9 _ + -."
        )
    return "/".join(parts)


def to_name(path: str) -> str:
    """Path in the file → dotted name, the reverse of `to_path`."""
    return path.strip("/").replace("/", ".")


def sha256(array: Array) -> str:
    """SHA-256 of an array's C-order little-endian bytes, in hexadecimal."""
    return hashlib.sha256(little_endian(array).reshape(-1).view(np.uint8).data).hexdigest()


def declared(root: Mapping[str, Scalar], entries: Mapping[str, Info]) -> str:
    """SHA-256 of all that a file declares: the root's `sha256`.

    Definition
        The hash is of fields, each written as a netstring: its length in bytes in decimal, ":", its
        bytes, ",". The root comes first, with an empty name; then every dataset, by ascending
        dotted name. The fields of each are its name; of a dataset its dtype and its shape, as
        "3,4"; then the name and the value of every attribute, by ascending name, without the root's
        sha256. A text is in UTF-8, an integer in decimal, and a float is the 16 hexadecimal digits
        of its big-endian IEEE 754 double.

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


def little_endian(array: Array) -> Array:
    """The array as it lies in a file: little-endian, in C order; DTypeError for another dtype."""
    array = np.asarray(array)
    if array.dtype.name not in TYPES:
        raise DTypeError(f"write: files hold {', '.join(TYPES)}; got {array.dtype}.")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
