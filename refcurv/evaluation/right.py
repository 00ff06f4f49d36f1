"""A corpus without the items that a model gets wrong: what an edit cannot take from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refcurv.evaluation.suite import Measurement
from refcurv.law.checks import EmptyError
from refcurv.model.corpus import Corpus, ImagePopulation, Population


def only_right(corpus: Corpus, measurement: Measurement) -> tuple[Corpus, dict[str, list[int]]]:
    """The corpus with the items that were right, and for each population how many of how many.

    Populations of text and those that were not measured stay as they are. One of which nothing is
    right is left out.

    Raises: EmptyError, nothing would be left.

    Proof: tests/test_right.py::test_what_is_wrong_is_left_out
    """
    counts: dict[str, list[int]] = {}
    kept: dict[str, Population | ImagePopulation] = {}
    for name, population in corpus.populations.items():
        measured = measurement.populations.get(name)
        if measured is None or measured.right is None:
            kept[name] = population
            continue
        right = measured.right
        rows = np.flatnonzero(right)
        counts[name] = [len(rows), len(right)]
        if not len(rows):
            continue
        images = isinstance(population, ImagePopulation)
        fields = ("images", "labels") if images else ("tokens", "prompt_length", "length")
        kept[name] = replace(population, **{key: getattr(population, key)[rows] for key in fields})
    if not kept and not corpus.label.size:
        raise EmptyError(
            "evaluate: no item is right, so that the corpus would hold nothing. Leave --right out."
        )
    return replace(corpus, populations=kept), counts
