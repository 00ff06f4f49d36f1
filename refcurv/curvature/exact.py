"""Exact curvature of small models: Hessian, GGN, Fisher, F_tok and K, dense or as products.

One code, three derivatives (DESIGN §5). The forward and the backward are analytic, so that with
h = 1e-30 and a direction v over the parameters

    z(θ + i h v)  = z + i h J v            the Jacobian-vector product, exact to rounding
    ∇L(θ + i h v) = ∇L + i h H v           the Hessian-vector product, exact to rounding

    GGN v = Jᵀ (∂²L/∂z²) (J v)             Fisher = Σ_c vec(D_c) vec(D_c)ᵀ,  D_c = Jᵀ s_c

where s_c runs over the cotangents on the outputs z that FISHER names: for `expected` the columns
of a root of ∂²L/∂z², one loss position and one vocabulary entry at a time. GGN goes forward first
and Fisher backward only, so that their equality (O11) proves both.

Products are linear in v over the whole range of its dtype: v is brought to order 1 by powers of two
before the step, and the product brought back (`_sizes`).

Every function takes a Model with a Corpus, or with tokens and labels, or else a Problem: whatever
has parameters, a forward, a backward and a loss. It stands on `model/` alone, and shares nothing
with the factors, bases and kernels that it is there to judge.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.kron import from_rearranged, kron_dense
from refcurv.curvature.problem import Data, Loss, Problem, problem
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    NameUnknownError,
    RangeError,
    require_choice,
    require_draws,
    require_dtype,
    require_finite,
    require_seed,
    require_shape,
)
from refcurv.law.conventions import Fisher
from refcurv.model.config import Model, expand
from refcurv.model.layers import Saved
from refcurv.model.transformer import Parameters, Slope, Tap

__all__ = [
    "Moments",
    "Problem",
    "derivative",
    "f_tok",
    "fisher",
    "fisher_along",
    "ggn",
    "ggnvp",
    "gradient",
    "hessian",
    "hvp",
    "kfac",
    "moments",
    "operator",
    "problem",
    "rows",
]

STEP = 1e-30
"""h of the complex step: its square is below every rounding, so no digit of it is ever seen."""

DENSE = 8192
"""Parameters of the largest block that is made dense: half a GiB."""

SPAN = 512
"""Powers of two between the largest and the smallest entry of a vector that one step carries: h
times the smallest is 2⁻⁶¹², as far above underflow as products of the model's numbers need."""

COTANGENTS = 64
"""Cotangents of one segment that are pulled back side by side."""

PER = ("segment", "term")
"""FISHER: the square of a segment's summed gradient, or of each of its terms'."""

Tokens = ArrayLike | Data | None
Vector = Mapping[str, Array]
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Moments:
    """A (I, I) and G (O, O), means over `rows` positions: K = rows · (G ⊗ A) (COUNTS)."""

    A: Array
    G: Array
    rows: int


# ------------------------------------------------------------------ a block of parameters


@dataclass(frozen=True, slots=True)
class _Block:
    """A problem and the parameters that it is differentiated by, laid end to end, row-major."""

    problem: Problem
    names: list[str]

    @property
    def size(self) -> int:
        return sum(self.problem.parameters[name].size for name in self.names)

    def flat(self, vector: Vector) -> Array:
        """{name: (*shape)} → (P,); {name: (C, *shape)} → (C, P)."""
        parts = []
        for name in self.names:
            array, ndim = np.asarray(vector[name]), self.problem.parameters[name].ndim
            parts.append(array.reshape(*array.shape[: array.ndim - ndim], -1))
        return np.concatenate(parts, axis=-1)

    def named(self, flat_P: Array) -> dict[str, Array]:
        """(P,) → {name: array}."""
        out, begin = {}, 0
        for name in self.names:
            like = self.problem.parameters[name]
            out[name] = flat_P[begin : begin + like.size].reshape(like.shape)
            begin += like.size
        return out


def _block(
    who: str,
    model: Model | Problem,
    tokens: Tokens,
    labels: ArrayLike | None,
    wrt: str,
) -> _Block:
    """The block that `wrt` names, of a Problem or of a Model on tokens."""
    if isinstance(model, Problem):
        if tokens is not None or labels is not None:
            raise ConventionError(f"exact.{who}: a Problem has its own data; leave tokens out.")
        return _Block(model, _float64(who, model, expand(wrt, list(model.parameters))))
    if tokens is None:
        raise ConventionError(
            f"exact.{who}: a Model needs tokens: a Corpus, (B, T) integers, or images."
        )
    names = expand(wrt, list(model.config.parameter_shapes()))
    return _Block(problem(model, tokens, labels), names)


def _float64(who: str, made: Problem, names: list[str]) -> list[str]:
    """The names, of parameters that a complex step of 1e-30 can move: float64 or wider."""
    for name in names:
        dtype = made.parameters[name].dtype
        if dtype.kind != "f" or np.finfo(dtype).maxexp < np.finfo(np.float64).maxexp:
            raise DTypeError(
                f"exact.{who}: a Problem's parameters must be float64 or longdouble; {name!r} is "
                f"{dtype}. Widen them first: no value changes."
            )
    return names


# ------------------------------------------------------------------ products


def _steps(
    made: Problem, parameters: Parameters, saved: Saved, d_z: Array, names: Iterable[str]
) -> Iterator[Tap | Slope]:
    """The backward's steps at the named parameters, and nothing below the lowest that is known."""
    wanted = set(names)
    missing = len(wanted) if made.linear.issuperset(wanted) else math.inf  # else one comes twice
    for step in made.backward(parameters, saved, d_z):
        if step.name in wanted:
            yield step
            missing -= 1
            if not missing:
                return


def _jacobian_rows(
    made: Problem, parameters: Parameters, saved: Saved, d_z: Array, names: Iterable[str]
) -> dict[str, Array]:
    """Jᵀ d_z by parameter: (C, *shape), C running over cotangents, or over parts that add up."""
    out: dict[str, Array] = {}
    for step in _steps(made, parameters, saved, d_z, names):
        d = step.g.swapaxes(-1, -2) @ step.a if isinstance(step, Tap) else step.d[None]
        before = out.get(step.name)
        out[step.name] = d if before is None else (before.sum(axis=0) + d.sum(axis=0))[None]
    return out


def _gradient(made: Problem, parameters: Parameters, names: list[str]) -> dict[str, Array]:
    """∇L at `parameters`, real or complex."""
    z_NV, saved = made.forward(parameters)
    rows = _jacobian_rows(made, parameters, saved, made.loss.terms(z_NV)[1], names)
    return {name: rows[name].sum(axis=0) for name in names}


def _stepped(block: _Block, v_P: Array) -> Parameters:
    """θ + i h v, θ itself where v has no part."""
    step = np.asarray(STEP, dtype=v_P.dtype)
    moved = {
        name: block.problem.parameters[name] + 1j * (step * v)
        for name, v in block.named(v_P).items()
    }
    return ChainMap(moved, block.problem.parameters)  # type: ignore[arg-type]


def _hessian_product(block: _Block) -> Callable[[Array], Array]:
    """v → Im ∇L(θ + i h v) / h."""

    def product(v_P: Array) -> Array:
        stepped = _stepped(block, v_P)
        return block.flat(_gradient(block.problem, stepped, block.names)).imag / STEP

    return product


def _ggn_product(block: _Block) -> Callable[[Array], Array]:
    """v → Jᵀ (∂²L/∂z²) Im z(θ + i h v) / h."""
    made = block.problem
    z_NV, saved = made.forward(made.parameters)

    def product(v_P: Array) -> Array:
        Jv_NV = made.forward(_stepped(block, v_P))[0].imag / STEP
        d_z = made.loss.hessian(z_NV, Jv_NV)
        rows = _jacobian_rows(made, made.parameters, saved, d_z, block.names)
        return block.flat({name: rows[name].sum(axis=0) for name in block.names})

    return product


def _residual_product(block: _Block) -> Callable[[Array], Array]:
    """v → Im J(θ + i h v)ᵀ r / h, r = ∂L/∂z held fixed: Σ_n r_n · ∂²z_n v, what H has over GGN."""
    made = block.problem
    r_NV = made.loss.terms(made.forward(made.parameters)[0])[1]

    def product(v_P: Array) -> Array:
        stepped = _stepped(block, v_P)
        _, saved = made.forward(stepped)
        rows = _jacobian_rows(made, stepped, saved, r_NV, block.names)
        return block.flat({name: rows[name].sum(axis=0) for name in block.names}).imag / STEP

    return product


PRODUCTS: Mapping[str, Callable[[_Block], Callable[[Array], Array]]] = {
    "hessian": _hessian_product,
    "ggn": _ggn_product,
    "residual": _residual_product,
}
"""What `operator` can be: H, GGN, and H − GGN by its own route."""


def _product(who: str, block: _Block, kind: str) -> Callable[[Array], Array]:
    """v (P,) → M v, linear in v whatever its length."""
    product = PRODUCTS[kind](block)
    return lambda v_P: _joined(who, [(e, product(u_P)) for e, u_P in _sizes(v_P)])


def _sizes(v_P: Array) -> list[tuple[int, Array]]:
    """[(e, u)] with v = Σ 2^e u, exactly: the largest |u| in [1, 2), the others within 2^SPAN.

    Entries of one size, as nearly always, are one u. Others are stepped by themselves: beside 1e200
    a part of 1e-200 would step by less than the least positive number, and where the large part has
    no effect its product is all there is.
    """
    parts: list[tuple[int, Array]] = []
    rest_P = v_P
    while not parts or rest_P.any():
        e = int(np.frexp(np.abs(rest_P).max())[1]) - 1
        u_P = np.ldexp(rest_P, -e)
        near_P = np.abs(u_P) >= 2.0**-SPAN
        parts.append((e, np.where(near_P, u_P, 0)))
        rest_P = np.where(near_P, 0, rest_P)
    return parts


def _joined(who: str, parts: list[tuple[int, Array]]) -> Array:
    """Σ 2^e x over the parts [(e, x)] of a product."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = sum((np.ldexp(x, e) for e, x in parts[1:]), np.ldexp(parts[0][1], parts[0][0]))
    if not np.isfinite(out).all() and all(np.isfinite(x).all() for _, x in parts):
        raise RangeError(
            f"exact.{who}: the product is beyond the range of {out.dtype}. It is linear in the "
            "vector: divide the vector by a power of two."
        )
    return np.asarray(out)


@one_blas_thread()
def gradient(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
) -> dict[str, Array]:
    """The gradient of the summed loss in a block of parameters, by the hand-written backward.

    Definition
        {name: ∂L/∂θ}, from the definitions of `model.layers`, not the kernels.

    Args, Raises: as `hvp`.

    Returns:
        {name: array of its shape} [nats / parameter].

    Cost: one forward and one backward.
    Source: LOSS.
    Proof: tests/test_exact.py::test_gradient_is_the_transformers
    """
    block = _block("gradient", model, tokens, labels, wrt)
    return _gradient(block.problem, block.problem.parameters, block.names)


@one_blas_thread()
def derivative(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    vector: Vector,
) -> float:
    """The derivative of the summed loss along a vector, by complex step: forward only.

    Definition
        <∇L, v> = Im L(θ + i h v) / h, h = 1e-30: the second route of `gradient` (O15).

    Args, Raises: as `hvp`; the vector names its own parameters.

    Cost: one complex forward.
    Source: Martins, Sturdza & Alonso 2003.
    Proof: tests/test_exact.py::test_O15_the_derivative_along_a_vector
    """
    block = _block("derivative", model, tokens, labels, ",".join(vector))

    def product(v_P: Array) -> Array:
        z_NV, _ = block.problem.forward(_stepped(block, v_P))
        return np.asarray(block.problem.loss.terms(z_NV)[0].sum().imag / STEP)

    v_P = _direction("derivative", block, vector)
    return float(_joined("derivative", [(e, product(u_P)) for e, u_P in _sizes(v_P)]))


@one_blas_thread()
def hvp(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    vector: Vector,
) -> dict[str, Array]:
    """The Hessian of the summed loss times a vector.

    Definition
        H v = Im ∇L(θ + i h v) / h, h = 1e-30: exact to rounding, no differences.

    Args:
        model: a Model with what it reads, or a Problem without (see `problem` for its rows).
        tokens: a Corpus, with its labels, mask and segments, as `collect` takes it; or (B, T)
            integers in [0, vocabulary), or images (B, C, H, W).
        labels: of plain tokens: (B, T) integers, negative = none; by default the next token
            (LABELS). A Corpus has its own.
        wrt: pattern over parameters, e.g. "blocks.*.mlp.*.weight": the block of H.
        vector: {name: array of its shape} for every parameter of the block, real numbers of any
            size: the product of 2^k v has the bits of 2^k times the product of v, wherever neither
            leaves the range of normal numbers.

    Returns:
        {name: array of its shape} [nats / parameter], float64.

    Raises:
        NameUnknownError: no such parameter. ShapeError: of the vector. NonFiniteError: NaN in the
        weights or the vector. EmptyError: no label. RangeError: ids; a product beyond 1.8e308.
        DTypeError: a vector that is not real. ConventionError: labels beside a Corpus.

    Cost: one forward and one backward in complex arithmetic, every activation in memory; as often
        again for entries of the vector that are 2^512 times smaller than others.
    Source: DESIGN §5; Martins, Sturdza & Alonso 2003 (complex step); Pearlmutter 1994 (H v).
    Proof: tests/test_problem.py::test_the_step_and_central_differences_agree,
        tests/test_exact.py::test_products_are_linear_over_the_whole_range,
        tests/test_problem.py::test_curvature_of_a_batch_is_that_of_its_documents
    """
    block = _block("hvp", model, tokens, labels, wrt)
    return block.named(_product("hvp", block, "hessian")(_direction("hvp", block, vector)))


@one_blas_thread()
def ggnvp(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    vector: Vector,
) -> dict[str, Array]:
    """The generalised Gauss-Newton matrix of the summed loss times a vector.

    Definition
        GGN v = Jᵀ (∂²L/∂z²) (J v), J v = Im z(θ + i h v) / h; z the logits at labelled positions.

    Args, Returns, Raises: as `hvp`.

    Cost: one complex forward, one real forward and backward.
    Source: P3; Martens 2014 (arXiv 1412.1193), section 8.
    Proof: tests/test_exact.py::test_products_round_as_float64_does,
        ::test_O14_hessian_is_symmetric_and_linear_and_ggn_is_psd
    """
    block = _block("ggnvp", model, tokens, labels, wrt)
    return block.named(_product("ggnvp", block, "ggn")(_direction("ggnvp", block, vector)))


def _direction(who: str, block: _Block, vector: Vector) -> Array:
    unknown = sorted(set(vector) ^ set(block.names))
    if unknown:
        raise NameUnknownError(
            f"exact.{who}: the vector must name the parameters of the block; "
            f"{unknown[0]!r} is in only one of the two."
        )
    for name in block.names:
        shape, one = block.problem.parameters[name].shape, np.asarray(vector[name])
        require_shape(f"exact.{who}", f"vector[{name!r}]", one, shape, name)
        require_dtype(f"exact.{who}", f"vector[{name!r}]", one, "fiub", "real numbers")
    v_P = block.flat(vector)
    require_finite(f"exact.{who}", "the vector", v_P)
    return np.asarray(v_P, np.result_type(v_P.dtype, np.float64))


def operator(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    kind: str = "hessian",
) -> LinearOperator:
    """A block of any size as a SciPy LinearOperator, for `refcurv.algebra.matrix_free`.

    Definition
        v ↦ H v, GGN v, or (H − GGN) v by its own route, for kind "hessian", "ggn", "residual"; v is
        the block's parameters end to end, row-major (VEC).

    Args, Raises: as `hvp`; ConventionError for another kind.

    Returns:
        LinearOperator (P, P), symmetric. GGN is also the expected Fisher (O11).

    Cost: of `hvp` or `ggnvp`, per product; nothing P × P is ever made.
    Source: as `hvp`.
    Proof: tests/test_exact.py::test_operators_are_the_dense_matrices
    """
    require_choice("exact.operator", "kind", kind, PRODUCTS)
    block = _block("operator", model, tokens, labels, wrt)
    one = partial(_vector, _product("operator", block, kind))
    return LinearOperator(shape=(block.size,) * 2, matvec=one, rmatvec=one, dtype=np.float64)


@one_blas_thread()
def _vector(product: Callable[[Array], Array], v: Array) -> Array:
    require_dtype("exact.operator", "the vector", v, "fiub", "real numbers")
    v_P = np.asarray(v, np.float64).reshape(-1)
    require_finite("exact.operator", "the vector", v_P)
    return product(v_P)


# ------------------------------------------------------------------ dense matrices


def _no_progress(done: int, total: int) -> None:
    """Nobody watches."""


@one_blas_thread()
def hessian(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    progress: Progress = _no_progress,
) -> Array:
    """The dense Hessian of the summed loss in a block of parameters.

    Definition
        H[p, q] = ∂²L / ∂θ_p ∂θ_q over the block's parameters end to end, row-major (VEC).

    Args: as `hvp`; progress is called with (columns done, columns).

    Returns:
        (P, P) [nats / parameter²], symmetric to rounding: its asymmetry is the error made.

    Raises: as `hvp`; RangeError: a block of more than 8,192 parameters.

    Cost: P times `hvp`.
    Source: as `hvp`.
    Proof: tests/test_exact.py::test_hessian_equals_central_differences_in_longdouble,
        tests/test_peers_curvature.py::test_exact_curvature_is_torchs
    """
    return _columns(_small("hessian", model, tokens, labels, wrt), "hessian", progress)


@one_blas_thread()
def ggn(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    progress: Progress = _no_progress,
) -> Array:
    """The dense generalised Gauss-Newton matrix in a block of parameters.

    Definition
        GGN = Σ_n J_nᵀ (∂²L/∂z_n²) J_n over loss positions n; for cross-entropy diag p − p pᵀ.

    Args, Returns, Raises: as `hessian`.

    Cost: P times `ggnvp`.
    Source: as `ggnvp`.
    Proof: tests/test_exact.py::test_O11_ggn_is_the_expected_fisher
    """
    return _columns(_small("ggn", model, tokens, labels, wrt), "ggn", progress)


def _columns(block: _Block, kind: str, progress: Progress) -> Array:
    product, P = _product(kind, block, kind), block.size
    dtype = np.result_type(*(block.problem.parameters[name].dtype for name in block.names))
    out = np.empty((P, P), dtype)
    unit = np.zeros(P, dtype)
    for j in range(P):
        unit[j] = 1
        out[:, j] = product(unit)
        unit[j] = 0
        progress(j + 1, P)
    return out


def _small(
    who: str,
    model: Model | Problem,
    tokens: Tokens,
    labels: ArrayLike | None,
    wrt: str,
) -> _Block:
    block = _block(who, model, tokens, labels, wrt)
    P = block.size
    if P > DENSE:
        raise RangeError(
            f"exact.{who}: the block has {P:,} parameters, and a dense matrix of it would take "
            f"{8 * P * P / 2**30:,.1f} GiB (at most {DENSE:,} parameters are made dense). Ask "
            f"matrix_free.xtrace or extreme_eigenvalues of exact.operator(..., wrt={wrt!r})."
        )
    return block


# ------------------------------------------------------------------ Fisher matrices


@dataclass(frozen=True, slots=True)
class _Labels:
    """Whose labels the backward pass uses (FISHER), and what of them is squared."""

    fisher: Fisher
    per: str
    seed: int
    draws: int


@one_blas_thread()
def fisher(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
    progress: Progress = _no_progress,
) -> Array:
    """The dense Fisher in a block of parameters: F, the exact one of the three (THREE).

    Definition
        expected    F = Σ_t Σ_v p_tv ∇(−log p_tv) ∇(−log p_tv)ᵀ over loss positions t and entries v;
        sampled     F = (1/M) Σ_m Σ_seg D Dᵀ, D = Σ_t ∇(−log p_t[y_t]) over the segment's loss
                    positions, y_t ~ p_t drawn anew for each of M draws (SAMPLING); unbiased for
                    `expected`;
        signed      the same with D = Σ_t J_tᵀ S_t ε_t, ε_t drawn signs; unbiased for `expected`;
        empirical   the same with the corpus's labels, once.
        A segment is a document of a packed sequence, a sequence that is not packed, or an image, so
        that packing and padding change nothing (VECTOR). With per="term", D Dᵀ becomes
        Σ_t D_t D_tᵀ. For `expected` the two are equal: given the tokens, labels are independent and
        E D_t = 0.

    Args: as `hessian`; fisher, per, seed, draws as above; progress gets (segments done, all).

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises: as `hessian`; ConventionError for a choice that the law does not know.

    Cost: one forward per segment, and T·V (expected), T·M (per="term") or M backward passes.
    Source: P3, FISHER; Kunstner et al. 2019 (arXiv 1905.12558) on `empirical`.
    Proof: tests/test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums,
        tests/test_exact.py::test_O11_ggn_is_the_expected_fisher,
        tests/test_problem.py::test_O52_curvature_of_packed_documents_is_that_of_separate_ones
    """
    block = _small("fisher", model, tokens, labels, wrt)
    labelled = _labels("fisher", fisher, per, seed, draws)
    wide = block.problem.linear.issuperset(block.names)
    out = np.zeros((block.size, block.size))
    for part, saved, d_z in _cotangents(block.problem, labelled, wide, progress):
        rows = _jacobian_rows(part, part.parameters, saved, d_z, block.names)
        D_CP = block.flat(rows)
        out = out + D_CP.T @ D_CP
    return out


@one_blas_thread()
def fisher_along(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    vector: Vector,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
    progress: Progress = _no_progress,
) -> Array:
    """What each cotangent contributes along a vector: vᵀ F v is the sum of their squares.

    Definition
        x_c = <D_c, v>, D_c and F as in `fisher`; F itself is never made.

    Args: as `fisher`; the vector names its own parameters, any number of them.

    Returns:
        (C,), C = Σ T·V over segments for `expected`.

    Raises, Cost, Source: as `fisher`, without the limit of size.
    Proof: tests/test_exact.py::test_fisher_along_a_vector
    """
    block = _block("fisher_along", model, tokens, labels, ",".join(vector))
    sizes = _sizes(_direction("fisher_along", block, vector))
    parts = [(e, block.named(u_P)) for e, u_P in sizes]
    labelled = _labels("fisher_along", fisher, per, seed, draws)
    wide = block.problem.linear.issuperset(block.names)
    out = []
    for part, saved, d_z in _cotangents(block.problem, labelled, wide, progress):
        x_KC = np.zeros((len(parts), len(d_z)))
        for step in _steps(part, part.parameters, saved, d_z, block.names):
            for k, (_, u) in enumerate(parts):
                x_KC[k] += _along(step, u[step.name])
        out.append(_joined("fisher_along", [(e, x_KC[k]) for k, (e, _) in enumerate(parts)]))
    return np.concatenate(out)


def _along(step: Tap | Slope, u: Array) -> Array:
    """<D, u> of one parameter, D the gradient that the step carries: (C,), or () of a Slope."""
    if isinstance(step, Tap):
        return np.asarray((step.g * (step.a @ u.T)).sum(axis=(1, 2)))
    return np.asarray((step.d * u).sum())


@one_blas_thread()
def f_tok(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
    progress: Progress = _no_progress,
) -> Array:
    """The Fisher of one linear layer without its cross-position terms: F_tok (THREE).

    Definition
        F_tok = Σ_c Σ_s (g_s g_sᵀ) ⊗ (a_s a_sᵀ), where `fisher` has Σ_c vec(D) vec(D)ᵀ,
        D = Σ_s g_s a_sᵀ: c runs over the same cotangents, s over positions.

    Args: as `fisher`; `wrt` must name the weight of one linear layer.

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises: as `fisher`; ConventionError: `wrt` is not the weight of one linear layer.

    Cost: as `fisher`.
    Source: ORACLES.md §0; Eschenhagen et al. 2023 (arXiv 2311.00636), the expand setting.
    Proof: tests/test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums
    """
    block = _small("f_tok", model, tokens, labels, wrt)
    O, I = _layer_shape("f_tok", block)  # noqa: E741
    labelled = _labels("f_tok", fisher, per, seed, draws)
    R = np.zeros((O * O, I * I))
    for _, tap in _taps(block, labelled, progress):
        R = R + _kron_sum(tap.a[0], _position_moments(tap.g))
    return from_rearranged(R, (O, I))


def _position_moments(g_CTO: Array) -> Array:
    """Σ_c g_cs g_csᵀ at each position s, (T, O, O)."""
    return np.asarray(g_CTO.transpose(1, 2, 0) @ g_CTO.swapaxes(0, 1))


def _kron_sum(a_TI: Array, gg_TOO: Array) -> Array:
    """Σ_s gg_s ⊗ (a_s a_sᵀ), `rearranged`: Σ_s rvec(gg_s) rvec(a_s a_sᵀ)ᵀ, (O², I²)."""
    aa_TII = a_TI[:, :, None] * a_TI[:, None, :]
    return np.asarray(gg_TOO.reshape(len(a_TI), -1).T @ aa_TII.reshape(len(a_TI), -1))


@one_blas_thread()
def moments(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
    progress: Progress = _no_progress,
) -> Moments:
    """A and G of one linear layer by definition: what `collect` must find.

    Definition
        A = (1/n) Σ_s a_s a_sᵀ over the n rows s of the Problem (ROWS; `reached` of a Model);
        G = (1/n) Σ_c Σ_s g_s g_sᵀ, c over the cotangents of `fisher`: for `expected`, each loss
        position and each vocabulary entry by itself, as is right when positions mix (O13).

    Args, Raises, Cost: as `f_tok`; blocks of any size.

    Returns:
        Moments(A (I, I), G (O, O), rows).

    Source: P1, COUNTS.
    Proof: tests/test_exact.py::test_moments_are_collected
    """
    block = _block("moments", model, tokens, labels, wrt)
    O, _ = _layer_shape("moments", block)  # noqa: E741
    labelled = _labels("moments", fisher, per, seed, draws)
    sum_G = np.zeros((O, O))
    for part, tap in _taps(block, labelled, progress):
        g_NO = tap.g[:, part.kept(tap)[0]].reshape(-1, O)
        sum_G = sum_G + g_NO.T @ g_NO
    a_NI = _inputs(block)
    n = len(a_NI)
    return Moments(a_NI.T @ a_NI / n, sum_G / n, n)


@one_blas_thread()
def kfac(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
    progress: Progress = _no_progress,
) -> Array:
    """The dense K-FAC block of one linear layer: K, the third of the three (THREE).

    Definition
        K = n (G ⊗ A), A, G, n of `moments`.

    Args, Returns, Raises, Cost: as `f_tok`.
    Source: P2; Martens & Grosse 2015 (arXiv 1503.05671).
    Proof: tests/test_exact_cases.py
    """
    made = _small("kfac", model, tokens, labels, wrt).problem
    options = {"fisher": fisher, "per": per, "seed": seed, "draws": draws, "progress": progress}
    found = moments(made, wrt=wrt, **options)  # type: ignore[arg-type]
    return found.rows * kron_dense(found.G, found.A)


@one_blas_thread()
def rows(
    model: Model | Problem,
    tokens: Tokens = None,
    labels: ArrayLike | None = None,
    *,
    wrt: str,
    fisher: str = "expected",
    per: str = "segment",
    seed: int = 0,
    draws: int = 1,
) -> list[tuple[Array, Array]]:
    """What F, F_tok and K of one linear layer are made of: its inputs and output gradients.

    Definition
        Pairs (a (T, I), g (C, T, O)), some cotangents c of one segment at a time:
        D_c = Σ_s g_cs a_sᵀ.

    Args, Raises, Cost: as `moments`.

    Returns:
        The pairs; concatenated over c they are all of g.

    Source: THREE.
    Proof: tests/test_exact.py::test_O18_the_trace_gap_is_a_covariance_of_norms
    """
    block = _block("rows", model, tokens, labels, wrt)
    _layer_shape("rows", block)
    taps = _taps(block, _labels("rows", fisher, per, seed, draws), _no_progress)
    return [(tap.a[0], tap.g) for _, tap in taps]


def _labels(who: str, fisher: str, per: str, seed: int, draws: int) -> _Labels:
    kind = Fisher(require_choice(f"exact.{who}", "fisher", fisher, list(Fisher)))
    require_choice(f"exact.{who}", "per", per, PER)
    require_draws(f"exact.{who}", draws)
    if draws != 1 and kind not in (Fisher.SAMPLED, Fisher.SIGNED):
        raise ConventionError(f"exact.{who}: {kind} labels are not drawn; draws must be 1.")
    return _Labels(kind, per, require_seed(f"exact.{who}", seed), draws)


def _cotangents(
    made: Problem, labels: _Labels, wide: bool, progress: Progress
) -> Iterator[tuple[Problem, Saved, Array]]:
    """(one segment, its forward, cotangents (C, N, V)): the sum of their squares is the Fisher."""
    parts = list(made.split())
    for done, part in enumerate(parts):
        progress(done, len(parts))
        z_NV, saved = part.forward(part.parameters)
        for d_CNV in _of_segment(part.loss, z_NV, labels):
            step = COTANGENTS if wide else 1
            for begin in range(0, len(d_CNV), step):
                yield part, saved, d_CNV[begin : begin + step]
    progress(len(parts), len(parts))


def _of_segment(loss: Loss, z_NV: Array, labels: _Labels) -> Iterator[Array]:
    """The cotangents of one segment, a few (C, N, V) at a time."""
    N, V = z_NV.shape
    if labels.fisher is Fisher.EXPECTED:
        # column v of the root of every position; each position by itself, for positions mix (O13)
        column_VNV = np.stack([loss.root(z_NV, np.tile(e, (N, 1))) for e in np.eye(V)])
        for n in range(N):
            alone = np.zeros((V, N, V), z_NV.dtype)
            alone[:, n] = column_VNV[:, n]
            yield alone
        return
    if labels.fisher is Fisher.EMPIRICAL:
        d_MNV = loss.terms(z_NV)[1][None]
    else:
        sent = loss.drawn if labels.fisher is Fisher.SAMPLED else loss.signed
        d_MNV = np.stack([sent(z_NV, labels.seed, draw) for draw in range(labels.draws)])
        d_MNV = d_MNV / math.sqrt(labels.draws)
    if labels.per == "segment":
        yield d_MNV
        return
    for d_NV in d_MNV:
        yield np.eye(N)[:, :, None] * d_NV


def _taps(block: _Block, labels: _Labels, progress: Progress) -> Iterator[tuple[Problem, Tap]]:
    """(One segment, the linear layer's a (1, T, I) and g (C, T, O)), over all cotangents."""
    for part, saved, d_z in _cotangents(block.problem, labels, True, progress):
        yield part, _tap(part, part.parameters, saved, d_z, block.names[0])


def _inputs(block: _Block) -> Array:
    """The rows of A: what the block's one linear layer reads at the kept positions, (n, I)."""
    made = block.problem
    z_NV, saved = made.forward(made.parameters)
    tap = _tap(made, made.parameters, saved, np.zeros_like(z_NV), block.names[0])
    return np.asarray(tap.a[made.kept(tap)])


def _tap(made: Problem, parameters: Parameters, saved: Saved, d_z: Array, name: str) -> Tap:
    for step in _steps(made, parameters, saved, d_z, [name]):
        if isinstance(step, Tap):
            return step
    raise NameUnknownError(f"exact: the backward of this Problem yields no Tap {name!r}.")


def _layer_shape(who: str, block: _Block) -> tuple[int, int]:
    name = block.names[0]
    if len(block.names) > 1 or name not in block.problem.linear:
        raise ConventionError(
            f"exact.{who}: defined for the weight of one linear layer; got {', '.join(block.names)}"
            ". Embeddings, gains and tied weights have no rows a, g of their own."
        )
    O, I = block.problem.parameters[name].shape  # noqa: E741
    return O, I
