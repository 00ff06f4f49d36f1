"""files/naming.py: what tensors are called, under whatever prefix, wrapper or release."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from names_in_memory import in_memory
from strategies import few
from test_families import KINDS, checkpoint, config_of

from refcurv.files import naming, safetensors, slots, weights
from refcurv.files.families import FAMILIES, Family
from refcurv.files.huggingface import conversion, convert, export, read_config
from refcurv.files.naming import Plan
from refcurv.files.safetensors import Tensor
from refcurv.files.store import open_file
from refcurv.law.checks import ConventionError, SchemaError
from refcurv.model.config import ModelConfig

NOWHERE = Path("no such file")


def record(name: str, shape: tuple[int, ...] = (1,)) -> Tensor:
    return Tensor(name, "float32", shape, NOWHERE, 0, 0)


def records(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, none of them on disk."""
    shapes = config.parameter_shapes()
    return {
        name: record(name, slots.tensor_shape(slot, config, [shapes[p] for p in ours]))
        for name, (slot, ours) in naming.tensors_of(family, config).items()
    }


def tensors_of(kind: str, **changed: Any) -> tuple[Family, ModelConfig, dict[str, Tensor]]:
    family, config = read_config("x", json.dumps(config_of(kind, **changed)))
    return family, config, records(family, config)


def renamed(tensors: dict[str, Tensor], change: Any) -> dict[str, Tensor]:
    return {change(n): dataclasses.replace(t, name=change(n)) for n, t in tensors.items()}


def same_sources(one: Plan, two: Plan, change: Any) -> bool:
    """Each parameter from the same part of the same tensor, under its changed name."""
    return list(one.sources) == list(two.sources) and all(
        (change(a.tensor.name), a.index, a.ours) == (b.tensor.name, b.index, b.ours)
        for a, b in zip(one.sources.values(), two.sources.values(), strict=True)
    )


# ------------------------------------------------------------------ prefixes

PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "model.", "transformer.", "a.b-1.")


@pytest.mark.parametrize("kind", KINDS)
@few(8)
@given(data=st.data())
def test_a_prefix_of_all_names_is_left_out(kind: str, data: st.DataObject) -> None:
    """Any of them, several, one that the family has itself; and the base model's may be missing."""
    family, config, tensors = tensors_of(kind)
    before = "".join(data.draw(st.lists(st.sampled_from(PREFIXES), max_size=3)))
    bare = data.draw(st.booleans())
    wrapper = data.draw(st.sampled_from(["", "_orig_mod.", "_fsdp_wrapped_module."]))

    def change(name: str) -> str:
        own = name.removeprefix(family.prefix) if bare else name
        own = re.sub(r"(?<=\.)(\d+\.)", rf"\1{wrapper}", own, count=1)
        return before + own

    found = naming.plan("x", family, config, renamed(tensors, change))
    assert same_sources(naming.plan("x", family, config, tensors), found, change)
    usual = all(change(n) in (n, n.removeprefix(family.prefix)) for n in tensors)
    assert (found.renamed == "") == usual


def test_what_is_left_out_is_said() -> None:
    family, config, tensors = tensors_of("llama")
    for before, said in {
        "": "",
        "module.": "left out 'module.' before the names",
        "_orig_mod.": "left out '_orig_mod' within names",
        "base_model.model.": "left out 'base_model.model.' before the names",
        "_orig_mod.module.": "left out 'module.' before the names and '_orig_mod' within names",
    }.items():
        found = naming.plan("x", family, config, renamed(tensors, lambda n, b=before: b + n))
        assert found.renamed == said


REPORTED = {
    "torch.compile of a DDP module": ("llama", "_orig_mod.module.", []),
    "GPT-2 in a wrapper, with its masks": (
        "gpt2", "model.", ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.bias"],
    ),
    "GPT-Neo as a backbone": ("gpt_neo", "backbone.", ["transformer.h.0.attn.attention.bias"]),
    "a text model of a vision model": ("llama", "language_model.", []),
}  # fmt: skip
"""Prefixes that public reports show, and the buffers beside them."""


@pytest.mark.parametrize("name", REPORTED)
def test_wrappers_that_were_reported(name: str) -> None:
    kind, before, buffers = REPORTED[name]
    family, config, tensors = tensors_of(kind)
    whole = tensors | {buffer: record(buffer) for buffer in buffers}
    found = naming.plan("x", family, config, renamed(whole, lambda n: before + n))
    assert same_sources(
        naming.plan("x", family, config, tensors), found, lambda n: before + n
    ) and len(found.ignored) == len(buffers)


def test_the_base_model_wrapped_and_its_head_not() -> None:
    family, config, tensors = tensors_of("llama")

    def change(name: str) -> str:
        return name if name.startswith("lm_head") else "model." + name

    found = naming.plan("x", family, config, renamed(tensors, change))
    assert same_sources(naming.plan("x", family, config, tensors), found, change)


def test_a_prefix_of_some_names_is_no_prefix() -> None:
    family, config, tensors = tensors_of("llama")
    half = renamed(tensors, lambda n: "module." + n if "layers.1" in n else n)
    with pytest.raises(SchemaError, match=r"lacks the tensor 'model\.layers\.1"):
        naming.plan("x", family, config, half)


def test_two_names_of_one_tensor_are_refused() -> None:
    family, config, tensors = tensors_of("llama")
    twin = "model._orig_mod.norm.weight"
    tensors[twin] = record(twin, (8,))
    with pytest.raises(SchemaError, match=r"norm\.weight' and .*norm\.weight', two names of one"):
        naming.plan("x", family, config, tensors)


def test_deep_names_take_no_time() -> None:
    """A header may hold a hundred million dots."""
    family, config, _ = tensors_of("llama")
    name = "a." * 300_000 + "weight"
    with pytest.raises(SchemaError, match="lacks the tensor"):
        naming.plan("x", family, config, {name: record(name)})


# ------------------------------------------------------------------ heads and buffers


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("vit", "deit")])
def test_a_tied_head_may_be_all_there_is(kind: str) -> None:
    """safetensors keeps one of two names of a shared tensor, and it may be the head's."""
    family, config, tensors = tensors_of(kind, tie_word_embeddings=True)
    head = next(s.theirs for s in family.slots if s.ours == ("head",)) + ".weight"
    embed = next(s.theirs for s in family.slots if s.ours == ("embed",)) + ".weight"
    tensors[head] = dataclasses.replace(tensors.pop(embed), name=head)
    found = naming.plan("x", family, config, tensors)
    assert found.sources["embed.weight"].tensor.name == head and not found.ignored


def test_an_untied_head_is_never_the_embedding() -> None:
    family, config, tensors = tensors_of("llama", tie_word_embeddings=False)
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(SchemaError, match=r"lacks the tensor 'model\.embed_tokens\.w"):
        naming.plan("x", family, config, tensors)


OLD_BUFFERS = {
    "llama": ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq",
              "model.rotary_emb.original_inv_freq",
              "model.layers.0.self_attn.rotary_emb.cos_cached"],
    "olmo3": ["model.rotary_emb.sliding_attention_inv_freq"],
    "gemma": ["model.embed_tokens.embed_scale", "model.rotary_emb.inv_freq"],
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "gpt_neo": ["transformer.h.0.attn.attention.bias",
                "transformer.h.0.attn.attention.masked_bias"],
    "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias",
                 "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
                 "gpt_neox.rotary_emb.inv_freq"],
    "phi": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
    "vit": ["vit.pooler.dense.weight", "vit.pooler.dense.bias"],
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("kind", OLD_BUFFERS)
def test_buffers_of_earlier_releases_are_ignored_and_listed(kind: str, prefix: str) -> None:
    family, config, tensors = tensors_of(kind)
    for name in OLD_BUFFERS[kind]:
        tensors[name] = record(name)
    found = naming.plan("x", family, config, renamed(tensors, lambda n: prefix + n))
    assert {t.name for t in found.ignored} == {prefix + name for name in OLD_BUFFERS[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_looks_like_a_buffer_is_refused(kind: str) -> None:
    for name in ("rotary_emb.scale", "inv_freq", "attn.mask", "rotary_emb.inv_freq.weight"):
        family, config, tensors = tensors_of(kind)
        tensors[family.prefix + name] = record(name)
        with pytest.raises(SchemaError, match="holds a tensor"):
            naming.plan("x", family, config, tensors)


# ------------------------------------------------------------------ names in memory


@pytest.mark.parametrize("kind", ["gpt_neox", "vit", "deit"])
@pytest.mark.parametrize("bare", [False, True])
def test_names_in_memory_by_hand(kind: str, bare: bool) -> None:
    """What transformers 5 has between loading and saving, and a plain state_dict therefore too."""
    family, config, tensors = tensors_of(kind)

    def change(name: str) -> str:
        name = in_memory(name)
        return name.removeprefix(family.prefix) if bare else name

    assert any(change(name) != name for name in tensors)
    found = naming.plan("x", family, config, renamed(tensors, change))
    assert same_sources(naming.plan("x", family, config, tensors), found, change)


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_saved_as_it_is(tmp_path: Path, kind: str) -> None:
    """transformers' own model, its state_dict with every buffer, no save_pretrained."""
    torch = pytest.importorskip("torch", reason="extra `peers`")
    transformers = pytest.importorskip("transformers", reason="extra `peers`")
    from safetensors.torch import save_file

    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    folder = checkpoint(tmp_path / "hf", config_of(kind) | ids, ("float32",))
    convert(folder, tmp_path / "one.h5")
    family = FAMILIES[KINDS.index(kind)]
    model = getattr(transformers, family.architecture).from_pretrained(folder)
    state = {n: t.clone() for n, t in (*model.state_dict().items(), *model.named_buffers())}
    state = {n: t for n, t in state.items() if t.dtype == torch.float32 and t.ndim}
    save_file(state, folder / "model.safetensors")
    mapped = convert(folder, tmp_path / "two.h5")
    one, two = weights.load(tmp_path / "one.h5"), weights.load(tmp_path / "two.h5")
    assert all(np.array_equal(a, two.parameters[n]) for n, a in one.parameters.items())
    buffers = {m.checkpoint_name for m in mapped if m.name is None}
    assert buffers <= {n for n, _ in model.named_buffers()} | {"lm_head.weight"}


# ------------------------------------------------------------------ from file to file


def with_names(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    read = {t.name: (t, safetensors.read_tensor(t)) for t in safetensors.read_header(path)}
    new = {change(name): both for name, both in read.items()}
    path.unlink()
    rows = [(name, t.stored, t.shape) for name, (t, _) in new.items()]
    safetensors.write_file(path, rows, lambda name: new[name][1])
    return folder


@pytest.mark.parametrize("kind", ["gpt_neox", "vit"])
def test_a_wrapped_checkpoint_comes_out_plain(tmp_path: Path, kind: str) -> None:
    """The same parameters; exported under the names that transformers loads; and it is written."""
    folder = checkpoint(tmp_path / "hf", config_of(kind))
    convert(folder, tmp_path / "plain.h5")
    with_names(folder, lambda n: "_orig_mod.module." + n)
    done = conversion(folder, tmp_path / "w.h5")
    assert done.renamed == open_file(tmp_path / "w.h5").provenance["renamed"]
    export(tmp_path / "plain.h5", tmp_path / "one")
    export(tmp_path / "w.h5", tmp_path / "two")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert one == two


def test_a_head_alone_comes_out_as_the_embedding(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", config_of("llama", tie_word_embeddings=True))
    convert(folder, tmp_path / "plain.h5")
    with_names(folder, lambda n: n.replace("model.embed_tokens", "lm_head"))
    mapped = {m.checkpoint_name: m.name for m in convert(folder, tmp_path / "w.h5")}
    assert mapped["lm_head.weight"] == "embed.weight"
    export(tmp_path / "plain.h5", tmp_path / "one")
    export(tmp_path / "w.h5", tmp_path / "two")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert one == two


STRANGE = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "PEFT adapter.*Merge it fir",
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": "PEFT adapter's. Merge it first",
    "model.layers.0.self_attn.q_proj.base_layer.weight": "PEFT adapter's. Merge it first",
    "model.layers.0.mlp.down_proj.SCB": "quantised by bitsandbytes: dequantise it first",
    "model.layers.0.self_attn.q_proj.qweight": "as GPTQ and AWQ write it: take the checkpoint",
    "model.layers.0.mlp.up_proj.weight.absmax": "bitsandbytes: dequantise it first",
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": "by bitsandbytes",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "FP8 and compressed-tensors .*dequantise",
    "model.layers.0.mlp.up_proj.weight_packed": "FP8 and compressed-tensors",
    "score.weight": "a reward model's or classifier's, in place of the head or beside it",
    "v_head.summary.weight": "a reward model's or classifier's",
    "model.layers.0.mlp.experts.3.up_proj.weight": "mixture of experts', which is not built yet",
    "layers.0.attention.wq.weight": "in the authors' own format. .*often called -hf",
    "model.transformer.blocks.0.ff_proj.weight": "in the authors' own format",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_tensor_that_says_what_a_checkpoint_is(name: str) -> None:
    family, config, tensors = tensors_of("llama")
    tensors[name] = record(name)
    del tensors["lm_head.weight"]  # what is strange says more than what is missing
    with pytest.raises(ConventionError, match=STRANGE[name]) as caught:
        naming.plan("x", family, config, tensors)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
