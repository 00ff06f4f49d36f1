"""What another program's files hold, in our units as far as these files say: `foreign` reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from refcurv.judge.arithmetic import Arithmetic
from refcurv.law.checks import Array


@dataclass(frozen=True, slots=True)
class Theirs:
    """What a dump holds of one layer; None where it holds nothing. Arrays are float64.

    Fields:
        A (I, I), G (O, O): means over rows, as A and G of COUNTS, after the recipe of the dump.
            They are as they came: perhaps not symmetric, not finite, of another shape.
        n_A, n_G: over how many rows, of G times draws. None where the dump does not say.
        U_A (I, I), mu (I,), U_G (O, O), lam (O,): eigenvectors as columns, in their order.
        Lambda (O, I): EK-FAC's corrected eigenvalues, one for each pair of their eigenvectors.
        mask (O, I): bool, the pairs that their edit keeps. W (O, I): the edited weight.
        stored: the dtype of each of these in the file, by the name of the field.
    """

    A: Array | None = None
    n_A: float | None = None
    G: Array | None = None
    n_G: float | None = None
    U_A: Array | None = None
    mu: Array | None = None
    U_G: Array | None = None
    lam: Array | None = None
    Lambda: Array | None = None
    mask: Array | None = None
    W: Array | None = None
    stored: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dump:
    """Another program's factors, bases, corrections or edits.

    Fields:
        program: whose format it is: "official", "torch", "kronfluence", "bergson", "npz", "hdf5",
            "memory" or "refcurv".
        layers: by their names, in their order; read at each access, so that one is held at a time.
        holds: for each of these names, which fields of `Theirs` there are (known without reading).
        recipe: what was done to bring theirs to our units, a sentence for each step.
        scale_free: the sides, of "A" and "G", whose scale the format does not record.
        declared: what the dump says of how it was made: "fisher", "rows", "bias", "reduction", ...
            in the words of the law where there are any; "Lambda", per "token" or "sequence", and
            "Lambda_over", what it was divided by: "rows", "sequences" or "unknown".
        arithmetic: the dtypes that the dump declares.
        problems: what is wrong with the dump as a whole, a sentence for each.
        shapes: for these names, (O, I) as far as it is known without reading; None where it is not.
    """

    program: str
    layers: Mapping[str, Theirs]
    holds: Mapping[str, frozenset[str]]
    recipe: tuple[str, ...] = ()
    scale_free: frozenset[str] = frozenset()
    declared: Mapping[str, str] = field(default_factory=dict)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    problems: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)


def first_names(names: Iterable[object], most: int = 4) -> str:
    """The first names, quoted, and how many more there are: for a message."""
    every = [f"{str(name)!r:.60}" for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more or "nothing"
