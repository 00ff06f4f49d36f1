"""What a planted bug is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from refcurv.judge.cases.truth import Truth
from refcurv.law.checks import Array

Changed = Mapping[str, Array]
"""Arrays of a case, by name, that a bug makes others."""

Plant = Callable[[Truth], Changed]


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted bug.

    Fields: id, in the catalogue; type, of fault; what: the sentence of the manifest; needs, what a
    harness must compute to see it; plant: truth → changed arrays, {} where the bug has no subject.
    """

    id: str
    type: str
    what: str
    needs: str
    plant: Plant
