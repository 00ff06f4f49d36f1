"""From a checkpoint to an edited weights file: every phase in a fresh process, timed."""

from __future__ import annotations

from pathlib import Path

from validation.bench.fresh import spawn
from validation.bench.measuring import Record, measured, tell
from validation.bench.proxies import Size, layers_of, load_ours, tokens_of


def pipeline(folder: Path, size: Size) -> Record:
    """{phase: its measurement}; the files that are made are deleted again."""
    phases: Record = {}
    for job in (run_convert, run_load, run_collect, run_decompose, run_edit):
        tell(f"pipeline: {job.__name__.removeprefix('run_')}")
        phases |= spawn(job, folder, size)
    for name in ("converted.h5", "f.h5", "b.h5", "edited.h5"):
        (folder / name).unlink()
    return phases


def run_convert(folder: Path, _size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    with measured(records, "convert"):
        rc.convert(folder / "checkpoint", folder / "converted.h5")
    return records


def run_load(folder: Path, _size: Size) -> Record:
    records: Record = {}
    with measured(records, "load, every parameter read"):
        load_ours(folder)
    return records


def run_collect(folder: Path, size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    model, corpus = rc.load(folder / "w.h5", dtype="float32"), rc.Corpus(tokens_of(folder, size))
    with measured(records, "collect, from the weights file"):
        factors = rc.collect(model, corpus, layers_of(range(size.layers)))
    with measured(records, "save_factors"):
        rc.save_factors(factors, folder / "f.h5")
    return records


def run_decompose(folder: Path, _size: Size) -> Record:
    import refcurv as rc
    from refcurv.curvature.resumed_bases import decompose_to

    records: Record = {}
    with measured(records, "decompose"):
        decompose_to(rc.load_factors(folder / "f.h5"), folder / "b.h5")
    return records


def run_edit(folder: Path, size: Size) -> Record:
    import refcurv as rc

    records: Record = {}
    pattern = f"blocks.{{{max(size.layers - 3, 0)}-{size.layers - 1}}}.mlp.{{gate,up}}"
    model, basis = rc.load(folder / "w.h5", dtype="float32"), rc.load_bases(folder / "b.h5")
    with measured(records, "edit"):
        edited, _record = rc.edit(model, basis, {pattern: 0.6})
    with measured(records, "save"):
        rc.save(edited, folder / "edited.h5")
    return records
