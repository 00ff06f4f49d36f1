"""What a collection cannot do without: products by weights, and xᵀ x. Their time is the floor.

The products of attention, of queries, keys and values, are not among them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from validation.bench.measuring import Record
from validation.bench.proxies import Size

SECONDS = 0.5
"""Chosen: each product is repeated for so long, and the fastest counts."""
GEMM, GEMM_SECONDS = 2048, 4.0


class Product(NamedTuple):
    """y = x Wᵀ of rows x, ("weights", I, O), or the lower triangle of xᵀ x, ("rows", X, X)."""

    kind: str
    d_in: int
    d_out: int

    def work(self, rows: int) -> float:
        """Additions and multiplications."""
        return (2.0 if self.kind == "weights" else 1.0) * rows * self.d_in * self.d_out


def needed(size: Size, blocks: tuple[int, ...]) -> Counter[Product]:
    """How often each product is needed for A and G of these blocks' MLP projections.

    Forward through all blocks and the head, backward down to the lowest wanted block; there only
    through `down`. No gradient of a weight is among them. gate and up share their A.
    """
    D, M, V, lowest = size.width, size.mlp_width, size.vocabulary, min(blocks)
    count: Counter[Product] = Counter()
    above = size.layers - 1 - lowest
    count[Product("weights", D, D)] = 4 * size.layers + 4 * above
    count[Product("weights", D, M)] = 2 * size.layers + above + 1  # gate and up; back through down
    count[Product("weights", M, D)] = size.layers + 2 * above
    count[Product("weights", D, V)] += 1
    count[Product("weights", V, D)] += 1
    count[Product("rows", D, D)] = 2 * len(blocks)  # A of gate and up, G of down
    count[Product("rows", M, M)] = 3 * len(blocks)  # A of down, G of gate and of up
    return count


def floor(_folder: Path, size: Size, blocks: list[int]) -> Record:
    """Seconds of all needed products, each at the rows in which it is fastest, and GFLOP/s.

    Rows are those of 1, 2, 4, ... sequences. Memory is at hand, and weights are not changed.
    """
    from refcurv.algebra.blas import one_blas_thread

    units = [2**k for k in range(size.sequences.bit_length()) if 2**k <= size.sequences]
    total, work, by = 0.0, 0.0, {}
    with one_blas_thread():
        for product, count in needed(size, tuple(blocks)).items():
            each = min(
                _fastest(product, n * (size.positions - 1)) * (size.sequences / n) for n in units
            )
            total += count * each
            work += count * product.work(size.rows)
            rate = product.work(size.rows) / each / 1e9
            by[" ".join(map(str, product))] = {"count": count, "seconds": each, "gflops": rate}
    return {"seconds": total, "gflops": work / total / 1e9, "products": by}


def _fastest(product: Product, rows: int) -> float:
    """The least time of one such product."""
    from refcurv.algebra.gram import add_gram

    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, product.d_in), np.float32)
    if product.kind == "rows":
        total = np.zeros((product.d_in, product.d_in), np.float32)
        return _least(lambda: add_gram(x, total, onto=False))
    W = rng.standard_normal((product.d_out, product.d_in), np.float32)
    y = np.empty((rows, product.d_out), np.float32)
    return _least(lambda: np.matmul(x, W.T, out=y))


def _least(work: Callable[[], object], seconds: float = SECONDS) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def sgemm(_folder: Path, size: Size) -> Record:
    """GFLOP/s of one-thread float32 products of square matrices, over a few seconds."""
    from refcurv.algebra.blas import one_blas_thread

    n = min(GEMM, 4 * size.mlp_width)  # 2048 but for a tiny proxy
    x, y = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
    out = np.empty_like(x)
    with one_blas_thread():
        np.matmul(x, y, out=out)
        done, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < GEMM_SECONDS * n / GEMM:
            np.matmul(x, y, out=out)
            done += 1
    return {"gflops": 2 * n**3 * done / spent / 1e9}
