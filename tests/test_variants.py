"""Controls: random directions, random pairs, one side's curvature; and the `method` of a basis."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, case, opened_for_lies
from test_biases import biased
from test_factors import corpus_of, model_of
from test_projection import SIZES, random_basis

import refcurv as rc
from refcurv.algebra.staircase import cut
from refcurv.curvature.bases import Bases
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.resumed_bases import decompose_to
from refcurv.editing.projection import keep_pairs, project
from refcurv.editing.variants import _drawn, _smallest, control
from refcurv.files.disk import file_sha256
from refcurv.files.weights import narrow, widen
from refcurv.law import tolerance
from refcurv.law.checks import (
    ConventionError,
    NameUnknownError,
    RangeError,
    SchemaError,
    ShapeError,
)

UP, DOWN = "blocks.0.mlp.up", "blocks.1.mlp.down"
MLP = "blocks.*.mlp.*"


@pytest.fixture(scope="module", params=["separate", "joint"])
def made(request: pytest.FixtureRequest) -> tuple[rc.Model, Bases]:
    """A model with biases on up and down, and its bases without and with their column."""
    one = biased()
    model = model_of(one)
    return model, rc.decompose(rc.collect(model, corpus_of(one), MLP), request.param)


def matrix(model: rc.Model, basis: Bases, layer: str) -> np.ndarray:
    """W, or [W b], as the basis has it."""
    W, b = model.parameters[f"{layer}.weight"], model.parameters.get(f"{layer}.bias")
    return W if len(basis[layer].mu) == W.shape[1] else np.column_stack([W, b])


def kept_pairs(model: rc.Model, edited: rc.Model, basis: Bases, layer: str) -> np.ndarray:
    """The mask, read off the coefficients of the edited matrix; each must be 0 or W's own."""
    one = basis[layer]
    C, D = (one.U_G.T @ matrix(x, basis, layer) @ one.U_A for x in (model, edited))
    mask = np.abs(D) > np.abs(C) / 2
    assert_within(D, np.where(mask, C, 0), tolerance.eigenpair(18), C, "coefficients")
    return mask


# ------------------------------------------------------------------ random directions


def test_random_directions_are_haar() -> None:
    """Each entry has mean 0 and mean square 1/n, the determinant is ±1 evenly; 5 standard errors.

    LAPACK's Q alone has a first entry <= 0 and, by its n reflections, one determinant.
    """
    N = 2000
    basis = Bases({"a": random_basis(2, 3, 0)})
    drawn = [rc.random_basis(basis, seed)["a"] for seed in range(N)]
    for n, side in ((3, "U_A"), (2, "U_G")):
        U = np.stack([getattr(one, side) for one in drawn])
        error = 5 / np.sqrt(N)
        assert np.abs(U.mean(axis=0)).max() < error * np.sqrt(1 / n)
        of_square = np.sqrt(2 * (n - 1) / (n + 2)) / n  # the standard deviation of an entry²
        assert np.abs((U**2).mean(axis=0) - 1 / n).max() < error * of_square
        assert abs(np.linalg.det(U).mean()) < error
        trace = np.trace(U, axis1=1, axis2=2)
        assert abs(trace.mean()) < error  # its mean square is 1
        assert abs((trace**2).mean() - 1) < error * np.std(trace**2)
        turned = U @ np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0]
        assert np.abs(turned.mean(axis=0)).max() < error * np.sqrt(1 / n)


def test_random_directions_depend_on_seed_side_and_layer_alone() -> None:
    layers = {name: random_basis(4, 4, k) for k, name in enumerate("abc")}
    all_three = rc.random_basis(Bases(layers), 3)
    alone = rc.random_basis(Bases({"b": layers["b"]}), 3)["b"]
    for side in ("U_A", "U_G"):
        assert getattr(alone, side).tobytes() == getattr(all_three["b"], side).tobytes()
    other_seed = rc.random_basis(Bases(layers), 4)
    several = [U for bases in (all_three, other_seed) for b in bases.values()
               for U in (b.U_A, b.U_G)]  # fmt: skip
    assert len({U.tobytes() for U in several}) == 12
    for U in several:
        assert_within(U.T @ U, np.eye(4), tolerance.eigenpair(4), np.eye(4), "orthogonal")
        assert not U.flags.writeable


def test_a_random_basis_has_the_mask_of_the_original(made: tuple[rc.Model, Bases]) -> None:
    """The same counts, mass, gap; W' is the sum over kept pairs of the random directions."""
    model, basis = made
    drawn = rc.random_basis(basis, 0)
    assert (drawn.method, drawn.bias, list(drawn)) == ("random basis", basis.bias, list(basis))
    rho = {UP: 0.6, DOWN: 0.9}
    (_, kfac), (edited, record) = rc.edit(model, basis, rho), rc.edit(model, drawn, rho)
    for one, two in zip(kfac.layers, record.layers, strict=True):
        assert (one.method, two.method) == ("kfac", "random basis")
        alike = dict(method="", norm=0, norm_original=0)
        assert replace(one, **alike) == replace(two, **alike)
        old, new = basis[one.layer], drawn[one.layer]
        assert (old.mu is new.mu, old.lam is new.lam) == (True, True)
        mask = cut(old.lam, old.mu, one.rho).mask(len(old.mu))
        W = matrix(model, basis, one.layer)
        direct = np.zeros(W.shape)
        for i, j in np.argwhere(mask):
            u, v = new.U_G[:, i], new.U_A[:, j]
            direct += (u @ W @ v) * np.outer(u, v)
        got = matrix(edited, basis, one.layer)
        assert_within(got, direct, tolerance.eigenpair(18), W, "definition")
        assert np.linalg.norm(got - matrix(rc.edit(model, basis, rho)[0], basis, one.layer)) > 0.1


# ------------------------------------------------------------------ random pairs


@pytest.mark.parametrize("share", [0.0, 0.01, 0.37, 0.5, 0.99, 1.0])
def test_random_pairs_are_a_projection_on_so_many_pairs(
    made: tuple[rc.Model, Bases], share: float
) -> None:
    model, basis = made
    edited, record = rc.random_pairs(model, basis, {f"{UP},{DOWN}": share}, 5)
    assert [x.layer for x in record.layers] == [UP, DOWN]
    for one in record.layers:
        old, W = basis[one.layer], matrix(model, basis, one.layer)
        mask = kept_pairs(model, edited, basis, one.layer)
        assert (one.method, one.rho) == ("random pairs", share)
        assert one.pairs == W.size == len(old.lam) * len(old.mu)
        assert one.kept == mask.sum() == round(share * W.size)
        assert (mask == _drawn(5, one.layer, W.shape, one.kept)).all()
        assert math.isnan(one.gap)
        assert one.acceptable == 0
        mass = sum(old.lam[i] * old.mu[j] for i, j in np.argwhere(mask))
        total = old.lam.sum() * old.mu.sum()
        assert one.mass == pytest.approx(mass / total, rel=1e-13, abs=0)
        norm = np.linalg.norm(matrix(edited, basis, one.layer)) / np.linalg.norm(W)
        assert one.norm == pytest.approx(norm, rel=1e-14)
    cut_in = tuple(one.layer for one in record.layers if one.kept < one.pairs)
    assert cut_in == (() if share > 0.98 else (UP, DOWN))
    for name, array in model.parameters.items():
        touched = name.startswith(cut_in or "none")
        touched &= "bias" not in name or basis.bias == "joint"
        assert (edited.parameters[name] is not array) == touched, name


def test_random_pairs_are_nested_in_their_share(made: tuple[rc.Model, Bases]) -> None:
    """For one seed a smaller share keeps a subset; so damage to W grows as the share falls."""
    model, basis = made
    shares = np.linspace(0, 1, 12)
    edited = [rc.random_pairs(model, basis, s, 1)[0] for s in shares]
    for layer in (UP, DOWN):
        masks = [kept_pairs(model, one, basis, layer) for one in edited]
        for small, large in pairwise(masks):
            assert not (small & ~large).any()
            assert large.sum() > small.sum()
    one, two, again = (
        kept_pairs(model, rc.random_pairs(model, basis, 0.5, s)[0], basis, UP) for s in (1, 2, 1)
    )
    assert (one == again).all()
    assert (one != two).any()


def test_random_pairs_of_a_layer_do_not_depend_on_the_others(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    every = rc.random_pairs(model, basis, 0.5, 1)[0].parameters[f"{DOWN}.weight"]
    alone = rc.random_pairs(model, basis, {DOWN: 0.5}, 1)[0].parameters[f"{DOWN}.weight"]
    assert every.tobytes() == alone.tobytes()
    gate, up = (
        kept_pairs(model, rc.random_pairs(model, Bases({n: basis[UP]}, bias=basis.bias), 0.5, 1)[0],
                   Bases({n: basis[UP]}), n)
        for n in (UP, "blocks.1.mlp.up")
    )  # fmt: skip
    assert (gate != up).any()


def test_pairs_are_chosen_uniformly() -> None:
    """Each pair of 4 x 5 is among the 6 smallest in 6/20 of the layers, within 5 deviations."""
    N = 4000
    masks = np.array([_drawn(9, f"layer {k}", (4, 5), 6) for k in range(N)], float)
    deviation = np.sqrt(0.3 * 0.7 / N)
    assert np.abs(masks.mean(axis=0) - 0.3).max() < 5 * deviation
    together = masks.reshape(N, 20).T @ masks.reshape(N, 20) / N
    both = 6 * 5 / (20 * 19)
    off = together[~np.eye(20, dtype=bool)]
    assert np.abs(off - both).max() < 5 * np.sqrt(both * (1 - both) / N)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 20))
def test_smallest_by_sorting(values: list[int], count: int) -> None:
    """With ties, by index."""
    count = min(count, len(values))
    want = np.zeros(len(values), bool)
    want[sorted(range(len(values)), key=lambda n: (values[n], n))[:count]] = True
    assert (_smallest(np.array(values, float), count) == want).all()


# ------------------------------------------------------------------ rounding


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_what_rounding_restores_is_the_brute_force(stored: str, bias: str) -> None:
    """Σ over the dropped pairs of their coefficients, of the rounding and of W, one by one."""
    one, up, gate = biased(), "blocks.0.mlp.up", "blocks.0.mlp.gate"
    short = {f"{up}.weight": stored, f"{up}.bias": "bfloat16", f"{gate}.weight": stored}
    kept = {n: widen(narrow(x, short.get(n, "float64")), short.get(n, "float64"), "float64")
            for n, x in one.parameters.items()}  # fmt: skip
    model = rc.Model(one.config, kept, "float64", short)
    basis = rc.decompose(rc.collect(model, corpus_of(one), "blocks.0.mlp.*"), bias)
    rho = {up: 0.6, gate: 0.9, "blocks.0.mlp.down": 0.5}
    for method in ("edit", "random_pairs"):
        more = (3,) if method == "random_pairs" else ()
        edited, record = getattr(rc, method)(model, basis, rho, *more)
        exact, _ = getattr(rc, method)(replace(model, stored={}), basis, rho, *more, force=True)
        for row in record.layers:
            old, new, whole = (matrix(x, basis, row.layer) for x in (model, edited, exact))
            made = basis[row.layer]
            back = cut = 0.0
            for i, j in np.argwhere(~kept_pairs(model, exact, basis, row.layer)):
                u, v = made.U_G[:, i], made.U_A[:, j]
                back += (u @ (new - whole) @ v) ** 2
                cut += (u @ old @ v) ** 2
            assert row.restored == pytest.approx(math.sqrt(back / cut), rel=1e-6, abs=0)
            bits = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}[stored]
            rounds = row.layer == gate or (row.layer == up and bias == "separate")
            if rounds:
                assert (row.restored == 0) == (stored == "float64")
                assert row.restored <= 2.0**-bits * np.linalg.norm(whole) / math.sqrt(cut)
        assert record.to_json()[0]["restored"] == record.layers[0].restored
    none, all_of_it = (rc.edit(model, basis, {up: share})[1].layers[0] for share in (1, 0))
    assert (none.restored, all_of_it.restored) == (0, 0)


# ------------------------------------------------------------------ one side


def test_one_side_keeps_whole_directions(made: tuple[rc.Model, Bases]) -> None:
    """Input directions by μ alone: whole columns of C, and the first rows of one more."""
    model, basis = made
    inputs, outputs = (rc.one_sided(basis, side) for side in ("inputs", "outputs"))
    divided = []
    assert (inputs.method, outputs.method) == ("inputs only", "outputs only")
    for bases in (inputs, outputs):
        edited, record = rc.edit(model, bases, {UP: 0.7, DOWN: 0.83})
        for one in record.layers:
            old = basis[one.layer]
            mask = kept_pairs(model, edited, basis, one.layer)
            mask = mask if bases is inputs else mask.T
            value, other = (old.mu, old.lam) if bases is inputs else (old.lam, old.mu)
            # the definition: values in turn, each other's number of pairs, until the mass is there
            want, mass = 0, 0.0
            while mass < one.rho * value.sum() * len(other):
                mass += value[want // len(other)]
                want += 1
            assert one.method == bases.method
            assert one.kept == want == mask.sum()
            whole, rest = divmod(want, len(other))
            assert mask[:, :whole].all()
            assert mask[:, whole].sum() == mask[:rest, whole].sum() == rest
            assert not mask[:, whole + 1 :].any()
            # the gap in a divided direction is 0, and any of its pairs could have been kept
            assert (one.gap == 0) == (rest > 0)
            assert one.acceptable == (len(other) if rest else 0)
            divided.append(rest > 0)
            assert one.mass == pytest.approx(mass / value.sum() / len(other), rel=1e-13)
    assert set(divided) == {False, True}


@given(SIZES, SIZES, st.integers(0, 999), st.floats(0.01, 0.99))
def test_the_two_sides_are_each_others_transpose(O: int, I: int, seed: int, rho: float) -> None:
    one = random_basis(O, I, seed)
    W = np.random.default_rng(seed).normal(size=(O, I))
    turned = Eigenbasis(one.U_G, one.lam, one.U_A, one.mu)
    a = rc.one_sided(Bases({"x": one}), "inputs")["x"]
    b = rc.one_sided(Bases({"x": turned}), "outputs")["x"]
    stairs, other = cut(a.lam, a.mu, rho), cut(b.lam, b.mu, rho)
    if stairs.kept == other.kept:  # rounding of the mass may decide one pair differently
        got = project(W.T, b, other.counts).T
        assert_within(got, project(W, a, stairs.counts), tolerance.gamma(64, float), W, "W")


def test_one_side_leaves_the_rest_alone(made: tuple[rc.Model, Bases]) -> None:
    _, basis = made
    for name, one in rc.one_sided(basis, "inputs").items():
        old = basis[name]
        assert one.U_A is old.U_A
        assert one.U_G is old.U_G
        assert one.mu is old.mu
        assert one.lam.tolist() == [1] * len(old.lam)


# ------------------------------------------------------------------ by name, on file, refused


def test_controls_by_name(made: tuple[rc.Model, Bases]) -> None:
    """Each is the function it names; random pairs are as many as K-FAC keeps."""
    model, basis = made
    rho = {UP: 0.6, DOWN: 0.8}
    _, kfac = rc.edit(model, basis, rho)
    want = {
        "random-basis": rc.edit(model, rc.random_basis(basis, 7), rho),
        "inputs": rc.edit(model, rc.one_sided(basis, "inputs"), rho),
        "outputs": rc.edit(model, rc.one_sided(basis, "outputs"), rho),
        "random-pairs": rc.random_pairs(
            model, basis, {x.layer: x.kept / x.pairs for x in kfac.layers}, 7
        ),
    }
    for kind, (right, record) in want.items():
        edited, found = control(model, basis, rho, kind, 7)
        assert found.to_json() == record.to_json()
        for name, array in right.parameters.items():
            assert edited.parameters[name].tobytes() == array.tobytes()
    counts = [x.kept for x in control(model, basis, rho, "random-pairs", 7)[1].layers]
    assert counts == [x.kept for x in kfac.layers]


def test_the_method_is_in_the_basis_file(made: tuple[rc.Model, Bases], tmp_path) -> None:
    model, basis = made
    path = tmp_path / "b.h5"
    for bases in (basis, rc.random_basis(basis, 0), replace(basis, method="of our own")):
        rc.save_bases(bases, path)
        back = rc.load_bases(path)
        assert (back.method, back.bias) == (bases.method, bases.bias)
        assert {x.method for x in rc.edit(model, back, 0.5)[1].layers} == {bases.method}
    with opened_for_lies(path) as file:
        del file.attrs["method"]  # as in files written before there was one
    assert rc.load_bases(path).method == "kfac"
    for wrong in (3, "", "\x1b[31m"):
        with opened_for_lies(path) as file:
            file.attrs["method"] = np.bytes_(wrong) if isinstance(wrong, str) else wrong
        with pytest.raises(SchemaError, match="attribute 'method' must be a printable text"):
            rc.load_bases(path)
    factors = rc.collect(model, corpus_of(case()), UP)
    decompose_to(factors, path)
    assert rc.load_bases(path).method == rc.decompose(factors).method == "kfac"


def test_a_basis_saved_again_names_the_file_it_came_from(
    made: tuple[rc.Model, Bases], tmp_path: Path
) -> None:
    first, again = tmp_path / "first.h5", tmp_path / "again.h5"
    rc.save_bases(made[1], first)
    rc.save_bases(rc.random_basis(rc.load_bases(first), 0), again)
    wanted = {"first.h5": file_sha256(first)}
    assert rc.load_bases(again).source["provenance"]["inputs"] == wanted


def test_records_are_json(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    flat = Bases({UP: replace(basis[UP], lam=0 * basis[UP].lam)}, bias=basis.bias)
    _, record = rc.random_pairs(model, flat, 0.5, 0)  # no mass to take a share of
    (row,) = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert (row["method"], row["mass"], row["gap"]) == ("random pairs", None, None)


def test_refusals(made: tuple[rc.Model, Bases]) -> None:
    model, basis = made
    for seed in (-1, 2**64, 0.5, True):
        with pytest.raises(RangeError, match="random_basis: seed must be an integer"):
            rc.random_basis(basis, seed)
        with pytest.raises(RangeError, match="random_pairs: seed must be an integer"):
            rc.random_pairs(model, basis, 0.5, seed)
    with pytest.raises(RangeError, match=r"random_pairs: share of '\*\*' must lie in \[0, 1\]"):
        rc.random_pairs(model, basis, 1.1, 0)
    with pytest.raises(NameUnknownError, match="'head' matches none"):
        rc.random_pairs(model, basis, {"head": 0.5}, 0)
    with pytest.raises(ConventionError, match=f"random_pairs: '{UP}' is matched by two patterns"):
        rc.random_pairs(model, basis, {UP: 0.5, "**.up": 0.5}, 0)
    with pytest.raises(NameUnknownError, match=r"random_pairs: .*another model"):
        rc.random_pairs(model, Bases({"blocks.9.mlp.up": basis[UP]}), 0.5, 0)
    with pytest.raises(ShapeError, match=r"random_pairs: .*up.weight.* must be \(8, .*of its"):
        rc.random_pairs(model, Bases({UP: basis[DOWN]}, bias=basis.bias), 0.5, 0)
    with pytest.raises(ConventionError, match=r"side must be one of inputs, outputs.*'inputs'?"):
        rc.one_sided(basis, "input")
    with pytest.raises(ConventionError, match=r"edit: control must be one of .*'random-pairs'?"):
        control(model, basis, 0.5, "random_pairs")


def test_keep_pairs_is_the_projection_of_any_mask() -> None:
    basis = random_basis(3, 4, 0)
    rng = np.random.default_rng(0)
    W, mask = rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.5
    want = sum(
        (basis.U_G[:, i] @ W @ basis.U_A[:, j]) * np.outer(basis.U_G[:, i], basis.U_A[:, j])
        for i, j in np.argwhere(mask)
    )
    assert_within(keep_pairs(W, basis, mask), want, tolerance.eigenpair(4), W, "definition")
