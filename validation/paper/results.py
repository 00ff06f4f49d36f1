"""The result files of the experiments: which there are, and what their numbers mean.

A number of a table is a mean over seeds with the half width of its 95 % t interval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refcurv.evaluation.bands import MASS_EDGES
from refcurv.evaluation.metrics import retention, retention_above_chance
from refcurv.report.plots.abilities import PAPER_RANGE
from validation.paper.statistics import Interval, interval

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEVELOPMENT = "lm-1-development"
"""The run on which BSN's settings were chosen; it is not among those that are reported."""
OTHER = "olmo2"
"""The architecture that the first one is set beside."""

LEFT = 1 / 10
"""The share of the recitation that counts as forgotten."""

MASS_PERCENT = tuple(round(100 * edge) for edge in MASS_EDGES)
"""Where bands of curvature mass begin and end."""

Json = Any
Runs = Sequence[Json]

ORDER = ("quotes", "addition", "facts", "copying", "open_book", "boolean")  # fmt: skip
"""Populations by the damage that the paper finds: memorised text, arithmetic, facts, the rest."""

METHODS = ("kfac", "svd", "bsn", "random pairs", "random basis")
VARIANTS = ("inputs only", "outputs only", "corrected marginals")
SAME_SIZE = ("random pairs, same size", "random basis, same size")
NAMES = {"kfac": "K-FAC", "svd": "SVD", "bsn": "BSN"}

KINDS = {"quotes": "memorised", "addition": "arithmetic", "facts": "facts",
         "open_book": "open book", "boolean": "logic"}  # fmt: skip
"""Population → what the paper calls its kind."""
PAPER_KEPT = {name: PAPER_RANGE[kind] for name, kind in KINDS.items()}
"""Retention in the paper, lowest and highest (METHOD, Reported results)."""


def load(kind: str, variant: str = "") -> list[Json]:
    """The result files `KIND-SEED.json`, by seed: those of the reported seeds.

    Or `KIND-SEED-VARIANT.json`: another architecture, or "without-quotes" in the training.
    """
    tail = f"-{variant}" if variant else ""
    seeds = (re.fullmatch(rf"{kind}-(\d+){tail}", path.stem) for path in RESULTS.glob("*.json"))
    return [read(f"{kind}-{seed}{tail}") for seed in sorted(int(m[1]) for m in seeds if m)]


def read(name: str) -> Json:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# ------------------------------------------------------------------ reading a run


def forgetting(before: Json, rows: Iterable[Json]) -> list[Json]:
    """Edits judged on the dev split that leave at most LEFT of the quotes recited `before`."""
    return [row for row in rows if row["dev"]["quotes"] <= LEFT * before["quotes"]]


def rows(edit: Json) -> Mapping[str, Json]:
    """Population → row of the test table."""
    return {row["name"].removesuffix("_test"): row for row in edit["test"]}


def strict(edit: Json, half: str = "test") -> float:
    """Share of the quotes of one half that is still recited."""
    return (
        edit["quotes_dev"]["strict"] if half == "dev" else rows(edit)["quotes"]["after"]["strict"]
    )


def score(row: Json, when: str) -> float:
    """What a retention is of."""
    return row[when].get("strict", row[when].get("accuracy"))


def rise(edit: Json) -> float:
    """Perplexity after over before, less 1."""
    row = rows(edit)["language"]
    return row["after"]["perplexity"] / row["before"]["perplexity"] - 1


def retained(row: Json, chance: bool = False) -> float:
    """Retention of one population, raw or above chance."""
    before, after = score(row, "before"), score(row, "after")
    return (
        retention_above_chance(before, after, row["chance"]) if chance else retention(before, after)
    )


def over(runs: Runs, value: Callable[[Json], float]) -> Interval:
    """The interval of one number per run."""
    return interval([value(run) for run in runs])


def percent(found: Interval) -> str:
    """As per cent with one decimal."""
    return found.text(1, 100)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def named(method: str) -> str:
    """A method as a table writes it."""
    first, comma, rest = method.partition(", ")
    return NAMES.get(first, first) + comma + rest


def unedited(run: Json, name: str, split: str = "test") -> Json:
    """The unedited model's row of a population."""
    return next(row for row in run["baseline"][split] if row["name"] == f"{name}_{split}")


def unedited_value(run: Json, name: str, split: str = "test") -> float:
    """What the unedited model has: perplexity, strict recitation or accuracy."""
    after = unedited(run, name, split)["after"]
    return after.get("perplexity", after.get("strict", after.get("accuracy")))


def curve_kept(run: Json, point: Json, name: str) -> float:
    """Retention at a point of a curve."""
    return retention(unedited_value(run, name), point["test"][name])


def curve_rise(run: Json, point: Json) -> float:
    """The rise of perplexity at a point of a curve."""
    return point["test"]["language"] / unedited_value(run, "language") - 1


def refit_rise(run: Json, point: Json) -> float:
    """The same, before and after at the temperature that is best."""
    return point["test"]["refit"] / run["baseline"]["refit"] - 1


def at_forgetting(run: Json, method: str) -> dict[str, float] | None:
    """Where a curve first leaves LEFT of the quotes, linearly between its two points there.

    Returns what is "kept" of pairs, "perplexity" and "refit" (rises) and the retention of each
    population; None if the strongest cut leaves more.
    """
    before = dict.fromkeys(("kept", *ORDER), 1.0) | {"perplexity": 0.0, "refit": 0.0}
    for point in run["curves"][method]:
        here = {name: curve_kept(run, point, name) for name in ORDER} | {
            "kept": point["kept"],
            "perplexity": curve_rise(run, point),
            "refit": refit_rise(run, point),
        }
        if here["quotes"] <= LEFT:
            t = (before["quotes"] - LEFT) / (before["quotes"] - here["quotes"])
            return {name: (1 - t) * before[name] + t * value for name, value in here.items()}
        before = here
    return None


def cut_layers(run: Json) -> list[str]:
    """The layers that the chosen edit cuts."""
    return list(run["tasks"]["quotes"])
