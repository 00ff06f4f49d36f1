"""`certify`: numbers of a model on a corpus, each with a proved radius, beside what floats give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import UndecidedError, require_flint
from refcurv.certified import blocks
from refcurv.certified.attempt import Job
from refcurv.certified.certificate import Certificate, sizes
from refcurv.certified.directions import direction_of, said_of
from refcurv.certified.estimate import Estimate, estimated, require_memory, require_time
from refcurv.certified.labels import drawn
from refcurv.certified.lost import place
from refcurv.certified.numbers import OF, Task
from refcurv.certified.origin import files_of
from refcurv.certified.planning import SPARE, planned
from refcurv.certified.spectra import OF as SPECTRA
from refcurv.certified.spectra import shares, with_moments
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
from refcurv.model.fisher import require_fisher
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
            G and eigenvalues of the layers that rho names; and, of weights with at most 1,024
            entries, the dense "hessian", "ggn" and "fisher" (sums over `sequences`, as `exact` has
            them).
        digits: how many digits of each array's largest entry are to be certain in every entry; 200
            at most. Arrays so small that float64 has no radius for them have fewer.
        sequences: rows of the corpus.
        layers: a pattern of linear layers, for A, G, what is made of them, and the dense blocks.
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
        for, takes too long, or is of nothing that is asked for (rows, fisher).

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
    _require_asked(task, rows)
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
    job = Job(task, chosen, wanted, source | labels, progress)
    with np.errstate(all="ignore"):  # what floats make of it is said by their error
        return _with_enough(job, plan.bits)


def _with_enough(job: Job, precision: int) -> Certificate:
    """The certificate, with more bits until they do, or MOST_BITS are reached."""
    while True:
        try:
            found = job.at(precision)
        except (UndecidedError, NonFiniteError) as error:  # balls overlap, or have no bound
            if precision >= MOST_BITS:
                where = place(job.task, [*job.sequences.values()], precision) or f"({error})"
                said = f"certify: with {precision:,} bits balls still know too little {where}."
                raise type(error)(said) from None
            precision = min(MOST_BITS, 2 * precision)
            continue
        short = job.digits - found.digits
        if short <= 0:
            return found
        if small := _narrowest(found):
            return _saying(found, f"in {small}: float64 has no radius for numbers so small")
        if precision >= MOST_BITS:
            return found if found.digits else _saying_where(job, found)
        lost = math.ceil(short * math.log2(10)) if found.digits else precision
        precision = min(MOST_BITS, precision + lost + SPARE)


def _saying_where(job: Job, found: Certificate) -> Certificate:
    """The certificate, some array of which has no digit, with the place where they are lost."""
    size = sizes(found)
    where = place(job.task, [*job.sequences.values()], found.bits)
    where = where or f"in {next(n for n, one in found.items() if not one.digits(size[n]))}"
    return _saying(found, where)


def _saying(found: Certificate, where: str) -> Certificate:
    """The certificate, with where digits are lost."""
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


def _require_asked(task: Task, rows: str) -> None:
    """Raise ConventionError for rows and labels that nothing has that is asked for."""
    of = {*task.of}
    if rows != "reached" and not {"A", "G"} & of:
        raise ConventionError(f"certify: rows={rows!r} is of A and G, which `of` does not name.")
    if task.fisher is not Fisher.EMPIRICAL and not {"G", "fisher"} & of:
        raise ConventionError(
            f"certify: fisher={str(task.fisher)!r} is of G and 'fisher', which `of` does not name."
        )


def _require_rows(task: Task, chosen: Mapping[int, definition.Sequence], rows: str) -> None:
    """Raise EmptyError for A and G that have no row."""
    if not {"A", "G"} & {*task.of}:
        return
    if not any(one.keep_BT.any() for one in chosen.values()):
        raise EmptyError("certify: A and G of these sequences have no row (ROWS).")
    if rows == "cls" and "patch" in task.wanted:
        raise EmptyError("certify: 'patch' has no row among rows='cls'. Take rows='all' for it.")


def _narrowest(found: Certificate) -> str:
    """An array that lacks digits, if float64 has no smaller radius for any of these; or ""."""
    size, least = sizes(found), np.finfo(np.float64).smallest_subnormal
    lacking = [name for name, x in found.items() if x.digits(size[name]) < found.wanted]
    return lacking[0] if all(found[name].radius.max() == least for name in lacking) else ""


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
    if {*names} <= {"cut", "edit"}:  # of other layers nothing is asked
        wanted = tuple(name for name in wanted if name in kept)
    return Task(model.config, parameters, with_moments(names), wanted, v, fisher, seed, rho=kept)


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
