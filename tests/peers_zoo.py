"""Small models of transformers, one or more of each family: the checkpoints of test_peers.py.

Every parameter is drawn: gains, biases and scales lie away from their initial values. Settings
are not the defaults, windows are shorter than the sequences, and what clips or caps does so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 31
LENGTH = 9
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS: dict[str, Any] = dict(
    pad_token_id=None,  # torch gives its embedding no gradient
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation="eager",
)
IMAGE: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_channels=2,
    image_size=(6, 9),
    patch_size=3,
    num_labels=7,
    layer_norm_eps=3e-3,
    attn_implementation="eager",
)


def rope(theta: float = 750.0, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope(
    321.0,
    "llama3",
    factor=5.0,
    low_freq_factor=1.5,
    high_freq_factor=6.0,
    original_max_position_embeddings=40,
)
LINEAR = rope(321.0, "linear", factor=2.5)
YARN = rope(
    50.0,
    "yarn",
    factor=3.0,
    original_max_position_embeddings=40,
    beta_fast=2.5,  # the ramp starts behind the first frequency, at a fraction of one
    beta_slow=0.8,
)
BLUNT = rope(50.0, "yarn", factor=3.0, original_max_position_embeddings=40, beta_fast=2.5,
             beta_slow=0.8, truncate=False, attention_factor=1.3)  # fmt: skip


DYNAMIC = rope(50.0, "dynamic", factor=3.0)
"""Of LENGTH positions two lie beyond the trained context."""
TRAINED: dict[str, Any] = {"max_position_embeddings": 7}


def longrope(original: int) -> dict[str, Any]:
    """Phi's, its trained context the shorter or the longer of the two that a batch straddles."""
    return {
        "original_max_position_embeddings": original,
        "max_position_embeddings": 4 * original,
        **rope(50.0, "longrope", short_factor=[1.0, 1.1], long_factor=[1.5, 4.0],
               original_max_position_embeddings=original, partial_rotary_factor=0.67),
    }  # fmt: skip


def made(name: str, **fields: Any) -> Any:
    """Build transformers' model `name`, every parameter drawn."""
    config = getattr(hf, name.replace("ForCausalLM", "").replace("LMHeadModel", "")
                     .replace("Gemma3", "Gemma3Text")
                     .replace("ForImageClassification", "") + "Config")  # fmt: skip
    torch.manual_seed(7)
    model = getattr(hf, name)(config(**fields))
    offset = -1 if name.startswith("Gemma") else 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            kind = key.rpartition(".")[2]
            if parameter.ndim == 1 and kind == "weight":
                parameter.uniform_(0.5 + offset, 1.5 + offset)
            elif parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5)
            elif "embed" in key or "wte" in key or "wpe" in key:
                parameter.normal_(0, 0.7)
            else:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    return model


def of(name: str, *parts: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    fields: dict[str, Any] = {}
    for part in (*parts, changes):
        fields |= part
    return lambda: made(name, **fields)


_TEXT = SHAPE | TOKENS
_RMS = _TEXT | {"rms_norm_eps": 3e-3}
_LN = _TEXT | {"layer_norm_eps": 3e-3}
_NO_GROUPS = {k: v for k, v in _LN.items() if k != "num_key_value_heads"}
_LLAMA = (_RMS, rope(321.0), {"head_dim": 10})
_QWEN = (_RMS, rope(), {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1})
_GEMMA2 = dict(
    head_dim=10,
    query_pre_attn_scalar=7,
    sliding_window=3,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.5,
)
_GEMMA3 = dict(
    head_dim=10,
    num_hidden_layers=7,  # five with windows, one without, and one more
    query_pre_attn_scalar=7,
    sliding_window=3,
    rope_parameters={"full_attention": rope()["rope_parameters"],
                     "sliding_attention": rope(20.0)["rope_parameters"]},
)  # fmt: skip
_OPT = TOKENS | dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    word_embed_proj_dim=24,
    ffn_dim=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=11,
)
_GPT2 = TOKENS | dict(
    vocab_size=VOCABULARY,
    n_embd=24,
    n_inner=40,
    n_layer=3,
    n_head=4,
    n_positions=13,
    layer_norm_epsilon=3e-3,
)
_GPT_NEO = TOKENS | dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    attention_types=[[["global", "local"], 1], [["local"], 1]],
    window_size=3,
    max_position_embeddings=13,
    layer_norm_epsilon=3e-3,
)
QUARTER = rope(partial_rotary_factor=0.34)  # 2 of 6 entries
TWO_THIRDS = rope(partial_rotary_factor=0.67)  # 4 of 6 entries

ZOO: dict[str, Callable[[], Any]] = {
    "olmo2": of("Olmo2ForCausalLM", _RMS, rope()),
    "olmo2-yarn": of("Olmo2ForCausalLM", _RMS, YARN, hidden_size=40),
    "olmo2-bfloat16-sharded": of("Olmo2ForCausalLM", _RMS, rope()),
    "olmo3": of("Olmo3ForCausalLM", _RMS, sliding_window=3, num_hidden_layers=4,
                rope_parameters={kind: rope()["rope_parameters"]
                                 for kind in ("full_attention", "sliding_attention")}),
    "olmo3-yarn": of("Olmo3ForCausalLM", _RMS, sliding_window=3, num_hidden_layers=4,
                     hidden_size=40,
                     rope_parameters={"full_attention": YARN["rope_parameters"],
                                      "sliding_attention": rope(50.0)["rope_parameters"]}),
    "olmo": of("OlmoForCausalLM", _TEXT, rope()),
    "olmo-clip": of("OlmoForCausalLM", _TEXT, rope(), clip_qkv=0.8, attention_bias=True),
    "llama": of("LlamaForCausalLM", *_LLAMA, tie_word_embeddings=True),
    "llama-biases": of("LlamaForCausalLM", *_LLAMA, attention_bias=True, mlp_bias=True,
                       hidden_act="gelu"),
    "llama-llama3": of("LlamaForCausalLM", *_LLAMA, LLAMA3),
    "llama-linear": of("LlamaForCausalLM", *_LLAMA, LINEAR),
    "llama-dynamic": of("LlamaForCausalLM", *_LLAMA, DYNAMIC, TRAINED),
    "smollm3": of("SmolLM3ForCausalLM", _RMS, rope(321.0), num_hidden_layers=4, mlp_bias=True),
    "smollm3-windows": of("SmolLM3ForCausalLM", _RMS, rope(321.0), no_rope_layers=[0, 1, 0],
                          use_sliding_window=True, sliding_window=3),
    "mistral": of("MistralForCausalLM", *_LLAMA, sliding_window=3),
    "mistral-no-window": of("MistralForCausalLM", *_LLAMA, sliding_window=None),
    "qwen2": of("Qwen2ForCausalLM", *_QWEN),
    "qwen2-yarn": of("Qwen2ForCausalLM", _RMS, BLUNT, hidden_size=40, tie_word_embeddings=True),
    "qwen3": of("Qwen3ForCausalLM", *_QWEN, head_dim=10, attention_bias=True),
    "gemma": of("GemmaForCausalLM", *_LLAMA, num_key_value_heads=1),
    "gemma2": of("Gemma2ForCausalLM", _RMS, rope(), _GEMMA2),
    "gemma2-no-caps": of("Gemma2ForCausalLM", _RMS, rope(), _GEMMA2, attn_logit_softcapping=None,
                         final_logit_softcapping=None, tie_word_embeddings=False),
    "gemma3_text": of("Gemma3ForCausalLM", _RMS, _GEMMA3),
    "gemma3_text-scaled": of("Gemma3ForCausalLM", _RMS, _GEMMA3, final_logit_softcapping=2.5,
                             rope_parameters={"full_attention": LINEAR["rope_parameters"],
                                              "sliding_attention": rope(20.0)["rope_parameters"]}),
    "gpt2": of("GPT2LMHeadModel", _GPT2),
    "gpt2-unscaled": of("GPT2LMHeadModel", _GPT2, scale_attn_weights=False, n_inner=None,
                        activation_function="relu", tie_word_embeddings=False),
    "gpt_neo": of("GPTNeoForCausalLM", _GPT_NEO),
    "gpt_neox": of("GPTNeoXForCausalLM", _NO_GROUPS, QUARTER),
    "gpt_neox-sequential": of("GPTNeoXForCausalLM", _NO_GROUPS, TWO_THIRDS,
                              use_parallel_residual=False, attention_bias=False,
                              tie_word_embeddings=True),
    "opt": of("OPTForCausalLM", _OPT),
    "opt-no-bias": of("OPTForCausalLM", _OPT, enable_bias=False, tie_word_embeddings=False,
                      activation_function="gelu"),
    "phi": of("PhiForCausalLM", _LN, TWO_THIRDS),
    "phi-qk-norm": of("PhiForCausalLM", _LN, QUARTER, qk_layernorm=True,
                      tie_word_embeddings=True),
    "phi3": of("Phi3ForCausalLM", _RMS, TWO_THIRDS, sliding_window=3),
    "phi3-short": of("Phi3ForCausalLM", _RMS, longrope(LENGTH)),
    "phi3-long": of("Phi3ForCausalLM", _RMS, longrope(6)),
    "starcoder2": of("Starcoder2ForCausalLM", _TEXT, rope(), norm_epsilon=3e-3, sliding_window=3),
    "stablelm": of("StableLmForCausalLM", _LN, QUARTER, use_qkv_bias=True),
    "stablelm-parallel": of("StableLmForCausalLM", _LN, TWO_THIRDS, use_parallel_residual=True),
    "vit": of("ViTForImageClassification", IMAGE),
    "vit-no-bias": of("ViTForImageClassification", IMAGE, qkv_bias=False, image_size=6,
                      hidden_act="gelu_new"),
    "deit": of("DeiTForImageClassification", IMAGE),
}  # fmt: skip
"""Row of the table → the model's maker."""

OF_LENGTHS = ("llama-dynamic", "phi3-long")
"""Rows where the length of a text decides, for which transformers counts its padding too."""


def olmo2(**changes: Any) -> Any:
    """A small OLMo-2, for test_peers_curvature.py too."""
    return of("Olmo2ForCausalLM", _RMS, rope(), changes)()


def llama(**changes: Any) -> Any:
    """A small tied Llama, for test_peers_curvature.py too."""
    return of("LlamaForCausalLM", *_LLAMA, {"tie_word_embeddings": True}, changes)()
