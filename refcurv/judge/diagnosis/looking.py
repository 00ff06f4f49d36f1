"""What needs no model, tried on each layer: ours as it is, another form of it, another layer."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.compare import drawing
from refcurv.judge.diagnosis.hypotheses import tries
from refcurv.judge.diagnosis.others import Index
from refcurv.judge.diagnosis.search import PLAIN, Idea, Side
from refcurv.judge.diagnosis.seen import Left, Seen, fitted, see, usable
from refcurv.judge.diagnosis.tied import tied

ROWS_KEPT = frozenset({"B12"})
"""Faults that change no count of rows: another count is a fault beside them."""


def look(
    case: Case,
    layers: Iterable[str],
    found: Mapping[str, Side],
    index: Index,
    wanted: Container[str] | None = None,
    sides: str = "AG",
) -> None:
    """Try what needs no model on these layers; `wanted`, only these faults; `sides`, only these."""
    heads = None if case.model is None else case.model.config.head_width
    for layer in layers:
        for side, seen in see(case, layer).items():
            if side in sides and usable(seen):
                case.say(f"what {side} of {layer} may be")
                pooled = tied(case, seen) if wanted is None or "B40" in wanted else ()
                for one in (*tries(seen, heads, wanted), *index.tries(seen, wanted), *pooled):
                    if "B49" in one.faults and not _starts(case, seen):
                        continue
                    error, r = fitted(seen.T if one.T is None else one.T, one.Y)
                    idea = Idea(one.faults, None, "" if one.faults else one.note)
                    rows = seen.rows(seen.n_X) if {*one.faults} <= ROWS_KEPT else None
                    roomy = 1.0 if one.of is None else _roomy(case, seen, *one.of)
                    blur = one.blur * roomy
                    wide = one.spread if one.of is None else _drawn_as(case, seen, *one.of)
                    left = Left(error, r, one.note, one.alike, rows, wide, blur=blur, roomy=roomy)
                    found[side].add(idea, layer, left)


def ours(case: Case, layer: str) -> dict[str, Left]:
    """What no fault at all leaves, by side; found once."""

    def make() -> dict[str, Left]:
        return {
            side: Left(
                *fitted(seen.T, seen.X), PLAIN.name, (), seen.rows(seen.n_X), trace=_traces(seen)
            )
            for side, seen in see(case, layer).items()
            if usable(seen) and seen.T.shape == seen.X.shape
        }

    return case.once(("ours", layer), make)


def _traces(seen: Seen) -> float:
    """tr T over tr X; NaN of a matrix of zeros."""
    own = float(np.trace(seen.X))
    return float(np.trace(seen.T)) / own if own > 0 else math.nan


def _roomy(case: Case, seen: Seen, layer: str, side: str) -> float:
    """How many times wider the budget of another matrix is, which stands in the place of ours."""
    finest = case.arithmetic.stored or "float64"
    own = case.budget(seen.layer, finest, seen.side)
    return max(1.0, case.budget(layer, finest, side) / own)


def _drawn_as(case: Case, seen: Seen, layer: str, side: str) -> float:
    """What drawing explains of G in the place of A, where A stands in the place of G.

    So the two are known to be swapped: of A alone any matrix could be another draw.
    """
    T = case.theirs(seen.layer).G
    if (seen.side, side) != ("A", "G") or T is None or layer != seen.layer:
        return 0.0
    finest = case.arithmetic.stored or "float64"
    mine = see(case, layer)
    swapped = mine["G"].T.shape == mine["A"].X.shape and usable(mine["G"])
    if not swapped or fitted(mine["G"].T, mine["A"].X)[0] > case.budget(layer, finest, "A"):
        return 0.0
    drawn = drawing(case, layer, case.counts(layer).theirs["G"])
    return drawn.norm if drawn.known else 0.0


def _starts(case: Case, seen: Seen) -> bool:
    """May theirs have one row more or less for each text? Padding of one token has many more."""
    corpus = case.corpus
    if corpus is None or corpus.images is not None or seen.n_T is None:
        return True
    segment_BT = corpus.segment
    at_BT2 = np.stack([np.indices(segment_BT.shape)[0], segment_BT], axis=-1)
    texts = [at_BT2[real][:, :k] for real in (corpus.real, corpus.label >= 0) for k in (1, 2)]
    return abs(seen.n_T - seen.n_X) in {len(np.unique(one, axis=0)) for one in texts}
