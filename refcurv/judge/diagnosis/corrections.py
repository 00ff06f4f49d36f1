"""Which fault explains another Λ: each one that model and corpus let us compute, and its factor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.compare import Bounds, Measured, right
from refcurv.judge.diagnosis.ladders import COARSEST
from refcurv.judge.diagnosis.precision import short
from refcurv.judge.segments import Pieces, batches, parts, pieces_of
from refcurv.judge.truths import FORM, Near, Truth, Truths, near_of
from refcurv.judge.verdict import EQUAL_AS, FAIL, Comparison
from refcurv.law.checks import Array
from refcurv.law.words import number_of

_FEW_PASSES: Final = 2048
"""Backward passes of `expected`, at most, to find out whose labels Λ has.  Chosen: seconds."""


@dataclass(frozen=True, slots=True)
class Other:
    """Theirs under a fault: `truth` is the Λ that it would then be. scaled: up to what factor?"""

    fault: str | None
    words: str
    near: Near
    scaled: bool = True


def explained(
    bounds: Bounds,
    L: Array,
    near: Near,
    form: Comparison,
    measured: Mapping[str, Measured],
    truths: Truths,
) -> tuple[Comparison, Truth | None]:
    """The form with its cause; and the Λ that theirs is by it, whose factor is to be judged."""
    limit = 2 * bounds.case.budget(bounds.layer, bounds.case.arithmetic.stored or "float64")
    tried = []
    for other in _others(bounds, L, near, truths):
        error, allowed = other.near.error, limit + other.near.by_drawing
        sharp = near.error / 10 if error <= limit else near.error / 2
        if error <= allowed and error <= sharp:
            text = f"{other.words} (this leaves {error:.2g} of {near.error:.2g})"
            found = replace(form, fault=other.fault, cause=text, verdict=FAIL)
            return found, other.near.truth if other.scaled else None
        tried.append(f"{other.words}: leaves {error:.2g}")
    rounded = None if near.by_drawing else _rounded(bounds, L, form, measured)
    return rounded or _left(form, near, measured, tried), None


def _others(bounds: Bounds, L: Array, near: Near, truths: Truths) -> Iterator[Other]:
    """Every fault of Λ that the model and the corpus let us compute."""
    case, layer, truth = bounds.case, bounds.layer, near.truth
    other = "token" if truth.per == "sequence" else "sequence"
    words = f"Λ is per {other}, not per {truth.per} as declared"
    yield Other("B75", words, near_of(bounds, L, truths.of(layer, other, truth.fisher)))
    for what, turned in (
        ("its rows and columns", truth.Lambda[::-1, ::-1]),
        ("its rows", truth.Lambda[::-1]),
        ("its columns", truth.Lambda[:, ::-1]),
    ):
        words = f"Λ has {what} in the opposite order of the eigenvectors"
        yield Other(None, words, near_of(bounds, L, replace(truth, Lambda=turned)))
    if L.shape[0] == L.shape[1]:
        words = "Λ lies the other way round: pairs are (A, G) where (G, A) is meant"
        yield Other("B78", words, near_of(bounds, L, replace(truth, Lambda=truth.Lambda.T)))
    pieces = None
    if truth.fisher == "empirical":
        pieces = pieces_of(case, layer)
    if pieces is not None:
        yield from _of_batches(bounds, L, truth, pieces)
    yield from _of_labels(bounds, L, near, truths)
    if pieces is not None:
        yield from _of_parts(bounds, L, truth, pieces)
    if not near.by_drawing:
        words = "Λ has its rows or columns in another order than the eigenvectors"
        ordered = replace(truth, Lambda=_in_order_of(L, truth.Lambda))
        yield Other(None, words, near_of(bounds, L, ordered))


def _in_order_of(L: Array, ours: Array) -> Array:
    """Ours with the rows and the columns in the order in which theirs have their sums."""
    out = np.empty_like(ours)
    to, of = (np.ix_(*(x.sum(axis=k).argsort() for k in (1, 0))) for x in (L, ours))
    out[to] = ours[of]
    return out


def _of_batches(bounds: Bounds, L: Array, truth: Truth, pieces: Pieces) -> Iterator[Other]:
    """The square of the sum over several sequences."""
    best: Other | None = None
    for size, total in batches(pieces):
        near = near_of(bounds, L, replace(truth, Lambda=total / truth.rows))
        what = (
            f"of {number_of(size, 'sequence')} at a time"
            if size > 1
            else "of whole sequences, not documents,"
        )
        words = f"the gradients {what} were summed before the square"
        if best is None or near.error < best.near.error:
            best = Other("B75", words, near)
    if best is not None:
        yield best


def _of_labels(bounds: Bounds, L: Array, near: Near, truths: Truths) -> Iterator[Other]:
    """Λ by other labels than those of A and G."""
    case, known = bounds.case, near.truth.fisher
    assert case.model is not None and case.corpus is not None
    labels = int((case.corpus.label >= 0).sum())
    few = labels * case.model.config.vocabulary <= _FEW_PASSES
    for fisher in ("empirical", "sampled", *(["expected"] if few else [])):
        if fisher == known or (fisher == "sampled" and known == "expected"):
            continue
        for per in ("sequence", "token"):
            truth = truths.of(bounds.layer, per, fisher)
            words = f"Λ has {fisher} labels, A and G have {known} ones"
            yield Other("B76", words, near_of(bounds, L, truth))


def _of_parts(bounds: Bounds, L: Array, truth: Truth, pieces: Pieces) -> Iterator[Other]:
    """Λ of some of the sequences alone."""
    for per, each in (("sequence", pieces.squares), ("token", pieces.tokens)):
        chosen = parts(L, each)
        if chosen is not None:
            total = each[chosen].sum(axis=0) / truth.rows
            few = ", ".join(map(str, chosen[:6])) + (", ..." if len(chosen) > 6 else "")
            some = f"{len(chosen)} of {number_of(len(each), 'sequence')} alone ({few})"
            words = f"Λ per {per} is of {some}"
            near = near_of(bounds, L, replace(truth, per=per, Lambda=total))
            yield Other("B76", words, near, scaled=False)


def _rounded(
    bounds: Bounds, L: Array, form: Comparison, measured: Mapping[str, Measured]
) -> Comparison | None:
    """Is it rounding that A and G do not have?"""
    case, error = bounds.case, form.error or 0.0
    bare = replace(case, arithmetic=Arithmetic())
    level = case.arithmetic.stored or "float64"
    alone = len(measured) == 2 and right(bounds, measured, level)
    if not alone:
        return form if form.verdict.startswith(EQUAL_AS) else None
    few = case.arithmetic.stored not in ("bfloat16", "float16") and short(L)
    for dtype in ("float32", "float16", "bfloat16"):
        if error <= min(2 * bare.budget(bounds.layer, dtype), COARSEST):
            size = "bfloat16" if few else dtype
            digits = ", and has its 8 significant bits" if few else ""
            text = f"Λ alone is off by {error:.2g}, the size of {size}{digits}; A and G are not"
            found = replace(form, fault=None if size == "float32" else "B77", cause=text)
            undeclared = form.verdict.startswith(EQUAL_AS)
            return replace(found, verdict=EQUAL_AS + size) if undeclared else found
    return None


def _left(
    form: Comparison, near: Near, measured: Mapping[str, Measured], tried: Sequence[str]
) -> Comparison:
    """Other data, where A and G are right and nothing else explains Λ; else unknown."""
    text = f"{form.cause}; {'; '.join(tried)}"
    if len(measured) < 2 or not math.isfinite(near.error):
        return replace(form, cause=text)
    words = "A and G are right, and no sum, order, label, dtype or part of this corpus explains Λ"
    return replace(form, fault="B76", cause=f"{words}: it is of other data. {text}")


def factor(
    c: float, truth: Truth, measured: Mapping[str, Measured], tolerance: float
) -> tuple[str | None, str]:
    """(fault, words) of a factor of Λ, given the one that A and G together have."""
    product = math.prod(one.ratio for one in measured.values()) if len(measured) == 2 else 1.0
    for known in (product, math.sqrt(product) if product > 0 else math.nan):
        if abs(c / known - 1) <= 2 * tolerance and abs(known - 1) > tolerance:
            return None, ", as A and G have it: no fault of Λ's own"
    rows, segments = truth.rows, truth.segments
    for value, words in (
        (
            rows / segments,
            f"{number_of(rows, 'row')} over {number_of(segments, 'sequence')}: it was divided "
            f"by sequences",
        ),
        (segments / rows, f"{number_of(segments, 'sequence')} over {number_of(rows, 'row')}"),
        (rows, f"the {number_of(rows, 'row')}: it is a sum, where A and G are means"),
        (1 / rows, f"1/{rows}: it was divided by the rows twice"),
        (1 / segments, f"1/{segments}: it was divided by the sequences too"),
    ):
        far = c / product / value
        within = abs(far - 1) <= tolerance < 1 / 2
        # chosen: where drawing blurs the factor, within a quarter of the way to none at all
        blurred = tolerance >= 1 / 2 and value != 1
        if within or (blurred and abs(math.log(far)) <= abs(math.log(value)) / 4):
            about = "" if within else "about "
            return "B10", f", {about}{words}"
    return None, ""


def of_the_corpus(bounds: Bounds, L: Array, near: Near, truths: Truths) -> Comparison | None:
    """Where labels are drawn: is Λ that of the corpus's labels, to all digits? Noise hides it."""
    limit = 2 * bounds.case.budget(bounds.layer, "float32")
    if not near.by_drawing:
        return None
    for per in ("sequence", "token"):
        gold = near_of(bounds, L, truths.of(bounds.layer, per, "empirical"))
        if gold.error <= min(limit, near.error / 10):
            text = f"Λ has the labels of the corpus, per {per}, where {near.truth.fisher} ones are"
            return Comparison(
                bounds.layer, FORM, near.error, limit, FAIL, "B76", f"{text} declared"
            )
    return None
