"""The fixed unit of computation: consecutive sequences of a corpus, trimmed to what matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refcurv.files.corpus import Corpus
from refcurv.law.checks import Array, EmptyError, require_token_ids
from refcurv.law.conventions import Rows, shard_sequences
from refcurv.model.config import ModelConfig
from refcurv.model.layers import Layout
from refcurv.model.loss import reached
from refcurv.model.transformer import Inputs, layout_of


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of computation (SHARD): a few sequences, and which of their positions count.

    Where attention is causal, columns behind the last kept position reach nothing and are cut off.

    Fields: number, from 0; index_B, the sequences' rows in the corpus (SAMPLING); inputs: tokens
    (B, T) or patches (B, n, ·); label_BT, (B, 1) of images; keep_BT bool, the rows of A and G, and
    head_BT those of the head, shaped like the labels; layout.
    """

    number: int
    index_B: Array
    inputs: Inputs
    label_BT: Array
    keep_BT: Array
    head_BT: Array
    layout: Layout


def shards(corpus: Corpus, config: ModelConfig, rows: Rows = Rows.REACHED) -> list[Shard]:
    """The shards of a corpus, in order; those without any kept row are left out, numbers stay.

    Raises:
        RangeError: a token or label outside the vocabulary.
        EmptyError: no position has a label, so that nothing could be differentiated.
    """
    vocabulary = config.vocabulary
    require_token_ids("shards", "tokens", corpus.tokens, vocabulary)
    label_NT = corpus.label
    require_token_ids("shards", "labels", np.maximum(label_NT, 0), vocabulary)
    if rows is Rows.REACHED:
        keep_NT = reached(label_NT, corpus.real, corpus.segment, config.causal)
    else:
        keep_NT = label_NT >= 0
    if not keep_NT.any():
        raise EmptyError(
            f"shards: none of the corpus's {corpus.tokens.size} positions has a label. Sequences "
            "of length 1 predict nothing; give longer ones, or a corpus with labels of its own."
        )
    size = shard_sequences(corpus.tokens.shape[1])
    out = []
    for number, begin in enumerate(range(0, len(corpus.tokens), size)):
        index_B = np.arange(begin, min(begin + size, len(corpus.tokens)))
        kept_T = np.flatnonzero(keep_NT[index_B].any(axis=0))
        if not len(kept_T):
            continue
        part = np.s_[index_B, : kept_T[-1] + 1 if config.causal else None]
        layout = layout_of(config, corpus.real[part], corpus.segment[part])
        token_BT = corpus.tokens[part].astype(np.int64)
        keep_BT = keep_NT[part]
        out.append(Shard(number, index_B, token_BT, label_NT[part], keep_BT, keep_BT, layout))
    return out
