"""What one factor of G may be: the numbers that a loss, or the sums, can have been divided by.

Powers of 4, outputs and positions, the terms of a mean, steps, counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refcurv.judge.case import Case
from refcurv.law.checks import Array

FEW = 64
"""Accumulation steps or workers, at most.  Chosen: more than these, and m counts loss terms."""

BLUNT = 0.25
"""Within this of a factor of 2 or ½ it may be one.  Chosen: drawing explains more, of anything."""

SCALES = 24
"""Powers of 2 that a loss may have been multiplied by.  Chosen."""

USUAL = (15, 16)
"""Half of the losses that are: libraries begin with 2¹⁵ (TensorFlow, jmp) or 2¹⁶ (PyTorch)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One layer: theirs is c_A and c_G times ours; each may be off by tol_A and tol_G of itself.

    rows_A, rows_G: n'/n; None where the dump does not say. outputs: d_out. rows: n of ours.
    drawn: are c_G and tol_G an interval that drawing allows (`factors`)? alone: does no factor
    explain all such layers?
    """

    layer: str
    c_A: float | None
    c_G: float | None
    tol_A: float
    tol_G: float
    rows_A: float | None
    rows_G: float | None
    outputs: int
    rows: int = 0
    drawn: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A fault that explains a factor.

    Fields: sides, those that it hits; left, the error after; certain, is there nothing to confirm
    that a corpus could?
    """

    fault: str | None
    sentence: str
    sides: str
    left: float
    alike: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Divisors:
    """What may have been counted, by its name.

    means: over how many loss terms, or positions, each batch's mean can be; None without a corpus.
    each: the loss terms of a sequence, if all have as many. positions: of an image. weights: B2 and
    B3, the share of their rules that leave a factor which drawing or rounding explains.
    """

    rows: int
    others: Mapping[str, int] = field(default_factory=dict)
    means: frozenset[int] | None = None
    vocabulary: int | None = None
    each: int | None = None
    positions: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case) -> Divisors:
        """From the corpus and the model, as far as they are given."""
        rows = max(case.counts(name).ours["A"] for name in case.matched)
        corpus, vocabulary = case.corpus, None
        if case.model is not None:
            vocabulary = case.model.config.vocabulary
        elif "head" in case.reference:
            vocabulary = len(case.ours("head").sum_G)
        if corpus is None:
            return cls(rows, {}, None, vocabulary)
        label = corpus.label
        each = (label >= 0).sum(axis=1)
        means = equal_batches(each)
        others = {"sequences": len(label), "labels": int(each.sum())}
        if corpus.images is None:
            others["tokens"] = int(corpus.real.sum())
            others["positions, padding too,"] = label.size
            means |= equal_batches(np.full(len(label), label.shape[1])) | {rows, others["tokens"]}
        alike = int(each[0]) if len(set(each.tolist())) == 1 else None
        positions = None
        if corpus.images is not None:  # an image without a label has no rows
            image = None if case.model is None else case.model.config.image
            positions = image.positions if image else rows // max(1, int(each.sum()))
        weights = case.known.get("weights", {})
        return cls(rows, others, frozenset(means), vocabulary, alike, positions, weights)


def equal_batches(each: Array) -> set[int]:
    """The sums of `each` over batches of whole sequences, in order, that are all alike.

    One batch of everything is among them.
    """
    found, N = {int(each.sum())}, len(each)
    for size in (size for size in range(1, N) if N % size == 0):
        sums = each.reshape(-1, size).sum(axis=1)
        found |= {int(sums[0])} if (sums == sums[0]).all() else set()
    return found


def near(x: float, y: float, tol: float) -> bool:
    """Is x within tol of y, as a share of y?"""
    return abs(x - y) <= tol * abs(y)


NUMBERS = ("B1", "B5", "B6", "B11", "B43")
"""Faults that multiply G by a number, which may be the number of another one of them."""


class Member(NamedTuple):
    """A factor of G by a fault: how likely it is among all that the fault may give, and words."""

    fault: str
    factor: float
    share: float
    words: str


def members(counts: Divisors) -> Iterator[Member]:
    """The factors of G, the same in all layers, that faults of the loss give."""
    yield Member("B5", 2.0, 1 / 2, "twice ours")
    yield Member("B5", 0.5, 1 / 2, "half ours")
    for k in range(1, SCALES + 1):
        share = 1 / 2 / SCALES + (k in USUAL) / 2 / len(USUAL)
        yield Member("B11", 4.0**k, share, f"4^{k}: gradients were {2**k} times ours")
    if V := counts.vocabulary:
        for factor, name in ((V, "V"), (1 / V, "1/V"), (V**-2.0, "1/V²")):
            yield Member("B6", factor, 1 / 3, f"{name}, V = {V} being the number of outputs")
    if (T := counts.positions or 0) > 1:
        for factor, name in ((T, "T"), (T * T, "T²"), (1 / T, "1/T"), (T**-2.0, "1/T²")):
            yield Member("B37", factor, 1 / 4, f"{name}, an image having T = {T} positions")
    means = counts.means or {counts.rows}
    for m in means - {1}:
        yield Member("B1", m**-2.0, 1 / len(means), f"1/{m}²: {m} loss terms were averaged")
    every = sum(1 / k for k in range(2, FEW + 1))
    for k in range(2, FEW + 1):  # few are likelier
        yield Member("B43", k**-2.0, 1 / k / every, f"1/{k}²")


def candidates(c: float, tol: float, one: Scale, counts: Divisors, alone: bool) -> Iterator[Named]:
    """What G = c times ours can be, the likeliest first."""
    words = f"G is ours times {c:.9g}"
    if one.layer == "patch":
        yield Named("B14", words, "G", 0.0, ("B7",))
    powers = list(_powers(c, tol, words, known=one.rows_G is not None))
    rare = [x for x in powers if x.fault == "B11" and not any(near(c, 4.0**k, tol) for k in USUAL)]
    yield from (x for x in powers if x not in rare)
    yield from _outputs(c, tol, words, one, counts, alone)
    yield from rare
    T = counts.positions or 0
    if T > 1 and not alone and any(near(c, x, tol) for x in (T, T * T, 1 / T, 1 / T**2)):
        yield Named("B37", f"{words}: an image has {T} positions", "G", tol, ("B7", "B82"))
    m = c**-0.5
    if c < 1 and round(m) >= 2 and (whole(m, tol / 2) or tol * m > 0.1):
        yield _mean_loss(c, round(m), tol, words, counts)
    for name, count in {**counts.others, "rows": counts.rows}.items():
        if count and (near(c * count, counts.rows, tol) or near(c, count, tol)):
            yield Named("B82", f"{words}: {count} are its {name}", "G", tol, ("B4",))
        if count > 1 and near(c * count, 1, tol):
            text = f"{words}: it was divided by {count} {name} once more"
            yield Named("B4", text, "G", tol, ("B82",))


def _powers(c: float, tol: float, words: str, known: bool) -> Iterator[Named]:
    """Powers of 4, as the scale of mixed precision leaves them; 2 and a half.

    Args: known, are the counts of theirs? Else a half may be of rows that are counted twice.
    """
    k = round(math.log(c, 4))
    if k >= 1 and near(c, 4.0**k, tol):
        text = f"{words} = 4^{k}: gradients were {2**k} times ours"
        added = ("B43", "B46") if 2**k <= FEW else ()  # of so many steps or workers, not averaged
        yield Named("B11", text, "G", abs(c / 4.0**k - 1), added)
    for value, text in ((2.0, "twice"), (0.5, "half")):
        if near(c, value, min(tol, BLUNT)):
            alike = () if known or value > 1 else ("B39",)
            yield Named("B5", f"G is {text} ours", "G", abs(c / value - 1), alike)


def _outputs(
    c: float, tol: float, words: str, one: Scale, counts: Divisors, alone: bool
) -> Iterator[Named]:
    """The number of the network's outputs, or of the layer's own; what differs by layer."""
    V = counts.vocabulary
    for value, name in ((V, "V"), (1 / V, "1/V")) if V and not alone else ():
        if near(c, value, tol):
            text = f"{words} = {name}, V = {V} being the number of outputs"
            yield Named("B6", text, "G", abs(c / value - 1))
    if not alone or near(c, 0.25, tol):
        return
    if near(c, one.outputs, tol) or near(c * one.outputs, 1, tol):
        yield Named("B6", f"{words}: {one.outputs} are its outputs", "G", tol, ("B7",))
    if whole(c, tol) or whole(1 / c, tol):
        yield Named("B7", f"{words} in this layer", "G", tol, ("B14",))


def _mean_loss(c: float, m: int, tol: float, words: str, counts: Divisors) -> Named:
    """1/m²: the loss was a mean over m terms, or divided by m steps, or averaged over workers."""
    sharp = tol * m < 0.5
    about = "" if sharp else "about "
    text = f"{words} = {about}1/{m}²"
    left = abs(c * m * m - 1)
    known = counts.means is not None
    fits = any(near(c * x * x, 1, tol) for x in (counts.means or {counts.rows}))
    steps = ("B43", "B46") if m <= FEW else ()
    if fits:
        one = counts.others.get("labels", counts.rows)  # all in one batch
        sure = sharp or near(c * one * one, 1, tol)
        text = f"{text}: {m} loss terms were averaged"
        by_length = ("B3",) if m == counts.each else ()  # a batch of one sequence
        return Named("B1", text, "G", left, (*by_length, *steps), certain=sure)
    if m == counts.vocabulary:
        return Named("B6", f"{text}, the number of outputs squared", "G", left, ("B1", "B43"))
    if m > FEW:
        why = "no equal batches of the corpus have so many" if known else "without a corpus"
        text = f"{text}: more than steps or workers are. {m} loss terms seem averaged, {why}"
        return Named("B1", text, "G", left, ("B43", "B46") if known else (), certain=False)
    if known:
        text = f"{text}: no batch of the corpus has so many loss terms each time"
        return Named("B43", text, "G", left, ("B46",), certain=False)
    text = f"{text}: few for the loss terms of a batch, which nothing tells without a corpus"
    return Named("B43", text, "G", left, ("B46", "B1"))


def whole(x: float, tol: float) -> bool:
    """Is x a whole number from 2 on, and would it be one rarely by chance?"""
    return x > 1.5 and tol * x < 0.1 and abs(x - round(x)) <= max(tol * x, 1e-12 * x)
