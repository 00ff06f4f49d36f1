"""Curvature and second-order code: the kinds of fault that public reports of others describe.

validation/REPORTS.md says which report each test answers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from strategies import Case, assert_within, case, cases, config, few, random_parameters

import refcurv as rc
from refcurv.curvature.eigenbasis import eigenbasis
from refcurv.law import tolerance
from refcurv.law.checks import ConventionError, EmptyError, NonFiniteError
from refcurv.model.config import NormPlace, QKNorm

FISHERS = ("sampled", "signed", "empirical", "expected")


def model_of(one: Case) -> rc.Model:
    return rc.Model(one.config, one.parameters)


def corpus_of(one: Case) -> rc.Corpus:
    return rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)


# ------------------------------------------------------------------ matrices that solvers fail on


def rotated(values: np.ndarray) -> np.ndarray:
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(len(values),) * 2))
    M = (Q * values) @ Q.T
    return (M + M.T) / 2


def of_rows(rows: int, size: int) -> np.ndarray:
    x = np.random.default_rng(2).normal(size=(rows, size)).astype(np.float32)
    return (x.T @ x).astype(np.float64)


MATRICES = {
    "rank 7 of 200, products in float32": of_rows(7, 200),
    "one row, products in float32": of_rows(1, 64),
    "nothing": np.zeros((50, 50)),
    "all eigenvalues equal": np.eye(100),
    "all entries equal": np.ones((100, 100)),
    "condition beyond the digits": rotated(np.logspace(0, -20, 40)),
    "two clusters": rotated(np.repeat([1.0, 1e-9], 20)),
    "numbers near the least, products in float32": of_rows(7, 20) * 1e-300,
    "numbers below the least normal, products in float32": of_rows(7, 20) * 1e-312,
    "one number": np.array([[2.0]]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_second_moment_has_an_eigenbasis(name: str) -> None:
    """Where float32 solvers stop or give NaN: orthogonal, descending, not negative, M again."""
    M, n = MATRICES[name], len(MATRICES[name])
    U, values, raised = eigenbasis(M, 1, "float32" if "float32" in name else "float64", name)
    U_again, values_again, _ = eigenbasis(M.copy(), 1, "float32", name)
    assert U.tobytes() == U_again.tobytes() and values.tobytes() == values_again.tobytes()
    assert_within(U.T @ U, np.eye(n), tolerance.eigenpair(n), np.eye(n), name)
    assert (np.diff(values) <= 0).all() and (values >= 0).all()
    unit = np.abs(M).max() or 1.0  # the squares of the least numbers are 0
    zeroed = np.sqrt(raised) * tolerance.negative(n, 1, "float32") * values[0] / unit
    least = n * n * np.finfo(np.float64).smallest_subnormal / unit
    residual = np.linalg.norm(((U * values) @ U.T - M) / unit)
    assert residual <= 2 * tolerance.eigenpair(n) * np.linalg.norm(M / unit) + zeroed + least


# ------------------------------------------------------------------ numbers that are none, bfloat16


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_ends_in_a_refusal_that_names_a_layer(
    value: float, tmp_path: Path
) -> None:
    """Before any eigensolver meets it; in a file the parameter itself is named."""
    one = case()
    W = one.parameters["blocks.1.attn.o.weight"].copy()
    W[0, 0] = value
    model = rc.Model(one.config, one.parameters | {"blocks.1.attn.o.weight": W})
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"'blocks\.1\."):
        rc.collect(model, corpus_of(one), "**")
    with pytest.raises(NonFiniteError, match=r"'blocks\.1\.attn\.o\.weight'"):
        rc.save(model, tmp_path / "w.h5")


def test_curvature_of_bfloat16_weights_is_that_of_the_numbers_that_they_hold(
    tmp_path: Path,
) -> None:
    """The products, sums and eigenvectors are in float64 whatever the weights are stored in."""
    one = case()
    short = {name: x.astype(np.float32).view(np.uint32) for name, x in one.parameters.items()}
    held = {name: (x & np.uint32(0xFFFF0000)).view(np.float32) for name, x in short.items()}
    stored = dict.fromkeys(held, "bfloat16")
    wide = {name: x.astype(np.float64) for name, x in held.items()}
    rc.save(rc.Model(one.config, wide, "float64", stored), tmp_path / "w.h5")
    made = [
        rc.collect(model, corpus_of(one), "**", "expected")
        for model in (rc.load(tmp_path / "w.h5"), rc.Model(one.config, wide))
    ]
    assert rc.load(tmp_path / "w.h5").stored == stored
    for name, basis in rc.decompose(made[0]).items():
        for side in ("sum_A", "sum_G"):
            one_side, other = (getattr(factors[name], side) for factors in made)
            assert one_side.dtype == np.float64 and one_side.tobytes() == other.tobytes()
        assert basis.U_A.dtype == basis.U_G.dtype == np.float64


# ------------------------------------------------------------------ labels that are none


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_sequence_without_a_label_adds_nothing(fisher: str) -> None:
    """Labels of −100, all of one sequence's: nothing is divided by how many there are."""
    one = case(batch=3)
    label = np.where(one.token % 2, one.label, -100)
    label[2] = -100
    model = model_of(one)
    with_it = rc.collect(model, rc.Corpus(one.token, label), "**", fisher)
    without = rc.collect(model, rc.Corpus(one.token[:2], label[:2]), "**", fisher)
    minus_one = rc.collect(model, rc.Corpus(one.token, np.maximum(label, -1)), "**", fisher)
    for name, factor in with_it.items():
        assert (factor.n_A, factor.n_G) == (without[name].n_A, without[name].n_G)
        for side in ("sum_A", "sum_G"):
            want = getattr(without[name], side)
            assert_within(getattr(factor, side), want, 1e-13, want, f"{side} of {name}")
            assert getattr(factor, side).tobytes() == getattr(minus_one[name], side).tobytes()


def test_no_label_at_all_is_said_and_is_no_loss() -> None:
    one = case()
    model, none = model_of(one), np.full(one.token.shape, -100)
    loss, gradient = rc.loss_and_gradient(model, one.token, none)
    assert loss == 0 and not any(x.any() for x in gradient.values())
    corpus = rc.Corpus(one.token, none)
    for what in (
        *(lambda kind=kind: rc.collect(model, corpus, fisher=kind) for kind in FISHERS),
        lambda: rc.collect_blocks(model, corpus),
        lambda: rc.exact.kfac(model, corpus, wrt="blocks.0.mlp.up.weight"),
        lambda: rc.collect(model, rc.Corpus(one.token[:, :1])),
    ):
        with pytest.raises(EmptyError, match=r"none of the .* labels is >= 0"):
            what()


# ------------------------------------------------------------------ which layers, which positions


@few(8)
@given(cases())
def test_every_linear_layer_of_any_model_is_collected(one: Case) -> None:
    """None is registered and then never reached, none is reached twice."""
    assume((one.label >= 0).any())
    corpus = corpus_of(one)
    factors = rc.collect(model_of(one), corpus, "**", "empirical")
    assert list(factors) == list(one.config.linear_layers())
    rows = {factor.n_A for factor in factors.values()}
    assert len(rows) == 1 and 1 <= rows.pop() <= one.real.sum()
    assert all(factor.n_G == factor.n_A for factor in factors.values())


def test_a_layer_named_twice_is_one_layer() -> None:
    one = case()
    model, corpus = model_of(one), corpus_of(one)
    twice = rc.collect(model, corpus, "blocks.0.mlp.up,blocks.*.mlp.up,blocks.0.mlp.up")
    once = rc.collect(model, corpus, "blocks.*.mlp.up")
    assert list(twice) == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    assert all(twice[name].sum_G.tobytes() == once[name].sum_G.tobytes() for name in once)
    with pytest.raises(ConventionError, match=r"'blocks\.0\.mlp\.up' is matched by two patterns"):
        rc.edit(model, rc.decompose(once), {"blocks.0.mlp.up": 0.5, "**.up": 0.6})


SMALLEST = {
    "one position": (dict(), 1, 1),
    "one hidden unit": (dict(mlp_width=1), 2, 3),
    "one number wide": (dict(width=1, norm_eps=0.5), 2, 3),
    "one head": (dict(heads=1, kv_heads=1), 2, 3),
    "two words": (dict(vocabulary=2), 2, 3),
    "one of everything": (
        dict(layers=1, mlp_width=1, width=1, heads=1, kv_heads=1, norm_eps=0.5),
        1,
        1,
    ),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_an_axis_of_length_one_is_an_axis(name: str) -> None:
    """K of the factors is the exact one; whatever is 1, no axis is dropped."""
    changes, batch, length = SMALLEST[name]
    # with no eps a norm of one number would be its sign, and every gradient before it 0
    one = case(batch=batch, length=length, norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, **changes)
    label = (one.token + 1) % one.config.vocabulary
    model, corpus = model_of(one), rc.Corpus(one.token, label)
    factors = rc.collect(model, corpus, "blocks.0.mlp.*,head", "expected")
    for layer, factor in factors.items():
        O, I = one.config.linear_layers()[layer]
        assert factor.A.shape == (I, I) and factor.G.shape == (O, O)
        K = rc.exact.kfac(model, corpus, wrt=f"{layer}.weight")
        assert_within(factor.n_A * np.kron(factor.G, factor.A), K, 1e-11, K, layer)
    assert rc.logits(model, one.token).shape == (batch, length, one.config.vocabulary)
    assert all(basis.U_A.ndim == 2 for basis in rc.decompose(factors).values())


def test_a_layer_that_nothing_reaches_has_no_curvature_and_says_so() -> None:
    """The output matrix is 0: what lies before it has G = 0 exactly; the others are edited."""
    one = case(norm_place=NormPlace.PRE)
    dead = one.parameters | {"blocks.0.mlp.down.weight": np.zeros((8, 5))}
    model = rc.Model(one.config, dead)
    factors = rc.collect(model, corpus_of(one), "blocks.*.mlp.*")
    assert not factors["blocks.0.mlp.up"].sum_G.any() and factors["blocks.0.mlp.down"].sum_G.any()
    bases = rc.decompose(factors)
    assert not bases["blocks.0.mlp.up"].lam.any()
    with pytest.raises(EmptyError, match=r"'blocks\.0\.mlp\.gate': the curvature mass is 0"):
        rc.edit(model, bases, 0.5)
    edited, _ = rc.edit(model, bases, {"blocks.1.mlp.*": 0.5})
    W = "blocks.1.mlp.up.weight"
    assert np.isfinite(edited.parameters[W]).all()
    assert not np.array_equal(edited.parameters[W], model.parameters[W])


# ------------------------------------------------------------------ what is the caller's


def test_nothing_of_the_callers_is_changed() -> None:
    """Weights, tokens, labels and vectors: the same bits after every function, and writable."""
    made = config(layers=1)
    parameters, rng = random_parameters(made, 0), np.random.default_rng(0)
    token = rng.integers(0, 7, (2, 5))
    label = rng.integers(-1, 7, (2, 5))
    wrt = "blocks.0.mlp.up.weight"
    vector = {wrt: rng.normal(size=parameters[wrt].shape)}
    own = [*parameters.values(), token, label, *vector.values()]
    before = [array.copy() for array in own]
    model, corpus = rc.Model(made, parameters), rc.Corpus(token, label)
    bases = rc.decompose(rc.collect(model, corpus, "blocks.*.mlp.*", "expected"))
    rc.edit(model, bases, 0.5)
    rc.collect_blocks(model, corpus)
    rc.loss_and_gradient(model, token, label)
    rc.exact.hvp(model, token, label, wrt=wrt, vector=vector)
    rc.exact.ggnvp(model, token, label, wrt=wrt, vector=vector)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(own, before, strict=True))
    assert all(array.flags.writeable for array in own)


def test_a_mask_of_ones_beside_packed_documents_changes_nothing() -> None:
    """Each document is attended alone, as if no mask were given; A and G are those of them all."""
    made = config(layers=2)
    model = rc.Model(made, random_parameters(made, 0))
    token = np.random.default_rng(0).integers(0, 7, (3, 12)).astype(np.int32)
    segment = np.broadcast_to(np.arange(12) // 5, token.shape).astype(np.int32)
    found = [
        rc.collect(model, rc.Corpus(token, segments=segment, mask=mask), "**", "empirical")
        for mask in (None, np.ones(token.shape, np.uint8))
    ]
    ends = [(row, slice(at, at + 5)) for row in token for at in (0, 5, 10)]
    alone = [rc.collect(model, rc.Corpus(row[None, cut]), "**", "empirical") for row, cut in ends]
    for name, one in found[0].items():
        for what in ("sum_A", "sum_G", "n_A", "n_G"):
            assert np.array_equal(getattr(one, what), getattr(found[1][name], what))
        for what in ("sum_A", "sum_G"):
            want = sum(getattr(each[name], what) for each in alone)
            np.testing.assert_allclose(getattr(one, what), want, atol=1e-12 * np.abs(want).max())
