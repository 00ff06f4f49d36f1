"""Three figures of a run: the spectrum and its cut, the bands, what was retained.

Colour is the block, line style the projection, in every figure alike (Okabe and Ito's palette).
Nothing here touches pyplot or the user's matplotlibrc, and equal results give equal bytes.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refcurv.files.disk import WRITING, machine_faults, output_path
from refcurv.law.checks import Array, EmptyError, RefcurvError
from refcurv.report.table import (
    Json,
    band_labels,
    decimal,
    edited_layers,
    kept_share,
    number,
    percent,
    population_name,
    relative,
    whole,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
POINTS = 800
"""Thresholds at which a cumulative curve is evaluated."""

DEPTH = 1e-12
"""Products below this share of the largest are one last step of a curve."""

INK, GREY, PALE = "#222222", "#777777", "#c4c4c4"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")
RATIO_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
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
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "refcurv",
    "svg.fonttype": "path",
}

ROLES = (
    ("arithmetic", ("arithmetic", "addition", "sum", "multiplication")),
    ("facts", ("fact",)),
    ("open book", ("open",)),
    ("logic", ("logic", "boolean")),
    ("copying", ("copy",)),
)
"""The paper's order of damage behind `memorised`, and words by which a population is known."""

PAPER_RANGE = {
    "memorised": (0.03, 0.16),
    "arithmetic": (0.66, 0.74),
    "facts": (0.74, 0.86),
    "open book": (0.93, 0.99),
    "logic": (0.95, 1.06),
}
"""Retention in the paper (PAPER §3: OLMo-2 7B, K-FAC edit), to set beside ours."""


# ------------------------------------------------------------------ figures


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
    with _style():
        look = _looks(list(spectra))
        figure = _figure(9.0, 4.4 + (0 if inside else _legend_height(len(spectra))))
        axes = figure.subplot_mosaic(
            [["mass", "lam"], ["mass", "mu"]], gridspec_kw={"width_ratios": [1.75, 1]}
        )
        for layer, one in spectra.items():
            lam, mu = (np.asarray(one[name], dtype=np.float64) for name in ("lam", "mu"))
            _draw_mass(axes["mass"], lam, mu, cuts.get(layer), _label(layer), look[layer])
            _draw_spectrum(axes["lam"], lam, look[layer])
            _draw_spectrum(axes["mu"], mu, look[layer])
        _finish_mass(axes["mass"], min(_pairs(one) for one in spectra.values()))
        _finish_spectrum(axes["lam"], "λ: output gradients (G)")
        _finish_spectrum(axes["mu"], "μ: inputs (A)")
        axes["mu"].set_xlabel("rank")
        if inside:
            axes["mass"].legend(loc="best")
        else:
            _legend(figure, axes["mass"])
    return figure


def bands(results: Json) -> Figure:
    """Activation ratio of memorised to clean tokens per band, by pair mass and by input rank.

    Args:
        results: of `refcurv demo`; reads `bands`, `input_bands` and `edit`.

    Raises:
        EmptyError: no bands of any layer. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_report.py::test_bands_show_the_ratios
    """
    by_mass, by_rank = results.get("bands") or {}, results.get("input_bands") or {}
    if not by_mass and not by_rank:
        raise EmptyError("report: the results hold no bands to draw.")
    edited = edited_layers(results)
    with _style():
        look = _looks(edited)
        figure = _figure(9.0, 3.8 + _legend_height(len(edited) + 2))
        axes = figure.subplots(1, 2, sharey=True, width_ratios=[7, 5])
        titles = ("Layer output ‖W_b x‖, by pair mass", "Layer input ‖P_b x‖, by input rank")
        units = (
            "band of cumulative curvature mass (%)",
            "band of eigenvectors of A, by rank (%)",
        )
        for ax, found, title, unit in zip(axes, (by_mass, by_rank), titles, units, strict=True):
            _draw_bands(ax, found, look)
            ax.set_title(title)
            ax.set_xlabel(f"{unit}\nsharp  →  flat")
        axes[0].set_ylabel("mean norm, memorised / clean (ratio)")
        _finish_ratio(axes[0])
        _legend(figure, axes[0 if by_mass else 1])
    return figure


def retention(results: Json) -> Figure:
    """What is left of each ability, after / before, in the paper's order.

    Args:
        results: of `refcurv demo`; reads `evaluation`.

    Raises:
        EmptyError: nothing that could be retained, as without a baseline. RefcurvError:
            matplotlib is not installed.

    Proof:  tests/test_report.py::test_bars_are_the_retentions
    """
    evaluation = results["evaluation"]
    split = str(evaluation.get("split") or "")
    abilities = _abilities(evaluation["rows"], split)
    if not abilities:
        raise EmptyError("report: no retention to draw; was there a baseline?")
    rho = number((results.get("settings") or {}).get("rho"))
    with _style():
        figure = _figure(9.0, 1.6 + 0.46 * len(abilities))
        ax, side = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1.35])
        _draw_bars(ax, abilities)
        _write_values(side, abilities)
        share = "" if math.isnan(rho) else f" (ρ = {rho:g})"
        ax.set_title(f"What the edit leaves of each ability{share}", pad=22)
        note = _safe(_perplexities(evaluation["rows"], split), 110)
        ax.text(0, 1.0, note, transform=ax.transAxes, color=GREY, va="bottom")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, 150 dpi; atomic, and the same bytes for the same figure."""
    data = _render(figure, "png", {"Software": None})
    replace(path, data)


def svg(figure: Figure) -> bytes:
    """A figure as SVG: text as outlines, no date, the same bytes for the same figure."""
    return _render(figure, "svg", {"Date": None, "Creator": None})


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: a temporary neighbour takes its place when it is complete."""
    target = output_path("report", path)
    with machine_faults("report", path, WRITING):
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:80]}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


# ------------------------------------------------------------------ matplotlib at arm's length


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    try:
        from matplotlib import style
    except ImportError:
        raise RefcurvError("report: plots need matplotlib: pip install 'refcurv[report]'") from None
    with style.context(["default", STYLE]):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _render(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=dict(metadata))
    return buffer.getvalue()


def _safe(text: str, longest: int = 44) -> str:
    """A text that the plots' font can draw, on one line, shortened in its middle."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(c if c.isprintable() and ord(c) in known else "?" for c in text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
    return text


class _Look(NamedTuple):
    colour: str
    line: str
    mark: str


def _looks(layers: Sequence[str]) -> dict[str, _Look]:
    """Colour by block, line and mark by projection, in order of appearance."""
    parts = {layer: _split(layer) for layer in layers}
    blocks = list(dict.fromkeys(block for block, _ in parts.values()))
    kinds = list(dict.fromkeys(kind for _, kind in parts.values()))
    colours = PALETTE if len(blocks) <= len(PALETTE) else _shades(len(blocks))
    return {
        layer: _Look(
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


def _split(layer: str) -> tuple[str, str]:
    """`blocks.2.mlp.gate` as ("blocks.2", "mlp.gate"); a layer outside the blocks is its own."""
    parts = layer.split(".")
    return (".".join(parts[:2]), ".".join(parts[2:])) if len(parts) > 2 else (layer, "")


def _label(layer: str) -> str:
    """A legend entry; matplotlib hides those that begin with an underscore."""
    text = _safe(layer)
    return f" {text}" if text.startswith("_") else text


def _legend(figure: Figure, ax: Axes) -> None:
    """The axes' legend below the figure, in three columns."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(max(len(labels), 1), 3))


def _legend_height(entries: int) -> float:
    """Inches that a legend of three columns needs."""
    return 0.1 + 0.2 * -(-entries // 3)


def _ticks(axis: Any, show: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------ spectrum


def cumulative(lam: Array, mu: Array) -> tuple[Array, Array]:
    """Share of pairs and share of mass above a falling threshold of λ_i μ_j.

    Every point is exact for its threshold; up to POINTS of them, from the largest product down to
    DEPTH of it, and then (1, 1). No point if there is no mass.
    """
    total, top = lam.sum() * mu.sum(), float(lam[0] * mu[0]) if lam.size and mu.size else 0.0
    if not total > 0:
        return np.empty(0), np.empty(0)
    rising, prefix = mu[::-1], np.concatenate([[0.0], np.cumsum(mu)])
    bottom = max(float(lam[lam > 0].min() * mu[mu > 0].min()), DEPTH * top)
    share, mass = [], []
    for threshold in np.geomspace(top, bottom, POINTS) * (1 - 1e-12):
        with np.errstate(divide="ignore"):
            count = mu.size - np.searchsorted(rising, threshold / lam)
        share.append(count.sum() / (lam.size * mu.size))
        mass.append(float(lam @ prefix[count]) / total)
    return np.array([*share, 1.0]), np.array([*mass, 1.0])


def _pairs(one: Json) -> int:
    return max(1, len(one["lam"]) * len(one["mu"]))


def _draw_mass(ax: Axes, lam: Array, mu: Array, cut: Json | None, label: str, look: _Look) -> None:
    share, mass = cumulative(lam, mu)
    if cut is not None:
        kept, held = kept_share(cut), number(cut.get("mass"))
        label = f"{label}: keeps {percent(kept)}"
        ax.plot([kept, kept], [0, held], ":", color=look.colour, lw=1, label="_drop")
        ax.plot(
            kept, held, look.mark, color=look.colour, ms=7.5, mec="white", mew=1.2, zorder=4,
            label="_cut",
        )  # fmt: skip
    ax.plot(share, mass, look.line, color=look.colour, lw=1.8, label=label)


def _finish_mass(ax: Axes, pairs: int) -> None:
    ax.set_xscale("log")
    ax.set_xlim(1 / pairs, 1.15)
    ax.set_ylim(0, 1.03)
    ax.set_title("Curvature mass held by the sharpest pairs")
    ax.set_xlabel("share of the pairs kept, sharpest first (%)")
    ax.set_ylabel("cumulative curvature mass (%)")
    _ticks(ax.xaxis, lambda x: f"{100 * x:g}")
    _ticks(ax.yaxis, lambda y: f"{100 * y:g}")


def _draw_spectrum(ax: Axes, values: Array, look: _Look) -> None:
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
    _ticks(ax.xaxis, lambda x: f"{x:g}")
    _ticks(ax.yaxis, _power)


def _power(y: float) -> str:
    """10⁻³ and the like; matplotlib would need its mathematics for it."""
    exponent = round(math.log10(y)) if y > 0 else 0
    return f"10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


# ------------------------------------------------------------------ bands


def _draw_bands(ax: Axes, found: Mapping[str, Json], look: Mapping[str, _Look]) -> None:
    """Grey lines for the layers left alone, then the edited ones above them."""
    seen: set[str] = set()
    for layer, one in sorted(found.items(), key=lambda item: item[0] in look):
        ratio = [number(value) for value in one["ratio"]]
        if layer in look:
            kind = look[layer]
            ax.plot(
                ratio, kind.line, color=kind.colour, marker=kind.mark, lw=2, ms=5.5,
                mec="white", mew=0.8, label=_label(layer), zorder=3,
            )  # fmt: skip
            continue
        name = _split(layer)[1].rpartition(".")[2]
        down = name == "down"
        group = "not edited: down" if down else "not edited"
        ax.plot(
            ratio, ":" if down else "-", color=PALE, lw=1.3, zorder=2,
            label=f"_{layer}" if group in seen else group,
        )  # fmt: skip
        seen.add(group)
    ax.axhline(1, color=GREY, lw=1, zorder=1.5)
    ax.grid(visible=False, axis="x")
    ax.margins(x=0.06)
    if found:
        edges = next(iter(found.values()))["edges"]
        ax.set_xticks(range(len(edges) - 1), band_labels(edges))


def _finish_ratio(ax: Axes) -> None:
    """A logarithmic axis, on which twice and half are equally far from 1, with plain numbers."""
    ax.set_yscale("log")
    _ticks(ax.yaxis, lambda y: f"{y:g}")
    low, high = ax.get_ylim()
    low, high = min(low, 0.68), max(high, 1.55)
    ax.set_yticks([tick for tick in RATIO_TICKS if low <= tick <= high])
    ax.set_ylim(low, high)


# ------------------------------------------------------------------ retention


class _Ability(NamedTuple):
    role: str
    name: str
    items: str
    kept: float
    above: float
    values: str


def _abilities(rows: Sequence[Json], split: str) -> list[_Ability]:
    """Populations with a retention, in the paper's order, unknown ones last as they come."""
    order = ["memorised", *(role for role, _ in ROLES)]
    found = []
    for row in rows:
        measure = {"recite": "strict", "answer": "accuracy"}.get(str(row["kind"]))
        if measure is None or not row.get("before"):
            continue
        name = population_name(str(row["name"]), split)
        has_chance = number(row.get("chance")) > 0
        above = number(row.get("retention_above_chance")) if has_chance else math.nan
        before, after = (percent(row[key].get(measure)) for key in ("before", "after"))
        values = f"{before.removesuffix(' %')} → {after}"
        role = _role(str(row["kind"]), name)
        kept = number(row.get("retention"))
        found.append(_Ability(role, name, whole(row.get("items")), kept, above, values))
    rank = {role: place for place, role in enumerate(order)}
    return sorted(found, key=lambda ability: rank.get(ability.role, len(rank)))


def _role(kind: str, name: str) -> str:
    if kind == "recite":
        return "memorised"
    for role, words in ROLES:
        if any(word in name.lower() for word in words):
            return role
    return ""


def _draw_bars(ax: Axes, abilities: Sequence[_Ability]) -> None:
    """Bars; below each the paper's range, on it the chance-corrected mark."""
    place = np.arange(len(abilities))
    kept = np.nan_to_num(np.array([ability.kept for ability in abilities]))
    colours = [PALETTE[1 if a.role == "memorised" else 0] for a in abilities]
    ax.barh(place, kept, height=0.5, color=colours, zorder=2, label="_bars")
    ax.plot(
        [a.above for a in abilities], place, "D", color="white", mec=INK, ms=5.5, mew=1.1,
        zorder=4, label="above chance: (after − chance) / (before − chance)",
    )  # fmt: skip
    label = "range in the paper (OLMo-2 7B, K-FAC)"
    for y, ability in enumerate(abilities):
        if ability.role in PAPER_RANGE:
            ax.plot(
                PAPER_RANGE[ability.role], [y + 0.38] * 2, "-|", color=INK, lw=1.2, ms=6,
                zorder=3, label=label,
            )  # fmt: skip
            label = "_paper"
    ax.axvline(1, color=GREY, lw=1, zorder=1.5)
    _finish_bars(ax, abilities)


def _finish_bars(ax: Axes, abilities: Sequence[_Ability]) -> None:
    """Limits that hold every mark, names at the left."""
    numbers = [x for a in abilities for x in (a.kept, a.above) if not math.isnan(x)]
    low, high = min([0.0, *numbers]), max([1.06, *numbers])
    ax.set_xlim(low - (0.03 if low < 0 else 0), high + 0.03)
    ax.set_ylim(len(abilities) - 0.4, -0.5)
    names = []
    for a in abilities:
        name = a.name if a.role in ("", a.name) else f"{a.role}: {a.name}"
        names.append(f"{_safe(name, 28)}  (n = {a.items})")
    ax.set_yticks(range(len(abilities)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("retention: after / before (%)")
    _ticks(ax.xaxis, lambda x: f"{100 * x:g}")


def _write_values(ax: Axes, abilities: Sequence[_Ability]) -> None:
    """The numbers behind the bars, in two columns."""
    ax.set_axis_off()
    across = ax.get_yaxis_transform()
    for x, head in ((0.3, "retained"), (1.0, "before → after")):
        ax.text(x, 1.0, head, transform=ax.transAxes, ha="right", va="bottom", color=GREY)
    for y, a in enumerate(abilities):
        ax.text(0.3, y, percent(a.kept), transform=across, ha="right", va="center", weight="bold")
        ax.text(1.0, y, a.values, transform=across, ha="right", va="center", color=GREY)


def _perplexities(rows: Sequence[Json], split: str) -> str:
    """What happened to each perplexity, on one line."""
    notes = []
    for row in rows:
        if row["kind"] == "text" and row.get("before"):
            before, after = (row[key].get("perplexity") for key in ("before", "after"))
            change = percent(relative(before, after), sign="+")
            name = population_name(str(row["name"]), split)
            notes.append(f"{name} {decimal(before, 2)} → {decimal(after, 2)} ({change})")
    return "perplexity: " + "; ".join(notes) if notes else ""
