"""The K-FAC edit of a model: the projection of each named matrix, cut by the staircase."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.scaling import exponent, shifted
from refcurv.algebra.staircase import cut, undecided
from refcurv.curvature.bases import Bases, named, require_bases
from refcurv.curvature.checks import require_basis
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing import record
from refcurv.editing.projection import keep_pairs
from refcurv.editing.record import EditRecord, LayerEdit, Step, Work
from refcurv.law import tolerance
from refcurv.law.checks import Array, EmptyError, NameUnknownError, require_shape
from refcurv.law.conventions import MOST_ROUNDING, Bias
from refcurv.model.given import require_model
from refcurv.model.weights import Model


def edit(
    model: Model, basis: Bases, rho: float | Mapping[str, float], *, force: bool = False
) -> tuple[Model, EditRecord]:
    """Keep the sharpest directions of weight matrices: those that hold a share rho of the mass.

    Definition
        C = U_Gᵀ W U_A, Π_ij = λ_i μ_j; keep pairs by descending Π until their mass is >= rho of
        the total (SELECT); W' = U_G (C ∘ M) U_Aᵀ, rounded to the dtype in which the source stores
        W. rho = 1 returns W itself. A joint basis edits [W b] as one matrix, each part rounded to
        its own dtype; a separate one leaves b alone (BIAS).

    Args:
        model: whose weights to edit; its dtype must hold the stored ones exactly.
        basis: of `decompose` or `load_bases`.
        rho: one share for every layer of `basis`, or {pattern: share}; a layer matched by two
            patterns is an error.
        force: take a basis that was made from other weights than the model's, for example to edit
            an edited model again.

    Returns:
        The edited model and the EditRecord, which says what it started from. The given model is
        not changed.

    Raises:
        RangeError: rho outside [0, 1]. NameUnknownError: a pattern that matches no layer with a
        basis. ShapeError: a basis of another model, or a joint one without the bias's column.
        EmptyError: a layer without curvature, or whose curvature is rounding (NEGATIVE).
        ConventionError: a basis of other weights, without `force`; a layer that two patterns match;
        a head tied to the embedding. ShapeError, NonFiniteError, ConventionError: a basis that is
        none (`require_basis`). NonFiniteError: W holds NaN. DTypeError: W was rounded when loaded.

    Cost: 4·O·I·(O + I) flops per layer, in float64; 6·O·I·(O + I) where W' is rounded.
    Source: P5-P8 (arXiv 2510.24256).
    Proof: tests/test_projection.py::test_edit_of_a_model,
        tests/test_biases.py::test_O47_a_joint_edit_is_the_projection_of_weight_and_bias
    """
    return record.done(edit_work(model, basis, rho, force=force))


def edit_work(
    model: Model, basis: Bases, rho: float | Mapping[str, float], *, force: bool = False
) -> Work:
    """`edit`, checked and begun, to be done layer by layer (`record.done_to`)."""
    asked = rho if isinstance(rho, Mapping) else {"**": rho}
    shares = record.shares("edit", "rho", model, layers_of("edit", model, basis), asked)
    begun = record.before("edit", model, (named(basis), basis.weights), force)
    steps = (_edit_layer(model, basis, layer, share) for layer, share in shares.items())
    return Work(begun, tuple(shares), steps, basis.bias is Bias.JOINT)


def _edit_layer(model: Model, basis: Bases, layer: str, share: float) -> Step:
    parts, W, one = read_layer("edit", model, basis, layer)
    require_curvature(layer, one)
    stairs = cut(one.lam, one.mu, share, f"edit {layer!r}")
    new: dict[str, Array] = {}
    edited, back = W, 0.0
    if share != 1:
        mask = stairs.mask(W.shape[1])
        exact = keep_pairs(W, one, mask)
        new = record.taken_apart(model, parts, exact)
        edited = record.joined(new)
        back = restored(W, exact, edited, one, mask)
    kept = (W.size, stairs.kept, stairs.mass / stairs.total, stairs.gap)
    found = (*kept, _acceptable(one, share), record.norm_ratio(edited, W), back)
    return new, LayerEdit(basis.method, layer, share, *found)


def layers_of(who: str, model: Model, basis: Bases) -> list[str]:
    """The model's layers that have a basis, in file order."""
    require_model(who, model)
    require_bases(who, "the basis", basis)
    order = [name for name in model.config.linear_layers() if name in basis.layers]
    if not order:
        raise NameUnknownError(
            f"{who}: the basis has layers {list(basis)[:3]}, the model none of them. "
            "Is it the basis of another model?"
        )
    return order


def read_layer(
    who: str, model: Model, basis: Bases, layer: str
) -> tuple[dict[str, Array], Array, Eigenbasis]:
    """The layer's parts, its matrix W or [W b], and its basis, whose shape must fit."""
    parts = record.matrix_parts(who, model, layer, basis.bias)
    W, one = record.joined(parts), basis[layer]
    require_basis(who, layer, one)
    axes = "(O, I) of its basis" if len(parts) == 1 else "(O, I + 1) of its joint basis"
    require_shape(who, " with ".join(parts), W, (len(one.lam), len(one.mu)), axes)
    return parts, W, one


def restored(W: Array, exact: Array, edited: Array, basis: Eigenbasis, mask: Array) -> float:
    """‖P(W' − exact)‖/‖P(W)‖, where P projects on the pairs outside the mask.

    Cost: 2·O·I·(O + I) flops; none where W' was not rounded.
    Proof: tests/test_variants.py::test_what_rounding_restores_is_the_brute_force
    """
    C = np.subtract(edited, exact, dtype=np.float64)
    if mask.all() or not C.any():
        return 0.0
    with one_blas_thread():
        C = basis.U_G.T @ C  # each product in turn: three matrices, not four
        C = C @ basis.U_A
    C[mask] = 0
    return record.restored(C, W, exact)


def require_curvature(layer: str, one: Eigenbasis) -> None:
    """Refuse a layer whose G is known to be largely rounding (NEGATIVE)."""
    trace = float(one.lam.sum())
    if trace > 0 and one.rounding is not None and one.rounding > MOST_ROUNDING * trace:
        raise EmptyError(
            f"edit {layer!r}: G has trace {trace:.1e}, of which rounding alone makes "
            f"{one.rounding:.1e}: its directions are noise (NEGATIVE). Collect it in float64, or "
            "leave the layer out: its gradient may be zero by theory."
        )


def _acceptable(one: Eigenbasis, rho: float) -> int:
    """How many pairs another correct program may decide the other way (ACCEPTABLE)."""
    if rho in (0, 1):
        return 0
    lam, mu = (shifted(x, -exponent(x)) for x in (one.lam, one.mu))  # as SELECT takes them
    # Σ over pairs of w (λ'μ' − λμ), w = 1 − rho in the set and −rho outside; Σ|λ' − λ| <= √O e_G
    (O, Lam), (I, Mu) = ((len(x), float(x.sum())) for x in (lam, mu))  # noqa: E741
    e_G, e_A = (tolerance.eigenvalues(len(x)) * float(np.linalg.norm(x)) for x in (lam, mu))
    first = math.sqrt(I) * Lam * e_A + math.sqrt(O) * Mu * e_G
    slack = max(rho, 1 - rho) * (first + math.sqrt(O * I) * e_A * e_G)
    errors = (np.full(O, e_G), np.full(I, e_A))
    sure, possible = undecided(lam, mu, rho, errors, slack)
    return int((possible - sure).sum())
