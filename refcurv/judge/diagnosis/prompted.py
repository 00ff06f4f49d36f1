"""Which tokens theirs puts into each sequence: the count says how many, and A which they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.search import SHARPER, Side
from refcurv.judge.diagnosis.seen import fitted, see
from refcurv.judge.diagnosis.variants import Setting, inputs
from refcurv.judge.diagnosis.variants.collecting import WORK
from refcurv.judge.diagnosis.variants.positions import Positions, positions
from refcurv.judge.diagnosis.variants.setting import theirs_n
from refcurv.judge.diagnosis.variants.texts import PROMPTS, prompt, rows_left
from refcurv.judge.diagnosis.work import cost, few_positions, is_large
from refcurv.law.conventions import NO_LABEL

LONGEST = 6
"""Tokens of a prompt, at most.  Chosen: each takes KEPT forwards for each token that is tried."""

TRIED = 4
"""Lengths and places that are tried, at most, where the count allows several."""

KEPT = 8
"""Beginnings of a prompt that are tried further.  Chosen: of one that is right but for its end A
comes near, and not always nearest."""


def prompted(case: Case, side: Side, layers: Sequence[str]) -> Iterator[Setting]:
    """The prompt with which A comes nearest to theirs, of those that have as many rows as theirs.

    Definition
        far is the sum over layers of what is left of A. In a causal model the first rows of a
        prompt are of its first tokens alone. So it is made longer token by token: of all that go
        on from the KEPT nearest so far the KEPT nearest stay.

    Proof: tests/test_judge_places.py::test_a_prompt_of_a_template_has_its_name
    """
    if side.side == "G" or case.corpus is None or case.corpus.images is not None or is_large(case):
        return
    assert case.model is not None
    config, n = case.model.config, theirs_n(case)
    at = positions(case.corpus, config, case.reference.rows)
    if n is None or n == at.keep_BT.sum():
        return
    room = (config.learned_positions or np.inf) - at.inputs.shape[1]
    fitting = [
        (name, size)
        for size in range(1, LONGEST + 1)
        for name, how in PROMPTS.items()
        if how["labelled"] and (how["end"] != "longer" or size <= room)
        and rows_left(at, prompt(name, [0] * size), NO_LABEL, config, case.reference.rows) == n
    ]  # fmt: skip
    usual, plain = _usual(case, at), sum(side.plain(x).error for x in layers)
    far, best = plain, None
    for name, size in fitting[:TRIED] if len(usual) > 1 else ():
        one = _nearest(case, layers, name, size, usual)
        if one[0] < far:
            far, best = one
        if SHARPER * far < plain:
            break
    if best is not None:
        yield best


def _usual(case: Case, at: Positions) -> list[int]:
    """The most frequent tokens, as many as WORK allows for each position of a prompt."""
    assert case.model is not None
    count = np.bincount(at.inputs[at.real_BT], minlength=case.model.config.vocabulary)
    most = int(WORK / cost(case) / KEPT)
    return [int(v) for v in np.argsort(-count, kind="stable")[:most]]


def _nearest(
    case: Case, layers: Sequence[str], name: str, size: int, usual: Sequence[int]
) -> tuple[float, Setting]:
    """How far A is from theirs with the nearest prompt of so many tokens, and this prompt."""
    far: dict[Setting, float] = {}
    kept: list[tuple[int, ...]] = [()]
    for _ in range(size):
        longer = [(*tokens, v) for tokens in kept for v in usual]
        texts = {tokens: Setting(text=prompt(name, tokens)) for tokens in longer}
        far = _far(case, layers, list(texts.values()))
        kept = sorted(longer, key=lambda tokens: far[texts[tokens]])[:KEPT]
    best = Setting(text=prompt(name, kept[0]))
    return far[best], best


def _far(case: Case, layers: Sequence[str], wanted: Sequence[Setting]) -> dict[Setting, float]:
    """far of each."""
    out = dict.fromkeys(wanted, np.inf)
    for setting, of in inputs(case, wanted, layers, few_positions(case)):
        theirs = {x: see(case, x)["A"].T for x in of}
        left = [fitted(theirs[x], A)[0] for x, (A, _) in of.items() if theirs[x].shape == A.shape]
        out[setting] = sum(left) if left else np.inf
    return out
