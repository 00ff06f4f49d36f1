"""The ways to cut that are compared, each as a function of the share that it removes.

kfac            1 − rho, of the curvature mass
svd             1 − energy, of Σ σ²
random-basis    1 − rho, with K-FAC's mask in a random basis
random-pairs    of the pairs of K-FAC's basis, at random
inputs, outputs 1 − rho, in K-FAC's basis, selected by the curvature of one side alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Final

from refcurv.curvature.bases import Bases
from refcurv.editing.kfac import edit
from refcurv.editing.record import EditRecord
from refcurv.editing.svd import truncate
from refcurv.editing.variants import CONTROLS, control, one_sided, random_basis, random_pairs
from refcurv.law.checks import require_choice
from refcurv.model.weights import Model

METHODS: Final = ("kfac", "svd", *CONTROLS)
"""The names of the methods."""

WEAKEST: Final[Mapping[str, float]] = MappingProxyType(
    {"kfac": 0.002, "svd": 1e-6, "random-basis": 1e-9, "random-pairs": 1e-4,
     "inputs": 1e-6, "outputs": 1e-6}
)  # fmt: skip
"""Chosen: the share removed from which a method is searched. A control spoils everything early."""

STRONGEST: Final = 0.9
"""Chosen: up to which share."""

Edited = tuple[Model, EditRecord]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to cut: (model, share removed) → the edited model and its record.

    Fields: name, one of METHODS; cut; same, the edit of the same rho: random-pairs keep as many
    pairs as K-FAC, the others keep the share rho of what they measure; weakest, the least share
    removed that a search tries.
    """

    name: str
    cut: Callable[[Model, float], Edited]
    same: Callable[[Model], Edited]
    weakest: float


def pairs_kept(record: EditRecord) -> int:
    """How many pairs, or directions, an edit keeps of all its layers together."""
    return sum(one.kept for one in record.layers)


def methods(
    names: Iterable[str], basis: Bases, rho: Mapping[str, float], seed: int, who: str = "sweep"
) -> dict[str, Method]:
    """Some methods on the layers of a K-FAC edit, as {layer: rho} says it.

    K-FAC where layers keep different shares: `removed` is that of the layer that loses most, and
    the others lose in proportion.

    Proof: tests/test_sweep.py::test_every_method_removes_what_it_says,
        tests/test_demo.py::test_controls_are_matched_on_dev
    """
    chosen = {name: basis[name] for name in rho}
    own = replace(basis, layers=MappingProxyType(chosen))
    most = max(1 - share for share in rho.values())

    def kfac(model: Model, removed: float) -> Edited:
        lost = {layer: removed * (1 - share) / most for layer, share in rho.items()}
        return edit(model, own, {layer: max(0.0, 1 - x) for layer, x in lost.items()})

    def made(name: str) -> Method:
        require_choice(who, "method", name, METHODS)
        if name == "kfac":
            return Method(name, kfac, lambda model: edit(model, own, rho), WEAKEST[name])
        if name == "svd":
            return Method(
                name,
                lambda model, removed: truncate(model, dict.fromkeys(rho, 1 - removed)),
                lambda model: truncate(model, rho),
                WEAKEST[name],
            )
        if name == "random-pairs":
            return Method(
                name,
                lambda model, removed: random_pairs(model, own, 1 - removed, seed),
                lambda model: control(model, own, rho, name, seed),
                WEAKEST[name],
            )
        other = cache(lambda: random_basis(own, seed) if name == "random-basis"
                      else one_sided(own, name))  # fmt: skip
        return Method(
            name,
            lambda model, removed: edit(model, other(), 1 - removed),
            lambda model: edit(model, other(), rho),
            WEAKEST[name],
        )

    return {name: made(name) for name in names}
