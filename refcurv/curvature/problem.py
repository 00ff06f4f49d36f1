"""A loss as a function of named parameters: what exact curvature stands on.

`Problem` is the whole interface. The transformer is one (`problem`); tests put linear nets and
MLPs in its place, for which theory says what the curvature must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    require_dtype,
    require_finite,
    require_shape,
    require_token_ids,
)
from refcurv.model import transformer
from refcurv.model.config import Model, ModelConfig
from refcurv.model.layers import Saved
from refcurv.model.loss import (
    cross_entropy,
    draw_labels,
    hessian_product,
    reached,
    root_product,
    shift_labels,
    uniforms,
)
from refcurv.model.transformer import Parameters, Slope, Tap


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum of independent terms, one per loss position n, of the outputs z (N, V).

    Fields:
        terms: z → (nats (N,), their gradient ∂L/∂z (N, V)); analytic, also of complex z.
        hessian: (z, v (N, V)) → (∂²L/∂z²) v, term by term.
        root: (z, e (N, V)) → S e with S Sᵀ = ∂²L/∂z², term by term.
        drawn: (z, seed, draw) → ∂L/∂z against labels drawn from the model (SAMPLING).
    """

    terms: Callable[[Array], tuple[Array, Array]]
    hessian: Callable[[Array, Array], Array]
    root: Callable[[Array, Array], Array]
    drawn: Callable[[Array, int, int], Array]


@dataclass(frozen=True, slots=True)
class Problem:
    """A summed loss as a function of named parameters, in the pieces that curvature is made of.

    Fields:
        parameters: {name: array}, float64 or longdouble.
        forward: parameters → (z (N, V), saved).
        backward: (parameters, saved, d_z) → the Taps of linear layers and Slopes of all else, as
            `transformer.backward` yields them, but named by their parameter. d_z is (N, V), or
            (C, N, V): C cotangents of a problem of one sequence, which take the batch's place in
            the Taps' g.
        loss: of z.
        linear: the parameters that occur in one Tap and nothing else.
        rows: a Tap's inputs (B, T, I) → those that count as rows of A and G, (n, I) (ROWS).
        split: the same problem, one independent sequence at a time.
    """

    parameters: Parameters
    forward: Callable[[Parameters], tuple[Array, Saved]]
    backward: Callable[[Parameters, Saved, Array], Iterable[Tap | Slope]]
    loss: Loss
    linear: frozenset[str]
    rows: Callable[[Array], Array]
    split: Callable[[], Iterable[Problem]]


# ------------------------------------------------------------------ the transformer as a Problem


def problem(
    model: Model,
    tokens: ArrayLike,
    labels: ArrayLike | None = None,
    segments: ArrayLike | None = None,
) -> Problem:
    """The summed nats of a model on a batch, as a Problem.

    Args:
        model: its parameters are read once, and computed with in float64 whatever its dtype.
        tokens: (B, T) integers in [0, vocabulary). Padding stands right and has no label.
        labels: (B, T) integers, negative = none; by default the next token (LABELS).
        segments: (B, T) integers, the documents of packed sequences; by default one a row.

    Raises:
        ShapeError, DTypeError, RangeError: as their names say. EmptyError: no label.
        NonFiniteError: NaN or infinity in a parameter.

    Cost: the parameters; a forward or backward holds every activation and N·V logits at once.
    Source: LOSS, LABELS, ROWS.
    Proof: tests/test_exact.py::test_gradient_is_the_transformers
    """
    config = model.config
    token_BT = _integers("tokens", tokens, None)
    require_token_ids("exact", "tokens", token_BT, config.vocabulary)
    shape = token_BT.shape
    segment_BT = (
        np.zeros(shape, np.int64) if segments is None else _integers("segments", segments, shape)
    )
    real_BT = np.ones(shape, dtype=bool)
    if labels is None:
        label_BT = shift_labels(token_BT, real_BT, segment_BT)
    else:
        label_BT = _integers("labels", labels, shape)
        require_token_ids("exact", "labels", np.maximum(label_BT, 0), config.vocabulary)
    if not (label_BT >= 0).any():
        raise EmptyError(
            f"exact: none of the {label_BT.size} labels is >= 0: without a label there is no loss "
            "to differentiate. Give longer sequences, or labels."
        )
    resident = {
        name: np.asarray(model.parameters[name], np.float64) for name in config.parameter_shapes()
    }
    for name, array in resident.items():
        require_finite("exact", f"parameter {name!r}", array)
    batch = Batch(config, token_BT, label_BT, segment_BT, np.arange(len(token_BT)))
    return of_batch(batch, resident)


@dataclass(frozen=True, slots=True)
class Batch:
    """A model's shape and the sequences that it reads; index_B as SAMPLING counts them."""

    config: ModelConfig
    token_BT: Array
    label_BT: Array
    segment_BT: Array
    index_B: Array


def of_batch(batch: Batch, parameters: Parameters) -> Problem:
    """`problem` without a check, on any Mapping of parameters: one that reads lazily stays lazy."""
    config, token_BT = batch.config, batch.token_BT
    real_BT = np.ones(token_BT.shape, dtype=bool)
    layout = transformer.layout_of(config, real_BT, batch.segment_BT)
    b_N, t_N = np.nonzero(batch.label_BT >= 0)

    def forward(parameters: Parameters) -> tuple[Array, Saved]:
        final_BTD, trace = transformer.forward(config, parameters, token_BT, layout)
        z_NV = transformer.head_logits(config, parameters, final_BTD[b_N, t_N])
        return z_NV, (final_BTD, trace, z_NV)

    def backward(parameters: Parameters, saved: Saved, d_z: Array) -> Iterator[Tap | Slope]:
        final_BTD, trace, z_NV = saved
        d_y = transformer.uncapped(config, z_NV, d_z)
        g = np.zeros((*d_z.shape[:-2], *final_BTD.shape[:2], config.vocabulary), d_y.dtype)
        g[..., b_N, t_N, :] = d_y
        g_BTV = g.reshape(-1, *g.shape[-2:])

        def steps() -> Iterator[Tap | Slope]:
            d_final_BTD = yield from transformer.linear_backward(
                config, parameters, "head", final_BTD, g_BTV
            )
            yield from transformer.backward(config, parameters, d_final_BTD, trace)

        for step in steps():
            yield (
                step if isinstance(step, Slope) else replace(step, name=config.weight_of(step.name))
            )

    def split() -> Iterator[Problem]:
        for b in range(len(token_BT)):
            if (batch.label_BT[b] >= 0).any():
                one = slice(b, b + 1)
                part = Batch(
                    config,
                    token_BT[one],
                    batch.label_BT[one],
                    batch.segment_BT[one],
                    batch.index_B[one],
                )
                yield of_batch(part, parameters)

    linear = {config.weight_of(layer) for layer in config.linear_layers()} - {"embed.weight"}
    keep_BT = reached(batch.label_BT, real_BT, batch.segment_BT, config.causal)
    loss = _cross_entropy(batch, b_N, t_N)
    return Problem(
        parameters, forward, backward, loss, frozenset(linear), lambda a: a[keep_BT], split
    )


def _cross_entropy(batch: Batch, b_N: Array, t_N: Array) -> Loss:
    """LOSS, at the labelled positions (b_N, t_N)."""
    label_N = batch.label_BT[b_N, t_N]

    def drawn(z_NV: Array, seed: int, draw: int) -> Array:
        T = batch.token_BT.shape[1]
        u_BT = np.stack([uniforms(seed, draw, int(i), T) for i in batch.index_B])
        return cross_entropy(z_NV, draw_labels(z_NV, u_BT[b_N, t_N]))[1]

    return Loss(lambda z_NV: cross_entropy(z_NV, label_N), hessian_product, root_product, drawn)


def _integers(what: str, array: ArrayLike, shape: Sequence[int] | None) -> Array:
    out = np.asarray(array)
    require_shape("exact", what, out, shape or (None, None), "(B, T)")
    require_dtype("exact", what, out, "iu", "integers")
    return out.astype(np.int64)


# ------------------------------------------------------------------ part of a layer


def of_outputs(made: Problem, weight: str, first: int, last: int) -> Problem:
    """The same problem, in which some outputs of one linear layer are a parameter of their own.

    Rows first .. last − 1 of W, a head or a few hidden units, take W's place under the name
    "WEIGHT[first:last]"; the other rows are constants. A block that is too large to be exact has
    parts that are not: the curvature of a part is that part of the block's curvature.

    Args:
        made: any Problem.
        weight: one of its linear layers'.
        first: of the rows, at least 0.
        last: behind the rows, at most d_out.

    Raises:
        ConventionError: not a linear layer's weight. RangeError: no such rows.

    Proof: tests/test_exact.py::test_a_part_of_a_layer_has_that_part_of_its_curvature
    """
    if weight not in made.linear:
        raise ConventionError(f"of_outputs: {weight!r} is not the weight of a linear layer.")
    W_OI, rows, name = made.parameters[weight], slice(first, last), f"{weight}[{first}:{last}]"
    if not 0 <= first < last <= len(W_OI):
        raise RangeError(f"of_outputs: {name} is no part of {len(W_OI)} rows.")

    def whole(parameters: Parameters) -> Parameters:
        moved = parameters[name]
        W = W_OI.astype(np.result_type(W_OI, moved))
        W[rows] = moved
        return {**parameters, weight: W}

    def forward(parameters: Parameters) -> tuple[Array, Saved]:
        return made.forward(whole(parameters))

    def backward(parameters: Parameters, saved: Saved, d_z: Array) -> Iterator[Tap | Slope]:
        for step in made.backward(whole(parameters), saved, d_z):
            if isinstance(step, Tap) and step.name == weight:
                yield Tap(name, step.a, step.g[..., rows])
            else:
                yield step

    def split() -> Iterator[Problem]:
        return (of_outputs(part, weight, first, last) for part in made.split())

    own = {other: array for other, array in made.parameters.items() if other != weight}
    return Problem(
        {**own, name: W_OI[rows]},
        forward,
        backward,
        made.loss,
        (made.linear - {weight}) | {name},
        made.rows,
        split,
    )
