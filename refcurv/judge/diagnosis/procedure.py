"""Which convention or bug explains what does not agree.

Each hypothesis is a transformation of the truth (`hypotheses`). It explains one side of a layer if
it brings theirs within budget. The forms of A are explained first, then those of G, then what
factors are left (`scales`), then how far rounding goes (`precision`). So several faults at once are
found as one for each of these. The fewest faults that are enough win (`search`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import amounts, coarse, divisors, precision, scales, telling
from refcurv.judge.diagnosis.choosing import GOLD, choose, soft
from refcurv.judge.diagnosis.compared import collected, sketched
from refcurv.judge.diagnosis.deciding import labels_of, stages
from refcurv.judge.diagnosis.fits import fitted
from refcurv.judge.diagnosis.ladders import ladder
from refcurv.judge.diagnosis.likely import likely
from refcurv.judge.diagnosis.looking import look, ours
from refcurv.judge.diagnosis.others import Index, diagonals
from refcurv.judge.diagnosis.placed import placed
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.relabelled import relabelled
from refcurv.judge.diagnosis.replayed import averaged
from refcurv.judge.diagnosis.search import (
    FEW,
    PLAIN,
    SAMPLE,
    SHARPER,
    Chosen,
    Idea,
    Side,
    rest,
    spread,
)
from refcurv.judge.diagnosis.seen import see, states
from refcurv.judge.diagnosis.simulated import sharpened
from refcurv.judge.diagnosis.unknown import remainder
from refcurv.judge.diagnosis.variants import combined
from refcurv.judge.diagnosis.weighted import leave_lone, weigh, weighs
from refcurv.judge.diagnosis.work import at_once, is_large, linear
from refcurv.judge.draws import nearer, unlike
from refcurv.judge.verdict import LEFT_OUT, PASS, Cause, Comparison

ROUNDS = 4
"""How many groups of layers with faults of their own are looked for."""


def diagnose(
    case: Case,
    findings: Sequence[Comparison],
    done: Callable[[], None] = lambda: None,
) -> tuple[tuple[Cause, ...], tuple[str, ...], list[Comparison]]:
    """(causes, hypotheses excluded, the findings with their causes).

    Args: done, called once for each layer that was read again.

    Proof: tests/test_injected.py::test_an_injected_fault_has_its_name
    """
    if telling.settled(findings):
        return (), (), list(findings)
    gauged = {f.layer for f in findings if f.verdict == LEFT_OUT and f.fault == "B8"}
    A = Side("A", gauged=gauged)
    found = {"A": A, "G": Side("G", gauged=gauged, inputs=A)}
    index = Index(case)
    _prepare(case, found, index, done)
    if all(f.verdict in (PASS, LEFT_OUT) for f in findings):  # then only other labels count
        found["G"].passed = True
        _search(case, found["G"], found, index)
        causes = tuple(telling.forms(case, found))
        return causes, (), telling.told(case, findings, causes)
    if not any(side.unexplained() for side in found.values()):
        coarse.settle(case, found)  # where nothing but rounding is there, the search is over
    for side in found.values():
        _search(case, side, found, index)
        leave_lone(side)
    coarse.settle(case, found)
    _agree(found)
    for side in found.values():
        seen = [one for layer in case.matched if (one := telling.scale(case, found, layer))]
        _by_counts(case, side, found, index, seen)
        _by_weights(case, side, found, index, seen)
    _as_drawn(case, found)
    causes = telling.causes(case, found, findings)
    return causes, tuple(telling.excluded(found)), telling.told(case, findings, causes)


def _agree(found: Mapping[str, Side]) -> None:
    """What G's setting says of A, where both have one: rows that no fault of their own makes."""
    for k, one in enumerate(found["A"].chosen):
        for two in found["G"].chosen:
            shared = {*one.left} & {*two.left}
            if one.idea.setting and two.idea.setting and 2 * len(shared) >= len(one.left):
                both = combined(one.idea.setting, two.idea.setting)
                if both and {*both.faults} < {*one.faults, *two.faults}:
                    idea = replace(one.idea, faults=both.faults)
                    found["A"].chosen[k] = replace(one, idea=idea, alike=())


def remember(case: Case, layer: str) -> None:
    """Find out, of a layer that is in memory, what does not need all of it later."""
    case.counts(layer)
    states(case, layer)
    ours(case, layer)
    case.once(("diagonals", layer), partial(diagonals, case, layer))
    ladder(case, layer, "G", case.counts(layer).theirs["G"])
    for side in see(case, layer) if is_large(case) else ():
        precision.short_sums(case, layer, side)
    if is_large(case) and case.model is not None and case.corpus is not None:
        sketched(case, layer)


def _prepare(case: Case, found: Mapping[str, Side], index: Index, done: Callable[[], None]) -> None:
    """What no fault leaves, in every layer."""
    for layer in case.matched:
        n_G = case.counts(layer).theirs["G"]
        for side, state in states(case, layer).items():
            if state.filled and state.finite:
                steps = ladder(case, layer, side, n_G)
                found[side].ladders[layer] = sharpened(case, layer, side, steps)
        for side, left in ours(case, layer).items():
            found[side].add(PLAIN, layer, left)
        done()


def _search(case: Case, side: Side, found: Mapping[str, Side], index: Index) -> None:
    """Choose hypotheses for a side until every layer is explained, or nothing explains more."""
    other = found["A" if side.side == "G" else "G"]
    for _ in range(ROUNDS):
        known = {layer: other.of(layer)[0] for layer in side.ladders}
        layers = side.open()
        scaled = [x for x in _scaled(side) if x not in layers]
        if side.side == "G":  # what explains A may explain a factor of G
            layers += [x for x in scaled if _changes_scale(known[x])]
        if not layers:
            return
        sample = _first(side, layers, FEW if is_large(case) else SAMPLE)
        look(case, sample, found, index, sides=side.side)
        chosen = fitted(case, found, side, choose(case, side, found, sample, known), known)
        drawing = chosen is not None and (soft(side, sample) or _by_drawing(case, side, chosen))
        if chosen is None or (drawing and not _supported(case, side, chosen, sample, known)):
            return
        more = list(rest(layers, side.table[chosen.idea]))
        _verify(case, side.side, found, index, chosen.idea, more)
        every = {
            x: side.table[chosen.idea][x]
            for x in layers
            if side.explains(chosen.idea, x, side.free(chosen.idea, x, known[x]))
        }
        if 2 * len(every) > len(layers):
            most = max(left.error for left in every.values())
            close = [x for x in layers if x not in every and side.follows(chosen.idea, x, most)]
            every |= {x: side.table[chosen.idea][x] for x in close}
        side.chosen.append(replace(chosen, left=every))
        more = [x for x in _scaled(side) if _changes_scale(chosen.idea)]
        _verify(case, side.side, found, index, chosen.idea, more)
        every |= {
            x: side.table[chosen.idea][x] for x in more if side.explains(chosen.idea, x, True)
        }
        side.chosen[-1] = replace(chosen, left=every)
        if chosen.idea.setting is not None:
            _take_over(case, side, found, index)


def _take_over(case: Case, side: Side, found: Mapping[str, Side], index: Index) -> None:
    """Leave out what the last choice explains too, and as well: the fewest faults are enough.

    Proof: tests/test_judge_network.py::test_what_a_later_fault_explains_as_well_is_no_other
    """
    *before, last = side.chosen
    kept = []
    for one in before:
        _verify(
            case, side.side, found, index, last.idea, list(rest(one.left, side.table[last.idea]))
        )
        left = {x: y for x in one.left if (y := side.table[last.idea].get(x)) is not None}
        if len(left) == len(one.left) and all(
            side.explains(last.idea, x)
            and side.rank(x, y) <= side.rank(x, one.left[x])
            and side.whole(x, y) >= side.whole(x, one.left[x])
            for x, y in left.items()
        ):
            last = replace(last, left={**left, **last.left})
        else:
            kept.append(one)
    side.chosen[:] = [*kept, last]


def _first(side: Side, layers: Sequence[str], most: int) -> list[str]:
    """So many of these layers: those that nothing explains, then others, in the file's order."""
    worst = {*spread([x for x in side.unexplained() if x in layers], most)}
    others = spread([x for x in layers if x not in worst], max(most - len(worst), 2))
    some = {*worst, *others} if len(worst) < most else worst
    return [x for x in layers if x in some]


def _changes_scale(idea: Idea) -> bool:
    """May it leave the form of a layer as it is, and a factor or a count?"""
    return idea.setting is not None or "B40" in idea.faults or weighs(idea)


def _supported(
    case: Case, side: Side, chosen: Chosen, layers: Sequence[str], known: Mapping[str, Idea]
) -> bool:
    """Is theirs nearer to what was chosen than any honest dump comes to theirs?

    Labels are the same for all layers. So other labels explain all of them, or none. Where no
    honest dump was drawn, theirs must be what was chosen to the digits of float32: a hypothesis
    that is fitted to noise takes much of it away. What A has shown needs no support.
    """
    if side.side == "A" or all(side.free(chosen.idea, x, known[x]) for x in chosen.left):
        return True
    setting = chosen.idea.setting
    if setting is not None and labels_of(setting).faults and len(chosen.left) < len(layers):
        return False
    finest = {x: side.ladders[x].steps[0][1] for x in chosen.left}
    if case.drawn is None:
        bare = replace(case, arithmetic=Arithmetic())
        single = {x: bare.budget(x, "float32") for x in finest}
        enough = {x: single[x] if setting is None else max(single[x], finest[x]) for x in finest}
        return all(left.error <= enough[x] for x, left in chosen.left.items())
    near = {x: SHARPER * max(left.error, finest[x]) for x, left in chosen.left.items()}
    if unlike(case, near) or _nearest(case, chosen, finest):
        return True
    sized = all(side.sizes(chosen.idea, x) for x in chosen.left)  # no honest dump has that factor
    return sized and setting is not None and likely(case, setting, list(chosen.left))


def _by_drawing(case: Case, side: Side, chosen: Chosen) -> bool:
    """Does drawing alone explain what it leaves, of some layers and no others?"""
    every = all(side.rank(x, y) >= side.ladders[x].by_drawing for x, y in chosen.left.items())
    return every and side.side == "G" and case.drawn is not None


def _nearest(case: Case, chosen: Chosen, finest: Mapping[str, float]) -> bool:
    """Is theirs nearer to labels that nobody draws than honest dumps are, for all its rounding?"""
    setting = chosen.idea.setting
    if setting is None or setting.labels not in GOLD:
        return False
    made = collected(case, list(chosen.left), [setting], "G")
    Y = {x: of[setting] for x, (_, of) in made.items() if setting in of}
    return nearer(case, Y, {x: chosen.left[x].error + finest[x] for x in Y})


def _scaled(side: Side) -> list[str]:
    """Layers whose form no fault was needed for, but that have a factor or another count."""
    out = []
    for layer, steps in side.ladders.items():
        idea, left = side.of(layer)
        within = side.rank(layer, left) <= steps.by_drawing and not side.drawn(layer)
        if idea == PLAIN and within:
            out += [] if side.whole(layer, left) else [layer]
    return out


def _by_counts(
    case: Case, side: Side, found: Mapping[str, Side], index: Index, seen: Sequence[divisors.Scale]
) -> None:
    """Other rows that change a factor or a count alone, where it is nothing simpler."""
    layers = _scaled(side)
    if not layers or case.model is None or case.corpus is None:
        return
    named = scales.explain(seen, divisors.Divisors.of(case)) + scales.counted(seen)
    if all(one.fault not in (None, "B82") for one in named):
        return
    alone = side.side == "G" and not any(one.idea.setting for one in found["A"].chosen)
    if alone:  # A has our rows
        if all(side.rank(x, side.plain(x)) >= side.ladders[x].by_drawing for x in layers):
            return  # drawing explains any other rows of G alone as well
    sample = spread(linear(layers), FEW if is_large(case) else SAMPLE)
    if not sample:
        return
    plain = [*next(stages(case, side.side)), *(placed(case, sample) if side.side == "A" else ())]
    recompute(case, found, sample, plain, sampled=False)
    ideas = [i for i in side.table if i.setting and all(_whole(side, i, x) for x in sample)]
    if alone:  # one count divides both
        ideas = [i for i in ideas if i.setting and i.setting.count == "rows"]
    worst = {i: max(side.table[i][x].error for x in sample) for i in ideas}
    if ideas:
        best = min(ideas, key=lambda idea: (len(idea.faults), worst[idea]))
        _take(case, side, found, index, best, layers, sample)


def _by_weights(
    case: Case, side: Side, found: Mapping[str, Side], index: Index, seen: Sequence[divisors.Scale]
) -> None:
    """Batches or sequences that weigh otherwise, where drawing hides all but the factor of it.

    So does rounding, where sequences have about as many labels: then the factor is no certain one.

    Proof: tests/test_judge_weights.py::test_a_mean_over_a_sequence_is_told_by_its_factor_alone
    """
    hidden = {one.layer for one in seen if one.drawn and not one.alone}
    for one in scales.explain(seen, divisors.Divisors.of(case)):
        hidden |= set() if one.certain else {*one.layers}
    layers = [x for x in _scaled(side) if x in hidden]
    sample = spread(linear(layers))
    if side.side == "A" or not sample:
        return
    weigh(case, found, side.side, sample, decaying=False)
    every = [i for i in side.table if i.faults in (("B2",), ("B3",)) and not i.setting]
    fits = [idea for idea in every if all(_whole(side, idea, x) for x in sample)]
    case.known["weights"] = {
        id: sum(i.faults == (id,) for i in fits) / sum(i.faults == (id,) for i in every)
        for id in dict.fromkeys(i.faults[0] for i in fits)
    }
    named = {one.fault for one in scales.explain(seen, divisors.Divisors.of(case))}
    ideas = [idea for idea in fits if named == {*idea.faults}]
    if ideas:
        best = min(ideas, key=lambda idea: sum(side.table[idea][x].error for x in sample))
        _take(case, side, found, index, best, layers, sample)


def _as_drawn(case: Case, found: Mapping[str, Side]) -> None:
    """What labels that theirs drew hide of G: amounts, averages, weights, labels; A is ours."""
    side = found["G"]
    layers = [x for x, steps in side.ladders.items() if steps.drawn > 0]
    if side.chosen or found["A"].chosen or case.drawn is None or is_large(case):
        return
    if found["A"].open() or all(side.drawn(x) for x in layers):
        return
    sample = spread(linear(layers))
    if not sample:
        return
    chosen = amounts.drawn(case, found, sample) or averaged(case, found, layers, sample)
    chosen = chosen or relabelled(case, found, sample)
    if chosen is not None:
        side.chosen.append(chosen)


def _take(
    case: Case,
    side: Side,
    found: Mapping[str, Side],
    index: Index,
    idea: Idea,
    layers: Sequence[str],
    sample: Sequence[str],
) -> None:
    """Choose it for those of these layers of which it leaves nothing; it was tried on a sample."""
    _verify(case, side.side, found, index, idea, list(rest(layers, sample)))
    left = {x: side.table[idea][x] for x in layers if _whole(side, idea, x)}
    side.chosen.append(Chosen(idea, left))


def _whole(side: Side, idea: Idea, layer: str) -> bool:
    left = side.table[idea].get(layer)
    return left is not None and side.explains(idea, layer, free=True) and side.whole(layer, left)


def _verify(
    case: Case,
    side: str,
    found: Mapping[str, Side],
    index: Index,
    idea: Idea,
    layers: Sequence[str],
) -> None:
    """Try what was chosen on further layers."""
    if weighs(idea):
        weigh(case, found, side, layers, [idea.name])
    elif idea.setting is None and "B19" in idea.faults:
        remainder(case, found, layers, idea)
    elif idea.setting is None:
        look(case, layers, found, index, idea.faults or None)
    else:
        step = max(1, len(layers)) if is_large(case) else at_once(case)
        for begin in range(0, len(layers), step):
            some = layers[begin : begin + step]
            recompute(case, found, some, [idea.setting], sampled=False)
