"""Speed and memory of refcurv beside PyTorch programs that do the same, on this machine.

    python -m validation.bench                      everything but the plots, on a quiet machine
    python -m validation.bench --only time,memory   some sections; the others stay as they were
    python -m validation.bench --small              tiny models: does it run? Writes nothing
    python -m validation.bench --only streamed --size 7b    a model that memory need not hold
    python -m validation.bench --cost               cost against tokens, depth, width, ...: cost.png
    python -m validation.bench --render             README.md and cost.png from results.json alone

Each model is made by the package itself and given to all. Before anything is timed, every candidate
must find the same A and G by the same labels. A section is kept in results.json once it is done, if
the machine was quiet meanwhile: then README.md shows it. Exit status 1: the candidates disagree, or
the machine was not quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from refcurv.law.checks import RefcurvError
from validation.bench import cost, page, parts, pipeline, products, shares, streamed, timing
from validation.bench.candidates import CANDIDATES, OURS, SHIPPED
from validation.bench.fresh import spawn, spawn_each
from validation.bench.measuring import (
    BUSY,
    Record,
    busy_now,
    describe_machine,
    others_share,
    tell,
    today,
)
from validation.bench.proxies import PROXIES, Proxy, Size, make, small
from validation.bench.targets import ON_ONE_CORE

DISK = 10 * 2**30
"""Bytes that the 100 M model's files take, all of them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    small: bool
    rounds: int
    threads: tuple[int, ...]
    candidates: tuple[str, ...]
    place: Path
    streamed: streamed.Streamed = streamed.RUNS["200m"]

    def proxy(self, name: str, cores: int = 1) -> Proxy:
        """The model of that name, or a tiny one; its corpus grows with the cores."""
        one = small(name) if self.small else PROXIES[name]
        return replace(one, size=one.size.times(cores))

    def folder(self, size: Size) -> Path:
        """Where its files are; they are made when they are first asked for."""
        at = self.place / f"model{hash(size) & 0xFFFF_FFFF}"
        if not at.exists():
            at.mkdir()
            spawn(make, at, size)
        return at


# ------------------------------------------------------------------ sections: {run: its record}


def runs(plan: Plan) -> list[tuple[str, int]]:
    """Every proxy on one core, and all layers on more; the 100 M model on the most cores."""
    one, *more = plan.threads
    found = [(name, one) for name in ("all", "upper", "mid")]
    return [*found, *(("all", n) for n in more), ("100m", plan.threads[-1])]


def time_section(plan: Plan) -> Record:
    found: Record = {}
    for name, cores in runs(plan):
        proxy = plan.proxy(name, 1 if name == "100m" else cores)
        chosen = [c for c in plan.candidates if c != SHIPPED or (name, cores) == ("all", 1)]
        tell(f"time: {proxy.what}, {cores} cores")
        found[f"{name} {cores}"] = spawn(
            timing.take_turns, plan.folder(proxy.size), proxy.size, cores,
            blocks=proxy.blocks, threads=cores, names=chosen,
            rounds=min(plan.rounds, 2) if name == "100m" else plan.rounds,
        )  # fmt: skip
    return found


def memory_section(plan: Plan) -> Record:
    found: Record = {}
    for name, cores in runs(plan):
        proxy = plan.proxy(name, 1 if name == "100m" else cores)
        times: Record = {}
        for candidate in plan.candidates:
            if CANDIDATES[candidate].there and (candidate != SHIPPED or cores == 1):
                tell(f"memory: {proxy.what}, {cores} cores: {candidate}")
                options = {"blocks": proxy.blocks, "threads": cores, "name": candidate}
                at = plan.folder(proxy.size)
                times[candidate] = [spawn(timing.alone, at, proxy.size, cores, **options)]
        found[f"{name} {cores}"] = {"times": times}
    return found


def products_section(plan: Plan) -> Record:
    """In each round, on each number of cores: the products alone, the whole, sgemm alone.

    On more cores than one, the whole on one core too.
    """
    found: Record = {f"all {n}": {"floor": [], "sgemm": [], "times": {OURS: []}}
                     for n in plan.threads}  # fmt: skip
    for turn, cores in product(range(plan.rounds), plan.threads):
        tell(f"products, round {turn + 1}/{plan.rounds}: {cores} cores")
        one, run = plan.proxy("all"), found[f"all {cores}"]
        size = one.size.times(cores)
        run["floor"].append(
            spawn_each(products.floor, plan.place, one.size, cores, blocks=one.blocks)
        )
        for key, n in ((OURS, cores), *([(ON_ONE_CORE, 1)] if cores > 1 else [])):
            options = {"blocks": one.blocks, "threads": n, "rounds": 1, "names": [OURS]}
            whole = spawn(timing.take_turns, plan.folder(size), size, n, **options)
            run["times"].setdefault(key, []).extend(whole["times"][OURS])
        run["sgemm"].append(spawn_each(products.sgemm, plan.place, one.size, cores))
    return found


def drawing_section(plan: Plan) -> Record:
    size = plan.proxy("all").size
    return {"drawing": spawn(parts.drawing, plan.folder(size), size, 1, rounds=plan.rounds)}


def selection_section(plan: Plan) -> Record:
    options = {"rounds": plan.rounds, "small": plan.small}
    size = plan.proxy("all").size
    return {"selection": spawn(parts.selection, plan.place, size, 1, **options)}


def decompose_section(plan: Plan) -> Record:
    size, cores = plan.proxy("100m").size, plan.threads[-1]
    options = {"threads": cores, "rounds": min(plan.rounds, 2)}
    return {"decompose": spawn(parts.decomposing, plan.folder(size), size, cores, **options)}


def profile_section(plan: Plan) -> Record:
    found: Record = {}
    for name in ("all", "upper", "mid"):
        proxy = plan.proxy(name)
        tell(f"profile: {proxy.what}")
        options = {"blocks": proxy.blocks, "threads": 1, "rounds": min(plan.rounds, 3)}
        found[f"{name} 1"] = spawn(shares.shares, plan.folder(proxy.size), proxy.size, 1, **options)
    return found


def cost_section(plan: Plan) -> Record:
    return cost.curves(plan.place, plan.proxy("all").size, plan.threads, plan.small)


def pipeline_section(plan: Plan) -> Record:
    size = plan.proxy("100m").size
    phases = pipeline.pipeline(plan.folder(size), size)
    return {"100m": {"times": {name: [one] for name, one in phases.items()}}}


def streamed_section(plan: Plan) -> Record:
    """Beside the runs of other sizes that are known."""
    known = {} if plan.small else read_results().get("streamed", {}).get("runs", {})
    return known | streamed.streamed(plan.place, streamed.SMALL if plan.small else plan.streamed)


SECTIONS: dict[str, Callable[[Plan], Record]] = {
    "time": time_section,
    "memory": memory_section,
    "products": products_section,
    "drawing": drawing_section,
    "selection": selection_section,
    "decompose": decompose_section,
    "profile": profile_section,
    "pipeline": pipeline_section,
    "streamed": streamed_section,
    "cost": cost_section,
}
UNTIMED = ("memory", "streamed")
"""Sections in which others do not matter."""

# ------------------------------------------------------------------ the run


def agree(section: Record) -> bool:
    """Did all candidates of all runs find the same?"""
    return all(
        one.get("agree", True) and all(c["agree"] for c in one.get("checks", {}).values())
        for one in section["runs"].values()
    )


def measure(name: str, plan: Plan) -> Record:
    """One section with its date, its machine, and how quiet that was."""
    machine = spawn(describe_machine_of, plan.place, plan.proxy("all").size)
    command = shlex.join(["python", "-m", "validation.bench", *sys.argv[1:]])
    section: Record = {"date": today(), "command": command, "machine": machine}
    section["runs"] = SECTIONS[name](plan)
    timed = [one["times"] for one in section["runs"].values() if "times" in one]
    if name not in UNTIMED and timed:
        section["others"] = max(others_share(times, machine["cores"]) for times in timed)
    return section


def describe_machine_of(_folder: Path, _size: Size) -> Record:
    """In a fresh process, so that this one needs no libraries."""
    return describe_machine()


def read_results() -> Record:
    """What is known so far."""
    return json.loads(page.RESULTS.read_text()) if page.RESULTS.exists() else {}


def render() -> None:
    """README.md and the plots, from what is known; no plots without matplotlib."""
    results = read_results()
    page.README.write_text(page.page(page.README.read_text(), results))
    if "cost" in results:
        try:
            cost.draw(results["cost"])
        except RefcurvError as error:
            tell(f"cost.png is not drawn: {error}")


def keep(name: str, section: Record) -> None:
    """Into results.json and onto the page."""
    page.RESULTS.write_text(json.dumps(read_results() | {name: section}, indent=1) + "\n")
    render()


def run(plan: Plan, names: list[str]) -> bool:
    """Measure the sections, print each, keep it if it is worth it; are all of them?"""
    fine = True
    for name in names:
        section = measure(name, plan)
        heading, table = page.SECTIONS[name]
        print(f"\n## {heading}\n\n{page.stamp(section)}\n\n{table(section)}", flush=True)
        worth = agree(section) and page.is_quiet(section)
        fine &= worth or (plan.small and agree(section))
        if worth and not plan.small:
            keep(name, section)
        elif not worth:
            tell(f"{name} is not kept: " + ("not quiet" if agree(section) else "DISAGREEMENT"))
    return fine


def arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m validation.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", type=names_of(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each (default 5)")
    parser.add_argument("--threads", default=f"1,{cores}" if cores > 1 else "1",
                        help="core counts, ascending (default 1 and all: %(default)s)")  # fmt: skip
    parser.add_argument("--candidates", type=names_of(CANDIDATES), default=list(CANDIDATES),
                        help="refcurv and some others (default: all)")  # fmt: skip
    parser.add_argument("--size", choices=streamed.RUNS, default="200m",
                        help="of the section streamed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny models, and nothing is kept")
    parser.add_argument("--cost", action="store_true", help="measure the curves of cost.png alone")
    parser.add_argument("--render", action="store_true", help="write README.md, measure nothing")
    given = parser.parse_args()
    given.threads = tuple(sorted({int(n) for n in given.threads.split(",")}))
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not 1 <= given.threads[0] <= given.threads[-1] <= cores:
        parser.error(f"--threads must lie between 1 and the {cores} cores of this process")
    if "refcurv" not in given.candidates:
        parser.error("--candidates must name refcurv, to which the others are compared")
    return given


def names_of(known: dict[str, object]) -> Callable[[str], list[str]]:
    """A list of names, in their own order."""

    def parse(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(",")]
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return [name for name in known if name in asked]

    return parse


def require_machine(given: argparse.Namespace) -> None:
    """Stop before an hour of work that would be worth nothing."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    names = given.only or list(SECTIONS)
    need = DISK if set(names) - {"streamed"} else 0
    if "streamed" in names:
        need = max(need, streamed.RUNS[given.size].disk * 2**30)
    if free < need:
        raise SystemExit(
            f"{place} has {free / 2**30:.1f} GiB free; {need / 2**30:.0f} are needed. Set TMPDIR."
        )
    if set(names) <= set(UNTIMED):
        return
    if (busy := busy_now()) > BUSY:
        raise SystemExit(f"The machine is busy ({busy:.0%} of its cores): no ratio would count.")


def main() -> int:
    given = arguments()
    if given.render:
        render()
        return 0
    if not given.small:
        require_machine(given)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        asked = given.small, given.rounds, given.threads, given.candidates
        plan = Plan(*asked, Path(folder), streamed.RUNS[given.size])
        every = [name for name in SECTIONS if name != "cost"]
        fine = run(plan, ["cost"] if given.cost else given.only or every)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
