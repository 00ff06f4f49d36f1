"""Texts → corpus: tokenized, cut or packed into rows; populations by file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.files import store
from refcurv.files.corpus import load_corpus
from refcurv.files.documents import Document, Reader
from refcurv.files.ids import MAX_ID, TOKEN_DTYPES, WHO
from refcurv.files.paths import PathLike, as_path, input_path
from refcurv.files.tokenizer import find_tokenizer, load_tokenizer
from refcurv.files.unchanged import seen, sha256_unchanged
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    SchemaError,
    require_choice,
    require_range,
)
from refcurv.law.conventions import NO_LABEL
from refcurv.model.corpus import KINDS, SPLITS, Corpus, Population
from refcurv.model.given import require_callable, require_flag, require_list, shown
from refcurv.model.labels import shift_labels
from refcurv.progress import Progress

_SYNTAX: Final = "NAME:KIND:SPLIT[:CHANCE]=FILE"


@dataclass(frozen=True, slots=True)
class _Asked:
    """One population as asked for."""

    name: str
    kind: str
    split: str
    chance: float
    file: str


# ------------------------------------------------------------------ the function


def build_corpus(
    texts: Sequence[PathLike],
    tokenizer: PathLike | None = None,
    *,
    length: int = 512,
    pack: bool = False,
    eos: str | None = None,
    separator: str | None = None,
    token_dtype: str | None = None,
    limit: int | None = None,
    populations: Sequence[str] = (),
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize files into rows of a corpus, and files of prefixes and suffixes into populations.

    Definition
        Documents, by the suffix of the file's name. `.jsonl`, `.ndjson`, `.jsonlines`: an object
        per line, either a document (`text` or `input_ids`) or a pair of `prefix` (or `prefix_ids`,
        `prefix_text`) and `suffix` (or `suffix_ids`, `target_suffix`, `suffix_text`), each text or
        a list of ids; ids go before text where a line has both; or a pair of `prompt` and `answer`.
        A pair whose `split` is dev or test is in populations of that split alone. Other keys are
        counted as ignored. Where the first line has `preamble` or `shots`, a list of `prompt` and
        `answer`, the preamble and the shots stand before every prompt, with `between` (by default a
        line end) behind each shot.
        `.npy`: integers, (T,) one document or (N, T) one per row. `.bin`: one document, a shard
        of llm.c or bare ids of `token_dtype`, little-endian. `.h5`: a corpus file, alone, whose
        rows stay as they are and whose populations gain those asked for. NO_TEXT's suffixes are
        refused. Anything else is text: UTF-8 without a NUL, one document per file, or those
        between the separators; of its characters only a byte order mark is left out.
        Keys beside `input_ids`: the ids at the zeros of `attention_mask` are padding, on the right,
        and are left out. labels[t] is about token t, as in Hugging Face's data; a negative label
        means that the token is not asked for. `position_ids` must be 0, 1, 2, ... and
        `token_type_ids` 0. Any other key that says how tokens count (`loss_mask`,
        `segment_ids`, ...) is refused.
        Without `pack` a document is cut every `length` tokens, each piece a row, padded on the
        right. With it the documents follow one another through rows of `length` and are cut
        where a row ends; each piece is a segment, numbered from 0 in its row. Neither drops a
        token. A row's width is `length`, or the longest row if that is shorter. Labels are
        LABELS' default, so that the last token of each piece has none, less those of tokens that
        are not asked for.
        Ids are those of the whole text, however long it is. The ids of a pair are those of the
        text prefix + suffix. The prefix has the tokens up to its end. A token that covers this end
        belongs to the suffix, and the pair is counted as `straddling`.
        Special tokens: a text gets what the tokenizer's own post-processor puts before and behind
        it (often nothing), then `eos` if given. A pair gets what is put before a text. Ids given as
        ids get nothing. If only one half of a pair is text, it is tokenized alone. A special token
        spelled out in a text is that token. Truncation and padding that a tokenizer.json asks for
        are turned off.
        Populations: prefix and suffix are never cut. A whole document is cut every `length`
        tokens with prompt_length 1, and is of kind `text` only.

    Args:
        texts: Files for the rows; may be empty if there are populations.
        tokenizer: A tokenizer.json, the folder that has it, or a GGUF file; not needed where
            all is ids.
        length: The largest width of a row, at least 2.
        pack: Several documents in a row, as segments.
        eos: The token, spelled as in tokenizer.json, that is put behind each whole text.
        separator: The text between the documents of a text file, such as `<|endoftext|>`. It is
            part of none of them.
        token_dtype: One of TOKEN_DTYPES, for `.bin` files.
        limit: The most tokens of all rows together; the document that reaches it is cut, and what
            follows is left out. Populations have no limit.
        populations: Each `NAME:KIND:SPLIT[:CHANCE]=FILE`, as in `quotes:recite:test=quotes.jsonl`.
        progress: Called with (bytes read, bytes).

    Returns:
        Corpus; source["made_from"] has files by SHA-256, options, versions and `counts`:
        `save_corpus` writes it into the file.

    Raises:
        SchemaError: A file that is missing, changed meanwhile, or not what its name says; names
            the file and the line or row.
        ConventionError: A population that is no `NAME:KIND:SPLIT[:CHANCE]=FILE`, a name used
            twice, text without a tokenizer, a tokenizer that draws at random, padding that is not
            on the right, labels of other tokens, a separator or token_dtype for nothing.
        DTypeError, RangeError, ShapeError: Ids that are no integers, negative, or unknown to the
            tokenizer; arrays of other than one or two axes; length below 2.
        NameUnknownError: The tokenizer has no token `eos`.
        EmptyError: A file without any token; neither texts nor populations.
        StorageError: The disk cannot be read.

    Cost: One pass over the files before one to hash them; 8 bytes a token, one text file, and PIECE
        letters at a time in the tokenizer (a pair, and a text whose words do not end, at once).
    Source: METHOD, Files; keys as in the files of goodfire-ai/memorization_kfac, `data/`.
    Proof:  tests/test_texts.py::test_rows_by_hand, ::test_packing_equals_loops,
        ::test_no_token_is_lost_or_doubled, ::test_O52_packed_documents_are_separate_documents;
        tests/test_json_lines.py::test_labels_by_hand
    """
    _require_options(length, pack, separator, token_dtype)
    _require_called(eos, progress)
    texts = [as_path(WHO, one) for one in require_list(WHO, "texts", texts, "['a.txt']")]
    _require_limit(limit, texts)
    populations = require_list(WHO, "populations", populations, f"['{_SYNTAX}']")
    asked = [_parse(text) for text in populations]
    files = [*texts, *(one.file for one in asked)]
    if not files:
        raise EmptyError(f"{WHO}: neither texts nor populations are given.")
    tokenizer = None if tokenizer is None else find_tokenizer(tokenizer)
    names = _named([*files, *([] if tokenizer is None else [tokenizer])])
    before = seen(WHO, names.values())
    known = None if tokenizer is None else load_tokenizer(tokenizer, eos)
    if eos is not None and known is None:
        raise ConventionError(f"{WHO}: eos {eos!r} is a token of a tokenizer; give the tokenizer.")
    reader = Reader(files, known, progress, separator, token_dtype)
    old = _old_corpus(texts, pack, [one.name for one in asked])
    rows, counts = ({}, {}) if old else _rows(map(reader, texts), length, pack, limit)
    new = {one.name: _population(one, reader(one.file), length) for one in asked}
    if counts.get("tokens") != limit or limit is None:  # else not all was read
        _require_used(reader, separator, token_dtype)
    sha256 = sha256_unchanged(WHO, before)
    if progress:
        progress(reader.total, reader.total)
    made_from = {
        "inputs": {name: sha256[path] for name, path in names.items()},
        "tokenizer": dict(known.facts) if known else None,
        "options": {"length": length, "pack": pack, "eos": eos, "separator": separator,
                    "token_dtype": token_dtype, "limit": limit, "populations": [*populations]},
        "counts": counts | {
            "populations": {name: count for name, (_, count) in new.items()},
            "ignored_keys": sorted(reader.ignored)[:100],
        },
    }  # fmt: skip
    made = {name: population for name, (population, _) in new.items()}
    source = MappingProxyType({"made_from": made_from})
    if old:
        return dataclasses.replace(old, populations={**old.populations, **made}, source=source)
    return Corpus(**rows, populations=made, source=source)


# ------------------------------------------------------------------ what is asked for


def _require_limit(limit: int | None, texts: Sequence[PathLike]) -> None:
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
        raise RangeError(f"{WHO}: limit must be an integer of at least 2; got {limit!r}.")
    if all(Path(text).suffix.lower() == ".h5" for text in texts):
        raise ConventionError(
            f"{WHO}: a limit is for texts that become rows, and none is given. Populations have "
            "no limit."
        )


def _require_called(eos: str | None, progress: Progress | None) -> None:
    if not isinstance(eos, str | None):
        raise ConventionError(f"{WHO}: eos must be a token's text; got {shown(eos)}.")
    if progress is not None:
        require_callable(WHO, "progress", progress)


def _require_options(
    length: int, pack: bool, separator: str | None, token_dtype: str | None
) -> None:
    require_flag(WHO, "pack", pack)
    if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= MAX_ID:
        raise RangeError(
            f"{WHO}: length must be an integer of at least 2, for a row of one token predicts "
            f"nothing, and at most {MAX_ID}; got {length!r:.100}."
        )
    if not isinstance(separator, str | None):
        raise ConventionError(f"{WHO}: the separator must be a text; got {shown(separator)}.")
    if separator == "":
        raise ConventionError(f"{WHO}: the separator is empty, and would part every letter.")
    if token_dtype is not None:
        require_choice(WHO, "token_dtype", token_dtype, TOKEN_DTYPES)


def _require_used(reader: Reader, separator: str | None, token_dtype: str | None) -> None:
    """Refuse options that had no effect: they were meant for files that are not here."""
    if separator is not None and not reader.split:
        raise ConventionError(
            f"{WHO}: the separator {separator!r} is in no text file. Is it spelled as there? Leave "
            "it out if each file is one document."
        )
    if token_dtype is not None and not reader.bare:
        raise ConventionError(f"{WHO}: token_dtype is for .bin files, and none is given.")


def _parse(text: str) -> _Asked:
    """'quotes:recite:test=quotes.jsonl' → _Asked."""
    if not isinstance(text, str):
        raise ConventionError(f"{WHO}: a population is {_SYNTAX}; got {shown(text)}.")
    words, _, file = text.partition("=")
    parts = words.split(":")
    if not file or len(parts) not in (3, 4):
        raise ConventionError(
            f"{WHO}: a population is {_SYNTAX}, as in quotes:recite:test=quotes.jsonl; got "
            f"{text!r}."
        )
    name, kind, split = parts[:3]
    if "." in name:
        raise ConventionError(f"{WHO}: a population's name has no dots; got {name!r}.")
    store.to_path(name)
    require_choice(WHO, f"kind of population {name!r}", kind, KINDS)
    require_choice(WHO, f"split of population {name!r}", split, SPLITS)
    chance = parts[3] if len(parts) == 4 else 0.0
    chance = require_range(WHO, f"chance of population {name!r}", chance, 0.0, 1.0)
    return _Asked(name, kind, split, chance, file)


def _named(files: Sequence[PathLike]) -> dict[str, Path]:
    """{file name: path}; the whole path where two files have one name."""
    out: dict[str, Path] = {}
    for file in files:
        path = input_path(file)
        out[path.name if out.get(path.name, path) == path else str(path)] = path
    return out


def _old_corpus(texts: Sequence[PathLike], pack: bool, names: Sequence[str]) -> Corpus | None:
    """The corpus to add populations to, if one is given. Names that it has already are refused."""
    old = [path for path in texts if Path(path).suffix.lower() == ".h5"]
    if old and (len(texts) > 1 or pack):
        raise ConventionError(
            f"{WHO}: {str(old[0])!r} is a corpus file, to which populations are added. Its "
            "rows stay as they are: give no other text, and do not pack."
        )
    if old and not names:
        raise EmptyError(f"{WHO}: no population to add to {str(old[0])!r} is given.")
    corpus = load_corpus(old[0]) if old else None
    taken = list(corpus.populations) if corpus else []
    for name in names:
        if name in taken:
            raise ConventionError(f"{WHO}: two populations are named {name!r}.")
        taken.append(name)
    return corpus


# ------------------------------------------------------------------ rows


def _rows(
    files: Iterable[Iterator[Document]], length: int, pack: bool, limit: int | None
) -> tuple[Any, Any]:
    """The arrays of a Corpus, and the counts that are printed."""
    found = list(_within(limit, (document for file in files for document in file)))
    documents = [document for document in found if len(document.ids)]
    ids = [document.ids for document in documents]
    if pack:
        tokens, real, segments = _pack(ids, length)
        pieces = int((segments.max(axis=1, initial=-1) + 1).sum())
    else:
        tokens, lengths = _cut(ids, length)
        real, segments = np.arange(tokens.shape[1]) < lengths[:, None], None
        pieces = len(tokens)
    labels = _labels(documents, tokens, real, segments)
    n = int(real.sum())
    counts = {
        "documents": len(documents),
        "empty": len(found) - len(documents),
        "tokens": n,
        "rows": len(tokens),
        "width": tokens.shape[1],
        "padding": tokens.size - n,
        "cuts": pieces - len(documents),
        "unlabelled": pieces if labels is None else int((real & (labels < 0)).sum()),
        "limit": limit,
    }
    mask = None if n == tokens.size else real.astype(np.uint8)
    return {"tokens": tokens, "mask": mask, "segments": segments, "labels": labels}, counts


def _within(limit: int | None, documents: Iterable[Document]) -> Iterator[Document]:
    """The documents up to so many tokens; the last one is cut."""
    left = limit
    for one in documents:
        if left is None or len(one.ids) < left:
            yield one
            left = None if left is None else left - len(one.ids)
            continue
        asked = None if one.asked is None else one.asked[:left]
        yield dataclasses.replace(one, ids=one.ids[:left], asked=asked)
        return


def _labels(
    documents: Sequence[Document], tokens: Array, real: Array, segments: Array | None
) -> Array | None:
    """LABELS' default without the labels of tokens that are not asked for; None if all are."""
    if all(document.asked is None or document.asked.all() for document in documents):
        return None
    asked = np.zeros(tokens.shape, bool)
    asked[real] = np.concatenate(
        [np.ones(len(one.ids), bool) if one.asked is None else one.asked for one in documents]
    )
    runs = np.zeros_like(tokens) if segments is None else segments
    labels = shift_labels(tokens, real, runs).astype(np.int32)
    labels[:, :-1][~asked[:, 1:]] = NO_LABEL
    return labels


def _cut(documents: Sequence[Array], length: int) -> tuple[Array, Array]:
    """Each document's pieces of `length`: (N, T) padded with 0, and how long each is."""
    pieces = [ids[i : i + length] for ids in documents for i in range(0, len(ids), length)]
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    tokens = np.zeros((len(pieces), int(lengths.max(initial=0)) or length), np.int32)
    for row, piece in zip(tokens, pieces, strict=True):
        row[: len(piece)] = piece
    return tokens, lengths


def _pack(documents: Sequence[Array], length: int) -> tuple[Array, Array, Array]:
    """Documents end to end, folded into rows of `length`: tokens, real and segments, (N, T)."""
    lengths = [len(ids) for ids in documents]
    total = sum(lengths)
    width = min(length, total) or length
    shape = (-(-total // width), width)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens.reshape(-1)[:total] = np.concatenate(documents) if documents else []
    segments.reshape(-1)[:total] = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    real = (np.arange(tokens.size) < total).reshape(shape)
    return tokens, real, np.where(real, segments - segments[:, :1], 0).astype(np.int32)


def _require_judgeable(asked: _Asked, document: Document) -> None:
    """Refuse a document that its population cannot use."""
    prompt, where = document.prompt, f"{WHO}: {document.where}"
    if document.asked is not None and not document.asked.all():
        raise ConventionError(
            f"{where} has labels, and population {asked.name!r} asks for all of a document or for "
            "a suffix. Give prefix_ids and suffix_ids."
        )
    if prompt is None and asked.kind != "text":
        raise SchemaError(
            f"{where} has no prefix and suffix, which population {asked.name!r} of kind "
            f"{asked.kind!r} needs. Give a .jsonl of pairs."
        )
    if prompt is not None and not 1 <= prompt < len(document.ids):
        part = "prefix" if prompt < 1 else "suffix"
        own = " of its own: the first goes on into the suffix" * document.straddles
        raise EmptyError(f"{where}: the {part} has no token{own}.")


def _population(
    asked: _Asked, documents: Iterable[Document], length: int
) -> tuple[Population, dict[str, int | str]]:
    """One population, and its counts."""
    sequences: list[Array] = []
    prompts: list[int] = []
    empty = straddling = others = 0
    for document in documents:
        if document.split not in (None, asked.split):
            others += 1
            continue
        _require_judgeable(asked, document)
        ids = document.ids
        if document.prompt is not None:
            sequences.append(ids)
            prompts.append(document.prompt)
            straddling += document.straddles
            continue
        empty += not len(ids)
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        sequences += pieces
        prompts += [1] * len(pieces)
    if not sequences:
        raise EmptyError(f"{WHO}: no line of {asked.file!r} is of split {asked.split!r}.")
    longest = max(map(len, sequences))
    tokens, lengths = _cut(sequences, longest)
    prompt_length = np.array(prompts, np.int32)
    asked_for = int((lengths - prompt_length).sum())
    counts: dict[str, int | str] = {
        "kind": asked.kind, "split": asked.split, "rows": len(tokens), "width": longest,
        "tokens": int(lengths.sum()), "padding": tokens.size - int(lengths.sum()), "empty": empty,
        "straddling": straddling, "other_split": others, "asked": asked_for,
    }  # fmt: skip
    made = Population(tokens, prompt_length, lengths, asked.kind, asked.split, asked.chance)
    return made, counts
