"""The figures of a run: spectrum and cut, mask, bands, retention, the front of the trade-off.

Colour is the block and line style the projection where layers are lines. Every figure takes the
dictionary of results.json and reads of it what its docstring says.
"""

from types import MappingProxyType

from refcurv.report.plots.abilities import retention
from refcurv.report.plots.activation import bands
from refcurv.report.plots.drawing import (
    GREY,
    INK,
    PALE,
    PALETTE,
    STYLE,
    require_matplotlib,
    save,
    svg,
)
from refcurv.report.plots.pareto import front, require_front, sweep_front
from refcurv.report.plots.spectra import POINTS, cumulative, mask, spectrum

FIGURES = MappingProxyType(
    {"retention": retention, "front": front, "spectrum": spectrum, "mask": mask, "bands": bands}
)
"""File name → figure of results, in the order of the page."""

__all__ = [
    "FIGURES",
    "GREY",
    "INK",
    "PALE",
    "PALETTE",
    "POINTS",
    "STYLE",
    "bands",
    "cumulative",
    "front",
    "mask",
    "require_front",
    "require_matplotlib",
    "retention",
    "save",
    "spectrum",
    "svg",
    "sweep_front",
]
