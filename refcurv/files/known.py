"""The keys of a config.json that no family reads: which are harmless, and with which values.

A key is harmless if the family's forward does not depend on it. Any other key is an error, for it
might change the mathematics. The error names all such keys; the user may ignore them by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from refcurv.files.families import Family
from refcurv.files.keys import Fields, Rule, Values, echo, natural, only
from refcurv.files.mistaken import dequantise
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.model.config import ModelConfig


def _checked(key: str, check: Any) -> Rule:
    """A key that gives no field: `check(value, config.json)` raises if its value matters."""

    def read(data: Values, found: Fields) -> Fields:
        check(data.get(key), data)
        return {}

    def write(config: ModelConfig) -> Fields:
        return {}

    return Rule((key,), read, write)


def _not_quantised(value: object, data: Values) -> None:
    if value is None or value == {}:
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    if method is None and isinstance(value, dict):
        bits = value.get("load_in_4bit") or value.get("load_in_8bit")
        method = "bitsandbytes" if bits else None
    name = method if isinstance(method, str) else "an unknown method"
    raise ConventionError(
        f"quantization_config is of {name:.40}: refcurv computes with plain numbers; "
        f"{dequantise(name)}"
    )


def _not_mlx(value: object, data: Values) -> None:
    if value is not None:
        raise ConventionError(
            f"quantization is {value!r:.60}, as MLX writes it: take the checkpoint that it was "
            "made from, or mlx_lm.convert --dequantize"
        )


def _parts(value: object, data: Values) -> None:
    if value is not None:
        natural(data, "pretraining_tp")


def _no_score_cap(value: object, data: Values) -> None:
    if value is not None:
        raise ConventionError(
            f"attn_logit_softcapping is {value!r:.40}, and in this family transformers caps no "
            "scores. To convert what it computes: --ignore-key attn_logit_softcapping "
            "(ignore_keys=['attn_logit_softcapping'])"
        )


EVERYWHERE: Final = {
    rule.keys[0]: rule
    for rule in (
        _checked("quantization_config", _not_quantised),
        _checked("quantization", _not_mlx),
        only("partial_rotary_factor", 1, None),
        only("is_encoder_decoder", False, None),
        only("tie_encoder_decoder", False, None),
        only("add_cross_attention", False, None),
        only("cross_attention_hidden_size", None),
        only("pruned_heads", {}, None),
        only("chunk_size_feed_forward", 0, None),
    )
}
"""Rules for keys that transformers reads in any family; a family's own rule comes first."""

ELSEWHERE: Final = {
    rule.keys[0]: rule
    for rule in (
        only("clip_qkv", None),
        only("sliding_window", None),
        _checked("attn_logit_softcapping", _no_score_cap),
        echo("sliding_window_size", "sliding_window"),
        _checked("pretraining_tp", _parts),  # the same products, in parts
    )
}
"""Keys that other families read. A user who knows that this one does not may ignore them."""

_GENERATION: Final = (
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id cache_config "
    "cache_implementation compile_config constraints continuous_batching_config "
    "decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers "
    "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id "
    "eos_token_ids epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
    "forced_bos_token_id forced_eos_token_id guidance_scale is_assistant length_penalty "
    "low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time "
    "min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_logits output_scores pad_token_id "
    "penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values "
    "renormalize_logits repetition_penalty return_dict_in_generate return_legacy_cache "
    "sep_token_id sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind "
    "temperature token_healing top_h top_k top_p typical_p use_cache watermarking_config".split()
)
"""Keys that generation reads, and no forward."""

IRRELEVANT: Final = frozenset(_GENERATION) | frozenset(
    "architectures attn_implementation custom_pipelines dtype finetuning_task "
    "gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id "
    "max_position_embeddings max_sequence_length model_max_length n_special neftune_noise_alpha "
    "output_past predict_special_tokens prefix problem_type processor_class return_dict "
    "task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript "
    "transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 "
    "xla_device _attn_implementation _attn_implementation_autoset _commit_hash "
    "_flash_attn_2_enabled _from_model_config _name_or_path _num_labels attention_dropout "
    "attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop embed_dropout "
    "embedding_dropout hidden_dropout hidden_dropout_prob resid_dropout resid_pdrop "
    "residual_dropout".split()
)
"""Keys of no consequence for a forward and backward pass on given tokens, without dropout.

`pad_token_id` has a consequence in torch: the embedding of that token gets no gradient. Here every
embedding has the gradient of the loss.
"""

_OTHER_HEADS: Final = {
    "ForSequenceClassification": "a score in place of the head: a reward model or a classifier",
    "ForTokenClassification": "labels of tokens in place of the head",
    "ForQuestionAnswering": "spans in place of the head",
    "ForMaskedImageModeling": "a decoder of pixels in place of the classes",
    "DoubleHeadsModel": "a second head",
}


def require_known(family: Family, data: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Refuse unknown keys, which might change the mathematics, and classes with another head."""
    own = {key for rule in family.rules for key in rule.keys} | {"model_type"} | set(family.aliases)
    _require_ignorable(own, data, ignore)
    _require_class(family, data)
    unknown = []
    for key in sorted(data.keys() - own - set(ignore)):
        if key in EVERYWHERE:
            EVERYWHERE[key].read(data, {})
        elif key in ELSEWHERE:
            ELSEWHERE[key].read(data, {})
        elif key == "auto_map":
            _require_own_code(family, data[key])
        elif key not in IRRELEVANT and key not in family.irrelevant:
            unknown.append(key)
    if unknown:
        few = ", ".join(f"{key!r:.40}" for key in unknown[:12])
        more = f" and {len(unknown) - 12} more" if len(unknown) > 12 else ""
        what = "the key {} is" if len(unknown) == 1 else "the keys {} are"
        raise ConventionError(
            f"{what.format(few + more)} unknown and might change the mathematics. If not, name "
            "each with --ignore-key (ignore_keys=[...])"
        )


def _require_ignorable(own: set[str], data: Mapping[str, Any], ignore: Collection[str]) -> None:
    for key in sorted(ignore):
        if key in own or key in EVERYWHERE:
            raise ConventionError(
                f"the key {key!r:.80} cannot be ignored: the model is computed from it"
            )
        if key not in data:
            raise SchemaError(f"the key {key!r:.80} is to be ignored, but is not there")


def _require_class(family: Family, data: Mapping[str, Any]) -> None:
    """Refuse a class in `architectures` that is known and is not the family's whole model."""
    classes = data.get("architectures")
    reasons = dict(family.refused or {})
    for name in classes if isinstance(classes, list) else ():
        for ending, reason in _OTHER_HEADS.items():
            if isinstance(name, str) and name.endswith(ending):
                reasons[name] = f"it has {reason}. refcurv computes {family.architecture}"
        if isinstance(name, str) and name in reasons:
            raise ConventionError(f"architectures has {name:.80}: {reasons[name]}")


def _require_own_code(family: Family, value: object) -> None:
    """Refuse an auto_map with code of another class than the family's; a copy of it is accepted."""
    kind = "AutoModelForImageClassification" if "Image" in family.architecture else ""
    named = value.get(kind or "AutoModelForCausalLM") if isinstance(value, dict) else value
    name = named.rpartition(".")[2] if isinstance(named, str) else named
    if name is None or (isinstance(name, str) and name.lower() == family.architecture.lower()):
        return
    raise ConventionError(
        f"auto_map names code of its own, {named!r:.80}, which might compute otherwise than "
        f"{family.architecture}. If not: --ignore-key auto_map (ignore_keys=['auto_map'])"
    )
