"""The edit that needs no data: W without its smallest singular values (P10)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.scaling import exponent
from refcurv.algebra.staircase import cut, undecided
from refcurv.algebra.svd import svd
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis, oriented
from refcurv.editing import record
from refcurv.editing.record import EditRecord, LayerEdit
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.law import tolerance
from refcurv.law.checks import Array, EmptyError, RangeError
from refcurv.model.given import require_model
from refcurv.model.patterns import expand
from refcurv.model.weights import Model


def truncate(model: Model, energy: Mapping[str, float]) -> tuple[Model, EditRecord]:
    """Keep the largest singular values of weight matrices: those that hold a share of Σ σ².

    Definition
        W = U diag(σ) Vᵀ, σ descending. k is the least number with Σ_{j<k} σ_j² >= energy·Σ σ²
        (SELECT, with λ = 1 and μ = (σ/σ_0)²). W' = U_k diag(σ_k) V_kᵀ, rounded to the dtype in
        which the source stores W. It is the nearest matrix of rank k (Eckart and Young). energy 1
        returns W itself and 0 gives 0. Only W is truncated, never the bias.

    The share is that of the present W: to truncate W' by the same energy may cut again.

    Args:
        model: whose weights to edit; its dtype must hold the stored ones exactly.
        energy: {pattern: share} over the linear layers; a layer matched by two patterns is an
            error.

    Returns:
        The edited model and the EditRecord, method "svd". The given model is not changed.

    Raises:
        RangeError: a share outside [0, 1]. NameUnknownError: a pattern that matches no linear
        layer. ConventionError: a layer that two patterns match; a head tied to the embedding; no
        mapping. EmptyError: W is 0. NonFiniteError: W holds NaN. DTypeError: W was rounded when
        loaded. SolverError, RoomError: as `algebra.svd.svd`.

    Cost: about 6·O·I·min(O, I) flops per layer, in float64; 8·O·I·min(O, I) if W' is rounded.
    Source: P10 (arXiv 2510.24256); Eckart & Young 1936.
    Proof: tests/test_svd.py::test_truncation_is_the_projection_by_the_eigenvectors_of_its_gram,
        ::test_the_error_is_the_tail_and_no_matrix_of_that_rank_is_nearer,
        ::test_the_cut_equals_brute_force
    """
    require_model("truncate", model)
    shares = record.shares("truncate", "energy", model, model.config.linear_layers(), energy)
    begun = record.before("truncate", model)
    changed: dict[str, Array] = {}
    records = []
    for layer, share in shares.items():
        name = model.config.weight_of(layer)
        W = record.parameter("truncate", model, name)
        U, sigma, Vt = singular_values(f"truncate: {layer!r}", W, full=False)
        if sigma[0] == 0:
            raise EmptyError(f"truncate: {name} is all zeros; leave {layer!r} out of the pattern.")
        stairs = cut(np.ones(1), (sigma / sigma[0]) ** 2, share, f"truncate {layer!r}")
        k, edited, back = stairs.kept, W, 0.0
        if k < len(sigma):
            with one_blas_thread():
                exact = (U[:, :k] * sigma[:k]) @ Vt[:k]
            changed[name] = edited = record.rounded(model, name, exact)
            back = restored(W, exact, edited, U[:, k:], Vt[k:])
        mass, near = stairs.mass / stairs.total, _acceptable(sigma, share, max(W.shape))
        kept = (len(sigma), k, mass, stairs.gap, near, record.norm_ratio(edited, W), back)
        records.append(LayerEdit("svd", layer, share, *kept))
    return record.after(begun, changed, records)


def restored(W: Array, exact: Array, edited: Array, U: Array, Vt: Array) -> float:
    """What rounding gave back along the dropped directions u_j v_jᵀ, as a share of what they held.

    Proof: tests/test_svd.py::test_what_rounding_restores_is_the_brute_force
    """
    off = edited.astype(np.float64) - exact
    if not off.any():
        return 0.0
    with one_blas_thread():
        return record.restored((U * (off @ Vt.T)).sum(axis=0), W, exact)


def singular_values(who: str, W: Array, *, full: bool) -> tuple[Array, Array, Array]:
    """(U, σ, Vᵀ) with W = U diag(σ) Vᵀ, σ descending; `full`: U (O, O) and Vᵀ (I, I) complete.

    Raises:
        RangeError: a singular value that overflows. SolverError, RoomError: as `algebra.svd.svd`.
    """
    with one_blas_thread():
        U, sigma, Vt = svd(W.astype(np.float64), who, full=full)
    if sigma[0] == np.inf:
        raise RangeError(f"{who} has a singular value beyond the largest float64; rescale it.")
    return U, sigma, Vt


def singular_bases(model: Model, layers: str = "**") -> Bases:
    """The singular vectors of weight matrices, in place of K-FAC's eigenvectors.

    Definition
        W = U diag(σ) Vᵀ; U_A = V (I, I), U_G = U (O, O), both complete; mu and lam are σ², with
        zeros up to I and O: the eigenbases of WᵀW and W Wᵀ, by ORDER.

    They are for `refcurv.evaluation.bands.bands` with quantity "input_rank": the bands over right
    singular vectors that P10 compares with. ORDER fixes the sign of each column of U and of V, so
    that together they give W back only up to the sign of each direction. Directions of equal σ,
    like the I − O null ones of a wide W, are an arbitrary basis of their space; a band that divides
    this space is arbitrary too. `edit` in such a basis keeps pairs (i, j) by σ_i² σ_j². It is not
    `truncate`.

    Args:
        model: whose weights.
        layers: pattern over the linear layers.

    Returns:
        Bases by layer name, in file order, method "svd"; of W without the bias.

    Raises:
        NameUnknownError: a pattern that matches no linear layer. NonFiniteError: W holds NaN.
        RangeError: a σ² beyond float64. SolverError, RoomError: as `algebra.svd.svd`.

    Cost: about 9 (O³ + I³) flops per layer at most, and O² + I² float64 of memory.
    Source: P10 (arXiv 2510.24256).
    Proof: tests/test_svd.py::test_singular_bases_are_eigenbases_of_the_two_grams
    """
    require_model("singular_bases", model)
    made: dict[str, Eigenbasis] = {}
    for layer in expand(layers, list(model.config.linear_layers())):
        W = record.parameter("singular_bases", model, model.config.weight_of(layer))
        U, sigma, Vt = singular_values(f"singular_bases: {layer!r}", W, full=True)
        if sigma[0] and abs(exponent(sigma)) >= 511:
            raise RangeError(
                f"singular_bases: {layer!r} has the singular value {sigma[0]:.1e}, whose square is "
                "not in the range of float64; rescale it."
            )
        lam, mu = (np.pad(sigma**2, (0, len(X) - len(sigma))) for X in (U, Vt))
        one = Eigenbasis(oriented(Vt.T), mu, oriented(U), lam)
        for array in (one.U_A, one.mu, one.U_G, one.lam):
            array.flags.writeable = False
        made[layer] = one
    source = MappingProxyType({"inputs": store.inputs(model.source)})
    return Bases(MappingProxyType(made), source, method="svd", weights=digest(model))


def _acceptable(sigma: Array, energy: float, size: int) -> int:
    """How many singular values another solver may decide otherwise (ACCEPTABLE); size = max(O, I).

    Two solvers' x differ by at most e in 2-norm. So a key x² moves by at most (2x + e) e, and
    Σ x² over any set by at most (2‖x‖ + e) e.
    """
    if energy in (0, 1):
        return 0
    x = sigma / sigma[0]
    length = float(np.linalg.norm(x))
    e = tolerance.eigenvalues(size) * length
    slack = max(energy, 1 - energy) * (2 * length + e) * e
    errors = (np.zeros(1), (2 * x + e) * e)
    sure, possible = undecided(np.ones(1), x**2, energy, errors, slack)
    return int((possible - sure).sum())
