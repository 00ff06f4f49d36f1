"""The generated parts of README.md: the table of the law, and the picture of the demo.

    python -m validation.first_page                              the law
    python -m validation.first_page refcurv-demo/results.json    the picture too, of that demo

tests/test_law.py and tests/test_demo.py fail when README.md says anything else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from refcurv.law.conventions import LAW

PAGE = Path(__file__).parents[1] / "README.md"

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
    for path in sys.argv[1:]:
        write("bands", picture(json.loads(Path(path).read_text(encoding="utf-8"))))
