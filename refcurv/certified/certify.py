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
from refcurv.certified.certificate import (
    ROUTES,
    Certificate,
    Enclosed,
    Route,
    enclosed,
    farthest,
    sizes,
)
from refcurv.certified.layers import BALLS as LAYERS
from refcurv.certified.numbers import BALLS, OF, Found, Kind, Task, floats, run
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.certified.spectra import Proved, prove, shares
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
    "eigenvalues": 2.0, "eigenvectors": 2.0, "cut": 2.0, "edit": 2.0,
}  # fmt: skip
"""How many times the digits of a forward each quantity loses.  Chosen: what was seen; a plan that
falls short is made again, from what was seen."""

EVERY: Final = (*OF, *SPECTRA)
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
    direction: Mapping[str, Array] | None = None,
    rho: float | Mapping[str, float] | None = None,
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
            labels, over all `sequences`), "hvp" and "ggnvp" (H v and GGN v of a sequence's loss),
            "eigenvalues" and "eigenvectors" of A and G, "cut" (how many pairs of each row are kept,
            SELECT on the real numbers) and "edit" (W'). The last four bring A, G and eigenvalues.
        digits: how many digits of each array's largest entry are to be certain in every entry; 200
            at most. Arrays so small that float64 has no radius for them have fewer.
        sequences: rows of the corpus.
        layers: a pattern of linear layers, for A and G.
        rows: which positions are rows of A and G (ROWS).
        direction: v of the products, {parameter: array}; left out, it is `signs(0, 0, i, 0, ·)` of
            SAMPLING for parameter number i.
        rho: of "cut" and "edit": a share for all `layers`, or {pattern: share}. A cut that leaves
            pairs undecided gives neither counts nor W'; `cuts` says how many they are.
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
        For eigenvalues of a (d, d) some twenty products of such matrices, for W' six more.
    Source: METHOD, Certificates.
    Proof: tests/test_certified.py::test_a_twin_of_every_family_is_certified,
        ::test_more_bits_give_smaller_balls_inside
    """
    require_flint()
    require_model("certify", model)
    require_corpus("certify", corpus)
    task = _task(model, of, layers, direction, rho)
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
    total = len(chosen) * (1 + len(ROUTES)) + task.spectral * 2 * len(task.wanted)
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
    model: Model,
    of: Sequence[str],
    layers: str,
    direction: Mapping[str, Array] | None,
    rho: float | Mapping[str, float] | None,
) -> Task:
    names = tuple(of) if isinstance(of, Iterable) and not isinstance(of, str) else ()
    if not names:
        raise ConventionError(f"certify: `of` must name some of {', '.join(EVERY)}; got {of!r}.")
    for name in names:
        require_choice("certify", "of", name, EVERY)
    parameters = resident(model)
    for name, x in parameters.items():
        require_finite("certify", name, x)
    wanted = tuple(expand(layers, list(model.config.linear_layers())))
    v = _signs(parameters) if direction is None else _direction(parameters, direction)
    kept = shares(model.config, names, wanted, rho)
    if {*SPECTRA} & {*names}:
        names = tuple(dict.fromkeys((*names, "A", "G")))
    return Task(model.config, parameters, names, wanted, v, kept)


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
        errors: dict[tuple[str, str], float] = {}
        with bits(precision):
            every = {kind.name: (kind, Found()) for kind in (BALLS, *map(floats, ROUTES))}
            for number, one in self.sequences.items():
                for kind, found in every.values():
                    self._run(kind, number, one, found)
                self._keep(dict(_drained(every)), numbers, errors)
            means: dict[str, dict[str, Any]] = {
                name: {} if name in self.overflowed else dict(found.means())
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
                    errors[name, "float64"] = farthest(got, numbers[name])
        size = sizes(numbers)
        routes = [
            Route(name, dtype, far / size[name] if size[name] else math.inf if far else 0.0)
            for (name, dtype), far in errors.items()
        ]
        return Certificate(
            numbers, tuple(routes), precision, self.digits, rows, self.source,
            proved.spectra, proved.cuts,
        )  # fmt: skip

    def _run(self, kind: Kind, number: int, one: definition.Sequence, found: Found) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                run(kind, self.task, number, one, found)
            except NonFiniteError:
                if kind is BALLS:
                    raise
                self.overflowed.add(kind.name)  # its range is too small: its error is infinite
        self._tick()

    def _tick(self) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def _keep(
        self,
        arrays: Mapping[str, Mapping[str, Any]],
        numbers: dict[str, Enclosed],
        errors: dict[tuple[str, str], float],
    ) -> None:
        for name, x in arrays["balls"].items():
            assert isinstance(x, Balls)
            numbers[name] = enclosed(x, self.digits)
            for dtype in ROUTES:
                got = arrays[dtype].get(name)
                errors[name, dtype] = math.inf if got is None else farthest(got, numbers[name])


def _drained(every: Mapping[str, tuple[Kind, Found]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arrays of each kind, which it then no longer holds."""
    for name, (_, found) in every.items():
        yield name, found.arrays
        found.arrays = {}
