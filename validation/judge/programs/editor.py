"""An honest program for what comes after the factors: eigenvectors, EK-FAC, the cut and the edit.

In NumPy; A, G and the rows come from the honest collector. Each step is a method.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from validation.judge.programs.numpy_collector import Collector

Array = np.ndarray
Dump = dict[str, dict[str, Any]]


class _Rows(Collector):
    """Keeps a and g of each sequence, by layer."""

    def collect(self) -> Any:
        self.kept: dict[str, list[tuple[Array, Array]]] = {}
        return super().collect()

    def add(self, name: str, a: Array, g: Array) -> None:
        super().add(name, a, g)
        if name in self.names:
            keep = np.broadcast_to(self.b.keep, a.shape[:2])
            rows = [(a[i][keep[i]], g[i][keep[i]]) for i in range(len(a))]
            self.kept.setdefault(name, []).extend(rows)


class Editor:
    """`edit()` → {layer: {A, G, n_A, n_G, U_A, mu, U_G, lam, Lambda, mask, W}}."""

    rho = 0.8

    def __init__(self, setting: Any, labels: str = "gold") -> None:
        self.setting = setting
        self.collector = _Rows(setting, labels)
        self.factors = self.collector.collect()

    def edit(self) -> Dump:
        return {name: self.layer(name) for name in self.factors}

    def layer(self, name: str) -> dict[str, Any]:
        A, G, n = self.factors[name]
        W = np.array(self.setting.model.parameters[f"{name}.weight"], float)
        (mu, U_A), (lam, U_G) = self.solve(self.prepared(A)), self.solve(self.prepared(G))
        Lambda = self.corrections(name, U_A, U_G)
        mask = self.mask(lam, mu, Lambda, U_G.T @ W @ U_A)
        found = dict(A=A, G=G, n_A=n, n_G=n, U_A=U_A, mu=mu, U_G=U_G, lam=lam)
        return found | dict(Lambda=Lambda, mask=mask, W=self.project(W, U_G, U_A, mask))

    def prepared(self, X: Array) -> Array:
        return X

    def solve(self, X: Array) -> tuple[Array, Array]:
        """Eigenvalues, descending, and their vectors in columns."""
        value, vector = np.linalg.eigh(X)
        return value[::-1].copy(), vector[:, ::-1].copy()

    def corrections(self, name: str, U_A: Array, U_G: Array) -> Array:
        """EK-FAC, per token: the mean of (gᵀ u_i)² (aᵀ v_j)² over rows."""
        rows = self.rows(name)
        sums = sum((g @ U_G).T ** 2 @ (a @ U_A) ** 2 for a, g in rows)
        return sums / sum(len(a) for a, _ in rows)

    def rows(self, name: str) -> list[tuple[Array, Array]]:
        return self.collector.kept[name]

    def key(self, lam: Array, mu: Array, Lambda: Array, C: Array) -> Array:
        return np.outer(lam, mu)

    def mask(self, lam: Array, mu: Array, Lambda: Array, C: Array) -> Array:
        """The fewest pairs, by descending key, whose mass is ρ of all."""
        mass, key = np.outer(lam, mu).ravel(), self.key(lam, mu, Lambda, C).ravel()
        if self.rho == 1:
            return np.ones(C.shape, bool)
        order = np.argsort(-key, kind="stable")
        count = int(np.searchsorted(np.cumsum(mass[order]), self.rho * self.total(mass))) + 1
        keep = np.zeros(mass.size, bool)
        keep[order[:count]] = True
        return keep.reshape(C.shape)

    def total(self, mass: Array) -> float:
        return float(mass.sum())

    def project(self, W: Array, U_G: Array, U_A: Array, mask: Array) -> Array:
        return U_G @ (mask * (U_G.T @ W @ U_A)) @ U_A.T
