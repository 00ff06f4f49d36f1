"""Norms that another program may have: each is a pair, as in `model.layers`."""

from __future__ import annotations

import math

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.layers import Saved, rms_norm_backward, rms_norm_forward

NO_EPS = 1e-30
"""Stands for an eps of 0: of a row of zeros, 0/0 would be NaN."""


def outside_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
    """y = gain · x / (√mean(x²) + eps)."""
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True))
    r = 1 / (root + max(eps, NO_EPS))
    return x * r * gain, (x * r, r, root, gain)


def outside_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    """Undo `outside_forward`."""
    x_hat, r, root, gain = saved
    # forward:  x_hat = x r;  r = 1/(root + eps), so that ∂r/∂x_j = −r² x_j / (D root)
    d_hat = d_y * gain
    over = np.maximum(r * root, NO_EPS)
    d_x = r * (d_hat - x_hat * (d_hat * x_hat).mean(axis=-1, keepdims=True) / over)
    return d_x, (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)


def unbiased_forward(x: Array, gain: Array, eps: float) -> tuple[Array, Saved]:
    """y = gain · x / √(Σ x²/(D − 1) + eps): the variance of a LayerNorm as samples have it."""
    share = 1 - 1 / x.shape[-1]
    return rms_norm_forward(x, gain * math.sqrt(share), eps * share)


def unbiased_backward(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    """Undo `unbiased_forward`."""
    # forward:  y = √share gain · x / √(mean(x²) + share eps), share = (D − 1)/D
    d_x, d_gain = rms_norm_backward(d_y, saved)
    return d_x, d_gain * math.sqrt(1 - 1 / d_y.shape[-1])
