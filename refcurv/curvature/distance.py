"""F, F_tok and K of a linear layer side by side: what each of K-FAC's two steps loses (THREE).

The Kronecker products are the matrices of rank one once F's entries are put in another order (Van
Loan & Pitsianis), so the best of them is a singular pair, and its distance the floor of any fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Unpack

import numpy as np
from scipy.linalg.lapack import dsytrf, dsytrf_lwork
from scipy.sparse.linalg import eigsh

from refcurv.algebra.blas import eigh, one_blas_thread, solving
from refcurv.algebra.gram import add_gram
from refcurv.algebra.kron import from_rearranged, kron_dense, rearranged
from refcurv.algebra.scaling import far_exponent, shifted
from refcurv.curvature.exact.fishers import (
    Choice,
    Moments,
    Sent,
    checked,
    cotangents,
    input_rows,
    kron_sum,
    position_moments,
)
from refcurv.curvature.exact.problems import Problem
from refcurv.curvature.exact.products import steps
from refcurv.curvature.exact.variables import (
    Labels,
    Subject,
    Tokens,
    Variables,
    layer_shape,
    variables_of,
)
from refcurv.law import tolerance
from refcurv.law.checks import Array, EmptyError, RangeError, require_shape
from refcurv.model.given import as_matrix, require_list, require_record, require_whole, shown
from refcurv.model.sampling import uniforms
from refcurv.model.transformer import Tap

VISIBLE = 1e-3
"""An overlap is given only where rounding can move it by less."""


@dataclass(frozen=True, slots=True)
class Three:
    """The three matrices of one layer, of the same cotangents: F, F_tok and K = n (G ⊗ A)."""

    F: Array
    F_tok: Array
    moments: Moments

    @property
    def K(self) -> Array:
        """The dense K-FAC block."""
        return self.moments.rows * kron_dense(self.moments.G, self.moments.A)


@dataclass(frozen=True, slots=True)
class Distances:
    """How far F, F_tok and K are from one another: Frobenius norms, each relative to ‖F‖.

    Fields:
        shape: (O, I) of the layer. rows: n.
        norm, trace: ‖F‖ and tr F [nats / parameter²].
        F_F_tok: ‖F − F_tok‖, the terms between positions; 0 where a layer's output reaches the
            loss at its own position only (O38). F_tok_K: ‖F_tok − K‖, the dependence of a and g.
            F_K: ‖F − K‖, both; at most their sum.
        trace_F_tok, trace_K: over tr F. trace_K < trace_F_tok if ‖a‖² and ‖g‖² go together (O18).
        scale, F_cK: the c of least ‖F − c K‖, and that distance: of K's shape alone.
        floor: ‖F − G' ⊗ A'‖ for the best G' and A' there are (O24): floor ≤ F_cK ≤ F_K.
        overlap: {k: (with F_tok, with K)}, ‖U_kᵀ V_k‖²/k of F's k leading eigenvectors and theirs,
            in [0, 1], k/(O·I) by chance. None where k cuts a cluster: there is no such space.
    """

    shape: tuple[int, int]
    rows: int
    norm: float
    trace: float
    F_F_tok: float
    F_tok_K: float
    F_K: float
    trace_F_tok: float
    trace_K: float
    scale: float
    F_cK: float
    floor: float
    overlap: dict[int, tuple[float | None, float | None]]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them: k becomes a string."""
        return asdict(self) | {"overlap": {str(k): list(two) for k, two in self.overlap.items()}}


@one_blas_thread()
def compare(
    model: Subject,
    tokens: Tokens = None,
    labels: Labels = None,
    *,
    wrt: str,
    top: Sequence[int] = (1, 10, 100),
    **sent: Unpack[Sent],
) -> dict[str, Distances]:
    """The distances between F, F_tok and K of every linear layer that `wrt` names.

    Definition: F, F_tok, K as in `exact.fisher`, `f_tok` and `kfac`, in one sweep for all layers.

    Args: as `exact.f_tok`; top: of how many leading eigenvectors; those ≥ O·I are left out.

    Returns:
        {name of the weight: Distances}. Large layers go by parts: see `exact.of_outputs`.

    Raises: as `exact.f_tok`, for each layer. EmptyError: F = 0. RangeError: top below 1.

    Cost: the sweep of `exact.fisher` down to the lowest layer; 2 P² numbers and C·P² operations
        for each layer of P parameters and C cotangents, and then eigenvectors.
    Source: THREE; METHOD, Notation; O18, O24, O38.
    Proof: tests/test_distance.py::test_O2_every_distance_is_seen_where_its_cause_is,
        ::test_O38_in_the_last_block_positions_do_not_mix
    """
    top = _tops("compare", top)
    made = variables_of("compare", model, tokens, labels, wrt).problem
    found = _three(made, wrt, checked("compare", sent))
    return {name: distances(one, top, name) for name, one in found.items()}


def _three(made: Problem, wrt: str, choice: Choice) -> dict[str, Three]:
    """The matrices of every layer that `wrt` names, from one sweep of cotangents.

    Proof: tests/test_distance.py::test_one_sweep_gives_the_three_exact_matrices
    """
    names = variables_of("compare", made, None, None, wrt).names
    layers = {n: variables_of("compare", made, None, None, n, dense=True) for n in names}
    for layer in layers.values():
        layer_shape("compare", layer)
    F = {name: np.zeros((layer.size, layer.size)) for name, layer in layers.items()}
    positions: dict[str, list[_Positions]] = {name: [] for name in names}
    for _, batches in groupby(cotangents(made, choice), key=lambda one: id(one[0])):  # a segment
        at: dict[str, _Positions] = {}
        for part, saved, d_z in batches:
            for tap in steps(part, part.parameters, saved, d_z, names):
                assert isinstance(tap, Tap)  # each of them is linear
                D_CP = (tap.g.swapaxes(1, 2) @ tap.a[0]).reshape(len(d_z), -1)
                add_gram(D_CP, F[tap.name], onto=True)
                gg_TOO = position_moments(tap.g)
                before = at[tap.name][1] if tap.name in at else 0
                at[tap.name] = tap.a[0], gg_TOO + before, part.kept(tap)[0]
        for name, one in at.items():
            positions[name].append(one)
    return {name: _assembled(layers[name], F.pop(name), positions[name]) for name in names}


_Positions = tuple[Array, Array, Array]
"""One segment's a_s (T, I), Σ_c g_s g_sᵀ (T, O, O), and which of them are rows (T,)."""


def _assembled(layer: Variables, F: Array, positions: list[_Positions]) -> Three:
    """Three, from F's lower triangle and the positions of every segment."""
    O, I = layer_shape("compare", layer)  # noqa: E741
    R, sum_G = np.zeros((O * O, I * I)), np.zeros((O, O))
    for a_TI, gg_TOO, keep_T in positions:
        R += kron_sum(a_TI, gg_TOO)
        sum_G += gg_TOO[keep_T].sum(axis=0)
    F_tok = from_rearranged(R, (O, I))
    a_NI = input_rows(layer)
    n, lower = len(a_NI), np.tril(F)
    moments = Moments(a_NI.T @ a_NI / n, sum_G / n, n)
    return Three(lower + np.tril(lower, -1).T, F_tok, moments)


@one_blas_thread()
def distances(three: Three, top: Sequence[int] = (1, 10, 100), name: str = "this") -> Distances:
    """The distances between the three matrices of one layer, `name` by name.

    Raises:
        EmptyError: F is 0, nothing to be relative to. RangeError: a top below 1.

    Proof: tests/test_distance.py::test_distances_are_what_numpy_says
    """
    require_record("distances", "three must be a Three", three, Three, "Three(F, F_tok, moments)")
    top = _tops("distances", top)
    F, F_tok, K = three.F, three.F_tok, three.K
    shape = len(three.moments.G), len(three.moments.A)
    k = far_exponent(F)
    if k:
        F, F_tok, K = (shifted(M, -k) for M in (F, F_tok, K))
    norm, trace = float(np.linalg.norm(F)), float(np.trace(F))
    if norm == 0:
        raise EmptyError(
            f"distances: F of {name!r} is 0 (as of q and k where a segment has one row)."
        )
    K_K = float(np.vdot(K, K))
    scale = float(np.vdot(F, K)) / K_K if K_K else 0.0
    kept = sorted({k for k in top if k < len(F)})
    spaces = [_leading(M, kept[-1] + 1) for M in (F, F_tok, K)] if kept else []

    def gap(one: Array, two: Array) -> float:
        return float(np.linalg.norm(one - two)) / norm

    return Distances(
        shape=shape,
        rows=three.moments.rows,
        norm=float(shifted(norm, k)),
        trace=float(shifted(trace, k)),
        F_F_tok=gap(F, F_tok),
        F_tok_K=gap(F_tok, K),
        F_K=gap(F, K),
        trace_F_tok=float(np.trace(F_tok)) / trace,
        trace_K=float(np.trace(K)) / trace,
        scale=scale,
        F_cK=gap(F, scale * K),
        floor=gap(F, kron_dense(*nearest_kronecker(F, shape))),
        overlap={k: (_overlap(k, *spaces[:2]), _overlap(k, *spaces[::2])) for k in kept},
    )


def _tops(who: str, top: Sequence[int]) -> list[int]:
    """How many leading directions are compared each time, checked."""
    asked = require_list(who, "top", top, "(1, 10, 100)")
    return [require_whole(who, "every top", k, 1) for k in asked]


@one_blas_thread()
def nearest_kronecker(F: Array, shape: tuple[int, int]) -> tuple[Array, Array]:
    """(G, A) of least ‖F − G ⊗ A‖: the top singular pair of R = rearranged(F).

    One side is the leading eigenvector of the smaller of R Rᵀ and Rᵀ R, the other its image: an
    error of it enters the distance squared. The signs make tr G >= 0.

    Raises:
        ShapeError, DTypeError: F is no matrix of numbers, or of another shape. RangeError: `shape`
        is not two whole numbers.

    Source: Van Loan & Pitsianis 1993; O24.
    Proof: tests/test_distance.py::test_O24_the_floor_is_what_the_other_singular_values_leave
    """
    who, F = "nearest_kronecker", as_matrix("nearest_kronecker", "F", F)
    lengths = require_list(who, "shape", shape, "(O, I)")
    if len(lengths) != 2:
        raise RangeError(f"{who}: shape must be two numbers, (O, I); got {shown(shape)}.")
    O, I = (require_whole(who, "shape", n, 1) for n in lengths)  # noqa: E741
    shape = O, I
    require_shape(who, "F", F, (O * I, O * I), "(O·I, O·I)")
    R = rearranged(F, shape)
    if O <= I:
        G = _leading(R @ R.T, 1)[1][:, 0]
        A = R.T @ G
    else:
        A = _leading(R.T @ R, 1)[1][:, 0]
        G = R @ A
    sign = -1 if np.trace(G.reshape(O, O)) < 0 else 1
    return sign * G.reshape(O, O), sign * A.reshape(I, I)


def _leading(M: Array, k: int) -> tuple[Array, Array]:
    """(values (k,), U (P, k)) of the k largest eigenvalues of a symmetric matrix, descending.

    Of a large one by Lanczos, which may miss one of several equal values. Where `_above` counts
    others than it found, and of a small matrix, all are computed.

    Proof: tests/test_distance.py::test_none_of_equal_leading_eigenvalues_is_missed
    """
    P = len(M)
    if P > 256 and 8 * k <= P:
        with solving("distances", M):
            values, U = eigsh(M, k, which="LA", v0=uniforms(0, 0, 0, P) - 0.5)
        bound = values.min() + tolerance.eigenpair(P) * np.abs(values).max()
        if _above(M, bound) == np.count_nonzero(values > bound):
            order = np.argsort(-values, kind="stable")
            return values[order], U[:, order]
    values, U = eigh(M, "distances")
    return values[: -k - 1 : -1], U[:, : -k - 1 : -1]


def _above(M: Array, bound: float) -> int:
    """How many eigenvalues of a symmetric matrix lie above a number.

    They are as many as D has above 0 in M − bound·1 = L D Lᵀ (Sylvester's law of inertia); a 2 x 2
    block of D has one on each side (Bunch & Kaufman 1977).

    Proof: tests/test_distance.py::test_the_eigenvalues_above_a_number_are_counted
    """
    moved = np.array(M, order="F")
    np.fill_diagonal(moved, M.diagonal() - bound)
    LD, pivots, _ = dsytrf(
        moved, lower=1, lwork=int(dsytrf_lwork(len(M), lower=1)[0]), overwrite_a=1
    )
    single = pivots > 0
    return int(np.count_nonzero(LD.diagonal()[single] > 0) + np.count_nonzero(~single) // 2)


def _overlap(k: int, one: tuple[Array, Array], two: tuple[Array, Array]) -> float | None:
    """‖U_kᵀ V_k‖²/k. By Davis & Kahan rounding turns each space by budget · λ_1 / gap."""
    for values, U in (one, two):
        if tolerance.eigenpair(len(U)) * values[0] >= VISIBLE * (values[k - 1] - values[k]):
            return None
    return float(np.linalg.norm(one[1][:, :k].T @ two[1][:, :k]) ** 2 / k)
