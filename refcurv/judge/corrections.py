"""EK-FAC's Λ of another program, beside ours in *their* eigenvectors.

Λ belongs to the vectors that it was made in. So ours is computed in theirs, from model and corpus,
and no sign, order or rotation lies between the two. A reference alone does not tell Λ: Σ Λ is the
trace of F, and n tr A tr G that of K, which are not equal (O21).

Per token and per sequence are two matrices, and so are means over rows, over sequences, and sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import Corrected, ekfac
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds, Measured, said
from refcurv.judge.diagnosis.hypotheses import fitted
from refcurv.judge.diagnosis.precision import short
from refcurv.judge.diagnosis.procedure import made
from refcurv.judge.diagnosis.search import COARSEST
from refcurv.judge.drawn import DEVIATIONS
from refcurv.judge.dump import Theirs
from refcurv.judge.segments import Pieces, batches, parts, pieces_of
from refcurv.judge.verdict import EQUAL_AS, FAIL, LEFT_OUT, PASS, Cause, Comparison
from refcurv.law.checks import Array, RangeError
from refcurv.law.conventions import Bias, Fisher
from refcurv.model.fisher import DRAWN

FORM, WHOLE = "form of Lambda", "Lambda"
"""Quantities: Λ up to a factor, and Λ."""

RUNS: Final = 8
"""Draws of ours that say how much Λ of drawn labels varies.  Chosen: its variance is then known to
about a half, which DEVIATIONS covers."""

_MOST_BYTES: Final = 2**28
"""Of the Λ and bases of layers that are computed in one go.  Chosen: an eighth of 2 GB."""

_FEW_PASSES: Final = 2048
"""Backward passes of `expected`, at most, to find out whose labels Λ has.  Chosen: seconds."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Our Λ of one layer over its rows, (O, I), in their eigenvectors.

    Fields: per, "token" or "sequence"; fisher; rows, segments that were summed; spread, what one
    draw of labels varies by, over |Λ|, and spread_sum, ΣΛ over itself; 0 where nothing is drawn.
    """

    per: str
    fisher: str
    Lambda: Array
    rows: int
    segments: int
    spread: float = 0.0
    spread_sum: float = 0.0


class Truths:
    """Our Λ in their eigenvectors: as many layers at a time as a bound of memory lets."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._bases: Bases | None = None
        self._known: dict[tuple[str, str], Mapping[str, Truth]] = {}

    def of(self, layer: str, per: str, fisher: str) -> Truth:
        """Λ of one layer. Raises RangeError for an `expected` of too many passes."""
        if self._bases is None or layer not in self._bases:
            self._bases, self._known = _bases_from(self._case, layer), {}
        key = per, fisher
        if key not in self._known:
            self._known[key] = _truths(self._case, self._bases, per, fisher)
        return self._known[key][layer]


def _bases_from(case: Case, first: str) -> Bases:
    """Their eigenvectors of this layer and of those behind it, joint or separate alike."""
    assert case.model is not None
    layers: dict[str, Eigenbasis] = {}
    size, order = 0, list(case.matched)
    for layer in order[order.index(first) :]:
        one = case.theirs(layer)
        alike = (layer in case.joint) == (first in case.joint)
        if _unfit(case, layer, one) or not (alike or not case.model.config.has_bias(layer)):
            continue
        assert one.U_A is not None and one.U_G is not None
        O, I = len(one.U_G), len(one.U_A)  # noqa: E741
        size += 8 * (O * O + I * I + 4 * O * I)
        if layers and size > _MOST_BYTES:
            break
        layers[layer] = Eigenbasis(one.U_A, np.zeros(I), one.U_G, np.zeros(O))
    bias = Bias.JOINT if first in case.joint else Bias.SEPARATE
    return Bases(MappingProxyType(layers), bias=bias)


def _truths(case: Case, bases: Bases, per: str, fisher: str) -> Mapping[str, Truth]:
    assert case.model is not None and case.corpus is not None
    kept = case.reference.rows
    seeds = range(RUNS) if fisher in DRAWN else (0,)
    runs: dict[str, list[Corrected]] = {name: [] for name in bases}
    for seed in seeds:
        found = ekfac(case.model, case.corpus, bases, fisher, seed, per=per, rows=kept)
        for name, one in found.items():
            runs[name].append(one)
    return {name: _truth(per, fisher, each) for name, each in runs.items()}


def _truth(per: str, fisher: str, runs: Sequence[Corrected]) -> Truth:
    rows, segments = runs[0].rows, runs[0].segments
    each = [one.Lambda / rows for one in runs]
    mean: Array = sum(each[1:], each[0]) / len(each)
    size, total = float(norm(mean)) or math.inf, float(mean.sum()) or math.inf
    if len(each) == 1:
        return Truth(per, fisher, mean, rows, segments)
    share = DEVIATIONS * math.sqrt((1 + 1 / len(each)) / (len(each) - 1))
    spread = math.sqrt(sum(float(norm(X - mean)) ** 2 for X in each)) / size
    sums = math.sqrt(sum(float((X - mean).sum()) ** 2 for X in each)) / total
    return Truth(per, fisher, mean, rows, segments, share * spread, share * sums)


# ------------------------------------------------------------------ the comparison


def compare_corrections(
    bounds: Bounds, theirs: Theirs, measured: Mapping[str, Measured], truths: Truths
) -> list[Comparison]:
    """Λ up to a factor, then the factor: what it was divided by.

    Proof: tests/test_judge_corrections.py::test_the_true_lambda_passes,
        ::test_each_fault_of_lambda_has_its_name
    """
    L = theirs.Lambda
    if L is None:
        return []
    told = _without_ours(bounds, L, theirs)
    if told is not None:
        return [told]
    try:
        near = _nearest(bounds, L, truths)
    except RangeError as error:
        return [said(bounds.layer, WHOLE, LEFT_OUT, f"not computed: {error}".rstrip("."))]
    gold = _of_the_corpus(bounds, L, near, truths)
    return [gold] if gold is not None else _judged(bounds, L, near, measured, truths)


def _judged(
    bounds: Bounds, L: Array, near: Near, measured: Mapping[str, Measured], truths: Truths
) -> list[Comparison]:
    """The form; then the factor, or what explains another form."""
    form = _form(bounds, near)
    if form.verdict == PASS:
        return [form, _scale(bounds, L, near.truth, measured)]
    if not _right(bounds, measured, "bfloat16"):
        text = f"{form.cause}; A or G differ too, and Λ is made of the same a and g"
        return [replace(form, cause=text)]
    return _explained(bounds, L, near, form, measured, truths)


def _without_ours(bounds: Bounds, L: Array, theirs: Theirs) -> Comparison | None:
    """What is said where our Λ is not computed: theirs does not fit, or there is no model."""
    case, layer = bounds.case, bounds.layer
    trouble = _unfit(case, layer, theirs)
    if trouble:
        table = case.ours(layer).sum_A.ndim == 1
        aside = table or theirs.U_A is None or theirs.U_G is None
        return said(layer, WHOLE, LEFT_OUT if aside else FAIL, trouble)
    if not L.any() and case.ours(layer).sum_G.any():
        return replace(said(layer, WHOLE, FAIL, "every entry of Λ is 0"), fault="B48")
    if (L < 0).any():
        text = f"{int((L < 0).sum())} entries of Λ are below 0; it is a mean of squares"
        return said(layer, WHOLE, FAIL, text)
    if case.model is None or case.corpus is None:
        return _from_reference(bounds, L)
    return None


def _unfit(case: Case, layer: str, theirs: Theirs) -> str:
    """Why Λ cannot be compared; empty if it can."""
    L, U_A, U_G = theirs.Lambda, theirs.U_A, theirs.U_G
    if L is None:
        return "the dump has no Λ"
    if U_A is None or U_G is None:
        return "Λ belongs to eigenvectors (U_A, U_G), which the dump has not"
    one = case.ours(layer)
    if one.sum_A.ndim == 1:
        return "a table has no Λ here"
    shape = len(one.sum_G), len(one.sum_A)
    sides = (shape[1], shape[1]), (shape[0], shape[0])
    if L.shape != shape or (U_A.shape, U_G.shape) != sides:
        return f"Λ is {L.shape}, U_A {U_A.shape} and U_G {U_G.shape}; ours is {shape}"
    finite = all(np.isfinite(X).all() for X in (L, U_A, U_G))
    return "" if finite else "Λ, U_A or U_G is not finite everywhere"


def _from_reference(bounds: Bounds, L: Array) -> Comparison:
    """What a reference alone says of Λ: the trace of K, which is no equality."""
    one = bounds.case.ours(bounds.layer)
    trace = float(np.trace(one.A)) * float(np.trace(one.G))
    ratio = float(L.sum()) / trace if trace else math.nan
    text = (
        f"give model and corpus: Λ is computed from these. ΣΛ is {ratio:.4g} times tr A · tr G, "
        "which need not be 1: the first is the trace of F, the second that of K (O21)"
    )
    return said(bounds.layer, WHOLE, LEFT_OUT, text)


@dataclass(frozen=True, slots=True)
class Near:
    """Theirs is r times `truth` up to `error`; `by_drawing`, how much of it drawing explains."""

    truth: Truth
    error: float
    r: float
    by_drawing: float


def _near(bounds: Bounds, L: Array, truth: Truth) -> Near:
    """With one draw of ours for how much one of theirs varies."""
    error, r = fitted(L, truth.Lambda)
    return Near(truth, error, r, truth.spread / math.sqrt(_draws(bounds)))


def _draws(bounds: Bounds) -> float:
    """Draws of theirs, one at least."""
    return max(1.0, float(bounds.case.dump.declared.get("draws", "1")))


def _nearest(bounds: Bounds, L: Array, truths: Truths) -> Near:
    """Of what theirs declares; where it declares nothing, the nearest of what it may be."""
    declared = bounds.case.dump.declared.get("Lambda")
    kinds = (declared,) if declared in ("token", "sequence") else ("sequence", "token")
    found = [
        _near(bounds, L, truths.of(bounds.layer, str(per), fisher))
        for fisher in _labels(bounds.case)
        for per in kinds
    ]
    limit = 2 * bounds.case.budget(bounds.layer, "float32")
    return min(found, key=lambda one: one.error / (limit + one.by_drawing))


def _labels(case: Case) -> tuple[str, ...]:
    """Whose labels Λ may have, by declaration or as the reference."""
    declared = case.dump.declared.get("fisher", "")
    if declared in list(Fisher):
        return (declared,)
    ours = str(case.reference.fisher)
    return ("expected", "sampled") if ours == "expected" else (ours,)


def _of_the_corpus(bounds: Bounds, L: Array, near: Near, truths: Truths) -> Comparison | None:
    """Where labels are drawn: is Λ that of the corpus's labels, to all digits? Noise hides it."""
    limit = 2 * bounds.case.budget(bounds.layer, "float32")
    if not near.by_drawing:
        return None
    for per in ("sequence", "token"):
        gold = _near(bounds, L, truths.of(bounds.layer, per, "empirical"))
        if gold.error <= min(limit, near.error / 10):
            text = f"Λ has the labels of the corpus, per {per}, where {near.truth.fisher} ones are"
            return Comparison(
                bounds.layer, FORM, near.error, limit, FAIL, "B76", f"{text} declared"
            )
    return None


def _form(bounds: Bounds, near: Near) -> Comparison:
    """By the budget of A or G, twice.

    The size of an error tells a dtype up to COARSEST alone, and not where drawing makes it.
    """
    case, text = bounds.case, f"Λ per {near.truth.per} has another form: no factor makes it ours"
    finest = 2 * case.budget(bounds.layer, case.arithmetic.stored or "float64")
    found = bounds.judged(
        FORM,
        near.error,
        text,
        drawing=near.by_drawing,
        inferred=not near.by_drawing,
        told=True,
        budget_of=lambda dtype: max(finest, min(2 * case.budget(bounds.layer, dtype), COARSEST)),
    )
    if found.verdict == PASS and not found.cause:
        found = replace(found, cause=f"per {near.truth.per}")
    return found


def _right(bounds: Bounds, measured: Mapping[str, Measured], dtype: str) -> bool:
    """Are A and G ours up to a factor, within the budget of a dtype and by drawing?"""
    limit = bounds.case.budget(bounds.layer, dtype)
    drawn = {"A": 0.0, "G": bounds.drawing.norm}
    return all(
        one.form <= limit + (0.0 if math.isnan(drawn[side]) else drawn[side])
        for side, one in measured.items()
    )


# ------------------------------------------------------------------ what it was divided by


def _scale(bounds: Bounds, L: Array, truth: Truth, measured: Mapping[str, Measured]) -> Comparison:
    """Λ with its scale: by the declared divisor, or else by rows."""
    over = bounds.case.dump.declared.get("Lambda_over", "rows")
    factor = truth.rows / truth.segments if over == "sequences" else 1.0
    r = fitted(L, truth.Lambda)[1]
    c = r / factor
    error = float(norm(L / factor - truth.Lambda)) / (float(norm(truth.Lambda)) or math.inf)
    drawn = (truth.spread + truth.spread_sum) / math.sqrt(_draws(bounds))
    if over == "unknown" or bounds.case.dump.scale_free:
        text = f"the dump does not tell its scale; theirs is {r:.6g} times the mean over rows"
        return replace(said(bounds.layer, WHOLE, LEFT_OUT, text), error=error)
    found = bounds.judged(
        WHOLE,
        error,
        f"theirs is ours times {c:.6g}",
        times=4,
        drawing=drawn,
        inferred=False,
        told=True,
    )
    if found.verdict != FAIL:
        return replace(found, cause=f"per {truth.per}, over {over}; {found.cause}".rstrip("; "))
    fault, why = _named(c, truth, measured, 4 * bounds.case.budget(bounds.layer, "float32") + drawn)
    return replace(found, fault=fault, cause=f"{found.cause}{why}")


def _named(
    c: float, truth: Truth, measured: Mapping[str, Measured], tolerance: float
) -> tuple[str | None, str]:
    """(fault, words) of a factor of Λ, given the one that A and G together have."""
    product = math.prod(one.ratio for one in measured.values()) if len(measured) == 2 else 1.0
    for known in (product, math.sqrt(product) if product > 0 else math.nan):
        if abs(c / known - 1) <= 2 * tolerance and abs(known - 1) > tolerance:
            return None, ", as A and G have it: no fault of Λ's own"
    rows, segments = truth.rows, truth.segments
    for value, words in (
        (rows / segments, f"{rows} rows over {segments} sequences: it was divided by sequences"),
        (segments / rows, f"{segments} sequences over {rows} rows"),
        (rows, f"the {rows} rows: it is a sum, where A and G are means"),
        (1 / rows, f"1/{rows}: it was divided by the rows twice"),
        (1 / segments, f"1/{segments}: it was divided by the sequences too"),
    ):
        far = c / product / value
        within = abs(far - 1) <= tolerance < 1 / 2
        # chosen: where drawing blurs the factor, within a quarter of the way to none at all
        if within or (value != 1 and abs(math.log(far)) <= abs(math.log(value)) / 4):
            about = "" if within else "about "
            return "B10", f", {about}{words}"
    return None, ""


# ------------------------------------------------------------------ what explains another form


@dataclass(frozen=True, slots=True)
class Other:
    """Theirs under a fault: `truth` is the Λ that it would then be. scaled: up to what factor?"""

    fault: str | None
    words: str
    near: Near
    scaled: bool = True


def _explained(
    bounds: Bounds,
    L: Array,
    near: Near,
    form: Comparison,
    measured: Mapping[str, Measured],
    truths: Truths,
) -> list[Comparison]:
    """The form with its cause, and the factor that this cause leaves."""
    limit = 2 * bounds.case.budget(bounds.layer, bounds.case.arithmetic.stored or "float64")
    tried = []
    for other in _others(bounds, L, near, truths):
        error, allowed = other.near.error, limit + other.near.by_drawing
        sharp = near.error / 10 if error <= limit else near.error / 2
        if error <= allowed and error <= sharp:
            text = f"{other.words} (this leaves {error:.2g} of {near.error:.2g})"
            found = replace(form, fault=other.fault, cause=text, verdict=FAIL)
            rest = [_scale(bounds, L, other.near.truth, measured)] if other.scaled else []
            return [found, *rest]
        tried.append(f"{other.words}: leaves {error:.2g}")
    rounded = None if near.by_drawing else _rounded(bounds, L, form, measured)
    return [rounded or _left(form, near, measured, tried)]


def _others(bounds: Bounds, L: Array, near: Near, truths: Truths) -> Iterator[Other]:
    """Every fault of Λ that the model and the corpus let us compute."""
    case, layer, truth = bounds.case, bounds.layer, near.truth
    other = "token" if truth.per == "sequence" else "sequence"
    words = f"Λ is per {other}, not per {truth.per} as declared"
    yield Other("B75", words, _near(bounds, L, truths.of(layer, other, truth.fisher)))
    for what, turned in (
        ("its rows and columns", truth.Lambda[::-1, ::-1]),
        ("its rows", truth.Lambda[::-1]),
        ("its columns", truth.Lambda[:, ::-1]),
    ):
        words = f"Λ has {what} in the opposite order of the eigenvectors"
        yield Other(None, words, _near(bounds, L, replace(truth, Lambda=turned)))
    pieces = None
    if truth.fisher == "empirical":
        pieces = pieces_of(case, layer)
    if pieces is not None:
        yield from _of_batches(bounds, L, truth, pieces)
    yield from _of_labels(bounds, L, near, truths)
    if pieces is not None:
        yield from _of_parts(bounds, L, truth, pieces)


def _of_batches(bounds: Bounds, L: Array, truth: Truth, pieces: Pieces) -> Iterator[Other]:
    """The square of the sum over several sequences."""
    best: Other | None = None
    for size, total in batches(pieces):
        near = _near(bounds, L, replace(truth, Lambda=total / truth.rows))
        what = (
            f"of {size} sequences at a time" if size > 1 else "of whole sequences, not documents,"
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
            yield Other("B76", words, _near(bounds, L, truth))


def _of_parts(bounds: Bounds, L: Array, truth: Truth, pieces: Pieces) -> Iterator[Other]:
    """Λ of some of the sequences alone."""
    for per, each in (("sequence", pieces.squares), ("token", pieces.tokens)):
        chosen = parts(L, each)
        if chosen is not None:
            total = each[chosen].sum(axis=0) / truth.rows
            few = ", ".join(map(str, chosen[:6])) + (", ..." if len(chosen) > 6 else "")
            words = f"Λ per {per} is of {len(chosen)} of {len(each)} sequences alone ({few})"
            near = _near(bounds, L, replace(truth, per=per, Lambda=total))
            yield Other("B76", words, near, scaled=False)


def _rounded(
    bounds: Bounds, L: Array, form: Comparison, measured: Mapping[str, Measured]
) -> Comparison | None:
    """Is it rounding that A and G do not have?"""
    case, error = bounds.case, form.error or 0.0
    bare = replace(case, arithmetic=Arithmetic())
    level = case.arithmetic.stored or "float64"
    alone = len(measured) == 2 and _right(bounds, measured, level)
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


# ------------------------------------------------------------------ causes


def causes(case: Case, findings: Sequence[Comparison]) -> tuple[Cause, ...]:
    """A cause for each fault of Λ that the findings name."""
    by: dict[str, list[Comparison]] = {}
    for one in findings:
        if one.quantity in (FORM, WHOLE) and one.fault and one.verdict not in (PASS, LEFT_OUT):
            by.setdefault(one.fault, []).append(one)
    return tuple(_cause(case, fault, at) for fault, at in by.items())


def _cause(case: Case, fault: str, at: Sequence[Comparison]) -> Cause:
    layers = tuple(dict.fromkeys(one.layer for one in at))
    quantities = tuple(dict.fromkeys(one.quantity for one in at))
    worst = max(one.error or 0.0 for one in at)
    words = f"In {at[0].layer}: {at[0].cause}."
    return made(case, fault, words, layers, quantities, worst, at[0].budget or 0.0)
