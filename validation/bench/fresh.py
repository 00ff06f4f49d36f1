"""Work in a fresh process: its memory is its own, and so are its libraries' threads.

A job is a function of a module, called with (folder, size, **options). What it returns is JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refcurv.starting import reuse_memory
from validation.bench.measuring import Record
from validation.bench.proxies import Size

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Job = Callable[..., Record]


def processors(count: int) -> list[int]:
    """The first so many of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0))[:count]


def spawn(job: Job, folder: Path, size: Size, cores: int | None = None, **options: Any) -> Record:
    """One job in a fresh process, on so many cores or on all, with the libraries' own defaults."""
    pinned = processors(cores) if cores else None
    return _result(_start(job, folder, size, pinned, options))


def spawn_each(job: Job, folder: Path, size: Size, cores: int, **options: Any) -> list[Record]:
    """The same job in so many processes at once, each on a core of its own."""
    begun = [_start(job, folder, size, [one], options) for one in processors(cores)]
    return [_result(one) for one in begun]


def _start(
    job: Job, folder: Path, size: Size, pinned: Sequence[int] | None, options: Record
) -> subprocess.Popen[str]:
    module = job.__module__
    if module == "__main__":
        module = sys.modules[module].__spec__.name  # type: ignore[union-attr]  # run by -m
    spec = {"job": f"{module}:{job.__name__}", "folder": str(folder), "size": asdict(size),
            "pinned": pinned, "options": options}  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "validation.bench.fresh", json.dumps(spec)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> Record:
    out, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    found: Record = json.loads(out.splitlines()[-1])
    return found


def work(text: str) -> None:
    """The other side of `spawn`: do the job, print its record as one line of JSON.

    Memory is kept and serves again, as in refcurv's commands; here that is so for every candidate.
    """
    reuse_memory()
    spec = json.loads(text)
    if spec["pinned"]:
        os.sched_setaffinity(0, spec["pinned"])  # before a library counts the cores
    module, _, name = spec["job"].partition(":")
    job: Job = getattr(importlib.import_module(module), name)
    print("\n" + json.dumps(job(Path(spec["folder"]), Size(**spec["size"]), **spec["options"])))


if __name__ == "__main__":
    work(sys.argv[1])
