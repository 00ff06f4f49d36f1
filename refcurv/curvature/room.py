"""Memory: what the machine has free, what a job takes, and how much of the job fits at one time.

What a job takes follows from the widths of its matrices alone. So a job that does not fit is
refused before it begins. Swap is not counted: to decompose a matrix that pages takes forever.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refcurv.algebra import blas, buffers
from refcurv.algebra.buffers import address_space
from refcurv.curvature.moments import triangle
from refcurv.files.digest import changed
from refcurv.files.lazy import Lazy
from refcurv.law.checks import RoomError
from refcurv.law.conventions import BLOCK_SHARDS
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.given import require_whole
from refcurv.model.weights import Model, Overlay
from refcurv.passes import groups
from refcurv.passes.groups import cores
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep

GIB = 2**30

CODE = 176 * 2**20
"""Bytes of what is loaded while it works: kernels and their compiler, HDF5.

Chosen: 42 MiB were seen, 155 with kernels yet to be compiled; 20 more on another machine.
"""

# ------------------------------------------------------------------ what there is


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still get without swapping, or None if nothing says so.

    It is the least of what the kernel reports as available, of what each control group above the
    process (a container, for example) leaves of its limit, and of what the limit of the process's
    own address space leaves (`ulimit -v`). Where there is no /proc, it is all memory that the
    machine has.

    Proof: tests/test_room.py::test_what_is_available_is_the_least_of_host_and_groups,
        ::test_an_address_space_is_memory_too
    """
    known = (_host(root), address_space(root), *_groups(root))
    return min((x for x in known if x is not None), default=None)


def _host(root: Path) -> int | None:
    known = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in known:
        return 1024 * known["MemAvailable:"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not of this system
        return None


def _groups(root: Path) -> Iterator[int | None]:
    """What is left to each control group above this process."""
    for folder, version in groups.folders("memory", root):
        if version == 2:
            yield _left(folder, "memory.max", "memory.current", "")
        else:
            yield _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _left(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    """The limit minus what is used. The page cache does not count: the kernel gives it up."""
    try:
        most, now = int(groups.text(folder / limit)), int(groups.text(folder / used))
    except ValueError:  # "max", or there is no such file
        return None
    known = _numbers(folder / "memory.stat")
    cache = sum(known.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(most - max(now - cache, 0), 0)


def _numbers(path: Path) -> dict[str, int]:
    """{name: number} of the lines "name number ..." of a kernel's file."""
    words = [line.split() for line in groups.text(path).splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def used() -> int:
    """Bytes of memory that this process has now; 0 if nothing says so."""
    pages = groups.text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


# ------------------------------------------------------------------ what a job takes


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of memory: `once`, and for `each` piece that may be in flight, the largest first.

    `largest` says which matrix takes the most, and how wide it is.
    """

    once: int
    each: tuple[int, ...]
    largest: str

    def bytes(self, pieces: int) -> int:
        """Bytes with that many pieces in flight, the largest ones."""
        return self.once + sum(self.each[:pieces])


def to_collect(config: ModelConfig, job: Sweep, itemsize: int, shards: Sequence[Shard]) -> Need:
    """What a collection takes: the sums of the total and the block, and each shard in flight.

    Sums of matrices are kept as triangles. A shard holds the products of one layer at a time, in
    the compute dtype, and keeps their memory for the next. With several passes it also holds
    float64 sums of G over them.

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
    passes = (
        0 if job.one_pass else sum(8 * triangle(n) for key, n in width.items() if key[0] == "G")
    )
    each = passes + sum(itemsize * n * n * count for n, count in spare.items())
    sums = 1 if shards[-1].number < BLOCK_SHARDS else 2
    if job.halves:  # each sum twice; at the end both halves of one matrix, and a copy to solve
        sums, each = 2 * sums, max(each, 3 * 8 * max(width.values()) ** 2)
    total = sum(8 * sums * triangle(n) for n in width.values())
    return Need(total, (each,) * min(len(shards), BLOCK_SHARDS), _largest(width))


def sums(config: ModelConfig, job: Sweep) -> int:
    """Bytes of the sums of a collection in its file, where layers share no A."""
    sizes = (config.linear_layers() | config.tables()).items()
    return sum(
        8 * (d_out * d_out + (d_in if name in TABLES else d_in * d_in))
        for name, (d_out, d_in) in sizes
        if name in job.layers
    )


def unread(model: Model) -> int:
    """Bytes of the parameters that are read from a file when they are asked for.

    Proof: tests/test_room.py::test_weights_that_do_not_fit_are_refused_before_they_are_read
    """
    base, top = model.parameters, changed(model)
    if not isinstance(base.base if isinstance(base, Overlay) else base, Lazy):
        return 0
    shapes = model.config.parameter_shapes()
    sizes = [math.prod(shape) for name, shape in shapes.items() if name not in top]
    return np.dtype(model.dtype).itemsize * sum(sizes)


def eigh_bytes(n: int) -> int:
    """Memory that `blas.eigh` of M takes beside M, which is its `own`: 2 n² numbers, NumPy's 5 n².

    Proof: tests/test_room.py::test_an_eigenbasis_takes_the_memory_that_is_foreseen
    """
    return 8 * n * n * (5 if n > blas.MOST_SQUARE else 2)


def to_decompose(width: Mapping[str, int]) -> Need:
    """What eigenbases take: for each matrix the mean made from its sum, and what `eigh` takes.

    Proof: tests/test_room.py::test_an_eigenbasis_takes_the_memory_that_is_foreseen
    """
    each = sorted(8 * n * n + eigh_bytes(n) for n in width.values())
    return Need(0, tuple(reversed(each)), _largest(width))


def _largest(width: Mapping[str, int]) -> str:
    name = max(width, key=lambda key: width[key])
    return f"{name}, {width[name]:,} x {width[name]:,}"


def at_a_time(who: str, asked: int | None) -> int:
    """How many pieces are asked for at a time; by default, and by 0, one per core.

    Raises:
        RangeError: it is no whole number, or negative.

    Proof: tests/test_public.py::test_pieces_at_a_time_are_a_whole_number
    """
    return cores() if asked is None else require_whole(who, "in_flight", asked, 0) or cores()


def in_flight(who: str, need: Need, asked: int | None = None, or_else: str = "") -> int:
    """How many pieces to have in flight: as asked (by default one per core), or as many as fit.

    If the memory is unknown, it is as asked. Under a limit of the address space each is a thread
    whose buffers BLAS takes now (`buffers.with_buffers`).

    Raises:
        RoomError: not even one fits. The message says what to do; `or_else`, what else.

    Proof: tests/test_room.py::test_fewer_are_in_flight_where_memory_is_short
    """
    most, room = at_a_time(who, asked), available()
    if room is None:
        return most
    for pieces in range(most, 0, -1):
        if need.bytes(pieces) + buffers.needed(pieces) <= room:
            return buffers.with_buffers(pieces)
    least = need.bytes(1) + buffers.needed(1)
    raise RoomError(
        f"{who}: needs {least / GIB:,.1f} GiB of memory for sums, copies and workspace, but "
        f"{room / GIB:,.1f} GiB are free. The largest matrix is {need.largest}: {or_else}"
        "collect without its layer (--layers), or use a machine with more memory.",
        need=least,
        room=room,
    )


def too_small(who: str, has: int, least: int, memory: int, advice: str) -> RoomError:
    """The refusal of a figure: a job takes at least so much beside what the process has.

    What it says is rounded up: given back as a figure it is enough.
    """
    need = math.ceil(100 * (has + least) / GIB) / 100
    return RoomError(
        f"{who}: needs at least {need:.2f} GiB of memory, of which the process "
        f"has {has / GIB:.2f} already, but {memory / GIB:.2f} are given. {advice}",
        need=has + least,
        room=memory,
    )
