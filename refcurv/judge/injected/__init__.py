"""The faults of METHOD, Bugs, put into a truth: what a dump of a program that has them holds.

    inject(truth, "B28")        one fault
    inject(truth, "B1", "B45")  two at once

`diagnosis` is tested on them, and `cases` makes them into files for other programs' tests.

    truth       what a fault is put into               injection   one fault: a setting or a change
    settings    labels, rows, tensors, arithmetic      sums        scale, counts, layout, layer
    sequences   weights of sequences and batches       roundings   arithmetic that rounds
    spectra     bases, Λ, masks and edits              rows        a and g before they are squared
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.judge.dump import Dump, Theirs
from refcurv.judge.injected.injection import Injection, remade
from refcurv.judge.injected.roundings import ROUNDINGS
from refcurv.judge.injected.sequences import SEQUENCES
from refcurv.judge.injected.settings import LABELS, NETWORK, ROWS
from refcurv.judge.injected.spectra import SPECTRA
from refcurv.judge.injected.sums import SUMS
from refcurv.judge.injected.truth import NEEDS, Layers, Truth, honest
from refcurv.law.conventions import Fisher

__all__ = ["INJECTED", "NOT_INJECTED", "Injection", "Truth", "honest", "inject", "planted"]

INJECTED: Final[Mapping[str, Injection]] = MappingProxyType(
    {one.id: one for one in (*SUMS, *SEQUENCES, *LABELS, *ROWS, *NETWORK, *ROUNDINGS, *SPECTRA)}
)
"""Every form of every fault that can be put into a truth, by its id."""

NOT_INJECTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "B8": "(c A, G/c) is the same K: no fault",
        "B13": "only inverses that are damped differ, and no dump holds them",
        "B67": "A and G of a truth have no negative eigenvalues",
        "B70": "pairs of one key may be kept or not: each dump is as right",
        "B71": "a crash leaves no dump",
        "B72": "an older W' is the right one of other factors",
        "B79": "a metric is in no dump",
        "B80": "a metric is in no dump",
        "B81": "documentation is in no dump",
    }
)
"""The other faults, each with the reason."""


def planted(truth: Truth, *ids: str) -> Layers:
    """What a dump with these faults holds; {} where one of them cannot occur in this truth.

    A and G are made anew first, by the settings of all of them; the changes follow in this order.
    """
    some = [INJECTED[id] for id in ids]
    needs = max((one.needs for one in some), key=NEEDS.index)
    if not all(truth.has(one.needs) for one in some):
        return {}
    if truth.factors.fisher is Fisher.EMPIRICAL and any(one.drawn for one in some):
        return {}
    layers: Layers = remade(
        truth, [one for one in some if one.setting is not None], honest(truth, needs)
    )
    with np.errstate(all="ignore"):
        for one in some:
            if one.change is not None and layers:
                layers = one.change(truth, layers)
    return layers


def inject(truth: Truth, *ids: str) -> Dump | None:
    """The dump of a program with these faults; None where one of them cannot occur in this truth.

    Args:
        truth: as exact as float64 is.
        ids: of INJECTED. Weights of sequences and roundings make A and G anew from the rows, and so
            undo what comes before them: put them first, and no two of them together.

    Proof: tests/test_injected.py::test_an_injected_fault_has_its_name
    """
    layers = planted(truth, *ids)
    if not layers:
        return None
    declared: dict[str, str] = {}
    for one in (INJECTED[id] for id in ids):
        own = {"Lambda": {"Lambda": "sequence"}, "edit": {"rho": str(truth.rho)}}
        declared = {**declared, **own.get(one.needs, {}), **one.declared}
    holds = {
        name: frozenset(f.name for f in fields(Theirs) if getattr(one, f.name) is not None)
        for name, one in layers.items()
    }
    return Dump(program="memory", layers=layers, holds=holds, declared=declared)
