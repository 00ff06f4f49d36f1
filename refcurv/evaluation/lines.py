"""What long work has found so far, a JSON value a line, and how a killed run goes on from it.

The first line says what the work is of. Each other line is one finished piece of it, with a
checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from refcurv.curvature.fingerprint import require_told, told
from refcurv.files.disk import identity, parse_json, read_bytes, write_json_lines
from refcurv.files.paths import machine_faults, mode_of
from refcurv.law.checks import ConventionError, SchemaError

FORMAT: Final = "refcurv-sweep"

CHECK: Final = "check"
"""The key of a line's checksum."""


class Lines:
    """What a run has found so far; with a file, on the disk after every piece of work.

    Args:
        path: the file, or None. What it holds is gone on from; it is made with the first result.
        facts: what the work is of, JSON values (FINGERPRINT).
        who: what writes them, for messages.
        fresh: is a file of something else, or a damaged one, not refused but begun anew?

    Raises:
        ConventionError: the file is of another run; says what differs. SchemaError: it is
        another kind of file, or a line was changed since it was written. A last line that was torn
        off is measured anew. With `fresh` neither.

    Proof: tests/test_sweep.py::test_a_killed_sweep_goes_on,
        ::test_a_results_file_of_something_else_is_refused, ::test_a_line_that_was_changed,
        ::test_two_sweeps_write_one_file,
        ::test_lines_say_whose_they_are
    """

    def __init__(
        self, path: Path | None, facts: Mapping[str, Any], fresh: bool = False, who: str = "sweep"
    ) -> None:
        self._path, self._who = path, who
        self._rows: list[dict[str, Any]] = [{"format": FORMAT, "version": 2, **facts}]
        self._written: tuple[int, ...] | None = None
        try:
            self._join()
        except (ConventionError, SchemaError):
            if not fresh:
                raise
            self._written = self._found()  # what is there is written over

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._rows)

    @property
    def where(self) -> str:
        """Whose they are, and in which file; for messages."""
        return f"{self._who}: {str(self._path)!r}"

    def once(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The line of a piece of work, which is done now if it has none."""
        wanted = {"what": kind, **key}.items()
        known = next((row for row in self._rows if wanted <= row.items()), None)
        if known is None:
            # what is read again from the file must be the same: tuples are lists in it
            known = json.loads(json.dumps({"what": kind, **key, **make()}, allow_nan=False))
            line = {**known, CHECK: _checksum(known)}
            self._join()
            if line not in self._rows:
                self._rows.append(line)
            if self._path is not None:
                write_json_lines(self._rows, self._path)
                self._written = self._found()
        return known

    def _found(self) -> tuple[int, ...] | None:
        """What tells the file that is there from the one that was written; None without one."""
        if self._path is None or not mode_of(self._who, self._path):
            return None
        with machine_faults(self._who, self._path):
            return identity(self._path)

    def _join(self) -> None:
        """Take in what another run with the same facts wrote, now or before."""
        if self._path is None or (found := self._found()) is None or found == self._written:
            return
        if rows := _read(self._path, self._who):
            require_told(self.where, self._rows[0], rows[0])
            self._rows += [row for row in rows[1:] if row not in self._rows]


def _read(path: Path, who: str) -> list[dict[str, Any]]:
    """Every whole line, checked."""
    where = f"{who}: {str(path)!r}"
    data = read_bytes(who, path)
    if not data:
        return []
    *whole, torn = data.split(b"\n")
    rows = []
    for n, line in enumerate(whole, 1):
        try:
            rows.append(parse_json(f"{who}: line {n}", line))
        except SchemaError as error:
            raise _damaged(where, n, str(error).removeprefix(f"{who}: ").rstrip(".")) from None
        if n > 1 and rows[-1].get(CHECK) != _checksum(rows[-1]):
            raise _damaged(where, n, f"line {n} was changed since it was written")
    if not rows or rows[0].get("format") != FORMAT:
        raise _damaged(where, 1, "its first line does not say so")
    if torn:
        warnings.warn(f"{where}: the last line was torn off; it is measured anew", stacklevel=2)
    return rows


def _checksum(row: Mapping[str, Any]) -> str:
    """Of what a line holds, without its checksum."""
    held = {key: value for key, value in row.items() if key != CHECK}
    return hashlib.sha256(told(held).encode()).hexdigest()[:16]


def _damaged(where: str, line: int, why: str) -> SchemaError:
    if line > 1:
        return SchemaError(f"{where}: {why}. Delete that line, and it is measured anew.")
    return SchemaError(
        f"{where} is not what an earlier run left: {why}. Give another name with -o."
    )
