"""Which positions theirs has for rows, and how often: read off A, whatever the rule was.

A is linear in how often each position is a row. So all rules that are made of a few kinds of
positions (`positions.cells`) are compared with theirs at once, by the sums over each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.seen import see, usable
from refcurv.judge.diagnosis.variants import Setting, inputs
from refcurv.judge.diagnosis.variants.networks import PADS
from refcurv.judge.diagnosis.variants.positions import (
    BUT,
    ONLY,
    TIMES,
    cells,
    positions,
)
from refcurv.judge.diagnosis.work import MOST, extent, is_large
from refcurv.law.checks import Array

KINDS = 14
"""Cells, at most.  Chosen: the rules are then a quarter of a million."""

TRIED = 3
"""Rules of each view of padding that are tried exactly, at most."""


def placed(case: Case, layers: Sequence[str]) -> Iterator[Setting]:
    """Rules for rows that are nearest to A, at most half as far from it as the reference's.

    Definition
        A rule takes each cell k as a row w_k times: 0 or 1, of one cell perhaps 2. S_k is Σ a aᵀ
        over the cell, and far(w) the sum over layers of the least |T − r Σ_k w_k S_k|² / |T|².
        Rules have as many rows as theirs counts. Of those that are about as near as the nearest
        those are taken that change fewest cells: positions of one token at the start of all texts
        are the same row, and then A cannot say which of them it has.

    Proof: tests/test_judge_places.py::test_any_rule_for_rows_is_found
    """
    if case.model is None or case.corpus is None or is_large(case) or extent(case) > MOST:
        return
    at = positions(case.corpus, case.model.config, case.reference.rows)
    every = cells(at)
    if not 1 < len(every) <= KINDS:
        return
    own_K = np.array([at.keep_BT[cell].any() for cell in every.values()], dtype=float)
    rules_RK = _rules(own_K)
    n = case.counts(layers[0]).theirs["A"]
    if n is not None:
        counted_R = rules_RK @ [cell.sum() for cell in every.values()]
        rules_RK = np.concatenate([own_K[None], rules_RK[counted_R == n]])
    for pads in PADS if (~at.real_BT).any() else ("blind",):
        far_R = _far(case, layers, every, pads, rules_RK)
        best = far_R[1:].min(initial=np.inf)
        near = np.flatnonzero(far_R[1:] <= 2 * best + EXACT) + 1
        if 4 * best < far_R[0]:
            changed = (rules_RK[near] != own_K).sum(axis=1)
            for k in near[changed == changed.min()][:TRIED]:
                yield Setting(rows_A=_name(every, own_K, rules_RK[k]), pads=pads)


EXACT = 1e-13
"""What cancellation leaves of a square that is 0, relative to what was subtracted."""


def _rules(own_K: Array) -> Array:
    """Every rule, (R, K), the reference's first."""
    K = len(own_K)
    once_RK = (np.arange(2**K)[:, None] >> np.arange(K) & 1).astype(float)
    twice = [once_RK[once_RK[:, k] == 1] + np.eye(K)[k] for k in range(K)]
    every = np.concatenate([once_RK[1:], *twice])
    return np.concatenate([own_K[None], every[(every != own_K).any(axis=1)]])


def _far(
    case: Case, layers: Sequence[str], every: dict[str, Array], pads: str, rules_RK: Array
) -> Array:
    """far of each rule, (R)."""
    wanted = {Setting(rows_A=ONLY + name, pads=pads): k for k, name in enumerate(every)}
    sums: dict[str, Array] = {}
    for setting, of in inputs(case, list(wanted), layers, limit=extent(case)):
        for layer, (A, n) in of.items():
            sums.setdefault(layer, np.zeros((len(every), *A.shape)))[wanted[setting]] = A * n
    far_R = np.zeros(len(rules_RK))
    for layer, S_KII in sums.items():
        seen = see(case, layer).get("A")
        if seen is not None and usable(seen) and seen.T.shape == S_KII.shape[1:]:
            S, T = S_KII.reshape(len(S_KII), -1), seen.T.ravel() / np.linalg.norm(seen.T)
            size_R = ((rules_RK @ (S @ S.T)) * rules_RK).sum(axis=1)
            far_R += 1 - (rules_RK @ (S @ T)) ** 2 / np.maximum(size_R, 1e-300)
    return np.asarray(np.maximum(far_R, 0))


def _name(every: dict[str, Array], own_K: Array, rule_K: Array) -> str:
    """The rule in words that `positions.weights` reads."""
    each = zip(every, own_K, rule_K, strict=True)
    return BUT + "; ".join(TIMES[int(w)] + name for name, own, w in each if w != own)
