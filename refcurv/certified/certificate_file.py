"""Certificates in a file: float64 whose exact sums are the midpoints, and the radii about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.certified.certificate import ROUTES, Certificate, Enclosed, Route
from refcurv.files import store
from refcurv.files.disk import parse_json
from refcurv.files.paths import one_line
from refcurv.law.checks import (
    ConventionError,
    SchemaError,
    require_choice,
    require_finite,
    require_range,
)

MOST: Final = float(np.finfo(np.float64).max)


def save_certificate(made: Certificate, path: str | Path) -> None:
    """Write a certificate: NAME/{parts, radius}, float64 (METHOD, Files).

    Args:
        made: the certificate.
        path: of the file (.h5), which is written whole or not at all.

    Raises:
        ConventionError: it is no certificate.
        StorageError: the disk is full, or the path cannot be written to.

    Cost: the arrays once; for a million numbers of 30 digits 32 MB.
    Proof: tests/test_certified.py::test_a_file_holds_the_certificate
    """
    if not isinstance(made, Certificate):
        raise ConventionError(
            f"save_certificate: a Certificate, such as rc.certify makes, is needed; "
            f"got {type(made).__name__}."
        )
    attributes: dict[str, str | int | float] = {
        "bits": made.bits,
        "wanted": made.wanted,
        "rows": json.dumps(dict(made.rows)),
        "source": json.dumps(dict(made.source)),
        "spectra": json.dumps(dict(made.spectra)),
        "cuts": json.dumps(dict(made.cuts)),
        "routes": json.dumps([_told(route) for route in made.routes]),
    }

    def entries() -> Iterator[store.Entry]:
        for name, one in made.items():
            yield store.Entry(f"{name}.parts", one.parts)
            yield store.Entry(f"{name}.radius", one.radius)

    store.write(
        path,
        format="refcurv-certificate",
        attributes=attributes,
        arrays=entries(),
        provenance=store.provenance(
            inputs=made.source.get("inputs", {}), bits=made.bits, wanted=made.wanted
        ),
    )


def load_certificate(path: str | Path) -> Certificate:
    """Read a certificate; FLINT is not needed for it.

    Raises:
        SchemaError: no certificate, or one whose arrays are not float64, do not fit each other, or
        have a radius that is negative or NaN.
        ChecksumError: an array is not the one that was written.
    """
    header = store.open_file(path, format="refcurv-certificate")
    numbers = {name: _read(header, path, name) for name in _names(header, path)}
    told = header.attributes.get
    try:
        rows, source = _rows(_object(told("rows"))), _source(_object(told("source")))
        spectra, cuts = (_facts(told(n, "{}"), *FACTS[n]) for n in FACTS)  # older files have none
        routes = tuple(_route(numbers, *one) for one in _list(told("routes")))
        bits = _whole("bits", told("bits"), 1, 2**20)
        wanted = require_range("load_certificate", "wanted", _number(told("wanted")), 1, 10**6)
    except (ValueError, TypeError, RecursionError) as error:
        what = f"{path}: an attribute of the certificate is damaged"
        raise SchemaError(f"{what}: {one_line(error)}.") from None
    return Certificate(numbers, routes, bits, wanted, rows, source, spectra, cuts)


def _names(header: store.Header, path: str | Path) -> list[str]:
    """Of the arrays, in order; SchemaError where one has parts or a radius alone."""
    found: dict[str, set[str]] = {}
    for entry in header.entries:
        name, _, end = entry.rpartition(".")
        found.setdefault(name, set()).add(end)
    for name, ends in found.items():
        if ends != {"parts", "radius"}:
            held = ", ".join(sorted(ends))
            raise SchemaError(f"{path}: {name!r} must hold parts and radius; it holds {held}.")
    return list(found)


def _read(header: store.Header, path: str | Path, name: str) -> Enclosed:
    """One array: parts of falling size, and radii that are no NaN and not negative."""
    parts, radius = (store.read(header, f"{name}.{end}") for end in ("parts", "radius"))
    if {parts.dtype, radius.dtype} != {np.dtype(np.float64)}:
        raise SchemaError(f"{path}: {name} is of {parts.dtype}, {radius.dtype}; both are float64.")
    if parts.ndim < 1 or not len(parts) or parts.shape[1:] != radius.shape:
        raise SchemaError(f"{path}: {name} has parts {parts.shape} and radii {radius.shape}.")
    require_finite("load_certificate", name, parts)
    if not (radius >= 0).all():
        raise SchemaError(f"{path}: {name} has a radius that is negative or NaN.")
    if (np.abs(parts[1:]) > np.spacing(np.abs(parts[:-1])) / 2).any():
        raise SchemaError(f"{path}: {name} has a part above half an ulp of the one before.")
    return Enclosed(parts, radius)


def _object(told: object) -> dict[str, Any]:
    """An attribute that is a JSON object."""
    return parse_json("load_certificate: it", str(told))


def _list(told: object) -> list[Any]:
    """An attribute that is a JSON list."""
    found = _object(f'{{"list": {told}}}')["list"]
    if not isinstance(found, list):
        raise TypeError(f"a list is needed; got {str(told)[:40]!r}")
    return found


def _rows(found: dict[str, Any]) -> dict[str, int]:
    """{A or G of a layer: how many rows}."""
    return {name: _whole(f"rows of {name:.60}", n, 0, 2**63) for name, n in found.items()}


def _source(found: dict[str, Any]) -> dict[str, Any]:
    """What it is of; labels, where they are told, as `labels.Drawn` tells them."""
    json.dumps(found, allow_nan=False)  # 1e999 is infinite, and then no number of JSON
    if not isinstance(found.get("inputs", {}), dict):
        raise TypeError("inputs must be {file: SHA-256}")
    zeros = found.get("zeros", {})
    if not isinstance(zeros, dict) or not all(x and isinstance(x, list) for x in zeros.values()):
        raise TypeError("zeros must be {identity: [names]}")
    if "labels" not in found:
        return found
    labels, most = found["labels"], 2**63
    if not isinstance(labels, dict) or {*labels} != {"drawn", "same", "other", "undecided"}:
        raise TypeError("of labels must be told drawn, same, other, undecided")
    _whole("same", labels["same"], 0, most)
    for key, count in (("other", 4), ("undecided", 3)):
        if not isinstance(labels[key], list):
            raise TypeError(f"{key} must be a list")
        for one in labels[key]:
            if not isinstance(one, list) or len(one) != count:
                raise TypeError(f"{key} must hold lists of {count} numbers")
            for n in one:
                _whole(key, n, 0, most)
    _whole("seed", found.get("seed"), 0, 2**64 - 1)
    return found


FACTS: Final = {
    "spectra": (("size", "zeros", "unsure", "clusters"), ("fewest", "median", "angle")),
    "cuts": (("rho", "pairs", "kept", "cut", "undecided"), ("nearest", "float64")),
}
"""What is told of each matrix and of each cut: numbers, and others of which some may be None."""


def _facts(told: object, always: tuple[str, ...], perhaps: tuple[str, ...]) -> dict[str, Any]:
    """{name: {fact: a number >= 0, or None}}."""
    found = _object(told)
    for name, one in found.items():
        if not isinstance(one, dict) or {*one} != {*always, *perhaps}:
            raise TypeError(f"of {name:.60} must be told {', '.join((*always, *perhaps))}")
        for key, value in one.items():
            if key in always and key != "rho":
                _whole(key, value, 0, 2**63)
            elif value is not None or key in always:
                require_range("load_certificate", key, _number(value), 0, MOST)
        if (one.get("fewest") is None) != (one.get("median") is None):
            raise TypeError(f"of {name:.60} one of fewest and median is missing")
        if "pairs" in one and one["pairs"] != one["kept"] + one["cut"] + one["undecided"]:
            raise ValueError(f"the pairs of {name:.60} are not those kept, cut and undecided")
    return found


def _number(told: object) -> float | str:
    number = isinstance(told, int | float) and not isinstance(told, bool)
    return told if number else repr(told)[:40]  # type: ignore[return-value]


def _whole(what: str, told: object, least: int, most: int) -> int:
    """A whole number in a range."""
    if isinstance(told, bool) or not isinstance(told, int):
        raise TypeError(f"{what} must be a whole number; got {repr(told)[:40]}")
    require_range("load_certificate", what, told, least, most)
    return told


def _told(route: Route) -> list[str | None]:
    """Its fields: floats as Python writes them, which JSON has no infinity for."""
    far = (route.error, route.spread, route.probable, route.worst)
    return [route.name, route.dtype, *(None if x is None else repr(x) for x in far)]


def _route(
    numbers: Mapping[str, Enclosed], name: str, dtype: str, error: str, *more: str | None
) -> Route:
    """Of its name, dtype and error alone, as the first certificates have it, or of all."""
    require_choice("load_certificate", "a route", name, numbers)
    require_choice("load_certificate", "its dtype", dtype, ROUTES)
    far = [
        None if x is None else require_range("load_certificate", "its error", x, 0, math.inf)
        for x in (error, *more)
    ]
    if far[0] is None or (more and (len(far) != 4 or far[1] is None)):
        raise ValueError(f"the route of {name!r} has no error")
    return Route(name, dtype, far[0], *far[1:])  # type: ignore[arg-type]
