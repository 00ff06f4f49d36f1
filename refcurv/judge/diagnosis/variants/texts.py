"""Other texts than the corpus's: tokens more or fewer at the start, one taken for padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL, Rows
from refcurv.model.config import ModelConfig
from refcurv.model.rows import kept, reached

ALONG: Final = ("inputs", "label_BT", "real_BT", "segment_BT", "drawn_BTN")
"""What moves along with the tokens; rows follow from these."""

TOKENS = 16
"""Tokens whose rows are counted, at most.  Chosen: some tenths of a second."""


@dataclass(frozen=True, slots=True)
class Text:
    """One other reading of a corpus. fault; make: the positions, and a token → the positions."""

    fault: str
    make: Callable[[Positions, int], Positions]


def text_of(at: Positions, text: str, token: int, config: ModelConfig, rows: Rows) -> Positions:
    """What another program reads in the place of some sequences; rows by the same rule (ROWS)."""
    if text == "the corpus":
        return at
    if text == HIDDEN:
        return replace(at, seen_BT=at.real_BT & (at.inputs != token))
    own = reading(text)
    out = own.make(at, token)
    end = reached(out.label_BT, out.real_BT, out.segment_BT, config.causal)
    out = replace(out, keep_BT=_kept(out, config, rows), reached_BT=end)
    if own.fault == "B25":
        seen = at if text.startswith("a token is no row") else out
        return replace(out, seen_BT=seen.real_BT)
    return out


def reads_alike(at: Positions, text: str, token: int, config: ModelConfig, rows: Rows) -> bool:
    """Has it the rows, tokens and attention of the corpus, so that its labels alone may differ?

    Proof: tests/test_judge_rows.py::test_what_changes_labels_alone_leaves_A
    """
    out = text_of(at, text, token, config, rows)
    pairs = [
        (out.inputs, at.inputs), (out.keep_BT, at.keep_BT), (out.segment_BT, at.segment_BT),
        (out.real_BT if out.seen_BT is None else out.seen_BT, at.real_BT),
    ]  # fmt: skip
    return all(np.array_equal(*pair) for pair in pairs)


def rows_left(at: Positions, text: str, token: int, config: ModelConfig, rows: Rows) -> int:
    """How many rows there then are."""
    return int(_kept(reading(text).make(at, token), config, rows).sum())


def reading(text: str) -> Text:
    """One of TEXTS, or of PROMPTS, whose tokens stand behind its name."""
    if text in TEXTS:
        return TEXTS[text]
    name, _, tokens = text.partition(": ")
    own = [int(v) for v in tokens.split()]
    return Text("B49", lambda at, _: _prompted(at, own, **PROMPTS[name]))


def fault_of_text(text: str) -> str | None:
    """None of the corpus itself."""
    return None if text == "the corpus" else reading(text).fault


def _kept(at: Positions, config: ModelConfig, rows: Rows) -> Array:
    return kept(config, rows, at.label_BT, at.real_BT, at.segment_BT)


def texts(
    at: Positions, config: ModelConfig, rows: Rows, n: float | None
) -> Iterator[tuple[str, int]]:
    """(text, token) of what can have been read. n: rows of theirs, None if they are not known.

    Where theirs has as many rows as ours, a text must leave so many too. A token is tried as
    padding where without it as many rows are left as theirs has. Where theirs does not say how
    many, the token is tried that all padding is.
    """
    if at.images:
        return
    more = not config.learned_positions or at.inputs.shape[1] < config.learned_positions
    ours = at.keep_BT.sum()
    for name, one in TEXTS.items():
        longer = name.partition(",")[0] == LONGER
        fits = more if longer else at.inputs.shape[1] > 1  # of one token none would be left
        if one.fault == "B49" and fits:
            if n != ours or rows_left(at, name, NO_LABEL, config, rows) == n:
                yield from ((name, token) for token in (_starts(at) if longer else [NO_LABEL]))
    for token in _tokens(at, n):
        for name, one in TEXTS.items():
            if one.fault == "B25" and name != HIDDEN:
                left = rows_left(at, name, token, config, rows)
                whole = name.startswith(ENDED) and left == ours
                if left and (n is None or left == n) and not whole:
                    yield name, token


def _starts(at: Positions) -> list[int]:
    """What may stand before a sequence: its own first token, NO_LABEL, or that of most texts."""
    common = int(np.argmax(np.bincount(at.inputs[at.kinds["first"]])))
    own = at.inputs[:, 0][at.real_BT[:, 0]]
    return [NO_LABEL] if (own == common).all() else [NO_LABEL, common]


def _tokens(at: Positions, n: float | None) -> list[int]:
    """Tokens of about as many rows, or labels, as theirs lacks, or with as many behind their first.

    The nearest come first, of each of these.

    What stands in front of texts alone is their start, and no padding (B49).
    """
    own = [at.pad_id] if at.pad_id >= 0 else []
    if n is None:
        return own
    lost = np.bincount(at.inputs[at.keep_BT])
    inside = np.bincount(at.inputs[at.keep_BT & ~at.kinds["first"]], minlength=len(lost))
    off = abs(lost - float(at.keep_BT.sum() - n))
    off[inside == 0] = np.inf
    has_BT = at.label_BT >= 0
    ends_BT = has_BT.copy()  # the last label of a text: where it is none, rows are lost
    later_BT = reached(at.label_BT, at.real_BT, at.segment_BT)[:, 1:]
    ends_BT[:, :-1] &= ~(later_BT & (at.segment_BT[:, 1:] == at.segment_BT[:, :-1]))
    out = own
    for some_BT in (None, has_BT, ends_BT):
        each = off
        if some_BT is not None:
            labels = np.bincount(at.label_BT[some_BT])
            each = np.where(labels > 0, abs(labels - float(at.keep_BT.sum() - n)), np.inf)
        near = np.argsort(each, kind="stable")[:TOKENS]
        out = [*out, *(int(v) for v in near if each[v] <= len(at.index_B))]
    if n != at.keep_BT.sum():
        each = abs(_behind(at) - float(at.keep_BT.sum() - n))
        out += [int(v) for v in np.argsort(each, kind="stable")[:TOKENS] if each[v] < np.inf]
    return list(dict.fromkeys(out))


def _behind(at: Positions) -> Array:
    """Of each token the rows behind the first one of each sequence; infinite where it is none."""
    size = int(at.inputs.max(initial=0)) + 1
    of_BT = np.where(at.real_BT, at.inputs, size) + (size + 1) * np.arange(len(at.inputs))[:, None]
    every, place = np.unique(of_BT, return_index=True)
    left_BT = at.keep_BT.sum(axis=1, keepdims=True) - at.keep_BT.cumsum(axis=1)
    token, rows = every % (size + 1), left_BT.ravel()[place].astype(float)
    out = np.bincount(token, rows, size + 1)[:size]
    out[np.bincount(token, minlength=size + 1)[:size] == 0] = np.inf
    return np.asarray(out)


# ------------------------------------------------------------------ a start token more or less

LONGER = "one start token more"


def _one_more(at: Positions, token: int, end: str, labelled: bool) -> Positions:
    """The first token twice, or this one before it.

    end: is the last column kept, cut off, or cut with its label.
    """
    own = at.inputs[:, :1]
    more = own if token == NO_LABEL else np.full_like(own, token)
    return _longer(at, more, 0, end, np.full(own.shape, labelled))


def _longer(at: Positions, more_BM: Array, place: int, end: str, asked_B1: Array) -> Positions:
    """More tokens, so many behind the start. asked: have they their next tokens for labels."""
    M = more_BM.shape[1]
    read_BT = np.concatenate([at.inputs[:, :place], more_BM, at.inputs[:, place:]], axis=1)
    next_BM = read_BT[:, 1 : M + 1]
    first: dict[str, Any] = {name: x[:, :1].repeat(M, axis=1) for name, x in _along(at).items()}
    first |= {"label_BT": np.where(asked_B1, next_BM, NO_LABEL)}
    if at.drawn_BTN is not None:
        shape = (*next_BM.shape, at.drawn_BTN.shape[-1])
        first |= {"drawn_BTN": np.broadcast_to(next_BM[..., None], shape)}
    T = at.inputs.shape[1] + M * (end == "longer")
    out: dict[str, Any] = {
        name: np.concatenate([first[name], x], axis=1)[:, :T] for name, x in _along(at).items()
    }
    out["inputs"] = read_BT[:, :T]
    if end == "again":
        out["label_BT"][:, -1] = NO_LABEL
    return replace(at, **out)


def _one_fewer(at: Positions, _: int) -> Positions:
    return replace(at, **{name: x[:, 1:] for name, x in _along(at).items()})


def _along(at: Positions) -> dict[str, Any]:
    every = {name: getattr(at, name) for name in ALONG}
    return {name: x for name, x in every.items() if x is not None}


# ------------------------------------------------------------------ a prompt

ENDS: Final = (
    ("longer", ""), ("cut", ", the last one cut off"),
    ("again", ", cut to its length before labels"),
)  # fmt: skip
"""What becomes of the last column, or columns, and how that is said."""

PROMPT: Final = "a prompt"

UNLABELLED: Final = ", without a label"


def _prompted(
    at: Positions, tokens: Sequence[int], place: int, end: str, labelled: bool
) -> Positions:
    """The same tokens in each sequence. labelled: have they labels where the first token has."""
    more_BM = np.broadcast_to(np.asarray(tokens), (len(at.inputs), len(tokens)))
    return _longer(at, more_BM, place, end, (at.label_BT[:, :1] >= 0) & labelled)


PROMPTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        f"{PROMPT} {where} the first token{cut}{unlabelled}": MappingProxyType(
            {"place": place, "end": end, "labelled": not unlabelled}
        )
        for place, where in ((1, "behind"), (0, "before"))
        for end, cut in ENDS
        for unlabelled in ("", UNLABELLED)
    }
)
"""How tokens that the corpus has not can stand in each sequence: a chat template's own prompt."""


def prompt(name: str, tokens: Iterable[int]) -> str:
    """The text of these tokens at one of PROMPTS."""
    return f"{name}: {' '.join(str(v) for v in tokens)}"


def unlabelled(text: str) -> str:
    """The same prompt without labels."""
    name, _, tokens = text.partition(": ")
    return f"{name.removesuffix(UNLABELLED)}{UNLABELLED}: {tokens}"


# ------------------------------------------------------------------ a token taken for padding

HIDDEN: Final = "a token is padding in attention alone"
"""No position sees it. It has its row and its label, so that no count says which token it is."""


def _unlabelled(at: Positions, token: int) -> Positions:
    """Labels that are this token go, and the rows that led to them alone."""
    return replace(at, label_BT=np.where(at.label_BT == token, NO_LABEL, at.label_BT))


def _padding(at: Positions, token: int, own: bool, next_too: bool) -> Positions:
    """Positions of a token are not real. own: their labels go; next_too: where it is the label."""
    is_BT = at.inputs == token
    gone_BT = (is_BT & own) | ((at.label_BT == token) & next_too)
    label_BT = np.where(gone_BT, NO_LABEL, at.label_BT)
    return replace(at, label_BT=label_BT, real_BT=at.real_BT & ~is_BT)


ENDED: Final = "a text ends with the first of a token"


def _ended(at: Positions, token: int, itself: bool, labelled: bool) -> Positions:
    """All behind the first of a token is padding.

    itself: is it still real; labelled: has it its label then, or else, is it one.
    """
    is_BT = (at.inputs == token) & at.real_BT
    before_BT = is_BT.cumsum(axis=1) == 0
    first_BT = is_BT & (is_BT.cumsum(axis=1) == 1)
    real_BT = at.real_BT & (before_BT | (first_BT & itself))
    has_BT = real_BT & (before_BT | labelled)
    if not (itself or labelled):
        has_BT &= at.label_BT != token
    return replace(at, label_BT=np.where(has_BT, at.label_BT, NO_LABEL), real_BT=real_BT)


TEXTS: Final[Mapping[str, Text]] = MappingProxyType(
    {
        f"{LONGER}{cut}{unlabelled}": Text(
            "B49", partial(_one_more, end=end, labelled=not unlabelled)
        )
        for end, cut in ENDS
        for unlabelled in ("", UNLABELLED)
    }
    | {
        "no start token": Text("B49", _one_fewer),
        "a token is no label": Text("B25", _unlabelled),
        HIDDEN: Text("B25", lambda at, _: at),
    }
    | {
        f"a token is {what}{labels}": Text("B25", partial(_padding, own=own, next_too=next_too))
        for what in ("padding", "no row")
        for labels, own, next_too in (
            (" and has no label", True, False), (" and is no label", False, True),
            (", has none and is none", True, True), ("", False, False),
        )
    }
    | {
        f"{ENDED}{more}": Text("B25", partial(_ended, itself=itself, labelled=labelled))
        for more, itself, labelled in (
            ("", True, False), (", which has its label", True, True),
            (", which is padding and no label", False, False), (", which is padding", False, True),
        )
    }
)  # fmt: skip
"""The readings by name, and the fault that each is."""
