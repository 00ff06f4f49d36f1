"""Texts → ids, whole or in pieces; and where a prefix ends."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from refcurv.files.tokenizer import Tokenizer, library_faults, nothing_printed
from refcurv.law.checks import Array

PIECE: Final = 2**18
"""Letters tokenized at one time; the library takes some 130 bytes for each."""

OVERLAP: Final = 2**14
"""Letters that two pieces share."""

PARTS: Final = 2048
"""Texts tokenized at one time, when they are short."""


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], where: str, at: Callable[[int], None]
) -> list[Array]:
    """The ids of each text, as of the whole of it; `at` hears how far a long one is."""
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
    """The ids of prefix and suffix together, how many are the prefix's, whether one is of both.

    Definition
        ids = those of the text prefix + suffix. The prefix has the tokens up to the first one that
        ends behind the seam; a token that is of both is the suffix's.

    Proof: tests/test_tokenizer.py::test_a_pair_has_the_ids_of_its_text
    """
    with library_faults(f"the tokenizer, on {where} or soon after it"):
        texts = [prefix + suffix for prefix, suffix in pairs]
        with nothing_printed():
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
    """Tokenize text[begin:end]; places and words are looked up where other pieces share it."""
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
