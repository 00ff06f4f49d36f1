"""Every number of a valid case that balls can enclose, from its weights, corpus and drawn labels.

It is the transformer of `refcurv.model` on the layer functions of `refcurv.certified`. What the
file gives is exact; what leaves here is proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refcurv.algebra.balls import Balls, exact, joined, zeros
from refcurv.algebra.duals import Duals
from refcurv.certified.layers import BALLS, hessian_product, softmax
from refcurv.certified.zeros import unshifted
from refcurv.judge.cases.case import Case, layers_of
from refcurv.judge.cases.flows import Flow, Seen, flow, kept_rows, seen
from refcurv.judge.cases.harness import subject_of
from refcurv.model.config import ModelConfig
from validation.cases.spectral import spectral

Numbers = Any
"""Balls, or dual balls."""


def enclosures(case: Case) -> Iterator[tuple[str, Balls]]:
    """Names of the file and their balls, at the bits that are set (`algebra.balls.bits`)."""
    model, corpus = subject_of(case)
    config, one = model.config, seen(model.config, corpus)
    if one.inputs.dtype.kind == "f":
        one = replace(one, inputs=exact(one.inputs))
    theta = {name: exact(x) for name, x in model.parameters.items()}
    gold, sampled = (
        _against(config, theta, one, label) for label in (one.label, case.arrays["drawn"])
    )
    yield from _outputs(one, gold)
    for name in theta:
        yield f"gradients.{name}", unshifted(config, name, gold.gradient[name])[0]
    layers = layers_of(case.arrays, "rows.", ".kept")
    for layer in layers:
        made = dict(_of_layer(case, one, layer, gold, sampled))
        sums = (made[f"factors.{layer}.{S}"] for S in ("sum_A", "sum_G"))
        yield from made.items()
        yield from spectral(case, layer, model.parameters[config.weight_of(layer)], *sums)
    dense = next((name for name in case.arrays if name.endswith(".hessian")), None)
    smallest = None if dense is None else dense.removeprefix("exact.").removesuffix(".hessian")
    yield from _expected(config, theta, one, layers, smallest)
    if smallest is not None:
        yield from _dense(config, theta, one, smallest)


def _attention_backward(d_context: Numbers, saved: Any) -> tuple[Numbers, Numbers, Numbers]:
    """A query that sees one key sends exactly 0 to it (O31), where balls know 0 up to a radius."""
    q, k, v, p, size = saved
    alone = (~getattr(p, "value", p).is_zero()).sum(axis=-1, keepdims=True) == 1
    d_q, d_k, _ = BALLS.attention_backward(d_context, (q, k, v, p * (~alone).astype(int), size))
    return d_q, d_k, BALLS.attention_backward(d_context, saved)[2]


OPS = replace(BALLS, attention_backward=_attention_backward)


def _against(config: ModelConfig, theta: Any, one: Seen, label: Any) -> Flow:
    """Forward, and the backward of the loss against these labels."""
    at = one.label >= 0
    return flow(config, theta, one, lambda z: BALLS.cross_entropy(z, label[at])[1], OPS)


def _real(x: Balls, one: Seen) -> Balls:
    """Zeros on padding; images have none."""
    shown = x.shape[:2] == one.real.shape
    return x * one.real[..., None].astype(np.int64) if shown else x


def _outputs(one: Seen, gold: Flow) -> Iterator[tuple[str, Balls]]:
    logits: Numbers = gold.logits
    at, nats = one.label >= 0, zeros(one.label.shape)
    nats[at] = BALLS.cross_entropy(logits[at], one.label[at])[0]
    yield "logits", _real(logits, one)
    yield "nats", nats
    yield "loss", nats.sum()


def _of_layer(
    case: Case, one: Seen, layer: str, gold: Flow, sampled: Flow
) -> Iterator[tuple[str, Balls]]:
    """Rows, and their sums over the kept ones."""
    tap: Numbers = gold.taps[layer]
    drawn: Numbers = sampled.taps[layer]
    keep = kept_rows(one, layer, tap)
    yield f"rows.{layer}.a", _real(tap.a, one)
    yield f"rows.{layer}.g", _real(tap.g, one)
    yield f"rows.{layer}.g_sampled", _real(drawn.g, one)
    yield f"factors.{layer}.sum_A", _gram(tap.a[keep])
    if f"factors.{layer}.sum_a" in case.arrays:
        yield f"factors.{layer}.sum_a", tap.a[keep].sum(axis=0)
    yield f"factors.{layer}.sum_G", _gram(drawn.g[keep])
    yield f"empirical.{layer}.sum_G", _gram(tap.g[keep])


def _gram(x: Balls) -> Balls:
    return x.T @ x


# ------------------------------------------------------------------ over all labels


def _expected(
    config: ModelConfig, theta: Any, one: Seen, layers: list[str], dense: str | None
) -> Iterator[tuple[str, Balls]]:
    """FISHER's `expected`: Σ g gᵀ of each layer; Σ rvec(g aᵀ) rvec(g aᵀ)ᵀ of the dense one."""
    sums: dict[str, Balls] = {}
    for made in _every_label(config, theta, one):
        for layer in layers:
            tap: Numbers = made.taps[layer]
            _add(sums, f"expected.{layer}.sum_G", _gram(tap.g[kept_rows(one, layer, tap)]))
        if dense is not None:
            tap = made.taps[dense]
            g, a = tap.g.reshape(-1, tap.g.shape[-1]), tap.a.reshape(-1, tap.a.shape[-1])
            rows = (g[:, :, None] * a[:, None, :]).reshape(len(g), -1)
            _add(sums, f"exact.{dense}.f_tok", _gram(rows))
            D = tap.g.swapaxes(1, 2) @ tap.a  # one position sends, so that a sequence has one D
            _add(sums, f"exact.{dense}.fisher", _gram(D.reshape(len(D), -1)))
    yield from sums.items()


def _add(sums: dict[str, Balls], name: str, x: Balls) -> None:
    sums[name] = sums[name] + x if name in sums else x


def _every_label(config: ModelConfig, theta: Any, one: Seen) -> Iterator[Flow]:
    """For each position and entry v: √p_v (onehot(v) − p), sent back there in every sequence.

    No position reaches another sequence, so that all sequences share a backward.
    """
    t_N = np.nonzero(one.label >= 0)[1]
    for t in range(one.label.shape[1]):
        for v in range(config.vocabulary):
            onehot, here = np.arange(config.vocabulary) == v, (t_N == t)[:, None].astype(np.int64)

            def send(z: Any, v: int = v, onehot: Any = onehot, here: Any = here) -> Any:
                p = softmax(z, np.ones(z.shape, bool))
                return (onehot - p) * p[:, v : v + 1].sqrt() * here

            yield flow(config, theta, one, send, OPS)


# ------------------------------------------------------------------ dense curvature


def _dense(config: ModelConfig, theta: Any, one: Seen, layer: str) -> Iterator[tuple[str, Balls]]:
    """Columns of the Hessian, and of J for the GGN, by dual balls: one forward for each entry."""
    weight, at = config.weight_of(layer), one.label >= 0
    still: dict[str, Numbers] = {name: Duals(x, zeros(x.shape)) for name, x in theta.items()}
    slopes, columns, turned = [], [], []
    for k in range(int(np.prod(theta[weight].shape))):
        along = exact(np.arange(theta[weight].shape[0] * theta[weight].shape[1]) == k)
        moved = {**still, weight: Duals(theta[weight], along.reshape(theta[weight].shape))}
        made: Numbers = _against(config, moved, one, one.label)
        z, J = made.logits[at].value, made.logits[at].derivative
        slopes.append(made.gradient[weight].derivative.reshape(-1, 1))
        columns.append(J.reshape(-1, 1))
        turned.append(hessian_product(z, J, one.label[at]).reshape(-1, 1))
    yield f"exact.{layer}.hessian", joined(slopes, axis=1)
    yield f"exact.{layer}.ggn", joined(columns, axis=1).T @ joined(turned, axis=1)
