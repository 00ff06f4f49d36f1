"""What a program that reads cases must do: accept the valid and acceptable ones, reject the rest.

It believes nothing but the case's own arrays, and looks at what these hold:

    sums      S = Σ x xᵀ over the stored rows, and the counts
    basis     M = U diag(values) Uᵀ, UᵀU = I, values descending
    edits     the mask is a share of the mass (SELECT), W' = U_G (C ∘ M) U_Aᵀ
    forward   everything that a forward and a backward make, made anew from weights and corpus
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature import definition, exact
from refcurv.files.weights import config_from_json
from refcurv.judge.cases.case import Case, layers_of
from refcurv.judge.cases.flows import against, flow, seen
from refcurv.judge.cases.routes import apart, basis_budget, edit_budget, plain_nats, sum_budget
from refcurv.judge.cases.truth import SHARES, blank, share_name
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model

NEEDS = ("sums", "basis", "edits", "forward")
"""What a program must compute to judge a case."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One comparison. Fields: what; error; budget."""

    what: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.error <= self.budget


def judge(case: Case) -> list[Judged]:
    """Every comparison that the arrays of a case allow.

    Proof: tests/test_cases.py::test_the_harness_accepts_and_rejects
    """
    out = [*_sums(case), *_basis(case), *_edits(case)]
    return [*out, *_forward(case)] if "forward" in case.needs else out


def accepted(case: Case) -> bool:
    """Does everything hold? A case of which nothing can be judged is not accepted."""
    found = judge(case)
    return bool(found) and all(one.passed for one in found)


def budgets(case: Case) -> dict[str, float]:
    """What the manifest allows a reader: the largest of the layers'.

    sums: |S' − S| over tr S. basis: |U diag Uᵀ − M| over |M|, |UᵀU − I| over √n. edits: |W' − W''|
    over |W|. mass: of a mask, over the whole mass; and of a key, over the largest.
    """
    arrays, out = case.arrays, dict.fromkeys(("sums", "basis", "edits", "mass"), 0.0)
    for layer in layers_of(arrays, "rows.", ".kept"):
        n = int((arrays[f"rows.{layer}.kept"] != 0).sum())
        out["sums"] = max(out["sums"], sum_budget(n))
    for layer in layers_of(arrays, "basis.", ".lam"):
        O, I = (len(arrays[f"basis.{layer}.{x}"]) for x in ("lam", "mu"))  # noqa: E741
        out["basis"] = max(out["basis"], basis_budget(max(O, I)))
        out["edits"] = max(out["edits"], edit_budget(O, I))
        out["mass"] = max(out["mass"], tolerance.gamma(O * I + O + I, np.float64))
    return out


def _sums(case: Case) -> Iterator[Judged]:
    arrays, budget = case.arrays, budgets(case)["sums"]
    for layer in layers_of(arrays, "rows.", ".kept"):
        keep = arrays[f"rows.{layer}.kept"] != 0
        for group, part, name in (
            ("factors", "a", "sum_A"),
            ("factors", "g_sampled", "sum_G"),
            ("empirical", "g", "sum_G"),
        ):
            S = arrays.get(f"{group}.{layer}.{name}")
            if S is None:
                continue
            x = arrays[f"rows.{layer}.{part}"][keep]
            want = x.T @ x
            yield Judged(f"{group}.{layer}.{name}", apart(S, want, _trace(want)), budget)
        for side in "AG":
            n = arrays.get(f"factors.{layer}.n_{side}")
            if n is not None:
                yield Judged(f"factors.{layer}.n_{side}", abs(float(n) - keep.sum()), 0.0)


def _trace(M: Array) -> float:
    return max(float(np.trace(M)), float(np.finfo(float).tiny))


def _basis(case: Case) -> Iterator[Judged]:
    arrays, budget = case.arrays, budgets(case)["basis"]
    for layer in layers_of(arrays, "basis.", ".lam"):
        for side, values in (("A", "mu"), ("G", "lam")):
            U, value = arrays[f"basis.{layer}.U_{side}"], arrays[f"basis.{layer}.{values}"]
            n, what = len(value), f"basis.{layer}.U_{side}"
            S = arrays.get(f"factors.{layer}.sum_{side}")
            if S is not None and S.any():
                M = S / float(arrays[f"factors.{layer}.n_{side}"])
                size = float(norm(M))
                yield Judged(f"{what} recomposes", apart((U * value) @ U.T, M, size), budget)
            square = apart(U.T @ U, np.eye(n), math.sqrt(n))
            yield Judged(f"{what} is orthogonal", square, budget)
            rise = float(max(0.0, np.diff(value).max(initial=0.0), -value.min()))
            yield Judged(f"basis.{layer}.{values} descends", rise, 0.0)


def _edits(case: Case) -> Iterator[Judged]:
    arrays, budget = case.arrays, budgets(case)
    for layer in layers_of(arrays, "basis.", ".lam"):
        lam, mu, U_A, U_G = (arrays[f"basis.{layer}.{x}"] for x in ("lam", "mu", "U_A", "U_G"))
        for rho in SHARES:
            at = f"edits.{share_name(rho)}.{layer}"
            if f"{at}.mask" not in arrays:
                continue
            mask = arrays[f"{at}.mask"] != 0
            for what, error in _of_mask(mask, lam, mu, rho):
                yield Judged(f"{at}.mask {what}", error, budget["mass"])
            W = arrays.get(f"weights.parameters.{layer}.weight")
            W = arrays["weights.parameters.embed.weight"] if W is None else W  # a tied head
            C = U_G.T @ W @ U_A
            want = U_G @ (C * mask) @ U_A.T
            error = apart(arrays[f"{at}.weight"], want, float(norm(W)))
            yield Judged(f"{at}.weight", error, budget["edits"])


def _of_mask(mask: Array, lam: Array, mu: Array, rho: float) -> Iterator[tuple[str, float]]:
    """SELECT without an order of equal keys: the largest keys, enough of them, and not one more."""
    key = np.outer(lam / lam[0], mu / mu[0])
    kept, dropped, total = key[mask], key[~mask], float(key.sum())
    least = float(kept.min(initial=math.inf))
    yield "keeps the largest", max(0.0, float(dropped.max(initial=0.0)) - least)
    mass = float(kept.sum())
    yield "reaches its share", max(0.0, rho * total - mass) / total
    yield "keeps no more", max(0.0, (mass - least if len(kept) else 0.0) - rho * total) / total


# ------------------------------------------------------------------ with a forward


def subject_of(case: Case) -> tuple[Model, Corpus]:
    """The model and the corpus that a case holds."""
    arrays = case.arrays
    first = "weights.parameters."
    parameters = {n.removeprefix(first): x for n, x in arrays.items() if n.startswith(first)}
    fields = ("tokens", "labels", "mask", "segments", "images")
    given = {name: arrays[f"corpus.{name}"] for name in fields if f"corpus.{name}" in arrays}
    return Model(config_from_json(case.config), parameters), Corpus(**given)  # type: ignore[arg-type]


def _forward(case: Case) -> Iterator[Judged]:
    model, corpus = subject_of(case)
    one = seen(model.config, corpus)
    made = flow(model.config, model.parameters, one, against(one, one.label))
    nats = plain_nats(one, made.logits)
    want = {"logits": blank(made.logits, one.real), "nats": nats, "loss": np.asarray(nats.sum())}
    want |= {f"gradients.{name}": d for name, d in made.gradient.items()}
    for name in case.arrays:
        if name.startswith("exact."):
            _, *layer, kind = name.split(".")
            given = (model, corpus)
            want[name] = getattr(exact, kind)(*given, wrt=f"{'.'.join(layer)}.weight")
    layers = layers_of(case.arrays, "expected.", ".sum_G")
    sums = definition.factors(model, corpus, layers, "expected") if layers else {}
    want |= {f"expected.{layer}.sum_G": one.S_G for layer, one in sums.items()}
    for name, array in want.items():
        if name in case.arrays:
            error = float(norm(np.asarray(case.arrays[name] - array)))
            yield Judged(name, error, case.budget_of(name) or 0.0)
