"""Heads of attention that another program reads in another order: their pairs, or their groups."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.law.checks import Array
from refcurv.model.layers import Layout, Saved, attention_backward, attention_forward


def rotate_interleaved(x_BTHE: Array, cos: Array, sin: Array) -> Array:
    """`layers.rotate` of the pairs (x[2j], x[2j + 1])."""
    turned = 2 * cos.shape[-1]
    x1, x2 = x_BTHE[..., 0:turned:2], x_BTHE[..., 1:turned:2]
    pairs = np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    flat = pairs.reshape(*x_BTHE.shape[:-1], turned)
    return np.concatenate([flat, x_BTHE[..., turned:]], axis=-1)


TILED: Final = MappingProxyType(
    {"heads": ("keys", "values"), "keys": ("keys",), "values": ("values",)}
)
"""Which heads of a group are read in another order."""


def regrouped(*sides: str) -> dict[str, Callable[..., Any]]:
    """Attention in which query head h reads head h mod K of these: "keys", "values" or both.

    Of the others it reads head h div R, as it should.
    """

    def read_H(side: str, heads: int, kv_heads: int) -> Array:
        h = np.arange(heads)
        return h % kv_heads if side in sides else h // (heads // kv_heads)

    def forward(
        q: Array, k: Array, v: Array, layout: Layout, scale: float | None, cap: float | None
    ) -> tuple[Array, Saved]:
        heads, kv_heads = q.shape[2], k.shape[2]
        of_k, of_v = (read_H(side, heads, kv_heads) for side in ("keys", "values"))
        own, saved = attention_forward(q, k[:, :, of_k], v[:, :, of_v], layout, scale, cap)
        return own, (of_k, of_v, kv_heads, saved)

    def backward(d_context: Array, saved: Saved) -> tuple[Array, Array, Array]:
        of_k, of_v, kv_heads, inner = saved
        d_q, d_k, d_v = attention_backward(d_context, inner)

        def added(d: Array, of_H: Array) -> Array:
            each = [d[:, :, of_H == head].sum(axis=2) for head in range(kv_heads)]
            return np.stack(each, axis=2)

        return d_q, added(d_k, of_k), added(d_v, of_v)

    return {"attention_forward": forward, "attention_backward": backward}
