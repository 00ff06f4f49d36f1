"""The bugs that cases have: which of the faults that can be injected, and of what kind each is."""

from __future__ import annotations

from dataclasses import dataclass

from refcurv.judge.injected import INJECTED


@dataclass(frozen=True, slots=True)
class Bug:
    """A planted bug.

    Fields: id, of an injection, or of EXACT; type, of fault; needs, what a harness must compute to
    see it; what: the sentence of the manifest.
    """

    id: str
    type: str
    needs: str
    what: str


EXACT = "the dense blocks are those of the columns of W end to end"
"""What B78 is here: of a dump it swaps A and G, and a case has the dense curvature itself."""

_IDS = {
    "sums": {
        "NORMALISATION": "B1 B4 B11 B12 B39 B43 B44",
        "LABELS": "B15 B16 B17",
        "MASKING": "B20 B27 B28 B36 B41 B45",
        "LAYOUT": "B32 B47",
        "WRONG_LAYER": "B34 B38",
        "PRECISION": "B58",
    },
    "basis": {"PRECISION": "B62", "ORDER": "B64 B65", "DEGENERATE": "B66"},
    "edits": {"ORDER": "B65-edit", "TIE": "B69-less B69-more B73 B74"},
    "forward": {
        "LABELS": "B18 B22 B23",
        "MASKING": "B50 B50-packed B50-window",
        "LAYOUT": "B51 B52 B53-gain B54 B54-cap B78",
        "PRECISION": "B53 B57",
    },
}

BUGS = tuple(
    Bug(id, type, needs, EXACT if id == "B78" else INJECTED[id].what)
    for needs, types in _IDS.items()
    for type, ids in types.items()
    for id in ids.split()
)
"""Every bug that is planted; a suffix of the id tells two forms of one bug apart."""
