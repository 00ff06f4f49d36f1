"""How to collect within a memory figure: what is kept at one time, and what that takes.

What a collection takes follows from widths and counts alone, so that it is known before the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from refcurv.algebra.attention import LANES
from refcurv.curvature import room
from refcurv.law.conventions import HEAD_ROWS, Fisher
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig, Norm, NormPlace, QKNorm, Residual
from refcurv.model.weights import Model
from refcurv.passes.fast import QUERY_ROWS
from refcurv.passes.groups import cores
from refcurv.passes.rounding import copies_of, looked_at, some_of
from refcurv.passes.shards import Shard
from refcurv.passes.streaming import Stage, names_at, place, stages
from refcurv.passes.sweep import Sweep

POSITION = 42
"""Bytes of a position in a shard: its token, label and layout, and is it kept; in 64 bits each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a streamed collection is done, and what it takes.

    Fields: groups, the layers whose sums are made together; in_flight, shards at a time; on_disk,
    do states lie in a file; bytes, of memory at the peak, beside what the process has already;
    work, how long it takes, in passes of all shards through one block, on one core.
    """

    groups: tuple[frozenset[str], ...]
    in_flight: int
    on_disk: bool
    bytes: int
    work: float

    @property
    def text(self) -> str:
        """One line for a person."""
        where = "on disk" if self.on_disk else "in memory"
        return (
            f"foresees {self.bytes / room.GIB:.2f} GiB beside what the process has: sums in "
            f"{number_of(len(self.groups), 'part')}, {number_of(self.in_flight, 'shard')} at a "
            f"time, states {where}"
        )


@dataclass(frozen=True, slots=True)
class Passed:
    """Sequences that pass together: a shard, or copies of some of its sequences.

    Fields: shape (B, T); rows and head_rows, how many are kept of a layer and of the head.
    """

    shape: tuple[int, int]
    rows: int
    head_rows: int

    @property
    def size(self) -> int:
        """Positions."""
        return math.prod(self.shape)


def passed(shard: Shard, copies: int = 1) -> Passed:
    """A shard, or so many copies of it."""
    B, T = shard.layout.position_BT.shape
    rows, head_rows = int(shard.keep_BT.sum()), int(shard.head_BT.sum())
    return Passed((copies * B, T), copies * rows, copies * head_rows)


def widest_of(units: Sequence[Shard]) -> Passed:
    """The largest shard; of several that of the fewest rows, which are copied."""
    return max(map(passed, units), key=lambda one: (one.size, -one.rows))


def rounding_runs(config: ModelConfig, units: Sequence[Shard]) -> list[Passed]:
    """What passes once more for its rounding to be looked at (`rounding.other_runs`), run by run.

    Proof: tests/test_forecast.py::test_what_passes_again_are_the_runs_of_rounding
    """
    numbers, out = looked_at(units), []
    for unit in units:
        if unit.number in numbers:
            few = some_of(config, unit)
            out += [passed(few, len(nudges)) for nudges in copies_of(unit, few)]
    return out


class Load(NamedTuple):
    """What is to pass: the shards, the widest of them, and what passes again."""

    units: Sequence[Shard]
    widest: Passed
    again: Sequence[Passed]


def load_of(config: ModelConfig, units: Sequence[Shard]) -> Load:
    """What a collection over these shards passes."""
    return Load(units, widest_of(units), rounding_runs(config, units))


def plan(
    who: str, model: Model, units: Sequence[Shard], job: Sweep, memory: int, in_flight: int | None
) -> Plan:
    """The plan of least time among those with which the process has at most `memory` bytes.

    Raises:
        RoomError: none does; says how much the least one needs.

    Proof: tests/test_streaming.py::test_too_small_a_figure_is_refused_with_the_least
    """
    every, has = list(plans(model, units, job, in_flight)), room.used() + room.CODE
    fit = [one for one in every if has + one.bytes <= memory]
    if fit:
        return min(fit, key=lambda one: (one.work, one.bytes))
    least = min(one.bytes for one in every)
    raise room.too_small(who, has, least, memory, "Give more, or take fewer layers.")


def plans(model: Model, units: Sequence[Shard], job: Sweep, asked: int | None) -> Iterator[Plan]:
    """Every plan that there is, by what it does at one time."""
    most, load = min(asked or cores(), len(units)), load_of(model.config, units)
    for parts in _partitions(model.config, job):
        for in_flight in range(1, most + 1):
            for on_disk in (False, True):
                yield _plan(model, load, job, parts, in_flight, on_disk)


def _partitions(config: ModelConfig, job: Sweep) -> Iterator[tuple[frozenset[str], ...]]:
    """The wanted layers by the place where they lie; then in ever smaller parts, to single ones."""
    by_place: dict[int, list[str]] = {}
    for name in [*config.linear_layers(), *config.tables()]:
        if name in job.layers:
            by_place.setdefault(place(config, name), []).append(name)
    largest = max(len(names) for names in by_place.values())
    seen = set()
    for parts in range(1, largest + 1):
        made = tuple(
            frozenset(names[k :: min(parts, len(names))])
            for names in by_place.values()
            for k in range(min(parts, len(names)))
        )
        if made not in seen:
            seen.add(made)
            yield made


# ------------------------------------------------------------------ what a plan takes


def _plan(
    model: Model,
    load: Load,
    job: Sweep,
    groups: tuple[frozenset[str], ...],
    in_flight: int,
    on_disk: bool,
) -> Plan:
    config, item = model.config, np.dtype(model.dtype).itemsize
    steps = list(stages(config, groups))
    lowest = max(steps[-1].at, 0)
    kept = POSITION * sum(look.size for look in load.again)
    kept += 0 if on_disk else _states(config, load, job, item, lowest)
    # what passes again is in flight beside shards
    each = (
        block_bytes(config, one.shape, item, back=False)
        for one in (*[load.widest] * in_flight, *load.again)
    )
    up = max(weights_bytes(model, at) for at in range(-1, config.layers))
    up += sum(sorted(each)[-in_flight:])
    down = max(_stage(model, load, job, stage, in_flight) for stage in steps)
    # every block forward; those from the lowest on again, and back, which is twice a forward
    work = config.layers + 3 * len(steps) + (0.1 if on_disk else 0.0)
    return Plan(groups, in_flight, on_disk, int(kept + max(up, down)), work / in_flight)


def _stage(model: Model, load: Load, job: Sweep, stage: Stage, in_flight: int) -> int:
    """What one step of the backward holds, without what shards carry between steps."""
    config, item = model.config, np.dtype(model.dtype).itemsize
    parameters = weights_bytes(model, stage.at)
    sums = room.Need(0, (0,), "")
    if stage.layers:
        sums = room.to_collect(config, replace(job, layers=stage.layers), item, load.units)
    each = _passing(config, job, stage, load.widest, item)
    again = [_noise(config, job, stage, look, item) for look in load.again]
    one = max([each, *again])  # one passes again at a time
    shards = in_flight * sums.each[0] + (in_flight - 1) * each + one
    sizes = config.linear_layers() | config.tables()
    # a layer's sums are made whole when they are written
    whole = max((8 * sum(n * n for n in sizes[name]) for name in stage.layers), default=0)
    return parameters + sums.once + max(shards, whole)


def _passing(config: ModelConfig, job: Sweep, stage: Stage, one: Passed, item: int) -> int:
    """What sequences take on their way back through the head, a block, or the input."""
    if stage.at == config.layers:
        return head_bytes(config, one.shape, item, job.fisher)
    copied = copied_bytes(config, stage.layers, one, item)
    return copied + (block_bytes(config, one.shape, item, back=True) if stage.at >= 0 else 0)


def _noise(config: ModelConfig, job: Sweep, stage: Stage, look: Passed, item: int) -> int:
    """What it takes to pass copies of some sequences, and to hold a layer's rows of all of them."""
    each = _passing(config, job, stage, look, item)
    if stage.at == config.layers:  # what is held of a few chunks is less than their logits
        return max(each, joined_bytes(config, stage.layers, look, item))
    return each + held_bytes(config, stage.layers, look, item)


def _states(config: ModelConfig, load: Load, job: Sweep, item: int, lowest: int) -> int:
    """What all carry: what each block from the lowest on reads, and the gradients that come.

    The first of the gradients takes the place of what the head reads.
    """
    blocks = config.layers - lowest
    carried = sum(
        unit.layout.position_BT.size * (blocks + job.passes(unit, config.vocabulary))
        for unit in load.units
    )
    carried += sum(look.size * (blocks + 1) for look in load.again)
    return item * config.width * carried


# ------------------------------------------------------------------ rows that are held


def held_bytes(config: ModelConfig, layers: Iterable[str], one: Passed, item: int) -> int:
    """The kept rows of one of these layers, input and gradient: at most."""
    sizes = config.linear_layers() | config.tables()
    rows = {"head": one.head_rows}
    return item * max((rows.get(n, one.rows) * sum(sizes[n]) for n in layers), default=0)


def joined_bytes(config: ModelConfig, layers: Iterable[str], one: Passed, item: int) -> int:
    """The head's rows in parts, and joined (`rounding.noise`), if they come in several."""
    if one.head_rows <= HEAD_ROWS:
        return 0
    return 2 * held_bytes(config, set(layers) & {"head"}, one, item)


def copied_bytes(config: ModelConfig, layers: Iterable[str], one: Passed, item: int) -> int:
    """The kept rows of one of these layers, where they are copied: not all are kept."""
    layers = set(layers) - {"head"}
    return 0 if one.rows == one.size else held_bytes(config, layers, one, item)


# ------------------------------------------------------------------ what a stage takes


def weights_bytes(model: Model, at: int) -> int:
    """The parameters of a stage, and the largest of them once more as it is read and checked."""
    config, item = model.config, np.dtype(model.dtype).itemsize
    shapes = config.parameter_shapes()
    names = names_at(config, at)
    sizes = [int(np.prod(shapes[name])) for name in names]
    return item * sum(sizes) + (item + 1) * max(sizes, default=0)


def trace_bytes(config: ModelConfig, shape: tuple[int, ...], item: int) -> int:
    """What one block keeps of a shard (B, T) for its backward (`transformer.BlockTrace`).

    Proof: tests/test_forecast.py::test_a_trace_takes_what_is_foretold
    """
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    normed = 1 if config.qk_norm is not QKNorm.NONE else 0  # then what is normed is kept too
    kept = (q + kv) * (2 + normed) + config.width * _streams(config) + _statistics(config)
    kept += config.mlp_width * (2 if config.gated else 1)
    clipped = q + 2 * kv if config.qkv_clip is not None else 0  # a byte tells where
    seen = 16 if any(config.windows) else 8  # the first key, where it is the block's own, and last
    return math.prod(shape) * (item * kept + clipped + seen)


def _streams(config: ModelConfig) -> int:
    """How many arrays (B, T, D) a block's trace holds: what norms and layers read."""
    pre, post = _norms(config)
    count = 1 + pre + 2 * post
    if config.residual is Residual.SEQUENTIAL:
        return count + 1 + pre
    if config.residual is Residual.PARALLEL and pre:  # both norms read x; each centres it anew
        return count + (2 if config.norm is Norm.LAYER else 1)
    return count


def _statistics(config: ModelConfig) -> int:
    """Numbers of a position that a block's trace holds: one of each norm, two of each softmax."""
    pre, post = _norms(config)
    heads = config.heads + config.kv_heads
    normed = {QKNorm.NONE: 0, QKNorm.HEAD: heads, QKNorm.FULL: 2}[config.qk_norm]
    shared = config.residual is Residual.SHARED
    return 2 * config.heads + normed + pre * (1 if shared else 2) + 2 * post


def _norms(config: ModelConfig) -> tuple[bool, bool]:
    """Are there norms before attention and MLP, and after them?"""
    return config.norm_place is not NormPlace.POST, config.norm_place is not NormPlace.PRE


def block_bytes(config: ModelConfig, shape: tuple[int, ...], item: int, *, back: bool) -> int:
    """The trace of one block for a shard (B, T), and what is beside it on the way up or `back`.

    That is most in the MLP or in attention.

    Proof: tests/test_forecast.py::test_a_block_takes_what_is_foretold
    """
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    turned = q + kv if config.rope_theta is not None else 0  # before they are turned, and after
    mlp, attention, streams = config.mlp_width, turned, 4
    if back:
        pre, post = _norms(config)
        undone = 0 if config.qk_norm is QKNorm.NONE and config.qkv_clip is None else q + kv
        mlp = mlp * (4 if config.gated else 3)
        attention = 2 * q + 2 * kv + max(turned, undone)
        streams = 7 + pre + 2 * post
    rows = math.prod(shape)
    beside = max(rows * mlp, rows * attention + _tile(config, shape[1], back=back))
    beside += rows * config.width * streams
    return trace_bytes(config, shape, item) + item * beside


def _tile(config: ModelConfig, T: int, *, back: bool) -> int:
    """Numbers that attention holds of one head at a time, for some queries and all keys."""
    queries, keys = min(QUERY_ROWS, T), -(-T // LANES) * LANES
    scores, wide = 1, 2  # scores; k and v
    if back:  # their slopes, the soft-cap's; the gradients of k and v, and one term of them
        scores, wide = 2 if config.score_cap is None else 3, 5
    return queries * keys * scores + (keys * wide + 2 * queries) * config.head_width


def head_bytes(
    config: ModelConfig, shape: tuple[int, ...], item: int, fisher: Fisher = Fisher.EMPIRICAL
) -> int:
    """The rows of a shard (B, T) at the head; the logits of a chunk, and what is made of them.

    Proof: tests/test_forecast.py::test_the_head_takes_what_is_foretold
    """
    rows = math.prod(shape)
    arrays = 2 if fisher in (Fisher.EMPIRICAL, Fisher.SAMPLED) else 5  # signs take more
    if config.logit_cap is not None:
        arrays = 7
    arrays += rows > HEAD_ROWS  # one of the chunk before
    return item * (5 * rows * config.width + arrays * min(HEAD_ROWS, rows) * config.vocabulary)
