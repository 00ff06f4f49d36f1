"""`diagnose`: matrices of other layers and tensors, of several at once, or joined wrongly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.factors import Factor
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.ladders import ladder
from refcurv.judge.diagnosis.looking import look
from refcurv.judge.diagnosis.others import Index, partners
from refcurv.judge.diagnosis.search import Idea, Side
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.drawn import Drawing
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays
from refcurv.law.checks import EmptyError
from refcurv.model.part import part_of

SAID = {"arithmetic": "float64", "declared": {"fisher": "empirical"}}


def made(place):
    """A small model of one place of its norms, its corpus, and the factors of all its layers."""
    one = config(mlp_width=8, norm_place=place)
    model = rc.Model(one, random_parameters(one, 3))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, one.vocabulary, (12, 9)))
    return model, corpus, rc.collect(model, corpus, "blocks.**", "empirical")


@pytest.fixture(scope="module")
def post():
    return made("post")


@pytest.fixture(scope="module")
def pre():
    return made("pre")


def triples(factors):
    return {name: (one.A, one.G, one.n_A) for name, one in factors.items()}


def named(theirs, factors, **options):
    """{fault: what else it may be} of every cause; each must say what to change."""
    verdict = rc.validate(theirs, factors, **SAID | options)
    assert not verdict.passed
    return {cause.fault: set(cause.alike) for cause in verdict.causes}


def test_one_matrix_may_hold_a_layer_with_one_or_all_of_its_block():
    every = [f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn.q", "attn.k", "attn.v", "mlp.up")]
    q, k, v = every[4:7]
    assert partners(k, every) == [(q, k), (k, v), (q, k, v)]
    assert partners("head", [*every, "head"]) == [("head",)]


@pytest.mark.parametrize("seen", ["empirical", pytest.param("sampled", marks=pytest.mark.slow)])
def test_a_tied_head_with_the_sums_of_its_table_has_its_name(seen):
    one = config(mlp_width=8, tied=True, embed_scale=3.0)
    model = rc.Model(one, random_parameters(one, 3))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, one.vocabulary, (40, 9)))
    draws = 8 if seen == "sampled" else 1
    own = rc.collect(model, corpus, "head,blocks.0.mlp.*", seen, draws=draws)
    both = rc.collect(model, corpus, "head,embed,blocks.0.mlp.*", seen, seed=7)
    theirs = {x: (both[x].A, both[x].G, both[x].n_A) for x in own}
    head, table = both["head"], both["embed"]
    n, sum_G = 2 * head.n_A, head.sum_G + np.diag(table.sum_A)
    theirs["head"] = (head.sum_A + table.sum_G) / n, sum_G / n, n
    options = SAID | {"declared": {"fisher": seen}}
    (cause,) = rc.validate(theirs, own, model=model, corpus=corpus, **options).causes
    assert cause.fault == "B40" and cause.layers == ("head",)
    assert seen == "sampled" or ({"A", "G"} <= {*cause.quantities} and cause.after < 1e-12)


# ------------------------------------------------------------------ shards

JOINED = {
    "side by side": lambda X: np.hstack([X[:4], X[4:]]),
    "four of them": lambda X: np.hstack(np.split(X, 4)),
    "the last row lost": lambda X: np.hstack([X[:3], X[3:6]]),
    "in another order": lambda X: np.hstack([X[4:], X[:4]]),
    "columns below one another": lambda X: np.vstack([X[:, :4], X[:, 4:]]),
    "one is missing": lambda X: X[4:],
    "one is there twice": lambda X: np.vstack([X, X[:4]]),
    "reshaped": lambda X: X.reshape(2, 32),
    "padded, the last rows cut off": lambda X: np.vstack([X[:3], 0 * X[:1], X[3:]])[:8],
    "padded": lambda X: np.vstack([X[:3], 0 * X[:1], X[3:6], 0 * X[:1], X[6:], 0 * X[:2]]),
}


@pytest.mark.parametrize("how", JOINED)
def test_shards_of_another_shape_are_joined_rightly(post, how):
    *_, factors = post
    names = [name for name in factors if name.endswith(("up", "down"))]
    join, at = JOINED[how], {"layers": ",".join(names)}
    theirs = {x: (join(factors[x].A), join(factors[x].G), factors[x].n_A) for x in names}
    assert set(named(theirs, factors, **at)) == {"B47"}
    other = {name: (np.cos(A), G, n) for name, (A, G, n) in theirs.items()}
    verdict = rc.validate(other, factors, **SAID, **at)
    assert {q for cause in verdict.causes for q in cause.quantities} >= {"G"}
    assert not any("A" in cause.quantities for cause in verdict.causes)


# ------------------------------------------------------------------ layers and tensors


def test_blocks_that_share_their_sums(post):
    *_, factors = post
    kinds = {name.split(".", 2)[2] for name in factors}
    total = {
        kind: [
            sum(getattr(factors[f"blocks.{i}.{kind}"], side) for i in range(2))
            for side in ("sum_A", "sum_G", "n_A")
        ]
        for kind in kinds
    }
    for over in (1, 2):  # the rows of both blocks, or of one
        theirs = {}
        for name in factors:
            A, G, n = total[name.split(".", 2)[2]]
            theirs[name] = (over * A / n, over * G / n, n / over)
        assert set(named(theirs, factors)) == {"B40"}


def layer(rng, size):
    """A factor of random rows, more of them in some layers than in others."""
    n = int(rng.integers(50, 90))
    x = rng.normal(size=(n, size)) @ rng.normal(size=(size, size))
    return Factor(x.T @ x, n, 2 * x.T @ x, n, 0.0, 0.0)


def test_layers_of_one_input_share_their_sums(post):
    """k and v, gate and up of a block, as two calls of one module; where labels are drawn, too."""
    *_, factors = post
    for pair in (("attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
        theirs = triples(factors)
        for block in ("blocks.0.", "blocks.1."):
            one, two = (factors[block + name] for name in pair)
            for name in pair:
                theirs[block + name] = (one.A, (one.G + two.G) / 2, 2 * one.n_A)
        assert set(named(theirs, factors)) == {"B40"}
        bare = {k: (A, G, None) for k, (A, G, _) in theirs.items()}
        assert set(named(bare, factors)) == {"B40"}


def test_one_G_of_two_layers_whatever_was_drawn(post):
    """One sampled label a position: any one G is ours by drawing, and the same in two is not."""
    model, corpus, _ = post
    layers = "blocks.0.attn.{k,v}"
    factors = rc.collect(model, corpus, layers, "sampled", draws=4)
    drawn = rc.collect(model, corpus, layers, "sampled", seed=9)
    G = sum(one.G for one in drawn.values()) / 2
    theirs = {k: (one.A, G, 2 * one.n_A) for k, one in drawn.items()}
    assert set(named(theirs, factors, declared={"fisher": "sampled"})) == {"B40"}


def test_blocks_of_one_shape_share_their_sums(post):
    """Of blocks with different widths those of the same width alone."""
    rng = np.random.default_rng(0)
    sizes = (8, 8, 5, 8, 5)
    made = {f"blocks.{i}.mlp.up": layer(rng, size) for i, size in enumerate(sizes)}
    factors = replace(post[2], layers=made)
    theirs = {}
    for name, one in made.items():
        same = [x for x in made.values() if x.sum_A.shape == one.sum_A.shape]
        n = sum(x.n_A for x in same)
        theirs[name] = (sum(x.sum_A for x in same) / n, sum(x.sum_G for x in same) / n, n)
    assert set(named(theirs, factors)) == {"B40"}


@pytest.mark.parametrize("drawn", [False, True])
def test_shared_sums_that_have_the_form_of_one_block(post, drawn):
    """Within bfloat16, where it outweighs the others, or within drawing; the factor is half."""
    rng, names = np.random.default_rng(0), [f"blocks.{i}.mlp.up" for i in range(2)]
    made = {name: replace(layer(rng, 8), n_A=64, n_G=64) for name in names}
    large = made[names[0]]
    made[names[0]] = replace(large, sum_G=(1 if drawn else 1e5) * large.sum_G)
    noise = {"error_G": 0.5, "error_trace_G": 0.5} if drawn else {}
    made = {
        x: replace(y, **{k: v * np.linalg.norm(y.G) for k, v in noise.items()})
        for x, y in made.items()
    }
    factors = replace(post[2], layers=made, fisher="sampled" if drawn else "empirical")
    n = sum(one.n_A for one in made.values())
    both = [sum(getattr(x, side) for x in made.values()) / n for side in ("sum_A", "sum_G")]
    said = {"fisher": "sampled" if drawn else "empirical"}
    if drawn:  # other labels
        x = rng.normal(size=(8, 8)) * np.linalg.norm(both[1]) / 16
        both[1] = both[1] + x + x.T
    theirs = {name: (*both, n) for name in names}
    assert set(named(theirs, factors, arithmetic="bfloat16", declared=said)) == {"B40"}


def test_parts_of_a_fused_matrix_in_another_order(post):
    *_, factors = post
    other = {"k": "v", "v": "k", "gate": "up", "up": "gate"}
    theirs = triples(factors)
    for name in factors:
        block, _, kind = name.rpartition(".")
        A, _, n = theirs[name]
        theirs[name] = A, factors[f"{block}.{other.get(kind, kind)}"].G, n
    assert named(theirs, factors) == {"B34": {"B38"}}


def test_two_layers_of_a_block_have_each_others_names(post):
    *_, factors = post
    theirs = triples(factors)
    q, o = "blocks.0.attn.q", "blocks.0.attn.o"
    theirs[q], theirs[o] = theirs[o], theirs[q]
    assert set(named(theirs, factors)) == {"B38"}


def test_a_sum_in_place_overwrites_what_was_read(post, pre):
    """Behind no norm that is another layer's input. Behind one it is told from the input of it."""
    model, corpus, factors = post
    theirs = triples(factors)
    for i in range(2):
        for kind in "qkv":
            A = factors[f"blocks.{i}.mlp.up"].A
            theirs[f"blocks.{i}.attn.{kind}"] = (A, *theirs[f"blocks.{i}.attn.{kind}"][1:])
    assert named(theirs, factors, model=model, corpus=corpus) == {"B42": {"B34", "B38"}}
    assert named(theirs, factors) == {"B34": {"B38"}}, "without a model its norms are unknown"
    model, corpus, factors = pre
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    for tensor, fault in (("residual sum behind it", "B42"), ("norm's input", "B34")):
        ((_, found),) = moments(here, [Setting(tensor_A=tensor)], ["blocks.1.attn.q"])
        theirs = {k: (x.A, x.G, x.n_A) for k, x in found.items()}
        with_these = {"model": model, "corpus": corpus, "layers": "blocks.1.attn.q"}
        alike = {"B34"} if fault == "B42" else set()
        assert named(theirs, factors, **with_these) == {fault: alike}


def test_behind_an_activation_may_be_an_activation_in_place(pre):
    model, corpus, factors = pre
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    ((_, found),) = moments(here, [Setting(tensor_G="activation")], ["blocks.1.mlp.gate"])
    theirs = triples(factors) | {k: (x.A, x.G, x.n_A) for k, x in found.items()}
    assert named(theirs, factors, model=model, corpus=corpus) == {"B35": {"B42"}}


def test_G_of_the_input_has_its_size(post):
    """Where model and corpus are given it is recomputed; else its size is what there is."""
    model, corpus, factors = post
    here = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    some = ["blocks.1.attn.k", "blocks.1.attn.v"]
    for tensor in ("input", "stream"):
        ((_, found),) = moments(here, [Setting(tensor_G=tensor)], some)
        theirs = {k: (x.A, x.G, x.n_A) for k, x in found.items()}
        for given in ({"model": model, "corpus": corpus}, {}):
            verdict = rc.validate(theirs, factors, layers=",".join(some), **SAID, **given)
            (cause,) = verdict.causes
            assert cause.fault == "B35"
            assert cause.after < 1e-10 if given else np.isnan(cause.after)


@pytest.fixture(scope="module")
def joint():
    """Factors of layers with a bias, by four draws, and by one of another seed."""
    one = config(biases=("up", "down"))
    model = rc.Model(one, random_parameters(one, 3))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, one.vocabulary, (12, 9)))
    at = "blocks.*.mlp.{up,down}"
    return rc.collect(model, corpus, at, draws=4), rc.collect(model, corpus, at, seed=1)


@pytest.mark.parametrize("bias", [{}, {"bias": "joint"}], ids=["not declared", "declared"])
def test_A_and_G_swapped_where_A_has_a_column_for_the_bias(joint, bias):
    factors, drawn = joint
    theirs = {name: (one.G, one.A_joint, one.n_A) for name, one in drawn.items()}
    assert set(named(theirs, factors, declared={"fisher": "sampled"} | bias)) == {"B32"}


@pytest.mark.parametrize("whole", [True, False])
def test_drawing_explains_G_in_the_place_of_A_where_A_stands_in_the_place_of_G(pre, whole):
    """Of A alone any matrix could be another draw of G."""
    model, corpus, _ = pre
    names = "blocks.0.attn.q", "blocks.0.mlp.up"
    factors = rc.collect(model, corpus, ",".join(names), draws=8)
    drawn = rc.collect(model, corpus, ",".join(names), seed=1)
    swapped = {x: (one.G, one.A if whole else one.G, one.n_A) for x, one in drawn.items()}
    here = Case(of_arrays(swapped), factors, {x: x for x in names}, Arithmetic(), model, corpus)
    here = replace(here, drawn=dict.fromkeys(names, Drawing(1.0, 0.5, 0.5, 99)))
    found = {side: Side(side) for side in "AG"}
    look(here, names, found, Index(here))
    lefts = found["A"].table[Idea(("B32",))]
    assert {*lefts} == {*names}
    for layer, left in lefts.items():
        assert left.spread == (1.0 if whole else 0)
        assert 0.01 < left.error < 1
        found["A"].ladders[layer] = ladder(here, layer, "A", None)
        assert not whole or found["A"].explains(Idea(("B32",)), layer, free=True)


def test_shards_of_an_A_that_has_a_column_for_the_bias(joint):
    factors, _ = joint
    half = {name: len(one.A_joint) // 2 for name, one in factors.items()}
    theirs = {
        name: (np.hstack([one.A_joint[: half[name]], one.A_joint[-half[name] :]]), one.G, one.n_A)
        for name, one in factors.items()
    }
    said = {"fisher": "sampled", "labels": "given", "bias": "joint"}
    assert set(named(theirs, factors, declared=said)) == {"B47"}


# ------------------------------------------------------------------ what is not finite


def spoilt(G, *where):
    G = G.copy()
    for at, value in where:
        G[at] = value
    return G


NOT_FINITE = {
    "nothing is finite": (lambda G: G * np.nan, None),
    "one entry": (lambda G: spoilt(G, ((0, 1), np.nan)), None),
    "an infinity": (lambda G: spoilt(G, ((0, 1), np.inf)), "B61"),
    "a row and its column": (lambda G: spoilt(G, (0, np.nan), (np.s_[:, 0], np.nan)), "B61"),
}


@pytest.mark.parametrize("how", NOT_FINITE)
def test_what_is_not_finite_is_float16_by_a_sign_alone(post, how):
    change, fault = NOT_FINITE[how]
    *_, factors = post
    theirs = {name: (A, change(G), n) for name, (A, G, n) in triples(factors).items()}
    verdict = rc.validate(theirs, factors, **SAID)
    (cause,) = verdict.causes
    assert not verdict.passed and cause.fault == fault
    assert (fault is None) == cause.sentence.startswith("Unknown") == ("B61" in cause.alike)


def test_a_dump_without_a_layer_says_what_is_missing(post):
    """Nothing is compared, so that there is no verdict; the one line has the name of the fault."""
    *_, factors = post
    with pytest.raises(EmptyError, match=r"empty.*Missing: 'blocks\.1\.mlp\.up'\. B48"):
        rc.validate({}, factors, layers="blocks.1.mlp.up")


def test_layers_that_were_not_asked_for_are_no_frozen_ones(post):
    """The MLPs alone: no attention anywhere. The second block alone may have been trained."""
    *_, factors = post
    mlps = {name: one for name, one in triples(factors).items() if ".mlp." in name}
    assert named(mlps, factors) == {None: {"B48"}}
    second = {name: one for name, one in triples(factors).items() if "blocks.1" in name}
    assert named(second, factors) == {"B48": set()}
    halved = {name: (A, G / 4, n) for name, (A, G, n) in mlps.items()}
    verdict = rc.validate(halved, factors, **SAID)
    assert [cause.fault for cause in verdict.causes][1:] == [None]


def test_shards_of_another_part_of_a_fused_layer(post):
    """v's gradient in the place of k's, its shards side by side: two faults at once."""
    *_, factors = post
    theirs = {}
    for name in (x for x in factors if x.endswith((".k", ".v"))):
        other = name[:-1] + ("v" if name.endswith("k") else "k")
        A, G = (np.hstack(np.split(X, 2)) for X in (factors[name].A, factors[other].G))
        theirs[name] = A, G, factors[name].n_A
    assert set(named(theirs, factors, layers=",".join(theirs))) == {"B34", "B47"}


def test_a_mask_left_out_of_some_sums_is_no_choice_of_rows(post):
    """Without padding: the last position is added in two layers, and counted in none."""
    model, corpus, factors = post
    names = [name for name in factors if name.endswith((".o", ".down"))]
    case = Case(Dump("memory", {}, {}), factors, {}, Arithmetic(), model, corpus)
    setting = Setting(rows_A="with last", count="reference")
    ((_, made),) = moments(case, [setting], names)
    theirs = triples(factors)
    theirs |= {x: (made[x].A, factors[x].G, factors[x].n_A) for x in names}
    found = named(theirs, factors, model=model, corpus=corpus)
    assert set(found) == {"B29"}


@pytest.mark.parametrize("size", [3, 4])
def test_padding_of_row_shards_shows_whatever_labels_are_drawn(post, size):
    """G is of few labels, and drawing them hides its form; but rows of zeros are not drawn."""
    model, corpus, _ = post
    drawn = partial(rc.collect, model, part_of(corpus, slice(0, 2)), "blocks.*.mlp.*", "sampled")
    theirs = triples(drawn(seed=5))
    for name in ("blocks.0.mlp.down", "blocks.1.mlp.gate"):
        A, G, n = theirs[name]
        padded = np.insert(G, range(size - 1, len(G), size - 1), 0, axis=0)  # one row short each
        theirs[name] = A, padded[: len(G)], n
    (cause,) = rc.validate(
        theirs, drawn(seed=1, draws=8), arithmetic="float64", declared={"fisher": "sampled"}
    ).causes
    assert cause.fault == "B47" and cause.layers == ("blocks.0.mlp.down", "blocks.1.mlp.gate")
