"""Honest dumps: G of some layers, whose labels are drawn from the model anew for each dump.

They depend on model and corpus, and not on theirs. So those that were drawn for one dump are kept
for the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Final

import numpy as np

from refcurv.files.digest import digest
from refcurv.judge.case import Case
from refcurv.law.checks import Array
from refcurv.law.conventions import Rows
from refcurv.model.corpus import Corpus
from refcurv.model.transformer import Tap
from refcurv.model.weights import Model, resident
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import Forward, forward_of, sweep, sweep_of

SEED: Final = 0x5EED_0FD2_A3D1
"""Of the honest dumps.  Chosen: a seed that nobody takes."""

AT_ONCE: Final = 16
"""Dumps that are drawn at one time, at most.  Chosen: that many few rows are worth a pass."""

TOGETHER: Final = 2**22
"""Numbers in the rows and sums of these, at most.  Chosen: 32 MB."""

KEPT: Final = 2**26
"""Bytes of dumps that are kept, at most.  Chosen: a thousand dumps of a small model."""


@dataclass(frozen=True, slots=True)
class Source:
    """What honest dumps are drawn from; two with the same `told` give the same dumps.

    Fields: told, a digest of all others; sizes, layer → the size of its G; each, draws of a dump;
    fisher, "sampled" or "signed".
    """

    told: str
    model: Model = field(compare=False)
    corpus: Corpus = field(compare=False)
    rows: Rows = field(compare=False)
    sizes: Mapping[str, int] = field(compare=False)
    each: int = field(compare=False)
    fisher: str = field(compare=False)


def source_of(case: Case, each: int) -> Source:
    """Of every layer of a case that has a G, `each` draws of all labels a dump."""
    assert case.model is not None and case.corpus is not None
    sums = ((x, case.ours(x).sum_G) for x in case.matched)
    sizes = {layer: len(sum_G) for layer, sum_G in sums if sum_G.any()}
    fisher = "signed" if case.dump.declared.get("fisher") == "signed" else "sampled"
    rows = case.reference.rows
    told = hashlib.sha256(repr((digest(case.model), sizes, each, fisher, str(rows))).encode())
    corpus = case.corpus
    arrays = [corpus.label, corpus.tokens, corpus.images]
    if corpus.images is None:
        arrays += [corpus.real, corpus.segment]
    for array in (one for one in arrays if one is not None):
        told.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return Source(told.hexdigest(), case.model, corpus, rows, sizes, each, fisher)


@lru_cache(maxsize=2)
def series(source: Source) -> Series:
    """The dumps of a source, from the first; those of the last two sources are kept."""
    return Series(source)


class Series:
    """Honest dumps in the order in which they are drawn, without end; the first ones are kept."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kept: list[Mapping[str, Array]] = []
        self._nbytes = 0

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        """{layer: (K, O, O)} of K dumps at a time.

        Proof: tests/test_judge_drawing.py::test_dumps_that_are_kept_are_those_that_are_drawn
        """
        yield from self._kept  # which another reader may make longer meanwhile
        for number, dumps in enumerate(_drawn(self._source, len(self._kept)), len(self._kept)):
            size = sum(G.nbytes for G in dumps.values())
            if number == len(self._kept) and self._nbytes + size <= KEPT:
                self._kept.append(dumps)
                self._nbytes += size
            yield dumps


def _drawn(source: Source, begin: int) -> Iterator[Mapping[str, Array]]:
    """Batches of dumps without end, from number `begin` on.

    Every draw is a copy of the corpus, whose sequences have indices of their own (SAMPLING). So one
    pass over all copies draws for each anew. What goes forward is the same each time.
    """
    config, sizes = source.model.config, source.sizes
    units = shards(source.corpus, config, source.rows)
    parameters = resident(source.model)
    job = sweep_of("validate", sizes, source.fisher, SEED, 1)
    widest = max(unit.label_BT.size for unit in units)
    wide = config.vocabulary + sum(sizes.values())
    room = source.each * widest * wide + sum(n * n for n in sizes.values())
    dumps = max(1, min(AT_ONCE, TOGETHER // room))
    copies, drawn = dumps * source.each, begin * dumps * source.each
    before: Forward | None = None
    while True:
        sums = {layer: np.zeros((dumps, n, n)) for layer, n in sizes.items()}
        rows = dict.fromkeys(sizes, 0)
        for unit in units:
            many = _copies(unit, copies, drawn, len(source.corpus.label))
            if before is None or len(units) > 1:
                before = forward_of(config, parameters, many, job)
            taken: dict[str, list[Array]] = {layer: [] for layer in sizes}
            sweep(config, parameters, many, job, partial(_keep, taken), before)
            for layer, g in taken.items():
                g_KNO = np.concatenate(g).reshape(dumps, -1, sizes[layer])
                sums[layer] += g_KNO.swapaxes(1, 2) @ g_KNO
                rows[layer] += g_KNO.shape[1]
        yield {layer: one / rows[layer] for layer, one in sums.items()}
        drawn += copies


def _copies(unit: Shard, count: int, drawn: int, sequences: int) -> Shard:
    """A shard `count` times, one behind the other; `drawn`, copies that there were before."""
    here = unit.of(np.tile(np.arange(len(unit.index_B)), count))
    copy = np.repeat(drawn + np.arange(count), len(unit.index_B))
    return replace(here, index_B=here.index_B + copy * sequences)


def _keep(taken: Mapping[str, list[Array]], _: int, tap: Tap) -> None:
    taken[tap.name].append(tap.g)
