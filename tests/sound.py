"""Random sound models: any architecture, any corpus, weights from tiny to saturated.

A seed is a model. Nothing is wrong with any of them, so whatever an audit finds is a false alarm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from strategies import any_config, random_parameters

import refcurv as rc
from refcurv.model.config import ModelConfig, Norm, NormPlace

SIZES = (1e-3, 0.03, 1.0, 5.0, 30.0)
"""Times the usual weights: activations that hardly bend, and softmaxes with one entry of 1."""


def sound_model(seed: int) -> tuple[rc.Model, rc.Corpus]:
    """The model and the corpus of a seed."""
    rng = np.random.default_rng([20251024, seed])
    images = rng.random() < 0.2
    config = any_config(lambda options: options[rng.integers(len(options))], 3, images)
    config = _other_sizes(config, rng)
    model = rc.Model(config, _scaled(random_parameters(config, seed), rng))
    return model, (_images if images else _sequences)(config, rng)


def _other_sizes(config: ModelConfig, rng: np.random.Generator) -> ModelConfig:
    """Some wider than the space's, some of a single number; caps and epsilons that files have."""
    sizes = {"vocabulary": (1, 7, 40), "width": (1, 8, 24), "mlp_width": (1, 10)}
    fields: dict[str, object] = {
        name: int(rng.choice(n)) for name, n in sizes.items() if rng.random() < 0.5
    }
    for name, cap in (("score_cap", 50.0), ("logit_cap", 30.0), ("qkv_clip", 8.0)):
        if getattr(config, name) is not None and rng.random() < 0.5:
            fields[name] = cap
    # without an epsilon no norm may read zeros, as one behind a dead MLP would
    alone = config.norm is Norm.RMS and config.norm_place is NormPlace.PRE
    fields["norm_eps"] = float(rng.choice([0.0 if alone else 1e-6, 1e-6, config.norm_eps]))
    return replace(config, **fields)


def _scaled(parameters: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All matrices by one size, or each by its own; in some models the gains and biases too."""
    each, vectors, size = rng.random() < 0.3, rng.random() < 0.3, rng.choice(SIZES)
    out = {}
    for name, W in parameters.items():
        size = rng.choice(SIZES) if each else size
        out[name] = W * size if W.ndim == 2 or vectors else W
    return out


def _sequences(config: ModelConfig, rng: np.random.Generator) -> rc.Corpus:
    """Any length from 1; padding, packed documents, labels with holes, or nothing of these."""
    B, T = int(rng.integers(1, 6)), int(rng.choice([1, 2, 2, 3, 5, 9]))
    if config.learned_positions:
        T = min(T, config.learned_positions)
    token = rng.integers(0, config.vocabulary, (B, T))
    index = np.arange(T)
    mask = index < rng.integers(1, T + 1, (B, 1)) if rng.random() < 0.3 else None
    segments = np.cumsum(rng.random((B, T)) < 0.4, axis=1) if rng.random() < 0.3 else None
    labels = rng.integers(0, config.vocabulary, (B, T))
    if rng.random() < 0.5:
        labels[rng.random((B, T)) < 0.4] = -1
    labels[0, 0] = 0
    if mask is not None:
        labels[~mask] = -1
    corpus = rc.Corpus(token, None, mask, segments)
    if config.causal and rng.random() < 0.5 and (corpus.label >= 0).any():
        return corpus
    return rc.Corpus(token, labels, mask, segments)


def _images(config: ModelConfig, rng: np.random.Generator) -> rc.Corpus:
    assert config.image is not None
    one, N = config.image, int(rng.integers(1, 6))
    images = rng.normal(size=(N, one.channels, one.height, one.width)).astype(np.float32)
    labels = rng.integers(-1, config.vocabulary, N)
    labels[0] = 0
    return rc.Corpus(images=images, labels=labels)
