"""The parameters of a model for passes over many batches: all of them in memory, or one block's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.weights import Model
from refcurv.passes.below import Below


class Held(Mapping[str, Array]):
    """The parameters of a model, read when they are asked for; those of one block are kept, or all.

    With one block, what was read is kept until a parameter of another block is asked for; what lies
    before all blocks, and what lies behind them, count as a block each. Threads share it while they
    are in the same block (`forward.final_states_each`).

    Args:
        model: whose parameters.
        together: how many batches pass a block before the next one is read; None: all are kept.
        in_flight: how many batches at a time; by default one per core.
        below: states that models with the same weights below some block share.

    Proof: tests/test_held.py::test_one_block_is_in_memory_at_a_time
    """

    def __init__(
        self,
        model: Model,
        together: int | None = 1,
        in_flight: int | None = None,
        below: Below | None = None,
    ) -> None:
        self.together, self.in_flight, self.below = together, in_flight, below
        self._model = model
        self._at: int | None = None
        self._kept: dict[str, Array] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Array:
        with self._lock:
            at = _place(self._model.config, name)
            if at != self._at and self.together is not None:
                self._at, self._kept = at, {}  # those of the block before are given up first
            if name not in self._kept:
                self._kept[name] = np.asarray(self._model.parameters[name])
            return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.parameters)

    def __len__(self) -> int:
        return len(self._model.parameters)


def _place(config: ModelConfig, name: str) -> int:
    """The block that a parameter is of; −1 before all of them, `config.layers` behind them."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0])
    return config.layers if first in ("final_norm", "head") else -1
