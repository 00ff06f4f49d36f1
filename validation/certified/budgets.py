"""Budgets on trial: each against the true error, over all that hypothesis draws.

    python -m validation.certified.budgets                  10,000 draws each, and 150 models
    python -m validation.certified.budgets --draws 200 --models 10 --only 'eigen*'
    python -m validation.certified.budgets --render         README.md from what was drawn

What is drawn lands batch by batch in draws.jsonl, with a digest of the code that it is of: when
stopped, run it again. Every batch has its own seed, and
the first ones of every budget come first. Needs the extras `certified` and `test`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from validation.certified import page
from validation.certified.draws import Data
from validation.certified.passes import PASSES, shares
from validation.certified.trials import Trial, trials

DRAWS = Path(__file__).with_name("draws.jsonl")
BATCH, SEEDS, FEW = 50, 10, 10
"""Configurations of a batch, and arrays of each; and models of a batch."""

PASS = "a pass"
MARKS = {"budgets": False, "budgets of passes": True}
"""Where a table stands in README.md, and whether it is of passes."""

PASSES_OF = "errors of three dtypes, array by array, of first order"
UNPROMISED = 2000
"""Draws on data on which a budget says that it may not hold."""

QUANTILES = (0.5, 0.9, 0.99, 1.0)
FUNCTIONS = ("law/tolerance.py", "algebra/balls.py", "algebra/gram.py", "algebra/scaling.py")
"""What the trials of single functions are of. Those of passes are of everything."""

Shares = dict[str, list[float]]


def every() -> list[Trial]:
    """The trials of single functions."""
    with page.from_tests():
        from budgets import gram
    return trials(gram)


def batch(data: Any, measure: Callable[[Any], Shares], count: int, seed: int) -> tuple[Shares, str]:
    """So many draws: the shares of budgets that errors use, and the draw that used most."""
    found: Shares = {}
    top = (-1.0, "")

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(data)
    def draw(one: Any) -> None:
        nonlocal top
        for name, used in measure(one).items():
            found.setdefault(name, []).extend(used)
            if max(used) > top[0]:
                top = max(used), f"{name}, number {np.argmax(used)} of {one!r:.300}"

    draw()
    return found, top[1]


def seeded(trial: Trial, one: Data) -> Shares:
    """The shares of one configuration's arrays, by consecutive seeds."""
    return {trial.name: [trial.ratio(replace(one, seed=one.seed + n)) for n in range(SEEDS)]}


def jobs(draws: int, models: int, only: str) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Batches that are to be run: (what, its number, how)."""
    for trial in every():
        if fnmatchcase(trial.name, only):
            wanted = draws if trial.promised else min(draws, UNPROMISED)
            for n in range(-(-wanted // (BATCH * SEEDS))):

                def run(trial: Trial = trial, n: int = n) -> Any:
                    return batch(trial.data, lambda x: seeded(trial, x), BATCH, n)

                yield trial.name, n, run
    if fnmatchcase(PASS, only):
        for n in range(-(-models // FEW)):
            yield PASS, n, lambda n=n: batch(PASSES, shares, min(FEW, models - n * FEW), n)


def versions() -> dict[bool, str]:
    """Digests of the code that trials of single functions are of, False, and those of passes."""
    own = ("draws.py", "trials.py")
    return {False: page.code(*own, computed=FUNCTIONS), True: page.code(*own, "passes.py")}


def read() -> dict[tuple[str, int], dict[str, Any]]:
    """What was drawn of this code."""
    lines = DRAWS.read_text(encoding="utf-8").splitlines() if DRAWS.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    now = versions()
    return {(r["trial"], r["batch"]): r for r in records if r["code"] == now[r["trial"] == PASS]}


def table(records: list[dict[str, Any]]) -> str:
    """One row for each budget: how much of it the errors use."""
    known = {trial.name: trial for trial in every()}
    used: Shares = {}
    for record in records:
        for name, some in record["shares"].items():
            used.setdefault(name, []).extend(some)
    rows = [
        "| budget | of what | draws | exceeded | median | 90 % | 99 % | most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, some in used.items():
        what = known[name].bounds if name in known else PASSES_OF
        over = sum(x > 1 for x in some)
        promised = name not in known or known[name].promised
        said = f"{over}" if promised else f"{over}, as it says"
        cells = " | ".join(f"{x:.2g}" for x in np.quantile(some, QUANTILES))
        rows.append(f"| {name} | {what} | {len(some):,} | {said} | {cells} |")
    return "\n".join(rows)


def exceeded(records: list[dict[str, Any]]) -> list[str]:
    """Draws that a budget promised to bound, and did not."""
    known = {trial.name: trial for trial in every()}
    return [
        record["most"] for record in records
        if any(max(some) > 1 for name, some in record["shares"].items()
               if name not in known or known[name].promised)
    ]  # fmt: skip


def main() -> int:
    """Draw what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m validation.certified.budgets")
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=150)
    parser.add_argument("--only", default="*", help="names of budgets, as a pattern")
    parser.add_argument("--render", action="store_true", help="only write what was drawn")
    given = parser.parse_args()
    now, done = versions(), read()
    todo = [] if given.render else list(jobs(given.draws, given.models, given.only))
    missing = sorted((job for job in todo if job[:2] not in done), key=lambda job: job[1])
    for number, (name, n, run) in enumerate(missing, 1):
        print(f"\r{number}/{len(missing)} {name:40.40}", end="", file=sys.stderr, flush=True)
        try:
            found, most = run()
        except KeyboardInterrupt:
            print("\nstopped; run it again to go on", file=sys.stderr)
            return 130
        record = {
            "trial": name,
            "batch": n,
            "code": now[name == PASS],
            "shares": found,
            "most": most,
        }
        with DRAWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        done[name, n] = record
    records = list(done.values())
    for mark, passes in MARKS.items():
        if some := [one for one in records if (one["trial"] == PASS) is passes]:
            stamp = page.stamp("validation.certified.budgets", now[passes], "hypothesis")
            page.write(mark, f"{stamp}\n\n{table(some)}")
    over = exceeded(records)
    for line in over:
        print(f"\nEXCEEDED {line}", file=sys.stderr)
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
