"""The shipped model, certified: README.md's table and the digits of its losses.

    python -m validation.certified.shipped              the first four sequences, everything
    python -m validation.certified.shipped --sequences 0-1 --of nats,gradient

Needs the extra `certified`.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import refcurv as rc
from refcurv import demo
from refcurv.certified.numbers import OF
from refcurv.commands.arguments import numbers
from refcurv.report.certificate import format_certificate
from refcurv.terminal import progress_bar
from validation.certified import page

LAYERS = "blocks.*.mlp.*"
SHOWN = 4
"""Losses whose digits are printed, of each sequence."""


def main() -> int:
    """Certify, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.certified.shipped")
    parser.add_argument("--sequences", type=numbers, default=[0, 1, 2, 3])
    parser.add_argument("--of", default=",".join((*OF, "edit")), metavar="NAMES")
    given = parser.parse_args()
    names = given.of.split(",")
    plain = [name for name in names if name in OF]
    short = written("shipped", given.sequences, plain, layers=LAYERS) if plain else 0
    if len(plain) < len(names):  # what the demo edits, with A, G and their eigenvalues
        short |= written("edit", given.sequences, ["edit"], layers=demo.LAYERS, rho=demo.RHO)
    return short


def written(mark: str, sequences: list[int], of: list[str], **options: Any) -> int:
    """One certificate, on the page; 1 if digits are missing."""
    folder = Path(demo.__file__).parent
    model, corpus = rc.load(folder / "model.h5"), rc.load_corpus(folder / "corpus.h5")
    begin, cpu = time.monotonic(), time.process_time()
    found = rc.certify(
        model, corpus, of, sequences=sequences, progress=progress_bar("certify"), **options
    )
    took = time.monotonic() - begin, time.process_time() - cpu
    page.write(mark, body(found, sequences, options["layers"], took))
    print(format_certificate(found.to_json()))
    undecided = any(one["undecided"] for one in found.cuts.values())
    return int(found.digits < found.wanted or undecided)


def body(
    found: rc.Certificate, sequences: list[int], layers: str, took: tuple[float, float]
) -> str:
    """The table, how long it took, and some digits."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = f"python-flint {metadata.version('python-flint')}, numpy {np.__version__}"
    lines = [
        f"Sequences {sequences[0]} to {sequences[-1]}, A and G of `{layers}` over all of them. "
        f"{took[0]:.0f} s, {took[1]:.0f} s of them on a core, {memory:.1f} GiB; {used}, "
        f"{platform.machine()}; code {page.of('shipped')}.",
        "",
        "```text",
        format_certificate(found.to_json()),
        "```",
    ]
    losses: Any = {n: found[f"nats.{n}"] for n in sequences if f"nats.{n}" in found}
    if losses:
        lines += ["", "The first losses of each sequence, in nats:", "", "```text"]
        lines += [f"{n}, {t}: {one.text((t,))}" for n, one in losses.items() for t in range(SHOWN)]
        lines.append("```")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
