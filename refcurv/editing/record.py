"""What an edit did, and the steps that every edit shares: read, choose layers, round, draw.

A method decides only what to keep. K-FAC and its controls keep pairs of directions
(`refcurv.editing.projection`, `variants`), SVD singular directions (`svd`), BSN weights (`bsn`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.files.digest import Checksums, checksum, checksums, digest, require_same
from refcurv.files.weights import narrow, widen
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    require_finite,
    require_range,
    require_seed,
)
from refcurv.law.conventions import Bias
from refcurv.model.patterns import expand
from refcurv.model.weights import Model


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
        acceptable: pairs ("svd": singular values) that another correct program may decide the
            other way, by ACCEPTABLE; 0 where the cut is clear, and where no order was cut.
        norm: ‖W'‖/‖W‖ in Frobenius norm, of [W b] where that was edited; 1 if W is 0.
        restored: how much of what was cut comes back when W' is rounded to its stored dtype,
            ‖P(W' − exact)‖/‖P(W)‖ with P the projection on the dropped pairs ("svd": on the
            dropped u_j v_jᵀ). 0 where nothing was cut or rounded, and of "bsn", whose zeros are
            exact.
        norm_original: ‖W'‖ over ‖W‖ before the first edit that is known (`Start.earlier`); `norm`
            itself where none has touched the layer, NaN where the weights were also changed
            otherwise, or W and [W b] were edited in turn.
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
    restored: float = 0.0
    norm_original: float = math.nan


@dataclass(frozen=True, slots=True)
class Start:
    """What an edit starts from: `kept`, `mass` and `norm` are relative to these weights.

    Fields:
        weights: their digest (`refcurv.files.digest`).
        made_for: that of the weights which the basis, or the scores, were made from; None where an
            older file does not say.
        forced: are these others, and the caller meant it?
        earlier: the edits that made the weights what they are, oldest first (`Model.edits`).
    """

    weights: str = ""
    made_for: str | None = None
    forced: bool = False
    earlier: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        earlier = [dict(edit) for edit in self.earlier]
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"earlier": earlier}


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What an edit did, layer by layer in file order, and what it started from."""

    layers: tuple[LayerEdit, ...]
    start: Start = Start()

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


# ------------------------------------------------------------------ what it starts from


@dataclass(frozen=True, slots=True)
class Before:
    """A model about to be edited, its checksums, and what the record will say of it."""

    model: Model
    sums: Checksums
    start: Start


def before(
    who: str, model: Model, made: tuple[str, str | None] | None = None, force: bool = False
) -> Before:
    """Which weights these are; refuses what was made from others, unless `force`.

    `made` is what tells the edit what to keep, for messages, and the digest of the weights that it
    was made from. None for W alone.

    Cost: parameters that are not a file's own are hashed.
    Proof: tests/test_projection.py::test_a_basis_of_another_model_is_refused
    """
    sums = checksums(model)
    own = digest(model, sums)
    what, made_for = made or ("", own)
    forced = require_same(who, what, made_for, model, force, own)
    return Before(model, sums, Start(own, made_for, forced, model.edits))


def after(
    begun: Before, changed: Mapping[str, Array], rows: Sequence[LayerEdit], joint: bool = False
) -> tuple[Model, EditRecord]:
    """The edited model, which knows what was done to it, and the record.

    Each of `Model.edits` has method, weights, made_for and forced as in the record, became (the
    digest after it), and layers: {name: rho, norm, restored, joint (was it [W b]?)}.

    Cost: the changed parameters are hashed.
    Proof: tests/test_projection.py::test_an_edit_of_edited_weights_says_what_it_starts_from
    """
    start, config = begun.start, begun.model.config
    whole = {row.layer: joint and config.has_bias(row.layer) for row in rows}
    rows = [
        replace(row, norm_original=row.norm * _norm_before(start, row.layer, whole[row.layer]))
        for row in rows
    ]
    record = EditRecord(tuple(rows), start)
    if not changed:
        return begun.model, record
    edited = begun.model.with_parameters(changed)
    sums = {n: checksum(edited, n, edited.parameters[n]) for n in changed}
    layers = {
        row.layer: {
            "rho": row.rho, "norm": row.norm, "restored": row.restored, "joint": whole[row.layer]
        }
        for row in rows
    }  # fmt: skip
    done = {
        "method": rows[0].method,
        "weights": start.weights,
        "made_for": start.made_for,
        "forced": start.forced,
        "became": digest(edited, {**begun.sums, **sums}),
        "layers": layers,
    }
    return replace(edited, edits=(*start.earlier, done)), record


def _norm_before(start: Start, layer: str, joint: bool) -> float:
    """‖W‖ of the start over ‖W‖ before all known edits; NaN where these do not tell."""
    steps = [*(edit["weights"] for edit in start.earlier), start.weights]
    if [edit["became"] for edit in start.earlier] != steps[1:]:
        return math.nan
    past = [edit["layers"][layer] for edit in start.earlier if layer in edit["layers"]]
    if any(row["joint"] != joint for row in past):
        return math.nan
    return math.prod(float(row["norm"]) for row in past)


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


def require_exact(who: str, model: Model, layers: Iterable[str]) -> None:
    """Refuse layers whose weights were rounded when the model was loaded; nothing is read."""
    for layer in layers:
        _require_exact(who, model, f"{layer}.weight")


def _require_exact(who: str, model: Model, name: str) -> None:
    if model.stored.get(name, model.dtype) == "float64" and model.dtype != "float64":
        raise DTypeError(
            f"{who}: {name} is stored in float64 but the model was loaded as {model.dtype}; "
            'load it with dtype="float64".'
        )


def parameter(who: str, model: Model, name: str) -> Array:
    """A parameter that can be edited: finite, and read without rounding."""
    _require_exact(who, model, name)
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


def restored(back: Array, W: Array, exact: Array) -> float:
    """‖back‖/‖W − exact‖: what rounding gave back, of what the projection `exact` of W cut.

    0 where the projection cuts no more than its own rounding.
    """
    k = exponent(W)
    cut, size, came = (float(norm(shifted(X, -k))) for X in (W - exact, W, back))
    return came / cut if cut > tolerance.eigenpair(max(W.shape)) * size else 0.0


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
