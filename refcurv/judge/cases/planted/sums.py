"""Bugs of what is summed: which rows, which labels, which layer, which scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.cases.flows import against, flow
from refcurv.judge.cases.planted.bug import Bug, Changed, Plant
from refcurv.judge.cases.truth import Truth
from refcurv.law.checks import Array
from refcurv.law.conventions import NO_LABEL
from refcurv.model.weights import resident


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the truth: rows (N, T', ·) on real positions, and its sums."""

    name: str
    keep: Array
    real: Array
    a: Array
    g: Array
    gold: Array
    sum_A: Array
    sum_G: Array
    n: int


def _layers(made: Truth) -> Iterator[Layer]:
    """The layers that bugs of sums are planted in, all of them."""
    for name in made.subject.layers:
        tap, factor = made.gold.taps[name], made.factors[name]
        keep = made.arrays[f"rows.{name}.kept"] != 0
        real = made.seen.real[:, -keep.shape[1] :] if keep.shape[1] > 1 else keep
        yield Layer(
            name, keep, real, tap.a, made.sampled.taps[name].g, tap.g,
            factor.sum_A, factor.sum_G, factor.n_A,
        )  # fmt: skip


def _sums(change: Callable[[Truth, Layer], Mapping[str, object]]) -> Plant:
    """A bug of sums in every layer: `change` returns sum_A, n_A, sum_G or n_G."""

    def plant(made: Truth) -> Changed:
        return {
            f"factors.{one.name}.{part}": np.asarray(
                value, np.int64 if part.startswith("n_") else np.float64
            )
            for one in _layers(made)
            for part, value in change(made, one).items()
        }

    return plant


def gram(x: Array, keep: Array) -> Array:
    """Σ x xᵀ over the kept rows of (N, T, ·)."""
    rows = x[keep]
    return np.asarray(rows.T @ rows)


def _mean_loss(made: Truth, one: Layer) -> Mapping[str, object]:
    return {"sum_G": one.sum_G / int((made.seen.label >= 0).sum()) ** 2}


def _per_sequence_count(made: Truth, one: Layer) -> Mapping[str, object]:
    return {"n_A": len(made.seen.label), "n_G": len(made.seen.label)}


def _damped(made: Truth, one: Layer) -> Mapping[str, object]:
    size = len(one.sum_A)
    return {"sum_A": one.sum_A + 0.1 * np.trace(one.sum_A) / size * np.eye(size)}


def _of_labels(made: Truth, label: Array, layers: Iterator[Layer]) -> Changed:
    config, one = made.subject.model.config, made.seen
    parameters = resident(made.subject.model, np.float64)
    found = flow(config, parameters, one, against(one, label))
    return {
        f"factors.{x.name}.sum_G": gram(found.taps[x.name].g, x.keep) for x in layers
    }  # fmt: skip


def _argmax(made: Truth) -> Changed:
    label = np.where(made.seen.label >= 0, made.gold.logits.argmax(axis=-1), NO_LABEL)
    return _of_labels(made, label, _layers(made))


def _one_label(made: Truth) -> Changed:
    """The first drawn label of a sequence at all of its positions."""
    label = made.labels.copy()
    for row in label:
        at = np.flatnonzero(row >= 0)
        row[at] = row[at[:1]]
    return _of_labels(made, label, _layers(made))


def _rows_of(
    which: Callable[[Truth, Layer], Array],
) -> Callable[[Truth, Layer], Mapping[str, object]]:
    """Other rows than ROWS says, of A and of G."""

    def change(made: Truth, one: Layer) -> Mapping[str, object]:
        keep = which(made, one)
        n = int(keep.sum())
        return {"sum_A": gram(one.a, keep), "sum_G": gram(one.g, keep), "n_A": n, "n_G": n}

    return change


def _labelled(made: Truth, one: Layer) -> Array:
    label = made.seen.label >= 0
    return one.keep & label if label.shape == one.keep.shape else one.keep


def _every_real(made: Truth, one: Layer) -> Array:
    return one.real


def _padding_too(made: Truth, one: Layer) -> Array:
    return np.ones_like(one.keep) if not made.seen.real.all() else one.keep


def _swapped(made: Truth, one: Layer) -> Mapping[str, object]:
    if len(one.sum_A) != len(one.sum_G):
        return {}
    return {"sum_A": one.sum_G, "sum_G": one.sum_A}


def _elsewhere(same_block: bool) -> Plant:
    """A of another layer of the same width: of the same block, or of the next."""

    def plant(made: Truth) -> Changed:
        out, known = {}, list(_layers(made))
        for one in known:
            for other in known:
                near = one.name.rpartition(".")[0] == other.name.rpartition(".")[0]
                kind = one.name.rpartition(".")[2] == other.name.rpartition(".")[2]
                fits = other.sum_A.shape == one.sum_A.shape and other.n == one.n
                wanted = not kind if same_block else kind and not near
                if fits and wanted and not np.array_equal(other.sum_A, one.sum_A):
                    out[f"factors.{one.name}.sum_A"] = other.sum_A
                    break
        return out

    return plant


def _reduced(made: Truth, one: Layer) -> Mapping[str, object]:
    """Each sequence's rows are added before they are squared."""
    a = np.where(one.keep[..., None], one.a, 0).sum(axis=1)
    return {"sum_A": a.T @ a}


def _rank_one(made: Truth, one: Layer) -> Mapping[str, object]:
    g = np.where(one.keep[..., None], one.g, 0).sum(axis=(0, 1))
    return {"sum_G": np.outer(g, g)}


def _last_batch(made: Truth, one: Layer) -> Mapping[str, object]:
    last = np.zeros_like(one.keep)
    last[-1] = one.keep[-1]
    n = int(last.sum())
    return {"sum_A": gram(one.a, last) * (one.n / n)} if 0 < n < one.n else {}


def _centred(made: Truth, one: Layer) -> Mapping[str, object]:
    rows = one.a[one.keep]
    return {"sum_A": one.sum_A - np.outer(rows.sum(axis=0), rows.sum(axis=0)) / len(rows)}


def _shifted_shards(made: Truth, one: Layer) -> Mapping[str, object]:
    size = len(one.sum_A)
    return {"sum_A": np.roll(one.sum_A, size // 2, axis=0)} if size > 1 else {}


def _bfloat16_sums(made: Truth, one: Layer) -> Mapping[str, object]:
    """Rows are added in a sum that is rounded to bfloat16 after each."""

    def added(rows: Array) -> Array:
        total = np.zeros((rows.shape[1], rows.shape[1]))
        for row in rows:
            total = from_bfloat16(to_bfloat16(total + np.outer(row, row))).astype(np.float64)
        return total

    return {"sum_A": added(one.a[one.keep]), "sum_G": added(one.g[one.keep])}


SUMS = (
    Bug("B1", "NORMALISATION", "g is the gradient of the mean loss, not of the summed one",
        "sums", _sums(_mean_loss)),
    Bug("B4", "NORMALISATION", "rows are counted as sequences", "sums", _sums(_per_sequence_count)),
    Bug("B11", "NORMALISATION", "the gradients' scale of mixed precision, 2^16, is left in",
        "sums", _sums(lambda made, one: {"sum_G": one.sum_G * 2.0**32})),
    Bug("B12", "NORMALISATION", "damping is part of A", "sums", _sums(_damped)),
    Bug("B15", "LABELS", "the corpus's labels where labels should be drawn",
        "sums", _sums(lambda made, one: {"sum_G": gram(one.gold, one.keep)})),
    Bug("B16", "LABELS", "the likeliest labels where labels should be drawn", "sums", _argmax),
    Bug("B17", "LABELS", "one drawn label for all positions of a sequence", "sums", _one_label),
    Bug("B20", "MASKING", "rows without a label are dropped", "sums", _sums(_rows_of(_labelled))),
    Bug("B27", "MASKING", "the last position, which has no label, is a row",
        "sums", _sums(_rows_of(_every_real))),
    Bug("B28", "MASKING", "padding is a row", "sums", _sums(_rows_of(_padding_too))),
    Bug("B32", "LAYOUT", "A and G are swapped", "sums", _sums(_swapped)),
    Bug("B34", "WRONG_LAYER", "A of another input of the same width", "sums", _elsewhere(True)),
    Bug("B36", "MASKING", "positions are summed before the square", "sums", _sums(_reduced)),
    Bug("B38", "WRONG_LAYER", "A of the same layer in another block", "sums", _elsewhere(False)),
    Bug("B39", "NORMALISATION", "hooks fired twice: A and its count are doubled",
        "sums", _sums(lambda made, one: {"sum_A": 2 * one.sum_A, "n_A": 2 * one.n})),
    Bug("B41", "MASKING", "A is that of the last sequence", "sums", _sums(_last_batch)),
    Bug("B43", "NORMALISATION", "the loss was divided by two accumulation steps",
        "sums", _sums(lambda made, one: {"sum_G": one.sum_G / 4})),
    Bug("B44", "NORMALISATION", "g is summed over the batch before the square",
        "sums", _sums(_rank_one)),
    Bug("B45", "NORMALISATION", "A is centred: a covariance", "sums", _sums(_centred)),
    Bug("B47", "LAYOUT", "row shards of A are joined in the wrong order",
        "sums", _sums(_shifted_shards)),
    Bug("B58", "PRECISION", "sums are kept in bfloat16", "sums", _sums(_bfloat16_sums)),
)  # fmt: skip
"""Bugs that Σ x xᵀ over the stored rows shows."""
