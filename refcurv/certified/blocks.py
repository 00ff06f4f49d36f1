"""Dense blocks of tiny models: Hessian, GGN and Fisher of one parameter, on any kind of number.

They are the matrices of `curvature.exact`, summed over the sequences: (P, P), P the entries of one
weight, row-major (VEC). H is made of backwards along unit directions, GGN of forwards alone, and
the Fisher of plain backwards: where theory says that two of them are one, two routes agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refcurv.certified.numbers import (
    Found,
    Kind,
    Task,
    back,
    gradient,
    inputs_of,
    loss_gradient,
    sent,
)
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import Array, RangeError
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import forward, head_logits

BLOCKS: Final = ("hessian", "ggn", "fisher")
"""What is dense: the Fisher is that of the labels that FISHER says."""

DENSE: Final = 1024
"""Parameters of the largest block.  Chosen: a million balls, 200 MiB at 500 bits."""


def weights(config: ModelConfig, layers: tuple[str, ...]) -> list[str]:
    """The parameters that linear layers have as W, each once: a tied head has the embedding."""
    return list(dict.fromkeys(config.weight_of(layer) for layer in layers))


def require_small(config: ModelConfig, layers: tuple[str, ...]) -> None:
    """Raise RangeError for layers whose blocks are too large, naming those that would fit.

    Proof: tests/test_certified_blocks.py::test_a_block_too_large_is_refused
    """
    shapes = config.parameter_shapes()
    size = {name: int(np.prod(shapes[name])) for name in weights(config, layers)}
    large = max(size, key=lambda name: size[name])
    if size[large] <= DENSE:
        return
    small = [name for name, P in size.items() if P <= DENSE]
    some = f"those of {', '.join(small[:3])}{', ...' if small[3:] else ''}, or " if small else ""
    raise RangeError(
        f"certify: the block of {large!r} has {number_of(size[large], 'parameter')}; "
        f"{DENSE:,} at most are "
        f"made dense. What would fit: {some}hvp and ggnvp, a column for each unit direction."
    )


def run(kind: Kind, task: Task, number: int, one: Sequence, found: Found) -> None:
    """The blocks that are wanted, of one sequence, added to those of the others.

    Proof: tests/test_certified_blocks.py::test_what_exact_gives_lies_about_the_balls
    """
    theta = {name: kind.number(x) for name, x in task.parameters.items()}
    names = weights(task.config, task.wanted)
    if "fisher" in task.of:
        for name, F in _fishers(kind, task, number, one, theta, names).items():
            found.add(f"fisher.{name}", F)
    if {"hessian", "ggn"} & {*task.of}:
        still = {n: kind.along(x, np.zeros(x.shape)) for n, x in task.parameters.items()}
        for name in names:
            if "hessian" in task.of:
                found.add(f"hessian.{name}", _hessian(kind, task, one, still, name))
            if "ggn" in task.of:
                found.add(f"ggn.{name}", _ggn(kind, task, one, theta, still, name))


def _units(kind: Kind, task: Task, still: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """All parameters, of which one moves along each of its unit directions in turn."""
    W = task.parameters[name]
    for at in np.ndindex(W.shape):
        unit = np.zeros(W.shape)
        unit[at] = 1
        yield {**still, name: kind.along(W, unit)}


def _hessian(kind: Kind, task: Task, one: Sequence, still: Mapping[str, Any], name: str) -> Any:
    """Column by column: the gradient's derivative along each unit direction."""
    columns = []
    for along in _units(kind, task, still, name):
        final, trace = forward(task.config, along, inputs_of(kind, one), one.layout, kind.ops)
        moved = loss_gradient(kind, task, one, along, final, trace)[name]
        columns.append(kind.derivative(moved).reshape(1, -1))
    return np.concatenate(columns).T


def _ggn(
    kind: Kind,
    task: Task,
    one: Sequence,
    theta: Mapping[str, Any],
    still: Mapping[str, Any],
    name: str,
) -> Any:
    """J (diag p − p pᵀ) Jᵀ with the rows J of all unit directions, which go forward alone."""
    label_N, inputs = one.label_BT.reshape(-1), inputs_of(kind, one)

    def logits(parameters: Mapping[str, Any]) -> Any:
        final, _ = forward(task.config, parameters, inputs, one.layout, kind.ops)
        return head_logits(task.config, parameters, final.reshape(len(label_N), -1), kind.ops)

    z_NV = logits(theta)
    Jv = [kind.derivative(logits(along)) for along in _units(kind, task, still, name)]
    J = np.concatenate([v_NV.reshape(1, -1) for v_NV in Jv])
    HJ = np.concatenate([kind.hessian(z_NV, v_NV, label_N).reshape(1, -1) for v_NV in Jv])
    return J @ HJ.T


def _fishers(
    kind: Kind,
    task: Task,
    number: int,
    one: Sequence,
    theta: Mapping[str, Any],
    names: list[str],
) -> dict[str, Any]:
    """Σ vec(D) vec(D)ᵀ over segments and what each sends back, D the gradient of the weight."""
    final, trace = forward(task.config, theta, inputs_of(kind, one), one.layout, kind.ops)
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for label_BT in _by_segment(one):
        part = replace(one, label_BT=label_BT)
        for cotangent in sent(task, number, part, kind.ops):
            steps = back(kind, task, theta, label_BT >= 0, final, trace, cotangent)
            D = gradient(task.config, theta, steps)
            for name in names:
                rows[name].append(D[name].reshape(1, -1))
    stacked = {name: np.concatenate(D_CP) for name, D_CP in rows.items()}
    return {name: D_CP.T @ D_CP for name, D_CP in stacked.items()}


def _by_segment(one: Sequence) -> Iterator[Array]:
    """The labels of each segment that has one, all others taken away (VECTOR)."""
    label_BT, first_BT = one.label_BT, one.layout.first_BT
    if label_BT.shape != first_BT.shape or not (label_BT >= 0).any():  # an image; nothing at all
        yield label_BT
        return
    for first in np.unique(first_BT[label_BT >= 0]):
        yield np.where(first_BT == first, label_BT, -1)
