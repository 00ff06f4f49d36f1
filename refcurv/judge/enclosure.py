"""One sequence run on balls, once, with all that flows through it: what certified identities read.

It is `judge.bench` over balls: the same transformer, norms, keys' gradients and MLPs recorded on
the way. Identities are then proved on what was recorded, by formulas of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from refcurv.algebra.balls import exact, zeros
from refcurv.algebra.duals import Duals
from refcurv.certified.directions import signs_of
from refcurv.certified.layers import BALLS
from refcurv.certified.numbers import gradient
from refcurv.judge.bench import watching_norms
from refcurv.law.checks import Array
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.gradient import slope_of
from refcurv.model.layers import Layout, Ops, Saved
from refcurv.model.transformer import Cotangent, Slope, Tap

Numbers = Any
"""Balls, or dual balls."""


@dataclass(frozen=True, slots=True)
class Few:
    """What is read. Fields: inputs; layout; label_BT; reached_BT, the rows that reach a label."""

    inputs: Any
    layout: Layout
    label_BT: Array
    reached_BT: Array


@dataclass(frozen=True, slots=True)
class Flow:
    """Forward and backward.

    Fields:
        final: what the head reads. trace: what a backward reads.
        logits: of the labelled rows, (N, V). nats: theirs.
        taps: layer → a and g; the head's are its labelled rows. gradient: by parameter.
        norms: (x, gain, d_y, d_x) of every norm, from the top.
        keys: block → gradient of its rotated keys, (B, T, K, E).
    """

    final: Numbers
    trace: transformer.Trace
    logits: Numbers
    nats: Numbers
    taps: Mapping[str, Tap]
    gradient: Mapping[str, Numbers]
    norms: tuple[tuple[Numbers, Numbers, Numbers, Numbers], ...]
    keys: Mapping[int, Numbers]


@dataclass(slots=True)
class _Log:
    norms: list[tuple[Numbers, Numbers, Numbers, Numbers]] = field(default_factory=list)
    keys: list[Numbers] = field(default_factory=list)


def _watched(log: _Log) -> Ops:
    """The layer functions over balls, recording norms and keys' gradients."""

    def attention_backward(d_context: Numbers, saved: Saved) -> tuple[Numbers, Numbers, Numbers]:
        made = BALLS.attention_backward(d_context, saved)
        log.keys.append(made[1])
        return made

    ops = watching_norms(BALLS, lambda *call: log.norms.append(call))
    return replace(ops, attention_backward=attention_backward)


def flow(config: ModelConfig, theta: Mapping[str, Numbers], few: Few) -> Flow:
    """Run forward and backward of the loss."""
    log = _Log()
    ops = _watched(log)
    final, trace = transformer.forward(config, theta, few.inputs, few.layout, ops)
    labelled, label_N = few.label_BT >= 0, few.label_BT.reshape(-1)
    seen: list[Numbers] = []

    def sent(row_N: Array, z_NV: Numbers) -> Numbers:
        nats_N, d_NV = ops.cross_entropy(z_NV, label_N[row_N])
        seen.append((z_NV, nats_N))
        return d_NV

    steps: list[Tap | Slope] = []
    head = transformer.head_transpose(config, theta, final, labelled, sent, ops)
    d_final = transformer.drain(head, steps.append)
    steps += transformer.backward(config, theta, d_final, trace, ops)
    taps = {step.name: step for step in steps if isinstance(step, Tap)}
    ((logits, nats),) = seen
    keys = {config.layers - 1 - n: one for n, one in enumerate(log.keys)}
    slopes = gradient(config, theta, steps)
    return Flow(final, trace, logits, nats, taps, slopes, tuple(log.norms), keys)


@dataclass(frozen=True, eq=False)
class Enclosure:
    """What certified identities read; a run is made when one first asks for it.

    Fields: config; parameters, floats; few; seed, of the directions.
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    few: Few
    seed: int = 0
    _along: dict[int, Flow] = field(default_factory=dict, repr=False)

    @cached_property
    def theta(self) -> dict[str, Numbers]:
        """The parameters, exactly."""
        return {name: exact(x) for name, x in self.parameters.items()}

    @cached_property
    def plain(self) -> Flow:
        """Forward and backward."""
        return flow(self.config, self.theta, self.few)

    @cached_property
    def without_eps(self) -> Flow:
        """The same where no norm has an eps."""
        return flow(replace(self.config, norm_eps=0.0), self.theta, self.few)

    @cached_property
    def scale(self) -> float:
        """The largest output gradient of the head: what a gradient counts beside that may be 0."""
        slopes: Numbers = self.plain.taps["head"].g
        return float(slopes.least().max())

    def direction(self, number: int) -> dict[str, Numbers]:
        """A sign for each entry of each parameter (SAMPLING)."""
        return {n: exact(v) for n, v in signs_of(self.parameters, self.seed, number).items()}

    def moved(self, number: int) -> dict[str, Numbers]:
        """The parameters with a derivative along a direction."""
        v = self.direction(number)
        return {name: Duals(x, v[name]) for name, x in self.theta.items()}

    def along(self, number: int) -> Flow:
        """Forward and backward with derivatives along a direction."""
        if number not in self._along:
            self._along[number] = flow(self.config, self.moved(number), self.few)
        return self._along[number]

    def steps(
        self, theta: Mapping[str, Numbers], made: Flow, label_BT: Array, sent: Cotangent
    ) -> Iterator[Tap | Slope]:
        """The backward of another cotangent at the labelled rows, the head first, as it is read."""
        ops = _watched(_Log())  # as the forward was
        head = transformer.head_transpose(self.config, theta, made.final, label_BT >= 0, sent, ops)
        tops: list[Tap | Slope] = []
        d_final = transformer.drain(head, tops.append)
        yield from tops
        yield from transformer.backward(self.config, theta, d_final, made.trace, ops)

    def final(self, inputs: Any, layout: Layout) -> Numbers:
        """What the head reads of other inputs, or in another layout."""
        lowest = self.config.layers
        return transformer.forward(self.config, self.theta, inputs, layout, BALLS, lowest)[0]

    def head_along(self, X: Numbers) -> Numbers:
        """H X, X of the head's weight: the derivative of its gradient along X, (V, D).

        What the head reads does not change.
        """
        weight, final = self.config.weight_of("head"), self.plain.final
        theta = {**self.theta, weight: Duals(self.theta[weight], X)}
        still: Numbers = Duals(final, zeros(final.shape))
        label_N = self.few.label_BT.reshape(-1)
        steps: list[Tap | Slope] = []
        head = transformer.head_transpose(
            self.config, theta, still, self.few.label_BT >= 0,
            lambda row_N, z: BALLS.cross_entropy(z, label_N[row_N])[1], BALLS,
        )  # fmt: skip
        transformer.drain(head, steps.append)
        slope: Numbers = next(slope_of(self.config, one)[1] for one in steps)
        return slope.derivative
