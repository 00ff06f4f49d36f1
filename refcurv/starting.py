"""While the command line is being imported: an interrupt or an error is no traceback, and not 1.

Importing takes a second, before `cli.main` can look after anything. Of a program that imports
refcurv for itself nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from types import TracebackType

IMPORTS, THREAD = 380, 64
"""MiB of address space that importing takes, and more for each thread of BLAS.

Chosen: 374 and 80 were seen. With 290 less NumPy is imported, and SciPy's BLAS asks for ever.
"""


def look_after_imports() -> None:
    """As a command: Ctrl-C ends at once, and an error is one line and status 3.

    Proof: tests/test_cli.py::test_what_happens_while_it_is_imported_is_no_traceback
    """
    if os.path.basename(sys.argv[0] if sys.argv else "") in ("refcurv", "-m"):  # noqa: PTH119
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.excepthook = _one_line
        _require_address_space()


def _require_address_space() -> None:
    """There is room to import NumPy and SciPy.

    tests/test_room.py::test_what_is_too_little_to_import_is_said_at_once has processes of its own.
    """
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    told = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    threads = min(int(told), cores) if told.isdecimal() and int(told) else cores
    least = IMPORTS + THREAD * threads
    if most != resource.RLIM_INFINITY and most < least << 20:
        has = f"the address space has {most >> 20} MiB (`ulimit -v`)"
        raise MemoryError(f"{has}, but the libraries alone take {least}")


def reuse_memory() -> None:
    """As a command that makes large arrays again and again: what is given up serves the next ones.

    glibc hands large arrays back to the kernel, which must clear and map them anew. And each thread
    has a heap of its own, whose gaps no other thread fills. With one heap, which is kept, the same
    collection asks the kernel for hundreds of pages in the place of a hundred thousand, and its
    peak is what its arrays take. Elsewhere than on glibc nothing is changed.

    tests/test_streaming.py::test_memory_that_is_given_up_serves_again counts the pages that a
    process of its own asks for.
    """
    most_arenas, most_mapped, trim = -8, -4, -1
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # another C library numbers its options otherwise
        for option, value in ((most_arenas, 1), (most_mapped, 0), (trim, 2**31 - 1)):
            libc.mallopt(option, value)


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    text = " ".join(f"{kind.__name__}: {error}".split())[:500]
    print(f"refcurv: could not start: {text}", file=sys.stderr, flush=True)
    os._exit(3)
