"""Edits of equal perplexity: how strongly a method may cut, and what each strength costs.

A method is a function from a number, its strength, to an edited model. Methods are compared where
they cost the same, not where their strengths agree (METHOD, Later work: rho is not comparable
between estimators, data sizes or bases).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, starmap
from typing import Any

from scipy.optimize import brentq

from refcurv.evaluation.items import hits, suffix_nats
from refcurv.evaluation.metrics import perplexity
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    RangeError,
    require_range,
)
from refcurv.model.corpus import Population
from refcurv.model.given import require_whole
from refcurv.model.weights import Model
from refcurv.progress import Progress, silent

LARGEST = 1e300
"""Chosen: what can be searched for is at most this; ratios to it are then numbers."""

Strengthen = Callable[[float], Model]
"""A method: strength → edited model."""


@dataclass(frozen=True, slots=True)
class Match:
    """The result of a search for the edit whose perplexity is the target.

    Fields:
        strength, perplexity: of the edit that was found.
        target: the perplexity that was asked for.
        matched: is the perplexity within the tolerance of the target?
        tried: every (strength, perplexity) that was measured, in order.
    """

    strength: float
    perplexity: float
    target: float
    matched: bool
    tried: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> str:
        """The word for it: "matched", or it "overshoots" or "falls short" of the target."""
        if self.matched:
            return "matched"
        return "overshoots" if self.perplexity > self.target else "falls short"


def at_perplexity(
    strengthen: Strengthen,
    target: float,
    text: Population,
    *,
    weakest: float,
    strongest: float,
    tolerance: float = 0.005,
    most: int = 30,
) -> Match:
    """The strength at which a method's perplexity on a text is the target.

    Definition
        |perplexity(strengthen(s)) / target − 1| <= tolerance, s between weakest and strongest

    `matched` guarantees that the perplexity at the returned strength was measured and is within the
    tolerance. `weakest` is measured first. If its perplexity is above the target, it is returned
    ("overshoots"), whatever stronger settings would do. `strongest` is next. If its perplexity is
    below, it is returned ("falls short"), whatever weaker settings would do. Otherwise Brent's
    method keeps a bracket with one end below the target and one above, and finds a crossing. It is
    not always the weakest crossing, for perplexity need not rise everywhere. Edits are counted in
    whole pairs, so perplexity may jump over the target. There, or after `most` measurements, the
    tried strength whose perplexity is nearest by ratio is returned, not matched. An infinite
    perplexity is above the target.

    Args:
        strengthen: strength → edited model. It should depend on the strength smoothly, as with the
            logarithm of the share that is removed.
        target: perplexity, >= 1.
        text: of kind `text`, with tokens behind its prompts.
        weakest: one end of the search, of low perplexity; it may be the larger number.
        strongest: the other end.
        tolerance: relative, >= 0 and < 1.
        most: how many edits may be measured, >= 2.

    Returns:
        Match. The same for any number of threads.

    Raises:
        RangeError: an argument outside its range, or one end that is the other.
        ConventionError: a population of another kind. EmptyError: one without a token to score.
        Whatever `strengthen` raises.

    Cost: one edit and one forward pass over the text for each of Match.tried, about 7 of them.
    Source: METHOD, Controls; Brent 1973.
    Proof: tests/test_matching.py::test_the_perplexity_is_matched, ::test_overshoot_and_shortfall,
        ::test_a_jump_is_not_a_match, ::test_perplexity_need_not_be_monotone
    """
    _require_text(text)
    return search(
        lambda strength: text_perplexity(strengthen(strength), text), target,
        weakest=weakest, strongest=strongest, tolerance=tolerance, most=most,
    )  # fmt: skip


def search(
    measured: Callable[[float], float],
    target: float,
    *,
    weakest: float,
    strongest: float,
    tolerance: float = 0.005,
    most: int = 30,
    pairs: Callable[[float], int | None] = lambda strength: None,
) -> Match:
    """`at_perplexity` of what `measured` says of a strength; its arguments and errors.

    `pairs` says of a strength that was measured how many pairs its edit keeps, where that is known.
    It falls as the strength rises, and a number belongs to one edit. Then nothing lies between two
    neighbours, and the search ends where they are on either side of the target.

    Proof: tests/test_matching.py::test_a_search_ends_between_neighbours
    """
    _require_search(target, weakest, strongest, tolerance, most)
    tried: dict[float, float] = {}

    def excess(strength: float) -> float:
        """ln(perplexity / target), or 0 within the tolerance, which ends the search."""
        if strength not in tried:
            tried[strength] = measured(strength)
        return 0.0 if near(tried[strength]) else math.log(tried[strength] / target)

    def step(strength: float) -> float:
        """`excess`, or 0 where no other edit lies between those on either side of the target."""
        found = excess(strength)
        return 0.0 if any(starmap(neighbours, pairwise(sorted(tried)))) else found

    def neighbours(one: float, other: float) -> bool:
        """Do two edits on either side of the target differ by one pair, or by none?"""
        here, there = pairs(one), pairs(other)
        if here is None or there is None or (tried[one] > target) == (tried[other] > target):
            return False
        return abs(here - there) <= 1

    def near(value: float) -> bool:
        return abs(value / target - 1) <= tolerance

    def match(strength: float) -> Match:
        found = tried[strength]
        return Match(strength, found, float(target), near(found), tuple(tried.items()))

    low, high = float(weakest), float(strongest)
    if excess(low) >= 0:
        return match(low)
    if excess(high) <= 0:
        return match(high)
    brentq(step, low, high, xtol=1e-9 * abs(high - low), maxiter=most - 2, disp=False)
    return match(min(tried, key=lambda s: abs(math.log(tried[s] / target))))


def search_share(
    measured: Callable[[float], float],
    target: float,
    *,
    weakest: float,
    strongest: float,
    tolerance: float = 0.005,
    most: int = 30,
    pairs: Callable[[float], int | None] = lambda strength: None,
) -> Match:
    """`search` by the logarithm of the share that is removed; the strengths are the shares.

    Proof: tests/test_matching.py::test_a_share_is_searched_by_its_logarithm
    """
    for what, end in (("weakest", weakest), ("strongest", strongest)):
        if require_range("match", what, end, 0, 1) == 0:
            raise RangeError(f"match: {what} must be above 0; got {end!r}.")
    match = search(
        lambda power: measured(10.0**power), target, weakest=math.log10(weakest),
        strongest=math.log10(strongest), tolerance=tolerance, most=most,
        pairs=lambda power: pairs(10.0**power),
    )  # fmt: skip
    tried = tuple((10.0**power, value) for power, value in match.tried)
    return replace(match, strength=10.0**match.strength, tried=tried)


@dataclass(frozen=True, slots=True)
class Point:
    """One strength, the share of texts still recited without an error, and the perplexity."""

    strength: float
    recitation: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite perplexity becomes null."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}


def tradeoff(
    strengthen: Strengthen,
    strengths: Iterable[float],
    recite: Population,
    text: Population,
    *,
    progress: Progress = silent,
) -> tuple[Point, ...]:
    """What each strength leaves of recitation, and what it costs in perplexity.

    Args:
        strengthen: strength → edited model.
        strengths: those to try, in any order.
        recite: of kind `recite`; its strict recitation is that of `rc.evaluate`.
        text: of kind `text`; its perplexity likewise, to rounding.
        progress: called with (strengths done, strengths).

    Returns:
        One Point for each strength, in their order.

    Raises:
        ConventionError: a population of another kind. EmptyError: a text without a token to score.

    Cost: per strength one edit and one forward pass over both populations.
    Source: arXiv 2510.24256, appendix D, the Pareto front.
    Proof: tests/test_matching.py::test_a_tradeoff_is_what_evaluate_says
    """
    _require_text(text)
    if recite.kind != "recite":
        raise ConventionError(f"tradeoff: recite must be of kind 'recite'; got {recite.kind!r}.")
    asked, found = list(strengths), []
    progress(0, len(asked))
    for done, strength in enumerate(asked, 1):
        model = strengthen(strength)
        recited = float(hits(model, recite).mean())
        found.append(Point(float(strength), recited, text_perplexity(model, text)))
        progress(done, len(asked))
    return tuple(found)


def text_perplexity(model: Model, text: Population) -> float:
    """The perplexity of the tokens that are asked for, infinite if it overflows.

    Of text it is that of `rc.evaluate`, to rounding.
    """
    return perplexity(suffix_nats(model, text), text.length - text.prompt_length)


def _require_text(text: Population) -> None:
    if text.kind != "text":
        raise ConventionError(f"matching: text must be of kind 'text'; got {text.kind!r}.")
    if not (text.length > text.prompt_length).any():
        raise EmptyError("matching: the text has no token behind any prompt.")


def _require_search(
    target: float, weakest: float, strongest: float, tolerance: float, most: int
) -> None:
    who = "at_perplexity"
    require_range(who, "target", target, 1, LARGEST)
    ends = [
        require_range(who, what, end, -LARGEST, LARGEST)
        for what, end in (("weakest", weakest), ("strongest", strongest))
    ]
    if ends[0] == ends[1]:
        raise RangeError(f"{who}: weakest and strongest are both {weakest!r}: nothing to search.")
    if require_range(who, "tolerance", tolerance, 0, 1) == 1:
        raise RangeError(f"{who}: tolerance must be below 1; got {tolerance!r}.")
    require_whole(who, "most", most, 2)
