"""Every family in transformers and here: logits, loss, every gradient, A and G of every layer.

The models are in peers_zoo.py, the two programs in peers_compare.py; what was measured last is in
validation/peers/README.md. Without the float64 patch: logits 1e-8 to 1e-6. The smallest fault
planted, one weight moved by one unit of bfloat16: 4.2e-4.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `peers`")
transformers = pytest.importorskip("transformers", reason="extra `peers`")

import peers_zoo  # noqa: E402
from peers_compare import (  # noqa: E402
    BUDGET,
    Found,
    InFloat64,
    batch,
    converted,
    distance,
    distances,
    family_of,
    run_ours,
    run_theirs,
    saved,
    theirs,
    with_config,
    with_parameter,
)
from peers_zoo import LENGTH, OF_LENGTHS, ZOO  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from refcurv.files import families, huggingface, keys, store, weights  # noqa: E402
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16  # noqa: E402
from refcurv.files.families import FAMILIES, Family  # noqa: E402
from refcurv.model.config import ModelConfig, QKNorm  # noqa: E402
from refcurv.model.layers import DEFINITIONS, Ops, attention_forward  # noqa: E402
from refcurv.model.transformer import forward, head_logits, layout_of  # noqa: E402
from refcurv.model.weights import Model  # noqa: E402

pytestmark = pytest.mark.peers


@dataclass(frozen=True)
class Peer:
    """One checkpoint of the zoo: on disk for transformers, and converted for us."""

    folder: Path
    family: Family
    ours: Model

    @property
    def config(self) -> ModelConfig:
        return self.ours.config

    def distances(self, wrong: Model | None = None, ops: Ops = DEFINITIONS) -> dict[str, float]:
        data = batch(self.config)
        ours = run_ours(wrong or self.ours, data, ops)
        return distances(ours, run_theirs(self.folder, self.family, self.config, data), data)


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory: Any) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def get(name: str) -> Peer:
        if name not in made:
            folder = saved(name, tmp_path_factory.mktemp(name) / "hf")
            ours = converted(folder)
            made[name] = Peer(folder, family_of(ours), ours)
        return made[name]

    return get


@pytest.fixture(params=ZOO)
def peer(request: Any, peer_of: Callable[[str], Peer]) -> Peer:
    return peer_of(request.param)


def test_every_family_is_in_the_zoo() -> None:
    assert {family.model_type for family in FAMILIES} == {row.split("-")[0] for row in ZOO}


# ------------------------------------------------------------------ the comparison


def zeros_by_theory(config: ModelConfig) -> set[str]:
    """A constant added to every key changes no softmax, unless positions turn it."""
    still = [i for i in range(config.layers) if config.rope(i) is None]
    return {f"blocks.{i}.attn.k.bias" for i in still if "k" in config.biases}


TEXT = [row for row in ZOO if not row.startswith(("vit", "deit")) and row not in OF_LENGTHS]
"""An image has no padding."""


@pytest.mark.parametrize(
    "row, padded",
    [*((row, False) for row in ZOO), *((row, True) for row in TEXT)],
    ids=[*(f"{row}-full" for row in ZOO), *(f"{row}-padded" for row in TEXT)],
)
def test_logits_loss_gradients_and_factors(peer_of: Any, row: str, padded: bool) -> None:
    peer = peer_of(row)
    config = peer.config
    data = batch(config, padded)
    ours = run_ours(peer.ours, data)
    theirs = run_theirs(peer.folder, peer.family, config, data)
    found = distances(ours, theirs, data)
    layers = set(config.linear_layers())
    of_cls = {f"{n} (cls)" for n in layers - {"patch", "head"}} if config.image else set()
    assert set(ours.gradient) == set(config.parameter_shapes())
    assert set(ours.sum_A) == set(ours.sum_G) == layers | of_cls
    zeros = {name.removeprefix("zero ") for name in found if name.startswith("zero ")}
    assert zeros == zeros_by_theory(config)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < BUDGET, (worst, found[worst])


@pytest.mark.parametrize("row", ["llama-dynamic", "phi3-short", "phi3-long"])
def test_the_length_of_each_text_decides(peer_of: Any, row: str) -> None:
    """Texts that are padded, or packed into one row: each as transformers has it alone."""
    peer = peer_of(row)
    config, data = peer.config, batch(peer.config, padded=True)
    texts = [tokens[real] for tokens, real in zip(data.inputs, data.real, strict=True)]
    with InFloat64():
        alone = []
        for text in texts:  # a model of its own: transformers remembers the longest so far
            logits = theirs(peer.folder)(input_ids=torch.tensor(text[None]).long()).logits
            alone.append(logits[0].detach().numpy())
    beyond = {len(text) > config.rope_scaling.original for text in texts}
    assert beyond == ({False} if row == "phi3-short" else {False, True})
    padded = run_ours(peer.ours, data).logits[data.real]
    packed = np.concatenate(texts)[None]
    segment = np.repeat(np.arange(len(texts)), [len(text) for text in texts])[None]
    layout = layout_of(config, np.ones(packed.shape, bool), segment)
    final, _ = forward(config, peer.ours.parameters, packed, layout)
    for found in (padded, head_logits(config, peer.ours.parameters, final)[0]):
        assert distance(found, np.concatenate(alone)) < BUDGET


@pytest.mark.parametrize("row", ["gpt2", "gpt_neo", "gpt_neox", "phi"])
def test_entries_that_are_zero_by_theory(peer_of: Any, row: str) -> None:
    """Rows of positions that no sequence reaches; key biases where positions do not turn."""
    peer = peer_of(row)
    config, data = peer.config, batch(peer.config)
    ours = run_ours(peer.ours, data)
    theirs = run_theirs(peer.folder, peer.family, config, data)
    if config.learned_positions:
        assert config.learned_positions > LENGTH
        for found in (ours, theirs):
            assert not found.gradient["position.weight"][LENGTH:].any()
    if "k" in config.biases and config.qk_norm is QKNorm.NONE:
        still = slice(config.rope_width or 0, None)
        for name in (f"blocks.{i}.attn.k.bias" for i in range(config.layers)):
            for found in (ours, theirs):
                by_head = found.gradient[name].reshape(config.kv_heads, config.head_width)
                scale = found.scale[name].reshape(by_head.shape)[:, still]
                assert np.abs(by_head[:, still]).max() < BUDGET * scale.max()


@pytest.mark.parametrize("row", ["olmo2", "llama", "gemma"])
def test_without_the_patch_it_is_float32(peer_of: Any, row: str) -> None:
    """Why the patch: transformers' float64 model is a float32 one in its norms and softmax."""
    peer = peer_of(row)
    data = batch(peer.config)
    theirs = run_theirs(peer.folder, peer.family, peer.config, data, patched=False)
    found = distances(run_ours(peer.ours, data), theirs, data)
    assert 1e-9 < found["logits"] < 1e-5
    assert 1e-9 < max(found.values()) < 1e-4


def with_keys(folder: Path, changed: dict[str, Any], into: Path) -> Path:
    """The checkpoint with some keys of its config.json changed, or left out where `...`."""
    shutil.copytree(folder, into)
    config = json.loads((folder / "config.json").read_text()) | changed
    kept = {key: value for key, value in config.items() if value is not ...}
    (into / "config.json").write_text(json.dumps(kept))
    return into


def typed(block: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling, its kind under the older name `type`, in place of rope_parameters."""
    rest = {key: value for key, value in block.items() if key != "rope_type"}
    return {"rope_parameters": ..., "rope_scaling": rest | {"type": block["rope_type"]}}


def by_kind(full: dict[str, Any], theta: float) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


YARN, BLUNT, LINEAR, LLAMA3, DYNAMIC = (
    one["rope_parameters"]
    for one in (
        peers_zoo.YARN, peers_zoo.BLUNT, peers_zoo.LINEAR, peers_zoo.LLAMA3, peers_zoo.DYNAMIC
    )
)  # fmt: skip
ALONE = {"original_max_position_embeddings": ...}
USUAL = ALONE | {"rope_parameters": peers_zoo.longrope(6)["rope_parameters"]
                 | {"original_max_position_embeddings": 4096}}  # fmt: skip
OLDER = {"rope_parameters": ..., "rope_theta": 321.0, "rope_local_base_freq": 20.0}
TWO = {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
UNREAD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a cap of scores": ("gemma3_text", {"attn_logit_softcapping": 0.5}, {}),
    "longrope's context in its block alone": ("phi3-long", ALONE, USUAL),
    "truncate by the kind of attention": (
        "olmo3-yarn", by_kind(YARN | {"truncate": False}, 50.0), {}
    ),
    "the kind as type, by the kind of attention": (
        "gemma3_text-scaled", OLDER | {"rope_scaling": {"type": "linear", "factor": 2.5}}, OLDER
    ),
    "a base beside rope_scaling": ("llama-linear", TWO, TWO | {"rope_parameters": ...}),
    "a factor beside rope_scaling": (
        "llama-linear",
        {"rope_scaling": {"rope_theta": 321.0}},
        {"rope_parameters": {"rope_theta": 321.0}},
    ),
}  # fmt: skip
"""What transformers leaves out → the row, keys that say it, keys of what it computes."""

READ: dict[str, tuple[str, dict[str, Any]]] = {
    "no cap of scores": ("gemma3_text", {"attn_logit_softcapping": None}),
    "longrope's usual context": ("phi3-long", USUAL),
    "truncate is null": ("qwen2-yarn", {"rope_parameters": BLUNT | {"truncate": None}}),
    "truncate is null by the kind of attention": (
        "olmo3-yarn", by_kind(YARN | {"truncate": None}, 50.0)
    ),
    "rope_type by the kind of attention": ("gemma3_text-scaled", OLDER | TWO),
    "type in a block of its own": (
        "gemma3_text-scaled",
        by_kind({"type": "linear", "factor": 2.5, "rope_theta": 321.0}, 20.0),
    ),
    "type, linear": ("llama-linear", typed(LINEAR)),
    "type, llama3": ("llama-llama3", typed(LLAMA3)),
    "type, dynamic": ("llama-dynamic", typed(DYNAMIC)),
    "type, yarn": ("qwen2-yarn", typed(BLUNT)),
    "type, longrope": ("phi3-long", typed(peers_zoo.longrope(6)["rope_parameters"])),
}  # fmt: skip


def of_keys(peer: Peer, changed: dict[str, Any], read: dict[str, Any], tmp_path: Path) -> float:
    """How far transformers' logits with the keys `changed` are from ours with the keys `read`."""
    folder = with_keys(peer.folder, changed, tmp_path / "changed")
    (tmp_path / "ours").mkdir()
    ours = converted(with_keys(peer.folder, read, tmp_path / "ours/hf"))
    data = batch(ours.config)
    found = run_theirs(folder, peer.family, ours.config, data)
    return distances(run_ours(ours, data), found, data)["logits"]


@pytest.mark.parametrize("what", UNREAD)
def test_what_transformers_does_not_read_is_refused(
    peer_of: Callable[[str], Peer], tmp_path: Path, what: str
) -> None:
    """The key moves no logit of theirs: they are of the model that is described without it."""
    row, changed, read = UNREAD[what]
    peer = peer_of(row)
    assert of_keys(peer, changed, read, tmp_path) < BUDGET
    with pytest.raises(huggingface.ConventionError):
        converted(tmp_path / "changed")


@pytest.mark.parametrize("what", READ)
def test_rarer_spellings_are_read_alike(
    peer_of: Callable[[str], Peer], tmp_path: Path, what: str
) -> None:
    row, changed = READ[what]
    assert of_keys(peer_of(row), changed, changed, tmp_path) < BUDGET


def test_the_family_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of ADDING.md are enough: transformers' model of that family, within budget."""
    page = Path(__file__).parents[1] / "validation/peers/ADDING.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names, rows = {**vars(keys), **vars(families)}, dict(vars(peers_zoo))
    exec(blocks[0], names)
    exec(blocks[2], rows)
    monkeypatch.setattr(huggingface, "FAMILIES", (*FAMILIES, names["SEED_OSS"]))
    monkeypatch.setitem(ZOO, "seed_oss", rows["ROWS"]["seed_oss"])
    ours = converted(folder := saved("seed_oss", tmp_path / "hf"))
    found = Peer(folder, names["SEED_OSS"], ours).distances()
    assert max(found.values()) < BUDGET and len(found) == 2 + len(ours.parameters) + 2 * 22


# ------------------------------------------------------------------ planted faults


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pairs (x[2j], x[2j + 1]), as GPT-J and the original Llama have them."""
    turning = 2 * cos.shape[-1]
    x1, x2 = x[..., 0:turning:2], x[..., 1:turning:2]
    y = np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return np.concatenate([y.reshape(*x.shape[:-1], turning), x[..., turning:]], axis=-1)


def tiled(q: np.ndarray, k: np.ndarray, *rest: Any) -> Any:
    """Query head h reads key-value head h mod K instead of h div R."""
    K, R = k.shape[2], q.shape[2] // k.shape[2]
    order = np.arange(K * R).reshape(R, K).T.ravel()
    context, kept = attention_forward(q[:, :, order], k, *rest)
    return context[:, :, np.argsort(order)], kept


def eps_outside(x: np.ndarray, gain: np.ndarray, eps: float) -> Any:
    r = 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps)
    return x * r * gain, (x * r, r, x.dtype.type(1), gain)


def ops(**changed: Any) -> Callable[[Model], Ops]:
    return lambda model: dataclasses.replace(DEFINITIONS, **changed)


def field(**changed: Any) -> Callable[[Model], Model]:
    return lambda model: with_config(model, **changed)


def scaled(name: str, factor: float = 1.1) -> Callable[[Model], Model]:
    return lambda m: with_config(m, **{name: getattr(m.config, name) * factor})


def windows(step: int) -> Callable[[Model], Model]:
    return lambda m: with_config(m, windows=tuple(w and w + step for w in m.config.windows))


def scaling(**changed: Any) -> Callable[[Model], Model]:
    return lambda m: with_config(
        m, rope_scaling=dataclasses.replace(m.config.rope_scaling, **changed)
    )


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Model], Model]:
    return lambda model: with_parameter(model, name, change)


def exchanged(one: str, two: str) -> Callable[[Model], Model]:
    return lambda m: m.with_parameters({one: m.parameters[two], two: m.parameters[one]})


def stacked_by_kind(m: Model) -> Model:
    """GPT-NeoX's fused rows read as [W_q; W_k; W_v]."""
    H, names = m.config.heads, [f"blocks.0.attn.{n}.weight" for n in "qkv"]
    rows = np.concatenate([m.parameters[n].reshape(H, -1, m.config.width) for n in names], axis=1)
    cut = np.split(rows.reshape(-1, m.config.width), 3)
    return m.with_parameters(dict(zip(names, cut, strict=True)))


def channels_last(W: np.ndarray) -> np.ndarray:
    return W.reshape(24, 2, 3, 3).transpose(0, 2, 3, 1).reshape(24, -1)


FAULTS: dict[str, tuple[str, Callable[[Model], Any]]] = {
    "rotary interleaved for half-split": ("llama", ops(rotate=interleaved)),
    "rotary interleaved, partial": ("gpt_neox-sequential", ops(rotate=interleaved)),
    "grouped heads tiled for repeated": ("llama", ops(attention_forward=tiled)),
    "eps outside the root": ("olmo2", ops(rms_norm_forward=eps_outside)),
    "eps outside the root, LayerNorm": ("gpt2", ops(rms_norm_forward=eps_outside)),
    "LayerNorm that keeps the mean": ("starcoder2", ops(centre=lambda x: x)),
    "eps": ("llama", scaled("norm_eps")),
    "OLMo's eps": ("olmo", field(norm_eps=3e-3)),
    "gain offset forgotten": ("gemma", field(norm_offset=False)),
    "embedding scale forgotten": ("gemma", field(embed_scale=1.0)),
    "GELU by tanh for erf": ("vit", field(activation="gelu_tanh")),
    "GELU by erf for tanh": ("gpt2", field(activation="gelu")),
    "SiLU for GELU": ("gemma2", field(activation="silu")),
    "sequential residual for parallel": ("gpt_neox", field(residual="sequential")),
    "parallel residual for sequential": ("gpt_neox-sequential", field(residual="parallel")),
    "window one longer": ("mistral", windows(+1)),
    "window one shorter": ("mistral", windows(-1)),
    "local window one longer": ("gpt_neo", windows(+1)),
    "windows in the wrong blocks": ("gemma2", field(windows=(0, 3, 0))),
    "windows from the first block on": ("qwen2", field(windows=(3, 3, 3))),
    "theta": ("phi", scaled("rope_theta")),
    "all of a head turns": ("phi", field(rope_width=None)),
    "less of a head turns": ("phi", field(rope_width=2)),
    "no scaling, linear": ("llama-linear", field(rope_scaling=None)),
    "no scaling, llama3": ("llama-llama3", field(rope_scaling=None)),
    "llama3's slow": ("llama-llama3", scaling(slow=1.0)),
    "llama3's context": ("llama-llama3", scaling(original=41)),
    "yarn's attention factor": ("olmo2-yarn", scaling(attention=1.0)),
    "yarn's ramp": ("olmo2-yarn", scaling(fast=32.0)),
    "yarn truncated": ("qwen2-yarn", scaling(truncate=True)),
    "yarn not truncated": ("olmo2-yarn", scaling(truncate=False)),
    "score scale": ("gemma2", field(score_scale=None)),
    "score scale by the head's width": ("gpt_neo", field(score_scale=None)),
    "score cap": ("gemma2", scaled("score_cap")),
    "logit cap": ("gemma2", scaled("logit_cap")),
    "clip": ("olmo-clip", scaled("qkv_clip")),
    "no clip": ("olmo-clip", field(qkv_clip=None)),
    "the mean of all positions for CLS": ("vit", field(pool="mean")),
    "full attention for causal": ("llama", field(causal=False)),
    "one weight, one unit of bfloat16": ("llama", weight("blocks.1.mlp.up.weight", lambda W:
        np.where(np.arange(W.size).reshape(W.shape) == 5, W * (1 + 2.0**-7), W))),
    "norms swapped": ("llama", exchanged("blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight")),
    "norms swapped, both sides": ("gemma2", exchanged("blocks.0.attn_post_norm.weight",
                                                      "blocks.0.mlp_norm.weight")),
    "key-value heads swapped": ("olmo2", weight("blocks.0.attn.v.weight",
                                                lambda W: np.roll(W, len(W) // 2, axis=0))),
    "Conv1D not turned": ("gpt2", weight("blocks.0.attn.o.weight", lambda W: W.T)),
    "q and k of the fused tensor swapped": ("gpt2", exchanged("blocks.0.attn.q.weight",
                                                              "blocks.0.attn.k.weight")),
    "fused rows by kind, not by head": ("gpt_neox", stacked_by_kind),
    "gate and up swapped": ("phi3", exchanged("blocks.0.mlp.gate.weight",
                                              "blocks.0.mlp.up.weight")),
    "patches with channels last": ("vit", weight("patch.weight", channels_last)),
    "cls and distillation swapped": ("deit", exchanged("cls.weight", "distillation.weight")),
    "positions rolled": ("deit", weight("position.weight", lambda W: np.roll(W, 1, axis=0))),
    "local theta for the blocks without a window": ("gemma3_text", field(rotary=("local",) * 7)),
    "one theta for all blocks": ("gemma3_text", field(rotary=())),
    "local theta": ("gemma3_text", scaled("local_theta")),
    "one scaling for all blocks": ("olmo3-yarn", field(rotary=())),
    "positions in every block": ("smollm3", field(rotary=())),
    "positions in the wrong blocks": ("smollm3", field(rotary=("none", "main", "main", "main"))),
    "windows in the wrong blocks, Gemma-3": ("gemma3_text", field(windows=(3, 3, 3, 3, 0, 3, 3))),
    "long factors for short": ("phi3-short", scaling(original=LENGTH - 1)),
    "short factors for long": ("phi3-long", scaling(original=LENGTH)),
    "longrope's attention factor": ("phi3-short", scaling(attention=1.0)),
    "dynamic as if the text were short": ("llama-dynamic", scaling(original=LENGTH)),
    "dynamic factor": ("llama-dynamic", scaling(factor=3.1)),
    "OPT's positions from row 0 on": ("opt", field(position_offset=0, learned_positions=13)),
    "OPT's GELU": ("opt", field(activation="gelu")),
    "a bias forgotten": ("phi", weight("head.bias", np.zeros_like)),
}  # fmt: skip
"""What is wrong → the row that shows it, and the model or layer functions that have it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_can_fail(peer_of: Callable[[str], Peer], fault: str) -> None:
    row, plant = FAULTS[fault]
    peer = peer_of(row)
    planted = plant(peer.ours)
    if isinstance(planted, Ops):
        found = peer.distances(ops=planted)
    else:
        assert planted.config != peer.config or planted.parameters is not peer.ours.parameters
        found = peer.distances(planted)
    assert max(found.values()) > 1e8 * BUDGET and found["logits"] > 1e7 * BUDGET


# ------------------------------------------------------------------ files


def identical(one: Found, two: Found) -> bool:
    """All of it, bit for bit."""
    same = (one.logits == two.logits).all() and one.loss == two.loss
    for kind in ("gradient", "sum_A", "sum_G"):
        mine, others = getattr(one, kind), getattr(two, kind)
        same &= mine.keys() == others.keys() and all((mine[n] == others[n]).all() for n in mine)
    return bool(same)


def activation_of(folder: Path) -> object:
    """The name in config.json: torch rounds "gelu_new" and "gelu_pytorch_tanh" differently."""
    config = json.loads((folder / "config.json").read_text())
    keys = ("hidden_act", "hidden_activation", "activation_function")
    return [config.get(key) for key in keys if key in config]


def test_transformers_loads_what_is_exported(peer: Peer, tmp_path: Path) -> None:
    """Verbatim config, and the minimal one of a model that has no checkpoint: the same logits."""
    weights.save(peer.ours, tmp_path / "w.h5")
    huggingface.export(tmp_path / "w.h5", tmp_path / "verbatim")
    weights.save(dataclasses.replace(peer.ours, source={}), tmp_path / "bare.h5")
    huggingface.export(tmp_path / "bare.h5", tmp_path / "minimal")
    assert "checkpoint_config" not in store.open_file(tmp_path / "bare.h5").provenance
    data = batch(peer.config)
    wanted = run_theirs(peer.folder, peer.family, peer.config, data)
    for folder in ("verbatim", "minimal"):
        text = (tmp_path / folder / "config.json").read_text()
        family, config = huggingface.read_config("x", text)
        assert config == peer.config
        found = run_theirs(tmp_path / folder, family, config, data)
        if family is peer.family and activation_of(tmp_path / folder) == activation_of(peer.folder):
            assert identical(found, wanted)  # the very same program
        assert max(distances(found, wanted, data).values()) < BUDGET


def test_an_edited_checkpoint_keeps_its_family(peer: Peer, tmp_path: Path) -> None:
    """With a config.json of another eps, the recorded family writes the new one; bits agree."""
    changed = with_config(peer.ours, norm_eps=peer.config.norm_eps * 2)
    if peer.family.model_type == "olmo":  # its eps is fixed
        changed = with_config(peer.ours, rope_theta=peer.config.rope_theta * 2)
    if peer.family.model_type == "opt":  # so is its
        changed = with_config(peer.ours, activation="silu")
    weights.save(changed, tmp_path / "w.h5")
    huggingface.export(tmp_path / "w.h5", tmp_path / "hf")
    text = (tmp_path / "hf/config.json").read_text()
    assert huggingface.read_config("x", text) == (peer.family, changed.config)
    data = batch(peer.config)
    found = run_theirs(tmp_path / "hf", peer.family, changed.config, data)
    assert max(distances(run_ours(changed, data), found, data).values()) < BUDGET


def test_convert_export_convert_is_identical(peer: Peer, tmp_path: Path) -> None:
    one, two = tmp_path / "w1.h5", tmp_path / "w2.h5"
    huggingface.convert(peer.folder, one)
    huggingface.export(one, tmp_path / "hf")
    huggingface.convert(tmp_path / "hf", two)
    assert store.open_file(one).entries == store.open_file(two).entries
    before = {k: t for p in peer.folder.glob("*.safetensors") for k, t in load_file(p).items()}
    after = load_file(tmp_path / "hf/model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype
               for k in before)  # fmt: skip


def test_gpt2_as_the_hub_has_it(peer_of: Any, tmp_path: Path) -> None:
    """Names without the prefix, causal masks among the tensors: the same model, and back."""
    peer = peer_of("gpt2")
    tensors = load_file(peer.folder / "model.safetensors")
    hub = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    mask = torch.ones(1, 1, 13, 13).tril()
    buffers = {f"h.{i}.attn.bias": mask.clone() for i in range(3)}
    buffers |= {f"h.{i}.attn.masked_bias": mask.bool() for i in range(3)}
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(hub | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((peer.folder / "config.json").read_text())
    mapped = huggingface.convert(folder, tmp_path / "w.h5")
    assert {m.checkpoint_name for m in mapped if m.name is None} == set(buffers)
    model = weights.load(tmp_path / "w.h5")
    assert all((model.parameters[n] == a).all() for n, a in peer.ours.parameters.items())
    huggingface.export(tmp_path / "w.h5", tmp_path / "back")
    assert set(load_file(tmp_path / "back/model.safetensors")) == set(hub)
    data = batch(peer.config)
    one, two = (run_theirs(f, peer.family, peer.config, data)
                for f in (peer.folder, tmp_path / "back"))  # fmt: skip
    assert identical(one, two)


@pytest.mark.parametrize("row", ["llama", "llama-biases", "gpt2", "vit"])
def test_checkpoints_of_the_base_model(peer_of: Any, tmp_path: Path, row: str) -> None:
    """With a tied head it is the whole model; otherwise the head is missed by name."""
    peer = peer_of(row)
    kind = "AutoModelForImageClassification" if peer.config.image else "AutoModelForCausalLM"
    whole = getattr(transformers, kind).from_pretrained(peer.folder)
    whole.base_model.save_pretrained(tmp_path / "hf")
    if not peer.config.tied:
        with pytest.raises(
            huggingface.SchemaError, match=r"lacks the tensor '(lm_head|classifier)"
        ):
            huggingface.convert(tmp_path / "hf", tmp_path / "w.h5")
        return
    huggingface.convert(tmp_path / "hf", tmp_path / "w.h5")
    model = weights.load(tmp_path / "w.h5")
    assert all((model.parameters[n] == a).all() for n, a in peer.ours.parameters.items())


def test_the_teachers_class_is_refused(peer_of: Any, tmp_path: Path) -> None:
    peer = peer_of("deit")
    config = json.loads((peer.folder / "config.json").read_text())
    config["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    with pytest.raises(huggingface.ConventionError, match="averages two heads"):
        huggingface.read_config("x", json.dumps(config))


def test_gelu_fast_differs_in_the_twelfth_digit() -> None:
    """Its √(2/π) has ten digits; `gelu_tanh` has all of them."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    fast, exact = ACT2FN["gelu_fast"](x), ACT2FN["gelu_new"](x)
    assert 0 < (fast - exact).abs().max() < 4e-12


def test_bfloat16_is_torchs() -> None:
    """Every float32 pattern in 2**20 random ones; torch rounds float64 twice, so not those."""
    bits = np.random.default_rng(2).integers(0, 2**32, 2**20, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    wanted = torch.tensor(values).to(torch.bfloat16)
    assert (to_bfloat16(values) == wanted.view(torch.uint16).numpy()).all()
    assert (from_bfloat16(to_bfloat16(values)) == wanted.float().numpy()).all()

    tie = np.array([1 + 2.0**-8 + 2.0**-40])  # float32 rounds it to the tie, then down
    assert to_bfloat16(tie)[0] == 0x3F81
    assert torch.tensor(tie).to(torch.bfloat16).view(torch.uint16).item() == 0x3F80
