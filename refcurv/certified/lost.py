"""Where balls lose what they know: the operation of a forward, or the layer of a backward.

It is looked for where the limit of bits is reached, by one more pass that watches every result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from refcurv.algebra.balls import Balls, UndecidedError, bits
from refcurv.certified.numbers import BALLS, Task, inputs_of
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import NonFiniteError
from refcurv.model.layers import Ops
from refcurv.model.transformer import Tap, backward, drain, forward, head_transpose


class _Read(dict[str, Any]):
    """Parameters that remember which of them was read last."""

    last = "the input"

    def __getitem__(self, name: str) -> Any:
        self.last = name
        return super().__getitem__(name)


class _Lost(Exception):
    """Where it was."""


def place(task: Task, sequences: list[Sequence], precision: int) -> str:
    """Where a pass over the sequences first knows no digit, or cannot decide; "" if nowhere.

    Proof: tests/test_certified_limits.py::test_what_balls_lose_is_named,
        ::test_a_gradient_without_a_digit_is_named
    """
    with bits(precision):
        for one in sequences:
            try:
                _watched_pass(task, one)
            except _Lost as lost:
                return str(lost)
    return ""


def _watched_pass(task: Task, one: Sequence) -> None:
    config, label_N = task.config, one.label_BT.reshape(-1)
    theta = _Read({name: BALLS.number(x) for name, x in task.parameters.items()})
    ops = Ops(*(_watched(one.name, getattr(BALLS.ops, one.name), theta) for one in fields(Ops)))
    try:
        final, trace = forward(config, theta, inputs_of(BALLS, one), one.layout, ops)
    except NonFiniteError as error:
        raise _Lost(f"behind {theta.last!r}: {error}") from None
    steps: list[Any] = []
    head = head_transpose(
        config, theta, final, one.head_BT, lambda n, z: ops.cross_entropy(z, label_N[n])[1], ops
    )
    d_final = drain(head, steps.append)
    steps += backward(config, theta, d_final, trace, BALLS.ops)
    taps = [step for step in steps if isinstance(step, Tap) and isinstance(step.g, Balls)]
    known = [not _unknown(step.g) for step in taps]
    if taps and not known[-1]:  # a gradient that is 0 by theory lies above some that are not
        first = max((n + 1 for n, one in enumerate(known) if one), default=0)
        raise _Lost(f"in the backward, at the output gradient of {taps[first].name!r}")


def _watched(name: str, made: Callable[..., Any], theta: _Read) -> Callable[..., Any]:
    """A layer function that says where it is when its result is unknown."""

    def run(*args: Any, **more: Any) -> Any:
        where = f"in `{name}` behind {theta.last!r}"
        try:
            out = made(*args, **more)
        except UndecidedError as error:
            why = str(error).removeprefix("certify: ").removesuffix(": more bits are needed.")
            raise _Lost(f"{where}: {why}") from None
        result = out[0] if isinstance(out, tuple) else out
        if isinstance(result, Balls) and _unknown(result):
            raise _Lost(where)
        return out

    return run


def _unknown(x: Balls) -> bool:
    """Has an entry no bound, or may all of them be 0 though none is known to be?"""
    if not x.finite().all():
        return True
    return bool(x.radii().max(initial=0.0) > 0 and not x.least().max(initial=0.0))
