"""`collect` equals the definition of A and G: over models, corpora, images, and every choice."""

from __future__ import annotations

from dataclasses import replace

import budgets
import numpy as np
import pytest
import test_images
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, assert_within, cases
from test_factors import BIASED, case, corpus_of, gappy, model_of

import refcurv as rc
from refcurv.curvature import definition
from refcurv.law import conventions
from refcurv.law.checks import ConventionError, EmptyError, NameUnknownError, RangeError
from refcurv.law.conventions import NO_LABEL, Fisher
from refcurv.model.config import RopeScaling

ROUNDING = 1e-6
"""tr S_G of one row below which all of it may be rounding: the weights are of order 1."""


def compare(model: rc.Model, corpus: rc.Corpus, layers: str, **choice: object) -> None:
    got = rc.collect(model, corpus, layers, **choice)
    want = definition.factors(model, corpus, list(got), **choice)
    assert list(got) == list(want)
    budget = 40 * budgets.path(model.config.layers, 64, model.dtype)
    for name, one in got.items():
        sums = want[name]
        assert (one.n_A, one.n_G) == (sums.n_A, sums.n_G), name
        scale = np.trace(sums.S_G) + ROUNDING * sums.n_G
        assert_within(one.sum_G, sums.S_G, budget, scale, f"S_G of {name}")
        A = np.diag(one.sum_A) if one.sum_A.ndim == 1 else one.sum_A
        assert_within(A, sums.S_A, budget, np.trace(sums.S_A), f"S_A of {name}")
        if one.sum_a is not None:
            scale = np.sqrt(sums.n_A * np.trace(sums.S_A))  # Σ |a| by Cauchy and Schwarz
            assert_within(one.sum_a, sums.s_a, budget, scale, f"Σ a of {name}")


@given(
    cases(), st.sampled_from(list(Fisher)), st.sampled_from(["reached", "labelled", "all"]),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_collect_equals_the_definition(one: Case, fisher: Fisher, rows: str, seed: int) -> None:
    if not (one.label >= 0).any():
        return
    tables = [name for name in ("embed", "position") if f"{name}.weight" in one.parameters]
    draws = 2 if fisher in (Fisher.SAMPLED, Fisher.SIGNED) else 1
    choice = {"fisher": fisher, "rows": rows, "seed": seed, "draws": draws}
    compare(model_of(one), corpus_of(one), ",".join(["**", *tables]), **choice)


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize("fisher", list(Fisher))
def test_images_too(fisher: Fisher, rows: str) -> None:
    one, images = test_images.vit()
    one.label[1] = -1  # an image without a label has no rows, at the head neither
    layers = "{head,blocks.**}" if rows == "cls" else "**,position"
    corpus = test_images.corpus_of(one, images)
    compare(test_images.model_of(one), corpus, layers, fisher=fisher, rows=rows, seed=3)


def test_no_patch_is_a_row_of_cls() -> None:
    one, images = test_images.vit()
    model, corpus = test_images.model_of(one), test_images.corpus_of(one, images)
    sums = definition.factors(model, corpus, ["patch"], rows="cls")["patch"]
    assert (sums.n_A, sums.n_G) == (0, 0)
    assert not sums.S_A.any()
    with pytest.raises(EmptyError):
        rc.collect(model, corpus, "patch", rows="cls")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_shards_of_several_sequences_are_the_sequences_one_by_one(dtype: str, monkeypatch) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 12)
    one = gappy()
    for fisher in Fisher:
        compare(model_of(one, dtype), corpus_of(one), "**,embed,position", fisher=fisher, seed=1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_length_of_a_text_counts_where_its_end_has_no_label(kind: str) -> None:
    """Rotary frequencies hang on it: the end may not be cut off, though nothing attends to it."""
    lists = {"short": (1.0, 1.0), "long": (1.5, 3.0)} if kind == "longrope" else {"factor": 3.0}
    scaling = RopeScaling(kind=kind, original=4, **lists)
    one = case(length=6, batch=3, head_width=4, rope_width=4, rope_scaling=scaling)
    label = np.where(np.arange(6) < 2, one.label, NO_LABEL)
    whole = corpus_of(replace(one, label=label))
    compare(model_of(one), whole, "**", fisher="empirical")
    cut = rc.Corpus(one.token[:, :4], label[:, :4])
    name = "blocks.0.attn.q"
    sums = [rc.collect(model_of(one), c, name, "empirical")[name].sum_G for c in (whole, cut)]
    assert not np.allclose(*sums, rtol=1e-3)


def test_rows_of_float32_are_added_in_float64() -> None:
    """Squares of gradients near 1e-30 vanish in float32."""
    one, name = case(tied=False), "blocks.1.mlp.down"
    one.parameters["head.weight"] *= 1e-30
    narrow, wide = (
        definition.factors(model_of(one, dtype), corpus_of(one), [name], "empirical")[name].S_G
        for dtype in ("float32", "float64")
    )
    assert np.trace(wide) > 0
    assert_within(narrow, wide, budgets.path(2, 8, np.float32), np.trace(wide), "S_G")


def test_only_the_named_layers_are_summed() -> None:
    one = case(biases=BIASED)
    names = ["blocks.1.mlp.up", "embed"]
    assert list(definition.factors(model_of(one), corpus_of(one), names)) == names


@pytest.mark.parametrize(
    ("choice", "error", "says"),
    [
        ({"layers": ["blocks.9.mlp.up"]}, NameUnknownError, "no linear layer 'blocks.9.mlp.up'"),
        ({"fisher": "gold"}, ConventionError, "fisher must be one of"),
        ({"draws": 0}, RangeError, "draws must be an integer"),
        ({"fisher": "expected", "draws": 2}, ConventionError, "`expected` draws nothing"),
        ({"fisher": "empirical", "draws": 2}, ConventionError, "`empirical` draws nothing"),
        ({"seed": -1}, RangeError, "seed must be an integer"),
    ],
)
def test_what_collect_refuses_has_no_definition_either(choice: dict, error, says: str) -> None:
    """Two draws of `expected` would halve G: n_G would count what was never drawn."""
    one = case()
    choice = {"layers": ["blocks.0.mlp.up"], **choice}
    with pytest.raises(error, match=f"^factors: .*{says}"):
        definition.factors(model_of(one), corpus_of(one), **choice)
