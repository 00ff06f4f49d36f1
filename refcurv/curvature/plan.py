"""How to collect within a memory figure: what is kept at one time, and what that takes.

What a collection takes follows from widths and counts alone, so that it is known before the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refcurv.curvature import room
from refcurv.law.conventions import HEAD_ROWS
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig, NormPlace, QKNorm
from refcurv.model.weights import Model
from refcurv.passes.fast import QUERY_ROWS
from refcurv.passes.parallel import cores
from refcurv.passes.rounding import copies_of, some_of
from refcurv.passes.shards import Shard
from refcurv.passes.streaming import Stage, names_at, place, stages
from refcurv.passes.sweep import Sweep


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
    most = min(asked or cores(), len(units))
    for parts in _partitions(model.config, job):
        for in_flight in range(1, most + 1):
            for on_disk in (False, True):
                yield _plan(model, units, job, parts, in_flight, on_disk)


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
    units: Sequence[Shard],
    job: Sweep,
    groups: tuple[frozenset[str], ...],
    in_flight: int,
    on_disk: bool,
) -> Plan:
    config, item = model.config, np.dtype(model.dtype).itemsize
    steps = list(stages(config, groups))
    lowest = max(steps[-1].at, 0)
    widest = max(units, key=lambda unit: unit.layout.position_BT.size)
    shape = widest.layout.position_BT.shape
    kept = 0 if on_disk else _states(config, units, job, item, lowest)
    up = max(
        weights_bytes(model, at) + in_flight * block_bytes(config, shape, item, back=False)
        for at in range(-1, config.layers)
    )
    down = max(_stage(model, units, job, stage, widest, in_flight) for stage in steps)
    # every block forward; those from the lowest on again, and back, which is twice a forward
    work = config.layers + 3 * len(steps) + (0.1 if on_disk else 0.0)
    return Plan(groups, in_flight, on_disk, int(kept + max(up, down)), work / in_flight)


def _stage(
    model: Model,
    units: Sequence[Shard],
    job: Sweep,
    stage: Stage,
    widest: Shard,
    in_flight: int,
) -> int:
    """What one step of the backward holds, without what shards carry between steps."""
    config, item = model.config, np.dtype(model.dtype).itemsize
    parameters = weights_bytes(model, stage.at)
    sums = room.Need(0, (0,), "")
    if stage.layers:
        sums = room.to_collect(config, replace(job, layers=stage.layers), item, units)
    shape = widest.layout.position_BT.shape
    each = _passing(config, stage.at, shape, item)
    one = max(each, _noise(config, stage, widest, item))  # one shard's rounding is looked at
    shards = in_flight * sums.each[0] + (in_flight - 1) * each + one
    sizes = config.linear_layers() | config.tables()
    # a layer's sums are made whole when they are written
    whole = max((8 * sum(n * n for n in sizes[name]) for name in stage.layers), default=0)
    return parameters + sums.once + max(shards, whole)


def _noise(config: ModelConfig, stage: Stage, shard: Shard, item: int) -> int:
    """What it takes to pass some sequences of a shard, and beside them the same nudged."""
    few = some_of(config, shard)
    B, T = few.layout.position_BT.shape
    shape = len(copies_of(shard, few)[0]) * B, T
    rows, sizes = math.prod(shape), config.linear_layers() | config.tables()
    widest = max((sum(sizes[name]) for name in stage.layers), default=0)
    each = _passing(config, stage.at, shape, item)
    return int(each + item * rows * widest)  # the kept rows of a layer are copied


def _passing(config: ModelConfig, at: int, shape: tuple[int, ...], item: int) -> int:
    """What one shard (B, T) takes on its way back through the head, a block, or the input."""
    if at == config.layers:
        return head_bytes(config, shape, item)
    return block_bytes(config, shape, item, back=True) if at >= 0 else 0


def _states(config: ModelConfig, units: Sequence[Shard], job: Sweep, item: int, lowest: int) -> int:
    """What shards carry: what each block from the lowest on reads, and the gradients that come."""
    size = sum(unit.layout.position_BT.size for unit in units) * config.width * item
    return size * (config.layers - lowest + job.draws + 1)


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
    heads = (config.heads + config.kv_heads) * config.head_width
    normed = 1 if config.qk_norm is not QKNorm.NONE else 0  # then what is normed is kept too
    streams = 6 if config.norm_place is NormPlace.BOTH else 4
    kept = heads * (2 + normed) + config.width * streams
    kept += config.mlp_width * (2 if config.gated else 1)
    clipped = (config.heads + 2 * config.kv_heads) * config.head_width  # a byte tells where
    return math.prod(shape) * (item * kept + (clipped if config.qkv_clip is not None else 0))


def block_bytes(config: ModelConfig, shape: tuple[int, ...], item: int, *, back: bool) -> int:
    """The trace of one block for a shard (B, T), and what is beside it on the way up or `back`."""
    T = shape[1]
    heads = (config.heads + config.kv_heads) * config.head_width
    beside = heads if config.rope_theta is not None else 0  # q and k before they are turned
    beside += config.mlp_width + 4 * config.width
    if back:
        beside += config.mlp_width * (3 if config.gated else 2) + 3 * config.width
    # of one head at a time: scores, their slopes, the soft-cap's; k, v, their gradients, one term
    scores = (2 if config.score_cap is None else 3) * min(QUERY_ROWS, T) * T
    tile = scores + 5 * T * config.head_width
    return trace_bytes(config, shape, item) + item * (math.prod(shape) * beside + tile)


def head_bytes(config: ModelConfig, shape: tuple[int, ...], item: int) -> int:
    """The rows of a shard (B, T) at the head; the logits of a chunk, and what is made of them."""
    rows = math.prod(shape)
    return item * (5 * rows * config.width + 4 * min(HEAD_ROWS, rows) * config.vocabulary)
