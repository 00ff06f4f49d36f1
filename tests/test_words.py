"""Messages count in words: one layer, two layers."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.law.words import number_of

ROOT = Path(__file__).parents[1] / "refcurv"


def test_one_is_no_plural() -> None:
    assert [number_of(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert (
        number_of(1, "entry", "entries") == "1 entry" and number_of(12345, "row") == "12,345 rows"
    )
    assert number_of(1.0, "row") == "1 row" and number_of(0.5, "row") == "0.5 rows"


NOUNS = (
    "arrays batches blocks cases classes documents draws eigenvalues entries files identities "
    "images items keys labels layers matrices pairs parameters positions prefixes problems rows "
    "segments sequences shards steps tensors terms texts tokens"
).split()

NO_COUNTS = {"fisher", "known", "on", "_shown(length)"}
"""Words that stand before a noun."""

SEVERAL = {"positions", "len(PROOFS)"}
"""Counts that are never one: more positions than a model has learned, the identities proved."""


def plurals_by_hand(source: str) -> list[str]:
    """Texts that put a number which is not known before a noun in the plural."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for value, text in pairwise(node.values):
                count = ast.unparse(value.value) if isinstance(value, ast.FormattedValue) else "A"
                word = re.match(r" (?:more )?(\w+)", str(getattr(text, "value", "")))
                if word and word[1] in NOUNS and not count.isupper():
                    out += [ast.unparse(node)] if count not in NO_COUNTS | SEVERAL else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.findall(r"\{[^{}]*(?::[,g.\d]*)?\} (\w+)", node.value)
            out += [node.value for word in found if word in NOUNS]
    return out


def test_no_message_writes_a_plural_by_hand() -> None:
    found = {path: plurals_by_hand(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}
    assert {path: texts for path, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    "text", ['f"{len(x)} layers"', 'f"in {n:,} rows of"', '"{rows:,} rows"', 'f"{n} more entries"']
)
def test_a_plural_by_hand_is_seen(text: str) -> None:
    assert plurals_by_hand(text)


@pytest.mark.parametrize("text", ['f"{MOST} layers"', 'f"{name} lacks it"', '"{where}: rows"'])
def test_what_is_no_count_is_left_alone(text: str) -> None:
    assert not plurals_by_hand(text)


@pytest.mark.slow
def test_no_command_prints_one_layers(tmp_path, capsys) -> None:
    """One layer, one sequence of one label, one block, one of everything."""
    made = config(layers=1)
    model = rc.Model(made, random_parameters(made, 3))
    w, c, f = (str(tmp_path / name) for name in ("w.h5", "c.h5", "f.h5"))
    rc.save(model, w)
    rc.save_corpus(rc.Corpus(np.array([[1, 2]])), c)
    layer = "blocks.0.mlp.up"
    for command in (
        ["collect", w, c, "-o", f, "--layers", layer],
        ["decompose", f, "-o", str(tmp_path / "b.h5")],
        ["edit", w, str(tmp_path / "b.h5"), "-o", str(tmp_path / "e.h5"), "--rho", "0.5"],
        ["inspect", f],
        ["trace", w, c, "-o", str(tmp_path / "t.h5")],
        ["validate", f, "--reference", f],
        ["validate", str(tmp_path / "e.h5"), "--reference", f],
    ):
        main(command)
    text = "".join(capsys.readouterr())
    assert "1 layer" in text and "1 row" in text and "1 label" in text
    assert not re.findall(rf"(?<![\d.,])1 (?:{'|'.join(NOUNS)})\b", text), text
