"""How far version 1 may be from the real numbers.

An array's own budget is of float64 routes from the same sums. What the sums err by moves
eigenvalues by that much at most (Hoffman and Wielandt), and eigenvectors by as much over the gap to
other eigenvalues (Davis and Kahan). So far moves an edit, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby

import numpy as np

from refcurv.judge.cases.case import Case, kind_of
from refcurv.judge.cases.routes import basis_budget
from validation.cases.contained import Array

SUMS = {"mu": "sum_A", "U_A": "sum_A", "lam": "sum_G", "U_G": "sum_G"}
SPECTRUM = {"U_A": "mu", "U_G": "lam"}

COVER = 2
"""A gap has an error of its own, and columns are not quite orthonormal.  Chosen: both are far below
one half, as the sines are."""


def allowed(case: Case, name: str, real: Mapping[str, Array]) -> float | None:
    """|version 1 − real|, Frobenius; None where nothing says. `real` are the numbers by name."""
    kind, own = kind_of(name), case.budget_of(name)
    if kind.startswith("basis"):
        layer, _, part = name.removeprefix("basis.").rpartition(".")
        if part not in SPECTRUM:
            return None if own is None else own + _of_mean(case, layer, SUMS[part])
        far = [_far(case, layer, part, real, (k, k + 1)) for k in range(real[name].shape[1])]
        return math.sqrt(2) * math.hypot(*far)
    if kind == "edits.*.weight" and own is not None:
        layer = name.split(".", 2)[2].removesuffix(".weight")
        mask = case.arrays[name.replace(".weight", ".mask")]
        W = case.arrays.get(f"weights.parameters.{layer}.weight")
        W = case.arrays["weights.parameters.embed.weight"] if W is None else W  # a tied head
        size, start = float(np.linalg.norm(W)), 0
        for c, rows in groupby(mask.sum(axis=1).tolist()):
            stop = start + len(list(rows))
            if c:
                own += size * _far(case, layer, "U_G", real, (start, stop))
                own += 2 * size * _far(case, layer, "U_A", real, (0, int(c)))
            start = stop
    return own


def _of_mean(case: Case, layer: str, part: str) -> float:
    """What A or G err by."""
    return (case.budget_of(f"factors.{layer}.{part}") or 0.0) / float(
        case.arrays[f"factors.{layer}.n_{part[-1]}"]
    )


def _far(case: Case, layer: str, part: str, real: Mapping[str, Array], S: tuple[int, int]) -> float:
    """The sine between two subspaces: version 1's columns S and the real eigenvectors S.

    A U − U D is (A − U D Uᵀ) U + U D (UᵀU − I), each within `basis_budget`.
    """
    values = real[f"basis.{layer}.{SPECTRUM[part]}"]
    n, size = len(values), float(np.linalg.norm(values))
    residual = basis_budget(n) * (1 + math.sqrt(n)) * size + _of_mean(case, layer, SUMS[part])
    edges = [values[k - 1] - values[k] for k in S if 0 < k < n]
    return COVER * residual / float(min(edges)) if edges else 0.0
