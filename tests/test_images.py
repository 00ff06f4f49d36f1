"""Images end to end: corpus, rows, factors, exact curvature, evaluation, bands, command line.

The second routes: loops over one image at a time, `oracles` (which imports only the law), the
complex step, and a convolution written out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import budgets
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Case,
    assert_within,
    case,
    config,
    few,
    image_cases,
    random_parameters,
    size_of,
)
from test_transformer import budget, complex_step_gradient

import refcurv as rc
from refcurv.cli import main
from refcurv.curvature import distance, exact
from refcurv.curvature.exact import problem
from refcurv.curvature.exact.fishers import Choice
from refcurv.evaluation import classify, decode
from refcurv.evaluation.bands import Quantity, band_weights, bands, rank_bounds
from refcurv.files import store
from refcurv.files.corpus import load_corpus, save_corpus
from refcurv.law import conventions, tolerance
from refcurv.law.checks import (
    ConventionError,
    DTypeError,
    EmptyError,
    NonFiniteError,
    RangeError,
    RefcurvError,
    SchemaError,
    ShapeError,
)
from refcurv.law.conventions import Fisher
from refcurv.model import transformer
from refcurv.model.config import Image, NormPlace, Pool, QKNorm
from refcurv.model.corpus import Corpus, ImagePopulation, Population
from refcurv.model.gradient import head_backward
from refcurv.model.transformer import Tap, image_layout
from refcurv.passes import parallel


def folded(image: Image, patch_NI: np.ndarray) -> np.ndarray:
    """The image (C, H, W) that the patches were cut from, put together square by square."""
    out = np.full((image.channels, image.height, image.width), np.nan)
    side, across = image.patch, image.width // image.patch
    for n, patch in enumerate(patch_NI):
        row, column = divmod(n, across)
        square = patch.reshape(image.channels, side, side)
        out[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = square
    return out


def with_images(one: Case) -> tuple[Case, np.ndarray]:
    """The case with patches that float32 holds exactly, and its images (B, C, H, W)."""
    one = replace(one, token=one.token.astype(np.float32).astype(np.float64))
    images = np.stack([folded(one.config.image, patch) for patch in one.token])
    return one, images.astype(np.float32)


labelled_images = image_cases().filter(lambda one: (one.label >= 0).any()).map(with_images)


def vit(seed: int = 0, images: int = 7, **changes: Any) -> tuple[Case, np.ndarray]:
    """A fixed ViT with everything: CLS, learned positions, biases, three patches in a column."""
    fields: dict[str, Any] = dict(
        causal=False,
        image=Image(channels=2, height=6, width=4, patch=2),
        pool=Pool.CLS,
        learned_positions=7,
        biases=("patch", "q", "v", "up", "down", "head"),
        norm_place=NormPlace.PRE,
        qk_norm=QKNorm.NONE,
        rope_theta=None,
        gated=False,
        activation="gelu",
        norm="layer",
        norm_bias=True,
    )
    made = config(**(fields | changes))
    rng = np.random.default_rng(seed)
    patch = rng.normal(size=(images, made.image.patches, made.image.patch_size))
    label = rng.integers(0, made.vocabulary, (images, 1))
    shape = (images, made.image.positions)
    one = Case(made, random_parameters(made, seed), patch, np.ones(shape, bool),
               np.zeros(shape, int), label)  # fmt: skip
    return with_images(one)


def model_of(one: Case, dtype: str = "float64") -> rc.Model:
    return rc.Model(one.config, {k: v.astype(dtype) for k, v in one.parameters.items()}, dtype)


def corpus_of(one: Case, images: np.ndarray) -> Corpus:
    return Corpus(images=images, labels=one.label[:, 0])


# ------------------------------------------------------------------ forward and backward


@given(labelled_images)
def test_logits_are_the_loops(both: tuple[Case, np.ndarray]) -> None:
    one, images = both
    got = rc.logits(model_of(one), images)
    assert got.shape == (len(images), one.config.vocabulary)
    for b, image in enumerate(images):
        want = oracles.logits(one.config, one.parameters, image)[0]
        scale = np.abs(one.parameters["head.weight"]).sum() * 10 + np.abs(want).max()
        assert_within(got[b], want, budget(one), scale, f"image {b}")


@few(8)  # test_transformer draws more of them
@given(labelled_images)
def test_loss_and_gradient_equal_the_complex_step(both: tuple[Case, np.ndarray]) -> None:
    one, images = both
    loss, gradient = rc.loss_and_gradient(model_of(one), images, one.label[:, 0])
    want = sum(
        oracles.loss(one.config, one.parameters, image, label)
        for image, label in zip(images, one.label, strict=True)
    )
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    largest = max(float(np.abs(scale[n] * one.parameters[n]).sum()) for n in scale)
    assert_within(loss, want, budget(one), max(largest, want), "loss")
    for name in one.parameters:
        truth = complex_step_gradient(one, name)
        assert_within(gradient[name], truth, budget(one), scale[name], name)


# ------------------------------------------------------------------ factors


def sent_back(logit_V: np.ndarray, label: int, fisher: str, seed: int, b: int) -> list[np.ndarray]:
    """What each backward pass of image b starts from: FISHER, and SAMPLING with t = 0."""
    V = len(logit_V)
    p = np.exp(logit_V - logit_V.max())
    p /= p.sum()
    S = np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p))
    if fisher == "expected":
        return [S[:, v] for v in range(V)]
    if fisher == "signed":
        return [S @ np.array(oracles.signs(seed, 0, b, 0, V))]
    if fisher == "sampled":
        label = oracles.draw_label(logit_V, oracles.uniform(seed, 0, b, 0))
    return [p - np.eye(V)[label]]


def naive_rows(
    one: Case, images: np.ndarray, fisher: str, seed: int, rows: str
) -> dict[str, tuple[list[np.ndarray], list[list[np.ndarray]]]]:
    """Layer → its rows a, and for each backward pass its rows g; one image at a time."""
    out: dict[str, tuple[list[np.ndarray], list[list[np.ndarray]]]] = {}
    made, P = one.config, one.parameters
    specials = len(made.image.specials)
    for b, image in enumerate(images):
        label = int(one.label[b, 0])
        if label < 0:
            continue
        seen: dict[tuple[str, int], np.ndarray] = {}
        oracles.logits(made, P, image, None, None, seen)  # the rows of A, by the oracle
        patch = np.array(oracles.patches(made.image, image.astype(np.float64)))[None]
        final, trace = transformer.forward(made, P, patch, image_layout(made, 1))
        y = transformer.linear_forward(made, P, "head", final)[0, 0]
        logit = transformer.capped(made, y)
        for c, d_logit in enumerate(sent_back(logit, label, fisher, seed, b)):
            d_y = transformer.uncapped(made, y, d_logit)
            taps = [Tap("head", final, d_y[None, None])]
            steps = transformer.backward(made, P, (d_y @ P["head.weight"])[None, None], trace)
            taps += [step for step in steps if isinstance(step, Tap)]
            for tap in taps:
                if tap.name in ("embed", "position"):
                    continue
                a_rows, g_rows = out.setdefault(tap.name, ([], []))
                first = specials if tap.name == "patch" else 0
                for t, g in enumerate(tap.g[0]):
                    if rows == "cls" and tap.name != "head" and first + t > 0:
                        continue
                    if c == 0:
                        a_rows.append(seen[tap.name, t])
                    while len(g_rows) <= c:
                        g_rows.append([])
                    g_rows[c].append(g)
    return out


def assert_naive(one: Case, images: np.ndarray, fisher: str, seed: int, rows: str) -> None:
    layers = [name for name in one.config.linear_layers() if rows != "cls" or name != "patch"]
    got = rc.collect(
        model_of(one), corpus_of(one, images), ",".join(layers), fisher, seed, rows=rows
    )
    want = naive_rows(one, images, fisher, seed, rows)
    assert list(got) == layers
    labelled = int((one.label >= 0).sum())
    draws = zip(*(want[name][1] for name in got), strict=True)
    tops = [max(size_of(np.array(g)) for g in each) for each in draws]
    for name in got:
        a, gs = np.array(want[name][0]), [np.array(g) for g in want[name][1]]
        n = len(a)
        per_image = {"head": 1, "patch": one.config.image.patches}
        expected = 1 if rows == "cls" else per_image.get(name, one.config.image.positions)
        assert got[name].n_A == got[name].n_G == n == labelled * expected
        allowed = 10 * budgets.path(one.config.layers, 64, np.float64)
        scale = np.abs(a).T @ np.abs(a)
        assert_within(got[name].sum_A, oracles.second_moment(a), allowed, scale, f"A {name}")
        sum_G = sum(oracles.second_moment(g) for g in gs)
        scale = n * sum(size_of(g) * top for g, top in zip(gs, tops, strict=True))
        assert_within(got[name].sum_G, sum_G, allowed, scale, f"G {name}")


@given(
    labelled_images,
    st.sampled_from(["empirical", "sampled", "signed", "expected"]),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["all", "cls"]),
)
def test_factors_equal_the_naive_sums(
    both: tuple[Case, np.ndarray], fisher: str, seed: int, rows: str
) -> None:
    if rows == "cls" and not both[0].config.image.specials:
        return
    assert_naive(*both, fisher, seed, rows)


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "expected"])
def test_naive_sums_across_shards(fisher: str, rows: str, monkeypatch) -> None:
    """Two images to a shard of 14 positions; one shard has no label, one image of another."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 20)
    one, images = vit()
    label = one.label.copy()
    label[[0, 2, 3]] = -1
    assert_naive(replace(one, label=label), images, fisher, 5, rows)


def same_bits(one: rc.Factors, two: rc.Factors) -> None:
    assert list(one) == list(two)
    for name, factor in one.items():
        assert factor.sum_A.tobytes() == two[name].sum_A.tobytes(), name
        assert factor.sum_G.tobytes() == two[name].sum_G.tobytes(), name
        assert (factor.n_A, factor.n_G) == (two[name].n_A, two[name].n_G)


def test_shards_in_flight_change_no_bit_and_all_is_the_default(monkeypatch) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 20)
    one, images = vit(images=12)
    model, corpus = model_of(one), corpus_of(one, images)
    first = rc.collect(model, corpus, "**", draws=2, in_flight=1)
    assert str(first.rows) == "reached"
    for in_flight in (2, 3):
        same_bits(first, rc.collect(model, corpus, "**", draws=2, in_flight=in_flight))
    same_bits(first, rc.collect(model, corpus, "**", draws=2, rows="all"))


def test_patches_are_widened_before_they_are_multiplied() -> None:
    """PRECISION: float32 images in a float64 model have float64 products."""
    one, images = vit()
    a = np.concatenate([np.array(oracles.patches(one.config.image, x)) for x in images])
    assert a.dtype == np.float32
    got = rc.collect(model_of(one), corpus_of(one, images), "patch")["patch"].sum_A
    wide = a.astype(np.float64)
    scale = np.abs(wide).T @ np.abs(wide)
    assert_within(got, wide.T @ wide, tolerance.gamma(len(a), np.float64), scale, "A patch")
    narrow = rc.collect(model_of(one, "float32"), corpus_of(one, images), "patch")["patch"].sum_A
    assert_within(narrow, wide.T @ wide, tolerance.gamma(len(a), np.float32), scale, "A patch")
    assert (narrow != got).any()


# ------------------------------------------------------------------ exact curvature


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize("fisher", list(Fisher))
def test_exact_and_collect_agree(fisher: str, rows: str) -> None:
    """A, G and K of a ViT by the complex-step route's Problem and by the passes."""
    one, images = vit(images=4)
    label = one.label.copy()
    label[1] = -1
    one = replace(one, label=label)
    made = problem(model_of(one), corpus_of(one, images), rows=rows)
    layers = [name for name in one.config.linear_layers() if rows == "all" or name != "patch"]
    got = rc.collect(model_of(one), corpus_of(one, images), ",".join(layers), fisher, 3, rows=rows)
    allowed = budget(one)
    for name in layers:
        want = exact.moments(made, wrt=f"{name}.weight", fisher=fisher, seed=3)
        assert got[name].n_A == want.rows
        assert_within(got[name].A, want.A, allowed, want.A, f"A {name}")
        # what softmax makes of nothing: key gradients cancel, their scale is the queries'
        size = np.linalg.norm(want.G) + np.linalg.norm(got["head"].G)
        assert_within(got[name].G, want.G, allowed, size, f"G {name}")
    K = exact.kfac(made, wrt="blocks.0.mlp.up.weight", fisher=fisher, seed=3)
    up = got["blocks.0.mlp.up"]
    assert_within(np.kron(up.sum_G, up.A), K, allowed, K, "K")
    three = distance._three(made, "blocks.0.mlp.up.weight", Choice(fisher, seed=3))[
        "blocks.0.mlp.up.weight"
    ]
    assert_within(three.K, K, allowed, K, "K of compare")


@given(labelled_images)
def test_exact_gradient_of_images(both: tuple[Case, np.ndarray]) -> None:
    one, images = both
    got = exact.gradient(model_of(one), images, one.label[:, 0], wrt="**")
    _, want = rc.loss_and_gradient(model_of(one), images, one.label[:, 0])
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    for name, array in got.items():
        assert_within(array, want[name], budget(one), scale[name], name)


# ------------------------------------------------------------------ O5


def test_O5_a_convolution_with_stride_of_its_kernel_is_a_linear_layer_on_patches() -> None:
    """Outputs, weight gradient, A and G of the convolution by loops over the image.

    A is KFC's Σ over images and places of the receptive field's outer product (Grosse & Martens
    2016, arXiv 1602.01407), G that of the place's output gradient.
    """
    one, images = vit(images=3)
    made, model = one.config, model_of(one)
    C, P, O = made.image.channels, made.image.patch, made.width
    W, bias = one.parameters["patch.weight"], one.parameters["patch.bias"]
    kernel = W.reshape(O, C, P, P)
    down, across = made.image.height // P, made.image.width // P
    y = np.zeros((len(images), O, down, across))
    for b, o, r, s in np.ndindex(y.shape):
        y[b, o, r, s] = bias[o]
        for c, i, j in np.ndindex(C, P, P):
            y[b, o, r, s] += kernel[o, c, i, j] * float(images[b, c, r * P + i, s * P + j])
    final, trace = transformer.forward(made, one.parameters, one.token, one.layout)
    mine = transformer.linear_forward(made, one.parameters, "patch", one.token)
    convolved = y.reshape(len(images), O, -1).swapaxes(1, 2)
    assert_within(mine, convolved, tolerance.gamma(C * P * P, np.float64), 10, "outputs")
    head = head_backward(made, one.parameters, final, one.label, one.label >= 0)
    loss = transformer.drain(head, lambda step: None)
    (tap,) = [
        step
        for step in transformer.backward(made, one.parameters, loss.d_final_BTD, trace)
        if isinstance(step, Tap) and step.name == "patch"
    ]
    d_y = tap.g.swapaxes(1, 2).reshape(y.shape)
    d_kernel = np.zeros(kernel.shape)
    A, G = np.zeros((C * P * P, C * P * P)), np.zeros((O, O))
    for b, r, s in np.ndindex(len(images), down, across):
        field = np.zeros((C, P, P))
        for c, i, j in np.ndindex(C, P, P):
            field[c, i, j] = images[b, c, r * P + i, s * P + j]
            for o in range(O):
                d_kernel[o, c, i, j] += d_y[b, o, r, s] * field[c, i, j]
        A += np.outer(field, field)
        G += np.outer(d_y[b, :, r, s], d_y[b, :, r, s])
    _, gradient = rc.loss_and_gradient(model, images, one.label[:, 0])
    scale = budgets.gradient_scale(made, one.parameters, *one.batch)["patch.weight"]
    assert_within(gradient["patch.weight"], d_kernel.reshape(O, -1), budget(one), scale, "dK")
    got = rc.collect(model, corpus_of(one, images), "patch", "empirical")["patch"]
    assert got.n_A == got.n_G == len(images) * down * across
    assert_within(got.sum_A, A, budget(one), np.abs(A), "A")
    assert_within(got.sum_G, G, budget(one), np.trace(G), "G")


# ------------------------------------------------------------------ rows


def test_rows_of_tokens_by_hand() -> None:
    """`all`: every real position, the last of each segment too; A is summed, g is 0 there."""
    one = case(batch=2, length=4)
    real = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.uint8)
    corpus = Corpus(one.token, mask=real)
    model = model_of(one)
    counts = {"reached": 5, "labelled": 5, "all": 7}
    got = {rows: rc.collect(model, corpus, "**", rows=rows) for rows in counts}
    for rows, n in counts.items():
        assert {f.n_A for f in got[rows].values()} == {n}
    for name, whole in got["all"].items():
        part = got["reached"][name]
        assert np.linalg.norm(whole.sum_G - part.sum_G) <= 1e-14 * np.trace(part.sum_G), name
        assert np.trace(whole.sum_A - part.sum_A) > 1e-3 * np.trace(part.sum_A), name
    expected = [
        rc.collect(model, Corpus(one.token, [[1, 2, -1, -1], [-1, -1, -1, -1]]), "head",
                   "expected", rows=rows)["head"]
        for rows in ("reached", "all")
    ]  # fmt: skip
    assert [f.n_A for f in expected] == [f.n_G for f in expected] == [2, 8]


def test_rows_of_tokens_all_without_a_label_in_a_shard(monkeypatch) -> None:
    """Its rows count, for A and for G, whatever Fisher: none is lost with `expected`."""
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 4)
    one = case(batch=2, length=4)
    corpus = Corpus(one.token, [[1, 2, -1, -1], [-1, -1, -1, -1]])
    for fisher in ("empirical", "expected"):
        got = rc.collect(model_of(one), corpus, "blocks.0.mlp.up", fisher, rows="all")
        assert [(f.n_A, f.n_G) for f in got.values()] == [(8, 8)]


def refused(error: type[RefcurvError], fragment: str, work: Any) -> None:
    with pytest.raises(error, match=fragment) as caught:
        work()
    assert "\n" not in str(caught.value)


def test_rows_that_are_refused() -> None:
    one, images = vit()
    model, corpus = model_of(one), corpus_of(one, images)
    refused(ConventionError, "no position of an image has a label. Take rows='all'",
            lambda: rc.collect(model, corpus, rows="labelled"))  # fmt: skip
    refused(ConventionError, "rows must be one of .*cls",
            lambda: rc.collect(model, corpus, rows="first"))  # fmt: skip
    refused(EmptyError, "'patch' has no row among rows='cls'. Take rows='all'",
            lambda: rc.collect(model, corpus, "patch", rows="cls"))  # fmt: skip
    refused(EmptyError, "'patch' has no row",
            lambda: rc.collect(model, corpus, "**", rows="cls"))  # fmt: skip
    refused(ConventionError, "rows='cls' is for images",
            lambda: rc.collect(model_of(case()), Corpus(case().token), rows="cls"))  # fmt: skip
    image = replace(one.config.image, specials=())
    bare, images = vit(image=image, pool=Pool.MEAN, learned_positions=0)
    refused(ConventionError, "have no CLS. Take rows='all'",
            lambda: rc.collect(model_of(bare), corpus_of(bare, images), rows="cls"))  # fmt: skip
    refused(ConventionError, "exact: the model's images have no CLS",
            lambda: problem(model_of(bare), images, bare.label[:, 0], rows="cls"))  # fmt: skip


# ------------------------------------------------------------------ what does not fit


def test_what_does_not_fit_the_model() -> None:
    one, images = vit()
    model, label = model_of(one), one.label[:, 0]
    tokens = case()
    small = images[..., :2]
    refused(ConventionError, "the corpus has tokens, but the model reads images",
            lambda: rc.collect(model, Corpus(tokens.token)))  # fmt: skip
    refused(ConventionError, "the corpus has images, but the model reads tokens",
            lambda: rc.collect(model_of(tokens), corpus_of(one, images)))  # fmt: skip
    for work in (
        lambda: rc.collect(model, Corpus(images=small, labels=label)),
        lambda: rc.logits(model, small),
        lambda: rc.loss_and_gradient(model, small, label),
        lambda: problem(model, small, label),
    ):
        refused(ShapeError, r"= \(2, 6, 4\); got \(2, 6, 2\)", work)
    refused(RangeError, r"labels \[0, 0\] is 7, outside the model's",
            lambda: rc.collect(model, Corpus(images=images, labels=np.full(7, 7))))  # fmt: skip
    refused(RangeError, "labels .* is 7", lambda: problem(model, images, np.full(7, 7)))
    refused(EmptyError, "none of the corpus's 7 labels is >= 0",
            lambda: rc.collect(model, Corpus(images=images, labels=np.full(7, -1))))  # fmt: skip
    refused(EmptyError, "none of the 7 labels", lambda: problem(model, images, np.full(7, -1)))
    for work in (lambda: rc.loss_and_gradient(model, images), lambda: problem(model, images)):
        refused(ConventionError, "images have no default labels", work)
    refused(ConventionError, "exact: the corpus has tokens, but the model reads images",
            lambda: problem(model, Corpus(tokens.token)))  # fmt: skip
    refused(ShapeError, "images must be", lambda: rc.logits(model, tokens.token))
    refused(ShapeError, "images must be", lambda: problem(model, tokens.token, label))
    refused(DTypeError, "tokens must hold", lambda: rc.logits(model_of(tokens), images))
    refused(ShapeError, "tokens must be",
            lambda: rc.logits(model_of(tokens), np.zeros(images.shape, int)))  # fmt: skip
    refused(NonFiniteError, "holds nan at", lambda: rc.logits(model, images * np.float32(np.nan)))


def test_bidirectional_models_of_tokens_need_labels_of_their_own() -> None:
    one = case(causal=False)
    model, own = model_of(one), np.where(one.token % 2 == 0, one.token, -1)
    for work in (
        lambda: rc.collect(model, Corpus(one.token)),
        lambda: rc.loss_and_gradient(model, one.token),
        lambda: problem(model, one.token),
    ):
        refused(ConventionError, "a bidirectional model sees the next token", work)
    loss, gradient = rc.loss_and_gradient(model, one.token, own)
    want = sum(
        oracles.loss(one.config, one.parameters, *pair) for pair in zip(one.token, own, strict=True)
    )
    assert loss == pytest.approx(want, rel=1e-12)
    assert rc.collect(model, Corpus(one.token, own))["blocks.0.mlp.up"].n_A == one.token.size
    exactly = exact.gradient(model, one.token, own, wrt="head.weight")
    one_way, other = exactly["head.weight"], gradient["head.weight"]
    assert_within(one_way, other, budgets.path(2, 8, np.float64), one_way, "head")
    lengths = np.full(2, 6)
    text = Population(one.token, lengths - 3, lengths, "text", "test")
    refused(ConventionError, "population 'p' asks for next tokens, which a bidirectional model",
            lambda: rc.evaluate(model, Corpus(one.token, populations={"p": text})))  # fmt: skip


def test_items_of_images_are_refused_before_the_work(tmp_path: Path, capsys: Any) -> None:
    one, images = vit()
    w, c, out = (str(tmp_path / name) for name in ("w.h5", "c.h5", "i.jsonl"))
    rc.save(model_of(one), w)
    seen = ImagePopulation(images, one.label[:, 0], "test")
    rc.save_corpus(replace(corpus_of(one, images), populations={"seen": seen}), c)
    assert main(["evaluate", w, c, "--items", out]) == 2
    told = capsys.readouterr()
    assert "--items are of tokens, and split 'test' has images alone" in told.err and not told.out


def test_sequences_longer_than_the_learned_positions() -> None:
    one = case(learned_positions=4)
    model, lengths = model_of(one), np.full(2, 6)
    said = "6 positions, but the model has learned 4"
    label = np.roll(one.token, 1, axis=1)
    refused(RangeError, said, lambda: rc.collect(model, Corpus(one.token, label)))
    refused(RangeError, said, lambda: rc.logits(model, one.token))
    refused(RangeError, said, lambda: rc.loss_and_gradient(model, one.token))
    refused(RangeError, said, lambda: exact.gradient(model, one.token, wrt="head.weight"))
    text = Population(one.token, lengths - 3, lengths, "text", "test")
    refused(RangeError, f"evaluate: population 'p': {said}",
            lambda: rc.evaluate(model, Corpus(one.token, populations={"p": text})))  # fmt: skip
    recite = Population(one.token, lengths - 3, lengths, "recite", "test")
    refused(RangeError, "population 'p': 5 positions, but the model has learned 4",
            lambda: rc.evaluate(model, Corpus(one.token, populations={"p": recite})))  # fmt: skip
    refused(RangeError, "5 positions, but the model has learned 4",
            lambda: decode.greedy(model, one.token[:, :3], 3))  # fmt: skip
    fits = Population(one.token[:, :5], lengths - 3, lengths - 1, "recite", "test")
    found = rc.evaluate(model, Corpus(one.token, populations={"p": fits}))
    assert found["p"].items == 2


# ------------------------------------------------------------------ records and files

PIXELS = np.arange(2 * 1 * 2 * 2).reshape(2, 1, 2, 2).astype(np.float32)
LABELS = np.array([1, -1], np.int32)


def test_images_are_taken_where_float32_holds_them_exactly() -> None:
    for dtype in (np.uint8, np.int16, np.float16, np.float32, np.float64, ">f4"):
        corpus = Corpus(images=PIXELS.astype(dtype), labels=LABELS)
        assert corpus.images.dtype == np.float32 and corpus.images.dtype.isnative
        assert corpus.images.tobytes() == PIXELS.tobytes()
    assert corpus.label.tolist() == [[1], [-1]] and corpus.label.dtype == np.int64
    mine = PIXELS.copy()
    corpus = Corpus(images=mine, labels=LABELS)
    mine[0] = 9  # the caller's array is his own
    assert corpus.images[0, 0, 0, 0] == 0 and mine.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        corpus.images[0] = 1
    turned = Corpus(images=PIXELS[:, :, ::-1].swapaxes(2, 3), labels=LABELS)
    assert turned.images.flags.c_contiguous and turned.images[0, 0].tolist() == [[2, 0], [3, 1]]


BAD_RECORDS: dict[str, tuple[dict[str, Any], type[RefcurvError], str]] = {
    "rounded": ({"images": PIXELS + np.float64(0.1)}, DTypeError, r"0\.1 at \[0, 0, 0, 0\] is not"),
    "too large": ({"images": PIXELS.astype(float) + 1e300}, DTypeError, "exactly so; 1e"),
    "int32": ({"images": PIXELS.astype(np.int32)}, DTypeError, "exactly so; got int32"),
    "complex": ({"images": PIXELS * 1j}, DTypeError, "exactly so; got complex"),
    "text": ({"images": PIXELS.astype(str)}, DTypeError, "exactly so; got <U"),
    "three axes": ({"images": PIXELS[0]}, ShapeError, r"images must be .* = \(N, C, H, W\)"),
    "ragged": ({"images": [[1], [2, 3]]}, ShapeError, "images must be"),
    "no pixel": ({"images": PIXELS[:, :, :0]}, EmptyError, "images hold no pixel"),
    "NaN": ({"images": PIXELS * np.float32(np.nan)}, NonFiniteError, "holds nan at"),
    "no images": ({"images": PIXELS[:0], "labels": LABELS[:0]}, EmptyError, "there is no image"),
    "no labels": ({"labels": None}, ConventionError, "images need labels, one each"),
    "few labels": ({"labels": [1]}, ShapeError, r"labels must be \(2\)"),
    "labels (N, 1)": ({"labels": LABELS[:, None]}, ShapeError, r"labels must be \(2\)"),
    "float labels": ({"labels": LABELS * 1.0}, DTypeError, "labels must hold integers"),
    "tokens too": ({"tokens": [[1]]}, ConventionError, "tokens or images; got both"),
    "nothing": ({"images": None, "labels": None}, ConventionError, "images; got neither"),
    "mask": ({"mask": [[1], [1]]}, ConventionError, "mask is for tokens"),
    "segments": ({"segments": [[1], [1]]}, ConventionError, "segments is for tokens"),
    "population of tokens": (
        {"populations": {"p": Population([[1, 2]], [1], [2], "recite", "dev")}},
        ConventionError, "population 'p' has tokens, the corpus images"),
    "population of another size": (
        {"populations": {"p": ImagePopulation(PIXELS[..., :1], [1, 1], "dev")}},
        ShapeError, r"images of population 'p' .* \(1, 2, 1\), the corpus's \(1, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_corpus_of_images_against_the_law(name: str) -> None:
    changed, error, fragment = BAD_RECORDS[name]
    refused(error, fragment, lambda: Corpus(**{"images": PIXELS, "labels": LABELS, **changed}))


def test_populations_of_images_against_the_law() -> None:
    refused(RangeError, r"labels \[1\] is -1; an image to be judged has a label",
            lambda: ImagePopulation(PIXELS, LABELS, "dev"))  # fmt: skip
    refused(ConventionError, "split must", lambda: ImagePopulation(PIXELS, [1, 1], "train"))
    refused(RangeError, "chance", lambda: ImagePopulation(PIXELS, [1, 1], "dev", 2))
    refused(EmptyError, "no image", lambda: ImagePopulation(PIXELS[:0], LABELS[:0], "dev"))
    refused(ConventionError, "images need labels", lambda: ImagePopulation(PIXELS, None, "dev"))
    refused(ConventionError, "population 'p' has images, the corpus tokens", lambda: Corpus(
        [[1, 2]], populations={"p": ImagePopulation(PIXELS, [1, 1], "dev")}))  # fmt: skip


def full() -> Corpus:
    populations = {
        "memorised": ImagePopulation(PIXELS, [1, 0], "test", 0.5),
        "true": ImagePopulation(PIXELS + 1, [0, 0], "dev"),
    }
    return Corpus(images=PIXELS, labels=LABELS, populations=populations)


@pytest.mark.parametrize(
    "corpus",
    [full(), Corpus(images=PIXELS, labels=LABELS),
     Corpus(images=PIXELS[:0], labels=LABELS[:0], populations=full().populations)],
    ids=["full", "images", "populations"],
)  # fmt: skip
def test_round_trip(tmp_path: Path, corpus: Corpus) -> None:
    save_corpus(corpus, tmp_path / "c.h5")
    back = load_corpus(tmp_path / "c.h5")
    assert back.tokens is None and back.images.dtype == np.float32
    assert back.images.tobytes() == corpus.images.tobytes()
    assert back.labels.tolist() == corpus.labels.tolist()
    assert list(back.populations) == list(corpus.populations)
    for one, two in zip(back.populations.values(), corpus.populations.values(), strict=True):
        assert (one.kind, one.split, one.chance) == ("label", two.split, two.chance)
        assert one.images.tobytes() == two.images.tobytes()
        assert one.labels.tolist() == two.labels.tolist()
    save_corpus(back, tmp_path / "again.h5")
    entries = [store.open_file(tmp_path / f"{name}.h5").entries for name in ("c", "again")]
    assert entries[0] == entries[1]
    assert {name.rpartition(".")[2]: info.stored for name, info in entries[0].items()} == {
        "images": "float32", "labels": "int32"
    }  # fmt: skip


JUDGED = {"kind": "label", "split": "dev", "chance": 0.0}
ONES = np.ones(2, np.int32)


def entries(**changed: Any) -> list[store.Entry]:
    made = {
        "images": (PIXELS, {}),
        "labels": (LABELS, {}),
        "populations.p.images": (PIXELS, JUDGED),
        "populations.p.labels": (ONES, {}),
    }
    made |= {name.replace("__", "."): value for name, value in changed.items()}
    return [store.Entry(n, v[0], v[1]) for n, v in made.items() if v is not None]


TOKEN = np.ones((2, 3), np.int32)
BAD_FILES = {
    "float64": (entries(images=(PIXELS.astype(float), {})), "must be float32; got float64"),
    "bfloat16": (entries(images=(PIXELS.astype(np.uint16), {"encoding": "bfloat16"})),
                 "must be float32; got bfloat16"),
    "int64 labels": (entries(labels=(LABELS.astype(np.int64), {})), "'labels' must be int32"),
    "rank": (entries(images=(PIXELS[0], {})), r"images must be .*\(N, C, H, W\)"),
    "NaN": (entries(images=(PIXELS * np.float32(np.nan), {})), "images holds nan|not finite"),
    "tokens too": (entries(tokens=(TOKEN, {})), "tokens or images; got both"),
    "mask": (entries(mask=(TOKEN.astype(np.uint8), {})), "mask is for tokens"),
    "no labels": (entries(labels=None), "lacks 'labels'"),
    "few labels": (entries(labels=(LABELS[:1], {})), r"labels must be \(2\)"),
    "neither": (entries(images=None), "lacks 'tokens' or 'images'"),
    "population lacks labels": (entries(populations__p__labels=None),
                                r"lacks 'populations\.p\.labels'"),
    "population of both": (entries(populations__p__tokens=(TOKEN, {})),
                           r"holds 'populations\.p\.tokens'"),
    "negative label": (entries(populations__p__labels=(-ONES, {})), r"'p': .*labels \[0\] is -1"),
    "another size": (entries(populations__p__images=(PIXELS[..., :1], JUDGED)),
                     r"population 'p' are .*\(1, 2, 1\)"),
    "another kind": (entries(populations__p__images=(PIXELS, {**JUDGED, "kind": "answer"})),
                     "'p': .*kind must be one of label"),
    "no chance": (entries(populations__p__images=(PIXELS, {"kind": "label"})), "attributes kind"),
    "population of tokens": (
        [*entries(), store.Entry("populations.q.tokens", TOKEN, {**JUDGED, "kind": "text"}),
         store.Entry("populations.q.prompt_length", ONES),
         store.Entry("populations.q.length", ONES)],
        "population 'q' has tokens, the corpus images"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    made, fragment = BAD_FILES[name]
    path = tmp_path / "c.h5"
    store.write(path, format="refcurv-corpus", attributes={}, arrays=made, provenance={})
    with pytest.raises(SchemaError, match=fragment) as caught:
        load_corpus(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# ------------------------------------------------------------------ evaluation


def judged(
    one: Case, images: np.ndarray, wrong: int = 3
) -> tuple[Corpus, dict[str, list[int]], rc.Model]:
    """Noised images with the labels that the model gives them, but for `wrong` of them."""
    model = model_of(one)
    said = [int(np.argmax(oracles.logits(one.config, one.parameters, x)[0])) for x in images]
    noised = [(v + (n < wrong)) % one.config.vocabulary for n, v in enumerate(said)]
    label = {"memorised": noised, "true": said, "validation": [0] * len(said)}
    populations = {name: ImagePopulation(images, v, "test", 1 / 7) for name, v in label.items()}
    return Corpus(images=images, labels=noised, populations=populations), label, model


def test_evaluation_is_argmax_one_image_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 20)  # two images a batch
    one, images = vit(images=9)
    corpus, label, model = judged(one, images)
    other, _ = vit(seed=3, images=9)
    edited = model_of(other)
    seen: list[tuple[int, int]] = []
    table = rc.evaluate(edited, corpus, baseline=model, progress=lambda *at: seen.append(at))
    assert seen[-1] == (30, 30)
    for name, wanted in label.items():
        row = table[name]
        right = {}
        for which, of in (("before", one), ("after", other)):
            said = [np.argmax(oracles.logits(of.config, of.parameters, x)[0]) for x in images]
            right[which] = sum(int(a == b) for a, b in zip(said, wanted, strict=True)) / 9
        assert (row.kind, row.items, row.tokens, row.chance) == ("label", 9, 0, 1 / 7)
        assert row.before == {"accuracy": right["before"]}
        assert row.after == {"accuracy": right["after"]}
        if right["before"]:
            assert row.retention == right["after"] / right["before"]
        if right["before"] > 1 / 7:
            above = (right["after"] - 1 / 7) / (right["before"] - 1 / 7)
            assert row.retention_above_chance == pytest.approx(above, rel=1e-15)
    assert table["memorised"].before == {"accuracy": 6 / 9}
    assert table["true"].before == {"accuracy": 1.0}
    assert table["true"].after["accuracy"] < 1
    plain = json.loads(json.dumps(table.to_json()))
    assert plain["rows"][0]["kind"] == "label"


def test_classes_know_no_threads_and_ties_go_to_the_lowest(monkeypatch) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 20)
    one, images = vit(images=9)
    population = ImagePopulation(images, [0] * 9, "test")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(parallel, "cores", lambda n=threads: n)
        found.append(classify.classify(one.config, one.parameters, population))
    assert found[0].tolist() == found[1].tolist() and len(set(found[0].tolist())) > 1
    flat = one.parameters | {"head.weight": one.parameters["head.weight"] * 0}
    bias = np.array([0, 2, 1, 2, 2, 0, 0.0])
    got = classify.classify(one.config, flat | {"head.bias": bias}, population)
    assert got.tolist() == [1] * 9
    broken = one.parameters | {"head.bias": bias * np.nan}
    refused(NonFiniteError, "evaluate: the logits holds nan",
            lambda: classify.classify(one.config, broken, population))  # fmt: skip


def test_populations_that_the_model_cannot_be_judged_on() -> None:
    one, images = vit()
    model = model_of(one)
    tokens = case()
    lengths = np.full(2, 6)
    text = Population(tokens.token, lengths - 3, lengths, "text", "test")
    refused(ConventionError, "population 'p' has tokens, but the model reads images",
            lambda: rc.evaluate(model, Corpus(tokens.token, populations={"p": text})))  # fmt: skip
    some = ImagePopulation(images, [0] * 7, "test")
    corpus = Corpus(images=images, labels=one.label[:, 0], populations={"p": some})
    refused(ConventionError, "population 'p' has images, but the model reads tokens",
            lambda: rc.evaluate(model_of(tokens), corpus))  # fmt: skip
    alien = ImagePopulation(images, [7] * 7, "test")
    corpus = Corpus(images=images, labels=one.label[:, 0], populations={"p": alien})
    refused(RangeError, r"labels of population 'p' \[0\] is 7",
            lambda: rc.evaluate(model, corpus))  # fmt: skip
    small = ImagePopulation(images[..., :2], [1] * 7, "test")
    corpus = Corpus(images=images[..., :2], labels=one.label[:, 0], populations={"p": small})
    refused(ShapeError, r"population 'p': .*\(2, 6, 4\); got \(2, 6, 2\)",
            lambda: rc.evaluate(model, corpus))  # fmt: skip
    factors = rc.collect(model_of(tokens), Corpus(tokens.token))
    refused(ConventionError, "bands: rows='cls' is for images", lambda: bands(
        model_of(tokens), rc.decompose(factors), text, text, rows="cls"))  # fmt: skip
    refused(ConventionError, "bands: rows='all' is not for tokens", lambda: bands(
        model_of(tokens), rc.decompose(factors), text, text, rows="all"))  # fmt: skip


# ------------------------------------------------------------------ bands


def inputs_by_definition(one: Case, images: np.ndarray, rows: str) -> dict[str, np.ndarray]:
    """Layer → the inputs that count, by the oracle's own record."""
    out: dict[str, list[np.ndarray]] = {}
    for image in images:
        seen: dict[tuple[str, int], np.ndarray] = {}
        oracles.logits(one.config, one.parameters, image, None, None, seen)
        for (name, t), a in seen.items():
            if rows == "all" or t == 0:
                out.setdefault(name, []).append(a)
    return {name: np.array(x) for name, x in out.items()}


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize("quantity", list(Quantity))
def test_bands_are_the_definition(quantity: Quantity, rows: str, monkeypatch) -> None:
    monkeypatch.setattr(conventions, "SHARD_TOKENS", 20)
    one, images = vit(images=7)
    model = model_of(one)
    basis = rc.decompose(rc.collect(model, corpus_of(one, images), "**"))
    hot = ImagePopulation(images[:4], one.label[:4, 0], "test")
    cold = ImagePopulation(images[4:], one.label[4:, 0], "test")
    layers = ["blocks.0.attn.q", "blocks.1.mlp.up", "blocks.1.mlp.down", "head"]
    layers += ["patch"] if rows == "all" else []
    found = bands(model, basis, hot, cold, layers=",".join(layers), quantity=quantity, rows=rows)
    assert set(found) == set(layers)
    for name, got in found.items():
        W, B = one.parameters[f"{name}.weight"], basis[name]
        if quantity is Quantity.PAIR_MASS:
            maps = band_weights(W, B)
        else:
            bound = rank_bounds(W.shape[1])
            maps = [B.U_A[:, a:b].T for a, b in pairwise(bound)]
        assert got.aligned
        for part, values in ((images[:4], got.memorised), (images[4:], got.clean)):
            x = inputs_by_definition(one, part, rows)[name]
            want = [np.mean([np.linalg.norm(M @ v) for v in x]) for M in maps]
            scale = np.abs(W).sum() * np.abs(x).max() + np.abs(x).sum()
            assert_within(values, want, budget(one), scale, name)
    if rows == "cls":
        refused(ConventionError, "'patch' has no row among rows='cls'",
                lambda: bands(model, basis, hot, cold, rows="cls"))  # fmt: skip


# ------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Iterator[Path]:
    """w.h5 and c.h5 of a tiny ViT with noised labels."""
    folder = tmp_path_factory.mktemp("images")
    one, images = vit(images=9)
    corpus, _, _ = judged(one, images)
    rc.save(model_of(one, "float32"), folder / "w.h5")
    save_corpus(corpus, folder / "c.h5")
    yield folder


def test_the_command_line_from_images_to_the_table(files: Path, tmp_path: Path, capsys) -> None:
    w, c = str(files / "w.h5"), str(files / "c.h5")
    f, b, e, table = (str(tmp_path / name) for name in ("f.h5", "b.h5", "e.h5", "t.json"))
    layers = ["--layers", "blocks.*.mlp.*,patch,head"]
    assert main(["collect", w, c, "-o", f, *layers, "--rows", "all"]) == 0
    assert "63 rows (patch 54, head 9)" in capsys.readouterr().out
    assert main(["decompose", f, "-o", b]) == 0
    assert main(["edit", w, b, "-o", e, "--rho", "blocks.*.mlp.up=0.3"]) == 0
    capsys.readouterr()
    assert main(["evaluate", e, c, "--baseline", w, "--json", table]) == 0
    said = capsys.readouterr().out
    assert "memorised" in said and "accuracy" in said and "66.7 %" in said
    rows = json.loads(Path(table).read_text())["rows"]
    assert [row["name"] for row in rows] == ["memorised", "true", "validation"]
    edited = rc.load(e)
    label = load_corpus(c).populations["true"].labels
    images = load_corpus(c).populations["true"].images
    right = np.mean([np.argmax(rc.logits(edited, x[None])[0]) == v
                     for x, v in zip(images, label, strict=True)])  # fmt: skip
    assert rows[1]["after"]["accuracy"] == right
    assert main(["inspect", c]) == 0
    assert "populations.memorised.images" in capsys.readouterr().out


BAD_COMMANDS = {
    "tokens for images": (["collect", "{w}", "{t}"], "the corpus has tokens, but the model reads"),
    "cls of patches": (["collect", "{w}", "{c}", "--layers", "patch", "--rows", "cls"], "'patch'"),
    "labelled": (["collect", "{w}", "{c}", "--rows", "labelled"], "Take rows='all'"),
    "evaluate": (["evaluate", "{w}", "{t}"], "population 'p' has tokens"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_commands_are_one_line(files: Path, tmp_path: Path, capsys, name: str) -> None:
    text = Population([[1, 2, 3]], [1], [3], "text", "test")
    save_corpus(Corpus([[1, 2, 3]], populations={"p": text}), tmp_path / "t.h5")
    paths = {"w": files / "w.h5", "c": files / "c.h5", "t": tmp_path / "t.h5"}
    command, fragment = BAD_COMMANDS[name]
    output = ["-o", str(tmp_path / "out.h5")] if command[0] == "collect" else []
    assert main([*(word.format(**paths) for word in command), *output]) == 2
    said = capsys.readouterr().err
    assert fragment in said and said.count("\n") == 1
    assert not (tmp_path / "out.h5").exists()
