"""Which edit dev chooses, by the rule of claims.toml, from the runs that are measured."""

from __future__ import annotations

from collections.abc import Iterable

from refcurv.sweeps.choice import least_recited
from validation.real.plan import Plan, Record
from validation.real.results import Results

MOST = 1.06
"""claims.toml, [choice]: perplexity of clean_dev over that of the unedited model, at most."""


def edits(results: Results) -> Iterable[tuple[str, float, float, Record]]:
    """(layers, rho, ratio of perplexities, recited_dev) of every edit of the grid."""
    for layers, found in results.found("grid").items():
        base = found["baseline"]["dev"]["clean_dev"]["values"]["perplexity"]
        for one in found["edits"]:
            dev = one["populations"]["dev"]
            value = dev["clean_dev"]["values"]["perplexity"]
            ratio = float("inf") if value is None else value / base
            yield layers, one["rho"], ratio, dev["recited_dev"]


def chosen(results: Results, within: Iterable[str] | None = None) -> tuple[str, float]:
    """(layers, rho) with the least kept(recited) among those that cost little enough.

    Of as many passages the one of the lower perplexity; where none costs little enough the one of
    the lowest perplexity of all.

    Proof: tests/validation/test_real_page.py::test_dev_chooses_by_the_rule
    """
    some = [one for one in edits(results) if within is None or one[0] in within]
    costs = (((layers, rho), ratio, left["values"]["strict"]) for layers, rho, ratio, left in some)
    return least_recited(costs, MOST)[0]


def best(results: Results, plan: Plan, third: str) -> str | None:
    """The layers of the best edit of a third; None if none of its runs is measured."""
    known = results.found("grid")
    runs = [plan.layers(at) for at in plan.runs if plan.third(at) == third]
    within = [one for one in runs if one in known]
    return chosen(results, within)[0] if within else None


def is_complete(results: Results, plan: Plan) -> bool:
    """Is every run of the grid measured, with today's claims?"""
    return {plan.layers(at) for at in plan.runs} <= results.found("grid").keys()
