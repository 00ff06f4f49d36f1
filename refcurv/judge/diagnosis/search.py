"""The simplest sufficient hypothesis: what each leaves of one side, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from refcurv.judge.diagnosis.ladders import DECLARED, FINE, Ladder
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.variants import Setting
from refcurv.judge.diagnosis.variants.networks import COARSE
from refcurv.judge.diagnosis.variants.setting import HALVES, OPERANDS

Faults = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Idea:
    """A hypothesis that may hold in many layers.

    Fields: faults; setting, if it has one; name, where faults and setting do not tell it.
    """

    faults: Faults
    setting: Setting | None = None
    name: str = ""


PLAIN = Idea((), None, "ours")
"""No fault at all."""

Table = dict[Idea, dict[str, Left]]
"""Hypothesis → layer → what it leaves."""

SHARPER = 10.0
"""How much smaller an error must become to count.  Chosen: rounding differs by less between layers.
"""

ROUNDING = 1e-12
"""What recomputing leaves of a form that is the same.  Chosen: a hundred times what it leaves."""

NEARER = 0.7
"""What a rounding that is simulated must leave of an error, at most, where the other side has it.
Half of the squared error is explained then: roundings in another order are not all the same.
"""

WIDER = 3.0
"""How much more than of ours rounding explains of a hypothesis.  Chosen: it may cancel more."""

SAMPLE = 8
"""Layers that are searched at a time; what is found is tried on all.  Chosen: a few seconds."""

FEW = 3
"""As SAMPLE, of a large model."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for one side, the layers that it explains, and what it leaves in each."""

    idea: Idea
    left: Mapping[str, Left]
    alike: tuple[Faults, ...] = ()

    @property
    def faults(self) -> Faults:
        """Its ids."""
        return self.idea.faults


@dataclass(slots=True)
class Side:
    """The search on one side of all layers.

    Fields: passed, does drawing explain every difference; sampled, what of its error a hypothesis
    left on a few sequences, as a share, in words; odd, layers that are off by as much as a coarser
    dtype would be, and by none; gauged, layers whose factor that of the other side takes back;
    inputs, of G, the side of A.
    """

    side: str
    ladders: dict[str, Ladder] = field(default_factory=dict)
    table: Table = field(default_factory=dict)
    chosen: list[Chosen] = field(default_factory=list)
    sampled: dict[Idea, tuple[float, str]] = field(default_factory=dict)
    passed: bool = False
    odd: set[str] = field(default_factory=set)
    gauged: set[str] = field(default_factory=set)
    inputs: Side | None = None

    def add(self, idea: Idea, layer: str, left: Left) -> None:
        """Keep the best of what a hypothesis leaves in a layer."""
        entry = self.table.setdefault(idea, {})
        if layer not in entry or left.error < entry[layer].error:
            entry[layer] = left

    def plain(self, layer: str) -> Left:
        """What no fault at all leaves."""
        return self.table.get(PLAIN, {}).get(layer, Left(math.inf, math.nan))

    def of(self, layer: str) -> tuple[Idea, Left]:
        """What was chosen for a layer; no fault where nothing was."""
        for one in self.chosen:
            if layer in one.left:
                return one.idea, one.left[layer]
        return PLAIN, self.plain(layer)

    def rank(self, layer: str, left: Left) -> int:
        """`Ladder.rank` of what is left."""
        steps = self.ladders[layer]
        rank = steps.rank(left.error, max(left.spread, left.wider * steps.drawn), left.roomy)
        drawn = rank > steps.by_drawing and steps.whole(left) <= steps.steps[0][1] + steps.drawn
        return steps.by_drawing if drawn else rank

    def open(self) -> list[str]:
        """The layers that no hypothesis has explained, and that are not exactly ours."""
        found = {layer for one in self.chosen for layer in one.left}
        return [
            layer
            for layer in self.ladders
            if layer not in found and self.rank(layer, self.plain(layer)) > 0
        ]

    def unexplained(self) -> list[str]:
        """The layers that no dtype, no drawing and no fault explains."""
        ranks = {x: self.rank(x, self.plain(x)) for x in self.open()}
        return [x for x, n in ranks.items() if n > self.ladders[x].by_drawing or x in self.odd]

    def sized(self) -> list[str]:
        """The layers that are off by as much as a dtype would be that is coarser than float32."""
        return [
            x
            for x in self.open()
            if 0 < (n := self.rank(x, self.plain(x))) < self.ladders[x].by_drawing
            and self.ladders[x].steps[n][0] not in FINE
        ]

    def settled(self, layers: Iterable[str]) -> bool:
        """Are all of these exactly ours, so that no hypothesis has anything to explain?"""
        known = {x: self.plain(x) for x in layers if x in self.ladders}
        return all(self.rank(x, left) == 0 and self.whole(x, left) for x, left in known.items())

    def explains(self, idea: Idea, layer: str, free: bool = False) -> bool:
        """Is theirs within a budget with it, and further from it without?

        Args: free: its faults are known from the other side. Then a factor or a count that it
            explains is enough, if the form is no worse.
        """
        left = self.table[idea].get(layer)
        if left is None:
            return False
        plain, steps = self.plain(layer), self.ladders[layer]
        rank, before = self.rank(layer, left), steps.rank(plain.error)
        if free and rank <= before and rank <= steps.by_drawing:
            if is_coarse(idea.setting) and left.error <= NEARER * plain.error:
                return True
            same = left.error <= 2 * plain.error + ROUNDING
            return rank < before or (
                same and self._settled(layer, left) > self._settled(layer, plain)
            )
        if rank >= before:
            return self._resizes(idea, layer)
        if rank == steps.by_drawing:
            # chosen: a number fitted to noise takes less, and half the matrix is no explanation;
            # with a spread a test was passed already (`unknown`)
            return left.error <= (0.5 if left.spread else min(0.8 * plain.error, 0.5))
        widest = WIDER * steps.steps[0][1] if steps.steps[rank][0] == DECLARED else math.inf
        # with no number fitted, what it makes of the factor is explained too
        sized = self.whole(layer, left) and not self.unit(layer, plain)
        off = max(plain.error, steps.whole(plain) if sized and plain.ratio > 0 else 0.0)
        return left.error <= min(off / SHARPER, widest)

    def sizes(self, idea: Idea, layer: str) -> bool:
        """Labels are drawn, and no drawing explains theirs over ours. Is it what this makes?"""
        left, plain, steps = self.table[idea][layer], self.plain(layer), self.ladders[layer]
        far = not steps.by_chance(plain.trace)  # no dump that passes is
        other = steps.drawn > 0 and far and not self.unit(layer, plain) and layer not in self.gauged
        return idea.setting is not None and other and self.unit(layer, left)

    def _resizes(self, idea: Idea, layer: str) -> bool:
        """Does it explain a factor where drawing explains the form, and come nearer too?"""
        left, plain = self.table[idea][layer], self.plain(layer)
        drawn = max(self.rank(layer, left), self.rank(layer, plain))
        nearer = left.error <= min(0.8 * plain.error, 0.5)  # as in `explains`
        return drawn <= self.ladders[layer].by_drawing and nearer and self.sizes(idea, layer)

    def refuted(self, idea: Idea) -> bool:
        """Is it a network, or a text, whose A is another than ours, where theirs is ours?

        Proof: tests/test_judge_sides.py::test_what_A_would_show_explains_no_G_alone
        """
        if idea.setting is None or self.inputs is None:
            return False
        one, A = idea.setting.read, self.inputs
        lefts = A.table.get(Idea(one.faults, one), {})
        return any(A.rank(x, A.plain(x)) == 0 < A.rank(x, left) for x, left in lefts.items())

    def follows(self, idea: Idea, layer: str, most: float = 0.0) -> bool:
        """May it hold here too, for it explains most layers? A budget is that of ours alone.

        Args: most, what it leaves of those: where it is near without being equal, of others it may
            leave as much.
        """
        left, plain = self.table[idea].get(layer), self.plain(layer)
        if left is None or self.ladders[layer].drawn:
            return False
        near = left.error <= min(WIDER * most, plain.error / SHARPER)
        return near or left.error <= min(WIDER * self.ladders[layer].declared, plain.error / 2)

    def unit(self, layer: str, left: Left) -> bool:
        """Is theirs what is left of it, without a factor?"""
        tolerance = self.ladders[layer].tolerance(self.rank(layer, left), left)
        return abs(left.ratio - 1) <= left.wider * tolerance + left.spread

    def whole(self, layer: str, left: Left) -> bool:
        """Is nothing left of it to explain: no factor, and no row more or less?"""
        return self.unit(layer, left) and left.rows in (None, 1)

    def _settled(self, layer: str, left: Left) -> int:
        """How many of its factor and its count are explained."""
        return self.unit(layer, left) + (left.rows in (None, 1))

    def drawn(self, layer: str) -> bool:
        """Does drawing explain the layer without any fault, its factor too?

        Also where a form agrees better, as one of rank one always does.
        """
        steps, left = self.ladders[layer], self.plain(layer)
        fits = steps.drawn > 0 and steps.whole(left) <= steps.steps[0][1] + steps.drawn
        fits &= steps.by_chance(left.trace)
        return fits and left.error >= steps.same and self.of(layer)[0] == PLAIN

    def choose(self, layers: Collection[str], known: Mapping[str, Idea]) -> Chosen | None:
        """The simplest of what explains most of these layers.

        Args: known: layer → what was found on the other side, which costs nothing again.
        """
        options = self._options(layers, known)
        if not options:
            return None
        most = max(len(one.covered) for one in options)
        options = [one for one in options if 2 * len(one.covered) >= most]
        best = min(one.quality for one in options)
        near = sorted((o for o in options if o.quality <= SHARPER * best), key=Option.key)
        first = near[0]
        alike = tuple(
            one.idea.faults
            for one in near[1:]
            if one.extra == first.extra and one.worst <= max(3 * first.worst, 1e-12)
        )
        return Chosen(first.idea, {x: self.table[first.idea][x] for x in first.covered}, alike)

    def free(self, idea: Idea, layer: str, known: Idea) -> bool:
        """Is it known from the other side: its faults, and no network whose A is not theirs?

        Proof: tests/test_judge_sides.py::test_another_network_of_the_same_fault_is_not_free
        """
        if not idea.faults or not {*idea.faults} <= {*known.faults}:
            return False
        if idea.setting is None or known.setting is None or self.inputs is None:
            return True
        one, A = idea.setting.read, self.inputs
        left = A.table.get(Idea(one.faults, one), {}).get(layer)
        if one == known.setting.read or left is None:
            return True
        return A.rank(layer, left) <= A.rank(layer, A.of(layer)[1])

    def _options(self, layers: Collection[str], known: Mapping[str, Idea]) -> list[Option]:
        out = []
        for idea, lefts in self.table.items():
            free = {x: self.free(idea, x, known[x]) for x in layers}
            covered = [x for x in layers if idea != PLAIN and self.explains(idea, x, free[x])]
            covered = [] if covered and self.refuted(idea) else covered
            if covered:
                more = {*idea.faults} - {*known[covered[0]].faults}
                extra = len(more) or not free[covered[0]]
                left = [lefts[x] for x in covered]
                finest = [self.ladders[x].steps[0][1] * lefts[x].roomy for x in covered]
                scaled = sum(not self.whole(x, lefts[x]) for x in covered)
                quality = max(max(1.0, y.error / b) for y, b in zip(left, finest, strict=True))
                worst = max(one.error for one in left)
                out.append(Option(idea, covered, quality, extra, scaled, worst))
        return out


@dataclass(frozen=True, slots=True)
class Option:
    """A hypothesis that explains some layers.

    Fields: quality, its largest error in finest budgets, 1 where it is within; extra, how many
    faults it adds; scaled, in how many layers a factor or a count is left; worst, its largest
    error.
    """

    idea: Idea
    covered: list[str]
    quality: float
    extra: int
    scaled: int
    worst: float

    def key(self) -> tuple[float, ...]:
        """The simplest comes first."""
        return self.extra + bool(self.scaled), -len(self.covered), self.scaled, self.worst


def is_coarse(setting: Setting | None) -> bool:
    """Does it round on the way, so that theirs may be near without being equal?"""
    if setting is None:
        return False
    short = setting.tensor_G in HALVES or {setting.tensor_A, setting.tensor_G} & {*OPERANDS}
    return bool(short) or any(name in COARSE for name, _ in setting.network)


def spread(names: Sequence[str], most: int = SAMPLE) -> list[str]:
    """Up to `most` of them, evenly spread, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(k * (len(names) - 1) / (most - 1))] for k in range(most)]


def rest(names: Iterable[str], without: Container[str]) -> Iterator[str]:
    """Those that are not yet among the others."""
    return (name for name in names if name not in without)
