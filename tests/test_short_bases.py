"""Bases whose eigenvectors are kept in float32: how far that moves what is made with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature.bases import Bases
from refcurv.curvature.checks import require_basis
from refcurv.editing.variants import control
from refcurv.files import store
from refcurv.law.checks import ConventionError, SchemaError

UNIT = 2.0**-24
"""A number is off by at most this share of it when it is rounded to float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("short")
    made = config(biases=("up",), layers=1)
    rc.save(rc.Model(made, random_parameters(made, 1)), at / "w.h5")
    rc.save_corpus(rc.Corpus(np.random.default_rng(0).integers(0, 7, (9, 8))), at / "c.h5")
    found = rc.collect(rc.load(at / "w.h5"), rc.load_corpus(at / "c.h5"), "blocks.0.mlp.*")
    rc.save_factors(found, at / "f.h5")
    return at


def both(folder: Path, bias: str = "separate") -> tuple[rc.Model, Bases, Bases]:
    factors = rc.load_factors(folder / "f.h5")
    return (
        rc.load(folder / "w.h5"),
        rc.decompose(factors, bias),
        rc.decompose(factors, bias, dtype="float32"),
    )


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_an_edit_by_a_short_basis_is_as_near_as_is_said(bias: str, folder: Path) -> None:
    """The same pairs are kept; ‖ΔW'‖ <= 2 u (√O + √I) ‖W‖. Observed: 2 to 20 % of it."""
    model, long, short = both(folder, bias)
    for rho in (0.3, 0.7, 0.95):
        (one, a), (two, b) = rc.edit(model, long, rho), rc.edit(model, short, rho)
        assert [x.kept for x in a.layers] == [x.kept for x in b.layers]
        for name in long:
            W = model.parameters[f"{name}.weight"]
            if bias == "joint" and f"{name}.bias" in model.parameters:
                W = np.hstack([W, model.parameters[f"{name}.bias"][:, None]])
            off = one.parameters[f"{name}.weight"] - two.parameters[f"{name}.weight"]
            bound = 2 * UNIT * sum(map(np.sqrt, W.shape)) * np.linalg.norm(W)
            assert 1e-3 * bound < np.linalg.norm(off) <= bound, name


def test_only_the_eigenvectors_are_rounded_and_each_once(folder: Path) -> None:
    _, long, short = both(folder)
    for name, one in short.items():
        require_basis("test", name, one)
        for side in ("U_A", "U_G"):
            U, kept = getattr(long[name], side), getattr(one, side)
            assert kept.dtype == np.float32 and kept.tobytes() == U.astype("f4").tobytes()
        for side in ("mu", "lam", "raised_A", "raised_G", "rounding"):
            assert np.all(getattr(one, side) == getattr(long[name], side))
    with pytest.raises(ConventionError, match="dtype"):
        rc.decompose(rc.load_factors(folder / "f.h5"), dtype="float16")


def test_the_file_of_a_short_basis_is_half_as_large_and_read_by_all(
    folder: Path, tmp_path: Path, capsys
) -> None:
    """decompose, inspect, edit, its controls and validate, from the command line."""
    f, w, b = (str(folder / "f.h5"), str(folder / "w.h5"), str(tmp_path / "b.h5"))
    assert main(["decompose", f, "-o", b, "--dtype", "float32"]) == 0
    made = both(folder)[2]
    rc.save_bases(made, tmp_path / "again.h5")
    back = rc.load_bases(b)
    entries = store.open_file(b).entries
    assert {i.dtype for n, i in entries.items() if ".U_" in n} == {"float32"}
    for name, one in back.items():
        for part in ("U_A", "mu", "U_G", "lam"):
            assert getattr(one, part).tobytes() == getattr(made[name], part).tobytes()
    assert [i.sha256 for i in store.open_file(tmp_path / "again.h5").entries.values()] == [
        i.sha256 for i in entries.values()
    ]
    for command in (
        ["inspect", b],
        ["edit", w, b, "-o", str(tmp_path / "e.h5"), "--rho", "0.6"],
        *(["edit", w, b, "-o", str(tmp_path / "e.h5"), "--rho", "0.6", "--control", kind]
          for kind in ("random-basis", "random-pairs", "inputs", "outputs")),
    ):  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
    assert main(["validate", b, "--reference", f]) == 0, capsys.readouterr().out
    assert main(["validate", b, "--reference", f, "--basis", b]) == 0


def test_every_function_that_takes_bases_takes_short_ones(folder: Path, tmp_path: Path) -> None:
    """A control's random basis and one_sided are saved too; EK-FAC and bands come out near."""
    model, long, short = both(folder)
    corpus = rc.load_corpus(folder / "c.h5")
    for made in (rc.random_basis(short, 1), rc.one_sided(short, "inputs")):
        rc.save_bases(made, tmp_path / "made.h5")
        assert list(rc.load_bases(tmp_path / "made.h5")) == list(short)
    for kind in ("random-pairs", "outputs"):
        control(model, short, 0.5, kind, 0)
    near = [rc.estimators.ekfac(model, corpus, basis, per="token") for basis in (long, short)]
    for name in long:
        a, b = (one[name].sum_Lambda for one in near)
        assert np.abs(a - b).max() <= 16 * UNIT * np.abs(a).max()


def test_eigenvectors_of_another_dtype_are_refused(folder: Path, tmp_path: Path) -> None:
    _, long, _ = both(folder)
    half = {name: replace(one, U_G=one.U_G.astype("f2")) for name, one in long.items()}
    entries = [
        store.Entry(f"{name}.{part}", getattr(one, part))
        for name, one in half.items()
        for part in ("U_A", "mu", "U_G", "lam")
    ]
    store.write(tmp_path / "b.h5", format="refcurv-basis", attributes={}, arrays=entries,
                provenance={})  # fmt: skip
    with pytest.raises(SchemaError, match=r"must be .* of float64; got .* of float16"):
        rc.load_bases(tmp_path / "b.h5")
