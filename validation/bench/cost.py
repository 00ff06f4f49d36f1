"""Cost against tokens, depth, width, vocabulary and cores: curves, of one pass each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from validation.bench.candidates import CANDIDATES, OFFICIAL, OURS, Subject
from validation.bench.fresh import spawn
from validation.bench.measuring import Record, measured, tell
from validation.bench.proxies import Size, make
from validation.bench.timing import use_threads

PLOT = Path(__file__).resolve().parent / "cost.png"
NAMES = (OURS, OFFICIAL, "curvlinops")
MOST_ROWS = 8192
"""Chosen: beyond it only refcurv is timed, once; every candidate's cost is linear there."""


def of_tokens(size: Size, tokens: int) -> Size:
    """So many labelled positions, or about: one more position to each sequence of at most 512."""
    if tokens < size.positions:
        return replace(size, sequences=1, positions=tokens + 1)
    return replace(size, sequences=tokens // size.positions)


CURVES: dict[str, tuple[tuple[int, ...], Callable[[Size, int], Size]]] = {
    "tokens": ((1, 8, 64, 512, 2048, 8192, 65_536), of_tokens),
    "blocks": ((2, 4, 8, 16), lambda size, n: replace(size, layers=n)),
    "width": (
        (128, 256, 512, 1024),
        lambda size, n: replace(size, width=n, mlp_width=4 * n, heads=n // 64),
    ),
    "vocabulary": ((2048, 8192, 32_768, 100_352), lambda size, n: replace(size, vocabulary=n)),
}
"""What is changed in the proxy, all of whose MLP layers are wanted, on one core."""
TINY = {"tokens": (1, 8, 40), "blocks": (2, 3), "width": (64, 128), "vocabulary": (100, 300)}


def curves(place: Path, size: Size, threads: tuple[int, ...], small: bool) -> Record:
    """{"curve x": {times: {candidate: its passes}}}; cores: of four times the proxy's corpus."""
    found: Record = {}
    for curve, (values, change) in CURVES.items():
        for x in TINY[curve] if small else values:
            found[f"{curve} {x}"] = _point(place / f"{curve}{x}", change(size, x), 1)
    for n in threads:
        found[f"cores {n}"] = _point(place / f"cores{n}", size.times(4), n)
    return found


def _point(folder: Path, size: Size, threads: int) -> Record:
    tell(f"cost: {folder.name}")
    folder.mkdir()
    spawn(make, folder, size)
    return spawn(point, folder, size, threads, threads=threads)


def point(folder: Path, size: Size, threads: int) -> Record:
    """The candidates on one model."""
    use_threads(threads)
    subject = Subject(folder, size, tuple(range(size.layers)), threads)
    few = size.rows <= MOST_ROWS
    times: Record = {}
    for name in NAMES if few else (OURS,):
        if not CANDIDATES[name].there:
            continue
        candidate, times[name] = CANDIDATES[name].make(subject), []
        for turn in range(3 if few else 1):
            one: Record = {}
            with measured(one, "pass"):
                candidate.collect(None)
            if turn or not few:  # the first warms up
                times[name].append(one["pass"])
    return {"times": times}


def draw(section: Record) -> None:
    """cost.png."""
    from refcurv.report.plots.drawing import MARKS, PALETTE, blank, legend, save, styled, ticks

    groups: dict[str, dict[int, Record]] = {}
    for run, one in section["runs"].items():
        curve, _, x = run.partition(" ")
        groups.setdefault(curve, {})[int(x)] = one["times"]
    with styled():
        figure = blank(9.0, 6.0)
        axes = figure.subplots(2, 3).ravel()
        for ax, (curve, points) in zip(axes, groups.items(), strict=False):
            for place, name in enumerate(NAMES):
                line = [
                    (x, median(one["seconds"] for one in times[name]))
                    for x, times in points.items()
                    if name in times
                ]
                if line:
                    look = {"color": PALETTE[place], "marker": MARKS[place], "markersize": 4}
                    ax.plot(*zip(*line, strict=True), label=name, **look)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_title(curve)
            ax.set_xticks(list(points))
            ticks(ax.xaxis, lambda x: f"{x / 1024:g}k" if x % 1024 == 0 else f"{x:.0f}")
            ticks(ax.yaxis, lambda y: f"{y:g}")
            low, high = ax.get_ylim()
            ax.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
            ax.set_ylabel("seconds" if ax in axes[::3] else "")
        for ax in axes[len(groups) :]:
            ax.set_axis_off()
        legend(figure, axes[0])
    save(figure, PLOT)
