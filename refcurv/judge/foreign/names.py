"""Their layer names and ours, matched where a name can mean one layer only; nothing is guessed.

The names of checkpoints are known by family (`refcurv.files.families`). No two families give one
name to two of our layers (tests/test_foreign.py::test_no_name_means_two_layers), so that theirs
need not say which family it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

from refcurv.files.families import FAMILIES
from refcurv.judge.dump import Dump
from refcurv.judge.verdict import MISSING, Comparison
from refcurv.law.checks import NameUnknownError

_WRAPPERS: Final = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Parts that torch puts before or within names."""

_PREFIXES: Final = ("base_model.", "model.", *sorted({family.prefix for family in FAMILIES}))
"""What programs put before names, or leave out."""

_STARS: Final = re.compile(r"(\*\*|\*)")

_OFFICIAL: Final = {f"blk*.{kind}": f"blocks.*.mlp.{kind}" for kind in ("gate", "up", "down")}


def match(
    dump: Dump, shapes: Mapping[str, tuple[int, int]], names: Mapping[str, str]
) -> tuple[dict[str, str], list[Comparison]]:
    """(our layer → their name, what is to be said about it).

    The caller's names win, then equal names, then names of a checkpoint, with or without prefixes
    and `.weight`. Two of theirs that could be one of ours are listed, and neither is matched; so
    are layers that are fused in theirs (qkv, gate_up).

    Args: shapes, (O, I) of each of our layers that is wanted; names, given by the caller, where a
    `*` in both stands for one part of a name that they share, and `**` for several.

    Raises:
        NameUnknownError: a given name is no layer of ours, or none of theirs.

    Proof: tests/test_foreign.py::test_names_of_every_family_are_known, ::test_nothing_is_guessed,
        ::test_a_name_with_stars_is_a_name_for_each
    """
    names = _each(names, shapes, dump.layers)
    for ours, theirs in names.items():
        _require_known("ours", ours, shapes)
        _require_known("theirs", theirs, dump.layers)
    candidates: dict[str, list[str]] = {ours: [] for ours in shapes}
    fused: dict[str, list[str]] = {}
    free = [theirs for theirs in dump.layers if theirs not in names.values()]
    for theirs in free:
        meant = _meant(theirs)
        for ours in meant:
            if len(meant) > 1:
                fused.setdefault(ours, []).append(theirs)
            elif ours in candidates:
                candidates[ours].append(theirs)
    matched: dict[str, str] = {}
    notes: list[Comparison] = []
    for ours, shape in shapes.items():
        found = candidates[ours]
        if ours in names:
            matched[ours] = names[ours]
        elif ours in free:
            matched[ours] = ours
        elif len(found) == 1:
            matched[ours] = found[0]
        elif found:
            notes.append(_said(ours, _ambiguous(dump, found, shape)))
        elif ours in fused:
            notes.append(_said(ours, _fused(fused[ours][0])))
    return matched, notes


def _each(names: Mapping[str, str], ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """The names; one with stars, for every layer of ours that is there in theirs by it."""
    every, known = [*ours], {*theirs}
    spread: dict[str, str] = {}
    plain: dict[str, str] = {}
    for one, other in names.items():
        if not isinstance(one, str) or "*" not in one:
            plain[one] = other
            continue
        stars = _STARS.findall(one)
        if stars != _STARS.findall(str(other)) or len(stars) > 4:
            raise NameUnknownError(
                f"validate: names: {one!r:.80} and {other!r:.80} must have the same stars, four at "
                "most: `*` stands for one part of a name, `**` for several."
            )
        parts = ({"*": "([^.]*)", "**": "(.*)"}.get(x, re.escape(x)) for x in _STARS.split(one))
        pattern = re.compile("".join(parts))
        found = {x: _filled(other, seen.groups()) for x in every if (seen := pattern.fullmatch(x))}
        there = {x: name for x, name in found.items() if name in known}
        spread |= there or dict([*found.items(), (one, other)][:1])  # which is refused
    return spread | plain


def _filled(name: str, parts: Iterable[str]) -> str:
    """A name, with these parts for its stars."""
    rest = iter(parts)
    return _STARS.sub(lambda _: next(rest), name)


def _said(ours: str, cause: str) -> Comparison:
    return Comparison(ours, "names", None, None, MISSING, None, cause)


def _ambiguous(dump: Dump, found: list[str], shape: tuple[int, int]) -> str:
    """Which layers of theirs it could be, with their shapes where they are known."""

    def shown(theirs: str) -> str:
        sizes = dump.shapes.get(theirs)
        if sizes is None:
            return repr(theirs)
        return f"{theirs!r} ({', '.join('?' if n is None else str(n) for n in sizes)})"

    few = ", ".join(map(shown, found[:4])) + (" ..." if found[4:] else "")
    return f"could be each of {few}; ours is {shape}. Say which by names={{...}} (--name)"


def _fused(theirs: str) -> str:
    parts = [name.rpartition(".")[2] for name in _meant(theirs)]
    return (
        f"theirs has {', '.join(parts)} as one layer, {theirs!r}: its G is of all together. Split "
        "its gradient before G is summed"
    )


def _require_known(whose: str, name: object, known: Iterable[str]) -> None:
    every = list(known)
    if isinstance(name, str) and name in every:
        return
    near = difflib.get_close_matches(str(name), every, n=1, cutoff=0)
    which = "a layer that is judged" if whose == "ours" else "a layer of theirs"
    hint = f" The nearest is {near[0]!r}." if near else ""
    raise NameUnknownError(f"validate: names: {str(name)!r:.100} is not {which}.{hint}")


# ------------------------------------------------------------------ what a name means


def _meant(theirs: str) -> tuple[str, ...]:
    """Our layers in the layer that they call so; none if the name is unknown."""
    parts = [part for part in re.split(r"[./]", theirs) if part not in _WRAPPERS]
    name = ".".join(parts)
    for ending in (".weight", ".kernel"):
        name = name.removesuffix(ending)
    while True:
        if found := _look_up(name):
            return found
        shorter = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), None)
        if not shorter:
            return ()
        name = shorter


def _look_up(name: str) -> tuple[str, ...]:
    number = re.search(r"(?<![0-9])(0|[1-9][0-9]{0,5})(?=\.)", name)
    pattern, block = name, ""
    if number:
        block = number[0]
        pattern = f"{name[: number.start()]}*{name[number.end() :]}"
    return tuple(ours.replace("*", block) for ours in known_names().get(pattern, ()))


@cache
def known_names() -> Mapping[str, tuple[str, ...]]:
    """Names, `*` for the number of a block → our layers in that layer.

    A family's prefix is left out; where families give one name to different layers, it is unknown.
    """
    found: dict[str, set[tuple[str, ...]]] = {}

    def add(theirs: str, ours: tuple[str, ...]) -> None:
        found.setdefault(theirs, set()).add(ours)

    for family in FAMILIES:
        names = {slot.theirs: slot.ours for slot in family.slots}
        every = names | {mine: names[its] for mine, its in family.in_memory.items() if its in names}
        for theirs, ours in every.items():
            add(theirs.removeprefix(family.prefix), ours)
            for one in ours:
                add(one, (one,))
    for theirs, own in _OFFICIAL.items():
        add(theirs, (own,))
    return {theirs: next(iter(ours)) for theirs, ours in found.items() if len(ours) == 1}
