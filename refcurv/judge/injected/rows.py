"""Every row of every layer, a and g, before they are squared: for faults that need rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from refcurv.judge.diagnosis.variants import REFERENCE
from refcurv.judge.diagnosis.variants.collecting import rows_of
from refcurv.judge.diagnosis.variants.flows import Flow, flows
from refcurv.judge.diagnosis.variants.labels import choice
from refcurv.judge.diagnosis.variants.networks import Network
from refcurv.judge.diagnosis.variants.positions import positions
from refcurv.judge.injected.truth import Truth
from refcurv.law.checks import Array
from refcurv.model.config import TABLES
from refcurv.model.weights import resident


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one layer: A n_A = Σ a aᵀ, G n_G = Σ g gᵀ.

    Fields: a (n, I), of_a (n,), the sequence of each; g (m, O), of_g (m,), of every backward pass.
    """

    a: Array
    of_a: Array
    g: Array
    of_g: Array


def network(truth: Truth) -> Network:
    """The arithmetic of the truth's model."""
    assert truth.model is not None
    return Network(truth.model.config, resident(truth.model, np.float64))


def rows(truth: Truth, net: Network) -> dict[str, Rows]:
    """The rows of the truth's linear layers, as this network makes them."""
    assert truth.corpus is not None
    at = positions(truth.corpus, net.config, truth.factors.rows)
    names = [name for name in truth.factors if name not in TABLES]
    found: dict[str, dict[str, list[tuple[Array, Array]]]] = {
        name: {"a": [], "g": []} for name in names
    }
    for flow in flows(net, at, choice(REFERENCE, truth.factors), names):
        for name in names:
            a = flow.read[name]
            if name in truth.joint:
                a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
            if flow.first:
                found[name]["a"].append(_kept(flow, name, a))
            found[name]["g"].append(_kept(flow, name, flow.taps[name].g))
    return {name: Rows(*_joined(one["a"]), *_joined(one["g"])) for name, one in found.items()}


def _kept(flow: Flow, layer: str, x: Array) -> tuple[Array, Array]:
    """The kept rows of x (B, T', ·), or (passes, T', ·) of one sequence; the sequence of each."""
    keep = rows_of(layer, flow.at.keep_BT.astype(np.float64), flow, x) > 0
    keep = np.broadcast_to(keep, x.shape[:2])
    index = np.broadcast_to(flow.at.index_B[:, None], x.shape[:2])
    return x[keep], index[keep]


def _joined(parts: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    x, of = zip(*parts, strict=True)
    return np.concatenate(x), np.concatenate(of)
