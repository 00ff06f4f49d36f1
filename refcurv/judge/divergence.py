"""The first divergence: the first tensor, in order of computation, in which theirs leaves ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refcurv.judge.arithmetic import AMPLIFICATION, ROUNDOFF
from refcurv.judge.trace import Trace, trace
from refcurv.law.checks import (
    Array,
    ConventionError,
    NameUnknownError,
    as_array,
    as_integers,
    require_dtype,
)
from refcurv.law.dtypes import require_float
from refcurv.model.corpus import Corpus
from refcurv.model.given import numbers_of, require_corpus, require_model, shown
from refcurv.model.weights import Model


@dataclass(frozen=True, slots=True)
class Divergence:
    """One tensor of theirs beside ours.

    Fields:
        name: of the tensor. error: that of the position nearest to its budget or furthest beyond
            it, over the root of the mean square of all positions. budget: of that position.
        where: its (sequence, position) in the corpus, or None.
        first: the (sequence, position) of the first one beyond budget, or None.
        trouble: why there is no number.
    """

    name: str
    error: float | None
    budget: float | None
    where: tuple[int, int] | None
    first: tuple[int, int] | None
    trouble: str = ""

    @property
    def agrees(self) -> bool:
        """Is every position within budget?"""
        return self.first is None and not self.trouble


FACTOR = 16.0
"""Chosen: how many times the estimated rounding a position may be off. Beside it stands
AMPLIFICATION u, what is common to all runs, as from a weight that is rounded."""


def compare_traces(
    theirs: Mapping[str, Any], ours: Trace, dtype: str = "float64"
) -> list[Divergence]:
    """Their tensors in our order of computation; the first that does not agree is where they part.

    Args:
        theirs: arrays by our names, LAYER.a or LAYER/a; (B, T, X), (T, X) of one sequence, or
            (B·T, X). What is not there is left out.
        ours: in float64, with errors (`estimate`).
        dtype: of their arithmetic, a name of `judge.arithmetic.ROUNDOFF`.

    Raises: NameUnknownError: none of their names is a tensor of ours.

    Proof: tests/test_trace.py::test_the_first_tensor_that_differs_is_named
    """
    given = {name.replace("/", "."): x for name, x in require_tensors(theirs).items()}
    known = [name for name in ours.tensors if name in given]
    if not known:
        some = ", ".join(list(ours.tensors)[:3])
        raise NameUnknownError(f"trace: theirs has no tensor of ours, which begin with {some}.")
    u = ROUNDOFF[require_float("trace", "dtype", dtype, ROUNDOFF)]
    return [_divergence(name, given[name], ours, u) for name in known]


def first_divergence(
    theirs: Mapping[str, Any],
    model: Model,
    corpus: Corpus,
    sequences: Iterable[int] = (0,),
    fisher: str = "empirical",
    seed: int = 0,
    dtype: str = "float64",
) -> list[Divergence]:
    """Their tensors beside our trace of the same sequences, in order of computation.

    If theirs has "labels" (B, T), they are taken for ours too, so that no drawing lies between the
    two; positions without one hold a negative number.

    Definition
        A position of a tensor agrees if it lies within FACTOR times the rounding that other runs of
        the pass show, and AMPLIFICATION u of the tensor's own size.

    Args:
        theirs: {name: array}, as `compare_traces` takes them.
        model: in float64.
        corpus: what they ran on.
        sequences: their rows in the corpus.
        fisher: whose labels, where theirs has none: "empirical" or "sampled".
        seed: of sampled labels.
        dtype: of their arithmetic: float64, float32, tf32, float16 or bfloat16.

    Returns:
        A Divergence for each tensor that both have. The first that does not agree is the one to
        look at: all before it agree.

    Raises:
        NameUnknownError: no tensor in common. ShapeError, DTypeError, RangeError: of the labels.
        And as `trace`.

    Cost: four forward and backward passes over these sequences, their activations at once.
    Source: METHOD, Judging.
    Proof: tests/test_trace.py::test_their_labels_are_taken
    """
    require_tensors(theirs)
    require_model("validate", model)
    at = numbers_of("validate", require_corpus("validate", corpus), sequences)
    require_float("validate", "the arithmetic of a trace", dtype, ROUNDOFF)
    if "labels" in theirs:
        corpus, fisher = with_labels(corpus, at, theirs["labels"]), "empirical"
    return compare_traces(theirs, trace(model, corpus, at, fisher, seed, estimate=True), dtype)


def require_tensors(theirs: object) -> Mapping[str, Any]:
    """`theirs`, or ConventionError for what is no mapping of names."""
    if isinstance(theirs, Mapping) and all(isinstance(name, str) for name in theirs):
        return theirs
    raise ConventionError(
        "validate: their tensors must be {name: array}, as {'blocks.0.mlp.up.a': a}; got "
        f"{shown(theirs)}."
    )


def with_labels(corpus: Corpus, at: list[int] | slice, given: Any) -> Corpus:
    """The corpus with other labels in some sequences; without populations.

    Args: given, integers, (B, T) or as many in another shape; a negative one means none.
    """
    label_NT = corpus.label.copy()
    shape = label_NT[at].shape
    given = as_array("validate", "labels", given, "(sequences, positions)")
    if given.size == math.prod(shape):
        given = given.reshape(shape)
    label_NT[at] = as_integers("validate", "labels", given, shape, "(sequences, positions)")
    labels = label_NT if corpus.images is None else label_NT[:, 0]
    return replace(corpus, labels=labels, populations={})


def _divergence(name: str, given: Any, ours: Trace, u: float) -> Divergence:
    """`u`: of their dtype."""
    true = ours.tensors[name]
    X = as_array("trace", name, given, "numbers")
    require_dtype("trace", name, X, "fiub", "real numbers")
    X = X.reshape(true.shape) if X.size == true.size else X
    if X.shape != true.shape:
        return Divergence(name, None, None, None, None, f"it is {X.shape}; ours is {true.shape}")
    if true.dtype.kind in "iu":
        first = _first(np.where(true >= 0, X != true, X >= 0), ours)
        return Divergence(name, float((X != true).mean()), 0.0, first, first)
    off_BT = _norms(X.astype(np.float64) - true)
    root = math.sqrt(float((_norms(true) ** 2).mean()))
    limit_BT = u * (FACTOR * ours.errors[name] / ROUNDOFF["float64"] + AMPLIFICATION * root)
    first = _first(~(off_BT <= limit_BT), ours)  # NaN is beyond
    if not root:
        return Divergence(name, float(off_BT.max()), 0.0, None, first)
    excess_BT = np.nan_to_num(off_BT / limit_BT, nan=np.inf)  # limits are positive
    b, t = divmod(int(excess_BT.argmax()), excess_BT.shape[1])
    error, limit = float(off_BT[b, t]) / root, float(limit_BT[b, t]) / root
    return Divergence(name, error, limit, (ours.sequences[b], t), first)


def _first(bad_BT: Array, ours: Trace) -> tuple[int, int] | None:
    """The first bad position: the lowest sequence, then the lowest position."""
    at = np.argwhere(bad_BT)
    return None if not len(at) else (ours.sequences[int(at[0][0])], int(at[0][1]))


def _norms(x_BTX: Array) -> Array:
    """The Euclidean norm of each position, (B, T)."""
    x_BTX = x_BTX.reshape(*x_BTX.shape[:2], -1)
    return np.asarray(np.sqrt((x_BTX**2).sum(axis=-1)))
