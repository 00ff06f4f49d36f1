"""Which passages of some texts a model recites: windows judged by one pass that is told the truth.

At every position the model is given the true tokens before. As long as its likeliest token is the
true one, that is what decoding would give it too, so a run of right tokens is a recitation whose
prompt is everything before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.curvature import room
from refcurv.evaluation.decode import at_scored, batches, require_population
from refcurv.evaluation.held import held
from refcurv.evaluation.lines import Lines
from refcurv.files import store
from refcurv.files.digest import digest, sha256_of
from refcurv.files.paths import as_path
from refcurv.law.checks import (
    Array,
    EmptyError,
    RoomError,
    SchemaError,
    as_integers,
    overflow_hint,
    require_choice,
    require_finite,
)
from refcurv.law.conventions import describe
from refcurv.law.words import number_of
from refcurv.model.corpus import SPLITS, Population
from refcurv.model.given import require_callable, require_list, require_model, require_whole
from refcurv.model.weights import Model
from refcurv.progress import Progress, counter, goes_on, silent, size

WHO = "recited"

PIECE: Final = 16_384
"""Tokens of windows that are kept as one line.  Chosen: a large model reads them in minutes."""

Spelled = Callable[[Array], str | None]
"""The text of some ids, or None where no tokenizer is known."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What is recited: tokens begin .. begin + prompt of a document are given, `said` follow.

    Fields: document, its number; begin, where the prompt begins; prompt, said: how many tokens;
    split, one of SPLITS, that of all passages of the document.
    """

    document: int
    begin: int
    prompt: int
    said: int
    split: str

    @property
    def asked(self) -> slice:
        """Which tokens of the document are recited."""
        return slice(self.begin + self.prompt, self.begin + self.prompt + self.said)


@dataclass(frozen=True, slots=True, eq=False)
class Recited:
    """What `recited` found.

    Fields:
        passages: in the order of the documents.
        documents: the ids of each, (n,) int32. before: what every prompt begins with.
        windows: how many were judged. short: documents that have none.
        runs: (suffix + 1,), how many windows have a longest run of 0, 1, ... right tokens.
        right: the share of all tokens asked for that is the likeliest one.
        repeats, doubles, overlaps: how many recited windows were left out, as `recited` says.
    """

    passages: tuple[Passage, ...]
    documents: tuple[Array, ...]
    before: tuple[int, ...]
    windows: int
    short: int
    runs: Array
    right: float
    repeats: int
    doubles: int
    overlaps: int

    def ids(self, one: Passage) -> tuple[Array, Array]:
        """The ids of a prompt, with what stands before, and of what is recited."""
        document = self.documents[one.document]
        given = document[one.begin : one.begin + one.prompt]
        return np.concatenate([np.array(self.before, np.int32), given]), document[one.asked]

    def population(self, split: str) -> Population:
        """The passages of a split, of kind `recite`.

        Raises:
            EmptyError: there are none.
        """
        require_choice(WHO, "split", split, SPLITS)
        found = [self.ids(one) for one in self.passages if one.split == split]
        if not found:
            raise EmptyError(f"{WHO}: no passage of split {split!r} was found.")
        prompt = np.array([len(given) for given, _ in found], np.int32)
        length = prompt + np.array([len(said) for _, said in found], np.int32)
        tokens = np.zeros((len(found), int(length.max())), np.int32)
        for row, pair, n in zip(tokens, found, length, strict=True):
            row[:n] = np.concatenate(pair)
        return Population(tokens, prompt, length, "recite", split)

    def rows(self, names: Sequence[str], spelled: Spelled) -> Iterator[dict[str, Any]]:
        """A passage's facts as plain values, as `refcurv corpus` reads a pair.

        Keys: document, its name; token, where the prompt begins in it; split; prefix_ids, with
        what stands before; suffix_ids; and, where they can be spelled, prefix and suffix.
        """
        for one in self.passages:
            pair = dict(zip(("prefix", "suffix"), self.ids(one), strict=True))
            text = {key: spelled(ids) for key, ids in pair.items()}
            yield {
                "document": names[one.document], "token": one.begin, "split": one.split,
                **{f"{key}_ids": ids.tolist() for key, ids in pair.items()},
                **{key: said for key, said in text.items() if said is not None},
            }  # fmt: skip


def recited(
    model: Model,
    documents: Sequence[Array],
    *,
    prefix: int = 32,
    suffix: int = 16,
    stride: int = 8,
    least: int | None = None,
    before: Sequence[int] = (),
    lines: str | Path | None = None,
    progress: Progress = silent,
) -> Recited:
    """The passages of documents that a model recites, each with the prompt that it needs.

    Definition
        A window: prefix + suffix consecutive tokens of a document, one every `stride` tokens.
        r_n = [argmax_v logits(before, window[: prefix + n])[last, v] is window[prefix + n]], with
              the lowest id on ties, n = 0 .. suffix − 1
        A window is recited if r is 1 on `least` or more consecutive n. The first of its longest
        runs is what is said, and the window up to there is the prompt: at least `prefix` tokens.
        So greedy decoding from the prompt says just this.
        Left out, in this order: repeats, where ⌈said/2⌉ consecutive said tokens stand earlier in
        the window; doubles, whose said tokens were found in an earlier window of another
        document; overlaps, where a said token is also said by a passage of the document that is
        longer, or as long and earlier.
        Splits go by document: those with most passages first, each to the split with fewer.

    Args:
        model: causal, of tokens; computes in its `dtype`.
        documents: ids, (n,) each.
        prefix: tokens that a prompt has at least, >= 1.
        suffix: tokens that are asked for behind it, >= 1.
        stride: from one window to the next, >= 1.
        least: how many right tokens in a row count, 1 .. suffix; None: all.
        before: ids that stand before every window, as a tokenizer puts them before a text.
        lines: a file that keeps what is found, every PIECE tokens. A run that was killed goes on
            from it, with the same results; the caller removes it.
        progress: called with (batches done, batches).

    Returns:
        Recited.

    Raises:
        RangeError: a number outside its range; a token outside the vocabulary; more positions than
            were learned. ConventionError: a model of images, or a bidirectional one; `lines` of
            another run. SchemaError: `lines` that no run left, or that was changed since.
        EmptyError: no document has a window. NonFiniteError: a logit is NaN or infinite.
        RoomError: memory does not hold the ids of all windows.

    Cost: one forward pass over the windows: (prefix + suffix) / stride times the text.
    Source: METHOD, Recitation; arXiv 2510.24256, section 4 (exact suffixes).
    Proof:  tests/test_recited.py::test_by_loops, ::test_greedy_decoding_says_each_passage,
        ::test_a_killed_run_goes_on
    """
    require_model(WHO, model)
    require_callable(WHO, "progress", progress)
    for what, value in (("prefix", prefix), ("suffix", suffix), ("stride", stride)):
        require_whole(WHO, what, value, 1, 2**20)
    least = require_whole(WHO, "least (--run)", suffix if least is None else least, 1, suffix)
    ids = [
        as_integers(WHO, f"document {n}", one, (None,), "(n,)", np.int32)
        for n, one in enumerate(require_list(WHO, "documents", documents, "[ids, ids]"))
    ]
    front = require_list(WHO, "before", before, "[1]")
    front = as_integers(WHO, "before", front, (None,), "(n,)", np.int32).tolist() if front else []
    path = None if lines is None else as_path(WHO, lines)
    place_W2 = _windows([len(one) for one in ids], prefix + suffix, stride)
    _require_room(len(place_W2), prefix + suffix + len(front))
    window_WT = np.array([ids[d][b : b + prefix + suffix] for d, b in place_W2], np.int32)
    asked = _asked(model, window_WT, prefix, front)
    facts = {} if lines is None else {
        "prefix": prefix, "suffix": suffix, "stride": stride, "before": front,
        "texts": sha256_of(ids), "weights": digest(model), "dtype": model.dtype,
        "law": describe(), **store.machine(),
    }  # fmt: skip
    known = Lines(path, facts, who=WHO)
    right_WN = _right(model, asked, known, progress)
    run_W, at_W = longest_runs(right_WN)
    found = [
        _Window(int(d), int(b), prefix + int(at), int(run), window)
        for (d, b), at, run, window in zip(place_W2, at_W, run_W, window_WT, strict=True)
        if run >= least
    ]
    fresh = [one for one in found if not one.repeats]
    single = list(_without_doubles(fresh))
    apart = _apart(single)
    passages = tuple(
        Passage(one.document, one.begin, one.prompt, one.said, to) for one, to in _split(apart)
    )
    return Recited(
        passages, tuple(ids), tuple(front), len(window_WT),
        len(ids) - len(np.unique(place_W2[:, 0])), np.bincount(run_W, minlength=suffix + 1),
        float(right_WN.mean()), len(found) - len(fresh), len(fresh) - len(single),
        len(single) - len(apart),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A window that is recited, as Passage counts it."""

    document: int
    begin: int
    prompt: int
    said: int
    ids_T: Array

    @property
    def asked(self) -> tuple[int, ...]:
        return tuple(self.ids_T[self.prompt : self.prompt + self.said].tolist())

    @property
    def repeats(self) -> bool:
        """Does half of what is said, or more, stand earlier in the window, as one run?"""
        n, ids = -(-self.said // 2), self.ids_T[: self.prompt + self.said].tolist()
        seen = set()
        for end in range(n, len(ids) + 1):
            run = tuple(ids[end - n : end])
            if end - n >= self.prompt and run in seen:
                return True
            seen.add(run)
        return False


def _windows(lengths: Sequence[int], size: int, stride: int) -> Array:
    """(W, 2): document and first token of every window."""
    place = [(d, b) for d, n in enumerate(lengths) for b in range(0, n - size + 1, stride)]
    if not place:
        longest = max(lengths, default=0)
        raise EmptyError(
            f"{WHO}: a window has {number_of(size, 'token')}, and none of "
            f"{number_of(len(lengths), 'document')} is so long; the longest has {longest}. Give "
            "longer texts, or a smaller prefix or suffix."
        )
    return np.array(place)


def _require_room(W: int, T: int) -> None:
    """Refuse windows that memory does not hold: the ids are there three times, four bytes each.

    Proof: tests/test_recited.py::test_windows_that_memory_does_not_hold
    """
    need, free = 12 * W * T, room.available()
    if free is not None and need > free:
        raise RoomError(
            f"{WHO}: {number_of(W, 'window')} of {number_of(T, 'token')} take {size(need)}, and "
            f"{size(free)} are free. Give a larger stride, a shorter prefix, or fewer texts."
        )


def _asked(model: Model, window_WT: Array, prefix: int, before: Sequence[int]) -> Population:
    """The windows as prompts of `prefix` tokens and what should follow."""
    W = len(window_WT)
    front_WF = np.tile(np.array([*before], np.int32), (W, 1))
    tokens = np.concatenate([front_WF, window_WT], axis=1)
    prompt = np.full(W, front_WF.shape[1] + prefix, np.int32)
    asked = Population(tokens, prompt, np.full(W, tokens.shape[1], np.int32), "recite", "test")
    require_population(WHO, "windows", asked, model.config)
    return asked


def _right(model: Model, asked: Population, known: Lines, progress: Progress) -> Array:
    """(W, N) bool: is the likeliest token the true one? A line of `known` for each PIECE."""

    def take(logit_NV: Array, label_N: Array) -> Array:
        require_finite(WHO, "the logits", logit_NV, overflow_hint(logit_NV.dtype))
        return np.asarray(logit_NV.argmax(axis=-1) == label_N)

    W, T = asked.tokens.shape
    N = T - int(asked.prompt_length[0])
    pieces = [_rows(asked, at, at + PIECE // T + 1) for at in range(0, W, PIECE // T + 1)]
    sizes = [len(batches(piece)) for piece in pieces]
    parameters = held(WHO, model, pieces)
    if len(known) > 1:
        goes_on(progress, f"{len(known) - 1} of {number_of(len(pieces), 'piece')}")
    found = []
    for at, piece in enumerate(pieces):
        done = counter(progress, sum(sizes), sum(sizes[:at]))

        def make(piece: Population = piece, done: Callable[[], object] = done) -> dict[str, str]:
            right = np.concatenate(at_scored(model.config, parameters, piece, take, done))
            right_BN = np.empty((len(piece.tokens), N), bool)
            right_BN[np.concatenate(batches(piece))] = right.reshape(-1, N)
            return {"right": np.packbits(right_BN).tobytes().hex()}

        progress(sum(sizes[:at]), sum(sizes))
        line = known.once("windows", {"piece": at}, make)
        found.append(_unpacked(known.where, line.get("right"), len(piece.tokens), N))
    progress(sum(sizes), sum(sizes))
    return np.concatenate(found)


def _rows(asked: Population, begin: int, end: int) -> Population:
    """Some of the windows."""
    cut = slice(begin, end)
    return replace(
        asked,
        tokens=asked.tokens[cut],
        prompt_length=asked.prompt_length[cut],
        length=asked.length[cut],
    )


def _unpacked(where: str, packed: object, B: int, N: int) -> Array:
    """(B, N) bool, from the eight to a byte in hexadecimal that a line of a file has."""
    try:
        raw = bytes.fromhex(packed if isinstance(packed, str) else "?")
    except ValueError:
        raw = b""
    if len(raw) != -(-B * N // 8):
        raise SchemaError(
            f"{where} has a line without its {number_of(B, 'window')}. Delete it to start anew."
        )
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=B * N).reshape(B, N).astype(bool)


def longest_runs(right_WN: Array) -> tuple[Array, Array]:
    """The length of each row's longest run of True, and where the first such run begins.

    Proof: tests/test_recited.py::test_longest_runs_by_hand
    """
    W, N = right_WN.shape
    now_W, best_W, at_W = (np.zeros(W, np.int64) for _ in range(3))
    for n in range(N):
        now_W = (now_W + 1) * right_WN[:, n]
        longer_W = now_W > best_W
        best_W[longer_W] = now_W[longer_W]
        at_W[longer_W] = n + 1 - now_W[longer_W]
    return best_W, at_W


def _without_doubles(windows: Sequence[_Window]) -> Iterator[_Window]:
    first: dict[tuple[int, ...], int] = {}
    for one in windows:
        if first.setdefault(one.asked, one.document) == one.document:
            yield one


def _apart(windows: Sequence[_Window]) -> list[_Window]:
    """Of windows whose said tokens overlap the longest, or the first of those."""
    taken: set[tuple[int, int]] = set()
    kept = []
    for one in sorted(windows, key=lambda one: (one.document, -one.said, one.begin)):
        begin = one.begin + one.prompt
        said = {(one.document, at) for at in range(begin, begin + one.said)}
        if taken.isdisjoint(said):
            taken |= said
            kept.append(one)
    return sorted(kept, key=lambda one: (one.document, one.begin))


def _split(windows: Sequence[_Window]) -> Iterator[tuple[_Window, str]]:
    """Each with its document's split; both splits get about as many."""
    number, count = np.unique([one.document for one in windows], return_counts=True)
    sizes, of = dict.fromkeys(SPLITS, 0), {}
    for at in np.lexsort((number, -count)):
        of[int(number[at])] = split = min(SPLITS, key=lambda name: sizes[name])
        sizes[split] += int(count[at])
    return ((one, of[one.document]) for one in windows)
