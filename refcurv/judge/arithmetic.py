"""Budgets from another program's arithmetic: the dtypes of its model, products, sums and solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

from refcurv.law import tolerance
from refcurv.law.checks import ConventionError, require_choice
from refcurv.law.dtypes import require_float

ROUNDOFF: Final = MappingProxyType(
    {
        "float64": 2.0**-53,
        "float32": 2.0**-24,
        "tf32": 2.0**-11,
        "float16": 2.0**-11,
        "bfloat16": 2.0**-8,
    }
)
"""u of each dtype, half the spacing at 1, from the finest to the coarsest. tf32 is float32 whose
operands in products are cut to 11 bits, as some accelerators do it."""

AMPLIFICATION: Final = 2.0
"""How many roundings of the model's dtype a or g has, relative to its own size, where nothing says.

Chosen. On an accelerator, over four MLPs of a trained model, the error of A and G was 0.6 to 1.3 u
in bfloat16, 0.6 to 2.9 u in float16, 0.2 to 0.6 u in TF32 and 1.7 to 6.7 u in float32, its sums
included. Twice AMPLIFICATION and a rounding of each operand, 6 u, plus the sums is allowed here.
"""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The dtypes of another program, names of ROUNDOFF; None where they are not declared.

    Fields: model, of forward and backward; products, of the operands of a aᵀ and g gᵀ; sums, of
    what these are added in; solver, of the eigensolver; stored, of the file.
    """

    model: str | None = None
    products: str | None = None
    sums: str | None = None
    solver: str | None = None
    stored: str | None = None

    @property
    def text(self) -> str:
        """The declared dtypes in words."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = [f"{name} {dtype}" for name, dtype in own.items() if dtype]
        return ", ".join(parts) or "no dtype is declared"

    @property
    def declared(self) -> bool:
        """Is the dtype of every part of A and G declared?"""
        return None not in (self.model, self.products, self.sums)

    def filled(self, dtype: str) -> Arithmetic:
        """What is not declared is `dtype`, but sums and solver are float32 at least.

        Sums in a shorter float are a fault (B58), which no size of an error declares.
        """
        longer = "float32" if ROUNDOFF[dtype] > ROUNDOFF["float32"] else dtype
        as_these = {"sums": longer, "solver": longer}
        names = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: as_these.get(name, dtype) for name in names})

    def or_else(self, other: Arithmetic) -> Arithmetic:
        """What is not declared here is as `other` declares it."""
        missing = {f.name: getattr(other, f.name) for f in fields(self)}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Arithmetic(**{name: own[name] or missing[name] for name in own})


def parse(who: str, text: str) -> Arithmetic:
    """`"bfloat16"`, of everything, or `"model=bfloat16,sums=float32"`.

    Raises ConventionError: a part or a dtype that is unknown, or a part twice.
    """
    if not isinstance(text, str):
        raise ConventionError(f"{who}: arithmetic must be a text; got {type(text).__name__}.")
    parts = {f.name for f in fields(Arithmetic)}
    found: dict[str, str] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        name, equals, dtype = piece.rpartition("=")
        dtype = require_float(who, "a dtype", dtype.strip(), ROUNDOFF)
        names = parts if not equals else {require_choice(who, "a part", name.strip(), parts)}
        if found.keys() & names:
            raise ConventionError(f"{who}: {text!r} says twice what {min(names)} is.")
        found |= dict.fromkeys(names, dtype)
    return Arithmetic(**found)


CHAIN: Final = 2**16
"""Chosen: no sum adds more terms than this one after another. A product of more rows than that is
split by libraries or by memory, and batches are fewer. Without a limit the budget of sums in
float32 would reach the error of TF32 at 130,000 rows, and that of bfloat16 at 80 million.
"""


def moment_budget(
    arithmetic: Arithmetic,
    rows: float,
    amplification: float | None = None,
    noise: float = 0.0,
    flat: float = 1.0,
) -> float:
    """How far A or G may be from the truth, |A' − A| over |A|, in Frobenius norm.

    Definition
        2 κ₀ u + ν u + (κ u)²  + 2 u(products) + 8 √(m/3) u(sums) + u(stored)
        u is the model's. κ₀ = AMPLIFICATION is what all rows have in common, as from a weight that
        is rounded. κ u is the error of one row, relative to it. Errors of n rows that are alike
        fall by √n, and leave their squares, if they point as many ways as the rows: ν is
        min(2, 12/√rows) κ tr A/|A| at least, six standard deviations. For tr A is the mean square
        of a row's size, and |A| is less where rows point many ways, as `flat` says. Where few rows
        err most, and have most of the sum, nothing falls: then ν is `noise`, what these rows show.
        u(products) is one rounding for each operand. m is rows, or CHAIN if that is less. For
        8 √(m/3) u see Sums.

    Sums
        Addition k rounds each entry of the partial sum S_k by at most u, in either direction. So
        the error is a martingale whose step k has a norm of at most u |S_k|. By Pinelis (1994,
        theorem 3.5) its norm exceeds 8 u √(Σ |S_k|²) with odds of 2 exp(−32) = 3e-14, whatever the
        size of the matrix. Rows in no special order give |S_k| = (k/m) |S|, and Σ |S_k|² is m/3
        times |S|². A sum in blocks, rows in a product and products one after another, has less.

    Args:
        arithmetic: with no part left out (`Arithmetic.filled`).
        rows: how many were summed.
        amplification: κ where it is known (NEGATIVE); AMPLIFICATION at least.
        noise: how many u the sum may be off by its rows' own errors (`Factor.noise_G`).
        flat: tr A/|A|, from 1 of rows that are all parallel to √d of all ways alike.

    Kind: probable; the worst case of 100,800 rows of float32, 6e-3, would hide bfloat16.

    Proof: tests/test_judge.py::test_budgets_stand_between_measured_errors
    """
    u = {f.name: ROUNDOFF[getattr(arithmetic, f.name)] for f in fields(arithmetic)}
    rows = max(rows, 1)
    own = max(AMPLIFICATION, amplification or 0.0) * u["model"]
    shared = 2 * AMPLIFICATION * u["model"]
    sums = tolerance.LAMBDA * math.sqrt(min(rows, CHAIN) / 3) * u["sums"]
    rows_own = max(min(2.0, 12 / math.sqrt(rows)) * flat * own, noise * u["model"])
    return shared + rows_own + own**2 + 2 * u["products"] + sums + u["stored"]
