"""Other rows, counts and texts, where A has a column for the bias: found by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
from strategies import assert_within, case, config, random_parameters
from test_factors import drawn_labels, model_of
from test_judge_variants import LAYER, LOOPS, beside, gap, tiny, under

import refcurv as rc
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.variants import REFERENCE, Setting, moments, settings
from refcurv.judge.diagnosis.variants.positions import positions
from refcurv.judge.diagnosis.variants.texts import LONGER, TEXTS, reads_alike
from refcurv.judge.dump import Dump
from refcurv.model.part import part_of

JOINT = {"bias": "joint"}


@pytest.fixture(scope="module")
def biased():
    """A GPT-2 with biases, prompts and padding; one text has no label, and so no row."""
    made = config(
        width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7, norm="layer", norm_bias=True,
        biases=("q", "k", "v", "o", "up", "down"), learned_positions=9, gated=False,
        activation="gelu_tanh", rope_theta=None, norm_place="pre", qk_norm="none",
    )  # fmt: skip
    rng = np.random.default_rng(7)
    tokens, at = rng.integers(1, made.vocabulary, (9, 8)), np.arange(8)
    tokens[:, 0] = 0
    length, prompt = rng.integers(4, 9, 9)[:, None], rng.integers(0, 3, 9)[:, None]
    label = np.roll(tokens, -1, axis=1)
    label[(at >= length - 1) | (at < prompt)] = -1
    label[4] = -1
    corpus = rc.Corpus(tokens, labels=label, mask=(at < length).astype(np.uint8))
    return rc.Model(made, random_parameters(made, 7)), corpus


def collected(biased, fisher):
    model, corpus = biased
    return rc.collect(model, corpus, "blocks.*.mlp.{up,down},blocks.1.attn.o", fisher)


def case_of(biased, factors, **declared):
    model, corpus = biased
    dump = Dump("memory", {}, {}, declared=declared)
    return Case(dump, factors, {}, Arithmetic(), model, corpus, joint=frozenset(factors))


def judged(biased, factors, made, **declared):
    """What is named of A and G that a setting makes, over the layers that it makes them of."""
    model, corpus = biased
    n = {k: one.n_A if one.n_A == one.n_G else None for k, one in made.items()}
    theirs = {k: (one.A, one.G, n[k]) for k, one in made.items()}
    declared = {"fisher": str(factors.fisher)} | JOINT | declared
    return rc.validate(
        theirs, factors, model=model, corpus=corpus, declared=declared, arithmetic="float64",
        layers=",".join(made),
    )  # fmt: skip


ROWS = (
    Setting(rows_A="with pads, without last", rows_G="with pads, without last", pads="real"),
    Setting(rows_A="with pads", count="reference", pads="all"),
    Setting(rows_A="with pads", count="reference"),  # padding sees nothing at all
    Setting(rows_A="without the last column", rows_G="without the last column"),
    Setting(count="labels"),
    Setting(pooling_A="sum", pooling_G="sum", count="every sequence"),
    Setting(pooling_A="centred"),
    Setting(text=LONGER),
    Setting(text=f"{LONGER}, cut to its length before labels, without a label"),
    Setting(text="no start token"),
    Setting(text="a token is padding and has no label", token=3),
    Setting(text="a token is no row, has none and is none", token=3),
)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_other_rows_and_texts_of_joint_layers_have_their_names(biased, fisher) -> None:
    factors = collected(biased, fisher)
    given = {"labels": "given"} if fisher == "sampled" else {}
    found = dict(moments(case_of(biased, factors, **given), ROWS, list(factors)))
    assert len(found) == len(ROWS)
    corpus, counted = biased[1], [found[setting]["blocks.1.mlp.up"].n_A for setting in ROWS]
    assert counted[0] == factors["blocks.1.mlp.up"].n_A + (~corpus.real).sum()
    assert counted[5] == len(corpus.label)
    for setting, made in found.items():
        verdict = judged(biased, factors, made, **given)
        assert not verdict.passed
        assert [cause.fault for cause in verdict.causes] == list(setting.faults), setting.words
        assert max(cause.after for cause in verdict.causes) < 1e-9, setting.words


def test_what_changes_labels_alone_leaves_A(biased) -> None:
    """Every token under every text: A has ours to the bit where `reads_alike` says so."""
    model, corpus = biased
    rare = model.config.vocabulary - 1  # stands in one place, and labels follow it
    tokens, label = (np.where(x == rare, 1, x) for x in (corpus.tokens, corpus.label))
    b = int(np.flatnonzero((label[:, 1] >= 0) & (label[:, 2] >= 0))[0])
    tokens[b, 2] = label[b, 1] = rare
    biased = model, rc.Corpus(tokens, labels=label, mask=corpus.real.astype(np.uint8))
    factors = collected(biased, "empirical")
    here = case_of(biased, factors)
    at = positions(biased[1], model.config, here.reference.rows)
    every = [
        Setting(text=text, token=token)
        for text in TEXTS if not text.startswith(LONGER) and TEXTS[text].fault == "B25"
        for token in range(model.config.vocabulary)
    ]  # fmt: skip
    alike = {
        one: reads_alike(at, one.text, one.token, model.config, here.reference.rows)
        for one in every
    }
    assert {*alike.values()} == {True, False}
    labels_too = False
    for setting, made in moments(here, every, list(factors)):
        pairs = [(made[x].A, made[x].G, factors[x].A_joint, factors[x].G) for x in made]
        same = all(np.allclose(A, own, rtol=1e-13, atol=1e-15) for A, _, own, _ in pairs)
        assert same or not alike[setting], setting.words
        labels_too |= alike[setting] and not all(np.allclose(G, own) for _, G, _, own in pairs)
    assert labels_too, "labels may differ"


ALIKE = {
    "rows of G with pads, padding sees real": "B4",  # without a count it is another divisor
    "a is stream behind": "B42",  # a sum in place leaves the same there
    "residual shared": "B34",  # an MLP then reads what attention reads
}
"""Settings that are another fault in some layers, and which."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_settings_of_joint_layers_have_their_names(biased, part: int) -> None:
    """A third of all settings; the others are tried beside separate layers."""
    factors = collected(biased, "empirical")
    here = case_of(biased, factors)
    for setting, made in moments(here, settings(here)[part::9], list(factors)):
        verdict = judged(biased, factors, made)
        named = {cause.fault for cause in verdict.causes}
        assert not verdict.passed
        assert named in ({*setting.faults}, {*setting.faults, ALIKE.get(setting.words)}) or (
            named == {ALIKE.get(setting.words)}
        ), (setting.words, named)


# ------------------------------------------------------------------ texts, beside other routes


def test_a_start_token_more_or_less_is_another_corpus(biased) -> None:
    """Beside `collect` on tokens and labels that are written down anew."""
    model, corpus = biased
    factors, layer = collected(biased, "empirical"), "blocks.1.mlp.up"
    tokens, label, real = (np.array(x) for x in (corpus.tokens, corpus.label, corpus.real))
    pad = ((0, 0), (1, 0))
    more = [np.pad(tokens, pad, mode="edge"), np.pad(label, pad), np.pad(real, pad, mode="edge")]
    more[1][:, 0] = tokens[:, 0]
    without = [*more]
    without[1] = np.pad(label, pad, constant_values=-1)
    ends = [x[:, :-1].copy() for x in without]
    ends[1][:, -1] = -1
    for text, (t, y, r) in {
        LONGER: more,
        f"{LONGER}, the last one cut off": [x[:, :-1] for x in more],
        f"{LONGER}, without a label": without,
        f"{LONGER}, cut to its length before labels, without a label": ends,
        "no start token": [x[:, 1:] for x in (tokens, label, real)],
    }.items():
        other = rc.Corpus(t, labels=y, mask=r.astype(np.uint8))
        want = rc.collect(model, other, layer, "empirical")[layer]
        found = under(case_of(biased, factors), Setting(text=text))[layer]
        assert (found.n_A, found.n_G) == (want.n_A, want.n_G), text
        assert_within(found.A, want.A_joint, 1e-12, np.trace(want.A_joint), f"A, {text}")
        assert_within(found.G, want.G, 1e-12, np.trace(want.G), f"G, {text}")


@pytest.mark.parametrize("windows", [(), (2, 0)], ids=["", "windows"])
@pytest.mark.parametrize("attended", [False, True], ids=["hidden", "attended"])
def test_a_token_taken_for_padding_is_the_loops(attended, windows, monkeypatch) -> None:
    """Nobody sees it, it is no row, and labels at it and of it may go."""
    one, token, own_sees = tiny(learned_positions=4, windows=windows), 1, oracles.sees
    one = replace(one, token=np.array([[0, 1, 2, 0], [2, 0, 1, 1]]))
    label = np.array([[1, 2, 0, -1], [0, 1, 1, -1]])
    one = replace(one, label=label)
    here = beside(one, "empirical", LAYER)
    what = "no row" if attended else "padding"
    for labels, own, follows in (
        (" and has no label", True, False), (" and is no label", False, True), ("", False, False),
    ):  # fmt: skip
        gone = ((one.token == token) & own) | ((label == token) & follows)
        y = np.where(gone, -1, label)
        found = under(here, Setting(text=f"a token is {what}{labels}", token=token))[LAYER]
        A, G, n = 0.0, 0.0, 0
        for b, tokens in enumerate(one.token):
            hides = {s for s in range(4) if tokens[s] == token and not attended}

            def sees(config, i, segment, t, s, hides=frozenset(hides)) -> bool:
                return own_sees(config, i, segment, t, s) and s not in hides

            monkeypatch.setattr(oracles, "sees", sees)
            P = one.astype(np.longdouble)
            keep = oracles.reached(y, one.token != token, one.segment)[b]
            flowed = oracles.rows(one.config, P, LAYER, tokens)
            p = np.exp(-oracles.nats(one.config, P, tokens))
            S_A, S_G, count = oracles.factor_sums(
                flowed, oracles.worlds(p, y[b], "empirical"), keep
            )
            A, G, n = A + S_A, G + S_G, n + count
        assert (found.n_A, found.n_G) == (n, n)
        assert_within(found.A, A / n, LOOPS, np.trace(A) / n, f"A, {labels}")
        assert_within(found.G, G / n, LOOPS, np.trace(G) / n, f"G, {labels}")


def test_given_labels_stay_when_the_network_changes() -> None:
    """Beside `collect` by the labels of the unchanged model as the corpus's own."""
    one = case(4, batch=12)
    here = beside(one, "sampled", LAYER, seed=3)
    here = replace(here, dump=Dump("memory", {}, {}, declared={"labels": "given"}))
    setting = Setting(network=(("no score scale", 0.0),))
    found, true = under(here, setting)[LAYER], under(here, REFERENCE)[LAYER]
    assert gap(true, under(replace(here, dump=Dump("memory", {}, {})), REFERENCE)[LAYER]) == 0
    drawn = drawn_labels(one, 3, 0)
    other = rc.Corpus(one.token, labels=drawn, mask=one.real.astype(np.uint8))
    scaled = rc.Model(replace(one.config, score_scale=1.0), model_of(one).parameters)
    want = rc.collect(scaled, other, LAYER, "empirical")[LAYER]
    assert_within(found.G, want.G, 1e-12, np.trace(want.G), "G by given labels")


# ------------------------------------------------------------------ counts


def test_rows_that_are_counted_twice_are_told_from_half_a_loss(biased) -> None:
    """By the counts: without them both are G over 2, and the cause says so."""
    factors = collected(biased, "empirical")
    for times, named, alike in ((2, "B39", ()), (1, "B5", ()), (None, "B5", ("B39",))):
        theirs = {
            k: (one.A_joint, one.G / 2, None if times is None else times * one.n_A)
            for k, one in factors.items()
        }
        declared = {"fisher": "empirical"} | JOINT
        verdict = rc.validate(theirs, factors, declared=declared, arithmetic="float64")
        assert [(c.fault, c.alike) for c in verdict.causes] == [(named, alike)]
        counted = {f.fault for f in verdict.failed if f.quantity.startswith("n_")}
        assert counted == ({"B39"} if times == 2 else set())


def test_a_count_says_which_rows_where_rounding_hides_them() -> None:
    """One row more of 72, in bfloat16: A and G are ours by their size, and the count is not."""
    made = config(width=6, heads=2, kv_heads=2, head_width=4, mlp_width=7, biases=("up",))
    model, rng = rc.Model(made, random_parameters(made, 7)), np.random.default_rng(2)
    tokens, label = (rng.integers(0, made.vocabulary, (9, 8)) for _ in range(2))
    label[3, -1] = -1
    corpus, layer = rc.Corpus(tokens, labels=label), "blocks.1.mlp.up"
    one = rc.collect(model, corpus, layer, "empirical")[layer]
    more = rc.collect(model, corpus, layer, "empirical", rows="all")[layer]
    assert (one.n_A, more.n_A) == (71, 72)
    reference = rc.collect(model, corpus, layer, "empirical")
    for theirs, fault in ((more, "B27"), (one, "B82")):
        verdict = rc.validate(
            {layer: (theirs.A_joint, theirs.G, 72 if fault == "B27" else 80)}, reference,
            model=model, corpus=corpus, declared={"fisher": "empirical"} | JOINT,
            arithmetic="bfloat16",
        )  # fmt: skip
        assert [cause.fault for cause in verdict.causes] == [fault]


def test_a_moving_average_that_is_corrected_is_no_other_divisor(biased) -> None:
    model, corpus = biased
    factors, layer = collected(biased, "empirical"), "blocks.1.mlp.up"
    A, G, whole = 0.0, 0.0, 0.0
    for begin in range(0, 9, 3):
        part = part_of(corpus, slice(begin, begin + 3))
        one = rc.collect(model, part, layer, "empirical")[layer]
        weight = 0.25 * 0.75 ** (2 - begin // 3)
        A, G, whole = A + weight * one.A_joint, G + weight * one.G, whole + weight
    theirs = {layer: (A / whole, G / whole, factors[layer].n_A)}
    declared = {"fisher": "empirical"} | JOINT
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, declared=declared, arithmetic="float64",
        layers=layer,
    )  # fmt: skip
    assert [cause.fault for cause in verdict.causes] == ["B9"]
    assert "from zero and corrected" in verdict.causes[0].sentence


def test_a_covariance_to_which_ones_were_added(biased) -> None:
    factors = collected(biased, "empirical")
    theirs = {}
    for name, one in factors.items():
        A = one.A_joint - np.outer(one.A_joint[-1], one.A_joint[-1])
        A[-1, -1] = 1
        theirs[name] = A, one.G, one.n_A
    declared = {"fisher": "empirical"} | JOINT
    verdict = rc.validate(theirs, factors, declared=declared, arithmetic="float64")
    assert [cause.fault for cause in verdict.causes] == ["B45"]


@pytest.mark.parametrize("how", ["all of it", "before the ones", "no mean is known"])
def test_a_covariance_may_have_one_row_less_for_divisor(biased, how) -> None:
    """A factor of n/(n − 1) is that of the covariance, and no other count."""
    factors = collected(biased, "empirical")
    declared, theirs = {"fisher": "empirical"} | (JOINT if "mean" not in how else {}), {}
    for name, one in factors.items():
        by, mean = one.n_A / (one.n_A - 1), one.A_joint[-1]
        A = by * (one.A_joint - np.outer(mean, mean))
        if how == "before the ones":
            A[-1, -1] = 1
        theirs[name] = (A if "mean" not in how else A[:-1, :-1]), one.G, one.n_A
    if "mean" in how:
        layers = {k: replace(factors[k], sum_a=None) for k in factors}
        factors = replace(factors, layers=layers)
    verdict = rc.validate(theirs, factors, declared=declared, arithmetic="float64")
    assert [cause.fault for cause in verdict.causes] == ["B45"]
    assert verdict.causes[0].after < 1e-12
    if how != "before the ones":
        theirs = {k: (A * (n - 1) / (n - 5), G, n) for k, (A, G, n) in theirs.items()}
        verdict = rc.validate(theirs, factors, declared=declared, arithmetic="float64")
        assert [cause.fault for cause in verdict.causes] == ["B45", "B4"]


def test_gradients_less_their_mean_may_have_one_row_less_for_divisor(biased) -> None:
    factors = collected(biased, "empirical")
    centred = under(case_of(biased, factors), Setting(pooling_G="centred"))
    made = {k: replace(one, G=one.G * one.n_G / (one.n_G - 1)) for k, one in centred.items()}
    verdict = judged(biased, factors, made)
    assert [one.fault for one in verdict.causes] == ["B45"]
    assert "over n − 1" in verdict.causes[0].sentence


def test_ones_that_are_summed_where_inputs_are_averaged(biased) -> None:
    """[ā; n] of each sequence of n rows: the block of [ā; 1], and the corner of Σ [a; 1]."""
    layer = "blocks.1.mlp.down"
    here = case_of(biased, collected(biased, "empirical"))
    mixed, mean, both = (
        under(here, Setting(pooling_A=one))[layer].A for one in ("mean, ones summed", "mean", "sum")
    )
    assert_within(mixed[:-1, :-1], mean[:-1, :-1], LOOPS, np.trace(mean), "A")
    assert np.isclose(mixed[-1, -1], both[-1, -1])
    assert Setting(pooling_A="mean, ones summed") in settings(here)
    assert Setting(pooling_A="mean, ones summed") not in settings(replace(here, joint=frozenset()))


def test_a_column_that_is_missing_and_a_gradient_of_the_input(biased) -> None:
    factors = collected(biased, "empirical")
    lacking = {k: (one.A, one.G, one.n_A) for k, one in factors.items()}
    extra = {k: (one.A_joint, one.G, one.n_A) for k, one in factors.items()}
    inputs = {k: (one.A_joint, one.A, one.n_A) for k, one in factors.items() if "mlp" in k}
    for theirs, fault, bias in (
        (lacking, "B31", "joint"), (extra, "B31", "separate"), (inputs, "B35", "joint"),
    ):  # fmt: skip
        declared = {"fisher": "empirical", "bias": bias}
        verdict = rc.validate(
            theirs, factors, declared=declared, arithmetic="float64", layers=",".join(theirs)
        )
        assert [cause.fault for cause in verdict.causes] == [fault]
        assert verdict.causes[0].layers == tuple(theirs) and verdict.causes[0].remedy
