"""What flows through a small model on a whole corpus: logits, and a and g of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL, Rows
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_fit, require_tokens
from refcurv.model.gradient import slope_of
from refcurv.model.images import patches
from refcurv.model.layers import DEFINITIONS, Layout, Ops
from refcurv.model.loss import cross_entropy
from refcurv.model.rows import kept
from refcurv.model.sampling import draw_labels, uniforms
from refcurv.model.transformer import Inputs, Parameters, Tap


@dataclass(frozen=True, slots=True)
class Seen:
    """A corpus as one batch.

    Fields: inputs, layout: what the forward reads. label (N, T), of images (N, 1); negative: none.
    real (N, T): False on padding. keep (N, T): the rows of A and G (ROWS).
    """

    inputs: Inputs
    layout: Layout
    label: Array
    real: Array
    keep: Array


def seen(config: ModelConfig, corpus: Corpus) -> Seen:
    """The whole corpus as one batch; refuses one that the model cannot read."""
    label = require_fit("cases", corpus, config)
    if corpus.images is not None:
        layout = transformer.image_layout(config, len(label))
        keep = kept(config, Rows.REACHED, label)
        real = np.ones(keep.shape, bool)
        return Seen(patches(config, corpus.images), layout, label, real, keep)
    real, segment = corpus.real, corpus.segment
    keep = kept(config, Rows.REACHED, label, real, segment)
    tokens = require_tokens("cases", corpus).astype(np.int64)
    return Seen(tokens, transformer.layout_of(config, real, segment), label, real, keep)


@dataclass(frozen=True, slots=True)
class Flow:
    """One forward and one backward.

    Fields: logits (N, T, V), of images (N, 1, V); taps: layer → a (N, T', I) and g (N, T', O);
    gradient: parameter → what the backward says of it.
    """

    logits: Array
    taps: dict[str, Tap]
    gradient: dict[str, Array]


Send = Callable[[Array], Array]
"""The logits (n, V) of the labelled positions → what is sent back there."""


def flow(
    config: ModelConfig, parameters: Parameters, one: Seen, send: Send, ops: Ops = DEFINITIONS
) -> Flow:
    """Forward and backward over the whole corpus; only labelled positions send anything."""
    final, trace = transformer.forward(config, parameters, one.inputs, one.layout, ops)
    y = transformer.linear_forward(config, parameters, "head", final)
    z = transformer.capped(config, y, ops)
    at, d_z = one.label >= 0, np.zeros_like(z)
    d_z[at] = send(z[at])
    taps: dict[str, Tap] = {}
    gradient: dict[str, Array] = {}

    def take(step: transformer.Tap | transformer.Slope) -> None:
        if isinstance(step, Tap):
            taps[step.name] = step
        name, d = slope_of(config, step)
        gradient[name] = gradient[name] + d if name in gradient else d

    d_y = transformer.uncapped(config, y, d_z, ops)
    head = transformer.linear_backward(config, parameters, "head", final, d_y)
    d_final = transformer.drain(head, take)
    for step in transformer.backward(config, parameters, d_final, trace, ops):
        take(step)
    return Flow(z, taps, gradient)


def against(one: Seen, label: Array) -> Send:
    """The slope of the loss against these labels."""
    return lambda z: cross_entropy(z, label[one.label >= 0])[1]


def drawn(one: Seen, logits: Array, seed: int) -> Array:
    """SAMPLING: labels drawn from the model wherever the corpus has one; draw 0."""
    out = np.full(one.label.shape, NO_LABEL, np.int64)
    for n, label in enumerate(one.label):
        at = np.flatnonzero(label >= 0)
        if len(at):
            u = uniforms(seed, 0, n, label.shape[0])
            out[n, at] = draw_labels(logits[n, at], u[at])
    return out


def nats(one: Seen, logits: Array) -> Array:
    """−log p of the label at each position, 0 where there is none."""
    out, at = np.zeros(one.label.shape), one.label >= 0
    out[at] = cross_entropy(logits[at], one.label[at])[0]
    return out


def kept_rows(one: Seen, layer: str, tap: Tap) -> Array:
    """ROWS of one layer, (N, T'): patches stand behind the specials; a head may read pooled."""
    if layer == "head" and one.label.shape[1] == tap.a.shape[1]:
        return one.keep if one.keep.shape == one.label.shape else one.label >= 0
    return one.keep[:, -tap.a.shape[1] :]
