"""The house: its table of contents, its proofs, its public names."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import refcurv
from refcurv.commands import COMMANDS

ROOT = Path(__file__).parents[1]
MODULES = [
    importlib.import_module(m.name)
    for m in pkgutil.walk_packages(refcurv.__path__, "refcurv.")
    if not m.name.endswith("__main__")
]
SOURCES = {module.__name__: inspect.getsource(module) for module in MODULES}


def test_functions_by_name() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        found[path.relative_to(ROOT).as_posix()] = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef)
        }
    return found


TESTS = test_functions_by_name()
del test_functions_by_name


def test_every_proof_resolves() -> None:
    """`Proof: tests/test_x.py::test_y` names a test that exists; `::test_z` repeats the file."""
    for module, source in SOURCES.items():
        for block in re.findall(r"Proof:(.*?)(?:\n\s*\n|\"\"\")", source, re.DOTALL):
            file = ""
            for path, test in re.findall(r"(tests/[\w/]+\.py)?(?:::(\w+))?", block):
                file = path or file
                if path:
                    assert path in TESTS, f"{module}: {path}"
                if test:
                    assert test in TESTS[file], f"{module}: {file}::{test}"
            assert file, f"{module}: a Proof names no test"


def private_names_of_others(source: str) -> list[str]:
    """Names with one leading underscore that a module takes from another one of refcurv.

    Seen are `from refcurv.x import _name`, and `x._name` where x was imported from refcurv.
    """
    tree, found, ours = ast.parse(source), [], {"refcurv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").split(".")[0] == "refcurv":
                ours |= {alias.asname or alias.name for alias in node.names}
                found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Import):
            ours |= {a.asname for a in node.names if a.asname and a.name.startswith("refcurv.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            path = ast.unparse(node)
            if path.split(".")[0] in ours:
                found.append(path)
    return found


def test_the_oracles_import_nothing_but_the_law() -> None:
    """They are a second implementation; what they shared with the first would prove nothing."""
    taken = set()
    for node in ast.walk(ast.parse((ROOT / "tests/oracles.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            taken.add(node.module)
        elif isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
    assert {name for name in taken if name.split(".")[0] not in sys.stdlib_module_names} == {
        "numpy", "refcurv.law.conventions"
    }  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_takes_a_private_name_of_another() -> None:
    found = {name: private_names_of_others(source) for name, source in SOURCES.items()}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "taken",
    [
        "from refcurv.law.checks import _one",
        "from .checks import _one",
        "from refcurv.law import checks\nx = checks._one(2)",
        "from refcurv.law import checks as c\ndef f(): return c._one",
        "import refcurv.law.checks as c\nc._one",
        "import refcurv\nrefcurv.law.checks._one",
    ],
)
def test_private_names_are_seen(taken: str) -> None:
    assert len(private_names_of_others(taken)) == 1
    assert not private_names_of_others(taken.replace("_one", "one"))
    assert not private_names_of_others("import os\nself._one\nos._exit(1)\nrefcurv.__doc__")


def test_no_name_hides_a_module() -> None:
    """`package.x` is the module x of the package, never a function that is called the same."""
    for module in MODULES:
        package, _, name = module.__name__.rpartition(".")
        assert getattr(sys.modules[package], name) is module, module.__name__


def imported_at_once(tree: ast.AST) -> set[str]:
    """What a module's first line to last imports, without what stands in a function."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{one.name}" for one in node.names)}
        elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.dump(node):
            found |= imported_at_once(node)
    return found


def test_no_module_imports_itself() -> None:
    """Whichever is imported first: in a circle that depends on who was."""
    known = {module.__name__ for module in MODULES}
    graph = {
        module.__name__: imported_at_once(ast.parse(SOURCES[module.__name__])) & known
        for module in MODULES
    }
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # CycleError


@pytest.mark.parametrize("name", refcurv.__all__)
def test_public_names_are_documented_and_listed(name: str) -> None:
    thing = getattr(refcurv, name)
    assert inspect.getdoc(thing)
    assert re.search(rf"\b{name}\b", refcurv.__doc__ or "")
    if inspect.isfunction(thing):
        doc = inspect.getdoc(thing) or ""
        wanted = (
            ("Raises:",) if name.startswith("load") else ("Args:", "Raises:", "Cost:", "Proof:")
        )
        for part in wanted:
            assert part in doc, f"{name} has no {part}"


def test_the_contents_name_every_command_and_the_whole() -> None:
    """What `help(refcurv)` lists beside the public names exists, and no command is left out."""
    text = refcurv.__doc__ or ""
    _, _, last = text.rpartition("On the command line")
    for command in COMMANDS:
        assert re.search(rf"\b{command.__name__}\b", last), command.__name__
    called = dict(re.findall(r"^    refcurv\.([\w.]+)[^`]*`(\w+)", text, re.MULTILINE))
    assert called == {"pipeline": "run", "demo": "JOB", "report.folder": "draw"}
    for module, name in called.items():
        assert hasattr(importlib.import_module(f"refcurv.{module}"), name)


@pytest.mark.parametrize(
    "module", [m for m in MODULES if ">>> " in SOURCES[m.__name__]], ids=lambda m: m.__name__
)
def test_doctests(module) -> None:
    assert doctest.testmod(module, extraglobs={"np": __import__("numpy")}).failed == 0


def test_the_top_level_is_what_the_user_fixed() -> None:
    allowed = {"refcurv", "tests", "validation", "pyproject.toml", "README.md", "LICENSE",
               "CHANGELOG.md"}  # fmt: skip
    tracked = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    generated = {"build", "dist", "refcurv.egg-info", "refcurv-demo"}
    assert tracked - generated <= allowed


def test_layers_are_short_enough_to_read() -> None:
    """One screen per idea."""
    for module in MODULES:
        tree = ast.parse(SOURCES[module.__name__])
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node)
                lines = (node.end_lineno or 0) - node.lineno - (len(doc.splitlines()) if doc else 0)
                assert lines <= 60, f"{module.__name__}.{node.name}: {lines} lines"


PEERS = "bergson curvlinops jax kfac_jax kronfluence nngeometry torch transformers".split()
"""What only `validation.peers` needs."""


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "validation").rglob("*.py")) if p.parent.name != "mutation"],
    ids=lambda path: path.stem,
)
def test_every_experiment_can_be_imported(path: Path) -> None:
    """What only a long run would find: a name that an experiment imports is gone."""
    try:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        pytest.skip(f"{error.name} is not installed")
