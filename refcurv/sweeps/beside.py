"""The factors and the basis of a sweep, kept beside its results for the next sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from refcurv.curvature.bases import Bases, decompose
from refcurv.curvature.bases_file import load_bases
from refcurv.curvature.factors import Factors, asked, collect
from refcurv.curvature.factors_file import load_factors, save_factors
from refcurv.curvature.resumed_bases import decompose_to
from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.files.paths import beside, mode_of, unfinished
from refcurv.law.checks import ConventionError
from refcurv.model.corpus import Corpus
from refcurv.model.weights import Model
from refcurv.progress import Progress, gone_on


@dataclass(frozen=True, slots=True)
class Collecting:
    """How `collect` is asked for what a sweep needs. Fields: fisher, rows, seed."""

    fisher: str = "sampled"
    rows: str = "reached"
    seed: int = 0


def basis_of(
    model: Model,
    corpus: Corpus,
    layers: Iterable[str],
    how: Collecting,
    output: Path | None,
    stage: Callable[[str], Progress],
) -> Bases:
    """The basis of some layers, collected from the corpus's own tokens and decomposed.

    With an output, factors and basis are kept beside it. Those that an earlier sweep left there
    serve again, if they are the same; a collection that was interrupted goes on.

    Raises:
        ConventionError: what lies there was made otherwise. What `collect` and `decompose` raise.

    Proof: tests/test_sweep.py::test_factors_and_basis_are_kept_beside_the_output
    """
    pattern = "{" + ",".join(layers) + "}"
    job, rows = asked(model.config, pattern, how.fisher, how.seed, 1, how.rows)
    if output is None:
        made = collect(
            model, corpus, pattern, how.fisher, how.seed, rows=how.rows, progress=stage("collect")
        )
        return decompose(made, progress=stage("decompose"))
    places = beside(output, "factors", "basis")
    factors_at, basis_at = places["factors"], places["basis"]
    if not mode_of("sweep", factors_at):
        made = collect(
            model, corpus, pattern, how.fisher, how.seed, rows=how.rows,
            checkpoint=unfinished(factors_at), progress=gone_on(stage("collect"), "shard"),
        )  # fmt: skip
        save_factors(made, factors_at, unfinished(factors_at))
    factors = load_factors(factors_at)
    same = (
        set(factors) == job.layers
        and (factors.fisher, factors.rows, factors.seed) == (job.fisher, rows, job.seed)
        and factors.weights == digest(model)
        and _inputs(factors) == store.inputs(model.source, corpus.source)
    )
    if not same:
        raise _stale(factors_at, "other weights, layers, tokens or choices")
    if not mode_of("sweep", basis_at):
        decompose_to(factors, basis_at, progress=stage("decompose"))
    basis = load_bases(basis_at)
    if list(_inputs(basis).values()) != [factors.source["sha256"]]:
        raise _stale(basis_at, "other factors")
    return basis


def _inputs(made: Factors | Bases) -> dict[str, str]:
    return dict(made.source["provenance"].get("inputs") or {})


def _stale(path: Path, what: str) -> ConventionError:
    return ConventionError(
        f"sweep: {str(path)!r} was made from {what} than this sweep's. Delete it, or give another "
        "name with -o."
    )
