"""What drawn labels explain in one layer: the record that `draws` makes and all others read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from scipy import special

DEVIATIONS: Final = 4.0
"""Standard errors of the norm of a difference that drawn labels are taken to explain, where only a
standard error is known.

Chosen. By Markov's inequality |G − E G|² exceeds 16 times its mean with odds of at most 1/16,
whatever the rows are. Where many rows are summed the norm is nearly that of a normal matrix, and
the odds are below 1e-4.
"""


def deviations(freedom: int) -> float:
    """DEVIATIONS where the standard error is itself estimated, from so many degrees of freedom.

    Student's t exceeds it with the odds of a normal number beyond DEVIATIONS: 4.6 for 31, 8.5 for
    7, 10,000 for a single one.
    """
    return -float(special.stdtrit(freedom, special.ndtr(-DEVIATIONS)))


ODDS: Final = 1e-3
"""Odds of an honest program to fail by drawing, over all numbers of a dump that are compared."""


def reach(freedom: int, numbers: int) -> float:
    """How many standard errors each of so many numbers may be off; `freedom`, of the estimate.

    Definition
        One number is further off with odds of ODDS/numbers, so that any is with ODDS at most. |D|²
        of a normal matrix D exceeds x times its mean, x beyond 1.54, with odds of at most those of
        one normal number, whatever the entries' covariance is (Székely and Bakirov 2003). So
        Student's t counts, for a norm and for a sum.

    Proof: tests/test_judge_factors.py::test_lambda_is_refused_as_often_as_is_stated
    """
    return float(special.stdtrit(freedom, 1 - ODDS / numbers / 2))


LITTLE: Final = 0.1
"""Chosen: where a standard error lets drawing explain more of G than this, the corpus's labels may
look like drawn ones, and nothing passes by it."""

RARE: Final = 8.0
"""So many times DEVIATIONS standard errors are no drawing, where it explains more than LITTLE.

By Markov's inequality |G − E G|² exceeds them with odds of at most 1/1024. Few labels may then
carry most of G, so that DEVIATIONS alone are exceeded now and then.
"""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How far theirs may be from ours by drawing: 0 where neither draws, NaN if nobody knows.

    Fields:
        norm: of G, over |G|. trace: of tr G, over tr G. form: of G/tr G, over its norm.
        below: `trace` where theirs is less than ours, below 1; None where it is the same.
        draws: so many honest dumps were drawn, and lie within; 0 where a standard error tells it.
    """

    norm: float
    trace: float
    form: float
    draws: int = 0
    below: float | None = None

    @property
    def known(self) -> bool:
        """Is it known how much drawing explains?"""
        return not math.isnan(self.norm)

    @property
    def told(self) -> bool:
        """Were honest dumps drawn? Then diagnosis tells the corpus's labels from drawn ones."""
        return self.draws > 0

    def of_factor(self, factor: float) -> float:
        """How far from 1 a factor of tr G may be, on its own side of 1.

        Few labels may well give twice G and more. No factor below 1 is as far as that, so that
        with one limit for both sides nothing would be too small.

        Proof: tests/test_judge_drawing.py::test_nothing_is_too_small_by_drawing_alone
        """
        return self.trace if self.below is None or factor >= 1 else self.below

    @property
    def reach(self) -> float:
        """How far G/tr G may be off before it is certain that drawing does not explain it."""
        return self.form if self.told or self.form <= LITTLE else RARE * self.form


NO_DRAWING: Final = Drawing(0.0, 0.0, 0.0)
UNKNOWN: Final = Drawing(math.nan, math.nan, math.nan)
