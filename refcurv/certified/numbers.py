"""What is certified, computed on any kind of number: balls, float64, float32, longdouble.

There is one transformer and one way through it. A kind of number says how parameters become its
numbers, on which layer functions they run, and how a derivative along a direction is taken: by
dual numbers of balls, by a complex step of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import exact
from refcurv.algebra.duals import Duals
from refcurv.certified import layers
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import Array
from refcurv.model import loss
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.gradient import slope_of
from refcurv.model.layers import DEFINITIONS, Ops
from refcurv.model.transformer import (
    Cotangent,
    Slope,
    Tap,
    Trace,
    backward,
    drain,
    forward,
    head_logits,
    head_transpose,
)

OF: Final = ("logits", "nats", "gradient", "A", "G", "hvp", "ggnvp")
"""What can be certified. A and G are those of the corpus's labels (`empirical`)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of number.

    Fields:
        name: "balls" or a dtype. ops: its layer functions.
        number: an array of floats → its numbers. along: (x, v) → x with a derivative along v.
        value, derivative: of what came out of a run on such numbers.
        hessian: (logits, v, labels) → (diag p − p pᵀ) v per row, 0 where there is no label.
    """

    name: str
    ops: Ops
    number: Callable[[Array], Any]
    along: Callable[[Array, Array], Any]
    value: Callable[[Any], Any]
    derivative: Callable[[Any], Any]
    hessian: Callable[[Any, Any, Array], Any]


BALLS: Final = Kind(
    "balls",
    layers.BALLS,
    exact,
    lambda x, v: Duals(exact(x), exact(v)),
    lambda x: x.value,
    lambda x: x.derivative,
    layers.hessian_product,
)


def floats(dtype: str) -> Kind:
    """float64, float32 or longdouble, on the definitions of `model.layers`."""
    real = np.dtype(dtype)
    step = real.type(2.0) ** (-30 if real == np.float32 else -100)  # its square is lost beside 1

    def along(x: Array, v: Array) -> Array:
        return np.asarray(x.astype(real) + 1j * step * v.astype(real))

    def hessian(z_NV: Array, v_NV: Array, label_N: Array) -> Array:
        return np.asarray(loss.hessian_product(z_NV, v_NV) * (label_N >= 0)[:, None])

    return Kind(
        dtype, DEFINITIONS, lambda x: x.astype(real), along,
        lambda x: x.real, lambda x: x.imag / step, hessian,
    )  # fmt: skip


@dataclass(slots=True)
class Found:
    """What sequences gave: {name: array of numbers}, and rows of the sums for A and G.

    terms: how many matrices a aᵀ or g gᵀ each sum has at most, which bounds its rank.
    """

    arrays: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, S: Any, rows: int) -> None:
        """A part of the sum that `name` is."""
        self.sums[name] = self.sums[name] + S if name in self.sums else S
        self.rows[name] = self.rows.get(name, 0) + rows

    def means(self) -> Iterator[tuple[str, Any]]:
        """A and G: sums over rows, divided by how many rows there are."""
        for name, S in self.sums.items():
            yield name, S / self.rows[name]


@dataclass(frozen=True, slots=True)
class Task:
    """What is wanted of which sequences.

    Fields: config; parameters, floats; of, names of OF or of `spectra.OF`; wanted, linear layers
    for A and G; direction, {parameter: array}, for the products; rho, {layer: share}, for cuts.
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    of: tuple[str, ...]
    wanted: tuple[str, ...]
    direction: Mapping[str, Array]
    rho: Mapping[str, float] = field(default_factory=dict)

    @property
    def spectral(self) -> bool:
        """Are eigenvalues wanted?"""
        return bool({*SPECTRA} & {*self.of})


def run(kind: Kind, task: Task, number: int, one: Sequence, found: Found) -> None:
    """All that is wanted of one sequence, into `found`; its arrays are called "nats.3" and so on.

    Proof: tests/test_certified.py::test_more_bits_give_smaller_balls_inside
    """
    theta: dict[str, Any] = {}
    if {*task.of} != {"hvp"}:
        theta = {name: kind.number(x) for name, x in task.parameters.items()}
    if {"logits", "nats", "gradient", "A", "G"} & {*task.of}:
        _plain(kind, task, number, one, theta, found)
    if {"hvp", "ggnvp"} & {*task.of}:
        along = {n: kind.along(x, task.direction[n]) for n, x in task.parameters.items()}
        _products(kind, task, number, one, theta, along, found)


def _plain(
    kind: Kind, task: Task, number: int, one: Sequence, theta: Mapping[str, Any], found: Found
) -> None:
    config, ops = task.config, kind.ops
    final, trace = forward(config, theta, _inputs(kind, one), one.layout, ops)
    nats = np.zeros_like(final, shape=(one.label_BT.size,))
    label_N = one.label_BT.reshape(-1)

    def sent(row_N: Array, z_NV: Any) -> Any:
        nats[row_N], d_NV = ops.cross_entropy(z_NV, label_N[row_N])
        return d_NV

    steps: list[Tap | Slope] = []
    head = head_transpose(config, theta, final, one.head_BT, sent, ops)
    d_final = drain(head, steps.append)
    if "logits" in task.of:
        found.arrays[f"logits.{number}"] = head_logits(config, theta, final, ops)[0]
    if "nats" in task.of:
        found.arrays[f"nats.{number}"] = nats
    if {"gradient", "A", "G"} & {*task.of}:
        steps += backward(config, theta, d_final, trace, ops)
    if "gradient" in task.of:
        for name, d in _gradient(task, theta, steps).items():
            found.arrays[f"gradient.{number}.{name}"] = d
    _moments(task, one, steps, found)


def _inputs(kind: Kind, one: Sequence) -> Any:
    return one.inputs if one.inputs.dtype.kind in "iu" else kind.number(one.inputs)


def _gradient(task: Task, theta: Mapping[str, Any], steps: list[Tap | Slope]) -> dict[str, Any]:
    """By parameter: Σ g aᵀ of linear layers; a tied table receives the head's too."""
    out: dict[str, Any] = {name: np.zeros_like(x) for name, x in theta.items()}
    for step in steps:
        name, d = slope_of(task.config, step)
        out[name] = out[name] + d
    return out


def _moments(task: Task, one: Sequence, steps: list[Tap | Slope], found: Found) -> None:
    """S_A and S_G of the wanted layers over the kept rows (ROWS)."""
    for step in steps:
        if not isinstance(step, Tap) or step.name not in task.wanted or step.name in TABLES:
            continue
        a_NI, g_NO = step.a, step.g
        if step.a.ndim == 3:  # the head's are its rows alone
            keep_BT = one.keep_BT[:, -step.g.shape[1] :]
            a_NI, g_NO = step.a[keep_BT], step.g[keep_BT]
        if "A" in task.of:
            found.add(f"A.{step.name}", a_NI.T @ a_NI, len(a_NI))
        if "G" in task.of:
            found.add(f"G.{step.name}", g_NO.T @ g_NO, len(g_NO))
        for side, x in (("A", a_NI), ("G", g_NO)):  # of every pass, also where rows count once
            name = f"{side}.{step.name}"
            found.terms[name] = found.terms.get(name, 0) + len(x)


def _products(
    kind: Kind,
    task: Task,
    number: int,
    one: Sequence,
    theta: Mapping[str, Any],
    along: Mapping[str, Any],
    found: Found,
) -> None:
    """H v, from the gradient's derivative; GGN v = Jᵀ (diag p − p pᵀ) (J v)."""
    config, ops, label_N = task.config, kind.ops, one.label_BT.reshape(-1)
    inputs = _inputs(kind, one)

    def back(theta: Mapping[str, Any], final: Any, trace: Trace, sent: Cotangent) -> dict[str, Any]:
        steps: list[Tap | Slope] = []
        head = head_transpose(config, theta, final, one.label_BT >= 0, sent, ops)
        d_final = drain(head, steps.append)
        steps += backward(config, theta, d_final, trace, ops)
        return _gradient(task, theta, steps)

    final, trace = forward(config, along, inputs, one.layout, ops)
    if "hvp" in task.of:
        moved = back(along, final, trace, lambda n, z: ops.cross_entropy(z, label_N[n])[1])
        for name, d in moved.items():
            found.arrays[f"hvp.{number}.{name}"] = kind.derivative(d)
    if "ggnvp" in task.of:
        Jv = kind.derivative(head_logits(config, along, final, ops))
        Jv_NV = Jv.reshape(-1, Jv.shape[-1])
        final, trace = forward(config, theta, inputs, one.layout, ops)
        sent = back(theta, final, trace, lambda n, z: kind.hessian(z, Jv_NV[n], label_N[n]))
        for name, d in sent.items():
            found.arrays[f"ggnvp.{number}.{name}"] = d
