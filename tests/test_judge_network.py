"""Networks that compute otherwise: quantities that are fitted, parts that round, dropout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.coarse import settle
from refcurv.judge.diagnosis.dropped import DROPOUT, OTHERS, random_pass
from refcurv.judge.diagnosis.precision import causes
from refcurv.judge.diagnosis.search import PLAIN, Side, ladder, ours
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.diagnosis.variants.dropout import Dropout
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays
from refcurv.model.config import Norm, NormPlace, QKNorm
from refcurv.model.layers import DEFINITIONS, causal_layout
from refcurv.model.part import part_of


def made(config, seed=5, layers="**"):
    model = rc.Model(config, random_parameters(config, seed))
    tokens = np.random.default_rng(1).integers(0, config.vocabulary, (24, 9))
    corpus = rc.Corpus(tokens)
    return model, corpus, rc.collect(model, corpus, layers, "empirical")


@pytest.fixture(scope="module")
def setting():
    """A small OLMo-2 with norms of queries and keys over all heads."""
    return made(config(width=8, heads=2, kv_heads=1, head_width=4, mlp_width=12, norm_eps=1e-4))


@pytest.fixture(scope="module")
def layered():
    """A small GPT-2: LayerNorm with gain and bias, before each part."""
    own = config(
        width=8, heads=2, kv_heads=2, head_width=4, mlp_width=12, norm=Norm.LAYER, norm_bias=True,
        norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, gated=False, biases=("up", "down"),
    )  # fmt: skip
    return made(own, layers="blocks.*.mlp.*")


def planted(setting, theirs, reverse=False):
    """What a program writes that does what a Setting says; `reverse`, in another order."""
    model, corpus, factors = setting
    if reverse:
        corpus = part_of(corpus, slice(None, None, -1))
    case = Case(Dump({}, {}, "", ()), factors, {}, Arithmetic(), model, corpus)
    ((_, found),) = moments(case, [theirs], list(factors))
    return {name: (one.A, one.G, one.n_A) for name, one in found.items()}


def named(setting, theirs, **options):
    model, corpus, factors = setting
    options = {"arithmetic": "float64", "declared": {"fisher": "empirical"}} | options
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, **options)
    assert not verdict.passed
    return verdict, sorted({cause.fault for cause in verdict.causes})


FITTED = {"eps": (3.3e-5, "B53"), "rotary base": (777.0, "B51")}


def dear(names):
    """The first by default; each takes seconds, so that the others are slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] if k else []) for k, n in enumerate(names)]


@pytest.mark.parametrize("name", dear(FITTED))
def test_a_quantity_is_fitted(setting, name):
    level, fault = FITTED[name]
    verdict, faults = named(setting, planted(setting, Setting(network=((name, level),))))
    assert faults == [fault]
    assert all(cause.after < 1e-12 for cause in verdict.causes)


CHANGED = {
    "norms in bfloat16": "B53",
    "attention in bfloat16": "B56",
    "QK-norm over each head": "B54",
    "matrices to bits": "B57",
}


@pytest.mark.parametrize("name", dear(CHANGED))
def test_a_part_that_rounds_or_is_another_has_its_name(setting, name):
    level = 4.0 if "bits" in name else 0.0
    theirs = planted(setting, Setting(network=((name, level),)))
    assert named(setting, theirs)[1] == [CHANGED[name]]


def test_gradients_that_vanish_in_float16(setting):
    theirs = planted(setting, Setting(tensor_G="output in float16 at 2^-20"))
    assert named(setting, theirs)[1] == ["B61"]


def other_weights(setting, share=0.02):
    """The same model, its blocks a little further on."""
    model, corpus, factors = setting
    rng = np.random.default_rng(9)
    own = {
        name: x * (1 + share * rng.normal(size=x.shape)) if name.startswith("blocks.") else x
        for name, x in model.parameters.items()
    }
    return replace(model, parameters=own), corpus, factors


def searched(setting, theirs):
    """The case, and both sides of a search that found nothing."""
    model, corpus, factors = setting
    dump = replace(of_arrays(theirs), declared={"fisher": "empirical"})
    case = Case(dump, factors, {x: x for x in factors}, Arithmetic(), model, corpus)
    found = {side: Side(side) for side in "AG"}
    for side, one in found.items():
        for name in factors:
            one.ladders[name] = ladder(case, name, side, None)
            one.add(PLAIN, name, ours(case, name)[side])
    return case, found


def near(setting, theirs, share=0.5):
    """As theirs, `share` of what makes it differ away in a random direction: rounded elsewhere."""
    rng, out = np.random.default_rng(0), {}
    for name, (A, G, n) in theirs.items():
        both = []
        for X, own in ((A, setting[2][name].A), (G, setting[2][name].G)):
            E = rng.normal(size=X.shape)
            E = E + E.T
            both.append(X + share * np.linalg.norm(X - own) * E / np.linalg.norm(E))
        out[name] = (*both, n)
    return out


@pytest.mark.parametrize("what", [["all", "B59"], ["norms", "B53"], ["attention", "B56"]])
def test_the_part_that_rounds_is_told_from_all_that_rounds(layered, what):
    """Programs that round in one part, or everywhere, and elsewhere in it than the judge does."""
    part, fault = what
    theirs = near(layered, planted(layered, Setting(network=((f"{part} in bfloat16", 0.0),))))
    case, found = searched(layered, theirs)
    settle(case, found)
    chosen = {id for one in found.values() for idea in one.chosen for id in idea.faults}
    assert chosen == ({fault} - {"B59"})
    if not chosen:
        assert [one.fault for one in causes(case, found)] == [fault]


@pytest.mark.parametrize(
    "number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2))]
)
def test_dropout_is_told_from_other_weights(layered, number):
    """A pass whose masks are those of no pass that the judge makes, and weights 2 % away."""
    drop = Setting(network=((f"dropout on branches, pass {number}", 0.15),))
    one = passes_of(layered, planted(layered, drop, reverse=True))
    assert one[DROPOUT] is not None and one[DROPOUT].place == "branches"
    assert 0.07 < one[DROPOUT].p < 0.3


def test_other_weights_are_told_from_dropout(layered):
    one = passes_of(layered, planted(other_weights(layered), Setting()))
    assert one[DROPOUT] is None
    assert one[OTHERS] is not None and 0.005 < one[OTHERS].p < 0.05


def passes_of(setting, theirs):
    """What `random_pass` says of theirs, by family."""
    case, found = searched(setting, theirs)
    return {family: random_pass(case, found, family) for family in (DROPOUT, OTHERS)}


@pytest.mark.slow
def test_a_random_change_is_one_cause(layered):
    """No factor that it leaves by chance, and no dtype, is named beside it."""
    drop = Setting(network=(("dropout on branches, pass 0", 0.15),))
    assert named(layered, planted(layered, drop, reverse=True))[1] == ["B55"]
    for share in (0.01, 0.02):
        assert named(layered, planted(other_weights(layered, share), Setting()))[1] == ["B57"]


@pytest.mark.slow
def test_weights_of_another_norm_show(layered):
    _, corpus, _ = layered
    joint = {"fisher": "empirical", "bias": "joint"}
    other = other_weights(layered)[0]
    one = rc.collect(other, corpus, "blocks.*.mlp.*", "empirical")

    def columned(of):
        a = of.sum_a[:, None]
        A = np.block([[of.sum_A, a], [a.T, np.full((1, 1), float(of.n_A))]])
        return A / of.n_A, of.G, of.n_A

    theirs = {name: columned(of) for name, of in one.items()}
    verdict, faults = named(layered, theirs, declared=joint)
    assert faults == ["B57"]
    assert "null vector" in verdict.causes[0].sentence


def test_no_dropout_is_the_network_itself(setting, layered):
    for own in (setting, layered):
        for place in ("branches", "attention", "everywhere"):
            theirs = planted(own, Setting(network=((f"dropout on {place}, pass 0", 0.0),)))
            for name, (A, G, _) in theirs.items():
                np.testing.assert_allclose(A, own[2][name].A, rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(G, own[2][name].G, rtol=1e-11, atol=1e-14)


def test_the_slope_of_attention_with_dropout():
    """Against central differences, whose error is about 1e-10 here."""
    rng = np.random.default_rng(0)
    q, k, v, d = (rng.normal(size=(1, 5, heads, 3)) for heads in (4, 2, 2, 4))
    layout = causal_layout(np.ones((1, 5), bool), np.zeros((1, 5), int))

    def run(*some):
        ops = Dropout(0.4, "attention", np.random.default_rng(7)).ops(DEFINITIONS)
        context, saved = ops.attention_forward(*some, layout, None, None)
        return float((context * d).sum()), ops.attention_backward(d, saved)

    slopes, own = run(q, k, v)[1], [q, k, v]
    for at, slope in enumerate(slopes):
        step = rng.normal(size=own[at].shape)
        moved = [[x + h * step if j == at else x for j, x in enumerate(own)] for h in (1e-5, -1e-5)]
        ends = [run(*some)[0] for some in moved]
        assert abs((ends[0] - ends[1]) / 2e-5 - float((slope * step).sum())) < 1e-8
