"""Whose labels another program's backward passes may use, and what they then send back.

A choice of labels draws from a law q at each position, by default q = p, the model's own. Against
a drawn y the slope is p − onehot(y), whose mean is p − q. So the mean of g gᵀ over all draws needs
one pass for each position and entry of a root of diag q − q qᵀ, and one joint pass of p − q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from refcurv.curvature.factors import Factors
from refcurv.judge.diagnosis.variants.positions import (
    CLASSES,
    Positions,
    earlier,
    gold,
    supervised,
)
from refcurv.judge.diagnosis.variants.setting import Setting
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL, Fisher
from refcurv.model.loss import cross_entropy, root_product
from refcurv.model.sampling import draw_labels, signs, uniforms

MOVED: Final = "drawn, then shifted"
"""Each drawn label stands one position too early: y of t + 1 is sent back at t."""

DRAWN: Final = ("sampled", "one uniform", "tempered", "nucleus", MOVED)
"""Kinds of labels that are drawn."""

GOLD: Final = ("empirical", "double shift", "no shift")
"""Kinds of labels that the corpus has."""

ESTIMATES = 8
"""Random passes over each sequence that stand for its mean over labels where that is too dear."""

Item = TypeVar("Item")

BUNCH = 2**18
"""Logits of the passes that are sent back at one time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose labels, in full.

    Fields:
        kind: DRAWN, GOLD, `expected`, `signed`, `argmax` or `joint`.
        amount: the temperature, or the mass of the nucleus. smoothing: ε of label smoothing.
        z_loss: c of c logsumexp² in the loss.
        where: at which positions (`positions.WHERE`).
        mean: is the mean over all labels taken, of kinds that are drawn. exact: not estimated.
        seed, draws: of what is drawn. redraw: the draw where the reference has no label, 0 for the
            same one.
    """

    kind: str
    amount: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    where: str = "labelled"
    mean: bool = False
    exact: bool = True
    seed: int = 0
    draws: int = 1
    redraw: int = 0

    @property
    def counted(self) -> int:
        """How often a row counts in n_G."""
        return self.draws if self.kind in (*DRAWN, "signed") and not self.mean else 1

    @property
    def many(self) -> bool:
        """Are there many passes to a sequence, so that it is sent back by itself?"""
        return self.exact and (self.kind == "joint" or self.mean)


def choice(setting: Setting, reference: Factors) -> Choice:
    """The labels of the reference, or in their place those of a setting, in full."""
    fisher = reference.fisher
    kind = str(fisher) if setting.labels == "reference" else setting.labels
    averaged = fisher in (Fisher.EXPECTED, Fisher.SIGNED) and setting.labels in DRAWN[1:]
    mean = (
        setting.mean
        or averaged
        or kind == "expected"
        or (kind == "signed" and (setting.smoothing != 0 or setting.z_loss != 0))
    )
    if kind == "expected" or (kind == "signed" and mean):
        kind = "sampled"
    return Choice(
        kind,
        setting.amount,
        setting.smoothing,
        setting.z_loss,
        setting.where,
        mean and kind in DRAWN,
        seed=reference.seed,
        draws=reference.draws,
        redraw=setting.redraw,
    )


def passes(one: Choice, at: Positions, vocabulary: int) -> int:
    """Backward passes over single sequences that the choice takes, exactly computed."""
    if not one.many:
        return 0
    joint = one.kind == "joint"
    return vocabulary * (len(at.index_B) if joint else int(supervised(one.where, at).sum()))


@dataclass(frozen=True, slots=True)
class Sent:
    """What some backward passes send back at the logits.

    Fields: d_logit (B, T, V): of B sequences at once, or of one sequence in B passes; joint: do
    the sequences of the corpus go together in one pass, as with drawn labels; else every pass
    stands for itself, and only the sum of its squares means something; draw, which.
    """

    d_logit: Array
    joint: bool = True
    draw: int = 0


def sent(one: Choice, at: Positions, logit_BTV: Array) -> Iterator[Sent]:
    """Everything that is sent back over some sequences, over a single one if `one.many`.

    The squares of all g that come of it add up to S_G.
    """
    has_BT = supervised(one.where, at)
    if one.kind in GOLD or one.kind == "argmax":
        label_BT = (
            logit_BTV.argmax(axis=-1) if one.kind == "argmax" else gold(one.kind, one.where, at)
        )
        label_BT = _classed(one, at, label_BT, logit_BTV)
        read_BT = has_BT | (one.kind == "double shift")  # labels that are moved stand elsewhere
        yield Sent(_slope(one, logit_BTV, np.where(read_BT, label_BT, -1)))
    elif one.kind == "joint":
        yield from _joint_columns(one, at, logit_BTV, has_BT)
    elif one.kind == "signed":
        for draw in range(one.draws):
            yield Sent(
                _signed(logit_BTV, has_BT, _sign(one.seed, draw, at, logit_BTV.shape)), draw=draw
            )
    elif one.mean:
        yield from _averaged(one, at, logit_BTV, has_BT)
    else:
        yield from _drawn(one, at, logit_BTV, has_BT, one.draws)


def _classed(one: Choice, at: Positions, label_BT: Array, logit_BTV: Array) -> Array:
    """The labels, and a class where there is none, if that is what it is read as (B24)."""
    if one.where not in CLASSES:
        return label_BT
    index = CLASSES[one.where]
    return np.asarray(np.where(at.label_BT < 0, index % logit_BTV.shape[-1], label_BT))


def _slope(one: Choice, logit_BTV: Array, label_BT: Array) -> Array:
    """p − onehot(y), of labels that are smoothed p − (1 − ε) onehot(y) − ε/V; 0 without a label.

    Of c lse², lse = logsumexp of the logits, 2 c lse p comes on top.
    """
    V, has_BT1 = logit_BTV.shape[-1], label_BT[..., None] >= 0
    d = cross_entropy(logit_BTV.reshape(-1, V), label_BT.reshape(-1))[1].reshape(logit_BTV.shape)
    if one.smoothing:
        rest_BTV = np.where(has_BT1, _softmax(logit_BTV) - 1 / V, 0)
        d = (1 - one.smoothing) * d + one.smoothing * rest_BTV
    if one.z_loss:
        d = d + np.where(has_BT1, _z_slope(one, logit_BTV), 0)
    return np.asarray(d)


def _z_slope(one: Choice, logit_BTV: Array) -> Array:
    """2 c lse p, the slope of c lse²."""
    top = logit_BTV.max(axis=-1, keepdims=True)
    lse = top + np.log(np.exp(logit_BTV - top).sum(axis=-1, keepdims=True))
    return np.asarray(2 * one.z_loss * lse * _softmax(logit_BTV))


def _softmax(logit_BTV: Array) -> Array:
    e = np.exp(logit_BTV - logit_BTV.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def law(one: Choice, logit_BTV: Array) -> Array:
    """The logits of q: p itself, p at another temperature, the nucleus of p (top-p), or the next p.

    The nucleus is the fewest likeliest entries that hold a mass of `amount`.
    """
    if one.kind == MOVED:
        return np.roll(logit_BTV, -1, axis=1)  # what comes last has no label then
    if one.kind == "tempered":
        return logit_BTV / one.amount
    if one.kind != "nucleus":
        return logit_BTV
    order = np.argsort(-logit_BTV, axis=-1, kind="stable")
    p = np.take_along_axis(_softmax(logit_BTV), order, axis=-1)
    inside = np.cumsum(p, axis=-1) - p < one.amount
    keep = np.zeros_like(inside)
    np.put_along_axis(keep, order, inside, axis=-1)
    return np.where(keep, logit_BTV, -np.inf)


def _drawn(
    one: Choice, at: Positions, logit_BTV: Array, has_BT: Array, draws: int
) -> Iterator[Sent]:
    """Against labels drawn from q by the law's uniforms (SAMPLING)."""
    V, T = logit_BTV.shape[-1], has_BT.shape[1]
    moved = one.kind == MOVED
    law_NV = (logit_BTV if moved else law(one, logit_BTV)).reshape(-1, V)
    for draw in range(draws):
        if one.kind in ("sampled", MOVED) and at.drawn_BTN is not None and not one.redraw:
            label_BT = _classed(one, at, at.drawn_BTN[..., draw], logit_BTV)
            label_BT = np.where(has_BT, label_BT, NO_LABEL)
            yield Sent(_slope(one, logit_BTV, earlier(label_BT) if moved else label_BT), draw=draw)
            continue
        u_BT = np.stack([uniforms(one.seed, draw, int(n), T) for n in at.index_B])
        if one.redraw:
            other_BT = np.stack([uniforms(one.seed, one.redraw, int(n), T) for n in at.index_B])
            u_BT = np.where(at.label_BT < 0, other_BT, u_BT)
        if one.kind == "one uniform":
            u_BT = np.broadcast_to(u_BT[:, :1], u_BT.shape)
        label_BT = draw_labels(law_NV, u_BT.reshape(-1)).reshape(has_BT.shape)
        label_BT = _classed(one, at, label_BT, logit_BTV)
        label_BT = np.where(has_BT, label_BT, NO_LABEL)
        yield Sent(_slope(one, logit_BTV, earlier(label_BT) if moved else label_BT), draw=draw)


def _averaged(one: Choice, at: Positions, logit_BTV: Array, has_BT: Array) -> Iterator[Sent]:
    """The mean of g gᵀ over all labels, exactly or by a few draws."""
    if one.kind == "one uniform":
        yield from _one_uniform(one, at, logit_BTV, has_BT)
        return
    law_BTV, keep = law(one, logit_BTV), 1 - one.smoothing
    if one.kind == MOVED:
        has_BT = earlier(np.where(has_BT, 0, NO_LABEL)) >= 0
    if one.exact:
        places = [(t, v) for t in np.flatnonzero(has_BT[0]) for v in range(logit_BTV.shape[-1])]
        for some in _bunches(places, logit_BTV):
            d = np.zeros((len(some), *logit_BTV.shape[1:]))
            t, v = np.array(some).T
            d[np.arange(len(some)), t] = keep * root_product(law_BTV[0, t], _onehot(v, d.shape[-1]))
            yield Sent(d, joint=False)
    else:
        for draw in range(ESTIMATES):
            sign = _sign(one.seed, draw, at, logit_BTV.shape)
            d = keep / np.sqrt(ESTIMATES) * _signed(law_BTV, has_BT, sign)
            yield Sent(d, joint=False)
    if one.smoothing or one.z_loss or one.kind != "sampled":
        p, V = _softmax(logit_BTV), logit_BTV.shape[-1]
        mean = p - keep * _softmax(law_BTV) - one.smoothing / V + _z_slope(one, logit_BTV)
        yield Sent(np.where(has_BT[..., None], mean, 0))


def _one_uniform(one: Choice, at: Positions, logit_BTV: Array, has_BT: Array) -> Iterator[Sent]:
    """All labels of a sequence are drawn by one u: constant between the steps of the sums of p."""
    if not one.exact:
        for each in _drawn(one, at, logit_BTV, has_BT, ESTIMATES):
            yield Sent(each.d_logit / np.sqrt(ESTIMATES), joint=False)
        return
    step = np.unique(np.cumsum(_softmax(logit_BTV[has_BT]), axis=-1))
    edge = np.concatenate([[0.0], step[step < 1], [1.0]])
    pieces = list(zip((edge[1:] + edge[:-1]) / 2, np.diff(edge), strict=True))
    law_NV = logit_BTV[0]
    for some in _bunches(pieces, logit_BTV):
        label = np.stack([draw_labels(law_NV, np.full(len(law_NV), u)) for u, _ in some])
        label = np.where(has_BT, label, -1)
        d = _slope(one, np.broadcast_to(logit_BTV, (len(some), *law_NV.shape)), label)
        yield Sent(d * np.sqrt([width for _, width in some])[:, None, None], joint=False)


def _joint_columns(one: Choice, at: Positions, logit_BTV: Array, has_BT: Array) -> Iterator[Sent]:
    """Column v of S from all positions at once, for each v (O13)."""
    B, T, V = logit_BTV.shape
    if not one.exact:
        for draw in range(ESTIMATES):
            sign = _sign(one.seed, draw, at, (B, 1, V))
            d = _signed(logit_BTV, has_BT, np.broadcast_to(sign, logit_BTV.shape))
            yield Sent(d / np.sqrt(ESTIMATES), joint=False)
        return
    for some in _bunches(list(range(V)), logit_BTV):
        column = np.repeat(_onehot(np.array(some), V), T, axis=0)
        every = np.broadcast_to(logit_BTV, (len(some), T, V)).reshape(-1, V)
        d = root_product(every, column).reshape(len(some), T, V)
        yield Sent(np.where(has_BT[..., None], d, 0), joint=False)


def _signed(logit_BTV: Array, has_BT: Array, sign_BTV: Array) -> Array:
    """S ε at the positions that have a label."""
    V = logit_BTV.shape[-1]
    d = root_product(logit_BTV.reshape(-1, V), sign_BTV.reshape(-1, V)).reshape(logit_BTV.shape)
    return np.asarray(np.where(has_BT[..., None], d, 0))


def _sign(seed: int, draw: int, at: Positions, shape: tuple[int, ...]) -> Array:
    """The law's signs (SAMPLING), (B, T, V)."""
    _, T, V = shape
    return np.stack([[signs(seed, draw, int(n), t, V) for t in range(T)] for n in at.index_B])


def _onehot(v: Array, V: int) -> Array:
    return np.asarray((v[:, None] == np.arange(V)).astype(np.float64))


def _bunches(items: list[Item], logit_BTV: Array) -> Iterator[list[Item]]:
    """So many passes over one sequence as BUNCH allows."""
    size = max(1, BUNCH // logit_BTV[0].size)
    return (items[begin : begin + size] for begin in range(0, len(items), size))
