"""The edit: W' = U_G (C ∘ M) U_Aᵀ, coefficients of flat directions set to zero (P5-P8).

With a joint basis W stands for [W b], the bias its last column (BIAS).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.staircase import Staircase, count_between, cut
from refcurv.curvature.eigenbasis import Bases, Eigenbasis
from refcurv.editing import record
from refcurv.editing.record import EditRecord, LayerEdit
from refcurv.law import tolerance
from refcurv.law.checks import Array, EmptyError, NameUnknownError, require_shape
from refcurv.law.conventions import MOST_ROUNDING
from refcurv.model.config import Model


def keep_pairs(W: Array, basis: Eigenbasis, mask: Array) -> Array:
    """U_G (C ∘ M) U_Aᵀ with C = U_Gᵀ W U_A and M = mask, (O, I) bool; float64.

    W and the result are (O, I); an orthogonal projection: twice is once (O54).
    Cost: 2·O·I·(O + I) multiplications, twice.
    """
    with one_blas_thread():
        C = basis.U_G.T @ W.astype(np.float64) @ basis.U_A
        C[~mask] = 0
        return np.asarray(basis.U_G @ C @ basis.U_A.T)


def project(W: Array, basis: Eigenbasis, counts: Array) -> Array:
    """`keep_pairs` of a staircase: M[i, j] = (j < counts[i])."""
    return keep_pairs(W, basis, np.arange(W.shape[1]) < counts[:, None])


def edit(model: Model, basis: Bases, rho: float | Mapping[str, float]) -> tuple[Model, EditRecord]:
    """Keep the sharpest directions of weight matrices, as many as hold a share rho of the mass.

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

    Returns:
        The edited model (the given one is untouched), and the EditRecord.

    Raises:
        RangeError: rho outside [0, 1]. NameUnknownError: a pattern that matches no layer with a
        basis. ShapeError: a basis of another model, or a joint one without the bias's column.
        EmptyError: a layer without curvature, or with none but rounding (NEGATIVE).

    Cost: 4·O·I·(O + I) flops per layer, in float64.
    Source: P5-P8 (arXiv 2510.24256).
    Proof: tests/test_projection.py::test_O54_edit_is_an_orthogonal_projection,
        tests/test_biases.py::test_O47_a_joint_edit_is_the_projection_of_weight_and_bias,
        tests/test_staircase.py::test_cut_equals_brute_force
    """
    asked = rho if isinstance(rho, Mapping) else {"**": rho}
    shares = record.shares("edit", "rho", model, layers_of("edit", model, basis), asked)
    changed: dict[str, Array] = {}
    records = []
    for layer, share in shares.items():
        parts, W, one = read_layer("edit", model, basis, layer)
        _require_curvature(layer, one)
        stairs = cut(one.lam, one.mu, share, f"edit {layer!r}")
        edited = W
        if share != 1:
            new = record.taken_apart(model, parts, project(W, one, stairs.counts))
            changed |= new
            edited = record.joined(new)
        mass, acceptable = stairs.mass / stairs.total, _acceptable(one, stairs)
        kept = (W.size, stairs.kept, mass, stairs.gap, acceptable, record.norm_ratio(edited, W))
        records.append(LayerEdit(basis.method, layer, share, *kept))
    return model.with_parameters(changed), EditRecord(tuple(records))


def layers_of(who: str, model: Model, basis: Bases) -> list[str]:
    """The model's layers that have a basis, in file order."""
    order = [name for name in model.config.linear_layers() if name in basis]
    if not order:
        raise NameUnknownError(
            f"{who}: the basis has layers {list(basis)[:3]}, the model none of them. "
            "Is it the basis of another model?"
        )
    return order


def read_layer(
    who: str, model: Model, basis: Bases, layer: str
) -> tuple[dict[str, Array], Array, Eigenbasis]:
    """The layer's parts, its matrix W or [W b], and its basis, which must fit."""
    parts = record.matrix_parts(who, model, layer, basis.bias)
    W, one = record.joined(parts), basis[layer]
    axes = "(O, I) of its basis" if len(parts) == 1 else "(O, I + 1) of its joint basis"
    require_shape(who, " with ".join(parts), W, (len(one.lam), len(one.mu)), axes)
    return parts, W, one


def _require_curvature(layer: str, one: Eigenbasis) -> None:
    """Refuse a layer whose G is largely rounding (NEGATIVE); where that is not known, none."""
    trace = float(one.lam.sum())
    if trace > 0 and one.rounding is not None and one.rounding > MOST_ROUNDING * trace:
        raise EmptyError(
            f"edit {layer!r}: G has trace {trace:.1e}, of which rounding alone makes "
            f"{one.rounding:.1e}: its directions are noise (NEGATIVE). Collect it in float64, or "
            "leave the layer out: its gradient may be zero by theory."
        )


def _acceptable(one: Eigenbasis, stairs: Staircase) -> int:
    """Pairs within budget of the cut: eigenvalues err by their solver's budget of the largest."""
    if stairs.kept in (0, len(one.lam) * len(one.mu)):
        return 0
    solver = tolerance.eigenpair(max(len(one.lam), len(one.mu)))
    width = 2 * solver * float(one.lam[0] * one.mu[0])
    return count_between(one.lam, one.mu, stairs.first_out - width, stairs.last + width)
