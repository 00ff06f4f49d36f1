"""Balls enclose; they refuse what would lose the radius; dual balls differentiate."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from refcurv.algebra import balls
from refcurv.algebra.balls import Balls, UndecidedError, bits, chosen, exact, pi
from refcurv.algebra.duals import Duals
from refcurv.law.checks import RefcurvError

NUMBERS = st.floats(-8, 8, allow_subnormal=False)


def parts_of(x: Balls) -> tuple[list[Fraction], Fraction]:
    """A ball as an exact number and a radius, through its float64 parts alone."""
    *parts, radius = x.split(4)
    return [Fraction(float(p)) for p in parts], Fraction(float(radius))


def holds(x: Balls, truth: Fraction) -> bool:
    parts, radius = parts_of(x)
    return abs(sum(parts) - truth) <= radius


# ------------------------------------------------------------------ what is refused

REFUSED: dict[str, Callable[[Balls], Any]] = {
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if x[0] else 0,
    "order": lambda x: x < 1,
    "equality": lambda x: x == x[:],
    "max": lambda x: max(x[0], x[1]),
    "a NumPy array": np.asarray,
    "an array of them": lambda x: np.array([x, x]),
    "into a float64 array": lambda x: np.zeros(2).__setitem__(slice(None), x),
    "one entry into a float64 array": lambda x: np.zeros(2).__setitem__(0, x[0]),
    "added in place to floats": lambda x: operator.iadd(np.zeros(2), x),
    "loops": list,
    "hash": hash,
    "a NumPy float": lambda x: x * np.float64(2),
    "a NumPy float on the left": lambda x: np.float64(2) * x,
    "a float64 array": lambda x: x * np.ones(2),
    "a float64 array on the left": lambda x: np.ones(2) - x,
    "a float64 matrix": lambda x: np.ones((2, 2)) @ x.reshape(2, 1),
    "a float64 matrix on the right": lambda x: x.reshape(1, 2) @ np.ones((2, 2)),
    "numpy.exp": np.exp,
    "numpy.maximum": lambda x: np.maximum(x, 0),
    "numpy.where": lambda x: np.where(np.array([True, False]), x, 0),
    "numpy.isclose": lambda x: np.isclose(x, 1),
    "chosen by numbers": lambda x: chosen(np.array([1, 0]), x, 0),
    "stacked": lambda x: np.stack([x, x]),
    "an array of objects": lambda x: np.array([x[0]], object),
    "into an array of objects": lambda x: np.empty(2, object).__setitem__(slice(None), x),
    "numpy.float64": lambda x: np.float64(x[0]),
    "filled": lambda x: np.zeros(2).fill(x[0]),
    "compared with floats": lambda x: np.ones(2) == x,
    "added at places of floats": lambda x: np.add.at(np.zeros(2), [0, 1], x),
    "a NumPy float put in": lambda x: x.__setitem__(0, np.float64(1)),
    "a row against a column": lambda x: x.reshape(2, 1) @ exact(np.ones((2, 2))),
    "matrices that do not fit": lambda x: x.reshape(1, 2) @ exact(np.ones((1, 2))),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("dual", [False, True])
def test_what_would_lose_the_radius_is_refused(what: str, dual: bool) -> None:
    x: Any = exact(np.array([1.5, 2.5]))
    if dual:
        x = Duals(x, exact(np.ones(2)))
    with pytest.raises((TypeError, ValueError)):
        REFUSED[what](x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(RefcurvError, match="NaN or infinite"):
        exact(np.array([1.0, bad]))
    wide = np.longdouble(1) + np.finfo(np.longdouble).eps
    for array in (np.array(["1"]), np.array([1j]), np.array([wide]), [2**53 + 1, 0.5]):
        with pytest.raises(RefcurvError, match="not taken as exact"):
            exact(array)


def test_without_flint_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balls, "flint", None)
    with pytest.raises(balls.MissingFlintError, match=r"refcurv\[certified\]"):
        exact(np.ones(1))


def test_what_a_ball_may_be_is_asked_exactly() -> None:
    """Of a number that NumPy would round to float64 first: 2^53 is not 2^53 + 1."""
    x = exact(np.array(2**53))
    assert x.contains(np.array(2**53)) and not x.contains(np.array(2**53 + 1))
    with pytest.raises(RefcurvError, match="not taken as exact"):
        x.contains(np.array(np.longdouble(0.1)))


@few(40)
@given(st.lists(NUMBERS, min_size=1, max_size=5), st.integers(-20, 80), st.sampled_from([0, 1e-3]))
def test_whole_numbers_lie_about_the_ball(numbers: list[float], k: int, radius: float) -> None:
    """For both ends of it; magnitudes bound them too."""
    array = np.array(numbers)
    with bits(30):
        x = exact(array) + balls.around_zero(np.full(len(numbers), radius))
        low, high = x.whole(k)
        size = x.magnitudes().split(3)[0]
    for n, number in enumerate(numbers):
        for end in (Fraction(number) - Fraction(radius), Fraction(number) + Fraction(radius)):
            assert low[n] <= end * Fraction(2) ** k <= high[n]
            assert abs(end) <= Fraction(size[n]) * (1 + Fraction(1, 2**52))
    with bits(30), pytest.raises(RefcurvError, match="has no bound"):
        balls.around_zero(np.array([np.inf])).whole(0)


def test_balls_are_sorted_where_it_is_sure() -> None:
    x = exact(np.array([1.0, 3.0, 2.0, 3.0]))
    assert x.descending().tolist() == [1, 3, 2, 0]
    unsure = x + balls.around_zero(np.array([0.0, 0.5, 0.75, 0.0]))
    with pytest.raises(UndecidedError, match="which is larger"):
        unsure.descending()
    assert unsure.midpoints().descending().tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("what", ["no number", "no bound", "too large"])
def test_balls_without_bounds_end_and_promise_nothing(what: str) -> None:
    zero, huge = exact(np.array(0)), exact(np.array([2.0**1000, 1.0]))
    x = {
        "no number": lambda: zero / zero,
        "no bound": lambda: 1 / (exact(np.array(1)) / 3 * 3 - 1),
        "too large": lambda: huge * huge,
    }[what]().reshape(-1)
    *parts, radius = x.split(3)
    assert radius[0] == np.inf and all(part[0] == 0 for part in parts)
    assert x.most()[0] == np.inf and x.radii()[0] >= 0
    if what == "too large":
        assert x.least()[0] == np.finfo(float).max and radius[1] == 0
    else:
        assert x.least()[0] == 0 and x.radii()[0] == np.inf and not x.finite()[0]
        with pytest.raises(UndecidedError):
            x.above(0)


def test_what_lies_below_float64_is_no_0() -> None:
    """A third of the smallest float64, at 60 bits: its radius is about 2^-1136."""
    tiny = 2.0**-1074
    with bits(60):
        x = exact(np.array(tiny)) / 3
    assert not x.is_zero() and x.radii() == x.most() == tiny and x.least() == 0
    assert holds(x, Fraction(tiny) / 3) and x.split(2)[-1] == tiny


def test_nothing_adds_up_to_an_exact_0() -> None:
    nothing = exact(np.ones((0, 3)))
    assert nothing.sum(axis=0).is_zero().all() and nothing.sum().is_zero()
    product = nothing.T @ exact(np.ones((0, 2)))
    assert product.shape == (3, 2) and product.is_zero().all()


# ------------------------------------------------------------------ enclosures


@few(60)
@given(st.lists(NUMBERS, min_size=6, max_size=6), st.sampled_from([24, 53, 90]))
def test_arithmetic_holds_the_rational_result(x: list[float], precision: int) -> None:
    a, b = np.array(x[:3]), np.array(x[3:])
    A, B = ([Fraction(float(one)) for one in y] for y in (a, b))
    with bits(precision):
        one, two = exact(a), exact(b)
        for got, want in (
            (one + two, [p + q for p, q in zip(A, B, strict=True)]),
            (one - two, [p - q for p, q in zip(A, B, strict=True)]),
            (one * two * one, [p * q * p for p, q in zip(A, B, strict=True)]),
            (one / 3 + 0.1, [p / 3 + Fraction(0.1) for p in A]),
            (1 - one * 7, [1 - 7 * p for p in A]),
        ):
            for n, truth in enumerate(want):
                assert holds(got[n], truth)
        product = one.reshape(1, 3) @ two.reshape(3, 1) / 3
        assert holds(product[0, 0], sum(p * q for p, q in zip(A, B, strict=True)) / 3)
        assert holds((one / 7).sum(), sum(A) / 7) and holds(one.mean(0), sum(A) / 3)


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "exp": (mpmath.exp, mpmath.exp),
    "log": (lambda x: mpmath.log(abs(x) + 1), lambda x: mpmath.sign(x) / (abs(x) + 1)),
    "sqrt": (lambda x: mpmath.sqrt(abs(x) + 1), lambda x: mpmath.nan),
    "rsqrt": (
        lambda x: 1 / mpmath.sqrt(abs(x) + 1),
        lambda x: -mpmath.sign(x) / 2 / mpmath.sqrt(abs(x) + 1) ** 3,
    ),
    "tanh": (mpmath.tanh, lambda x: 1 / mpmath.cosh(x) ** 2),
    "erf": (mpmath.erf, lambda x: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-x * x)),
    "cos": (mpmath.cos, lambda x: mpmath.nan),
    "sin": (mpmath.sin, lambda x: mpmath.nan),
}


def of(name: str, x: Any, value: float) -> Any:
    """The function of that name; of |x| + 1 where it needs a positive number."""
    if name in ("log", "sqrt", "rsqrt"):
        x = (x if value >= 0 else -x) + 1
    return getattr(x, name)()


@few(40)
@given(NUMBERS, st.sampled_from(list(FUNCTIONS)), st.sampled_from([40, 120]))
def test_functions_hold_the_real_one(x: float, name: str, precision: int) -> None:
    with mpmath.workdps(60), bits(precision):
        truth, slope = (f(mpmath.mpf(x)) for f in FUNCTIONS[name])
        got = of(name, exact(np.array(x)), x)
        assert close(got, truth)
        if not mpmath.isnan(slope) and x:
            dual = of(name, Duals(exact(np.array(x)), exact(np.array(3))), x)
            assert close(dual.value, truth) and close(dual.derivative, 3 * slope)


def close(x: Balls, truth: Any) -> bool:
    *parts, radius = x.split(4)
    far = abs(sum(mpmath.mpf(float(p)) for p in parts) - truth)
    return bool(far <= float(radius) + abs(truth) * mpmath.mpf(10) ** -55)


def test_pi_holds_pi_and_no_float_of_it() -> None:
    with bits(100), mpmath.workdps(40):
        assert close(pi(), +mpmath.pi)
        assert not pi().contains(np.array(math.pi))


@few(60)
@given(st.fractions(max_denominator=10**6), st.integers(-40, 40))
def test_bounds_go_out_in_the_safe_direction(x: Fraction, power: int) -> None:
    """Midpoints rounded to nearest; radii and largest magnitudes upwards, least ones downwards."""
    x = x * Fraction(2) ** power
    with bits(70):
        ball = exact(np.array(x.numerator if abs(x.numerator) < 2**60 else 1)) / 3
        truth = Fraction(x.numerator if abs(x.numerator) < 2**60 else 1, 3)
        assert float(ball.rounded()) == float(truth)
        assert abs(Fraction(float(ball.rounded())) - truth) <= abs(truth) / 2**53
        assert Fraction(float(ball.most())) >= abs(truth) >= Fraction(float(ball.least()))
        wide = ball + (ball - ball)  # a radius of its own
        parts, radius = parts_of(wide)
        assert abs(sum(parts) - truth) <= radius


def test_a_decision_that_balls_cannot_make_is_no_guess() -> None:
    with bits(60):
        third = exact(np.array(1)) / 3
        nothing = third * 3 - 1  # 0, but the balls do not know
        for decide in (lambda x: x.above(0), lambda x: x.is_zero(), lambda x: (x + 1).floor()):
            with pytest.raises(UndecidedError, match=r"[Mm]ore bits"):
                decide(nothing)
        assert third.above(0.25) and not third.above(0.5) and not exact(np.array(0)).above(0)
        assert exact(np.array(0)).is_zero() and not third.is_zero()
        assert (third + 2).floor().contains(np.array(2.0))


def test_more_bits_give_a_smaller_ball_inside() -> None:
    x = np.random.default_rng(0).normal(size=(4, 5))

    def made(precision: int) -> Balls:
        with bits(precision):
            y = exact(x)
            return ((y @ y.T).tanh() / 3).exp()

    few_bits, many = made(60), made(160)
    with bits(160):
        assert many.within(few_bits).all() and many.overlaps(few_bits).all()
        assert (many.radii() < few_bits.radii() / 2**80).all()
        assert not few_bits.within(many).any()


def test_precision_is_what_it_was_before() -> None:
    before = balls.flint.ctx.prec
    with bits(200), pytest.raises(ZeroDivisionError), bits(300):
        assert balls.flint.ctx.prec == 300
        raise ZeroDivisionError
    assert balls.flint.ctx.prec == before


# ------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dual", [False, True])
def test_shapes_are_numpys(dual: bool) -> None:
    x = np.arange(24.0).reshape(2, 3, 4) + 0.25

    def made(array: np.ndarray) -> Any:
        return Duals(exact(array), exact(2 * array)) if dual else exact(array)

    def value(y: Any) -> np.ndarray:
        if not dual:
            return np.asarray(y.rounded())
        assert np.array_equal(y.derivative.rounded(), 2 * y.value.rounded())
        return np.asarray(y.value.rounded())

    y = made(x)
    assert y.shape == x.shape and y.ndim == 3 and len(y) == 2 and y.real is y
    for f in (
        lambda z: z.reshape(6, 4), lambda z: z.transpose(2, 0, 1), lambda z: z.swapaxes(0, 1),
        lambda z: z[1], lambda z: z[:, np.array([0, 2])], lambda z: z[..., None], lambda z: z.T,
        lambda z: z.sum(axis=0), lambda z: z.sum(axis=-1, keepdims=True), lambda z: z.sum(),
        lambda z: z.mean(axis=1, keepdims=True), lambda z: -z, lambda z: z * 3 - z,
        lambda z: np.concatenate([z, z[:1]], axis=0),
        lambda z: np.broadcast_to(z[:1], (5, 3, 4)),
    ):  # fmt: skip
        assert np.array_equal(value(f(y)), f(x))
    empty = np.zeros_like(y, shape=(3, 2))
    np.add.at(empty, np.array([0, 2, 0]), made(np.ones((3, 2))))
    assert np.array_equal(value(empty), [[2, 2], [0, 0], [1, 1]])
    empty[1] = made(np.full(2, 7.0))
    assert np.array_equal(value(empty)[1], [7, 7])
    assert np.isfinite(y).all()


@few(30)
@given(st.integers(0, 1000))
def test_duals_are_the_rules_of_calculus(seed: int) -> None:
    """A product, a quotient and a matrix product beside a central difference of 300 bits."""
    rng = np.random.default_rng(seed)
    A, B, V, W = rng.normal(size=(4, 3, 3))

    def f(a: Any, b: Any) -> Any:
        return ((a @ b) * a / (2 + b * b) - b @ a).tanh() @ a

    with bits(300):
        h = exact(np.array(2.0**-60))
        got = f(Duals(exact(A), exact(V)), Duals(exact(B), exact(W)))
        plus = f(exact(A) + h * exact(V), exact(B) + h * exact(W))
        minus = f(exact(A) - h * exact(V), exact(B) - h * exact(W))
        gap = (got.derivative - (plus - minus) / (2 * h)).most()
        assert gap.max() < 1e-30 * (1 + got.derivative.most().max())
        assert got.derivative.most().min() > 0


def test_a_choice_between_duals_and_constants_has_one_shape() -> None:
    one = Duals(exact(np.array(2.0)), exact(np.array(3.0)))
    made = chosen(np.array(True), exact(np.ones(4)), one)
    assert made.shape == made.derivative.shape == (4,) and made.derivative.is_zero().all()
    made = chosen(np.array([True, False]), one, exact(np.ones(2)))
    assert np.array_equal(made.value.rounded(), [2, 1])
    assert np.array_equal(made.derivative.rounded(), [3, 0])


def test_constants_beside_duals_have_no_derivative() -> None:
    x, v = exact(np.array([2.0, 4.0])), exact(np.array([3.0, 5.0]))
    dual, whole = Duals(x, v), np.array([1, 2])
    for made, want in (
        (np.concatenate([dual, x]), [3, 5, 0, 0]), (whole - dual, [-3, -5]), (whole + dual, [3, 5]),
        (whole * dual, [3, 10]), (whole / dual, [-3 / 4, -10 / 16]), (x - dual, [-3, -5]),
        (dual / whole, [3, 2.5]), (dual - x, [3, 5]), (x / dual, [-1.5, -1.25]),
    ):  # fmt: skip
        assert np.array_equal(made.derivative.rounded(), want)
    assert np.isfinite(dual).all()
    assert not np.isfinite(Duals(x, v / exact(np.zeros(2)))).any()
    assert not np.isfinite(Duals(x / exact(np.zeros(2)), v)).any()


def test_an_error_says_no_address() -> None:
    assert f"{exact(np.ones((2, 3)))}" == "<Balls (2, 3)>"
