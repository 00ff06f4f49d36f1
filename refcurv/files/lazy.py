"""A mapping whose values are read at each access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """Names in order, and a function that reads the value of a name; no value is kept."""

    __slots__ = ("_names", "_read")

    def __init__(self, names: Sequence[str], read: Callable[[str], Value]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class Recent(Mapping[str, Value]):
    """`base`, whose values that were read last are kept, up to so many bytes; the last one always.

    Proof: tests/test_judge_large.py::test_what_was_read_last_is_kept_within_a_bound
    """

    __slots__ = ("_base", "_kept", "_most")

    def __init__(self, base: Mapping[str, Value], most: int) -> None:
        self._base, self._most = base, most
        self._kept: dict[str, Value] = {}

    @property
    def base(self) -> Mapping[str, Value]:
        """What values are read from."""
        return self._base

    def __getitem__(self, name: str) -> Value:
        if name in self._kept:
            value = self._kept.pop(name)
        else:
            self._shrink(0, self._most / 2)  # what is read needs room too
            value = self._base[name]
        self._kept[name] = value
        self._shrink(1, self._most)
        return value

    def forget(self) -> None:
        """Keep none of what was read."""
        self._kept.clear()

    def _shrink(self, least: int, most: float) -> None:
        """Drop what was read first, until so few are left or so many bytes."""
        while len(self._kept) > least and sum(map(_nbytes, self._kept.values())) > most:
            del self._kept[next(iter(self._kept))]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base


def _nbytes(value: object) -> int:
    """Of the arrays in the fields of a record."""
    parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else [value]
    return sum(int(getattr(part, "nbytes", 0)) for part in parts)
