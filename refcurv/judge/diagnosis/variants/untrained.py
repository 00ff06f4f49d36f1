"""Parameters that a loader did not find: 1 or 0, as in a new model, or those of another layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.files.lazy import Lazy
from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import Parameters

GROUPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gains of q and k at 1": r".*\.[qk]_norm\.weight",
        "gains of attention's norms at 1": r".*\.attn_norm\.weight",
        "gains of the MLPs' norms at 1": r".*\.mlp_norm\.weight",
        "gains of second norms at 1": r".*_post_norm\.weight",
        "gain of the last norm at 1": r"final_norm\.weight",
        "gains at 1": r".*_norm\.weight",
        "biases of norms at 0": r".*_norm\.bias",
        "biases of q, k and v at 0": r".*\.attn\.[qkv]\.bias",
        "biases of attention at 0": r".*\.attn\.[qkvo]\.bias",
        "biases of MLPs at 0": r".*\.mlp\.\w+\.bias",
        "biases at 0": r".*\.bias",
    }
)
"""Which parameters each group has, by their names; a loader may lose them together.

second norms: those behind a part that has a norm before it too.
"""


def of_group(group: str, config: ModelConfig) -> list[str]:
    """The parameters of a group."""
    return [name for name in config.parameter_shapes() if re.fullmatch(GROUPS[group], name)]


def start_of(group: str, config: ModelConfig) -> float:
    """What a file holds of each of its numbers before training."""
    return float(not config.norm_offset) if group.endswith("at 1") else 0.0


def started_otherwise(config: ModelConfig, parameters: Parameters) -> frozenset[str]:
    """The groups whose parameters have been trained away from their start.

    Of groups that differ in none of these parameters the first one alone.

    Proof: tests/test_judge_network.py::test_what_is_at_its_start_is_no_change
    """
    found: dict[tuple[str, ...], str] = {}
    for group in GROUPS:
        value = start_of(group, config)
        moved = [x for x in of_group(group, config) if (np.asarray(parameters[x]) != value).any()]
        if moved:
            found.setdefault((*moved,), group)
    return frozenset(found.values())


def untrained(group: str, config: ModelConfig, parameters: Parameters) -> Parameters:
    """All parameters, those of the group at their start."""
    some, value = {*of_group(group, config)}, start_of(group, config)

    def read(name: str) -> Array:
        own = parameters[name]
        return np.full_like(own, value) if name in some else own

    return Lazy(list(parameters), read)


def tied(parameters: Parameters) -> Parameters:
    """All parameters; the head's weight is the embedding."""

    def read(name: str) -> Array:
        return parameters["embed.weight" if name == "head.weight" else name]

    return Lazy(list(parameters), read)
