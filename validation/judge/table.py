"""README.md's tables, from the records of `score`."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from validation.judge.models import GROUPS
from validation.judge.score import HERE, PAIRS, Record, counts

README = HERE / "README.md"
BEGIN, END = "<!-- score: begin -->", "<!-- score: end -->"

ALIKE: dict[frozenset[str], str] = {
    frozenset({"B1", "B43"}): "every batch may have had so many loss terms, or gradients were "
    "divided by so many accumulated batches",
    frozenset({"B1", "B46"}): "the same, of workers",
    frozenset(
        {"B1", "B3"}
    ): "where every sequence has as many loss terms, dividing by them is a mean "
    "over a batch of one sequence",
    frozenset({"B43", "B46"}): "G is divided by the square of a small integer; whether by "
    "accumulated batches or by workers is in no dump",
    frozenset({"B35", "B42"}): "an activation in place makes the hook see the gradient behind the "
    "activation, which is also what a hook in the wrong place sees",
    frozenset({"B20", "B49"}): "where the first position of every text is the only one before its "
    "labels, leaving out prompts and leaving out the start token leave out the same rows",
    frozenset({"B32", "B78"}): "A and G swapped, and their Kronecker product in the other order, "
    "are the same two matrices",
    frozenset({"B27", "B28"}): "without padding, every position and every real position are the "
    "same rows",
    frozenset({"B6", "B11"}): "the number of outputs may be a power of 4, as the square of a "
    "scale of mixed precision is",
    frozenset({"B6", "B43"}): "the number of outputs may be the square of how many batches were "
    "accumulated",
    frozenset({"B6", "B46"}): "the same, of workers",
    frozenset({"B7", "B37"}): "a head with one loss term for each image and blocks with as many as "
    "positions: both multiply G by the positions",
}
"""Ids that a dump may not tell apart, and why: one named for the other is exact where the judge
says so (`Cause.alike`)."""

WITHOUT_TRACE = {
    "B8": "a gauge, not a fault",
    "B13": "damped inverses only",
    "B70": "a tie may be cut either way",
    "B71": "a crash",
    "B72": "a cache",
    "B79": "a metric",
    "B80": "a metric",
    "B81": "documentation",
    "B82": "one n of a file beside another file's",
}

GITHUB = "https://github.com/"
REPORTS = [
    ("a factor of 2", "f-dangel/curvlinops/issues/82", "B5", "olmo2-padded"),
    ("swapped Kronecker order on a square layer", "f-dangel/curvlinops/issues/182", "B32",
     "olmo2-square"),
    ("division by stride²", "ikostrikov/pytorch-a2c-ppo-acktr-gail/issues/54", "B14_stride", "vit"),
    ("bfloat16 sums", "EleutherAI/bergson/pull/239", "B58", "olmo2-padded"),
    ("no column for the bias", "EleutherAI/bergson/issues/277", "B31_missing", "gpt2-joint"),
    ("unmasked padding", "EleutherAI/bergson/pull/123", "B28", "gpt2-prompts"),
    ("last position kept", "pomonam/kronfluence", "B27", "olmo2-padded"),
    ("gradient accumulation", "huggingface/transformers/issues/24725", "B43", "olmo2-equal"),
    ("hooks that fired twice under checkpointing", "pytorch/pytorch/issues/143573", "B39_counted",
     "olmo2-padded"),
    ("the same, counted once", "pytorch/pytorch/issues/81296", "B39_uncounted", "olmo2-padded"),
]  # fmt: skip
"""What was reported, where, the fault that re-enacts it, and on which model."""


def caught(record: Record) -> bool:
    """It did not pass."""
    return not record["passed"]


def planted(record: Record) -> set[str]:
    return {fault.split("_")[0] for fault in record["faults"]}


def exact(record: Record) -> bool:
    """All that was planted is named, and nothing else; but for what ALIKE lists.

    Another id counts for a planted one where the pair is in ALIKE and the judge names both.
    """
    named, alike = set(record["named"]), set(record["alike"])
    left = planted(record)

    def stands_for(name: str, id: str) -> bool:
        return name == id or (id in alike and frozenset({name, id}) in ALIKE)

    return (
        caught(record)
        and all(any(stands_for(name, id) for name in named) for id in left)
        and all(any(stands_for(name, id) for id in left) for name in named)
    )


def write(records: dict[str, Record], left_out: Mapping[str, int]) -> int:
    """Rewrite README.md's part between the marks; 0 if everything that counts is caught.

    left_out says how many records there are of which other code.
    """
    every = list(records.values())
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n\n{tables(every, left_out)}\n\n{END}{after}"
    README.write_text(text, encoding="utf-8")
    honest = [r for r in every if not r["faults"]]
    alarms = [r for r in honest if not r["passed"]]
    some = [r for r in every if r["faults"] and counts(r)]
    missed = [r for r in some if not caught(r)]
    print("\n".join([*(f"false alarm: {r['id']}" for r in alarms),
                     *(f"missed: {r['id']}" for r in missed)]))  # fmt: skip
    for group, mine in grouped(some):
        print(f"{group}: {len(mine)} that count, {sure(mine, caught)} caught, {sure(mine, exact)} "
              "named")  # fmt: skip
    print(f"{len(alarms)} false alarms of {len(honest)}")
    if left_out:
        print(without(left_out))
    return int(bool(alarms or missed))


def share(some: Sequence[Record], what: Any) -> str:
    """A share in words, or a dash."""
    return f"{sum(map(what, some)) / len(some):.1%}" if some else "–"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    half = z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (hits + z * z / 2 - half) / (n + z * z), (hits + z * z / 2 + half) / (n + z * z)


def sure(some: Sequence[Record], what: Any) -> str:
    """A share, and how sure it is."""
    if not some:
        return "–"
    low, high = wilson(sum(map(what, some)), len(some))
    return f"{share(some, what)} ({100 * low:.1f}–{100 * high:.1f})"


def grouped(some: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """(group, its records) of those that have some."""
    found = [(name.replace("-", " "), [r for r in some if r["setting"] in settings])
             for name, settings in GROUPS.items()]  # fmt: skip
    return [(name, mine) for name, mine in found if mine]


def without(left_out: Mapping[str, int]) -> str:
    """What is said of records of other code."""
    which = ", ".join(f"{n} of `{code}`" for code, n in left_out.items())
    return f"Not counted, for they are of other code: {which}."


def tables(every: list[Record], left_out: Mapping[str, int]) -> str:
    """The generated part."""
    from validation.judge.cases import EDITED, faults_of, singles

    libraries = ("numpy", "torch")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    version = every[0]["code"] if every else "none"
    one = [r for r in every if len(r["faults"]) == 1 and r["program"] != "editor"]
    edits = [r for r in every if r["program"] == "editor"]
    two = [r for r in every if len(r["faults"]) == 2]
    planned = len(list(singles())) + len(EDITED) * (1 + len(faults_of("editor")))
    planned += sum(PAIRS.values())
    parts = [
        f"{len(every)} dumps, of {planned} that there are, {datetime.now(UTC):%Y-%m-%d}, "
        f"python {platform.python_version()}, {used}; code `{version}`.",
        *([without(left_out)] if left_out else []),
        "### One fault",
        summary([r for r in one if counts(r)]),
        "### Honest programs",
        honest_table([r for r in every if not r["faults"]]),
        "### What was named, fault by fault",
        confusion(one, faults_of("torch") | faults_of("numpy")),
        "### Public reports, re-enacted",
        reports(one),
        "### Two faults",
        pair_table(two),
        "### Bases, corrections and edits",
        confusion([r for r in edits if r["faults"]], faults_of("editor")),
        "### Ids that a dump may not tell apart",
        markdown([("ids", "why"), ("---",) * 2,
                  *((" ".join(sorted(ids)), why) for ids, why in ALIKE.items())]),
        "### Ids without a trace",
        ", ".join(f"{id} ({why})" for id, why in WITHOUT_TRACE.items()) + ".",
    ]  # fmt: skip
    return "\n\n".join(parts)


def summary(some: list[Record]) -> str:
    """Shares by group of settings, dtype and labels, with their 95 % intervals."""
    rows = []
    for group, its in grouped(some):
        for dtype in ("float64", "float32", "bfloat16", ""):
            for labels in ("gold", "given", "own", "expected", ""):
                mine = [r for r in its if dtype in ("", r["dtype"])]
                mine = [r for r in mine if labels in ("", r["labels"])]
                if mine and (dtype or not labels):
                    rows.append((group, dtype or "**all**", labels or "**all**", len(mine),
                                 sure(mine, caught), sure(mine, exact)))  # fmt: skip
    head = ("models", "dtype", "labels", "faults that count", "caught", "named exactly")
    return markdown([head, ("---",) * 3 + ("---:",) * 3, *rows])


def honest_table(some: list[Record]) -> str:
    """False alarms by group of settings, program and dtype."""
    rows = []
    for group, its in grouped(some):
        for program, dtype in dict.fromkeys((r["program"], r["dtype"]) for r in its):
            mine = [r for r in its if (r["program"], r["dtype"]) == (program, dtype)]
            alarms = [r for r in mine if not r["passed"]]
            which = ", ".join(f"{r['setting']}/{r['labels']}" for r in alarms)
            rows.append((group, program, dtype, len(mine), len(alarms), which))
    head = ("models", "program", "dtype", "dumps", "false alarms", "which")
    return markdown([head, ("---",) * 3 + ("---:",) * 2 + ("---",), *rows])


def named(some: list[Record]) -> str:
    """What was named, the commonest first."""
    given = Counter(" ".join(r["named"]) or ("none" if caught(r) else "passed") for r in some)
    return ", ".join(f"{what} ×{n}" for what, n in given.most_common())


def confusion(some: list[Record], faults: dict[str, Any]) -> str:
    """For each planted fault how often each name was given: a confusion matrix without zeros."""
    rows = []
    for name, fault in faults.items():
        mine = [r for r in some if r["faults"] == [name]]
        counted = [r for r in mine if counts(r)]
        if not mine:
            continue
        names = named(counted)
        raised = sum("raised" in r for r in mine)
        names += f"; raised ×{raised}" if raised else ""
        shares = (share(counted, caught), share(counted, exact))
        rows.append((name, fault.what, f"{len(counted)}/{len(mine)}", *shares, names))
    head = ("fault", "what the program does", "count/planted", "caught", "exact", "named")
    return markdown([head, ("---", "---", "---:", "---:", "---:", "---"), *rows])


def reports(some: list[Record]) -> str:
    """The public reports: what was named, in float64 of gold labels and in the other cases."""
    rows = []
    for what, address, fault, setting in REPORTS:
        mine = [r for r in some if r["faults"] == [fault] and r["setting"] == setting]
        mine = [r for r in mine if counts(r)]
        names = named(mine)
        link = f"[{address.replace('/issues', '').replace('/pull', '')}]({GITHUB}{address})"
        rows.append((what, link, fault, setting, len(mine), share(mine, exact), names))
    head = ("what was reported", "where", "fault", "model", "dumps", "exact", "named")
    return markdown([head, ("---",) * 4 + ("---:",) * 2 + ("---",), *rows])


def pair_table(some: list[Record]) -> str:
    """The pairs: how many are caught, and named both."""
    rows = [(f"**{group}**", "", sure(mine, caught), sure(mine, exact), "")
            for group, mine in grouped(some)]  # fmt: skip
    for r in some:
        where = f"{r['setting']}/{r['labels']}/{r['dtype']}"
        rows.append((" + ".join(r["faults"]), where, *("yes" if f(r) else "no" for f in
                     (caught, exact)), " ".join(r["named"]) or "none"))  # fmt: skip
    head = ("faults", "model", "caught", "both named", "named")
    return markdown([head, ("---",) * 5, *rows])


def markdown(rows: list[tuple[Any, ...]]) -> str:
    """A table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
