"""One ModelConfig for every architecture, the names of its parameters, and the Model record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.law.checks import (
    Array,
    ConventionError,
    NameUnknownError,
    RangeError,
    ShapeError,
    require_choice,
)
from refcurv.law.conventions import COMPUTE_DTYPES

LARGEST = float(np.finfo(np.float64).max)


class NormPlace(StrEnum):
    """Where a block normalises: before attention and MLP (Llama), or behind them (OLMo-2)."""

    PRE = "pre"
    POST = "post"


class QKNorm(StrEnum):
    """RMSNorm on queries and keys: none, over each head's width, or over all heads at once."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder of the Llama and OLMo-2 families. What differs is data.

    Every field is checked on construction; a contradiction is a ConventionError or RangeError.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_place: NormPlace
    qk_norm: QKNorm
    norm_eps: float
    rope_theta: float
    tied: bool

    def __post_init__(self) -> None:
        """Refuse what no decoder can be."""
        who = "ModelConfig"
        for name in (
            "vocabulary",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RangeError(f"{who}: {name} must be a positive integer; got {value!r}.")
        if self.heads % self.kv_heads:
            raise ConventionError(
                f"{who}: heads must be a multiple of kv_heads; got {self.heads}, {self.kv_heads}."
            )
        if self.head_width % 2:
            raise ConventionError(
                f"{who}: head_width must be even for rotary positions; got {self.head_width}."
            )
        place = require_choice(who, "norm_place", self.norm_place, NormPlace)
        qk = require_choice(who, "qk_norm", self.qk_norm, QKNorm)
        object.__setattr__(self, "norm_place", NormPlace(place))
        object.__setattr__(self, "qk_norm", QKNorm(qk))
        for name, least in (("norm_eps", 0.0), ("rope_theta", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RangeError(f"{who}: {name} must be a number; got {value!r}.")
            if not least <= value <= LARGEST:
                raise RangeError(
                    f"{who}: {name} must be finite and >= {least:g}; got {value!r:.40}."
                )
            object.__setattr__(self, name, float(value))
        if not isinstance(self.tied, bool):
            raise ConventionError(f"{who}: tied must be true or false; got {self.tied!r}.")

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in file order."""
        D, M, E = self.width, self.mlp_width, self.head_width
        Q, KV = self.heads * E, self.kv_heads * E
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocabulary, D)}
        for i in range(self.layers):
            block = f"blocks.{i}."
            shapes[block + "attn_norm.weight"] = (D,)
            shapes[block + "attn.q.weight"] = (Q, D)
            shapes[block + "attn.k.weight"] = (KV, D)
            shapes[block + "attn.v.weight"] = (KV, D)
            if self.qk_norm is not QKNorm.NONE:
                full = self.qk_norm is QKNorm.FULL
                shapes[block + "attn.q_norm.weight"] = (Q if full else E,)
                shapes[block + "attn.k_norm.weight"] = (KV if full else E,)
            shapes[block + "attn.o.weight"] = (D, Q)
            shapes[block + "mlp_norm.weight"] = (D,)
            shapes[block + "mlp.gate.weight"] = (M, D)
            shapes[block + "mlp.up.weight"] = (M, D)
            shapes[block + "mlp.down.weight"] = (D, M)
        shapes["final_norm.weight"] = (D,)
        if not self.tied:
            shapes["head.weight"] = (self.vocabulary, D)
        return shapes

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Every linear layer's name and (d_out, d_in), in file order; the head is the last."""
        layers = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.parameter_shapes().items()
            if len(shape) == 2 and name != "embed.weight"
        }
        layers["head"] = (self.vocabulary, self.width)
        return layers

    def weight_of(self, layer: str) -> str:
        """The parameter that linear layer `layer` multiplies by: the embedding for a tied head."""
        return "embed.weight" if layer == "head" and self.tied else f"{layer}.weight"

    def input_of(self, layer: str) -> str:
        """The name of the input that `layer` reads; q, k, v share one, and gate, up another."""
        block, _, name = layer.rpartition(".")
        if name in ("q", "k", "v"):
            return f"{block}.qkv"
        return f"{block}.gate_up" if name in ("gate", "up") else layer

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {key: str(v) if isinstance(v, StrEnum) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object) -> ModelConfig:
        """The reverse of `to_json`; unknown or missing fields are a ConventionError."""
        if not isinstance(data, dict):
            raise ConventionError(
                f"ModelConfig: expected a JSON object; got {type(data).__name__}."
            )
        known = {f.name for f in fields(cls)}
        if set(data) != known:
            missing, unknown = sorted(known - set(data)), sorted(set(data) - known)
            raise ConventionError(
                f"ModelConfig: missing fields {missing}, unknown fields {unknown}. "
                "Was the file written by another version of refcurv?"
            )
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Model:
    """A configuration, its parameters by name, and how each of them is stored.

    Fields:
        config: the ModelConfig.
        parameters: Mapping from name to array in `dtype`; may read lazily from a file.
        dtype: what the passes compute in (PRECISION).
        stored: Mapping from name to the dtype in which the source holds it ("float32",
            "bfloat16", ...); a parameter without an entry is stored in the dtype of its array.
        source: Mapping of what the parameters were read from, for provenance (may be empty).
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    dtype: str = "float64"
    stored: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Refuse an unknown dtype and parameters that the configuration does not ask for."""
        require_choice("Model", "dtype", self.dtype, COMPUTE_DTYPES)
        wanted = set(self.config.parameter_shapes())
        have = set(self.parameters)
        if wanted != have:
            raise NameUnknownError(
                f"Model: missing parameters {sorted(wanted - have)[:4]}, unknown parameters "
                f"{sorted(have - wanted)[:4]}; the configuration asks for {len(wanted)}."
            )

    def with_parameters(self, changed: Mapping[str, Array]) -> Model:
        """The same model with some parameters replaced; shapes are checked, arrays are copied."""
        shapes = self.config.parameter_shapes()
        replaced: dict[str, Array] = {}
        for name, array in changed.items():
            if name not in shapes:
                raise NameUnknownError(f"with_parameters: the model has no parameter {name!r}.")
            if np.shape(array) != shapes[name]:
                raise ShapeError(
                    f"with_parameters: {name} must be {shapes[name]}; got {np.shape(array)}."
                )
            own = np.array(array, dtype=self.dtype)
            own.flags.writeable = False
            replaced[name] = own
        return Model(
            self.config, _Overlay(self.parameters, replaced), self.dtype, self.stored, self.source
        )


class _Overlay(Mapping[str, Array]):
    """A mapping with some entries replaced, lazy in the others."""

    def __init__(self, base: Mapping[str, Array], top: Mapping[str, Array]) -> None:
        under = base if isinstance(base, _Overlay) else None
        self._base: Mapping[str, Array] = under._base if under else base
        self._top: dict[str, Array] = {**(under._top if under else {}), **top}

    def __getitem__(self, name: str) -> Array:
        return self._top[name] if name in self._top else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def expand(pattern: str, names: list[str]) -> list[str]:
    """The names that `pattern` matches, in their order.

    `*` stays within one dotted part, `**` crosses parts, `{a,b}` and ranges `{23-25}` list
    alternatives; patterns may be joined by commas outside braces. A pattern that matches nothing
    is an error: a typo must not be an empty set.
    """
    chosen: set[str] = set()
    for part in re.split(r",(?![^{]*\})", pattern):
        regex = re.compile(_regex(part.strip()))
        hits = {name for name in names if regex.fullmatch(name)}
        if not hits:
            some = ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names)
            raise NameUnknownError(f"pattern {part.strip()!r} matches none of: {some}.")
        chosen |= hits
    return [name for name in names if name in chosen]


def _regex(pattern: str) -> str:
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + r"[^.]*", i + 1
        elif pattern[i] == "{":
            end = pattern.find("}", i)
            if end < 0:
                raise NameUnknownError(f"pattern {pattern!r} opens a brace and never closes it.")
            out += "(?:" + "|".join(_alternative(a) for a in pattern[i + 1 : end].split(",")) + ")"
            i = end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def _alternative(text: str) -> str:
    bounds = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text.strip())
    if not bounds:
        return _regex(text.strip())
    low, high = int(bounds[1]), int(bounds[2])
    if low > high:
        raise NameUnknownError(f"range {{{text}}} runs backwards.")
    return "|".join(str(n) for n in range(low, high + 1))
