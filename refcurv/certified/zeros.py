"""Numbers that an identity makes 0, where balls know 0 up to a radius."""

from __future__ import annotations

from typing import Final

import numpy as np

from refcurv.algebra.balls import Balls
from refcurv.law.checks import Array, RefcurvError
from refcurv.model.config import ModelConfig, QKNorm

ID: Final = "O32"
"""A shift of all scores of a query changes nothing."""


def unshifted(config: ModelConfig, name: str, d: Balls) -> tuple[Balls, Array]:
    """A derivative by a parameter, exactly 0 where O32 makes it so; and where that is.

    name: ends in the parameter's.

    An entry of a bias of keys that is not turned moves every score of a query alike. Then no logit
    depends on it, so that gradient, H v and GGN v are 0 there. A cap, a clip or a norm of keys
    behind the bias would undo that.

    Proof: tests/test_certified.py::test_what_is_0_by_theory_is_0_and_says_why
    """
    free = config.score_cap is None and config.qkv_clip is None and config.qk_norm is QKNorm.NONE
    if not (name.endswith(".attn.k.bias") and free):
        return d, np.zeros(d.shape, bool)
    rope = config.rope(int(name.split(".")[-4]))
    turned = (config.rope_width or config.head_width) if rope else 0
    still = np.arange(d.shape[0]) % config.head_width >= turned
    if not d.contains(np.zeros(d.shape))[still].all():
        raise RefcurvError(f"certify: {name} is 0 by {ID}, and its ball holds no 0: report it.")
    return d * (~still).astype(int), still
