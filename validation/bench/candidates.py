"""The programs that are compared: refcurv, the official collector in three forms, two libraries.

Each can be given the labels, so that all must find the same sums; without them it draws its own.

The official collector's behaviour is written from the facts of
github.com/goodfire-ai/memorization_kfac, data/collect_kfac_multilayer.py:
  - a forward pre-hook keeps each wanted nn.Linear's input, a full backward hook takes its output
    gradient; both lose the last position of every sequence and become rows in float32;
  - A += aᵀ a and G += gᵀ g when the gradient comes, per layer: gate and up sum the same A twice;
  - labels: torch.multinomial on softmax(logits[:, :-1]); loss: their *mean* cross-entropy, so that
    G is 1/m² of ours, m the labelled positions of a batch;
  - train mode, no dropout, use_cache off; only the wanted weights require gradients, but
    enable_input_require_grads makes the backward pass go down to the embedding all the same;
  - gradient checkpointing, and one pass over the corpus for each block.
`as shipped` does all of that, `one pass` all but the last line, `repaired` all but the last two.
Left out of each, in its favour: bfloat16, Accelerator, the stream of texts, the attention mask.

curvlinops and kronfluence get the sequences without their last positions. No label follows these,
so that nothing changes but rows of A, which are then the same as here.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from validation.bench.proxies import PARTS, Size, labels_of, layers_of, load_ours, tokens_of

if TYPE_CHECKING:
    import torch

Array = np.ndarray
Sums = dict[str, tuple[Array, Array, int]]
"""Layer → (Σ a aᵀ, Σ g gᵀ, rows), g of the summed nats."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What every candidate is given: files of `proxies.make`, the wanted blocks, the threads."""

    folder: Path
    size: Size
    blocks: tuple[int, ...]
    threads: int

    @property
    def names(self) -> dict[str, str]:
        """Our name of each wanted layer → transformers'."""
        return {
            f"blocks.{i}.mlp.{part}": f"model.layers.{i}.mlp.{part}_proj"
            for i in self.blocks
            for part in PARTS
        }

    @property
    def tokens(self) -> torch.Tensor:
        """(B, T)."""
        import torch

        return torch.from_numpy(tokens_of(self.folder, self.size).astype(np.int64))

    @property
    def labels(self) -> Array:
        """(B, T − 1)."""
        return labels_of(self.folder, self.size)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One program: `collect` by given labels or by its own, and its result in the house's units."""

    collect: Callable[[Array | None], Any]
    sums: Callable[[Any], Sums]


# ------------------------------------------------------------------ refcurv


def refcurv(subject: Subject) -> Candidate:
    """`rc.collect` in float32."""
    import refcurv as rc

    model = load_ours(subject.folder)
    tokens = tokens_of(subject.folder, subject.size)
    layers = layers_of(subject.blocks)

    def collect(labels: Array | None) -> rc.Factors:
        if labels is None:
            corpus, fisher = rc.Corpus(tokens), "sampled"
        else:
            known = np.full(tokens.shape, -1)
            known[:, :-1] = labels
            corpus, fisher = rc.Corpus(tokens, known), "empirical"
        return rc.collect(model, corpus, layers, fisher, in_flight=subject.threads)

    def sums(factors: rc.Factors) -> Sums:
        return {name: (f.sum_A, f.sum_G, f.n_A) for name, f in factors.items()}

    return Candidate(collect, sums)


# ------------------------------------------------------------------ the official collector


class Moments:
    """A and G of one nn.Linear, summed in float32 while the backward pass goes by."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        import torch

        self.A = torch.zeros(linear.in_features, linear.in_features)
        self.G = torch.zeros(linear.out_features, linear.out_features)
        self.rows = 0
        self._a_NI: torch.Tensor | None = None
        self._hooks = [
            linear.register_forward_pre_hook(self._keep_input),
            linear.register_full_backward_hook(self._add),
        ]

    def _keep_input(self, _linear: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self._a_NI = _rows(inputs[0])

    def _add(self, _linear: object, _d_in: object, d_out: tuple[torch.Tensor, ...]) -> None:
        a_NI, g_NO = self._a_NI, _rows(d_out[0])
        assert a_NI is not None
        self.A += a_NI.T @ a_NI
        self.G += g_NO.T @ g_NO
        self.rows += len(g_NO)
        self._a_NI = None

    def unhook(self) -> None:
        """Leave the layer as it was."""
        for hook in self._hooks:
            hook.remove()


def _rows(x_BTX: torch.Tensor) -> torch.Tensor:
    """Without the last position of each sequence, (N, X) in float32."""
    return x_BTX[:, :-1].detach().reshape(-1, x_BTX.shape[-1]).float()


def as_shipped(subject: Subject, passes: int | None = None) -> Candidate:
    """With checkpointing and a pass for each block; `passes`: only so many of them."""
    model = _loaded(subject)
    # since transformers 5 this makes the inputs require gradients too
    model.gradient_checkpointing_enable()
    return _official(subject, model, [(block,) for block in subject.blocks][:passes])


def one_pass(subject: Subject) -> Candidate:
    """Without checkpointing, all wanted layers in one pass."""
    model = _loaded(subject)
    model.enable_input_require_grads()
    return _official(subject, model, [subject.blocks])


def repaired(subject: Subject) -> Candidate:
    """One pass that goes no deeper than the lowest wanted layer."""
    return _official(subject, _loaded(subject), [subject.blocks])


def _loaded(subject: Subject) -> Any:
    """The checkpoint in float32 with sdpa attention, every parameter touched."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        subject.folder / "checkpoint", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model.train()
    _require_gradients(model, subject.names.values())
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def _require_gradients(model: Any, modules: Any) -> None:
    """Of the weights of these modules alone."""
    wanted = {f"{name}.weight" for name in modules}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def _official(subject: Subject, model: Any, groups: Sequence[Sequence[int]]) -> Candidate:
    """One pass over the corpus for each group of blocks."""
    token_BT = subject.tokens

    def collect(labels: Array | None) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for group in groups:
            own = {n: m for n, m in subject.names.items() if int(n.split(".")[1]) in group}
            _require_gradients(model, own.values())
            moments = {n: Moments(model.get_submodule(m)) for n, m in own.items()}
            _pass(model, token_BT, subject.size.batch, labels)
            for one in moments.values():
                one.unhook()
            found |= moments
        return found

    def sums(found: dict[str, Moments]) -> Sums:
        m = min(subject.size.batch, len(token_BT)) * (token_BT.shape[1] - 1)
        return {n: (one.A.numpy(), one.G.numpy() * float(m**2), one.rows)
                for n, one in found.items()}  # fmt: skip

    return Candidate(collect, sums)


def _pass(model: Any, token_BT: torch.Tensor, batch: int, labels: Array | None) -> None:
    """Forward and backward over all tokens, `batch` sequences at a time."""
    import torch

    for begin in range(0, len(token_BT), batch):
        part = slice(begin, begin + batch)
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=token_BT[part]).logits[:, :-1].float()
        logit_NV = logits.reshape(-1, logits.shape[-1])
        if labels is None:
            with torch.no_grad():
                label_N = torch.multinomial(logit_NV.softmax(dim=-1), 1).squeeze(1)
        else:
            label_N = torch.from_numpy(labels[part].reshape(-1))
        torch.nn.functional.cross_entropy(logit_NV, label_N).backward()
    model.zero_grad(set_to_none=True)


# ------------------------------------------------------------------ libraries


def curvlinops(subject: Subject) -> Candidate:
    """KFACLinearOperator 3.x: mc, one sample, expand, of a summed loss."""
    import torch
    from curvlinops import KFACLinearOperator

    class Classes(torch.nn.Module):
        """(B, T) → (B T, V)."""

        def __init__(self) -> None:
            super().__init__()
            self.model = _loaded(subject)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens).logits.flatten(0, 1)

    wrapped, token_BT = Classes(), subject.tokens[:, :-1].contiguous()
    named = dict(wrapped.named_parameters())
    weights = [named[f"model.{module}.weight"] for module in subject.names.values()]
    parts = token_BT.split(subject.size.batch)

    def collect(labels: Array | None) -> Any:
        made = KFACLinearOperator(
            wrapped, torch.nn.CrossEntropyLoss(reduction="sum"), weights,
            [(part, part.flatten()) for part in parts], check_deterministic=False,
            fisher_type="mc", mc_samples=1, num_data=len(token_BT),
            num_per_example_loss_terms=token_BT.shape[1],
        )  # fmt: skip
        if labels is not None:
            drawn = iter(torch.from_numpy(labels).split(subject.size.batch))
            made.draw_label = lambda _output: next(drawn).flatten()
        made.compute_kronecker_factors()
        return made

    def sums(made: Any) -> Sums:
        n = token_BT.numel()
        A, G = made._input_covariances, made._gradient_covariances
        return {
            name: (n * A[f"model.{module}"].numpy(), G[f"model.{module}"].numpy(), n)
            for name, module in subject.names.items()
        }

    return Candidate(collect, sums)


def kronfluence(subject: Subject) -> Candidate:
    """Analyzer.fit_covariance_matrices, with its data loader and its files; no eigenbases."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from safetensors.torch import load_file
    from torch.utils.data import TensorDataset

    class Language(Task):  # type: ignore[misc]  # it has no types
        """Summed nats of drawn labels, or of given ones."""

        given: Iterator[torch.Tensor] | None = None

        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logit_NV = model(input_ids=batch[0]).logits.flatten(0, 1)
            if self.given is not None:
                label_N = next(self.given).flatten()
            else:
                with torch.no_grad():
                    label_N = torch.multinomial(logit_NV.softmax(-1), 1).squeeze(1)
            return torch.nn.functional.cross_entropy(logit_NV, label_N, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(subject.names.values())

    task = Language()
    model = prepare_model(_loaded(subject), task)
    place = tempfile.TemporaryDirectory(dir=subject.folder)
    analyzer = Analyzer("run", model, task, output_dir=place.name, cpu=True, disable_tqdm=True)
    data = TensorDataset(subject.tokens[:, :-1].contiguous())

    def collect(labels: Array | None) -> Path:
        parts = None if labels is None else torch.from_numpy(labels).split(subject.size.batch)
        task.given = None if parts is None else iter(parts)
        analyzer.fit_covariance_matrices(
            "bench", data, per_device_batch_size=subject.size.batch,
            factor_args=FactorArguments(strategy="kfac"), overwrite_output_dir=True,
        )  # fmt: skip
        return next(Path(place.name).rglob("factors_bench"))

    def sums(folder: Path) -> Sums:
        read = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        A, G = read["activation_covariance"], read["gradient_covariance"]
        n = read["num_activation_covariance_processed"]
        return {
            name: (A[module].numpy(), G[module].numpy(), int(n[module]))
            for name, module in subject.names.items()
        }

    return Candidate(collect, sums)


# ------------------------------------------------------------------ all of them


@dataclass(frozen=True, slots=True)
class Entry:
    """How a candidate is made, and the module that it needs."""

    make: Callable[[Subject], Candidate]
    needs: str = "transformers"

    @property
    def there(self) -> bool:
        """Is that module installed?"""
        return importlib.util.find_spec(self.needs) is not None


OURS, OFFICIAL, SHIPPED = "refcurv", "official one pass", "official as shipped"
CANDIDATES = {
    OURS: Entry(refcurv, "refcurv"),
    OFFICIAL: Entry(one_pass),
    "official repaired": Entry(repaired),
    "curvlinops": Entry(curvlinops, "curvlinops"),
    "kronfluence": Entry(kronfluence, "kronfluence"),
    SHIPPED: Entry(as_shipped),
}
