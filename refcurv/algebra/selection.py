"""The definition of the law's cut (SELECT), by sorting: what `staircase.cut` must equal.

It makes and sorts all O·I pairs, where the staircase takes O numbers.
"""

from __future__ import annotations

import math

import numpy as np

from refcurv.algebra.scaling import exponent, shifted
from refcurv.law.checks import Array


def select(lam: Array, mu: Array, rho: float) -> Array:
    """The mask M (O, I) of the pairs that are kept (SELECT).

    Definition
        Sort the pairs (i, j) by their keys λ_i μ_j, descending, ties in row-major order. Add them
        one at a time, until their mass reaches rho of the total mass Σλ Σμ. The mass of the pairs
        is Σ_i λ_i P[c_i]: c_i of them lie in row i, and P[c] = μ_1 + ... + μ_c.

    Args:
        lam: (O,) descending, >= 0, not all 0.
        mu: (I,) likewise.
        rho: share of the mass, in [0, 1].

    Every sum and every mass is correctly rounded (math.fsum).

    Cost: a sort of O·I keys, and a sum of O terms for each pair that is added: for small spectra.
    Source: P6, P7; SELECT.
    Proof: tests/test_selection.py::test_the_cut_is_the_selection
    """
    O, I = len(lam), len(mu)  # noqa: E741
    if rho in (0, 1):
        return np.full((O, I), bool(rho))
    lam, mu = (shifted(x, -exponent(x)) for x in (lam, mu))  # both begin in [1, 2)
    prefix = [math.fsum(mu[:c]) for c in range(I + 1)]
    target = (rho * math.fsum(lam)) * math.fsum(mu)
    count = np.zeros(O, np.int64)
    for pair in np.argsort(-np.outer(lam, mu), axis=None, kind="stable"):
        if math.fsum(lam[i] * prefix[count[i]] for i in range(O)) >= target:
            break
        count[pair // I] += 1
    return np.asarray(np.arange(I) < count[:, None])
