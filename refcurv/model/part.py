"""Some sequences or images of a corpus."""

from __future__ import annotations

from refcurv.law.checks import Array
from refcurv.model.corpus import Corpus


def part_of(corpus: Corpus, sequences: slice | Array) -> Corpus:
    """A corpus of some of the sequences or images, without populations; draws are renumbered.

    Proof: tests/test_trace.py::test_a_trace_makes_the_sums_of_collect
    """
    arrays = (corpus.tokens, corpus.labels, corpus.mask, corpus.segments, corpus.images)
    tokens, labels, mask, segments, images = (x if x is None else x[sequences] for x in arrays)
    return Corpus(tokens, labels, mask, segments, images=images)
