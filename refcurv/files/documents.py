"""Files → documents: text, JSON lines and arrays of ids, read with suspicion and tokenized.

`Reader` goes over a file once and holds little of it: parts of documents, a batch of them
tokenized at one time, then whole documents of ids.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

import numpy as np

from refcurv.files.disk import PathLike, input_path, machine_faults, one_line, parse_json
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    NameUnknownError,
    RangeError,
    RefcurvError,
    SchemaError,
    ShapeError,
)

WHO: Final = "build_corpus"
"""Who speaks in an error."""

PIECE: Final = 2**20
"""Letters tokenized at one time; the library takes some 130 bytes for each."""

PARTS: Final = 2048
"""Texts tokenized at one time, when they are short."""

MAX_ID: Final = 2**31 - 1
"""A corpus holds int32."""

_WHOLE: Final = ("input_ids", "text")
_PREFIX: Final = ("prefix_ids", "prefix", "prefix_text")
_SUFFIX: Final = ("suffix_ids", "target_suffix", "suffix", "suffix_text")
_MAX_LINE: Final = 2**26  # bytes of one JSON line
_MAX_TOKENIZER: Final = 2**28  # bytes of a tokenizer.json; the largest known has a tenth

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one document: ids, or text still to be tokenized; `prompt`: of its prefix."""

    where: str
    content: str | Array
    ends: bool = True
    prompt: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """ids (n,) int32; how many of them are the prefix of a pair, None for a whole text.

    `seams`: where a long text was cut for the tokenizer.
    """

    where: str
    ids: Array
    prompt: int | None
    seams: int


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The library's object, and what is put before and behind each text."""

    library: Any
    before: tuple[int, ...]
    behind: tuple[int, ...]
    vocabulary: int
    facts: Mapping[str, Any]


# ------------------------------------------------------------------ documents


class Reader:
    """file → its documents, one after another; knows how far it is, and the keys it ignored."""

    def __init__(
        self, files: Sequence[PathLike], tokenizer: Tokenizer | None, progress: Progress | None
    ) -> None:
        self.total = sum(input_path(file).stat().st_size for file in files)
        self.ignored: set[str] = set()
        self._tokenizer, self._progress, self._done = tokenizer, progress, 0

    def __call__(self, file: PathLike) -> Iterator[Document]:
        """The documents of one file; EmptyError behind them if they hold no token."""
        path = input_path(file)
        tokens = 0
        for document in _documents(_encoded(self._parts(path), self._tokenizer), self._tokenizer):
            tokens += len(document.ids)
            yield document
        if not tokens:
            raise EmptyError(f"{WHO}: {str(path)!r} holds no token.")
        self._done += path.stat().st_size

    def _parts(self, path: Path) -> Iterator[Part]:
        suffix = path.suffix.lower()
        if suffix in (".json", ".npz", ".h5"):
            better = {".json": "a .jsonl, an object per line", ".npz": "a .npy", ".h5": "the texts"}
            raise SchemaError(f"{WHO}: {str(path)!r} is no text here. Give {better[suffix]}.")
        if suffix == ".npy":
            yield from _npy_parts(path)
        elif suffix == ".jsonl":
            for at, where, line in _lines(path):
                yield from _line_parts(where, line, self.ignored)
                self._at(at)
        else:
            yield from _text_parts(path, self._at)

    def _at(self, position: int) -> None:
        if self._progress and self._done + position < self.total:
            self._progress(self._done + position, self.total)


def _documents(
    parts: Iterable[tuple[Part, Array]], tokenizer: Tokenizer | None
) -> Iterator[Document]:
    run: list[tuple[Part, Array]] = []
    for part, ids in parts:
        run.append((part, ids))
        if part.ends:
            yield _joined(run, tokenizer)
            run = []


def _joined(run: Sequence[tuple[Part, Array]], tokenizer: Tokenizer | None) -> Document:
    """One document of its parts, with the special tokens in their places if it has any other."""
    first, ids = run[0][0], [ids for _, ids in run]
    prompt = sum(len(ids) for part, ids in run if part.prompt) if first.prompt else None
    if tokenizer and isinstance(first.content, str) and any(map(len, ids)):
        before = np.array(tokenizer.before, np.int32)
        behind = np.array(tokenizer.behind if prompt is None else (), np.int32)
        ids = [before, *ids, behind]
        prompt = None if prompt is None else prompt + len(before)
    seams = len(run) - (1 if prompt is None else 2)
    return Document(first.where, np.concatenate(ids), prompt, seams)


def _encoded(parts: Iterable[Part], tokenizer: Tokenizer | None) -> Iterator[tuple[Part, Array]]:
    """Each part with its ids, tokenized many at a time."""
    batch: list[Part] = []
    letters = 0
    for part in parts:
        batch.append(part)
        letters += len(part.content) if isinstance(part.content, str) else 0
        if letters >= PIECE or len(batch) >= PARTS:
            yield from _encode(batch, tokenizer)
            batch, letters = [], 0
    yield from _encode(batch, tokenizer)


def _encode(batch: Sequence[Part], tokenizer: Tokenizer | None) -> Iterator[tuple[Part, Array]]:
    texts = [part for part in batch if isinstance(part.content, str)]
    encodings: Iterator[Any] = iter(())
    if texts:
        if tokenizer is None:
            raise ConventionError(
                f"{WHO}: {texts[0].where} is text. Give the tokenizer.json of the model."
            )
        with _library_faults(f"the tokenizer, on {texts[0].where} or soon after it"):
            found = tokenizer.library.encode_batch_fast(
                [part.content for part in texts], add_special_tokens=False
            )
        encodings = iter(found)
    for part in batch:
        if isinstance(part.content, str):
            yield part, np.array(next(encodings).ids, np.int32)
            continue
        if tokenizer and len(part.content) and (top := part.content.max()) >= tokenizer.vocabulary:
            raise RangeError(
                f"{WHO}: {part.where} has the id {top}, and the tokenizer's are below "
                f"{tokenizer.vocabulary}. Were the ids made with another one?"
            )
        yield part, part.content


# ------------------------------------------------------------------ files


def _text_parts(path: Path, at: Callable[[int], None]) -> Iterator[Part]:
    where = repr(str(path))
    try:
        with machine_faults("open", path), path.open("rb") as raw:
            for part in _pieces(io.TextIOWrapper(raw, "utf-8-sig", newline=""), where):
                yield part
                at(raw.tell())
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}, {error.reason}"
        raise SchemaError(f"{WHO}: {where} is not UTF-8 text: {byte}.") from None


def _pieces(file: TextIO, where: str) -> Iterator[Part]:
    """A text as parts of some PIECE letters that end at line ends; one at least."""
    text = file.read(PIECE) + file.readline(PIECE)
    while True:
        following = file.read(PIECE) + file.readline(PIECE)
        yield Part(where, text, ends=not following)
        if not following:
            return
        text = following


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Each line that is not blank: where the next one begins, its name in an error, itself."""
    with machine_faults("open", path), path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            where = f"{str(path)!r} line {number}"
            if len(line) > _MAX_LINE:
                raise SchemaError(f"{WHO}: {where} is longer than {_MAX_LINE} bytes.")
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise SchemaError(f"{WHO}: {where} is not UTF-8: {one_line(error)}.") from None
            if text:
                yield file.tell(), where, text


def _line_parts(where: str, line: str, ignored: set[str]) -> Iterator[Part]:
    """The parts of the document or pair that is in one line of JSON."""
    record = {k: v for k, v in parse_json(WHO, where, line).items() if v is not None}
    whole, prefix, suffix = (
        next((key for key in keys if key in record), "") for keys in (_WHOLE, _PREFIX, _SUFFIX)
    )
    if bool(prefix) != bool(suffix) or bool(whole) == bool(prefix):
        wanted = [" or ".join(keys) for keys in (_WHOLE, _PREFIX, _SUFFIX)]
        raise SchemaError(
            f"{WHO}: {where} must have either {wanted[0]}, or both {wanted[1]} and {wanted[2]}; "
            f"its keys are {', '.join(map(repr, record))[:200] or 'none'}."
        )
    for key in record.keys() - {whole, prefix, suffix}:
        ignored.add(key.encode("ascii", "backslashreplace").decode()[:100])
    if whole:
        yield from _value(where, whole, record[whole])
        return
    for part in _value(where, prefix, record[prefix]):
        yield dataclasses.replace(part, ends=False, prompt=True)
    yield from _value(where, suffix, record[suffix])


def _value(where: str, key: str, value: object) -> Iterator[Part]:
    """The parts of a text, or the one part of a list of ids."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SchemaError(f"{WHO}: {where}: {key!r}: {one_line(error)}.") from None
        yield from _pieces(io.StringIO(value, newline=""), where)
        return
    if not isinstance(value, list):
        kind = type(value).__name__
        raise DTypeError(f"{WHO}: {where}: {key!r} must be text or a list of ids; got {kind}.")
    for i, one in enumerate(value):
        if type(one) is not int:
            raise DTypeError(f"{WHO}: {where}: {key}[{i}] must be an integer; got {one!r:.50}.")
        if not 0 <= one <= MAX_ID:
            raise RangeError(f"{WHO}: {where}: {key}[{i}] is no id: {one!r:.50}.")
    yield Part(where, np.array(value, np.int32))


def _npy_parts(path: Path) -> Iterator[Part]:
    """A (T,) array as one document, an (N, T) array as N."""
    where = repr(str(path))
    with machine_faults("open", path), path.open("rb") as file:
        array = _read_npy(file, where)
    if array.ndim not in (1, 2):
        raise ShapeError(f"{WHO}: {where} must be (T,) or (N, T); got {array.shape}.")
    if array.size and (array.min() < 0 or array.max() > MAX_ID):
        index = [int(i) for i in np.argwhere((array < 0) | (array > MAX_ID))[0]]
        raise RangeError(f"{WHO}: {where}: {index} is no id: {array[tuple(index)]}.")
    for n, row in enumerate(np.atleast_2d(array).astype(np.int32)):
        yield Part(where if array.ndim == 1 else f"{where} row {n}", row)


def _read_npy(file: BinaryIO, where: str) -> Array:
    """The integers of a .npy file whose header is true to its size; objects are never read."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers of Python 2
            shape, fortran, dtype = headers[np.lib.format.read_magic(file)](file)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header with Python's own parser
        raise SchemaError(f"{WHO}: {where} is no .npy file: {one_line(error)}.") from None
    if dtype.kind not in "iu":
        raise DTypeError(f"{WHO}: {where} must hold integers; got {dtype}.")
    there = os.fstat(file.fileno()).st_size - file.tell()
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != there:
        raise SchemaError(
            f"{WHO}: {where} declares {shape} of {dtype}, and holds {there} bytes. Copy or make "
            "it again."
        )
    data = np.frombuffer(file.read(there), dtype)
    return data.reshape(shape, order="F" if fortran else "C")


# ------------------------------------------------------------------ the tokenizer


def load_tokenizer(file: PathLike, eos: str | None) -> Tokenizer:
    """Read a tokenizer.json; refuse one that draws at random; switch off what would cut or pad."""
    try:
        import tokenizers
    except ImportError:
        raise ConventionError(
            f"{WHO}: tokenizing needs the library tokenizers: pip install 'refcurv[checkpoints]'."
        ) from None
    path = input_path(file)
    where = repr(str(path))
    with machine_faults("open", path), path.open("rb") as opened:
        data = opened.read(_MAX_TOKENIZER + 1)
    if len(data) > _MAX_TOKENIZER:
        raise SchemaError(f"{WHO}: {where} is longer than {_MAX_TOKENIZER} bytes.")
    with _library_faults(f"{where} as a tokenizer.json"):
        library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
        ids = sorted(library.get_vocab(with_added_tokens=True).values())
        before, behind = _template(library, ids, where)
        last = None if eos is None else library.token_to_id(eos)
    for name in ("dropout", "alpha"):
        if draws := getattr(library.model, name, None):
            raise ConventionError(
                f"{WHO}: {where} has {name} {draws}, so that a text has other ids each time. "
                "Set it to null."
            )
    if eos is not None and last is None:
        raise NameUnknownError(f"{WHO}: {where} has no token {eos!r} to use as eos.")
    if last is not None and behind[-1:] == (last,):
        raise ConventionError(f"{WHO}: {where} puts {eos!r} behind each text by itself.")
    vocabulary = ids[-1] + 1
    if max((*before, *behind, vocabulary - 1)) != vocabulary - 1 or vocabulary > MAX_ID:
        raise SchemaError(f"{WHO}: {where} has ids outside its vocabulary or beyond {MAX_ID}.")
    behind += () if last is None else (last,)
    facts = {"file": path.name, "vocabulary": vocabulary, "before": [*before],
             "behind": [*behind], "tokenizers": metadata.version("tokenizers")}  # fmt: skip
    return Tokenizer(library, before, behind, vocabulary, facts)


def _template(
    library: Any, ids: Sequence[int], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and behind a text, tried on a word of the vocabulary."""
    if not ids:
        raise SchemaError(f"{WHO}: {where} has no vocabulary.")
    if not library.num_special_tokens_to_add(False):
        return (), ()
    for word in map(library.id_to_token, ids[:PARTS]):
        plain = library.encode(word, add_special_tokens=False).ids
        full = library.encode(word)
        own = [i for i, special in enumerate(full.special_tokens_mask) if not special]
        if plain and [full.ids[i] for i in own] == plain and own[-1] - own[0] == len(own) - 1:
            return tuple(full.ids[: own[0]]), tuple(full.ids[own[-1] + 1 :])
    raise ConventionError(
        f"{WHO}: {where}: its post-processor does more than put tokens before and behind texts."
    )


@contextmanager
def _library_faults(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises, its panics too, into one line."""
    try:
        yield
    except (RefcurvError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SchemaError(f"{WHO}: cannot use {what}: {one_line(error)}.") from None
