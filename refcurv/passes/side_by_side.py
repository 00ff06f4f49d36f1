"""Rows of a batch laid side by side as one row: products of few positions each become one product.

NumPy multiplies (B, T, D) by a matrix row by row. Where T is small, as in decoding, the matrix is
read from memory B times. Laid side by side, as (1, B T, D), it is read once. Attention alone takes
the rows apart again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.layers import Layout, Ops, Saved
from refcurv.model.transformer import KeysAndValues
from refcurv.passes.fast import FAST


def laid(layout: Layout) -> Layout:
    """The layout of the rows side by side; the keys are still counted within each row."""
    return Layout(
        layout.position_BT.reshape(1, -1),
        layout.first_BT.reshape(1, -1),
        layout.last_BT.reshape(1, -1),
    )


def by_rows(rows: int, past: KeysAndValues | None, keep: Callable[[KeysAndValues], object]) -> Ops:
    """FAST for rows side by side; `keep` is told each row's keys and values, those of `past` first.

    Proof: tests/test_prompts.py::test_each_row_is_decoded_as_if_alone
    """

    def apart(x: Array) -> Array:
        return x.reshape(rows, -1, *x.shape[2:])

    def attention_forward(
        q_1NHE: Array, k_1NKE: Array, v_1NKE: Array, layout: Layout,
        scale: float | None = None, cap: float | None = None,
    ) -> tuple[Array, Saved]:  # fmt: skip
        k, v = apart(k_1NKE), apart(v_1NKE)
        if past is not None:
            k, v = (np.concatenate(both, axis=1) for both in zip(past, (k, v), strict=True))
        keep((k, v))
        own = Layout(*map(apart, (layout.position_BT, layout.first_BT, layout.last_BT)))
        context, saved = FAST.attention_forward(apart(q_1NHE), k, v, own, scale, cap)
        found: Any = context.reshape(q_1NHE.shape)
        return found, saved

    return replace(FAST, attention_forward=attention_forward)
