"""files/gguf: the same model as from safetensors, and every key and tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="extra `gguf`")

from gguf_twins import (  # noqa: E402
    KEYS,
    TWINS,
    Twin,
    is_built,
    numbers,
    safetensors_of,
    tensors_in_gguf,
    without,
    write,
)

import refcurv as rc  # noqa: E402
from refcurv.files import store, weights  # noqa: E402
from refcurv.files.gguf import architectures  # noqa: E402
from refcurv.files.gguf.architectures import ARCHITECTURES  # noqa: E402
from refcurv.files.huggingface import conversion  # noqa: E402
from refcurv.law.checks import ConventionError, NonFiniteError, SchemaError  # noqa: E402

CORPUS = rc.Corpus(np.random.default_rng(1).integers(0, 11, (3, 12)).astype(np.int32))


def architecture(name: str) -> str:
    return name.partition("-")[0]


def twin_file(folder: Path, name: str, twin: Twin | None = None, **plain: Any) -> Path:
    twin = twin or TWINS[name]
    kind = architecture(name)
    of = tensors_in_gguf(kind, twin, numbers(twin.config))
    return write(folder / "twin.gguf", kind, twin.keys, of, plain)


SLOW = ("llama-old-keys", "qwen3", "gemma", "olmo2", "F16", "Q4_0", "Q5_0", "Q5_1")
"""The default suite has others of their kind."""


def some(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.mark.parametrize("name", some(TWINS))
def test_the_same_model_as_from_safetensors(tmp_path: Path, name: str) -> None:
    """Same configuration, same bits of every parameter, same logits."""
    twin = TWINS[name]
    if not is_built(twin):
        pytest.skip(f"{twin.config['model_type']} is not built yet")
    folder = safetensors_of(tmp_path / "hf", twin.config, numbers(twin.config))
    rc.convert(folder, tmp_path / "hf.h5")
    done = conversion(twin_file(tmp_path, name), tmp_path / "gguf.h5")
    theirs, ours = rc.load(tmp_path / "hf.h5"), rc.load(tmp_path / "gguf.h5")
    shift = theirs.config.norm_offset
    assert ours.config == replace(theirs.config, norm_offset=False)
    assert [m.name for m in done.mapped if m.name] == list(theirs.parameters)
    for one, x in theirs.parameters.items():
        is_gain = "norm." in one and one.endswith("weight")
        assert np.array_equal(ours.parameters[one], x + 1 if shift and is_gain else x), one
    assert set(ours.stored.values()) == {"float32"} and done.assumed
    assert np.array_equal(rc.logits(ours, CORPUS.tokens), rc.logits(theirs, CORPUS.tokens))
    if name == "llama":
        for a, b in zip(*(rc.collect(m, CORPUS, "**").values() for m in (ours, theirs)),
                        strict=True):  # fmt: skip
            assert np.array_equal(a.A, b.A) and np.array_equal(a.G, b.G)


def test_an_architecture_of_a_family_that_is_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConventionError, match=r"general.architecture is 'rwkv6', which is not"):
        rc.convert(write(tmp_path / "x.gguf", "rwkv6", KEYS, {}), tmp_path / "w.h5")
    assert {architecture(name) for name in TWINS} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", some(["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]))
def test_numbers_are_those_of_the_package(tmp_path: Path, kind: str) -> None:
    """Also where the tensor is cut: phi3 has q, k and v in one, gate and up in another."""
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    keys = {"embedding_length": 64, "feed_forward_length": 32, "rope.dimension_count": 16}
    twin = replace(TWINS["phi3"], config=TWINS["phi3"].config | sizes,
                   keys=TWINS["phi3"].keys | keys)  # fmt: skip
    of = tensors_in_gguf("phi3", twin, numbers(twin.config))
    quantised = gguf.GGMLQuantizationType[kind]
    packed = {n: (gguf.quantize(x, quantised), quantised) if x.ndim == 2 else x
              for n, x in of.items()}  # fmt: skip
    done = conversion(write(tmp_path / "x.gguf", "phi3", twin.keys, packed), tmp_path / "w.h5")
    model, header = rc.load(tmp_path / "w.h5"), store.open_file(tmp_path / "w.h5")
    for name, (data, which) in {n: x for n, x in packed.items() if isinstance(x, tuple)}.items():
        parts = [m.name for m in done.mapped if m.checkpoint_name == name]
        got = np.concatenate([model.parameters[str(part)] for part in parts])
        assert np.array_equal(got, gguf.dequantize(data, which)), name
        attributes = header.entries[weights.PARAMETERS + str(parts[0])].attributes
        assert attributes["gguf_type"] == kind
    assert header.provenance["gguf"]["dequantised"] == {"F32": 5, kind: len(packed) - 5}


def test_names_are_those_of_the_package(tmp_path: Path) -> None:
    """The twins' names come from the package's own map, and all of them are found."""
    done = conversion(twin_file(tmp_path, "gptneox"), tmp_path / "w.h5")
    names = {m.checkpoint_name for m in done.mapped}
    assert {"blk.1.attn_qkv.bias", "output.weight", "token_embd.weight"} <= names


# ------------------------------------------------------------------ heads


def test_an_output_matrix_that_is_the_embedding_is_a_tied_head(tmp_path: Path) -> None:
    of = tensors_in_gguf("llama", TWINS["llama"], numbers(TWINS["llama"].config))
    of["output.weight"] = of["token_embd.weight"].copy()
    done = conversion(write(tmp_path / "x.gguf", "llama", KEYS, of), tmp_path / "w.h5")
    assert rc.load(tmp_path / "w.h5").config.tied
    assert [m.checkpoint_name for m in done.mapped if m.name is None] == ["output.weight"]
    of["output.weight"][3, 2] += 1
    rc.convert(write(tmp_path / "y.gguf", "llama", KEYS, of), tmp_path / "y.h5")
    assert not rc.load(tmp_path / "y.h5").config.tied


# ------------------------------------------------------------------ keys

REFUSED = {
    "unknown": ({"my_key": 1}, "unknown keys that might change the mathematics: 'llama.my_key'"),
    "experts": ({"expert_count": 8}, "A mixture of experts is not built yet"),
    "attention factor": ({"rope.scaling.attn_factor": 1.2}, "attn_factor is not built"),
    "another scaling": (
        {"rope.scaling.type": "longrope2", "rope.scaling.factor": 2.0}, "rope_type is 'longrope2'"
    ),
    "per block": ({"attention.head_count_kv": [1, 2]}, "differs between blocks"),
    "other values": ({"attention.value_length": 8}, "key_length and value_length differ"),
    "partial rotation": ({"rope.dimension_count": 2}, "partial_rotary_factor is 0.5"),
    "clipped": ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv is 8.0"),
    "no width": ({"embedding_length": 0}, "must be a positive integer; got 0"),
    "a text": ({"embedding_length": "8"}, "must be a positive integer; got '8'"),
    "heads": ({"attention.head_count": 3}, "has shape|multiple"),
    "many blocks": ({"block_count": 99}, "block_count is 99, but there are only"),
    "few blocks": ({"block_count": 1}, "holds a tensor 'blk.1."),
    "tokens": ({"vocab_size": 12}, "vocab_size: 12, but token_embd.weight has 11 rows"),
    "width": ({"embedding_length": 16}, "has shape"),
    "a flag": ({"rope.freq_base": "x"}, "rope.freq_base is 'x'"),
    "no number": ({"attention.layer_norm_rms_epsilon": float("nan")}, "_epsilon is nan"),
    "beyond all": ({"rope.freq_base": float("inf")}, "rope.freq_base is inf"),
    "a scale": ({"logit_scale": 8.0}, "unknown keys that might change .*logit_scale"),
    "an old scale": ({"rope.scale_linear": 0.25}, "rope.scale_linear is 0.25"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_every_key_is_known_or_refused(tmp_path: Path, what: str) -> None:
    keys, message = REFUSED[what]
    twin = replace(TWINS["llama"], keys=KEYS | keys)
    of = tensors_in_gguf("llama", TWINS["llama"], numbers(twin.config))
    path = write(tmp_path / "x.gguf", "llama", twin.keys, of)
    with pytest.raises((ConventionError, SchemaError), match=message) as caught:
        rc.convert(path, tmp_path / "w.h5")
    assert "\n" not in str(caught.value) and not (tmp_path / "w.h5").exists()


def test_an_unknown_key_may_be_ignored_by_name(tmp_path: Path) -> None:
    path = twin_file(tmp_path, "llama", None, **{"llama.note": 3, "general.name": "x"})
    done = conversion(path, tmp_path / "w.h5", ["llama.note"])
    assert done.ignored_keys == ("llama.note",)
    for key, kind in (("llama.block_count", ConventionError), ("llama.nothing", SchemaError)):
        with pytest.raises(kind, match="ignored"):
            rc.convert(path, tmp_path / "w.h5", ["llama.note", key])


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    for key in ("block_count", "attention.layer_norm_rms_epsilon"):
        twin = replace(TWINS["llama"], keys=without(KEYS, key) | {"block_count": 2})
        keys = without(KEYS, key)
        of = tensors_in_gguf("llama", twin, numbers(twin.config))
        with pytest.raises(SchemaError, match=f"lacks the key 'llama.{key}'"):
            rc.convert(write(tmp_path / "x.gguf", "llama", keys, of), tmp_path / "w.h5")


def test_divisors_of_another_rule_are_refused(tmp_path: Path) -> None:
    twin = TWINS["llama-scaled"]
    right = twin.more["rope_freqs.weight"]
    wrong = {"rope_freqs.weight": right * np.array([1, 1, 1.0001, 1], np.float32)}
    with pytest.raises(ConventionError, match="are not those of Llama 3's rule"):
        rc.convert(twin_file(tmp_path, "llama-scaled", replace(twin, more=wrong)),
                   tmp_path / "w.h5")  # fmt: skip


ROTARY: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a factor": ({"rope.scaling.factor": 8.0}, []),
    "longrope": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 8.0}, []),
    "attention": ({"rope.scaling.attn_factor": 1.25}, []),
    "divisors": ({}, ["rope_freqs"]),
    "two lists": ({}, ["rope_factors_long", "rope_factors_short"]),
    "both": ({"rope.scaling.factor": 8.0}, ["rope_factors_long", "rope_factors_short"]),
}


@pytest.mark.parametrize("what", ROTARY)
def test_what_is_said_of_rotary_positions_is_read_or_refused(tmp_path: Path, what: str) -> None:
    """In every architecture it changes the configuration, or the file is refused."""
    keys, names = ROTARY[what]
    for name in ARCHITECTURES:
        twin = TWINS[name]
        width = twin.keys.get("rope.dimension_count", 4)
        more = {f"{one}.weight": np.full(width // 2, 1.5, np.float32) for one in names}
        other = replace(twin, keys=twin.keys | keys, more=twin.more | more)
        with suppress(ConventionError, SchemaError):
            rc.convert(twin_file(tmp_path, name, other), tmp_path / "w.h5")
            rc.convert(twin_file(tmp_path, name), tmp_path / "plain.h5")
            assert rc.load(tmp_path / "w.h5").config != rc.load(tmp_path / "plain.h5").config, name


def test_a_factor_of_no_kind_is_linear(tmp_path: Path) -> None:
    """As llama.cpp reads it; it is said to be assumed."""
    found = []
    for kind in ({}, {"rope.scaling.type": "linear"}):
        twin = replace(TWINS["llama"], keys=KEYS | {"rope.scaling.factor": 4.0} | kind)
        done = conversion(twin_file(tmp_path, "llama", twin), tmp_path / "w.h5")
        found.append(rc.load(tmp_path / "w.h5").config)
        assert ('rope.scaling.type = "linear"' in done.assumed) == (not kind)
    assert found[0] == found[1] and found[0].rope_scaling is not None


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "one more": ({"blk.0.attn_sinks.weight": np.ones(2, np.float32)}, "'blk.0.attn_sinks.weight'"),
    "experts": ({"blk.0.ffn_gate_exps.weight": np.ones((2, 6, 8), np.float32)}, "mixture of exp"),
    "shape": (
        {"blk.0.ffn_up.weight": np.ones((7, 8), np.float32)},
        r"shape \(7, 8\); the metadata",
    ),
    "integers": ({"blk.0.ffn_up.weight": np.ones((6, 8), np.int32)}, "type I32, which the package"),
    "missing": ({"blk.0.ffn_up.weight": None}, "lacks the tensor 'blk.0.ffn_up.weight'"),
    "no table": ({"token_embd.weight": None}, "has no matrix 'token_embd.weight'"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_tensors_that_contradict_the_metadata(tmp_path: Path, what: str) -> None:
    change, message = STRANGE[what]
    of = tensors_in_gguf("llama", TWINS["llama"], numbers(TWINS["llama"].config)) | change
    path = write(tmp_path / "x.gguf", "llama", KEYS, {n: x for n, x in of.items() if x is not None})
    with pytest.raises((ConventionError, SchemaError), match=message):
        rc.convert(path, tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    of = tensors_in_gguf("llama", TWINS["llama"], numbers(TWINS["llama"].config))
    of["blk.0.ffn_up.weight"][1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"tensor 'blk.0.ffn_up.weight'"):
        rc.convert(write(tmp_path / "x.gguf", "llama", KEYS, of), tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads", "head", "scalar"),
    [
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
        ("gemma3", 48, 3840, 16, 256, 256),
    ],
)
def test_what_no_key_says_of_gemma_is_as_published(
    architecture: str, layers: int, width: int, heads: int, head: int, scalar: int
) -> None:
    """The configurations of the 27B, and of the 9B and 12B. No key has the scale of scores."""
    config = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
              "head_dim": head}  # fmt: skip
    found = SimpleNamespace(get=lambda key: None)
    said, guessed = getattr(architectures, f"_{architecture}")(found, config)
    assert guessed["query_pre_attn_scalar"] == scalar
    if architecture == "gemma2":
        assert guessed["attn_logit_softcapping"] == 50.0
        assert guessed["final_logit_softcapping"] == 30.0
        assert guessed["sliding_window"] == 4096
        assert guessed["layer_types"] == ["sliding_attention", "full_attention"] * (layers // 2)
    else:
        assert said["layer_types"] == ["full_attention"] * layers
        assert guessed["rope_local_base_freq"] == 10_000.0
