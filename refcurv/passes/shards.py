"""The fixed unit of computation: consecutive sequences of a corpus, trimmed to what matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refcurv.law.checks import Array, EmptyError
from refcurv.law.conventions import Rows, shard_sequences
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus, require_fit, require_tokens
from refcurv.model.images import patches
from refcurv.model.layers import Layout
from refcurv.model.rows import kept, require_rows
from refcurv.model.transformer import Inputs, image_layout, layout_of


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of computation (SHARD): a few sequences, and which of their positions count.

    Where attention is causal, columns behind the last kept position reach nothing and are cut off.

    Fields: number, from 0; index_B, the sequences' rows in the corpus (SAMPLING); source: tokens
    (B, T), or images (B, C, H, W) as the corpus has them; label_BT, (B, 1) of images; keep_BT bool,
    the rows of A and G, and head_BT those of the head, shaped like the labels; layout.
    """

    number: int
    index_B: Array
    source: Array
    label_BT: Array
    keep_BT: Array
    head_BT: Array
    layout: Layout

    def of(self, sequences: Array) -> Shard:
        """Some of its sequences, by their indices in it; their places in the corpus stay."""
        parts = ("index_B", "source", "label_BT", "keep_BT", "head_BT")
        layout = (self.layout.position_BT, self.layout.first_BT, self.layout.last_BT)
        return replace(
            self,
            layout=Layout(*(array[sequences] for array in layout)),
            **{part: getattr(self, part)[sequences] for part in parts},
        )


def inputs_of(config: ModelConfig, shard: Shard) -> Inputs:
    """What the forward reads; images are cut into patches when their shard's turn comes."""
    return shard.source if config.image is None else patches(config, shard.source)


def shards(corpus: Corpus, config: ModelConfig, rows: Rows = Rows.REACHED) -> list[Shard]:
    """The shards of a corpus, in order; those without any kept row are left out, numbers stay.

    Raises:
        ConventionError, ShapeError, RangeError: the corpus does not fit the model (`require_fit`),
            or the model has no such rows (ROWS).
        EmptyError: no position has a label, so that nothing could be differentiated.

    Proof: tests/test_factors.py::test_factors_equal_the_naive_sums,
        tests/test_images.py::test_factors_equal_the_naive_sums
    """
    rows = require_rows("shards", config, rows)
    label_NT = require_fit("shards", corpus, config)
    if not (label_NT >= 0).any():
        raise EmptyError(
            f"shards: none of the corpus's {label_NT.size} labels is >= 0. Sequences of length 1 "
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
    at = part, slice(last + 1 if config.causal else None)
    token_BT = require_tokens("shards", corpus)[at].astype(np.int64)
    layout = layout_of(config, corpus.real[at], corpus.segment[at])
    return Shard(number, index_B, token_BT, label_NT[at], keep_NT[at], keep_NT[at], layout)
