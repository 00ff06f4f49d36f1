"""A model in memory: its configuration and its parameters by name, and patterns over names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from refcurv.law.checks import Array, NameUnknownError, ShapeError, require_choice
from refcurv.law.conventions import COMPUTE_DTYPES
from refcurv.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Model:
    """A configuration, its parameters by name, and how each of them is stored.

    Fields:
        config: the ModelConfig.
        parameters: Mapping from name to array in `dtype`; it may read lazily from a file.
        dtype: what the passes compute in (PRECISION).
        stored: Mapping from name to the dtype in which the source holds it ("float32",
            "bfloat16", ...); a parameter without an entry is stored in the dtype of its array.
        source: Mapping that says where the parameters were read from; may be empty.
        edits: what was done to the parameters before, oldest first, as JSON values; see
            `refcurv.editing.record.after`.
    """

    config: ModelConfig
    parameters: Mapping[str, Array]
    dtype: str = "float64"
    stored: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    edits: tuple[Mapping[str, Any], ...] = ()

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
        return replace(self, parameters=Overlay(self.parameters, replaced))


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
                raise NameUnknownError(f"pattern {pattern!r} has a '{{' without a '}}'.")
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
        raise NameUnknownError(f"range {{{text}}} runs backwards; write {{{high}-{low}}}.")
    return "|".join(str(n) for n in range(low, high + 1))
