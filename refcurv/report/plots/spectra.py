"""Where the curvature lies and what the edit keeps: cumulative mass, spectra, the mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from refcurv.algebra.staircase import Staircase, cut
from refcurv.law.checks import Array, EmptyError, RefcurvError
from refcurv.report.cells import Json, number, percent
from refcurv.report.plots.drawing import (
    INK,
    INSIDE,
    Look,
    blank,
    entry,
    legend,
    legend_height,
    looks,
    safe,
    styled,
    ticks,
)
from refcurv.report.table import share_of_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = (13.0, 6.0)
"""Points of the marks of cuts, from the first layer to the last: none hides another."""

POINTS = 800
"""Thresholds at which a cumulative curve is evaluated."""

DEPTH = 1e-12
"""Products below this share of the largest are one last step of a curve."""

PANELS = 6
"""Masks of so many layers at most are drawn."""

STEPS = 400
"""A staircase of more rows is drawn at so many of them."""

BELOW = 2
"""Decades of curvature below the cut that the mask still tells apart by colour."""

DEEPEST = 10
"""And at most so many below the largest product."""


# ------------------------------------------------------------------ cumulative mass


def spectrum(results: Json) -> Figure:
    """Cumulative curvature mass of each edited layer, its cut, and the two spectra behind it.

    Args:
        results: of `refcurv demo`; reads `spectrum` and `edit`.

    Raises:
        EmptyError: no spectrum of any layer. RefcurvError: matplotlib is not installed.

    Cost: POINTS·O·log(I) per layer; the O·I products never exist at one time.
    Proof:  tests/test_report.py::test_spectrum_is_the_sorted_products; ::test_cut_is_marked
    """
    spectra = results.get("spectrum") or {}
    if not spectra:
        raise EmptyError("report: the results hold no spectrum to draw.")
    cuts = {str(row["layer"]): row for row in results.get("edit") or ()}
    inside = len(spectra) <= INSIDE
    with styled():
        look = looks(list(spectra))
        figure = blank(9.0, 4.4 + (0 if inside else legend_height(len(spectra))))
        axes = figure.subplot_mosaic(
            [["mass", "lam"], ["mass", "mu"]], gridspec_kw={"width_ratios": [1.75, 1]}
        )
        sizes = np.linspace(*SIZES, len(spectra)) if len(spectra) > 1 else SIZES[1:]
        for size, (layer, one) in zip(sizes, spectra.items(), strict=True):
            lam, mu = (np.asarray(one[name], dtype=np.float64) for name in ("lam", "mu"))
            _draw_mass(axes["mass"], lam, mu, cuts.get(layer), entry(layer), look[layer], size)
            _draw_spectrum(axes["lam"], lam, look[layer])
            _draw_spectrum(axes["mu"], mu, look[layer])
        _finish_mass(axes["mass"], min(_pairs(one) for one in spectra.values()))
        _finish_spectrum(axes["lam"], "λ: output gradients (G)")
        _finish_spectrum(axes["mu"], "μ: inputs (A)")
        axes["mu"].set_xlabel("rank")
        if inside:
            axes["mass"].legend(loc="best")
        else:
            legend(figure, axes["mass"])
    return figure


def cumulative(lam: Array, mu: Array) -> tuple[Array, Array]:
    """Share of pairs and share of mass above a falling threshold of λ_i μ_j.

    Every point is exact for its threshold; up to POINTS of them, from the largest product down to
    DEPTH of it, and then (1, 1). No point if there is no mass.
    """
    total, top = lam.sum() * mu.sum(), float(lam[0] * mu[0]) if lam.size and mu.size else 0.0
    if not total > 0:
        return np.empty(0), np.empty(0)
    prefix = np.concatenate([[0.0], np.cumsum(mu)])
    bottom = max(float(lam[lam > 0].min() * mu[mu > 0].min()), DEPTH * top)
    share, mass = [], []
    for threshold in np.geomspace(top, bottom, POINTS) * (1 - 1e-12):
        count = _at_least(lam, mu, threshold)
        share.append(count.sum() / (lam.size * mu.size))
        mass.append(float(lam @ prefix[count]) / total)
    return np.array([*share, 1.0]), np.array([*mass, 1.0])


def _pairs(one: Json) -> int:
    return max(1, len(one["lam"]) * len(one["mu"]))


def _draw_mass(
    ax: Axes, lam: Array, mu: Array, row: Json | None, label: str, look: Look, size: float
) -> None:
    """A layer's curve and its cut, an open mark smaller than those before it."""
    share, mass = cumulative(lam, mu)
    if row is not None:
        kept, held = share_of_pairs(row), number(row.get("mass"))
        label = f"{label}: keeps {percent(kept)}"
        ax.plot([kept, kept], [0, held], ":", color=look.colour, lw=1, label="_drop")
        ax.plot(
            kept, held, look.mark, color=look.colour, ms=size, mfc="white", mew=1.6, zorder=4,
            label="_cut",
        )  # fmt: skip
    ax.plot(
        share, mass, look.line, color=look.colour, lw=1.8, label=label, marker=look.mark,
        mfc="white", ms=6, markevery=[],
    )  # fmt: skip


def _finish_mass(ax: Axes, pairs: int) -> None:
    ax.set_xscale("log")
    ax.set_xlim(1 / pairs, 1.15)
    ax.set_ylim(0, 1.03)
    ax.set_title("Curvature mass held by the sharpest pairs")
    ax.set_xlabel("share of the pairs kept, sharpest first (%)")
    ax.set_ylabel("cumulative curvature mass (%)")
    ticks(ax.xaxis, lambda x: f"{100 * x:g}")
    ticks(ax.yaxis, lambda y: f"{100 * y:g}")


def _draw_spectrum(ax: Axes, values: Array, look: Look) -> None:
    """Positive eigenvalues as shares of the largest."""
    positive = values[values > 0]
    if positive.size:
        rank = np.arange(1, positive.size + 1)
        ax.plot(rank, positive / positive[0], look.line, color=look.colour, lw=1.5)


def _finish_spectrum(ax: Axes, title: str) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(title)
    ax.set_ylabel("share of largest")
    ticks(ax.xaxis, lambda x: f"{x:g}")
    ticks(ax.yaxis, _power)


def _power(y: float) -> str:
    """10⁻³ and the like; matplotlib would need its mathematics for it."""
    exponent = round(math.log10(y)) if y > 0 else 0
    return f"10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


# ------------------------------------------------------------------ the mask


def mask(results: Json) -> Figure:
    """The pairs (i, j) that the edit keeps of each layer, over the curvature λ_i μ_j of all pairs.

    Both axes are ranks, so that an area is a share of the pairs. The colours' borders are lines of
    equal curvature, one a decade; the border of what is kept is one more of them. Both spectra
    descend: whoever goes down a row reaches that curvature at the same column or before it, which
    makes every such line a staircase.

    Args:
        results: of `refcurv demo`; reads `spectrum` and `edit`, and makes the cut again (SELECT).
            Of more than PANELS layers, so many from the first to the last are drawn.

    Raises:
        EmptyError: no edited layer with a spectrum that can be cut. RefcurvError: matplotlib is
            not installed.

    Cost: a cut and DEEPEST·O·log(I) per layer drawn; the O·I products never exist.
    Proof:  tests/test_report.py::test_the_mask_is_the_cut; ::test_colours_are_decades
    """
    panels = _panels(results)
    if not panels:
        raise EmptyError("report: the results hold no edited layer with a spectrum to cut.")
    with styled():
        columns = min(len(panels), 3)
        rows = -(-len(panels) // columns)
        figure = blank(9.0, 0.4 + (3.9 if columns < 3 else 3.1) * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        colours = _shades(max(_depth(lam, mu, stairs) for _, lam, mu, stairs in panels))
        for ax, (layer, lam, mu, stairs) in zip(axes.flat, panels, strict=False):
            _draw_plane(ax, lam, mu, stairs, colours)
            ax.set_title(safe(layer, 66 // columns))
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[:, 0]:
            ax.set_ylabel("output direction i, by rank in λ")
        for ax in axes[-1]:
            ax.set_xlabel("input direction j, by rank in μ")
        _draw_scale(figure, list(axes.flat), colours)
    return figure


def _panels(results: Json) -> list[tuple[str, Array, Array, Staircase]]:
    """Layer, λ, μ and cut of the edited layers to draw."""
    spectra = results.get("spectrum") or {}
    rows = [row for row in results.get("edit") or () if str(row["layer"]) in spectra]
    if len(rows) > PANELS:
        rows = [rows[n] for n in np.linspace(0, len(rows) - 1, PANELS).round().astype(int)]
    found = []
    for row in rows:
        one = spectra[str(row["layer"])]
        lam, mu = (np.asarray(one[name], dtype=np.float64) for name in ("lam", "mu"))
        try:
            stairs = cut(lam, mu, number(row.get("rho")))
        except RefcurvError:  # no mass, no share, no spectrum
            continue
        found.append((str(row["layer"]), lam, mu, stairs))
    return found


def _depth(lam: Array, mu: Array, stairs: Staircase) -> int:
    """Decades from the largest product to BELOW the cut."""
    last = stairs.last if stairs.last > 0 else lam[0] * mu[0]
    return min(math.ceil(math.log10(lam[0] * mu[0] / last)) + BELOW, DEEPEST)


def _draw_plane(ax: Axes, lam: Array, mu: Array, stairs: Staircase, colours: Sequence[str]) -> None:
    """Decades of curvature, what is dropped veiled, what is kept outlined."""
    O, I = len(lam), len(mu)  # noqa: E741
    step = np.unique(np.linspace(0, O, min(O, STEPS) + 1).round().astype(int))
    ax.set_facecolor(colours[-1])
    for decade in range(len(colours) - 1, 0, -1):
        counts = _at_least(lam[step[:-1]], mu, lam[0] * mu[0] * 10.0**-decade)
        ax.stairs(
            *_runs(counts, step), orientation="horizontal", fill=True, color=colours[decade - 1],
            lw=0, label=f"_{decade}",
        )  # fmt: skip
    kept, edges = _runs(stairs.counts[step[:-1]], step)
    ax.stairs(
        np.full(len(kept), I), edges, orientation="horizontal", baseline=kept, fill=True,
        color="white", alpha=0.55, lw=0, label="_dropped",
    )  # fmt: skip
    ax.stairs(
        kept, edges, orientation="horizontal", baseline=None, color=INK, lw=1.6, label="_kept"
    )
    ax.set_xlim(0, I)
    ax.set_ylim(O, 0)
    ax.grid(visible=False)
    text = f"kept: {percent(stairs.kept / (O * I))} of the pairs,\n"
    text += f"{percent(stairs.mass / stairs.total)} of the curvature"
    ax.text(
        0.97, 0.04, text, transform=ax.transAxes, ha="right", va="bottom",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 3},
    )  # fmt: skip


def _runs(counts: Array, edges: Array) -> tuple[Array, Array]:
    """Steps of one height as one step: (counts, edges)."""
    first = np.flatnonzero(np.diff(counts, prepend=-1))
    return counts[first], edges[[*first, -1]]


def _at_least(lam: Array, mu: Array, threshold: float) -> Array:
    """How many j of each row have λ_i μ_j >= threshold > 0."""
    with np.errstate(divide="ignore"):
        return len(mu) - np.searchsorted(mu[::-1], threshold / lam)


def _shades(depth: int) -> list[str]:
    """A colour a decade, sharp to flat, and one for all below."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(c) for c in colormaps["GnBu"](np.linspace(1, 0.08, depth + 1))]


def _draw_scale(figure: Figure, axes: list[Axes], colours: Sequence[str]) -> None:
    """The colours of the decades; what is flatter than the last of them has the palest."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    edges = np.arange(-len(colours), 1)
    shown = ScalarMappable(BoundaryNorm(edges, len(colours)), ListedColormap(colours[::-1]))
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_ticks(edges[1:].tolist(), labels=[_power(10.0**edge) for edge in edges[1:]])
    bar.ax.minorticks_off()
    bar.set_label(r"curvature $\lambda_i\,\mu_j$, over the largest", parse_math=True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
