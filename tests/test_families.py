"""files/families.py and keys.py: what every family's config.json means, and hostile ones. No torch.

That the meaning is transformers' own is shown in test_peers.py.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from refcurv.cli import main
from refcurv.files import huggingface, known, safetensors, slots, store, weights
from refcurv.files.bfloat16 import to_bfloat16
from refcurv.files.families import FAMILIES, Family
from refcurv.files.huggingface import convert, export, read_config, tensors_of
from refcurv.files.weights import config_from_json
from refcurv.law.checks import ConventionError, NonFiniteError, RefcurvError, SchemaError

LABELS = {str(n): f"LABEL_{n}" for n in range(1000)}
SAVED = dict(bos_token_id=1, eos_token_id=2, initializer_range=0.02, torch_dtype="bfloat16",
             transformers_version="4.40.1", use_cache=True)  # fmt: skip
"""What all of the Hub's language models have besides, and no forward depends on."""

# ------------------------------------------------------------------ the Hub's own

REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        dict(
            model_type="gpt2", activation_function="gelu_new", architectures=["GPT2LMHeadModel"],
            attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, layer_norm_epsilon=1e-05, n_ctx=1024,
            n_embd=768, n_head=12, n_layer=12, n_positions=1024, summary_activation=None,
            summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
            summary_use_proj=True, vocab_size=50257,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        dict(
            vocabulary=50257, width=768, layers=12, heads=12, kv_heads=12, head_width=64,
            mlp_width=3072, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=None,
            tied=True, norm="layer", norm_bias=True, learned_positions=1024, gated=False,
            biases=("q", "k", "v", "o", "up", "down"), activation="gelu_tanh",
        ),
    ),
    "roneneldan/TinyStories-1M": (
        dict(
            model_type="gpt_neo", architectures=["GPTNeoForCausalLM"], attention_dropout=0,
            activation_function="gelu_new", attention_layers=["global", "local"] * 4,
            attention_types=[[["global", "local"], 4]], embed_dropout=0, intermediate_size=None,
            layer_norm_epsilon=1e-5, max_position_embeddings=2048, hidden_size=64, num_layers=8,
            num_heads=16, resid_dropout=0, vocab_size=50257, window_size=256,
        ),
        dict(
            vocabulary=50257, width=64, layers=8, heads=16, kv_heads=16, head_width=4,
            mlp_width=256, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=None,
            tied=True, norm="layer", norm_bias=True, learned_positions=2048, gated=False,
            biases=("o", "up", "down"), activation="gelu_tanh", score_scale=1.0,
            windows=(0, 256) * 4,
        ),
    ),
    "EleutherAI/pythia-70m": (
        dict(
            model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], hidden_act="gelu",
            hidden_size=512, intermediate_size=2048, layer_norm_eps=1e-05,
            max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6,
            rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False,
            use_parallel_residual=True, vocab_size=50304,
        ),
        dict(
            vocabulary=50304, width=512, layers=6, heads=8, kv_heads=8, head_width=64,
            mlp_width=2048, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            rope_width=16, tied=False, norm="layer", norm_bias=True, gated=False,
            biases=("q", "k", "v", "o", "up", "down"), activation="gelu", residual="parallel",
        ),
    ),
    "microsoft/phi-2": (
        dict(
            model_type="phi", architectures=["PhiForCausalLM"], attention_dropout=0.0,
            embd_pdrop=0.0, resid_pdrop=0.1, hidden_act="gelu_new", hidden_size=2560,
            intermediate_size=10240, layer_norm_eps=1e-05, max_position_embeddings=2048,
            num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
            partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None, rope_theta=10000.0,
            tie_word_embeddings=False, vocab_size=51200,
        ),
        dict(
            vocabulary=51200, width=2560, layers=32, heads=32, kv_heads=32, head_width=80,
            mlp_width=10240, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            rope_width=32, tied=False, norm="layer", norm_bias=True, gated=False,
            biases=("q", "k", "v", "o", "up", "down", "head"), activation="gelu_tanh",
            residual="shared",
        ),
    ),
    "microsoft/phi-1_5": (
        dict(
            model_type="phi", architectures=["PhiForCausalLM"], attention_dropout=0.0,
            embd_pdrop=0.0, resid_pdrop=0.0, hidden_act="gelu_new", hidden_size=2048,
            intermediate_size=8192, layer_norm_eps=1e-05, max_position_embeddings=2048,
            num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=None,
            partial_rotary_factor=0.5, qk_layernorm=False, rope_scaling=None, rope_theta=10000.0,
            tie_word_embeddings=False, vocab_size=51200,
        ),
        dict(
            vocabulary=51200, width=2048, layers=24, heads=32, kv_heads=32, head_width=64,
            mlp_width=8192, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            rope_width=32, tied=False, norm="layer", norm_bias=True, gated=False,
            biases=("q", "k", "v", "o", "up", "down", "head"), activation="gelu_tanh",
            residual="shared",
        ),
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        dict(
            model_type="phi3", architectures=["Phi3ForCausalLM"], attention_bias=False,
            attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0, hidden_act="silu",
            auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, hidden_size=3072,
            intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=32,
            num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-05, rope_scaling=None,
            original_max_position_embeddings=4096, pad_token_id=32000, rope_theta=10000.0,
            sliding_window=2047, tie_word_embeddings=False, vocab_size=32064,
        ),
        dict(
            vocabulary=32064, width=3072, layers=32, heads=32, kv_heads=32, head_width=96,
            mlp_width=8192, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            tied=False, windows=(2047,) * 32,
        ),
    ),
    "mistralai/Mistral-7B-v0.1": (
        dict(
            model_type="mistral", architectures=["MistralForCausalLM"], hidden_act="silu",
            hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
            num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
            rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096,
            tie_word_embeddings=False, vocab_size=32000,
        ),
        dict(
            vocabulary=32000, width=4096, layers=32, heads=32, kv_heads=8, head_width=128,
            mlp_width=14336, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            tied=False, windows=(4096,) * 32,
        ),
    ),
    "Qwen/Qwen2.5-0.5B": (
        dict(
            model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_dropout=0.0,
            hidden_act="silu", hidden_size=896, intermediate_size=4864, max_window_layers=24,
            max_position_embeddings=32768, num_attention_heads=14, num_hidden_layers=24,
            num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0,
            sliding_window=32768, tie_word_embeddings=True, use_mrope=False,
            use_sliding_window=False, vocab_size=151936,
        ),
        dict(
            vocabulary=151936, width=896, layers=24, heads=14, kv_heads=2, head_width=64,
            mlp_width=4864, norm_place="pre", qk_norm="none", norm_eps=1e-6, rope_theta=1e6,
            tied=True, biases=("q", "k", "v"),
        ),
    ),
    "Qwen/Qwen3-0.6B": (
        dict(
            model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False,
            attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=1024,
            intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
            num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
            rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
            tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
        ),
        dict(
            vocabulary=151936, width=1024, layers=28, heads=16, kv_heads=8, head_width=128,
            mlp_width=3072, norm_place="pre", qk_norm="head", norm_eps=1e-6, rope_theta=1e6,
            tied=True,
        ),
    ),
    "google/gemma-2b": (
        dict(
            model_type="gemma", architectures=["GemmaForCausalLM"], attention_bias=False,
            attention_dropout=0.0, head_dim=256, hidden_act="gelu", hidden_activation=None,
            hidden_size=2048, intermediate_size=16384, max_position_embeddings=8192,
            num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, pad_token_id=0,
            rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000.0, vocab_size=256000,
        ),
        dict(
            vocabulary=256000, width=2048, layers=18, heads=8, kv_heads=1, head_width=256,
            mlp_width=16384, norm_place="pre", qk_norm="none", norm_eps=1e-6, rope_theta=1e4,
            tied=True, norm_offset=True, activation="gelu_tanh", embed_scale=2048**0.5,
        ),
    ),
    "google/gemma-2-2b": (
        dict(
            model_type="gemma2", architectures=["Gemma2ForCausalLM"], attention_bias=False,
            attention_dropout=0.0, attn_logit_softcapping=50.0, cache_implementation="hybrid",
            final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216,
            max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26,
            num_key_value_heads=4, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
            rope_theta=10000.0, sliding_window=4096, vocab_size=256000,
        ),
        dict(
            vocabulary=256000, width=2304, layers=26, heads=8, kv_heads=4, head_width=256,
            mlp_width=9216, norm_place="both", qk_norm="none", norm_eps=1e-6, rope_theta=1e4,
            tied=True, norm_offset=True, activation="gelu_tanh", embed_scale=48.0,
            score_cap=50.0, logit_cap=30.0, windows=(4096, 0) * 13,
        ),
    ),
    "meta-llama/Llama-3.2-1B": (
        dict(
            model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False,
            attention_dropout=0.0, head_dim=64, hidden_act="silu", hidden_size=2048,
            intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
            num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
            pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=True,
            rope_scaling={
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            vocab_size=128256,
        ),
        dict(
            vocabulary=128256, width=2048, layers=16, heads=32, kv_heads=8, head_width=64,
            mlp_width=8192, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=5e5,
            tied=True,
            rope_scaling=dict(kind="llama3", factor=32, original=8192, slow=1.0, fast=4.0),
        ),
    ),
    "allenai/OLMo-1B-hf": (
        dict(
            model_type="olmo", architectures=["OlmoForCausalLM"], attention_bias=False,
            attention_dropout=0.0, clip_qkv=None, hidden_act="silu", hidden_size=2048,
            intermediate_size=8192, max_position_embeddings=2048, num_attention_heads=16,
            num_hidden_layers=16, num_key_value_heads=16, pad_token_id=1, rope_scaling=None,
            rope_theta=10000.0, tie_word_embeddings=True, vocab_size=50304,
        ),
        dict(
            vocabulary=50304, width=2048, layers=16, heads=16, kv_heads=16, head_width=128,
            mlp_width=8192, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            tied=True, norm="layer", norm_gain=False,
        ),
    ),
    "allenai/OLMo-2-1124-7B": (
        dict(
            model_type="olmo2", architectures=["Olmo2ForCausalLM"], attention_bias=False,
            attention_dropout=0.0, hidden_act="silu", hidden_size=4096, intermediate_size=11008,
            max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=32, pad_token_id=100277, rms_norm_eps=1e-06, rope_scaling=None,
            rope_theta=500000, tie_word_embeddings=False, vocab_size=100352,
        ),
        dict(
            vocabulary=100352, width=4096, layers=32, heads=32, kv_heads=32, head_width=128,
            mlp_width=11008, norm_place="post", qk_norm="full", norm_eps=1e-6, rope_theta=5e5,
            tied=False,
        ),
    ),
    "stabilityai/stablelm-3b-4e1t": (
        dict(
            model_type="stablelm", architectures=["StableLmForCausalLM"], hidden_act="silu",
            hidden_size=2560, intermediate_size=6912, layer_norm_eps=1e-05,
            max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=32, partial_rotary_factor=0.25, rope_theta=10000,
            tie_word_embeddings=False, use_qkv_bias=False, vocab_size=50304,
        ),
        dict(
            vocabulary=50304, width=2560, layers=32, heads=32, kv_heads=32, head_width=80,
            mlp_width=6912, norm_place="pre", qk_norm="none", norm_eps=1e-5, rope_theta=1e4,
            rope_width=20, tied=False, norm="layer", norm_bias=True,
        ),
    ),
    "google/vit-base-patch16-224": (
        dict(
            model_type="vit", _name_or_path="google/vit-base-patch16-224-in21k",
            architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0,
            hidden_act="gelu", hidden_dropout_prob=0.0, hidden_size=768, id2label=LABELS,
            image_size=224, intermediate_size=3072, layer_norm_eps=1e-12, num_attention_heads=12,
            label2id={name: n for n, name in LABELS.items()}, num_channels=3,
            num_hidden_layers=12, patch_size=16, qkv_bias=True,
        ),
        dict(
            vocabulary=1000, width=768, layers=12, heads=12, kv_heads=12, head_width=64,
            mlp_width=3072, norm_place="pre", qk_norm="none", norm_eps=1e-12, rope_theta=None,
            tied=False, norm="layer", norm_bias=True, learned_positions=197, gated=False,
            biases=("patch", "q", "k", "v", "o", "up", "down", "head"), activation="gelu",
            causal=False, pool="cls",
            image=dict(channels=3, height=224, width=224, patch=16, specials=["cls"]),
        ),
    ),
}  # fmt: skip
"""config.json of the Hub → the fields that differ from ModelConfig's own defaults."""

DEIT_BASE = REAL["google/vit-base-patch16-224"][0]
REAL["facebook/deit-base-patch16-224"] = (  # it is a ViT there
    {k: v for k, v in DEIT_BASE.items() if k != "_name_or_path"},
    REAL["google/vit-base-patch16-224"][1],
)


@pytest.mark.parametrize("name", REAL)
def test_the_hubs_configurations(name: str) -> None:
    config, fields = REAL[name]
    assert read_config("x", json.dumps(SAVED | config))[1] == config_from_json(fields)


def test_the_teacher_of_deit_base_distilled_is_refused() -> None:
    config = DEIT_BASE | {
        "model_type": "deit",
        "architectures": ["DeiTForImageClassificationWithTeacher"],
    }
    with pytest.raises(ConventionError, match=r"it averages two heads.*DeiTForImageClassification"):
        read_config("x", json.dumps(config))
    plain = config | {"architectures": ["DeiTForImageClassification"]}
    image = read_config("x", json.dumps(plain))[1].image
    assert image is not None and image.specials == ("cls", "distillation")


# ------------------------------------------------------------------ one small config of each

LLAMA: dict[str, Any] = dict(
    vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-3, tie_word_embeddings=False,
)  # fmt: skip
HEADS: dict[str, Any] = {
    k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim", "rms_norm_eps")
}
LAYER: dict[str, Any] = {"layer_norm_eps": 1e-3}
IMAGE: dict[str, Any] = dict(
    hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2, image_size=4,
    patch_size=2, num_channels=3, layer_norm_eps=1e-3, id2label={"0": "cat", "1": "dog"},
)  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 7, "layer_norm_epsilon": 1e-3}
SMALL: dict[str, dict[str, Any]] = {
    "olmo2": LLAMA,
    "olmo3": LLAMA | {"sliding_window": 3},
    "olmo": {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {"clip_qkv": 8.0},
    "llama": LLAMA | {"mlp_bias": True},
    "smollm3": LLAMA | {"no_rope_layers": [0, 1], "mlp_bias": True},
    "mistral": LLAMA | {"sliding_window": 3},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": LLAMA | {"attention_bias": True},
    "gemma": LLAMA,
    "gemma2": LLAMA | {"query_pre_attn_scalar": 144, "sliding_window": 3},
    "gemma3_text": LLAMA | {"query_pre_attn_scalar": 144, "sliding_window": 3,
                            "sliding_window_pattern": 2},
    "gpt2": GPT | {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 5},
    "gpt_neo": GPT | dict(
        hidden_size=8, num_layers=2, num_heads=2, max_position_embeddings=5,
        attention_types=[[["global", "local"], 1]], window_size=3),
    "gpt_neox": HEADS | LAYER | {"rotary_pct": 0.5},
    "opt": dict(vocab_size=7, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=6,
                max_position_embeddings=5),
    "phi": HEADS | LAYER | {"qk_layernorm": True},
    "phi3": LLAMA | {"sliding_window": 3},
    "starcoder2": {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {"norm_epsilon": 1e-3},
    "stablelm": HEADS | LAYER | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "vit": IMAGE,
    "deit": IMAGE | {"image_size": [4, 6]},
}  # fmt: skip
KINDS = [family.model_type for family in FAMILIES]
MIXED = ("bfloat16", "float32", "float16", "float64")


def test_there_is_a_small_one_of_each() -> None:
    assert list(SMALL) == KINDS


def config_of(kind: str, **changed: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL[kind], **changed}


def checkpoint(folder: Path, config: dict[str, Any], kinds: tuple[str, ...] = MIXED) -> Path:
    """A random checkpoint of that configuration, tensors in their families' own shapes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, ours = read_config("x", json.dumps(config))
    shapes, rng = ours.parameter_shapes(), np.random.default_rng(3)
    rows, arrays = [], {}
    for n, (name, (slot, parts)) in enumerate(tensors_of(family, ours).items()):
        shape = slots.tensor_shape(slot, ours, [shapes[p] for p in parts])
        values, stored = rng.standard_normal(shape), kinds[n % len(kinds)]
        arrays[name] = to_bfloat16(values) if stored == "bfloat16" else values.astype(stored)
        rows.append((name, stored, shape))
    safetensors.write_file(folder / "model.safetensors", rows, lambda name: arrays[name])
    return folder


def check_round_trip(folder: Path, out: Path) -> None:
    """convert, export, convert: the same datasets, and the same file but for the order in it."""
    convert(folder, out / "w1.h5")
    export(out / "w1.h5", out / "back")
    convert(out / "back", out / "w2.h5")
    assert store.open_file(out / "w1.h5").entries == store.open_file(out / "w2.h5").entries
    one, two = ({t.name: (t.shape, t.stored, safetensors.read_tensor(t).tobytes())
                 for t in safetensors.read_header(f / "model.safetensors")}
                for f in (folder, out / "back"))  # fmt: skip
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, kind: str) -> None:
    check_round_trip(checkpoint(tmp_path / "hf", config_of(kind)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_minimal_config_says_the_same(kind: str) -> None:
    """Of the family's own reading, in both directions, and from one family to itself."""
    family, config = read_config("x", json.dumps(config_of(kind)))
    text = huggingface.minimal_config(family, config, {"x": "float16"})
    assert read_config("x", text) == (family, config)
    assert json.loads(text)["dtype"] == "float16"


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_positions_of_each(kind: str) -> None:
    """transformers 5's block and the older keys say the same."""
    family, config = read_config("x", json.dumps(config_of(kind)))
    if config.rope_theta is None or kind in ("olmo3", "gemma3_text", "phi3"):
        return  # none, or others by the block, or none of this kind
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    key = {"gpt_neox": "rotary_emb_base"}.get(kind, "rope_theta")
    old = config_of(kind, **{key: 9.0}, rope_scaling=yarn)
    new = config_of(kind, rope_parameters=yarn | {"rope_theta": 9.0})
    found = read_config("x", json.dumps(old))[1]
    assert found == read_config("x", json.dumps(new))[1]
    assert (found.rope_theta, found.rope_width) == (9.0, config.rope_width)
    scaling = found.rope_scaling
    assert scaling is not None and scaling.attention == pytest.approx(0.1 * np.log(4) + 1)
    assert (scaling.slow, scaling.fast, scaling.truncate) == (1.0, 32.0, True)
    text = huggingface.minimal_config(family, found, {"x": "float32"})
    assert read_config("x", text)[1] == found


def test_the_context_of_a_scaling_is_the_models_where_it_says_none() -> None:
    scaling = dict(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4)
    config = config_of("llama", rope_scaling=scaling, max_position_embeddings=77)
    found = read_config("x", json.dumps(config))[1].rope_scaling
    assert found is not None and found.original == 77


DEFAULTS = {
    "mistral: a window of 4096": ("mistral", ["sliding_window"], {"windows": (4096, 4096)}),
    "gemma2: windows in every other block": ("gemma2", [], {"windows": (3, 0)}),
    "gemma2: caps": ("gemma2", [], {"score_cap": 50.0, "logit_cap": 30.0}),
    "gemma2: scale": ("gemma2", [], {"score_scale": 1 / 12}),
    "qwen2: no window": ("qwen2", ["use_sliding_window"], {"windows": ()}),
    "qwen2: upper blocks": ("qwen2", [], {"windows": (0, 3)}),
    "olmo3: theta": ("olmo3", [], {"rope_theta": 5e5, "windows": (3, 3), "rotary": ()}),
    "gemma3: two thetas": (
        "gemma3_text",
        [],
        {"rope_theta": 1e6, "local_theta": 1e4, "windows": (3, 0), "rotary": ("local", "main")},
    ),
    "gemma3: every sixth": ("gemma3_text", ["sliding_window_pattern"], {"windows": (3, 3)}),
    "gemma3: no caps": ("gemma3_text", [], {"score_cap": None, "logit_cap": None}),
    "smollm3: every fourth": ("smollm3", ["no_rope_layers"], {"rotary": (), "rope_theta": 2e6}),
    "opt: two rows before": (
        "opt",
        [],
        {
            "position_offset": 2,
            "learned_positions": 5,
            "activation": "relu",
            "norm_eps": 1e-5,
            "tied": True,
        },
    ),
    "gpt2: four times the width": ("gpt2", [], {"mlp_width": 32, "tied": True}),
    "gpt_neox: a quarter turns": ("gpt_neox", [], {"rope_width": 2}),
    "phi: half turns": ("phi", [], {"rope_width": 2, "qk_norm": "head"}),
    "gemma: tied": ("gemma", ["tie_word_embeddings"], {"tied": True}),
    "llama: untied": ("llama", ["tie_word_embeddings"], {"tied": False}),
    "vit: two classes": ("vit", ["id2label"], {"vocabulary": 2}),
    "deit: positions": ("deit", [], {"learned_positions": 8, "vocabulary": 2}),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_keys_have_transformers_defaults(name: str) -> None:
    kind, without, wanted = DEFAULTS[name]
    config = {key: value for key, value in config_of(kind).items() if key not in without}
    found = read_config("x", json.dumps(config))[1]
    assert {key: getattr(found, key) for key in wanted} == wanted


@pytest.mark.parametrize("first, windows", [(0, (3, 3)), (1, (0, 3)), (2, ()), (9, ())])
def test_the_blocks_from_max_window_layers_on_have_the_window(first, windows) -> None:
    """As in transformers: 0 gives it to all blocks, and the number of blocks to none."""
    config = config_of("qwen2", max_window_layers=first)
    assert read_config("x", json.dumps(config))[1].windows == windows


YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=8)
CONTEXT = {"max_position_embeddings": 8}
PHI_CONTEXT = {"original_max_position_embeddings": 8}
PHI: dict[str, Any] = dict(type="longrope", short_factor=[1.0, 1.1], long_factor=[2, 3.5])


def test_longrope_as_published() -> None:
    """Its context stands beside it; cos and sin grow with the whole context over the trained."""
    lengths = dict(max_position_embeddings=64, original_max_position_embeddings=8)
    config = config_of("phi3", rope_scaling=PHI, **lengths)
    family, found = read_config("x", json.dumps(config))
    s = found.rope_scaling
    assert s is not None and (s.original, s.short, s.long) == (8, (1.0, 1.1), (2.0, 3.5))
    assert s.attention == pytest.approx(np.sqrt(2), rel=1e-15)  # 1 + log 8 / log 8
    for same in (
        config | {"rope_scaling": PHI | {"type": "su"}},
        config | {"rope_scaling": PHI | {"rope_type": "longrope", "factor": 8.0}},
        config
        | {"rope_scaling": PHI | {"attention_factor": s.attention}, "max_position_embeddings": 9},
        {**config, "rope_scaling": None, "rope_parameters": PHI | {"rope_theta": 1e4}},
    ):
        assert read_config("x", json.dumps(same)) == (family, found)
    text = huggingface.minimal_config(family, found, {"x": "float32"})
    assert read_config("x", text) == (family, found)
    del config["original_max_position_embeddings"]
    for usual in (PHI, PHI | {"original_max_position_embeddings": 4096}):
        config["rope_scaling"] = usual
        assert read_config("x", json.dumps(config))[1].rope_scaling.original == 4096
    plain = config_of("phi3", **lengths)  # without longrope it says nothing
    assert read_config("x", json.dumps(plain))[1].rope_scaling is None


DYNAMIC = dict(type="dynamic", factor=2)
OF_BLOCKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "olmo3, yarn where there is no window": (
        "olmo3", {"rope_scaling": YARN, "layer_types": ["full_attention", "sliding_attention"]},
        {"rope_theta": 5e5, "local_theta": 5e5, "rotary": ("main", "local"), "windows": (0, 3)},
    ),
    "olmo3, one theta said twice": (
        "olmo3", {"rope_theta": 9.0, "rope_parameters": {"sliding_attention": {"rope_theta": 9.0}}},
        {"rope_theta": 9.0, "local_theta": None, "rotary": ()},
    ),
    "gemma3, scaled": (
        "gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": 1e6, "local_theta": 1e4, "rotary": ("local", "main")},
    ),
    "gemma3, older keys": (
        "gemma3_text", {"rope_theta": 9.0, "rope_local_base_freq": 7.0},
        {"rope_theta": 9.0, "local_theta": 7.0, "rotary": ("local", "main")},
    ),
    "gemma3, no windows": (
        "gemma3_text", {"layer_types": ["full_attention"] * 2}, {"rotary": (), "windows": ()},
    ),
    "llama, dynamic": (
        "llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 8}, {"rotary": ()}
    ),
    "gemma3, dynamic": (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "max_position_embeddings": 8},
        {"rotary": ("local", "main")},
    ),
    "smollm3, windows": (
        "smollm3", {"use_sliding_window": True, "sliding_window": 4},
        {"rotary": ("none", "main"), "windows": (4, 0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_rotary_positions_by_the_block(name: str) -> None:
    """They are read, and written so that they are read again."""
    kind, changed, wanted = OF_BLOCKS[name]
    family, found = read_config("x", json.dumps(config_of(kind, **changed)))
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert (found.rope_scaling is not None) == ("rope_scaling" in changed)
    text = huggingface.minimal_config(family, found, {"x": "float32"})
    assert read_config("x", text) == (family, found)


def test_truncate_that_is_null() -> None:
    """transformers takes it for false, but reads none where each kind of attention has a block."""
    null = YARN | {"truncate": None}
    for key in ("rope_scaling", "rope_parameters"):
        found = read_config("x", json.dumps(config_of("qwen2", **{key: null})))[1].rope_scaling
        assert found is not None and not found.truncate
    config = config_of("olmo3", rope_parameters={"full_attention": null})
    found = read_config("x", json.dumps(config))[1].rope_scaling
    assert found is not None and found.truncate


def test_a_cap_that_transformers_does_not_apply() -> None:
    """Null says nothing; a number may be ignored, but not where it is applied."""
    plain = read_config("x", json.dumps(config_of("gemma3_text")))
    config = config_of("gemma3_text", attn_logit_softcapping=None)
    assert read_config("x", json.dumps(config)) == plain
    config["attn_logit_softcapping"] = 0.5
    assert read_config("x", json.dumps(config), ["attn_logit_softcapping"]) == plain
    config = config_of("gemma2", attn_logit_softcapping=0.5)
    with pytest.raises(ConventionError, match="cannot be ignored"):
        read_config("x", json.dumps(config), ["attn_logit_softcapping"])


def test_mixtures_of_experts_are_refused_in_a_sentence() -> None:
    """By their name, or by their keys."""
    for named in (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        {"model_type": "llama4", "text_config": {"num_local_experts": 16}},
        {"model_type": "qwen3_moe"}, {"model_type": "unheard_of", "n_routed_experts": 64},
    ):  # fmt: skip
        with pytest.raises(ConventionError, match="a mixture of experts, which is not built: here"):
            read_config("x", json.dumps(named))
    with pytest.raises(ConventionError, match="which is not built yet; known are"):
        read_config("x", json.dumps({"model_type": "falcon", "num_experts": None}))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2, by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "_layer_idx is True"),
    "gpt2, cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "gpt2, text": ("gpt2", {"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes'"),
    "gpt2, activation": ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    "stablelm, norms": ("stablelm", {"qk_layernorm": True}, "qk_layernorm is true: .*not built"),
    "phi3, no factors": ("phi3", {"rope_scaling": {"type": "su"}}, "lacks the key 'short_factor'"),
    "phi3, few": (
        "phi3",
        {"rope_scaling": PHI | {"long_factor": [2]}, **CONTEXT},
        "longrope, and no other",
    ),
    "phi3, many": (
        "phi3",
        {"rope_scaling": PHI | {"long_factor": [2] * 3, "short_factor": [1] * 3}, **CONTEXT},
        "short and long must have 2 numbers each",
    ),
    "phi3, text": ("phi3", {"rope_scaling": PHI | {"long_factor": "2"}}, "long_factor must be a l"),
    "phi3, zero": (
        "phi3",
        {"rope_scaling": PHI | {"long_factor": [0, 1]}},
        "long_factor must be a",
    ),
    "phi3, mscale": ("phi3", {"rope_scaling": PHI | {"long_mscale": 1.2}}, "long_mscale is 1.2"),
    "phi3, dynamic": ("phi3", {"rope_scaling": {"type": "dynamic"}}, "'dynamic', which is not bui"),
    "phi3, contexts": (
        "phi3",
        {
            "rope_scaling": PHI | {"original_max_position_embeddings": 8},
            "original_max_position_embeddings": 9,
        },
        "original_max_position_embeddings is given as 8 and as 9",
    ),
    "phi3, context in the block alone": (
        "phi3",
        {"rope_scaling": PHI | {"original_max_position_embeddings": 8}},
        "is 8 beside rope_type alone, where transformers takes 4096 .*: write it at the top level",
    ),
    "llama, no context": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        "lacks the key 'max_position",
    ),
    "llama, alpha": (
        "llama",
        {
            "rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 3},
            "max_position_embeddings": 8,
        },
        "alpha is 3",
    ),
    "opt, 350m": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    "opt, projected": (
        "opt",
        {"word_embed_proj_dim": 4},
        "word_embed_proj_dim is 4 and hidden_size",
    ),
    "opt, no gains": ("opt", {"layer_norm_elementwise_affine": False}, "affine is False"),
    "smollm3, few": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must have a 1 or a 0"),
    "smollm3, two": ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers must have a 1 or a 0"),
    "smollm3, none": (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 0},
        "no_rope_layer_interval must be a positive integer",
    ),
    "gemma3, pattern": ("gemma3_text", {"sliding_window_pattern": 0}, "pattern must be a positive"),
    "gemma3, cap": (
        "gemma3_text",
        {"attn_logit_softcapping": 0.5},
        "transformers caps no scores. .* --ignore-key attn_logit_softcapping",
    ),
    "llama, cap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "gemma3, type": (
        "gemma3_text",
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "its kind, 'linear', as type, which transformers 5 does not .*: write rope_type",
    ),
    "olmo3, type": (
        "olmo3",
        {"rope_scaling": {**YARN, "rope_type": None, "type": "yarn"}},
        "its kind, 'yarn', as type",
    ),
    "olmo3, truncate": (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
        "truncate is false, .*: it computes with true. Write true",
    ),
    "olmo3, older truncate": (
        "olmo3",
        {"rope_scaling": YARN | {"truncate": False}},
        "truncate is false, which transformers does not read",
    ),
    "gemma3, unread": (
        "gemma3_text",
        {"_sliding_window_pattern": 2},
        "_sliding_window_pattern is",
    ),
    "gemma3, scaled windows": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
        "those of sliding_attention are scaled",
    ),
    "gpt2, two widths": ("gpt2", {"hidden_size": 9}, "n_embd is 8 and hidden_size.* which one"),
    "starcoder2, eps": ("starcoder2", {"layer_norm_epsilon": 0.1}, "_epsilon is 0.1 and norm_eps"),
    "gemma, two ways": ("gemma", {"use_bidirectional_attention": True}, "bidirectional_attention"),
    "gemma, silu": ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    "gemma, differing": ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "gemma2, scalar": ("gemma2", {"query_pre_attn_scalar": 0}, "must be a finite number above 0"),
    "gemma2, cap": ("gemma2", {"attn_logit_softcapping": -1}, "score_cap must be finite and pos"),
    "gemma2, no width": ("gemma2", {"head_dim": None}, "lacks the key 'head_dim'"),
    "mistral, no groups": ("mistral", {"num_key_value_heads": None}, "lacks .*key_value_heads"),
    "mistral, window": ("mistral", {"sliding_window": 0}, "sliding_window must be a positive"),
    "mistral, layers": ("mistral", {"layer_types": []}, "the key 'layer_types' is unknown"),
    "qwen2, mrope": ("qwen2", {"use_mrope": True}, "use_mrope is True"),
    "qwen2, types": ("qwen2", {"layer_types": ["full_attention"]}, "type of each of 2 blocks"),
    "qwen2, kind": ("qwen2", {"layer_types": ["chunked"] * 2}, "layer_types has 'chunked'"),
    "qwen2, off": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
        "use_sliding_window is not true",
    ),
    "qwen2, list": ("qwen2", {"max_window_layers": [1]}, "max_window_layers must be 0 or"),
    "phi3, yarn": ("phi3", {"rope_scaling": YARN, **PHI_CONTEXT}, "lacks the key 'short_factor'"),
    "olmo3, theta": ("olmo3", {"rope_theta": 1e4}, "rope_theta is 10000.0: releases of transform"),
    "olmo3, flat": ("olmo3", {"rope_parameters": YARN}, "rope_parameters has an unknown key"),
    "gpt_neo, types": ("gpt_neo", {"attention_types": [["global", 2]]}, "attention_types must"),
    "gpt_neo, many": ("gpt_neo", {"attention_types": [[["local"], 10**9]]}, "type of each of 2"),
    "gpt_neo, none": ("gpt_neo", {"attention_types": None}, "attention_types must name"),
    "gpt_neo, kind": ("gpt_neo", {"attention_types": [[["odd"], 2]]}, "other than 'global'"),
    "gpt_neo, differ": ("gpt_neo", {"attention_layers": ["local"] * 2}, "attention_types differ"),
    "gpt_neox, none": ("gpt_neox", {"rotary_pct": 0.0}, "must be a finite number above 0"),
    "gpt_neox, less than a pair": ("gpt_neox", {"rotary_pct": 0.1}, "rope_width must be a posit"),
    "gpt_neox, odd": ("gpt_neox", {"rotary_pct": 0.75}, "rotary positions turn pairs"),
    "starcoder2, norm": ("starcoder2", {"norm_type": "rms"}, "norm_type is 'rms'"),
    "vit, oblong": ("vit", {"patch_size": [2, 1]}, "patch_size is 2 by 1; refcurv cuts squares"),
    "vit, three": ("vit", {"image_size": [4, 4, 4]}, "image_size must be one length or two"),
    "vit, uneven": ("vit", {"image_size": 5}, "must be multiples of patch"),
    "vit, labels": ("vit", {"num_labels": 3}, "id2label names 2 classes"),
    "vit, no labels": ("vit", {"id2label": {}}, "id2label must be an object"),
    "olmo, clip": ("olmo", {"clip_qkv": 0}, "qkv_clip must be finite and positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_cannot_say_is_refused_by_name(name: str) -> None:
    kind, changed, fragment = REFUSED[name]
    with pytest.raises(RefcurvError, match=fragment) as caught:
        read_config("dir/config.json", json.dumps(config_of(kind, **changed)))
    text = str(caught.value)
    assert text.startswith("dir/config.json: ") and "\n" not in text and len(text) < 400


def test_every_key_is_known_once() -> None:
    """No key is both read and irrelevant, and no rule of a family reads another's."""
    for family in FAMILIES:
        keys = [key for rule in family.rules for key in rule.keys]
        assert len(keys) == len(set(keys)), family.model_type
        assert not set(keys) & family.irrelevant
        assert not set(family.aliases) & {*keys, *family.irrelevant}
        assert set(family.aliases.values()) <= set(keys)
        assert all(re.compile(pattern) for pattern in family.ignored)
        assert set(family.in_memory.values()) <= {slot.theirs for slot in family.slots}


# ------------------------------------------------------------------ tensors


def test_what_lies_where_in_a_tensor_by_hand(tmp_path: Path) -> None:
    """Each form, from the definitions in transformers' forward, number by number."""
    at = {}
    for kind in ("gpt2", "gpt_neox", "phi3", "vit"):
        folder = checkpoint(tmp_path / kind, config_of(kind), ("float64",))
        tensors = safetensors.read_header(folder / "model.safetensors")
        at[kind] = {t.name: safetensors.read_tensor(t) for t in tensors}
        convert(folder, tmp_path / f"{kind}.h5")
        at[kind + " ours"] = dict(weights.load(tmp_path / f"{kind}.h5").parameters)
    theirs, ours = at["gpt2"], at["gpt2 ours"]
    fused, bias = (theirs[f"transformer.h.1.attn.c_attn.{k}"] for k in ("weight", "bias"))
    for p, part in enumerate("qkv"):  # y = x @ weight; q, k, v are its thirds
        W, b = (ours[f"blocks.1.attn.{part}.{k}"] for k in ("weight", "bias"))
        assert all(W[o, i] == fused[i, 8 * p + o] for o in range(8) for i in range(8))
        assert all(b[o] == bias[8 * p + o] for o in range(8))
    down = theirs["transformer.h.0.mlp.c_proj.weight"]
    assert down.shape == (32, 8) and (ours["blocks.0.mlp.down.weight"] == down.T).all()

    theirs, ours = at["gpt_neox"], at["gpt_neox ours"]
    name = "gpt_neox.layers.1.attention.query_key_value."
    fused, bias = theirs[name + "weight"], theirs[name + "bias"]
    for p, part in enumerate("qkv"):  # view(heads, 3 E), then chunk(3): E = 4
        W, b = (ours[f"blocks.1.attn.{part}.{k}"] for k in ("weight", "bias"))
        for h in range(2):
            for e in range(4):
                assert (W[4 * h + e] == fused[12 * h + 4 * p + e]).all()
                assert b[4 * h + e] == bias[12 * h + 4 * p + e]

    theirs, ours = at["phi3"], at["phi3 ours"]
    fused = theirs["model.layers.0.self_attn.qkv_proj.weight"]  # 8 rows of q, 4 of k, 4 of v
    for part, start, end in (("q", 0, 8), ("k", 8, 12), ("v", 12, 16)):
        assert (ours[f"blocks.0.attn.{part}.weight"] == fused[start:end]).all()
    fused = theirs["model.layers.0.mlp.gate_up_proj.weight"]
    assert (ours["blocks.0.mlp.gate.weight"] == fused[:6]).all()
    assert (ours["blocks.0.mlp.up.weight"] == fused[6:]).all()

    theirs, ours = at["vit"], at["vit ours"]
    kernel = theirs["vit.embeddings.patch_embeddings.projection.weight"]
    W = ours["patch.weight"]
    for c in range(3):
        for y in range(2):
            for x in range(2):
                assert (W[:, 4 * c + 2 * y + x] == kernel[:, c, y, x]).all()
    assert (ours["cls.weight"] == theirs["vit.embeddings.cls_token"][0, 0]).all()
    assert (ours["position.weight"] == theirs["vit.embeddings.position_embeddings"][0]).all()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_found_and_named(tmp_path: Path, kind: str, value: float) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("gpt2"), (kind,))
    path = folder / "model.safetensors"
    tensors = {t.name: t for t in safetensors.read_header(path)}
    tensor = tensors["transformer.h.1.attn.c_attn.weight"]
    one = np.array([value])
    raw = to_bfloat16(one) if kind == "bfloat16" else one.astype(kind)
    data = bytearray(path.read_bytes())
    at = tensor.begin + 20 * raw.itemsize  # of (8, 24), row 0: part v
    data[at : at + raw.itemsize] = raw.tobytes()
    path.write_bytes(data)
    with pytest.raises(
        NonFiniteError, match=r"'transformer\.h\.1\.attn\.c_attn\.weight'"
    ) as caught:
        convert(folder, tmp_path / "w.h5")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_parts_of_a_fused_tensor_are_stored_alike(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "hf", config_of("phi3"), ("float32",)), tmp_path / "w.h5")
    model = weights.load(tmp_path / "w.h5")
    stored = {**model.stored, "blocks.0.attn.k.weight": "float16"}
    changed = type(model)(model.config, model.parameters, model.dtype, stored, model.source)
    weights.save(changed, tmp_path / "w2.h5")
    with pytest.raises(ConventionError, match=r"qkv_proj\.weight', but are stored as float16 and"):
        export(tmp_path / "w2.h5", tmp_path / "back")


def test_names_that_meet_after_the_prefix(tmp_path: Path) -> None:
    """A checkpoint half with and half without the prefix is neither model."""
    folder = checkpoint(tmp_path / "hf", config_of("gpt2"))
    tensors = safetensors.read_header(folder / "model.safetensors")
    arrays = {t.name: safetensors.read_tensor(t) for t in tensors}
    rows = [(t.name, t.stored, t.shape) for t in tensors]
    rows.append(("wte.weight", rows[0][1], rows[0][2]))
    arrays["wte.weight"] = arrays[rows[0][0]]
    (folder / "model.safetensors").unlink()
    safetensors.write_file(folder / "model.safetensors", rows, lambda name: arrays[name])
    with pytest.raises(SchemaError, match=r"holds a tensor 'wte\.weight' that a gpt2"):
        convert(folder, tmp_path / "w.h5")


# ------------------------------------------------------------------ random hostility

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.integers(-2, 9), max_size=3), st.just(10**400), st.just({}),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]),
                    st.one_of(st.none(), st.sampled_from(["yarn", "linear", "llama3"]),
                              st.floats(), st.integers(-2, 9)), max_size=3),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, data: Any) -> Any:
    """JSON with a few of its values, anywhere, replaced or removed."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        at, keys = data, list(data)
        while keys:
            key = draw(st.sampled_from(sorted(keys)))
            inner = at[key]
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                at, keys = inner, list(inner)
                continue
            if draw(st.booleans()):
                at[key] = draw(JUNK)
            else:
                del at[key]
            break
    return data


def keys_of(family: Family) -> dict[str, Any]:
    """Every key that the family or any other reads, absent ones as null."""
    keys = {key for rule in family.rules for key in rule.keys}
    keys |= {*known.EVERYWHERE, *known.ELSEWHERE, *family.aliases, "auto_map", "architectures"}
    return {key: None for key in sorted(keys - {"head_dim", "num_key_value_heads"})}


@pytest.mark.parametrize("kind", KINDS)
@few(60)
@given(data=st.data())
def test_a_config_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    """Nothing but a RefcurvError, of one short line; what is read is written and read again."""
    family = FAMILIES[KINDS.index(kind)]
    config = data.draw(mutated(keys_of(family) | config_of(kind, rope_parameters=None)))
    try:
        found, read = read_config("x", json.dumps(config))
    except RefcurvError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    text = huggingface.minimal_config(found, read, {"x": "float32"})
    assert read_config("x", text) == (found, read)


@few(100)
@given(data=st.data())
def test_a_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    config = config_of("gpt2", n_layer=1)
    hf = checkpoint(folder / "hf", config)
    path = hf / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = data.draw(st.sampled_from(["json", "bytes", "length", "cut"]))
    if kind == "json":
        text = json.dumps(data.draw(mutated(header))).encode()
        raw = len(text).to_bytes(8, "little") + text + body
    elif kind == "bytes":
        at = data.draw(st.integers(8, 8 + length - 1))
        raw = raw[:at] + data.draw(st.binary(min_size=1, max_size=3)) + raw[at + 1 :]
    elif kind == "length":
        raw = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
    else:
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    path.write_bytes(raw)
    out = folder / "w.h5"
    try:
        convert(hf, out)
    except RefcurvError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert [p.name for p in folder.iterdir()] == ["hf"]


# ------------------------------------------------------------------ the command


def linked_to_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def header_in_utf_16(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode().encode("utf-16")
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def unknown(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config_of("gpt2", model_type="mamba")))


HOSTILE = {
    "a link to a folder": (linked_to_a_folder, "which is a folder"),
    "a pickle": (pickled, "is a pickle, which can run code"),
    "UTF-16": (header_in_utf_16, "the header is no UTF-8 text"),
    "cut short": (cut, "Download it again"),
    "another family": (unknown, "model_type is 'mamba', which is not built yet; known are olmo2, "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, fragment = HOSTILE[name]
    folder = checkpoint(tmp_path / "hf", config_of("gpt2"))
    change(folder)
    out = tmp_path / "w.h5"
    assert main(["convert", str(folder), str(out)]) == 2
    printed = capsys.readouterr()
    assert fragment in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not list(tmp_path.glob("*w.h5*")) and not list(tmp_path.glob(".*"))


def test_the_command_shows_what_became_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("gpt2"), ("float32",))
    assert (
        main(["convert", str(folder), str(tmp_path / "w.h5"), "--json", str(tmp_path / "j")]) == 0
    )
    rows = json.loads((tmp_path / "j").read_text())
    of_q = next(row for row in rows if row["name"] == "blocks.0.attn.q.weight")
    assert of_q["checkpoint_name"] == "transformer.h.0.attn.c_attn.weight"
    assert of_q["shape"] == "8 x 24" and of_q["dtype"] == "float32"
    said = " ".join(capsys.readouterr().out.split())  # a fused tensor is three rows
    assert said.endswith(f" 28 tensors → 36 parameters in {tmp_path / 'w.h5'}") and len(rows) == 36
