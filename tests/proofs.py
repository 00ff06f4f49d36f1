"""`pytest --proofs`: does each test that a `Proof:` line names execute what it proves?

Of all tests only those run that a docstring of refcurv/ names. While each runs, and while what it
asks for is set up, every Python function that is entered is written down; what its docstring's
owner is must be among them: a function itself, any method of a class, any function of a module.
Compiled kernels are not seen: set NUMBA_DISABLE_JIT=1 to see them. Tests that are not collected
here (marked slow, or in need of PyTorch) are not asked.
"""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = str(ROOT / "refcurv")

IN_ANOTHER_PROCESS = {"look_after_imports"}
"""What only a command does, of which nothing is seen here."""

Code = tuple[str, str]
"""(file, qualified name) of a function."""


@dataclass(frozen=True)
class Claim:
    """What stands where, as (file, qualified name, "" of a module), and one test that proves it."""

    file: str
    owner: str
    test: str

    def met_by(self, entered: set[Code]) -> bool:
        """Was it executed?"""
        names = {name for file, name in entered if file == self.file}
        start = f"{self.owner}." if self.owner else ""
        return self.owner in names or any(name.startswith(start) for name in names if start != name)


def claims() -> list[Claim]:
    """Every test of every `Proof:` of the package."""
    return [
        Claim(str(path), owner, test)
        for path in sorted(Path(PACKAGE).rglob("*.py"))
        for owner, text in documented(ast.parse(path.read_text(encoding="utf-8")))
        if owner not in IN_ANOTHER_PROCESS
        for test in named(text)
    ]


def documented(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of everything in it."""
    if isinstance(node, ast.Module):
        yield "", ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, ast.get_docstring(child) or ""
            yield from documented(child, f"{prefix}{child.name}.")


def named(text: str) -> list[str]:
    """The tests that a docstring's `Proof:` names, as file::name; of a whole file none."""
    found, file = [], ""
    for block in re.findall(r"Proof:(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL):
        for path, test in re.findall(r"(tests/[\w/]+\.py)?(?:::(\w+))?", block):
            file = path or file
            found += [f"{file}::{test}"] if test else []
    return found


@dataclass
class Proofs:
    """The pytest plugin."""

    claims: list[Claim] = field(default_factory=claims)
    entered: defaultdict[str, set[Code]] = field(default_factory=lambda: defaultdict(set))
    prepared: defaultdict[Code, set[Code]] = field(default_factory=lambda: defaultdict(set))
    last: dict[str, pytest.Item] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = {claim.test for claim in self.claims}
        items[:] = [
            item
            for item in items
            if test_of(item) in wanted and not item.get_closest_marker("peers")
        ]
        self.last = {test_of(item): item for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        test, seen = test_of(item), set[Code]()
        claims = [claim for claim in self.claims if claim.test == test]
        if test in self.entered and not any(claim in claims for claim in self.broken()):
            pytest.skip("proved by other parameters")
        with watched(seen):
            result = yield
        for name in getattr(item, "fixturenames", ()):
            self.prepared[item.path.name, name] |= seen
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        seen = self.entered[test_of(item)]
        with watched(seen):
            result = yield
        for name in getattr(item, "fixturenames", ()):
            seen |= self.prepared[item.path.name, name]
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Any:
        result = yield
        test = test_of(item)
        wrong = [self.tell(claim) for claim in self.broken() if claim.test == test]
        if wrong and item is self.last[test]:
            pytest.fail("\n".join(wrong), pytrace=False)
        return result

    def tell(self, claim: Claim) -> str:
        """One line of a claim that is broken."""
        where = Path(claim.file).relative_to(ROOT)
        return f"{claim.test} does not execute {where}: {claim.owner or 'any function'}"

    def broken(self) -> list[Claim]:
        """The claims whose test ran and did not execute what it proves."""
        return [
            claim
            for claim in self.claims
            if claim.test in self.entered and not claim.met_by(self.entered[claim.test])
        ]


def test_of(item: pytest.Item) -> str:
    """file::name, without parameters."""
    return item.nodeid.partition("[")[0]


@contextmanager
def watched(into: set[Code]) -> Iterator[None]:
    """Write down what of the package is entered, in this thread and in those that it starts."""

    def note(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            into.add((code.co_filename, code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
