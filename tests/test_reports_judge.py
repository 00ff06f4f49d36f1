"""The judge: faults that public reports of K-FAC programs describe, each re-enacted as a dump.

validation/REPORTS.md says which report each test answers. What theirs holds is made by plain
arithmetic from taps or from the truth; what must come out is the name of the fault.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.model.config import Image, ModelConfig
from refcurv.model.part import part_of

Dump = dict[str, tuple[np.ndarray, np.ndarray, float]]


@cache
def texts() -> tuple[rc.Model, rc.Corpus, rc.Factors]:
    """A small OLMo-2, twelve sequences of eight labels, labels of the model."""
    made = config(mlp_width=12)
    model = rc.Model(made, random_parameters(made, 3))
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, made.vocabulary, (12, 9)))
    return model, corpus, rc.collect(model, corpus, "**", "expected")


@cache
def images(bare: int = 0) -> tuple[rc.Model, rc.Corpus, rc.Factors]:
    """A small vision transformer, sixteen images, one label each: a term of the loss per image.

    The first `bare` of them have no label, and so no rows.
    """
    image = Image(channels=2, height=6, width=6, patch=3)
    made = ModelConfig(
        vocabulary=7, width=8, layers=2, heads=2, kv_heads=2, head_width=4, mlp_width=12,
        norm_place="pre", qk_norm="none", norm="layer", norm_bias=True, norm_eps=1e-5, tied=False,
        rope_theta=None, gated=False,
        activation="gelu", causal=False, image=image, pool="cls",
        biases=("patch", "q", "k", "v", "o", "up", "down", "head"),
        learned_positions=image.positions,
    )  # fmt: skip
    model = rc.Model(made, random_parameters(made, 5))
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(16, 2, 6, 6)).astype(np.float32)
    labels = np.where(np.arange(16) < bare, -1, rng.integers(0, 7, 16))
    corpus = rc.Corpus(images=pixels, labels=labels.astype(np.int32))
    return model, corpus, rc.collect(model, corpus, "**", "expected")


def dump(factors: rc.Factors) -> Dump:
    return {name: (one.A, one.G, float(one.n_A)) for name, one in factors.items()}


def named(theirs: Dump, of: tuple[rc.Model, rc.Corpus, rc.Factors], **more: object) -> set[str]:
    """The ids that are named, or that a cause says it may be as well."""
    model, corpus, factors = of
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, arithmetic="float64", **more)
    assert not verdict.passed
    return {str(cause.fault) for cause in verdict.causes}


def test_honest_dumps_of_both_models_pass() -> None:
    for of in (texts(), images()):
        model, corpus, factors = of
        assert rc.validate(
            dump(factors), factors, model=model, corpus=corpus, arithmetic="float64"
        ).passed


@pytest.mark.slow
def test_gradients_of_a_mean_over_the_batch() -> None:
    """The gradients that are squared hold 1/m, m the rows of the batch."""
    of = texts()
    theirs = {name: (A, G / 96**2, n) for name, (A, G, n) in dump(of[2]).items()}
    assert named(theirs, of) == {"B1"}


def test_a_mean_loss_corrected_for_sequences_alone() -> None:
    """m counts sequences where the loss is a mean over their labels too: 1/T² is left."""
    of = texts()
    theirs = {name: (A, G / 8**2, n) for name, (A, G, n) in dump(of[2]).items()}
    assert named(theirs, of) == {"B1"}


@pytest.mark.slow
def test_labels_of_the_corpus_in_the_place_of_the_models() -> None:
    model, corpus, _ = of = texts()
    assert named(dump(rc.collect(model, corpus, "**", "empirical")), of) == {"B15"}


def test_a_layer_that_is_called_past_its_hook() -> None:
    """A fused call reads o's weight and never calls the module, so that nothing is stored."""
    of = texts()
    theirs = {name: one for name, one in dump(of[2]).items() if not name.endswith("attn.o")}
    assert named(theirs, of) == {"B48"}


def test_sizes_read_from_a_transposed_weight() -> None:
    """Conv1D stores (in, out): A is made as large as the output, and G as the input."""
    of = texts()
    theirs = {name: (G, A, n) for name, (A, G, n) in dump(of[2]).items() if "mlp" in name}
    assert named(theirs, of, layers="blocks.*.mlp.*") == {"B32"}


def test_terms_of_the_loss_counted_by_a_blocks_positions() -> None:
    """The loss has one term an image, and blocks have many positions: G is off by their number."""
    of = images()
    positions = of[0].config.image.positions
    theirs = {
        name: (A, G * (1 if name == "head" else positions), n)
        for name, (A, G, n) in dump(of[2]).items()
    }
    assert named(theirs, of) & {"B7", "B37"}


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["**", "patch,blocks.0.attn.v"])
@pytest.mark.parametrize("bare", [0, 3, 9])
def test_the_positions_of_an_image_are_a_factor_though_images_have_no_label(bare, layers) -> None:
    """Unlabelled images count for nothing: rows over all images are no number of positions."""
    of = images(bare)
    positions = of[0].config.image.positions
    theirs = {name: (A, G * positions, n) for name, (A, G, n) in dump(of[2]).items()}
    assert named(theirs, of, layers=layers) == {"B37"}


@pytest.mark.parametrize("bare", [0, 6])
def test_one_worker_of_three_on_images_of_which_some_have_no_label(bare) -> None:
    """Patches of images without a label are no rows either."""
    model, corpus, _ = images(bare)
    factors = rc.collect(model, corpus, "**", "empirical")
    own = dump(rc.collect(model, part_of(corpus, slice(1, None, 3)), "**", "empirical"))
    verdict = rc.validate(
        own, factors, model=model, corpus=corpus, arithmetic="float64",
        declared={"fisher": "empirical"},
    )  # fmt: skip
    assert [(x.fault, {*x.layers}) for x in verdict.causes] == [("B46", {*factors})]


def test_patches_counted_in_one_factor_of_the_convolution() -> None:
    """Ω of the paper is a sum over the places of an image, theirs a mean, or the other way."""
    of = images()
    places = of[0].config.image.patches
    theirs = dump(of[2])
    A, G, n = theirs["patch"]
    theirs["patch"] = (A * places, G, n)
    assert named(theirs, of) == {"B14"}


@pytest.mark.slow
def test_gradients_with_the_scale_of_mixed_precision() -> None:
    of = texts()
    theirs = {name: (A, G * 2.0**32, n) for name, (A, G, n) in dump(of[2]).items()}
    assert named(theirs, of) == {"B11"}


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_corrections_that_are_halved(share: float) -> None:
    """EK-FAC's Λ times a half is no rounding: it is refused, and the factor is said."""
    model, corpus, factors = texts()
    basis = rc.decompose(factors)
    exact = rc.estimators.ekfac(model, corpus, basis, fisher="expected", per="token")
    theirs = {
        name: {"A": one.A, "G": one.G, "n": one.n_A, "U_A": basis[name].U_A,
               "U_G": basis[name].U_G, "Lambda": share * exact[name].Lambda / exact[name].rows}
        for name, one in factors.items() if "mlp" in name
    }  # fmt: skip
    verdict = rc.validate(
        theirs, factors, layers="blocks.*.mlp.*", model=model, corpus=corpus, basis=basis
    )
    wrong = [one for one in verdict.failed if one.quantity == "Lambda"]
    assert len(wrong) == len(theirs) == len(verdict.failed)
    assert all(f"times {share:g}" in one.cause for one in wrong), wrong[0].cause


FEW = "blocks.1.mlp.{up,down}"
"""Layers that are enough where each layer has the same fault."""


def some(factors: rc.Factors) -> Dump:
    """The dump of FEW."""
    return {name: one for name, one in dump(factors).items() if name in UP_DOWN}


UP_DOWN = ("blocks.1.mlp.up", "blocks.1.mlp.down")


def parts(size: int) -> list[rc.Factors]:
    """The factors of each batch of so many sequences."""
    model, corpus, _ = texts()
    cuts = [corpus.tokens[b : b + size] for b in range(0, len(corpus.tokens), size)]
    return [rc.collect(model, rc.Corpus(tokens), FEW, "expected") for tokens in cuts]


def test_a_moving_average_whose_weights_do_not_add_up_to_one() -> None:
    """Old sums times the decay, and the new ones added as they are."""
    of, each = texts(), parts(4)
    theirs = {}
    for name, (_, _, n) in some(of[2]).items():
        A, G = (
            sum(0.9**k * getattr(one[name], side) for k, one in enumerate(reversed(each)))
            for side in "AG"
        )
        theirs[name] = (A, G, n)
    model, corpus, factors = of
    verdict = rc.validate(
        theirs, factors, model=model, corpus=corpus, arithmetic="float64", layers=FEW,
        declared={"fisher": "expected"},
    )  # fmt: skip
    (cause,) = verdict.causes
    assert cause.fault == "B9" and "a new batch with weight 1 instead of 0.1" in cause.sentence


def test_inputs_that_are_centred() -> None:
    model, corpus, _ = of = texts()
    made = rc.trace(model, corpus, range(12), "empirical").tensors
    theirs = {}
    for name, (A, G, n) in some(of[2]).items():
        mean = made[f"{name}.a"][:, :8].reshape(-1, len(A)).mean(axis=0)
        theirs[name] = (A - np.outer(mean, mean), G, n)
    assert named(theirs, of, layers=FEW) == {"B45"}


def test_gradients_of_a_batch_averaged_and_then_squared() -> None:
    model, corpus, _ = texts()
    of = (model, corpus, rc.collect(model, corpus, FEW, "empirical"))
    made, theirs = rc.trace(model, corpus, range(12), "empirical").tensors, {}
    for name, (A, G, n) in some(of[2]).items():
        g = made[f"{name}.g"][:, :8].reshape(3, 4, 8, len(G)).mean(axis=1).reshape(-1, len(G))
        theirs[name] = (A, g.T @ g / len(g), n)
    assert named(theirs, of, layers=FEW) == {"B44"}


def test_the_likeliest_label() -> None:
    model, corpus, _ = of = texts()
    labels = np.full(corpus.tokens.shape, -1)
    labels[:, :8] = rc.logits(model, corpus.tokens)[:, :8].argmax(axis=-1)
    other = rc.Corpus(corpus.tokens, labels=labels)
    assert named(dump(rc.collect(model, other, FEW, "empirical")), of, layers=FEW) == {"B16"}


def test_patches_in_another_order() -> None:
    """A transpose is missed: pixels before channels, or columns before rows."""
    of = images()
    A, G, n = dump(of[2])["patch"]
    for axes in ((1, 2, 0), (0, 2, 1)):
        order = np.arange(18).reshape(2, 3, 3).transpose(axes).reshape(-1)
        theirs = {"patch": (A[np.ix_(order, order)], G, n)}
        assert named(theirs, of, layers="patch") == {"B47"}


def test_damping_that_is_added_with_every_product() -> None:
    of = texts()
    theirs = {x: (A + 50 * 1e-3 * np.eye(len(A)), G, n) for x, (A, G, n) in some(of[2]).items()}
    assert named(theirs, of, layers=FEW) == {"B12"}


def test_means_that_are_divided_by_their_count_again() -> None:
    of = texts()
    for A_too in (True, False):
        theirs = {x: (A / n if A_too else A, G / n, n) for x, (A, G, n) in some(of[2]).items()}
        assert named(theirs, of, layers=FEW) == {"B4"}


def test_sums_that_were_never_written_to() -> None:
    of = texts()
    assert named({x: (A, 0 * G, n) for x, (A, G, n) in some(of[2]).items()}, of, layers=FEW) == {
        "B48"
    }


@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "norm_bias": True}])
def test_gains_that_are_folded_into_the_weights_behind_their_norm(changes) -> None:
    """The network is the same and so is each G; A of what reads a norm lacks its gain and bias."""
    own = config(mlp_width=12, norm_place="pre", qk_norm="none", biases=("q", "k", "v"), **changes)
    P = random_parameters(own, 3)
    reading = {f"blocks.{i}.attn.{x}": f"blocks.{i}.attn_norm" for i in (0, 1) for x in "qkv"}
    folded = dict(P)
    for layer, norm in reading.items():
        W, gain = P[f"{layer}.weight"], P[f"{norm}.weight"]
        folded[f"{layer}.weight"] = W * gain
        folded[f"{layer}.bias"] = P[f"{layer}.bias"] + W @ P.get(f"{norm}.bias", 0 * gain)
    for norm in reading.values():
        folded |= {x: np.full(8, float(x.endswith("weight"))) for x in P if x.startswith(norm)}
    corpus = rc.Corpus(np.random.default_rng(0).integers(0, own.vocabulary, (12, 9)))
    model, other = rc.Model(own, P), rc.Model(own, folded)
    assert np.allclose(rc.logits(model, corpus.tokens), rc.logits(other, corpus.tokens), atol=1e-12)
    layers = ",".join(reading)
    factors = rc.collect(model, corpus, layers, "empirical")
    theirs = dump(rc.collect(other, corpus, layers, "empirical"))
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, arithmetic="float64")
    (cause,) = verdict.causes
    assert cause.fault == "B34" and {*cause.layers} == {*reading}
    assert cause.sentence.startswith("The input without the gain of the norm before it")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["silu", "gelu"])
def test_another_activation_than_gemmas(other: str) -> None:
    own = config(mlp_width=12, norm_place="both", activation="gelu_tanh", norm_offset=True)
    model = rc.Model(own, random_parameters(own, 3))
    of = (model, texts()[1], rc.collect(model, texts()[1], FEW, "expected"))
    theirs = rc.Model(replace(own, activation=other), model.parameters)
    assert named(dump(rc.collect(theirs, of[1], FEW, "expected")), of) == {"B54"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "rows", "faults"), [("right", "all", {"B28"}), ("left", "reached", {"B28", "B50"})]
)
def test_padding_without_a_mask(side: str, rows: str, faults: set[str]) -> None:
    """Each token of a padded batch is real to the model, which labels alone are spared."""
    model, rng = texts()[0], np.random.default_rng(5)
    length = rng.integers(4, 10, (12, 1))
    mask = np.arange(9) < length
    tokens = rng.integers(0, 7, (12, 9)) * mask
    labels = np.where(mask & np.roll(mask, -1, 1) & (np.arange(9) < 8), np.roll(tokens, -1, 1), -1)
    corpus = rc.Corpus(tokens, mask=mask.astype(np.uint8))
    if side == "left":
        order = (np.arange(9) + length) % 9
        tokens, labels = (np.take_along_axis(x, order, 1) for x in (tokens, labels))
    bare = rc.Corpus(tokens, labels=labels)
    of = (model, corpus, rc.collect(model, corpus, FEW, "expected"))
    assert named(dump(rc.collect(model, bare, FEW, "expected", rows=rows)), of) == faults


def test_a_centred_unembedding_is_no_fault() -> None:
    """It moves all logits of a position by one number, of which the loss knows nothing."""
    model, corpus, factors = texts()
    head = model.parameters["head.weight"]
    P = {**model.parameters, "head.weight": head - head.mean(axis=0)}
    other = rc.Model(model.config, P)
    assert abs(rc.logits(other, corpus.tokens) - rc.logits(model, corpus.tokens)).max() > 0.1
    theirs = dump(rc.collect(other, corpus, FEW, "expected"))
    assert rc.validate(theirs, factors, layers=FEW, arithmetic="float64").passed


def test_factors_that_are_twice_as_large() -> None:
    """G alone, or A as the Hessian of a squared loss has it."""
    of = texts()
    for theirs, fault in (
        ({x: (A, 2 * G, n) for x, (A, G, n) in some(of[2]).items()}, "B5"),
        ({x: (2 * A, G, n) for x, (A, G, n) in some(of[2]).items()}, "B39"),
    ):
        assert named(theirs, of, layers=FEW) == {fault}


def test_weights_whose_second_half_was_cut_off() -> None:
    """The first 16 bits of each float32 are a bfloat16, and not the nearest one."""
    model, corpus, _ = texts()
    single = {name: x.astype("f4") for name, x in model.parameters.items()}
    cut = {k: (x.view("u4") & np.uint32(0xFFFF0000)).view("f4") for k, x in single.items()}
    model, other = (
        rc.Model(model.config, {name: x.astype(float) for name, x in of.items()})
        for of in (single, cut)
    )
    factors = rc.collect(model, corpus, FEW, "empirical")
    theirs = dump(rc.collect(other, corpus, FEW, "empirical"))
    verdict = rc.validate(theirs, factors, model=model, corpus=corpus, arithmetic="float64")
    (cause,) = verdict.causes
    assert cause.fault == "B57"
    assert cause.sentence.startswith("Weights cut to bfloat16, not rounded")


def test_workers_whose_average_is_a_sum() -> None:
    """A of four workers is four times ours; of gradients G may be sixteen times ours."""
    of = texts()
    theirs = {x: (4 * A, 4 * G, n) for x, (A, G, n) in some(of[2]).items()}
    assert named(theirs, of, layers=FEW) == {"B4"}
    theirs = {x: (A, 16 * G, n) for x, (A, G, n) in some(of[2]).items()}
    verdict = rc.validate(
        theirs, of[2], model=of[0], corpus=of[1], arithmetic="float64", layers=FEW
    )
    assert any("B46" in cause.alike for cause in verdict.causes)


@pytest.mark.parametrize("what", ["diagonal", "identity"])
def test_a_mean_over_all_axes(what: str) -> None:
    """One number in the place of a matrix, or its diagonal alone: no damping, and no drawing."""
    of = texts()
    theirs = {}
    for name, (A, G, n) in dump(of[2]).items():
        diagonal = G.diagonal() if what == "diagonal" else np.full(len(G), G.diagonal().mean())
        theirs[name] = (A, np.diag(diagonal), n)
    for given in ({"model": of[0], "corpus": of[1]}, {}):
        verdict = rc.validate(theirs, of[2], arithmetic="float64", **given)
        (cause,) = verdict.causes
        assert not verdict.passed and cause.sentence.count("only the diagonal is filled") == 1
        assert cause.fault is None and not cause.alike and len(cause.layers) == len(theirs)
