"""The control groups above this process (a container, for example), of both of Linux's versions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def folders(controller: str, root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """The folder of each group that a controller ("memory", "cpu") may have, and its version.

    The outermost first. A group may have no files of the controller.

    Proof: tests/test_room.py::test_what_is_available_is_the_least_of_host_and_groups
    """
    for line in text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and controller not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if kinds else "")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth]), 1 if kinds else 2


def cores(root: Path = ROOT) -> int:
    """The processors that this process may use: those that it may run on, or a smaller quota.

    A quota of 2.5 processors (`docker run --cpus 2.5`) is rounded up.

    Proof: tests/test_room.py::test_a_quota_of_processors_is_not_exceeded
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    quotas = (_quota(*where) for where in folders("cpu", root))
    return min([affinity or os.cpu_count() or 1, *(x for x in quotas if x is not None)])


def _quota(folder: Path, version: int) -> int | None:
    """Processors, at least one; None without a limit."""
    if version == 2:
        words = text(folder / "cpu.max").split()
    else:
        words = [text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return None  # "max", -1, or there is no such file
    return math.ceil(int(words[0]) / int(words[1]))


def text(path: Path) -> str:
    """What one of the kernel's files says; empty where there is none."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
