"""Norms and sums up to the ends of the range, and everything that stands on them."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import case
from test_distance import random_three
from test_factors import corpus_of, model_of

import refcurv as rc
from refcurv.algebra import scaling
from refcurv.algebra.scaling import exponent, far_exponent, norm, shifted, total
from refcurv.evaluation import bands
from refcurv.evaluation.bands import Quantity
from refcurv.judge import differences
from refcurv.law.checks import RangeError

REAL = np.finfo(np.float64)
numbers = st.one_of(
    st.floats(-4, 4), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 1.0])
)
matrices = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
                      elements=numbers)  # fmt: skip


def exact_norm(x: list[float]) -> float:
    """By rationals: sqrt(Σ x²) to 60 digits more than float64 has; inf where that is too large."""
    square = sum((Fraction(v) ** 2 for v in x), Fraction(0))
    root = Fraction(math.isqrt(int(square * 4**1400)), 2**1400)
    return math.inf if root > Fraction(REAL.max) * (1 + Fraction(1, 2**54)) else float(root)


def near(got: float, want: float, terms: int) -> bool:
    """Within the rounding of a sum of squares, and of the smallest number there is."""
    if math.isinf(want):
        return got == want or got > REAL.max / 2
    return abs(got - want) <= (terms + 4) * REAL.eps * want + REAL.smallest_subnormal


@given(matrices)
def test_norms_are_right_up_to_the_ends_of_the_range(x: np.ndarray) -> None:
    assert near(float(norm(x)), exact_norm(x.ravel().tolist()), x.size)
    for axis in (0, 1):
        rows = (x.T if axis == 0 else x).tolist()
        assert all(
            near(a, exact_norm(row), len(row))
            for a, row in zip(norm(x, axis=axis).tolist(), rows, strict=True)
        )


@given(st.integers(0, 999), st.integers(-100, 100))
def test_ordinary_norms_have_numpys_bits(seed: int, power: int) -> None:
    x = np.random.default_rng(seed).normal(size=(5, 7)) * 2.0**power
    assert norm(x) == np.linalg.norm(x)
    assert norm(np.asfortranarray(x)) == np.linalg.norm(np.asfortranarray(x))
    assert norm(x, axis=-1).tolist() == np.linalg.norm(x, axis=-1).tolist()


def test_norms_of_nothing_are_zero() -> None:
    assert norm(np.zeros((0, 3))) == norm(np.zeros(4)) == 0
    assert norm(np.zeros((2, 0)), axis=-1).tolist() == [0, 0]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6))
def test_totals_are_correctly_rounded_or_infinite(x: list[float]) -> None:
    exact = sum(map(Fraction, x), Fraction(0))
    try:
        want = float(exact)
    except OverflowError:
        want = math.inf if exact > 0 else -math.inf
    assert total(x) == want


def test_a_small_rest_of_large_terms_is_kept() -> None:
    assert total([1e308, 1e308, 1e-310, -1e308, -1e308]) == 1e-310
    assert total([-1e308, -1e308]) == -np.inf


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_exponents(x: float) -> None:
    k = exponent(np.array([0.0, x]))
    assert x == 0 or 1 <= abs(shifted(x, -k)) < 2
    assert shifted(shifted(x, -k), k) == x
    assert far_exponent(np.array([x])) in (0, k)
    assert exponent(np.zeros((0, 2))) == 0


@pytest.mark.parametrize("x", [2.0**-256, 2.0**256, -1.0])
def test_ordinary_numbers_stay_as_they_are(x: float) -> None:
    assert far_exponent(np.array([x])) == 0
    assert far_exponent(np.array([x * 2.0**600])) == exponent(np.array([x])) + 600


# ------------------------------------------------------------------ what stands on them

FAR = [-900, -600, 600, 900]
UP = "blocks.1.mlp.up"


@pytest.fixture(scope="module")
def made() -> tuple[rc.Model, rc.Bases, rc.Scores]:
    one = case()
    model, corpus = model_of(one), corpus_of(one)
    W = model.parameters[f"{UP}.weight"]
    score = np.random.default_rng(0).random(W.shape)
    scores = rc.Scores({UP: score}, 0.3, 1.0, 0, 0.1, 1, 0, "float64", np.zeros(0), np.zeros(0))
    return model, rc.decompose(rc.collect(model, corpus, UP)), scores


@pytest.mark.parametrize("power", FAR)
def test_what_an_edit_records_has_no_units(
    power: int, made: tuple[rc.Model, rc.Bases, rc.Scores]
) -> None:
    """Of 2^k W the same pairs, mass and norm are kept, though squares of it leave the range."""
    model, basis, scores = made
    W = model.parameters[f"{UP}.weight"]
    far = model.with_parameters({f"{UP}.weight": np.ldexp(W, power)})
    for edited in (
        lambda m: rc.edit(m, basis, 0.6, force=True),
        lambda m: rc.truncate(m, {UP: 0.6}),
        lambda m: rc.prune(m, scores, force=True),
        lambda m: rc.random_pairs(m, basis, 0.5, 0, force=True),
    ):
        (one, want), (two, got) = edited(model), edited(far)
        for field in ("kept", "mass", "norm"):
            a, b = (getattr(r.layers[0], field) for r in (want, got))
            assert 0 < a == pytest.approx(b, rel=1e-12), field
        new = np.ldexp(two.parameters[f"{UP}.weight"], -power)
        assert np.allclose(one.parameters[f"{UP}.weight"], new, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", FAR)
def test_the_mass_of_random_pairs_has_no_units(
    power: int, made: tuple[rc.Model, rc.Bases, rc.Scores]
) -> None:
    model, basis, _ = made
    one = basis[UP]
    far = replace(one, mu=np.ldexp(one.mu, power), lam=np.ldexp(one.lam, power))
    records = [
        rc.random_pairs(model, replace(basis, layers={UP: x}), 0.5, 0)[1] for x in (one, far)
    ]
    assert 0 < records[0].layers[0].mass == records[1].layers[0].mass


@pytest.mark.parametrize("a", [-500, 500])
@pytest.mark.parametrize("b", [-500, 500])
def test_an_edit_has_the_same_bits_in_any_units_of_the_curvature(
    a: int, b: int, made: tuple[rc.Model, rc.Bases, rc.Scores]
) -> None:
    model, _, _ = made
    factors = rc.collect(model, corpus_of(case()), UP)
    one = factors[UP]
    far = replace(
        one,
        sum_A=np.ldexp(one.sum_A, a),
        sum_G=np.ldexp(one.sum_G, b),
        rounding_G=np.ldexp(one.rounding_G, b),
    )
    found = [
        rc.edit(model, rc.decompose(replace(factors, layers={UP: x})), 0.6) for x in (one, far)
    ]
    first, second = (edited.parameters[f"{UP}.weight"].tobytes() for edited, _ in found)
    assert first == second
    for field in ("kept", "mass", "gap", "norm"):
        want, got = (getattr(record.layers[0], field) for _, record in found)
        assert want == got


def test_a_singular_value_beyond_the_range_is_refused(
    made: tuple[rc.Model, rc.Bases, rc.Scores],
) -> None:
    model, _, _ = made
    for value, says in ((1e160, "square is not in the range"), (1e-170, "square is not"),
                        (1e308, "beyond the largest float64")):  # fmt: skip
        far = model.with_parameters({f"{UP}.weight": np.full((5, 8), value)})
        with pytest.raises(RangeError, match=f"singular_bases: '{UP}' has .*{says}"):
            rc.singular_bases(far, UP)
    with pytest.raises(RangeError, match=f"truncate: '{UP}' has a singular value beyond"):
        rc.truncate(far, {UP: 0.5})


@pytest.mark.parametrize("power", FAR)
@pytest.mark.parametrize("quantity", list(Quantity))
def test_norms_of_bands_are_those_of_their_inputs(
    quantity: Quantity, power: int, made: tuple[rc.Model, rc.Bases, rc.Scores]
) -> None:
    model, basis, _ = made
    norms = bands._probe(model, model.parameters, UP, basis[UP], quantity).norms
    x_NI = np.random.default_rng(0).normal(size=(3, 8))
    got = np.ldexp(norms(np.ldexp(x_NI, power)), -power)
    assert (got > 0).any() and np.allclose(got, norms(x_NI), rtol=1e-13, atol=0)


@pytest.mark.parametrize("power", FAR)
def test_distances_have_no_units(power: int) -> None:
    three = random_three(3, 4, 0)
    m = three.moments
    far = replace(
        three,
        F=np.ldexp(three.F, power),
        F_tok=np.ldexp(three.F_tok, power),
        moments=replace(m, A=np.ldexp(m.A, power - power // 2), G=np.ldexp(m.G, power // 2)),
    )
    one, two = (rc.distance.distances(x, (1, 2)) for x in (three, far))
    for field in ("norm", "trace"):
        assert math.ldexp(getattr(one, field), power) == getattr(two, field)
    assert replace(two, norm=one.norm, trace=one.trace) == one


def test_errors_of_draws_whose_squares_vanish_are_not_known() -> None:
    """G of 1e-170: the squares of what was drawn are 0, and so was the standard error."""
    one = case()
    model = model_of(one)
    tiny = model.with_parameters({"final_norm.weight": np.full(8, 1e-85)})
    for m, known in ((model, True), (tiny, False)):
        got = rc.collect(m, corpus_of(one), "blocks.1.mlp.down", draws=3)["blocks.1.mlp.down"]
        assert 0 < np.abs(got.sum_G).max() < (math.inf if known else 1e-165)
        assert (got.error_G is not None, got.error_trace_G is not None) == (known, known)


@pytest.mark.parametrize("power", [0, *FAR])
def test_a_difference_is_measured_a_few_rows_at_a_time(power: int, monkeypatch) -> None:
    X, Y = np.ldexp(np.random.default_rng(0).normal(size=(2, 40, 30)), power)
    whole = differences.apart(X, Y, 3.0)
    assert whole == scaling.norm(X / 3.0 - Y), "a small one is made"
    monkeypatch.setattr(differences, "_AT_ONCE", 100)
    assert math.isclose(differences.apart(X, Y, 3.0), whole, rel_tol=1e-14)
    assert differences.apart(X[:0], Y[:0]) == 0.0
