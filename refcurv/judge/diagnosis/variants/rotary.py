"""Rotary positions that another program may have: rounded, or of another length or factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.judge.diagnosis.variants.rounding import rounded
from refcurv.law.checks import Array
from refcurv.model.config import ModelConfig, RopeScaling, Scaling
from refcurv.model.layers import causal_layout, lengths, rope_frequencies, rope_tables

Tables = Callable[..., tuple[Array, Array]]
"""As `layers.rope_tables`."""

DEFINED: Final[Tables] = rope_tables

Levels = Callable[[ModelConfig, Positions], Sequence[float]]

ROPES: Final = MappingProxyType(
    {
        "rotary frequencies in bfloat16": ("frequencies", "bfloat16"),
        "rotary angles in bfloat16": ("angles", "bfloat16"),
        "rotary angles in float16": ("angles", "float16"),
        "rotary tables in bfloat16": ("tables", "bfloat16"),
    }
)
"""What of rotary positions is rounded, and to what: the frequencies alone; also the positions, the
angles and what follows; or cos and sin alone."""


def coarse_ropes(part: str, dtype: str) -> Tables:
    """`layers.rope_tables` of which a part is rounded to `dtype`, which is one of ROPES.

    Proof: tests/test_judge_variants.py::test_other_arithmetic_is_the_loops
    """

    def tables(
        position_BT: Array, width: int, theta: float, real: np.dtype[Any],
        scaling: RopeScaling | None = None, length: Any = 0,
    ) -> tuple[Array, Array]:  # fmt: skip
        if part == "tables":
            cos, sin = rope_tables(position_BT, width, theta, real, scaling, length)
            return rounded(cos, dtype), rounded(sin, dtype)
        size = 1.0 if scaling is None else scaling.attention
        f = rounded(rope_frequencies(width, theta, scaling, np.dtype(float), length), dtype)
        place_BT11 = position_BT[:, :, None, None].astype(float)
        if part == "frequencies":
            angle = place_BT11 * f
            return (size * np.cos(angle)).astype(real), (size * np.sin(angle)).astype(real)
        angle = rounded(rounded(place_BT11, dtype) * f, dtype)
        cos, sin = (rounded(size * turn(angle), dtype) for turn in (np.cos, np.sin))
        return cos.astype(real), sin.astype(real)

    return tables


def coarse(part: str, dtype: str) -> Levels:
    """0 where rotary positions are others if a part of them is rounded.

    Proof: tests/test_judge_variants.py::test_every_deviation_differs
    """

    def where(config: ModelConfig, at: Positions) -> Sequence[float]:
        place_BT, real = np.arange(at.real_BT.shape[1])[None], np.dtype(float)
        ropes = {config.rope(i) for i in range(config.layers if not at.images else 0)}
        for theta, scaling in (rope for rope in ropes if rope is not None):
            of = place_BT, config.rope_width or config.head_width, theta, real, scaling
            for length in (1, place_BT.size):
                if not np.array_equal(DEFINED(*of, length), coarse_ropes(part, dtype)(*of, length)):
                    return (0.0,)
        return ()

    return where


def of_length(length: float) -> Tables:
    """`layers.rope_tables` as of texts that have all this length."""
    return lambda *of: DEFINED(*of[:-1], length)


def other_lengths(config: ModelConfig, at: Positions) -> Sequence[float]:
    """Lengths of which rotary positions are others than those of some text's own length.

    longrope: that of a short text, and of a long one, as where a batch or a setting decides.
    dynamic: that of the longest text.

    Proof: tests/test_judge_sides.py::test_a_length_that_is_not_the_texts_own_has_its_name
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    if at.images or scaling is None or theta is None:
        return ()
    width = config.rope_width or config.head_width

    def frequencies(length: float) -> list[float]:
        return list(rope_frequencies(width, theta, scaling, np.dtype(float), length))

    own = lengths(causal_layout(at.real_BT, at.segment_BT))[:, :, 0, 0][at.real_BT]
    every = [float(n) for n in np.unique(own)]
    levels = {
        Scaling.LONGROPE: (1.0, scaling.original + 1.0),
        Scaling.DYNAMIC: (max(every, default=0.0),),
    }.get(scaling.kind, ())
    return tuple(n for n in levels if any(frequencies(n) != frequencies(m) for m in every))


def of_factor(scaling: RopeScaling | None, factor: float) -> RopeScaling | None:
    """The same rule with another factor."""
    return None if scaling is None else replace(scaling, factor=factor)


def other_factors(config: ModelConfig, at: Positions) -> Sequence[float]:
    """Factors of published models that give other rotary frequencies than the configuration's.

    Proof: tests/test_judge_sides.py::test_the_factor_of_another_release_has_its_name
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    if at.images or scaling is None or theta is None or scaling.kind is Scaling.LONGROPE:
        return ()
    of = config.rope_width or config.head_width, theta
    length = float(at.real_BT.shape[1])

    def frequencies(rule: RopeScaling | None) -> list[float]:
        return list(rope_frequencies(*of, rule, np.dtype(float), length))

    return tuple(
        by for by in (2.0, 4.0, 8.0, 16.0, 32.0)
        if frequencies(of_factor(scaling, by)) != frequencies(scaling)
    )  # fmt: skip
