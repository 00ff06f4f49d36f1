"""What settings make of A and G, compared with theirs: whole, or as sketches of large matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.diagnosis.deciding import part, words
from refcurv.judge.diagnosis.hypotheses import unbiased
from refcurv.judge.diagnosis.search import ROUNDING, Idea
from refcurv.judge.diagnosis.seen import Left, Seen, fitted, see, usable
from refcurv.judge.diagnosis.variants import REFERENCE, Moments, Setting, moments
from refcurv.judge.diagnosis.variants.setting import HALVES
from refcurv.judge.diagnosis.work import ENTRIES, extent, few_positions, is_large, sequences
from refcurv.law.checks import Array

Entry = tuple[str, str, Idea, Left]
"""Side, layer, hypothesis, and what it leaves there."""

WIDTH = 64
"""Columns on each side of a sketch.  Chosen: its norms are within a fifth of the matrices'."""

FIXED = ("empirical", "argmax", "expected", "double shift", "no shift")
"""Labels that nobody draws."""


def entries(
    case: Case, layers: Sequence[str], wanted: Sequence[Setting], limit: int
) -> Iterator[Entry]:
    """What every setting leaves that decides something in these layers."""
    for _, some in by_setting(case, layers, wanted, limit):
        yield from some


def by_setting(
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
            of_setting: list[Entry] = []
            for layer, one in of.items():
                for side, mine in seen[layer].items():
                    own = part(setting, side)
                    if own.faults and usable(mine) and (mine.T.shape == mine.X.shape or whole):
                        gauge = _gauge(seen[layer], side, through)
                        left = _left(mine, own, one, base.get(layer), through, gauge)
                        of_setting.append((side, layer, Idea(own.faults, own), left))
            yield setting, of_setting


def _block(through: object) -> slice | tuple[slice, slice]:
    """Which entries of a matrix are compared: all, or Pᵀ M Q of a sketch."""
    return np.s_[:WIDTH, WIDTH:] if through else np.s_[:]


ALIKE = 0.5
"""What rounding leaves where theirs is zero by theory is no nearer to our form.  Chosen."""


ABOUT = 30.0
"""Within this of ours theirs is no zero by theory, but small by a gauge.  Chosen: drawing changes
sizes by less, and what rounding leaves is mostly far below."""


def _gauge(seen: Mapping[str, Seen], side: str, through: object) -> float:
    """How much larger the other side is than ours: by what a gauge makes this one smaller."""
    block, other = _block(through), seen.get("A" if side == "G" else "G")
    if other is None or not usable(other):
        return 1.0
    return float(norm(other.T[block])) / float(norm(other.X[block])) if other.X.any() else 1.0


def _left(
    seen: Seen,
    own: Setting,
    one: Moments,
    base: Moments | None,
    through: object = None,
    gauge: float = 1.0,
) -> Left:
    """What a setting leaves of theirs; gauge, how much larger the other side is than ours.

    Proof: tests/test_judge_residues.py::test_what_a_gauge_makes_small_is_not_zero_by_theory
    """
    Y, n = _beside(seen, one, base, through)
    block = _block(through)
    if Y.shape != seen.T.shape:
        return Left(math.inf, math.nan)
    size = float(norm(seen.X[block]))
    if float(norm(Y[block])) <= ROUNDING**2 * size:  # zero by theory, and so is theirs
        share = float(norm(seen.T[block])) / size
        small = gauge > 1.5 and 1 / ABOUT <= share * gauge <= ABOUT
        ours = small or fitted(seen.T[block], seen.X[block])[0] < ALIKE
        if own.tensor_G in HALVES or ours:  # none is left of it, and theirs is not zero
            return Left(math.inf, math.nan)
        return Left(math.sqrt(share), 1.0, words(own), own.alike)
    note = words(own)
    if "centred" in (own.pooling_A, own.pooling_G):
        note, Y = unbiased(seen, Y, note)
    error, r = fitted(seen.T[block], Y[block])
    if base is not None and not through:
        error, r = _alone(seen, Y, one, (error, r))
    rows = None if base is not None else seen.rows(n)
    return Left(error, r, note, own.alike, rows, drawn=own.labels not in FIXED)


def _beside(
    seen: Seen, one: Moments, base: Moments | None, through: object = None
) -> tuple[Array, float]:
    """The setting's matrix and its rows; of a sample, ours and what the setting changes in it."""
    Y, n = (one.A, one.n_A) if seen.side == "A" else (one.G, one.n_G)
    block = _block(through)
    if base is not None and Y.shape == seen.X.shape:
        change = Y - (base.A if seen.side == "A" else base.G)
        if through:
            change = change * _size(seen.T[block], seen.X[block], change[block])
        Y = seen.X + change
    return Y, n


MUCH = 0.9
"""What a sample alone must leave of the error, to count.  Chosen: by chance it leaves 0.94.
"""


def _alone(seen: Seen, Y: Array, one: Moments, before: tuple[float, float]) -> tuple[float, float]:
    """`fitted` of Y, of a sample, or of what comes nearer: Y less a part of how ours is off there.

    Definition
        Y is M + X − X_s: M a setting's matrix on some sequences, X_s ours there, and X ours on all.
        X − X_s is a control variate. Where the setting changes little, all of it belongs to Y.
        Where it takes away most of ours, little does, and the noise of all of it hides what is
        left. So M + β (X − X_s), β in [0, 1], is tried, which comes about nearest to theirs.

    Proof: tests/test_judge_residues.py::test_a_large_change_is_seen_on_a_sample
    """
    M, T = one.A if seen.side == "A" else one.G, seen.T
    rest = Y - M
    MM, MR, RR = np.vdot(M, M), np.vdot(M, rest), np.vdot(rest, rest)
    TM, TR = np.vdot(T, M), np.vdot(T, rest)
    r, r_beta = TM * RR - TR * MR, TR * MM - TM * MR  # Cramer's rule, times a determinant >= 0
    if not r > 0:
        return before
    found = fitted(T, M + min(max(float(r_beta / r), 0.0), 1.0) * rest)
    return found if found[0] <= MUCH * before[0] else before


def _size(T: Array, X: Array, change: Array) -> float:
    """The c > 0 with which X + c `change` comes nearest to a multiple of T; 0 where none does.

    What a setting changes in a few sequences is the change in all of them, and noise: less of it
    than all comes nearest.
    """
    both = np.stack([X.ravel(), change.ravel()], axis=1)
    r, rc = np.linalg.lstsq(both, T.ravel(), rcond=None)[0]
    return float(rc / r) if r > 0 and rc > 0 else 0.0


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
    block = _block(through)
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
