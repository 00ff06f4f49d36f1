"""What a certificate takes in seconds and bytes, said before the work, and what of it would fit.

The forwards that planned the bits say how long a block takes, and one more through one block how
much slower the planned bits are. What each quantity takes is counted in forwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from refcurv.algebra.balls import bits, exact
from refcurv.certified.blocks import BLOCKS, weights
from refcurv.certified.certificate import enclosed
from refcurv.certified.numbers import Task, passes
from refcurv.certified.planning import Plan, bits_for, shallow
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.certified.spectra import with_moments
from refcurv.curvature.definition import Sequence
from refcurv.curvature.room import available
from refcurv.law.checks import RangeError, RoomError
from refcurv.law.conventions import Fisher
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig
from refcurv.progress import span

BACKWARD, OUTER, DUAL, FLOATS = 1.1, 1.3, 3.2, 1.35
"""In forwards: a backward, the gradients of all weights, a pass along a direction; and all of it
with what floats take.  Chosen: what was seen of the shipped model."""

EIGENVALUES, EDIT = 20, 6
"""Products of (d, d) matrices for eigenvalues, and for W'.  Chosen: five steps of refinement."""

SAMPLE: Final = 500
"""Numbers by which it is measured how long they take to read and to write.  Chosen: 10 ms."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a certificate will take, as far as can be told before.

    Fields: bits; seconds; memory in bytes; sequences, how many; passes, the backwards of one
    sequence for the labels of FISHER, 0 without; each, seconds of each quantity alone; shorter,
    {digits: seconds} of fewer digits.
    """

    bits: int
    seconds: float
    memory: float
    sequences: int
    passes: int
    each: Mapping[str, float]
    shorter: Mapping[int, float]

    @property
    def text(self) -> str:
        """In one line."""
        said = f"{self.bits:,} bits: about {span(self.seconds)} and {self.memory / 2**30:.1f} GiB"
        if self.passes > 1:
            said += f"; {self.passes:,} backward passes a sequence, V for each label"
        return said

    def fits(self, seconds: float) -> str:
        """What of it would take no longer."""
        some = int(self.sequences * seconds / self.seconds)
        names = [name for name, one in self.each.items() if one <= seconds]
        fewer = [n for n, one in self.shorter.items() if one <= seconds]
        ways = [f"{some:,} of the {number_of(self.sequences, 'sequence')}"] if some else []
        ways += [f"{', '.join(names)} alone"] if names and len(self.each) > 1 else []
        ways += [f"{max(fewer)} digits"] if fewer else []
        return ("; or ".join(ways) or "nothing of it") + "."


def require_time(found: Estimate, seconds: float) -> None:
    """Raise RangeError for what would take longer, saying what would not.

    Proof: tests/test_certified_limits.py::test_what_takes_too_long_is_refused_before_the_work
    """
    if found.seconds > seconds:
        raise RangeError(
            f"certify: it would take about {span(found.seconds)} with {found.bits:,} bits, more "
            f"than the {span(seconds)} given. What would fit: {found.fits(seconds)}"
        )


def require_memory(
    task: Task, sequences: Mapping[int, Sequence], plan: Plan, digits: float
) -> None:
    """Raise RoomError for what would need more memory than there is.

    Proof: tests/test_certified_limits.py::test_what_does_not_fit_is_refused_before_the_work
    """
    free, wanted = available(), _memory(task, sequences, plan.bits, digits)
    if free is not None and wanted > free:
        raise RoomError(
            f"certify: it would need about {wanted / 2**30:.1f} GiB with {plan.bits:,} bits; "
            f"{free / 2**30:.1f} GiB are free. Ask for fewer quantities at a time, or fewer digits."
        )


@dataclass(frozen=True, slots=True)
class _Pace:
    """Seconds of a forward through the whole model, and of a number that is read, or written."""

    forward: float
    read: float
    write: float

    def seconds(self, task: Task, sequences: Mapping[int, Sequence], of: tuple[str, ...]) -> float:
        """Of all that `of` takes."""
        one = next(iter(sequences.values()))
        size = sum(x.size for x in task.parameters.values())
        held = size * (1 + 2 * len({"hvp", "ggnvp", *BLOCKS} & {*of}))
        each = self.forward * FLOATS * _forwards(task, one, of) + self.read * held
        each += self.write * _numbers(task, of, one.label_BT.size)
        once = self.write * _numbers(task, of, shared=True)
        once += self.forward * _spectra(task, of, one.layout.first_BT.size)
        return once + len(sequences) * each


def estimated(task: Task, sequences: Mapping[int, Sequence], plan: Plan, digits: float) -> Estimate:
    """What all of it will take, by one more forward through a block, with the planned bits.

    Proof: tests/test_certified_limits.py::test_an_estimate_is_near_what_it_takes
    """
    one, (first, *more) = next(iter(sequences.values())), plan.seconds
    block = max(more[0] - first, first / 4) if more else first  # a busy machine may hide it
    with bits(plan.bits):
        _, now, head = shallow(task, one, 1, head=True)
        read, write = _per_number(task, digits)
    fast = first + block * (task.config.layers - 1)  # with the bits of the plan's forwards
    slow = fast * now / first if first else fast

    def pace(n: float) -> _Pace:
        """With the bits of n digits, on a line between the two that ran."""
        wanted = max(min(bits_for(task.of, plan.lost, n), plan.bits), plan.precision)
        share = (plan.bits - wanted) / max(plan.bits - plan.precision, 1)
        return _Pace(slow + share * (min(fast, slow) - slow) + head, read, write)

    known = math.isfinite(plan.lost)
    own = pace(digits) if known else _Pace(slow + head, read, write)
    return Estimate(
        plan.bits,
        own.seconds(task, sequences, task.of),
        _memory(task, sequences, plan.bits, digits),
        len(sequences),
        passes(task, one) if {"G", "fisher"} & {*task.of} else 0,
        {name: own.seconds(task, sequences, (name,)) for name in task.of},
        {
            n: pace(n).seconds(task, sequences, task.of)
            for n in range(1, math.ceil(digits) if known else 1)
        },
    )


def _per_number(task: Task, digits: float) -> tuple[float, float]:
    """Seconds for one number of a parameter to become a ball, and of a ball to become floats."""
    x = max(task.parameters.values(), key=lambda x: x.size).reshape(-1)[:SAMPLE]
    begin = time.perf_counter()
    balls = exact(x)
    middle = time.perf_counter()
    enclosed(balls / 3, digits)
    return (middle - begin) / len(x), (time.perf_counter() - middle) / len(x)


def _forwards(task: Task, one: Sequence, of: tuple[str, ...]) -> float:
    """The passes that one sequence takes, in forwards."""
    asked, own = {*with_moments(of)}, task.fisher is Fisher.EMPIRICAL
    size = sum(task.parameters[name].size for name in weights(task.config, task.wanted))
    every = task.config.linear_layers()
    squares = np.square([every[name] for name in task.wanted]).sum(axis=0)
    G, A = (OUTER * squares / sum(d_out * d_in for d_out, d_in in every.values())).tolist()
    whole = BACKWARD + OUTER
    out = 1.0 if asked & {"logits", "nats", "gradient", "A", "G"} else 0.0
    out += BACKWARD if asked & {"gradient", "A"} or (own and "G" in asked) else 0.0
    out += OUTER if "gradient" in asked else 0.0
    out += A if "A" in asked else 0.0
    out += G if own and "G" in asked else 0.0
    out += passes(task, one) * (BACKWARD + G) if "G" in asked and not own else 0.0
    out += DUAL if asked & {"hvp", "ggnvp"} else 0.0
    out += DUAL * whole if "hvp" in asked else 0.0
    out += 1 + whole if "ggnvp" in asked else 0.0
    out += size * DUAL * (1 + whole) if "hessian" in asked else 0.0
    out += size * DUAL if "ggn" in asked else 0.0
    out += 1 + passes(task, one) * whole if "fisher" in asked else 0.0
    return out + (1.0 if task.fisher is Fisher.SAMPLED else 0.0)  # the labels beside the balls'


def _spectra(task: Task, of: tuple[str, ...], positions: int) -> float:
    """Products of matrices for eigenvalues and W', in forwards, whose products are of positions."""
    if not {*SPECTRA} & {*of}:
        return 0.0
    every = task.config.linear_layers()

    def cubes(names: Iterable[str]) -> int:
        return sum(d_out**3 + d_in**3 for d_out, d_in in (every[name] for name in names))

    products = EIGENVALUES * cubes(task.wanted) + EDIT * cubes(task.rho if "edit" in of else ())
    return products / (positions * sum(d_out * d_in for d_out, d_in in every.values()))


def _numbers(task: Task, of: tuple[str, ...], positions: int = 0, *, shared: bool = False) -> int:
    """How many numbers come out: of one sequence, or those that all sequences share."""
    config = task.config
    size = sum(x.size for x in task.parameters.values())
    wide = [shape for name, shape in config.linear_layers().items() if name in task.wanted]
    parted = [shape for name, shape in config.linear_layers().items() if name in task.rho]
    dense = sum(task.parameters[name].size ** 2 for name in weights(config, task.wanted))
    own: dict[str, Callable[[], int]] = {
        "logits": lambda: positions * config.vocabulary, "nats": lambda: positions,
        "gradient": lambda: size, "hvp": lambda: size, "ggnvp": lambda: size,
    }  # fmt: skip
    joint: dict[str, Callable[[], int]] = {
        "A": lambda: sum(n * n for _, n in wide), "G": lambda: sum(n * n for n, _ in wide),
        "eigenvalues": lambda: sum(n + m for n, m in wide),
        "eigenvectors": lambda: sum(n * n + m * m for n, m in wide),
        "cut": lambda: sum(n for n, _ in parted), "edit": lambda: sum(n * m for n, m in parted),
        **dict.fromkeys(BLOCKS, lambda: dense),
    }  # fmt: skip
    asked = with_moments(of)
    return sum(made() for name, made in (joint if shared else own).items() if name in asked)


def _memory(task: Task, sequences: Mapping[int, Sequence], precision: int, digits: float) -> float:
    """Bytes: balls of the parameters, of a pass and of what comes out, and all that is kept."""
    config, one = task.config, next(iter(sequences.values()))
    plain, ball = 72, 88 + precision / 8  # an exact float64 lies in the ball; more bits do not
    floats = 4 + 8 + 16
    size = sum(x.size for x in task.parameters.values())
    duals = 3 if {"hvp", "ggnvp", "hessian", "ggn"} & {*task.of} else 1
    out = _numbers(task, task.of, one.label_BT.size)
    joint = _numbers(task, task.of, shared=True)
    kept = 8 * (math.ceil((digits + 2) * math.log2(10) / 53) + 1)
    held = size * (plain * duals + 2 * floats) + (out + joint) * (ball + floats)
    held += kept * (len(sequences) * out + joint)
    return held + duals * _activations(config, one.layout.first_BT.shape[1]) * ball


def _activations(config: ModelConfig, T: int) -> float:
    """Numbers that a forward keeps for its backward."""
    heads = config.heads * config.head_width
    wide = 8 * config.width + 6 * heads + 5 * config.mlp_width
    return float(T * (config.layers * (wide + 3 * config.heads * T) + 2 * config.vocabulary))
