"""Networks that compute otherwise: quantities that are fitted, parts that round, dropout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_images
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import (
    divisors,
    dropped,
    fits,
    precision,
    procedure,
    signs,
    telling,
)
from refcurv.judge.diagnosis.coarse import settle
from refcurv.judge.diagnosis.dropped import (
    DROPOUT,
    OTHERS,
    Place,
    Random,
    _irregular,
    _is_one,
    _next,
    random_pass,
)
from refcurv.judge.diagnosis.fits import least
from refcurv.judge.diagnosis.hidden import hidden
from refcurv.judge.diagnosis.ladders import Ladder, ladder
from refcurv.judge.diagnosis.looking import ours
from refcurv.judge.diagnosis.precision import causes, short
from refcurv.judge.diagnosis.recomputed import recompute
from refcurv.judge.diagnosis.search import PLAIN, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, moments, rounding
from refcurv.judge.diagnosis.variants.collecting import sample
from refcurv.judge.diagnosis.variants.dropout import Dropout
from refcurv.judge.diagnosis.variants.flows import flows
from refcurv.judge.diagnosis.variants.labels import choice
from refcurv.judge.diagnosis.variants.networks import CHANGES, COARSE, Network, changed, occurring
from refcurv.judge.diagnosis.variants.positions import positions
from refcurv.judge.diagnosis.variants.rounding import KINDS, Coarse, plain, rounded
from refcurv.judge.diagnosis.variants.shaken import ADAPTED, AVERAGED, RANK, shaken
from refcurv.judge.diagnosis.variants.stopped import SILENT
from refcurv.judge.diagnosis.variants.texts import HIDDEN, text_of
from refcurv.judge.diagnosis.variants.untrained import (
    GROUPS,
    of_group,
    started_otherwise,
    untrained,
)
from refcurv.judge.drawn import Drawing
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays
from refcurv.judge.injected import roundings
from refcurv.judge.verdict import FAIL, Comparison
from refcurv.law.conventions import Rows
from refcurv.model import transformer
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


FITTED = {
    "eps": (3.3e-5, "B53"),
    "rotary base": (777.0, "B51"),
    "embedding scale": (3.3, "B54"),
}


def dear(names):
    """The first by default; each takes seconds, so that the others are slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] if k else []) for k, n in enumerate(names)]


@pytest.mark.parametrize("name", dear(FITTED))
def test_a_quantity_is_fitted(setting, name):
    level, fault = FITTED[name]
    verdict, faults = named(setting, planted(setting, Setting(network=((name, level),))))
    assert faults == [fault]
    assert all(cause.after < 1e-12 for cause in verdict.causes)


@pytest.mark.parametrize(
    ("fisher", "by"),
    [("empirical", 1 / 0.7), ("expected", 0.6)],
)
@pytest.mark.slow
def test_a_temperature_of_the_loss_is_fitted(setting, fisher, by):
    """Logits by another scale are those of a head whose weights are larger: A is ours."""
    model, corpus, _ = setting
    own = {name: np.asarray(x) for name, x in model.parameters.items()}
    sharper = rc.Model(model.config, own | {"head.weight": by * own["head.weight"]})
    layers = "blocks.**.{mlp,attn}.*"
    here = model, corpus, rc.collect(model, corpus, layers, fisher)
    theirs = {
        name: (one.A, one.G, one.n_A)
        for name, one in rc.collect(sharper, corpus, layers, fisher).items()
    }
    verdict, faults = named(here, theirs, declared={"fisher": fisher})
    assert faults == ["B26"]
    assert f"`logit scale {by:g}`" in verdict.causes[0].sentence
    assert all(cause.after < 1e-12 for cause in verdict.causes)


SWAPS = {
    "gate and up": ("mlp.gate", "mlp.up", "B34"),
    "q and o": ("attn.q", "attn.o", "B35"),
    "o and down": ("attn.o", "mlp.down", "B35"),
}


@pytest.mark.parametrize("name", dear(["attention weights", "gate", "norm statistics"]))
def test_what_is_detached_has_its_name(setting, name):
    """One fault, of the layers that nothing reaches too, which are 0."""
    change = f"{name} detached"
    gated = made(replace(setting[0].config, gated=True)) if name == "gate" else setting
    theirs = planted(gated, Setting(network=((change, 0.0),)))
    verdict, faults = named(gated, theirs)
    assert faults == ["B48"]
    assert all("Gradients that stop at" in one.sentence for one in verdict.causes)
    silent = {x for x, (_, G, _) in theirs.items() if not G.any()}
    assert silent == {
        x for x in theirs if x.rpartition(".")[2] in SILENT.get(f"{name} detached", ())
    }
    assert silent <= {x for one in verdict.causes for x in one.layers}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_is_found_in_another_network(setting, name):
    """Beside a fault of the network ours of the other layer is not what theirs is."""
    *pair, fault = SWAPS[name]
    theirs = planted(setting, Setting(network=(("rotary base", 1e4),)))
    for i in range(2):
        one, two = (f"blocks.{i}.{part}" for part in pair)
        (A, G, n), (B, H, m) = theirs[one], theirs[two]
        theirs |= {one: (A, H, n), two: (B, G, m)}
    verdict, faults = named(setting, theirs)
    assert faults == [fault, "B51"]
    assert f"tensor `the other of {name}`" in str([x.sentence for x in verdict.causes])
    assert all(cause.after < 1e-12 for cause in verdict.causes)


LOST = {
    "gains of q and k at 1": "rms",
    "gains of attention's norms at 1": "layer",
    "gain of the last norm at 1": "layer",
    "biases of norms at 0": "layer",
    "biases of MLPs at 0": "layer",
    "gains at 1": "rms",
    "head is the embedding": "layer",
}
"""Parameters that were not loaded, and the model that has them."""


@pytest.mark.slow
@pytest.mark.parametrize("group", LOST)
def test_parameters_that_were_not_loaded_have_their_name(setting, layered, group):
    here = setting if LOST[group] == "rms" else layered
    model, corpus, factors = here
    if group == "head is the embedding":
        own = dict(model.parameters) | {"head.weight": model.parameters["embed.weight"]}
    else:
        own = untrained(group, model.config, model.parameters)
    lost = rc.Model(model.config, own)
    theirs = {
        name: (one.A, one.G, one.n_A)
        for name, one in rc.collect(lost, corpus, ",".join(factors), "empirical").items()
    }
    verdict, faults = named(here, theirs)
    assert faults == ["B57"] and f"`{group}`" in verdict.causes[0].sentence
    assert all(cause.after < 1e-12 for cause in verdict.causes)


@pytest.mark.parametrize("offset", [False, True])
def test_what_is_at_its_start_is_no_change(offset):
    own = config(norm="layer", norm_bias=True, norm_offset=offset, biases=("q", "o", "down"))
    random = random_parameters(own, 3)
    every = {group: of_group(group, own) for group in GROUPS}
    assert every["gains of second norms at 1"] == []
    assert {x for some in every.values() for x in some} == {x for x in random if random[x].ndim < 2}
    assert started_otherwise(own, random) == {g for g, some in every.items() if some}
    for group, some in every.items():
        new = untrained(group, own, random)
        start = 1.0 - offset if group.endswith("at 1") else 0.0
        for name, x in random.items():
            assert np.array_equal(new[name], np.full_like(x, start) if name in some else x)
        assert group not in started_otherwise(own, new)
    at_start = untrained("gains at 1", own, untrained("biases of attention at 0", own, random))
    assert started_otherwise(own, at_start) == {
        "biases of norms at 0",
        "biases of MLPs at 0",
        "biases at 0",
    }
    assert occurring_groups(own, started_otherwise(own, at_start)) == started_otherwise(
        own, at_start
    )


def test_of_groups_that_are_the_same_the_first_is_named():
    own = config(norm="rms", norm_place="pre", qk_norm="none", biases=("q", "v"))
    random = random_parameters(own, 3)
    one = {"blocks.0.attn_norm.weight": np.full(own.width, 2.0)}
    some = untrained("gains at 1", own, random)
    assert started_otherwise(own, dict(some) | one) == {
        "gains of attention's norms at 1",
        "biases of q, k and v at 0",
    }


def occurring_groups(own, started):
    corpus = rc.Corpus(np.zeros((2, 4), int))
    found = occurring(own, positions(corpus, own, Rows.ALL), started)
    return {name for name, _ in found if name in GROUPS}


def test_a_level_that_is_near_enough_is_fitted(setting):
    """In float32 one of the levels that are tried is within every budget of A."""
    theirs = planted(setting, Setting(network=(("eps", 1.02e-5),)))
    verdict, faults = named(setting, theirs, arithmetic="float32", layers="blocks.*.mlp.up")
    assert faults == ["B53"]
    assert "A and G of 2 layers: as with `eps 1.02e-05`." in verdict.causes[0].sentence
    assert verdict.causes[0].after < 1e-9


TWO = {
    "a quantity of which no level halves the error": (("score scale", 0.31),),
    "a quantity, and another": (("eps", 3.3e-5), ("rotary base", 777.0)),
    "a quantity beside what has none": (("no causal mask", 0.0), ("eps", 3.3e-5)),
    "two levels that are tried": (("no causal mask", 0.0), ("eps", 1e-3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_quantities_are_fitted_at_once(setting, name):
    network = TWO[name]
    verdict, faults = named(setting, planted(setting, Setting(network=network)))
    assert faults == sorted(CHANGES[change].fault for change, _ in network)
    assert all(cause.after < 1e-12 for cause in verdict.causes)
    first, *others = (cause.sentence for cause in verdict.causes)
    assert all(f"`{change} {level:g}`" in first for change, level in network if level)
    with_first = f"It is found together with {verdict.causes[0].fault}."
    assert all(with_first in one and "as with" not in one for one in others)


def test_the_least_of_several_levels():
    rng = np.random.default_rng(0)
    P, Q, R = rng.normal(size=(3, 40))

    def of(t):  # neither linear, nor of one size
        return P * np.log1p(t[0]) + Q * np.sqrt(1e6 * t[1] + 1) + R

    def make(t):
        return of(t), of(true) - of(t)

    true, own = np.array([700.0, 3e-5]), np.array([100.0, 1e-4])
    for first in ([100.0, 1e-4], [1000.0, 1e-6], [90.0, 0.0]):
        t, left = least(make, np.array(first), own)
        assert np.allclose(t, true, rtol=1e-12, atol=0) and left < 1e-12
    far = rng.normal(size=40)
    for none in (
        lambda t: (of(t), far),  # nothing brings it nearer
        lambda t: None if t[1] > 1e-4 else make(t),  # beyond our own none can be made
    ):
        t, left = least(none, own, own)
        assert t is own and left == 1

    def flat(t):
        return P * np.log1p(1e3 * t), P * (np.log1p(10.0) - np.log1p(1e3 * t))

    t, left = least(flat, np.array([100.0]), np.array([1.0]))  # first steps lead below 0
    assert np.isclose(t[0], 0.01, rtol=1e-12) and left < 1e-12
    near = 1.01 * true  # all that the levels change is hardly anything of what is left
    t, left = least(lambda t: (of(t), 30 * far + of(true) - of(t)), near, own)
    assert t is near and left == 1
    t, left = least(make, np.array([100.0, 0.0]), np.array([100.0, 0.0]))  # none of our own
    assert np.allclose(t, true, rtol=1e-12, atol=0)
    noise = 1e-7 * rng.normal(size=40)  # as that of float32
    t, left = least(lambda t: (of(t), of(true) + noise - of(t)), own, own)
    assert np.allclose(t, true, rtol=1e-5, atol=0) and left < 1e-6


@pytest.mark.parametrize("all_of", [True, False])
def test_a_fit_begins_at_the_nearest_level_or_at_our_own(setting, monkeypatch, all_of):
    """Of a large corpus it begins at the nearest level of all, and only where that is near."""
    shares = {"eps": 1.5, "rotary base": 0.5, "score scale": 0.95}
    tried = {name: Setting(network=((name, 7.0),)) for name in shares}
    each = [[(shares[name] + 1, REFERENCE), (shares[name], tried[name])] for name in shares]
    monkeypatch.setattr(fits, "_shares", lambda *_, **__: each)
    monkeypatch.setattr(fits, "_least", lambda *of: [of[-1]])
    monkeypatch.setattr(fits, "few_positions", lambda _: 1e9 if all_of else 1)
    case = Case(Dump({}, {}, "", ()), setting[2], {}, Arithmetic(), *setting[:2])
    own = Setting(network=(("eps", setting[0].config.norm_eps),))
    wanted = [own, tried["rotary base"], tried["score scale"]]
    assert list(fits.fits(case, Side("A"), [])) == (wanted if all_of else wanted[1:2])


def test_what_is_fitted_already_stays_as_it_is(monkeypatch):
    """To the last digit, or on the other side; and what has no level is not fitted."""
    asked = []
    monkeypatch.setattr(fits, "is_large", lambda _: False)
    monkeypatch.setattr(fits, "recompute", lambda *_: None)
    monkeypatch.setattr(fits, "_least", lambda *of: asked.append(of[-1]) or [])
    side = Side("G", ladders={"x": Ladder((("float32", 1e-5),))})
    side.add(PLAIN, "x", Left(0.5, 1.0))
    for change, error, other, fitted in (
        ("eps", 1e-6, PLAIN, True),
        ("eps", 1e-13, PLAIN, False),
        ("eps", 1e-6, None, False),
        ("no causal mask", 1e-6, PLAIN, False),
    ):
        one = Setting(network=((change, 1e-3),))
        idea = Idea(one.faults, one)
        side.table[idea] = {"x": Left(error, 1.0)}
        chosen = Chosen(idea, side.table[idea])
        asked.clear()
        assert fits.fitted(None, {}, side, chosen, {"x": other or idea}) == chosen
        assert asked == [one] * fitted
        del side.table[idea]
    assert fits.fitted(None, {}, side, None, {}) is None


def test_what_is_fitted_beside_leaves_less_than_alone(setting, monkeypatch):
    """And what a level leaves is a share of what ours leaves, or all where ours is no multiple."""
    eps, base, mask = ("eps", 1e-3), ("rotary base", 1e4), ("no causal mask", 0.0)
    side = Side("A", ladders={name: Ladder((("float64", 1e-9),)) for name in "xy"})
    for network, error in (
        ((), 0.5), ((eps,), 0.25), ((eps, mask), 0.24), ((base,), 0.45), ((base, mask), 0.3),
    ):  # fmt: skip
        one = Setting(network=network)
        side.add(Idea(one.faults, one) if network else PLAIN, "x", Left(error, 1.0))
    monkeypatch.setattr(fits, "_least", lambda *of: [of[-1]])
    case = Case(Dump({}, {}, "", ()), setting[2], {}, Arithmetic(), *setting[:2])
    assert list(fits.fits_beside(case, side, ["x"])) == [Setting(network=(base, mask))]
    assert [fits._share(side, "x", error) for error in (0.1, 0.5)] == [0.2, 1]
    assert fits._share(side, "y", 0.3) == 0.3  # nothing is known of ours: no multiple
    side.add(PLAIN, "y", Left(1e-10, 1.0))
    assert fits._share(side, "y", 0.3) == 0


@pytest.mark.parametrize("name", dear(["logit scale", "norms in bfloat16"]))
def test_a_table_beside_them_hides_no_cause(name):
    """Tables are not recomputed. What all others show is not kept back by them."""
    own = config(width=8, heads=2, kv_heads=1, head_width=4, mlp_width=12, layers=1)
    model = rc.Model(own, random_parameters(own, 5))
    corpus = rc.Corpus(np.arange(24).reshape(6, 4) % 7)
    factors = rc.collect(model, corpus, "embed,blocks.0.attn.{q,o},blocks.0.mlp.*", "empirical")
    level = 1.0 / 0.7 if name == "logit scale" else 0.0
    theirs = planted((model, corpus, factors), Setting(network=((name, level),)))
    G = factors["embed"].G
    theirs["embed"] = factors["embed"].A, G * (2 + np.cos(np.add.outer(*[np.arange(8)] * 2))), 18
    verdict, _ = named((model, corpus, factors), theirs)
    (cause,) = (one for one in verdict.causes if one.fault == CHANGES[name].fault)
    assert {*cause.layers} == {*factors} - {"embed"} and cause.after < 1e-12


@pytest.mark.slow
def test_what_a_later_fault_explains_as_well_is_no_other(setting):
    """With parallel residuals the first MLP reads what attention reads: other layers' A, it seems.

    What explains all else explains this too.
    """
    verdict, faults = named(
        setting, planted(setting, Setting(network=(("residual parallel", 0.0),)))
    )
    assert faults == ["B54"]
    assert "A of 11 layers: as with `residual parallel`" in verdict.causes[0].sentence


LATER = {
    "as well": (1e-12, 1.0, True),
    "with a factor": (1e-12, 2.0, False),
    "worse": (0.1, 1.0, False),
}


@pytest.mark.parametrize("name", LATER)
def test_a_later_fault_takes_over_what_it_explains_as_well(name, monkeypatch):
    error, ratio, taken = LATER[name]
    monkeypatch.setattr(procedure, "_verify", lambda *_: None)
    side = Side("A", ladders={x: Ladder((("float64", 1e-9),)) for x in "xy"})
    every = Setting(network=(("residual parallel", 0.0),))
    before, later = Idea(("B34",)), Idea(every.faults, every)
    for idea, x, left in (
        (PLAIN, "x", Left(0.5, 1.0)), (PLAIN, "y", Left(0.5, 1.0)),
        (before, "x", Left(1e-12, 1.0)),
        (later, "x", Left(error, ratio)), (later, "y", Left(1e-12, 1.0)),
    ):  # fmt: skip
        side.add(idea, x, left)
    first = Chosen(before, side.table[before])
    last = Chosen(later, {"y": side.table[later]["y"]})
    side.chosen = [first, last]
    procedure._take_over(None, side, {}, None)
    whole = replace(last, left=side.table[later])
    assert side.chosen == ([whole] if taken else [first, last])


CHANGED = {
    "norms in bfloat16": "B53",
    "attention in bfloat16": "B56",
    "QK-norm over each head": "B54",
    "matrices to bits": "B57",
    "rotary angles in bfloat16": "B51",
    "rotary frequencies in bfloat16": "B51",
    "autocast in bfloat16": "B59",
}


@pytest.mark.parametrize("name", dear(CHANGED))
def test_a_part_that_rounds_or_is_another_has_its_name(setting, name):
    level = 4.0 if "bits" in name else 0.0
    theirs = planted(setting, Setting(network=((name, level),)))
    assert named(setting, theirs)[1] == [CHANGED[name]]


@pytest.mark.slow
def test_a_model_under_autocast_is_told_by_its_size(setting):
    """Its norms and its stream are not rounded: the first inputs are ours. Elsewhere it is near."""
    theirs = planted(setting, Setting(network=(("autocast in bfloat16", 0.0),)))
    ours_, exact = setting[2], 0
    for name, (A, G, n) in theirs.items():  # what is rounded in another order
        exact += np.allclose(A, ours_[name].A, rtol=1e-12)
        theirs[name] = *((2 * X - Y) for X, Y in ((ours_[name].A, A), (ours_[name].G, G))), n
    assert 0 < exact < len(theirs)
    case, found = searched(setting, theirs)
    (one,) = causes(case, found)
    assert one.fault == "B59" and "A network under autocast to bfloat16 is 1" in one.sentence
    assert "model=bfloat16" in one.remedy


ALL, CAST = "all in bfloat16", "autocast in bfloat16"
SIZED = {
    "nearest": ({ALL: (0.5, 0.6, 0.7), CAST: (1, 1.1, 0.9)}, CAST, "xy"),
    "a part is alike everywhere": ({ALL: (0.5, 0.6, 0.05), CAST: (1, 1.1, 0.1)}, ALL, "x"),
    "so far off is neither": ({ALL: (1, 1, 7), CAST: (2.5, 2.5, 2.5)}, None, ""),
    "nor what is so near": ({ALL: (1, 1, 1e-4), CAST: (1, 1, 1e-4)}, None, ""),
}
"""How far theirs is over how far networks are; which of them it is, and of which layers."""


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", SIZED)
def test_sizes_say_which_network_it_is(name, drawn, monkeypatch):
    sizes, wanted, layers = SIZED[name]
    monkeypatch.setattr(precision, "_sizes", lambda *_: sizes)
    monkeypatch.setattr(precision, "who_draws", lambda _: (drawn, False))
    found = {side: SimpleNamespace(unexplained=lambda: ["y"], chosen=[]) for side in "AG"}
    hit = {("B59", (), "of that size"): {"x": {"A"}}, ("B58", (), "short"): {"z": {"G"}}}
    first, *found = precision._as_simulated(None, found, hit, dict.fromkeys(hit, 0.1))
    assert first[0][0] == "B58" and len(found) == (wanted is not None)
    for (fault, _, words), every, _ in found:
        assert fault == "B59" and words.startswith(f"A network {precision.NETWORKS[wanted]} ")
        assert "".join(every) == layers
        assert every.get("y", {"A"}) == ({"A"} if drawn or "y" not in layers else {*"AG"})


def test_what_a_network_has_exactly_counts_where_theirs_has_it_not(setting):
    """Under autocast a table is not rounded, nor is what reads it."""
    model, corpus, factors = setting
    for name, exact in ((ALL, False), (CAST, True)):
        theirs = planted(setting, Setting(network=((name, 0.0),)))
        matched = {x: x for x in factors}
        case = Case(of_arrays(theirs), factors, matched, Arithmetic(), model, corpus)
        side, layer = Side("A"), "blocks.0.attn.q"
        side.ladders = {layer: ladder(case, layer, "A", None)}
        side.add(PLAIN, layer, ours(case, layer)["A"])
        sizes = precision._sizes(case, {"A": side})
        assert (CAST not in sizes) if exact else sizes[CAST][0] > 10 * precision.LARGER
        assert (sizes[ALL][0] < 1e-3) if exact else 0.5 < sizes[ALL][0] < 2


def test_what_a_network_has_exactly_may_be_summed_in_float32(setting):
    """Of a network in bfloat16, say: that is no size of what it computes."""
    model, corpus, factors = setting
    rng, (layer, one) = np.random.default_rng(0), next(iter(factors.items()))
    for error, said in ((1e-7, False), (1e-3, True)):
        noise = error * one.A * (1 + rng.random(one.A.shape))
        case = Case(
            of_arrays({layer: (one.A + noise + noise.T, one.G, one.n_A)}), factors,
            {layer: layer}, Arithmetic(), model, corpus,
        )  # fmt: skip
        side = Side("A", ladders={layer: ladder(case, layer, "A", None)})
        side.add(PLAIN, layer, ours(case, layer)["A"])
        assert (CAST in precision._sizes(case, {"A": side})) is said


@pytest.mark.slow
def test_a_model_in_bfloat16_is_one_fault(setting):
    """What reads the table itself has its rounding alone, exactly. That is no fault beside it."""
    theirs = planted(setting, Setting(network=(("all in bfloat16", 0.0),)))
    for name, (A, G, n) in theirs.items():
        of_table = name in ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v")
        another = A if of_table else 2 * setting[2][name].A - A  # rounded in another order
        theirs[name] = another, 2 * setting[2][name].G - G, n
    verdict, faults = named(setting, theirs)
    assert faults == ["B59"] and "A network in bfloat16" in verdict.causes[0].sentence
    assert {*verdict.causes[0].layers} == {*theirs}


@pytest.mark.parametrize("gated", [False, True])
def test_a_network_that_rounds_is_ours_where_nothing_is_rounded(gated, monkeypatch):
    """Forward and backward of each: what is left of them is the network itself."""
    here = made(
        config(
            layers=1, width=8, gated=gated, norm="layer" if gated else "rms", norm_bias=gated,
            biases=("q", "o", "up"), tied=gated, learned_positions=9,
        )
    )  # fmt: skip
    monkeypatch.setattr(rounding, "rounded", lambda x, _dtype: x)
    want = planted(here, REFERENCE)
    for name in COARSE:
        for layer, (A, G, n) in planted(here, Setting(network=((name, 0.0),))).items():
            assert n == want[layer][2]
            assert np.allclose(A, want[layer][0], rtol=0, atol=1e-12 * np.trace(A)), (name, layer)
            assert np.allclose(G, want[layer][1], rtol=0, atol=1e-12 * np.trace(G)), (name, layer)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_under_autocast_products_round_and_the_stream_does_not(tied, dtype):
    own = config(width=8, tied=tied, norm_bias=False, learned_positions=9, biases=())
    P, rng = random_parameters(own, 3), np.random.default_rng(0)
    net = changed(own, P, ((f"autocast in {dtype}", 0.0),))
    for layer, (_, d_in) in net.config.linear_layers().items():
        x = rng.normal(size=(3, d_in))
        y = transformer.linear_forward(net.config, net.parameters, layer, x)
        W = rounded(P[own.weight_of(layer)], dtype)
        assert np.array_equal(plain(y), rounded(rounded(x, dtype) @ W.T, dtype)), layer
    tokens = rng.integers(0, own.vocabulary, (2, 9))
    layout = causal_layout(np.ones((2, 9), bool), np.zeros((2, 9), int))
    x = transformer.input_forward(net.config, net.parameters, tokens, layout)
    assert np.array_equal(x, transformer.input_forward(own, P, tokens, layout))
    assert not isinstance(x + y[:2, :1, None] * x, Coarse)  # what is added to it is not either
    q, k, v, d = rng.normal(size=(4, 2, 9, own.heads, own.head_width))
    k, v = (some[:, :, : own.kv_heads] for some in (k, v))
    context, saved = net.ops.attention_forward(q, k, v, layout, None, None)
    gate, up, d_h = rng.normal(size=(3, 5, own.mlp_width))
    h, inner = net.ops.mlp_forward(own.activation, gate, up)
    backward = *net.ops.attention_backward(d, saved), *net.ops.mlp_backward(d_h, inner)
    for one in (context, h, *backward):
        assert np.array_equal(one, rounded(one, dtype)) and not isinstance(one, Coarse)
    z, saved = net.ops.rms_norm_forward(x, np.ones(8), 1e-5)
    for one in (z, net.ops.rms_norm_backward(z, saved)[0]):
        assert (one != rounded(one, dtype)).any()


@pytest.mark.slow
def test_gradients_that_vanish_in_float16(setting):
    theirs = planted(setting, Setting(tensor_G="output in float16 at 2^-20"))
    assert named(setting, theirs)[1] == ["B61"]


def test_of_a_large_corpus_a_dtype_is_sized_on_the_same_sequences(setting, monkeypatch):
    """What sequences differ by is no rounding."""
    theirs = planted(setting, Setting(network=(("all in bfloat16", 0.0),)))
    model, corpus, factors = setting
    case = Case(of_arrays(theirs), factors, {x: x for x in factors}, Arithmetic(), model, corpus)
    found = {name: Side(name) for name in "AG"}
    for name, side in found.items():
        side.ladders = {x: ladder(case, x, name, None) for x in factors if x.endswith("up")}
        for layer in side.ladders:
            side.add(PLAIN, layer, ours(case, layer)[name])
    monkeypatch.setattr(precision, "few_positions", lambda _: 108)
    sizes = precision._sizes(case, found)
    assert all(0.3 < x < 3 for x in sizes["all in bfloat16"]) and len(sizes["all in bfloat16"]) == 4
    assert all(x > 3 for x in sizes["all in float16"])
    few = precision.made_on(case, [*found["A"].ladders], 108)
    first = next(iter(few))
    few[first] = replace(few[first], G=0 * few[first].G)  # no sequence of the sample has a label
    assert {name: len(each) for name, each in precision._sizes(case, found).items()} == {
        name: len(each) - 1 for name, each in sizes.items()
    }


@pytest.mark.slow
def test_a_token_that_is_not_seen_has_its_name(setting):
    token = int(setting[1].tokens[3, 4])
    theirs = planted(setting, Setting(text=HIDDEN, token=token))
    verdict, faults = named(setting, theirs)
    assert faults == ["B25"] and f"(token {token})" in verdict.causes[0].sentence


def test_a_token_that_is_not_seen_is_read_off_A(setting):
    """A hidden token changes nothing before it, and is told from all the others by A."""
    model, corpus, factors = setting
    token, text = int(corpus.tokens[3, 4]), Setting(text=HIDDEN, token=int(corpus.tokens[3, 4]))
    case = Case(of_arrays(planted(setting, text)), factors, {x: x for x in factors}, Arithmetic(),
                model, corpus)  # fmt: skip
    side = Side("A")
    side.ladders = {x: ladder(case, x, "A", None) for x in factors if x.endswith("down")}
    assert next(hidden(case, side, list(side.ladders))) == text
    swapped = {name: (G, A, n) for name, (A, G, n) in planted(setting, text).items()}
    case = replace(case, dump=of_arrays(swapped))  # no A has the shape of ours
    assert len(list(hidden(case, side, list(side.ladders)))) == 2
    before = np.cumsum(corpus.tokens == token, axis=1) == 0
    one = positions(corpus, model.config, "reached")
    read = text_of(one, HIDDEN, token, model.config, "reached")
    assert (read.seen_BT == (corpus.tokens != token)).all()
    assert (read.seen_BT[before]).all() and (read.keep_BT == one.keep_BT).all()


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


def test_a_part_that_the_search_tried_on_some_layers_is_tried_on_all(layered):
    """The search asks of the layers that it samples, and the score is of all."""
    own = Setting(network=(("attention in bfloat16", 0.0),))
    case, found = searched(layered, near(layered, planted(layered, own)))
    recompute(case, found, ["blocks.1.mlp.up"], [own])
    settle(case, found)
    chosen = {id for one in found.values() for idea in one.chosen for id in idea.faults}
    assert chosen == {"B56"}


@pytest.mark.parametrize(("whole", "chosen"), [(0.57, set()), (1.1, {"B53"})])
def test_a_part_is_named_where_all_of_a_network_is_no_explanation(
    layered, monkeypatch, whole, chosen
):
    """A part of what rounds explains much of an error of all of it."""
    scores = {"norms in bfloat16": 0.45, "all in bfloat16": whole}
    monkeypatch.setattr(
        "refcurv.judge.diagnosis.coarse._score",
        lambda _, one: scores.get(one.network[0][0], 2.0) if one.network else 2.0,
    )
    theirs = planted(layered, Setting(network=(("norms in bfloat16", 0.0),)))
    case, found = searched(layered, theirs)
    settle(case, found)
    assert {id for one in found.values() for x in one.chosen for id in x.idea.faults} == chosen


@pytest.mark.parametrize(
    "number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2))]
)
def test_dropout_is_told_from_other_weights(layered, number):
    """A pass whose masks are those of no pass that the judge makes, and weights 2 % away."""
    drop = Setting(network=((f"dropout on branches, pass {number}", 0.15),))
    one = passes_of(layered, planted(layered, drop, reverse=True))
    assert one[DROPOUT] is not None and one[DROPOUT].place == "branches"
    assert 0.07 < one[DROPOUT].p < 0.3


def test_the_rate_of_dropout_is_read_off_what_passes_agree_on():
    """Theirs is as far off as any rate makes it, by one wild pass, but shifted as at 1 in 5."""
    rng = np.random.default_rng(0)
    wild, shifts = np.exp(rng.normal(size=19)), 1 + 0.05 * rng.normal(size=19)
    seen = [Place(3.0, wild, 2.25, shifts, 1.0, np.ones(19), 3.0) for _ in range(4)]
    p, odds = 0.1, 2.25 / 9
    assert _next(DROPOUT, p, 3.0, seen) == pytest.approx(odds / (1 + odds), rel=0.05)
    calm = [one._replace(each=1 + 0.01 * wild, shifts=5 * wild) for one in seen]
    assert _next(DROPOUT, p, 3.0, calm) == pytest.approx(0.5, rel=1e-6)  # odds of 9/9
    assert _next(OTHERS, 0.01, 3.0, seen) == 0.03


def test_a_slight_rate_of_dropout_is_found(monkeypatch):
    """The mean of passes at the level that is tried first is further from theirs than from ours."""
    rng = np.random.default_rng(2)
    X = {(f"layer {k}", "A"): np.eye(8) for k in range(6)}
    moves = {at: rng.normal(size=(8, 8)) for at in X}

    def one_pass(name, p):
        noise, odds = np.random.default_rng(list(name.encode())), p / (1 - p)
        return {
            at: own + 2 * odds * moves[at] + odds**0.5 * noise.normal(size=own.shape)
            for at, own in X.items()
        }

    theirs = one_pass("theirs", 0.006)
    monkeypatch.setattr(dropped, "_theirs", lambda *_: theirs)
    monkeypatch.setattr(dropped, "_same_elsewhere", lambda *_: True)
    monkeypatch.setattr(dropped, "_made", lambda *of: [one_pass(x, of[3]) for x in of[2]])
    monkeypatch.setattr(dropped, "see", lambda _, x: {"A": SimpleNamespace(X=X[x, "A"])})
    one = random_pass(None, {}, DROPOUT)
    assert one is not None and one.place == "branches" and 0.003 < one.p < 0.012


@pytest.mark.parametrize("family", [DROPOUT, OTHERS])
@pytest.mark.parametrize(
    ("ragged", "spread", "shift", "one"),
    [
        (0.9, 0.5, 1.0, True),
        (1.3, 0.1, 1.0, True),  # the shift is ten deviations from 0
        (1.3, 0.5, 1.0, False),
        (1.7, 0.1, 1.0, False),
        (0.9, 0.1, 0.0, False),
        (1.3, 0.1, 0.0, False),
        (0.9, 0.5, -1.5, None),  # other weights need no shift, where passes have no sharp one
    ],
)
def test_a_pass_that_is_shifted_as_all_are_may_be_ragged(family, ragged, spread, shift, one):
    rng, ones = np.random.default_rng(1), np.ones(19)
    each = np.exp(0.2 * rng.normal(size=(12, 19)))
    logs = np.log(each) - np.median(np.log(each), axis=1, keepdims=True)
    scale = np.sqrt(np.mean(logs**2, axis=1))
    most = max(_irregular(x, scale) for x in (logs / scale[:, None]).T)
    here = np.resize([1.0, -1.0], 12)
    here *= ragged * most / _irregular(here, scale)
    shifts = 1 + spread * np.resize([1.0, -1.0], 19)
    off = np.exp(here * scale) * np.median(each, axis=1)
    seen = [Place(o, x, shift, shifts, 1.0, ones, 1.0) for o, x in zip(off, each, strict=True)]
    assert _is_one(seen, family) == (family is OTHERS if one is None else one)


@pytest.mark.parametrize("name", ["integers by row", "integers by matrix"])
def test_integers_of_eight_bits_are_read_back_within_half_a_step(setting, name):
    own, model = changed(setting[0].config, setting[0].parameters, [(name, 8.0)]), setting[0]
    for x, w in model.parameters.items():
        axis = 1 if "row" in name else None
        whole = not x.startswith("blocks.") or w.ndim != 2
        step = 0 if whole else np.abs(w).max(axis=axis, keepdims=True) / 127
        assert (np.abs(own.parameters[x] - w) <= step / 2 + 1e-15).all()
        assert whole or (own.parameters[x] != w).any()


@pytest.mark.slow
def test_an_average_over_training_has_its_name(layered):
    """3 % of every weight are still those of the start, where all gains were equal."""
    model, corpus, factors = layered
    rng = np.random.default_rng(8)
    own = {
        x: 0.97 * w + 0.03 * w.std() * rng.normal(size=w.shape) for x, w in model.parameters.items()
    }
    other = replace(model, parameters=own), corpus, factors
    one = passes_of(layered, planted(other, Setting()))[OTHERS]
    assert one is not None and one.place == AVERAGED and 0.015 < one.p < 0.06


def test_a_start_has_equal_gains():
    """Of an average the gains are smaller, and no more unlike one another than they were."""
    own = {"blocks.0.attn_norm.weight": np.full(3, 2.0), "head.weight": np.ones((1, 2))}
    net = changed(config(), own, [(f"other weights of {AVERAGED}, draw 0", 0.1)])
    assert net.parameters["blocks.0.attn_norm.weight"] == pytest.approx([1.8] * 3)


def test_an_adapter_adds_a_product_of_its_size_to_q_and_v_alone():
    rng = np.random.default_rng(0)
    names = ("attn.q.weight", "attn.v.weight", "attn.k.weight", "attn.q.bias", "mlp.up.weight")
    own = {f"blocks.0.{x}": rng.normal(size=(64, 48) if "weight" in x else 64) for x in names}
    found = shaken(own, ADAPTED, 0, 0.1)
    away = {x: found[x] - w for x, w in own.items()}
    assert {x for x, w in away.items() if w.any()} == {f"blocks.0.{x}" for x in names[:2]}
    for x in (f"blocks.0.{x}" for x in names[:2]):
        assert np.linalg.matrix_rank(away[x], 1e-9) == RANK
        assert np.linalg.norm(away[x]) == pytest.approx(0.1 * np.linalg.norm(own[x]), rel=0.2)


@pytest.mark.slow
def test_an_adapter_has_its_name(layered):
    """Of rank 3, merged into q and v: what stands before the first attention is ours."""
    model, corpus, _ = layered
    rng, own = np.random.default_rng(12), dict(model.parameters)
    for x in (x for x in own if x.endswith((".q.weight", ".v.weight"))):
        away = rng.normal(size=(len(own[x]), 3)) @ rng.normal(size=(3, own[x].shape[1]))
        own[x] = own[x] + 0.04 * np.linalg.norm(own[x]) / np.linalg.norm(away) * away
    ours = rc.collect(model, corpus, "blocks.*.attn.{q,o}", "empirical")
    theirs = planted((replace(model, parameters=own), corpus, ours), Setting())
    one = passes_of((model, corpus, ours), theirs)[OTHERS]
    assert one is not None and one.place == ADAPTED and 0.01 < one.p < 0.12


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


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.02])
def test_other_weights_are_one_cause(layered, share):
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


@pytest.mark.parametrize("how", ["tf32", *(pytest.param("tf32, cut", marks=pytest.mark.slow),)])
def test_products_in_tf32_have_their_name(layered, how):
    """Those of the sums alone; norms in float16, and gradients, look much like it."""
    operand = f"operand in {how}"
    theirs = planted(layered, Setting(tensor_A=operand, tensor_G=operand), reverse=True)
    verdict, faults = named(layered, theirs)
    assert faults == ["B60"] and not verdict.causes[0].alike


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tf32", "tf32, cut"])
def test_a_network_in_tf32_has_its_name(layered, how):
    """All of its products, and the sums'; where other sums round otherwise, half is left of it."""
    operand = f"operand in {how}"
    network = ((f"products in {how}", 0.0),)
    theirs = planted(layered, Setting(tensor_A=operand, tensor_G=operand, network=network))
    assert named(layered, near(layered, theirs, 0.3))[1] == ["B60"]


def test_operands_have_eleven_digits():
    """Rounded to nearest, or cut; in an array whose products alone round."""
    x = np.array([1 + 2.0**-11 + 2.0**-13, -1 - 2.0**-11, 3.0, 0.0, 2.0**-140])
    np.testing.assert_array_equal(rounded(x, "tf32"), [1 + 2.0**-10, -1, 3, 0, 2.0**-140])
    np.testing.assert_array_equal(rounded(x, "tf32, cut"), [1, -1, 3, 0, 2.0**-140])
    row = x[None].view(KINDS["tf32, cut"])
    np.testing.assert_array_equal(np.asarray(row + 0), x[None])
    assert np.asarray(row @ row.T).item() == 1 + 1 + 9


def test_sums_of_few_integers_are_not_rounded_sums():
    """Of gradients that nearly vanish in float16 every sum has few digits."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(50, 8))
    assert short(rounded(g.T @ g, "bfloat16"))
    assert not short(g.T @ g)
    few = np.rint(g)
    assert not short(few.T @ few / 2**20)


@pytest.mark.parametrize("quantity", ["A", "G"])
def test_a_factor_of_g_that_drawing_explains_is_no_fault_of_a(layered, monkeypatch, quantity):
    """Where A alone fails, nothing speaks of a factor of G that drawing leaves."""
    case, found = searched(layered, planted(layered, Setting()))
    layer = next(iter(case.matched))
    one = divisors.Named("B82", "rows", "G", 0.0, (), (layer,))
    monkeypatch.setattr(telling.scales, "explain", lambda *_: [one])
    monkeypatch.setattr(telling.scales, "counted", lambda _: [])
    monkeypatch.setattr(telling, "_by_drawing", lambda *_: True)
    failed = Comparison(layer, quantity, 1.0, 0.1, FAIL)
    causes = telling._scales(case, found, [failed], frozenset())
    assert [x.fault for x in causes] == (["B82"] if quantity == "G" else [])


def test_pixels_are_exact_in_a_network_that_rounds():
    """So that A of the patches is exact tells nothing of the rest."""
    one, images = test_images.vit(0)
    model, corpus = test_images.model_of(one), test_images.corpus_of(one, images)
    own = model, corpus, rc.collect(model, corpus, "**", "empirical")
    theirs = near(own, planted(own, Setting(network=(("all in bfloat16", 0.0),))))
    theirs["patch"] = own[2]["patch"].A, *theirs["patch"][1:]
    case, found = searched(own, theirs)
    assert [one.fault for one in causes(case, found)] == ["B59"]


@pytest.mark.parametrize(("part", "fault"), [("all", ["B59"]), ("norms", [])])
def test_a_dtype_is_read_off_A_where_theirs_drew_labels(layered, part, fault):
    """G is as far off as other labels take it. Where a part was found to round, all is not said."""
    theirs = near(layered, planted(layered, Setting(network=((f"{part} in bfloat16", 0.0),))))
    theirs = {x: (A, G + np.diag(np.diag(G)), n) for x, (A, G, n) in theirs.items()}
    case, found = searched(layered, theirs)
    case = replace(case, dump=replace(case.dump, declared={"fisher": "sampled"}))
    for name, one in found["G"].ladders.items():
        found["G"].ladders[name] = replace(one, drawing=Drawing(2.0, 0.0, 2.0))
    settle(case, found)
    named = causes(case, found)
    assert [one.fault for one in named] == fault
    assert all("G" not in one.quantities for one in named)
    assert bool(found["A"].chosen) == (part == "norms")


@pytest.mark.parametrize(("times", "fault"), [(1.0, "B59"), (0.3, "B57"), (7.0, "B57")])
def test_a_model_in_bfloat16_is_no_other_weights(layered, monkeypatch, times, fault):
    """What is as far off as such a network, in some layers further than any budget of the dtype."""
    theirs = near(layered, planted(layered, Setting(network=(("all in bfloat16", 0.0),))))
    theirs = {
        x: (own.A + times * (A - own.A), own.G + times * (G - own.G), n)
        for x, (A, G, n) in theirs.items()
        for own in (layered[2][x],)
    }
    case, found = searched(layered, theirs)
    for side in found.values():
        for name in [*side.ladders][1:]:
            side.ladders[name] = replace(side.ladders[name], steps=side.ladders[name].steps[:2])
    other = Random("all", 0.01, tuple(layered[2]), 0.1, 0.1)
    monkeypatch.setattr(signs, "random_pass", lambda *of: other if of[2] is OTHERS else None)
    failed = [Comparison(x, q, 1.0, 0.1, FAIL) for x in layered[2] for q in ("A/tr A", "G/tr G")]
    named = telling.causes(case, found, failed)
    assert {one.fault for one in named} == {fault}
    assert {x for one in named for x in one.layers} == {*layered[2]}


@pytest.mark.parametrize(("first", "named"), [(1.5e-2, {"B59"}), (3e-3, {"B60"})])
def test_layers_of_one_run_have_one_dtype(layered, first, named):
    """Without a model: what only bfloat16 explains in one layer, it explains in all of them."""
    rng, theirs = np.random.default_rng(0), {}
    for (name, one), size in zip(layered[2].items(), (first, 2e-3, 2e-3, 2e-3), strict=True):
        off = [rng.normal(size=M.shape) for M in (one.A, one.G)]
        A, G = (
            M + size * np.linalg.norm(M) / np.linalg.norm(E + E.T) * (E + E.T)
            for M, E in zip((one.A, one.G), off, strict=True)
        )
        theirs[name] = (A, G, one.n_A)
    verdict = rc.validate(theirs, layered[2])
    (cause,) = verdict.causes
    assert {cause.fault} == named and {*cause.layers} == {*theirs}
    assert {"A", "G"} <= {*cause.quantities}


def test_a_dump_without_a_form_has_no_precision(layered):
    """Every matrix missing, or 0: there is no error whose size could tell a dtype."""
    case, _ = searched(layered, planted(layered, Setting()))
    assert causes(case, {side: Side(side) for side in "AG"}) == []


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("how", ["", "all in bfloat16", "dropout", "short"])
def test_what_down_reads_is_made_again_as_the_forward_made_it(how, gated):
    """By networks that round, and by ones that drop entries at random."""
    model, corpus, factors = made(config(layers=2, gated=gated))
    case = Case(Dump("x", {}, {}), factors, {}, Arithmetic(), model, corpus)
    net, seen = Network(model.config, model.parameters), []
    injected = {"dropout": roundings._dropout, "short": roundings._short_model}
    if how:
        net = injected[how](net) if how in injected else CHANGES[how].make(net, 0.0)

    def watched(*given):
        seen.append(net.ops.mlp_forward(*given))
        return seen[-1]

    down = ["blocks.0.mlp.down", "blocks.1.mlp.down"]
    other = replace(net, ops=replace(net.ops, mlp_forward=watched))
    flow = next(flows(other, sample(case, 4)[0], choice(REFERENCE, factors), down))
    for (forward, _), name in zip(seen[:2], down, strict=True):
        assert np.array_equal(flow.read[name], forward) and forward.any()
        assert np.array_equal(flow.taps[name].a, forward)
