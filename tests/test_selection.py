"""The fast cut equals the definition of SELECT, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_staircase import RHO, spectra

from refcurv.algebra.selection import select
from refcurv.algebra.staircase import cut


@given(spectra(), spectra(), RHO, st.integers(-200, 200))
def test_the_cut_is_the_selection(lam: np.ndarray, mu: np.ndarray, rho: float, k: int) -> None:
    mask = select(lam, mu, rho)
    assert (cut(lam, mu, rho).mask(len(mu)) == mask).all()
    assert (select(lam, np.ldexp(mu, k), rho) == mask).all()  # units change no pair


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_cut_with_many_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lam, mu = (-np.sort(-rng.integers(0, 5, n)).astype(float) for n in (31, 40))
    for rho in (0.2, 0.5, 0.83, 0.999):
        assert (cut(lam, mu, rho).mask(40) == select(lam, mu, rho)).all()


TINY = 2.0**-53
ROUNDED = {
    "a prefix is rounded once": ([1], [1, TINY, TINY, TINY, TINY], 1 - TINY, [3]),
    "so is a mass": ([1, TINY, TINY, TINY, TINY], [1], 1 - TINY, [1, 1, 1, 0, 0]),
    "rho times lambda first: 3.0000000000000004": ([3], [1] * 10, 0.1, [2]),
    "everything": ([2, 1, 0], [1, 0], 1, [2, 2, 2]),
    "nothing": ([2, 1, 0], [1, 0], 0, [0, 0, 0]),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_where_a_rounding_decides(case: str) -> None:
    left, right, rho, counts = ROUNDED[case]
    lam, mu = np.array(left, float), np.array(right, float)
    assert select(lam, mu, rho).sum(axis=1).tolist() == counts
    assert cut(lam, mu, rho).counts.tolist() == counts


def test_by_hand() -> None:
    """Keys 6 3 2 4 2 4/3, of mass 55/3: 6 + 4 is more than half of it."""
    mask = select(np.array([3.0, 2.0]), np.array([2.0, 1.0, 2 / 3]), 0.5)
    assert mask.tolist() == [[True, False, False], [True, False, False]]
