"""Whether a run may go on from what another one left (FINGERPRINT)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refcurv.files import store
from refcurv.files.disk import parse_json
from refcurv.law.checks import ConventionError, NonFiniteError, SchemaError


def told(facts: Mapping[str, Any]) -> str:
    """The facts of a run, as the attribute `unfinished` of what it leaves."""
    return json.dumps(facts, sort_keys=True)


def require_same(where: str, facts: Mapping[str, Any], header: store.Header) -> None:
    """ConventionError unless the run that left this file has the same facts; says what differs.

    Proof: tests/test_factors.py::test_every_choice_tells_two_runs_apart
    """
    said = store.fact(where, header.attributes, "unfinished", str)
    require_told(where, facts, parse_json(f"{where}: 'unfinished'", said))


def require_told(where: str, facts: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """ConventionError unless a run that told these facts is the same; says what differs."""
    differ = list(_differences(json.loads(told(facts)), theirs))
    if differ:
        raise ConventionError(
            f"{where} belongs to another run: {'; '.join(differ[:4])}"
            f"{f'; and {len(differ) - 4} more' if len(differ) > 4 else ''}. Finish that one as it "
            "was begun, or delete it to start anew."
        )


@contextmanager
def advised(who: str = "collect") -> Iterator[None]:
    """What is wrong with the file, and what to do about it."""
    try:
        yield
    except (SchemaError, NonFiniteError) as error:
        hint = f"If it is what an earlier refcurv {who} left, delete it to start anew."
        raise type(error)(f"{error} {hint}") from None


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """What differs, one text each: "seed is 1 here, 0 there"."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key} {text}" for text in _differences(one, other))
        elif isinstance(one, list) and isinstance(other, list):
            lacks, has = ([x for x in a if x not in b] for a, b in ((other, one), (one, other)))
            yield f"{key} has {_short(has)} here, {_short(lacks)} there"
        else:
            yield f"{key} is {_short(one)} here, {_short(other)} there"


def _short(value: object) -> str:
    """A value in at most 60 letters; of a checksum the first twelve."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else f"{text[:59]}…"
