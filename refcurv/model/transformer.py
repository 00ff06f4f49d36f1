"""The transformer, forward and backward: input → blocks → final norm → head.

There is one transformer. It runs on the layer functions it is given (`ops`), in the dtype of its
parameters. The backward is a generator: it yields what flows through each linear layer, top down,
until the caller stops asking, so that nothing below the lowest wanted layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from refcurv.law.checks import Array, RangeError, overflow_hint, require_finite
from refcurv.law.conventions import HEAD_ROWS
from refcurv.model.config import TABLES, ModelConfig, Norm, NormPlace, Pool, QKNorm, Residual, Rope
from refcurv.model.layers import (
    DEFINITIONS,
    Layout,
    Ops,
    Saved,
    causal_layout,
    full_layout,
    lengths,
    windowed,
)

Parameters = Mapping[str, Array]

Inputs = Array
"""Token ids (B, T), or the patches of images (B, n, C·P·P), real."""


@dataclass(frozen=True, slots=True)
class Tap:
    """What flows through one linear layer y = W a + b: its inputs and its output gradients.

    Fields: name, the layer's; a (..., I); g (..., O) [nats / y], of the summed loss. Layers that
    read the same input (q, k, v; gate, up) carry the very same array `a`.
    """

    name: str
    a: Array
    g: Array


@dataclass(frozen=True, slots=True)
class Slope:
    """The gradient of the summed loss for a parameter that is not a W: a bias, gain or table."""

    name: str
    d: Array


Steps = Generator[Tap | Slope, None, Array]
"""A backward: yields Taps and Slopes on its way, returns the gradient of its forward's input."""


# ------------------------------------------------------------------ linear layers and norms


def linear_forward(config: ModelConfig, parameters: Parameters, layer: str, a: Array) -> Array:
    """ORIENTATION: y = W a + b, b where the layer has one."""
    y = a @ parameters[config.weight_of(layer)].T
    return y + parameters[f"{layer}.bias"] if config.has_bias(layer) else y


def linear_backward(
    config: ModelConfig, parameters: Parameters, layer: str, a: Array, g: Array
) -> Steps:
    """Yields the Tap and the bias's Slope; returns the gradient of a."""
    # forward:  y = a @ Wᵀ + b
    yield Tap(layer, a, g)
    if config.has_bias(layer):
        yield Slope(f"{layer}.bias", g.reshape(-1, g.shape[-1]).sum(axis=0))
    return g @ parameters[config.weight_of(layer)]


def norm_forward(
    config: ModelConfig, parameters: Parameters, name: str, x: Array, ops: Ops
) -> tuple[Array, Saved]:
    """RMSNorm, or LayerNorm = RMSNorm of x − mean(x), over the last axis; then the bias."""
    gain = parameters[f"{name}.weight"] if config.norm_gain else np.ones_like(x, shape=x.shape[-1:])
    if config.norm_offset:
        gain = 1 + gain
    if config.norm is Norm.LAYER:
        x = ops.centre(x)
    y, saved = ops.rms_norm_forward(x, gain, config.norm_eps)
    return (y + parameters[f"{name}.bias"] if config.norm_bias else y), saved


def norm_backward(
    config: ModelConfig, name: str, d_y: Array, saved: Saved, ops: Ops
) -> Generator[Slope, None, Array]:
    """Yields the Slopes of gain and bias; returns the gradient of x."""
    if config.norm_bias:
        # forward:  y = rms_norm(x) + bias
        yield Slope(f"{name}.bias", d_y.reshape(-1, d_y.shape[-1]).sum(axis=0))
    d_x, d_gain = ops.rms_norm_backward(d_y, saved)
    if config.norm_gain:
        yield Slope(f"{name}.weight", d_gain)
    # forward:  x = centre(x)
    return ops.centre(d_x) if config.norm is Norm.LAYER else d_x


# ------------------------------------------------------------------ attention

KeysAndValues = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class AttentionTrace:
    """What `attention_forward` keeps: its input, three clips, two norms, the softmax, o's input."""

    a: Array
    clips: tuple[Saved, Saved, Saved]
    q_norm: Saved
    k_norm: Saved
    softmax: Saved
    context: Array


def attention_forward(
    config: ModelConfig, parameters: Parameters, at: str, a_BTD: Array, layout: Layout,
    rope: tuple[Array, Array] | None, ops: Ops, past: KeysAndValues | None,
) -> tuple[Array, AttentionTrace, KeysAndValues]:  # fmt: skip
    """q, k, v → clip → norm → rotate → attention → o; `at` is "blocks.{i}.attn."."""
    q, clip_q = _heads_forward(config, parameters, f"{at}q", a_BTD, ops)
    k, clip_k = _heads_forward(config, parameters, f"{at}k", a_BTD, ops)
    v, clip_v = _heads_forward(config, parameters, f"{at}v", a_BTD, ops)
    q, q_norm = _qk_norm_forward(config, parameters, f"{at}q_norm", q, ops)
    k, k_norm = _qk_norm_forward(config, parameters, f"{at}k_norm", k, ops)
    if rope is not None:
        q, k = ops.rotate(q, *rope), ops.rotate(k, *rope)
    if past is not None:
        k = np.concatenate([past[0], k], axis=1)
        v = np.concatenate([past[1], v], axis=1)
    context, softmax = ops.attention_forward(q, k, v, layout, config.score_scale, config.score_cap)
    context = context.reshape(*a_BTD.shape[:2], -1)
    o_BTD = linear_forward(config, parameters, f"{at}o", context)
    clips = (clip_q, clip_k, clip_v)
    return o_BTD, AttentionTrace(a_BTD, clips, q_norm, k_norm, softmax, context), (k, v)


def attention_backward(
    config: ModelConfig, parameters: Parameters, at: str, d_o: Array, trace: AttentionTrace,
    rope: tuple[Array, Array] | None, ops: Ops,
) -> Steps:  # fmt: skip
    """Undo `attention_forward`, last step first."""
    # forward:  o = W_o attention(rotate(norm(clip(q))), rotate(norm(clip(k))), clip(v))
    d_context = yield from linear_backward(config, parameters, f"{at}o", trace.context, d_o)
    d_context = d_context.reshape(*d_o.shape[:2], config.heads, config.head_width)
    d_q, d_k, d_v = ops.attention_backward(d_context, trace.softmax)
    if rope is not None:
        cos, sin = rope
        d_q, d_k = ops.rotate(d_q, cos, -sin), ops.rotate(d_k, cos, -sin)
    d_q = yield from _qk_norm_backward(config, f"{at}q_norm", d_q, trace.q_norm, ops)
    d_k = yield from _qk_norm_backward(config, f"{at}k_norm", d_k, trace.k_norm, ops)
    d_a: dict[str, Array] = {}
    for name, d_BTHE, inside in zip("vkq", (d_v, d_k, d_q), reversed(trace.clips), strict=True):
        d_y = d_BTHE.reshape(*d_BTHE.shape[:2], -1)
        d_y = d_y if inside is None else d_y * inside
        d_a[name] = yield from linear_backward(config, parameters, at + name, trace.a, d_y)
    return d_a["q"] + d_a["k"] + d_a["v"]


def _heads_forward(
    config: ModelConfig, parameters: Parameters, layer: str, a_BTD: Array, ops: Ops
) -> tuple[Array, Saved]:
    """One of q, k, v by heads, clipped where the model clips: (B, T, H, E)."""
    y, inside = linear_forward(config, parameters, layer, a_BTD), None
    if config.qkv_clip is not None:
        y, inside = ops.clip(y, config.qkv_clip)
    return y.reshape(*y.shape[:2], -1, config.head_width), inside


def _qk_norm_forward(
    config: ModelConfig, parameters: Parameters, name: str, x_BTHE: Array, ops: Ops
) -> tuple[Array, Saved]:
    """Norm of queries or keys: over each head, over all heads at once, or not at all."""
    if config.qk_norm is QKNorm.NONE:
        return x_BTHE, None
    shape = x_BTHE.shape
    x = x_BTHE.reshape(*shape[:2], -1) if config.qk_norm is QKNorm.FULL else x_BTHE
    y, saved = norm_forward(config, parameters, name, x, ops)
    return y.reshape(shape), saved


def _qk_norm_backward(
    config: ModelConfig, name: str, d_y_BTHE: Array, saved: Saved, ops: Ops
) -> Generator[Slope, None, Array]:
    if config.qk_norm is QKNorm.NONE:
        return d_y_BTHE
    shape = d_y_BTHE.shape
    d_y = d_y_BTHE.reshape(*shape[:2], -1) if config.qk_norm is QKNorm.FULL else d_y_BTHE
    d_x = yield from norm_backward(config, name, d_y, saved, ops)
    return d_x.reshape(shape)


# ------------------------------------------------------------------ MLP


@dataclass(frozen=True, slots=True)
class MLPTrace:
    """What `mlp_forward` keeps: its input, and what the activation reads and saves."""

    a: Array
    gate: Array | None
    up: Array
    activation: Saved


def mlp_forward(
    config: ModelConfig, parameters: Parameters, at: str, a_BTD: Array, ops: Ops
) -> tuple[Array, MLPTrace]:
    """down · (f(gate · a) × (up · a)), or down · f(up · a); `at` is "blocks.{i}.mlp."."""
    gate = linear_forward(config, parameters, f"{at}gate", a_BTD) if config.gated else None
    up = linear_forward(config, parameters, f"{at}up", a_BTD)
    hidden, activation = ops.mlp_forward(config.activation, gate, up)
    down_BTD = linear_forward(config, parameters, f"{at}down", hidden)
    return down_BTD, MLPTrace(a_BTD, gate, up, activation)


def hidden_of(config: ModelConfig, trace: MLPTrace, ops: Ops) -> Array:
    """Down's input: too wide to be kept, and made again from gate and up; the same bits."""
    return ops.mlp_forward(config.activation, trace.gate, trace.up)[0]


def mlp_backward(
    config: ModelConfig, parameters: Parameters, at: str, d_down: Array, trace: MLPTrace, ops: Ops
) -> Steps:
    """Undo `mlp_forward`, last step first."""
    # forward:  down = W_down h;  h = f(W_gate a) * (W_up a)
    hidden = hidden_of(config, trace, ops)
    d_hidden = yield from linear_backward(config, parameters, f"{at}down", hidden, d_down)
    d_gate, d_up = ops.mlp_backward(d_hidden, trace.activation)
    d_a_up = yield from linear_backward(config, parameters, f"{at}up", trace.a, d_up)
    if d_gate is None:
        return d_a_up
    return (yield from linear_backward(config, parameters, f"{at}gate", trace.a, d_gate)) + d_a_up


# ------------------------------------------------------------------ one block


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """What one block's forward keeps for its backward; None for a norm that the block lacks."""

    attn_norm: Saved
    attn: AttentionTrace
    attn_post_norm: Saved
    mlp_norm: Saved
    mlp: MLPTrace
    mlp_post_norm: Saved


def _post_norm(config: ModelConfig, part: str) -> str | None:
    """The name of the norm after attention or MLP (OLMo-2's only one, Gemma's second), or None."""
    if config.norm_place is NormPlace.PRE:
        return None
    return f"{part}_norm" if config.norm_place is NormPlace.POST else f"{part}_post_norm"


def block_forward(
    config: ModelConfig, parameters: Parameters, i: int, x_BTD: Array, layout: Layout,
    rope: tuple[Array, Array] | None, ops: Ops = DEFINITIONS, past: KeysAndValues | None = None,
) -> tuple[Array, BlockTrace, KeysAndValues]:  # fmt: skip
    """Block i: x → x + attention → x + MLP, with norms before or after each of the two.

    `past`: keys and values of earlier positions (B, S, K, E); the third result has theirs and ours.
    Raises NonFiniteError where a number leaves the range of the dtype, with the layer's name.
    """
    at, pre = f"blocks.{i}.", config.norm_place is not NormPlace.POST
    if config.window(i):
        layout = windowed(layout, config.window(i))

    def norm(name: str | None, x: Array) -> tuple[Array, Saved]:
        return norm_forward(config, parameters, at + name, x, ops) if name else (x, None)

    a_BTD, attn_norm = norm("attn_norm" if pre else None, x_BTD)
    o_BTD, attn, keys_and_values = attention_forward(
        config, parameters, f"{at}attn.", a_BTD, layout, rope, ops, past
    )
    update, attn_post_norm = norm(_post_norm(config, "attn"), o_BTD)
    after_BTD = x_BTD + update

    if config.residual is Residual.SHARED:
        m_BTD, mlp_norm = a_BTD, None
    else:
        read = x_BTD if config.residual is Residual.PARALLEL else after_BTD
        m_BTD, mlp_norm = norm("mlp_norm" if pre else None, read)
    down_BTD, mlp = mlp_forward(config, parameters, f"{at}mlp.", m_BTD, ops)
    update, mlp_post_norm = norm(_post_norm(config, "mlp"), down_BTD)
    out_BTD = after_BTD + update
    trace = BlockTrace(attn_norm, attn, attn_post_norm, mlp_norm, mlp, mlp_post_norm)
    _require_numbers(config, at, trace, out_BTD, ops)
    return out_BTD, trace, keys_and_values


def _require_numbers(config: ModelConfig, at: str, trace: BlockTrace, out: Array, ops: Ops) -> None:
    """Raise NonFiniteError if a block's output is not finite, naming where that began."""
    if np.isfinite(out).all():
        return
    attn, mlp, hint = trace.attn, trace.mlp, overflow_hint(out.dtype)
    reads = {"attn.q": attn.a, "attn.o": attn.context, "mlp.up": mlp.a}
    reads |= {"mlp.down": hidden_of(config, mlp, ops)}
    for layer, a in reads.items():
        require_finite("forward", f"the input of '{at}{layer}'", a, hint)
    require_finite("forward", f"the output of '{at[:-1]}'", out, hint)


def block_backward(
    config: ModelConfig, parameters: Parameters, i: int, d_x_BTD: Array, trace: BlockTrace,
    rope: tuple[Array, Array] | None, ops: Ops = DEFINITIONS,
) -> Steps:  # fmt: skip
    """Undo `block_forward`, last step first; returns the gradient of the block's input."""
    at, pre = f"blocks.{i}.", config.norm_place is not NormPlace.POST

    def undo(name: str | None, d_y: Array, saved: Saved) -> Generator[Slope, None, Array]:
        return (yield from norm_backward(config, at + name, d_y, saved, ops)) if name else d_y

    # forward:  x' = after + norm(mlp(norm(read)));  read = after, or x in a parallel block
    d_down = yield from undo(_post_norm(config, "mlp"), d_x_BTD, trace.mlp_post_norm)
    d_m = yield from mlp_backward(config, parameters, f"{at}mlp.", d_down, trace.mlp, ops)
    shared = config.residual is Residual.SHARED
    d_read = yield from undo("mlp_norm" if pre and not shared else None, d_m, trace.mlp_norm)
    d_after = d_x_BTD + d_read if config.residual is Residual.SEQUENTIAL else d_x_BTD

    # forward:  after = x + norm(attention(a));  a = norm(x)
    d_o = yield from undo(_post_norm(config, "attn"), d_after, trace.attn_post_norm)
    d_a = yield from attention_backward(
        config, parameters, f"{at}attn.", d_o, trace.attn, rope, ops
    )
    if shared:  # the MLP read a too
        d_a = d_a + d_m
    d_in = d_after + (yield from undo("attn_norm" if pre else None, d_a, trace.attn_norm))
    return d_in + d_read if config.residual is Residual.PARALLEL else d_in


# ------------------------------------------------------------------ input and output


def input_forward(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout
) -> Array:
    """Tokens or patches → what the first block reads, (B, T, D)."""
    if config.image is None:
        x_BTD = parameters["embed.weight"][inputs]
        if config.embed_scale != 1:
            x_BTD = x_BTD * config.embed_scale
    else:
        patch_BTD = linear_forward(config, parameters, "patch", inputs)
        shape = (len(inputs), 1, config.width)
        first = [np.broadcast_to(parameters[f"{n}.weight"], shape) for n in config.image.specials]
        x_BTD = np.concatenate([*first, patch_BTD], axis=1)
    if config.learned_positions:
        x_BTD = x_BTD + parameters["position.weight"][config.position_offset + layout.position_BT]
    return x_BTD


def input_taps(
    config: ModelConfig, inputs: Inputs, layout: Layout, d_x_BTD: Array
) -> Iterator[Tap]:
    """What flows through the layers that make x.

    A table is a linear layer of one-hot inputs (EMBEDDING). Its `a` holds the indices that were
    read, (B, T), its g the gradient of the entries as they are stored.
    """
    if config.learned_positions:
        # forward:  x[b, t] = ... + P[offset + position[b, t]]
        yield Tap("position", config.position_offset + layout.position_BT, d_x_BTD)
    if config.image is None:
        # forward:  x[b, t] = E[token[b, t]] * scale
        scale = config.embed_scale
        yield Tap("embed", inputs, d_x_BTD if scale == 1 else d_x_BTD * scale)
    else:
        # forward:  x = [specials, W_patch patches + b]
        yield Tap("patch", inputs, d_x_BTD[:, len(config.image.specials) :])


def input_backward(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout, d_x_BTD: Array
) -> Iterator[Tap | Slope]:
    """Undo `input_forward`; the gradients end here."""
    for tap in input_taps(config, inputs, layout, d_x_BTD):
        if tap.name in TABLES:
            shape = parameters[f"{tap.name}.weight"].shape
            d_table = np.zeros_like(d_x_BTD, shape=shape)
            np.add.at(d_table, np.broadcast_to(tap.a, tap.g.shape[:2]), tap.g)
            yield Slope(f"{tap.name}.weight", d_table)
            continue
        yield tap
        if config.has_bias(tap.name):
            yield Slope(f"{tap.name}.bias", tap.g.reshape(-1, config.width).sum(axis=0))
    for n, name in enumerate(config.image.specials if config.image else ()):
        yield Slope(f"{name}.weight", d_x_BTD[:, n].sum(axis=0))


def pool_forward(config: ModelConfig, x_BTD: Array) -> Array:
    """What the head reads: every position, the first, or the mean of all; (B, T or 1, D)."""
    if config.pool is Pool.NONE:
        return x_BTD
    return x_BTD[:, :1] if config.pool is Pool.CLS else x_BTD.mean(axis=1, keepdims=True)


def pool_backward(config: ModelConfig, d_B1D: Array, positions: int) -> Array:
    """Undo `pool_forward` over so many positions."""
    if config.pool is Pool.NONE:
        return d_B1D
    d_x_BTD = np.zeros_like(d_B1D, shape=(len(d_B1D), positions, config.width))
    if config.pool is Pool.CLS:
        d_x_BTD[:, :1] = d_B1D
    else:
        d_x_BTD[:] = d_B1D / positions
    return d_x_BTD


def layout_of(config: ModelConfig, real_BT: Array, segment_BT: Array) -> Layout:
    """Which positions see which: causal or not, as the model is.

    Raises RangeError for a position behind the table of learned ones.
    """
    layout = (causal_layout if config.causal else full_layout)(real_BT, segment_BT)
    rows = config.learned_positions
    if not rows:
        return layout
    position_BT = np.where(real_BT, layout.position_BT, 0)  # padding would lie behind the table
    require_positions("forward", int(position_BT.max(initial=0)) + 1, rows)
    return replace(layout, position_BT=position_BT)


def require_positions(who: str, positions: int, rows: int) -> None:
    """Raise RangeError for more positions than the model has learned."""
    if rows and positions > rows:
        raise RangeError(
            f"{who}: {positions} positions, but the model has learned {rows}. Cut the sequences."
        )


def image_layout(config: ModelConfig, images: int) -> Layout:
    """The layout of so many images: one segment each, every position real."""
    assert config.image is not None
    shape = (images, config.image.positions)
    return layout_of(config, np.ones(shape, dtype=bool), np.zeros(shape, dtype=np.int64))


# ------------------------------------------------------------------ the whole


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward keeps: input, rotary tables, the blocks from `lowest` up, the final norm."""

    inputs: Inputs
    layout: Layout
    ropes: Mapping[Rope | None, tuple[Array, Array] | None]
    lowest: int
    blocks: list[BlockTrace]
    final_norm: Saved


def rope_of(
    config: ModelConfig, i: int, layout: Layout, dtype: np.dtype, ops: Ops = DEFINITIONS
) -> tuple[Array, Array] | None:
    """cos and sin of block i's rotary positions, None where it has none."""
    rope = config.rope(i)
    if rope is None:
        return None
    (theta, scaling), width = rope, config.rope_width or config.head_width
    return ops.rope_tables(layout.position_BT, width, theta, dtype, scaling, lengths(layout))


def forward(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout,
    ops: Ops = DEFINITIONS, lowest: int = 0, past: list[KeysAndValues | None] | None = None,
) -> tuple[Array, Trace]:  # fmt: skip
    """Tokens or patches → what the head reads, and the trace of the blocks from `lowest` up.

    The first result is (B, T, D), or (B, 1, D) where the model pools.

    `past` is for decoding: for each block the keys and values of the positions before these, or
    None where there are none. Those of these positions are appended in place.
    """
    if config.image is not None:
        inputs = inputs.astype(parameters["patch.weight"].real.dtype, copy=False)
    x_BTD = input_forward(config, parameters, inputs, layout)
    kinds = {config.rope(i): i for i in range(config.layers)}
    ropes = {rope: rope_of(config, i, layout, x_BTD.dtype, ops) for rope, i in kinds.items()}
    blocks = []
    for i in range(config.layers):
        rope = ropes[config.rope(i)]
        x_BTD, trace, keys_and_values = block_forward(
            config, parameters, i, x_BTD, layout, rope, ops, past[i] if past else None
        )
        if past:
            past[i] = keys_and_values
        if i >= lowest:
            blocks.append(trace)
        del trace
    final_BTD, saved = norm_forward(config, parameters, "final_norm", x_BTD, ops)
    return pool_forward(config, final_BTD), Trace(inputs, layout, ropes, lowest, blocks, saved)


def blocks_backward(
    config: ModelConfig, parameters: Parameters, d_final_BTD: Array, trace: Trace,
    ops: Ops = DEFINITIONS, consume: bool = False,
) -> Steps:  # fmt: skip
    """Undo `forward` down to block `trace.lowest`; returns the gradient of what that block reads.

    With `consume` each block's trace is given up as the backward leaves it: it serves once.
    """
    d_x_BTD = pool_backward(config, d_final_BTD, trace.layout.position_BT.shape[1])
    d_x_BTD = yield from norm_backward(config, "final_norm", d_x_BTD, trace.final_norm, ops)
    for i in reversed(range(trace.lowest, config.layers)):
        block = trace.blocks.pop() if consume else trace.blocks[i - trace.lowest]
        rope = trace.ropes[config.rope(i)]
        d_x_BTD = yield from block_backward(config, parameters, i, d_x_BTD, block, rope, ops)
    return d_x_BTD


def backward(
    config: ModelConfig, parameters: Parameters, d_final_BTD: Array, trace: Trace,
    ops: Ops = DEFINITIONS,
) -> Iterator[Tap | Slope]:  # fmt: skip
    """Undo `forward` from the gradient of what the head reads, down to block `trace.lowest`.

    When every block was kept, the input's own gradients come last.
    """
    d_x_BTD = yield from blocks_backward(config, parameters, d_final_BTD, trace, ops)
    if trace.lowest == 0:
        yield from input_backward(config, parameters, trace.inputs, trace.layout, d_x_BTD)


# ------------------------------------------------------------------ the head


Cotangent = Callable[[Array, Array], Array]
"""What is sent back at the logits: (rows of the flattened (B, T), their logits (N, V)) → (N, V)."""


def head_logits(
    config: ModelConfig, parameters: Parameters, final: Array, ops: Ops = DEFINITIONS
) -> Array:
    """(..., D) → logits (..., V), soft-capped where the model does so."""
    return capped(config, linear_forward(config, parameters, "head", final), ops)


def capped(config: ModelConfig, y: Array, ops: Ops = DEFINITIONS) -> Array:
    """The logits of the head's outputs y: cap · tanh(y / cap), or y itself without a cap."""
    return y if config.logit_cap is None else ops.soft_cap(y, config.logit_cap)[0]


def uncapped(config: ModelConfig, y: Array, d_logit: Array, ops: Ops = DEFINITIONS) -> Array:
    """The gradient of the head's outputs y from that of the logits, which the soft-cap made.

    The slope is taken from y. A saturated logit has lost it: there 1 − (logit / cap)² cancels.
    """
    # forward:  logit = cap tanh(y / cap)
    return d_logit if config.logit_cap is None else d_logit * ops.soft_cap(y, config.logit_cap)[1]


def head_transpose(
    config: ModelConfig, parameters: Parameters, final_BTD: Array, keep_BT: Array,
    cotangent: Cotangent, ops: Ops = DEFINITIONS,
) -> Steps:  # fmt: skip
    """A cotangent on the logits of the kept rows, sent back to what the head reads: (B, T, D).

    HEAD_ROWS rows at a time, so that (N, V) never exists; the head's steps come for each chunk.
    """
    row_N = np.flatnonzero(keep_BT)
    final_ND = final_BTD.reshape(-1, final_BTD.shape[-1])
    d_final_ND = np.zeros_like(final_ND)
    for begin in range(0, len(row_N), HEAD_ROWS):
        chunk = row_N[begin : begin + HEAD_ROWS]
        a_ND = final_ND[chunk]
        y_NV = linear_forward(config, parameters, "head", a_ND)
        g_NV = uncapped(config, y_NV, cotangent(chunk, capped(config, y_NV, ops)), ops)
        d_final_ND[chunk] = yield from linear_backward(config, parameters, "head", a_ND, g_NV)
    return d_final_ND.reshape(final_BTD.shape)


Result = TypeVar("Result")


def drain(
    steps: Generator[Tap | Slope, None, Result], take: Callable[[Tap | Slope], None]
) -> Result:
    """Hand every step to `take`; return the result that the generator ends with."""

    def relay() -> Iterator[Tap | Slope]:
        result.append((yield from steps))

    result: list[Result] = []
    for step in relay():
        take(step)
    return result[0]
