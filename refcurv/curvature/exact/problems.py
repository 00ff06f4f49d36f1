"""A loss as a function of named parameters: what exact curvature stands on.

`Problem` is the whole interface. The transformer is one (`problem`); tests put linear nets and
MLPs in its place, for which theory says what the curvature must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RangeError,
    as_integers,
    require_finite,
    require_token_ids,
)
from refcurv.law.conventions import Rows
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_kind
from refcurv.model.given import require_model, require_record, require_whole
from refcurv.model.images import as_images, patches, require_image_size
from refcurv.model.labels import require_labels, shift_labels
from refcurv.model.layers import Layout, Saved
from refcurv.model.loss import cross_entropy, hessian_product, root_product
from refcurv.model.rows import kept, require_rows
from refcurv.model.sampling import draw_labels, signs, uniforms
from refcurv.model.transformer import Inputs, Parameters, Slope, Tap
from refcurv.model.weights import Model, resident


@dataclass(frozen=True, slots=True)
class OutputLoss:
    """The loss as a function of the outputs z (N, V): independent terms, one per loss position n.

    Fields:
        terms: z → (nats (N,), their gradient ∂L/∂z (N, V)); analytic, also of complex z.
        hessian: (z, v (N, V)) → (∂²L/∂z²) v, term by term.
        root: (z, e (N, V)) → S e with S Sᵀ = ∂²L/∂z², term by term.
        drawn: (z, seed, draw) → ∂L/∂z against labels drawn from the model (SAMPLING).
        signed_root: (z, seed, draw) → S ε, term by term, ε the signs of SAMPLING.
    """

    terms: Callable[[Array], tuple[Array, Array]]
    hessian: Callable[[Array, Array], Array]
    root: Callable[[Array, Array], Array]
    drawn: Callable[[Array, int, int], Array]
    signed_root: Callable[[Array, int, int], Array]


@dataclass(frozen=True, slots=True)
class Problem:
    """A summed loss as a function of named parameters, in the pieces that curvature is made of.

    Fields:
        parameters: {name: array}, float64 or longdouble.
        forward: parameters → (z (N, V), saved).
        backward: (parameters, saved, d_z) → the Taps of linear layers and Slopes of all else, as
            `transformer.backward` yields them, but named by their parameter. d_z is (N, V), or
            (C, N, V): C cotangents of a problem of one segment, which take the batch's place in
            the Taps' g.
        loss: of z.
        linear: the parameters that occur in one Tap and nothing else.
        kept: a Tap → which of its positions are rows of A and G, (B, T) bool (ROWS).
        split: the same problem, one segment at a time: a document, an image, or whatever else
            shares nothing with the rest.
    """

    parameters: Parameters
    forward: Callable[[Parameters], tuple[Array, Saved]]
    backward: Callable[[Parameters, Saved, Array], Iterable[Tap | Slope]]
    loss: OutputLoss
    linear: frozenset[str]
    kept: Callable[[Tap], Array]
    split: Callable[[], Iterable[Problem]]


# ------------------------------------------------------------------ the transformer as a Problem


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Plain arrays in a Corpus's place: nothing is padded, nothing packed."""

    tokens: ArrayLike | None
    labels: ArrayLike | None
    images: ArrayLike | None
    mask: None = None
    segments: None = None


def problem(
    model: Model,
    tokens: ArrayLike | Corpus,
    labels: ArrayLike | None = None,
    *,
    rows: str = "reached",
) -> Problem:
    """The summed nats of a model on a batch, as a Problem.

    Args:
        model: its parameters are read once, and computed with in float64 whatever its dtype.
        tokens: a Corpus, which `collect` takes too, with its labels, mask and segments. Or (B, T)
            integers in [0, vocabulary), or (B, C, H, W) images of the model's size, exactly
            float32.
        labels: of plain arrays: (B, T) integers, negative = none; by default the next token
            (LABELS). (B,) of images. A Corpus has its own.
        rows: the positions that enter A and G: "reached", "labelled", "all" or "cls" (ROWS).

    Raises:
        ShapeError, DTypeError, RangeError: as their names say. EmptyError: no label.
        NonFiniteError: NaN or infinity in a parameter or an image.
        ConventionError: no labels where LABELS has no default, labels beside a Corpus, tokens for a
        model of images or the reverse, rows that the model does not have.

    Cost: the parameters; a forward or backward holds every activation and N·V logits at once.
    Source: LOSS, LABELS, ROWS.
    Proof: tests/test_problem.py::test_padded_and_packed_batches_are_collected,
        tests/test_images.py::test_exact_and_collect_agree
    """
    config = require_model("exact.problem", model).config
    choice = require_rows("exact", config, rows)
    data = _data(config, tokens, labels)
    require_labels("exact", config, data.labels is not None)
    batch = _sequences(config, data) if config.image is None else _images(config, data)
    require_token_ids("exact", "labels", np.maximum(batch.label_BT, 0), config.vocabulary)
    if not (batch.label_BT >= 0).any():
        raise EmptyError(
            f"exact: none of the {number_of(batch.label_BT.size, 'label')} is >= 0: without a "
            f"label there is no "
            "loss to differentiate. Give longer sequences, or labels."
        )
    parameters = resident(model, np.float64)
    for name, array in parameters.items():
        require_finite("exact", f"parameter {name!r}", array)
    return of_batch(batch, parameters, choice)


def _data(
    config: ModelConfig, tokens: ArrayLike | Corpus, labels: ArrayLike | None
) -> Corpus | _Arrays:
    """A Corpus that the model reads, or plain arrays in its place."""
    if not isinstance(tokens, Corpus):
        images = config.image is not None
        return _Arrays(None if images else tokens, labels, tokens if images else None)
    if labels is not None:
        raise ConventionError("exact: a Corpus has its own labels; leave labels out.")
    require_kind("exact", tokens, config)
    return tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """A model's shape and what it reads.

    Fields: inputs are tokens (B, T) or patches (B, n, C·P·P). label_BT is (B, 1) of images,
    segment_BT has the positions that the blocks see. real_BT is False on padding; None: there is
    none. index_B and start say which row of the corpus each is, and at which of its positions it
    begins (SAMPLING).
    """

    config: ModelConfig
    inputs: Inputs
    label_BT: Array
    segment_BT: Array
    index_B: Array
    real_BT: Array | None = field(default=None, kw_only=True)
    start: int = field(default=0, kw_only=True)

    @property
    def real(self) -> Array:
        """False on padding, (B, T)."""
        return np.ones(self.segment_BT.shape, bool) if self.real_BT is None else self.real_BT


def _sequences(config: ModelConfig, data: Corpus | _Arrays) -> Batch:
    token_BT = _integers("tokens", data.tokens, None)
    require_token_ids("exact", "tokens", token_BT, config.vocabulary)
    shape = token_BT.shape
    real_BT, segment_BT = np.ones(shape, bool), np.zeros(shape, np.int64)
    if data.mask is not None:
        real_BT = _integers("mask", data.mask, shape) != 0
    if data.segments is not None:
        segment_BT = _integers("segments", data.segments, shape)
    if data.labels is None:
        label_BT = shift_labels(token_BT, real_BT, segment_BT)
    else:
        label_BT = _integers("labels", data.labels, shape)
    return Batch(config, token_BT, label_BT, segment_BT, np.arange(len(token_BT)), real_BT=real_BT)


def _images(config: ModelConfig, data: Corpus | _Arrays) -> Batch:
    image_BCHW = as_images("exact", data.images)  # type: ignore[arg-type]  # whatever it is
    require_image_size("exact", image_BCHW, config)
    label_B = _integers("labels", data.labels, (len(image_BCHW),))
    return image_batch(config, image_BCHW, label_B[:, None])


def image_batch(config: ModelConfig, image_BCHW: Array, label_B1: Array) -> Batch:
    """Checked images with their labels, each one segment."""
    assert config.image is not None
    B = len(image_BCHW)
    segment_BT = np.zeros((B, config.image.positions), np.int64)
    patch_BNI = patches(config, image_BCHW)
    return Batch(config, patch_BNI, label_B1, segment_BT, np.arange(B))


def of_batch(batch: Batch, parameters: Parameters, rows: Rows = Rows.REACHED) -> Problem:
    """`problem` without a check, on any Mapping of parameters: one that reads lazily stays lazy.

    Proof: tests/test_exact.py::test_gradient_is_the_transformers
    """
    config = batch.config
    layout = transformer.layout_of(config, batch.real, batch.segment_BT)
    b_N, t_N = np.nonzero(batch.label_BT >= 0)

    def forward(parameters: Parameters) -> tuple[Array, Saved]:
        final_BTD, trace = transformer.forward(config, parameters, batch.inputs, layout)
        y_NV = transformer.linear_forward(config, parameters, "head", final_BTD[b_N, t_N])
        return transformer.capped(config, y_NV), (final_BTD, trace, y_NV)

    def backward(parameters: Parameters, saved: Saved, d_z: Array) -> Iterator[Tap | Slope]:
        final_BTD, trace, y_NV = saved
        d_y = transformer.uncapped(config, y_NV, d_z)
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
        return (of_batch(part, parameters, rows) for part in _segments(batch, layout))

    linear = {config.weight_of(layer) for layer in config.linear_layers()} - {"embed.weight"}
    keep_BT = kept(config, rows, batch.label_BT, batch.real, batch.segment_BT)

    def keep(tap: Tap) -> Array:
        if config.image is not None and tap.name == "head.weight":
            return np.asarray(batch.label_BT >= 0)
        return keep_BT[:, -tap.a.shape[1] :]  # patches stand behind the specials

    loss = _cross_entropy(batch, b_N, t_N)
    return Problem(parameters, forward, backward, loss, frozenset(linear), keep, split)


def _segments(batch: Batch, layout: Layout) -> Iterator[Batch]:
    """Each segment that has a label as a batch of its own: nothing is attended across segments."""
    for b, label_T in enumerate(batch.label_BT):
        for first in np.unique(layout.first_BT[b, np.flatnonzero(label_T >= 0)]):
            length = (batch.real[b] & (layout.first_BT[b] == first)).sum()
            at = slice(b, b + 1), slice(first, first + length)
            yield replace(
                batch,
                inputs=batch.inputs[at if batch.config.image is None else at[0]],
                label_BT=batch.label_BT[at],
                segment_BT=batch.segment_BT[at],
                index_B=batch.index_B[at[0]],
                real_BT=batch.real[at],
                start=batch.start + int(first),
            )


def _cross_entropy(batch: Batch, b_N: Array, t_N: Array) -> OutputLoss:
    """LOSS, at the labelled positions (b_N, t_N)."""
    label_N = batch.label_BT[b_N, t_N]
    index_N, place_N = batch.index_B[b_N], batch.start + t_N

    def drawn(z_NV: Array, seed: int, draw: int) -> Array:
        end = batch.start + batch.label_BT.shape[1]
        u = {int(i): uniforms(seed, draw, int(i), end) for i in batch.index_B}
        u_N = np.array([u[int(i)][t] for i, t in zip(index_N, place_N, strict=True)])
        return cross_entropy(z_NV, draw_labels(z_NV, u_N))[1]

    def signed_root(z_NV: Array, seed: int, draw: int) -> Array:
        at, V = zip(index_N, place_N, strict=True), z_NV.shape[1]
        return root_product(z_NV, np.stack([signs(seed, draw, int(i), int(t), V) for i, t in at]))

    return OutputLoss(
        terms=lambda z_NV: cross_entropy(z_NV, label_N),
        hessian=hessian_product,
        root=root_product,
        drawn=drawn,
        signed_root=signed_root,
    )


def _integers(what: str, array: ArrayLike | None, shape: Sequence[int] | None) -> Array:
    return as_integers("exact", what, array, shape or (None, None), "(B, T)")


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
    how = "rc.exact.problem(model, corpus)"
    require_record("of_outputs", "made must be a Problem", made, Problem, how)
    if not isinstance(weight, str) or weight not in made.linear:
        raise ConventionError(f"of_outputs: {weight!r} is not the weight of a linear layer.")
    for what, number in (("first", first), ("last", last)):
        require_whole("of_outputs", what, number, 0)
    W_OI, rows, name = made.parameters[weight], slice(first, last), f"{weight}[{first}:{last}]"
    if not 0 <= first < last <= len(W_OI):
        raise RangeError(f"of_outputs: {name} is no part of {number_of(len(W_OI), 'row')}.")

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
        lambda tap: made.kept(replace(tap, name=weight) if tap.name == name else tap),
        split,
    )
