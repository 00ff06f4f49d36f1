"""Matplotlib at arm's length: one style, colours, legends, and figures as bytes.

Nothing here touches pyplot or the user's matplotlibrc, and equal results give equal bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refcurv.files.disk import write_bytes
from refcurv.files.paths import one_line
from refcurv.law.checks import RefcurvError
from refcurv.law.libraries import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150

INK, GREY, PALE = "#222222", "#777777", "#c4c4c4"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's."""

LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")
INSIDE = 6
"""Up to so many legend entries fit inside a plot."""

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 3.6,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "refcurv",
    "svg.fonttype": "path",
}


# ------------------------------------------------------------------ files


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, 150 dpi; atomic, and the same bytes for the same figure."""
    write_bytes("report", path, _render(figure, "png", {"Software": None}))


def svg(figure: Figure) -> bytes:
    """A figure as SVG: text as outlines, no date, the same bytes for the same figure."""
    return _render(figure, "svg", {"Date": None, "Creator": None})


def _render(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=dict(metadata))
    return buffer.getvalue()


# ------------------------------------------------------------------ what figures share


def require_matplotlib() -> None:
    """RefcurvError without it; asked before the work that the plots are of."""
    missing = RefcurvError("report: plots need matplotlib: pip install 'refcurv[report]'")
    try:
        with needed("matplotlib", missing):
            import matplotlib  # noqa: F401
    except ValueError as error:  # MPLBACKEND, a style, a file of settings
        raise RefcurvError(f"report: matplotlib cannot be used: {one_line(error)}.") from None


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    require_matplotlib()
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def safe(text: str, longest: int = 44) -> str:
    """A text that the plots' font can draw, on one line, shortened in its middle."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(c if c.isprintable() and ord(c) in known else "?" for c in text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
    return text


class Look(NamedTuple):
    """How one layer is drawn."""

    colour: str
    line: str
    mark: str


def looks(layers: Sequence[str]) -> dict[str, Look]:
    """Colour by block, line and mark by projection, in order of appearance."""
    parts = {layer: split(layer) for layer in layers}
    blocks = list(dict.fromkeys(block for block, _ in parts.values()))
    kinds = list(dict.fromkeys(kind for _, kind in parts.values()))
    colours = PALETTE if len(blocks) <= len(PALETTE) else _shades(len(blocks))
    return {
        layer: Look(
            colours[blocks.index(block)],
            LINES[kinds.index(kind) % len(LINES)],
            MARKS[kinds.index(kind) % len(MARKS)],
        )
        for layer, (block, kind) in parts.items()
    }


def _shades(count: int) -> tuple[str, ...]:
    """More blocks than the palette has: from dark to light, as the blocks are ordered."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return tuple(to_hex(c) for c in colormaps["viridis"](np.linspace(0, 0.9, count)))


def split(layer: str) -> tuple[str, str]:
    """`blocks.2.mlp.gate` as ("blocks.2", "mlp.gate"); a layer outside the blocks is its own."""
    parts = layer.split(".")
    return (".".join(parts[:2]), ".".join(parts[2:])) if len(parts) > 2 else (layer, "")


def entry(layer: str) -> str:
    """A legend entry; matplotlib hides those that begin with an underscore."""
    text = safe(layer)
    return f" {text}" if text.startswith("_") else text


def legend(figure: Figure, ax: Axes, columns: int = 3, title: str | None = None) -> None:
    """The axes' legend below the figure, in so many columns."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(max(len(labels), 1), columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)


def legend_height(entries: int) -> float:
    """Inches that a legend of three columns needs."""
    return 0.1 + 0.2 * -(-entries // 3)


def ticks(axis: Any, show: Callable[[float], str]) -> None:
    """Major ticks named by `show`, minor ones not at all."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axis.set_minor_formatter(NullFormatter())
