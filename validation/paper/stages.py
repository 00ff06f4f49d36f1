"""An experiment of many stages, each kept when it is done: a run that is killed goes on from there.

A stage is a function of the laboratory (a trained model and what was computed from it once) that
returns plain values. `FOLDER/STAGE.json` holds what it found and how long it took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

import refcurv as rc
from refcurv.files import store
from refcurv.files.disk import write_json
from refcurv.law.checks import require_seed

Json = Any


def done(folder: Path, stage: str) -> Json:
    """What an earlier stage found."""
    return json.loads((folder / f"{stage}.json").read_text())["found"]


def run(lab: Any, folder: Path, stages: Sequence[Callable[[Any], Json]]) -> Json:
    """Every stage that is not done yet; returns what all of them found, times and versions."""
    found: dict[str, Json] = {}
    seconds = {"train": lab.seconds}
    shown = tqdm(stages, unit="stage")
    for stage in shown:
        name = stage.__name__
        shown.set_description(name)
        path = folder / f"{name}.json"
        if not path.exists():
            begun = time.monotonic()
            write_json({"found": stage(lab), "seconds": time.monotonic() - begun}, path)
        one = json.loads(path.read_text())
        found[name], seconds[name] = one["found"], one["seconds"]
    made_with = store.provenance()
    made_with.pop("conventions")
    return {
        **found,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "provenance": made_with,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line that every experiment has; its help is the module's docstring."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, required=True)
    made.add_argument("--runs", type=Path, default=Path("runs"), help="where work is kept")
    made.add_argument("--out", type=Path, required=True, metavar="RESULT.json")
    return made


def main(args: argparse.Namespace, experiment: Callable[[], Json]) -> None:
    """Check the command line before the work, work on one BLAS thread, write the result file."""
    try:
        require_seed("paper", args.seed)
        if args.out.is_dir():
            raise SystemExit(f"paper: --out {args.out} is a folder; name a file.")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with threadpool_limits(1):
            write_json(experiment(), args.out)
    except rc.RefcurvError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"paper: {error}") from None
