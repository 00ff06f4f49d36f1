"""How a model is held while populations are read: all of it in memory, or a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from refcurv.curvature import room
from refcurv.curvature.plan import block_bytes, head_bytes, weights_bytes
from refcurv.evaluation import prompts
from refcurv.evaluation.classify import image_batches
from refcurv.evaluation.decode import batches
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import ImagePopulation, Population
from refcurv.model.given import require_bytes
from refcurv.model.transformer import Parameters
from refcurv.model.weights import Model, resident
from refcurv.passes.groups import cores
from refcurv.passes.held import Held


@dataclass(frozen=True, slots=True)
class Batch:
    """What memory a batch takes, in bytes.

    Fields: kept, from block to block: what the next block reads, and keys and values; within, while
    it passes a block or the head.
    """

    kept: int
    within: int


@dataclass(frozen=True, slots=True)
class Holding:
    """How a model is held.

    Fields: together, how many batches pass a block together, None with all weights in memory;
    in_flight, batches at a time; bytes, of memory beside what the process has already.
    """

    together: int | None
    in_flight: int
    bytes: int

    @property
    def text(self) -> str:
        """One line for a person."""
        how = "all weights in memory"
        if self.together is not None:
            how = f"one block in memory for {number_of(self.together, 'batch', 'batches')}"
        return (
            f"foresees {self.bytes / room.GIB:.2f} GiB beside what the process has: {how}, "
            f"{self.in_flight} at a time"
        )


def held(
    who: str,
    model: Model,
    populations: Iterable[Population | ImagePopulation],
    memory: int | None = None,
    told: Callable[[Holding], object] = lambda _: None,
) -> Parameters:
    """The parameters, all read now, or read block by block where memory does not hold them.

    Args: memory, bytes that the process may take, with what it has already; by default what is
    free. It decides how many batches pass together, and no bit. told, called with what is chosen;
    not where all is in memory and no figure is given.

    Raises:
        RoomError: not even one batch passes block by block; says what the least would be.

    A model whose parameters are `Held` already is held as they are.

    Proof: tests/test_held.py::test_an_evaluation_block_by_block_has_the_same_bits,
        ::test_too_small_a_figure_is_refused_with_the_least
    """
    if isinstance(model.parameters, Held):
        return model.parameters
    how = holding(who, model, populations, memory, told)
    return Held(model, how.together, how.in_flight) if how else resident(model)


def holding(
    who: str,
    model: Model,
    populations: Iterable[Population | ImagePopulation],
    memory: int | None = None,
    told: Callable[[Holding], object] = lambda _: None,
) -> Holding | None:
    """How `held` holds a model; None where all weights are read now, and nothing is counted."""
    require_bytes(who, "memory", memory)
    unread, free = room.unread(model), room.available()
    if memory is None and (not unread or free is None):
        return None
    wanted = list(populations)
    once = max((_shared_bytes(model, p) for p in wanted), default=0)
    every = list(_holdings(model, [b for p in wanted for b in _batches(model, p)], once))
    has = room.used() + room.CODE
    most = (free or 0) if memory is None else memory - has
    fit = [one for one in every if one.bytes <= most]
    if not fit:
        least = min(one.bytes for one in every)
        raise room.too_small(who, has, least, has + most, "Give more memory.")
    if memory is not None or fit[0].together is not None:
        told(fit[0])
    return fit[0]


def read_once(who: str, model: Model, populations: Iterable[Population | ImagePopulation]) -> Model:
    """The model with all its weights in memory, where they fit, for several uses.

    Proof: tests/test_held.py::test_weights_for_several_uses_are_read_once
    """
    found = held(who, model, populations)
    if isinstance(found, Held) and found.together is not None:
        return model
    return replace(model, parameters=found)


def _holdings(model: Model, every: list[Batch], once: int = 0) -> Iterator[Holding]:
    """What there is to choose from, the fastest first; `once` is kept beside all batches."""
    most, N = min(cores(), len(every)), len(every)
    kept = sorted((one.kept for one in every), reverse=True)
    within = max(one.within for one in every)
    for in_flight in range(most, 0, -1):
        moving = once + sum(kept[:in_flight]) + in_flight * within
        yield Holding(None, in_flight, _whole(model) + moving)
    block = max(weights_bytes(model, at) for at in range(-1, model.config.layers + 1))
    together = N
    while together:
        for in_flight in range(min(most, together), 0, -1):
            moving = once + sum(kept[:together]) + in_flight * within
            yield Holding(together, in_flight, block + moving)
        together //= 2


def _whole(model: Model) -> int:
    """All parameters, and the largest of them once more as it is read and checked."""
    item = np.dtype(model.dtype).itemsize
    sizes = [int(np.prod(shape)) for shape in model.config.parameter_shapes().values()]
    return item * sum(sizes) + (item + 1) * max(sizes)


def _shared_bytes(model: Model, population: Population | ImagePopulation) -> int:
    """Keys and values of what all prompts begin with."""
    if isinstance(population, ImagePopulation):
        return 0
    config, item = model.config, np.dtype(model.dtype).itemsize
    once = prompts.shared_length(config, population)
    return 2 * config.layers * once * config.kv_heads * config.head_width * item


def _batches(model: Model, population: Population | ImagePopulation) -> Iterator[Batch]:
    config, item = model.config, np.dtype(model.dtype).itemsize
    if isinstance(population, ImagePopulation):
        assert config.image is not None
        for images in image_batches(config, population):
            B = len(population.labels[images])
            yield _batch(config, item, B, config.image.positions, 0)
        return
    for row in batches(population):
        length = int(population.length[row].max())
        if population.kind == "text":
            yield _batch(config, item, len(row), length, 0)
        else:
            yield _batch(config, item, len(row), int(population.prompt_length[row].max()), length)


def _batch(config: ModelConfig, item: int, B: int, T: int, cached: int) -> Batch:
    """A batch (B, T); of one that is decoded so many positions keep keys and values."""
    pair = 2 * B * cached * config.kv_heads * config.head_width * item
    state = B * T * config.width * item
    scored = (B, 1) if cached else (B, T)  # who is decoded reads the logits of the last position
    within = max(block_bytes(config, (B, T), item, back=False), head_bytes(config, scored, item))
    return Batch(state + config.layers * pair, within + pair)


def kept_bytes(model: Model, population: Population | ImagePopulation, block: int) -> int:
    """What `passes.below` keeps of a population, to begin at a block: states, keys and values.

    Proof: tests/test_sweep.py::test_what_is_kept_is_foreseen
    """
    config, item = model.config, np.dtype(model.dtype).itemsize
    pair = 2 * block * config.kv_heads * config.head_width
    if isinstance(population, ImagePopulation):
        assert config.image is not None
        return item * len(population.labels) * config.image.positions * config.width
    once, kind = prompts.shared_length(config, population), population.kind
    states, cached = once, once
    for row in batches(population):
        length, prompt = int(population.length[row].max()), int(population.prompt_length[row].max())
        if kind != "answer":  # the truth is told
            states += len(row) * (length - (kind != "text") - once)
        if kind != "text":  # what follows the prompt is said
            states += len(row) * (prompt - once)
            cached += len(row) * prompt
    return item * (states * config.width + cached * pair)
