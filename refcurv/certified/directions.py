"""The direction of products H v and GGN v: signs that any language can draw, or one's own."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import numpy as np

from refcurv.law.checks import (
    Array,
    ConventionError,
    DTypeError,
    as_array,
    require_choice,
    require_dtype,
    require_finite,
    require_shape,
)
from refcurv.model.sampling import signs


def direction_of(
    parameters: Mapping[str, Array], given: Mapping[str, Array] | None
) -> dict[str, Array]:
    """A direction of all parameters: what is given, 0 where it says nothing; signs without any.

    Proof: tests/test_certified.py::test_a_part_of_a_direction_is_0_elsewhere,
        ::test_products_are_those_of_exact
    """
    return signs_of(parameters) if given is None else _own(parameters, given)


def said_of(direction: Mapping[str, Array], given: object) -> str:
    """Which direction: "signs", or the SHA-256 of what was given.

    It is that of the float64 of every parameter, little-endian, in the model's order.

    Proof: tests/test_certified.py::test_a_certificate_says_what_it_is_of
    """
    if given is None:
        return "signs"
    said = sha256()
    for v in direction.values():
        said.update(np.ascontiguousarray(v, "<f8").tobytes())
    return said.hexdigest()


def signs_of(parameters: Mapping[str, Array], seed: int = 0, number: int = 0) -> dict[str, Array]:
    """A sign for each entry: any language can draw them again (SAMPLING)."""
    return {
        name: signs(seed, number, i, 0, x.size).reshape(x.shape).astype(np.float64)
        for i, (name, x) in enumerate(parameters.items())
    }


def _own(parameters: Mapping[str, Array], direction: Mapping[str, Array]) -> dict[str, Array]:
    """A direction of all parameters, 0 where it says nothing."""
    if not isinstance(direction, Mapping):
        kind = type(direction).__name__
        raise ConventionError(f"certify: direction must be {{parameter name: array}}; got {kind}.")
    for name in direction:
        require_choice("certify", "direction", name, list(parameters))
    out = {}
    for name, x in parameters.items():
        v = as_array("certify", f"direction[{name!r}]", direction.get(name, np.zeros(x.shape)), "")
        require_shape("certify", f"direction[{name!r}]", v, x.shape, name)
        require_dtype("certify", f"direction[{name!r}]", v, "fiub", "real numbers")
        require_finite("certify", f"direction[{name!r}]", v)
        with np.errstate(over="ignore"):  # what is beyond float64 differs from it
            out[name] = v.astype(np.float64)
        if (out[name].astype(object) != v.astype(object)).any():
            raise DTypeError(
                f"certify: direction[{name!r}] has numbers of {v.dtype} that are not float64."
            )
    return out
