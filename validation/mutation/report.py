"""What the trials found: README.md's tables, from results.jsonl and equivalent.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import platform
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mutants import Mutant, code, every_mutant, find, targets, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
EQUIVALENT = HERE / "equivalent.toml"
README = HERE / "README.md"
BEGIN, END = "<!-- mutate: begin -->", "<!-- mutate: end -->"
COMMAND = "python validation/mutation/mutate.py"

Record = dict[str, Any]


def lines_of(place: Path) -> list[Record]:
    """The records of a file that may not be there yet."""
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def results(now: dict[str, str]) -> dict[str, Record]:
    """{mutant id: its last record} for these versions of the code."""
    records = lines_of(RESULTS)
    return {r["id"]: r for r in records if r["code"] == now.get(f"{r['path']}::{r['function']}")}


def stages_done(record: Record | None, tests: str, known: bool) -> int:
    """How many of the two stages need not be tried again.

    A killed mutant needs neither, and one that is `known` to be equivalent only the first. Another
    one needs the second, which asks all tests, whenever the tests have changed.
    """
    if record is None:
        return 0
    if record["outcome"] != "survived" or known:
        return 2
    return int(record["stage"]) if record["tests"] == tests else 1


def where(m: Mutant) -> str:
    """A mutant's place."""
    return f"{m.path}:{m.number} {m.function}: `{m.line}`"


# ------------------------------------------------------------------ equivalent mutants


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why some changes compute the same: in these functions, in this line or, without one, in any.

    Functions are named with their module.
    """

    functions: list[str]
    line: str | None
    change: str
    reason: str

    def of(self, m: Mutant) -> bool:
        """Is this mutant meant?"""
        if self.line is None:
            return m.name in self.functions and re.sub(r" \(\d+\)$", "", m.change) == self.change
        return m.name in self.functions and (self.line, self.change) == (m.line, m.change)


def explanations() -> list[Explanation]:
    """What equivalent.toml says."""
    text = EQUIVALENT.read_text() if EQUIVALENT.exists() else ""
    return [
        Explanation(
            entry["functions"], entry.get("line"), change, " ".join(entry["reason"].split())
        )
        for entry in tomllib.loads(text).get("equivalent", [])
        for change in entry["changes"]
    ]


def explained(every: Sequence[Mutant]) -> dict[str, str]:
    """{mutant id: why it is equivalent}."""
    known = explanations()
    return {m.id: e.reason for m in every for e in known if e.of(m)}


# ------------------------------------------------------------------ the judgement


@dataclass(frozen=True, slots=True)
class Findings:
    """Every mutant, its record by id, why those of equivalent.toml are equivalent, by id, versions.

    A mutant is open as long as a stage has to be tried.
    """

    every: list[Mutant]
    record: dict[str, Record]
    reason: dict[str, str]
    now: dict[str, str]

    def of(self, target: str) -> list[Mutant]:
        """One function's mutants."""
        return [m for m in self.every if m.target == target]

    def stage(self, m: Mutant) -> int:
        """How many stages it needs no more."""
        return stages_done(self.record.get(m.id), self.now["tests"], m.id in self.reason)

    def outcome(self, m: Mutant) -> str:
        """open, killed, timeout, equivalent or survived."""
        if self.stage(m) < 2:
            return "open"
        found = str(self.record[m.id]["outcome"])
        return "equivalent" if found == "survived" and m.id in self.reason else found

    def with_outcome(self, outcome: str) -> list[Mutant]:
        """The mutants that this came of."""
        return [m for m in self.every if self.outcome(m) == outcome]


def findings() -> Findings:
    """What is known of today's code."""
    every, now = every_mutant(ROOT), versions(ROOT)
    return Findings(every, results(now), explained(every), now)


def write_report() -> int:
    """Rewrite README.md's generated part; 0 if every mutant was killed or is explained."""
    f = findings()
    faults = [
        *(
            f"{EQUIVALENT.name} has what is no mutant: {e.functions}: {e.line}: {e.change}"
            for e in explanations()
            if not any(e.of(m) for m in f.every)
        ),
        *(f"survived: {where(m)}: {m.change}" for m in f.with_outcome("survived")),
        *(
            f"called equivalent, but {f.record[m.id]['by']} kills it: {where(m)}: {m.change}"
            for m in f.every
            if m.id in f.reason and f.outcome(m) not in ("equivalent", "open")
        ),
        *(
            f"survived while {f.record[m.id]['left_out']} tests were failing anyway: {where(m)}"
            for m in f.with_outcome("survived")
            if f.record[m.id]["left_out"]
        ),
    ]
    if left := f.with_outcome("open"):
        faults.append(f"{len(left)} are still to be tried, the first: {left[0]}")
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{tables(f)}\n\n{END}{after}")
    print("\n".join([*faults, f"{len(f.every)} mutants, {len(faults)} faults"]))
    return int(bool(faults))


# ------------------------------------------------------------------ the page


def tables(f: Findings) -> str:
    """The generated part: what it rests on, counts, equivalents, survivors, lines without."""
    libraries = ("refcurv", "numpy", "scipy", "numba", "pytest", "hypothesis")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    left = f.with_outcome("open")
    parts = [
        f"Made by `{COMMAND} && {COMMAND} --report`, {datetime.now(UTC):%Y-%m-%d}.  \n"
        f"python {platform.python_version()}, {used}; the tests `{f.now['tests']}`.",
    ]
    if left:
        once = sum(f.stage(m) == 1 for m in left)
        parts.append(
            f"**{len(left)} of {len(f.every)} mutants are open**: {len(left) - once} were not "
            f"tried on this code, {once} passed stage 1 and wait for stage 2."
        )
    parts += [
        counts(f),
        "## Equivalent mutants",
        listed([(m, f.reason[m.id]) for m in f.with_outcome("equivalent")], "reason"),
    ]
    if survivors := f.with_outcome("survived"):
        said = [(m, str(f.record[m.id]["asked"])) for m in survivors]
        parts += ["## Survivors", listed(said, "tests asked")]
    bare = [
        line
        for path, names in targets(ROOT).items()
        for name in names
        for line in bare_lines(f, path, name)
    ]
    parts += ["## Statements without a mutant", "\n".join(bare) or "None."]
    return "\n\n".join(parts)


def counts(f: Findings) -> str:
    """The table of counts, a line for each function."""
    rows = []
    for path, names in targets(ROOT).items():
        tree = ast.parse((ROOT / path).read_text())
        for name in names:
            body, target = code(find(tree, name)), f"{path}::{name}"
            mine = f.of(target)
            outcome = [f.outcome(m) for m in mine]
            killed = [f.record[m.id]["error"] for m in mine if f.outcome(m) == "killed"]
            asserted = sum(error in ("AssertionError", "Failed") for error in killed)
            timeout = outcome.count("timeout")
            lines = body[-1].end_lineno - body[0].lineno + 1
            numbers = (lines, len(mine), len(killed) + timeout, asserted, len(killed) - asserted)
            last = [outcome.count(what) for what in ("equivalent", "survived", "open")]
            key = f"`{f.now[target][:8]}`"
            rows.append((f"{Path(path).stem}.{name}", key, *numbers, timeout, *last))
    total = tuple(sum(column) for column in list(zip(*rows, strict=True))[2:])
    head = ("function", "code", "lines", "mutants", "killed", "by an assertion",
            "by an exception", "by time", "equivalent", "survivors", "open")  # fmt: skip
    rule = ("---", "---", *["---:"] * len(total))
    return markdown([head, rule, *rows, ("**all**", "", *total)])


def listed(some: list[tuple[Mutant, str]], last: str) -> str:
    """A table of mutants, with one more column."""
    if not some:
        return "None."
    rows = [(m.name, f"`{m.line}`", f"`{m.change}`", more) for m, more in some]
    return markdown([("function", "line", "change", last), ("---",) * 4, *rows])


def markdown(rows: list[tuple]) -> str:
    """A table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def bare_lines(f: Findings, path: str, function: str) -> list[str]:
    """The statements of a function that no operator changes."""
    source = (ROOT / path).read_text()
    changed, out = {m.number for m in f.of(f"{path}::{function}")}, []
    for top in code(find(ast.parse(source), function)):
        for node in ast.walk(top):
            if isinstance(node, ast.stmt) and not isinstance(node, ast.For | ast.If):
                if changed.isdisjoint(range(node.lineno, node.end_lineno + 1)):
                    line = source.splitlines()[node.lineno - 1].strip()
                    out.append(f"- {Path(path).stem}.{function}: `{line}`")
    return out
