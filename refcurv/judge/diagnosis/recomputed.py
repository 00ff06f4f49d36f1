"""Hypotheses that model and corpus make: A and G under another setting (`variants`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.curvature.factors_file import shapes_of
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.hypotheses import unbiased
from refcurv.judge.diagnosis.search import ROUNDING, Idea, Side, usable
from refcurv.judge.diagnosis.seen import Left, Seen, fitted, see
from refcurv.judge.diagnosis.variants import (
    REFERENCE,
    Moments,
    Setting,
    combined,
    fitting,
    moments,
    settings,
)
from refcurv.judge.diagnosis.variants.collecting import sample
from refcurv.judge.diagnosis.variants.positions import BUT
from refcurv.judge.diagnosis.variants.setting import HALVES, batches
from refcurv.judge.diagnosis.variants.texts import PROMPT, unlabelled
from refcurv.law.checks import Array
from refcurv.law.words import number_of
from refcurv.model.config import TABLES

Entry = tuple[str, str, Idea, Left]
"""Side, layer, hypothesis, and what it leaves there."""

SIDES: Mapping[str, tuple[str, ...]] = {
    "A": ("rows_A", "pooling_A", "tensor_A", "count", "text", "token", "network", "pads"),
    "G": ("labels", "amount", "smoothing", "z_loss", "where", "rows_G", "pooling_G", "tensor_G",
          "batch", "count", "text", "token", "network", "pads", "mean", "redraw"),
}  # fmt: skip
"""The fields of a setting that decide A, and those that decide G."""

ENTRIES = 2**26
"""Numbers in the sums of one run, at most: half a gigabyte."""

WORK = 2.0**35
"""Parameters times positions of a run on a sample, at most.  Chosen: a second or two."""

WHOLE = 2.0**38
"""Parameters times positions of a run on the whole corpus, at most.  Chosen: half a minute."""

WIDTH = 64
"""Columns on each side of a sketch.  Chosen: its norms are within a fifth of the matrices'."""

PROMISING = 0.97
"""What a sample must leave of an error for a run on all.

Chosen. Where sequences differ independently, what the right setting changes in a share s of them
leaves √(1 − s) of the error: 0.96 where s is a twelfth, and WHOLE allows no smaller one.
"""

HOPEFUL = 0.99
"""The same where a run on all is cheap: of what is in one sequence of fifty a sample says no more.
"""

NAMED = 8
"""Sequences of a sample that are named."""

FIXED = ("empirical", "argmax", "expected", "double shift", "no shift")
"""Labels that nobody draws."""

BEST = 4
"""Of what was tried on some sequences, so many are tried on all of them."""

CROWD, PART, FINALISTS = 128, 4, 16
"""Of more settings than CROWD, most of them pairs of faults, these come nearest on a PART of a
sample, and are tried on all of it."""

SAME = 1.01
"""Of what one setting that is enough leaves of a sample, as much is left by one that does the same.
Chosen: two that differ on no sequence leave the same, but for rounding."""

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
    plain += fitting(case, every)
    network = [one for one in every if one.network]
    yield plain
    yield [one for one in every if one not in plain and one not in network]
    yield network


def partners(case: Case, setting: Setting | None) -> list[Setting]:
    """The deviations that have this part on side A."""
    if setting is None:
        return []
    found = [one for one in settings(case) if part(one, "A") == setting]
    if setting.rows_A.startswith(BUT):
        found.append(replace(setting, rows_G=setting.rows_A))
    if setting.text.startswith(PROMPT):
        found.append(replace(setting, text=unlabelled(setting.text)))
    return list(dict.fromkeys([*found, setting]))


def linear(layers: Iterable[str]) -> list[str]:
    """Without tables, which are not recomputed: what is found in the others holds in them too.

    Proof: tests/test_judge_network.py::test_a_table_beside_them_hides_no_cause
    """
    return [x for x in layers if x not in TABLES]


def joined(base: Sequence[Setting], others: Iterable[Setting]) -> list[Setting]:
    """Each of the base with each of the others, where they go together."""
    pairs = (combined(one, other) for one in base for other in others)
    return list(dict.fromkeys(pair for pair in pairs if pair is not None))


def recompute(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    sampled: bool = True,
    under: Setting = REFERENCE,
) -> None:
    """Enter what each setting leaves in these layers: all of it, or the best of a sample.

    Args: sampled: is a sample enough to leave a setting out? under: what all of them change too;
    of a sample, what they change beside is told the better.
    """
    assert case.model is not None and case.corpus is not None
    if not wanted or not layers:
        return
    if is_large(case):
        _recompute_large(case, found, layers, wanted, sampled)
        return
    positions, limit = extent(case), few_positions(case)
    if positions <= limit:
        _enter(found, _lefts(case, layers, wanted, positions))
        return
    most = HOPEFUL if sampled else math.inf
    on_some = _best(case, found, layers, wanted, limit, most, under)
    on_some = {one: left for one, left in on_some.items() if not _tried(found, layers, one)}
    if positions > MOST:
        return
    runs = [one.run for one in on_some]
    waiting = sorted(on_some, key=lambda one: runs.index(one.run))
    exact: dict[Setting, float] = {}  # run → what the worst that is enough leaves of the sample
    for one, some in _each(case, layers, waiting.copy(), positions):
        waiting.remove(one)
        if one.run in exact or on_some[one] <= SAME * min(exact.values(), default=math.inf):
            _enter(found, some)
            if _enough(found, layers, [one]):
                exact[one.run] = max(on_some[one], exact.get(one.run, 0.0))
        most = SAME * min(exact.values(), default=math.inf)
        if all(x.run not in exact and on_some[x] > most for x in waiting):
            return  # what leaves more of the sample is not what theirs is


def _tried(found: Mapping[str, Side], layers: Sequence[str], setting: Setting) -> bool:
    """Is it known what the setting leaves in each of these layers?"""
    tables = [found[side].table.get(Idea(own.faults, own), {}) for side, own in _parts(setting)]
    return all(x in lefts for lefts in tables for x in layers)


def _enter(found: Mapping[str, Side], some: Iterable[Entry]) -> None:
    for side, layer, idea, left in some:
        found[side].add(idea, layer, left)


def _recompute_large(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    sampled: bool,
) -> None:
    """The best of a sample one after the other, in every layer, until one of them is enough."""
    assert case.corpus is not None
    positions, limit = extent(case), few_positions(case)
    for layer in case.matched:
        sketched(case, layer)
    case.forget()
    known: set[tuple[str, Setting]] = case.once("whole", set)
    wanted = [one for one in wanted if not _parts(one) <= known]
    if wanted and sampled and positions > limit:
        wanted = [*_best(case, found, top(case, layers), wanted, limit)]
    if positions > MOST or cost(case) > WHOLE:
        return
    told = f", first on {sequences(case, limit)}, then on all" if positions > limit else ""
    every = [x for x in case.matched if any(x in side.ladders for side in found.values())]
    for run in dict.fromkeys(one.run for one in wanted):
        group = [one for one in wanted if one.run == run]
        for side, layer, idea, left in _lefts(case, every, group, positions):
            found[side].add(idea, layer, replace(left, note=left.note + told))
        known.update(*map(_parts, group))
        if _enough(found, layers, group):
            return


def _parts(setting: Setting) -> set[tuple[str, Setting]]:
    """What of a setting decides A, and what decides G."""
    return {(side, own) for side in SIDES if (own := part(setting, side)).faults}


def sequences(case: Case, limit: int) -> str:
    """Which sequences a sample is made of, counted from 0: "2 of 8 sequences (0, 7)"."""
    assert case.corpus is not None
    names = [str(n) for n in sample(case, limit)[0].index_B]
    more = ", ..." if len(names) > NAMED else ""
    of = f"{len(names)} of {number_of(len(case.corpus.label), 'sequence')}"
    return f"{of} ({', '.join(names[:NAMED])}{more})"


def few_positions(case: Case) -> int:
    """Positions of the sample on which hypotheses are tried first."""
    assert case.corpus is not None
    return int(min(4096, max(256, WORK / cost(case) * extent(case))))


def is_large(case: Case) -> bool:
    """Are A and G of a few layers too large to be made under many settings? Then sketches are."""

    def largest() -> int:
        shapes = shapes_of(case.reference)
        each = [shapes[name] for name in linear(case.matched)]
        return max((sum(n * n for n in shape) for shape in each), default=0)

    return case.once("largest", largest) * 8 > ENTRIES


def top(case: Case, layers: Sequence[str], most: int = 3) -> list[str]:
    """Of a large model some layers of the topmost block: a pass backward ends there."""
    if not is_large(case):
        return list(layers)
    block = {x: int(x.split(".")[1]) if x.startswith("blocks.") else math.inf for x in layers}
    highest = max(block.values())
    return [x for x in layers if block[x] == highest][:most]


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
    return float(parameters) * extent(case)


def extent(case: Case) -> int:
    """Positions of the corpus, padding too; an image has many, and one label."""
    assert case.corpus is not None and case.model is not None
    image = case.model.config.image
    return int(case.corpus.label.size) * (1 if image is None else image.positions)


def _best(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
    most: float = PROMISING,
    under: Setting = REFERENCE,
) -> dict[Setting, float]:
    """Those that leave least on some sequences, for each side, and how much; nearest first.

    Args: most, what they must leave of an error; of what `under` leaves, if they have that too.
    """
    if len(wanted) > CROWD and not is_large(case):
        errors = _on_some(case, found, layers, wanted, limit // PART, under)
        few_of = _nearest(found, layers, errors, FINALISTS)
        nearest = {one for few in few_of.values() for one in few}
        wanted = [one for one in wanted if one in nearest]
    errors = _on_some(case, found, layers, wanted, limit, under)
    if is_large(case):
        told = sequences(case, limit)
        for (side, own), (error, _) in errors.items():
            text = f"{words(own)}, on {told}"
            found[side].sampled[Idea(own.faults, own)] = (error, text)
    best: dict[Setting, float] = {}
    for few in _nearest(found, layers, errors, BEST).values():
        for setting, error in few.items():
            if error < most:
                best[setting] = min(error, best.get(setting, math.inf))
    return dict(sorted(best.items(), key=lambda pair: pair[1]))


Errors = dict[tuple[str, Setting], tuple[float, Setting]]
"""Side and what of a setting decides it → the worst that it leaves of an error; such a setting."""


def _on_some(
    case: Case,
    found: Mapping[str, Side],
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
    under: Setting = REFERENCE,
) -> Errors:
    """What they leave on so many positions; each is tried once."""
    known: dict[Setting, list[Entry]] = case.once(("on some", *layers, limit, under), dict)
    new = [one for one in wanted if one not in known]
    known |= {one: [] for one in new}
    known |= dict(_each(case, layers, new, limit, under))
    worst: Errors = {}
    for one in wanted:
        for side, layer, idea, left in known[one]:
            assert idea.setting is not None
            own = part(under, side)
            lefts = found[side].table.get(Idea(own.faults, own), {}) if own.faults else {}
            off = lefts.get(layer, found[side].plain(layer)).error
            error = left.error / (1.0 if math.isinf(off) else max(off, 1e-300))
            before, first = worst.get((side, idea.setting), (0.0, one))
            worst[side, idea.setting] = max(before, error), first
    return worst


def _nearest(
    found: Mapping[str, Side], layers: Sequence[str], errors: Errors, count: int
) -> dict[str, dict[Setting, float]]:
    """For each side that has something to explain, so many that leave least, nearest first."""
    out: dict[str, dict[Setting, float]] = {}
    for name in (s for s in SIDES if not found[s].settled(layers)):
        mine = [pair for (side, _), pair in errors.items() if side == name]
        few = sorted(mine, key=lambda pair: pair[0])[:count]  # of two as near the first comes first
        out[name] = {setting: error for error, setting in few}
    return out


def _lefts(
    case: Case, layers: Sequence[str], wanted: Sequence[Setting], limit: int
) -> Iterator[Entry]:
    """What every setting leaves that decides something in these layers."""
    for _, some in _each(case, layers, wanted, limit):
        yield from some


def _each(
    case: Case,
    layers: Sequence[str],
    wanted: Sequence[Setting],
    limit: int,
    under: Setting = REFERENCE,
) -> Iterator[tuple[Setting, list[Entry]]]:
    """Setting by setting, those of one run behind each other.

    Of a sample what counts is what they change in it beside `under`, added to what that makes of
    all. Where they have all of it, sequences that differ in it are no noise any more.
    """
    through = sketch if is_large(case) else None
    seen = {layer: sketched(case, layer) if through else see(case, layer) for layer in layers}
    size = sum(one.X.size for sides in seen.values() for one in sides.values())
    bunch = max(2, ENTRIES // max(size, 1))
    every = list(dict.fromkeys(wanted))
    whole = limit >= extent(case)
    made = partial(moments, case, layers=layers, limit=limit, through=through)
    if through and not whole:
        made = partial(made, dtype="float32")
    base = {} if whole else made_on(case, layers, limit, under)
    if not whole and under != REFERENCE:
        of_all = made_on(case, layers, extent(case), under)
        seen = {layer: _instead(seen[layer], one) for layer, one in of_all.items()}
    where = "all sequences" if whole else sequences(case, limit)
    for begin in range(0, len(every), bunch):
        some = every[begin : begin + bunch]
        case.say(f"{words(some[0])}, on {where}")
        for setting, of in made(some):
            case.say(f"{words(setting)}, on {where}")
            entries: list[Entry] = []
            for layer, one in of.items():
                for side, mine in seen[layer].items():
                    own = part(setting, side)
                    if own.faults and usable(mine) and (mine.T.shape == mine.X.shape or whole):
                        left = _left(mine, own, one, base.get(layer), through)
                        entries.append((side, layer, Idea(own.faults, own), left))
            yield setting, entries


def _instead(seen: Mapping[str, Seen], one: Moments) -> dict[str, Seen]:
    """The same with what a setting makes in the place of ours, where it has that shape."""
    made = {"A": one.A, "G": one.G}
    return {
        side: replace(x, X=made[side]) if made[side].shape == x.X.shape else x
        for side, x in seen.items()
    }


def made_on(
    case: Case, layers: Sequence[str], limit: int, setting: Setting = REFERENCE
) -> dict[str, Moments]:
    """What a setting makes on so many positions, made once; empty where it makes nothing.

    Matrices are kept of the layers that were asked for last alone; sketches of all.
    """
    large = is_large(case)
    through, dtype = (sketch, "float32") if large else (None, None)

    def make() -> dict[str, Moments]:
        made = moments(case, [setting], layers, limit, through=through, dtype=dtype)
        return dict(next(iter(made), (setting, {}))[1])

    if large:
        return case.once(("made on", *layers, limit, setting), make)
    kept = case.known.get("made on")
    if kept is None or kept[0] != (*layers,):
        kept = case.known["made on"] = (*layers,), {}
    known: dict[tuple[int, Setting], dict[str, Moments]] = kept[1]
    if (limit, setting) not in known:
        known[limit, setting] = make()
    return known[limit, setting]


def batched(case: Case, found: Mapping[str, Side], layers: Sequence[str]) -> None:
    """Enter what means over batches leave: of any size in one layer, of the nearest in all.

    Proof: tests/test_judge_weights.py::test_a_mean_over_a_batch_of_any_size_has_its_name
    """
    if is_large(case) or extent(case) > few_positions(case):
        return  # a sample holds no batch as a whole
    first, wanted = min(layers, key=lambda x: case.counts(x).shape[0]), list(batches(case))
    recompute(case, found, [first], wanted)
    lefts = [(found["G"].table.get(Idea(x.faults, x), {}).get(first), x) for x in wanted]
    near = sorted((left.error, k) for k, (left, _) in enumerate(lefts) if left is not None)
    recompute(case, found, layers, [wanted[k] for _, k in near[:BEST]])


def collected(
    case: Case, layers: Sequence[str], wanted: Sequence[Setting], side: str
) -> dict[str, tuple[Array, dict[Setting, Array]]]:
    """Layer → (theirs, what each setting makes of this side); sketches, or of a sample, if large.

    As `recompute` compares them.
    """
    assert case.corpus is not None
    positions = extent(case)
    limit = min(few_positions(case), positions)
    through = sketch if is_large(case) else None
    block = np.s_[:WIDTH, WIDTH:] if through else np.s_[:]
    every = [*wanted, *([] if limit >= positions else [REFERENCE])]
    seen = {layer: sketched(case, layer) if through else see(case, layer) for layer in layers}
    made = {one: of for one, of in moments(case, every, layers, limit, through=through)}
    base = made.get(REFERENCE, {}) if limit < positions else {}
    out: dict[str, tuple[Array, dict[Setting, Array]]] = {}
    for setting in wanted:
        for layer, one in made.get(setting, {}).items():
            mine = seen[layer].get(side)
            if mine is not None and usable(mine) and mine.T.shape == mine.X.shape:
                Y = _beside(mine, one, base.get(layer))[0]
                out.setdefault(layer, (mine.T[block], {}))[1][setting] = Y[block]
    return out


@cache
def sketch(size: int) -> Array:
    """Random signs P and Q side by side, (size, 2 WIDTH): |Pᵀ D Q|² is WIDTH² |D|² on average.

    Two different matrices, because |Pᵀ D P|² holds the trace of D too. That holds for any D; so a
    difference shows wherever it is.
    """
    R = np.random.default_rng(size).choice([-1.0, 1.0], (size, 2 * WIDTH))
    R.flags.writeable = False
    return R


def sketched(case: Case, layer: str) -> dict[str, Seen]:
    """`see`, as [P Q]ᵀ T [P Q] and [P Q]ᵀ X [P Q]; without sides of other shapes than ours."""

    def small(one: Seen) -> Seen:
        R = sketch(len(one.X))
        return replace(one, T=R.T @ (one.T @ R), X=R.T @ (one.X @ R), mean=None)

    def make() -> dict[str, Seen]:
        both = see(case, layer).items()
        return {s: small(x) for s, x in both if x.T.shape == x.X.shape and usable(x)}

    return case.once(("sketch", layer), make)


def _beside(
    seen: Seen, one: Moments, base: Moments | None, through: object = None
) -> tuple[Array, float]:
    """The setting's matrix and its rows; of a sample, ours and what the setting changes in it."""
    Y, n = (one.A, one.n_A) if seen.side == "A" else (one.G, one.n_G)
    block = np.s_[:WIDTH, WIDTH:] if through else np.s_[:]
    if base is not None and Y.shape == seen.X.shape:
        change = Y - (base.A if seen.side == "A" else base.G)
        if through:
            change = change * _size(seen.T[block], seen.X[block], change[block])
        Y = seen.X + change
    return Y, n


def _left(
    seen: Seen, own: Setting, one: Moments, base: Moments | None, through: object = None
) -> Left:
    """What a setting leaves of theirs."""
    Y, n = _beside(seen, one, base, through)
    block = np.s_[:WIDTH, WIDTH:] if through else np.s_[:]
    if Y.shape != seen.T.shape:
        return Left(math.inf, math.nan)
    size = float(norm(seen.X[block]))
    if float(norm(Y[block])) <= ROUNDING**2 * size:  # zero by theory, and so is theirs
        if own.tensor_G in HALVES:  # none is left of it, and theirs is not zero
            return Left(math.inf, math.nan)
        return Left(math.sqrt(float(norm(seen.T[block])) / size), 1.0, words(own), own.alike)
    note = words(own)
    if "centred" in (own.pooling_A, own.pooling_G):
        note, Y = unbiased(seen, Y, note)
    error, r = fitted(seen.T[block], Y[block])
    rows = None if base is not None else seen.rows(n)
    return Left(error, r, note, own.alike, rows, drawn=own.labels not in FIXED)


def _size(T: Array, X: Array, change: Array) -> float:
    """The c > 0 with which X + c `change` comes nearest to a multiple of T; 0 where none does.

    What a setting changes in a few sequences is the change in all of them, and noise: less of it
    than all comes nearest.
    """
    both = np.stack([X.ravel(), change.ravel()], axis=1)
    r, rc = np.linalg.lstsq(both, T.ravel(), rcond=None)[0]
    return float(rc / r) if r > 0 and rc > 0 else 0.0


def words(setting: Setting) -> str:
    """What differs, field by field."""
    out = []
    for name in dict.fromkeys(n for names in SIDES.values() for n in names):
        value = getattr(setting, name)
        if value == getattr(REFERENCE, name) or name in _UNSAID:
            continue
        if name == "network":
            value = " and ".join(f"{c} {size:g}" if size else c for c, size in value)
        label = name.removesuffix("_A").removesuffix("_G").replace("_", "-")
        more = {"labels": setting.amount, "pooling_G": setting.batch}.get(name, 0)
        value = f"{value:.4g}" if isinstance(value, float) else value
        out.append(f"{label} `{value}`" + (f" ({more:g})" if more else ""))
        out[-1] += f" (token {setting.token})" if name == "text" and setting.token >= 0 else ""
    return "as with " + ", ".join(out) if out else "as ours"


_UNSAID = ("batch", "amount", "token", "pads", "mean", "redraw")
"""Fields that are said with another, or that are no fault."""
