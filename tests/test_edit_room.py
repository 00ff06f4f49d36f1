"""What an edit into a file takes: one layer's matrices, and of what stays what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import config, random_parameters
from test_room import peak

import refcurv as rc
from refcurv.curvature import bases_file
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.editing.kfac import edit_work
from refcurv.editing.record import EditRecord, done_to
from refcurv.files import bfloat16, digest, weights
from refcurv.law.checks import NonFiniteError
from refcurv.model.weights import Model

GATE = "blocks.0.mlp.gate"


def said(record: EditRecord) -> dict[str, Any]:
    return {"edit": record.to_json()}


def basis_of(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.normal(size=(n, n)))[0], np.sort(rng.exponential(size=n))[::-1].copy()


def files(folder: Path, stored: str = "bfloat16", **shape: int) -> tuple[Model, Bases]:
    """A model in a file, and a basis of its gate in another."""
    made = config(**{"layers": 1, "heads": 2, "kv_heads": 2, **shape})
    parameters = random_parameters(made, 0)
    rc.save(Model(made, parameters, "float64", dict.fromkeys(parameters, stored)), folder / "w.h5")
    O, I = made.linear_layers()[GATE]
    one = Eigenbasis(*basis_of(I, 0), *basis_of(O, 1))
    model = rc.load(folder / "w.h5")
    rc.save_bases(Bases({GATE: one}, weights=digest.digest(model)), folder / "b.h5")
    return model, rc.load_bases(folder / "b.h5")


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_an_edit_takes_its_basis_and_five_matrices(stored: str, tmp_path, monkeypatch) -> None:
    """W, its projection, W', the difference in both bases; one mask."""
    monkeypatch.setattr(bfloat16, "PANEL", 2**10)
    O, I = 700, 300
    model, basis = files(tmp_path, stored, mlp_width=O, width=I, head_width=2)

    def work() -> None:
        done_to(edit_work(model, basis, 0.6), tmp_path / "out.h5", said)

    work()  # what is made once
    bases, one = 8 * (O * O + I * I), 8 * O * I
    assert 0.95 * (bases + 5 * one) <= peak(work) <= 1.05 * (bases + 5.25 * one)


def test_what_stays_takes_what_is_stored(tmp_path, monkeypatch) -> None:
    """An embedding in bfloat16: two bytes a number. It was 25."""
    monkeypatch.setattr(bfloat16, "PANEL", 2**10)
    model, basis = files(tmp_path, vocabulary=200_000, width=16, head_width=8, mlp_width=4)

    def work() -> None:
        done_to(edit_work(model, basis, 0.6), tmp_path / "out.h5", said)

    work()
    assert peak(work) <= 1.25 * 2 * 200_000 * 16
    assert peak(lambda: rc.save(model, tmp_path / "again.h5")) <= 1.25 * 2 * 200_000 * 16


@pytest.mark.parametrize("stored", weights.STORED)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_stays_has_the_bits_of_what_is_widened_and_rounded(
    stored: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, stored, mlp_width=9)
    model = rc.load(tmp_path / "w.h5", dtype)
    changed = model.with_parameters({"head.weight": np.ones((7, 8), dtype)})
    for name, one in (("same", model), ("changed", changed)):
        rc.save(one, tmp_path / f"{name}.h5")
        with monkeypatch.context() as patch:
            patch.setattr(weights, "untouched", lambda _: {})
            rc.save(one, tmp_path / "long.h5")
        assert (tmp_path / f"{name}.h5").read_bytes() == (tmp_path / "long.h5").read_bytes()
    assert (rc.load(tmp_path / "changed.h5").parameters["head.weight"] == 1).all()


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_what_stays_is_checked(stored: str, tmp_path: Path, monkeypatch) -> None:
    """A file may hold what `save` would not have written."""
    monkeypatch.setattr(bfloat16, "PANEL", 4)
    model, _ = files(tmp_path, stored, mlp_width=9)
    held = {n: weights.narrow(np.array(x), stored) for n, x in model.parameters.items()}
    held["embed.weight"][3, 5] = 0x7F80 if stored == "bfloat16" else np.inf
    entries = (weights.parameter_entry(n, held[n], stored) for n in held)
    weights.write(tmp_path / "bad.h5", model.config, entries, {})
    with pytest.raises(NonFiniteError, match=r"load: .*'embed.weight' holds inf at \[3, 5\]"):
        rc.save(rc.load(tmp_path / "bad.h5"), tmp_path / "out.h5")


def test_an_edit_reads_each_basis_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask whether a layer has a basis reads none."""
    model, basis = files(tmp_path, mlp_width=9)
    read: list[str] = []
    right = bases_file.read_basis
    monkeypatch.setattr(bases_file, "read_basis", lambda h, n: read.append(n) or right(h, n))
    done_to(edit_work(model, basis, 0.5), tmp_path / "out.h5", said)
    assert read == [GATE]


def test_panels_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of no axis, no number, columns of others, in Fortran's order; NaN and infinity."""
    x = np.random.default_rng(0).normal(size=(7, 5)) * 10.0 ** np.arange(-40, 44, 17)
    x[1, 2], x[2, 3], x[6, 4] = np.nan, np.inf, 1e300
    with np.errstate(over="ignore"):
        short = x.astype("f4")
    for values in (x, short, x.T, x[:, 1:3], x[:0], x[0], x[0, 0], np.array(1.5)):
        with np.errstate(over="ignore"):
            whole = bfloat16._rounded(np.asarray(values))
        for panel in (1, 4, 11, 100):
            monkeypatch.setattr(bfloat16, "PANEL", panel)
            bits = bfloat16.to_bfloat16(values)
            assert bits.shape == np.shape(values)
            assert bits.tobytes() == whole.tobytes()
            wide = bfloat16.from_bfloat16(bits)
            assert bfloat16.all_finite(bits) == np.isfinite(wide).all()
            for dtype in ("float32", "float64"):
                assert bfloat16.widened(bits, dtype).tobytes() == wide.astype(dtype).tobytes()
