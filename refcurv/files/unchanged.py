"""Whether the files that an output is made from are still what they were when they were opened.

An output names its inputs by their SHA-256. So what was read and what was hashed must be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from refcurv.files.disk import file_sha256, identity
from refcurv.files.paths import machine_faults
from refcurv.law.checks import SchemaError

Seen = Mapping[Path, tuple[int, ...]]
"""Path → what changes when the file is replaced or written to (`identity`)."""


def seen(who: str, paths: Iterable[Path]) -> Seen:
    """What the files are now. To be asked before the first of them is read."""
    out = {}
    for path in paths:
        with machine_faults(who, path):
            out[path] = identity(path)
    return out


def require_unchanged(who: str, files: Seen) -> None:
    """SchemaError if one of the files is gone, was replaced or written to.

    Proof: tests/test_conversion.py::test_a_checkpoint_that_changes_meanwhile_is_refused,
        tests/test_texts.py::test_a_file_that_changes_meanwhile
    """
    for path, which in files.items():
        with machine_faults(who, path):
            if not path.exists() or identity(path) != which:
                raise SchemaError(
                    f"{who}: {str(path)!r} was replaced or changed meanwhile. Start again with it."
                )


def sha256_unchanged(who: str, files: Seen) -> dict[Path, str]:
    """The SHA-256 of each file, hashed now; raises as `require_unchanged`.

    Asked when all has been read, it is of the bytes that were read.
    """
    require_unchanged(who, files)
    found = {path: file_sha256(path) for path in files}
    require_unchanged(who, files)
    return found


def inputs_unchanged(who: str, files: Seen) -> dict[str, str]:
    """`sha256_unchanged` by the names of the files, all of one folder."""
    return {path.name: sha256 for path, sha256 in sha256_unchanged(who, files).items()}
