"""The digest of a model's weights, which factors, bases and edits record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from refcurv.files import store
from refcurv.files.weights import PARAMETERS, narrow, untouched
from refcurv.law.checks import Array, ConventionError, SchemaError
from refcurv.model.weights import Model, Overlay

Checksums = Mapping[str, tuple[str, str]]
"""Name of a parameter → the dtype that it is stored in, and the SHA-256 of the stored bytes."""


def checksums(model: Model) -> Checksums:
    """The checksum of what `save` would write of each parameter, in file order.

    A parameter that was loaded and not changed has the checksum in its file: it is not read again,
    and the dtype that it was widened to makes no difference. Any other is rounded and hashed.

    Cost: one pass over the parameters that are in memory.
    Proof: tests/test_weights.py::test_the_digest_is_of_what_is_stored
    """
    files = untouched(model)
    found: dict[str, tuple[str, str]] = {}
    for name in model.config.parameter_shapes():
        if name in files:
            info = files[name].entries[PARAMETERS + name]
            found[name] = (info.stored, info.sha256)
        else:
            found[name] = checksum(model, name, np.asarray(model.parameters[name]))
    return found


def changed(model: Model) -> Mapping[str, Array]:
    """The parameters that were replaced since the model was read or made."""
    return model.parameters.top if isinstance(model.parameters, Overlay) else {}


def checksum(model: Model, name: str, array: Array) -> tuple[str, str]:
    """One entry of `checksums`, if the parameter were this array."""
    stored = model.stored.get(name, array.dtype.name)
    return stored, store.sha256(narrow(array, stored))


def digest(model: Model, known: Checksums | None = None) -> str:
    """Which weights a model has: the same for a model in memory, its file, and any copy of it.

    Definition
        SHA-256, in hexadecimal, of the JSON text of [configuration, [[name, shape, stored dtype,
        SHA-256 of the stored bytes (C order, little-endian)], ...]], parameters in file order, the
        configuration without the fields that have their default.

    Args:
        model: any; names of files, checkpoints and provenance do not enter.
        known: `checksums(model)`, if the caller has them.

    Raises:
        DTypeError: a parameter of a dtype that no file holds.

    Cost: that of `checksums`.
    Proof: tests/test_weights.py::test_the_digest_is_of_what_is_stored,
        ::test_every_change_of_a_model_changes_its_digest
    """
    sums = checksums(model) if known is None else known
    shapes = model.config.parameter_shapes()
    facts = [_told(model.config), [[name, shapes[name], *sums[name]] for name in shapes]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _told(record: Any) -> dict[str, Any]:
    """The fields of a configuration that are not at their default."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    other = {f.name for f in fields(record) if values[f.name] != f.default}
    return {k: _told(v) if is_dataclass(v) else v for k, v in values.items() if k in other}


def sha256_of(arrays: Iterable[Array]) -> str:
    """One checksum of several arrays, in their order."""
    return hashlib.sha256("".join(map(store.sha256, arrays)).encode()).hexdigest()


def short(told: str | None) -> str:
    """A digest as people read it."""
    return told[:12] if told else "unknown"


def require_same(
    who: str, what: str, made_from: str | None, model: Model, force: bool, own: str | None = None
) -> bool:
    """Refuse what was made from other weights than the model's; with `force` return True.

    Args:
        who: for messages.
        what: what was made, and its file if it has one.
        made_from: the digest of the weights that it was made from; None, as of older files, passes.
        model: what it is to be used on.
        force: is it meant?
        own: its digest, if the caller has it.

    Raises:
        ConventionError: says which weights, by digest and file, and how to go on.

    Proof: tests/test_projection.py::test_a_basis_of_another_model_is_refused
    """
    if made_from is None or made_from == (own := own or digest(model)):
        return False
    if force:
        return True
    path = model.source.get("path")
    where = f" {str(path)!r}" if path else ""
    where += ", changed since it was read," if path and changed(model) else ""
    since = [edit for edit in model.edits if edit["weights"] == made_from]
    after = f", which is that one after an edit ({since[0]['method']})" if since else ""
    raise ConventionError(
        f"{who}: {what} was made from weights {short(made_from)}, but the model{where} has "
        f"{short(own)}{after}. Make it anew from this model, or pass force=True (--force) if it is "
        "meant.",
        made_from=made_from,
        own=own,
    )


def recorded(header: store.Header) -> str | None:
    """The digest of the weights that a file of factors or bases says it was made from."""
    told = header.attributes.get("weights")
    if told is not None and not (isinstance(told, str) and re.fullmatch("[0-9a-f]{64}", told)):
        raise SchemaError(
            f"load: {header.path!r}: attribute 'weights' must be 64 hexadecimal digits; got "
            f"{str(told)[:80]!r}."
        )
    return told
