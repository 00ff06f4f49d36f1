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
    from matplotlib.axis import Axis
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
    ax.set_title(safe(f"{one['layer']}: {one['side']}"))
    ax.grid(visible=False)
    low, high = float(cells.min()), float(cells.max())
    if high <= FAINTEST:
        ax.set_axis_off()
        ax.text(0, 0.5, "no difference", transform=ax.transAxes)
        return
    low = max(low, high * 1e-6)
    size = int(one["size"])
    norm = LogNorm(low, max(high, low * 10))
    image = ax.imshow(cells, cmap="magma", norm=norm, extent=(0, size, size, 0))
    _whole(ax.xaxis, ax.yaxis)
    bar = figure.colorbar(image, ax=ax, shrink=0.85)
    bar.ax.set_title("difference / size", fontsize=8, loc="left", weight="normal")
    ticks(bar.ax.yaxis, _power)


def _spectra(ax: Axes, one: Json) -> None:
    drawn = False
    for name, line, colour in (("ours", "-", GREY), ("theirs", "--", PALETTE[1])):
        values = np.asarray(one[name], dtype=np.float64)
        positive = values > 0
        if positive.any():
            rank = np.arange(1, len(values) + 1)
            ax.plot(rank[positive], values[positive], line, color=colour, label=name)
            drawn = True
    ax.set_title(f"eigenvalues of {one['side']} / trace", weight="normal")
    if drawn:
        ax.set_yscale("log")
        ticks(ax.yaxis, _power)
        _whole(ax.xaxis)
        ax.legend(loc="best")
    else:
        ax.text(0.5, 0.5, "too wide for a spectrum", ha="center", transform=ax.transAxes)


def _whole(*axes: Axis) -> None:
    """Entries and ranks are integers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, integer=True))


def _power(x: float) -> str:
    """A power of ten as text: 1e-3."""
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")
