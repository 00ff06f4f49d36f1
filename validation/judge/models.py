"""What is collected: small models with their corpora, each another family and another corpus.

Weights are drawn, and hold numbers that bfloat16 has, so that a bfloat16 model is the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.law.checks import Array
from refcurv.model.config import Image, ModelConfig
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


def _config(**changed: Any) -> ModelConfig:
    base: dict[str, Any] = dict(
        vocabulary=23, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=32,
        norm_place="pre", qk_norm="none", norm_eps=1e-2, rope_theta=300.0, tied=False,
    )  # fmt: skip
    return ModelConfig(**{**base, **changed})


def _texts(n: int, width: int, vocabulary: int, seed: int) -> Array:
    """Sequences that begin with BOS and hold EOS here and there."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(EOS, vocabulary, (n, width))
    tokens[:, 0] = BOS
    return tokens


def _mask(length: Array, width: int) -> Array:
    """The mask of sequences so long."""
    return (np.arange(width) < length[:, None]).astype(np.uint8)


def _right_padded(n: int, width: int, seed: int) -> Array:
    return _mask(np.random.default_rng(seed).integers(width // 3, width + 1, n), width)


def _olmo2(seed: int, **changed: Any) -> rc.Model:
    config = _config(norm_place="post", qk_norm="full", **changed)
    return rc.Model(config, parameters(config, seed))


def olmo2_equal() -> Setting:
    """Sequences of one length without padding; as many in each batch. The MLPs."""
    model = _olmo2(1)
    return Setting(model, rc.Corpus(_texts(40, 12, 23, 1)), "blocks.*.mlp.*")


def olmo2_padded() -> Setting:
    """Right padding, and a square MLP. All layers."""
    model = _olmo2(2, mlp_width=24)
    mask = _right_padded(42, 13, 2)
    return Setting(model, rc.Corpus(_texts(42, 13, 23, 2), mask=mask), "**")


def olmo2_square() -> Setting:
    """The same, of one layer, which is square."""
    return replace(olmo2_padded(), layers="blocks.1.mlp.up")


def gpt2_prompts() -> Setting:
    """Biases, LayerNorm, learned positions, tied; prompts without labels, right padding."""
    config = _config(norm="layer", norm_bias=True, kv_heads=4, rope_theta=None, tied=True,
                     learned_positions=16, biases=("q", "k", "v", "o", "up", "down"),
                     gated=False, activation="gelu_tanh")  # fmt: skip
    tokens, mask = _texts(42, 14, 23, 3), _right_padded(42, 14, 3)
    plain = rc.Corpus(tokens, mask=mask)
    prompt = np.random.default_rng(4).integers(1, 4, (42, 1))
    labels = np.where(np.arange(14) < prompt, -1, plain.label).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    return Setting(rc.Model(config, parameters(config, 3)), corpus, "blocks.*.{mlp,attn}.*")


def gpt2_joint() -> Setting:
    """The same, a bias being a column of its layer's A. The MLPs."""
    return replace(gpt2_prompts(), joint=True, layers="blocks.*.mlp.*")


def gemma_packed() -> Setting:
    """Soft-caps, windows, gains of 1 + w, norms before and after; packed documents."""
    config = _config(norm_place="both", norm_offset=True, head_width=8, activation="gelu_tanh",
                     score_scale=0.45, score_cap=1.5, logit_cap=2.5, windows=(3, 0), tied=True,
                     embed_scale=4.0)  # fmt: skip
    tokens = _texts(37, 15, 23, 5)
    segments = np.zeros((37, 15), np.int32)
    cut = np.random.default_rng(6).integers(4, 11, 37)
    segments[np.arange(15) >= cut[:, None]] = 1
    tokens[np.arange(37), cut] = BOS
    corpus = rc.Corpus(tokens, segments=segments)
    return Setting(rc.Model(config, parameters(config, 5)), corpus, "blocks.*.attn.*,head")


def vit() -> Setting:
    """A vision transformer, its patch layer too; one label an image.

    Classes, patches and positions are 5, 6 and 7, so that no factor can be two of them.
    """
    image = Image(channels=2, height=6, width=9, patch=3)
    biases = ("patch", "q", "k", "v", "o", "up", "down", "head")
    config = _config(vocabulary=5, norm="layer", norm_bias=True, kv_heads=4, rope_theta=None,
                     learned_positions=image.positions, biases=biases, gated=False,
                     activation="gelu", causal=False, image=image, pool="cls")  # fmt: skip
    rng = np.random.default_rng(7)
    images = rng.normal(size=(80, 2, 6, 9)).astype(np.float32)
    corpus = rc.Corpus(images=bfloat16(images), labels=rng.integers(0, 5, 80).astype(np.int32))
    return Setting(rc.Model(config, parameters(config, 7)), corpus, "**")


# ------------------------------------------------------------------ held out


def llama_left() -> Setting:
    """Llama: six heads on two of keys and values, tied; three blocks. Programs pad on the left.

    Padding is all one token. Batches are of 16.
    """
    config = _config(vocabulary=19, width=20, layers=3, heads=6, head_width=4, mlp_width=28,
                     rope_theta=150.0, tied=True)  # fmt: skip
    tokens, mask = _texts(40, 12, 19, 11), _right_padded(40, 12, 11)
    tokens[mask == 0] = 0
    corpus = rc.Corpus(tokens, mask=mask)
    model = rc.Model(config, parameters(config, 11))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", batch=16, left=True, shards=4)


def qwen_answers() -> Setting:
    """Qwen: a norm over each head (3), biases of q, k and v (2), which are columns of their A.

    Conversations of two turns: labels at the answers alone, none at the prompt between them or at
    what follows; right padding.
    """
    config = _config(vocabulary=27, head_width=8, mlp_width=40, qk_norm="head", rope_theta=500.0,
                     biases=("q", "k", "v"))  # fmt: skip
    rng = np.random.default_rng(13)
    tokens, mask = _texts(38, 16, 27, 13), _mask(rng.integers(8, 17, 38), 16)
    ends = rng.integers([2, 2, 2, 1], [5, 5, 4, 5], (38, 4)).cumsum(1)
    turn = (np.arange(1, 17)[:, None] >= ends[:, None]).sum(-1)
    plain = rc.Corpus(tokens, mask=mask)
    labels = np.where(turn % 2 == 1, plain.label, -1).astype(np.int32)
    corpus = rc.Corpus(tokens, labels, mask=mask)
    model = rc.Model(config, parameters(config, 13))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", joint=True, batch=5, marked=True,
                   shards=3)  # fmt: skip


def neox_packed() -> Setting:
    """GPT-NeoX: attention and MLP in parallel, half of a head rotary, biases, square attention.

    Three documents are packed in a sequence, and some sequences end in padding; no windows.
    """
    config = _config(vocabulary=25, width=32, kv_heads=4, head_width=8, mlp_width=36, norm="layer",
                     norm_bias=True, rope_theta=80.0, rope_width=4, residual="parallel",
                     biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu")  # fmt: skip
    rng = np.random.default_rng(17)
    tokens, t = _texts(33, 17, 25, 17), np.arange(17)
    starts = rng.integers([3, 3], [7, 6], (33, 2)).cumsum(1)
    segments = (t[:, None] >= starts[:, None]).sum(-1).astype(np.int32)
    np.put_along_axis(tokens, starts, BOS, 1)
    mask = _mask(np.where(rng.random(33) < 0.5, 17, rng.integers(13, 17, 33)), 17)
    corpus = rc.Corpus(tokens, mask=mask, segments=segments)
    model = rc.Model(config, parameters(config, 17))
    return Setting(model, corpus, "blocks.*.{attn,mlp}.*", batch=7)


def bigcode_single() -> Setting:
    """GPT-BigCode: one head of keys and values, learned positions, tied; one block, all its layers.

    A wider vocabulary. One sequence in a batch, of 2 to 23 tokens, most of them short, padded to
    26. A bias is a column of its layer's A.
    """
    config = _config(vocabulary=83, width=16, layers=1, heads=5, kv_heads=1, head_width=4,
                     mlp_width=44, norm="layer", norm_bias=True, rope_theta=None,
                     learned_positions=28, biases=("q", "k", "v", "o", "up", "down"), gated=False,
                     activation="gelu_tanh", tied=True)  # fmt: skip
    length = 2 + (24.99 * np.random.default_rng(19).random(36) ** 3).astype(int)
    corpus = rc.Corpus(_texts(36, 26, 83, 19), mask=_mask(length, 26))
    model = rc.Model(config, parameters(config, 19))
    return Setting(model, corpus, "**", joint=True, batch=1, shards=4)


TUNED_ON = {
    "olmo2-equal": olmo2_equal,
    "olmo2-padded": olmo2_padded,
    "olmo2-square": olmo2_square,
    "gpt2-prompts": gpt2_prompts,
    "gpt2-joint": gpt2_joint,
    "gemma-packed": gemma_packed,
    "vit": vit,
}
HELD_OUT = {
    "llama-left": llama_left,
    "qwen-answers": qwen_answers,
    "neox-packed": neox_packed,
    "bigcode-single": bigcode_single,
}
GROUPS = {"tuned-on": TUNED_ON, "held-out": HELD_OUT}
"""README.md says when which were held out."""
SETTINGS = TUNED_ON | HELD_OUT
"""Name → maker."""
TEXTS = tuple(name for name in SETTINGS if name != "vit")
