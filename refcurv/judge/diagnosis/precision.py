"""Whether what is left is the size of a coarser arithmetic, and of which part of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.faults import FAULTS
from refcurv.judge.diagnosis.hypotheses import see
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.verdict import Cause
from refcurv.law.checks import Array

SIZES = ("B59", "B60", "B63")
"""Faults of which the size of an error is the only sign. Sums in bfloat16 are more (B58)."""

BITS = 8
"""Digits of a bfloat16 significand, the leading one included."""


def causes(case: Case, found: Mapping[str, Side]) -> list[Cause]:
    """B58 to B63, where a form is right but for an error as large as another dtype's."""
    hit: dict[tuple[str, tuple[str, ...], str], dict[str, set[str]]] = {}
    worst: dict[tuple[str, tuple[str, ...], str], float] = {}
    for name, side in found.items():
        for layer, steps in side.ladders.items():
            left = side.of(layer)[1]
            rank = steps.rank(left.error)
            dtype = steps.steps[rank][0] if rank < steps.by_drawing else ""
            lost = rank > steps.by_drawing or side.drawn(layer)
            key = _named(case, layer, name, rank, "" if lost else dtype, lost)
            if key is not None:
                hit.setdefault(key, {}).setdefault(layer, set()).add(name)
                worst[key] = max(worst.get(key, 0.0), left.error)
    out = []
    for key, layers in hit.items():
        fault, alike, words = key
        sides = sorted(set().union(*layers.values()))
        each = [q for s in sides for q in (f"{s}/tr {s}", s)]
        quantities = (*each, "tr A · tr G")
        name = FAULTS[fault].name
        text = f"{name[0].upper()}{name[1:]}. {words} ({', '.join(sides)}; {len(layers)} layers.)"
        remedy = FAULTS[fault].advice(case.dump.program)
        error = worst[key]
        out.append(Cause(fault, text, remedy, tuple(layers), quantities, error, error, alike))
    return out


def _named(
    case: Case, layer: str, side: str, rank: int, dtype: str, lost: bool
) -> tuple[str, tuple[str, ...], str] | None:
    """(fault, alike, words) of one side; `lost`, where the size of what is left tells no dtype."""
    declared = case.arithmetic.declared
    if rank == 0 or not (dtype or lost):
        return None
    if dtype != "float32" and short_sums(case, layer, side):
        return "B58", (), "The sums have the few digits of bfloat16."
    if lost or (dtype == "float32" and not declared):
        return None
    words = f"What is left has the size of {dtype}."
    if dtype == "float32":
        return "B63", (), words
    return ("B59", (), words) if dtype == "bfloat16" else ("B60", ("B61",), words)


def short_sums(case: Case, layer: str, side: str) -> bool:
    """Has every entry of the sums, or of the means, 8 significant bits?"""
    seen = see(case, layer).get(side)
    if seen is None or case.arithmetic.stored in ("bfloat16", "float16"):
        return False
    sums = [seen.T] + ([] if seen.n_T is None else [seen.T * seen.n_T])
    return any(short(np.asarray(X)) for X in sums)


def short(X: Array) -> bool:
    """Has every entry 8 significant bits?"""
    entries = X[X != 0]
    if entries.size < 3 or not np.isfinite(entries).all():
        return False
    digits = np.ldexp(np.frexp(entries)[0], BITS)
    off = np.abs(digits - np.rint(digits))
    return bool((off < 1e-4).mean() > 0.99)  # rounding in float32 leaves 1e-5
