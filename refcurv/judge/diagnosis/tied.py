"""A tied head whose hooks also fire where the table is read: the sums of both uses in one (B40)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.factors import Factor, collect
from refcurv.judge.case import Case
from refcurv.judge.compare import one_draw, who_draws
from refcurv.judge.diagnosis.seen import Seen, Try
from refcurv.judge.drawn import DEVIATIONS

MOST = 2**17
"""Positions of a corpus that is collected again for the table, at most."""


def tied(case: Case, seen: Seen) -> Iterator[Try]:
    """The head's own sums and the table's, turned as its matrix is, over the rows of both.

    Definition
        The table is Vᵀ of the head's matrix (EMBEDDING). So S_A of the head and S_G of the table go
        together, and S_G of the head and the diagonal S_A of the table.

    Proof: tests/test_judge_structure.py::test_a_tied_head_with_the_sums_of_its_table_has_its_name
    """
    model, twice = case.model, seen.rows(seen.n_X) in (None, 2)
    if seen.layer != "head" or model is None or not (model.config.tied and twice):
        return
    if (
        case.corpus is None
        or case.corpus.label.size > MOST
        or seen.T.shape != seen.X.shape
        or seen.joint
    ):
        return
    table = case.once("table", lambda: _table(case))
    more = table.G if seen.side == "A" else np.diag(table.A)
    Y, spread = (seen.X + more) / 2, 0.0
    if seen.side == "A" and who_draws(case)[1]:
        single = one_draw(table, case.reference.draws)
        spread = DEVIATIONS * single[0] * float(norm(more) / norm(2 * Y)) if single else 0.0
    note = "its own sums and those of the table that is its weight"
    yield Try(("B40",), note, Y, spread=spread)


def _table(case: Case) -> Factor:
    """A and G of the table, with the choices of the reference."""
    own = case.reference
    if "embed" in own:
        return own["embed"]
    assert case.model is not None and case.corpus is not None
    fisher, rows = str(own.fisher), str(own.rows)
    made = collect(case.model, case.corpus, "embed", fisher, own.seed, own.draws, rows=rows)
    return made["embed"]
