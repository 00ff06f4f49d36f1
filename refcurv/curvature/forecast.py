"""How long a collection or a decomposition takes, and what of the machine: told before the work.

Memory and disk follow from widths and counts. Time does not: so a little of the same work is done,
and timed, on one thread. It is of the right order; what else the machine does is not foreseen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra import blas
from refcurv.curvature import room
from refcurv.curvature.accumulate import add_gram
from refcurv.curvature.plan import (
    POSITION,
    Passed,
    block_bytes,
    copied_bytes,
    head_bytes,
    held_bytes,
    joined_bytes,
    trace_bytes,
    widest_of,
)
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.law.words import number_of
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.groups import cores
from refcurv.passes.rounding import some_of
from refcurv.passes.shards import Shard, may_be_cut
from refcurv.passes.sweep import Sweep, lowest_block, sweep

PROBE = 256
"""Width of the matrix whose eigenbasis is timed.  Chosen: it takes some 5 ms."""


SOME = 256
"""Positions that are passed to time them.  Chosen: by SmolLM2-135M in 1.4 s; of the benchmark's
proxies each takes 1.01 times what it takes in a whole shard, and with 64 positions 1.3 to 1.4."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job will take.

    Fields: layers; of, the corpus in words, empty of a decomposition; seconds; memory, bytes of the
    process at its peak; disk, bytes of the file that is written.
    """

    layers: int
    of: str
    seconds: float
    memory: int
    disk: int


Told = Callable[[Forecast], object]
"""Called with the forecast before the work."""


def of_collection(
    config: ModelConfig,
    parameters: Parameters,
    corpus: Corpus,
    units: Sequence[Shard],
    job: Sweep,
    need: room.Need,
    in_flight: int,
    again: Sequence[Passed],
) -> Forecast:
    """What a collection in memory takes; some sequences of the first shard are passed for it.

    Definition: seconds = t Σ w(unit) / w(some) / (shards at a time), w = positions x (1 + 2 x
    backward passes): a backward pass takes as long as two forward ones.

    Args: need, `room.to_collect` with the weights that are not read yet; again, what passes once
        more when its shard is done (`plan.rounding_runs`), one at a time.

    Cost: a pass of a few labels, which compiles the kernels, and one of SOME positions.
    Proof: tests/test_forecast.py::test_a_collection_takes_about_what_is_foretold,
        ::test_the_memory_is_about_what_is_foretold
    """
    first = next((unit for unit in units if (unit.label_BT >= 0).any()), units[0])
    few, some = some_of(config, first), _beginning(config, first)
    item = parameters[config.weight_of("head")].itemsize
    fisher = Fisher.SIGNED if job.fisher is Fisher.EXPECTED else job.fisher
    one = replace(job, fisher=fisher, draws=1)
    for part in (few, some):
        begin = time.perf_counter()
        with blas.one_blas_thread():
            sweep(config, parameters, part, one, _Products().take)
        took = time.perf_counter() - begin
    share = sum(_work(config, unit, job) for unit in units) / _work(config, some, one)
    shards = min(in_flight, len(units), cores())
    each = _within(config, job, widest_of(units), item)
    memory = room.used() + need.bytes(in_flight) + (min(in_flight, len(units)) - 1) * each
    memory += max([each, *(_within(config, job, look, item, looked_at=True) for look in again)])
    memory += POSITION * sum(look.size for look in again)
    many = number_of(corpus.label.size, "token" if corpus.images is None else "image")
    seconds = took * share / shards
    return Forecast(len(job.layers), many, seconds, memory, room.sums(config, job))


def _within(
    config: ModelConfig, job: Sweep, one: Passed, item: int, *, looked_at: bool = False
) -> int:
    """What sequences take on their way through all blocks; looked at, their rows are held too."""
    held = held_bytes(config, job.layers, one, item) if looked_at else 0
    joined = joined_bytes(config, job.layers, one, item) if looked_at else 0
    blocks = config.layers - lowest_block(config, job.layers)
    head = head_bytes(config, one.shape, item, job.fisher)
    if not blocks:
        return max(block_bytes(config, one.shape, item, back=False), head, joined)
    # all traces are there at the head, and when the uppermost block is gone back through
    trace = trace_bytes(config, one.shape, item)
    back = block_bytes(config, one.shape, item, back=True) - trace + max(held, joined)
    back += copied_bytes(config, job.layers, one, item)
    return blocks * trace + max(head, back)


def _beginning(config: ModelConfig, unit: Shard) -> Shard:
    """SOME positions of a shard, or one sequence that cannot be cut."""
    count, width = unit.layout.position_BT.shape
    some = unit.of(np.arange(min(count, -(-SOME // width))))
    if config.image is not None or width <= SOME or not may_be_cut(config):
        return some
    return some.until(SOME)


def of_decomposition(layers: int, width: Mapping[str, int], workers: int, disk: int) -> Forecast:
    """What eigenbases of these widths take: the work grows as the cube.

    Cost: a few milliseconds.
    Proof: tests/test_forecast.py::test_a_decomposition_takes_about_what_is_foretold
    """
    x = np.random.default_rng(0).standard_normal((PROBE, 2 * PROBE))
    for _ in range(2):
        begin = time.perf_counter()
        with blas.one_blas_thread():
            blas.eigh(x @ x.T, "forecast")
        took = time.perf_counter() - begin
    cubes = sum((n / PROBE) ** 3 for n in width.values())
    need = room.to_decompose(width)
    seconds = took * max(cubes / workers, max(width.values(), default=0) ** 3 / PROBE**3)
    return Forecast(layers, "", seconds, room.used() + need.bytes(workers), disk)


class _Products:
    """Takes rows as a shard's sums do, and keeps nothing."""

    def __init__(self) -> None:
        self._input: Array | None = None

    def take(self, number: int, tap: Tap) -> None:
        """The products of one layer; those of an input that was just taken are not made again."""
        add_gram(tap.g, np.empty((tap.g.shape[1],) * 2, tap.g.dtype), onto=False)
        if number == 0 and tap.a is not self._input and tap.name not in TABLES:
            self._input = tap.a
            add_gram(tap.a, np.empty((tap.a.shape[1],) * 2, tap.a.dtype), onto=False)


def _work(config: ModelConfig, unit: Shard, job: Sweep) -> float:
    """In positions that pass forward."""
    return unit.layout.position_BT.size * (1 + 2 * job.passes(unit, config.vocabulary))
