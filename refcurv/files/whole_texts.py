"""Files of text → documents of ids, without the special tokens that stand around a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refcurv.files.documents import Reader
from refcurv.files.paths import PathLike, input_path
from refcurv.files.tokenizer import (
    Tokenizer,
    find_tokenizer,
    library_faults,
    load_tokenizer,
    nothing_printed,
)
from refcurv.law.checks import Array, ConventionError
from refcurv.progress import Progress


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents as they are searched for passages.

    Fields: names, the file and, of several, the line; documents, ids without special tokens;
    tokenizer, if one was given.
    """

    names: tuple[str, ...]
    documents: tuple[Array, ...]
    tokenizer: Tokenizer | None

    @property
    def before(self) -> tuple[int, ...]:
        """What stands before every prompt."""
        return self.tokenizer.before if self.tokenizer else ()

    def spelled(self, ids: Array) -> str | None:
        """The text of ids, if a tokenizer was given."""
        if self.tokenizer is None:
            return None
        with library_faults("the tokenizer to spell ids"), nothing_printed():
            return str(self.tokenizer.library.decode(ids.tolist()))


def read_texts(
    files: Sequence[PathLike],
    tokenizer: PathLike | None = None,
    *,
    separator: str | None = None,
    token_dtype: str | None = None,
    progress: Progress | None = None,
) -> Texts:
    """The documents of files, as `build_corpus` reads them, special tokens apart.

    Raises:
        As `build_corpus`; ConventionError: a line of a file is a pair of prefix and suffix.

    Proof: tests/test_recited.py::test_the_command_line
    """
    known = None if tokenizer is None else load_tokenizer(find_tokenizer(tokenizer), None)
    bare = None if known is None else replace(known, before=(), behind=())
    reader = Reader(files, bare, progress, separator, token_dtype)
    found, names = [], []
    for file in files:
        for one in reader(file):
            found.append(one)
            names.append(one.where.replace(repr(str(input_path(file))), Path(file).name))
    for one in found:
        if one.prompt is not None:
            raise ConventionError(
                f"recited: {one.where} is a prefix with its suffix. Passages are searched for in "
                "whole texts; `refcurv evaluate` says which pairs are recited."
            )
    return Texts(tuple(names), tuple(one.ids for one in found), known)
