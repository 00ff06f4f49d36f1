"""Eigenvalues of a symmetric matrix of balls, and the subspaces of its eigenvectors, enclosed.

`refined` finds columns X that nearly are eigenvectors. `enclose` proves how near they are, whatever
they are: columns that were found badly give wide enclosures, and never false ones. For a matrix
A of real numbers, of which the balls alone are known, let M = XᵀAX, K = XᵀX and ‖K − I‖ <= ε < 1.

Eigenvalues. By Ostrowski λ_i(M) = θ_i λ_i(A), where θ_i lies between the smallest and the largest
eigenvalue of K, so within ε of 1. By Weyl λ_i(M) lies within ‖M − D‖ of the i-th largest entry of
D, a diagonal matrix.

Subspaces. Y = X K^(−1/2) has orthonormal columns. YᵀAY has the eigenvalues of A, and differs from D
by E. Take a set S of neighbouring indices. By Davis and Kahan the largest angle between the columns
S of Y and the eigenvectors S of A has a sine of at most ‖E‖/δ, where δ is the distance from the
entries S of D to the eigenvalues of A outside S. As Y is nearly X, so are the projectors.

With ‖K − I‖ <= ε each eigenvalue κ of K has |κ^(−1/2) − 1| <= ε/(√(1 − ε) (1 + √(1 − ε))), which is
at most f = ε/(1 − ε). So K^(−1/2) = I + F with ‖F‖ <= f, and
    YᵀAY − M = FM + MF + FMF                    ‖·‖ <= ‖M‖ (2f + f²),
    Y_S Y_Sᵀ − X_S X_Sᵀ = X (FΠ + ΠF + FΠF) Xᵀ    ‖·‖ <= (1 + ε)(2f + f²), Π the projector on S.
Norms are 2-norms, and are bounded by Frobenius norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from refcurv.algebra.balls import (
    Balls,
    UndecidedError,
    around_zero,
    bits,
    chosen,
    exact,
    precision,
    spread,
    zeros,
)
from refcurv.algebra.blas import eigh, one_blas_thread
from refcurv.algebra.scaling import exponent, shifted
from refcurv.law.checks import Array
from refcurv.law.words import number_of

MOST_STEPS: Final = 40
"""Steps of refinement at most.  Chosen: each doubles the digits, or parts a cluster of eigenvalues;
a search that ends early gives wide enclosures."""

FIRST_BITS: Final = 164
"""Bits of the first step.  Chosen: twice float64's, and 58 for sums and small differences."""

PATIENCE: Final = 3
"""Steps in a row that may bring no halving.  Chosen: a step that parts a cluster brings none."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues of a symmetric A, and columns near their eigenvectors.

    Fields:
        values: (n,), the i-th ball holds the i-th largest eigenvalue.
        X: (n, n) exact numbers; column i belongs to value i.
        middles: (n,) exact, descending: D.
        error: upper bound of ‖E‖. slip: upper bound of ‖Y_S Y_Sᵀ − X_S X_Sᵀ‖ for every S. Both are
            infinite if the columns are too far from orthonormal.
    """

    values: Balls
    X: Balls
    middles: Balls
    error: float
    slip: float

    @property
    def clusters(self) -> list[tuple[int, int]]:
        """(start, stop) of neighbours whose enclosures overlap, in order."""
        apart = ~self.values[:-1].overlaps(self.values[1:])
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(self.values)]
        return list(pairwise(edges))

    def angle(self, start: int, stop: int) -> float:
        """Upper bound of the sine of the largest angle between two subspaces.

        One is spanned by the eigenvectors start to stop − 1, the other by these columns of Y. It is
        infinite if the eigenvalues outside are not proved to be apart.
        """
        gaps = []
        if start > 0:
            gaps.append(self.values[start - 1] - self.middles[start])
        if stop < len(self.values):
            gaps.append(self.middles[stop - 1] - self.values[stop])
        if not gaps:
            return 0.0
        if not np.isfinite(self.error) or not all(is_positive(gap) for gap in gaps):
            return float("inf")
        return max(float((exact(np.array(self.error)) / gap).most()) for gap in gaps)

    def far(self, start: int, stop: int) -> float:
        """Upper bound of ‖P − X_S X_Sᵀ‖, P the projector on eigenvectors start to stop − 1."""
        angle = self.angle(start, stop)
        if not np.isfinite(angle + self.slip):
            return float("inf")
        return float((exact(np.array(angle)) + exact(np.array(self.slip))).most())

    @property
    def vectors(self) -> Balls:
        """(n, n) balls: each cluster's columns hold an orthonormal basis of its subspace.

        It is the one nearest to Y_S. Its distance from Y_S is 2 sin(θ/2), θ the largest angle,
        which is at most √2 sin θ; 1.5 covers that. The distance from Y to X is at most
        ‖X‖ f <= (1 + ε) f, and `slip` is twice that and more.
        """
        radius = np.zeros(len(self.values))
        for start, stop in self.clusters:
            angle = around_zero(np.array(1.5 * self.angle(start, stop)))
            radius[start:stop] = (angle + around_zero(np.array(self.slip))).most()
        top = np.abs(self.X.rounded()).argmax(axis=0)
        sign = np.where(self.X.rounded()[top, np.arange(len(top))] < 0, -1, 1)  # ORDER
        found: Balls = self.X * sign + around_zero(np.broadcast_to(radius, self.X.shape))
        return found


def is_positive(x: Balls) -> bool:
    """Is one number proved to be above 0?"""
    try:
        return bool(x.above(0))
    except UndecidedError:
        return False


def enclose(A: Balls, X: Balls, rank: int | None = None) -> Spectrum:
    """Enclose the eigenvalues of A; see the head of this file.

    Args:
        A: (n, n), balls that hold a symmetric matrix.
        X: (n, n), of which the midpoints are taken. Nothing is asked of them.
        rank: A is known to be positive semi-definite, of this rank or less: then the other
            eigenvalues are 0. ValueError where it is proved to be of a larger one.

    Cost: three products of matrices.
    Proof: tests/test_eigen_enclosures.py::test_eigenvalues_lie_in_their_balls
    """
    n = len(A)
    X = X.midpoints()
    M, K = X.T @ (A @ X), X.T @ X
    order = _diagonal(M).midpoints().descending()
    X, M = X[:, order], M[np.ix_(order, order)]
    D = _diagonal(M).midpoints()
    off, eps = norm(M - _filled(D)), norm(K - exact(np.eye(n)))
    if not eps < 1 or not np.isfinite(off):
        values, error, slip = around_zero(np.full(n, norm(A))), float("inf"), float("inf")
    else:
        values = (D + around_zero(np.full(n, off))) / (1 + around_zero(np.full(n, eps)))
        e = exact(np.array(eps))
        f = e / (1 - e)
        moved = 2 * f + f * f
        size = exact(D.most().max(initial=0.0, keepdims=True)) + exact(np.array(off))
        error = float((exact(np.array(off)) + size * moved).most()[0])
        slip = float(((1 + e) * moved).most())
    if rank is not None and rank < n:
        if not values[rank:].contains(np.zeros(n - rank)).all():
            raise ValueError(
                f"enclose: the matrix has more than {number_of(rank, 'eigenvalue')} that are not 0"
            )
        values[rank:] = zeros((n - rank,))
    return Spectrum(values, X, D, error, slip)


def norm(x: Balls) -> float:
    """Upper bound of the Frobenius norm."""
    most = x.magnitudes()
    return float((most * most).sum().sqrt().most())


def _diagonal(M: Balls) -> Balls:
    return M[np.arange(len(M)), np.arange(len(M))]


def _filled(diagonal: Balls) -> Balls:
    """The matrix of a diagonal."""
    n = len(diagonal)
    made: Balls = chosen(np.eye(n, dtype=bool), spread(diagonal, (n, n)), 0)
    return made


# ------------------------------------------------------------------ finding columns


def refined(A: Balls) -> Balls:
    """Columns (n, n), exact numbers, that are eigenvectors of A's midpoints as far as the bits go.

    They start from float64's, and are bettered until that helps no more, or until they are as good
    as the balls are small. Nothing is promised of them: `enclose` proves what they are worth.

    Cost: four products of matrices a step; two or three steps for fifty digits, ten where float64
        finds eigenvalues that are far below its eps.
    Source: Ogita and Aishima 2018, Iterative refinement for symmetric eigenvalue decomposition.
    Proof: tests/test_eigen_enclosures.py::test_steps_bring_the_digits_that_the_bits_have
    """
    near = A.rounded()
    if not np.isfinite(near).all():
        return exact(np.eye(len(near)))
    k = exponent(near)
    A = A * float(shifted(1.0, -max(-1000, min(1000, k))))
    unsure, whole = float(A.radii().max(initial=0.0)), precision()
    unsure = max(unsure, len(A) * 2.0 ** (4 - whole))  # 4 bits for sums of rounded products
    A, X = _symmetric(A), exact(_columns(near))
    best, least, idle, needed = X, float("inf"), 0, FIRST_BITS
    for _ in range(MOST_STEPS):
        with bits(min(whole, needed)):
            at = _straightened(A, X)
            idle = 0 if at.left < least / 2 else idle + 1
            if at.left < least:
                least, best = at.left, at.X
            if at.left <= unsure or idle == PATIENCE:
                break
            X = _bettered(at)
        needed = math.ceil(-4 * math.log2(min(at.left, 0.5))) + 64
    return best


def _columns(near: Array) -> Array:
    """The eigenvectors of float64, eigenvalues descending."""
    with one_blas_thread():
        return np.ascontiguousarray(eigh(near, "certify", exponent(near))[1][:, ::-1])


@dataclass(frozen=True, slots=True)
class _Step:
    """Columns, and how far they are from eigenvectors.

    Fields: X; S = XᵀAX; R = I − XᵀX; lam, the eigenvalues λ_i = S_ii/(1 − R_ii) by these columns;
    off, the norm of S beside its diagonal; left, off + ‖R‖; near (n, n), which eigenvalues are not
    apart: no further than 2 (off + ‖A‖ ‖R‖), as in the paper.
    """

    X: Balls
    S: Balls
    R: Balls
    lam: Balls
    off: float
    left: float
    near: Array


def _straightened(A: Balls, X: Balls) -> _Step:
    """Columns so near to orthonormal that this alone makes no two eigenvalues near.

    A step that parts two eigenvalues by a wide angle leaves columns that are not orthonormal, by
    the angle's square. That may be far more than the gaps that are still to be resolved.
    """
    size, last = norm(A), float("inf")
    while True:
        S, R = _symmetric(X.T @ (A @ X)), _symmetric(exact(np.eye(len(A))) - X.T @ X)
        lam, off, drift = _diagonal(S) / (1 - _diagonal(R)), _beside(S), norm(R)
        gap = np.abs((lam - lam[:, None]).rounded())
        near = gap <= 2 * (off + size * drift)
        if not (near & (gap > 2 * off)).any() or not drift < last / 2:
            return _Step(X, S, R, lam, off, off + drift, near)
        X, last = _orthonormalised(X, R), drift


def _bettered(at: _Step) -> Balls:
    """X (I + E): twice as many digits.

    Where eigenvalues are apart, E_ij = (S_ij + λ_j R_ij)/(λ_j − λ_i), else R_ij/2. Eigenvalues
    that are not apart are parted by a solution of their own, where much of S is theirs. It turns
    them all, those too that are near by way of others alone.
    """
    S, R, lam, near = at.S, at.R, at.lam, at.near.copy()
    turned = []
    for block in _blocks(near):
        inner = S[np.ix_(block, block)]
        if _beside(inner) > at.off / 64:
            near[np.ix_(block, block)] = True
            turned.append((block, inner))
    E = chosen(near, R / 2, (S + lam * R) / (lam - lam[:, None])).midpoints()
    X: Balls = (at.X + at.X @ E).midpoints()
    for block, inner in turned:
        X[:, block] = (X[:, block] @ _turned(inner)).midpoints()
    return X


def _beside(S: Balls) -> float:
    """The norm of what lies beside the diagonal."""
    return norm(chosen(np.eye(len(S), dtype=bool), 0, S))


def _orthonormalised(X: Balls, R: Balls) -> Balls:
    """X (I + R/2): twice as many digits of orthonormal columns. R = I − XᵀX."""
    made: Balls = (X + X @ R / 2).midpoints()
    return made


def _symmetric(x: Balls) -> Balls:
    """Midpoints that do not depend on which side of the diagonal rounded how."""
    mean: Balls = (x + x.T) / 2
    return mean.midpoints()


def _blocks(near: Array) -> list[Array]:
    """Sets of two indices or more that are near each other, by way of others if need be."""
    left, out = set(range(len(near))), []
    while left:
        block, new = set(), {left.pop()}
        while new:
            block |= new
            new = {*np.flatnonzero(near[list(new)].any(axis=0)).tolist()} - block
        left -= block
        if len(block) > 1:
            out.append(np.array(sorted(block)))
    return out


def _turned(inner: Balls) -> Balls:
    """Eigenvectors of a block whose eigenvalues are too near each other for float64.

    Without their mean they fill float64's digits again. The columns are made orthonormal.
    """
    mean = _diagonal(inner).mean(axis=0).midpoints()
    apart = (inner - mean * exact(np.eye(len(inner)))).rounded()
    V, last = exact(_columns(apart)), float("inf")
    while True:
        R = (exact(np.eye(len(inner))) - V.T @ V).midpoints()
        left = norm(R)
        if not left < last / 2:
            return V
        V, last = _orthonormalised(V, R), left
