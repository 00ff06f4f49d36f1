"""The transformer, forward and backward: embed → blocks → final norm → head.

There is one transformer. It runs on the layer functions it is given (`ops`), in the dtype of its
parameters. The backward is a generator: it yields what flows through each linear layer, top down,
and stops as soon as the caller stops asking, so that nothing below the lowest wanted layer is
ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from refcurv.law.checks import Array
from refcurv.law.conventions import HEAD_ROWS
from refcurv.model.config import ModelConfig, NormPlace, QKNorm
from refcurv.model.layers import DEFINITIONS, Layout, Ops, Saved, rope_tables
from refcurv.model.loss import cross_entropy

Parameters = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Tap:
    """What flows through one linear layer y = W a: its inputs and its output gradients.

    Fields: name, the layer's; a (..., I); g (..., O) [nats / y], of the summed loss. Layers that
    read the same input (q, k, v; gate, up) carry the very same array `a`.
    """

    name: str
    a: Array
    g: Array


@dataclass(frozen=True, slots=True)
class Slope:
    """The gradient of the summed loss with respect to a parameter that is no linear layer's."""

    name: str
    d: Array


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """What one block's forward keeps for its backward."""

    attn_in: Array
    attn_norm: Saved
    q_norm: Saved
    k_norm: Saved
    attention: Saved
    context: Array
    mlp_in: Array
    mlp_norm: Saved
    swiglu: Saved
    hidden: Array


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward keeps: tokens, rotary tables, the blocks from `lowest` up, the final norm."""

    token_BT: Array
    rope: tuple[Array, Array]
    lowest: int
    blocks: list[BlockTrace]
    final_norm: Saved


# ------------------------------------------------------------------ one block


def _qk_norm_forward(
    config: ModelConfig, gain: Array | None, x_BTHE: Array, ops: Ops
) -> tuple[Array, Saved]:
    """RMSNorm of queries or keys: over each head, over all heads at once, or not at all."""
    if gain is None:
        return x_BTHE, None
    if config.qk_norm is QKNorm.HEAD:
        return ops.rms_norm_forward(x_BTHE, gain, config.norm_eps)
    B, T, H, E = x_BTHE.shape
    y, saved = ops.rms_norm_forward(x_BTHE.reshape(B, T, H * E), gain, config.norm_eps)
    return y.reshape(B, T, H, E), saved


def _qk_norm_backward(
    config: ModelConfig, d_y_BTHE: Array, saved: Saved, ops: Ops
) -> tuple[Array, Array]:
    if config.qk_norm is QKNorm.HEAD:
        return ops.rms_norm_backward(d_y_BTHE, saved)
    B, T, H, E = d_y_BTHE.shape
    d_x, d_gain = ops.rms_norm_backward(d_y_BTHE.reshape(B, T, H * E), saved)
    return d_x.reshape(B, T, H, E), d_gain


KeysAndValues = tuple[Array, Array]


def block_forward(
    config: ModelConfig,
    parameters: Parameters,
    i: int,
    x_BTD: Array,
    layout: Layout,
    rope: tuple[Array, Array],
    ops: Ops = DEFINITIONS,
    past: KeysAndValues | None = None,
) -> tuple[Array, BlockTrace, KeysAndValues]:
    """Block i: x → x + attention → x + MLP, with the norm before or behind each of the two.

    `past` holds the keys and values of earlier positions (B, S, K, E), for decoding; the third
    result is theirs followed by this call's.
    """
    at, E = f"blocks.{i}.", config.head_width
    W = {name: parameters[f"{at}{name}.weight"] for name in _BLOCK_LINEAR}
    pre = config.norm_place is NormPlace.PRE
    B, T, _D = x_BTD.shape

    def norm(name: str, x: Array) -> tuple[Array, Saved]:
        return ops.rms_norm_forward(x, parameters[f"{at}{name}.weight"], config.norm_eps)

    def gain(name: str) -> Array | None:
        return None if config.qk_norm is QKNorm.NONE else parameters[f"{at}attn.{name}.weight"]

    a_BTD, attn_norm = norm("attn_norm", x_BTD) if pre else (x_BTD, None)
    q = (a_BTD @ W["attn.q"].T).reshape(B, T, config.heads, E)
    k = (a_BTD @ W["attn.k"].T).reshape(B, T, config.kv_heads, E)
    v = (a_BTD @ W["attn.v"].T).reshape(B, T, config.kv_heads, E)
    q, q_norm = _qk_norm_forward(config, gain("q_norm"), q, ops)
    k, k_norm = _qk_norm_forward(config, gain("k_norm"), k, ops)
    q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
    if past is not None:
        k = np.concatenate([past[0], k], axis=1)
        v = np.concatenate([past[1], v], axis=1)
    context_BTHE, attention = ops.attention_forward(q, k, v, layout)
    context = context_BTHE.reshape(B, T, config.heads * E)
    o_BTD = context @ W["attn.o"].T
    update, attn_norm = (o_BTD, attn_norm) if pre else norm("attn_norm", o_BTD)
    x_BTD = x_BTD + update

    m_BTD, mlp_norm = norm("mlp_norm", x_BTD) if pre else (x_BTD, None)
    hidden, swiglu = ops.swiglu_forward(m_BTD @ W["mlp.gate"].T, m_BTD @ W["mlp.up"].T)
    down_BTD = hidden @ W["mlp.down"].T
    update, mlp_norm = (down_BTD, mlp_norm) if pre else norm("mlp_norm", down_BTD)
    x_BTD = x_BTD + update
    trace = BlockTrace(
        a_BTD, attn_norm, q_norm, k_norm, attention, context, m_BTD, mlp_norm, swiglu, hidden
    )
    return x_BTD, trace, (k, v)


_BLOCK_LINEAR = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def block_backward(
    config: ModelConfig,
    parameters: Parameters,
    i: int,
    d_x_BTD: Array,
    trace: BlockTrace,
    rope: tuple[Array, Array],
    ops: Ops = DEFINITIONS,
) -> Generator[Tap | Slope, None, Array]:
    """Undo `block_forward`, last step first; returns the gradient of the block's input."""
    at = f"blocks.{i}."
    W = {name: parameters[f"{at}{name}.weight"] for name in _BLOCK_LINEAR}
    pre = config.norm_place is NormPlace.PRE

    def norm(name: str, d_y: Array, saved: Saved) -> Generator[Slope, None, Array]:
        d_in, d_gain = ops.rms_norm_backward(d_y, saved)
        yield Slope(f"{at}{name}.weight", d_gain)
        return d_in

    def qk_norm(name: str, d_y: Array, saved: Saved) -> Generator[Slope, None, Array]:
        if saved is None:
            return d_y
        d_in, d_gain = _qk_norm_backward(config, d_y, saved, ops)
        yield Slope(f"{at}attn.{name}.weight", d_gain)
        return d_in

    # forward:  x = x + norm(hidden @ W_downᵀ);  hidden = silu(m @ W_gateᵀ) * (m @ W_upᵀ)
    d_down = d_x_BTD if pre else (yield from norm("mlp_norm", d_x_BTD, trace.mlp_norm))
    yield Tap(f"{at}mlp.down", trace.hidden, d_down)
    d_gate, d_up = ops.swiglu_backward(d_down @ W["mlp.down"], trace.swiglu)
    yield Tap(f"{at}mlp.up", trace.mlp_in, d_up)
    yield Tap(f"{at}mlp.gate", trace.mlp_in, d_gate)
    d_m = d_gate @ W["mlp.gate"] + d_up @ W["mlp.up"]
    d_x_BTD = d_x_BTD + ((yield from norm("mlp_norm", d_m, trace.mlp_norm)) if pre else d_m)

    # forward:  x = x + norm(context @ W_oᵀ)
    #           context = attention(rotate(norm(q)), rotate(norm(k)), v)
    d_o = d_x_BTD if pre else (yield from norm("attn_norm", d_x_BTD, trace.attn_norm))
    yield Tap(f"{at}attn.o", trace.context, d_o)
    d_context = (d_o @ W["attn.o"]).reshape(*d_o.shape[:2], config.heads, config.head_width)
    d_q, d_k, d_v = ops.attention_backward(d_context, trace.attention)
    cos, sin = rope
    d_q = _rows(
        config.heads, (yield from qk_norm("q_norm", ops.rotate(d_q, cos, -sin), trace.q_norm))
    )
    d_k = _rows(
        config.kv_heads, (yield from qk_norm("k_norm", ops.rotate(d_k, cos, -sin), trace.k_norm))
    )
    d_v = _rows(config.kv_heads, d_v)
    yield Tap(f"{at}attn.v", trace.attn_in, d_v)
    yield Tap(f"{at}attn.k", trace.attn_in, d_k)
    yield Tap(f"{at}attn.q", trace.attn_in, d_q)
    d_a = d_q @ W["attn.q"] + d_k @ W["attn.k"] + d_v @ W["attn.v"]
    return d_x_BTD + ((yield from norm("attn_norm", d_a, trace.attn_norm)) if pre else d_a)


def _rows(heads: int, d_BTHE: Array) -> Array:
    B, T, _H, E = d_BTHE.shape
    return d_BTHE.reshape(B, T, heads * E)


# ------------------------------------------------------------------ the whole


def forward(
    config: ModelConfig,
    parameters: Parameters,
    token_BT: Array,
    layout: Layout,
    ops: Ops = DEFINITIONS,
    lowest: int = 0,
) -> tuple[Array, Trace]:
    """Tokens → what the head reads, (B, T, D), and the trace of the blocks from `lowest` up."""
    x_BTD = parameters["embed.weight"][token_BT]
    rope = rope_tables(layout.position_BT, config.head_width, config.rope_theta, x_BTD.dtype)
    blocks = []
    for i in range(config.layers):
        x_BTD, trace, _ = block_forward(config, parameters, i, x_BTD, layout, rope, ops)
        if i >= lowest:
            blocks.append(trace)
        del trace
    final_BTD, saved = ops.rms_norm_forward(x_BTD, parameters["final_norm.weight"], config.norm_eps)
    return final_BTD, Trace(token_BT, rope, lowest, blocks, saved)


def backward(
    config: ModelConfig,
    parameters: Parameters,
    d_final_BTD: Array,
    trace: Trace,
    ops: Ops = DEFINITIONS,
    consume: bool = False,
) -> Iterator[Tap | Slope]:
    """Undo `forward` from the gradient of what the head reads, down to block `trace.lowest`.

    When every block was kept, the embedding's own gradient comes last. With `consume` each block's
    trace is given up as the backward leaves it, and the trace serves no second time.
    """
    d_x_BTD, d_gain = ops.rms_norm_backward(d_final_BTD, trace.final_norm)
    yield Slope("final_norm.weight", d_gain)
    for i in reversed(range(trace.lowest, config.layers)):
        block = trace.blocks.pop() if consume else trace.blocks[i - trace.lowest]
        d_x_BTD = yield from block_backward(config, parameters, i, d_x_BTD, block, trace.rope, ops)
    if trace.lowest == 0:
        # forward:  x[b, t] = E[token[b, t]]
        d_embed_VD = np.zeros((config.vocabulary, config.width), dtype=d_x_BTD.dtype)
        np.add.at(d_embed_VD, trace.token_BT, d_x_BTD)
        yield Slope("embed.weight", d_embed_VD)


# ------------------------------------------------------------------ the head


Cotangent = Callable[[Array, Array], Array]
"""What is sent back at the logits: (rows of the flattened (B, T), their logits (N, V)) → (N, V)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What the head found: nats_BT, 0 where unlabelled; d_final_BTD, the gradient of their sum."""

    nats_BT: Array
    d_final_BTD: Array


def head_logits(config: ModelConfig, parameters: Parameters, final: Array) -> Array:
    """(..., D) → logits (..., V)."""
    return final @ parameters[config.weight_of("head")].T


def head_transpose(
    config: ModelConfig,
    parameters: Parameters,
    final_BTD: Array,
    keep_BT: Array,
    cotangent: Cotangent,
) -> Generator[Tap, None, Array]:
    """A cotangent on the logits of the kept rows, sent back to what the head reads: (B, T, D).

    Works on HEAD_ROWS rows at a time, so that (N, V) never exists, and yields the head's Tap for
    each of these chunks.
    """
    W_VD = parameters[config.weight_of("head")]
    row_N = np.flatnonzero(keep_BT)
    final_ND = final_BTD.reshape(-1, final_BTD.shape[-1])
    d_final_ND = np.zeros_like(final_ND)
    for begin in range(0, len(row_N), HEAD_ROWS):
        chunk = row_N[begin : begin + HEAD_ROWS]
        a_ND = final_ND[chunk]
        g_NV = cotangent(chunk, a_ND @ W_VD.T)
        # forward:  logit = a @ W_headᵀ
        d_final_ND[chunk] = g_NV @ W_VD
        yield Tap("head", a_ND, g_NV)
    return d_final_ND.reshape(final_BTD.shape)


def head_backward(
    config: ModelConfig,
    parameters: Parameters,
    final_BTD: Array,
    label_BT: Array,
    keep_BT: Array,
) -> Generator[Tap, None, Loss]:
    """Loss over the kept rows, and its gradient; yields the Taps of `head_transpose`."""
    label_N = label_BT.astype(np.int64).reshape(-1)
    nats_N = np.zeros(label_N.shape, dtype=final_BTD.dtype)

    def slope(row_N: Array, logit_NV: Array) -> Array:
        nats_N[row_N], d_logit_NV = cross_entropy(logit_NV, label_N[row_N])
        return d_logit_NV

    d_final_BTD = yield from head_transpose(config, parameters, final_BTD, keep_BT, slope)
    return Loss(nats_N.reshape(label_BT.shape), d_final_BTD)


def loss_and_gradient(
    config: ModelConfig,
    parameters: Parameters,
    token_BT: Array,
    label_BT: Array,
    layout: Layout,
    ops: Ops = DEFINITIONS,
) -> tuple[Array, dict[str, Array]]:
    """LOSS: the summed nats over labelled positions, and its gradient for every parameter.

    A linear layer's gradient is Σ g aᵀ over positions; a tied embedding receives the head's too.
    """
    gradient: dict[str, Array] = {}

    def add(name: str, d: Array) -> None:
        gradient[name] = gradient[name] + d if name in gradient else d

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Slope):
            add(step.name, step.d)
            return
        g_NO = step.g.reshape(-1, step.g.shape[-1])
        add(config.weight_of(step.name), g_NO.T @ step.a.reshape(-1, step.a.shape[-1]))

    final_BTD, trace = forward(config, parameters, token_BT, layout, ops)
    head = head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0)
    loss = drain(head, take)
    for step in backward(config, parameters, loss.d_final_BTD, trace, ops):
        take(step)
    for name, shape in config.parameter_shapes().items():
        gradient.setdefault(name, np.zeros(shape, dtype=final_BTD.dtype))  # no label anywhere
    return loss.nats_BT.sum(), {name: gradient[name] for name in config.parameter_shapes()}


Result = TypeVar("Result")


def drain(steps: Generator[Tap, None, Result], take: Callable[[Tap], None]) -> Result:
    """Hand every Tap to `take`; return the result that the generator ends with."""

    def relay() -> Iterator[Tap]:
        result.append((yield from steps))

    result: list[Result] = []
    for tap in relay():
        take(tap)
    return result[0]
