"""What a file is, what it was made from, what it holds, and whether its bytes are intact."""

from __future__ import annotations

import json
from typing import Any

from refcurv.files import store
from refcurv.files.digest import digest
from refcurv.files.paths import PathLike
from refcurv.files.weights import load
from refcurv.progress import Progress, silent


def inspect_file(path: PathLike, progress: Progress = silent) -> dict[str, Any]:
    """A refcurv file of any kind as plain values; every dataset's checksum is verified.

    Returns:
        path, format, version, attributes (JSON texts parsed), provenance, bytes and entries, which
        has a dictionary for each dataset: name, shape, stored (dtype), nbytes, sha256, attributes.
        A weights file also has weights, its digest, and edits, what was done to the weights.

    Raises:
        SchemaError: not one of our files. ChecksumError: names the first damaged dataset.

    Cost: reads and hashes the whole file.
    Proof: tests/test_cli.py::test_inspect_says_what_a_file_is
    """
    header = store.open_file(path)
    entries = []
    progress(0, len(header.entries))
    for done, (name, info) in enumerate(header.entries.items(), start=1):
        store.read(header, name)
        entries.append(
            {
                "name": name,
                "shape": list(info.shape),
                "stored": info.stored,
                "nbytes": info.nbytes,
                "sha256": info.sha256,
                "attributes": dict(info.attributes),
            }
        )
        progress(done, len(header.entries))
    about: dict[str, Any] = {}
    if header.format == "refcurv-weights":
        model = load(header.path)
        about = {"weights": digest(model), "edits": list(model.edits)}
    return {
        "path": header.path,
        "format": header.format,
        "version": header.version,
        **about,
        "attributes": {key: _parsed(value) for key, value in header.attributes.items()},
        "provenance": dict(header.provenance),
        "nbytes": sum(info.nbytes for info in header.entries.values()),
        "entries": entries,
    }


def _parsed(value: object) -> object:
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
