"""Budgets are tight: of each identity a fault that it sees, and would not see were they × 100."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from strategies import case
from test_planted_bugs import planted

import refcurv as rc
from refcurv.curvature import eigenbasis, factors
from refcurv.curvature.exact import problems
from refcurv.judge import audit, bench
from refcurv.judge.identities import CHECKS, Measure
from refcurv.judge.identities import factors as of_factors
from refcurv.model import transformer
from refcurv.model.layers import DEFINITIONS
from refcurv.passes.fast import FAST

Wrong = Callable[[Callable[..., Any], float], Callable[..., Any]]
"""(the right function, how wrong) → the wrong one."""


def scaled(n: int | None = None) -> Wrong:
    """A result, or number n of several, is 1 + s times what it should be."""

    def make(right: Callable[..., Any], s: float) -> Callable[..., Any]:
        def wrong(*arguments: Any) -> Any:
            out = right(*arguments)
            if n is None:
                return out * (1 + s)
            return tuple(x * (1 + s) if i == n else x for i, x in enumerate(out))

        return wrong

    return make


def changed(change: Callable[..., Any]) -> Wrong:
    """change(right result, s, arguments) in place of the right result."""
    return lambda right, s: lambda *arguments: change(right(*arguments), s, *arguments)


def label_entry(out: Any, s: float, logit: np.ndarray, label: np.ndarray) -> Any:
    nats, slope = out
    n = np.flatnonzero(label >= 0)
    slope[n, label[n]] *= 1 + s
    return nats, slope


def sums(change: Callable[[factors.Factor, float], np.ndarray]) -> Wrong:
    """Another sum_G."""

    def wrong(out: Any, s: float, *_: Any) -> Any:
        return {name: replace(f, sum_G=change(f, s)) for name, f in out.items()}

    return changed(wrong)


def lowered(f: factors.Factor, s: float) -> np.ndarray:
    least = np.linalg.eigvalsh(f.sum_G)[0]
    return f.sum_G - (least + s * np.trace(f.sum_G)) * np.eye(len(f.sum_G))


def first_key(out: Any, s: float, *_: Any) -> Any:
    d_q, d_k, d_v = out
    first = np.arange(d_k.shape[1])[:, None, None] == 0
    return d_q, d_k * np.where(first, 1 + s, 1), d_v


def of_groups(out: Any, s: float, _: Any, saved: Any) -> Any:
    d_q, d_k, d_v = out
    return d_q, d_k, d_v * (1 + s * (saved[0].shape[2] > 1))


def along_y(out: Any, s: float, d_y: np.ndarray, saved: Any) -> Any:
    return out[0] + s * d_y, out[1]


def neighbour(out: Any, s: float, *_: Any) -> Any:
    d_q, d_k, d_v = out
    return d_q + s * np.roll(d_q, -1, axis=1), d_k, d_v


def by_length(out: Any, s: float, q: np.ndarray, k: np.ndarray, *_: Any) -> Any:
    return out[0] + s * k.shape[1], out[1]


def of_the_last(out: Any, s: float, q: np.ndarray, k: np.ndarray, v: np.ndarray, *_: Any) -> Any:
    return out[0] + s * np.repeat(v[:, -1:], out[0].shape[2] // v.shape[2], axis=2), out[1]


def some_kept(out: Any, s: float, W: np.ndarray, *_: Any) -> Any:
    return out + s * (W - out)


def everywhere(n: int) -> Wrong:
    return changed(lambda out, s, *_: tuple(x + s * (i == n) for i, x in enumerate(out)))


def epsilon(right: Callable[..., Any], s: float) -> Callable[..., Any]:
    return lambda x, gain, eps: right(x, gain, eps + s)


def other_input(right: Callable[..., Any], s: float) -> Callable[..., Any]:
    def wrong(config: Any, parameters: Any, layer: str, a: np.ndarray, g: np.ndarray) -> Any:
        return right(config, parameters, layer, a * (1 + s) if layer.endswith("up") else a, g)

    return wrong


@dataclass(frozen=True)
class Fault:
    """What is planted where, and how wrong: relative to what is right unless it says otherwise.

    models: by what their weights are multiplied; 30 saturates softmaxes and activations.
    """

    id: str
    what: str
    size: float
    wrong: Wrong
    where: Any
    name: str
    models: tuple[float, ...] = (1.0, 30.0)


USUAL = (1.0,)
"""Where the fault is absolute, or saturation hides it behind what it leaves of a softmax."""

SMOOTH = [
    Fault("R6", "queries' gradients of the kernels", 1e-12, scaled(0), FAST, "attention_backward"),
    Fault("O8", "the root of the loss", 3e-12, scaled(), problems, "root_product"),
    Fault("O9", "the loss's Hessian", 1e-11, scaled(), problems, "hessian_product"),
    Fault("O11", "the loss's Hessian", 1e-11, scaled(), problems, "hessian_product"),
    Fault("O14", "up's gradients", 1e-10, scaled(1), DEFINITIONS, "mlp_backward"),
    Fault("O15", "up's gradients", 1e-12, scaled(1), DEFINITIONS, "mlp_backward", USUAL),
    Fault("O16", "the label's entry", 1e-13, changed(label_entry), DEFINITIONS, "cross_entropy"),
    Fault("O17", "the loss's Hessian", 1e-2, scaled(), problems, "hessian_product"),
    Fault("O18", "G", 1e-12, sums(lambda f, s: f.sum_G * (1 + s)), factors, "finished"),
    Fault("O26", "G's smallest eigenvalue, below 0 by a share of the trace", 1e-13, sums(lowered),
          factors, "finished"),
    Fault("O29", "the loss's gradient", 1e-13, scaled(1), problems, "cross_entropy"),
    Fault("O32", "the first key's gradient", 1e-11, changed(first_key),
          DEFINITIONS, "attention_backward"),
    Fault("O33", "values' gradients of groups", 1e-12, changed(of_groups),
          DEFINITIONS, "attention_backward"),
    Fault("O34", "a norm's gradient, a share of d_y", 1e-14, changed(along_y),
          DEFINITIONS, "rms_norm_backward", USUAL),
    Fault("O35", "a norm's eps, absolute", 1e-12, epsilon, DEFINITIONS, "rms_norm_forward", USUAL),
    Fault("O36", "up's gradients", 1e-12, scaled(1), DEFINITIONS, "mlp_backward"),
    Fault("O38", "a share of the next query's gradient", 1e-13, changed(neighbour),
          DEFINITIONS, "attention_backward"),
    Fault("O41", "the loss's gradient", 1e-12, scaled(1), DEFINITIONS, "cross_entropy", USUAL),
    Fault("O42", "G, by the number of rows", 1e-13,
          sums(lambda f, s: f.sum_G * (1 + s * f.n_G)), factors, "finished"),
    Fault("O51", "attention, off by the number of keys", 1e-13, changed(by_length),
          DEFINITIONS, "attention_forward", USUAL),
    Fault("O52", "attention, off by the number of keys", 1e-13, changed(by_length),
          DEFINITIONS, "attention_forward", USUAL),
    Fault("O54", "the edited weights", 1e-12, scaled(), of_factors, "project"),
    Fault("O61", "a share of what is cut", 1e-10, changed(some_kept), of_factors, "project"),
    Fault("P4", "the eigenvalues", 1e-12, scaled(0), eigenbasis.blas, "eigh"),
]  # fmt: skip
"""Of the size of roundings: an identity sees them with its budget, and not with 100 times it."""

EXACT = [
    Fault("O30", "up's gradients everywhere, absolute", 1e-300, everywhere(1),
          DEFINITIONS, "mlp_backward"),
    Fault("O31", "queries' gradients everywhere, absolute", 1e-300, everywhere(0),
          DEFINITIONS, "attention_backward"),
    Fault("O37", "what up reads, by a bit", 2.0**-52, other_input, transformer, "linear_backward"),
    Fault("O39", "a share of the last value", 1e-15, changed(of_the_last),
          DEFINITIONS, "attention_forward"),
]  # fmt: skip
"""Equalities of bits, whose budget is 0: they see any fault."""

STATISTICAL = ["B51"]
"""By how much a trained model's loss falls: at most all of it, so 100 × 5 % would see nothing;
test_audit.py::test_a_file_with_interleaved_rows_of_q_and_k_is_noticed."""


def worst(id: str, weights: float, fault: Fault | None = None) -> Measure:
    """The measure that is nearest to its budget, or furthest beyond it."""
    one = case(3, batch=4, length=9, head_width=4)
    corpus = rc.Corpus(one.token)
    parameters = {n: W * weights if W.ndim == 2 else W for n, W in one.parameters.items()}
    with ExitStack() as stack:
        if fault is not None:
            wrong = fault.wrong(getattr(fault.where, fault.name), fault.size)
            stack.enter_context(planted(fault.where, fault.name, wrong))
        planned = bench.plan(one.config, corpus, 2**30)
        made = bench.prepare(one.config, parameters, corpus, planned, 0)
        return max(CHECKS[id](made), key=audit._excess)


@pytest.mark.parametrize(
    ("fault", "weights"),
    [
        pytest.param(fault, weights, id=f"{fault.id}: {fault.what}, weights x {weights:g}")
        for fault in SMOOTH
        for weights in fault.models
    ],
)
def test_a_budget_sees_a_fault_that_a_hundred_budgets_hide(fault: Fault, weights: float) -> None:
    assert audit._excess(worst(fault.id, weights)) < 0.5
    assert 1 < audit._excess(worst(fault.id, weights, fault)) < 100


@pytest.mark.parametrize("fault", EXACT, ids=lambda fault: f"{fault.id}: {fault.what}")
def test_what_is_exact_sees_any_fault(fault: Fault) -> None:
    assert worst(fault.id, 1.0).error == 0
    found = worst(fault.id, 1.0, fault)
    assert found.budget == 0 and found.error > 0


def test_every_identity_is_in_a_table() -> None:
    listed = [fault.id for fault in SMOOTH + EXACT] + STATISTICAL
    assert sorted(listed) == sorted(CHECKS)
