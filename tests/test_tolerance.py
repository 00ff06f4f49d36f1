"""Every budget is tight: sound code uses a stated share of it, and a hundredfold one hides a fault.

One entry for each function of `law/tolerance.py` and of `budgets.py`. What the entry measures must
use at least its share, so that a budget cannot grow unseen; what it plants must be seen, and must
not be seen when the function says a hundred times as much, so that a hundredfold budget fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import budgets
import numpy as np
import pytest
import scipy.linalg
from strategies import case
from test_budgets import SMOOTH, worst

from refcurv.curvature.accumulate import add_gram
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.editing.kfac import _acceptable
from refcurv.judge import audit
from refcurv.law import tolerance
from refcurv.law.checks import NotPSDError, NotSymmetricError
from refcurv.model.gradient import loss_and_gradient

U32, TINY32 = 2.0**-24, 2.0**-149
"""float32: the unit roundoff, and the smallest number."""


def sees(id: str) -> Callable[[], bool]:
    """Does the identity of that id see the fault that test_budgets.py plants?"""
    fault = next(fault for fault in SMOOTH if fault.id == id)
    return lambda: audit._excess(worst(id, 1.0, fault)) > 1


def refuses(M: np.ndarray, rows: int, error: type[Exception]) -> bool:
    try:
        eigenbasis(M, rows, "float64", "A")
    except error:
        return True
    return False


def moment(n: int, rows: int, dtype: type = np.float64) -> np.ndarray:
    x = np.random.default_rng(n).normal(size=(rows, n)) * np.exp(-0.1 * np.arange(n))
    x = x.astype(dtype)
    return (x.T @ x).astype(np.float64)


# ------------------------------------------------------------------ the shares that are used


def spacing() -> float:
    return float(np.nextafter(np.float32(1), np.float32(2)) - 1) / tolerance.eps(np.float32)


def swallowed() -> float:
    """1 and then n half units in the last place, one after the other: none is ever added."""
    x = np.full(1001, U32, np.float32)
    x[0] = 1
    exact = x.astype(np.float64).sum()
    return (exact - float(x.cumsum()[-1])) / (tolerance.gamma(len(x), np.float32) * exact)


def product_of_roundings() -> float:
    """A hundred numbers multiplied in float32, the worst of a thousand such products."""
    x = np.random.default_rng(0).uniform(0.9, 1.1, (1000, 100)).astype(np.float32)
    exact = x.astype(np.float64).prod(axis=1)
    off = np.abs(x.cumprod(axis=1)[:, -1] / exact - 1).max()
    return float(off) / tolerance.probable(100, np.float32)


def residual() -> float:
    M = moment(20, 30)
    U, values, _ = eigenbasis(M, 30, "float64", "A")
    return float(np.linalg.norm(M @ U - U * values) / np.linalg.norm(M)) / tolerance.eigenpair(20)


def two_solvers() -> float:
    M = moment(20, 30)
    one, two = (scipy.linalg.eigh(M, driver=d, eigvals_only=True) for d in ("evd", "ev"))
    three = np.linalg.svd(M, compute_uv=False)[::-1]
    off = max(np.linalg.norm(one - other) for other in (two, three))
    return float(off / np.linalg.norm(one)) / tolerance.eigenvalues(20)


def below_zero() -> float:
    values = np.linalg.eigvalsh(moment(48, 20, np.float32))
    return float(-values[0] / values[-1]) / tolerance.negative(48, 20, np.float32)


def underflown() -> float:
    """Rows whose squares are 0.4 and 0.9 of the smallest number, and their product 0.6."""
    x = np.sqrt(np.array([[0.4, 0.9]] * 5)) * 2.0**-74.5
    M = np.zeros((2, 2), np.float32)
    for row in x.astype(np.float32):
        M += row[:, None] * row
    least = float(np.linalg.eigvalsh(M.astype(np.float64) / TINY32)[0]) * TINY32
    return -least / tolerance.underflow(2, 5, np.float32)


def two_orders() -> float:
    x = np.random.default_rng(0).normal(size=(10, 6))
    one, two = (sum(np.outer(row, row) for row in rows) for rows in (x, x[::-1]))
    A = np.tril(one) + np.triu(two, 1)
    return float(np.linalg.norm(A - A.T) / np.linalg.norm(A)) / tolerance.asymmetry(10, np.float64)


def of_a_gram(lost: float = 0.0) -> float:
    """A float32 product of 100 rows; `lost`: of the first row's weight, relative to the sum."""
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    wide = x.astype(np.float64)
    got = np.tril(add_gram(x, np.empty((3, 3), np.float32), onto=False)) * (1 - lost)
    scale = np.abs(wide).T @ np.abs(wide)
    off = np.abs(got - np.tril(wide.T @ wide)) / scale
    return float(off.max()) / budgets.gram(100, 1, np.float32)


def of_a_path(wrong: float = 0.0) -> float:
    """float32 gradients beside float64's; `wrong`: of their own size."""
    one = case()
    _, got = loss_and_gradient(one.config, one.astype(np.float32), *one.batch)
    exact = {name: x.astype(np.float64) for name, x in one.astype(np.float32).items()}
    _, want = loss_and_gradient(one.config, exact, *one.batch)
    scale = budgets.gradient_scale(one.config, exact, *one.batch)
    off = max(
        float(np.linalg.norm(got[n] * (1 + wrong) - want[n]) / np.linalg.norm(scale[n]))
        for n in want
    )
    return off / budgets.path(one.config.layers, one.token.size, np.float32)


# ------------------------------------------------------------------ what must be seen


def clear_cut() -> bool:
    """Ten budgets between two directions: no other solver exchanges them."""
    mu, one = np.array([1, 1 - 10 * 34 * 2.0**-52]), np.ones(1)
    return _acceptable(Eigenbasis(np.eye(2), mu, np.eye(1), one), 0.4) == 0


@dataclass(frozen=True)
class Entry:
    """uses: the share of the budget that `share` uses at least; `seen`: is the fault seen?"""

    uses: float
    share: Callable[[], float]
    seen: Callable[[], bool]


ENTRIES = {
    tolerance: {
        "eps": Entry(1, spacing, sees("O16")),
        "gamma": Entry(0.95, swallowed, sees("O16")),
        "probable": Entry(0.05, product_of_roundings, sees("O51")),
        "eigenpair": Entry(0.005, residual, sees("O54")),
        "eigenvalues": Entry(0.002, two_solvers, clear_cut),
        "negative": Entry(1e-4, below_zero, lambda: refuses(
            np.diag([1, -10 * 4 * 12 * 2.0**-52]), 10, NotPSDError)),
        "underflow": Entry(0.2, underflown, lambda: refuses(
            np.diag([1, -10 * 2 * 10]) * 2.0**-1074, 10, NotPSDError)),
        "asymmetry": Entry(0.01, two_orders, lambda: refuses(
            np.array([[1, 0.1], [0.1 + 10 * 11 * 2.0**-52, 1]]), 10, NotSymmetricError)),
    },
    budgets: {
        "gram": Entry(0.01, of_a_gram, lambda: of_a_gram(1e-4) > 1),
        "path": Entry(0.002, of_a_path, lambda: of_a_path(3e-4) > 1),
    },
}  # fmt: skip

EACH = [
    pytest.param(module, name, entry, id=f"{module.__name__}.{name}")
    for module, entries in ENTRIES.items()
    for name, entry in entries.items()
]


@pytest.mark.parametrize(("module", "name", "entry"), EACH)
def test_a_budget_is_used_and_a_hundred_budgets_hide_a_fault(
    module: ModuleType, name: str, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry.uses <= entry.share() <= 1
    assert entry.seen()
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *sizes: 100 * right(*sizes))
    assert not entry.seen()


@pytest.mark.parametrize("module", ENTRIES, ids=lambda module: module.__name__)
def test_every_budget_has_an_entry_and_says_what_it_bounds(module: ModuleType) -> None:
    """Its docstring has a line `Kind:`, which says which bound it is and what share is used."""
    made = {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and inspect.signature(function).return_annotation == "float"
    }
    assert made.keys() == ENTRIES[module].keys()
    for name, function in made.items():
        assert "Kind: " in (inspect.getdoc(function) or ""), name
