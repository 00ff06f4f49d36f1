"""Causes in the words of the registry of faults, and those that findings name by themselves."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.titles import Title, as_named
from refcurv.judge.verdict import LEFT_OUT, PASS, Cause, Comparison


def made(
    case: Case,
    fault: str | None,
    words: str,
    layers: tuple[str, ...],
    quantities: tuple[str, ...],
    before: float,
    after: float,
    alike: Sequence[str] = (),
    title: Title | None = None,
) -> Cause:
    """A Cause with the words of the registry. Args: title, of one bug of the fault."""
    if fault is not None and title is None:
        title = as_named(fault, case.dump.program)
    name = "" if title is None else f"{title.name[0].upper()}{title.name[1:]}. "
    remedy = "" if title is None else title.remedy
    return Cause(fault, f"{name}{words}", remedy, layers, quantities, before, after, tuple(alike))


def about(
    case: Case,
    fault: str | None,
    words: str,
    at: Sequence[Comparison],
    before: float,
    after: float,
    alike: Sequence[str] = (),
) -> Cause:
    """A Cause that speaks of these comparisons."""
    layers = dict.fromkeys(f.layer for f in at if f.layer)
    quantities = dict.fromkeys(f.quantity for f in at)
    return made(case, fault, words, tuple(layers), tuple(quantities), before, after, alike)


def with_named(
    case: Case, causes: Sequence[Cause], findings: Sequence[Comparison]
) -> tuple[Cause, ...]:
    """The causes, and one more for each fault that a comparison of bases, Λ or edits names.

    `diagnose` makes the causes of A and G, but of a corner that is off where nothing else is. Where
    it has the same fault, that cause speaks of these comparisons too.

    Proof: tests/test_judge_edits.py::test_a_fault_of_a_mask_is_a_cause,
        tests/test_judge_edits.py::test_a_corner_alone_is_a_cause
    """
    out = list(causes)
    told = {layer for one in causes for layer in one.layers}
    for fault, at in _by_fault(findings, told).items():
        place = next((k for k, cause in enumerate(out) if cause.fault == fault), None)
        if place is None:
            out.append(_cause(case, fault, at))
        else:
            out[place] = _wider(out[place], at)
    return tuple(out)


def _by_fault(findings: Sequence[Comparison], told: Set[str]) -> dict[str, list[Comparison]]:
    out: dict[str, list[Comparison]] = {}
    for one in findings:
        untold = one.quantity.startswith("corner of") and one.layer not in told
        ours = untold or not of_moments(one.quantity)
        if one.fault and one.verdict not in (PASS, LEFT_OUT) and ours:
            out.setdefault(one.fault, []).append(one)
    return out


def form_of(side: str) -> tuple[str, ...]:
    """The comparisons that the form of A, or of G, decides."""
    return (f"{side}/tr {side}", f"symmetry of {side}", side, f"n_{side}", "tr A · tr G")


def of_moments(quantity: str) -> bool:
    """Is it a comparison of A or G?"""
    return quantity in ("n_A", "n_G", "names", "tr A · tr G") or any(
        quantity in (side, f"{side}/tr {side}", f"symmetry of {side}", f"corner of {side}")
        for side in "AG"
    )


def _cause(case: Case, fault: str, at: Sequence[Comparison]) -> Cause:
    worst = max(one.error or 0.0 for one in at)
    words = f"In {at[0].layer}: {at[0].cause}." if at[0].layer else f"{at[0].cause}."
    words = words[:1].upper() + words[1:]
    return about(case, fault, words, at, worst, at[0].budget or 0.0)


def _wider(old: Cause, at: Sequence[Comparison]) -> Cause:
    layers = tuple(dict.fromkeys([*old.layers, *(one.layer for one in at)]))
    quantities = tuple(dict.fromkeys([*old.quantities, *(one.quantity for one in at)]))
    return replace(old, layers=layers, quantities=quantities)
