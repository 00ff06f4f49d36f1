"""Mutation testing of the hand-written backward: does the suite notice every wrong step?

Each mutant of `mutants.py` goes into a copy of refcurv/ and tests/ in a temporary folder, and the
tests run there: first the quick ones (stage 1), then, for what is left, the rest (stage 2). To
save the start-up, a process that has NumPy, Numba, pytest and hypothesis loaded forks for each
mutant; nothing of refcurv is loaded before the fork.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mutants import Mutant, every_mutant, targets, versions
from report import (
    COMMAND,
    RESULTS,
    ROOT,
    Record,
    explained,
    results,
    stages_done,
    where,
    write_report,
)
from tqdm import tqdm

EXAMPLES = f"""examples:
  {COMMAND} --list --function softmax_over       what would be tried
  {COMMAND} --function rotate                    try one function
  {COMMAND} --jobs 2                             try everything that has no result yet
  {COMMAND} --report                             write README.md; status 1: unexplained survivors

A run that is killed goes on where it stopped. When the module's code changes, its results are void;
a survivor is tried again when the tests have changed, a killed mutant is not.
"""

FIRST = ["layers", "loss", "transformer", "identities", "definition", "selection"]
LEFT_OUT = {
    "slow, of whole commands": ["audit", "cli", "demo"],
    "about sources and documents": ["architecture", "method", "readme", "traceability"],
    "needs PyTorch": ["peers", "peers_curvature"],
    "passes even if every target raises": [
        "config", "conversion", "disk", "eigenbasis", "families", "huggingface", "kills",
        "matrix_free", "metrics", "mistaken", "naming", "parallel", "published_configs",
        "report", "staircase", "store", "texts", "weights",
    ],
}  # fmt: skip
"""No part of stage 2; every other file of tests/ is, and none of the experiments' folder."""

EXAMPLES_OF_STAGE = {1: 10, 2: 25}
"""Hypothesis examples; 25 is the suite's own profile `dev`. A failure is not shrunk."""
MEMORY = 12 * 2**30
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# ------------------------------------------------------------------ one trial


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said: passed, killed or timeout; the failures, (test, exception)."""

    outcome: str
    failures: Sequence[Sequence[str]] = ()


class Witness:
    """A pytest plugin that keeps the failures: (test, exception)."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.failures.append((node.nodeid, call.excinfo.typename))


def load_libraries() -> None:
    """Everything slow that is not under test, so that a fork has it."""
    import h5py  # noqa: F401
    import hypothesis.extra.numpy  # noqa: F401
    import numba  # noqa: F401
    import pytest  # noqa: F401
    import rapidfuzz  # noqa: F401
    import scipy.linalg  # noqa: F401
    import threadpoolctl  # noqa: F401
    import tqdm  # noqa: F401


def trial(yard: Path, tests: list[str], stage: int, seconds: int) -> Verdict:
    """Give pytest its arguments in the copy in `yard`, in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20 * seconds)  # nobody handles these: the process ends
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            _child(yard, tests, stage)
        finally:
            os._exit(3)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        too_long = name in ("SIGALRM", "SIGXCPU", "SIGKILL")
        return Verdict("timeout" if too_long else "killed", [(f"{seconds} s", name)])
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"the trial itself failed:\n{(yard / 'log').read_text()[-3000:]}")
    return Verdict(**json.loads((yard / "verdict.json").read_text()))


def _child(yard: Path, tests: list[str], stage: int) -> None:
    log = os.open(yard / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(yard)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.dont_write_bytecode = "-x" in tests  # of the rehearsal only
    sys.path.insert(0, str(yard))
    os.environ["PYTHONPATH"] = str(yard)
    os.environ["HYPOTHESIS_PROFILE"] = "mutation"

    import hypothesis
    import pytest

    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    common = dict(deadline=None, derandomize=True, phases=phases, report_multiple_bugs=False)
    slow = [hypothesis.HealthCheck.too_slow]
    count = EXAMPLES_OF_STAGE[stage]
    hypothesis.settings.register_profile(
        "mutation", max_examples=count, suppress_health_check=slow, **common
    )
    place = importlib.util.find_spec("refcurv")
    if place is None or not Path(str(place.origin)).is_relative_to(yard):
        raise RuntimeError(f"refcurv would come from {place}, not from the copy {yard}")
    witness = Witness()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-n", "0"]
    status = pytest.main([*options, *tests], plugins=[witness])
    if (status == 0) == bool(witness.failures):
        raise RuntimeError(f"pytest ended with {status}, the failures being {witness.failures}")
    verdict = {"outcome": "killed" if witness.failures else "passed", "failures": witness.failures}
    (yard / "verdict.json").write_text(json.dumps(verdict))
    sys.stdout.flush()
    os._exit(0)


# ------------------------------------------------------------------ all trials


def stages(yard: Path, path: str) -> dict[int, list[str]]:
    """The test files of each stage, the likeliest killer first."""
    left_out = {name for names in LEFT_OUT.values() for name in names}
    first = sorted(FIRST, key=lambda name: name != Path(path).stem)
    every = sorted(f.stem.removeprefix("test_") for f in (yard / "tests").glob("test_*.py"))
    rest = [name for name in every if name not in first and name not in left_out]
    return {
        stage: [f"tests/test_{name}.py" for name in names]
        for stage, names in ((1, first), (2, [*first, *rest]))
    }


def lay_out(yard: Path) -> None:
    """Copy what the tests need; kernels compiled before are taken along."""
    ignored = shutil.ignore_patterns("*.pyc", "*.png", "*.jsonl")
    for name in ("refcurv", "tests", "validation"):
        shutil.copytree(ROOT / name, yard / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, yard)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the rehearsal found: seconds of CPU that each stage may take; pytest's options."""

    seconds: dict[int, int]
    options: list[str]


def cpu_seconds() -> float:
    """What the trials so far took, all together: other work on the machine changes no verdict."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rehearse(yard: Path) -> Rules:
    """Run both stages without a mutant: how long they take; what fails anyway is left out."""
    seconds, options = {}, []
    for stage, files in stages(yard, next(iter(targets(yard)))).items():
        while True:
            began = cpu_seconds()
            verdict = trial(yard, [*files, *options], stage, 3600)
            took = cpu_seconds() - began
            if verdict.outcome == "timeout":
                raise SystemExit(f"without a mutant, stage {stage} takes more than an hour")
            for test, error in verdict.failures:
                tell(f"left out, fails without a mutant: {test}: {error}")
                options.append(f"--deselect={test}" if "::" in test else f"--ignore={test}")
            if all("::" in test for test, _ in verdict.failures):
                break  # a file that cannot be read keeps pytest from running the others
        seconds[stage] = 30 + int(5 * took)
        tell(f"stage {stage} takes {took:.0f} s of CPU without a mutant")
    return Rules(seconds, options)


def attempt(yard: Path, mutant: Mutant, stage: int, rules: Rules) -> Record:
    """One mutant's record after one stage."""
    began = time.monotonic()
    place = yard / mutant.path
    original = place.read_text()
    for old in (place.parent / "__pycache__").glob(f"{place.stem}.*.pyc"):
        old.unlink()
    place.write_text(mutant.text)
    try:
        tests = ["-x", *stages(yard, mutant.path)[stage], *rules.options]
        verdict = trial(yard, tests, stage, rules.seconds[stage])
    finally:
        place.write_text(original)
    by, error = verdict.failures[0] if verdict.failures else ("", "")
    return {
        "id": mutant.id,
        "path": mutant.path,
        "function": mutant.function,
        "line": mutant.line,
        "change": mutant.change,
        "outcome": "survived" if verdict.outcome == "passed" else verdict.outcome,
        "stage": stage,
        "by": by,
        "error": error,
        "seconds": round(time.monotonic() - began, 1),
        "left_out": len(rules.options),
    }


def run(yards: list[Path], waiting: list[Mutant], stage: int, rules: Rules) -> Iterator[Record]:
    """The records of mutants after one stage, as they come, from a process for each yard."""
    reader, writer = os.pipe()
    jobs = len(yards)
    workers = [_worker(yards[n], waiting[n::jobs], stage, rules, writer) for n in range(jobs)]
    os.close(writer)
    with os.fdopen(reader) as lines:
        yield from (json.loads(line) for line in lines)
    if any([os.waitpid(pid, 0)[1] for pid in workers]):
        raise SystemExit("a worker failed; what was found is kept")


def _worker(yard: Path, mine: list[Mutant], stage: int, rules: Rules, writer: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for mutant in mine:
            line = json.dumps(attempt(yard, mutant, stage, rules), ensure_ascii=False)
            os.write(writer, line.encode() + b"\n")
        status = 0
    except SystemExit as error:
        tell(str(error))
    finally:
        os._exit(status)


def try_all(only: Sequence[str], jobs: int) -> None:
    """Try what has no result yet, and the survivors of other tests; results go to a file."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        yards = [Path(folder) / str(n) for n in range(jobs)]
        lay_out(yards[0])
        now = versions(yards[0])
        every, found, reasons = every_mutant(yards[0], only), results(now), explained()

        def stages_of(record: Record | None) -> int:
            return stages_done(record, now["tests"], bool(record and record["id"] in reasons))

        done = {m.id: stages_of(found.get(m.id)) for m in every}
        tell(f"{len(every)} mutants; {sum(n == 2 for n in done.values())} have a result")
        if all(n == 2 for n in done.values()):
            return
        load_libraries()
        rules = rehearse(yards[0])
        for other in yards[1:]:
            shutil.copytree(yards[0], other)
        for stage in (1, 2):
            counts = {"killed": 0, "timeout": 0, "survived": 0}
            todo = [m for m in every if done[m.id] == stage - 1]
            title = f"stage {stage}"
            with RESULTS.open("a") as out, tqdm(total=len(todo), desc=title, unit="mutant") as bar:
                for record in run(yards, todo, stage, rules):
                    record |= {"code": now[record["path"]], "tests": now["tests"]}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    out.flush()
                    done[record["id"]] = stages_of(record)
                    counts[record["outcome"]] += 1
                    bar.set_postfix(counts)
                    bar.update()


def tell(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


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
    os.environ |= dict.fromkeys(THREAD_VARIABLES, "1")
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
