"""What an edit did, and the steps that every edit shares: read, choose layers, round, draw.

A method decides only what to keep. K-FAC and its controls keep pairs of directions
(`refcurv.editing.projection`, `variants`), SVD singular directions (`svd`), BSN weights (`bsn`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.files.weights import narrow, widen
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    require_finite,
    require_range,
    require_seed,
)
from refcurv.law.conventions import Bias
from refcurv.model.config import Model, expand


@dataclass(frozen=True, slots=True)
class LayerEdit:
    """What was kept of one layer.

    Fields:
        method: what chose: "kfac", "svd", "bsn", "random pairs", or of another basis `Bases.method`
            ("random basis", "inputs only", "outputs only").
        layer, rho: as asked. rho is the share of what `mass` measures ("kfac" and other bases,
            "svd"), of the pairs ("random pairs"), of the weights of all layers together ("bsn").
        pairs: what there was to keep or drop: O·I pairs of directions, O·(I + 1) of [W b];
            "svd": min(O, I) singular directions; "bsn": O·I weights. kept: how many of them stay.
        mass: the share that the kept ones hold, of Σ λ_i μ_j; "svd": of Σ σ²; "bsn": of Σ w². NaN
            when the total is 0.
        gap: (last kept − first dropped) / last kept, of their λ_i μ_j or σ²: the cut's two
            neighbours. NaN when nothing was dropped or kept, and where no order was cut ("random
            pairs", "bsn").
        acceptable: pairs whose key lies within its rounding budget of the cut, so that another
            correct program may decide them either way (SELECT); "svd": singular values within
            the solver's budget of it. 0 where no order was cut.
        norm: ‖W'‖/‖W‖ in Frobenius norm, of [W b] where that was edited; 1 if W is 0.
    """

    method: str
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

    @property
    def kept(self) -> float:
        """The share of the pairs (directions, weights) of all its layers together that stay.

        Proof: tests/test_demo.py::test_controls_are_matched_on_dev
        """
        pairs = sum(x.pairs for x in self.layers)
        return sum(x.kept for x in self.layers) / pairs if pairs else 1.0

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, a dictionary per layer; NaN as None."""
        rows = [asdict(layer) for layer in self.layers]
        return [{k: None if v != v else v for k, v in row.items()} for row in rows]  # noqa: PLR0124


# ------------------------------------------------------------------ which layers


def shares(
    who: str, what: str, model: Model, layers: Iterable[str], asked: Mapping[str, float]
) -> dict[str, float]:
    """{pattern: share} over `layers`, names in file order, as {layer: share} in their order.

    Raises:
        RangeError: a share outside [0, 1]. NameUnknownError: a pattern that matches no layer.
        ConventionError: a layer that two patterns match; a head tied to the embedding.

    Proof: tests/test_projection.py::test_refusals, ::test_a_tied_head_is_no_layer_to_edit
    """
    names = list(layers)
    if not isinstance(asked, Mapping):
        raise ConventionError(f"{who}: {what} must name its layers, PATTERN=SHARE; got {asked!r}.")
    found: dict[str, float] = {}
    for pattern, value in asked.items():
        share = require_range(who, f"{what} of {pattern!r}", value, 0, 1)
        for layer in expand(pattern, names):
            if layer in found:
                raise ConventionError(f"{who}: {layer!r} is matched by two patterns.")
            found[layer] = share
    require_untied(who, model, found)
    return {layer: found[layer] for layer in names if layer in found}


def require_untied(who: str, model: Model, layers: Iterable[str]) -> None:
    """Refuse a head whose weight is the embedding."""
    if model.config.tied and "head" in layers:
        raise ConventionError(
            f"{who}: the head is tied to the embedding; editing it would edit both."
        )


# ------------------------------------------------------------------ reading and rounding


def parameter(who: str, model: Model, name: str) -> Array:
    """A parameter that can be edited: finite, and read without rounding."""
    if model.stored.get(name, model.dtype) == "float64" and model.dtype != "float64":
        raise DTypeError(
            f"{who}: {name} is stored in float64 but the model was loaded as {model.dtype}; "
            'load it with dtype="float64".'
        )
    array = np.asarray(model.parameters[name])
    require_finite(who, name, array)
    return array


def rounded(model: Model, name: str, new: Array) -> Array:
    """`new`, float64, rounded to nearest in the dtype that `name` is stored in (PRECISION, O65)."""
    stored = model.stored.get(name, model.dtype)
    return widen(narrow(new, stored), stored, model.dtype)


def matrix_parts(who: str, model: Model, layer: str, bias: Bias) -> dict[str, Array]:
    """The parameters that a basis has the columns of, by name: W, or with its bias W and b."""
    names = [model.config.weight_of(layer)]
    if bias is Bias.JOINT and model.config.has_bias(layer):
        names.append(f"{layer}.bias")
    return {name: parameter(who, model, name) for name in names}


def joined(parts: Mapping[str, Array]) -> Array:
    """W, or [W b], b its last column (BIAS)."""
    arrays = list(parts.values())
    return arrays[0] if len(arrays) == 1 else np.column_stack(arrays)


def taken_apart(model: Model, parts: Mapping[str, Array], new: Array) -> dict[str, Array]:
    """The parts of a new W or [W b], each rounded to its own stored dtype."""
    first, *_ = parts.values()
    columns = np.split(new, [first.shape[1]], axis=1)
    return {
        name: rounded(model, name, column.reshape(part.shape))
        for (name, part), column in zip(parts.items(), columns, strict=False)  # no b, no column
    }


def norm_ratio(new: Array, old: Array) -> float:
    """‖new‖/‖old‖ in Frobenius norm, in float64; 1 if `old` is 0."""
    k = exponent(old)
    size, left = (float(norm(shifted(x, -k))) for x in (old, new))
    return left / size if size else 1.0


# ------------------------------------------------------------------ drawing


class Draw(IntEnum):
    """What an edit draws: word 1 of the key (SAMPLING has 0)."""

    INPUT_BASIS = 1
    OUTPUT_BASIS = 2
    PAIRS = 3
    SCORES = 4


def stream(who: str, seed: int, draw: Draw, layer: str) -> np.random.Generator:
    """Philox, key (seed, draw), counter (0, 0, h): h the first 128 bits of the name's SHA-256.

    A function of the layer's own name, so that what is drawn for it does not depend on which other
    layers are edited.
    """
    digest = hashlib.sha256(layer.encode()).digest()
    counter = np.zeros(4, np.uint64)
    counter[2:] = np.frombuffer(digest[:16], "<u8")
    key = np.array([require_seed(who, seed), draw], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
