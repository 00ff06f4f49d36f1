"""What the trials found: README.md's tables, from results.jsonl and equivalent.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import platform
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mutants import Mutant, code, every_mutant, find, identity, targets, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
EQUIVALENT = HERE / "equivalent.toml"
README = HERE / "README.md"
BEGIN, END = "<!-- mutate: begin -->", "<!-- mutate: end -->"
COMMAND = "python validation/mutation/mutate.py"

Record = dict[str, Any]


def results(now: dict[str, str]) -> dict[str, Record]:
    """{mutant id: its last record} for these versions of the code."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["id"]: r for r in records if r["code"] == now.get(r["path"])}


def stages_done(record: Record | None, tests: str, known: bool) -> int:
    """How many of the two stages need not be tried again.

    A killed mutant needs neither; a survivor of other tests needs both, unless it is `known` to be
    equivalent.
    """
    if record is None:
        return 0
    if record["outcome"] != "survived":
        return 2
    return int(record["stage"]) if known or record["tests"] == tests else 0


def where(m: Mutant) -> str:
    """A mutant's place."""
    return f"{m.path}:{m.number} {m.function}: `{m.line}`"


# ------------------------------------------------------------------ the judgement


@dataclass(frozen=True, slots=True)
class Findings:
    """Every mutant, its record by id, and why those of equivalent.toml are equivalent, by id."""

    every: list[Mutant]
    record: dict[str, Record]
    reason: dict[str, str]

    def of(self, path: str, function: str) -> list[Mutant]:
        """One function's mutants."""
        return [m for m in self.every if (m.path, m.function) == (path, function)]

    def survived(self, m: Mutant) -> bool:
        """Did no test fail?"""
        return bool(self.record[m.id]["outcome"] == "survived")


def entries() -> list[tuple[str, str, str, str]]:
    """(function, line, change, reason) of equivalent.toml."""
    text = EQUIVALENT.read_text() if EQUIVALENT.exists() else ""
    return [
        (entry["function"], entry["line"], change, " ".join(entry["reason"].split()))
        for entry in tomllib.loads(text).get("equivalent", [])
        for change in entry["changes"]
    ]


def explained() -> dict[str, str]:
    """{mutant id: why it is equivalent}."""
    return {identity(*which): reason for *which, reason in entries()}


def write_report() -> int:
    """Rewrite README.md's generated part; 0 if every mutant was killed or is explained."""
    every, now = every_mutant(ROOT), versions(ROOT)
    f = Findings(every, results(now), explained())
    if missing := [m for m in every if m.id not in f.record]:
        raise SystemExit(f"{len(missing)} mutants were not tried, the first: {missing[0]}")
    faults = [
        *(
            f"{EQUIVALENT.name} has what is no mutant: {which}"
            for *which, _ in entries()
            if identity(*which) not in {m.id for m in every}
        ),
        *(f"survived: {where(m)}: {m.change}" for m in unexplained(f)),
        *(
            f"called equivalent, but {f.record[m.id]['by']} kills it: {where(m)}: {m.change}"
            for m in every
            if m.id in f.reason and not f.survived(m)
        ),
        *(
            f"survived other or fewer tests than there are, try it again: {where(m)}: {m.change}"
            for m in every
            if stages_done(f.record[m.id], now["tests"], m.id in f.reason) < 2
        ),
        *(
            f"survived while {f.record[m.id]['left_out']} tests were failing anyway: {where(m)}"
            for m in every
            if f.survived(m) and f.record[m.id]["left_out"]
        ),
    ]
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{tables(f, now)}\n\n{END}{after}")
    print("\n".join([*faults, f"{len(every)} mutants, {len(faults)} faults"]))
    return int(bool(faults))


def unexplained(f: Findings) -> list[Mutant]:
    """The survivors that equivalent.toml does not list."""
    return [m for m in f.every if f.survived(m) and m.id not in f.reason]


# ------------------------------------------------------------------ the page


def tables(f: Findings, now: dict[str, str]) -> str:
    """The generated part: what it rests on, counts, equivalents, survivors, lines without."""
    libraries = ("refcurv", "numpy", "scipy", "numba", "pytest", "hypothesis")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    minutes = sum(f.record[m.id]["seconds"] for m in f.every) / 60
    parts = [
        f"Made by `{COMMAND} && {COMMAND} --report`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{minutes:.0f} minutes of trials.  \npython {platform.python_version()}, {used}.  \n"
        "SHA-256 of the code: " + ", ".join(f"{name} `{v}`" for name, v in now.items()) + ".",
        counts(f),
        "## Equivalent mutants",
        listed([(m, f.reason[m.id]) for m in f.every if m.id in f.reason], "reason"),
    ]
    if left := unexplained(f):
        parts += ["## Survivors", listed([(m, "") for m in left], "")]
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
            body, mine = code(find(tree, name)), f.of(path, name)
            outcome = [(f.record[m.id]["outcome"], f.record[m.id]["error"]) for m in mine]
            killed = [error for what, error in outcome if what == "killed"]
            asserted = sum(error in ("AssertionError", "Failed") for error in killed)
            timeout = outcome.count(("timeout", "SIGALRM"))
            equivalent = sum(f.survived(m) and m.id in f.reason for m in mine)
            lines = body[-1].end_lineno - body[0].lineno + 1
            numbers = (lines, len(mine), len(killed) + timeout, asserted, len(killed) - asserted)
            left = len(mine) - numbers[2] - equivalent
            rows.append((f"{Path(path).stem}.{name}", *numbers, timeout, equivalent, left))
    total = tuple(sum(column) for column in list(zip(*rows, strict=True))[1:])
    head = ("function", "lines", "mutants", "killed", "by an assertion", "by an exception",
            "by time", "equivalent", "survivors")  # fmt: skip
    return markdown([head, ("---", *["---:"] * len(total)), *rows, ("**all**", *total)])


def listed(some: list[tuple[Mutant, str]], last: str) -> str:
    """A table of mutants, with one more column."""
    if not some:
        return "None."
    rows = [(f"{Path(m.path).stem}.{m.function}", f"`{m.line}`", f"`{m.change}`", more)
            for m, more in some]  # fmt: skip
    return markdown([("function", "line", "change", last), ("---",) * 4, *rows])


def markdown(rows: list[tuple]) -> str:
    """A table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def bare_lines(f: Findings, path: str, function: str) -> list[str]:
    """The statements of a function that no operator changes."""
    source = (ROOT / path).read_text()
    changed, out = {m.number for m in f.of(path, function)}, []
    for top in code(find(ast.parse(source), function)):
        for node in ast.walk(top):
            if isinstance(node, ast.stmt) and not isinstance(node, ast.For | ast.If):
                if changed.isdisjoint(range(node.lineno, node.end_lineno + 1)):
                    line = source.splitlines()[node.lineno - 1].strip()
                    out.append(f"- {Path(path).stem}.{function}: `{line}`")
    return out
