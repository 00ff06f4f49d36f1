"""How many bits a certificate needs: planned from what one block and two of a forward lose."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from refcurv.algebra.balls import UndecidedError, bits, exact
from refcurv.certified.numbers import BALLS, Task, inputs_of
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import NonFiniteError
from refcurv.model.transformer import forward, head_logits

SPARE: Final = 32
"""Bits beyond those that are planned.  Chosen: ten digits, for what grows faster than planned."""

LOST: Final[Mapping[str, float]] = {
    "logits": 1.0, "nats": 1.0, "A": 1.0, "gradient": 2.0, "G": 2.0, "hvp": 3.0, "ggnvp": 2.5,
    "eigenvalues": 2.0, "eigenvectors": 2.0, "cut": 2.0, "edit": 2.0,
    "hessian": 3.0, "ggn": 2.5, "fisher": 2.0,
}  # fmt: skip
"""How many times the digits of a forward each quantity loses.  Chosen: what was seen; a plan that
falls short is made again, from what was seen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bits for what is wanted, and what says so.

    Fields: bits; lost, in a whole forward; precision and seconds of the forwards through one block
    and through two.
    """

    bits: int
    lost: float
    precision: int
    seconds: tuple[float, ...]


def planned(task: Task, one: Sequence, digits: float, most: int) -> Plan:
    """Bits for so many digits, from what one block and two blocks of a forward lose.

    Proof: tests/test_certified_limits.py::test_estimates_grow_with_what_is_asked_for
    """
    precision, blocks = min(128, most), task.config.layers
    while True:
        runs = [_lost(task, one, depth, precision) for depth in range(1, min(blocks, 2) + 1)]
        lost, seconds = zip(*runs, strict=True)
        if all(x < precision for x in lost):
            break
        if precision >= most:
            return Plan(most, math.inf, precision, seconds)
        precision = min(most, 2 * precision)
    growth = max(lost[-1] - lost[0], 1.0) if len(lost) > 1 else lost[0]
    whole = lost[0] + growth * (blocks - 1)
    return Plan(min(most, bits_for(task.of, whole, digits)), whole, precision, seconds)


def bits_for(of: tuple[str, ...], lost: float, digits: float) -> int:
    """Bits for so many digits, of which a forward loses so many bits.

    Proof: tests/test_certified_limits.py::test_estimates_grow_with_what_is_asked_for
    """
    return math.ceil(digits * math.log2(10) + max(LOST[name] for name in of) * lost) + SPARE


def _lost(task: Task, one: Sequence, depth: int, precision: int) -> tuple[float, float]:
    """Bits of the largest number that so many blocks are unsure of, and their seconds."""
    with bits(precision):
        final, seconds, _ = shallow(task, one, depth)
        if final is None:
            return math.inf, seconds
        radius, size = final.radii().max(), final.least().max()
    if not size or not math.isfinite(radius):
        return math.inf, seconds
    lost = math.log2(radius) - math.log2(size) if radius else -math.inf
    return max(precision + lost, 0.0), seconds


def shallow(
    task: Task, one: Sequence, depth: int, *, head: bool = False
) -> tuple[Any, float, float]:
    """What the head reads behind so many blocks, None without a bound; seconds, and the head's.

    Proof: tests/test_certified_limits.py::test_estimates_grow_with_what_is_asked_for
    """
    blocks = {name: getattr(task.config, name)[:depth] for name in ("windows", "rotary")}
    few = replace(task.config, layers=depth, **blocks)
    names = few.parameter_shapes()
    theta: Any = {name: exact(task.parameters[name]) for name in names}
    inputs = inputs_of(BALLS, one)
    begin = time.perf_counter()
    final: Any = None
    try:
        final, _ = forward(few, theta, inputs, one.layout, BALLS.ops)
    except (UndecidedError, NonFiniteError):
        head = False
    middle = time.perf_counter()
    if head:
        head_logits(few, theta, final, BALLS.ops)
    return final, middle - begin, time.perf_counter() - middle
