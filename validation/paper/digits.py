"""Scikit-learn's digits with some labels exchanged, and a small vision transformer that learns all.

An exchanged label says nothing about any other image, so it can only be known by heart. The true
labels stay known, which makes the memorised images a test of forgetting: what is the image taken
for when its false label is gone?

A training saves its state every 200 steps and goes on from there when started again; the resumed
one has the same bits as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from refcurv import Corpus, ImagePopulation
from refcurv.model.config import Activation, Image, ModelConfig, Norm, NormPlace, Pool, QKNorm
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.images import patches
from refcurv.model.layers import DEFINITIONS, Ops
from refcurv.model.transformer import image_layout
from validation.paper.muon import adamw
from validation.paper.train import clipped
from validation.paper.trainings import Parameters, State, resume, save
from validation.paper.world import generator

Array = np.ndarray

CLASSES = 10
DARK = np.float32(-0.3)
"""The value of a pixel without ink; inked ones reach 0.7, so that the mean is near 0."""

# ------------------------------------------------------------------ chance


class Purpose(IntEnum):
    """What a random stream is for: streams of different purposes share no bit."""

    SPLIT = 0
    NOISE = 1
    ORDER = 2
    SHIFTS = 3
    WEIGHTS = 4


# ------------------------------------------------------------------ the images


@dataclass(frozen=True, slots=True)
class Digits:
    """Images in the seed's order, those for training first.

    Fields: images (N, 1, 8, 8) float32; true (N,), what they show; label (N,), what training says
    of them; train, how many are for training; noised (n,), those whose label is false, ascending.
    """

    images: Array
    true: Array
    label: Array
    train: int
    noised: Array


def read() -> tuple[Array, Array]:
    """All 1797 images (N, 8, 8) of values 0 to 16, and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("digits: the images are scikit-learn's: pip install '.[paper]'") from None
    found = load_digits()
    return found.images, found.target


def make_digits(images: Array, true: Array, seed: int, train: int, noised: int) -> Digits:
    """Split images by the seed and give `noised` of the training ones a false label.

    A false label is any of the other classes with the same chance.
    """
    order = generator(Purpose.SPLIT, seed).permutation(len(images))
    images = (images[order, None] / 16).astype(np.float32) + DARK
    true = true[order].astype(np.int32)
    rng = generator(Purpose.NOISE, seed)
    chosen = np.sort(rng.permutation(train)[:noised])
    label = true.copy()
    label[chosen] = (true[chosen] + rng.integers(1, CLASSES, size=noised)) % CLASSES
    return Digits(images, true, label, train, chosen)


def shifted(images: Array, share: float, rng: np.random.Generator) -> Array:
    """Images (B, 1, 8, 8), a share of them moved by up to one pixel each way; dark comes in."""
    moves = rng.random((len(images), 1)) < share
    row, column = np.where(moves, rng.integers(0, 3, (len(images), 2)), 1).T
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=DARK)
    window = sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    return np.ascontiguousarray(window[np.arange(len(images)), :, row, column])


def halves(digits: Digits) -> Mapping[str, Mapping[str, Array]]:
    """Split → kind → indices: every other image of its kind, to tune on or to report.

    The order is random already, so that each half is a random one. Of the many clean images only
    every other one is asked at all: their accuracy is near 1, and the time is better spent.
    """
    clean = np.setdiff1d(np.arange(digits.train), digits.noised)
    kinds = {
        "noised": digits.noised,
        "clean": clean[::2],
        "validation": np.arange(digits.train, len(digits.true)),
    }
    return {
        split: {kind: index[begin::2] for kind, index in kinds.items()}
        for begin, split in enumerate(("dev", "test"))
    }


def populations(digits: Digits) -> dict[str, ImagePopulation]:
    """What an edited model is asked, of both splits.

    memorised: noised images, their false label; true: the same images, what they show; clean:
    training images whose label is right; validation: images that were never trained on.
    """
    out = {}
    for split, index in halves(digits).items():
        asked = {
            "memorised": (index["noised"], digits.label),
            "true": (index["noised"], digits.true),
            "clean": (index["clean"], digits.true),
            "validation": (index["validation"], digits.true),
        }
        for name, (rows, label) in asked.items():
            out[f"{name}_{split}"] = ImagePopulation(
                digits.images[rows], label[rows], split, 1 / CLASSES
            )
    return out


def corpus(digits: Digits, asked: Mapping[str, ImagePopulation]) -> Corpus:
    """The training images, as trained on, and populations."""
    rows = slice(0, digits.train)
    return Corpus(images=digits.images[rows], labels=digits.label[rows], populations=asked)


# ------------------------------------------------------------------ the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a training, but for the code and the machine.

    The seed is that of the split, the false labels, the order and shifts of images and the initial
    weights. Decay, shifts and epochs were found on seed 0: without shifts fewer new images are
    recognised (87 %, not 91), but an image that is often shifted is memorised late, so few are;
    more decay parts true from false labels more cleanly, and memorises fewer of the false ones.
    """

    seed: int = 1
    decay: float = 1.0
    shifts: float = 0.1
    pool: Pool = Pool.MEAN
    train: int = 1297
    noised: int = 130
    epochs: int = 110
    batch: int = 64
    width: int = 64
    layers: int = 4
    heads: int = 4
    mlp_width: int = 256
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 100
    last_rate: float = 0.05
    clip: float = 1.0

    def config(self) -> ModelConfig:
        """The shape of the model: pre-LN, 16 patches of 2 by 2 pixels, a CLS if that is read."""
        specials = ("cls",) if self.pool == Pool.CLS else ()
        return ModelConfig(
            vocabulary=CLASSES,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm_place=NormPlace.PRE,
            qk_norm=QKNorm.NONE,
            norm_eps=1e-5,
            rope_theta=None,
            tied=False,
            norm=Norm.LAYER,
            norm_bias=True,
            learned_positions=16 + len(specials),
            biases=("patch", "q", "k", "v", "o", "up", "down", "head"),
            gated=False,
            activation=Activation.GELU,
            causal=False,
            image=Image(channels=1, height=8, width=8, patch=2, specials=specials),
            pool=self.pool,
        )

    def digits(self) -> Digits:
        """The images, split and noised."""
        return make_digits(*read(), self.seed, self.train, self.noised)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the training images; the rest waits for another epoch."""
        return self.train // self.batch

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.epochs * self.steps_per_epoch

    def share(self, step: int) -> float:
        """Share of the learning rate at `step` (from 0): linear warm-up times a cosine."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return min(1.0, (step + 1) / self.warm_up) * (
            self.last_rate + (1 - self.last_rate) * cosine
        )


def start(recipe: Recipe) -> State:
    """Parameters drawn from the seed, the optimiser at rest.

    Gains are 1, biases of norms 0, CLS and positions small; every linear layer's weight and bias
    are uniform in ±1/√fan_in, as PyTorch's. The biases matter: with zeros in their place a model
    memorises more of the false labels and is right less often on new images.
    """
    rng, shapes = generator(Purpose.WEIGHTS, recipe.seed), recipe.config().parameter_shapes()
    parameters: Parameters = {}
    slots: Parameters = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        if layer in ("position", "cls"):
            drawn = 0.02 * rng.standard_normal(shape)
        elif layer.endswith("norm"):
            drawn = np.full(shape, float(part == "weight"))
        else:
            drawn = rng.uniform(-1, 1, shape) * shapes[f"{layer}.weight"][1] ** -0.5
        parameters[name] = drawn.astype(np.float32)
        for moment in ("first", "second"):
            slots[f"{name}/{moment}"] = np.zeros(shape, np.float32)
    return State(0, parameters, slots)


def moved(recipe: Recipe, state: State, gradient: Parameters) -> State:
    """The state after one step of AdamW; decay pulls matrices and positions, no gain or bias."""
    rate, step = recipe.rate * recipe.share(state.step), state.step + 1
    parameters: Parameters = {}
    slots: Parameters = {}
    for name, W in state.parameters.items():
        moments = state.slots[f"{name}/first"], state.slots[f"{name}/second"]
        decay = recipe.decay if W.ndim == 2 else 0.0
        parameters[name], moments = adamw(
            W, gradient[name], moments, step, rate, decay, recipe.betas
        )
        slots[f"{name}/first"], slots[f"{name}/second"] = moments
    return State(step, parameters, slots, state.seconds)


def batch(recipe: Recipe, step: int) -> Array:
    """Which training images step `step` sees: each epoch goes through them in an order of its own.

    Returns (batch,) indices.
    """
    epoch, within = divmod(step, recipe.steps_per_epoch)
    order = generator(Purpose.ORDER, recipe.seed, epoch).permutation(recipe.train)
    return order[within * recipe.batch : (within + 1) * recipe.batch]


def train_step(
    recipe: Recipe, config: ModelConfig, state: State, digits: Digits, ops: Ops
) -> tuple[State, float]:
    """One step: the new state, and the mean nats per image before it."""
    rows = batch(recipe, state.step)
    rng = generator(Purpose.SHIFTS, recipe.seed, state.step)
    nats, gradient = loss_and_gradient(
        config,
        state.parameters,
        patches(config, shifted(digits.images[rows], recipe.shifts, rng)),
        digits.label[rows, None].astype(np.int64),
        image_layout(config, len(rows)),
        ops,
    )
    gradient = clipped(gradient, len(rows), recipe.clip)
    return moved(recipe, state, gradient), float(nats) / len(rows)


# ------------------------------------------------------------------ the run


def train(
    recipe: Recipe,
    digits: Digits,
    path: Path,
    ops: Ops = DEFINITIONS,
    every: int = 200,
    until: int | None = None,
) -> State:
    """Train from what `path` holds, or from the start; save every `every` steps.

    `until` stops early, as a kill would, but keeps the schedule of the whole run.
    """
    config, last = recipe.config(), until or recipe.steps
    state = resume(recipe, path) if path.exists() else start(recipe)
    begun, before = time.monotonic(), state.seconds
    bar = tqdm(total=recipe.steps, initial=state.step, desc="  train", unit="step", leave=False)
    while state.step < last:
        state, loss = train_step(recipe, config, state, digits, ops)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        if state.step % every == 0 or state.step == last:
            state = replace(state, seconds=before + time.monotonic() - begun)
            save(path, recipe, state)
    bar.close()
    return state
