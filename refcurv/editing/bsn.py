"""The edit that is told what to forget: a mask over single weights, trained by gradients (P11)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra.scaling import exponent, shifted
from refcurv.editing import record
from refcurv.editing.record import Draw, EditRecord, LayerEdit
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NameUnknownError,
    RangeError,
    require_choice,
    require_finite,
    require_range,
    require_seed,
    require_shape,
)
from refcurv.law.conventions import NO_LABEL
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, Population, require_fit
from refcurv.model.given import (
    require_callable,
    require_corpus,
    require_model,
    require_record,
)
from refcurv.model.gradient import head_backward
from refcurv.model.patterns import expand
from refcurv.model.transformer import Parameters, Slope, Tap, layout_of
from refcurv.model.weights import Model, resident
from refcurv.passes import parallel
from refcurv.passes.fast import FAST
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import lowest_block
from refcurv.progress import Progress, silent

CAP = 6.0
"""The loss gains nothing from more nats per token of the forgotten suffixes than this. Chosen: a
recited token costs almost none, and 6 nats are a probability of 1/400."""

START, SPREAD = 0.5, 0.01
"""Scores start uniform in [START, START + SPREAD). Chosen: only differences matter, and these are
smaller than Adam's first step at the default rate."""

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Adam's β₁, β₂ and ε (Kingma & Ba 2015)."""

FORGOTTEN = ("recite", "answer")
"""The kinds of population that have an answer to forget."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One trained score per weight of some matrices: `prune` sets the weights of the lowest to 0.

    Fields:
        layers: name → (O, I) float64, in file order.
        ratio, weight, steps, rate, batch, seed: the choices of `train_scores`.
        dtype: what the gradients were computed in.
        retain_nats, forget_nats: (steps,) float64, CE of each step's batches, before the step.
        source: for provenance.
        weights: the digest of the model's weights (`refcurv.files.digest`); None if unknown.
    """

    layers: Mapping[str, Array]
    ratio: float
    weight: float
    steps: int
    rate: float
    batch: int
    seed: int
    dtype: str
    retain_nats: Array
    forget_nats: Array
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    weights: str | None = None

    def settings(self) -> dict[str, Any]:
        """The choices as plain JSON values."""
        names = ("ratio", "weight", "steps", "rate", "batch", "seed", "dtype")
        return {"layers": list(self.layers), **{name: getattr(self, name) for name in names}}


def train_scores(
    model: Model,
    layers: str,
    forget: Population,
    retain: Corpus,
    *,
    ratio: float,
    weight: float = 1.0,
    steps: int = 60,
    rate: float = 0.02,
    batch: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> Scores:
    """Train scores of single weights: without the lowest the model forgets, and does little else.

    Definition
        s = 0.5 + 0.01 u, u uniform by the seed; at each step
            M = the mask of `keep` (s, ratio), W' = W ∘ M
            L = CE(retain) − weight·min(CE(forget), 6), CE the mean nats per token of a batch
            s ← Adam(s, dL/dW' ∘ W)
        dL/dM = dL/dW' ∘ W is passed to s as if M were s (straight through). At CE(forget) >= 6 the
        second term has no gradient. Adam: β = (0.9, 0.999), ε = 1e-8, no weight decay.

    A step reads `batch` rows of `retain` and of `forget`, or all if there are fewer. They come from
    random orders of the rows that have a label, one order after the other. In `forget` only the
    suffixes are scored. `retain` should not hold what is to be forgotten. The ratio is that of all
    matrices together: how much each of them loses is learned too. Sakarvadia et al. differ: they
    cut each matrix by itself, by |s|, start from Kaiming's uniform, and train by SGD on batches
    that mix both kinds, without a cap.

    Args:
        model: computes in its `dtype`; it is not changed.
        layers: a pattern over linear layers, e.g. "blocks.{23-25}.mlp.{gate,up}".
        forget: a population of kind `recite` or `answer`.
        retain: tokens (N, T), with labels, mask and segments if it has them.
        ratio: the share of the weights that is dropped while training, in [0, 1].
        weight: of CE(forget) in the loss, in [0, 1e6].
        steps: >= 0; with 0 the scores stay random.
        rate: Adam's learning rate, in [0, 1].
        batch: rows of `retain`, and of `forget`, in one step.
        seed: in [0, 2**64), of the start and of the orders: `record.stream` of the draw SCORES by
            the layer's name, by "retain" and by "forget"; an order sorts the rows' uniforms.
        progress: called with (steps done, steps).

    Returns:
        Scores by layer, float64: the same bits for any number of threads.

    Raises:
        NameUnknownError: a pattern that matches no layer. RangeError: a number outside its range,
        a token outside the vocabulary, or more positions than the model has learned.
        ConventionError: images, a bidirectional model, a head tied to the embedding, or a
        population of text, which has no answer to forget. EmptyError: `retain` has no label.
        NonFiniteError: a gradient holds NaN or infinity.

    Cost: `steps` forward and backward passes over both batches, down to the lowest layer; memory:
        eight float64 per weight, the gradients of a shard per core, activations as `collect`.
    Source: P11 (arXiv 2510.24256); Sakarvadia et al. 2025 (arXiv 2410.02159); Ramanujan et al. 2020
        (arXiv 1911.13299) for the straight-through scores.
    Proof: tests/test_bsn.py::test_the_training_is_the_recipe_in_loops,
        ::test_the_number_of_threads_changes_no_bit
    """
    who, config = "train_scores", require_model("train_scores", model).config
    require_corpus(who, retain)
    require_callable(who, "progress", progress)
    ratio = require_range(who, "ratio", ratio, 0, 1)
    weight = require_range(who, "weight", weight, 0, 1e6)
    rate = require_range(who, "rate", rate, 0, 1)
    steps, batch = _count(who, "steps", steps, 0), _count(who, "batch", batch, 1)
    seed = require_seed(who, seed)
    names = expand(layers, list(config.linear_layers()))
    record.require_untied(who, model, names)
    sides = {"retain": retain, "forget": suffixes(who, config, forget)}
    orders = {
        side: _orders(who, side, _labelled(who, side, corpus, config), (steps, batch), seed)
        for side, corpus in sides.items()
    }
    own, parameters = digest(model), resident(model)
    weights = {name: parameters[config.weight_of(name)] for name in names}
    scores = {name: _start(who, seed, name, W.shape) for name, W in weights.items()}
    moments = {name: (np.zeros(W.shape), np.zeros(W.shape)) for name, W in weights.items()}
    nats = {side: np.empty(steps) for side in sides}
    for step in range(steps):
        kept = keep(scores, ratio)
        masked = {config.weight_of(n): np.where(kept[n], W, 0) for n, W in weights.items()}
        drawn = {side: _rows(sides[side], orders[side][step]) for side in sides}
        found, slope = objective(config, parameters | masked, names, drawn, weight)
        for name, W in weights.items():
            d = slope[name] * W
            hint = "Do the weights hold NaN, or did float32 activations overflow? Try float64."
            require_finite(who, f"the gradient of {name!r} in step {step + 1}", d, hint)
            adam(scores[name], *moments[name], d, step + 1, rate)
        for side in sides:
            nats[side][step] = found[side]
        progress(step + 1, steps)
    for array in (*scores.values(), *nats.values()):
        array.flags.writeable = False
    choices = (ratio, weight, steps, rate, batch, seed, model.dtype)
    source = MappingProxyType({"inputs": store.inputs(model.source, retain.source)})
    nats_of = (nats["retain"], nats["forget"])
    return Scores(MappingProxyType(scores), *choices, *nats_of, source, own)


def prune(
    model: Model, scores: Scores, ratio: float | None = None, *, force: bool = False
) -> tuple[Model, EditRecord]:
    """Set the weights of lowest score to 0.

    Definition
        W' = W ∘ M, M the mask of `keep`: round(ratio·n) of the n weights of all layers together
        become 0.

    Args:
        model: whose weights to edit; its dtype must hold the stored ones exactly.
        scores: of `train_scores`.
        ratio: the share that is dropped, in [0, 1]; None for the one that was trained with.
        force: take scores that were trained on other weights than the model's.

    Returns:
        The edited model and the EditRecord, method "bsn". The given model is not changed.

    Raises:
        RangeError: ratio outside [0, 1]. NameUnknownError, ShapeError: scores of another model.
        NonFiniteError: W holds NaN. DTypeError: W was rounded when loaded. ConventionError: a head
        tied to the embedding; scores of other weights, without `force`.

    Cost: a selection among all scores.
    Source: P11 (arXiv 2510.24256).
    Proof: tests/test_bsn.py::test_prune_zeroes_the_lowest_scores_and_nothing_else
    """
    require_model("prune", model)
    how = "rc.train_scores(model, ...)"
    require_record("prune", "scores must be Scores", scores, Scores, how)
    share = require_range("prune", "ratio", scores.ratio if ratio is None else ratio, 0, 1)
    known = model.config.linear_layers()
    record.require_untied("prune", model, scores.layers)
    begun = record.before("prune", model, ("the list of scores", scores.weights), force)
    changed: dict[str, Array] = {}
    records = []
    for layer, kept in keep(scores.layers, share).items():
        if layer not in known:
            raise NameUnknownError(
                f"prune: the model has no {layer!r}. Scores of another model were given."
            )
        name = model.config.weight_of(layer)
        W = record.parameter("prune", model, name)
        require_shape("prune", f"the scores of {layer!r}", kept, W.shape, f"(O, I) of {name}")
        edited = W
        if not kept.all():
            changed[name] = edited = np.where(kept, W, 0)
        square = shifted(W, -exponent(W)) ** 2
        mass = float(square.sum(where=kept) / square.sum()) if W.any() else math.nan
        found = (W.size, int(kept.sum()), mass, math.nan, 0, record.norm_ratio(edited, W))
        records.append(LayerEdit("bsn", layer, 1 - share, *found))
    return record.after(begun, changed, records)


# ------------------------------------------------------------------ the mask


def keep(scores: Mapping[str, Array], ratio: float) -> dict[str, Array]:
    """The mask by layer, bool: False at the round(ratio·n) lowest of all n scores together.

    Half is rounded to even. Among equal scores at the border the first are kept, layer by layer and
    in row-major order.

    Cost: O(n): a selection, not a sort.
    Proof: tests/test_bsn.py::test_the_mask_equals_brute_force
    """
    score_N = np.concatenate([s.ravel() for s in scores.values()])
    dropped = round(ratio * score_N.size)
    keep_N = np.ones(score_N.size, dtype=bool)
    if dropped:
        highest = np.partition(score_N, dropped - 1)[dropped - 1]  # the highest that is dropped
        keep_N = score_N > highest
        equal = np.flatnonzero(score_N == highest)
        staying = score_N.size - dropped - int(keep_N.sum())
        keep_N[equal[:staying]] = True
    ends = np.cumsum([s.size for s in scores.values()])
    parts = np.split(keep_N, ends[:-1])
    return {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}


def _start(who: str, seed: int, layer: str, shape: tuple[int, ...]) -> Array:
    """The scores before training."""
    return START + SPREAD * record.stream(who, seed, Draw.SCORES, layer).random(shape)


def adam(score: Array, first: Array, second: Array, d: Array, step: int, rate: float) -> None:
    """One step of Adam, the `step`-th from 1, in place: scores and both moments.

    Proof: tests/test_bsn.py::test_the_training_is_the_recipe_in_loops
    """
    first *= FIRST_DECAY
    first += (1 - FIRST_DECAY) * d
    second *= SECOND_DECAY
    second += (1 - SECOND_DECAY) * d**2
    size = np.sqrt(second / (1 - SECOND_DECAY**step)) + EPSILON
    score -= rate * (first / (1 - FIRST_DECAY**step)) / size


# ------------------------------------------------------------------ the loss


def objective(
    config: ModelConfig,
    parameters: Parameters,
    layers: list[str],
    drawn: Mapping[str, Corpus],
    weight: float,
) -> tuple[dict[str, float], dict[str, Array]]:
    """CE(retain) and CE(forget), and dL/dW' for L = CE(retain) − weight·min(CE(forget), CAP).

    CE is the mean nats per labelled token of a batch; gradients by layer, float64, folded over
    shards in order.

    Proof: tests/test_bsn.py::test_the_gradient_is_the_complex_step_of_a_soft_mask,
        ::test_beyond_the_cap_forgetting_has_no_gradient
    """
    wanted = frozenset(layers)
    parts = [(side, shard) for side, corpus in drawn.items() for shard in shards(corpus, config)]
    shapes = {n: parameters[config.weight_of(n)].shape for n in layers}
    total = {side: 0.0 for side in drawn}
    count = {side: 0 for side in drawn}
    slope = {side: {n: np.zeros(shape) for n, shape in shapes.items()} for side in drawn}

    def work(_: int, part: tuple[str, Shard]) -> tuple[str, int, float, dict[str, Array]]:
        side, shard = part
        return side, int((shard.label_BT >= 0).sum()), *_slopes(config, parameters, shard, wanted)

    for side, labels, nats, d in parallel.stream(parts, work):
        total[side] += nats
        count[side] += labels
        for name in d:
            slope[side][name] += d[name]
    found = {side: total[side] / count[side] for side in drawn}
    minus = weight if found["forget"] < CAP else 0.0
    for name in layers:
        slope["retain"][name] /= count["retain"]
        slope["retain"][name] -= minus / count["forget"] * slope["forget"][name]
    return found, slope["retain"]


def _slopes(
    config: ModelConfig, parameters: Parameters, shard: Shard, layers: frozenset[str]
) -> tuple[float, dict[str, Array]]:
    """A shard's summed nats and their gradient for the matrices of `layers`, and none deeper."""
    found: dict[str, Array] = {}

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Tap) and step.name in layers:
            g_NO = step.g.reshape(-1, step.g.shape[-1])
            d_OI = g_NO.T @ step.a.reshape(-1, step.a.shape[-1])
            found[step.name] = found[step.name] + d_OI if step.name in found else d_OI

    final_BTD, trace = transformer.forward(
        config, parameters, shard.source, shard.layout, FAST, lowest_block(config, layers)
    )
    head = head_backward(config, parameters, final_BTD, shard.label_BT, shard.label_BT >= 0)
    loss = transformer.drain(head, take)
    steps = transformer.blocks_backward(
        config, parameters, loss.d_final_BTD, trace, FAST, consume=True
    )
    while len(found) < len(layers):
        take(next(steps))
    return float(loss.nats_BT.sum(dtype=np.float64)), found


# ------------------------------------------------------------------ what is read


def suffixes(who: str, config: ModelConfig, forget: Population) -> Corpus:
    """A population as a corpus: token t + 1 is the label of t if it lies in the suffix.

    The last token is a label only, and is never read. Padding becomes id 0.

    Proof: tests/test_bsn.py::test_the_suffix_alone_is_scored
    """
    if config.image is not None or not config.causal:
        raise ConventionError(
            f"{who}: only the next tokens of a causal model can be forgotten; this model "
            f"{'is bidirectional' if config.image is None else 'reads images'}."
        )
    if not isinstance(forget, Population):
        raise ConventionError(f"{who}: forget must be a Population; got {type(forget).__name__}.")
    require_choice(who, "the kind of what to forget", forget.kind, FORGOTTEN)
    token_NT, index_T = forget.tokens, np.arange(forget.tokens.shape[1])
    real_NT = index_T < forget.length[:, None] - 1
    asked_NT = real_NT & (index_T >= forget.prompt_length[:, None] - 1)
    label_NT = np.where(asked_NT, np.roll(token_NT, -1, axis=1), NO_LABEL)
    return Corpus(np.where(real_NT, token_NT, 0), label_NT, real_NT)


def _labelled(who: str, side: str, corpus: Corpus, config: ModelConfig) -> Array:
    """The indices of the rows that have a label, in a corpus that the model can read."""
    label_NT = require_fit(f"{who}: {side}", corpus, config)
    if config.learned_positions:
        layout_of(config, corpus.real, corpus.segment)  # refuses more than were learned
    row_N = np.flatnonzero((label_NT >= 0).any(axis=1))
    if not len(row_N):
        raise EmptyError(
            f"{who}: {side} has no label in any of its {number_of(len(label_NT), 'row')}."
        )
    return row_N


def _orders(who: str, side: str, row_N: Array, shape: tuple[int, int], seed: int) -> Array:
    """Rows for every step, (steps, rows in a batch): random orders, one after the other."""
    steps, batch = shape[0], min(shape[1], len(row_N))
    draws = record.stream(who, seed, Draw.SCORES, side)
    rounds = -(-steps * batch // len(row_N))
    order_RN = draws.random((rounds, len(row_N))).argsort(axis=1, kind="stable")
    return row_N[order_RN.ravel()[: steps * batch].reshape(steps, batch)]


def _rows(corpus: Corpus, row_B: Array) -> Corpus:
    """Some rows of a corpus."""
    names = ("tokens", "labels", "mask", "segments")
    parts = {name: getattr(corpus, name) for name in names}
    return Corpus(**{name: part[row_B] for name, part in parts.items() if part is not None})


def _count(who: str, what: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RangeError(f"{who}: {what} must be an integer >= {least}; got {value!r}.")
    if value >= 2**31:
        raise RangeError(f"{who}: {what} must be below 2**31; got {value}.")
    return value
