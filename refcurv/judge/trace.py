"""A trace: every tensor of a pass over a few sequences, in order of computation.

Two programs that disagree in A or G disagree somewhere first. A trace holds the labels, and of each
linear layer the input a and the output gradient g of every position: on the way up the inputs, then
logits and nats, on the way down the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.room import available
from refcurv.files import store
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    RoomError,
)
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.corpus import Corpus, require_fit
from refcurv.model.fisher import cotangents, require_fisher
from refcurv.model.given import numbers_of, require_corpus, require_flag, require_model
from refcurv.model.images import patches
from refcurv.model.layers import Layout
from refcurv.model.loss import cross_entropy
from refcurv.model.part import part_of
from refcurv.model.sampling import draw_labels, uniforms
from refcurv.model.transformer import Inputs, Parameters, Slope, Tap, image_layout, layout_of
from refcurv.model.weights import Model, resident


@dataclass(frozen=True, slots=True)
class Trace:
    """Some sequences, from tokens to gradients.

    Fields:
        tensors: by name, in order of computation. LAYER.a (B, T, I) upwards; "labels" (B, T),
            "logits" (B, T, V), "nats" (B, T); then LAYER.g (B, T, O) downwards. Of images T is the
            number of positions, of a pooled head 1.
        errors: how far rounding moves each position of a tensor, (B, T) norms, in the dtype of the
            pass; empty where it was not estimated.
        sequences: their rows in the corpus. fisher: whose labels. source: the files it is of.
    """

    tensors: Mapping[str, Array]
    sequences: tuple[int, ...]
    fisher: str
    errors: Mapping[str, Array] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def trace(
    model: Model,
    corpus: Corpus,
    sequences: Iterable[int] = (0,),
    fisher: str = "sampled",
    seed: int = 0,
    *,
    estimate: bool = False,
) -> Trace:
    """Every tensor of one forward and one backward pass over a few sequences.

    Definition
        The labels are the corpus's (`empirical`) or drawn from the model where the corpus has one
        (`sampled`, draw 0 of SAMPLING). a and g are those of `collect`, at every position.

    Args:
        model: any; the trace is in its dtype.
        corpus: tokens or images.
        sequences: their rows in the corpus.
        fisher: "sampled" or "empirical".
        seed: of the drawn labels.
        estimate: also find out, by three more runs, how far rounding moves each position.

    Raises:
        RangeError: a sequence that the corpus does not have. ConventionError: another `fisher`.
        RoomError: tensors that memory does not hold. EmptyError: no label in these sequences.

    Cost: one forward and one backward pass; all of their activations at once.
    Proof: tests/test_trace.py::test_a_trace_makes_the_sums_of_collect
    """
    kind = require_fisher("trace", fisher, seed, 1)
    require_flag("trace", "estimate", estimate)
    if kind not in (Fisher.SAMPLED, Fisher.EMPIRICAL):
        raise ConventionError("trace: labels are `sampled` or `empirical`; the others have none.")
    require_model("trace", model)
    at = numbers_of("trace", require_corpus("trace", corpus), sequences)
    few, index_B = part_of(corpus, np.array(at)), at
    label_BT = require_fit("trace", few, model.config)
    if not (label_BT >= 0).any():
        raise EmptyError(f"trace: no position of sequences {at} has a label. Give others.")
    _require_room(model.config, few)
    inputs, layout = _inputs(model.config, few)
    with one_blas_thread():
        parameters = resident(model)
        if kind is Fisher.SAMPLED:
            label_BT = _drawn(model.config, parameters, inputs, layout, label_BT, index_B, seed)
        one = _Pass(model.config, parameters, inputs, layout, label_BT)
        tensors = one.tensors()
        errors = _errors(one, tensors) if estimate else {}
    source = MappingProxyType({"inputs": store.inputs(model.source, corpus.source)})
    return Trace(MappingProxyType(tensors), tuple(at), str(kind), MappingProxyType(errors), source)


def _inputs(config: ModelConfig, corpus: Corpus) -> tuple[Inputs, Layout]:
    if corpus.images is not None:
        return patches(config, corpus.images), image_layout(config, len(corpus.images))
    assert corpus.tokens is not None
    return corpus.tokens.astype(np.int64), layout_of(config, corpus.real, corpus.segment)


def _require_room(config: ModelConfig, corpus: Corpus) -> None:
    positions = (
        corpus.label.size if config.image is None else len(corpus.label) * config.image.positions
    )
    width = sum(o + i for o, i in config.linear_layers().values())
    need, free = 8 * 4 * positions * width, available()
    if free is not None and need > free:
        raise RoomError(
            f"trace: its tensors take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free. "
            "Give fewer sequences."
        )


def _drawn(
    config: ModelConfig,
    parameters: Parameters,
    inputs: Inputs,
    layout: Layout,
    label_BT: Array,
    index_B: Sequence[int],
    seed: int,
) -> Array:
    """Labels drawn where there is one (SAMPLING), with the bits of `collect`."""
    final_BTD, _ = transformer.forward(config, parameters, inputs, layout)
    at_BT, T = label_BT >= 0, label_BT.shape[1]
    logit_NV = transformer.head_logits(config, parameters, final_BTD[at_BT])
    uniform_BT = np.stack([uniforms(seed, 0, index, T) for index in index_B])
    drawn_BT = label_BT.copy()
    drawn_BT[at_BT] = draw_labels(logit_NV, uniform_BT[at_BT])
    return drawn_BT


@dataclass(frozen=True, slots=True)
class _Pass:
    config: ModelConfig
    parameters: Parameters
    inputs: Inputs
    layout: Layout
    label_BT: Array

    def tensors(self) -> dict[str, Array]:
        """By name, in order of computation."""
        config, parameters, label_BT = self.config, self.parameters, self.label_BT
        final_BTD, saved = transformer.forward(config, parameters, self.inputs, self.layout)
        logit_BTV = transformer.head_logits(config, parameters, final_BTD)
        flat = logit_BTV.reshape(-1, logit_BTV.shape[-1])
        nats_BT = cross_entropy(flat, label_BT.reshape(-1))[0].reshape(label_BT.shape)
        (send,) = cotangents(
            Fisher.EMPIRICAL, label_BT, np.arange(len(label_BT)), config.vocabulary
        )
        every_BT = np.ones(label_BT.shape, dtype=bool)
        steps: list[Tap | Slope] = []
        head = transformer.head_transpose(config, parameters, final_BTD, every_BT, send)
        d_final_BTD = transformer.drain(head, steps.append)
        taps = [_joined([s for s in steps if isinstance(s, Tap)], label_BT.shape)]
        blocks = transformer.blocks_backward(config, parameters, d_final_BTD, saved)
        below: list[Tap | Slope] = []
        d_x_BTD = transformer.drain(blocks, below.append)
        below.extend(transformer.input_taps(config, self.inputs, self.layout, d_x_BTD))
        taps += [s for s in below if isinstance(s, Tap) and s.name not in TABLES]
        up = {f"{tap.name}.a": tap.a for tap in reversed(taps)}
        middle = {"logits": logit_BTV, "labels": label_BT, "nats": nats_BT}
        return up | middle | {f"{tap.name}.g": tap.g for tap in taps}


def _joined(taps: list[Tap], shape: tuple[int, ...]) -> Tap:
    """The head's Tap over all positions, from those of its chunks."""
    a, g = (np.concatenate([getattr(tap, side) for tap in taps]) for side in "ag")
    return Tap(taps[0].name, a.reshape(*shape, -1), g.reshape(*shape, -1))


def save_trace(made: Trace, path: str | Path) -> None:
    """Write a trace file: a dataset for each tensor, LAYER/a and LAYER/g (METHOD, Files).

    Proof: tests/test_trace.py::test_a_trace_file_holds_the_trace
    """
    attributes: dict[str, str | int | float] = {
        "fisher": made.fisher,
        "sequences": json.dumps(made.sequences),
    }
    store.write(
        path,
        format="refcurv-trace",
        attributes=attributes,
        arrays=(store.Entry(name, np.ascontiguousarray(x)) for name, x in made.tensors.items()),
        provenance=store.provenance(inputs=made.source.get("inputs", {}), **attributes),
    )


def load_tensors(path: str | Path) -> dict[str, Array]:
    """The tensors of a trace file, by name."""
    header = store.open_file(path, format="refcurv-trace")
    return {name: store.read(header, name) for name in header.entries}


NUDGES = (4, -5, 9)
"""By how many units in the last place the inputs of the other runs are larger."""


def _errors(one: _Pass, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """For each tensor the root of the mean |e|² of each position, half of |x' − x|² over NUDGES."""
    squares = {name: np.zeros(x.shape[:2]) for name, x in tensors.items() if x.dtype.kind == "f"}
    for nudge in NUDGES:
        for name, x in _nudged(one, nudge).tensors().items():
            if name in squares:
                d = (x - tensors[name]).reshape(*x.shape[:2], -1)
                squares[name] += (d**2).sum(axis=-1) / 2 / len(NUDGES)
    return {name: np.sqrt(square) for name, square in squares.items()}


def _nudged(one: _Pass, nudge: int) -> _Pass:
    factor = 1 + nudge * tolerance.eps(one.parameters[one.config.weight_of("head")].dtype)
    if one.config.image is None:
        config = replace(one.config, embed_scale=one.config.embed_scale * factor)
        return replace(one, config=config)
    return replace(one, inputs=one.inputs * factor)
