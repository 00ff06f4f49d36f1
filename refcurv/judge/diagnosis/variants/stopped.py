"""Backward passes that stop where a program detaches a number; the forward is ours."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.layers import Saved, attention_backward, mlp_backward

SILENT: Final = MappingProxyType(
    {"attention weights detached": ("q", "k"), "gate detached": ("gate",)}
)
"""Change → the layers of a block that nothing reaches any more."""

BACKWARD: Final = frozenset({*SILENT, "norm statistics detached", "no soft-cap in the backward"})
"""Changes of the backward pass alone."""


def past_weights(d_context: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """Undo `attention_forward`, its weights taken for constants: nothing reaches q and k.

    Proof: tests/test_judge_variants.py::test_what_is_detached_is_a_constant_of_the_loops
    """
    d_q, d_k, d_v = attention_backward(d_context, saved)
    return np.zeros_like(d_q), np.zeros_like(d_k), d_v


def past_statistics(d_y: Array, saved: Saved) -> tuple[Array, Array]:
    """Undo `rms_norm_forward`, the root mean square taken for a constant.

    Proof: tests/test_judge_variants.py::test_what_is_detached_is_a_constant_of_the_loops
    """
    x_hat, r, s, gain = saved
    # forward:  y = gain * x_hat;  x_hat = x * s * r
    return d_y * gain * r * s, (d_y * x_hat).reshape(-1, gain.shape[0]).sum(axis=0)


def past_gate(d_hidden: Array, saved: Saved) -> tuple[Array | None, Array]:
    """Undo `mlp_forward`, what the gate makes taken for a constant.

    Proof: tests/test_judge_variants.py::test_what_is_detached_is_a_constant_of_the_loops
    """
    d_gate, d_up = mlp_backward(d_hidden, saved)
    return None if d_gate is None else np.zeros_like(d_gate), d_up
