"""The cut and the edit of the real numbers: proved against fractions, and on small models."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import case, few
from test_certified import model_and_corpus
from test_eigen_enclosures import holds, known, rational

import refcurv as rc
from refcurv.algebra.balls import Balls, around_zero, bits, exact
from refcurv.algebra.eigen_enclosures import enclose, refined
from refcurv.certified import cuts, spectra
from refcurv.certified.certify import certify
from refcurv.certified.cuts import decided, edited
from refcurv.cli import main
from refcurv.curvature import definition
from refcurv.curvature.eigenbasis import Eigenbasis, eigenbasis
from refcurv.editing.projection import projected
from refcurv.law.checks import EmptyError, RefcurvError
from refcurv.report.certificate import format_certificate

# ------------------------------------------------------------------ the cut


def real_cut(lam: list[Fraction], mu: list[Fraction], rho: float) -> np.ndarray:
    """SELECT on fractions, without a rounding."""
    pairs = [(-a * b, i, j) for i, a in enumerate(lam) for j, b in enumerate(mu)]
    mask, mass = np.zeros((len(lam), len(mu)), bool), Fraction(0)
    for key, i, j in sorted(pairs):
        if mass >= Fraction(rho) * sum(lam) * sum(mu):
            break
        mask[i, j], mass = True, mass - key
    return mask


def wrongly(lam: list[Any], mu: list[Any], rho: float, radius: float = 0.0) -> bool:
    """Is a pair proved to be on the side where it is not?"""
    one, two = ([Fraction(x) for x in side] for side in (lam, mu))
    with bits(120):
        balls = (rational(x) + around_zero(np.full(len(x), radius)) for x in (one, two))
        kept, dropped = decided(*balls, rho, "x")
    mask = real_cut(one, two, rho)
    key = np.multiply.outer(np.array(one, object), np.array(two, object))
    if {*key[kept]} & {*key[dropped]}:  # equal keys, decided differently
        return True
    return bool((kept & ~mask).any() or (dropped & mask).any() or (kept & dropped).any())


SIDE = st.lists(st.fractions(0, 4, max_denominator=50), min_size=1, max_size=5).filter(any)


@few(15)
@given(SIDE, SIDE, st.floats(0, 1), st.sampled_from([0.0, 1e-9, 1e-3]))
def test_no_pair_is_proved_to_be_where_it_is_not(
    lam: list[Fraction], mu: list[Fraction], rho: float, radius: float
) -> None:
    one, two = (sorted(side, reverse=True) for side in (lam, mu))
    if radius < float(min(sum(one), sum(two))) / 5:
        assert not wrongly(one, two, rho, radius)


@few(40)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_the_cut_of_fractions_is_proved(seed: int, O: int, I: int, rho: float) -> None:
    """Of keys that differ, every pair is decided. What is 0 is cut."""
    rng = np.random.default_rng(seed)
    lam, mu = (
        sorted((Fraction(int(x), 1009) for x in rng.choice(10**6, n, replace=False)), reverse=True)
        for n in (O, I)
    )
    keys = [a * b for a in lam for b in mu if a * b]
    if len({*keys}) < len(keys) or not keys:
        return
    with bits(120):
        kept, dropped = decided(rational(lam), rational(mu), rho, "x")
    assert (kept == real_cut(lam, mu, rho)).all() and (kept ^ dropped).all()


@pytest.mark.parametrize("rho", [5e-324, 1e-310])
def test_the_smallest_share_keeps_one_pair(rho: float) -> None:
    """Even where it is less than a unit of the largest key."""
    sides = [Fraction(5, 3), Fraction(4, 3), Fraction(0)], [Fraction(7, 3), Fraction(1, 3)]
    with bits(120):
        kept, dropped = decided(*map(rational, sides), rho, "x")
    assert kept.tolist() == [[True, False], [False, False], [False, False]]
    assert (kept ^ dropped).all()


def test_a_tie_across_the_cut_is_undecided() -> None:
    """Both keys are 2: no ball says which comes first. Others are decided."""
    with bits(100):
        thirds = rational([Fraction(2, 3), Fraction(1, 3)])
        kept, dropped = decided(thirds, thirds, 0.5, "x")
        whole, none = decided(thirds, thirds, 0.9, "x")
    assert kept.tolist() == [[True, False], [False, False]]
    assert dropped.tolist() == [[False, False], [False, True]]
    assert whole.tolist() == [[True, True], [True, True]] and not none.any()


def test_a_mass_that_is_not_known_cuts_nothing() -> None:
    """Of 8 and up to 2 the first has 85 % of the mass, or not quite."""
    with bits(100):
        mu = exact(np.array([8, 1])) + around_zero(np.array([0.0, 1.0]))
        for one, other in ((exact(np.array([1])), mu), (mu, exact(np.array([1])))):
            kept, dropped = decided(one, other, 0.85, "x")
            assert kept.reshape(-1).tolist() == [True, False] and not dropped.any()


def test_a_mass_that_is_the_target_is_enough() -> None:
    """4 of 8 is half: the first pair is all that is kept. Balls about thirds cannot say."""
    with bits(100):
        exactly = decided(exact(np.array([1])), exact(np.array([4, 3, 1])), 0.5, "x")
        thirds = decided(rational([Fraction(1, 3)]), exact(np.array([4, 3, 1])), 0.5, "x")
    assert exactly[0].tolist() == [[True, False, False]]
    assert exactly[1].tolist() == [[False, True, True]]
    assert (exactly[0] >= thirds[0]).all() and not (thirds[0] | thirds[1])[0, 1]


def test_the_law_may_cut_elsewhere_and_that_is_another_statement() -> None:
    """1 + 2 tiny is below the target of the real numbers, and rounds to that of float64."""
    tiny = 2.0**-53
    lam, mu = np.array([1.0]), np.array([1, tiny, tiny * 0.9, tiny * 0.8, tiny * 0.7])
    rho = 1 - tiny
    with bits(200):
        kept, dropped = decided(exact(lam), exact(mu), rho, "x")
    assert (kept | dropped).all()
    assert (kept == real_cut([Fraction(1)], [Fraction(x) for x in mu.tolist()], rho)).all()
    assert spectra._otherwise(kept, dropped, spectra._selected(lam, mu, rho)) > 0


def test_no_mass_is_no_share() -> None:
    """It is 0, or may be: one line says what to do."""
    with bits(100), pytest.raises(EmptyError, match=r"mass of 'up' is 0, no share.*leave it out"):
        decided(exact(np.zeros(2)), exact(np.ones(2)), 0.5, "up")
    said = "with 100 bits the .* of 'up' is not proved to be above 0.*leave it out.*more digits"
    with bits(100), pytest.raises(EmptyError, match=said) as error:
        decided(around_zero(np.full(2, 1e-9)), exact(np.ones(2)), 0.5, "up")
    assert "\n" not in str(error.value)


PLANTED_CUTS: dict[str, tuple[str, Any, Any]] = {
    "keys by midpoints": ("whole", lambda old: lambda x, k: old(x.midpoints(), k), 0.1),
    "upper bounds that are lower ones": (
        "whole",
        lambda old: lambda x, k: (old(x, k)[0],) * 2,
        0.1,
    ),
}


@pytest.mark.parametrize("what", PLANTED_CUTS)
def test_a_false_cut_is_caught(what: str) -> None:
    """λ and μ are known up to a tenth; the real ones lie at an edge of that."""
    name, change, radius = PLANTED_CUTS[what]

    def wrong() -> bool:
        rng = np.random.default_rng(0)
        for _ in range(40):
            lam, mu = (np.sort(rng.integers(1, 40, 3))[::-1] / 8 for _ in "GA")
            off = exact(np.array([radius, 0, -radius]))
            with bits(100):
                one, two = (exact(x) + off + around_zero(np.full(3, radius)) for x in (lam, mu))
                kept, dropped = decided(one, two, 0.6, "x")
            mask = real_cut([Fraction(x) for x in lam], [Fraction(x) for x in mu], 0.6)
            if (kept & ~mask).any() or (dropped & mask).any():
                return True
        return False

    assert not wrong()
    with mock.patch.object(Balls, name, change(getattr(Balls, name))):
        assert wrong()


# ------------------------------------------------------------------ the edit


def edit_misses(noise: float = 0.0, seed: int = 0, rho: float = 0.82, turned: bool = False) -> bool:
    """Does an entry of W' of fractions lie outside its ball? Both spectra have clusters.

    noise is added to the columns; or the first two are turned, and stay orthonormal.
    """
    values = (
        [Fraction(x) for x in (5, 3, 3, 1, 1)],
        [Fraction(x) for x in (4, 2, 2, Fraction(1, 9))],
    )
    W = np.random.default_rng(seed).integers(-9, 10, (5, 4)).astype(float)
    mask = real_cut(*values, rho)
    with bits(140):
        sides = []
        for n, d in enumerate(values):
            A, Q, _ = known(d, seed + n)
            X = refined(A)
            if noise:
                X = X + exact(noise * np.random.default_rng(n).normal(size=Q.shape))
            if turned:
                c, s = Fraction(4095, 4097), Fraction(128, 4097)
                X[:, :2] = X[:, :2] @ rational([[c, -s], [s, c]])
            sides.append((enclose(A, X), Q))
        (G, U), (A, V) = sides
        found = edited(W, G, A, mask)
    exactly = np.array([[Fraction(x) for x in row] for row in W.tolist()])
    truth = U @ ((U.T @ exactly @ V) * mask) @ V.T
    return not all(holds(found[at], truth[at]) for at in np.ndindex(5, 4))


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3])
def test_the_edit_of_fractions_lies_in_its_balls(noise: float) -> None:
    assert not edit_misses(noise) and not edit_misses(noise, 3, 0.98)
    assert not edit_misses(rho=0.58, turned=True)


@pytest.mark.parametrize(
    ("where", "name"),
    [(cuts, "around_zero"), (spectra.Spectrum, "far"), (spectra.Spectrum, "angle")],
)
def test_a_false_edit_is_caught(where: Any, name: str) -> None:
    made = (lambda r: exact(np.zeros(np.shape(r)))) if name == "around_zero" else lambda *_: 0.0
    with mock.patch.object(where, name, made):
        assert edit_misses(1e-3) or edit_misses(rho=0.58, turned=True)


def test_every_set_of_rows_adds_its_bound() -> None:
    """‖W‖ (far of the rows + 2 far of the first c) for each set, of spectra that say how far."""
    G, A = (
        SimpleNamespace(values=range(n), X=exact(np.eye(n)), far=lambda a, b, s=s: s**a * b)
        for n, s in ((5, 8), (3, 1))
    )
    mask: Any = np.arange(3) < np.array([[3], [3], [1], [0], [0]])
    W = np.zeros((5, 3))
    W[0, 1] = 2
    with bits(100):
        found = edited(W, G, A, mask)  # type: ignore[arg-type]
    assert found.rounded().tolist() == W.tolist()
    assert found.radii() == pytest.approx(2 * ((2 + 2 * 3) + (64 * 3 + 2 * 1)), rel=1e-6)


def test_a_cluster_that_a_mask_parts_has_no_edit() -> None:
    with bits(100):
        one = enclose(exact(np.diag([2, 1, 1])), exact(np.eye(3)))
        found = edited(np.ones((3, 3)), one, one, np.arange(3) < np.array([[2], [0], [0]]))
        assert np.isinf(found.radii()).all()
        with pytest.raises(ValueError, match="no staircase"):
            edited(np.ones((3, 3)), one, one, np.arange(3) < np.array([[0], [2], [0]]))


# ------------------------------------------------------------------ models

LAYERS = "blocks.0.mlp.{up,down}"
ALL = ["eigenvalues", "cut", "edit"]


@pytest.fixture(scope="module")
def small() -> tuple[rc.Model, rc.Corpus, rc.Certificate]:
    model, corpus = model_and_corpus(case(batch=3, length=4, layers=1))
    found = certify(model, corpus, ALL, layers=LAYERS, sequences=[0, 1, 2], rho=0.8)
    return model, corpus, found


def test_a_small_model_is_certified_to_its_edit(small) -> None:
    """Every digit asked for, every pair decided, and near what float64 makes of it."""
    model, corpus, found = small
    assert found.digits >= 30
    names = ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    sums = definition.factors(model, corpus, names, "empirical")
    for name in names:
        S = sums[name]
        for side, sum_, n in (("A", S.S_A, S.n_A), ("G", S.S_G, S.n_G)):
            values = found[f"eigenvalues.{side}.{name}"]
            want = np.sort(np.linalg.eigvalsh(sum_ / n))[::-1]
            assert np.abs(values.nearest - want).max() <= 1e-12 * want[0]
            facts = found.spectra[f"{side}.{name}"]
            assert facts["size"] == len(want) and facts["zeros"] == max(len(want) - n, 0)
        made = [eigenbasis(x, 9, "float64", "x")[:2] for x in (S.S_A / S.n_A, S.S_G / S.n_G)]
        basis = Eigenbasis(*made[0], *made[1])
        W = model.parameters[f"{name}.weight"]
        want = projected(W, basis, 0.8)
        assert np.abs(found[f"edit.{name}"].nearest - want).max() <= 1e-9 * np.abs(want).max()
        told = found.cuts[name]
        assert told["undecided"] == told["nearest"] == told["float64"] == 0
        assert told["kept"] + told["cut"] == told["pairs"] == W.size
        assert found[f"cut.{name}"].nearest.sum() == told["kept"]
    routes = {(r.name, r.dtype): r.ulps for r in found.routes}
    assert all(routes[f"edit.{name}", "float64"] < 1e9 for name in names)
    assert ("cut.blocks.0.mlp.up", "float64") not in routes


def test_eigenvalues_of_mpmath_lie_in_those_of_a_model(small) -> None:
    """Of A's midpoints, whose eigenvalues are within the norm of A's radii of the real ones."""
    _, _, found = small
    A, values = found["A.blocks.0.mlp.up"], found["eigenvalues.A.blocks.0.mlp.up"]
    import mpmath

    with mpmath.workdps(80):
        whole = mpmath.matrix([
            [sum(mpmath.mpf(float(p)) for p in A.parts[:, i, j]) for j in range(A.shape[1])]
            for i in range(A.shape[0])
        ])  # fmt: skip
        want = sorted(mpmath.eigsy(whole, eigvals_only=True), reverse=True)
        for i, x in enumerate(want):
            near = sum(mpmath.mpf(float(p)) for p in values.parts[:, i])
            assert abs(near - x) <= float(values.radius[i]) + 8 * float(A.radius.max()) + 1e-50


def test_one_sequence_has_a_low_rank() -> None:
    """Three rows: the other eigenvalues are exactly 0, and every pair with them is cut."""
    model, _ = model_and_corpus(case(batch=1, layers=1))
    found = certify(model, rc.Corpus(np.array([[1, 2, 3, 4]])), [*ALL, "eigenvectors"],
                    layers=LAYERS, rho={LAYERS: 0.9})  # fmt: skip
    for name, facts in found.spectra.items():
        values = found[f"eigenvalues.{name}"]
        assert facts["zeros"] == facts["size"] - 3 == (values.nearest[3:] == 0).sum()
        assert (values.radius[3:] == 0).all() and (values.nearest[:3] > 0).all()
        if name[0] == "A":  # three eigenvectors, and a basis of the rest
            U = found[f"eigenvectors.{name}"]
            assert np.abs(U.nearest.T @ U.nearest - np.eye(len(values.nearest))).max() < 1e-15
            left = found[name].nearest @ U.nearest - U.nearest * values.nearest
            assert np.abs(left).max() < 1e-14 * values.nearest[0] and U.radius.max() < 1e-20
            top = np.abs(U.nearest).argmax(axis=0)
            assert (U.nearest[top, np.arange(len(top))] > 0).all()
        assert facts["unsure"] == 0 and facts["fewest"] > 20 and facts["angle"] < 1e-20
    assert all(one["kept"] <= 9 and one["undecided"] == 0 for one in found.cuts.values())
    assert found.digits >= 30


def total_of(one: Any, index: tuple[int, ...]) -> Fraction:
    return sum((Fraction(float(part)) for part in one.parts[(slice(None), *index)]), Fraction())


def test_more_digits_lie_inside(small) -> None:
    model, corpus, found = small
    more = certify(model, corpus, ["edit"], digits=50, layers=LAYERS, sequences=[0, 1, 2], rho=0.8)
    names = [name for name in more if name.startswith(("edit", "eigenvalues"))]
    assert len(names) == 6
    for name in names:
        one, two = found[name], more[name]
        for index in np.ndindex(one.shape):
            far = abs(total_of(one, index) - total_of(two, index))
            assert far + Fraction(two.radius[index]) <= Fraction(one.radius[index])
    assert more.digits >= 50


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_nothing_and_everything(rho: float) -> None:
    model, corpus = model_and_corpus(case(batch=1, length=3, layers=1))
    found = certify(model, corpus, ["edit"], layers="blocks.0.mlp.up", rho=rho)
    W = model.parameters["blocks.0.mlp.up.weight"]
    edit = found["edit.blocks.0.mlp.up"]
    assert np.array_equal(edit.nearest, rho * W) and not edit.radius.any()
    assert found.cuts["blocks.0.mlp.up"]["kept"] == rho * W.size


def test_what_cannot_be_cut() -> None:
    model, corpus = model_and_corpus(case(batch=1, length=3, layers=1, tied=True))
    for more, words in (
        (dict(of=["cut"]), "need rho"),
        (dict(of=["A"], rho=0.5), "rho is of 'cut' and 'edit'"),
        (dict(of=["cut"], rho=1.5), "must lie in"),
        (dict(of=["cut"], rho="x"), "must be a number"),
        (dict(of=["cut"], rho=0.5), "head is tied"),
        (dict(of=["cut"], rho={"**.up": 0.5, "blocks.**": 0.5}), "two patterns"),
        (dict(of=["cut"], rho={"none": 0.5}), "matches none"),
        (dict(of=["eigenvalue"]), "Did you mean 'eigenvalues'"),
    ):
        with pytest.raises(RefcurvError, match=words):
            certify(model, corpus, **more)


def test_eigenvalues_lie_within_their_budget_and_faults_do_not(small) -> None:
    """Of the solver and of what float64 made of A; one that is off by 1e-11 of itself is seen."""
    model, corpus, found = small
    routes = {one.name: one for one in found.routes if one.name.startswith("eigenvalues")}
    assert routes and all(one.inside and one.used("worst") < 1 for one in routes.values())
    assert max(one.used("probable") for one in routes.values()) > 1e-4

    def off(*args: Any) -> Any:
        U, values, raised = eigenbasis(*args)
        return U, values * (1 + 1e-11 * (np.arange(len(values)) == 0)), raised

    with mock.patch.object(spectra, "eigenbasis", off):
        wrong = certify(model, corpus, ["eigenvalues"], layers="blocks.0.mlp.up", digits=20)
    out = {one.name for one in wrong.routes if not one.inside}
    assert out == {f"eigenvalues.{side}.blocks.0.mlp.up" for side in "AG"}


def test_only_the_layers_of_rho_are_worked_on(small) -> None:
    """An edit asks nothing of other layers; eigenvalues that are asked for are of every layer."""
    model, corpus, _ = small
    rho = {"blocks.0.mlp.down": 0.8}
    told: list[Any] = []
    one = certify(model, corpus, ["cut"], rho=rho, digits=5, estimate=told.append)
    assert {n for n in one if n[0] in "AG"} == {"A.blocks.0.mlp.down", "G.blocks.0.mlp.down"}
    assert [*one.cuts] == ["blocks.0.mlp.down"] and "cut.blocks.0.mlp.down" in one
    asked = dict(layers="blocks.0.mlp.*", digits=5, estimate=told.append)
    every = certify(model, corpus, ["cut", "eigenvalues"], rho=rho, **asked)
    assert "eigenvalues.A.blocks.0.mlp.up" in every and [*every.cuts] == [*rho]
    assert told[0].memory < told[1].memory


def test_a_cut_that_is_undecided_has_no_edit_and_says_so(small) -> None:
    """Weights that make two hidden units one: their eigenvalues tie, but not across the cut."""
    model, corpus, found = small
    told = dict(found.cuts["blocks.0.mlp.up"], undecided=2)
    page = format_certificate(replace(found, cuts={"blocks.0.mlp.up": told}).to_json())
    assert "UNDECIDED: 2 pairs of blocks.0.mlp.up; its W' is not enclosed." in page
    unsure = np.zeros((8, 5), bool)
    with mock.patch.object(spectra, "decided", lambda *_: (unsure.copy(), unsure.copy())):
        none = certify(model, corpus, ["edit"], layers="blocks.0.mlp.down", rho=0.8)
    assert none.cuts["blocks.0.mlp.down"]["undecided"] == 40
    assert not any(name.startswith(("cut", "edit")) for name in none)


def test_where_float64_overflowed_nothing_stands_beside() -> None:
    """Its A and G are then missing; the real numbers' are certified all the same."""
    task: Any = SimpleNamespace(
        rho={"x": 0.5}, of=("edit",), parameters={"x.weight": np.eye(2)},
        config=SimpleNamespace(weight_of=lambda layer: f"{layer}.weight"),
    )  # fmt: skip
    ticks: list[None] = []
    with bits(100):
        means = {f"{side}.x": exact(np.diag([3.0, 1.0])) for side in "AG"}
        found = spectra.prove(task, means, {}, {"A.x": 2, "G.x": 2}, lambda: ticks.append(None))
    assert not found.floats and found.cuts["x"]["float64"] is None and len(ticks) == 2
    assert found.arrays["edit.x"].rounded().tolist() == [[1, 0], [0, 0]]
    assert found.arrays["cut.x"].rounded().tolist() == [1, 0]
    page = format_certificate(
        {"numbers": {}, "routes": [], "bits": 1, "digits": None, "wanted": 1, "cuts": found.cuts}
    )
    assert "on float64's own eigenvalues has no cut" in page
    with bits(100):
        none = {name: np.zeros((2, 2)) for name in means}  # it has underflowed
        found = spectra.prove(task, means, none, {"A.x": 2, "G.x": 2}, lambda: None)
        off = {name: np.diag([1, 0.9]) for name in means}  # it keeps a second pair
        other = spectra.prove(task, means, off, {"A.x": 2, "G.x": 2}, lambda: None)
    assert found.cuts["x"]["float64"] is None and "edit.x" in found.arrays
    assert "edit.x" not in found.floats
    assert (other.cuts["x"]["nearest"], other.cuts["x"]["float64"]) == (0, 1)


def test_what_is_told_of_eigenvalues() -> None:
    with bits(100):
        for values, rank, want in (
            ([4, 2, 1], 3, dict(size=3, zeros=0, unsure=0, clusters=0)),
            ([4, 1, 1, 0, 0], 3, dict(size=5, zeros=2, unsure=0, clusters=1)),
            ([4, 1, 0, 0, 0], 3, dict(size=5, zeros=2, unsure=1, clusters=1)),
        ):
            one = enclose(exact(np.diag(values)), exact(np.eye(len(values))), rank)
            assert spectra._told(one, rank).items() >= want.items()
        wide = exact(np.diag([4, 1, 0.5])) + around_zero(np.diag([0.0, 0.0, 2.0**-20]))
        told = spectra._told(enclose(wide, exact(np.eye(3))), 3)
    assert 5.6 < told["fewest"] < 5.8 < told["median"] < 6.1


def test_the_file_and_the_page_hold_the_cut(small, tmp_path, capsys) -> None:
    model, corpus, found = small
    path = tmp_path / "c.h5"
    rc.save_certificate(found, path)
    read = rc.load_certificate(path)
    assert read.to_json() == json.loads(json.dumps(found.to_json()))
    rc.save(model, str(tmp_path / "w.h5"))
    rc.save_corpus(corpus, str(tmp_path / "t.h5"))
    args = [str(tmp_path / "w.h5"), str(tmp_path / "t.h5"), "--layers", LAYERS]
    table = str(tmp_path / "t.json")
    status = main(["certify", *args, "--of", "edit", "--rho", f"{LAYERS}=0.8", "--json", table])
    said = " ".join(capsys.readouterr().out.split())
    assert status == 0 and "proved kept" in said and "0 undecided" in said
    assert "eigenvalues of A" in said and "are exactly 0" in said and " edit " in said
    assert json.loads(Path(table).read_text("utf-8"))["cuts"]
    with mock.patch.object(
        spectra, "decided", lambda G, A, *_: (np.zeros((len(G), len(A)), bool),) * 2
    ):
        assert main(["certify", *args, "--of", "cut", "--rho", "0.8", "--digits", "1"]) == 1
    capsys.readouterr()
    assert main(["certify", *args, "--of", "edit", "--rho", "x"]) == 2
    assert "certify: --rho takes" in capsys.readouterr().err
