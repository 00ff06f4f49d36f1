"""Arguments as values: sizes, numbers, shares and pairs, and which files a command line names."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refcurv.files.paths import beside, unfinished
from refcurv.law.checks import ConventionError, RangeError


def size(text: str) -> int:
    """A size: 6GB, 900MiB, or a number alone, in GiB."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([GM]i?B)?", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(
            "a size is a number above 0 and GB, MB, GiB or MiB behind it, as 6GB or 900MiB; alone "
            f"it is in GiB; got {text!r}"
        )
    unit = {"GB": 10**9, "MB": 10**6, "MiB": 2**20}.get(found[2], 2**30)
    return int(float(found[1]) * unit)


def shares(texts: Sequence[str], asks: str = "edit: --rho takes [PATTERN=]SHARE") -> Any:
    """['0.9'] → 0.9; ['PATTERN=0.9', ...] → {pattern: share}."""
    out: dict[str, float] = {}
    for text in texts:
        pattern, equals, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            raise RangeError(f"{asks}; got {text!r}.") from None
        if not equals and len(texts) == 1:
            return value
        if not equals:
            raise RangeError(f"{asks}; several need a pattern each, and {text!r} has none.")
        if not pattern or pattern in out:
            raise RangeError(f"{asks}, each pattern once; got {text!r}.")
        out[pattern] = value
    return out


def seed(command: str, given: int | None, undrawn: str = "") -> int:
    """The seed, 0 by default. ConventionError: one is given, and `undrawn` says why none is needed.

    Proof: tests/test_cli.py::test_bad_input_is_one_line_and_status_2
    """
    if given is not None and undrawn:
        raise ConventionError(f"{command}: nothing is drawn {undrawn}; leave --seed out.")
    return given or 0


def undrawn(fisher: str) -> str:
    """Of a choice of labels that draws nothing: why no seed is needed."""
    from refcurv.model.fisher import DRAWN

    return "" if fisher in DRAWN else f"with --fisher {fisher}"


def numbers(text: str) -> range:
    """As "3" → 3 alone; "0-3" → 0, 1, 2, 3."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (not dash or last.isdecimal())) or len(text) > 20:
        raise argparse.ArgumentTypeError(f"a number, or two as in 0-3, is needed; got {text!r}")
    found = range(int(first), int(last if dash else first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"the first must not be above the last; got {text!r}")
    return found


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """["KEY=VALUE", ...] → {key: value}; `option` is for messages."""
    out: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value) or key in out:
            raise RangeError(f"validate: {option} takes KEY=VALUE, each key once; got {text!r}.")
        out[key] = value
    return out


def files(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The files that a command reads, and those that it writes, by what its usage calls them.

    The folders of `report`, `demo` and `export` are looked after by these. A path that cannot be
    looked at (os.path.isdir says no, where Path.is_dir raises) is refused by the command.
    """
    given = {name: value for name, value in vars(args).items() if isinstance(value, str)}
    reads = {name.upper(): given[name] for name in _READ if name in given}
    writes = {
        f"--{name}": given[name]
        for name in ("output", "json", "html", "items", "right", "plot")
        if name in given
    }
    reads |= {f"TEXT {path}": path for path in getattr(args, "texts", [])}
    reads |= {
        f"--population {text}": text.partition("=")[2] for text in getattr(args, "population", [])
    }
    if os.path.isdir(reads.get("TOKENIZER", "")):  # noqa: PTH112
        reads["TOKENIZER"] = str(Path(reads["TOKENIZER"]) / "tokenizer.json")
    if os.path.isdir(reads.get("THEIRS", "")):  # noqa: PTH112
        held = Path(reads["THEIRS"]).glob("*")
        reads |= {f"{p.name} of THEIRS": str(p) for p in held}
    if args.command == "convert":
        writes["WEIGHTS"] = reads.pop("WEIGHTS")
        folder = Path(args.directory)
        is_folder = os.path.isdir(folder)  # noqa: PTH112
        within = folder.glob("*") if is_folder else [folder, *folder.parent.glob("*.gguf")]
        reads |= {f"{p.name} of DIRECTORY": str(p) for p in within}
    if args.command in ("collect", "recite", "sweep"):
        writes["the checkpoint of --output"] = unfinished(args.output)
    if args.command == "evaluate" and args.json:
        writes["what is known of --json"] = unfinished(args.json)
    if args.command == "sweep" and args.basis is None and args.factors is None:
        kept = beside(args.output, "factors", "basis").items()
        writes |= {f"the {what} beside --output": str(path) for what, path in kept}
    return reads, writes


_READ = (
    "weights", "corpus", "factors", "basis", "file", "baseline", "tokenizer", "reference", "model",
    "theirs", "trace", "labels",
)  # fmt: skip
