"""The families of checkpoints: what their config.json means and what their tensors are called.

Everything that differs between families is here, as data. How to add one:
validation/peers/ADDING.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as field_of
from typing import Final

from refcurv.files.keys import (
    FULL,
    SLIDING,
    Rule,
    Values,
    activation,
    bias,
    choice,
    echo,
    field,
    fixed,
    images,
    natural,
    not_built,
    nullable,
    only,
    query_scalar,
    scaled_embedding,
    sizes,
)
from refcurv.files.rotary_keys import Kinds, rope, rope_by_layer, still_blocks, turns
from refcurv.files.slots import Form, Slot
from refcurv.files.window_keys import local_blocks, one_window, upper_blocks, windows_by_layer
from refcurv.model.config import Norm, NormPlace, Pool, QKNorm, Residual, Scaling


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` means.

    Fields:
        model_type: the value of that key in config.json.
        architecture: the name of transformers' class for the whole model.
        prefix: what the names of all tensors but the head's begin with. A checkpoint of the base
            model alone lacks it.
        rules: config.json ↔ ModelConfig. They are read in order.
        slots: the modules of the checkpoint, and our layers in them.
        ignored: patterns of tensors that are no parameters (masks, a pooler), besides BUFFERS.
        irrelevant: keys of config.json that no forward of the family depends on.
        refused: other classes of this model_type → why they are refused.
        aliases: keys that transformers reads as another key → that key.
        in_memory: transformers 5's name of a module in memory → its name in the checkpoint.
    """

    model_type: str
    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    slots: tuple[Slot, ...]
    ignored: tuple[str, ...] = ()
    irrelevant: frozenset[str] = frozenset()
    refused: Mapping[str, str] | None = None
    aliases: Mapping[str, str] = field_of(default_factory=dict)
    in_memory: Mapping[str, str] = field_of(default_factory=dict)


BUFFERS: Final = (
    r"(.+\.)?rotary_emb\.(\w+_)?(inv_freq|(cos|sin)_cached)",
    r"(.+\.)?embed_tokens\.embed_scale",
)
"""Tensors that earlier releases stored in any family; they follow from config.json."""


def _slots(names: Mapping[str, str]) -> tuple[Slot, ...]:
    return tuple(Slot(theirs, (ours,)) for ours, theirs in names.items())


def _block(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"blocks.*.{ours}": prefix + theirs for ours, theirs in names.items()}


# ------------------------------------------------------------------ what many have in common

_ATTENTION: Final = _block(
    "model.layers.*.self_attn.",
    {
        "attn.q": "q_proj",
        "attn.k": "k_proj",
        "attn.v": "v_proj",
        "attn.q_norm": "q_norm",
        "attn.k_norm": "k_norm",
        "attn.o": "o_proj",
    },
)
_GATED_MLP: Final = _block(
    "model.layers.*.mlp.", {"mlp.gate": "gate_proj", "mlp.up": "up_proj", "mlp.down": "down_proj"}
)
_ENDS: Final = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_PRE: Final = _block(
    "model.layers.*.", {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
)
_POST: Final = _block(
    "model.layers.*.",
    {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
)
_BOTH: Final = _block(
    "model.layers.*.",
    {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
_LLAMA_SLOTS: Final = _slots(_ENDS | _ATTENTION | _GATED_MLP | _PRE)

_VOCABULARY: Final = field("vocab_size", "vocabulary")
_RMS_EPS: Final = field("rms_norm_eps", "norm_eps")
_SILU: Final = activation("hidden_act", "silu")
_QKVO: Final = ("q", "k", "v", "o")
_ATTENTION_BIAS: Final = bias("attention_bias", False, *_QKVO)
_PRE_RMS: Final = fixed(norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE)
_LAYER_NORM: Final = fixed(norm=Norm.LAYER, norm_bias=True, qk_norm=QKNorm.NONE)
_HEADS_GIVEN: Final = ("head_width",)
"""For `sizes(derived=)`: num_key_value_heads must be there, for its default is a fixed number."""


def _tied(default: bool) -> Rule:
    return field("tie_word_embeddings", "tied", default)


# ------------------------------------------------------------------ AI2

_OLMO2: Final = (
    _VOCABULARY,
    sizes(),
    fixed(norm_place=NormPlace.POST, qk_norm=QKNorm.FULL),
    _RMS_EPS,
    _SILU,
    _ATTENTION_BIAS,
    _tied(False),
)

OLMO2: Final = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "model.",
    (*_OLMO2, rope(), only("clip_qkv", None)),
    _slots(_ENDS | _ATTENTION | _GATED_MLP | _POST),
)

OLMO3: Final = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    "model.",
    (
        *_OLMO2,
        windows_by_layer(lambda i, data: FULL if i % 4 == 3 else SLIDING),
        rope_by_layer(500_000.0, 500_000.0),
    ),
    _slots(_ENDS | _ATTENTION | _GATED_MLP | _POST),
)

OLMO: Final = Family(
    "olmo",
    "OlmoForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(),
        _PRE_RMS,
        fixed(norm=Norm.LAYER, norm_gain=False, norm_eps=1e-5),
        _SILU,
        _ATTENTION_BIAS,
        nullable("clip_qkv", "qkv_clip"),
        rope(),
        _tied(False),
    ),
    _LLAMA_SLOTS,
)

# ------------------------------------------------------------------ Llama and its kin

LLAMA: Final = Family(
    "llama",
    "LlamaForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(),
        _PRE_RMS,
        _RMS_EPS,
        _SILU,
        _ATTENTION_BIAS,
        bias("mlp_bias", False, "gate", "up", "down"),
        rope(),
        _tied(False),
        only("rope_interleaved", False, None),
    ),
    _LLAMA_SLOTS,
)

SMOLLM3: Final = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(derived=_HEADS_GIVEN),
        _PRE_RMS,
        _RMS_EPS,
        _SILU,
        _ATTENTION_BIAS,
        bias("mlp_bias", False, "gate", "up", "down"),
        rope(theta=2_000_000.0),
        still_blocks(),
        windows_by_layer(
            lambda i, data: FULL if turns(i, data) or not data.get("sliding_window") else SLIDING,
            "use_sliding_window",
        ),
        _tied(True),
    ),
    _LLAMA_SLOTS,
)

MISTRAL: Final = Family(
    "mistral",
    "MistralForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(derived=_HEADS_GIVEN),
        _PRE_RMS,
        _RMS_EPS,
        _SILU,
        rope(),
        one_window(4096),
        _tied(False),
    ),
    _LLAMA_SLOTS,
)

_QWEN: Final = (
    _VOCABULARY,
    _RMS_EPS,
    _SILU,
    rope(),
    windows_by_layer(upper_blocks, "use_sliding_window", ("max_window_layers",)),
    _tied(False),
)

QWEN2: Final = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "model.",
    (
        sizes(derived=_HEADS_GIVEN),
        *_QWEN,
        _PRE_RMS,
        fixed(biases=("q", "k", "v")),
        only("use_mrope", False, None),
    ),
    _LLAMA_SLOTS,
)

QWEN3: Final = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "model.",
    (
        sizes(derived=()),
        *_QWEN,
        fixed(norm_place=NormPlace.PRE, qk_norm=QKNorm.HEAD),
        _ATTENTION_BIAS,
    ),
    _LLAMA_SLOTS,
)

# ------------------------------------------------------------------ Gemma

_GEMMA: Final = (
    _VOCABULARY,
    sizes(derived=()),
    scaled_embedding(),
    fixed(norm_offset=True),
    _RMS_EPS,
    _ATTENTION_BIAS,
    _tied(True),
    only("use_bidirectional_attention", False, None),
)
_TANH: Final = "gelu_pytorch_tanh"

GEMMA: Final = Family(
    "gemma",
    "GemmaForCausalLM",
    "model.",
    (
        *_GEMMA,
        rope(),
        _PRE_RMS,
        # the first releases said "gelu" and meant the approximation
        fixed(activation="gelu_tanh"),
        only("hidden_act", _TANH, "gelu", "gelu_new", None),
        only("hidden_activation", _TANH, None),
    ),
    _LLAMA_SLOTS,
)

GEMMA2: Final = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "model.",
    (
        *_GEMMA,
        rope(),
        fixed(norm_place=NormPlace.BOTH, qk_norm=QKNorm.NONE, activation="gelu_tanh"),
        only("hidden_activation", _TANH, "gelu_new", None),
        only("hidden_act", _TANH, "gelu_new", None),
        query_scalar("query_pre_attn_scalar", 256),
        nullable("attn_logit_softcapping", "score_cap", 50.0),
        nullable("final_logit_softcapping", "logit_cap", 30.0),
        windows_by_layer(lambda i, data: FULL if i % 2 else SLIDING),
    ),
    _slots(_ENDS | _ATTENTION | _GATED_MLP | _BOTH),
)


def _every_sixth(i: int, data: Values) -> str:
    """Gemma-3's pattern: every block of number sliding_window_pattern, by default 6, is full."""
    key = "sliding_window_pattern"
    return SLIDING if (i + 1) % natural({key: 6, **data}, key) else FULL


GEMMA3: Final = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "model.",
    (
        *_GEMMA,
        fixed(norm_place=NormPlace.BOTH, qk_norm=QKNorm.HEAD, activation="gelu_tanh"),
        only("hidden_activation", _TANH, None),
        only("hidden_act", _TANH, None),
        query_scalar("query_pre_attn_scalar", 256),
        nullable("final_logit_softcapping", "logit_cap"),
        windows_by_layer(_every_sixth, more=("sliding_window_pattern",)),
        only("_sliding_window_pattern", 6, None),  # written beside layer_types, and not read
        rope_by_layer(1_000_000.0, 10_000.0, "rope_local_base_freq"),
    ),
    _slots(_ENDS | _ATTENTION | _GATED_MLP | _BOTH),
)

# ------------------------------------------------------------------ GPT

_GPT: Final = fixed(norm_place=NormPlace.PRE, gated=False, rope_theta=None)
_GPT_ENDS: Final = {
    "embed": "transformer.wte",
    "position": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPT_NORMS: Final = _block("transformer.h.*.", {"attn_norm": "ln_1", "mlp_norm": "ln_2"})
_SUMMARY: Final = frozenset(
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj n_ctx reorder_and_upcast_attn".split()
)
"""Keys of a classification head, an older name of n_positions, and a choice of kernel."""

GPT2: Final = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    (
        _VOCABULARY,
        sizes("n_embd", "n_layer", "n_head", "n_inner", None, None, ("mlp_width",)),
        _GPT,
        _LAYER_NORM,
        fixed(biases=(*_QKVO, "up", "down")),
        field("layer_norm_epsilon", "norm_eps"),
        field("n_positions", "learned_positions"),
        activation("activation_function", "gelu_new"),
        choice("scale_attn_weights", "score_scale", {True: None, False: 1.0}, True),
        only("scale_attn_by_inverse_layer_idx", False, None),
        _tied(True),
    ),
    (
        *_slots(_GPT_ENDS | _GPT_NORMS),
        Slot(
            "transformer.h.*.attn.c_attn",
            ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"),
            Form.TURNED,
        ),
        Slot("transformer.h.*.attn.c_proj", ("blocks.*.attn.o",), Form.TURNED),
        Slot("transformer.h.*.mlp.c_fc", ("blocks.*.mlp.up",), Form.TURNED),
        Slot("transformer.h.*.mlp.c_proj", ("blocks.*.mlp.down",), Form.TURNED),
    ),
    (r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    _SUMMARY,
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
)

GPT_NEO: Final = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "transformer.",
    (
        _VOCABULARY,
        sizes(
            layers="num_layers",
            heads="num_heads",
            kv_heads=None,
            head_width=None,
            derived=("mlp_width",),
        ),
        _GPT,
        _LAYER_NORM,
        fixed(biases=("o", "up", "down"), score_scale=1.0),
        field("layer_norm_epsilon", "norm_eps"),
        field("max_position_embeddings", "learned_positions"),
        activation("activation_function", "gelu_new"),
        local_blocks(),
        _tied(True),
    ),
    _slots(
        _GPT_ENDS
        | _GPT_NORMS
        | _block(
            "transformer.h.*.",
            {
                "attn.q": "attn.attention.q_proj",
                "attn.k": "attn.attention.k_proj",
                "attn.v": "attn.attention.v_proj",
                "attn.o": "attn.attention.out_proj",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            },
        )
    ),
    (r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
    _SUMMARY,
    aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
)

GPT_NEOX: Final = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    (
        _VOCABULARY,
        sizes(kv_heads=None, head_width=None),
        _LAYER_NORM,
        fixed(norm_place=NormPlace.PRE, gated=False, biases=("up", "down")),
        field("layer_norm_eps", "norm_eps"),
        activation("hidden_act", "gelu"),
        bias("attention_bias", True, *_QKVO),
        choice(
            "use_parallel_residual",
            "residual",
            {True: Residual.PARALLEL, False: Residual.SEQUENTIAL},
            True,
        ),
        rope("rotary_emb_base", partial_key="rotary_pct", partial=0.25),
        _tied(False),
    ),
    (
        *_slots(
            {
                "embed": "gpt_neox.embed_in",
                "final_norm": "gpt_neox.final_layer_norm",
                "head": "embed_out",
            }
            | _block(
                "gpt_neox.layers.*.",
                {
                    "attn_norm": "input_layernorm",
                    "attn.o": "attention.dense",
                    "mlp_norm": "post_attention_layernorm",
                    "mlp.up": "mlp.dense_h_to_4h",
                    "mlp.down": "mlp.dense_4h_to_h",
                },
            )
        ),
        Slot(
            "gpt_neox.layers.*.attention.query_key_value",
            ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"),
            Form.HEADS,
        ),
    ),
    (r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",),
    in_memory={"lm_head": "embed_out"},
)

OPT: Final = Family(
    "opt",
    "OPTForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(mlp_width="ffn_dim", kv_heads=None, head_width=None),
        _GPT,
        _LAYER_NORM,
        fixed(norm_eps=1e-5, position_offset=2),
        field("max_position_embeddings", "learned_positions"),
        activation("activation_function", "relu"),
        bias("enable_bias", True, *_QKVO, "up", "down"),
        only("do_layer_norm_before", True, None),
        only("layer_norm_elementwise_affine", True, None),
        only("_remove_final_layer_norm", False, None),
        echo("word_embed_proj_dim", "hidden_size"),
        _tied(True),
    ),
    _slots(
        {
            "embed": "model.decoder.embed_tokens",
            "position": "model.decoder.embed_positions",
            "final_norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
        }
        | _block(
            "model.decoder.layers.*.",
            {
                "attn_norm": "self_attn_layer_norm",
                "attn.q": "self_attn.q_proj",
                "attn.k": "self_attn.k_proj",
                "attn.v": "self_attn.v_proj",
                "attn.o": "self_attn.out_proj",
                "mlp_norm": "final_layer_norm",
                "mlp.up": "fc1",
                "mlp.down": "fc2",
            },
        )
    ),
    irrelevant=frozenset("activation_dropout dropout init_std layerdrop".split()),
)

# ------------------------------------------------------------------ Phi

PHI: Final = Family(
    "phi",
    "PhiForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(),
        fixed(
            norm_place=NormPlace.PRE,
            norm=Norm.LAYER,
            norm_bias=True,
            residual=Residual.SHARED,
            gated=False,
            biases=(*_QKVO, "up", "down", "head"),
        ),
        field("layer_norm_eps", "norm_eps"),
        activation("hidden_act", "gelu_new"),
        choice("qk_layernorm", "qk_norm", {False: QKNorm.NONE, True: QKNorm.HEAD}, False),
        rope(partial_key="partial_rotary_factor", partial=0.5),
        _tied(False),
    ),
    _slots(
        _ENDS
        | {"final_norm": "model.final_layernorm"}
        | _ATTENTION
        | _block(
            "model.layers.*.",
            {
                "attn_norm": "input_layernorm",
                "attn.q_norm": "self_attn.q_layernorm",
                "attn.k_norm": "self_attn.k_layernorm",
                "attn.o": "self_attn.dense",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
            },
        )
    ),
)

_LONGROPE: Final = Kinds(
    built=(Scaling.LONGROPE,), names={"su": "longrope", "yarn": "longrope"}, original=4096
)
"""transformers takes "su" and "yarn" for other names of longrope in Phi-3."""

PHI3: Final = Family(
    "phi3",
    "Phi3ForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(),
        _PRE_RMS,
        _RMS_EPS,
        _SILU,
        rope(partial_key="partial_rotary_factor", kinds=_LONGROPE),
        one_window(None),
        only("attention_bias", False, None),
        only("mlp_bias", False, None),
        only("lm_head_bias", False, None),
        only("full_attn_mod", 1, None),
        only("interpolate_factor", 1, None),
        _tied(False),
    ),
    (
        *_slots(
            _ENDS
            | _PRE
            | _block("model.layers.*.", {"attn.o": "self_attn.o_proj", "mlp.down": "mlp.down_proj"})
        ),
        Slot(
            "model.layers.*.self_attn.qkv_proj",
            ("blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v"),
        ),
        Slot("model.layers.*.mlp.gate_up_proj", ("blocks.*.mlp.gate", "blocks.*.mlp.up")),
    ),
)

# ------------------------------------------------------------------ others

STARCODER2: Final = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(derived=_HEADS_GIVEN),
        _LAYER_NORM,
        fixed(norm_place=NormPlace.PRE, gated=False),
        field("norm_epsilon", "norm_eps"),
        activation("hidden_act", _TANH),
        bias("use_bias", True, *_QKVO, "up", "down"),
        rope(),
        one_window(None),
        only("mlp_type", "default", None),
        only("norm_type", "layer_norm", None),
        echo("layer_norm_epsilon", "norm_epsilon"),
        _tied(True),
    ),
    _slots(
        _ENDS
        | _ATTENTION
        | _PRE
        | _block("model.layers.*.mlp.", {"mlp.up": "c_fc", "mlp.down": "c_proj"})
    ),
    irrelevant=frozenset({"activation_function"}),  # its activation is hidden_act
)

STABLELM: Final = Family(
    "stablelm",
    "StableLmForCausalLM",
    "model.",
    (
        _VOCABULARY,
        sizes(head_width=None, derived=()),
        _LAYER_NORM,
        fixed(norm_place=NormPlace.PRE),
        field("layer_norm_eps", "norm_eps"),
        _SILU,
        bias("use_qkv_bias", False, "q", "k", "v"),
        not_built(
            "qk_layernorm", "a norm of queries and keys with a gain of its own for each head"
        ),
        choice(
            "use_parallel_residual",
            "residual",
            {False: Residual.SEQUENTIAL, True: Residual.SHARED},
            False,
        ),
        rope(partial_key="partial_rotary_factor", partial=0.25),
        _tied(False),
    ),
    _LLAMA_SLOTS,
)

# ------------------------------------------------------------------ images


_VISION_IN_MEMORY: Final = {
    "layernorm_before": "layernorm_before",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "layernorm_after": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _vision(model_type: str, architecture: str, specials: tuple[str, ...]) -> Family:
    at = f"{model_type}.encoder.layer.*."
    tokens = tuple(
        Slot(f"{model_type}.embeddings.{name}_token", (name,), Form.BARE) for name in specials
    )
    return Family(
        model_type,
        architecture,
        f"{model_type}.",
        (
            sizes(kv_heads=None),
            _LAYER_NORM,
            fixed(
                norm_place=NormPlace.PRE,
                rope_theta=None,
                gated=False,
                causal=False,
                tied=False,
                pool=Pool.CLS,
                biases=("patch", "o", "up", "down", "head"),
            ),
            field("layer_norm_eps", "norm_eps"),
            activation("hidden_act", "gelu"),
            bias("qkv_bias", True, "q", "k", "v"),
            images(specials),
        ),
        (
            *_slots({"final_norm": f"{model_type}.layernorm", "head": "classifier"}),
            *_slots(
                _block(
                    at,
                    {
                        "attn_norm": "layernorm_before",
                        "attn.q": "attention.attention.query",
                        "attn.k": "attention.attention.key",
                        "attn.v": "attention.attention.value",
                        "attn.o": "attention.output.dense",
                        "mlp_norm": "layernorm_after",
                        "mlp.up": "intermediate.dense",
                        "mlp.down": "output.dense",
                    },
                )
            ),
            *tokens,
            Slot(f"{model_type}.embeddings.position_embeddings", ("position",), Form.BARE),
            Slot(f"{model_type}.embeddings.patch_embeddings.projection", ("patch",), Form.PATCH),
        ),
        (rf"{model_type}\.pooler\.dense\.(weight|bias)",),
        frozenset({"encoder_stride", "pooler_act", "pooler_output_size", "tie_word_embeddings"}),
        {
            "DeiTForImageClassificationWithTeacher": "it averages two heads, one on the "
            "distillation token. refcurv computes one; save it as DeiTForImageClassification",
        },
        in_memory={
            f"{model_type}.layers.*.{mine}": at + theirs
            for mine, theirs in _VISION_IN_MEMORY.items()
        },
    )


VIT: Final = _vision("vit", "ViTForImageClassification", ("cls",))
DEIT: Final = _vision("deit", "DeiTForImageClassification", ("cls", "distillation"))

FAMILIES: Final = (
    OLMO2,
    OLMO3,
    OLMO,
    LLAMA,
    SMOLLM3,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    OPT,
    PHI,
    PHI3,
    STARCODER2,
    STABLELM,
    VIT,
    DEIT,
)
