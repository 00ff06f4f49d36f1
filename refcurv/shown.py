"""How records print: in one line, by what they are made of, never by their entries.

`dataclass` prints every number that a record holds, and reads all that is lazy. Here an array is
its dtype and shape, a mapping its size and first name, a sequence its size and first item; what is
at its default is left out, and what is too long ends with "…".
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

LONGEST = 48
"""Letters of one value.  Chosen: then a record of ten fields takes a few lines of a terminal."""


PLAIN = (str, int, float, type(None))
"""Kinds of which a short sequence is shown whole."""


def brief(value: object) -> str:
    """A value in a few words: a record as above, anything else as itself if that is short.

    Proof: tests/test_shown.py::test_a_record_prints_one_short_line
    """
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(_told(value))})"
    return _short(value)


def show_records() -> None:
    """From now on every record of the package prints so; called once, when all is imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("refcurv."):
            for kind in vars(module).values():
                if isinstance(kind, type) and kind.__module__ == name and is_dataclass(kind):
                    kind.__repr__ = brief  # type: ignore[method-assign]


def _told(record: Any) -> Iterator[str]:
    """Whether it passed, and its fields."""
    if isinstance(getattr(type(record), "passed", None), property):
        yield f"passed={record.passed}"
    for field in fields(record):
        value = getattr(record, field.name)
        if field.repr and not _usual(field, value):
            yield f"{field.name}={_short(value)}"


def _usual(field: Field[Any], value: object) -> bool:
    """Is it at its default, or empty where the default is?"""
    if field.default_factory is not MISSING:
        return isinstance(value, Mapping | tuple | list | str) and not value
    plain = isinstance(value, str | int | float | tuple)
    return value is field.default or (plain and value == field.default)


def _short(value: object) -> str:
    """At most LONGEST letters."""
    if shape := _shape(value):
        return shape
    if isinstance(value, Mapping):
        first = next(iter(value), None)
        text = "{}" if first is None else _some(len(value), "{%s}", repr(first))
    elif isinstance(value, Collection) and not isinstance(value, str):
        text = repr(value) if all(isinstance(x, PLAIN) for x in value) else ""
        if not text or len(text) > LONGEST:
            text = _some(len(value), "[%s]", _short(next(iter(value))))
    elif is_dataclass(value) and not isinstance(value, type):
        text = brief(value)
    else:
        text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _some(count: int, around: str, first: str) -> str:
    return around % (f"{count:,}: {first}" + (", …" if count > 1 else ""))


def _shape(value: object) -> str:
    """An array by dtype and shape, without reading it; empty of anything else."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return ""
    return f"{dtype} {shape}" if shape else str(value)
