"""Which convention or bug explains what does not agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refcurv.judge.case import Case
from refcurv.judge.compare import Measured
from refcurv.judge.verdict import Cause, Comparison


def diagnose(
    case: Case,
    findings: Sequence[Comparison],
    measured: Mapping[str, Mapping[str, Measured]],
) -> tuple[tuple[Cause, ...], tuple[str, ...], list[Comparison]]:
    """(causes, hypotheses excluded, the findings with their causes)."""
    return (), (), list(findings)
