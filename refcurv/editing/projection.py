"""The edit: W' = U_G (C ∘ M) U_Aᵀ, coefficients of flat directions set to zero (P5-P8).

With a joint basis W stands for [W b], the bias its last column (BIAS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.staircase import Staircase, count_between, cut
from refcurv.curvature.eigenbasis import Bases, Eigenbasis
from refcurv.files.weights import narrow, widen
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    NameUnknownError,
    require_finite,
    require_range,
    require_shape,
)
from refcurv.law.conventions import Bias
from refcurv.model.config import Model, expand


@dataclass(frozen=True, slots=True)
class LayerEdit:
    """What was kept of one layer.

    Fields:
        layer, rho: as asked. pairs = O·I, or O·(I + 1) of [W b]; kept, how many of them; mass,
            their share of the total.
        gap: (last kept − first dropped) / last kept, NaN when nothing was dropped or kept.
        acceptable: pairs whose key lies within its rounding budget of the cut, so that another
            correct program may decide them either way (SELECT).
        norm: ‖W'‖/‖W‖ in Frobenius norm, of [W b] where that was edited.
    """

    layer: str
    rho: float
    pairs: int
    kept: int
    mass: float
    gap: float
    acceptable: int
    norm: float


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What an edit did, layer by layer in file order."""

    layers: tuple[LayerEdit, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, a dictionary per layer; NaN as None."""
        rows = [asdict(layer) for layer in self.layers]
        return [{k: None if v != v else v for k, v in row.items()} for row in rows]  # noqa: PLR0124


def project(W: Array, basis: Eigenbasis, counts: Array) -> Array:
    """U_G (C ∘ M) U_Aᵀ with C = U_Gᵀ W U_A and M[i, j] = (j < counts[i]); float64.

    W and the result are (O, I); an orthogonal projection: twice is once (O54).
    Cost: 2·O·I·(O + I) multiplications, twice.
    """
    with one_blas_thread():
        C = basis.U_G.T @ W.astype(np.float64) @ basis.U_A
        C[np.arange(W.shape[1]) >= counts[:, None]] = 0
        return np.asarray(basis.U_G @ C @ basis.U_A.T)


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
        EmptyError: a layer without curvature.

    Cost: 4·O·I·(O + I) flops per layer, in float64.
    Source: P5-P8 (arXiv 2510.24256).
    Proof: tests/test_projection.py::test_O54_edit_is_an_orthogonal_projection,
        tests/test_biases.py::test_O47_a_joint_edit_is_the_projection_of_weight_and_bias,
        tests/test_staircase.py::test_cut_equals_brute_force
    """
    changed: dict[str, Array] = {}
    records = []
    for layer, share in _shares(model, basis, rho).items():
        names = [model.config.weight_of(layer)]
        if basis.bias is Bias.JOINT and model.config.has_bias(layer):
            names.append(f"{layer}.bias")
        parts = [_part(model, name) for name in names]
        W = parts[0] if len(parts) == 1 else np.column_stack(parts)
        one = basis[layer]
        axes = "(O, I) of its basis" if len(parts) == 1 else "(O, I + 1) of its joint basis"
        require_shape("edit", " with ".join(names), W, (len(one.lam), len(one.mu)), axes)
        stairs = cut(one.lam, one.mu, share, f"edit {layer!r}")
        edited = W
        if share != 1:
            columns = np.split(project(W, one, stairs.counts), [parts[0].shape[1]], axis=1)
            for name, part, new in zip(names, parts, columns, strict=False):  # no b, no column
                stored = model.stored.get(name, model.dtype)
                rounded = widen(narrow(new.reshape(part.shape), stored), stored, model.dtype)
                changed[name] = rounded
            edited = np.column_stack([changed[name] for name in names])
        records.append(_record(layer, share, one, stairs, W, edited))
    return model.with_parameters(changed), EditRecord(tuple(records))


def _part(model: Model, name: str) -> Array:
    """A parameter that can be edited: finite, and read without rounding."""
    array = np.asarray(model.parameters[name])
    if model.stored.get(name, model.dtype) == "float64" and model.dtype != "float64":
        raise DTypeError(
            f"edit: {name} is stored in float64 but the model was loaded as {model.dtype}; "
            'load it with dtype="float64".'
        )
    require_finite("edit", name, array)
    return array


def _shares(model: Model, basis: Bases, rho: float | Mapping[str, float]) -> dict[str, float]:
    """The share of every layer that is to be edited, in file order."""
    order = [name for name in model.config.linear_layers() if name in basis]
    if not order:
        raise NameUnknownError(
            f"edit: the basis has layers {list(basis)[:3]}, the model none of them. "
            "Is it the basis of another model?"
        )
    asked = rho if isinstance(rho, Mapping) else {"**": rho}
    shares: dict[str, float] = {}
    for pattern, value in asked.items():
        share = require_range("edit", f"rho of {pattern!r}", value, 0, 1)
        for layer in expand(pattern, order):
            if layer in shares:
                raise ConventionError(f"edit: {layer!r} is matched by two patterns.")
            shares[layer] = share
    if "head" in shares and model.config.tied:
        raise ConventionError(
            "edit: the head is tied to the embedding; editing it would edit both."
        )
    return {layer: shares[layer] for layer in order if layer in shares}


def _record(
    layer: str, rho: float, one: Eigenbasis, stairs: Staircase, W: Array, edited: Array
) -> LayerEdit:
    size = float(np.linalg.norm(W.astype(np.float64)))
    return LayerEdit(
        layer,
        rho,
        W.size,
        stairs.kept,
        stairs.mass / stairs.total,
        stairs.gap,
        _acceptable(one, stairs),
        float(np.linalg.norm(edited.astype(np.float64))) / size if size else 1.0,
    )


def _acceptable(one: Eigenbasis, stairs: Staircase) -> int:
    """Pairs within budget of the cut: eigenvalues err by their solver's budget of the largest."""
    if stairs.kept in (0, len(one.lam) * len(one.mu)):
        return 0
    solver = tolerance.eigenpair(max(len(one.lam), len(one.mu)))
    width = 2 * solver * float(one.lam[0] * one.mu[0])
    return count_between(one.lam, one.mu, stairs.first_out - width, stairs.last + width)
