"""Which hypothesis explains a side of some layers: cheap ones first, until nothing is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from refcurv.judge.case import Case
from refcurv.judge.diagnosis import amounts, precision
from refcurv.judge.diagnosis.deciding import is_silent, joined, partners, stages
from refcurv.judge.diagnosis.fits import fits, fits_beside
from refcurv.judge.diagnosis.hidden import hidden
from refcurv.judge.diagnosis.ladders import COARSEST
from refcurv.judge.diagnosis.placed import placed
from refcurv.judge.diagnosis.prompted import prompted
from refcurv.judge.diagnosis.recomputed import batched, recompute
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.unknown import remainder
from refcurv.judge.diagnosis.variants import REFERENCE, Setting
from refcurv.judge.diagnosis.variants.networks import BITS, PARTS
from refcurv.judge.diagnosis.variants.setting import HALVES
from refcurv.judge.diagnosis.weighted import lone, weigh, weighs
from refcurv.judge.diagnosis.work import cost, extent, few_positions, is_large, linear, top


def choose(
    case: Case,
    side: Side,
    found: Mapping[str, Side],
    layers: Sequence[str],
    known: Mapping[str, Idea],
) -> Chosen | None:
    """The simplest of what needs no model; else of what model and corpus make, cheap first."""
    settled = side.side == "G" and _weighed_as_A(case, found, layers, known)
    every, layers = layers, linear(layers)
    chosen = side.choose(every, known)
    if settled or case.model is None or case.corpus is None or not _worth(case, side, layers):
        return chosen
    partner = partners(case, known[layers[0]].setting) if side.side == "G" else []
    if partner:
        recompute(case, found, layers, partner)
        chosen = side.choose(every, known)
    halves = [Setting(tensor_G=name) for name in HALVES] if side.side == "G" else []
    if _short(case, side, layers):  # sums of few small numbers look like it
        recompute(case, found, layers, halves)
        chosen = side.choose(every, known)

    def exact(whole: bool = False) -> bool:
        return _exact(side, chosen, layers, whole)

    tried: list[Setting] = []
    for number, stage in enumerate(stages(case, side.side)):
        some = number == 0 and chosen is not None and len(chosen.left) < len(every)
        if (exact() and not some) or _short(case, side, layers):
            return chosen  # what explains some layers may be one case of what explains all
        wanted = _begun(case, side, found, layers, stage)
        recompute(case, found, layers, [*wanted, *joined(partner, wanted)])
        chosen = side.choose(every, known)
        if number == 0 and side.side == "A" and not exact(whole=True):
            recompute(case, found, layers, list(placed(case, layers)))
            chosen = side.choose(every, known)
        late = is_large(case)  # there it costs a pass over all sequences
        if number == late and not (soft(side, layers) or (late and exact())):
            weigh(case, found, side.side, top(case, layers))
            chosen = side.choose(every, known)
        tried += wanted
        if number == 1 and side.side == "G" and not (exact() or soft(side, layers)):
            amounts.fit(case, found, layers, partner)
            remainder(case, found, layers)
            batched(case, found, layers)
            chosen = side.choose(every, known)
    if not (exact() or soft(side, layers) or is_large(case)):
        _finer(case, side, found, layers, halves, partner)
        chosen = side.choose(every, known)
    if exact() or soft(side, layers) or (is_large(case) and _enough(side, chosen)):
        return chosen
    _join_nearest(case, side, found, layers, tried)
    chosen = side.choose(every, known)
    if not (exact() or is_large(case)):
        recompute(case, found, layers, list(fits_beside(case, side, layers)))
        chosen = side.choose(every, known)
    return chosen


def _finer(
    case: Case,
    side: Side,
    found: Mapping[str, Side],
    layers: Sequence[str],
    halves: Sequence[Setting],
    partner: Sequence[Setting],
) -> None:
    """Try what is fitted, and what rounds on the way."""
    fine = [*fits(case, side, layers), *hidden(case, side, layers)]
    fine += prompted(case, side, layers)
    small_error = all(side.plain(x).error <= COARSEST for x in layers)
    parts = [(name, 0.0) for name in PARTS] if small_error else []
    rough = [Setting(network=(level,)) for level in (*BITS, *parts)]
    recompute(case, found, layers, [*fine, *rough, *halves, *joined(partner, fine)])


def _join_nearest(
    case: Case,
    side: Side,
    found: Mapping[str, Side],
    layers: Sequence[str],
    tried: Sequence[Setting],
) -> None:
    """Try the settings that came nearest with each of the others.

    Of those that leave as much of the form one stands for all: what leaves the fewest factors and
    counts.
    """
    best: dict[float, tuple[int, Setting]] = {}  # what is left of the form → factors, setting
    for idea, lefts in side.table.items():
        if idea.setting:
            error = float(f"{max(left.error for left in lefts.values()):.6g}")
            scaled = sum(not side.whole(x, left) for x, left in lefts.items())
            if error not in best or scaled < best[error][0]:
                best[error] = scaled, idea.setting
    sampled = extent(case) > few_positions(case)
    count = 1 if is_large(case) else 2 if sampled else 3
    firsts = [best[error][1] for error in sorted(best)[:count]]
    for one in firsts:
        under = REFERENCE if is_large(case) else one
        recompute(case, found, layers, joined([one], tried), under=under)
    if side.side == "G":
        amounts.fit(case, found, layers, firsts[:1])
        names = {idea.name for x in layers if weighs(idea := found["A"].of(x)[0])}
        for one in firsts:
            if one.faults and one == replace(one.run, text=REFERENCE.text, token=REFERENCE.token):
                weigh(case, found, "G", layers, names, decaying=False, under=one)


def _weighed_as_A(
    case: Case, found: Mapping[str, Side], layers: Sequence[str], known: Mapping[str, Idea]
) -> bool:
    """Try the weights of A on G. Is then nothing left but a factor or a count, as of `scales`?"""
    side, names = found["G"], {one.name for one in known.values() if weighs(one)}
    if names:
        weigh(case, found, "G", layers, names)
    return bool(names) and all(side.rank(x, side.plain(x)) == 0 for x in layers)


GOLD = ("empirical", "argmax")
"""Labels without drawing: theirs may equal them where drawing alone would explain it too."""


SMALL = 2.0**28
"""Parameters times positions where everything is tried even then.  Chosen: some seconds."""


def _begun(
    case: Case,
    side: Side,
    found: Mapping[str, Side],
    layers: Sequence[str],
    stage: Sequence[Setting],
) -> list[Setting]:
    """Try on all sequences what no sample should leave out; then what is worth a trial.

    That is what leaves layers without a gradient that have none in theirs. Where drawing explains
    all of G it is labels that nobody draws: on other sequences theirs is another draw.

    Proof: tests/test_judge_drawing.py::test_gold_labels_are_named_where_a_sample_says_nothing,
        tests/test_judge_network.py::test_what_is_detached_has_its_name
    """
    drawn = soft(side, layers)
    plain = [one for one in stage if not (drawn and one.network)]
    first = [x for x in plain if (drawn and x.labels in GOLD) or is_silent(case, x)]
    recompute(case, found, layers, first, sampled=False)
    return plain if not drawn or cost(case) <= SMALL else first


def _exact(side: Side, chosen: Chosen | None, layers: Sequence[str], whole: bool = False) -> bool:
    """Is nothing left of its form; `whole`, nor a factor or a count? Weights are of all layers."""
    if chosen is None or lone(chosen, layers):
        return False
    return all(
        side.rank(x, y) == 0 and (side.whole(x, y) or not whole) for x, y in chosen.left.items()
    )


def _enough(side: Side, chosen: Chosen | None) -> bool:
    """Is it no more than one of two faults: its form is exact, or else neither factor nor count?"""
    return chosen is not None and all(
        side.rank(x, y) == 0 or side.whole(x, y) for x, y in chosen.left.items()
    )


def _short(case: Case, side: Side, layers: Sequence[str]) -> bool:
    """Are all of these ours, but for sums that have the digits of bfloat16?"""
    return all(
        side.rank(x, side.plain(x)) < side.ladders[x].by_drawing
        and precision.short_sums(case, x, side.side)
        for x in layers
    )


def soft(side: Side, layers: Sequence[str]) -> bool:
    """Does drawing explain the form of all of these layers already?"""
    return side.passed or all(
        side.drawn(x) or side.rank(x, side.plain(x)) == side.ladders[x].by_drawing for x in layers
    )


def _worth(case: Case, side: Side, layers: Sequence[str]) -> bool:
    """Is there more to explain than a dtype no coarser than float32, which is not declared?"""
    fine = [
        side.rank(x, side.plain(x)) <= [d for d, _ in side.ladders[x].steps].index("float32")
        if "float32" in [d for d, _ in side.ladders[x].steps]
        else False
        for x in layers
    ]
    return bool(layers) and (
        case.arithmetic.declared
        or not all(fine)
        or any(side.rank(x, side.plain(x)) == 0 for x in layers)
    )
