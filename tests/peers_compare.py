"""Two float64 programs on the same checkpoint: transformers, and this package after `convert`.

transformers computes norms, softmax and rotary tables in float32 even when the model is float64.
`InFloat64` undoes that while a model is built and run. Fused layers are cut here a second time,
by code of its own, into what our layers have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from names_in_memory import in_memory
from peers_zoo import LENGTH, VOCABULARY, ZOO
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from refcurv.files import huggingface, weights
from refcurv.files.families import Family
from refcurv.files.slots import Form, Slot
from refcurv.model import transformer
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.gradient import head_backward, loss_and_gradient
from refcurv.model.layers import DEFINITIONS, Ops, unfold
from refcurv.model.weights import Model

BUDGET = 1e-12
LINEAR = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)
Tensors = dict[str, np.ndarray]


class InFloat64(TorchFunctionMode):
    """Where a program asks torch for float32, give it float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.maximum:  # of two lengths, whose quotient would be float32
            return func(*args).double()
        swap = {torch.float32: torch.float64}
        wide = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v
                for k, v in (kwargs or {}).items()}  # fmt: skip
        return func(*(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args), **wide)


# ------------------------------------------------------------------ the checkpoint


def saved(name: str, folder: Path) -> Path:
    """The zoo's model on disk, as its name says."""
    model = ZOO[name]()
    if "bfloat16" in name:
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        model.save_pretrained(folder)
    return folder


def converted(folder: Path) -> Model:
    """The checkpoint through refcurv's own `convert`, its parameters in memory."""
    path = folder.parent / "w.h5"
    huggingface.convert(folder, path)
    model = weights.load(path)
    return dataclasses.replace(model, parameters=dict(model.parameters))


def family_of(model: Model) -> Family:
    text = model.source["header"].provenance["checkpoint_config"]
    return huggingface.read_config("x", text)[0]


def theirs(folder: Path, images: bool = False) -> Any:
    """The same checkpoint in float64, through transformers' own loader."""
    kind = "AutoModelForImageClassification" if images else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()  # fmt: skip


def checkpoint_names(model: Model) -> dict[str, str]:
    """Our parameters → the checkpoint's tensors; the parts of a fused one have the same."""
    entries = model.source["header"].entries
    return {
        name: str(entries[weights.PARAMETERS + name].attributes["checkpoint_name"])
        for name in model.config.parameter_shapes()
    }


def with_config(model: Model, **changed: Any) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changed))


def with_parameter(model: Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Model:
    return model.with_parameters({name: change(model.parameters[name])})


# ------------------------------------------------------------------ the batch


@dataclass(frozen=True)
class Batch:
    """Tokens or images, their labels, and the positions that are real."""

    inputs: np.ndarray
    label: np.ndarray
    real: np.ndarray

    @property
    def images(self) -> bool:
        return self.inputs.ndim == 4


def batch(config: ModelConfig, padded: bool = False) -> Batch:
    rng = np.random.default_rng(11)
    if config.image is not None:
        image = config.image
        pixels = rng.normal(size=(4, image.channels, image.height, image.width))
        label = rng.integers(0, config.vocabulary, (4, 1))
        return Batch(pixels, label, np.ones((4, image.positions), bool))
    tokens = rng.integers(0, VOCABULARY, (4, LENGTH))
    real = np.arange(LENGTH) < np.array([[9], [5], [7], [2]]) if padded else None
    corpus = Corpus(tokens, mask=real)
    return Batch(corpus.tokens, corpus.label, corpus.real)


def second_moment(rows: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    rows = rows.reshape(-1, rows.shape[-1]) if keep is None else rows[keep]
    return rows.T @ rows


@dataclass(frozen=True)
class Found:
    """What one program computed for one batch, in our names.

    A and G are sums over the kept positions: of tokens, those that a label is reached from; of an
    image all of them, and those of its first position as "layer (cls)". scale_G is the same sum
    with |g|, the scale of zeros.
    """

    logits: np.ndarray
    loss: float
    gradient: Tensors
    sum_A: Tensors
    sum_G: Tensors
    scale: Tensors


def moments(batch: Batch, a: Tensors, g: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """A, G, and what bounds the gradient of each layer's bias, from (B, T, ...) rows."""
    sum_A, sum_G, scale = {}, {}, {}
    for layer in g:
        keep = batch.label >= 0 if not batch.images else np.ones(g[layer].shape[:2], bool)
        sum_A[layer] = second_moment(a[layer], keep)
        sum_G[layer] = second_moment(g[layer], keep)
        scale[f"{layer}.bias"] = np.abs(g[layer]).sum(axis=(0, 1))
        scale[f"{layer}.weight"] = np.einsum("bto,bti->oi", abs(g[layer]), abs(a[layer]))
        if batch.images and layer not in ("patch", "head"):
            sum_A[f"{layer} (cls)"] = second_moment(a[layer][:, 0])
            sum_G[f"{layer} (cls)"] = second_moment(g[layer][:, 0])
    return sum_A, sum_G, scale


# ------------------------------------------------------------------ their side


@contextmanager
def tapped(model: Any) -> Iterator[tuple[Tensors, Tensors]]:
    """Record the input and output gradient of each linear layer by its own name."""
    a: Tensors = {}
    g: Tensors = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: Any, inputs: Any, output: Any) -> Any:
            a[name] = inputs[0].detach().numpy()
            output.register_hook(lambda grad: g.__setitem__(name, grad.numpy()))
            return output.clone()  # OLMo clips it in place

        return record

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, LINEAR)]
    handles = [module.register_forward_hook(hook(name)) for name, module in linear]
    yield a, g
    for handle in handles:
        handle.remove()


def part_of(fused: np.ndarray, slot: Slot, config: ModelConfig, index: int) -> np.ndarray:
    """Part `index` of the last axis, which a fused layer's outputs lie on."""
    E = config.head_width
    if slot.form is Form.HEADS:
        rows = [h * 3 * E + index * E + e for h in range(config.heads) for e in range(E)]
        return fused[..., rows]
    widths = {"q": config.heads * E, "k": config.kv_heads * E, "v": config.kv_heads * E}
    sizes = [widths.get(name[-1], config.mlp_width) for name in slot.ours]
    start = sum(sizes[:index])
    return fused[..., start : start + sizes[index]]


def modules(family: Family, config: ModelConfig) -> dict[str, tuple[str, Slot, int]]:
    """Our layer → their module, the slot, and which part of it."""
    return {
        name.rpartition(".")[0]: (theirs.removesuffix(".weight").removesuffix(".bias"), slot, i)
        for theirs, (slot, ours) in huggingface.tensors_of(family, config).items()
        for i, name in enumerate(ours)
    }


def in_our_names(
    family: Family, config: ModelConfig, model: Any, a: Tensors, g: Tensors
) -> tuple[Tensors, Tensors, Tensors]:
    """Gradients, layer inputs and output gradients of their model, cut into what ours has."""
    parameters = {name: p.grad for name, p in model.named_parameters()}
    shapes = config.parameter_shapes()
    gradient: Tensors = {}
    a_ours: Tensors = {}
    g_ours: Tensors = {}
    for layer, (module, slot, index) in modules(family, config).items():
        own = in_memory(module)
        for kind in ("weight", "bias"):
            name = f"{layer}.{kind}"
            if name not in shapes:
                continue
            grad = parameters[own if slot.form is Form.BARE else f"{own}.{kind}"].numpy()
            if kind == "weight" and slot.form is Form.TURNED:
                grad = grad.T
            if len(slot.ours) > 1:
                grad = part_of(grad.T, slot, config, index).T
            gradient[name] = grad.reshape(shapes[name])
        if own in g:
            a_ours[layer], g_ours[layer] = a[own], part_of(g[own], slot, config, index) if (
                len(slot.ours) > 1
            ) else g[own]  # fmt: skip
    if config.tied:
        a_ours["head"], g_ours["head"] = a["lm_head"], g["lm_head"]
    if "patch" in a_ours:  # a convolution: the same on unfolded patches (O5)
        assert config.image is not None
        a_ours["patch"] = unfold(a_ours["patch"], config.image.patch)
        g_ours["patch"] = g_ours["patch"].reshape(*g_ours["patch"].shape[:2], -1).swapaxes(1, 2)
        a_ours["head"], g_ours["head"] = a_ours["head"][:, None], g_ours["head"][:, None]
    return gradient, a_ours, g_ours


def run_theirs(
    folder: Path, family: Family, config: ModelConfig, batch: Batch, patched: bool = True
) -> Found:
    inputs = torch.tensor(batch.inputs)
    with InFloat64() if patched else nullcontext():
        model = theirs(folder, batch.images)
        with tapped(model) as (a, g):
            if batch.images:
                logits = model(pixel_values=inputs).logits[:, None]
            else:
                mask = torch.tensor(batch.real.astype(np.int64))
                logits = model(input_ids=inputs.long(), attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, config.vocabulary),
                torch.tensor(batch.label, dtype=torch.int64).reshape(-1),
                ignore_index=-1,
                reduction="sum",
            )
            loss.backward()
    assert logits.dtype == torch.float64
    gradient, *flows = in_our_names(family, config, model, a, g)
    B = len(batch.inputs)  # OPT's MLP sees (B T, D)
    a_ours, g_ours = ({n: x.reshape(B, -1, x.shape[-1]) for n, x in flow.items()} for flow in flows)
    return Found(logits.detach().numpy(), loss.item(), gradient, *moments(batch, a_ours, g_ours))


# ------------------------------------------------------------------ our side


def run_ours(model: Model, batch: Batch, ops: Ops = DEFINITIONS) -> Found:
    config, parameters = model.config, model.parameters
    if config.image is not None:
        inputs = unfold(batch.inputs, config.image.patch)
        layout = transformer.image_layout(config, len(inputs))
    else:
        inputs = batch.inputs
        layout = transformer.layout_of(config, batch.real, np.zeros(inputs.shape, np.int64))
    final, trace = transformer.forward(config, parameters, inputs, layout, ops)
    a: Tensors = {}
    g: Tensors = {}

    def take(step: transformer.Tap | transformer.Slope) -> None:
        if isinstance(step, transformer.Tap):
            a[step.name], g[step.name] = step.a, step.g

    keep = batch.label >= 0
    head = head_backward(config, parameters, final, batch.label, keep)
    loss = transformer.drain(head, take)
    rows = {"a": a["head"], "g": g["head"]}
    a["head"], g["head"] = (np.zeros((*keep.shape, r.shape[-1])) for r in rows.values())
    a["head"][keep], g["head"][keep] = rows["a"], rows["g"]
    for step in transformer.backward(config, parameters, loss.d_final_BTD, trace, ops):
        take(step)
    total, gradient = loss_and_gradient(config, parameters, inputs, batch.label, layout, ops)
    logits = transformer.head_logits(config, parameters, final)
    return Found(logits, float(total), gradient, *moments(batch, a, g))


# ------------------------------------------------------------------ the distance


def distances(one: Found, two: Found, batch: Batch) -> dict[str, float]:
    """Relative to each tensor's norm. Every parameter and every layer, or a KeyError.

    A gradient that is zero by theory is one on both sides: its distance is the larger of the two,
    relative to the sum of absolute terms, and its name says so.
    """
    real = batch.label >= -1 if batch.images else batch.real
    found = {
        "logits": distance(one.logits[real], two.logits[real]),
        "loss": abs(one.loss - two.loss) / abs(two.loss),
    }
    for kind in ("gradient", "sum_A", "sum_G"):
        mine, others = getattr(one, kind), getattr(two, kind)
        assert set(mine) == set(others) and mine
        for name in others:
            scale = (
                np.linalg.norm(two.scale[name]) if kind == "gradient" and name in two.scale else 0
            )
            if np.linalg.norm(others[name]) <= BUDGET * scale:
                error = max(np.linalg.norm(d) for d in (mine[name], others[name])) / scale
                found[f"zero {name}"] = float(error)
            else:
                found[f"{kind} {name}"] = distance(mine[name], others[name])
    return found


def distance(one: np.ndarray, two: np.ndarray) -> float:
    assert one.shape == two.shape
    scale = float(np.linalg.norm(two))
    assert scale > 1e-8, "zero by theory, or not computed"
    error = float(np.linalg.norm(one - two)) / scale
    return math.inf if math.isnan(error) else error


def worst(found: dict[str, float], kind: str) -> float:
    """The largest distance of one kind: logits, loss, gradient, zero, sum_A, sum_G."""
    return max((d for name, d in found.items() if name.split(" ")[0] == kind), default=0.0)
