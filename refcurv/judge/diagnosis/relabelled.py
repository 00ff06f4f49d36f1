"""Labels of another kind, where theirs drew them: dumps of each kind are drawn, and of each factor.

Labels that are shifted, or that stand where none should, change G little in form and much in size.
Drawing hides the form, and then a factor of the loss may look the same. Dumps of both say which of
the two theirs is likelier to be one of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from scipy import special

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import divisors, scales
from refcurv.judge.diagnosis.likely import DUMPS, redrawn
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.search import ROUNDING, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import see
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, moments, settings
from refcurv.judge.diagnosis.variants.labels import DRAWN
from refcurv.judge.diagnosis.work import WHOLE, cost, extent, few_positions
from refcurv.judge.draws import confirmed
from refcurv.law.checks import Array

NEAR: Final = 0.7
"""How far the mean of log sizes may be from that of a kind of labels.  Chosen: a factor of 2."""

TRIED: Final = 6
"""Kinds of labels of which dumps are drawn, at most: the nearest.  Chosen: some seconds."""

SURE: Final = 0.99
"""Of dumps of a hypothesis, the share that is no further from their mean than theirs may be."""


class Dumps(NamedTuple):
    """The numbers of dumps of one hypothesis as Student's t: mean, scale matrix, freedom."""

    mean: Array
    scale: Array
    freedom: int

    @classmethod
    def of(cls, each_KM: Array) -> Dumps:
        """From K dumps of M numbers, as a further dump is then distributed if they are normal."""
        K, M = each_KM.shape
        covariance = np.cov(each_KM, rowvar=False).reshape(M, M)
        covariance += np.diag(1e-6 + 0.01 * np.diag(covariance))  # few know no small variance
        freedom = K - M
        scale = covariance * (1 + 1 / K) * (K - 1) / freedom
        return cls(each_KM.mean(axis=0), scale, freedom)

    def density(self, theirs: Array) -> float:
        """At theirs; 0 where so few of the dumps are further that theirs is none of them."""
        M, n, z = len(self.mean), self.freedom, theirs - self.mean
        far = float(z @ np.linalg.solve(self.scale, z))
        if far > M * special.fdtri(M, n, SURE):
            return 0.0
        log = special.gammaln((n + M) / 2) - special.gammaln(n / 2) - M / 2 * math.log(n * math.pi)
        log -= np.linalg.slogdet(self.scale)[1] / 2 + (n + M) / 2 * math.log1p(far / n)
        return math.exp(log)


def relabelled(case: Case, found: Mapping[str, Side], layers: Sequence[str]) -> Chosen | None:
    """The kind of labels whose dumps are likeliest at theirs, of these layers; None if a factor is.

    Definition
        A dump has these numbers: log tr G of each layer over that of ours, and the mean of log |G/
        tr G − X/tr X|, X ours. The density of DUMPS dumps of a kind at theirs, times the part that
        the kind is of its fault, is its share. A factor of the loss has the density of honest dumps
        times it. A fault is named if it has `scales.SURE` of all shares.

    Proof: tests/test_judge_weights.py::test_labels_of_another_kind_are_told_from_a_factor
    """
    if extent(case) > few_positions(case) or cost(case) > WHOLE:
        return None
    both = {x: see(case, x)["G"] for x in layers}
    layers = [x for x, one in both.items() if one.T.shape == one.X.shape]
    kinds = _near(case, found["G"], layers) if layers else []
    if not kinds:
        return None
    case.say("dumps with labels of another kind")
    shares = dict(_of_labels(case, kinds, layers))
    best = max(shares, key=lambda one: shares[one])
    total = {fault: 0.0 for one in kinds for fault in one.faults}
    for one, share in shares.items():
        total[one.faults[0]] += share
    for fault, share in _of_factors(case, layers):
        total[fault] = total.get(fault, 0.0) + share
    every, first = sum(total.values()), max(total, key=lambda fault: total[fault])
    if not every or first not in best.faults:
        return None  # `scales` says which factor it is
    return _chosen(case, found, best) if total[first] >= scales.SURE * every else None


def _chosen(case: Case, found: Mapping[str, Side], one: Setting) -> Chosen:
    """It explains all that it leaves by drawing."""
    side, idea = found["G"], Idea(one.faults, one)
    recompute(case, found, list(side.ladders), [one])
    left = side.table.get(idea, {})
    whole = {x: side.ladders[x].whole(y) for x, y in left.items()}
    return Chosen(idea, {x: replace(y, spread=whole[x]) for x, y in left.items()})


def _near(case: Case, side: Side, layers: Sequence[str]) -> list[Setting]:
    """The kinds of labels that are drawn and have about the size of theirs, the nearest first."""
    off: dict[Setting, float] = {}
    for one in settings(case):
        lefts = side.table.get(Idea(one.faults, one), {})
        ratios = [lefts[x].ratio for x in layers if x in lefts]
        rest = replace(one, labels="reference", amount=0.0, where="labelled", pads="blind")
        drawn = one.labels in ("reference", *DRAWN) and rest == REFERENCE and one.faults
        if drawn and ratios and min(ratios) > 0:
            off[one] = abs(float(np.mean(np.log(ratios))))
    return sorted((x for x in off if off[x] <= NEAR), key=lambda x: off[x])[:TRIED]


def _of_labels(
    case: Case, kinds: Sequence[Setting], layers: Sequence[str]
) -> Iterator[tuple[Setting, float]]:
    """Each kind of labels and its share; none that has the dumps of the reference."""
    theirs = _numbers(case, {x: see(case, x)["G"].T for x in layers})
    dumps: dict[Setting, list[Array]] = {one: [] for one in (REFERENCE, *kinds)}
    for other in redrawn(case, DUMPS):
        for one, of in moments(other, [*dumps], layers):
            dumps[one].append(_numbers(case, {x: of[x].G for x in layers}))
    every, ours = [one.faults for one in settings(case)], dumps.pop(REFERENCE)[0]
    for one, each in dumps.items():
        other_than_ours = float(abs(each[0] - ours).max()) > ROUNDING
        share = Dumps.of(np.stack(each)).density(theirs) / every.count(one.faults)
        yield one, share if other_than_ours else 0.0


def _of_factors(case: Case, layers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Each factor of the loss and its share; "" of none at all."""
    theirs = _numbers(case, {x: see(case, x)["G"].T for x in layers})
    each = [
        _numbers(case, {x: some[x][k] for x in layers})
        for some in confirmed(case)
        for k in range(len(some[layers[0]]))
    ]
    honest = Dumps.of(np.stack(each))
    yield "", honest.density(theirs)
    for one in divisors.members(divisors.Divisors.of(case)):
        shift = np.r_[np.full(len(layers), math.log(one.factor)), 0.0]
        yield one.fault, one.share * honest.density(theirs - shift)


def _numbers(case: Case, G: Mapping[str, Array]) -> Array:
    """Of a dump, by layer."""
    out, far = [], 0.0
    for x, one in G.items():
        X = case.means(x)[1]
        trace, own = max(float(one.trace()), 1e-300), float(X.trace())
        out.append(math.log(trace / own))
        far += math.log(max(float(norm(one / trace - X / own)), 1e-300)) / len(G)
    return np.array([*out, far])
