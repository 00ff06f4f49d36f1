"""Conformance vectors: cases that any program in any language can be tested with.

A case is a small HDF5 file and a JSON manifest. A valid one has every number that a model and a
corpus lead to, each by two routes. An invalid one has a bug planted. An acceptable one differs from
the truth as a right program may.

    case        a case and its manifest                truth       every number, as users compute it
    routes      the second route, and the budgets      planted     the bugs
    freedom     what is acceptable                     analytic    a case that is written down
    harness     what accepts and rejects               making      a set of cases → a folder
    flows       what flows through a small model
"""

from refcurv.judge.cases.case import ACCEPTABLE, INVALID, VALID, Case, Check
from refcurv.judge.cases.harness import accepted, judge
from refcurv.judge.cases.making import (
    CaseError,
    cases,
    make_cases,
    not_planted,
    write_cases,
)

__all__ = [
    "ACCEPTABLE",
    "INVALID",
    "VALID",
    "Case",
    "CaseError",
    "Check",
    "accepted",
    "cases",
    "judge",
    "make_cases",
    "not_planted",
    "write_cases",
]
