"""Which fault a factor between theirs and ours belongs to: from the numbers alone.

Once the forms agree, each layer leaves two numbers: theirs is c_A times ours in A, c_G in G. What
they may be is known: squares of whole numbers, powers of 4, quotients of counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from refcurv.judge.diagnosis.divisors import (
    NUMBERS,
    Divisors,
    Member,
    Named,
    Scale,
    candidates,
    members,
    near,
    whole,
)
from refcurv.law.words import number_of

SURE = 0.9
"""Of what an interval allows, the share that a fault must have to be named.  Chosen."""

TINY = 1e-150
"""No fault gives a factor below it, or above 1/TINY.  Chosen: squares of these are numbers yet."""


def explain(scales: Sequence[Scale], counts: Divisors, beside: Sequence[Scale] = ()) -> list[Named]:
    """What explains the factors that are not 1: one entry for each group of layers and fault.

    Args: beside, layers that have no factor, as far as drawing tells.
    """
    out = _of_unlike_rows([*scales, *beside], counts)
    told = {layer for one in out for layer in one.layers}
    scales = [one for one in scales if one.layer not in told]
    for group in _groups(scales):
        names = tuple(one.layer for one in group)
        found = _beyond(group[0]) or _of_group(group, counts, alone=len(group) < len(scales))
        for named in found:
            out.append(replace(named, layers=names))
    return _joined(out)


def _of_unlike_rows(scales: Sequence[Scale], counts: Divisors) -> list[Named]:
    """One count in the place of each layer's own, where layers have different rows, as of images.

    Then each layer has a factor of its own, n over this count, and all of them are one fault: of A
    and G a divisor (B4), of G alone loss terms that are counted by the layer's positions (B7).
    """
    if len({one.rows for one in scales}) < 2:
        return []
    names = tuple(
        one.layer for one in scales if _off(one.c_A, one.tol_A) or _off(one.c_G, one.tol_G)
    )
    for name, count in {**counts.others, "row": 1}.items() if names else ():
        for sides, fault in (("AG", "B4"), ("G", "B7")):
            if count and all(_is_over(one, count, sides) for one in scales):
                own = f"A and G are divided by {count} {name}" if sides == "AG" else (
                    f"G is ours times the layer's rows over {count} {name}"
                )  # fmt: skip
                return [Named(fault, f"{own}, layer by layer", sides, 0.0, (), names)]
    return []


def _is_over(one: Scale, count: int, sides: str) -> bool:
    """Are these sides of a layer ours times its rows over the count, and the others ours?"""
    r = one.rows / count
    each = (("A", one.c_A, one.tol_A), ("G", one.c_G, one.tol_G))
    return all(c is None or near(c, r if side in sides else 1.0, tol) for side, c, tol in each)


def _off(c: float | None, tol: float) -> bool:
    return c is not None and not abs(c - 1) <= tol


def _groups(scales: Sequence[Scale]) -> list[list[Scale]]:
    """Layers whose factors are not both 1, those with the same factors together."""
    groups: list[list[Scale]] = []
    for one in scales:
        if not (_off(one.c_A, one.tol_A) or _off(one.c_G, one.tol_G)):
            continue
        for group in groups:
            if _same(group[0], one):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _same(x: Scale, y: Scale) -> bool:
    pairs = ((x.c_A, y.c_A, x.tol_A + y.tol_A), (x.c_G, y.c_G, x.tol_G + y.tol_G))
    return all(a is None or b is None or near(a, b, tol) for a, b, tol in pairs)


def _beyond(one: Scale) -> list[Named]:
    """A factor that no fault gives: theirs is zero or infinite beside ours, or its negative.

    Proof: tests/test_judge_factors.py::test_factors_that_no_fault_gives_are_told
    """
    both = {"A": one.c_A, "G": one.c_G}
    far = {side: c for side, c in both.items() if c is not None and not TINY <= c <= 1 / TINY}
    if not far:
        return []
    words = " and ".join(f"{side} is ours times {c:.9g}" for side, c in far.items())
    left = max(abs(c - 1) for c in far.values())
    return [Named(None, words, "".join(far), left, certain=False)]


def _of_group(group: Sequence[Scale], counts: Divisors, alone: bool) -> list[Named]:
    """The faults of layers that share their factors."""
    # what other layers share with the patches is none of a convolution's own
    one = min(group, key=lambda s: (s.layer == "patch", s.tol_A + s.tol_G))
    a = one.c_A if _off(one.c_A, one.tol_A) else 1.0
    g = one.c_G if _off(one.c_G, one.tol_G) else 1.0
    assert a is not None and g is not None
    tol = one.tol_A + one.tol_G
    if a != 1 and one.c_A is not None and one.c_G is not None and near(a, g, tol):
        return [_of_both(a, one.tol_A if one.drawn else tol, one, counts)]
    if a == 1:
        twice = _counted_twice(g, one)
        return [twice] if twice else _of_gradients(g, one.tol_G, one, counts, alone)
    if g == 1:
        return [_of_inputs(a, one.tol_A, one, counts, alone)]
    return _of_two(a, g, one, counts, alone)


def _of_two(a: float, g: float, one: Scale, counts: Divisors, alone: bool) -> list[Named]:
    """A is ours times a, and G is ours times another number."""
    tol, words = one.tol_A + one.tol_G, f"A is ours times {a:.6g} and G ours times {g:.6g}"
    if near(a * g, 1, tol):
        return [Named("B8", f"{words}; their product is 1", "AG", abs(a * g - 1))]
    if one.layer == "patch" and (whole(a, one.tol_A) or whole(1 / a, one.tol_A)):
        return [Named("B14", words, "AG", 0.0, ("B7",))]
    if one.drawn and one.alone:  # G is somewhere about that, and not where A is
        return [Named(None, f"{words}, about", "AG", abs(a - 1), certain=False)]
    both = _of_both(a, one.tol_A, one, counts)
    rest = _of_gradients(g / a, tol, one, counts, alone)
    if both.fault and all(named.fault for named in rest):
        return [both, *rest]
    gauge = _of_gradients(a * g, tol, one, counts, alone)
    words = f"A is ours times {a:.6g}, which G may make up for"
    return [Named("B8", words, "AG", 0.0), *gauge]


def _counted_twice(g: float, one: Scale) -> Named | None:
    """Inputs are added k times and counted k times; gradients are added once, over that count."""
    k = one.rows_G or 0.0
    if not (k == one.rows_A and k > 1 and k == round(k) and near(g * k, 1, one.tol_G)):
        return None
    words = f"A is ours, G is ours times {g:.6g}, and both counts are ours times {k:g}"
    return Named("B39", f"{words}: inputs are added and counted {k:g} times", "Gn", abs(g * k - 1))


def _of_both(r: float, tol: float, one: Scale, counts: Divisors) -> Named:
    """A and G are both ours times r: the divisor is another count."""
    words = f"A and G are both ours times {r:.9g}"
    for name, count in counts.others.items():
        if count and near(r * count, counts.rows, tol):
            words += f": divided by {count} {name} instead of {number_of(counts.rows, 'row')}"
            return Named("B4", words, "AG", abs(r * count / counts.rows - 1))
    if near(r, counts.rows, tol):
        words += ", the number of rows: these are sums"
        return Named("B4", words, "AG", abs(r / counts.rows - 1))
    if near(r, 2, tol):
        return Named("B39", words + ": each row is added twice", "AG", abs(r / 2 - 1), ("B40",))
    whole = round(counts.rows / r) if r > 0 else 0
    if whole >= 1 and tol * whole < 0.1 and near(counts.rows / r, whole, tol):
        words += f": divided by {whole} instead of {number_of(counts.rows, 'row')}"
        return Named("B4", words, "AG", abs(r * whole / counts.rows - 1), ("B46",))
    if tol * counts.rows >= 0.1 and 1 / counts.rows < r < 2 * counts.rows:
        return Named("B4", words + ": divided by another count", "AG", tol)
    return Named(None, words, "AG", abs(r - 1))


def _of_inputs(a: float, tol: float, one: Scale, counts: Divisors, alone: bool) -> Named:
    """A alone is ours times a."""
    words = f"A is ours times {a:.9g}, and G is ours"
    if near(a, 2, tol):
        return Named("B39", words + ": each input is added twice", "A", abs(a / 2 - 1), ("B40",))
    if one.layer == "patch" or (alone and whole(a, tol)):
        return Named("B14", words, "A", 0.0, ("B7",))
    both = _of_both(a, tol, one, counts)
    words = both.sentence.replace("A and G are both", "A alone is")
    return Named(both.fault, words, "A", both.left, both.alike)


def _of_gradients(c: float, tol: float, one: Scale, counts: Divisors, alone: bool) -> list[Named]:
    """G alone is ours times c."""
    if near(c, 1, tol):
        return []
    if one.drawn:
        return [] if one.alone else [_of_interval(c, tol, counts)]
    if found := list(candidates(c, tol, one, counts, alone)):
        if counts.weights and not found[0].certain:
            return [_of_interval(c, tol, counts, "rounding")]
        return [_or_others(found[0], found[1:], tol)]
    for fault, factor in (("B5", 2.0), ("B5", 0.5)):  # two at once
        for named in candidates(c / factor, tol, one, counts, alone):
            if named.fault in ("B1", "B43"):
                words = f"{named.sentence}, times {factor:g}"
                return [named, Named(fault, words, "G", named.left)]
    return [Named(None, f"G is ours times {c:.9g}", "G", abs(c - 1), certain=False)]


def _or_others(first: Named, others: Sequence[Named], tol: float) -> Named:
    """With the others that give the same number: of 16 outputs 1/V is that of 4 steps.

    Proof: tests/test_judge_factors.py::test_one_number_of_two_faults_is_both_of_theirs
    """
    if first.fault not in NUMBERS:
        return first
    same = [x for x in others if x.fault in NUMBERS and x.left <= tol]
    ids = [*first.alike, *(id for x in same for id in (x.fault, *x.alike))]
    return replace(first, alike=tuple(dict.fromkeys(x for x in ids if x and x != first.fault)))


def _of_interval(c: float, tol: float, counts: Divisors, what: str = "drawing") -> Named:
    """What G can be that is ours times c, where `what` allows c/(1 + tol) to c/(1 − tol).

    Each fault may give some factors. The share of these that the interval holds says how likely
    the fault would have led there. A fault is named if it has SURE of all shares.
    """
    high = f"{c / (1 - tol):.3g}" if tol < 1 else "any number"
    words = f"G is ours times {c / (1 + tol):.3g} to {high}, by what {what} allows"
    fitting = [x for x in members(counts) if near(c, x.factor, tol)]
    share = {x.fault: 0.0 for x in fitting} | dict(counts.weights)
    for x in fitting:
        share[x.fault] += x.share
    if not share:
        return Named(None, words, "G", tol, certain=False)
    first, *others = sorted(share, key=lambda fault: -share[fault])
    steps = [x for x in ("B1", "B43") if x in share] if first in ("B1", "B43") else [first]
    steps += [x for x in _of_one_number(fitting, first) if x not in steps]
    text = "; ".join(x.words for x in fitting if x.fault == first)
    if sum(share[x] for x in steps) < SURE * sum(share.values()):
        ids = (first, *others, *(("B46",) if "B43" in share else ()))
        text = f"{words}; which fault it is, is unknown: {', '.join(ids)} may give this"
        return Named(None, text, "G", tol, ids, certain=False)
    alike = (*(x for x in steps if x != first), *(("B46",) if "B43" in steps else ()))
    alike += ("B7", "B82") if first == "B37" else ()
    return Named(first, f"{words}: {text}" if text else words, "G", tol, alike)


def _of_one_number(fitting: Sequence[Member], first: str) -> list[str]:
    """The faults whose one factor that fits is also the one of the first: it tells none of them."""
    of: dict[str, set[float]] = {}
    for x in fitting:
        of.setdefault(x.fault, set()).add(round(math.log(x.factor), 9))
    own = of.get(first, set())
    return [id for id, numbers in of.items() if len(own) == 1 and numbers == own]


def _joined(named: Sequence[Named]) -> list[Named]:
    """The same fault of several groups is one; factors that differ by layer are B7."""
    differ = len({one.layers for one in named if one.fault is None and one.sides == "G"}) > 1
    out: dict[str | tuple[str, ...], Named] = {}
    for one in named:
        fault = "B7" if one.fault is None and differ else one.fault
        old = out.get(fault or one.layers)
        layers = one.layers
        if old is not None:
            layers = old.layers + tuple(x for x in one.layers if x not in old.layers)
        first = old or one
        left = max(first.left, one.left)
        out[fault or one.layers] = replace(first, fault=fault, left=left, layers=layers)
    return list(out.values())


def counted(scales: Sequence[Scale]) -> list[Named]:
    """What explains counts of rows that are not ours, where A and G agree."""
    out: dict[tuple[str, str], list[str]] = {}
    details: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
    for one in scales:
        a, g = one.rows_A or 1.0, one.rows_G or 1.0
        if a == g == 1 or _off(one.c_A, one.tol_A) or _off(one.c_G, one.tol_G):
            continue
        known = (("A", one.rows_A), ("G", one.rows_G))
        words = ", ".join(f"n_{side} is ours times {k:.6g}" for side, k in known if k is not None)
        fault = "B82"
        alike: tuple[str, ...] = ("B4",)
        if a == g and a > 1 and a == round(a):
            fault, alike = "B40", ("B39",)
        elif a == round(a) and a > 1 and g == 1:
            fault, alike = "B39", ()
        out.setdefault((fault, words), []).append(one.layer)
        details[fault, words] = words, alike
    return [
        Named(fault, words, "n", 0.0, details[fault, words][1], tuple(layers))
        for (fault, words), layers in out.items()
    ]
