"""Eigenvalues, traces and spectra from products alone against dense algebra, and error bars."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator
from strategies import assert_within

from refcurv.algebra import matrix_free
from refcurv.algebra.matrix_free import (
    extreme_eigenvalues,
    hutchinson,
    spectral_density,
    xtrace,
)
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    NonFiniteError,
    NotSymmetricError,
    RangeError,
    ShapeError,
    SolverError,
)

SEEDS = st.integers(0, 2**64 - 1)


class Matrix:
    """The least that an operator must be; keeps what it was multiplied by."""

    def __init__(self, H: np.ndarray) -> None:
        self.H, self.shape, self.seen = H, H.shape, []

    def matvec(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(x.copy())
        return self.H * x if self.H.ndim == 1 else self.H @ x


def symmetric(spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    """A matrix with this spectrum and random eigenvectors, exactly symmetric."""
    n = len(spectrum)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    H = (Q * spectrum) @ Q.T
    return (H + H.T) / 2


def diagonal(spectrum: np.ndarray) -> Matrix:
    made = Matrix(np.asarray(spectrum, dtype=float))
    made.shape = (len(spectrum), len(spectrum))
    return made


@st.composite
def spectra(draw: st.DrawFn, most: int = 40) -> np.ndarray:
    """Spread, decaying, of low rank, of few distinct values; of either sign and any scale."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["spread", "decaying", "low rank", "repeated"]))
    if kind == "spread":
        x = rng.normal(size=n)
    elif kind == "decaying":
        x = np.exp(-rng.random() * np.arange(n)) * rng.choice([-1, 1], n)
    elif kind == "low rank":
        x = rng.normal(size=n) * (np.arange(n) < n / 3)
    else:
        x = rng.integers(-1, 3, n).astype(float)
    return x * 10.0 ** draw(st.integers(-20, 5))


# ------------------------------------------------------------------ ends of the spectrum


def ends(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """What `extreme_eigenvalues` is to return, from all eigenvalues."""
    down = -np.sort(-values)
    if which == "both":
        return down if 2 * k >= len(down) else np.r_[down[:k], down[-k:]]
    return down[:k] if which == "largest" else down[max(len(down) - k, 0) :]


@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from(["largest", "smallest", "both"]),
    SEEDS,
    st.integers(-60, 60),
)
@example(60, 2, "largest", 0, -60)
@example(60, 2, "smallest", 0, 0)
def test_extreme_eigenvalues_equal_the_dense_ones(
    P: int, k: int, which: str, seed: int, sigma: int
) -> None:
    """Distinct eigenvalues, gap 1: each errs by residual² at most (Kato and Temple), and rounding.

    Observed 0.2 of the budget.
    """
    spectrum = np.arange(P) + sigma + 0.5
    H = symmetric(spectrum, P)
    got = extreme_eigenvalues(Matrix(H), k, which, seed)
    want = ends(spectrum, k, which)
    budget = tolerance.eigenpair(P) * np.abs(spectrum).max()
    assert got.values.shape == want.shape == got.residuals.shape
    assert np.all(np.abs(got.values - want) <= budget + got.residuals**2)
    assert got.vectors.shape == (P, len(want))


@given(spectra(50), st.integers(1, 4), st.sampled_from(["largest", "smallest", "both"]), SEEDS)
@example(np.array([-5.0, -4, 7, 6, -5, -5, 0, 7]), 8, "both", 0)  # LAPACK's evr: 4.5 budgets
def test_an_eigenvalue_lies_within_each_residual(
    spectrum: np.ndarray, k: int, which: str, seed: int
) -> None:
    P = len(spectrum)
    H = symmetric(spectrum, P)
    scale = np.abs(spectrum).max()
    budget = tolerance.eigenpair(P) * scale
    got = extreme_eigenvalues(Matrix(H), k, which, seed)
    U, values = got.vectors, got.values
    nearest = np.abs(values[:, None] - np.linalg.eigvalsh(H)).min(axis=1)
    assert np.all(nearest <= got.residuals + budget)
    measured = np.linalg.norm(H @ U - U * values, axis=0)
    assert np.all(np.abs(measured - got.residuals) <= budget)
    assert np.all(got.residuals <= matrix_free.HALF_THE_DIGITS * scale + budget)
    assert np.linalg.norm(U.T @ U - np.eye(len(values))) <= tolerance.eigenpair(P) * math.sqrt(P)
    assert np.all(np.diff(values) <= 0)
    assert np.all(U[np.abs(U).argmax(axis=0), np.arange(len(values))] > 0)


@pytest.mark.parametrize(
    "spectrum",
    [np.exp(-np.arange(60.0)), np.r_[np.ones(3), np.zeros(57)], 1e-30 * np.exp(-np.arange(60.0))],
    ids=["decaying", "rank-3", "decaying-1e-30"],
)
def test_the_null_end_of_a_psd_matrix_is_found(spectrum: np.ndarray) -> None:
    """ARPACK alone asks for digits of each eigenvalue that products do not have, and never ends.

    And below a scale of 1e-11 it asks for next to none.
    """
    top = spectrum.max()
    got = extreme_eigenvalues(diagonal(spectrum), 3, "both")
    U, values = got.vectors, got.values
    measured = np.linalg.norm(spectrum[:, None] * U - U * values, axis=0)
    assert np.abs(measured - got.residuals).max() <= tolerance.eigenpair(60) * top
    assert np.all(got.residuals <= matrix_free.HALF_THE_DIGITS * top)
    assert np.all(np.abs(got.values[3:]) <= 4 * matrix_free.HALF_THE_DIGITS * top)
    assert np.allclose(got.values[:3], spectrum[:3], rtol=1e-13, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("P", [1, 4, 60])
def test_multiples_of_the_identity(P: int, value: float) -> None:
    got = extreme_eigenvalues(diagonal(np.full(P, value)), 2, "both")
    assert got.values.shape == (min(P, 4),)
    assert np.allclose(got.values, value, rtol=1e-15, atol=0)
    assert np.allclose(got.vectors.T @ got.vectors, np.eye(min(P, 4)), rtol=0, atol=1e-14)


def test_lanczos_without_convergence_says_what_to_do() -> None:
    with pytest.raises(RangeError, match="allow more restarts or less accuracy"):
        extreme_eigenvalues(diagonal(np.linspace(0, 1, 2000)), 3, restarts=2)


# ------------------------------------------------------------------ traces


def test_hutchinson_is_the_mean_over_its_probes() -> None:
    H, n = symmetric(np.arange(70.0)), 8
    A = Matrix(H)
    got = hutchinson(A, n, 5)
    each = np.array([z @ H @ z for z in A.seen])
    assert got.value == pytest.approx(each.mean(), rel=1e-14)
    square = ((each - each.mean()) ** 2).sum() / (n - 1)
    assert got.standard_error == pytest.approx(math.sqrt(square / n), rel=1e-12)
    assert got.samples == len(A.seen) == n


@given(spectra(), st.integers(2, 5), SEEDS)
def test_hutchinson_is_exact_for_a_diagonal(spectrum: np.ndarray, samples: int, seed: int) -> None:
    got = hutchinson(diagonal(spectrum), samples, seed)
    rounding = tolerance.gamma(len(spectrum) + samples + 1, np.float64) * np.abs(spectrum).sum()
    assert abs(got.value - math.fsum(spectrum)) <= rounding
    assert got.standard_error <= rounding


def leave_one_out(H: np.ndarray, Omega: np.ndarray) -> np.ndarray:
    """The m estimates of XTrace by their definition, each with a QR of its own."""
    P, m = Omega.shape
    each = []
    for i in range(m):
        Q, _ = np.linalg.qr(H @ np.delete(Omega, i, axis=1))
        x = Omega[:, i] - Q @ (Q.T @ Omega[:, i])
        each.append(np.trace(Q.T @ H @ Q) + (P - m + 1) * (x @ H @ x) / (x @ x))
    return np.array(each)


@given(st.integers(0, 30), st.integers(2, 12), SEEDS)
def test_xtrace_equals_its_definition(more: int, m: int, seed: int) -> None:
    """With P ≥ 2m, so that no ‖x_i‖ is a small part of ‖ω_i‖, which rounding is divided by.

    Observed 0.02 of the budget; with P − m for P − m + 1, at least 1e7 of it.
    """
    P = 2 * m + more
    spectrum = np.random.default_rng(seed).uniform(1, 2, P) * (-1) ** np.arange(P)
    A = Matrix(symmetric(spectrum, P))
    got = xtrace(A, 2 * m, seed)
    assert got.samples == len(A.seen) == 2 * m
    want = leave_one_out(A.H, np.column_stack(A.seen[:m]))
    scale, budget = np.abs(spectrum).sum(), 8 * tolerance.eigenpair(P)
    assert_within(got.value, want.mean(), budget, scale, "value")
    assert_within(got.standard_error, want.std(ddof=1) / math.sqrt(m), budget, scale, "error")


@given(st.integers(0, 30), st.integers(2, 12), st.integers(0, 10), SEEDS)
def test_xtrace_is_exact_for_low_rank(more: int, m: int, rank: int, seed: int) -> None:
    """Dense, and diagonal, where most rows of H are exactly 0. P ≥ 2m as above.

    Observed 0.04 of the budget; at rank m, at least 1e13 of it.
    """
    P, rank = 2 * m + more, min(rank, m - 2)
    spectrum = np.random.default_rng(seed).uniform(1, 2, P) * (-1) ** np.arange(P)
    spectrum *= np.arange(P) < rank
    budget = tolerance.eigenpair(P) * np.abs(spectrum).sum()
    for A in (Matrix(symmetric(spectrum, P)), diagonal(spectrum)):
        got = xtrace(A, 2 * m, seed)
        assert abs(got.value - spectrum.sum()) <= budget
        assert got.standard_error <= budget


def test_xtrace_needs_one_probe_more_than_the_rank() -> None:
    budget = tolerance.eigenpair(50)
    for rank, exact in ((9, True), (10, False)):
        spectrum = 1.0 * (np.arange(50) < rank)
        got = xtrace(Matrix(symmetric(spectrum)), 20, 1)
        assert (abs(got.value - rank) <= budget * rank) == exact
        assert (got.standard_error <= budget * rank) == exact


@pytest.mark.parametrize("P", [2, 3, 17])
def test_xtrace_with_2P_samples_is_exact(P: int) -> None:
    spectrum = np.arange(P) - 1.5
    got = xtrace(Matrix(symmetric(spectrum)), 2 * P, 3)
    assert abs(got.value - spectrum.sum()) <= tolerance.eigenpair(P) * np.abs(spectrum).sum()


def test_xtrace_beats_hutchinson() -> None:
    """On the spectrum 0.7ⁱ with 40 products, root mean square error over 30 seeds.

    Observed a factor of 244; asserted 100. On 0.97ⁱ, which 20 directions do not catch, 0.87.
    """
    spectrum = 0.7 ** np.arange(100)
    A, want = Matrix(symmetric(spectrum)), spectrum.sum()
    x = [xtrace(A, 40, seed).value - want for seed in range(30)]
    h = [hutchinson(A, 40, seed).value - want for seed in range(30)]
    assert np.linalg.norm(h) > 100 * np.linalg.norm(x)


# ------------------------------------------------------------------ error bars


def moment_2(A: Matrix, probes: int, seed: int) -> matrix_free.Estimate:
    return spectral_density(A, probes, 2, seed).moment(2)


@pytest.mark.parametrize(
    ("estimate", "samples", "quantity", "within_1", "within_2"),
    [
        (hutchinson, 30, np.sum, (109, 161), (177, 200)),
        (moment_2, 30, lambda x: np.mean(x**2), (109, 161), (177, 200)),
        (xtrace, 20, np.sum, (80, 148), (150, 196)),
    ],
    ids=["hutchinson", "spectral_density", "xtrace"],
)
def test_standard_errors_are_calibrated(estimate, samples, quantity, within_1, within_2) -> None:
    """Of 200 seeds, how many err by less than 1 and 2 standard errors.

    Hutchinson and moments: binomial around Student's t with 29 degrees of freedom (135 and 189),
    the band ± 4 standard deviations (6.6 and 3.2): a right error bar fails it with probability
    2e-4. Observed 139 and 188; 133 and 189. XTrace: its terms share probes, so that its error bar
    is known to be short; the band is around the observed 116 and 178, and says no more.
    """
    spectrum = np.random.default_rng(0).normal(size=60)
    A, want = Matrix(symmetric(spectrum, 1)), quantity(spectrum)
    made = [estimate(A, samples, seed) for seed in range(200)]
    z = np.array([abs(e.value - want) / e.standard_error for e in made])
    assert within_1[0] <= (z < 1).sum() <= within_1[1]
    assert within_2[0] <= (z < 2).sum() <= within_2[1]
    mean = np.mean([e.value for e in made]) - want  # unbiased, to 4 standard errors
    assert abs(mean) <= 4 * np.std([e.value for e in made]) / math.sqrt(200)


# ------------------------------------------------------------------ spectrum


@given(spectra(), st.integers(2, 3), st.integers(1, 8), SEEDS)
def test_moments_of_each_probe_are_exact(
    spectrum: np.ndarray, probes: int, steps: int, seed: int
) -> None:
    """Degrees up to 2·steps − 1. Observed 0.06 of the budget."""
    P, scale = len(spectrum), np.abs(spectrum).max()
    A = Matrix(symmetric(spectrum, P))
    got = spectral_density(A, probes, steps, seed)
    assert got.products == len(A.seen) <= probes * steps
    for i in range(probes):
        z = matrix_free._signs(seed, i, P)
        v = z.copy()
        for k in range(2 * steps):
            moment = got.weights[i] @ got.nodes[i] ** k
            budget = (k + 1) * tolerance.eigenpair(P + steps) * scale**k
            assert abs(moment - z @ v / P) <= budget, (i, k)
            v = A.H @ v


def test_one_degree_more_is_not_exact() -> None:
    A, steps = Matrix(symmetric(np.arange(20.0))), 3
    got, z = spectral_density(A, 2, steps, 0), matrix_free._signs(0, 0, 20)
    moment = z @ np.linalg.matrix_power(A.H, 2 * steps) @ z / 20
    assert abs(got.weights[0] @ got.nodes[0] ** (2 * steps) - moment) > 1e-4 * moment


@given(st.integers(1, 5), st.integers(8, 40), st.integers(0, 3), SEEDS)
def test_nodes_are_the_distinct_eigenvalues(distinct: int, P: int, more: int, seed: int) -> None:
    """Any node beside them carries no more than rounding; exhausted spaces end Lanczos."""
    values = np.arange(distinct) - 1.0
    spectrum = np.sort(np.resize(values, P))
    A = Matrix(symmetric(spectrum, P))
    got = spectral_density(A, 2, distinct + more, seed)
    budget = tolerance.eigenpair(P)
    assert got.products == len(A.seen) <= 2 * (distinct + more)
    for nodes, weights in zip(got.nodes, got.weights, strict=True):
        distance = np.abs(nodes[:, None] - values)
        real = distance.min(axis=1) <= budget * distinct
        assert weights[~real].sum() <= budget
        assert np.array_equal(np.unique(distance[real].argmin(axis=1)), np.arange(distinct))


@pytest.mark.parametrize("spectrum", [np.ones(40), np.zeros(40), np.arange(40.0) % 3])
def test_no_product_is_wasted_on_an_exhausted_space(spectrum: np.ndarray) -> None:
    A, distinct = Matrix(symmetric(spectrum)), len(set(spectrum))
    got = spectral_density(A, 2, 9, 0)
    assert got.products == len(A.seen) == 2 * distinct
    assert not got.weights[:, distinct:].any()
    assert np.array_equal(spectral_density(A, 2, 99, 0).nodes.shape, (2, 40))


def test_a_small_coupling_is_not_taken_for_rounding() -> None:
    values = 1 + 1e-6 * np.arange(3)
    got = spectral_density(Matrix(symmetric(np.repeat(values, 20))), 2, 3, 0)
    assert np.abs(got.nodes - values).max() <= tolerance.eigenpair(60)


def test_density_and_cumulative_estimate_the_dense_ones() -> None:
    """At 25 points, to 5 standard errors over 40 probes; the steps exhaust the spectrum."""
    spectrum = np.repeat(np.linspace(-1, 2, 12), 5)
    got = spectral_density(Matrix(symmetric(spectrum)), 40, 12, 7)
    x = np.linspace(-2, 3, 25)
    z = (x[:, None] - spectrum) / 0.3
    smooth = (np.exp(-(z**2) / 2) / (0.3 * math.sqrt(2 * math.pi))).mean(axis=1)
    share = (spectrum <= x[:, None]).mean(axis=1)
    for (value, error), want in ((got.density(x, 0.3), smooth), (got.cumulative(x), share)):
        assert value.shape == error.shape == x.shape
        assert np.all(np.abs(value - want) <= 5 * error + 1e-14)
        assert error.max() < 0.03
    fine = np.linspace(-4, 5, 2001)
    assert got.density(fine, 0.3)[0].sum() * (fine[1] - fine[0]) == pytest.approx(1, abs=1e-9)
    assert got.density(0.5, 0.3)[0] == pytest.approx(got.density(np.array([0.5]), 0.3)[0][0])
    entropy = got.average(lambda nodes: np.log1p(nodes**2))
    assert abs(entropy.value - np.log1p(spectrum**2).mean()) <= 5 * entropy.standard_error
    assert entropy.samples == got.products


def test_asymmetry_is_found_and_noise_of_float32_is_not() -> None:
    H = symmetric(np.linspace(-1, 2, 40))
    noisy = H + np.random.default_rng(0).normal(size=H.shape) * 1e-7
    turned = np.triu(H) + np.triu(H, 1)  # as if the lower triangle had been added to the upper
    for A in (H, noisy):
        spectral_density(Matrix(A), 2, 10, 0)
        extreme_eigenvalues(Matrix(A), 2)
        extreme_eigenvalues(Matrix(A[:9, :9]), 2)
    with pytest.raises(NotSymmetricError, match="missed transpose"):
        spectral_density(Matrix(turned), 2, 2, 0)
    for A in (turned, turned[:9, :9]):  # by Lanczos and by the dense way
        with pytest.raises(NotSymmetricError, match="missed transpose"):
            extreme_eigenvalues(Matrix(A), 2)


@pytest.mark.parametrize("power", [-900, -600, 600, 900])
def test_the_units_of_the_operator_do_not_matter(power: int) -> None:
    """Of 2^k H all answers are 2^k times those of H, errors too, though squares leave the range."""
    H = symmetric(np.linspace(-1, 2, 40) ** 3)
    for P in (12, 40):  # one is solved densely, one by Lanczos
        one, two = (extreme_eigenvalues(Matrix(x[:P, :P]), 2) for x in (H, np.ldexp(H, power)))
        assert_within(np.ldexp(two.values, -power), one.values, 1e-13, one.values, "values")
        assert (np.ldexp(two.residuals, -power) < 1e-6).all()
    for run in (lambda x: hutchinson(x, 6, 0), lambda x: xtrace(x, 12, 0)):
        one, two = run(Matrix(H)), run(Matrix(np.ldexp(H, power)))
        for field in ("value", "standard_error"):
            want = getattr(one, field)
            assert math.ldexp(getattr(two, field), -power) == pytest.approx(want, rel=1e-11)
    one, two = (spectral_density(Matrix(x), 2, 5, 0) for x in (H, np.ldexp(H, power)))
    assert_within(np.ldexp(two.nodes, -power), one.nodes, 1e-12, one.nodes, "nodes")
    mean = two.average(lambda nodes: nodes)
    want = one.average(lambda nodes: nodes)
    assert math.ldexp(mean.standard_error, -power) == pytest.approx(want.standard_error, rel=1e-11)
    skew = np.ldexp(H + np.triu(np.ones_like(H)), power)
    with pytest.raises(NotSymmetricError):
        extreme_eigenvalues(Matrix(skew), 2)
    with pytest.raises(NotSymmetricError):
        spectral_density(Matrix(skew), 2, 5, 0)


def test_a_solver_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("it did not converge")

    H = Matrix(symmetric(np.arange(1.0, 13.0)))
    for solver, run in (
        ("eigh", lambda: extreme_eigenvalues(H, 2)),
        ("svd", lambda: xtrace(H, 4, 0)),
        ("eigh_tridiagonal", lambda: spectral_density(H, 2, 5, 0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"scipy.linalg.{solver}", give_up)
            with pytest.raises(SolverError, match=r"finite\): the solver did not converge"):
                run()


# ------------------------------------------------------------------ probes and products


@given(SEEDS, st.integers(0, 2**40), st.integers(1, 200))
def test_signs_follow_the_written_rule(seed: int, index: int, P: int) -> None:
    counter = [0, 1, 0, index]
    words = np.random.Philox(key=seed, counter=counter).random_raw(-(-P // 64))
    bits = [int(words[p // 64]) >> (p % 64) & 1 for p in range(P)]
    assert matrix_free._signs(seed, index, P).tolist() == [2.0 * bit - 1 for bit in bits]


def test_probes_are_independent_of_each_other_and_of_label_draws() -> None:
    """100 probes of 4096 signs: all correlations within 5.5 of their standard deviation, 1/64."""
    Z = np.array([matrix_free._signs(3, i, 4096) for i in range(100)])
    label = np.random.Generator(np.random.Philox(key=3, counter=[0, 0, 0, 0])).random(4096)
    correlation = np.vstack([Z, np.sign(label - 0.5)]) @ Z.T / 4096 - np.eye(101, 100)
    assert np.abs(correlation).max() <= 5.5 / 64
    N = np.array([matrix_free._normal(3, i, 4096) for i in range(100)])
    assert np.abs(N @ np.vstack([N, Z]).T / 4096 - np.eye(100, 200)).max() <= 8 / 64
    assert np.abs(Z.mean(axis=1)).max() <= 5.5 / 64


def test_more_samples_extend_the_earlier_ones() -> None:
    H = symmetric(np.arange(30.0))
    few, many = Matrix(H), Matrix(H)
    hutchinson(few, 4, 9), hutchinson(many, 7, 9)
    assert np.array_equal(few.seen, many.seen[:4])
    few, many = Matrix(H), Matrix(H)
    xtrace(few, 8, 9), xtrace(many, 14, 9)
    assert np.array_equal(few.seen[:4], many.seen[:4])
    a, b = spectral_density(Matrix(H), 2, 5, 9), spectral_density(Matrix(H), 4, 5, 9)
    assert np.array_equal(a.nodes, b.nodes[:2])
    assert np.array_equal(a.weights, b.weights[:2])


RUNS = {
    "lanczos": lambda A, seed, **more: extreme_eigenvalues(A, 2, "both", seed, **more),
    "dense": lambda A, seed, **more: extreme_eigenvalues(A, 30, "both", seed, **more),
    "hutchinson": lambda A, seed, **more: hutchinson(A, 6, seed, **more),
    "xtrace": lambda A, seed, **more: xtrace(A, 6, seed, **more),
    "spectral_density": lambda A, seed, **more: spectral_density(A, 3, 4, seed, **more),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(run) -> None:
    for spectrum in (np.linspace(-1, 2, 40), np.ones(40)):  # the second restarts ARPACK at random
        H = symmetric(spectrum)
        one, two, other = Matrix(H), Matrix(H), Matrix(H)
        assert str(run(one, 1)) == str(run(two, 1))
        assert np.array_equal(one.seen, two.seen)
        run(other, 2)
        assert not np.array_equal(one.seen[0], other.seen[0])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_progress_counts_the_products(run) -> None:
    calls: list[tuple[int, int]] = []
    A = Matrix(symmetric(np.linspace(-1, 2, 40)))
    run(A, 1, progress=lambda done, most: calls.append((done, most)))
    assert [done for done, _ in calls] == list(range(1, len(A.seen) + 1))
    assert len({most for _, most in calls}) == 1
    assert calls[-1][0] <= calls[-1][1]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_an_operator_may_return_its_argument_or_a_buffer(run) -> None:
    """The identity by `lambda v: v`, and an operator that always writes into one array."""
    buffer = np.empty(40)
    spectrum = np.linspace(-1, 2, 40)
    lazy = LinearOperator((40, 40), matvec=lambda v: v, dtype=float)
    shared = LinearOperator(
        (40, 40), matvec=lambda v: np.multiply(spectrum, v.ravel(), out=buffer), dtype=float
    )
    assert str(run(lazy, 1)) == str(run(diagonal(np.ones(40)), 1))
    assert str(run(shared, 1)) == str(run(diagonal(spectrum), 1))


@pytest.mark.parametrize(
    ("H", "error", "says"),
    [
        (np.ones((2, 3)), ShapeError, r"square.*got \(2, 3\)"),
        (np.ones(3), ShapeError, r"square.*got \(3,\)"),
        (np.ones((0, 0)), ShapeError, "P >= 1"),
        (np.full((3, 3), np.nan), NonFiniteError, "holds nan"),
        (np.full((3, 3), 1j), DTypeError, "real floats; got complex128"),
    ],
    ids=["oblong", "vector", "empty", "nan", "complex"],
)
def test_every_function_refuses_a_bad_operator(H, error, says) -> None:
    for run in (
        lambda: extreme_eigenvalues(Matrix(H)),
        lambda: hutchinson(Matrix(H), 4, 0),
        lambda: xtrace(Matrix(H), 4, 0),
        lambda: spectral_density(Matrix(H), 2, 2, 0),
    ):
        with pytest.raises(error, match=says) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_a_product_of_the_wrong_length_is_refused() -> None:
    made = Matrix(np.ones((4, 3)))
    made.shape = (3, 3)
    with pytest.raises(ShapeError, match=r"H v must be \(3\)"):
        hutchinson(made, 2, 0)


def test_nan_deep_inside_lanczos_is_refused() -> None:
    def product(v: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.linspace(0, 1, 100) * v.ravel() + (np.nan if len(calls) == 9 else 0)

    calls: list[int] = []
    with pytest.raises(NonFiniteError, match="100 of 100"):
        extreme_eigenvalues(LinearOperator((100, 100), matvec=product, dtype=float))


GOOD = Matrix(np.eye(3))


@pytest.mark.parametrize(
    ("run", "error", "says"),
    [
        (lambda: extreme_eigenvalues(GOOD, 0), RangeError, "k must be an integer >= 1; got 0"),
        (lambda: extreme_eigenvalues(GOOD, True), RangeError, "got True"),
        (lambda: extreme_eigenvalues(GOOD, 1, "bigest"), ConventionError, "largest"),
        (lambda: extreme_eigenvalues(GOOD, accuracy=-1), RangeError, r"in \[0, 1\]"),
        (lambda: extreme_eigenvalues(GOOD, restarts=0), RangeError, "restarts"),
        (lambda: extreme_eigenvalues(GOOD, seed=-1), RangeError, "seed"),
        (lambda: hutchinson(GOOD, 1, 0), RangeError, "samples must be an integer >= 2; got 1"),
        (lambda: hutchinson(GOOD, 2.5, 0), RangeError, "got 2.5"),
        (lambda: hutchinson(GOOD, 2, 2**64), RangeError, "seed"),
        (lambda: xtrace(GOOD, 2, 0), RangeError, "samples must be an integer >= 4; got 2"),
        (lambda: xtrace(GOOD, 5, 0), RangeError, "even and at most 2 P = 6; got 5"),
        (lambda: xtrace(GOOD, 8, 0), RangeError, "unit vectors give the trace itself"),
        (lambda: spectral_density(GOOD, 1, 3, 0), RangeError, "probes"),
        (lambda: spectral_density(GOOD, 2, 0, 0), RangeError, "steps"),
        (lambda: spectral_density(GOOD, 2, 2, 0).density(0.0, 0.0), RangeError, "width"),
        (lambda: spectral_density(GOOD, 2, 2, 0).density(0.0, math.nan), RangeError, "width"),
        (lambda: spectral_density(GOOD, 2, 2, 0).moment(-1), RangeError, "k must be"),
    ],
)
def test_refusals(run, error, says) -> None:
    with pytest.raises(error, match=says) as caught:
        run()
    assert "\n" not in str(caught.value)
