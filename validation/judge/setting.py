"""What a setting is: a model and a corpus, what is collected, and how programs read it.

Weights are drawn, and hold numbers that bfloat16 has, so that a bfloat16 model is the same model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.images import patches
from refcurv.model.patterns import expand
from refcurv.model.sampling import draw_labels, uniforms
from refcurv.model.transformer import forward, head_logits, image_layout, layout_of

BOS, EOS = 1, 2
SEED = 0
"""Of the drawn labels, SAMPLING's."""


@dataclass(frozen=True)
class Data:
    """What a collector reads, in plain arrays.

    Fields: inputs, tokens (N, T) or images (N, C, H, W); label, the corpus's (N, T), (N, 1) of
    images, -1 none; drawn, labels drawn by SAMPLING at every position, whether labelled or not;
    real and segment (N, T), of images one segment of all positions.
    """

    inputs: Array
    label: Array
    drawn: Array
    real: Array
    segment: Array

    @property
    def images(self) -> bool:
        """Are these images?"""
        return self.inputs.ndim == 4


@dataclass(frozen=True)
class Setting:
    """What is collected, and how programs read it.

    Fields: model, corpus, layers; joint, is a bias a column of its layer's A; batch, sequences in
    one; left, do programs pad on the left, as the corpus never does; marked, are labels those of
    marked tokens, so that a token that a program adds has none; shards, the parts in which the
    rows of a factor are gathered.
    """

    model: rc.Model
    corpus: rc.Corpus
    layers: str
    joint: bool = False
    batch: int = 8
    left: bool = False
    marked: bool = False
    shards: int = 2

    @cached_property
    def data(self) -> Data:
        """The corpus as plain arrays, with the labels that SAMPLING draws."""
        label = self.corpus.label
        if self.corpus.images is None:
            inputs, real, segment = self.corpus.tokens, self.corpus.real, self.corpus.segment
        else:
            inputs = self.corpus.images
            shape = (len(inputs), self.model.config.image.positions)
            real, segment = np.ones(shape, bool), np.zeros(shape, np.int64)
        return Data(inputs, label, self._drawn(), real, segment)

    def _drawn(self) -> Array:
        config, parameters = self.model.config, self.model.parameters
        corpus, shape = self.corpus, self.corpus.label.shape
        if corpus.images is None:
            inputs, layout = corpus.tokens, layout_of(config, corpus.real, corpus.segment)
        else:
            inputs, layout = patches(config, corpus.images), image_layout(config, shape[0])
        logits = head_logits(config, parameters, forward(config, parameters, inputs, layout)[0])
        u = np.stack([uniforms(SEED, 0, n, shape[1]) for n in range(shape[0])])
        return draw_labels(logits.reshape(-1, logits.shape[-1]), u.ravel()).reshape(shape)

    @property
    def names(self) -> list[str]:
        """The layers, by name."""
        return expand(self.layers, list(self.model.config.linear_layers()))


def bfloat16(x: Array) -> Array:
    """The nearest number that bfloat16 has, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).astype(np.asarray(x).dtype)


def parameters(config: ModelConfig, seed: int) -> dict[str, Array]:
    """Every parameter, drawn."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in config.parameter_shapes().items():
        if "norm" in name and name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape) - config.norm_offset
        elif name.endswith("bias") or len(shape) == 1:
            value = rng.uniform(-0.5, 0.5, shape)
        elif name in ("embed.weight", "position.weight"):
            value = rng.normal(0, 1, shape)
        else:
            value = rng.normal(0, 1 / shape[1] ** 0.5, shape)
        out[name] = bfloat16(value)
    return out


def variant(**changed: Any) -> ModelConfig:
    """The config of a small model, with some fields changed."""
    base: dict[str, Any] = dict(
        vocabulary=23, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=32,
        norm_place="pre", qk_norm="none", norm_eps=1e-2, rope_theta=300.0, tied=False,
    )  # fmt: skip
    return ModelConfig(**{**base, **changed})


def texts(n: int, width: int, vocabulary: int, seed: int) -> Array:
    """Sequences that begin with BOS and hold EOS here and there."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(EOS, vocabulary, (n, width))
    tokens[:, 0] = BOS
    return tokens


def mask_of(length: Array, width: int) -> Array:
    """The mask of sequences so long."""
    return (np.arange(width) < length[:, None]).astype(np.uint8)


def right_padded(n: int, width: int, seed: int) -> Array:
    """The mask of sequences from a third of the width to all of it."""
    return mask_of(np.random.default_rng(seed).integers(width // 3, width + 1, n), width)
