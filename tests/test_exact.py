"""Exact curvature against routes that share nothing with the complex step, and against theory.

Relative errors are in Frobenius norm unless a scale is named. Observed: the Hessian of a whole
decoder against central differences in longdouble 3e-13 (they have no more to give), GGN against
the expected Fisher 8e-16, F and F_tok against loops 1e-12.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import budgets
import numpy as np
import oracles
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, few, gap
from test_oracles import DIFFERENCE, SECOND
from zoo import causal_mix, mlp, net

import refcurv as rc
from refcurv.algebra.kron import rvec
from refcurv.curvature import exact
from refcurv.curvature.exact import Problem, of_outputs, products
from refcurv.curvature.exact.fishers import PER, Choice, cotangents, input_rows
from refcurv.curvature.exact.problems import Batch, of_batch
from refcurv.curvature.exact.products import PRODUCTS, gradient_at
from refcurv.curvature.exact.variables import Variables, variables_of
from refcurv.files.lazy import Lazy
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.law.conventions import Fisher
from refcurv.model.config import NormPlace, QKNorm
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.labels import shift_labels
from refcurv.model.weights import Model

WIDE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
needs_longdouble = pytest.mark.skipif(not WIDE, reason="longdouble is no wider than float64 here")
MATRICES = {"fisher": exact.fisher, "f_tok": exact.f_tok, "kfac": exact.kfac}
BUDGET = budgets.path(2, 8, np.float64)
"""Of the widest small decoder here; relative to a matrix whose terms do not cancel."""


def problem_of(one: Case, dtype: type = np.float64) -> Problem:
    """The case, with its padding and segments, at parameters of any dtype."""
    label, index = np.where(one.real, one.label, -1), np.arange(len(one.token))
    batch = Batch(one.config, one.token, label, one.segment, index, real_BT=one.real)
    return of_batch(batch, one.astype(dtype))


def direction(made: Problem, seed: int, wrt: str = "**") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = variables_of("test", made, None, None, wrt).names
    return {name: rng.normal(size=made.parameters[name].shape) for name in names}


def flat(named: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in named.values()])


labelled_cases = cases().filter(lambda one: (np.where(one.real, one.label, -1) >= 0).any())


# ------------------------------------------------------------------ gradient and Hessian


@given(labelled_cases)
def test_gradient_is_the_transformers(one: Case) -> None:
    """The Problem's sum of Taps and Slopes is `loss_and_gradient`, whose proof is O15."""
    made = problem_of(one)
    names = list(one.parameters)
    got = exact.gradient(made, wrt="**")
    label = np.where(one.real, one.label, -1)
    loss, want = loss_and_gradient(one.config, one.parameters, one.token, label, one.layout)
    z, _ = made.forward(made.parameters)
    assert_within(made.loss.terms(z)[0].sum(), loss, BUDGET, loss, "loss")
    for name in names:
        scale = np.abs(want[name]) + np.abs(flat(want)).max()
        assert_within(got[name], want[name], BUDGET, scale, name)


def test_a_part_of_the_gradient_has_the_bits_of_the_whole() -> None:
    """However many matrices are asked for, and wherever the backward may stop."""
    made = problem_of(case())
    whole = exact.gradient(made, wrt="**")
    for wrt in ("blocks.0.mlp.{up,down}.weight", "blocks.1.mlp.{gate,up,down}.weight", "head.*"):
        part = exact.gradient(made, wrt=wrt)
        assert part and all((part[name] == whole[name]).all() for name in part)


def test_what_is_left_out_is_the_default_and_progress_counts_segments() -> None:
    made, wrt, seen = problem_of(case()), "blocks.0.mlp.up.weight", []
    rest = {"per": "segment", "seed": 0, "draws": 1}
    for kind in Fisher:
        chosen = {} if kind is Fisher.EXPECTED else {"fisher": kind}
        want = exact.fisher(made, wrt=wrt, fisher=kind, **rest)
        assert (exact.fisher(made, wrt=wrt, **chosen) == want).all()
    exact.fisher(made, wrt=wrt, progress=lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2), (2, 2)]


@needs_longdouble
@pytest.mark.parametrize(
    ("place", "qk", "seed", "every"),
    [pytest.param("post", "full", 0, 1, marks=pytest.mark.slow), ("pre", "head", 1, 11)],
)
def test_hessian_equals_central_differences_in_longdouble(
    place: str, qk: str, seed: int, every: int
) -> None:
    """Every parameter of a 2-block decoder with grouped queries and SwiGLU, d = 8."""
    one = case(seed, batch=1, length=3, norm_place=NormPlace(place), qk_norm=QKNorm(qk))
    H = exact.hessian(problem_of(one), wrt="**")
    wide = problem_of(one, np.longdouble)
    block = variables_of("test", wide, None, None, "**")
    theta = block.flat(wide.parameters)
    h = np.longdouble(3e-7)

    def gradient(at: np.ndarray) -> np.ndarray:
        return block.flat(gradient_at(block, block.named(at)))

    columns = np.arange(0, len(theta), every)
    differences = np.empty((len(theta), len(columns)))
    for k, j in enumerate(columns):
        e = np.zeros_like(theta)
        e[j] = h
        differences[:, k] = (gradient(theta + e) - gradient(theta - e)) / (2 * h)
    assert H.shape == (len(theta),) * 2 and len(theta) >= 776
    assert_within(H[:, columns], differences, 1e-11, H[:, columns], "Hessian")
    for name in ("embed.weight", "blocks.0.attn.k.weight", "final_norm.weight"):
        at = variables_of("test", wide, None, None, name)
        assert at.size < block.size
        part = exact.hessian(problem_of(one), wrt=name)
        begin = offset(block, name)
        rows = slice(begin, begin + at.size)
        assert_within(part, H[rows, rows], BUDGET, H, name)


def offset(block: Variables, name: str) -> int:
    before = block.names[: block.names.index(name)]
    return sum(block.problem.parameters[n].size for n in before)


def test_hessian_of_a_block_equals_the_naive_one() -> None:
    """Against oracles.py alone: central differences of the naive loss, in longdouble."""
    one = case(batch=1, length=3, vocabulary=3, width=2, heads=2, kv_heads=1, mlp_width=2)
    name = "blocks.0.attn.v.weight"
    parameters = one.astype(np.longdouble)

    def loss(w: np.ndarray) -> np.longdouble:
        moved = parameters | {name: w.reshape(parameters[name].shape)}
        return oracles.loss(one.config, moved, one.token[0], one.label[0])

    naive = oracles.hessian(loss, parameters[name].ravel())
    H = exact.hessian(problem_of(one), wrt=name)
    assert_within(H, naive.astype(np.float64), SECOND, H, name)


@needs_longdouble
@few(8)
@given(labelled_cases, st.integers(0, 99))
def test_products_round_as_float64_does(one: Case, seed: int) -> None:
    """The same products in complex longdouble; H v's terms cancel less than by 100."""
    narrow, wide = problem_of(one), problem_of(one, np.longdouble)
    v = direction(narrow, seed)
    for product in (exact.hvp, exact.ggnvp):
        got, want = (flat(product(p, wrt="**", vector=v)) for p in (narrow, wide))
        assert_within(got, want, 100 * BUDGET, want, product.__name__)


def test_the_step_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any h from 1e-10 down gives the same digits: nothing is a difference."""
    made = problem_of(case())
    v = direction(made, 0)
    H_v = flat(exact.hvp(made, wrt="**", vector=v))
    for h in (1e-20, 1e-100):
        monkeypatch.setattr(products, "STEP", h)
        assert gap(flat(exact.hvp(made, wrt="**", vector=v)), H_v) < 1e-14


def along_all(made: Problem, v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that takes a direction."""
    wrt = ",".join(v)
    out = {
        "hvp": flat(exact.hvp(made, wrt=wrt, vector=v)),
        "ggnvp": flat(exact.ggnvp(made, wrt=wrt, vector=v)),
        "fisher_along": exact.fisher_along(made, vector=v, fisher="sampled", draws=2),
        "derivative": np.array(exact.derivative(made, vector=v)),
    }
    for kind in PRODUCTS if flat(v).dtype == np.float64 else ():
        out[kind] = exact.operator(made, wrt=wrt, kind=kind) @ flat(v)
    return out


def whole_numbers(made: Problem, seed: int) -> dict[str, np.ndarray]:
    """A direction whose every power of two is exact, down to the least positive number."""
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-8, 9, x.shape).astype(x.dtype) for n, x in made.parameters.items()}


@few(12)
@given(st.integers(-1074, 1000), st.sampled_from(["transformer", "net"]), st.integers(0, 99))
@example(-1074, "net", 0).via("the least positive number")
def test_products_are_linear_over_the_whole_range(k: int, what: str, seed: int) -> None:
    """2^k v gives the bits of 2^k times what v gives, the vectors of subnormal numbers too."""
    net_of_two = mlp("tanh", n=2, T=2).problem()
    made = net_of_two if what == "net" else problem_of(case(length=3, layers=1))
    v = whole_numbers(made, seed)
    one, other = along_all(made, v), along_all(made, {n: np.ldexp(x, k) for n, x in v.items()})
    for name, want in one.items():
        assert np.array_equal(other[name], np.ldexp(want, k)), name
        assert np.any(want), name
    zero = along_all(made, {n: 0 * x for n, x in v.items()})
    assert not any(np.any(x) for x in zero.values())


@needs_longdouble
@pytest.mark.parametrize("k", [-16_400, 16_000])
def test_products_are_linear_in_longdouble_too(k: int) -> None:
    made = problem_of(case(length=3, layers=1), np.longdouble)
    v = whole_numbers(made, 0)
    far = {n: np.ldexp(x, k) for n, x in v.items()}
    for product in (exact.hvp, exact.ggnvp):
        want = flat(product(made, wrt="**", vector=v))
        got = flat(product(made, wrt="**", vector=far))
        assert want.dtype == np.longdouble and np.array_equal(got, np.ldexp(want, k))


@pytest.mark.parametrize(("large", "small"), [(1e200, 1.0), (1e300, 1e-300), (1.0, 5e-324)])
def test_small_entries_are_not_lost_beside_large_ones(large: float, small: float) -> None:
    """The large ones stand where nothing depends on them: the product is that of the small."""
    one = case(length=3, layers=1)
    made, unread = problem_of(one), np.setdiff1d(np.arange(7), one.token)
    v = {n: np.copysign(small, x) for n, x in direction(made, 0).items()}
    v["embed.weight"][unread] = 0
    want = along_all(made, v)
    v["embed.weight"][unread] = large
    for name, got in along_all(made, v).items():
        assert np.array_equal(got, want[name]) and np.any(got), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_vectors_and_models_of_narrow_types(dtype: type) -> None:
    """As their very values in float64: nothing is computed in less."""
    one = case(length=3, layers=1)
    narrow = Model(one.config, one.astype(np.float32), "float32")
    wide = Model(one.config, {n: x.astype(np.float64) for n, x in narrow.parameters.items()})
    v = {n: (3 * x).astype(dtype) for n, x in direction(problem_of(one), 0).items()}
    got = exact.hvp(narrow, one.token, wrt="**", vector=v)
    same = {name: x.astype(np.float64) for name, x in v.items()}
    want = exact.hvp(wide, one.token, wrt="**", vector=same)
    for name, array in got.items():
        assert array.dtype == np.float64 and np.array_equal(array, want[name])


@few(10)
@given(labelled_cases, st.integers(0, 99))
def test_O14_hessian_is_symmetric_and_linear_and_ggn_is_psd(one: Case, seed: int) -> None:
    made = problem_of(one)
    u, v = direction(made, seed), direction(made, seed + 1)
    for product in (exact.hvp, exact.ggnvp):
        P_u, P_v = (flat(product(made, wrt="**", vector=x)) for x in (u, v))
        both = {name: 2 * u[name] - 3 * v[name] for name in u}
        P_both = flat(product(made, wrt="**", vector=both))
        size = 1e3 * BUDGET * (np.linalg.norm(P_u) + np.linalg.norm(P_v))
        assert abs(flat(v) @ P_u - flat(u) @ P_v) <= size * np.linalg.norm(flat(u))
        assert np.linalg.norm(P_both - 2 * P_u + 3 * P_v) <= 3 * size
    assert flat(u) @ flat(exact.ggnvp(made, wrt="**", vector=u)) >= -size


@few(10)
@given(labelled_cases)
def test_O9_hessian_is_ggn_plus_residual(one: Case) -> None:
    """Three products by three routes: ∇L stepped; J stepped then Jᵀ; Jᵀ r stepped with r fixed."""
    made = problem_of(one)
    v = flat(direction(made, 1))
    H, GGN, R = (exact.operator(made, wrt="**", kind=kind) @ v for kind in PRODUCTS)
    assert_within(GGN + R, H, 10 * BUDGET, np.abs(GGN) + np.abs(R), "H v")


def test_O9_all_three_matrices() -> None:
    one = problem_of(case(length=4, batch=1))
    H, GGN = exact.hessian(one, wrt="blocks.1.**"), exact.ggn(one, wrt="blocks.1.**")
    R = exact.operator(one, wrt="blocks.1.**", kind="residual") @ np.eye(len(H))
    assert_within(GGN + R, H, BUDGET, H, "H")
    assert np.linalg.norm(R) > 0.1 * np.linalg.norm(H)
    assert np.linalg.eigvalsh(GGN)[0] > -1e-13 and np.linalg.eigvalsh(H)[0] < -1e-2


@few(10)
@given(labelled_cases, st.integers(0, 99))
def test_O15_the_derivative_along_a_vector(one: Case, seed: int) -> None:
    made = problem_of(one)
    v, gradient = direction(made, seed), exact.gradient(made, wrt="**")
    terms = np.abs(flat(gradient) * flat(v)).sum() + one.label.size
    assert_within(
        exact.derivative(made, vector=v), flat(gradient) @ flat(v), BUDGET, terms, "<∇L, v>"
    )


# ------------------------------------------------------------------ GGN and Fisher


@pytest.mark.parametrize("wrt", ["blocks.0.{attn,mlp}.*.weight", "**"])
@pytest.mark.parametrize("kind", list(Fisher))
def test_fisher_along_a_vector(wrt: str, kind: str) -> None:
    made = problem_of(case(length=3, layers=1))
    v = direction(made, 3, wrt)
    F = exact.fisher(made, wrt=wrt, fisher=kind, seed=2)
    x = exact.fisher_along(made, vector=v, fisher=kind, seed=2)
    assert_within(x @ x, flat(v) @ F @ flat(v), BUDGET, x @ x, "v F v")


@few(4)
@given(labelled_cases)
def test_O11_ggn_is_the_expected_fisher(one: Case) -> None:
    """Forward mode and ∂²L/∂z² against backward mode and enumeration; all parameters at once."""
    made = problem_of(one)
    GGN, F = exact.ggn(made, wrt="**"), exact.fisher(made, wrt="**")
    assert_within(GGN, F, 10 * BUDGET, F, "GGN")  # observed 8e-16
    per_term = exact.fisher(made, wrt="**", per="term")
    assert_within(per_term, F, 10 * BUDGET, F, "per term")


def test_O11_the_empirical_fisher_is_another_matrix() -> None:
    made = problem_of(case(length=4))
    F = exact.fisher(made, wrt="blocks.**")
    for per in PER:
        assert gap(exact.fisher(made, wrt="blocks.**", fisher="empirical", per=per), F) > 0.3


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind", ["sampled", "signed"])
def test_O12_sampled_fishers_converge_to_the_expected_one(kind: str, per: str) -> None:
    """The mean of 100 seeds lies within 4 standard errors in trace (p = 6e-5, seed fixed)."""
    made = problem_of(case(length=4, batch=1))
    wrt = "blocks.1.attn.v.weight"
    traces = [
        np.trace(exact.fisher(made, wrt=wrt, fisher=kind, per=per, seed=seed))
        for seed in range(100)
    ]
    error = np.std(traces, ddof=1) / np.sqrt(len(traces))
    truth = np.trace(exact.fisher(made, wrt=wrt))
    assert abs(np.mean(traces) - truth) < 4 * error
    assert error < 0.2 * truth
    many = exact.fisher(made, wrt=wrt, fisher=kind, per=per, seed=5, draws=200)
    one = exact.fisher(made, wrt=wrt, fisher=kind, per=per, seed=5)
    F = exact.fisher(made, wrt=wrt)
    assert gap(many, F) < gap(one, F) / 5


@cache
def naive_rows(layer: str, b: int) -> oracles.Rows:
    one = packed_case()
    parameters = one.astype(np.longdouble)
    at = one.real[b]
    return oracles.rows(one.config, parameters, layer, one.token[b, at], one.segment[b, at])


def packed_case() -> Case:
    """Two blocks; the second sequence has two labelled documents and padding between the rows."""
    one = case(1, batch=2, length=4, vocabulary=3, width=3, heads=2, kv_heads=1, mlp_width=2)
    segment, real = np.array([[0, 0, 0, 0], [0, 0, 1, 1]]), np.arange(4) < np.array([[3], [4]])
    label = shift_labels(one.token, real, segment)
    label[1, 3] = 2  # of the corpus's own
    return replace(one, segment=segment, real=real, label=label)


def naive(one: Case, layer: str, kind: str, per: str, draws: int) -> dict[str, np.ndarray]:
    """F, F_tok and K of a layer by oracles.py: loops, and central differences in longdouble."""
    parameters = one.astype(np.longdouble)
    F, F_tok, sums = 0, 0, [0, 0, 0]
    for b, at in enumerate(one.real):  # padding is cut off
        token, label, segment = one.token[b, at], one.label[b, at], one.segment[b, at]
        rows = naive_rows(layer, b)
        p_TV = np.exp(-oracles.nats(one.config, parameters, token, segment))
        z_TV = oracles.logits(one.config, parameters, token, segment)
        T, V = z_TV.shape
        drawn = [
            [oracles.signs(7, draw, b, t, V) for t in range(T)]
            if kind == "signed"
            else oracles.drawn_labels(z_TV, label, 7, draw, b)
            for draw in range(draws)
        ]
        worlds = oracles.worlds(p_TV, label, kind, per, drawn, segment)
        F = F + oracles.fisher(oracles.weight_slopes(rows), worlds)
        F_tok = F_tok + oracles.f_tok(rows, worlds)
        keep = oracles.reached(label[None], one.real[b : b + 1, at], segment[None])[0]
        sums = [x + y for x, y in zip(sums, oracles.factor_sums(rows, worlds, keep), strict=True)]
    return {"fisher": F, "f_tok": F_tok, "kfac": oracles.kfac(*sums)}


@pytest.mark.parametrize("layer", ["blocks.0.attn.v", "blocks.0.mlp.up", "blocks.0.attn.o", "head"])
@pytest.mark.parametrize(
    ("kind", "per", "draws"),
    [("expected", "segment", 1), ("sampled", "segment", 3), ("empirical", "segment", 1),
     ("sampled", "term", 2), ("empirical", "term", 1), ("signed", "segment", 2),
     ("signed", "term", 1)],
)  # fmt: skip
def test_F_F_tok_and_K_equal_the_naive_sums(layer: str, kind: str, per: str, draws: int) -> None:
    one = packed_case()
    options = dict(fisher=kind, per=per, seed=7, draws=draws)
    want = naive(one, layer, kind, per, draws)
    for what, matrix in MATRICES.items():
        got = matrix(problem_of(one), wrt=f"{layer}.weight", **options)
        assert_within(got, want[what].astype(np.float64), DIFFERENCE, got, f"{what} of {layer}")


def test_ggn_equals_the_naive_one() -> None:
    one = case(batch=1, length=3, vocabulary=3, width=2, heads=2, kv_heads=1, mlp_width=2)
    names = [name for name in one.parameters if name.startswith("blocks.0")]
    want = oracles.ggn(one.config, one.astype(np.longdouble), names, one.token[0], one.label[0])
    got = exact.ggn(problem_of(one), wrt="blocks.0.**")
    assert_within(got, want.astype(np.float64), DIFFERENCE, got, "GGN")


# ------------------------------------------------------------------ F, F_tok, K


LAST = ("blocks.1.attn.q", "blocks.1.attn.o", "blocks.1.mlp.gate", "blocks.1.mlp.up",
        "blocks.1.mlp.down", "head")  # fmt: skip


@pytest.mark.parametrize("place", list(NormPlace))
def test_O38_in_the_last_block_F_is_F_tok_but_for_keys_and_values(place: NormPlace) -> None:
    """An output that reaches its own position's logits only has no cross-position term."""
    made = problem_of(case(length=4, norm_place=place))
    for layer in LAST:
        F, F_tok = (f(made, wrt=f"{layer}.weight") for f in (exact.fisher, exact.f_tok))
        assert_within(F_tok, F, BUDGET, F, layer)
    for layer in ("blocks.1.attn.k", "blocks.1.attn.v", "blocks.0.mlp.up"):
        F, F_tok = (f(made, wrt=f"{layer}.weight") for f in (exact.fisher, exact.f_tok))
        assert gap(F_tok, F) > 1e-3, layer
    # with one sampled draw it does not hold: the terms of a sequence are squared together
    sampled = [f(made, wrt=f"{LAST[2]}.weight", fisher="sampled")
               for f in (exact.fisher, exact.f_tok)]  # fmt: skip
    assert gap(*sampled) > 0.2


@few(10)
@given(labelled_cases, st.integers(0, 6))
def test_O18_O19_traces_and_marginals_of_F_tok(one: Case, which: int) -> None:
    """tr F_tok = Σ ‖a‖²‖g‖²; Tr_out = Σ ‖g‖² a aᵀ; Tr_in = Σ ‖a‖² g gᵀ; tr K by the means."""
    made = problem_of(one)
    layers = [n for n in made.linear if n.startswith("blocks.0.")]
    name = sorted(layers)[which % len(layers)]
    O, I = made.parameters[name].shape
    F_tok = exact.f_tok(made, wrt=name).reshape(O, I, O, I)
    sums = [0.0, np.zeros((I, I)), np.zeros((O, O))]
    for a, g in exact.rows(made, wrt=name):
        gg = np.einsum("cto,ctp->top", g, g)
        square_g, square_a = np.einsum("too->t", gg), (a * a).sum(axis=1)
        sums[0] += square_a @ square_g
        sums[1] += np.einsum("t,ti,tj->ij", square_g, a, a)
        sums[2] += np.einsum("t,top->op", square_a, gg)
    assert_within(np.einsum("oioi", F_tok), sums[0], BUDGET, sums[0], "trace")
    assert_within(np.einsum("oioj->ij", F_tok), sums[1], BUDGET, sums[1], "Tr_out")
    assert_within(np.einsum("oipi->op", F_tok), sums[2], BUDGET, sums[2], "Tr_in")
    found = exact.moments(made, wrt=name)
    trace_K = found.rows * np.trace(found.A) * np.trace(found.G)
    K = exact.kfac(made, wrt=name)
    assert_within(np.trace(K), trace_K, BUDGET, trace_K, "tr K")


def test_O18_the_trace_gap_is_a_covariance_of_norms() -> None:
    """tr K − tr F_tok = −n Cov(‖a‖², ‖g‖²), the covariance over rows."""
    made = problem_of(case(length=5, batch=1))
    name = "blocks.0.mlp.up.weight"
    rows = exact.rows(made, wrt=name)
    a = rows[0][0]
    square_a = (a * a).sum(axis=1)[:-1]  # the last position reaches no label
    square_g = sum((g * g).sum(axis=(0, 2)) for _, g in rows)[:-1]
    n = len(square_a)
    covariance = ((square_a - square_a.mean()) * (square_g - square_g.mean())).sum()
    found = exact.moments(made, wrt=name)
    assert found.rows == n
    difference = np.trace(exact.kfac(made, wrt=name)) - np.trace(exact.f_tok(made, wrt=name))
    assert_within(difference, -covariance, BUDGET, np.trace(exact.kfac(made, wrt=name)), "gap")
    assert abs(covariance) > 1e-3


@few(10)
@given(labelled_cases)
def test_O20_O25_O26_traces_ranks_and_signs(one: Case) -> None:
    """tr A = mean ‖a‖²; rank A ≤ n, rank F ≤ Σ_t (V − 1), rank K = rank A · rank G; all PSD."""
    made = problem_of(one)
    name = "blocks.0.attn.v.weight"
    found = exact.moments(made, wrt=name)
    a = input_rows(variables_of("test", made, None, None, name))
    assert found.rows == len(a)
    assert_within(np.trace(found.A), (a * a).sum() / len(a), BUDGET, np.trace(found.A), "tr A")
    z, _ = made.forward(made.parameters)
    F, K = exact.fisher(made, wrt=name), exact.kfac(made, wrt=name)
    floor = 1e-11
    rank = {k: np.linalg.matrix_rank(M, tol=floor * max(np.linalg.norm(M), 1e-300))
            for k, M in dict(A=found.A, G=found.G, F=F, K=K).items()}  # fmt: skip
    assert rank["A"] <= len(a)
    assert rank["F"] <= len(z) * (one.config.vocabulary - 1)
    assert rank["K"] <= rank["A"] * rank["G"]
    for M in (found.A, found.G, F, K):
        assert np.linalg.eigvalsh(M)[0] >= -1e-13 * np.linalg.norm(M)
        assert (M == M.T).all() or gap(M, M.T) < 1e-15


def test_O27_more_data_makes_the_sums_larger() -> None:
    """In the order of symmetric matrices; every eigenvalue of the sums is non-decreasing."""
    one = case(batch=3, length=4)
    name = "blocks.0.mlp.gate.weight"
    before = None
    for count in (1, 2, 3):
        batch = Batch(one.config, *(x[:count] for x in (one.token, one.label, one.segment)),
                      np.arange(count))  # fmt: skip
        made = of_batch(batch, one.parameters)
        found = exact.moments(made, wrt=name)
        now = [found.rows * found.A, found.rows * found.G, exact.fisher(made, wrt=name)]
        if before is not None:
            for old, new in zip(before, now, strict=True):
                size = np.linalg.norm(new)
                assert np.linalg.eigvalsh(new - old)[0] > -1e-13 * size
                assert (np.linalg.eigvalsh(new) >= np.linalg.eigvalsh(old) - 1e-13 * size).all()
                assert np.trace(new) > 1.1 * np.trace(old)
        before = now


def test_O17_kl_is_half_the_quadratic_form_of_the_fisher() -> None:
    """KL(p_θ ‖ p_{θ+d}) = ½ dᵀ F d + O(d³): halving d divides the rest by 8."""
    made = problem_of(case(length=4))
    d = direction(made, 2, "blocks.**")
    v = flat(d)
    quadratic = v @ flat(exact.ggnvp(made, wrt="blocks.**", vector=d)) / 2
    z, _ = made.forward(made.parameters)

    def kl(t: float) -> float:
        moved = dict(made.parameters) | {n: made.parameters[n] + t * d[n] for n in d}
        y, _ = made.forward(moved)
        logp, logq = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (z, y))
        return float((np.exp(logp) * (logp - logq)).sum())

    rest = [abs(kl(t) - t * t * quadratic) for t in (4e-3, 2e-3, 1e-3)]
    assert kl(1e-3) == pytest.approx(1e-6 * quadratic, rel=0.02)
    assert [rest[i] / rest[i + 1] for i in (0, 1)] == pytest.approx([8, 8], rel=0.1)


def test_O35_scale_invariance_of_the_post_norm_block() -> None:
    """At eps = 0 outputs go straight into RMSNorm: <W, ∇W> = 0, GGN·W = 0, H·W = −∇W."""
    one = case(length=5, norm_eps=0.0)
    made = problem_of(one)
    for layer, scale_free in (
        ("attn.q", True), ("attn.k", True), ("attn.v", True), ("attn.o", True), ("mlp.up", True),
        ("mlp.down", True), ("mlp.gate", False),
    ):  # fmt: skip
        name = f"blocks.0.{layer}.weight"
        W = {name: one.parameters[name]}
        gradient = exact.gradient(made, wrt=name)[name]
        H_W = exact.hvp(made, wrt=name, vector=W)[name]
        GGN_W = exact.ggnvp(made, wrt=name, vector=W)[name]
        random = {name: np.random.default_rng(0).normal(size=W[name].shape)}
        random[name] *= np.linalg.norm(W[name]) / np.linalg.norm(random[name])
        size = np.linalg.norm(exact.ggnvp(made, wrt=name, vector=random)[name])
        if scale_free:
            assert abs((W[name] * gradient).sum()) < 1e-12 * np.abs(W[name] * gradient).sum()
            assert np.linalg.norm(GGN_W) < 1e-12 * size
            assert gap(H_W, -gradient) < 1e-12
            assert rvec(W[name]) @ exact.kfac(made, wrt=name) @ rvec(W[name]) > 1e-3 * size
        else:
            assert np.linalg.norm(GGN_W) > 1e-3 * size
            assert gap(H_W, -gradient) > 1e-2


# ------------------------------------------------------------------ operators and collection


def test_operators_are_the_dense_matrices() -> None:
    made = problem_of(case(length=3))
    wrt = "blocks.1.attn.*.weight"
    for kind, dense in (("hessian", exact.hessian), ("ggn", exact.ggn)):
        operator = exact.operator(made, wrt=wrt, kind=kind)
        assert (operator @ np.eye(operator.shape[0]) == dense(made, wrt=wrt)).all()
        assert (
            gap(operator.T @ np.ones(operator.shape[0]), dense(made, wrt=wrt).sum(axis=0)) < 1e-13
        )


@pytest.mark.parametrize("fisher", list(Fisher))
def test_moments_are_collected(fisher: str) -> None:
    """`collect`, on kernels and shards, finds the A and G of the definition; positions mix."""
    one = case(batch=3, length=5)
    model = Model(one.config, one.parameters)
    factors = rc.collect(model, rc.Corpus(one.token), "blocks.**,head", fisher, seed=7)
    for layer in factors:
        found = exact.moments(model, one.token, wrt=f"{layer}.weight", fisher=fisher, seed=7)
        assert factors[layer].n_A == found.rows
        assert_within(factors[layer].A, found.A, BUDGET, found.A, f"A {layer}")
        assert_within(factors[layer].G, found.G, 10 * BUDGET, found.G, f"G {layer}")


def test_O48_tied_embeddings_have_both_parts() -> None:
    """The block of a shared matrix: embedding and head, and their cross terms."""
    tied = case(length=4, tied=True)
    untied = replace(
        tied,
        config=replace(tied.config, tied=False),
        parameters=tied.parameters | {"head.weight": tied.parameters["embed.weight"]},
    )
    for what in (exact.hessian, exact.ggn, exact.fisher):
        shared = what(problem_of(tied), wrt="embed.weight")
        both = what(problem_of(untied), wrt="{embed,head}.weight")
        P = len(shared)
        parts = both.reshape(2, P, 2, P)
        assert_within(shared, parts.sum(axis=(0, 2)), BUDGET, shared, what.__name__)
        assert gap(parts[0, :, 0] + parts[1, :, 1], shared) > 0.01  # without the cross terms


def test_what_a_mixing_layer_does_to_the_three() -> None:
    """Without mixing F = F_tok for every layer; with it only behind the mix."""
    T = 3
    sizes = {"one": (4, 3), "two": (5, 4), "three": (3, 5)}
    stages = [("linear", "one"), ("mix", causal_mix(T)), ("tanh",), ("linear", "two"), ("tanh",),
              ("linear", "three")]  # fmt: skip
    mixed = net(stages, sizes, n=2, T=T).problem()
    plain = mlp("tanh", n=2, T=T).problem()
    for made, name, same in (
        (mixed, "one.weight", False), (mixed, "two.weight", True), (plain, "one.weight", True),
    ):  # fmt: skip
        F, F_tok = (f(made, wrt=name) for f in (exact.fisher, exact.f_tok))
        assert (gap(F_tok, F) < 1e-13) == same


@pytest.mark.parametrize("name", ["blocks.0.attn.k.weight", "blocks.1.mlp.gate.weight"])
def test_a_part_of_a_layer_has_that_part_of_its_curvature(name: str) -> None:
    made = problem_of(case(length=4))
    part = of_outputs(made, name, 1, 3)
    O, I = made.parameters[name].shape
    assert O > 3
    for what in (exact.hessian, exact.ggn, *MATRICES.values()):
        block = what(made, wrt=name)
        got = what(part, wrt=f"{name}[1:3]")
        assert_within(got, block[I : 3 * I, I : 3 * I], BUDGET, block, what.__name__)
    everything = exact.fisher(part, wrt=f"{name}[1:3],final_norm.weight")
    assert gap(everything, exact.ggn(part, wrt=f"{name}[1:3],final_norm.weight")) < 1e-13
    with pytest.raises(ConventionError, match="not the weight of a linear layer"):
        of_outputs(made, "embed.weight", 0, 1)
    with pytest.raises(RangeError, match="no part of"):
        of_outputs(made, name, 2, O + 1)


def test_O49_norm_gains_have_a_fisher_of_their_own() -> None:
    """d_gain = Σ_s g_s x̂_s: F of a gain is Σ_c (Σ_s g x̂)(Σ_s g x̂)ᵀ, no Kronecker product."""
    one = case(length=4, layers=1, norm_place=NormPlace.PRE)
    made = problem_of(one)
    z, (final, trace, _) = made.forward(made.parameters)
    x_hat = trace.final_norm[0]
    F = np.zeros((8, 8))
    for part, saved, d_z in cotangents(made, Choice()):
        head = next(iter(part.backward(part.parameters, saved, d_z)))
        g = head.g @ one.parameters["head.weight"]  # of the norm's output
        d_gain = (g * saved[1].final_norm[0]).sum(axis=1)
        F += d_gain.T @ d_gain
    got = exact.fisher(made, wrt="final_norm.weight")
    assert_within(got, F, BUDGET, F, "F of the gain")
    assert_within(exact.ggn(made, wrt="final_norm.weight"), F, BUDGET, F, "GGN of the gain")
    assert x_hat.shape == final.shape and len(z) == 6


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_O61_predicted_damage(rho: float) -> None:
    """½ Σ_dropped n λ μ C² is ½ ΔW·K·ΔW; F has another; the loss follows H to third order."""
    one = case(length=5, batch=3)
    model, layer = Model(one.config, one.parameters), "blocks.1.mlp.up"
    name, made = f"{layer}.weight", problem_of(one)
    basis = rc.decompose(rc.collect(model, rc.Corpus(one.token), layer, "expected"))
    edited, _ = rc.edit(model, basis, rho)
    W, b = one.parameters[name], basis[layer]
    d = {name: edited.parameters[name] - W}
    found = exact.moments(made, wrt=name)
    C = b.U_G.T @ W @ b.U_A
    dropped = np.abs(b.U_G.T @ d[name] @ b.U_A + C) < 1e-10
    predicted = found.rows * (np.outer(b.lam, b.mu) * C * C)[dropped].sum() / 2
    K = exact.kfac(made, wrt=name)
    size = np.linalg.norm(K) * (d[name] ** 2).sum()
    assert_within(predicted, rvec(d[name]) @ K @ rvec(d[name]) / 2, BUDGET, size, "K")
    x = exact.fisher_along(made, vector=d)
    F = exact.fisher(made, wrt=name)
    assert_within(x @ x, rvec(d[name]) @ F @ rvec(d[name]), BUDGET, x @ x, "F")
    assert abs(predicted - x @ x / 2) > 0.02 * predicted  # K is not F

    slope = exact.derivative(made, vector=d)
    bend = rvec(d[name]) @ rvec(exact.hvp(made, wrt=name, vector=d)[name])

    def rest(t: float) -> float:
        moved = dict(one.parameters) | {name: W + t * d[name]}
        change = sum(
            sign * float(made.loss.terms(made.forward(p)[0])[0].sum())
            for sign, p in ((1, moved), (-1, one.parameters))
        )
        return change - t * slope - t * t * bend / 2

    assert rest(2e-2) / rest(1e-2) == pytest.approx(8, rel=0.1)
    assert rest(1e-2) / rest(5e-3) == pytest.approx(8, rel=0.1)


# ------------------------------------------------------------------ options and bad input


def test_every_option_has_a_default() -> None:
    """`Sent` says which keywords there are, `Choice` what they are by default."""
    assert exact.Sent.__annotations__.keys() == {f.name for f in fields(Choice)}
    made, name = mlp("tanh", n=2, T=2).problem(), "two.weight"
    by_default = {f.name: f.default for f in fields(Choice)}
    for what in MATRICES.values():
        assert np.array_equal(what(made, wrt=name), what(made, wrt=name, **by_default))


def test_only_a_dense_matrix_asks_for_sizes() -> None:
    """Each parameter is read once, for its dtype; a lazy one is read anew whenever it is asked."""
    one, read = case(length=3, layers=1), []

    def parameter(name: str) -> np.ndarray:
        read.append(name)
        return one.parameters[name]

    made = replace(problem_of(one), parameters=Lazy(list(one.parameters), parameter))
    variables_of("test", made, None, None, "**")
    once = len(read)
    variables_of("test", made, None, None, "**", dense=True)
    assert (once, len(read)) == (len(one.parameters), 3 * len(one.parameters))


def test_refusals() -> None:
    one = case(length=4)
    model = Model(one.config, one.parameters)
    name = "blocks.0.mlp.up.weight"
    W = {name: one.parameters[name]}
    nan = model.with_parameters({name: np.full_like(W[name], np.nan)})
    big = Model(replace(one.config, mlp_width=2000), {
        n: np.zeros(s) for n, s in replace(one.config, mlp_width=2000).parameter_shapes().items()
    })  # fmt: skip
    t, H, F, own = one.token, exact.hessian, exact.fisher, problem_of(one)
    for error, says, what, given_, options in (
        (NameUnknownError, "matches none", H, (model, t), dict(wrt="block.0.up")),
        (NonFiniteError, f"parameter '{name}' holds nan", exact.ggn, (nan, t), {}),
        (EmptyError, "none of the 8 labels", H, (model, t, t * 0 - 1), {}),
        (RangeError, r"16,000 parameters.* 1.9 GiB .*exact.operator", H, (big, t), {}),
        (RangeError, "16,000 parameters", exact.kfac, (big, t), {}),
        (RangeError, "outside the model's vocabulary", H, (model, t + 9), {}),
        (RangeError, "labels .* is 9", H, (model, t, t * 0 + 9), {}),
        (ShapeError, "labels must be", H, (model, t, t[:, 1:]), {}),
        (ShapeError, "tokens must be", H, (model, t[0]), {}),
        (DTypeError, "integers", H, (model, t * 1.0), {}),
        (ConventionError, "needs tokens", H, (model,), {}),
        (ConventionError, "its own data", H, (own, t), {}),
        (ConventionError, "one linear layer", exact.f_tok, (own,), dict(wrt="embed.weight")),
        (ConventionError, "one linear layer", exact.kfac, (own,), dict(wrt="blocks.0.mlp.**")),
        (ConventionError, "fisher must be one of", F, (own,), dict(fisher="gold")),
        (ConventionError, "per must be one of", F, (own,), dict(per="row")),
        (TypeError, r"^fisher\(\) got .*'seeds'; known are .*seed", F, (own,), dict(seeds=1)),
        (TypeError, r"^kfac\(\) got an unexpected", exact.kfac, (own,), dict(seeds=1)),
        (NameUnknownError, "one text, such as", H, (own,), dict(wrt=[name])),
        (ConventionError, "hvp: a vector is", exact.hvp, (own,), dict(vector=W[name])),
        (ConventionError, "hvp: a vector is", exact.hvp, (own,), dict(vector={3: W[name]})),
        (ShapeError, "row 1 is of length 1", exact.hvp, (own,), dict(vector={name: [[1, 2], [3]]})),
        (ConventionError, "kind must be one of", exact.operator, (own,), dict(kind="H")),
        (RangeError, "draws", F, (own,), dict(fisher="sampled", draws=0)),
        (ConventionError, "draws nothing", F, (own,), dict(draws=2)),
        (RangeError, "seed", F, (own,), dict(seed=-1)),
        (ShapeError, "vector", exact.hvp, (own,), dict(vector={name: W[name].T})),
        (NameUnknownError, "only one of the two", exact.hvp, (own,), dict(vector={})),
        (NonFiniteError, "vector", exact.hvp, (own,), dict(vector={name: W[name] * np.inf})),
        (DTypeError, "real numbers", exact.hvp, (own,), dict(vector={name: W[name] * 1j})),
        (DTypeError, "float64 or longdouble; .*float32", H, (problem_of(one, np.float32),), {}),
    ):  # fmt: skip
        with pytest.raises(error, match=says) as caught:
            what(*given_, **(dict(wrt=name) | options))
        assert "\n" not in str(caught.value)
    up = exact.gradient(own, wrt=name)[name]
    with pytest.raises(RangeError, match="derivative: the product is beyond the range of float64"):
        exact.derivative(own, vector={name: np.copysign(1.7e308, up)})
    for along in (exact.derivative, exact.fisher_along):
        with pytest.raises(ConventionError, match=f"{along.__name__}: a vector is"):
            along(own, vector=[W[name]])
    operator, v = exact.operator(own, wrt=name), np.ones(W[name].size)
    for error, says, bad in (
        (DTypeError, "real numbers", 1j * v),
        (NonFiniteError, "nan", np.nan * v),
    ):
        with pytest.raises(error, match=f"exact.operator: the vector .*{says}"):
            operator @ bad
