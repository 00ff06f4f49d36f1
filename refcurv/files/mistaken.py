"""Errors for what people take for a checkpoint: what it is instead, and what to do.

Each is raised where reading would fail anyway. A sound checkpoint never meets one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from refcurv.files.disk import parse_json, reading
from refcurv.files.paths import PathLike
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")
SHARD: Final = re.compile(r".*-\d+-of-0*([2-9]|[1-9]\d+)\..*")
"""The name of one shard of two or more."""

_SAVE: Final = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
_GGUF: Final = "is a GGUF file. Give the file itself, not its folder: refcurv convert takes it."
GGUF_ELSEWHERE: Final = (
    "is a GGUF file, a model as llama.cpp stores it. refcurv convert FILE WEIGHTS makes a weights "
    "file of it; refcurv corpus --tokenizer FILE reads its tokenizer."
)
_MERGE: Final = (
    "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
    ".save_pretrained(new_folder)"
)
_FILES: Final = {
    ".gguf": "is no GGUF file, or cut short. Copy or download it again.",
    ".safetensors": "is a file. Give its folder, with the config.json beside it.",
    ".json": "is a file. Give its folder.",
    ".model": "is a tokenizer's file. Give the folder of the checkpoint.",
    ".h5": "is a file. A checkpoint is a folder; a weights file of refcurv's is converted already.",
    **dict.fromkeys(
        (".zip", ".whl"), "is an archive. Unpack it; give the folder, or the GGUF file, in it."
    ),
    **dict.fromkeys(
        PICKLES,
        "is a pickle, which can run code when it is loaded. Load it where you trust it: "
        f"{_SAVE}, and give the new folder.",
    ),
}

_LOADED: Final = "AutoModelForCausalLM.from_pretrained(folder"
_DEQUANTISE: Final = {
    "bitsandbytes": f"{_LOADED}).dequantize().save_pretrained(new_folder)",
    "fp8": f"{_LOADED}, quantization_config=FineGrainedFP8Config(dequantize=True))"
    ".save_pretrained(new_folder)",
    "mxfp4": f"{_LOADED}, quantization_config=Mxfp4Config(dequantize=True))"
    ".save_pretrained(new_folder)",
    "compressed-tensors": f"{_LOADED}, quantization_config=CompressedTensorsConfig"
    "(dequantize=True)).save_pretrained(new_folder)",
}
"""Method of quantisation → how transformers undoes it. It cannot undo GPTQ and AWQ."""


def is_gguf(path: Path) -> bool:
    """Is this a GGUF file, by its first four bytes? What is no regular file is never opened."""
    try:
        with reading("open", path) as file:
            return file.read(4) == b"GGUF"
    except RefcurvError:
        return False


def dequantise(method: str) -> str:
    """What to do with a checkpoint that was quantised by `method`."""
    how = _DEQUANTISE.get(method)
    if how is None:
        return "take the checkpoint that it was made from, which is not quantised"
    return f"dequantise it first, in transformers: {how}"


_TENSORS: Final = {
    r"(.+\.)?(lora_(A|B|embedding_.|magnitude_vector)|base_layer|modules_to_save)\..+": (
        f"a PEFT adapter's. Merge it first, in peft: {_MERGE}"
    ),
    r".+\.(qweight|qzeros|g_idx)|.+\.(scales|scaling_factor)": (
        f"quantised, as GPTQ and AWQ write it: {dequantise('gptq')}"
    ),
    r".+\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format)": (
        f"quantised by bitsandbytes: {dequantise('bitsandbytes')}"
    ),
    r".+\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_zero_point|weight_shape)": (
        f"quantised, as FP8 and compressed-tensors write it: {dequantise('fp8')}, or with "
        "CompressedTensorsConfig"
    ),
    r"(.+\.)?(score|v_head|value_head|reward_head|regression_layer|qa_outputs)\..+": (
        "a reward model's or classifier's, in place of the head or beside it. refcurv computes "
        "language models and image classifiers"
    ),
    r".+\.(experts?|block_sparse_moe|shared_expert)\..+": (
        "a mixture of experts', which is not built yet"
    ),
    r"tok_embeddings\..+|layers\.\d+\.attention\.w[qkvo]\..+|.*transformer\.blocks\..+": (
        "in the authors' own format. Take the checkpoint that transformers loads (often called -hf)"
    ),
}
"""Patterns of tensors that give a checkpoint away → what they are, and what to do."""


def require_plain_tensors(where: str, strange: Iterable[str]) -> None:
    """Say what a checkpoint is, if one of the tensors that it should not have gives it away."""
    strange = list(strange)
    for pattern, what in _TENSORS.items():
        for name in strange:
            if re.fullmatch(pattern, name):
                raise ConventionError(f"{where}: tensor {name!r:.120} is {what}.")


# ------------------------------------------------------------------ no folder


def no_folder(directory: PathLike) -> SchemaError | ConventionError:
    """The error for a path that is no folder."""
    path = Path(directory)
    where = f"convert: {str(path)!r:.200}"
    if path.exists():
        plain = "is no folder. A checkpoint is a folder, or a GGUF file."
        what = _FILES.get(path.suffix.lower(), plain)
        kind = ConventionError if path.suffix.lower() in PICKLES else SchemaError
        return kind(f"{where} {what}")
    name = re.sub(r"^(https?:/+)?(www\.)?huggingface\.co/", "", str(directory)).strip("/")
    hub = re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name)
    if hub is None or (path.is_absolute() and name == str(directory).strip("/")):
        return SchemaError(f"convert: there is no folder {str(path)!r:.200}.")
    local = name.rpartition("/")[2]
    return SchemaError(
        f"convert: there is no folder {str(path)!r:.200}. If it is a model of the Hub, download it "
        f"first: hf download {name} --local-dir {local}, and convert {local}."
    )


# ------------------------------------------------------------------ a folder of something else


def no_config(folder: Path) -> SchemaError | ConventionError:
    """The error for a folder without a config.json."""
    where = f"convert: there is no file {str(folder / 'config.json')!r:.300}"
    if (folder / "adapter_config.json").exists():
        return _adapter(folder)
    inner = _checkpoints_within(folder)
    if inner:
        few = ", ".join(repr(str(path)) for path in inner[:3])
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        return SchemaError(f"{where}. Checkpoints lie within: {few}{more}. Give one of them.")
    names = sorted(path.name for path in folder.iterdir())
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return ConventionError(f"convert: {str(folder / gguf[0])!r:.300} {_GGUF}")
    if "params.json" in names:
        return ConventionError(
            f"{where}: params.json is the authors' own format. Take the checkpoint that "
            "transformers loads (often called -hf)."
        )
    return SchemaError(f"{where}.")


def no_weights(folder: Path, others: list[str]) -> SchemaError | ConventionError:
    """The error for a folder with a config.json and no weights, or several; `others` are files."""
    where = f"convert: {str(folder)!r:.200}"
    if "adapter_model.safetensors" in others or (folder / "adapter_config.json").exists():
        return _adapter(folder)
    if not others:
        return _no_safetensors(folder, where)
    if shards := [name for name in others if SHARD.fullmatch(name)]:
        return SchemaError(
            f"{where} holds {shards[0]} but no model.safetensors.index.json, which says what lies "
            "where. Download it too."
        )
    if all(name.startswith("consolidated") for name in others):
        return ConventionError(
            f"{where} holds only {others[0]}, in the authors' own format. Download the "
            "model.safetensors, or its shards, that transformers loads."
        )
    return SchemaError(
        f"{where} holds {len(others)} safetensors files but no model.safetensors and no "
        "model.safetensors.index.json. Which one is meant? Name it model.safetensors."
    )


def _no_safetensors(folder: Path, where: str) -> SchemaError | ConventionError:
    if inner := _checkpoints_within(folder):
        few = ", ".join(repr(str(path)) for path in inner[:3])
        return SchemaError(f"{where} holds no weights, but checkpoints: {few}. Give one of them.")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES and not path.name.startswith("training_args"):
            return ConventionError(
                f"convert: {str(path)!r:.300} is a pickle, which can run code when it is loaded. "
                f"Load it where you trust it and save it as safetensors: {_SAVE}."
            )
        if path.suffix.lower() == ".gguf":
            return ConventionError(f"convert: {str(path)!r:.300} {_GGUF}")
        if path.name.endswith((".msgpack", "model.h5", ".onnx")):
            return ConventionError(
                f"{where} holds {path.name:.80} and no safetensors. Save it with transformers "
                f"where you trust it: {_SAVE}."
            )
    return SchemaError(f"{where} holds no safetensors file.")


def _adapter(folder: Path) -> ConventionError:
    base, path = "", folder / "adapter_config.json"
    try:
        with reading("convert", path) as file:
            text = file.read(1_000_000)
        named = parse_json("convert: adapter_config.json", text).get("base_model_name_or_path")
        base = f" of {named!r:.100}" if isinstance(named, str) else ""
    except (UnicodeDecodeError, RefcurvError):
        pass
    return ConventionError(
        f"convert: {str(folder)!r:.200} is a PEFT adapter{base}, not a model. Merge it first, in "
        f"peft: {_MERGE}."
    )


def _checkpoints_within(folder: Path) -> list[Path]:
    """Folders within that hold a config.json, such as a Trainer's checkpoints; the last first."""
    found = [
        path
        for pattern in ("*", "snapshots/*")
        for path in folder.glob(pattern)
        if (path / "config.json").exists()
    ]

    def step(path: Path) -> tuple[int, str]:
        number = re.search(r"(\d+)$", path.name)
        return (int(number[1]) if number else -1, path.name)

    return sorted(found, key=step, reverse=True)


_EXPERTS: Final = re.compile(r"\w*(expert|moe)\w*")
_OF_EXPERTS: Final = re.compile(r"llama4\w*|mixtral|dbrx|\w*moe\w*|deepseek_v[234]\w*|gpt_oss")


def _has_experts(model_type: object, data: Mapping[str, Any]) -> bool:
    """Does a config.json, or its text_config, say that the model is a mixture of experts?"""
    inner = data.get("text_config")
    every = [data, inner] if isinstance(inner, dict) else [data]
    named = isinstance(model_type, str) and _OF_EXPERTS.fullmatch(model_type)
    keys = [key for one in every for key, value in one.items() if value not in (None, 0, False)]
    return bool(named) or any(_EXPERTS.fullmatch(key) for key in keys)


def unknown_model(where: str, data: Mapping[str, Any], known: Iterable[str]) -> str:
    """What to say of a config.json of no family that is known here."""
    model_type, classes = data.get("model_type"), data.get("architectures")
    names = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    whose = f" ({names[0]:.60})" if names else ""
    if model_type is None:
        return (
            f"{where}: the key 'model_type' is missing{whose}. Add it; known are "
            f"{', '.join(known)}."
        )
    if _has_experts(model_type, data):
        return (
            f"{where}: model_type is {model_type!r:.60}{whose}, a mixture of experts, which is not "
            "built: here every token takes the same MLP."
        )
    return (
        f"{where}: model_type is {model_type!r:.60}{whose}, which is not built yet; known are "
        f"{', '.join(known)}."
    )
