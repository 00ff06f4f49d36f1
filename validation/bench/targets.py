"""What was to be reached, what has been measured, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from validation.bench.candidates import OFFICIAL, OURS, SHIPPED
from validation.bench.measuring import MIB, Record
from validation.bench.proxies import PROXIES

Found = tuple[float, bool] | None
"""A number, and whether it is measured rather than extrapolated; None if there is neither."""


@dataclass(frozen=True, slots=True)
class Target:
    """A number to be reached: before the work, as hoped for, and the least that is acceptable.

    Fields: less, whether smaller is better; unit; measured, finds it among the results.
    """

    what: str
    before: float | None
    goal: float | None
    least: float
    measured: Callable[[Record], Found]
    unit: str = "x"
    less: bool = False

    def verdict(self, found: Found) -> str:
        """Is the goal met, or the least that is acceptable?"""
        if found is None:
            return "not measured"
        value, sure = found
        sign = -1 if self.less else 1
        if self.goal is not None and sign * value >= sign * self.goal:
            said = "goal met"
        else:
            said = "least met" if sign * value >= sign * self.least else "**missed**"
        return said if sure else f"{said}, extrapolated"


# ------------------------------------------------------------------ numbers among the results


def run_of(results: Record, section: str, run: str) -> Any:
    """What a section has under a name, or None."""
    return results.get(section, {}).get("runs", {}).get(run)


def seconds(results: Record, run: str, name: str) -> float | None:
    """The median of a candidate's passes."""
    passes = (run_of(results, "time", run) or {}).get("times", {}).get(name)
    return median(one["seconds"] for one in passes) if passes else None


def ratio(run: str, name: str) -> Callable[[Record], Found]:
    """The peer's time over ours."""

    def measured(results: Record) -> Found:
        theirs, ours = seconds(results, run, name), seconds(results, run, OURS)
        return (theirs / ours, True) if theirs and ours else None

    return measured


def floor_share(cores: int) -> Callable[[Record], Found]:
    """The time of the needed products alone, as a share of the whole; the median of the rounds."""

    def measured(results: Record) -> Found:
        run = run_of(results, "products", f"all {cores}")
        if not run:
            return None
        rounds = zip(run["floor"], run["times"][OURS], strict=True)
        shares = [max(p["seconds"] for p in floor) / whole["seconds"] for floor, whole in rounds]
        return median(shares), True

    return measured


ON_ONE_CORE = "on one core"
"""Our passes on one core over the corpus of several, in the section of the products."""


def scaling(cores: int) -> Callable[[Record], Found]:
    """Our speed on so many cores over that on one, beside the same of independent processes.

    Both of the same corpus; the median of the rounds. Not measured on so many: each further core
    costs the share of time that it costs where most cores were measured.
    """

    def measured(results: Record) -> Found:
        runs = results.get("products", {}).get("runs", {})
        shares = {int(name.split()[1]): _scaled(runs["all 1"], run)
                  for name, run in runs.items() if name != "all 1"}  # fmt: skip
        if cores in shares:
            return shares[cores], True
        if not shares or cores < max(shares):
            return None
        most = max(shares)
        lost = max(1 / shares[most] - 1, 0.0) / (most - 1)
        return 1 / (1 + lost * (cores - 1)), False

    return measured


def _scaled(one: Record, many: Record) -> float:
    """Of some cores: speed over that of one core, over the same of sgemm."""
    return median(
        alone["seconds"] / whole["seconds"]
        / (sum(p["gflops"] for p in apart) / single[0]["gflops"])
        for alone, single, whole, apart in zip(
            many["times"][ON_ONE_CORE], one["sgemm"], many["times"][OURS], many["sgemm"],
            strict=True,
        )
    )  # fmt: skip


def peaks(results: Record, name: str) -> dict[int, float]:
    """A candidate's peak in MiB, by cores."""
    runs = results.get("memory", {}).get("runs", {})
    found = {int(run.split()[1]): one["times"] for run, one in runs.items() if run[:4] == "all "}
    return {
        n: max(one["peak"] for one in times[name]) for n, times in found.items() if name in times
    }


def further_core(results: Record) -> Found:
    """MB that each core beyond the first adds to our peak."""
    ours = peaks(results, OURS)
    if len(ours) < 2 or 1 not in ours:
        return None
    most = max(ours)
    return (ours[most] - ours[1]) / (most - 1) * MIB / 1e6, True


def peak_share(cores: int) -> Callable[[Record], Found]:
    """Our peak over the official one pass's; beyond what was measured, with as much per core."""

    def measured(results: Record) -> Found:
        ours, theirs, more = peaks(results, OURS), peaks(results, OFFICIAL), further_core(results)
        if not theirs or 1 not in ours:
            return None
        if cores in ours and cores in theirs:
            return ours[cores] / theirs[cores], True
        if more is None:
            return None
        return (ours[1] + more[0] * 1e6 / MIB * (cores - 1)) / theirs[max(theirs)], False

    return measured


def part(section: str, peer: str) -> Callable[[Record], Found]:
    """The peer's time over ours, of a part that is measured by itself."""

    def measured(results: Record) -> Found:
        times = (run_of(results, section, section) or {}).get("times")
        if not times:
            return None
        theirs, ours = (median(one["seconds"] for one in times[n]) for n in (peer, OURS))
        return theirs / ours, True

    return measured


def cut_milliseconds(results: Record) -> Found:
    """Of our cut."""
    times = (run_of(results, "selection", "selection") or {}).get("times")
    return (1e3 * median(one["seconds"] for one in times[OURS]), True) if times else None


def streamed(model: str) -> Callable[[Record], Found]:
    """GB at most, of a run whose layers are streamed, if the section `streamed` was recorded."""

    def measured(results: Record) -> Found:
        run = run_of(results, "streamed", model)
        return (run["peak"] * MIB / 1e9, True) if run else None

    return measured


# ------------------------------------------------------------------ the list

TARGETS = (
    Target("official as shipped: all layers", 8.6, 11, 9.5, ratio("all 1", SHIPPED)),
    Target("official one pass: all layers", 1.40, 1.7, 1.6, ratio("all 1", OFFICIAL)),
    Target("official one pass: two upper layers", 1.72, 2.2, 2.0, ratio("upper 1", OFFICIAL)),
    Target("official one pass: mid", None, 3.2, 2.8, ratio("mid 1", OFFICIAL)),
    Target("curvlinops MC: all layers", 1.32, 1.6, 1.45, ratio("all 1", "curvlinops")),
    Target("curvlinops MC: two upper layers", 1.10, 1.45, 1.3, ratio("upper 1", "curvlinops")),
    Target("curvlinops MC: mid", None, 1.75, 1.6, ratio("mid 1", "curvlinops")),
    Target("kronfluence covariances: all layers", 1.33, 1.6, 1.5, ratio("all 1", "kronfluence")),
    Target("kronfluence covariances: mid", None, 2.0, 1.8, ratio("mid 1", "kronfluence")),
    Target("products alone, of the whole, 1 core", 0.69, 0.88, 0.82, floor_share(1), ""),
    Target("products alone, of the whole, 2 cores", None, 0.88, 0.82, floor_share(2), ""),
    Target("2 cores, of 2 sgemm processes", 0.93, 0.97, 0.95, scaling(2), ""),
    Target("16 cores, of 16 sgemm processes", 0.5, 0.9, 0.8, scaling(16), ""),
    Target("memory per further core", 1000, 190, 250, further_core, "MB", less=True),
    Target("peak of official one pass, 1 core", 0.64, 0.45, 0.55, peak_share(1), "", less=True),
    Target("peak of official one pass, 16 cores", 4.8, 1.2, 1.5, peak_share(16), "", less=True),
    Target("label drawing and cross-entropy", 4, 8, 5, part("drawing", "PyTorch")),
    Target("selection, 4096 x 11008, ρ = 0.9", 5, None, 10, cut_milliseconds, "ms", less=True),
    Target("decompose, 12 blocks", None, 1.0, 0.85, part("decompose", "torch.linalg.eigh")),
    Target("1B OLMo-2, all layers, streamed", None, 3, 4, streamed("1B"), "GB", less=True),
    Target("7B OLMo-2, layers 23-25, streamed", None, 5, 8, streamed("7B"), "GB", less=True),
)
"""x: the peer's time over ours. Before: as measured at commit c93c6da, 2026-11-27."""
assert {"all", "upper", "mid"} <= set(PROXIES)


def rows(results: Record) -> list[tuple[str, ...]]:
    """What, before, measured, goal, least, verdict."""

    def shown(value: float | None, unit: str) -> str:
        number = "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return f"{number} {unit if value is not None else ''}".rstrip()

    lines = []
    for one in TARGETS:
        found = one.measured(results)
        now = shown(found[0] if found else None, one.unit)
        numbers = (one.before, one.goal, one.least)
        before, goal, least = (shown(value, one.unit) for value in numbers)
        lines.append((one.what, before, now, goal, least, one.verdict(found)))
    return lines
