"""Budgets of whole passes on random models: how much of them the floats' errors use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

import refcurv as rc
from refcurv.algebra.balls import UndecidedError
from refcurv.certified.blocks import BLOCKS
from refcurv.certified.certificate import BUDGETS
from refcurv.certified.numbers import OF
from refcurv.law.checks import EmptyError
from refcurv.model.config import ModelConfig
from validation.certified.page import from_tests

with from_tests():
    from strategies import cases, configs, random_parameters

LOUD = (0.25, 1.0, 4.0)
"""Weights times these: softmaxes and activations are nearly flat, or saturated."""


@dataclass(frozen=True)
class Pass:
    """A model and texts or images."""

    model: rc.Model
    corpus: rc.Corpus


def loud(config: ModelConfig, parameters: dict[str, Any], by: float) -> rc.Model:
    """The matrices of the blocks, times a number."""
    return rc.Model(config, {
        name: x * by if x.ndim == 2 and name.startswith("blocks") else x
        for name, x in parameters.items()
    })  # fmt: skip


@st.composite
def texts(draw: st.DrawFn) -> Pass:
    """Packed and padded texts, with labels of their own or the law's."""
    one = draw(cases())
    corpus = rc.Corpus(one.token, one.label, one.real.astype(np.uint8), one.segment)
    return Pass(loud(one.config, one.parameters, draw(st.sampled_from(LOUD))), corpus)


@st.composite
def images(draw: st.DrawFn) -> Pass:
    config = draw(configs(2, images=True))
    seed = draw(st.integers(0, 9999))
    rng, image = np.random.default_rng(seed), config.image
    assert image is not None
    pixel = rng.normal(size=(2, image.channels, image.height, image.width)).astype(np.float32)
    corpus = rc.Corpus(images=pixel, labels=rng.integers(0, config.vocabulary, 2))
    parameters = random_parameters(config, seed)
    return Pass(loud(config, parameters, draw(st.sampled_from(LOUD))), corpus)


PASSES = st.one_of(texts(), texts(), images())


FEW = 24
"""Entries of the weights whose dense blocks are tried: as many passes over balls as these are."""


def certificates(one: Pass) -> list[rc.Certificate]:
    """Of all sequences, and the dense blocks of a small weight; none too near for a decision."""
    passes = partial(rc.certify, one.model, one.corpus, digits=20)
    numbers = range(len(one.corpus.label))
    try:
        found = [passes([*OF, "eigenvalues"], sequences=numbers)]
    except UndecidedError:
        return []
    except EmptyError:  # no label is reached, so that A and G have no row
        found = [passes([name for name in OF if name not in "AG"], sequences=numbers)]
    sizes = {name: d_out * d_in for name, (d_out, d_in) in one.model.config.linear_layers().items()}
    layer = min(sizes, key=lambda name: sizes[name])
    if sizes[layer] <= FEW:
        found.append(passes(BLOCKS, layers=layer, sequences=[0], fisher="signed"))
    return found


def shares(one: Pass) -> dict[str, list[float]]:
    """{"probable: logits": the shares that the dtypes' errors use, ...}."""
    found: dict[str, list[float]] = {}
    for route in (route for made in certificates(one) for route in made.routes):
        for kind in BUDGETS:
            used = route.used(kind)
            if used is not None:
                name = f"a pass, {kind}: {route.name.partition('.')[0]}"
                found.setdefault(name, []).append(used)
    return found
