"""Numbers about what a model says: pure functions of arrays, without a model (METHOD, Metrics)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from refcurv.algebra.scaling import total
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    ShapeError,
    as_array,
    as_integers,
    overflow_hint,
    require_choice,
    require_dtype,
    require_finite,
    require_range,
    require_shape,
)
from refcurv.law.conventions import Gain
from refcurv.model.given import require_whole

NDCG_K = 10
"""nDCG@K: how many of the likeliest tokens are compared."""


# ------------------------------------------------------------------ decoded text


@dataclass(frozen=True, slots=True)
class Recitation:
    """How much of the true suffixes was recited.

    Fields: strict, the share of rows with d = 0; loose, the share with 1 - d/L >= 0.75; distance,
    the mean of d/L. d is the Levenshtein distance over token ids, L the length of the suffix.
    """

    strict: float
    loose: float
    distance: float


def recitation(decoded: Sequence[Array], truth: Sequence[Array]) -> Recitation:
    """Strict and loose recitation and the mean distance, over rows of any lengths.

    Definition
        d = least number of insertions, deletions and substitutions that turn one into the other
        loose: 1 - d/L >= 3/4, decided in integers as 4 d <= L

    Args:
        decoded: per row the ids (L,) that the model said.
        truth: per row the ids (L,) that are true; L may differ between rows.

    Returns:
        Recitation, every field in [0, 1].

    Raises:
        EmptyError: no rows, or a row whose suffix is empty, so that d/L means nothing.
        ShapeError: a row's decoded and true suffix differ in length.

    Cost: O(L² / 64) per row.
    Source: METHOD, Recitation.
    Proof:  tests/test_metrics.py::test_recitation_is_the_definition; ::test_loose_is_exact
    """
    pairs = edit_distances(decoded, truth)
    return Recitation(
        strict=sum(x == 0 for x, _ in pairs) / len(pairs),
        loose=sum(4 * x <= L for x, L in pairs) / len(pairs),
        distance=math.fsum(x / L for x, L in pairs) / len(pairs),
    )


def edit_distances(decoded: Sequence[Array], truth: Sequence[Array]) -> list[tuple[int, int]]:
    """(d, L) of each row, as `recitation` defines them; its arguments and errors.

    Proof:  tests/test_metrics.py::test_recitation_is_the_definition
    """
    _require_rows("recitation", decoded, truth)
    return [
        (Levenshtein.distance(a.tolist(), b.tolist()), len(b))
        for a, b in zip(decoded, truth, strict=True)
    ]


def exact_match(decoded: Sequence[Array], truth: Sequence[Array]) -> Array:
    """(N,) bool: which rows are decoded without a wrong token; the mean is task accuracy.

    Raises:
        EmptyError, ShapeError: as `recitation`.

    Proof:  tests/test_metrics.py::test_exact_match_is_strict_recitation
    """
    _require_rows("exact_match", decoded, truth)
    return np.array([np.array_equal(a, b) for a, b in zip(decoded, truth, strict=True)])


def accuracy(predicted: Array, label: Array) -> float:
    """The share of items whose predicted class is the label; both are (N,) integers.

    Raises:
        ShapeError: they differ in number. EmptyError: there are none.

    Proof:  tests/test_metrics.py::test_accuracy_by_hand
    """
    require_shape("accuracy", "predicted", predicted, np.shape(label), "(N,), as labels")
    if not len(label):
        raise EmptyError("accuracy: there are no items to compare.")
    return float((predicted == label).sum()) / len(label)


def _require_rows(who: str, decoded: Sequence[Array], truth: Sequence[Array]) -> None:
    if len(decoded) != len(truth):
        raise ShapeError(f"{who}: {len(decoded)} decoded rows, but {len(truth)} true ones.")
    if not len(truth):
        raise EmptyError(f"{who}: there are no rows to compare.")
    for n, (a, b) in enumerate(zip(decoded, truth, strict=True)):
        if not len(b):
            raise EmptyError(f"{who}: the true suffix of row {n} is empty, so d/L has no meaning.")
        if len(a) != len(b):
            raise ShapeError(
                f"{who}: row {n} has {len(a)} decoded tokens, but {len(b)} true ones. Exactly "
                "length - prompt_length are decoded; was a stop token obeyed?"
            )


# ------------------------------------------------------------------ perplexity


def perplexity(nats: Array | float, count: Array | int) -> float:
    """exp of the mean nats per token: exp(total nats / total tokens), in float64.

    Args:
        nats: summed nats, of everything or per batch, in any shape. They are added with one
            rounding, so that the order of batches changes no bit.
        count: the numbers of tokens that they were summed over.

    Returns:
        Perplexity, >= 1 for any true likelihood; infinite beyond a mean of 709.78 nats.

    Raises:
        EmptyError: no tokens.
        NonFiniteError: a sum is NaN or infinite. ShapeError: no arrays.
        DTypeError: sums that are not real, counts that are not integers, masked entries.

    Source: METHOD, Perplexity. The official code takes the mean over batches of exp(batch
        loss) instead: never smaller for batches of equal size (Jensen), different in general.
    Proof:  tests/test_metrics.py::test_O66_perplexity_knows_no_batches
    """
    given = as_array("perplexity", "nats", nats, "numbers")
    require_dtype("perplexity", "nats", given, "fiub", "real numbers")
    part = given.astype(np.float64)
    require_finite("perplexity", "nats", part)
    counted = as_array("perplexity", "count", count, "numbers")
    require_dtype("perplexity", "count", counted, "iu", "integers")
    tokens = int(counted.sum())
    if tokens <= 0:
        raise EmptyError("perplexity: there are no tokens to average over.")
    with np.errstate(over="ignore"):
        return float(np.exp(total(part.ravel().tolist()) / tokens))


# ------------------------------------------------------------------ nDCG


def top_ids(logits: Array, k: int) -> Array:
    """The ids of the k largest logits of each row, largest first, the lowest id first on ties.

    Args:
        logits: (N, V), of any real dtype, also integers or booleans; compared without conversion.
        k: 1 <= k <= V.

    Returns:
        (N, k) int64.

    Raises:
        RangeError: k is no integer in [1, V]. DTypeError: complex numbers, texts, objects.
        NonFiniteError: a logit is NaN or infinite.

    Cost: O(N V): selection, not sorting.
    Proof:  tests/test_metrics.py::test_top_ids_is_a_stable_sort
    """
    logits = as_array("top_ids", "logits", logits, "(N, V)")
    require_shape("top_ids", "logits", logits, (None, None), "(N, V)")
    require_dtype("top_ids", "logits", logits, "biuf", "real numbers")
    require_finite("top_ids", "logits", logits, overflow_hint(logits.dtype))
    V = logits.shape[1]
    require_whole("top_ids", "k, at most the size of the vocabulary,", k, 1, V)
    if (id_NM := _among(logits, k)) is None:
        return _top(logits, k)
    at_NK = _top(np.take_along_axis(logits, id_NM, axis=-1), k)
    return np.take_along_axis(id_NM, at_NK, axis=-1)


RUN = 128
"""Neighbours of which the largest is found first: then few runs are looked at closely."""


def _among(logits: Array, k: int) -> Array | None:
    """(N, M) ascending ids, some of which are the k largest; None where all would be looked at.

    The k runs with the largest maxima hold k values that reach the least of these maxima. So what
    is smaller is not among the k largest, and what is not lies in a run whose maximum reaches it.
    """
    N, V = logits.shape
    runs = V // RUN
    if 8 * k > runs or not N:
        return None
    top_NR = logits[:, : runs * RUN].reshape(N, runs, RUN).max(axis=-1)
    least_N1 = np.partition(top_NR, runs - k, axis=-1)[:, runs - k, None]
    most = int((top_NR >= least_N1).sum(axis=-1).max())
    if 8 * most > runs:
        return None
    run_NR = np.sort(np.argpartition(top_NR, runs - most, axis=-1)[:, runs - most :], axis=-1)
    inside_NM = (run_NR[:, :, None] * RUN + np.arange(RUN)).reshape(N, -1)
    behind_NM = np.broadcast_to(np.arange(runs * RUN, V), (N, V - runs * RUN))
    return np.concatenate([inside_NM, behind_NM], axis=-1)


def _top(logits: Array, k: int) -> Array:
    """`top_ids` by looking at every value."""
    V = logits.shape[1]
    id_NK = np.argpartition(logits, V - k, axis=-1)[:, V - k :]
    least_N1 = np.take_along_axis(logits, id_NK, axis=-1).min(axis=-1, keepdims=True)
    # where more than k ids reach the k-th largest value, take the lowest of those that equal it
    for n in np.flatnonzero((logits >= least_N1).sum(axis=-1) > k):
        above, equal = np.flatnonzero(logits[n] > least_N1[n]), logits[n] == least_N1[n]
        id_NK[n] = np.concatenate([above, np.flatnonzero(equal)[: k - len(above)]])
    # Sort ids downwards, then stably by value upwards, and read backwards. Negating the values
    # would be simpler, but -(-128) is -128 in int8, and unsigned numbers wrap.
    id_NK = np.sort(id_NK, axis=-1)[:, ::-1]
    value_NK = np.take_along_axis(logits, id_NK, axis=-1)
    order_NK = np.argsort(value_NK, axis=-1, kind="stable")[:, ::-1]
    return np.asarray(np.take_along_axis(id_NK, order_NK, axis=-1), dtype=np.int64)


def ndcg_of_ids(baseline: Array, edited: Array, gain: Gain | str = Gain.PAPER) -> Array:
    """nDCG of each position, from the likeliest ids of both models in order: B baseline, E edited.

    Definition
        nDCG = Σ_r gain_r / log2(r + 1)  /  Σ_r (K - r + 1) / log2(r + 1)        r = 1 .. K
        paper: gain_r = K - r + 1 if E_r is in B, else 0
        code:  gain_r = K - b + 1 if E_r = B_b,   else 0

    Args:
        baseline: (N, K) ids, likeliest first, no id twice in a row.
        edited: (N, K), likewise.
        gain: which list's rank grades a token that is in both.

    Returns:
        (N,) float64 in [0, 1], 1 where both lists are the same.

    Raises:
        ShapeError: the lists differ in shape, or K = 0. DTypeError: ids that are not integers.
        ConventionError: an unknown gain, or a list that holds an id twice.

    Source: METHOD, nDCG@K.
    Proof:  tests/test_metrics.py::test_ndcg_is_the_definition; ::test_gains_differ
    """
    reading = Gain(require_choice("ndcg", "gain", gain, Gain))
    baseline = as_integers("ndcg", "baseline ids", baseline, (None, None), "(N, K)")
    edited = as_integers("ndcg", "edited ids", edited, baseline.shape, "(N, K)")
    K = baseline.shape[-1]
    if K == 0:
        raise ShapeError("ndcg: the lists must hold at least one id per position.")
    _require_distinct("baseline", baseline)
    _require_distinct("edited", edited)
    grade_K = np.arange(K, 0, -1, dtype=np.float64)
    discount_K = 1 / np.log2(np.arange(2, K + 2, dtype=np.float64))
    gain_NK = np.zeros(edited.shape, dtype=np.float64)
    for b in range(K):
        same_NK = edited == baseline[:, b : b + 1]
        gain_NK += same_NK * (grade_K if reading is Gain.PAPER else grade_K[b])
    # the ideal is summed in the same order as the score: a list scores exactly 1 against itself
    ideal_NK = np.tile(grade_K, (len(edited), 1)) * discount_K
    return np.asarray((gain_NK * discount_K).sum(axis=-1) / ideal_NK.sum(axis=-1))


def _require_distinct(what: str, id_NK: Array) -> None:
    """Refuse an id that stands twice in a row: it would gain twice."""
    sorted_NK = np.sort(id_NK, axis=-1)
    twice_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    if twice_NK.any():
        n, r = (int(i) for i in np.argwhere(twice_NK)[0])
        raise ConventionError(
            f"ndcg: the {what} ids of position {n} hold {sorted_NK[n, r]} twice; a list of the "
            "likeliest tokens names each once."
        )


def ndcg(
    baseline_logits: Array, edited_logits: Array, k: int = NDCG_K, gain: Gain | str = Gain.PAPER
) -> float:
    """nDCG@k of the edited model's likeliest tokens against the baseline's, mean over positions.

    It is `ndcg_of_ids` of the `top_ids` of both. A shift or a positive scaling of either model's
    logits changes nothing, except where rounding makes ties.

    Args:
        baseline_logits: (N, V) of the unedited model.
        edited_logits: (N, V) of the edited one, at the same positions.
        k: how many tokens are compared, 1 <= k <= V.
        gain: the paper's reading or the code's, see `ndcg_of_ids`.

    Returns:
        A number in [0, 1]; exactly 1 for equal logits.

    Raises:
        EmptyError: no positions.
        ShapeError, RangeError, NonFiniteError, ConventionError: as `top_ids`, `ndcg_of_ids`.

    Source: METHOD, nDCG@K.
    Proof:  tests/test_metrics.py::test_ndcg_is_the_definition; ::test_O66_ndcg_of_itself_is_one
    """
    require_shape("ndcg", "edited_logits", edited_logits, np.shape(baseline_logits), "(N, V)")
    if not len(baseline_logits):
        raise EmptyError("ndcg: there are no positions to average over.")
    ids = top_ids(baseline_logits, k), top_ids(edited_logits, k)
    return float(ndcg_of_ids(*ids, gain).mean())


# ------------------------------------------------------------------ retention


def retention(before: float, after: float) -> float:
    """after / before: the share of an ability that is left after an edit. It may exceed 1.

    NaN (in a table "-") where it has no meaning: before == 0, so that there was nothing to retain,
    or either value is NaN, so that it was not measured.

    Raises:
        RangeError: a negative value.

    Source: METHOD, Task accuracy.
    Proof:  tests/test_metrics.py::test_retention_edges
    """
    return retention_above_chance(before, after, 0.0)


def retention_above_chance(before: float, after: float, chance: float) -> float:
    """(after - chance) / (before - chance): the share of what was known, not guessed.

    NaN (in a table "-") where it has no meaning: before <= chance, so that nothing was known and
    the ratio would be noise or have the wrong sign, or either value is NaN. It is negative where
    the edited model does worse than guessing, and is not clipped. With chance = 0 it is
    `retention`.

    Args:
        before: accuracy of the baseline, >= 0.
        after: accuracy of the edited model, >= 0.
        chance: accuracy of a guess, in [0, 1].

    Raises:
        RangeError: a negative value, or chance outside [0, 1].

    Source: METHOD, Task accuracy.
    Proof:  tests/test_metrics.py::test_retention_edges
    """
    require_range("retention", "chance", chance, 0, 1)
    for what, value in (("before", before), ("after", after)):
        if not math.isnan(value):
            require_range("retention", what, value, 0, math.inf)
    if math.isnan(before) or math.isnan(after) or before <= chance:
        return math.nan
    return (after - chance) / (before - chance)
