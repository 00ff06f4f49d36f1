"""Edits of one perplexity: what is returned is what was asked for, or it says that it is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import budgets
import numpy as np
import pytest
from strategies import assert_within, case

import refcurv as rc
from refcurv.evaluation import matching
from refcurv.evaluation.matching import Match, Point, at_perplexity, search_share, tradeoff
from refcurv.law import tolerance
from refcurv.law.checks import ConventionError, EmptyError, RangeError
from refcurv.model.corpus import ImagePopulation, Population
from refcurv.passes import parallel

ONE = case(batch=6, length=9)
MODEL = rc.Model(ONE.config, ONE.parameters)
LENGTH = np.array([9, 9, 5, 7, 9, 4])
TEXT = Population(ONE.token, np.full(6, 2), LENGTH, "text", "dev")
BUDGET = budgets.path(ONE.config.layers, ONE.config.width, np.float64)
RECITE = Population(ONE.token, np.full(6, 3), np.full(6, 4), "recite", "dev")


def louder(times: float) -> rc.Model:
    """Logits times so much: for more than twice, random tokens are ever less expected."""
    return MODEL.with_parameters({"head.weight": times * ONE.parameters["head.weight"]})


def log_perplexity(times: float) -> float:
    """By the definition, from the logits."""
    nats, count = 0.0, 0
    for row, length in zip(ONE.token, LENGTH, strict=True):
        z = times * rc.logits(MODEL, row[None, :length])[0]
        for t in range(1, length - 1):
            nats -= z[t, row[t + 1]] - np.logaddexp.reduce(z[t])
            count += 1
    return nats / count


class Counted:
    """A method that knows how often each strength was asked for."""

    def __init__(self, times: Callable[[float], float]) -> None:
        self.times = times
        self.asked: list[float] = []

    def __call__(self, strength: float) -> rc.Model:
        self.asked.append(strength)
        return louder(self.times(strength))


def search(method: Callable[[float], rc.Model], target: float, **choices: float) -> Match:
    ends = {"weakest": 0.0, "strongest": 1.0} | choices
    return at_perplexity(method, target, TEXT, **ends)  # type: ignore[arg-type]


def rising(strength: float) -> float:
    return 2 + 8 * strength


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("near", [0.005, 1e-7, 0.0])
@pytest.mark.parametrize("goal", [2.3, 5.0, 9.9])
def test_the_perplexity_is_matched(goal: float, near: float, ends: tuple[float, float]) -> None:
    """Within the tolerance by another route, no strength measured twice, in few steps."""
    target = math.exp(log_perplexity(goal))
    method = Counted(rising if ends[0] < ends[1] else lambda s: rising(1 - s))
    found = search(method, target, weakest=ends[0], strongest=ends[1], tolerance=near)
    there = log_perplexity(method.times(found.strength))
    assert_within(math.log(found.perplexity), there, BUDGET, there, "log perplexity")
    assert abs(math.exp(there - math.log(target)) - 1) <= near + 2 * BUDGET * there
    assert found.matched or near == 0
    assert found.verdict == "matched" or near == 0
    assert [strength for strength, _ in found.tried] == method.asked
    assert len(set(method.asked)) == len(method.asked) <= (12 if near else 30)
    assert dict(found.tried)[found.strength] == found.perplexity


def test_overshoot_and_shortfall() -> None:
    """Even the weakest cut is too strong, or the strongest too weak: said, and returned."""
    low, high = (math.exp(log_perplexity(rising(s))) for s in (0, 1))
    method = Counted(rising)
    found = search(method, low / 1.0051)
    assert (found.matched, found.verdict, found.strength) == (False, "overshoots", 0.0)
    assert method.asked == [0.0]
    found = search(rising_method := Counted(rising), high * 1.0051)
    assert (found.matched, found.verdict, found.strength) == (False, "falls short", 1.0)
    assert rising_method.asked == [0.0, 1.0]
    assert (search(Counted(rising), low / 1.0049).matched, found.target) == (True, high * 1.0051)
    assert search(Counted(rising), low * 1.0049).tried == ((0.0, pytest.approx(low)),)
    assert search(Counted(rising), high * 1.0049).strength == 1.0


@pytest.mark.parametrize(
    ("between", "verdict"), [(0.05, "falls short"), (0.55, "overshoots"), (0.95, "overshoots")]
)
def test_a_jump_is_not_a_match(between: float, verdict: str) -> None:
    """Edits come in whole pairs: of the two sides of a jump the nearer one, by ratio."""
    method = Counted(lambda s: 2.0 if s < 0.3 else 8.0)
    low, high = log_perplexity(2.0), log_perplexity(8.0)
    found = search(method, math.exp(low + between * (high - low)))
    assert not found.matched
    assert found.verdict == verdict
    assert (found.strength < 0.3) == (verdict == "falls short")
    assert len(method.asked) <= 30
    closest = min(abs(s - 0.3) for s in method.asked)
    assert closest < 1e-6  # it looked where the jump is


def test_perplexity_need_not_be_monotone() -> None:
    """A crossing is found; a hump between two ends below the target is not looked for."""
    target = math.exp(log_perplexity(6.0))
    found = search(Counted(lambda s: 4 + 4 * s + 2 * math.sin(20 * s)), target)
    assert found.matched
    hump = search(Counted(lambda s: 3 + 20 * s * (1 - s)), target)
    assert (hump.verdict, hump.strength, len(hump.tried)) == ("falls short", 1.0, 2)


def test_an_infinite_perplexity_is_above_the_target() -> None:
    def method(strength: float) -> rc.Model:
        return louder(2 + 1e5 * strength**2)

    found = search(method, math.exp(log_perplexity(5.0)))
    assert math.inf in dict(found.tried).values()
    assert found.matched


@pytest.mark.parametrize("most", [2, 3, 5])
def test_no_more_is_tried_than_allowed(most: int) -> None:
    method = Counted(rising)
    target = math.exp(log_perplexity(5.1))
    found = search(method, target, tolerance=1e-12, most=most)
    assert len(method.asked) == most
    assert not found.matched
    best = min(found.tried, key=lambda one: abs(math.log(one[1] / target)))
    assert (found.strength, found.perplexity) == best


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refcurv.evaluation.decode.shard_sequences", lambda _: 2)
    target = math.exp(log_perplexity(4.0))
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(parallel, "cores", lambda n=threads: n)
        found.append(search(Counted(rising), target, tolerance=1e-9))
    assert found[0] == found[1]


@pytest.mark.parametrize("searched", [matching.search, search_share])
@pytest.mark.parametrize("pairs", [3, 40, 1000])
def test_a_search_ends_between_neighbours(pairs: int, searched: Callable[..., Match]) -> None:
    """Nothing lies between an edit of n pairs and one of n + 1, so what is found is the same."""
    asked: list[float] = []

    def kept(share: float) -> int:
        return round(pairs * (1 - share))

    def cost(share: float) -> float:
        asked.append(share)
        return 30.0 - 20 * kept(share) / pairs

    target = 30.0 - 20 * (pairs // 3 + 0.4) / pairs
    ends = {"weakest": 0.01, "strongest": 0.99, "tolerance": 0.0, "most": 30}
    whole = searched(cost, target, **ends)
    before, asked[:] = len(asked), []
    found = searched(cost, target, **ends, pairs=kept)
    assert (found.strength, found.perplexity) == (whole.strength, whole.perplexity)
    assert kept(found.strength) == pairs // 3 and not found.matched
    assert {pairs // 3, pairs // 3 + 1} <= set(map(kept, asked))
    assert len(asked) < before
    assert len(asked) <= 2 * len(set(map(kept, asked)))


def test_a_share_is_searched_by_its_logarithm() -> None:
    """Over nine powers of ten in few trials; the strengths that come back are shares."""
    found = search_share(lambda share: 2 + share**0.1, 2.1, weakest=1e-12, strongest=0.9)
    assert found.matched and len(found.tried) < 12
    assert found.strength == pytest.approx(0.1**10, rel=2)
    assert found.perplexity == 2 + found.strength**0.1
    assert [share for share, _ in found.tried][:2] == [1e-12, 10 ** math.log10(0.9)]
    with pytest.raises(RangeError, match="weakest must be above 0"):
        search_share(lambda share: 2.0, 2.1, weakest=0, strongest=0.9)


def test_a_tradeoff_is_what_evaluate_says() -> None:
    corpus = rc.Corpus(ONE.token, populations={"poems": RECITE, "plain": TEXT})
    bars: list[tuple[int, int]] = []
    strengths = [0.5, 0.0, 2.0]

    def method(strength: float) -> rc.Model:
        q = ONE.parameters["blocks.1.attn.q.weight"]
        head = ONE.parameters["head.weight"] * np.exp(-strength)
        return MODEL.with_parameters({"blocks.1.attn.q.weight": -q, "head.weight": head[::-1]})

    points = tradeoff(
        method, iter(strengths), RECITE, TEXT, progress=lambda n, total: bars.append((n, total))
    )
    assert [point.strength for point in points] == strengths
    for point in points:
        table = rc.evaluate(method(point.strength), corpus, split="dev")
        assert point.recitation == table["poems"].after["strict"]
        mean = math.log(table["plain"].after["perplexity"])
        sums = tolerance.gamma(LENGTH.max(), np.float64)  # by row or by token: of nats > 0
        assert_within(math.log(point.perplexity), mean, sums, mean, "log perplexity")
    assert len({point.perplexity for point in points}) == 3
    assert 0 < points[0].recitation < 1
    assert bars == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_points_are_plain_values() -> None:
    found = Point(0.5, 0.25, math.inf).to_json()
    assert found == {"strength": 0.5, "recitation": 0.25, "perplexity": None}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"target": 0.5}, RangeError, "target must lie in"),
        ({"target": math.nan}, RangeError, "target must lie in"),
        ({"target": math.inf}, RangeError, "target must lie in"),
        ({"target": "high"}, RangeError, "target must be a number"),
        ({"weakest": math.nan}, RangeError, "weakest must lie in"),
        ({"strongest": -math.inf}, RangeError, "strongest must lie in"),
        ({"weakest": 1.0}, RangeError, "nothing to search"),
        ({"tolerance": 1.0}, RangeError, "below 1"),
        ({"tolerance": -0.1}, RangeError, "tolerance must lie in"),
        ({"most": 1}, RangeError, "integer of at least 2"),
        ({"most": 2.5}, RangeError, "integer of at least 2"),
        ({"text": RECITE}, ConventionError, "kind 'text'; got 'recite'"),
        ({"text": ImagePopulation(np.zeros((1, 1, 2, 2)), [0], "dev")}, ConventionError, "'label'"),
        (
            {"text": Population(ONE.token, np.full(6, 9), np.full(6, 9), "text", "dev")},
            EmptyError,
            "no token behind any prompt",
        ),
    ],
)
def test_refusals(changed: dict[str, object], error: type[Exception], says: str) -> None:
    asked = {"target": 9.0, "text": TEXT, "weakest": 0.0, "strongest": 1.0} | changed
    method = Counted(rising)
    with pytest.raises(error, match=says) as caught:
        at_perplexity(method, **asked)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert method.asked == []  # before the work


def test_a_tradeoff_refuses_other_kinds() -> None:
    with pytest.raises(ConventionError, match="kind 'recite'; got 'text'"):
        tradeoff(louder, [1.0], TEXT, TEXT)
    with pytest.raises(ConventionError, match="kind 'text'; got 'recite'"):
        tradeoff(louder, [1.0], RECITE, RECITE)
