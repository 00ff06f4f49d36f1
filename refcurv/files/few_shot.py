"""What stands before every prompt of a file of tasks: its first line, a preamble and shots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from refcurv.files.ids import WHO, require_text
from refcurv.law.checks import SchemaError

_KEYS: Final = ("preamble", "shots", "between")
_SHOT: Final = ("prompt", "answer")


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before every prompt. Fields: text; prompts, those that it answers itself."""

    text: str
    prompts: frozenset[str]


def front(where: str, record: Mapping[str, Any]) -> Front | None:
    """What stands before every prompt, where a file's first line gives it; None for another line.

    Definition
        preamble, then for each shot its prompt, its answer and `between`
        preamble is empty and `between` one line end where the line does not give them

    Raises:
        SchemaError: a preamble or shots beside an unknown key; a value that is not text; shots
            that are not a list of prompts with their answers.

    Proof: tests/test_few_shot.py::test_the_ids_are_those_of_the_whole_text,
        ::test_a_first_line_that_is_not_understood
    """
    if not {"preamble", "shots"} & record.keys():
        return None
    _require_keys(where, record, _KEYS)
    preamble = _text(where, "preamble", record.get("preamble", ""))
    between = _text(where, "between", record.get("between", "\n"))
    shots = record.get("shots", [])
    if not isinstance(shots, list):
        raise SchemaError(f"{WHO}: {where}: 'shots' must be a list; got {type(shots).__name__}.")
    parts = [preamble]
    for number, shot in enumerate(shots):
        at = f"{where} shot {number}"
        if not isinstance(shot, dict) or not set(_SHOT) <= shot.keys():
            raise SchemaError(f"{WHO}: {at} must be an object with prompt and answer.")
        _require_keys(at, shot, _SHOT)
        parts += [*(_text(at, key, shot[key]) for key in _SHOT), between]
    return Front("".join(parts), frozenset(shot["prompt"] for shot in shots))


def _require_keys(where: str, record: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if other := sorted(record.keys() - set(known)):
        raise SchemaError(
            f"{WHO}: {where} has the key {other[0]!r:.60}, and takes {', '.join(known)} alone."
        )


def _text(where: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise SchemaError(f"{WHO}: {where}: {key!r} must be text; got {type(value).__name__}.")
    return require_text(where, key, value)
