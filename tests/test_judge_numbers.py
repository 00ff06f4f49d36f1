"""Numbers at the ends of their range, zeros and nonsense: a verdict, and no NaN in what is read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.judge.compare import measure
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.verdict import Comparison, Verdict
from refcurv.report.verdict import format_verdict
from refcurv.report.verdict_page import verdict_page

LAYER = "blocks.0.mlp.up"
RNG = np.random.default_rng(0)
P, Q = (x @ x.T for x in (RNG.normal(size=(8, 9)), RNG.normal(size=(5, 6))))
ZERO = 0 * Q


def reference(A, G):
    one = rc.Factor(10 * np.asarray(A), 10, 10 * np.asarray(G), 10, 0.0, 0.0)
    return rc.Factors({LAYER: one}, "expected", "reached", 0, 1, "float64", 96)


def judged(A, G, theirs, draw=False, **said):
    """The verdict, once its text, JSON and page were seen to hold no NaN."""
    said = {"declared": {"fisher": "expected"}} | said
    verdict = rc.validate(theirs, reference(A, G), pictures=1, **said)
    for one in verdict.findings:
        assert one.error is None or not math.isnan(one.error), one
        assert one.budget is None or math.isfinite(one.budget), one
        assert type(one.error) in (float, type(None))
    data = verdict.to_json()
    page = verdict_page(data if draw else data | {"pictures": []})
    text = format_verdict(data) + page + json.dumps(data["findings"], allow_nan=False)
    assert " nan" not in text and ">nan" not in text
    return {f.quantity: f for f in verdict.findings}, verdict


SAME = {
    "as they are": (P, Q),
    "G is 0": (P, ZERO),
    "A is 0": (0 * P, Q),
    "both are 0": (0 * P, ZERO),
    "one by one": (P[:1, :1], Q[:1, :1]),
    "huge and tiny": (P * 1e200, Q * 1e-200),
    "tiny": (P * 1e-300, Q * 1e-300),
    "huge": (P * 1e300, Q * 1e300),
    "integers": (np.array([[2, 1], [1, 3]]), np.array([[2]])),
    "a table": (np.arange(1.0, 5), Q),
    "rank one": (np.ones((3, 3)), np.ones((2, 2))),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_factors_pass_at_any_size(name):
    A, G = SAME[name]
    assert judged(A, G, {LAYER: (A, G, 10)})[1].passed
    c = 4
    assert judged(A, G, {LAYER: (A * c, G / c, 10)})[1].passed, "another gauge is no difference"


DIFFERENT = {
    "ours is 0": (P, ZERO, P, Q),
    "theirs is 0": (P, Q, P, ZERO),
    "theirs is tiny, ours 0": (P, ZERO, P, Q * 1e-40),
    "negative": (P, Q, -P, -Q),
    "no trace": (P[:2, :2], Q, np.array([[0.0, 1], [1, 0]]), Q),
    "one huge entry": (P, Q, np.where(P == P.max(), 1e308, P), Q),
    "all huge": (P, Q, np.full_like(P, 1.7e308), Q),
    "NaN": (P, Q, P * np.nan, Q),
    "infinite": (P, Q, P, np.where(np.eye(5) > 0, np.inf, Q)),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("fisher", ["expected", "sampled"])
def test_what_differs_fails_whatever_its_size(name, fisher):
    A, G, theirs_A, theirs_G = DIFFERENT[name]
    said = {"declared": {"fisher": fisher}}
    draw = (name, fisher) == ("all huge", "expected")
    found, verdict = judged(A, G, {LAYER: (theirs_A, theirs_G, 10)}, draw, **said)
    bad = [f for f in verdict.findings if f.verdict == "fail"]
    assert bad and not verdict.passed
    if name == "negative":
        assert "times no number" in found["tr A · tr G"].cause


def test_zeros_are_measured():
    assert measure(ZERO, ZERO, None, 1).form == 0 and measure(ZERO, ZERO, None, 1).ratio == 1
    one = measure(ZERO, Q, None, 1)
    assert (one.form, one.ratio, one.whole) == (1, 0, 1)
    one = measure(Q, ZERO, None, 1)
    assert (one.form, one.whole) == (math.inf, math.inf) and math.isnan(one.ratio)


def of(monkeypatch, **parts):
    monkeypatch.setattr("refcurv.judge.judgement.read_dump", lambda theirs: theirs)
    return Dump("test", {LAYER: Theirs(**parts)}, {LAYER: frozenset(parts)})


def basis(M):
    values, U = np.linalg.eigh(M)
    return U[:, ::-1], values[::-1]


@pytest.mark.parametrize("name", [n for n in SAME if n not in ("a table", "integers")])
def test_bases_pass_at_any_size(monkeypatch, name):
    A, G = SAME[name]
    (U_A, mu), (U_G, lam) = basis(A), basis(G)
    for parts in ({"mu": mu, "lam": lam}, {}):
        found, verdict = judged(A, G, of(monkeypatch, U_A=U_A, U_G=U_G, **parts))
        assert verdict.passed and "basis of A" in found and "basis of G" in found
    mask = np.ones((len(G), len(A)), dtype=bool)
    mask[-1, -1] = mask.size == 1
    if not (A.any() and G.any()):
        with pytest.raises(rc.RefcurvError, match=r"nothing could be compared.*no curvature"):
            judged(A, G, of(monkeypatch, mask=mask))
    elif mask.size > 1:
        assert "mask" in judged(A, G, of(monkeypatch, mask=mask))[0]


BAD_BASES = {
    "zero vectors": ({"U_A": basis(P)[0] * 0, "mu": basis(P)[1]}, "orthogonality of U_A"),
    "zero values": ({"U_A": basis(P)[0], "mu": basis(P)[1] * 0}, "basis of A"),
    "huge vectors": ({"U_A": basis(P)[0] * 1e200, "mu": basis(P)[1]}, "orthogonality of U_A"),
    "huge values": ({"U_A": basis(P)[0], "mu": np.full(8, 1.7e308)}, "basis of A"),
    "infinite": ({"U_A": basis(P)[0], "mu": basis(P)[1] * np.inf}, "basis of A"),
    "few values": ({"U_A": basis(P)[0], "mu": basis(P)[1][:2]}, "basis of A"),
    "a vector": ({"U_A": basis(P)[0][0], "mu": basis(P)[1]}, "basis of A"),
    "not of G": ({"U_G": np.eye(5)}, "basis of G"),
    "few values for a mask": ({"mask": np.eye(5, 8) > 0, "lam": basis(Q)[1][:2]}, "mask"),
    "NaN for a mask": ({"mask": np.eye(5, 8) > 0, "lam": basis(Q)[1] * np.nan}, "mask"),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_bases_that_are_none_fail(monkeypatch, name):
    parts, quantity = BAD_BASES[name]
    found, _ = judged(P, Q, of(monkeypatch, **parts))
    assert found[quantity].verdict == "fail"


def test_a_table_has_no_basis(monkeypatch):
    parts = {"U_A": np.eye(4), "mu": np.ones(4)}
    with pytest.raises(rc.RefcurvError, match=r"nothing could be compared.*table"):
        judged(np.arange(1.0, 5), Q, of(monkeypatch, **parts))


@pytest.mark.parametrize("declared", [{"draws": "x"}, {"draws": "0"}, {"rho": "x"}, {"rho": "2"}])
def test_what_is_declared_is_checked(declared):
    with pytest.raises(rc.RefcurvError, match=next(iter(declared))):
        rc.validate({LAYER: (P, Q, 10)}, reference(P, Q), declared=declared)


def test_a_weight_of_zeros(monkeypatch):
    made = config()
    parameters = random_parameters(made, 3)
    W = parameters[f"{LAYER}.weight"]
    model = rc.Model(made, parameters | {f"{LAYER}.weight": 0 * W})
    said = {"model": model}
    with pytest.raises(rc.RefcurvError, match="nothing could be compared"):
        judged(P, Q, of(monkeypatch, W=0 * W), **said)
    assert judged(P, Q, of(monkeypatch, W=W), **said)[0]["W"].verdict == "fail"
    huge = judged(P, Q, of(monkeypatch, W=np.full_like(W, 1.7e308)), **said)[0]["W"]
    assert huge.verdict == "fail"


def test_what_is_left_out_alone_is_no_pass():
    left_out = Comparison("x", "W", None, None, "left out")
    assert not Verdict((left_out,)).passed and not Verdict(()).passed
    assert Verdict((left_out, Comparison("x", "A", 0.0, 1.0, "pass"))).passed
