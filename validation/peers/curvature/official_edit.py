"""The official program's cut and its nDCG, from their documented behaviour, in NumPy.

The cut takes the pairs of largest λ μ until their running sum, in float64, reaches ρ times the
total; the total is the product of two float32 sums. Eigenvalues are as the solver gave them. nDCG
stores relevances and discounts in float16, adds their products so, and divides by an ideal sum in
float32.
"""

from __future__ import annotations

import heapq

import numpy as np

from refcurv.algebra.selection import select
from refcurv.evaluation.metrics import ndcg_of_ids

from .finding import Finding

Array = np.ndarray
WHERE = "official_edit"


def cut(lam: Array, mu: Array, rho: float) -> tuple[int, float]:
    """How many pairs are kept, and their share of the total; both descending."""
    total = float(lam.sum() * mu.sum())
    heap, seen = [(-float(lam[0] * mu[0]), 0, 0)], {(0, 0)}
    mass, kept = 0.0, 0
    while mass < rho * total and heap:
        key, i, j = heapq.heappop(heap)
        mass, kept = mass - key, kept + 1
        for near in ((i + 1, j), (i, j + 1)):
            if near[0] < len(lam) and near[1] < len(mu) and near not in seen:
                heapq.heappush(heap, (-float(lam[near[0]] * mu[near[1]]), *near))
                seen.add(near)
    return kept, mass / total


def all_of_it(size: int = 64) -> Finding:
    """ρ = 1 stops when the rounded sum is reached."""
    lam = np.exp(-np.linspace(0, 12, size)).astype(np.float32)
    kept, _ = cut(lam, lam, 1.0)
    wide = lam.astype(np.float64)
    ours = int(np.count_nonzero(select(wide, wide, 1.0)))
    text = (
        f"At ρ = 1 the official cut keeps {kept:,} of {size**2:,} pairs of a spectrum e⁰ … e⁻¹² in "
        f"float32, because it stops once its running sum in float64 reaches a total that is "
        f"rounded to float32; refcurv keeps {ours:,}. Its command line leaves out the edit from "
        f"ρ = 0.9999, so that this is not seen."
    )
    return Finding("official", "B68", text, kept < size**2 == ours, f"{WHERE}.all_of_it")


def below_zero() -> Finding:
    """Negative eigenvalues count in the total and in the running sum."""
    lam = np.array([1.0, 0.5, -0.15], np.float32)
    mu = np.array([1.0, 0.4, -0.2], np.float32)
    most = max(cut(lam, mu, rho)[1] for rho in np.linspace(0.01, 1, 100))
    text = (
        f"Negative eigenvalues stay in the official cut: with λ = (1, 0.5, −0.15) and μ = (1, 0.4, "
        f"−0.2) the kept mass reaches {most:.3f} of the total. refcurv sets to 0 what rounding "
        f"explains, and refuses the rest (NEGATIVE)."
    )
    return Finding("official", "B67", text, most > 1, f"{WHERE}.below_zero")


def of_itself(k: int = 10) -> Finding:
    """nDCG of a ranking with itself."""
    relevance = np.arange(k, 0, -1).astype(np.float32)
    discount = 1 / np.log2(np.arange(2, k + 2, dtype=np.float32))
    ideal = (relevance * discount).sum()
    gains = relevance.astype(np.float16) * discount.astype(np.float16)
    itself = float(gains.sum() / ideal)
    ids = np.arange(k)[None]
    ours = float(ndcg_of_ids(ids, ids)[0])
    text = (
        f"The official nDCG@{k} of a ranking with itself is {itself:.5f}, because relevances, "
        f"discounts and their sum are in float16 and the ideal sum is not; refcurv's is {ours:g}."
    )
    return Finding("official", "B79", text, itself != 1 == ours, f"{WHERE}.of_itself")


def findings() -> list[Finding]:
    """All of this module; they need no other program."""
    return [all_of_it(), below_zero(), of_itself()]
