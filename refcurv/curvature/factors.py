"""A and G: sums of outer products over rows, accumulated over shards in one fixed order.

    S_A = Σ a aᵀ,  n_A        S_G = Σ g gᵀ,  n_G        A = S_A / n_A,  G = S_G / n_G

and Σ a for the homogeneous coordinate of a bias (BIAS); of an embedding S_A is diagonal.

Sum and count, never a running mean; the division happens once, on reading A or G.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature import room
from refcurv.curvature.accumulate import ShardSums, accumulate
from refcurv.curvature.checkpoint import Checkpoint
from refcurv.curvature.forecast import Told, of_collection
from refcurv.curvature.halves import half_spectra, require_two
from refcurv.curvature.moments import SQUARED, Key, RunningSum, Side, empty_sums
from refcurv.curvature.plan import rounding_runs
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.files.lazy import Lazy
from refcurv.files.paths import as_path, require_space
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NonFiniteError,
    require_choice,
)
from refcurv.law.conventions import Estimator, Fisher, Rows, describe
from refcurv.model.config import TABLES, ModelConfig
from refcurv.model.corpus import Corpus
from refcurv.model.fisher import DRAWN
from refcurv.model.given import (
    require_callable,
    require_corpus,
    require_flag,
    require_model,
    require_record,
)
from refcurv.model.patterns import expand, spelled
from refcurv.model.weights import Model, resident
from refcurv.passes.parallel import Turnstile
from refcurv.passes.rounding import Noise, free, looked_at, rounding
from refcurv.passes.shards import Shard, shards
from refcurv.passes.sweep import Sweep, Take, require_few_passes, sweep, sweep_of
from refcurv.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Factor:
    """One linear layer's sums: sum_A (I, I) [activation²], sum_G (O, O) [nats²/output²], float64.

    n_A rows entered sum_A; n_G = rows × draws entered sum_G (COUNTS). sum_a (I,) is Σ a of a layer
    with a bias, None of one without (BIAS). Of a table of vectors ("embed", "position") sum_A is
    (entries,), the diagonal of a diagonal matrix: how often each is read (EMBEDDING).

    error_G and error_trace_G are standard errors given the corpus, of the labels or signs that were
    drawn and of nothing else: sqrt(E|G − E G|²) in Frobenius norm, and sqrt(E(tr G − E tr G)²). 0
    where nothing is drawn (`expected`, `empirical`), None where they are not known: one draw alone
    does not tell, nor do squares that leave the range of float64. rounding_G estimates how much of
    tr sum_G is rounding (NEGATIVE); None of factors that were made without it. noise_A and noise_G
    are standard deviations of sum_A and sum_G by rounding, in Frobenius norm; free_A and free_G how
    many random numbers tell them, few where few rows err most. None if they are not known.

    half_mu (I,) and half_lam (O,) are the eigenvalues that half of the corpus gives, descending:
    the mean of two halves (`curvature.halves`). None where halves were not kept.
    """

    sum_A: Array
    n_A: int
    sum_G: Array
    n_G: int
    error_G: float | None = None
    error_trace_G: float | None = None
    sum_a: Array | None = None
    rounding_G: float | None = None
    noise_A: float | None = None
    free_A: float | None = None
    noise_G: float | None = None
    free_G: float | None = None
    half_mu: Array | None = None
    half_lam: Array | None = None

    @property
    def A(self) -> Array:
        """(1/n_A) Σ a aᵀ, (I, I); of a table its diagonal."""
        return self.sum_A / self.n_A

    @property
    def A_joint(self) -> Array:
        """(1/n_A) Σ [a; 1] [a; 1]ᵀ, (I + 1, I + 1); A itself where there is no bias."""
        if self.sum_a is None:
            return self.A
        mean = self.sum_a[:, None] / self.n_A
        return np.block([[self.A, mean], [mean.T, np.ones((1, 1))]])

    @property
    def G(self) -> Array:
        """(1/n_G) Σ g gᵀ, (O, O)."""
        return self.sum_G / self.n_G


ERRORS = ("error_G", "error_trace_G", "rounding_G", "noise_A", "free_A", "noise_G", "free_G")
"""The fields of a Factor that say how far off its sums may be."""

HALVES = ("half_mu", "half_lam")
"""The fields of a Factor that say what half of the corpus gives."""


@dataclass(frozen=True, slots=True)
class Factors(Mapping[str, Factor]):
    """The factors of some linear layers, by name in file order, and how they were made.

    Fields: layers; fisher, rows, seed, draws: the choices of `collect`; dtype, of the products;
    shard_rows, the most rows that one product summed (for the budgets); source, for provenance;
    weights, which the model had (`refcurv.files.digest`), None where an older file does not say;
    estimator, whether rows are single positions or segments (ESTIMATOR).
    """

    layers: Mapping[str, Factor]
    fisher: Fisher
    rows: Rows
    seed: int
    draws: int
    dtype: str
    shard_rows: int
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    weights: str | None = None
    estimator: Estimator = Estimator.EXPAND

    def __getitem__(self, name: str) -> Factor:
        """The factor of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


def require_factors(who: str, given: object) -> Factors:
    """`given`, or ConventionError for what are no Factors.

    Proof: tests/test_public.py::test_an_object_is_refused_in_one_line
    """
    how = "rc.collect(model, corpus) or rc.load_factors(path)"
    return require_record(who, "factors must be Factors", given, Factors, how)


def collect(
    model: Model,
    corpus: Corpus,
    layers: str = "blocks.*.mlp.*",
    fisher: str = "sampled",
    seed: int = 0,
    draws: int = 1,
    *,
    rows: str = "reached",
    in_flight: int | None = None,
    checkpoint: str | Path | None = None,
    halves: bool = False,
    told: Told | None = None,
    progress: Progress = silent,
) -> Factors:
    """The K-FAC factors of linear layers: second moments of inputs and of output gradients.

    Definition
        A = (1/n_A) Σ_r a_r a_rᵀ,  G = (1/n_G) Σ_r g_r g_rᵀ, r over the kept rows (ROWS); g is the
        gradient of the summed nats (LOSS) with respect to the layer's output, against labels drawn
        from the model (`sampled`, P3) or the corpus's own (`empirical`). `expected` is the mean of
        the first over all labels, G = (1/n_G) Σ_{t,v} Σ_r g_r g_rᵀ with g the backward of column v
        of S = diag(√p) − p √pᵀ at position t alone; `signed` sends S ε back, ε random signs, from
        all positions at once, which has the same mean.

    Args:
        model: its `dtype` is that of the products inside a shard (PRECISION).
        corpus: tokens (N, T), with labels, mask and segments if it has them.
        layers: a pattern over linear layers, e.g. "blocks.{2-3}.mlp.{gate,up}" or "head". "embed"
            and "position" are among them only where they are spelled out: "**,embed".
        fisher: "sampled", "signed", "empirical" or, for small models, "expected" (FISHER).
        seed: of the drawn labels or signs (SAMPLING), in [0, 2**64).
        draws: draws of labels or signs per position; n_G = rows × draws. From two on, each factor
            says how exactly they determine its G: error_G, error_trace_G.
        rows: "reached", "labelled", "all" or "cls" (ROWS).
        in_flight: shards at a time, at most; by default one per core. Fewer where memory holds the
            sums of no more. Changes no bit.
        checkpoint: a file to keep the sums in, every two minutes or after 20 times what that took,
            and on Ctrl-C; if it exists, the run goes on from there, with the bits of an
            uninterrupted one. It holds the whole sums at the end: `save_factors`, given it too,
            deletes it once the factors are on disk.
        halves: also find the eigenvalues that half of the corpus gives, from which `decompose`
            tells with how many rows the kept share of pairs settles. Takes the memory of the sums
            once more, and at the end about a third of the time of `decompose`.
        told: called before the work with what it will take (`curvature.forecast`), for which a few
            labels pass.
        progress: called with (shards done, shards).

    Returns:
        Factors: layer name → sum_A (I, I), n_A, sum_G (O, O), n_G and A, G; float64, exactly
        symmetric. They are kept as triangles; a matrix is made whenever it is asked for. With a
        bias also sum_a (I,), for A_joint; whether weight and bias are one matrix is chosen later,
        by `decompose`. Tables have sum_A (entries,), a diagonal. rounding_G says how much of tr
        sum_G is rounding, from other runs over a few sequences (NEGATIVE).

    Raises:
        NameUnknownError: no layer matches. RangeError: token ids, seed or draws out of range, or an
        `expected` of more than 2**16 backward passes over all shards.
        EmptyError: no label anywhere. NonFiniteError: a sum holds NaN or infinity.
        ConventionError: an unknown choice, or a checkpoint of another run. SchemaError: a
        checkpoint that is damaged, or a finished file. RoomError, StorageError: sums that memory,
        or a checkpoint that the disk does not hold, before any work.

    Cost: one forward and `draws` backward passes down to the lowest layer (`expected`: labelled
        positions × vocabulary), plus N·(I² + O²) per layer; memory: weights, float64 sums, the
        activations of `in_flight` shards and, with several passes, their float64 sums of G.
    Source: P1-P3 (arXiv 2510.24256); Martens & Grosse 2015 (arXiv 1503.05671); `signed`: Martens,
        Sutskever & Swersky 2012 (curvature propagation).
    Proof: tests/test_factors.py::test_factors_equal_the_naive_sums,
        ::test_O11_expected_is_the_mean_over_every_label,
        ::test_O12_draws_converge_with_the_stated_standard_error,
        tests/test_rounding.py::test_the_estimate_is_the_error, tests/test_peers.py (PyTorch).
    """
    require_model("collect", model)
    job, keep = asked(model.config, layers, fisher, seed, draws, rows, halves)
    return summed("collect", model, corpus, job, keep, in_flight, progress, checkpoint, told=told)


def asked(
    config: ModelConfig,
    layers: str,
    fisher: str,
    seed: int,
    draws: int,
    rows: str,
    halves: bool = False,
) -> tuple[Sweep, Rows]:
    """What `collect` is asked for, checked."""
    keep = Rows(require_choice("collect", "rows", rows, list(Rows)))
    require_flag("collect", "halves", halves)
    tables = spelled(layers, config.tables())
    names = expand(layers, [*config.linear_layers(), *tables])
    return replace(sweep_of("collect", names, fisher, seed, draws), halves=halves), keep


def summed(
    who: str,
    model: Model,
    corpus: Corpus,
    job: Sweep,
    keep: Rows,
    in_flight: int | None,
    progress: Progress,
    checkpoint: str | Path | None = None,
    through: Callable[[Shard, Take], Take] | None = None,
    estimator: Estimator = Estimator.EXPAND,
    told: Told | None = None,
) -> Factors:
    """The sums of a collection whose choices are checked; `collect` describes the rest.

    `through` makes, for one shard, of the function that adds up rows the one that `sweep` calls
    (ESTIMATOR). What it hands on are other rows, of which rounding is not estimated.
    """
    require_corpus(who, corpus)
    require_callable(who, "progress", progress)
    if told is not None:
        require_callable(who, "told", told)
    kept_at = None if checkpoint is None else as_path(who, checkpoint).absolute()
    config = model.config
    units = shards(corpus, config, keep)
    require_few_passes(who, units, job, config.vocabulary)
    require_two(units, job)
    need = room.to_collect(config, job, np.dtype(model.dtype).itemsize, units)
    need = replace(need, once=need.once + room.unread(model))
    or_else = "collect block by block (refcurv collect --memory), " if who == "collect" else ""
    in_flight = room.in_flight(who, need, in_flight, or_else)
    own, came_from = digest(model), store.inputs(model.source, corpus.source)
    parameters, totals = resident(model), empty_sums(config, job)
    looks = set() if through else looked_at(units)
    if told is not None:
        again = rounding_runs(config, units)
        told(of_collection(config, parameters, corpus, units, job, need, in_flight, again))

    def work(ordinal: int, unit: Shard, turnstile: Turnstile) -> None:
        sums = ShardSums(config, totals, turnstile, ordinal, job)
        sweep(config, parameters, unit, job, through(unit, sums.take) if through else sums.take)
        sums.finish()
        if unit.number in looks:  # alone in its block, the first to pass
            for name, (noise, count) in rounding(config, parameters, unit, job).items():
                with turnstile.turn(key := Key(Side.noise, name), 0) as due:
                    if due:
                        totals[key].add(np.array(noise), count)

    resume = None
    if kept_at is not None:
        nbytes = sum(8 * total.size for total in totals.values())
        require_space("collect", kept_at, nbytes)
        resume = Checkpoint(kept_at, fingerprint(model, corpus, job, keep))
    accumulate(units, work, totals, in_flight, resume, progress)
    warn_of_changes(who, model, corpus)
    layers = finished(config, job, totals, in_flight)
    return made_of(layers, job, keep, units, model.dtype, came_from, own, estimator)


def warn_of_changes(who: str, model: Model, corpus: Corpus) -> None:
    """Warn if the files that were read are not what they were."""
    for path in store.changed(model.source, corpus.source):
        text = f"{who}: {path!r} changed during the run. The factors are of what it held before."
        warnings.warn(text, stacklevel=3)


def made_of(
    layers: Mapping[str, Factor],
    job: Sweep,
    keep: Rows,
    units: Sequence[Shard],
    dtype: str,
    inputs: Mapping[str, str],
    weights: str,
    estimator: Estimator = Estimator.EXPAND,
) -> Factors:
    """The layers of a collection, and how it was made."""
    return Factors(
        layers,
        job.fisher,
        keep,
        job.seed,
        job.draws,
        dtype,
        max(int(unit.keep_BT.sum()) for unit in units),
        MappingProxyType({"inputs": inputs}),
        weights,
        estimator,
    )


def fingerprint(model: Model, corpus: Corpus, job: Sweep, keep: Rows) -> dict[str, Any]:
    """FINGERPRINT: what decides the bits of the sums; model and corpus must be files."""
    if "sha256" not in model.source or "sha256" not in corpus.source:
        raise ConventionError("collect: a checkpoint needs a model and a corpus read from files.")
    return {
        "weights": model.source["sha256"],
        "corpus": corpus.source["sha256"],
        "dtype": model.dtype,
        "layers": sorted(job.layers),
        "fisher": str(job.fisher),
        "seed": job.seed,
        "draws": job.draws,
        "rows": str(keep),
        "halves": job.halves,
        "law": describe(),
        **store.machine(),
    }


def finished(
    config: ModelConfig,
    job: Sweep,
    totals: Mapping[Key, RunningSum],
    in_flight: int | None = None,
) -> Mapping[str, Factor]:
    """Sums to factors. A matrix is made when it is asked for; who shares an A gets the same one."""
    for key, total in totals.items():
        _require_finite(key, total)
    names = [name for name in config.linear_layers() | config.tables() if name in job.layers]
    for name in names:
        if not totals[Key(Side.A, config.input_of(name))].rows:
            raise EmptyError(f"collect: no row reached {name!r}.")
    held: WeakValueDictionary[Key, Array] = WeakValueDictionary()
    at_once = threading.Lock()

    def whole(key: Key) -> Array:
        with at_once:
            array = held.get(key)
            if array is None:
                array = held[key] = totals[key].finish()
            return array

    about = {name: _errors(config, job, totals, name) for name in names}
    half = half_spectra(totals, in_flight)

    def factor(name: str) -> Factor:
        read = config.input_of(name)
        a, g = Key(Side.A, read), Key(Side.G, name)
        sum_a = whole(Key(Side.a, read)) if config.has_bias(name) else None
        halves = half.get(a) if name not in TABLES else None, half.get(g)
        counts = totals[a].rows, totals[g].rows
        known = dict(zip(HALVES, halves, strict=True)) | about[name]
        return Factor(whole(a), counts[0], whole(g), counts[1], sum_a=sum_a, **known)

    return Lazy(names, factor)


def _require_finite(key: Key, total: RunningSum) -> None:
    """Raise NonFiniteError for a sum that holds NaN or infinity.

    An entry of Σ x xᵀ is at most the largest of the diagonal, and rounding does not double it. NaN
    or infinity in x is in the diagonal too. So that alone is looked at, unless it is very large.
    """
    kept, diagonal = total.state(), total.diagonal()
    if diagonal is not None and diagonal.max(initial=0) < np.finfo(np.float32).max / 2:
        return
    if np.isfinite([kept.min(), kept.max()]).all():  # NaN is the minimum of what holds one
        return
    index = [int(i) for i in np.argwhere(~np.isfinite(total.finish()))[0]]
    raise NonFiniteError(
        f"collect: sum_{key.side} of {key.name!r} holds NaN or infinity, first at {index}. "
        "Do the weights hold NaN, or did float32 activations overflow? Try float64."
    )


def _errors(
    config: ModelConfig, job: Sweep, totals: Mapping[Key, RunningSum], name: str
) -> dict[str, Any]:
    """What is known of the errors of one layer's sums, by the names of `Factor`'s fields."""
    G, n_A = totals[Key(Side.G, name)], totals[Key(Side.A, config.input_of(name))].rows
    kept, seen = G.state(), job.fisher not in DRAWN or job.draws > 1
    told = seen and (not kept.any() or SQUARED[0] <= norm(kept) <= SQUARED[1])
    # a variance of 0 can come out negative by rounding
    drawn = np.sqrt(np.maximum(G.variance, 0)) / G.rows if told else (None, None)
    rounded = _rounding(totals[Key(Side.noise, name)], n_A, G.rows)
    known = (None if error is None else float(error) for error in (*drawn, *rounded))
    return dict(zip(ERRORS, known, strict=True))


def _rounding(noise: RunningSum, n_A: int, n_G: int) -> tuple[float | None, ...]:
    """rounding_G, noise_A, free_A, noise_G and free_G of all rows, from those that were looked at.

    None if there were none, or if errors are too small to be squared.
    """
    if not noise.rows:
        return (None,) * 5
    told = Noise(*map(float, noise.state()))
    more_A, more_G = n_A / noise.rows, n_G / noise.rows
    of_A = _of_sum(told.of_A, told.squares_A, noise.rows, more_A)
    of_G = _of_sum(told.of_G, told.squares_G, noise.rows, more_G)
    return told.square * more_G, *of_A, *of_G


def _of_sum(of: float, squares: float, rows: int, more: float) -> tuple[float | None, float | None]:
    """The error of Σ x xᵀ over `more` times so many rows, and how many random numbers tell it.

    E |Δ Σ x xᵀ|² is 4 Σ |e|² |x|² at most, for rows err independently.
    """
    if not 0 < of < math.inf:
        return None, None
    return 2 * math.sqrt(of * more), free(of, squares, rows)


def least_certain(factors: Factors) -> tuple[str, float] | None:
    """The layer whose G was drawn with the largest error_G / |G|, and this; None if none is known.

    Where G is 0 so is its error.
    """
    shares = {
        name: factor.error_G * factor.n_G / float(norm(factor.sum_G))
        for name, factor in factors.items()
        if factor.error_G
    }
    return max(shares.items(), key=lambda pair: pair[1], default=None)
