"""Random small models and batches, drawn by hypothesis, and the assertion that measures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from refcurv.model.config import ModelConfig, NormPlace, QKNorm
from refcurv.model.layers import Layout, causal_layout
from refcurv.model.loss import shift_labels


@dataclass(frozen=True)
class Case:
    """A small model and a batch that it is differentiated on."""

    config: ModelConfig
    parameters: dict[str, np.ndarray] = field(repr=False)
    token: np.ndarray
    real: np.ndarray
    segment: np.ndarray
    label: np.ndarray

    @property
    def layout(self) -> Layout:
        return causal_layout(self.real, self.segment)

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
        out[name] = 1 + 0.3 * x if len(shape) == 1 else x * 1.5 / np.sqrt(shape[-1])
    out["embed.weight"] *= np.sqrt(config.width) / 1.5
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


@st.composite
def configs(draw: st.DrawFn, layers: int = 2) -> ModelConfig:
    kv_heads = draw(st.integers(1, 2))
    return ModelConfig(
        vocabulary=draw(st.integers(2, 6)),
        width=draw(st.integers(2, 6)),
        layers=draw(st.integers(1, layers)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_width=2 * draw(st.integers(1, 2)),
        mlp_width=draw(st.integers(2, 5)),
        norm_place=draw(st.sampled_from(list(NormPlace))),
        qk_norm=draw(st.sampled_from(list(QKNorm))),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3, 0.1])),
        rope_theta=draw(st.sampled_from([3.0, 1e4])),
        tied=draw(st.booleans()),
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


def gap(one: np.ndarray, two: np.ndarray) -> float:
    """|one − two| / |two| in Frobenius norm."""
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))
