"""A certificate with so many bits: every kind of number goes through every sequence in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from refcurv.algebra.balls import Balls, bits
from refcurv.algebra.blas import one_blas_thread
from refcurv.certified import blocks
from refcurv.certified.budgets import Shaking
from refcurv.certified.certificate import (
    BUDGETS,
    ROUTES,
    Certificate,
    Enclosed,
    Route,
    enclosed,
    farthest,
    outside,
    sizes,
)
from refcurv.certified.numbers import BALLS, Found, Kind, Task, floats, passes, run
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.certified.spectra import Proved, prove
from refcurv.certified.zeros import ID, unshifted
from refcurv.curvature.definition import Sequence
from refcurv.law.checks import Array, NonFiniteError
from refcurv.progress import Progress


@dataclass(slots=True)
class Job:
    """What is to be certified, and how far an attempt at it is.

    Fields: task; sequences, by their row in the corpus; digits, that are wanted; source, for the
    certificate; progress. done, steps of this attempt; overflowed, dtypes whose range is too small;
    zeros, arrays with entries that O32 makes 0.
    """

    task: Task
    sequences: Mapping[int, Sequence]
    digits: float
    source: Mapping[str, Any]
    progress: Progress
    done: int = 0
    overflowed: set[str] = field(default_factory=set)
    zeros: list[str] = field(default_factory=list)

    def at(self, precision: int) -> Certificate:
        """All that is wanted, with so many bits; no more than one sequence's balls are held.

        Proof: tests/test_certified.py::test_what_was_asked_for_is_there
        """
        self.done, self.zeros = 0, []
        numbers: dict[str, Enclosed] = {}
        errors: dict[tuple[str, str], tuple[float, float]] = {}
        shaking = Shaking(self.task, self._terms())
        with bits(precision):
            every = {kind.name: (kind, Found()) for kind in (BALLS, *map(floats, ROUTES))}
            for number, one in self.sequences.items():
                for kind, found in every.values():
                    self._run(kind, number, one, found)
                self._shake(shaking, number, one, every["float64"][1])
                self._keep(dict(_drained(every)), numbers, errors)
            shaking.means(every["float64"][1])
            means: dict[str, dict[str, Any]] = {
                name: {} if name in self.overflowed else dict(found.totals())
                for name, (_, found) in every.items()
            }
            self._keep(means, numbers, errors)
            rows, proved = dict(every["balls"][1].rows), Proved()
            if self._spectral:
                proved = prove(
                    self.task, means["balls"], means["float64"], every["balls"][1].terms, self._tick
                )
                for name, x in proved.arrays.items():
                    numbers[name] = enclosed(x, self.digits)
                for name, got in proved.floats.items():
                    errors[name, "float64"] = _far(got, numbers[name])
        size = sizes(numbers)
        routes = [
            _route(name, dtype, far, size[name], shaking) for (name, dtype), far in errors.items()
        ]
        source = {**self.source, **({"zeros": {ID: self.zeros}} if self.zeros else {})}
        return Certificate(
            numbers, tuple(routes), precision, self.digits, rows, source,
            proved.spectra, proved.cuts,
        )  # fmt: skip

    @property
    def _spectral(self) -> bool:
        """Are eigenvalues wanted?"""
        return bool({*SPECTRA} & {*self.task.of})

    def _terms(self) -> int:
        """The most terms that a sum over positions, sequences and backward passes has."""
        every = self.sequences.values()
        return sum(passes(self.task, one) * one.layout.first_BT.size for one in every)

    def _run(self, kind: Kind, number: int, one: Sequence, found: Found) -> None:
        with one_blas_thread():
            try:
                run(kind, self.task, number, one, found)
                if {*blocks.BLOCKS} & {*self.task.of}:
                    blocks.run(kind, self.task, number, one, found)
            except NonFiniteError:
                if kind is BALLS:
                    raise
                self.overflowed.add(kind.name)  # its range is too small: its error is infinite
        self._tick()

    def _shake(self, shaking: Shaking, number: int, one: Sequence, plain: Found) -> None:
        with one_blas_thread():
            shaking.sequence(number, one, plain)
        self._tick()

    def _tick(self) -> None:
        total = len(self.sequences) * (2 + len(ROUTES))
        total += 2 * len(self.task.wanted) if self._spectral else 0
        self.done += 1
        self.progress(min(self.done, total), total)

    def _keep(
        self,
        arrays: Mapping[str, Mapping[str, Any]],
        numbers: dict[str, Enclosed],
        errors: dict[tuple[str, str], tuple[float, float]],
    ) -> None:
        for name, x in arrays["balls"].items():
            assert isinstance(x, Balls)
            known, still = unshifted(self.task.config, name, x)
            self.zeros += [name] if still.any() else []
            numbers[name] = enclosed(known, self.digits)
            for dtype in ROUTES:
                got = arrays[dtype].get(name)
                errors[name, dtype] = _far(got, numbers[name])


def _far(got: Array | None, truth: Enclosed) -> tuple[float, float]:
    """The largest error, and the root of the squares' sum; infinite where floats overflowed."""
    return (math.inf, math.inf) if got is None else (farthest(got, truth), outside(got, truth))


def _route(name: str, dtype: str, far: tuple[float, float], size: float, shaking: Shaking) -> Route:
    """The errors of an array and their budgets, over what its digits are counted from."""
    error, spread = (x / size if size else math.inf if x else 0.0 for x in far)
    budgets = [shaking.budget(kind, name, dtype) for kind in BUDGETS]
    probable, worst = (None if x is None else x / (size or 1.0) for x in budgets)
    return Route(name, dtype, error, spread, probable, worst)


def _drained(every: Mapping[str, tuple[Kind, Found]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arrays of each kind, which it then no longer holds."""
    for name, (_, found) in every.items():
        yield name, found.arrays
        found.arrays = {}
