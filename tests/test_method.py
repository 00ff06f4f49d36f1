"""validation/METHOD.md: every citation in the repository resolves, and every law has its reason."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from refcurv.law.conventions import LAW

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from validation import method  # noqa: E402

CHANGELOG = ROOT / "CHANGELOG.md"
METHOD = method.PAGE.read_text(encoding="utf-8")
HEADINGS = set(method.headings(METHOD))
IDS = [id for id, _ in method.statements(METHOD)]
PLACES = method.law(METHOD)

FOLDERS = ("refcurv", "tests", "validation", ".ci", ".github")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ""}
ELSEWHERE = r"\b(DESIGN|ORACLES|STYLE|PAPER|EXPERIMENTS|PERFORMANCE|ANCHORS)\b(?!`)"
"""Pages that this house was planned on, and that are not in it."""


def files() -> list[Path]:
    """The text that people read or wrote: no results, no history."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    found = top + [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in sorted(found)
        if path.is_file()
        and path.suffix in SUFFIXES
        and path not in (CHANGELOG, method.PAGE, Path(__file__))
        and "__pycache__" not in path.parts
        and ".egg-info" not in str(path)
    ]


def prose(path: Path) -> str:
    """The words of a file, line breaks taken out: of Python comments, strings, functions' names."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return " ".join(re.sub(r"^\s*#+ ", "", text, flags=re.MULTILINE).split())
    parts = [" ".join(re.findall(r"(?:^|\s)# (.*)", text))]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts.append(" ".join(node.value.split()))
        elif isinstance(node, ast.FunctionDef):
            parts.append(node.name.replace("_", " "))
    return "\n".join(part for part in parts if not re.fullmatch(r"[A-Z]{2,}", part))


def dangling(text: str) -> list[str]:
    """The citations of a text in one line that lead nowhere, with what stands around them."""
    out = []
    for name in re.finditer(rf"{ELSEWHERE}|\bissue \d+|\bREAL(?:\.md|,? §)", text):
        out.append(f"no such page: {text[name.start() : name.start() + 40]}")
    for found in re.finditer(r"\bMETHOD\b(?!\.md)(.{0,60})", text):
        heading = re.match(r", (.+)", found[1])
        if not (heading and any(_begins(heading[1], one) for one in HEADINGS)):
            out.append(f"no such heading: METHOD{found[1]}")
    for id in re.findall(r"\b[POBR]\d{1,2}\b", text):
        if id not in IDS:
            out.append(f"no such id: {id}")
    return out


def _begins(text: str, heading: str) -> bool:
    return bool(re.match(re.escape(heading) + r"(?!\w)", text))


def pages(path: Path, text: str) -> list[str]:
    """The pages in capitals (AUDIT.md) and the links to files that do not exist."""
    named = re.findall(r"(?:\.\./)*([\w./-]*\b[A-Z]{3,}\.md)\b", text)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) if path.suffix == ".md" else []
    out = [name for name in named if not _exists(name)]
    return out + [link for link in links if not (path.parent / link).exists()]


def _exists(name: str) -> bool:
    return any(path == name or path.endswith(f"/{name}") for path in _shipped())


@cache
def _shipped() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in [*files(), method.PAGE, CHANGELOG]]


def wrong_test(place: str) -> list[str]:
    """What is wrong with `tests/test_x.py::test_y`, or `tests/test_x.py` for a file as a whole."""
    file, _, test = place.partition("::")
    path = ROOT / file
    if not re.fullmatch(r"tests/(\w+/)*test_\w+\.py", file) or not path.is_file():
        return [f"no such file: {file}"]
    body = ast.parse(path.read_text(encoding="utf-8")).body
    named = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [] if not test or test in named else [f"no such test: {place}"]


def wrong_function(place: str) -> list[str]:
    """What is wrong with `module:function` under `refcurv.`, or `module:Class.attribute`."""
    module, colon, names = place.partition(":")
    if not colon:
        return [f"a module is no function: {place}"]
    try:
        thing = importlib.import_module(f"refcurv.{module}")
        for name in names.split("."):
            thing = inspect.getattr_static(thing, name)
    except (ImportError, AttributeError):
        return [f"no such function: {place}"]
    return []


def readme(text: str) -> dict[str, list[str]]:
    """Name → the `module:function` of the law's table in the README, where it has them."""
    rows = re.findall(r"^\| `([A-Z, ]+)` \| (.+) \|$", text, re.MULTILINE)
    return {name: re.findall(r"`(?:refcurv\.)?([\w.]+:[\w.]+)`", rest) for name, rest in rows}


# ------------------------------------------------------------------ citations


@pytest.mark.slow
def test_every_citation_leads_somewhere() -> None:
    texts = {path: prose(path) for path in files()}
    found = {path: dangling(text) + pages(path, text) for path, text in texts.items()}
    assert {path: citations for path, citations in found.items() if citations} == {}


def test_the_page_cites_itself_rightly() -> None:
    text = " ".join(METHOD.split())
    bare = text.replace('"METHOD, Files" means', "")
    assert dangling(bare) + pages(method.PAGE, bare) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Source: DESIGN §5; O15.", "no such page: DESIGN §5"),
        ("Source: ORACLES 49.", "no such page: ORACLES 49"),
        ("see (STYLE R15)", "no such page: STYLE"),
        ("they differ (PAPER §2)", "no such page: PAPER §2"),
        ("the control of issue 5", "no such page: issue 5"),
        ("METHOD, Exactitude", "no such heading: METHOD, Exactitude"),
        ("METHOD, Filesystem", "no such heading: METHOD, Filesystem"),
        ("as METHOD says", "no such heading: METHOD says"),
        ("the sign (O67)", "no such id: O67"),
        ("Source: P4-P12.", "no such id: P12"),
        ("planted: B83", "no such id: B83"),
        ("rule R7", "no such id: R7"),
    ],
)
def test_a_dangling_citation_is_seen(text: str, wrong: str) -> None:
    assert dangling(text)[0].startswith(wrong)


def test_a_sound_citation_is_left_alone() -> None:
    text = (
        "METHOD, Files (populations); METHOD, Later work: P5-P8, O24, B51 and R6; `REAL`, METHOD.md"
    )
    assert dangling(text) == pages(ROOT / "README.md", text) == []


def test_a_citation_may_be_split_over_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('"""Agree (METHOD,\nLater work)."""\n\n# of (METHOD,\n# Later work), O24\n')
    assert dangling(prose(file)) == []
    file.write_text(
        '"""Agree (METHOD,\nLast work)."""\n\ndef test_O67_x(): ...  # as METHOD,\n# Fil\n'
    )
    assert len(dangling(prose(file))) == 3


def test_a_page_or_link_that_is_not_there_is_seen() -> None:
    text = "see DESIGN.md, [a](validation/NONE.md), [b](pyproject.toml)"
    wrong = ["DESIGN.md", "validation/NONE.md", "validation/NONE.md"]
    assert pages(ROOT / "README.md", text) == wrong


# ------------------------------------------------------------------ what is cited


def test_every_id_is_defined_once_and_in_order() -> None:
    last = {"P": 11, "R": 6, "O": 66, "B": 82}
    assert IDS == [
        *(f"P{n}" for n in range(1, last["P"] + 1)),
        "R6",
        *(f"{kind}{n}" for kind in "OB" for n in range(1, last[kind] + 1)),
    ]


def test_no_two_headings_have_one_name() -> None:
    headings = sorted(method.headings(METHOD))
    assert all(one != two for one, two in pairwise(headings))


def test_the_law_has_its_headings_in_order() -> None:
    assert list(PLACES) == list(LAW)


@pytest.mark.parametrize("name", LAW)
def test_every_law_has_its_reason_and_its_places(name: str) -> None:
    """Decided, defined, computed fast, proved: each leads to a function or a test that exists."""
    reason, places = PLACES[name]
    assert reason.rstrip().endswith(".")
    assert {"decided", "defined", "proved"} <= set(places)
    functions = [place for role in method.ROLES[:3] for place in places.get(role, [])]
    wrong = [fault for place in functions for fault in wrong_function(place)]
    wrong += [fault for place in places["proved"] for fault in wrong_test(place)]
    assert wrong == []
    assert all(place.startswith("law.conventions:") for place in places["decided"])


@pytest.mark.parametrize("name", LAW)
def test_the_readme_names_no_other_places(name: str) -> None:
    places = PLACES[name][1]
    known = {place for role in method.ROLES[:3] for place in places.get(role, [])}
    assert set(readme((ROOT / "README.md").read_text(encoding="utf-8"))[name]) <= known


def test_a_place_that_is_not_there_is_seen() -> None:
    assert (
        wrong_function("law.conventions:LAW")
        == wrong_function("curvature.factors:Factor.A_joint")
        == []
    )
    assert wrong_function("law.conventions:LAWS") == ["no such function: law.conventions:LAWS"]
    assert wrong_function("law.convention:LAW") == ["no such function: law.convention:LAW"]
    assert wrong_function("law.conventions") == ["a module is no function: law.conventions"]
    assert wrong_test("tests/test_law.py") == []
    assert wrong_test("tests/test_law.py::test_none") == [
        "no such test: tests/test_law.py::test_none"
    ]
    assert wrong_test("tests/test_none.py") == ["no such file: tests/test_none.py"]
    assert readme("| `SHARD, BLOCK` | a. | `refcurv.a.b:c`, `d:e` |") == {
        "SHARD, BLOCK": ["a.b:c", "d:e"]
    }
