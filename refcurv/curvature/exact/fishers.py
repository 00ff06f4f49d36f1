"""F, F_tok and K by definition: sums over the cotangents that FISHER names (THREE).

    F     = Σ_c vec(D_c) vec(D_c)ᵀ,  D_c = Jᵀ s_c       the exact Fisher
    F_tok = Σ_c Σ_s (g_s g_sᵀ) ⊗ (a_s a_sᵀ)             without the terms between positions
    K     = n (G ⊗ A)                                   from the two second moments

The s_c are cotangents on the outputs z. For `expected` they are the columns of a root of ∂²L/∂z²,
one loss position and one vocabulary entry at a time. Nothing here goes forward along a direction,
as GGN does in `products`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.kron import from_rearranged, kron_dense
from refcurv.curvature.exact.problems import OutputLoss, Problem
from refcurv.curvature.exact.products import by_size, jacobian_rows, joined, steps
from refcurv.curvature.exact.variables import (
    Labels,
    Subject,
    Tokens,
    Variables,
    Vector,
    direction,
    layer_shape,
    named_by,
    variables_of,
)
from refcurv.law.checks import (
    Array,
    NameUnknownError,
    require_choice,
)
from refcurv.law.conventions import Fisher
from refcurv.model.fisher import require_fisher
from refcurv.model.given import require_callable
from refcurv.model.layers import Saved
from refcurv.model.transformer import Slope, Tap
from refcurv.progress import Progress, silent

COTANGENTS = 64
"""Cotangents of one segment that are pulled back side by side."""

PER = ("segment", "term")
"""FISHER: the square of a segment's summed gradient, or of each of its terms'."""

# ------------------------------------------------------------------ what is sent back


class Sent(TypedDict, total=False):
    """What is sent back through the model, and what of it is squared: the options of this module.

    Each key is a keyword of every function here. `fisher`, `seed` and `draws` mean what they mean
    in `collect`, which draws labels by default.

    Keys:
        fisher: whose labels: "expected" (default), "signed", "sampled" or "empirical" (FISHER).
        per: "segment" (default) squares the summed gradient of a segment, "term" the gradient of
            each loss position by itself.
        seed: of the labels or signs that are drawn, 0 by default (SAMPLING).
        draws: M, how often they are drawn, 1 by default. Only `sampled` and `signed` are drawn.
        progress: called with (segments done, segments).
    """

    fisher: str
    per: str
    seed: int
    draws: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class Choice:
    """`Sent` with its defaults filled in."""

    fisher: str = Fisher.EXPECTED
    per: str = "segment"
    seed: int = 0
    draws: int = 1
    progress: Progress = silent


def checked(who: str, sent: Sent) -> Choice:
    """The choice, once the law is known to have it."""
    known = Sent.__annotations__
    if unknown := [option for option in sent if option not in known]:
        raise TypeError(
            f"{who}() got an unexpected keyword argument {unknown[0]!r}; known are wrt, "
            f"{', '.join(known)}"
        )
    choice, name = Choice(**sent), f"exact.{who}"
    require_choice(name, "per", choice.per, PER)
    require_callable(name, "progress", choice.progress)
    require_fisher(name, choice.fisher, choice.seed, choice.draws)
    return choice


def cotangents(
    made: Problem, choice: Choice, wide: bool = True
) -> Iterator[tuple[Problem, Saved, Array]]:
    """(one segment, its forward, cotangents (C, N, V)): the sum of their squares is the Fisher.

    With `wide`, up to COTANGENTS go side by side, as only the Taps of linear layers can.
    """
    parts = list(made.split())
    for done, part in enumerate(parts):
        choice.progress(done, len(parts))
        z_NV, saved = part.forward(part.parameters)
        for d_CNV in _of_segment(part.loss, z_NV, choice):
            step = COTANGENTS if wide else 1
            for begin in range(0, len(d_CNV), step):
                yield part, saved, d_CNV[begin : begin + step]
    choice.progress(len(parts), len(parts))


def _of_segment(loss: OutputLoss, z_NV: Array, choice: Choice) -> Iterator[Array]:
    """The cotangents of one segment, a few (C, N, V) at a time."""
    N, V = z_NV.shape
    if choice.fisher == Fisher.EXPECTED:
        # column v of the root of every position; each position by itself, for positions mix (O13)
        column_VNV = np.stack([loss.root(z_NV, np.tile(e, (N, 1))) for e in np.eye(V)])
        for n in range(N):
            alone = np.zeros((V, N, V), z_NV.dtype)
            alone[:, n] = column_VNV[:, n]
            yield alone
        return
    if choice.fisher == Fisher.EMPIRICAL:
        d_MNV = loss.terms(z_NV)[1][None]
    else:
        draw_one = loss.drawn if choice.fisher == Fisher.SAMPLED else loss.signed_root
        d_MNV = np.stack([draw_one(z_NV, choice.seed, draw) for draw in range(choice.draws)])
        d_MNV = d_MNV / math.sqrt(choice.draws)
    if choice.per == "segment":
        yield d_MNV
        return
    for d_NV in d_MNV:
        yield np.eye(N)[:, :, None] * d_NV


# ------------------------------------------------------------------ F


@one_blas_thread()
def fisher(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> Array:
    """The dense Fisher in a block of parameters: F, the exact one of the three (THREE).

    Definition
        expected    F = Σ_t Σ_v p_tv ∇(−log p_tv) ∇(−log p_tv)ᵀ over loss positions t and entries v;
        sampled     F = (1/M) Σ_m Σ_seg D Dᵀ, D = Σ_t ∇(−log p_t[y_t]) over the segment's loss
                    positions, y_t ~ p_t drawn anew for each of M draws (SAMPLING); unbiased for
                    `expected`;
        signed      the same with D = Σ_t J_tᵀ S_t ε_t, ε_t drawn signs; unbiased for `expected`;
        empirical   the same with the corpus's labels, once.
        A segment is a document of a packed sequence, a sequence that is not packed, or an image, so
        that packing and padding change nothing (VECTOR). With per="term", D Dᵀ becomes
        Σ_t D_t D_tᵀ. For `expected` the two are equal: given the tokens, labels are independent and
        E D_t = 0.

    Args: as `hessian`; fisher, per, seed, draws, progress: see `Sent`.

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises: as `hessian`; ConventionError for a choice that the law does not know.

    Cost: one forward per segment, and T·V (expected), T·M (per="term") or M backward passes.
    Source: P3, FISHER; Kunstner et al. 2019 (arXiv 1905.12558) on `empirical`.
    Proof: tests/test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums,
        tests/test_exact.py::test_O11_ggn_is_the_expected_fisher,
        tests/test_problem.py::test_O52_curvature_of_packed_documents_is_that_of_separate_ones
    """
    variables = variables_of("fisher", model, tokens, labels, wrt, dense=True)
    made, choice = variables.problem, checked("fisher", sent)
    wide = made.linear.issuperset(variables.names)
    out = np.zeros((variables.size, variables.size))
    for part, saved, d_z in cotangents(made, choice, wide):
        D_CP = variables.flat(jacobian_rows(part, part.parameters, saved, d_z, variables.names))
        out = out + D_CP.T @ D_CP
    return out


@one_blas_thread()
def fisher_along(
    model: Subject,
    tokens: Tokens = None,
    labels: Labels = None,
    *,
    vector: Vector,
    **sent: Unpack[Sent],
) -> Array:
    """What each cotangent contributes along a vector: vᵀ F v is the sum of their squares.

    Definition
        x_c = <D_c, v>, D_c and F as in `fisher`; F itself is never made.

    Args: as `fisher`; the vector names its own parameters, any number of them.

    Returns:
        (C,), C = Σ T·V over segments for `expected`.

    Raises, Cost, Source: as `fisher`, without the limit of size.
    Proof: tests/test_exact.py::test_fisher_along_a_vector
    """
    variables = variables_of(
        "fisher_along", model, tokens, labels, named_by("fisher_along", vector)
    )
    sizes = by_size(direction("fisher_along", variables, vector))
    parts = [(e, variables.named(u_P)) for e, u_P in sizes]
    made, choice = variables.problem, checked("fisher_along", sent)
    wide = made.linear.issuperset(variables.names)
    out = []
    for part, saved, d_z in cotangents(made, choice, wide):
        x_KC = np.zeros((len(parts), len(d_z)))
        for step in steps(part, part.parameters, saved, d_z, variables.names):
            for k, (_, u) in enumerate(parts):
                x_KC[k] += _along(step, u[step.name])
        out.append(joined("fisher_along", [(e, x_KC[k]) for k, (e, _) in enumerate(parts)]))
    return np.concatenate(out)


def _along(step: Tap | Slope, u: Array) -> Array:
    """<D, u> of one parameter, D the gradient that the step carries: (C,), or () of a Slope."""
    if isinstance(step, Tap):
        return np.asarray((step.g * (step.a @ u.T)).sum(axis=(1, 2)))
    return np.asarray((step.d * u).sum())


# ------------------------------------------------------------------ F_tok


@one_blas_thread()
def f_tok(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> Array:
    """The Fisher of one linear layer without its cross-position terms: F_tok (THREE).

    Definition
        F_tok = Σ_c Σ_s (g_s g_sᵀ) ⊗ (a_s a_sᵀ), where `fisher` has Σ_c vec(D) vec(D)ᵀ,
        D = Σ_s g_s a_sᵀ: c runs over the same cotangents, s over positions.

    Args: as `fisher`; `wrt` must name the weight of one linear layer.

    Returns:
        (P, P), symmetric, positive semi-definite.

    Raises: as `fisher`; ConventionError: `wrt` is not the weight of one linear layer.

    Cost: as `fisher`.
    Source: METHOD, Notation; Eschenhagen et al. 2023 (arXiv 2311.00636), the expand setting.
    Proof: tests/test_exact.py::test_F_F_tok_and_K_equal_the_naive_sums
    """
    variables = variables_of("f_tok", model, tokens, labels, wrt, dense=True)
    O, I = layer_shape("f_tok", variables)  # noqa: E741
    R = np.zeros((O * O, I * I))
    for _, tap in _taps(variables, checked("f_tok", sent)):
        R = R + kron_sum(tap.a[0], position_moments(tap.g))
    return from_rearranged(R, (O, I))


def position_moments(g_CTO: Array) -> Array:
    """Σ_c g_cs g_csᵀ at each position s, (T, O, O)."""
    return np.asarray(g_CTO.transpose(1, 2, 0) @ g_CTO.swapaxes(0, 1))


def kron_sum(a_TI: Array, gg_TOO: Array) -> Array:
    """Σ_s gg_s ⊗ (a_s a_sᵀ), `rearranged`: Σ_s rvec(gg_s) rvec(a_s a_sᵀ)ᵀ, (O², I²)."""
    aa_TII = a_TI[:, :, None] * a_TI[:, None, :]
    return np.asarray(gg_TOO.reshape(len(a_TI), -1).T @ aa_TII.reshape(len(a_TI), -1))


# ------------------------------------------------------------------ A, G and K


@dataclass(frozen=True, slots=True)
class Moments:
    """A (I, I) and G (O, O), means over `rows` positions: K = rows · (G ⊗ A) (COUNTS)."""

    A: Array
    G: Array
    rows: int


@one_blas_thread()
def moments(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> Moments:
    """A and G of one linear layer by definition: what `collect` must find.

    Definition
        A = (1/n) Σ_s a_s a_sᵀ over the n rows s of the Problem (ROWS; `reached` of a Model);
        G = (1/n) Σ_c Σ_s g_s g_sᵀ, c over the cotangents of `fisher`: for `expected`, each loss
        position and each vocabulary entry by itself, as is right when positions mix (O13).

    Args, Raises, Cost: as `f_tok`; blocks of any size.

    Returns:
        Moments(A (I, I), G (O, O), rows).

    Source: P1, COUNTS.
    Proof: tests/test_exact.py::test_moments_are_collected
    """
    variables = variables_of("moments", model, tokens, labels, wrt)
    O, _ = layer_shape("moments", variables)  # noqa: E741
    sum_G = np.zeros((O, O))
    for part, tap in _taps(variables, checked("moments", sent)):
        g_NO = tap.g[:, part.kept(tap)[0]].reshape(-1, O)
        sum_G = sum_G + g_NO.T @ g_NO
    a_NI = input_rows(variables)
    n = len(a_NI)
    return Moments(a_NI.T @ a_NI / n, sum_G / n, n)


@one_blas_thread()
def kfac(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> Array:
    """The dense K-FAC block of one linear layer: K, the third of the three (THREE).

    Definition
        K = n (G ⊗ A), A, G, n of `moments`.

    Args, Returns, Raises, Cost: as `f_tok`.
    Source: P2; Martens & Grosse 2015 (arXiv 1503.05671).
    Proof: tests/test_exact_cases.py
    """
    checked("kfac", sent)
    made = variables_of("kfac", model, tokens, labels, wrt, dense=True).problem
    found = moments(made, wrt=wrt, **sent)
    return found.rows * kron_dense(found.G, found.A)


@one_blas_thread()
def rows(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> list[tuple[Array, Array]]:
    """What F, F_tok and K of one linear layer are made of: its inputs and output gradients.

    Definition
        Pairs (a (T, I), g (C, T, O)), some cotangents c of one segment at a time:
        D_c = Σ_s g_cs a_sᵀ.

    Args, Raises, Cost: as `moments`.

    Returns:
        The pairs; concatenated over c they are all of g.

    Source: THREE.
    Proof: tests/test_exact.py::test_O18_the_trace_gap_is_a_covariance_of_norms
    """
    variables = variables_of("rows", model, tokens, labels, wrt)
    layer_shape("rows", variables)
    return [(tap.a[0], tap.g) for _, tap in _taps(variables, checked("rows", sent))]


def _taps(variables: Variables, choice: Choice) -> Iterator[tuple[Problem, Tap]]:
    """(One segment, the linear layer's a (1, T, I) and g (C, T, O)), over all cotangents."""
    for part, saved, d_z in cotangents(variables.problem, choice):
        yield part, tap_of(part, saved, d_z, variables.names[0])


def input_rows(variables: Variables) -> Array:
    """The rows of A: what the one linear layer reads at the kept positions, (n, I)."""
    made = variables.problem
    z_NV, saved = made.forward(made.parameters)
    tap = tap_of(made, saved, np.zeros_like(z_NV), variables.names[0])
    return np.asarray(tap.a[made.kept(tap)])


def tap_of(made: Problem, saved: Saved, d_z: Array, weight: str) -> Tap:
    """The inputs and output gradients of one linear layer, at the Problem's own parameters."""
    for step in steps(made, made.parameters, saved, d_z, [weight]):
        if isinstance(step, Tap):
            return step
    raise NameUnknownError(f"exact: the backward of this Problem yields no Tap {weight!r}.")
