"""The same curvature from fewer backward passes: a loss of what the head reads.

Whatever lies below the head sees a cotangent d_z (V,) as Wᵀ d_z (D,) only. So D cotangents a
position give its expected Fisher, exactly, where `exact.fisher` takes V.
Proof: tests/test_distance.py::test_under_the_head_the_curvature_is_the_same
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from refcurv.curvature.exact import OutputLoss, Problem
from refcurv.law.checks import Array
from refcurv.model.transformer import Parameters, Slope, Tap


def under_head(made: Problem, head: str = "head.weight") -> Problem:
    """The loss as a function of f (N, D), not of the logits z = f Wᵀ; W becomes a constant.

    W must have full column rank; the rounding grows with its condition.
    """
    W_VD = made.parameters[head]
    back_DV = np.linalg.pinv(W_VD)  # back @ W = 1

    def forward(parameters: Parameters) -> tuple[Array, Any]:
        z_NV, saved = made.forward({**parameters, head: W_VD})
        return z_NV @ back_DV.T, saved

    def backward(parameters: Parameters, saved: Any, d_f: Array) -> Iterable[Tap | Slope]:
        return made.backward({**parameters, head: W_VD}, saved, d_f @ back_DV)

    def terms(f_ND: Array) -> tuple[Array, Array]:
        nats_N, d_z = made.loss.terms(f_ND @ W_VD.T)
        return nats_N, d_z @ W_VD

    def hessian(f_ND: Array, v_ND: Array) -> Array:
        return made.loss.hessian(f_ND @ W_VD.T, v_ND @ W_VD.T) @ W_VD

    @lru_cache(maxsize=1)  # for it is asked for one column after the other
    def roots(raw: bytes, shape: tuple[int, int]) -> Array:
        f_ND = np.frombuffer(raw).reshape(shape)
        columns = [hessian(f_ND, np.tile(e, (len(f_ND), 1))) for e in np.eye(shape[1])]
        values_ND, U_NDD = np.linalg.eigh(np.stack(columns, axis=-1))
        return np.asarray(U_NDD * np.sqrt(np.maximum(values_ND, 0))[:, None, :])

    def root(f_ND: Array, e_ND: Array) -> Array:
        return np.asarray((roots(f_ND.tobytes(), f_ND.shape) @ e_ND[:, :, None])[:, :, 0])

    def drawn(f_ND: Array, seed: int, draw: int) -> Array:
        return made.loss.drawn(f_ND @ W_VD.T, seed, draw) @ W_VD

    def signed_root(f_ND: Array, seed: int, draw: int) -> Array:
        return made.loss.signed_root(f_ND @ W_VD.T, seed, draw) @ W_VD

    def split() -> Iterator[Problem]:
        return (under_head(part, head) for part in made.split())

    return replace(
        made,
        parameters={name: array for name, array in made.parameters.items() if name != head},
        forward=forward,
        backward=backward,
        loss=OutputLoss(terms, hessian, root, drawn, signed_root),
        linear=made.linear - {head},
        split=split,
    )
