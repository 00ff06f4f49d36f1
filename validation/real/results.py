"""What the parts found, a JSON line each: what is there, and of the same inputs, is not done again.

A line: part, key, inputs (the recipe), claims (the SHA-256 of claims.toml), date, seconds (of the
processors), peak [MiB], code (the commit, and a digest of refcurv's files), found.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVarTuple

import refcurv
from refcurv.files.disk import write_json_lines
from validation.bench.measuring import measured, tell, today
from validation.real.plan import HERE, Record, claims_sha256

FOLDER = HERE / "results"
Needs = TypeVarTuple("Needs")


@dataclass(frozen=True, slots=True)
class Results:
    """One model's lines, on the disk after each."""

    path: Path
    rows: list[Record] = field(default_factory=list)

    def once(
        self, part: str, key: str, inputs: Record,
        prepare: Callable[[], tuple[*Needs]], make: Callable[[*Needs], Record],
    ) -> Record:  # fmt: skip
        """What a piece of work found; without a line of the same inputs it is done now.

        What `prepare` does, such as making files, does not count in the line's costs.
        """
        known = self.find(part, key)
        if known is not None and known["inputs"] == plain(inputs):
            return dict(known["found"])
        needs = prepare()
        tell(f"{part}: {key}")
        cost: Record = {}
        with measured(cost, "it"):
            made = make(*needs)
        return dict(self.keep(part, key, inputs, cost["it"], made)["found"])

    def find(self, part: str, key: str) -> Record | None:
        """The line of a piece of work, if its claims are today's."""
        same = (row for row in self.rows if (row["part"], row["key"]) == (part, key))
        row = next(same, None)
        return row if row and row["claims"] == claims_sha256() else None

    def found(self, part: str) -> dict[str, Record]:
        """{key: what was found} of a part."""
        rows = [row for row in self.rows if row["part"] == part]
        return {row["key"]: row["found"] for row in rows if row["claims"] == claims_sha256()}

    def keep(self, part: str, key: str, inputs: Record, cost: Record, found: Record) -> Record:
        """Write a line, in the place of an older one."""
        row = plain({
            "part": part, "key": key, "inputs": inputs, "claims": claims_sha256(), "date": today(),
            "seconds": round(cost["user"] + cost["system"], 1), "peak": round(cost["peak"]),
            "code": code(), "found": found,
        })  # fmt: skip
        self.rows[:] = [one for one in self.rows if (one["part"], one["key"]) != (part, key)]
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(self.rows, self.path)
        return row


def plain(record: Record) -> Record:
    """As it is read again: tuples are lists in JSON."""
    return dict(json.loads(json.dumps(record, allow_nan=False)))


def load(model: str, folder: Path = FOLDER) -> Results:
    """What is known of a model."""
    path = folder / f"{model}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return Results(path, [json.loads(line) for line in lines])


@cache
def code() -> str:
    """The commit of this checkout, and a digest of refcurv's source, whatever is committed."""
    house = Path(refcurv.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(house.rglob("*.py")):
        digest.update(path.relative_to(house).as_posix().encode() + path.read_bytes())
    asked = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return f"{done.stdout.strip() or 'no commit'} {digest.hexdigest()[:12]}"
