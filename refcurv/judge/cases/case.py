"""A case: arrays by name, and what its manifest says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from refcurv.files import store
from refcurv.files.disk import write_json
from refcurv.law.checks import Array
from refcurv.law.conventions import describe

SCHEMA = "refcurv-cases-1"

VALID, INVALID, ACCEPTABLE = "valid", "invalid", "acceptable"


@dataclass(frozen=True, slots=True)
class Check:
    """Two routes to one quantity.

    Fields: quantity; routes, what they are; error, |one − other| over `size`, the size of the terms
    in Frobenius norm; budget, of it; kind: "derived", or "exact" where no rounding may happen. A
    size of None: the error is of an identity, and bounds no entry.
    """

    quantity: str
    routes: tuple[str, str]
    error: float
    budget: float
    size: float | None = None
    kind: str = "derived"

    @property
    def passed(self) -> bool:
        """Is the error within budget? NaN is not."""
        return self.error <= self.budget


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Fields:
        id, area, result: VALID, INVALID or ACCEPTABLE.
        arrays: dotted name → array. config: the model's as JSON, where there is one.
        reason: what is planted, or what is free. fault: its id, "B27". of: the valid case that has
            the rest. needs: what a program must compute to judge it (`harness.NEEDS`).
        method: the choices. checks: of a valid case. left_out: what was too large.
    """

    id: str
    area: str
    result: str
    arrays: Mapping[str, Array]
    config: Mapping[str, Any] | None = None
    reason: str = ""
    fault: str | None = None
    type: str = ""
    of: str | None = None
    needs: tuple[str, ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    left_out: tuple[str, ...] = ()
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def budget_of(self, name: str) -> float | None:
        """|x' − x| of an array that another float64 program may have; None if nothing says."""
        known = [one for one in self.checks if one.quantity == name and one.size is not None]
        return max((one.budget * one.size for one in known), default=None)  # type: ignore[operator]

    def holding(self, changed: Mapping[str, Array]) -> Case:
        """The same case with some arrays replaced."""
        return replace(self, arrays={**self.arrays, **changed})

    @property
    def layers(self) -> list[str]:
        """The layers whose factors it holds."""
        return layers_of(self.arrays, "factors.", ".sum_A")


def layers_of(arrays: Mapping[str, Array], first: str, last: str) -> list[str]:
    """Every layer with an array FIRST layer LAST, in file order."""
    return [
        name[len(first) : -len(last)]
        for name in arrays
        if name.startswith(first) and name.endswith(last)
    ]


def write_case(case: Case, folder: Path, budgets: Mapping[str, Any]) -> dict[str, Any]:
    """ID.h5 and ID.json; returns the manifest."""
    path = folder / f"{case.id}.h5"
    about = {"case": case.id, "result": case.result}
    config = {"config": json.dumps(case.config)} if case.config is not None else {}
    store.write(
        path,
        format="refcurv-case",
        attributes={**about, **config},
        arrays=(
            store.Entry(name, array, _budget(case, name)) for name, array in case.arrays.items()
        ),
        provenance={"refcurv": build()["refcurv"], "law": law_digest()},
    )
    made = manifest(case, path, budgets)
    write_json(made, folder / f"{case.id}.json")
    return made


def _budget(case: Case, name: str) -> dict[str, float]:
    budget = case.budget_of(name)
    return {} if budget is None else {"budget": budget}


@cache
def build() -> dict[str, Any]:
    """What decides the bits; the same in one process, and asked for by every file."""
    return store.machine()


@cache
def law_digest() -> str:
    """SHA-256 of the law, whose sentences README has: a case is small, and the law is not."""
    return hashlib.sha256(json.dumps(describe(), sort_keys=True).encode()).hexdigest()


def manifest(case: Case, path: Path, budgets: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON beside a case's arrays says."""
    return {
        "caseId": case.id,
        "schema": SCHEMA,
        "area": case.area,
        "result": case.result,
        "flags": [case.fault] if case.fault else [],
        "faultType": case.type or None,
        "reason": case.reason,
        "of": case.of,
        "needs": list(case.needs),
        "file": {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": store.file_sha256(path),
        },
        "source": {"name": "refcurv", "version": build()["refcurv"]},
        "method": dict(case.method),
        "layers": {
            name: [len(case.arrays[f"factors.{name}.sum_{side}"]) for side in "GA"]
            for name in case.layers
        },
        "budgets": dict(budgets),
        "checks": summary(case.checks) if case.result == VALID else [],
        "left_out": list(case.left_out),
        "diagnostics": dict(case.diagnostics),
        "certificate": None,
        "law": law_digest(),
        "versions": build(),
    }  # fmt: skip


def summary(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks by kind of quantity and routes: how many arrays, and the worst of them."""
    groups: dict[tuple[str, tuple[str, str]], list[Check]] = {}
    for one in checks:
        groups.setdefault((kind_of(one.quantity), one.routes), []).append(one)
    out = []
    for (quantity, routes), members in groups.items():
        worst = max(members, key=lambda one: one.error / one.budget if one.budget else one.error)
        out.append(
            {
                "quantity": quantity, "arrays": len(members), "routes": list(routes),
                "worst": worst.quantity, "error": worst.error, "budget": worst.budget,
                "kind": worst.kind,
            }
        )  # fmt: skip
    return out


def kind_of(quantity: str) -> str:
    """What an array is, whatever its layer: of rows.blocks.0.mlp.up.a it is rows.*.a."""
    first, _, rest = quantity.partition(".")
    if first == "gradients":
        return "gradients.*"
    return f"{first}.*.{rest.rpartition('.')[2]}" if rest else first
