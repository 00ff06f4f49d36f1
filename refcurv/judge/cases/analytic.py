"""A case whose every number can be written down: rows along the axes, equal eigenvalues, ties."""

from __future__ import annotations

import numpy as np

from refcurv.algebra.selection import select
from refcurv.judge.cases.case import VALID, Case, Check
from refcurv.judge.cases.truth import SHARES, share_name
from refcurv.law.checks import Array

INPUT = (4, 2, 2, 2, 1)
"""Roots of the eigenvalues of S_A: rows are INPUT[i] e_i, and every product is exact."""

OUTPUT = (2, 2, 1, 1)

LAYER = "linear"


def analytic() -> Case:
    """S_A = diag(16, 4, 4, 4, 1) and S_G = diag(4, 4, 1, 1) over eight rows; W counts from 1.

    Proof: tests/test_cases.py::test_the_analytic_case_is_by_hand
    """
    O, I, n = len(OUTPUT), len(INPUT), 8  # noqa: E741
    a, g = np.zeros((1, n, I)), np.zeros((1, n, O))
    a[0, np.arange(I), np.arange(I)] = INPUT
    g[0, np.arange(O), np.arange(O)] = OUTPUT
    W = np.arange(1.0, O * I + 1).reshape(O, I)
    squares_A, squares_G = (np.square(np.array(x, float)) for x in (INPUT, OUTPUT))
    arrays: dict[str, Array] = {
        f"weights.parameters.{LAYER}.weight": W,
        f"rows.{LAYER}.kept": np.ones((1, n), np.uint8),
        f"rows.{LAYER}.a": a,
        f"rows.{LAYER}.g": g,
        f"rows.{LAYER}.g_sampled": g,
        f"factors.{LAYER}.sum_A": np.diag(squares_A),
        f"factors.{LAYER}.n_A": np.asarray(n, np.int64),
        f"factors.{LAYER}.sum_G": np.diag(squares_G),
        f"factors.{LAYER}.n_G": np.asarray(n, np.int64),
        f"empirical.{LAYER}.sum_G": np.diag(squares_G),
        f"basis.{LAYER}.U_A": np.eye(I),
        f"basis.{LAYER}.mu": squares_A / n,
        f"basis.{LAYER}.U_G": np.eye(O),
        f"basis.{LAYER}.lam": squares_G / n,
    }
    for rho in SHARES:
        mask = select(squares_G, squares_A, rho)
        arrays[f"edits.{share_name(rho)}.{LAYER}.mask"] = mask.astype(np.uint8)
        arrays[f"edits.{share_name(rho)}.{LAYER}.weight"] = W * mask
    routes = ("written down", "squares of small integers, and powers of two")
    checks = tuple(Check(name, routes, 0.0, 0.0, 0.0, "analytic") for name in arrays)
    return Case(
        id="analytic_v1", area="analytic", result=VALID, arrays=arrays, checks=checks,
        reason="rows along the axes: every number by hand; equal eigenvalues and tied pairs",
        needs=("sums", "basis", "edits"), method=dict(rho=list(SHARES), dtype="float64"),
    )  # fmt: skip
