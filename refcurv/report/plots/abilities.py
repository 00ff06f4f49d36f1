"""What is left of each ability, after / before, in the paper's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refcurv.law.checks import EmptyError
from refcurv.report.cells import (
    MISSING,
    Json,
    number,
    percent,
    population_name,
    relative,
    whole,
)
from refcurv.report.plots.drawing import GREY, INK, PALETTE, blank, legend, safe, styled, ticks
from refcurv.report.table import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = (
    ("arithmetic", ("arithmetic", "addition", "sum", "multiplication")),
    ("facts", ("fact",)),
    ("open book", ("open",)),
    ("logic", ("logic", "boolean")),
    ("copying", ("copy",)),
)
"""The paper's order of damage behind `memorised`, and words by which a population is known."""

SIDES = "before", "after"

BAR = 0.5
"""Height of a bar, in rows."""

PAPER_RANGE = {
    "memorised": (0.03, 0.16),
    "arithmetic": (0.66, 0.74),
    "facts": (0.74, 0.86),
    "open book": (0.93, 0.99),
    "logic": (0.95, 1.06),
}
"""Retention in the paper (METHOD, Reported results: OLMo-2 7B, K-FAC edit), to set beside ours."""


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
    with styled():
        figure = blank(9.0, 1.6 + 0.46 * len(abilities))
        ax, side = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1.35])
        _draw_bars(ax, abilities)
        _write_values(side, abilities)
        share = "" if math.isnan(rho) else f" (ρ = {rho:g})"
        ax.set_title(f"What the edit leaves of each ability{share}", pad=22)
        note = safe(_perplexities(evaluation["rows"], split), 110)
        ax.text(0, 1.0, note, transform=ax.transAxes, color=GREY, va="bottom")
        legend(figure, ax, 2)
    return figure


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
        before, after = (percent(row[key].get(measure)) for key in SIDES)
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
    ax.barh(place, kept, height=BAR, color=colours, zorder=2, label="_bars")
    for y, ability in enumerate(abilities):
        if ability.kept == 0:  # a bar of no width, unlike one that is not known
            ax.plot(
                [0, 0], [y - BAR / 2, y + BAR / 2], color=colours[y], lw=2.5, zorder=2.5,
                clip_on=False, solid_capstyle="butt", label="_none left",
            )  # fmt: skip
    above = np.array([a.above for a in abilities])
    if np.isfinite(above).any():
        ax.plot(
            above, place, "D", color="white", mec=INK, ms=5.5, mew=1.1, zorder=4,
            label="above chance: (after − chance) / (before − chance)",
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
        names.append(f"{safe(name, 28)}  (n = {a.items})")
    ax.set_yticks(range(len(abilities)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("retention: after / before (%)")
    ticks(ax.xaxis, lambda x: f"{100 * x:g}")


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
            rise = percent(relative(*(row[x].get("perplexity") for x in SIDES)), sign="+")
            before, after = (measured("perplexity", row[x]) for x in SIDES)
            name = population_name(str(row["name"]), split)
            notes.append(f"{name} {before} → {after}" + (rise != MISSING) * f" ({rise})")
    return "perplexity: " + "; ".join(notes) if notes else ""
