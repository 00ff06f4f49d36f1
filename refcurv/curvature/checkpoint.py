"""What a killed collection goes on from: the sums of the closed blocks, in a file (FINGERPRINT)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refcurv.curvature.moments import Key, RunningSum
from refcurv.files import store
from refcurv.files.disk import free_bytes, mode_of, parse_json
from refcurv.law.checks import ConventionError, NonFiniteError, SchemaError

_VARIANCE = ("variance", "variance_trace")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's file, and the facts of this run (FINGERPRINT).

    A run goes on from the file only if it has the same facts as the run that wrote it. They are
    JSON values: what is collected, and the machine and libraries that decide the bits.
    """

    path: Path
    facts: Mapping[str, Any]

    def save(self, sums: Mapping[Key, RunningSum], blocks: int) -> None:
        """Write every total. The file before it stays whole until the new one is."""
        store.write(
            self.path,
            format="refcurv-factors",
            attributes={"unfinished": json.dumps(self.facts, sort_keys=True), "blocks": blocks},
            arrays=(
                store.Entry(
                    _entry(key),
                    one.state(),
                    {"rows": one.rows, **dict(zip(_VARIANCE, one.variance, strict=True))},
                )
                for key, one in sums.items()
            ),
            provenance=store.provenance(),
        )

    def save_last(self, sums: Mapping[Key, RunningSum], blocks: int) -> None:
        """`save` the final sums if the disk has room for them twice: here and as factors."""
        if 2 * sum(one.state().nbytes for one in sums.values()) < free_bytes(self.path):
            self.save(sums, blocks)

    def load(self, sums: Mapping[Key, RunningSum], blocks: int) -> int:
        """Fill the sums; returns how many of the `blocks` are done, 0 without a file.

        Every array's dtype and shape are checked before a kernel sees it.

        Raises:
            ConventionError: the file belongs to another run; the message says what differs.
            SchemaError, ChecksumError, NonFiniteError: it is damaged, or no such run wrote it.
        """
        if not mode_of("collect", self.path):
            return 0
        with _advised():
            header = store.open_file(self.path, format="refcurv-factors")
        where = f"collect: the checkpoint {str(self.path)!r}"
        if "unfinished" not in header.attributes:
            raise SchemaError(f"{where} is a finished factors file. Move it away, or load it.")
        theirs = store.fact(where, header.attributes, "unfinished", str)
        self._require_same(where, parse_json("collect", f"{where}: 'unfinished'", theirs))
        done = store.fact(where, header.attributes, "blocks", int)
        if not 1 <= done <= blocks or set(header.entries) != set(map(_entry, sums)):
            raise SchemaError(f"{where} is not what this run writes. Delete it to start anew.")
        for key, one in sums.items():
            store.require_entry(header, _entry(key), "float64", one.shape)
            at, what = header.entries[_entry(key)].attributes, f"{where}: {_entry(key)}"
            variance = np.array(  # infinite or NaN where squares leave the range (moments.SQUARED)
                [store.fact(what, at, part, float, finite=False) for part in _VARIANCE]
            )
            rows = store.fact(what, at, "rows", int)
            if rows < 0:
                raise SchemaError(f"{what} counts {rows} rows.")
            with _advised():
                array = store.read(header, _entry(key), finite=True)
            one.restore(array, rows, variance)
        return done

    def _require_same(self, where: str, theirs: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(self.facts))
        differ = list(_differences(ours, theirs))
        if differ:
            raise ConventionError(
                f"{where} belongs to another run: {'; '.join(differ[:4])}"
                f"{f'; and {len(differ) - 4} more' if len(differ) > 4 else ''}. Finish that one as "
                "it was begun, or delete the file to start anew."
            )


@contextmanager
def _advised() -> Iterator[None]:
    """What is wrong with the file, and what to do about a checkpoint."""
    try:
        yield
    except (SchemaError, NonFiniteError) as error:
        hint = "If it is what an earlier collection left, delete it to start anew."
        raise type(error)(f"{error} {hint}") from None


def _entry(key: Key) -> str:
    """The name of a sum in the file."""
    return f"{key.side}.{key.name}"


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
