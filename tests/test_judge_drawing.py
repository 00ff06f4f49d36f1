"""Drawn labels: what an honest program may differ by, how often it fails, and the words for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, few, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.judge import draws, honest
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds
from refcurv.judge.diagnosis import recomputed
from refcurv.judge.drawn import LITTLE, RARE, Drawing
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.foreign import read_dump
from refcurv.judge.verdict import BY_DRAWING, Cause, Comparison, Verdict
from refcurv.law.words import number_of
from refcurv.report.verdict import format_verdict, headline, layer_table
from refcurv.report.verdict_page import verdict_page

LAYERS = "blocks.0.{attn,mlp}.{q,o,up,down}"
SAMPLED = {"declared": {"fisher": "sampled"}, "arithmetic": "float64"}


def world(seed):
    """A small model, its labels from nearly free to nearly certain, and a corpus."""
    rng = np.random.default_rng(seed)
    made = config(width=int(rng.choice([4, 8])), mlp_width=int(rng.choice([1, 5, 9])), layers=1)
    parameters = random_parameters(made, int(rng.integers(9999)))
    parameters["head.weight"] = parameters["head.weight"] * (0.25, 1, 3, 8)[seed % 4]
    return rc.Model(made, parameters), rc.Corpus(rng.integers(0, made.vocabulary, (12, 8)))


def in_memory(factors):
    return {name: (one.A, one.G, one.n_A) for name, one in factors.items()}


def judged(seed, fisher, draws_of_ours=1):
    model, corpus = world(seed)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=draws_of_ours)
    theirs = rc.collect(
        model, corpus, LAYERS, fisher, **({"seed": 2} if fisher == "sampled" else {})
    )
    return rc.validate(in_memory(theirs), reference, model=model, corpus=corpus, **SAMPLED)


# ------------------------------------------------------------------ how often an honest one fails


def test_honest_dumps_are_those_of_collect():
    """In law: their mean is the expected G, and one draw of all is as far from it as stated."""
    model, corpus = world(1)
    exact = rc.collect(model, corpus, LAYERS, "expected")
    drawn = rc.collect(model, corpus, LAYERS, draws=200)
    case = Case(
        read_dump(in_memory(exact)), drawn, {x: x for x in exact}, Arithmetic(), model, corpus
    )
    dumps = first(honest.series(honest.source_of(case, 1)), 400)
    for name, one in exact.items():
        each = np.stack([dump[name] for dump in dumps])
        error = drawn[name].error_G * np.sqrt(200)
        spread = np.sqrt(((each - one.G) ** 2).sum(axis=(1, 2)).mean())
        assert spread == pytest.approx(error, rel=0.25)
        assert np.linalg.norm(each.mean(axis=0) - one.G) <= 3 * error / np.sqrt(400)
    (two,) = first(honest.series(honest.source_of(case, 2)), 1)
    assert not np.array_equal(two[name], dumps[0][name])


def first(dumps, count):
    """So many dumps, one by one."""
    each = ({x: G[k] for x, G in some.items()} for some in dumps for k in range(size_of(some)))
    return list(islice(each, count))


def size_of(some):
    return len(next(iter(some.values())))


def case_of(model, corpus, **reference):
    factors = rc.collect(model, corpus, LAYERS, **reference)
    names = {name: name for name in factors}
    return Case(read_dump(in_memory(factors)), factors, names, Arithmetic(), model, corpus)


def test_dumps_that_are_kept_are_those_that_are_drawn(monkeypatch):
    """What was drawn for one dump serves the next: the same bits, whoever reads, and how far."""
    case = case_of(*world(1))
    source = honest.source_of(case, 2)
    monkeypatch.setattr(honest, "AT_ONCE", 3)
    kept, none = honest.Series(source), honest.Series(source)
    wanted = first(kept, 7)
    monkeypatch.setattr(honest, "KEPT", 0)
    monkeypatch.setattr(honest, "_drawn", with_count(honest._drawn, drawn := []))
    readers = [iter(kept), iter(kept), iter(none)]
    for number in range(3):
        for one in readers:
            some = next(one)
            for k in range(min(3, 7 - 3 * number)):
                assert all(np.array_equal(some[x][k], G) for x, G in wanted[3 * number + k].items())
    assert drawn == [0], "the second series alone drew anew"
    behind, anew = next(readers[0]), next(readers[2])
    assert drawn == [0, 3] and all(np.array_equal(behind[x], G) for x, G in anew.items())


def test_a_dump_of_several_shards_is_a_collection():
    """What goes forward is kept between passes over one shard, and never taken for another's."""
    model, _ = world(1)
    tokens = np.random.default_rng(1).integers(0, model.config.vocabulary, (600, 8))
    case = case_of(model, rc.Corpus(tokens), seed=honest.SEED)
    (dump,) = first(honest.series(honest.source_of(case, 1)), 1)
    for name, G in dump.items():
        assert np.linalg.norm(G - case.ours(name).G) <= 1e-13 * np.linalg.norm(G)


def with_count(draw, begun):
    def counted(source, begin):
        begun.append(begin)
        return draw(source, begin)

    return counted


def test_dumps_are_those_of_their_model_corpus_and_choices():
    """Whatever changes one of them changes the key by which dumps are found again."""
    model, corpus = world(1)
    case, changed = case_of(model, corpus), dict(model.parameters)
    changed["head.weight"] = changed["head.weight"] * (1 + 1e-12)
    other = rc.Corpus(corpus.tokens, labels=np.where(corpus.label >= 0, corpus.label[:, ::-1], -1))
    signed = replace(case, dump=replace(case.dump, declared={"fisher": "signed"}))
    cases = [
        case,
        case_of(rc.Model(model.config, changed), corpus),
        case_of(model, rc.Corpus(corpus.tokens[::-1])),
        case_of(model, other),
        case_of(model, corpus, rows="all"),
        replace(case, matched={"blocks.0.mlp.up": "blocks.0.mlp.up"}),
        signed,
    ]
    told = [honest.source_of(one, 1).told for one in cases] + [honest.source_of(case, 2).told]
    assert len({*told}) == len(told)
    assert honest.source_of(case_of(*world(1)), 1) == honest.source_of(case, 1)


@pytest.mark.parametrize(
    ("most", "times", "limit"), [(4, 20, 12), pytest.param(19, 300, 29, marks=pytest.mark.slow)]
)
def test_an_honest_dump_fails_as_often_as_is_stated(most, times, limit, monkeypatch):
    """With `most` dumps the odds are 1/(most + 1), whatever the tails: 4 of 20, and 15 of 300.

    An honest judge exceeds the limits with odds of 1e-4 and 4e-4; one that never fails is none.
    """
    for name, value in (("FEWEST", most), ("MOST", most), ("PILOT", 8)):
        monkeypatch.setattr(draws, name, value)
    failed = 0
    for seed in range(times):
        model, corpus = world(seed)
        reference = rc.collect(model, corpus, LAYERS, seed=1)
        theirs = in_memory(rc.collect(model, corpus, LAYERS, seed=10**6 + seed))
        dump, all_64 = read_dump(theirs), Arithmetic(*["float64"] * 5)
        case = Case(dump, reference, {x: x for x in theirs}, all_64, model, corpus)
        case = draws.with_drawing(case)
        found = [draws._theirs(case, x) for x in theirs]
        drawn = [case.drawn[x] for x in theirs]
        below = {x: up.trace if up.below is None else up.below for x, up in case.drawn.items()}
        failed += any(x[0] > up.form or x[1] > up.trace for x, up in zip(found, drawn, strict=True))
        failed += any(1 - draws._factor(case, x) > below[x] for x in theirs)
    assert 0 < failed < limit, failed


def test_a_factor_is_known_from_many_honest_dumps(monkeypatch):
    """Also where the first ones show that theirs is no further than an honest one."""
    monkeypatch.setattr(draws, "CONFIRMED", 60)
    case = case_of(*world(1), seed=1)
    theirs = rc.collect(case.model, case.corpus, LAYERS, seed=2)
    dump = read_dump(in_memory(theirs))
    case = draws.with_drawing(replace(case, dump=dump, arithmetic=Arithmetic(*["float64"] * 5)))
    layers = list(theirs)
    assert len(case.known["traces"][layers[0]]) < 60
    found = draws.traces(case, layers)
    assert found.shape[0] >= 60
    for k, layer in enumerate(layers):
        every = np.stack([one[layer] for one in dumps_of(case, 80, whole=True)])
        own = np.trace(every, axis1=1, axis2=2) / np.trace(case.ours(layer).G)
        np.testing.assert_allclose(found[:, k], np.log(own)[: len(found)], atol=1e-9)


def test_rows_that_A_counts_too_are_no_draws():
    model, corpus = world(1)
    factors = rc.collect(model, corpus, LAYERS, seed=1)
    n = factors["blocks.0.mlp.up"].n_A
    for n_A, n_G, draws_of_theirs in ((n, 3 * n, 3), (2 * n, 2 * n, 1), (None, 2 * n, 2),
                                      (n // 2, n, 1), (n, None, 1)):  # fmt: skip
        layers = {x: Theirs(A=one.A, G=one.G, n_A=n_A, n_G=n_G) for x, one in factors.items()}
        case = Case(Dump("memory", layers, {}), factors, {x: x for x in layers}, Arithmetic())
        assert case.draws() == draws_of_theirs
        told = replace(case.dump, declared={"draws": "5"})
        assert replace(case, dump=told).draws() == 5


@pytest.mark.parametrize("seed", [1, 3])
def test_gold_labels_never_pass_for_drawn_ones(seed):
    """Drawing may explain all of G (seed 3: labels are nearly certain). The corpus's are named."""
    honest, gold = judged(seed, "sampled"), judged(seed, "empirical")
    assert honest.passed and not honest.causes, honest.failed
    assert not gold.passed and [one.fault for one in gold.causes] == ["B15"]
    turned = [f for f in gold.findings if f.fault == "B15"]
    assert turned and all(BY_DRAWING not in f.cause or f.error > f.budget for f in turned)
    assert all(f.error > f.budget for f in turned)


def test_gold_labels_are_named_through_rounding(monkeypatch):
    """Nearer to them than half of what any honest dump comes to, whatever rounding took of it."""
    monkeypatch.setattr(draws, "CONFIRMED", 60)
    case = case_of(*world(1), seed=1)
    gold = rc.collect(case.model, case.corpus, LAYERS, "empirical")
    Y = {name: one.G for name, one in gold.items()}
    near = [{x: draws.apart(G, Y[x]) for x, G in one.items()} for one in dumps_of(case, 80)]
    least = {x: min(one[x] for one in near) for x in Y}
    assert draws.nearer(case, Y, {x: 0.3 * far for x, far in least.items()})
    assert not draws.nearer(case, Y, {x: 0.9 * far for x, far in least.items()})
    assert not any(draws.nearer(case, Y, one) for one in near)
    exact = rc.collect(case.model, case.corpus, LAYERS, "expected")
    middle = {name: one.G for name, one in exact.items()}
    each = [{x: draws.apart(G, middle[x]) for x, G in one.items()} for one in dumps_of(case, 80)]
    assert not any(draws.nearer(case, middle, one) for one in each)


@pytest.mark.parametrize(("fisher", "named"), [("empirical", ["B15"]), ("sampled", [])])
def test_gold_labels_are_named_where_a_sample_says_nothing(fisher, named, monkeypatch):
    """Of a long corpus settings are tried on a few sequences: on the others theirs is drawn."""
    monkeypatch.setattr(recomputed, "few_positions", lambda _: 16)
    monkeypatch.setattr(draws, "WORK", 0.0)  # nor can it be told by honest dumps
    model, corpus = world(5)
    reference = rc.collect(model, corpus, LAYERS, seed=1)
    theirs = rc.collect(model, corpus, LAYERS, fisher, **({"seed": 2} if not named else {}))
    verdict = rc.validate(in_memory(theirs), reference, model=model, corpus=corpus)
    assert [one.fault for one in verdict.causes] == named
    assert not verdict.passed
    hints = {one.cause for one in verdict.failed if one.verdict == "undecided"}
    assert not any("model and corpus" in hint for hint in hints), "they are given"


def test_drawn_labels_beside_the_corpus_own_are_told():
    """The reference is of other labels; where A is off too, or theirs says whose it has, not so."""
    model, corpus = world(1)
    reference = rc.collect(model, corpus, LAYERS, "empirical")
    theirs = in_memory(rc.collect(model, corpus, LAYERS, seed=2))
    for more in ({}, {"model": model, "corpus": corpus}):
        (cause,) = rc.validate(theirs, reference, **more).causes
        assert cause.fault is None and "without --fisher empirical" in cause.sentence
        assert {*cause.layers} == {*theirs} and "A" not in cause.quantities
    verdict = rc.validate(theirs, reference, declared={"fisher": "empirical"})
    assert not verdict.passed and not verdict.causes
    broken = {x: (A + np.diag(np.arange(len(A))), G, n) for x, (A, G, n) in theirs.items()}
    texts = [one.sentence for one in rc.validate(broken, reference).causes]
    assert not any("--fisher empirical" in text for text in texts)


def dumps_of(case, count, whole=False):
    return first(honest.series(honest.source_of(case, 1)), count)[0 if whole else count // 4 * 3 :]


def test_likely_labels_prove_nothing():
    """Where labels are nearly certain, drawn ones are often the likeliest ones in every place."""
    model, corpus = world(3)
    parameters = dict(model.parameters)
    parameters["head.weight"] = parameters["head.weight"] * 8
    model = rc.Model(model.config, parameters)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=2)
    for seed in range(2, 6):
        theirs = in_memory(rc.collect(model, corpus, LAYERS, seed=seed))
        verdict = rc.validate(theirs, reference, model=model, corpus=corpus, **SAMPLED)
        assert verdict.passed and not verdict.causes, verdict.failed


def test_the_labels_of_the_reference_need_no_draws(monkeypatch):
    model, corpus = world(1)
    reference = rc.collect(model, corpus, LAYERS, seed=1)
    monkeypatch.setattr(draws, "series", lambda _: pytest.fail("labels are the same"))
    given_ = {"model": model, "corpus": corpus, **SAMPLED}
    assert rc.validate(in_memory(reference), reference, **given_).passed


@pytest.mark.slow
def test_a_factor_that_no_draw_has_fails():
    model, corpus = world(1)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=8)
    drawn = rc.collect(model, corpus, LAYERS, seed=2)
    theirs = {name: (one.A, 4 * one.G, one.n_A) for name, one in drawn.items()}
    verdict = rc.validate(theirs, reference, model=model, corpus=corpus, **SAMPLED)
    assert {f.verdict for f in verdict.failed} == {"fail"}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_too_small_by_drawing_alone(seed):
    """Few labels give twice G or more now and then, so that by |r − 1| nothing was too small."""
    of = Drawing(9.0, 4.0, 0.5, 99, 0.75).of_factor
    assert (of(3), of(1), of(0.5)) == (4, 4, 0.75) and Drawing(9, 4, 1).of_factor(0.5) == 4
    model, corpus = world(seed)
    corpus = rc.Corpus(corpus.tokens[:4])
    reference = rc.collect(model, corpus, LAYERS, seed=1)
    drawn = rc.collect(model, corpus, LAYERS, seed=2)
    for factor, fine in ((1, True), (1 / 64, False), (0, False)):
        theirs = {name: (one.A, factor * one.G, one.n_A) for name, one in drawn.items()}
        verdict = rc.validate(theirs, reference, model=model, corpus=corpus, **SAMPLED)
        assert verdict.passed == fine, (factor, verdict.failed)


# ------------------------------------------------------------------ a standard error alone


def test_nothing_passes_by_a_large_standard_error():
    """It lets other labels hide; far beyond it there is no drawing, by Markov's inequality."""
    model, corpus = world(1)
    one = rc.collect(model, corpus, LAYERS, draws=2)
    case = Case(read_dump(in_memory(one)), one, {x: x for x in one}, Arithmetic())

    def verdict(error, share, known=0):
        bounds = Bounds(case, next(iter(one)), Drawing(share, share, share, known))
        return bounds.judged("G", error, "another", drawing=share).verdict

    assert verdict(0.9 * LITTLE, LITTLE) == "pass" and verdict(1.1 * LITTLE, LITTLE) == "fail"
    assert verdict(0.1, 0.5) == verdict(0.9 * RARE / 2, 0.5) == "undecided"
    assert verdict(1.1 * RARE / 2, 0.5) == "fail"
    assert verdict(0.4, 0.5, 99) == "pass" and verdict(0.6, 0.5, 99) == "fail"
    assert verdict(1e-9, 0.5) == "equal as float32", "no other label changes so little"


def test_what_passes_as_drawn_says_that_other_labels_would():
    """A standard error alone tells the corpus's labels from drawn ones only where they differ."""
    model, corpus = world(1)
    made = rc.collect(model, corpus, LAYERS, draws=32)
    share = 0.01 / np.sqrt(32)
    known = {
        x: replace(
            one,
            error_G=share * np.linalg.norm(one.G),
            error_trace_G=share * np.trace(one.G),
        )
        for x, one in made.items()
    }
    reference, theirs = replace(made, layers=known), {}
    for name, one in made.items():
        off = 1 + 0.01 * (-1.0) ** np.arange(len(one.G))
        theirs[name] = one.A, off[:, None] * one.G * off, one.n_A
    verdict = rc.validate(theirs, reference, **SAMPLED)
    assert verdict.passed and verdict.findings[0].quantity == "labels"
    text, page = (made(verdict.to_json()) for made in (format_verdict, verdict_page))
    for seen in (text, page):
        assert "Labels of the corpus, or any others" in " ".join(seen.split())
        assert "whose labels they have is not judged" in " ".join(seen.split())
    assert text.startswith("passed: ") and " ".join(text.split()).count("Labels of the") == 1
    stated = float(verdict.findings[0].cause.partition("change it by ")[2].partition("%")[0]) / 100
    changed = max(
        np.linalg.norm(theirs[x][1] - one.G) / np.linalg.norm(one.G) for x, one in made.items()
    )
    assert changed < stated < 0.25
    same = rc.validate(in_memory(reference), reference, **SAMPLED)
    assert all(f.quantity != "labels" for f in same.findings)


def test_a_gauge_is_none_where_the_scale_is_undecided():
    model, corpus = world(1)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=2)
    other = rc.collect(model, corpus, LAYERS, seed=2)
    theirs = {name: (1e9 * one.A, one.G / 1e9, one.n_A) for name, one in other.items()}
    verdict = rc.validate(theirs, reference, **SAMPLED)
    assert {f.verdict for f in verdict.failed} == {"undecided"}, verdict.failed


def test_no_hypothesis_that_is_fitted_to_noise_turns_undecided_into_failed():
    """Without model and corpus: here a matrix of rank one takes nine tenths of it away."""
    model, corpus = world(1)
    reference = rc.collect(model, corpus, LAYERS, seed=1, draws=8)
    theirs = in_memory(rc.collect(model, corpus, LAYERS, seed=2))
    verdict = rc.validate(theirs, reference, **SAMPLED)
    assert {f.verdict for f in verdict.failed} == {"undecided"} and not verdict.causes


@pytest.mark.parametrize(("number", "seed"), [(7, 8), (11, 9), (1, 2)])
def test_a_gauge_changes_nothing_of_what_drawing_explains(number, seed):
    """The trace that is judged is that of K: here tr G is nearer than it, and hid how far K is."""
    model, corpus = world(number)
    reference = rc.collect(model, corpus, LAYERS, seed=1)
    drawn = rc.collect(model, corpus, LAYERS, seed=seed)
    theirs = {name: (4096 * one.A, one.G / 4096, one.n_A) for name, one in drawn.items()}
    verdict = rc.validate(theirs, reference, model=model, corpus=corpus, **SAMPLED)
    assert verdict.passed, verdict.failed


# ------------------------------------------------------------------ words

WORDS = ("pass", "left out", "undecided", "fail", "missing", "equal as float32")


def verdict_of(kinds, causes=(), accepted=()):
    findings = tuple(
        Comparison(f"blocks.{n}.mlp.up", "G", 0.5, 0.1, kind, None, f"seen {n}")
        for n, kind in enumerate(kinds)
    )
    return Verdict(findings, tuple(causes), (), "memory", (), {}, "", tuple(accepted))


@pytest.mark.parametrize("accepted", [(), ("float32",)], ids=["strict", "accepting"])
def test_every_mixture_of_verdicts_has_its_words(accepted):
    """Failed beats undecided, which beats passed; a count is that of the layers it is about."""
    cause = Cause("B15", "words.", "mend it.", ("blocks.0.mlp.up",), ("G",), 0.5, 0.0)
    mixtures = [c for n in (1, 2, 3) for c in combinations_with_replacement(WORDS, n)]
    for kinds in mixtures:
        for causes in ((), (cause,)):
            found = verdict_of(kinds, causes, accepted)
            data = found.to_json()
            line, page = headline(data), verdict_page(data)
            fine = {"pass", "left out", *(["equal as float32"] if accepted else [])}
            wrong = [k for k in kinds if k not in fine and k != "undecided"]
            open_ = kinds.count("undecided")
            if wrong:
                every = number_of(len(kinds), "layer")
                assert line.startswith(f"FAILED: {len(wrong)} of {every} of memory: ")
                assert ("B15" in line) == bool(causes)
                assert ("no known cause" in line) == (not causes and "fail" in kinds)
                assert (f"{open_} more undecided" in line) == bool(open_)
                assert "nothing is known" not in line.lower()
            elif open_:
                every = number_of(len(kinds), "layer")
                assert line.startswith(f"UNDECIDED: {open_} of {every} of memory")
                assert "FAILED" not in line and "No known fault" not in page
            elif set(kinds) == {"left out"}:
                assert line.startswith("nothing was compared")
            else:
                assert line.startswith("passed: ")
            assert found.passed == line.startswith("passed: ")
            assert " ".join(format_verdict(data).split()).startswith(line)
            table = dict(zip((r[0] for r in layer_table(data).rows), kinds, strict=True))
            for row in layer_table(data).rows:
                assert row[-1] == ("pass" if table[row[0]] == "left out" else table[row[0]])


@few(25)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_the_worst_word_of_a_layer_is_its_word(kinds):
    one = tuple(Comparison("a", f"q{n}", 0.5, 0.1, kind) for n, kind in enumerate(kinds))
    (row,) = layer_table(Verdict(one, program="memory").to_json()).rows
    order = ("fail", "missing", "equal as float32", "undecided")
    assert row[-1] == next((word for word in order if word in kinds), "pass")


def test_undecided_is_no_failure_in_words_and_no_success_in_status(tmp_path, capsys):
    """Exit status 1: nobody may take it for a pass."""
    model, corpus = world(1)
    for seed, name in ((1, "ours"), (2, "theirs")):
        rc.save_factors(rc.collect(model, corpus, LAYERS, seed=seed), tmp_path / f"{name}.h5")
    status = main(
        ["validate", str(tmp_path / "theirs.h5"), "--reference", str(tmp_path / "ours.h5")]
    )
    assert status == 1
    text = capsys.readouterr().out
    assert text.startswith("UNDECIDED: 4 of 4 layers") and "FAILED" not in text
    assert "give model and corpus" in " ".join(text.split())
