"""Each metric against its definition, written out a second time with loops."""

from __future__ import annotations

import math
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refcurv.evaluation import metrics
from refcurv.evaluation.metrics import (
    accuracy,
    exact_match,
    ndcg,
    ndcg_of_ids,
    perplexity,
    recitation,
    retention,
    retention_above_chance,
    top_ids,
)
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.law.conventions import Gain

ids = st.integers(0, 4)


# ------------------------------------------------------------------ recitation


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein by the textbook recursion over prefixes, as a table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return table[-1][-1]


@st.composite
def recited(draw):
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        truth = draw(st.lists(ids, min_size=1, max_size=9))
        own = draw(st.booleans())
        said = truth if own else draw(st.lists(ids, min_size=len(truth), max_size=len(truth)))
        rows.append((np.array(said), np.array(truth)))
    return [a for a, _ in rows], [b for _, b in rows]


@given(recited())
def test_recitation_is_the_definition(rows):
    said, truth = rows
    found = recitation(said, truth)
    d = [edit_distance(list(a), list(b)) for a, b in zip(said, truth, strict=True)]
    L = [len(b) for b in truth]
    assert found.strict == sum(x == 0 for x in d) / len(d)
    loose = [1 - Fraction(x, n) >= Fraction(3, 4) for x, n in zip(d, L, strict=True)]
    assert found.loose == sum(loose) / len(d)
    exact = sum(Fraction(x, n) for x, n in zip(d, L, strict=True)) / len(d)
    assert found.distance == pytest.approx(float(exact), rel=1e-15)
    assert 0 <= found.strict <= found.loose <= 1
    assert 0 <= found.distance <= 1


def test_distance_counts_shifts_not_mismatches():
    """One token dropped at the front: every position differs, two edits undo it."""
    truth = np.arange(10)
    found = recitation([np.roll(truth, -1)], [truth])
    assert (found.strict, found.loose, found.distance) == (0.0, 1.0, 0.2)


def test_loose_is_exact():
    """1 - d/L == 0.75 is loose, one edit more is not; ids beyond any byte or surrogate."""
    truth = np.arange(12) + 100_000
    for wrong, loose in ((3, 1.0), (4, 0.0)):
        said = truth.copy()
        said[:wrong] = 7
        assert recitation([said], [truth]).loose == loose


@given(recited())
def test_exact_match_is_strict_recitation(rows):
    assert exact_match(*rows).mean() == recitation(*rows).strict


def test_rows_must_fit():
    a, empty = np.array([1, 2]), np.array([], dtype=int)
    for metric in (recitation, exact_match):
        with pytest.raises(EmptyError, match="no rows"):
            metric([], [])
        with pytest.raises(EmptyError, match="row 1 is empty"):
            metric([a, empty], [a, empty])
        with pytest.raises(ShapeError, match="stop token"):
            metric([a[:1]], [a])
        with pytest.raises(ShapeError, match="1 decoded rows, but 2"):
            metric([a], [a, a])


def test_accuracy_by_hand():
    assert accuracy(np.array([1, 2, 0, 2]), np.array([1, 0, 0, 2])) == 0.75
    assert accuracy(np.array([1]), np.array([0])) == 0
    with pytest.raises(EmptyError, match="no items"):
        accuracy(np.array([]), np.array([]))
    with pytest.raises(ShapeError, match=r"predicted must be \(2\)"):
        accuracy(np.array([[1, 2]]), np.array([1, 2]))


# ------------------------------------------------------------------ perplexity


batch_lists = st.lists(st.lists(st.floats(0, 20), min_size=1, max_size=6), min_size=1, max_size=6)


@given(batch_lists)
def test_O66_perplexity_knows_no_batches(parts):
    """One exp of one mean; the mean over batches of exp(batch loss) is another number (O66)."""
    every = [x for part in parts for x in part]
    got = perplexity(np.array([sum(p) for p in parts]), np.array([len(p) for p in parts]))
    assert got == pytest.approx(perplexity(np.array(every), len(every)), rel=1e-13)
    assert got == pytest.approx(math.prod(math.exp(x / len(every)) for x in every), rel=1e-12)
    of_batches = np.mean([perplexity(np.array(p), len(p)) for p in parts])
    if len({len(p) for p in parts}) == 1:  # Jensen
        assert of_batches >= got * (1 - 1e-12)


@pytest.mark.parametrize(
    ("batch", "tokens", "want"),
    [((2, 64), (3, 1), 2 ** (9 / 4)), ((4, 2), (9, 1), 2 ** (19 / 10))],
    ids=["mean-is-larger", "mean-is-smaller"],
)
def test_O66_mean_of_batch_perplexities_differs_either_way(batch, tokens, want):
    """Batches of unequal size: 33 against 4.76, and 3 against 3.73."""
    nats = np.log(batch) * tokens
    got = perplexity(nats, np.array(tokens))
    assert got == pytest.approx(want, rel=1e-14)
    assert (np.mean(batch) > got) == (batch == (2, 64))
    assert abs(np.mean(batch) - got) > 0.7


def test_perplexity_sums_in_float64():
    """float32 nats whose float32 sum would stall: 2²⁴ + 1 is 2²⁴ there."""
    nats = np.ones(3, dtype=np.float32)
    nats[0] = 2**24
    assert perplexity(nats, 2**24) == math.exp((2**24 + 2) / 2**24)
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(EmptyError):
        perplexity(np.zeros(0), 0)
    with pytest.raises(NonFiniteError):
        perplexity(np.array([1.0, np.nan]), 2)


def test_perplexity_at_the_ends_of_the_range():
    """Sums whose sum is beyond float64 have a perplexity all the same: infinite, or 0."""
    assert perplexity(np.full(3, 1e308), 3) == math.inf
    assert perplexity(np.array([1e308, 1e308, -1e308, -1e308]), 3) == 1.0
    assert perplexity(np.full(3, -1e308), 3) == 0.0
    for count in (math.nan, 2.0, "3", None):
        with pytest.raises(DTypeError, match="count must hold integers"):
            perplexity(1.0, count)


# ------------------------------------------------------------------ nDCG


def ranked(row, k):
    return sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]


def ndcg_by_definition(base, edited, k, gain):
    """METHOD, nDCG@K, position by position and rank by rank."""
    total = 0.0
    for b_row, e_row in zip(base.tolist(), edited.tolist(), strict=True):
        B, E = ranked(b_row, k), ranked(e_row, k)
        got = ideal = 0.0
        for r in range(1, k + 1):
            if E[r - 1] in B:
                rank = r if gain == "paper" else B.index(E[r - 1]) + 1
                got += (k - rank + 1) / math.log2(r + 1)
            ideal += (k - r + 1) / math.log2(r + 1)
        total += got / ideal
    return total / len(base)


# few values, so that ties are common
logit_values = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-30, 30, allow_nan=False, width=32)
)


@st.composite
def two_logits(draw):
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    arrays = hnp.arrays(
        draw(st.sampled_from([np.float32, np.float64])), shape, elements=logit_values
    )
    return draw(arrays), draw(arrays), draw(st.integers(1, min(shape[1], 10)))


@given(two_logits(), st.sampled_from(["paper", "code"]))
def test_ndcg_is_the_definition(drawn, gain):
    base, edited, k = drawn
    got = ndcg(base, edited, k, gain)
    assert got == pytest.approx(ndcg_by_definition(base, edited, k, gain), rel=1e-13, abs=1e-15)
    assert 0 <= got <= 1 + 1e-15


@given(two_logits(), st.sampled_from(list(Gain)))
def test_O66_ndcg_of_itself_is_one(drawn, gain):
    """Exactly: a float16 relevance shows 1.00009 (Oracle 79)."""
    base, _, k = drawn
    assert ndcg(base, base.copy(), k, gain) == 1.0


@given(two_logits(), st.sampled_from(list(Gain)), st.integers(-5, 5), st.integers(-3, 3))
def test_O66_ndcg_ignores_shift_and_scale(drawn, gain, shift, power):
    base, edited, k = drawn
    base, edited = np.round(base * 4), np.round(edited * 4)  # so that shift and scale are exact
    moved = (edited + shift) * 2.0**power
    assert ndcg(base, moved, k, gain) == ndcg(base, edited, k, gain)
    assert ndcg((base + shift) * 2.0**power, edited, k, gain) == ndcg(base, edited, k, gain)


@given(two_logits())
def test_top_ids_is_a_stable_sort(drawn):
    base, _, k = drawn
    want = np.argsort(-base, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_ids(base, k), want)


@given(st.data(), st.integers(1, 3), st.integers(1, 160))
def test_top_ids_of_many(data, run, V):
    """Whatever the runs whose maxima are looked at first; with ties, also of these maxima."""
    values = st.integers(0, 300) | st.integers(0, 3)
    rows = data.draw(st.lists(st.lists(values, min_size=V, max_size=V), min_size=0, max_size=4))
    x, k = np.array(rows, np.float32).reshape(-1, V), data.draw(st.integers(1, min(V, 4)))
    with patch.object(metrics, "RUN", run):
        found = top_ids(x, k)
    np.testing.assert_array_equal(found, np.argsort(-x, axis=-1, kind="stable")[:, :k])
    assert found.dtype == np.int64


def test_top_ids_looks_at_few():
    """Of a large vocabulary at two in a hundred; where all are equal, at all."""
    x = np.random.default_rng(0).standard_normal((3, 50_003), np.float32)
    x[1, 50_002] = x[2, 77] = 9
    among = metrics._among(x, 10)
    assert among is not None and among.shape[1] == 10 * metrics.RUN + 50_003 % metrics.RUN
    np.testing.assert_array_equal(top_ids(x, 10), np.argsort(-x, axis=-1, kind="stable")[:, :10])
    assert metrics._among(np.zeros((2, 50_000)), 10) is None


KINDS = [np.bool_, np.int8, np.uint8, np.int16, np.uint64, np.int64, np.float16, np.longdouble]


@given(st.data(), st.sampled_from(KINDS))
def test_top_ids_of_every_dtype(data, dtype):
    """No value is negated: -(-128) is -128 in int8, and a bool has no negative."""
    low, high = (0, 1) if dtype is np.bool_ else (-7, 7)
    if np.dtype(dtype).kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    value = st.sampled_from([low, high, 0, 1]) | st.integers(low, high)
    rows = data.draw(st.lists(st.lists(value, min_size=6, max_size=6), min_size=1, max_size=3))
    k = data.draw(st.integers(1, 6))
    x = np.array(rows).astype(dtype) if dtype is np.bool_ else np.array(rows, dtype)
    assert top_ids(x, k).tolist() == [ranked(row, k) for row in rows]


@pytest.mark.parametrize(
    ("logits", "k", "error", "says"),
    [
        ([[1.0, np.nan]], 1, NonFiniteError, "nan"),
        ([[1.0, -np.inf]], 1, NonFiniteError, "-inf"),
        ([["a", "b"]], 1, DTypeError, "real numbers; got <U1"),
        ([[1j, 2]], 1, DTypeError, "complex128"),
        ([[None, 1]], 1, DTypeError, "object"),
        ([[1, 2], [3]], 1, ShapeError, "row 1 is of length 1"),
        ([1.0, 2.0], 1, ShapeError, r"\(2,\)"),
        ([[1.0, 2.0]], 0, RangeError, r"integer in \[1, 2\]"),
        ([[1.0, 2.0]], 1.0, RangeError, r"got 1\.0"),
        ([[1.0, 2.0]], True, RangeError, "got True"),
        ([[], []], 1, RangeError, r"\[1, 0\]"),
    ],
)
def test_top_ids_refusals(logits, k, error, says):
    with pytest.raises(error, match=says):
        top_ids(logits, k)


id_lists = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=3)


@given(id_lists, st.booleans(), st.sampled_from(list(Gain)))
def test_an_id_counts_once_or_is_refused(rows, first, gain):
    """E = (1, 1, 1) against B = (1, 2, 3) would gain three times over: nDCG 2."""
    lists = np.array(rows), np.tile([0, 1, 2], (len(rows), 1))
    lists = lists if first else lists[::-1]
    if all(len(set(row)) == 3 for row in rows):
        assert ((ndcg_of_ids(*lists, gain) >= 0) & (ndcg_of_ids(*lists, gain) <= 1 + 1e-15)).all()
        return
    with pytest.raises(ConventionError, match=f"the {'baseline' if first else 'edited'} ids"):
        ndcg_of_ids(*lists, gain)


def test_ids_are_integers_in_a_matrix():
    for ids, error in (([[1.0]], DTypeError), ([[1, 2], [3]], ShapeError), ([1], ShapeError)):
        with pytest.raises(error):
            ndcg_of_ids(ids, [[1]])
        with pytest.raises(error):
            ndcg_of_ids([[1]], ids)


def test_gains_differ():
    """B = (0, 1, 2), E = (2, 0, 9), K = 3. Paper: 3/1 + 2/log2(3); code: 1/1 + 3/log2(3)."""
    B, E = np.array([[0, 1, 2]]), np.array([[2, 0, 9]])
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg_of_ids(B, E, Gain.PAPER)[0] == pytest.approx((3 + 2 / math.log2(3)) / ideal)
    assert ndcg_of_ids(B, E, Gain.CODE)[0] == pytest.approx((1 + 3 / math.log2(3)) / ideal)


@given(st.permutations(range(6)))
def test_only_the_codes_gain_sees_order(order):
    """Same ten in another order: 1 by the paper's reading, less by the code's."""
    B, E = np.arange(6)[None], np.array([order])
    assert ndcg_of_ids(B, E, "paper")[0] == 1.0
    assume(list(order) != sorted(order))
    assert ndcg_of_ids(B, E, "code")[0] < 1


def test_ndcg_refusals():
    x = np.zeros((2, 4))
    with pytest.raises(RangeError, match="vocabulary"):
        ndcg(x, x, 5)
    with pytest.raises(ShapeError):
        ndcg(x, x[:, :3], 2)
    with pytest.raises(EmptyError):
        ndcg(x[:0], x[:0], 2)
    with pytest.raises(ConventionError, match="one of paper, code; got 'papers'"):
        ndcg(x, x, 2, "papers")
    with pytest.raises(NonFiniteError):
        ndcg(x, x + np.inf, 2)


# ------------------------------------------------------------------ retention


def test_retention_edges():
    assert retention(0.8, 0.2) == pytest.approx(0.25)
    assert retention(0.5, 0.6) == pytest.approx(1.2)
    assert retention(0.5, 0.0) == 0.0
    assert math.isnan(retention(0.0, 0.0))
    assert math.isnan(retention(0.0, 0.3))
    assert math.isnan(retention(math.nan, 0.3))
    assert math.isnan(retention(0.3, math.nan))
    assert retention_above_chance(0.9, 0.7, 0.5) == pytest.approx(0.5)
    assert retention_above_chance(0.75, 0.25, 0.5) == -1.0
    assert math.isnan(retention_above_chance(0.5, 0.9, 0.5))
    assert math.isnan(retention_above_chance(0.4, 0.3, 0.5))
    for arguments in ((-0.1, 0.2, 0.0), (0.1, -0.2, 0.0), (0.1, 0.2, 1.5), (0.1, 0.2, -0.1)):
        with pytest.raises(RangeError):
            retention_above_chance(*arguments)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_retention_is_one_for_no_change_and_affine(before, after, chance):
    assume(before > chance + 1e-6)
    assert retention_above_chance(before, before, chance) == 1.0
    got = retention_above_chance(before, after, chance)
    assert chance + got * (before - chance) == pytest.approx(after, abs=1e-9)
    assert retention_above_chance(before, after, 0.0) == retention(before, after)
