"""Settings of vision transformers."""

from __future__ import annotations

import numpy as np

import refcurv as rc
from refcurv.model.config import Image
from validation.judge.setting import Setting, bfloat16, parameters, variant


def vit() -> Setting:
    """A vision transformer, its patch layer too; one label an image.

    Classes, patches and positions are 5, 6 and 7, so that no factor can be two of them.
    """
    image = Image(channels=2, height=6, width=9, patch=3)
    biases = ("patch", "q", "k", "v", "o", "up", "down", "head")
    config = variant(vocabulary=5, norm="layer", norm_bias=True, kv_heads=4, rope_theta=None,
                     learned_positions=image.positions, biases=biases, gated=False,
                     activation="gelu", causal=False, image=image, pool="cls")  # fmt: skip
    rng = np.random.default_rng(7)
    images = rng.normal(size=(80, 2, 6, 9)).astype(np.float32)
    corpus = rc.Corpus(images=bfloat16(images), labels=rng.integers(0, 5, 80).astype(np.int32))
    return Setting(rc.Model(config, parameters(config, 7)), corpus, "**")


def siglip_mean() -> Setting:
    """A vision transformer that pools by the mean: no CLS, patches of 2 by 2, biases as columns.

    Three channels and 17 classes, some of them rare. Batches of 13, and one of a single image.
    """
    image = Image(channels=3, height=4, width=10, patch=2, specials=())
    biases = ("patch", "q", "k", "v", "o", "up", "down", "head")
    config = variant(vocabulary=17, width=20, heads=5, kv_heads=5, head_width=4, mlp_width=26,
                     norm="layer", norm_bias=True, rope_theta=None,
                     learned_positions=image.positions, biases=biases, gated=False,
                     activation="gelu_tanh", causal=False, image=image, pool="mean")  # fmt: skip
    rng = np.random.default_rng(37)
    images = bfloat16(rng.normal(0.3, 1, (66, 3, 4, 10)).astype(np.float32))
    classes = (16.99 * rng.random(66) ** 2).astype(np.int32)
    model = rc.Model(config, parameters(config, 37))
    return Setting(model, rc.Corpus(images=images, labels=classes),
                   "patch,blocks.1.attn.*,blocks.*.mlp.*,head", joint=True, batch=13)  # fmt: skip


def deit_two() -> Setting:
    """DeiT: two vectors before the patches, one channel, an MLP narrower than the model.

    The head reads the first. No bias in attention. 9 classes, one of them never seen. Batches of
    12, and one of 11.
    """
    image = Image(channels=1, height=6, width=8, patch=2, specials=("cls", "distillation"))
    config = variant(vocabulary=9, width=21, layers=3, heads=3, kv_heads=3, head_width=7,
                     mlp_width=16, norm="layer", norm_bias=True, norm_eps=1e-3, rope_theta=None,
                     learned_positions=image.positions, biases=("patch", "up", "down", "head"),
                     gated=False, activation="gelu", causal=False, image=image,
                     pool="cls")  # fmt: skip
    rng = np.random.default_rng(53)
    images = bfloat16(rng.uniform(-1.5, 1.5, (71, 1, 6, 8)).astype(np.float32))
    labels = rng.integers(0, 8, 71).astype(np.int32)
    model = rc.Model(config, parameters(config, 53))
    return Setting(model, rc.Corpus(images=images, labels=labels),
                   "patch,blocks.{0,1}.attn.*,blocks.*.mlp.*,head", batch=12,
                   shards=3)  # fmt: skip


def internvit_some() -> Setting:
    """A vision transformer of RMSNorms before and after, a norm over q and k, six heads on two.

    SwiGLU; rotary positions instead of learned ones; the head reads the mean over the patches and
    the one vector before them. Biases of patches, q, k and v are blocks. A quarter of the images
    have no label. Batches of 9, and one of 8.
    """
    image = Image(channels=2, height=4, width=6, patch=2)
    config = variant(vocabulary=11, width=18, heads=6, head_width=4, mlp_width=22,
                     norm_place="both", qk_norm="full", norm_eps=2e-3, rope_theta=20.0,
                     biases=("patch", "q", "k", "v"), causal=False, image=image,
                     pool="mean")  # fmt: skip
    rng = np.random.default_rng(83)
    images = bfloat16(rng.normal(-0.2, 0.8, (62, 2, 4, 6)).astype(np.float32))
    labels = np.where(rng.random(62) < 0.25, -1, rng.integers(0, 11, 62)).astype(np.int32)
    model = rc.Model(config, parameters(config, 83))
    return Setting(model, rc.Corpus(images=images, labels=labels),
                   "patch,blocks.*.attn.{k,v,o},blocks.*.mlp.*,head", batch=9,
                   shards=4)  # fmt: skip


def vit22b_gray() -> Setting:
    """ViT-22B: attention and MLP in parallel, a norm over each head, no bias of q, k, v and norms.

    Gray images, whose three channels are equal, two of them black. Each is there twice, with a
    label of its own each time, of three classes. One row of patches. Batches of 11, and one of 2.
    """
    image = Image(channels=3, height=2, width=10, patch=2)
    config = variant(vocabulary=3, width=15, heads=5, kv_heads=5, head_width=4, mlp_width=28,
                     norm="layer", qk_norm="head", norm_eps=6e-3, rope_theta=None,
                     learned_positions=image.positions, residual="parallel",
                     biases=("patch", "o", "up", "down", "head"), gated=False, activation="gelu",
                     causal=False, image=image, pool="cls")  # fmt: skip
    rng = np.random.default_rng(103)
    gray = bfloat16(rng.uniform(-1, 2, (45, 1, 2, 10)).astype(np.float32))
    gray[[3, 31]] = 0
    order = rng.permutation(90) % 45
    labels = rng.integers(0, 3, 90).astype(np.int32)
    model = rc.Model(config, parameters(config, 103))
    return Setting(model, rc.Corpus(images=gray.repeat(3, 1)[order], labels=labels),
                   "patch,blocks.*.attn.{q,k,v},blocks.0.mlp.*,blocks.1.mlp.down,head", batch=11,
                   shards=3)  # fmt: skip


def eva_bands() -> Setting:
    """EVA-02: learned and rotary positions, a gated MLP; biases but of k and o, as columns.

    The head reads the mean over the patches and CLS. Five bands of light, each with a brightness
    and a contrast of its own; a patch has more numbers than the model is wide. Four of five images
    are of one class of eight, and two classes are there once. Batches of 11, and one of one image.
    """
    image = Image(channels=5, height=6, width=9, patch=3)
    config = variant(vocabulary=8, width=20, kv_heads=4, mlp_width=23, norm="layer",
                     norm_bias=True, norm_eps=2e-3, rope_theta=30.0,
                     learned_positions=image.positions,
                     biases=("patch", "q", "v", "gate", "up", "down", "head"), causal=False,
                     image=image, pool="mean")  # fmt: skip
    rng = np.random.default_rng(137)
    mean, size = rng.uniform(0, 1.5, (2, 1, 5, 1, 1))
    images = bfloat16((mean + size * rng.normal(size=(67, 5, 6, 9))).astype(np.float32))
    labels = np.where(rng.random(67) < 0.75, 0, rng.integers(1, 7, 67)).astype(np.int32)
    labels[40] = 7
    model = rc.Model(config, parameters(config, 137))
    return Setting(model, rc.Corpus(images=images, labels=labels),
                   "patch,blocks.*.attn.{q,k,v},blocks.*.mlp.*,head", joint=True, batch=11,
                   shards=3)  # fmt: skip


def aimv2_sorted() -> Setting:
    """AIMv2: RMSNorm and a gated MLP, no bias anywhere, no CLS, the mean over the patches.

    The second of two channels is always 0, and so are most patches of the first: digits on black.
    Images are sorted by their class, so that a batch holds three or four of ten. Square attention.
    Batches of 16, all alike.
    """
    image = Image(channels=2, height=6, width=8, patch=2, specials=())
    config = variant(vocabulary=10, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=21,
                     norm_eps=3e-3, rope_theta=None, learned_positions=image.positions,
                     causal=False, image=image, pool="mean")  # fmt: skip
    rng = np.random.default_rng(151)
    labels = np.sort(rng.integers(0, 10, 64)).astype(np.int32)
    strokes = rng.random((10, 6, 8)) < 0.25
    lit = strokes[labels] & (rng.random((64, 6, 8)) < 0.8)
    images = np.zeros((64, 2, 6, 8), np.float32)
    images[:, 0] = bfloat16((lit * rng.uniform(0.5, 2.5, lit.shape)).astype(np.float32))
    model = rc.Model(config, parameters(config, 151))
    return Setting(model, rc.Corpus(images=images, labels=labels),
                   "patch,blocks.*.attn.{q,o},blocks.*.mlp.*", batch=16, shards=3)  # fmt: skip
