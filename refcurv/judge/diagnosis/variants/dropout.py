"""One pass of a network with dropout: entries that are 0 with odds p, the others over 1 − p."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig, NormPlace, Residual
from refcurv.model.layers import Layout, Ops, Saved, attention_forward, windowed
from refcurv.model.transformer import BlockTrace, Parameters, Steps

PLACES = ("branches", "attention", "branches and attention", "everywhere")
"""Where programs have dropout: on what a branch adds to the stream, on the probabilities of the
attention, on both, and on the input of the first block too."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """The masks of one pass.

    Fields: p; place, of PLACES; random, drawn from in the order of the forward; masks, of each
    block's two branches, as its forward left them.
    """

    p: float
    place: str
    random: np.random.Generator
    masks: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def mask(self, x: Array) -> Array:
        """0 with odds p, else 1/(1 − p), in the dtype of x."""
        return np.asarray((self.random.random(x.shape) >= self.p) / (1 - self.p), x.dtype)

    def input(self, x: Array) -> Array:
        """What the first block reads."""
        return x * self.mask(x) if self.place == "everywhere" else x

    def branch(self, x: Array) -> Array:
        """The mask of what is added to the stream."""
        return np.ones_like(x) if self.place == "attention" else self.mask(x)

    def ops(self, own: Ops) -> Ops:
        """The layer functions, of which attention has dropout where it is to have it."""
        if self.place == "branches":
            return own
        return replace(
            own, attention_forward=self._attention_forward, attention_backward=_attention_backward
        )

    def _attention_forward(
        self, q: Array, k: Array, v: Array, layout: Layout, scale: float | None, cap: float | None
    ) -> tuple[Array, Saved]:
        context, saved = attention_forward(q, k, v, layout, scale, cap)
        _, _, v_BK1SE, p, _ = saved
        kept = self.mask(p)
        dropped = ((p * kept) @ v_BK1SE).transpose(0, 3, 1, 2, 4).reshape(context.shape)
        return dropped, (saved, kept)


def _attention_backward(d_context: Array, both: Saved) -> tuple[Array, Array, Array]:
    saved, kept = both
    q, k, v, p, size = saved
    B, (K, R, T, E) = len(d_context), q.shape[1:]
    d = d_context.reshape(B, T, K, R, E).transpose(0, 2, 3, 1, 4)
    # forward:  context = (p kept) @ v;  p = softmax(score);  score = cap(q @ kᵀ · scale)
    d_p = (d @ v.swapaxes(-1, -2)) * kept
    d_v = ((p * kept).swapaxes(-1, -2) @ d).sum(axis=2)
    d_product = p * (d_p - (d_p * p).sum(axis=-1, keepdims=True)) * size
    d_q, d_k = d_product @ k, (d_product.swapaxes(-1, -2) @ q).sum(axis=2)
    d_q = d_q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * R, E)
    return d_q, d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3)


def block_forward(
    config: ModelConfig, P: Parameters, i: int, x: Array, layout: Layout,
    rope: tuple[Array, Array] | None, ops: Ops, drop: Dropout,
) -> tuple[Array, BlockTrace]:  # fmt: skip
    """`transformer.block_forward` with dropout on what the branches add."""
    at, pre = f"blocks.{i}.", config.norm_place is not NormPlace.POST
    layout = windowed(layout, config.window(i)) if config.window(i) else layout

    def norm(name: str | None, x: Array) -> tuple[Array, Saved]:
        return transformer.norm_forward(config, P, at + name, x, ops) if name else (x, None)

    a, attn_norm = norm("attn_norm" if pre else None, x)
    o, attn, _ = transformer.attention_forward(config, P, f"{at}attn.", a, layout, rope, ops, None)
    update, attn_post = norm(_post_norm(config, "attn"), o)
    first = drop.branch(update)
    after = x + update * first
    if config.residual is Residual.SHARED:
        m, mlp_norm = a, None
    else:
        read = x if config.residual is Residual.PARALLEL else after
        m, mlp_norm = norm("mlp_norm" if pre else None, read)
    down, mlp = transformer.mlp_forward(config, P, f"{at}mlp.", m, ops)
    update, mlp_post = norm(_post_norm(config, "mlp"), down)
    second = drop.branch(update)
    drop.masks[i] = first, second
    return after + update * second, BlockTrace(attn_norm, attn, attn_post, mlp_norm, mlp, mlp_post)


def block_backward(
    config: ModelConfig, P: Parameters, i: int, d_x: Array, trace: BlockTrace,
    rope: tuple[Array, Array] | None, ops: Ops, drop: Dropout,
) -> Steps:  # fmt: skip
    """Undo `block_forward`, last step first."""
    at, pre = f"blocks.{i}.", config.norm_place is not NormPlace.POST
    first, second = drop.masks[i]

    def undo(name: str | None, d_y: Array, saved: Saved) -> Steps:
        if name:
            return (yield from transformer.norm_backward(config, at + name, d_y, saved, ops))
        return d_y

    # forward:  x' = after + second · norm(mlp(norm(read)))
    d_down = yield from undo(_post_norm(config, "mlp"), d_x * second, trace.mlp_post_norm)
    d_m = yield from transformer.mlp_backward(config, P, f"{at}mlp.", d_down, trace.mlp, ops)
    shared = config.residual is Residual.SHARED
    d_read = yield from undo("mlp_norm" if pre and not shared else None, d_m, trace.mlp_norm)
    d_after = d_x + d_read if config.residual is Residual.SEQUENTIAL else d_x
    # forward:  after = x + first · norm(attention(a));  a = norm(x)
    d_o = yield from undo(_post_norm(config, "attn"), d_after * first, trace.attn_post_norm)
    d_a = yield from transformer.attention_backward(
        config, P, f"{at}attn.", d_o, trace.attn, rope, ops
    )
    d_a = d_a + d_m if shared else d_a
    d_in = d_after + (yield from undo("attn_norm" if pre else None, d_a, trace.attn_norm))
    return d_in + d_read if config.residual is Residual.PARALLEL else d_in


def _post_norm(config: ModelConfig, part: str) -> str | None:
    """The norm behind a branch, if it has one."""
    names = {NormPlace.POST: f"{part}_norm", NormPlace.BOTH: f"{part}_post_norm"}
    return names.get(config.norm_place)
