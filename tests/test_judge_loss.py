"""Faults of the loss and of its labels: what was added, how much of it, and labels nobody knows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge import draws
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.amounts import _gained, _of_traces, curve, drawn, nearest
from refcurv.judge.diagnosis.divisors import Divisors, Scale, equal_batches
from refcurv.judge.diagnosis.ladders import ladder
from refcurv.judge.diagnosis.likely import likely, redrawn
from refcurv.judge.diagnosis.scales import explain
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, moments
from refcurv.judge.diagnosis.variants.positions import CLASSES
from refcurv.judge.drawn import Drawing
from refcurv.judge.dump import Dump, Theirs
from refcurv.model.part import part_of

LAYERS = "blocks.*.mlp.{gate,down},blocks.*.attn.v,head"


@pytest.fixture(scope="module")
def padded():
    """Sequences of many lengths, some with a prompt, and how to make their factors."""
    made = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7)
    model = rc.Model(made, random_parameters(made, 5))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, made.vocabulary, (24, 8))
    length, prompt = rng.integers(4, 9, 24)[:, None], rng.integers(0, 3, 24)[:, None]
    at = np.arange(8)
    label = np.full(tokens.shape, -1)
    label[:, :-1] = tokens[:, 1:]
    label[(at >= length - 1) | (at < prompt)] = -1
    corpus = rc.Corpus(tokens, labels=label, mask=(at < length).astype(np.uint8))
    return model, corpus, partial(rc.collect, model, corpus, LAYERS)


def under(padded, factors, setting):
    """{layer: (A, G, n)} as a setting makes them."""
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), *padded[:2])
    ((_, made),) = moments(here, [setting], list(factors))
    return {name: (one.A, one.G, one.n_A) for name, one in made.items()}


def judged(padded, theirs, factors, **declared):
    model, corpus, _ = padded
    said = {"fisher": str(factors.fisher)} | declared
    return rc.validate(
        theirs, factors, model=model, corpus=corpus, arithmetic="float64", declared=said
    )


def named(verdict):
    assert not verdict.passed
    return sorted(cause.fault for cause in verdict.causes)


# ------------------------------------------------------------------ what is sent back


@pytest.mark.parametrize("name", ["z_loss", *CLASSES])
def test_what_the_head_gets_is_the_slope_of_the_loss(padded, name):
    """G of the head by its definition, with the slope of −z_y + lse + c lse² by complex step."""
    model, corpus, collect = padded
    setting = Setting(z_loss=0.3) if name == "z_loss" else Setting(where=name, pads="blind")
    _, G, n = under(padded, collect("empirical"), setting)["head"]
    label, z = corpus.label, rc.logits(model, corpus.tokens).astype(complex)
    V = z.shape[-1]
    if name in CLASSES:
        label = np.where(label < 0, np.arange(V)[CLASSES[name] % V], label)
    row = np.flip(np.maximum.accumulate(np.flip(corpus.label >= 0, 1), axis=1), 1)
    g = np.zeros(z.shape)
    for v in range(V):
        at = z.copy()
        at[..., v] += 1e-30j
        lse = np.log(np.exp(at).sum(axis=-1))
        loss = lse - np.take_along_axis(at, np.maximum(label, 0)[..., None], -1)[..., 0]
        loss = loss + (0.3 if name == "z_loss" else 0) * lse**2
        g[..., v] = np.where(label >= 0, loss.imag / 1e-30, 0)
    assert n == row.sum()
    np.testing.assert_allclose(G, g[row].T @ g[row] / n, atol=1e-12 * np.trace(G))


# ------------------------------------------------------------------ how much


def test_an_amount_is_found_to_the_last_digits():
    rng = np.random.default_rng(0)
    curves = []
    for size in (4, 7):
        zero, one, two = (x @ x.T for x in rng.normal(size=(3, size, 20)))

        def G(x, zero=zero, one=one, two=two):
            return zero + x * one + x * x * two

        curves.append(curve(3e-5 * G(0.0371), zero, G(0.5), G(-0.5), 0.5))
    assert abs(nearest(curves) - 0.0371) < 1e-13
    assert nearest([]) is None
    assert nearest([one._replace(T=one.at(-0.2)[0]) for one in curves]) is None


@pytest.mark.parametrize(("change", "scale"), [({"z_loss": 0.2}, 1), ({}, 4)], ids=["z", "4"])
def test_an_amount_beside_drawn_labels_has_its_name(padded, change, scale, monkeypatch):
    """And a factor has not, though an amount gives the same traces."""
    monkeypatch.setattr(draws, "CONFIRMED", 60)
    layers = ["head", "blocks.1.attn.v"]
    ours, drawn_ = padded[2]("sampled", draws=16), padded[2]("sampled", seed=77)
    dump = under(padded, drawn_, Setting(**change))
    theirs = {x: Theirs(A=one[0], G=one[1] * scale, n_A=one[2]) for x, one in dump.items()}
    here = Case(Dump("memory", theirs, {}), ours, {x: x for x in theirs}, Arithmetic(),
                *padded[:2], drawn=dict.fromkeys(theirs, Drawing(1.0, 0.5, 0.5, 60)))  # fmt: skip
    found = {side: Side(side) for side in "AG"}
    found["G"].ladders = {x: ladder(here, x, "G", None) for x in layers}
    chosen = drawn(here, found, layers)
    assert (chosen is None) == (not change)
    if chosen is not None:
        assert chosen.faults == ("B26",) and {*chosen.left} == {*layers}
        assert abs(chosen.idea.setting.z_loss / 0.2 - 1) < 0.3
        for layer, left in chosen.left.items():
            assert found["G"].unit(layer, left)  # no factor is left to be explained


@pytest.mark.parametrize(("amount", "told"), [(0.0, False), (0.3, True)])
def test_an_amount_brings_theirs_nearer_than_any_honest_dump(amount, told):
    """Where theirs is one of these, times a factor, it is nearest of 60 as seldom as any."""
    rng = np.random.default_rng(2)
    zero, one, two = (x @ x.T for x in rng.normal(size=(3, 5, 9)))
    made = curve(zero, zero, zero + one / 2 + two / 4, zero - one / 2 + two / 4, 0.5)
    G = np.repeat(zero[None], 61, axis=0)
    G[0] = 4 * made.at(amount)[0]
    noise = 0.1 * rng.normal(size=G.shape) * np.linalg.norm(G, axis=(1, 2), keepdims=True) / 5
    gained = _gained({"up": (made, G + noise + noise.swapaxes(1, 2))})
    assert (gained[0] < gained[1:].min()) == told


def test_the_amount_is_that_of_the_traces():
    rng = np.random.default_rng(0)
    zero, one, two = (x @ x.T for x in rng.normal(size=(3, 4, 20)))
    T = zero + 0.0371 * one + 0.0371**2 * two
    noise = np.diag([0.1, -0.1, 0.2, -0.2])  # of no trace
    made = curve(T + noise, zero, zero + one / 2 + two / 4, zero - one / 2 + two / 4, 0.5)
    assert _of_traces([made]) == pytest.approx(0.0371, rel=1e-3)
    assert _of_traces([made._replace(T=T / 2)]) is None


WITH_LAST = {"rows_A": "with last", "rows_G": "with last"}


@pytest.mark.parametrize(
    ("amount", "more"),
    [
        ({"z_loss": 0.0173}, {}),
        pytest.param({"smoothing": 0.231}, {}, marks=pytest.mark.slow),
        pytest.param({"smoothing": 0.231}, WITH_LAST, marks=pytest.mark.slow),
        pytest.param({"z_loss": 0.0173}, WITH_LAST, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_was_added_to_the_loss_is_told_with_its_amount(padded, amount, more):
    factors = padded[2]("empirical")
    verdict = judged(padded, under(padded, factors, Setting(**amount, **more)), factors)
    assert named(verdict) == (["B26", "B27"] if more else ["B26"])
    (name, value), *_ = amount.items()
    said = " ".join(cause.sentence for cause in verdict.causes)
    assert f"{name.replace('_', '-')} `{value}`" in said


# ------------------------------------------------------------------ labels


WITH_PADS = {"rows_A": "with pads", "rows_G": "with pads"}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "pads", "rows"),
    [
        ("last class", "all", WITH_PADS),
        ("first class", "all", {}),
        ("first class", "blind", {}),  # as where padding stands on the left
        pytest.param("last class", "all", {}, marks=SLOW),
        pytest.param("last class", "blind", {}, marks=SLOW),
        pytest.param("first class", "all", WITH_PADS, marks=SLOW),
    ],
)
def test_no_label_may_be_read_as_a_class(padded, name, pads, rows):
    factors = padded[2]("empirical")
    setting = Setting(where=name, pads=pads, **rows)
    verdict = judged(padded, under(padded, factors, setting), factors)
    assert named(verdict) == ["B24"]
    (cause,) = verdict.causes
    assert cause.layers == tuple(factors)


def test_labels_everywhere_but_in_padding_that_sees_no_text(padded):
    """As where it stands on the left: prompts have labels, and so has what is behind each label."""
    ours = padded[2]("sampled")
    verdict = judged(padded, under(padded, ours, Setting(where="everywhere")), ours, labels="given")
    assert named(verdict) == ["B19"]
    (cause,) = verdict.causes
    assert cause.layers == tuple(ours) and "padding sees" not in cause.sentence


@pytest.mark.parametrize(
    "draw", [pytest.param(draw, marks=pytest.mark.slow) for draw in (101, 102, 103)]
)
def test_labels_that_nobody_knows_are_told_by_their_mean(padded, draw):
    factors = padded[2]("sampled")
    setting = Setting(where="everywhere", pads="all", redraw=draw)
    verdict = judged(padded, under(padded, factors, setting), factors, labels="given")
    assert named(verdict) == ["B19"]
    assert all("mean over 8 draws" in cause.sentence for cause in verdict.causes)


@pytest.mark.slow
def test_what_is_no_draw_of_labels_is_not_taken_for_one(padded):
    """As much is added as labels at padding add, in other directions."""
    factors = padded[2]("sampled")
    places = Setting(where="everywhere", pads="all", redraw=101)
    rng, theirs = np.random.default_rng(0), {}
    for name, (A, G, n) in under(padded, factors, places).items():
        ours = factors[name].G
        x = rng.normal(size=(len(G), len(G) // 2))
        x = x @ x.T
        theirs[name] = A, ours + x * np.linalg.norm(G - ours) / np.linalg.norm(x), n
    assert "B19" not in named(judged(padded, theirs, factors, labels="given"))


SHIFTED = Setting(labels="drawn, then shifted")


@pytest.mark.slow
def test_labels_that_are_drawn_and_then_shifted_have_their_name(padded):
    factors = padded[2]("sampled")
    here = Case(Dump("memory", {}, {}, declared={"labels": "given"}), factors, {}, Arithmetic(),
                *padded[:2])  # fmt: skip
    ((_, made),) = moments(here, [SHIFTED], list(factors))
    theirs = {name: (one.A, one.G, one.n_A) for name, one in made.items()}
    assert named(judged(padded, theirs, factors, labels="given")) == ["B22"]


def test_a_dump_is_likely_under_what_made_it(padded):
    """And not under another choice of labels, or with a factor."""
    factors = padded[2]("sampled", seed=77)
    for setting, scale, true in ((SHIFTED, 1, True), (REFERENCE, 1, False), (SHIFTED, 2, False)):
        dump = under(padded, factors, setting)
        theirs = {x: Theirs(A=one[0], G=one[1] * scale, n_A=one[2]) for x, one in dump.items()}
        here = Case(Dump("memory", theirs, {}), factors, {x: x for x in theirs}, Arithmetic(),
                    *padded[:2])  # fmt: skip
        assert likely(here, SHIFTED, ["head"]) == true


def test_dumps_are_drawn_as_often_as_theirs_and_never_a_mean(padded):
    factors = padded[2]("expected")
    dump = Dump("memory", {}, {}, declared={"fisher": "sampled", "draws": "3"})
    here = Case(dump, factors, {}, Arithmetic(), *padded[:2])
    each = [next(moments(other, [REFERENCE], ["head"]))[1]["head"] for other in redrawn(here, 2)]
    assert not np.array_equal(each[0].G, each[1].G)
    assert {one.n_G for one in each} == {3 * factors["head"].n_A}


# ------------------------------------------------------------------ divisors


def named_of(m, counts, tol=1e-12):
    """(fault, alike) of G = ours/m²."""
    (one,) = explain([Scale("x", 1.0, m**-2.0, tol, tol, 1.0, 1.0, 24)], counts)
    return one.fault, one.alike


def test_a_mean_is_over_batches_that_the_corpus_has():
    assert equal_batches(np.array([3, 5, 4, 4])) == {8, 16}
    assert equal_batches(np.array([4, 4, 4])) == {4, 12}
    assert equal_batches(np.array([3, 5, 4])) == {12}
    uneven = Divisors(16, means=frozenset({8, 16}))
    assert named_of(16, uneven) == ("B1", ("B43", "B46"))
    assert named_of(8, uneven) == ("B1", ("B43", "B46"))
    assert named_of(4, uneven) == ("B43", ("B46",))
    assert named_of(16.1, uneven, 0.05)[0] == "B1"  # within what drawing explains
    large = Divisors(412, means=frozenset({412}))
    assert named_of(412, large) == ("B1", ())
    assert named_of(100, large) == ("B1", ("B43", "B46"))  # more than workers are
    assert named_of(8, large) == ("B43", ("B46",))


def test_a_factor_that_drawing_may_make_is_nothing_known():
    counts = Divisors(312, {"labels": 312}, frozenset({312}))
    (one,) = explain([Scale("x", 1.0, 1.4, 1e-12, 0.35, 1.0, 1.0, 24)], counts)
    assert one.fault is None and one.sides == "G"


def test_without_a_corpus_nothing_tells_steps_from_terms():
    assert named_of(8, Divisors(412)) == ("B43", ("B46", "B1"))
    assert named_of(412, Divisors(412)) == ("B1", ())
    assert named_of(128, Divisors(412)) == ("B1", ())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["B3", "B2"])
def test_weights_of_batches_are_told_by_their_factor_where_drawing_hides_their_form(padded, fault):
    """Their own labels: G of each sequence over the square of its batch's labels.

    Weights by length are one rule, whose factor no other fault gives here. Of batches of 10 the
    factor may be that of a mean over 32 terms too, and the form says nothing: it stays unknown.
    """
    model, corpus, collect = padded
    reference = collect("sampled", draws=8)
    terms = (corpus.label >= 0).sum(axis=1)
    batch = np.arange(24) // 10 if fault == "B2" else np.arange(24)
    weight = 1.0 / np.bincount(batch, terms)[batch] ** 2
    theirs = {name: [one.A, 0.0, one.n_A] for name, one in reference.items()}
    for n, w in enumerate(weight):
        alone = part_of(corpus, slice(n, n + 1))
        for name, one in rc.collect(model, alone, LAYERS, "sampled", seed=50 + n).items():
            theirs[name][1] = theirs[name][1] + w * one.sum_G / reference[name].n_A
    verdict = judged(padded, {k: tuple(x) for k, x in theirs.items()}, reference)
    assert named(verdict) == [fault if fault == "B3" else None]
    assert fault == "B3" or {"B1", "B2", "B43"} <= {*verdict.causes[0].alike}
