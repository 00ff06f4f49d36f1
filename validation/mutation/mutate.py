"""Mutation testing of the hand-written backward: does the suite notice every wrong step?

Each mutant of `mutants.py` is tried by the tests that execute its function, until one fails: first
by the quick ones of a few files (stage 1), then, if it is left, by all of all files (stage 2). What
the tests execute is found by running each once without a mutant.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from mutants import every_mutant, targets, versions
from report import (
    COMMAND,
    HERE,
    RESULTS,
    ROOT,
    Record,
    explained,
    lines_of,
    results,
    stages_done,
    where,
    write_report,
)
from tqdm import tqdm
from trials import attempt, collect, left_out, tests_of, watch

EXAMPLES = f"""examples:
  {COMMAND} --list --function softmax_over       what would be tried
  {COMMAND} --function rotate                    try one function
  {COMMAND} --jobs 2                             try everything that has no result yet
  {COMMAND} --report                             write README.md; status 1: unexplained survivors

A run that is killed goes on where it stopped. When a function's code changes, its results are void;
a survivor is tried again when the tests have changed, a killed mutant is not.
"""

FIRST = ["layers", "loss", "transformer", "identities", "definition", "selection", "fisher"]
QUICK = 1.0
"""The files of stage 1, and the seconds of CPU that a test of it may take."""
LEFT_OUT = {
    "needs PyTorch": ["peers"],
    "runs whole commands": ["audit", "cli", "demo", "kills", "report", "validate_cli"],
    "is about other programs' numbers, which refcurv made": [
        "cases", "conversion", "diagnose", "foreign", "injected", "judge", "mistaken", "variants",
        "verdict_page",
    ],
    "is about sources and documents": ["architecture", "law", "method", "readme", "traceability"],
    "is about settings, files, names, texts, spectra or scores": [
        "config", "disk", "eigenbasis", "families", "huggingface", "ids", "json_lines",
        "matrix_free", "metrics", "naming", "parallel", "published_configs", "staircase", "store",
        "svd", "texts", "tokenizer", "tolerance", "weights",
    ],
}  # fmt: skip
"""What stage 2 leaves out: why, and how the names of the files begin."""

EXECUTED = HERE / "executed.jsonl"
"""What each test executes: a line for each file of tests/."""

# ------------------------------------------------------------------ all trials


def test_files() -> dict[int, list[str]]:
    """The test files of each stage."""
    left_out = tuple(f"test_{name}" for names in LEFT_OUT.values() for name in names)
    every = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    chosen = {1: [f"test_{name}.py" for name in FIRST]}
    chosen[2] = [name for name in every if not name.startswith(left_out)]
    return {stage: [f"tests/{name}" for name in names] for stage, names in chosen.items()}


def executed(files: list[str], jobs: int) -> list[Record]:
    """What the tests of these files execute; files that have changed are run for it."""
    digest = {file: digest_of(file) for file in files}
    found = {r["file"]: r for r in lines_of(EXECUTED) if r["digest"] == digest.get(r["file"])}
    missing = [file for file in files if file not in found]
    for record in spread("what tests execute", jobs, missing, missing, watch):
        found[record["file"]] = record | {"digest": digest[record["file"]]}
        keep(EXECUTED, found[record["file"]])
        if record["ended"]:
            tell(f"left out, ended by {record['ended']}: {record['file']}")
        for test in record["tests"]:
            if test["error"]:
                tell(f"left out, fails without a mutant: {test['test']}: {test['error']}")
    return [found[file] for file in files]


def digest_of(file: str) -> str:
    """SHA-256 of a test file, of the helpers of all, and of the names of the targets."""
    helpers = sorted(p for p in (ROOT / "tests").glob("*.py") if not p.name.startswith("test_"))
    texts = [path.read_text() for path in (ROOT / file, *helpers)]
    return sha256("\n".join([*texts, str(targets(ROOT))]).encode()).hexdigest()[:16]


def try_all(only: Sequence[str], jobs: int) -> None:
    """Try what has no result yet, and the survivors of other tests; results go to a file."""
    every, now = every_mutant(ROOT, only), versions(ROOT)
    found, reasons = results(now), explained(every)
    done = {m.id: stages_done(found.get(m.id), now["tests"], m.id in reasons) for m in every}
    tell(f"{len(every)} mutants; {sum(n == 2 for n in done.values())} have a result")
    for stage, files in test_files().items():
        todo = [m for m in every if done[m.id] == stage - 1]
        if not todo:
            continue
        seen = executed(files, jobs)
        tests = {name: tests_of(seen, name) for name in {m.target for m in todo}}
        if stage == 1:
            tests = {t: [one for one in tests[t] if one["seconds"] < QUICK] for t in tests}
        asked = sorted({one["test"].partition("::")[0] for t in tests.values() for one in t})
        todo.sort(key=lambda m: sum(one["seconds"] for one in tests[m.target]))
        for record in spread(f"stage {stage}", jobs, asked, todo, partial(_trial, tests)):
            target = f"{record['path']}::{record['function']}"
            record |= {"stage": stage, "left_out": left_out(seen, target)}
            record |= {"code": now[target], "tests": now["tests"]}
            keep(RESULTS, record)
            done[record["id"]] = stages_done(record, now["tests"], record["id"] in reasons)


def _trial(tests: dict[str, list[Record]], suite: Any, mutant: Any, answer: Path) -> Record:
    return attempt(suite, mutant, tests[mutant.target], answer)


def keep(place: Path, record: Record) -> None:
    """One more line."""
    with place.open("a") as out:
        out.write(json.dumps(record, ensure_ascii=False) + "\n")


def tell(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ several processes

Do = Callable[[Any, Any, Path], Record]
"""What is done with each task: (the collected tests, the task, a file for its answer) → record."""


def spread(title: str, jobs: int, files: list[str], tasks: list, do: Do) -> Iterator[Record]:
    """The record of each task, as they come, from processes that collect the files' tests."""
    if not tasks:
        return
    reader, writer = os.pipe()
    lock, counts = multiprocessing.Lock(), {"killed": 0, "timeout": 0, "survived": 0}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        places = [Path(folder) / str(n) for n in range(min(jobs, len(tasks)))]
        workers = [
            _worker(place, files, tasks[n :: len(places)], do, partial(_send, lock, writer))
            for n, place in enumerate(places)
        ]
        os.close(writer)
        with os.fdopen(reader) as lines, tqdm(total=len(tasks), desc=title) as bar:
            for record in map(json.loads, lines):
                yield record
                if "outcome" in record:
                    counts[record["outcome"]] += 1
                    bar.set_postfix(counts)
                bar.update()
        for pid, place in zip(workers, places, strict=True):
            if os.waitpid(pid, 0)[1]:
                said = place.with_suffix(".log").read_text()[-9000:]
                raise SystemExit(f"a worker failed; what was found is kept:\n{said}")


def _worker(place: Path, files: list[str], tasks: list, do: Do, send: Callable) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        answer = place.with_suffix(".json")
        log = place.with_suffix(".log")
        collect(log, files, lambda suite: [send(do(suite, task, answer)) for task in tasks])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _send(lock: Any, writer: int, record: Record) -> None:
    """A whole line, between those of the other processes."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with lock:
        while line:
            line = line[os.write(writer, line) :]


# ------------------------------------------------------------------ the command


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mutate.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--report", action="store_true", help="write README.md, run nothing")
    parser.add_argument(
        "--function", action="append", default=[], metavar="NAME", help="only this; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error("--jobs must be at least 1")
    if given.report:
        return write_report()
    if given.list:
        every = every_mutant(ROOT, given.function)
        for m in every:
            print(f"{m.id}  {where(m)}\n            {m.change}")
        print(f"{len(every)} mutants")
        return 0
    try:
        try_all(given.function, given.jobs)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
