"""SAMPLING beside the real numbers: which labels float64 drew, and whether balls draw the same.

SAMPLING is a law about float64 numbers. So there are two statements, never mixed: G is certified
for the labels that the law draws in float64, which are data; and of each of these labels it is said
whether the real numbers, decided by balls, give the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refcurv.algebra.balls import Balls, UndecidedError, bits, exact
from refcurv.algebra.blas import one_blas_thread
from refcurv.certified.numbers import BALLS, Task, inputs_of
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import Array, NonFiniteError
from refcurv.law.conventions import NO_LABEL
from refcurv.model.fisher import drawn_labels
from refcurv.model.sampling import uniforms
from refcurv.model.transformer import drain, forward, head_logits, head_transpose

FEWEST_BITS = 128
"""Bits with which a decision is tried first.  Chosen: u itself has 53."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The labels that SAMPLING drew in float64, beside those of the real numbers.

    Fields: law, of each sequence, (B, T), negative where the corpus has no label; real, by sequence
    and position, None where the limit of bits decides nothing.
    """

    law: Mapping[int, Array]
    real: Mapping[tuple[int, int], int | None]

    def to_json(self) -> dict[str, Any]:
        """The labels; how many the real numbers give too; [sequence, position, label] of the rest.

        Of a label that is another one the real numbers' label comes last.
        """
        law = {at: int(self.law[at[0]].reshape(-1)[at[1]]) for at in self.real}
        other = [[*at, law[at], v] for at, v in self.real.items() if v not in (None, law[at])]
        unknown = [[*at, law[at]] for at, v in self.real.items() if v is None]
        return {
            "drawn": {str(n): x.reshape(-1).tolist() for n, x in self.law.items()},
            "same": len(law) - len(other) - len(unknown),
            "other": other,
            "undecided": unknown,
        }


def drawn(task: Task, sequences: Mapping[int, Sequence], most: int) -> Drawn:
    """Draw the labels, then decide each with more bits and more, up to `most`.

    Proof: tests/test_certified_fisher.py::test_each_label_is_that_of_the_loops,
        ::test_a_label_between_two_is_undecided
    """
    law = {number: _in_float64(task, one) for number, one in sequences.items()}
    real: dict[tuple[int, int], int | None] = {
        (n, int(t)): None for n, x in law.items() for t in np.flatnonzero(x.reshape(-1) >= 0)
    }
    precision = min(FEWEST_BITS, most)
    while True:
        for n, one in sequences.items():
            if left := [t for m, t in real if m == n and real[m, t] is None]:
                real |= {(n, t): v for t, v in _in_balls(task, one, left, precision).items()}
        if precision >= most or None not in real.values():
            return Drawn(law, real)
        precision = min(most, 2 * precision)


def _in_float64(task: Task, one: Sequence) -> Array:
    """What the definition draws, (B, T)."""
    theta = {name: x.astype(np.float64) for name, x in task.parameters.items()}
    label_N = np.full(one.label_BT.size, NO_LABEL)

    def take(row_N: Array, z_NV: Array) -> Array:
        label_N[row_N] = drawn_labels(one.label_BT, one.index_B, task.seed, 0, row_N, z_NV)
        return np.zeros_like(z_NV)

    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        final, _ = forward(task.config, theta, one.inputs, one.layout)
        drain(head_transpose(task.config, theta, final, one.head_BT, take), lambda _: None)
    return label_N.reshape(one.label_BT.shape)


def _in_balls(task: Task, one: Sequence, at: list[int], precision: int) -> dict[int, int | None]:
    """The label of the real numbers at some positions, None where these bits decide nothing."""
    uniform_T = uniforms(task.seed, 0, int(one.index_B[0]), one.label_BT.shape[1])
    with bits(precision):
        theta: Any = {name: exact(x) for name, x in task.parameters.items()}
        try:
            final: Any = forward(task.config, theta, inputs_of(BALLS, one), one.layout, BALLS.ops)[
                0
            ]
        except (UndecidedError, NonFiniteError):
            return dict.fromkeys(at)
        final = final.reshape(one.label_BT.size, -1)[np.array(at)]
        z_NV: Any = head_logits(task.config, theta, final, BALLS.ops)
        return {t: label_of(z_NV[n], float(uniform_T[t])) for n, t in enumerate(at)}


def label_of(z_V: Balls, u: float) -> int | None:
    """SAMPLING of real numbers: the first v with c_v > u c_{V−1}; None where balls cannot tell."""
    top = z_V.rounded().max()
    if not math.isfinite(top):
        return None
    e_V = (z_V - exact(top)).exp()
    c, bound = exact(np.array(0)), e_V.sum() * u
    for v in range(len(z_V)):
        c = c + e_V[v]
        try:
            if (c - bound).above(0):
                return v
        except UndecidedError:
            return None
    return None
