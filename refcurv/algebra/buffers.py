"""Memory that BLAS takes for itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refcurv.algebra.blas import eigh, one_blas_thread


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
