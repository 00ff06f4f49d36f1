"""Rows that were averaged or weighed, beside labels that theirs drew: dumps of each are drawn.

A mean over a batch of rows whose labels are drawn has, but for a factor, the form that all rows
have: only it varies more. So what a dump is, no distance to a mean tells. Dumps of each hypothesis
are drawn as honest ones are, and five numbers say how likely theirs is among these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import divisors, scales, telling
from refcurv.judge.diagnosis.deciding import words
from refcurv.judge.diagnosis.likely import DUMPS, redrawn
from refcurv.judge.diagnosis.search import Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left, fitted
from refcurv.judge.diagnosis.variants import REFERENCE, Parts, Setting, moments, parts
from refcurv.judge.diagnosis.variants.setting import batches
from refcurv.judge.diagnosis.weighted import KEPT, Rule, rules
from refcurv.judge.diagnosis.work import WHOLE, cost, extent, few_positions
from refcurv.judge.draws import apart, confirmed
from refcurv.law.checks import Array

LITTLE: Final = 0.01
"""Of all shares, what is not said.  Chosen."""

NEAR: Final = 0.7
"""How far the mean of log traces may be from that of a hypothesis.  Chosen: a factor of 2."""

TRIED: Final = 48
"""Rules, and means over batches, of which dumps are drawn, at most: those with the nearest traces.
Chosen: some seconds."""

FURTHEST: Final = 15.1
"""Squared standard deviations that a dump of a hypothesis exceeds with odds of 1 in 100: χ² of five
degrees of freedom.  Theirs may be what nobody thought of."""

WEIGHED: Final = ("B2", "B3", "B43")
"""Rules of `weighted` that change G alone, and make it no larger."""

LEAST: Final = (min(divisors.USUAL) - 1, *divisors.USUAL)
"""Powers of 2 that a scale of the loss is at least which doubles later, or halves."""


SELDOM: Final = 0.1
"""Of honest dumps, the share that vary as much as theirs where a factor is all that is asked for.

Chosen: theirs is then compared with dumps of a factor as well."""


class Member(NamedTuple):
    """A hypothesis that theirs may be a dump of.

    Fields: fault; note; share, its part of all that its fault may be, where small batches are
    likelier, times the density of its dumps at theirs; left, layer → (error, ratio) of theirs and
    its mean, empty of a factor.
    """

    fault: str
    note: str
    share: float
    left: Mapping[str, tuple[float, float]]


def averaged(
    case: Case, found: Mapping[str, Side], layers: Sequence[str], sample: Sequence[str]
) -> Chosen | None:
    """What theirs is a dump of, where a factor seldom or never explains how much theirs varies.

    A fault is named if it has SURE of all shares; else those that have more than LITTLE are said.

    Args: layers, those whose labels were drawn; sample, those that are compared.

    Proof: tests/test_judge_weights.py::test_what_varies_as_a_factor_seldom_does_may_be_a_mean
    """
    side = found["G"]
    seen = [one for layer in case.matched if (one := telling.scale(case, found, layer))]
    counts = divisors.Divisors.of(case)
    told = any(x.fault or x.alike for x in scales.explain(seen, counts))
    told &= not any(one.alone for one in seen)
    often = varied(case, sample)
    if told and often > SELDOM:
        return None  # a factor explains it, and `scales` says which
    members = replayed(case, sample, counts if told else None)
    share: dict[str, float] = {}
    for member in members:
        share[member.fault] = share.get(member.fault, 0.0) + member.share
    total = sum(share.values())
    if not total > 0:
        return None
    first, *others = sorted(share, key=lambda fault: -share[fault])
    sure = share[first] >= scales.SURE * total
    best = max((x for x in members if x.fault == first), key=lambda x: x.share)
    if not best.left:
        return None  # it is a factor
    most = max(error for error, _ in best.left.values())
    ids = (first, *(x for x in others if share[x] > LITTLE * total))
    note = "as if rows were averaged or weighed; which fault it is, is unknown: "
    note += f"{', '.join(ids)} may give this"
    if often <= SELDOM:
        fewer = "nearly all honest dumps" if often else "any honest dump"
        note = f"it varies more than {fewer}, {note}"
    note, alike = (best.note, ()) if sure else (note, ids)
    if not sure and any(one.fault in ids for one in scales.explain(seen, counts)):
        return None  # its factor says which
    lefts = {x: Left(*best.left.get(x, (most, 1.0)), note, alike) for x in layers}
    lefts = {x: replace(one, spread=side.ladders[x].whole(one)) for x, one in lefts.items()}
    return Chosen(Idea((first,) if sure else (), None, note), lefts)


def varied(case: Case, layers: Sequence[str]) -> float:
    """The share of honest dumps whose form varies as much as that of theirs; 0: no factor does it.

    Definition
        s(G) is the mean over layers of log |G − r X|/|r X|, X ours. An honest dump, times a factor,
        is the furthest of CONFIRMED + 1 with odds of 1/(CONFIRMED + 1).

    Proof: tests/test_judge_weights.py::test_a_mean_over_a_batch_varies_more_than_what_is_honest
    """
    total: Array = np.zeros(())
    dumps: dict[str, list[Array]] = {x: [_theirs(case, x)[None]] for x in layers}
    for some in confirmed(case):
        for x in layers:
            dumps[x].append(some[x])
    for x in layers:
        off = apart(np.concatenate(dumps[x]), case.means(x)[1])
        total = total + np.log(np.maximum(off, 1e-12))
    return float((total[0] <= total[1:]).mean())


@dataclass(frozen=True, slots=True)
class Beside:
    """What dumps are compared with, by layer: corners of theirs, of ours, and of one sequence.

    Fields: T; X; L, what the last sequence that has labels adds to X: a batch that is cut short
    weighs most; at, the corner; parts, of each sequence.
    """

    T: Mapping[str, Array]
    X: Mapping[str, Array]
    L: Mapping[str, Array]
    at: Mapping[str, Array]
    parts: Parts

    @classmethod
    def of(cls, case: Case, layers: Sequence[str]) -> Beside:
        """Of these layers."""
        found = parts(case, layers, REFERENCE)
        at = {x: found.layers[x].at_G for x in layers}
        last = int(np.flatnonzero(found.labels)[-1])
        L = {x: found.whole(x, "G", KEPT)[last] for x in layers}
        T = {x: _corner(_theirs(case, x), at[x]) for x in layers}
        return cls(T, {x: _corner(case.means(x)[1], at[x]) for x in layers}, L, at, found)


def _corner(G: Array, at: Array) -> Array:
    return np.asarray(G[np.ix_(at, at)])


def replayed(
    case: Case, layers: Sequence[str], counts: divisors.Divisors | None = None
) -> list[Member]:
    """Means over batches, and weights of sequences, of which theirs may be a dump in these layers.

    With counts also the factors of the loss.

    Proof: tests/test_judge_weights.py::test_a_mean_over_a_batch_is_told_by_its_dumps
    """
    if extent(case) > few_positions(case) or cost(case) > WHOLE:
        return []  # a sample holds no batch as a whole
    case.say("dumps whose rows are averaged or weighed")
    beside = Beside.of(case, layers)
    of_factors = _factored(case, beside, counts) if counts else ()
    return [*_averaged(case, beside), *_weighed(case, beside), *of_factors]


def _theirs(case: Case, layer: str) -> Array:
    G = case.theirs(layer).G
    assert G is not None
    return G


def _averaged(case: Case, beside: Beside) -> Iterator[Member]:
    """B44."""
    layers, every = [*beside.T], [Setting(pooling_G="batch and rows", batch=1), *batches(case)]
    made: dict[Setting, dict[str, Array]] = {
        one: {x: _corner(of[x].G, beside.at[x]) for x in layers}
        for one, of in moments(case, every, layers)
        if {*of} == {*layers}
    }
    settings = list(made)
    wanted = [settings[k] for k in _nearest(beside.T, [*made.values()])]
    dumps: dict[Setting, list[dict[str, Array]]] = {one: [] for one in wanted}
    for other in redrawn(case, DUMPS if wanted else 0):
        for one, of in moments(other, wanted, layers):
            dumps[one].append({x: _corner(of[x].G, beside.at[x]) for x in layers})
    total = sum(1 / one.batch for one in every)
    for one in wanted:
        share = _density(beside, dumps[one]) / one.batch / total
        yield Member("B44", words(one), share, _lefts(beside, made[one]))


def _factored(case: Case, beside: Beside, counts: divisors.Divisors) -> Iterator[Member]:
    """Factors of the loss: honest dumps, of which the trace alone is another."""
    honest = [
        _numbers(beside, {x: _corner(some[x][k], beside.at[x]) for x in beside.T})
        for some in confirmed(case)
        for k in range(len(next(iter(some.values()))))
    ]
    theirs, shift = _numbers(beside, beside.T), np.eye(len(honest[0]))[0]
    for one in divisors.members(counts):
        share = one.share * _at(theirs - math.log(one.factor) * shift, np.stack(honest))
        yield Member(one.fault, one.words, share, {})


def _weighed(case: Case, beside: Beside) -> Iterator[Member]:
    """B2, B3 and B43; B11, of a scale that changes."""
    layers, known = [*beside.T], list(rules(beside.parts, "G"))
    every = [one for one in known if one.faults[0] in WEIGHED]
    every += [
        replace(one, name=f"{one.name}, and is 2^{k} at least", weight=one.weight * 4.0**k)
        for one in known
        for k in (LEAST if one.faults == ("B11",) else ())
    ]
    rows = {x: case.counts(x).ours["A"] for x in layers}

    def made(of: Parts, some: Iterable[Rule]) -> list[dict[str, Array]]:
        each = {x: of.whole(x, "G", KEPT) / rows[x] for x in layers}
        return [{x: np.tensordot(one.weight, each[x], 1) for x in layers} for one in some]

    means = made(beside.parts, every)
    wanted = _nearest(beside.T, means)
    some = [every[k] for k in wanted]
    dumps = [
        made(parts(other, layers, REFERENCE), some) for other in redrawn(case, DUMPS if some else 0)
    ]
    total: dict[str, float] = {}
    for one in every:
        total[one.faults[0]] = total.get(one.faults[0], 0.0) + 1 / one.size
    for k, one, of in zip(wanted, some, zip(*dumps, strict=True), strict=True):
        share = _density(beside, of) / one.size / total[one.faults[0]]
        share *= 0.5 if one.faults == ("B43",) else 1.0  # as often it is the same for all batches
        yield Member(one.faults[0], one.name, share, _lefts(beside, means[k]))


def _lefts(beside: Beside, Y: Mapping[str, Array]) -> dict[str, tuple[float, float]]:
    return {x: fitted(T, Y[x]) for x, T in beside.T.items()}


def _density(beside: Beside, dumps: Sequence[Mapping[str, Array]]) -> float:
    """The density of dumps at theirs."""
    theirs, *others = (_numbers(beside, one) for one in (beside.T, *dumps))
    return _at(theirs, np.stack(others))


def _at(theirs: Array, others: Array) -> float:
    """The density of dumps, as if their numbers were normal, at theirs; 0 beyond FURTHEST."""
    covariance = np.cov(others, rowvar=False)
    covariance += np.diag(1e-4 + 0.01 * np.diag(covariance))  # few dumps know no small variance
    z = theirs - others.mean(axis=0)
    far = float(z @ np.linalg.solve(covariance, z))
    return math.exp(-far / 2) / math.sqrt(np.linalg.det(covariance)) if far <= FURTHEST else 0.0


def _numbers(beside: Beside, G: Mapping[str, Array]) -> Array:
    """Means over layers of logarithms, and how unlike the first is between layers.

    Of the trace; of how far the form is from ours, and from what one sequence adds; of its norm.
    """
    rows = []
    for x, one in G.items():
        X, L = beside.X[x], beside.L[x]
        trace = max(float(one.trace()), 1e-300)
        form, ours = one / trace, X / X.trace()
        last = L / (float(L.trace()) or 1.0)
        sizes = [norm(form - ours), norm(form - last), norm(form)]
        rows.append(np.log([trace / float(X.trace()), *np.maximum(sizes, 1e-300)]))
    mean, between = np.mean(rows, axis=0), np.std([one[0] for one in rows])
    return np.array([*mean, math.log(max(float(between), 1e-6))])


def _nearest(T: Mapping[str, Array], means: Sequence[Mapping[str, Array]]) -> list[int]:
    """The places of those whose traces are near those of theirs, on the mean of logarithms."""
    far = []
    for k, Y in enumerate(means):
        pairs = [(float(T[x].trace()), float(Y[x].trace())) for x in T]
        if all(min(pair) > 0 for pair in pairs):
            far.append((abs(float(np.mean([np.log(t / y) for t, y in pairs]))), k))
    return sorted(k for off, k in sorted(far)[:TRIED] if off <= NEAR)
