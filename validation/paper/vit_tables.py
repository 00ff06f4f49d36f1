"""The tables of the vision transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from validation.paper.results import Json, Runs, named, over, percent, table
from validation.paper.statistics import interval

EDITS = ("kfac", "svd", "random pairs", "random basis", "inputs only", "outputs only",
               "kfac, bias joint", "kfac, up and down", "svd, up and down")  # fmt: skip
SHOWN = ("memorised", "returned", "true", "clean", "validation")


def images(point: Json, name: str) -> float:
    """An accuracy of the test half."""
    return point["test"].get(name, math.nan)


def mean_of(points: Sequence[Json | None], name: str) -> str:
    """An accuracy of the test half over the seeds that have such a point; `-` if none has."""
    found = [images(point, name) for point in points if point]
    return percent(interval(found)) if found else "-"


def table2(runs: Runs) -> str:
    """Table 2: the best of each method by the dev half, reported on the test half."""

    def cells(method: str) -> list[str]:
        best = [run["compared"][method]["best"] for run in runs]
        falls = [
            images(run["baseline"], "validation") - images(one, "validation")
            for run, one in zip(runs, best, strict=True)
            if one
        ]
        shown = [mean_of(best, name) for name in SHOWN]
        fall = percent(interval(falls)) if falls else "-"
        return [named(method), *shown, fall, f"{len(falls)} of {len(runs)}"]

    before = [percent(over(runs, lambda run, n=name: images(run["baseline"], n))) for name in SHOWN]
    head = ["method", "false label kept [%]", "true label of those memorised [%]",
            "true label of all noised [%]", "clean training images [%]", "validation [%]",
            "its fall [points]", "seeds with such a strength"]  # fmt: skip
    return table(head, [["none", *before, "0", ""], *map(cells, EDITS)])


def matched(runs: Runs) -> str:
    """The same methods where they leave as few false labels as K-FAC's best, by the dev half."""

    def cells(method: str) -> list[str]:
        found = [run["compared"][method]["matched"] for run in runs]
        shown = [mean_of(found, name) for name in ("memorised", "returned", "clean", "validation")]
        return [named(method), *shown, f"{sum(map(bool, found))} of {len(runs)}"]

    head = ["method", "false label kept [%]", "true label of those memorised [%]",
            "clean training images [%]", "validation [%]", "seeds that get there"]  # fmt: skip
    return table(head, map(cells, EDITS))


def layers(runs: Runs) -> str:
    """Layer by layer and in pairs, K-FAC, each at its best by the dev half."""

    def cells(place: str) -> list[str]:
        best = [run["by_layer"][place]["best"] for run in runs]
        shown = [mean_of(best, name) for name in ("memorised", "returned", "validation")]
        return [place, *shown, f"{sum(map(bool, best))} of {len(runs)}"]

    head = ["blocks", "false label kept [%]", "true label of those memorised [%]",
            "validation [%]", "seeds with such a strength"]  # fmt: skip
    return table(head, map(cells, runs[0]["by_layer"]))


def decay(runs: Runs) -> str:
    """H.1: weight decay, what it memorises, what the edit gives back, and how the bands part."""

    def cells(decay: str) -> list[str]:
        mine = [run["decay"][decay] for run in runs]
        before = [
            percent(interval([one["before"]["test"][name] for one in mine]))
            for name in ("memorised", "validation")
        ]
        edits = [one["best"]["kfac"] for one in mine]
        best = [mean_of(edits, name) for name in ("memorised", "returned", "validation")]
        parted = interval([separation(one["input_rank"]) for one in mine])
        return [decay, *before, *best, parted.text(2)]

    head = ["decay", "memorised [%]", "validation [%]", "edited: false label kept [%]",
            "true label of those memorised [%]", "validation [%]",
            "flattest / sharpest band"]  # fmt: skip
    return table(head, map(cells, sorted(runs[0]["decay"], key=float)))


def separation(layers: Json) -> float:
    """Ratio of noised to clean images, flattest band over sharpest, mean over layers."""
    found = [one["ratio"][-1] / one["ratio"][0] for one in layers.values()]
    return sum(found) / len(found)
