"""LABELS: what each position should predict."""

from __future__ import annotations

import numpy as np

from refcurv.law.checks import Array, ConventionError
from refcurv.law.conventions import NO_LABEL
from refcurv.model.config import ModelConfig


def shift_labels(token_BT: Array, real_BT: Array, segment_BT: Array) -> Array:
    """LABELS: the next token of the same segment; NO_LABEL at its last position and on padding."""
    label_BT = np.full(token_BT.shape, NO_LABEL, dtype=np.int64)
    follows = real_BT[:, 1:] & (segment_BT[:, 1:] == segment_BT[:, :-1])
    label_BT[:, :-1] = np.where(follows, token_BT[:, 1:], NO_LABEL)
    return label_BT


def require_labels(who: str, config: ModelConfig, given: bool) -> None:
    """Raise ConventionError for labels left out where LABELS has no default."""
    if given or (config.image is None and config.causal):
        return
    if config.image is not None:
        raise ConventionError(f"{who}: images have no default labels. Give one for each, -1 none.")
    raise ConventionError(
        f"{who}: a bidirectional model sees the next token, so it is no default label. Give labels "
        "of your own."
    )
