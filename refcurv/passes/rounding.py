"""How much of a layer's gradients is rounding (NEGATIVE): the same pass, other roundings.

Some gradients are zero by theory, or far smaller than the terms that cancelled on the way. They
come out as noise, and the second moment of noise has a spectrum like any other. No bound on single
steps tells noise from a small gradient, but other runs do. Their input is a few units in the last
place larger or smaller, and each number of it is rounded up or down by chance. That hardly changes
the gradients, and changes every rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np

from refcurv.algebra import kernels
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.law.conventions import BLOCK_SHARDS, Fisher
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.transformer import Parameters, Tap
from refcurv.passes.shards import Shard, may_be_cut
from refcurv.passes.sweep import Sweep, Take, sweep

POSITIONS = 64
"""How many labelled positions of a shard are looked at; at least one sequence, or its beginning."""

View = Callable[[Parameters], Parameters]
"""The parameters of another run, from those of this one."""

NUDGES = (4, -5)
"""By how many units in the last place the other runs' inputs are larger."""


EACH = 3
"""How many random numbers tell the error of a row.  Chosen: two differences of three copies, each
with the directions in which the row errs: four of two directions alike, two of one alone."""


class Noise(NamedTuple):
    """What rounding does to some rows of one layer; each field adds up over shards.

    Fields: square, Σ |e|², e the error of g; of_G, Σ w over rows, w = |e|² |g|²; squares_G, Σ w².
    of_A, squares_A: the same of a.
    """

    square: float
    of_G: float
    squares_G: float
    of_A: float
    squares_A: float


def rounding(
    config: ModelConfig, parameters: Parameters, shard: Shard, job: Sweep
) -> dict[str, tuple[Noise, int]]:
    """The rounding of some kept rows of each wanted layer, and how many rows.

    The run as it is and those with NUDGES err independently, so that |e|² of one is their sample
    variance: the mean over all pairs of half of |g' − g|².
    The smallest number of the dtype is added for each entry of g, whose square may underflow. What
    is sent back is that of the first draw; for `expected`, all columns with random signs.

    Cost: a forward and a backward pass over 3 POSITIONS labels, once for each shard that is looked
        at; three over twice one sequence, where that is long and its labels are few, or it cannot
        be cut.
    Proof: tests/test_rounding.py::test_the_estimate_is_the_error
    """
    dtype = parameters[config.weight_of("head")].dtype
    runs = [
        partial(sweep, changed, view(parameters), some, one)
        for changed, view, some, one in other_runs(config, shard, job, dtype)
    ]
    return noise(runs, job.layers)


def as_it_is(parameters: Parameters) -> Parameters:
    """The view of a run whose parameters are the model's."""
    return parameters


def other_runs(
    config: ModelConfig, shard: Shard, job: Sweep, dtype: np.dtype
) -> list[tuple[ModelConfig, View, Shard, Sweep]]:
    """What a sweep is given: copies of some sequences, as they are and with each of NUDGES.

    All in one run, if that is no larger than the shard, or than POSITIONS of each. Else each two of
    them have a run of their own.
    """
    fisher = Fisher.SIGNED if job.fisher is Fisher.EXPECTED else job.fisher
    few, one = some_of(config, shard), replace(job, fisher=fisher, draws=1)
    return [(*_beside(config, few, some, dtype), one) for some in copies_of(shard, few)]


def copies_of(shard: Shard, few: Shard) -> list[tuple[int, ...]]:
    """By how much the copies of some sequences are nudged, in each run; 0 is as they are."""
    copies = 0, *NUDGES
    size = len(copies) * few.layout.position_BT.size
    room = max(shard.layout.position_BT.size, len(copies) * POSITIONS)
    return [copies] if size <= room else list(combinations(copies, 2))


def noise(
    runs: Sequence[Callable[[Take], None]], layers: Iterable[str]
) -> dict[str, tuple[Noise, int]]:
    """The rounding of these layers' rows and how many, from runs that hand their rows to a Take.

    The runs are `other_runs`. A layer's rows may come in parts, one after the other.
    """
    found: dict[str, list[Array]] = {name: [] for name in layers}
    copies = 1 + len(NUDGES) if len(runs) == 1 else 2
    parts: list[Tap] = []

    def end() -> None:
        if parts:
            found[parts[0].name].append(_rows(parts, copies))
            parts.clear()

    def take(_: int, tap: Tap) -> None:
        if parts and parts[0].name != tap.name:
            end()
        parts.append(tap)

    for run in runs:
        run(take)
        end()
    return {name: _noise(np.mean(some, axis=0)) for name, some in found.items() if some}


def _rows(parts: Sequence[Tap], copies: int) -> Array:
    """(5, N) of one layer's N rows, of each of which there are copies, by one run.

    |e|² of g, the same with the smallest number for each entry, and |g|²; then |e|² of a, and |a|².
    """
    name, g_NO = parts[0].name, _joined([tap.g for tap in parts])
    error_N, square_N = _errors(g_NO, copies)
    of_A = np.zeros((2, len(error_N)))
    if name not in TABLES:
        of_A[:] = _errors(_joined([tap.a for tap in parts]), copies)
    least = g_NO.shape[1] * float(np.finfo(g_NO.dtype).smallest_subnormal)
    return np.stack([error_N, error_N + least, square_N, *of_A])


def _noise(rows_5N: Array) -> tuple[Noise, int]:
    """The sums over the rows of one layer (`_rows`), and how many there are."""
    error_N, seen_N, square_N, *of_A = rows_5N
    return Noise(float(seen_N.sum()), *_spread(error_N, square_N), *_spread(*of_A)), len(error_N)


def _joined(parts: Sequence[Array]) -> Array:
    """Rows that came in parts."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _errors(x_NX: Array, copies: int) -> tuple[Array, Array]:
    """|e|² of rows, by so many copies of them that follow one another, and Σ x² of each."""
    each = np.split(x_NX, copies)
    errors = [_squares(other_NX, one_NX) / 2 for one_NX, other_NX in combinations(each, 2)]
    return np.mean(errors, axis=0), _squares(each[0])


def _squares(x_NX: Array, less_NX: Array | None = None) -> Array:
    """Σ (x − less)² of each row in float64, by default Σ x²."""
    out_N = np.empty(len(x_NX))
    kernels.squares(np.ascontiguousarray(x_NX), less_NX, out_N)
    return out_N


def _spread(error_N: Array, square_N: Array) -> tuple[float, float]:
    """Σ w and Σ w², w the error of a row times its square; 0 for what float64 does not hold."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        w_N = error_N * square_N
        of, squares = float(w_N.sum()), float((w_N * w_N).sum())
    return (of, squares if squares < np.inf else 0.0) if of < np.inf else (0.0, 0.0)


def free(of: float, squares: float, rows: int) -> float:
    """How many random numbers tell Σ w of so many rows: EACH for each of those that carry it.

    These are (Σ w)²/Σ w²; one where w² is no number of float64.
    """
    carry = of / squares * of if 0 < squares < np.inf else 1.0
    return EACH * min(max(carry, 1.0), rows)


def looked_at(units: Sequence[Shard]) -> set[int]:
    """The first shard with a label of blocks 0, 1, 3, 7, ...: their rounding is looked at."""
    first: dict[int, int] = {}
    for unit in units:
        block = unit.number // BLOCK_SHARDS
        if not block & (block + 1) and (unit.label_BT >= 0).any():
            first.setdefault(block, unit.number)
    return set(first.values())


def some_of(config: ModelConfig, shard: Shard) -> Shard:
    """What of a shard is looked at: its first labelled sequences, in as many as fit.

    Where one alone is too long and its end may be cut, it ends with the last label that fits.
    """
    labelled = np.flatnonzero((shard.label_BT >= 0).any(axis=1))
    few = shard.of(labelled[: max(1, POSITIONS // shard.layout.position_BT.shape[1])])
    columns = np.flatnonzero(few.label_BT[0] >= 0)
    if not may_be_cut(config) or len(columns) <= POSITIONS:
        return few
    return few.until(int(columns[POSITIONS - 1]) + 1)


def _beside(
    config: ModelConfig, few: Shard, nudges: Sequence[int], dtype: np.dtype
) -> tuple[ModelConfig, View, Shard]:
    """Copies of some sequences behind one another, as one shard, each nudged by so much.

    What the first block reads, embeddings or pixels, is larger by so many times eps. Each number is
    also off by u = eps/2, up or down. A norm hides what all numbers have in common, and not that
    each is rounded by itself, which matters where it divides by nearly 0. Labels are drawn alike,
    for index_B is. Each copy has rows of its own in a table that holds no others.
    """
    shard = few.of(np.tile(np.arange(len(few.index_B)), len(nudges)))

    def moved(x: Array) -> Array:
        return np.concatenate([_nudged(x, nudge) for nudge in nudges])

    if config.image is not None:
        return config, as_it_is, replace(shard, source=moved(few.source.astype(dtype)))
    entries, at = np.unique(few.source, return_inverse=True)
    at_BT = at.reshape(few.source.shape)
    source = np.concatenate([at_BT + k * len(entries) for k in range(len(nudges))])

    def view(parameters: Parameters) -> Parameters:
        if "embed.weight" not in parameters:
            return parameters
        table = parameters["embed.weight"]
        head = {"head.weight": table} if config.tied else {}
        return {**parameters, **head, "embed.weight": moved(np.asarray(table[entries]))}

    return replace(config, tied=False), view, replace(shard, source=source)


def _nudged(x: Array, nudge: int) -> Array:
    """`nudge` times eps larger, and off by u; by 0 it is x itself."""
    if not nudge:
        return x
    eps = tolerance.eps(x.dtype)
    more = x * (1 + nudge * eps)
    u = np.array([-0.5, 0.5], x.dtype) * eps
    random = np.random.default_rng(abs(nudge))
    return np.asarray(more + more * random.choice(u, x.shape))
