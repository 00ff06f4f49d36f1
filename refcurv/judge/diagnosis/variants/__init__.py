"""A and G as another program may have made them: recomputed from model and corpus.

`settings` says what can have been done otherwise. `moments` recomputes A and G for it, `inputs` A
alone. `parts` gives what weighted sums over sequences and kinds of positions are made of.
"""

from __future__ import annotations

from refcurv.judge.diagnosis.variants.addends import KINDS, Part, Parts, parts
from refcurv.judge.diagnosis.variants.collecting import Moments, inputs, moments
from refcurv.judge.diagnosis.variants.setting import (
    REFERENCE,
    Setting,
    averaged,
    combined,
    fitting,
    settings,
)

__all__ = [
    "KINDS",
    "REFERENCE",
    "Moments",
    "Part",
    "Parts",
    "Setting",
    "averaged",
    "combined",
    "fitting",
    "inputs",
    "moments",
    "parts",
    "settings",
]
