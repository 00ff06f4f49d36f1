"""What a fault is put into, and the dump of a program that has none."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

import numpy as np

from refcurv.algebra.selection import select
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import ekfac
from refcurv.curvature.factors import Factors
from refcurv.editing.projection import projected
from refcurv.judge.arithmetic import Arithmetic
from refcurv.judge.case import Case
from refcurv.judge.dump import Dump, Theirs
from refcurv.law.checks import Array
from refcurv.law.conventions import Bias
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model

Layers = dict[str, Theirs]
"""What a dump holds, by our names of the layers."""

NEEDS = ("factors", "corpus", "basis", "Lambda", "edit")
"""What a fault is put into, and what it takes: A and G alone; A and G, made anew from model and
corpus; eigenvectors and eigenvalues; EK-FAC's Λ; a mask and an edited weight."""


@dataclass(frozen=True, slots=True)
class Truth:
    """A truth, and what it is made of.

    Fields: factors; model, corpus: what they were collected from; bases: of the factors; joint:
    layers whose dump has the bias as last column of A (BIAS); rho: of masks and edits.
    """

    factors: Factors
    model: Model | None = None
    corpus: Corpus | None = None
    bases: Bases | None = None
    joint: Set[str] = frozenset()
    rho: float = 0.8

    @property
    def case(self) -> Case:
        """What `variants` recomputes from."""
        none = Dump("memory", {}, {})
        return Case(none, self.factors, {}, Arithmetic(), self.model, self.corpus, joint=self.joint)

    @property
    def terms(self) -> int:
        """m, the terms of the loss; without a corpus as many as rows."""
        if self.corpus is None:
            return max(one.n_A for one in self.factors.values())
        return int((self.corpus.label >= 0).sum())

    def has(self, needs: str) -> bool:
        """Is there what such a fault takes?"""
        recomputes = self.model is not None and self.corpus is not None
        return {
            "factors": True,
            "corpus": recomputes,
            "basis": self.bases is not None,
            "Lambda": self.bases is not None and recomputes,
            "edit": self.bases is not None and self.model is not None,
        }[needs]


def honest(truth: Truth, needs: str = "factors") -> Layers:
    """What a program without a fault dumps: A, G and counts; or what NEEDS says beside them."""
    factors = truth.factors
    if needs == "edit":
        return {name: _edited(truth, name, one) for name, one in _bases(truth).items()}
    out = {
        name: Theirs(
            A=one.A_joint if name in truth.joint else one.A, n_A=one.n_A, G=one.G, n_G=one.n_G
        )
        for name, one in factors.items()
    }
    if needs in ("basis", "Lambda"):
        for name, one in _bases(truth).items():
            out[name] = replace(out[name], U_A=one.U_A, mu=one.mu, U_G=one.U_G, lam=one.lam)
    if needs == "Lambda":
        for name, L in lambdas(truth, "sequence").items():
            out[name] = replace(out[name], Lambda=L)
    return out


def both(one: Theirs) -> tuple[Array, float, Array, float]:
    """A, n_A, G, n_G of a dump that holds them."""
    assert one.A is not None and one.n_A is not None
    assert one.G is not None and one.n_G is not None
    return one.A, one.n_A, one.G, one.n_G


def _bases(truth: Truth) -> Bases:
    assert truth.bases is not None
    return truth.bases


def lambdas(
    truth: Truth, per: str, corpus: Corpus | None = None, over: str = "rows"
) -> dict[str, Array]:
    """Λ of each layer in the truth's basis; of another corpus where one is given.

    Args: over, what it is divided by: "rows" or "segments".
    """
    assert truth.model is not None and truth.corpus is not None
    one = truth.factors
    bias = Bias.JOINT if truth.joint else Bias.SEPARATE
    found = ekfac(
        truth.model,
        corpus or truth.corpus,
        replace(_bases(truth), bias=bias),
        str(one.fisher),
        one.seed,
        one.draws,
        per=per,
        rows=str(one.rows),
    )
    return {name: one.Lambda / getattr(one, over) for name, one in found.items()}


def weight(truth: Truth, layer: str) -> Array:
    """W before the edit; [W b] of a joint layer."""
    assert truth.model is not None
    model = truth.model
    W = np.asarray(model.parameters[model.config.weight_of(layer)], np.float64)
    if layer not in truth.joint:
        return W
    return np.column_stack([W, np.asarray(model.parameters[f"{layer}.bias"], np.float64)])


def _edited(truth: Truth, layer: str, one: Eigenbasis) -> Theirs:
    W = weight(truth, layer)
    return Theirs(mask=select(one.lam, one.mu, truth.rho), W=projected(W, one, truth.rho))
