"""Causes of what leaves no matrix to compare: none, zeros, other numbers, another size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set

from refcurv.judge.biases import A_COLUMN, NO_COLUMN
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.causes import about, form_of, made
from refcurv.judge.diagnosis.search import Side
from refcurv.judge.diagnosis.seen import states
from refcurv.judge.diagnosis.titles import of_change
from refcurv.judge.diagnosis.variants.networks import CHANGES, Level
from refcurv.judge.diagnosis.variants.positions import positions
from refcurv.judge.diagnosis.variants.stopped import SILENT
from refcurv.judge.verdict import MISSING, Cause, Comparison


def missing(
    case: Case, found: Mapping[str, Side], findings: Sequence[Comparison]
) -> Iterator[Cause]:
    """Faults that leave no matrix to compare: none, zeros, other numbers, another size."""
    unasked = _unasked(case, findings)
    absent = [f for f in findings if f.verdict == MISSING and f.layer and f.layer not in unasked]
    if absent:
        text = f"Nothing is stored of it. If that is meant, {ALONE}."
        yield about(case, "B48", text, absent, math.inf, math.nan)
    zero, wild, inputs = [], [], []
    spilt = False
    for layer in case.matched:
        size = case.counts(layer).shape[1] - (layer in case.joint)
        for side, state in states(case, layer).items():
            at = [f for f in findings if f.layer == layer and f.quantity in form_of(side)]
            if not state.finite:
                wild += at
                spilt |= state.spilt
            elif state.wanted and not state.filled:
                zero += at
            elif side == "G" and not state.same and not found[side].of(layer)[0].faults:
                inputs += at if state.shape == (size, size) else []
    last = zero and _last_is_empty(case, [f for f in zero if f.quantity == "A"])
    for level, at in _silenced(found, zero):
        words, title = f"Every entry is 0, as with `{level[0]}`.", of_change(level, case)
        where = tuple(dict.fromkeys(f.layer for f in at)), form_of("G")
        yield made(case, CHANGES[level[0]].fault, words, *where, math.inf, math.nan, (), title)
        zero = [f for f in zero if f not in at]
    for fault, words, at in (
        ("B41" if last else "B48", LAST_EMPTY if last else "Every entry is 0.", zero),
        ("B61" if spilt else None, "Entries are not finite." if spilt else NOT_FINITE, wild),
        ("B35", "G has the size of the layer's input.", inputs),
        ("B31", "A has no column of ones.", [f for f in findings if f.cause == NO_COLUMN]),
        ("B31", "A has a column of ones.", [f for f in findings if f.cause == A_COLUMN]),
    ):
        if at:
            alike = () if fault else ("B61",)
            yield about(case, fault, words, at, math.inf, math.nan, alike)


def _silenced(
    found: Mapping[str, Side], zero: Sequence[Comparison]
) -> Iterator[tuple[Level, list[Comparison]]]:
    """What was chosen that sends nothing back to some layers; what of these is 0.

    Proof: tests/test_judge_network.py::test_what_is_detached_has_its_name
    """
    settings = [one.idea.setting for one in found["G"].chosen if one.idea.setting]
    for level in dict.fromkeys(level for setting in settings for level in setting.network):
        silent = SILENT.get(level[0], ())
        at = [f for f in zero if f.quantity != "A" and f.layer.rpartition(".")[2] in silent]
        if at:
            yield level, at


ALONE = "judge what is there with --layers 'PATTERN' (layers= in Python)"
"""What to do where theirs is meant to hold some layers only."""

LAST_EMPTY = (
    "Every entry of every A is 0, and no G is; the last sequences have no row, so that a batch of "
    "these alone leaves this."
)


def _last_is_empty(case: Case, zero: Sequence[Comparison]) -> bool:
    """Is A 0 in every layer, and G in none, where the last sequence has no row?

    A hook that never fires adds no rows either, and a frozen layer has its A.
    """
    every = {layer: states(case, layer) for layer in case.matched}
    if {f.layer for f in zero} != {*every} or case.model is None or case.corpus is None:
        return False
    filled = all(side["G"].filled for side in every.values() if "G" in side)
    counted = all(case.counts(layer).theirs["A"] != 0 for layer in every)
    keep_BT = positions(case.corpus, case.model.config, case.reference.rows).keep_BT
    return filled and counted and not keep_BT[-1].any()


def _unasked(case: Case, findings: Sequence[Comparison]) -> Set[str]:
    """Missing layers of which no block has any like them: all of the attention, or all of the MLPs.

    These were not asked for, nor was a head that is missing beside them. Frozen layers are some
    blocks, and a hook that never fires is at one of several layers (B48).
    """
    absent = [f.layer for f in findings if f.verdict == MISSING and f.layer]
    whole = {_part(x) for x in absent} - {_part(x) for x in case.matched}
    return {x for x in absent if _part(x) in whole} if whole & {"attn", "mlp"} else set()


def _part(layer: str) -> str:
    """`mlp` of `blocks.3.mlp.up`."""
    return layer.split(".")[2] if layer.startswith("blocks.") else layer


def not_asked(case: Case, findings: Sequence[Comparison]) -> Iterator[Cause]:
    """Missing layers that seem not to have been asked for: no fault is named."""
    unasked = _unasked(case, findings)
    at = [f for f in findings if f.verdict == MISSING and f.layer in unasked]
    if at:
        parts = ", ".join(dict.fromkeys(_part(f.layer) for f in at))
        text = f"No layer of {parts} is there: they seem not to have been asked for. Then "
        text += f"{ALONE}. If they were asked for, their hooks never fired."
        yield about(case, None, text, at, math.inf, math.nan, ("B48",))


NOT_FINITE = (
    "Unknown: entries are not finite, and no infinity says that a number was too large. It may be "
    "float16 overflow (B61), a division by 0 rows, or a loss that was NaN already."
)
