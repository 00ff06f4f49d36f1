"""One shard forward, and backward as far as is needed, once per cotangent (FISHER)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from refcurv.law.checks import (
    Array,
    EmptyError,
    RangeError,
)
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.fisher import cotangents, labelled, require_fisher
from refcurv.model.transformer import Cotangent, Parameters, Slope, Steps, Tap, Trace
from refcurv.passes.fast import FAST
from refcurv.passes.shards import Shard, inputs_of


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a pass is to do: for which layers, against whose labels, how many draws of them.

    `halves`: are the sums of every second shard kept too (`curvature.halves`)?
    """

    layers: frozenset[str]
    fisher: Fisher
    seed: int = 0
    draws: int = 1
    halves: bool = False

    @property
    def one_pass(self) -> bool:
        """Is there one backward pass to a shard?"""
        return self.draws == 1 and self.fisher is not Fisher.EXPECTED

    @property
    def inputs(self) -> frozenset[str]:
        """The wanted layers below all blocks: patches, tables."""
        return self.layers & {"patch", *TABLES}

    def passes(self, shard: Shard, vocabulary: int) -> int:
        """How many `cotangents` there are."""
        if self.fisher is not Fisher.EXPECTED:
            return self.draws
        return max(1, len(labelled(shard.label_BT)) * vocabulary)

    def cotangents(self, shard: Shard, vocabulary: int) -> list[Cotangent]:
        """What is sent back over the shard, one entry for each backward pass (FISHER)."""
        batch = shard.label_BT, shard.index_B, vocabulary
        return cotangents(self.fisher, *batch, self.seed, self.draws, FAST)


MOST_PASSES = 2**16
"""Backward passes that `expected` may ask for, over all shards: labelled positions × entries."""


def sweep_of(who: str, names: Iterable[str], fisher: str, seed: int, draws: int) -> Sweep:
    """The choices of a collection, checked."""
    kind = require_fisher(who, fisher, seed, draws)
    return Sweep(frozenset(names), kind, int(seed), draws)


def require_few_passes(who: str, units: Iterable[Shard], job: Sweep, vocabulary: int) -> None:
    """Refuse an `expected` that would not end."""
    passes = sum(len(labelled(unit.label_BT)) for unit in units) * vocabulary
    if job.fisher is Fisher.EXPECTED and passes > MOST_PASSES:
        raise RangeError(
            f"{who}: `expected` needs {passes:,} backward passes, one for each labelled position "
            f"of a shard and vocabulary entry; at most {MOST_PASSES:,} are made. Give fewer "
            "tokens, or take `signed`: it estimates the same, and with draws >= 2 says how well.",
            passes=passes,
        )


def lowest_block(config: ModelConfig, names: Iterable[str]) -> int:
    """The lowest block whose trace a backward to the named layers or parameters needs.

    0 for what lies below all blocks (patches, tables, special positions); `config.layers` for what
    lies above them.
    """
    below = {"patch", *TABLES, *(config.image.specials if config.image else ())}
    parts = [name.split(".") for name in names]
    blocks = [int(part[1]) for part in parts if part[0] == "blocks"]
    return 0 if any(part[0] in below for part in parts) else min(blocks, default=config.layers)


Take = Callable[[int, Tap], None]
"""Receives (backward pass, Tap) with the kept rows of one wanted layer: a (N, I), g (N, O)."""


Forward = tuple[Array, Trace]
"""What the head reads, and the trace that a backward needs."""


def forward_of(config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep) -> Forward:
    """The forward of `sweep`. Raises EmptyError for patches of which no row is kept."""
    require_patches(config, shard, job)
    inputs, lowest = inputs_of(config, shard), lowest_block(config, job.layers)
    return transformer.forward(config, parameters, inputs, shard.layout, FAST, lowest)


def sweep(
    config: ModelConfig,
    parameters: Parameters,
    shard: Shard,
    job: Sweep,
    take: Take,
    before: Forward | None = None,
) -> None:
    """One shard: forward once, backward once per cotangent; every wanted layer's rows go to `take`.

    They come top down (the head in chunks of HEAD_ROWS), in the same order for every shard and
    pass. Layers that read the same input carry the very same array `a`. Nothing below the lowest
    wanted layer is computed.

    Args: before, the forward of these sequences, if it is known; it serves again.
    """
    final_BTD, trace = before or forward_of(config, parameters, shard, job)
    want_head = "head" in job.layers
    rows = KeptRows(shard.keep_BT)
    passes = job.cotangents(shard, config.vocabulary)
    for number, cotangent in enumerate(passes):
        head = transformer.head_transpose(config, parameters, final_BTD, shard.head_BT, cotangent)
        d_final_BTD = transformer.drain(
            head, partial(take_taps, take, number) if want_head else ignore
        )
        last = before is None and number == len(passes) - 1
        steps = transformer.blocks_backward(config, parameters, d_final_BTD, trace, FAST, last)
        for tap in _taps(config, trace, steps, job):
            take(number, Tap(tap.name, rows.of_input(tap.a), rows.of(tap.g)))


def require_patches(config: ModelConfig, shard: Shard, job: Sweep) -> None:
    """Raise EmptyError where the patch layer is wanted, but no row of it is kept."""
    if config.image is None or "patch" not in job.layers:
        return
    if not shard.keep_BT[:, len(config.image.specials) :].any():
        raise EmptyError("collect: 'patch' has no row among rows='cls'. Take rows='all' for it.")


def _taps(config: ModelConfig, trace: Trace, steps: Steps, job: Sweep) -> Iterator[Tap]:
    """The wanted layers' Taps without the head's, and no step behind the last of them."""
    yield from wanted(steps, job.layers - job.inputs - {"head"})
    if job.inputs:
        d_x_BTD = transformer.drain(steps, ignore)
        for tap in transformer.input_taps(config, trace.inputs, trace.layout, d_x_BTD):
            if tap.name in job.inputs:
                yield tap


def wanted(steps: Steps, layers: frozenset[str]) -> Iterator[Tap]:
    """The Taps of these layers, and no step behind the last of them."""
    missing = len(layers)
    while missing:
        step = next(steps)
        if isinstance(step, Tap) and step.name in layers:
            yield step
            missing -= 1


def take_taps(take: Take, number: int, step: Tap | Slope) -> None:
    """Hand on a Tap, and nothing else."""
    if isinstance(step, Tap):
        take(number, step)


def ignore(_step: Tap | Slope) -> None:
    """Nobody asked for the head's factors."""


class KeptRows:
    """The kept rows (N, X) of (B, T, X), (N,) of (B, T); an input of two layers is selected once.

    Patches have no rows for the specials before them.
    """

    def __init__(self, keep_BT: Array) -> None:
        self._keep_BT = keep_BT
        self._all = bool(keep_BT.all())
        self._last: tuple[Array, Array] | None = None

    def of(self, x_BTX: Array) -> Array:
        """The kept rows of an array."""
        x_NX = x_BTX.reshape(-1, *x_BTX.shape[2:])
        return x_NX if self._all else x_NX[self._keep_BT[:, -x_BTX.shape[1] :].reshape(-1)]

    def of_input(self, a_BTI: Array) -> Array:
        """The kept rows of an input; the same array again where it is asked for again."""
        if self._last is None or self._last[0] is not a_BTI:
            self._last = (a_BTI, self.of(a_BTI))
        return self._last[1]
