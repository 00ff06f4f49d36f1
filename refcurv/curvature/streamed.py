"""Factors of a model that memory does not hold: block by block, each block's sums before the next.

`passes.streaming` says how shards pass. Here is what is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from refcurv.curvature import room
from refcurv.curvature.accumulate import ShardSums, accumulate
from refcurv.curvature.factors import (
    Factor,
    Factors,
    asked,
    fingerprint,
    finished,
    made_of,
    warn_of_changes,
)
from refcurv.curvature.factors_file import load_factors, save_factors
from refcurv.curvature.halves import require_two
from refcurv.curvature.moments import Key, Side, empty_sums
from refcurv.curvature.parts import add_part, discard, open_parts, require_all
from refcurv.curvature.plan import Plan, plan
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.files.lazy import Lazy
from refcurv.files.paths import require_space
from refcurv.files.scratch import Scratch
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.passes.parallel import Turnstile
from refcurv.passes.rounding import as_it_is, looked_at, noise, other_runs
from refcurv.passes.shards import Shard, shards
from refcurv.passes.streaming import Course, Stage, States, ascend, descend, stages, weights_at
from refcurv.passes.sweep import Sweep, require_few_passes
from refcurv.progress import Progress, counter, silent


def each_group(
    model: Model,
    units: Sequence[Shard],
    job: Sweep,
    groups: Sequence[frozenset[str]],
    states: States,
    in_flight: int | None = None,
    progress: Progress = silent,
) -> Iterator[Mapping[str, Factor]]:
    """The factors of each group of layers, top down, as soon as they are summed.

    Definition: those of `factors.summed`, bit for bit. A group holds layers of one block, the head,
    or layers below all blocks. Every wanted layer is in one group.

    Args: states, an empty mapping, in memory or in a file: what shards carry between two blocks.

    Cost: as `collect`, one more forward through the blocks of wanted layers and those above, and
        for each further group of a block its forward and backward again.
    Proof: tests/test_streaming.py::test_every_bit_is_that_of_the_pass_in_memory
    """
    config, dtype = model.config, np.dtype(model.dtype)
    main = [Course(unit.number, config, as_it_is, unit, job) for unit in units]
    numbers = looked_at(units)
    looks = {
        number: [
            Course((number, k), *run) for k, run in enumerate(other_runs(config, unit, job, dtype))
        ]
        for unit in units
        if (number := unit.number) in numbers
    }
    courses = [*main, *(course for runs in looks.values() for course in runs)]
    steps = list(stages(config, groups))
    total = len(courses) * config.layers + len(units) * len(steps)
    done = counter(progress, total)
    progress(0, total)
    ascend(model, courses, max(steps[-1].at, 0), states, in_flight, done)
    for stage in steps:
        made = _sums_of(stage, model, units, job, looks, states, in_flight, done)
        if stage.layers:
            yield made
        del made  # before the next ones are summed


def _sums_of(
    stage: Stage,
    model: Model,
    units: Sequence[Shard],
    job: Sweep,
    looks: Mapping[int, Sequence[Course]],
    states: States,
    in_flight: int | None,
    done: Callable[[], object],
) -> Mapping[str, Factor]:
    """All shards back through one stage, and the factors of its layers."""
    config, this = model.config, replace(job, layers=stage.layers)
    totals = empty_sums(config, this)
    parameters = weights_at(model, stage.at)
    back = partial(descend, stage, parameters, states)

    def work(ordinal: int, unit: Shard, turnstile: Turnstile) -> None:
        sums = ShardSums(config, totals, turnstile, ordinal, this)
        back(Course(unit.number, config, as_it_is, unit, job), sums.take)
        sums.finish()
        if unit.number in looks:  # alone in its block, so that it needs no turn
            runs = [partial(back, course) for course in looks[unit.number]]
            for name, (one, count) in noise(runs, stage.layers).items():
                totals[Key(Side.noise, name)].add(np.array(one), count)
        done()

    accumulate(units, work, totals, in_flight, None, silent)
    return finished(config, this, totals, in_flight) if stage.layers else {}


# ------------------------------------------------------------------ into a file


def collect_to(
    model: Model,
    corpus: Corpus,
    path: str | Path,
    layers: str = "blocks.*.mlp.*",
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    *,
    memory: int,
    rows: str = "reached",
    in_flight: int | None = None,
    halves: bool = False,
    told: Callable[[Plan], object] = lambda _: None,
    progress: Progress = silent,
) -> None:
    """`collect` straight into a factors file, within so much memory, for a model of any depth.

    Definition: what `save_factors(collect(...), path)` writes, bit for bit. Weights are read block
    by block, and sums are written as soon as they are whole.

    Args:
        model: read from a file, so that a later run can tell whether it goes on from this one.
        corpus: the same.
        path: of the factors file.
        layers: this and the next three as for `collect`.
        fisher: see there.
        seed: see there.
        draws: see there.
        rows: as for `collect`.
        memory: bytes that the process may take, with what it has already. It decides what is done
            at one time (`plan.plan`), and no bit.
        in_flight: shards at a time, at most; by default one per core.
        halves: as for `collect`.
        told: called with the plan before the work.
        progress: called with (blocks of shards done, all of them).

    Raises:
        RoomError: the figure is too small; says what the least would be. StorageError: the disk
            has not room for the sums twice. Others as `collect`.

    Layers that are whole lie in the folder PATH.unfinished.layers, from which a run that was killed
    goes on. It is gone at the end.

    Cost: as `each_group`; disk for the sums twice.
    Proof: tests/test_streaming.py::test_a_file_is_that_of_the_pass_in_memory,
        ::test_a_killed_run_goes_on
    """
    config = model.config
    job, keep = asked(config, layers, fisher, seed, draws, rows, halves)
    names = [n for n in config.linear_layers() | config.tables() if n in job.layers]
    units = shards(corpus, config, keep)
    require_few_passes("collect", units, job, config.vocabulary)
    require_two(units, job)
    facts = fingerprint(model, corpus, job, keep)
    parts, own = open_parts("collect", path, facts, names, load_factors), digest(model)
    inputs = store.inputs(model.source, corpus.source)
    left = replace(job, layers=job.layers - set(parts.layers))

    def factors_of(some: Mapping[str, Factor]) -> Factors:
        return made_of(some, job, keep, units, model.dtype, inputs, own)

    if left.layers:
        require_space("collect", path, room.sums(config, job) + room.sums(config, left))
        chosen = plan("collect", model, units, left, memory, in_flight)
        told(chosen)
        states: States = Scratch(parts.folder.parent) if chosen.on_disk else {}
        how = states, chosen.in_flight, progress
        for some in each_group(model, units, left, chosen.groups, *how):
            add_part(parts, some, partial(save_factors, factors_of(some)))
            del some
        parts = open_parts("collect", path, facts, names, load_factors)
        require_all(parts, names)
    warn_of_changes("collect", model, corpus)
    save_factors(factors_of(Lazy(names, parts.layers.__getitem__)), path)
    discard(parts)
