"""Patterns over dotted names, such as "blocks.{2-3}.mlp.*"."""

from __future__ import annotations

import re

from refcurv.law.checks import NameUnknownError


def expand(pattern: str, names: list[str]) -> list[str]:
    """The names that `pattern` matches, in their order.

    `*` stays within one dotted part, `**` crosses parts, `{a,b}` and ranges `{23-25}` list
    alternatives; patterns may be joined by commas outside braces. A pattern that matches nothing
    is an error: a typo must not be an empty set.
    """
    chosen: set[str] = set()
    for part in re.split(r",(?![^{]*\})", pattern):
        regex = re.compile(_regex(part.strip()))
        hits = {name for name in names if regex.fullmatch(name)}
        if not hits:
            some = ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names)
            raise NameUnknownError(f"pattern {part.strip()!r} matches none of: {some}.")
        chosen |= hits
    return [name for name in names if name in chosen]


def _regex(pattern: str) -> str:
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + r"[^.]*", i + 1
        elif pattern[i] == "{":
            end = pattern.find("}", i)
            if end < 0:
                raise NameUnknownError(f"pattern {pattern!r} has a '{{' without a '}}'.")
            out += "(?:" + "|".join(_alternative(a) for a in pattern[i + 1 : end].split(",")) + ")"
            i = end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def _alternative(text: str) -> str:
    bounds = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text.strip())
    if not bounds:
        return _regex(text.strip())
    low, high = int(bounds[1]), int(bounds[2])
    if low > high:
        raise NameUnknownError(f"range {{{text}}} runs backwards; write {{{high}-{low}}}.")
    return "|".join(str(n) for n in range(low, high + 1))
