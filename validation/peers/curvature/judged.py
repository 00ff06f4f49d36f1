"""Each program's factors, judged: the rows of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import refcurv as rc
from refcurv.algebra.scaling import norm
from refcurv.curvature.exact import f_tok, fisher
from refcurv.judge.arithmetic import Arithmetic, moment_budget
from refcurv.judge.compare import one_draw
from refcurv.judge.drawn import DEVIATIONS
from refcurv.judge.verdict import Verdict
from refcurv.law.checks import SchemaError

from .subject import Found, Subject

PROGRAMS: Mapping[str, tuple[str, str]] = {
    "official": ("the official hooks, 8d059db", "torch"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "kronfluence": ("kronfluence", "kronfluence"),
    "bergson": ("bergson", "bergson"),
    "nngeometry": ("nngeometry", "nngeometry"),
    "kfac_jax": ("kfac-jax", "kfac-jax"),
}
"""Module of `programs` → what the table calls it, and the package whose version it shows."""
VARIANTS = (
    ("official", "found"),
    ("curvlinops", "found"),
    ("curvlinops", "mean"),
    ("kronfluence", "found"),
    ("bergson", "found"),
    ("nngeometry", "found"),
    ("kfac_jax", "found"),
)
"""Module of `programs`, and the function in it: one row each."""
DRAWN = ("curvlinops", "kronfluence", "bergson", "kfac_jax")
"""Programs that draw labels themselves."""
DRAWS = 50
DTYPES = ("float64", "float32")
QUANTITIES = ("A/tr A", "G/tr G", "tr A · tr G")


def judged(
    subject: Subject, name: str, variant: str, dtype: str, folder: Path
) -> tuple[Found, dict[str, Any]]:
    """What one program found in one dtype, and its row."""
    program = import_module(f".programs.{name}", __package__)
    found: Found = getattr(program, variant)(subject, dtype, folder)
    verdict = judged_as(subject, found, dtype)
    title, package = PROGRAMS[name]
    return found, {
        "program": title,
        "version": version(package),
        "dtype": dtype,
        "layers": len(verdict.matched or {}),
        "rows": found.rows,
        "recipe": found.recipe,
        **{quantity: largest(verdict, quantity) for quantity in QUANTITIES},
        "passed": verdict.passed,
        "failed": sorted({f"{f.quantity}: {f.cause}" for f in verdict.failed}),
        "Lambda": corrections(subject, found, verdict.matched or {}, dtype),
        "files": from_files(subject, found, dtype),
    }


def judged_as(subject: Subject, found: Found, dtype: str) -> Verdict:
    """The verdict on factors that are said to be made in a dtype, from the corpus's labels."""
    names = {ours: their for ours, their in subject.names.items() if their in found.layers}
    return rc.validate(
        found.layers,
        rc.collect(subject.model, subject.corpus, ",".join(names), "empirical", rows=found.rows),
        names=names,
        arithmetic=dtype,
        declared={"fisher": "empirical", "rows": found.rows},
    )


def from_files(subject: Subject, found: Found, dtype: str) -> str:
    """The verdict on the files that the program wrote, Λ included, read by `refcurv validate`.

    Empty where it wrote none, or where refcurv has no reader of them.
    """
    if found.files is None:
        return ""
    layers = ",".join(ours for ours, their in subject.names.items() if their in found.layers)
    declared = {"fisher": "empirical", "rows": found.rows, **found.declared}
    ours = rc.collect(subject.model, subject.corpus, layers, "empirical", rows=found.rows)
    try:
        verdict = rc.validate(
            found.files,
            ours,
            model=subject.model,
            corpus=subject.corpus,
            arithmetic=dtype,
            declared=declared,
        )
    except SchemaError:
        return ""
    failed = [f"{f.layer} {f.quantity}: {f.verdict}" for f in verdict.failed]
    return "; ".join(failed[:3]) or "equal"


def largest(verdict: Verdict, quantity: str) -> dict[str, float]:
    """The comparison of one quantity that comes nearest to its budget, or goes farthest beyond."""
    own = [f for f in verdict.findings if f.quantity == quantity and f.error is not None]
    worst = max(own, key=lambda f: f.error / f.budget)
    return {"error": worst.error, "budget": worst.budget}


def corrections(
    subject: Subject, found: Found, layers: Mapping[str, str], dtype: str
) -> dict[str, Any] | None:
    """EK-FAC's Λ beside diag Uᵀ F U by the dense definition, in *their* basis."""
    if not found.Lambda:
        return None
    worst, limit = 0.0, 0.0
    for ours, their in layers.items():
        U_A, U_G, Lambda = (np.asarray(x, np.float64) for x in found.Lambda[their])
        dense = fisher if found.per == "segment" else f_tok
        n = found.layers[their][2]
        F = dense(subject.model, subject.corpus, wrt=f"{ours}.weight", fisher="empirical") / n
        U = np.kron(U_G, U_A)
        true = np.einsum("pi,pq,qi->i", U, F, U, optimize=True).reshape(Lambda.shape)
        error = float(np.linalg.norm(Lambda - true) / np.linalg.norm(true))
        budget = moment_budget(Arithmetic().filled(dtype), n)
        worst, limit = max(worst, error), budget
    return {"per": found.per, "error": worst, "budget": limit}


def drawn(subject: Subject, name: str, folder: Path) -> list[dict[str, Any]]:
    """Labels that the program draws itself: the mean of DRAWS of its G beside the expectation.

    The distance is in standard deviations of such a mean, by refcurv's own draws. Its square is 1
    on average, and 16 with odds of 1/16 at most (Markov).
    """
    out = []
    torch.manual_seed(0)
    program = import_module(f".programs.{name}", __package__)
    for mode, theirs in program.drawn(subject, DRAWS, folder).items():
        layers = ",".join(ours for ours, their in subject.names.items() if their in theirs)
        rows = "reached" if name == "bergson" else "all"
        kind = "signed" if mode.endswith("prop") else "sampled"
        truth = rc.collect(subject.model, subject.corpus, layers, "expected", rows=rows)
        own = rc.collect(subject.model, subject.corpus, layers, kind, rows=rows, draws=DRAWS)
        far = {}
        for ours in truth:
            single = one_draw(own[ours], DRAWS)
            assert single is not None
            one = single[0] * norm(own[ours].G) / math.sqrt(DRAWS)
            far[ours] = float(norm(theirs[subject.names[ours]] - truth[ours].G) / one)
        out.append(
            {
                "program": PROGRAMS[name][0],
                "mode": mode,
                "draws": DRAWS,
                "layers": len(far),
                "largest": max(far.values()),
                "mean": sum(far.values()) / len(far),
                "passed": max(far.values()) <= DEVIATIONS,
            }
        )
    return out
