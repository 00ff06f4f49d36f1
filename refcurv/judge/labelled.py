"""Were labels that somebody hands over drawn from the model, as the Fisher is defined by?

Factors that are the truth for their labels say nothing of the labels. Each test here bounds how
likely the labels would be if each were drawn from the model's softmax, independently of the others.
Bounds are Chernoff's, which hold for any number of labels, however few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from refcurv.judge.verdict import FAIL, LABELS, Comparison
from refcurv.law.checks import Array
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.transformer import Parameters
from refcurv.model.weights import Model, resident
from refcurv.passes.forward import final_states
from refcurv.passes.shards import inputs_of, shards

ODDS: Final = 1e-4
"""How seldom labels that were drawn fail one of the tests, at most."""

ENTRIES: Final = 2**25
"""Probabilities that are kept to look for labels that are drawn alike.  Chosen: 128 MiB."""

LAGS: Final = 64
"""How far apart sequences, or positions, are looked at, at most.  Chosen: batches are smaller."""

SLOPES: Final = 2.0 ** -np.arange(12)
"""λ of Chernoff's bound of a sum of nats."""

STEEP: Final = np.array([0.125, 0.25, 0.5, 1, 2, 3, 5, 8])
"""λ of Chernoff's bound of a number of agreements."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """The labels beside the model's softmax, over all labelled positions.

    Fields: count; best, own: how many are the likeliest output, and the corpus's own label;
    of_best, of_own: the logarithm of the chance that all are. nats: their sum; entropy: what it is
    on average. below, above (λ,): Σ log E exp(∓λ nats). label (N, T), p (N, T, V): of the first
    sequences, −1 and 0 without a label.
    """

    count: int
    best: int
    own: int
    of_best: float
    of_own: float
    nats: float
    entropy: float
    below: Array
    above: Array
    label: Array
    p: Array


def not_drawn(model: Model, corpus: Corpus, given: Corpus) -> Iterator[Comparison]:
    """What says that the labels of `given` were not drawn from the model; the first such test.

    Definition
        Chance p is the softmax of the model where a label is. All labels are the likeliest output
        (B16), or the corpus's own (B15): by Π p. Their nats add up to too few or too many (B21):
        P(Σ nats >= s) <= exp(−λ s) Π Σ_v p_v^(1 − λ) for each λ > 0, and likewise below. Labels of
        sequences, or positions, that are d apart agree too often (B17): they agree by chance with
        q = Σ_v p_v p'_v, and P(S >= s) <= exp(−λ s) Π (1 + q (exp λ − 1)), over pairs that share no
        label. Of sequences so many are looked at as ENTRIES has room for.

    Args:
        model: in any dtype.
        corpus: with labels of its own.
        given: the same with theirs.

    Cost: one forward pass, and LAGS products of the probabilities that are kept.
    Proof: tests/test_judge_labelled.py::test_labels_that_are_drawn_pass,
        ::test_labels_that_are_not_drawn_are_told
    """
    seen = _seen(model.config, resident(model), corpus, given)
    if not seen.count:
        return
    every = f"all {number_of(seen.count, 'label')} that were given"
    if seen.own == seen.count and seen.of_own < math.log(ODDS):
        meant = "where that is meant, declare it (--declare fisher=empirical)"
        yield _told("B15", f"{every} are the corpus's own; {meant}")
    elif seen.best == seen.count and seen.of_best < math.log(ODDS):
        yield _told("B16", f"{every} are the model's likeliest outputs")
    elif alike := _alike(seen):
        yield _told("B17", alike)
    elif _log_chance(seen) < math.log(ODDS / 2):
        words = (
            f"the labels that were given have {seen.nats / seen.count:.4g} nats each, and drawn "
            f"from the model they have {seen.entropy / seen.count:.4g}"
        )
        yield _told("B21", words)


def _told(fault: str, words: str) -> Comparison:
    return Comparison("", LABELS, None, None, FAIL, fault, words)


def _seen(config: ModelConfig, parameters: Parameters, corpus: Corpus, given: Corpus) -> _Seen:
    N, T = given.label.shape
    few = min(N, ENTRIES // (T * config.vocabulary))
    label_NT, p_NTV = np.full((few, T), -1), np.zeros((few, T, config.vocabulary), np.float32)
    numbers, below, above = np.zeros(6), np.zeros(len(SLOPES)), np.zeros(len(SLOPES))
    for n, t, log_p, label_N in _rows(config, parameters, given):
        best_N, own_N = log_p.max(axis=-1), corpus.label[n, t]
        told_N = np.take_along_axis(log_p, label_N[:, None], axis=-1)[:, 0]
        numbers += (
            len(label_N), (told_N == best_N).sum(), (label_N == own_N).sum(), best_N.sum(),
            -told_N.sum(), -(np.exp(log_p) * log_p).sum(),
        )  # fmt: skip
        for k, slope in enumerate(SLOPES):
            below[k] += np.log(np.exp((1 + slope) * log_p).sum(axis=-1)).sum()
            above[k] += np.log(np.exp((1 - slope) * log_p).sum(axis=-1)).sum()
        inside = n < few
        label_NT[n[inside], t[inside]] = label_N[inside]
        p_NTV[n[inside], t[inside]] = np.exp(log_p[inside])
    count, best, own = (int(x) for x in numbers[:3])
    of_best, nats, entropy = map(float, numbers[3:])
    return _Seen(count, best, own, of_best, -nats, nats, entropy, below, above, label_NT, p_NTV)


def _rows(
    config: ModelConfig, parameters: Parameters, given: Corpus
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """(n, t, log p, label) of labelled positions, some at a time; log p (M, V) in float64."""
    size = max(1, ENTRIES // 16 // config.vocabulary)
    for unit in shards(given, config):
        final_BTD = final_states(config, parameters, inputs_of(config, unit), unit.layout)
        every = np.argwhere(unit.label_BT >= 0)
        for begin in range(0, len(every), size):
            b, t = every[begin : begin + size].T
            logit_MV = transformer.head_logits(config, parameters, final_BTD[b, t])
            logit_MV = logit_MV.astype(np.float64) - logit_MV.max(axis=-1, keepdims=True)
            log_p = logit_MV - np.log(np.exp(logit_MV).sum(axis=-1, keepdims=True))
            yield unit.index_B[b], t, log_p, unit.label_BT[b, t]


def _log_chance(seen: _Seen) -> float:
    """Chernoff's bound of a sum of nats as far off as theirs, on its side."""
    low = (SLOPES * seen.nats + seen.below).min()
    high = (-SLOPES * seen.nats + seen.above).min()
    return float(min(low, high))


def _alike(seen: _Seen) -> str:
    """In words, if labels that are some sequences or positions apart agree too often."""
    places = (("sequence", seen.label, seen.p),
              ("position", seen.label.T, seen.p.swapaxes(0, 1)))  # fmt: skip
    lags = [(what, y, p, d) for what, y, p in places for d in range(1, min(len(y), LAGS + 1))]
    for what, y, p, d in lags:
        n = np.flatnonzero(np.arange(len(y) - d) // d % 2 == 0)  # no label is in two pairs
        both = (y[n] >= 0) & (y[n + d] >= 0)
        q = np.einsum("ntv,ntv->nt", p[n], p[n + d])[both].astype(np.float64)
        same = int((y[n] == y[n + d])[both].sum())
        chance = min(-k * same + np.log1p(q * np.expm1(k)).sum() for k in STEEP)
        if chance < math.log(ODDS / len(lags)):
            return (
                f"the labels that were given agree in {same} of {len(q)} places with those "
                f"{number_of(d, what)} further on, where chance gives {q.sum():.3g}: they are "
                "drawn with the same random numbers"
            )
    return ""
