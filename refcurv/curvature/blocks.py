"""The exact Fisher blocks of vectors: gains, biases, the special positions of images (VECTOR).

A gain multiplies: d_gain = Σ_s g_s x̂_s. So F = Σ (Σ_s g x̂)(Σ_s g x̂)ᵀ has no Kronecker form, but
it is small. It is the second moment of gradients, one backward pass for each segment and
cotangent, without approximation. A segment is a document of a packed sequence, a sequence that is
not packed, or an image. Nothing is attended across segments, so each runs by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from refcurv.curvature import room
from refcurv.curvature.accumulate import accumulate, add_gram
from refcurv.curvature.moments import RunningSum
from refcurv.law.checks import (
    Array,
    NonFiniteError,
    RangeError,
)
from refcurv.law.conventions import NO_LABEL, Fisher
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.given import require_callable, require_corpus, require_model
from refcurv.model.layers import Layout
from refcurv.model.patterns import expand
from refcurv.model.transformer import Cotangent, Parameters, Slope, Tap
from refcurv.model.weights import Model, resident
from refcurv.passes.fast import FAST
from refcurv.passes.parallel import Turnstile
from refcurv.passes.shards import Shard, inputs_of, shards
from refcurv.passes.sweep import Sweep, lowest_block, require_few_passes, sweep_of
from refcurv.progress import Progress, silent

MOST_BYTES = 2**33
"""The most memory for all blocks together: totals, sums of a block, shards in flight."""

ROWS = 512
"""How many gradients are multiplied at one time."""


@dataclass(frozen=True, slots=True)
class Block:
    """One vector's exact block: sum_F (P, P) [nats²/parameter²], float64, exactly symmetric.

    Fields: sum_F = Σ D Dᵀ; segments, those with a label; draws, of labels or signs.
    """

    sum_F: Array
    segments: int
    draws: int

    @property
    def F(self) -> Array:
        """(1/draws) Σ D Dᵀ, of the summed loss."""
        return self.sum_F / self.draws


@dataclass(frozen=True, slots=True)
class Blocks(Mapping[str, Block]):
    """The blocks of some vectors, by parameter name in file order, and how they were made."""

    blocks: Mapping[str, Block]
    fisher: Fisher
    seed: int
    draws: int
    dtype: str

    def __getitem__(self, name: str) -> Block:
        """The block of one parameter."""
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names, in file order."""
        return iter(self.blocks)

    def __len__(self) -> int:
        """How many parameters."""
        return len(self.blocks)


def collect_blocks(
    model: Model,
    corpus: Corpus,
    parameters: str = "**_norm.*",
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    *,
    in_flight: int | None = None,
    progress: Progress = silent,
) -> Blocks:
    """The exact Fisher blocks of vectors: norm gains and biases, linear biases, special positions.

    Definition
        F = (1/draws) Σ_seg Σ_c D_c D_cᵀ, D_c (P,) the gradient of one segment's summed nats, all
        its positions together, against what FISHER sends back: the labels or signs of one draw, or
        for `expected` one column of the root at one position. A segment is a document, or an image:
        packing changes nothing but which labels and signs are drawn (SAMPLING). No Kronecker form
        is assumed, and no cross-position term dropped (THREE, VECTOR).

    Args:
        model: its `dtype` is that of the gradients and of their products in a shard (PRECISION).
        corpus: as for `collect`.
        parameters: a pattern over the model's vectors, e.g. "final_norm.weight" or "**.bias".
        fisher: "sampled", "signed", "empirical" or, for small models, "expected" (FISHER).
        seed: of what is drawn (SAMPLING), in [0, 2**64).
        draws: of labels or signs per position.
        in_flight: shards at a time; by default one per core. Changes no bit.
        progress: called with (shards done, shards).

    Returns:
        Blocks: parameter name → sum_F (P, P), segments, draws, and F.

    Raises:
        NameUnknownError: no vector matches. RangeError: token ids, seed or draws out of range;
        blocks of more than 8 GiB; an `expected` of more than 2**16 backward passes.
        EmptyError: no label anywhere. NonFiniteError: a gradient is NaN or infinite.
        ConventionError: an unknown choice.

    Cost: for each segment one forward and `draws` backward passes (`expected`: labelled positions
        × vocabulary) down to the lowest block named, and P² per pass; memory 8 P² bytes,
        2 + `in_flight` times each.
    Source: O49; VECTOR, FISHER.
    Proof: tests/test_biases.py::test_O49_blocks_are_the_exact_fisher,
        tests/test_biases.py::test_O52_packing_changes_no_block,
        tests/test_biases.py::test_blocks_are_independent_of_threads
    """
    who, config = "collect_blocks", require_model("collect_blocks", model).config
    require_corpus(who, corpus)
    require_callable(who, "progress", progress)
    in_flight = room.at_a_time(who, in_flight)
    vectors = _vectors(config, parameters, in_flight)
    job = sweep_of(who, vectors, fisher, seed, draws)
    units = shards(corpus, config)
    if job.fisher is Fisher.EXPECTED:
        alone = (one.sent for unit in units for one in _segments(config, unit))
        require_few_passes(who, alone, job, config.vocabulary)
    read = resident(model)
    totals = {name: RunningSum(size, size) for name, size in vectors.items()}

    def work(ordinal: int, unit: Shard, turnstile: Turnstile) -> None:
        found = _ShardBlocks(config, read, unit, job)
        for name in vectors:
            with turnstile.turn(name, ordinal):
                totals[name].add(found.product[name], found.segments)

    accumulate(units, work, totals, in_flight, None, progress)
    blocks = {name: _finish(name, total, job.draws) for name, total in totals.items()}
    return Blocks(MappingProxyType(blocks), job.fisher, job.seed, job.draws, model.dtype)


def _vectors(config: ModelConfig, pattern: str, in_flight: int) -> dict[str, int]:
    """The vectors that the pattern names, with their sizes; refuses more than MOST_BYTES."""
    shapes = config.parameter_shapes()
    vectors = {name: shape[0] for name, shape in shapes.items() if len(shape) == 1}
    names = expand(pattern, list(vectors))
    size = sum(8 * (2 + in_flight) * vectors[name] ** 2 for name in names)
    if size > MOST_BYTES:
        raise RangeError(
            f"collect_blocks: the {number_of(len(names), 'block')} would take "
            f"{size / 2**30:,.1f} GiB (at most "
            f"{MOST_BYTES >> 30} GiB are made). Name fewer parameters at a time.",
            size=size,
        )
    return {name: vectors[name] for name in names}


def _finish(name: str, total: RunningSum, draws: int) -> Block:
    sum_F = total.finish()
    if not np.isfinite(sum_F).all():
        raise NonFiniteError(
            f"collect_blocks: the block of {name!r} holds NaN or infinity. Do the weights hold "
            "NaN, or did float32 activations overflow? Try float64."
        )
    return Block(sum_F, total.rows, draws)


# ------------------------------------------------------------------ one shard


class _ShardBlocks:
    """Σ D Dᵀ over one shard's segments and passes, lower triangles in the compute dtype."""

    def __init__(self, config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep):
        self.product = {
            name: np.zeros((len(parameters[name]),) * 2, parameters[name].dtype)
            for name in job.layers
        }
        self.segments = 0
        self._open: list[dict[str, Array]] = []
        for one in _segments(config, shard):
            self.segments += 1
            for gradient in _gradients(config, parameters, one, job):
                self._open.append(gradient)
                if len(self._open) == ROWS:
                    self._multiply()
        self._multiply()

    def _multiply(self) -> None:
        for name, product in self.product.items():
            if self._open:
                rows = np.stack([gradient[name] for gradient in self._open])
                self.product[name] = add_gram(rows, product, onto=True)
        self._open.clear()


@dataclass(frozen=True, slots=True)
class _Segment:
    """One segment of a shard by itself.

    Fields: shard, the segment's positions alone; sent, its whole sequence with the segment's labels
    only, because labels are drawn by the position in the sequence (SAMPLING); first, where the
    segment begins in the sequence.
    """

    shard: Shard
    sent: Shard
    first: int


def _segments(config: ModelConfig, shard: Shard) -> Iterator[_Segment]:
    """Each labelled segment of a shard, in order."""
    for b, label_T in enumerate(shard.label_BT):
        first_T, real_T = shard.layout.first_BT[b], shard.layout.last_BT[b] >= 0
        for first in np.unique(first_T[np.flatnonzero(label_T >= 0)]):
            own_T = first_T == first  # of an image every position, and its one label
            end = int(first) + int((own_T & real_T).sum())
            sent = _cut(config, shard, b, 0, len(first_T))
            label_BT = np.where(own_T[: len(label_T)], label_T, NO_LABEL)[None]
            part = _cut(config, shard, b, int(first), end)
            yield _Segment(part, replace(sent, label_BT=label_BT), int(first))


def _cut(config: ModelConfig, shard: Shard, b: int, first: int, end: int) -> Shard:
    """Positions first .. end − 1 of one sequence as a shard; its row in the corpus stays."""
    row, at = slice(b, b + 1), (slice(b, b + 1), slice(first, end))
    layout = shard.layout
    return replace(
        shard,
        index_B=shard.index_B[row],
        source=shard.source[at if config.image is None else row],
        label_BT=shard.label_BT[at],
        keep_BT=shard.keep_BT[at],
        head_BT=shard.head_BT[at],
        layout=Layout(
            layout.position_BT[at], layout.first_BT[at] - first, layout.last_BT[at] - first
        ),
    )


def _gradients(
    config: ModelConfig, parameters: Parameters, one: _Segment, job: Sweep
) -> Iterator[dict[str, Array]]:
    """One segment's gradient of every wanted vector, once per cotangent."""
    shard, lowest = one.shard, lowest_block(config, job.layers)
    inputs = inputs_of(config, shard)
    final_BTD, trace = transformer.forward(config, parameters, inputs, shard.layout, FAST, lowest)
    for whole in job.cotangents(one.sent, config.vocabulary):

        def cotangent(row_N: Array, logit_NV: Array, whole: Cotangent = whole) -> Array:
            return whole(row_N + one.first, logit_NV)

        found: dict[str, Array] = {}

        def take(step: Tap | Slope, found: dict[str, Array] = found) -> None:
            if isinstance(step, Slope) and step.name in job.layers:
                found[step.name] = found[step.name] + step.d if step.name in found else step.d

        head = transformer.head_transpose(config, parameters, final_BTD, shard.head_BT, cotangent)
        d_final_BTD = transformer.drain(head, take)  # in chunks: the head's bias comes in parts
        steps = transformer.backward(config, parameters, d_final_BTD, trace, FAST)
        while len(found) < len(job.layers):
            take(next(steps))
        yield found
