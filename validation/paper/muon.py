"""The two optimisers: Muon for the hidden matrices, AdamW for the rest. Pure functions.

Source: Muon, K. Jordan et al. 2024, github.com/KellerJordan/Muon; AdamW, arXiv 1711.05101.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of p(s) = a s + b s³ + c s⁵: steep at 0, and near 1 on the rest of [0, 1]."""

_TINY = 1e-7


def orthogonalise(G: Array, steps: int = 5) -> Array:
    """U p(p(..p(S))) Vᵀ of G = U S Vᵀ: nearly the orthogonal matrix U Vᵀ, without an SVD.

    Each step applies the polynomial to the singular values: X ← a X + (b A + c A²) X, A = X Xᵀ.
    Singular values end in about [0.7, 1.2].
    """
    a, b, c = _QUINTIC
    tall = G.shape[0] > G.shape[1]
    X = G.T if tall else G
    X = X / (np.sqrt((X * X).sum()) + _TINY)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.T if tall else X


def muon(
    W: Array, gradient: Array, momentum: Array, rate: float, decay: float, beta: float = 0.95
) -> tuple[Array, Array]:
    """One Muon step with Nesterov momentum and decoupled weight decay: new W, new momentum.

    Tall matrices step further, by sqrt(rows / columns), so that outputs move alike.
    """
    momentum = beta * momentum + gradient
    step = orthogonalise(gradient + beta * momentum)
    scale = rate * max(1.0, W.shape[0] / W.shape[1]) ** 0.5
    return W * (1 - rate * decay) - scale * step, momentum


def adamw(
    w: Array,
    gradient: Array,
    moments: tuple[Array, Array],
    step: int,
    rate: float,
    decay: float,
    betas: tuple[float, float] = (0.9, 0.97),
    eps: float = 1e-8,
) -> tuple[Array, tuple[Array, Array]]:
    """AdamW step number `step`, counted from 1: new w, new first and second moment."""
    first = betas[0] * moments[0] + (1 - betas[0]) * gradient
    second = betas[1] * moments[1] + (1 - betas[1]) * gradient * gradient
    mean = first / (1 - betas[0] ** step)
    root = np.sqrt(second / (1 - betas[1] ** step)) + eps
    return w * (1 - rate * decay) - rate * mean / root, (first, second)
