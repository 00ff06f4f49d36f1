"""Where a command of this folder writes what it found: between its marks in README.md."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

README = Path(__file__).with_name("README.md")
ROOT = Path(__file__).resolve().parents[2]
COMPUTED = ("algebra", "certified", "curvature", "law", "model", "passes")
"""The packages of refcurv that compute."""


def write(mark: str, body: str) -> None:
    """Replace what stands between the marks of that name."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    text = README.read_text(encoding="utf-8")
    before, rest = text.partition(begin)[0], text.partition(end)[2]
    README.write_text(f"{before}{begin}\n\n{body}\n\n{end}{rest}", encoding="utf-8")


def code(*own: str, computed: tuple[str, ...] = COMPUTED) -> str:
    """A digest of what is measured: packages or modules of refcurv, and files of this folder."""
    found = hashlib.sha256()
    roots = [ROOT / "refcurv" / name for name in computed]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))]
    for path in sorted([*files, *(Path(__file__).with_name(name) for name in own)]):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def stamp(command: str, digest: str, *packages: str) -> str:
    """By what, with what and when a table was made."""
    used = ("python-flint", "numpy", "scipy", *packages)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in used)
    return (
        f"`python -m {command}`, {datetime.now(UTC):%Y-%m-%d}; {versions}, {platform.machine()}; "
        f"code {digest}."
    )


@contextmanager
def from_tests() -> Iterator[None]:
    """Modules of tests/ can be imported inside."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "tests"))
