"""An honest K-FAC collector in NumPy, with a network of its own (numpy_network.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from validation.judge.programs.numpy_network import Network

Array = np.ndarray
Dump = dict[str, tuple[Any, Any, Any]]


class Collector:
    """`collect()` → {layer: (A, G, n)}; labels are "gold", "given" or "own"."""

    network: type[Network] = Network

    def __init__(self, setting: Any, labels: str, dtype: str = "float64", seed: int = 3) -> None:
        self.setting, self.data, self.names = setting, setting.data, set(setting.names)
        self.config, self.kind, self.dtype = setting.model.config, labels, dtype
        self.wide = np.float64 if dtype == "float64" else np.float32
        self.rng = np.random.default_rng(seed)

    def collect(self) -> Dump:
        self.sums: dict[str, list[Any]] = {}
        net = self.network(self.config, self.parameters(), self.dtype, self.add)
        for begin in range(0, len(self.data.inputs), self.setting.batch):
            self.b = b = self.batch(slice(begin, begin + self.setting.batch))
            z, back = net.run(b)
            back(self.slope(z, self.labels(z, b)).astype(self.wide))
        return self.finish()

    def parameters(self) -> dict[str, Array]:
        return dict(self.setting.model.parameters)

    def align(self, b: SimpleNamespace) -> None:
        """Padding goes to the left, where it sees itself alone."""
        T = b.real.shape[1]
        order = (np.arange(T) + b.real.sum(1, keepdims=True)) % T
        for name, x in list(vars(b).items()):
            setattr(b, name, np.take_along_axis(x, order, 1))
        b.segment = np.where(b.real, b.segment, -1)

    def batch(self, at: slice) -> SimpleNamespace:
        d = self.data
        b = SimpleNamespace(inputs=d.inputs[at], label=d.label[at], drawn=d.drawn[at],
                            real=d.real[at], segment=d.segment[at])  # fmt: skip
        if self.setting.left:
            self.align(b)
        t = np.arange(b.segment.shape[1])
        b.same = b.segment[:, :, None] == b.segment[:, None]
        b.position = t - np.where(b.same, t, len(t)).min(-1)
        b.length = (b.same & b.real[:, None]).sum(-1)
        b.visible = self.visible(b, t[:, None] >= t)
        if d.images:
            b.keep = b.label >= 0
        else:
            labelled = (b.label >= 0)[:, None] & b.same
            if self.config.causal:
                labelled = labelled & (t[:, None] <= t)
            b.keep = labelled.any(-1) & b.real
        return b

    def visible(self, b: SimpleNamespace, causal: Array) -> Array:
        return b.same & (causal if self.config.causal else b.real[:, None])

    def labels(self, z: Array, b: SimpleNamespace) -> Array:
        y = b.drawn if self.kind == "given" else b.label
        if self.kind == "own":
            p = np.exp(z - z.max(-1, keepdims=True))
            c = p.cumsum(-1)
            y = (c < self.rng.random((*z.shape[:2], 1)) * c[..., -1:]).sum(-1)
        return np.where(b.label >= 0, y, -1)

    def slope(self, z: Array, y: Array) -> Array:
        """p − onehot at positions with a label: of the sum of nats."""
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p[(*np.nonzero(y >= 0), y[y >= 0])] -= 1
        return np.where((y >= 0)[..., None], p, 0)

    def add(self, name: str, a: Array, g: Array) -> None:
        if name not in self.names:
            return
        keep = np.broadcast_to(self.b.keep, a.shape[:2])
        a, g = a[keep], g[keep]
        if self.setting.joint and self.config.has_bias(name):
            a = np.concatenate([a, np.ones_like(a[:, :1])], 1)
        sums = self.sums.setdefault(name, [0, 0, 0])
        for side, x in enumerate((a.T @ a, g.T @ g, len(a))):
            sums[side] = sums[side] + x

    def finish(self) -> Dump:
        return {k: (A / n, G / n, n) for k, (A, G, n) in self.sums.items()}
