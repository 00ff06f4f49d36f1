"""EK-FAC's Λ of another program beside ours (`truths`): its form, then what it was divided by.

A reference alone does not tell Λ: Σ Λ is the trace of F, and n tr A tr G that of K, which are not
equal (O21). Per token and per sequence are two matrices, and so are means over rows, over
sequences, and sums. `diagnosis.corrections` finds out which fault explains another form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds, Measured, right, said
from refcurv.judge.diagnosis import corrections as why
from refcurv.judge.diagnosis.ladders import COARSEST
from refcurv.judge.diagnosis.seen import fitted
from refcurv.judge.dump import Theirs
from refcurv.judge.truths import FORM, WHOLE, Near, Truth, Truths, draws, near_of, unfit
from refcurv.judge.verdict import FAIL, LEFT_OUT, PASS, Comparison
from refcurv.law.checks import Array, RangeError
from refcurv.law.conventions import Fisher
from refcurv.law.words import number_of


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
    gold = why.of_the_corpus(bounds, L, near, truths)
    return [gold] if gold is not None else _judged(bounds, L, near, measured, truths)


def _judged(
    bounds: Bounds, L: Array, near: Near, measured: Mapping[str, Measured], truths: Truths
) -> list[Comparison]:
    """The form; then the factor, or what explains another form."""
    form = _form(bounds, near)
    if form.verdict == PASS:
        return [form, _scale(bounds, L, near.truth, measured)]
    if not right(bounds, measured, "bfloat16"):
        text = f"{form.cause}; A or G differ too, and Λ is made of the same a and g"
        return [replace(form, cause=text)]
    form, truth = why.explained(bounds, L, near, form, measured, truths)
    return [form] if truth is None else [form, _scale(bounds, L, truth, measured)]


def _without_ours(bounds: Bounds, L: Array, theirs: Theirs) -> Comparison | None:
    """What is said where our Λ is not computed: theirs does not fit, or there is no model."""
    case, layer = bounds.case, bounds.layer
    trouble = unfit(case, layer, theirs)
    if trouble:
        table = case.ours(layer).sum_A.ndim == 1
        aside = table or theirs.U_A is None or theirs.U_G is None
        return said(layer, WHOLE, LEFT_OUT if aside else FAIL, trouble)
    if not L.any() and case.ours(layer).sum_G.any():
        return replace(said(layer, WHOLE, FAIL, "every entry of Λ is 0"), fault="B48")
    if (L < 0).any():
        below = number_of(int((L < 0).sum()), "entry", "entries")
        text = f"Λ has {below} below 0; it is a mean of squares"
        return said(layer, WHOLE, FAIL, text)
    if case.model is None or case.corpus is None:
        return _from_reference(bounds, L)
    return None


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


def _nearest(bounds: Bounds, L: Array, truths: Truths) -> Near:
    """Of what theirs declares; where it declares nothing, the nearest of what it may be."""
    declared = bounds.case.dump.declared.get("Lambda")
    kinds = (declared,) if declared in ("token", "sequence") else ("sequence", "token")
    found = [
        near_of(bounds, L, truths.of(bounds.layer, str(per), fisher))
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


def _scale(bounds: Bounds, L: Array, truth: Truth, measured: Mapping[str, Measured]) -> Comparison:
    """Λ with its scale: by the declared divisor, or else by rows."""
    over = bounds.case.dump.declared.get("Lambda_over", "rows")
    factor = truth.rows / truth.segments if over == "sequences" else 1.0
    r = fitted(L, truth.Lambda)[1]
    c = r / factor
    error = float(norm(L / factor - truth.Lambda)) / (float(norm(truth.Lambda)) or math.inf)
    drawn = truth.by_drawing(draws(bounds), sums=True)
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
    tolerance = 4 * bounds.case.budget(bounds.layer, "float32") + drawn
    fault, words = why.factor(c, truth, measured, tolerance)
    return replace(found, fault=fault, cause=f"{found.cause}{words}")
