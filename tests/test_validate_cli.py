"""`refcurv validate` and `trace` on the command line: typos, wrong files, hostile contents."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.law.checks import ConventionError

LAYER = "blocks.0.mlp.up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a corpus, factors and a basis; the same of other weights; theirs, which is right."""
    at, made = tmp_path_factory.mktemp("validate"), config(layers=1)
    tokens = np.random.default_rng(0).integers(0, made.vocabulary, (6, 9))
    rc.save_corpus(rc.Corpus(tokens), at / "c.h5")
    rc.save_corpus(rc.Corpus(tokens[:4]), at / "fewer.h5")
    for name, seed in (("", 3), ("other-", 4)):
        rc.save(rc.Model(made, random_parameters(made, seed)), at / f"{name}w.h5")
        model, corpus = rc.load(at / f"{name}w.h5"), rc.load_corpus(at / "c.h5")
        factors = rc.collect(model, corpus, "blocks.0.mlp.*")
        rc.save_factors(factors, at / f"{name}f.h5")
        rc.save_bases(rc.decompose(factors), at / f"{name}b.h5")
    np.savez(at / "t.npz", **arrays(rc.load_factors(at / "f.h5")))
    return at


def arrays(factors):
    parts = {f"{name}/{side}": getattr(factors[name], side) for name in factors for side in "AG"}
    return parts | {f"{name}/n": factors[name].n_A for name in factors}


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Runs a command in the folder; its status, and its one line of error."""
    monkeypatch.chdir(folder)

    def run(*arguments, status=2):
        found = main(["validate", *arguments])
        seen = capsys.readouterr()
        assert found == status, (found, seen)
        assert "Traceback" not in seen.err and "bug of refcurv" not in seen.err
        assert all(c.isprintable() or c == "\n" for c in seen.out + seen.err)
        return seen.err if status == 2 else seen.out

    return run


REFERENCE = ("t.npz", "--reference", "f.h5")


def test_a_typo_is_refused_with_the_nearest(refused):
    for option, text, near in (
        ("--declare", "fischer=sampled", "'fisher'"),
        ("--declare", "fisher=sampld", "'sampled'"),
        ("--declare", "rows=labeled", "'labelled'"),
        ("--declare", "draws=1.5", "whole"),
        ("--declare", "rho=2", "[0, 1]"),
        ("--declare", "rho=nan", "[0, 1]"),
        ("--declare", "draws=x", "number"),
        ("--arithmetic", "floot32", "'float32'"),
        ("--arithmetic", "modl=float32", "'model'"),
        ("--accept", "bfloat6", "'bfloat16'"),
        ("--layers", "blocks.0.mlp.upp", "upp"),
        ("--name", f"{LAYER}s={LAYER}", LAYER),
    ):
        assert near in refused(*REFERENCE, option, text)


def test_other_names_of_a_dtype_mean_that_dtype(refused):
    """`fp32` is nearer to tf32, letter by letter, which is another dtype."""
    for text, meant in (
        ("fp32", "float32"), ("F32", "float32"), ("single", "float32"), ("float", "float32"),
        ("model=torch.float32", "float32"), ("fp16", "float16"), ("half", "float16"),
        ("bf16", "bfloat16"), ("fp64", "float64"), ("double", "float64"),
    ):  # fmt: skip
        assert f"Did you mean {meant!r}?" in refused(*REFERENCE, "--arithmetic", text)
        assert f"Did you mean {meant!r}?" in refused(
            *REFERENCE, "--accept", text.partition("=")[2] or text
        )
    assert "Did you mean" not in refused(*REFERENCE, "--arithmetic", "int")
    with pytest.raises(ConventionError, match="Did you mean 'float32'"):
        rc.load("w.h5", dtype="fp32")
    with pytest.raises(ConventionError, match=r"got 'bf16'\.$"):
        rc.load("w.h5", dtype="bf16")


def test_what_does_not_belong_together_is_refused(refused):
    """A model, basis or corpus that is not the reference's would make each hypothesis nonsense."""
    model = ("--model", "w.h5", "--corpus", "c.h5")
    bases = ("b.h5", "--reference", "f.h5")
    assert "passed" in refused(*bases, *model, "--basis", "b.h5", status=0)
    for wrong in (
        (*REFERENCE, "--model", "other-w.h5"),
        (*REFERENCE, "--model", "other-w.h5", "--corpus", "c.h5"),
        (*bases, "--basis", "other-b.h5"),
        (*bases, "--basis", "other-b.h5", *model),
    ):
        assert "not of the same weights" in refused(*wrong)
    line = refused(*REFERENCE, "--model", "w.h5", "--corpus", "fewer.h5")
    assert "48 rows" in line and "corpus 32" in line
    assert "FAILED" in refused("other-f.h5", "--reference", "f.h5", status=1)


def test_choices_that_differ_are_said(refused):
    assert "theirs is all, the reference reached" in refused(
        *REFERENCE, "--declare", "rows=all", status=0
    )


def test_an_option_that_would_be_ignored_is_refused(refused):
    """Of a trace, what only factors need; of factors, what only a trace needs."""
    trace = ("--trace", "t.h5", "--model", "w.h5", "--corpus", "c.h5")
    assert main(["trace", "w.h5", "c.h5", "-o", "t.h5"]) == 0
    refused(*trace, status=0)
    for option in (("--reference", "f.h5"), ("--html", "x.html"), ("--layers", "**")):
        assert option[0] in refused(*trace, *option)
    assert "float32" in refused(*trace, "--arithmetic", "floot32")
    assert "--sequences" in refused(*REFERENCE, "--sequences", "1")
    assert "--basis" in refused(*REFERENCE, "--basis", "b.h5")


def test_nothing_compared_is_no_pass(refused):
    """Edited weights without the model before the edit: each layer is left out."""
    assert "nothing could be compared" in refused("w.h5", "--reference", "f.h5")


def test_no_output_lies_in_their_folder(refused, folder):
    rc.export(folder / "w.h5", folder / "checkpoint")
    target = "checkpoint/config.json"
    line = refused("checkpoint", "--reference", "f.h5", "--model", "w.h5", "--json", target)
    assert "would destroy" in line


def test_an_empty_path_is_no_path(refused):
    assert refused(*REFERENCE, "--model", "", "--corpus", "c.h5")


def test_an_interrupt_in_the_middle_leaves_one_line_and_no_file(folder, monkeypatch, capsys):
    """Ctrl-C while a layer is compared, and while a cause is looked for."""
    monkeypatch.chdir(folder)
    wrong = arrays(rc.load_factors("f.h5"))
    np.savez("wrong.npz", **{k: x[::-1] if k.endswith("/G") else x for k, x in wrong.items()})
    for where in ("judgement._layer", "diagnosis.procedure.look"):
        with monkeypatch.context() as patch:
            patch.setattr(f"refcurv.judge.{where}", lambda *_, **__: signal.raise_signal(2))
            given = ("wrong.npz", "--reference", "f.h5", "--json", "v.json", "--html", "v.html")
            assert main(["validate", *given]) == 130, where
        err = capsys.readouterr().err
        assert err.startswith("refcurv: interrupted") and "Traceback" not in err
        assert not [x for x in folder.iterdir() if x.name.startswith(("v.", ".refcurv"))]


def test_a_side_that_is_almost_nothing_is_told(refused, folder):
    """It was a bug of refcurv: our rows over such a factor are infinite."""
    for factor in (1e-320, -1e-300, 1e300):
        theirs = arrays(rc.load_factors(folder / "f.h5"))
        theirs[f"{LAYER}/A"] = theirs[f"{LAYER}/A"] * factor
        np.savez(folder / "far.npz", **theirs)
        said = refused("far.npz", "--reference", "f.h5", status=1)
        assert LAYER in said
