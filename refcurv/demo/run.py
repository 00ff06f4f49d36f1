"""Collect → decompose → edit → evaluate → compare, on the shipped model or a user's own.

`model.h5` is a small Qwen 3 trained with this package's own backward by
validation/paper/train.py; `corpus.h5` holds a fresh sample of its training mixture for the factors,
and the populations that it is judged on. Layers and rho were tuned on the `dev` split (the sweep of
validation/paper/lm.py); the table reports the `test` split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import refcurv as rc
from refcurv.curvature import room
from refcurv.curvature.eigenbasis import Bases
from refcurv.demo.controls import Setting, controls
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
from refcurv.files.disk import machine_faults, require_apart, require_writable, write_json
from refcurv.law.checks import SchemaError, require_choice
from refcurv.law.conventions import Bias
from refcurv.model.corpus import SPLITS, Population, Populations
from refcurv.model.weights import expand
from refcurv.passes.parallel import Progress

HERE = Path(__file__).parent
MODEL, CORPUS = HERE / "model.h5", HERE / "corpus.h5"

COLLECTED = "blocks.*.mlp.*"
"""What it collects factors of: the bands are shown for every MLP projection."""

LAYERS = "blocks.3.mlp.{gate,up}"
"""What the demo edits: gate and up of the last block."""

RHO = 0.83
"""The share of curvature mass that it keeps."""

TITLE = "Memory and reasoning along the spectrum of loss curvature"

UNFINISHED = "results.json.unfinished"
"""What is known of results.json, until it is whole."""

WRITTEN = (
    "factors.h5", "factors.h5.unfinished", "basis.h5", "edited.h5", "results.json", UNFINISHED,
)  # fmt: skip

Stage = Callable[[str], Progress]
"""Given a stage's name, what to call with (done, all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Two files and the choices of `collect`, `decompose`, `edit` and `evaluate`.

    Fields: weights, corpus, files; layers, whose factors are collected; rho, one share for all of
    them or {pattern: share}; fisher, rows, seed, bias, split, dtype.
    """

    weights: str | Path
    corpus: str | Path
    layers: str
    rho: float | Mapping[str, float]
    fisher: str = "sampled"
    rows: str = "reached"
    seed: int = 0
    bias: str = "separate"
    split: str = "test"
    dtype: str = "float64"


DEMO = Job(weights=MODEL, corpus=CORPUS, layers=COLLECTED, rho=MappingProxyType({LAYERS: RHO}))
"""What the demo does."""


def run(folder: str | Path, stage: Stage, job: Job = DEMO) -> dict[str, Any]:
    """The main job on two files; writes factors.h5, basis.h5, edited.h5 and results.json.

    Everything that can be checked is checked before the work. Returns what results.json holds;
    until that is whole, results.json.unfinished has what is known. All but the seconds and the
    machine in it is determined by the files and the choices. A corpus without populations of the
    split is not evaluated; bands need a memorised population (`recite`) and a clean one (`text`),
    controls a clean one in the dev split too. A collection that was interrupted goes on where it
    was.

    Proof: tests/test_demo.py::test_the_report_of_a_users_own_files,
        ::test_a_report_refuses_before_the_work, ::test_what_was_evaluated_is_kept
    """
    model, corpus = rc.load(job.weights, dtype=job.dtype), rc.load_corpus(job.corpus)
    cut, judged = _checked(job, model, corpus)
    folder = _made(Path(folder), job)
    seconds: dict[str, float] = {}
    known: dict[str, Any] = {}

    def keep(**found: Any) -> None:
        """What is known so far, on the disk: a later failure does not take it along."""
        known.update(found)
        write_json(known, folder / UNFINISHED)

    with _timed(seconds, "collect"):
        factors = _factors(job, model, corpus, folder / "factors.h5", stage("collect"))
    with _timed(seconds, "decompose"):
        basis = rc.decompose(factors, job.bias, progress=stage("decompose"))
        rc.save_bases(basis, folder / "basis.h5")
    with _timed(seconds, "edit"):
        edited, record = rc.edit(model, basis, job.rho)
        rc.save(edited, folder / "edited.h5", {"edit": record.to_json()})
        keep(edit=record.to_json())
    table = Evaluation(job.split, job.dtype, job.dtype, ())
    others: dict[str, Any] = {"left_out": f"the corpus has no population of split {job.split!r}."}
    if judged:
        with _timed(seconds, "evaluate"):
            before, after = _measured(job, model, edited, corpus, stage, keep)
            table = compare(after, before)
        with _timed(seconds, "controls"):
            setting = Setting(
                model, _light(model, job), basis, record, corpus, job.split, before, after, job.seed
            )
            others = controls(setting, stage("controls"))
            keep(evaluation=table.to_json(), controls=others)
    with _timed(seconds, "bands"):
        found = _bands(model, basis, judged, stage)
    results = {
        "title": TITLE,
        "refcurv": store.provenance()["refcurv"],
        "settings": _settings(job, model, corpus),
        "edit": record.to_json(),
        "evaluation": table.to_json(),
        "controls": others,
        "bands": {name: one.to_json() for name, one in found[Quantity.PAIR_MASS].items()},
        "input_bands": {name: one.to_json() for name, one in found[Quantity.INPUT_RANK].items()},
        "spectrum": {
            name: {"mu": basis[name].mu.tolist(), "lam": basis[name].lam.tolist()} for name in cut
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "files": {
            "model": str(job.weights),
            "corpus": str(job.corpus),
            **{name: f"{name}.h5" for name in ("factors", "basis", "edited")},
        },
        "provenance": store.provenance(inputs=store.inputs(model.source, corpus.source)),
    }
    write_json(results, folder / "results.json")
    (folder / UNFINISHED).unlink(missing_ok=True)
    return results


def _factors(
    job: Job, model: rc.Model, corpus: rc.Corpus, path: Path, progress: Progress
) -> rc.Factors:
    """Collected and on the disk; what an interrupted collection had is used."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    made = rc.collect(
        model, corpus, job.layers, job.fisher, job.seed,
        rows=job.rows, checkpoint=unfinished, progress=progress,
    )  # fmt: skip
    rc.save_factors(made, path, unfinished)
    return made


def _measured(
    job: Job,
    model: rc.Model,
    edited: rc.Model,
    corpus: rc.Corpus,
    stage: Stage,
    keep: Callable[..., None],
) -> tuple[Measurement, Measurement]:
    """Before and after; the table so far is kept with every population that is done."""

    def one(so_far: Measurement) -> None:
        keep(evaluation=compare(so_far, None).to_json())

    before = measure(model, corpus, split=job.split, progress=stage("baseline"), each=one)

    def other(so_far: Measurement) -> None:
        keep(evaluation=compare(so_far, before.only(so_far.populations)).to_json())

    after = measure(edited, corpus, split=job.split, progress=stage("evaluate"), each=other)
    return before, after


def _checked(job: Job, model: rc.Model, corpus: rc.Corpus) -> tuple[list[str], Populations]:
    """The layers that are edited and the populations that are judged; bad choices end here."""
    require_choice("report", "split", job.split, SPLITS)
    require_choice("report", "bias", job.bias, list(Bias))
    named = expand(job.layers, list(model.config.linear_layers()))
    asked = job.rho if isinstance(job.rho, Mapping) else {"**": job.rho}
    cut = list(shares("report", "rho", model, named, asked))
    require_exact("report", model, cut)
    width = {f"{side} of {name!r}": n for name in named
             for side, n in zip("GA", model.config.linear_layers()[name], strict=True)}  # fmt: skip
    room.in_flight("report", room.to_decompose(width))
    read = {name: p for name, p in corpus.populations.items() if p.split in (job.split, "dev")}
    require_readable(read, model.config)
    judged = {name: p for name, p in read.items() if p.split == job.split}
    return cut, judged


def _settings(job: Job, model: rc.Model, corpus: rc.Corpus) -> dict[str, Any]:
    """The choices, as the report shows them; one pattern is named apart from its share."""
    asked = dict(job.rho) if isinstance(job.rho, Mapping) else {job.layers: job.rho}
    one = {"layers": next(iter(asked)), "rho": next(iter(asked.values()))}
    return {
        "collected": job.layers,
        **(one if len(asked) == 1 else {"rho": asked}),
        **{
            name: getattr(job, name)
            for name in ("fisher", "rows", "seed", "bias", "dtype", "split")
        },
        f"calibration_{'tokens' if corpus.images is None else 'images'}": corpus.label.size,
        "architecture": describe(model),
    }


def _light(model: rc.Model, job: Job) -> rc.Model:
    """The model in float32 where that holds its stored weights: half the time for each search."""
    if model.dtype == "float32" or "float64" in model.stored.values():
        return model
    return rc.load(job.weights, dtype="float32")


def _bands(
    model: rc.Model, basis: Bases, judged: Populations, stage: Stage
) -> dict[Quantity, dict[str, Bands]]:
    """Both quantities on the first memorised and the first clean population; empty without."""
    tokens = [p for p in judged.values() if isinstance(p, Population)]
    hot, cold = (next((p for p in tokens if p.kind == kind), None) for kind in ("recite", "text"))
    if hot is None or cold is None:
        return {quantity: {} for quantity in Quantity}
    return {
        quantity: bands(model, basis, hot, cold, quantity=quantity, progress=stage("bands"))
        for quantity in Quantity
    }


def describe(model: rc.Model) -> str:
    """The model in one line."""
    c = model.config
    size = sum(1 for _ in c.parameter_shapes())
    count = sum(_product(shape) for shape in c.parameter_shapes().values())
    return (
        f"{count:,} parameters in {size} tensors: {c.layers} blocks, width {c.width}, {c.heads} "
        f"heads of {c.head_width} ({c.kv_heads} key-value), MLP {c.mlp_width}, vocabulary "
        f"{c.vocabulary}, {c.norm_place}-norm, QK-norm {c.qk_norm}"
    )


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _made(folder: Path, job: Job) -> Path:
    """The folder, in which every file can be written and none takes an input's place."""
    if folder.exists() and not folder.is_dir():
        raise SchemaError(f"demo: {str(folder)!r} is no folder. Name another with --out.")
    with machine_faults("demo", folder):
        folder.mkdir(parents=True, exist_ok=True)
    outputs = {f"{name} of --out": folder / name for name in WRITTEN}
    require_apart("report", outputs, {"WEIGHTS": job.weights, "CORPUS": job.corpus})
    for path in outputs.values():
        require_writable("report", path)
    return folder


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
