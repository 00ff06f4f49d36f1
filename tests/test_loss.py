"""Labels, rows, sampling and cross-entropy, each against its definition in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext

import numpy as np
import oracles
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, assert_within, cases

from refcurv.law import tolerance
from refcurv.law.checks import NonFiniteError, RangeError
from refcurv.model.labels import shift_labels
from refcurv.model.loss import (
    CACHED,
    _log1p,
    cross_entropy,
    few_rows,
    hessian_product,
    root_product,
)
from refcurv.model.rows import reached
from refcurv.model.sampling import draw_labels, signs, uniforms


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 13))
def test_uniforms_are_philox_by_hand(seed: int, draw: int, index: int, length: int) -> None:
    got = uniforms(seed, draw, index, length)
    assert got.tolist() == [oracles.uniform(seed, draw, index, t) for t in range(length)]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 2**30),
    st.integers(1, 600),
)
@example(0, 0, 0, 0, 650)
def test_signs_are_philox_by_hand(seed: int, draw: int, index: int, t: int, size: int) -> None:
    got = signs(seed, draw, index, t, size)
    assert got.tolist() == [sign_by_hand(seed, draw, index, t, v) for v in range(size)]


def sign_by_hand(seed: int, draw: int, index: int, t: int, v: int) -> int:
    """SAMPLING: the sign of entry v at position t, one bit of one word."""
    n = v // 64
    word = oracles.philox4x64([1 + n // 4, 1 + t, draw, index], [seed, 0])[n % 4]
    return 1 if word >> (v % 64) & 1 else -1


def test_signs_are_even_and_independent_of_position_draw_and_sequence() -> None:
    many = np.stack([signs(1, d, i, t, 512) for d in (0, 1) for i in (0, 1) for t in (0, 1)])
    C = many.astype(float) @ many.T.astype(float) / 512
    assert np.abs(C - np.eye(8)).max() < 4.5 / np.sqrt(512)  # p < 2e-4 for 28 pairs, seed fixed
    assert np.abs(many.mean(axis=1)).max() < 4.5 / np.sqrt(512)


def test_philox_by_hand_matches_the_published_vector() -> None:
    """Known-answer test of Random123 for Philox4x64-10: all zeros, and all ones."""
    assert oracles.philox4x64([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C
    ones = oracles.philox4x64([oracles.MASK] * 4, [oracles.MASK] * 2)
    assert ones[0] == 0x87B092C3013FE90B


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True])
def test_seeds_outside_64_bits_are_refused(seed: object) -> None:
    with pytest.raises(RangeError, match="uniforms: seed"):
        uniforms(seed, 0, 0, 3)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="signs: seed"):
        signs(seed, 0, 0, 0, 3)  # type: ignore[arg-type]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(0.1, 50))
def test_labels_are_drawn_by_the_law(seed: int, vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(20, vocabulary)) * spread
    u = rng.random(20)
    u[:2] = 0, 1 - 2**-53
    want = [oracles.draw_label(z, x) for z, x in zip(logits, u, strict=True)]
    assert draw_labels(logits, u).tolist() == want


def test_a_uniform_that_rounds_up_to_the_total_draws_the_last_possible_label() -> None:
    logits = np.array([[0.0, 0.0, 0.0, -2000.0]])
    assert draw_labels(logits, np.array([1.0])).tolist() == [2]  # 1.0 stands for u·c = c


def test_drawn_labels_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    u = uniforms(3, 0, 0, 40_000)
    share = np.bincount(draw_labels(np.tile(logits, (len(u), 1)), u)) / len(u)
    sigma = np.sqrt(0.25 / len(u))
    assert np.abs(share - [0.5, 0.3, 0.2]).max() < 4 * sigma  # p < 1e-4, seed fixed


def test_sampling_depends_on_position_and_sequence_only() -> None:
    """O53: whatever the batch, sequence 7 gets the labels of sequence 7."""
    long = uniforms(5, 1, 7, 100)
    assert (uniforms(5, 1, 7, 10) == long[:10]).all()
    assert not (uniforms(5, 1, 8, 100) == long).any()
    assert not (uniforms(5, 2, 7, 100) == long).any()
    assert not (uniforms(6, 1, 7, 100) == long).any()


@given(cases())
def test_reached_rows_by_brute_force(one: Case) -> None:
    got = reached(one.label, one.real, one.segment)
    assert (got == oracles.reached(one.label, one.real, one.segment)).all()


def test_default_labels_by_hand() -> None:
    token = np.array([[5, 6, 7, 8, 9]])
    real = np.array([[True, True, True, True, False]])
    segment = np.array([[0, 0, 1, 1, 1]])
    assert shift_labels(token, real, segment).tolist() == [[6, -1, 8, -1, -1]]


def test_cross_entropy_by_hand() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75]]))
    nats, slope = cross_entropy(logits, np.array([0, 1, -1]))
    assert np.allclose(nats, [np.log(4), np.log(4 / 3), 0], rtol=1e-15)
    assert np.allclose(slope, [[-0.75, 0.75], [0.25, -0.25], [0, 0]], rtol=1e-15)


def test_cross_entropy_survives_huge_logits() -> None:
    nats, slope = cross_entropy(np.array([[1e4, -1e4]]), np.array([1]))
    assert nats.tolist() == [2e4]
    assert slope.tolist() == [[1, -1]]


def test_log1p_of_a_complex_number() -> None:
    x = np.array([0.25 + 0.5j, -0.5 + 2j, 3 - 1j])
    assert np.allclose(_log1p(x), np.log(1 + x), rtol=1e-15)
    assert (_log1p(np.array([1e-20 + 1e-25j])) == 1e-20 + 1e-25j).all()


# ------------------------------------------------------------------ every digit

LIMIT = {np.float32: 190.0, np.float64: 1500.0, np.longdouble: 22_000.0}
"""exp(−LIMIT / 2) is just below the smallest normal number: the reach of the roots of p."""


@pytest.fixture(autouse=True)
def _many_digits() -> Iterator[None]:
    with localcontext(prec=50):
        yield


def decimal(x: np.floating) -> Decimal:
    """The number itself, whatever its dtype."""
    fraction, exponent = np.frexp(x)
    high = float(fraction)
    low = Decimal(float(fraction - type(x)(high)))
    return (Decimal(high) + low) * Decimal(2) ** int(exponent)


class Digits:
    """p, 1 − p, −log p of one row in 40 digits, by sums in which nothing cancels.

    `far` is how many roundings a rounding of the logits is for each p: the distance to the largest;
    for the largest itself, whose 1 − p is the sum of the others, the mean of theirs. With 0 on top
    the distances are the logits and exact.
    """

    def __init__(self, z_V: np.ndarray) -> None:
        z = [decimal(x) for x in z_V]
        top, V = max(z), range(len(z))
        e = [(x - top).exp() for x in z]
        others = [sum((e[w] for w in V if w != v), Decimal(0)) for v in V]
        self.p = [one / sum(e) for one in e]
        self.left = [one / sum(e) for one in others]
        self.nats = [self._log1p(others[v] / e[v]) for v in V]
        self.far = [float(top - x) if top else 0.0 for x in z]
        k = z.index(top)
        if others[k]:
            self.far[k] = float(sum(e[v] * Decimal(self.far[v]) for v in V if v != k) / others[k])

    @staticmethod
    def _log1p(x: Decimal) -> Decimal:
        if x > Decimal("1e-12"):
            return (1 + x).ln()
        return x - x**2 / 2 + x**3 / 3 - x**4 / 4

    def root(self, v: int, w: int) -> Decimal:
        """S[v, w], S = diag(√p) − p √pᵀ."""
        return self.p[w].sqrt() * (self.left[v] if v == w else -self.p[v])

    def hessian(self, v: int, w: int) -> Decimal:
        return self.p[w] * (self.left[v] if v == w else -self.p[v])


def assert_digits(got: np.floating, terms: list[tuple[Decimal, float]], what: str) -> None:
    """got is the sum of the terms (value, roundings of its logits), but for roundings of each.

    Budget: 2 V for the sums over the vocabulary, 16 for what is done with them, twice.
    Observed: 26 % of it.
    """
    dtype, number = type(got), np.finfo(type(got))
    want = sum((term for term, _ in terms), Decimal(0))
    roundings = sum(Decimal(far + 2 * len(terms) + 32) * abs(term) for term, far in terms)
    below = decimal(number.smallest_normal) * len(terms)
    allowed = roundings * decimal(number.eps) / 2 + below * (
        8 * decimal(number.eps) if abs(want) >= decimal(number.smallest_normal) else 1
    )
    error = abs(decimal(got) - want)
    assert error <= allowed, f"{what} in {dtype.__name__}: {got!r} for {want:.25e}"


@st.composite
def certain_logits(draw: st.DrawFn, dtype: type) -> np.ndarray:
    """One row (1, V): any distances to the largest, ties among them, at any height."""
    gap = st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 60), st.floats(0, LIMIT[dtype]))
    gaps = [0.0, *draw(st.lists(gap, max_size=4))]
    top = draw(st.sampled_from([0.0, 0.0, 3.7, -250.0]))
    return np.array([[top - x for x in draw(st.permutations(gaps))]]).astype(dtype)


FLOATS = pytest.mark.parametrize("dtype", list(LIMIT))


@FLOATS
@given(st.data())
def test_every_digit_of_the_gradient_and_of_the_nats(dtype: type, data: st.DataObject) -> None:
    """From p = 1 − 1e-300 to 1e-300, and to the smallest normal numbers."""
    logit = data.draw(certain_logits(dtype))
    truth, V = Digits(logit[0]), logit.shape[1]
    for label in range(V):
        nats, slope = cross_entropy(logit, np.array([label]))
        assert nats.dtype == slope.dtype == dtype
        k = int(logit[0].argmax())
        assert_digits(nats[0], [(truth.nats[label], truth.far[k])], "nats")
        for v in range(V):
            want = -truth.left[v] if v == label else truth.p[v]
            assert_digits(slope[0, v], [(want, truth.far[v])], f"entry {v} against {label}")


@FLOATS
@given(st.data())
def test_every_digit_of_the_roots_and_of_the_hessian(dtype: type, data: st.DataObject) -> None:
    """Columns to their last digits, products to those of their terms."""
    logit = data.draw(certain_logits(dtype))
    truth, V = Digits(logit[0]), range(logit.shape[1])
    for product, entry in ((root_product, truth.root), (hessian_product, truth.hessian)):
        S = columns(product, logit)[0]
        signs = np.array([data.draw(st.sampled_from([-1, 1])) for _ in V], np.int8)
        joint = product(logit, signs[None])[0]
        assert joint.dtype == S.dtype == dtype
        for v in V:
            each = [(entry(v, w), truth.far[v] + truth.far[w]) for w in V]
            for w in V:
                assert_digits(S[v, w], [each[w]], f"{product.__name__} [{v}, {w}]")
            terms = [(int(one) * x, far) for one, (x, far) in zip(signs, each, strict=True)]
            assert_digits(joint[v], terms, f"{product.__name__} {signs}")


@FLOATS
def test_text_known_by_heart(dtype: type) -> None:
    """The gradient's entry of a sure label is −Σ of the others, its nats their sum."""
    smallest = float(-np.log(np.finfo(dtype).smallest_normal))
    for gap in np.linspace(1, min(smallest, LIMIT[dtype]) - 1, 60):
        logit = np.array([[0, -gap, -gap - 1, -gap - 2.5]]).astype(dtype)
        nats, slope = cross_entropy(logit, np.array([0]))
        others = slope[0, 1:].sum()
        assert abs(slope[0, 0] + others) <= 4 * np.finfo(dtype).eps * others
        odds = np.exp(logit[0, 1:]).sum()
        assert abs(nats[0] - np.log1p(odds)) <= 4 * np.finfo(dtype).eps * nats[0]
        assert nats[0] > 0


@FLOATS
def test_between_a_half_and_certainty(dtype: type) -> None:
    """Of two entries the label's is −1/(1 + exp(gap)); p − 1 would lose a digit from 0.9 on."""
    for gap in np.linspace(0.01, 12, 500).astype(dtype):
        _, slope = cross_entropy(np.array([[gap, 0]], dtype), np.array([0]))
        want = -1 / (1 + np.exp(gap.astype(np.longdouble)))
        assert abs(slope[0, 0] - want) <= 3 * np.finfo(dtype).eps * (1 + gap / 8) * -want


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, np.clongdouble])
@given(st.data())
def test_a_complex_step_keeps_every_digit(dtype: type, data: st.DataObject) -> None:
    """Of nats and gradient the real parts are the real ones, the imaginary ones their slopes."""
    real = np.zeros(0, dtype).real.dtype.type
    logit = data.draw(certain_logits(real))
    h, eps, V = real(2**-30), np.finfo(real).eps, logit.shape[1]
    tiny, truth = np.finfo(real).smallest_normal, Digits(logit[0])
    step = np.array([[data.draw(st.integers(-3, 3)) for _ in range(V)]]).astype(real)
    for label in range(V):
        nats, slope = cross_entropy(logit + 1j * h * h * step, np.array([label]))
        assert nats.dtype == slope.dtype == dtype
        real_nats, real_slope = cross_entropy(logit, np.array([label]))
        assert (abs(nats.real - real_nats) <= 8 * eps * real_nats + tiny).all()
        assert (abs(slope.real - real_slope) <= 8 * eps * abs(real_slope) + tiny).all()
        far = max(far for far, p in zip(truth.far, truth.p, strict=True) if p > decimal(tiny))
        within = eps * (V + 16 + far)
        error = nats.imag / h / h - (real_slope * step).sum()
        assert abs(error) <= within * (abs(real_slope * step).sum()) + tiny / h / h
        size = columns(hessian_product, logit)[0]
        error = slope.imag[0] / h / h - hessian_product(logit, step)[0]
        assert (abs(error) <= within * (abs(size) @ abs(step[0])) + tiny / h / h).all()


def test_nothing_but_the_truth_of_logits_at_the_ends_of_the_range() -> None:
    """Distances that overflow are entries that cannot come, as −inf is."""
    most = np.finfo(np.float64).max
    for top, low in ((most, -most), (most, -np.inf), (0.0, -np.inf), (-1e300, -most)):
        with warnings.catch_warnings(action="error"):
            nats, slope = cross_entropy(np.array([[low, top], [low, top]]), np.array([1, 0]))
        assert nats.tolist() == [0, top - low if top < 0 else np.inf]
        assert slope.tolist() == [[0, 0], [-1, 1]]
        assert not np.signbit(slope[0]).any()
    nats, slope = cross_entropy(np.array([[5.0], [7.0]]), np.array([0, -1]))
    assert nats.tolist() == [0, 0]
    assert slope.tolist() == [[0], [0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_logits_that_are_no_numbers_are_refused(bad: float, dtype: type) -> None:
    """Also where all else would come out finite: one entry, or −inf beside +inf."""
    for row in ([bad], [bad, 0], [0, bad], [-np.inf, bad], [bad, bad]):
        logit = np.array([[0.0] * len(row), row]).astype(dtype)
        said = rf"loss: the largest logit .*{bad}.* at \[1\].*check the weights"
        with warnings.catch_warnings(action="error"):
            for label in (np.array([0, 0]), np.array([-1, -1])):
                with pytest.raises(NonFiniteError, match=said):
                    cross_entropy(logit, label)
            for product in (root_product, hessian_product):
                with pytest.raises(NonFiniteError, match=said):
                    product(logit, np.ones(logit.shape))


def some_logits(
    seed: int, vocabulary: int, spread: float, dtype: object = np.float64
) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(3, vocabulary)) * spread).astype(dtype)


def columns(product: Callable[..., np.ndarray], logit: np.ndarray) -> np.ndarray:
    """The matrix (N, V, V) of a product, one column at a time."""
    N, V = logit.shape
    each = [product(logit, np.tile(e, (N, 1))) for e in np.eye(V, dtype=logit.dtype)]
    return np.stack(each, axis=-1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([0.1, 1.0, 20.0]))
def test_O11_the_hessian_is_the_complex_step_of_the_gradient(
    seed: int, vocabulary: int, spread: float
) -> None:
    # observed: 3 % of the budget
    logit, label = some_logits(seed, vocabulary, spread), np.array([0, vocabulary - 1, 0])
    v = np.random.default_rng(seed).normal(size=logit.shape)
    truth = cross_entropy(logit + 1e-30j * v, label)[1].imag / 1e-30
    p = cross_entropy(logit, label)[1] + np.eye(vocabulary)[label]
    scale = p * np.abs(v) + p * (p * np.abs(v)).sum(axis=-1, keepdims=True)
    budget = tolerance.gamma(vocabulary + 64, np.float64) * (1 + spread)
    assert_within(hessian_product(logit, v), truth, budget, scale, "H v")


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.sampled_from([0.1, 1.0, 20.0]),
    st.sampled_from([np.float32, np.float64, np.longdouble]),
)
def test_O11_the_root_times_its_transpose_is_the_hessian(
    seed: int, vocabulary: int, spread: float, dtype: type
) -> None:
    logit = some_logits(seed, vocabulary, spread, dtype)
    S, H = columns(root_product, logit), columns(hessian_product, logit)
    assert S.dtype == H.dtype == dtype
    nats = [cross_entropy(logit, np.full(3, v))[0] for v in range(vocabulary)]
    p = np.exp(-np.stack(nats, axis=-1))
    largest = p[:, :, None] * np.sqrt(p)[:, None, :] + np.sqrt(p)[:, None, :] * np.eye(vocabulary)
    budget = tolerance.gamma(2 * vocabulary + 64, dtype)
    scale = largest @ largest.swapaxes(-1, -2)
    assert_within(S @ S.swapaxes(-1, -2), H, budget, scale, "S Sᵀ")
    for v in range(vocabulary):  # column v is −√p_v times the gradient against label v
        slope = cross_entropy(logit, np.full(3, v))[1]
        want = -np.sqrt(p[:, v])[:, None] * slope
        assert_within(S[:, :, v], want, budget * (1 + spread), largest[:, :, v], "column of S")


def test_O11_the_root_has_rank_one_less_than_the_vocabulary() -> None:
    for S in columns(root_product, some_logits(0, 6, 1.0)):
        values = np.linalg.svd(S, compute_uv=False)
        assert values[-1] < 1e-15
        assert values[-2] > 1e-3


def test_products_of_many_rows_are_those_of_each() -> None:
    """Rows are worked on a few at a time: more of them than one portion holds."""
    logit = np.random.default_rng(0).normal(size=(300, 700))
    e = np.random.default_rng(1).normal(size=logit.shape)
    for product in (root_product, hessian_product):
        alone = [product(logit[n : n + 1], e[n : n + 1]) for n in range(len(logit))]
        assert (product(logit, e) == np.concatenate(alone)).all()


def test_labels_of_huge_logits() -> None:
    """Rows 2e4 apart; the last two labels of the second row are impossible."""
    logits = np.array([[1e4, 1e4, 1e4, 1e4], [-1e4, -1e4, -2e4, -2e4]])
    with np.errstate(over="raise", invalid="raise"):
        assert draw_labels(logits, np.array([0.6, 0.6])).tolist() == [2, 1]
        assert draw_labels(logits, np.array([1.0, 1.0])).tolist() == [3, 1]
        assert draw_labels(logits[1:], np.array([0.1])).tolist() == [0]


def test_a_label_ends_where_the_next_begins() -> None:
    """c_v > u·c_{V−1} is strict: half of two equals is the second; 0 is no impossible label."""
    assert draw_labels(np.array([[0.0, 0.0], [-2000.0, 0.0]]), np.array([0.5, 0.0])).tolist() == [
        1,
        1,
    ]


def test_labels_of_float32_logits_are_drawn_in_float64() -> None:
    """u·c a hair below and above c_150 of the float64 sums, where float32 ones err by far more."""
    logits = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32)
    before = logits.tobytes()
    wide = logits.astype(np.float64)
    c = np.cumsum(np.exp(wide - wide.max(axis=-1, keepdims=True)), axis=-1)
    u = c[:, 150] / c[:, -1]
    assert (draw_labels(logits, u * (1 - 1e-12)) == 150).all()
    assert (draw_labels(logits, u * (1 + 1e-12)) == 151).all()
    assert logits.tobytes() == before


@pytest.mark.parametrize("vocabulary", [1, 700, 2**17, 2**17 + 1])
def test_rows_are_worked_on_a_portion_at_a_time(vocabulary: int) -> None:
    """As many as fit CACHED logits, and never none: a vocabulary may be larger than that."""
    rows = 2 * CACHED // vocabulary + 3
    logits = np.broadcast_to(0.0, (rows, vocabulary))
    portions = list(few_rows(logits))
    assert [n for part in portions for n in range(rows)[part]] == list(range(rows))
    size = portions[0].stop - portions[0].start
    assert size == 1 or size * vocabulary <= CACHED
    assert (size + 1) * vocabulary > CACHED
    assert all(part.stop - part.start == size for part in portions)


def test_reached_rows_by_hand() -> None:
    """A segment of one, at the end; a label on padding reaches back, yet padding is no row."""
    label = np.array([[-1, 3, -1, -1, 2], [-1, 1, -1, 1, 4]])
    real = np.array([[True] * 5, [True] * 4 + [False]])
    segment = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 2, 2]])
    assert reached(label, real, segment).tolist() == [
        [True, True, False, False, True],
        [True, True, False, True, False],
    ]
