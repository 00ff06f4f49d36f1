"""Hypotheses that model and corpus make: A and G under another setting (`variants`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import Left, Seen, fitted, see
from refcurv.judge.diagnosis.search import Idea, Side, usable
from refcurv.judge.diagnosis.variants import (
    REFERENCE,
    Moments,
    Setting,
    combined,
    moments,
    settings,
)
from refcurv.law.checks import Array

SIDES: Mapping[str, tuple[str, ...]] = {
    "A": ("rows_A", "pooling_A", "tensor_A", "count", "network", "pads"),
    "G": ("labels", "amount", "smoothing", "where", "rows_G", "pooling_G", "tensor_G", "batch",
          "count", "network", "pads", "mean"),
}  # fmt: skip
"""The fields of a setting that decide A, and those that decide G."""

ENTRIES = 2**26
"""Numbers in the sums of one run, at most: half a gigabyte."""

WORK = 2.0**35
"""Parameters times positions of a run on a sample, at most.  Chosen: seconds on two cores."""

WHOLE = 2.0**38
"""Parameters times positions of a run on the whole corpus, at most.  Chosen: half a minute."""

WIDTH = 64
"""Columns on each side of a sketch.  Chosen: its norms are within a fifth of the matrices'."""

PROMISING = 0.9
"""What a sample must leave of an error for a run on all.  Chosen: the rest is noise."""

BEST = 4
"""Of what was tried on some sequences, so many are tried on all of them."""

MOST = 2**17
"""Positions of a corpus that is recomputed as a whole, at most."""


def part(setting: Setting, side: str) -> Setting:
    """What of a setting decides one side."""
    return Setting(**{name: getattr(setting, name) for name in SIDES[side]})


def labels_of(setting: Setting) -> Setting:
    """What of a setting decides whose labels there are, and where."""
    names = ("labels", "amount", "smoothing", "where", "mean")
    return Setting(**{name: getattr(setting, name) for name in names})


def stages(case: Case, side: str) -> Iterator[list[Setting]]:
    """The single deviations that can change a side, the cheapest first."""
    every = [one for one in settings(case) if part(one, side).faults and one.count != "labels"]
    plain = [one for one in every if one.run == REFERENCE.run or one.run == Setting(pads=one.pads)]
    network = [one for one in every if one.network]
    yield plain
    yield [one for one in every if one not in plain and one not in network]
    yield network


def partners(case: Case, setting: Setting | None) -> list[Setting]:
    """The deviations that have this part on side A."""
    if setting is None:
        return []
    found = [one for one in settings(case) if part(one, "A") == setting]
    return list(dict.fromkeys([*found, setting]))


def joined(base: Sequence[Setting], others: Iterable[Setting]) -> list[Setting]:
    """Each of the base with each of the others, where they go together."""
    pairs = (combined(one, other) for one in base for other in others)
    return list(dict.fromkeys(pair for pair in pairs if pair is not None))


def recompute(
    case: Case, found: Mapping[str, Side], layers: Sequence[str], wanted: Sequence[Setting]
) -> None:
    """Enter what each setting leaves in these layers: all of it, or the best of a sample."""
    assert case.model is not None and case.corpus is not None
    if not wanted or not layers:
        return
    positions, large, limit = int(case.corpus.label.size), is_large(case), few_positions(case)
    groups = [list(wanted)]
    if positions > limit and (not large or len({one.run for one in wanted}) > 1):
        wanted = _best(case, found, _top(layers) if large else layers, wanted, limit)
        runs = dict.fromkeys(one.run for one in wanted)
        groups = [[one for one in wanted if one.run == run] for run in runs] if large else [wanted]
    if positions > MOST or (large and cost(case) > WHOLE):
        return
    for group in groups:
        for side, layer, idea, left in _lefts(case, layers, group, positions):
            found[side].add(idea, layer, left)
        if large and _enough(found, layers, group):
            return


def few_positions(case: Case) -> int:
    """Positions of the sample on which hypotheses are tried first."""
    assert case.corpus is not None
    return int(min(4096, max(256, WORK / cost(case) * case.corpus.label.size)))


def is_large(case: Case) -> bool:
    """Are A and G of a few layers too large to be made under many settings? Then sketches are."""
    assert case.model is not None
    shapes = case.model.config.linear_layers()
    sizes = [sum(n * n for n in shapes[name]) for name in case.matched if name in shapes]
    return max(sizes, default=0) * 8 > ENTRIES


def _top(layers: Sequence[str], most: int = 3) -> list[str]:
    """Some layers of the topmost block: a pass backward ends there."""
    block = {x: int(x.split(".")[1]) if x.startswith("blocks.") else math.inf for x in layers}
    top = max(block.values())
    return [x for x in layers if block[x] == top][:most]


def _enough(found: Mapping[str, Side], layers: Sequence[str], group: Sequence[Setting]) -> bool:
    """Does one of these settings leave no more than the finest rounding wherever it was tried?"""
    for side in found.values():
        for setting in group:
            own = part(setting, side.side)
            lefts = side.table.get(Idea(own.faults, own), {}) if own.faults else {}
            tried = [x for x in layers if x in lefts and side.rank(x, side.plain(x)) > 0]
            if tried and all(side.rank(x, lefts[x]) == 0 for x in tried):
                return True
    return False


def cost(case: Case) -> float:
    """Parameters times positions; infinite without model or corpus."""
    if case.model is None or case.corpus is None:
        return math.inf
    parameters = sum(math.prod(shape) for shape in case.model.config.parameter_shapes().values())
    return float(parameters) * case.corpus.label.size


def _best(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
) -> list[Setting]:
    """Those that leave least on some sequences, for each side."""
    worst: dict[tuple[str, Setting], float] = {}
    of: dict[tuple[str, Setting], list[Setting]] = {}
    for one in wanted:
        for side in SIDES:
            of.setdefault((side, part(one, side)), []).append(one)
    for side, layer, idea, left in _lefts(case, layers, wanted, limit):
        assert idea.setting is not None
        before = max(found[side].plain(layer).error, 1e-300)
        key = side, idea.setting
        worst[key] = max(worst.get(key, 0.0), left.error / before)
    best: list[Setting] = []
    for side in SIDES:
        mine = sorted((error, k) for k, ((s, _), error) in enumerate(worst.items()) if s == side)
        keys = list(worst)
        if is_large(case):  # every one of them costs much: what is no better is not tried
            mine = [(error, k) for error, k in mine[:BEST] if error < PROMISING]
        best += [setting for _, k in mine[:BEST] for setting in of[keys[k]][:1]]
    return list(dict.fromkeys(best))


def _lefts(
    case: Case, layers: Sequence[str], wanted: Sequence[Setting], limit: int
) -> Iterator[tuple[str, str, Idea, Left]]:
    """(side, layer, hypothesis, what it leaves) of every setting that decides something there."""
    through = sketch if is_large(case) else None
    seen = {layer: _sketched(case, layer) if through else see(case, layer) for layer in layers}
    size = sum(one.X.size for sides in seen.values() for one in sides.values())
    bunch = max(2, ENTRIES // max(size, 1))
    every = list(dict.fromkeys(wanted))
    base: dict[str, Moments] = {}
    whole = limit >= (0 if case.corpus is None else case.corpus.label.size)
    if not whole:
        base = dict(next(moments(case, [REFERENCE], layers, limit, through=through))[1])
    for begin in range(0, len(every), bunch):
        some = every[begin : begin + bunch]
        for setting, of in moments(case, some, layers, limit, through=through):
            for layer, one in of.items():
                for side, mine in seen[layer].items():
                    own = part(setting, side)
                    if own.faults and usable(mine) and mine.T.shape == mine.X.shape:
                        idea = Idea(own.faults, own)
                        yield side, layer, idea, _left(mine, own, one, base.get(layer), through)


def sketch(size: int) -> Array:
    """Random signs P and Q side by side, (size, 2 WIDTH): |Pᵀ D Q|² is WIDTH² |D|² on average.

    Two different matrices, because |Pᵀ D P|² holds the trace of D too. That holds for any D; so a
    difference shows wherever it is.
    """
    return np.random.default_rng(size).choice([-1.0, 1.0], (size, 2 * WIDTH))


def _sketched(case: Case, layer: str) -> dict[str, Seen]:
    """`see`, as [P Q]ᵀ T [P Q] and [P Q]ᵀ X [P Q]; without sides of other shapes than ours."""

    def small(one: Seen) -> Seen:
        R = sketch(len(one.X))
        return replace(one, T=R.T @ (one.T @ R), X=R.T @ (one.X @ R), mean=None)

    def make() -> dict[str, Seen]:
        both = see(case, layer).items()
        return {s: small(x) for s, x in both if x.T.shape == x.X.shape and usable(x)}

    return case.once(("sketch", layer), make)


def _left(
    seen: Seen, own: Setting, one: Moments, base: Moments | None, through: object = None
) -> Left:
    """Theirs beside the setting's; of a sample, beside ours and what the setting changes in it."""
    Y, n = (one.A, one.n_A) if seen.side == "A" else (one.G, one.n_G)
    if base is not None and Y.shape == seen.X.shape:
        Y = seen.X + Y - (base.A if seen.side == "A" else base.G)
    if Y.shape != seen.T.shape:
        return Left(math.inf, math.nan)
    block = np.s_[:WIDTH, WIDTH:] if through else np.s_[:]
    error, r = fitted(seen.T[block], Y[block])
    rows = None if seen.n_T is None or base is not None else seen.n_T / n
    return Left(error, r, words(own), (), rows)


def words(setting: Setting) -> str:
    """What differs, field by field."""
    out = []
    for name in dict.fromkeys(n for names in SIDES.values() for n in names):
        value = getattr(setting, name)
        if value == getattr(REFERENCE, name) or name in ("batch", "amount", "pads", "mean"):
            continue
        if name == "network":
            value = " and ".join(f"{c} {size:g}" if size else c for c, size in value)
        label = name.removesuffix("_A").removesuffix("_G")
        more = {"labels": setting.amount, "pooling_G": setting.batch}.get(name, 0)
        out.append(f"{label} `{value}`" + (f" ({more:g})" if more else ""))
    return "as with " + ", ".join(out)
