"""Faults of network arithmetic, in the NumPy collector: each gets one piece of the network wrong.

Names are made as in planted_torch.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from validation.judge.models import CAUSAL
from validation.judge.programs.numpy_collector import Collector, Dump
from validation.judge.programs.numpy_network import Network
from validation.judge.setting import bfloat16

OLMO2 = ("olmo2-equal", "olmo2-padded", "olmo2-square")
GROUPED = (*OLMO2, "gemma-packed", "llama-left", "qwen-answers", "gemma3-prompts",
           "mistral-ragged", "olmo-left", "gemma2-uneven", "olmo3-few", "smollm3-chats",
           "internvit-some", "phi4-half", "cohere2-system", "starcoder2-fim",
           "eurobert-sentences", "glm-strided", "exaone4-choices")  # fmt: skip
"""Settings with several query heads on each of several heads of keys and values."""
ROTARY = (*GROUPED, "neox-packed", "phi-lengths", "gptj-few", "falcon-packed", "modernbert-masked",
          "esm2-tags", "vaultgemma-stream", "stablelm-systems", "eva-bands",
          "nomic-replaced")  # fmt: skip
LEARNED = ("gpt2-prompts", "gpt2-joint", "bigcode-single", "opt-scattered", "gptneo-repeated",
           "xglm-pairs", "imagegpt-clusters")  # fmt: skip
"""Settings with learned positions."""
LEFT = ("llama-left", "gemma3-prompts", "opt-scattered", "olmo-left", "smollm3-chats",
        "gptneo-repeated", "cohere2-system", "esm2-tags", "stablelm-systems",
        "exaone4-choices")  # fmt: skip
"""Settings whose programs pad on the left."""
WINDOWS = ("gemma-packed", "gemma3-prompts", "mistral-ragged", "gemma2-uneven", "olmo3-few",
           "gptneo-repeated", "phi4-half", "cohere2-system", "vaultgemma-stream",
           "starcoder2-fim", "exaone4-choices")  # fmt: skip
LAYERNORM = ("gpt2-prompts", "gpt2-joint", "vit", "neox-packed", "bigcode-single", "opt-scattered",
             "siglip-mean", "phi-lengths", "olmo-left", "deit-two", "gptj-few", "falcon-packed",
             "modernbert-masked", "gptneo-repeated", "cohere2-system", "esm2-tags",
             "vit22b-gray", "starcoder2-fim", "stablelm-systems", "xglm-pairs",
             "eva-bands", "nomic-replaced")  # fmt: skip
TIED = ("gpt2-prompts", "gpt2-joint", "gemma-packed", "llama-left", "bigcode-single",
        "gemma3-prompts", "gemma2-uneven", "falcon-packed", "smollm3-chats", "modernbert-masked",
        "gptneo-repeated", "phi4-half", "cohere2-system", "vaultgemma-stream", "starcoder2-fim",
        "xglm-pairs")  # fmt: skip


class Fault(Collector):
    """Fields: as of planted_torch.py."""

    what = ""
    kinds: tuple[str, ...] = ("gold", "given", "own")
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    settings: tuple[str, ...] = ()


class B50_leak(Fault):
    what = "no causal mask"
    settings = CAUSAL

    def visible(self, b: Any, causal: Any) -> Any:
        return b.same & b.real[:, None]


class B50_next(Fault):
    what = "the causal mask is off by one: a position sees the next"
    settings = CAUSAL

    def visible(self, b: Any, causal: Any) -> Any:
        return b.same & np.tri(len(causal), k=1, dtype=bool) & b.real[:, None]


class B50_documents(Fault):
    what = "packed documents see one another"
    settings = ("gemma-packed", "neox-packed", "mistral-ragged", "falcon-packed", "smollm3-chats",
                "modernbert-masked", "phi4-half", "xglm-pairs", "nomic-replaced")  # fmt: skip

    def visible(self, b: Any, causal: Any) -> Any:
        return (causal | (not self.config.causal)) & b.real[:, None]


class B50_pads(Fault):
    what = "padding on the left is seen, and positions count from there"
    settings = tuple(name for name in LEFT if name in ROTARY)

    def batch(self, at: slice) -> Any:
        b = super().batch(at)
        b.position = np.broadcast_to(np.arange(b.real.shape[1]), b.real.shape)
        return b

    def visible(self, b: Any, causal: Any) -> Any:
        return (causal | (not self.config.causal)) & (b.same | ~b.real[:, None])


class _Unwindowed(Network):
    def windowed(self, i: int, b: Any) -> Any:
        return b.visible


class B50_window(Fault):
    what = "windows are left out: a position sees all before it in each block"
    settings, network = WINDOWS, _Unwindowed


class _Wider(Network):
    def windowed(self, i: int, b: Any) -> Any:
        window = self.c.windows[i]
        near = b.position[:, :, None] - b.position[:, None] <= window
        return b.visible & near if window else b.visible


class B50_wide(Fault):
    what = "windows are off by one: so many positions before it, and itself"
    settings, network = WINDOWS, _Wider


class B50_order(Fault):
    what = "windows are one block late: what is the first block's is the second's"
    settings = ("gemma-packed", "gemma3-prompts", "gemma2-uneven", "olmo3-few", "gptneo-repeated",
                "cohere2-system", "vaultgemma-stream", "exaone4-choices")  # fmt: skip

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        windows = self.config.windows
        self.config = replace(self.config, windows=windows[-1:] + windows[:-1])


class _Interleaved(Network):
    def rotate(self, x: Any, position: Any, rope: Any, sign: int) -> Any:
        half = x.shape[-1] // 2
        cos, sin = (y.astype(x.dtype) for y in self.angles(half, position, rope))
        one, two, sin = x[..., ::2], x[..., 1::2], sign * sin
        return np.stack([one * cos - two * sin, two * cos + one * sin], -1).reshape(x.shape)


class B51_interleaved(Fault):
    what = "rotary embedding of neighbouring entries, for weights of halves"
    settings, network = ROTARY, _Interleaved


class B51_permuted(Fault):
    what = "q and k in the order of interleaved rotary embedding"
    settings = ("olmo2-padded", "gemma-packed", "llama-left", "qwen-answers", "neox-packed",
                "gemma3-prompts", "mistral-ragged", "phi-lengths", "olmo-left", "gemma2-uneven",
                "gptj-few", "falcon-packed", "olmo3-few", "smollm3-chats", "modernbert-masked",
                "internvit-some", "phi4-half", "cohere2-system", "esm2-tags",
                "vaultgemma-stream", "starcoder2-fim", "stablelm-systems", "eurobert-sentences",
                "eva-bands", "exaone4-choices", "nomic-replaced")  # fmt: skip

    def finish(self) -> Dump:
        E = self.config.head_width
        R = self.config.rope_width or E
        head = np.r_[np.arange(R).reshape(2, -1).T.ravel(), R:E]
        out = super().finish()
        for k, (A, G, n) in out.items():
            if k.endswith((".q", ".k")):
                order = (np.arange(0, len(G), E)[:, None] + head).ravel()
                out[k] = A, G[np.ix_(order, order)], n
        return out


class _Theta(Network):
    def frequencies(self, half: int, theta: float, *given: Any) -> Any:
        return super().frequencies(half, 10_000.0, *given)


class B51_theta(Fault):
    what = "rotary base 10,000"
    settings, network = ROTARY, _Theta


class _ShortAngles(Network):
    def angles(self, half: int, position: Any, rope: Any) -> Any:
        frequencies = bfloat16(self.frequencies(half, *rope))
        angle = bfloat16(position[:, :, None, None] * frequencies)
        size = 1.0 if rope[1] is None else rope[1].attention
        return bfloat16(size * np.cos(angle)), bfloat16(size * np.sin(angle))


class B51_short(Fault):
    what = "rotary frequencies, angles, cos and sin are bfloat16, as buffers are that are cast"
    settings, network = ROTARY, _ShortAngles


class B51_scaling(Fault):
    what = "the scaling of rotary frequencies is left out"
    settings = ("olmo3-few", "smollm3-chats", "phi4-half", "glm-strided", "nomic-replaced")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.config = replace(self.config, rope_scaling=None)


class B51_blocks(Fault):
    what = "all blocks have the rotary base and scaling that the config names first"
    settings = ("olmo3-few", "smollm3-chats", "modernbert-masked", "cohere2-system",
                "exaone4-choices")  # fmt: skip

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.config = replace(self.config, rotary=())


class B51_length(Fault):
    what = "rotary frequencies that depend on a text's length take that of the batch's longest"
    settings = ("phi4-half", "nomic-replaced")

    def batch(self, at: slice) -> Any:
        b = super().batch(at)
        b.length = np.full_like(b.length, b.length.max())
        return b


class B51_partial(Fault):
    what = "the whole of a head is rotary, where a part of it is meant"
    settings = ("neox-packed", "phi-lengths", "gptj-few", "stablelm-systems", "glm-strided")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.config = replace(self.config, rope_width=None)


class B51_left(Fault):
    what = "learned positions count from the padding on the left"
    settings = tuple(name for name in LEARNED if name in LEFT)

    def batch(self, at: slice) -> Any:
        b = super().batch(at)
        b.position = np.broadcast_to(np.arange(b.real.shape[1]), b.real.shape)
        return b


class B51_offset(Fault):
    what = "learned positions start from 1"
    settings = LEARNED

    def batch(self, at: slice) -> Any:
        b = super().batch(at)
        b.position = b.position + 1
        return b


class _Tiled(Network):
    def groups(self) -> Any:
        return np.arange(self.c.heads) % self.c.kv_heads


class B52(Fault):
    what = "key-value heads are tiled, not repeated"
    settings, network = GROUPED, _Tiled


class _TiledValues(Network):
    def core(self, q: Any, k: Any, v: Any, visible: Any) -> Any:
        head = np.arange(self.c.heads)
        one_of = head % self.c.kv_heads * (self.c.heads // self.c.kv_heads)
        y, back = super().core(q, k, v[:, :, one_of], visible)

        def whole(d: Any) -> Any:
            d_q, d_k, d_tiled = back(d)
            d_v = np.zeros_like(d_tiled)
            for here, there in zip(head, one_of, strict=True):
                d_v[:, :, there] += d_tiled[:, :, here]
            return d_q, d_k, d_v

        return y, whole


class B52_values(Fault):
    what = "heads of keys are repeated, those of values tiled"
    settings, network = GROUPED, _TiledValues


class _Outside(Network):
    def inverse_root(self, square: Any) -> Any:
        root = np.sqrt(square)
        s = 1 / (root + self.c.norm_eps)
        return s, -(s**2) / (2 * root)


class B53_outside(Fault):
    what = "eps is added to the root"
    network = _Outside


class B53_eps(Fault):
    what = "eps is a hundred times smaller"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.config = replace(self.config, norm_eps=self.config.norm_eps / 100)


class _Unbiased(Network):
    def inverse_root(self, square: Any) -> Any:
        s, slope = super().inverse_root(square * self.share)
        return s, slope * self.share

    def norm(self, name: str, x: Any) -> Any:
        self.share = x.shape[-1] / (x.shape[-1] - 1)
        return super().norm(name, x)


class B53_unbiased(Fault):
    what = "a norm's variance is divided by d − 1"
    settings, network = LAYERNORM, _Unbiased


class _NoOffset(Network):
    def gain(self, name: str) -> Any:
        return self.p[f"{name}.weight"]


class B53_offset(Fault):
    what = "gains are w where 1 + w is meant"
    settings = ("gemma-packed", "gemma3-prompts", "gemma2-uneven", "vaultgemma-stream")
    network = _NoOffset


class _ShortNorm(Network):
    def norm(self, name: str, x: Any) -> Any:
        y, back = super().norm(name, bfloat16(x))
        return bfloat16(y), lambda d: bfloat16(back(d))


class B53_bfloat16(Fault):
    what = "norms are bfloat16"
    dtypes, network = ("float64", "float32"), _ShortNorm


class B54_activation(Fault):
    what = "another GELU: by tanh for erf, by erf for tanh, GELU for SiLU or ReLU"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        other = "gelu_tanh" if self.config.activation == "gelu" else "gelu"
        self.config = replace(self.config, activation=other)


class _Unscaled(Network):
    def score_scale(self) -> float:
        usual = 1 / math.sqrt(self.c.head_width)
        return usual if self.c.score_scale else 1.0


class B54_scale(Fault):
    what = "another scale of attention scores"
    network = _Unscaled


class _OtherHeads(Network):
    def qk_norm(self, name: str, x: Any) -> Any:
        E, each = self.c.head_width, self.c.qk_norm == "full"
        heads = x.reshape(*x.shape[:2], -1, E) if each else x
        gain = self.p[f"{name}.weight"]
        self.p[f"{name}.weight"] = gain.reshape(-1, E) if each else np.tile(gain, x.shape[-1] // E)
        y, back = self.norm(name, heads)
        self.p[f"{name}.weight"] = gain
        return y.reshape(x.shape), lambda d: back(d.reshape(heads.shape)).reshape(x.shape)


class B54_heads(Fault):
    what = "QK-norm over each head where it is over all, or over all where it is over each"
    settings = (*OLMO2, "qwen-answers", "gemma3-prompts", "olmo3-few", "internvit-some",
                "vit22b-gray", "exaone4-choices")  # fmt: skip
    network = _OtherHeads


class B54_cap(Fault):
    what = "no soft-cap of attention scores"
    settings = ("gemma-packed", "gemma2-uneven", "vaultgemma-stream")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.config = replace(self.config, score_cap=None)


def _dropped(network: Any, x: Any, rate: float = 0.1) -> Any:
    network.rng = getattr(network, "rng", None) or np.random.default_rng(5)
    keep = ((network.rng.random(x.shape) > rate) / (1 - rate)).astype(x.dtype)
    return x * keep, lambda d: d * keep


class _Dropout(Network):
    dropout = _dropped


class _SlightDropout(Network):
    def dropout(self, x: Any) -> Any:
        return _dropped(self, x, 0.01)


class B55(Fault):
    what = "dropout of 0.1 is active"
    network = _Dropout


class B55_slight(Fault):
    what = "dropout of 0.01 is active"
    network = _SlightDropout


class _AttentionDropout(Network):
    weights = _dropped


class B55_attention(Fault):
    what = "dropout of 0.1 is active on the weights of attention alone"
    network = _AttentionDropout


class _ShortAttention(Network):
    def core(self, q: Any, k: Any, v: Any, visible: Any) -> Any:
        y, back = super().core(bfloat16(q), bfloat16(k), bfloat16(v), visible)
        return bfloat16(y), lambda d: tuple(bfloat16(x) for x in back(bfloat16(d)))


class B56(Fault):
    what = "a kernel for attention that computes in bfloat16"
    dtypes, network = ("float64", "float32"), _ShortAttention


class B57_step(Fault):
    what = "the weights of a later step: blocks are 2 % away"

    def parameters(self) -> Any:
        rng = np.random.default_rng(9)
        return {
            name: x * (1 + 0.02 * rng.normal(size=x.shape)) if name.startswith("blocks") else x
            for name, x in super().parameters().items()
        }


class B57_average(Fault):
    what = "weights are an average over training: 3 % of each, the embedding too, is its start's"

    def parameters(self) -> Any:
        rng = np.random.default_rng(15)
        return {
            name: 0.97 * x + 0.03 * x.std() * rng.normal(size=x.shape)
            for name, x in super().parameters().items()
        }


class B57_adapter(Fault):
    what = "an adapter of rank 2 is merged into q and v"

    def parameters(self) -> Any:
        def adapted(W: Any) -> Any:
            B, A = rng.normal(size=(W.shape[0], 2)), rng.normal(size=(2, W.shape[1]))
            return W + 0.05 * np.linalg.norm(W) / np.linalg.norm(B @ A) * (B @ A)

        rng = np.random.default_rng(21)
        return {
            name: adapted(x) if name.endswith((".q.weight", ".v.weight")) else x
            for name, x in super().parameters().items()
        }


class B57_untied(Fault):
    what = "the head has lost its tie to the embedding, and is as it was drawn"
    settings = TIED

    def parameters(self) -> Any:
        shape = self.config.vocabulary, self.config.width
        drawn = np.random.default_rng(27).normal(0, 1 / shape[1] ** 0.5, shape)
        return super().parameters() | {"head.weight": drawn}


class B57_trip(Fault):
    what = "weights went through a float of 4 bits"

    def parameters(self) -> Any:
        def short(x: Any) -> Any:
            m, e = np.frexp(x)
            return np.ldexp(np.round(m * 16) / 16, e)

        return {
            name: short(x) if name.startswith("blocks") and x.ndim > 1 else x
            for name, x in super().parameters().items()
        }


class B57_int8(Fault):
    what = "weights went through integers of 8 bits, with a scale for each row"

    def parameters(self) -> Any:
        def short(x: Any) -> Any:
            scale = abs(x).max(1, keepdims=True) / 127
            return np.round(x / scale) * scale

        return {
            name: short(x) if name.startswith("blocks") and x.ndim > 1 else x
            for name, x in super().parameters().items()
        }


def _tf32(x: Any) -> Any:
    """The nearest float32 of 11 bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(np.float32)


class _ShortProducts(Network):
    def linear(self, name: str, x: Any) -> Any:
        W, b = _tf32(self.p[f"{name}.weight"]), self.p.get(f"{name}.bias", 0)

        def back(d_y: Any) -> Any:
            self.tap(name, x, d_y)
            return _tf32(d_y) @ W

        return _tf32(x) @ W.T + b, back

    def core(self, q: Any, k: Any, v: Any, visible: Any) -> Any:
        y, back = super().core(_tf32(q), _tf32(k), _tf32(v), visible)
        return y, lambda d: back(_tf32(d))


class B60_network(Fault):
    what = "products have operands of 11 bits (TF32), the network's too"
    dtypes, network = ("float32",), _ShortProducts

    def add(self, name: str, a: Any, g: Any) -> None:
        super().add(name, _tf32(a), _tf32(g))


FAULTS = {
    name: made
    for name, made in globals().items()
    if isinstance(made, type) and issubclass(made, Fault) and name.startswith("B")
}
"""Name → class."""
