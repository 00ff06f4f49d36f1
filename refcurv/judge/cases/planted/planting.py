"""A bug in the truth: the case that a harness must reject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refcurv.judge.cases.case import INVALID, Case
from refcurv.judge.cases.harness import judge
from refcurv.judge.cases.planted.bugs import Bug
from refcurv.judge.cases.planted.claims import Claims, claims
from refcurv.judge.cases.truth import Truth
from refcurv.law.checks import Array

GROUPS = {"sums": ("rows", "factors"), "basis": ("factors", "basis"),
          "edits": ("basis", "edits", "weights"), "forward": ("weights", "corpus")}  # fmt: skip
"""What a case of a bug holds beside what the bug changed, so that it can be judged by itself."""


def invalid(bug: Bug, made: Truth, valid: Case) -> Case | None:
    """The case of a bug, or None where no harness can see it in this model and corpus."""
    with np.errstate(all="ignore"):
        planted = {n: x for n, x in claims(bug, made).items() if n in valid.arrays}
    about = dict(
        id=f"{bug.needs}_{bug.id}-{valid.id}", area=bug.needs, result=INVALID, reason=bug.what,
        fault=bug.id.partition("-")[0], type=bug.type, of=valid.id, needs=(bug.needs,),
        left_out=(), diagnostics={},
    )  # fmt: skip

    def case_of(part: Claims) -> Case:
        return replace(valid, arrays=needed(valid, part, bug.needs), **about)  # type: ignore[arg-type]

    def seen(part: Claims) -> bool:
        return rejected(case_of(part))

    few = planted if bug.needs == "forward" else _few_layers(valid.layers, planted, seen)
    return case_of(few) if few and seen(few) else None


def rejected(case: Case) -> bool:
    """Is something further off than ten budgets? Less is no test of a harness."""
    return any(not one.error <= 10 * one.budget for one in judge(case))


MOST_LAYERS = 2
"""Layers of a case that is rejected: two, so that the file is small."""


def _few_layers(layers: list[str], changed: Claims, seen: Callable[[Claims], bool]) -> Claims:
    """The first layers in which the bug is seen."""
    out: dict[str, Array] = {}
    count = 0
    for layer in layers:
        part = {name: x for name, x in changed.items() if f".{layer}." in name}
        if count < MOST_LAYERS and part and seen(part):
            out |= part
            count += 1
    return out


def needed(valid: Case, changed: Claims, needs: str) -> dict[str, Array]:
    """The changed arrays among those true ones that a harness must have to judge them."""
    layers = set(valid.layers)
    touched = {layer for layer in layers if any(f".{layer}." in name for name in changed)}

    def wanted(name: str) -> bool:
        first = name.partition(".")[0]
        if name in changed:
            return True
        if first not in GROUPS[needs]:
            return False
        if needs == "forward":
            return True
        of = [layer for layer in layers if f".{layer}." in name]
        return of[0] in touched if of else name.endswith("embed.weight") and "head" in touched

    return {name: changed.get(name, x) for name, x in valid.arrays.items() if wanted(name)}
