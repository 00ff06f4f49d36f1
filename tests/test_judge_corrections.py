"""Λ of others: the truth passes in any basis, each fault of Λ is named, and a reference alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import ekfac
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.part import part_of

FOREIGN = Path(__file__).parent / "data/foreign"
SQUARE = "blocks.0.attn.o"
LAYERS = ("blocks.0.mlp.up", "blocks.0.attn.v", "blocks.1.mlp.down")
EMPIRICAL = {"fisher": "empirical"}
SEQUENCE = {**EMPIRICAL, "Lambda": "sequence"}


@pytest.fixture(scope="module")
def setting():
    """A model with biases, a corpus of sequences of two lengths, and empirical factors."""
    made = config(biases=("up", "v"))
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (6, 9))
    mask = np.ones((6, 9), np.uint8)
    mask[::2, 7:] = 0
    corpus = rc.Corpus(tokens, mask=mask)
    return model, corpus, rc.collect(model, corpus, ",".join(LAYERS), "empirical")


def bases_of(factors, bias="separate"):
    """Their eigenvectors: upside down, and with other signs."""
    ours = rc.decompose(factors, bias)

    def turned(one):
        signs = [np.where(np.arange(len(x)) % 2, -1.0, 1.0) for x in (one.mu, one.lam)]
        U_A, U_G = one.U_A[:, ::-1] * signs[0], one.U_G[:, ::-1] * signs[1]
        return Eigenbasis(U_A, one.mu[::-1], U_G, one.lam[::-1])

    return Bases({name: turned(one) for name, one in ours.items()}, bias=ours.bias)


def lambdas(model, corpus, bases, fisher="empirical", per="sequence", seed=0):
    found = ekfac(model, corpus, bases, fisher, seed, per=per)
    return {name: one.Lambda / one.rows for name, one in found.items()}


def dump_of(factors, bases, Lambda, joint=False):
    return {
        name: {
            **{"A": one.A_joint if joint else one.A, "G": one.G, "n": one.n_A},
            **{"U_A": bases[name].U_A, "mu": bases[name].mu},
            **{"U_G": bases[name].U_G, "lam": bases[name].lam, "Lambda": Lambda[name]},
        }
        for name, one in factors.items()
    }


def judged(setting, Lambda, declared=SEQUENCE, bases=None, **options):
    model, corpus, factors = setting
    theirs = dump_of(factors, bases or bases_of(factors), Lambda)
    options = {"model": model, "corpus": corpus, "arithmetic": "float64", **options}
    return rc.validate(theirs, factors, declared=declared, **options)


def of_lambda(verdict):
    return [one for one in verdict.findings if "Lambda" in one.quantity]


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("joint", [False, True])
def test_the_true_lambda_passes(setting, per, joint):
    model, corpus, factors = setting
    bases = bases_of(factors, "joint" if joint else "separate")
    theirs = dump_of(factors, bases, lambdas(model, corpus, bases, per=per), joint)
    for declared in (EMPIRICAL, {**EMPIRICAL, "Lambda": per}):
        verdict = rc.validate(theirs, factors, model=model, corpus=corpus, declared=declared)
        assert verdict.passed, verdict.failed
        found = of_lambda(verdict)
        assert len(found) == 2 * len(LAYERS) and all(per in one.cause for one in found)
        for form, whole in zip(found[::2], found[1::2], strict=True):
            assert whole.budget == pytest.approx(2 * form.budget, rel=1e-9, abs=0)


def test_over_sequences_is_right_where_it_is_declared(setting):
    model, corpus, factors = setting
    found = ekfac(model, corpus, bases_of(factors), "empirical", per="sequence")
    theirs = {name: one.Lambda / one.segments for name, one in found.items()}
    assert judged(setting, theirs, {**SEQUENCE, "Lambda_over": "sequences"}).passed
    verdict = judged(setting, theirs, {**SEQUENCE, "Lambda_over": "unknown"})
    assert verdict.passed and "does not tell its scale" in of_lambda(verdict)[1].cause
    assert [one.fault for one in judged(setting, theirs).causes] == ["B10"]


def in_batches(setting, size, joint=False):
    """The gradients of so many sequences are summed, then squared."""
    model, corpus, factors = setting
    bases = bases_of(factors, "joint" if joint else "separate")
    rows = next(iter(factors.values())).n_A
    out = dict.fromkeys(factors, 0.0)
    for at in range(0, 6, size):
        part = part_of(corpus, slice(at, at + size))
        _, gradient = loss_and_gradient(
            model.config, model.parameters, part.tokens, part.label, layout(model, part)
        )
        for name in factors:
            D = gradient[f"{name}.weight"]
            if joint and f"{name}.bias" in gradient:
                D = np.column_stack([D, gradient[f"{name}.bias"]])
            D = bases[name].U_G.T @ D @ bases[name].U_A
            out[name] = out[name] + D**2 / rows
    return out


def layout(model, corpus):
    from refcurv.model.transformer import layout_of

    return layout_of(model.config, corpus.real, corpus.segment)


def of(setting, corpus=None, **choices):
    model, own, factors = setting
    return lambdas(model, corpus or own, bases_of(factors), **choices)


def other_tokens(setting):
    model, corpus, _ = setting
    tokens = np.random.default_rng(9).integers(0, model.config.vocabulary, corpus.tokens.shape)
    return rc.Corpus(tokens)


FAULTS = {
    "over sequences": ("B10", lambda s: scaled(s, 42 / 6)),
    "a sum": ("B10", lambda s: scaled(s, 42)),
    "nearly over sequences": (None, lambda s: scaled(s, 42 / 6 * 0.9)),
    "per token": ("B75", lambda s: of(s, per="token")),
    "batches of three": ("B75", lambda s: in_batches(s, 3)),
    "one batch": ("B75", lambda s: in_batches(s, 6)),
    "sampled labels": ("B76", lambda s: of(s, fisher="sampled", seed=50)),
    "two sequences": ("B76", lambda s: of(s, part_of(s[1], slice(1, 3)))),
    "other tokens": ("B76", lambda s: of(s, other_tokens(s))),
    "bfloat16": ("B77", lambda s: {k: bfloat16(L) for k, L in of(s).items()}),
    "upside down": (None, lambda s: {k: L[::-1, ::-1] for k, L in of(s).items()}),
}


def scaled(setting, factor):
    return {name: factor * L for name, L in of(setting).items()}


def bfloat16(L):
    return from_bfloat16(to_bfloat16(L.astype("f4"))).astype(float)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_lambda_has_its_name(setting, name):
    """One that no known fault makes has none."""
    fault, plant = FAULTS[name]
    assert setting[2][LAYERS[0]].n_A == 42
    verdict = judged(setting, plant(setting))
    assert not verdict.passed
    assert {one.quantity for one in verdict.failed} <= {"form of Lambda", "Lambda"}
    assert {one.fault for one in verdict.failed} == {fault}, verdict.failed
    assert {one.layer for one in verdict.failed} == set(LAYERS)
    assert [one.fault for one in verdict.causes] == ([fault] if fault else [])


def test_an_order_that_the_eigenvectors_do_not_have_is_said(setting):
    """A basis was sorted anew, and Λ was not, whatever its scale: it is of no other data."""
    turned = {k: 42 * np.roll(L, 1, axis=0)[:, np.sin(range(len(L.T))).argsort()]
              for k, L in of(setting).items()}  # fmt: skip
    failed = [one for one in judged(setting, turned).failed if one.quantity == "form of Lambda"]
    assert {one.layer for one in failed} == set(LAYERS)
    for one in failed:
        assert one.fault is None
        assert "its rows or columns in another order than the eigenvectors" in one.cause


def test_a_batch_is_counted_and_a_part_is_listed(setting):
    said = judged(setting, in_batches(setting, 3)).failed[0].cause
    assert "of 3 sequences at a time" in said
    said = judged(setting, of(setting, part_of(setting[1], slice(1, 3)))).failed[0].cause
    assert "2 of 6 sequences alone (1, 2)" in said


def test_batches_of_weight_and_bias_are_found_too(setting):
    model, corpus, factors = setting
    theirs = dump_of(factors, bases_of(factors, "joint"), in_batches(setting, 2, True), True)
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, declared=SEQUENCE)
    assert {(one.fault, "of 2 sequences at a time" in one.cause) for one in verdict.failed} == {
        ("B75", True)
    }


def test_short_lambda_that_nobody_declared_is_no_pass(setting):
    theirs = {name: bfloat16(L) for name, L in of(setting).items()}
    verdict = judged(setting, theirs, arithmetic="")
    assert {one.verdict for one in verdict.failed} == {"equal as bfloat16"}
    assert {one.fault for one in verdict.failed} == {"B77"}


def test_lambda_of_a_square_layer_may_lie_the_other_way_round(setting):
    model, corpus, _ = setting
    factors = rc.collect(model, corpus, SQUARE, "empirical")
    own = model, corpus, factors
    turned = {name: L.T for name, L in lambdas(model, corpus, bases_of(factors)).items()}
    assert {one.fault for one in judged(own, turned).failed} == {"B78"}


def test_eigenvectors_in_rows_are_not_held_against_lambda(setting):
    """Λ and what it is made of are right; only the vectors are stored as rows (B64)."""
    model, corpus, factors = setting
    bases = bases_of(factors)
    theirs = dump_of(factors, bases, in_batches(setting, 3))
    for one in theirs.values():
        one["U_A"], one["U_G"] = one["U_A"].T, one["U_G"].T
    given = {"model": model, "corpus": corpus, "declared": SEQUENCE, "arithmetic": "float64"}
    verdict = rc.validate(theirs, factors, **given)
    assert {one.fault for one in verdict.causes} == {"B64", "B75"}
    for name, L in of(setting).items():
        theirs[name]["Lambda"] = L
    assert [one.fault for one in rc.validate(theirs, factors, **given).causes] == ["B64"]


def test_a_factor_that_a_and_g_share_is_no_fault_of_lambda(setting):
    model, corpus, factors = setting
    theirs = dump_of(factors, bases_of(factors), scaled(setting, 4.0))
    for one in theirs.values():
        one["G"], one["lam"] = 4 * one["G"], 4 * one["lam"]
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, declared=SEQUENCE)
    found = [one for one in verdict.failed if one.quantity == "Lambda"]
    assert len(found) == 3 and all("no fault of Λ's own" in one.cause for one in found)
    assert "B10" not in {one.fault for one in verdict.causes}


@pytest.mark.slow
def test_drawn_labels_are_compared_statistically_and_exactly_where_known(setting):
    model, corpus, _ = setting
    drawn = rc.collect(model, corpus, ",".join(LAYERS), "sampled", seed=5, draws=1)
    bases = bases_of(drawn)
    theirs = dump_of(drawn, bases, lambdas(model, corpus, bases, "sampled", seed=5))
    ours = rc.collect(model, corpus, ",".join(LAYERS), "sampled", draws=8)
    given = {"model": model, "corpus": corpus, "declared": {"fisher": "sampled"}}
    verdict = rc.validate(theirs, ours, **given)
    found = of_lambda(verdict)
    assert all(one.verdict == "pass" and "drawing" in one.cause for one in found), found
    gold = dump_of(drawn, bases, lambdas(model, corpus, bases))
    found = of_lambda(rc.validate(gold, ours, **given))
    assert {one.fault for one in found} == {"B76"} and "labels of the corpus" in found[0].cause
    for one in gold.values():
        one["Lambda"] = one["Lambda"] * (1 + 1e-3 * np.cos(np.arange(one["Lambda"].size))).reshape(
            one["Lambda"].shape
        )
    found = of_lambda(rc.validate(gold, ours, **given))
    assert not any("labels of the corpus" in one.cause for one in found), "not to all digits"
    wrong = {k: {**one, "Lambda": 20 * one["Lambda"]} for k, one in theirs.items()}
    scales = of_lambda(rc.validate(wrong, ours, **given))[1::2]
    assert len(scales) == 3 and not any(one.verdict == "pass" for one in scales)


def test_labels_that_are_known_leave_no_drawing(setting):
    model, corpus, _ = setting
    layers = ",".join(LAYERS)
    labels = rc.trace(model, corpus, range(len(corpus.label)), "sampled", 5).tensors["labels"]
    known = rc.Corpus(corpus.tokens, labels, corpus.mask)
    theirs = rc.collect(model, known, layers, "empirical")
    bases = bases_of(theirs)
    dump = dump_of(theirs, bases, lambdas(model, known, bases))
    given = {"model": model, "corpus": corpus, "layers": layers, "arithmetic": "float64"}
    given["declared"] = {"fisher": "sampled", "Lambda": "sequence"}
    assert rc.validate(dump, labels=labels, **given).passed
    for one in dump.values():
        one["Lambda"] = one["Lambda"] * (1 + 1e-6)
    failed = rc.validate(dump, labels=labels, **given).failed
    assert [one.quantity for one in failed] == ["Lambda"] * 3


def test_a_reference_alone_does_not_tell_lambda(setting):
    verdict = judged(setting, of(setting), model=None, corpus=None)
    assert verdict.passed
    found = of_lambda(verdict)
    assert {one.verdict for one in found} == {"left out"}
    assert all("which need not be 1" in one.cause for one in found)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda one: one.update(Lambda=one["Lambda"].T), "Λ is "),
        (lambda one: one.update(Lambda=-one["Lambda"]), "below 0"),
        (lambda one: one.update(Lambda=0 * one["Lambda"]), "every entry of Λ is 0"),
        (lambda one: one.update(Lambda=one["Lambda"] * np.nan), "not finite"),
    ],
)
def test_what_is_no_lambda_fails(setting, change, text):
    model, corpus, factors = setting
    theirs = dump_of(factors, bases_of(factors), of(setting))
    for one in theirs.values():
        change(one)
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, declared=SEQUENCE)
    found = of_lambda(verdict)
    assert len(found) == 3 and all(f.verdict == "fail" and text in f.cause for f in found)


def test_documents_of_a_packed_corpus_are_segments(setting):
    model, corpus, _ = setting
    segments = np.zeros((6, 9), np.int32)
    segments[:, 5:] = 1
    packed = rc.Corpus(corpus.tokens, segments=segments)
    factors = rc.collect(model, packed, "blocks.0.attn.v,head", "empirical")
    own = model, packed, factors
    bases = bases_of(factors)
    assert judged(own, lambdas(model, packed, bases)).passed
    failed = judged(own, in_batches(own, 1)).failed
    assert {(one.fault, "of whole sequences, not documents" in one.cause) for one in failed} == {
        ("B75", True)
    }


def test_a_table_has_neither_basis_nor_lambda(setting):
    model, corpus, _ = setting
    factors = rc.collect(model, corpus, f"embed,{LAYERS[0]}", "empirical")
    one, size = factors["embed"], {"U_A": np.eye(7), "U_G": np.eye(8), "Lambda": np.ones((8, 7))}
    theirs = {"embed": {"A": one.A, "G": one.G, "n": one.n_A, **size}}
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, layers="embed")
    assert verdict.passed
    left = {f.quantity for f in verdict.findings if f.verdict == "left out"}
    assert left == {"basis of A", "Lambda"}


def test_without_eigenvectors_lambda_is_left_out(setting):
    model, corpus, factors = setting
    theirs = dump_of(factors, bases_of(factors), of(setting))
    for one in theirs.values():
        del one["U_A"], one["mu"]
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, declared=SEQUENCE)
    assert {one.verdict for one in of_lambda(verdict)} == {"left out"}


@pytest.mark.parametrize(("program", "rows"), [("bergson", "reached"), ("kronfluence", "all")])
def test_real_files_pass(program, rows):
    model, corpus = rc.load(FOREIGN / "w.h5", dtype="float64"), rc.load_corpus(FOREIGN / "c.h5")
    ours = rc.collect(model, corpus, "blocks.*.{attn,mlp}.*", "empirical", rows=rows)
    verdict = rc.validate(
        FOREIGN / program, ours, model=model, corpus=corpus, arithmetic="float32",
        declared={"fisher": "empirical", "rows": rows},
    )  # fmt: skip
    assert verdict.passed, verdict.failed
    assert len(of_lambda(verdict)) == 28
