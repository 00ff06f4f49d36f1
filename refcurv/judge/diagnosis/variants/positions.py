"""The kinds of positions of a corpus, and which rows and labels another program may take there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL, Rows
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_tokens
from refcurv.model.images import patches
from refcurv.model.rows import kept, reached
from refcurv.model.transformer import Inputs


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Some sequences or images of a corpus, and what stands at each of their positions.

    Fields: index_B, their rows in the corpus; inputs, tokens (B, T) or patches; label_BT, (B, 1) of
    images; keep_BT, the reference's rows; real_BT; segment_BT; reached_BT, the real positions from
    which a label is reached; pad_id, the token of all padding where it is a real token too,
    else NO_LABEL; drawn_BTN, labels that were drawn already, of each of N draws; seen_BT, what any
    position may see, where that is not what is real.
    """

    index_B: Array
    inputs: Inputs
    label_BT: Array
    keep_BT: Array
    real_BT: Array
    segment_BT: Array
    reached_BT: Array
    pad_id: int = NO_LABEL
    drawn_BTN: Array | None = None
    seen_BT: Array | None = None

    def of(self, at: slice | Array) -> Positions:
        """Some of its sequences."""
        some: dict[str, Any] = {name: x[at] for name, x in self._arrays().items()}
        return replace(self, **some)

    def _arrays(self) -> dict[str, Any]:
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in every.items() if isinstance(x, np.ndarray)}

    @property
    def images(self) -> bool:
        """Are these images?"""
        return self.inputs.ndim == 3

    @property
    def kinds(self) -> dict[str, Array]:
        """Kinds of positions by name, each (B, T) bool; a position may be of several.

        `pads`; `last`, real but behind every label; `prompts`, without a label but before one;
        `first`, of a document; `eos`, a real token that is also the padding's (B25).
        """
        first_BT = np.ones(self.real_BT.shape, dtype=bool)
        first_BT[:, 1:] = self.segment_BT[:, 1:] != self.segment_BT[:, :-1]
        first_BT[:, 1:] |= ~self.real_BT[:, :-1]
        none = np.zeros(self.real_BT.shape, dtype=bool)
        eos = none if self.images else self.real_BT & (self.inputs == self.pad_id)
        prompts = none if self.images else self.reached_BT & (self.label_BT < 0)
        return {
            "pads": ~self.real_BT,
            "last": self.real_BT & ~self.reached_BT,
            "prompts": prompts,
            "first": first_BT & self.real_BT,
            "eos": eos,
        }

    @property
    def order_BT(self) -> Array:
        """Where each position comes from if padding stands on the left."""
        T = self.real_BT.shape[1]
        return np.asarray((np.arange(T) + self.real_BT.sum(axis=1, keepdims=True)) % T)

    def rolled(self) -> Positions:
        """The same sequences with their padding on the left."""
        found: dict[str, Any] = {
            name: turned(x, self.order_BT)
            for name, x in self._arrays().items()
            if name != "index_B"
        }
        return replace(self, **found)


def turned(x: Array, order_BT: Array) -> Array:
    """x (B, T, ...) with its positions in another order in each sequence."""
    return np.take_along_axis(x, order_BT.reshape(*order_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def positions(corpus: Corpus, config: ModelConfig, rows: Rows) -> Positions:
    """All of a corpus that fits the model."""
    label_BT = corpus.label
    index_B = np.arange(len(label_BT))
    if corpus.images is not None:
        keep_BT = kept(config, rows, label_BT)
        reached_BT = kept(config, Rows.ALL, label_BT)
        real_BT = np.ones(keep_BT.shape, dtype=bool)
        inputs, segment_BT = patches(config, corpus.images), np.zeros(keep_BT.shape, np.int64)
        return Positions(index_B, inputs, label_BT, keep_BT, real_BT, segment_BT, reached_BT)
    real_BT, segment_BT = corpus.real, corpus.segment
    token_BT = require_tokens("validate", corpus).astype(np.int64)
    keep_BT = kept(config, rows, label_BT, real_BT, segment_BT)
    reached_BT = reached(label_BT, real_BT, segment_BT, config.causal)
    pads = np.unique(token_BT[~real_BT])
    shared = len(pads) == 1 and bool((token_BT[real_BT] == pads[0]).any())
    pad_id = int(pads[0]) if shared else NO_LABEL
    return Positions(index_B, token_BT, label_BT, keep_BT, real_BT, segment_BT, reached_BT, pad_id)


# ------------------------------------------------------------------ rows

ROWS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "with last": "B27",  # real positions behind every label are rows
        "without last": "B27",
        "without the last column": "B27",  # the last column, not the last of a document
        "with prompts": "B20",
        "without prompts": "B20",
        "with pads": "B28",  # every position is a row
        "with pads, without last": "B28",  # padding, and what are rows anyway
        "with pads, without the last column": "B28",
        "without first, with last": "B27",  # each row is one position later
        "without first": "B49",
        "first twice": "B49",
        "without eos": "B25",
        "as if padding were on the right": "B28",  # it is on the left
        "as if padding were on the left": "B28",  # it is on the right
    }
)
"""Another program's rows, beside the reference's, and the fault that each is."""


ONLY: Final = "only "
"""Begins the name of rows that are one of `cells`."""

BUT: Final = "the reference's, but "
"""Begins the name of rows that some of `cells` are otherwise: how often, and which, of each."""

TIMES: Final = ("no ", "once ", "twice ")
"""How often a cell is a row."""


FROM: Final = ", from sequence "
"""Behind one of ROWS: that rule holds from the sequence of this number on."""


def fault_of_rows(rows: str) -> str | None:
    """The fault that another program's rows are; None of the reference's."""
    if FROM in rows:
        return "B29"
    if not rows.startswith(BUT):
        return ROWS.get(rows)
    changed = rows.removeprefix(BUT).split("; ")
    if any(PADDING in one for one in changed):
        return "B28"
    for mark, fault in ((FIRST, "B49"), (EOS, "B25"), (LAST, "B27")):
        if all(mark in one for one in changed):
            return fault
    return "B20"


def cells(at: Positions) -> dict[str, Array]:
    """Parts of all positions of texts, each (B, T) bool, none empty; together they are all.

    They differ in what a rule for rows may read: padding, where the labels of the document are, its
    first and its last position, a token that is also the padding's. So every rule of these alone
    is a weight for each cell.

    Proof: tests/test_judge_places.py::test_cells_are_all_positions_once
    """
    if at.images:
        return {}
    real, has, kind = at.real_BT, at.label_BT >= 0, at.kinds
    before = reached(at.label_BT, real, at.segment_BT)
    behind = reached(at.label_BT[:, ::-1], real[:, ::-1], at.segment_BT[:, ::-1])[:, ::-1]
    last = np.ones_like(real)
    last[:, :-1] = (at.segment_BT[:, 1:] != at.segment_BT[:, :-1]) | ~real[:, 1:]
    free, tail = real & ~has, real & ~has & ~before
    places = {
        PADDING: ~real,
        "labelled": real & has,
        "before every label": free & before & ~behind,
        "between labels": free & before & behind,
        "behind every label": tail & behind & ~last,
        "of texts without a label": tail & ~behind & ~last,
        LAST: tail & last,
    }
    for mark, name in ((FIRST, "first"), (EOS, "eos")):
        parted: dict[str, Array] = {}
        for place, cell in places.items():
            parted |= {place: cell & ~kind[name], place + mark: cell & kind[name]}
        places = parted
    return {place: cell for place, cell in places.items() if cell.any()}


PADDING, LAST = "padding", "last position"
FIRST, EOS = ", first of a text", ", padding's token"


def weights(rows: str, at: Positions) -> Array:
    """How often each position is a row, (B, T) float64."""
    if FROM in rows:
        rule, _, first = rows.partition(FROM)
        later_B = at.index_B >= int(first)
        return np.where(later_B[:, None], weights(rule, at), weights("reference", at))
    keep, kind = at.keep_BT, at.kinds
    every = cells(at) if rows.startswith((ONLY, BUT)) else {}  # a shard need not have all of them
    if rows.startswith(ONLY):
        none = np.zeros_like(keep)
        return np.asarray(every.get(rows.removeprefix(ONLY), none), np.float64)
    if rows.startswith(BUT):
        out = keep.astype(np.float64)
        for one in rows.removeprefix(BUT).split("; "):
            times = next(k for k, word in enumerate(TIMES) if one.startswith(word))
            out[every.get(one.removeprefix(TIMES[times]), np.s_[:0])] = times
        return out
    before_last = np.arange(keep.shape[1]) < keep.shape[1] - 1
    chosen = {
        "reference": keep,
        "with last": keep | kind["last"],
        "without last": keep & ~kind["last"],
        "without the last column": at.real_BT & before_last,
        "with prompts": keep | kind["prompts"],
        "without prompts": keep & ~kind["prompts"],
        "with pads": np.ones_like(keep),
        "with pads, without last": keep | kind["pads"],
        "with pads, without the last column": np.broadcast_to(before_last, keep.shape),
        "without first, with last": (keep & ~kind["first"]) | kind["last"],
        "without first": keep & ~kind["first"],
        "first twice": keep + (keep & kind["first"]).astype(np.int64),
        "without eos": keep & ~kind["eos"],
        # column c of theirs has the row of c in the other order
        "as if padding were on the left": turned(keep, at.order_BT),
        "as if padding were on the right": turned(keep, np.argsort(at.order_BT, axis=1)),
    }
    return np.asarray(chosen[rows].astype(np.float64))


def tails(at: Positions, n: float) -> Iterator[str]:
    """Rules with padding that hold in the last sequences alone, as many as make n rows of all.

    So where a mask is made for a batch of one size, and left out in the last, which is smaller.

    Args: at: all sequences of a corpus.

    Proof: tests/test_judge_places.py::test_a_rule_of_the_last_sequences_has_its_name
    """
    own_B = weights("reference", at).sum(axis=1)
    for rule in (name for name in ROWS if name.startswith("with pads")):
        more_B = weights(rule, at).sum(axis=1) - own_B
        last = np.flatnonzero(own_B.sum() + np.cumsum(more_B[::-1])[::-1] == n)
        if n != own_B.sum() and len(last) and last[-1]:
            yield f"{rule}{FROM}{last[-1]}"


# ------------------------------------------------------------------ labels

WHERE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pads": "B19",
        "prompts": "B19",
        "last": "B19",
        "everywhere": "B19",
        "every token": "B19",
        "ignored pads": "B24",
        "ignored prompts": "B24",
        "ignored last": "B24",
        "ignored everywhere": "B24",
        "last class": "B24",
        "first class": "B24",
        "class at -100": "B24",
        "without eos": "B25",
    }
)
"""Where another program has labels, beside the reference's, and the fault that each is.

In `ignored ...` they are the next token of the row, whatever it is. In those of CLASSES no label is
a class. In the others they are drawn.
"""

OWN: Final = ("every token", "labelled tokens", "labelled tokens and first ones")
"""Where labels that are not shifted may be, with no other fault than that.

every token: at all real positions. labelled tokens: where the token stands that is a label, one
position later than the reference's label; a text's first token is none of these, for no position
predicts it. and first ones: at it too, where the next token is a label.
"""

CLASSES: Final[Mapping[str, int]] = MappingProxyType(
    {"last class": -1, "first class": 0, "class at -100": -100}
)
"""The class that a number for no label is read as: an index that counts from the end where it is
below 0 (−1 or −100, which are no error there), or clamped to the first."""


def supervised(where: str, at: Positions) -> Array:
    """The positions that have a label, (B, T) bool; (B, 1) of images."""
    has, kind = at.label_BT >= 0, at.kinds
    if at.images or where == "labelled":
        return has
    which = where.removeprefix("ignored ")
    if which == "without eos":
        return np.asarray(has & (at.label_BT != at.pad_id))
    if which == "everywhere" or where in CLASSES:
        return np.ones_like(has)
    if where in OWN:
        return _own(where, has, at)
    return np.asarray(has | kind[which])


def _own(where: str, has_BT: Array, at: Positions) -> Array:
    """Where a token is its own label (OWN)."""
    if where == "every token":
        return at.real_BT
    first_BT = at.kinds["first"]
    out_BT = np.zeros_like(has_BT)
    out_BT[:, 1:] = has_BT[:, :-1]
    out_BT &= at.real_BT & ~first_BT
    return out_BT | (first_BT & has_BT) if where.endswith("first ones") else out_BT


def gold(kind: str, where: str, at: Positions) -> Array:
    """The labels of a corpus as another program reads them, NO_LABEL where there is none.

    kind: `empirical`; `double shift`, the label of the next position; `no shift`, the own token,
    which every position has.
    """
    label_BT = at.label_BT
    if at.images:
        return label_BT
    if kind == "no shift":
        return np.asarray(np.where(supervised(where, at), at.inputs, NO_LABEL))
    if where != "labelled" and where not in CLASSES:
        next_BT = np.full_like(label_BT, NO_LABEL)
        next_BT[:, :-1] = at.inputs[:, 1:]
        if not where.startswith("ignored"):  # a corpus has labels within a document alone
            next_BT[:, :-1][at.segment_BT[:, 1:] != at.segment_BT[:, :-1]] = NO_LABEL
        label_BT = np.where(label_BT >= 0, label_BT, next_BT)
        label_BT = np.where(supervised(where, at), label_BT, NO_LABEL)
    if kind == "double shift":
        return earlier(label_BT)
    return label_BT


def earlier(label_BT: Array) -> Array:
    """Each label one position earlier, whether or not there was one."""
    out_BT = np.full_like(label_BT, NO_LABEL)
    out_BT[:, :-1] = label_BT[:, 1:]
    return out_BT
