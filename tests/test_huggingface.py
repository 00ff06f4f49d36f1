"""files/huggingface.py and safetensors.py: checkpoints in and out, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refcurv.files import huggingface, safetensors, store, weights
from refcurv.files.bfloat16 import to_bfloat16
from refcurv.files.huggingface import Mapped, convert, export
from refcurv.files.weights import config_from_json, config_to_json
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError, StorageError
from refcurv.model.config import ModelConfig, NormPlace, QKNorm
from refcurv.model.weights import Model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 7,
    "hidden_size": 4,
    "intermediate_size": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "max_position_embeddings": 2048,
    "transformers_version": "5.23.0",
    "dtype": "float32",
}
LLAMA_SHAPES = {
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (12, 4),
    "model.layers.0.self_attn.k_proj.weight": (6, 4),
    "model.layers.0.self_attn.v_proj.weight": (6, 4),
    "model.layers.0.self_attn.o_proj.weight": (4, 12),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    "model.layers.0.mlp.gate_proj.weight": (3, 4),
    "model.layers.0.mlp.up_proj.weight": (3, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 3),
    "model.norm.weight": (4,),
    "lm_head.weight": (7, 4),
}
OLMO2 = {**{k: v for k, v in LLAMA.items() if k != "mlp_bias"}, "model_type": "olmo2"}
OLMO2_SHAPES = {
    **{n: s for n, s in LLAMA_SHAPES.items() if "input_layernorm" not in n},
    "model.layers.0.post_feedforward_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_norm.weight": (12,),
    "model.layers.0.self_attn.k_norm.weight": (6,),
}
SHAPES = {"llama": LLAMA_SHAPES, "olmo2": OLMO2_SHAPES}
CONFIGS = {"llama": LLAMA, "olmo2": OLMO2}

INDEX = "model.safetensors.index.json"

Tensors = dict[str, tuple[np.ndarray, str]]


def tensors(family: str = "llama", kinds: tuple[str, ...] = ("float32",)) -> Tensors:
    rng = np.random.default_rng(3)
    found = {}
    for i, (name, shape) in enumerate(SHAPES[family].items()):
        stored, values = kinds[i % len(kinds)], rng.standard_normal(shape)
        raw = to_bfloat16(values) if stored == "bfloat16" else values.astype(stored)
        found[name] = (raw, stored)
    return found


def write_shard(path: Path, of: Mapping[str, tuple[np.ndarray, str]]) -> None:
    path.unlink(missing_ok=True)
    rows = [(name, stored, raw.shape) for name, (raw, stored) in of.items()]
    safetensors.write_file(path, rows, lambda name: of[name][0])


def checkpoint(folder: Path, config: Mapping[str, Any], of: Tensors, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_shard(folder / "model.safetensors", of)
        return folder
    names = [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    shard_of = {name: names[i % shards] for i, name in enumerate(of)}
    for shard in names:
        write_shard(folder / shard, {n: v for n, v in of.items() if shard_of[n] == shard})
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "hf", LLAMA, tensors())


def datasets(path: Path) -> dict[str, tuple[Any, bytes]]:
    header = store.open_file(path)
    return {n: (info, store.read(header, n).tobytes()) for n, info in header.entries.items()}


MIXED = ("bfloat16", "float32", "float16", "float64")


# ------------------------------------------------------------------ what is right


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kinds", [("float32",), ("bfloat16",), MIXED], ids="-".join)
def test_round_trip(tmp_path: Path, family: str, shards: int, kinds: tuple[str, ...]) -> None:
    of = tensors(family, kinds)
    folder = checkpoint(tmp_path / "hf", CONFIGS[family], of, shards)
    mapped = convert(folder, tmp_path / "w.h5")
    assert sorted(m.checkpoint_name for m in mapped) == sorted(of)
    model = weights.load(tmp_path / "w.h5")
    for row in mapped:
        raw, stored = of[row.checkpoint_name]
        assert (row.shape, row.dtype) == (raw.shape, stored) and row.name is not None
        key = "parameters." + row.name
        info, data = datasets(tmp_path / "w.h5")[key]
        assert data == raw.tobytes() and info.stored == stored == model.stored[row.name]
        assert info.attributes["checkpoint_name"] == row.checkpoint_name

    export(tmp_path / "w.h5", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (folder / "config.json").read_bytes()
    convert(tmp_path / "back", tmp_path / "w2.h5")
    assert datasets(tmp_path / "w2.h5") == datasets(tmp_path / "w.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "w.h5", "w2.h5"]


def test_names_and_configuration_by_hand(folder: Path, tmp_path: Path) -> None:
    mapped = {m.checkpoint_name: m.name for m in convert(folder, tmp_path / "w.h5")}
    at = "model.layers.0."
    assert mapped == {
        "model.embed_tokens.weight": "embed.weight",
        at + "input_layernorm.weight": "blocks.0.attn_norm.weight",
        at + "self_attn.q_proj.weight": "blocks.0.attn.q.weight",
        at + "self_attn.k_proj.weight": "blocks.0.attn.k.weight",
        at + "self_attn.v_proj.weight": "blocks.0.attn.v.weight",
        at + "self_attn.o_proj.weight": "blocks.0.attn.o.weight",
        at + "post_attention_layernorm.weight": "blocks.0.mlp_norm.weight",
        at + "mlp.gate_proj.weight": "blocks.0.mlp.gate.weight",
        at + "mlp.up_proj.weight": "blocks.0.mlp.up.weight",
        at + "mlp.down_proj.weight": "blocks.0.mlp.down.weight",
        "model.norm.weight": "final_norm.weight",
        "lm_head.weight": "head.weight",
    }
    assert weights.load(tmp_path / "w.h5").config == ModelConfig(
        vocabulary=7, width=4, layers=1, heads=2, kv_heads=1, head_width=6, mlp_width=3,
        norm_place="pre", qk_norm="none", norm_eps=1e-3, rope_theta=500.0, tied=False,
    )  # fmt: skip
    made = store.open_file(tmp_path / "w.h5").provenance
    assert made["checkpoint_config"] == (folder / "config.json").read_text()
    assert made["inputs"] == {
        name: store.file_sha256(folder / name) for name in ("config.json", "model.safetensors")
    }


def test_olmo2_norms_by_hand(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", OLMO2, tensors("olmo2"))
    mapped = {m.checkpoint_name: m.name for m in convert(folder, tmp_path / "w.h5")}
    at = "model.layers.0."
    assert mapped[at + "post_attention_layernorm.weight"] == "blocks.0.attn_norm.weight"
    assert mapped[at + "post_feedforward_layernorm.weight"] == "blocks.0.mlp_norm.weight"
    assert mapped[at + "self_attn.q_norm.weight"] == "blocks.0.attn.q_norm.weight"
    config = weights.load(tmp_path / "w.h5").config
    assert (config.norm_place, config.qk_norm) == (NormPlace.POST, QKNorm.FULL)


def test_the_safetensors_package_agrees(folder: Path, tmp_path: Path) -> None:
    """What it writes we read, and what we write it reads, in every dtype that it hands NumPy."""
    package = pytest.importorskip("safetensors.numpy")
    of = {name: raw for name, (raw, _) in tensors(kinds=("float16", "float32", "float64")).items()}
    package.save_file(of, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "w.h5")
    export(tmp_path / "w.h5", tmp_path / "back")
    back = package.load_file(tmp_path / "back/model.safetensors")
    assert set(back) == set(of)
    for name, array in of.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes()


OLD = {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "head_dim", "dtype")}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_theta": (OLD | {"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
    "no rope_theta": (OLD, {"rope_theta": 1e4}),
    "both, agreeing": (LLAMA | {"rope_theta": 500}, {"rope_theta": 500.0}),
    "old default type": (
        OLD | {"rope_theta": 9.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 9.0},
    ),
    "no head_dim": (OLD, {"head_width": 2}),
    "null head_dim": (LLAMA | {"head_dim": None}, {"head_width": 2}),
    "no kv heads": ({k: v for k, v in LLAMA.items() if "key_value" not in k}, {"kv_heads": 2}),
    "untied by default": (
        {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"},
        {"tied": False},
    ),
    "irrelevant keys": (LLAMA | {"use_cache": True, "pad_token_id": 3, "torch_dtype": "f"}, {}),
    "no dropout in a forward": (LLAMA | {"attention_dropout": 0.1, "hidden_dropout": 0.2}, {}),
    "two blocks, one read": (
        OLD
        | {
            "rope_theta": 9.0,
            "rope_scaling": {"type": "default"},
            "rope_parameters": {"rope_theta": 9, "rope_type": "default", "factor": None},
        },
        {"rope_theta": 9.0},
    ),
    "biases": (LLAMA | {"attention_bias": True}, {"biases": ("q", "k", "v", "o")}),
    "activation": (LLAMA | {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
}


@pytest.mark.parametrize("name", SAME)
def test_configurations_old_and_new(name: str) -> None:
    config, wanted = SAME[name]
    _, found = huggingface.read_config("x", json.dumps(config))
    plain = {"head_width": 6, "kv_heads": 1, "rope_theta": 500.0, "norm_eps": 1e-3}
    if "head_dim" not in config:
        plain |= {"head_width": 2, "rope_theta": 1e4}
    for key, value in (plain | wanted).items():
        assert getattr(found, key) == value


def test_tied_heads(tmp_path: Path) -> None:
    of = tensors()
    head = of.pop("lm_head.weight")
    folder = checkpoint(tmp_path / "hf", LLAMA | {"tie_word_embeddings": True}, of)
    mapped = convert(folder, tmp_path / "w.h5")
    assert len(mapped) == 11 and weights.load(tmp_path / "w.h5").config.tied

    of["lm_head.weight"] = of["model.embed_tokens.weight"]
    of["model.layers.0.self_attn.rotary_emb.inv_freq"] = (np.ones(3, np.float32), "float32")
    write_shard(folder / "model.safetensors", of)
    mapped = convert(folder, tmp_path / "w2.h5")
    assert {m for m in mapped if m.name is None} == {
        Mapped("lm_head.weight", None, (7, 4), "float32"),
        Mapped("model.layers.0.self_attn.rotary_emb.inv_freq", None, (3,), "float32"),
    }
    assert datasets(tmp_path / "w.h5") == datasets(tmp_path / "w2.h5")

    of["lm_head.weight"] = head
    write_shard(folder / "model.safetensors", of)
    with pytest.raises(ConventionError, match=r"'lm_head\.weight' differs from 'model\.embed"):
        convert(folder, tmp_path / "w3.h5")
    assert not (tmp_path / "w3.h5").exists()


def in_the_hub_cache(folder: Path) -> Path:
    """The same files as the Hub's cache keeps them: a snapshot of links to blobs."""
    hub = folder.parent / "models--x--y"
    snapshot = hub / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(hub / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def in_a_local_dir(folder: Path) -> Path:
    """As `local_dir` of earlier releases: links to the cache, elsewhere, by absolute paths."""
    blobs = in_the_hub_cache(folder).parents[1] / "blobs"
    for path in sorted(blobs.iterdir()):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("lay_out", [in_the_hub_cache, in_a_local_dir])
def test_links_are_followed_to_regular_files(tmp_path: Path, lay_out: Any, shards: int) -> None:
    folder = checkpoint(tmp_path / "hf", LLAMA, tensors(), shards)
    convert(folder, tmp_path / "plain.h5")
    convert(lay_out(folder), tmp_path / "linked.h5")
    assert datasets(tmp_path / "plain.h5") == datasets(tmp_path / "linked.h5")


LINKS = {
    "folder": (lambda path: path.symlink_to(path.parent), "is a link to .*, which is a folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "to '/dev/zero', which is no regular"),
    "pipe": (os.mkfifo, "is no regular file"),
    "loop": (lambda path: path.symlink_to(path.name), "is a link .* which leads in a circle"),
    "gone": (lambda path: path.symlink_to("../blobs/ab"), "where there is nothing. Download it"),
    "folder itself": (lambda path: path.mkdir(), "is a folder"),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX])
def test_what_ends_in_no_regular_file_is_refused(folder: Path, name: str, file: str) -> None:
    """At once: a pipe is never opened, and an index that leads nowhere is not passed over."""
    make, fragment = LINKS[name]
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    with pytest.raises(SchemaError, match=fragment) as caught:
        convert(folder, folder.parent / "w.h5")
    assert "\n" not in str(caught.value) and str(folder / file) in str(caught.value)


# ------------------------------------------------------------------ what is wrong

WRONG_CONFIGS: dict[str, tuple[dict[str, Any], type[RefcurvError], str]] = {
    "model_type": ({"model_type": "bert"}, ConventionError, "'bert' .*not built yet; known are o"),
    "no model_type": ({"model_type": None}, ConventionError, "'model_type' is missing .Llama"),
    "list model_type": ({"model_type": ["llama"]}, ConventionError, "model_type is"),
    "bias is text": ({"attention_bias": "no"}, SchemaError, "attention_bias must be true or false"),
    "bias is 1": ({"mlp_bias": 1}, SchemaError, "mlp_bias must be true or false; got 1"),
    "hidden_act": ({"hidden_act": "mish"}, ConventionError, "hidden_act is 'mish'; .* 'silu'"),
    "act is a list": ({"hidden_act": ["silu"]}, ConventionError, "hidden_act is"),
    "pretraining_tp": ({"pretraining_tp": 0}, SchemaError, "pretraining_tp must be a positive"),
    "true for 1": ({"pretraining_tp": True}, SchemaError, "pretraining_tp must be a .*got True"),
    "quantised": ({"quantization_config": {"bits": 4}}, ConventionError, "is of an unknown method"),
    "window's echo": ({"sliding_window_size": 9}, ConventionError, "size is 9 and sliding_window"),
    "window": ({"sliding_window": 4096}, ConventionError, "sliding_window is 4096"),
    "unknown key": ({"logit_scale": 0.1}, ConventionError, "the key 'logit_scale' is unknown"),
    "own code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}},
        ConventionError, "auto_map names code of its own, 'modeling_mine.MineForCausalLM'",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, ConventionError, "partial_rotary_factor is 0.5"),
    "two thetas": ({"rope_theta": 1e4}, ConventionError, "given as 10000.0 and as 500.0; which"),
    "rope is a list": ({"rope_parameters": [1]}, SchemaError, "rope_parameters must be an object"),
    "no eps": ({"rms_norm_eps": None}, SchemaError, "lacks the key 'rms_norm_eps'"),
    "eps is text": ({"rms_norm_eps": "1e-6"}, SchemaError, "norm_eps must be a number"),
    "eps < 0": ({"rms_norm_eps": -1e-6}, SchemaError, "norm_eps must be finite and >= 0"),
    "no width": ({"hidden_size": None}, SchemaError, "lacks the key 'hidden_size'"),
    "text width": ({"hidden_size": "4"}, SchemaError, "hidden_size must be a positive"),
    "width is a list": ({"hidden_size": [4]}, SchemaError, "hidden_size must be a positive"),
    "width is true": ({"hidden_size": True}, SchemaError, "hidden_size must be a positive"),
    "width < 0": ({"hidden_size": -4}, SchemaError, "hidden_size must be a positive"),
    "huge width": ({"hidden_size": 10**30}, SchemaError, "hidden_size must be a positive"),
    "float layers": ({"num_hidden_layers": 1.0}, SchemaError, "layers must be a positive integer"),
    "odd heads": ({"hidden_size": 5, "head_dim": None}, SchemaError, "5 is no multiple of .* 2"),
    "no heads": ({"num_attention_heads": 0}, SchemaError, "heads must be a positive integer"),
    "kv heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, SchemaError, "multiple"),
    "tied": ({"tie_word_embeddings": "yes"}, SchemaError, "tied must be true or false"),
    "endless theta": ({"rope_parameters": {"rope_theta": 10**400}}, SchemaError, "must be a fin"),
    "many layers": ({"num_hidden_layers": 10**12}, SchemaError, "positive integer up to 10000"),
    "more layers": ({"num_hidden_layers": 10**4}, SchemaError, "but there are only 12 tensors"),
}  # fmt: skip


def rope_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


CONTEXT = {"original_max_position_embeddings": 8192}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT}
WRONG_ROPES: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": (rope_of("dynamic"), "lacks the key 'factor'"),
    "longrope": (rope_of("longrope", short_factor=[1.0], **CONTEXT), "lacks the key 'long_factor'"),
    "su": ({"rope_scaling": {"type": "su"}}, "'su', which is not built yet"),
    "mrope": ({"rope_scaling": {"type": "mrope"}}, "'mrope', which is not built yet"),
    "mrope, saved anew": (
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 1]}},
        "'mrope', which is not built yet",
    ),
    "no kind at all": (rope_of("spiral"), "rope_type is 'spiral'; known are default, linear"),
    "list": ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type is \\['yarn'\\]"),
    "factor of none": (rope_of("default", factor=2.0), "factor is 2.0, which refcurv does"),
    "no factor": (rope_of("linear"), "lacks the key 'factor'"),
    "text factor": (rope_of("linear", factor="2"), "factor must be a finite .*; got '2'"),
    "true factor": (rope_of("linear", factor=True), "factor must be a finite .*; got True"),
    "factor 0": (rope_of("linear", factor=0.0), "factor must be a finite number above 0; got 0.0"),
    "no low": (rope_of("llama3", factor=8.0, **CONTEXT), "lacks the key 'low_freq_factor'"),
    "low over high": (rope_of("llama3", **LLAMA3_ROPE | {"low_freq_factor": 5}), "slow must lie"),
    "text context": (rope_of("yarn", factor=2, original_max_position_embeddings="8"), "positive"),
    "mscale": (rope_of("yarn", factor=2.0, **CONTEXT, mscale=1.0), "mscale is 1.0, which refcurv"),
    "truncate": (rope_of("yarn", factor=2.0, **CONTEXT, truncate=1), "truncate must be true or"),
    "one of two": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is given"),
    "types": ({"rope_parameters": {"type": "linear", "rope_type": "yarn"}}, "as 'linear' and"),
    "partial": (rope_of("default", partial_rotary_factor=0.5), "below 1 is not of this family"),
    "unread": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 9.0}},
        "rope_theta is 9.0 in rope_parameters alone, which transformers does not read where",
    ),
    "unread kind": (
        rope_of("linear", factor=2.0) | {"rope_scaling": {"rope_theta": 500.0}},
        "rope_type is 'linear' in rope_parameters alone, .*: move all of one block into the other",
    ),
    "unread factor": (
        rope_of("yarn", factor=2.0, attention_factor=1.5, **CONTEXT)
        | {"rope_scaling": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0,
                            "attention_factor": None, **CONTEXT}},
        "attention_factor is 1.5 in rope_parameters alone",
    ),
    "over 1": (rope_of("default", partial_rotary_factor=1.5), "must be at most 1; got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ROPES)
def test_rotary_positions_that_are_refused(name: str) -> None:
    changed, fragment = WRONG_ROPES[name]
    with pytest.raises(RefcurvError, match=fragment) as caught:
        huggingface.read_config("x", json.dumps(LLAMA | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_config_that_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    changed, error, fragment = WRONG_CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(LLAMA | changed))
    with pytest.raises(error, match=fragment) as caught:
        convert(folder, tmp_path / "w.h5")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (tmp_path / "w.h5").exists()


NORM = "model.norm.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
NEXT_UP = "model.layers.1.mlp.up_proj.weight"


def less(part: str) -> Any:
    return lambda of: {name: value for name, value in of.items() if part not in name}


def more(name: str) -> Any:
    return lambda of: of | {name: of[NORM]}


WRONG_TENSORS = {
    "missing": (less("up_proj"), "lacks the tensor 'model.layers.0.mlp.up_proj.weight'"),
    "head missing": (less("lm_head"), "Is tie_word_embeddings missing"),
    "bias": (more(Q_BIAS), "q_proj.bias' that a llama of this config.json has not"),
    "too many layers": (more(NEXT_UP), "layers.1.mlp.up_proj.weight' that a llama of this"),
    "shape": (more("lm_head.weight"), r"shape \(4,\); config.json asks for \(7, 4\)"),
    "partitioned": (
        lambda of: of | {"model.norm.weight": (np.zeros(0, np.float32), "float32")},
        r"has shape \(0,\); config.json asks for \(4,\)\. It is empty: a model that DeepSpeed's",
    ),
    "half a prefix": (
        lambda of: {name.replace("model.n", "n"): value for name, value in of.items()},
        "lacks the tensor 'model.norm.weight'",
    ),
    "base model": (
        lambda of: {n.removeprefix("model."): v for n, v in less("lm_head")(of).items()},
        "lacks the tensor 'lm_head.weight' .*the base model saved, an encoder without its head",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    change, fragment = WRONG_TENSORS[name]
    write_shard(folder / "model.safetensors", change(tensors()))
    with pytest.raises(SchemaError, match=fragment) as caught:
        convert(folder, tmp_path / "w.h5")
    assert "\n" not in str(caught.value) and not (tmp_path / "w.h5").exists()


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit(**changed: Any) -> Any:
    return lambda header, data: (header | {NORM: header[NORM] | changed}, data)


WRONG_BYTES = {
    "cut": (lambda h, d: (h, d[:-1]), "has .* bytes, its header describes"),
    "appended": (lambda h, d: (h, d + b"x"), "has .* bytes, its header describes"),
    "not JSON": (lambda h, d: (b"{", d), "the header of .* is not valid JSON"),
    "a list": (lambda h, d: (b"[]", d), "must be a JSON object"),
    "twice": (lambda h, d: (b'{"a": 1, "a": 2}', d), "a key occurs twice"),
    "no offsets": (lambda h, d: (h | {NORM: {"dtype": "F32"}}, d), "must have just dtype, shape"),
    "extra key": (edit(strides=[1]), "must have just dtype, shape"),
    "entry is 3": (lambda h, d: (h | {NORM: 3}, d), "must have just dtype, shape"),
    "dtype": (edit(dtype="Q4"), "is of type 'Q4'; known are F64"),
    "integers": (edit(dtype="I32"), "norm.weight' is of type 'I32'; parameters are .*quantised"),
    "dtype is a list": (edit(dtype=["F32"]), "is of type"),
    "wider": (edit(dtype="F64"), r"shape \[4\] needs 32 bytes; its offsets .* hold 16"),
    "negative": (edit(shape=[-4]), r"has shape \[-4\]"),
    "true": (edit(shape=[True]), r"has shape \[True\]"),
    "float": (edit(shape=[4.0]), r"has shape \[4\.0\]"),
    "huge": (edit(shape=[2**62, 2**62]), "needs 85070591730234615865843651857942052864 bytes"),
    "many axes": (edit(shape=[1] * 9 + [4]), "has shape"),
    "three offsets": (edit(data_offsets=[0, 1, 2]), "at bytes"),
    "beyond": (edit(data_offsets=[10**9, 10**9 + 16]), "leaves a gap or overlaps"),
    "overlap": (edit(data_offsets=[0, 16]), "leaves a gap or overlaps"),
    "hidden bytes": (lambda h, d: (less(NORM)(h), d), "leaves a gap|describes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_BYTES)
def test_a_safetensors_file_that_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    change, fragment = WRONG_BYTES[name]
    path = folder / "model.safetensors"
    with_header(path, *change(*header_of(path)))
    with pytest.raises(SchemaError, match=fragment) as caught:
        convert(folder, tmp_path / "w.h5")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_pointer_of_git_lfs(folder: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab12\nsize 4995584424\n"
    (folder / "model.safetensors").write_bytes(pointer)
    with pytest.raises(SchemaError, match="is a pointer of git-lfs, not the file: git lfs pull"):
        convert(folder, tmp_path / "w.h5")


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 100, (2**40).to_bytes(8, "little")])
def test_no_safetensors_at_all(folder: Path, tmp_path: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(SchemaError, match="is no safetensors file, or cut short"):
        convert(folder, tmp_path / "w.h5")


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda of: None, "has no weight_map"),
        (list, "has no weight_map"),
        (lambda of: of | {NORM: 3}, "has no weight_map"),
        (lambda of: of | {NORM: "../secret.safetensors"}, r"'\.\./secret.* is no plain file name"),
        (lambda of: of | {NORM: "/etc/passwd"}, "is no plain file name"),
        (lambda of: of | {NORM: "none.safetensors"}, "there is no file"),
        (lambda of: of | {NORM: "model-00001-of-00003.safetensors"}, "which the index expects in"),
        (lambda of: {n: s for n, s in of.items() if n != NORM}, "the index expects in None"),
        (lambda of: of | {"x": "model-00001-of-00003.safetensors"}, "expects 'x' in .*not hold it"),
    ],
)
def test_an_index_that_is_refused(tmp_path: Path, change: Any, fragment: str) -> None:
    folder = checkpoint(tmp_path / "hf", LLAMA, tensors(), 3)
    of = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": change(of)}))
    with pytest.raises(SchemaError, match=fragment) as caught:
        convert(folder, tmp_path / "w.h5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model.safetensors"])
def test_an_error_says_its_command_once(folder: Path, tmp_path: Path, file: str) -> None:
    twice = b'{"weight_map": {}, "weight_map": {}}'
    if file == "model.safetensors":
        with_header(folder / file, twice, b"")
    else:
        (folder / file).write_bytes(twice)
    with pytest.raises(SchemaError, match="a key occurs twice") as caught:
        convert(folder, tmp_path / "w.h5")
    assert str(caught.value).count("convert: ") == 1
    assert str(caught.value).startswith("convert: ")


def test_an_index_that_its_shards_left_behind(tmp_path: Path) -> None:
    """`save_pretrained` over shards removes them and not their index; then the file is read."""
    folder = checkpoint(tmp_path / "hf", LLAMA, tensors(), 3)
    plain = checkpoint(tmp_path / "plain", LLAMA, other := tensors(kinds=("float16",)))
    write_shard(folder / "model.safetensors", other)
    shards = sorted(folder.glob("model-*"))
    while shards:  # two sets of weights: nobody knows which is meant
        with pytest.raises(
            SchemaError, match=rf"names {shards[0].name} but not model\.saf.* two sets"
        ):
            convert(folder, tmp_path / "w.h5")
        shards.pop().unlink()
    convert(folder, tmp_path / "w.h5")
    convert(plain, tmp_path / "p.h5")
    assert datasets(tmp_path / "w.h5") == datasets(tmp_path / "p.h5")


def test_directories_that_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.h5"
    (folder / "config.json").write_bytes(b"\xff")
    with pytest.raises(SchemaError, match="is no UTF-8 text"):
        convert(folder, out)
    (folder / "config.json").unlink()
    with pytest.raises(SchemaError, match=r"there is no file .*config\.json"):
        convert(folder, out)


# ------------------------------------------------------------------ export


def random_model(**changed: Any) -> Model:
    plain = dict(
        vocabulary=7, width=4, layers=1, heads=2, kv_heads=1, head_width=6, mlp_width=3,
        norm_place="post", qk_norm="full", norm_eps=1e-3, rope_theta=500.0, tied=False,
    )  # fmt: skip
    config = ModelConfig(**{**plain, **changed})
    rng = np.random.default_rng(5)
    return Model(config, {n: rng.standard_normal(s) for n, s in config.parameter_shapes().items()})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place, norm, kind", [("post", "full", "olmo2"), ("pre", "none", "llama")])
def test_export_of_a_model_without_a_checkpoint(
    tmp_path: Path, place: str, norm: str, kind: str, tied: bool
) -> None:
    model = random_model(norm_place=place, qk_norm=norm, tied=tied)
    weights.save(model, tmp_path / "w.h5")
    export(tmp_path / "w.h5", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == kind
    convert(tmp_path / "hf", tmp_path / "w2.h5")
    back = weights.load(tmp_path / "w2.h5")
    assert back.config == model.config
    assert all((back.parameters[n] == a).all() for n, a in model.parameters.items())


def test_a_configuration_of_a_megabyte_is_kept(folder: Path, tmp_path: Path) -> None:
    """As the labels of 21,843 classes are: an attribute of HDF5 may be no larger than 64 kB."""
    config = folder / "config.json"
    text = json.dumps(json.loads(config.read_text()) | {"_name_or_path": "é" * 2**19})
    config.write_text(text, encoding="utf-8")
    convert(folder, tmp_path / "w.h5")
    export(tmp_path / "w.h5", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_text(encoding="utf-8") == text


def test_arrays_in_fortrans_order_are_exported_row_by_row(tmp_path: Path) -> None:
    """Their memory as it lies would be other numbers. transformers asks for the format "pt"."""
    numpy = pytest.importorskip("safetensors.numpy")
    model = random_model()
    W = np.asfortranarray(model.parameters["blocks.0.mlp.up.weight"])
    weights.save(model.with_parameters({"blocks.0.mlp.up.weight": W}), tmp_path / "w.h5")
    export(tmp_path / "w.h5", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    assert (numpy.load_file(path)["model.layers.0.mlp.up_proj.weight"] == W).all()
    assert header_of(path)[0]["__metadata__"] == {"format": "pt"}


def test_a_config_that_no_longer_describes_the_model_is_not_exported(
    folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "w.h5")
    model = weights.load(tmp_path / "w.h5")
    changed = config_from_json(config_to_json(model.config) | {"rope_theta": 9.0})
    weights.save(Model(changed, model.parameters, source=model.source), tmp_path / "w2.h5")
    export(tmp_path / "w2.h5", tmp_path / "hf2")
    text = (tmp_path / "hf2/config.json").read_text()
    assert huggingface.read_config("x", text)[1] == changed


@pytest.mark.parametrize("place, norm", [("pre", "full"), ("post", "head"), ("post", "none")])
def test_no_family_has_these_norms(tmp_path: Path, place: str, norm: str) -> None:
    weights.save(random_model(norm_place=place, qk_norm=norm), tmp_path / "w.h5")
    with pytest.raises(ConventionError, match=r"none of the families known here \(olmo2, .*deit\)"):
        export(tmp_path / "w.h5", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_export_appears_whole_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folder, tmp_path / "w.h5")
    with pytest.raises(SchemaError, match="exists and is no empty folder"):
        export(tmp_path / "w.h5", folder)
    with pytest.raises(SchemaError, match="does not exist"):
        export(tmp_path / "w.h5", tmp_path / "none/hf")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "w.h5", tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 2

    def full_disk(header: Any, name: str) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "read", full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        export(tmp_path / "w.h5", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "hf", "w.h5"]
