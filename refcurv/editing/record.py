"""What an edit did, and the steps that every edit shares: read, choose layers, round, draw.

The methods differ only in what they keep. K-FAC and its controls keep pairs of directions
(`refcurv.editing.projection`, `variants`). SVD keeps singular directions (`svd`). BSN keeps single
weights (`bsn`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from refcurv.algebra.scaling import exponent, norm, shifted
from refcurv.files.digest import Checksums, checksum, checksums, digest, require_same
from refcurv.files.weights import narrow, save_while_made, widen
from refcurv.law import tolerance
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    EmptyError,
    require_finite,
    require_range,
    require_seed,
)
from refcurv.law.conventions import Bias
from refcurv.model.given import require_flag
from refcurv.model.patterns import expand
from refcurv.model.weights import Model


@dataclass(frozen=True, slots=True)
class LayerEdit:
    """What was kept of one layer.

    Fields:
        method: which method chose: "kfac", "svd", "bsn" or "random pairs". An edit with another
            basis has the name in `Bases.method` ("random basis", "inputs only", "outputs only").
        layer: the layer's name.
        rho: the share that was asked for. "kfac", other bases and "svd": the share of what `mass`
            measures. "random pairs": of the pairs. "bsn": of the weights of all layers together.
        pairs: how many there were to choose from. A basis has O·I pairs of directions, or
            O·(I + 1) of [W b]. "svd" has min(O, I) singular directions, "bsn" O·I weights.
        kept: how many of them were kept.
        mass: the share of the total that the kept ones hold. The total is Σ λ_i μ_j; of "svd" it is
            Σ σ², of "bsn" Σ w². NaN if the total is 0.
        gap: (last kept − first dropped) / last kept, in values of λ_i μ_j or σ². It is the distance
            between the two neighbours of the cut. NaN if all were kept or none, and for "random
            pairs" and "bsn", which cut no ordered list.
        acceptable: how many pairs (of "svd": singular values) another correct program may decide
            the other way, by ACCEPTABLE. 0 if the cut is clear, or if no ordered list was cut.
        norm: ‖W'‖/‖W‖ in Frobenius norm, or that of [W b] if it was edited. 1 if W is 0.
        restored: the share of what was cut that rounding W' to its stored dtype brings back:
            ‖P(W' − exact)‖/‖P(W)‖, where P projects on the dropped pairs (of "svd": on the dropped
            u_j v_jᵀ). 0 if nothing was cut or rounded. 0 for "bsn", whose zeros are exact.
        norm_original: ‖W'‖ over the norm of W before the first known edit (`Start.earlier`). It
            equals `norm` if no earlier edit touched the layer. It is NaN if something other than
            these edits changed the weights, or if W was edited in one of them and [W b] in another.
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
    """The weights that an edit starts from. `kept`, `mass` and `norm` are relative to them.

    Fields:
        weights: the digest of these weights (`refcurv.files.digest`).
        made_for: the digest of the weights that the basis or the scores were made from. None if an
            older file does not say.
        forced: whether the two digests differ and the caller edits all the same.
        earlier: the edits that were made to the weights before, oldest first (`Model.edits`).
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
        """The share of pairs (directions, weights) that are kept, over all edited layers together.

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
    """Find out which weights these are, and refuse a basis or scores of others, unless `force`.

    `made` is a pair: the name, for messages, of what says what to keep, and the digest of the
    weights that it was made from. It is None if the edit needs nothing but W.

    Cost: parameters that are not a file's own are hashed.
    Proof: tests/test_projection.py::test_a_basis_of_another_model_is_refused
    """
    require_flag(who, "force", force)
    sums = checksums(model)
    own = digest(model, sums)
    what, made_for = made or ("", own)
    forced = require_same(who, what, made_for, model, force, own)
    return Before(model, sums, Start(own, made_for, forced, model.edits))


def after(
    begun: Before, changed: Mapping[str, Array], rows: Sequence[LayerEdit], joint: bool = False
) -> tuple[Model, EditRecord]:
    """The edited model, with this edit appended to its `edits`, and the record.

    An item of `Model.edits` has method, weights, made_for and forced, as the record has them. It
    has `became`, the digest of the weights after the edit. It has layers, a dictionary: for each
    layer its rho, norm and restored, and joint, whether [W b] was edited.

    Cost: the changed parameters are hashed.
    Proof: tests/test_projection.py::test_an_edit_of_edited_weights_says_what_it_starts_from
    """
    if not changed:
        return begun.model, _record(begun, rows, joint)
    edited = begun.model.with_parameters(changed)
    sums = {n: checksum(edited, n, edited.parameters[n]) for n in changed}
    record, edits = _told(begun, sums, rows, joint)
    return replace(edited, edits=edits), record


def _whole(begun: Before, rows: Iterable[LayerEdit], joint: bool) -> dict[str, bool]:
    """Of which layers [W b] was edited."""
    has_bias = begun.model.config.has_bias
    return {row.layer: joint and has_bias(row.layer) for row in rows}


def _record(begun: Before, rows: Sequence[LayerEdit], joint: bool) -> EditRecord:
    """The record, each layer's norm also relative to the first known weights."""
    start, whole = begun.start, _whole(begun, rows, joint)
    norms = [_norm_before(start, row.layer, whole[row.layer]) for row in rows]
    told = [
        replace(row, norm_original=row.norm * norm) for row, norm in zip(rows, norms, strict=True)
    ]
    return EditRecord(tuple(told), start)


def _told(
    begun: Before, sums: Checksums, rows: Sequence[LayerEdit], joint: bool
) -> tuple[EditRecord, tuple[Mapping[str, Any], ...]]:
    """The record, and the model's `edits` with this one behind them, if it changed anything."""
    start, record = begun.start, _record(begun, rows, joint)
    if not sums:
        return record, start.earlier
    whole = _whole(begun, rows, joint)
    layers = {
        row.layer: {
            "rho": row.rho, "norm": row.norm, "restored": row.restored, "joint": whole[row.layer]
        }
        for row in rows
    }  # fmt: skip
    this = {
        "method": rows[0].method,
        "weights": start.weights,
        "made_for": start.made_for,
        "forced": start.forced,
        "became": digest(begun.model, {**begun.sums, **sums}),
        "layers": layers,
    }
    return record, (*start.earlier, this)


# ------------------------------------------------------------------ in memory, or into a file

Step = tuple[dict[str, Array], LayerEdit]
"""One layer's new parameters by name, none where they stay as they are; and what was done."""


@dataclass(frozen=True, slots=True)
class Work:
    """An edit that is to be done.

    Fields: begun; layers, whose steps come, in this order; steps, each made when it is asked for;
    joint, are they of [W b] where there is a b?
    """

    begun: Before
    layers: tuple[str, ...]
    steps: Iterator[Step]
    joint: bool = False


def done(work: Work) -> tuple[Model, EditRecord]:
    """The edited model, in memory, and the record."""
    changed: dict[str, Array] = {}
    rows = []
    for new, row in work.steps:
        changed |= new
        rows.append(row)
    return after(work.begun, changed, rows, work.joint)


def done_to(
    work: Work, path: str | Path, made_from: Callable[[EditRecord], Mapping[str, Any]]
) -> EditRecord:
    """The edited model straight into a weights file, one layer's new weights in memory at a time.

    Definition: what `save` writes of `done(work)`, byte for byte; `made_from` makes of the record
    what it is told.

    Proof: tests/test_edit_to.py::test_an_edit_into_a_file_is_the_saved_one,
        ::test_one_layer_is_in_memory_at_a_time
    """
    model = work.begun.model
    place = {model.config.weight_of(layer): n for n, layer in enumerate(work.layers)}
    place |= {f"{layer}.bias": n for n, layer in enumerate(work.layers)}
    ready: dict[str, Array] = {}
    rows: list[LayerEdit] = []
    sums: dict[str, tuple[str, str]] = {}
    found: list[EditRecord] = []

    def made(name: str) -> Array | None:
        while len(rows) <= place.get(name, -1):
            new, row = next(work.steps)
            rows.append(row)
            sums.update({n: checksum(model, n, array) for n, array in new.items()})
            ready.update(new)
        return ready.pop(name, None)

    def told() -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
        record, edits = _told(work.begun, sums, rows, work.joint)
        found.append(record)
        return made_from(record), edits

    save_while_made(model, path, told, made)
    return found[0]


def _norm_before(start: Start, layer: str, joint: bool) -> float:
    """‖W‖ at the start over ‖W‖ before all known edits; NaN if they do not say."""
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
    """{pattern: share} → {layer: share}. `layers` are all names in file order, and give the order.

    Raises:
        RangeError: a share outside [0, 1]. NameUnknownError: a pattern that matches no layer.
        ConventionError: a layer that two patterns match; a head tied to the embedding. EmptyError:
        no pattern at all.

    Proof: tests/test_projection.py::test_refusals, ::test_a_tied_head_is_no_layer_to_edit
    """
    names = list(layers)
    if not isinstance(asked, Mapping):
        raise ConventionError(f"{who}: {what} must name its layers, PATTERN=SHARE; got {asked!r}.")
    if not asked:
        raise EmptyError(f"{who}: {what} names no layer; PATTERN=SHARE is needed.")
    found: dict[str, float] = {}
    for pattern, value in asked.items():
        share = require_range(who, f"{what} of {pattern!r}", value, 0, 1)
        for layer in expand(pattern, names):
            if layer in found:
                raise ConventionError(
                    f"{who}: {layer!r} is matched by two patterns. Name it in one."
                )
            found[layer] = share
    require_untied(who, model, found)
    return {layer: found[layer] for layer in names if layer in found}


def require_untied(who: str, model: Model, layers: Iterable[str]) -> None:
    """Refuse a head whose weight is the embedding."""
    if model.config.tied and "head" in layers:
        raise ConventionError(
            f"{who}: the head is tied to the embedding; editing it would edit both. Leave it out."
        )


# ------------------------------------------------------------------ reading and rounding


def require_exact(who: str, model: Model, layers: Iterable[str]) -> None:
    """Refuse layers whose weights were rounded when the model was loaded. No weight is read."""
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
    """The parameters that a basis is for, by name: W, or W and b under JOINT (BIAS)."""
    names = [model.config.weight_of(layer)]
    if bias is Bias.JOINT and model.config.has_bias(layer):
        names.append(f"{layer}.bias")
    return {name: parameter(who, model, name) for name in names}


def joined(parts: Mapping[str, Array]) -> Array:
    """W, or [W b], b its last column (BIAS)."""
    arrays = list(parts.values())
    return arrays[0] if len(arrays) == 1 else np.column_stack(arrays)


def taken_apart(model: Model, parts: Mapping[str, Array], new: Array) -> dict[str, Array]:
    """A new W or [W b] → its parts by name, each rounded to its own stored dtype."""
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
    """‖back‖/‖W − exact‖: how much rounding brought back, relative to how much was cut.

    `exact` is the projection of W before rounding. The result is 0 if W − exact is no larger than
    the rounding of the projection itself.
    """
    k = exponent(W)
    size, came = (float(norm(shifted(X, -k))) for X in (W, back))
    left = np.subtract(W, exact, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        cut = float(norm(np.ldexp(left, -k, out=left)))  # `shifted`, in place
    return came / cut if cut > tolerance.eigenpair(max(W.shape)) * size else 0.0


# ------------------------------------------------------------------ drawing


class Draw(IntEnum):
    """What an edit draws; the value is word 1 of the key, which is 0 in SAMPLING."""

    INPUT_BASIS = 1
    OUTPUT_BASIS = 2
    PAIRS = 3
    SCORES = 4


def stream(who: str, seed: int, draw: Draw, layer: str) -> np.random.Generator:
    """A Philox stream with key (seed, draw) and counter (0, 0, h).

    h is the first 128 bits of the SHA-256 of the layer's name. What is drawn for a layer therefore
    does not depend on which other layers are edited.
    """
    digest = hashlib.sha256(layer.encode()).digest()
    counter = np.zeros(4, np.uint64)
    counter[2:] = np.frombuffer(digest[:16], "<u8")
    key = np.array([require_seed(who, seed), draw], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
