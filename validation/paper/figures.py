"""The figures of validation/paper/README.md, from the result files.

    python -m validation.paper.figures

A point or bar is a mean over seeds, a whisker its 95 % t interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refcurv.evaluation.bands import RANK_PERCENT
from refcurv.report.plots import GREY, PALE, PALETTE, STYLE, save
from validation.paper.results import (
    MASS_PERCENT,
    METHODS,
    ORDER,
    PAPER_KEPT,
    VARIANTS,
    Json,
    Runs,
    curve_kept,
    curve_rise,
    load,
    named,
    over,
    refit_rise,
    retained,
    rise,
    rows,
)
from validation.paper.statistics import Interval, interval

HERE = Path(__file__).parent
LOOK = dict(zip((*METHODS, *VARIANTS), (*PALETTE, "#999933", "#882255"), strict=True))


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def whisker(ax: Axes, x: float, found: Interval, scale: float = 100) -> None:
    if np.isfinite(found.half):
        at, half = scale * found.mean, scale * found.half
        ax.plot([x, x], [at - half, at + half], color="#222222", lw=1, zorder=4)


# ------------------------------------------------------------------ language model


def retention(runs: Runs) -> Figure:
    """Figure 3: what each method leaves, by kind of task, at one perplexity."""
    drawn = figure(9, 3.8)
    ax = drawn.subplots()
    width = 0.8 / len(METHODS)
    for m, method in enumerate(METHODS):
        for k, name in enumerate(ORDER):
            found = over(runs, lambda run, m=method, n=name: retained(rows(run["compared"][m])[n]))
            x = k + (m - (len(METHODS) - 1) / 2) * width
            label = named(method) if k == 0 else None
            ax.bar(x, 100 * found.mean, width * 0.9, color=LOOK[method], label=label, zorder=2)
            whisker(ax, x, found)
    for k, name in enumerate(ORDER):
        if name in PAPER_KEPT:
            low, high = (100 * share for share in PAPER_KEPT[name])
            label = "paper, K-FAC" if k == 0 else None
            ax.fill_between([k - 0.46, k + 0.46], low, high, color=PALE, zorder=1, label=label)
    ax.axhline(100, color=GREY, lw=1)
    ax.set_xticks(range(len(ORDER)), [name.replace("_", " ") for name in ORDER])
    ax.set_ylabel("retained: after / before [%]")
    ax.set_title("What each edit leaves at the perplexity of the K-FAC edit")
    drawn.legend(loc="outside lower center", ncols=6)
    return drawn


def front(runs: Runs) -> Figure:
    """Recitation against both perplexities along every method's strengths, and what it costs."""
    drawn = figure(10.5, 4.2)
    axes = drawn.subplots(1, 3)
    others = [name for name in ORDER if name != "quotes"]
    for method in (*METHODS, *VARIANTS):
        curves = [run["curves"][method] for run in runs]

        def mean(value: Callable[[Json, Json], float], curves: Json = curves) -> list[float]:
            """At each strength, in per cent."""
            pairs = [list(zip(runs, points, strict=True)) for points in zip(*curves, strict=True)]
            return [100 * float(np.mean([value(*pair) for pair in at])) for at in pairs]

        quotes, rest = mean(left("quotes")), np.mean([mean(left(n)) for n in others], axis=0)
        look = {"color": LOOK[method], "ls": "--" if method in VARIANTS else "-", "lw": 1.6,
                "marker": "o", "ms": 3}  # fmt: skip
        axes[0].plot([0, *mean(curve_rise)], [100, *quotes], label=named(method), **look)
        axes[1].plot([0, *mean(refit_rise)], [100, *quotes], **look)
        axes[2].plot([100, *quotes], [100, *rest], **look)
    edits = [rows(run["compared"]["kfac"]) for run in runs]
    chosen = {n: 100 * float(np.mean([retained(edit[n]) for edit in edits])) for n in ORDER}
    at = 100 * over(runs, lambda run: rise(run["compared"]["kfac"])).mean
    star = {"color": "#222222", "marker": "*", "ms": 11, "ls": "", "zorder": 5}
    axes[0].plot(at, chosen["quotes"], label="chosen", **star)
    axes[2].plot(chosen["quotes"], np.mean([chosen[name] for name in others]), **star)
    for ax, title in zip(axes, ("By perplexity", "At the best temperature", "By forgetting"),
                         strict=True):  # fmt: skip
        ax.set_title(title)
        ax.set_ylim(0, 103)
    for ax in axes[:2]:
        ax.set_xlim(-1, 30)
        ax.set_xlabel("rise of perplexity [%]")
        ax.set_ylabel("quotes still recited [%]")
    axes[2].set_xlim(103, -3)
    axes[2].set_xlabel("quotes still recited [%]")
    axes[2].set_ylabel("all other abilities retained, mean [%]")
    drawn.legend(loc="outside lower center", ncols=5)
    return drawn


def left(name: str) -> Callable[[Json, Json], float]:
    """What a point of a curve leaves of a population."""
    return lambda run, point: curve_kept(run, point, name)


def band_ratios(runs: Runs, label: str = "quotes / language") -> Figure:
    """Figure 2: activation ratios, layer by layer and band by band."""
    kinds = {
        "pair_mass": "curvature: ‖W_b x‖ by pair mass",
        "input_rank": "‖P_b x‖, rank in A",
        "svd": "‖P_b x‖, SVD of W",
    }
    layers = list(runs[0]["activation"]["pair_mass"])
    drawn = figure(10, 0.32 * len(layers) + 1.2)
    axes = drawn.subplots(1, 3, sharey=True, width_ratios=[7, 4, 4])
    for ax, (kind, title) in zip(axes, kinds.items(), strict=True):
        ratio = np.array(
            [
                [interval([run["activation"][kind][layer]["ratio"][b] for run in runs]).mean
                 for b in range(len(runs[0]["activation"][kind][layer]["ratio"]))]
                for layer in layers
            ]
        )  # fmt: skip
        ends = MASS_PERCENT if kind == "pair_mass" else RANK_PERCENT
        shades = ax.imshow(np.log2(ratio), cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
        for (i, b), value in np.ndenumerate(ratio):
            dark = abs(np.log2(value)) > 1
            ax.text(b, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "#222222")  # fmt: skip
        ax.set_xticks(range(ratio.shape[1]), [f"{end}" for end in ends[1:]])
        ax.set_yticks(range(len(layers)), [name.removeprefix("blocks.") for name in layers])
        ax.set_title(title)
        ax.set_xlabel("band ends at [%]; sharp → flat")
        ax.grid(visible=False)
    bar = drawn.colorbar(shades, ax=axes, shrink=0.8, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["½", "1", "2"])
    bar.set_label(label)
    return drawn


def ratio_against_retention(runs: Runs) -> Figure:
    """Figure 4: how much a task drives what is cut, and what it keeps."""
    drawn = figure(6.2, 4)
    ax = drawn.subplots()
    for name, colour in zip(ORDER, PALETTE, strict=True):
        x, y = [], []
        for run in runs:
            layers = run["tasks"][name].values()
            flat = [np.mean(one["ratio"][4:]) / one["ratio"][0] for one in layers]
            x.append(np.mean(flat))
            y.append(100 * retained(rows(run["compared"]["kfac"])[name]))
        ax.plot(x, y, "o", color=colour, ms=4, alpha=0.5)
        ax.plot(np.mean(x), np.mean(y), "o", color=colour, ms=9, label=name.replace("_", " "))
    ax.set_xlabel("flat bands (80-100 %) over the sharpest one, task / language")
    ax.set_ylabel("retained [%]")
    ax.set_title("What a task drives, and what it keeps")
    ax.legend()
    return drawn


def facts_by_frequency(runs: Runs) -> Figure:
    """Figure 5: facts by tenths of their frequency."""
    drawn = figure(5.2, 3.4)
    ax = drawn.subplots()
    for when, colour in (("before", GREY), ("after", PALETTE[0])):
        found = [over(runs, lambda run, t=t, w=when: run["facts"][w][t]) for t in range(10)]
        ax.plot(range(1, 11), [100 * x.mean for x in found], "o-", color=colour, label=when)
        for t, one in enumerate(found):
            whisker(ax, t + 1, one)
    ax.set_xlabel("tenth of the facts, most frequent first")
    ax.set_ylabel("known [%]")
    ax.set_ylim(0, 103)
    ax.set_title("Facts by frequency, before and after the K-FAC edit")
    ax.legend()
    return drawn


def removal(runs: Runs) -> Figure:
    """One band gone, and all flatter or sharper ones with it."""
    edges = MASS_PERCENT
    drawn = figure(10, 3.6)
    axes = drawn.subplots(1, 3, sharey=True)
    kinds = {
        "alone": ("one band gone", [f"{a}-{b}" for a, b in pairwise(edges)]),
        "with_flatter": ("all flatter than", [str(e) for e in edges[1:-1]]),
        "with_sharper": ("all sharper than", [str(e) for e in edges[1:-1]]),
    }
    for ax, (kind, (title, ticks)) in zip(axes, kinds.items(), strict=True):
        for name, colour in zip(ORDER, PALETTE, strict=True):
            y = [100 * over(runs, lambda run, j=kind, k=k, n=name: run["removal"][j][k][n]).mean
                 for k in range(len(ticks))]  # fmt: skip
            ax.plot(y, "o-", color=colour, ms=4, label=name.replace("_", " "))
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_title(title)
        ax.set_xlabel("cumulative curvature mass [%]")
    axes[0].set_ylabel("right [%]")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6)
    return drawn


# ------------------------------------------------------------------ vision transformer

VIT = ("kfac", "svd", "random pairs", "random basis")


def vit_front(runs: Runs) -> Figure:
    """What is forgotten, and what comes back, against the fall of validation accuracy."""
    drawn = figure(9, 4)
    axes = drawn.subplots(1, 2, sharex=True)
    for method, colour in zip(VIT, (PALETTE[0], PALETTE[1], PALETTE[3], PALETTE[4]), strict=True):
        points = [run["curves"][method] for run in runs]
        fall, kept, returned = (
            [100 * np.mean([value(run, curve[k]) for run, curve in zip(runs, points, strict=True)])
             for k in range(len(points[0]))]
            for value in (fallen, lambda _, p: p["test"]["memorised"],
                          lambda _, p: p["test"]["returned"])
        )  # fmt: skip
        for ax, y in zip(axes, (kept, returned), strict=True):
            ax.plot(fall, y, "o-", color=colour, ms=4, lw=1.6, label=named(method))
    axes[0].set_title("False label still given")
    axes[1].set_title("True label given instead")
    for ax in axes:
        ax.axvline(3, color=GREY, lw=1, ls=":")
        ax.set_xlim(-2, 20)
        ax.set_ylim(0, 103)
        ax.set_xlabel("fall of validation accuracy [points]")
        ax.set_ylabel("noised training images [%]")
    axes[0].legend()
    return drawn


def fallen(run: Json, point: Json) -> float:
    """By how much validation accuracy is lower than without an edit."""
    return run["baseline"]["test"]["validation"] - point["test"]["validation"]


FIGURES: Mapping[str, Callable[[Runs], Figure]] = {
    "retention": retention,
    "front": front,
    "bands": band_ratios,
    "ratio-retention": ratio_against_retention,
    "facts": facts_by_frequency,
    "removal": removal,
}
VIT_FIGURES: Mapping[str, Callable[[Runs], Figure]] = {
    "vit-front": vit_front,
    "vit-bands": lambda runs: band_ratios(runs, "noised / clean images"),
}


def main() -> None:
    """Draw every figure."""
    with style.context(["default", STYLE]):
        for kind, figures in (("lm", FIGURES), ("vit", VIT_FIGURES)):
            runs = load(kind)
            for name, draw in figures.items():
                save(draw(runs), HERE / f"{name}.png")


if __name__ == "__main__":
    main()
