"""Batches that weigh otherwise than others, and gradients that are averaged over a batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge import draws
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import divisors, relabelled, replayed, search
from refcurv.judge.diagnosis.ladders import Ladder, ladder
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.replayed import Member, varied
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, moments
from refcurv.judge.diagnosis.variants.collecting import POSITIONS, Side, Total, held, sample
from refcurv.judge.diagnosis.variants.flows import flows
from refcurv.judge.diagnosis.variants.labels import choice
from refcurv.judge.diagnosis.variants.networks import changed
from refcurv.judge.diagnosis.weighted import Decay, _decays, _Layer, _tails, rules
from refcurv.judge.drawn import Drawing
from refcurv.judge.dump import Dump, Theirs
from refcurv.model.part import part_of

LAYERS = "blocks.1.mlp.{gate,down}"


def _of(model, corpus, some):
    return rc.collect(model, part_of(corpus, some), LAYERS, "empirical")


@pytest.fixture(scope="module")
def given():
    """A model, 17 texts of many lengths, their factors, and A and G of some of the texts."""
    made = config(width=6, heads=2, kv_heads=1, head_width=4, mlp_width=7)
    model, rng = rc.Model(made, random_parameters(made, 5)), np.random.default_rng(1)
    tokens, length = rng.integers(0, made.vocabulary, (17, 8)), rng.integers(3, 9, (17, 1))
    corpus = rc.Corpus(tokens, mask=(np.arange(8) < length).astype(np.uint8))
    collect = partial(_of, model, corpus)
    return model, corpus, collect(slice(None)), collect


def named(given, change):
    """{fault: words} of a dump whose layers are `change`d."""
    model, corpus, factors, _ = given
    theirs = {name: change(name, one) for name, one in factors.items()}
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, arithmetic="float64",
        declared={"fisher": "empirical"},
    )  # fmt: skip
    return {one.fault: one.sentence for one in verdict.causes}


@pytest.mark.parametrize("counts", ["every", "own"])
def test_the_first_batch_alone_has_its_name_where_the_count_goes_on(given, counts):
    first = given[3](slice(0, 5))

    def change(name, one):
        n = one.n_A if counts == "every" else first[name].n_A
        return first[name].A, one.G if counts == "every" else first[name].G, n

    found = named(given, change)
    assert [*found] == ["B41" if counts == "every" else "B46"]  # the first of 4 workers, a block
    if counts == "every":
        assert "the first batch of 5 sequences alone" in found["B41"]


@pytest.mark.parametrize("counted", [True, False])
def test_a_forward_for_shapes_that_hooks_see_has_its_name(given, counted):
    """The inputs of the first 5 texts are added once more, and no slope is: one count is off."""
    first = given[3](slice(0, 5))

    def change(name, one):
        more = first[name].n_A if counted else 0
        A = one.sum_A + first[name].sum_A
        return A / (one.n_A + more), one.sum_G / (one.n_G + more), one.n_A + more

    found = named(given, change)
    assert [*found] == ["B39"]
    assert "the first batch of 5 sequences is added twice, and counted" in found["B39"]
    assert ("A and G of 2 layers: " in found["B39"]) is counted  # whose factor is that of the count


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 5])
def test_one_count_of_a_worker_is_explained_where_drawing_hides_what_it_adds_to_a_slope(
    given, seed
):
    """A says which texts are counted: of G of these, drawn anew, nothing may say so."""
    model, corpus, _, _ = given
    drawn = partial(rc.collect, model, layers=LAYERS, fisher="sampled")
    half = drawn(part_of(corpus, np.arange(0, 17, 2)), seed=seed)
    verdict = rc.validate(
        {name: (one.A, one.G, one.n_A) for name, one in half.items()},
        drawn(corpus, seed=1, draws=8), model=model, corpus=corpus, arithmetic="float64",
        declared={"fisher": "sampled"},
    )  # fmt: skip
    assert [one.fault for one in verdict.causes] == ["B46"]


def test_accumulated_batches_that_the_end_cuts_short_have_their_name(given):
    """4 batches of 3 texts are a step, so that 2 batches are left, of which one is short."""
    before, after = given[3](slice(0, 12)), given[3](slice(12, None))

    def change(name, one):
        total = before[name].sum_G / 4**2 + after[name].sum_G / 2**2
        return one.A, total / one.n_G, one.n_A

    found = named(given, change)
    assert [*found] == ["B43"]
    assert "by 4 accumulated batches of 3 sequences, and by the 2 at the end" in found["B43"]


def test_a_scale_that_grows_is_no_accumulation(given):
    """Of 2 to 1 as 4 steps are to 2, but nothing divides by it."""
    before, after = given[3](slice(0, 12)), given[3](slice(12, None))

    def change(name, one):
        total = before[name].sum_G * 4.0**15 + after[name].sum_G * 4.0**16
        return one.A, total / one.n_G, one.n_A

    assert [*named(given, change)] == ["B11"]


def test_each_divisor_of_the_last_step_is_tried_once():
    every = list(_tails(11))
    assert len({one.name for one in every}) == len(every)
    assert all(one.whole for one in every)
    (one,) = (x for x in every if "by 3 accumulated batches of 3 sequences" in x.name)
    np.testing.assert_array_equal(1 / one.weight, [9] * 9 + [1] * 2)
    names = " ".join(one.name for one in every)
    assert "by 2 accumulated batches of 3" not in names  # of the 5 at the end, 2 batches are made


ROUNDED = "model=bfloat16,products=float32,sums=float32,solver=float32,stored=float32"


def test_a_mean_over_a_sequence_is_told_by_its_factor_alone(given):
    """All but two texts have 15 labels: rounding could hide how they weigh, and 14.6 is no step."""
    model, tokens = given[0], np.random.default_rng(2).integers(0, 5, (17, 16))
    length = np.where(np.arange(17) < 2, 13, 16)
    corpus = rc.Corpus(tokens, mask=(np.arange(16) < length[:, None]).astype(np.uint8))
    collect = partial(rc.collect, model, layers="head", fisher="empirical")
    factors, some = collect(corpus)["head"], (slice(0, 2), slice(2, None))
    parts = [collect(part_of(corpus, x))["head"].sum_G for x in some]

    def judged(first, second):
        total = first * parts[0] + second * parts[1]
        theirs = {"head": (factors.A, total / factors.n_G, factors.n_A)}
        return rc.validate(theirs, collect(corpus), model=model, corpus=corpus, arithmetic=ROUNDED,
                           declared={"fisher": "empirical"}).causes  # fmt: skip

    (means,) = judged(1 / 12**2, 1 / 15**2)
    assert (means.fault, means.alike) == ("B3", ())
    (steps,) = judged(1 / 9, 1 / 9)
    assert (steps.fault, steps.alike) == ("B43", ("B46",))


@pytest.mark.parametrize(("noise", "decay"), [(0.0, 0.9), (1e-3, 0.9), (0.0, 1.0), (1e-3, 1.0)])
def test_a_decay_is_none_where_the_first_batch_alone_leaves_as_little(noise, decay):
    rng, size = np.random.default_rng(3), 4
    of = SimpleNamespace(sequences=range(17), kept=rng.integers(2, 9, 17), labels=np.ones(17))
    roots = rng.normal(size=(17, 4, 5))
    each = roots @ roots.swapaxes(1, 2)
    (first,) = (x for x in rules(of, "A") if x.name == "the first batch of 4 sequences alone")
    weight = first.weight if decay == 1 else Decay(size, "from the first", decay).rule(of).weight
    T = np.tensordot(weight, each, 1)
    T = T * (1 + noise * rng.normal(size=T.shape))
    found = {one.kind for one in _decays(of, [_Layer("up", None, T, each, max(noise, 1e-13))])}
    assert ("from the first" in found) == (decay < 1)


# ------------------------------------------------------------------ gradients averaged over a batch


def by_hand(case, setting, layer):
    """Σ s sᵀ/k over batches and places: s is the sum of g over the k rows there."""
    at, size = sample(case, POSITIONS)[0], setting.batch
    net = changed(case.model.config, held(case), ())
    (flow,) = flows(net, at, choice(REFERENCE, case.reference), [layer])
    g_BTO, T = flow.taps[layer].g, at.real_BT.shape[1]
    total = np.zeros((g_BTO.shape[-1],) * 2)
    for begin in range(0, len(g_BTO), size):
        groups = [[] for _ in range(T)]
        for n in range(begin, min(begin + size, len(g_BTO))):
            shift = T - at.real_BT[n].sum() if "end" in setting.pooling_G else 0
            for t in np.flatnonzero(at.keep_BT[n]):
                groups[0 if "rows" in setting.pooling_G else t + shift].append(g_BTO[n, t])
        for rows in filter(None, groups):
            total += np.outer(sum(rows), sum(rows)) / len(rows)
    return total / at.keep_BT.sum()


@pytest.mark.parametrize(
    "pooling",
    ["batch, row by row", "batch from the end, row by row", "batch and rows, row by row"],
)
def test_a_mean_over_a_batch_of_any_size_has_its_name(given, pooling):
    model, corpus, factors, _ = given
    setting = Setting(pooling_G=pooling, batch=5)
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    ((_, made),) = moments(here, [setting], list(factors))
    for name, one in made.items():
        np.testing.assert_allclose(one.G, by_hand(here, setting, name), rtol=1e-9, atol=1e-15)
        assert one.n_G == factors[name].n_G
    found = named(given, lambda name, one: (one.A, made[name].G, one.n_A))
    assert [*found] == ["B44"]
    assert f"`{pooling}` (5)" in found["B44"]


def test_sums_over_the_count_of_the_other_side_have_no_factor(given):
    """Rows of a sequence are one row of A, whose number n is; G's are averaged over a batch."""
    model, corpus, factors, _ = given
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    both = [Setting(pooling_A="sum"), Setting(pooling_G="batch, row by row", batch=5)]
    of = dict(moments(here, both, list(factors)))

    def change(name, one):
        A, G = of[both[0]][name], of[both[1]][name]
        return A.A, G.G * one.n_G / A.n_A, A.n_A

    assert [*named(given, change)] == ["B36", "B44"]


@pytest.fixture(scope="module")
def drawn(given):
    """(case, layers) of a dump with labels of its own: of a setting, times a number."""
    model, corpus, _, _ = given
    ours = rc.collect(model, corpus, LAYERS, draws=16)
    own = rc.collect(model, corpus, LAYERS, seed=77)

    def made(setting, scale=1.0):
        bare = Case(Dump("memory", {}, {}), own, {}, Arithmetic(), model, corpus)
        ((_, of),) = moments(bare, [setting], list(own))
        theirs = {x: Theirs(A=one.A, G=one.G * scale, n_A=one.n_A) for x, one in of.items()}
        known = dict.fromkeys(theirs, Drawing(1.0, 0.5, 0.5, 60))
        return Case(Dump("memory", theirs, {}), ours, {x: x for x in theirs}, Arithmetic(), model,
                    corpus, drawn=known)  # fmt: skip

    return made, list(ours)


MEAN = Setting(pooling_G="batch, row by row", batch=9)


@pytest.mark.parametrize(("setting", "scale"), [(REFERENCE, 1.0), (REFERENCE, 0.2), (MEAN, 1.0)])
def test_a_mean_over_a_batch_varies_more_than_what_is_honest(drawn, setting, scale, monkeypatch):
    monkeypatch.setattr(draws, "CONFIRMED", 60)
    made, layers = drawn
    assert (varied(made(setting, scale), layers) == 0) == (setting == MEAN)


@pytest.mark.slow
def test_a_mean_over_a_batch_is_told_by_its_dumps(drawn, monkeypatch):
    """It has about the batch's share of the trace, and no other rule has dumps like it."""
    monkeypatch.setattr(replayed, "DUMPS", 30)
    made, layers = drawn
    members = [one for one in replayed.replayed(made(MEAN), layers) if one.share > 0]
    shares = {fault: sum(x.share for x in members if x.fault == fault) for fault in ("B44", "B2")}
    assert shares["B44"] > 10 * shares["B2"]
    best = max(members, key=lambda one: one.share)
    assert best.fault == "B44" and {*best.left} == {*layers}
    assert not replayed.replayed(made(REFERENCE, 3.0), layers)  # no mean makes G larger


def test_a_factor_has_a_share_beside_means_over_a_batch(drawn, monkeypatch):
    """An honest dump times a number is one of that factor's, and of none that is far from it."""
    monkeypatch.setattr(draws, "CONFIRMED", 60)
    made, layers = drawn
    case = made(REFERENCE, 1 / 16)
    beside = replayed.Beside.of(case, layers)
    found = [*replayed._factored(case, beside, divisors.Divisors.of(case))]
    shares = {one.note: one.share for one in found if one.fault == "B43"}
    assert shares["1/4²"] > 0 == shares["1/2²"] == shares["1/16²"]
    assert not any(one.left for one in found)


OTHER = {LAYERS: (0.3, 0.2)}


@pytest.mark.parametrize(
    ("seldom", "told", "says"),
    [
        (0.0, True, "it varies more than any honest dump, as if rows"),
        (0.05, True, "it varies more than nearly all honest dumps, as if rows"),
        (0.3, False, "as if rows"),  # no factor is known that would explain it
    ],
)
def test_how_much_theirs_varies_is_said_as_it_is(monkeypatch, seldom, told, says):
    members = [Member("B44", "a mean", 5.0, OTHER), Member("B2", "weights", 5.0, OTHER)]
    monkeypatch.setattr(replayed, "varied", lambda *_: seldom)
    monkeypatch.setattr(replayed, "replayed", lambda *_: members)
    monkeypatch.setattr(replayed.telling, "scale", lambda *_: SimpleNamespace(alone=not told))
    known = SimpleNamespace(fault="B43", alike=())
    monkeypatch.setattr(replayed.scales, "explain", lambda *_: [known])
    monkeypatch.setattr(replayed.divisors.Divisors, "of", lambda _: None)
    side = search.Side("G", {LAYERS: Ladder((("float64", 1e-12),), Drawing(0.5, 0.0, 0.5))})
    one = replayed.averaged(SimpleNamespace(matched=[LAYERS]), {"G": side}, [LAYERS], [LAYERS])
    assert one is not None and one.faults == () and one.idea.name.startswith(says)
    assert one.left[LAYERS].alike == ("B44", "B2")


@pytest.mark.parametrize(
    ("seldom", "mean", "factor", "named"),
    [
        (0.05, 9.5, 0.2, True),
        (0.05, 0.2, 9.5, False),  # a factor is likelier
        (0.05, 5.0, 5.0, False),
        (0.2, 9.5, 0.2, False),  # nothing is odd about it
    ],
)
def test_what_varies_as_a_factor_seldom_does_may_be_a_mean(
    monkeypatch, seldom, mean, factor, named
):
    members = [Member("B44", "a mean", mean, OTHER), Member("B43", "1/2²", factor, {})]
    monkeypatch.setattr(replayed, "varied", lambda *_: seldom)
    monkeypatch.setattr(replayed, "replayed", lambda *_: members)
    monkeypatch.setattr(replayed.telling, "scale", lambda *_: SimpleNamespace(alone=False))
    known = SimpleNamespace(fault="B43", alike=("B46",))
    monkeypatch.setattr(replayed.scales, "explain", lambda *_: [known])
    monkeypatch.setattr(replayed.divisors.Divisors, "of", lambda _: None)
    steps = Ladder((("float64", 1e-12),), Drawing(0.5, 0.0, 0.5))
    side = search.Side("G", {LAYERS: steps})
    case = SimpleNamespace(matched=[LAYERS])
    one = replayed.averaged(case, {"G": side}, [LAYERS], [LAYERS])
    assert (one is not None and one.faults == ("B44",)) == named


GROWING = "a scale of the loss that doubles once, after 8"


def test_a_scale_that_changes_is_told_by_its_dumps(drawn, given, monkeypatch):
    """No power of 4 is that factor, and no mean makes G larger."""
    monkeypatch.setattr(replayed, "DUMPS", 30)
    made, layers = drawn
    here, (model, corpus, _, _) = made(REFERENCE), given
    own, theirs = rc.collect(model, part_of(corpus, slice(8)), LAYERS, seed=77), {}
    for x, one in here.dump.layers.items():
        first = own[x].sum_G / here.ours(x).n_A  # the same labels
        G = 4.0**15 * (first + 4 * (one.G - first))
        theirs[x] = replace(one, G=G)
    case = replace(here, dump=replace(here.dump, layers=theirs))
    members = [one for one in replayed.replayed(case, layers) if one.share > 0]
    assert {one.fault for one in members} == {"B11"}
    assert f"{GROWING}, and is 2^15 at least" in {one.note for one in members}


@pytest.mark.parametrize(
    ("setting", "scale", "fault"),
    [(Setting(where="prompts"), 1.0, "B19"), (REFERENCE, 2.0, None), (REFERENCE, 1.0, None)],
)
def test_labels_of_another_kind_are_told_from_a_factor(given, setting, scale, fault, monkeypatch):
    """Labels at prompts make G about twice as large, and drawing hides its form."""
    monkeypatch.setattr(relabelled, "DUMPS", 30)
    monkeypatch.setattr(draws, "CONFIRMED", 40)
    model, tokens = given[0], np.random.default_rng(4).integers(0, 5, (48, 6))
    layers, label = LAYERS + ",head", np.roll(tokens, -1, axis=1)
    label[:, [0, 1, 5]] = -1
    corpus = rc.Corpus(tokens, labels=label)
    ours = rc.collect(model, corpus, layers, draws=16)
    own = rc.collect(model, corpus, layers, seed=77)
    bare = Case(Dump("memory", {}, {}), own, {}, Arithmetic(), model, corpus)
    ((_, of),) = moments(bare, [setting], list(own))
    theirs = {x: Theirs(A=one.A, G=one.G * scale, n_A=one.n_A) for x, one in of.items()}
    case = Case(Dump("memory", theirs, {}), ours, {x: x for x in theirs}, Arithmetic(), model,
                corpus, drawn=dict.fromkeys(theirs, Drawing(1.0, 0.5, 0.5, 60)))  # fmt: skip
    names = list(theirs)
    steps = {x: ladder(case, x, "G", None) for x in names}
    found = {"A": search.Side("A"), "G": search.Side("G", steps)}
    kinds = [Setting(where="prompts"), Setting(labels="drawn, then shifted")]
    recompute(case, found, names, kinds)
    chosen = relabelled.relabelled(case, found, names)
    assert (chosen and chosen.faults) == (fault and (fault,))


def test_what_goes_alone_has_no_mean_row_by_row():
    """Each class of a label is sent back by itself, and the number of rows is known at the end."""
    total = Total(Side("G", "up", "output", "reference", "batch, row by row", 2))
    x_BTX = np.random.default_rng(1).normal(size=(1, 3, 2))
    total.add(x_BTX, np.ones((1, 3)), joint=True, counted=True, draw=0)
    assert np.isfinite(total.finish()[0]).all()
    total.add(x_BTX, np.ones((1, 3)), joint=False, counted=True, draw=0)
    assert np.isnan(total.finish()[0]).all()


def test_a_table_beside_layers_whose_labels_are_drawn_is_judged():
    """What is drawn, or weighed, to say what a factor is, is so of the layers beside it."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7)
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 5, (6, 9)))
    model = rc.Model(made, random_parameters(made, 5))
    drawn = partial(rc.collect, model, corpus, "embed,blocks.*.mlp.up", "sampled")
    theirs = {name: (one.A, one.G, one.n_A) for name, one in drawn(seed=3).items()}
    theirs |= {"embed": (theirs["embed"][0], 3.3 * theirs["embed"][1], theirs["embed"][2])}
    said = {"arithmetic": "float64", "declared": {"fisher": "sampled"}}
    verdict = rc.validate(theirs, drawn(seed=0), model=model, corpus=corpus, **said)
    assert {one.layer for one in verdict.findings if one.verdict == "fail"} == {"embed"}
