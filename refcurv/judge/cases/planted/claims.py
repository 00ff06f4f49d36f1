"""What a program with a bug claims: the arrays of a case that the injected fault changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from refcurv.judge import injected
from refcurv.judge.cases.flows import against, flow
from refcurv.judge.cases.planted.bugs import Bug
from refcurv.judge.cases.truth import SHARES, Truth, dense_layer, outputs, share_name
from refcurv.judge.diagnosis.variants.labels import GOLD
from refcurv.judge.diagnosis.variants.networks import changed
from refcurv.judge.diagnosis.variants.positions import gold, positions
from refcurv.law.checks import Array
from refcurv.model.weights import resident

Claims = Mapping[str, Array]
"""Arrays of a case, by name, that a bug makes others; none where it has no subject."""


def claims(bug: Bug, made: Truth) -> Claims:
    """What the bug makes of the truth."""
    if bug.id == "B78":
        return _column_major(made)
    return _BY_NEEDS[bug.needs](made, bug.id)


def _given(made: Truth, rho: float = SHARES[0]) -> injected.Truth:
    one = made.subject
    return injected.Truth(made.factors, one.model, one.corpus, made.bases, rho=rho)


def _sums(made: Truth, id: str) -> Claims:
    given = _given(made)
    true, out = injected.honest(given), {}
    for name, one in injected.planted(given, id).items():
        for side in "AG":
            X, n = getattr(one, side), getattr(one, f"n_{side}")
            own, count = getattr(true[name], side), getattr(true[name], f"n_{side}")
            if X.shape != own.shape:
                continue  # readers know the shapes
            if n != count:
                out[f"factors.{name}.n_{side}"] = np.asarray(n, np.int64)
            if n != count or not np.array_equal(X, own):
                out[f"factors.{name}.sum_{side}"] = np.asarray(X * n)
    return out


def _basis(made: Truth, id: str) -> Claims:
    return {
        f"basis.{name}.{part}": np.array(getattr(one, part))
        for name, one in injected.planted(_given(made), id).items()
        for part in ("U_A", "mu", "U_G", "lam")
    }


def _edits(made: Truth, id: str) -> Claims:
    out: dict[str, Array] = {}
    for rho in SHARES:
        for name, one in injected.planted(_given(made, rho), id).items():
            assert one.mask is not None and one.W is not None
            at = f"edits.{share_name(rho)}.{name}"
            out |= {f"{at}.mask": one.mask.astype(np.uint8), f"{at}.weight": one.W}
    return out


def _forward(made: Truth, id: str) -> Claims:
    """Everything that another network, or other labels, make."""
    model, corpus, given = made.subject.model, made.subject.corpus, _given(made)
    choose = injected.INJECTED[id].setting
    setting = None if choose is None else choose(given)
    if setting is None:
        return {}
    if setting.labels == "joint":
        found = injected.planted(given, id)
        return {f"expected.{n}.sum_G": np.asarray(x.G) * x.n_G for n, x in found.items()}
    at = positions(corpus, model.config, made.factors.rows)
    own = resident(model, np.float64)
    net = changed(model.config, own, setting.network, setting.pads, fast=False)
    label = gold(setting.labels, "labelled", at) if setting.labels in GOLD else at.label_BT
    if not (label >= 0).any():
        return {}
    one = replace(made.seen, layout=net.layout(at), label=label)
    there = flow(net.config, net.parameters, one, against(one, label), net.ops)
    gradients = {f"gradients.{name}": there.gradient[name] for name in model.parameters}
    return dict(outputs(one, there)) | gradients


def _column_major(made: Truth) -> Claims:
    layer = dense_layer(made.subject)
    if layer is None:
        return {}
    O, I = made.subject.model.config.linear_layers()[layer]  # noqa: E741
    order = np.arange(O * I).reshape(O, I).T.ravel()
    names = [f"exact.{layer}.{kind}" for kind in ("ggn", "fisher", "hessian", "f_tok")]
    return {name: made.arrays[name][np.ix_(order, order)] for name in names}


_BY_NEEDS: Final[Mapping[str, Callable[[Truth, str], Claims]]] = {
    "sums": _sums,
    "basis": _basis,
    "edits": _edits,
    "forward": _forward,
}
