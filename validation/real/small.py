"""The files of `--small`: the model that ships with refcurv, and its own populations as texts.

It keeps the generator alive; its results are no results. Some sets are halves of one population.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import refcurv as rc
from refcurv.demo import CORPUS, MODEL
from validation.real.plan import CALIBRATIONS

SETS = {
    "facts_frequent": ("facts", 0, 3), "facts_middle": ("facts", 1, 3),
    "facts_rare": ("facts", 2, 3), "open_book_one": ("open_book", 0, 8),
    "open_book_two": ("open_book", 1, 8), "addition": ("addition", 0, 8),
    "addition_words": ("addition", 1, 8), "logic": ("boolean", 0, 8),
    "copying": ("copying", 0, 8), "ordering": ("copying", 1, 8),
}  # fmt: skip
"""Each set: a population of the demo, and which of how many parts of its items."""


def weights(path: Path) -> None:
    """The demo's model."""
    shutil.copy(MODEL, path)


def texts(folder: Path) -> None:
    """What validation.real.texts would write, of ids."""
    corpus, share = rc.load_corpus(CORPUS), len(CALIBRATIONS)
    quotes = [*_rows(corpus, "quotes_dev"), *_rows(corpus, "quotes_test")]
    files = {"licences": quotes[:40], "bible": quotes[40:120], "state": quotes[120:]}
    files |= {f"clean_{split}": _rows(corpus, f"language_{split}") for split in ("dev", "test")}
    for k in CALIBRATIONS:
        files[f"calibration_{k}"] = [one.tolist() for one in corpus.tokens[k - 1 :: share]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in files.items():
        _write(folder / f"{name}.jsonl", ({"input_ids": one} for one in documents))


def tasks(folder: Path) -> None:
    """What validation.real.sets would write, of ids."""
    corpus, words = rc.load_corpus(CORPUS), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (of, at, parts) in SETS.items():
        lines, path = [], folder / f"{name}.jsonl"
        for split in ("dev", "test"):
            population = corpus.populations[f"{of}_{split}"]
            asked = population.prompt_length[at::parts]
            for ids, prompt in zip(_rows(corpus, f"{of}_{split}")[at::parts], asked, strict=True):
                pair = {"prefix_ids": ids[:prompt], "suffix_ids": ids[prompt:]}
                lines.append(pair | {"split": split})
            words.append(f"--population {name}_{split}:answer:{split}:{population.chance:g}={path}")
        _write(path, lines)
    (folder / "populations").write_text("\n".join(words) + "\n")


def _rows(corpus: rc.Corpus, name: str) -> list[list[int]]:
    one = corpus.populations[name]
    assert isinstance(one, rc.Population)
    return [row[:n].tolist() for row, n in zip(np.asarray(one.tokens), one.length, strict=True)]


def _write(path: Path, lines: Iterable[dict[str, Sequence[int]]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
