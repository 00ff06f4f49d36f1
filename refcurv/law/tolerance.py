"""Error budgets, derived from dtype, size and conditioning; no bare 1e-5 anywhere.

Every budget multiplies a *scale*: the same sum with each product in absolute value (METHOD,
Budgets), never the result, which may vanish by theory or by cancellation. u is the unit roundoff,
half of eps; a dot product of n terms errs by at most gamma(n) = n u / (1 - n u) of that scale
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), in any order of summation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from refcurv.law.checks import RangeError
from refcurv.law.conventions import NEGATIVE_FACTOR

LAMBDA = 8.0
"""Standard deviations that a budget of random roundings allows: odds of 2 exp(−32) = 3e-14."""


def eps(dtype: DTypeLike) -> float:
    """Spacing of the floats at 1; of the real part for complex dtypes.

    Kind: a fact.
    """
    return float(np.finfo(dtype).eps)


def gamma(n: float, dtype: DTypeLike) -> float:
    """Bound for the relative error of a sum of n products, of the sum of their magnitudes.

    Kind: worst case, which is reached where all roundings have one sign. Where their signs are
    random, a sum uses about 1/√n of it: 1 % and less is usual.
    """
    roundings = n * eps(dtype) / 2
    if roundings >= 1:
        raise RangeError(
            f"tolerance: {n:.3g} roundings in {np.dtype(dtype)} leave no digit. Compute in "
            "float64, or on fewer rows at a time."
        )
    return roundings / (1 - roundings)


def probable(n: float, dtype: DTypeLike) -> float:
    """The error of a sum whose terms have n roundings each, over the root of its squared terms.

    Roundings are of either sign. n of them add up to about sqrt(n) u, and to more than
    LAMBDA sqrt(n) u with odds of 2 exp(−LAMBDA²/2) (Higham & Mary 2019, A new approach to
    probabilistic rounding error analysis).

    Kind: probable, eight standard deviations; 2 to 20 % is usual.
    """
    return LAMBDA * math.sqrt(n) * eps(dtype) / 2


def eigenpair(size: int, dtype: DTypeLike = np.float64) -> float:
    """|A U - U diag(mu)| over |A|, and |UᵀU - I| over |I|, of a backward stable eigensolver.

    Such a solver is exact for A + E with |E| <= p(n) eps |A|, p a "modestly growing function of n"
    (LAPACK Users' Guide, section 4.7). p = 8 n is chosen. On random matrices, also graded ones,
    LAPACK's dsyevd uses at most a third of it, at n = 3, and 0.2 % at n = 800.

    Kind: worst case, of QR and of divide and conquer, whose errors grow like √size: they use 1 to
    3 % of it. MRRR's U (dsyevr, SciPy's default) may be off by twelve of it (`curvature.checks`).
    """
    return 8 * size * eps(dtype)


def eigenvalues(size: int) -> float:
    """ACCEPTABLE: |lam' - lam| over |lam|, of two solvers of one matrix, both in 2-norm.

    Each solver's eigenvalues are those of a matrix within eigenpair(n) |A| of A. By Hoffman and
    Wielandt eigenvalues in order, as a vector, move by at most the Frobenius norm of the error.
    |A| in Frobenius norm is |lam|. 2 eps, which is 4 u, is for rounding: one in a key's product,
    three in the bound that it is compared with, (lam + e)(mu + e).

    Kind: worst case; two of LAPACK's solvers use 0.5 to 2 % of it.
    """
    return 2 * eigenpair(size) + 2 * eps(np.float64)


def negative(size: int, shard_rows: int, dtype: DTypeLike) -> float:
    """NEGATIVE: how far below zero, as a share of the largest eigenvalue, rounding can reach.

    By Weyl an eigenvalue moves by at most the 2-norm of the error E: of the products of one shard
    in `dtype`, and of the eigensolver in float64. Entry by entry |E| <= gamma(shard_rows) |X|ᵀ|X|,
    whose 2-norm is at most the trace, up to `size` times the largest eigenvalue. Roundings are of
    either sign and do not line up so. NEGATIVE_FACTOR in place of `size` is chosen:
    tests/test_eigenbasis.py observes 0.1 % of this budget.

    Kind: worst case, of the norm of the error by that of A; rounding uses 0.03 to 0.1 % of it, and
    10 % of data made for it. A moment that was stored in a shorter float lies beyond it.
    """
    return NEGATIVE_FACTOR * (shard_rows * eps(dtype) + size * eps(np.float64))


def underflow(size: int, shard_rows: int, dtype: DTypeLike) -> float:
    """NEGATIVE: how far below zero products that underflow can reach, however large the rest is.

    A product that underflows is off by at most the smallest number, an entry of a sum over rows by
    `shard_rows` of these. The 2-norm of a matrix is at most `size` times its largest entry.

    Kind: worst case, of which 30 % can be reached.
    """
    return size * shard_rows * float(np.finfo(dtype).smallest_subnormal)


def asymmetry(rows: int, dtype: DTypeLike) -> float:
    """How far A can be from symmetric: |A - Aᵀ| over |A|, its halves summed in two orders.

    A mean of `rows` products errs by gamma(rows + 1) |X|ᵀ|X| at most, and each half of A by itself.
    The Frobenius norm of |X|ᵀ|X| is at most tr A, and that at most sqrt(d) |A|. To take |A| itself
    is chosen: roundings are of either sign. What `collect` sums is symmetric to the bit.

    Kind: chosen, twice `gamma`; two orders use 1 to 5 % of it, and half if they are made to.
    """
    return 2 * gamma(rows + 1, dtype)
