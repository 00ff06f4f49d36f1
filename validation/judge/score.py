"""The score of the judge: faults planted in programs, each dump judged, what was named counted.

    python -m validation.judge.score           everything; goes on where it was stopped
    python -m validation.judge.score --only 'torch/vit/*/B14*'    some ids alone, or 'editor/*'
    python -m validation.judge.score --quick   two models in float64, gold and given labels
    python -m validation.judge.score --group held-out    the settings held out, or tuned-on
    python -m validation.judge.score --sample 600    so many collectors' dumps, drawn evenly
    python -m validation.judge.score --jobs 2        in so many processes
    python -m validation.judge.score --render  README.md from results.jsonl, nothing run

These go together. What is found lands line by line in results.jsonl, each with a digest of the
code that it is of; lines of other code do not count, and how many those are is said. Needs the
extra `peers` (PyTorch).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any

from refcurv.law.checks import RefcurvError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
PAIRS = {"tuned-on": 40, "held-out": 20}
QUICK_PAIRS = {"tuned-on": 4}

Record = dict[str, Any]


def code() -> str:
    """A digest of the judge and of the programs."""
    files = [*(ROOT / "refcurv").rglob("*.py"), *HERE.rglob("*.py")]
    files = [path for path in files if path.name not in ("score.py", "table.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def lines() -> list[Record]:
    """All records, the newest last. A line that a killed run cut short is none."""
    found = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def read(version: str) -> dict[str, Record]:
    """{id: record} of this code."""
    return {r["id"]: r for r in lines() if r["code"] == version}


def others(version: str) -> dict[str, int]:
    """{code: dumps} of the records that are not of this code."""
    found = dict.fromkeys((r["code"], r["id"]) for r in lines() if r["code"] != version)
    return dict(Counter(code for code, _ in found))


def said(verdict: Any, *honest: Any) -> Record:
    """What a record keeps of a verdict."""
    from validation.judge.cases import effect

    size = effect(verdict, *honest)
    return {
        "passed": verdict.passed,
        "effect": size if math.isfinite(size) else "infinite",
        "named": sorted({c.fault or c.sentence[:60] for c in verdict.causes}),
        "alike": sorted({other for c in verdict.causes for other in c.alike}),
        "failed": [f"{f.layer} {f.quantity} {f.verdict}" for f in verdict.failed[:3]],
    }


def counts(record: Record) -> bool:
    """Does the fault move something by more than ten budgets?"""
    from validation.judge.cases import BUDGETS

    return record.get("effect") == "infinite" or record.get("effect", 0) > BUDGETS


class JudgeRaised(Exception):
    """A judge that raises is a result; a program that raises is not.

    named: the ids in the one line of an error that says what is wrong with a dump (exit 2).
    """

    named: tuple[str, ...] = ()


def verdict_of(judge: Callable[..., Any], *given: Any) -> Any:
    """What the judge says, or JudgeRaised."""
    try:
        return judge(*given)
    except Exception as error:
        raised = JudgeRaised(f"{type(error).__name__}: {error}"[:200])
        if isinstance(error, RefcurvError):
            raised.named = tuple(dict.fromkeys(re.findall(r"\bB\d+\b", str(error))))
        raise raised from error


class Run:
    """The records of this code, and how to make those that are missing."""

    def __init__(self, version: str) -> None:
        self.version, self.records = version, read(version)
        self.honest: dict[str, Any] = {}

    def keep(self, id: str, make: Callable[[], Record], fields: Record) -> Record:
        """The record of `id`: the one that is there, or a new one, written at once."""
        if id not in self.records:
            record = {"id": id, "code": self.version, **fields}
            try:
                record |= make()
            except JudgeRaised as error:
                record |= {"passed": False, "effect": "infinite", "alike": [],
                           "named": list(error.named),
                           "raised": str(error)}  # fmt: skip
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.records[id] = record
        return self.records[id]

    def case(self, case: Any) -> Record:
        """One run of a collector. Of a fault the honest run is judged anyway, so it is kept too."""
        from validation.judge.cases import dump_of, judged

        def verdict(honest: Any) -> Any:
            if honest.id not in self.honest:
                self.honest[honest.id] = verdict_of(judged, honest, dump_of(honest))
            return self.honest[honest.id]

        def make() -> Record:
            found = verdict_of(judged, case, dump_of(case)) if case.faults else verdict(case)
            return said(found, *map(verdict, case.yardsticks))

        fields = {"program": case.program, "setting": case.setting, "labels": case.labels,
                  "dtype": case.dtype, "faults": list(case.faults)}  # fmt: skip
        record = self.keep(case.id, make, fields)
        if case.faults:
            self.case(case.honest)
        return record

    def pair(self, case: Any) -> bool:
        """A pair counts where each of the two does by itself and both change what one does."""
        from dataclasses import replace

        alone = [self.case(replace(case, faults=(one,))) for one in case.faults]
        if not all(counts(record) for record in alone) or not _both_show(case):
            return False
        self.case(case)
        return True

    def edit(self, setting: str, fault: str) -> Record:
        """One run of the editor."""
        from validation.judge.cases import judged_edit

        fields = {"program": "editor", "setting": setting, "labels": "gold", "dtype": "float64",
                  "faults": [fault] if fault else []}  # fmt: skip
        id = edit_id(setting, fault)
        return self.keep(id, lambda: said(*verdict_of(judged_edit, setting, fault)), fields)


def edit_id(setting: str, fault: str) -> str:
    """A name of one run of the editor that says everything."""
    return f"editor/{setting}/gold/float64/{fault or 'honest'}"


def _both_show(case: Any) -> bool:
    """Is the dump of two faults another than that of each, and can they be planted together?"""
    from dataclasses import replace

    from validation.judge.cases import dump_of

    try:
        both = dump_of(case)
    except Exception:
        return False
    singles = [dump_of(replace(case, faults=(one,))) for one in case.faults]
    return all(distance(both, one) > 1e-6 for one in singles)


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest relative difference of two dumps; infinite where they cannot be compared."""
    import numpy as np

    if set(one) != set(two):
        return math.inf
    most = 0.0
    for name, theirs in one.items():
        for pair in zip(theirs, two[name], strict=True):
            x, y = (np.asarray(one, float) for one in pair)
            if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
                return math.inf
            size = np.linalg.norm(y)
            most = max(most, float(np.linalg.norm(x - y) / size if size else np.any(x) * 1.0))
    return most


Stratum = tuple[str, str, str, str]


def stratum(case: Any) -> Stratum:
    """Setting, dtype, labels and the id of the bug, whichever variant."""
    return case.setting, case.dtype, case.labels, "+".join(f.split("_")[0] for f in case.faults)


def sampled(cases: Sequence[Any], count: int) -> list[Any]:
    """So many of them, always the same; a larger sample holds the smaller ones.

    Each stratum gives one before any gives a second. Which one it gives is decided by SHA-256 of
    the ids, so without a preference.
    """
    waiting: dict[Stratum, list[Any]] = {}
    for case in sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest()):
        waiting.setdefault(stratum(case), []).append(case)
    drawn: list[Any] = []
    while waiting and len(drawn) < count:
        strata = list(waiting)
        drawn += [waiting[strata[n]].pop(0) for n in spread(strata, count - len(drawn))]
        waiting = {key: some for key, some in waiting.items() if some}
    return drawn


def spread(strata: Sequence[Stratum], count: int) -> list[int]:
    """The places of so many strata, or of all, evenly over settings, dtypes, labels and ids.

    Of a stratum's setting, of its dtype, labels and id, and of each two of these, some share has
    been drawn. The next stratum is always the one for which the sum of these shares is least.
    """
    import numpy as np

    fields = [*combinations(range(4), 1), *combinations(range(4), 2)]
    names = [["/".join(one[i] for i in some) for one in strata] for some in fields]
    level = np.stack([np.unique(some, return_inverse=True)[1] for some in names])
    size = np.stack([np.bincount(some)[some] for some in level])
    share, drawn = np.zeros(len(strata)), []
    for _ in range(min(count, len(strata))):
        n = int(np.argmin(share))
        drawn.append(n)
        share += ((level == level[:, [n]]) / size[:, [n]]).sum(0)
        share[n] = np.inf
    return drawn


def _some(version: str, cases: Sequence[Any]) -> int:
    """What one process runs, whose honest dumps it then has at hand."""
    import torch

    torch.set_num_threads(1)
    run = Run(version)
    for case in cases:
        run.case(case)
    return len(cases)


def collectors(version: str, some: Sequence[Any], jobs: int) -> None:
    """The dumps of collectors, those that share an honest one in one process."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from tqdm import tqdm

    groups: dict[str, list[Any]] = {}
    for case in some:
        groups.setdefault(case.honest.id, []).append(case)
    bunches = [group[n : n + 40] for group in groups.values() for n in range(0, len(group), 40)]
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(some), unit="dump", desc="one fault") as bar,
    ):
        for done in as_completed([pool.submit(_some, version, bunch) for bunch in bunches]):
            bar.update(done.result())


def every(quick: bool, only: str, groups: Sequence[str], sample: int, jobs: int) -> None:
    """Run what is not there yet, of the ids that match `only`; pairs where it is "*"."""
    from tqdm import tqdm

    from validation.judge.cases import EDITED, faults_of, singles
    from validation.judge.models import GROUPS

    version, settings = code(), {name for group in groups for name in GROUPS[group]}
    some = [case for case in singles(quick) if case.setting in settings]
    some = [case for case in some if fnmatchcase(case.id, only)]
    known = read(version)
    some = [case for case in (sampled(some, sample) if sample else some) if case.id not in known]
    collectors(version, some, jobs)
    if sample:
        return
    run = Run(version)
    every_edit = [(s, f) for s in EDITED if s in settings for f in ("", *faults_of("editor"))]
    edits = [one for one in every_edit if fnmatchcase(edit_id(*one), only)]
    for setting, fault in tqdm(edits, unit="dump", desc="edits"):
        run.edit(setting, fault)
    wanted = QUICK_PAIRS if quick else PAIRS
    for group in groups if only == "*" else ():
        two_faults(run, group, wanted.get(group, 0))


def two_faults(run: Run, group: str, wanted: int) -> None:
    """So many pairs in the settings of a group."""
    from tqdm import tqdm

    from validation.judge.cases import pairs

    ran = 0
    with tqdm(total=wanted, unit="dump", desc=f"two faults, {group}") as shown:
        for case in pairs(group) if wanted else ():
            if run.pair(case):
                shown.update()
                ran += 1
            if ran == wanted:
                break


def main() -> int:
    """Run, then write README.md's tables."""
    from validation.judge.models import GROUPS

    parser = argparse.ArgumentParser(prog="python -m validation.judge.score")
    parser.add_argument("--quick", action="store_true", help="two models, float64")
    parser.add_argument("--render", action="store_true", help="write README.md alone")
    parser.add_argument("--only", default="*", help="ids of dumps that match, as in "
                        "'torch/vit/gold/*/B14*' or 'editor/*'")  # fmt: skip
    parser.add_argument("--group", choices=tuple(GROUPS), help="the settings of one group alone")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many of them alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    given = parser.parse_args()
    if not given.render:
        groups = (given.group,) if given.group else tuple(GROUPS)
        every(given.quick, given.only, groups, given.sample, given.jobs)
    from validation.judge.table import write

    version, found = code(), lines()
    if given.render and found and found[-1]["code"] != version:
        version = found[-1]["code"]
        print(f"The newest records are of code {version}; that of this tree is {code()}.")
    return write(read(version), others(version))


if __name__ == "__main__":
    raise SystemExit(main())
