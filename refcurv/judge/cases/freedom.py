"""What a right program may do otherwise: signs, a rotation within a cluster, the order of ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from refcurv.judge.cases.case import ACCEPTABLE, Case, layers_of
from refcurv.judge.cases.planted import needed
from refcurv.judge.cases.truth import SHARES, share_name
from refcurv.law import tolerance
from refcurv.law.checks import Array


def acceptable(valid: Case, seed: int = 0) -> Iterator[Case]:
    """The cases of freedom that a valid case has room for.

    Proof: tests/test_cases.py::test_freedom_is_accepted_and_is_no_copy
    """
    rng = np.random.default_rng(seed)
    for name, what, needs, changed in (
        ("signs", "eigenvectors with other signs (ORDER)", "basis", _signs(valid, rng)),
        (
            "cluster",
            "another basis for equal eigenvalues",
            "basis",
            _turned(valid, rng),
        ),
        ("ties", "pairs of equal keys in another order (SELECT)", "edits", _ties(valid)),
    ):
        if changed:
            yield replace(
                valid, id=f"{needs}_{name}-{valid.id}", area=needs, result=ACCEPTABLE,
                arrays=needed(valid, changed, needs), reason=what, fault=None, type="TIE",
                of=valid.id, needs=(needs,), left_out=(), diagnostics={},
            )  # fmt: skip


def _few(valid: Case) -> list[str]:
    return layers_of(valid.arrays, "basis.", ".lam")


def _signs(valid: Case, rng: np.random.Generator) -> dict[str, Array]:
    out = {}
    for layer in _few(valid)[:2]:
        for side in "AG":
            U = valid.arrays[f"basis.{layer}.U_{side}"]
            sign = rng.choice([-1.0, 1.0], U.shape[1])
            sign[0] = -1
            out[f"basis.{layer}.U_{side}"] = U * sign
    return out


def _turned(valid: Case, rng: np.random.Generator) -> dict[str, Array]:
    """A random rotation within every cluster, of the first two layers that have one."""
    out: dict[str, Array] = {}
    layers: set[str] = set()
    for layer in _few(valid):
        for side, key in (("A", "mu"), ("G", "lam")):
            values = valid.arrays[f"basis.{layer}.{key}"]
            U = valid.arrays[f"basis.{layer}.U_{side}"].copy()
            for first, last in clusters(values):
                turn, _ = np.linalg.qr(rng.normal(size=(last - first, last - first)))
                U[:, first:last] = U[:, first:last] @ turn
                if len(layers) < 2 or layer in layers:
                    out[f"basis.{layer}.U_{side}"] = U
                    layers.add(layer)
    return out


def clusters(values: Array) -> list[tuple[int, int]]:
    """[first, last) of eigenvalues that two right solvers do not tell apart (ACCEPTABLE)."""
    near = tolerance.eigenvalues(len(values)) * float(np.linalg.norm(values))
    edges = [0, *(np.flatnonzero(-np.diff(values) > near / len(values)) + 1), len(values)]
    return [(a, b) for a, b in pairwise(edges) if b - a > 1]


def _ties(valid: Case) -> dict[str, Array]:
    """Swap the last kept pair of a mask and a dropped one of the same key; W' with it."""
    out: dict[str, Array] = {}
    for layer in _few(valid):
        lam, mu, U_A, U_G = (
            valid.arrays[f"basis.{layer}.{x}"] for x in ("lam", "mu", "U_A", "U_G")
        )
        key = np.outer(lam, mu)
        for rho in SHARES:
            at = f"edits.{share_name(rho)}.{layer}"
            if f"{at}.mask" not in valid.arrays:
                continue
            mask = valid.arrays[f"{at}.mask"] != 0
            least = key[mask].min()
            other = np.argwhere(~mask & (key == least))
            if least > 0 and len(other):
                kept = np.argwhere(mask & (key == least))
                mask[tuple(kept[-1])], mask[tuple(other[-1])] = False, True
                W = valid.arrays[f"weights.parameters.{layer}.weight"]
                out[f"{at}.mask"] = mask.astype(np.uint8)
                out[f"{at}.weight"] = U_G @ ((U_G.T @ W @ U_A) * mask) @ U_A.T
    return out
