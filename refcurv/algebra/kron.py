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
