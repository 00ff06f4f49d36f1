"""The edits that are compared, each as a function of one strength: the share that it removes.

K-FAC, its one-sided and corrected variants     1 − rho, of the curvature mass
random basis                                    1 − rho, with K-FAC's mask in a random basis
random pairs                                    of the pairs of K-FAC's basis, at random
SVD                                             1 − energy, of Σ σ²
BSN                                             of the weights, lowest scores first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import refcurv as rc
from refcurv.editing.bsn import Scores
from refcurv.model.patterns import expand
from validation.paper.marginals import corrected

Edit = Callable[[float], tuple[rc.Model, rc.EditRecord]]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to cut: strength → (model, record), and the strengths of its curve, rising.

    `weakest` is where a search for a weak cut begins: a control may spoil everything before that.
    """

    cut: Edit
    grid: tuple[float, ...]
    weakest: float

    @property
    def strongest(self) -> float:
        """Where a search ends."""
        return self.grid[-1]


MASS = (0.02, 0.05, 0.08, 0.11, 0.16, 0.25, 0.4)
ENERGY = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
IN_RANDOM_BASIS = (1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.05, 0.1)
PAIRS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def methods(
    model: rc.Model,
    bases: rc.Bases,
    corpus: rc.Corpus,
    layers: str,
    scores: Scores,
    seed: int,
) -> Mapping[str, Method]:
    """Every method on the same layers of one model; `corpus` is what the factors came from."""
    chosen = replace(bases, layers={name: bases[name] for name in expand(layers, list(bases))})

    def kfac(basis: rc.Bases) -> Edit:
        return lambda removed: rc.edit(model, basis, {layers: 1 - removed})

    return {
        "kfac": Method(kfac(chosen), MASS, 0.002),
        "svd": Method(lambda x: rc.truncate(model, {layers: 1 - x}), ENERGY, 1e-6),
        "bsn": Method(lambda x: rc.prune(model, scores, x), WEIGHTS, 1e-4),
        "random pairs": Method(lambda x: rc.random_pairs(model, chosen, 1 - x, seed), PAIRS, 1e-4),
        "random basis": Method(kfac(rc.random_basis(chosen, seed)), IN_RANDOM_BASIS, 1e-9),
        "inputs only": Method(kfac(rc.one_sided(chosen, "inputs")), MASS, 0.002),
        "outputs only": Method(kfac(rc.one_sided(chosen, "outputs")), MASS, 0.002),
        "corrected marginals": Method(kfac(corrected(model, corpus, chosen)), MASS, 0.002),
    }
