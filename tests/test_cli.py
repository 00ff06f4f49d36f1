"""The command line: the whole pipeline on a small model, exit statuses, one-line errors."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import h5py
import numpy as np
import pytest
from strategies import config, opened_for_lies, random_parameters

import refcurv as rc
from refcurv import cli, terminal
from refcurv.cli import main
from refcurv.commands import judgements, values
from refcurv.editing import variants
from refcurv.evaluation import suite
from refcurv.files.disk import file_sha256
from refcurv.files.store import provenance
from refcurv.law.checks import ConventionError
from refcurv.law.conventions import Fisher
from refcurv.progress import doing, goes_on, gone_on, uncounted

PYTHON = [sys.executable, "-m", "refcurv"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """w.h5, c.h5, f.h5, b.h5 of a small random model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    made = config(vocabulary=20)
    parameters = {k: v.astype(np.float32) for k, v in random_parameters(made, 0).items()}
    rc.save(rc.Model(made, parameters, "float32"), folder / "w.h5")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 20, (12, 9))
    lengths = np.full(12, 9)
    populations = {
        f"{kind}_{split}": rc.Population(rows, lengths - 4, lengths, kind, split)
        for kind in ("text", "recite", "answer")
        for split in ("dev", "test")
    }
    rc.save_corpus(
        rc.Corpus(rng.integers(0, 20, (70, 64)), populations=populations), folder / "c.h5"
    )
    assert main(["collect", *paths(folder, "w", "c"), "-o", str(folder / "f.h5")]) == 0
    assert main(["decompose", *paths(folder, "f"), "-o", str(folder / "b.h5")]) == 0
    return folder


def paths(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.h5") for name in names]


def test_edit_then_evaluate(files: Path, tmp_path: Path, capsys) -> None:
    out, table = tmp_path / "e.h5", tmp_path / "t.json"
    rho = ["--rho", "blocks.1.mlp.{gate,up}=0.6", "--rho", "blocks.0.mlp.down=0.9"]
    assert main(["edit", *paths(files, "w", "b"), "-o", str(out), *rho]) == 0
    assert "blocks.1.mlp.gate" in capsys.readouterr().out
    edited, model = rc.load(out), rc.load(files / "w.h5")
    changed = [n for n in model.parameters
               if not np.array_equal(model.parameters[n], edited.parameters[n])]  # fmt: skip
    assert changed == [
        "blocks.0.mlp.down.weight", "blocks.1.mlp.gate.weight", "blocks.1.mlp.up.weight"
    ]  # fmt: skip
    assert set(edited.stored.values()) == {"float32"}
    baseline = ["--baseline", *paths(files, "w")]
    assert main(["evaluate", str(out), *paths(files, "c"), *baseline, "--json", str(table)]) == 0
    assert "perplexity" in capsys.readouterr().out
    rows = json.loads(table.read_text())["rows"]
    assert [row["name"] for row in rows] == ["text_test", "recite_test", "answer_test"]


def test_a_trace_says_how_many_labels_it_has(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first class is a label too."""
    model, corpus = rc.load(files / "w.h5"), rc.load_corpus(files / "c.h5")
    tokens = corpus.tokens[:2].copy()
    tokens[:, 2:4] = 0
    rc.save_corpus(rc.Corpus(tokens), tmp_path / "c.h5")
    where = [str(tmp_path / name) for name in ("c.h5", "trace.h5")]
    words = ["trace", str(files / "w.h5"), where[0], "-o", where[1], "--fisher", "empirical"]
    assert main([*words, "--sequences", "0", "1"]) == 0
    made = rc.trace(model, rc.Corpus(tokens), [0, 1], "empirical").tensors
    count = int((made["labels"] != -1).sum())
    mean = float(made["nats"].sum()) / count
    assert count == 2 * (tokens.shape[1] - 1)
    assert f"{mean:.6g} nats a label, {count} labels (empirical)" in capsys.readouterr().out


def test_a_table_says_what_it_was_made_from(files: Path, tmp_path: Path) -> None:
    """Every --json that judges: the library, and the hashes of what was read."""
    w, c, f = paths(files, "w", "c", "f")
    table, lines = tmp_path / "t.json", str(tmp_path / "s.jsonl")
    (tmp_path / "theirs").mkdir()
    theirs = shutil.copy(files / "f.h5", tmp_path / "theirs" / "f.h5")
    whole = file_sha256(theirs)
    assert [*judgements._read(str(theirs.parent), None, f)] == [Path(f), theirs]  # a folder's files
    trace = str(tmp_path / "trace.h5")
    assert main(["trace", w, c, "-o", trace]) == 0
    of_w, of_c = rc.load(w).source["sha256"], rc.load_corpus(c).source["sha256"]
    layers = ["--layers", "blocks.1.mlp.up", "--rho", "0.9", "--methods", "kfac", "--match", "rho"]
    of_model = {"w.h5": of_w, "c.h5": of_c}
    for command, inputs in {
        ("evaluate", w, c): of_model,
        ("audit", w, c): of_model,
        ("sweep", w, c, "-o", lines, *layers): of_model,
        ("validate", str(theirs), "--reference", f): {str(theirs): whole, f: whole},
        ("validate", str(theirs), "--model", w, "--corpus", c, "--layers", "**.mlp.*"): {
            **of_model, "f.h5": whole,
        },
        ("validate", "--trace", trace, "--model", w, "--corpus", c): {
            **of_model, "trace.h5": file_sha256(trace),
        },
    }.items():  # fmt: skip
        assert main([*command, "--json", str(table)]) == 0, command
        made = json.loads(table.read_text())["provenance"]
        assert made["inputs"] == inputs and made["refcurv"] == provenance()["refcurv"], command


def test_a_table_under_its_name_is_whole(files: Path, tmp_path: Path, monkeypatch) -> None:
    """What a stopped `evaluate` knows lies beside it, and an earlier table stays."""
    table, known = tmp_path / "t.json", tmp_path / "t.json.unfinished"
    command = ["evaluate", *paths(files, "w", "c"), "--json", str(table)]
    table.write_text("earlier")
    judge, judged = suite._measured, []

    def stopped(*given: object) -> object:
        judged.append(given)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return judge(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("refcurv.evaluation.suite._measured", stopped)
        assert main(command) == 130
    assert table.read_text() == "earlier"
    rows = json.loads(known.read_text())["rows"]
    assert main(command) == 0
    whole = json.loads(table.read_text())["rows"]
    assert len(rows) == 2 and len(whole) == 3 and whole[:2] == rows
    assert not known.exists()


@pytest.mark.parametrize("kind", ["random-basis", "random-pairs", "inputs", "outputs"])
def test_edit_with_a_control(kind: str, files: Path, tmp_path: Path, capsys) -> None:
    """As much is kept as by K-FAC, the file is the function's, and the seed is written down."""
    out, table = tmp_path / "e.h5", tmp_path / "t.json"
    command = ["edit", *paths(files, "w", "b"), "-o", str(out), "--rho", "0.6"]
    seed = 3 if kind.startswith("random") else 0
    given = ["--seed", "3"] if seed else []
    assert main([*command, "--control", kind, *given, "--json", str(table)]) == 0
    name = {"inputs": "Inputs only", "outputs": "Outputs only"}.get(kind, kind.replace("-", " "))
    assert capsys.readouterr().out.startswith(name.capitalize())
    model, basis, rows = rc.load(files / "w.h5"), rc.load_bases(files / "b.h5"), table.read_text()
    edited, record = variants.control(model, basis, 0.6, kind, seed)
    assert json.loads(rows) == record.to_json()
    made = rc.load(out)
    assert all(x.tobytes() == made.parameters[n].tobytes() for n, x in edited.parameters.items())
    assert made.source["provenance"]["seed"] == seed
    came_from = {name: file_sha256(files / name) for name in ("w.h5", "b.h5")}
    assert made.source["provenance"]["inputs"] == came_from


def test_a_basis_of_other_weights_needs_force(files: Path, tmp_path: Path, capsys) -> None:
    """What it starts from is printed, and what was forced; `inspect` shows both."""
    once, twice = tmp_path / "once.h5", tmp_path / "twice.h5"
    rho = ["--rho", "**.up=0.6"]
    assert main(["edit", *paths(files, "w", "b"), "-o", str(once), *rho]) == 0
    own = rc.load_bases(files / "b.h5").weights[:12]
    assert (
        f"starts from weights {own}, of which no earlier edit is known\n" in capsys.readouterr().out
    )
    again = ["edit", str(once), *paths(files, "b"), "-o", str(twice), "--rho", "**.up=0.3"]
    for control in ([], ["--control", "inputs"], ["--control", "random-pairs"]):
        assert main([*again, *control]) == 2
        assert not twice.exists()
        says = capsys.readouterr().err
        assert says.startswith("refcurv: edit: the basis ")
        assert f"made from weights {own}" in says
        assert "which is that one after an edit (kfac)" in says
        assert "--force" in says
        assert says.count("\n") == 1
    assert main([*again, "--force"]) == 0
    says = capsys.readouterr().out
    assert "edited before by kfac 0.6 of blocks.0.mlp.up and 1 more; kept" in says
    assert f"forced: what chose was made from others, {own}" in says
    assert "‖W'‖ of the original" in says
    assert main(["inspect", str(twice)]) == 0
    says = capsys.readouterr().out
    assert f"edited by kfac, {own} → " in says
    assert ", forced\n" in says
    for kind in ("b", "f"):
        assert main(["inspect", *paths(files, kind)]) == 0
        assert own in capsys.readouterr().out
        older = tmp_path / f"{kind}.h5"
        older.write_bytes((files / f"{kind}.h5").read_bytes())
        with opened_for_lies(older) as file:
            del file.attrs["weights"]
        assert main(["inspect", str(older)]) == 0
        assert "not recorded: made by an older refcurv" in capsys.readouterr().out


def test_truncate(files: Path, tmp_path: Path, capsys) -> None:
    out, table = tmp_path / "e.h5", tmp_path / "t.json"
    energy = ["--energy", "blocks.1.mlp.{gate,up}=0.6", "--energy", "head=0.9"]
    made = ["truncate", *paths(files, "w"), "-o", str(out), *energy, "--json", str(table)]
    assert main(made) == 0
    assert capsys.readouterr().out.startswith("SVD: singular directions")
    model = rc.load(files / "w.h5")
    edited, record = rc.truncate(model, {"blocks.1.mlp.{gate,up}": 0.6, "head": 0.9})
    assert json.loads(table.read_text()) == record.to_json()
    found = rc.load(out).parameters
    assert all(x.tobytes() == found[n].tobytes() for n, x in edited.parameters.items())
    assert {n for n, x in model.parameters.items() if x.tobytes() != found[n].tobytes()} == {
        "blocks.1.mlp.gate.weight", "blocks.1.mlp.up.weight", "head.weight"
    }  # fmt: skip


@pytest.mark.slow
def test_prune(files: Path, tmp_path: Path, capsys) -> None:
    """The file is the function's, made in float32 from weights of float32; it says how."""
    out, table = tmp_path / "e.h5", tmp_path / "t.json"
    layers = "blocks.1.mlp.{gate,up}"
    choices = dict(ratio=0.2, weight=0.7, steps=2, rate=0.1, batch=5, seed=3)
    options = [x for name, value in choices.items() for x in (f"--{name}", str(value))]
    command = ["prune", *paths(files, "w", "c"), "-o", str(out), "--layers", layers, "--forget",
               "recite_dev", *options, "--dtype", "float32", "--json", str(table)]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("BSN: weights")
    corpus = rc.load_corpus(files / "c.h5")
    forget = corpus.populations["recite_dev"]
    model = rc.load(files / "w.h5", dtype="float32")
    scores = rc.train_scores(model, layers, forget, corpus, **choices)
    edited, record = rc.prune(rc.load(files / "w.h5"), scores)
    assert json.loads(table.read_text()) == record.to_json()
    made = rc.load(out)
    assert all(x.tobytes() == made.parameters[n].tobytes() for n, x in edited.parameters.items())
    found = made.source["header"].provenance
    assert found["bsn"] == {"layers": ["blocks.1.mlp.gate", "blocks.1.mlp.up"], **choices,
                            "dtype": "float32"}  # fmt: skip
    assert set(found["inputs"]) == {"w.h5", "c.h5"}


def test_commands_equal_functions(files: Path) -> None:
    model, corpus = rc.load(files / "w.h5"), rc.load_corpus(files / "c.h5")
    factors = rc.collect(model, corpus)
    stored = rc.load_factors(files / "f.h5")
    basis, bases = rc.decompose(factors), rc.load_bases(files / "b.h5")
    for name in factors:
        assert stored[name].sum_G.tobytes() == factors[name].sum_G.tobytes()
        assert bases[name].U_A.tobytes() == basis[name].U_A.tobytes()


def test_collect_says_how_exact_its_draws_are(files: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "f.h5")
    command = ["collect", *paths(files, "w", "c"), "-o", out, "--layers", "head,blocks.1.mlp.up"]
    assert main([*command, "--fisher", "signed", "--draws", "2"]) == 0
    found = {name: f.error_G / np.linalg.norm(f.G) for name, f in rc.load_factors(out).items()}
    worst = max(found, key=lambda name: found[name])
    said = f"standard error of G over the draws: at most {found[worst]:.2%} of |G|, in {worst}\n"
    assert said in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "error_G" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["w", "c", "f", "b"])
def test_inspect_says_what_a_file_is(kind: str, files: Path, tmp_path: Path, capsys) -> None:
    facts = tmp_path / "facts.json"
    assert main(["inspect", *paths(files, kind), "--json", str(facts)]) == 0
    text, found = capsys.readouterr().out, json.loads(facts.read_text())
    name = {"w": "weights", "c": "corpus", "f": "factors", "b": "basis"}[kind]
    assert found["format"] == f"refcurv-{name}"
    assert found["format"] in text
    with h5py.File(files / f"{kind}.h5") as file:
        for entry in found["entries"]:
            dataset = file[entry["name"].replace(".", "/")]
            assert tuple(entry["shape"]) == dataset.shape
            stored = dataset.attrs["sha256"]
            assert entry["sha256"] == (stored.decode() if isinstance(stored, bytes) else stored)
    inputs = found["provenance"].get("inputs", {})
    assert set(inputs) == {"w": set(), "c": set(), "f": {"w.h5", "c.h5"}, "b": {"f.h5"}}[kind]


BAD = {
    "missing file": (["collect", "nowhere.h5", "{c}", "-o", "{out}"], "nowhere.h5"),
    "foreign file": (["inspect", "{text}"], "HDF5"),
    "another kind of file": (["decompose", "{w}", "-o", "{out}"], "refcurv-factors"),
    "unknown layer": (["collect", "{w}", "{c}", "-o", "{out}", "--layers", "blocks.9.**"],
                      "matches none"),
    "unknown fisher": (["collect", "{w}", "{c}", "-o", "{out}", "--fisher", "gold"], "sampled"),
    "draws of nothing": (["collect", "{w}", "{c}", "-o", "{out}", "--fisher", "expected",
                          "--draws", "2"], "`expected` draws nothing"),
    "seed out of range": (["collect", "{w}", "{c}", "-o", "{out}", "--seed", "-1"], "seed"),
    "rho too large": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "1.5"], "[0, 1]"),
    "rho no number": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "up=much"], "SHARE"),
    "rho of no layer": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "head=0.5"], "matches none"),
    "pattern twice": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "**.up=0.5", "--rho",
                       "**.up=0.6"], "once"),
    "no such control": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "0.5", "--control", "input"],
                        "Did you mean 'inputs'?"),
    "seed of a control": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "0.5", "--control",
                           "random-pairs", "--seed", "-1"], "seed"),
    "energy of no layer": (["truncate", "{w}", "-o", "{out}", "--energy", "0.5"], "PATTERN=SHARE"),
    "energy no number": (["truncate", "{w}", "-o", "{out}", "--energy", "head=much"],
                         "truncate: --energy takes"),
    "energy too large": (["truncate", "{w}", "-o", "{out}", "--energy", "head=1.5"], "[0, 1]"),
    "nothing of that name to forget": (["prune", "{w}", "{c}", "-o", "{out}", "--layers", "**.up",
                                        "--forget", "recite", "--ratio", "0.1"], "recite_dev"),
    "text to forget": (["prune", "{w}", "{c}", "-o", "{out}", "--layers", "**.up", "--forget",
                        "text_dev", "--ratio", "0.1"], "must be one of recite, answer"),
    "more than all": (["prune", "{w}", "{c}", "-o", "{out}", "--layers", "**.up", "--forget",
                       "recite_dev", "--ratio", "5"], "[0, 1]"),
    "no such split": (["evaluate", "{w}", "{c}", "--split", "train"], "dev, test"),
    "no such folder": (["decompose", "{f}", "-o", "nowhere/b.h5"], "nowhere"),
    "usage": (["collect", "{w}"], "required"),
    "usage: no room": (["audit", "{w}", "{c}", "--memory", "0"], "--memory: a size is a number"),
    "usage: size in KB": (["collect", "{w}", "{c}", "-o", "{out}", "--memory", "1KB"], "6GB"),
    "usage: size below 0": (["evaluate", "{w}", "{c}", "--memory", "-3GB"], "got '-3GB'"),
    "too little room": (["audit", "{w}", "{c}", "--memory", "0.000001"], "memory"),
    "two shares, no pattern": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "0.5", "--rho",
                                "0.6"], "several need a pattern each, and '0.5' has none"),
    "seed of no control": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "0.5", "--seed", "0"],
                           "edit: nothing is drawn without --control random-basis"),
    "seed of half": (["edit", "{w}", "{b}", "-o", "{out}", "--rho", "0.5", "--seed", "3",
                      "--control", "inputs"], "leave --seed out"),
    "seed of labels": (["collect", "{w}", "{c}", "-o", "{out}", "--fisher", "empirical", "--seed",
                        "3"], "collect: nothing is drawn with --fisher empirical"),
    "seed of a pass": (["trace", "{w}", "{c}", "-o", "{out}", "--fisher", "empirical", "--seed",
                        "3"], "trace: nothing is drawn with --fisher empirical"),
    "seed of no digit": (["certify", "{w}", "{c}", "--seed", "3"],
                         "certify: nothing is drawn with --fisher empirical"),
    "time for no proof": (["audit", "{w}", "{c}", "--seconds", "9"], "give --certify"),
    "labels of a basis": (["sweep", "{w}", "{c}", "-o", "{out}", "--layers", "**.up", "--rho",
                           "0.9", "--basis", "{b}", "--fisher", "empirical"],
                          "sweep: --fisher says how to make what --basis"),
    "rows of factors": (["sweep", "{w}", "{c}", "-o", "{out}", "--layers", "**.up", "--rho", "0.9",
                         "--factors", "{f}", "--rows", "all"],
                        "sweep: --rows says how to make what --factors"),
    "usage: half an option": (["collect", "{w}", "{c}", "-o", "{out}", "--lay", "**"], "--lay"),
    "a basis for no edit": (["validate", "{f}", "--reference", "{f}", "--basis", "{b}"],
                            "leave it (--basis) out"),
    "no reference": (["validate", "{f}"], "(--reference), or both a model (--model)"),
    "no folder for the JSON": (["audit", "{w}", "{c}", "--json", "nowhere/a.json"], "nowhere"),
    "no folder for the factors": (["collect", "{w}", "{c}", "-o", "nowhere/f.h5"], "nowhere"),
    "a file for a folder": (["demo", "--out", "{out}"], "is no folder"),
    "no such checkpoint": (["convert", "nowhere", "{out}"], "nowhere"),
    "tokens of another model": (["collect", "{w}", "{big}", "-o", "{out}"], "vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line_and_status_2(name: str, files: Path, tmp_path: Path, capsys) -> None:
    arguments, says = BAD[name]
    out = tmp_path / "out.h5"
    out.write_bytes(b"the old output")
    (tmp_path / "text").write_text("not HDF5")
    big = tmp_path / "big.h5"
    rc.save_corpus(rc.Corpus(np.full((2, 5), 20)), big)
    where = {k: str(files / f"{k}.h5") for k in "wcfb"}
    where |= {"out": str(out), "text": str(tmp_path / "text"), "big": str(big)}
    try:
        status = main([a.format(**where) for a in arguments])
    except SystemExit as usage:  # argparse
        status = usage.code
    captured = capsys.readouterr()
    assert status == 2
    assert says in captured.err
    assert name.startswith("usage") or captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert out.read_bytes() == b"the old output"


def test_an_error_names_the_command_that_was_given(files: Path, tmp_path: Path, capsys) -> None:
    """Not the function of Python that saw it; a step of the work keeps its name."""
    np.save(tmp_path / "ids.npy", np.arange(60) % 20)
    (tmp_path / "mine.txt").write_text("a text")
    ids, text, out = (str(tmp_path / name) for name in ("ids.npy", "mine.txt", "out"))
    for command, says in (
        (["recite", *paths(files, "w"), ids, "-o", out, "--run", "99"], "recite: least (--run)"),
        (["recite", *paths(files, "w"), text, "-o", out], "recite: "),
        (["corpus", text, "-o", out], "corpus: "),
        (["prune", *paths(files, "w", "c"), "-o", out, "--layers", "**.up", "--forget",
          "recite_dev", "--ratio", "5"], "prune: "),
    ):  # fmt: skip
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"refcurv: {says}"), command
    same = {name: name for name in ("collect: a", "load", "of what: b")}
    for said, by in {**same, "load: a: b": "report: a: b"}.items():
        assert cli._by_command(said, "report") == by


APART = {
    "convert": ["{hf}", "{out}"],
    "inspect": ["{w}", "--json", "{out}"],
    "corpus": ["{npy}", "-o", "{out}", "--population", "p:text:test={txt}", "--tokenizer", "{tok}"],
    "collect": ["{w}", "{c}", "-o", "{out}"],
    "decompose": ["{f}", "-o", "{out}"],
    "edit": ["{w}", "{b}", "-o", "{out}", "--rho", "0.5"],
    "truncate": ["{w}", "-o", "{out}", "--energy", "**.up=0.5"],
    "prune": ["{w}", "{c}", "-o", "{out}", "--layers", "**.up", "--forget", "recite_dev", "--ratio",
              "0.1"],
    "evaluate": ["{w}", "{c}", "--baseline", "{b}", "--json", "{out}"],
    "audit": ["{w}", "{c}", "--json", "{out}"],
}  # fmt: skip


@pytest.mark.parametrize("command", list(APART))
def test_no_output_may_take_the_place_of_an_input(
    command: str, files: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Nor of another output; links resolved; and nothing is read or computed before."""
    for name in "wcfb":
        (tmp_path / f"{name}.h5").write_bytes((files / f"{name}.h5").read_bytes())
    (tmp_path / "hf").mkdir()
    for name in ("ids.npy", "a.txt", "t.json", "hf/config.json"):
        (tmp_path / name).write_bytes(b"{}")
    where = {k: str(tmp_path / f"{k}.h5") for k in "wcfb"}
    where |= {"npy": str(tmp_path / "ids.npy"), "txt": str(tmp_path / "a.txt"),
              "tok": str(tmp_path / "t.json"), "hf": str(tmp_path / "hf")}  # fmt: skip
    used = [text for text in APART[command] if "{" in text and "out" not in text]
    inputs = [Path(text.partition("=")[2] or text) for t in used if (text := t.format(**where))]
    inputs = [path / "config.json" if path.name == "hf" else path for path in inputs]
    before = {path: path.read_bytes() for path in inputs}
    link, hard = tmp_path / "soft", tmp_path / "hard"
    for path in inputs:
        link.symlink_to(path)
        os.link(path, hard)
        for out in (path, link, hard):
            arguments = [a.format(**where, out=out) for a in APART[command]]
            assert main([command, *arguments]) == 2
            assert "is the same file as" in capsys.readouterr().err
        link.unlink()
        hard.unlink()
    if "--json" not in APART[command] and command not in ("collect", "decompose"):
        new = str(tmp_path / "new")
        arguments = [a.format(**where, out=new) for a in APART[command]]
        assert main([command, *arguments, "--json", new]) == 2
        assert "is the same file as" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in inputs} == before


@pytest.mark.parametrize(
    "words", ["collect w.h5 {0} -o {1}", "recite w.h5 {0} -o {1}", "evaluate w.h5 {0} --json {1}"]
)
def test_what_goes_on_is_kept_in_the_place_of_no_input(words: str, tmp_path: Path, capsys) -> None:
    """Which would be taken for what an earlier run left, or be removed at the end."""
    given = tmp_path / "x.unfinished"
    given.write_bytes(b"mine")
    assert main(words.format(given, tmp_path / "x").split()) == 2
    assert "is the same file as" in capsys.readouterr().err
    assert given.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (np.linalg.LinAlgError("Eigenvalues did not converge"), "LinAlgError: Eigenvalues did not"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (OverflowError("intermediate overflow in fsum"), "OverflowError: intermediate"),
        (FloatingPointError("underflow"), "FloatingPointError: underflow"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (IndexError(), "IndexError"),
        (AssertionError("x" * 5000), "AssertionError"),
        (RuntimeError("a" + " b" * 5000), "RuntimeError: a b b"),
        (KeyError("blocks.0"), "KeyError: 'blocks.0'"),
        (NotImplementedError(), "NotImplementedError"),
        (RecursionError("maximum depth"), "RecursionError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_what_nobody_foresaw_is_one_line_and_no_verdict(
    error: Exception, says: str, files: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Status 1 means judged and failed; of a bug it would say so of a sound model."""

    def fail(*_: object) -> None:
        raise error

    # in a thread, deep inside, where `audit` and `decompose` work
    monkeypatch.setattr("refcurv.curvature.eigenbasis.oriented", fail)
    monkeypatch.delenv("REFCURV_TRACEBACK", raising=False)
    arguments = ["decompose", *paths(files, "f"), "-o", str(tmp_path / "b.h5")]
    assert main(arguments) == 3
    line = capsys.readouterr().err
    assert line.startswith(f"refcurv: {says}")
    assert line.count("\n") == 1 and len(line) < 600
    assert "Traceback" not in line
    assert re.search(
        r"\(at refcurv/curvature/eigenbasis\.py:\d+\)\. This is a bug of refcurv", line
    )
    assert "REFCURV_TRACEBACK=1" in line
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("REFCURV_TRACEBACK", "1")
    assert main(arguments) == 3
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith(line)


def test_an_audit_that_breaks_is_not_an_audit_that_failed(files: Path, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise np.linalg.LinAlgError("no")

    monkeypatch.setattr("refcurv.judge.audit.prepare", fail)
    assert main(["audit", *paths(files, "w", "c")]) == 3
    assert "bug of refcurv" in capsys.readouterr().err


def test_a_missing_package_is_no_bug(files: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "refcurv.report.printed", None)
    assert main(["evaluate", *paths(files, "w", "c")]) == 3
    line = capsys.readouterr().err
    assert "refcurv.report.printed" in line and "missing or broken" in line
    assert line.count("\n") == 1 and "bug" not in line


def test_a_job_that_memory_does_not_hold_is_status_3(
    files: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("refcurv.curvature.room.available", lambda: 1000)
    out = ["-o", str(tmp_path / "out.h5")]
    for command, names in (("collect", "wc"), ("decompose", "f")):
        assert main([command, *paths(files, *names), *out]) == 3
        line = capsys.readouterr().err
        assert line.startswith(f"refcurv: {command}: needs 0.0 GiB")
        assert "--layers" in line and line.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(files: Path, tmp_path: Path, capsys) -> None:
    data = bytearray((files / "f.h5").read_bytes())
    with h5py.File(files / "f.h5") as file:
        at = file["blocks/0/mlp/up/sum_G"].id.get_offset()
    data[at + 3] ^= 1
    (tmp_path / "f.h5").write_bytes(data)
    assert main(["inspect", str(tmp_path / "f.h5")]) == 2
    assert "blocks.0.mlp.up.sum_G" in capsys.readouterr().err
    assert main(["decompose", str(tmp_path / "f.h5"), "-o", str(tmp_path / "b.h5")]) == 2
    assert not (tmp_path / "b.h5").exists()
    (tmp_path / "f.h5").write_bytes(data[: len(data) // 2])
    assert main(["inspect", str(tmp_path / "f.h5")]) == 2


def test_a_full_disk_is_status_3_and_leaves_the_old_output(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.h5"
    out.write_bytes(b"the old output")
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from refcurv.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "decompose", str(files / "f.h5"), "-o", str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "NUMBA_CACHE_DIR": ""},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    first, last = done.stderr.splitlines()
    assert "warning: decompose: what comes now cannot be kept until the end" in first
    assert "b.h5" in last
    assert out.read_bytes() == b"the old output"
    assert [p.name for p in tmp_path.iterdir()] == ["b.h5"]


@pytest.mark.slow
def test_interrupting_a_run_is_status_130_and_leaves_the_old_output(
    files: Path, tmp_path: Path
) -> None:
    """SIGINT in the middle of a long collection."""
    out = tmp_path / "f.h5"
    out.write_bytes(b"the old output")
    long = tmp_path / "long.h5"
    rc.save_corpus(rc.Corpus(np.zeros((60_000, 64), dtype=np.int32)), long)
    running = subprocess.Popen(
        [*PYTHON, "collect", str(files / "w.h5"), str(long), "-o", str(out), "--draws", "9"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(6)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=180)  # of a machine that may be busy
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert out.read_bytes() == b"the old output"


@pytest.mark.slow
def test_threads_of_the_environment_change_no_bit(files: Path, tmp_path: Path) -> None:
    """Two processes, the thread variables at 1 and 2: identical datasets (METHOD, Determinism)."""
    found = []
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        f, b, e = (str(tmp_path / f"{x}{threads}.h5") for x in "fbe")
        for command in (
            ["collect", *paths(files, "w", "c"), "-o", f, "--layers", "**", "--dtype", "float32"],
            ["decompose", f, "-o", b],
            ["edit", *paths(files, "w"), b, "-o", e, "--rho", "0.7"],
        ):
            subprocess.run([*PYTHON, *command], env=environment, check=True, capture_output=True)
        found.append([checksums(x) for x in (f, b, e)])
    assert found[0] == found[1]
    assert len(found[0][0]) == 4 * 15


def checksums(path: str) -> dict[str, object]:
    out: dict[str, object] = {}
    with h5py.File(path) as file:
        file.visititems(lambda n, d: out.__setitem__(n, d.attrs["sha256"])
                        if isinstance(d, h5py.Dataset) else None)  # fmt: skip
    return out


@pytest.mark.parametrize("command", ["", *("demo report convert export inspect corpus collect "
                                           "decompose edit truncate prune evaluate "
                                           "audit").split()])  # fmt: skip
def test_help_has_examples(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert not command or f"examples:\n  refcurv {command} " in text or command == "demo"


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    pipes: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([*PYTHON, *command], text=True, check=False, **pipes)  # type: ignore


@pytest.mark.slow
def test_streams_that_are_closed_or_full(files: Path) -> None:
    """Nobody to print to is no error, no room to print is one line, in no case a traceback."""
    command = " ".join([*PYTHON, "inspect", str(files / "f.h5")])
    for shell, status in [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 3)]:
        done = subprocess.run(
            f"{command} {shell}", shell=True, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (status, int(status == 3)), done.stderr
        assert status == 0 or "standard output: No space left on device. Check" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_text_is_too_strange_to_print(files: Path, tmp_path: Path) -> None:
    """A terminal that knows only ASCII; names of control and half characters, of any length."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert "\\u2192" in run("decompose", str(files / "f.h5"), "-o", str(tmp_path / "b.h5"),
                           env=ascii_only).stdout  # fmt: skip
    for name in ("\x1b[31m\r\nred", "a\udcff", "\u2028", "x" * 100_000):
        done = run("edit", "w.h5", "b.h5", "-o", str(tmp_path / "e.h5"), "--rho", f"{name}=much",
                   cwd=files)  # fmt: skip
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert len(done.stderr) < 1200 and "\x1b" not in done.stderr


def test_a_warning_is_one_line(files: Path, capsys, monkeypatch) -> None:
    import refcurv.files.inspect as module

    right = module.inspect_file

    def warned(*args, **options):
        warnings.warn("overflow\nencountered", RuntimeWarning, stacklevel=1)
        return right(*args, **options)

    monkeypatch.setattr(module, "inspect_file", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["inspect", str(files / "f.h5")]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("refcurv: warning: overflow encountered (")


@pytest.mark.parametrize("says", [lambda progress: progress(1, 2), lambda p: doing(p, "a layer")])
def test_an_interrupt_that_python_drops_is_raised_by_the_next_progress(
    says, files: Path, capsys, monkeypatch
) -> None:
    """Ctrl-C while a destructor runs: Python prints a traceback and goes on."""

    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def inspected(path: str, progress) -> None:
        Dropping()
        says(progress)
        raise AssertionError("went on")

    monkeypatch.setattr("refcurv.files.inspect.inspect_file", inspected)
    assert main(["inspect", str(files / "f.h5")]) == 130
    err = capsys.readouterr().err
    assert err.startswith("refcurv: interrupted") and err.count("\n") == 1


@pytest.mark.parametrize("patience", [0.0, 99.0])
def test_an_interrupt_that_takes_a_while_says_so(patience: float, capsys, monkeypatch) -> None:
    """And one that ends at once says nothing of it."""
    monkeypatch.setattr(terminal, "_PATIENCE", patience)
    said = ""
    with pytest.raises(KeyboardInterrupt), terminal.interrupts():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:  # as what is at work ends
            for _ in range(3_000 if not patience else 1):
                said = said or capsys.readouterr().err
                time.sleep(0 if said else 0.01)
    assert said == ("" if patience else f"refcurv: {terminal._ENDING}\n")


def test_an_interrupt_promises_nothing_about_what_was_written_before_it(
    files: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Ctrl-C between the output and its table: the new file is there, whole."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refcurv.report.printed.format_edit", stop)
    out = tmp_path / "e.h5"
    assert main(["edit", *paths(files, "w", "b"), "-o", str(out), "--rho", "0.6"]) == 130
    assert "each output is the old one or the new one, whole" in capsys.readouterr().err
    rc.load(out)


@pytest.mark.parametrize(
    ("words", "writes"),
    [
        ("validate t.npz --reference f.h5", False), ("inspect f.h5", False),
        ("evaluate w.h5 c.h5", False), ("validate t.npz --reference f.h5 --json v.json", True),
        ("evaluate w.h5 c.h5 --items i.jsonl", True), ("export w.h5 folder", True),
        ("convert folder w.h5", True), ("collect w.h5 c.h5 -o f.h5", True),
        ("cases w.h5 c.h5 -o folder", True), ("demo", True),
    ],
)  # fmt: skip
def test_an_interrupt_speaks_of_outputs_where_there_are_some(words, writes, capsys) -> None:
    with patch("refcurv.cli._require_targets", side_effect=KeyboardInterrupt):
        assert main(words.split()) == 130
    assert ("each output is the old one" in capsys.readouterr().err) == writes


@pytest.mark.parametrize(
    "words", ["evaluate w.h5 c.h5", "collect w.h5 c.h5 -o f.h5", "recite w.h5 t.txt -o i.jsonl"]
)
def test_an_interrupt_says_that_the_command_goes_on_where_it_does(words: str, capsys) -> None:
    command = words.split()
    with patch("refcurv.cli._require_targets", side_effect=KeyboardInterrupt):
        assert main(command) == 130
    again = f"again: {command[0]} goes on from whatever it has kept"
    assert (again in (err := capsys.readouterr().err)) == (command[0] != "evaluate")
    assert command[0] != "evaluate" or "again" not in err
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    named = re.search("[.] ([^.]*) go on where they were interrupted", readme)
    assert named and {*re.findall("`([a-z]+)`", named[1]), "demo"} == {*cli.GOES_ON}


def test_what_goes_on_says_so(capsys, monkeypatch) -> None:
    """In a line of its own, in a log and on a terminal; and only if it does not begin at zero."""
    for _ in range(2):
        for begin in (0, 57):
            update = gone_on(terminal.progress_bar("collect"), "shard")
            for done in range(begin, 101):
                update(done, 100)
            err = capsys.readouterr().err
            line = "refcurv: collect: goes on from shard 57 of 100, which an earlier run left\n"
            assert err.count(line) == (begin == 57) == err.count("goes on")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(terminal, "_COLUMNS", 200)
    goes_on(lambda done, total: None, "who does not show it")


def ticking(monkeypatch, *times: float) -> None:
    """A clock that is looked at so many times, of a process that begins at zero."""
    clock = iter([0.0, *times])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(terminal, "_clock", terminal._Clock())


def twice(at: float) -> tuple[float, float]:
    """What is done is heard, and a line of it may be due."""
    return at, at


def test_what_an_earlier_run_left_is_no_pace(capsys, monkeypatch) -> None:
    """Kept pieces pass in no time: the rest takes as long as what this run itself did."""
    kept = [at for n in range(20) for at in twice(1.0 + 0.01 * n)]
    ticking(monkeypatch, 0.5, *kept, *twice(31.0), *twice(61.2))
    update = terminal.progress_bar("recite")
    for done in (*range(0, 400, 20), 390, 400):
        update(done, 1000)
    assert capsys.readouterr().err == (
        "refcurv: recite: 400 of 1,000 after 61 s, about 30 min left\n"
    )
    monkeypatch.setattr(terminal, "time", time)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal, "_FIRST", 0.2)
    update = terminal.progress_bar("recite")
    for done in (0, 500_000, 1_000_000):
        update(done, 2_000_000)
    time.sleep(0.5)
    update(1_000_001, 2_000_000)
    rates = re.findall(r"([0-9.]+)(s/it|it/s)", capsys.readouterr().err)
    assert rates and all(float(n) < 10 for n, _ in rates)  # one piece in half a second


def test_what_comes_before_the_first_piece_is_no_pace(capsys, monkeypatch) -> None:
    """A sweep's baseline: then it says again that nothing is done, and begins."""
    ticking(monkeypatch, 0.0, *twice(0.0), *twice(50.0), *twice(60.0))
    update = terminal.progress_bar("sweep")
    for done in (0, 0, 1):
        update(done, 4)
    assert capsys.readouterr().err == "refcurv: sweep: 1 of 4 after 60 s, about 30 s left\n"
    clock = iter([0.0, 50.0, 60.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal, "_SOON", 0.0)
    update = terminal.progress_bar("sweep")
    for done in (0, 0, 1):
        update(done, 4)
    terminal.end_bars()
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert "<00:30" in last and "10.00s/it" in last


def shown(monkeypatch, rows: int, columns: int, work: Callable[[], object], last: str) -> str:
    """What `work` writes to a terminal of this size, until `last` is there."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(theirs, "w") as terminal_, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stderr", terminal_)
        work()
        terminal_.flush()
        said = b""  # a terminal may hand on what was written in parts
        while last not in said.decode(errors="ignore") and select.select([ours], [], [], 10)[0]:
            said += os.read(ours, 4096)
    os.close(ours)
    return said.decode(errors="ignore")


def test_a_terminal_that_does_not_say_how_large_it_is_has_bars(monkeypatch) -> None:
    """As under `script`, or in a container: no columns, no rows, or neither."""

    def work() -> None:
        terminal.progress_bar("recite")(1, 2)
        terminal.end_bars()

    for rows, columns in ((0, 0), (40, 0), (0, 100), (40, 100)):
        assert "1/2" in shown(monkeypatch, rows, columns, work, "1/2"), (rows, columns)


def test_progress_goes_into_a_log_too(capsys, monkeypatch) -> None:
    """A line a minute where there is no terminal: how fast, how long yet, since it went on."""
    for tokens, speed in ((None, ("", "")), (100_000, (", 800 tokens/s", ", 714 tokens/s"))):
        ticking(monkeypatch, 0.0, *twice(10.0), *twice(59.0), *twice(60.0), *twice(99.0),
                *twice(122.0))  # fmt: skip
        update = terminal.progress_bar("collect", tokens)
        for done in range(1, 6):
            update(done * 1000, 5000)
        assert capsys.readouterr().err.splitlines() == [
            f"refcurv: collect: 3,000 of 5,000 after 60 s{speed[0]}, about 50 s left",
            f"refcurv: collect: 5,000 of 5,000 after 122 s{speed[1]}",
        ]


def test_short_steps_are_told_of_too(capsys, monkeypatch) -> None:
    """Ten steps of 25 s, of which each is over before a minute is: still a line a minute."""
    ticking(monkeypatch, *(25.0 * n + at for n in range(10) for at in (0.0, 5.0, 5.0, 20.0)))
    for n in range(10):
        update = terminal.progress_bar(f"step {n}")
        update(0, 2)
        doing(update, "the second half")
    assert capsys.readouterr().err.splitlines() == [
        "refcurv: step 2: 0 of 2 after 20 s: the second half",
        "refcurv: step 5: 0 of 2 after 5 s",
        "refcurv: step 7: 0 of 2 after 20 s: the second half",
    ]


def test_a_line_is_due_a_minute_after_the_command_began(capsys, monkeypatch) -> None:
    """Not after Python did; and it is of the step that is alive, not of the one begun last."""
    ticking(monkeypatch, 100.0, 100.0, 101.0, *twice(110.0), *twice(165.0), *twice(166.0))
    monkeypatch.setattr(terminal.threading, "Thread", Mock())
    terminal._clock.begin()
    first, _ = terminal.progress_bar("first"), terminal.progress_bar("second")
    first(1, 2)
    assert not capsys.readouterr().err
    first(1, 2)
    first(1, 2)
    assert capsys.readouterr().err == "refcurv: first: 1 of 2 after 65 s\n"


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("2.5", 2.5 * 2**30), ("6GB", 6e9), ("1 GiB", 2**30), ("900MiB", 900 * 2**20), ("7MB", 7e6)],
)
def test_a_size_has_a_unit_or_is_in_gib(text: str, bytes_: float) -> None:
    assert values.size(text) == bytes_


@pytest.mark.parametrize("fisher", [*Fisher])
def test_a_seed_is_needed_where_labels_or_signs_are_drawn(fisher: Fisher) -> None:
    needed = fisher in (Fisher.SAMPLED, Fisher.SIGNED)
    assert (not values.undrawn(fisher.value)) == needed
    assert values.seed("collect", None, values.undrawn(fisher.value)) == 0
    if needed:
        assert values.seed("collect", 3, values.undrawn(fisher.value)) == 3
    else:
        with pytest.raises(ConventionError, match="nothing is drawn"):
            values.seed("collect", 3, values.undrawn(fisher.value))


def test_a_long_step_is_told_of_too(capsys, monkeypatch) -> None:
    """Also what comes behind the last bar; a command that is over ends its reminder."""
    monkeypatch.setattr(terminal, "_SECONDS", 0.01)
    with terminal.streams():
        doing(terminal.progress_bar("validate"), "how much drawing labels changes")
        capsys.readouterr()
        said, end = "", time.monotonic() + 20
        while said.count("after") < 2 and time.monotonic() < end:
            said += capsys.readouterr().err
        line = r"refcurv: validate: after \d+ s: how much drawing labels changes\n"
        assert re.match(line, said)
        terminal.progress_bar("evaluate")
        reminders = [one for one in threading.enumerate() if one.name.endswith("(_remind)")]
        assert len(reminders) == 1
    for one in reminders:
        one.join(20)
        assert not one.is_alive()


def test_progress_says_what_is_being_done(capsys, monkeypatch) -> None:
    """At the end of a line of the log; on a terminal beside the bar."""
    ticking(monkeypatch, 0.0, 10.0, 10.0, 61.0)
    update = terminal.progress_bar("validate")
    update(1, 5)
    doing(update, "compare blocks.0.mlp.up")
    assert capsys.readouterr().err == (
        "refcurv: validate: 1 of 5 after 61 s: compare blocks.0.mlp.up\n"
    )
    monkeypatch.setattr(terminal, "time", time)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    update = terminal.progress_bar("validate")
    doing(update, "nothing yet")
    update(1, 5)
    doing(update, "compare blocks.1.mlp.up")
    update(5, 5)
    assert "1/5" in (err := capsys.readouterr().err) and "compare blocks.1.mlp.up" in err
    doing(lambda done, total: None, "who does not show it")


def test_a_search_is_not_counted(capsys, monkeypatch) -> None:
    """It says what was counted before it, and how long it takes; on a terminal below the bar."""
    ticking(monkeypatch, 0.0, 10.0, 10.0, 60.0, 60.0, 70.0, 125.0)
    update, after = (
        terminal.progress_bar("validate", pieces="layers"),
        "3 layers compared; a search",
    )
    update(2, 3)
    update(3, 3)
    uncounted(update, after)
    doing(update, "one cause")
    doing(update, "another cause")
    assert capsys.readouterr().err.splitlines() == [
        "refcurv: validate: 3 of 3 layers after 60 s",
        "refcurv: validate: 3 layers compared; a search, after 125 s: another cause",
    ]
    monkeypatch.setattr(terminal, "time", time)

    def work() -> None:
        update = terminal.progress_bar("validate", pieces="layers")
        doing(update, "compare a layer")
        update(2, 3)
        update(3, 3)
        uncounted(update, after)
        doing(update, "x" * 200)
        terminal.end_bars()

    lines = shown(monkeypatch, 24, 80, work, "…]\r\n").replace("\r", "\n").splitlines()
    assert any("3/3 layers [" in line for line in lines)
    last = next(line for line in reversed(lines) if after in line)
    assert last.startswith("  validate: 3 layers") and last.endswith("…]") and len(last) <= 80
    uncounted(lambda done, total: None, "who does not show it")


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("what", ["a layer", "about 5 min left, kfac " + "x" * 200])
def test_a_long_text_leaves_room_for_the_bar(what: str, columns: int, monkeypatch) -> None:
    """It is cut at its end; a short one is whole."""

    def work() -> None:
        update = terminal.progress_bar("sweep")
        doing(update, what)
        update(100, 200)
        terminal.end_bars()

    line = next(
        line for line in reversed(shown(monkeypatch, 24, columns, work, "]\r\n").splitlines())
        if "100/200" in line
    )  # fmt: skip
    assert line.endswith(f", {what}]" if what == "a layer" else "…]")
    assert what[:7] in line and len(line) <= columns
    assert len(line.split("|")[1]) >= columns // 5


def test_a_message_is_broken_at_the_ends_of_words_on_a_terminal(capsys, monkeypatch) -> None:
    message = f"sweep: {'some words of it ' * 12}/a/long-path/{'x' * 90}"
    terminal.say(message)
    assert capsys.readouterr().err == f"refcurv: {message}\n"  # in a log one line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    terminal.say(message)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(line.strip() for line in lines) == f"refcurv: {message}"
    assert [len(line) <= 80 for line in lines] == [True] * (len(lines) - 1) + [False]
    for much in range(80):  # what is to be copied is never broken
        terminal.say(f"{'x' * much} needs it: pip install 'refcurv[gguf]' then")
        assert "pip install 'refcurv[gguf]'" in capsys.readouterr().err


def test_a_message_has_a_line_of_its_own(capsys, monkeypatch) -> None:
    """Whatever bar stands there, also when the command ends; and what took no time has no rate."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    update = terminal.progress_bar("sweep")
    update(1, 5)
    terminal.say("the baseline took 3 s")
    err = capsys.readouterr().err
    line = err[: err.index("refcurv:")].rsplit("\r", 1)[-1]
    assert "sweep" in err and not line.strip()
    update(2, 5)
    with patch("refcurv.cli.parser", side_effect=KeyboardInterrupt):
        assert main(["inspect", "f.h5"]) == 130
    err = capsys.readouterr().err
    assert "\nrefcurv: interrupted\n" in err and err.endswith("\n") and "2/5" in err
    update = terminal.progress_bar("tokenize")
    update(5_000_000_000, 5_000_000_000)
    err = capsys.readouterr().err
    assert "/s" not in err and err.endswith("\n")
    assert not terminal._bars


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_ends_nothing_but_the_printing(
    unbuffered: str, files: Path, tmp_path: Path
) -> None:
    """Status 0 only if all was done: the JSON is there; and a status survives a full stderr."""
    where = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [*PYTHON, "inspect", str(files / "f.h5"), "--json", str(tmp_path / "j.json")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=where, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "j.json").read_text())["format"] == "refcurv-factors"
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run([*PYTHON, "inspect", "nowhere.h5"], stderr=full, env=where,
                                check=False)  # fmt: skip
    assert failed.returncode == 2


@pytest.mark.slow
def test_what_happens_while_it_is_imported_is_no_traceback(files: Path) -> None:
    """Ctrl-C in the first second, and a machine on which a library cannot be imported."""
    command = [*PYTHON, "inspect", str(files / "f.h5")]
    for delay in np.linspace(0.15, 0.9, 6):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True)  # fmt: skip
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        assert "Traceback" not in err and running.returncode in (-signal.SIGINT, 130, 0), err
    done = run(*command[3:], env={**os.environ, "NUMBA_NUM_THREADS": "0"})
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("refcurv: could not start: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_docstrings_may_be_left_out(files: Path) -> None:
    done = run("inspect", str(files / "f.h5"), env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert done.returncode == 0, done.stderr


def test_the_json_of_a_report_takes_the_place_of_none_of_its_files(
    files: Path, tmp_path: Path, capsys
) -> None:
    for name in ("edited.h5", "results.json", "report.html", "bands.png"):
        arguments = ["report", *paths(files, "w", "c"), "--rho", "0.5", "--out", str(tmp_path)]
        assert main([*arguments, "--json", str(tmp_path / name)]) == 2
        assert f"is the same file as {name} of --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(files: Path) -> None:
    command = " ".join([*PYTHON, "inspect", str(files / "f.h5")])
    done = subprocess.run(
        f"{command} | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
