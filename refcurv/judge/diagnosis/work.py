"""How large model and corpus are, what is too much work, and what is run on a sample first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from refcurv.curvature.factors_file import shapes_of
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.variants.collecting import sample
from refcurv.law.words import number_of
from refcurv.model.config import TABLES

ENTRIES = 2**26
"""Numbers in the sums of one run, at most: half a gigabyte."""

WORK = 2.0**35
"""Parameters times positions of a run on a sample, at most.  Chosen: a second or two."""

WHOLE = 2.0**38
"""Parameters times positions of a run on the whole corpus, at most.  Chosen: half a minute."""

MOST = 2**17
"""Positions of a corpus that is recomputed as a whole, at most."""

NAMED = 8
"""Sequences of a sample that are named."""


def cost(case: Case) -> float:
    """Parameters times positions; infinite without model or corpus."""
    if case.model is None or case.corpus is None:
        return math.inf
    parameters = sum(math.prod(shape) for shape in case.model.config.parameter_shapes().values())
    return float(parameters) * extent(case)


def extent(case: Case) -> int:
    """Positions of the corpus, padding too; an image has many, and one label."""
    assert case.corpus is not None and case.model is not None
    image = case.model.config.image
    return int(case.corpus.label.size) * (1 if image is None else image.positions)


def few_positions(case: Case) -> int:
    """Positions of the sample on which hypotheses are tried first."""
    assert case.corpus is not None
    return int(min(4096, max(256, WORK / cost(case) * extent(case))))


def sequences(case: Case, limit: int) -> str:
    """Which sequences a sample is made of, counted from 0: "2 of 8 sequences (0, 7)"."""
    assert case.corpus is not None
    names = [str(n) for n in sample(case, limit)[0].index_B]
    more = ", ..." if len(names) > NAMED else ""
    of = f"{len(names)} of {number_of(len(case.corpus.label), 'sequence')}"
    return f"{of} ({', '.join(names[:NAMED])}{more})"


def is_large(case: Case) -> bool:
    """Are A and G of a few layers too large to be made under many settings? Then sketches are."""
    return at_once(case) < 8


def at_once(case: Case) -> int:
    """Of so many layers a run may have A and G, the largest ones too."""

    def largest() -> int:
        shapes = shapes_of(case.reference)
        each = [shapes[name] for name in linear(case.matched)]
        return max((sum(n * n for n in shape) for shape in each), default=1)

    return ENTRIES // case.once("largest", largest)


def linear(layers: Iterable[str]) -> list[str]:
    """Without tables, which are not recomputed: what is found in the others holds in them too.

    Proof: tests/test_judge_network.py::test_a_table_beside_them_hides_no_cause
    """
    return [x for x in layers if x not in TABLES]


def top(case: Case, layers: Sequence[str], most: int = 3) -> list[str]:
    """Of a large model some layers of the topmost block: a pass backward ends there."""
    if not is_large(case):
        return list(layers)
    block = {x: int(x.split(".")[1]) if x.startswith("blocks.") else math.inf for x in layers}
    highest = max(block.values())
    return [x for x in layers if block[x] == highest][:most]
