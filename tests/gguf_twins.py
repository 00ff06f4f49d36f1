"""Tiny models twice: as a checkpoint of safetensors, and as the GGUF file that llama.cpp makes.

What llama.cpp's converter does is written here a second time: its names come from the package's own
map, rows of q and k are interleaved for `llama`, gains of Gemma hold 1 + w, GPT's tensors are
turned, NeoX's heads are stacked. Nothing is shared with refcurv.files.gguf.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from refcurv.files import safetensors
from refcurv.files.families import FAMILIES
from refcurv.files.huggingface import read_config
from refcurv.files.naming import tensors_of
from refcurv.files.slots import tensor_shape

Tensors = dict[str, np.ndarray]
D, H, KV, E, M, V, T, L = 8, 2, 1, 4, 6, 11, 32, 2


@dataclass(frozen=True)
class Twin:
    """config.json, GGUF's keys without the architecture's name, and what its converter does."""

    config: dict[str, Any]
    keys: dict[str, Any]
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, x: x
    more: Tensors = field(default_factory=dict)


SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "head_dim": E,
    "intermediate_size": M,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-5,
    "rope_theta": 700.0,
}
KEYS = {
    "context_length": T,
    "embedding_length": D,
    "block_count": L,
    "attention.head_count": H,
    "attention.head_count_kv": KV,
    "attention.key_length": E,
    "attention.value_length": E,
    "feed_forward_length": M,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 700.0,
}


def interleaved(name: str, x: np.ndarray) -> np.ndarray:
    """Row i and row i + E/2 of a head become neighbours."""
    which = name.partition("_proj.")[0][-1]
    if "_proj." not in name or which not in "qk":
        return x
    heads = H if which == "q" else KV
    half = x.reshape(heads, 2, len(x) // heads // 2, -1)
    rows = [half[h, j, i] for h in range(heads) for i in range(half.shape[2]) for j in range(2)]
    return np.array(rows).reshape(x.shape)


def one_more(name: str, x: np.ndarray) -> np.ndarray:
    return x + np.float32(1) if name.endswith("norm.weight") else x


def turned(name: str, x: np.ndarray) -> np.ndarray:
    conv = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return np.ascontiguousarray(x.T) if name.endswith(conv) else x


def stacked(name: str, x: np.ndarray) -> np.ndarray:
    if ".query_key_value." not in name:
        return x
    heads = x.reshape(H, 3, D // H, -1)
    return np.concatenate([heads[:, k].reshape(D, -1) for k in range(3)]).reshape(x.shape)


def without(of: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in of.items() if key not in names}


_GEMMA = {"model_type": "gemma", **SIZES, "hidden_activation": "gelu_pytorch_tanh"}
_WINDOWS = {"attention.sliding_window": 5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def divisors(theta: float, width: int) -> np.ndarray:
    """One frequency after another, as the converter has them, in float32."""
    found = []
    for i in range(0, width, 2):
        length = np.float32(2 * np.pi) * np.float32(theta ** (i / width))
        if length < 8192 / 4:
            found.append(1.0)
        elif length > 8192:
            found.append(8.0)
        else:
            share = (8192 / length - 1) / (4 - 1)
            found.append(1 / ((1 - share) / 8 + share))
    assert any(1 < x < 8 for x in found)
    return np.array(found, np.float32)


_NEOX = {
    "use_parallel_residual": True,
    "rope.dimension_count": 2,
    "attention.layer_norm_epsilon": 1e-3,
    **without(KEYS, "attention.head_count_kv", "attention.key_length", "attention.value_length",
              "attention.layer_norm_rms_epsilon", "rope.freq_base"),
}  # fmt: skip

TWINS: dict[str, Twin] = {
    "llama": Twin({"model_type": "llama", **SIZES}, KEYS, interleaved),
    "llama-old-keys": Twin(
        {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "attention_bias": True,
         "mlp_bias": True},
        {**without(KEYS, "attention.key_length", "attention.value_length"),
         "rope.dimension_count": E, "vocab_size": V, "rope.scaling.type": "linear",
         "rope.scaling.factor": 1.0},
        interleaved,
    ),
    "llama-scaled": Twin(
        {"model_type": "llama", **SIZES, "rope_theta": 5e5, "head_dim": 8,
         "rope_scaling": LLAMA3},
        {**KEYS, "rope.freq_base": 5e5, "attention.key_length": 8, "attention.value_length": 8},
        interleaved,
        {"rope_freqs.weight": divisors(5e5, 8)},
    ),
    "qwen2": Twin(
        {"model_type": "qwen2", **SIZES, "rope_scaling":
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {**KEYS, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 16},
    ),
    "qwen3": Twin({"model_type": "qwen3", **SIZES, "tie_word_embeddings": True}, KEYS),
    "gemma": Twin(
        {**_GEMMA, "rope_theta": 10_000.0}, without(KEYS, "rope.freq_base"), one_more
    ),
    "gemma2": Twin(
        {**_GEMMA, "model_type": "gemma2", "query_pre_attn_scalar": E, "sliding_window": 5,
         "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
        {**KEYS, **_WINDOWS, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
        one_more,
    ),
    "gemma3": Twin(
        {**_GEMMA, "model_type": "gemma3_text", "query_pre_attn_scalar": E, "sliding_window": 5,
         "rope_local_base_freq": 10_000.0, "num_hidden_layers": 7},
        {**KEYS, **_WINDOWS, "block_count": 7},
        one_more,
    ),
    "phi3": Twin(
        {"model_type": "phi3", **without(SIZES, "head_dim"), "sliding_window": 9,
         "partial_rotary_factor": 0.5},
        {**without(KEYS, "attention.key_length", "attention.value_length"),
         "rope.dimension_count": 2, "attention.sliding_window": 9,
         "rope.scaling.original_context_length": T},
    ),
    "olmo2": Twin({"model_type": "olmo2", **SIZES}, KEYS),
    "olmo2-of-3": Twin(
        {"model_type": "olmo3", **without(SIZES, "rope_theta"), "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {
             kind: {"rope_type": "default", "rope_theta": 700.0}
             for kind in ("sliding_attention", "full_attention")}},
        {**KEYS, **_WINDOWS, "attention.sliding_window_pattern": [True, False]},
    ),
    "gpt2": Twin(
        {"model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": L, "n_head": H,
         "n_inner": M, "n_positions": T, "layer_norm_epsilon": 1e-5,
         "activation_function": "gelu_new"},
        {**{k: KEYS[k] for k in ("context_length", "embedding_length", "block_count",
                                 "attention.head_count", "feed_forward_length")},
         "attention.layer_norm_epsilon": 1e-5},
        turned,
    ),
    "gptneox": Twin(
        {"model_type": "gpt_neox", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L,
         "num_attention_heads": H, "intermediate_size": M, "max_position_embeddings": T,
         "layer_norm_eps": 1e-3, "rotary_pct": 0.5, "use_parallel_residual": True,
         "hidden_act": "gelu"},
        _NEOX,
        stacked,
    ),
}  # fmt: skip


def is_built(twin: Twin) -> bool:
    return twin.config["model_type"] in {family.model_type for family in FAMILIES}


def numbers(config: Mapping[str, Any]) -> Tensors:
    """Every tensor that the checkpoint has. 1 + w is exact in float32."""
    family, read = read_config("twin", json.dumps(config))
    shapes, rng = read.parameter_shapes(), np.random.default_rng(7)
    of = {
        name: tensor_shape(slot, read, [shapes[one] for one in ours])
        for name, (slot, ours) in tensors_of(family, read).items()
    }
    return {name: (rng.integers(-999, 999, s) / 1024).astype(np.float32) for name, s in of.items()}


def safetensors_of(folder: Path, config: Mapping[str, Any], of: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rows = [(name, "float32", x.shape) for name, x in of.items()]
    safetensors.write_file(folder / "model.safetensors", rows, lambda name: of[name])
    return folder


def tensors_in_gguf(architecture: str, twin: Twin, of: Tensors) -> Tensors:
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, twin.keys["block_count"])
    found = dict(twin.more)
    for name, x in of.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        found[mapped] = twin.change(name, x)
    return found


def write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    of: Mapping[str, Any],
    plain: Mapping[str, Any] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file by the package's writer. A tensor may be (bytes, quantisation)."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in {**{f"{architecture}.{k}": v for k, v in keys.items()},
                       **(plain or {})}.items():  # fmt: skip
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, tuple):  # with GGUF's type of it
            writer.add_key_value(key, *value)
        else:
            writer.add_array(key, value)
    for name, x in of.items():
        data, kind = x if isinstance(x, tuple) else (x, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
