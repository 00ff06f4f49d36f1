"""A small transformer in NumPy with derivatives of its own.

Each piece returns its value and the function that carries a gradient back through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.special import erf

from validation.judge.setting import bfloat16

Array = np.ndarray
Back = Callable[[Array], Array]


class Network:
    """`run(batch)` → (logits, back); `back` hands each linear layer's a and g to `tap`."""

    def __init__(self, config: Any, parameters: Any, dtype: str, tap: Any) -> None:
        self.c, self.tap, self.short = config, tap, dtype == "bfloat16"
        wide = np.float64 if dtype == "float64" else np.float32
        self.p = {name: np.array(x, wide) for name, x in parameters.items()}
        self.p.setdefault("head.weight", self.p.get("embed.weight"))

    def round(self, x: Array) -> Array:
        return bfloat16(x) if self.short else x

    # ------------------------------------------------------------------ pieces

    def linear(self, name: str, x: Array) -> tuple[Array, Back]:
        W, b = self.p[f"{name}.weight"], self.p.get(f"{name}.bias", 0)

        def back(d_y: Array) -> Array:
            self.tap(name, x, d_y)
            return self.round(d_y @ W)

        return self.round(x @ W.T + b), back

    def inverse_root(self, square: Array) -> tuple[Array, Array]:
        """1/√(m + eps) and its derivative."""
        s = 1 / np.sqrt(square + self.c.norm_eps)
        return s, -(s**3) / 2

    def gain(self, name: str) -> Array | float:
        if not self.c.norm_gain:
            return 1.0
        return self.p[f"{name}.weight"] + float(self.c.norm_offset)

    def norm(self, name: str, x: Array) -> tuple[Array, Back]:
        gain, bias, layer = self.gain(name), self.p.get(f"{name}.bias", 0), self.c.norm == "layer"
        m = x - x.mean(-1, keepdims=True) if layer else x
        s, slope = self.inverse_root((m * m).mean(-1, keepdims=True))

        def back(d_y: Array) -> Array:
            d = d_y * gain
            d = s * d + 2 * slope * m * (d * m).mean(-1, keepdims=True)
            return self.round(d - d.mean(-1, keepdims=True) if layer else d)

        return self.round(m * s * gain + bias), back

    def qk_norm(self, name: str, x: Array) -> tuple[Array, Back]:
        """Over all heads, or over each of them; of x (B, T, H·E)."""
        if self.c.qk_norm == "none":
            return x, lambda d: d
        if self.c.qk_norm == "full":
            return self.norm(name, x)
        heads = (*x.shape[:2], -1, self.c.head_width)
        y, back = self.norm(name, x.reshape(heads))
        return y.reshape(x.shape), lambda d: back(d.reshape(heads)).reshape(x.shape)

    def activation(self, x: Array) -> tuple[Array, Array]:
        """Value and derivative."""
        kind = self.c.activation
        if kind == "silu":
            s = 1 / (1 + np.exp(-x))
            return x * s, s * (1 + x * (1 - s))
        if kind == "gelu":
            P = 0.5 * (1 + erf(x / math.sqrt(2)))
            return x * P, P + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        if kind == "relu":
            return np.maximum(x, 0), (x > 0).astype(x.dtype)
        k = math.sqrt(2 / math.pi)
        t = np.tanh(k * (x + 0.044715 * x**3))
        slope = 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope

    def rope(self, i: int, length: Array) -> tuple[float, Any, Array] | None:
        """Base and scaling of the rotary positions of block i, and the lengths of texts, or None.

        None where block i has no rotary positions.
        """
        if self.c.rope_theta is None:
            return None
        main = self.c.rope_theta, self.c.rope_scaling, length
        kind = self.c.rotary[i] if self.c.rotary else "main"
        return {"main": main, "local": (self.c.local_theta, None, length), "none": None}[kind]

    def frequencies(self, half: int, theta: float, scaling: Any, length: Array) -> Array:
        """Of the pairs that turn, other ones by a linear rule, Llama 3's, YaRN's and others.

        Longrope's and dynamic ones depend on the text of each position, `length` (B, T): is it
        within the trained context, and by how much is it longer?
        """
        j = np.arange(half)
        f = theta ** (-j / half)
        if scaling is None:
            return f
        if scaling.kind == "linear":
            return f / scaling.factor
        if scaling.kind == "dynamic":
            beyond = np.maximum(length, scaling.original) / scaling.original - 1
            base = theta * (1 + scaling.factor * beyond) ** (half / max(half - 1, 1))
            return base[:, :, None, None] ** (-j / half)
        if scaling.kind == "longrope":
            divisors = np.array([scaling.short, scaling.long])
            return f / divisors[(length > scaling.original).astype(int)][:, :, None]
        if scaling.kind == "llama3":
            period = 2 * np.pi / f
            smooth = (scaling.original / period - scaling.slow) / (scaling.fast - scaling.slow)
            kept = np.clip(smooth, 0, 1)
        else:
            most, least = (
                half * np.log(scaling.original / (2 * np.pi * n)) / np.log(theta)
                for n in (scaling.fast, scaling.slow)
            )
            low, high = max(np.floor(most), 0), min(np.ceil(least), 2 * half - 1)
            kept = 1 - np.clip((j - low) / (high - low), 0, 1)
        return f * kept + f * (1 - kept) / scaling.factor

    def angles(self, half: int, position: Array, rope: Any) -> tuple[Array, Array]:
        """cos and sin."""
        angle = position[:, :, None, None] * self.frequencies(half, *rope)
        size = 1.0 if rope[1] is None else rope[1].attention
        return size * np.cos(angle), size * np.sin(angle)

    def rotate(self, x: Array, position: Array, rope: Any, sign: int) -> Array:
        """Half-split rotary embedding; back with the sign turned."""
        half = x.shape[-1] // 2
        cos, sin = (y.astype(x.dtype) for y in self.angles(half, position, rope))
        one, two, sin = x[..., :half], x[..., half:], sign * sin
        return self.round(np.concatenate([one * cos - two * sin, two * cos + one * sin], -1))

    def turned(self, x: Array, position: Array, rope: Any, sign: int) -> Array:
        """`rotate` of the entries of a head that are rotary, its first."""
        width = self.c.rope_width or x.shape[-1]
        first = self.rotate(x[..., :width], position, rope, sign)
        return np.concatenate([first, x[..., width:]], -1)

    def groups(self) -> Array:
        """The key-value head of each query head."""
        return np.arange(self.c.heads) // (self.c.heads // self.c.kv_heads)

    def score_scale(self) -> float:
        return self.c.score_scale or 1 / math.sqrt(self.c.head_width)

    def capped(self, x: Array, cap: float | None) -> tuple[Array, Array | float]:
        if cap is None:
            return x, 1.0
        t = np.tanh(x / cap)
        return cap * t, 1 - t * t

    def clipped(self, x: Array, back: Back) -> tuple[Array, Back]:
        bound = self.c.qkv_clip
        if bound is None:
            return x, back
        return np.clip(x, -bound, bound), lambda d: back(d * (abs(x) <= bound))

    def core(self, q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, Any]:
        """Softmax attention of (B, T, H, E)."""
        scale = self.score_scale()
        score, bend = self.capped(np.einsum("bthe,bshe->bhts", q, k) * scale, self.c.score_cap)
        score = np.where(visible[:, None], score, -np.inf)
        top = score.max(-1, keepdims=True)
        p = np.exp(score - np.where(np.isfinite(top), top, 0))
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
        seen, back_seen = self.weights(p)

        def back(d: Array) -> tuple[Array, Array, Array]:
            d_p = back_seen(np.einsum("bthe,bshe->bhts", d, v))
            d_score = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * bend * scale
            d_q = np.einsum("bhts,bshe->bthe", d_score, k)
            d_k = np.einsum("bhts,bthe->bshe", d_score, q)
            return d_q, d_k, np.einsum("bhts,bthe->bshe", seen, d)

        return self.round(np.einsum("bhts,bshe->bthe", seen, v)), back

    def weights(self, p: Array) -> tuple[Array, Back]:
        """The weights of values, from attention's probabilities."""
        return p, lambda d: d

    def attention(
        self, at: str, x: Array, b: SimpleNamespace, visible: Array
    ) -> tuple[Array, Back]:
        c, group, backs, rope = (
            self.c,
            self.groups(),
            {},
            self.rope(int(at.split(".")[1]), b.length),
        )
        y = {}
        for name in "qkv":
            y[name], backs[name] = self.clipped(*self.linear(f"{at}.{name}", x))
        for name in "qk":
            y[name], backs[f"{name}_norm"] = self.qk_norm(f"{at}.{name}_norm", y[name])
        y = {name: h.reshape(*h.shape[:2], -1, c.head_width) for name, h in y.items()}
        if rope is not None:
            y |= {name: self.turned(y[name], b.position, rope, 1) for name in "qk"}
        context, core = self.core(y["q"], y["k"][:, :, group], y["v"][:, :, group], visible)
        o, back_o = self.linear(f"{at}.o", context.reshape(*x.shape[:2], -1))

        def back(d_o: Array) -> Array:
            d = dict(zip("qkv", core(back_o(d_o).reshape(context.shape)), strict=True))
            for name in "kv":
                sums = np.zeros_like(y[name])
                for head, kv in enumerate(group):
                    sums[:, :, kv] += d[name][:, :, head]
                d[name] = sums
            if rope is not None:
                d |= {name: self.turned(d[name], b.position, rope, -1) for name in "qk"}
            flat = {name: self.round(h.reshape(*h.shape[:2], -1)) for name, h in d.items()}
            flat |= {name: backs[f"{name}_norm"](flat[name]) for name in "qk"}
            return sum(backs[name](flat[name]) for name in "qkv")

        return o, back

    def mlp(self, at: str, x: Array) -> tuple[Array, Back]:
        up, back_up = self.linear(f"{at}.up", x)
        gate, back_gate = self.linear(f"{at}.gate", x) if self.c.gated else (up, back_up)
        f, slope = self.activation(gate)
        y, back_down = self.linear(f"{at}.down", self.round(f * up if self.c.gated else f))

        def back(d_y: Array) -> Array:
            d = back_down(d_y)
            if not self.c.gated:
                return back_up(self.round(d * slope))
            return back_gate(self.round(d * up * slope)) + back_up(self.round(d * f))

        return y, back

    # ------------------------------------------------------------------ the whole

    def part(self, i: int, part: str, x: Array, b: SimpleNamespace) -> tuple[Array, Back]:
        """What attention or MLP adds to x, with the norms where the model has them."""
        at, place, chain = f"blocks.{i}.{part}", self.c.norm_place, []

        def step(y: Array, back: Back) -> Array:
            chain.append(back)
            return y

        outside = place == "post" or self.c.residual == "shared"
        h = x if outside else step(*self.norm(f"{at}_norm", x))
        if part == "attn":
            h = step(*self.attention(at, h, b, self.windowed(i, b)))
        else:
            h = step(*self.mlp(at, h))
        if place != "pre":
            h = step(*self.norm(at + ("_norm" if place == "post" else "_post_norm"), h))
        h = step(*self.dropout(h))

        def back(d: Array) -> Array:
            for one in reversed(chain):
                d = one(d)
            return d

        return h, back

    def windowed(self, i: int, b: SimpleNamespace) -> Array:
        """What is visible in block i."""
        window = self.c.windows[i] if self.c.windows else 0
        near = b.position[:, :, None] - b.position[:, None] < window
        return b.visible & near if window else b.visible

    def block(self, i: int, x: Array, b: SimpleNamespace) -> tuple[Array, Back]:
        """x + attention + MLP, which reads the sum of both, or what attention reads."""
        parallel, read, back_read = self.c.residual != "sequential", x, lambda d: d
        if self.c.residual == "shared":
            read, back_norm = self.norm(f"blocks.{i}.attn_norm", x)
            back_read = lambda d: back_norm(self.round(d))  # noqa: E731
        h, back_attn = self.part(i, "attn", read, b)
        after = self.round(x + h)
        h, back_mlp = self.part(i, "mlp", read if parallel else after, b)

        def back(d: Array) -> Array:
            if parallel:
                return self.round(d + back_read(back_mlp(d) + back_attn(d)))
            d = self.round(d + back_mlp(d))
            return self.round(d + back_attn(d))

        return self.round(after + h), back

    def dropout(self, x: Array) -> tuple[Array, Back]:
        return x, lambda d: d

    def embedded(self, b: SimpleNamespace) -> tuple[Array, Back]:
        c = self.c
        if c.image is None:
            x, back = self.p["embed.weight"][b.inputs] * c.embed_scale, lambda d: d
        else:
            P, (B, C, H, W) = c.image.patch, b.inputs.shape
            cut = b.inputs.reshape(B, C, H // P, P, W // P, P).transpose(0, 2, 4, 1, 3, 5)
            cut = cut.reshape(B, -1, C * P * P).astype(self.p["patch.weight"].dtype)
            x, back_patch = self.linear("patch", cut)
            first = [self.p[f"{name}.weight"] for name in c.image.specials]
            first = [np.broadcast_to(one, (B, 1, c.width)) for one in first]
            x = np.concatenate([*first, x], 1)
            back = lambda d: back_patch(d[:, len(first) :])  # noqa: E731
        if c.learned_positions:
            x = x + self.p["position.weight"][b.position + c.position_offset]
        return self.round(x), back

    def pooled(self, x: Array) -> tuple[Array, Back]:
        """What the head reads."""
        if self.c.pool == "none":
            return x, lambda d: d
        share = np.zeros((x.shape[1], 1), x.dtype)
        share[: 1 if self.c.pool == "cls" else None] = 1 if self.c.pool == "cls" else 1 / len(share)
        return self.round((share * x).sum(1, keepdims=True)), lambda d: self.round(share * d)

    def run(self, b: SimpleNamespace) -> tuple[Array, Back]:
        x, back_in = self.embedded(b)
        backs = [back_in]
        for i in range(self.c.layers):
            x, back = self.block(i, x, b)
            backs.append(back)
        x, back = self.norm("final_norm", x)
        backs.append(back)
        read, back_read = self.pooled(x)
        y, back_head = self.linear("head", read)
        z, bend = self.capped(y, self.c.logit_cap)

        def whole(d_z: Array) -> Array:
            d = back_read(back_head(self.round(d_z * bend)))
            for one in reversed(backs):
                d = one(d)
            return d

        return z, whole
