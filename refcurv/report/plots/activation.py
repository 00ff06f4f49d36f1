"""How strongly memorised and clean tokens drive each band of directions, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from refcurv.law.checks import Array, EmptyError
from refcurv.report.cells import Json, number
from refcurv.report.plots.drawing import GREY, INK, blank, safe, split, styled
from refcurv.report.table import band_labels, edited_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

NUMBERED = 32
"""Up to so many layers have their numbers written into the cells."""

NAMED = 44
"""Up to so many layers are all named."""

ROW, LOWEST, TALLEST = 0.27, 1.3, 9.0
"""Inches of a row, and of all rows together."""

PAD = 8
"""Points between names and cells: the bars of edited layers stand there."""

LIGHT = 0.3
"""Chosen: from this luminance on a cell has dark numbers."""

HALVINGS = (1, 2)
"""The colours reach at least twice and half, at most four times and a quarter."""

COLOURS = 41
"""So few that a colour bar of them is drawn as vectors, and odd, so that 1 is white."""


def bands(results: Json) -> Figure:
    """Activation ratio of memorised to clean tokens, a row per layer and a column per band.

    By pair mass at the left, by input rank at the right; edited layers are named in bold. Colour is
    the logarithm of the ratio, so that twice and half are equally strong.

    Args:
        results: of `refcurv demo`; reads `bands`, `input_bands` and `edit`.

    Raises:
        EmptyError: no bands of any layer. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_report.py::test_bands_show_the_ratios
    """
    by_mass, by_rank = results.get("bands") or {}, results.get("input_bands") or {}
    parts = [
        (
            by_mass,
            r"Mean layer output $\Vert W_b\,x\Vert$",
            "band of cumulative curvature mass (%)",
        ),
        (
            by_rank,
            r"Mean layer input $\Vert P_b\,x\Vert$",
            "band of eigenvectors of A, by rank (%)",
        ),
    ]
    parts = [part for part in parts if part[0]]
    if not parts:
        raise EmptyError("report: the results hold no bands to draw.")
    layers = list(dict.fromkeys([*by_mass, *by_rank]))
    tables = [_ratios(found, layers) for found, _, _ in parts]
    reach = _reach(tables)
    with styled():
        figure = blank(9.0, 1.35 + min(max(ROW * len(layers), LOWEST), TALLEST))
        widths = [table.shape[1] for table in tables]
        axes = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
        for ax, table, (found, title, unit) in zip(axes, tables, parts, strict=True):
            shown = _draw_map(ax, table, layers, reach)
            edges = next(iter(found.values()))["edges"]
            ax.set_xticks(np.arange(table.shape[1]) + 0.5, band_labels(edges))
            ax.set_xlabel(f"{unit}\nsharp  →  flat")
            ax.set_title(title, parse_math=True)
            ax.set_yticks([])
        _name_rows(axes[0], layers, set(edited_layers(results)))
        _draw_scale(figure, shown, list(axes), reach)
    return figure


def _ratios(found: Mapping[str, Json], layers: Sequence[str]) -> Array:
    """(layers, bands); NaN where there is none."""
    width = max(len(one["ratio"]) for one in found.values())
    table = np.full((len(layers), width), math.nan)
    for row, layer in enumerate(layers):
        if layer in found:
            ratio = [number(value) for value in found[layer]["ratio"]]
            table[row, : len(ratio)] = ratio
    return table


def _logarithm(table: Array) -> Array:
    """log2; NaN stays, 0 becomes as low as the colours reach and beyond."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(np.log2(table), -99.0)


def _reach(tables: Sequence[Array]) -> float:
    """The |log2 ratio| at which the colours end."""
    found = np.concatenate([np.abs(_logarithm(table)).ravel() for table in tables])
    return float(np.clip(np.nanmax(found, initial=0.0), *HALVINGS))


def _draw_map(ax: Axes, table: Array, layers: Sequence[str], reach: float) -> QuadMesh:
    from matplotlib import colormaps

    value, colours = np.ma.masked_invalid(_logarithm(table)), colormaps["RdBu_r"]
    ax.set_facecolor("#ececec")
    shown = ax.pcolormesh(
        value, cmap=colours.resampled(COLOURS), vmin=-reach, vmax=reach, edgecolors="white", lw=0.6
    )
    if len(layers) <= NUMBERED:
        for (row, band), ratio in np.ndenumerate(table):
            dark = not math.isnan(ratio) and _luminance(shown.to_rgba(_logarithm(ratio))) < LIGHT
            ax.text(
                band + 0.5, row + 0.5, _cell(ratio), ha="center", va="center", fontsize=8,
                color="white" if dark else INK,
            )  # fmt: skip
    blocks = [split(layer)[0] for layer in layers]
    for row in range(1, len(layers)):
        if blocks[row] != blocks[row - 1] and len(layers) <= NAMED:
            ax.axhline(row, color="white", lw=3)
    ax.set_ylim(len(layers), 0)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return shown


def _luminance(rgba: Array) -> float:
    """Of an sRGB colour, relative: 0 of black, 1 of white (WCAG)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgba[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _cell(ratio: float) -> str:
    if math.isnan(ratio):
        return "–"
    return f"{ratio:.2f}" if ratio < 10 else f"{min(ratio, 9999):.0f}"


def _name_rows(ax: Axes, layers: Sequence[str], edited: set[str]) -> None:
    """Layers' names, the edited ones bold and barred; of very many, every n-th."""
    every = -(-len(layers) // NAMED)
    ax.tick_params(axis="y", pad=PAD)
    rows = range(0, len(layers), every)
    ax.set_yticks([row + 0.5 for row in rows], [safe(layers[row], 30) for row in rows])
    for row, text in zip(rows, ax.get_yticklabels(), strict=True):
        chosen = layers[row] in edited
        text.set(weight="bold" if chosen else "normal", color=INK if chosen else GREY)
    across = ax.get_yaxis_transform()
    for row, layer in enumerate(layers):
        if layer in edited:
            ax.plot(
                [-0.008, -0.008], [row, row + 1], color=INK, lw=2.5, transform=across,
                clip_on=False, solid_capstyle="butt", label="_edited",
            )  # fmt: skip
    if ROW * len(layers) > LOWEST:
        ax.set_ylabel("layer (edited ones in bold)" if edited else "layer")


def _draw_scale(figure: Figure, shown: QuadMesh, axes: list[Axes], reach: float) -> None:
    names = {-2: "¼", -1: "½", 0: "1", 1: "2", 2: "4"}
    at = [x for x in names if abs(x) <= reach]
    bar = figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02, aspect=30, extend="both")
    bar.set_ticks(at, labels=[names[x] for x in at])
    bar.set_label("memorised / clean")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
