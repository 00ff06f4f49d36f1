"""The one door to the package `gguf`: a file's metadata and tensors, each checked before use.

Reading and dequantising are the package's. What it does not check is checked here: that every
length lies within the file, and that the tensors lie one behind the other without gap or overlap.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.files.disk import reading
from refcurv.files.paths import PathLike, input_path, machine_faults, one_line
from refcurv.files.unchanged import Seen, seen
from refcurv.law.checks import Array, ConventionError, RefcurvError, SchemaError
from refcurv.law.libraries import needed
from refcurv.law.words import number_of

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
_MOST_PARTS: Final = 6_000_000
"""Chosen: pieces in which one file's metadata are read, some 200 bytes each. A text is two, a list
of numbers three. A vocabulary of 262,144 and its merges make 1.6 million."""

_MOST_FILES: Final = 99_999
"""Of a split model: their names have five digits."""

_ADVICE: Final = "Copy or download it again."
_OF_A_PART: Final = ("split.", "GGUF.", "general.alignment")
_SPLIT: Final = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file.

    Fields: name; shape, the last axis varies fastest; kind, GGML's name of its type; path, its
    file; begin, where its bytes begin there; stored and blocks, dtype and shape of what these hold.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    path: Path
    begin: int
    stored: np.dtype[Any]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a GGUF file, or all parts of a split one, holds.

    Fields: files, each with what it was when it was opened; fields, the metadata as the package
    read them; tensors, by name.
    """

    files: Seen
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def where(self) -> str:
        """The file, as messages name it."""
        return repr(str(next(iter(self.files))))

    def get(self, key: str) -> Any:
        """The value of a key: a number, a text, true or false, or a list of one of them; or None.

        A float32 is read as the shortest decimal that rounds to it. Converters write what a
        config.json says, 1e-05, as the nearest float32, whose own decimals are 9.99999975e-06.
        """
        field = self.fields.get(key)
        if field is None:
            return None
        with package_faults(f"{self.where}: the key {key!r:.80}"):
            value = field.contents()
            return _decimal(value) if field.types[-1].name == "FLOAT32" else value


def _decimal(value: Any) -> Any:
    if isinstance(value, list):
        return [float(str(x)) for x in np.asarray(value, np.float32)]
    return float(str(np.float32(value)))


@contextmanager
def package_faults(what: str) -> Iterator[None]:
    """Turn what the package raises about damaged contents into a SchemaError of one line."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except (RefcurvError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        if "GGMLQuantizationType" in str(error):
            raise ConventionError(
                f"open: {what} holds a quantisation that the package gguf {package_version()} "
                f"does not know: {one_line(error)}."
            ) from None
        raise SchemaError(f"open: {what} is damaged: {one_line(error)}. {_ADVICE}") from None


# ------------------------------------------------------------------ opening


def open_gguf(given: PathLike) -> Contents:
    """A GGUF file's metadata and tensors; of a split file all parts, which lie beside each other.

    Raises:
        ConventionError: The package is not installed; big-endian; a version or a type of numbers
            that is not read.
        SchemaError: Not a GGUF file, damaged, or a part is missing.
        StorageError: The disk cannot be read.

    Proof: tests/test_gguf_files.py::test_any_flipped_byte_is_refused_in_one_line
    """
    path = input_path(given)
    first = _part(path)
    paths = _parts(path, first)
    parts = [first if p == path else _part(p) for p in paths]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise SchemaError(f"open: {part.where} holds {name!r:.80} again. {_ADVICE}")
            tensors[name] = tensor
    files = {path: which for part in parts for path, which in part.files.items()}
    whole = Contents(files, parts[0].fields, tensors)
    for k, part in enumerate(parts if len(parts) > 1 else []):
        wanted = {"split.no": k, "split.count": len(parts), "split.tensors.count": len(tensors)}
        for key, value in wanted.items():
            if part.get(key) not in (value, None if key == "split.tensors.count" else value):
                raise SchemaError(
                    f"open: {part.where}: {key} is {part.get(key)!r:.40}, where {value} is due. "
                    "Do the parts belong together?"
                )
        for key in part.fields if k else ():
            if not key.startswith(_OF_A_PART) and part.get(key) != whole.get(key):
                raise SchemaError(
                    f"open: {part.where}: the key {key!r:.80} is {part.get(key)!r:.40}, and in the "
                    f"first part {whole.get(key)!r:.40}. Do the parts belong together?"
                )
    return whole


def _part(path: Path) -> Contents:
    """One file, as the package reads it, checked."""
    missing = f"open: {str(path)!r} is a GGUF file, which the package gguf reads: "
    with needed("gguf", ConventionError(missing + "pip install 'refcurv[gguf]'.")):
        import gguf
    _require_readable(path)

    class Reader(gguf.GGUFReader):
        """The package's reader, which maps a file into memory: a process dies if it is cut then.

        So what its metadata say is read; of a tensor only the place. Nor does it check lengths. It
        makes an array of each number of a list, where one holds them all.
        """

        taken, within = 0, False

        def _build_tensors(self, *given: Any) -> None:
            Reader.within = True
            super()._build_tensors(*given)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            Reader.taken += 1
            nbytes = int(count) * np.dtype(dtype).itemsize
            if int(offset) + nbytes > len(self.data):
                raise ValueError("a length or an offset leads beyond the end of the file")
            if Reader.taken > _MOST_PARTS:
                raise ValueError(f"it has more than {_MOST_PARTS} pieces")
            if Reader.within:
                return super()._get(offset, dtype, count, override_order)
            file.seek(int(offset))
            return np.frombuffer(_whole(file.read(nbytes), nbytes, path), dtype)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            number = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind[0]))
            if number is None or not count[0]:
                return super()._get_field_parts(orig_offs, raw_type)
            every = self._get(orig_offs + 12, number, count[0])
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
            return 12 + every.nbytes, [kind, count, every], [2], types

    files = seen("open", [path])
    where = repr(str(path))
    with reading("open", path) as file, package_faults(where):
        reader = Reader(path)
        tensors = {t.name: _tensor(path, t) for t in reader.tensors}
        # a file that says its alignment has it as a uint32, which neither is signed nor holds 4 GiB
        end, alignment = int(reader.data_offset), int(reader.alignment)
        for t in reader.tensors:
            if t.data_offset != end:
                raise ValueError(f"tensor {t.name!r:.80} leaves a gap or overlaps another")
            end += -(-t.n_bytes // alignment) * alignment
    return Contents(files, reader.fields, tensors)


def _tensor(path: Path, found: Any) -> Tensor:
    shape = tuple(int(n) for n in found.shape[::-1])
    if 0 in shape or not shape:
        raise ValueError(f"tensor {found.name!r:.80} has shape {shape}")
    kind, data = found.tensor_type.name, found.data
    return Tensor(found.name, shape, kind, path, int(found.data_offset), data.dtype, data.shape)


def _whole(data: bytes, nbytes: int, path: Path) -> bytes:
    """The bytes that were read, if they are as many as there were."""
    if len(data) != nbytes:
        raise SchemaError(f"open: {str(path)!r} became shorter while it was read. {_ADVICE}")
    return data


def _require_readable(path: Path) -> None:
    """Refuse what is no GGUF file of little-endian numbers in a known version."""
    with reading("open", path) as file:
        start = file.read(8)
    version = int.from_bytes(start[4:], "little")
    if start[:4] != MAGIC or len(start) < 8:
        raise SchemaError(f"open: {str(path)!r} is no GGUF file, or cut short. {_ADVICE}")
    if version & 0xFFFF == 0:
        raise ConventionError(
            f"open: {str(path)!r} is big-endian, which is not built. Take the usual, "
            "little-endian file."
        )
    if version not in VERSIONS:
        raise ConventionError(
            f"open: {str(path)!r} is of version {version}; versions {VERSIONS[0]} and "
            f"{VERSIONS[1]} are read."
        )


def _parts(path: Path, one: Contents) -> list[Path]:
    """The paths of all parts, in order; each must be there."""
    count = one.get("split.count")
    if count is None:
        return [path]
    if type(count) is not int or not 0 <= count <= _MOST_FILES:
        raise SchemaError(f"open: {one.where}: split.count is {count!r:.40}. {_ADVICE}")
    if count <= 1:
        return [path]
    named = _SPLIT.fullmatch(path.name)
    if named is None or int(named[4]) != count or not 1 <= int(named[2]) <= count:
        raise SchemaError(
            f"open: {one.where} is one of {count} parts, but is not named like one: "
            f"NAME-00001-of-{count:05d}.gguf. Give all parts their names."
        )
    paths = [path.with_name(f"{named[1]}{k + 1:05d}{named[3]}") for k in range(count)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SchemaError(
            f"open: {one.where} is one of {number_of(count, 'part')}; there is no {missing[0]}"
            f"{more} beside it. Download all parts."
        )
    return paths


def first_part(path: Path) -> Path:
    """Of a part of a split file the first part, which holds the metadata; else the file itself.

    Proof: tests/test_gguf_tokenizer.py::test_the_tokenizer_of_a_split_file_is_its_first_parts
    """
    named = _SPLIT.fullmatch(path.name)
    first = path.with_name(f"{named[1]}{1:05d}{named[3]}") if named else path
    return first if first.is_file() else path


# ------------------------------------------------------------------ numbers


def read_stored(tensor: Tensor) -> Array:
    """A tensor as its file has it, in `blocks` of `stored`."""
    with reading("open", tensor.path) as file:
        file.seek(tensor.begin)
        nbytes = tensor.stored.itemsize * math.prod(tensor.blocks)
        data = _whole(file.read(nbytes), nbytes, tensor.path)
    return np.frombuffer(data, tensor.stored).reshape(tensor.blocks)


def read_tensor(tensor: Tensor) -> Array:
    """The numbers of a tensor, dequantised by the package, as float32 in the tensor's shape."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.kind]
    where = f"{str(tensor.path)!r}: tensor {tensor.name!r:.120}"
    with machine_faults("open", tensor.path), package_faults(where):
        try:
            array = gguf.dequantize(read_stored(tensor), kind)
        except NotImplementedError:
            raise ConventionError(
                f"open: {where} is of type {tensor.kind}, which the package gguf "
                f"{package_version()} does not dequantise."
            ) from None
        return np.ascontiguousarray(array, np.float32).reshape(tensor.shape)


def package_version() -> str:
    """The version of the package that is installed."""
    return packages.version("gguf")
