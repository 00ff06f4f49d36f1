"""The same checkpoint in transformers and here: logits, loss, every gradient, A and G.

transformers computes norms, softmax and rotary tables in float32 even when the model is float64.
`InFloat64` undoes that while a model is built and run, so that two float64 programs meet.

Observed, relative to each tensor's norm, worst over cases and padding (torch 2.13, transformers
5.23, OpenBLAS SkylakeX): logits 1.7e-15, loss 2.7e-16, gradients 2.4e-14, sums for A 2.0e-15 and
for G 3.6e-14. Without the patch: logits 1.9e-7 to 2.8e-7, gradients up to 1.8e-6, G up to 2.9e-6.
The smallest fault planted, one weight moved by one unit of bfloat16: 4.2e-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="extra `peers`")
transformers = pytest.importorskip("transformers", reason="extra `peers`")

from torch.overrides import TorchFunctionMode  # noqa: E402

from refcurv.files import huggingface, store, weights  # noqa: E402
from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16  # noqa: E402
from refcurv.files.corpus import Corpus  # noqa: E402
from refcurv.model import transformer  # noqa: E402
from refcurv.model.config import Model  # noqa: E402
from refcurv.model.layers import DEFINITIONS, causal_layout  # noqa: E402

pytestmark = pytest.mark.peers

BUDGET = 1e-12
VOCABULARY = 31
Tensors = dict[str, np.ndarray]


class InFloat64(TorchFunctionMode):
    """Where a program asks torch for float32, give it float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        swap = {torch.float32: torch.float64}
        wide = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v
                for k, v in (kwargs or {}).items()}  # fmt: skip
        return func(*(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args), **wide)


# ------------------------------------------------------------------ the peers

SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=None,  # torch gives its embedding no gradient
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.4,
    attn_implementation="eager",
)


def olmo2(**changes: Any) -> Any:
    fields = SHAPE | dict(
        rms_norm_eps=3e-3, rope_parameters={"rope_type": "default", "rope_theta": 750.0}
    )
    return with_gains(transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**(fields | changes))))


def llama(**changes: Any) -> Any:
    fields = SHAPE | dict(
        head_dim=10,  # not 24 / 4
        tie_word_embeddings=True,
        rms_norm_eps=2e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 321.0},
    )
    return with_gains(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(fields | changes))))


def with_gains(model: Any) -> Any:
    """Gains away from 1, so that a forgotten one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@dataclass(frozen=True)
class Case:
    """A peer's checkpoint on disk, and how it was saved."""

    folder: Path
    dtype: str


@pytest.fixture(scope="module", params=["olmo2", "llama", "olmo2-bfloat16-sharded"])
def case(request: Any, tmp_path_factory: Any) -> Case:
    torch.manual_seed(7)
    model = olmo2() if "olmo2" in request.param else llama()
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    if "bfloat16" in request.param:
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return Case(folder, "bfloat16")
    model.save_pretrained(folder)
    return Case(folder, "float32")


@pytest.fixture(scope="module")
def ours(case: Case) -> Model:
    model = converted(case.folder)
    assert set(model.stored.values()) == {case.dtype}
    return model


def converted(folder: Path) -> Model:
    """The checkpoint through refcurv's own `convert`, its parameters in memory."""
    path = folder.parent / "w.h5"
    huggingface.convert(folder, path)
    model = weights.load(path)
    return dataclasses.replace(model, parameters=dict(model.parameters))


def theirs(folder: Path) -> Any:
    """The same checkpoint in float64, through transformers' own loader."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()


# ------------------------------------------------------------------ both sides


@dataclass(frozen=True)
class Found:
    """What one program computed for one batch; A and G are sums over the kept positions."""

    logits: np.ndarray
    loss: float
    gradient: Tensors
    sum_A: Tensors
    sum_G: Tensors


def batch(padded: bool) -> Corpus:
    rng = np.random.default_rng(11)
    tokens = rng.integers(0, VOCABULARY, (4, 9))
    real = np.arange(9) < np.array([[9], [5], [7], [2]]) if padded else None
    return Corpus(tokens, mask=real)


def kept(corpus: Corpus) -> np.ndarray:
    """Every real position but the last of its sequence: those that a label is reached from."""
    return corpus.label >= 0


def second_moment(rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
    rows = rows[keep]
    return rows.T @ rows


@contextmanager
def tapped(model: Any) -> Iterator[tuple[Tensors, Tensors]]:
    """Record each Linear's input and output gradient by its own name."""
    a: Tensors = {}
    g: Tensors = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: Any, inputs: Any, output: Any) -> None:
            a[name] = inputs[0].detach().numpy()
            output.register_hook(lambda grad: g.__setitem__(name, grad.numpy()))

        return record

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [module.register_forward_hook(hook(name)) for name, module in linear]
    yield a, g
    for handle in handles:
        handle.remove()


def run_theirs(folder: Path, corpus: Corpus, patched: bool = True) -> Found:
    with InFloat64() if patched else nullcontext():
        model = theirs(folder)
        with tapped(model) as (a, g):
            logits = model(
                input_ids=torch.tensor(corpus.tokens, dtype=torch.int64),
                attention_mask=torch.tensor(corpus.real.astype(np.int64)),
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY),
                torch.tensor(corpus.label).reshape(-1),
                ignore_index=-1,
                reduction="sum",
            )
            loss.backward()
    assert logits.dtype == torch.float64
    gradient = {name: p.grad.numpy() for name, p in model.named_parameters()}
    keep = kept(corpus)
    return Found(
        logits.detach().numpy(),
        loss.item(),
        gradient,
        {name: second_moment(rows, keep) for name, rows in a.items()},
        {name: second_moment(rows, keep) for name, rows in g.items()},
    )


def run_ours(model: Model, corpus: Corpus) -> Found:
    """With the names of the checkpoint, so that the two can be compared."""
    config, parameters, keep = model.config, model.parameters, kept(corpus)
    layout = causal_layout(corpus.real, corpus.segment)
    final, trace = transformer.forward(config, parameters, corpus.tokens, layout, DEFINITIONS)
    sum_A: Tensors = {}
    sum_G: Tensors = {}
    names = checkpoint_names(model)

    def take(tap: transformer.Tap, chosen: np.ndarray) -> None:
        layer = names.get(tap.name + ".weight", "lm_head.weight").removesuffix(".weight")
        sum_A[layer] = second_moment(tap.a, chosen)
        sum_G[layer] = second_moment(tap.g, chosen)

    head = transformer.head_backward(config, parameters, final, corpus.label, keep)
    loss = transformer.drain(head, lambda tap: take(tap, np.ones(len(tap.a), bool)))
    for step in transformer.backward(config, parameters, loss.d_final_BTD, trace, DEFINITIONS):
        if isinstance(step, transformer.Tap):
            take(step, keep)
    total, gradient = transformer.loss_and_gradient(
        config, parameters, corpus.tokens, corpus.label, layout, DEFINITIONS
    )
    logits = transformer.head_logits(config, parameters, final)
    named = {names[name]: d for name, d in gradient.items()}
    return Found(logits, float(total), named, sum_A, sum_G)


def checkpoint_names(model: Model) -> dict[str, str]:
    entries = model.source["header"].entries
    return {
        name: str(entries[weights.PARAMETERS + name].attributes["checkpoint_name"])
        for name in model.config.parameter_shapes()
    }


def distances(one: Found, two: Found, real: np.ndarray) -> dict[str, float]:
    """Relative to each tensor's norm. Every parameter and every layer, or a KeyError."""
    found = {
        "logits": distance(one.logits[real], two.logits[real]),
        "loss": abs(one.loss - two.loss) / abs(two.loss),
    }
    for kind in ("gradient", "sum_A", "sum_G"):
        mine, others = getattr(one, kind), getattr(two, kind)
        assert set(mine) == set(others) and mine
        found |= {f"{kind} {name}": distance(mine[name], others[name]) for name in others}
    return found


def distance(one: np.ndarray, two: np.ndarray) -> float:
    assert one.shape == two.shape
    scale = float(np.linalg.norm(two))
    assert scale > 1e-8, "zero by theory, or not computed"
    return float(np.linalg.norm(one - two)) / scale


# ------------------------------------------------------------------ the comparison


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_loss_gradients_and_factors(case: Case, ours: Model, padded: bool) -> None:
    corpus = batch(padded)
    found = distances(run_ours(ours, corpus), run_theirs(case.folder, corpus), corpus.real)
    layers, tied = ours.config.layers, ours.config.tied
    assert len(found) == 2 + len(ours.config.parameter_shapes()) + 2 * (7 * layers + 1)
    assert len(found) == 2 + (9 if tied else 11) * layers + 3 - tied + 2 * (7 * layers + 1)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < BUDGET, (worst, found[worst])


def test_without_the_patch_it_is_float32(case: Case, ours: Model) -> None:
    """Why the patch: transformers' float64 model is a float32 one in its norms and softmax."""
    corpus = batch(False)
    found = distances(
        run_ours(ours, corpus), run_theirs(case.folder, corpus, patched=False), corpus.real
    )
    assert 1e-9 < found["logits"] < 1e-5
    assert 1e-9 < max(found.values()) < 1e-4


FAULTS: dict[str, Callable[[Model], Model]] = {
    "eps": lambda m: with_config(m, norm_eps=m.config.norm_eps * 1.1),
    "theta": lambda m: with_config(m, rope_theta=m.config.rope_theta * 1.1),
    "one weight, one unit of bfloat16": lambda m: with_parameter(
        m, "blocks.1.mlp.up.weight", lambda W: np.where(np.arange(W.size).reshape(W.shape) == 5,
                                                       W * (1 + 2.0**-7), W)),
    "norms swapped": lambda m: with_parameter(
        m, "blocks.0.attn_norm.weight", lambda _: m.parameters["blocks.0.mlp_norm.weight"]),
    "key-value heads swapped": lambda m: with_parameter(
        m, "blocks.0.attn.v.weight", lambda W: np.roll(W, len(W) // 2, axis=0)),
}  # fmt: skip


def with_config(model: Model, **changed: Any) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changed))


def with_parameter(model: Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Model:
    return model.with_parameters({name: change(model.parameters[name])})


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_can_fail(case: Case, ours: Model, fault: str) -> None:
    corpus = batch(False)
    wrong = run_ours(FAULTS[fault](ours), corpus)
    found = distances(wrong, run_theirs(case.folder, corpus), corpus.real)
    assert max(found.values()) > 1e8 * BUDGET and found["logits"] > 1e7 * BUDGET


# ------------------------------------------------------------------ files


def test_transformers_loads_what_is_exported(case: Case, ours: Model, tmp_path: Path) -> None:
    """Verbatim config, and the minimal one of a model that has no checkpoint: the same logits."""
    weights.save(ours, tmp_path / "w.h5")
    huggingface.export(tmp_path / "w.h5", tmp_path / "verbatim")
    weights.save(dataclasses.replace(ours, source={}), tmp_path / "bare.h5")
    huggingface.export(tmp_path / "bare.h5", tmp_path / "minimal")
    assert "checkpoint_config" not in store.open_file(tmp_path / "bare.h5").provenance
    corpus = batch(False)
    wanted = run_theirs(case.folder, corpus)
    for folder in ("verbatim", "minimal"):
        found = distances(run_theirs(tmp_path / folder, corpus), wanted, corpus.real)
        assert max(found.values()) == 0


def test_convert_export_convert_is_identical(case: Case, tmp_path: Path) -> None:
    one, two = tmp_path / "w1.h5", tmp_path / "w2.h5"
    huggingface.convert(case.folder, one)
    huggingface.export(one, tmp_path / "hf")
    huggingface.convert(tmp_path / "hf", two)
    assert store.open_file(one).entries == store.open_file(two).entries


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
