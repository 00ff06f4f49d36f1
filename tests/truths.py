"""Tiny models and corpora in which every fault can occur: what tests of the judge inject into."""

from __future__ import annotations

from functools import cache

import numpy as np
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.injected import Truth
from refcurv.model.config import Activation, Image, Norm, NormPlace, Pool, QKNorm

GPT2 = dict(
    norm=Norm.LAYER, norm_bias=True, norm_place=NormPlace.PRE, gated=False, rope_theta=None,
    qk_norm=QKNorm.NONE, learned_positions=9, activation=Activation.GELU_TANH, kv_heads=4,
    biases=("q", "k", "v", "o", "up", "down"),
)  # fmt: skip
GEMMA = dict(
    norm_place=NormPlace.BOTH, norm_offset=True, score_cap=0.7, logit_cap=1.5, head_width=4,
    score_scale=0.3, embed_scale=8**0.5, windows=(2, 0), activation=Activation.GELU_TANH,
)  # fmt: skip
VIT = dict(
    GPT2, causal=False, learned_positions=5, pool=Pool.CLS, vocabulary=4,
    image=Image(channels=1, height=4, width=4, patch=2),
    biases=("patch", "q", "k", "v", "o", "up", "down", "head"),
)  # fmt: skip

CONFIGS = {
    "gqa padded": dict(head_width=4, mlp_width=6),
    "joint bias": GPT2,
    "packed": GEMMA,
    "square": dict(heads=2, kv_heads=2, head_width=4, mlp_width=8, norm_place=NormPlace.PRE),
    "images": VIT,
}
"""What a model is there for, and its configuration beside `strategies.config`."""

LAYERS = {
    "images": "patch,blocks.1.mlp.*,head",
}


@cache
def truth(kind: str, seed: int = 0, fisher: str = "empirical", bases: bool = False) -> Truth:
    """The truth of one of CONFIGS: its parameters and tokens are drawn by the seed."""
    made = config(**CONFIGS[kind])
    model = rc.Model(made, random_parameters(made, seed))
    corpus = CORPORA.get(kind, plain)(np.random.default_rng(seed), made.vocabulary)
    layers = LAYERS.get(kind, "blocks.*.attn.{q,v},blocks.1.attn.o,blocks.1.mlp.*,head")
    factors = rc.collect(model, corpus, layers, fisher)
    joint = frozenset(n for n, one in factors.items() if one.sum_a is not None)
    joint = joint if kind == "joint bias" else frozenset()
    found = rc.decompose(factors, "joint" if joint else "separate") if bases else None
    return Truth(factors, model, corpus, found, joint)


def plain(rng: np.random.Generator, vocabulary: int) -> rc.Corpus:
    """Equal sequences, each predicting the next token."""
    return rc.Corpus(rng.integers(0, vocabulary, (8, 8)))


def padded(rng: np.random.Generator, vocabulary: int) -> rc.Corpus:
    """Many lengths, some prompts; the token that pads is also one of the text."""
    tokens, at = rng.integers(0, vocabulary, (8, 8)), np.arange(8)
    length, prompt = rng.integers(4, 9, 8)[:, None], rng.integers(0, 3, 8)[:, None]
    length[:2, 0], prompt[:2, 0] = (8, 5), (0, 2)
    tokens[at >= length] = 0
    label = np.full(tokens.shape, -1)
    label[:, :-1] = tokens[:, 1:]
    label[(at >= length - 1) | (at < prompt)] = -1
    return rc.Corpus(tokens, labels=label, mask=(at < length).astype(np.uint8))


def packed(rng: np.random.Generator, vocabulary: int) -> rc.Corpus:
    """Two documents in each sequence."""
    cut = rng.integers(2, 7, 8)[:, None]
    return rc.Corpus(rng.integers(0, vocabulary, (8, 8)), segments=(np.arange(8) >= cut) * 1)


def images(rng: np.random.Generator, vocabulary: int) -> rc.Corpus:
    """Images with a class each."""
    pixels = rng.normal(size=(12, 1, 4, 4)).astype(np.float32)
    return rc.Corpus(images=pixels, labels=rng.integers(0, vocabulary, 12))


CORPORA = {"gqa padded": padded, "joint bias": padded, "packed": packed, "images": images}
