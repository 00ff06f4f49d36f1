"""Other weights than the model's, at random: of another step, of an average, with an adapter."""

from __future__ import annotations

from typing import Final

import numpy as np

from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array
from refcurv.model.transformer import Parameters

AVERAGED: Final = "all, averaged with a start"
ADAPTED: Final = "q and v, by an adapter"

WEIGHTS: Final = ("blocks", "all", AVERAGED, ADAPTED)
"""Whose weights are others where a model is that of another step; or an average over training,
which still has a share of where the weights began; or has an adapter, merged where they usually are
(LoRA, arXiv 2106.09685)."""

RANK: Final = 2
"""Of an adapter.  Chosen: what few directions change differs more between draws than what many do.
"""


def shaken(own: Parameters, some: str, number: int, share: float) -> Parameters:
    """Weights that are normal numbers away, `share` of their root mean square in each tensor.

    In an average as much less is left of our own, and a start's numbers differ from one another as
    ours do: gains begin with equal ones. An adapter adds a product of two matrices.

    Proof: tests/test_judge_network.py::test_a_start_has_equal_gains
    """

    def read(name: str) -> Array:
        x = own[name]
        if not _moves(some, name):
            return x
        random = np.random.default_rng([number, *name.encode()])
        if some == ADAPTED:
            B, A = random.normal(size=(len(x), RANK)), random.normal(size=(RANK, x.shape[1]))
            away = B @ A / np.sqrt(RANK)
        else:
            away = random.normal(size=x.shape)
        mean = x.mean(dtype=np.float64) if some == AVERAGED else 0.0
        size = share * float(np.sqrt(np.mean(np.square(x - mean, dtype=np.float64))))
        left = 1 - share if some == AVERAGED else 1.0
        return np.asarray(left * x + size * away, x.dtype)

    return Lazy(list(own), read)


def _moves(some: str, name: str) -> bool:
    """Is it one of these weights?"""
    if some == ADAPTED:
        return name.endswith((".attn.q.weight", ".attn.v.weight"))
    return some != "blocks" or name.startswith("blocks.")
