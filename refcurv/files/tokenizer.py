"""A tokenizer.json, read with suspicion: what it does is known before a text is tokenized."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from refcurv.files.disk import HDF5, parse_json, reading
from refcurv.files.gguf.reading import first_part
from refcurv.files.ids import MAX_ID, WHO
from refcurv.files.mistaken import is_gguf
from refcurv.files.paths import PathLike, as_path, input_path, is_folder, machine_faults, one_line
from refcurv.law.checks import (
    ConventionError,
    NameUnknownError,
    RefcurvError,
    SchemaError,
)
from refcurv.law.libraries import needed

_MAX_FILE: Final = 2**28  # bytes of a tokenizer.json; the largest known has a tenth
_DIGITS: Final = len(str(MAX_ID))  # of an id; Python makes no integer of thousands
_TRIED: Final = 2048  # words of the vocabulary, to see what is put around a text
_VOCABULARIES: Final = ("*.model", "*.tiktoken", "vocab.json", "merges.txt", "vocab.txt")
_BESIDE: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The library's object, and the ids that are put before and behind each text.

    `lacks` are the bytes that have no token: they vanish from a text.
    """

    library: Any
    before: tuple[int, ...]
    behind: tuple[int, ...]
    vocabulary: int
    facts: Mapping[str, Any]
    lacks: bytes = b""


# ------------------------------------------------------------------ the file


def find_tokenizer(path: PathLike) -> Path:
    """The file that `path` means: itself, the tokenizer.json in a folder, a GGUF's first part.

    Raises:
        SchemaError: There is none; says how to make it of the vocabulary that is there.
    """
    found = as_path("open", path)
    with machine_faults("open", path):
        folder = found if is_folder("open", found) else found.parent
        there = [one.name for like in _VOCABULARIES for one in sorted(folder.glob(like))][:8]
        is_made = (folder / "tokenizer.json").is_file()
    if found != folder and not any(map(found.match, (*_BESIDE, *_VOCABULARIES))):
        with machine_faults("open", path):
            return first_part(found) if is_gguf(found) else found
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
    """Read a tokenizer.json, or that of a GGUF file; refuse one that draws at random.

    What would cut or pad is switched off.
    """
    missing = f"{WHO}: tokenizing needs the library tokenizers: pip install 'refcurv[checkpoints]'."
    with needed("tokenizers", ConventionError(missing)):
        import tokenizers
    path = input_path(file)
    where = repr(str(path))
    from_gguf = is_gguf(path)
    data = b"" if from_gguf else _read(path)
    with library_faults(f"{where} as a tokenizer.json"):
        with nothing_printed():
            library = _of_gguf(path) if from_gguf else tokenizers.Tokenizer.from_buffer(data)
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
    if not from_gguf:
        _require_complete(library, path)
    behind += () if last is None else (last,)
    facts = {"file": path.name, "vocabulary": vocabulary, "before": [*before],
             "behind": [*behind], "tokenizers": metadata.version("tokenizers")}  # fmt: skip
    return Tokenizer(library, before, behind, vocabulary, facts, _lacks(library))


def _lacks(library: Any) -> bytes:
    """The bytes for which byte-level BPE has neither a token nor one for the unknown.

    It spells a byte as the letter of its number where that can be printed; the others follow from
    256 on.
    """
    cut = library.pre_tokenizer
    bytewise = cut is not None and b'"ByteLevel"' in cut.__getstate__()
    if type(library.model).__name__ != "BPE" or library.model.unk_token or not bytewise:
        return b""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}
    return bytes(b for b, letter in letters.items() if library.token_to_id(letter) is None)


def _of_gguf(path: Path) -> Any:
    from refcurv.files.gguf.tokenizer import gguf_tokenizer

    return gguf_tokenizer(path)


def _require_certain(library: Any, where: str) -> None:
    """Refuse a model that draws at random."""
    for name in ("dropout", "alpha"):
        if draws := getattr(library.model, name, None):
            raise ConventionError(
                f"{WHO}: {where} has {name} {draws}, so that a text has other ids each time. "
                "Set it to null."
            )


def _read(path: Path) -> bytes:
    with reading("open", path) as opened:
        if (data := opened.read(len(HDF5))) == HDF5:
            raise SchemaError(
                f"{WHO}: {str(path)!r} is an HDF5 file, which has no tokenizer. Give the "
                "tokenizer.json of the checkpoint, its folder, or a GGUF file."
            )
        data += opened.read(_MAX_FILE + 1 - len(data))
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
        for token, i in _tokens_of(beside, parse_json(f"{WHO}: {str(beside)!r}", _read(beside))):
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
            yield text, int(i) if len(i) <= _DIGITS else None
    for key, value in record.items():
        if key.endswith("_special_tokens") and isinstance(value, list | dict):
            many = value.values() if isinstance(value, dict) else value
            yield from ((text, None) for token in many if (text := _spelled(token)) is not None)
        elif key.endswith("_token") and (text := _spelled(value)) is not None:
            yield text, None


def _spelled(token: Any) -> str | None:
    """The spelling of a token, from '<s>' or {"content": "<s>", ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _template(
    library: Any, ids: Sequence[int], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and behind a text; tried on words it knows."""
    if not ids:
        raise SchemaError(f"{WHO}: {where} has no vocabulary.")
    if not library.num_special_tokens_to_add(False):
        return (), ()
    for word in map(library.id_to_token, ids[:_TRIED]):
        plain = library.encode(word, add_special_tokens=False).ids
        full = library.encode(word)
        own = [i for i, special in enumerate(full.special_tokens_mask) if not special]
        if plain and [full.ids[i] for i in own] == plain and own[-1] - own[0] == len(own) - 1:
            return tuple(full.ids[: own[0]]), tuple(full.ids[own[-1] + 1 :])
    raise ConventionError(
        f"{WHO}: {where}: its post-processor does more than put tokens before and behind texts."
    )


@contextmanager
def library_faults(what: str) -> Iterator[None]:
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
def nothing_printed() -> Iterator[None]:
    """Send stderr to nowhere: a panic of the library prints its own lines there."""
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
