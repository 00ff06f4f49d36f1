"""Is theirs one of the dumps that a setting makes, whose labels are drawn anew for each?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.seen import see
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.honest import SEED
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher

DUMPS: Final = 99
"""Dumps of a setting.  Theirs, if it is one, is the furthest of all with odds of 1 in 100."""


def likely(case: Case, setting: Setting, layers: Sequence[str]) -> bool:
    """Is theirs no further from the mean than the furthest of DUMPS dumps of the setting?

    Definition
        The dumps and theirs are taken as one set, in which the order says nothing. Each G has two
        numbers: log tr G, and how far G/tr G is from the mean of all of these. How far a dump is,
        is the largest deviation of any of its numbers, in standard deviations of the set.

    Proof: tests/test_judge_loss.py::test_a_dump_is_likely_under_what_made_it
    """
    theirs = {x: see(case, x)["G"].T for x in layers}
    each: dict[str, list[Array]] = {x: [T] for x, T in theirs.items()}
    for other in redrawn(case, DUMPS):
        for _, of in moments(other, [setting], layers):
            for layer in layers:
                each[layer].append(of[layer].G)
    far = np.max([_far(np.stack(some)) for some in each.values()], axis=0)
    return bool(far[0] <= far[1:].max())


def redrawn(case: Case, dumps: int) -> Iterator[Case]:
    """The case with labels drawn anew, as often as theirs draws each, so many times.

    Also where the reference takes the mean over labels: theirs does not.
    """
    signed = case.dump.declared.get("fisher") == Fisher.SIGNED
    fisher = Fisher.SIGNED if signed else Fisher.SAMPLED
    own, draws = replace(case.reference, fisher=fisher), case.draws()
    for k in range(dumps):
        yield replace(case, reference=replace(own, seed=SEED + k, draws=draws))


def _far(G_KOO: Array) -> Array:
    """The larger deviation of the two numbers of each matrix, (K,)."""
    trace_K = np.trace(G_KOO, axis1=1, axis2=2)
    form_KOO = G_KOO / trace_K[:, None, None]
    apart_K = norm((form_KOO - form_KOO.mean(axis=0)).reshape(len(G_KOO), -1), axis=1)
    each = np.log(trace_K), np.log(np.maximum(apart_K, 1e-300))
    off = [(x - x.mean()) / max(float(x.std()), 1e-12) for x in each]
    return np.asarray(np.maximum(abs(off[0]), off[1]))
