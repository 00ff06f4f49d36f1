"""Trials: pytest collects the tests once; a fork of its process runs them on each wrong version.

The fork gives the function the wrong version's code. Whoever holds the function runs that code: by
its name, from a table, or as a default. Two things stay right: what was computed while the tests
were collected, and what another program computes that a test starts. So a trial may miss what the
suite would notice. No file is changed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import pytest
from mutants import Mutant, find, targets
from report import ROOT, Record

EXAMPLES = 25
"""Hypothesis examples, as in the suite's own profile `dev`. A failure is not shrunk."""
WATCHED = 600
"""Seconds of CPU that a test may take while it is watched."""
SLACK, FACTOR = 10, 5
"""In a trial it may take so many seconds, and so many times the usual ones."""
MEMORY = 12 * 2**30
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# ------------------------------------------------------------------ the tests, in this process


class Collected:
    """A pytest plugin that hands the collected tests to `work`, and keeps what happens in them.

    Fields: items, by name; failures, (test, name of the exception); executed, the targets that were
    called; prepared, those that were called to make a fixture.
    """

    def __init__(self, work: Callable[[Collected], None]) -> None:
        self.work = work
        self.items: dict[str, pytest.Item] = {}
        self.failures: list[tuple[str, str]] = []
        self.executed: set[str] = set()
        self.prepared: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.failures.append((node.nodeid, call.excinfo.typename))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = set(self.executed)
        self.executed.clear()
        try:
            return (yield)
        finally:
            self.prepared[fixturedef.argname] |= self.executed
            self.executed |= before

    def run(self, test: str, following: str | None, seconds: float) -> float:
        """Run one test; returns its seconds of CPU. After so many the process is ended."""
        began = time.process_time()
        end = int(began + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        signal.alarm(20 * int(seconds + 1))  # nobody handles these: the process ends
        item, after = self.items[test], self.items[following] if following else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return time.process_time() - began


def collect(log: Path, files: Sequence[str], work: Callable[[Collected], None]) -> None:
    """Let pytest collect the files, and call `work`; what is printed goes to `log`."""
    for stream, place in ((0, os.devnull), (1, log), (2, log)):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    os.environ |= dict.fromkeys(THREAD_VARIABLES, "1")
    os.environ |= {"PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "mutation"}
    sys.path.insert(0, str(ROOT))
    found = importlib.util.find_spec("refcurv")
    if found is None or not Path(str(found.origin)).is_relative_to(ROOT):
        raise RuntimeError(f"refcurv would come from {found}, not from {ROOT}")
    hypothesis.settings.register_profile(
        "mutation",
        max_examples=EXAMPLES,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    options = ["-q", "-s", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    options += ["-m", "not slow and not peers", f"--basetemp={log.with_suffix('.tmp')}"]
    status = pytest.main([*options, *files], plugins=[Collected(work)])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {status!r}")


def forked(answer: Path, do: Callable[[], Any]) -> tuple[str, Any]:
    """What `do` returns in a fork of this process, as JSON has it; and the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            answer.write_text(json.dumps(do()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name, None
    if os.WEXITSTATUS(status):
        raise RuntimeError("the trial itself failed")
    return "", json.loads(answer.read_text())


# ------------------------------------------------------------------ which test executes what


def watch(suite: Collected, file: str, answer: Path) -> Record:
    """One file's tests without a mutant: {"file", "ended" by a signal, "tests"}.

    Of each test: its name; seconds of CPU; the targets that it or a fixture of its calls; the
    exception that it fails with, "" for none.
    """
    mine = [name for name in suite.items if name.partition("::")[0] == file]

    def look() -> list[Record]:
        for path, functions in targets(ROOT).items():
            _tell_calls(path, functions, suite.executed.add)
        pairs = pairwise([*mine, None])  # none in a file whose tests are all slow
        return [_watched(suite, test, following) for test, following in pairs]

    ended, tests = forked(answer, look)
    return {"file": file, "ended": ended, "tests": tests or []}


def _watched(suite: Collected, test: str, following: str | None) -> Record:
    item = suite.items[test]
    for value in vars(item.module).values():  # type: ignore[attr-defined]
        if hasattr(value, "cache_clear"):  # each test makes for itself what is else made once
            value.cache_clear()
    suite.executed.clear()
    suite.failures.clear()
    seconds = suite.run(test, following, WATCHED)
    made = (suite.prepared[name] for name in getattr(item, "fixturenames", ()))
    return {
        "test": test,
        "seconds": round(seconds, 3),
        "functions": sorted(suite.executed.union(*made)),
        "error": suite.failures[0][1] if suite.failures else "",
    }


def _tell_calls(path: str, functions: list[str], tell: Callable[[str], None]) -> None:
    """Let each of a module's functions tell that it is called, before it does anything else."""
    tree = ast.parse((ROOT / path).read_text())
    for name in functions:
        find(tree, name).body[:0] = ast.parse(f"_tell_call({f'{path}::{name}'!r})").body
    module, text = module_of(path), ast.unparse(tree)
    module.__dict__["_tell_call"] = tell
    for name in functions:
        getattr(module, name).__code__ = code_of(text, name)


def module_of(path: str) -> Any:
    """The module, imported."""
    return importlib.import_module(".".join(Path(path).with_suffix("").parts))


def code_of(text: str, function: str) -> CodeType:
    """The code of a function in the text of a module."""
    whole = compile(text, function, "exec", dont_inherit=True)
    return next(c for c in whole.co_consts if isinstance(c, CodeType) and c.co_name == function)


# ------------------------------------------------------------------ one trial


def attempt(suite: Collected, mutant: Mutant, tests: Sequence[Record], answer: Path) -> Record:
    """Run the tests on a wrong version until one fails: what came of it, and by which."""
    began = _seconds_of_forks()

    def look() -> tuple[str, str] | None:
        function = getattr(module_of(mutant.path), mutant.function)
        function.__code__ = code_of(mutant.text, mutant.function)
        for n, test in enumerate(tests):
            following = tests[n + 1]["test"] if n + 1 < len(tests) else None
            suite.run(test["test"], following, SLACK + FACTOR * test["seconds"])
            if suite.failures:
                return suite.failures[0]
        return None

    ended, failure = forked(answer, look)
    by, error = failure or ("", ended)
    too_long = ended in ("SIGALRM", "SIGXCPU", "SIGKILL")
    outcome = "timeout" if too_long else "killed" if error else "survived"
    return {
        "id": mutant.id,
        "path": mutant.path,
        "function": mutant.function,
        "line": mutant.line,
        "change": mutant.change,
        "outcome": outcome,
        "by": by,
        "error": error,
        "asked": len(tests),
        "seconds": round(_seconds_of_forks() - began, 1),
    }


def _seconds_of_forks() -> float:
    """What they have taken so far: other work on the machine changes no verdict."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tests_of(seen: Sequence[Record], target: str) -> list[Record]:
    """The tests that execute a target and pass without a mutant, the quickest first."""
    tests = [test for record in seen for test in record["tests"] if target in test["functions"]]
    return sorted((t for t in tests if not t["error"]), key=lambda test: test["seconds"])


def left_out(seen: Sequence[Record], target: str) -> int:
    """How many tests execute a target and fail without a mutant."""
    return sum(
        target in test["functions"] and bool(test["error"])
        for record in seen
        for test in record["tests"]
    )
