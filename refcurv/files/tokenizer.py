"""The tokenizer: read with suspicion; texts → ids, whole or in pieces; where a prefix ends."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.files.disk import PathLike, input_path, machine_faults, one_line, parse_json
from refcurv.files.ids import MAX_ID, WHO
from refcurv.law.checks import (
    Array,
    ConventionError,
    NameUnknownError,
    RefcurvError,
    SchemaError,
)

PIECE: Final = 2**18
"""Letters tokenized at one time; the library takes some 130 bytes for each."""

OVERLAP: Final = 2**14
"""Letters that two pieces share."""

PARTS: Final = 2048
"""Texts tokenized at one time, when they are short."""

_MAX_FILE: Final = 2**28  # bytes of a tokenizer.json; the largest known has a tenth
_VOCABULARIES: Final = ("*.model", "*.tiktoken", "vocab.json", "merges.txt", "vocab.txt")
_BESIDE: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The library's object, and what is put before and behind each text."""

    library: Any
    before: tuple[int, ...]
    behind: tuple[int, ...]
    vocabulary: int
    facts: Mapping[str, Any]


# ------------------------------------------------------------------ texts


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], where: str, at: Callable[[int], None]
) -> list[Array]:
    """The ids of each text, as of the whole of it; `at` hears how far a long one is."""
    with _library_faults(f"the tokenizer, on {where} or soon after it"):
        short = [text for text in texts if len(text) <= PIECE]
        with _nothing_printed():
            found = iter(tokenizer.library.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.array(next(found).ids, np.int32)
            if len(text) <= PIECE
            else in_pieces(tokenizer.library, text, at)
            for text in texts
        ]


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], where: str
) -> list[tuple[Array, int, bool]]:
    """The ids of prefix and suffix together, how many are the prefix's, whether one is of both.

    Definition
        ids = those of the text prefix + suffix. The prefix has the tokens up to the first one that
        ends behind the seam; a token that is of both is the suffix's.

    Proof: tests/test_tokenizer.py::test_a_pair_has_the_ids_of_its_text
    """
    with _library_faults(f"the tokenizer, on {where} or soon after it"):
        texts = [prefix + suffix for prefix, suffix in pairs]
        with _nothing_printed():
            found = tokenizer.library.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(one.ids, np.int32), *_cut_before(one, text, len(prefix)))
            for one, text, (prefix, _) in zip(found, texts, pairs, strict=True)
        ]


def _cut_before(encoding: Any, text: str, seam: int) -> tuple[int, bool]:
    """How many tokens lie before the letter `seam`, and whether a token lies on both sides.

    A composing normalizer (NFC) gives a token the offsets of its first letter alone. The letters
    behind it that are in no token belong to it if they compose with it.
    """
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    starts, ends = spans[:, 0], spans[:, 1]
    behind = np.flatnonzero(ends > seam)
    k = int(behind[0]) if len(behind) else len(spans)
    reach, following = int(ends[:k].max(initial=0)), int(starts[k:].min(initial=len(text)))
    if 0 < reach <= seam < following and _composes(text[reach - 1 : seam], text[seam:following]):
        return int(np.argmax(ends[:k] == reach)), True
    return k, k < len(spans) and bool(starts[k] < seam)


def _composes(left: str, right: str) -> bool:
    def normal(text: str) -> str:
        return unicodedata.normalize("NFKC", text)

    return normal(left + right) != normal(left) + normal(right)


# ------------------------------------------------------------------ long texts


@dataclass(frozen=True, slots=True)
class _Piece:
    """The tokens of text[begin:end]: ids, where in the text (n, 2), which begin a word.

    The last two are known of the first and the last OVERLAP letters; elsewhere the place is -1.
    """

    begin: int
    end: int
    ids: Array
    spans: Array
    first: Array

    def within(self, low: int, high: int) -> slice:
        """The tokens that lie wholly in text[low:high]."""
        inside = np.flatnonzero((self.spans[:, 0] >= low) & (self.spans[:, 1] <= high))
        return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)

    def same(self, mine: slice, other: _Piece, its: slice) -> bool:
        """Whether two stretches are the same tokens at the same places, words and all."""
        return (
            np.array_equal(self.ids[mine], other.ids[its])
            and np.array_equal(self.spans[mine], other.spans[its])
            and np.array_equal(self.first[mine][1:], other.first[its][1:])
        )


def in_pieces(library: Any, text: str, at: Callable[[int], None]) -> Array:
    """The ids of a long text, PIECE letters at a time.

    Definition
        Those of the whole text: library.encode(text).ids. Neighbouring pieces share OVERLAP
        letters, and are joined in the middle of them (`_joint`). Where that cannot be, the left
        piece is doubled until it can, in the end to the whole text. If that changes a token which
        an earlier joint took for sure, the whole text is tokenized at one time.

    Cost: As of the text at one time; memory of PIECE letters, of more only where no words end.
    Proof: tests/test_tokenizer.py::test_ids_in_pieces_are_those_of_the_whole
    """
    ids: list[Array] = []
    left, used = _piece(library, text, 0, PIECE), 0  # used: tokens that an earlier piece has given
    while left.end < len(text):
        begin = left.end - OVERLAP
        right = _piece(library, text, begin, begin + PIECE)
        joint = _joint(left, right, type(library.model).__name__ == "BPE")
        if joint is None:
            longer = _piece(library, text, left.begin, 2 * left.end - left.begin)
            known = slice(0, used + 1)
            if used and not left.same(known, longer, known):
                with _nothing_printed():
                    found = library.encode(text, add_special_tokens=False)
                return np.array(found.ids, np.int32)
            left = longer
        else:
            ids.append(left.ids[used : joint[0]])
            left, used = right, joint[1]
        at(left.begin)
    return np.concatenate([*ids, left.ids[used:]])


def _piece(library: Any, text: str, begin: int, end: int) -> _Piece:
    """Tokenize text[begin:end]; places and words are looked up where other pieces share it."""
    with _nothing_printed():
        found = library.encode(text[begin:end], add_special_tokens=False)
    n, end = len(found), min(end, len(text))
    head, tail = (
        bisect_left(range(n), letter, key=lambda i: found.token_to_chars(i)[0])
        for letter in (OVERLAP, end - begin - OVERLAP)
    )
    shared = [*range(head), *range(max(head, tail), n)]
    spans, words = np.full((n, 2), -1, np.int64), np.full(n, -1, np.int64)
    for i in shared:
        spans[i] = found.token_to_chars(i)
        words[i] = -1 if (word := found.token_to_word(i)) is None else word
    spans[shared] += begin
    return _Piece(begin, end, np.array(found.ids, np.int32), spans, np.diff(words, prepend=-2) != 0)


def _joint(left: _Piece, right: _Piece, inside_words: bool) -> tuple[int, int] | None:
    """Where `left` ends and `right` goes on: an index into the tokens of each; None if nowhere.

    Both must have the same tokens in the middle half of what they share, and the joint is

    - the beginning of a word there. Words are found by a scan to the right, and are tokenized one
      by one: two scans that meet go on together, whatever came before.
    - or, in BPE, between any two tokens there: a sequence of tokens is that of its text if and
      only if each pair of neighbours is that of its own text, for merges on either side of a
      boundary that is never merged away do not see one another. Each pair of the joined sequence
      stands in one of the pieces.

    A rule that looks ahead to the end of a run (digits by threes from the right) may see no end
    in either piece, and both be wrong alike. The piece that sees it will not join: `in_pieces`.
    """
    quarter = (left.end - right.begin) // 4
    low, high = right.begin + quarter, left.end - quarter
    mine, its = left.within(low, high), right.within(low, high)
    if not left.same(mine, right, its):
        return None
    inner = np.arange(1, mine.stop - mine.start)
    if left.first[mine][1:].any():
        inner = inner[left.first[mine][1:]]
    elif not inside_words:
        return None
    if not len(inner):
        return None
    k = int(inner[len(inner) // 2])
    return mine.start + k, its.start + k


# ------------------------------------------------------------------ the file


def find_tokenizer(path: PathLike) -> Path:
    """The tokenizer.json meant: the file itself, or the one in a folder.

    Raises:
        SchemaError: There is none; says how to make it of the vocabulary that is there.
    """
    found = Path(path)
    with machine_faults("open", path):
        folder = found if found.is_dir() else found.parent
        there = [one.name for like in _VOCABULARIES for one in sorted(folder.glob(like))][:8]
        is_made = (folder / "tokenizer.json").is_file()
    if found != folder and not any(map(found.match, (*_BESIDE, *_VOCABULARIES))):
        return found
    if is_made and found == folder:
        return folder / "tokenizer.json"
    if is_made:
        way_out = f"Give {str(folder / 'tokenizer.json')!r}."
    elif there or found != folder:
        way_out = f"Make one: {_remake(folder)}"
    else:
        way_out = "Give the folder or the file that has it."
    what = "has no tokenizer.json" if found == folder else "is no tokenizer.json"
    beside = f", but {', '.join(there)}" if found == folder and there else ""
    raise SchemaError(f"{WHO}: {str(found)!r} {what}{beside}. {way_out}")


def _remake(folder: Path) -> str:
    """The line of Python that writes a tokenizer.json into a folder."""
    name = str(folder)
    return f"transformers.AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r})"


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
    data = _read(path)
    with _library_faults(f"{where} as a tokenizer.json"):
        with _nothing_printed():
            library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
        ids = sorted(library.get_vocab(with_added_tokens=True).values())
        before, behind = _template(library, ids, where)
        # what it does is known now, and it may trim spaces off the offsets
        library.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        last = None if eos is None else library.token_to_id(eos)
    _require_certain(library, where)
    if eos is not None and last is None:
        raise NameUnknownError(f"{WHO}: {where} has no token {eos!r} to use as eos.")
    if last is not None and behind[-1:] == (last,):
        raise ConventionError(f"{WHO}: {where} puts {eos!r} behind each text by itself.")
    vocabulary = ids[-1] + 1
    if max((*before, *behind, vocabulary - 1)) != vocabulary - 1 or vocabulary > MAX_ID:
        raise SchemaError(f"{WHO}: {where} has ids outside its vocabulary or beyond {MAX_ID}.")
    _require_complete(library, path)
    behind += () if last is None else (last,)
    facts = {"file": path.name, "vocabulary": vocabulary, "before": [*before],
             "behind": [*behind], "tokenizers": metadata.version("tokenizers")}  # fmt: skip
    return Tokenizer(library, before, behind, vocabulary, facts)


def _require_certain(library: Any, where: str) -> None:
    """Refuse a model that draws at random."""
    for name in ("dropout", "alpha"):
        if draws := getattr(library.model, name, None):
            raise ConventionError(
                f"{WHO}: {where} has {name} {draws}, so that a text has other ids each time. "
                "Set it to null."
            )


def _read(path: Path) -> bytes:
    with machine_faults("open", path), path.open("rb") as opened:
        data = opened.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise SchemaError(f"{WHO}: {str(path)!r} is longer than {_MAX_FILE} bytes.")
    return data


def _require_complete(library: Any, path: Path) -> None:
    """Refuse a tokenizer.json that lacks tokens which the files beside it add."""
    added = {token.content: i for i, token in library.get_added_tokens_decoder().items()}
    lacks: dict[str, str] = {}
    for beside in (path.with_name(name) for name in _BESIDE):
        with machine_faults("open", beside):
            if not beside.is_file():
                continue
        for token, i in _tokens_of(beside, parse_json(WHO, repr(str(beside)), _read(beside))):
            if token not in added:
                lacks[token] = lacks.get(token) or (f"{token!r}" if i is None else f"{token!r} {i}")
            elif i not in (None, added[token]):
                lacks[token] = f"{token!r} {i}, which is {added[token]} there"
    if lacks:
        shown = ", ".join([*lacks.values()][:8]) + (", ..." if len(lacks) > 8 else "")
        raise SchemaError(
            f"{WHO}: {str(path)!r} lacks {len(lacks)} of the tokens that the files beside it add: "
            f"{shown:.500}. Write it with them: {_remake(path.parent)}"
        )


def _tokens_of(path: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """The tokens that a file beside a tokenizer.json adds, with their ids where it says so."""
    if path.name == "added_tokens.json":
        yield from ((token, i) for token, i in record.items() if type(i) is int)
        return
    decoder = record.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if (text := _spelled(token)) is not None and i.isdecimal():
            yield text, int(i)
    for key, value in record.items():
        if key.endswith("_special_tokens") and isinstance(value, list | dict):
            many = value.values() if isinstance(value, dict) else value
            yield from ((text, None) for token in many if (text := _spelled(token)) is not None)
        elif key.endswith("_token") and (text := _spelled(value)) is not None:
            yield text, None


def _spelled(token: Any) -> str | None:
    """'<s>' or {"content": "<s>", ...} → '<s>'."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


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


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """A panic of the library prints its own lines on stderr, whatever becomes of it."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
