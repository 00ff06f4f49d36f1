"""`certify`: numbers of a model on a corpus, each with a proved radius, beside what floats give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import Balls, UndecidedError, bits, require_flint
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
from refcurv.certified.directions import direction_of, said_of
from refcurv.certified.estimate import Estimate, estimated, require_memory, require_time
from refcurv.certified.labels import drawn
from refcurv.certified.lost import place
from refcurv.certified.numbers import BALLS, OF, Found, Kind, Task, floats, run
from refcurv.certified.origin import files_of
from refcurv.certified.planning import SPARE, planned
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.certified.spectra import Proved, prove, shares
from refcurv.curvature import definition
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    require_choice,
    require_dtype,
    require_finite,
    require_range,
    require_shape,
)
from refcurv.law.conventions import Fisher
from refcurv.model.corpus import Corpus
from refcurv.model.fisher import labelled, require_fisher
from refcurv.model.given import (
    is_iterable,
    numbers_of,
    require_callable,
    require_corpus,
    require_model,
)
from refcurv.model.patterns import expand
from refcurv.model.rows import require_rows
from refcurv.model.weights import Model, resident
from refcurv.progress import Progress, silent

MOST_BITS: Final = 2**14
"""Bits that are tried at most.  Chosen: 3,000 digits are lost on the way, or none will do."""

MOST_DIGITS: Final = 200
"""Digits that are certified at most: a float64 radius is 5e-324 or more.  Chosen: which leaves a
hundred for numbers that are small themselves."""

EVERY: Final = (*OF, *SPECTRA, *blocks.BLOCKS)
"""What can be certified."""


def certify(
    model: Model,
    corpus: Corpus,
    of: Sequence[str] = ("logits", "nats", "gradient", "A", "G"),
    *,
    digits: float = 30,
    sequences: Iterable[int] = (0,),
    layers: str = "**",
    rows: str = "reached",
    fisher: str = "empirical",
    seed: int = 0,
    direction: Mapping[str, Array] | None = None,
    rho: float | Mapping[str, float] | None = None,
    seconds: float | None = None,
    estimate: Callable[[Estimate], object] | None = None,
    progress: Progress = silent,
) -> Certificate:
    """Enclose what the model's real numbers give, and put beside it what floats give.

    Definition
        The parameters as they are stored, the inputs and the numbers of the configuration are
        exact. Every function of them is the real one, and every operation is one of balls, whose
        radius holds all that was lost. So each number lies within its radius: that is proved by
        the computation, whatever the number is. There is one transformer: it runs here on balls,
        and beside it on float64, float32 and longdouble.

    Args:
        model: its parameters as they are stored.
        corpus: texts or images.
        of: of "logits", "nats", "gradient" (of every parameter), "A" and "G" (over all
            `sequences`), "hvp" and "ggnvp" (H v and GGN v of a sequence's loss); "eigenvalues" and
            "eigenvectors" of A and G (of a cluster one orthonormal basis, of many), "cut" (how many
            pairs of each row are kept, SELECT on the real numbers) and "edit" (W'), which bring A,
            G and eigenvalues; and, of weights with at most 1,024 entries, the dense "hessian",
            "ggn" and "fisher" (sums over `sequences`, as `exact` has them).
        digits: how many digits of each array's largest entry are to be certain in every entry; 200
            at most. Arrays so small that float64 has no radius for them have fewer.
        sequences: rows of the corpus.
        layers: a pattern of linear layers, for A, G and the dense blocks.
        rows: which positions are rows of A and G (ROWS).
        fisher: whose labels G and the dense Fisher have: "empirical", "sampled", "expected" or
            "signed" (FISHER). Drawn labels are those of float64 (SAMPLING); the certificate's
            source says which, and of which the real numbers draw the same.
        seed: of what is drawn.
        direction: v of the products, {parameter: array}; left out, it is `signs(0, 0, i, 0, ·)` of
            SAMPLING for parameter number i.
        rho: of "cut" and "edit": a share for all `layers`, or {pattern: share}. A cut that leaves
            pairs undecided gives neither counts nor W'; `cuts` says how many they are.
        seconds: what would take longer is refused before the work, with what would not.
        estimate: called with the `Estimate` before the work.
        progress: called with (done, all); one for each sequence and kind of number.

    Returns:
        Certificate: {name: Enclosed}, and the errors of the floats.

    Raises:
        MissingFlintError: python-flint is not installed. UndecidedError: balls cannot make a
        decision (a ReLU at 0, a clip at its bound) with MOST_BITS. NonFiniteError: a parameter is
        no number, or with MOST_BITS balls still have no bound. RoomError: too little memory.
        ConventionError, RangeError, NameUnknownError, DTypeError, EmptyError: what cannot be asked
        for, or takes too long.

    Cost: for one sequence of 64 tokens and a million parameters about five seconds at 300 bits
        for a gradient, three times that for a product; memory for the balls of all parameters.
        Labels that are `expected` take V backward passes each, a dense block a pass a column.
        For eigenvalues of a (d, d) some twenty products of such matrices, for W' six more.
    Source: METHOD, Certificates.
    Proof: tests/test_certified.py::test_a_twin_of_every_family_is_certified,
        ::test_more_bits_give_smaller_balls_inside
    """
    require_flint()
    require_model("certify", model)
    require_corpus("certify", corpus)
    kind = require_fisher("certify", fisher, seed, 1)
    require_callable("certify", "progress", progress)
    if estimate is not None:
        require_callable("certify", "estimate", estimate)
    task = _task(model, of, layers, kind, int(seed), direction, rho)
    wanted = require_range("certify", "digits", digits, 1, MOST_DIGITS)
    most = None if seconds is None else require_range("certify", "seconds", seconds, 0, math.inf)
    chosen = _sequences(model, corpus, rows, sequences)
    _require_rows(task, chosen, rows)
    plan = planned(task, next(iter(chosen.values())), wanted, MOST_BITS)
    if most is not None or estimate is not None:
        told = estimated(task, chosen, plan, wanted)
        if estimate is not None:
            estimate(told)
        require_time(told, math.inf if most is None else most)
    require_memory(task, chosen, plan, wanted)
    source = {
        "inputs": files_of(model, task.parameters, corpus), "sequences": list(chosen),
        "rows": rows,
        "direction": said_of(task.direction, direction) if {"hvp", "ggnvp"} & {*task.of} else None,
    }  # fmt: skip
    task, labels = _labelled(task, chosen)
    total = len(chosen) * (2 + len(ROUTES)) + task.spectral * 2 * len(task.wanted)
    job = _Job(task, chosen, wanted, source | labels, progress, total)
    with np.errstate(all="ignore"):  # what floats make of it is said by their error
        return _with_enough(job, plan.bits)


def _with_enough(job: _Job, precision: int) -> Certificate:
    """The certificate, with more bits until they do, or MOST_BITS are reached."""
    while True:
        try:
            found = replace(job, overflowed=set()).at(precision)
        except (UndecidedError, NonFiniteError) as error:  # balls overlap, or have no bound
            if precision >= MOST_BITS:
                where = place(job.task, [*job.sequences.values()], precision) or f"({error})"
                said = f"certify: with {precision:,} bits balls still know too little {where}."
                raise type(error)(said) from None
            precision = min(MOST_BITS, 2 * precision)
            continue
        short = job.digits - found.digits
        if short <= 0 or _narrowest(found):
            return found
        if precision >= MOST_BITS:
            return found if found.digits else _saying_where(job, found)
        lost = math.ceil(short * math.log2(10)) if found.digits else precision
        precision = min(MOST_BITS, precision + lost + SPARE)


def _saying_where(job: _Job, found: Certificate) -> Certificate:
    """The certificate, some array of which has no digit, with the place where they are lost."""
    size = sizes(found)
    where = place(job.task, [*job.sequences.values()], found.bits)
    where = where or f"in {next(n for n, one in found.items() if not one.digits(size[n]))}"
    return replace(found, source={**found.source, "lost": where})


def _labelled(task: Task, chosen: Mapping[int, definition.Sequence]) -> tuple[Task, dict[str, Any]]:
    """The labels that SAMPLING draws, where they are needed, and what the source says of them."""
    if not {"G", "fisher"} & {*task.of}:
        return task, {}
    if task.fisher is not Fisher.SAMPLED:
        seed = {"seed": task.seed} if task.fisher is Fisher.SIGNED else {}
        return task, {"fisher": str(task.fisher), **seed}
    found = drawn(task, chosen, MOST_BITS)
    said = {"fisher": str(task.fisher), "seed": task.seed, "labels": found.to_json()}
    return replace(task, drawn=found.law), said


def _require_rows(task: Task, chosen: Mapping[int, definition.Sequence], rows: str) -> None:
    """Raise EmptyError for A and G that have no row."""
    if not {"A", "G"} & {*task.of}:
        return
    if not any(one.keep_BT.any() for one in chosen.values()):
        raise EmptyError("certify: A and G of these sequences have no row (ROWS).")
    if rows == "cls" and "patch" in task.wanted:
        raise EmptyError("certify: 'patch' has no row among rows='cls'. Take rows='all' for it.")


def _narrowest(found: Certificate) -> bool:
    """Is each array that lacks digits so small that float64 has no smaller radius for it?"""
    size = sizes(found)
    lacking = [x for name, x in found.items() if x.digits(size[name]) < found.wanted]
    return all(x.radius.max() == np.finfo(np.float64).smallest_subnormal for x in lacking)


def _task(
    model: Model,
    of: Sequence[str],
    layers: str,
    fisher: Fisher,
    seed: int,
    direction: Mapping[str, Array] | None,
    rho: float | Mapping[str, float] | None,
) -> Task:
    names = tuple(of) if is_iterable(of) and not isinstance(of, str) else ()
    if not names:
        raise ConventionError(f"certify: `of` must name some of {', '.join(EVERY)}; got {of!r}.")
    for name in names:
        require_choice("certify", "of", name, EVERY)
    wanted = tuple(expand(layers, list(model.config.linear_layers())))
    if {*blocks.BLOCKS} & {*names}:
        blocks.require_small(model.config, wanted)
    parameters = _parameters(model)
    v, kept = direction_of(parameters, direction), shares(model.config, names, wanted, rho)
    if {*SPECTRA} & {*names}:
        names = tuple(dict.fromkeys((*names, "A", "G")))
    return Task(model.config, parameters, names, wanted, v, fisher, seed, rho=kept)


def _parameters(model: Model) -> dict[str, Array]:
    """Float16, float32 or float64, of the shapes that the configuration asks for, and finite."""
    parameters, shapes = resident(model), model.config.parameter_shapes()
    for name, x in parameters.items():
        require_shape("certify", name, x, shapes[name], "the configuration's")
        require_dtype("certify", name, x, "f", "floats")
        if x.dtype.itemsize > 8:
            raise DTypeError(f"certify: {name} is {x.dtype}; float64 is the widest. Round it.")
        require_finite("certify", name, x)
    return parameters


def _sequences(
    model: Model, corpus: Corpus, rows: str, wanted: Iterable[int]
) -> dict[int, definition.Sequence]:
    """The sequences by their row in the corpus."""
    law = require_rows("certify", model.config, rows)
    numbers = list(dict.fromkeys(numbers_of("certify", corpus, wanted)))
    every = enumerate(definition.sequences(model.config, corpus, law))
    found = dict(islice(((n, one) for n, one in every if n in numbers), len(numbers)))
    return {n: found[n] for n in numbers}


@dataclass(slots=True)
class _Job:
    """One attempt at a certificate."""

    task: Task
    sequences: Mapping[int, definition.Sequence]
    digits: float
    source: Mapping[str, Any]
    progress: Progress
    total: int
    done: int = 0
    overflowed: set[str] = field(default_factory=set)

    def at(self, precision: int) -> Certificate:
        """All that is wanted, with so many bits; no more than one sequence's balls are held."""
        numbers: dict[str, Enclosed] = {}
        errors: dict[tuple[str, str], tuple[float, float]] = {}
        shaking = Shaking(self.task, self._rows())
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
            rows = {name: n for name, n in every["balls"][1].rows.items()}
            proved = Proved()
            if self.task.spectral:
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
        return Certificate(
            numbers, tuple(routes), precision, self.digits, rows, self.source,
            proved.spectra, proved.cuts,
        )  # fmt: skip

    def _rows(self) -> int:
        """The most terms that a sum over positions, sequences and backward passes has."""
        every, passes = self.sequences.values(), 1
        if self.task.fisher is Fisher.EXPECTED:
            passes = self.task.config.vocabulary * max(len(labelled(x.label_BT)) for x in every)
        return passes * sum(one.label_BT.size for one in every)

    def _run(self, kind: Kind, number: int, one: definition.Sequence, found: Found) -> None:
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

    def _shake(self, shaking: Shaking, number: int, one: definition.Sequence, plain: Found) -> None:
        with one_blas_thread():
            shaking.sequence(number, one, plain)
        self._tick()

    def _tick(self) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def _keep(
        self,
        arrays: Mapping[str, Mapping[str, Any]],
        numbers: dict[str, Enclosed],
        errors: dict[tuple[str, str], tuple[float, float]],
    ) -> None:
        for name, x in arrays["balls"].items():
            assert isinstance(x, Balls)
            numbers[name] = enclosed(x, self.digits)
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
