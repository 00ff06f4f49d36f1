"""ROWS: which positions enter A and G."""

from __future__ import annotations

import numpy as np

from refcurv.law.checks import Array, ConventionError, require_choice
from refcurv.law.conventions import Rows
from refcurv.model.config import ModelConfig


def kept(
    config: ModelConfig,
    rows: Rows,
    label_BT: Array,
    real_BT: Array | None = None,
    segment_BT: Array | None = None,
) -> Array:
    """ROWS: the positions that enter A and G, (B, T) bool.

    For images label_BT is (B, 1), and the others are not read; one without a label has no rows.
    """
    labelled_BT = label_BT >= 0
    if config.image is not None:
        keep_BT = np.repeat(labelled_BT, config.image.positions, axis=1)
        keep_BT[:, 1:] &= rows is not Rows.CLS
        return keep_BT
    assert real_BT is not None and segment_BT is not None
    if rows is Rows.REACHED:
        return reached(label_BT, real_BT, segment_BT, config.causal)
    return real_BT.copy() if rows is Rows.ALL else labelled_BT


def reached(label_BT: Array, real_BT: Array, segment_BT: Array, causal: bool = True) -> Array:
    """ROWS: real positions from which a label of their segment is reached, (B, T) bool.

    In a causal model these are the positions at or before the last labelled one of the segment, in
    a bidirectional model all positions of a segment that has a label.
    """
    if not causal:
        at_or_before = reached(label_BT, real_BT, segment_BT)
        at_or_behind = reached(label_BT[:, ::-1], real_BT[:, ::-1], segment_BT[:, ::-1])[:, ::-1]
        return np.asarray(at_or_before | at_or_behind)
    out = np.zeros(label_BT.shape, dtype=bool)
    labelled = label_BT >= 0
    after = np.zeros(label_BT.shape[0], dtype=bool)
    for t in range(label_BT.shape[1] - 1, -1, -1):
        if t + 1 < label_BT.shape[1]:
            after &= segment_BT[:, t] == segment_BT[:, t + 1]
        after |= labelled[:, t]
        out[:, t] = after
    return np.asarray(out & real_BT)


def require_rows(who: str, config: ModelConfig, rows: str) -> Rows:
    """The choice of rows, or ConventionError for one that the model cannot have (ROWS)."""
    choice = Rows(require_choice(who, "rows", rows, list(Rows)))
    if config.image is None and choice is Rows.CLS:
        raise ConventionError(f"{who}: rows='cls' is for images; tokens have no such position.")
    if config.image is not None and choice is Rows.LABELLED:
        raise ConventionError(f"{who}: no position of an image has a label. Take rows='all'.")
    if config.image is not None and choice is Rows.CLS and not config.image.specials:
        raise ConventionError(f"{who}: the model's images have no CLS. Take rows='all'.")
    return choice
