"""The candidates on one model: do they agree, how long do they take, how much memory?

In one process they take turns, after each has collected once. In a fresh process each is alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from validation.bench.candidates import (
    CANDIDATES,
    OURS,
    SHIPPED,
    Candidate,
    Subject,
    Sums,
    as_shipped,
)
from validation.bench.measuring import Record, measured, resident, tell
from validation.bench.proxies import Size

MOST_SHIPPED = 3
"""Rounds of the collector as shipped, which takes as long as all others together."""


def take_turns(
    folder: Path, size: Size, blocks: list[int], threads: int, rounds: int, names: list[str]
) -> Record:
    """{times: {candidate: its measurements}, checks, missing}; no times if two disagree.

    Who begins a round changes from one to the next: the first may find cold memory.
    """
    subject = Subject(folder, size, tuple(blocks), threads)
    use_threads(threads)
    there = [name for name in names if CANDIDATES[name].there]
    made = {name: CANDIDATES[name].make(subject) for name in there}
    found: Record = {"missing": [name for name in names if name not in there]}
    found["checks"] = check(made, subject.labels)
    if not all(one["agree"] for one in found["checks"].values()):
        return found
    for name in there:
        if name != SHIPPED:
            made[name].collect(None)
    times: Record = {name: [] for name in there}
    for turn in range(rounds):
        for name in there[turn % len(there) :] + there[: turn % len(there)]:
            if name == SHIPPED and turn >= MOST_SHIPPED:
                continue
            one: Record = {}
            with measured(one, "pass"):
                made[name].collect(None)
            times[name].append(one["pass"])
            tell(f"round {turn + 1}/{rounds}: {name}: {one['pass']['seconds']:.2f} s")
    return found | {"times": times}


def alone(folder: Path, size: Size, blocks: list[int], threads: int, name: str) -> Record:
    """The memory of one collection after another. As shipped: of one block, like of any."""
    subject = Subject(folder, size, tuple(blocks), threads)
    if name != OURS:  # whose memory has no torch in it
        use_threads(threads)
    candidate = as_shipped(subject, 1) if name == SHIPPED else CANDIDATES[name].make(subject)
    found: Record = {}
    base = resident()
    candidate.collect(None)
    with measured(found, "pass", base):
        candidate.collect(None)
    return found["pass"]


def use_threads(threads: int) -> None:
    """torch's threads, if it is installed. The process is on so many cores already."""
    if CANDIDATES[SHIPPED].there:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)


# ------------------------------------------------------------------ do they agree?


def check(made: dict[str, Candidate], labels: np.ndarray) -> Record:
    """Every candidate's sums beside refcurv's, by the same labels."""
    ours = made[OURS].sums(made[OURS].collect(labels))
    checks: Record = {}
    for name, candidate in made.items():
        if name != OURS:
            tell(f"does {name} find the same sums?")
            checks[name] = verdict(ours, candidate.sums(candidate.collect(labels)))
    return checks


def verdict(ours: Sums, theirs: Sums) -> Record:
    """Agreement: the same layers and counts, and every distance within the limit.

    A distance is |theirs − ours| / |ours|, Frobenius. The limit is a tenth of the share that one
    row more or less would have: far above rounding (observed at 4,088 rows: 1.6e-6 for A, 5.1e-6
    for G), far below any other convention (the last position kept: 1.6e-3; one label of 4,088
    changed: 6e-2). NaN is no agreement.
    """
    rows = {name: n for name, (_, _, n) in ours.items()}
    limit = 0.1 / max(rows.values())
    found: Record = {"rows": max(rows.values()), "limit": limit, "worst": {}}
    found["agree"] = rows == {name: n for name, (_, _, n) in theirs.items()}
    for side, key in enumerate("AG"):
        by = {
            name: _distance(theirs[name][side], ours[name][side]) for name in ours if name in theirs
        }
        found["worst"][key] = max(by.items(), key=lambda item: item[1], default=("none", 0.0))
        found["agree"] &= all(d <= limit for d in by.values())
    return found


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(other))
