"""Edits that go straight into a file: the bytes of the saved one, one layer in memory at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import config, opened_for_lies, random_parameters
from test_factors import BIASED

import refcurv as rc
from refcurv.cli import main
from refcurv.editing.kfac import edit_work
from refcurv.editing.record import EditRecord, done_to
from refcurv.editing.variants import CONTROLS, control, control_work
from refcurv.law.checks import ChecksumError
from refcurv.model.weights import Model

LAYERS = "blocks.*.mlp.*"
RHO = {"blocks.0.mlp.{gate,up}": 0.6, "blocks.1.mlp.*": 0.9, "blocks.0.mlp.down": 1.0}


@pytest.fixture
def here(tmp_path: Path) -> tuple[Model, Path]:
    """A model in a file, stored in bfloat16 and float32, and a joint basis of its layers."""
    made = config(vocabulary=20, width=12, mlp_width=10, biases=BIASED)
    parameters = random_parameters(made, 0)
    stored = {n: "float32" if "blocks.1" in n else "bfloat16" for n in parameters}
    rc.save(Model(made, parameters, "float64", stored), tmp_path / "w.h5")
    model = rc.load(tmp_path / "w.h5")
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, 20, (12, 8)))
    rc.save_factors(rc.collect(model, corpus, LAYERS), tmp_path / "f.h5")
    main(["decompose", str(tmp_path / "f.h5"), "-o", str(tmp_path / "b.h5"), "--bias", "joint"])
    return model, tmp_path


def said(record: EditRecord) -> dict[str, Any]:
    return {"edit": record.to_json(), "seed": 3}


@pytest.mark.parametrize("kind", [None, *CONTROLS])
@pytest.mark.parametrize("rho", [RHO, 1.0], ids=["cut", "whole"])
def test_an_edit_into_a_file_is_the_saved_one(here, kind: str | None, rho: Any) -> None:
    """Also of a file that was edited already: it says both edits."""
    (model, folder), basis = here, rc.load_bases(here[1] / "b.h5")
    for name in ("first", "second"):
        if kind is None:
            edited, record = rc.edit(model, basis, rho, force=True)
            work = edit_work(model, basis, rho, force=True)
        else:
            edited, record = control(model, basis, rho, kind, 3, force=True)
            work = control_work(model, basis, rho, kind, 3, force=True)
        rc.save(edited, folder / "saved.h5", said(record))
        got = done_to(work, folder / f"{name}.h5", said)
        assert got == record or repr(got) == repr(record)  # NaN is not NaN
        assert (folder / "saved.h5").read_bytes() == (folder / f"{name}.h5").read_bytes()
        model = rc.load(folder / f"{name}.h5")
    assert rho is not RHO or len(model.edits) == 2


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(here) -> None:
    """Of the arrays that steps make, those of one layer are alive when the next one begins."""
    (model, folder), basis = here, rc.load_bases(here[1] / "b.h5")
    work, alive, seen = edit_work(model, basis, 0.5), [], []

    def spied():
        steps = work.steps
        while True:
            gc.collect()
            seen.append(sum(ref() is not None for ref in alive))
            try:
                step = next(steps)
            except StopIteration:
                return
            alive[:] = [*alive, *map(weakref.ref, step[0].values())]
            yield step
            del step

    counted = type(work)(work.begun, work.layers, spied(), work.joint)
    done_to(counted, folder / "out.h5", said)
    assert len(alive) == 6 + 4  # some have a bias
    assert max(seen) == 0, seen


def test_a_failure_meanwhile_leaves_what_was_there(here) -> None:
    (model, folder), basis = here, rc.load_bases(here[1] / "b.h5")
    out = folder / "out.h5"
    assert main(["edit", str(folder / "w.h5"), str(folder / "b.h5"), "-o", str(out),
                 "--rho", "blocks.0.mlp.*=0.5"]) == 0  # fmt: skip
    assert rc.load(out).edits
    out.write_bytes(b"old")
    with opened_for_lies(folder / "b.h5") as file:
        file["blocks/1/mlp/up/U_A"][0, 0] += 1
    with pytest.raises(ChecksumError):
        done_to(edit_work(model, basis, 0.5), out, said)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in folder.iterdir()) == ["b.h5", "f.h5", "out.h5", "w.h5"]
