"""Logits, loss and gradients of a Model on plain token arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.blas import one_blas_thread
from refcurv.files.corpus import Corpus
from refcurv.law.checks import Array, require_token_ids
from refcurv.model import transformer
from refcurv.model.config import Model
from refcurv.model.transformer import layout_of
from refcurv.passes.fast import FAST
from refcurv.passes.memory import final_states, resident


def logits(model: Model, tokens: ArrayLike) -> Array:
    """The logits of every position.

    Definition
        z[b, t, v], from tokens[b, :t+1] alone: p(next token = v) = softmax(z[b, t])[v].

    Args:
        model: computes in its `dtype`.
        tokens: (B, T) integers in [0, vocabulary).

    Returns:
        (B, T, V) in the model's dtype.

    Raises:
        ShapeError, DTypeError: tokens are not a matrix of integers. RangeError: ids out of range.

    Cost: one forward pass; B·T·V numbers at once.
    Source: DESIGN 4.
    Proof: tests/test_peers.py (transformers), tests/test_fast.py
    """
    token_BT, corpus = _tokens("logits", model, tokens)
    with one_blas_thread():
        parameters = resident(model)
        layout = layout_of(model.config, corpus.real, corpus.segment)
        final_BTD = final_states(model.config, parameters, token_BT, layout)
        return transformer.head_logits(model.config, parameters, final_BTD)


def loss_and_gradient(
    model: Model, tokens: ArrayLike, labels: ArrayLike | None = None
) -> tuple[float, dict[str, Array]]:
    """The summed nats over labelled positions, and their gradient for every parameter.

    Definition
        L = Σ −log p(label[b, t] | tokens[b, :t+1]) over label >= 0 (LOSS); gradient[name] = dL/dθ.

    Args:
        model: computes in its `dtype`.
        tokens: (B, T) integers in [0, vocabulary).
        labels: (B, T) integers, negative = none; by default the next token (LABELS).

    Returns:
        (L [nats], {parameter name: array of its shape}), in the model's dtype.

    Raises:
        ShapeError, DTypeError, RangeError: as `logits`, for tokens and labels.

    Cost: one forward and one backward pass, with every activation in memory.
    Source: LOSS, LABELS; DESIGN 4.
    Proof: tests/test_transformer.py::test_gradient_of_every_parameter_equals_complex_step,
        tests/test_fast.py, tests/test_peers.py (PyTorch)
    """
    token_BT, corpus = _tokens("loss_and_gradient", model, tokens, labels)
    label_BT = corpus.label
    require_token_ids(
        "loss_and_gradient", "labels", np.maximum(label_BT, 0), model.config.vocabulary
    )
    with one_blas_thread():
        layout = layout_of(model.config, corpus.real, corpus.segment)
        loss, gradient = transformer.loss_and_gradient(
            model.config, resident(model), token_BT, label_BT, layout, FAST
        )
    return float(loss), gradient


def _tokens(
    who: str, model: Model, tokens: ArrayLike, labels: ArrayLike | None = None
) -> tuple[Array, Corpus]:
    """Checked tokens, and the corpus record that checked them."""
    corpus = Corpus(np.asarray(tokens), None if labels is None else np.asarray(labels))
    require_token_ids(who, "tokens", corpus.tokens, model.config.vocabulary)
    return corpus.tokens.astype(np.int64), corpus
