"""The limit of the address space, and what BLAS and the compiler take below it for themselves."""

from __future__ import annotations

import re
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from refcurv.algebra.blas import eigh, one_blas_thread

THREAD = 2**27
"""Address space of a thread that computes, under a limit of it.  Chosen: 96 MiB were seen, of which
the C library reserves 64 for its heap, OpenBLAS 32 for its buffer."""

COMPILER = 64 * 2**20
"""Bytes that the compiler needs for one kernel. Chosen: 32 MiB were seen."""


def address_space(root: Path = Path("/")) -> int | None:
    """What is left of the address space that the process may have; None without a limit.

    Proof: tests/test_room.py::test_an_address_space_is_memory_too
    """
    most, used = resource.getrlimit(resource.RLIMIT_AS)[0], None
    if most != resource.RLIM_INFINITY:
        with suppress(OSError):
            status = (root / "proc/self/status").read_text(encoding="ascii", errors="replace")
            used = re.search(r"^VmSize:\s*(\d+) kB$", status, re.MULTILINE)
    return used and max(most - 1024 * int(used[1]), 0)


def require_compiler(kernel: str) -> None:
    """There is room to compile a kernel. Where there is none, LLVM ends the process.

    Raises:
        MemoryError: the limit of the address space leaves less than `COMPILER`.

    Proof: tests/test_room.py::test_no_kernel_is_compiled_where_the_compiler_has_no_room
    """
    left = address_space()
    if left is not None and left < COMPILER:
        raise MemoryError(
            f"to compile {kernel} takes {COMPILER >> 20} MiB, but {left >> 20} MiB of the address "
            "space are left (`ulimit -v`)"
        )


_taken: set[int] = set()
"""For how many threads BLAS has taken its buffers; it keeps them as long as the process lives."""


def needed(threads: int) -> int:
    """Bytes of address space that so many threads still take; 0 without a limit."""
    return 0 if address_space() is None else THREAD * max(0, threads - max(_taken, default=0))


def with_buffers(threads: int) -> int:
    """So many threads, or as many as there is room for, whose buffers BLAS takes now.

    Raises:
        MemoryError: there is no room for one.

    Proof: tests/test_room.py::test_threads_have_their_buffers_or_are_fewer
    """
    left = address_space()
    if left is None:
        return threads
    fits = next((n for n in range(threads, 0, -1) if needed(n) <= left), 0)
    if not fits:
        raise MemoryError(
            f"a thread that computes takes {THREAD >> 20} MiB, but {left >> 20} MiB of the address "
            "space are left (`ulimit -v`)"
        )
    if needed(fits):
        take_buffers(fits)
    return fits


def take_buffers(threads: int) -> None:
    """Let NumPy's and SciPy's BLAS take what so many threads need at one time, and keep it.

    OpenBLAS takes a buffer at a product. Where there is none, as under `ulimit -v`, it asks again
    and again, for ever. Whoever has taken the buffers meets a MemoryError instead.
    """
    x, start = np.ones((768, 768)), threading.Barrier(threads)

    def work(_: int) -> None:
        start.wait()
        x @ x  # long enough for all to be at work together
        start.wait()
        eigh(x[:256, :256])

    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    _taken.add(threads)
