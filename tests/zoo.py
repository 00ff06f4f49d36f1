"""Small nets in the transformer's place, for which theory says what the curvature must be.

A net is a list of stages on n data of T positions each, (n, T, features). Every stage but `mix` and
`pool` treats each position by itself. As a `Problem`, it has the exact curvature of any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refcurv.curvature.exact import OutputLoss, Problem
from refcurv.law.checks import Array
from refcurv.model import layers
from refcurv.model.config import Activation
from refcurv.model.loss import cross_entropy, hessian_product, root_product
from refcurv.model.sampling import draw_labels, signs, uniforms
from refcurv.model.transformer import Slope, Tap

Stage = tuple[Any, ...]
"""("linear", name), ("bias", name), ("relu",), ("tanh",), ("swiglu", gate, up), ("mix", M (T, T)),
("pool", "mean" or "sum"), ("scale", c)."""


@dataclass(frozen=True)
class Net:
    """Stages, their parameters, the data, and the labels (n, T) or targets (n, T, V).

    After a `pool` there is one loss position per datum: labels (n, 1), targets (n, 1, V).
    """

    stages: list[Stage]
    parameters: dict[str, np.ndarray] = field(repr=False)
    x: np.ndarray
    label: np.ndarray | None = None
    target: np.ndarray | None = None

    def problem(self) -> Problem:
        def kept(tap: Tap) -> np.ndarray:
            return np.ones(tap.a.shape[:2], dtype=bool)

        read = [name for s in self.stages if s[0] in ("linear", "swiglu") for name in s[1:]]
        linear = frozenset(f"{name}.weight" for name in read if read.count(name) == 1)
        return Problem(
            self.parameters, self.forward, self.backward, self.loss(), linear, kept, self.split
        )

    def split(self) -> Iterator[Problem]:
        for i in range(len(self.x)):
            label = None if self.label is None else self.label[i : i + 1]
            target = None if self.target is None else self.target[i : i + 1]
            yield replace(self, x=self.x[i : i + 1], label=label, target=target).problem()

    def loss(self) -> OutputLoss:
        if self.label is not None:
            return softmax_loss(self.label.reshape(-1))
        return square_loss(self.target.reshape(-1, self.target.shape[-1]))

    def forward(self, parameters: Any) -> tuple[Array, list[Any]]:
        h, saved = self.x, []
        for kind, *what in self.stages:
            saved.append(h)
            if kind == "linear":
                h = h @ parameters[f"{what[0]}.weight"].T
            elif kind == "bias":
                h = h + parameters[f"{what[0]}.bias"]
            elif kind == "relu":
                h = np.where(h.real > 0, h, 0)
            elif kind == "tanh":
                h = np.tanh(h)
            elif kind == "swiglu":
                gate, up = (h @ parameters[f"{name}.weight"].T for name in what)
                h, saved[-1] = layers.mlp_forward(Activation.SILU, gate, up)[0], (h, gate, up)
            elif kind == "mix":
                h = what[0] @ h
            elif kind == "pool":
                h = getattr(h, what[0])(axis=1, keepdims=True)
            elif kind == "scale":
                h = h * what[0]
        return h.reshape(-1, h.shape[-1]), [h.shape, *saved]

    def backward(self, parameters: Any, saved: list[Any], d_z: Array) -> Iterator[Tap | Slope]:
        d = d_z.reshape(-1, *saved[0][1:])
        for (kind, *what), h in zip(self.stages[::-1], saved[:0:-1], strict=True):
            if kind == "linear":
                yield Tap(f"{what[0]}.weight", h, d)
                d = d @ parameters[f"{what[0]}.weight"]
            elif kind == "bias":
                yield Slope(f"{what[0]}.bias", d.reshape(-1, d.shape[-1]).sum(axis=0))
            elif kind == "relu":
                d = np.where(h.real > 0, d, 0)
            elif kind == "tanh":
                t = np.tanh(h)
                d = d * (1 - t * t)
            elif kind == "swiglu":
                a, gate, up = h
                d_gate, d_up = layers.mlp_backward(d, (Activation.SILU, gate, up))
                yield Tap(f"{what[1]}.weight", a, d_up)
                yield Tap(f"{what[0]}.weight", a, d_gate)
                W_gate, W_up = (parameters[f"{name}.weight"] for name in what)
                d = d_gate @ W_gate + d_up @ W_up
            elif kind == "mix":
                d = what[0].T @ d
            elif kind == "pool":
                T = h.shape[1]
                d = np.repeat(d, T, axis=1) / (T if what[0] == "mean" else 1)
            elif kind == "scale":
                d = d * what[0]


def softmax_loss(label_N: Array) -> OutputLoss:
    """Cross-entropy; the labels of datum 0 are drawn with the uniforms of corpus index 0."""

    def drawn(z: Array, seed: int, draw: int) -> Array:
        return cross_entropy(z, draw_labels(z, uniforms(seed, draw, 0, len(z))))[1]

    def signed_root(z: Array, seed: int, draw: int) -> Array:
        sign = [signs(seed, draw, 0, t, z.shape[1]) for t in range(len(z))]
        return root_product(z, np.stack(sign))

    return OutputLoss(
        lambda z: cross_entropy(z, label_N), hessian_product, root_product, drawn, signed_root
    )


def square_loss(target_NV: Array) -> OutputLoss:
    """½ Σ (z − y)²: the nats, but for a constant, of a normal distribution with unit variance."""

    def drawn(z: Array, seed: int, draw: int) -> Array:
        return np.random.default_rng([seed, draw]).normal(size=z.shape)

    def signed_root(z: Array, seed: int, draw: int) -> Array:
        return np.random.default_rng([seed, draw, 1]).choice([-1.0, 1.0], size=z.shape)

    def terms(z: Array) -> tuple[Array, Array]:
        r = z - target_NV
        return (r * r).sum(axis=-1) / 2, r

    return OutputLoss(terms, lambda z, v: v, lambda z, e: e, drawn, signed_root)


def net(
    stages: list[Stage],
    widths: dict[str, tuple[int, int]],
    *,
    n: int = 1,
    T: int = 1,
    loss: str = "softmax",
    seed: int = 0,
) -> Net:
    """Random weights (d_out, d_in), data, and labels or targets for the given stages."""
    rng = np.random.default_rng(seed)
    parameters = {
        f"{name}.weight": rng.normal(size=size) * 1.5 / np.sqrt(size[1])
        for name, size in widths.items()
    }
    for kind, *what in stages:
        if kind == "bias":
            parameters[f"{what[0]}.bias"] = rng.normal(size=widths[what[0]][0])
    x = rng.normal(size=(n, T, next(iter(widths.values()))[1]))
    V = list(widths.values())[-1][0]
    terms = (n, 1 if any(s[0] == "pool" for s in stages) else T)
    if loss == "softmax":
        return Net(stages, parameters, x, label=rng.integers(0, V, terms))
    return Net(stages, parameters, x, target=rng.normal(size=(*terms, V)))


def mlp(activation: str, **options: Any) -> Net:
    """Three linear layers with an activation between them, "" for none: a deep linear net."""
    between = [(activation,)] if activation else []
    stages = [("linear", "one"), *between, ("linear", "two"), *between, ("linear", "three")]
    return net(stages, {"one": (4, 3), "two": (5, 4), "three": (3, 5)}, **options)


def causal_mix(T: int, seed: int = 5) -> np.ndarray:
    """A lower-triangular (T, T) matrix: positions mix as attention mixes them."""
    return np.tril(np.random.default_rng(seed).normal(size=(T, T))) + np.eye(T)
