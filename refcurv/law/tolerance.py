"""Error budgets, derived from dtype, size and conditioning; no bare 1e-5 anywhere.

Every budget multiplies a *scale*: the same sum with each product in absolute value (DESIGN §5),
never the result, which may vanish by theory or by cancellation. u is the unit roundoff, half of
eps; a dot product of n terms errs by at most gamma(n) = n u / (1 - n u) of that scale (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1), in any order of summation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from refcurv.law.checks import RangeError
from refcurv.law.conventions import NEGATIVE_FACTOR

LAMBDA = 8.0
"""Standard deviations that a budget of random roundings allows: odds of 3e-14."""


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
    """What n roundings on the way to each term amount to, relative to the root of their squares.

    Roundings are of either sign: n of them add up like their root (Higham & Mary 2019, A new
    approach to probabilistic rounding error analysis), and beyond LAMBDA sqrt(n) u with odds of
    2 exp(−LAMBDA²/2).

    Kind: probable, eight standard deviations; 2 to 20 % is usual.
    """
    return LAMBDA * math.sqrt(n) * eps(dtype) / 2


def eigenpair(size: int, dtype: DTypeLike = np.float64) -> float:
    """Residual |A U - U diag(mu)| over |A| and |UᵀU - I|, for a backward stable eigensolver.

    Kind: worst case. No solver states its constant, 8 is ours; LAPACK's error grows like √size, and
    uses 1 to 3 % of it.
    """
    return 8 * size * eps(dtype)


def eigenvalues(size: int) -> float:
    """ACCEPTABLE: |lam' - lam| over |lam|, of two solvers of one matrix, both in 2-norm.

    Hoffman and Wielandt: eigenvalues, in order, move by at most the Frobenius norm of the error,
    and each solver errs by its own residual. The last term is the rounding of a key's product and
    of the bounds that it is compared with.

    Kind: worst case; two of LAPACK's solvers use 0.5 to 2 % of it.
    """
    return 2 * eigenpair(size) + 2 * eps(np.float64)


def negative(size: int, shard_rows: int, dtype: DTypeLike) -> float:
    """NEGATIVE: how far below zero, as a share of the largest eigenvalue, rounding can reach.

    Weyl: an eigenvalue moves by at most the norm of the error, here of the products of one shard
    in `dtype` and of the eigensolver in float64.

    Kind: worst case, of the norm of the error by that of A; rounding uses 0.03 to 0.1 % of it. A
    moment that was stored in a shorter float lies beyond it.
    """
    return NEGATIVE_FACTOR * (shard_rows * eps(dtype) + size * eps(np.float64))


def underflow(size: int, shard_rows: int, dtype: DTypeLike) -> float:
    """NEGATIVE: how far below zero products reach that underflow, of whatever size the rest is.

    Each entry of a sum is off by at most the smallest number for each row; the norm of a matrix is
    at most its size times its largest entry.

    Kind: worst case, of which 30 % can be reached.
    """
    return size * shard_rows * float(np.finfo(dtype).smallest_subnormal)


def asymmetry(rows: int, dtype: DTypeLike) -> float:
    """|A - Aᵀ| over |A| that two orders of the same sum can differ by.

    Kind: worst case, twice `gamma`; two orders use 1 to 5 % of it.
    """
    return 2 * gamma(rows + 1, dtype)
