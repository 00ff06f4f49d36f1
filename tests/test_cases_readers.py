"""The readers in C and in Node: they judge the stored cases right, and see what is spoiled."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

CASES = Path(__file__).parents[1] / "validation" / "cases"
READERS, VECTORS, CERTIFIED = CASES / "readers", CASES / "vectors", CASES / "certified"
FEW = ("gqa_v1", "tied_v1", "analytic_v1", "sums_B27-gqa_v1", "edits_ties-analytic_v1")

pytestmark = pytest.mark.slow  # they are compiled, and asked of npm


@pytest.fixture(scope="module", params=["C", "Node"])
def reader(request, tmp_path_factory):
    """The command of one reader; skipped, with the reason, where its tools are missing."""
    build = tmp_path_factory.mktemp("readers")
    for name in ("check.c", "Makefile", "check.mjs", "package.json", "package-lock.json"):
        shutil.copy(READERS / name, build)
    if request.param == "C":
        made = subprocess.run(["make", "-C", build], capture_output=True, text=True, check=False)
        command = [build / "check"]
    else:
        if shutil.which("npm") is None:
            pytest.skip("no npm")
        options = ["--prefer-offline", "--no-audit", "--fetch-retries=0", "--prefix", build]
        made = subprocess.run(
            ["npm", "ci", *options], capture_output=True, text=True, check=False
        )  # fmt: skip
        command = ["node", build / "check.mjs"]
    if made.returncode:
        pytest.skip(f"{request.param} reader: {made.stderr.strip().splitlines()[-1:]}")
    return command


@pytest.fixture
def folder(tmp_path):
    """A few cases, to be spoiled."""
    for name in FEW:
        for ending in ("h5", "json"):
            shutil.copy(VECTORS / f"{name}.{ending}", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"cases": [{"caseId": n} for n in FEW]}))
    return tmp_path


def judged(reader, folder) -> tuple[int, str]:
    done = subprocess.run([*reader, folder], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def manifest(folder, name: str, **changes) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def signed(folder, name: str) -> None:
    """The manifest's SHA-256 is that of the file as it is now."""
    path = folder / f"{name}.h5"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest(folder, name, file={"name": path.name, "sha256": sha256})


def test_the_stored_cases_are_as_they_should_be(reader) -> None:
    status, said = judged(reader, VECTORS)
    needs = [json.loads(path.read_text()).get("needs") for path in VECTORS.glob("*_v1.json")]
    left = needs.count(["forward"])
    right = f"{len(needs) - left} cases as they should be, 0 not; {left} need a forward pass"
    assert status == 0 and right in said


@pytest.mark.parametrize(
    "array",
    ["factors/head/sum_A", "factors/head/sum_G", "factors/head/n_A", "rows/head/kept",
     "rows/head/a", "rows/head/g", "basis/head/U_G", "basis/head/mu", "edits/rho50/head/mask",
     "edits/rho90/head/weight"],
)  # fmt: skip
def test_a_flipped_byte_is_seen(reader, folder, array: str) -> None:
    """The last byte of the first number that is not 0: sign and exponent, or a count."""
    with h5py.File(folder / "gqa_v1.h5") as file:
        node = file[array]
        first = int((node[()].ravel() != 0).argmax())
        at = node.id.get_offset() + node.dtype.itemsize * (first + 1) - 1
    data = bytearray((folder / "gqa_v1.h5").read_bytes())
    data[at] ^= 1
    (folder / "gqa_v1.h5").write_bytes(data)
    signed(folder, "gqa_v1")
    status, said = judged(reader, folder)
    assert status == 1 and "gqa_v1 is valid, but" in said


def test_bytes_are_compared_with_their_checksum(reader, folder) -> None:
    """In Node, which has SHA-256; the last bit of a weight that no reader uses."""
    with h5py.File(folder / "gqa_v1.h5") as file:
        at = file["weights/parameters/embed/weight"].id.get_offset()
    data = bytearray((folder / "gqa_v1.h5").read_bytes())
    data[at] ^= 1
    (folder / "gqa_v1.h5").write_bytes(data)
    status, said = judged(reader, folder)
    assert status == (reader[0] == "node")
    assert ("SHA-256" in said) == (reader[0] == "node")


@pytest.mark.parametrize(
    ("name", "result"),
    [("sums_B27-gqa_v1", "valid"), ("gqa_v1", "invalid"), ("edits_ties-analytic_v1", "invalid")],
)
def test_a_case_that_is_called_otherwise_is_seen(reader, folder, name: str, result: str) -> None:
    manifest(folder, name, result=result)
    status, said = judged(reader, folder)
    assert status == 1 and f"{name} is {result}, but" in said


@pytest.mark.parametrize("lost", ["gqa_v1.h5", "gqa_v1.json", "index.json"])
def test_what_is_missing_or_cut_is_no_success(reader, folder, lost: str) -> None:
    (folder / lost).write_bytes((folder / lost).read_bytes()[:100])
    assert judged(reader, folder)[0] == 1
    (folder / lost).unlink()
    assert judged(reader, folder)[0] == 1


# ------------------------------------------------------------------ thirty digits


@pytest.fixture
def certified(tmp_path):
    """A certified case, to be spoiled."""
    for ending in ("h5", "json"):
        shutil.copy(CERTIFIED / f"vit-cls_v2.{ending}", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"cases": [{"caseId": "vit-cls_v2"}]}))
    return tmp_path


def test_the_certified_cases_are_as_they_should_be(reader) -> None:
    status, said = judged(reader, CERTIFIED)
    assert status == 0 and "18 cases as they should be, 0 not" in said


AT = "blocks/0/mlp/up"


@pytest.mark.parametrize("what", ["digit", "ulp"])
@pytest.mark.parametrize(
    "array",
    ["logits", "nats", "loss", f"gradients/{AT}/weight", f"gradients/{AT}/bias", f"rows/{AT}/a",
     f"rows/{AT}/g", f"rows/{AT}/g_sampled", f"factors/{AT}/sum_A", f"factors/{AT}/sum_G",
     f"factors/{AT}/sum_a", f"empirical/{AT}/sum_G", f"expected/{AT}/sum_G", f"basis/{AT}/mu",
     f"basis/{AT}/lam", f"basis/{AT}/U_A", f"basis/{AT}/U_G", f"edits/rho90/{AT}/weight"],
)  # fmt: skip
def test_a_certified_number_that_is_wrong_is_seen(reader, certified, array: str, what: str) -> None:
    """Its twentieth digit; or its float64 by one ulp, for which the low part makes up."""
    with h5py.File(certified / "vit-cls_v2.h5", "r+") as file:
        x, low = (np.array(file[end][()]) for end in (array, f"{array}_low"))
        at = np.unravel_index(int(np.abs(x).argmax()), x.shape)
        near = np.nextafter(x[at], np.inf)
        low[at] += 1e-20 * x[at] if what == "digit" else x[at] - near
        x[at] = x[at] if what == "digit" else near
        file[array][...], file[f"{array}_low"][...] = x, low
    signed(certified, "vit-cls_v2")
    status, said = judged(reader, certified)
    alone = array.startswith("expected") and what == "digit"  # no reader makes it again
    assert (status, "vit-cls_v2 is valid, but" in said) == ((0, False) if alone else (1, True))


@pytest.mark.parametrize("counted", [False, True])
def test_a_certified_mask_that_keeps_a_pair_more_is_seen(reader, certified, counted) -> None:
    """Also where the manifest counts it."""
    told = json.loads((certified / "vit-cls_v2.json").read_text())["certificate"]
    with h5py.File(certified / "vit-cls_v2.h5", "r+") as file:
        counts = told["arrays"]["edits.rho50.blocks.0.mlp.up.mask"]["kept"]
        file[f"edits/rho50/{AT}/mask"][0, counts[0]] = 1
        counts[0] += counted
    manifest(certified, "vit-cls_v2", certificate=told)
    signed(certified, "vit-cls_v2")
    status, said = judged(reader, certified)
    assert status == 1 and "vit-cls_v2 is valid, but" in said


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-29])
def test_a_radius_that_says_nothing_is_seen(reader, certified, value: float) -> None:
    with h5py.File(certified / "vit-cls_v2.h5", "r+") as file:
        own = file[f"expected/{AT}/sum_G"].attrs
        own["relative"] = value
        own["settled"] = 0.0 if not value < 1 else own["settled"]
    signed(certified, "vit-cls_v2")
    status, said = judged(reader, certified)
    assert status == 1 and "fewer than thirty digits" in said


def test_an_array_that_lost_its_proof_is_seen(reader, certified) -> None:
    with h5py.File(certified / "vit-cls_v2.h5", "r+") as file:
        del file[f"expected/{AT}/sum_G_low"]
    signed(certified, "vit-cls_v2")
    assert judged(reader, certified)[0] == 1


def test_a_certified_case_that_lacks_its_proof_is_seen(reader, certified) -> None:
    with h5py.File(certified / "vit-cls_v2.h5", "r+") as file:
        del file["loss_low"]
    signed(certified, "vit-cls_v2")
    assert judged(reader, certified)[0] == 1


def test_no_case_is_no_success(reader, folder) -> None:
    (folder / "index.json").write_text('{"cases": []}')
    assert judged(reader, folder)[0] == 1
    assert judged(reader, "")[0] == 1
