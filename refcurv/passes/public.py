"""Logits, loss and gradients of a Model on plain arrays of tokens or images."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.blas import one_blas_thread
from refcurv.law.checks import Array, overflow_hint, require_finite
from refcurv.law.conventions import NO_LABEL
from refcurv.model import gradient as model_gradient
from refcurv.model import transformer
from refcurv.model.corpus import Corpus, require_fit, require_inputs, require_tokens
from refcurv.model.given import require_model
from refcurv.model.images import as_images, patches
from refcurv.model.labels import require_labels
from refcurv.model.layers import Layout
from refcurv.model.transformer import Inputs, image_layout, layout_of
from refcurv.model.weights import Model, resident
from refcurv.passes.fast import FAST
from refcurv.passes.forward import final_states
from refcurv.passes.held import Held


def logits(model: Model, tokens: ArrayLike) -> Array:
    """The logits of every position, or of every image.

    Definition
        z[b, t, v], from tokens[b, :t+1] alone: p(next token = v) = softmax(z[b, t])[v]. From the
        whole of tokens[b] if the model is bidirectional; of images p(class v) = softmax(z[b])[v].

    Args:
        model: computes in its `dtype`.
        tokens: (B, T) integers in [0, vocabulary), or (B, C, H, W) images (see Corpus).

    Returns:
        (B, T, V), of images (B, V), in the model's dtype.

    Raises:
        ShapeError, DTypeError: no matrix of integers, or no images of the model's size.
        RangeError: ids out of range, or more positions than the model has learned.
        NonFiniteError: NaN or infinity in an image, or on the way to the logits; names the layer.

    Cost: one forward pass; B·T·V numbers at once, and the weights of one block.
    Source: the definition of each family (validation/peers/ADDING.md).
    Proof: tests/test_peers.py (transformers), tests/test_fast.py,
        tests/test_images.py::test_logits_are_the_loops
    """
    require_model("logits", model)
    corpus = _corpus(model, tokens, None)
    require_inputs("logits", corpus, model.config)
    with one_blas_thread():
        parameters = Held(model)
        final_BTD = final_states(model.config, parameters, *_inputs(model, corpus))
        logit_BTV = transformer.head_logits(model.config, parameters, final_BTD)
        require_finite("logits", "the logits", logit_BTV, overflow_hint(logit_BTV.dtype))
        return logit_BTV if corpus.images is None else logit_BTV[:, 0]


def loss_and_gradient(
    model: Model, tokens: ArrayLike, labels: ArrayLike | None = None
) -> tuple[float, dict[str, Array]]:
    """The summed nats over labelled positions, and their gradient for every parameter.

    Definition
        L = Σ −log p(label[b, t] | tokens[b, :t+1]) over label >= 0 (LOSS); gradient[name] = dL/dθ.

    Args:
        model: computes in its `dtype`.
        tokens: (B, T) integers in [0, vocabulary), or (B, C, H, W) images (see Corpus).
        labels: (B, T) integers, negative = none; by default the next token (LABELS). (B,) of
            images.

    Returns:
        (L [nats], {parameter name: array of its shape}), in the model's dtype.

    Raises:
        ShapeError, DTypeError, RangeError, NonFiniteError: as `logits`, for tokens and labels; also
            for a loss or a gradient that is not finite.
        ConventionError: no labels, where LABELS has no default.

    Cost: one forward and one backward pass, with every activation in memory.
    Source: LOSS, LABELS.
    Proof: tests/test_fast.py, tests/test_peers.py (PyTorch),
        tests/test_images.py::test_loss_and_gradient_equal_the_complex_step
    """
    require_model("loss_and_gradient", model)
    require_labels("loss_and_gradient", model.config, labels is not None)
    corpus = _corpus(model, tokens, labels)
    label_BT = require_fit("loss_and_gradient", corpus, model.config)
    with one_blas_thread():
        inputs, layout = _inputs(model, corpus)
        loss, gradient = model_gradient.loss_and_gradient(
            model.config, resident(model), inputs, label_BT, layout, FAST
        )
    for what, array in {"the loss": loss, **gradient}.items():
        name = what if what == "the loss" else f"the gradient of {what!r}"
        require_finite("loss_and_gradient", name, array, overflow_hint(array.dtype))
    return float(loss), gradient


def _corpus(model: Model, tokens: ArrayLike, labels: ArrayLike | None) -> Corpus:
    """The record that checks arrays of what the model reads; images without labels get none."""
    if model.config.image is None:
        return Corpus(tokens, labels)  # type: ignore[arg-type]  # the record makes them arrays
    images = as_images("Corpus", tokens)
    own = np.full(len(images), NO_LABEL) if labels is None else labels
    return Corpus(images=images, labels=own)  # type: ignore[arg-type]


def _inputs(model: Model, corpus: Corpus) -> tuple[Inputs, Layout]:
    """What the forward reads, and its layout."""
    if corpus.images is None:
        token_BT = require_tokens("logits", corpus).astype(np.int64)
        return token_BT, layout_of(model.config, corpus.real, corpus.segment)
    patch_BNI = patches(model.config, corpus.images)
    return patch_BNI, image_layout(model.config, len(patch_BNI))
