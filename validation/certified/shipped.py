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

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- shipped: begin -->", "<!-- shipped: end -->"
LAYERS = "blocks.*.mlp.*"
SHOWN = 4
"""Losses whose digits are printed, of each sequence."""


def main() -> int:
    """Certify, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.certified.shipped")
    parser.add_argument("--sequences", type=numbers, default=[0, 1, 2, 3])
    parser.add_argument("--of", default=",".join(OF))
    given = parser.parse_args()
    folder = Path(demo.__file__).parent
    model, corpus = rc.load(folder / "model.h5"), rc.load_corpus(folder / "corpus.h5")
    begin, cpu = time.monotonic(), time.process_time()
    found = rc.certify(
        model, corpus, given.of.split(","), sequences=given.sequences, layers=LAYERS,
        progress=progress_bar("certify"),
    )  # fmt: skip
    took = time.monotonic() - begin, time.process_time() - cpu
    text = README.read_text(encoding="utf-8")
    before, rest = text.partition(BEGIN)[0], text.partition(END)[2]
    page = f"{before}{BEGIN}\n\n{body(found, given.sequences, took)}\n\n{END}{rest}"
    README.write_text(page, encoding="utf-8")
    print(format_certificate(found.to_json()))
    return int(found.digits < found.wanted)


def body(found: rc.Certificate, sequences: list[int], took: tuple[float, float]) -> str:
    """The table, how long it took, and some digits."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = f"python-flint {metadata.version('python-flint')}, numpy {np.__version__}"
    lines = [
        f"Sequences {sequences[0]} to {sequences[-1]}, A and G of `{LAYERS}` over all of them. "
        f"{took[0]:.0f} s, {took[1]:.0f} s of them on a core, {memory:.1f} GiB; {used}, "
        f"{platform.machine()}.",
        "",
        "```text",
        format_certificate(found.to_json()),
        "```",
        "",
        "The first losses of each sequence, in nats:",
        "",
        "```text",
    ]
    for n in sequences:
        one: Any = found.get(f"nats.{n}")
        for t in range(SHOWN if one is not None else 0):
            lines.append(f"{n}, {t}: {one.text((t,))}")
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    raise SystemExit(main())
