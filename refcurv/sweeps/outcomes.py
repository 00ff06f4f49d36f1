"""The records of a sweep: what each edit left, and which edits no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

Values = Mapping[str, Mapping[str, Any]]
"""Population → kind, items, tokens, chance, values by name, interval, and right, a text of 0 and 1,
one for each item; None where items are not right or wrong. Where nothing could be measured all
values are None, and `fault` says why."""

NO_TARGET: Final = "no target"
"""The verdict where the K-FAC edit costs more than can be matched: nothing else was tried."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One edit of a sweep.

    Fields:
        layers: the pattern. rho: of the K-FAC edit that this one is compared with, or is.
        method, removed: how it cuts, and the share that it removes (`sweeps.methods`).
            None where nothing was tried.
        verdict: "given" for K-FAC and at equal rho; else that of the match, or NO_TARGET.
        kept: the share of pairs of directions (svd: of singular directions) that it keeps, or None.
        populations: split → what is left.
        front: K-FAC, and what is compared with it: does no other K-FAC edit of the sweep have a
            lower dev perplexity and recite no more dev passages, or as low and fewer? None where
            dev does not say.
    """

    layers: str
    rho: float
    method: str
    removed: float | None
    verdict: str
    kept: float | None
    populations: Mapping[str, Values]
    front: bool | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """What `sweep` found.

    Fields: split that reports; match, what methods are equal in; on, the dev population that says
    it, None at equal rho; baseline, split → what the unedited model does; edits, in the order of
    the work.
    """

    split: str
    match: str
    on: str | None
    baseline: Mapping[str, Values]
    edits: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "split": self.split, "match": self.match, "on": self.on,
            "baseline": dict(self.baseline), "edits": [asdict(one) for one in self.edits],
        }  # fmt: skip


def unmeasured(base: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """A population of which nothing could be measured, and why; `base`: without an edit."""
    none = dict.fromkeys(base["values"])
    return {**base, "values": none, "interval": None, "right": None, "fault": fault}


def marked(edits: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The same edits, those on the front of dev marked, as `Outcome.front` says.

    Proof: tests/test_sweep.py::test_the_front_is_of_dev,
        ::test_one_that_is_as_good_in_one_is_beaten
    """
    costs = {
        (one.layers, one.rho): dev_cost(one.populations.get("dev", {}))
        for one in edits
        if one.method == "kfac"
    }
    known = {key: cost for key, cost in costs.items() if cost is not None}

    def best(key: tuple[str, float]) -> bool | None:
        if key not in known:
            return None
        own = known[key]
        return not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and other != own
            for other in known.values()
        )

    return tuple(replace(one, front=best((one.layers, one.rho))) for one in edits)


def dev_cost(found: Values) -> tuple[float, float] | None:
    """Perplexity of the first text, recitation of the first passages; None without both."""
    text, recite = (
        next((p["values"] for p in found.values() if p["kind"] == kind), None)
        for kind in ("text", "recite")
    )
    if text is None or recite is None or recite["strict"] is None:
        return None
    perplexity = text["perplexity"]
    return math.inf if perplexity is None else perplexity, recite["strict"]
