"""A sample of the audit's identities, proved on the user's model by ball arithmetic.

The work is planned to fit the time and the memory that are given: how many positions are read, and
which identities. What does not fit is named. The plan rests on how long a few products of balls
take on this machine, so that it is known before the work, and is no promise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import UndecidedError, bits, exact, require_flint
from refcurv.judge.bench import Bench
from refcurv.judge.enclosure import Enclosure, Few
from refcurv.judge.identities.proved import PROOFS
from refcurv.law.checks import Array, NonFiniteError, RefcurvError
from refcurv.law.conventions import NO_LABEL
from refcurv.law.words import number_of
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.progress import Progress, silent

GIB = 2**30

DIGITS: Final = 30
"""What is proved of two sides.  Chosen: twice float64's, so that no rounding of it can agree."""

WIDTHS: Final = (64, 32, 16, 8, 4, 2)
"""Positions that are read, the first number that fits.  Chosen: halves of the audit's."""

MOST_BITS: Final = 4096
"""Bits that are tried at most.  Chosen: a thousand digits are lost, and the proof is given up."""

BALL_BYTES: Final = 250
"""Of a ball: a Python object, FLINT's number, and the list that a product makes of it.  Chosen."""

PRODUCTS: Final = ("O9", "O14", "O15")
"""Identities that need derivatives along two directions: five sixths of the work."""

PASSES: Final[Mapping[str, float]] = {
    "O9": 10.0, "O14": 9.0, "O15": 9.0, "O33": 4.0, "O35": 4.0, "O39": 1.0, "O51": 1.0, "O52": 2.0,
    "O36": 1.0, "O18": 0.5, "O29": 0.5, "O38": 1.5, "O8": 0.5, "P4": 2.0,
}  # fmt: skip
"""Forward passes' worth of work that an identity adds to one forward and backward, which is 4."""


@dataclass(frozen=True, slots=True)
class Proved:
    """One identity on this model.

    Fields:
        id, statement: of the identity. verdict: "proved", "fail", "undecided" or "left out".
        digits: that are proved to agree, in the worst place; None where nothing was tried, and −∞
            where the two sides are proved to differ.
        where: that place, or why it was left out. places: how many were looked at.
        counted: from what the digits count there, "" for the terms of the identity.
    """

    id: str
    statement: str
    verdict: str
    digits: float | None
    where: str
    places: int
    counted: str = ""


@dataclass(frozen=True, slots=True)
class ProofPlan:
    """What fits.

    Fields: width, the positions of the first sequence that are read, 0 for none; ids, what is
    proved; seconds, the estimate; given, the seconds that it may take; bits, to begin with;
    left_out: id → why.
    """

    width: int
    ids: tuple[str, ...]
    seconds: float
    given: float
    bits: int
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        if not self.ids:
            return "certify: nothing fits the time and memory given"
        return (
            f"certify: to be proved are {len(self.ids)} of {len(PROOFS)} identities, over "
            f"{number_of(self.width, 'position')} at {self.bits} bits; it takes about "
            f"{self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True)
class Proofs:
    """What was proved. Fields: findings, in the order of PROOFS; plan; bits at the end; seconds."""

    findings: tuple[Proved, ...]
    plan: ProofPlan
    bits: int
    seconds: float

    @property
    def failed(self) -> tuple[str, ...]:
        """The ids of identities whose sides are proved to differ."""
        return tuple(f.id for f in self.findings if f.verdict == "fail")

    def to_json(self) -> dict[str, Any]:
        """Plain values; digits that are not finite become a text."""
        rows = [asdict(finding) for finding in self.findings]
        for row in rows:
            if row["digits"] is not None and not math.isfinite(row["digits"]):
                row["digits"] = "exact" if row["digits"] > 0 else "differ"
        plan = {**asdict(self.plan), "left_out": dict(self.plan.left_out)}
        return {
            "findings": rows,
            "plan": plan,
            "bits": self.bits,
            "seconds": round(self.seconds, 2),
        }


# ------------------------------------------------------------------ the plan


def plan_proofs(config: ModelConfig, positions: int, memory: float, seconds: float) -> ProofPlan:
    """What fits so many bytes and seconds.

    Raises MissingFlintError where python-flint is not installed.

    Proof: tests/test_proofs.py::test_what_does_not_fit_is_named
    """
    require_flint()
    precision = 132 + 36 * (config.layers + 1)  # thirty digits, and what was seen to be lost
    with bits(precision):
        cost = _Cost.measured()
    parameters = sum(math.prod(shape) for shape in config.parameter_shapes().values())
    widths, given = (
        _widths(config, positions),
        f"{memory / GIB:.1f} GiB and {seconds:g} s are given",
    )
    every = tuple(PROOFS)
    some = tuple(name for name in PROOFS if name not in PRODUCTS)
    for ids, copies in ((every, 8), (some, 4)):
        needed = copies * parameters * BALL_BYTES
        for width in widths if needed <= memory else ():
            estimate = _work(ids) * cost.of(config, parameters, width)
            if estimate <= seconds:
                why = f"derivatives along a direction need more: {given}"
                left = {name: why for name in every if name not in ids}
                return ProofPlan(width, ids, estimate, seconds, precision, left)
    least = _work(some) * cost.of(config, parameters, widths[-1])
    why = f"at least {needed / GIB:.1f} GiB and {least:.0f} s are needed: {given}"
    return ProofPlan(0, (), 0.0, seconds, precision, dict.fromkeys(every, why))


def _work(ids: tuple[str, ...]) -> float:
    """In forward passes: one forward and backward, and what the identities add."""
    return 4 + sum(PASSES.get(name, 0.0) for name in ids)


def _widths(config: ModelConfig, positions: int) -> list[int]:
    """The widths to try: images are read whole."""
    if config.image is not None:
        return [config.image.positions]
    return [min(positions, WIDTHS[0]), *(w for w in WIDTHS[1:] if w < positions)]


@dataclass(frozen=True, slots=True)
class _Cost:
    """Seconds.

    Fields: entry, for a number of a matrix that enters a product; multiply, for one of its
    multiplications; each, for a function of one number.
    """

    entry: float
    multiply: float
    each: float

    @classmethod
    def measured(cls) -> _Cost:
        """By products of balls of the size of a small layer's."""
        n, rows = 64, 64
        x = exact(np.linspace(0.1, 1, rows * n).reshape(rows, n))
        x = x / 3
        W = exact(np.linspace(-1, 1, n * n).reshape(n, n))
        one = min(_seconds(lambda: x[:1] @ W) for _ in range(3))
        all_rows = min(_seconds(lambda: x @ W) for _ in range(3))
        each = min(_seconds(lambda: x * x) for _ in range(3)) / math.prod(x.shape)
        return cls(one / n**2, max(all_rows - one, 0.0) / ((rows - 1) * n**2), each)

    def of(self, config: ModelConfig, parameters: int, width: int) -> float:
        """Of a forward over so many positions."""
        inner = config.heads * config.head_width
        block = 30 * config.width + 12 * config.mlp_width + 12 * inner + 10 * config.heads * width
        entries = width * (config.layers * block + 10 * config.vocabulary)
        return parameters * (self.entry + width * self.multiply) + entries * self.each


def _seconds(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# ------------------------------------------------------------------ the work


def prove(bench: Bench, plan: ProofPlan, progress: Progress = silent) -> Proofs:
    """Prove what is planned on the first sequence of an audit's batch.

    Definition
        Both sides of each identity are computed on balls. Where they do not overlap they differ:
        the identity is proved wrong. Where they do, the ball of their difference holds 0, and its
        reach tells how many digits of the terms agree for certain. Where these are fewer than
        thirty, more bits are taken.

    Proof: tests/test_proofs.py::test_every_identity_is_proved,
        ::test_a_wrong_factor_is_caught
    """
    begin, precision = time.perf_counter(), plan.bits
    found: dict[str, Proved] = {
        name: Proved(name, _statement(name), "left out", None, why, 0)
        for name, why in plan.left_out.items()
    }
    few = _few(bench, plan.width) if plan.ids else None
    left = list(plan.ids)
    while left and few is not None:
        with bits(precision):
            run = Enclosure(bench.config, bench.parameters, few, bench.seed)
            for done, name in enumerate(left):
                progress(done, len(left))
                found[name] = _finding(name, run)
            progress(len(left), len(left))
        left = [name for name in left if found[name].verdict == "undecided"]
        spent = time.perf_counter() - begin
        if not left or precision >= MOST_BITS or 3 * spent > plan.given:
            break  # twice the bits take about twice as long
        precision = min(MOST_BITS, 2 * precision)
    findings = tuple(found[name] for name in PROOFS)
    return Proofs(findings, plan, precision, time.perf_counter() - begin)


def _few(bench: Bench, width: int) -> Few:
    """The first positions of the first sequence, and their labels."""
    label, real = bench.batch.label_BT[:1], bench.real[:1]
    if bench.config.image is not None:
        layout = transformer.image_layout(bench.config, 1)
        return Few(exact(bench.batch.inputs[:1]), layout, label, np.ones(real.shape, bool))
    begin = int(np.argmax(label[0] >= 0))
    at = slice(0, max(width, begin + 1))
    label = label[:, at].copy()
    if width > 2 and (label[:, :-1] >= 0).any():
        label[:, -1] = NO_LABEL  # so that a position reaches no label
    segment = bench.batch.segment_BT[:1, at]
    layout = transformer.layout_of(bench.config, real[:, at], segment)
    kept = _reached(label, segment, bench.config.causal) & real[:, at]
    return Few(bench.batch.inputs[:1, at], layout, label, kept)


def _reached(label: Array, segment: Array, causal: bool) -> Array:
    """ROWS, entry by entry: does a labelled position of its segment see this one?"""
    T = label.shape[1]
    see = segment[0][:, None] == segment[0]
    if causal:
        see = see & (np.arange(T) >= np.arange(T)[:, None])
    return np.asarray((see & (label[0] >= 0)).any(axis=1)[None])


def _statement(name: str) -> str:
    return (PROOFS[name].__doc__ or "").partition("\n")[0]


def _finding(name: str, run: Enclosure) -> Proved:
    statement = _statement(name)
    try:
        places = list(PROOFS[name](run))
    except (UndecidedError, NonFiniteError) as error:  # balls too wide for a decision or a bound
        return Proved(name, statement, "undecided", 0.0, str(error), 0)
    except RefcurvError as error:
        if error.status != 2:  # the machine's fault: no finding
            raise
        return Proved(name, statement, "fail", None, str(error), 0)
    if not places:
        return Proved(name, statement, "left out", None, "does not occur here", 0)
    digits, where, counted = min((x.digits(run.scale), x.where, x.counted) for x in places)
    verdict = "proved" if digits >= DIGITS else "undecided"
    verdict = "fail" if digits == -math.inf else verdict
    return Proved(name, statement, verdict, digits, where, len(places), counted)
