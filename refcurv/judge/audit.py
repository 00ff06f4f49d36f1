"""Every identity that can be checked on a user's own model: id, measured error, budget, verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.curvature.room import available
from refcurv.judge.bench import Bench, Plan, plan, prepare
from refcurv.judge.identities import CHECKS, Measure
from refcurv.judge.proofs import ProofPlan, Proofs, plan_proofs, prove
from refcurv.law.checks import ConventionError, RefcurvError, require_range, require_seed
from refcurv.model.corpus import Corpus
from refcurv.model.given import require_callable, require_corpus, require_flag, require_model
from refcurv.model.weights import Model
from refcurv.progress import Progress, silent

GIB = 2**30
LEAST_MEMORY = 0.001
"""GiB below which nothing is planned."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One identity on this model.

    Fields:
        id, statement: of the identity. verdict: "pass", "fail" or "left out".
        error, budget: of the place where the error came nearest to its budget, or passed it the
            furthest; relative. None where left out. An infinite error is a bit that differs where
            none may.
        where: that place, or why it was left out. places: how many were looked at.
    """

    id: str
    statement: str
    verdict: str
    error: float | None
    budget: float | None
    where: str
    places: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What `audit` found.

    Fields: findings, in the order of CHECKS; the plan; amplification, of roundings; the seconds
    that it took; proofs, what ball arithmetic proved, if it was asked for.
    """

    findings: tuple[Finding, ...]
    plan: Plan
    amplification: float
    seconds: float
    proofs: Proofs | None = None

    @property
    def passed(self) -> bool:
        """No finding failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The ids of the identities that do not hold, or are proved not to."""
        own = [f.id for f in self.findings if f.verdict == "fail"]
        return tuple(dict.fromkeys([*own, *(self.proofs.failed if self.proofs else ())]))

    def to_json(self) -> dict[str, Any]:
        """Plain values; an error that is no number becomes a text, "infinite" or "nan"."""
        rows = [asdict(finding) for finding in self.findings]
        for row in rows:
            if row["error"] is not None and not math.isfinite(row["error"]):
                row["error"] = "nan" if math.isnan(row["error"]) else "infinite"
        return {
            "passed": self.passed,
            "failed": list(self.failed),
            "findings": rows,
            "plan": asdict(self.plan),
            "amplification": self.amplification,
            "seconds": round(self.seconds, 2),
            "proofs": None if self.proofs is None else self.proofs.to_json(),
        }


def audit(
    model: Model,
    corpus: Corpus,
    *,
    memory: float | None = None,
    seed: int = 0,
    certify: bool = False,
    seconds: float = 60,
    say: Callable[[ProofPlan], object] = str,
    progress: Progress = silent,
) -> Audit:
    """Check on this model, on a few of this corpus's tokens, every identity that can be.

    Definition
        Each identity of `judge.identities.CHECKS` is measured where it applies; its error is
        relative to the terms that it sums, its budget derived from eps(float64) and the sizes of
        its sums. Where passes are compared, the terms are those of the whole pass, whose sizes a
        run of the same pass with every operation shaken shows (`judge.roundings`).

    Args:
        model: loaded in float64.
        corpus: its first sequences serve: at most 8 of 64 positions.
        memory: GiB that the audit may take; by default half of what is free. A model that does not
            fit is read block by block, and what cannot be checked then is named.
        seed: of the random directions.
        certify: whether ball arithmetic is to prove a sample of the identities too, to thirty
            digits (`judge.proofs`); it needs the extra `certified`.
        seconds: that these proofs may take; what does not fit is named.
        say: called with their plan, and its estimate of the time, before they begin.
        progress: called with (checks done, checks).

    Returns:
        Audit: findings, plan, seconds. `passed` is False when any identity failed.

    Raises:
        ConventionError: the model was loaded as float32. EmptyError: no labels. RangeError: token
        ids of another vocabulary; memory, seed or seconds out of range. NonFiniteError: NaN in a
        weight. MissingFlintError: `certify` without python-flint.

    Cost: some forty forward and backward passes over the batch, and V backward passes for each of
        at most three loss positions. The demo model: a quarter of a minute.
    Source: METHOD, Identities; METHOD, Exactness.
    Proof: tests/test_audit.py::test_a_planted_bug_is_named,
        tests/test_sound_models.py::test_more_sound_models_pass,
        tests/test_proofs.py::test_an_identity_with_a_wrong_factor_is_caught
    """
    begin = time.perf_counter()
    if require_model("audit", model).dtype != "float64":
        raise ConventionError('audit: load the model with dtype="float64"; float32 has no room.')
    require_corpus("audit", corpus)
    require_flag("audit", "certify", certify)
    require_callable("audit", "say", say)
    require_callable("audit", "progress", progress)
    start = require_seed("audit", seed)
    given = free_memory() / 2 / GIB if memory is None else memory
    given = require_range("audit", "memory", given, LEAST_MEMORY, 2**20)
    planned = plan(model.config, corpus, int(given * GIB))
    proofs = None
    if certify:
        limit = require_range("audit", "seconds", seconds, 0, 10**9)
        proofs = plan_proofs(model.config, planned.width, given * GIB, limit)
        say(proofs)
    with one_blas_thread(), np.errstate(over="ignore", under="ignore"):
        held = {name: model.parameters[name] for name in model.parameters if planned.resident}
        parameters = held or model.parameters
        bench = prepare(model.config, parameters, corpus, planned, start)
        findings = []
        for done, name in enumerate(CHECKS):
            progress(done, len(CHECKS))
            findings.append(_finding(name, bench))
        progress(len(CHECKS), len(CHECKS))
        proved = None if proofs is None else prove(bench, proofs, progress)
    took = time.perf_counter() - begin
    return Audit(tuple(findings), planned, bench.amplification, took, proved)


def _finding(name: str, bench: Bench) -> Finding:
    check = CHECKS[name]
    statement = (check.__doc__ or "").partition("\n")[0]
    try:
        measures = list(check(bench))
    except (ValueError, ArithmeticError) as error:
        # a step refused what this model led to, RefcurvError or not: a finding, not an accident
        if isinstance(error, RefcurvError) and error.status != 2:  # the machine's fault: neither
            raise
        return Finding(name, statement, "fail", None, None, str(error), 0)
    if not measures:
        return Finding(name, statement, "left out", None, None, "does not occur or fit here", 0)
    worst = max(measures, key=_excess)
    verdict = "pass" if _excess(worst) <= 1 else "fail"
    return Finding(name, statement, verdict, worst.error, worst.budget, worst.where, len(measures))


def _excess(measure: Measure) -> float:
    """Error over budget; NaN is the worst."""
    if math.isnan(measure.error):
        return math.inf
    if measure.budget == 0:
        return math.inf if measure.error else 0.0
    return measure.error / measure.budget


def free_memory() -> int:
    """Bytes that the machine can give without swapping, or 4 GiB where it does not say."""
    known = available()
    return 4 * GIB if known is None else known
