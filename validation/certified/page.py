"""Where a command of this folder writes what it found: between its marks in README.md.

`python -m validation.certified.page` names the tables that are of other code than today's.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
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

KEEPING = frozenset(
    {
        "certified/certificate_file.py",
        "certified/estimate.py",
        "certified/planning.py",
        "curvature/bases_file.py",
        "curvature/checkpoint.py",
        "curvature/factors_file.py",
        "curvature/fingerprint.py",
        "curvature/forecast.py",
        "curvature/parts.py",
        "curvature/plan.py",
        "curvature/resumed_bases.py",
        "curvature/room.py",
        "passes/held.py",
        "passes/parallel.py",
    }
)
"""Their modules that say where numbers are kept, and how many at a time: they change none."""

OWN = {
    "shipped": ("shipped.py",),
    "edit": ("shipped.py",),
    "routes": ("errors.py", "routes.py"),
    "routes of the shipped model": ("errors.py", "routes.py"),
    "peers": ("errors.py", "peers.py", "routes.py"),
    "factors": ("errors.py", "factors.py"),
}
"""Mark → the files of this folder that its table is of."""


def write(mark: str, body: str) -> None:
    """Replace what stands between the marks of that name."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    text = README.read_text(encoding="utf-8")
    before, rest = text.partition(begin)[0], text.partition(end)[2]
    README.write_text(f"{before}{begin}\n\n{body}\n\n{end}{rest}", encoding="utf-8")


class _WithoutProse(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Docstrings are left out."""
        return None if isinstance(node.value, ast.Constant) else node


def code(*own: str, computed: tuple[str, ...] = COMPUTED) -> str:
    """A digest of what is measured: packages or modules of refcurv, and files of this folder.

    Comments, docstrings and layout do not count, nor does `KEEPING`.
    """
    found = hashlib.sha256()
    package = ROOT / "refcurv"
    roots = [package / name for name in computed]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))]
    counted = [path for path in files if path.relative_to(package).as_posix() not in KEEPING]
    for path in sorted([*counted, *(Path(__file__).with_name(name) for name in own)]):
        means = ast.dump(_WithoutProse().visit(ast.parse(path.read_text(encoding="utf-8"))))
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{means}".encode())
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


def of(mark: str) -> str:
    """The digest that a table has today."""
    return code(*OWN[mark])


def stale() -> list[str]:
    """The marks of tables that are of other code than today's."""
    from validation.certified.budgets import MARKS, versions

    now = {mark: of(mark) for mark in OWN} | {m: versions()[passes] for m, passes in MARKS.items()}
    text = README.read_text(encoding="utf-8")
    return [mark for mark, digest in now.items() if said(text, mark) != digest]


def said(text: str, mark: str) -> str:
    """The digest in a table's first line."""
    table = text.partition(f"<!-- {mark}: begin -->")[2].partition("<!--")[0]
    return "".join(re.findall(r"code ([0-9a-f]{16})\b", table))


if __name__ == "__main__":
    for each in stale():
        print(f"{each}: of other code")
