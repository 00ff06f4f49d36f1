"""`validate`: the truth passes, whatever its arithmetic; what differs is measured and said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic, moment_budget, parse
from refcurv.judge.case import Case
from refcurv.judge.compare import drawing, measure
from refcurv.judge.foreign import read_dump
from refcurv.judge.verdict import Comparison, Verdict


@pytest.fixture(scope="module")
def setting():
    """A model, a corpus and its factors, without drawing."""
    made = config()
    model = rc.Model(made, random_parameters(made, 3))
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (12, 9))
    corpus = rc.Corpus(tokens)
    return model, corpus, rc.collect(model, corpus, "blocks.*.mlp.*", "expected")


def in_memory(factors, change=lambda A, G, n: (A, G, n)):
    return {name: change(one.A, one.G, one.n_A) for name, one in factors.items()}


def test_the_truth_passes(setting):
    _, _, factors = setting
    for theirs in (factors, in_memory(factors)):
        verdict = rc.validate(theirs, factors)
        assert verdict.passed and len(verdict.findings) >= 8 * len(factors)


@pytest.mark.parametrize("side", ["A", "G"])
def test_a_factor_is_measured_and_fails(setting, side):
    _, _, factors = setting
    at = "AG".index(side)

    def twice(A, G, n):
        both = [A, G]
        both[at] = 2 * both[at]
        return (*both, n)

    verdict = rc.validate(in_memory(factors, twice), factors)
    bad = {f.quantity for f in verdict.failed}
    assert not verdict.passed
    assert bad >= {"tr A · tr G", side}, "the form agrees, the scale does not"
    assert f"{side}/tr {side}" not in bad
    assert all("times 2" in f.cause for f in verdict.failed if f.quantity == "tr A · tr G")


def test_the_gauge_is_no_fault(setting):
    _, _, factors = setting
    verdict = rc.validate(in_memory(factors, lambda A, G, n: (3 * A, G / 3, n)), factors)
    assert verdict.passed
    assert {f.fault for f in verdict.findings} == {None, "B8"}


def test_distances_are_what_numpy_says():
    rng = np.random.default_rng(1)
    X, Y = (a @ a.T for a in rng.normal(size=(2, 5, 7)))
    one = measure(Y, X, 14, 7)
    assert one.ratio == pytest.approx(np.trace(Y) / np.trace(X), rel=1e-14)
    form = Y / np.trace(Y) - X / np.trace(X)
    size = np.linalg.norm(X / np.trace(X))
    assert one.form == pytest.approx(np.linalg.norm(form) / size, rel=1e-13)
    assert one.whole == pytest.approx(np.linalg.norm(Y - X) / np.linalg.norm(X), rel=1e-14)
    assert one.rows == 2


def test_A_tells_its_dtype_where_labels_differ():
    """G is of other labels, and nothing says how much these change: A is still float32's."""
    made = config(width=8, mlp_width=9, layers=1)
    parameters = random_parameters(made, 0)
    short = {name: x.astype(np.float32) for name, x in parameters.items()}
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, made.vocabulary, (400, 12)))
    theirs = rc.collect(rc.Model(made, short, "float32"), corpus, "**.up", "empirical")
    ours = rc.collect(rc.Model(made, parameters), corpus, "**.up")
    turned = {name: (one.A, one.G[::-1, ::-1], one.n_A) for name, one in theirs.items()}
    found = rc.validate(turned, ours).findings
    assert {f.verdict for f in found if f.quantity in ("A", "A/tr A")} == {"equal as float32"}
    assert {f.verdict for f in found if f.quantity == "G"} <= {"undecided", "fail"}


def test_an_undeclared_dtype_is_no_pass(setting):
    model, corpus, factors = setting
    short = rc.collect(
        rc.Model(
            model.config,
            {k: v.astype(np.float32) for k, v in model.parameters.items()},
            "float32",
        ),
        corpus,
        "blocks.*.mlp.*",
        "expected",
    )
    theirs = in_memory(short)
    verdict = rc.validate(theirs, factors)
    assert not verdict.passed
    assert {f.verdict for f in verdict.failed} == {"equal as float32"}
    assert rc.validate(theirs, factors, accept=["float32"]).passed
    assert rc.validate(theirs, factors, arithmetic="float32").passed
    assert not rc.validate(theirs, factors, arithmetic="float64", accept=["float32"]).passed


def test_another_draw_is_told_from_another_matrix(setting):
    model, corpus, _ = setting
    factors = rc.collect(model, corpus, "blocks.*.mlp.*", draws=8)
    other = rc.collect(model, corpus, "blocks.*.mlp.*", seed=1)
    assert rc.validate(other, factors, model=model, corpus=corpus).passed
    found = rc.validate(other, factors)  # by a standard error, which lets gold labels hide
    assert {f.verdict for f in found.failed} == {"undecided"} and not found.causes
    alone = rc.collect(model, corpus, "blocks.*.mlp.*")
    verdict = rc.validate(other, alone)
    assert {f.verdict for f in verdict.failed} == {"undecided"}
    assert rc.validate(other, alone, model=model, corpus=corpus).passed


def test_a_budget_is_the_sum_of_its_parts():
    u = ROUNDOFF["float32"]
    all_32 = Arithmetic().filled("float32")
    sums = 8 * np.sqrt(100 / 3)
    assert moment_budget(all_32, 100) == pytest.approx(u * (4 + 2.4 + 2 + sums + 1), rel=1e-6)
    assert moment_budget(all_32, 100, 50) == pytest.approx(u * (4 + 60 + 2 + sums + 1), rel=1e-4)
    assert moment_budget(all_32, 10**9) == pytest.approx(u * (7 + 8 * np.sqrt(2**16 / 3)), rel=1e-4)
    assert moment_budget(all_32, 0) == moment_budget(all_32, 1)
    mixed = parse("judge", "model=bfloat16, sums=float32").filled("float64")
    assert mixed == Arithmetic("bfloat16", "float64", "float32", "float64", "float64")
    assert Arithmetic().filled("bfloat16").sums == "float32"
    for text in ("float31", "size=float32", "sums=float32,sums=float64", "float32,sums=float64"):
        with pytest.raises(rc.RefcurvError):
            parse("judge", text)


def test_a_roundoff_is_half_the_spacing_at_one():
    digits = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}
    assert dict(ROUNDOFF) == {name: 2.0**-p for name, p in digits.items()}
    assert list(ROUNDOFF.values()) == sorted(ROUNDOFF.values())


MEASURED = {
    "float32": (1e-7, 4e-7),
    "tf32": (1e-4, 3e-4),
    "float16": (3e-4, 1.4e-3),
    "bfloat16": (2.5e-3, 5e-3),
}
"""Relative errors of A and G on an accelerator, least and largest, of 100,800 rows."""

BUDGETS = {"float32": 7.1e-5, "tf32": 3.0e-3, "float16": 3.0e-3, "bfloat16": 2.4e-2}


def test_budgets_stand_between_measured_errors():
    """A declared dtype covers its own errors; declared float32 covers none of the others."""
    for dtype, (_, largest) in MEASURED.items():
        budget = moment_budget(Arithmetic(stored="float32").filled(dtype), 100_800)
        assert budget == pytest.approx(BUDGETS[dtype], rel=0.05)
        assert largest < budget / 2
    for rows in (100, 100_800, 10**8):
        budget = moment_budget(Arithmetic().filled("float32"), rows)
        assert all(budget < MEASURED[d][0] for d in ("tf32", "float16", "bfloat16"))


@pytest.mark.parametrize("block", [1, 32, 4096])
def test_a_sum_errs_by_less_than_its_budget(block):
    """Rows of float32 added one after another, in blocks or alone: 1 to 15 % of the budget."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4096, 6)).astype(np.float32) + np.float32(0.5)
    total = np.zeros((6, 6), np.float32)
    for part in np.split(X, len(X) // block):
        products = part[:, :, None] * part[:, None, :]
        total += np.add.accumulate(products, axis=0, dtype=np.float32)[-1]
    true = X.astype(float).T @ X.astype(float)
    budget = moment_budget(Arithmetic("float64", "float64", "float32", "float64", "float64"), 4096)
    assert np.linalg.norm(total - true) / np.linalg.norm(true) < budget


def test_who_accepts_a_dtype_accepts_finer_ones():
    """Layers of one bfloat16 run differ: some errors have the size of float32."""
    found = [Comparison("x", "A", 1e-5, 1e-4, "equal as float32")]
    assert Verdict(tuple(found), accepted=("bfloat16",)).passed
    assert not Verdict(tuple(found), accepted=("float64",)).passed
    assert not Verdict((*found, replace(found[0], verdict="fail")), accepted=("bfloat16",)).passed


def test_what_is_declared_goes_before_what_the_file_says():
    one = Arithmetic(model="float32").or_else(Arithmetic(model="bfloat16", sums="float64"))
    assert one == Arithmetic(model="float32", sums="float64")


def test_the_rounding_of_g_widens_the_budget_of_g_alone(setting):
    _, _, factors = setting
    name = next(iter(factors))
    noisy = replace(factors[name], rounding_G=1e-6 * float(factors[name].sum_G.trace()))
    theirs = in_memory({name: noisy}, lambda A, G, n: (A * (1 + 1e-5), G, n))
    found = rc.validate(
        theirs, rc.Factors({name: noisy}, "expected", "reached", 0, 1, "float64", 9)
    )
    by = {f.quantity: f for f in found.findings}
    assert by["G"].budget > 1e-4 and by["A"].budget < 1e-13
    assert by["A"].verdict != "pass"


def test_drawing_is_known_by_hand(setting):
    """Standard errors of eight draws make √8 times as much of one; both sides draw."""
    _, _, factors = setting
    name = next(iter(factors))
    size, trace = np.linalg.norm(factors[name].G), np.trace(factors[name].G)
    one = replace(factors[name], error_G=0.01 * size, error_trace_G=0.02 * trace)
    truth = rc.Factors({name: one}, "sampled", "reached", 0, 8, "float64", 96)
    case = Case(read_dump(in_memory({name: one})), truth, {name: name}, Arithmetic())
    found = drawing(case, name, one.n_A)
    assert one.n_A < 2 * 96, "one shard: Student's t of 7 degrees of freedom, by a table"
    root = 8.466925 * np.sqrt(8) * np.sqrt(1 / 8 + 1)
    assert (found.norm, found.trace) == (pytest.approx(0.01 * root), pytest.approx(0.02 * root))
    theirs = in_memory({name: one}, lambda A, G, n: (A + np.diag(np.diag(A)) / 10, G, n))
    by = {f.quantity: f for f in rc.validate(theirs, truth, arithmetic="float64").findings}
    assert by["A/tr A"].verdict == "fail", "no drawing explains A"


def test_scales_that_cancel_are_no_excuse_for_another_form(setting):
    _, _, factors = setting

    def change(A, G, n):
        return A, np.diag(np.diag(G)), n + 1

    said = {"arithmetic": "float64", "declared": {"fisher": "expected"}}
    found = rc.validate(in_memory(factors, change), factors, **said).findings
    seen = [(f.quantity, f.verdict) for f in found if f.quantity in ("G", "n_A", "n_G")]
    assert {verdict for _, verdict in seen} == {"fail"}, seen
