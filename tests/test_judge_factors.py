"""Factors beside drawn labels: intervals, how often they hold, and what is named within one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge import truths
from refcurv.judge.diagnosis import divisors, scales
from refcurv.judge.diagnosis.factors import Factor, intervals
from refcurv.judge.diagnosis.ladders import DECLARED, Ladder
from refcurv.judge.diagnosis.search import PLAIN, Idea, Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.weighted import CORRECTED, WHOLE_BATCH, Decay, _decays, _Layer
from refcurv.judge.drawn import ODDS, Drawing, reach
from refcurv.model.part import part_of

ROUNDING = "model=bfloat16,products=float32,sums=float32,solver=float32,stored=float32"


def traces(rng, count, layers):
    """Log traces that few labels carry, so with long tails, and that layers share in part."""
    shared = rng.gamma(1.5, 1, (count, 1)) * rng.uniform(0.5, 1.5, layers)
    return np.log(shared + rng.gamma(0.7, 0.5, (count, layers)))


def test_the_interval_holds_as_often_as_is_stated():
    """Theirs is 7 times an honest one: 7 is outside, or no factor is shared, with stated odds."""
    rng, tries, count = np.random.default_rng(1), 400, 128
    outside = apart = 0
    for _ in range(tries):
        drawn = traces(rng, count + 1, 4)
        found = intervals(np.log(7) + drawn[0], drawn[1:], np.full(4, 1e-9))
        apart += not found[0].shared
        outside += found[0].shared and not abs(found[0].c - 7) <= found[0].tol * 7
    K = count - round(0.25 * count)
    assert 0 < outside <= stats.binom.ppf(1 - 1e-4, tries, 2 / (K + 1))
    assert 0 < apart <= stats.binom.ppf(1 - 1e-4, tries, 1 / (K + 1))


def test_layers_with_factors_of_their_own_share_none():
    drawn = traces(np.random.default_rng(2), 200, 3) * 0.02
    own = intervals(np.log([1, 1, 9.0]), drawn, np.full(3, 1e-9))
    assert not any(one.shared for one in own)
    assert abs(own[2].c - 9) <= 9 * own[2].tol and own[2].c / (1 + own[2].tol) > 2


def test_what_rounding_may_do_widens_an_interval():
    drawn = traces(np.random.default_rng(3), 200, 3)
    sharp, blunt = (intervals(drawn[0], drawn, np.full(3, x))[0] for x in (1e-9, 0.2))
    assert blunt.tol > sharp.tol


def within(low, high, shared=True):
    one = Factor.between(low, high, shared)
    return divisors.Scale(
        "head", 1.0, one.c, 0.0, one.tol, 1.0, 1.0, 5, drawn=True, alone=not shared
    )


COUNTS = divisors.Divisors(200, {"labels": 200}, frozenset({200, 50}), 19)


@pytest.mark.parametrize(
    ("low", "high", "fault", "alike"),
    [
        (15.0, 25.0, "B6", ()),  # the vocabulary, and no power of 4
        (12.0, 25.0, "B6", ()),  # 4² is one of many scales
        (0.04, 0.09, None, ("B6", "B43", "B46")),  # 1/19; 1/4²
        (2e-5, 3e-5, "B1", ()),
        (0.2, 0.3, "B43", ("B46",)),
        (5.0, 6.0, None, ()),  # nothing known
        (0.5, 3.0, None, ()),  # 1 is within
    ],
)
def test_a_fault_is_named_where_no_other_is_as_likely(low, high, fault, alike):
    named = scales.explain([within(low, high)], COUNTS)
    found = named[0] if named else divisors.Named(None, "", "G", 0.0)
    assert (found.fault, set(found.alike)) == (fault, set(alike))


@pytest.mark.parametrize(
    ("c", "fault", "alike"),
    [
        (16.0, "B6", {"B11", "B43", "B46"}),  # V, and 4²
        (1 / 16, "B6", {"B43", "B46"}),  # 1/V, and 1/4²
        (4.0, "B11", {"B43", "B46"}),
        (4.0**16, "B11", set()),
        (1 / 25, "B43", {"B46"}),
    ],
)
@pytest.mark.parametrize("tol", [1e-6, 0.02])
def test_one_number_of_two_faults_is_both_of_theirs(c, fault, alike, tol):
    """The number of outputs is likelier than an odd scale; and no dump tells which it is."""
    counts = replace(COUNTS, vocabulary=16)
    (named,) = scales.explain([replace(within(0.9, 1.1), c_G=c, tol_G=tol, drawn=False)], counts)
    assert (named.fault, {*named.alike}) == (fault, alike)
    (named,) = scales.explain([within(0.9 * c, 1.1 * c)], counts)
    assert (named.fault, {*named.alike} - {"B43", "B46"}) == (fault, alike - {"B43", "B46"})


@pytest.mark.parametrize("c", [5e-324, 1e-320, 1e-200, 0.0, -1.0, 1e200, 1.7e308])
def test_factors_that_no_fault_gives_are_told(c):
    """Theirs times 1e-320 was a bug of refcurv: a number of rows over it is infinite."""
    for sides in ("A", "G", "AG"):
        a, g = (c if side in sides else 1.0 for side in "AG")
        (named,) = scales.explain([divisors.Scale("x", a, g, 1e-9, 1e-9, 1.0, 1.0, 5, 90)], COUNTS)
        assert named.fault is None and named.sides == sides and f"times {c:.9g}" in named.sentence


def test_weights_of_batches_are_an_alternative():
    counts = replace(COUNTS, weights={"B3": 1.0})
    named = scales.explain([within(0.2, 0.3)], counts)
    assert named[0].fault is None and {"B3", "B43"} <= {*named[0].alike}
    assert scales.explain([within(5.0, 6.0)], counts)[0].fault == "B3"


def test_a_factor_of_the_loss_is_that_of_all_layers():
    assert not scales.explain([within(1.9, 2.1, shared=False)], COUNTS)


def known(layer, c, rows, tol=0.02, **more):
    return divisors.Scale(layer, 1.0, c, 1e-5, tol, 1.0, 1.0, 5, rows, **more)


IMAGES = divisors.Divisors(90, {"sequences": 15}, frozenset({15}), 7, positions=6)


def test_a_factor_of_all_layers_is_none_of_a_convolution():
    """Nor where the patches know it best; theirs is what they alone have."""
    every = [
        known("patch", 2.0, 90, 0.001),
        known("blocks.0.mlp.up", 2.01, 90),
        known("head", 2, 15),
    ]
    assert [one.fault for one in scales.explain(every, IMAGES)] == ["B5"]
    alone = [every[0], known("blocks.0.mlp.up", 1.0, 90)]
    assert [one.fault for one in scales.explain(alone, IMAGES)] == ["B14"]


@pytest.mark.parametrize(("layer", "fault"), [("patch", "B14"), ("blocks.0.mlp.up", None)])
def test_two_factors_of_one_layer_are_not_one_of_both_sides(layer, fault):
    """A is a sixth of ours, and G, whose labels were drawn, is nowhere near that."""
    one = divisors.Scale(layer, 1 / 6, 36.7, 1e-9, 0.3, 1.0, 1.0, 5, 90, drawn=True, alone=True)
    (named,) = scales.explain([one, known("head", 1.0, 15)], IMAGES)
    assert named.fault == fault and named.sides == "AG"
    assert named.sentence.startswith("A is ours times 0.166667 and G ours times 36.7")


def test_the_positions_of_an_image_are_a_factor_that_drawing_may_hide():
    (named,) = scales.explain([within(5.5, 6.6)], IMAGES)
    assert (named.fault, named.alike) == ("B37", ("B7", "B82"))


def test_a_layer_that_drawing_explains_tells_that_layers_have_rows_of_their_own():
    own = {"drawn": True, "alone": True}
    blocks = [known("blocks.0.mlp.up", 5.6, 90, 0.2, **own), known("patch", 6.5, 90, 0.3, **own)]
    head = known("head", 1.05, 15, 0.1, **own)
    (named,) = scales.explain(blocks, IMAGES, [head])
    assert named.fault == "B7" and "head" not in named.layers
    assert not scales.explain(blocks, IMAGES)


@pytest.mark.parametrize("size", [9, 11])
def test_a_moving_average_of_batches_of_any_size_has_its_name(size):
    rng = np.random.default_rng(3)
    of = SimpleNamespace(sequences=range(23), kept=rng.integers(2, 9, 23))
    roots = rng.normal(size=(23, 4, 5))
    each = roots @ roots.swapaxes(1, 2)
    weight = Decay(size, "from zero", 0.83).rule(of).weight
    layer = _Layer("up", None, np.tensordot(weight, each, 1), each, 1e-13)
    batch = np.arange(23) // size  # by hand, but for a factor
    own = 0.83 ** (batch[-1] - batch) / np.bincount(batch, of.kept)[batch]
    np.testing.assert_allclose(weight / weight[0], own / own[0])
    found = list(_decays(of, [layer]))
    assert all(Decay(size, kind, 0.83) in found for kind in ("from zero", CORRECTED, WHOLE_BATCH))


ROUGH = Ladder((("float32", 0.03), (DECLARED, 0.05)))


def side_of(plain, **lefts):
    """A Side of one layer, and what each idea leaves there."""
    side = Side("G", {"up": ROUGH})
    ideas = {name: Idea((name,), None) for name in lefts}
    side.table = {PLAIN: {"up": plain}} | {ideas[x]: {"up": left} for x, left in lefts.items()}
    return side, ideas


def test_a_factor_that_is_explained_counts_for_a_hypothesis():
    """Where rounding hides nine tenths of a form, but not that of a number."""
    side, ideas = side_of(Left(0.14, 2e-4), B2=Left(0.02, 0.98), B9=Left(0.02, 3e-4))
    assert side.explains(ideas["B2"], "up") and not side.explains(ideas["B9"], "up")


def test_what_explains_most_layers_may_leave_more_than_a_budget_of_ours():
    side, ideas = side_of(
        Left(0.4, 0.6), B16=Left(0.06, 1.0), B15=Left(0.3, 1.0), B17=Left(0.16, 1.0)
    )
    assert not any(side.explains(one, "up") for one in ideas.values())
    assert [id for id, one in ideas.items() if side.follows(one, "up")] == ["B16"]
    side, ideas = side_of(Left(2.0, 1.0), B28=Left(0.18, 1.0), B27=Left(0.21, 1.0))
    assert [side.follows(one, "up", 0.07) for one in ideas.values()] == [True, False]
    assert not any(side.follows(one, "up", 0.01) for one in ideas.values())


def test_a_form_that_other_labels_have_tells_no_dtype_of_a_factor():
    steps = Ladder((("float32", 1e-5), ("bfloat16", 0.04)), Drawing(1.0, 0.3, 1.0), same=1e-4)
    assert steps.tolerance(1, Left(0.03, 1.0)) == pytest.approx(0.3, rel=1e-3)
    assert steps.tolerance(1, Left(0.03, 1.0, drawn=False)) == 0.08
    assert steps.tolerance(0, Left(1e-6, 1.0)) == 2e-5


def test_nothing_is_no_draw():
    """|G' − G| is |G| of a G' that is nearly 0: where drawing explains more, the trace tells."""
    side = Side("G", {"head": Ladder((("float32", 1e-5),), Drawing(1.2, 0.4, 1.2))})
    side.table = {}
    for trace, drawn in ((1.2, True), (1e-4, False)):
        side.table[PLAIN] = {"head": Left(0.3, trace, trace=trace)}
        assert side.drawn("head") == drawn


# ------------------------------------------------------------------ sums


@pytest.fixture(scope="module")
def world():
    """Sequences of many lengths, the factors, and what each sequence adds to the sums."""
    made = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7, layers=1)
    model, rng = rc.Model(made, random_parameters(made, 5)), np.random.default_rng(1)
    label = rng.integers(0, made.vocabulary, (12, 8))
    length = rng.integers(3, 9, 12)[:, None]
    label[np.arange(8) >= length] = -1
    corpus = rc.Corpus(rng.integers(0, made.vocabulary, (12, 8)), label)
    layers = "blocks.0.mlp.{gate,down},blocks.0.attn.{v,q}"
    of = [part_of(corpus, slice(n, n + 1)) for n in range(12)]
    each = [rc.collect(model, one, layers, "empirical") for one in of]
    return model, corpus, rc.collect(model, corpus, layers, "empirical"), each


def named(world, change, noise=0.0, arithmetic="float64"):
    """The ids for a dump whose sequence n adds a and g times what `change` says."""
    model, corpus, factors, each = world
    rng, theirs = np.random.default_rng(7), {}
    rows = np.array([one["blocks.0.mlp.gate"].n_A for one in each])
    of_A, of_G, counted = change(rows)
    for name in factors:
        sums = [
            sum(w * getattr(one[name], side) for w, one in zip(weight, each, strict=True))
            for side, weight in (("sum_A", of_A), ("sum_G", of_G))
        ]
        rough = [rng.normal(size=X.shape) * noise for X in sums]
        A, G = (X / counted * (1 + e + e.T) for X, e in zip(sums, rough, strict=True))
        theirs[name] = (A, G, int(counted))
    declared = {"fisher": "empirical", "rows": "reached"}
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, arithmetic=arithmetic, declared=declared
    )
    return {cause.fault for cause in verdict.causes}


def average(rows):
    """A running average from zero over batches of 3 sequences."""
    batch = np.arange(12) // 3
    w = 0.4 * 0.6 ** (3 - batch) / np.bincount(batch, rows)[batch] * rows.sum()
    return w, w, rows.sum()


def worker(rows):
    """The first half of the sequences alone."""
    w = (np.arange(12) < 6) * 1.0
    return w, w, (w * rows).sum()


def by_length(change):
    """And each loss is divided by its labels."""

    def both(rows):
        of_A, of_G, counted = change(rows)
        return of_A, of_G / rows**2, counted

    return both


def test_one_decay_is_fitted_to_all_layers_through_rounding(world):
    assert named(world, average, 1e-3, ROUNDING) == {"B9"}


@pytest.mark.parametrize(("change", "fault"), [(average, "B9"), (worker, "B46")])
def test_what_weighs_a_is_tried_on_g_with_what_weighs_g_alone(world, change, fault):
    assert named(world, by_length(change)) == {fault, "B3"}


def test_a_factor_beside_damping_is_known_as_far_as_damping_lets(world):
    model, corpus, factors, _ = world
    eye = {name: 1e3 * np.eye(len(one.sum_G)) for name, one in factors.items()}
    n = next(iter(factors.values())).n_A
    theirs = {name: (one.A, one.G / n**2 + eye[name], n) for name, one in factors.items()}
    given = {"arithmetic": "float64", "declared": {"fisher": "empirical"}}
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, **given)
    assert {cause.fault for cause in verdict.causes} == {"B12", "B1"}


def test_another_count_beside_damping_is_a_fault_of_its_own(world):
    theirs = {
        name: (one.A + 0.3 * np.eye(len(one.A)), one.G, one.n_A - 5)
        for name, one in world[2].items()
    }
    given = {"arithmetic": "float64", "declared": {"fisher": "empirical"}}
    causes = rc.validate(theirs, world[2], **given).causes
    told = {cause.fault: {*cause.quantities} for cause in causes}
    assert told.keys() == {"B12", "B82"}
    assert "n_A" in told["B82"] and "n_A" not in told["B12"]


def test_a_factor_of_swapped_matrices_is_that_of_g(world):
    model, corpus, factors, _ = world
    theirs = {name: (2 * one.G, one.A, one.n_A) for name, one in factors.items()}
    given = {"arithmetic": "float64", "declared": {"fisher": "empirical"}}
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, **given)
    assert {cause.fault for cause in verdict.causes} == {"B32", "B5"}


@pytest.mark.parametrize("numbers", [2, 40])
def test_lambda_is_refused_as_often_as_is_stated(numbers, monkeypatch):
    """The norm of a difference of drawn Λ, its spread from 8 draws; all covariances."""
    monkeypatch.setattr("refcurv.judge.drawn.ODDS", 0.2)
    rng, tries = np.random.default_rng(4), 4000
    for width in (1, 3, 30):
        size = rng.gamma(0.5, 1, width)
        X = rng.normal(size=(tries, 9, width)) * size
        mean = X[:, 1:].mean(axis=1)
        s = np.sqrt(((X[:, 1:] - mean[:, None]) ** 2).sum(axis=(1, 2)) / 7)
        off = np.linalg.norm(X[:, 0] - mean, axis=1) / (s * np.sqrt(1 + 1 / 8))
        failed = (off > reach(7, numbers)).sum()
        assert failed <= stats.binom.ppf(1 - 1e-4, tries, 0.2 / numbers)
        assert width > 1 or failed > 0
    assert 1.8 < reach(7, 2) < 3 < reach(7, 40)
    assert ODDS == 1e-3


def test_how_much_drawing_explains_of_lambda():
    """By hand: two draws, 1 ± 0.1 in one entry; theirs may have many draws, ours has two."""
    runs = [SimpleNamespace(Lambda=np.array([[x, 0.0]]), rows=1, segments=1) for x in (0.9, 1.1)]
    one = truths._truth("token", "sampled", runs, numbers=6)
    deviation = reach(1, 6) * np.sqrt(0.02)
    assert one.by_drawing(1) == pytest.approx(deviation * np.sqrt(1 + 1 / 2))
    assert one.by_drawing(10**9) == pytest.approx(deviation * np.sqrt(1 / 2))
    assert one.by_drawing(1, sums=True) == pytest.approx(2 * one.by_drawing(1))
