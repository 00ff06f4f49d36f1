"""The sweep with the weights of one block in memory: all shards through a block, then the next.

`passes.sweep` takes one shard through all blocks. Here all shards pass the input, then block 0,
then block 1, and so on. The backward comes down the same way. It computes a block again from what
the block read, and differentiates it at once. So memory holds the weights of one block, the traces
of the shards in flight in it, and what the blocks read. For each shard the same functions are
called on the same arrays as in `passes.sweep`, so that every bit is the same.

Proof: tests/test_streaming.py::test_every_bit_is_that_of_the_pass_in_memory
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import Inputs, Parameters, Slope, Tap, Trace
from refcurv.model.weights import Model
from refcurv.passes.fast import FAST
from refcurv.passes.parallel import run
from refcurv.passes.rounding import View
from refcurv.passes.shards import Shard, inputs_of
from refcurv.passes.sweep import (
    KeptRows,
    Sweep,
    Take,
    ignore,
    require_patches,
    take_taps,
    wanted,
)

States = MutableMapping[Hashable, Array]
"""What is kept of the courses between two stages, in memory or in a file, each (B, T, D).

(course, block) → what the block reads; (course, "d", pass) → the gradient of what the block that
was left last read.
"""


@dataclass(frozen=True, slots=True)
class Course:
    """One shard on its way through the model.

    Fields: key, which tells its states from those of others; config; view, what it takes for the
    model's parameters; shard; job.
    """

    key: Hashable
    config: ModelConfig
    view: View
    shard: Shard
    job: Sweep

    @property
    def passes(self) -> int:
        """How often the backward comes down."""
        return self.job.passes(self.shard, self.config.vocabulary)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the backward: the head, one block, or the input; whose layers' rows are taken.

    Fields:
        at: the block's number; `config.layers` for the head, −1 for the input.
        layers: the wanted layers. A block may come several times, with some of its layers each.
        leaves: is it the last that needs what the block read? Then it sends the gradient on.
    """

    at: int
    layers: frozenset[str]
    leaves: bool


def stages(config: ModelConfig, groups: Iterable[frozenset[str]]) -> Iterator[Stage]:
    """The steps of a backward that takes these layers together, those of one block in each group.

    Blocks come top down. One that has no wanted layer, but lies above one that has, comes too.
    """
    by_place: dict[int, list[frozenset[str]]] = {}
    for group in groups:
        by_place.setdefault(place(config, min(group)), []).append(group)
    lowest = min(by_place)
    for at in range(config.layers, lowest - 1, -1):
        parts = by_place.get(at, [frozenset()])
        for part in parts:
            yield Stage(at, part, part is parts[-1] and at > lowest)


def place(config: ModelConfig, layer: str) -> int:
    """Where a layer lies, as `Stage.at`."""
    if layer == "head":
        return config.layers
    return int(layer.split(".")[1]) if layer.startswith("blocks.") else -1


def names_at(config: ModelConfig, at: int) -> list[str]:
    """The parameters that a stage needs."""
    names = config.parameter_shapes()
    if 0 <= at < config.layers:
        return [name for name in names if name.startswith(f"blocks.{at}.")]
    top = [n for n in names if n.startswith(("final_norm.", "head."))]
    if at == config.layers:
        return list(dict.fromkeys([*top, config.weight_of("head")]))
    return [name for name in names if not name.startswith("blocks.") and name not in top]


def weights_at(model: Model, at: int) -> Parameters:
    """The parameters that a stage needs, read now."""
    return {name: np.asarray(model.parameters[name]) for name in names_at(model.config, at)}


# ------------------------------------------------------------------ forward


def ascend(
    model: Model,
    courses: Sequence[Course],
    lowest: int,
    states: States,
    in_flight: int | None,
    done: Callable[[], object],
) -> None:
    """Take all courses to what the final norm reads; keep what blocks from `lowest` on read.

    `done` is called once for each course and block.
    """
    parameters = weights_at(model, -1)

    def enter(_: int, course: Course) -> None:
        require_patches(course.config, course.shard, course.job)
        inputs, layout = _inputs(course, np.dtype(model.dtype)), course.shard.layout
        seen = course.view(parameters)
        states[course.key, 0] = transformer.input_forward(course.config, seen, inputs, layout)

    run(courses, enter, in_flight=in_flight)
    for i in range(model.config.layers):
        parameters = {}  # those of the block before are given up first
        parameters = weights_at(model, i)
        block = partial(_pass_block, parameters, i, lowest, states)
        run(courses, block, in_flight=in_flight, done=done)


def _pass_block(
    parameters: Parameters, i: int, lowest: int, states: States, _: int, course: Course
) -> None:
    states[course.key, i + 1] = _block(parameters, i, states[course.key, i], course)[0]
    if i < lowest:
        del states[course.key, i]


def _block(
    parameters: Parameters, i: int, x_BTD: Array, course: Course
) -> tuple[Array, transformer.BlockTrace]:
    """Block i of a course: what it makes, and its trace."""
    layout = course.shard.layout
    rope = transformer.rope_of(course.config, i, layout, x_BTD.dtype, FAST)
    out_BTD, trace, _ = transformer.block_forward(
        course.config, parameters, i, x_BTD, layout, rope, FAST
    )
    return out_BTD, trace


def _inputs(course: Course, dtype: np.dtype) -> Inputs:
    inputs = inputs_of(course.config, course.shard)
    return inputs if course.config.image is None else inputs.astype(dtype, copy=False)


# ------------------------------------------------------------------ backward


def descend(
    stage: Stage, parameters: Parameters, states: States, course: Course, take: Take
) -> None:
    """One course back through one stage: the rows of its layers go to `take`, pass by pass.

    They are those of `passes.sweep`, for each layer in the same order. What the stage read serves
    the next one, unless this one leaves it.
    """
    if stage.at == course.config.layers:
        _leave_head(stage, course.view(parameters), states, course, take)
    elif stage.at < 0:
        _leave_input(stage, states, course, take)
    else:
        _leave_block(stage, parameters, states, course, take)


def _leave_head(
    stage: Stage, parameters: Parameters, states: States, course: Course, take: Take
) -> None:
    config, shard = course.config, course.shard
    x_BTD = states.pop((course.key, config.layers))
    final_BTD, saved = transformer.norm_forward(config, parameters, "final_norm", x_BTD, FAST)
    final_BTD = transformer.pool_forward(config, final_BTD)
    above = Trace(shard.source, shard.layout, {}, config.layers, [], saved)  # no block
    to = partial(take_taps, take) if stage.layers else _nobody
    for number, cotangent in enumerate(course.job.cotangents(shard, config.vocabulary)):
        head = transformer.head_transpose(config, parameters, final_BTD, shard.head_BT, cotangent)
        d_final_BTD = transformer.drain(head, partial(to, number))
        if stage.leaves:
            steps = transformer.blocks_backward(config, parameters, d_final_BTD, above, FAST)
            states[course.key, "d", number] = transformer.drain(steps, ignore)


def _leave_block(
    stage: Stage, parameters: Parameters, states: States, course: Course, take: Take
) -> None:
    config, i = course.config, stage.at
    _, trace = _block(parameters, i, states[course.key, i], course)
    rows = KeptRows(course.shard.keep_BT)
    for number in range(course.passes):
        d_x_BTD = states[course.key, "d", number]
        layout = course.shard.layout
        rope = transformer.rope_of(config, i, layout, d_x_BTD.dtype, FAST)
        steps = transformer.block_backward(config, parameters, i, d_x_BTD, trace, rope, FAST)
        for tap in wanted(steps, stage.layers):
            take(number, Tap(tap.name, rows.of_input(tap.a), rows.of(tap.g)))
        if stage.leaves:
            states[course.key, "d", number] = transformer.drain(steps, ignore)
    if stage.leaves:
        del states[course.key, i]


def _leave_input(stage: Stage, states: States, course: Course, take: Take) -> None:
    rows = KeptRows(course.shard.keep_BT)
    for number in range(course.passes):
        d_x_BTD = states[course.key, "d", number]
        inputs = _inputs(course, d_x_BTD.dtype)
        for tap in transformer.input_taps(course.config, inputs, course.shard.layout, d_x_BTD):
            if tap.name in stage.layers:
                take(number, Tap(tap.name, rows.of_input(tap.a), rows.of(tap.g)))


def _nobody(_number: int, _step: Tap | Slope) -> None:
    """The head's rows are not wanted."""
