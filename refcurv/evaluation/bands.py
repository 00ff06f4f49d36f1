"""How strongly memorised and clean inputs drive the sharp and the flat directions of a layer (P9).

Two quantities, never mixed:

    pair_mass    pairs (i, j) by cumulative curvature mass;  ‖W_b x‖,  W_b = U_G (C ∘ M_b) U_Aᵀ
    input_rank   eigenvectors of A by rank;                  ‖P_b x‖,  P_b = U_b U_bᵀ
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature.bases import Bases, named
from refcurv.curvature.checks import require_basis
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.evaluation.classify import image_batches, image_inputs, require_image_population
from refcurv.evaluation.decode import batches, require_population, teacher_forced
from refcurv.evaluation.held import held
from refcurv.files.digest import require_same
from refcurv.law.checks import Array, ConventionError, EmptyError, require_choice, require_shape
from refcurv.law.conventions import Rows
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import ImagePopulation, Population
from refcurv.model.layers import Layout
from refcurv.model.patterns import expand
from refcurv.model.rows import kept, require_rows
from refcurv.model.transformer import Inputs, Parameters
from refcurv.model.weights import Model
from refcurv.passes.forward import batchwise, layer_inputs
from refcurv.progress import Progress, counter, silent


class Quantity(StrEnum):
    """What the bands are made of."""

    PAIR_MASS = "pair_mass"
    INPUT_RANK = "input_rank"


MASS_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.0)
"""pair_mass: cumulative share of the curvature mass."""

RANK_PERCENT = (0, 10, 25, 50, 100)
"""input_rank: cumulative percent of the eigenvectors of A, sharpest first."""


@dataclass(frozen=True, slots=True)
class Bands:
    """One layer's bands, sharpest first.

    Fields:
        layer; quantity.
        edges: (n + 1,) cumulative shares, of the mass or of the ranks.
        sizes: (n,) pairs, or eigenvectors, in each band. A band is empty if one pair spans it.
        memorised, clean: (n,) mean norm over the positions of each population.
        aligned: were clean inputs taken from the same range of positions as memorised ones?
    """

    layer: str
    quantity: Quantity
    edges: tuple[float, ...]
    sizes: tuple[int, ...]
    memorised: tuple[float, ...]
    clean: tuple[float, ...]
    aligned: bool

    @property
    def ratio(self) -> tuple[float, ...]:
        """memorised / clean; NaN where the clean mean is 0, as in an empty band."""
        pairs = zip(self.memorised, self.clean, strict=True)
        return tuple(m / c if c > 0 else math.nan for m, c in pairs)

    def to_json(self) -> dict[str, Any]:
        """The fields and the ratio as plain JSON values; a ratio that is NaN becomes null."""
        return {
            "layer": self.layer,
            "quantity": str(self.quantity),
            "edges": list(self.edges),
            "sizes": list(self.sizes),
            "memorised": list(self.memorised),
            "clean": list(self.clean),
            "ratio": [None if math.isnan(r) else r for r in self.ratio],
            "aligned": self.aligned,
        }


# ------------------------------------------------------------------ where the bands lie


def rank_bounds(size: int) -> Array:
    """input_rank: band b holds eigenvectors bounds[b] .. bounds[b+1] - 1; there are `size` of them.

    Bounds are rounded up, in integers, so that the sharpest band is never empty.

    Proof:  tests/test_bands.py::test_rank_bounds
    """
    return np.array([-(-percent * size // 100) for percent in RANK_PERCENT], dtype=np.int64)


def mass_bounds(basis: Eigenbasis, name: str = "bands") -> Array:
    """pair_mass: band b holds the columns bounds[b, i] .. bounds[b+1, i] - 1 of row i, (n+1, O).

    Each bound is the SELECT cut at one of MASS_EDGES. All cuts take pairs in one order, so that
    what they keep is nested: the bands are disjoint, and together hold every pair.

    Proof:  tests/test_bands.py::test_band_weights_sum_to_the_weight
    """
    return np.stack([cut(basis.lam, basis.mu, share, name).counts for share in MASS_EDGES])


def band_weights(W: Array, basis: Eigenbasis) -> list[Array]:
    """pair_mass: W_b = U_G (C ∘ M_b) U_Aᵀ for each band, C = U_Gᵀ W U_A; they add up to W.

    Args:
        W: (O, I).
        basis: the layer's.

    Cost: O(O²I + OI²) per band. `bands` leaves out U_G, which changes no norm.
    Source: P4, P5, P8.
    Proof:  tests/test_bands.py::test_band_weights_sum_to_the_weight; ::test_two_by_two_by_hand
    """
    C = basis.U_G.T @ W.astype(np.float64) @ basis.U_A
    bounds = mass_bounds(basis)
    return [basis.U_G @ _restricted(C, low, high) @ basis.U_A.T for low, high in pairwise(bounds)]


def _restricted(C: Array, low: Array, high: Array) -> Array:
    """C ∘ M_b: C in the columns low[i] .. high[i] - 1 of row i, else 0."""
    j = np.arange(C.shape[1])
    return np.where((low[:, None] <= j) & (j < high[:, None]), C, 0.0)


# ------------------------------------------------------------------ what tokens do to them


def bands(
    model: Model,
    basis: Mapping[str, Eigenbasis],
    memorised: Population | ImagePopulation,
    clean: Population | ImagePopulation,
    *,
    layers: str = "**",
    quantity: Quantity | str = Quantity.PAIR_MASS,
    rows: str = "reached",
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Bands]:
    """How large each band's output is on memorised and on clean inputs: mean norms and their ratio.

    Definition
        ratio_b = mean over memorised x of ‖W_b x‖ / mean over clean x of ‖W_b x‖   (pair_mass)
        the same with ‖P_b x‖ (input_rank); x is the layer's input at one position
        (a joint basis has [W b] and [x; 1] in their place)

    A memorised input is at a position whose next token lies in a suffix: prompt_length - 1 ..
    length - 2 of each row. A clean input is at such a position of the clean population *in the
    columns where memorised ones stand*, so that position itself does not tell them apart. If there
    is none, all scored positions of the clean population are taken, and `aligned` is False. Images
    give all positions, or the CLS, and are always aligned. A head that pools reads one input an
    image.

    Args:
        model: the unedited one; it gives the inputs x and the weights W.
        basis: eigenbases by layer name, of `decompose`.
        memorised: a population of kind `recite`, or of images: those with noised labels.
        clean: a population of kind `text`, or of images.
        layers: pattern over the basis's names.
        quantity: which of the two.
        rows: for images "reached" (the same as "all") or "cls"; for tokens only "reached".
        force: take a basis that was made from other weights than the model's.
        progress: called with (batches done, batches).

    Returns:
        Bands by layer name, in the basis's order.

    Raises:
        EmptyError: a population without scored positions.
        RangeError: a token outside the vocabulary.
        ShapeError: a basis that does not fit its layer; images of another size.
        NameUnknownError: a pattern that matches no layer, or a layer that the model lacks.
        ConventionError: an unknown quantity; tokens for a model of images or the reverse; rows that
            the model or the patches do not have; a basis of other weights, without `force`. What
            `require_basis` refuses.

    Cost: one forward pass over both populations; per layer and position 2 I² flops, and for
        pair_mass 2·7·O·I more; one float64 copy of each named weight.
    Source: P9; METHOD, Bands.
    Proof:  tests/test_bands.py::test_norms_are_the_definition; ::test_identical_populations;
            tests/test_images.py::test_bands_are_the_definition
    """
    kind = Quantity(require_choice("bands", "quantity", quantity, Quantity))
    names = expand(layers, list(basis))
    if isinstance(basis, Bases):
        require_same("bands", named(basis), basis.weights, model, force)
    choice = _require_rows(model.config, rows, names)
    for what, population in (("memorised", memorised), ("clean", clean)):
        _require_readable(what, population, model.config)
    parameters = held("bands", model, (memorised, clean))
    probes = [_probe(model, parameters, name, basis[name], kind) for name in names]
    job = _Job(model.config, parameters, names, probes, choice)
    columns, aligned = None, True
    if isinstance(memorised, Population) and isinstance(clean, Population):
        columns = _columns(memorised)
        aligned = bool(_scored(clean, columns))
    begin, total = len(job.parts(memorised)), len(job.parts(memorised)) + len(job.parts(clean))
    progress(0, total)
    hot = _mean_norms(job, memorised, None, counter(progress, total))
    cold = _mean_norms(job, clean, columns if aligned else None, counter(progress, total, begin))
    edges = MASS_EDGES if kind is Quantity.PAIR_MASS else tuple(p / 100 for p in RANK_PERCENT)
    return {
        name: Bands(name, kind, edges, probe.sizes, tuple(m), tuple(c), aligned)
        for name, probe, m, c in zip(names, probes, hot, cold, strict=True)
    }


def _require_rows(config: ModelConfig, rows: str, names: list[str]) -> Rows:
    choice = require_rows("bands", config, rows)
    if config.image is None and choice is not Rows.REACHED:
        raise ConventionError(
            f"bands: rows={rows!r} is not for tokens, whose suffixes are taken. Leave out rows."
        )
    if choice is Rows.CLS and "patch" in names:
        raise ConventionError("bands: 'patch' has no row among rows='cls'. Leave it out of layers.")
    return choice


def _require_readable(
    what: str, population: Population | ImagePopulation, config: ModelConfig
) -> None:
    if isinstance(population, ImagePopulation):
        require_image_population("bands", what, population, config)
    else:
        require_population("bands", what, population, config)


@dataclass(frozen=True, slots=True)
class _Probe:
    """One layer's bands: their sizes, and the function from x (N, I) float64 to norms (N, n)."""

    sizes: tuple[int, ...]
    norms: Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class _Job:
    config: ModelConfig
    parameters: Parameters
    names: list[str]
    probes: list[_Probe]
    rows: Rows

    def parts(self, population: Population | ImagePopulation) -> list[Any]:
        """Batches: indices of token rows, slices of images."""
        if isinstance(population, ImagePopulation):
            return list(image_batches(self.config, population))
        return list(batches(population))

    def read(
        self, population: Population | ImagePopulation, part: Any, columns: tuple[int, int] | None
    ) -> tuple[Inputs, Layout, Array]:
        """What the model reads, its layout, and the positions that count, (B, T) bool."""
        if isinstance(population, ImagePopulation):
            inputs, layout = image_inputs(self.config, population, part)
            return inputs, layout, kept(self.config, self.rows, population.labels[part][:, None])
        token_BT, label_BT, layout = teacher_forced(self.config, population, part)
        keep_BT = label_BT >= 0
        if columns is not None:
            t = np.arange(keep_BT.shape[1])
            keep_BT &= (columns[0] <= t) & (t <= columns[1])
        return token_BT, layout, keep_BT

    def inputs_of(self, name: str, x_BTI: Array, keep_BT: Array) -> Array:
        """The layer's inputs at the positions that count, (N, I) float64."""
        if name == "head" and self.config.image is not None:
            keep_BT = np.ones(x_BTI.shape[:2], dtype=bool)
        return x_BTI[keep_BT[:, -x_BTI.shape[1] :]].astype(np.float64)


def _probe(
    model: Model, parameters: Parameters, name: str, basis: Eigenbasis, kind: Quantity
) -> _Probe:
    known = model.config.linear_layers()
    if name not in known:
        expand(name, list(known))  # raises, and says which layers there are
    O, I = known[name]  # noqa: E741
    W = parameters[model.config.weight_of(name)].astype(np.float64)
    require_basis("bands", name, basis)
    joint = model.config.has_bias(name) and len(basis.mu) == I + 1  # of [W b], see BIAS
    if joint:
        W = np.column_stack([W, parameters[f"{name}.bias"].astype(np.float64)])
    hint = "Was the basis made from another model?"
    require_shape("bands", f"U_A of {name!r}", basis.U_A, (I + joint, I + joint), "(I, I)", hint)
    require_shape("bands", f"U_G of {name!r}", basis.U_G, (O, O), "(O, O)", hint)

    def whole(x_NI: Array) -> Array:
        return np.column_stack([x_NI, np.ones(len(x_NI))]) if joint else x_NI

    if kind is Quantity.INPUT_RANK:
        rank = rank_bounds(I + joint)
        return _Probe(tuple(np.diff(rank).tolist()), lambda x: _rank_norms(whole(x), basis, rank))
    C = basis.U_G.T @ W @ basis.U_A
    bounds = mass_bounds(basis, f"bands {name!r}")
    sizes = tuple(np.diff(bounds.sum(axis=1)).tolist())
    return _Probe(sizes, lambda x: _mass_norms(whole(x), basis, C, bounds))


def _rank_norms(x_NI: Array, basis: Eigenbasis, bounds: Array) -> Array:
    """‖P_b x‖ = ‖U_bᵀ x‖."""
    z_NI = x_NI @ basis.U_A
    spans = pairwise(bounds)
    return np.stack([norm(z_NI[:, a:b], axis=-1) for a, b in spans], axis=-1)


def _mass_norms(x_NI: Array, basis: Eigenbasis, C: Array, bounds: Array) -> Array:
    """‖W_b x‖ = ‖(C ∘ M_b) U_Aᵀ x‖, for U_G is orthogonal."""
    z_NI = x_NI @ basis.U_A
    spans = pairwise(bounds)
    return np.stack([norm(z_NI @ _restricted(C, a, b).T, axis=-1) for a, b in spans], axis=-1)


def _columns(population: Population) -> tuple[int, int]:
    """The first and the last position at which any row has a scored next token."""
    has = population.length > population.prompt_length
    if not has.any():
        raise EmptyError("bands: the memorised population has no token behind any prompt.")
    return int(population.prompt_length[has].min()) - 1, int(population.length[has].max()) - 2


def _scored(population: Population, columns: tuple[int, int]) -> int:
    """How many scored positions lie within the columns."""
    low = np.maximum(population.prompt_length - 1, columns[0])
    high = np.minimum(population.length - 2, columns[1])
    return int(np.maximum(high - low + 1, 0).sum())


def _mean_norms(
    job: _Job,
    population: Population | ImagePopulation,
    columns: tuple[int, int] | None,
    done: Callable[[], object],
) -> Array:
    """Mean norms over the population's positions, (layers, bands); sums are in batch order."""

    def norms(part: Any) -> tuple[Array, Array]:
        inputs, layout, keep_BT = job.read(population, part, columns)
        x = layer_inputs(job.config, job.parameters, inputs, layout, job.names)
        rows = [job.inputs_of(name, x[name], keep_BT) for name in job.names]
        sums = [probe.norms(x_NI).sum(axis=0) for probe, x_NI in zip(job.probes, rows, strict=True)]
        return np.stack(sums), np.array([[len(x_NI)] for x_NI in rows])

    def work(parts: list[Any]) -> list[tuple[Array, Array]]:
        return [norms(part) for part in parts]  # one after the other: each keeps a trace

    found = batchwise(job.parameters, job.parts(population), work, done)
    total, count = np.zeros_like(found[0][0]), np.zeros_like(found[0][1])
    for sums, rows in found:
        total += sums
        count += rows
    if not count.all():
        raise EmptyError("bands: the clean population has no token behind any prompt.")
    return np.asarray(total / count)
