"""What exact curvature is given: a Corpus, as `collect` takes it, with padding and documents.

The naive sums of padded and packed batches are in test_exact.py. Here are the laws: the A and G of
`collect`, and a batch that has the curvature of its documents, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, assert_within, case, cases, few, gap
from test_biases import labels_given, packings
from test_exact import BUDGET, MATRICES, direction, flat, needs_longdouble, problem_of
from test_factors import corpus_of, model_of

import refcurv as rc
from refcurv.curvature import distance, exact
from refcurv.curvature.exact import problem
from refcurv.curvature.exact.fishers import Choice
from refcurv.curvature.exact.products import gradient_at
from refcurv.curvature.exact.variables import variables_of
from refcurv.law.checks import ConventionError, EmptyError, ShapeError
from refcurv.law.conventions import Fisher

labelled_cases = cases().filter(lambda one: (one.label >= 0).any())


def documents(one: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each labelled document, by itself, one row each."""
    for b in range(len(one.token)):
        for s in np.unique(one.segment[b]):
            at = one.real[b] & (one.segment[b] == s)
            if (one.label[b, at] >= 0).any():
                yield one.token[b, at][None], one.label[b, at][None]


# ------------------------------------------------------------------ as `collect` takes it


@few(8)
@given(
    labelled_cases,
    st.sampled_from(list(Fisher)),
    st.sampled_from(["reached", "labelled", "all"]),
    st.integers(0, 2**64 - 1),
)
def test_padded_and_packed_batches_are_collected(
    one: Case, fisher: str, rows: str, seed: int
) -> None:
    """A, G and n of every layer: by split segments and the definitions, and by shards and kernels.

    What is drawn goes by row and position, wherever the segment lies (SAMPLING).
    """
    draws = 2 if fisher in (Fisher.SAMPLED, Fisher.SIGNED) else 1
    model, corpus = model_of(one), corpus_of(one)
    made = problem(model, corpus, rows=rows)
    got = rc.collect(model, corpus, "**", fisher, seed, draws, rows=rows)
    for layer, factor in got.items():
        weight = one.config.weight_of(layer)
        if weight not in made.linear:
            continue
        found = exact.moments(made, wrt=weight, fisher=fisher, seed=seed, draws=draws)
        assert (found.rows, found.rows * draws) == (factor.n_A, factor.n_G)
        assert_within(factor.A, found.A, BUDGET, found.A, f"A {layer}")
        size = np.linalg.norm(found.G) + np.linalg.norm(got["head"].G)  # of keys they cancel
        assert_within(factor.G, found.G, 1e3 * BUDGET, size, f"G {layer}")


def test_every_function_takes_a_corpus() -> None:
    """And what it makes of it has the bits of the Problem that `problem` makes."""
    one = labels_given(case(batch=3, length=7, layers=1, width=4))
    model, name, (corpus, _, _) = model_of(one), "blocks.0.attn.v.weight", packings(one)
    made, options = problem(model, corpus), dict(fisher="signed", seed=4, draws=2)
    v = direction(made, 0, name)
    for what, given_ in (
        (exact.gradient, dict(wrt=name)), (exact.derivative, dict(vector=v)),
        (exact.hvp, dict(wrt=name, vector=v)), (exact.ggnvp, dict(wrt=name, vector=v)),
        (exact.hessian, dict(wrt=name)), (exact.ggn, dict(wrt=name)),
        (exact.fisher_along, dict(vector=v) | options),
        *((matrix, dict(wrt=name) | options) for matrix in MATRICES.values()),
    ):  # fmt: skip
        one, two = what(model, corpus, **given_), what(made, **given_)
        for x, y in zip(
            *(z.values() if isinstance(z, dict) else [z] for z in (one, two)), strict=True
        ):
            assert np.array_equal(x, y) and np.any(x), what.__name__
    operator = exact.operator(model, corpus, wrt=name)
    assert np.array_equal(operator @ flat(v), flat(exact.hvp(made, wrt=name, vector=v)))
    assert len(exact.rows(model, corpus, wrt=name, **options)) == 7
    three = distance._three(made, name, Choice(**options))
    want = exact.fisher(model, corpus, wrt=name, **options)
    assert_within(three[name].F, want, BUDGET, want, "F of compare")
    found = distance.compare(model, corpus, wrt=name, **options)[name]
    assert found.norm == pytest.approx(np.linalg.norm(want), rel=1e-12)


# ------------------------------------------------------------------ documents


@few(8)
@given(labelled_cases, st.integers(0, 99))
def test_curvature_of_a_batch_is_that_of_its_documents(one: Case, seed: int) -> None:
    """∇L, H v, GGN v and their products along v are sums over plain documents, one at a time."""
    model, corpus = model_of(one), corpus_of(one)
    v = direction(problem_of(one), seed)
    for what in (
        lambda *data: flat(exact.gradient(model, *data, wrt="**")),
        lambda *data: flat(exact.hvp(model, *data, wrt="**", vector=v)),
        lambda *data: flat(exact.ggnvp(model, *data, wrt="**", vector=v)),
        lambda *data: exact.derivative(model, *data, vector=v),
    ):
        parts = [what(*each) for each in documents(one)]
        scale = sum(np.abs(part) for part in parts) + 1e-6
        assert_within(what(corpus), sum(parts), 1e4 * BUDGET, np.linalg.norm(scale), "sum")


@needs_longdouble
@few(6)
@given(labelled_cases, st.integers(0, 99))
def test_the_step_and_central_differences_agree(one: Case, seed: int) -> None:
    """H v of padded and packed batches: Im ∇L(θ + ihv)/h, and (∇L(θ + hv) − ∇L(θ − hv))/2h.

    The steps h and 2h in longdouble, extrapolated: what is left is h⁴ times the fifth derivative,
    and rounding over h. Observed in 480 cases: 6e-12 of the norm.
    """
    if one.config.activation == "relu" or one.config.qkv_clip is not None:  # they bend
        return
    made = problem_of(one, np.longdouble)
    v, every = direction(made, seed), variables_of("test", made, None, None, "**")

    def slope(h: float) -> np.ndarray:
        sides = (
            {n: x + sign * np.longdouble(h) * v[n] for n, x in made.parameters.items()}
            for sign in (1, -1)
        )
        ahead, behind = (flat(gradient_at(every, moved)) for moved in sides)
        return (ahead - behind) / (2 * np.longdouble(h))

    want = (4 * slope(1e-5) - slope(2e-5)) / 3
    got = flat(exact.hvp(made, wrt="**", vector=v))
    assert_within(got, want, 1e-9, np.linalg.norm(want) + 1e-3, "H v")


@pytest.mark.parametrize("causal", [True, False])
def test_O52_curvature_of_packed_documents_is_that_of_separate_ones(causal: bool) -> None:
    """Seven documents in three rows or in seven: every matrix; run into one another, none."""
    one = labels_given(case(batch=3, length=7, layers=1, causal=causal, width=4, vocabulary=4))
    model, name = model_of(one), "blocks.0.attn.v.weight"
    kinds = [(exact.hessian, {}), (exact.ggn, {})]
    kinds += [(matrix, dict(fisher=kind)) for matrix in MATRICES.values()
              for kind in ("expected", "empirical")]  # fmt: skip
    for what, options in kinds:
        packed, apart, merged = (
            what(model, corpus, wrt=name, **options) for corpus in packings(one)
        )
        assert_within(packed, apart, BUDGET, apart, what.__name__)
        assert gap(merged, apart) > 0.05, what.__name__


def test_O51_padding_adds_nothing_to_exact_curvature() -> None:
    """Labels by default end with the real positions; a bidirectional model does not see padding."""
    for causal in (True, False):
        one = case(length=5, layers=1, causal=causal, width=4, vocabulary=4)
        label = None if causal else one.token
        wide = np.concatenate([one.token, np.full((2, 4), 3)], axis=1)
        mask = np.tile(np.arange(9) < 5, (2, 1)).astype(np.uint8)
        own = None if causal else np.where(mask, np.pad(one.token, ((0, 0), (0, 4))), -1)
        padded = rc.Corpus(wide, own, mask)
        model, name = model_of(one), "blocks.0.mlp.up.weight"
        for what in (exact.hessian, exact.fisher, exact.kfac):
            want = what(model, one.token, label, wrt=name)
            assert_within(what(model, padded, wrt=name), want, BUDGET, want, what.__name__)
        unseen = problem(model, rc.Corpus(wide, own) if own is not None else wide)
        assert gap(exact.hessian(unseen, wrt=name), exact.hessian(model, padded, wrt=name)) > 0.01


# ------------------------------------------------------------------ refusals


def test_refusals() -> None:
    one = case()
    model, corpus, name = model_of(one), rc.Corpus(one.token), "head.weight"
    images = rc.Corpus(images=np.zeros((1, 1, 2, 2), np.float32), labels=np.zeros(1, int))
    for error, says, given_ in (
        (ConventionError, "a Corpus has its own labels; leave labels out", (corpus, one.label)),
        (ConventionError, "the corpus has images, but the model reads tokens", (images,)),
        (EmptyError, "none of the 12 labels", (rc.Corpus(one.token, one.token * 0 - 1),)),
        (ShapeError, r"tokens must be \(B, T\); row 0", ([[1, 2], [3]],)),
    ):
        with pytest.raises(error, match=f"exact: {says}"):
            exact.gradient(model, *given_, wrt=name)
    with pytest.raises(ConventionError, match="its own data"):
        exact.gradient(problem(model, corpus), corpus, wrt=name)
    one = replace(one, config=replace(one.config, causal=False))
    with pytest.raises(ConventionError, match="a bidirectional model sees the next token"):
        exact.gradient(model_of(one), corpus, wrt=name)
