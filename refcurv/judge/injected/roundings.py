"""Faults of arithmetic that rounds, or that is not the same twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final
from zlib import crc32

import numpy as np

from refcurv.files.bfloat16 import from_bfloat16, to_bfloat16
from refcurv.judge.diagnosis.variants.networks import CHANGES, Network
from refcurv.judge.dump import Theirs
from refcurv.judge.injected.injection import Change, Injection
from refcurv.judge.injected.rows import Rows, network, rows
from refcurv.judge.injected.sums import each
from refcurv.judge.injected.truth import Layers, Truth, both
from refcurv.law.checks import Array

DROPPED: Final = 0.1
"""Share of the entries that dropout sets to 0."""

SMALL: Final = 2.0**-24
"""Where the largest g lies if most vanish in float16: at its smallest number."""

OVERFLOW: Final = 2.0**16
"""Where the largest g lies if it overflows in float16: behind its largest number."""

Squares = Callable[[Array], Array]
"""Rows (n, X) → Σ x xᵀ."""


def bfloat16(X: Array) -> Array:
    """X as bfloat16 holds it."""
    return np.asarray(from_bfloat16(to_bfloat16(X)), np.float64)


def _float32(X: Array) -> Array:
    return np.asarray(X, np.float32).astype(np.float64)


def _tf32(X: Array) -> Array:
    """X with 11 significant bits."""
    fraction, exponent = np.frexp(X)
    return np.asarray(np.ldexp(np.rint(fraction * 2**11) / 2**11, exponent))


def _row_by_row(rounded: Callable[[Array], Array]) -> Squares:
    """The sum is rounded after each row."""

    def squares(x: Array) -> Array:
        total = np.zeros((x.shape[1], x.shape[1]))
        for row in x:
            total = rounded(total + np.outer(row, row))
        return total

    return squares


def _of_rounded(rounded: Callable[[Array], Array]) -> Squares:
    """The rows are rounded before they are squared."""
    return lambda x: np.asarray(rounded(x).T @ rounded(x))


def _in_float16(scale: float) -> Callable[[Array], Array]:
    """The largest g, times a scale, lies at it; in float16; and the scale is taken out again."""

    def rounded(g: Array) -> Array:
        by = scale / max(float(np.abs(g).max(initial=0)), 1e-300)
        with np.errstate(over="ignore"):
            return np.asarray((g * by).astype(np.float16).astype(np.float64) / by)

    return rounded


def _plain(x: Array) -> Array:
    return np.asarray(x.T @ x)


def _summed(A: Squares, G: Squares, net: Callable[[Network], Network] = lambda net: net) -> Change:
    """A and G of all rows, by another arithmetic."""

    def change(truth: Truth, layers: Layers) -> Layers:
        out = dict(layers)
        for name, one in rows(truth, net(network(truth))).items():
            out[name] = replace(out[name], **_means(truth, name, one, A, G))
        return out

    return change


def _means(truth: Truth, name: str, one: Rows, A: Squares, G: Squares) -> dict[str, Any]:
    ours = truth.factors[name]
    with np.errstate(invalid="ignore"):
        return {"A": A(one.a) / ours.n_A, "G": G(one.g) / ours.n_G}


def _stored(_: Truth, __: str, one: Theirs) -> Theirs:
    """The sums are bfloat16 where they are written."""
    A, n_A, G, n_G = both(one)
    return replace(one, A=bfloat16(A * n_A) / n_A, G=bfloat16(G * n_G) / n_G)


# ------------------------------------------------------------------ networks


def _each_function(net: Network, rounded: Callable[[Array], Array]) -> Network:
    """What attention and the MLP read and make is rounded, forward and backward."""
    ops = net.ops

    def attention(q: Array, k: Array, v: Array, *rest: Any) -> tuple[Array, Any]:
        y, saved = ops.attention_forward(rounded(q), rounded(k), rounded(v), *rest)
        return rounded(y), saved

    def attention_back(d: Array, saved: Any) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = ops.attention_backward(rounded(d), saved)
        return rounded(d_q), rounded(d_k), rounded(d_v)

    return replace(
        net, ops=replace(ops, attention_forward=attention, attention_backward=attention_back)
    )


def _short_model(net: Network) -> Network:
    """Weights, activations and gradients are bfloat16."""
    net = _each_function(CHANGES["weights as bfloat16"].make(net, 0.0), bfloat16)
    ops = net.ops

    def mlp(activation: Any, gate: Array | None, up: Array) -> tuple[Array, Any]:
        gate = None if gate is None else bfloat16(gate)
        y, saved = ops.mlp_forward(activation, gate, bfloat16(up))
        return bfloat16(y), saved

    def mlp_back(d: Array, saved: Any) -> tuple[Array | None, Array]:
        d_gate, d_up = ops.mlp_backward(bfloat16(d), saved)
        return None if d_gate is None else bfloat16(d_gate), bfloat16(d_up)

    return replace(net, ops=replace(ops, mlp_forward=mlp, mlp_backward=mlp_back))


def _dropout(net: Network) -> Network:
    """Hidden entries of the MLP are 0 at random, and the others larger.

    By chance of what the MLP reads: made again (`transformer.hidden_of`), they are the same.
    """
    ops = net.ops

    def mlp(activation: Any, gate: Array | None, up: Array) -> tuple[Array, Any]:
        y, saved = ops.mlp_forward(activation, gate, up)
        rng = np.random.default_rng(crc32(up.tobytes()))
        kept = (rng.random(y.shape) >= DROPPED) / (1 - DROPPED)
        return y * kept, (kept, saved)

    def mlp_back(d: Array, saved: Any) -> tuple[Array | None, Array]:
        kept, inner = saved
        return ops.mlp_backward(d * kept, inner)

    return replace(net, ops=replace(ops, mlp_forward=mlp, mlp_backward=mlp_back))


ROUNDINGS: Final = (
    Injection("B55", "dropout of a tenth is active in the MLP", "corpus",
              change=_summed(_plain, _plain, _dropout)),
    Injection("B56", "a kernel of attention that computes in bfloat16", "corpus",
              change=_summed(_plain, _plain, lambda net: _each_function(net, bfloat16))),
    Injection("B58", "sums are kept in bfloat16", "corpus",
              change=_summed(_row_by_row(bfloat16), _row_by_row(bfloat16))),
    Injection("B58-stored", "sums are written in bfloat16", change=each(_stored)),
    Injection("B59", "the model is bfloat16", "corpus",
              change=_summed(_of_rounded(bfloat16), _of_rounded(bfloat16), _short_model)),
    Injection("B60", "products round their operands to 11 bits", "corpus",
              change=_summed(_of_rounded(_tf32), _of_rounded(_tf32))),
    Injection("B61", "gradients overflow in float16", "corpus",
              change=_summed(_plain, _of_rounded(_in_float16(OVERFLOW)))),
    Injection("B61-underflow", "gradients vanish in float16", "corpus",
              change=_summed(_plain, _of_rounded(_in_float16(SMALL)))),
    Injection("B63", "sums are kept in float32", "corpus",
              change=_summed(_row_by_row(_float32), _row_by_row(_float32))),
)  # fmt: skip
