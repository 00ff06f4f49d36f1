"""One network and one choice of labels: what flows through every layer, before rows are chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from refcurv.judge.diagnosis.variants.dropout import block_backward, block_forward
from refcurv.judge.diagnosis.variants.labels import Choice, Sent, sent
from refcurv.judge.diagnosis.variants.networks import Network
from refcurv.judge.diagnosis.variants.positions import Positions
from refcurv.judge.diagnosis.variants.rounding import plain, rounded
from refcurv.judge.diagnosis.variants.setting import (
    HALVES,
    OPERANDS,
    OVERWRITTEN,
    PARTS,
    SWAPPED,
)
from refcurv.law.checks import Array
from refcurv.law.conventions import shard_sequences
from refcurv.model import transformer
from refcurv.model.config import NormPlace, Residual
from refcurv.model.layers import ACTIVATIONS, DEFINITIONS, Layout, lengths
from refcurv.model.transformer import BlockTrace, Inputs, Slope, Tap

LOGITS = 2**22
"""Logits of the sequences that go together, at most, but one sequence.  Chosen: 32 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What flowed over some sequences in some backward passes.

    Fields: net; at, the sequences; states, what each block reads, and behind the last; blocks, the
    traces; read, the input of every linear layer, (B, T, I); taps, of the layers from `lowest` up,
    their g (B, T, O), or (passes, T, O) of one sequence; none without a backward; d_states, the
    gradients of `states`, None below `lowest`; joint, draw: of `Sent`; first, are these the first
    passes over these sequences; made, other tensors that were computed already.
    """

    net: Network
    at: Positions
    states: list[Array]
    blocks: list[BlockTrace]
    read: Mapping[str, Array]
    taps: Mapping[str, Tap]
    d_states: list[Array | None]
    joint: bool = True
    draw: int = 0
    first: bool = True
    made: dict[tuple[int, str], dict[str, Array]] = field(default_factory=dict)


def flows(
    net: Network, at: Positions, one: Choice | None, layers: Collection[str]
) -> Iterator[Flow]:
    """Every sequence forward, and backward as often as the labels ask; never without labels.

    Sequences go a shard at a time (SHARD), fewer of a large vocabulary, or one by one where each
    has passes of its own.
    """
    at = at.rolled() if net.left else at
    T = at.real_BT.shape[1]
    fits = max(1, LOGITS // (T * net.config.vocabulary))
    step = 1 if one is not None and one.many else min(fits, shard_sequences(T))
    for begin in range(0, len(at.index_B), step):
        yield from _shard(net, at.of(slice(begin, begin + step)), one, layers)


def _shard(
    net: Network, at: Positions, one: Choice | None, layers: Collection[str]
) -> Iterator[Flow]:
    config, P, layout, seen = net.config, net.parameters, net.layout(at), net.layouts(at)
    if net.explicit(at):
        config = replace(config, windows=())  # a part of `seen`
    net = replace(net, ops=net.ops_for(at))
    inputs = at.inputs.astype(P["patch.weight"].dtype) if at.images else at.inputs
    x = transformer.input_forward(config, P, inputs, layout)
    ropes = _ropes(net, at, layout, x.dtype)
    if net.drop is not None:
        x, net = net.drop.input(x), replace(net, ops=net.drop.ops(net.ops))
    states, blocks = [x], []
    for i in range(config.layers):
        if net.drop is None:
            x, trace, _ = transformer.block_forward(config, P, i, x, seen[i], ropes[i], net.ops)
        else:
            x, trace = block_forward(config, P, i, x, seen[i], ropes[i], net.ops, net.drop)
        states.append(x)
        blocks.append(trace)
    normed, saved = transformer.norm_forward(config, P, "final_norm", x, net.ops)
    final = transformer.pool_forward(config, normed)
    read = _Read(net, blocks)
    read |= {"head": final, "patch": inputs}
    if one is None:
        yield Flow(net, at, states, blocks, read, {}, [])
        return
    y = transformer.linear_forward(config, P, "head", final)
    behind = partial(
        _backward, net, inputs, layout, ropes, blocks, saved, final, y, _lowest(layers)
    )
    logit = _times(net.sharp, plain(transformer.capped(config, y)))
    for n, back in enumerate(sent(one, at, logit)):
        d_logit = _times(net.sharp, back.d_logit).astype(y.dtype, copy=False)
        taps, d_states = behind(replace(back, d_logit=d_logit))
        yield Flow(
            net, at, states, blocks, read, taps, d_states, back.joint, back.draw, first=n == 0
        )


def _times(factor: float, x: Array) -> Array:
    return x if factor == 1 else factor * x


def _ropes(
    net: Network, at: Positions, layout: Layout, dtype: np.dtype[Any]
) -> list[tuple[Array, Array] | None]:
    """The rotary tables of each block. Padding makes no text longer, whatever it sees."""
    tables = net.ops.rope_tables
    ops = replace(DEFINITIONS, rope_tables=tables)
    if not (at.images or net.left or net.pads in ("blind", "apart")):
        own = _of_text(layout, at.real_BT)
        ops = replace(ops, rope_tables=lambda *some: tables(*some[:-1], own))
    config = net.config
    return [transformer.rope_of(config, i, layout, dtype, ops) for i in range(config.layers)]


def _of_text(layout: Layout, real_BT: Array) -> Array:
    """`layers.lengths` without the padding, which has that of the document before it."""
    own = lengths(replace(layout, last_BT=np.where(real_BT, layout.last_BT, -1)))[:, :, 0, 0]
    end_B1 = np.maximum(real_BT.sum(axis=1, keepdims=True) - 1, 0)
    last_B1 = np.take_along_axis(own, end_B1, axis=1)
    return np.asarray(np.where(real_BT, own, last_B1)[:, :, None, None])


class _Read(dict[str, Array]):
    """What the linear layers of the blocks read; what `down` reads is made when it is asked for."""

    def __init__(self, net: Network, blocks: list[BlockTrace]) -> None:
        super().__init__()
        self._net, self._blocks = net, blocks
        for i, block in enumerate(blocks):
            at = f"blocks.{i}."
            self |= dict.fromkeys((f"{at}attn.{kind}" for kind in "qkv"), block.attn.a)
            self |= dict.fromkeys((f"{at}mlp.gate", f"{at}mlp.up"), block.mlp.a)
            self[f"{at}attn.o"] = block.attn.context

    def __missing__(self, name: str) -> Array:
        _, i, _, _ = name.split(".")
        trace = self._blocks[int(i)].mlp
        self[name] = transformer.hidden_of(self._net.config, trace, self._net.ops)
        return self[name]


def _lowest(layers: Collection[str]) -> int:
    """The lowest block whose gradients are asked for; −1 where the input's are."""
    if "patch" in layers:
        return -1
    return min((int(name.split(".")[1]) for name in layers if name != "head"), default=1 << 30)


def _backward(
    net: Network, inputs: Inputs, layout: Layout, ropes: list[tuple[Array, Array] | None],
    blocks: list[BlockTrace], saved: object, final: Array, y: Array, lowest: int, back: Sent,
) -> tuple[dict[str, Tap], list[Array | None]]:  # fmt: skip
    """The taps of one bunch of passes, by name, and the gradients of the states."""
    config, P = net.config, net.parameters
    taps: dict[str, Tap] = {}

    def take(step: Tap | Slope) -> None:
        if isinstance(step, Tap):
            taps[step.name] = step

    # forward:  logits = cap(head(pool(final_norm(x))))
    g = transformer.uncapped(config, y, back.d_logit) if net.bent else back.d_logit
    d = transformer.drain(transformer.linear_backward(config, P, "head", final, g), take)
    d = transformer.pool_backward(config, d, layout.position_BT.shape[1])
    d = transformer.drain(transformer.norm_backward(config, "final_norm", d, saved, net.ops), take)
    d_states: list[Array | None] = [None] * (config.layers + 1)
    d_states[-1] = d
    for i in reversed(range(max(lowest, 0), config.layers)):
        if net.drop is None:
            steps = transformer.block_backward(config, P, i, d, blocks[i], ropes[i], net.ops)
        else:
            steps = block_backward(config, P, i, d, blocks[i], ropes[i], net.ops, net.drop)
        d = d_states[i] = transformer.drain(steps, take)
    if lowest < 0:
        for tap in transformer.input_taps(config, inputs, layout, d):
            take(tap)
    return taps, d_states


# ------------------------------------------------------------------ other tensors


def input_tensor(flow: Flow, layer: str, name: str) -> Array | None:
    """Another tensor in the place of a layer's input (`setting.INPUTS`, `setting.OVERWRITTEN`).

    None where the block has no such tensor, or where it is the layer's input itself.
    """
    own: Array = plain(flow.read[layer])
    if name == "input":
        return own
    if name in OPERANDS:
        return rounded(own, OPERANDS[name])
    if layer in ("head", "patch"):
        if layer == "patch" or own.shape[:2] != flow.states[-1].shape[:2]:
            return None
        last = flow.states[-1]
        known = {"norm's input": last, "norm without gain": _without_gain(flow, "final_norm", last)}
        return known.get(name)
    i, part = int(layer.split(".")[1]), layer.split(".")[2]
    if name in OVERWRITTEN:
        found = _overwritten(flow, i, layer.rpartition(".")[2], name)
    elif name == "mlp's output before":
        found = _outputs(flow, i - 1)["mlp's output"] if i else None
    else:
        found = _made(flow, i, part).get(name)
    if found is None or found.shape[-1] != own.shape[-1]:
        return None
    return None if found is own else found


def _overwritten(flow: Flow, i: int, kind: str, name: str) -> Array | None:
    """A residual sum in the buffer that q, k and v, or gate and up, or their norm, have read."""
    in_attn = kind in ("q", "k", "v")
    if not in_attn and kind not in ("gate", "up"):
        return None
    if name == "last residual sum":
        return flow.states[-1] if i + 1 < len(flow.blocks) else None
    if name == "residual sum of the block":
        return flow.states[i + 1] if in_attn else None
    return _made(flow, i, "attn")["stream between"] if in_attn else flow.states[i + 1]


def _made(flow: Flow, i: int, part: str) -> dict[str, Array]:
    if (i, part) not in flow.made:
        flow.made.clear()  # those of one block are as much as a pass holds of it
        flow.made[i, part] = _tensors(flow, i, part)
    return flow.made[i, part]


def _outputs(flow: Flow, i: int) -> dict[str, Array]:
    """What attention and MLP of block i give."""
    config, P, block, at = flow.net.config, flow.net.parameters, flow.blocks[i], f"blocks.{i}."
    hidden = flow.read[f"{at}mlp.down"]
    return {
        "attention's output": transformer.linear_forward(
            config, P, f"{at}attn.o", block.attn.context
        ),
        "mlp's output": transformer.linear_forward(config, P, f"{at}mlp.down", hidden),
    }


def _tensors(flow: Flow, i: int, part: str) -> dict[str, Array]:
    """INPUTS by name; `part` of the block, "attn" or "mlp", says whose norm is meant."""
    net, block, at = flow.net, flow.blocks[i], f"blocks.{i}."
    config, P = net.config, net.parameters
    out = _outputs(flow, i)
    update = {"attention": out["attention's output"], "mlp": out["mlp's output"]}
    if config.norm_place is not NormPlace.PRE:
        between = "norm" if config.norm_place is NormPlace.POST else "post_norm"
        for key, short in (("attention", "attn"), ("mlp", "mlp")):
            name = f"{at}{short}_{between}"
            update[key] = transformer.norm_forward(config, P, name, update[key], net.ops)[0]
            out[f"{key}'s update"] = update[key]
    between_BTD = flow.states[i] + update["attention"]
    parallel = part == "attn" or config.residual is not Residual.SEQUENTIAL
    up = transformer.linear_forward(config, P, f"{at}mlp.up", block.mlp.a)
    if config.gated:
        gate = transformer.linear_forward(config, P, f"{at}mlp.gate", block.mlp.a)
        out |= {"gate's output": gate, "activation": ACTIVATIONS[config.activation](gate)[0]}
    reads = flow.states[i] if parallel else between_BTD
    if config.norm_place is not NormPlace.POST:
        out["norm without gain"] = _without_gain(flow, f"{at}{part}_norm", reads)
    return out | {
        "norm's input": reads,
        "attention's input": block.attn.a,
        "context": block.attn.context,
        "stream between": between_BTD,
        "mlp's input": block.mlp.a,
        "up's output": up,
        "hidden": flow.read[f"{at}mlp.down"],
        "stream behind": flow.states[i + 1],
    }


def _without_gain(flow: Flow, name: str, x: Array) -> Array:
    """What the norm of this name gives of x where its gain is 1 and its bias 0, rounded as ours."""
    config = replace(flow.net.config, norm_gain=False, norm_bias=False, norm_offset=False)
    return transformer.norm_forward(config, {}, name, plain(x), DEFINITIONS)[0]


def output_tensor(flow: Flow, layer: str, name: str) -> Array | None:
    """A gradient in the place of that of the layer's output, or None.

    Of `setting.OUTPUTS`, `setting.HALVES`, `setting.SWAPPED` or `setting.OPERANDS`.
    """
    tap, P, config = flow.taps[layer], flow.net.parameters, flow.net.config
    if name == "output":
        return np.asarray(plain(tap.g))
    if name in OPERANDS:
        return rounded(plain(tap.g), OPERANDS[name])
    if name in HALVES:
        return np.asarray(rounded(plain(tap.g) * HALVES[name], "float16") / HALVES[name])
    if name == "input":
        return np.asarray(tap.g @ P[config.weight_of(layer)])
    if layer in ("head", "patch"):
        return flow.d_states[-1] if (layer, name) == ("head", "stream") else None
    others = {"shared input": _shared, "stream": _stream, "activation": _behind_activation}
    others |= {name: partial(_of_another, pair=pair) for name, pair in SWAPPED.items()}
    return others.get(name, _behind_norm)(flow, layer)


def _of_another(flow: Flow, layer: str, pair: tuple[str, str]) -> Array | None:
    """Of the other one of two kinds of layers, of one size, in the same block."""
    _, i, _, kind = layer.split(".")
    if kind not in pair:
        return None
    other = pair[kind == pair[0]]
    return np.asarray(plain(flow.taps[f"blocks.{i}.{PARTS[other]}.{other}"].g))


def _readers(flow: Flow, layer: str) -> list[str]:
    read = flow.net.config.input_of(layer)
    return [name for name in flow.taps if flow.net.config.input_of(name) == read]


def _shared(flow: Flow, layer: str) -> Array | None:
    """The gradient of what q, k and v read, or gate and up."""
    names = _readers(flow, layer)
    if len(names) == 1:
        return None
    return sum_of(flow, names)


def sum_of(flow: Flow, names: Collection[str]) -> Array:
    """Σ g W over some layers that read the same."""
    config, P = flow.net.config, flow.net.parameters
    terms = [flow.taps[name].g @ P[config.weight_of(name)] for name in names]
    return np.asarray(sum(terms[1:], start=terms[0]))


def _behind_activation(flow: Flow, layer: str) -> Array | None:
    """Of `gate`, or of `up` without a gate: h = f(gate) · up. Of `up` with one: that of h."""
    block, kind = layer.rpartition(".")[0], layer.rpartition(".")[2]
    if kind not in ("gate", "up"):
        return None
    d_hidden = sum_of(flow, [f"{block}.down"])
    if kind == "up":
        return d_hidden
    up = transformer.linear_forward(
        flow.net.config, flow.net.parameters, f"{block}.up", flow.read[layer]
    )
    return d_hidden * up


def _stream(flow: Flow, layer: str) -> Array | None:
    """Of q, k, v, gate and up: the gradient of the stream that they or their norm read."""
    i, part = int(layer.split(".")[1]), layer.split(".")[2]
    if layer.endswith((".o", ".down")):
        return None
    if part == "attn" or flow.net.config.residual is not Residual.SEQUENTIAL:
        return flow.d_states[i]
    return _between(flow, i)


def _behind_norm(flow: Flow, layer: str) -> Array | None:
    """Of `o` and `down`: the gradient of what is added to the stream."""
    config = flow.net.config
    kind, i = layer.rpartition(".")[2], int(layer.split(".")[1])
    d_x = flow.d_states[i + 1]
    if config.norm_place is NormPlace.PRE or kind not in ("o", "down") or d_x is None:
        return None
    if kind == "down" or config.residual is not Residual.SEQUENTIAL:
        return d_x
    return _between(flow, i)


def _between(flow: Flow, i: int) -> Array | None:
    """The gradient of the stream between attention and MLP of block i."""
    config, d_x = flow.net.config, flow.d_states[i + 1]
    if d_x is None:
        return None
    # forward:  x' = after + norm(mlp(read(after)))
    at = f"blocks.{i}.mlp."
    d_read = sum_of(flow, [n for n in (f"{at}gate", f"{at}up") if n in flow.taps])
    if config.norm_place is not NormPlace.POST:
        saved = flow.blocks[i].mlp_norm
        steps = transformer.norm_backward(
            config, f"blocks.{i}.mlp_norm", d_read, saved, flow.net.ops
        )
        d_read = transformer.drain(steps, lambda _: None)
    return d_x + d_read
