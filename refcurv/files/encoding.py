"""Texts → ids, whole or in pieces; and where a prefix ends."""

from __future__ import annotations

import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from refcurv.files.tokenizer import Tokenizer, library_faults, nothing_printed
from refcurv.law.checks import Array

PIECE: Final = 2**18
"""Letters that are tokenized at one time; the library takes about 130 bytes for each."""

OVERLAP: Final = 2**14
"""Letters that two pieces share."""

PARTS: Final = 2048
"""Short texts that are tokenized at one time."""


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], where: str, at: Callable[[int], None]
) -> list[Array]:
    """The ids of each text, those of the whole text; `at` is told how far a long one is read."""
    _warn_of_lost(tokenizer, texts)
    with library_faults(f"the tokenizer, on {where} or soon after it"):
        short = [text for text in texts if len(text) <= PIECE]
        with nothing_printed():
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
    """For each pair: the ids of its text, how many are the prefix's, whether a token is of both.

    Definition
        The ids are those of the text prefix + suffix. The seam is where the suffix begins. The
        prefix has the tokens up to the first one that ends behind the seam. A token on both sides
        of the seam is therefore the suffix's.

    Proof: tests/test_tokenizer.py::test_a_pair_has_the_ids_of_its_text
    """
    with library_faults(f"the tokenizer, on {where} or soon after it"):
        texts = [prefix + suffix for prefix, suffix in pairs]
        _warn_of_lost(tokenizer, texts)
        with nothing_printed():
            found = tokenizer.library.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(one.ids, np.int32), *_cut_before(one, text, len(prefix)))
            for one, text, (prefix, _) in zip(found, texts, pairs, strict=True)
        ]


def _warn_of_lost(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Say that a letter vanishes, for it has no token; the library leaves it out in silence.

    Proof: tests/test_tokenizer.py::test_letters_that_vanish_are_said
    """
    for text in texts if tokenizer.lacks else ():
        data = text.encode()
        if len(data.translate(None, tokenizer.lacks)) == len(data):
            continue
        lost = next(letter for letter in text if not {*letter.encode()}.isdisjoint(tokenizer.lacks))
        warnings.warn(
            f"the tokenizer has no token for {lost!r}, which vanishes from the ids of a text",
            stacklevel=2,
        )


def _cut_before(encoding: Any, text: str, seam: int) -> tuple[int, bool]:
    """How many tokens lie before the letter `seam`, and whether a token lies on both sides.

    A composing normalizer (NFC) reports only the first letter of what it composed as a token's
    place. Letters behind it that are in no token belong to the token if they compose with it.
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
    """The tokens of text[begin:end].

    Fields: begin, end; ids (n,); spans (n, 2), where each token lies in the text; first (n,), which
    tokens begin a word. spans and first are known in the first and the last OVERLAP letters;
    elsewhere the spans are -1.
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
        """Do two stretches have the same tokens, at the same places, with the same words?"""
        return (
            np.array_equal(self.ids[mine], other.ids[its])
            and np.array_equal(self.spans[mine], other.spans[its])
            and np.array_equal(self.first[mine][1:], other.first[its][1:])
        )


def in_pieces(library: Any, text: str, at: Callable[[int], None]) -> Array:
    """The ids of a long text, PIECE letters at a time.

    Definition
        The ids are those of the whole text, library.encode(text).ids. Neighbouring pieces share
        OVERLAP letters, and are joined in the middle of them (`_joint`). If they cannot be joined,
        the left piece is doubled until they can, at most to the whole text. If a doubled piece
        changes a token that was already joined, the whole text is tokenized at one time.

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
                with nothing_printed():
                    found = library.encode(text, add_special_tokens=False)
                return np.array(found.ids, np.int32)
            left = longer
        else:
            ids.append(left.ids[used : joint[0]])
            left, used = right, joint[1]
        at(left.begin)
    return np.concatenate([*ids, left.ids[used:]])


def _piece(library: Any, text: str, begin: int, end: int) -> _Piece:
    """Tokenize text[begin:end]; look up places and words in what neighbouring pieces share."""
    with nothing_printed():
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

    Both must have the same tokens in the middle half of what they share. The joint lies there:

    - At the beginning of a word. Words are found by a scan to the right, and are tokenized one by
      one. Two scans that once begin a word at the same letter agree from there on.
    - In BPE, if no word begins there, between any two tokens. A sequence of tokens is that of its
      text if and only if each pair of neighbours is that of the pair's own text: merges on the two
      sides of a boundary that is never merged away do not affect each other. Each pair of the
      joined sequence lies in one of the pieces.

    Some rules look ahead to the end of a run, such as digits by threes from the right. If neither
    piece sees the end, both may be wrong in the same way. A later piece that sees the end will not
    join, and `in_pieces` starts again.
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
