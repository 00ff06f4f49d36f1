"""What a check of an identity yields, and what several of them share."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from refcurv.algebra.scaling import norm
from refcurv.curvature.exact.problems import Batch
from refcurv.judge.bench import Bench
from refcurv.judge.roundings import RUNS, Runs
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL
from refcurv.model.config import ModelConfig
from refcurv.model.transformer import Parameters

NORMAL = float(np.finfo(np.float64).tiny)
"""The smallest number with all its digits: what is sharpest lies above it, or nothing is cut."""


LEAST = NORMAL / float(np.finfo(np.float64).eps)
"""Below it squares and products lose digits to underflow, in part or altogether."""


@dataclass(frozen=True, slots=True)
class Measure:
    """error, relative; budget, what rounding explains; where."""

    error: float
    budget: float
    where: str = ""


Check = Callable[[Bench], Iterator[Measure]]


def measure(
    got: ArrayLike, want: ArrayLike, scale: ArrayLike, budget: float, where: str = ""
) -> Measure:
    """|got − want| / |scale| in Frobenius norm; infinite between shapes.

    What underflows loses digits that no scale knows of, so a scale is at least LEAST.
    """
    if np.shape(want) not in ((), np.shape(got)):
        return Measure(math.inf, budget, f"{where}: {np.shape(got)} for {np.shape(want)}")
    error = float(norm(np.abs(np.asarray(got) - np.asarray(want))))
    return Measure(error / max(float(norm(np.asarray(scale))), LEAST), budget, where)


def rounded(
    got: ArrayLike,
    want: ArrayLike,
    scale: Callable[[int], ArrayLike],
    budget: float,
    where: str,
) -> Measure:
    """`measure` of what whole passes made; scale(n) are its terms by n shaken runs.

    One run will do, but where the error is beyond budget: it may have moved too little by chance.
    """
    one = measure(got, want, scale(1), budget, where)
    if one.error <= budget:
        return one
    return measure(got, want, scale(RUNS), budget, where)


def sizes(
    others: list[float],
    terms: list[Runs],
    runs: int,
    part: Callable[[Array], Array] = np.asarray,
) -> list[float]:
    """|terms| of several results, by so many runs, beside others."""
    return [*others, *(x.size(runs, part) for x in terms)]


def exactly(same: bool, where: str = "") -> Measure:
    """Equality in every bit: error 0, or infinite."""
    return Measure(0.0 if same else math.inf, 0.0, where)


def overlaid(changed: Mapping[str, Array], parameters: Parameters) -> Parameters:
    """The parameters with some replaced; the others stay as lazy as they are."""
    return ChainMap(dict(changed), parameters)  # type: ignore[arg-type]


def numbered_blocks(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """Every transformer block's number and the beginning of its names."""
    return ((i, f"blocks.{i}.") for i in range(config.layers))


def along(v: Array, x: Array) -> Array:
    """The terms of <v, x>, and their sum: roundings of one entry, and of many at once."""
    terms = np.ravel(v * x)
    return np.append(terms, terms.sum())


def reached_rows(bench: Bench) -> Array:
    """ROWS, by loops of its own: positions from which a label of their segment is reached."""
    label, segment = bench.batch.label_BT, bench.batch.segment_BT
    if bench.config.image is not None:
        return np.repeat(label >= 0, segment.shape[1], axis=1)
    out = label >= 0
    for t in range(out.shape[1] - 2, -1, -1):
        out[:, t] |= out[:, t + 1] & (segment[:, t] == segment[:, t + 1])
    for t in range(1, out.shape[1] if not bench.config.causal else 0):
        out[:, t] |= out[:, t - 1] & (segment[:, t] == segment[:, t - 1])
    return np.asarray(out & bench.real)


def batch_of(bench: Bench, sequences: int = 2, eps: float | None = None) -> Batch:
    """The first sequences."""
    b, config = bench.batch, bench.config
    if eps is not None:
        config = replace(config, norm_eps=eps)
    return Batch(config, *(x[:sequences] for x in (b.inputs, b.label_BT, b.segment_BT, b.index_B)))


def few_terms(bench: Bench) -> Batch:
    """One short sequence with as many loss positions as the plan enumerates, or one image."""
    b, n = bench.batch, bench.plan.enumerated
    if bench.config.image is not None:
        return Batch(bench.config, b.inputs[:1], b.label_BT[:1], b.segment_BT[:1], b.index_B[:1])
    covering = np.flatnonzero(b.label_BT[0] >= 0)[:n][-1] + 1
    width = min(max(2 * n + 1, covering), b.inputs.shape[1])
    label = b.label_BT[:1, :width].copy()
    label[:, : np.flatnonzero(label[0] >= 0)[-n:][0]] = NO_LABEL
    part = (b.inputs[:1, :width], label, b.segment_BT[:1, :width], b.index_B[:1])
    return Batch(bench.config, *part)
