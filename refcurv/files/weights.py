"""The weights file: a Model on disk, its parameters as they were stored and read one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from refcurv.files import store
from refcurv.files.bfloat16 import all_finite, from_bfloat16, to_bfloat16, widened
from refcurv.files.disk import parse_json
from refcurv.files.history import past_edits
from refcurv.files.lazy import Lazy
from refcurv.files.paths import PathLike, one_line
from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    RefcurvError,
    SchemaError,
    ShapeError,
    require_finite,
)
from refcurv.law.conventions import COMPUTE_DTYPES
from refcurv.law.dtypes import require_float
from refcurv.law.words import number_of
from refcurv.model.config import Image, ModelConfig, RopeScaling
from refcurv.model.given import require_facts, require_model
from refcurv.model.weights import Model, Overlay

STORED: Final = ("float64", "float32", "float16", "bfloat16")
"""The dtypes that a parameter can be stored in."""

OF_CHECKPOINT: Final = ("checkpoint_config", "ignored_keys", "beside")
"""Items of the provenance about the checkpoint, for `export`; copied from file to file."""

PARAMETERS: Final = "parameters."
"""The first part of a parameter's name in the file."""


class Parameters(Lazy[Array]):
    """The parameters of a weights file, read one by one; `header` says what the file holds."""

    __slots__ = ("header",)

    def __init__(self, header: store.Header, names: tuple[str, ...], dtype: str) -> None:
        super().__init__(names, lambda name: _read_parameter(header, name, dtype))
        self.header = header


def _read_parameter(header: store.Header, name: str, dtype: str) -> Array:
    """Read, verify and widen one parameter."""
    info = header.entries[PARAMETERS + name]
    array = widen(store.read(header, PARAMETERS + name), info.stored, dtype)
    require_finite(f"load: {header.path!r}", f"parameter {name!r}", array)
    array.flags.writeable = False
    return array


def untouched(model: Model) -> Mapping[str, store.Header]:
    """The file of each parameter that is still what was loaded, to be stored as it is there.

    Proof: tests/test_weights.py::test_the_digest_is_of_what_is_stored
    """
    given = model.parameters
    base, top = (given.base, given.top) if isinstance(given, Overlay) else (given, {})
    if not isinstance(base, Parameters):
        return {}
    header, stored = base.header, model.stored
    same = (n for n in base if header.entries[PARAMETERS + n].stored == stored.get(n))
    return {name: header for name in same if name not in top}


def load(path: PathLike, dtype: str = "float64") -> Model:
    """A Model from a weights file, its parameters read when they are asked for.

    Definition
        parameters[name] = the stored numbers, widened exactly to `dtype` (PRECISION); only a
        stored float64 is rounded, to nearest, when the caller chose float32.

    Args:
        path: A file written by `convert` or `save`.
        dtype: What the passes compute in, float64 or float32.

    Returns:
        Model(config, parameters, dtype, stored, source). Each access of `parameters` reads the
        file, verifies the SHA-256 and returns a read-only array of the shape that the
        configuration asks for. `source` has path, header, provenance and (hashed when asked for)
        sha256; `edits` what the file says was done to the weights.

    Raises:
        ConventionError: `dtype` is neither.
        SchemaError: The file is not a weights file, or its tensors contradict its configuration.
        ChecksumError, NonFiniteError: On access: damaged bytes, NaN or infinity.
        StorageError: The disk cannot be read.

    Cost: Opening reads no tensor; an access reads and hashes one.
    Source: METHOD, Files.
    Proof:  tests/test_weights.py::test_load_widens_exactly
    """
    require_float("load", "dtype", dtype, COMPUTE_DTYPES)
    header = store.open_file(path, format="refcurv-weights")
    config = _config(header)
    names = tuple(config.parameter_shapes())
    _require_parameters(header, config)
    stored = {name: header.entries[PARAMETERS + name].stored for name in names}
    return Model(
        config,
        Parameters(header, names, dtype),
        dtype,
        MappingProxyType(stored),
        store.Source(header),
        past_edits(header),
    )


def save(model: Model, path: PathLike, made_from: Mapping[str, Any] | None = None) -> None:
    """Write a Model as a weights file, each parameter in the dtype of its source.

    Definition
        stored[name] = round(parameters[name]), to nearest, ties to even, in one rounding. A
        parameter that still is what was loaded is copied bit for bit, even where loading had
        rounded it.

    Args:
        model: Any Model; parameters that `model.stored` does not list keep their own dtype.
        path: The file; one that exists is replaced at the end, or not at all.
        made_from: JSON items for the provenance, beside the source's file name and SHA-256 and
            the checkpoint's configuration and the model's `edits`, which are carried along.

    Raises:
        ShapeError: A parameter has not the shape that the configuration asks for.
        DTypeError: A parameter is no float, or `model.stored` names an unknown dtype.
        NonFiniteError: A parameter holds NaN or infinity, or overflows its stored dtype.
        SchemaError, StorageError: As `store.write`.

    Cost: One parameter in memory at a time (two where loading had rounded). Those of a file that
        were not changed are neither widened nor rounded.
    Source: PRECISION.
    Proof:  tests/test_weights.py::test_save_of_loaded_is_identical,
        tests/test_edit_room.py::test_what_stays_takes_what_is_stored
    """
    require_model("save", model)
    facts = require_facts("save", "made_from", made_from)
    save_while_made(model, path, lambda: (facts, model.edits))


def save_while_made(
    model: Model,
    path: PathLike,
    told: Callable[[], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
    made: Callable[[str], Array | None] = lambda _: None,
) -> None:
    """`save` of a model some of whose parameters are made while they are written, in file order.

    `made` is called with each name: what takes that parameter's place, or None where it stays.
    `told` is called behind the last one; it says what the file was made from, and its edits.
    """
    shapes = model.config.parameter_shapes()
    header: store.Header | None = model.source.get("header")
    origin: dict[str, Any] = {}
    if header is not None:
        origin["inputs"] = {Path(header.path).name: model.source["sha256"]}
        kept = {name: header.provenance.get(name) for name in OF_CHECKPOINT}
        origin |= {name: value for name, value in kept.items() if value is not None}

    def said() -> dict[str, Any]:
        made_from, edits = told()
        past = {"edits": [dict(edit) for edit in edits]} if edits else {}
        return {**origin, "dtype": model.dtype, **made_from, **past}

    files = untouched(model)

    def entry(name: str, shape: tuple[int, ...]) -> store.Entry:
        array = made(name)
        if array is None and header is not None and files.get(name) is header:
            if model.dtype == "float64" or model.stored[name] != "float64":  # read as it is
                return _kept(header, name, shape)
        array = np.asarray(model.parameters[name]) if array is None else array
        return _entry(model, header, name, array, shape)

    entries = (entry(name, shape) for name, shape in shapes.items())
    write(path, model.config, entries, said)


def write(
    path: PathLike,
    config: ModelConfig,
    arrays: Iterator[store.Entry],
    made_from: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
    """Write a weights file from entries already in their stored form (`parameter_entry`)."""
    said = made_from if callable(made_from) else lambda: made_from
    store.write(
        path,
        format="refcurv-weights",
        attributes={"config": json.dumps(config_to_json(config))},
        arrays=arrays,
        provenance=lambda: store.provenance(**said()),
    )


def parameter_entry(name: str, raw: Array, stored: str, checkpoint_name: str = "") -> store.Entry:
    """A parameter on its way into a file: raw numbers, or the bits of a bfloat16."""
    attributes = {"encoding": store.BFLOAT16} if stored == "bfloat16" else {}
    if checkpoint_name:
        attributes["checkpoint_name"] = checkpoint_name
    return store.Entry(PARAMETERS + name, raw, attributes)


def widen(raw: Array, stored: str, dtype: str) -> Array:
    """Stored numbers or bfloat16 bits → `dtype`; exact but for float64 → float32."""
    if stored == "bfloat16":
        return widened(raw, dtype)
    with np.errstate(over="ignore"):
        return raw.astype(dtype, copy=False)


def narrow(array: Array, stored: str) -> Array:
    """Numbers → the nearest ones of the stored dtype, ties to even; bits for bfloat16."""
    with np.errstate(over="ignore"):
        return to_bfloat16(array) if stored == "bfloat16" else array.astype(stored)


def holds(header: store.Header, config: ModelConfig, parameters: Mapping[str, Array]) -> bool:
    """Are these the configuration and the numbers of that file? Its checksums say so: none is read.

    Proof: tests/test_certified_hostile.py::test_a_certificate_names_only_files_that_it_is_of
    """
    return _config(header) == config and all(
        _holds(header, PARAMETERS + name, x) for name, x in parameters.items()
    )


def _holds(header: store.Header, name: str, array: Array) -> bool:
    stored = header.entries[name].stored
    raw = narrow(array, stored)
    return np.array_equal(widen(raw, stored, "float64"), array) and store.holds(header, name, raw)


def _kept(header: store.Header, name: str, shape: tuple[int, ...]) -> store.Entry:
    """What `_entry` makes of a parameter that was loaded without rounding: the file's own entry."""
    info, raw = header.entries[PARAMETERS + name], store.read(header, PARAMETERS + name)
    _require_shape(name, raw, shape)
    _require_finite(f"load: {header.path!r}", f"parameter {name!r}", raw, info.stored)
    return parameter_entry(name, raw, info.stored, _checkpoint_name(info))


def _checkpoint_name(info: store.Info | None) -> str:
    return str(info.attributes.get("checkpoint_name", "")) if info is not None else ""


def _require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ShapeError(f"save: {name} must be {shape}; got {array.shape}.")


def _require_finite(who: str, what: str, raw: Array, stored: str, hint: str = "") -> None:
    """`require_finite` of numbers as they are stored."""
    if stored != "bfloat16":
        require_finite(who, what, raw, hint)
    elif not all_finite(raw):
        require_finite(who, what, from_bfloat16(raw), hint)


def _entry(
    model: Model, header: store.Header | None, name: str, array: Array, shape: tuple[int, ...]
) -> store.Entry:
    stored = model.stored.get(name, array.dtype.name)
    if array.dtype.name not in STORED or stored not in STORED:
        raise DTypeError(
            f"save: {name} is {array.dtype}, to be stored as {stored}; known are "
            f"{', '.join(STORED)}."
        )
    _require_shape(name, array, shape)
    require_finite("save", f"parameter {name!r}", array)
    raw = narrow(array, stored)
    info = header.entries.get(PARAMETERS + name) if header is not None else None
    rounded = stored == "float64" and model.dtype == "float32"
    if rounded and header is not None and info is not None:
        # loading rounded this one: writing the rounded numbers would change an untouched tensor
        source = store.read(header, PARAMETERS + name)
        if (
            info.stored == stored
            and widen(source, stored, model.dtype).tobytes() == array.tobytes()
        ):
            raw = source
    _require_finite("save", f"{name} in {stored}", raw, stored, "Too large for it?")
    return parameter_entry(name, raw, stored, _checkpoint_name(info))


def _config(header: store.Header) -> ModelConfig:
    where = f"load: {header.path!r}"
    text = header.attributes.get("config")
    if not isinstance(text, str):
        raise SchemaError(f"{where} has no text attribute 'config'. Was it written by refcurv?")
    try:
        config = config_from_json(parse_json("its text", text))
    except RefcurvError as error:
        raise SchemaError(f"{where}: its configuration is refused: {one_line(error)}.") from None
    if config.layers > len(header.entries):  # before as many names are made
        raise SchemaError(
            f"{where}: its configuration asks for {number_of(config.layers, 'layer')}, but "
            f"there are only "
            f"{number_of(len(header.entries), 'tensor')}."
        )
    return config


def _require_parameters(header: store.Header, config: ModelConfig) -> None:
    """Each tensor that the configuration asks for, in its shape, as floats; and no other."""
    where = f"load: {header.path!r}"
    shapes = {PARAMETERS + name: shape for name, shape in config.parameter_shapes().items()}
    for name in header.entries:
        if name not in shapes:
            raise SchemaError(f"{where} holds {name!r}, which its configuration does not ask for.")
    for name, shape in shapes.items():
        info = header.entries.get(name)
        if info is None:
            raise SchemaError(f"{where} lacks {name!r}, which its configuration asks for.")
        if info.shape != shape:
            raise SchemaError(
                f"{where}: {name!r} has shape {info.shape}; its configuration asks for {shape}."
            )
        if info.stored not in STORED:
            raise SchemaError(
                f"{where}: {name!r} holds {info.stored}; parameters are {', '.join(STORED)}."
            )


# ------------------------------------------------------------------ the configuration as JSON


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of a configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def config_from_json(data: object) -> ModelConfig:
    """The reverse of `config_to_json`: a field may be missing where it has a default."""
    inner = dict(_fields(ModelConfig, data))
    for name, record in (("rope_scaling", RopeScaling), ("image", Image)):
        if inner.get(name) is not None:
            inner[name] = record(**_fields(record, inner[name]))
    return ModelConfig(**inner)


def _fields(record: type[Any], data: object) -> dict[str, Any]:
    """The fields of a JSON object, lists as tuples. A field may be missing if it has a default."""
    who = record.__name__
    if not isinstance(data, dict):
        raise ConventionError(f"{who}: expected a JSON object; got {type(data).__name__}.")
    known = {f.name: f.default is MISSING for f in fields(record)}
    missing = sorted(name for name, required in known.items() if required and name not in data)
    unknown = sorted(str(name) for name in set(data) - set(known))
    if missing or unknown:
        raise ConventionError(
            f"{who}: missing fields {missing}, unknown fields {unknown}. "
            "Was the file written by another version of refcurv?"
        )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
