"""Time, memory, and whether the machine was quiet. Linux only.

A peak is ru_maxrss. It is started anew before each measurement through /proc/self/clear_refs.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MIB = 2**20
BUSY = 0.05
"""Chosen: a larger share of the cores for others makes a time worthless."""

Record = dict[str, Any]
PACKAGES = ("numpy", "scipy", "numba", "h5py", "torch", "transformers",
            "curvlinops-for-pytorch", "kronfluence")  # fmt: skip


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def peak() -> float:
    """MiB that this process held at most since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Start the peak anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def busy_seconds() -> float:
    """Seconds that all processors of the machine have worked since it started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tick() -> float:
    """How far off `busy_seconds` may be: it counts whole ticks on each processor."""
    return (os.cpu_count() or 1) / os.sysconf("SC_CLK_TCK")


@contextmanager
def measured(records: Record, name: str, base: float | None = None) -> Iterator[None]:
    """Seconds, peak and base [MiB] of the block, under `name`; base: resident before it.

    Also its processor time, with the kernel's share (`system`: mostly pages handed out) apart, and
    `others`: the processors' seconds that went elsewhere meanwhile, none on a quiet machine. Of a
    pass that takes less than a tick of the clock they are not known, and 0.
    """
    gc.collect()
    forget_peak()
    record: Record = {"base": resident() if base is None else base}
    used, busy = resource.getrusage(resource.RUSAGE_SELF), busy_seconds()
    begin = time.perf_counter()
    yield
    record["seconds"] = time.perf_counter() - begin
    now, busy = resource.getrusage(resource.RUSAGE_SELF), busy_seconds() - busy
    record |= {"user": now.ru_utime - used.ru_utime, "system": now.ru_stime - used.ru_stime}
    others = max(busy - record["user"] - record["system"] - tick(), 0.0)
    records[name] = record | {"others": others, "peak": peak()}


def others_share(times: Mapping[str, Sequence[Record]], cores: int) -> float:
    """The largest share of the machine that others had while one candidate was timed."""
    return max(
        sum(one["others"] for one in passes) / sum(one["seconds"] for one in passes) / cores
        for passes in times.values()
    )


def busy_now(seconds: float = 2.0) -> float:
    """The share of the cores that is in use, by others, while this process sleeps."""
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds / len(os.sched_getaffinity(0))


def describe_machine() -> Record:
    """What the numbers depend on."""
    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401  (loads its BLAS, so that threadpoolctl sees it)
    import threadpoolctl

    blas = [
        f"{info['filepath'].split('/')[-2].removesuffix('.libs')}: {info['internal_api']} "
        f"{info['version']} {info.get('architecture', '')}".strip()
        for info in threadpoolctl.threadpool_info()
        if info["user_api"] == "blas"
    ]
    torch = _torch()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "lscpu": subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout,
        "blas": [*blas, *torch],
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _torch() -> list[str]:
    """Its BLAS and its kernels, if it is installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    mkl = re.search(r"Math Kernel Library Version ([\w.]+)", torch.__config__.show())
    blas = f"MKL {mkl[1]}" if mkl else "no MKL"
    return [f"torch: {blas}, {torch.backends.cpu.get_cpu_capability()} kernels"]


def _versions() -> dict[str, str]:
    """Of the packages that are installed; refcurv may run from its source."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    found = {"refcurv": project["project"]["version"]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(machine: Record) -> str:
    """Machine and libraries in a few lines; some processors tell their kind by a number alone."""
    kind = re.findall(r"(?:CPU family|Model): +\d+", machine.get("lscpu", ""))
    processor = ", ".join([machine["cpu"], *(re.sub(": +", " ", one.lower()) for one in kind)])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{processor}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{'; '.join(sorted(machine['blas']))}.  \n"
        f"{versions}."
    )


def today() -> str:
    """The minute, for a record."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def tell(text: str) -> None:
    """One line of progress on stderr."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
