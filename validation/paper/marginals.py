"""The marginals of the corrected eigenvalues, from norm-weighted sums (METHOD, Later work).

In the basis of K-FAC the curvature of a pair is exactly Λ_ij = E[(u_iᵀ g)² (v_jᵀ a)²] if rows were
independent (EK-FAC); K-FAC takes λ_i μ_j for it. A cut by rows and columns needs of Λ only

    r_i = Σ_j Λ_ij = u_iᵀ E[‖a‖² g gᵀ] u_i        c_j = Σ_i Λ_ij = v_jᵀ E[‖g‖² a aᵀ] v_j

whose outer product, over Σ r = Σ c, is the best that a product of marginals can say of Λ.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

import refcurv as rc
from refcurv.law.conventions import Fisher
from refcurv.model.transformer import Tap
from refcurv.model.weights import resident
from refcurv.passes.parallel import run
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import Sweep, sweep
from refcurv.progress import Progress

Array = np.ndarray


def corrected(
    model: rc.Model,
    corpus: rc.Corpus,
    basis: rc.Bases,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> rc.Bases:
    """`basis` with (c, r) in the place of (mu, lam), the directions in their new order.

    Labels are sampled as by `collect` with the same seed.

    Proof: tests/validation/test_marginals.py::test_marginals_are_those_of_the_corrected_eigenvalues
    """
    parameters = resident(model)
    job = Sweep(frozenset(basis), Fisher.SAMPLED, seed)
    units = shards(corpus, model.config)
    finished = 0

    def work(_: int, unit: Shard) -> dict[str, tuple[Array, Array]]:
        sums = {name: (np.zeros(len(b.mu)), np.zeros(len(b.lam))) for name, b in basis.items()}

        def take(_: int, tap: Tap) -> None:
            one, (c, r) = basis[tap.name], sums[tap.name]
            a_NI, g_NO = tap.a.astype(np.float64), tap.g.astype(np.float64)
            c += ((a_NI @ one.U_A) ** 2).T @ (g_NO**2).sum(axis=1)
            r += ((g_NO @ one.U_G) ** 2).T @ (a_NI**2).sum(axis=1)

        sweep(model.config, parameters, unit, job, take)
        return sums

    def done() -> None:
        nonlocal finished
        finished += 1
        progress(finished, len(units))

    parts = run(units, work, done=done)
    layers = {
        name: _sorted(one, *(np.sum([part[name][k] for part in parts], axis=0) for k in (0, 1)))
        for name, one in basis.items()
    }
    return replace(basis, layers=MappingProxyType(layers), method="corrected marginals")


def _sorted(one: rc.Eigenbasis, c: Array, r: Array) -> rc.Eigenbasis:
    """The same directions, ordered by their marginals."""
    j, i = np.argsort(-c, kind="stable"), np.argsort(-r, kind="stable")
    return rc.Eigenbasis(one.U_A[:, j], c[j], one.U_G[:, i], r[i])
