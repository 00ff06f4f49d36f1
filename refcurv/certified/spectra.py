"""Eigenvalues of A and G, the cut and W', enclosed; beside them what float64 makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from refcurv.algebra.balls import Balls, exact
from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.eigen_enclosures import Spectrum, enclose, refined
from refcurv.algebra.staircase import cut
from refcurv.certified.cuts import decided, edited
from refcurv.certified.numbers import Task
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.law.checks import Array, ConventionError, EmptyError, RefcurvError, require_range
from refcurv.model.config import ModelConfig
from refcurv.model.patterns import expand

OF: Final = ("eigenvalues", "eigenvectors", "cut", "edit")
"""What can be certified of A and G, which come with it. W is edited without its bias (BIAS)."""


def with_moments(of: tuple[str, ...]) -> tuple[str, ...]:
    """What is asked for, and A and G if anything of them is."""
    return tuple(dict.fromkeys((*of, "A", "G"))) if {*OF} & {*of} else of


@dataclass(slots=True)
class Proved:
    """What is proved of some layers.

    Fields:
        arrays: {name: balls}: "eigenvalues.A.LAYER" (I,), "eigenvalues.G.LAYER" (O,); where they
            are asked for "eigenvectors.A.LAYER" (I, I) and of G (`Spectrum.vectors`); "cut.LAYER"
            (O,), how many pairs of each row are kept, and "edit.LAYER", W', where every pair is
            decided.
        floats: {name: what float64 makes of it}, of eigenvalues and W'.
        spectra, cuts: plain values of each matrix and of each cut layer (`_told`, `_cut_of`).
    """

    arrays: dict[str, Balls] = field(default_factory=dict)
    floats: dict[str, Array] = field(default_factory=dict)
    spectra: dict[str, dict[str, Any]] = field(default_factory=dict)
    cuts: dict[str, dict[str, Any]] = field(default_factory=dict)


def shares(
    config: ModelConfig, of: tuple[str, ...], wanted: tuple[str, ...], rho: Any
) -> dict[str, float]:
    """{layer: ρ} of a share for all wanted layers, or of {pattern: share}; {} where none is cut.

    Raises:
        ConventionError: no rho for a cut, rho without one, a layer that two patterns match, or a
        tied head. RangeError: a share outside [0, 1]. NameUnknownError: a pattern without a layer.
    """
    if not {"cut", "edit"} & {*of}:
        if rho is not None:
            raise ConventionError("certify: rho is of 'cut' and 'edit'; ask for one of them.")
        return {}
    if rho is None:
        raise ConventionError("certify: 'cut' and 'edit' need rho, the share that is kept.")
    if isinstance(rho, Mapping) and not rho:
        raise EmptyError("certify: rho names no layer. Give a share, or {pattern: share}.")
    found: dict[str, float] = {}
    for pattern, value in (rho if isinstance(rho, Mapping) else {"**": rho}).items():
        what = "rho" if pattern == "**" else f"rho of {pattern!r}"
        share = require_range("certify", what, value, 0, 1)
        for layer in expand(pattern, list(wanted)):
            if layer in found:
                raise ConventionError(f"certify: {layer!r} is matched by two patterns of rho.")
            found[layer] = share
    if config.tied and "head" in found:
        raise ConventionError(
            "certify: the head is tied to the embedding; to edit it would edit both. Name other "
            "layers, with `layers` or with rho's patterns."
        )
    return found


def prove(
    task: Task,
    means: Mapping[str, Balls],
    floats: Mapping[str, Array],
    terms: Mapping[str, int],
    done: Callable[[], None],
) -> Proved:
    """All that is asked of A and G: `means` are their balls by name, `floats` what float64 gave.

    Where float64 overflowed, `floats` is empty. `terms` are how many a aᵀ or g gᵀ each is the mean
    of. `done` is called after each matrix.

    Proof: tests/test_certified_cuts.py::test_a_small_model_is_certified_to_its_edit
    """
    found = Proved()
    for layer in [name.removeprefix("A.") for name in means if name.startswith("A.")]:
        both = {}
        for name in (f"A.{layer}", f"G.{layer}"):
            A = means[name]
            both[name[0]] = one = enclose(A, refined(A), rank=terms[name])
            found.arrays[f"eigenvalues.{name}"] = one.values
            if "eigenvectors" in task.of:
                found.arrays[f"eigenvectors.{name}"] = one.vectors
            found.spectra[name] = _told(one, terms[name])
            done()
        basis = _basis(layer, floats, terms)
        if basis is not None:
            found.floats[f"eigenvalues.A.{layer}"] = basis.mu
            found.floats[f"eigenvalues.G.{layer}"] = basis.lam
        if layer in task.rho:
            W = task.parameters[task.config.weight_of(layer)]
            _cut_of(
                layer, W, both["G"], both["A"], (task.rho[layer], "edit" in task.of, basis), found
            )
    return found


def _basis(layer: str, floats: Mapping[str, Array], terms: Mapping[str, int]) -> Eigenbasis | None:
    """What `decompose` makes of float64's A and G; None where it has none, as of infinities."""
    made: list[Any] = []
    for name in (f"A.{layer}", f"G.{layer}"):
        if name not in floats:
            return None
        try:
            made += eigenbasis(floats[name], terms[name], "float64", name)[:2]
        except RefcurvError:  # what floats cannot do leaves the proof as it is
            return None
    return Eigenbasis(*made)


def _told(one: Spectrum, terms: int) -> dict[str, Any]:
    """Plain values that say what is proved of a matrix's eigenvalues.

    size: how many there are. zeros: those that are 0, as the rank is at most the number of terms.
    unsure: others that may be 0. fewest, median: certain digits of the rest, counted from each one
    itself. clusters: of several that are not proved to differ, nor to be 0. angle: the largest
    `Spectrum.angle` of any cluster.
    """
    n, values = len(one.values), one.values
    rank = min(terms, n)
    least, radius = values.least()[:rank], values.radii()[:rank]
    sound = least > 0
    each = np.log10(least[sound]) - np.log10(np.maximum(radius[sound], 5e-324))
    each = np.sort(np.maximum(each, 0))
    clusters = one.clusters
    angles = [one.angle(*pair) for pair in clusters]
    return {
        "size": n,
        "zeros": n - rank,
        "unsure": int(rank - sound.sum()),
        "fewest": float(each[0]) if len(each) else None,
        "median": float(each[len(each) // 2]) if len(each) else None,
        "clusters": sum(start < min(rank, stop - 1) for start, stop in clusters),
        "angle": max(angles) if math.isfinite(max(angles)) else None,
    }


def _cut_of(
    layer: str,
    W: Array,
    G: Spectrum,
    A: Spectrum,
    asked: tuple[float, bool, Eigenbasis | None],
    found: Proved,
) -> None:
    """The pairs of the real numbers; and, another statement, those of SELECT on float64 numbers.

    `nearest` and `float64` count the pairs that SELECT decides otherwise than is proved: on the
    real eigenvalues, correctly rounded, and on float64's own.
    """
    rho, with_edit, basis = asked
    kept, dropped = decided(G.values, A.values, rho, layer)
    undecided = int((~(kept | dropped)).sum())
    lam, mu = (np.sort(np.maximum(x.values.rounded(), 0))[::-1] for x in (G, A))
    own = None if basis is None else _selected(basis.lam, basis.mu, rho)
    found.cuts[layer] = {
        "rho": rho,
        "pairs": kept.size,
        "kept": int(kept.sum()),
        "cut": int(dropped.sum()),
        "undecided": undecided,
        "nearest": _otherwise(kept, dropped, _selected(lam, mu, rho)),
        "float64": _otherwise(kept, dropped, own),
    }
    if undecided:
        return
    found.arrays[f"cut.{layer}"] = exact(kept.sum(axis=1))
    if with_edit:
        found.arrays[f"edit.{layer}"] = exact(W) if rho == 1 else edited(W, G, A, kept)
        if basis is not None and own is not None:
            found.floats[f"edit.{layer}"] = _edited_in_float64(W, basis, own)


def _selected(lam: Array, mu: Array, rho: float) -> Array | None:
    """The pairs that SELECT keeps; None where float64 has no mass, or no products."""
    try:
        return cut(lam, mu, rho).mask(len(mu))
    except (EmptyError, ConventionError):
        return None


def _otherwise(kept: Array, dropped: Array, mask: Array | None) -> int | None:
    """Pairs that SELECT drops though they are proved kept, or keeps though they are proved cut."""
    return None if mask is None else int((kept & ~mask).sum() + (dropped & mask).sum())


def _edited_in_float64(W: Array, basis: Eigenbasis, mask: Array) -> Array:
    """U_G (C ∘ M) U_Aᵀ on float64's eigenbasis and its own cut (P8)."""
    if mask.all():
        return W.astype(np.float64)
    with one_blas_thread():
        C = basis.U_G.T @ W.astype(np.float64) @ basis.U_A
        return np.asarray(basis.U_G @ np.where(mask, C, 0) @ basis.U_A.T)
