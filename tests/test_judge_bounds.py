"""Budgets to the letter: one that is 0, half or twice what it should be is seen."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import special
from strategies import any_config, config, random_parameters

import refcurv as rc
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import Corrected
from refcurv.editing.projection import keep_pairs
from refcurv.judge.arithmetic import ROUNDOFF, Arithmetic, moment_budget
from refcurv.judge.bases import compare_bases
from refcurv.judge.case import Case, _flat
from refcurv.judge.compare import Bounds, _skew, tells
from refcurv.judge.divergence import compare_traces
from refcurv.judge.drawn import Drawing, reach
from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.edits import _Noise
from refcurv.judge.eigenvectors import limits_of, solver_budget
from refcurv.judge.masks import _disputed
from refcurv.judge.pictures import pictures
from refcurv.judge.trace import Trace, _errors, _require_room
from refcurv.judge.truths import _truth, near_of
from refcurv.passes.rounding import _spread, free

LAYER, ROWS, DRAWS, SHARD = "up", 50, 3, 17
RNG = np.random.default_rng(8)
X_A, X_G = RNG.normal(size=(ROWS, 6)), RNG.normal(size=(DRAWS * ROWS, 5))
ONE = rc.Factor(X_A.T @ X_A, ROWS, X_G.T @ X_G, DRAWS * ROWS)
SHORT = Arithmetic().filled("float32")


def case_of(one=ONE, arithmetic=SHORT, dtype="float64", **theirs):
    truth = rc.Factors({LAYER: one}, "sampled", "reached", 0, DRAWS, dtype, SHARD)
    dump = Dump("test", {LAYER: Theirs(**theirs)}, {LAYER: frozenset(theirs)})
    return Case(dump, truth, {LAYER: LAYER}, arithmetic)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_own_error_of_the_reference_is_part_of_the_budget(dtype):
    exact = Arithmetic().filled("float64")
    for side, X in (("A", X_A), ("G", X_G)):
        flat = {"flat": float((X**2).sum() / np.linalg.norm(X.T @ X))}
        own = moment_budget(Arithmetic().filled(dtype), SHARD, **flat)
        for arithmetic, as_said in ((SHORT, SHORT), (Arithmetic(), exact)):
            theirs = moment_budget(as_said, {"A": ROWS, "G": DRAWS * ROWS}[side], **flat)
            found = case_of(arithmetic=arithmetic, dtype=dtype).budget(LAYER, "float64", side)
            assert found == pytest.approx(theirs + own, rel=1e-12)


@pytest.mark.parametrize(("width", "rows"), [(4, 3000), (400, 3000), (400, 100)])
def test_rows_that_point_many_ways_err_more_beside_their_sum(width, rows):
    """Rows of random directions with random errors of κ roundings: within, and of its size."""
    rng, kappa, u = np.random.default_rng(0), 5.0, 2.0**-24
    g = rng.standard_normal((rows, width))
    wrong = g + kappa * u * rng.standard_normal(g.shape)
    G = g.T @ g
    error = np.linalg.norm(wrong.T @ wrong - G) / np.linalg.norm(G)
    mixed = Arithmetic("float32", "float64", "float64", "float64", "float64")
    of_rows = moment_budget(mixed, rows, kappa, flat=_flat(G)) - 4 * u  # what all rows share
    assert error < of_rows < 12 * error
    assert _flat(G) == pytest.approx(np.trace(G) / np.linalg.norm(G), rel=1e-12)
    assert (moment_budget(mixed, rows, kappa) - 4 * u < error) == (width > 4)


def test_rows_of_a_table_err_in_nothing():
    """They are one-hot: counts have no more room where many entries are read alike."""
    counts = np.array([3.0, 5.0, 4.0])
    case = case_of(replace(ONE, sum_A=counts, sum_a=None))
    want = [moment_budget(a, n) for a, n in
            ((SHORT, ROWS), (Arithmetic().filled("float64"), SHARD))]  # fmt: skip
    assert case.budget(LAYER, "float64", "A") == pytest.approx(sum(want), rel=1e-12)
    assert _flat(np.zeros((2, 2))) == _flat(counts) == 1.0


def test_the_rows_of_A_are_not_drawn_again():
    """G sums DRAWS rows for each of A: its chains are longer, and its errors fall further."""
    case = case_of(ONE)
    for side, rows, S in (("A", ROWS, ONE.sum_A), ("G", DRAWS * ROWS, ONE.sum_G)):
        want = moment_budget(SHORT, rows, flat=_flat(S))
        want += moment_budget(Arithmetic().filled("float64"), SHARD, flat=_flat(S))
        assert case.budget(LAYER, "float64", side) == pytest.approx(want, rel=1e-12)


def test_nothing_passes_by_rounding_that_could_hide_a_factor():
    """G of one layer times 2 and times 1/64, where a few rows may err by more than all of G."""
    made = config(width=8, mlp_width=9, layers=1)
    model = rc.Model(made, random_parameters(made, 0))
    corpus = rc.Corpus(np.random.default_rng(1).integers(0, made.vocabulary, (12, 8)))
    ours = rc.collect(model, corpus, "**", "empirical")
    same = {name: (one.A, one.G, one.n_A) for name, one in ours.items()}
    arithmetic = Arithmetic(*["bfloat16"] * 5)
    case = Case(Dump("memory", {}, {}), ours, {x: x for x in ours}, arithmetic)
    wide = max(ours, key=lambda x: case.budget(x, "bfloat16"))
    assert case.budget(wide, "bfloat16") > 1
    said = {"arithmetic": "bfloat16", "declared": {"fisher": "empirical"}}
    assert rc.validate(same, ours, **said).passed
    for factor in (2, 1 / 64):
        theirs = same | {wide: (ours[wide].A, factor * ours[wide].G, ours[wide].n_A)}
        verdict = rc.validate(theirs, ours, **said)
        assert not verdict.passed
        assert {(f.layer, f.verdict) for f in verdict.failed} == {(wide, "undecided")}


def test_the_budget_of_G_knows_how_many_roundings_it_has():
    kappa = 40.0
    noise = (kappa * 2.0**-53) ** 2 * float(ONE.sum_G.trace())
    case = case_of(replace(ONE, rounding_G=noise))
    flat = np.trace(ONE.sum_G) / np.linalg.norm(ONE.sum_G)
    both = [moment_budget(a, n, kappa, flat=flat) for a, n in
            ((SHORT, DRAWS * ROWS), (Arithmetic().filled("float64"), SHARD))]  # fmt: skip
    assert case.budget(LAYER, "float64", "G") == pytest.approx(sum(both), rel=1e-9)
    u = 2.0**-8
    sums = 8 * math.sqrt(100 / 3) * 2.0**-24
    found = moment_budget(Arithmetic().filled("bfloat16"), 100, 64)
    assert found == pytest.approx(4 * u + 1.2 * 64 * u + (64 * u) ** 2 + 3 * u + sums, rel=1e-9)


def judged(A, G, **declared):
    truth = rc.Factors({LAYER: ONE}, "expected", "reached", 0, 1, "float64", SHARD)
    theirs = {LAYER: (A, G, ROWS)}
    verdict = rc.validate(theirs, truth, arithmetic="float32", declared=declared)
    return {f.quantity: f for f in verdict.findings}


def test_the_product_of_two_traces_may_err_by_two_budgets():
    budget = judged(ONE.A, ONE.G)["G"].budget
    for share, verdict in ((1.9, "pass"), (2.1, "fail")):
        found = judged(ONE.A * (1 + share * budget), ONE.G)["tr A · tr G"]
        assert found.verdict == verdict and found.budget == pytest.approx(2 * budget)


def test_the_corner_may_err_by_two_budgets():
    """Its own error, and that of the factor that is taken out."""
    joint = rc.Factor(ONE.sum_A, ROWS, ONE.sum_G, ROWS, sum_a=X_A.sum(axis=0))
    truth = rc.Factors({LAYER: joint}, "expected", "reached", 0, 1, "float64", SHARD)

    def corner(value):
        A = joint.A_joint.copy()
        A[-1, -1] = value
        said = {"arithmetic": "float32", "declared": {"fisher": "expected", "bias": "joint"}}
        found = rc.validate({LAYER: (A, ONE.G, ROWS)}, truth, **said).findings
        return {f.quantity: f for f in found}

    budget = corner(1.0)["A"].budget
    for sign in (1, -1):
        assert corner(1 + sign * 1.9 * budget)["corner of A"].verdict == "pass"
        assert corner(1 + sign * 2.1 * budget)["corner of A"].verdict == "fail"


@pytest.mark.parametrize("tile", [1, 2, 3, 7])
def test_symmetry_is_measured_over_all_tiles(tile):
    X = RNG.normal(size=(6, 6))
    assert _skew(X, tile) == pytest.approx(np.linalg.norm(X - X.T), rel=1e-13)


def test_forms_that_agree_tell_that_labels_do():
    """A hundredth of one deviation; nothing where G has rank one, all of G where nobody knows."""
    G = np.diag([3.0, 4.0])
    apart = 1 - 25 / 49
    assert tells(G, Drawing(9.0, 9.0, 0.4)) == pytest.approx(0.01 * apart * 0.1, rel=1e-4)
    assert tells(G, Drawing(math.nan, math.nan, math.nan)) == pytest.approx(0.01 * apart, rel=1e-4)
    assert tells(np.diag([3.0, 0.0]), Drawing(0.4, 0.4, 0.4)) == 0


# ------------------------------------------------------------------ bases


def eigen(M):
    values, U = np.linalg.eigh(M)
    return U[:, ::-1].copy(), values[::-1].copy()


OWN = Eigenbasis(*eigen(ONE.A), *eigen(ONE.G))


def turned(angle):
    """Our basis with the first and the last eigenvector of each side turned into one another."""
    out = []
    for U in (OWN.U_A, OWN.U_G):
        V, (c, s) = U.copy(), (math.cos(angle), math.sin(angle))
        V[:, 0], V[:, -1] = c * U[:, 0] + s * U[:, -1], c * U[:, -1] - s * U[:, 0]
        out.append(V)
    return Theirs(U_A=out[0], mu=OWN.mu, U_G=out[1], lam=OWN.lam)


def bases(theirs, drawn=0.0, arithmetic=SHORT):
    bounds = Bounds(case_of(arithmetic=arithmetic), LAYER, Drawing(drawn, drawn, drawn))
    return {f.quantity: f for f in compare_bases(bounds, theirs, OWN)}, bounds


def test_the_spaces_of_a_turned_pair_are_as_far_apart_as_their_angle():
    """|sin Θ| times the gap, over |M|: the largest gap between neighbours that the turn crosses."""
    angle = 0.01
    found, _ = bases(turned(angle))
    for side, values in (("A", OWN.mu), ("G", OWN.lam)):
        gaps = values[:-1] - values[1:]
        error = math.sin(angle) * gaps.max() / np.linalg.norm(values)
        assert found[f"spaces of {side}"].error == pytest.approx(error, rel=1e-9)
        assert found[f"spaces of {side}"].verdict == "fail"


def test_drawing_explains_twice_as_much_of_the_spaces_of_G():
    """And none of those of A, which no label changes."""
    theirs = turned(0.01)
    error = bases(theirs)[0]["spaces of G"].error
    for share, verdict in ((0.55, "pass"), (0.45, "fail")):
        found, _ = bases(theirs, drawn=share * error)
        assert found["spaces of G"].verdict == verdict
        assert found["spaces of A"].verdict == "fail"
    whole = bases(theirs)[0]["basis of G"].error
    for share, verdict in ((1.05, "pass"), (0.95, "fail")):
        found, _ = bases(theirs, drawn=share * whole)
        assert found["basis of G"].verdict == verdict and found["basis of A"].verdict == "fail"


def test_a_basis_may_err_by_twice_its_matrix_and_solver():
    _, bounds = bases(turned(0.0))
    for side, size in (("A", 6), ("G", 5)):
        u = 2.0**-24
        solver = 16 * size * u + 4 * u
        assert solver_budget(size, SHORT) == pytest.approx(solver)
        both = limits_of(bounds, side, size).both("float64")
        assert both == pytest.approx(2 * (solver + bounds.case.budget(LAYER, "float64", side)))
    longer = replace(SHORT, solver="float64")
    assert solver_budget(6, longer) == pytest.approx(16 * 6 * 2.0**-53 + 4 * 2.0**-24)


def test_columns_err_from_orthonormal_by_the_root_of_their_number():
    theirs = turned(0.0)
    found, _ = bases(replace(theirs, U_A=1.001 * theirs.U_A))
    assert found["orthogonality of U_A"].error == pytest.approx(1.001**2 - 1, rel=1e-9)


def test_without_eigenvalues_the_vectors_must_make_the_matrix_diagonal():
    theirs = replace(turned(0.01), mu=None, lam=None)
    found, _ = bases(theirs)
    rotated = theirs.U_A.T @ ONE.A @ theirs.U_A
    off = np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(ONE.A)
    assert found["basis of A"].error == pytest.approx(off, rel=1e-9)
    assert "spaces of A" not in found


# ------------------------------------------------------------------ verdicts, masks, weights


def test_what_drawing_explains_is_added_to_the_budget():
    bounds = Bounds(case_of(arithmetic=Arithmetic()), LAYER, Drawing(0.0, 0.0, 0.0, 99))
    sizes = {"float64": 0.01, "float32": 0.02, "tf32": 0.03, "float16": 0.04, "bfloat16": 0.9}

    def judged(error, drawing=0.0, **more):
        one = bounds.judged("x", error, "far", budget_of=sizes.get, drawing=drawing, **more)
        return one.verdict, one.budget

    assert judged(0.009) == ("pass", 0.01)
    assert judged(0.1, 0.2) == ("pass", pytest.approx(0.21))
    assert judged(0.22, 0.2) == ("fail", pytest.approx(0.21)), "errors that tell no dtype"
    assert judged(0.035) == ("equal as float16", 0.04)
    assert judged(0.035, inferred=False) == ("fail", 0.01)
    assert judged(0.09) == ("equal as bfloat16", 0.9)
    assert judged(0.11) == ("fail", 0.01), "too large for any dtype (TELLING)"
    assert judged(0.11, math.nan)[0] == "undecided"
    assert judged(math.nan, 0.2)[0] == "fail" == judged(math.inf, math.nan)[0]


def spread_out(size, base):
    return np.sort(base ** -np.arange(size, dtype=float) * (1 + 0.3 * RNG.random(size)))[::-1]


MU, LAM = spread_out(14, 1.2), spread_out(11, 1.3)
WIDE = rc.Factor(np.diag(MU) * ROWS, ROWS, np.diag(LAM) * ROWS, ROWS)
PLAIN = Eigenbasis(np.eye(14), MU, np.eye(11), LAM)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("drawn", [0.0, 0.004])
def test_pairs_that_errors_within_budget_decide_are_those_of_the_definition(dtype, drawn):
    """ACCEPTABLE by brute force, with the budgets of their arithmetic."""
    bounds = Bounds(case_of(WIDE, Arithmetic().filled(dtype)), LAYER, Drawing(drawn, drawn, drawn))
    moved, errors = 1.0, []
    for side, values, extra in (("G", LAM, drawn), ("A", MU, 0.0)):
        solver = solver_budget(len(values), bounds.case.arithmetic)
        e = (bounds.case.budget(LAYER, dtype, side) + solver + extra) * np.linalg.norm(values)
        moved *= 1 + e * math.sqrt(len(values)) / values.sum()
        errors.append(e)
    total = LAM.sum() * MU.sum()
    slack, rho = (moved - 1) * total, 0.8
    mass = np.outer(LAM, MU)
    least = np.outer(np.maximum(LAM - errors[0], 0), np.maximum(MU - errors[1], 0))
    most = np.outer(LAM + errors[0], MU + errors[1])
    sure, dropped = np.zeros_like(mass, bool), np.zeros_like(mass, bool)
    for at, weight in np.ndenumerate(mass):
        before = mass[most >= least[at]].sum() - weight
        sure[at] = before < rho * total - slack
        dropped[at] = mass[least > most[at]].sum() >= rho * total + slack
    free = int((~sure & ~dropped).sum())
    assert free < mass.size / 2 and (free or dtype == "float32")
    for mask in (sure, ~dropped):
        assert _disputed(bounds, PLAIN, rho, mask) == (0, free)
    if sure.any():
        assert _disputed(bounds, PLAIN, rho, sure & (mass != mass[sure].min())) == (1, free)
    if dropped.any():
        assert _disputed(bounds, PLAIN, rho, ~dropped | (mass == mass[dropped].max())) == (1, free)


def test_the_budget_of_an_edit_is_what_errors_within_budget_move_it_by():
    """Four times the most that random errors of that size did; and no more where the cut is clear.

    Without a pair near the cut an edit moves by about the error of the vectors.
    """
    rng = np.random.default_rng(2)
    W = rng.normal(size=(11, 14))
    lam, mu = np.r_[np.full(4, 1.0), np.full(7, 1e-3)], np.r_[np.full(5, 1.0), np.full(9, 1e-3)]
    own = Eigenbasis(np.eye(14), mu, np.eye(11), lam)
    mask = np.outer(lam, mu) > 0.5
    one = rc.Factor(np.diag(mu) * ROWS, ROWS, np.diag(lam) * ROWS, ROWS)
    W_edited, budgets = keep_pairs(W, own, mask), {}
    for dtype in ("float64", "float32"):
        bounds = Bounds(case_of(one, Arithmetic().filled(dtype)), LAYER, Drawing(0.0, 0.0, 0.0))
        noise = _Noise(bounds, own, W, 0.95, W, mask, W_edited)
        budgets[dtype] = noise.budget(dtype)
        moved = [noise._moved(dtype, seed) for seed in range(20)]
        share = {side: noise._share(dtype, side) for side in "AG"}
        assert max(moved[:2]) * 4 < budgets[dtype] < 4.1 * max(moved[:2]) + 5 * ROUNDOFF[dtype]
        assert max(moved) < budgets[dtype] / 2
        # vectors turn by E_ij / (1 - 1e-3); E has the norm share |spectrum|
        turn = sum(
            share[side] * np.linalg.norm(x) * math.sqrt(2 * k * (n - k)) / n
            for side, x, k, n in (("A", mu, 5, 14), ("G", lam, 4, 11))
        )
        size = np.linalg.norm(W_edited) / np.linalg.norm(W)
        assert 0.05 * turn * size < max(moved) < 2 * turn
        for side, n in (("A", 14), ("G", 11)):
            solver = solver_budget(n, bounds.case.arithmetic)
            assert share[side] == pytest.approx(bounds.case.budget(LAYER, dtype, side) + solver)
    assert budgets["float32"] > 1e6 * budgets["float64"]


# ------------------------------------------------------------------ Λ, pictures, divergence


def test_what_one_draw_of_lambda_varies_by_is_that_of_our_draws():
    """So many standard errors that any of the numbers exceeds them with the stated odds.

    Theirs, a mean of 4 draws, is off from our mean of 8 by 1/4 + 1/8 of a variance.
    """
    rng = np.random.default_rng(3)
    draws = [10 * (1 + 0.1 * rng.normal(size=(5, 6))) for _ in range(8)]
    found = _truth("token", "sampled", [Corrected(L * 7, 7, 2, 1) for L in draws], 6)
    X = np.array(draws)
    variance = X.var(axis=0, ddof=1)
    assert found.Lambda == pytest.approx(X.mean(axis=0)) and (found.rows, found.segments) == (7, 2)
    spread = reach(7, 6) * math.sqrt(variance.sum()) / np.linalg.norm(X.mean(axis=0))
    assert found.spread == pytest.approx(spread)
    sums = X.sum(axis=(1, 2))
    assert found.spread_sum == pytest.approx(
        reach(7, 6) * math.sqrt(sums.var(ddof=1)) / sums.mean()
    )
    case = replace(case_of(), dump=replace(case_of().dump, declared={"draws": "4"}))
    near = near_of(Bounds(case, LAYER, Drawing(0, 0, 0)), 3 * X.mean(axis=0), found)
    assert (near.r, near.by_drawing) == (pytest.approx(3), pytest.approx(spread * math.sqrt(3 / 8)))
    assert near.error < 1e-12


def test_a_picture_shows_entries_over_their_root_mean_square():
    theirs = 3 * ONE.A + np.diag(np.arange(6.0))
    case = case_of(A=theirs, n_A=ROWS, G=2 * ONE.G, n_G=ROWS)
    A, G = pictures(case, LAYER)
    own = ONE.A / np.trace(ONE.A)
    want = abs(theirs / np.trace(theirs) - own) / np.sqrt((own**2).mean())
    assert np.array(A.difference) == pytest.approx(want)
    assert np.max(G.difference) < 1e-14 and (A.side, A.size, G.side, G.size) == ("A", 6, "G", 5)
    for found, M in ((A.theirs, theirs), (A.ours, ONE.A)):
        values = np.linalg.eigvalsh(M)[::-1]
        assert found == pytest.approx(list(values / values.sum()))
    assert pictures(case_of(A=theirs[:3, :3], G=np.nan * ONE.G), LAYER) == []


def test_a_position_may_be_off_by_what_its_own_rounding_and_the_tensors_size_allow():
    """16 times the rounding that other runs show, scaled to their dtype, and 2 u of the whole."""
    true = np.ones((1, 4, 9)) * np.array([1.0, 2.0, 3.0, 4.0])[None, :, None]
    root = math.sqrt((np.array([9.0, 36, 81, 144])).mean())
    errors = np.array([[1e-16, 2e-16, 0.0, 4e-16]])
    ours = Trace({"x": true}, (5,), "empirical", {"x": errors})
    for dtype, u in (("float32", 2.0**-24), ("bfloat16", 2.0**-8)):
        limit = u * (16 * errors[0] * 2.0**53 + 2 * root)
        for t in range(4):
            for share, agrees in ((0.98, True), (1.02, False)):
                theirs = true.copy()
                theirs[0, t, 3] += share * limit[t]
                (one,) = compare_traces({"x": theirs}, ours, dtype)
                assert one.agrees == agrees and one.where == (5, t)
                assert one.first == (None if agrees else (5, t))
                assert one.error == pytest.approx(share * limit[t] / root, rel=1e-6)
                assert one.budget == pytest.approx(limit[t] / root, rel=1e-9)


def test_labels_of_a_trace_may_have_any_negative_number_for_none():
    ours = Trace({"labels": np.array([[3, -1, 2]])}, (0,), "empirical")
    for theirs, first in (([3, -100, 2], None), ([3, 0, 2], (0, 1)), ([3, -1, -1], (0, 2))):
        (one,) = compare_traces({"labels": np.array([theirs])}, ours)
        assert one.first == first


def test_rounding_is_half_of_what_two_runs_differ_by(monkeypatch):
    """In mean square: each of the two has its own."""
    x, moves = RNG.normal(size=(2, 3, 4)), {4: 1.0, -5: 2.0, 9: 4.0}

    def nudged(one, nudge):
        return SimpleNamespace(tensors=lambda: {"x": x + moves[nudge]})

    monkeypatch.setattr("refcurv.judge.trace._nudged", nudged)
    found = _errors(None, {"x": x, "labels": np.zeros((2, 3), int)})
    assert set(found) == {"x"}
    assert found["x"] == pytest.approx(math.sqrt(4 * (1 + 4 + 16) / 3 / 2) * np.ones((2, 3)))


def test_a_trace_that_memory_does_not_hold_is_refused(monkeypatch):
    """Four arrays of eight bytes for each input and output of a linear layer, at each position."""
    made = config()
    width = sum(i + o for o, i in made.linear_layers().values())
    corpus = rc.Corpus(np.zeros((3, 5), np.int32))
    need = 8 * 4 * 15 * width
    monkeypatch.setattr("refcurv.judge.trace.available", lambda: need)
    _require_room(made, corpus)
    monkeypatch.setattr("refcurv.judge.trace.available", lambda: need - 1)
    with pytest.raises(rc.RefcurvError, match="fewer sequences"):
        _require_room(made, corpus)


# ------------------------------------------------------------------ few rows that err most


def narrow(seed):
    """A model of any family, down to three numbers wide, and a corpus."""
    rng = np.random.default_rng(seed)

    def pick(options):
        return options[int(rng.integers(len(options)))]

    made = any_config(pick)
    P = {
        x: M.astype(np.float32) for x, M in random_parameters(made, int(rng.integers(9999))).items()
    }
    width = min(5, made.learned_positions or 5)
    tokens = rng.integers(0, made.vocabulary, (int(rng.integers(6, 14)), width))
    labels = None if made.causal else rng.integers(0, made.vocabulary, tokens.shape)
    single = rc.Model(made, P, "float32")
    return (
        rc.Model(made, {x: M.astype(np.float64) for x, M in P.items()}),
        single,
        rc.Corpus(tokens, labels),
    )


def both_of(seed):
    """The reference of `narrow`, and the dump of the same in float32."""
    model, single, corpus = narrow(seed)
    ours = rc.collect(model, corpus, "**", "empirical")
    theirs = rc.collect(single, corpus, "**", "empirical")
    return ours, {name: (one.A, one.G, one.n_A) for name, one in theirs.items()}


GOLD = {"arithmetic": "float32", "declared": {"fisher": "empirical"}}


@pytest.mark.parametrize("seed", [98, 316])
def test_a_norm_that_divides_by_nearly_0_in_one_row_is_no_alarm(seed):
    """Then one row has all of the error: it does not fall with rows, and few runs tell it."""
    ours, dump = both_of(seed)
    assert rc.validate(dump, ours, **GOLD).passed
    unknown = {"noise_A": None, "noise_G": None}
    blind = replace(ours, layers={x: replace(one, **unknown) for x, one in ours.items()})
    assert not rc.validate(dump, blind, **GOLD).passed


def test_few_runs_tell_an_error_if_each_number_of_the_input_moves_by_itself():
    """A norm hides a common factor."""
    ours, dump = both_of(1172)
    assert rc.validate(dump, ours, **GOLD).passed


def test_the_noise_of_a_sum_is_that_of_its_rows():
    """Equal rows tell it by three numbers each; one row that has most of it by three in all.

    Of several shards too: rows that hardly err are no more of those that carry it.
    """
    equal = _spread(np.full(10, 2.0), np.full(10, 5.0))
    assert equal == (100, 1000) and free(*equal, 10) == pytest.approx(30)
    one = _spread(np.array([1e-30, 1.0, 1e-30]), np.array([1.0, 7.0, 1.0]))
    assert one == (pytest.approx(7), pytest.approx(49))
    assert free(*one, 3) == pytest.approx(3)
    faint = _spread(np.full(64, 1e-9), np.ones(64))
    assert free(*faint, 64) == pytest.approx(192)
    assert free(*np.add(one, faint), 67) == pytest.approx(3)
    assert _spread(np.zeros(3), np.ones(3)) == (0.0, 0.0)
    for tiny in (1e-200, 1e200):  # squares that leave float64: as of one row
        assert free(*_spread(np.full(9, tiny), np.ones(9)), 9) == 3


@pytest.mark.parametrize("side", ["A", "G"])
def test_noise_widens_the_budget_of_its_side_alone(side):
    size = float(np.linalg.norm(getattr(ONE, f"sum_{side}")))
    noisy = replace(ONE, **{f"noise_{side}": 1000 * 2.0**-53 * size, f"free_{side}": 7.0})
    for of in "AG":
        plain = case_of().budget(LAYER, "float64", of)
        times = math.sqrt(special.fdtri(7 / 3, 7, special.ndtr(4.0)))
        more = times * 1000 * (2.0**-24 + 2.0**-53) - 12 / math.sqrt(DRAWS * ROWS) * 2 * 2.0**-24
        found = case_of(noisy).budget(LAYER, "float64", of) - plain
        assert found == pytest.approx(more if of == side else 0, rel=0.05, abs=1e-12)
