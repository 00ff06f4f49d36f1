"""Estimators beside K = n (G ⊗ A) of single rows: K-FAC reduce, and EK-FAC's Λ (ESTIMATOR).

Both look at the segments that rows belong to. A segment is a document, a sequence or an image; its
gradient is D = Σ_s g_s a_sᵀ over its rows s, and F is the sum of rvec(D) rvec(D)ᵀ.

    reduce   D is taken for ĝ āᵀ, ā the mean of a_s, ĝ the sum of g_s. It is, where all g_s are
             equal, as below a pool, or all a_s. Then K = n (G ⊗ A) of ĝ and ā, n segments.
    EK-FAC   Λ_ij is the curvature along u_i v_jᵀ itself, where K has n λ_i μ_j. Per sequence it is
             the diagonal of F in the basis, per token that of F_tok.

Each stands below its dense definition: `reduce` below `reduced`, `ekfac` below `diagonal`.

Other programs divide elsewhere. curvlinops averages a and sums g, as here. The K-FAC tutorial sums
a and averages g. Where each segment has T rows, its A is T² times ours, its G 1/T² of ours, and
their product the same (B8); where lengths differ, it is another matrix. To sum both (B36) makes K
T² times as large, and to average both 1/T² of it (B37).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Unpack

import numpy as np

from refcurv.algebra.blas import one_blas_thread
from refcurv.algebra.kron import kron_dense
from refcurv.curvature import room
from refcurv.curvature.accumulate import accumulate
from refcurv.curvature.bases import Bases, named, require_bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.exact.fishers import Moments, Sent
from refcurv.curvature.exact.fishers import rows as rows_of
from refcurv.curvature.exact.problems import Problem
from refcurv.curvature.exact.variables import Labels, Subject, Tokens, variables_of
from refcurv.curvature.factors import Factors, summed
from refcurv.curvature.moments import RunningSum
from refcurv.files.digest import digest, require_same
from refcurv.law.checks import (
    Array,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    require_choice,
    require_finite,
    require_shape,
)
from refcurv.law.conventions import BLOCK_SHARDS, Bias, Estimator, Fisher, Rows
from refcurv.model.config import ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.given import (
    as_matrix,
    require_callable,
    require_corpus,
    require_flag,
    require_model,
)
from refcurv.model.patterns import expand
from refcurv.model.transformer import Tap
from refcurv.model.weights import Model, resident
from refcurv.passes.parallel import Turnstile
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import Sweep, Take, require_few_passes, sweep, sweep_of
from refcurv.progress import Progress, silent

# ------------------------------------------------------------------ the segments of rows


class _Segments:
    """Which segment each row of a layer belongs to, in the order in which `sweep` hands rows on.

    The rows of a segment follow one another. The head's rows come in chunks, which may end inside
    a segment.
    """

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        B, T = shard.keep_BT.shape
        own_BT: Array = shard.layout.first_BT + np.arange(B)[:, None] * T
        special = len(config.image.specials) if config.image else 0
        patch_BT = slice(None), slice(special, None)
        self.rows = own_BT[shard.keep_BT]
        self.patch = own_BT[patch_BT][shard.keep_BT[patch_BT]]
        self.head = own_BT[:, : shard.head_BT.shape[1]][shard.head_BT]
        self._done = 0

    def all(self, layer: str) -> Array:
        """The segments of all rows of a layer, (N,)."""
        if layer == "head":
            return self.head
        return self.patch if layer == "patch" else self.rows

    def next(self, tap: Tap) -> tuple[Array, Array, bool]:
        """Of the rows that come: segments (S,), where each begins (S,), is the last one open?"""
        of_N = self.all(tap.name)
        end = self._done + len(tap.g)
        own = of_N[self._done : end]
        begin = np.flatnonzero(np.diff(own, prepend=-1))
        still = end < len(of_N) and of_N[end] == own[-1]
        self._done = 0 if end == len(of_N) else end
        return own[begin], begin, bool(still)


# ------------------------------------------------------------------ K-FAC reduce


@one_blas_thread()
def reduced(
    model: Subject, tokens: Tokens = None, labels: Labels = None, *, wrt: str, **sent: Unpack[Sent]
) -> Moments:
    """A and G of K-FAC reduce of one linear layer by definition: what `reduce` must find.

    Definition
        ā = (1/T) Σ_s a_s and ĝ_c = Σ_s g_cs over the T rows of a segment and a cotangent c of
        `exact.fisher`; A = (1/n) Σ ā āᵀ, G = (1/n) Σ_c ĝ_c ĝ_cᵀ over the n segments with a label.

    Args, Raises, Cost: as `exact.moments`.

    Returns:
        Moments(A (I, I), G (O, O), rows), rows = n: K = n (G ⊗ A).

    Source: Eschenhagen et al. 2023 (arXiv 2311.00636), the reduce setting; ESTIMATOR.
    Proof: tests/test_estimators.py::test_O3_before_a_pool_reduce_is_exact,
        ::test_O4_reduce_is_the_kfac_of_the_averaged_input
    """
    made = variables_of("reduced", model, tokens, labels, wrt).problem
    means, sums = [], []
    for part in made.split():
        a_I, g_CO = _segment(part, wrt, sent)
        means.append(a_I)
        sums.append(g_CO)
    n, mean_NI, sum_CO = len(means), np.stack(means), np.concatenate(sums)
    return Moments(mean_NI.T @ mean_NI / n, sum_CO.T @ sum_CO / n, n)


def _segment(part: Problem, wrt: str, sent: Sent) -> tuple[Array, Array]:
    """ā (I,) of one segment, and ĝ (C, O) of each cotangent."""
    pairs = rows_of(part, wrt=wrt, **sent)
    a_TI, g_CTO = pairs[0]
    (name,) = variables_of("reduced", part, None, None, wrt).names
    keep_T = part.kept(Tap(name, a_TI[None], g_CTO))[0]
    sums = [g_CTO[:, keep_T].sum(axis=1) for _, g_CTO in pairs]
    return a_TI[keep_T].mean(axis=0), np.concatenate(sums)


def reduce(
    model: Model,
    corpus: Corpus,
    layers: str = "blocks.*.mlp.*",
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    *,
    rows: str = "reached",
    in_flight: int | None = None,
    progress: Progress = silent,
) -> Factors:
    """The factors of K-FAC reduce: second moments of each segment's mean a and summed g.

    Definition
        A = (1/n) Σ ā āᵀ, G = (1/n) Σ ĝ ĝᵀ over n segments, ā the mean of a and ĝ the sum of g over
        the rows of a segment, for every backward pass that `collect` makes.

    Args: as `collect`, but no tables: their averaged one-hot inputs have no diagonal A.

    Returns:
        Factors with `estimator` "reduce": sum_A (I, I) over n_A segments, sum_G (O, O) over n_G =
        segments × draws, and sum_a (I,), Σ ā, for A_joint. No rounding_G. n_A counts segments with
        a row: for rows="all" those without a label too.

    Raises: as `collect`.

    Cost: the passes of `collect`; then (segments)·(I² + O²) per layer, and no rows are copied
        but the sums of segments.
    Source: Eschenhagen et al. 2023 (arXiv 2311.00636); ESTIMATOR.
    Proof: tests/test_estimators.py::test_reduce_equals_its_dense_definition
    """
    _require_given("reduce", model, corpus, progress)
    config = model.config
    keep = Rows(require_choice("reduce", "rows", rows, list(Rows)))
    names = expand(layers, list(config.linear_layers()))
    job = sweep_of("reduce", names, fisher, seed, draws)

    def through(unit: Shard, take: Take) -> Take:
        return _Reduced(_Segments(config, unit), take).take

    return summed(
        "reduce", model, corpus, job, keep, in_flight, progress,
        through=through, estimator=Estimator.REDUCE,
    )  # fmt: skip


class _Reduced:
    """Rows in, segments out: ā and ĝ, added in float64 and rounded to the dtype of the rows."""

    def __init__(self, segments: _Segments, take: Take) -> None:
        self._segments, self._hand_on = segments, take
        # layers that read one array a get one array ā: by that ShardSums knows what they share
        self._mean: tuple[Array, Array] | None = None
        self._open: tuple[Array, Array, int] | None = None  # the head's, at the end of a chunk

    def take(self, number: int, tap: Tap) -> None:
        """Hand on the segments that end among these rows."""
        _, begin, still = self._segments.next(tap)
        count = np.diff(begin, append=len(tap.g))
        g_SO = np.add.reduceat(tap.g, begin, axis=0, dtype=np.float64)
        if not still and self._open is None:
            self._hand_on(number, Tap(tap.name, self._means(tap.a, begin, count), _as(tap.g, g_SO)))
            return
        a_SI = np.add.reduceat(tap.a, begin, axis=0, dtype=np.float64)
        if self._open is not None:
            a_SI[0] += self._open[0]
            g_SO[0] += self._open[1]
            count[0] += self._open[2]
        self._open = (a_SI[-1], g_SO[-1], int(count[-1])) if still else None
        whole = slice(None, -1 if still else None)
        if len(count[whole]):
            a_SI = a_SI[whole] / count[whole, None]
            self._hand_on(number, Tap(tap.name, _as(tap.a, a_SI), _as(tap.g, g_SO[whole])))

    def _means(self, a_NI: Array, begin: Array, count: Array) -> Array:
        if self._mean is None or self._mean[0] is not a_NI:
            a_SI = np.add.reduceat(a_NI, begin, axis=0, dtype=np.float64) / count[:, None]
            self._mean = (a_NI, _as(a_NI, a_SI))
        return self._mean[1]


def _as(like: Array, x: Array) -> Array:
    return x.astype(like.dtype, copy=False)


def _require_given(who: str, model: object, corpus: object, progress: Progress) -> None:
    require_model(who, model)
    require_corpus(who, corpus)
    require_callable(who, "progress", progress)


# ------------------------------------------------------------------ EK-FAC


@dataclass(frozen=True, slots=True)
class Corrected:
    """One layer's Λ: sum_Lambda (O, I) [nats²/parameter²], float64, summed over draws.

    Fields: rows, n: the rows that a and g come from, n_A of `collect`; segments, in which they lie;
    draws, of labels or signs.
    """

    sum_Lambda: Array
    rows: int
    segments: int
    draws: int

    @property
    def Lambda(self) -> Array:
        """sum_Lambda / draws, (O, I), of the summed loss: what stands in the place of n λ_i μ_j.

        So Lambda / rows is comparable with λ_i μ_j.
        """
        return self.sum_Lambda / self.draws


@dataclass(frozen=True, slots=True)
class Corrections(Mapping[str, Corrected]):
    """The Λ of some layers, by name in the order of their bases, and how they were made.

    Fields: per, Estimator.TOKEN or .SEQUENCE; fisher, kept, seed, draws, dtype, weights: as of
    Factors, where `kept` is called rows.
    """

    layers: Mapping[str, Corrected]
    per: Estimator
    fisher: Fisher
    kept: Rows
    seed: int
    draws: int
    dtype: str
    weights: str

    def __getitem__(self, name: str) -> Corrected:
        """The Λ of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in the order of their bases."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


@one_blas_thread()
def diagonal(F: Array, U_G: Array, U_A: Array) -> Array:
    """Λ (O, I) by definition: Λ_ij = xᵀ F x, x = u_i ⊗ v_j: what `ekfac` must find.

    F (O·I, O·I) is `exact.fisher` per sequence, `exact.f_tok` per token. The columns u_i of U_G
    (O, O) and v_j of U_A (I, I) need not be orthonormal.

    Raises:
        ShapeError, DTypeError: what is no matrix of numbers, or does not fit the others.

    Source: George et al. 2018 (arXiv 1806.03884); ESTIMATOR.
    Proof: tests/test_estimators.py::test_lambda_equals_its_dense_definition
    """
    F, U_G, U_A = (
        as_matrix("diagonal", what, M) for what, M in (("F", F), ("U_G", U_G), ("U_A", U_A))
    )
    U = kron_dense(U_G, U_A)
    require_shape("diagonal", "F", F, (len(U), len(U)), "(O·I, O·I)")
    return np.asarray((U * (F @ U)).sum(axis=0).reshape(U_G.shape[1], U_A.shape[1]))


def ekfac(
    model: Model,
    corpus: Corpus,
    bases: Bases,
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    *,
    per: str,
    rows: str = "reached",
    in_flight: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Corrections:
    """EK-FAC's corrected eigenvalues Λ of every layer that has a basis.

    Definition
        per="token"     Λ_ij = (1/draws) Σ_r (u_i·g_r)² (v_j·a_r)² over rows r;
        per="sequence"  Λ_ij = (1/draws) Σ_seg (Σ_s (u_i·g_s) (v_j·a_s))² over the rows s of a
                        segment;
        and over the backward passes of `collect`. They are the diagonals of F_tok and of F in the
        basis (THREE) where every position with g ≠ 0 is a row: not for "labelled" and "cls".

    Args:
        model: as for `collect`.
        corpus: as for `collect`. Λ of other data or labels than the basis has is sound in itself,
            but may fit the F of these worse than K does (O22, B76).
        bases: of `decompose`, or any other vectors u_i, v_j in columns; joint ones are of [W b].
        fisher: as for `collect`.
        seed: as for `collect`.
        draws: as for `collect`.
        per: "token" or "sequence". There is no default, for programs differ (B75).
        rows: as for `collect`.
        in_flight: as for `collect`.
        force: take bases that were made from other weights than the model's.
        progress: called with (shards done, shards).

    Returns:
        Corrections: layer name → sum_Lambda (O, I), rows, segments, draws, and Lambda, which is
        comparable with n λ μᵀ. Rows are widened to float64 before they are turned, in float32 the
        products of four small numbers would vanish.

    Raises: as `collect`; NameUnknownError, ShapeError, NonFiniteError: bases that do not fit.
        ConventionError: bases of other weights, without `force`.

    Cost: the passes of `collect`; then per backward pass N·(I² + O² + I·O) per layer, in float64.
        Memory: the bases, 8·O·I bytes per layer (16 behind one block), and for each shard in flight
        those of one layer, or with several passes of all.
    Source: George et al. 2018 (arXiv 1806.03884); Grosse et al. 2023 (arXiv 2308.03296), per
        sequence; ESTIMATOR.
    Proof: tests/test_estimators.py::test_lambda_equals_its_dense_definition,
        ::test_B75_the_square_of_another_sum_is_another_lambda
    """
    _require_given("ekfac", model, corpus, progress)
    require_flag("ekfac", "force", force)
    require_bases("ekfac", "bases", bases)
    config, keep = model.config, Rows(require_choice("ekfac", "rows", rows, list(Rows)))
    kinds = (Estimator.TOKEN, Estimator.SEQUENCE)
    kind = Estimator(require_choice("ekfac", "per", per, kinds))
    own = digest(model)
    require_same("ekfac", named(bases), bases.weights, model, force, own)
    job = sweep_of("ekfac", bases, fisher, seed, draws)
    read = {name: _checked(config, bases, name) for name in bases}
    units = shards(corpus, config, keep)
    require_few_passes("ekfac", units, job, config.vocabulary)
    shapes = {name: (len(one.U_G), len(one.U_A)) for name, one in read.items()}
    in_flight = room.in_flight("ekfac", _need(shapes, job, units), in_flight)
    parameters = resident(model)
    totals = {name: RunningSum(math.prod(shape)) for name, shape in shapes.items()}

    def work(ordinal: int, unit: Shard, turnstile: Turnstile) -> None:
        shard = _ShardLambda(_Segments(config, unit), read, kind, totals, turnstile, ordinal, job)
        sweep(config, parameters, unit, job, shard.take)
        shard.finish()

    accumulate(units, work, totals, in_flight, None, progress)
    counted = [_Segments(config, unit) for unit in units]
    layers = {
        name: _corrected(name, total.finish().reshape(shapes[name]), counted, draws)
        for name, total in totals.items()
    }
    about = (kind, job.fisher, keep, job.seed, job.draws, model.dtype, own)
    return Corrections(MappingProxyType(layers), *about)


def _checked(config: ModelConfig, bases: Bases, name: str) -> Eigenbasis:
    """The basis of a layer, once it is known to fit the layer."""
    if name not in config.linear_layers():
        raise NameUnknownError(f"ekfac: the model has no linear layer {name!r}.")
    one, (O, I) = bases[name], config.linear_layers()[name]  # noqa: E741
    joint = bases.bias is Bias.JOINT and config.has_bias(name)
    for side, U, n in (("G", one.U_G, O), ("A", one.U_A, I + joint)):
        what = f"U_{side} of {name!r}"
        require_shape("ekfac", what, U, (n, n), "(n, n), n the layer's width on that side")
        require_finite("ekfac", what, U)
    return one


def _need(shapes: Mapping[str, tuple[int, int]], job: Sweep, units: list[Shard]) -> room.Need:
    """The sums of the total and the block; in a shard those of a layer, with passes of all."""
    sizes = {name: 8 * math.prod(shape) for name, shape in shapes.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    once = sum(sizes.values()) * (1 if units[-1].number < BLOCK_SHARDS else 2)
    each = 2 * sizes[largest] + (0 if job.one_pass else sum(sizes.values()))
    pieces = (each,) * min(len(units), BLOCK_SHARDS)
    return room.Need(once, pieces, "Lambda of {!r}, {:,} x {:,}".format(largest, *shapes[largest]))


def _corrected(name: str, sum_Lambda: Array, counted: list[_Segments], draws: int) -> Corrected:
    rows = [segments.all(name) for segments in counted]
    if not np.isfinite(sum_Lambda).all():
        raise NonFiniteError(
            f"ekfac: Lambda of {name!r} holds NaN or infinity. Do the weights hold NaN, or did "
            "float32 activations overflow? Try float64."
        )
    if not sum(map(len, rows)):
        raise EmptyError(f"ekfac: no row reached {name!r}.")
    return Corrected(
        sum_Lambda, sum(map(len, rows)), sum(len(np.unique(one)) for one in rows), draws
    )


class _ShardLambda:
    """Σ of one shard's squares, in float64, layer by layer (SHARD).

    With one backward pass a layer's sum joins the running sum once its rows have come; with several
    passes at the end. Each addition waits for its turn.
    """

    def __init__(
        self,
        segments: _Segments,
        bases: Mapping[str, Eigenbasis],
        per: Estimator,
        totals: Mapping[str, RunningSum],
        turnstile: Turnstile,
        ordinal: int,
        job: Sweep,
    ) -> None:
        self._segments, self._bases, self._per = segments, bases, per
        self._totals, self._turnstile, self._ordinal = totals, turnstile, ordinal
        self._one_pass = job.one_pass
        self._at = ""
        self._sums: dict[str, Array] = {}
        self._open: Array | None = None  # D of the head's segment at the end of a chunk
        self._turned: tuple[Array, Array, Array] | None = None

    def take(self, _number: int, tap: Tap) -> None:
        """Add the squares of a layer's rows, or of the segments that end among them."""
        if self._one_pass and tap.name != self._at:
            self.finish()
        self._at, one = tap.name, self._bases[tap.name]
        v_NI, u_NO = self._inputs(tap.a, one.U_A), tap.g.astype(np.float64) @ one.U_G
        if tap.name not in self._sums:
            self._sums[tap.name] = np.zeros((u_NO.shape[1], v_NI.shape[1]))
        sum_OI = self._sums[tap.name]
        if self._per is Estimator.TOKEN:
            sum_OI += (u_NO * u_NO).T @ (v_NI * v_NI)
            return
        _, begin, still = self._segments.next(tap)
        for first, end in pairwise([*map(int, begin), len(u_NO)]):
            D_OI = u_NO[first:end].T @ v_NI[first:end]
            if self._open is not None:
                D_OI += self._open
            self._open = D_OI if still and end == len(u_NO) else None
            if self._open is None:
                D_OI *= D_OI
                sum_OI += D_OI

    def _inputs(self, a_NI: Array, U_A: Array) -> Array:
        """V = a U_A, of [a; 1] in a joint basis; layers that share both share it."""
        if self._turned is None or self._turned[0] is not a_NI or self._turned[1] is not U_A:
            I = a_NI.shape[1]  # noqa: E741
            self._turned = a_NI, U_A, a_NI.astype(np.float64) @ U_A[:I] + U_A[I:].sum(axis=0)
        return self._turned[2]

    def finish(self) -> None:
        """What is summed joins the running sums."""
        for name, sum_OI in self._sums.items():
            with self._turnstile.turn(name, self._ordinal):
                self._totals[name].add(sum_OI.reshape(-1), 0)
        self._sums.clear()
