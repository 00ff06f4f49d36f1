"""How far floats may be from the real numbers: budgets of passes, blocks and eigenvalues.

Budgets of whole passes are derived to first order.

A pass makes numbers r. Each is a sum of terms whose magnitudes add up to M_r, or a function of one
number, M_r = |r|. Its rounding is δ_r M_r. To first order a result y is off by Σ_r δ_r M_r ∂y/∂r.
Let s² = Σ_r ‖M_r ∂y/∂r‖² over all R of these numbers, of n roundings each at most. Then

    worst      |δ_r| <= γ(n), whatever the signs:   ‖Δy‖ <= γ(n) Σ_r ‖M_r ∂y/∂r‖ <= γ(n) √R s
    probable   roundings of either sign by chance:  ‖Δy‖ <= λ √n u s, but for odds of 2 exp(−λ²/2)

The first is Cauchy and Schwarz's; γ, λ and u are those of `law.tolerance`. The second is Pinelis's
bound for sums of independent vectors (1994, Theorem 3.5), whose odds are 3e-14 for each array. What
they stand on is said: second-order terms are left out, s is the mean of shaken runs, and the
roundings of an elementary function are a chosen number. There is no budget where a run overflows,
and no worst one where γ has no digit left. Dense blocks (`certified.blocks`) are such results too.

An eigensolver is exact for A + E, ‖E‖ <= p(d) eps ‖A‖ (`tolerance.eigenpair`), and its A is off by
ΔA, of which it reads one half. So eigenvalues in order, as a vector, are off by ‖E‖ + √2 ‖ΔA‖ at
most (Hoffman & Wielandt 1953), in Frobenius norm. Negative ones become 0: no real one is below it.

Proof: tests/test_certified.py::test_every_route_lies_within_its_budgets,
    ::test_a_route_with_a_wrong_term_is_outside_its_budgets
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.shaken import SHAKE, ShakenSums, Shakes
from refcurv.certified import blocks
from refcurv.certified.numbers import Found, Kind, Task, floats, run
from refcurv.curvature.definition import Sequence
from refcurv.law import tolerance
from refcurv.law.checks import Array, NonFiniteError, RangeError
from refcurv.model.layers import DEFINITIONS, rope_frequencies

RUNS: Final = 4
"""Shaken runs that s is the mean of.  Chosen: the odds that s of one number alone comes out eight
times too small, so that λ is used up, are 5e-4; of arrays of a dozen numbers there are none."""

ELEMENTARY: Final = 8
"""Roundings of exp, tanh, erf and the like.  Chosen: NumPy's and SciPy's are within four ulps."""


def shaken(shakes: Shakes) -> Kind:
    """float64 on the definitions, every number that they make shaken by the size of its terms."""
    plain = floats("float64")

    def tables(
        position: Array, width: int, theta: float, dtype: Any, scaling: Any, length: Any
    ) -> Any:
        """`model.layers.rope_tables`, whose frequencies and angles are rounded too."""
        wide = np.dtype(np.float64)
        f = ShakenSums.of(rope_frequencies(width, theta, scaling, wide, length), shakes)
        angle = position[:, :, None, None].astype(np.float64) * f
        size = 1.0 if scaling is None else scaling.attention
        return size * np.cos(angle), size * np.sin(angle)

    def along(x: Array, v: Array) -> Array:
        return ShakenSums.of(plain.along(x, v), shakes)

    ops = replace(DEFINITIONS, rope_tables=tables)
    return replace(plain, name="shaken", ops=ops, number=lambda x: ShakenSums.of(x, shakes),
                   along=along)  # fmt: skip


@dataclass(slots=True)
class Shaking:
    """Shaken runs beside the float64 one, and how far they moved each array.

    Fields: task; rows, of all sequences and backward passes; moved, {array: √Σ ‖move‖² over the
    runs}; shape; own, {array: its norm}; missing, whether a run overflowed.
    """

    task: Task
    rows: int
    seed: int = 0
    moved: dict[str, float] = field(default_factory=dict)
    shape: dict[str, tuple[int, ...]] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    missing: bool = False
    _runs: list[tuple[Shakes, Kind, Found]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for n in range(RUNS):
            shakes = Shakes(np.random.default_rng([self.seed, n]))
            self._runs.append((shakes, shaken(shakes), Found()))

    def sequence(self, number: int, one: Sequence, plain: Found) -> None:
        """Every run of one sequence. `plain` is float64's, which holds its arrays still."""
        for _, kind, found in self._runs:
            if self.missing:
                return
            try:
                run(kind, self.task, number, one, found)
                if {*blocks.BLOCKS} & {*self.task.of}:
                    blocks.run(kind, self.task, number, one, found)
            except NonFiniteError:
                self.missing = True
            self._take(found.arrays, plain.arrays)
            found.arrays = {}

    def means(self, plain: Found) -> None:
        """A and G, at the end."""
        here = dict(plain.totals())
        for _, _, found in self._runs:
            self._take({} if self.missing else dict(found.totals()), here)

    def _take(self, moved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for name, x in moved.items():
            if name not in here:  # float64 itself has overflowed
                continue
            own, far = np.asarray(here[name]), np.asarray(x)
            self.own[name], self.shape[name] = float(norm(own)), own.shape
            self.moved[name] = math.hypot(self.moved.get(name, 0.0), float(norm(far - own)))

    def size(self, name: str) -> float:
        """s of an array: of its own rounding at least."""
        return max(self.own[name], self.moved[name] / SHAKE / math.sqrt(RUNS))

    def terms(self, name: str) -> int:
        """n: roundings of a number. A complex step's product of two numbers has twice as many."""
        config = self.task.config
        patch = config.image.patch_size if config.image else 0
        heads = config.heads * config.head_width
        longest = max(config.width, config.mlp_width, heads, config.vocabulary, patch, self.rows)
        if name.startswith("ggn."):  # a sum over rows and their logits
            longest = max(longest, self.rows * config.vocabulary)
        return (1 if name.split(".", maxsplit=1)[0] in REAL else 2) * longest + ELEMENTARY

    def budget(self, kind: str, name: str, dtype: str) -> float | None:
        """Of ‖error‖ of an array in a dtype; None: there is none."""
        if name.startswith(EIGENVALUES):
            return self._eigenvalues(kind, name.removeprefix(EIGENVALUES), dtype)
        if self.missing or name not in self.moved:
            return None
        try:
            return {"probable": probable, "worst": worst}[kind](self, name, dtype)
        except RangeError:
            return None

    def _eigenvalues(self, kind: str, moment: str, dtype: str) -> float | None:
        """‖E‖ + √2 ‖ΔA‖ of A or G."""
        off = self.budget(kind, moment, dtype)
        if off is None:
            return None
        solver = tolerance.eigenpair(self.shape[moment][0], dtype) * self.own[moment]
        return solver + math.sqrt(2) * off

    @property
    def numbers(self) -> int:
        """R: how many numbers one run makes."""
        return max(shakes.drawn for shakes, _, _ in self._runs)


REAL: Final = ("logits", "nats", "gradient", "A", "G", "fisher")
"""Quantities of a pass on real numbers."""

EIGENVALUES: Final = "eigenvalues."
"""What the names of eigenvalues begin with, before those of their matrices."""


def probable(runs: Shaking, name: str, dtype: str) -> float:
    """λ √n u s.

    Kind: probable, first order; odds of 3e-14 for each array that roundings by chance exceed it.
    """
    return tolerance.probable(runs.terms(name), dtype) * runs.size(name)


def worst(runs: Shaking, name: str, dtype: str) -> float:
    """γ(n) √R s.

    Kind: worst case, first order.
    """
    return tolerance.gamma(runs.terms(name), dtype) * math.sqrt(runs.numbers) * runs.size(name)
