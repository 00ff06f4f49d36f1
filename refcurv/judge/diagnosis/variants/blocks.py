"""What some blocks of a model have and others have not, which another program may have in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.model.config import ModelConfig


def another_in_some(kind: str) -> Callable[[ModelConfig, Positions], Sequence[float]]:
    """Of rotary positions "main" or "local": have some blocks others? 0 where they have.

    A kind that no block has is none that another program knows, but for the main one.

    Proof: tests/test_judge_sides.py::test_rotary_positions_of_some_blocks_are_tried_in_all
    """

    def where(config: ModelConfig, _at: Positions) -> Sequence[float]:
        rope = {
            "main": (config.rope_theta, config.rope_scaling),
            "local": (config.local_theta, None),
        }
        known = config.rope_theta is not None and (kind == "main" or kind in config.rotary)
        others = known and any(config.rope(i) != rope[kind] for i in range(config.layers))
        return (0.0,) if others else ()

    return where


def windows_of_some(config: ModelConfig, at: Positions) -> Sequence[float]:
    """The windows that hide a position of these texts, and that some blocks have not.

    Proof: tests/test_judge_sides.py::test_a_window_of_some_blocks_is_tried_in_all
    """
    some = dict.fromkeys(w for w in config.windows if 0 < w < at.real_BT.shape[1])
    return tuple(float(w) for w in some if {*config.windows} != {w})
