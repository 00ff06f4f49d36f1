"""Conformance vectors: the stored ones are today's truth, and what is planted in them is seen."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.files.store import machine
from refcurv.judge.cases import Case, CaseError, accepted
from refcurv.judge.cases.analytic import analytic
from refcurv.judge.cases.case import kind_of, law_digest, write_case
from refcurv.judge.cases.freedom import acceptable
from refcurv.judge.cases.harness import budgets
from refcurv.judge.cases.making import MOST_PARAMETERS, cases, subject, valid
from refcurv.judge.cases.planted import BUGS
from refcurv.judge.cases.routes import checks
from refcurv.judge.cases.truth import truth

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from validation.cases import certified, make  # noqa: E402
from validation.cases.models import FEATURES  # noqa: E402

MANIFESTS = {one["caseId"]: one for one in make.manifests()}
INPUTS = ("weights", "corpus")


stored = cache(certified.stored)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda one: one.name)
def test_every_stored_number_is_todays(feature) -> None:
    """Its inputs to the bit, everything else within the budget that the file states."""
    case = stored(f"{feature.name}_v1")
    now = truth(subject(feature.model(), feature.corpus, "**", 0)).arrays
    assert set(now) == set(case.arrays)
    for name, array in now.items():
        was, budget = case.arrays[name], case.budget_of(name)
        assert was.dtype == array.dtype and was.shape == array.shape, name
        if name.split(".")[0] in INPUTS or budget == 0 or array.dtype.kind != "f":
            np.testing.assert_array_equal(was, array, err_msg=name)
        elif budget is None:  # eigenvectors: the harness judges them
            assert ".U_" in name
        else:
            assert np.linalg.norm(np.asarray(was - array)) <= budget, name


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_harness_accepts_and_rejects(name: str) -> None:
    """The forward of valid ones is the test above."""
    case = stored(name)
    if case.result == "valid":
        case = replace(case, needs=("sums", "basis", "edits"))
    assert accepted(case) == (case.result != "invalid")


def test_a_case_of_which_nothing_can_be_judged_is_not_accepted() -> None:
    assert not accepted(Case("x", "sums", "valid", {"loss": np.zeros(())}))


def test_the_manifests_are_complete() -> None:
    """Every number of a valid case has two routes within budget, or is written down."""
    for name, one in MANIFESTS.items():
        path = make.VECTORS / one["file"]["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == one["file"]["sha256"], name
        assert path.stat().st_size == one["file"]["bytes"]
        assert one["certificate"] is None and one["versions"]["libraries"] and one["needs"]
        assert set(one["budgets"]) == {"sums", "basis", "edits", "mass"}
        if one["result"] == "invalid":
            assert one["flags"] and one["faultType"] and one["reason"] and one["of"] in MANIFESTS
            continue
        if one["result"] != "valid":
            continue
        confirmed = {check["quantity"] for check in one["checks"]}
        names = {kind_of(n) for n in stored(name).arrays if n.split(".")[0] not in INPUTS}
        given = {"labels", "rows.*.kept"}  # LABELS and ROWS of the inputs
        if name == "analytic_v1":
            assert names <= {kind_of(check["quantity"]) for check in one["checks"]}
        else:
            assert names - given == confirmed - given
        for check in one["checks"]:
            assert check["error"] <= check["budget"] and len(set(check["routes"])) == 2


def test_the_folder_is_what_its_index_says() -> None:
    files = {path.name for path in make.VECTORS.iterdir()}
    assert files == {"index.json", *(f"{n}.{e}" for n in MANIFESTS for e in ("h5", "json"))}
    assert sum(path.stat().st_size for path in make.VECTORS.iterdir()) < 10e6
    planted = {n.split("_")[1].rpartition("-")[0] for n in MANIFESTS if stored(n).of}
    assert {bug.id for bug in BUGS} <= {p for n in planted for p in (n, n.rpartition("-")[0])}
    results = [one["result"] for one in MANIFESTS.values()]
    assert {results.count(r) > 3 for r in ("valid", "invalid", "acceptable")} == {True}


def test_the_page_is_what_the_manifests_say() -> None:
    """`python -m validation.cases.make --render`."""
    assert make.PAGE.read_text(encoding="utf-8") == make.page()


def test_a_case_is_made_again_byte_for_byte(tmp_path) -> None:
    """On the build that made the stored ones; on another one, twice the same."""
    feature = next(one for one in FEATURES if one.name == "shared-norm")
    was = MANIFESTS["shared-norm_v1"]
    here = was["versions"] == json.loads(json.dumps(machine())) and was["law"] == law_digest()
    folders = [make.VECTORS, tmp_path / "one"] if here else [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        if folder != make.VECTORS:
            folder.mkdir()
            _, case = make.made_of(feature)
            write_case(case, folder, budgets(case))
    for name in ("shared-norm_v1.h5", "shared-norm_v1.json"):
        one, two = ((folder / name).read_bytes() for folder in folders)
        assert one == two


def test_freedom_is_accepted_and_is_no_copy() -> None:
    by_hand = analytic()
    free = {case.id.split("_")[1].split("-")[0]: case for case in acceptable(by_hand)}
    assert set(free) == {"signs", "cluster", "ties"}
    for case in free.values():
        assert accepted(case) and case.result == "acceptable" and case.of == by_hand.id
        true = by_hand.arrays
        assert any(not np.array_equal(x, true[name]) for name, x in case.arrays.items())
    U = free["cluster"].arrays["basis.linear.U_A"]
    assert (U[1:4, 1:4] != np.eye(3)).all() and U[0, 0] == U[4, 4] == 1 and not U[0, 1:].any()


def test_the_analytic_case_is_by_hand() -> None:
    at, made = stored("analytic_v1").arrays, analytic().arrays
    assert at.keys() == made.keys()
    assert all(np.array_equal(x, made[name]) for name, x in at.items())
    np.testing.assert_array_equal(at["factors.linear.sum_A"], np.diag([16, 4, 4, 4, 1.0]))
    np.testing.assert_array_equal(at["factors.linear.sum_G"], np.diag([4, 4, 1, 1.0]))
    np.testing.assert_array_equal(at["basis.linear.mu"], [2, 0.5, 0.5, 0.5, 0.125])
    # keys of sums: 64 64, eight times 16, 4 ...; half of all, 290, is 145 > 64 + 64 + 16
    half, most = (at[f"edits.{share}.linear.mask"] for share in ("rho50", "rho90"))
    np.testing.assert_array_equal(half, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], *[[0] * 5] * 2])
    assert most.sum() == 10 + 2  # 128 + 8 · 16 = 256 of 261, and two keys of 4
    np.testing.assert_array_equal(at["edits.rho50.linear.weight"][0], [1, 2, 3, 0, 0])


# ------------------------------------------------------------------ a user's own


@pytest.fixture(scope="module")
def small():
    made = config(vocabulary=5, width=4, layers=1, heads=2, kv_heads=1, mlp_width=3)
    model = rc.Model(made, random_parameters(made, 4))
    return model, rc.Corpus(np.random.default_rng(1).integers(0, 5, (2, 4)))


def test_every_number_has_two_routes_within_budget(small) -> None:
    """And a number that is wrong by 1e-9 is not confirmed."""
    made = truth(subject(*small, "**", 0))
    names = {n for n in made.arrays if n.split(".")[0] not in (*INPUTS, "labels")}
    found = list(checks(made))
    assert all(one.passed for one in found)
    assert {one.quantity for one in found} == {n for n in names if not n.endswith(".kept")}
    others = {n for n in names if n.startswith("gradients.") and not n.endswith(".k.weight")}
    names -= others  # of the gradients one will do: each that is wrong is looked at twice
    for k, (name, array) in enumerate(made.arrays.items(), start=1):
        if array.dtype.kind == "f" and name in names:
            made.arrays[name] = array * (1 + 1e-9 * k)
        elif name.endswith((".n_A", ".mask")) or name == "drawn":
            made.arrays[name] = array + 1
    wrong = {one.quantity for one in checks(made) if not one.passed}
    fine = {n for n in names if n.endswith((".n_G", ".kept"))}
    assert names - fine == wrong
    with pytest.raises(CaseError, match="logits: fast kernels"):
        valid(made, "x")


@pytest.mark.slow
def test_a_users_own_set(small, tmp_path, capsys) -> None:
    model, corpus = small
    rc.save(model, tmp_path / "w.h5")
    rc.save_corpus(corpus, tmp_path / "c.h5")
    command = ["cases", str(tmp_path / "w.h5"), str(tmp_path / "c.h5"), "-o", str(tmp_path / "out")]
    assert main([*command, "--layers", "blocks.0.mlp.{up,down}", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "cases: 1 valid, " in said and "not planted" in said and "B28 (padding is a row)" in said
    index = json.loads((tmp_path / "out/index.json").read_text())["cases"]
    assert {one["result"] for one in index} == {"valid", "invalid", "acceptable"}
    manifest = json.loads((tmp_path / "out/model_v1.json").read_text())
    assert manifest["method"]["seed"] == 3 and len(manifest["layers"]) == 2
    assert rc.cli.main(command) == 2  # it exists
    assert "exists and is no empty folder" in capsys.readouterr().err


def test_what_is_too_large_is_refused_with_the_size_that_fits(small) -> None:
    model, corpus = small
    wide = config(width=2**8)
    with pytest.raises(rc.RefcurvError, match=f"at most {MOST_PARAMETERS:,} fit"):
        next(iter(cases(rc.Model(wide, random_parameters(wide, 0)), corpus)))
    long = rc.Corpus(np.zeros((900, 2), int))
    with pytest.raises(rc.RefcurvError, match="corpus of 819 labelled positions"):
        next(iter(cases(model, long)))
    with pytest.raises(rc.RefcurvError, match='dtype="float64"'):
        short = {name: x.astype(np.float32) for name, x in model.parameters.items()}
        next(iter(cases(rc.Model(model.config, short, "float32"), corpus)))


def test_a_set_that_the_harness_does_not_confirm_is_not_written(small, tmp_path) -> None:
    case = stored("sums_B1-gqa_v1")
    with pytest.raises(CaseError, match="is valid, and the harness rejected it"):
        rc.judge.cases.write_cases([replace(case, result="valid")], tmp_path / "out")
    with pytest.raises(CaseError, match="is invalid, and the harness accepted it"):
        rc.judge.cases.write_cases(
            [replace(stored("analytic_v1"), result="invalid")], tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())
