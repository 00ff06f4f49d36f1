"""Patterns over dotted names, such as "blocks.{2-3}.mlp.*"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

from refcurv.law.checks import NameUnknownError

Places = set[int]
"""Places in a name: before its first letter is 0, behind its last its length."""

Step = Callable[[str, Places], Places]
"""One part of a pattern: from the places where it may begin in a name to those where it may end.

Every place is a member once, however many ways lead there. So a pattern takes a time in proportion
to its length. A regular expression with a dozen stars takes hours.
"""


def expand(pattern: str, names: list[str]) -> list[str]:
    """The names that `pattern` matches, in their order.

    `*` stays within one dotted part, `**` crosses parts, `{a,b}` and ranges `{23-25}` list
    alternatives; patterns may be joined by commas outside braces. A pattern that matches nothing
    is an error: a typo must not be an empty set.

    Proof: tests/test_config.py::test_patterns, ::test_no_pattern_takes_long
    """
    chosen: set[str] = set()
    for part in re.split(r",(?![^{]*\})", _text(pattern)):
        steps = _steps(part.strip())
        hits = {name for name in names if len(name) in _ends(steps, name, {0})}
        if not hits:
            some = ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names)
            raise NameUnknownError(f"pattern {part.strip()!r} matches none of: {some}.")
        chosen |= hits
    return [name for name in names if name in chosen]


def spelled(pattern: str, names: Iterable[str]) -> list[str]:
    """The names, of one word each, that `pattern` spells out."""
    words = re.findall(r"\w+", _text(pattern))
    return [name for name in names if name in words]


def _text(pattern: str) -> str:
    if not isinstance(pattern, str):
        raise NameUnknownError(
            f"a pattern is one text, such as 'blocks.*.mlp.up,head'; got {type(pattern).__name__}."
        )
    return pattern


def _steps(pattern: str) -> list[Step]:
    out: list[Step] = []
    i = 0
    while i < len(pattern):
        if pattern.startswith("**", i):
            out.append(_anything)
            i += 2
        elif pattern[i] == "*":
            out.append(_within_a_part)
            i += 1
        elif pattern[i] == "{":
            end = pattern.find("}", i)
            if end < 0:
                raise NameUnknownError(f"pattern {pattern!r} has a '{{' without a '}}'.")
            out.append(partial(_one_of, [_alternative(a) for a in pattern[i + 1 : end].split(",")]))
            i = end + 1
        else:
            out.append(partial(_letter, pattern[i]))
            i += 1
    return out


def _alternative(text: str) -> list[Step]:
    bounds = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text.strip())
    if not bounds:
        return _steps(text.strip())
    low, high = int(bounds[1]), int(bounds[2])
    if low > high:
        raise NameUnknownError(f"range {{{text}}} runs backwards; write {{{high}-{low}}}.")
    return [partial(_number, low, high)]


# ------------------------------------------------------------------ matching


def _ends(steps: Iterable[Step], name: str, places: Places) -> Places:
    """Where steps end, one after the other, that begin at one of the places."""
    for step in steps:
        if not places:
            break
        places = step(name, places)
    return places


def _letter(letter: str, name: str, places: Places) -> Places:
    return {at + 1 for at in places if name.startswith(letter, at)}


def _anything(name: str, places: Places) -> Places:
    return set(range(min(places), len(name) + 1))


def _within_a_part(name: str, places: Places) -> Places:
    ends = set(places)
    for at in range(min(places), len(name)):
        if at in ends and name[at] != ".":
            ends.add(at + 1)
    return ends


def _one_of(alternatives: list[list[Step]], name: str, places: Places) -> Places:
    return {end for steps in alternatives for end in _ends(steps, name, places)}


def _number(low: int, high: int, name: str, places: Places) -> Places:
    """The numbers low to high, in decimal and without leading zeros."""
    return {
        at + n
        for at in places
        for n in range(1, 5)
        if re.fullmatch(r"0|[1-9][0-9]*", text := name[at : at + n])
        and low <= int(text) <= high
        and at + n <= len(name)
    }
