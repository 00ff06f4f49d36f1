"""Certificates in a file: float64 whose exact sums are the midpoints, and the radii about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refcurv.certified.certificate import Certificate, Enclosed, Route
from refcurv.files import store
from refcurv.law.checks import SchemaError, require_finite, require_range


def save_certificate(made: Certificate, path: str | Path) -> None:
    """Write a certificate: NAME/{parts, radius}, float64 (METHOD, Files).

    Args:
        made: the certificate.
        path: of the file (.h5), which is written whole or not at all.

    Raises:
        StorageError: the disk is full, or the path cannot be written to.

    Cost: the arrays once; for a million numbers of 30 digits 32 MB.
    Proof: tests/test_certified.py::test_a_file_holds_the_certificate
    """
    attributes: dict[str, str | int | float] = {
        "bits": made.bits,
        "wanted": made.wanted,
        "rows": json.dumps(dict(made.rows)),
        "source": json.dumps(dict(made.source)),
        "routes": json.dumps([[r.name, r.dtype, repr(r.error)] for r in made.routes]),
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
        provenance=store.provenance(inputs=store.inputs(), bits=made.bits, wanted=made.wanted),
    )


def load_certificate(path: str | Path) -> Certificate:
    """Read a certificate; FLINT is not needed for it.

    Raises:
        SchemaError: no certificate, or one whose arrays are not float64, do not fit each other, or
        have a radius that is negative or NaN.
        ChecksumError: an array is not the one that was written.
    """
    header = store.open_file(path, format="refcurv-certificate")
    names = [name.removesuffix(".parts") for name in header.entries if name.endswith(".parts")]
    numbers = {}
    for name in names:
        parts = store.read(header, f"{name}.parts")
        radius = store.read(header, f"{name}.radius")
        if parts.ndim < 1 or not len(parts) or parts.shape[1:] != radius.shape:
            raise SchemaError(f"{path}: {name} has parts {parts.shape} and radii {radius.shape}.")
        if parts.dtype != np.float64 or radius.dtype != np.float64:
            raise SchemaError(f"{path}: {name} is {parts.dtype} and {radius.dtype}, not float64.")
        if not (radius >= 0).all():
            raise SchemaError(f"{path}: {name} has radii that are negative or NaN.")
        require_finite("load_certificate", name, parts)
        numbers[name] = Enclosed(parts, radius)
    facts = {key: header.attributes.get(key) for key in ("bits", "wanted", "rows", "source")}
    try:
        rows, source = json.loads(str(facts["rows"])), json.loads(str(facts["source"]))
        routes = json.loads(str(header.attributes.get("routes")))
        told = tuple(Route(str(n), str(d), float(e)) for n, d, e in routes)
        bits = int(require_range("load_certificate", "bits", facts["bits"], 1, 2**20))  # type: ignore[arg-type]
        wanted = require_range("load_certificate", "wanted", facts["wanted"], 1, 10**6)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{path}: an attribute of the certificate is damaged: {error}") from None
    return Certificate(numbers, told, bits, wanted, rows, source)
