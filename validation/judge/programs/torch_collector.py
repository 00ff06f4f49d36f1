"""An honest K-FAC collector in PyTorch: hooks, a loss that is a sum, sums of outer products.

Each step is a method, so that a fault is a class that overrides one of them (planted_torch.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from validation.judge.programs.torch_network import Network

DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
}
"""Of the model, and of products and sums."""
IGNORE = -100
Dump = dict[str, tuple[Any, Any, Any]]


def numbers(x: Any) -> np.ndarray:
    """As NumPy; NumPy has no bfloat16."""
    return np.asarray(x.float() if getattr(x, "dtype", None) == torch.bfloat16 else x)


class Collector:
    """`collect()` → {layer: (A, G, n)}; labels are "gold", "given", "own" or "expected"."""

    batch_size: int | None = None
    """Sequences in one batch; None, as the setting has it."""

    def __init__(self, setting: Any, labels: str, dtype: str = "float64", seed: int = 3) -> None:
        self.setting, self.data, self.names = setting, setting.data, setting.names
        self.config, self.kind = setting.model.config, labels
        self.model_dtype, self.sum_dtype = DTYPES[dtype]
        self.generator = torch.Generator().manual_seed(seed)

    def collect(self) -> Dump:
        self.net = self.network().to(self.model_dtype)
        self.register()
        self.A = dict.fromkeys(self.names, 0)
        self.G, self.n = dict(self.A), dict(self.A)
        for at in self.batches():
            self.run(self.batch(at))
        return {k: (numbers(A), numbers(G), n) for k, (A, G, n) in self.finish().items()}

    # ------------------------------------------------------------------ model and data

    def parameters(self) -> dict[str, Any]:
        return {name: np.array(x) for name, x in self.setting.model.parameters.items()}

    def network(self) -> Network:
        net, given = Network(self.config).double(), self.parameters()
        own = net.state_dict()
        given.setdefault("head.weight", given.get("embed.weight"))
        net.load_state_dict({k: torch.tensor(given[k]).reshape(own[k].shape) for k in own})
        return net

    def sequences(self) -> np.ndarray:
        return np.arange(len(self.data.inputs))

    def batches(self) -> Iterator[np.ndarray]:
        every, size = self.sequences(), self.batch_size or self.setting.batch
        return iter([every[i : i + size] for i in range(0, len(every), size)])

    def read(self, at: np.ndarray) -> SimpleNamespace:
        """Some sequences, as the corpus has them."""
        d = self.data
        segment, real = torch.tensor(d.segment[at]).long(), torch.tensor(d.real[at])
        b = SimpleNamespace(at=at, segment=segment, real=real)
        b.inputs = torch.tensor(d.inputs[at]) if d.images else torch.tensor(d.inputs[at]).long()
        b.label, b.drawn = torch.tensor(d.label[at]), torch.tensor(d.drawn[at])
        return b

    def align(self, b: SimpleNamespace) -> None:
        """Padding goes to the left, where it sees itself alone."""
        T = b.real.shape[1]
        order = (torch.arange(T) + b.real.sum(1, keepdim=True)) % T
        for name in ("inputs", "label", "drawn", "real", "segment"):
            setattr(b, name, getattr(b, name).gather(1, order))
        b.segment = torch.where(b.real, b.segment, -1)

    def batch(self, at: np.ndarray) -> SimpleNamespace:
        b = self.read(at)
        if self.setting.left:
            self.align(b)
        b.same = b.segment[:, :, None] == b.segment[:, None]
        t = torch.arange(b.segment.shape[1])
        b.position = t - torch.where(b.same, t, len(t)).amin(-1)
        b.length = (b.same & b.real[:, None]).sum(-1)
        b.visible = b.same & (self.causal(t) if self.config.causal else b.real[:, None])
        return b

    def causal(self, t: Tensor) -> Tensor:
        return t[:, None] >= t

    # ------------------------------------------------------------------ hooks

    def register(self) -> None:
        modules = dict(self.net.named_modules())
        for name in self.names:
            modules[name].register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def record(module: Any, inputs: Any, output: Tensor) -> None:
            self.a[name] = inputs[0]
            output.register_hook(lambda g: self.g.__setitem__(name, g))

        return record

    def rows_of(self, name: str, x: Tensor, gradient: bool) -> Tensor:
        """(B, T, features): a convolution's patches are rows."""
        if name != "patch":
            return x
        P = self.config.image.patch
        x = x.flatten(2) if gradient else F.unfold(x, P, stride=P)
        return x.transpose(1, 2)

    # ------------------------------------------------------------------ forward and backward

    def run(self, b: SimpleNamespace) -> None:
        self.a: dict[str, Tensor] = {}
        z = self.net(b)
        for number, loss in enumerate(self.losses(z.to(self.sum_dtype), b)):
            self.g: dict[str, Tensor] = {}
            loss.backward(retain_graph=True)
            for name in self.names:
                self.add(name, b, first=number == 0)

    def losses(self, z: Tensor, b: SimpleNamespace) -> Iterator[Tensor]:
        """One scalar for each backward pass."""
        if self.kind != "expected":
            yield self.loss(z, self.labels(z.detach(), b), b)
            return
        p = z.detach().softmax(-1)
        for t in range(z.shape[1]):
            for v in range(z.shape[2]):
                root = p[:, t, v, None].sqrt() * (F.one_hot(torch.tensor(v), z.shape[2]) - p[:, t])
                yield (z[:, t] * root)[b.label[:, t] >= 0].sum()

    def labels(self, z: Tensor, b: SimpleNamespace) -> Tensor:
        if self.kind == "own":
            y = torch.multinomial(z.softmax(-1).flatten(0, 1), 1, generator=self.generator)
            y = y.reshape(z.shape[:2])
        else:
            y = b.drawn if self.kind == "given" else b.label
        return self.supervised(y, b)

    def supervised(self, y: Tensor, b: SimpleNamespace) -> Tensor:
        return torch.where(b.label >= 0, y, IGNORE)

    def loss(self, z: Tensor, y: Tensor, b: SimpleNamespace) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="sum")

    # ------------------------------------------------------------------ sums

    def rows(self, name: str, b: SimpleNamespace) -> Tensor:
        """Which rows enter A and G: those from which a label of their segment is reached."""
        if self.data.images:
            return (b.label >= 0).expand(self.gradients(name, b).shape[:2])
        t = torch.arange(b.label.shape[1])
        reached = b.same & (b.label >= 0)[:, None]
        reached = reached & (t[:, None] <= t) if self.config.causal else reached
        return reached.any(-1) & b.real

    def inputs(self, name: str, b: SimpleNamespace) -> Tensor:
        return self.rows_of(name, self.a[name].detach(), gradient=False).to(self.sum_dtype)

    def gradients(self, name: str, b: SimpleNamespace) -> Tensor:
        return self.rows_of(name, self.g[name], gradient=True).to(self.sum_dtype)

    def add(self, name: str, b: SimpleNamespace, first: bool) -> None:
        self.g.setdefault(name, torch.zeros(self.output_shape(name)))
        self.G[name] = self.G[name] + self.gram(self.gradients(name, b)[self.rows(name, b)])
        if first:
            a = self.column(name, self.inputs(name, b), b)
            self.A[name] = self.A[name] + self.gram(a[self.rows_a(name, b)])
            self.n[name] += int(self.rows(name, b).sum())

    def output_shape(self, name: str) -> tuple[int, ...]:
        return (*self.a[name].shape[:2], self.config.linear_layers()[name][0])

    def rows_a(self, name: str, b: SimpleNamespace) -> Tensor:
        return self.rows(name, b)

    def column(self, name: str, a: Tensor, b: SimpleNamespace) -> Tensor:
        """The inputs, and a 1 behind them where a bias is a column."""
        if not (self.setting.joint and self.config.has_bias(name)):
            return a
        return torch.cat([a, torch.ones_like(a[..., :1])], -1)

    def gram(self, x: Tensor) -> Tensor:
        return x.T @ x

    def finish(self) -> Dump:
        return {k: (self.A[k] / self.n[k], self.G[k] / self.n[k], self.n[k]) for k in self.names}
