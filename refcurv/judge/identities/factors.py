"""Factors, bases and edits.

Proof: tests/test_budgets.py::test_a_budget_sees_a_fault_that_a_hundred_budgets_hide
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.algebra.staircase import cut
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.factors import Factors
from refcurv.editing.projection import project
from refcurv.judge.bench import Bench
from refcurv.judge.identities.measures import (
    LEAST,
    NORMAL,
    Measure,
    exactly,
    measure,
    reached_rows,
    rounded,
)
from refcurv.judge.roundings import Runs
from refcurv.law import tolerance
from refcurv.law.checks import Array
from refcurv.model.transformer import Tap

RHO = 0.8
"""The share of mass at which an edit is checked."""


def factors_are_the_sums(bench: Bench) -> Iterator[Measure]:
    """A, G are sums over rows; tr K − tr F_tok = −n Cov(‖a‖², ‖g‖²)."""
    factors = bench.empirical
    if factors is None:
        return
    reached = reached_rows(bench)
    for name, factor in factors.items():
        tap = bench.taps[name]
        a, g = tap.a[reached], tap.g[reached]
        yield exactly(factor.n_A == factor.n_G == len(a), f"rows of {name}")
        A, G = (bench.runs_of_taps(partial(_gram, name, x, reached)) for x in "ag")
        yield rounded(factor.sum_A, A.here, A.size, bench.budget, f"A of {name}")
        yield rounded(factor.sum_G, G.here, G.size, bench.budget, f"G of {name}")
        traces = np.trace(factor.A) * np.trace(factor.G) * factor.n_A
        square_a, square_g = (a * a).sum(axis=1), (g * g).sum(axis=1)
        covariance = ((square_a - square_a.mean()) * (square_g - square_g.mean())).sum()
        want = (square_a * square_g).sum() - covariance
        off_a, off_g = (bench.runs_of_taps(partial(_squares, name, x, reached)) for x in "ag")
        scale = partial(_trace_terms, off_a, off_g)
        yield rounded(traces, want, scale, bench.budget, f"tr K of {name}")


def _gram(layer: str, side: str, rows: Array, taps: Mapping[str, Tap]) -> Array:
    x = getattr(taps[layer], side)[rows]
    return np.asarray(x.T @ x)


def _trace_terms(square_a: Runs, square_g: Runs, runs: int) -> list[float]:
    """Of Σ ‖a‖² Σ ‖g‖², and of as much that is taken from it."""
    a, g = square_a.here.sum(), square_g.here.sum()
    return [2 * a * square_g.size(runs), 2 * g * square_a.size(runs)]


def _squares(layer: str, side: str, rows: Array, taps: Mapping[str, Tap]) -> Array:
    x = getattr(taps[layer], side)[rows]
    return np.asarray((x * x).sum(axis=1))


def factors_add(bench: Bench) -> Iterator[Measure]:
    """Sums of factors add over disjoint data, and only grow."""
    half, whole, reached = len(bench.real) // 2, bench.empirical, reached_rows(bench)
    if not half or whole is None:
        return
    one, two = (bench.collect("empirical", p) for p in (slice(half), slice(half, None)))
    if one is None or two is None:
        return
    for name, factor in whole.items():
        A, G = (bench.runs_of_taps(partial(_gram, name, x, reached)) for x in "ag")
        for side, runs in (("sum_A", A), ("sum_G", G)):
            got = getattr(one[name], side) + getattr(two[name], side)
            yield rounded(got, getattr(factor, side), runs.size, bench.budget, f"{side} of {name}")
        grown = np.linalg.eigvalsh(factor.sum_A - one[name].sum_A)[0]
        budget = bench.budget + tolerance.eigenpair(len(factor.sum_A))
        yield rounded(min(0.0, float(grown)), 0, A.size, budget, f"growth of A of {name}")


def factors_are_second_moments(bench: Bench) -> Iterator[Measure]:
    """A and G are symmetric, ≥ 0, of rank at most the rows."""
    factors = bench.sampled
    if factors is None:
        return
    for name, factor in factors.items():
        for side, M in (("A", factor.A), ("G", factor.G)):
            yield exactly(bool((M == M.T).all()), f"symmetry of {side} of {name}")
            values = np.linalg.eigvalsh(M)[::-1]
            floor = tolerance.negative(len(M), factors.shard_rows, np.float64)
            top = max(float(values[0]), LEAST)
            yield Measure(max(0.0, -float(values[-1]) / top), floor, f"{side} ≥ 0 of {name}")
            beyond = values[factor.n_A :] if factor.n_A < len(M) else np.zeros(1)
            yield Measure(float(np.abs(beyond).max()) / top, floor, f"rank of {side} of {name}")


def _bases(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    if bench.sampled is not None and bench.bases is not None:
        for name, basis in bench.bases.items():
            yield name, bench.sampled, basis


def _curved(bench: Bench) -> Iterator[tuple[str, Factors, Eigenbasis]]:
    """The bases of layers that have any curvature to take a share of."""
    return (found for found in _bases(bench) if found[2].lam[0] * found[2].mu[0] >= NORMAL)


def bases_recompose(bench: Bench) -> Iterator[Measure]:
    """U diag(λ) Uᵀ is the factor, UᵀU = 1, eigenvalues descend."""
    for name, factors, basis in _bases(bench):
        for side, M, U, values in (
            ("A", factors[name].A, basis.U_A, basis.mu),
            ("G", factors[name].G, basis.U_G, basis.lam),
        ):
            raised = tolerance.negative(len(M), factors.shard_rows, np.float64)
            budget = tolerance.eigenpair(len(M)) + raised
            yield measure((U * values) @ U.T, M, M, budget, f"{side} of {name}")
            one = np.eye(len(M))
            yield measure(U.T @ U, one, one, tolerance.eigenpair(len(M)), f"U_{side} of {name}")
            yield exactly(bool((np.diff(values) <= 0).all()), f"order of {side} of {name}")


def edits_project(bench: Bench) -> Iterator[Measure]:
    """The edit is an orthogonal projection on a staircase.

    Twice is once; ‖W‖² = ‖W'‖² + ‖W − W'‖²; ρ = 1 keeps all; smaller ρ keeps a subset.
    """
    for name, _, basis in _curved(bench):
        W = bench.parameters[bench.config.weight_of(name)]
        budget = 4 * tolerance.eigenpair(max(W.shape))
        stairs = cut(basis.lam, basis.mu, RHO, name)
        edited = project(W, basis, stairs.counts)
        yield measure(project(edited, basis, stairs.counts), edited, W, budget, f"twice, {name}")
        square = (W * W).sum()
        split = (edited * edited).sum() + ((W - edited) ** 2).sum()
        yield measure(split, square, square, 2 * budget, f"Pythagoras, {name}")
        whole = project(W, basis, np.full(len(basis.lam), len(basis.mu)))
        yield measure(whole, W, W, budget, f"ρ = 1, {name}")
        fewer = cut(basis.lam, basis.mu, RHO / 2, name)
        nested = (fewer.counts <= stairs.counts).all() and (np.diff(stairs.counts) <= 0).all()
        yield exactly(bool(nested), f"staircase, {name}")
        enough = stairs.mass >= RHO * stairs.total * (1 - tolerance.gamma(4, np.float64))
        last = stairs.mass - stairs.last < RHO * stairs.total * (
            1 + tolerance.gamma(64, np.float64)
        )
        yield exactly(bool(enough and last), f"just enough, {name}")


def predicted_damage(bench: Bench) -> Iterator[Measure]:
    """½ Σ_dropped λ_i μ_j C_ij² = ½ <ΔW, G ΔW A>."""
    for name, factors, basis in _curved(bench):
        W = bench.parameters[bench.config.weight_of(name)]
        stairs = cut(basis.lam, basis.mu, RHO, name)
        C = basis.U_G.T @ W @ basis.U_A
        dropped = np.arange(W.shape[1]) >= stairs.counts[:, None]
        if not dropped.any():
            continue
        predicted = (np.outer(basis.lam, basis.mu) * C * C)[dropped].sum() / 2
        change = W - project(W, basis, stairs.counts)
        quadratic = (change * (factors[name].G @ change @ factors[name].A)).sum() / 2
        budget = 8 * tolerance.eigenpair(max(W.shape))
        budget += 2 * tolerance.negative(max(W.shape), factors.shard_rows, np.float64)
        # the change is rounded at the size of W, and may hold as much of what was kept
        far, off = norm(change), budget * norm(W)
        top, first_out = basis.lam[0] * basis.mu[0], stairs.first_out
        scale = top * (far * far + off * off / budget) + first_out * far * norm(W)
        yield measure(predicted, quadratic, scale, budget, name)
