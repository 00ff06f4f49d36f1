"""The definition of A and G, in plain NumPy: what `collect` must equal.

One sequence at a time: forward; then, for each cotangent (FISHER), backward. At each linear layer

    S_A = Σ a aᵀ        S_G = Σ g gᵀ        over the kept rows (ROWS).

Nothing here is fast, blocked, resumable or distributed. It stands on the definitions of
`refcurv.model` (LOSS in `loss`, ROWS in `rows`, FISHER in `fisher`), and reaches no kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from refcurv.law.checks import Array, NameUnknownError
from refcurv.law.conventions import Rows
from refcurv.model import transformer
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.corpus import Corpus, require_fit, require_tokens
from refcurv.model.fisher import cotangents, require_fisher
from refcurv.model.images import patches
from refcurv.model.layers import Layout
from refcurv.model.rows import kept, require_rows
from refcurv.model.transformer import Cotangent, Inputs, Parameters, Slope, Tap
from refcurv.model.weights import Model, resident


@dataclass(slots=True)
class Sums:
    """What is added up for one linear layer (COUNTS).

    Fields: S_A = Σ a aᵀ (I, I) and s_a = Σ a (I,), which a bias needs (BIAS), over n_A rows;
    S_G = Σ g gᵀ (O, O) over n_G = rows × draws.
    """

    S_A: Array
    s_a: Array
    S_G: Array
    n_A: int = 0
    n_G: int = 0


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a corpus, or one image, as a batch of one.

    Fields: index_B, its row in the corpus; inputs and layout, for the forward; label_BT; keep_BT,
    its rows of A and G, and head_BT, its rows at the head.
    """

    index_B: Array
    inputs: Inputs
    layout: Layout
    label_BT: Array
    keep_BT: Array
    head_BT: Array


def factors(
    model: Model,
    corpus: Corpus,
    layers: Iterable[str],
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    rows: str = "reached",
) -> dict[str, Sums]:
    """S_A, n_A, S_G and n_G of linear layers, by their definition.

    Args: as `collect`, but `layers` are names. A table of vectors is the linear layer of one-hot
    inputs, so that its S_A is a diagonal matrix (EMBEDDING).

    Returns:
        {layer name: Sums}, float64; A = S_A / n_A, G = S_G / n_G.

    Cost: for each sequence a forward and all its backward passes, through the whole model.
    Source: P1-P3; COUNTS, ROWS, FISHER, EMBEDDING.
    Proof: tests/test_definition.py::test_collect_equals_the_definition
    """
    config, kind = model.config, require_fisher("factors", fisher, seed, draws)
    parameters = resident(model)
    shapes = config.linear_layers() | config.tables()
    sums = {}
    for name in layers:
        if name not in shapes:
            raise NameUnknownError(f"factors: the model has no linear layer {name!r}.")
        sums[name] = _zero(*shapes[name])
    for one in sequences(config, corpus, require_rows("factors", config, rows)):
        final_BTD, trace = transformer.forward(config, parameters, one.inputs, one.layout)
        sent = cotangents(kind, one.label_BT, one.index_B, config.vocabulary, seed, draws)
        for number, cotangent in enumerate(sent):
            for tap in _taps(config, parameters, one, final_BTD, trace, cotangent):
                if tap.name in sums:
                    _add(sums[tap.name], tap, first=number == 0, counted=number < draws)
    return sums


def _zero(d_out: int, d_in: int) -> Sums:
    return Sums(np.zeros((d_in, d_in)), np.zeros(d_in), np.zeros((d_out, d_out)))


def _add(sums: Sums, tap: Tap, *, first: bool, counted: bool) -> None:
    """The inputs are the same in every pass, so that only the first adds them."""
    a_NI, g_NO = tap.a.astype(np.float64), tap.g.astype(np.float64)
    sums.S_G += g_NO.T @ g_NO
    sums.n_G += len(g_NO) if counted else 0  # `expected` has many passes, and is one draw
    if first:
        sums.S_A += a_NI.T @ a_NI
        sums.s_a += a_NI.sum(axis=0)
        sums.n_A += len(a_NI)


def sequences(config: ModelConfig, corpus: Corpus, rows: Rows) -> Iterator[Sequence]:
    """The sequences of a corpus, each by itself."""
    label_NT = require_fit("factors", corpus, config)
    for n in range(len(label_NT)):
        at, index_B = slice(n, n + 1), np.array([n])
        label_BT = label_NT[at]
        if corpus.images is not None:
            inputs, layout = patches(config, corpus.images[at]), transformer.image_layout(config, 1)
            keep_BT = kept(config, rows, label_BT)
            yield Sequence(index_B, inputs, layout, label_BT, keep_BT, label_BT >= 0)
            continue
        real_BT, segment_BT = corpus.real[at], corpus.segment[at]
        inputs = require_tokens("factors", corpus)[at].astype(np.int64)
        layout = transformer.layout_of(config, real_BT, segment_BT)
        keep_BT = kept(config, rows, label_BT, real_BT, segment_BT)
        yield Sequence(index_B, inputs, layout, label_BT, keep_BT, keep_BT)


def _taps(
    config: ModelConfig,
    parameters: Parameters,
    one: Sequence,
    final_BTD: Array,
    trace: transformer.Trace,
    cotangent: Cotangent,
) -> Iterator[Tap]:
    """Every layer's kept rows: a (N, I), g (N, O). A layer may come in parts."""
    steps: list[Tap | Slope] = []
    head = transformer.head_transpose(config, parameters, final_BTD, one.head_BT, cotangent)
    d_final_BTD = transformer.drain(head, steps.append)
    yield from (step for step in steps if isinstance(step, Tap))  # they have kept rows alone
    steps.clear()
    blocks = transformer.blocks_backward(config, parameters, d_final_BTD, trace)
    d_x_BTD = transformer.drain(blocks, steps.append)
    steps.extend(transformer.input_taps(config, one.inputs, one.layout, d_x_BTD))
    for tap in steps:
        if isinstance(tap, Tap):
            a_BTI = _one_hot(config, tap) if tap.name in TABLES else tap.a
            keep_BT = one.keep_BT[:, -tap.g.shape[1] :]  # patches stand behind the specials
            yield Tap(tap.name, a_BTI[keep_BT], tap.g[keep_BT])


def _one_hot(config: ModelConfig, tap: Tap) -> Array:
    """What a table reads, as the input of a linear layer: (B, T, entries)."""
    _, entries = config.tables()[tap.name]
    return np.asarray(np.arange(entries) == tap.a[..., None])
