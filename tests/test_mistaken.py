"""files/mistaken.py: what people take for a checkpoint, and the one sentence about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_families import checkpoint, config_of
from test_naming import with_names

from refcurv.cli import main
from refcurv.files import safetensors
from refcurv.files.checkpoints import BESIDE
from refcurv.files.huggingface import conversion, convert

Make = Callable[[Path], Path]
"""An empty folder → what the user gives."""


def sound(folder: Path) -> Path:
    return checkpoint(folder / "hf", config_of("llama"), ("float32",))


def without_weights(*names: str) -> Make:
    def make(folder: Path) -> Path:
        made = sound(folder)
        (made / "model.safetensors").unlink()
        for name in names:
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes(b"{}")
        return made

    return make


def only(*names: str) -> Make:
    def make(folder: Path) -> Path:
        made = folder / "hf"
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text("{}")
        return made

    return make


def adapter(folder: Path) -> Path:
    made = only("adapter_config.json", "adapter_model.safetensors")(folder)
    base = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}
    (made / "adapter_config.json").write_text(json.dumps(base))
    return made


def adapter_config_is_a_pipe(folder: Path) -> Path:
    made = folder / "hf"
    made.mkdir()
    os.mkfifo(made / "adapter_config.json")
    return made


def named(name: str) -> Make:
    return lambda folder: Path(name)


def headless(folder: Path) -> Path:
    made = sound(folder)
    path = made / "model.safetensors"
    tensors = [t for t in safetensors.read_header(path) if t.name != "lm_head.weight"]
    read = {t.name: safetensors.read_tensor(t) for t in tensors}
    path.unlink()
    rows = [(t.name.removeprefix("model."), t.stored, t.shape) for t in tensors]
    safetensors.write_file(path, rows, lambda name: read["model." + name])
    return made


def reward_model(folder: Path) -> Path:
    made = sound(folder)
    config = config_of("llama", architectures=["LlamaForSequenceClassification"])
    (made / "config.json").write_text(json.dumps(config))
    return made


def quantised(method: str) -> Make:
    def make(folder: Path) -> Path:
        made = sound(folder)
        config = config_of("llama", quantization_config={"quant_method": method, "bits": 4})
        (made / "config.json").write_text(json.dumps(config))
        return made

    return make


def a_file(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"GGML")
        return folder / name

    return make


SHARD = "model-00001-of-00002.safetensors"
MISTAKES: dict[str, tuple[Make, str]] = {
    "a hub name": (
        named("allenai/OLMo-2-0425-1B"),
        "hf download allenai/OLMo-2-0425-1B --local-dir OLMo-2-0425-1B, and convert OLMo-2",
    ),
    "an address": (
        named("https://huggingface.co/Qwen/Qwen3-0.6B"),
        "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B",
    ),
    "a short name": (named("gpt2"), "hf download gpt2 --local-dir gpt2"),
    "no folder at all": (lambda folder: folder / "none", "there is no folder"),
    "a safetensors file": (a_file("model.safetensors"), "is a file. Give its folder, with the"),
    "config.json": (a_file("config.json"), "is a file. Give its folder."),
    "a GGUF file": (a_file("model-Q4_K_M.gguf"), "is no GGUF file, or cut short."),
    "a pickle": (a_file("pytorch_model.bin"), "is a pickle, which can run code when it is loaded"),
    "tokenizer.model": (a_file("tokenizer.model"), "is a tokenizer's file. Give the folder of"),
    "a weights file": (a_file("w.h5"), "is converted already"),
    "another file": (a_file("notes.txt"), "A checkpoint is a folder, or a GGUF file."),
    "an archive": (a_file("model.whl"), "is an archive. Unpack it"),
    "a PEFT folder": (
        adapter,
        "is a PEFT adapter of 'meta-llama/Llama-2-7b-hf', not a model. Merge",
    ),
    "a PEFT folder with a config": (
        without_weights("adapter_config.json", "adapter_model.safetensors"),
        "is a PEFT adapter, not a model. Merge it first, in peft: AutoPeftModelForCausalLM",
    ),
    "a pipe for an adapter's config": (adapter_config_is_a_pipe, "is a PEFT adapter, not a model"),
    "a Trainer's folder": (
        only("trainer_state.json", "checkpoint-500/config.json", "checkpoint-1500/config.json"),
        "hf/checkpoint-1500', '",
    ),
    "a Trainer's folder with a config": (
        without_weights("trainer_state.json", "checkpoint-500/config.json"),
        "holds no weights, but checkpoints: '",
    ),
    "a Hub cache": (
        only("refs/main", "snapshots/ab12/config.json"),
        "hf/snapshots/ab12'. Give one",
    ),
    "GGUF files": (only("model-Q8_0.gguf", "README.md"), "is a GGUF file. Give the file itself"),
    "Meta's own format": (
        only("params.json", "consolidated.00.pth"),
        "params.json is the authors'",
    ),
    "nothing": (only("README.md"), "there is no file '"),
    "pickles": (
        without_weights("pytorch_model.bin", "training_args.bin"),
        "pytorch_model.bin' is a pickle, which can run code when it is loaded. Load it where you "
        "trust it and save it as safetensors: AutoModelForCausalLM.from_pretrained(folder)",
    ),
    "TensorFlow": (without_weights("tf_model.h5"), "holds tf_model.h5 and no safetensors"),
    "a GGUF with a config": (without_weights("model.gguf"), "is a GGUF file. Give the file itself"),
    "no weights": (without_weights(), "holds no safetensors file"),
    "a shard alone": (without_weights(SHARD), f"{SHARD} but no model.safetensors.index.json"),
    "Mistral's own format": (without_weights("consolidated.safetensors"), "in the authors' own f"),
    "which one": (
        without_weights("a.safetensors", "model.fp16.safetensors"),
        "holds 2 safetensors files but no model.safetensors and no model.safetensors.index.json. "
        "Which one is meant? Name it model.safetensors",
    ),
    "a base model": (
        headless,
        "lacks the tensor 'lm_head.weight' (head.weight). Is tie_word_embed",
    ),
    "a reward model": (reward_model, "LlamaForSequenceClassification: it has a score in place"),
    "GPTQ": (
        quantised("gptq"),
        "quantization_config is of gptq: .*take the checkpoint that it was",
    ),
    "AWQ": (quantised("awq"), "quantization_config is of awq: .*take the checkpoint that it was"),
    "bitsandbytes": (
        quantised("bitsandbytes"),
        "of bitsandbytes: .*).dequantize().save_pretrained",
    ),
    "FP8": (quantised("fp8"), "is of fp8: .*FineGrainedFP8Config(dequantize=True)"),
    "MXFP4": (quantised("mxfp4"), "is of mxfp4: .*Mxfp4Config(dequantize=True)"),
    "compressed": (quantised("compressed-tensors"), "CompressedTensorsConfig(dequantize=True)"),
    "an odd method": (quantised("x" * 10_000), "is of xxxx"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Status 2, one line that says what it is and what to do, and nothing is written."""
    make, said = MISTAKES[name]
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    given = make(tmp_path / "in")
    assert main(["convert", str(given), "w.h5"]) == 2
    printed = capsys.readouterr()
    text, at = printed.err, 0
    for part in said.split(".*"):
        at = text.find(part, at)
        assert at >= 0, text
    assert text.startswith("refcurv: convert: ") and text.count("\n") == 1 and not printed.out
    assert len(text) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_lies_beside_the_weights_does_not_stop_it(tmp_path: Path) -> None:
    """Adapters, other formats, other precisions, a Trainer's leavings: named, and not read."""
    folder = sound(tmp_path)
    convert(folder, tmp_path / "plain.h5")
    extra = ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors",
             "optimizer.pt", "pytorch_model.bin", "training_args.bin", "model.gguf"]  # fmt: skip
    for name in [*extra, "trainer_state.json", "adapter_config.json"]:
        (folder / name).write_bytes(b"no model")
    (folder / "checkpoint-500").mkdir()
    done = conversion(folder, tmp_path / "w.h5")
    assert done.not_read == tuple(sorted(extra))
    assert (tmp_path / "w.h5").read_bytes() != (tmp_path / "plain.h5").read_bytes()  # it says so
    assert [m for m in done.mapped if m.name is None] == []


def test_a_variant_alone_is_the_model(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"no model")
    done = conversion(folder, tmp_path / "w.h5")
    assert done.not_read == ("adapter_model.safetensors",)


def test_shards_beside_a_whole_of_another_format(tmp_path: Path) -> None:
    """Mistral's repositories: shards with an index, and consolidated.safetensors."""
    folder = sound(tmp_path)
    (folder / "model.safetensors").rename(folder / SHARD)
    names = [t.name for t in safetensors.read_header(folder / SHARD)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "consolidated.safetensors").write_bytes(b"no model")
    done = conversion(folder, tmp_path / "w.h5")
    assert done.not_read == ("consolidated.safetensors",) and not done.renamed
    assert not set(done.beside) & set(BESIDE)


def test_an_adapter_that_was_left_in_the_names(tmp_path: Path, capsys: object) -> None:
    folder = with_names(sound(tmp_path), lambda n: "base_model.model." + n)
    assert conversion(folder, tmp_path / "w.h5").renamed.startswith("left out 'base_model.model.'")
