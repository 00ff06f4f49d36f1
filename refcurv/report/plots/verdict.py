"""What `validate` saw of a layer: a map of the difference, and the two spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from refcurv.law.checks import EmptyError
from refcurv.report.cells import Json
from refcurv.report.plots.drawing import GREY, PALETTE, blank, safe, styled, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINTEST = 1e-16
"""Differences below this are drawn like this."""


def differences(pictures: Sequence[Json]) -> Figure:
    """A row for each picture: the map of the difference at the left, the spectra at the right.

    Args:
        pictures: `Picture.to_json()` of some layers and sides.

    Raises:
        EmptyError: none. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_verdict_page.py::test_the_figure_shows_every_picture
    """
    if not pictures:
        raise EmptyError("report: there is no layer to draw.")
    with styled():
        figure = blank(9.0, 2.9 * len(pictures))
        rows = figure.subplots(len(pictures), 2, squeeze=False, width_ratios=[1, 1.6])
        for (left, right), one in zip(rows, pictures, strict=True):
            _map(figure, left, one)
            _spectra(right, one)
        rows[-1][1].set_xlabel("rank")
    return figure


def _map(figure: Figure, ax: Axes, one: Json) -> None:
    from matplotlib.colors import LogNorm

    cells = np.maximum(np.asarray(one["difference"], dtype=np.float64), FAINTEST)
    low, high = float(cells.min()), float(cells.max())
    low = max(low, high * 1e-6)
    norm = LogNorm(low, max(high, low * 10))
    size = int(one["size"])
    image = ax.imshow(cells, cmap="magma", norm=norm, extent=(0, size, size, 0))
    ax.grid(visible=False)
    ax.set_title(safe(f"{one['layer']}: {one['side']}"))
    bar = figure.colorbar(image, ax=ax, label="difference / size", shrink=0.85)
    ticks(bar.ax.yaxis, _power)


def _power(x: float) -> str:
    return f"{x:.0e}"


def _spectra(ax: Axes, one: Json) -> None:
    drawn = False
    for name, line, colour in (("ours", "-", GREY), ("theirs", "--", PALETTE[1])):
        values = np.asarray(one[name], dtype=np.float64)
        positive = values > 0
        if positive.any():
            rank = np.arange(1, len(values) + 1)
            ax.plot(rank[positive], values[positive], line, color=colour, label=name)
            drawn = True
    ax.set_ylabel(f"eigenvalue of {one['side']} / trace")
    if drawn:
        ax.set_yscale("log")
        ticks(ax.yaxis, _power)
        ax.legend(loc="best")
    else:
        ax.text(0.5, 0.5, "too wide for a spectrum", ha="center", transform=ax.transAxes)
