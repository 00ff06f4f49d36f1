"""Eigenvectors of another program beside our A and G: by what rotations in a cluster leave alone.

Single eigenvectors are compared nowhere: their signs are free, and where eigenvalues lie closer
together than rounding any rotation among them is as good. `diagnosis.bases` finds out which fault
explains another basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.judge.case import Case
from refcurv.judge.compare import Bounds, said
from refcurv.judge.diagnosis import bases as why
from refcurv.judge.dump import Theirs
from refcurv.judge.eigenvectors import SIDES, apart, as_columns, limits_of, share, unfit
from refcurv.judge.verdict import FAIL, LEFT_OUT, PASS, Comparison
from refcurv.law.checks import Array


def compare_bases(bounds: Bounds, theirs: Theirs, own: Eigenbasis | None) -> list[Comparison]:
    """Orthogonality, recomposition and spaces of each side that the dump has eigenvectors of.

    Args: own, our basis, for the spaces; without it they are left out.

    Proof: tests/test_judge_bases.py::test_signs_and_rotations_in_a_cluster_are_no_difference
    """
    out: list[Comparison] = []
    ours = bounds.case.ours(bounds.layer)
    upright = as_columns(bounds.case, bounds.layer, theirs)
    for side, (vectors, values) in SIDES.items():
        U, spectrum = getattr(theirs, vectors), getattr(theirs, values)
        M = ours.A if side == "A" else ours.G
        if U is None or M.ndim == 1:
            continue
        trouble = unfit(side, theirs, M)
        if trouble:
            out.append(said(bounds.layer, f"basis of {side}", FAIL, trouble))
            continue
        found = _one_side(bounds, side, U, spectrum, M)
        if own is not None and spectrum is not None:
            pair = (own.U_A, own.mu) if side == "A" else (own.U_G, own.lam)
            columns = getattr(upright, vectors)[:, np.argsort(-spectrum)]
            found.append(_spaces(bounds, side, columns, *pair))
        if any(one.verdict == FAIL for one in found):
            found = why.explained(bounds, side, theirs, M, found)
        out += found
    return out


def _one_side(
    bounds: Bounds, side: str, U: Array, spectrum: Array | None, M: Array
) -> list[Comparison]:
    (vectors, values), limits = SIDES[side], limits_of(bounds, side, len(U))
    skew = float(norm(U.T @ U - np.eye(len(U)))) / math.sqrt(len(U))
    text = f"the columns of {vectors} are not orthonormal"
    orthogonal = bounds.judged(f"orthogonality of {vectors}", skew, text, budget_of=limits.solver)
    text = f"{vectors} diag({values}) {vectors}ᵀ is not {side}"
    if spectrum is None:
        text = f"{vectors} does not make {side} diagonal"
    error, drawing = apart(U, spectrum, M), limits.drawing
    found = bounds.judged(f"basis of {side}", error, text, budget_of=limits.both, drawing=drawing)
    return [orthogonal, found]


def _spaces(bounds: Bounds, side: str, theirs: Array, U: Array, values: Array) -> Comparison:
    """The spaces of the k leading eigenvectors, for each k, by Davis and Kahan (O63).

    |sin Θ| is at most 2 |E|/gap, the gap being that of one of the two (Yu, Wang and Samworth 2015).
    So |sin Θ| times the gap, over |M|, is an error of at most twice that of M; it is 0 inside a
    cluster, where the gap is. The largest of these is given.
    """
    gap = values[:-1] - values[1:]
    error = share(float((_sines(U.T @ theirs) * gap).max(initial=0.0)), float(norm(values)))
    text, limits = (
        "the space of the leading eigenvectors is another",
        limits_of(bounds, side, len(U)),
    )
    return bounds.judged(
        f"spaces of {side}", error, text, budget_of=limits.both, drawing=2 * limits.drawing
    )


def _sines(product_RC: Array) -> Array:
    """(n − 1,): |sin Θ| of the k leading vectors, of uᵢᵀ vⱼ (ours, theirs): √Σ_{i > k, j <= k}.

    From the last row on, so that each sum is of squares alone, and O(n) numbers are held.
    """
    below, sine = np.zeros(len(product_RC)), np.empty(len(product_RC) - 1)
    for row in range(len(sine), 0, -1):
        below += product_RC[row] * product_RC[row]
        sine[row - 1] = math.sqrt(below[:row].sum())
    return sine


@dataclass(frozen=True, slots=True)
class Before:
    """What an edit of theirs was made from: their basis, and what is wrong with it.

    Fields: basis, theirs in columns and in their order, None where the dump lacks a part of it;
    wrong, the comparison of it that does not pass, with a fault if there is one; or None.
    """

    basis: Eigenbasis | None
    wrong: Comparison | None


def before(case: Case, layer: str, theirs: Theirs, findings: Sequence[Comparison]) -> Before:
    """Their basis of a layer, and of its comparisons the one to blame."""
    upright, ours = as_columns(case, layer, theirs), case.ours(layer)
    parts = {name: getattr(upright, name) for pair in SIDES.values() for name in pair}
    whole = all(x is not None for x in parts.values()) and not any(
        unfit(side, upright, M) for side, M in (("A", ours.A), ("G", ours.G))
    )
    of_bases = ("basis of", "orthogonality of", "spaces of")
    bad = [
        one
        for one in findings
        if one.quantity.startswith(of_bases) and one.verdict not in (PASS, LEFT_OUT)
    ]
    bad.sort(key=lambda one: (one.verdict != FAIL, one.fault is None))
    basis = Eigenbasis(**parts) if whole else None
    return Before(basis, bad[0] if bad else None)


def basis_of(bounds: Bounds) -> Eigenbasis:
    """Our basis of the layer: the given one, or that of the reference's factors.

    Spectra are multiplied by powers of two, which changes no pair (O59), so that no product leaves
    the range of float64.
    """
    case, layer = bounds.case, bounds.layer
    one, truth = case.ours(layer), case.reference
    given = None if case.bases is None else case.bases.get(layer)
    if given is not None and len(given.mu) == len(one.sum_A):
        return near_one(given)
    facts = (truth.shard_rows, truth.dtype)
    U_A, mu, _ = eigenbasis(one.A, *facts, f"A of {layer!r}")
    U_G, lam, _ = eigenbasis(one.G, *facts, f"G of {layer!r}")
    return near_one(Eigenbasis(U_A, mu, U_G, lam))


def near_one(own: Eigenbasis) -> Eigenbasis:
    """The basis with its largest eigenvalues in [1, 2)."""
    mu, lam = (shifted(x, -exponent(x)) for x in (own.mu, own.lam))
    return replace(own, mu=mu, lam=lam)
