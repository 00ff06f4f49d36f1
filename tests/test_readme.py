"""README.md: its example runs, its commands and links are there, its promises have a command.

The table of the law is tested in test_law.py, the demo's numbers in test_demo.py.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from refcurv.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import refcurv  # noqa: E402
from validation import first_page  # noqa: E402

PAGES = ("README.md", ".github/CONTRIBUTING.md")
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """What a page's shell blocks and its code between backticks ask for, word by word."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|pytest|refcurv) [^`]+)`", text)
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [part for part in parts if part]


def promises() -> list[tuple[str, str]]:
    """The rows (promise, command) of "How we know"."""
    part = README.partition("## How we know\n")[2].partition("\n## ")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in part.splitlines() if "| " in line]
    return [(promise, command) for promise, command in rows[2:]]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the page's titles."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.slow
def test_the_example_prints_what_the_page_says() -> None:
    text = first_page.between(README, "example").replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_are_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of `refcurv` the command and its flags, of `pytest` and `python` the files and modules."""
    seen = 0
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        words[0] = Path(words[0]).name
        if words[0] == "refcurv":
            with pytest.raises(SystemExit) as stop:
                main([words[1], "--help"])
            assert stop.value.code == 0, words
            text = capsys.readouterr().out
            for flag in (word for word in words if word.startswith("-")):
                assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), (words, flag)
        for word in words if words[0] in ("pytest", "python") else ():
            path, _, test = word.partition("::")
            if path.endswith(".py"):
                assert (ROOT / path).is_file(), words
                assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")
            if word.startswith("validation."):
                module = ROOT / word.replace(".", "/")
                assert any(map(Path.is_file, (module.with_suffix(".py"), module / "__main__.py")))
        seen += words[0] in ("refcurv", "pytest", "python")
    assert seen >= 5


def test_its_line_for_a_model_to_try_makes_both_files(tmp_path: Path, monkeypatch) -> None:
    (words,) = [words for words in commands(README) if words[:2] == ["python", "-c"]]
    monkeypatch.chdir(tmp_path)
    exec(words[2], {})  # the page's own line
    corpus = refcurv.load_corpus("c.h5")
    assert refcurv.load("w.h5").config.layers == 4 and corpus.populations
    assert "whose blocks are 0 to 3" in README


@pytest.mark.parametrize("page", PAGES)
def test_its_links_and_paths_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https://)([^)\s]+)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"
    for path in re.findall(r"`((?:refcurv|tests|validation)/[\w/.]+)", text):
        assert "test_x" in path or (ROOT / path).exists(), f"{page}: {path}"


def test_every_promise_has_its_command() -> None:
    assert len(promises()) > 10
    for promise, command in promises():
        assert re.search(r"`(refcurv|pytest|python) [^`]+`", command), promise


def test_its_counts_are_those_of_the_last_run() -> None:
    measured = json.loads((ROOT / "validation/peers/results.json").read_text(encoding="utf-8"))
    families = {row["family"] for row in measured["rows"].values()}
    assert f"of {len(families)} families" in README


def test_the_version_is_stated_once() -> None:
    version = PROJECT["project"]["version"]
    assert f"version = {{{version}}}," in README


def test_ci_finds_the_test_command() -> None:
    """.ci/run takes the one block behind the mark, as it stands."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    taken = re.search(r'eval "\$\((sed .*)\)"', script)
    assert taken
    found = subprocess.run(
        ["bash", "-c", taken[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    block = re.search(r"<!-- tests -->\n```sh\n(.*)\n```\n", README)
    assert block and found.stdout == block[1] + "\n"
    assert block[1].endswith(".venv/bin/python -m pytest")


def test_the_hooks_are_cis_linters() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"^ +entry: (.+)$", hooks, re.MULTILINE)
    linters = ("ruff", "mypy", "lint-imports")
    assert entries == [line for line in script if line.startswith(linters)]
    assert len(entries) == 4


def test_the_floors_are_the_contracts() -> None:
    part = CONTRIBUTING.partition("## The floors\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \|", part, re.MULTILINE)
    floors = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    said = [{name.strip(" `") for name in row.split(",")} for row in rows]
    assert said == [{name.strip() for name in row.split("|")} for row in floors["layers"]]
    assert len(CONTRIBUTING.splitlines()) <= 80


def test_types_are_shipped() -> None:
    assert (ROOT / "refcurv/py.typed").is_file()
    assert "refcurv" in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_the_reading_order_and_its_lines() -> None:
    """`python -m validation.first_page` after a change of what is read."""
    assert first_page.between(README, "reading") == first_page.reading()
    whole = first_page.imported("curvature/definition.py", "editing/projection.py")
    assert set(first_page.READING) <= whole
    assert sum(map(first_page.lines, whole)) <= first_page.MOST_LINES
    order = str(refcurv.__doc__).partition("To check the mathematics")[2]
    said = re.findall(r"[a-z]+\.[a-z]+", order)
    assert [f"{name.replace('.', '/')}.py" for name in said] == list(first_page.READING)


def test_imports_are_followed_wherever_they_stand() -> None:
    found = first_page.imported("curvature/definition.py")
    assert {"model/fisher.py", "model/sampling.py", "model/loss.py", "law/checks.py"} <= found
    hidden = (
        "def f():\n    from refcurv.model import rows\n    from refcurv.law.checks import PART\n"
    )
    assert set(first_page._imports(hidden)) >= {"model/rows.py", "law/checks.py"}
