"""validation/peers/curvature: README.md is what the last run wrote, and all of it is equal."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refcurv as rc
from refcurv.curvature.exact import fisher
from refcurv.judge.arithmetic import Arithmetic, moment_budget
from validation.peers.curvature import official_edit, page

FOREIGN = Path(__file__).parents[1] / "data/foreign"
BUDGET = 2 * moment_budget(Arithmetic().filled("float32"), 54)
LAYER, MODULE = "blocks.0.mlp.up", "layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(page.RESULTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def truth() -> dict[str, rc.Factors]:
    model, corpus = rc.load(FOREIGN / "w.h5", dtype="float64"), rc.load_corpus(FOREIGN / "c.h5")
    return {
        rows: rc.collect(model, corpus, "blocks.*.{attn,mlp}.*", "empirical", rows=rows)
        for rows in ("all", "reached")
    }


def safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read here by itself: eight bytes of length, a JSON header, and the numbers."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "I64": "<i8"}
    found = {}
    for name, entry in header.items():
        begin, end = (start + at for at in entry["data_offsets"])
        numbers = np.frombuffer(data[begin:end], kinds[entry["dtype"]])
        found[name] = numbers.reshape(entry["shape"]).astype(np.float64)
    return found


def apart(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


def test_the_page_shows_the_last_results(results: dict[str, Any]) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text, results) == text


def test_six_programs_are_equal_within_budget(results: dict[str, Any]) -> None:
    rows = results["factors"]
    assert len({row["program"] for row in rows}) == 6
    for dtype in ("float64", "float32"):
        assert len({row["program"] for row in rows if row["dtype"] == dtype}) == 6
    for row in rows:
        assert page.within(row), (row["program"], row["dtype"])
        assert row["layers"] >= 6
        writes = row["program"] in ("the official hooks, 8d059db", "kronfluence", "bergson")
        assert row["files"] == ("equal" if writes else ""), row["program"]
    for row in results["drawn"]:
        assert row["passed"] and row["largest"] <= 4, row["program"]
    assert all(one["holds"] for one in results["findings"])


def test_a_row_beyond_its_budget_is_not_equal(results: dict[str, Any]) -> None:
    row = next(row for row in results["factors"] if row["Lambda"])
    for quantity in (*page.QUANTITIES, "Lambda"):
        beyond = {**row[quantity], "error": 1.01 * row[quantity]["budget"]}
        assert not page.within({**row, quantity: beyond})
    assert not page.within({**row, "passed": False})
    assert not page.within({**row, "files": "blocks.0.attn.q A: fail"})


def test_the_pins_are_what_it_ran_on(results: dict[str, Any]) -> None:
    text = (page.HERE / "requirements.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))
    ran = {**results["versions"], **{row["program"]: row["version"] for row in results["factors"]}}
    ran["curvlinops-for-pytorch"] = ran.pop("curvlinops")
    for name in set(pins) & set(ran):
        assert ran[name].partition("+")[0] == pins[name], name
    assert len(set(pins) & set(ran)) >= 8


def test_what_is_said_of_the_official_edit(results: dict[str, Any]) -> None:
    said = {one["where"]: one["text"] for one in results["findings"]}
    for one in official_edit.findings():
        assert one.holds, one.text
        assert said[one.where] == one.text


def test_the_kept_files_of_kronfluence_are_our_factors(truth: dict[str, rc.Factors]) -> None:
    folder = FOREIGN / "kronfluence"
    read = {path.stem: safetensors(path) for path in folder.glob("*.safetensors")}
    for side, kind in (("A", "activation"), ("G", "gradient")):
        for name, total in read[f"{kind}_covariance"].items():
            if name == "lm_head":
                continue
            ours = truth["all"][layer_of(name)]
            n = read[f"num_{kind}_covariance_processed"][name]
            assert n == ours.n_A
            assert apart(total / n, getattr(ours, side)) < BUDGET, name
    name = f"model.{MODULE}"
    U = np.kron(read["gradient_eigenvectors"][name], read["activation_eigenvectors"][name])
    assert apart(read["lambda_matrix"][name].ravel(), diagonal(U)) < BUDGET
    assert read["num_lambda_processed"][name] == 6


def test_the_kept_files_of_bergson_are_our_factors(truth: dict[str, rc.Factors]) -> None:
    def shard(kind: str) -> dict[str, np.ndarray]:
        return safetensors(FOREIGN / "bergson" / kind / "shard_0.safetensors")

    n, documents = 54, 6
    for side, kind in (("A", "activation_sharded"), ("G", "gradient_sharded")):
        for name, total in shard(kind).items():
            assert apart(total / n, getattr(truth["reached"][layer_of(name)], side)) < BUDGET, name
    U = np.kron(shard("eigen_gradient_sharded")[MODULE], shard("eigen_activation_sharded")[MODULE])
    correction = shard("eigenvalue_correction_sharded")[MODULE]
    assert apart(documents * correction.ravel(), diagonal(U)) < BUDGET
    A = truth["reached"][LAYER].A
    values = shard("factor_eig_a")[MODULE] / math.sqrt(n / documents)
    assert apart(values, np.linalg.eigvalsh(A)) < BUDGET


def layer_of(name: str) -> str:
    """layers.0.mlp.up_proj → blocks.0.mlp.up."""
    short = name.removeprefix("model.").replace("layers.", "blocks.").replace("self_attn", "attn")
    return short.removesuffix("_proj")


def diagonal(U: np.ndarray) -> np.ndarray:
    """diag Uᵀ F U of the layer, F the exact sum over sequences."""
    model, corpus = rc.load(FOREIGN / "w.h5", dtype="float64"), rc.load_corpus(FOREIGN / "c.h5")
    F = fisher(model, corpus, wrt=f"{LAYER}.weight", fisher="empirical")
    return np.einsum("pi,pi->i", U, F @ U)
