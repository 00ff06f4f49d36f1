"""What a killed collection goes on from: its sums so far, in a file (FINGERPRINT)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from refcurv.curvature.accumulate import Place
from refcurv.curvature.fingerprint import advised, require_same, told
from refcurv.curvature.moments import Key, RunningSum, Side
from refcurv.files import store
from refcurv.files.paths import free_bytes, mode_of
from refcurv.law.checks import Array, SchemaError, StorageError
from refcurv.law.conventions import BLOCK_SHARDS
from refcurv.law.words import number_of
from refcurv.passes.parallel import Stopped, Turnstile

LEAST_SECONDS: Final = 120.0
"""Of work between two checkpoints.  Chosen: what nobody minds to lose."""

MOST_SHARE: Final = 20
"""Work between two checkpoints, in times what the last one took: they take 5 % at most."""

_VARIANCE = ("variance", "variance_trace")


class Pace:
    """When the next checkpoint is due: max(LEAST_SECONDS, MOST_SHARE x what the last one took)."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = time.monotonic() + LEAST_SECONDS

    def due(self) -> bool:
        """Is it?"""
        return time.monotonic() >= self._next

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, one is written, or cannot be."""
        begin = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._next = end + max(LEAST_SECONDS, MOST_SHARE * (end - begin))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's file, and the facts of this run (FINGERPRINT).

    A run goes on from the file only if it has the same facts as the run that wrote it. They are
    JSON values: what is collected, and the machine and libraries that decide the bits.

    The file holds for each sum the total of the closed blocks (`G.head`), and what the open block
    has so far (`block.G.head`) with the number of shards in that. All of it is written anew each
    time, because every shard joins every sum.
    """

    path: Path
    facts: Mapping[str, Any]
    pace: Pace = field(default_factory=Pace)

    def due(self) -> bool:
        """Is it time for the next one?"""
        return self.pace.due()

    def keep(self, sums: Mapping[Key, RunningSum], blocks: int, gate: Turnstile) -> None:
        """`save`, unless the disk is full or a sum torn: then the file before it stays.

        A run does not end for want of a checkpoint; a warning says what it lacks. Before the first
        shard is whole there is nothing to keep.

        Proof: tests/test_checkpoint.py::test_a_full_disk_ends_no_run
        """
        whole = min(gate.passed(key) for key in sums if key.side is not Side.noise)
        if not blocks and not whole:
            return
        try:
            with self.pace.writing():
                self.save(sums, blocks, gate)
        except Stopped:
            pass
        except StorageError as error:
            text = f"collect: no checkpoint; the one before it, if any, is whole. {error}"
            warnings.warn(text, stacklevel=2)

    def save(self, sums: Mapping[Key, RunningSum], blocks: int, gate: Turnstile) -> None:
        """Write every sum. The file before it stays whole until the new one is.

        While a sum is written no shard joins it; all others go on.
        """
        with closing(_entries(sums, gate)) as arrays:
            store.write(
                self.path,
                format="refcurv-factors",
                attributes={"unfinished": told(self.facts), "blocks": blocks},
                arrays=arrays,
                provenance=store.provenance(),
            )

    def keep_last(self, sums: Mapping[Key, RunningSum], blocks: int) -> None:
        """`keep` the final sums if the disk has room for them, and for factors, twice as large."""
        if 3 * sum(one.state().nbytes for one in sums.values()) < free_bytes(self.path):
            self.keep(sums, blocks, Turnstile())

    def load(self, sums: Mapping[Key, RunningSum], blocks: int) -> Place:
        """Fill the sums; returns how far the run was that wrote the file, zeros without one.

        Every array's dtype and shape are checked before a kernel sees it.

        Raises:
            ConventionError: the file belongs to another run; the message says what differs.
            SchemaError, ChecksumError, NonFiniteError: it is damaged, or no such run wrote it.
        """
        if not mode_of("collect", self.path):
            return Place(0, 0, {})
        with advised():
            header = store.open_file(self.path, format="refcurv-factors")
        where = f"collect: the checkpoint {str(self.path)!r}"
        if "unfinished" not in header.attributes:
            raise SchemaError(f"{where} is a finished factors file. Move it away, or load it.")
        require_same(where, self.facts, header)
        done = store.fact(where, header.attributes, "blocks", int)
        passed = {key: _shards(where, header, key) for key in sums}
        shards = min(passed[key] for key in sums if key.side is not Side.noise)
        names = {_entry(key) for key in sums if done and key.side is not Side.noise}
        names |= {_open(key) for key in sums if passed[key]}
        rest = set(header.entries) - names - {_entry(key) for key in sums if done}
        if not 0 <= done <= blocks or rest or not header.entries or names - set(header.entries):
            raise SchemaError(f"{where} is not what this run writes. Delete it to start anew.")
        if done == blocks and any(passed.values()):
            raise SchemaError(f"{where} has more shards than this run. Delete it to start anew.")
        for key, one in sums.items():
            _restore(where, header, key, one)
        return Place(done, shards, passed)


def _entries(sums: Mapping[Key, RunningSum], gate: Turnstile) -> Generator[store.Entry, None, None]:
    """What is known of each sum. Nobody adds to it while its entries are in use."""
    for key, one in sums.items():
        with gate.closed(key) as shards:
            total, block = one.parts()
            about = {
                "rows": one.rows,
                **dict(zip(_VARIANCE, map(float, one.variance), strict=True)),
            }
            if total is not None:
                yield store.Entry(_entry(key), total, about)
            if block is not None and shards:
                yield store.Entry(_open(key), block, {**about, "shards": shards})


def _restore(where: str, header: store.Header, key: Key, one: RunningSum) -> None:
    """One sum from the file."""
    parts: list[Array | None] = []
    rows, variance = 0, np.zeros(2)
    for name in (_entry(key), _open(key)):
        if name not in header.entries:
            parts.append(None)
            continue
        store.require_entry(header, name, "float64", (one.size,))
        at, what = header.entries[name].attributes, f"{where}: {name}"
        variance = np.array(  # infinite or NaN where squares leave the range (moments.SQUARED)
            [store.fact(what, at, part, float, finite=False) for part in _VARIANCE]
        )
        rows = store.fact(what, at, "rows", int)
        if rows < 0:
            raise SchemaError(f"{what} counts {number_of(rows, 'row')}.")
        with advised():
            parts.append(store.read(header, name, finite=True))
    one.restore(parts[0], parts[1], rows, variance)


def _shards(where: str, header: store.Header, key: Key) -> int:
    """How many shards of the open block a sum has."""
    if _open(key) not in header.entries:
        return 0
    at, what = header.entries[_open(key)].attributes, f"{where}: {_open(key)}"
    shards = store.fact(what, at, "shards", int)
    if not 1 <= shards <= BLOCK_SHARDS:
        raise SchemaError(f"{what} counts {number_of(shards, 'shard')} of a block.")
    return shards


def _entry(key: Key) -> str:
    """The name of a total in the file."""
    return f"{key.side}.{key.name}"


def _open(key: Key) -> str:
    """The name of an open block's sum in the file."""
    return f"block.{_entry(key)}"
