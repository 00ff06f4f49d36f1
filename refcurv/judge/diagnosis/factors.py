"""Which factors of G drawing allows: intervals, from honest dumps.

Theirs is c times a dump whose labels were drawn. How much the traces of such dumps vary, honest
dumps show (`judge.draws`); a factor of the loss is the same in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.search import PLAIN, Side
from refcurv.judge.draws import traces
from refcurv.law.checks import Array

PILOT: Final = 0.25
"""Share of the honest dumps that say which layers vary least.  Chosen: the others are compared."""


class Factor(NamedTuple):
    """c lies within low and high, as |c' − x| ≤ tol x says of each x between them.

    Fields: c, tol; shared, may one factor explain all layers?
    """

    c: float
    tol: float
    shared: bool

    @classmethod
    def between(cls, low: float, high: float, shared: bool) -> Factor:
        """The same in these two numbers; 0 < low ≤ high."""
        c = 2 / (1 / low + 1 / high)
        return cls(c, c * (1 / low - 1 / high) / 2, shared)


def factors(case: Case, side: Side) -> Mapping[str, Factor]:
    """The factor of G of each layer whose labels were drawn, and that no fault explains.

    Definition
        t is log tr G' − log tr G by layer, z = w·(t − m) with the mean m and the weights w of the
        least variance that a pilot shows. log c lies between z less the largest and z less the
        smallest z of K other honest dumps: theirs over c is one more of them, so that this fails
        with odds of 2/(K + 1), whatever the tails are. What rounding may do is added. No factor is
        shared if theirs, without z, is further off in some layer than all of them: odds 1/(K + 1).
        Then each layer has an interval of its own.
    """
    layers = [x for x in side.ladders if _drawn(side, x)]
    theirs = np.log([side.plain(x).trace for x in layers])
    slack = np.array([2 * side.ladders[x].steps[0][1] for x in layers])
    columns = traces(case, layers)
    if not layers or not np.isfinite(theirs).all():
        return {}
    if columns is None:
        return _by_deviation(side, layers, theirs, slack)
    return dict(zip(layers, intervals(theirs, columns, slack), strict=True))


def _drawn(side: Side, layer: str) -> bool:
    """Is G of this layer another draw, for all that its form says?"""
    idea, left = side.of(layer)
    steps = side.ladders[layer]
    by_drawing = side.rank(layer, left) <= steps.by_drawing and left.error >= steps.same
    return idea == PLAIN and steps.drawn > 0 and by_drawing and left.trace > 0


def intervals(theirs: Array, honest: Array, slack: Array) -> list[Factor]:
    """`factors` from t of theirs (L,), of honest dumps (N, L), and what rounding may do (L,).

    Proof: tests/test_judge_factors.py::test_the_interval_holds_as_often_as_is_stated
    """
    count = round(PILOT * len(honest))
    pilot, others = honest[:count], honest[count:]
    mean, spread = pilot.mean(axis=0), np.cov(pilot, rowvar=False).reshape(len(slack), -1)
    ridge = slack**2 + 0.01 * spread.trace() / len(slack)  # few dumps know no small variance
    w = np.linalg.solve(spread + np.diag(ridge), np.ones(len(slack)))
    w /= w.sum()
    z, each, more = float((theirs - mean) @ w), (others - mean) @ w, float(abs(w) @ slack)
    off = abs((others - mean) - each[:, None])
    unit = np.maximum(off.std(axis=0), 1e-12)
    here = np.maximum(abs(theirs - mean - z) - slack - more, 0)
    if (here / unit).max() <= (off / unit).max():
        one = Factor.between(
            math.exp(z - each.max() - more), math.exp(z - each.min() + more), shared=True
        )
        return [one] * len(slack)
    low, high = theirs - others.max(axis=0) - slack, theirs - others.min(axis=0) + slack
    return [Factor.between(x, y, False) for x, y in np.exp(np.stack([low, high], axis=1))]


def _by_deviation(
    side: Side, layers: Sequence[str], theirs: Array, slack: Array
) -> dict[str, Factor]:
    """Where a standard error is all that is known of drawing: what all layers have in common."""
    reach = np.array([side.ladders[x].drawing.trace for x in layers])
    low = np.exp(theirs - slack) / (1 + reach)
    high = np.exp(theirs + slack) / np.maximum(1 - reach, 1e-3)
    if low.max() <= high.min():
        return dict.fromkeys(layers, Factor.between(float(low.max()), float(high.min()), True))
    each = (Factor.between(x, y, False) for x, y in zip(low.tolist(), high.tolist(), strict=True))
    return dict(zip(layers, each, strict=True))
