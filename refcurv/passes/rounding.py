"""How much of a layer's gradients is rounding (NEGATIVE): the same pass, other roundings.

Some gradients are zero by theory, or far smaller than the terms that cancelled on the way. They
come out as noise, and the second moment of noise has a spectrum like any other. No bound on single
steps tells noise from a small gradient, but other runs do. Their input is a few units in the last
place larger or smaller. That hardly changes the gradients, and changes every rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep, sweep

POSITIONS = 512
"""How many positions of a shard are looked at; at least one sequence."""

NUDGES = (4, -5, 9)
"""By how many units in the last place the other runs' inputs are larger."""


def rounding(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep
) -> dict[str, tuple[float, int]]:
    """Σ |e|² over some kept rows of each wanted layer, e the error of g, and how many rows.

    Two runs err independently, so that |e|² of one is half of |g' − g|²: here the mean over NUDGES.
    The smallest number of the dtype is added for each entry of g, whose square may underflow. What
    is sent back is that of the first draw; for `expected`, all columns with random signs.

    Cost: four forward and backward passes over some labelled sequences of the shard.
    Proof: tests/test_rounding.py::test_the_estimate_is_the_error
    """
    few = _few(shard)
    fisher = Fisher.SIGNED if job.fisher is Fisher.EXPECTED else job.fisher
    one = replace(job, fisher=fisher, draws=1)
    first: list[Array] = []
    squares, rows = dict.fromkeys(job.layers, 0.0), dict.fromkeys(job.layers, 0)

    def keep(_: int, tap: Tap) -> None:
        first.append(tap.g)
        rows[tap.name] += len(tap.g)
        squares[tap.name] += tap.g.size * float(np.finfo(tap.g.dtype).smallest_subnormal)

    sweep(config, parameters, few, one, keep)
    for nudge in NUDGES:
        again = iter(first)

        def compare(_: int, tap: Tap, again: Iterator[Array] = again) -> None:
            e = tap.g.astype(np.float64) - next(again)
            squares[tap.name] += float(np.vdot(e, e)) / 2 / len(NUDGES)

        sweep(*_nudged(config, parameters, few, nudge), one, compare)
    return {name: (squares[name], rows[name]) for name in job.layers}


def _few(shard: Shard) -> Shard:
    """The first labelled sequences of a shard."""
    labelled = np.flatnonzero((shard.label_BT >= 0).any(axis=1))
    return shard.of(labelled[: max(1, POSITIONS // shard.layout.position_BT.shape[1])])


def _nudged(
    config: ModelConfig, parameters: Parameters, shard: Shard, nudge: int
) -> tuple[ModelConfig, Parameters, Shard]:
    """The same model and shard, with embeddings or pixels larger by `nudge` times eps."""
    dtype = parameters[config.weight_of("head")].dtype
    factor = 1 + nudge * tolerance.eps(dtype)
    if config.image is None:
        return replace(config, embed_scale=config.embed_scale * factor), parameters, shard
    return config, parameters, replace(shard, source=shard.source.astype(dtype) * factor)
