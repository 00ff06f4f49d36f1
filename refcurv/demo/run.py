"""Collect → decompose → edit → evaluate on the shipped model, as one function.

`model.h5` is a small OLMo-2 trained with this package's own backward by
validation/paper/train.py; `corpus.h5` holds a fresh sample of its training mixture for the factors,
and the populations that it is judged on. Layers and rho were tuned on the `dev` split (by
validation/paper/tune.py); the table reports the `test` split.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import refcurv as rc
from refcurv.evaluation.bands import Quantity, bands
from refcurv.files import store
from refcurv.files.disk import machine_faults, sync_folder
from refcurv.law.checks import SchemaError
from refcurv.model.config import expand
from refcurv.passes.parallel import Progress

HERE = Path(__file__).parent
MODEL, CORPUS = HERE / "model.h5", HERE / "corpus.h5"

COLLECTED = "blocks.*.mlp.*"
"""What it collects factors of: the bands are shown for every MLP projection."""

LAYERS = "blocks.3.mlp.{gate,up}"
"""What the demo edits: gate and up of the last block."""

RHO = 0.84
"""The share of curvature mass that it keeps."""

Stage = Callable[[str], Progress]
"""Given a stage's name, what to call with (done, all)."""


def run(folder: str | Path, stage: Stage, *, dtype: str = "float64") -> dict[str, Any]:
    """The main job on the shipped files; writes factors.h5, basis.h5, edited.h5 and results.json.

    Returns what results.json holds. All but the seconds and the machine in it is determined by
    the shipped files.
    """
    folder = _made(Path(folder))
    model, corpus = rc.load(MODEL, dtype=dtype), rc.load_corpus(CORPUS)
    seconds: dict[str, float] = {}
    with _timed(seconds, "collect"):
        factors = rc.collect(model, corpus, COLLECTED, progress=stage("collect"))
        rc.save_factors(factors, folder / "factors.h5")
    with _timed(seconds, "decompose"):
        basis = rc.decompose(factors, progress=stage("decompose"))
        rc.save_bases(basis, folder / "basis.h5")
    with _timed(seconds, "edit"):
        edited, record = rc.edit(model, basis, {LAYERS: RHO})
        rc.save(edited, folder / "edited.h5", {"edit": record.to_json()})
    with _timed(seconds, "evaluate"):
        table = rc.evaluate(edited, corpus, baseline=model, progress=stage("evaluate"))
    with _timed(seconds, "bands"):
        quotes, clean = (corpus.populations[name] for name in ("quotes_test", "language_test"))
        found = {
            quantity: bands(model, basis, quotes, clean, quantity=quantity, progress=stage("bands"))
            for quantity in Quantity
        }
    results = {
        "title": "Memory and reasoning along the spectrum of loss curvature",
        "refcurv": store.provenance()["refcurv"],
        "settings": {
            "collected": COLLECTED,
            "layers": LAYERS,
            "rho": RHO,
            "fisher": str(factors.fisher),
            "seed": factors.seed,
            "dtype": dtype,
            "split": table.split,
            "calibration_tokens": int(corpus.tokens.size),
            "architecture": describe(model),
        },
        "edit": record.to_json(),
        "evaluation": table.to_json(),
        "bands": {name: one.to_json() for name, one in found[Quantity.PAIR_MASS].items()},
        "input_bands": {name: one.to_json() for name, one in found[Quantity.INPUT_RANK].items()},
        "spectrum": {
            name: {"mu": basis[name].mu.tolist(), "lam": basis[name].lam.tolist()}
            for name in expand(LAYERS, list(basis))
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "files": {
            "model": str(MODEL),
            "corpus": str(CORPUS),
            **{name: f"{name}.h5" for name in ("factors", "basis", "edited")},
        },
        "provenance": store.provenance(inputs=store.inputs(model.source, corpus.source)),
    }
    write_json(results, folder / "results.json")
    return results


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


def write_json(data: object, path: Path) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(f".{path.name}.partial")
    with machine_faults("write", path):
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _made(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise SchemaError(f"demo: {str(folder)!r} is no folder. Name another with --out.")
    with machine_faults("demo", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
