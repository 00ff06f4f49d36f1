"""The simplest sufficient hypothesis: what is tried, how much each leaves, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.compare import drawing
from refcurv.judge.hypotheses import Index, Left, Seen, fitted, see, tries

Faults = tuple[str, ...]
Table = dict[Faults, dict[str, Left]]
"""Faults → layer → what they leave; the key () is no fault at all."""

COARSEST = 0.05
"""A budget above this explains nothing.  Chosen: ten times what bfloat16 costs."""

SHARPER = 10.0
"""How much smaller an error must become to count.  Chosen: rounding differs by less between layers.
"""

SAMPLE = 8
"""Layers that are searched at a time; what is found is tried on all.  Chosen: a few seconds."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """How far one side of a layer may be off: (dtype, budget), finest first; drawn, by drawing."""

    steps: tuple[tuple[str, float], ...]
    drawn: float

    def rank(self, error: float) -> int:
        """Which step the error is within; one more if drawing explains it, two more if nothing."""
        for k, (_, budget) in enumerate(self.steps):
            if error <= budget:
                return k
        drawing = error <= self.steps[0][1] + self.drawn
        return len(self.steps) + (not drawing)

    @property
    def by_drawing(self) -> int:
        """The rank of what drawing explains."""
        return len(self.steps)


def ladder(case: Case, layer: str, side: str, n_G: float | None) -> Ladder:
    """The budgets of one side of a layer: what is declared, and then every coarser dtype."""
    finest = case.arithmetic.stored or "float64"
    steps = [(finest, case.budget(layer, finest))]
    bare = replace(case, arithmetic=Arithmetic())
    for dtype in list(ROUNDOFF)[1:]:
        budget = bare.budget(layer, dtype)
        if steps[-1][1] < budget <= COARSEST:
            steps.append((dtype, budget))
    drawn = drawing(case, layer, n_G).norm if side == "G" else 0.0
    return Ladder(tuple(steps), 0.0 if math.isnan(drawn) else drawn)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for one side: faults, the layers that they explain, and what each leaves."""

    faults: Faults
    left: Mapping[str, Left]
    alike: tuple[Faults, ...] = ()


@dataclass(slots=True)
class Side:
    """The search on one side of all layers."""

    side: str
    ladders: dict[str, Ladder] = field(default_factory=dict)
    table: Table = field(default_factory=dict)
    chosen: list[Chosen] = field(default_factory=list)

    def add(self, faults: Faults, layer: str, left: Left) -> None:
        """Keep the best of what these faults leave in a layer."""
        entry = self.table.setdefault(faults, {})
        if layer not in entry or left.error < entry[layer].error:
            entry[layer] = left

    def plain(self, layer: str) -> Left:
        """What no fault at all leaves."""
        return self.table.get((), {}).get(layer, Left(math.inf, math.nan))

    def of(self, layer: str) -> tuple[Faults, Left]:
        """What was chosen for a layer; no fault where nothing was."""
        for one in self.chosen:
            if layer in one.left:
                return one.faults, one.left[layer]
        return (), self.plain(layer)

    def open(self) -> list[str]:
        """The layers whose form nothing has explained yet, or only a coarser dtype or drawing."""
        found = {layer for one in self.chosen for layer in one.left}
        return [
            layer
            for layer, steps in self.ladders.items()
            if layer not in found and steps.rank(self.plain(layer).error) > 0
        ]

    def unexplained(self) -> list[str]:
        """The layers that no dtype, no drawing and no fault explains."""
        return [
            layer
            for layer in self.open()
            if self.ladders[layer].rank(self.plain(layer).error) > self.ladders[layer].by_drawing
        ]

    def explains(self, faults: Faults, layer: str) -> bool:
        """Is theirs within a budget with these faults, and further from it without?"""
        left, steps = self.table[faults].get(layer), self.ladders[layer]
        if left is None:
            return False
        before, after = self.plain(layer).error, left.error
        rank = steps.rank(after)
        if rank >= steps.rank(before):
            return False
        if rank == steps.by_drawing:
            # chosen: a number fitted to noise takes less, and half the matrix is no explanation
            return after <= min(0.8 * before, 0.5)
        return after <= before / SHARPER

    def choose(self, layers: Collection[str], known: Mapping[str, Faults]) -> Chosen | None:
        """The simplest of what explains most of these layers.

        Args: known: layer → faults found on the other side, which cost nothing again.
        """
        options = []
        for faults in self.table:
            covered = [x for x in layers if self.explains(faults, x)]
            if faults != () and covered:
                options.append((faults, covered))
        if not options:
            return None
        most = max(len(covered) for _, covered in options)
        options = [one for one in options if 2 * len(one[1]) >= most]
        quality = {faults: self._quality(faults, covered) for faults, covered in options}
        best = min(quality.values())

        def key(one: tuple[Faults, list[str]]) -> tuple[float, ...]:
            faults, covered = one
            extra = len(set(faults) - set(known.get(covered[0], ())))
            worst = max(self.table[faults][x].error for x in covered)
            return extra, -len(covered), worst

        near = sorted((o for o in options if quality[o[0]] <= SHARPER * best), key=key)
        faults, covered = near[0]
        extra, _, worst = key(near[0])
        alike = tuple(
            o[0] for o in near[1:] if key(o)[0] == extra and key(o)[2] <= max(3 * worst, 1e-12)
        )
        return Chosen(faults, {x: self.table[faults][x] for x in covered}, alike)

    def _quality(self, faults: Faults, covered: Iterable[str]) -> float:
        """The largest error in finest budgets; 1 where it is within."""
        return max(
            max(1.0, self.table[faults][x].error / self.ladders[x].steps[0][1]) for x in covered
        )


def look(case: Case, layers: Iterable[str], found: Mapping[str, Side], index: Index) -> None:
    """Try everything that needs no model on these layers."""
    _try(case, layers, found, index, None)


def verify(
    case: Case, layers: Iterable[str], found: Mapping[str, Side], index: Index, faults: Faults
) -> None:
    """Try one hypothesis on further layers."""
    _try(case, layers, found, index, faults)


def _try(
    case: Case,
    layers: Iterable[str],
    found: Mapping[str, Side],
    index: Index,
    wanted: Container[str] | None,
) -> None:
    heads = None if case.model is None else case.model.config.head_width
    for layer in layers:
        for side, seen in see(case, layer).items():
            if usable(seen):
                for one in tries(seen, index, heads, wanted):
                    error, r = fitted(seen.T if one.T is None else one.T, one.Y)
                    found[side].add(one.faults, layer, Left(error, r, one.note, one.alike))


def usable(seen: Seen) -> bool:
    """Is there a form to search: square, finite and not 0?"""
    square = seen.T.ndim == 2 and seen.T.shape[0] == seen.T.shape[1]
    return square and bool(math.isfinite(seen.T.sum()) and seen.T.any())


def spread(names: Sequence[str], most: int = SAMPLE) -> list[str]:
    """Up to `most` of them, evenly spread, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(k * (len(names) - 1) / (most - 1))] for k in range(most)]


def rest(names: Iterable[str], without: Container[str]) -> Iterator[str]:
    """Those that are not yet among the others."""
    return (name for name in names if name not in without)
