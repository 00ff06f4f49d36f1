"""Some sequences or images of a corpus."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from refcurv.law.checks import Array, RangeError
from refcurv.model.corpus import Corpus


def part_of(corpus: Corpus, sequences: slice | Array) -> Corpus:
    """A corpus of some of the sequences or images, without populations; draws are renumbered.

    Proof: tests/test_trace.py::test_a_trace_makes_the_sums_of_collect
    """
    arrays = (corpus.tokens, corpus.labels, corpus.mask, corpus.segments, corpus.images)
    tokens, labels, mask, segments, images = (x if x is None else x[sequences] for x in arrays)
    return Corpus(tokens, labels, mask, segments, images=images)


def numbers_of(who: str, corpus: Corpus, sequences: Iterable[object]) -> list[int]:
    """Rows of the corpus in the order given: at least one integer, each in range.

    What is wrong is refused at once, however many follow.

    Proof: tests/test_hostile.py::test_sequences_are_whole_numbers_in_range
    """
    count, found = len(corpus.label), []
    for n in sequences if isinstance(sequences, Iterable) else [sequences]:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise RangeError(f"{who}: sequences must be integers, rows of the corpus; got {n!r}.")
        if not 0 <= n < count:
            raise RangeError(f"{who}: sequence {n} does not exist; the corpus has {count}.")
        found.append(int(n))
    if not found:
        raise RangeError(f"{who}: give at least one sequence.")
    return found
