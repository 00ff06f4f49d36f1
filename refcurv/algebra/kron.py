"""The Kronecker block G ⊗ A, applied and dense (VEC, KRON)."""

from __future__ import annotations

import numpy as np

from refcurv.law.checks import Array, require_shape


def rvec(X: Array) -> Array:
    """Row-major vec: rvec(X)[o·I + i] = X[o, i].

    >>> rvec(np.array([[1, 2], [3, 4]]))
    array([1, 2, 3, 4])
    """
    return np.ascontiguousarray(X).reshape(-1)


def kron_apply(G: Array, A: Array, X: Array) -> Array:
    """(G ⊗ A) rvec(X), as the matrix G X A of X's shape (O, I); A and G symmetric or not.

    >>> G, A, X = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 3.0], [3.0, 1.0]]), np.eye(2)
    >>> np.array_equal(rvec(kron_apply(G, A.T, X)), kron_dense(G, A) @ rvec(X))
    True
    """
    require_shape("kron_apply", "X", X, (G.shape[1], A.shape[0]), "(O, I)")
    return np.asarray(G @ X @ A)


def kron_dense(G: Array, A: Array) -> Array:
    """G ⊗ A as a matrix (O·I, O·I): entry [o·I + i, p·I + j] = G[o, p] A[i, j].

    >>> kron_dense(np.array([[1, 2]]), np.array([[0], [5]]))
    array([[ 0,  0],
           [ 5, 10]])
    """
    return np.asarray(np.kron(G, A))


def rearranged(F: Array, shape: tuple[int, int]) -> Array:
    """R (O², I²) with R[o·O + p, i·I + j] = F[o·I + i, p·I + j]; for F = G ⊗ A, rvec(G) rvec(A)ᵀ.

    >>> G, A = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 3.0, 0.0]] * 3)
    >>> bool((rearranged(kron_dense(G, A), (2, 3)) == np.outer(G, A)).all())
    True
    """
    O, I = shape  # noqa: E741
    return F.reshape(O, I, O, I).swapaxes(1, 2).reshape(O * O, I * I)


def from_rearranged(R: Array, shape: tuple[int, int]) -> Array:
    """F (O·I, O·I) from R: the inverse of `rearranged`.

    >>> F = np.arange(36.0).reshape(6, 6)
    >>> bool((from_rearranged(rearranged(F, (2, 3)), (2, 3)) == F).all())
    True
    """
    O, I = shape  # noqa: E741
    return R.reshape(O, O, I, I).swapaxes(1, 2).reshape(O * I, O * I)
