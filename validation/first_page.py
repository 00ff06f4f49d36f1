"""The generated parts of README.md: the law, the reading order, and the picture of the demo.

    python -m validation.first_page                              the law and the reading order
    python -m validation.first_page refcurv-demo/results.json    the picture too, of that demo

tests/test_law.py, test_readme.py and test_demo.py fail when README.md says anything else.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refcurv.law.conventions import LAW

ROOT = Path(__file__).parents[1]
PAGE, HOUSE = ROOT / "README.md", ROOT / "refcurv"

READING = {
    "law/conventions.py": "every choice that two right programs could make differently",
    "model/config.py": "the shape of a model, and the names of its parameters",
    "model/layers.py": "norms, rotary positions, attention and MLP, forward and backward",
    "model/transformer.py": "the forward, and the backward that yields a and g of each layer",
    "curvature/definition.py": "A and G",
    "curvature/eigenbasis.py": "U_A, μ and U_G, λ",
    "algebra/selection.py": "which pairs are kept",
    "editing/projection.py": "W'",
}
"""The files that are the whole paper, in the order to read them, and what each defines."""

MOST_LINES = 3000
"""Of the reading, with all that it imports."""

PICTURED = "blocks.3.mlp.gate"
"""The layer whose bands the picture shows."""

STEP = 0.05
"""What one character of a bar stands for."""


def law() -> str:
    """The table of the law: a sentence a line, places without `refcurv.`."""
    rows = [
        f"| `{name}` | {'<br>'.join(one.sentences)} | {'<br>'.join(map(_place, one.where))} |"
        for name, one in LAW.items()
    ]
    return "\n".join(["| name | decision | where |", "| --- | --- | --- |", *rows])


def _place(where: str) -> str:
    return f"`{where.removeprefix('refcurv.')}`"


def reading() -> str:
    """The table of the reading order: lines that are not blank, and those of all imports."""
    rows = [
        f"| {n} | [`{name}`](refcurv/{name}) | {lines(name)} | {what} |"
        for n, (name, what) in enumerate(READING.items(), start=1)
    ]
    also = sorted(imported("curvature/definition.py", "editing/projection.py") - set(READING))
    also = [name for name in also if lines(name) > 1]
    names = ", ".join(f"`{name}`" for name in also)
    rows.append(f"| | what they import: {names} | {sum(map(lines, also))} | |")
    total = sum(map(lines, [*READING, *also]))
    rows.append(f"| | all together | {total} | at most {MOST_LINES} |")
    return "\n".join(["| | file | lines | what it defines |", "| --- | --- | --- | --- |", *rows])


def lines(name: str) -> int:
    """The lines of a file of the package that are not blank."""
    return sum(map(bool, map(str.strip, (HOUSE / name).read_text(encoding="utf-8").splitlines())))


def imported(*names: str) -> set[str]:
    """The files of the package that these files import, directly or not, and themselves."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _imports((HOUSE / name).read_text(encoding="utf-8"))
    return found


def _imports(source: str) -> Iterator[str]:
    """The files that a source imports, wherever in it: `from refcurv.a.b import c` alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(one.name.startswith("refcurv") for one in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refcurv."):
            parts = str(node.module).split(".")[1:]
            for one in [parts, *([*parts, alias.name] for alias in node.names)]:
                for name in ("/".join(one) + ".py", "/".join([*one, "__init__.py"])):
                    if (HOUSE / name).is_file():
                        yield name


def picture(results: dict[str, Any]) -> str:
    """How much harder memorised text drives each band of curvature than clean text does."""
    bands = results["bands"][PICTURED]
    edges = [round(100 * edge) for edge in bands["edges"]]
    ends = ["sharpest", *[""] * (len(edges) - 3), "flattest"]
    lines = [
        f"{end:<8}  {f'{low}–{high}':>6} %  {ratio:.2f}  {'█' * round(ratio / STEP)}"
        for end, low, high, ratio in zip(ends, edges[:-1], edges[1:], bands["ratio"], strict=True)
    ]
    return "\n".join(["```", *lines, "```"])


def between(text: str, mark: str) -> str:
    """What stands between <!-- mark --> and <!-- /mark -->, which must be there."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", text, re.DOTALL)
    if not found:
        raise SystemExit(f"{PAGE}: there is no <!-- {mark} --> ... <!-- /{mark} -->.")
    return found[1]


def write(mark: str, part: str) -> None:
    """Replace what stands between two marks of README.md."""
    text = PAGE.read_text(encoding="utf-8")
    between(text, mark)
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    after = rest[rest.index(f"<!-- /{mark} -->") :]
    PAGE.write_text(f"{before}{begin}{part}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    write("law", law())
    write("reading", reading())
    for path in sys.argv[1:]:
        write("bands", picture(json.loads(Path(path).read_text(encoding="utf-8"))))
