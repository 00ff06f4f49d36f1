"""The architectures of GGUF files, as data: their metadata → the config.json of a known family.

A key of the metadata becomes a key of config.json, or must have one value, or is known not to
matter. Any other key is refused. What GGUF leaves out is assumed, as a table here says, and the
assumption is recorded. What a config.json means stays in `refcurv.files.families`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from refcurv.files.gguf.reading import Contents, read_tensor
from refcurv.files.gguf.rotary import LONGROPE, kind_of, require_usual_attention, scaling
from refcurv.files.keys import FULL, SLIDING
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.law.words import number_of

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a `general.architecture` means.

    Fields:
        family: the model_type of the family that computes it.
        keys: keys of the metadata, without the architecture's name → keys of config.json.
        assumed: what GGUF does not say: keys of config.json → the family's own values.
        more: (contents, config.json so far) → more of config.json, and more that is assumed.
        known: further keys, which `more` reads.
        permuted: the rows of q and k are interleaved, as llama.cpp's rotary positions want them.
        shifted: a gain holds 1 + w where the checkpoint has w.
    """

    family: str
    keys: Mapping[str, str]
    assumed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Contents, Values], tuple[Values, Values]] = lambda found, config: ({}, {})
    known: tuple[str, ...] = ()
    permuted: bool = False
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class Described:
    """A GGUF file's model: its architecture, the config.json, and what of it was assumed."""

    architecture: Architecture
    config: Values
    assumed: Values


# ------------------------------------------------------------------ what all have in common

_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_ROPE: Final = {"rope.freq_base": "rope_theta"}
_RMS: Final = _SIZES | _ROPE | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_OPTIONAL: Final = ("attention.key_length", "attention.head_count_kv", *_ROPE)

_HANDLED: Final = (
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
)
_HARMLESS: Final = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that could change the mathematics, and the values with which they do not."""

_ABOUT: Final = re.compile(
    r"general\.(type|name|author|version|organization|finetune|basename|description|quantized_by"
    r"|size_label|quantization_version|alignment|file_type|architecture|url|doi|uuid|repo_url|tags"
    r"|languages|datasets|license(\.\w+)?|(source|sampling|base_model|dataset)\..+)"
    r"|tokenizer\..+|quantize\..+|split\.(no|count|tensors\.count)|GGUF\.\w+"
)
"""Keys about the file and its tokenizer, on which no forward depends."""

_OTHER_TYPES: Final = {
    "adapter": "a LoRA adapter, not a model. Merge it into its model first",
    "imatrix": "an importance matrix, not a model",
    "mmproj": "the part of a model that reads images, not a language model",
}


def describe(found: Contents, ignore: Collection[str] = ()) -> Described:
    """The model that the metadata describe. `ignore` are unknown keys that the caller vouches for.

    Raises:
        ConventionError: an architecture or a key that is not known here.
        SchemaError: a key is missing, or contradicts another one or a tensor.

    Proof: tests/test_gguf.py::test_every_key_is_known_or_refused
    """
    where = f"convert: {found.where}"
    kind, name = found.get("general.type"), found.get("general.architecture")
    if isinstance(kind, str) and kind in _OTHER_TYPES:
        raise ConventionError(f"{where} is {_OTHER_TYPES[kind]}.")
    known = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if known is None:
        raise ConventionError(
            f"{where}: general.architecture is {name!r:.60}, which is not built yet; known are "
            f"{', '.join(ARCHITECTURES)}."
        )
    _require_known(where, found, name, known, ignore)
    values = _own_values(where, found, name, known)
    config = {"model_type": known.family} | _common(where, found, name, known, values)
    assumed = dict(known.assumed)
    if "rope.freq_base" in known.keys and "rope.freq_base" not in values:
        assumed[known.keys["rope.freq_base"]] = 10_000.0
    config |= assumed
    if "rope.scaling.type" not in values and kind_of(values) != "none":
        assumed["rope.scaling.type"] = kind_of(values)
    more, guessed = known.more(found, config)
    return Described(known, config | more | guessed, assumed | guessed)


def _require_known(
    where: str, found: Contents, name: str, known: Architecture, ignore: Collection[str]
) -> None:
    """Each key is read, or about the file, or harmless with its value, or to be ignored."""
    own = {*known.keys, *known.known, *_HANDLED}
    unknown = []
    for key in ignore:
        if key not in found.fields:
            raise SchemaError(f"{where}: the key {key!r:.80} is to be ignored, but is not there.")
    for key in found.fields:
        mine = key.removeprefix(f"{name}.")
        if _ABOUT.fullmatch(key) or (mine != key and mine in own):
            if key in ignore:
                raise ConventionError(
                    f"{where}: the key {key!r:.80} cannot be ignored: the model is computed from it"
                    ", or it changes nothing."
                )
        elif key in ignore:
            continue
        elif mine == key or mine not in _HARMLESS:
            unknown.append(key)
        elif found.get(key) not in _HARMLESS[mine]:
            experts = " A mixture of experts is not built yet." if "expert" in mine else ""
            raise ConventionError(
                f"{where}: {key} is {found.get(key)!r:.60}; refcurv computes only "
                f"{_HARMLESS[mine][0]!r}.{experts}"
            )
    if unknown:
        few = ", ".join(f"{key!r:.60}" for key in sorted(unknown)[:12])
        raise ConventionError(
            f"{where}: unknown keys that might change the mathematics: {few}. If not, name each "
            "with --ignore-key (ignore_keys=[...])."
        )


def _own_values(where: str, found: Contents, name: str, known: Architecture) -> Values:
    """The architecture's own keys; one value for each block becomes one value, if all agree."""
    values: Values = {}
    for key in (*known.keys, *known.known, *_HANDLED):
        value = found.get(f"{name}.{key}")
        if isinstance(value, list) and key not in known.known:
            if len({repr(one) for one in value}) != 1:  # none, or different ones
                raise ConventionError(
                    f"{where}: {name}.{key} differs between blocks: {value!r:.60}; refcurv has one "
                    "value for all."
                )
            value = value[0]
        if value is None and key in known.keys and key not in _OPTIONAL:
            raise SchemaError(f"{where} lacks the key '{name}.{key}'.")
        if value is not None:
            values[key] = value
            _require_value(f"{where}: {name}.{key}", key, value)
    if values["block_count"] > len(found.tensors):  # before as many names are made
        raise SchemaError(
            f"{where}: {name}.block_count is {values['block_count']}, but there are only "
            f"{number_of(len(found.tensors), 'tensor')}."
        )
    return values


def _require_value(what: str, key: str, value: object) -> None:
    """A size is a positive integer; what else is read is a number, a flag or a kind's name."""
    if key in (*_SIZES, "attention.value_length", "rope.dimension_count", "vocab_size"):
        if type(value) is not int or not 1 <= value < 2**31:
            raise SchemaError(f"{what} must be a positive integer; got {value!r:.40}.")
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, str) != (key == "rope.scaling.type") or not finite:
        raise SchemaError(f"{what} is {value!r:.40}.")


def _common(where: str, found: Contents, name: str, known: Architecture, values: Values) -> Values:
    """What all architectures say in the same way."""
    config = {theirs: values[key] for key, theirs in known.keys.items() if key in values}
    rows = _vocabulary(where, found, values.get("vocab_size"))
    config |= {"vocab_size": rows, "tie_word_embeddings": "output.weight" not in found.tensors}
    width, heads = values["embedding_length"], values["attention.head_count"]
    head = values.get("attention.key_length", max(width // heads, 1))
    if values.get("attention.value_length", head) != head:
        raise ConventionError(
            f"{where}: attention.key_length and value_length differ; refcurv has one for both."
        )
    if "head_dim" in known.keys.values():
        config = {"num_key_value_heads": heads} | config | {"head_dim": head}
    turning = values.get("rope.dimension_count", head)
    if "rope.freq_base" in known.keys and turning != head:
        config["partial_rotary_factor"] = turning / head
    return config | scaling(where, found, name, values)


def _vocabulary(where: str, found: Contents, said: object) -> int:
    """The rows of the embedding, which all that counts tokens must agree with."""
    table = found.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise SchemaError(f"{where} has no matrix 'token_embd.weight'.")
    listed = found.fields.get("tokenizer.ggml.tokens")
    counts = {"vocab_size": said, "tokens listed": None if listed is None else len(listed.data)}
    for what, count in counts.items():
        if count not in (None, table.shape[0]):
            raise SchemaError(
                f"{where}: {what}: {count!r:.40}, but token_embd.weight has "
                f"{number_of(table.shape[0], 'row')}."
            )
    return table.shape[0]


# ------------------------------------------------------------------ the architectures


def _has(found: Contents, *names: str) -> bool:
    return any(name in found.tensors for name in names)


def _llama(found: Contents, config: Values) -> tuple[Values, Values]:
    guessed = {"rope_scaling": config["rope_scaling"]} if "rope_scaling" in config else {}
    return {
        "attention_bias": _has(found, "blk.0.attn_q.bias"),
        "mlp_bias": _has(found, "blk.0.ffn_up.bias"),
    }, guessed if "rope_freqs.weight" in found.tensors else {}


def _with_attention_bias(found: Contents, config: Values) -> tuple[Values, Values]:
    return {"attention_bias": _has(found, "blk.0.attn_q.bias")}, {}


def _scalar(found: Contents, config: Values, averaged: int) -> Values:
    """Gemma scales queries by the head's width, but the 27B of `averaged` blocks by width/heads."""
    per_head = config["num_hidden_layers"] == averaged
    width = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": width if per_head else config["head_dim"]}


def _caps(found: Contents, name: str) -> tuple[Values, Values]:
    defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    said = {key: found.get(f"{name}.{key}") for key in defaults}
    return (
        {key: value for key, value in said.items() if value is not None},
        {key: defaults[key] for key, value in said.items() if value is None},
    )


def _gemma2(found: Contents, config: Values) -> tuple[Values, Values]:
    window = found.get("gemma2.attention.sliding_window")
    said, guessed = _caps(found, "gemma2")
    said |= {} if window is None else {"sliding_window": window}
    guessed |= {"sliding_window": 4096} if window is None else {}
    return said, guessed | _scalar(found, config, 46) | _alternating(config, 2)


def _alternating(config: Values, period: int) -> Values:
    """Every `period`-th block attends to all; the others have the window."""
    layers = config["num_hidden_layers"]
    return {"layer_types": [SLIDING if (i + 1) % period else FULL for i in range(layers)]}


def _gemma3(found: Contents, config: Values) -> tuple[Values, Values]:
    """Gemma 3: two bases of rotary positions, five blocks with a window to one without."""
    window, local = (
        found.get(f"gemma3.{key}") for key in ("attention.sliding_window", "rope.freq_base_swa")
    )
    cap = found.get("gemma3.final_logit_softcapping")
    said: Values = {"final_logit_softcapping": cap}
    guessed: Values = _scalar(found, config, 62)
    if window is None:
        said["layer_types"] = [FULL] * config["num_hidden_layers"]
    else:
        said["sliding_window"] = window
        guessed |= _alternating(config, 6)
    base = 10_000.0 if local is None else local
    (guessed if local is None else said)["rope_local_base_freq"] = base
    return said, guessed


def _phi3(found: Contents, config: Values) -> tuple[Values, Values]:
    window = found.get("phi3.attention.sliding_window")
    if window is None:
        raise SchemaError(f"convert: {found.where} lacks the key 'phi3.attention.sliding_window'.")
    said: Values = {"sliding_window": window or None}
    factors = {
        f"{kind}_factor": found.tensors.get(tensor)
        for kind, tensor in zip(("long", "short"), LONGROPE, strict=True)
    }
    if not any(factors.values()):
        return said, {}
    if not all(factors.values()):
        raise SchemaError(f"convert: {found.where} has only one of rope_factors_long and _short.")
    original = found.get("phi3.rope.scaling.original_context_length")
    block: Values = {
        key: [float(str(x)) for x in read_tensor(tensor).reshape(-1)]
        for key, tensor in factors.items()
        if tensor is not None
    }
    require_usual_attention(found, config["max_position_embeddings"], original)
    said |= {
        "rope_scaling": {"rope_type": "longrope", **block},
        "original_max_position_embeddings": original,
    }
    return said, {}


def _olmo2(found: Contents, config: Values) -> tuple[Values, Values]:
    """OLMo 2; with a window, OLMo 3, which llama.cpp writes under the same name.

    A scaling of OLMo 3's rotary positions is that of the blocks without a window.
    """
    said: Values = {"attention_bias": _has(found, "blk.0.attn_q.bias")}
    window, pattern = (
        found.get(f"olmo2.attention.{key}") for key in ("sliding_window", "sliding_window_pattern")
    )
    if not window:
        return said, {}
    base = {"rope_theta": config["rope_theta"]}
    full = {"rope_type": "default"} | config.get("rope_scaling", {}) | base
    said |= {
        "model_type": "olmo3",
        "sliding_window": window,
        "rope_parameters": {FULL: full, SLIDING: {"rope_type": "default"} | base},
        "rope_theta": None,
        "rope_scaling": None,
    }
    if pattern is None:
        return said, _alternating(config, 4)
    if not isinstance(pattern, list) or {bool} != {*map(type, pattern)}:
        raise SchemaError(
            f"convert: {found.where}: olmo2.attention.sliding_window_pattern must be true or false "
            f"for each block; got {pattern!r:.60}."
        )
    return said | {"layer_types": [SLIDING if one else FULL for one in pattern]}, {}


def _gpt2(found: Contents, config: Values) -> tuple[Values, Values]:
    table = found.tensors.get("position_embd.weight")
    rows = None if table is None else table.shape[0]
    if rows != config["n_positions"]:
        raise SchemaError(
            f"convert: {found.where}: context_length is {config['n_positions']!r:.40}, but "
            f"position_embd.weight has {number_of(rows or 0, 'row')}."
        )
    return {}, {}


def _gptneox(found: Contents, config: Values) -> tuple[Values, Values]:
    share = config.get("partial_rotary_factor", 1.0)
    return {
        "attention_bias": _has(found, "blk.0.attn_qkv.bias"),
        "rotary_pct": share,
        "partial_rotary_factor": None,
    }, {}


_SILU: Final = {"hidden_act": "silu"}
_TANH: Final = {"hidden_activation": "gelu_pytorch_tanh"}
_CAPS: Final = ("attn_logit_softcapping", "final_logit_softcapping")
_NEOX_KEYS: Final = {
    **{key: theirs for key, theirs in _SIZES.items() if key not in _OPTIONAL},
    "rope.freq_base": "rotary_emb_base",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}
_GPT2_KEYS: Final = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

ARCHITECTURES: Final = {
    "llama": Architecture("llama", _RMS, _SILU, _llama, permuted=True),
    "qwen2": Architecture("qwen2", _RMS, _SILU),
    "qwen3": Architecture("qwen3", _RMS, _SILU, _with_attention_bias),
    "gemma": Architecture("gemma", _RMS, _TANH, shifted=True),
    "gemma2": Architecture(
        "gemma2", _RMS, _TANH, _gemma2, ("attention.sliding_window", *_CAPS), shifted=True
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _RMS,
        _TANH,
        _gemma3,
        ("attention.sliding_window", "rope.freq_base_swa", "final_logit_softcapping"),
        shifted=True,
    ),
    "phi3": Architecture("phi3", _RMS, _SILU, _phi3, ("attention.sliding_window",)),
    "olmo2": Architecture(
        "olmo2",
        _RMS,
        _SILU,
        _olmo2,
        ("attention.sliding_window", "attention.sliding_window_pattern"),
    ),
    "gpt2": Architecture("gpt2", _GPT2_KEYS, {"activation_function": "gelu_new"}, _gpt2),
    "gptneox": Architecture("gpt_neox", _NEOX_KEYS, {"hidden_act": "gelu"}, _gptneox),
}
