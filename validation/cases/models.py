"""The tiny models of the stored cases: one for each feature of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.model.config import (
    Activation,
    Image,
    ModelConfig,
    Norm,
    NormPlace,
    Pool,
    QKNorm,
    Residual,
    RopeScaling,
    Scaling,
)


@dataclass(frozen=True)
class Feature:
    """A model and what it reads. Fields: name, of the case; what it is there for; both."""

    name: str
    what: str
    config: ModelConfig
    corpus: rc.Corpus

    def model(self) -> rc.Model:
        """Weights of order 1/√fan-in from a fixed seed, gains away from 1."""
        rng = np.random.default_rng([20251024, len(self.name), *self.name.encode()])
        out = {}
        for name, shape in self.config.parameter_shapes().items():
            x = rng.normal(size=shape)
            if name in ("embed.weight", "position.weight"):
                out[name] = x
            elif len(shape) == 2:
                out[name] = x * 1.5 / np.sqrt(shape[1])
            elif name.endswith("_norm.weight"):
                out[name] = 1 - self.config.norm_offset + 0.3 * x
            else:
                out[name] = 0.5 * x
        return rc.Model(self.config, out)


def _config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocabulary=7, width=6, layers=1, heads=2, kv_heads=2, head_width=4, mlp_width=5,
        norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, norm_eps=1e-5, rope_theta=100.0, tied=False,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def _tokens(seed: int, shape: tuple[int, int] = (3, 5), vocabulary: int = 7) -> Any:
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


def _own_labels(seed: int) -> Any:
    """Labels with holes, and none behind the third position of the first sequence."""
    label = np.random.default_rng([seed, 1]).integers(0, 7, (3, 5))
    label[0, 3:] = label[1, 1] = label[2, 2:4] = -1
    return label


def _images(seed: int) -> rc.Corpus:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(4, 1, 4, 4)).astype(np.float32)
    return rc.Corpus(images=images, labels=np.array([2, 0, -1, 1]))


_GPT2 = dict(
    norm=Norm.LAYER, norm_bias=True, gated=False, rope_theta=None, learned_positions=6,
    activation=Activation.GELU_TANH, biases=("q", "k", "v", "o", "up", "down"),
)  # fmt: skip
_VIT = dict(
    causal=False, norm=Norm.LAYER, norm_bias=True, gated=False, rope_theta=None,
    activation=Activation.GELU, vocabulary=4,
    biases=("patch", "q", "k", "v", "o", "up", "down", "head"),
)  # fmt: skip
_ROWS: tuple[tuple[str, str, dict[str, Any], Callable[[], rc.Corpus]], ...] = (
    ("gqa", "grouped queries; most bugs are planted here",
     dict(heads=4), lambda: rc.Corpus(_tokens(1))),
    ("llama", "RMSNorm before, rotary positions, gated SiLU; square layers",
     dict(heads=3, kv_heads=3, head_width=2), lambda: rc.Corpus(_tokens(2))),
    ("qk-norm-head", "norm of queries and keys, head by head", dict(qk_norm=QKNorm.HEAD),
     lambda: rc.Corpus(_tokens(3))),
    ("post-norm", "norm behind, queries and keys normalised over all heads (OLMo-2)",
     dict(qk_norm=QKNorm.FULL, norm_place=NormPlace.POST), lambda: rc.Corpus(_tokens(4))),
    ("parallel", "parallel residual, LayerNorm, biases, part of a head turns (GPT-NeoX)",
     dict(_GPT2, residual=Residual.PARALLEL, learned_positions=0, rope_theta=100.0, rope_width=2,
          activation=Activation.GELU), lambda: rc.Corpus(_tokens(5))),
    ("shared-norm", "attention and MLP read one norm (Phi, GPT-J)", dict(residual=Residual.SHARED),
     lambda: rc.Corpus(_tokens(6))),
    ("biases", "biases of queries, keys and values (Qwen2)", dict(biases=("q", "k", "v")),
     lambda: rc.Corpus(_tokens(7))),
    ("tied", "tied head, learned positions, LayerNorm, biases, GELU by tanh (GPT-2)",
     dict(_GPT2, tied=True), lambda: rc.Corpus(_tokens(8))),
    ("soft-caps", "soft-caps of scores and logits, norms on both sides, 1 + gain (Gemma 2)",
     dict(norm_place=NormPlace.BOTH, norm_offset=True, score_cap=0.7, logit_cap=1.5,
          score_scale=0.3, embed_scale=6**0.5, activation=Activation.GELU_TANH),
     lambda: rc.Corpus(_tokens(9))),
    ("windows", "two blocks, the first of which sees two positions (Mistral)",
     dict(layers=2, windows=(2, 0)), lambda: rc.Corpus(_tokens(10))),
    ("clip", "clipped queries, keys and values, norms without gain, ReLU (OLMo)",
     dict(qkv_clip=0.8, norm=Norm.LAYER, norm_gain=False, activation=Activation.RELU),
     lambda: rc.Corpus(_tokens(11))),
    ("llama3-rope", "stretched rotary frequencies (Llama 3.1)",
     dict(rope_scaling=RopeScaling(kind=Scaling.LLAMA3, factor=4.0, original=8, fast=4.0)),
     lambda: rc.Corpus(_tokens(12))),
    ("packed", "packed documents, which do not see one another", dict(heads=4),
     lambda: rc.Corpus(_tokens(13), segments=[[0, 0, 1, 1, 1], [0, 1, 1, 2, 2], [0] * 5])),
    ("padded", "padding on the right", dict(heads=4),
     lambda: rc.Corpus(_tokens(14), mask=np.array([[1, 1, 1, 0, 0], [1] * 5, [1, 1, 1, 1, 0]]))),
    ("labels", "labels of the corpus's own, with holes", {},
     lambda: rc.Corpus(_tokens(15), _own_labels(15))),
    ("bidirectional", "attention to both sides", dict(causal=False),
     lambda: rc.Corpus(_tokens(16), _own_labels(16))),
    ("vit-cls", "images: patches, CLS, learned positions",
     dict(_VIT, image=Image(channels=1, height=4, width=4, patch=2), learned_positions=5,
          pool=Pool.CLS), lambda: _images(17)),
    ("vit-mean", "images, the head reads the mean",
     dict(_VIT, image=Image(channels=1, height=4, width=4, patch=2, specials=()),
          learned_positions=4, pool=Pool.MEAN), lambda: _images(18)),
)  # fmt: skip

FEATURES = tuple(
    Feature(name, what, _config(**changes), corpus()) for name, what, changes, corpus in _ROWS
)
