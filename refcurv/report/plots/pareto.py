"""What forgetting costs: recitation against perplexity, for the edit and its controls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refcurv.law.checks import EmptyError
from refcurv.report.cells import Json, number, percent, population_name, relative, whole
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RISES = 4.0
"""The axis shows so many times what the first method's edit changes the perplexity by."""

FARTHEST = 3.0
"""And at most so many times the unedited perplexity."""

BARS = "; bars: 95 %, by the choice of items"

Point = tuple[float, float]
"""Perplexity and recitation."""

Ends = tuple[object, object]
"""The intervals of both; None where it is not known."""


def front(results: Json) -> Figure:
    """Recitation left against perplexity along each method's strengths; lower left is better.

    A line begins at the unedited model. The large marks are the edits that are compared; the dotted
    line is the perplexity of the first of them, K-FAC's, which the others were to have. What costs
    much more than that is outside of the axes; every perplexity below the unedited one is inside.

    Args:
        results: of `refcurv demo`; reads `controls`: `unedited` {recitation, perplexity}, `curves`
            {method: [{removed, recitation, perplexity}]}, `compared` [{method, matched, recitation,
            perplexity}], `populations` and `split`.

    Raises:
        EmptyError: no curves, and why. RefcurvError: matplotlib is not installed.

    Proof:  tests/test_report.py::test_the_front_is_the_points
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
        for place, (method, points) in enumerate(curves.items()):
            _draw_curve(ax, place, method, [start, *points], compared.get(method), names)
        _draw_start(ax, start)
        _finish(ax, start, compared, curves)
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
        legend(figure, ax, 4, "recited at the perplexity of the K-FAC edit")
    return figure


def _draw_curve(
    ax: Axes, place: int, method: str, points: list[Json], compared: Json | None, names: Json
) -> None:
    """A line through its points from the weakest on, and the compared edit as a large mark."""
    shown = sorted(
        (p for p in points if not math.isnan(number(p.get("perplexity")))),
        key=lambda p: number(p.get("removed") or 0.0),
    )
    colour = PALETTE[place % len(PALETTE)]
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
        [number(p.get("perplexity")) for p in shown],
        [number(p.get("recitation")) for p in shown],
        "-", marker=mark, color=colour, lw=2.4 if place == 0 else 1.6, ms=5 if place == 0 else 3.5,
        zorder=4 if place == 0 else 3, label=name,
    )  # fmt: skip


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


def _finish(
    ax: Axes, start: Json, compared: Mapping[str, Json], curves: Mapping[str, Sequence[Json]]
) -> None:
    """Limits that hold the compared edits, ticks with the rise of perplexity below them."""
    base = number(start.get("perplexity"))
    costs = _perplexities(compared.values())
    if base > 0 and costs:
        ax.axvline(costs[0], color=GREY, lw=1, ls=":", zorder=1.5)
        left = min(base, *costs, *_perplexities(p for points in curves.values() for p in points))
        right = max(base * 1.02, base + RISES * abs(costs[0] - base), *(1.01 * x for x in costs))
        right = min(right, FARTHEST * max(base, costs[0]))
        ax.set_xlim(left - 0.03 * (right - left), right)
    ax.set_ylim(-0.02, 1.09)
    ticks(ax.yaxis, lambda y: f"{100 * y:g}")
    ticks(ax.xaxis, lambda x: f"{x:g}\n{percent(relative(base, x), 0, '+')}")


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
    with styled():
        figure = blank(9.0, 4.9)
        ax = figure.subplots()
        for method, pattern in ((m, p) for p in patterns for m in methods):
            edits = [one for one in found["edits"]
                     if (one["method"], one["layers"]) == (method, pattern)]  # fmt: skip
            look = PALETTE[methods.index(method) % len(PALETTE)], patterns.index(pattern)
            name = method_name(method.replace("-", " "))
            name += f", {pattern}" if len(patterns) > 1 else ""
            lefts = [one["populations"][split] for one in edits]
            points = [
                (one, point(left), ends(left)) for one, left in zip(edits, lefts, strict=True)
            ]
            _draw_edits(ax, look, safe(name), point(base), points)
        _draw_start(ax, dict(zip(("perplexity", "recitation"), point(base), strict=True)))
        _finish_sweep(ax, point(base)[0], [point(one["populations"][split])[0]
                                           for one in found["edits"]])  # fmt: skip
        on = "" if found["on"] is None else f", at equal {found['match']} on dev"
        ax.set_title(f"What forgetting costs{on}")
        sure = [ends(one["populations"][split]) for one in found["edits"]]
        bars = BARS if any(one is not None for pair in sure for one in pair) else ""
        n = {name: f"n {whole(base[name].get('items'))}" for name in (text, recite)}
        ax.set_ylabel(f"{safe(population_name(recite, split), 24)} ({n[recite]}): "
                      "recited without an error (%)")  # fmt: skip
        ax.set_xlabel(f"perplexity of {safe(population_name(text, split), 24)} ({n[text]}), "
                      f"and its rise{bars}")  # fmt: skip
        stars = any(one["front"] and one["method"] == "kfac" for one in found["edits"])
        title = "stars: on the front of dev" if stars else None
        legend(figure, ax, 4 if len(patterns) == 1 else 2, title)
    return figure


def _draw_edits(
    ax: Axes,
    look: tuple[str, int],
    name: str,
    start: Point,
    edits: list[tuple[Json, Point, Ends]],
) -> None:
    """One method on one pattern: a line from the unedited model through its edits."""
    colour, place = look
    shown = sorted(edits, key=lambda three: -number(three[0]["rho"]))
    line = [start, *(at for _, at, _ in shown)]
    ax.plot(
        *zip(*line, strict=True), LINES[place % len(LINES)], marker=MARKS[place % len(MARKS)],
        color=colour, lw=1.6, ms=4.5, zorder=3, label=name,
    )  # fmt: skip
    for one, at, sure in shown:
        _draw_interval(ax, colour, at, sure)
        if one["front"] and one["method"] == "kfac":
            ax.plot(*at, "*", color=colour, ms=15, mec="white", mew=1.1, zorder=5, label="_front")


def _finish_sweep(ax: Axes, base: float, costs: list[float]) -> None:
    """Limits that hold what costs no more than FARTHEST times the unedited perplexity."""
    known = [x for x in costs if not math.isnan(x)]
    left, right = min([base, *known]), max([1.02 * base, *known])
    right = min(right, FARTHEST * base)
    ax.set_xlim(left - 0.03 * (right - left), right + 0.05 * (right - left))
    ax.set_ylim(-0.02, 1.09)
    ticks(ax.yaxis, lambda y: f"{100 * y:g}")
    ticks(ax.xaxis, lambda x: f"{x:g}\n{percent(relative(base, x), 0, '+')}")
