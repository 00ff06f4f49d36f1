"""JSON lines → items: a line holds a document or a pair, and may say which ids count."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.files.disk import parse_json, reading
from refcurv.files.few_shot import Front, front
from refcurv.files.ids import MAX_ID, WHO, require_text
from refcurv.files.paths import one_line
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    RangeError,
    SchemaError,
    ShapeError,
)
from refcurv.law.words import number_of
from refcurv.model.corpus import SPLITS

JSON_LINES: Final = (".jsonl", ".ndjson", ".jsonlines")
"""Suffixes of files with one JSON object in each line."""

_WHOLE: Final = ("input_ids", "text")
_PREFIX: Final = ("prefix_ids", "prefix", "prefix_text")
_SUFFIX: Final = ("suffix_ids", "target_suffix", "suffix", "suffix_text")
_TASK: Final = ("prompt", "answer")
_MAX_LINE: Final = 2**26  # bytes of one JSON line

_BESIDE_IDS: Final = ("attention_mask", "labels", "position_ids", "token_type_ids")
_HARMLESS: Final = ("special_tokens_mask",)
_NOT_READ: Final = (
    "assistant_tokens", "cu_seqlens", "document_ids", "loss_weights", "segment_ids", "seq_lens",
    "sequence_ids", "token_weights",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a file: a text or its ids, or a prefix with its suffix.

    `start` is the byte of the file at which it begins. `asked` (n,) says which ids are to be
    predicted. `split` is the one that a pair belongs to, where its line says so.
    """

    where: str
    start: int
    content: str | Array
    suffix: str | Array | None = None
    asked: Array | None = None
    split: str | None = None

    @property
    def parts(self) -> list[str | Array]:
        """The whole text, or the prefix and the suffix."""
        return [self.content] if self.suffix is None else [self.content, self.suffix]

    @property
    def pair(self) -> tuple[str, str] | None:
        """The prefix and the suffix, if both are text."""
        if isinstance(self.content, str) and isinstance(self.suffix, str):
            return self.content, self.suffix
        return None


# ------------------------------------------------------------------ lines


def lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Each line that is not blank: the byte at which it begins, its name in an error, its text."""
    with reading("open", path) as file:
        number = start = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            where = f"{str(path)!r} line {number}"
            if number == 1:
                require_utf8_mark(repr(str(path)), line)
            if len(line) > _MAX_LINE:
                raise SchemaError(f"{WHO}: {where} is longer than {_MAX_LINE} bytes.")
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise SchemaError(f"{WHO}: {where} is not UTF-8: {one_line(error)}.") from None
            if text:
                yield start, where, text
            start = file.tell()


def json_items(path: Path, at: Callable[[int], object], ignored: set[str]) -> Iterator[Item]:
    """The documents and pairs of a file; `at` is told where each begins, `ignored` gets keys.

    The first line may give what stands before every prompt (`few_shot.front`).
    """
    before: Front | None = None
    for number, (start, where, line) in enumerate(lines(path)):
        at(start)
        record = {k: v for k, v in parse_json(f"{WHO}: {where}", line).items() if v is not None}
        if number == 0 and not record.keys() & {*_WHOLE, *_PREFIX, *_SUFFIX, *_TASK}:
            before = front(where, record)
            if before is not None:
                continue
        item = _line_item(start, where, record, ignored)
        yield item if before is None else _behind(before, item)


def _behind(before: Front, item: Item) -> Item:
    """The pair with its prompt behind a preamble and shots, none of which is this prompt's.

    Proof: tests/test_few_shot.py::test_an_item_that_is_a_shot_is_refused
    """
    if item.pair is None:
        raise ConventionError(
            f"{WHO}: {item.where}: the file's first line has a preamble or shots. So each line "
            "behind it must have prompt and answer, as text."
        )
    if item.pair[0] in before.prompts:
        raise SchemaError(
            f"{WHO}: {item.where}: the prompt is that of a shot, whose answer stands before it. "
            "Leave one of the two out."
        )
    return dataclasses.replace(item, content=before.text + item.pair[0])


def _line_item(start: int, where: str, record: Mapping[str, Any], ignored: set[str]) -> Item:
    """The document or the pair in one line of JSON."""
    whole, prefix, suffix = (
        next((key for key in keys if key in record), "") for keys in (_WHOLE, _PREFIX, _SUFFIX)
    )
    if not (whole or prefix or suffix) and record.keys() >= set(_TASK):
        prefix, suffix = _TASK
        if lost := sorted({"preamble", "shots"} & record.keys()):
            raise SchemaError(
                f"{WHO}: {where}: {lost[0]!r} is read in the file's first line, which has neither "
                "prompt nor answer. Give it a line of its own."
            )
    if bool(prefix) != bool(suffix) or bool(whole) == bool(prefix):
        wanted = [" or ".join(keys) for keys in (_WHOLE, _PREFIX, _SUFFIX)]
        raise SchemaError(
            f"{WHO}: {where} must have either {wanted[0]}, or both {wanted[1]} and {wanted[2]}, or "
            f"both {_TASK[0]} and {_TASK[1]}; "
            f"its keys are {', '.join(map(repr, record))[:200] or 'none'}."
        )
    read = {whole, prefix, suffix}
    split = record.get("split") if prefix and record.get("split") in SPLITS else None
    read |= {"split"} if split else set()
    content = _value(where, whole or prefix, record[whole or prefix])
    behind = _value(where, suffix, record[suffix]) if suffix else None
    if whole and not isinstance(content, str):
        read |= {key for key in _BESIDE_IDS if _numbers(record.get(key))}
    for key in sorted(record.keys() - read):
        _require_no_meaning(where, key, record[key])
        ignored.add(key.encode("ascii", "backslashreplace").decode()[:100])
    if prefix or isinstance(content, str):
        return Item(where, start, content, behind, split=split)
    return _masked(Item(where, start, content), content, record)


def _value(where: str, key: str, value: object) -> str | Array:
    """A text, or a list of ids."""
    if isinstance(value, str):
        return require_text(where, key, value)
    if not isinstance(value, list):
        kind = type(value).__name__
        raise DTypeError(f"{WHO}: {where}: {key!r} must be text or a list of ids; got {kind}.")
    for i, one in enumerate(value):
        if type(one) is not int:
            raise DTypeError(f"{WHO}: {where}: {key}[{i}] must be an integer; got {one!r:.50}.")
        if not 0 <= one <= MAX_ID:
            raise RangeError(f"{WHO}: {where}: {key}[{i}] is no id: {one!r:.50}.")
    return np.array(value, np.int32)


def require_utf8_mark(where: str, data: bytes) -> None:
    """Refuse the byte order marks of UTF-16 and UTF-32."""
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
             "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}  # fmt: skip
    for name, marked in marks.items():
        if data.startswith(marked):
            raise SchemaError(
                f"{WHO}: {where} is {name}, not UTF-8. Convert it: iconv -f {name} -t UTF-8."
            )


# ------------------------------------------------------------------ what stands beside ids


def _numbers(value: object) -> bool:
    """Is this a list of numbers or of lists, so probably one entry for each token?"""
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float | list)


def _require_no_meaning(where: str, key: str, value: object) -> None:
    """Refuse a key that is not read and says how tokens count. Any other key may be ignored."""
    counts = key in (*_BESIDE_IDS, *_NOT_READ) or "mask" in key.lower()
    if counts and key not in _HARMLESS and _numbers(value):
        raise ConventionError(
            f"{WHO}: {where} has {key!r}, which says how its tokens count and is not read here. "
            "Give input_ids with attention_mask and labels, -100 where none is asked for, or "
            "leave the key out."
        )


def _masked(item: Item, ids: Array, record: Mapping[str, Any]) -> Item:
    """The ids without their padding, and which of them are to be predicted.

    labels[t] is about token t, as in Hugging Face's data; position t - 1 predicts that token.
    """
    where = item.where
    mask, labels, position_ids, types = (
        _beside(where, key, record.get(key), len(ids)) for key in _BESIDE_IDS
    )
    real = len(ids)
    if mask is not None:
        real = int((mask == 1).sum())
        if (mask != (np.arange(len(ids)) < real)).any():
            raise ConventionError(
                f"{WHO}: {where}: 'attention_mask' must be 1 on tokens and 0 on padding, which "
                "stands on the right only. Pad on the right, or write the ids without padding."
            )
    if position_ids is not None and (position_ids[:real] != np.arange(real)).any():
        raise ConventionError(
            f"{WHO}: {where}: 'position_ids' are not 0, 1, 2, ... Are several documents in the "
            "line? Give each a line of its own."
        )
    if types is not None and types[:real].any():
        raise ConventionError(
            f"{WHO}: {where}: 'token_type_ids' are not all 0; a corpus has no types of tokens."
        )
    if labels is None:
        return dataclasses.replace(item, content=ids[:real])
    stray = (labels >= 0) & ((labels != ids) | (np.arange(len(ids)) >= real))
    if stray.any():
        n = int(np.argmax(stray))
        own = f"input_ids[{n}] is {ids[n]}" if n < real else "that is padding"
        raise ConventionError(
            f"{WHO}: {where}: labels[{n}] is {labels[n]} and {own}. A label must be that of its "
            "own token, as in Hugging Face's data, or -100. If they are shifted, shift them back."
        )
    return dataclasses.replace(item, content=ids[:real], asked=labels[:real] >= 0)


def _beside(where: str, key: str, value: object, count: int) -> Array | None:
    """A list of integers, one for each id; None if the key is absent."""
    if not isinstance(value, list) or (value and not _numbers(value)):
        return None
    for i, one in enumerate(value):
        if not isinstance(one, int) or not -(2**31) <= one <= MAX_ID:
            raise DTypeError(f"{WHO}: {where}: {key}[{i}] must be an integer; got {one!r:.50}.")
    if len(value) != count:
        raise ShapeError(
            f"{WHO}: {where}: {key!r} has {number_of(len(value), 'entry', 'entries')} for "
            f"{count} ids."
        )
    return np.array(value, np.int64)
