"""Which token theirs takes for padding in attention alone: read off A, for no count says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.seen import fitted, see
from refcurv.judge.diagnosis.variants import Setting, inputs
from refcurv.judge.diagnosis.variants.collecting import WORK
from refcurv.judge.diagnosis.variants.positions import positions
from refcurv.judge.diagnosis.variants.texts import HIDDEN
from refcurv.judge.diagnosis.work import cost, few_positions, is_large

BEST = 2
"""Tokens that are tried further.  Chosen: one comes nearest, but for what other faults leave."""


def hidden(case: Case, side: Side, layers: Sequence[str]) -> Iterator[Setting]:
    """The tokens without which A comes nearest to theirs, in the layer that is then furthest off.

    As many of the most frequent ones are tried as WORK allows.

    Proof: tests/test_judge_network.py::test_a_token_that_is_not_seen_has_its_name
    """
    assert case.model is not None and case.corpus is not None
    if side.side == "G" or case.corpus.images is not None or is_large(case):
        return
    at = positions(case.corpus, case.model.config, case.reference.rows)
    token, count = np.unique(at.inputs[at.real_BT], return_counts=True)
    usual = token[np.argsort(-count, kind="stable")][: max(1, int(WORK / cost(case)))]
    wanted = [Setting(text=HIDDEN, token=int(v)) for v in usual]
    far: dict[Setting, float] = {}
    for setting, of in inputs(case, wanted, layers, few_positions(case)):
        theirs = {x: see(case, x)["A"].T for x in of}
        left = [fitted(theirs[x], A)[0] for x, (A, _) in of.items() if theirs[x].shape == A.shape]
        far[setting] = max(left, default=np.inf)
    yield from sorted(far, key=lambda one: far[one])[:BEST]
