"""What an audit looks at: a plan that fits the memory, and one recorded pass over one batch.

The definitions run forward and backward once. Every norm and every rotation that they call is
recorded, with its inputs and outputs. The identities are then checked on the recorded arrays, with
formulas of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.bases import Bases, decompose
from refcurv.curvature.exact.problems import Batch, image_batch
from refcurv.curvature.factors import Factors, collect
from refcurv.judge.roundings import Runs, shaken
from refcurv.law import tolerance
from refcurv.law.checks import Array, EmptyError, require_finite
from refcurv.law.conventions import NO_LABEL
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_fit, require_inputs, require_tokens
from refcurv.model.gradient import head_backward
from refcurv.model.layers import DEFINITIONS, Layout, Ops, Saved
from refcurv.model.transformer import Parameters, Slope, Tap
from refcurv.model.weights import Model

SEQUENCES, WIDTH = 8, 64
"""The largest batch. The identities hold on any batch; a few hundred positions show every fault."""

ENUMERATED = 2048
"""The most backward passes that enumerating the vocabulary may take."""

SHAKEN = 0x5AFE
"""The last part of a shaken run's seed, which keeps it apart from the directions' seeds."""

BASIS_WIDTH = 4096
"""The longest side of a layer whose eigenbasis and edit are checked."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits the given memory. Bytes are estimates, too large by a factor of about two.

    Fields:
        memory: the given bytes.
        resident: whether all parameters are held in memory, or each is read where it is needed.
        sequences, width: the shape of the batch.
        directions: the parameters that random directions move.
        layers: the layers whose factors and bases are checked.
        enumerated: the number of loss positions whose Fisher is enumerated over the vocabulary.
        left_out: what is not checked and why, in sentences.
    """

    memory: int
    resident: bool
    sequences: int
    width: int
    directions: tuple[str, ...]
    layers: tuple[str, ...]
    enumerated: int
    left_out: tuple[str, ...]


def plan(config: ModelConfig, corpus: Corpus, memory: int) -> Plan:
    """Divide the memory in thirds: for parameters, for activations, for directions."""
    third, left_out = memory // 3, []
    sizes = {name: math.prod(shape) for name, shape in config.parameter_shapes().items()}
    resident = 8 * sum(sizes.values()) <= third
    sequences, width = _batch_shape(config, corpus, third)
    if not resident:
        left_out.append(
            f"the weights need {8 * sum(sizes.values()) / 2**30:,.2f} GiB in float64: they are "
            "read block by block, and `collect`, which needs them all, is not checked"
        )
    directions = list(sizes)
    if not resident or 64 * sum(sizes.values()) > third:
        directions = _fitting(config, sizes, third // 64)
        left_out.append(
            f"random directions move {', '.join(directions) or 'nothing'}, not all "
            f"{number_of(len(sizes), 'parameter')}"
        )
    layers = []
    for layer, sides in _two_blocks(config):
        fits = 64 * sum(n * n for n in sides) <= third and max(sides) <= BASIS_WIDTH
        layers += [layer] if fits and resident else []
    others = len(config.linear_layers()) - len(layers)
    if others:
        left_out.append(
            f"factors and bases of {others} of {number_of(len(config.linear_layers()), 'layer')}"
        )
    enumerated = min(3, ENUMERATED // config.vocabulary) if directions else 0
    if not enumerated:
        left_out.append(
            f"the Fisher enumerated over the vocabulary: {config.vocabulary:,} backward passes "
            "for each position"
        )
    return Plan(memory, resident, sequences, width, tuple(directions), tuple(layers), enumerated,
                tuple(left_out))  # fmt: skip


def _batch_shape(config: ModelConfig, corpus: Corpus, memory: int) -> tuple[int, int]:
    """How many sequences, and their width. Images keep their width; only their number shrinks."""
    require_inputs("audit", corpus, config)
    if config.image is not None and corpus.images is not None:
        sequences, width = min(SEQUENCES, len(corpus.images)), config.image.positions
        while _activations(config, sequences, width) > memory and sequences > 1:
            sequences //= 2
        return sequences, width
    sequences, width = require_tokens("audit", corpus).shape
    sequences, width = min(SEQUENCES, sequences), min(WIDTH, width)
    if config.learned_positions:
        width = min(width, config.learned_positions)
    while _activations(config, sequences, width) > memory and sequences * width > 8:
        sequences, width = (sequences // 2, width) if sequences > 2 else (sequences, width // 2)
    return sequences, width


def _activations(config: ModelConfig, sequences: int, width: int) -> int:
    """Bytes of a complex forward and backward, and as many for what is kept of them."""
    wide = 14 * config.width + 6 * config.mlp_width + 6 * config.heads * config.head_width
    per_block = wide + 3 * config.heads * width
    return 32 * sequences * width * (config.layers * per_block + 4 * config.vocabulary)


def _two_blocks(config: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    """The linear layers of the last block and of the first."""
    at = (f"blocks.{config.layers - 1}.", "blocks.0.")
    return [(n, s) for n, s in config.linear_layers().items() if n.startswith(at)]


def _fitting(config: ModelConfig, sizes: Mapping[str, int], most: int) -> list[str]:
    """Weights of the first and the last block that fit together; small ones are taken first."""
    chosen, used = [], 0
    for name in sorted(
        (config.weight_of(n) for n, _ in _two_blocks(config)), key=sizes.__getitem__
    ):
        if used + sizes[name] <= most:
            chosen.append(name)
            used += sizes[name]
    return [name for name in sizes if name in chosen]


# ------------------------------------------------------------------ what was recorded


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of RMSNorm, forward x → y = gain · x̂ and backward d_y → d_x, as (N, width)."""

    x: Array
    gain: Array
    d_y: Array
    d_x: Array


@dataclass(slots=True)
class _Log:
    norms: list[NormCall] = field(default_factory=list)
    rotated: list[tuple[Array, Array]] = field(default_factory=list)
    key_terms: list[Array] = field(default_factory=list)


def attention_magnitudes(d_context_BTHE: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """`attention_backward` with every product in absolute value: what its gradients sum."""
    q, k, v, p, size = saved
    B, K, R, T, E = q.shape
    d_context = d_context_BTHE.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    d_p = d_context @ np.abs(v).swapaxes(-1, -2)
    d_v = (p.swapaxes(-1, -2) @ d_context).sum(axis=2)
    d_product = p * (d_p + (d_p * p).sum(axis=-1, keepdims=True)) * size
    d_q = d_product @ np.abs(k)
    d_k = (d_product.swapaxes(-1, -2) @ np.abs(q)).sum(axis=2)
    d_q_BTHE = d_q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    return d_q_BTHE, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def _watched(log: _Log) -> Ops:
    """The definitions, recording norms, rotations and the magnitudes of keys' gradients."""

    def keep(x: Array, gain: Array, d_y: Array, d_x: Array) -> None:
        x_ND, d_y_ND, d_x_ND = (a.reshape(-1, a.shape[-1]) for a in (x, d_y, d_x))
        log.norms.append(NormCall(x_ND, gain, d_y_ND, d_x_ND))

    def rotate(x: Array, cos: Array, sin: Array) -> Array:
        y = DEFINITIONS.rotate(x, cos, sin)
        log.rotated.append((x, y))
        return y

    def attention_backward(d_context: Array, saved: Saved) -> tuple[Array, Array, Array]:
        log.key_terms.append(attention_magnitudes(np.abs(d_context), saved)[1])
        return DEFINITIONS.attention_backward(d_context, saved)

    ops = watching_norms(DEFINITIONS, keep)
    return replace(ops, rotate=rotate, attention_backward=attention_backward)


def watching_norms(ops: Ops, keep: Callable[[Any, Any, Any, Any], object]) -> Ops:
    """`ops` whose norms hand over x, gain, d_y and d_x at each backward.

    Proof: tests/test_proofs.py::test_every_identity_is_proved
    """

    def norm_forward(x: Any, gain: Any, eps: float) -> tuple[Any, Saved]:
        y, saved = ops.rms_norm_forward(x, gain, eps)
        return y, (saved, x, gain)

    def norm_backward(d_y: Any, saved: Saved) -> tuple[Any, Any]:
        inner, x, gain = saved
        d_x, d_gain = ops.rms_norm_backward(d_y, inner)
        keep(x, gain, d_y, d_x)
        return d_x, d_gain

    return replace(ops, rms_norm_forward=norm_forward, rms_norm_backward=norm_backward)


@dataclass(frozen=True, eq=False)
class Bench:
    """One batch, run once. Its factors and bases are computed when a check first asks for them.

    Fields:
        config, parameters, plan, seed: what the run was made from.
        corpus: the sequences or images that are looked at.
        batch, layout: the same, as the definitions read them.
        taps: layer → Tap, with a and g (B, T, ·). The head is one of the layers.
        norms: every call of RMSNorm.
        key_slopes: block → the gradient of the rotated keys, and the same with the rotation undone,
            each (B, T, K, E).
        key_terms: block → for each entry of that gradient the sum of its terms' magnitudes.
        final: (B, T, D), what the head reads.
        logits: (B, T, V).
        hessians: random direction → H times the direction, for those computed so far.
    """

    config: ModelConfig
    parameters: Parameters
    plan: Plan
    seed: int
    corpus: Corpus
    batch: Batch
    layout: Layout
    taps: Mapping[str, Tap]
    norms: tuple[NormCall, ...]
    key_slopes: Mapping[int, tuple[Array, Array]]
    key_terms: Mapping[int, Array]
    final: Array
    logits: Array
    hessians: dict[int, Runs] = field(default_factory=dict, repr=False)
    _moved: dict[int, Mapping[str, Tap]] = field(default_factory=dict, repr=False)

    @property
    def real(self) -> Array:
        """(B, T) bool, False on padding."""
        return _real(self.corpus, self.batch)

    @property
    def longest(self) -> int:
        """The number of terms of the longest sum in a pass."""
        one = self.config
        sides = (one.width, one.mlp_width, one.heads * one.head_width, one.vocabulary)
        patch = one.image.patch_size if one.image else 0
        return max(*sides, patch, int(self.batch.segment_BT.size))

    @property
    def budget(self) -> float:
        """The budget of a result of whole passes, relative to its size of terms (`Runs.size`)."""
        return tolerance.probable(self.longest, np.float64)

    def runs(self, result: Callable[[Parameters], Array]) -> Runs:
        """A result at the parameters, and at shaken parameters."""
        return Runs(np.asarray(result(self.parameters)), lambda n: result(self._shaken(n)))

    def runs_of_taps(self, result: Callable[[Mapping[str, Tap]], Array]) -> Runs:
        """A result from the taps, and from the taps of shaken runs."""
        return Runs(result(self.taps), lambda n: result(self._taps(n)))

    def _shaken(self, n: int) -> Parameters:
        return shaken(self.parameters, [self.seed, n, SHAKEN])

    def _taps(self, n: int) -> Mapping[str, Tap]:
        if n not in self._moved:
            self._moved[n], _ = flow(self.config, self._shaken(n), self.batch, self.layout)
        return self._moved[n]

    @property
    def amplification(self) -> float:
        """The factor by which a relative error of all parameters grows in the layers' gradients."""

        def slopes(taps: Mapping[str, Tap]) -> Array:
            return np.concatenate([tap.g.ravel() for tap in taps.values()])

        runs = self.runs_of_taps(slopes)
        own = float(norm(runs.here))
        return runs.size(1) / own if own else 1.0

    def rng(self, salt: int) -> np.random.Generator:
        """A random stream for one use; each use has its own `salt`."""
        return np.random.default_rng([self.seed, salt])

    def collect(self, fisher: str, part: slice = slice(None)) -> Factors | None:
        """`collect` on some sequences of the batch; None if the plan has no layers."""
        if not self.plan.layers:
            return None
        fields = ("tokens", "labels", "mask", "segments", "images")
        given = {name: getattr(self.corpus, name) for name in fields}
        own: dict[str, Any] = {name: x[part] for name, x in given.items() if x is not None}
        some = Corpus(**own)
        model = Model(self.config, self.parameters)
        return collect(model, some, ",".join(self.plan.layers), fisher, self.seed)

    @cached_property
    def empirical(self) -> Factors | None:
        """Factors against the corpus's own labels."""
        return self.collect("empirical")

    @cached_property
    def sampled(self) -> Factors | None:
        """Factors against drawn labels."""
        return self.collect("sampled")

    @cached_property
    def bases(self) -> Bases | None:
        """The eigenbases of `sampled`."""
        return None if self.sampled is None else decompose(self.sampled)


def prepare(
    config: ModelConfig, parameters: Parameters, corpus: Corpus, planned: Plan, seed: int
) -> Bench:
    """Choose the batch, run forward and backward, and record what flows."""
    for name in parameters:
        require_finite("audit", f"parameter {name!r}", parameters[name])
    some = _some(config, corpus, planned)
    batch = _batch(config, some)
    layout = transformer.layout_of(config, _real(some, batch), batch.segment_BT)
    log = _Log()
    taps, final_BTD = flow(config, parameters, batch, layout, _watched(log))
    # forward: q and k of each block, from below; backward: from above
    undone = log.rotated[2 * config.layers + 1 :: 2]
    slopes = {config.layers - 1 - n: call for n, call in enumerate(undone)}
    logits = transformer.head_logits(config, parameters, final_BTD)
    terms = {config.layers - 1 - n: call for n, call in enumerate(log.key_terms)}
    return Bench(config, parameters, planned, seed, some, batch, layout, taps, tuple(log.norms),
                 slopes, terms, final_BTD, logits)  # fmt: skip


def flow(
    config: ModelConfig,
    parameters: Parameters,
    batch: Batch,
    layout: Layout,
    ops: Ops = DEFINITIONS,
) -> tuple[dict[str, Tap], Array]:
    """What flows through every linear layer, (B, T, ·), and what the head reads."""
    final_BTD, trace = transformer.forward(config, parameters, batch.inputs, layout, ops)
    rows: list[Array] = []

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Tap):
            rows.append(step.g)

    everywhere = np.ones(batch.label_BT.shape, dtype=bool)
    head = head_backward(config, parameters, final_BTD, batch.label_BT, everywhere)
    loss = transformer.drain(head, take)
    g_BTV = np.concatenate(rows).reshape(*everywhere.shape, -1)
    taps = {"head": Tap("head", final_BTD, g_BTV)}
    for step in transformer.backward(config, parameters, loss.d_final_BTD, trace, ops):
        if isinstance(step, Tap):
            taps[step.name] = step
    return taps, final_BTD


def _some(config: ModelConfig, corpus: Corpus, planned: Plan) -> Corpus:
    """The first sequences of the corpus that have labels in the planned width, cut to that width.

    Sequences with two labels or more are preferred. A label in the last column does not count if
    there are others: then some position reaches no label, which O30 needs. Of images, the first
    ones with a label are taken.
    """
    label = require_fit("audit", corpus, config)
    if corpus.images is not None:
        good = np.flatnonzero(label[:, 0] >= 0)[: planned.sequences]
        if not len(good):
            raise EmptyError("audit: no image of the corpus has a label. Give some.")
        return Corpus(images=corpus.images[good], labels=label[good, 0])
    T = planned.width
    whole = label[:, :T]
    cut = np.where(np.arange(T) < T - 1, whole, NO_LABEL)
    for label, least in ((cut, 2), (cut, 1), (whole, 1)):
        good = np.flatnonzero((label >= 0).sum(axis=1) >= least)[: planned.sequences]
        if len(good):
            token, part = require_tokens("audit", corpus), np.ix_(good, np.arange(T))
            return Corpus(token[part], label[part], corpus.real[part], corpus.segment[part])
    raise EmptyError(
        f"audit: no sequence of the corpus has a label in its first {T} positions; the identities "
        "of gradients need some. Give a corpus of longer sequences, or labels."
    )


def _batch(config: ModelConfig, some: Corpus) -> Batch:
    """The batch as the definitions read it. Padding is a segment of its own, which nothing sees."""
    if some.images is not None:
        return image_batch(config, some.images, some.label)
    token, segment = require_tokens("audit", some).astype(np.int64), some.segment.astype(np.int64)
    segment = np.where(some.real, segment, segment.max() + 1)
    return Batch(config, token, some.label, segment, np.arange(len(token)))


def _real(some: Corpus, batch: Batch) -> Array:
    return np.ones(batch.segment_BT.shape, bool) if some.images is not None else some.real
