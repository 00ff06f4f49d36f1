"""What forgetting costs: recitation against perplexity, for the edit and its controls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refcurv.law.checks import EmptyError
from refcurv.report.cells import Json, decimal, number, percent, population_name, whole
from refcurv.report.plots.drawing import (
    GREY,
    INK,
    LINES,
    MARKS,
    PALETTE,
    blank,
    legend,
    safe,
    styled,
    ticks,
)
from refcurv.report.table import method_name
from refcurv.sweeps.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RISES = 4.0
"""The axis shows so many times what the first method's edit changes the perplexity by."""

HOLDS = 8.0
"""It is widened for marks that cost up to so many times as much."""

FARTHEST = 3.0
"""And at most so many times the unedited perplexity."""

TICKS = 8
"""At most so many, at round percentages of the unedited perplexity."""

BARS = "; bars: 95 %, by the choice of items"

BEYOND = "\na line ends where the next edit costs more than the axis shows"

Point = tuple[float, float]
"""Perplexity and recitation."""

Ends = tuple[object, object]
"""The intervals of both; None where it is not known."""


def front(results: Json) -> Figure:
    """Recitation left against perplexity along each method's strengths; lower left is better.

    A line begins at the unedited model. The large marks are the edits that are compared; the dotted
    line is the perplexity of the first of them, K-FAC's, which the others were to have on dev. What
    costs much more than that is outside of the axes: a line ends before it, and the legend says so.
    Every perplexity below the unedited one is inside.

    Args:
        results: of `refcurv demo`; reads `controls`: `unedited` {recitation, perplexity}, `curves`
            {method: [{removed, recitation, perplexity}]}, `compared` [{method, matched, recitation,
            perplexity}], `populations` and `split`.

    Raises:
        EmptyError: no curves, and why. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_report.py::test_the_front_is_the_points,
        ::test_ticks_are_round_shares_of_the_unedited_perplexity
    """
    found = results.get("controls") or {}
    curves = found.get("curves") or {}
    if not curves:
        reason = found.get("left_out") or "no controls were run"
        raise EmptyError(f"report: no trade-off to draw: {reason}.")
    compared = {str(row["method"]): row for row in found.get("compared") or ()}
    start = found.get("unedited") or {}
    with styled():
        figure = blank(9.0, 4.6)
        ax, names = figure.subplots(), found.get("populations") or {}
        base, costs = number(start.get("perplexity")), _perplexities(compared.values())
        every = _perplexities(p for points in curves.values() for p in points)
        left, right = _range(base, costs, every)
        for place, (method, points) in enumerate(curves.items()):
            _draw_curve(ax, place, method, [start, *points], compared.get(method), names, right)
        _draw_start(ax, start)
        if costs:
            ax.axvline(costs[0], color=GREY, lw=1, ls=":", zorder=1.5)
        _finish(ax, base, left, right)
        split = str(found.get("split") or "")
        recite, text = (
            safe(population_name(str(names.get(key) or what), split), 24)
            for key, what in (("recitation", "memorised text"), ("perplexity", "clean text"))
        )
        ax.set_title("What forgetting costs, by curvature and by other cuts")
        many = start.get("items") or {}
        n = {key: f" (n {many[name]:,})" if (name := names.get(key)) in many else ""
             for key in ("recitation", "perplexity")}  # fmt: skip
        ax.set_ylabel(f"{recite}{n['recitation']}: recited without an error (%)")
        bars = BARS if any(one.get("intervals") for one in compared.values()) else ""
        ax.set_xlabel(f"perplexity of {text}{n['perplexity']}, and its rise{bars}")
        title = (
            "large marks, and what they recite: matched on dev to the perplexity of the K-FAC edit"
        )
        title += f"; dotted: that edit's on {split}" if split and costs else ""
        legend(figure, ax, 4, title + (BEYOND if any(x > right for x in every) else ""))
    return figure


def _draw_curve(
    ax: Axes, place: int, method: str, points: list[Json], compared: Json | None, names: Json,
    right: float,
) -> None:  # fmt: skip
    """A line through its points from the weakest on, and the compared edit as a large mark."""
    shown = sorted(
        (p for p in points if not math.isnan(number(p.get("perplexity")))),
        key=lambda p: number(p.get("removed") or 0.0),
    )
    colour = _colour(method, place)
    mark = "*" if place == 0 else MARKS[(place - 1) % len(MARKS)]
    name = safe(method_name(method), 24)
    if compared is not None:
        matched = compared.get("matched", True)
        left = percent(compared.get("recitation")) if matched else str(compared.get("verdict"))
        name = f"{name}: {safe(left, 20)}"
        at = number(compared.get("perplexity")), number(compared.get("recitation"))
        known = compared.get("intervals") or {}
        sure = known.get(names.get("perplexity")), known.get(names.get("recitation"))
        _draw_interval(ax, colour, at, sure)
        ax.plot(
            *at, mark, color=colour, ms=15 if place == 0 else 8, mec="white", mew=1.1, zorder=5,
            label="_compared",
        )  # fmt: skip
    ax.plot(
        [_within(number(p.get("perplexity")), right) for p in shown],
        [number(p.get("recitation")) for p in shown],
        "-", marker=mark, color=colour, lw=2.4 if place == 0 else 1.6, ms=5 if place == 0 else 3.5,
        zorder=4 if place == 0 else 3, label=name,
    )  # fmt: skip


def _colour(method: str, place: int) -> str:
    """That of the method, whichever others are drawn; of an unknown one that of its place."""
    name = method.replace(" ", "-")
    return PALETTE[(METHODS.index(name) if name in METHODS else place) % len(PALETTE)]


def _draw_interval(ax: Axes, colour: str, at: Point, sure: Ends) -> None:
    """How far a point may be off by the choice of items, as far as that is known."""
    for name, place, interval in zip("xy", at, sure, strict=True):
        low, high = map(number, interval) if isinstance(interval, list) else (math.nan, math.nan)
        if low <= place <= high:  # not where one of them is unknown
            bar: dict[str, Any] = {f"{name}err": [[place - low], [high - place]]}
            ax.errorbar(*at, **bar, fmt="none", ecolor=colour, elinewidth=1, alpha=0.5, zorder=2,
                        label="_interval")  # fmt: skip


def _draw_start(ax: Axes, start: Json) -> None:
    """The unedited model, a ring with its name."""
    x, y = number(start.get("perplexity")), number(start.get("recitation"))
    ax.plot(x, y, "o", color="white", mec=INK, ms=8, mew=1.4, zorder=6, label="_unedited")
    ax.annotate("unedited", (x, y), xytext=(8, 7), textcoords="offset points", color=INK)


def _range(base: float, costs: Sequence[float], every: Sequence[float]) -> tuple[float, float]:
    """Limits that hold the compared edits, and of all marks those that do not cost much more."""
    if not base > 0 or not costs:
        return math.nan, math.inf
    rise = abs(costs[0] - base)
    near = (x for x in every if x <= base + HOLDS * rise)
    left = min(base, *costs, *every)
    right = max(base * 1.02, base + RISES * rise, *(1.01 * x for x in (*costs, *near)))
    right = min(right, FARTHEST * max(base, costs[0]))
    return left - 0.03 * (right - left), right


def _within(x: float, right: float) -> float:
    """NaN, where a line breaks, for what costs more than the axis shows."""
    return x if x <= right else math.nan


def _finish(ax: Axes, base: float, left: float, right: float) -> None:
    """Limits, and ticks at round rises of perplexity, which stand below them."""
    if left < right < math.inf:
        ax.set_xlim(left, right)
    ax.set_ylim(-0.02, 1.09)
    ticks(ax.yaxis, lambda y: f"{100 * y:g}")
    if base > 0:
        _rises(ax, base)
    else:
        ticks(ax.xaxis, lambda x: f"{x:g}")


def _rises(ax: Axes, base: float) -> None:
    """Ticks at the unedited perplexity and round shares of it more: "25.09" over "+5 %"."""
    from matplotlib.ticker import MaxNLocator

    low, high = (100 * (x / base - 1) for x in ax.get_xlim())
    found = MaxNLocator(TICKS - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    shown = [x for x in found if low <= x <= high]
    texts = [f"{decimal(base * (1 + x / 100), 2)}\n{x + 0.0:+.4g} %" for x in shown]
    ax.set_xticks([base * (1 + x / 100) for x in shown], texts)


def _perplexities(points: Iterable[Json]) -> list[float]:
    """Those that are known, in their order."""
    return [x for p in points if not math.isnan(x := number(p.get("perplexity")))]


# ------------------------------------------------------------------ of a sweep


def require_front(split: str, kinds: Mapping[str, str]) -> tuple[str, str]:
    """The first text and the first passages of a split, by {population: kind}.

    Raises: EmptyError, it has none.

    Proof: tests/test_sweep.py::test_what_cannot_be_drawn_is_refused_before_the_work
    """
    text, recite = (
        next((name for name, one in kinds.items() if one == kind), None)
        for kind in ("text", "recite")
    )
    if text is None or recite is None:
        raise EmptyError(
            f"sweep: split {split!r} has no {'recite' if text else 'text'} population to draw. "
            "Leave out --plot."
        )
    return text, recite


def sweep_front(found: Json) -> Figure:
    """Every edit of a sweep: recitation left against perplexity, on the split that reports.

    Colour is the method, the mark and the line are the pattern; a line goes from the unedited model
    through the edits by falling rho. Stars are K-FAC edits on the front of dev.

    Args:
        found: `Sweep.to_json()`.

    Raises:
        EmptyError: the split has no text or no passages. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_sweep.py::test_the_front_is_the_points
    """
    split = str(found["split"])
    base = found["baseline"][split]
    text, recite = require_front(split, {name: str(one["kind"]) for name, one in base.items()})

    def point(left: Json) -> tuple[float, float]:
        values = (left[text]["values"]["perplexity"], left[recite]["values"]["strict"])
        return number(values[0]), number(values[1])

    def ends(left: Json) -> Ends:
        return left[text].get("interval"), left[recite].get("interval")

    methods = list(dict.fromkeys(str(one["method"]) for one in found["edits"]))
    patterns = list(dict.fromkeys(str(one["layers"]) for one in found["edits"]))
    costs = [point(one["populations"][split])[0] for one in found["edits"]]
    sure = [ends(one["populations"][split]) for one in found["edits"]]
    reach = [number(cost[1]) for cost, _ in sure if isinstance(cost, list)]
    left_end, right = _sweep_range(point(base)[0], costs, reach)
    with styled():
        figure = blank(9.0, 4.9)
        ax = figure.subplots()
        for method, pattern in ((m, p) for p in patterns for m in methods):
            edits = [one for one in found["edits"]
                     if (one["method"], one["layers"]) == (method, pattern)]  # fmt: skip
            look = _colour(method, methods.index(method)), patterns.index(pattern)
            name = method_name(method.replace("-", " "))
            name += f", {pattern}" if len(patterns) > 1 else ""
            lefts = [one["populations"][split] for one in edits]
            points = [
                (one, point(left), ends(left)) for one, left in zip(edits, lefts, strict=True)
            ]
            _draw_edits(ax, look, safe(name), point(base), points, right)
        _draw_start(ax, dict(zip(("perplexity", "recitation"), point(base), strict=True)))
        _finish(ax, point(base)[0], left_end, right)
        on = "" if found["on"] is None else f", at equal {found['match']} on dev"
        ax.set_title(f"What forgetting costs{on}")
        bars = BARS if any(one is not None for pair in sure for one in pair) else ""
        n = {name: f"n {whole(base[name].get('items'))}" for name in (text, recite)}
        ax.set_ylabel(f"{safe(population_name(recite, split), 24)} ({n[recite]}): "
                      "recited without an error (%)")  # fmt: skip
        ax.set_xlabel(f"perplexity of {safe(population_name(text, split), 24)} ({n[text]}), "
                      f"and its rise{bars}")  # fmt: skip
        stars = any(one["front"] and one["method"] == "kfac" for one in found["edits"])
        title = "stars: on the front of dev" if stars else ""
        title += BEYOND if any(x > right for x in costs) else ""
        legend(figure, ax, 4 if len(patterns) == 1 else 2, title.strip() or None)
    return figure


def _draw_edits(
    ax: Axes,
    look: tuple[str, int],
    name: str,
    start: Point,
    edits: list[tuple[Json, Point, Ends]],
    right: float,
) -> None:
    """One method on one pattern: a line from the unedited model through its edits."""
    colour, place = look
    shown = sorted(edits, key=lambda three: -number(three[0]["rho"]))
    line = [(_within(x, right), y) for x, y in (start, *(at for _, at, _ in shown))]
    ax.plot(
        *zip(*line, strict=True), LINES[place % len(LINES)], marker=MARKS[place % len(MARKS)],
        color=colour, lw=1.6, ms=4.5, zorder=3, label=name,
    )  # fmt: skip
    for one, at, sure in shown:
        _draw_interval(ax, colour, at, sure)
        if one["front"] and one["method"] == "kfac":
            ax.plot(*at, "*", color=colour, ms=15, mec="white", mew=1.1, zorder=5, label="_front")


def _sweep_range(base: float, costs: list[float], reach: list[float]) -> tuple[float, float]:
    """Limits that hold what costs at most FARTHEST times the unedited perplexity, and one edit.

    reach: where bars end.
    """
    known = [x for x in costs if not math.isnan(x)]
    ends = [x for x in reach if not math.isnan(x)]
    left, right = min([base, *known]), max([1.02 * base, *known, *ends])
    right = min(right, max([FARTHEST * base, *sorted(known)[:1]]))
    return left - 0.03 * (right - left), right + 0.05 * (right - left)
