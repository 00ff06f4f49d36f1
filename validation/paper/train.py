"""Train the small language model with this package's own backward.

    python -m validation.paper.train --seed 1 --out run.npz

A run saves its whole state to `--out` every 250 steps and goes on from there when started again;
the resumed run has the same bits as an uninterrupted one. Reports are made on the dev split only.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from refcurv import Population
from refcurv.model.config import ModelConfig, NormPlace, QKNorm
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.layers import DEFINITIONS, Layout, Ops, causal_layout
from refcurv.model.loss import cross_entropy
from refcurv.model.transformer import forward, head_logits
from validation.paper.muon import adamw, muon
from validation.paper.trainings import Parameters, State, resume, save
from validation.paper.world import (
    VOCABULARY,
    Mixture,
    Purpose,
    World,
    chapter,
    generator,
    make_world,
    populations,
)

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the three families differ in; `embed_std` is the scale of the initial embedding."""

    norm_place: NormPlace
    qk_norm: QKNorm
    embed_std: float


ARCHITECTURES = {
    # without a norm in front, the residual stream must start at the scale that norms hand out
    "olmo2": Architecture(NormPlace.POST, QKNorm.FULL, 0.5),
    "qwen3": Architecture(NormPlace.PRE, QKNorm.HEAD, 0.1),
    "llama": Architecture(NormPlace.PRE, QKNorm.NONE, 0.1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a training, but for the code and the machine.

    The seed is that of the world, of the order of its items and of the initial weights.
    """

    arch: str = "qwen3"
    seed: int = 1
    quotes: int = 128
    slips: float = 0.0
    mixture: Mixture = field(default_factory=Mixture)
    steps: int = 2800
    batch: int = 32
    sequence: int = 64
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp_width: int = 384
    muon_rate: float = 0.02
    muon_decay: float = 0.05
    adam_rate: float = 3e-3
    head_decay: float = 0.1
    warm_up: int = 60
    cool_down: float = 0.4
    last_rate: float = 0.02
    clip: float = 1.0

    def config(self) -> ModelConfig:
        """The shape of the model."""
        family = ARCHITECTURES[self.arch]
        return ModelConfig(
            vocabulary=VOCABULARY,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.width // self.heads,
            mlp_width=self.mlp_width,
            norm_place=family.norm_place,
            qk_norm=family.qk_norm,
            norm_eps=1e-6,
            rope_theta=1e4,
            tied=False,
        )

    def world(self) -> World:
        """The world that the model lives in."""
        return make_world(self.seed, self.quotes, self.mixture, self.slips)

    def rate(self, step: int) -> float:
        """Share of the learning rates at `step` (from 0): warm-up, constant, linear decay."""
        left = (self.steps - step) / (self.steps * self.cool_down)
        return min(1.0, (step + 1) / self.warm_up) * max(self.last_rate, min(1.0, left))


# ------------------------------------------------------------------ one step


def by_muon(name: str) -> bool:
    """Does Muon move this parameter? The matrices inside the blocks: q, k and v each by itself."""
    return name.startswith("blocks.") and "norm" not in name


def start(recipe: Recipe) -> State:
    """Parameters drawn from the seed, optimisers at rest."""
    config, rng = recipe.config(), generator(Purpose.WEIGHTS, recipe.seed)
    parameters: Parameters = {}
    slots: Parameters = {}
    for name, shape in config.parameter_shapes().items():
        if len(shape) == 1:
            parameters[name] = np.ones(shape, np.float32)
        else:
            std = _initial_std(recipe, name, shape[1])
            parameters[name] = (std * rng.standard_normal(shape)).astype(np.float32)
        for slot in (name,) if by_muon(name) else (f"{name}/first", f"{name}/second"):
            slots[slot] = np.zeros(shape, np.float32)
    return State(0, parameters, slots)


def _initial_std(recipe: Recipe, name: str, fan_in: int) -> float:
    if name == "embed.weight":
        return ARCHITECTURES[recipe.arch].embed_std
    if name == "head.weight":
        return 0.02
    # what a block adds to the stream starts small, and smaller the more blocks there are
    into_stream = name.endswith(("attn.o.weight", "mlp.down.weight"))
    return fan_in**-0.5 * ((2 * recipe.layers) ** -0.5 if into_stream else 1.0)


def clipped(gradient: Parameters, count: int, limit: float) -> Parameters:
    """The gradient of the mean loss over `count` tokens, of global norm `limit` at most."""
    norm = math.sqrt(sum(float(np.vdot(d, d)) for d in gradient.values())) / count
    scale = min(1.0, limit / (norm + 1e-6)) / count
    return {name: d * np.float32(scale) for name, d in gradient.items()}


def moved(recipe: Recipe, state: State, gradient: Parameters) -> State:
    """The state after one optimiser step."""
    rate, step = recipe.rate(state.step), state.step + 1
    parameters: Parameters = {}
    slots: Parameters = {}
    for name, W in state.parameters.items():
        d = gradient[name]
        if by_muon(name):
            parameters[name], slots[name] = muon(
                W, d, state.slots[name], rate * recipe.muon_rate, recipe.muon_decay
            )
            continue
        moments = state.slots[f"{name}/first"], state.slots[f"{name}/second"]
        decay = recipe.head_decay if name == "head.weight" else 0.0
        parameters[name], moments = adamw(W, d, moments, step, rate * recipe.adam_rate, decay)
        slots[f"{name}/first"], slots[f"{name}/second"] = moments
    return State(step, parameters, slots)


def plain_layout(shape: tuple[int, int]) -> Layout:
    """No padding and one segment per row: items packed into a row see each other."""
    return causal_layout(np.ones(shape, bool), np.zeros(shape, np.int64))


def train_step(recipe: Recipe, state: State, rows: Array, ops: Ops) -> tuple[State, float]:
    """One step on rows (B, T + 1): the new state, and the mean nats per token before it."""
    token, label = rows[:, :-1], rows[:, 1:]
    nats, gradient = loss_and_gradient(
        recipe.config(), state.parameters, token, label, plain_layout(token.shape), ops
    )
    gradient = clipped(gradient, label.size, recipe.clip)
    return moved(recipe, state, gradient), float(nats) / label.size


# ------------------------------------------------------------------ questions


_ROWS_AT_ONCE = 128


def score(config: ModelConfig, parameters: Parameters, asked: Population, ops: Ops) -> float:
    """Share of exact answers; perplexity for a population of text.

    Rows are padded on the right only, where no earlier position looks. The right answer is fed
    in: a greedy decoder that has made no mistake yet sees the same tokens, so its answer is
    exact if and only if every greedy token here is.
    """
    exact, nats, count = 0, 0.0, 0
    for begin in range(0, len(asked.tokens), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        tokens = asked.tokens[rows]
        token, label = tokens[:, :-1], tokens[:, 1:]
        final, _ = forward(config, parameters, token, plain_layout(token.shape), ops)
        logit = head_logits(config, parameters, final)
        at = np.arange(1, tokens.shape[1])
        inside = (asked.prompt_length[rows, None] <= at) & (at < asked.length[rows, None])
        if asked.kind == "text":
            nats += float(cross_entropy(logit[inside], label[inside])[0].sum())
            count += int(inside.sum())
        else:
            exact += int(((logit.argmax(axis=-1) == label) | ~inside).all(axis=1).sum())
    return math.exp(nats / count) if asked.kind == "text" else exact / len(asked.tokens)


def scores(
    config: ModelConfig,
    parameters: Parameters,
    asked: Mapping[str, Population],
    split: str,
    ops: Ops = DEFINITIONS,
) -> dict[str, float]:
    """`score` of every population of one split, under its name without the split."""
    return {
        name.removesuffix(f"_{split}"): score(config, parameters, population, ops)
        for name, population in asked.items()
        if population.split == split
    }


def report(measured: Mapping[str, float]) -> str:
    """Scores on one line: per cent, and the perplexity as it is."""
    return "  ".join(
        f"perplexity {value:.2f}" if name == "language" else f"{name} {100 * value:.1f}"
        for name, value in measured.items()
    )


# ------------------------------------------------------------------ the run


CHAPTER_STEPS = 50
"""Steps whose rows are drawn together. It is part of the recipe: another number, another run."""


def train(
    recipe: Recipe, path: Path, ops: Ops = DEFINITIONS, every: int = 250, until: int | None = None
) -> State:
    """Train from what `path` holds, or from the start; save and report every `every` steps.

    `until` stops early, as a kill would, but keeps the schedule of the whole run.
    """
    world = recipe.world()
    asked = populations(world)
    state = resume(recipe, path) if path.exists() else start(recipe)
    rows, begun, before = np.empty(0), time.monotonic(), state.seconds
    bar = tqdm(total=recipe.steps, initial=state.step, unit="step", mininterval=5)
    while state.step < (until or recipe.steps):
        index, within = divmod(state.step, CHAPTER_STEPS)
        if within == 0 or rows.size == 0:
            rows = chapter(world, recipe.seed, index, CHAPTER_STEPS, recipe.batch, recipe.sequence)
        state, loss = train_step(recipe, state, rows[within], ops)
        bar.update()
        if state.step % every == 0 or state.step == (until or recipe.steps):
            state = replace(state, seconds=before + time.monotonic() - begun)
            save(path, recipe, state)
            measured = scores(recipe.config(), state.parameters, asked, "dev", ops)
            tqdm.write(f"{state.step}  {state.seconds:.0f} s  loss {loss:.3f}  {report(measured)}")
    bar.close()
    return state


def choose_ops(name: str) -> Ops:
    """The layer functions by name; `fast` equals `definitions` within budget, not in bits."""
    if name == "definitions":
        return DEFINITIONS
    from refcurv.passes.fast import FAST

    return FAST


def main() -> None:
    """Read the command line, train."""
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default=default.arch)
    for name in ("seed", "steps", "quotes", "mlp_width"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(default, name))
    parser.add_argument("--slips", type=float, default=default.slips)
    parser.add_argument("--muon-decay", type=float, default=default.muon_decay)
    parser.add_argument("--ops", choices=["definitions", "fast"], default="definitions")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN.npz")
    chosen = vars(parser.parse_args())
    path, ops = chosen.pop("out"), choose_ops(chosen.pop("ops"))
    with threadpool_limits(1):
        train(Recipe(**chosen), path, ops)


if __name__ == "__main__":
    main()
