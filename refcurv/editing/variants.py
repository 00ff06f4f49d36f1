"""Controls of the edit: they cut as much, but not along the curvature that K-FAC found.

random basis      the same staircase of pairs, in random directions
random pairs      K-FAC's directions and as many pairs, chosen at random
inputs, outputs   K-FAC's directions, chosen by the curvature of one side alone (METHOD, Later work)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.scaling import exponent, shifted
from refcurv.curvature.bases import Bases, named, require_bases
from refcurv.curvature.checks import require_basis
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing import record
from refcurv.editing.kfac import edit_work, layers_of, read_layer, restored
from refcurv.editing.projection import keep_pairs
from refcurv.editing.record import Draw, EditRecord, LayerEdit, Step, Work, stream
from refcurv.law.checks import Array, require_choice, require_seed
from refcurv.law.conventions import Bias
from refcurv.model.weights import Model

SIDES: Final = ("inputs", "outputs")
"""The side whose curvature alone selects: inputs, that of A; outputs, that of G."""

CONTROLS: Final = ("random-basis", "random-pairs", *SIDES)
"""The names that `control` takes."""


def random_basis(basis: Bases, seed: int) -> Bases:
    """The same spectra on random directions: `edit` then has K-FAC's mask in another basis.

    Definition
        U_A and U_G of each layer are replaced by independent orthogonal matrices of Haar's
        distribution: Q diag(sign(diag R)), where Q R is a matrix of standard normal numbers. Each
        comes from the stream of (seed, side, layer's name), so that a layer's directions do not
        depend on the other layers. mu and lam stay as they are.

    The signs are Haar's, not ORDER's; no edit depends on them (O59).

    Args:
        basis: of `decompose` or `load_bases`, separate or joint.
        seed: integer in [0, 2**64).

    Returns:
        Bases of the same layers and spectra, method "random basis".

    Raises:
        RangeError: a seed out of range. What `require_basis` refuses.

    Cost: about 8/3 (I³ + O³) flops per layer; every layer is made at once.
    Source: Mezzadri 2007 (arXiv math-ph/0609050) for the signs.
    Proof: tests/test_variants.py::test_random_directions_are_haar,
        ::test_a_random_basis_has_the_mask_of_the_original
    """
    require_bases("random_basis", "the basis", basis)
    require_seed("random_basis", seed)
    made = {}
    for name, one in basis.items():
        require_basis("random_basis", name, one)
        U_A = _haar(len(one.mu), stream("random_basis", seed, Draw.INPUT_BASIS, name))
        U_G = _haar(len(one.lam), stream("random_basis", seed, Draw.OUTPUT_BASIS, name))
        made[name] = replace(one, U_A=U_A, U_G=U_G)
    return replace(basis, layers=MappingProxyType(made), method="random basis")


def random_pairs(
    model: Model,
    basis: Bases,
    share: float | Mapping[str, float],
    seed: int,
    *,
    force: bool = False,
) -> tuple[Model, EditRecord]:
    """Keep a share of the pairs of a basis, uniformly at random.

    Definition
        n = round(share · O · I), half to even. Every pair draws a uniform number, and the pairs of
        the n smallest are kept (ties in row-major order): with one seed, a smaller share keeps a
        subset.
        W' = U_G (C ∘ M) U_Aᵀ, rounded to the dtype in which the source stores W; W itself if all
        pairs are kept. With a joint basis W is [W b] and I is d_in + 1 (BIAS).

    Args:
        model: whose weights to edit; its dtype must hold the stored ones exactly.
        basis: of `decompose` or `load_bases`.
        share: of the pairs; one for every layer of `basis`, or {pattern: share}.
        seed: integer in [0, 2**64); a layer's numbers come from (seed, layer's name).
        force: take a basis that was made from other weights than the model's.

    Returns:
        The edited model and the EditRecord, method "random pairs"; its mass is the share of
        Σ λ_i μ_j that was kept. The given model is not changed.

    Raises:
        RangeError: a share outside [0, 1], a seed out of range. NameUnknownError: a pattern that
        matches no layer with a basis. ShapeError: a basis of another model, or a joint one
        without the bias's column. ConventionError: a basis of other weights, without `force`. What
        `require_basis` refuses.

    Cost: 4·O·I·(O + I) flops per layer, in float64, and O·I numbers drawn.
    Source: METHOD, Controls.
    Proof: tests/test_variants.py::test_random_pairs_are_a_projection_on_so_many_pairs,
        ::test_random_pairs_are_nested_in_their_share
    """
    return record.done(_pairs_work(model, basis, share, seed, force=force))


def _pairs_work(
    model: Model, basis: Bases, share: float | Mapping[str, float], seed: int, *, force: bool
) -> Work:
    """`random_pairs`, checked and begun."""
    require_seed("random_pairs", seed)
    asked = share if isinstance(share, Mapping) else {"**": share}
    names = layers_of("random_pairs", model, basis)
    begun = record.before("random_pairs", model, (named(basis), basis.weights), force)
    shares = record.shares("random_pairs", "share", model, names, asked)
    steps = (_keep_drawn(model, basis, seed, layer, part) for layer, part in shares.items())
    return Work(begun, tuple(shares), steps, basis.bias is Bias.JOINT)


def _keep_drawn(model: Model, basis: Bases, seed: int, layer: str, share: float) -> Step:
    parts, W, one = read_layer("random_pairs", model, basis, layer)
    count = round(share * W.size)
    mask = _drawn(seed, layer, W.shape, count)
    new: dict[str, Array] = {}
    edited, back = W, 0.0
    if count < W.size:
        exact = keep_pairs(W, one, mask)
        new = record.taken_apart(model, parts, exact)
        edited = record.joined(new)
        back = restored(W, exact, edited, one, mask)
    kept = (W.size, count, _mass(one, mask), math.nan, 0, record.norm_ratio(edited, W), back)
    return new, LayerEdit("random pairs", layer, share, *kept)


def one_sided(basis: Bases, side: str) -> Bases:
    """The same directions, selected by the curvature of one side alone.

    Definition
        "inputs": lam := 1, so that Π_ij = μ_j; "outputs": mu := 1, so that Π_ij = λ_i.

    With "inputs" `edit` keeps whole columns of C: input directions by descending μ. The last column
    may be divided. By SELECT's row-major ties its first rows are then kept, which are its sharpest
    output directions. With "outputs" it keeps whole rows, and the first columns of the last one.
    Directions of equal eigenvalue are tied, and their pairs are taken in row-major order. If the
    cut divides a direction, or tied ones, the gap is 0 and `acceptable` counts all their pairs.

    Args:
        basis: of `decompose` or `load_bases`, separate or joint.
        side: "inputs" or "outputs".

    Returns:
        Bases of the same layers and directions, method "inputs only" or "outputs only".

    Raises:
        ConventionError: another side. What `require_basis` refuses.

    Cost: reads every layer; nothing is computed.
    Source: METHOD, Controls; METHOD, Later work.
    Proof: tests/test_variants.py::test_one_side_keeps_whole_directions
    """
    require_bases("one_sided", "the basis", basis)
    require_choice("one_sided", "side", side, SIDES)
    made = {}
    for name, one in basis.items():
        require_basis("one_sided", name, one)
        if side == "inputs":
            made[name] = replace(one, lam=_ones(len(one.lam)), raised_G=0, rounding=None)
        else:
            made[name] = replace(one, mu=_ones(len(one.mu)), raised_A=0)
    return replace(basis, layers=MappingProxyType(made), method=f"{side} only")


def control(
    model: Model,
    basis: Bases,
    rho: float | Mapping[str, float],
    kind: str,
    seed: int = 0,
    *,
    force: bool = False,
) -> tuple[Model, EditRecord]:
    """The control of `edit(model, basis, rho)` by name, for the command line.

    "random-basis", "inputs" and "outputs" are edits with this rho. "random-pairs" keeps as many
    pairs of each layer as `edit(model, basis, rho)`.

    Proof: tests/test_variants.py::test_controls_by_name
    """
    return record.done(control_work(model, basis, rho, kind, seed, force=force))


def control_work(
    model: Model,
    basis: Bases,
    rho: float | Mapping[str, float],
    kind: str,
    seed: int = 0,
    *,
    force: bool = False,
) -> Work:
    """`control`, checked and begun, to be done layer by layer (`record.done_to`)."""
    require_choice("edit", "control", kind, CONTROLS)
    if kind == "random-pairs":
        taken = [row for _, row in edit_work(model, basis, rho, force=force).steps]
        parts = {one.layer: one.kept / one.pairs for one in taken}
        return _pairs_work(model, basis, parts, seed, force=force)
    other = random_basis(basis, seed) if kind == "random-basis" else one_sided(basis, kind)
    return edit_work(model, other, rho, force=force)


def _haar(n: int, rng: np.random.Generator) -> Array:
    """An orthogonal matrix (n, n) of Haar's distribution: Q of Q R, signs such that R_ii > 0."""
    with one_blas_thread():
        Q, R = np.linalg.qr(rng.standard_normal((n, n)))
    U = np.asarray(Q * np.where(R.diagonal() < 0, -1.0, 1.0))
    U.flags.writeable = False
    return U


def _drawn(seed: int, layer: str, shape: tuple[int, ...], count: int) -> Array:
    """Bool of that shape: `count` of its pairs, drawn uniformly.

    Proof: tests/test_variants.py::test_pairs_are_chosen_uniformly
    """
    return _smallest(stream("random_pairs", seed, Draw.PAIRS, layer).random(shape), count)


def _smallest(x: Array, count: int) -> Array:
    """Bool of x's shape: True at its `count` smallest entries, ties in row-major order."""
    flat = x.ravel()
    if count in (0, len(flat)):
        return np.full(x.shape, count > 0)
    last = np.partition(flat, count - 1)[count - 1]
    chosen = flat < last
    chosen[np.flatnonzero(flat == last)[: count - int(chosen.sum())]] = True
    return np.asarray(chosen.reshape(x.shape))


def _mass(one: Eigenbasis, mask: Array) -> float:
    """Σ λ_i μ_j over the mask, as a share of the whole; NaN where that is 0."""
    lam, mu = (shifted(x, -exponent(x)) for x in (one.lam, one.mu))
    total = math.fsum(lam) * math.fsum(mu)
    rows = np.where(mask, mu, 0.0).sum(axis=1)
    return math.fsum(lam * rows) / total if total > 0 else math.nan


def _ones(n: int) -> Array:
    flat = np.ones(n)
    flat.flags.writeable = False
    return flat
