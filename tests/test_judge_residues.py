"""What a fault leaves is no second fault where rounding, drawing or theory explains it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from refcurv.judge.case import Counts
from refcurv.judge.diagnosis import choosing, compared, precision, procedure, signs, telling
from refcurv.judge.diagnosis.compared import _alone, _left
from refcurv.judge.diagnosis.ladders import Ladder
from refcurv.judge.diagnosis.search import PLAIN, Chosen, Idea, Option, Side
from refcurv.judge.diagnosis.seen import Left, Seen, fitted
from refcurv.judge.diagnosis.variants import Moments, Setting
from refcurv.judge.diagnosis.weighted import _tried, _uncalled, leave_lone, lone, rules
from refcurv.judge.drawn import Drawing

EXACT = Ladder((("float32", 0.01), ("bfloat16", 0.05)))
DRAWN = replace(EXACT, drawing=Drawing(0.8, 0.0, 0.8), same=0.005)
Q, K, V = (f"blocks.0.attn.{name}" for name in "qkv")
SWAP = Idea(("B32",), None)


def side_of(steps, idea=None, **left):
    """A Side of two layers, in which an idea leaves what is said, and ours leaves all."""
    side = Side("G", dict.fromkeys((Q, K), steps))
    side.table = {PLAIN: {x: Left(1.0, 1.0) for x in (Q, K)}}
    if idea is not None:
        one = Left(**left)
        side.table[idea] = {Q: one, K: one}
        side.chosen = [Chosen(idea, side.table[idea])]
    return side


def test_a_matrix_in_the_place_of_another_has_a_budget_of_its_own():
    for roomy, rank in ((1.0, 1), (3.0, 0)):
        side = side_of(EXACT, SWAP, error=0.03, ratio=1.0, roomy=roomy)
        assert side.rank(Q, side.of(Q)[1]) == rank
        (option,) = side._options([Q, K], {Q: PLAIN, K: PLAIN})
        assert (option.quality > 1) == (roomy == 1)


DECAY = Idea(("B9",), None, "a moving average")


@pytest.mark.parametrize(
    ("weights", "layers", "others", "stays"),
    [
        (DECAY, [Q], [], False),  # of two layers that nothing explains it says nothing
        (DECAY, [Q], [K, V], True),  # another fault beside it explains them
        (DECAY, [Q, K], [], True),
        (SWAP, [Q], [], True),  # one layer alone may be that of another
    ],
)
def test_weights_of_one_layer_alone_are_none(weights, layers, others, stays):
    side, exact = Side("G", dict.fromkeys((Q, K, V), EXACT)), Left(0.0, 1.0)
    side.table = {PLAIN: {x: Left(1.0, 1.0) for x in (Q, K, V)}}
    one, two = (
        Chosen(weights, dict.fromkeys(layers, exact)),
        Chosen(SWAP, dict.fromkeys(others, exact)),
    )
    side.chosen = [one, two]
    leave_lone(side)
    assert (one in side.chosen, two in side.chosen) == (stays, True)


@pytest.mark.parametrize(
    ("idea", "layers", "exact"), [(DECAY, [Q], False), (DECAY, [Q, K], True), (SWAP, [Q], True)]
)
def test_weights_of_one_layer_do_not_end_the_search(idea, layers, exact):
    """A moving average leaves nothing of one matrix of three; what explains all is tried after."""
    side = Side("G", dict.fromkeys((Q, K, V), EXACT))
    chosen = Chosen(idea, dict.fromkeys(layers, Left(0.0, 1.0)))
    assert choosing._exact(side, chosen, [Q, K, V]) == exact
    assert lone(chosen, [Q, K, V]) != exact
    assert not lone(chosen, [Q, K][: 2 * len(layers)])  # half of them are not few


def test_a_forward_for_shapes_may_be_of_any_batch_but_all():
    """Of one sequence too; nothing of G is added twice, and its count is that of A."""
    order = np.arange(3)
    each = [(one.weight.tolist(), one.often, one.counts) for one in _tried(order)]
    twice, once = (True, ("own",)), (False, ("every",))
    assert each == [(weight, *how) for weight in ([2, 1, 1], [2, 2, 1]) for how in (twice, once)]
    of = SimpleNamespace(sequences=order, labels=np.ones(3), kept=np.ones(3))
    A, G = ({one.name for one in rules(of, side)} for side in "AG")
    assert {one.name for one in _tried(order)} == {name for name in A if "added twice" in name}
    assert not any("added twice" in name for name in G)
    (name, *_), more = (one.name for one in _tried(order)), ", as with network `x`"
    for wanted in (name, name + more):
        (beside,) = _uncalled(of, {wanted})
        assert beside.base is not None and beside.base.name == name
        assert beside.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "n_G", "counted"),
    [
        (1.0, 5, 1.0),  # A's weights explain the one count of both
        (0.5, 5, 5 / 9),
        (1.0, 9, 5 / 9),  # G has a count of its own
    ],
)
def test_a_count_that_weights_of_a_explain_is_that_of_g_too(monkeypatch, rows, n_G, counted):
    monkeypatch.setattr(telling, "factors", lambda *_: {})
    counts = Counts({"A": 5, "G": n_G}, {"A": 9, "G": 9}, (3, 4))
    case = SimpleNamespace(counts=lambda _: counts, dump=SimpleNamespace(scale_free=()))
    weights = Idea(("B46",), None, "worker 0 of 2 alone")
    A, G = side_of(EXACT, weights, error=0.0, ratio=1.0, rows=rows), side_of(DRAWN)
    G.table[PLAIN] = {x: Left(0.7, 1.0, rows=5 / 9) for x in (Q, K)}
    assert telling.scale(case, {"A": replace(A, side="A"), "G": G}, Q).rows_G == counted


def test_of_two_as_near_that_comes_first_which_leaves_fewer_factors():
    one, two = (Option(SWAP, [Q, K], 1.0, 0, n, worst) for n, worst in ((1, 0.3), (2, 0.2)))
    assert one.key() < two.key()
    assert replace(one, scaled=0).key()[0] == 0 and one.key()[0] == two.key()[0] == 1


@pytest.mark.parametrize(("size", "error"), [(4e-6, 2e-3), (4e-2, 0.2)])
def test_what_is_zero_by_theory_has_no_factor(size, error):
    """The keys' gradients sum to 0 over a sequence, and what rounding leaves is squared."""
    X, noise = np.diag([3.0, 1.0, 2.0]), size * np.diag([1.0, 3.0, 2.0])
    made, pooled = Moments(X, 5.0, 1e-29 * X, 5.0), Setting(pooling_G="sum")
    one = _left(Seen(K, "G", noise, X, 5, 5), pooled, made, None)
    assert (one.error, one.ratio) == (pytest.approx(error), 1.0)
    vanished = Setting(tensor_G="output in float16 at 2^-30")  # float16 leaves 0 itself
    assert _left(Seen(K, "G", noise, X, 5, 5), vanished, made, None).error == np.inf
    # ours, times a small number
    assert _left(Seen(K, "G", size * X, X, 5, 5), pooled, made, None).error == np.inf


@pytest.mark.parametrize(
    ("c", "size", "zero"),
    [(1.0, 1e-11, True), (1e11, 1e-25, True), (1e11, 1e-11, False), (4.0, 0.2, False)],
)
def test_what_a_gauge_makes_small_is_not_zero_by_theory(c, size, zero):
    """A is c times ours, G that of other labels over c: it was the gradient of another layer."""
    X, other = np.diag([3.0, 1.0, 2.0]), size * np.diag([1.0, 3.0, 2.0])
    both = {"A": Seen(K, "A", c * X, X, 5, 5), "G": Seen(K, "G", other, X, 5, 5)}
    nothing, swapped = Moments(X, 5.0, 0 * X, 5.0), Setting(tensor_G="the other of k and v")
    gauge = compared._gauge(both, "G", None)
    assert gauge == pytest.approx(c) and compared._gauge({"G": both["G"]}, "G", None) == 1
    one = _left(both["G"], swapped, nothing, None, gauge=gauge)
    assert (one.error < 0.5) == zero


@pytest.mark.parametrize(
    ("steps", "left", "sized"),
    [
        (EXACT, {"error": 0.03}, True),
        (DRAWN, {"error": 0.03}, False),  # as large as bfloat16's, by other labels
        (DRAWN, {"error": 0.03, "drawn": False}, True),
    ],
)
def test_what_drawing_leaves_of_a_fault_is_no_dtype(monkeypatch, steps, left, sized):
    monkeypatch.setattr(precision, "short_sums", lambda *_: False)
    monkeypatch.setattr(precision, "_sizes", lambda *_: {})
    known = SimpleNamespace(declared=True, stored="float32")
    case = SimpleNamespace(matched=(), arithmetic=known, dump=SimpleNamespace(program=""))
    found = {"G": side_of(steps, SWAP, ratio=1.0, **left)}
    assert [one.fault for one in precision.causes(case, found)] == ["B59"] * sized


@pytest.mark.parametrize(("ratio", "factor"), [(0.6, 1.0), (0.04, 0.04), (9.0, 9.0)])
def test_what_drawing_explains_of_a_form_has_no_factor(monkeypatch, ratio, factor):
    monkeypatch.setattr(telling, "factors", lambda *_: {})
    counts = Counts({"A": 9, "G": 9}, {"A": 9, "G": 9}, (3, 4))
    case = SimpleNamespace(counts=lambda _: counts, dump=SimpleNamespace(scale_free=()))
    exact = side_of(EXACT, SWAP, error=0.0, ratio=1.0)
    side = side_of(replace(DRAWN, drawing=Drawing(0.8, 0.1, 0.8)), SWAP, error=0.7, ratio=ratio)
    seen = telling.scale(case, {"A": exact, "G": replace(side, side="G")}, Q)
    assert seen.c_A == 1.0 and seen.c_G == pytest.approx(factor)


@pytest.mark.parametrize("setting", [None, Setting(rows_A="with last")])
def test_other_rows_of_g_alone_are_not_asked_for_where_drawing_explains_any(monkeypatch, setting):
    """Unless A has other rows: a matrix whose parts have another order has ours."""
    asked = []
    monkeypatch.setattr(procedure, "recompute", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(procedure, "stages", lambda *_: iter([[]]))
    case = SimpleNamespace(known={}, model=1, corpus=1)
    monkeypatch.setattr(procedure, "is_large", lambda _: False)
    unknown = SimpleNamespace(fault=None)
    monkeypatch.setattr(procedure.scales, "explain", lambda *_: [unknown])
    monkeypatch.setattr(procedure.divisors.Divisors, "of", lambda _: None)
    fault = Idea(("B27",) if setting else ("B47",), setting)
    found = {"A": side_of(EXACT, fault, error=0.0, ratio=1.0), "G": side_of(DRAWN)}
    found["G"].table[PLAIN] = {x: Left(0.7, 5.0) for x in (Q, K)}
    procedure._by_counts(case, found["G"], found, None, [])
    assert bool(asked) == bool(setting)


@pytest.mark.parametrize("fault", ["B35", "B45"])
def test_layers_of_one_input_have_one_gradient_of_it(monkeypatch, fault):
    """Elsewhere the hook stood at the input: then it does here too, and nothing is called twice."""
    T, X = np.diag([3.0, 1.0]), {Q: np.diag([1.0, 3.0]), K: np.diag([5.0, 2.0])}
    state = SimpleNamespace(diagonal=np.diag(T))
    monkeypatch.setattr(signs, "states", lambda *_: {"G": state})
    monkeypatch.setattr(signs, "see", lambda _, x: {"G": Seen(x, "G", T, X[x], 5, 5)})
    side = side_of(DRAWN)
    side.chosen = [Chosen(Idea((fault,), None), {"head": Left(0.1, 1.0)})]
    (sign,) = signs._one_matrix(None, side)
    assert sign.fault == ("B35" if fault == "B35" else "B40")


@pytest.mark.parametrize("tables", [("embed",), ("embed", Q, K)])
def test_what_is_recomputed_of_a_sample_is_of_no_table(monkeypatch, tables):
    """Of a table nothing is recomputed: it would be missing, or refute what holds elsewhere."""
    asked = []
    for name in ("recompute", "weigh"):
        monkeypatch.setattr(procedure, name, lambda _case, _found, *at, **_: asked.append(at))
    monkeypatch.setattr(procedure.amounts, "drawn", lambda _case, _found, at: asked.append([at]))
    for name in ("averaged", "relabelled"):
        monkeypatch.setattr(procedure, name, lambda *_: None)
    monkeypatch.setattr(procedure, "stages", lambda *_: iter([[]]))
    monkeypatch.setattr(procedure, "is_large", lambda _: False)
    unknown = SimpleNamespace(fault=None, certain=True, layers=())
    monkeypatch.setattr(procedure.scales, "explain", lambda *_: [unknown])
    monkeypatch.setattr(procedure.divisors.Divisors, "of", lambda _: None)
    case = SimpleNamespace(known={}, model=1, corpus=1, drawn=1)
    known = dict(drawn=True, alone=False, rows_A=1.0, rows_G=1.0)
    seen = [SimpleNamespace(layer=x, **known) for x in tables]
    for steps, work, more in (
        (EXACT, procedure._by_counts, (None, seen)),
        (EXACT, procedure._by_weights, (None, seen)),
        (DRAWN, procedure._as_drawn, None),
    ):
        side = Side("G", dict.fromkeys(tables, steps))
        side.table = {PLAIN: dict.fromkeys(tables, Left(0.0, 9.0))}
        found = {"A": Side("A"), "G": side}
        work(case, found) if more is None else work(case, side, found, *more)
    linear = [x for x in tables if x != "embed"]
    found = [next(x for x in at if isinstance(x, list)) for at in asked]
    assert found == [linear] * 3 * bool(linear)


ROUND = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 4.0]])


@pytest.mark.parametrize(
    ("theirs", "known", "named"),
    [
        (np.insert(ROUND, 2, 0, axis=0)[:3], False, True),
        (np.insert(ROUND, 2, 0, axis=0)[:3], True, False),  # a fault explains it
        (np.diag([2.0, 1.0, 0.0]), False, False),  # nothing is read there: no column has it
        (np.block([[ROUND, np.zeros((3, 1))], [np.zeros((1, 4))]]), False, False),
        (np.array([[2.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0]]), False, False),  # one row is no sign
        (np.array([[2.0, 1.0, 0.5], [0, 0, 0], [3.0, 3.0, 0.2]]), False, False),
        (np.insert(ROUND, 2, 0, axis=0), False, False),
        (ROUND, False, False),
    ],
)
def test_rows_of_zeros_are_padding_where_columns_have_numbers(monkeypatch, theirs, known, named):
    """And the others the first of a symmetric matrix, of more than two numbers."""
    one = SimpleNamespace(T=theirs)
    monkeypatch.setattr(signs, "see", lambda *_: {"G": one})
    state = SimpleNamespace(diagonal=np.diag(theirs))
    monkeypatch.setattr(signs, "states", lambda *_: {"G": state})
    side = side_of(DRAWN, SWAP, error=0.0, ratio=1.0) if known else side_of(DRAWN)
    found = [*signs._padded(None, side)]
    assert [(x.fault, x.layers) for x in found] == [("B47", (Q, K))] * named
    assert not named or f"In {Q}, zeros fill 1 row of G where" in found[0].words


@pytest.mark.parametrize("seed", range(5))
def test_a_large_change_is_seen_on_a_sample(seed):
    """Sequences weigh very differently. What is left of G is less than their noise in all of it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 6, 1)) * np.exp(1.5 * rng.normal(size=(60, 1, 1)))
    X_N = x @ x.swapaxes(1, 2)

    def left(K):
        """Both errors: of ours and the change, and of what is nearer."""
        every, some = X_N.mean(axis=0), X_N[:30].mean(axis=0)
        T, M = K @ every @ K.T, K @ some @ K.T
        seen, Y = Seen("x", "G", T, every, 60, 60), M + every - some
        before = fitted(T, Y)
        best = min(fitted(T, M + share * (every - some))[0] for share in np.linspace(0, 1, 101))
        return before[0], _alone(seen, Y, Moments(T, 60, M, 60), before)[0], best

    large, small = (np.eye(6) * size + 0.05 * rng.normal(size=(6, 6)) for size in (0.0, 1.0))
    before, after, best = left(large)
    assert after < 0.5 * before and after < 1.1 * best
    before, after, _ = left(small)
    assert after == before
