"""Six other programs' factors beside the certified ones: whose digits are off, and by how many.

    python -m validation.certified.factors

Needs the extra `certified` and what validation/peers/curvature/requirements.txt lists. The model,
its sequences and each program's recipe are those of validation/peers/curvature.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import refcurv as rc
from refcurv.law.checks import require_finite
from refcurv.terminal import progress_bar
from validation.certified import page
from validation.certified.errors import Arrays, ulps

OF = ("A", "G")
DTYPES = ("float64", "float32")
ROWS = ("reached", "all")
"""Which positions are rows: programs differ in it."""


def by_layer(truth: rc.Certificate, found: Arrays, dtype: str) -> dict[str, list[float]]:
    """quantity → the error of each layer, in ulps."""
    out: dict[str, list[float]] = {}
    for name, x in found.items():
        require_finite("factors", name, x)
        for quantity, far in ulps(truth, {name: x}, dtype).items():
            out.setdefault(quantity, []).append(far)
    return out


def theirs(subject: Any, truths: dict[str, rc.Certificate], folder: Path) -> list[list[str]]:
    """A row for each program and dtype."""
    from validation.peers.curvature.judged import PROGRAMS, VARIANTS

    bar, rows = progress_bar("factors"), []
    for number, (name, variant) in enumerate(VARIANTS):
        program = import_module(f"validation.peers.curvature.programs.{name}")
        for dtype in DTYPES:
            (own := folder / f"{name}-{variant}-{dtype}").mkdir()
            made = getattr(program, variant)(subject, dtype, own)
            arrays = {}
            for ours, their in subject.names.items():
                if their in made.layers:
                    arrays[f"A.{ours}"], arrays[f"G.{ours}"], _ = made.layers[their]
            title, package = PROGRAMS[name]
            label = f"{title}, of a mean loss" if variant == "mean" else title
            row = by_layer(truths[made.rows], arrays, dtype)
            rows.append(line(label, version(package), dtype, made.rows, row))
        bar(number + 1, len(VARIANTS))
    return rows


def ours(subject: Any, truths: dict[str, rc.Certificate]) -> list[list[str]]:
    """What `rc.collect` gives."""
    layers, rows = ",".join(subject.names), []
    for dtype in DTYPES:
        narrow = {name: x.astype(dtype) for name, x in subject.model.parameters.items()}
        model = rc.Model(subject.model.config, narrow, dtype)
        for which, truth in truths.items():
            made = rc.collect(model, subject.corpus, layers, "empirical", rows=which)
            arrays = {f"A.{name}": one.A for name, one in made.items()}
            arrays |= {f"G.{name}": one.G for name, one in made.items()}
            row = by_layer(truth, arrays, dtype)
            rows.append(line("refcurv", "", dtype, which, row))
    return rows


def line(
    title: str, release: str, dtype: str, rows: str, found: dict[str, list[float]]
) -> list[str]:
    """Median and largest of the layers."""
    cells = [f"{np.median(found[q]):.2g}, {max(found[q]):.2g}" for q in OF]
    return [title, release, dtype, rows, str(len(found["A"])), *cells]


def main() -> int:
    """Measure, then write the table."""
    argparse.ArgumentParser(prog="python -m validation.certified.factors").parse_args()
    with page.from_tests(), tempfile.TemporaryDirectory() as place:
        from validation.peers.curvature.subject import made_in

        subject = made_in(Path(place))
        every = range(len(subject.corpus.tokens))
        truths = {
            rows: rc.certify(subject.model, subject.corpus, OF, sequences=every, rows=rows)
            for rows in ROWS
        }
        body = [*theirs(subject, truths, Path(place)), *ours(subject, truths)]
    head = ["program", "version", "dtype", "rows", "layers", *OF]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    packages = ("torch", "transformers", "jax")
    stamp = page.stamp("validation.certified.factors", page.of("factors"), *packages)
    page.write("factors", stamp + "\n\n" + "\n".join(lines))
    print("\n".join(lines), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
