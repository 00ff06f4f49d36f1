"""What is certified, computed on any kind of number: balls, float64, float32, longdouble.

There is one transformer and one way through it. A kind of number says how parameters become its
numbers, on which layer functions they run, and how a derivative along a direction is taken: by
dual numbers of balls, by a complex step of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import exact
from refcurv.algebra.duals import Duals
from refcurv.certified import layers
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model import loss
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.fisher import cotangents, labelled
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
"""What can be certified of a model of any size. G is that of the labels that FISHER says."""


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
    """What sequences gave: {name: array of numbers}, and what is a sum over all of them.

    Fields: arrays, of one sequence; sums; rows, of the sums that are divided by how many they are.
    terms, how many matrices a aᵀ or g gᵀ each A and G is the sum of at most, which bounds its rank.
    """

    arrays: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, S: Any, rows: int | None = None) -> None:
        """A part of the sum that `name` is, or of the mean over rows."""
        self.sums[name] = self.sums[name] + S if name in self.sums else S
        if rows is not None:
            self.rows[name] = self.rows.get(name, 0) + rows

    def totals(self) -> Iterator[tuple[str, Any]]:
        """Sums over the sequences; A and G are divided by how many rows there are."""
        for name, S in self.sums.items():
            yield name, S / self.rows[name] if name in self.rows else S


@dataclass(frozen=True, slots=True)
class Task:
    """What is wanted of which sequences.

    Fields: config; parameters, floats; of, names of OF, of `spectra.OF` or of `blocks.BLOCKS`;
    wanted, linear layers for A, G and blocks; direction, {parameter: array}, for the products;
    fisher and seed, whose labels G and the Fisher have; drawn, the labels of each sequence that
    SAMPLING drew, (B, T); rho, {layer: share}, for cuts.
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    of: tuple[str, ...]
    wanted: tuple[str, ...]
    direction: Mapping[str, Array]
    fisher: Fisher = Fisher.EMPIRICAL
    seed: int = 0
    drawn: Mapping[int, Array] = field(default_factory=dict)
    rho: Mapping[str, float] = field(default_factory=dict)


def sent(task: Task, number: int, one: Sequence, ops: Ops) -> Iterator[Cotangent]:
    """FISHER: what each backward pass sends back. Drawn labels are data: float64 drew them."""
    config = task.config
    if task.fisher is Fisher.SAMPLED:
        batch = task.drawn[number], one.index_B, config.vocabulary
        return cotangents(Fisher.EMPIRICAL, *batch, ops=ops)
    batch = one.label_BT, one.index_B, config.vocabulary
    return cotangents(task.fisher, *batch, task.seed, ops=ops)


def passes(task: Task, one: Sequence) -> int:
    """How many backward passes those are: V for each label of `expected`, or one."""
    many = task.config.vocabulary * len(labelled(one.label_BT))
    return max(many, 1) if task.fisher is Fisher.EXPECTED else 1


def run(kind: Kind, task: Task, number: int, one: Sequence, found: Found) -> None:
    """All that is wanted of one sequence, into `found`; its arrays are called "nats.3" and so on.

    Proof: tests/test_certified.py::test_more_bits_give_smaller_balls_inside
    """
    theta: dict[str, Any] = {}
    if {*task.of} & ({*OF} - {"hvp"}):
        theta = {name: kind.number(x) for name, x in task.parameters.items()}
    if {"logits", "nats", "gradient", "A", "G"} & {*task.of}:
        _plain(kind, task, number, one, theta, found)
    if {"hvp", "ggnvp"} & {*task.of}:
        along = {n: kind.along(x, task.direction[n]) for n, x in task.parameters.items()}
        _products(kind, task, number, one, theta, along, found)


def _plain(
    kind: Kind, task: Task, number: int, one: Sequence, theta: Mapping[str, Any], found: Found
) -> None:
    config, ops, of = task.config, kind.ops, {*task.of}
    final, trace = forward(config, theta, inputs_of(kind, one), one.layout, ops)
    nats = np.zeros_like(final, shape=(one.label_BT.size,))
    label_N = one.label_BT.reshape(-1)

    def slope(row_N: Array, z_NV: Any) -> Any:
        nats[row_N], d_NV = ops.cross_entropy(z_NV, label_N[row_N])
        return d_NV

    own = task.fisher is Fisher.EMPIRICAL  # then G is of the gradient's backward
    if of & {"nats", "gradient", "A"} or ("G" in of and own):
        wanted = bool(of & {"gradient", "A"} or ("G" in of and own))
        steps = back(kind, task, theta, one.head_BT, final, trace, slope, blocks=wanted)
        if "gradient" in of:
            for name, d in gradient(config, theta, steps).items():
                found.arrays[f"gradient.{number}.{name}"] = d
        _moments(task, one, steps, found, of & ({"A", "G"} if own else {"A"}))
    if "logits" in of:
        found.arrays[f"logits.{number}"] = head_logits(config, theta, final, ops)[0]
    if "nats" in of:
        found.arrays[f"nats.{number}"] = nats
    if "G" in of and not own:
        for count, cotangent in enumerate(sent(task, number, one, ops)):
            steps = back(kind, task, theta, one.head_BT, final, trace, cotangent)
            _moments(task, one, steps, found, {"G"}, counted=count == 0)


def inputs_of(kind: Kind, one: Sequence) -> Any:
    """Tokens, or numbers of the kind where a sequence is an image."""
    return one.inputs if one.inputs.dtype.kind in "iu" else kind.number(one.inputs)


def back(
    kind: Kind,
    task: Task,
    theta: Mapping[str, Any],
    head_BT: Array,
    final: Any,
    trace: Trace,
    cotangent: Cotangent,
    *,
    blocks: bool = True,
) -> list[Tap | Slope]:
    """The steps of a backward; without `blocks` those of the head alone."""
    steps: list[Tap | Slope] = []
    head = head_transpose(task.config, theta, final, head_BT, cotangent, kind.ops)
    d_final = drain(head, steps.append)
    return [*steps, *backward(task.config, theta, d_final, trace, kind.ops)] if blocks else steps


def gradient(
    config: ModelConfig, theta: Mapping[str, Any], steps: Iterable[Tap | Slope]
) -> dict[str, Any]:
    """By parameter: Σ g aᵀ of linear layers; a tied table receives the head's too."""
    found: dict[str, Any] = {}
    for step in steps:
        name, d = slope_of(config, step)
        found[name] = found[name] + d if name in found else d
    return {name: found[name] if name in found else np.zeros_like(x) for name, x in theta.items()}


def loss_gradient(
    kind: Kind, task: Task, one: Sequence, theta: Mapping[str, Any], final: Any, trace: Trace
) -> dict[str, Any]:
    """Of the nats of all labels, by parameter."""
    label_N = one.label_BT.reshape(-1)
    slope: Cotangent = lambda n, z: kind.ops.cross_entropy(z, label_N[n])[1]  # noqa: E731
    steps = back(kind, task, theta, one.label_BT >= 0, final, trace, slope)
    return gradient(task.config, theta, steps)


def _moments(
    task: Task,
    one: Sequence,
    steps: list[Tap | Slope],
    found: Found,
    sides: set[str],
    *,
    counted: bool = True,
) -> None:
    """S_A and S_G of the wanted layers over the kept rows (ROWS); `expected` counts them once."""
    for step in steps:
        if not isinstance(step, Tap) or step.name not in task.wanted or step.name in TABLES:
            continue
        a_NI, g_NO = step.a, step.g
        if step.a.ndim == 3:  # the head's are its rows alone
            keep_BT = one.keep_BT[:, -step.g.shape[1] :]
            a_NI, g_NO = step.a[keep_BT], step.g[keep_BT]
        for side, x in (("A", a_NI), ("G", g_NO)):
            if side in sides:
                name = f"{side}.{step.name}"
                found.add(name, x.T @ x, len(x) if counted else 0)
                found.terms[name] = found.terms.get(name, 0) + len(x)  # of every pass


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
    inputs, head_BT = inputs_of(kind, one), one.label_BT >= 0

    final, trace = forward(config, along, inputs, one.layout, ops)
    if "hvp" in task.of:
        for name, d in loss_gradient(kind, task, one, along, final, trace).items():
            found.arrays[f"hvp.{number}.{name}"] = kind.derivative(d)
    if "ggnvp" in task.of:
        Jv = kind.derivative(head_logits(config, along, final, ops))
        Jv_NV = Jv.reshape(-1, Jv.shape[-1])
        final, trace = forward(config, theta, inputs, one.layout, ops)
        bent: Cotangent = lambda n, z: kind.hessian(z, Jv_NV[n], label_N[n])  # noqa: E731
        steps = back(kind, task, theta, head_BT, final, trace, bent)
        for name, d in gradient(config, theta, steps).items():
            found.arrays[f"ggnvp.{number}.{name}"] = d
