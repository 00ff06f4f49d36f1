"""The fixed unit of computation: consecutive sequences of a corpus, trimmed to what matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refcurv.law.checks import Array, EmptyError
from refcurv.law.conventions import Rows, shard_sequences
from refcurv.law.words import number_of
from refcurv.model.config import ModelConfig, Scaling
from refcurv.model.corpus import Corpus, require_fit, require_tokens
from refcurv.model.images import patches
from refcurv.model.layers import Layout
from refcurv.model.rows import kept, require_rows
from refcurv.model.transformer import Inputs, image_layout, layout_of

BY_LENGTH = (Scaling.DYNAMIC, Scaling.LONGROPE)
"""The scalings of rotary frequencies that hang on the length of the text."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of computation (SHARD): a few sequences, and which of their positions count.

    The columns after the last kept position are cut off where they reach nothing (`may_be_cut`).

    Fields: number, from 0; index_B, the sequences' rows in the corpus (SAMPLING); source: tokens
    (B, T), or images (B, C, H, W) as in the corpus; label_BT, for images (B, 1); keep_BT bool, the
    rows of A and G; head_BT bool, those of the head, shaped like the labels; layout.
    """

    number: int
    index_B: Array
    source: Array
    label_BT: Array
    keep_BT: Array
    head_BT: Array
    layout: Layout

    def of(self, sequences: Array) -> Shard:
        """A shard of some of these sequences, by their indices here; index_B goes with them."""
        parts = ("index_B", "source", "label_BT", "keep_BT", "head_BT")
        layout = (self.layout.position_BT, self.layout.first_BT, self.layout.last_BT)
        return replace(
            self,
            layout=Layout(*(array[sequences] for array in layout)),
            **{part: getattr(self, part)[sequences] for part in parts},
        )

    def until(self, columns: int) -> Shard:
        """The first columns of text alone, where they `may_be_cut`."""
        parts = ("source", "label_BT", "keep_BT", "head_BT")
        layout = (self.layout.position_BT, self.layout.first_BT, self.layout.last_BT)
        return replace(
            self,
            layout=Layout(*(array[:, :columns] for array in layout)),
            **{part: getattr(self, part)[:, :columns] for part in parts},
        )


def may_be_cut(config: ModelConfig) -> bool:
    """Does the end of a text reach no earlier position?

    With causal attention, if not rotary frequencies hang on the length of the text.

    Proof: tests/test_definition.py::test_the_length_of_a_text_counts_where_its_end_has_no_label
    """
    scaling = config.rope_scaling
    return config.causal and (scaling is None or scaling.kind not in BY_LENGTH)


def inputs_of(config: ModelConfig, shard: Shard) -> Inputs:
    """What the forward reads. Images are cut into patches only here, shard by shard."""
    return shard.source if config.image is None else patches(config, shard.source)


def shards(corpus: Corpus, config: ModelConfig, rows: Rows = Rows.REACHED) -> list[Shard]:
    """The shards of a corpus, in order. Those without a kept row are left out, but still numbered.

    Raises:
        ConventionError, ShapeError, RangeError: the corpus does not fit the model (`require_fit`),
            or the model has no such rows (ROWS).
        EmptyError: no position has a label, so that there is no loss.

    Proof: tests/test_factors.py::test_factors_equal_the_naive_sums,
        tests/test_images.py::test_factors_equal_the_naive_sums
    """
    rows = require_rows("shards", config, rows)
    label_NT = require_fit("shards", corpus, config)
    if not (label_NT >= 0).any():
        raise EmptyError(
            f"shards: none of the corpus's {number_of(label_NT.size, 'label')} is >= 0. "
            f"Sequences of length 1 "
            "predict nothing; give longer ones, or a corpus with labels of its own."
        )
    if corpus.images is not None:
        keep_NT = kept(config, rows, label_NT)
    else:
        keep_NT = kept(config, rows, label_NT, corpus.real, corpus.segment)
    size = shard_sequences(keep_NT.shape[1])
    out = []
    for number, begin in enumerate(range(0, len(keep_NT), size)):
        part = slice(begin, begin + size)
        if keep_NT[part].any():
            out.append(_shard(corpus, config, number, part, label_NT, keep_NT))
    return out


def _shard(
    corpus: Corpus, config: ModelConfig, number: int, part: slice, label_NT: Array, keep_NT: Array
) -> Shard:
    index_B = np.arange(len(label_NT))[part]
    if corpus.images is not None:
        label_B1, layout = label_NT[part], image_layout(config, len(index_B))
        images = corpus.images[part]
        return Shard(number, index_B, images, label_B1, keep_NT[part], label_B1 >= 0, layout)
    last = int(np.flatnonzero(keep_NT[part].any(axis=0))[-1])
    at = part, slice(last + 1 if may_be_cut(config) else None)
    token_BT = require_tokens("shards", corpus)[at].astype(np.int64)
    layout = layout_of(config, corpus.real[at], corpus.segment[at])
    return Shard(number, index_B, token_BT, label_NT[at], keep_NT[at], keep_NT[at], layout)
