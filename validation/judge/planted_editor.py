"""Faults in the editor: of eigenvectors, EK-FAC's corrections, the cut and the edit.

Names are made as in planted_torch.py. B70 is no fault: a tie may be cut either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from validation.judge.programs.editor import Editor
from validation.judge.setting import bfloat16


class Fault(Editor):
    """Fields: what, in words; rho, where another share shows it; few, of two sequences alone."""

    what = ""
    few = False


class B10(Fault):
    what = "corrections are divided by sequences, factors by tokens"

    def corrections(self, name: str, U_A: Any, U_G: Any) -> Any:
        rows = self.rows(name)
        return super().corrections(name, U_A, U_G) * sum(len(a) for a, _ in rows) / len(rows)


class B33(Fault):
    what = "the weight lies the other way round, and is square"

    def project(self, W: Any, U_G: Any, U_A: Any, mask: Any) -> Any:
        return super().project(W.T, U_G, U_A, mask).T if len(set(W.shape)) == 1 else (
            super().project(W, U_G, U_A, mask)
        )  # fmt: skip


class B62(Fault):
    what = "the solver is float32"

    def solve(self, X: Any) -> Any:
        value, vector = super().solve(X.astype(np.float32))
        return value.astype(float), vector.astype(float)


class B64(Fault):
    what = "eigenvectors are rows"

    def layer(self, name: str) -> Any:
        found = super().layer(name)
        return found | {k: found[k].T.copy() for k in ("U_A", "U_G")}


class B65(Fault):
    what = "ascending eigenvalues are taken to descend"

    def solve(self, X: Any) -> Any:
        value, vector = super().solve(X)
        return value[::-1].copy(), vector[:, ::-1].copy()

    def mask(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        return super().mask(lam, mu, Lambda, C)[::-1, ::-1]


class _Noisy(Fault):
    few = True  # of full rank, these factors have no eigenvalue that rounding makes negative

    def prepared(self, X: Any) -> Any:
        short = bfloat16(X)
        return (short + short.T) / 2


class B66_abs(_Noisy):
    what = "negative eigenvalues of a rounded factor turn positive, by an SVD"

    def solve(self, X: Any) -> Any:
        value, vector = np.linalg.eigh(X)
        order = np.argsort(-abs(value), kind="stable")
        return abs(value)[order], vector[:, order]


class B66_clip(_Noisy):
    what = "negative eigenvalues of a rounded factor are clipped"

    def solve(self, X: Any) -> Any:
        value, vector = super().solve(X)
        return np.maximum(value, 0), vector


class B67(_Noisy):
    what = "negative eigenvalues stay in the rule of mass"
    rho = 0.99


class B68(Fault):
    what = "at ρ = 1 the edit stops as soon as the sum is reached"
    rho, few = 1.0, True

    def mask(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        mass = np.outer(lam, mu).ravel()
        order = np.argsort(-mass, kind="stable")
        sums = np.cumsum(mass[order])
        keep = np.zeros(mass.size, bool)
        keep[order[: int(np.searchsorted(sums, sums.max() * (1 - 1e-15))) + 1]] = True
        return keep.reshape(C.shape)


class B69(Fault):
    what = "the total is float32, the running sum float64"
    rho, few = 1 - 1e-6, True

    def total(self, mass: Any) -> float:
        return float(np.cumsum(mass.astype(np.float32))[-1])


class B73(Fault):
    what = "ρ of A and ρ of G, each by itself"

    def mask(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        sides = [np.cumsum(x) - x < self.rho * x.sum() for x in (lam, mu)]
        return np.outer(*sides)


class B74_lam(Fault):
    what = "pairs are ordered by λ alone"

    def key(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        return np.outer(lam, np.ones_like(mu))


class B74_root(Fault):
    what = "mass is √(λμ)"

    def mask(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        return super().mask(np.sqrt(abs(lam)), np.sqrt(abs(mu)), Lambda, C)


class B74_Lambda(Fault):
    what = "pairs are ordered by EK-FAC's corrections"

    def key(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        return Lambda


class B74_damage(Fault):
    what = "pairs are ordered by λ μ C²"

    def key(self, lam: Any, mu: Any, Lambda: Any, C: Any) -> Any:
        return np.outer(lam, mu) * C**2


class B75_sequence(Fault):
    what = "corrections per sequence where per token is meant"

    def corrections(self, name: str, U_A: Any, U_G: Any) -> Any:
        rows = self.rows(name)
        sums = sum(((g @ U_G).T @ (a @ U_A)) ** 2 for a, g in rows)
        return sums / sum(len(a) for a, _ in rows)


class B75_batch(Fault):
    what = "corrections square the sum over a batch"

    def corrections(self, name: str, U_A: Any, U_G: Any) -> Any:
        rows, sums = self.rows(name), 0
        for begin in range(0, len(rows), 8):
            some = rows[begin : begin + 8]
            sums = sums + sum((g @ U_G).T @ (a @ U_A) for a, g in some) ** 2
        return sums / sum(len(a) for a, _ in rows)


class B76(Fault):
    what = "corrections are of the first half of the data"

    def rows(self, name: str) -> Any:
        rows = super().rows(name)
        return rows[: len(rows) // 2]


class B77(Fault):
    what = "corrections are computed in bfloat16"

    def corrections(self, name: str, U_A: Any, U_G: Any) -> Any:
        rows = self.rows(name)
        sums = 0
        for a, g in rows:
            sums = bfloat16(sums + bfloat16(g @ U_G).T ** 2 @ bfloat16(a @ U_A) ** 2)
        return sums / sum(len(a) for a, _ in rows)


class B78(Fault):
    what = "pairs are (A, G) where (G, A) is meant"

    def layer(self, name: str) -> Any:
        found = super().layer(name)
        W = found["W"]
        if len(set(W.shape)) > 1:
            return found
        raw = np.array(self.setting.model.parameters[f"{name}.weight"], float)
        mask = found["mask"].T.copy()
        edited = self.project(raw, found["U_G"], found["U_A"], mask)
        return found | {"Lambda": found["Lambda"].T.copy(), "mask": mask, "W": edited}


FAULTS = {
    name: made
    for name, made in globals().items()
    if isinstance(made, type) and issubclass(made, Fault) and name.startswith("B")
}
"""Name → class."""
