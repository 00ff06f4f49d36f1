"""Gradient, Hessian and GGN by complex step: products with a vector, and the dense matrices.

One code, three derivatives (O15). The forward and the backward are analytic, so that with
h = 1e-30 and a direction v over the parameters

    z(θ + i h v)  = z + i h J v            the Jacobian-vector product, exact to rounding
    ∇L(θ + i h v) = ∇L + i h H v           the Hessian-vector product, exact to rounding

    GGN v = Jᵀ (∂²L/∂z²) (J v)

Products are linear in v over the whole range of its dtype: v is brought to order 1 by powers of two
before the step, and the product brought back (`by_size`, `joined`).
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
from scipy.sparse.linalg import LinearOperator

from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.exact.problems import Problem
from refcurv.curvature.exact.variables import (
    Labels,
    Subject,
    Tokens,
    Variables,
    Vector,
    direction,
    named_by,
    variables_of,
)
from refcurv.law.checks import Array, RangeError, require_choice, require_dtype, require_finite
from refcurv.model.given import require_callable
from refcurv.model.layers import Saved
from refcurv.model.transformer import Parameters, Slope, Tap
from refcurv.progress import Progress, silent

STEP = 1e-30
"""h of the complex step: its square is below every rounding, so no digit of it is ever seen."""

SPAN = 512
"""Powers of two between the largest and the smallest entry of a vector that one step carries: h
times the smallest is 2⁻⁶¹², as far above underflow as products of the model's numbers need."""

# ------------------------------------------------------------------ backward, and along a step


def steps(
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


def jacobian_rows(
    made: Problem, parameters: Parameters, saved: Saved, d_z: Array, names: Iterable[str]
) -> dict[str, Array]:
    """Jᵀ d_z by parameter: (C, *shape), C running over cotangents, or over parts that add up."""
    out: dict[str, Array] = {}
    for step in steps(made, parameters, saved, d_z, names):
        d = step.g.swapaxes(-1, -2) @ step.a if isinstance(step, Tap) else step.d[None]
        before = out.get(step.name)
        out[step.name] = d if before is None else (before.sum(axis=0) + d.sum(axis=0))[None]
    return out


def gradient_at(variables: Variables, parameters: Parameters) -> dict[str, Array]:
    """∇L at `parameters`, real or complex."""
    made = variables.problem
    z_NV, saved = made.forward(parameters)
    rows = jacobian_rows(made, parameters, saved, made.loss.terms(z_NV)[1], variables.names)
    return {name: rows[name].sum(axis=0) for name in variables.names}


def _stepped(variables: Variables, v_P: Array) -> Parameters:
    """θ + i h v, θ itself where v has no part."""
    step, parameters = np.asarray(STEP, dtype=v_P.dtype), variables.problem.parameters
    moved = {name: parameters[name] + 1j * (step * v) for name, v in variables.named(v_P).items()}
    return ChainMap(moved, parameters)  # type: ignore[arg-type]


def _hessian_product(variables: Variables) -> Callable[[Array], Array]:
    """v → Im ∇L(θ + i h v) / h."""

    def product(v_P: Array) -> Array:
        return variables.flat(gradient_at(variables, _stepped(variables, v_P))).imag / STEP

    return product


def _ggn_product(variables: Variables) -> Callable[[Array], Array]:
    """v → Jᵀ (∂²L/∂z²) Im z(θ + i h v) / h."""
    made = variables.problem
    z_NV, saved = made.forward(made.parameters)

    def product(v_P: Array) -> Array:
        Jv_NV = made.forward(_stepped(variables, v_P))[0].imag / STEP
        d_z = made.loss.hessian(z_NV, Jv_NV)
        rows = jacobian_rows(made, made.parameters, saved, d_z, variables.names)
        return variables.flat({name: rows[name].sum(axis=0) for name in variables.names})

    return product


def _residual_product(variables: Variables) -> Callable[[Array], Array]:
    """v → Im J(θ + i h v)ᵀ r / h, r = ∂L/∂z held fixed: Σ_n r_n · ∂²z_n v, what H has over GGN."""
    made, names = variables.problem, variables.names
    r_NV = made.loss.terms(made.forward(made.parameters)[0])[1]

    def product(v_P: Array) -> Array:
        stepped = _stepped(variables, v_P)
        _, saved = made.forward(stepped)
        rows = jacobian_rows(made, stepped, saved, r_NV, names)
        return variables.flat({name: rows[name].sum(axis=0) for name in names}).imag / STEP

    return product


PRODUCTS: Mapping[str, Callable[[Variables], Callable[[Array], Array]]] = {
    "hessian": _hessian_product,
    "ggn": _ggn_product,
    "residual": _residual_product,
}
"""What `operator` can be: H, GGN, and H − GGN by its own route."""


def _product(who: str, variables: Variables, kind: str) -> Callable[[Array], Array]:
    """v (P,) → M v, linear in v whatever its length."""
    product = PRODUCTS[kind](variables)
    return lambda v_P: joined(who, [(e, product(u_P)) for e, u_P in by_size(v_P)])


def by_size(v_P: Array) -> list[tuple[int, Array]]:
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


def joined(who: str, parts: list[tuple[int, Array]]) -> Array:
    """Σ 2^e x over the parts [(e, x)] of a product."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = sum((np.ldexp(x, e) for e, x in parts[1:]), np.ldexp(parts[0][1], parts[0][0]))
    if not np.isfinite(out).all() and all(np.isfinite(x).all() for _, x in parts):
        raise RangeError(
            f"exact.{who}: the product is beyond the range of {out.dtype}. It is linear in the "
            "vector: divide the vector by a power of two."
        )
    return np.asarray(out)


# ------------------------------------------------------------------ first derivatives


@one_blas_thread()
def gradient(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str
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
    variables = variables_of("gradient", model, tokens, labels, wrt)
    return gradient_at(variables, variables.problem.parameters)


@one_blas_thread()
def derivative(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, vector: Vector
) -> float:
    """The derivative of the summed loss along a vector, by complex step: forward only.

    Definition
        <∇L, v> = Im L(θ + i h v) / h, h = 1e-30: the second route of `gradient` (O15).

    Args, Raises: as `hvp`; the vector names its own parameters.

    Cost: one complex forward.
    Source: Martins, Sturdza & Alonso 2003.
    Proof: tests/test_exact.py::test_O15_the_derivative_along_a_vector
    """
    variables = variables_of("derivative", model, tokens, labels, named_by("derivative", vector))
    made = variables.problem

    def product(v_P: Array) -> Array:
        z_NV, _ = made.forward(_stepped(variables, v_P))
        return np.asarray(made.loss.terms(z_NV)[0].sum().imag / STEP)

    v_P = direction("derivative", variables, vector)
    return float(joined("derivative", [(e, product(u_P)) for e, u_P in by_size(v_P)]))


# ------------------------------------------------------------------ products


@one_blas_thread()
def hvp(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, vector: Vector
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
        DTypeError: a vector that is not real. ConventionError: labels beside a Corpus, tokens
        beside a Problem, a Model without tokens; a vector that is no mapping of names.

    Cost: one forward and one backward in complex arithmetic, every activation in memory; as often
        again for entries of the vector that are 2^512 times smaller than others.
    Source: O15; Martins, Sturdza & Alonso 2003 (complex step); Pearlmutter 1994 (H v).
    Proof: tests/test_problem.py::test_the_step_and_central_differences_agree,
        tests/test_exact.py::test_products_are_linear_over_the_whole_range,
        tests/test_problem.py::test_curvature_of_a_batch_is_that_of_its_documents
    """
    variables = variables_of("hvp", model, tokens, labels, wrt)
    product = _product("hvp", variables, "hessian")
    return variables.named(product(direction("hvp", variables, vector)))


@one_blas_thread()
def ggnvp(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, vector: Vector
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
    variables = variables_of("ggnvp", model, tokens, labels, wrt)
    product = _product("ggnvp", variables, "ggn")
    return variables.named(product(direction("ggnvp", variables, vector)))


def operator(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, kind: str = "hessian"
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
    variables = variables_of("operator", model, tokens, labels, wrt)
    one = partial(_vector, _product("operator", variables, kind))
    return LinearOperator(shape=(variables.size,) * 2, matvec=one, rmatvec=one, dtype=np.float64)


@one_blas_thread()
def _vector(product: Callable[[Array], Array], v: Array) -> Array:
    require_dtype("exact.operator", "the vector", v, "fiub", "real numbers")
    v_P = np.asarray(v, np.float64).reshape(-1)
    require_finite("exact.operator", "the vector", v_P)
    return product(v_P)


# ------------------------------------------------------------------ dense matrices


@one_blas_thread()
def hessian(
    model: Subject,
    tokens: Tokens = None,
    labels: Labels = None,
    *,
    wrt: str,
    progress: Progress = silent,
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
    variables = variables_of("hessian", model, tokens, labels, wrt, dense=True)
    return _columns(variables, "hessian", progress)


@one_blas_thread()
def ggn(
    model: Subject,
    tokens: Tokens = None,
    labels: Labels = None,
    *,
    wrt: str,
    progress: Progress = silent,
) -> Array:
    """The dense generalised Gauss-Newton matrix in a block of parameters.

    Definition
        GGN = Σ_n J_nᵀ (∂²L/∂z_n²) J_n over loss positions n; for cross-entropy diag p − p pᵀ.

    Args, Returns, Raises: as `hessian`.

    Cost: P times `ggnvp`.
    Source: as `ggnvp`.
    Proof: tests/test_exact.py::test_O11_ggn_is_the_expected_fisher
    """
    return _columns(variables_of("ggn", model, tokens, labels, wrt, dense=True), "ggn", progress)


def _columns(variables: Variables, kind: str, progress: Progress) -> Array:
    """M e_j for each of the P unit vectors e_j."""
    require_callable(f"exact.{kind}", "progress", progress)
    product, P = _product(kind, variables, kind), variables.size
    parameters = variables.problem.parameters
    dtype = np.result_type(*(parameters[name].dtype for name in variables.names))
    out = np.empty((P, P), dtype)
    unit = np.zeros(P, dtype)
    for j in range(P):
        unit[j] = 1
        out[:, j] = product(unit)
        unit[j] = 0
        progress(j + 1, P)
    return out
