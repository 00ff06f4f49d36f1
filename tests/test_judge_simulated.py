"""Dumps of a short float are judged by what this network's own rounding does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis import precision
from refcurv.judge.diagnosis.divisors import Named
from refcurv.judge.diagnosis.ladders import DECLARED, Ladder, ladder
from refcurv.judge.diagnosis.looking import _starts
from refcurv.judge.diagnosis.procedure import _agree, _first
from refcurv.judge.diagnosis.search import PLAIN, Chosen, Idea, Side
from refcurv.judge.diagnosis.seen import Left, Seen
from refcurv.judge.diagnosis.signs import signs
from refcurv.judge.diagnosis.simulated import ORDER, know_kinks, sharpened
from refcurv.judge.diagnosis.telling import _merged, scale
from refcurv.judge.diagnosis.variants import Setting, combined, moments
from refcurv.judge.drawn import Drawing
from refcurv.judge.dump import Dump
from refcurv.judge.foreign.memory import of_arrays

SHORT = Setting(network=(("all in bfloat16", 0.0),))
BFLOAT16 = Arithmetic("bfloat16", "float32", "float32", "float32", "float32")
TEXT = "model=bfloat16,products=float32,sums=float32,solver=float32,stored=float32"


@pytest.fixture(scope="module")
def left():
    """A small Llama with padding of one token, which programs put on the left."""
    own = config(width=8, heads=2, kv_heads=1, head_width=4, mlp_width=12, norm_place="pre",
                 qk_norm="none", norm_eps=1e-4)  # fmt: skip
    rng = np.random.default_rng(3)
    mask = (np.arange(9) < rng.integers(3, 10, 24)[:, None]).astype(np.uint8)
    tokens = rng.integers(1, own.vocabulary, (24, 9)) * mask
    corpus = rc.Corpus(tokens, mask=mask)
    model = rc.Model(own, random_parameters(own, 5))
    return model, corpus, rc.collect(model, corpus, "blocks.*.{attn,mlp}.*", "empirical")


def case_of(left, arithmetic, **declared):
    model, corpus, factors = left
    dump = Dump("memory", {}, {}, declared={"fisher": "empirical"} | declared)
    return Case(dump, factors, {x: x for x in factors}, arithmetic, model, corpus)


def planted(left, theirs):
    """What a program of that setting writes."""
    ((_, found),) = moments(case_of(left, Arithmetic()), [theirs], list(left[2]))
    return {name: (one.A, one.G, one.n_A) for name, one in found.items()}


def named(left, theirs, arithmetic=TEXT):
    model, corpus, factors = left
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, arithmetic=arithmetic,
                          declared={"fisher": "empirical"})  # fmt: skip
    return sorted({str(cause.fault) for cause in verdict.causes})


def both(one: Setting) -> Setting:
    found = combined(one, SHORT)
    assert found is not None
    return found


def test_a_run_in_their_dtype_sharpens_the_budget(left) -> None:
    case = case_of(left, BFLOAT16)
    ((_, short),) = moments(case, [SHORT], list(left[2]))
    sharper: list[float] = []
    for layer, one in short.items():
        for side, X, Y in zip("AG", case.means(layer), (one.A, one.G), strict=True):
            steps = ladder(case, layer, side, None)
            found = sharpened(case, layer, side, steps)
            far = np.linalg.norm(X - Y) / np.linalg.norm(X)
            if found.steps == steps.steps:
                assert ORDER * far > 0.9 * steps.steps[0][1]
                continue
            (_, sharp), (name, budget) = found.steps[:2]
            assert ORDER * far <= sharp < budget == steps.steps[0][1]
            assert (name, found.rank(sharp), found.rank(budget)) == (DECLARED, 0, 1)
            sharper.append(budget / sharp)
    assert len(sharper) > 24 and np.median(sharper) > 1.5


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_budgets_count_what_rounding_takes_across_a_kink(left, activation) -> None:
    """Numbers near 0 that change their sign are as many as u is large, and each counts fully."""
    model, corpus, _ = left
    made = replace(model.config, activation=activation)
    model = rc.Model(made, dict(model.parameters))
    factors = rc.collect(model, corpus, "blocks.*.mlp.*", "empirical")
    before = case_of((model, corpus, factors), BFLOAT16)
    after = case_of((model, corpus, factors), BFLOAT16)
    know_kinks(after)
    ((_, short),) = moments(after, [SHORT], list(factors))
    for layer, one in short.items():
        for side, X, Y in zip("AG", after.means(layer), (one.A, one.G), strict=True):
            plain = before.budget(layer, "float32", side)
            far = ORDER * np.linalg.norm(X - Y) / np.linalg.norm(X)
            want = max(plain, far) if activation == "relu" else plain
            assert after.budget(layer, "float32", side) == pytest.approx(want)
    exact = replace(after, arithmetic=replace(BFLOAT16, model="float64"))
    assert exact.budget(layer, "float32") < 1e-3


def test_what_cannot_be_run_keeps_its_budget(left) -> None:
    """No short float is declared; there is no model; labels are drawn, and then G alone."""
    layer = "blocks.1.mlp.down"
    for case in (
        case_of(left, Arithmetic()),
        replace(case_of(left, BFLOAT16), model=None),
        case_of(left, replace(BFLOAT16, model="tf32")),
    ):
        steps = ladder(case, layer, "A", None)
        assert sharpened(case, layer, "A", steps) is steps
    drawn = case_of(left, BFLOAT16, fisher="sampled")
    steps = {side: ladder(drawn, layer, side, None) for side in "AG"}
    assert len(sharpened(drawn, layer, "A", steps["A"]).steps) == len(steps["A"].steps) + 1
    assert sharpened(drawn, layer, "G", steps["G"]) is steps["G"]


def test_start_tokens_are_one_row_of_each_text(left) -> None:
    case, (layer, *_) = case_of(left, BFLOAT16), left[2]
    corpus, n = left[1], left[2][layer].n_A
    seen = Seen(layer, "A", np.eye(2), np.eye(2), None, n)
    for count in (len(corpus.label), -len(corpus.label), int((corpus.label >= 0).any(1).sum())):
        assert _starts(case, replace(seen, n_T=n + count))
    assert not _starts(case, replace(seen, n_T=n + int((~corpus.real).sum())))
    assert _starts(replace(case, corpus=None), replace(seen, n_T=n + 1))


def test_what_nothing_explains_is_searched_first_and_has_no_size_of_a_dtype() -> None:
    """By drawing all but two layers are right; one is off as bfloat16 is, which it is not."""
    steps = (("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 0.04))
    names = [f"blocks.{n}.mlp.up" for n in range(12)]
    side = Side("G", {name: Ladder(steps, Drawing(0.5, 0.0, 0.5)) for name in names})
    for k, name in enumerate(names):
        side.add(PLAIN, name, Left({4: 0.7, 7: 1.1, 9: 0.03}.get(k, 0.2), 1.0))
    assert side.unexplained() == [names[4], names[7]]
    assert {names[4], names[7]} < {*_first(side, names, 8)}
    assert len(_first(side, names, 8)) <= 8
    assert side.sized() == [names[9]]
    side.odd = {*side.sized()}
    assert side.unexplained() == [names[4], names[7], names[9]]


def test_a_count_that_may_be_the_fault_of_other_layers_is_no_second_one() -> None:
    twice = Named("B39", "G is ours times 0.5", "AG", 0.0, (), ("a", "b"))
    hidden = Named("B40", "both counts are twice ours", "n", 0.0, ("B39",), ("c",))
    other = Named("B5", "G is twice ours", "G", 0.0, (), ("d",))
    (one, two) = _merged([twice, hidden, other])
    assert (one.fault, one.layers, two) == ("B39", ("a", "b", "c"), other)


def test_rows_of_all_positions_are_those_of_labels_everywhere() -> None:
    """G shows the labels in most layers; in one it is right within its budget."""
    found = {side: Side(side) for side in "AG"}
    none = Left(0.0, 1.0)
    rows = Setting(rows_A="with pads", pads="all")
    labels = Setting(where="last class", rows_G="with pads", pads="all")
    found["A"].chosen.append(Chosen(Idea(rows.faults, rows), dict.fromkeys("abc", none)))
    found["G"].chosen.append(Chosen(Idea(labels.faults, labels), dict.fromkeys("ab", none)))
    _agree(found)
    assert [one.faults for side in found.values() for one in side.chosen] == [("B24",)] * 2


def test_a_rank_that_is_lost_is_no_other_fault_than_what_is_named(left) -> None:
    """Of a sum that is 0 by theory rounding alone is left: no form of it is that of any fault."""
    case, found, layer = searched(left, 1)
    pooled, lost = "blocks.1.mlp.up", np.diag([1.0, *[0.0] * 7])
    theirs = dict(case.dump.layers) | {layer: replace(case.dump.layers[layer], G=lost)}
    case = replace(case, dump=replace(case.dump, layers=theirs))
    for side in found.values():
        side.ladders[layer] = Ladder((("float32", 0.01),))
    found["G"].add(PLAIN, layer, Left(1.0, 1.0))
    assert [one.fault for one in signs(case, found)] == ["B44"]
    idea = Idea(("B36",), Setting(pooling_G="sum"))
    found["G"].chosen.append(Chosen(idea, {pooled: Left(0.0, 1.0)}))
    assert [(one.fault, one.alike) for one in signs(case, found)] == [("B36", ("B44",))]


def test_a_step_that_is_declared_is_no_dtype(left) -> None:
    case, found, layer = searched(left, 1)
    ((_, short),) = moments(case, [SHORT], [layer])
    far = np.linalg.norm(short[layer].A - left[2][layer].A) / np.linalg.norm(left[2][layer].A)
    found["A"].ladders[layer] = Ladder((("float32", far / 2), (DECLARED, 2 * far)))
    found["A"].add(PLAIN, layer, Left(far, 1.0))
    assert found["A"].rank(layer, found["A"].plain(layer)) == 1
    assert found["A"].sized() == [] == precision.causes(case, found)


def test_one_count_of_both_sides_is_explained_by_the_rows_of_one(left) -> None:
    """Drawing may hide the rows of G, or its budget; the rows of A then say what was counted."""
    case, found, layer = searched(left, 2)
    for side in found.values():
        side.ladders[layer] = Ladder((("float32", 0.01),))
        side.add(PLAIN, layer, Left(0.0, 1.0, "ours", (), 2.0))
    one = scale(case, found, layer)
    assert one is not None and (one.rows_A, one.rows_G) == (2.0, 2.0)
    idea = Idea(("B27",), Setting(rows_A="with last"))
    found["A"].chosen.append(Chosen(idea, {layer: Left(0.0, 1.0, "", (), 1.0)}))
    one = scale(case, found, layer)
    assert one is not None and (one.rows_A, one.rows_G) == (1.0, 1.0)


def searched(left, times):
    """A case whose rows are counted so many times, and sides without any layer."""
    theirs = {x: (one.A, one.G, times * one.n_A) for x, one in left[2].items()}
    case = replace(case_of(left, BFLOAT16), dump=of_arrays(theirs))
    return case, {side: Side(side) for side in "AG"}, "blocks.1.mlp.down"


@pytest.mark.slow
def test_padding_on_the_left_is_no_start_token_in_any_dtype(left) -> None:
    """Rows of padding of one token are all one direction, as rows of start tokens are."""
    pads = Setting(rows_A="with pads", rows_G="with pads", pads="apart")
    assert named(left, planted(left, pads), "float64") == ["B28"]
    assert named(left, planted(left, both(pads))) == ["B28"]


def test_a_mask_left_out_of_some_layers_is_told_in_a_short_float(left) -> None:
    pads = planted(left, both(Setting(rows_A="with pads", count="reference", pads="apart")))
    theirs = {
        name: pads[name] if name.endswith((".o", ".down")) else own
        for name, own in planted(left, SHORT).items()
    }
    assert named(left, theirs) == ["B29"]
