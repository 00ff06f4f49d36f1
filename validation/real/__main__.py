"""The paper's tables on two language models that other people trained, by refcurv's commands.

    python -m validation.real                            both models, every part: hours
    python -m validation.real --model smollm2 --only models,grid,table
    python -m validation.real --render                   README.md from results/ alone
    python -m validation.real --small                    does it run? Another model, nothing kept

Parts are done in their order, and go on where they were stopped: a line of results/MODEL.jsonl for
each piece of work. One that is there, of the same inputs and the same claims.toml, is not done
again. Weights, texts and bases (2 GiB and more for each model) lie in --folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from validation.real import fetch, page
from validation.real.files import Files
from validation.real.parts import PARTS
from validation.real.plan import PLANS, SMALL
from validation.real.results import Results, load


def names(text: str) -> list[str]:
    """Parts, in their own order."""
    asked = [name.strip() for name in text.split(",")]
    if unknown := [name for name in asked if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m validation.real", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", choices=fetch.MODELS, help="one of them (default: both)")
    parser.add_argument("--only", type=names, default=list(PARTS), help=f"of {','.join(PARTS)}")
    place = Path(tempfile.gettempdir()) / "real"
    parser.add_argument("--folder", type=Path, default=place,
                        help="where what is not kept lies (default: %(default)s)")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="the demo's model; nothing is kept")
    parser.add_argument("--render", action="store_true", help="write README.md, run nothing")
    return parser.parse_args(argv)


def small(parts: list[str]) -> str:
    """Every part on the demo's model; its page."""
    with tempfile.TemporaryDirectory(prefix="real-") as room:
        results = Results(Path(room) / "results.jsonl")
        for name in parts:
            PARTS[name](Files(PLANS[SMALL], Path(room), results))
        return page.block({SMALL: results})


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    if given.small:
        print(small(given.only))
        return 0
    if not given.render:
        for model in [given.model] if given.model else fetch.MODELS:
            for name in given.only:
                PARTS[name](Files(PLANS[model], given.folder, load(model)))
                page.render()
    page.render()
    return 0


if __name__ == "__main__":
    sys.exit(main())
