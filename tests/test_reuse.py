"""A report of factors, or of a basis, that are there already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from strategies import case

import refcurv as rc
from refcurv.cli import main
from refcurv.pipeline import Job, run
from refcurv.report.page import _commands
from refcurv.report.printed import format_results

LAYERS = "blocks.*.mlp.*"
MORE = "blocks.*.mlp.*,blocks.0.attn.q,embed"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w.h5, c.h5; f.h5 of more layers than are wanted, and b.h5; files of others."""
    at = tmp_path_factory.mktemp("reuse")
    one = case(batch=6, length=9, biases=("q", "up"))
    model = rc.Model(one.config, one.parameters)
    rc.save(model, at / "w.h5")
    tokens = np.concatenate([one.token, one.token[::-1]])
    for name, some in (("c", one.token), ("c2", one.token[::-1].copy()), ("c3", tokens)):
        rc.save_corpus(rc.Corpus(some), at / f"{name}.h5")
    changed = {name: x * 1.5 for name, x in model.parameters.items() if name.endswith("up.weight")}
    rc.save(model.with_parameters(changed), at / "w2.h5")
    for number in ("", "2"):
        loaded, corpus = rc.load(at / f"w{number}.h5"), rc.load_corpus(at / "c.h5")
        factors = rc.collect(loaded, corpus, MORE, "empirical", rows="all")
        rc.save_factors(factors, at / f"f{number}.h5")
        wanted = rc.collect(loaded, corpus, LAYERS, "empirical", rows="all")
        rc.save_factors(wanted, at / f"g{number}.h5")
        rc.save_bases(rc.decompose(rc.load_factors(at / f"g{number}.h5")), at / f"b{number}.h5")
    rc.save_factors(rc.collect(model, rc.load_corpus(at / "c.h5"), "embed"), at / "e.h5")
    return at


def job(at: Path, **choices: object) -> Job:
    return Job(weights=at / "w.h5", corpus=at / "c.h5", rho=0.7, **choices)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_report_of_what_is_there_already_is_the_same(files, tmp_path, monkeypatch) -> None:
    """Nothing is collected or decomposed again, and the settings are those of what was given."""
    wanted = {"layers": LAYERS, "fisher": "empirical", "rows": "all"}
    anew = run(job(files, **wanted), tmp_path / "anew")
    monkeypatch.setattr(rc, "collect", None)
    some = run(job(files, layers=LAYERS, factors=files / "f.h5"), tmp_path / "some")
    monkeypatch.setattr(rc, "decompose", None)
    none = run(job(files, layers="**", basis=files / "b.h5", seed=3), tmp_path / "none")
    both = {"factors": files / "g.h5", "basis": files / "b.h5"}
    two = run(job(files, layers=LAYERS, **both), tmp_path / "two")
    edited = rc.load(tmp_path / "anew" / "edited.h5").parameters
    for found, folder in ((some, "some"), (none, "none"), (two, "two")):
        for key in ("edit", "spectrum", "kept"):
            assert found[key] == anew[key]
        again = rc.load(tmp_path / folder / "edited.h5").parameters
        assert all(np.array_equal(again[name], edited[name]) for name in edited)
    assert [one["layer"] for one in anew["kept"]] == [one["layer"] for one in anew["edit"]]
    text = format_results(anew)
    assert "Share of its pairs that a layer keeps at each ρ" in text
    assert f"{100 * anew['kept'][0]['kept']['0.99']:.1f} %" in text
    for found in (some, two):
        assert {k: found["settings"][k] for k in ("fisher", "rows", "bias")} == {
            k: anew["settings"][k] for k in ("fisher", "rows", "bias")
        }
    assert "fisher" not in none["settings"]  # a basis does not say it
    seeds = [{k: x for k, x in one["settings"].items() if "seed" in k} for one in (anew, none, two)]
    assert seeds == [{"seed": 0}, {"controls_seed": 3}, {"seed": 0, "controls_seed": 0}]
    commands = [_commands(one["settings"], one["files"]) for one in (anew, some, none, two)]
    assert [len(lines) for lines in commands] == [4, 3, 2, 2]
    assert commands[1][0].startswith(f"refcurv decompose {files / 'f.h5'} -o basis.h5")
    assert commands[2][0].startswith(f"refcurv edit {files / 'w.h5'} {files / 'b.h5'}")
    made = {
        name: sorted(p.name for p in (tmp_path / name).glob("*.h5")) for name in ("some", "two")
    }
    assert made == {"some": ["basis.h5", "edited.h5"], "two": ["edited.h5"]}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--factors", "f2.h5"], "f2.h5' comes from weights"),
        (["--basis", "b2.h5"], "b2.h5' comes from weights"),
        (["--factors", "f.h5", "--basis", "b.h5"], "comes from 'g.h5', not from the factors"),
        (["--factors", "f.h5", "--layers", "head"], "matches none of"),
        (["--factors", "e.h5"], "e.h5 has tables alone. Collect layers to edit."),
        (["--factors", "f.h5", "--rows", "all"], "--rows says how to make what --factors f.h5 has"),
        (["--basis", "b.h5", "--bias", "joint"], "--bias says how to make what --basis b.h5 has"),
        (["--basis", "f.h5"], "refcurv-basis"),
    ],
)
def test_what_is_of_other_files_is_refused(
    flags: list[str], says: str, files: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(files)
    asked = ["w.h5", "c.h5", "--rho", "0.5", "--out", str(tmp_path / "out"), *flags]
    assert main(["report", *asked]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_of_another_corpus_is_refused(files, tmp_path, monkeypatch, capsys) -> None:
    """Factors say which; a basis alone is known by its number of rows."""
    monkeypatch.chdir(files)
    asked = ["--rho", "0.5", "--out", str(tmp_path / "out")]
    assert main(["report", "w.h5", "c2.h5", *asked, "--factors", "f.h5"]) == 2
    assert "comes from 'w.h5', 'c.h5', not from the corpus" in capsys.readouterr().err
    assert main(["report", "w.h5", "c3.h5", *asked, "--basis", "b.h5"]) == 2
    assert "is of 54 rows, and the corpus has 96" in capsys.readouterr().err


@pytest.mark.slow  # it draws
def test_the_command_takes_them(files: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(files)
    asked = ["--rho", "0.5", "--out", str(tmp_path / "out"), "--factors", "f.h5"]
    assert main(["report", "w.h5", "c.h5", *asked]) == 0
    assert "basis.h5, edited.h5" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["taken factors"] == "f.h5" and "collected" not in settings
    assert not (tmp_path / "out" / "factors.h5").exists()
