"""Faults that weight sequences and batches otherwise: A and G are sums over sequences, w_n S_n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.judge.injected.injection import Change, Injection
from refcurv.judge.injected.rows import network, rows
from refcurv.judge.injected.truth import Layers, Truth
from refcurv.law.checks import Array

DECAY: Final = 0.83
"""Of a moving average."""

Weights = Callable[[Truth], tuple[Array, Array, float] | None]
"""For each sequence its weight in Σ a aᵀ and in Σ g gᵀ; which share of the rows n counts."""


def _weighted(weights: Weights) -> Change:
    def change(truth: Truth, layers: Layers) -> Layers:
        found = weights(truth)
        if found is None:
            return {}
        w_A, w_G, share = found
        out = dict(layers)
        for name, one in rows(truth, network(truth)).items():
            ours = truth.factors[name]
            n_A, n_G = (float(round(share * n)) for n in (ours.n_A, ours.n_G))
            A = (one.a * w_A[one.of_a, None]).T @ one.a / n_A
            G = (one.g * w_G[one.of_g, None]).T @ one.g / n_G
            out[name] = replace(out[name], A=A, n_A=n_A, G=G, n_G=n_G)
        return out

    return change


def _terms(truth: Truth) -> Array:
    """Loss terms of each sequence."""
    assert truth.corpus is not None
    return np.asarray((truth.corpus.label >= 0).sum(axis=1))


def _inverse_squares(terms: Array) -> Array:
    return np.where(terms > 0, 1 / np.maximum(terms, 1.0) ** 2, 0)


def _halves(count: int) -> Array:
    """Two batches, the first one larger."""
    return (np.arange(count) > count // 2).astype(np.int64)


def _batches(truth: Truth) -> tuple[Array, Array, float] | None:
    terms = _terms(truth)
    batch = _halves(len(terms))
    each = np.bincount(batch, terms)
    if len(set(each.tolist())) == 1:
        return None
    return np.ones(len(terms)), _inverse_squares(each)[batch], 1.0


def _lengths(truth: Truth) -> tuple[Array, Array, float] | None:
    terms = _terms(truth)
    if len(set(terms[terms > 0].tolist())) == 1:
        return None
    return np.ones(len(terms)), _inverse_squares(terms), 1.0


def _rows_of(truth: Truth) -> Array:
    """Rows of each sequence, in a layer that has all of them."""
    name = next(iter(truth.factors))
    found = rows(replace(truth, factors=replace(truth.factors, layers={name: truth.factors[name]})),
                 network(truth))  # fmt: skip
    return np.bincount(found[name].of_a, minlength=len(_terms(truth)))


def _moving(truth: Truth) -> tuple[Array, Array, float] | None:
    """M ← d M + (1 − d) M_b over batches of two sequences, from zero."""
    count = _rows_of(truth)
    if len(count) < 4:
        return None
    batch = np.arange(len(count)) // 2
    w = (1 - DECAY) * DECAY ** (batch[-1] - batch) / np.maximum(np.bincount(batch, count), 1)[batch]
    return w * count.sum(), w * count.sum(), 1.0


def _last_alone(truth: Truth) -> tuple[Array, Array, float] | None:
    """A of the last batch, of two sequences where there are enough; n is right."""
    count = _rows_of(truth)
    last = np.arange(len(count)) >= len(count) - (2 if len(count) % 2 == 0 else 1)
    if not count[last].sum() or len(count) < 3:
        return None
    return last * (count.sum() / count[last].sum()), np.ones(len(count)), 1.0


def _one_worker(truth: Truth) -> tuple[Array, Array, float] | None:
    count = _rows_of(truth)
    own = np.arange(len(count)) % 2 == 0
    share = count[own].sum() / count.sum()
    return None if not 0 < share < 1 else (own * 1.0, own * 1.0, float(share))


SEQUENCES: Final = (
    Injection("B2", "g of the mean loss of each batch, and batches differ", "corpus",
              change=_weighted(_batches)),
    Injection("B3", "each sequence's loss is divided by its labels", "corpus",
              change=_weighted(_lengths)),
    Injection("B9", "a moving average over batches", "corpus", change=_weighted(_moving)),
    Injection("B41", "A is that of the last batch", "corpus", change=_weighted(_last_alone)),
    Injection("B46-rank", "one of two workers writes its own sums alone", "corpus",
              change=_weighted(_one_worker)),
)  # fmt: skip
