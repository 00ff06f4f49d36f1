"""How much of a layer's gradients is rounding (NEGATIVE): the same pass, other roundings.

Some gradients are zero by theory, or far smaller than the terms that cancelled on the way. They
come out as noise, and the second moment of noise has a spectrum like any other. No bound on single
steps tells noise from a small gradient, but other runs do. Their input is a few units in the last
place larger or smaller, and each number of it is rounded up or down by chance. That hardly changes
the gradients, and changes every rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from refcurv.algebra import kernels
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.law.conventions import Fisher
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.shards import Shard, may_be_cut
from refcurv.passes.sweep import Sweep, Take, sweep

POSITIONS = 64
"""How many labelled positions of a shard are looked at; at least one sequence, or its beginning."""

View = Callable[[Parameters], Parameters]
"""The parameters of another run, from those of this one."""

NUDGES = (4, -5, 9)
"""By how many units in the last place the other runs' inputs are larger."""


class Noise(NamedTuple):
    """What rounding does to some rows of one layer; each field adds up over shards.

    Fields: square, Σ |e|², e the error of g. of_G: 4 Σ |e|² |g|², which E |Δ Σ g gᵀ|² reaches at
    most, for rows err independently. free_G: how many random numbers tell it: NUDGES for each of
    the rows that carry it, (Σ w)²/Σ w² of w = |e|² |g|². of_A, free_A: the same of a.
    """

    square: float
    of_G: float
    free_G: float
    of_A: float
    free_A: float


def rounding(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep
) -> dict[str, tuple[Noise, int]]:
    """The rounding of some kept rows of each wanted layer, and how many rows.

    Two runs err independently, so that |e|² of one is half of |g' − g|²: here the mean over NUDGES.
    The smallest number of the dtype is added for each entry of g, whose square may underflow. What
    is sent back is that of the first draw; for `expected`, all columns with random signs.

    Cost: four forward and backward passes over POSITIONS labels, or over one sequence.
    Proof: tests/test_rounding.py::test_the_estimate_is_the_error
    """
    dtype = parameters[config.weight_of("head")].dtype
    runs = [
        partial(sweep, changed, view(parameters), few, one)
        for changed, view, few, one in other_runs(config, shard, job, dtype)
    ]
    return noise(runs, job.layers)


def as_it_is(parameters: Parameters) -> Parameters:
    """The view of a run whose parameters are the model's."""
    return parameters


def other_runs(
    config: ModelConfig, shard: Shard, job: Sweep, dtype: np.dtype
) -> list[tuple[ModelConfig, View, Shard, Sweep]]:
    """What a sweep is given: some sequences as they are, and with each of NUDGES."""
    fisher = Fisher.SIGNED if job.fisher is Fisher.EXPECTED else job.fisher
    few, one = some_of(config, shard), replace(job, fisher=fisher, draws=1)
    nudged = [(*_nudged(config, few, nudge, dtype), one) for nudge in NUDGES]
    return [(config, as_it_is, few, one), *nudged]


def noise(
    runs: Sequence[Callable[[Take], None]], layers: Iterable[str]
) -> dict[str, tuple[Noise, int]]:
    """The rounding of these layers' rows and how many, from runs that hand their rows to a Take.

    The first run is compared with each of the others.
    """
    first: list[Tap] = []
    errors: list[tuple[Array, Array]] = []

    def keep(_: int, tap: Tap) -> None:
        first.append(tap)
        errors.append((np.zeros(len(tap.g)), np.zeros(len(tap.a))))

    runs[0](keep)
    for other in runs[1:]:
        again = iter(zip(first, errors, strict=True))

        def compare(
            _: int, tap: Tap, again: Iterator[tuple[Tap, tuple[Array, Array]]] = again
        ) -> None:
            before, (of_g, of_a) = next(again)
            of_g += _squares(tap.g, before.g) / 2 / len(NUDGES)
            if tap.name not in TABLES:
                of_a += _squares(tap.a, before.a) / 2 / len(NUDGES)

        other(compare)
    return {name: _noise(name, first, errors) for name in layers}


def _noise(name: str, taps: list[Tap], errors: list[tuple[Array, Array]]) -> tuple[Noise, int]:
    """Of one layer, whose rows may have come in parts."""
    parts = [(tap, e) for tap, e in zip(taps, errors, strict=True) if tap.name == name]
    rows = sum(len(tap.g) for tap, _ in parts)
    if not rows:
        return Noise(0.0, 0.0, 0.0, 0.0, 0.0), 0
    e_g, e_a = (np.concatenate([e[k] for _, e in parts]) for k in (0, 1))
    least = sum(tap.g.size * float(np.finfo(tap.g.dtype).smallest_subnormal) for tap, _ in parts)
    of_G = _spread(e_g, np.concatenate([_squares(tap.g) for tap, _ in parts]))
    of_A = (0.0, 0.0)
    if name not in TABLES:
        of_A = _spread(e_a, np.concatenate([_squares(tap.a) for tap, _ in parts]))
    return Noise(float(e_g.sum()) + least, *of_G, *of_A), rows


def _squares(x_NX: Array, less_NX: Array | None = None) -> Array:
    """Σ (x − less)² of each row in float64, by default Σ x²."""
    out_N = np.empty(len(x_NX))
    kernels.squares(np.ascontiguousarray(x_NX), less_NX, out_N)
    return out_N


def _spread(error_N: Array, square_N: Array) -> tuple[float, float]:
    """4 Σ w and how many random numbers tell it, w the error of a row times its square."""
    w_N = error_N * square_N
    top = float(w_N.max(initial=0.0))
    if not 0 < top < np.inf:
        return 0.0, 0.0
    share_N = w_N / top
    return 4 * float(w_N.sum()), len(NUDGES) * float(share_N.sum() ** 2 / (share_N**2).sum())


def some_of(config: ModelConfig, shard: Shard) -> Shard:
    """What of a shard is looked at: its first labelled sequences, in as many as fit.

    Where one alone is too long and its end may be cut, it ends with the last label that fits.
    """
    labelled = np.flatnonzero((shard.label_BT >= 0).any(axis=1))
    few = shard.of(labelled[: max(1, POSITIONS // shard.layout.position_BT.shape[1])])
    columns = np.flatnonzero(few.label_BT[0] >= 0)
    if config.image is not None or not may_be_cut(config) or len(columns) <= POSITIONS:
        return few
    return few.until(int(columns[POSITIONS - 1]) + 1)


def _nudged(
    config: ModelConfig, shard: Shard, nudge: int, dtype: np.dtype
) -> tuple[ModelConfig, View, Shard]:
    """The same model and shard, with embeddings or pixels larger by `nudge` times eps.

    Each number is also off by u = eps/2, up or down. A norm hides what all numbers have in common,
    and not that each is rounded by itself, which matters where it divides by nearly 0.
    """

    def moved(x: Array) -> Array:
        random = np.random.default_rng(abs(nudge))
        u = np.array([-0.5, 0.5], dtype) * tolerance.eps(dtype)
        return np.asarray(x + x * random.choice(u, x.shape))

    def view(parameters: Parameters) -> Parameters:
        if "embed.weight" not in parameters:
            return parameters
        x, rows = np.array(parameters["embed.weight"]), np.unique(shard.source)
        x[rows] = moved(x[rows])
        return {**parameters, "embed.weight": x}

    factor = 1 + nudge * tolerance.eps(dtype)
    if config.image is not None:
        return config, as_it_is, replace(shard, source=moved(shard.source.astype(dtype) * factor))
    return replace(config, embed_scale=config.embed_scale * factor), view, shard
