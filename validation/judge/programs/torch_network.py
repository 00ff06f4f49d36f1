"""A small transformer in PyTorch, of the shapes and names that refcurv's weights files have."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


class Norm(nn.Module):
    """RMSNorm or LayerNorm, in float32 where the model is shorter."""

    def __init__(self, c: Any, size: int) -> None:
        super().__init__()
        self.centred, self.offset, self.eps = c.norm == "layer", float(c.norm_offset), c.norm_eps
        self.weight = nn.Parameter(torch.zeros(size)) if c.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(size)) if c.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, at_least_float32(x)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        y = y if self.weight is None else y * (self.offset + self.weight)
        return (y if self.bias is None else y + self.bias).to(dtype)


def linear(c: Any, name: str, d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=name in c.biases)


def rope(c: Any, i: int) -> tuple[float, Any] | None:
    """Base and scaling of the rotary positions of block i; None where it has none."""
    kind = c.rotary[i] if c.rotary else "main"
    if kind == "none" or c.rope_theta is None:
        return None
    return (c.local_theta, None) if kind == "local" else (c.rope_theta, c.rope_scaling)


def frequencies(half: int, theta: float, scaling: Any, length: Tensor) -> Tensor:
    """Of the pairs that turn; a linear rule, Llama 3's or YaRN's slows them for long contexts.

    By longrope's a pair has two divisors, one for texts within the trained context and one for
    longer ones; by the dynamic rule the base grows with the text, from that context on. For both
    the text of each position counts, `length` (B, T).
    """
    j = torch.arange(half, dtype=torch.float64)
    f = theta ** (-j / half)
    if scaling is None:
        return f
    if scaling.kind == "linear":
        return f / scaling.factor
    if scaling.kind == "dynamic":
        longer = (length.double() / scaling.original - 1).clamp(min=0)[:, :, None, None]
        return f * (1 + scaling.factor * longer) ** (-j / max(half - 1, 1))
    if scaling.kind == "longrope":
        short, long = (torch.tensor(x, dtype=f.dtype) for x in (scaling.short, scaling.long))
        return f / torch.where(length[:, :, None, None] > scaling.original, long, short)
    turns = scaling.original * f / math.tau
    if scaling.kind == "llama3":
        stay = ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
        return stay * f + (1 - stay) * f / scaling.factor

    def dimension(n: float) -> float:
        return half * math.log(scaling.original / (n * math.tau)) / math.log(theta)

    low = max(math.floor(dimension(scaling.fast)), 0)
    high = min(math.ceil(dimension(scaling.slow)), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return f / scaling.factor * ramp + f * (1 - ramp)


def rotate(
    x: Tensor, position: Tensor, length: Tensor, theta: float, scaling: Any, width: int | None
) -> Tensor:
    """Half-split rotary embedding of (B, T, H, E), of the first `width` entries of a head."""
    width = width or x.shape[-1]
    x, rest = x[..., :width], x[..., width:]
    half = x.shape[-1] // 2
    angle = position[:, :, None, None].double() * frequencies(half, theta, scaling, length)
    wide, size = at_least_float32(x), 1.0 if scaling is None else scaling.attention
    cos, sin = (size * angle.cos()).to(wide.dtype), (size * angle.sin()).to(wide.dtype)
    one, two = wide[..., :half], wide[..., half:]
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1)


class Attention(nn.Module):
    def __init__(self, c: Any, i: int) -> None:
        super().__init__()
        self.c, inner, kv = c, c.heads * c.head_width, c.kv_heads * c.head_width
        self.rope = rope(c, i)
        self.q, self.k = linear(c, "q", c.width, inner), linear(c, "k", c.width, kv)
        self.v, self.o = linear(c, "v", c.width, kv), linear(c, "o", inner, c.width)
        sizes = {"none": (0, 0), "head": (c.head_width,) * 2, "full": (inner, kv)}[c.qk_norm]
        self.q_norm, self.k_norm = (Norm(c, size) if size else nn.Identity() for size in sizes)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor, length: Tensor) -> Tensor:
        c = self.c
        q, k, v = self.q(x), self.k(x), self.v(x)
        if c.qkv_clip is not None:
            q, k, v = (y.clamp(-c.qkv_clip, c.qkv_clip) for y in (q, k, v))
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, c.head_width)) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = (rotate(y, position, length, *self.rope, c.rope_width) for y in (q, k))
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, 2) for y in (k, v))
        score = at_least_float32(torch.einsum("bthe,bshe->bhts", q, k))
        score = score * (c.score_scale or 1 / math.sqrt(c.head_width))
        if c.score_cap is not None:
            score = c.score_cap * torch.tanh(score / c.score_cap)
        score = score.masked_fill(~visible[:, None], -math.inf)
        p = score.softmax(-1).nan_to_num().to(v.dtype)
        return self.o(torch.einsum("bhts,bshe->bthe", p, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.gate = linear(c, "gate", c.width, c.mlp_width) if c.gated else None
        self.up = linear(c, "up", c.width, c.mlp_width)
        self.down = linear(c, "down", c.mlp_width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: Any, i: int) -> None:
        super().__init__()
        self.place, self.residual = c.norm_place, c.residual
        self.window = c.windows[i] if c.windows else 0
        self.attn, self.mlp = Attention(c, i), MLP(c)
        self.attn_norm = Norm(c, c.width)
        if self.residual != "shared":
            self.mlp_norm = Norm(c, c.width)
        if self.place == "both":
            self.attn_post_norm, self.mlp_post_norm = Norm(c, c.width), Norm(c, c.width)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor, length: Tensor) -> Tensor:
        if self.window:
            visible = visible & (position[:, :, None] - position[:, None] < self.window)
        if self.place == "post":
            x = x + self.attn_norm(self.attn(x, position, visible, length))
            return x + self.mlp_norm(self.mlp(x))
        after_attn = self.attn_post_norm if self.place == "both" else nn.Identity()
        after_mlp = self.mlp_post_norm if self.place == "both" else nn.Identity()
        read = self.attn_norm(x)
        after = x + after_attn(self.attn(read, position, visible, length))
        if self.residual != "shared":
            read = self.mlp_norm(x if self.residual == "parallel" else after)
        return after + after_mlp(self.mlp(read))


class Table(nn.Module):
    """A vector that stands before an image's patches."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Network(nn.Module):
    """Tokens or images of a batch → logits."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        if c.image is None:
            self.embed = nn.Embedding(c.vocabulary, c.width)
        else:
            P = c.image.patch
            self.patch = nn.Conv2d(c.image.channels, c.width, P, P, bias="patch" in c.biases)
            for name in c.image.specials:
                setattr(self, name, Table(c.width))
        if c.learned_positions:
            self.position = nn.Embedding(c.position_offset + c.learned_positions, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.final_norm = Norm(c, c.width)
        self.head = linear(c, "head", c.width, c.vocabulary)
        if c.tied:
            self.head.weight = self.embed.weight

    def forward(self, batch: SimpleNamespace) -> Tensor:
        c, position = self.c, batch.position
        if c.image is None:
            x = self.embed(batch.inputs) * c.embed_scale
        else:
            x = self.patch(batch.inputs.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
            first = [getattr(self, name).weight for name in c.image.specials]
            x = torch.cat([*(one.expand(len(x), 1, -1) for one in first), x], 1)
        if c.learned_positions:
            x = x + self.position(position + c.position_offset)
        for block in self.blocks:
            x = block(x, position, batch.visible, batch.length)
        x = self.final_norm(x)
        if c.pool != "none":
            x = x[:, :1] if c.pool == "cls" else x.mean(1, keepdim=True)
        z = at_least_float32(self.head(x))
        return z if c.logit_cap is None else c.logit_cap * torch.tanh(z / c.logit_cap)
