"""What half of a corpus gives: the eigenvalues of A and G over either half of the shards.

How far they differ from those of all rows tells whether there are enough (`curvature.settling`).
Every second shard of a block is one half. So both halves come from the whole of the corpus. Shards
that lie side by side may share a long document: then the halves differ less than two corpora do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.linalg import eigvalsh

from refcurv.algebra import blas
from refcurv.algebra.scaling import far_exponent, shifted
from refcurv.curvature.moments import HALF, Key, RunningSum
from refcurv.law.checks import Array, EmptyError, SchemaError
from refcurv.law.conventions import MOST_ROUNDING, SHARD_TOKENS
from refcurv.passes.parallel import stream
from refcurv.passes.shards import Shard
from refcurv.passes.sweep import Sweep

TINY = np.finfo(np.float64).smallest_normal


def require_two(units: Sequence[Shard], job: Sweep) -> None:
    """Raise EmptyError where halves are asked for of a corpus that is one shard (SHARD)."""
    if job.halves and len(units) < 2:
        raise EmptyError(
            "collect: halves of the corpus are asked for, but it is a single shard, of at most "
            f"{SHARD_TOKENS} positions or one sequence. Give more text, or collect without halves."
        )


def require_half(where: str, values: Array, trace: float | None) -> Array:
    """The eigenvalues that a file says half of the corpus gives, of a matrix with this trace.

    None is a trace that was not read.

    Both halves together have the trace of the whole, up to rounding, MOST_ROUNDING of it.

    Raises: SchemaError, they do not descend, one is negative, or they have another sum.

    Proof: tests/test_settling.py::test_halves_of_something_else_are_refused
    """
    other = False
    if trace is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            other = abs(values.sum() - trace) > MOST_ROUNDING * abs(trace) + len(values) * TINY
    for wrong, why in (
        ((np.diff(values) > 0).any(), "do not descend"),
        ((values < 0).any(), "are negative in part"),
        (other, "have another sum than the eigenvalues of the whole"),
    ):
        if wrong:
            raise SchemaError(f"{where} {why}: half of the corpus cannot give them. Collect anew.")
    return values


def half_spectra(
    totals: Mapping[Key, RunningSum], in_flight: int | None = None
) -> dict[Key, Array]:
    """For each A and G of which half was kept, the eigenvalues that half of the corpus gives.

    So many matrices are solved at a time; each by itself, so that their number changes no bit.
    """
    of = {
        Key(side, key.name): key
        for side, half in HALF.items()
        for key in totals
        if key.side is half
    }

    def work(_: int, key: Key) -> Array:
        return half_spectrum(f"collect: {key.side} of {key.name!r}", totals[key], totals[of[key]])

    return dict(zip(of, stream(of, work, in_flight=in_flight), strict=True))


def half_spectrum(who: str, total: RunningSum, half: RunningSum) -> Array:
    """The mean of the spectra of two halves, weighed by their rows, descending and >= 0.

    Definition
        (n_1 λ(S_1/n_1) + n_2 λ(S_2/n_2)) / (n_1 + n_2) = (λ(S_1) + λ(S_2)) / n, where S_1 is `half`
        and S_1 + S_2 = S is `total`.

    Its first k entries sum up to at least those of λ(S/n) (Ky Fan), up to rounding.

    Raises: EmptyError, one half has no row. SolverError: LAPACK did not converge.

    Cost: about 3 n³ flops, 3 n² float64 of memory.
    Proof: tests/test_settling.py::test_halves_are_two_collections
    """
    if not 0 < half.rows < total.rows:
        raise EmptyError(f"{who} has no row in one half of the corpus. Collect without halves.")
    first = half.finish()
    other = total.finish() - first
    k = far_exponent(other)
    values = np.zeros(len(other))
    for one in (first, other):
        with blas.one_blas_thread(), blas.solving(who, one):  # transposed: as LAPACK wants it
            values += eigvalsh(shifted(one, -k).T, overwrite_a=True, check_finite=False)[::-1]
    values = shifted(np.maximum(values, 0.0) / total.rows, k)
    values.flags.writeable = False
    return values
