"""Faults of eigenbases, of Λ, of masks and of edited weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.algebra.selection import select
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.projection import keep_pairs, projected
from refcurv.judge.dump import Theirs
from refcurv.judge.injected.injection import Change, Injection
from refcurv.judge.injected.roundings import bfloat16
from refcurv.judge.injected.sums import each
from refcurv.judge.injected.truth import Layers, Truth, lambdas, weight
from refcurv.law.checks import Array
from refcurv.model.part import part_of

Turn = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(M, U, values) → (U, values) as a program has them."""


def _bases(turn: Turn) -> Change:
    """`turn` of each side."""

    def change(_: Truth, __: str, one: Theirs) -> Theirs:
        A, U_A, mu, G, U_G, lam = one.A, one.U_A, one.mu, one.G, one.U_G, one.lam
        assert A is not None and U_A is not None and mu is not None
        assert G is not None and U_G is not None and lam is not None
        U_A, mu = turn(A, U_A, mu)
        U_G, lam = turn(G, U_G, lam)
        return replace(one, U_A=U_A, mu=mu, U_G=U_G, lam=lam)

    return each(change)


def _solved_in_float32(M: Array, _: Array, __: Array) -> tuple[Array, Array]:
    value, vector = np.linalg.eigh(M.astype(np.float32))
    return vector[:, ::-1].astype(np.float64), np.maximum(value[::-1], 0).astype(np.float64)


# ------------------------------------------------------------------ masks and edits

Rule = Callable[[Eigenbasis, Array, float], Array]
"""(basis, C, rho) → the mask."""


def _edit(rule: Rule, rho: float | None = None) -> Change:
    """Another rule for the mask; W' is what that mask leaves."""

    def change(truth: Truth, layer: str, one: Theirs) -> Theirs:
        assert truth.bases is not None
        basis, W = truth.bases[layer], weight(truth, layer)
        mask = rule(basis, basis.U_G.T @ W @ basis.U_A, truth.rho if rho is None else rho)
        return replace(one, mask=mask, W=keep_pairs(W, basis, mask))

    return each(change)


def _law(basis: Eigenbasis, rho: float) -> Array:
    return select(basis.lam, basis.mu, rho)


def _share(values: Array, rho: float) -> Array:
    """The first values that hold a share of their sum."""
    return np.asarray(np.concatenate([[0.0], np.cumsum(values)[:-1]]) < rho * values.sum())


def _rectangle(basis: Eigenbasis, _: Array, rho: float) -> Array:
    return np.outer(_share(basis.lam, rho), _share(basis.mu, rho))


def _ranked(key: Callable[[Eigenbasis, Array], Array]) -> Rule:
    """As many pairs as the law keeps, but those of the largest key."""

    def rule(basis: Eigenbasis, C: Array, rho: float) -> Array:
        order = np.argsort(-key(basis, C), axis=None, kind="stable")
        mask = np.zeros(C.size, dtype=bool)
        mask[order[: int(_law(basis, rho).sum())]] = True
        return mask.reshape(C.shape)

    return rule


def _pairs(basis: Eigenbasis) -> Array:
    return np.outer(basis.lam, basis.mu)


def _by_outputs(basis: Eigenbasis, _: Array, rho: float) -> Array:
    """All pairs of the outputs that hold a share of tr G."""
    return np.outer(_share(basis.lam, rho), np.ones(len(basis.mu), bool))


def _more(by: int) -> Rule:
    """So many pairs more than the law keeps."""

    def rule(basis: Eigenbasis, C: Array, rho: float) -> Array:
        order = np.argsort(-_pairs(basis), axis=None, kind="stable")
        mask = np.zeros(C.size, dtype=bool)
        mask[order[: max(0, int(_law(basis, rho).sum()) + by)]] = True
        return mask.reshape(C.shape)

    return rule


def _rounded_total(basis: Eigenbasis, C: Array, rho: float) -> Array:
    """The running sum ends where it reaches the total in float32, less what that may be off by."""
    key = np.sort(_pairs(basis), axis=None)[::-1]
    target = rho * float(np.float32(key.sum())) * (1 - 2.0**-23)
    kept = int((np.cumsum(key) < target).sum()) + 1
    order = np.argsort(-_pairs(basis), axis=None, kind="stable")
    mask = np.zeros(C.size, dtype=bool)
    mask[order[:kept]] = True
    return mask.reshape(C.shape)


def _of_transposed(truth: Truth, layer: str, one: Theirs) -> Theirs | None:
    """The edit rotates Wᵀ, which fits where W is square."""
    assert truth.bases is not None
    W = weight(truth, layer)
    if W.shape[0] != W.shape[1]:
        return None
    return replace(one, W=projected(W.T, truth.bases[layer], truth.rho).T)


# ------------------------------------------------------------------ Λ


def _lambda(change: Callable[[Truth], dict[str, Array]]) -> Change:
    """Another Λ."""

    def made(truth: Truth, layers: Layers) -> Layers:
        found = change(truth)
        return {name: replace(layers[name], Lambda=L) for name, L in found.items()}

    return made


def _per_token(truth: Truth) -> dict[str, Array]:
    return lambdas(truth, "token")


def _over_sequences(truth: Truth) -> dict[str, Array]:
    """Divided by sequences, of a packed corpus by documents."""
    return lambdas(truth, "sequence", over="segments")


def _of_half(truth: Truth) -> dict[str, Array]:
    """Of the first half of the sequences, with their own rows."""
    assert truth.corpus is not None
    count = len(truth.corpus.label)
    if count < 2:
        return {}
    return lambdas(truth, "sequence", part_of(truth.corpus, slice(0, count // 2)))


def _short(truth: Truth) -> dict[str, Array]:
    return {name: bfloat16(L) for name, L in lambdas(truth, "sequence").items()}


SPECTRA: Final = (
    Injection("B10", "Λ is divided by sequences, A and G by rows", "Lambda",
              change=_lambda(_over_sequences)),
    Injection("B33", "the edit rotates the transpose of a square W", "edit",
              change=each(_of_transposed)),
    Injection("B62", "the eigensolver ran in float32", "basis",
              change=_bases(_solved_in_float32)),
    Injection("B64", "eigenvectors are rows", "basis", change=_bases(lambda M, U, v: (U.T, v))),
    Injection("B65", "eigenvalues ascend", "basis",
              change=_bases(lambda M, U, v: (U[:, ::-1], v[::-1]))),
    Injection("B65-edit", "the edit keeps the complement", "edit",
              change=_edit(lambda basis, C, rho: ~_law(basis, rho))),
    Injection("B66", "singular values of the rows in place of eigenvalues", "basis",
              change=_bases(lambda M, U, v: (U, np.sqrt(v)))),
    Injection("B68", "at rho = 1 the loop ends when a rounded sum is reached", "edit",
              change=_edit(_rounded_total, 1.0), declared={"rho": "1"}),
    Injection("B69-less", "the mask stops before its share: one pair is missing", "edit",
              change=_edit(_more(-1))),
    Injection("B69-more", "the mask goes on behind its share: one pair too many", "edit",
              change=_edit(_more(1))),
    Injection("B73", "each side keeps its own share: the mask is a rectangle", "edit",
              change=_edit(_rectangle)),
    Injection("B74", "pairs are ranked by λ alone", "edit", change=_edit(_by_outputs)),
    Injection("B74-inputs", "pairs are ranked by μ alone", "edit",
              change=_edit(_ranked(lambda b, C: np.tile(b.mu, (len(b.lam), 1))))),
    Injection("B74-damage", "pairs are ranked by λ μ C²", "edit",
              change=_edit(_ranked(lambda b, C: _pairs(b) * C**2))),
    Injection("B74-size", "pairs are ranked by C²", "edit",
              change=_edit(_ranked(lambda b, C: C**2))),
    Injection("B75", "Λ squares each position, where sequences are meant", "Lambda",
              change=_lambda(_per_token)),
    Injection("B76", "Λ is of the first half of the sequences", "Lambda",
              change=_lambda(_of_half)),
    Injection("B77", "Λ is bfloat16", "Lambda", change=_lambda(_short)),
)  # fmt: skip
