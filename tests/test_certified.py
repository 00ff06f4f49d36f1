"""`certify`: every enclosure holds what loops of eighty digits give; what is false is caught."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import budgets
import digits
import mpmath
import numpy as np
import oracles
import pytest
from digits import lies_inside, middle
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Case,
    assert_within,
    case,
    cases,
    config,
    few,
    image_cases,
    random_parameters,
    scaled,
)  # fmt: skip

import refcurv as rc
from refcurv.algebra.balls import Balls, UndecidedError, bits, exact
from refcurv.algebra.shaken import SHAKE
from refcurv.certified import attempt
from refcurv.certified import certify as driver
from refcurv.certified import layers as functions
from refcurv.certified.budgets import ELEMENTARY, RUNS, Shaking
from refcurv.certified.certificate import (
    Certificate,
    Enclosed,
    Route,
    enclosed,
    farthest,
    outside,
    sizes,
)
from refcurv.certified.certify import certify
from refcurv.certified.numbers import OF
from refcurv.certified.planning import Plan
from refcurv.cli import main
from refcurv.curvature import definition
from refcurv.files.huggingface import read_config
from refcurv.law.checks import EmptyError, NonFiniteError, RefcurvError
from refcurv.law.conventions import Rows
from refcurv.law.tolerance import probable
from refcurv.model import transformer
from refcurv.model.config import Image, RopeScaling
from refcurv.model.gradient import loss_and_gradient
from refcurv.model.layers import Ops, rope_tables
from refcurv.report.certificate import format_certificate

PRECISION = mpmath.workdps(80)


def ops() -> Ops:
    """The layer functions as they stand in the module now: planted ones too."""
    names = ("rms_norm_forward", "rms_norm_backward", "centre", "rotate", "attention_forward",
             "attention_backward", "mlp_forward", "mlp_backward", "rope_tables", "soft_cap", "clip",
             "cross_entropy", "root_product")  # fmt: skip
    return Ops(*(getattr(functions, name) for name in names))


def in_balls(one: Case) -> dict[str, Any]:
    return {name: exact(x) for name, x in one.parameters.items()}


def inputs_of(one: Case) -> Any:
    return one.token if one.config.image is None else exact(one.token)


def model_and_corpus(one: Case) -> tuple[rc.Model, rc.Corpus]:
    corpus = rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)
    return rc.Model(one.config, one.parameters), corpus


def many_digits(x: Enclosed, index: tuple[int, ...]) -> Any:
    return sum(mpmath.mpf(float(part)) for part in x.parts[(slice(None), *index)])


def misses(x: Balls, truth: Any, slack: float = 1e-70) -> bool:
    """Is an entry's true value outside its ball? slack, relative, of the other route."""
    made = enclosed(x, 70)
    for index in np.ndindex(made.shape):
        far = abs(many_digits(made, index) - truth[index].x)
        if far > float(made.radius[index]) + slack * (1 + abs(truth[index].x)):
            return True
    return False


# ------------------------------------------------------------------ against loops of many digits


def widened(one: Case, name: str | None, radius: float = 1e-9) -> dict[str, Any]:
    """Exact parameters, but balls for one of them, about numbers half a radius away from it."""
    if name is None:
        return in_balls(one)
    third = exact(np.array(1)) / 3
    unsure = (third * 3 - 1) / float(third.radii() * 3) * radius  # about 0 ± radius
    x = one.parameters[name]
    off = np.random.default_rng(0).choice([-0.5, 0.5], x.shape)
    return {**in_balls(one), name: exact(x + radius * off) + unsure}


def forward_misses(one: Case, precision: int, wide: str | None = None) -> bool:
    """Does any logit, or any sequence's nats, of the loops lie outside the balls?

    wide: a parameter that the balls know up to 1e-9 alone. What comes out must then hold what the
    loops give of the parameter inside.
    """
    made = ops()
    with PRECISION, bits(precision):
        theta = widened(one, wide)
        final, _ = transformer.forward(one.config, theta, inputs_of(one), one.layout, made)
        z = transformer.head_logits(one.config, theta, final, made)
        plain = {name: digits.of(x) for name, x in one.parameters.items()}
        for b, real in enumerate(one.real):
            n = int(real.sum())
            row = one.token[b, :n], list(one.segment[b, :n])
            if misses(z[b, :n], oracles.logits(one.config, plain, *row)):
                return True
            nats, _ = made.cross_entropy(z[b, :n], one.label[b, :n])
            want = oracles.loss(one.config, plain, row[0], list(one.label[b, :n]), row[1])
            if misses(nats.sum(), np.array(digits.Digits(want))):
                return True
    return False


@few(12)
@given(cases(), st.sampled_from([60, 200]), st.integers(0, 99))
def test_logits_and_nats_of_the_loops_lie_in_the_balls(
    one: Case, precision: int, number: int
) -> None:
    assert not forward_misses(one, precision)
    if one.config.activation != "relu" and one.config.qkv_clip is None:  # no decision is needed
        names = list(one.parameters)
        assert not forward_misses(one, precision, names[number % len(names)])


def difference(one: Case, name: str, index: tuple[int, ...]) -> Any:
    """∂ nats / ∂ one entry, by central differences of the loops, whose error is h⁴."""
    h = mpmath.mpf(10) ** -15

    def at(step: Any) -> Any:
        moved = {key: digits.of(x) for key, x in one.parameters.items()}
        moved[name][index] = moved[name][index] + digits.Digits(step)
        out = digits.Digits(0)
        for b, real in enumerate(one.real):
            n = int(real.sum())
            args = one.token[b, :n], list(one.label[b, :n]), list(one.segment[b, :n])
            out = out + oracles.loss(one.config, moved, *args)
        return out.x

    near, far = at(h) - at(-h), at(2 * h) - at(-2 * h)
    return (8 * near - far) / (12 * h)


def gradient_misses(one: Case, precision: int, entries: int = 1, wide: str | None = None) -> bool:
    """Does the derivative by any of so many entries of each parameter lie outside its ball?"""
    rng = np.random.default_rng(0)
    with PRECISION, bits(precision):
        _, g = loss_and_gradient(
            one.config, widened(one, wide), inputs_of(one), one.label, one.layout, ops()
        )
        for name in rng.permutation(list(one.parameters)):
            for _ in range(entries):
                index = tuple(int(rng.integers(n)) for n in one.parameters[name].shape)
                want = np.array(digits.Digits(difference(one, name, index)))
                if misses(g[name][index], want, 1e-45):
                    return True
    return False


TWINS: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "gpt2": dict(norm="layer", norm_bias=True, gated=False, rope_theta=None, learned_positions=6,
                 activation="gelu_tanh", biases=("q", "k", "v", "o", "up", "down")),
    "gemma": dict(norm_place="both", norm_offset=True, logit_cap=2.0, score_cap=1.5,
                  embed_scale=2.5, windows=(2,), activation="gelu_tanh", tied=True,
                  score_scale=0.4),
    "parallel": dict(residual="parallel", norm="layer", gated=False, activation="gelu",
                     norm_place="pre", qk_norm="head"),
    "clipped": dict(qkv_clip=0.5, norm="layer", norm_gain=False, norm_place="pre",
                    activation="relu"),
}  # fmt: skip
"""One model for each way of the families' layer functions."""


@pytest.mark.parametrize("name", TWINS)
def test_gradients_of_the_loops_lie_in_the_balls(name: str) -> None:
    one = case(seed=1, batch=1, length=3, layers=1, width=4, heads=2, kv_heads=1, mlp_width=3,
               **TWINS[name])  # fmt: skip
    assert not gradient_misses(one, 200)


SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": dict(kind="linear", factor=4.0, attention=1.2),
    "llama3": dict(kind="llama3", factor=4.0, original=40, slow=1.0, fast=4.0),
    "llama3 of short waves": dict(kind="llama3", factor=8.0, original=4000, slow=1.0, fast=4.0),
    "yarn": dict(kind="yarn", factor=4.0, original=400, slow=1.0, fast=32.0, attention=1.1),
    "yarn without whole numbers": dict(
        kind="yarn", factor=4.0, original=400, slow=1.0, fast=32.0, truncate=False
    ),
    "yarn that starts below 0": dict(
        kind="yarn", factor=4.0, original=10, slow=1.0, fast=32.0, truncate=False
    ),
    "yarn that ends behind the last": dict(
        kind="yarn", factor=4.0, original=10**6, slow=1e-9, fast=4.0, truncate=False
    ),
    "yarn without a ramp": dict(kind="yarn", factor=4.0, original=2, slow=0.5, fast=1.0),
    "dynamic": dict(kind="dynamic", factor=4.0, original=7),
    "dynamic, short": dict(kind="dynamic", factor=4.0, original=18),
    "longrope": dict(kind="longrope", original=7, attention=1.1, short=(1.0, 1.1, 1.2, 1.3),
                     long=(1.5, 2.0, 3.0, 7.0)),
    "longrope, short": dict(kind="longrope", original=18, short=(1.0, 1.1, 1.2, 1.3),
                            long=(1.5, 2.0, 3.0, 7.0)),
}  # fmt: skip


@pytest.mark.parametrize("which", SCALINGS)
def test_rotary_tables_hold_the_cosines_of_the_loops(which: str) -> None:
    """And at 100 bits no float64 in their place would lie in them."""
    width, theta, position = 8, 100.0, np.array([[0, 1, 17]])
    fields = SCALINGS[which]
    scaling = None if fields is None else RopeScaling(**fields)
    with PRECISION, bits(100):
        tables = functions.rope_tables(position, width, theta, None, scaling, 18)
        size = 1.0 if scaling is None else scaling.attention
        for t, j in np.ndindex(3, width // 2):
            f = oracles.frequency(j, width, theta, scaling, digits.Digits, 18)
            angle = f * int(position[0, t])
            for x, want in zip(tables, (angle.cos(), angle.sin()), strict=True):
                assert not misses(x[0, t, 0, j], np.array(want * size))
                assert x[0, t, 0, j].radii() <= 1e-25


def by_hand(e: float, gain: float, h: float) -> dict[str, Any]:
    """nats and derivatives of logits (h y, −y), y = gain e/√(e² + eps), for the second label."""
    x = mpmath.mpf(e) / mpmath.sqrt(mpmath.mpf(e) ** 2 + mpmath.mpf(1e-6))
    apart = (1 + mpmath.mpf(h)) * gain * x
    p = 1 / (1 + mpmath.exp(-apart))  # of the first label
    d_x = mpmath.mpf(1e-6) / (mpmath.mpf(e) ** 2 + mpmath.mpf(1e-6)) ** mpmath.mpf(1.5)
    slope, bend = (1 + mpmath.mpf(h)) * x, p * (1 - p)
    return {
        "nats.0": -mpmath.log(1 - p),
        "gradient.0.final_norm.weight": p * slope,
        "gradient.0.head.weight": p * gain * x,
        "gradient.0.embed.weight": p * (1 + mpmath.mpf(h)) * gain * d_x,
        "hvp.0.final_norm.weight": bend * slope**2,
        "ggnvp.0.final_norm.weight": bend * slope**2,
        "hvp.0.head.weight": bend * slope * gain * x + p * x,
        "A.head": (gain * x) ** 2,
        "G.head": p**2,
    }


def test_a_model_of_three_parameters_is_what_one_writes_by_hand() -> None:
    """Blocks that add nothing; an entry of the embedding, a gain and one of the head."""
    made = config(vocabulary=2, width=1, heads=1, kv_heads=1, head_width=2, mlp_width=1, layers=1,
                  norm_place="pre", qk_norm="none", norm_eps=1e-6)  # fmt: skip
    parameters = {name: np.zeros_like(x) for name, x in random_parameters(made, 0).items()}
    e, gain, h = 0.003, 1.7, 0.9
    parameters["embed.weight"][:, 0] = e, 0.3
    parameters["head.weight"][:, 0] = h, -1.0
    parameters["final_norm.weight"][:] = gain
    model, corpus = rc.Model(made, parameters), rc.Corpus(np.array([[0, 1]]))
    v = {"final_norm.weight": np.ones(1)}
    found = certify(model, corpus, [*OF], direction=v, layers="head", rows="labelled")
    with PRECISION:
        for name, want in by_hand(e, gain, h).items():
            far = abs(many_digits(found[name], (0,) * len(found[name].shape)) - want)
            assert far <= float(found[name].radius.flat[0]) + 1e-70, name
            assert float(found[name].radius.flat[0]) < 1e-30 * float(abs(want)), name


# ------------------------------------------------------------------ planted


def float_tables(*args: Any) -> tuple[Balls, Balls]:
    """Cosines and sines of float64, taken as exact: the first false certificate."""
    cos, sin = rope_tables(args[0], args[1], args[2], np.dtype(np.float64), *args[4:])
    return exact(cos), exact(sin)


def middles(x: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(y.midpoints() if isinstance(y, Balls) else y for y in x)


PLANTED: dict[str, tuple[str, Callable[[Any], Any], str | None]] = {
    "tables of float64": ("rope_tables", lambda _: float_tables, None),
    "the softmax by midpoints": (
        "softmax", lambda old: lambda *a: old(*a).midpoints(), "blocks.0.attn.q.weight"
    ),
    "the norm by midpoints": (
        "rms_norm_forward", lambda old: lambda *a: middles(old(*a)), "blocks.1.mlp.down.weight"
    ),
    "an activation by midpoints": (
        "activation", lambda old: lambda *a: middles(old(*a)), "blocks.1.mlp.gate.weight"
    ),
    "nats by midpoints": (
        "cross_entropy", lambda old: lambda *a: middles(old(*a)), "head.weight"
    ),
    "nats rounded to float64": (
        "cross_entropy", lambda old: lambda *a: tuple(exact(x.rounded()) for x in old(*a)), None
    ),
    "a softmax that sees a key too many": (
        "softmax", lambda old: lambda z, see: old(z, np.roll(see, 1, axis=-1) | see), None
    ),
}  # fmt: skip
"""What is wrong: the function, what it becomes, the parameter that a wide ball shows it by."""


@pytest.mark.parametrize("what", PLANTED)
def test_a_false_certificate_is_caught(what: str) -> None:
    name, change, wide = PLANTED[what]
    one = case(batch=1, length=4)
    assert not forward_misses(one, 120, wide)
    with mock.patch.object(functions, name, change(getattr(functions, name))):
        assert forward_misses(one, 120, wide)


GRADIENTS: dict[str, tuple[str, Callable[[Any], Any], str | None]] = {
    "the mlp's gradient by midpoints": (
        "mlp_backward", lambda old: lambda *a: middles(old(*a)), "blocks.0.mlp.down.weight"
    ),
    "attention's gradient by midpoints": (
        "attention_backward", lambda old: lambda *a: middles(old(*a)), "blocks.0.attn.o.weight"
    ),
    "the norm's gradient without its projection": (
        "rms_norm_backward",
        lambda old: lambda d, saved: (saved[1] * d * saved[2], old(d, saved)[1]),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GRADIENTS)
def test_a_false_gradient_is_caught(what: str) -> None:
    name, change, wide = GRADIENTS[what]
    one = case(batch=1, length=3, layers=1, width=4, heads=2, kv_heads=1, mlp_width=3)
    assert not gradient_misses(one, 120, 1, wide)
    with mock.patch.object(functions, name, change(getattr(functions, name))):
        assert gradient_misses(one, 120, 1, wide)


# ------------------------------------------------------------------ the float routes


@few(10)
@given(st.one_of(cases(), image_cases()))
def test_every_number_type_says_the_same(one: Case) -> None:
    """The gradient of float64, by its derived budget, lies about the balls; so does the loss."""
    if one.config.image is not None or not (one.label >= 0).any():
        return
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    scale = budgets.gradient_scale(one.config, one.parameters, *one.batch)
    widest = max(*one.config.linear_layers()["head"], one.config.mlp_width, one.token.size)
    allowed = budgets.path(one.config.layers, widest, np.float64)
    with bits(160):
        _, truth = loss_and_gradient(
            one.config, in_balls(one), inputs_of(one), one.label, one.layout, functions.BALLS
        )
    for name, x in truth.items():
        assert x.radii().max() <= 1e-20 * (1 + x.most().max())
        assert_within(gradient[name], x.rounded(), allowed, scale[name], name)


@few(6)
@given(image_cases())
def test_vision_transformers_are_enclosed(one: Case) -> None:
    _, gradient = loss_and_gradient(one.config, one.parameters, *one.batch)
    with bits(200):
        _, truth = loss_and_gradient(
            one.config, in_balls(one), inputs_of(one), one.label, one.layout, functions.BALLS
        )
    for name, x in truth.items():
        near = x.rounded()
        assert x.radii().max() <= 1e-25 * (1 + x.most().max())
        assert np.abs(gradient[name] - near).max() <= 1e-10 * (1 + np.abs(near).max()), name


@pytest.fixture(scope="module")
def small() -> tuple[rc.Model, rc.Corpus, rc.certified.certificate.Certificate]:  # type: ignore[name-defined]
    model, corpus = model_and_corpus(case(batch=2, biases=("up", "q")))
    return model, corpus, certify(model, corpus, OF, sequences=[0, 1])


def test_what_was_asked_for_is_there(small) -> None:
    model, _, found = small
    assert found.digits >= 30 and found.wanted == 30
    names = [f"{kind}.{n}" for n in (0, 1) for kind in ("logits", "nats")]
    products = ("gradient", "hvp", "ggnvp")
    names += [f"{k}.{n}.{p}" for n in (0, 1) for k in products for p in model.parameters]
    names += [f"{side}.{layer}" for layer in model.config.linear_layers() for side in "AG"]
    assert sorted(found) == sorted(names)
    assert all(found[name].digits() >= 30 for name in found)
    assert {route.dtype for route in found.routes} == {"float64", "float32", "longdouble"}
    assert len(found.routes) == 3 * len(found)


def test_floats_are_as_near_as_their_digits_let_them_be(small) -> None:
    """No dtype is further off than rounding over the whole path takes it; float32 is further."""
    _, _, found = small
    for route in found.routes:
        assert route.ulps <= probable(10**6, route.dtype) / np.finfo(route.dtype).eps, route
    by = {(r.name, r.dtype): r.error for r in found.routes}
    worse = [by[name, "float32"] > by[name, "float64"] for name in found]
    wider = [by[name, "float64"] > by[name, "longdouble"] for name in found]
    assert np.mean(worse) > 0.99 and np.mean(wider) > 0.9


def test_factors_are_those_of_the_definition(small) -> None:
    model, corpus, found = small
    sums = definition.factors(model, corpus, list(model.config.linear_layers()), "empirical")
    for name, one in sums.items():
        for side, S, n in (("A", one.S_A, one.n_A), ("G", one.S_G, one.n_G)):
            assert found.rows[f"{side}.{name}"] == n
            near = found[f"{side}.{name}"].nearest
            assert np.abs(S / n - near).max() <= 1e-12 * np.abs(near).max()


def test_products_are_those_of_exact(small) -> None:
    model, corpus, found = small
    v = signs_of(model)
    one = rc.Corpus(corpus.tokens[:1], corpus.label[:1])
    for kind, product in (("hvp", rc.exact.hvp), ("ggnvp", rc.exact.ggnvp)):
        truth = product(model, one, wrt="**", vector=v)
        for name, x in truth.items():
            near = found[f"{kind}.0.{name}"].nearest
            assert np.abs(x - near).max() <= 1e-11 * max(np.abs(y).max() for y in truth.values())


def test_more_bits_give_smaller_balls_inside(small) -> None:
    model, corpus, found = small
    more = certify(model, corpus, OF, sequences=[0, 1], digits=60)
    assert more.bits > found.bits and more.digits >= 60
    for name, one in found.items():
        two = more[name]
        for index in list(np.ndindex(one.shape))[:40]:
            assert lies_inside(two, one, index)


@pytest.mark.parametrize("rows", ["reached", "labelled", "all", "cls"])
def test_rows_are_those_of_the_law(rows: str) -> None:
    """Of packed and padded texts, or of images of which one has no label, and with biases."""
    if rows == "cls":
        with pytest.raises(EmptyError, match="'patch' has no row among rows='cls'"):
            certify(*images(), ["G"], rows=rows)
        return of_the_law(images(), rows, "blocks.**,head")
    one = case(batch=2, length=5, biases=("q", "down"))
    label = np.array([[0, -1, 3, -1, -1], [-1, 0, 0, 2, -1]])
    corpus = rc.Corpus(
        one.token, label, np.array([[1] * 5, [1] * 4 + [0]]), np.array([[0, 0, 0, 1, 1], [0] * 5])
    )
    of_the_law((rc.Model(one.config, one.parameters), corpus), rows)
    if rows == "all":
        of_the_law(images(), rows)
    return None


def images() -> tuple[rc.Model, rc.Corpus]:
    """Four patches behind a class vector; of three images one has no label."""
    made = config(
        causal=False, image=Image(channels=1, height=4, width=4, patch=2, specials=("cls",)),
        pool="cls", learned_positions=5, biases=("patch",), layers=1,
    )  # fmt: skip
    pixel = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    corpus = rc.Corpus(images=pixel, labels=np.array([0, -1, 3]))
    return rc.Model(made, random_parameters(made, 0)), corpus


def of_the_law(given: tuple[rc.Model, rc.Corpus], rows: str, layers: str = "**") -> None:
    """A and G are the definition's, and so are their rows; gradients those of each sequence."""
    model, corpus = given
    numbers = range(len(corpus.label))
    found = certify(model, corpus, ("nats", "gradient", "A", "G"), digits=15,
                    sequences=numbers, rows=rows, layers=layers)  # fmt: skip
    names = [name.removeprefix("A.") for name in found if name.startswith("A.")]
    assert names and (layers != "**" or {*names} == {*model.config.linear_layers()})
    sums = definition.factors(model, corpus, names, "empirical", rows=rows)
    for name, one in sums.items():
        for side, S, n in (("A", one.S_A, one.n_A), ("G", one.S_G, one.n_G)):
            assert found.rows[f"{side}.{name}"] == n
            near = found[f"{side}.{name}"].nearest
            assert np.abs(S / n - near).max() <= 1e-12 * np.abs(near).max(), name
    for number, part in enumerate(definition.sequences(model.config, corpus, Rows(rows))):
        nats, gradient = loss_and_gradient(
            model.config, model.parameters, part.inputs, part.label_BT, part.layout
        )
        assert found[f"nats.{number}"].nearest.sum() == pytest.approx(nats, rel=1e-13)
        for name, x in gradient.items():
            near = found[f"gradient.{number}.{name}"].nearest
            assert np.abs(x - near).max() <= 1e-12 * (1 + np.abs(near).max()), name
    assert all(r.ulps < 1e5 for r in found.routes)


def test_products_of_tied_and_capped_logits_are_those_of_exact() -> None:
    """With labels of its own, some none and some 0, of a sequence that is not the first."""
    one = case(batch=2, length=5, tied=True, logit_cap=1.5, layers=1, score_cap=1.0)
    label = np.array([[-1, 2, 0, 1, -1], [0, -1, 3, 0, -1]])
    model = rc.Model(one.config, one.parameters)
    found = certify(model, rc.Corpus(one.token, label), ["hvp", "ggnvp"], sequences=[1])
    rng = np.random.default_rng(0)
    v = {name: rng.normal(size=x.shape) for name, x in model.parameters.items()}
    alone = rc.Corpus(one.token[1:], label[1:])
    own = certify(model, rc.Corpus(one.token, label), ["hvp", "ggnvp"], sequences=[1], direction=v)
    for made, vector in ((found, signs_of(model)), (own, v)):
        for kind, product in (("hvp", rc.exact.hvp), ("ggnvp", rc.exact.ggnvp)):
            truth = product(model, alone, wrt="**", vector=vector)
            for name, x in truth.items():
                near = made[f"{kind}.1.{name}"].nearest
                assert np.abs(x - near).max() <= 1e-11 * (1 + np.abs(near).max()), (kind, name)
        assert all(r.ulps < 1e5 for r in made.routes)


def signs_of(model: rc.Model) -> dict[str, np.ndarray]:
    """The direction that is taken where none is given, by the oracle's generator."""
    return {
        name: np.array(oracles.signs(0, 0, i, 0, x.size), np.float64).reshape(x.shape)
        for i, (name, x) in enumerate(model.parameters.items())
    }


def test_a_row_without_a_label_has_no_hessian() -> None:
    z, v = np.random.default_rng(0).normal(size=(2, 2, 3))
    p = np.exp(z[0]) / np.exp(z[0]).sum()
    made = functions.hessian_product(exact(z), exact(v), np.array([0, -1])).rounded()
    assert made[0] == pytest.approx(p * (v[0] - p @ v[0]), rel=1e-14) and not made[1].any()


def test_a_part_of_a_direction_is_0_elsewhere() -> None:
    model, corpus = model_and_corpus(case(batch=1, length=3, layers=1))
    name = "blocks.0.attn.k.weight"
    v = {key: np.zeros(x.shape) for key, x in model.parameters.items()}
    v[name] = np.ones(v[name].shape)
    part = certify(model, corpus, ["hvp"], direction={name: v[name]}, digits=10)
    whole = certify(model, corpus, ["hvp"], direction=v, digits=10)
    for key, one in whole.items():
        assert np.array_equal(part[key].nearest, one.nearest)


def test_the_order_of_sequences_changes_no_number(small) -> None:
    model, corpus, found = small
    other = certify(model, corpus, ("A", "G"), sequences=[1, 0])
    assert other.source["sequences"] == [1, 0]
    for name in other:
        for index in list(np.ndindex(other[name].shape))[:20]:
            far = abs(middle(other[name], index) - middle(found[name], index))
            radii = float(other[name].radius[index]) + float(found[name].radius[index])
            assert far <= Fraction(radii)


def test_a_direction_of_ones_own() -> None:
    model, corpus = model_and_corpus(case(batch=1))
    v = {"blocks.0.mlp.up.weight": np.ones(model.parameters["blocks.0.mlp.up.weight"].shape)}
    found = certify(model, corpus, ["hvp"], direction=v)
    twice = certify(model, corpus, ["hvp"], direction={k: 2 * x for k, x in v.items()})
    for name in found:
        assert np.array_equal(twice[name].nearest, 2 * found[name].nearest)


# ------------------------------------------------------------------ budgets of the floats


def test_every_route_lies_within_its_budgets(small) -> None:
    """Of every quantity and dtype; the worst case is the wider one, and neither is idle."""
    _, _, found = small
    for route in found.routes:
        assert route.inside, route
        assert route.probable < route.worst and route.used("worst") <= route.used("probable")
        assert route.spread <= route.error * np.sqrt(found[route.name].radius.size) * (1 + 1e-12)
    for dtype in ("float64", "float32", "longdouble"):
        some = [r.used("probable") for r in found.routes if r.dtype == dtype]
        assert 0.001 < np.median(some) and 0.01 < max(some)


def test_sums_have_the_terms_of_all_positions_and_passes() -> None:
    """An image has one label and five positions; `expected` goes back V times for each label."""
    one = case(batch=1, length=3, vocabulary=5)
    for made, fisher, terms in ((images(), "empirical", 5), (model_and_corpus(one), "expected", 0)):
        with mock.patch.object(attempt, "Shaking", wraps=Shaking) as shaken:
            certify(*made, ["G"], layers="head", fisher=fisher, digits=1)
        labels = (made[1].label[0] >= 0).sum()
        assert shaken.call_args.args[1] == (terms or 3 * 5 * labels)


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a norm's gradient without its projection": (
        "rms_norm_backward",
        lambda old: lambda d, saved: (d * saved[3] * saved[1] * saved[2], old(d, saved)[1]),
    ),
    "an activation's slope, by 1e-11": (
        "mlp_backward",
        lambda old: lambda d, saved: tuple(x * (1 + 1e-11) for x in old(d, saved)),
    ),
    "values, by 1e-11": (
        "attention_forward", lambda old: lambda q, k, v, *a: old(q, k, v * (1 + 1e-11), *a)
    ),
}  # fmt: skip
"""One term of the float64 route: the layer function, and what it becomes."""


@pytest.mark.parametrize("what", WRONG)
def test_a_route_with_a_wrong_term_is_outside_its_budgets(what: str) -> None:
    name, change = WRONG[what]
    model, corpus = model_and_corpus(case(batch=1))
    right = attempt.floats

    def wrong(dtype: str) -> Any:
        kind = right(dtype)
        if dtype != "float64":
            return kind
        return replace(kind, ops=replace(kind.ops, **{name: change(getattr(kind.ops, name))}))

    with mock.patch.object(attempt, "floats", wrong):
        found = certify(model, corpus, ["gradient"])
    out = {route.dtype for route in found.routes if not route.inside}
    assert out == {"float64"}
    said = format_certificate(found.to_json())
    assert "OUTSIDE: float64, gradient.0." in said and "more." in said


def test_a_radius_that_was_dropped_shows() -> None:
    """Balls of few digits: with their radius floats lie in them; midpoints alone accuse floats."""
    model, corpus = model_and_corpus(case(batch=1))

    def bare(x: Balls, digits: float) -> Enclosed:
        one = enclosed(x, digits)
        return replace(one, radius=0 * one.radius)

    plan = Plan(60, 0.0, 60, (0.0, 0.0))
    with mock.patch.object(driver, "planned", lambda *_: plan):
        honest = certify(model, corpus, ["gradient"], digits=1)
        with mock.patch.object(attempt, "enclosed", bare):
            false = certify(model, corpus, ["gradient"], digits=1)
    assert honest.bits == false.bits == 60
    assert all(route.inside for route in honest.routes)
    assert {"longdouble"} <= {route.dtype for route in false.routes if not route.inside}


def test_where_a_run_overflows_there_is_no_budget() -> None:
    """A stream at float64's end is shaken beyond it, or the sizes of its sums are."""
    model, corpus = model_and_corpus(scaled(2.0**1020))
    found = certify(model, corpus, ["nats"], digits=20)
    said = format_certificate(found.to_json())
    for route in found.routes:
        assert route.inside is None or route.inside or route.error == np.inf
    assert "inf" in said


def test_a_budget_that_is_not_there_is_not_made_up() -> None:
    one = Shaking(SIMPLE, 4)
    assert one.budget("worst", "nats.0", "float64") is None
    two = Shaking(SIMPLE, 2**23, moved={"nats.0": 1.0}, own={"nats.0": 1.0})
    assert two.budget("worst", "nats.0", "float32") is not None
    three = replace(two, rows=2**25)
    assert three.budget("worst", "nats.0", "float32") is None
    assert three.budget("probable", "nats.0", "float32") is not None
    route = Route("nats.0", "float32", 1.0, 1.0, 2.0)
    assert (route.used("worst"), route.used("probable"), route.inside) == (None, 0.5, True)
    assert Route("nats.0", "float32", 1.0).inside is None
    assert Route("x", "float64", 0.0, 0.0, 0.0).used("probable") == 0.0
    assert Route("x", "float64", 1.0, 1.0, 0.0).used("probable") == np.inf


def test_the_size_of_terms_is_the_mean_of_the_runs() -> None:
    """Each moves a number by three SHAKEs: so large are its terms, or as large as it is itself."""
    for own, size in ((0.5, 3.0), (8.0, 8.0)):
        one = Shaking(SIMPLE, 4)
        for _ in range(RUNS):
            one._take({"x": np.array([own + 3 * SHAKE])}, {"x": np.array([own])})
        assert one.size("x") == pytest.approx(size, rel=1e-3)
    assert (one.terms("hvp.0.x") - ELEMENTARY) == 2 * (one.terms("A.x") - ELEMENTARY)


SIMPLE = SimpleNamespace(config=config())


def test_what_lies_in_a_ball_is_not_off() -> None:
    one = Enclosed(np.array([[1.0, 2.0], [0, 0]]), np.array([0.5, 0.0]))
    assert outside(np.array([1.5, 2.0]), one) == 0
    assert outside(np.array([2.0, 2.5]), one) == pytest.approx(np.hypot(0.5, 0.5))
    assert outside(np.array([np.nan, 2.0]), one) == np.inf


# ------------------------------------------------------------------ records


@few(40)
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6), st.sampled_from([60, 110, 300]))
def test_parts_and_texts_say_what_the_ball_says(p: int, q: int, precision: int) -> None:
    with bits(precision):
        one = enclosed(exact(np.array([p])) / q, 30)
    truth = Fraction(p, q)
    assert abs(middle(one, (0,)) - truth) <= Fraction(float(one.radius[0]))
    if one.settled[0]:
        assert one.nearest[0] == float(truth)
    text = one.text((0,))
    if "±" in text:
        said, radius = text.split(" ± ")
        assert abs(Fraction(said) - truth) <= Fraction(radius)
    elif text.startswith("|x|"):
        assert abs(truth) <= Fraction(text.removeprefix("|x| ≤ "))
    else:
        assert Fraction(text.removesuffix(" exactly")) == truth


TINY = 2.0**-1074


@pytest.mark.parametrize(
    ("parts", "radius", "text"),
    [
        ((0.5, 0.0), 0.0, "0.5 exactly"),
        ((0.1, 0.0), 0.0, f"{Fraction(0.1)} exactly"),  # no float64 is 1/10
        ((1.0, 2.0**-60), 0.0, f"{1 + Fraction(2) ** -60} exactly"),
        ((0.0, 0.0), 0.0, "0"),
        ((0.0, 0.0), TINY, "|x| ≤ 5.0e-324"),  # 4.9e-324 is less
        ((1.0, 0.0), np.inf, "nothing is known"),
        ((1.0, 0.0), 1e-3, "1.000 ± 1.1e-3"),  # 1e-3 is a little more than 1/1000
        ((-1234.5, 0.0), 20.0, "-1230 ± 2.5e+1"),
        ((0.0, 0.0), 0.0201, "|x| ≤ 2.1e-2"),
        ((0.01, 0.0), 0.0201, "|x| ≤ 3.1e-2"),
    ],
)
def test_texts_promise_no_more_than_is_known(
    parts: tuple[float, ...], radius: float, text: str
) -> None:
    assert Enclosed(np.array(parts)[:, None], np.array([radius])).text((0,)) == text


def test_the_errors_of_floats_are_bounded_above() -> None:
    """Against fractions: numbers near the truth, far from it, and below the range of float64."""
    rng = np.random.default_rng(0)
    for size in (1.0, 1e-300, 1e-320, 1e300):
        with bits(150):
            truth = enclosed(exact(size * rng.normal(size=40)) / 3, 30)
        wide = truth.parts[0].astype(np.longdouble) + truth.parts[1]
        for off in (0, 2.0**-60, 1e-9, 3.0):
            got = wide * (1 + off * rng.normal(size=40).astype(np.longdouble))
            for n in range(40):
                far = abs(exactly(got[n]) - middle(truth, (n,))) + Fraction(float(truth.radius[n]))
                one = Enclosed(truth.parts[:, n : n + 1], truth.radius[n : n + 1])
                bound = Fraction(farthest(got[n : n + 1], one))
                third = 2 * sum(abs(Fraction(float(p))) for p in one.parts[2:, 0])
                assert (
                    far <= bound <= (far + third) * (1 + Fraction(2, 10**15)) + 2 * Fraction(TINY)
                )
    assert farthest(np.zeros(2), Enclosed(np.zeros((2, 2)), np.zeros(2))) == 0
    least = np.array([np.finfo(np.longdouble).smallest_subnormal])
    assert farthest(least, Enclosed(np.zeros((2, 1)), np.zeros(1))) > 0


def exactly(x: Any) -> Fraction:
    """A longdouble as a fraction: its mantissa is a sum of two float64."""
    mantissa, exponent = np.frexp(x)
    high = float(mantissa)
    return (Fraction(high) + Fraction(float(mantissa - high))) * Fraction(2) ** int(exponent)


def test_a_radius_without_bound_is_no_digit() -> None:
    assert Enclosed(np.array([[1.0, 0.0], [0, 0]]), np.array([1e-9, np.inf])).digits(1.0) == 0
    assert Enclosed(np.ones((2, 1)), np.array([TINY])).digits(1e300) > 600


def test_digits_count_from_the_largest_entry() -> None:
    one = Enclosed(np.array([[100.0, 1.0], [0, 0]]), np.array([1e-8, 1e-9]))
    assert one.digits() == pytest.approx(10) and one.digits(1.0) == pytest.approx(8)
    assert Enclosed(np.zeros((2, 3)), np.zeros(3)).digits() == np.inf
    assert Enclosed(np.zeros((2, 3)), np.full(3, 1e-9)).digits() == 0


def test_a_certificate_has_the_digits_of_its_worst_array() -> None:
    """An array that may be 0 counts from the largest of the same quantity and sequence."""

    def one(size: float, radius: float) -> Enclosed:
        return Enclosed(np.array([[size], [0.0]]), np.array([radius]))

    numbers = {
        "gradient.0.w": one(1.0, 1e-40),
        "gradient.1.w": one(1e-5, 1e-40),
        "gradient.1.b": one(0.0, 1e-30),
        "A.x": one(1e3, 1e-40),
        "A.y": one(0.0, 1e-30),
    }
    found = {name: one.digits(sizes(numbers)[name]) for name, one in numbers.items()}
    assert found["gradient.1.b"] == pytest.approx(25) and found["A.y"] == pytest.approx(33)
    made = Certificate(numbers, (), 100, 30)
    assert made.digits == pytest.approx(25) and made.to_json()["digits"] == made.digits


BIAS = dict(batch=1, biases=("k",), qk_norm="none", rope_theta=None)
"""A bias of keys, which moves every score of a query alike."""


def test_what_is_0_by_theory_is_0_and_says_why() -> None:
    """A bias of keys has no gradient (O32); of one that is turned or capped nothing is said."""
    name, of = "blocks.0.attn.k.bias", ["gradient", "hvp", "ggnvp"]
    found = certify(*model_and_corpus(case(**BIAS)), of)
    said = found.to_json()["source"]["zeros"]["O32"]
    assert {f"{kind}.0.{name}" for kind in of} <= {*said}
    assert all(found[one].text((0,)) == "0" and found[one].largest == 0 for one in said)
    assert found.bits < 400 and found.digits >= 30
    assert all(route.ulps < 1e4 for route in found.routes)
    assert f"Exactly 0 by O32: entries of {len(said)} arrays" in format_certificate(found.to_json())
    part = BIAS | dict(rope_theta=99.0, rope_width=2, head_width=4)
    half = certify(*model_and_corpus(case(**part)), of[:1])
    turned = half[f"gradient.0.{name}"].radius.reshape(-1, 4) > 0
    assert turned[:, :2].all() and not turned[:, 2:].any()
    for more in (dict(score_cap=2.0), dict(qkv_clip=9.0), dict(rope_theta=99.0)):
        assert "zeros" not in certify(*model_and_corpus(case(**BIAS | more)), of[:1]).source


def test_what_is_0_and_not_known_to_be_counts_beside_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its balls hold 0, and are as small as those of the others."""
    monkeypatch.setattr(
        attempt, "unshifted", lambda _config, _name, d: (d, np.zeros(d.shape, bool))
    )
    found = certify(*model_and_corpus(case(**BIAS)), ["gradient"])
    zero = found["gradient.0.blocks.0.attn.k.bias"]
    assert zero.largest == 0 and zero.radius.max() > 0 and found.digits >= 30
    assert found.bits < 300 and zero.text((0,)).startswith("|x| ≤ ")
    assert all(route.ulps < 1e4 for route in found.routes)


def test_a_number_between_two_floats_is_not_settled() -> None:
    half = 2.0**-53  # 1 + half lies midway between 1 and the next float64
    for radius, settled in ((0.0, False), (1e-40, False)):
        assert Enclosed(np.array([[1.0], [half]]), np.array([radius])).settled[0] == settled
    assert Enclosed(np.array([[1.0], [half / 4]]), np.array([1e-40])).settled[0]
    assert not Enclosed(np.array([[1.0], [-half / 2]]), np.array([1e-40])).settled[0]
    quarter = half / 2  # half the gap to the float64 below 1: the number must lie nearer
    for part, radius, settled in (
        (0.0, quarter, False), (0.0, np.nextafter(quarter, 0), False),  # two steps are allowed for
        (0.0, quarter * 0.999, True), (quarter / 2, quarter * 0.6, False),
        (-quarter / 2, quarter * 0.4, True), (0.0, 0.0, True), (0.0, np.inf, False),
    ):  # fmt: skip
        for sign in (1, -1):
            one = Enclosed(sign * np.array([[1.0], [part]]), np.array([radius]))
            assert one.settled[0] == settled, (part, radius)


def test_the_largest_entry_is_bounded_below() -> None:
    """What is known of it is its midpoint, less its radius, and less what rounds in float64."""
    assert Enclosed(np.array([[1.0], [0.0]]), np.array([0.75])).largest < 0.25
    assert Enclosed(np.array([[1.0], [-(2.0**-54)]]), np.array([0.0])).largest < 1 - 2.0**-54
    assert Enclosed(np.array([[1.0, -3.0], [0, 0]]), np.zeros(2)).largest > 2.999
    assert Enclosed(np.array([[1.0], [0.0]]), np.array([2.0])).largest == 0


# ------------------------------------------------------------------ limits


@contextmanager
def at_most(precision: int) -> Iterator[None]:
    with mock.patch.object(driver, "MOST_BITS", precision):
        yield


def planned_as(precision: int) -> Any:
    """As if the plan were so many bits."""
    plan = Plan(precision, math.inf, precision, (1.0,))
    return mock.patch.object(driver, "planned", lambda *_: plan)


def test_a_relu_at_0_asks_for_more_bits() -> None:
    """Two equal inputs and weights 1 and −1: up is 0, which no ball can prove."""
    made = config(gated=False, activation="relu", layers=1)
    parameters = random_parameters(made, 0)
    for name in ("embed.weight", "blocks.0.attn.o.weight"):
        axis = 1 if name.startswith("embed") else 0
        x = np.moveaxis(parameters[name], axis, 0)
        x[1] = x[0]
    parameters["blocks.0.attn_norm.weight"][1] = parameters["blocks.0.attn_norm.weight"][0]
    parameters["blocks.0.mlp.up.weight"][0] = np.eye(made.width)[0] - np.eye(made.width)[1]
    model = rc.Model(made, parameters)
    named = r"in `mlp_forward` behind 'blocks.0.mlp.up.weight': .* nor below"
    with at_most(400), pytest.raises(UndecidedError, match=named):
        certify(model, rc.Corpus(np.array([[1, 2, 3]])), ["nats"])


def test_a_number_that_no_plan_foresaw_gets_more_bits() -> None:
    """Weights so large that each block loses far more than it would: the plan is made again."""
    one = case(batch=1)
    model, corpus = model_and_corpus(one)
    with planned_as(40):
        found = certify(model, corpus, ["gradient"])
    assert found.bits > 40 and found.digits >= 30
    for few_digits in (28, 29.9):  # a plan that all but suffices
        bare = found.bits - int((found.digits - few_digits) * np.log2(10))
        with planned_as(bare):
            again = certify(model, corpus, ["gradient"])
        assert again.digits >= 30 and again.bits > bare


def test_a_sequence_without_a_row() -> None:
    """One token has nothing to predict: its losses and gradients are exact zeros, A is none."""
    model, _ = model_and_corpus(case(batch=1))
    corpus = rc.Corpus(np.array([[1]]))
    found = certify(model, corpus, ["nats", "gradient", "hvp", "ggnvp"])
    assert found.digits == np.inf and all(not x.nearest.any() for x in found.values())
    with pytest.raises(EmptyError, match="have no row"):
        certify(model, corpus, ["A"])


def test_balls_that_blow_up_ask_for_more_bits() -> None:
    """With 3 bits the norms divide by balls that hold 0. The logits are then no numbers."""
    model, corpus = model_and_corpus(case(batch=1))
    with planned_as(3):
        found = certify(model, corpus, ["nats", "gradient", "hvp", "ggnvp"])
    assert found.digits >= 30


def test_a_norm_of_zeros_ends() -> None:
    """Without an eps 0 has no norm: nothing is known, and it is said."""
    one = case(batch=1, norm_place="pre", qk_norm="none", norm_eps=0.0)
    one.parameters["embed.weight"][:] = 0
    model, corpus = model_and_corpus(one)
    with (
        at_most(130),
        pytest.raises(NonFiniteError, match=r"in `rms_norm_forward` behind 'blocks.0.attn_norm"),
    ):
        certify(model, corpus, ["nats"])


def test_what_overflows_in_one_sequence_has_no_mean() -> None:
    """Token 6 is beyond float32, and in the second sequence alone. No mean of one stands for A."""
    one = scaled(1.0)
    one.parameters["embed.weight"][6] *= 2.0**130
    corpus = rc.Corpus(np.array([[1, 2, 3], [1, 6, 3]]))
    found = certify(rc.Model(one.config, one.parameters), corpus, ["A", "nats"],
                    layers="**.up", digits=10, sequences=[0, 1])  # fmt: skip
    far = {route.name: route.error for route in found.routes if route.dtype == "float32"}
    assert far["nats.0"] < 1 and far["nats.1"] == far["A.blocks.0.mlp.up"] == np.inf


def test_radii_that_float64_cannot_make_smaller_end_the_search() -> None:
    """Gradients of a stream so large are about 1e-307: float64 has 17 digits for them, not 30."""
    model, corpus = model_and_corpus(scaled(2.0**1020))
    found = certify(model, corpus, ["gradient"])
    assert 10 < found.digits < 20 and found.bits < 300
    said = " ".join(format_certificate(found.to_json()).split())
    assert "NOT REACHED" in said and ": float64 has no radius for numbers so small." in said


def test_the_search_ends_where_every_array_that_lacks_digits_is_as_small() -> None:
    small, wide = (Enclosed(np.array([[x], [0.0]]), np.array([r]))
                   for x, r in ((1e-320, 5e-324), (1.0, 1e-9)))  # fmt: skip
    assert driver._narrowest(Certificate({"nats.0": small}, (), 1, 30)) == "nats.0"
    assert not driver._narrowest(Certificate({"nats.0": small, "nats.1": wide}, (), 1, 30))


def test_digits_that_are_missing_are_made_up_at_once() -> None:
    """Ten of thirty are there: twenty more are 67 bits, and some to spare."""
    asked: list[int] = []

    def at(precision: int) -> Certificate:
        asked.append(precision)
        one = Enclosed(np.array([[1.0], [0.0]]), np.array([1e-10 if len(asked) < 2 else 1e-31]))
        return Certificate({"nats.0": one}, (), precision, 30)

    job: Any = SimpleNamespace(digits=30, at=at)
    assert driver._with_enough(job, 100).bits == 100 + 67 + 32 and len(asked) == 2


@pytest.mark.parametrize("size", [2.0**130, 2.0**1020])
def test_what_overflows_in_a_float_is_certified(size: float) -> None:
    """A stream beyond float32's range, or at float64's end: the norms see the same vectors."""
    model, corpus = model_and_corpus(scaled(size))
    found = certify(model, corpus, ["nats", "A"], layers="**.up", digits=20)
    plain = certify(*model_and_corpus(scaled(1.0)), ["nats", "A"], layers="**.up", digits=20)
    assert found.digits >= 20
    for name, one in found.items():
        assert np.array_equal(one.nearest, plain[name].nearest)
    assert all(r.error == np.inf for r in found.routes if r.dtype == "float32")


def test_what_cannot_be_asked_for() -> None:
    model, corpus = model_and_corpus(case(batch=1))
    for more, words in (
        (dict(of=[]), "must name some of"),
        (dict(of="nats"), "must name some of"),
        (dict(of=["hess"]), "of must be one of"),
        (dict(digits=0), "digits must lie in"),
        (dict(digits="many"), "digits must be a number"),
        (dict(sequences=[1]), "sequence 1 does not exist; the corpus has 1"),
        (dict(sequences=[-1]), "sequence -1 does not exist"),
        (dict(sequences=[]), "at least one sequence"),
        (dict(sequences=[0.5]), "sequences must"),
        (dict(digits=201), "digits must lie in"),
        (dict(layers="blocks.9.*"), "blocks.9"),
        (dict(rows="some"), "rows must be one of"),
        (dict(direction={"nothing": np.ones(1)}), "direction must be one of"),
        (dict(direction={"embed.weight": np.ones(1)}), "must be"),
        (dict(direction={"embed.weight": np.full((7, 8), 2**53 + 1)}), "are not float64"),
        (
            dict(direction={"embed.weight": np.full((7, 8), np.longdouble(1) / 3)}),
            "are not float64",
        ),
    ):
        with pytest.raises(RefcurvError, match=words):
            certify(model, corpus, **{"of": ["nats"], **more})
    bad = {**model.parameters, "head.weight": np.full((7, 8), np.nan)}
    with pytest.raises(RefcurvError, match=r"head.weight holds nan"):
        certify(replace(model, parameters=bad), corpus, ["nats"])


def test_progress_goes_to_its_end() -> None:
    model, corpus = model_and_corpus(case(batch=2))
    for of, total in ((["nats"], 10), (["eigenvalues"], 12)):
        seen: list[tuple[int, int]] = []
        certify(model, corpus, of, sequences=[0, 1], layers="blocks.0.mlp.up", digits=1,
                progress=lambda *at, seen=seen: seen.append(at))  # fmt: skip
        assert seen == [(done + 1, total) for done in range(total)]


# ------------------------------------------------------------------ files and the command


def test_a_file_holds_the_certificate(small, tmp_path) -> None:
    _, _, found = small
    path = tmp_path / "c.h5"
    rc.save_certificate(found, path)
    with mock.patch.object(driver, "require_flint", side_effect=AssertionError):
        read = rc.load_certificate(path)
    assert list(read) and sorted(read) == sorted(found)
    for name, one in found.items():
        assert np.array_equal(read[name].parts, one.parts)
        assert np.array_equal(read[name].radius, one.radius)
    assert (read.bits, read.wanted, read.rows) == (found.bits, found.wanted, dict(found.rows))
    assert read.routes == found.routes and read.source == dict(found.source)
    said = {"inputs": {}, "sequences": [0, 1], "rows": "reached", "direction": "signs"}
    said["fisher"] = "empirical"
    assert read.source == said
    assert read.to_json() == found.to_json()


def test_a_certificate_says_what_it_is_of(small) -> None:
    model, corpus, _ = small
    given = {name: np.ones(x.shape) for name, x in model.parameters.items()}
    made = [certify(model, corpus, ["hvp"], digits=1, direction=v).source for v in (None, given)]
    assert made[0]["direction"] == "signs" and len(made[1]["direction"]) == 64
    again = {name: np.asfortranarray(v) for name, v in reversed(given.items())}
    assert certify(model, corpus, ["hvp"], digits=1, direction=again).source == made[1]
    plain = certify(model, corpus, ["A"], digits=1, rows="all").source
    assert plain == {"inputs": {}, "sequences": [0], "rows": "all", "direction": None}


@pytest.mark.parametrize("what", ["format", "radii", "NaN", "float32", "shapes", "routes"])
def test_a_damaged_certificate_is_refused(what: str, small, tmp_path) -> None:
    _, _, found = small
    one = found["nats.0"]
    path = tmp_path / "c.h5"
    if what == "radii":
        one = Enclosed(one.parts, -one.radius)
    if what == "NaN":
        one = Enclosed(one.parts, one.radius * np.nan)
    if what == "float32":
        one = Enclosed(one.parts.astype(np.float32), one.radius)
    if what == "shapes":
        one = Enclosed(one.parts[:, :1], one.radius)
    few_of = replace(found, numbers={"nats.0": one})
    if what == "routes":
        few_of = replace(few_of, routes=(Route("x", "float64", 1.0),))
    rc.save_certificate(few_of, path)
    with pytest.raises(RefcurvError, match=r"nats|damaged|is a refcurv-certificate"):
        (rc.load_factors if what == "format" else rc.load_certificate)(path)


def test_the_table_rounds_nothing_up() -> None:
    """29.97 digits are no 30, and 999 of 1,000.5 no 100 %."""
    one = {"shape": [100_000], "digits": 29.97, "largest": 1.0, "settled": 99_999}
    said = format_certificate(
        {"numbers": {"nats.0": one}, "routes": [], "bits": 100, "digits": 29.97, "wanted": 30}
    )
    assert " 29 " in said and "99.9%" in said and "100 bits gave 29.9." in said
    two = one | {"digits": 40.5}
    routes = [
        {
            "name": name,
            "dtype": "float64",
            "error": 1.0,
            "ulps": ulps,
            "inside": share <= 1,
            "budgets": {"probable": 1.0, "worst": worst},
            "used": {"probable": share, "worst": 0.1},
        }
        for name, ulps, share, worst in (
            ("A.x", 3.0, 0.5, 1.0),
            ("A.y", 7.0, 0.25, 1.0),
            ("G.x", 2.0, 1.5, None),
            ("G.y", None, 0.1, 1.0),
        )
    ]
    many = {"numbers": {n: two for n in ("A.x", "G.x", "G.y")} | {"A.y": one}, "routes": routes}
    rows = format_certificate(many | {"bits": 1, "digits": 30.0, "wanted": 30}).splitlines()
    assert rows[2].split() == ["A", "2", "200,000", "29", "99.9%"]
    assert rows[3].split() == ["G", "2", "200,000", "40", "99.9%"]
    assert "1 bits; every number lies within its radius" in rows[5]
    errors, shares = (next(n for n, row in enumerate(rows) if row.startswith(head)) + 2
                      for head in ("error in ulps", "share of budget"))  # fmt: skip
    assert rows[errors].split() == ["A", "7", "-", "-"]
    assert rows[errors + 1].split() == ["G", "inf", "-", "-"]
    assert rows[shares].split() == ["A", "50%", "10%", "-", "-", "-", "-"]
    assert rows[shares + 1].split() == ["G", "150%", "none", "-", "-", "-", "-"]
    assert rows[-1] == "OUTSIDE: float64, G.x: 150% of the budget"
    assert max(map(len, rows)) <= 80
    assert " 30 " not in said.splitlines()[2] and "100.0%" not in said


def test_the_command_says_what_is_certain(small, tmp_path, capsys) -> None:
    model, corpus, found = small
    weights, texts = str(tmp_path / "w.h5"), str(tmp_path / "c.h5")
    rc.save(model, weights)
    rc.save_corpus(corpus, texts)
    out, table = str(tmp_path / "cert.h5"), str(tmp_path / "t.json")
    status = main(["certify", weights, texts, "--of", "nats,A", "--sequences", "0-1",
                   "--layers", "**.up", "-o", out, "--json", table])  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and "nats, sequence 1" in said and "proved" in said
    written = json.loads(Path(table).read_text("utf-8"))
    assert written == rc.load_certificate(out).to_json()
    assert found["nats.1"].nearest == pytest.approx(rc.load_certificate(out)["nats.1"].nearest)
    with at_most(60):
        assert main(["certify", weights, texts, "--of", "nats"]) == 1
    assert "NOT REACHED: 30 digits" in capsys.readouterr().out
    for bad, words in (
        (["--sequences", "x"], "0-3"),
        (["--sequences", "9"], "sequence 9 does not exist"),
        (["--of", "nats,nothing"], "of must be one of"),
        (["--digits", "x"], "digits must be a number"),
    ):
        with contextlib.suppress(SystemExit):
            assert main(["certify", weights, texts, *bad]) == 2
        assert words in capsys.readouterr().err


# ------------------------------------------------------------------ every family

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text("utf-8"))
FAMILY = {
    row["config"]["model_type"]: name
    for name, row in reversed(PUBLISHED.items())
    if "becomes" in row
}
"""One published configuration of each family, with tiny sizes."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if k % 4 == 0 else [pytest.mark.slow])
        for k, name in enumerate(FAMILY.values())
    ],
)
def test_a_twin_of_every_family_is_certified(name: str) -> None:
    """Nats of the loops in mpmath lie in the balls, and the float64's gradient is near."""
    _, made = read_config("x", json.dumps(PUBLISHED[name]["config"]))
    made = replace(made, vocabulary=min(made.vocabulary, 11), layers=min(made.layers, 2),
                   windows=made.windows[:2], rotary=made.rotary[:2])  # fmt: skip
    rng = np.random.default_rng(0)
    model = rc.Model(made, random_parameters(made, 1))
    if made.image is None:
        inputs = rng.integers(0, made.vocabulary, (1, 4))
        corpus = rc.Corpus(inputs)
    else:
        image = made.image
        inputs = rng.normal(size=(1, image.channels, image.height, image.width))
        inputs = inputs.astype(np.float32)
        corpus = rc.Corpus(images=inputs, labels=np.array([1]))
    found = certify(model, corpus, ["nats", "gradient"], digits=25)
    assert found.digits >= 25
    for route in found.routes:
        assert route.dtype != "float64" or route.error < 1e-9, route
    with PRECISION:
        plain = {key: digits.of(x) for key, x in model.parameters.items()}
        pixel = digits.of(inputs[0].astype(float)) if made.image is not None else inputs[0]
        want = oracles.nats(made, plain, pixel)
        for t, label in enumerate(corpus.label[0]):
            one = found["nats.0"]
            if label >= 0:
                far = abs(many_digits(one, (t,)) - want[t, label].x)
                assert far <= float(one.radius[t]) + 1e-60
