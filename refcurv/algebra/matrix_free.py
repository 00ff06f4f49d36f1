"""Extreme eigenvalues, trace and spectrum of a large symmetric matrix, from products with vectors.

The matrix H is (P, P), real and symmetric, and is never written down. `operator` has `shape` and
`matvec`, like a `scipy.sparse.linalg.LinearOperator`. Every answer comes with its error: a measured
residual, or a standard error over probes. Every function refuses an operator that is not square
(ShapeError), real (DTypeError) and finite (NonFiniteError), and calls `progress`.

Probe i is a function of (seed, i) alone, so that more samples extend the earlier ones. It comes
from Philox as in SAMPLING: key words (seed, 0), first block at counter (1, kind, 0, i). Kind 1 is
Rademacher: entry p is +1 if bit p mod 64 of word p div 64 is set, else −1, as for SAMPLING's signs.
Kind 2 is NumPy's `standard_normal`. Label draws have kind 0: one seed can serve them and probes.
SAMPLING's signs use the kinds from 1 on: beside `signed` factors, give probes another seed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from refcurv.algebra.blas import solving
from refcurv.algebra.scaling import far_exponent, norm, shifted
from refcurv.algebra.svd import svd
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    NotSymmetricError,
    RangeError,
    ShapeError,
    require_choice,
    require_dtype,
    require_finite,
    require_range,
    require_seed,
    require_shape,
)
from refcurv.law.words import number_of
from refcurv.progress import Progress, silent

Product = Callable[[Array], Array]

ASYMMETRY = tolerance.eps(np.float32) ** 0.5
"""Share of H by which uᵀ(Hv) and vᵀ(Hu) may differ. Chosen: half the digits of float32 products."""

HALF_THE_DIGITS = tolerance.eps(np.float64) ** 0.5
"""A residual with half the digits. An eigenvalue that stands apart then has all of them: its error
is at most residual²/gap (Parlett, The Symmetric Eigenvalue Problem, section 11.7)."""

_ARPACK_SCALE = tolerance.eps(np.float64) ** (2 / 3)
"""ARPACK takes a Ritz value θ when its residual is at most tol·max(|θ|, eps^⅔) (dsconv)."""

_LANCZOS_START = 2**64 - 1  # the Gaussian probe that Lanczos starts from; xtrace counts from 0
_SEEDED_RESTART = "rng" in inspect.signature(eigsh).parameters  # SciPy >= 1.17


class Operator(Protocol):
    """Anything with a shape, (P, P), that multiplies a vector (P,)."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def matvec(self, x: Any) -> Any: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number found by sampling.

    Fields:
        value; standard_error, from the spread over probes. Rounding comes on top of it.
        samples: how many products with H it took.
    """

    value: float
    standard_error: float
    samples: int


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """Some eigenpairs by ORDER: values (n,) descending, vectors (P, n) in columns, residuals (n,).

    residuals[i] = ‖H v_i − λ_i v_i‖ as measured: an eigenvalue of H lies within it of λ_i.
    """

    values: Array
    vectors: Array
    residuals: Array


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """The spectrum of H as point masses, one set per probe.

    Each method estimates (1/P) tr f(H), the mean of f over the P eigenvalues, and its standard
    error over probes. This error does not include a bias: the part of f that is no polynomial of
    degree 2·steps − 1 is not integrated exactly.

    Fields:
        nodes, weights: (probes, steps) float64; a row of weights sums to 1. If a probe's Krylov
            space has fewer than `steps` dimensions, the rest of its weights are 0.
        size: P.       products: with H, that it took.
    """

    nodes: Array
    weights: Array
    size: int
    products: int

    def average(self, function: Callable[[Array], Array]) -> Estimate:
        """(1/P) tr f(H), `function` being f on an array of nodes."""
        value, error = self._over_probes(function)
        return Estimate(float(value), float(error), self.products)

    def moment(self, k: int) -> Estimate:
        """(1/P) tr Hᵏ; unbiased for k <= 2·steps − 1."""
        power = _whole("moment", "k", k, 0)
        return self.average(lambda nodes: nodes**power)

    def density(self, x: Array, width: float) -> tuple[Array, Array]:
        """(value, standard error) at each x, of the density smoothed by a Gaussian of std width."""
        real = np.finfo(np.float64)
        h = require_range("density", "width", width, float(real.tiny), float(real.max))

        def gaussian(nodes: Array) -> Array:
            z = np.subtract.outer(nodes, np.asarray(x, np.float64)) / h
            return np.asarray(np.exp(-(z**2) / 2) / (h * np.sqrt(2 * np.pi)))

        return self._over_probes(gaussian)

    def cumulative(self, x: Array) -> tuple[Array, Array]:
        """(value, standard error) at each x, of the share of eigenvalues <= x."""
        return self._over_probes(lambda nodes: np.less_equal.outer(nodes, np.asarray(x)) * 1.0)

    def _over_probes(self, function: Callable[[Array], Array]) -> tuple[Array, Array]:
        each = np.array(
            [np.tensordot(w, function(n), 1) for n, w in zip(self.nodes, self.weights, strict=True)]
        )
        return _mean_and_error(each)


def extreme_eigenvalues(
    operator: Operator,
    k: int = 1,
    which: str = "largest",
    seed: int = 0,
    *,
    accuracy: float = HALF_THE_DIGITS,
    restarts: int = 1000,
    progress: Progress = silent,
) -> Eigenpairs:
    """The k largest or k smallest (most negative) eigenvalues, or k at either end.

    Definition: λ_i = v_iᵀ H v_i, v_i from SciPy's Lanczos (ARPACK). If P is not above the size of
    a Lanczos basis, v_i is from H itself, made column by column.

    Args:
        operator: H, (P, P).
        k: >= 1; with P or more, all of them.
        which: `largest`, `smallest` or `both`.
        seed: of the start vector z.
        accuracy: residual asked of Lanczos, as a share of max(|λ_i|, ‖H z‖/‖z‖).
        restarts: the most restarts of Lanczos.
        progress: called with (products made, the most that there may be).

    Returns:
        Eigenpairs. A residual proves that an eigenvalue is near. It does not prove that none was
        missed: Lanczos can miss copies of a repeated eigenvalue, and members of a cluster that is
        narrower than the residual.

    Raises:
        RangeError: k < 1, accuracy outside [0, 1], or no convergence within `restarts`.
        NotSymmetricError: residuals that a symmetric matrix cannot leave.

    Cost: usually some dozens to hundreds of products; max(2n + 1, 20) vectors for n pairs.
    Source: Lehoucq, Sorensen & Yang 1998, ARPACK Users' Guide. Residual: Parlett, The Symmetric
    Eigenvalue Problem, theorem 4.5.1.
    Proof: tests/test_matrix_free.py::test_extreme_eigenvalues_equal_the_dense_ones,
    ::test_an_eigenvalue_lies_within_each_residual
    """
    who = "extreme_eigenvalues"
    end = require_choice(who, "which", which, ("largest", "smallest", "both"))
    n = _whole(who, "k", k, 1) * (2 if end == "both" else 1)
    tol = require_range(who, "accuracy", accuracy, 0, 1)
    limit, basis = _whole(who, "restarts", restarts, 1), max(2 * n + 1, 20)
    P, product = _products(who, operator, progress, 1 + n + basis * (limit + 1))
    z = _normal(require_seed(who, seed), _LANCZOS_START, P)
    scale = float(norm(product(z)) / norm(z))
    if scale == 0:  # H z = 0 for a random z: H = 0
        U = np.eye(P, min(n, P))
    elif P <= basis:
        H = _columns(product, np.eye(P))
        with solving(who, H):
            _, U = scipy.linalg.eigh(H, driver="evd")
        low, high = {"largest": (0, n), "smallest": (n, 0), "both": (n // 2, n // 2)}[end]
        U = U if n >= P else np.hstack([U[:, :low], U[:, P - high :]])
    else:
        which = {"largest": "LA", "smallest": "SA", "both": "BE"}[end]
        options = {"which": which, "v0": z, "ncv": basis, "maxiter": limit, "tol": tol}
        U = _arpack(product, scale, n, options)
    HU = _columns(product, U)
    values = (U * HU).sum(axis=0)
    residuals = norm(HU - U * values, axis=0)
    top = max(scale, float(np.abs(values).max()))
    _require_symmetric(who, float(residuals.max()) - tol * top, top)
    order = np.argsort(-values, kind="stable")
    sign = np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1.0, 1.0)
    return Eigenpairs(values[order], (U * sign)[:, order], residuals[order])


def _arpack(product: Product, scale: float, n: int, options: dict[str, Any]) -> Array:
    """Eigenvectors by eigsh, from H scaled to about eps^⅔ (see _ARPACK_SCALE).

    So a small eigenvalue is asked for a residual of tol times the scale of H. Unscaled, a large H
    would be asked for more digits than its products have.
    """
    unit = 2.0 ** round(min(max(math.log2(_ARPACK_SCALE / scale), -1000), 1000))
    P = len(options["v0"])
    H = LinearOperator((P, P), matvec=lambda v: product(v.ravel()) * unit, dtype=np.float64)
    if _SEEDED_RESTART:
        options["rng"] = np.random.default_rng(0)
    try:
        return np.asarray(eigsh(H, n, **options)[1])
    except ArpackError as error:
        raise RangeError(
            f"extreme_eigenvalues: Lanczos did not converge to {number_of(n, 'pair')} within "
            f"{number_of(options['maxiter'], 'restart')} at accuracy {options['tol']:.1e}; "
            f"allow more restarts "
            f"or less accuracy, or ask for fewer pairs. Is the operator symmetric? ({error})"
        ) from None


def hutchinson(
    operator: Operator,
    samples: int,
    seed: int,
    *,
    progress: Progress = silent,
) -> Estimate:
    """The trace of H from Rademacher probes: the plain way, and the baseline for `xtrace`.

    Definition: mean over i of z_iᵀ H z_i, z_i in {−1, 1}ᴾ. E z zᵀ = I makes it unbiased. Each term
    is tr H + Σ_{p≠q} H_pq z_p z_q, of variance 2 Σ_{p≠q} H_pq².

    Args:
        operator: H, (P, P).
        samples: probes and products, >= 2.
        seed: of the probes.
        progress: called with (products made, the most that there may be).

    Returns:
        Estimate, unbiased. Exact for a diagonal H.

    Raises:
        RangeError: samples < 2.

    Cost: `samples` products, O(P) memory.
    Source: Girard 1989; Hutchinson 1990, Communications in Statistics 19(2).
    Proof: tests/test_matrix_free.py::test_hutchinson_is_the_mean_over_its_probes,
    ::test_standard_errors_are_calibrated
    """
    who = "hutchinson"
    count, key = _whole(who, "samples", samples, 2), require_seed(who, seed)
    P, product = _products(who, operator, progress, count)
    probes = (_signs(key, i, P) for i in range(count))
    return _mean(np.array([z @ product(z) for z in probes]), count)


def xtrace(
    operator: Operator,
    samples: int,
    seed: int,
    *,
    progress: Progress = silent,
) -> Estimate:
    """The trace of H by XTrace: exact on a subspace that catches most of H, by probes outside it.

    Definition: m = samples/2 Gaussian probes ω_j. Q_i is an orthonormal basis of the span of all
    H ω_j with j ≠ i, and x_i = (I − Q_i Q_iᵀ) ω_i. The estimate is the mean over i of

        tr(Q_iᵀ H Q_i) + (P − m + 1) · x_iᵀ H x_i / ‖x_i‖².

    It is unbiased: x_i/‖x_i‖ is uniform on the unit sphere of the P − m + 1 dimensions outside Q_i.

    Args:
        operator: H, (P, P).
        samples: products, even, from 4 to 2 P.
        seed: of the probes.
        progress: called with (products made, the most that there may be).

    Returns:
        Estimate; exact to rounding if rank H < samples/2 or samples = 2 P. The standard error is
        the paper's, which takes the m terms for independent. They share probes: on four spectra
        the true error was 1.1 to 1.5 times as large.

    Raises:
        RangeError: samples odd, below 4 or above 2 P.

    Cost: exactly `samples` products; O(P·samples²) time; 5·samples/2 vectors.
    Source: Epperly, Tropp & Webber 2024, SIAM J. Matrix Anal. Appl. 45(1), section 2, with the
    normalisation of their "improved" test vectors.
    Proof: tests/test_matrix_free.py::test_xtrace_equals_its_definition,
    ::test_xtrace_is_exact_for_low_rank, ::test_xtrace_beats_hutchinson
    """
    who = "xtrace"
    count, key = _whole(who, "samples", samples, 4), require_seed(who, seed)
    P, product = _products(who, operator, progress, count)
    if count % 2 or count > 2 * P:
        raise RangeError(
            f"xtrace: samples must be even and at most 2 P = {2 * P}; got {count}. "
            "The P products with unit vectors give the trace itself."
        )
    m = count // 2
    Omega = np.column_stack([_normal(key, i, P) for i in range(m)])
    Y = _columns(product, Omega)
    Q, sigma, V = svd(Y, who)
    # Y_j = Q (σ ∘ V_j), V_j the columns of V. Q_i Q_iᵀ = Q (I − s_i s_iᵀ) Qᵀ with a unit s_i
    # orthogonal to σ ∘ V_j for all j ≠ i: s_i ∝ V_i / σ, for (V_i / σ)·(σ ∘ V_j) = V_i·V_j = 0.
    # Singular values below rounding are raised to it. Rounding changes Y by as much.
    sigma = np.maximum(sigma, tolerance.eps(np.float64) * sigma[0]) if sigma[0] else sigma + 1
    S = V * (sigma[-1] / sigma)[:, None]
    S /= np.linalg.norm(S, axis=0)
    HQ = _columns(product, Q)
    inside, W = Q.T @ HQ, Q.T @ Omega
    W -= S * (S * W).sum(axis=0)
    X = Omega - Q @ W  # x_i, and H X = Y − H Q W
    outside = (X * (Y - HQ @ W)).sum(axis=0) / (X * X).sum(axis=0)
    return _mean(np.trace(inside) - (S * (inside @ S)).sum(axis=0) + (P - m + 1) * outside, count)


def spectral_density(
    operator: Operator,
    probes: int,
    steps: int,
    seed: int,
    *,
    progress: Progress = silent,
) -> SpectralDensity:
    """The spectrum of H by stochastic Lanczos quadrature.

    Definition: for each Rademacher probe z, `steps` steps of Lanczos from z/‖z‖ give a tridiagonal
    T. The nodes are its eigenvalues, the weights the squared first entries of its eigenvectors. Σ
    weight · f(node) is the Gauss quadrature of zᵀ f(H) z / P, exact for polynomials f of degree up
    to 2·steps − 1. Its mean over z is tr f(H) / P, as in `hutchinson`.

    Args:
        operator: H, (P, P).
        probes: >= 2.
        steps: >= 1; at most P are made.
        seed: of the probes.
        progress: called with (products made, the most that there may be).

    Returns:
        SpectralDensity. With as many steps as H has distinct eigenvalues, the nodes are these.

    Raises:
        RangeError: probes < 2 or steps < 1.
        NotSymmetricError: H v is not along the earlier v as it must be; seen from step 2 on.

    Cost: probes·steps products; O(P·probes·steps²) time, for each basis is orthogonalised in full
    and twice; memory of `steps` vectors.
    Source: Golub & Meurant 2010, Matrices, Moments and Quadrature, chapter 6; Ubaru, Chen & Saad
    2017, SIAM J. Matrix Anal. Appl. 38(4).
    Proof: tests/test_matrix_free.py::test_moments_of_each_probe_are_exact,
    ::test_nodes_are_the_distinct_eigenvalues
    """
    who = "spectral_density"
    count, most = _whole(who, "probes", probes, 2), _whole(who, "steps", steps, 1)
    key = require_seed(who, seed)
    P, product = _products(who, operator, progress, count * most)
    shape = count, min(most, P)
    nodes, weights, made = np.empty(shape), np.zeros(shape), 0
    for i in range(count):
        alpha, beta = _lanczos(product, _signs(key, i, P), shape[1])
        with solving(who, alpha):
            points, U = scipy.linalg.eigh_tridiagonal(alpha, beta, lapack_driver="stev")
        nodes[i], made = points[-1], made + len(points)  # of weight 0 unless overwritten
        nodes[i, : len(points)], weights[i, : len(points)] = points, U[0] ** 2
    return SpectralDensity(nodes, weights, P, made)


def _lanczos(product: Product, start: Array, steps: int) -> tuple[Array, Array]:
    """(alpha, beta) of T = Vᵀ H V, V an orthonormal basis of the Krylov space of `start`.

        H v_k = beta_{k−1} v_{k−1} + alpha_k v_k + beta_k v_{k+1}

    It ends early where beta_k is no more than rounding: then the space is invariant and T exact.
    """
    V, alpha, beta = np.empty((steps, len(start))), np.empty(steps), np.empty(steps)
    V[0], largest = start / norm(start), 0.0
    for k in range(steps):
        w = product(V[k])
        largest = max(largest, float(norm(w)))
        along = V[: k + 1] @ w
        surplus = along[:k].copy()  # by symmetry v_jᵀ H v_k is beta_j for j = k − 1, 0 below
        if k:
            surplus[-1] -= beta[k - 1]
        _require_symmetric("spectral_density", float(norm(surplus)), largest)
        w -= along @ V[: k + 1]
        w -= (V[: k + 1] @ w) @ V[: k + 1]  # twice is enough (Parlett, section 6.9)
        alpha[k], beta[k] = along[k], norm(w)
        if k + 1 == steps or beta[k] <= tolerance.eigenpair(k + 1) * largest:
            break
        V[k + 1] = w / beta[k]
    return alpha[: k + 1], beta[:k]


def _products(who: str, operator: Operator, progress: Progress, most: int) -> tuple[int, Product]:
    """(P, v ↦ H v); each product is checked, counted, and copied."""
    if not callable(getattr(operator, "matvec", None)) or not hasattr(operator, "shape"):
        kind = type(operator).__name__
        raise ConventionError(
            f"{who}: the operator must have a shape and a matvec, as rc.exact.operator(...) or "
            f"scipy.sparse.linalg.aslinearoperator(H); got {kind}."
        )
    if not callable(progress):
        raise ConventionError(f"{who}: progress must be a function; got {progress!r:.40}.")
    shape, done = tuple(operator.shape), 0
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ShapeError(f"{who}: the operator must be square, (P, P) with P >= 1; got {shape}.")

    def product(v: Array) -> Array:
        nonlocal done
        w = np.asarray(operator.matvec(v))
        require_shape(who, "a product H v", w, (shape[0],), "(P,)")
        require_dtype(who, "a product H v", w, "f", "real floats")
        require_finite(who, "a product H v", w, "Look for an overflow inside the operator.")
        done += 1
        progress(done, most)
        return np.array(w, np.float64)

    return int(shape[0]), product


def _columns(product: Product, X: Array) -> Array:
    return np.column_stack([product(np.ascontiguousarray(x)) for x in X.T])


def _mean(each: Array, samples: int) -> Estimate:
    value, error = _mean_and_error(each)
    return Estimate(float(value), float(error), samples)


def _mean_and_error(each: Array) -> tuple[Array, Array]:
    """Over the first axis, the mean and its standard error."""
    k = far_exponent(each)
    inside = shifted(each, -k) if k else each
    error = inside.std(axis=0, ddof=1) / np.sqrt(len(each))
    return shifted(inside.mean(axis=0), k), shifted(error, k)


def _philox(seed: int, kind: int, index: int) -> np.random.Philox:
    counter = np.array([0, kind, 0, index], np.uint64)
    return np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter)


def _signs(seed: int, index: int, P: int) -> Array:
    """Rademacher probe `index`, (P,)."""
    words = np.asarray(_philox(seed, 1, index).random_raw(-(-P // 64))).astype("<u8")
    return 2.0 * np.unpackbits(words.view(np.uint8), count=P, bitorder="little") - 1.0


def _normal(seed: int, index: int, P: int) -> Array:
    """Gaussian probe `index`, (P,)."""
    return np.random.Generator(_philox(seed, 2, index)).standard_normal(P)


def _whole(who: str, what: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise RangeError(f"{who}: {what} must be an integer >= {low}; got {value!r:.80}.")
    if value >= 2**31:
        raise RangeError(f"{who}: {what} must be an integer < 2**31; got {value!r:.80}.")
    return int(value)


def _require_symmetric(who: str, gap: float, scale: float) -> None:
    if gap > ASYMMETRY * scale:
        raise NotSymmetricError(
            f"{who}: the operator is not symmetric: its products are off by {gap / scale:.1e} > "
            f"{ASYMMETRY:.1e} of H from what symmetry demands. Rounding cannot explain this; look "
            "for a missed transpose, or for noise that changes from product to product."
        )
