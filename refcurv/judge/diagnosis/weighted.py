"""Hypotheses that weight sequences and batches otherwise: B2, B3, B9, B41, B46.

Theirs is Σ w_n P_n, P_n what sequence n adds to the sums (`variants.parts`). Each hypothesis is a
rule for w; theirs is w's sum times any number if it holds. The parts are corners of the matrices,
and so what is left is measured on corners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import Left, fitted, see
from refcurv.judge.diagnosis.recomputed import WHOLE, cost
from refcurv.judge.diagnosis.search import Idea, Side, usable
from refcurv.judge.diagnosis.variants import Parts, parts
from refcurv.judge.diagnosis.variants.collecting import POSITIONS, sample
from refcurv.law.checks import Array

KEPT = ("ordinary", "first", "prompts")
"""The kinds of positions that are rows where the reference has the rows `reached`."""

LEAST = 0.1
"""A decay below this is the last batch alone (B41).  Chosen: nobody averages over so little."""

WORKERS = (2, 3, 4, 6, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights of sequences under a fault; how many rows then count."""

    faults: tuple[str, ...]
    name: str
    weight: Array
    alike: tuple[str, ...] = ()


def weigh(case: Case, found: Mapping[str, Side], side: str, layers: Sequence[str]) -> None:
    """Enter what each rule leaves in these layers."""
    if case.model is None or case.corpus is None or not layers:
        return
    if sample(case, POSITIONS)[1] < 1 or cost(case) > WHOLE:
        return  # weights of sequences that were not read are unknown
    case.say("batches and workers, on all sequences")
    of = parts(case, layers)
    for layer in of.layers:
        seen = see(case, layer).get(side)
        if seen is None or not usable(seen) or seen.T.shape != seen.X.shape:
            continue
        at = of.layers[layer].at_A if side == "A" else of.layers[layer].at_G
        T = seen.T[np.ix_(at, at)]
        each = of.whole(layer, side, KEPT)
        # layers of images have other rows than blocks: patches alone, or one for each image
        share = case.counts(layer).ours["A"] / max(1.0, float(of.kept.sum()))
        for rule in rules(of, side, T, each):
            counted = _counted(rule, of) * share
            if not counted:
                continue  # sequences without a row
            Y = np.tensordot(rule.weight, each, 1)
            error, r = fitted(T, Y / counted)
            wider = _wider(rule.weight, np.trace(each, axis1=1, axis2=2))
            left = Left(error, r, rule.name, rule.alike, seen.rows(counted), wider=wider)
            found[side].add(Idea(rule.faults, None, rule.name), layer, left)


def _wider(weight: Array, trace: Array) -> float:
    """How many times more than their plain sum a weighted sum of the sequences varies by drawing.

    The traces vary each by itself, in proportion to their size.
    """

    def share(w: Array) -> float:
        return float(np.sqrt(((w * trace) ** 2).sum()) / max((w * trace).sum(), 1e-300))

    return max(1.0, share(weight) / max(share(np.ones_like(weight)), 1e-300))


def _counted(rule: Rule, of: Parts) -> float:
    """Rows: of what is not left out where weights are 0 or 1, else all."""
    if set(np.unique(rule.weight)) <= {0.0, 1.0}:
        return float(of.kept @ rule.weight)
    return float(of.kept.sum())


def rules(of: Parts, side: str, T: Array, each: Array) -> Iterator[Rule]:
    """Every rule that says something on this corpus."""
    N, order = len(of.sequences), np.arange(len(of.sequences))
    terms = of.labels.astype(float)
    if side == "G":
        inverse = np.where(terms > 0, 1 / np.maximum(terms, 1) ** 2, 0)
        yield Rule(("B3",), "each sequence's loss is divided by its labels", inverse)
        for size in range(2, N):
            batch = order // size
            m = np.bincount(batch, terms)
            weight = np.where(m > 0, 1 / np.maximum(m, 1) ** 2, 0)[batch]
            if (weight != weight[0]).any():  # else it is B1
                yield Rule(("B2",), f"means over batches of {size} sequences", weight)
    for size in range(1, N):
        begin = (N - 1) // size * size
        for first, more in ((begin, ""), (N - size, ", which does not divide them")):
            if first == begin or begin != N - size:
                name = f"the last batch of {size} sequences alone{more}"
                yield Rule(("B41",), name, (order >= first).astype(float))
    for world in (w for w in WORKERS if w <= N):
        for rank in range(world):
            every = (order % world == rank).astype(float)
            yield Rule(("B46",), f"worker {rank} of {world} alone, every {world}th", every)
            block = (order * world // N == rank).astype(float)
            yield Rule(("B46",), f"worker {rank} of {world} alone, a block", block)
    yield from _decays(of, T, each)


def _decays(of: Parts, T: Array, each: Array) -> Iterator[Rule]:
    """A moving average of batches, its decay fitted to theirs."""
    N = len(of.sequences)
    for size in (s for s in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32, 64) if 2 * s <= N):
        batch = np.arange(N) // size
        rows = np.maximum(np.bincount(batch, of.kept.astype(float)), 1)
        for kind in ("from zero", "from zero and corrected", "from the first"):

            def weight(decay: float, batch: Array = batch, rows: Array = rows,
                       kind: str = kind) -> Array:  # fmt: skip
                last = batch[-1]
                w = (1 - decay) * decay ** (last - np.arange(last + 1.0))
                if kind == "from the first":
                    w[0] = decay**last
                elif kind == "from zero and corrected":
                    w /= w.sum()
                return np.asarray((w / rows)[batch] * of.kept.sum())

            def off(decay: float) -> float:
                return fitted(T, np.tensordot(weight(decay), each, 1))[0]

            grid = np.linspace(0.02, 0.999, 50)
            best = int(np.argmin([off(x) for x in grid]))
            bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
            decay = minimize_scalar(
                off, bounds=bounds, method="bounded", options={"xatol": 1e-12}
            ).x
            if decay < LEAST:
                continue
            for value in (round(float(decay), 4), float(decay)):
                name = f"a moving average over batches of {size} sequences, {kind}"
                yield Rule(("B9",), f"{name}, with decay {value:.6g}", weight(value))
