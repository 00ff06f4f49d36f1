"""Bugs of eigenbases, masks and edited weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refcurv.algebra.selection import select
from refcurv.judge.cases.planted.bug import Bug, Changed, Plant
from refcurv.judge.cases.truth import SHARES, Truth, share_name
from refcurv.law.checks import Array


def _bases(
    change: Callable[[Array, Array, Array], tuple[Array, Array]],
) -> Plant:
    """`change`: (M, U, values) → (U, values) of each side."""

    def plant(made: Truth) -> Changed:
        out = {}
        for name in made.subject.layers:
            factor, one = made.factors[name], made.bases[name]
            for side, M, U, values, key in (
                ("A", factor.A, one.U_A, one.mu, "mu"), ("G", factor.G, one.U_G, one.lam, "lam")
            ):  # fmt: skip
                out[f"basis.{name}.U_{side}"], out[f"basis.{name}.{key}"] = change(M, U, values)
        return out

    return plant


def _float32(M: Array, U: Array, values: Array) -> tuple[Array, Array]:
    value, vector = np.linalg.eigh(M.astype(np.float32))
    return vector[:, ::-1].astype(np.float64), np.maximum(value[::-1], 0).astype(np.float64)


def _edits(mask_of: Callable[[Array, Array, float], Array]) -> Plant:
    """Another rule for the mask; W' is what that mask leaves."""

    def plant(made: Truth) -> Changed:
        out: dict[str, Array] = {}
        for name in made.subject.layers:
            one = made.bases[name]
            W = made.subject.model.parameters[made.subject.model.config.weight_of(name)]
            for rho in SHARES:
                at = f"edits.{share_name(rho)}.{name}"
                if f"{at}.mask" in made.arrays:
                    mask = mask_of(one.lam, one.mu, rho)
                    C = one.U_G.T @ W @ one.U_A
                    out[f"{at}.mask"] = mask.astype(np.uint8)
                    out[f"{at}.weight"] = one.U_G @ (C * mask) @ one.U_A.T
        return out

    return plant


def _share(values: Array, rho: float) -> Array:
    """The first values that hold a share of their sum."""
    return np.asarray(np.concatenate([[0.0], np.cumsum(values)[:-1]]) < rho * values.sum())


def _marginal(lam: Array, mu: Array, rho: float) -> Array:
    return np.outer(_share(lam, rho), _share(mu, rho))


def _outputs_alone(lam: Array, mu: Array, rho: float) -> Array:
    return np.outer(_share(lam, rho), np.ones(len(mu), bool))


def _one_pair(by: int) -> Callable[[Array, Array, float], Array]:
    """One pair more or fewer than SELECT keeps."""

    def mask_of(lam: Array, mu: Array, rho: float) -> Array:
        order = np.argsort(-np.outer(lam, mu), axis=None, kind="stable")
        mask = np.zeros(len(lam) * len(mu), bool)
        mask[order[: int(select(lam, mu, rho).sum()) + by]] = True
        return mask.reshape(len(lam), len(mu))

    return mask_of


def _complement(made: Truth) -> Changed:
    """The edit keeps what it should remove."""
    out: dict[str, Array] = {}
    for name in made.subject.layers:
        W = made.subject.model.parameters[made.subject.model.config.weight_of(name)]
        for rho in SHARES:
            at = f"edits.{share_name(rho)}.{name}"
            if f"{at}.weight" in made.arrays:
                out[f"{at}.weight"] = W - made.arrays[f"{at}.weight"]
    return out


SPECTRA = (
    Bug("B62", "PRECISION", "the eigensolver ran in float32", "basis", _bases(_float32)),
    Bug("B64", "ORDER", "eigenvectors are rows", "basis", _bases(lambda M, U, v: (U.T.copy(), v))),
    Bug("B65", "ORDER", "eigenvalues ascend",
        "basis", _bases(lambda M, U, v: (U[:, ::-1].copy(), v[::-1].copy()))),
    Bug("B65-edit", "ORDER", "the edit keeps the complement", "edits", _complement),
    Bug("B66", "DEGENERATE", "singular values of the rows in place of eigenvalues",
        "basis", _bases(lambda M, U, v: (U, np.sqrt(v)))),
    Bug("B69-less", "TIE", "the mask stops before its share: one pair is missing", "edits",
        _edits(_one_pair(-1))),
    Bug("B69-more", "TIE", "the mask goes on behind its share: one pair too many", "edits",
        _edits(_one_pair(1))),
    Bug("B73", "TIE", "each side keeps its own share: the mask is a rectangle",
        "edits", _edits(_marginal)),
    Bug("B74", "TIE", "pairs are ranked by λ alone", "edits", _edits(_outputs_alone)),
)  # fmt: skip
"""Bugs that the factors show, or the basis."""
