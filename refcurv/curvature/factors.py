"""A and G: sums of outer products over rows, accumulated over shards in one fixed order.

    S_A = Σ a aᵀ,  n_A        S_G = Σ g gᵀ,  n_G        A = S_A / n_A,  G = S_G / n_G

Sum and count, never a running mean; the division happens once, on reading A or G.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.algebra import blas, kernels
from refcurv.files import store
from refcurv.files.corpus import Corpus
from refcurv.files.lazy import Lazy
from refcurv.law.checks import (
    Array,
    ConventionError,
    EmptyError,
    NonFiniteError,
    RangeError,
    SchemaError,
    require_choice,
    require_draws,
    require_seed,
)
from refcurv.law.conventions import BLOCK_SHARDS, Fisher, Rows, describe
from refcurv.model.config import Model, ModelConfig, expand
from refcurv.model.transformer import Tap
from refcurv.passes import memory
from refcurv.passes.parallel import Progress, Turnstile, run
from refcurv.passes.shards import Shard, shards


@dataclass(frozen=True, slots=True)
class Factor:
    """One linear layer's sums: sum_A (I, I) [activation²], sum_G (O, O) [nats²/output²], float64.

    n_A rows entered sum_A; n_G = rows × draws entered sum_G (COUNTS).

    error_G and error_trace_G are standard errors given the corpus, of the labels or signs that were
    drawn and of nothing else: sqrt(E|G − E G|²) in Frobenius norm, and sqrt(E(tr G − E tr G)²). 0
    where nothing is drawn (`expected`, `empirical`), None where they are not known: one draw alone
    does not tell.
    """

    sum_A: Array
    n_A: int
    sum_G: Array
    n_G: int
    error_G: float | None = None
    error_trace_G: float | None = None

    @property
    def A(self) -> Array:
        """(1/n_A) Σ a aᵀ, (I, I)."""
        return self.sum_A / self.n_A

    @property
    def G(self) -> Array:
        """(1/n_G) Σ g gᵀ, (O, O)."""
        return self.sum_G / self.n_G


@dataclass(frozen=True, slots=True)
class Factors(Mapping[str, Factor]):
    """The factors of some linear layers, by name in file order, and how they were made.

    Fields: layers; fisher, rows, seed, draws: the choices of `collect`; dtype, of the products;
    shard_rows, the most rows that one product summed (for the budgets); source, for provenance.
    """

    layers: Mapping[str, Factor]
    fisher: Fisher
    rows: Rows
    seed: int
    draws: int
    dtype: str
    shard_rows: int
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, name: str) -> Factor:
        """The factor of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in file order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)


# ------------------------------------------------------------------ accumulation


class _Moment:
    """Σ x xᵀ of one side of one layer: shards added to a block, blocks to a total (BLOCK).

    Only the lower triangles are kept up until `finish`. The first block's sum *is* the total until
    a second one is closed: 0 + x has the bits of x. `variance` is that of the sum and that of its
    trace, given the corpus: shards draw independently, so that theirs add up.
    """

    __slots__ = ("_block", "_size", "_total", "rows", "variance")

    def __init__(self, size: int) -> None:
        self._size = size
        self._block: Array | None = None  # made when its first shard comes
        self._total: Array | None = None
        self.rows = 0
        self.variance = np.zeros(2)

    def add(self, product: Array, rows: int, variance: Array | float = 0.0) -> None:
        """Fold one shard's sum, its lower triangle; shards come in order."""
        if self._block is None:
            self._block = np.zeros((self._size, self._size))
        kernels.fold_triangle(self._block, product)
        self.rows += rows
        self.variance += variance

    def close(self) -> None:
        """End a block: its sum joins the total."""
        if self._block is not None and self._total is not None:
            kernels.fold_triangle(self._total, self._block)
        elif self._block is not None:
            self._total = self._block
        self._block = None

    def state(self) -> Array:
        """The total of the closed blocks, lower triangle."""
        return np.zeros((self._size, self._size)) if self._total is None else self._total

    def restore(self, total: Array, rows: int, variance: Array) -> None:
        """Go on from a `state`."""
        self._total, self.rows = np.array(total, dtype=np.float64), rows
        self.variance = variance

    def finish(self) -> Array:
        """The sum, exactly symmetric; every block must be closed."""
        total = self.state()
        kernels.mirror_triangle(total)
        total.flags.writeable = False
        return total


class _Passes:
    """The sum S = Σ P over the backward passes of one shard, and how much it varies.

    For M draws P, independent and equally distributed given the corpus, M/(M−1) (Σ|P|² − |S|²/M) is
    an unbiased estimate of E|S − E S|², in Frobenius norm as for the trace.
    """

    __slots__ = ("_draws", "_squares", "rows", "sum")

    def __init__(self, size: int, draws: int) -> None:
        self.sum = np.zeros((size, size))  # lower triangle
        self.rows = 0
        self._draws, self._squares = draws, np.zeros(2)

    def add(self, product: Array, rows: int) -> None:
        """Fold one pass's product, its lower triangle; passes come in order."""
        kernels.fold_triangle(self.sum, product)
        self.rows = rows  # the same in every pass
        if self._draws > 1:
            self._squares += _squares(product)

    def variance(self) -> Array:
        """Of the sum and of its trace; 0 unless there are draws to tell from."""
        M = self._draws
        return np.zeros(2) if M == 1 else M / (M - 1) * (self._squares - _squares(self.sum) / M)


def _squares(triangle: Array) -> Array:
    """(|M|², (tr M)²), Frobenius norm, float64, of the symmetric M that has this lower triangle."""
    diagonal, below, tile = triangle.diagonal().astype(np.float64), 0.0, 256
    for top in range(0, len(triangle), tile):
        rows = slice(top, top + tile)
        left = triangle[rows, :top].astype(np.float64)
        corner = np.tril(triangle[rows, rows], -1).astype(np.float64)
        below += float(np.vdot(left, left) + np.vdot(corner, corner))
    return np.array([2 * below + diagonal @ diagonal, diagonal.sum() ** 2])


class _ShardSums:
    """One shard's products, opened in the compute dtype, folded in float64 when complete.

    A product is complete when the next layer's rows come, or the next pass's. With one backward
    pass it then joins the moment; with several it joins the shard's sum of G over the passes, which
    joins the moment at the end. Folding waits for its turn, so that shards in flight fold in their
    order.
    """

    def __init__(
        self,
        config: ModelConfig,
        moments: Mapping[str, _Moment],
        turnstile: Turnstile,
        ordinal: int,
        job: memory.Sweep,
    ) -> None:
        self._config, self._moments, self._turnstile = config, moments, turnstile
        self._ordinal, self._job = ordinal, job
        self._open: dict[str, tuple[Array, int]] = {}
        self._passes: dict[str, _Passes] = {}
        self._spare: dict[int, list[Array]] = {}
        self._at = (-1, "")
        self._input: Array | None = None

    def take(self, number: int, tap: Tap) -> None:
        """Add a layer's kept rows; an input that the previous layer read too is added once."""
        if (number, tap.name) != self._at:
            self._complete()
            self._at = (number, tap.name)
        self._add(f"G {tap.name}", tap.g)
        if number == 0 and tap.a is not self._input:
            self._input = tap.a
            self._add(f"A {self._config.input_of(tap.name)}", tap.a)

    def _add(self, key: str, x_NX: Array) -> None:
        rows, size = x_NX.shape
        before = self._open.get(key)
        if before is not None:
            blas.add_gram(x_NX, before[0], onto=True)
            self._open[key] = (before[0], before[1] + rows)
            return
        spare = self._spare.get(size)
        product = spare.pop() if spare else np.empty((size, size), x_NX.dtype)
        blas.add_gram(x_NX, product, onto=False)
        self._open[key] = (product, rows)

    def _complete(self) -> None:
        """Every open product goes where it belongs; its memory serves the next."""
        for key, (product, rows) in self._open.items():
            if key.startswith("A ") or self._job.one_pass:
                with self._turnstile.turn(key, self._ordinal):
                    self._moments[key].add(product, rows)
            else:
                if key not in self._passes:
                    self._passes[key] = _Passes(len(product), self._job.draws)
                self._passes[key].add(product, rows)
            self._spare.setdefault(len(product), []).append(product)
        self._open.clear()

    def finish(self) -> None:
        """Fold what is left: the last product, and the sums over several passes."""
        self._complete()
        for key, passes in self._passes.items():
            with self._turnstile.turn(key, self._ordinal):
                rows = passes.rows * self._job.draws
                self._moments[key].add(passes.sum, rows, passes.variance())
        self._passes.clear()


MOST_PASSES = 2**16
"""Backward passes that `expected` may ask for, over all shards: labelled positions × entries."""


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
    progress: Progress = lambda done, total: None,
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
        layers: a pattern over linear layers, e.g. "blocks.{2-3}.mlp.{gate,up}" or "head".
        fisher: "sampled", "signed", "empirical" or, for small models, "expected" (FISHER).
        seed: of the drawn labels or signs (SAMPLING), in [0, 2**64).
        draws: draws of labels or signs per position; n_G = rows × draws. From two on, each factor
            says how exactly they determine its G: error_G, error_trace_G.
        rows: "reached" or "labelled" (ROWS).
        in_flight: shards at a time; by default one per core. Changes no bit.
        checkpoint: a file to keep the sums in after every block of 64 shards; if it exists, the
            run goes on from there, with the bits of an uninterrupted one. Deleted at the end.
        progress: called with (shards done, shards).

    Returns:
        Factors: layer name → sum_A (I, I), n_A, sum_G (O, O), n_G and A, G; float64, exactly
        symmetric.

    Raises:
        NameUnknownError: no layer matches. RangeError: token ids, seed or draws out of range, or an
        `expected` of more than 2**16 backward passes over all shards.
        EmptyError: no label anywhere. NonFiniteError: a sum holds NaN or infinity.
        ConventionError: an unknown choice, or a checkpoint of another run.

    Cost: one forward and `draws` backward passes down to the lowest layer (`expected`: labelled
        positions × vocabulary), plus N·(I² + O²) per layer; memory: weights, float64 sums, the
        activations of `in_flight` shards and, with several passes, their float64 sums of G.
    Source: P1-P3 (arXiv 2510.24256); Martens & Grosse 2015 (arXiv 1503.05671); `signed`: Martens,
        Sutskever & Swersky 2012 (curvature propagation).
    Proof: tests/test_factors.py::test_factors_equal_the_naive_sums,
        ::test_O11_expected_is_the_mean_over_every_label,
        ::test_O12_draws_converge_with_the_stated_standard_error, tests/test_peers.py (PyTorch).
    """
    keep = Rows(require_choice("collect", "rows", rows, list(Rows)))
    job = _job(model.config, layers, fisher, seed, draws)
    units = shards(corpus, model.config.vocabulary, keep)
    _require_few_passes(units, job, model.config.vocabulary)
    moments = _moments(model.config, job)
    resume = (
        _Checkpoint(Path(checkpoint), _fingerprint(model, corpus, job, keep))
        if checkpoint
        else None
    )
    _accumulate(model, units, job, moments, in_flight, resume, progress)
    return Factors(
        MappingProxyType(_finish(model.config, job, moments)),
        job.fisher,
        keep,
        job.seed,
        job.draws,
        model.dtype,
        max(int(unit.keep_BT.sum()) for unit in units),
        MappingProxyType({"inputs": store.inputs(model.source, corpus.source)}),
    )


def _job(config: ModelConfig, layers: str, fisher: str, seed: int, draws: int) -> memory.Sweep:
    """The choices of `collect`, checked."""
    kind = Fisher(require_choice("collect", "fisher", fisher, list(Fisher)))
    require_draws("collect", draws)
    if kind not in memory.DRAWN and draws != 1:
        raise ConventionError(f"collect: `{kind}` draws nothing; draws must be 1, got {draws}.")
    names = expand(layers, list(config.linear_layers()))
    return memory.Sweep(frozenset(names), kind, require_seed("collect", seed), draws)


def _require_few_passes(units: list[Shard], job: memory.Sweep, vocabulary: int) -> None:
    """Refuse an `expected` that would not end."""
    if job.fisher is not Fisher.EXPECTED:
        return
    passes = sum(len(memory.labelled(unit)) for unit in units) * vocabulary
    if passes > MOST_PASSES:
        raise RangeError(
            f"collect: `expected` needs {passes:,} backward passes, one for each labelled position "
            f"of a shard and vocabulary entry; at most {MOST_PASSES:,} are made. Give fewer "
            "tokens, or take `signed`: it estimates the same, and with draws >= 2 says how well.",
            passes=passes,
        )


def _moments(config: ModelConfig, job: memory.Sweep) -> dict[str, _Moment]:
    """Empty sums: "G layer" for each layer, "A input" for each input, shared by its layers."""
    moments: dict[str, _Moment] = {}
    for name, (d_out, d_in) in config.linear_layers().items():
        if name in job.layers:
            moments[f"G {name}"] = _Moment(d_out)
            key = f"A {config.input_of(name)}"
            if key not in moments:
                moments[key] = _Moment(d_in)
    return moments


def _accumulate(
    model: Model,
    units: list[Shard],
    job: memory.Sweep,
    moments: dict[str, _Moment],
    in_flight: int | None,
    resume: _Checkpoint | None,
    progress: Progress,
) -> None:
    """Run the shards block by block; within a block several are in flight, folded in order."""
    config, parameters = model.config, memory.resident(model)
    finished = 0

    def done() -> None:
        nonlocal finished
        finished += 1
        progress(finished, len(units))

    progress(0, len(units))
    begin = resume.load(moments) if resume else 0
    last = units[-1].number // BLOCK_SHARDS
    for number, block in groupby(units, key=lambda unit: unit.number // BLOCK_SHARDS):
        members = list(block)
        if number < begin:
            finished += len(members)
            progress(finished, len(units))
            continue
        turnstile = Turnstile()

        def work(ordinal: int, unit: Shard, gate: Turnstile = turnstile) -> None:
            sums = _ShardSums(config, moments, gate, ordinal, job)
            memory.sweep(config, parameters, unit, job, sums.take)
            sums.finish()

        run(members, work, in_flight=in_flight, turnstile=turnstile, done=done)
        for moment in moments.values():
            moment.close()
        if resume and number != last:
            resume.save(moments, number + 1)
    if resume:
        resume.path.unlink(missing_ok=True)


def _fingerprint(model: Model, corpus: Corpus, job: memory.Sweep, keep: Rows) -> str:
    """What a checkpoint's sums depend on, as one SHA-256; model and corpus must be files."""
    if "sha256" not in model.source or "sha256" not in corpus.source:
        raise ConventionError("collect: a checkpoint needs a model and a corpus read from files.")
    facts = [model.source["sha256"], corpus.source["sha256"], model.dtype, sorted(job.layers)]
    facts += [str(job.fisher), job.seed, job.draws, str(keep), describe()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The totals of the closed blocks on disk, so that a killed run can go on."""

    path: Path
    fingerprint: str

    def save(self, moments: Mapping[str, _Moment], blocks: int) -> None:
        """Write every total; the file before it stays whole until this one is."""
        store.write(
            self.path,
            format="refcurv-factors",
            attributes={"unfinished": self.fingerprint, "blocks": blocks},
            arrays=(
                store.Entry(
                    key.replace(" ", "."),
                    moment.state(),
                    {"rows": moment.rows, **dict(zip(_VARIANCE, moment.variance, strict=True))},
                )
                for key, moment in moments.items()
            ),
            provenance=store.provenance(),
        )

    def load(self, moments: Mapping[str, _Moment]) -> int:
        """Fill the moments; returns how many blocks are done, 0 without a file."""
        if not self.path.exists():
            return 0
        header = store.open_file(self.path, format="refcurv-factors")
        if header.attributes.get("unfinished") != self.fingerprint:
            raise ConventionError(
                f"collect: the checkpoint {str(self.path)!r} belongs to another run (other model, "
                "corpus or options). Finish that one, or delete the file to start anew."
            )
        for key, moment in moments.items():
            name = key.replace(" ", ".")
            at = header.entries[name].attributes
            variance = np.array([float(at[part]) for part in _VARIANCE])
            moment.restore(store.read(header, name, finite=True), int(at["rows"]), variance)
        return int(header.attributes["blocks"])


_VARIANCE = ("variance", "variance_trace")


def _finish(
    config: ModelConfig, job: memory.Sweep, moments: Mapping[str, _Moment]
) -> dict[str, Factor]:
    """Sums to factors; layers that read the same input share the very same A."""
    keys = list(moments)

    def finish(_: int, key: str) -> tuple[Array, bool]:
        total = moments[key].finish()
        return total, bool(np.isfinite(total).all())

    sums: dict[str, Array] = {}
    for key, (total, finite) in zip(keys, run(keys, finish), strict=True):
        sums[key] = total
        if not finite:
            side, _, name = key.partition(" ")
            index = [int(i) for i in np.argwhere(~np.isfinite(total))[0]]
            raise NonFiniteError(
                f"collect: sum_{side} of {name!r} holds NaN or infinity, first at {index}. "
                "Do the weights hold NaN, or did float32 activations overflow? Try float64."
            )
    out = {}
    known = job.fisher not in memory.DRAWN or job.draws > 1
    for name in config.linear_layers():
        if name not in job.layers:
            continue
        a, g = f"A {config.input_of(name)}", f"G {name}"
        if not moments[a].rows:
            raise EmptyError(f"collect: no row reached {name!r}.")
        n_G = moments[g].rows
        # a variance of 0 can come out negative by rounding
        errors = np.sqrt(np.maximum(moments[g].variance, 0)) / n_G
        error_G, error_trace_G = map(float, errors) if known else (None, None)
        out[name] = Factor(sums[a], moments[a].rows, sums[g], n_G, error_G, error_trace_G)
    return out


def least_certain(factors: Factors) -> tuple[str, float] | None:
    """The layer whose G was drawn with the largest error_G / |G|, and this; None if none is known.

    Where G is 0 so is its error.
    """
    shares = {
        name: factor.error_G * factor.n_G / float(np.linalg.norm(factor.sum_G))
        for name, factor in factors.items()
        if factor.error_G
    }
    return max(shares.items(), key=lambda pair: pair[1], default=None)


# ------------------------------------------------------------------ file


_ERRORS = ("error_G", "error_trace_G")


def save_factors(factors: Factors, path: str | Path) -> None:
    """Write a factors file: LAYER/{sum_A, n_A, sum_G, n_G}, float64 and int64 (DESIGN 4).

    The standard errors that are known are float64 attributes of sum_G.
    """
    attributes: dict[str, str | int | float] = {
        "fisher": str(factors.fisher),
        "rows": str(factors.rows),
        "seed": str(factors.seed),
        "draws": factors.draws,
        "dtype": factors.dtype,
        "shard_rows": factors.shard_rows,
    }

    def entries() -> Iterator[store.Entry]:
        for name, factor in factors.items():
            yield store.Entry(f"{name}.sum_A", factor.sum_A)
            yield store.Entry(f"{name}.n_A", np.asarray(factor.n_A, np.int64))
            errors = {part: getattr(factor, part) for part in _ERRORS}
            known = {part: error for part, error in errors.items() if error is not None}
            yield store.Entry(f"{name}.sum_G", factor.sum_G, known)
            yield store.Entry(f"{name}.n_G", np.asarray(factor.n_G, np.int64))

    store.write(
        path,
        format="refcurv-factors",
        attributes=attributes,
        arrays=entries(),
        provenance=store.provenance(inputs=factors.source.get("inputs", {}), **attributes),
    )


def load_factors(path: str | Path) -> Factors:
    """Open a factors file; each layer's matrices are read, and their checksums verified, on use.

    Raises:
        SchemaError: not a factors file, or layers whose entries are missing or misshapen.
    """
    header = store.open_file(path, format="refcurv-factors")
    if "unfinished" in header.attributes:
        raise SchemaError(
            f"{path}: the checkpoint of an unfinished collection. Run the same command again to "
            "finish it."
        )
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in header.entries))
    if not names:
        raise SchemaError(f"{path}: holds no layer; was its collection interrupted?")
    for name in names:
        for part, dims in (("sum_A", 2), ("n_A", 0), ("sum_G", 2), ("n_G", 0)):
            info = header.entries.get(f"{name}.{part}")
            if info is None or len(info.shape) != dims or len(set(info.shape)) > 1:
                raise SchemaError(
                    f"{path}: layer {name!r} needs {part} as a "
                    f"{'square matrix' if dims else 'number'}; "
                    f"got {'nothing' if info is None else info.shape}."
                )
    at = header.attributes
    try:
        return Factors(
            Lazy(names, lambda name: _read_factor(header, name)),
            Fisher(str(at["fisher"])),
            Rows(str(at["rows"])),
            int(at["seed"]),
            int(at["draws"]),
            str(at["dtype"]),
            int(at["shard_rows"]),
            store.Source(header),
        )
    except (KeyError, ValueError) as error:
        raise SchemaError(
            f"{path}: root attributes are not those of a factors file: {error}."
        ) from None


def _read_factor(header: store.Header, name: str) -> Factor:
    sum_A, n_A, sum_G, n_G = (
        store.read(header, f"{name}.{part}", finite=True)
        for part in ("sum_A", "n_A", "sum_G", "n_G")
    )
    if n_A < 1 or n_G < 1:
        raise SchemaError(f"{header.path}: layer {name!r} counts {n_A} and {n_G} rows.")
    at = header.entries[f"{name}.sum_G"].attributes
    try:
        errors = [float(at[part]) if part in at else None for part in _ERRORS]
    except ValueError as error:
        raise SchemaError(f"{header.path}: sum_G of {name!r}: no standard error: {error}") from None
    return Factor(sum_A, int(n_A), sum_G, int(n_G), *errors)
