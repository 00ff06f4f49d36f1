"""The tables of README.md, from results.json; nothing else is needed for them.

Where the machine was not quiet, there are no ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from validation.bench import cost, shares, targets
from validation.bench.candidates import CANDIDATES, OURS
from validation.bench.measuring import BUSY, Record, facts
from validation.bench.proxies import PROXIES

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results.json"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NO_RATIO = "no ratio"
Line = Sequence[str]


def table(head: Line, lines: Iterable[Line]) -> str:
    """In Markdown, aligned for the eye; the first column is text."""
    cells = [head, *lines]
    wide = [max(len(line[i]) for line in cells) for i in range(len(head))]

    def line(one: Line) -> str:
        padded = (
            x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(one, wide, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2 - (i > 0)) + ":" * (i > 0) for i, w in enumerate(wide))
    return "\n".join([line(head), f"|{rule}|", *map(line, cells[1:])])


def is_quiet(section: Record) -> bool:
    """Did others leave the machine alone? Where no time is taken it does not matter."""
    return bool(section.get("others", 0.0) < BUSY)


def ratio(theirs: Sequence[Record], ours: Sequence[Record], key: str = "seconds") -> str:
    """The ratio of the medians; in brackets the least and the largest of a round."""
    middle = median(one[key] for one in theirs) / median(one[key] for one in ours)
    each = [a[key] / b[key] for a, b in zip(theirs, ours, strict=False)]
    return f"{middle:.2f} ({min(each):.2f}–{max(each):.2f})" if len(each) > 1 else f"{middle:.2f}"


# ------------------------------------------------------------------ one section each


def stamp(section: Record) -> str:
    """When, by what, and how quiet it was."""
    cores = section["machine"]["cores"]
    if "others" not in section:
        return f"{section['date']}, `{section['command']}`."
    said = f"other processes used at most {section['others']:.1%} of the {cores} cores"
    noise = said if is_quiet(section) else f"NOT QUIET, so that there are no ratios: {said}"
    return f"{section['date']}, `{section['command']}`; {noise}."


def title(run: str) -> str:
    """Of a run, "all 2"."""
    name, _, cores = run.partition(" ")
    return f"{PROXIES[name].what}, {cores} core{'s' if cores != '1' else ''}"


def times(section: Record) -> str:
    """Every candidate in every run."""
    head = ("seconds, and peer ÷ refcurv (least–largest round)", *map(title, section["runs"]))
    lines = [
        (name, *(_time(one, name, is_quiet(section)) for one in section["runs"].values()))
        for name in CANDIDATES
    ]
    return table(head, lines) + "\n\n" + agreement(section)


def _time(run: Record, name: str, quiet: bool) -> str:
    if name in run["missing"]:
        return "not installed"
    if "times" not in run:
        return "DISAGREES" if name != OURS and not run["checks"][name]["agree"] else "–"
    if name not in run["times"]:
        return "–"
    passes = run["times"][name]
    said = f"{median(one['seconds'] for one in passes):.2f} s"
    if name == OURS:
        return said
    return f"{said}, {ratio(passes, run['times'][OURS]) if quiet else NO_RATIO}"


def agreement(section: Record) -> str:
    """What the checks found, a sentence for each run."""
    lines = []
    for run, one in section["runs"].items():
        checks = one["checks"]
        if not checks:
            continue
        worst = {s: max((c["worst"][s][1], name) for name, c in checks.items()) for s in "AG"}
        limit = min(c["limit"] for c in checks.values())
        wrong = [name for name, c in checks.items() if not c["agree"]]
        lines.append(
            f"Same labels, {title(run)}: "
            + ", ".join(f"{s} differs by at most {d:.1e} ({n})" for s, (d, n) in worst.items())
            + f"; limit {limit:.1e}: "
            + (f"DISAGREE: {', '.join(wrong)}." if wrong else f"all {len(checks)} agree.")
        )
    return "  \n".join(lines)


def memory(section: Record) -> str:
    """Peaks of fresh processes."""
    head = ["peak MiB (above the loaded model), and peer ÷ refcurv"]
    head += [title(run) for run in section["runs"]]

    def cell(times: Mapping[str, Sequence[Record]], name: str) -> str:
        if name not in times:
            return "–"
        most = max(times[name], key=lambda one: one["peak"])
        said = f"{most['peak']:.0f} ({most['peak'] - most['base']:.0f})"
        return said if name == OURS else f"{said}, {ratio(times[name], times[OURS], 'peak')}"

    runs = section["runs"].values()
    return table(head, [(name, *(cell(one["times"], name) for one in runs)) for name in CANDIDATES])


def products(section: Record) -> str:
    """The floor, what it is of, and independent products; medians of the rounds."""
    head = ("", *map(title, section["runs"]))
    runs = list(section["runs"].values())

    def of(key: str, one: Callable[[Record], float]) -> list[float]:
        return [median(map(one, run[key])) for run in runs]

    floors = of("floor", lambda cores: max(p["seconds"] for p in cores))
    rates = of("floor", lambda cores: min(p["gflops"] for p in cores))
    gemms = of("sgemm", lambda cores: sum(p["gflops"] for p in cores))
    wholes = [median(one["seconds"] for one in run["times"][OURS]) for run in runs]
    lines = [
        ("needed products alone, seconds", *(f"{x:.2f}" for x in floors)),
        ("the whole collection, seconds", *(f"{x:.2f}" for x in wholes)),
        ("the same corpus on one core, seconds", *map(_on_one_core, runs)),
        ("GFLOP/s of the products on each core", *(f"{x:.0f}" for x in rates)),
        ("sgemm GFLOP/s, a process on each core, together", *(f"{x:.0f}" for x in gemms)),
    ]
    return table(head, lines)


def _on_one_core(run: Record) -> str:
    passes = run["times"].get(targets.ON_ONE_CORE)
    return f"{median(one['seconds'] for one in passes):.2f}" if passes else ""


def part(section: Record) -> str:
    """A part that is measured by itself."""
    (run,) = section["runs"].values()
    times = run["times"]
    lines = []
    for name, passes in times.items():
        milli = f"{1e3 * median(one['seconds'] for one in passes):.4g} ms"
        told = ratio(passes, times[OURS]) if is_quiet(section) else NO_RATIO
        lines.append((name, milli, "" if name == OURS else told))
    more = "the same results" if run["agree"] else "DIFFERENT RESULTS"
    return table(("", "median", "÷ refcurv"), lines) + f"\n\nBoth found {more}."


def profile(section: Record) -> str:
    """Shares of a collection's time, before and after."""
    runs = section["runs"]
    head = ["share of the time"]
    for run, one in runs.items():
        seconds = median(each["seconds"] for each in one["times"][OURS])
        head += [f"{title(run)}, before", f"now, of {seconds:.2f} s"]
    names = [name for name, _ in shares.RULES] + [shares.REST]
    lines = []
    for name in names:
        line = [name]
        for run, one in runs.items():
            before = shares.BEFORE.get(run.split()[0], {}).get(name)
            line += ["" if before is None else f"{before:.1%}", f"{one['shares'].get(name, 0):.1%}"]
        lines.append(line)
    return table(head, lines)


def phases(section: Record) -> str:
    """From a checkpoint to an edited weights file."""
    head = ("phase", "seconds", "system seconds", "peak MiB", "above base")
    lines = [
        (name, f"{one['seconds']:.2f}", f"{one['system']:.2f}", f"{one['peak']:.0f}",
         f"{one['peak'] - one['base']:.0f}")
        for run in section["runs"].values() for name, (one,) in run["times"].items()
    ]  # fmt: skip
    return table(head, lines)


def streamed(section: Record) -> str:
    """Commands under a figure, each in a fresh process; seconds of a machine that others used."""
    head = ("run", "figure", "command", "seconds", "processor seconds", "peak MiB")
    lines = [
        (f"{name}, {run['layers']}, {run['tokens']:,} tokens", run["memory"], phase,
         f"{one['seconds']:.1f}", f"{one['user'] + one['system']:.1f}", f"{one['peak']:.0f}")
        for name, run in section["runs"].items() for phase, (one,) in run["times"].items()
    ]  # fmt: skip
    return table(head, lines)


def costs(section: Record) -> str:
    """Seconds along each curve, and the plot."""
    curves = list(dict.fromkeys(run.split()[0] for run in section["runs"]))
    lines = []
    for run, one in section["runs"].items():
        cells = [f"{median(x['seconds'] for x in one['times'][n]):.3g}" if n in one["times"] else ""
                 for n in cost.NAMES]  # fmt: skip
        lines.append((run, *cells))
    plot = f"![seconds against {', '.join(curves)}](cost.png)"
    return f"{plot}\n\n{table(('seconds', *cost.NAMES), lines)}"


SECTIONS = {
    "time": ("Time", times),
    "memory": ("Memory", memory),
    "products": ("The floor", products),
    "drawing": ("Label drawing and cross-entropy", part),
    "selection": ("Selection", part),
    "decompose": ("Eigenbases of 12 blocks", part),
    "profile": ("Where the time goes, one core", profile),
    "pipeline": ("The 100 M model, from a checkpoint to an edited file", phases),
    "streamed": ("A model that memory need not hold", streamed),
    "cost": ("Cost against tokens, depth, width, vocabulary and cores", costs),
}


def block(results: Record) -> str:
    """All that is generated."""
    head = ("against, or of", "before", "measured", "goal", "least", "")
    parts = ["## Targets", table(head, targets.rows(results))]
    machines: dict[str, list[str]] = {}
    for name, (heading, render) in SECTIONS.items():
        if name in results:
            parts += [f"## {heading}", stamp(results[name]), render(results[name])]
            machines.setdefault(facts(results[name]["machine"]), []).append(name)
    parts.append("## Machine" if machines else "Nothing is measured yet.")
    parts += [f"Of {', '.join(names)}: {machine}" for machine, names in machines.items()]
    return "\n\n".join(parts)


def page(text: str, results: Record) -> str:
    """README.md with the generated block in place."""
    return with_block(README, text, BEGIN, END, block(results))


def with_block(path: Path, text: str, begin: str, end: str, new: str) -> str:
    """The text of a page with what stands between two markers replaced."""
    before, found, rest = text.partition(begin)
    _old, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path}: the markers {begin} and {end} are missing.")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"
