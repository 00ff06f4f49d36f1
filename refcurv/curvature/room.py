"""Memory: what the machine has to give, what a job takes, and how much of it fits at one time.

What a job takes follows from the widths of its matrices alone, so that one that cannot end is
refused before it begins. Swap is not counted: a matrix that pages is never decomposed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refcurv.algebra import blas
from refcurv.law.checks import RoomError
from refcurv.law.conventions import BLOCK_SHARDS
from refcurv.model.config import TABLES, ModelConfig
from refcurv.passes.parallel import cores
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep

GIB = 2**30


# ------------------------------------------------------------------ what there is


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still get without swapping, or None where nothing says so.

    The least of what the kernel reports, and what each control group above the process leaves of
    its limit, as a container's does. Where there is no /proc, all memory that the machine has.

    Proof: tests/test_room.py::test_what_is_available_is_the_least_of_host_and_groups
    """
    return min((x for x in (_host(root), *_groups(root)) if x is not None), default=None)


def _host(root: Path) -> int | None:
    known = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in known:
        return 1024 * known["MemAvailable:"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not of this system
        return None


def _groups(root: Path) -> Iterator[int | None]:
    """What is left to each control group above this process, of both versions."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            inside = "/".join(parts[:depth])
            if not kinds:
                yield _left(root / "sys/fs/cgroup" / inside, "memory.max", "memory.current", "")
            elif "memory" in kinds.split(","):
                files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
                yield _left(root / "sys/fs/cgroup/memory" / inside, *files)


def _left(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    """The limit less what is used and not the page cache, which is given up when asked for."""
    try:
        most, now = int(_text(folder / limit)), int(_text(folder / used))
    except ValueError:  # "max", or there is no such file
        return None
    known = _numbers(folder / "memory.stat")
    cache = sum(known.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(most - max(now - cache, 0), 0)


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel's."""
    words = [line.split() for line in _text(path).splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


# ------------------------------------------------------------------ what a job takes


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of memory: `once`, and `each` of the pieces that may be in flight, the largest first.

    `largest` names the matrix that takes the most, and says how wide it is.
    """

    once: int
    each: tuple[int, ...]
    largest: str

    def bytes(self, pieces: int) -> int:
        """With so many pieces in flight, the largest ones."""
        return self.once + sum(self.each[:pieces])


def to_collect(config: ModelConfig, job: Sweep, itemsize: int, shards: Sequence[Shard]) -> Need:
    """The sums of a collection: of the total and of the block, and those of the shards in flight.

    A shard holds the products of one layer at a time, in the compute dtype, and keeps their memory
    for the next; with several passes also the float64 sums of its G over them.

    Proof: tests/test_room.py::test_a_collection_takes_the_memory_that_is_foreseen
    """
    width: dict[str, int] = {}
    spare: Counter[int] = Counter()
    for name, (d_out, d_in) in (config.linear_layers() | config.tables()).items():
        if name in job.layers:
            sides = {f"G of {name!r}": d_out}
            if name not in TABLES:
                sides[f"A of {config.input_of(name)!r}"] = d_in
            width |= sides
            spare |= Counter(sides.values())
    passes = 0 if job.one_pass else sum(8 * n * n for key, n in width.items() if key[0] == "G")
    each = passes + sum(itemsize * n * n * count for n, count in spare.items())
    sums = 1 if shards[-1].number < BLOCK_SHARDS else 2
    total = sum(8 * sums * n * n for n in width.values())
    return Need(total, (each,) * min(len(shards), BLOCK_SHARDS), _largest(width))


def to_decompose(width: Mapping[str, int]) -> Need:
    """The eigenbases of matrices by name: each is its sum's quotient, and what `eigh` takes.

    Proof: tests/test_room.py::test_an_eigenbasis_takes_the_memory_that_is_foreseen
    """
    each = sorted(8 * n * n + blas.eigh_bytes(n) for n in width.values())
    return Need(0, tuple(reversed(each)), _largest(width))


def _largest(width: Mapping[str, int]) -> str:
    name = max(width, key=lambda key: width[key])
    return f"{name}, {width[name]:,} x {width[name]:,}"


def in_flight(who: str, need: Need, asked: int | None = None) -> int:
    """How many pieces fit at one time: as asked, by default one per core, or fewer, but one.

    Raises:
        RoomError: not even one fits. Memory of which nothing is known holds everything.

    Proof: tests/test_room.py::test_fewer_are_in_flight_where_memory_is_short
    """
    most, room = asked or cores(), available()
    if room is None:
        return most
    for pieces in range(most, 0, -1):
        if need.bytes(pieces) <= room:
            return pieces
    raise RoomError(
        f"{who}: needs {need.bytes(1) / GIB:,.1f} GiB of memory for sums, copies and workspace, "
        f"but {room / GIB:,.1f} GiB are free. The largest matrix is {need.largest}: collect "
        "without its layer (--layers), or take a machine with more memory.",
        need=need.bytes(1),
        room=room,
    )
