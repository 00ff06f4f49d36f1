"""Random small models and batches, drawn by hypothesis, and the assertion that measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from refcurv.model.config import (
    LINEAR,
    ROTARY,
    Activation,
    Image,
    ModelConfig,
    Norm,
    NormPlace,
    Pool,
    QKNorm,
    Residual,
    RopeScaling,
    Scaling,
)
from refcurv.model.labels import shift_labels
from refcurv.model.layers import Layout
from refcurv.model.transformer import image_layout, layout_of


@dataclass(frozen=True)
class Case:
    """A small model and a batch that it is differentiated on.

    Of images, `token` holds the patches (B, n, C·P·P) and the labels are (B, 1).
    """

    config: ModelConfig
    parameters: dict[str, np.ndarray] = field(repr=False)
    token: np.ndarray
    real: np.ndarray
    segment: np.ndarray
    label: np.ndarray

    @property
    def layout(self) -> Layout:
        if self.config.image is not None:
            return image_layout(self.config, len(self.token))
        return layout_of(self.config, self.real, self.segment)

    @property
    def batch(self) -> tuple[np.ndarray, np.ndarray, Layout]:
        return self.token, self.label, self.layout

    def astype(self, dtype: object) -> dict[str, np.ndarray]:
        return {name: array.astype(dtype) for name, array in self.parameters.items()}


def random_parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights of order 1/sqrt(fan-in), gains away from 1, embeddings of order 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in config.parameter_shapes().items():
        x = rng.normal(size=shape)
        if len(shape) == 2:
            out[name] = x * 1.5 / np.sqrt(shape[-1])
        elif name.endswith("_norm.weight"):
            out[name] = 1 - config.norm_offset + 0.3 * x
        else:
            out[name] = 0.5 * x  # biases, and the vectors before an image's patches
    for name in ("embed.weight", "position.weight"):
        if name in out:
            out[name] *= np.sqrt(config.width) / 1.5
    return out


def config(**changes: object) -> ModelConfig:
    """A small OLMo-2 with grouped queries; keyword arguments change it."""
    fields = dict(
        vocabulary=7,
        width=8,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=2,
        mlp_width=5,
        norm_place=NormPlace.POST,
        qk_norm=QKNorm.FULL,
        norm_eps=1e-5,
        rope_theta=100.0,
        tied=False,
    )
    return ModelConfig(**(fields | changes))


def case(seed: int = 0, batch: int = 2, length: int = 6, **changes: object) -> Case:
    """A fixed case: no padding, one segment a row, default labels."""
    made = config(**changes)
    rng = np.random.default_rng(seed + 1)
    token = rng.integers(0, made.vocabulary, (batch, length))
    real = np.ones(token.shape, dtype=bool)
    segment = np.zeros(token.shape, dtype=np.int64)
    return Case(
        made,
        random_parameters(made, seed),
        token,
        real,
        segment,
        shift_labels(token, real, segment),
    )


def arrays_of(part: object) -> Iterator[np.ndarray]:
    """Every array in a trace, or in a part of one."""
    if isinstance(part, np.ndarray):
        yield part
    elif isinstance(part, tuple | list):
        for one in part:
            yield from arrays_of(one)
    elif is_dataclass(part):
        yield from arrays_of([getattr(part, one.name) for one in fields(part)])


Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several: hypothesis draws it, or a seeded generator does."""


def scaled(size: float, seed: int = 0, length: int = 6, **changes: object) -> Case:
    """A pre-norm case whose residual stream is `size` times as large.

    The logits are the same; the gradients of what is added to the stream are 1/size as large.
    """
    fields = dict(norm_place=NormPlace.PRE, qk_norm=QKNorm.NONE, norm_eps=0.0) | changes
    one = case(seed, length=length, **fields)
    stream = ("embed.weight", "position.weight", ".o.weight", ".o.bias", "down.weight", "down.bias")
    parameters = {
        name: array * size if name.endswith(stream) else array
        for name, array in one.parameters.items()
    }
    return replace(one, parameters=parameters)


@st.composite
def configs(draw: st.DrawFn, layers: int = 2, images: bool = False) -> ModelConfig:
    """The whole space of configurations, every option against every other."""
    return any_config(lambda options: draw(st.sampled_from(options)), layers, images)


def any_config(pick: Pick, layers: int = 2, images: bool = False) -> ModelConfig:
    """One point of the whole space of configurations, in which every field takes every value."""
    yes = (False, True)
    kv_heads, blocks = pick((1, 2)), pick(range(1, layers + 1))
    place = pick(list(NormPlace))
    residuals = [r for r in Residual if r is not Residual.SHARED or place is NormPlace.PRE]
    gated, gain = pick(yes), pick(yes)
    kinds = [n for n in LINEAR if (gated or n != "gate") and (images or n != "patch")]
    theta = pick([None, 3.0, 1e4])
    fields: dict[str, object] = dict(
        vocabulary=pick(range(2, 7)),
        width=pick(range(2, 7)),
        layers=blocks,
        heads=kv_heads * pick((1, 2, 3)),
        kv_heads=kv_heads,
        head_width=pick((2, 4)),
        mlp_width=pick(range(2, 6)),
        norm_place=place,
        qk_norm=pick(list(QKNorm)),
        norm_eps=pick([1e-3, 0.1]),
        rope_theta=theta,
        norm=pick(list(Norm)),
        norm_gain=gain,
        norm_offset=gain and pick(yes),
        norm_bias=pick(yes),
        biases=tuple(kind for kind in kinds if pick(yes)),
        gated=gated,
        activation=pick(list(Activation)),
        residual=pick(residuals),
        score_scale=pick([None, 0.3]),
        score_cap=pick([None, 0.7]),
        logit_cap=pick([None, 1.5]),
        qkv_clip=pick([None, 0.8]),
    )
    if theta is not None:
        fields["rope_width"] = width = pick([None, 2])
        turning = width or fields["head_width"]
        fields["rope_scaling"] = _scaling(pick, turning) if pick(yes) else None
        fields["rotary"] = tuple(pick(ROTARY) for _ in range(blocks)) if pick(yes) else ()
        fields["local_theta"] = 20.0
    if images:
        return ModelConfig(**fields, **_image_fields(pick))
    fields["causal"] = causal = pick(yes)
    if causal:
        fields["windows"] = tuple(pick(range(4)) for _ in range(blocks))
    return ModelConfig(
        **fields,
        learned_positions=pick([0, 5]),
        position_offset=pick([0, 2]),
        embed_scale=pick([1.0, 1.7]),
        tied=pick(yes),
    )


@st.composite
def scalings(draw: st.DrawFn, turning: int = 2) -> RopeScaling:
    """How the frequencies of so many entries that turn are stretched."""
    return _scaling(lambda options: draw(st.sampled_from(options)), turning)


def _scaling(pick: Pick, turning: int) -> RopeScaling:
    kind, slow = pick(list(Scaling)), pick([0.3, 1.0])
    long = kind is Scaling.LONGROPE
    return RopeScaling(
        kind=kind,
        factor=pick([0.5, 4.0]),
        original=pick(range(1, 5) if long or kind is Scaling.DYNAMIC else range(1, 41)),
        short=tuple(1 + 0.1 * j for j in range(turning // 2)) if long else (),
        long=tuple(2 + 0.7 * j for j in range(turning // 2)) if long else (),
        slow=slow,
        fast=slow * pick([2.0, 30.0]),
        attention=pick([1.0, 1.2]),
        truncate=pick((False, True)),
    )


def _image_fields(pick: Pick) -> dict[str, object]:
    specials = pick([(), ("cls",), ("cls", "distillation")])
    image = Image(
        channels=pick((1, 2)), height=pick((2, 4)), width=2, patch=pick((1, 2)), specials=specials
    )
    return dict(
        causal=False,
        tied=False,
        image=image,
        pool=pick([Pool.MEAN, Pool.CLS] if specials else [Pool.MEAN]),
        learned_positions=pick([0, image.positions]),
    )


@st.composite
def cases(draw: st.DrawFn, layers: int = 2) -> Case:
    """Models with lengths >= 1, padding on the right, packed segments, own or default labels."""
    made = draw(configs(layers))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    token = np.array(
        draw(
            st.lists(
                st.lists(st.integers(0, made.vocabulary - 1), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    lengths = np.array([draw(st.integers(1, length)) for _ in range(batch)])
    real = np.arange(length) < lengths[:, None]
    starts = np.array([[draw(st.booleans()) for _ in range(length)] for _ in range(batch)])
    segment = np.cumsum(starts, axis=1)
    label = shift_labels(token, real, segment)
    if draw(st.booleans()):  # labels of the corpus's own, some positions without
        own = np.random.default_rng(draw(st.integers(0, 99))).integers(
            -1, made.vocabulary, token.shape
        )
        label = np.where(real, own, -1)
    return Case(
        made, random_parameters(made, draw(st.integers(0, 9999))), token, real, segment, label
    )


@st.composite
def image_cases(draw: st.DrawFn, layers: int = 2) -> Case:
    """Vision transformers, some images without a label."""
    made = draw(configs(layers, images=True))
    assert made.image is not None
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    patch = rng.normal(size=(batch, made.image.patches, made.image.patch_size))
    label = rng.integers(-1, made.vocabulary, (batch, 1))
    shape = (batch, made.image.positions)
    return Case(
        made,
        random_parameters(made, draw(st.integers(0, 9999))),
        patch,
        np.ones(shape, bool),
        np.zeros(shape, np.int64),
        label,
    )


def few(examples: int) -> settings:
    """Fewer examples for a dear test: so many of the 25 of `dev`, more by the profile's share."""
    return settings(max_examples=max(1, examples * settings().max_examples // 25))


MEASURED: dict[str, tuple[float, float]] = {}
"""test → (error, budget), relative, of the assertion that came nearest to its budget."""


def assert_within(got: object, want: object, budget: float, scale: object, what: str) -> float:
    """|got − want| <= budget · |scale| in Frobenius norm; returns the share of the budget used."""
    assert np.shape(got) == np.shape(want), f"{what}: {np.shape(got)} for {np.shape(want)}"
    error = float(np.linalg.norm(np.asarray(got) - np.asarray(want)))
    allowed = budget * float(np.linalg.norm(np.asarray(scale)))
    assert error <= allowed, f"{what}: error {error:.3e} > {allowed:.3e} (budget {budget:.1e})"
    share = error / allowed if allowed else 0.0
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0]
    before = MEASURED.get(test, (0.0, 1.0))
    if share >= before[0] / before[1]:
        MEASURED[test] = (share * budget, budget)
    return share


def size_of(g: np.ndarray) -> float:
    """Its largest entry. What a layer is sent back is what is left of terms as large as others'.

    A LayerNorm of two units, for example, sends almost nothing back.
    """
    return float(np.abs(g).max(initial=1e-3))


def gap(one: np.ndarray, two: np.ndarray) -> float:
    """|one − two| / |two| in Frobenius norm."""
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


@contextmanager
def opened_for_lies(path: Path) -> Iterator[h5py.File]:
    """A file of ours, to be changed: as version 1, of which nothing but the arrays is checked."""
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 1
        if "sha256" in file.attrs:
            del file.attrs["sha256"]
        yield file
