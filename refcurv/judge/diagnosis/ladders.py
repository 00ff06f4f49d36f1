"""How far one side of a layer may be off: by the rounding of each dtype, and by drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.compare import drawing, tells
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.drawn import NO_DRAWING, Drawing

COARSEST = 0.05
"""A budget above this explains nothing.  Chosen: ten times what bfloat16 costs."""

DECLARED = "as declared"
"""The step of a ladder that is the budget, where what rounding does is known better."""

FINE = ("float64", "float32", DECLARED)
"""Steps of a ladder that are no dtype coarser than what is declared."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """How far one side of a layer may be off.

    Fields: steps, (dtype, budget), finest first; drawing, what drawing explains, NO_DRAWING where
    nothing is known; same, below which a form says that the labels are the same.
    """

    steps: tuple[tuple[str, float], ...]
    drawing: Drawing = NO_DRAWING
    same: float = 0.0

    @property
    def drawn(self) -> float:
        """How far it may be off by drawing."""
        return self.drawing.norm

    def by_chance(self, factor: float) -> bool:
        """Is a factor of tr G within what drawing and rounding explain? Also one that is NaN."""
        return not abs(factor - 1) > 2 * self.steps[0][1] + self.drawing.of_factor(factor)

    def tolerance(self, rank: int, left: Left) -> float:
        """How far a factor may be from what it is, given how well the form fits.

        A form that other labels may have says nothing of the dtype that the factor has.
        """
        other = self.drawn > 0 and left.drawn and left.error >= self.same
        if rank < self.by_drawing and not other:
            return 2 * self.steps[rank][1] * left.blur
        return 2 * self.steps[0][1] * left.blur + self.drawing.of_factor(left.ratio)

    def rank(self, error: float, spread: float = 0.0, roomy: float = 1.0) -> int:
        """Which step the error is within; one more if drawing explains it, two more if nothing.

        Args: spread, what labels that nobody knows explain beside; roomy, of `Left`.
        """
        for k, (_, budget) in enumerate(self.steps):
            if error <= roomy * budget:
                return k
        drawing = error <= self.steps[0][1] + max(self.drawn, spread)
        return len(self.steps) + (not drawing)

    @property
    def declared(self) -> float:
        """The budget of what is declared."""
        return next((b for dtype, b in self.steps if dtype == DECLARED), self.steps[0][1])

    @staticmethod
    def whole(left: Left) -> float:
        """|T − Y| over |Y|, where T/r is `error` from Y, and T − r Y is at right angles to Y."""
        return math.hypot(left.ratio * left.error, left.ratio - 1)

    @property
    def by_drawing(self) -> int:
        """The rank of what drawing explains."""
        return len(self.steps)


def ladder(case: Case, layer: str, side: str, n_G: float | None) -> Ladder:
    """The budgets of one side of a layer: what is declared, and then every coarser dtype."""
    finest = case.arithmetic.stored or "float64"
    steps = [(finest, case.budget(layer, finest, side))]
    bare = replace(case, arithmetic=Arithmetic())
    for dtype in list(ROUNDOFF)[1:]:
        budget = bare.budget(layer, dtype, side)
        if steps[-1][1] < budget <= COARSEST:
            steps.append((dtype, budget))
    drawn = drawing(case, layer, n_G)
    if side == "A" or not drawn.known:
        return Ladder(tuple(steps))
    if not drawn.norm:
        return Ladder(tuple(steps))
    telling = case.once(("tells", layer), lambda: tells(case.means(layer)[1], drawn))
    same = min(case.budget(layer, "float32"), telling)
    return Ladder(tuple(steps), drawn, same)
