"""The whole method on two files: collect → decompose → edit → evaluate → compare → results.

`refcurv demo` runs it on the shipped model, `refcurv report` on a user's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import refcurv as rc
from refcurv.curvature import room
from refcurv.curvature.bases import Bases
from refcurv.curvature.bases_file import kept_by
from refcurv.curvature.factors import asked as collected
from refcurv.curvature.made_from import require_made_from
from refcurv.curvature.settling import warning_of
from refcurv.editing.record import require_exact, shares
from refcurv.evaluation.bands import Bands, Quantity, bands
from refcurv.evaluation.suite import (
    Evaluation,
    Measurement,
    compare,
    measure,
    require_readable,
)
from refcurv.files import store
from refcurv.files.disk import alone, write_json
from refcurv.files.lazy import Lazy
from refcurv.files.paths import PathLike, machine_faults, require_space, unfinished
from refcurv.judge.controls import Setting, controls
from refcurv.law.checks import EmptyError, require_choice
from refcurv.law.conventions import Bias
from refcurv.law.words import number_of
from refcurv.model.config import TABLES
from refcurv.model.corpus import SPLITS, Population, Populations
from refcurv.model.patterns import expand
from refcurv.passes.shards import shards
from refcurv.passes.sweep import require_few_passes
from refcurv.progress import Progress, gone_on, silent
from refcurv.report.folder import (
    BASIS,
    CHOICE,
    CONTROLS,
    EDITED,
    FACTORS,
    MARK,
    RESULTS,
    TITLE,
    is_report,
    prepare,
    undraw,
)
from refcurv.sweeps import choice

Stage = Callable[[str], Progress]
"""Given a stage's name, what to call with (done, all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Two files and the choices of `collect`, `decompose`, `edit` and `evaluate`.

    Fields: weights, corpus, files; layers, whose factors are collected (empty: what the choice of
    rho is between); rho, one share for all of them, {pattern: share}, or None: `sweeps.choice`
    tries some on dev; fisher, rows, seed, bias, split, dtype; factors, basis, files that are taken
    instead of made. Then layers chooses among theirs, and how they were made is theirs too.
    """

    weights: str | Path
    corpus: str | Path
    layers: str
    rho: float | Mapping[str, float] | None
    fisher: str = "sampled"
    rows: str = "reached"
    seed: int = 0
    bias: str = "separate"
    split: str = "test"
    dtype: str = "float64"
    factors: str | Path | None = None
    basis: str | Path | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """A job at work: what it reads, where it writes, and what is known so far.

    Fields: job; given, factors and basis that need not be made; model; corpus; cut, the layers that
    are edited; judged, the populations of the
    split; folder; stage; told; known of results.json; seconds of each stage.
    """

    job: Job
    given: tuple[rc.Factors | None, Bases | None]
    model: rc.Model
    corpus: rc.Corpus
    cut: list[str]
    judged: Populations
    folder: Path
    stage: Stage
    told: Callable[[str], object]
    known: dict[str, Any]
    seconds: dict[str, float]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A stage, whose seconds are counted."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def keep(self, **found: Any) -> None:
        """What is known so far, on the disk: a later failure does not take it along."""
        self.known.update(found)
        write_json(self.known, unfinished(self.folder / RESULTS))


def run(
    job: Job,
    folder: PathLike,
    stage: Stage = lambda name: silent,
    told: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """The main job on two files; writes factors.h5, basis.h5, edited.h5 and results.json.

    Everything that can be checked is checked before the work. Returns what results.json holds;
    until that is whole, results.json.unfinished has what is known. All but the seconds and the
    machine in it is determined by the files and the choices. A corpus without populations of the
    split is not evaluated; bands need a memorised population (`recite`) and a clean one (`text`),
    controls a clean one in the dev split too. A collection that was interrupted goes on where it
    was, and so do controls and the choice of rho. `told` is called with what will be done and about
    how long it takes, before what takes long. `refcurv.report.folder.draw` makes figures and a page
    of the results.

    Raises:
        SchemaError: the folder has a file of one of these names that no report has written.
        ConventionError: another report is writing into it.

    Proof: tests/test_demo.py::test_the_report_of_a_users_own_files,
        ::test_a_report_refuses_before_the_work, ::test_what_was_evaluated_is_kept,
        tests/test_choice.py::test_a_report_without_rho_takes_what_dev_chooses
    """
    model, corpus = rc.load(job.weights, dtype=job.dtype), rc.load_corpus(job.corpus)
    given = _given(job, model, corpus)
    job, tried = _between(job, model, given[1] or given[0])
    cut, judged = _checked(job, model, corpus, given[1] or given[0])
    reads = {"WEIGHTS": job.weights, "CORPUS": job.corpus}
    reads |= {
        f"--{n}": path for n, path in (("factors", job.factors), ("basis", job.basis)) if path
    }
    folder = prepare(folder, reads)
    with alone("report", folder):
        _require_space(job, folder, model, given)
        known = {"title": TITLE, "refcurv": store.provenance()["refcurv"]}
        this = _Run(job, given, model, corpus, cut, judged, folder, stage, told, known, {})
        if not is_report(folder):
            this.keep()
        return _worked(this, tried)


def _worked(this: _Run, tried: tuple[str, ...]) -> dict[str, Any]:
    """What results.json holds in the end, and everything on the disk."""
    folder, told = this.folder, this.told
    if this.job.rho is None:
        told(choice.what_is_tried(tried))
    basis = _basis(this)
    if this.job.rho is None:
        this = _chosen(this, basis, tried)
    assert this.job.rho is not None
    for warning in (few := _few(this, basis)):
        told(f"warning: {warning}")
    with this.timed("edit"):
        edited, record = rc.edit(this.model, basis, this.job.rho)
        rc.save(edited, folder / EDITED, {"edit": record.to_json()})
        this.keep(edit=record.to_json())
    table, others = _evaluated(this, basis, edited, record)
    for warning in (unrecited := _unrecited(table)):
        told(f"warning: {warning}")
    with this.timed("bands"):
        found = _bands(this, basis)
    warnings = {"warnings": [*few, *unrecited]}
    results = _results(this, basis, record, table, others, found) | warnings
    write_json(results, folder / RESULTS)
    undraw(folder)
    for left in (unfinished(folder / RESULTS), folder / CONTROLS, folder / CHOICE):
        Path(left).unlink(missing_ok=True)
    return results


def _given(job: Job, model: rc.Model, corpus: rc.Corpus) -> tuple[rc.Factors | None, Bases | None]:
    """The factors and the basis of the job, if it has them: those of the wanted layers."""
    factors = rc.load_factors(job.factors) if job.factors else None
    basis = rc.load_bases(job.basis) if job.basis else None
    require_made_from("report", model, corpus, factors, basis)

    def some(of: Mapping[str, Any]) -> Lazy[Any]:
        linear = [n for n in of if n not in TABLES]
        if not linear:
            raise EmptyError(f"report: {job.factors} has tables alone. Collect layers to edit.")
        return Lazy(expand(job.layers or "**", linear), of.__getitem__)

    return (
        factors and replace(factors, layers=some(factors)),
        basis and replace(basis, layers=some(basis)),
    )


def _between(
    job: Job, model: rc.Model, given: Mapping[str, Any] | None
) -> tuple[Job, tuple[str, ...]]:
    """Without a rho: the patterns that it is chosen between, and the job with all their layers."""
    names = list(model.config.linear_layers() if given is None else given)
    if job.rho is not None:
        return job, ()
    tried = (job.layers,) if job.layers else choice.runs(model.config, names)
    return replace(job, layers=choice.together(tried)), tried


def _chosen(this: _Run, basis: Bases, tried: tuple[str, ...]) -> _Run:
    """The run with the layers and the rho that dev chooses."""
    with this.timed("choice"):
        one = choice.choose(
            this.model, this.corpus, tried, basis, this.job.seed, this.folder / CHOICE,
            this.stage("choice"), this.told,
        )  # fmt: skip
    seen = "; dev is reported as well, which flatters it" if this.job.split == "dev" else ""
    this.told(f"chosen: {one.sentence}{seen}")
    job = replace(this.job, rho={one.layers: one.rho})
    this.keep(chosen=f"{one.sentence}{seen}")
    return replace(this, job=job, cut=expand(one.layers, this.cut))


def _basis(this: _Run) -> Bases:
    """Given, or made of the factors and on the disk."""
    factors, basis = this.given
    if basis is not None:
        return basis
    if factors is None:
        with this.timed("collect"):
            factors = _factors(this)
    with this.timed("decompose"):
        basis = rc.decompose(factors, this.job.bias, progress=this.stage("decompose"))
        rc.save_bases(basis, this.folder / BASIS)
    return basis


def _factors(this: _Run) -> rc.Factors:
    """Collected and on the disk; what an interrupted collection had is used."""
    job, path = this.job, this.folder / FACTORS
    made = rc.collect(
        this.model, this.corpus, job.layers, job.fisher, job.seed,
        rows=job.rows, checkpoint=unfinished(path),
        progress=gone_on(this.stage("collect"), "shard"),
    )  # fmt: skip
    rc.save_factors(made, path, unfinished(path))
    return made


def _evaluated(
    this: _Run, basis: Bases, edited: rc.Model, record: rc.EditRecord
) -> tuple[Evaluation, dict[str, Any]]:
    """The table of the edit, and other cuts beside it."""
    job, model, corpus = this.job, this.model, this.corpus
    if not this.judged:
        why = f"the corpus has no population of split {job.split!r}."
        return Evaluation(job.split, job.dtype, job.dtype, ()), {"left_out": why}
    with this.timed("evaluate"):
        before, after = _measured(this, edited)
        table = compare(after, before)
    each = this.seconds["evaluate"] / 2
    with this.timed("controls"):
        setting = Setting(
            model, _light(model, job), basis, record, corpus, job.split, before, after, job.seed,
            each, this.folder / CONTROLS,
        )  # fmt: skip
        others = controls(setting, this.stage("controls"), this.told)
        this.keep(evaluation=table.to_json(), controls=others)
    return table, others


def _few(this: _Run, basis: Bases) -> list[str]:
    """What to say of edited layers whose rows are few."""
    found = warning_of(one for one in kept_by(basis) if one.layer in this.cut)
    return [found] if found else []


def _unrecited(table: Evaluation) -> list[str]:
    """What to say of passages that the model does not recite before the edit."""
    return [
        f"before the edit the model recites {row.before['strict']:.0%} of {row.name!r}, so that "
        "little can be seen of what the edit takes: `refcurv recite` finds what it does recite"
        for row in table.rows
        if row.kind == "recite" and row.before and row.before["strict"] < HALF
    ]


HALF = 0.5
"""Of passages: where fewer are recited before the edit, a report says so."""


def _measured(this: _Run, edited: rc.Model) -> tuple[Measurement, Measurement]:
    """Before and after; the table so far is kept with every population that is done."""
    corpus, split = this.corpus, this.job.split

    def one(so_far: Measurement) -> None:
        this.keep(evaluation=compare(so_far, None).to_json())

    before = measure(this.model, corpus, split=split, progress=this.stage("baseline"), each=one)

    def other(so_far: Measurement) -> None:
        this.keep(evaluation=compare(so_far, before.only(so_far.populations)).to_json())

    after = measure(edited, corpus, split=split, progress=this.stage("evaluate"), each=other)
    return before, after


def _results(
    this: _Run,
    basis: Bases,
    record: rc.EditRecord,
    table: Evaluation,
    others: dict[str, Any],
    found: dict[Quantity, dict[str, Bands]],
) -> dict[str, Any]:
    """What results.json holds."""
    job = this.job
    return {
        **{key: this.known[key] for key in MARK},
        "settings": _settings(this, basis),
        "edit": record.to_json(),
        "evaluation": table.to_json(),
        "controls": others,
        "bands": {name: one.to_json() for name, one in found[Quantity.PAIR_MASS].items()},
        "input_bands": {name: one.to_json() for name, one in found[Quantity.INPUT_RANK].items()},
        "kept": [one.to_json() for one in kept_by(basis) if one.layer in this.cut],
        "spectrum": {
            name: {"mu": basis[name].mu.tolist(), "lam": basis[name].lam.tolist()}
            for name in this.cut
        },
        "seconds": {name: round(value, 2) for name, value in this.seconds.items()},
        "files": {
            "model": str(job.weights),
            "corpus": str(job.corpus),
            "factors": str(job.factors or ("" if job.basis else FACTORS)),
            "basis": str(job.basis or BASIS),
            "edited": EDITED,
        },
        "provenance": store.provenance(inputs=store.inputs(this.model.source, this.corpus.source)),
    }


def _checked(
    job: Job, model: rc.Model, corpus: rc.Corpus, given: Mapping[str, Any] | None
) -> tuple[list[str], Populations]:
    """The layers that are edited and the populations that are judged; bad choices end here."""
    require_choice("report", "split", job.split, SPLITS)
    require_choice("report", "bias", job.bias, list(Bias))
    if job.rho is None:
        choice.require_dev("report", corpus)
    named = list(given or expand(job.layers, list(model.config.linear_layers())))
    asked = (
        job.rho
        if isinstance(job.rho, Mapping)
        else {"**": choice.SHARES[0] if job.rho is None else job.rho}
    )
    cut = list(shares("report", "rho", model, named, asked))
    require_exact("report", model, cut)
    width = {f"{side} of {name!r}": n for name in named
             for side, n in zip("GA", model.config.linear_layers()[name], strict=True)}  # fmt: skip
    if job.basis is None:
        room.in_flight("report", room.to_decompose(width))
    if given is None:  # what `collect` refuses would otherwise come behind what is told
        how, keep = collected(model.config, job.layers, job.fisher, job.seed, 1, job.rows)
        units = shards(corpus, model.config, keep)
        require_few_passes("collect", units, how, model.config.vocabulary)
    read = {name: p for name, p in corpus.populations.items() if p.split in (job.split, "dev")}
    require_readable(read, model.config)
    judged = {name: p for name, p in read.items() if p.split == job.split}
    return cut, judged


def _require_space(
    job: Job, folder: Path, model: rc.Model, given: tuple[rc.Factors | None, Bases | None]
) -> None:
    """The disk has room for factors, basis and edited weights; what lies there is replaced.

    Proof: tests/test_demo.py::test_a_report_refuses_what_it_could_not_judge_before_the_work
    """
    linear = model.config.linear_layers()
    names = given[1] or given[0] or expand(job.layers, list(linear))
    matrices = 8 * sum(n * n for name in names for n in linear[name])
    need = {FACTORS: 0 if any(given) else matrices, BASIS: 0 if given[1] else matrices}
    with machine_faults("report", folder):
        need[EDITED] = Path(job.weights).stat().st_size
        old = (folder / name for name, nbytes in need.items() if nbytes)
        there = sum(path.stat().st_size for path in old if path.is_file())
    require_space("report", folder / EDITED, sum(need.values()) - there)


def _settings(this: _Run, basis: Bases) -> dict[str, Any]:
    """The choices, as the report shows them; one pattern is named apart from its share.

    Of what was given they are those that it was made with, as far as it says them.
    """
    job, corpus, (factors, found) = this.job, this.corpus, this.given
    made = {"fisher": job.fisher, "rows": job.rows, "seed": job.seed}
    if factors is not None:
        made = {key: getattr(factors, key) for key in made}
    elif found is not None:
        made = {}
    taken = {key: str(getattr(job, key)) for key in ("factors", "basis") if getattr(job, key)}
    asked = dict(job.rho) if isinstance(job.rho, Mapping) else {job.layers: job.rho}
    one = {"layers": next(iter(asked)), "rho": next(iter(asked.values()))}
    return {
        **({"taken " + key: path for key, path in taken.items()} or {"collected": job.layers}),
        **(one if len(asked) == 1 else {"rho": asked}),
        **({"chosen": this.known["chosen"]} if "chosen" in this.known else {}),
        **made,
        **({"controls_seed": job.seed} if taken else {}),
        "bias": str(basis.bias),
        "dtype": job.dtype,
        "split": job.split,
        f"calibration_{'tokens' if corpus.images is None else 'images'}": _positions(corpus),
        "architecture": describe(this.model),
    }


def _positions(corpus: rc.Corpus) -> int:
    """Tokens without padding, or images."""
    return len(corpus.label) if corpus.images is not None else int(corpus.real.sum())


def _light(model: rc.Model, job: Job) -> rc.Model:
    """The model in float32 where that holds its stored weights: half the time for each search."""
    if model.dtype == "float32" or "float64" in model.stored.values():
        return model
    return rc.load(job.weights, dtype="float32")


def _bands(this: _Run, basis: Bases) -> dict[Quantity, dict[str, Bands]]:
    """Both quantities on the first memorised and the first clean population; empty without."""
    tokens = [p for p in this.judged.values() if isinstance(p, Population)]
    hot, cold = (next((p for p in tokens if p.kind == kind), None) for kind in ("recite", "text"))
    if hot is None or cold is None:
        return {quantity: {} for quantity in Quantity}
    return {
        quantity: bands(
            this.model, basis, hot, cold, quantity=quantity, progress=this.stage("bands")
        )
        for quantity in Quantity
    }


def describe(model: rc.Model) -> str:
    """The model in one line."""
    c = model.config
    size = sum(1 for _ in c.parameter_shapes())
    count = sum(math.prod(shape) for shape in c.parameter_shapes().values())
    return (
        f"{number_of(count, 'parameter')} in {number_of(size, 'tensor')}: "
        f"{number_of(c.layers, 'block')}, width {c.width}, {c.heads} "
        f"heads of {c.head_width} ({c.kv_heads} key-value), MLP {c.mlp_width}, vocabulary "
        f"{c.vocabulary}, {c.norm_place}-norm, QK-norm {c.qk_norm}"
    )
