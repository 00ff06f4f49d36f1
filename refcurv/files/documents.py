"""Files → documents: text, JSON lines and arrays of ids, read with suspicion and tokenized.

`Reader` goes over a file once: items as the file has them, a batch of them tokenized at one time,
then documents of ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from refcurv.files.disk import read_bytes
from refcurv.files.encoding import PARTS, PIECE, encode, encode_pairs
from refcurv.files.ids import WHO, npy_rows, read_bin
from refcurv.files.json_lines import JSON_LINES, Item, json_items, require_utf8_mark
from refcurv.files.paths import PathLike, input_path
from refcurv.files.tokenizer import Tokenizer
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    SchemaError,
)
from refcurv.progress import Progress

_WAYS_OUT: Final = {
    "Give a .jsonl, an object per line: jq -c '.[]' f > g.jsonl": ".json",
    "Give a .jsonl: pandas.read_csv(f).to_json(g, orient='records', lines=True)": ".csv",
    "Give a .jsonl: pandas.read_table(f).to_json(g, orient='records', lines=True)": ".tsv .tab",
    "Give a .jsonl: pandas.read_excel(f).to_json(g, orient='records', lines=True)": ".xls .xlsx",
    "Give a .jsonl: pandas.read_parquet(f).to_json(g, orient='records', lines=True)": ".parquet",
    "Give a .jsonl: pandas.read_feather(f).to_json(g, orient='records', lines=True)": ".feather",
    "Give a .jsonl: datasets.Dataset.from_file(f).to_json(g)": ".arrow",
    "Give a .jsonl, an object per line": ".idx .tfrecord .msgpack .db .sqlite .avro .orc",
    "Unpack it first": ".gz .zst .xz .bz2 .lz4 .br .zip .tar .tgz .7z .rar",
    "Give its text alone, as UTF-8": ".pdf .ps .docx .doc .odt .rtf .epub .pptx",
    "Give a .npy of token ids": ".npz .pt .pth .ckpt .safetensors .pkl .pickle .joblib",
    "Give the texts; its tokenizer goes to --tokenizer, the model to refcurv convert": ".gguf",
    "Give the texts": ".h5 .hdf5 .model .tiktoken",
}
NO_TEXT: Final = {suffix: way for way, many in _WAYS_OUT.items() for suffix in many.split()}
"""Suffixes of files that are not read as text, even if their bytes are text → what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """The token ids of a text, or of a prefix and its suffix.

    Fields: ids (n,) int32; how many of them are the prefix's, None for a whole text; `straddles`,
    whether a token covers the end of the prefix and the start of the suffix; `asked` (n,) bool,
    which ids are to be predicted, None for all; `split` (see Item).
    """

    where: str
    ids: Array
    prompt: int | None = None
    straddles: bool = False
    asked: Array | None = None
    split: str | None = None


# ------------------------------------------------------------------ documents


class Reader:
    """Reads the documents of files, one after another, and remembers what it met.

    It knows how far it has read and which keys it ignored. `split` counts the separators found,
    `bare` the files that were read with token_dtype.
    """

    def __init__(
        self,
        files: Sequence[PathLike],
        tokenizer: Tokenizer | None,
        progress: Progress | None,
        separator: str | None = None,
        token_dtype: str | None = None,
    ) -> None:
        self.total = sum(input_path(file).stat().st_size for file in files)
        for file in files:
            if Path(file).suffix.lower() != ".h5":  # a corpus may stand first
                _require_text(Path(file))
        self.ignored: set[str] = set()
        self.split = self.bare = 0
        self._tokenizer, self._progress, self._done = tokenizer, progress, 0
        self._separator, self._token_dtype = separator, token_dtype

    def __call__(self, file: PathLike) -> Iterator[Document]:
        """The documents of one file; EmptyError behind them if they hold no token."""
        path = input_path(file)
        tokens = 0
        for batch in _batches(self._items(path)):
            for document in _encoded(batch, self._tokenizer, self._at):
                tokens += len(document.ids)
                yield document
        if not tokens:
            raise EmptyError(f"{WHO}: {str(path)!r} holds no token.")
        self._done += path.stat().st_size

    def _items(self, path: Path) -> Iterator[Item]:
        suffix, where = path.suffix.lower(), repr(str(path))
        _require_text(path)
        if suffix == ".npy":
            yield from (Item(at, 0, ids) for at, ids in npy_rows(path))
        elif suffix == ".bin":
            self.bare += 1
            vocabulary = self._tokenizer.vocabulary if self._tokenizer else None
            yield Item(where, 0, read_bin(path, self._token_dtype, vocabulary))
        elif suffix in JSON_LINES:
            yield from json_items(path, self._at, self.ignored)
        else:
            yield from self._texts(where, _read_text(path, where))

    def _texts(self, where: str, text: str) -> Iterator[Item]:
        """The documents of a text: all of it, or what stands between separators."""
        if self._separator is None:
            yield Item(where, 0, text)
            return
        start, number = 0, 0
        while (end := text.find(self._separator, start)) >= 0:
            number += 1
            self.split += 1
            self._at(start)
            yield Item(f"{where} document {number}", start, text[start:end])
            start = end + len(self._separator)
        if start < len(text) or not number:
            yield Item(f"{where} document {number + 1}", start, text[start:])

    def _at(self, position: int) -> None:
        if self._progress and self._done + position < self.total:
            self._progress(self._done + position, self.total)


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Groups of items that are tokenized at one time: about PIECE letters, or PARTS items."""
    batch: list[Item] = []
    letters = 0
    for item in items:
        batch.append(item)
        letters += sum(len(part) for part in (item.content, item.suffix) if isinstance(part, str))
        if letters >= PIECE or len(batch) >= PARTS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[Item], tokenizer: Tokenizer | None, at: Callable[[int], None]
) -> Iterator[Document]:
    """The documents of a batch, tokenized, with the special tokens in their places."""
    pairs = [one.pair for one in batch if one.pair]
    alone = [part for one in batch if not one.pair for part in one.parts if isinstance(part, str)]
    whole: Iterator[Array] = iter(())
    joined: Iterator[tuple[Array, int, bool]] = iter(())
    if pairs or alone:
        where = next(one.where for one in batch if any(isinstance(part, str) for part in one.parts))
        if tokenizer is None:
            raise ConventionError(
                f"{WHO}: {where} is text. Give the model's tokenizer with "
                "--tokenizer: a tokenizer.json, its folder, or a GGUF file."
            )
        whole = iter(encode(tokenizer, alone, where, lambda done: at(batch[-1].start + done)))
        joined = iter(encode_pairs(tokenizer, pairs, where))
    for one in batch:
        if one.pair:
            found = Document(one.where, *next(joined), split=one.split)
        else:
            ids = [
                next(whole) if isinstance(part, str) else _require_known(one.where, part, tokenizer)
                for part in one.parts
            ]
            prompt = None if one.suffix is None else len(ids[0])
            found = Document(
                one.where, np.concatenate(ids), prompt, asked=one.asked, split=one.split
            )
        yield _with_specials(found, tokenizer) if isinstance(one.content, str) else found


def _with_specials(document: Document, tokenizer: Tokenizer | None) -> Document:
    """The ids with the special tokens before and behind them; an empty text gets none."""
    if tokenizer is None or not len(document.ids):
        return document
    before = np.array(tokenizer.before, np.int32)
    prompt = document.prompt
    behind = np.array(tokenizer.behind if prompt is None else (), np.int32)
    ids = np.concatenate([before, document.ids, behind])
    prompt = None if prompt is None else prompt + len(before)
    return dataclasses.replace(document, ids=ids, prompt=prompt)


def _require_known(where: str, ids: Array, tokenizer: Tokenizer | None) -> Array:
    if tokenizer and len(ids) and (top := ids.max()) >= tokenizer.vocabulary:
        raise RangeError(
            f"{WHO}: {where} has the id {top}, and the tokenizer's are below "
            f"{tokenizer.vocabulary}. Were the ids made with another one?"
        )
    return ids


# ------------------------------------------------------------------ text


def _require_text(path: Path) -> None:
    """Refuse a file whose suffix says that it is no text."""
    if way_out := NO_TEXT.get(path.suffix.lower()):
        raise SchemaError(f"{WHO}: {str(path)!r} is no text here. {way_out}.")


def _read_text(path: Path, where: str) -> str:
    """The text of a file that is UTF-8 without a NUL; a byte order mark is left out."""
    data = read_bytes("open", path)
    require_utf8_mark(where, data)
    if (at := data.find(b"\0")) >= 0:
        raise SchemaError(f"{WHO}: {where} is no text: byte {at} is NUL. Is it binary, or UTF-16?")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at {error.start}, {error.reason}"
        raise SchemaError(f"{WHO}: {where} is not UTF-8 text: {byte}.") from None
