"""How much of a layer's gradients is rounding: the same pass again, on other digits.

Some gradients are zero by theory, or far smaller than the terms that cancel in them. What is
computed for them is noise, and the second moment of noise has a spectrum like any other. No bound
on single steps can tell noise from a small gradient. Further runs can. Their input is larger or
smaller by a few units in the last place. The true gradients hardly change; every rounding does.
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
from refcurv.passes import memory
from refcurv.passes.memory import Sweep
from refcurv.passes.shards import Shard

POSITIONS = 512
"""How many positions of a shard are looked at; at least one sequence."""

NUDGES = (4, -5, 9)
"""By how many units in the last place the input of each further run is larger."""


def rounding(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep
) -> dict[str, tuple[float, int]]:
    """Σ |e|² over some kept rows of each wanted layer, and how many rows; e is the error of g.

    Two runs have independent errors. The |e|² of one run is therefore half of |g' − g|², where g'
    is the gradient of another run. The mean over NUDGES is taken.

    One subnormal number is added for each entry of g: squares below it cannot be seen.

    The gradients are those of the first draw. Under `expected` they are those of one draw of random
    signs (SIGNED).

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

    memory.sweep(config, parameters, few, one, keep)
    for nudge in NUDGES:
        again = iter(first)

        def compare(_: int, tap: Tap, again: Iterator[Array] = again) -> None:
            e = tap.g.astype(np.float64) - next(again)
            squares[tap.name] += float(np.vdot(e, e)) / 2 / len(NUDGES)

        memory.sweep(*_nudged(config, parameters, few, nudge), one, compare)
    return {name: (squares[name], rows[name]) for name in job.layers}


def _few(shard: Shard) -> Shard:
    """The first labelled sequences of a shard."""
    labelled = np.flatnonzero((shard.label_BT >= 0).any(axis=1))
    return shard.of(labelled[: max(1, POSITIONS // shard.layout.position_BT.shape[1])])


def _nudged(
    config: ModelConfig, parameters: Parameters, shard: Shard, nudge: int
) -> tuple[ModelConfig, Parameters, Shard]:
    """The same model and shard; embeddings or pixels are `nudge` units in the last place larger."""
    dtype = parameters[config.weight_of("head")].dtype
    factor = 1 + nudge * tolerance.eps(dtype)
    if config.image is None:
        return replace(config, embed_scale=config.embed_scale * factor), parameters, shard
    return config, parameters, replace(shard, source=shard.source.astype(dtype) * factor)
