"""F, F_tok and K side by side: zeros where theory has them, NumPy's own norms, the floor of O24.

Observed: the sweep against `exact` 4e-16 of each matrix (F: the same bits), zeros at most 1e-15,
the floor against the singular values 4e-16.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, case, few
from zoo import causal_mix, mlp, net

from refcurv.algebra.kron import kron_dense, rvec
from refcurv.curvature import distance, exact
from refcurv.curvature.distance import Distances, Three, compare, distances, nearest_kronecker
from refcurv.curvature.exact import fishers, of_outputs, problem
from refcurv.curvature.exact.fishers import Choice
from refcurv.law import tolerance
from refcurv.law.checks import ConventionError, EmptyError, NameUnknownError, RangeError
from refcurv.model.weights import Model
from validation.curvature.under_head import under_head

BUDGET = tolerance.gamma(100, np.float64)
"""Every number here is a sum of at most 400 roundings; relative to the matrix's own norm."""

seeds = st.integers(0, 9999)
sides = st.integers(1, 5)
KINDS = [
    dict(fisher="expected"),
    dict(fisher="empirical"),
    dict(fisher="sampled", seed=3, draws=2),
    dict(fisher="sampled", seed=3, draws=2, per="term"),
    dict(fisher="signed", seed=3, draws=2),
]


def model(**changes: object) -> tuple[Model, np.ndarray]:
    one = case(length=4, **changes)
    return Model(one.config, one.parameters), one.token


def sweep(made: exact.Problem, wrt: str, **options: object) -> dict[str, Three]:
    return distance._three(made, wrt, Choice(**options))


def psd(P: int, rng: np.random.Generator, rank: int = 0) -> np.ndarray:
    X = rng.normal(size=(P, rank or P + 2))
    return X @ X.T


def random_three(O: int, I: int, seed: int) -> Three:
    """Three unrelated matrices, n = 7."""
    rng = np.random.default_rng(seed)
    moments = exact.Moments(psd(I, rng), psd(O, rng), 7)
    return Three(psd(O * I, rng), psd(O * I, rng), moments)


# ------------------------------------------------------------------ the sweep


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_one_sweep_gives_the_three_exact_matrices(options: dict[str, object]) -> None:
    """All layers at once, each as `exact` has it by itself; positions mix, queries are grouped."""
    made = problem(*model())
    found = sweep(made, "blocks.*.{attn,mlp}.{q,k,v,o,gate,up,down}.weight,head.weight", **options)
    assert set(found) == made.linear
    for name in ("blocks.0.attn.k.weight", "blocks.0.mlp.down.weight", "blocks.1.attn.v.weight",
                 "blocks.1.mlp.gate.weight", "head.weight"):  # fmt: skip
        three = found[name]
        for what, got in (
            (exact.fisher, three.F),
            (exact.f_tok, three.F_tok),
            (exact.kfac, three.K),
        ):
            want = what(made, wrt=name, **options)
            assert_within(got, want, BUDGET, want, f"{what.__name__} {name}")
        assert (three.F == three.F.T).all()


def test_batches_of_cotangents_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mlp("tanh", n=3, T=2).problem()
    whole = sweep(made, "*.weight")
    monkeypatch.setattr(fishers, "COTANGENTS", 2)
    for name, three in sweep(made, "*.weight").items():
        assert_within(three.F, whole[name].F, BUDGET, whole[name].F, name)
        assert_within(three.F_tok, whole[name].F_tok, BUDGET, whole[name].F_tok, name)
        assert_within(three.K, whole[name].K, BUDGET, whole[name].K, name)


def test_a_part_of_a_layer_has_that_part_of_its_matrices() -> None:
    made, name = problem(*model()), "blocks.0.attn.v.weight"
    whole = sweep(made, name)[name]
    part = sweep(of_outputs(made, name, 1, 3), "**[1:3]")[f"{name}[1:3]"]
    I = made.parameters[name].shape[1]
    rows = slice(I, 3 * I)
    for got, want in ((part.F, whole.F), (part.F_tok, whole.F_tok), (part.K, whole.K)):
        assert_within(got, want[rows, rows], BUDGET, want[rows, rows], name)


def test_under_the_head_the_curvature_is_the_same() -> None:
    """validation/curvature measures with D cotangents a position, not V."""
    made, wrt = problem(*model(vocabulary=23)), "blocks.*.{attn,mlp}.{k,v,gate,down}.weight"
    under = under_head(made)
    plain, fewer = sweep(made, wrt), sweep(under, wrt)
    for name, three in fewer.items():
        for got, want in ((three.F, plain[name].F), (three.F_tok, plain[name].F_tok)):
            assert_within(got, want, BUDGET, want, name)  # observed 2e-15; the head's condition: 3
    for one, each in ((made, 23), (under, 8)):
        sizes = [len(d) for *_, d in fishers.cotangents(one, Choice())]
        assert sum(sizes) == 6 * each
    with pytest.raises(NameUnknownError):
        compare(under, wrt="head.weight")


# ------------------------------------------------------------------ zeros of theory


@few(8)
@given(seeds, st.integers(1, 3), st.integers(1, 3))
def test_O2_a_deep_linear_net_has_no_distances(seed: int, n: int, T: int) -> None:
    made = mlp("", loss="square", n=n, T=T, seed=seed).problem()
    for name, one in compare(made, wrt="*.weight").items():
        for what in (one.F_F_tok, one.F_tok_K, one.F_K, one.F_cK, one.floor):
            assert what < 1e-14, name
        for what in (one.trace_F_tok, one.trace_K, one.scale):
            assert abs(what - 1) < 1e-14, name
        assert one.rows == n * T


def test_O2_every_distance_is_seen_where_its_cause_is() -> None:
    """Mixing alone parts F from F_tok; a nonlinearity alone parts F_tok from K."""
    widths = {"one": (4, 3), "two": (3, 4)}
    linear, T = [("linear", "one"), ("linear", "two")], 3
    mixed = [linear[0], ("mix", causal_mix(T)), linear[1]]
    bent = [linear[0], ("tanh",), linear[1]]
    one = compare(net(mixed, widths, n=2, T=T, loss="square").problem(), wrt="one.weight")
    two = compare(net(bent, widths, n=2, T=T, loss="square").problem(), wrt="one.weight")
    assert one["one.weight"].F_F_tok > 0.1 and two["one.weight"].F_F_tok < 1e-14
    assert two["one.weight"].F_tok_K > 0.1
    behind = compare(net(mixed, widths, n=2, T=T, loss="square").problem(), wrt="two.weight")
    assert max(behind["two.weight"].F_F_tok, behind["two.weight"].F_tok_K) < 1e-14


def test_O38_in_the_last_block_positions_do_not_mix() -> None:
    """F = F_tok for all but k and v, for `expected`; not for one joint draw, nor a block below."""
    made = problem(*model())
    found = compare(made, wrt="blocks.{0-1}.{attn,mlp}.{q,k,v,o,gate,up,down}.weight,head.weight")
    for name, one in found.items():
        if name.startswith("blocks.0") or name.endswith(("attn.k.weight", "attn.v.weight")):
            assert one.F_F_tok > 0.01, name
        else:
            assert one.F_F_tok < 1e-14 and abs(one.trace_F_tok - 1) < 1e-14, name
            assert one.overlap[1] == (pytest.approx(1, abs=1e-9), one.overlap[1][1]), name
        assert one.F_tok_K > 0.05, name
    name = "blocks.1.mlp.up.weight"
    assert compare(made, wrt=name, fisher="sampled")[name].F_F_tok > 0.2
    assert compare(made, wrt=name, fisher="sampled", per="term")[name].F_F_tok < 1e-14


@pytest.mark.parametrize("name", ["blocks.0.mlp.gate.weight", "blocks.1.attn.v.weight"])
def test_O18_the_traces_tell_how_the_norms_go_together(name: str) -> None:
    """(tr K − tr F_tok)/n = −Cov(‖a‖², ‖g‖²) over rows, g squared over cotangents."""
    made = problem(*model())
    one = compare(made, wrt=name)[name]
    aa: dict[bytes, float] = {}
    gg: dict[bytes, float] = {}
    for a_TI, g_CTO in exact.rows(made, wrt=name):
        for t in range(len(a_TI) - 1):  # the last has no label
            key = a_TI[t].tobytes()
            aa[key] = float(a_TI[t] @ a_TI[t])
            gg[key] = gg.get(key, 0.0) + float((g_CTO[:, t] ** 2).sum())
    a, g = np.array(list(aa.values())), np.array([gg[key] for key in aa])
    assert len(a) == one.rows == 6
    covariance = (a * g).mean() - a.mean() * g.mean()
    assert one.trace_K - one.trace_F_tok == pytest.approx(-6 * covariance / one.trace, rel=1e-10)
    assert abs(covariance) > 1e-4 * (a * g).mean()


# ------------------------------------------------------------------ the distances


@given(sides, sides, seeds)
def test_distances_are_what_numpy_says(O: int, I: int, seed: int) -> None:
    three = random_three(O, I, seed)
    F, F_tok, A, G = three.F, three.F_tok, three.moments.A, three.moments.G
    K = 7 * np.einsum("op,ij->oipj", G, A).reshape(O * I, O * I)
    one = distances(three, top=(1, 2))
    size = np.sqrt((F**2).sum())
    c = (F * K).sum() / (K * K).sum()
    for got, want in (
        (one.norm, size),
        (one.trace, F.trace()),
        (one.F_F_tok, np.sqrt(((F - F_tok) ** 2).sum()) / size),
        (one.F_tok_K, np.sqrt(((F_tok - K) ** 2).sum()) / size),
        (one.F_K, np.sqrt(((F - K) ** 2).sum()) / size),
        (one.trace_F_tok, F_tok.trace() / F.trace()),
        (one.trace_K, 7 * G.trace() * A.trace() / F.trace()),
        (one.scale, c),
        (one.F_cK, np.sqrt(((F - c * K) ** 2).sum()) / size),
    ):
        assert got == pytest.approx(want, rel=1e-10, abs=1e-14)
    assert (one.shape, one.rows) == ((O, I), 7)
    assert one.F_K <= one.F_F_tok + one.F_tok_K + 1e-12
    for other in (0.9 * one.scale, 1.1 * one.scale, 1.0):
        assert one.F_cK <= np.linalg.norm(F - other * K) / size + 1e-12
    assert json.loads(json.dumps(one.to_json()))["F_K"] == one.F_K


def test_a_wrong_scale_is_told_from_a_wrong_shape() -> None:
    """B3: g of the mean loss over N rows makes K 1/N² of itself: c = N², and no distance left."""
    three = sweep(mlp("", loss="square", n=4).problem(), "two.weight")["two.weight"]
    moments = three.moments
    one = distances(replace(three, moments=replace(moments, G=moments.G / 16)))
    assert one.scale == pytest.approx(16, rel=1e-12) and one.F_cK < 1e-14 and one.F_K > 0.9


def test_matrices_that_are_swapped_or_turned_are_far() -> None:
    """B78: A ⊗ G for G ⊗ A, where both have one size; the floor does not see it, K does."""
    widths = {"one": (4, 4), "two": (4, 4)}
    made = net([("linear", "one"), ("linear", "two")], widths, n=3, loss="square").problem()
    three = sweep(made, "one.weight")["one.weight"]
    m = three.moments
    swapped = distances(replace(three, moments=replace(m, A=m.G, G=m.A)))
    assert distances(three).F_K < 1e-14
    assert swapped.F_K > 0.3 and swapped.F_cK > 0.3 and swapped.floor < 1e-14
    assert swapped.trace_K == pytest.approx(1, rel=1e-12)  # a trace is blind to it


# ------------------------------------------------------------------ O24: the best Kronecker fit


@given(sides, sides, seeds)
def test_O24_the_floor_is_what_the_other_singular_values_leave(O: int, I: int, seed: int) -> None:
    """By a full SVD of F, rearranged by loops."""
    three = random_three(O, I, seed)
    R = np.empty((O * O, I * I))
    for o, i, p, j in np.ndindex(O, I, O, I):
        R[o * O + p, i * I + j] = three.F[o * I + i, p * I + j]
    sigma = np.linalg.svd(R, compute_uv=False)
    want = np.sqrt((sigma[1:] ** 2).sum() / (sigma**2).sum())
    one = distances(three, top=())
    assert one.floor == pytest.approx(want, rel=1e-10, abs=1e-14)
    assert one.floor <= one.F_cK + 1e-14 and one.F_cK <= one.F_K + 1e-14
    G, A = nearest_kronecker(three.F, (O, I))
    assert np.linalg.norm(G) == pytest.approx(1) or O > I
    assert np.linalg.norm(G) * np.linalg.norm(A) == pytest.approx(sigma[0])
    assert min(np.linalg.eigvalsh(G)[0], np.linalg.eigvalsh(A)[0]) > -1e-10 * sigma[0]


@given(sides, sides, seeds, st.floats(-3, 3))
def test_O24_no_kronecker_fit_is_below_the_floor(O: int, I: int, seed: int, far: float) -> None:
    """Neither a random one, nor any near the best, nor that of EK-FAC's factors."""
    three, rng = random_three(O, I, seed), np.random.default_rng(seed)
    floor = distances(three, top=()).floor * np.linalg.norm(three.F)
    G, A = nearest_kronecker(three.F, (O, I))
    nudged = G + 10**far * rng.normal(size=G.shape), A + 10**far * rng.normal(size=A.shape)
    for pair in (nudged, (psd(O, rng), psd(I, rng)), (three.moments.G, three.moments.A)):
        fit = kron_dense(*pair)
        fit = fit * (np.vdot(three.F, fit) / np.vdot(fit, fit))
        assert np.linalg.norm(three.F - fit) >= floor * (1 - 1e-12)


@given(sides, sides, seeds)
def test_O24_a_kronecker_product_is_found_again(O: int, I: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    G, A = psd(O, rng), psd(I, rng)
    G_found, A_found = nearest_kronecker(kron_dense(G, A), (O, I))
    ratio = np.trace(G) / np.trace(G_found)
    assert_within(ratio * G_found, G, BUDGET, G, "G")
    assert_within(A_found / ratio, A, BUDGET, A, "A")


@given(sides, sides, seeds)
def test_O24_a_power_step_from_the_identity_is_shampoo(O: int, I: int, seed: int) -> None:
    """R rvec(1) = rvec(Σ D Dᵀ) and Rᵀ rvec(1) = rvec(Σ Dᵀ D), each of trace tr F."""
    D = np.random.default_rng(seed).normal(size=(6, O, I))
    F = sum(np.outer(rvec(d), rvec(d)) for d in D)
    R = distance.rearranged(F, (O, I))
    L, right = R @ rvec(np.eye(I)), R.T @ rvec(np.eye(O))
    want_L, want_right = sum(d @ d.T for d in D), sum(d.T @ d for d in D)
    assert_within(L, rvec(want_L), BUDGET, want_L, "L")
    assert_within(right, rvec(want_right), BUDGET, want_right, "R")
    for one in (L.reshape(O, O), right.reshape(I, I)):
        assert np.trace(one) == pytest.approx(np.trace(F), rel=1e-12)


def test_O24_better_factors_than_kfacs_exist() -> None:
    """A negative control of the floor: it is below F_cK where a and g depend on each other."""
    for one in compare(mlp("tanh", n=4).problem(), wrt="*.weight").values():
        assert 0.01 < one.floor < one.F_cK - 0.01 and one.F_cK < one.F_K - 1e-4


# ------------------------------------------------------------------ overlaps


@given(sides, sides, seeds)
def test_overlaps_are_of_projectors(O: int, I: int, seed: int) -> None:
    three = random_three(O, I, seed)

    def projector(M: np.ndarray, k: int) -> np.ndarray:
        U = np.linalg.eigh(M)[1][:, -k:]
        return U @ U.T

    for k, two in distances(three, top=(1, 3)).overlap.items():
        for got, other in zip(two, (three.F_tok, three.K), strict=True):
            want = np.trace(projector(three.F, k) @ projector(other, k)) / k
            assert got is None or got == pytest.approx(want, abs=1e-8)
            assert got is None or -1e-12 <= got <= 1 + 1e-12
    same = distances(replace(three, F_tok=three.F), top=(1, 3)).overlap
    assert all(two[0] == pytest.approx(1, abs=1e-12) for two in same.values())
    assert set(same) == {k for k in (1, 3) if k < O * I}


def turned(values: list[float], angle: float) -> np.ndarray:
    """diag(values), its first two axes turned."""
    Q = np.eye(len(values))
    c, s = np.cos(angle), np.sin(angle)
    Q[:2, :2] = [[c, -s], [s, c]]
    return Q @ np.diag(values) @ Q.T


def test_an_overlap_is_the_squared_cosine_and_none_in_a_cluster() -> None:
    F = np.diag([4.0, 3, 2, 2, 1, 0])
    moments = exact.Moments(np.diag([3.0, 2, 0]), np.diag([2.0, 2]), 1)  # K: 6 6 4 4 0 0
    three = Three(F, turned([4, 3, 2, 2, 1, 0], 0.3), moments)
    overlap = distances(three, top=(4, 1, 2, 3, 6, 99)).overlap
    assert list(overlap) == [1, 2, 3, 4]
    assert overlap[1] == (pytest.approx(np.cos(0.3) ** 2), None)
    assert overlap[2] == (pytest.approx(1), pytest.approx(0.5))
    assert overlap[3] == (None, None)
    assert overlap[4] == (pytest.approx(1), pytest.approx(0.75))


def test_large_matrices_go_by_lanczos_and_find_the_same(rng: np.random.Generator) -> None:
    M = psd(320, rng)
    values, U = distance._leading(M, 8)
    want, V = np.linalg.eigh(M)
    assert values == pytest.approx(want[:-9:-1], rel=1e-12)
    assert np.linalg.norm(U.T @ V[:, -8:]) ** 2 == pytest.approx(8, rel=1e-10)
    again = distance._leading(M, 8)[1]
    assert (again == U).all()


@pytest.mark.parametrize("values", [[5, 5, 3, 2], [5, 3, 2, 2], [5, 5, 5, 5], [-1, -1, -2, -3]])
def test_none_of_equal_leading_eigenvalues_is_missed(
    values: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Lanczos that finds one of several equal eigenvalues, or leaves one out, is not believed."""
    some = np.array([*values, *np.linspace(-9, -4, 296)], dtype=float)
    M = turned(some, 0.3)
    at = np.argsort(-some)
    for found in ([0, 2, 3], [0, 1, 3], [1, 2, 4]):
        U = np.linalg.eigh(M)[1][:, ::-1][:, found]
        lanczos = some[at][found], U
        monkeypatch.setattr(distance, "eigsh", lambda *a, one=lanczos, **o: one)
        got, V = distance._leading(M, 3)
        assert got == pytest.approx(values[:3], abs=1e-12)
        assert np.linalg.norm(M @ V - V * got) < 1e-12
        assert V.T @ V == pytest.approx(np.eye(3), abs=1e-12)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), seeds)
def test_the_eigenvalues_above_a_number_are_counted(values: list[int], seed: int) -> None:
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    M = Q @ np.diag(np.array(values, float)) @ Q.T
    for bound in np.arange(-3.5, 4):
        assert distance._above(M, bound) == sum(value > bound for value in values)
    alternating = np.kron(np.eye(3), [[0.0, 1], [1, 0]])  # every pivot is a 2 x 2 block
    assert distance._above(alternating, 0) == 3


# ------------------------------------------------------------------ refusals


def test_refusals() -> None:
    made, token = model()
    with pytest.raises(ConventionError, match="weight of one linear layer"):
        compare(made, token, wrt="final_norm.weight")
    with pytest.raises(ConventionError, match="fisher must be one of"):
        compare(made, token, wrt="head.weight", fisher="sample")
    with pytest.raises(ConventionError, match="a Model needs tokens"):
        compare(made, wrt="head.weight")
    with pytest.raises(RangeError, match="every top must be an integer of at least 1"):
        compare(made, token, wrt="head.weight", top=(0, 1))
    alone, labels = token[:, :1], token[:, 1:2]
    with pytest.raises(EmptyError, match=r"F of 'blocks.0.attn.q.weight' is 0"):
        compare(made, alone, labels, wrt="blocks.*.attn.q.weight")
    found = compare(made, alone, labels, wrt="blocks.*.attn.v.weight")
    assert all(isinstance(one, Distances) and one.F_F_tok < 1e-14 for one in found.values())
