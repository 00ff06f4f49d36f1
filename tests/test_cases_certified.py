"""Version 2 of the conformance vectors: every number is proved, a digit that is wrong is seen."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from refcurv.algebra.balls import around_zero, bits, exact  # noqa: E402
from refcurv.judge.cases import Case  # noqa: E402
from refcurv.judge.cases.case import kind_of  # noqa: E402
from validation.cases import certified, contained, make  # noqa: E402
from validation.cases.certified import FOLDER, stored  # noqa: E402
from validation.cases.enclosures import enclosures  # noqa: E402
from validation.cases.spectral import spectral  # noqa: E402

MANIFESTS = {one["caseId"]: one for one in make.manifests(FOLDER)}
FEW = "vit-cls_v2"
"""The one that the default suite looks at: images, biases, and it is small."""

EACH = [pytest.param(n, marks=[] if n == FEW else [pytest.mark.slow]) for n in MANIFESTS]


def spoiled(tmp_path: Path, name: str, changes: dict[str, str]) -> Path:
    """A copy of the folder's case in which one entry of some arrays is wrong.

    "digit": the twentieth digit of the number; "ulp": the float64 is the next one; "moved": it is
    the next one, and the low part makes up for it.
    """
    for ending in ("h5", "json"):
        shutil.copy(FOLDER / f"{name}.{ending}", tmp_path)
    with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
        for array, what in changes.items():
            path = array.replace(".", "/")
            x, low = (np.array(file[end][()]) for end in (path, f"{path}_low"))
            at = np.unravel_index(int(np.abs(x).argmax()), x.shape)
            near = np.nextafter(x[at], np.inf)
            if what == "digit":
                low[at] += 1e-20 * x[at]
            if what == "moved":
                low[at] += x[at] - near
            if what != "digit":
                x[at] = near
            file[path][...], file[f"{path}_low"][...] = x, low
    return tmp_path


def flipped(folder: Path, name: str) -> str:
    """The name of a mask that now keeps one pair more, the next one of its first row."""
    with h5py.File(folder / f"{name}.h5", "r+") as file:
        layer = next(n for n in MANIFESTS[name]["layers"] if n.endswith("mlp.up"))
        at = f"edits.rho50.{layer}.mask"
        mask = np.array(file[at.replace(".", "/")])
        mask[0, int(mask[0].sum())] = 1
        file[at.replace(".", "/")][...] = mask
    return at


def named(found: list[str]) -> set[str]:
    return {one.partition(":")[0] for one in found}


@pytest.mark.parametrize("name", EACH)
def test_every_certified_case_holds(name: str) -> None:
    assert contained.wrong(FOLDER, name) == []


UP, SUMS = "blocks.0.mlp.up", ("sum_A", "sum_G")
MADE = ("logits", "loss", f"gradients.{UP}.weight", f"gradients.{UP}.bias", f"factors.{UP}.sum_A",
        f"factors.{UP}.sum_G", f"empirical.{UP}.sum_G", f"edits.rho50.{UP}.weight")  # fmt: skip
"""Arrays that a reader makes again from others."""


def test_a_wrong_digit_is_caught(tmp_path) -> None:
    """In what the rows make, and in the rows. Of sums it also shows in their bases."""
    folder = spoiled(tmp_path, FEW, dict.fromkeys(MADE, "digit"))
    bases = {f"basis.{UP}.{part}" for part in ("U_A", "mu", "U_G", "lam")}
    assert named(contained.wrong(folder, FEW)) == {*MADE, *bases}
    rows = {f"rows.{UP}.a": "digit", f"rows.{UP}.g_sampled": "digit", "nats": "digit"}
    found = named(contained.wrong(spoiled(tmp_path, FEW, rows), FEW))
    assert found >= {f"factors.{UP}.sum_A", f"factors.{UP}.sum_G", "loss"}


def refused(folder: Path, told: dict | None = None) -> set[str]:
    """What the basis and the edits of one layer refute."""
    balls, given, _ = contained.read(folder / f"{FEW}.h5")
    found = [*contained._basis(balls, given, UP)]
    found += contained._edits(balls, given, UP, told or MANIFESTS[FEW])
    return {name for name, excess in found if excess}


EDITS = {f"edits.{share}.{UP}.weight" for share in contained.SHARES}


@pytest.mark.parametrize(
    ("part", "seen"), [("mu", {"mu", "U_A"}), ("lam", {"lam", "U_G"}), ("U_G", {"U_G"})]
)
def test_a_wrong_basis_is_caught(part: str, seen: set[str], tmp_path) -> None:
    """One digit of an eigenvalue or of an eigenvector, which also shows in what is made of it."""
    folder = spoiled(tmp_path, FEW, {f"basis.{UP}.{part}": "digit"})
    assert refused(folder) == {f"basis.{UP}.{x}" for x in seen} | (EDITS if "U" in part else set())


def test_a_wrong_mask_is_caught(tmp_path) -> None:
    """One pair more, in the mask alone, or in the counts too."""
    mask = flipped(spoiled(tmp_path, FEW, {}), FEW)
    wrong = {mask, mask.replace(".mask", ".weight")}
    assert refused(tmp_path) == wrong
    told = json.loads((FOLDER / f"{FEW}.json").read_text())
    told["certificate"]["arrays"][mask]["kept"][0] += 1
    assert refused(tmp_path, told) == wrong


def test_an_edit_that_is_no_projection_is_caught() -> None:
    """O54: of a U that is half as long W' is U Uᵀ W, as it should, but it changes again."""
    one, half, quarter = (contained.known(np.eye(2) * x) for x in (1, 0.5, 0.25))
    every = np.ones((2, 2), bool)
    assert contained._of_edit(one, one, one, one, every) == 0
    assert contained._of_edit(quarter, one, half, one, every) == 3  # 2 entries; not orthogonal


@pytest.mark.parametrize(
    ("rho", "kept", "fine"),
    [(0.9, [2, 1], True), (0.9, [2, 0], False), (0.9, [2, 2], False), (0.6, [2, 0], True),
     (0.6, [1, 1], False), (0.6, [2, 1], False), (0.6, [0, 0], False)],
)  # fmt: skip
def test_pairs_are_those_of_select_or_not(rho: float, kept: list[int], fine: bool) -> None:
    """Keys are 15, 9, 5 and 3, of 32: too few, too many, or 5 before 9."""
    lam, mu = (contained.known(np.array(x)) for x in ([3.0, 1.0], [5.0, 3.0]))
    mask = np.arange(2) < np.array(kept)[:, None]
    assert contained._selected(lam, mu, mask, rho) is fine
    unsure = contained.Ball(mu.x, mu.low, np.full(2, 1.0))
    assert not contained._selected(lam, unsure, mask, rho)


@pytest.mark.parametrize("name", EACH)
def test_a_larger_share_keeps_more(name: str) -> None:
    """O55: its mask holds that of the smaller, and its W' is not the shorter one."""
    balls, given, _ = contained.read(FOLDER / f"{name}.h5")
    masks = [n for n in given if n.startswith("edits.rho50")]
    assert masks
    for at in masks:
        (less, few), (more, many) = (
            (given[n] == 1, contained.product(*[balls[n.replace(".mask", ".weight")].column] * 2))
            for n in (at, at.replace("rho50", "rho90"))
        )
        assert (less <= more).all()
        far = many.x - few.x + many.low - few.low
        assert (less == more).all() or far > (many.radius + few.radius) * contained.SLACK


def test_a_float64_that_is_off_by_one_ulp_is_caught(tmp_path) -> None:
    """Also where the low part makes up for it, and of arrays that no reader makes again."""
    alone = {"logits", "nats", "rows.head.a", "exact.head.hessian", f"expected.{UP}.sum_G"}
    alone = {name for name in alone if name in MANIFESTS[FEW]["certificate"]["arrays"]}
    changes = dict.fromkeys(MADE[1:], "ulp") | dict.fromkeys(alone, "moved")
    found = contained.wrong(spoiled(tmp_path, FEW, changes), FEW)
    assert set(MADE) <= named([one for one in found if "outside" in one])
    assert alone <= {one.partition(":")[0] for one in found if "entries are settled, not" in one}


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("relative", math.nan, "fewer than thirty digits"),
        ("relative", math.inf, "fewer than thirty digits"),
        ("relative", 1e-29, "fewer than thirty digits"),
        ("settled", math.nan, "settled, not nan"),
        ("low", math.nan, "no number"),
        ("gone", 0.0, "not certified"),
    ],
)
def test_a_radius_that_says_nothing_is_caught(tmp_path, what: str, value: float, said: str) -> None:
    """Also of an array that nothing makes again; no comparison finds a NaN too large."""
    array = f"expected/{UP.replace('.', '/')}/sum_G"
    with h5py.File(spoiled(tmp_path, FEW, {}) / f"{FEW}.h5", "r+") as file:
        own = file[array].attrs
        if what == "gone":
            del file[f"{array}_low"]
        elif what == "low":
            file[f"{array}_low"][0, 0] = value
        else:
            own[what] = value
            own["settled"] = own["settled"] if value < 1 or what == "settled" else 0.0
    found = contained.wrong(tmp_path, FEW)
    assert any(array.replace("/", ".") in one and said in one for one in found)


def refuted(folder: Path, case: Case, precision: int, last: str = "") -> set[str]:
    """Arrays, up to the first of quantity `last`, that balls of other bits do not allow.

    Balls that cannot tell thirty digits allow nothing.
    """
    out, made = set(), {}
    balls, given, _ = contained.read(folder / f"{case.id.replace('_v1', '_v2')}.h5")
    with bits(precision):
        for name, x in enclosures(case):
            if name.partition(".")[0] == last:
                break
            made[name] = x
            if name.endswith(".mask") and not x.contains(given[name].astype(int)).all():
                out.add(name)
            if name in balls:
                far = x - exact(balls[name].x) - exact(balls[name].low)
                size = np.abs(balls[name].x).max()
                if (far.least() > balls[name].radius).any() or (far.radii() > 1e-35 * size).any():
                    out.add(name)
        certified.require_one(case.id, made)
    return out


@pytest.mark.parametrize("name", EACH)
def test_balls_of_other_bits_agree(name: str, tmp_path) -> None:
    """And a digit that is wrong is refuted, in whatever array, and nothing else.

    The default suite stops where every label is sent back.
    """
    case, every = stored(name.replace("_v2", "_v1")), MANIFESTS[name]["certificate"]["arrays"]
    wrong = [n for n, one in every.items() if one["settled"] == one["entries"] and one["radius"]]
    last = "expected" if name == FEW else ""
    some = {n for n in wrong[::7] if name != FEW or not n.startswith(("expected", "exact"))}
    folder = spoiled(tmp_path, name, dict.fromkeys(some, "digit"))
    some |= {flipped(folder, name)}
    assert refuted(folder, case, 250, last) == some


def test_too_few_digits_are_refused(monkeypatch) -> None:
    case = stored("vit-mean_v1")
    monkeypatch.setattr(certified, "BITS", 60)
    monkeypatch.setattr(certified, "drawn_again", lambda *_: {})
    monkeypatch.setattr(certified, "enclosures", lambda case: [("loss", exact(np.array(1)) / 3)])
    with pytest.raises(SystemExit, match=r"loss is .* from version 1"):
        certified.made_of(case)
    near = exact(np.asarray(case.arrays["loss"]))
    unsure = exact(np.array(1)) / 3 * 3 - 1
    monkeypatch.setattr(certified, "enclosures", lambda case: [("loss", near + unsure)])
    with pytest.raises(SystemExit, match=r"loss has 1[678]\.\d digits"):
        certified.made_of(case)


def test_a_mask_and_an_eigenvalue_of_another_matrix_are_refused(monkeypatch) -> None:
    """Version 1 is the witness: another mask, or what is beyond a budget, is not written."""
    case, at = stored("vit-mean_v1"), "edits.rho50.head.mask"
    monkeypatch.setattr(certified, "drawn_again", lambda *_: {})
    mask = case.arrays[at].astype(int)
    monkeypatch.setattr(certified, "enclosures", lambda case: [(at, exact(1 - mask))])
    with pytest.raises(SystemExit, match=r"edits.rho50.head.mask is proved to be another"):
        certified.made_of(case)
    undecided = exact(np.full(mask.shape, contained.UNDECIDED))
    monkeypatch.setattr(certified, "enclosures", lambda case: [(at, undecided)])
    assert certified._of_mask(certified.made_of(case).masks[at])["settled"] == 0
    real = {f"basis.head.{part}": case.arrays[f"basis.head.{part}"] for part in ("mu", "lam")}
    more = {"basis.head.U_A": case.arrays["basis.head.U_A"][:, :2]}
    more["edits.rho50.head.weight"] = case.arrays["edits.rho50.head.weight"]
    for name, far in (("basis.head.mu", 1e-12), *((name, 1e-8) for name in more)):
        for off in (0.0, far):
            made = (real | more) | {name: (real | more)[name] * (1 + off)}
            balls = [(n, exact(x)) for n, x in made.items()]
            monkeypatch.setattr(certified, "enclosures", lambda case, balls=balls: balls)
            if not off:
                assert certified.made_of(case).numbers.keys() == made.keys()
                continue
            with pytest.raises(SystemExit, match=rf"{name} is .* from version 1"):
                certified.made_of(case)


def test_labels_that_the_real_numbers_do_not_draw_are_listed() -> None:
    case = stored("vit-mean_v1")
    drawn, (n, t) = case.arrays["drawn"].copy(), np.argwhere(case.arrays["drawn"] >= 0)[0].tolist()
    real = int(drawn[n, t])
    drawn[n, t] = 1 - min(real, 1)
    with bits(100):
        logits = exact(case.arrays["logits"])
        found = certified.drawn_again(case.holding({"drawn": drawn}), {"logits": logits})
        wide = logits + around_zero(np.full(logits.shape, 9.0))
        unsure = certified.drawn_again(case, {"logits": wide})
    assert found == {"same": 2, "other": [[n, t, int(drawn[n, t]), real]], "undecided": []}
    assert len(unsure["undecided"]) == 3 and unsure["same"] == 0 and not unsure["other"]


def test_an_undecided_pair_leaves_its_edit_without_a_number() -> None:
    """Two eigenvalues of A are one, and the cut lies between them; their columns are not told."""
    one = {"factors.up.n_A": 9, "factors.up.n_G": 9, "edits.rho50.up.mask": None}
    case = Case("x", "", "valid", one)  # type: ignore[arg-type]
    with bits(120):
        A, G = (exact(np.diag(x)) for x in ([4.0, 4.0], [1.0, 0.0]))
        made = dict(spectral(case, "up", np.ones((2, 2)), A / 3, G / 3))
        even = exact(np.array([[2, 1], [1, 2]]))  # whose vectors have two largest entries
        tied = dict(spectral(case, "up", np.ones((2, 2)), even, G / 3))
    assert made["edits.rho50.up.mask"].rounded().tolist() == [[2, 2], [0, 0]]
    assert "edits.rho50.up.weight" not in made
    assert made["basis.up.U_A"].shape == (2, 0) and made["basis.up.U_G"].shape == (2, 1)
    assert tied["basis.up.U_A"].shape == (2, 0) and tied["basis.up.mu"].radii().max() < 1e-30


def test_two_names_of_one_matrix_must_overlap() -> None:
    one = exact(np.array([1.0, 2.0]))
    with bits(100):
        balls = {"exact.head.fisher": one / 3, "exact.head.ggn": 1 / (3 / one)}
        certified.require_one("x", balls)
        balls["exact.head.ggn"] = one / 3 * (1 + exact(np.array(1e-20)))
        with pytest.raises(SystemExit, match=r"x: exact.head.fisher is not exact.\*.ggn"):
            certified.require_one("x", balls)


def test_a_number_that_may_be_0_is_said_to_be_small() -> None:
    with bits(200):
        third = exact(np.array([1.0, 0.0, 4.0])) / 3 * 3 - exact(np.array([1.0, 0.0, 1.0]))
        made = certified.certified(third)
    assert made.x.tolist() == [0, 0, 3] and made.low[1] == 0 < made.low[0] < made.absolute < 1e-59
    assert made.ball.radius[1] == 0 and made.settled == 2


def test_a_number_half_way_is_settled_if_it_is_even() -> None:
    """Known exactly, it is rounded to the even one of its two neighbours; never otherwise."""
    even, odd, half = 1.0 + 2**-51, 1.0 + 2**-52, 2.0**-53
    for x, low, radius, settled in (
        (even, half, 0, True), (even, -half, 0, True), (odd, half, 0, False),
        (even, half, 1e-30, False), (odd, half * (1 - 2**-20), 1e-30, True), (0.0, 0.0, 0, True),
        (0.0, 1e-90, 1e-89, False),
    ):  # fmt: skip
        ball = contained.Ball(*(np.array([y], float) for y in (x, low, radius)))
        assert contained.settled(ball).item() is settled


# ------------------------------------------------------------------ the folder


@pytest.mark.parametrize("name", EACH)
def test_a_manifest_is_complete(name: str) -> None:
    """Every number of version 1 is certified, given, another name, or said not to be certified."""
    one, told = MANIFESTS[name], MANIFESTS[name]["certificate"]
    case = stored(one["of"])
    assert told["given"] == certified.given_digest(case)
    assert told["given"] == certified.given_digest(stored(name, FOLDER))
    assert told["command"] == certified.COMMAND and told["bits"] == certified.BITS
    for array in case.arrays:
        said = [
            array in told["arrays"],
            kind_of(array) in told["is also"],
            array == "drawn" and told["drawn"]["same"] == (case.arrays["drawn"] >= 0).sum(),
        ]
        less = (
            array in told["arrays"] and told["arrays"][array]["entries"] < case.arrays[array].size
        )
        assert not less or kind_of(array) in told["not certified"], array
        given = array.partition(".")[0] in ("weights", "corpus", "labels")
        given = given or array.endswith((".kept", ".n_A", ".n_G"))
        assert sum(said) == (not given), array
    for array, own in told["arrays"].items():
        assert own["digits"] is None or own["digits"] >= 30, array
        assert own["settled"] <= own["entries"] <= case.arrays[array].size
        assert own["entries"] == case.arrays[array].size or ".U_" in array


def test_every_valid_case_with_a_network_has_its_version_2() -> None:
    wanted = [m for m in make.manifests() if m["result"] == "valid" and "forward" in m["needs"]]
    assert [one["of"] for one in MANIFESTS.values()] == [one["caseId"] for one in wanted]
    for name, one in MANIFESTS.items():
        data = (FOLDER / one["file"]["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == one["file"]["sha256"], name
        assert all(c["error"] <= c["budget"] for c in one["checks"]) and one["checks"]


def test_the_folder_is_what_its_index_says() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {"index.json", *(f"{n}.{e}" for n in MANIFESTS for e in ("h5", "json"))}
    every = [path for path in make.HERE.rglob("*.*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in every) < 10e6


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes(tmp_path) -> None:
    case = stored("vit-mean_v1")
    for run in "ab":
        (tmp_path / run).mkdir()
        certified.write(case, certified.made_of(case), tmp_path / run)
    for ending in ("h5", "json"):
        one, two = (tmp_path / run / f"vit-mean_v2.{ending}" for run in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_the_page_is_what_the_manifests_say() -> None:
    """`python -m validation.cases.certified --render`."""
    assert make.PAGE.read_text(encoding="utf-8") == certified.page()


def test_version_1_is_as_it_was() -> None:
    """Its manifests have no certificate; it is cited as it stands."""
    assert json.loads((make.VECTORS / "gqa_v1.json").read_text())["certificate"] is None
