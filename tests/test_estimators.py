"""K-FAC reduce and EK-FAC's Λ: streamed against dense definitions, and where theory is exact.

Observed where equal: at most 3e-15 of the terms' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import budgets
import numpy as np
import pytest
import test_images
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, few, gap
from test_definition import ROUNDING
from test_factors import BIASED, against, corpus_of, flow, gappy, model_of
from zoo import Net, causal_mix, mlp, net

import refcurv as rc
from refcurv.algebra.kron import kron_dense
from refcurv.curvature import estimators, exact
from refcurv.curvature.eigenbasis import Eigenbasis
from refcurv.curvature.estimators import diagonal, ekfac, reduce, reduced
from refcurv.curvature.exact import Problem, problem
from refcurv.curvature.resumed_bases import decompose_to
from refcurv.law import conventions, tolerance
from refcurv.law.checks import (
    ConventionError,
    NameUnknownError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from refcurv.law.conventions import Estimator, Fisher
from refcurv.model import transformer
from refcurv.model.transformer import Tap
from refcurv.passes import shards

BUDGET = tolerance.gamma(400, np.float64)
"""Of the nets: every number is a sum of at most 400 roundings, relative to the matrix's norm."""

BOTH = {"token": exact.f_tok, "sequence": exact.fisher}
"""What Λ is the diagonal of."""

seeds = st.integers(0, 9999)
fishers = st.sampled_from(list(Fisher))


def equal(one: np.ndarray, two: np.ndarray, what: str) -> None:
    assert_within(one, two, BUDGET, two, what)


def K_of(moments: exact.Moments) -> np.ndarray:
    return moments.rows * kron_dense(moments.G, moments.A)


def turned(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def any_bases(model: rc.Model, names: list[str], seed: int, bias: str = "separate") -> rc.Bases:
    """Orthonormal bases that have nothing to do with the model."""
    rng, made = np.random.default_rng(seed), {}
    for name in names:
        O, I = model.config.linear_layers()[name]
        I += bias == "joint" and model.config.has_bias(name)
        made[name] = Eigenbasis(turned(I, rng), np.zeros(I), turned(O, rng), np.zeros(O))
    return rc.Bases(made, bias=conventions.Bias(bias))


def drawn(fisher: str, seed: int = 3) -> dict[str, Any]:
    return dict(fisher=fisher, seed=seed, draws=2 if fisher in ("sampled", "signed") else 1)


def dense(made: Problem, wrt: str, per: str, joint: bool, **sent: Any) -> np.ndarray:
    """F or F_tok, of [W b] if `joint`."""
    if not joint:
        return BOTH[per](made, wrt=wrt, **sent)
    out = 0.0
    for part in made.split():
        for a, g in exact.rows(part, wrt=wrt, **sent):
            one = np.column_stack([a, np.ones(len(a))])
            D = np.einsum("cto,ti->ctoi", g, one).reshape(len(g), len(a), -1)
            D = D.sum(axis=1) if per == "sequence" else D.reshape(-1, D.shape[-1])
            out = out + D.T @ D
    return out


def assert_reduced(
    model: rc.Model, corpus: rc.Corpus, names: list[str], rows: str, choice: dict[str, Any]
) -> None:
    made = problem(model, corpus, rows=rows)
    got = reduce(model, corpus, ",".join(names), rows=rows, **choice)
    assert (got.estimator, str(got.fisher)) == (Estimator.REDUCE, choice["fisher"])
    allowed = 40 * budgets.path(model.config.layers, 64, model.dtype)
    for name, one in got.items():
        want = reduced(made, wrt=f"{name}.weight", **choice)
        assert (one.n_A, one.n_G) == (want.rows, want.rows * choice["draws"]), name
        assert_within(one.A, want.A, allowed, np.trace(want.A), f"A of {name}")
        assert_within(
            one.sum_G, want.rows * choice["draws"] * want.G, allowed,
            size_of_g(made, name, choice), f"S_G of {name}",
        )  # fmt: skip


def size_of_g(made: Problem, name: str, choice: dict[str, Any]) -> float:
    """Σ over segments and cotangents of (Σ_s |g_s|)², before anything cancels."""
    size = 0.0
    for part in made.split():
        for _, g in exact.rows(part, wrt=f"{name}.weight", **choice):
            size += float((np.linalg.norm(g, axis=-1).sum(axis=1) ** 2 + ROUNDING).sum())
    return size * choice["draws"]


def assert_lambda(
    model: rc.Model,
    corpus: rc.Corpus,
    names: list[str],
    choice: dict[str, Any],
    seed: int = 0,
    bias: str = "separate",
    rows: str = "reached",
) -> None:
    made, bases = problem(model, corpus, rows=rows), any_bases(model, names, seed, bias)
    counts = rc.collect(model, corpus, ",".join(names), rows=rows, **choice)
    allowed = 40 * budgets.path(model.config.layers, 64, model.dtype)
    for per in BOTH:
        got = ekfac(model, corpus, bases, per=per, rows=rows, **choice)
        assert list(got) == names and got.per == per
        for name, one in got.items():
            joint = bias == "joint" and model.config.has_bias(name)
            F = dense(made, f"{name}.weight", per, joint, **choice)
            want = diagonal(F, bases[name].U_G, bases[name].U_A)
            assert one.rows == counts[name].n_A
            assert one.segments == sum(1 for _ in made.split()), name
            A = counts[name].A_joint if joint else counts[name].A
            scale = np.trace(A) * size_of_g(made, name, choice)
            assert_within(one.Lambda, want, allowed, scale, f"Lambda per {per} of {name}")


def some(one: Case, seed: int) -> list[str]:
    """Two linear layers, in file order; a tied head has no exact block of its own."""
    names = [n for n in one.config.linear_layers() if n != "head" or not one.config.tied]
    two = np.random.default_rng(seed).choice(len(names), 2, replace=False)
    return [names[i] for i in sorted(two)]


# ------------------------------------------------------------------ streamed = dense


@few(14)
@given(cases(), fishers, st.sampled_from(["reached", "labelled"]), seeds)
def test_reduce_equals_its_dense_definition(
    one: Case, fisher: Fisher, rows: str, seed: int
) -> None:
    if (one.label >= 0).any():
        assert_reduced(model_of(one), corpus_of(one), some(one, seed), rows, drawn(fisher, seed))


@few(14)
@given(cases(), fishers, st.sampled_from(["separate", "joint"]), seeds)
def test_lambda_equals_its_dense_definition(
    one: Case, fisher: Fisher, bias: str, seed: int
) -> None:
    if (one.label >= 0).any():
        names = some(one, seed)
        assert_lambda(model_of(one), corpus_of(one), names, drawn(fisher, seed), seed, bias)


def packed() -> Case:
    """Four sequences, packed and padded; the head's chunks of 3 rows end inside segments."""
    one = gappy()
    segment = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    label = np.where(np.diff(segment, axis=1, append=segment[:, -1:]) == 0, one.label, -1)
    return replace(one, segment=segment, label=label)


@contextmanager
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two sequences to a shard, three rows to a chunk of the head."""
    with monkeypatch.context() as patch:
        patch.setattr(conventions, "SHARD_TOKENS", 12)
        patch.setattr(transformer, "HEAD_ROWS", 3)
        yield


NAMES = ["blocks.0.attn.k", "blocks.1.mlp.gate", "blocks.1.mlp.up", "head"]


@pytest.mark.parametrize(
    ("fisher", "dtype"), [*((one, "float64") for one in Fisher), ("sampled", "float32")]
)
def test_shards_and_chunks_of_the_head_change_nothing(
    fisher: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = model_of(packed(), dtype), corpus_of(packed())
    with small(monkeypatch):
        assert_reduced(model, corpus, NAMES, "reached", drawn(fisher))
        assert_lambda(model, corpus, NAMES, drawn(fisher), bias="joint")


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize("fisher", ["sampled", "expected"])
def test_images_too(fisher: str, rows: str) -> None:
    one, images = test_images.vit(images=3)
    one.label[1] = -1  # an image without a label is no segment
    model, corpus = test_images.model_of(one), test_images.corpus_of(one, images)
    names = ["blocks.1.attn.v", "head"] if rows == "cls" else ["patch", "blocks.1.attn.v", "head"]
    assert_reduced(model, corpus, names, rows, drawn(fisher))
    if rows == "all":
        assert_lambda(model, corpus, names, drawn(fisher), bias="joint", rows=rows)


def test_rows_of_all_count_segments_without_a_label() -> None:
    """By hand: means over the real positions of each segment, sums of g."""
    one = packed()
    one.label[1] = -1
    model, corpus, real = model_of(one), corpus_of(one), one.real
    got = reduce(model, corpus, ",".join(NAMES), "empirical", rows="all")
    taps = flow(one, against(one, one.label))
    spans = [(0, 0, 4), (0, 4, 6), (1, 0, 4), (2, 0, 1), (2, 1, 6)]
    assert real[1].sum() == 4
    for name in NAMES:
        a, g = taps[name]
        a_S = np.stack([a[b, first:end].mean(axis=0) for b, first, end in spans])
        g_S = np.stack([g[b, first:end].sum(axis=0) for b, first, end in spans])
        assert got[name].n_A == got[name].n_G == 5
        equal(got[name].sum_A, a_S.T @ a_S, f"A of {name}")
        equal(got[name].sum_G, g_S.T @ g_S, f"G of {name}")
        if got[name].sum_a is not None:
            assert_within(got[name].sum_a, a_S.sum(axis=0), BUDGET, np.abs(a_S), f"a of {name}")


def test_shards_in_flight_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = model_of(packed()), corpus_of(packed())
    bases, seen = any_bases(model, NAMES, 1), []
    with small(monkeypatch):
        first = [reduce(model, corpus, "**", draws=2, in_flight=1)]
        first += [ekfac(model, corpus, bases, draws=2, per=per, in_flight=1) for per in BOTH]
        again = [reduce(model, corpus, "**", draws=2, in_flight=3)]
        again += [
            ekfac(model, corpus, bases, draws=2, per=per, in_flight=3,
                  progress=lambda done, total: seen.append((done, total)))
            for per in BOTH
        ]  # fmt: skip
    assert seen == [(0, 2), (1, 2), (2, 2)] * 2
    for name in NAMES:
        assert first[0][name].sum_G.tobytes() == again[0][name].sum_G.tobytes()
        assert first[0][name].sum_A.tobytes() == again[0][name].sum_A.tobytes()
        for one, two in zip(first[1:], again[1:], strict=True):
            assert one[name].sum_Lambda.tobytes() == two[name].sum_Lambda.tobytes()
    assert first[0]["blocks.0.mlp.gate"].sum_A is first[0]["blocks.0.mlp.up"].sum_A


def test_one_row_to_a_segment_makes_reduce_expand() -> None:
    one = case(length=2, biases=BIASED)
    got, want = (f(model_of(one), corpus_of(one), "**", draws=2) for f in (reduce, rc.collect))
    for name, factor in got.items():
        assert (factor.sum_A == want[name].sum_A).all() and (factor.n_A == want[name].n_A)
        assert (factor.sum_G == want[name].sum_G).all() and (factor.n_G == want[name].n_G)
        assert factor.error_G == want[name].error_G and factor.rounding_G is None


# ------------------------------------------------------------------ reduce, where it is exact


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_O3_before_a_pool_reduce_is_exact(how: str) -> None:
    """Deep linear, square loss: exact before the pool, and behind it what expand is."""
    stages = [("linear", "one"), ("linear", "two"), ("pool", how), ("linear", "three")]
    widths = {"one": (4, 3), "two": (3, 4), "three": (2, 3)}
    made = net(stages, widths, n=3, T=4, loss="square").problem()
    for name in ("one.weight", "two.weight", "three.weight"):
        GGN = exact.ggn(made, wrt=name)
        equal(K_of(reduced(made, wrt=name)), GGN, name)
        if name != "three.weight":
            assert gap(exact.kfac(made, wrt=name), GGN) > 0.1  # expand is not
    behind = exact.kfac(made, wrt="three.weight")
    equal(K_of(reduced(made, wrt="three.weight")), behind, "one position")


def test_O3_where_positions_stay_apart_reduce_is_not_exact() -> None:
    made = mlp("", loss="square", n=3, T=3).problem()
    for name in ("one.weight", "two.weight", "three.weight"):
        GGN = exact.ggn(made, wrt=name)
        equal(exact.kfac(made, wrt=name), GGN, name)
        assert gap(K_of(reduced(made, wrt=name)), GGN) > 0.3


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("fisher", list(Fisher))
def test_O4_reduce_is_the_kfac_of_the_averaged_input(how: str, fisher: str) -> None:
    """A pool right behind the layer; a nonlinear net follows."""
    stages = [("linear", "one"), ("pool", how), ("tanh",), ("linear", "two")]
    pooled = net(stages, {"one": (4, 3), "two": (3, 4)}, n=3, T=4)
    times = 4 if how == "sum" else 1
    averaged = replace(
        pooled,
        stages=[("linear", "one"), ("scale", times), ("tanh",), ("linear", "two")],
        x=pooled.x.mean(axis=1, keepdims=True),
    )
    choice = drawn(fisher)
    got = reduced(pooled.problem(), wrt="one.weight", **choice)
    want = exact.moments(averaged.problem(), wrt="one.weight", **choice)
    assert got.rows == want.rows == 3
    equal(got.A, want.A, "A")
    equal(got.G, want.G, "G")
    expand = exact.moments(pooled.problem(), wrt="one.weight", **choice)
    assert gap(expand.A, want.A) > 0.3


def test_O5_a_shallow_convolution_with_sum_pool() -> None:
    """The kernel moves by 1, so that fields overlap; F by loops over the image."""
    rng, n, C, side, k, O = np.random.default_rng(5), 3, 2, 4, 2, 3
    images, places = rng.normal(size=(n, C, side, side)), side - k + 1
    fields = np.zeros((n, places * places, C * k * k))
    F, I = np.zeros((O * C * k * k,) * 2), C * k * k
    for b in range(n):
        slope = np.zeros((C, k, k))  # of each output, by its own kernel
        for r, s, c, i, j in np.ndindex(places, places, C, k, k):
            pixel = images[b, c, r + i, s + j]
            fields[b, r * places + s, (c * k + i) * k + j] = pixel
            slope[c, i, j] += pixel
        for o in range(O):
            J = np.zeros((O, I))
            J[o] = slope.reshape(-1)
            F += np.outer(J.reshape(-1), J.reshape(-1))
    stages, weight = [("linear", "conv"), ("pool", "sum")], rng.normal(size=(O, I))
    made = Net(stages, {"conv.weight": weight}, fields, target=rng.normal(size=(n, 1, O))).problem()
    equal(K_of(reduced(made, wrt="conv.weight")), F, "reduce")
    assert gap(exact.kfac(made, wrt="conv.weight"), F) > 0.3


def test_O7_the_identity_in_the_place_of_G() -> None:
    """FOOF: one linear layer with square loss. Λ is n μ_j for every i, in any basis of outputs."""
    one = net([("linear", "W")], {"W": (3, 4)}, n=3, T=2, loss="square")
    pooled = replace(one, stages=[("linear", "W"), ("pool", "mean")], target=one.target[:, :1])
    U_G = turned(3, np.random.default_rng(0))
    for net_, moments in ((one, exact.moments), (pooled, reduced)):
        made = net_.problem()
        GGN, found = exact.ggn(made, wrt="W.weight"), moments(made, wrt="W.weight")
        n = 6 if net_ is one else 3
        equal(kron_dense(np.eye(3), n * found.A), GGN, moments.__name__)
        mu, U_A = np.linalg.eigh(found.A)
        equal(diagonal(GGN, U_G, U_A), np.tile(n * mu, (3, 1)), "Lambda")


def test_other_divisions_of_reduce() -> None:
    """Sums of a with means of g: the same product for equal lengths alone; B8, B36, B37."""
    for one, same in ((case(), True), (packed(), False)):
        made, name = problem(model_of(one), corpus_of(one)), "blocks.1.mlp.up.weight"
        ours = K_of(reduced(made, wrt=name))
        segments = list(made.split())
        T = np.array([kept(part, name) for part in segments])
        alone = [reduced(part, wrt=name) for part in segments]

        def K(times_a: np.ndarray, times_g: np.ndarray, alone: Any = alone) -> np.ndarray:
            """As if the ā and ĝ of each segment were so many times as large."""
            A = sum(c * c * one.A for c, one in zip(times_a, alone, strict=True))
            G = sum(c * c * one.G for c, one in zip(times_g, alone, strict=True))
            return kron_dense(G, A) / len(alone)

        ones = np.ones(len(segments))
        equal(K(ones, ones), ours, "means of a, sums of g")
        error = gap(K(T, 1 / T), ours)
        assert error < 1e-14 if same else error > 0.05
        both_summed, both_averaged = K(T, ones), K(ones, 1 / T)
        assert gap(both_summed, ours) > 5 and gap(both_averaged, ours) > 0.5
        if same:
            equal(both_summed, 25 * ours, "T = 5")
            equal(both_averaged, ours / 25, "T = 5")


def kept(part: Problem, name: str) -> int:
    a, g = exact.rows(part, wrt=name)[0]
    return int(part.kept(Tap(name, a[None], g)).sum())


# ------------------------------------------------------------------ Λ, by theory


def mixing(n: int = 3, T: int = 3) -> Problem:
    """Positions mix above `one`, and do not above `two`."""
    stages = [("linear", "one"), ("tanh",), ("mix", causal_mix(T)), ("linear", "two"), ("tanh",),
              ("linear", "three")]  # fmt: skip
    return net(stages, {"one": (4, 3), "two": (3, 4), "three": (3, 3)}, n=n, T=T).problem()


@few(6)
@given(seeds, fishers)
def test_O21_O22_lambda_keeps_the_trace_and_is_the_best_diagonal(seed: int, fisher: str) -> None:
    """ΣΛ = tr F in any basis; ‖F − UΛUᵀ‖² + ‖Λ − d‖² = ‖F − U d Uᵀ‖², d = n λ μᵀ of K too."""
    one = case(seed, length=4)
    model, corpus, name = model_of(one), corpus_of(one), "blocks.0.mlp.down"
    choice = drawn(fisher, seed)
    made, factor = problem(model, corpus), rc.collect(model, corpus, name, **choice)
    for basis in (rc.decompose(factor), any_bases(model, [name], seed)):
        U = kron_dense(basis[name].U_G, basis[name].U_A)
        for per, what in BOTH.items():
            F = what(made, wrt=f"{name}.weight", **choice)
            found = ekfac(model, corpus, basis, per=per, **choice)[name]
            assert found.Lambda.sum() == pytest.approx(np.trace(F), rel=1e-12)
            d = found.rows * np.outer(basis[name].lam, basis[name].mu)
            best = np.linalg.norm(F - (U * found.Lambda.reshape(-1)) @ U.T)
            other = np.linalg.norm(F - (U * d.reshape(-1)) @ U.T)
            away = np.linalg.norm(found.Lambda - d)
            assert best**2 + away**2 == pytest.approx(other**2, rel=1e-10)
            if d.any():  # the basis of K, so that `other` is its distance
                K = factor[name].n_A * kron_dense(factor[name].G, factor[name].A)
                assert np.linalg.norm(F - K) == pytest.approx(other, rel=1e-10)
                assert best < 0.99 * other


@few(6)
@given(seeds)
def test_O23_the_spectrum_majorises_lambda(seed: int) -> None:
    """Schur and Horn; Hadamard of F + I, whose diagonal is Λ + 1."""
    made, rng = mixing(), np.random.default_rng(seed)
    for what in BOTH.values():
        F = what(made, wrt="one.weight")
        Lambda = diagonal(F, turned(4, rng), turned(3, rng)).reshape(-1)
        spectrum = np.linalg.eigvalsh(F)
        ahead = np.cumsum(spectrum[::-1]) - np.cumsum(np.sort(Lambda)[::-1])
        assert ahead.min() > -1e-13 * spectrum[-1] * len(F)
        assert np.log1p(Lambda).sum() >= np.linalg.slogdet(F + np.eye(len(F)))[1]


def test_O19_sums_over_one_side_are_the_partial_traces() -> None:
    """Σ_i Λ_ij = v_jᵀ (Σ‖g‖² a aᵀ) v_j and Σ_j Λ_ij = u_iᵀ (Σ‖a‖² g gᵀ) u_i, per token."""
    one = case(length=5)
    model, corpus, name = model_of(one), corpus_of(one), "blocks.0.attn.v"
    basis = any_bases(model, [name], 2)
    Lambda = ekfac(model, corpus, basis, "empirical", per="token")[name].Lambda
    inputs, outputs = 0.0, 0.0
    for a, g in exact.rows(model, corpus, wrt=f"{name}.weight", fisher="empirical"):
        g2, a2 = (g**2).sum(axis=(0, 2)), (a**2).sum(axis=1)
        inputs = inputs + (a.T * g2) @ a
        outputs = outputs + np.einsum("cto,t,ctp->op", g, a2, g)
    U_A, U_G = basis[name].U_A, basis[name].U_G
    equal(Lambda.sum(axis=0), np.diag(U_A.T @ inputs @ U_A), "inputs")
    equal(Lambda.sum(axis=1), np.diag(U_G.T @ outputs @ U_G), "outputs")


def test_O38_in_the_last_block_tokens_and_sequences_agree() -> None:
    """For `expected`: an output of up reaches its own position's loss alone; one of v does not."""
    one = case(length=4)
    model, corpus = model_of(one), corpus_of(one)
    names = ["blocks.1.attn.v", "blocks.1.mlp.up"]
    basis = any_bases(model, names, 4)
    token, sequence = (ekfac(model, corpus, basis, "expected", per=per) for per in BOTH)
    equal(token["blocks.1.mlp.up"].Lambda, sequence["blocks.1.mlp.up"].Lambda, "up")
    v = "blocks.1.attn.v"
    assert gap(token[v].Lambda, sequence[v].Lambda) > 0.3
    token, sequence = (ekfac(model, corpus, basis, "sampled", per=per) for per in BOTH)
    assert gap(token["blocks.1.mlp.up"].Lambda, sequence["blocks.1.mlp.up"].Lambda) > 0.3


def test_B75_the_square_of_another_sum_is_another_lambda() -> None:
    """Per token, per sequence, and the square of the whole batch's sum: three matrices."""
    one = case(length=5, batch=3)
    model, corpus, name = model_of(one), corpus_of(one), "blocks.0.mlp.up"
    basis = any_bases(model, [name], 6)
    found = [ekfac(model, corpus, basis, "empirical", per=per)[name].Lambda for per in BOTH]
    _, gradient = rc.loss_and_gradient(model, one.token)
    C = basis[name].U_G.T @ gradient[f"{name}.weight"] @ basis[name].U_A
    found.append(C * C)
    for i, one_ in enumerate(found):
        for other in found[:i]:
            assert gap(one_, other) > 0.3
    alone = corpus_of(replace(one, **{
        field: getattr(one, field)[:1] for field in ("token", "real", "segment", "label")
    }))  # fmt: skip
    _, gradient = rc.loss_and_gradient(model, one.token[:1])
    C = basis[name].U_G.T @ gradient[f"{name}.weight"] @ basis[name].U_A
    equal(ekfac(model, alone, basis, "empirical", per="sequence")[name].Lambda, C * C, "alone")


# ------------------------------------------------------------------ planted


NEXT = estimators._Segments.next


def chunks_end_segments(segments: Any, tap: Tap) -> Any:
    """The head's chunk of rows taken for whole segments."""
    own, begin, _ = NEXT(segments, tap)
    return own, begin, False


def sums_for_means(self: Any, a: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    return MEANS(self, a, begin, np.ones_like(count))


MEANS = estimators._Reduced._means


def means_of_the_sequence(segments: Any, tap: Tap) -> Any:
    """Documents of a packed sequence taken for one."""
    own, begin, still = NEXT(segments, tap)
    T = segments.width
    keep = np.flatnonzero(np.diff(own // T, prepend=-1))
    return own[keep], begin[keep], still


def wide(segments: Any, config: Any, shard: Any) -> None:
    INIT(segments, config, shard)
    segments.width = shard.keep_BT.shape[1]


INIT = estimators._Segments.__init__


def everything(config: Any, rows: Any, label: np.ndarray, real: Any, segment: Any) -> np.ndarray:
    return np.ones(label.shape, bool)


def squared_at_the_end(shard: Any) -> None:
    """D is summed over all segments of a shard, and squared once."""
    for name, sum_OI in shard._sums.items():
        shard._sums[name] = sum_OI**2
    FINISH(shard)


FINISH = estimators._ShardLambda.finish


def never_squared(shard: Any, _: int, tap: Tap) -> None:
    shard._at, one = tap.name, shard._bases[tap.name]
    D = (tap.g @ one.U_G).T @ shard._inputs(tap.a, one.U_A)
    shard._sums[tap.name] = shard._sums.get(tap.name, 0.0) + D


def check_reduce() -> None:
    assert_reduced(model_of(packed()), corpus_of(packed()), NAMES, "reached", drawn("sampled"))


def check_chunks(check: Callable[[], None]) -> Callable[[], None]:
    def one() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "HEAD_ROWS", 3)
            check()

    return one


def check_lambda() -> None:
    assert_lambda(model_of(packed()), corpus_of(packed()), NAMES, drawn("empirical"))


S, L = estimators._Segments, estimators._ShardLambda
PLANTED: list[tuple[str, list[tuple[Any, str, Any]], Callable[[], None]]] = [
    ("B36 a summed, not averaged", [(estimators._Reduced, "_means", sums_for_means)], check_reduce),
    ("documents reduced together", [(S, "__init__", wide), (S, "next", means_of_the_sequence)],
     check_reduce),
    ("a chunk ends a segment of reduce", [(S, "next", chunks_end_segments)],
     check_chunks(check_reduce)),
    ("a chunk ends a segment of Λ", [(S, "next", chunks_end_segments)],
     check_chunks(check_lambda)),
    ("pads are rows of reduce", [(shards, "kept", everything)], check_reduce),
    ("documents are one sequence of Λ", [(S, "__init__", wide), (S, "next", means_of_the_sequence)],
     check_lambda),
    ("B75 the square of the batch's sum", [(L, "take", never_squared),
                                           (L, "finish", squared_at_the_end)], check_lambda),
    ("pads are rows of Λ", [(shards, "kept", everything)], check_lambda),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bugs", "notices"), PLANTED, ids=[name for name, *_ in PLANTED])
def test_planted_bugs_are_noticed(
    name: str, bugs: list[tuple[Any, str, Any]], notices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices()
    for where, attribute, wrong in bugs:
        monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises(AssertionError):
        notices()


# ------------------------------------------------------------------ files and refusals


def test_a_file_says_that_rows_are_segments(tmp_path: Path) -> None:
    one = packed()
    got = reduce(model_of(one), corpus_of(one), "blocks.*.mlp.up", draws=2)
    rc.save_factors(got, tmp_path / "r.h5")
    back = rc.load_factors(tmp_path / "r.h5")
    assert back.estimator is got.estimator is Estimator.REDUCE
    decompose_to(back, tmp_path / "b.h5")
    assert rc.load_bases(tmp_path / "b.h5").method == rc.decompose(got).method == "kfac reduce"
    assert (back["blocks.0.mlp.up"].sum_A == got["blocks.0.mlp.up"].sum_A).all()
    rc.save_factors(rc.collect(model_of(one), corpus_of(one), "head"), tmp_path / "e.h5")
    assert rc.load_factors(tmp_path / "e.h5").estimator is Estimator.EXPAND
    assert b"estimator" not in (tmp_path / "e.h5").read_bytes()[:2000]


def test_refusals() -> None:
    one = case(length=4)
    model, corpus = model_of(one), corpus_of(one)
    basis = any_bases(model, ["head"], 0)

    def refused(error: type[Exception], says: str, bases: rc.Bases = basis, **choice: Any) -> None:
        with pytest.raises(error, match=f"^ekfac: .*{says}"):
            ekfac(model, corpus, bases, **({"per": "token"} | choice))

    refused(ConventionError, "per must be one of token, sequence; got 'tokens'", per="tokens")
    refused(ConventionError, "rows must be one of", rows="none")
    refused(ConventionError, "fisher must be one of", fisher="gold")
    refused(RangeError, "seed", seed=-1)
    refused(ConventionError, "made from weights 000000000000", replace(basis, weights="0" * 64))
    ekfac(model, corpus, replace(basis, weights="0" * 64), per="token", force=True)
    refused(NameUnknownError, "no linear layer 'embed'", rc.Bases({"embed": basis["head"]}))
    head = basis["head"]
    refused(ShapeError, "U_A of 'head'", rc.Bases({"head": replace(head, U_A=head.U_A[:, 1:])}))
    bad = rc.Bases({"head": replace(head, U_G=np.full_like(head.U_G, np.nan))})
    refused(NonFiniteError, "U_G of 'head'", bad)
    with pytest.raises(NameUnknownError):
        reduce(model, corpus, "embed")
    with pytest.raises(ConventionError, match=r"^reduce: rows must be one of"):
        reduce(model, corpus, "head", rows="none")
