"""Whether what is left is the size of a coarser arithmetic, and of which part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from refcurv.algebra.scaling import norm
from refcurv.judge.case import Case
from refcurv.judge.compare import who_draws
from refcurv.judge.diagnosis.compared import made_on
from refcurv.judge.diagnosis.ladders import DECLARED
from refcurv.judge.diagnosis.search import PLAIN, Side, is_coarse
from refcurv.judge.diagnosis.seen import see, states
from refcurv.judge.diagnosis.titles import of_size
from refcurv.judge.diagnosis.variants import Setting, moments
from refcurv.judge.diagnosis.work import few_positions, is_large
from refcurv.judge.verdict import Cause
from refcurv.law.checks import Array
from refcurv.law.words import number_of

SIZES = ("B59", "B60", "B63")
"""Faults of which the size of an error is the only sign. Sums in bfloat16 are more (B58)."""

MANY = 2**16
"""Entries of a matrix whose digits are looked at, about.  Chosen: chance makes 1 in 256 short."""

BITS = 8
"""Digits of a bfloat16 significand, the leading one included."""


Key = tuple[str, tuple[str, ...], str]
"""Fault, what looks the same, words."""


def causes(case: Case, found: Mapping[str, Side]) -> list[Cause]:
    """B58 to B63, where a form is right but for an error as large as another dtype's."""
    hit: dict[Key, dict[str, set[str]]] = {}
    worst: dict[Key, float] = {}
    known = any(is_coarse(one.idea.setting) for side in found.values() for one in side.chosen)
    known |= any(not s.finite for x in case.matched for s in states(case, x).values())
    for name, side in found.items():
        for layer, steps in side.ladders.items():
            idea, left = side.of(layer)
            rank = side.rank(layer, left)
            dtype = steps.steps[rank][0] if rank < steps.by_drawing else ""
            dtype = "" if dtype == DECLARED else dtype
            lost = rank > steps.by_drawing or side.drawn(layer)
            # other labels leave errors of any size under a fault too
            lost |= idea != PLAIN and left.drawn and 0 < steps.drawn and left.error >= steps.same
            key = _named(case, layer, name, rank, "" if lost else dtype, lost)
            if key is not None and not (known and key[0] in SIZES):
                hit.setdefault(key, {}).setdefault(layer, set()).add(name)
                worst[key] = max(worst.get(key, 0.0), left.error)
    out = []
    for (fault, alike, words), layers, error in _as_simulated(case, found, hit, worst):
        sides = sorted(set().union(*layers.values()))
        each = [q for s in sides for q in (f"{s}/tr {s}", s)]
        quantities = (*each, "tr A · tr G")
        one = of_size(fault, words, case.dump.program)
        at = f"({', '.join(sides)}; {number_of(len(layers), 'layer')}.)"
        text = f"{one.name[0].upper()}{one.name[1:]}. {words} {at}"
        out.append(Cause(fault, text, one.remedy, tuple(layers), quantities, error, error, alike))
    return out


APART = 1000.0
"""How much nearer no matrix is where a model or its products are coarse: it would be as coarse
itself.  Chosen: layers of one network differ by a factor of ten, seldom of a hundred."""


def _as_simulated(
    case: Case,
    found: Mapping[str, Side],
    hit: Mapping[Key, Mapping[str, set[str]]],
    worst: Mapping[Key, float],
) -> Iterator[tuple[Key, Mapping[str, set[str]], float]]:
    """What was hit by size; where a network can be run in these dtypes, the one that comes nearest.

    A residue of the size of a dtype is none where theirs is further off elsewhere than the dtype
    explains: what is unknown there may leave it too. Where theirs is everywhere as far off as such
    a network, it explains what no budget of the dtype covers as well.
    """
    sized = [key for key in hit if key[0] in ("B59", "B60")]
    sizes = _sizes(case, found) if sized else {}
    if not sizes:
        errors = [s.of(x)[1].error for s in found.values() for x in s.ladders]
        finest = min(errors, default=math.inf)
        near = {key for key in sized if finest < worst[key] / APART}
        left = {key: layers for key, layers in hit.items() if key not in near}
        yield from _of_one_dtype(left, worst)
        return
    yield from ((key, layers, worst[key]) for key, layers in hit.items() if key[0] not in SIZES)
    middle = {name: float(np.median(ratios)) for name, ratios in sizes.items()}
    fits = [
        name
        for name, ratios in sizes.items()
        if max(ratios) <= LARGER
        and middle[name] <= MIDDLE
        and min(ratios) >= 1 / (APART if name.startswith("all") else LARGER)  # a part, all alike
    ]
    if not fits:
        return
    which = min(fits, key=lambda name: abs(math.log(middle[name])))
    ratio, how, dtype = middle[which], NETWORKS[which], which.rpartition(" ")[2]
    every: dict[str, set[str]] = {}
    for layer, sides in (pair for key in hit if key[0] in SIZES for pair in hit[key].items()):
        every.setdefault(layer, set()).update(sides)
    if min(sizes[which]) >= 1 / LARGER and ratio >= 1 / MIDDLE:  # then of what is further off too
        for name in "A" if any(who_draws(case)) else "AG":
            for layer in found[name].unexplained():
                every.setdefault(layer, set()).add(name)
    for name, side in found.items() if which.startswith("all") else ():
        parts = [one for one in side.chosen if _of_weights(side, one.idea.setting)]
        side.chosen = [one for one in side.chosen if one not in parts]
        for layer in (x for one in parts for x in one.left):
            every.setdefault(layer, set()).add(name)
    words = f"A network {how} {dtype} is {1 / ratio:.2g} times as far from ours as theirs."
    key = ("B59", (), words) if dtype == "bfloat16" else ("B60", ("B61",), words)
    yield key, every, max(worst[key] for key in hit if key[0] in SIZES)


def _of_one_dtype(
    hit: Mapping[Key, Mapping[str, set[str]]], worst: Mapping[Key, float]
) -> Iterator[tuple[Key, Mapping[str, set[str]], float]]:
    """A run has one dtype: beside what only bfloat16 explains, a smaller error is of it too.

    Proof: tests/test_judge_network.py::test_layers_of_one_run_have_one_dtype
    """
    coarse = next((key for key in hit if key[0] == "B59"), None)
    told: dict[Key, list[Key]] = {}
    for key in hit:
        told.setdefault(coarse if coarse and key[0] == "B60" else key, []).append(key)
    for key, parts in told.items():
        every: dict[str, set[str]] = {}
        for layer, sides in (pair for part in parts for pair in hit[part].items()):
            every.setdefault(layer, set()).update(sides)
        yield key, every, max(worst[part] for part in parts)


def _of_weights(side: Side, setting: Setting | None) -> bool:
    """Does it round the weights alone, where layers are left that this does not explain?

    Then it is a part of a network that rounds everything: what reads a table has no more of it.
    """
    return setting in WEIGHTS and bool(side.open())


WEIGHTS: Final = tuple(
    Setting(network=((f"weights as {dtype}", 0.0),)) for dtype in ("bfloat16", "float16")
)
"""The weights are rounded, and nothing else."""

NETWORKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        f"{name} in {dtype}": how
        for name, how in (("all", "in"), ("autocast", "under autocast to"))
        for dtype in ("bfloat16", "float16")
    }
)
"""The changes whose size is compared with theirs, and how they are said."""

LARGER = 6.0
"""How many times further off than simulated one matrix may be.  Chosen: roundings in another order
differ by a factor of about 2, and what is unknown by more."""

MIDDLE = 2.0
"""As LARGER, of the middle of all matrices.  Chosen: programs in bfloat16 were 0.7 to 1.7 times as
far, over 6 models."""


def _sizes(case: Case, found: Mapping[str, Side]) -> dict[str, list[float]]:
    """By dtype: how far theirs is from ours, over how far a network in this dtype is, everywhere.

    Of what such a network has exactly, as the pixels that it reads, over the budget of sums in
    float32, where theirs is beyond it; without G whose labels theirs drew: how far that is says
    nothing of a dtype.
    Empty where no network can be run.

    Proof: tests/test_judge_network.py::test_a_dtype_is_read_off_A_where_theirs_drew_labels
    """
    if case.model is None or case.corpus is None or is_large(case):
        return {}
    known = {"A": found["A"]} if any(who_draws(case)) else found
    out: dict[str, list[float]] = {}
    layers = list(dict.fromkeys(x for side in found.values() for x in side.ladders))
    limit = few_positions(case)
    ours = made_on(case, layers, limit)  # of the same sequences
    for setting, of in moments(
        case, [Setting(network=((x, 0.0),)) for x in NETWORKS], layers, limit
    ):
        for name, side in known.items():
            for layer in (x for x in side.ladders if x in of):
                X, Y = getattr(ours[layer], name), getattr(of[layer], name)
                part = _of_weights(side, side.of(layer)[0].setting)
                error = (side.plain(layer) if part else side.of(layer)[1]).error
                steps = side.ladders[layer].steps
                fine = max(steps[0][1], dict(steps).get("float32", 0.0))
                if not X.any():  # no label is in these sequences: they say nothing
                    continue
                far = float(norm(X - Y) / norm(X)) if X.shape == Y.shape else 0.0
                if far > fine or error > LARGER * fine:
                    ratio = max(error / max(far, fine), 1e-300)
                    out.setdefault(setting.network[0][0], []).append(ratio)
    return out


def _named(
    case: Case, layer: str, side: str, rank: int, dtype: str, lost: bool
) -> tuple[str, tuple[str, ...], str] | None:
    """(fault, alike, words) of one side; `lost`, where the size of what is left tells no dtype."""
    declared = case.arithmetic.declared
    if rank == 0 or not (dtype or lost):
        return None
    if dtype != "float32" and short_sums(case, layer, side):
        return "B58", (), "The sums have the few digits of bfloat16."
    if lost or (dtype == "float32" and not declared):
        return None
    words = f"What is left has the size of {dtype}."
    if dtype == "float32":
        return "B63", (), words
    return ("B59", (), words) if dtype == "bfloat16" else ("B60", ("B61",), words)


def short_sums(case: Case, layer: str, side: str) -> bool:
    """Has every entry of the sums, or of the means, 8 significant bits?"""
    return case.once(("short", layer, side), lambda: _short_sums(case, layer, side))


def _short_sums(case: Case, layer: str, side: str) -> bool:
    seen = see(case, layer).get(side)
    if seen is None or case.arithmetic.stored in ("bfloat16", "float16"):
        return False
    T = seen.T.reshape(-1)
    T = T[:: max(1, T.size // MANY)]
    return any(short(X) for X in ([T] if seen.n_T is None else [T, T * seen.n_T]))


def short(X: Array) -> bool:
    """Has every entry 8 significant bits, and not because it is a small number of equal steps?

    Sums of few integers, as of gradients of which float16 left a digit or two, are short by
    themselves. So a quarter of the entries must lie BITS digits above the last digit of any entry.
    Of floats that were rounded almost all do.
    """
    entries = np.abs(X[X != 0])
    if entries.size < 3 or not np.isfinite(entries).all():
        return False
    part, exponent = np.frexp(entries)
    digits = np.ldexp(part, BITS)
    whole = np.rint(digits)
    right = np.abs(digits - whole) < 1e-4  # rounding in float32 leaves 1e-5
    if right.mean() <= 0.99:
        return False
    integer = whole[right].astype(np.int64)
    last = np.ldexp((integer & -integer).astype(np.float64), exponent[right] - BITS)
    return bool((entries >= 2.0**BITS * last.min()).mean() >= 0.25)
