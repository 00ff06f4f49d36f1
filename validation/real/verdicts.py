"""The claims' numbers, from the results alone, and what the rule of claims.toml makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from refcurv.evaluation.intervals import wilson
from validation.paper.statistics import Interval, interval
from validation.real.choosing import is_complete
from validation.real.plan import CALIBRATIONS, Plan, Record, claims
from validation.real.results import Results

ABLE = 50
"""claims.toml, [choice]: a set of which fewer items of test are right is shown, not judged."""

JUDGED = ("arithmetic", "facts", "open_book", "logic", "copying", "ordering")
AT_PERPLEXITY = "table at equal perplexity"


@dataclass(frozen=True, slots=True)
class Replicate:
    """What is known from one calibration.

    Fields: k, its number; before, {population: values}; methods, {method: {population: values}};
    match, {method: the word for its search}; pairs, the share that K-FAC keeps; bands, thirds and
    half as the parts found them, {} where they did not.
    """

    k: str
    before: Record
    methods: Record
    match: Record
    pairs: float
    bands: Record
    thirds: Record
    half: Record

    def kept(self, group: str, method: str = "kfac") -> float:
        """Share that is right after, of that before, both less chance; NaN if it is not judged."""
        return share(self.before, self.methods.get(method, {}), judged_sets(self.before, group))

    def recited(self, method: str) -> float:
        """kept(recited) of a method at K-FAC's perplexity; NaN if that was not reached."""
        return self.kept("recited", method) if self.match[method] == "matched" else math.nan

    def nats(self, method: str) -> float:
        """Nats of a recited token over the rise of ln perplexity, of clean_test."""
        after = self.methods[method]
        lost = [_value(one, "recited_test", "nats") for one in (after, self.before)]
        cost = [math.log(_value(one, "clean_test", "perplexity")) for one in (after, self.before)]
        return (lost[0] - lost[1]) / (cost[0] - cost[1])

    def band(self, at: int) -> float:
        """Ratio of recited to clean in a band by rank, mean over the layers, less 1."""
        return float(np.mean([one["ratio"][at] for one in self.bands["input_rank"]])) - 1

    def third(self, name: str) -> float:
        """kept(recited) of the best run of a third."""
        if self.thirds[name]["verdict"] != "matched":
            return math.nan
        return share(self.before, self.thirds[name]["left"], ["recited_test"])


def judged_sets(before: Record, group: str) -> list[str]:
    """The populations of a group that are judged; of tasks those with ABLE items.

    Proof: tests/validation/test_real_page.py::test_sets_of_too_few_items_are_judged_nowhere
    """
    named = claims()["populations"].get(group, [group])
    if isinstance(named, str):
        return [f"{group}_test"]
    every = [f"{name}_test" for name in named if f"{name}_test" in before]
    return [name for name in every if before[name]["right"].count("1") >= ABLE]


def share(before: Record, after: Record, names: Iterable[str]) -> float:
    """Right after over right before, both less chance, of the populations together.

    Proof: tests/validation/test_real_page.py::test_kept_by_hand
    """
    was = still = 0.0
    for name in names:
        if name not in after:
            return math.nan
        items, chance = before[name]["items"], before[name]["chance"]
        was += before[name]["right"].count("1") - chance * items
        still += after[name]["right"].count("1") - chance * items
    return still / was if was > 0 else math.nan


def share_interval(before: Record, after: Record, names: Iterable[str]) -> tuple[float, float]:
    """Wilson's, of the items together, within one calibration; scaled as `share` is."""
    names = list(names)
    right = np.array([x == "1" for name in names for x in after[name]["right"]])
    items = [before[name]["items"] for name in names]
    chance = float(np.average([before[name]["chance"] for name in names], weights=items))
    was = float(np.mean([x == "1" for name in names for x in before[name]["right"]]))
    low, high = ((end - chance) / (was - chance) for end in wilson(right))
    return low, high


def replicates(results: Results) -> list[Replicate]:
    """What is known, calibration by calibration."""
    tables, found = results.found(AT_PERPLEXITY), []
    for k in map(str, CALIBRATIONS):
        if k not in tables:
            continue
        methods = {one["method"]: one["populations"]["test"] for one in tables[k]["edits"]}
        match = {one["method"]: one["verdict"] for one in tables[k]["edits"]}
        pairs = next(one["kept"] for one in tables[k]["edits"] if one["method"] == "kfac")
        others = [results.found(part).get(k, {}) for part in ("bands", "thirds")]
        half = results.found("sizes").get(f"{k}, 1/2", {})
        before = tables[k]["baseline"]["test"]
        found.append(Replicate(k, before, methods, match, pairs, *others, half))
    return found


NUMBERS: dict[str, Callable[[Replicate], float]] = {
    "recited-falls": lambda one: one.kept("recited"),
    "recited-falls-most": lambda one: _least(one) - one.kept("recited"),
    "arithmetic-falls": lambda one: one.kept("arithmetic"),
    "arithmetic-below-facts": lambda one: one.kept("facts") - one.kept("arithmetic"),
    "facts-below-open-book": lambda one: one.kept("open_book") - one.kept("facts"),
    "open-book-stays": lambda one: one.kept("open_book"),
    "logic-stays": lambda one: one.kept("logic"),
    "facts-kept": lambda one: one.kept("facts"),
    "rare-facts-fall-more": lambda one: one.kept("facts_frequent") - one.kept("facts_rare"),
    "kfac-below-svd": lambda one: one.recited("svd") - one.kept("recited"),
    "flat-bands-recited": lambda one: one.band(-1),
    "sharp-bands-clean": lambda one: one.band(0),
    "late-blocks": lambda one: one.third("middle") - one.third("late"),
    "not-fragility": lambda one: one.kept("own") - one.kept("recited"),
    "not-any-cut": lambda one: one.nats("kfac") - one.nats("random-basis"),
    "not-any-pairs": lambda one: one.nats("kfac") - one.nats("random-pairs"),
    "not-the-calibration": lambda one: one.half["kept"] / one.pairs,
}
"""The number of each claim, from one calibration; KeyError or NaN where it is not known."""


def _least(one: Replicate) -> float:
    return min(x for group in JUDGED if not math.isnan(x := one.kept(group)))


def _value(some: Record, population: str, name: str) -> float:
    value = some[population]["values"][name]
    return math.nan if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, its number over the calibrations (None if it is not known), and the word for it."""

    claim: Record
    found: Interval | None
    word: str


def verdicts(results: Results, plan: Plan) -> list[Verdict]:
    """Each claim judged by the rule; only once all that the rule asks for is measured.

    Proof: tests/validation/test_real_page.py::test_a_claim_is_judged_by_its_rule
    """
    runs, complete = replicates(results), is_complete(results, plan)
    return [_verdict(claim, runs, complete) for claim in claims()["claim"]]


def _verdict(claim: Record, runs: list[Replicate], complete: bool) -> Verdict:
    values = [x for run in runs if math.isfinite(x := _number(claim["id"], run))]
    if not values:
        return Verdict(claim, None, _unknown(claim, runs))
    found = interval(values)
    if not complete:
        return Verdict(claim, found, "not judged: layers × ρ is not complete")
    if len(values) < len(CALIBRATIONS):
        return Verdict(claim, found, f"not judged: {len(values)} of 5 calibrations")
    return Verdict(claim, found, judged(claim, found))


def _unknown(claim: Record, runs: list[Replicate]) -> str:
    """Why a claim has no number in any calibration."""
    number = claim["number"]
    there = any(run.thirds for run in runs) if "third" in number else bool(runs)
    if there and "matched" in number:
        return "not matched"
    return "no set is able" if there and number.startswith("kept") else "not measured"


def judged(claim: Record, found: Interval) -> str:
    """The word for an interval beside a claim's bound."""
    below = "below" in claim
    excess = claim["below"] - found.mean if below else found.mean - claim["above"]
    if excess <= 0:
        return "does not hold"
    return "holds" if excess > found.half else "holds in the mean"


def _number(name: str, run: Replicate) -> float:
    try:
        return float(NUMBERS[name](run))
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return math.nan  # a part that it needs is not there
