"""`certify`: numbers of a model on a corpus, each with a proved radius, beside what floats give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import Balls, UndecidedError, bits, exact, require_flint
from refcurv.algebra.blas import one_blas_thread
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
from refcurv.certified.layers import BALLS as LAYERS
from refcurv.certified.numbers import BALLS, OF, Found, Kind, Task, floats, run
from refcurv.curvature import definition
from refcurv.files import store
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    as_array,
    require_choice,
    require_dtype,
    require_finite,
    require_range,
    require_shape,
)
from refcurv.model.corpus import Corpus
from refcurv.model.given import numbers_of, require_corpus, require_model
from refcurv.model.patterns import expand
from refcurv.model.rows import require_rows
from refcurv.model.sampling import signs
from refcurv.model.transformer import forward
from refcurv.model.weights import Model, resident
from refcurv.progress import Progress, silent

MOST_BITS: Final = 2**14
"""Bits that are tried at most.  Chosen: 3,000 digits are lost on the way, or none will do."""

SPARE: Final = 32
"""Bits beyond those that are planned.  Chosen: ten digits, for what grows faster than planned."""

MOST_DIGITS: Final = 200
"""Digits that are certified at most: a float64 radius is 5e-324 or more.  Chosen: which leaves a
hundred for numbers that are small themselves."""

BACKWARD: Final[Mapping[str, float]] = {
    "logits": 1.0, "nats": 1.0, "A": 1.0, "gradient": 2.0, "G": 2.0, "hvp": 3.0, "ggnvp": 2.5,
}  # fmt: skip
"""How many times the digits of a forward each quantity loses.  Chosen: what was seen; a plan that
falls short is made again, from what was seen."""


def certify(
    model: Model,
    corpus: Corpus,
    of: Sequence[str] = ("logits", "nats", "gradient", "A", "G"),
    *,
    digits: float = 30,
    sequences: Iterable[int] = (0,),
    layers: str = "**",
    rows: str = "reached",
    direction: Mapping[str, Array] | None = None,
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
        of: of "logits", "nats", "gradient" (of every parameter), "A" and "G" (of the corpus's
            labels, over all `sequences`), "hvp" and "ggnvp" (H v and GGN v of a sequence's loss).
        digits: how many digits of each array's largest entry are to be certain in every entry; 200
            at most. Arrays so small that float64 has no radius for them have fewer.
        sequences: rows of the corpus.
        layers: a pattern of linear layers, for A and G.
        rows: which positions are rows of A and G (ROWS).
        direction: v of the products, {parameter: array}; left out, it is `signs(0, 0, i, 0, ·)` of
            SAMPLING for parameter number i.
        progress: called with (done, all); one for each sequence and kind of number.

    Returns:
        Certificate: {name: Enclosed}, and the errors of the floats.

    Raises:
        MissingFlintError: python-flint is not installed. UndecidedError: balls cannot make a
        decision (a ReLU at 0, a clip at its bound) with MOST_BITS. NonFiniteError: a parameter is
        no number, or with MOST_BITS a layer's inputs still have no bound. ConventionError,
        RangeError, NameUnknownError, DTypeError, EmptyError: what cannot be asked for.

    Cost: for one sequence of 64 tokens and a million parameters about five seconds at 300 bits
        for a gradient, three times that for a product; memory for the balls of all parameters.
    Source: METHOD, Certificates.
    Proof: tests/test_certified.py::test_a_twin_of_every_family_is_certified,
        ::test_more_bits_give_smaller_balls_inside
    """
    require_flint()
    require_model("certify", model)
    require_corpus("certify", corpus)
    task = _task(model, of, layers, direction)
    wanted = require_range("certify", "digits", digits, 1, MOST_DIGITS)
    chosen = _sequences(model, corpus, rows, sequences)
    if {"A", "G"} & {*task.of} and not any(one.keep_BT.any() for one in chosen.values()):
        raise EmptyError("certify: A and G of these sequences have no row (ROWS).")
    if {"A", "G"} & {*task.of} and rows == "cls" and "patch" in task.wanted:
        raise EmptyError("certify: 'patch' has no row among rows='cls'. Take rows='all' for it.")
    source = {
        "inputs": store.inputs(model.source, corpus.source), "sequences": list(chosen),
        "rows": rows, "direction": _said(task, direction),
    }  # fmt: skip
    precision = _planned(task, next(iter(chosen.values())), wanted)
    total = len(chosen) * (2 + len(ROUTES))
    while True:
        job = _Job(task, chosen, wanted, source, progress, total)
        try:
            found = job.at(precision)
        except (UndecidedError, NonFiniteError):  # balls overlap, or have no bound
            if precision >= MOST_BITS:
                raise
            precision = min(MOST_BITS, 2 * precision)
            continue
        short = wanted - found.digits
        if short <= 0 or precision >= MOST_BITS or _narrowest(found):
            return found
        lost = math.ceil(short * math.log2(10)) if found.digits else precision
        precision = min(MOST_BITS, precision + lost + SPARE)


def _narrowest(found: Certificate) -> bool:
    """Is each array that lacks digits so small that float64 has no smaller radius for it?"""
    size = sizes(found)
    lacking = [x for name, x in found.items() if x.digits(size[name]) < found.wanted]
    return all(x.radius.max() == np.finfo(np.float64).smallest_subnormal for x in lacking)


def _task(
    model: Model, of: Sequence[str], layers: str, direction: Mapping[str, Array] | None
) -> Task:
    names = tuple(of) if isinstance(of, Iterable) and not isinstance(of, str) else ()
    if not names:
        raise ConventionError(f"certify: `of` must name some of {', '.join(OF)}; got {of!r}.")
    for name in names:
        require_choice("certify", "of", name, list(OF))
    parameters = resident(model)
    for name, x in parameters.items():
        require_finite("certify", name, x)
    wanted = tuple(expand(layers, list(model.config.linear_layers())))
    v = _signs(parameters) if direction is None else _direction(parameters, direction)
    return Task(model.config, parameters, names, wanted, v)


def _signs(parameters: Mapping[str, Array]) -> dict[str, Array]:
    """A sign for each entry: any language can draw them again (SAMPLING)."""
    return {
        name: signs(0, 0, i, 0, x.size).reshape(x.shape).astype(np.float64)
        for i, (name, x) in enumerate(parameters.items())
    }


def _direction(parameters: Mapping[str, Array], direction: Mapping[str, Array]) -> dict[str, Array]:
    """A direction of all parameters, 0 where it says nothing."""
    for name in direction:
        require_choice("certify", "direction", name, list(parameters))
    out = {}
    for name, x in parameters.items():
        v = as_array("certify", f"direction[{name!r}]", direction.get(name, np.zeros(x.shape)), "")
        require_shape("certify", f"direction[{name!r}]", v, x.shape, name)
        require_dtype("certify", f"direction[{name!r}]", v, "fiu", "real numbers")
        require_finite("certify", f"direction[{name!r}]", v)
        out[name] = v.astype(np.float64)
        if (out[name].astype(object) != v.astype(object)).any():
            raise DTypeError(
                f"certify: direction[{name!r}] has numbers of {v.dtype} that are not float64."
            )
    return out


def _said(task: Task, direction: Mapping[str, Array] | None) -> str | None:
    """Which direction: None without a product, "signs", or the SHA-256 of what was given.

    It is that of the float64 of every parameter, little-endian, in the model's order.
    """
    if not {"hvp", "ggnvp"} & {*task.of}:
        return None
    if direction is None:
        return "signs"
    said = sha256()
    for v in task.direction.values():
        said.update(np.ascontiguousarray(v, "<f8").tobytes())
    return said.hexdigest()


def _sequences(
    model: Model, corpus: Corpus, rows: str, wanted: Iterable[int]
) -> dict[int, definition.Sequence]:
    """The sequences by their row in the corpus."""
    law = require_rows("certify", model.config, rows)
    numbers = list(dict.fromkeys(numbers_of("certify", corpus, wanted)))
    every = enumerate(definition.sequences(model.config, corpus, law))
    found = dict(islice(((n, one) for n, one in every if n in numbers), len(numbers)))
    return {n: found[n] for n in numbers}


def _planned(task: Task, one: definition.Sequence, digits: float) -> int:
    """Bits for so many digits, from what one block and two blocks of a forward lose."""
    precision, config = 128, task.config
    while True:
        lost = [_lost(task, one, depth, precision) for depth in range(1, min(config.layers, 2) + 1)]
        if all(x < precision for x in lost):
            break
        if precision >= MOST_BITS:
            return MOST_BITS
        precision = min(MOST_BITS, 2 * precision)
    growth = max(lost[-1] - lost[0], 1.0) if len(lost) > 1 else lost[0]
    whole = lost[0] + growth * (config.layers - 1)
    most = max(BACKWARD[name] for name in task.of)
    return min(MOST_BITS, math.ceil(digits * math.log2(10) + most * whole) + SPARE)


def _lost(task: Task, one: definition.Sequence, depth: int, precision: int) -> float:
    """Bits of the largest number that a forward through so many blocks is unsure of."""
    shallow = replace(task.config, layers=depth, windows=task.config.windows[:depth])
    with bits(precision):
        names = shallow.parameter_shapes()
        theta: Any = {name: exact(task.parameters[name]) for name in names}
        inputs: Any = one.inputs if one.inputs.dtype.kind in "iu" else exact(one.inputs)
        final: Any
        try:
            final, _ = forward(shallow, theta, inputs, one.layout, LAYERS)
        except (UndecidedError, NonFiniteError):
            return math.inf
        radius, size = final.radii().max(), final.least().max()
    if not size or not math.isfinite(radius):
        return math.inf
    return precision + math.log2(max(radius / size, 2.0**-precision))


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
        shaking = Shaking(self.task, sum(one.label_BT.size for one in self.sequences.values()))
        with bits(precision):
            every = {kind.name: (kind, Found()) for kind in (BALLS, *map(floats, ROUTES))}
            for number, one in self.sequences.items():
                for kind, found in every.values():
                    self._run(kind, number, one, found)
                self._shake(shaking, number, one, every["float64"][1])
                self._keep(dict(_drained(every)), numbers, errors)
            shaking.means(every["float64"][1])
            means = {
                name: {} if name in self.overflowed else dict(found.means())
                for name, (_, found) in every.items()
            }
            self._keep(means, numbers, errors)
            rows = {name: n for name, n in every["balls"][1].rows.items()}
        size = sizes(numbers)
        routes = [
            _route(name, dtype, far, size[name], shaking) for (name, dtype), far in errors.items()
        ]
        return Certificate(numbers, tuple(routes), precision, self.digits, rows, self.source)

    def _run(self, kind: Kind, number: int, one: definition.Sequence, found: Found) -> None:
        with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
            try:
                run(kind, self.task, number, one, found)
            except NonFiniteError:
                if kind is BALLS:
                    raise
                self.overflowed.add(kind.name)  # its range is too small: its error is infinite
        self._stepped()

    def _shake(self, shaking: Shaking, number: int, one: definition.Sequence, plain: Found) -> None:
        with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
            shaking.sequence(number, one, plain)
        self._stepped()

    def _stepped(self) -> None:
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
                far = (math.inf, math.inf)
                if got is not None:
                    far = farthest(got, numbers[name]), outside(got, numbers[name])
                errors[name, dtype] = far


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
