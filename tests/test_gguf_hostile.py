"""files/gguf: whatever a key holds, the file is read or refused in one sentence, never a bug."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import few

gguf = pytest.importorskip("gguf", reason="extra `gguf`")

from gguf_twins import (  # noqa: E402
    KEYS,
    TWINS,
    T,
    is_built,
    numbers,
    tensors_in_gguf,
    without,
    write,
)

import refcurv as rc  # noqa: E402
from refcurv.files.gguf.architectures import _HANDLED, ARCHITECTURES, describe  # noqa: E402
from refcurv.files.gguf.reading import open_gguf  # noqa: E402
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError  # noqa: E402

Type = gguf.GGUFValueType
ODD: tuple[tuple[Any, Any], ...] = (
    *((x, Type.INT64) for x in (0, -1, 1, 3)), (2**63, Type.UINT64),
    (True, Type.BOOL), (False, Type.BOOL),
    *((x, Type.STRING) for x in ("", "x", "2", "adapter")),
    *((x, Type.FLOAT32) for x in (math.nan, math.inf, -1.0, 0.0, 1.0, 1e-45)),
    (1e308, Type.FLOAT64),
    *((x, Type.ARRAY) for x in ([1, 2], [3, 3], [1.5, 1.5], ["a", "a"], [True, False])),
    ([[1, 2], [3]], Type.ARRAY),
)  # fmt: skip
"""Values of every type that a key may have."""

LONG = {
    "rope_factors_long.weight": np.array([1.5], np.float32),
    "rope_factors_short.weight": np.array([1.25], np.float32),
}
USUAL = math.sqrt(1 + math.log(T / 16) / math.log(16))
PHI = TWINS["phi3"].keys | {"rope.scaling.original_context_length": 16}


def tensors(name: str) -> dict[str, np.ndarray]:
    twin = TWINS[name]
    return tensors_in_gguf(name.partition("-")[0], twin, numbers(twin.config))


def described(path: Path, name: str, keys: Mapping[str, Any], more: Any = None) -> dict[str, Any]:
    """The config.json of a twin whose metadata have other keys, and more tensors."""
    kind = name.partition("-")[0]
    return describe(open_gguf(write(path, kind, keys, tensors(name) | (more or {})))).config


def refused(path: Path, name: str, keys: Mapping[str, Any], says: str, more: Any = None) -> None:
    write(path, name.partition("-")[0], keys, tensors(name) | (more or {}))
    with pytest.raises((ConventionError, SchemaError), match=says) as caught:
        rc.convert(path, path.with_name("w.h5"))
    assert "\n" not in str(caught.value) and not path.with_name("w.h5").exists()


# ------------------------------------------------------------------ any value of any key

ABOUT = ("general.type", "general.alignment", "split.count", "split.no", "tokenizer.ggml.tokens")


def places() -> Iterator[tuple[str, str]]:
    """(twin, key), each key that is read or about the file."""
    for name, twin in TWINS.items():
        kind = name.partition("-")[0]
        if is_built(twin) and kind in ARCHITECTURES:
            own = ARCHITECTURES[kind]
            keys = dict.fromkeys((*own.keys, *own.known, *_HANDLED))
            yield from ((name, key) for key in (*(f"{kind}.{key}" for key in keys), *ABOUT))


def read_or_refused(folder: Path, name: str, key: str, odd: tuple[Any, Any]) -> None:
    kind = name.partition("-")[0]
    keys = without(TWINS[name].keys, key.removeprefix(f"{kind}."))
    more = LONG if name == "phi3" else {}
    path = write(folder / "x.gguf", kind, keys, tensors(name) | more, {key: odd})
    try:
        rc.convert(path, folder / "w.h5")
    except RefcurvError as error:
        assert "\n" not in str(error) and error.status == 2
        assert not (folder / "w.h5").exists()
    (folder / "w.h5").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@few(20)
@given(at=st.sampled_from([*places()]), odd=st.sampled_from(ODD))
@example(at=("llama", "general.type"), odd=([1, 2], Type.ARRAY))
@example(at=("llama", "split.count"), odd=("2", Type.STRING))
@example(at=("llama", "split.count"), odd=(-1.0, Type.FLOAT32))
@example(at=("phi3", "phi3.rope.scaling.attn_factor"), odd=([1.5, 1.5], Type.ARRAY))
def test_any_value_of_any_key_is_read_or_refused(
    folder: Path, at: tuple[str, str], odd: tuple[Any, Any]
) -> None:
    read_or_refused(folder, *at, odd)


@pytest.mark.slow
def test_every_key_of_every_architecture_is_read_or_refused(folder: Path) -> None:
    """Of each key every third value, and so each value at every third key."""
    for n, at in enumerate(places()):
        for odd in ODD[n % 3 :: 3]:
            read_or_refused(folder, *at, odd)


@pytest.mark.parametrize("bytes_", [8, 32, 64])
def test_a_file_that_says_its_alignment_is_read(tmp_path: Path, bytes_: int) -> None:
    """The package has it as a number without a sign, in which what was negated did not fit."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(bytes_)
    for key, value in KEYS.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"llama.{key}", value)
    for name, x in tensors("llama").items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rc.convert(tmp_path / "x.gguf", tmp_path / "w.h5")
    rc.convert(write(tmp_path / "y.gguf", "llama", KEYS, tensors("llama")), tmp_path / "y.h5")
    a, b = (rc.load(tmp_path / f"{one}.h5").parameters for one in "wy")
    assert all(np.array_equal(a[name], b[name]) for name in b)


def test_numbers_of_a_list_are_one_piece_and_pieces_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 20 MB could take 3 GB: an object for each number of a list."""
    monkeypatch.setattr("refcurv.files.gguf.reading._MOST_PARTS", 500)
    held = {"x": np.ones(2, np.float32)}
    for numbers_ in ([*range(1000)], [0.5, -2.25] * 500, [True, False] * 500):
        found = open_gguf(write(tmp_path / "x.gguf", "llama", {}, held, {"list": numbers_}))
        assert found.get("list") == numbers_
    for many in (["a"] * 1000, [[1, 2]] * 1000):
        path = write(tmp_path / "x.gguf", "llama", {}, held, {"list": many})
        with pytest.raises(SchemaError, match="has more than 500 pieces"):
            open_gguf(path)


# ------------------------------------------------------------------ what contradicts


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp reads it; it was left out in silence."""
    path, factor = tmp_path / "x.gguf", {"rope.scaling.factor": 4.0}
    want = {"rope_type": "linear", "factor": 4.0}
    assert described(path, "llama", KEYS | factor)["rope_scaling"] == want
    none = KEYS | factor | {"rope.scaling.type": "none"}
    assert "rope_scaling" not in described(path, "llama", none)
    assert "rope_scaling" not in described(path, "llama", KEYS | {"rope.scaling.factor": 1.0})


def test_divisors_that_no_key_reads_are_refused(tmp_path: Path) -> None:
    """llama.cpp would divide by them; they were left out in silence."""
    path = tmp_path / "x.gguf"
    refused(path, "llama", KEYS, "holds a tensor 'rope_factors_long.weight'", LONG)
    refused(path, "llama", KEYS | {"rope.scaling.type": "longrope"}, "of phi3 alone", LONG)
    refused(path, "phi3", PHI | {"rope.scaling.type": "longrope"}, "of phi3 alone")


def test_divisors_are_one_for_each_pair(tmp_path: Path) -> None:
    """Those of wide heads follow from another rule than those of narrow ones."""
    path, ones = tmp_path / "x.gguf", np.ones(3, np.float32)
    for shape in ((3,), (1, 2)):
        more = {"rope_freqs.weight": np.ones(shape, np.float32)}
        refused(path, "llama", KEYS, "rope_freqs.weight has shape .* of a head 2 pairs turn", more)
    assert described(path, "llama", KEYS, {"rope_freqs.weight": ones[:2]})["rope_scaling"]
    for both in ({"rope_factors_long.weight": ones}, dict.fromkeys(LONG, ones)):
        refused(path, "phi3", PHI, "short and long", LONG | both)


def test_every_key_of_a_longrope_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for more in ({}, {"rope.scaling.type": "longrope"}, {"rope.scaling.attn_factor": USUAL}):
        found = described(path, "phi3", PHI | more, LONG)["rope_scaling"]
        want = {"rope_type": "longrope", "long_factor": [1.5], "short_factor": [1.25]}
        assert found == want
    refused(path, "phi3", PHI | {"rope.scaling.attn_factor": 1.5}, "longrope has", LONG)
    refused(path, "phi3", PHI | {"rope.scaling.attn_factor": 1.5}, "attn_factor is not built")
    refused(path, "phi3", PHI | {"rope.scaling.type": "yarn"}, "beside rope.scaling.type", LONG)


@pytest.mark.parametrize("pattern", [4, True, [1, 0], ["x", "y"], [True]])
def test_a_pattern_of_windows_is_of_flags(tmp_path: Path, pattern: Any) -> None:
    """A number was left out in silence, and any text counted as true."""
    keys = TWINS["olmo2-of-3"].keys | {"attention.sliding_window_pattern": pattern}
    says = "layer_types" if pattern == [True] else "true or false for each block"
    refused(tmp_path / "x.gguf", "olmo2-of-3", keys, says)


def test_a_base_of_zero_is_no_base(tmp_path: Path) -> None:
    keys = TWINS["gemma3"].keys | {"rope.freq_base_swa": 0.0}
    refused(tmp_path / "x.gguf", "gemma3", keys, "must be a finite number above 0; got 0.0")


def part(folder: Path, k: int, keys: Mapping[str, Any], **split: Any) -> Path:
    of = [*tensors("llama").items()]
    plain = {"split.no": k, "split.count": 2, "split.tensors.count": len(of)} | split
    return write(folder / f"x-0000{k + 1}-of-00002.gguf", "llama", keys, dict(of[k::2]), plain)


def test_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    one, two = part(tmp_path, 0, KEYS), part(tmp_path, 1, {"block_count": 2})
    open_gguf(one)
    stray = two.rename(tmp_path / "x-00003-of-00002.gguf")
    part(tmp_path, 1, {})
    with pytest.raises(SchemaError, match="is not named like one"):
        open_gguf(stray)
    for wrong in ({"block_count": 3}, {"my_key": 1}):
        part(tmp_path, 1, wrong)
        with pytest.raises(SchemaError, match=r"and in the first part (2|None)\. Do the parts"):
            open_gguf(one)


def test_a_count_of_no_parts_is_one_file(tmp_path: Path) -> None:
    """As llama.cpp reads it."""
    for count in (0, 1):
        plain = {"split.count": count}
        path = write(tmp_path / "x.gguf", "llama", KEYS, tensors("llama"), plain)
        assert len(open_gguf(path).files) == 1
