"""What is told of a diagnosis: causes, what was excluded, and the findings with their causes.

`procedure` has found by then what explains each side of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from refcurv.judge.biases import A_COLUMN, NO_COLUMN
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import precision, scales
from refcurv.judge.diagnosis.causes import about, made
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.diagnosis.hypotheses import states
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.signs import Sign, signs
from refcurv.judge.verdict import (
    BY_DRAWING,
    FAIL,
    LEFT_OUT,
    MISSING,
    PASS,
    UNDECIDED,
    Cause,
    Comparison,
)


def causes(
    case: Case, found: Mapping[str, Side], findings: Sequence[Comparison]
) -> tuple[Cause, ...]:
    """What was chosen, what is missing, the factors and roundings that are left, and signs.

    Only what speaks of a comparison that something is wrong with.
    """
    every = [*forms(case, found), *_missing(case, found, findings)]
    seen, rows = list(signs(case, found)), list(_other_rows(case, found))
    moved = {x for one in seen for x in one.layers} | {x for one in rows for x in one.layers}
    every += [*rows, *_scales(case, found, findings, moved)]
    sized = precision.causes(case, found)
    every += [one for one in sized if not (_precision(one) and {*one.layers} <= moved)]
    every += _signs(case, found, seen)
    return tuple(one for one in every if any(_speaks(one, f) for f in findings))


def _other_rows(case: Case, found: Mapping[str, Side]) -> Iterator[Cause]:
    """Layers whose A nothing explains, and whose rows are not as many: then it is of other rows.

    Counts that differ by a factor of 2 or more were counted otherwise, and say nothing of rows.
    """
    told: dict[str, list[str]] = {}
    if any(one.idea.setting is not None for one in found["A"].chosen):
        return  # the rows are found; what is left of other layers is something else
    for layer in found["A"].ladders:
        idea, left = found["A"].of(layer)
        counts = case.counts(layer)
        theirs, ours = counts.theirs["A"], counts.ours["A"]
        plain = idea.setting is None and not idea.faults and found["A"].rank(layer, left) > 0
        if plain and theirs is not None and ours / 2 < theirs < 2 * ours and theirs != ours:
            words = f"n is {theirs:,.12g}, ours {ours:,}, and A is that of other rows"
            told.setdefault(words, []).append(layer)
    how = "Which positions are rows?"
    if case.model is None or case.corpus is None:
        how += " Give model and corpus, and it is tried which they are."
    for words, layers in told.items():
        before = max(found["A"].plain(x).error for x in layers)
        at = tuple(layers), (*_form_of("A"), *_form_of("G"))
        yield made(case, None, f"Unknown: {words}. {how}", *at, before, before, ROWS)


ROWS = ("B20", "B27", "B28", "B82")
"""Faults of rows that a count may come from."""


def _missing(
    case: Case, found: Mapping[str, Side], findings: Sequence[Comparison]
) -> Iterator[Cause]:
    """Faults that leave no matrix to compare: none, zeros, other numbers, another size."""
    absent = [f for f in findings if f.verdict == MISSING and f.layer]
    if absent:
        text = "Nothing is stored of it; where that is meant, judge the others alone (`layers`)."
        yield about(case, "B48", text, absent, math.inf, math.nan)
    zero, wild, inputs = [], [], []
    spilt = False
    for layer in case.matched:
        size = case.counts(layer).shape[1] - (layer in case.joint)
        for side, state in states(case, layer).items():
            at = [f for f in findings if f.layer == layer and f.quantity in _form_of(side)]
            if not state.finite:
                wild += at
                spilt |= state.spilt
            elif state.wanted and not state.filled:
                zero += at
            elif side == "G" and not state.same and not found[side].of(layer)[0].faults:
                inputs += at if state.shape == (size, size) else []
    for fault, words, at in (
        ("B48", "Every entry is 0.", zero),
        ("B61" if spilt else None, "Entries are not finite." if spilt else NOT_FINITE, wild),
        ("B35", "G has the size of the layer's input.", inputs),
        ("B31", "A has no column of ones.", [f for f in findings if f.cause == NO_COLUMN]),
        ("B31", "A has a column of ones.", [f for f in findings if f.cause == A_COLUMN]),
    ):
        if at:
            alike = () if fault else ("B61",)
            yield about(case, fault, words, at, math.inf, math.nan, alike)


NOT_FINITE = (
    "Unknown: entries are not finite, and no infinity says that a number was too large. It may be "
    "float16 overflow (B61), a division by 0 rows, or a loss that was NaN already."
)


def forms(case: Case, found: Mapping[str, Side]) -> list[Cause]:
    """A cause for each fault of the chosen hypotheses, A and G together where they share it."""
    parts: dict[str | None, list[tuple[Side, Chosen]]] = {}
    for side in found.values():
        for one in side.chosen:
            for fault in one.faults or (None,):
                parts.setdefault(fault, []).append((side, one))
    out = []
    for fault, where in parts.items():
        layers = dict.fromkeys(layer for _, one in where for layer in one.left)
        sides = "AG" if fault == "B32" else [side.side for side, _ in where]
        quantities = tuple(dict.fromkeys(q for side in sides for q in _form_of(side)))
        before = max(side.plain(x).error for side, one in where for x in one.left)
        after = max(left.error for _, one in where for left in one.left.values())
        alike = (*_like(where), *_without_padding(case, fault))
        words = _words(where)
        out.append(made(case, fault, words, tuple(layers), quantities, before, after, alike))
    return out


def _without_padding(case: Case, fault: str | None) -> tuple[str, ...]:
    """Every position, and every real one, are then the same rows."""
    both = {"B27": ("B28",), "B28": ("B27",)}.get(fault or "", ())
    corpus = case.corpus
    padded = corpus is None or (corpus.images is None and not corpus.real.all())
    return () if padded else both


def _form_of(side: str) -> tuple[str, ...]:
    return (f"{side}/tr {side}", f"symmetry of {side}", side, f"n_{side}", "tr A · tr G")


def _words(where: Sequence[tuple[Side, Chosen]]) -> str:
    """What was seen on each side, in the first layer that shows it, and in how many layers."""
    out = []
    for side, one in where:
        layer, left = next(iter(one.left.items()))
        notes = {one.note for one in one.left.values()}
        place = f"In {layer}" if len(notes) > 1 or len(one.left) == 1 else "In each layer"
        total = f" ({len(one.left)} layers)" if len(one.left) > 1 else ""
        out.append(f"{place}, {side.side}: {left.note}{total}.")
    return " ".join(dict.fromkeys(out))


def _like(where: Sequence[tuple[Side, Chosen]]) -> tuple[str, ...]:
    ids = [id for _, one in where for other in one.alike for id in other]
    ids += [id for _, one in where for left in one.left.values() for id in left.alike]
    own = {id for _, one in where for id in one.faults}
    return tuple(id for id in dict.fromkeys(ids) if id not in own)


def _scales(
    case: Case, found: Mapping[str, Side], findings: Sequence[Comparison], moved: Set[str]
) -> list[Cause]:
    """Causes of factors that the forms leave, and of counts; not where signs say what moves them.

    Where drawing alone explains G, a factor that no comparison objects to is no fault either.
    """
    wrong = {f.layer for f in findings if f.verdict == FAIL and f.quantity in _OF_SCALE}
    at = [x for x in case.matched if x in wrong or not _by_drawing(found["G"], x)]
    at = [x for x in at if x not in moved]
    seen = [one for layer in at if (one := scale(case, found, layer))]
    if not seen:
        return []
    out = []
    for named in scales.explain(seen, scales.Counts.of(case)) + scales.counted(seen):
        if named.fault in ("B8", None):
            continue  # of the first `compare` speaks; the second explains nothing
        quantities = tuple(dict.fromkeys(q for side in named.sides for q in _OF_FACTOR[side]))
        before = max(_far(x, named.sides) for x in seen if x.layer in named.layers)
        words, layers = f"{named.sentence}.", named.layers
        alike = named.alike
        out.append(made(case, named.fault, words, layers, quantities, before, named.left, alike))
    return out


_OF_SCALE = ("A", "G", "tr A · tr G", "n_A", "n_G")
_OF_FACTOR = {"A": ("A", "tr A · tr G"), "G": ("G", "tr A · tr G"), "n": ("n_A", "n_G")}


def _by_drawing(side: Side, layer: str) -> bool:
    """Is G of this layer ours by drawing alone?"""
    steps = side.ladders.get(layer)
    if steps is None:
        return False
    return side.drawn(layer) or side.rank(layer, side.of(layer)[1]) >= steps.by_drawing


def _far(one: scales.Scale, sides: str) -> float:
    pairs = {"A": (one.c_A,), "G": (one.c_G,), "n": (one.rows_A, one.rows_G)}
    return max(abs((x or 1.0) - 1) for side in sides for x in pairs[side])


def scale(case: Case, found: Mapping[str, Side], layer: str) -> scales.Scale | None:
    """The factors of one layer that its forms leave; None where a form is unexplained."""
    counts = case.counts(layer)
    c: dict[str, float | None] = {"A": None, "G": None}
    tol = {"A": 0.0, "G": 0.0}
    rows: dict[str, float | None] = {"A": None, "G": None}
    pooled = any("B40" in side.of(layer)[0].faults for side in found.values())
    for name, side in found.items():
        steps = side.ladders.get(layer)
        if steps is None:
            continue
        idea, left = side.of(layer)
        rank = side.rank(layer, left)
        if rank > steps.by_drawing or not math.isfinite(left.ratio):
            continue
        free = name in case.dump.scale_free
        c[name] = None if free else left.ratio
        tol[name] = left.wider * steps.tolerance(rank) + left.spread
        if idea.setting is not None or not (idea.faults or pooled):
            rows[name] = left.rows
    if c == {"A": None, "G": None}:
        return None
    return scales.Scale(
        layer, c["A"], c["G"], tol["A"], tol["G"], rows["A"], rows["G"], counts.shape[0],
        counts.ours["A"],
    )  # fmt: skip


def _signs(case: Case, found: Mapping[str, Side], seen: Sequence[Sign]) -> Iterator[Cause]:
    for one in seen:
        before = max(found[one.side].plain(x).error for x in one.layers)
        at = one.layers, _form_of(one.side)
        yield made(case, one.fault, f"{one.words}.", *at, before, math.nan, one.alike)


def excluded(found: Mapping[str, Side]) -> Iterator[str]:
    """What was tried where nothing was enough, and the error that it left; the nearest first."""
    tried: dict[str, float] = {}
    for side in found.values():
        layers = side.unexplained()
        for idea, left in side.table.items():
            errors = [left[x].error for x in layers if x in left]
            if errors:
                note = next(left[x].note for x in layers if x in left)
                words = ": ".join(filter(None, (_names(idea), note)))
                text = f"{side.side} of {len(errors)} layers, {words}"
                tried[text] = min(*errors, tried.get(text, math.inf))
    for text, error in sorted(tried.items(), key=lambda pair: pair[1]):
        yield f"{text}: leaves {error:.2g} or more"
    for side in found.values():
        if side.unexplained():
            yield from _sampled(side)


def _sampled(side: Side) -> Iterator[str]:
    """What was tried on a few sequences alone, and the share of the error that it left there."""
    for idea, (share, words) in sorted(side.sampled.items(), key=lambda pair: pair[1]):
        if idea not in side.table:
            yield f"{side.side}, {_names(idea)}: {words}: leaves {share:.0%} of the error"


def _names(idea: Idea) -> str:
    return " and ".join(f"{id} ({FAULTS[id].name})" for id in idea.faults)


def told(case: Case, findings: Sequence[Comparison], causes: Sequence[Cause]) -> list[Comparison]:
    """The findings with the first cause that speaks of them."""
    out = []
    for old in findings:
        one = old
        fitting = [cause for cause in causes if _speaks(cause, one)]
        if fitting:
            first = fitting[0]
            verdict = FAIL if one.verdict == PASS or not _precision(first) else one.verdict
            verdict = MISSING if one.verdict == MISSING else verdict
            measured = one.cause and one.verdict == FAIL  # what else it may be is decided now
            words = f"{one.cause}. {first.sentence}" if measured else first.sentence
            one = replace(old, fault=first.fault, cause=words, verdict=verdict)
            if old.verdict == PASS:  # by drawing, which explains no fault
                one = replace(one, budget=_undrawn(case, old))
        out.append(one)
    return out


def _speaks(cause: Cause, one: Comparison) -> bool:
    """Is this a comparison that the cause is about, and that something is wrong with?"""
    wrong = one.verdict not in (PASS, LEFT_OUT) or not aside(one)
    open_ = one.verdict == UNDECIDED and _precision(cause)  # drawn labels leave errors of any size
    about = one.layer in cause.layers and one.quantity in cause.quantities
    return about and wrong and not open_


def _undrawn(case: Case, one: Comparison) -> float:
    """The budget of a comparison of A or G without drawing."""
    times = 2 if one.quantity == "tr A · tr G" else 1
    return times * case.budget(one.layer, case.arithmetic.stored or "float64")


def aside(one: Comparison) -> bool:
    """May this pass although the layer has a fault?"""
    return BY_DRAWING not in one.cause


def _precision(cause: Cause) -> bool:
    return cause.fault in precision.SIZES
