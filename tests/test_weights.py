"""files/weights.py and bfloat16.py: exact widening, one rounding, bit-for-bit copies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refcurv.files import store, weights
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.files.digest import changed, digest
from refcurv.files.store import Entry
from refcurv.files.weights import config_to_json
from refcurv.law.checks import (
    ChecksumError,
    ConventionError,
    DTypeError,
    NonFiniteError,
    SchemaError,
    ShapeError,
)
from refcurv.model.config import ModelConfig
from refcurv.model.weights import Model

CONFIG = ModelConfig(
    vocabulary=7,
    width=4,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=2,
    mlp_width=3,
    norm_place="post",
    qk_norm="full",
    norm_eps=1e-5,
    rope_theta=500.0,
    tied=False,
)
DTYPES = ["bfloat16", "float16", "float32", "float64"]


def raw_parameters(rng: np.random.Generator, kinds: list[str] | None = None) -> dict[str, Any]:
    """Random stored arrays, dtypes taking turns: {name: (raw, stored)}."""
    kinds = kinds or DTYPES
    found = {}
    for i, (name, shape) in enumerate(CONFIG.parameter_shapes().items()):
        stored = kinds[i % len(kinds)]
        values = rng.standard_normal(shape)
        found[name] = (
            to_bfloat16(values) if stored == "bfloat16" else values.astype(stored),
            stored,
        )
    return found


def write_raw(path: Path, raw: Mapping[str, Any], config: ModelConfig = CONFIG) -> Path:
    entries = (weights.parameter_entry(n, a, s, f"hf.{n}") for n, (a, s) in raw.items())
    weights.write(path, config, entries, {"checkpoint_config": "{}"})
    return path


@pytest.fixture
def raw(rng: np.random.Generator) -> dict[str, Any]:
    return raw_parameters(rng)


@pytest.fixture
def path(tmp_path: Path, raw: dict[str, Any]) -> Path:
    return write_raw(tmp_path / "w.h5", raw)


def datasets(path: Path) -> dict[str, tuple[Any, bytes]]:
    header = store.open_file(path)
    return {n: (info, store.read(header, n).tobytes()) for n, info in header.entries.items()}


# ------------------------------------------------------------------ bfloat16

HAND = [
    (1.0, 0x3F80),
    (-2.0, 0xC000),
    (1 + 2**-7, 0x3F81),  # the next one
    (1 + 2**-8, 0x3F80),  # a tie: down to even
    (1 + 3 * 2**-8, 0x3F82),  # a tie: up to even
    (1 + 2**-8 + 2**-40, 0x3F81),  # float32 would make it the tie above
    (1 + 3 * 2**-8 - 2**-40, 0x3F81),
    (-(1 + 2**-8 + 2**-40), 0xBF81),
    (0.0, 0x0000),
    (-0.0, 0x8000),
    (2.0**-133, 0x0001),  # the smallest subnormal
    (2.0**-134, 0x0000),
    (5e-324, 0x0000),
    (float.fromhex("0x1.fep127"), 0x7F7F),  # the largest finite one
    (float.fromhex("0x1.fefffffffffffp127"), 0x7F7F),
    (float.fromhex("0x1.ffp127"), 0x7F80),  # a tie with infinity
    (1e300, 0x7F80),
    (-np.inf, 0xFF80),
    (np.nan, 0x7FC0),
    (np.array(0x7FF0000000000001).view("f8")[()], 0x7FC0),  # nothing of it is in the upper half
]


@pytest.mark.parametrize("value, bits", HAND)
def test_bfloat16_by_hand(value: float, bits: int) -> None:
    assert to_bfloat16(np.array([value]))[0] == bits
    assert to_bfloat16(np.array(value)).shape == ()


def test_bfloat16_round_trip_of_every_pattern() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wide = from_bfloat16(bits)
    finite = np.isfinite(wide)
    assert wide.dtype == np.float32
    assert (to_bfloat16(wide)[finite] == bits[finite]).all()
    assert (to_bfloat16(wide[finite].astype(np.float64)) == bits[finite]).all()
    assert ((bits & 0x7F80 == 0x7F80) == ~finite).all()


@given(st.floats(-(2.0**127), 2.0**127) | st.floats(width=32, min_value=-2, max_value=2))
def test_bfloat16_is_the_nearest_with_ties_to_even(value: float) -> None:
    bits = int(to_bfloat16(np.array([value]))[0])
    near = [b for b in (bits - 1, bits, bits + 1) if 0 <= b & 0x7FFF <= 0x7F7F]
    gaps = {b: abs(Fraction(float(from_bfloat16(np.array([b], np.uint16))[0])) - Fraction(value))
            for b in near if 0 <= b < 2**16}  # fmt: skip
    assert gaps[bits] == min(gaps.values())
    assert bits % 2 == 0 or sum(gap == gaps[bits] for gap in gaps.values()) == 1


# ------------------------------------------------------------------ load


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_load_widens_exactly(path: Path, raw: dict[str, Any], dtype: str) -> None:
    model = weights.load(path, dtype)
    assert model.config == CONFIG and model.dtype == dtype
    assert list(model.parameters) == list(CONFIG.parameter_shapes())
    for name, (stored_array, stored) in raw.items():
        array = model.parameters[name]
        wide = from_bfloat16(stored_array) if stored == "bfloat16" else stored_array
        assert array.dtype == dtype and model.stored[name] == stored
        assert (array == wide.astype(dtype)).all()
        if stored != "float64":
            assert (array.astype(np.float64) == wide.astype(np.float64)).all()
    assert "embed" not in model.parameters and model.parameters.get("x") is None


def test_parameters_are_read_when_asked_for(path: Path, raw: dict[str, Any]) -> None:
    model = weights.load(path)
    one = model.parameters["embed.weight"]
    with pytest.raises(ValueError, match="read-only"):
        one[0, 0] = 1
    raw["embed.weight"] = (raw["embed.weight"][0] ^ 1, "bfloat16")
    write_raw(path, raw)
    with pytest.raises(SchemaError, match="was replaced or changed"):
        model.parameters["embed.weight"]
    with pytest.raises(SchemaError, match="was replaced or changed"):
        model.source["sha256"]


def test_damage_and_nan_are_found_on_access(path: Path, raw: dict[str, Any]) -> None:
    bits = raw["embed.weight"][0].copy()
    bits[3, 1] = 0x7FC0
    write_raw(path, {**raw, "embed.weight": (bits, "bfloat16")})
    with pytest.raises(NonFiniteError, match=r"'embed.weight' holds nan at \[3, 1\]"):
        weights.load(path).parameters["embed.weight"]
    data = path.read_bytes()
    where = data.index(raw["head.weight"][0].tobytes())
    path.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    with pytest.raises(ChecksumError, match=r"parameters\.head\.weight"):
        weights.load(path).parameters["head.weight"]


def test_a_float64_beyond_float32_is_refused_in_float32(path: Path, raw: dict[str, Any]) -> None:
    name = next(n for n, (_, stored) in raw.items() if stored == "float64")
    raw[name][0].flat[0] = 1e39
    write_raw(path, raw)
    assert weights.load(path).parameters[name].flat[0] == 1e39
    with pytest.raises(NonFiniteError, match="holds inf"):
        weights.load(path, "float32").parameters[name]


def change(raw: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {**raw, **{name.replace("__", "."): value for name, value in changed.items()}}


ZEROS = np.zeros((7, 4))
BROKEN = {
    "missing": (
        lambda raw: {n: v for n, v in raw.items() if n != "head.weight"},
        "lacks 'parameters.head.weight'",
    ),
    "extra": (lambda raw: change(raw, position__weight=(ZEROS, "float64")), "holds .*position"),
    "shape": (
        lambda raw: change(raw, embed__weight=(ZEROS.T, "float64")),
        r"'parameters.embed.weight' has shape \(4, 7\); its configuration asks for \(7, 4\)",
    ),
    "dtype": (
        lambda raw: change(raw, embed__weight=(ZEROS.astype(np.uint16), "uint16")),
        "'parameters.embed.weight' holds uint16; parameters are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_contradict_the_configuration(path: Path, raw: Any, name: str) -> None:
    broken, fragment = BROKEN[name]
    write_raw(path, broken(raw))
    with pytest.raises(SchemaError, match=fragment) as caught:
        weights.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, fragment",
    [
        (None, "no text attribute 'config'"),
        ("[]", "refused: its text must be a JSON object"),
        ('{"width": 4}', "missing fields"),
        ({"layers": 10**9}, "asks for 1,000,000,000 layers, but there are only"),
        ({"vocabulary": 10**30}, "asks for"),
        ({"rope_theta": 10**400}, "configuration is refused"),
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"norm_place": ["pre"]}, "norm_place must be one of"),
        ({"qk_norm": "none"}, "which its configuration does not ask for"),
        ({"tied": True}, "holds 'parameters.head.weight', which"),
    ],
)
def test_a_configuration_that_is_refused(
    tmp_path: Path, raw: dict[str, Any], config: Any, fragment: str
) -> None:
    if isinstance(config, dict):
        config = json.dumps(config_to_json(CONFIG) | config)
    store.write(
        tmp_path / "w.h5",
        format="refcurv-weights",
        attributes={} if config is None else {"config": config},
        arrays=[weights.parameter_entry(n, a, s) for n, (a, s) in raw.items()],
        provenance={},
    )
    with pytest.raises(SchemaError, match=fragment) as caught:
        weights.load(tmp_path / "w.h5")
    assert "\n" not in str(caught.value) and "w.h5" in str(caught.value)


def test_load_takes_two_dtypes_and_one_format(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConventionError, match="dtype must be one of float64, float32"):
        weights.load(path, "float16")
    store.write(tmp_path / "b", format="refcurv-basis", attributes={}, arrays=[], provenance={})
    with pytest.raises(SchemaError, match="is a refcurv-basis file"):
        weights.load(tmp_path / "b")


# ------------------------------------------------------------------ save


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_save_of_loaded_is_identical(path: Path, tmp_path: Path, dtype: str) -> None:
    """In float32 too, which cannot hold the stored float64: an untouched tensor is copied."""
    weights.save(weights.load(path, dtype), tmp_path / "w2.h5")
    assert datasets(tmp_path / "w2.h5") == datasets(path)
    weights.save(weights.load(path, dtype), path)  # onto its own source
    assert datasets(tmp_path / "w2.h5") == datasets(path)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_changed_parameter_is_rounded_once_to_its_stored_dtype(
    path: Path, tmp_path: Path, raw: dict[str, Any], dtype: str
) -> None:
    model = weights.load(path, dtype)
    changed = {name: model.parameters[name] * 1.3 for name in list(raw)[:8:2]}
    weights.save(model.with_parameters(changed), tmp_path / "w2.h5", {"rho": 0.5})
    before, after = datasets(path), datasets(tmp_path / "w2.h5")
    for name, (_, stored) in raw.items():
        key = "parameters." + name
        if name in changed:
            value = changed[name]
            wanted = to_bfloat16(value) if stored == "bfloat16" else value.astype(stored)
            assert after[key][1] == wanted.tobytes() and after[key] != before[key]
            assert after[key][0].attributes == {"checkpoint_name": f"hf.{name}"}
        else:
            assert after[key] == before[key]
    made = store.open_file(tmp_path / "w2.h5").provenance
    assert made["inputs"] == {"w.h5": store.file_sha256(path)}
    assert (made["rho"], made["dtype"], made["checkpoint_config"]) == (0.5, dtype, "{}")


def test_a_model_from_arrays_keeps_its_dtypes(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {n: a for n, (a, _) in raw_parameters(rng, ["float32", "float64"]).items()}
    stored = {n: a.dtype.name for n, a in arrays.items() if a.dtype == "float32"}
    wide = {n: a.astype("float64") for n, a in arrays.items()}
    weights.save(Model(CONFIG, wide, stored=stored), tmp_path / "w.h5")
    back = weights.load(tmp_path / "w.h5")
    assert back.stored == {n: a.dtype.name for n, a in arrays.items()}
    assert all((back.parameters[n] == a).all() for n, a in arrays.items())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("wrong", [
    lambda x: x[:-1], lambda x: x[:0], lambda x: x[:1], lambda x: np.concatenate([x, x]),
    lambda x: x[None], lambda x: x.T[..., None], lambda x: x.astype("float16"),
    lambda x: x.astype(x.dtype.newbyteorder()), lambda x: x.astype(int), lambda x: x.astype("c8"),
    lambda x: x.astype(np.longdouble), lambda x: x.tolist(), lambda x: None, lambda x: x[0].item,
    lambda x: x.astype("float32" if x.dtype == "float64" else "float64"),
])  # fmt: skip
def test_arrays_are_those_that_the_model_asks_for(path: Path, wrong: Any, dtype: str) -> None:
    """A kernel would read past the end of a shorter one, and compute in the dtype that it has."""
    model = weights.load(path, dtype)
    arrays = dict(model.parameters)
    for kind in (dict, MappingProxyType):
        Model(CONFIG, kind(arrays), dtype)
        for name in ("embed.weight", "blocks.0.attn_norm.weight", "final_norm.weight"):
            with pytest.raises(ShapeError, match=f"{name} must be .* of {dtype}"):
                Model(CONFIG, kind(arrays | {name: wrong(arrays[name])}), dtype)


@pytest.mark.parametrize(
    "array, stored, error, fragment",
    [
        (ZEROS, "int8", DTypeError, "to be stored as int8"),
        (ZEROS + np.nan, "float64", NonFiniteError, "'embed.weight' holds nan"),
        (ZEROS + 1e5, "float16", NonFiniteError, "embed.weight in float16 holds inf"),
        (ZEROS + 3.4e38, "bfloat16", NonFiniteError, "embed.weight in bfloat16 holds inf"),
    ],
)
def test_what_cannot_be_saved(
    path: Path, tmp_path: Path, array: Any, stored: str, error: Any, fragment: str
) -> None:
    model = weights.load(path)
    arrays = {**{n: model.parameters[n] for n in model.parameters}, "embed.weight": array}
    bad = dataclasses.replace(model, parameters=arrays, stored={"embed.weight": stored})
    with pytest.raises(error, match=fragment):
        weights.save(bad, tmp_path / "w2.h5")
    assert not (tmp_path / "w2.h5").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_weights_file_is_an_ordinary_file(path: Path) -> None:
    header = store.open_file(path, format="refcurv-weights")
    assert json.loads(str(header.attributes["config"])) == config_to_json(CONFIG)
    assert Entry and header.entries["parameters.embed.weight"].encoding == "bfloat16"


# ------------------------------------------------------------------ which weights they are


def by_definition(path: Path, config: dict[str, Any]) -> str:
    """The digest from the bytes of a file, written out."""
    header = store.open_file(path)
    rows = [
        [name, list(shape), header.entries[f"parameters.{name}"].stored,
         hashlib.sha256(store.read(header, f"parameters.{name}").tobytes()).hexdigest()]
        for name, shape in CONFIG.parameter_shapes().items()
    ]  # fmt: skip
    return hashlib.sha256(json.dumps([config, rows], sort_keys=True).encode()).hexdigest()


def test_the_digest_is_of_what_is_stored(path: Path, tmp_path: Path) -> None:
    """However it was widened, in memory or in a file, copied or not; nothing of a file is read."""
    model = weights.load(path)
    told = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)
            if getattr(CONFIG, f.name) != f.default}  # fmt: skip
    assert "vocabulary" in told
    assert "causal" not in told
    want = by_definition(path, told)
    assert digest(model) == digest(weights.load(path, "float32")) == want
    for dtype in ("float64", "float32"):
        weights.save(weights.load(path, dtype), tmp_path / f"{dtype}.h5", {"seed": 3})
        assert digest(weights.load(tmp_path / f"{dtype}.h5")) == want
    in_memory = Model(CONFIG, dict(model.parameters), "float64", model.stored)
    assert digest(in_memory) == want
    name = "blocks.1.mlp.up.weight"
    moved = model.with_parameters({name: np.ones((3, 4))})
    assert set(changed(moved)) == {name}
    assert digest(moved.with_parameters({name: model.parameters[name]})) == want
    weights.save(moved, tmp_path / "moved.h5")
    assert digest(moved) == digest(weights.load(tmp_path / "moved.h5")) != want
    longer = dataclasses.replace(model, stored=dict.fromkeys(model.stored, "float64"))
    weights.save(longer, tmp_path / "longer.h5")  # to be stored otherwise than in its file
    assert digest(longer) == digest(weights.load(tmp_path / "longer.h5")) != want
    with mock.patch.object(store, "read", side_effect=AssertionError("a tensor was read")):
        assert digest(weights.load(path)) == want
        assert digest(moved) != want  # one array is hashed, none is read


def test_every_change_of_a_model_changes_its_digest(raw: dict[str, Any]) -> None:
    parameters = {n: weights.widen(a, s, "float64") for n, (a, s) in raw.items()}
    stored = {n: s for n, (_, s) in raw.items()}
    model = Model(CONFIG, parameters, "float64", stored)
    found = [digest(model)]
    for name, (_, kind) in raw.items():
        step = 2.0 ** -{"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}[kind]
        one = parameters[name].copy()
        one.flat[-1] *= 1 + step  # the next number, or the one after it
        found.append(digest(model.with_parameters({name: one})))
        other = "float32" if kind == "float64" else "float64"
        found.append(digest(dataclasses.replace(model, stored={**stored, name: other})))
    found.append(
        digest(dataclasses.replace(model, config=dataclasses.replace(CONFIG, norm_eps=1e-6)))
    )
    found.append(
        digest(dataclasses.replace(model, config=dataclasses.replace(CONFIG, causal=False)))
    )
    swapped = dict(parameters)
    a, b = "blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    found.append(digest(dataclasses.replace(model, parameters=swapped)))
    assert len(set(found)) == len(found) == 2 * len(raw) + 4


# ------------------------------------------------------------------ what was done to them

ROW = {"rho": 0.6, "norm": 0.5, "restored": 1e-3, "joint": False}
PAST = {"method": "kfac", "weights": "a", "made_for": None, "became": "b", "forced": False,
        "layers": {"head": ROW}}  # fmt: skip


def test_edits_travel_with_the_weights(path: Path, tmp_path: Path) -> None:
    model = weights.load(path)
    assert model.edits == ()
    weights.save(dataclasses.replace(model, edits=(PAST, PAST)), tmp_path / "e.h5", {"seed": 3})
    back = weights.load(tmp_path / "e.h5")
    assert back.edits == (PAST, PAST)
    assert back.with_parameters({}).edits == (PAST, PAST)
    assert back.source["provenance"]["seed"] == 3
    weights.save(back, tmp_path / "again.h5")
    assert weights.load(tmp_path / "again.h5").edits == (PAST, PAST)


def test_the_rows_of_older_files_are_one_edit(path: Path, tmp_path: Path) -> None:
    row = {"method": "svd", "layer": "head", "rho": 0.7, "norm": 0.5, "kept": 3, "gap": None}
    weights.save(weights.load(path), tmp_path / "e.h5", {"edit": [row]})
    (one,) = weights.load(tmp_path / "e.h5").edits
    assert (one["method"], one["weights"], one["became"]) == ("svd", None, None)
    assert one["layers"] == {"head": {"rho": 0.7, "norm": 0.5, "restored": 0.0, "joint": False}}
    for other in (3, [], ["x"], {"a": 1}, [{"layer": 3}], [{"layer": "head"}]):
        weights.save(weights.load(path), tmp_path / "e.h5", {"edit": other})
        assert weights.load(tmp_path / "e.h5").edits == ()


@pytest.mark.parametrize(
    "wrong",
    [3, {}, [3], [{}], [{**PAST, "method": 3}], [{**PAST, "weights": 3}], [{**PAST, "layers": []}],
     [{**PAST, "layers": {"head": {}}}], [{**PAST, "layers": {"head": {**ROW, "rho": "much"}}}]],
)  # fmt: skip
def test_what_is_no_list_of_edits_is_refused(wrong: Any, path: Path, tmp_path: Path) -> None:
    weights.save(weights.load(path), tmp_path / "e.h5", {"edits": wrong})
    with pytest.raises(SchemaError, match="provenance 'edits' is no list of edits"):
        weights.load(tmp_path / "e.h5")
