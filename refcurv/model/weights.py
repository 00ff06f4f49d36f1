"""A model in memory: its configuration and its parameters by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from refcurv.law.checks import Array, NameUnknownError, ShapeError, as_array, require_choice
from refcurv.law.conventions import COMPUTE_DTYPES
from refcurv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Model:
    """A configuration, its parameters by name, and how each of them is stored.

    Fields:
        config: the ModelConfig.
        parameters: Mapping from name to array in `dtype`; it may read lazily from a file.
        dtype: what the passes compute in (PRECISION).
        stored: name → the dtype that it is stored in, "bfloat16" say; else that of its array.
        source: Mapping that says where the parameters were read from; may be empty.
        edits: what was done to the parameters, oldest first, as JSON (`editing.record.after`).
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    dtype: str = "float64"
    stored: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    edits: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Refuse an unknown dtype, and parameters that are not those of the configuration."""
        require_choice("Model", "dtype", self.dtype, COMPUTE_DTYPES)
        if not (isinstance(self.config, ModelConfig) and isinstance(self.parameters, Mapping)):
            raise ShapeError("Model: needs a ModelConfig, and a mapping of names to arrays.")
        shapes = self.config.parameter_shapes()
        wanted, have = set(shapes), set(map(str, self.parameters))
        if wanted != have:
            raise NameUnknownError(
                f"Model: missing parameters {sorted(wanted - have)[:4]}, unknown parameters "
                f"{sorted(have - wanted)[:4]}; the configuration asks for {len(wanted)}."
            )
        if type(self.parameters) in (dict, MappingProxyType):  # others check what they read
            for name, x in dict[str, Any](self.parameters).items():
                bare = isinstance(x, np.ndarray) and not np.ma.is_masked(x)
                got = f"{x.shape} of {x.dtype}" if bare else type(x).__name__
                if got != (want := f"{shapes[name]} of {self.dtype}"):
                    raise ShapeError(f"Model: {name} must be {want}, as dtype= says; got {got}.")

    def with_parameters(self, changed: Mapping[str, Array]) -> Model:
        """The same model with some parameters replaced; shapes are checked, arrays are copied."""
        shapes = self.config.parameter_shapes()
        replaced: dict[str, Array] = {}
        if not isinstance(changed, Mapping):
            raise ShapeError("with_parameters: needs a mapping of names to arrays.")
        for name, array in changed.items():
            if name not in shapes:
                raise NameUnknownError(f"with_parameters: the model has no parameter {name!r}.")
            given = as_array("with_parameters", name, array, str(shapes[name]))
            if given.shape != shapes[name] or given.dtype.kind in "cOSUMm":
                got = f"{given.shape} of {given.dtype}"
                raise ShapeError(f"with_parameters: {name} must be {shapes[name]}; got {got}.")
            replaced[name] = np.array(given, dtype=self.dtype)
            replaced[name].flags.writeable = False
        return replace(self, parameters=Overlay(self.parameters, replaced))


def resident(model: Model, dtype: DTypeLike | None = None) -> dict[str, Array]:
    """Every parameter, read once, in the model's dtype or in another one."""
    return {x: np.asarray(model.parameters[x], dtype) for x in model.config.parameter_shapes()}


class Overlay(Mapping[str, Array]):
    """`base` with some entries replaced by those of `top`; the others are read when asked for."""

    def __init__(self, base: Mapping[str, Array], top: Mapping[str, Array]) -> None:
        under = base if isinstance(base, Overlay) else None
        self.base: Mapping[str, Array] = under.base if under else base
        self.top: dict[str, Array] = {**(under.top if under else {}), **top}

    def __getitem__(self, name: str) -> Array:
        return self.top[name] if name in self.top else self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)
