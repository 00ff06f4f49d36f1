"""FISHER: what the backward passes send back at the logits.

Each function here is one way to choose a cotangent: an array (N, V) that is sent back at the logits
of N positions. Positions without a label send nothing back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from refcurv.law.checks import Array, ConventionError, require_choice, require_draws, require_seed
from refcurv.law.conventions import Fisher
from refcurv.model.layers import DEFINITIONS, Ops
from refcurv.model.sampling import signs, uniforms
from refcurv.model.transformer import Cotangent

DRAWN = (Fisher.SAMPLED, Fisher.SIGNED)
"""The Fishers that draw something: labels, or signs."""


def require_fisher(who: str, fisher: str, seed: int, draws: int) -> Fisher:
    """The choice of labels, or an error for one that the law does not have (FISHER, SAMPLING)."""
    kind = Fisher(require_choice(who, "fisher", fisher, list(Fisher)))
    require_seed(who, seed)
    if require_draws(who, draws) != 1 and kind not in DRAWN:
        raise ConventionError(f"{who}: `{kind}` draws nothing; draws must be 1, got {draws}.")
    return kind


def cotangents(
    fisher: Fisher,
    label_BT: Array,
    index_B: Array,
    vocabulary: int,
    seed: int = 0,
    draws: int = 1,
    ops: Ops = DEFINITIONS,
) -> Iterator[Cotangent]:
    """FISHER: one cotangent per backward pass over a batch, when it is asked for.

    Definition
        empirical   p − onehot(y), y the label of the corpus;
        sampled     p − onehot(y), y drawn from p (SAMPLING), once for each draw;
        signed      S ε with S = diag(√p) − p √pᵀ, ε drawn signs, once for each draw;
        expected    column v of S at position t alone, for each t that has a label, for each v.

    Args:
        fisher: which of the four.
        label_BT: the labels of the batch, negative = none; (B, 1) for images.
        index_B: the row of each sequence in the corpus. What is drawn depends on it (SAMPLING).
        vocabulary: V.
        seed: of what is drawn.
        draws: how often it is drawn.
        ops: of the numbers that the logits are.

    Returns:
        Functions of (row_N, logit_NV): row_N are rows of the flattened (B, T), in ascending order,
        and logit_NV their logits. Each returns what is sent back there, (N, V).

    Proof: tests/test_factors.py::test_factors_equal_the_naive_sums,
        tests/test_factors.py::test_O11_expected_is_the_mean_over_every_label
    """
    batch = ops, label_BT, index_B
    match fisher:
        case Fisher.EMPIRICAL:
            yield partial(_corpus_slope, ops, label_BT)
        case Fisher.SAMPLED:
            yield from (partial(_drawn_slope, *batch, seed, draw) for draw in range(draws))
        case Fisher.SIGNED:
            yield from (partial(_signed_root, *batch, seed, draw) for draw in range(draws))
        case Fisher.EXPECTED:
            at, entries = labelled(label_BT), range(vocabulary)
            if not at:  # the rows of this batch have g = 0
                yield partial(_corpus_slope, ops, label_BT)
            yield from (partial(_root_column, ops, label_BT, t, v) for t in at for v in entries)


def labelled(label_BT: Array) -> list[int]:
    """The positions that have a label in any sequence of the batch."""
    return [int(t) for t in np.flatnonzero((label_BT >= 0).any(axis=0))]


def _corpus_slope(ops: Ops, label_BT: Array, row_N: Array, logit_NV: Array) -> Array:
    """The gradient of the nats against the corpus's labels."""
    return ops.cross_entropy(logit_NV, label_BT.reshape(-1)[row_N])[1]


def drawn_labels(
    label_BT: Array, index_B: Array, seed: int, draw: int, row_N: Array, logit_NV: Array,
    ops: Ops = DEFINITIONS,
) -> Array:  # fmt: skip
    """SAMPLING: labels drawn from the model, (N,), where the corpus has a label; else negative."""
    T = label_BT.shape[1]
    b_N, t_N = np.divmod(row_N, T)
    first, last = b_N[0], b_N[-1]  # rows ascend
    uniform_BT = np.stack([uniforms(seed, draw, int(n), T) for n in index_B[first : last + 1]])
    label_N = label_BT.reshape(-1)[row_N]
    drawn_N = ops.draw_labels(logit_NV, uniform_BT[b_N - first, t_N])
    return np.where(label_N >= 0, drawn_N, label_N)


def _drawn_slope(
    ops: Ops, label_BT: Array, index_B: Array, seed: int, draw: int, row_N: Array, logit_NV: Array
) -> Array:
    """The gradient against labels drawn from the model."""
    drawn_N = drawn_labels(label_BT, index_B, seed, draw, row_N, logit_NV, ops)
    return ops.cross_entropy(logit_NV, drawn_N)[1]


def _signed_root(
    ops: Ops, label_BT: Array, index_B: Array, seed: int, draw: int, row_N: Array, logit_NV: Array
) -> Array:
    """S ε where the corpus has a label, ε the signs of SAMPLING: E(S ε εᵀ Sᵀ) = S Sᵀ."""
    b_N, t_N = np.divmod(row_N, label_BT.shape[1])
    at = np.flatnonzero(label_BT[b_N, t_N] >= 0)
    sign_NV = np.empty((len(at), logit_NV.shape[1]), np.int8)
    for n, row in enumerate(at):
        index, t = int(index_B[b_N[row]]), int(t_N[row])
        sign_NV[n] = signs(seed, draw, index, t, logit_NV.shape[1])
    d_logit_NV = np.zeros_like(logit_NV)
    d_logit_NV[at] = ops.root_product(logit_NV[at], sign_NV)
    return d_logit_NV


def _root_column(ops: Ops, label_BT: Array, t: int, v: int, row_N: Array, logit_NV: Array) -> Array:
    """Column v of S at position t, for the sequences that have a label there; elsewhere 0."""
    b_N, t_N = np.divmod(row_N, label_BT.shape[1])
    at = np.flatnonzero((t_N == t) & (label_BT[b_N, t_N] >= 0))
    onehot_NV = np.broadcast_to(np.arange(logit_NV.shape[1]) == v, logit_NV[at].shape)
    d_logit_NV = np.zeros_like(logit_NV)
    d_logit_NV[at] = ops.root_product(logit_NV[at], onehot_NV)
    return d_logit_NV
