"""Forward passes, of one batch or of several that pass each block together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.gradient import head_backward
from refcurv.model.layers import Layout
from refcurv.model.transformer import Inputs, KeysAndValues, Parameters
from refcurv.passes import parallel
from refcurv.passes.below import key_of
from refcurv.passes.fast import FAST
from refcurv.passes.held import Held
from refcurv.passes.side_by_side import by_rows, laid
from refcurv.passes.sweep import lowest_block

Item = TypeVar("Item")
Result = TypeVar("Result")


# ------------------------------------------------------------------ batches that go together


def batchwise(
    parameters: Parameters,
    batches: Sequence[Item],
    work: Callable[[list[Item]], list[Result]],
    done: Callable[[], object] = lambda: None,
) -> list[Result]:
    """What `work` makes of the batches, in order: of one at a time, or of those that go together.

    With all parameters in memory each batch is alone, and there are several threads of them. With
    one block in memory they go by groups, so that a block is read once for a group; `work` then has
    its threads inside (`each`). No bit depends on it.

    Proof: tests/test_held.py::test_an_evaluation_block_by_block_has_the_same_bits
    """
    own = parameters if isinstance(parameters, Held) else None
    size = own.together or 1 if own else 1
    in_flight = None if own is None else own.in_flight if own.together is None else 1
    groups = [list(batches[begin : begin + size]) for begin in range(0, len(batches), size)]
    found: list[Result] = []
    for made in parallel.stream(groups, lambda _, group: work(group), in_flight=in_flight):
        found += made
        for _ in made:
            done()
    return found


def each(
    parameters: Parameters, items: Sequence[Item], work: Callable[[int, Item], Result]
) -> list[Result]:
    """`work` on every batch of a group; on threads, if there are several."""
    if len(items) == 1:
        return [work(0, items[0])]
    in_flight = parameters.in_flight if isinstance(parameters, Held) else None
    return parallel.run(items, work, in_flight=in_flight)


@dataclass(frozen=True, slots=True)
class Reading:
    """A batch as the model reads it; `past` as for `transformer.forward`, it grows in place.

    told_S (S,): the tokens that `past` begins with, if all rows share them and no model said them.
    With `side_by_side` its rows, of tokens, are multiplied together (`passes.side_by_side`).
    followed: whether other tokens are read behind these.
    """

    inputs: Inputs
    layout: Layout
    past: list[KeysAndValues | None] | None = None
    told_S: Array | None = None
    side_by_side: bool = False
    followed: bool = True

    def key(self) -> bytes:
        """What tells this batch from others (`passes.below`); empty behind what a model said."""
        if self.told_S is None and any(pair is not None for pair in self.past or ()):
            return b""
        kind = f"{self.past is None} {self.side_by_side} {self.followed}"
        return key_of(kind, self.inputs, self.layout, self.told_S)

    @property
    def kept(self) -> list[KeysAndValues | None] | None:
        """The keys and values that other tokens need."""
        return self.past if self.followed else None

    def block(self, config: ModelConfig, parameters: Parameters, i: int, x_BTD: Array) -> Array:
        """What block i makes of the batch; its keys and values are kept in `past`."""
        past = self.past[i] if self.past else None
        layout, ops, kept = self.layout, FAST, list[KeysAndValues]()
        if self.side_by_side:
            layout, ops, past = laid(layout), by_rows(len(x_BTD), past, kept.append), None
            x_BTD = x_BTD.reshape(1, -1, x_BTD.shape[2])
        rope = transformer.rope_of(config, i, layout, x_BTD.dtype, FAST)
        y, _trace, keys_and_values = transformer.block_forward(
            config, parameters, i, x_BTD, layout, rope, ops, past
        )
        if self.past:
            self.past[i] = kept[0] if self.side_by_side else keys_and_values
        return y.reshape(*self.inputs.shape[:2], -1) if self.side_by_side else y


def final_states_each(
    config: ModelConfig, parameters: Parameters, readings: Sequence[Reading]
) -> list[Array]:
    """What the head reads of each batch, as `final_states`: all pass a block before the next one.

    With kept states (`Held.below`) a batch begins where these are from.

    Proof: tests/test_held.py::test_an_evaluation_block_by_block_has_the_same_bits,
        tests/test_sweep.py::test_kept_states_change_no_bit
    """
    below = parameters.below if isinstance(parameters, Held) else None
    if len(readings) == 1 and below is None and not readings[0].side_by_side:
        (one,) = readings
        lowest = config.layers
        return [
            transformer.forward(config, parameters, one.inputs, one.layout, FAST, lowest, one.past)[
                0
            ]
        ]

    def enter(n: int, one: Reading) -> tuple[int, Array]:
        known = below.find(key[n], one.kept) if below else None
        if known:
            return known
        inputs = one.inputs
        if config.image is not None:
            inputs = inputs.astype(parameters["patch.weight"].dtype, copy=False)
        return 0, transformer.input_forward(config, parameters, inputs, one.layout)

    def leave(n: int, one: Reading) -> None:
        keep(n, one, config.layers)
        final_BTD, _saved = transformer.norm_forward(config, parameters, "final_norm", x[n], FAST)
        x[n] = transformer.pool_forward(config, final_BTD)

    def keep(n: int, one: Reading, at: int) -> None:
        if below and at == below.first:
            below.keep(key[n], one.kept, x[n])

    key = [one.key() if below else b"" for one in readings]
    begun = each(parameters, readings, enter)
    begins, x = [at for at, _ in begun], [x_BTD for _, x_BTD in begun]
    for i in range(config.layers):

        def block(n: int, one: Reading, i: int = i) -> None:
            if i < begins[n]:
                return
            keep(n, one, i)
            x[n] = one.block(config, parameters, i, x[n])

        each(parameters, readings, block)
    each(parameters, readings, leave)
    return x


# ------------------------------------------------------------------ of one batch


def final_states(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout
) -> Array:
    """What the head reads, (B, T, D) or pooled (B, 1, D); nothing is kept for a backward."""
    return transformer.forward(config, parameters, inputs, layout, FAST, lowest=config.layers)[0]


def nats(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, label_BT: Array, layout: Layout
) -> Array:
    """Nats of every labelled position, 0 elsewhere, (B, T) in the model's dtype."""
    final_BTD = final_states(config, parameters, inputs, layout)
    head = head_backward(config, parameters, final_BTD, label_BT, label_BT >= 0)
    return transformer.drain(head, lambda step: None).nats_BT


def layer_inputs(
    config: ModelConfig, parameters: Parameters, inputs: Inputs, layout: Layout, layers: list[str]
) -> dict[str, Array]:
    """The inputs (B, T, I) of the named layers, from one forward pass."""
    lowest = lowest_block(config, layers)
    final_BTD, trace = transformer.forward(config, parameters, inputs, layout, FAST, lowest)
    out: dict[str, Array] = {}
    for name in layers:
        if name in ("head", "patch"):
            out[name] = final_BTD if name == "head" else trace.inputs
            continue
        _, block, part, layer = name.split(".")
        kept = getattr(trace.blocks[int(block) - lowest], part)
        if layer == "down":
            out[name] = transformer.hidden_of(config, kept, FAST)
        else:
            out[name] = kept.context if layer == "o" else kept.a
    return out
