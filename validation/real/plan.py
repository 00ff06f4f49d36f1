"""What is run on a model: its sizes, the grid of edits, and the recipe of all that is made."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from validation.real import fetch, sets, texts

HERE = Path(__file__).resolve().parent
CLAIMS = HERE / "claims.toml"
Record = dict[str, Any]

CALIBRATIONS = (1, 2, 3, 4, 5)
SMALL = "small"


@dataclass(frozen=True, slots=True)
class Plan:
    """One model's plan.

    Fields:
        model: of fetch.MODELS, or SMALL: the model that ships with refcurv.
        blocks: how many the model has. run: how many neighbours an edit takes. first: where the
            run begins that is tried first.
        tokens: of each calibration. clean: of clean_dev and of clean_test.
        chapters: of the Bible, evenly chosen, that are searched.
        prefix, suffix, stride, least: of `refcurv recite`; `least` right tokens in a row count.
            Chosen before an edit was read: at a stride of 16 it found 25 passages, too few.
        own: prompts of the own-continuation control.
    """

    model: str
    blocks: int
    run: int = 3
    first: int = 0
    tokens: int = 33_500
    clean: tuple[int, int] = (4_000, 24_000)
    chapters: int = 50
    prefix: int = 32
    suffix: int = 16
    stride: int = 4
    least: int = 8
    own: int = 60

    @property
    def runs(self) -> tuple[int, ...]:
        """Where the runs of the last two thirds begin; `first` is first, then the latest."""
        begins = range(self.blocks // 3, self.blocks - self.run + 1)
        return tuple(sorted(begins, key=lambda at: (at != self.first, -at)))

    def layers(self, begin: int) -> str:
        """The pattern of gate and up in a run."""
        end = begin + self.run - 1
        blocks = f"{begin}" if end == begin else f"{{{begin}-{end}}}"
        return f"blocks.{blocks}.mlp.{{gate,up}}"

    def together(self, begins: Iterable[int]) -> str:
        """The pattern of gate and up in several runs."""
        blocks = sorted({begin + n for begin in begins for n in range(self.run)})
        return f"blocks.{{{','.join(map(str, blocks))}}}.mlp.{{gate,up}}"

    @property
    def grid(self) -> str:
        """The pattern of every layer that some edit takes."""
        return f"blocks.{{{self.blocks // 3}-{self.blocks - 1}}}.mlp.{{gate,up}}"

    def third(self, begin: int) -> str | None:
        """In which third a run lies, "middle" or "late"; None if in both."""
        late = 2 * self.blocks // 3
        if begin >= late:
            return "late"
        return "middle" if begin + self.run <= late else None

    def recipe(self, *of: str) -> Record:
        """What decides a file or a result: the model, and what `of` names beside it.

        Names: fields of the plan; "texts", "sets": what they are, by hash.
        """
        known = asdict(self) | {"texts": _texts(), "sets": _sets()}
        return {"model": _weights(self.model)} | {name: known[name] for name in of}


PLANS = {
    "smollm2": Plan("smollm2", blocks=30, first=21),
    "gemma3": Plan("gemma3", blocks=18, first=12),
    SMALL: Plan(SMALL, blocks=4, run=1, first=3, tokens=4_000, clean=(1_000, 1_500), chapters=40,
                prefix=17, stride=16, own=10),
}  # fmt: skip

RECITED = ("texts", "chapters", "prefix", "suffix", "stride", "least")
DEV = (*RECITED, "clean")
JUDGED = (*DEV, "sets", "own")
"""What decides the passages, what dev holds, and what test holds."""


def short(record: Record) -> str:
    """Eight letters that tell one recipe from another."""
    return _sha256(record)[:8]


def claims() -> Record:
    """The claims, and how the edit is chosen."""
    return tomllib.loads(CLAIMS.read_text(encoding="utf-8"))


def claims_sha256() -> str:
    """Stands in every result."""
    return hashlib.sha256(CLAIMS.read_bytes()).hexdigest()


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _weights(model: str) -> str:
    if model != SMALL:
        return fetch.MODELS[model].sha256
    from refcurv.demo import MODEL

    return hashlib.sha256(MODEL.read_bytes()).hexdigest()


def _texts() -> str:
    return _sha256(texts.SHA256)


@cache
def _sets() -> str:
    return _sha256({name: sets.made(name) for name in sets.SETS})
