"""What is told of a diagnosis: causes, what was excluded, and the findings with their causes.

`procedure` has found by then what explains each side of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace

from refcurv.judge.case import Case, Counts
from refcurv.judge.diagnosis import divisors, precision, scales
from refcurv.judge.diagnosis.absent import missing, not_asked
from refcurv.judge.diagnosis.causes import form_of, made
from refcurv.judge.diagnosis.factors import factors
from refcurv.judge.diagnosis.looking import ROWS_KEPT
from refcurv.judge.diagnosis.search import PLAIN, Chosen, Idea, Side
from refcurv.judge.diagnosis.signs import Sign, signs
from refcurv.judge.diagnosis.titles import Title, joined, of_factor, titles
from refcurv.judge.diagnosis.variants import REFERENCE
from refcurv.judge.diagnosis.weighted import weighs
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
from refcurv.law.conventions import Fisher
from refcurv.law.words import number_of


def causes(
    case: Case, found: Mapping[str, Side], findings: Sequence[Comparison]
) -> tuple[Cause, ...]:
    """What was chosen, what is missing, the factors and roundings that are left, and signs.

    Only what speaks of a comparison that something is wrong with.
    """
    sized = precision.causes(case, found)  # it leaves out forms that are parts of what it names
    every = [*forms(case, found), *missing(case, found, findings)]
    for side in found.values():
        named = {x for one in sized if _of_side(one, side.side) for x in one.layers}
        side.odd = {*side.sized()} - named
    lost = {x for side in found.values() for x in side.unexplained()}
    whole = any(_precision(one) and lost <= {*one.layers} for one in sized)
    seen, rows = list(signs(case, found, whole)), list(_other_rows(case, found))
    moved = {x for one in seen for x in one.layers} | {x for one in rows for x in one.layers}
    every += [*rows, *_scales(case, found, findings, moved)]
    every += [one for one in sized if not (_precision(one) and {*one.layers} <= moved)]
    every += [*_signs(case, found, seen), *not_asked(case, findings)]
    every += [] if any(_of_side(one, "G") for one in every) else _drawn_by_theirs(case, found)
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
        at = tuple(layers), (*form_of("A"), *form_of("G"))
        yield made(case, None, f"Unknown: {words}. {how}", *at, before, before, ROWS)


ROWS = ("B20", "B27", "B28", "B82")
"""Faults of rows that a count may come from."""


def _drawn_by_theirs(case: Case, found: Mapping[str, Side]) -> Iterator[Cause]:
    """The labels of the reference are the corpus's own, every A is ours, and no G: as of others.

    Labels are the same for all layers, and no A has any.

    Proof: tests/test_judge_drawing.py::test_drawn_labels_beside_the_corpus_own_are_told
    """
    A, G, given = found["A"], found["G"], case.dump.declared
    lost = G.unexplained()
    if case.reference.fisher is Fisher.EMPIRICAL and not given.keys() & {"fisher", "labels"}:
        if lost and {*lost} == {*G.ladders} and not (A.chosen or A.unexplained()):
            before = max(G.plain(x).error for x in lost)
            at = tuple(lost), form_of("G")
            yield made(case, None, OTHER_LABELS, *at, before, before)


OTHER_LABELS = (
    "Unknown: every A is ours, and no G is. The reference has the corpus's own labels. If theirs "
    "are drawn from the model, judge by model and corpus alone (without --reference), or collect "
    "the reference without --fisher empirical."
)


def forms(case: Case, found: Mapping[str, Side]) -> list[Cause]:
    """A cause for each fault of the chosen hypotheses, A and G together where they share it."""
    parts: dict[str | None, list[tuple[Side, Chosen]]] = {}
    for side in found.values():
        for one in side.chosen:
            for fault in one.faults or (None,):
                parts.setdefault(fault, []).append((side, one))
    out: list[Cause] = []
    said: dict[str, str] = {}  # what was seen → the fault whose cause says it
    for fault, where in parts.items():
        layers = dict.fromkeys(layer for _, one in where for layer in one.left)
        sides = "AG" if fault == "B32" else [side.side for side, _ in where]
        quantities = tuple(dict.fromkeys(q for side in sides for q in form_of(side)))
        if fault in ROWS_KEPT:
            quantities = tuple(q for q in quantities if q not in _OF_FACTOR["n"])
        before = max(side.plain(x).error for side, one in where for x in one.left)
        after = max(left.error for _, one in where for left in one.left.values())
        alike = (*_like(fault, where), *_without_padding(case, fault))
        words, title = _said(fault, _words(where), said), _title(case, fault, where)
        out.append(made(case, fault, words, tuple(layers), quantities, before, after, alike, title))
    return out


def _said(fault: str | None, words: Sequence[str], said: dict[str, str]) -> str:
    """These words; where other faults of the same hypotheses said all of them, which these are."""
    if all(x in said for x in words):
        others = dict.fromkeys(said[x] for x in words)
        return f"It is found together with {' and '.join(others)}."
    said |= {x: fault or "" for x in words if x not in said}
    return " ".join(words)


def _title(case: Case, fault: str | None, where: Sequence[tuple[Side, Chosen]]) -> Title | None:
    """Of the bugs of this fault that were chosen."""
    found = [
        one
        for side, chosen in where if fault
        for note in dict.fromkeys(left.note for left in chosen.left.values())
        for one in titles(case, fault, chosen.idea.setting, side.side, note)
    ]  # fmt: skip
    return joined(tuple(dict.fromkeys(found))) if found else None


def _without_padding(case: Case, fault: str | None) -> tuple[str, ...]:
    """Every position, and every real one, are then the same rows."""
    both = {"B27": ("B28",), "B28": ("B27",)}.get(fault or "", ())
    corpus = case.corpus
    padded = corpus is None or (corpus.images is None and not corpus.real.all())
    return () if padded else both


def _words(where: Sequence[tuple[Side, Chosen]]) -> list[str]:
    """What was seen on each side: in all layers alike, or in the first of so many that show it."""
    seen: dict[tuple[str, str], list[str]] = {}  # (of which layers, what) → sides
    for side, one in where:
        layer, left = next(iter(one.left.items()))
        notes, count = {one.note for one in one.left.values()}, len(one.left)
        total = number_of(count, "layer")
        alike = len(notes) == 1 < count
        what = left.note if alike or count == 1 else f"{left.note} ({total})"
        seen.setdefault((total if alike else layer, what), []).append(side.side)
    return [
        f"{' and '.join(dict.fromkeys(sides))} of {place}: {what}."
        for (place, what), sides in seen.items()
    ]


def _like(fault: str | None, where: Sequence[tuple[Side, Chosen]]) -> tuple[str, ...]:
    """What cannot be told from this fault; of a setting with several, from its part of it."""
    ids = [id for _, one in where for other in one.alike for id in other]
    for _, one in where:
        if one.idea.setting is None:
            ids += [id for left in one.left.values() for id in left.alike]
        else:
            ids += one.idea.setting.alike_of(fault)
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
    failed = {(f.layer, f.quantity) for f in findings if f.verdict == FAIL}
    of_A = {x for x in at if (x, "A") in failed and not {(x, "G"), (x, "n_G")} & failed}
    of_A = {x for x in of_A if _by_drawing(found["G"], x)}
    seen = [one for layer in at if (one := scale(case, found, layer))]
    if not seen:
        return []
    others = [x for x in case.matched if x not in at and x not in moved]
    beside = [one for layer in others if (one := scale(case, found, layer))]
    out, counts = [], divisors.Divisors.of(case)
    for named in _merged(scales.explain(seen, counts, beside) + scales.counted(seen)):
        if named.fault == "B8" or not (named.fault or named.alike):
            continue  # of the first `compare` speaks; the second explains nothing
        if named.sides == "G" and {*named.layers} <= of_A:
            continue
        quantities = tuple(dict.fromkeys(q for side in named.sides for q in _OF_FACTOR[side]))
        before = max(_far(x, named.sides) for x in seen if x.layer in named.layers)
        words, layers = f"{named.sentence}.", named.layers
        left, alike, own = named.left, named.alike, None
        if named.fault is not None:
            own = of_factor(named.fault, words, case.dump.program)
        out.append(made(case, named.fault, words, layers, quantities, before, left, alike, own))
    return out


def _merged(every: Sequence[divisors.Named]) -> list[divisors.Named]:
    """Without what may be the fault that more layers show: there a wide budget hides a part."""
    out: list[divisors.Named] = []
    for one in every:
        hidden = [x for x in every if one.fault in x.alike and len(x.layers) < len(one.layers)]
        more = [layer for x in hidden for layer in x.layers if layer not in one.layers]
        shown = [x for x in every if x.fault in one.alike and len(x.layers) > len(one.layers)]
        if not shown:
            out.append(replace(one, layers=(*one.layers, *more)))
    return out


_OF_SCALE = ("A", "G", "tr A · tr G", "n_A", "n_G")
_OF_FACTOR = {"A": ("A", "tr A · tr G"), "G": ("G", "tr A · tr G"), "n": ("n_A", "n_G")}


def _by_drawing(side: Side, layer: str) -> bool:
    """Is G of this layer ours by drawing alone?"""
    steps = side.ladders.get(layer)
    if steps is None:
        return False
    return side.drawn(layer) or side.rank(layer, side.of(layer)[1]) >= steps.by_drawing


def _far(one: divisors.Scale, sides: str) -> float:
    pairs = {"A": (one.c_A,), "G": (one.c_G,), "n": (one.rows_A, one.rows_G)}
    return max(abs((x or 1.0) - 1) for side in sides for x in pairs[side])


def scale(case: Case, found: Mapping[str, Side], layer: str) -> divisors.Scale | None:
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
        tol[name] = left.wider * steps.tolerance(rank, left) + left.spread
        drawn = steps.steps[0][1] + max(left.spread, left.wider * steps.drawn)
        if idea != PLAIN and rank == steps.by_drawing and steps.whole(left) <= drawn and not free:
            c[name] = 1.0  # drawing explains the factor with the form
        kept = {*idea.faults} <= ROWS_KEPT and not pooled
        if idea.setting is not None or kept:
            rows[name] = left.rows
        elif left.rows and not free and abs(left.ratio * left.rows - 1) <= tol[name]:
            c[name] = 1.0  # sums of some rows over the count of all
    if c == {"A": None, "G": None}:
        return None
    inputs, left_A = found["A"].of(layer)
    known = inputs.setting is not None and counts.theirs["A"] is not None
    if weighs(inputs) and left_A.rows == 1 and found["G"].of(layer)[0] == PLAIN:
        rows["G"] = 1.0 if counts.theirs["A"] == counts.theirs["G"] else rows["G"]
    if known and found["G"].of(layer)[0] == PLAIN and counts.theirs["A"] == counts.theirs["G"]:
        rows["G"] = rows["A"]  # one count of both, which A's rows explain
    if known and _of_one_count(counts, c["G"], tol["G"], rows):
        c["G"] = rows["G"] = 1.0
    own = factors(case, found["G"]).get(layer)
    if own is not None and c["G"] is not None:
        c["G"], tol["G"] = (None if _flows_otherwise(found["A"]) else own.c), own.tol
    if all("B32" in side.of(layer)[0].faults for side in found.values()):
        c, tol, rows = _swapped(c, tol, rows)
    return divisors.Scale(
        layer, c["A"], c["G"], tol["A"], tol["G"], rows["A"], rows["G"], counts.shape[0],
        counts.ours["A"], drawn=own is not None, alone=own is not None and not own.shared,
    )  # fmt: skip


def _of_one_count(
    counts: Counts, c_G: float | None, tol: float, rows: Mapping[str, float | None]
) -> bool:
    """Are these G's own sums, over the one count of both, which is that of A's rows?

    Proof: tests/test_judge_weights.py::test_sums_over_the_count_of_the_other_side_have_no_factor
    """
    alike = counts.theirs["A"] == counts.theirs["G"] and rows["A"] == 1
    return alike and None not in (c_G, rows["G"]) and abs((c_G or 0) * (rows["G"] or 0) - 1) <= tol


def _swapped(
    c: dict[str, float | None], tol: dict[str, float], rows: dict[str, float | None]
) -> tuple[dict[str, float | None], dict[str, float], dict[str, float | None]]:
    """What is called A is G. Where one of them alone has a factor, it is taken to be that of G."""
    off = {s for s, x in c.items() if x is not None and abs(x - 1) > tol[s]}
    if off == {"G"}:
        return c, tol, rows
    turned = [{"A": one["G"], "G": one["A"]} for one in (c, rows)]
    return turned[0], {"A": tol["G"], "G": tol["A"]}, turned[1]


def _flows_otherwise(side: Side) -> bool:
    """Is A that of another network or text? Then honest dumps do not say how G varies."""
    settings = (one.idea.setting for one in side.chosen)
    return any(one and (one.network or one.run.text != REFERENCE.text) for one in settings)


def _signs(case: Case, found: Mapping[str, Side], seen: Sequence[Sign]) -> Iterator[Cause]:
    for one in seen:
        before = max(found[one.side].plain(x).error for x in one.layers)
        at = one.layers, form_of(one.side)
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
                words = ": ".join(filter(None, (_names(idea, side.side, note), note)))
                text = f"{side.side} of {number_of(len(errors), 'layer')}, {words}"
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
            names = _names(idea, side.side, words)
            yield f"{side.side}, {names}: {words}: leaves {share:.0%} of the error"


def _names(idea: Idea, side: str, note: str) -> str:
    return " and ".join(
        f"{id} ({joined(titles(None, id, idea.setting, side, note)).name})" for id in idea.faults
    )


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
            if verdict == FAIL and (old.error or 0.0) <= (old.budget or 0.0):
                one = replace(one, budget=_undrawn(case, old))  # drawing or a dtype explains none
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


def settled(findings: Sequence[Comparison]) -> bool:
    """Is there nothing to diagnose?"""
    return all(one.verdict in (PASS, LEFT_OUT) and aside(one) for one in findings)


def aside(one: Comparison) -> bool:
    """May this pass although the layer has a fault?"""
    return BY_DRAWING not in one.cause


def _of_side(cause: Cause, side: str) -> bool:
    return side in cause.quantities


def _precision(cause: Cause) -> bool:
    return cause.fault in precision.SIZES
