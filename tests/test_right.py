"""evaluation/right.py: an edit is judged on what the model was able to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_suite import by_hand, counting_model

import refcurv as rc
from refcurv.cli import main
from refcurv.evaluation.right import only_right
from refcurv.evaluation.suite import measure
from refcurv.model.corpus import ImagePopulation

RIGHT = {"quotes": [0, 1], "sums": [0, 1, 2]}  # by hand: see `by_hand`


def test_what_is_wrong_is_left_out() -> None:
    corpus = by_hand()
    kept, counts = only_right(corpus, measure(counting_model(), corpus))
    assert counts == {"quotes": [2, 5], "sums": [3, 4]}
    for name, rows in RIGHT.items():
        old, new = corpus.populations[name], kept.populations[name]
        for key in ("tokens", "prompt_length", "length"):
            np.testing.assert_array_equal(getattr(new, key), getattr(old, key)[rows])
        assert (new.kind, new.split, new.chance) == (old.kind, old.split, old.chance)
    for name in ("tuning", "prose"):  # of the other split, and of text
        assert kept.populations[name] is corpus.populations[name]
    assert measure(counting_model(), kept).populations["sums"].values["accuracy"] == 1


def test_images_and_populations_of_which_nothing_is_right() -> None:
    images = np.arange(12, dtype="float32").reshape(3, 1, 2, 2)
    two = {name: ImagePopulation(images, [0, 1, 2], "test") for name in ("seen", "none")}
    corpus = rc.Corpus(images=images, labels=[0, 1, 2], populations=two)
    found = measure(counting_model(), by_hand())
    one = found.populations["quotes"]
    measured = {"seen": replace(one, right=np.array([True, False, True])),
                "none": replace(one, right=np.zeros(3, bool))}  # fmt: skip
    kept, counts = only_right(corpus, replace(found, populations=measured))
    assert counts == {"seen": [2, 3], "none": [0, 3]}
    assert list(kept.populations) == ["seen"]
    assert kept.populations["seen"].labels.tolist() == [0, 2]


def test_nothing_right_is_told_after_the_table(tmp_path: Path, monkeypatch, capsys: Any) -> None:
    """A corpus of populations alone, of which nothing would be left; the items are not lost."""
    monkeypatch.chdir(tmp_path)
    rc.save(counting_model(), "w.h5")
    sums = by_hand().populations["sums"]
    wrong = replace(sums, tokens=(sums.tokens + np.arange(sums.tokens.shape[1]) ** 2) % 5)
    empty = rc.Corpus(np.zeros((0, 2), np.int32), populations={"sums": wrong})
    rc.save_corpus(empty, "c.h5")
    assert main(["evaluate", "w.h5", "c.h5", "--right", "r.h5", "--items", "i.jsonl"]) == 2
    told = capsys.readouterr()
    assert "0.0 %" in told.out and "no item is right" in told.err
    assert Path("i.jsonl").exists() and not Path("r.h5").exists()


def test_texts_are_neither_right_nor_wrong(tmp_path: Path, monkeypatch, capsys: Any) -> None:
    """It was evaluated, and the corpus was written as it was."""
    monkeypatch.chdir(tmp_path)
    rc.save(counting_model(), "w.h5")
    corpus = by_hand()
    prose = {name: one for name, one in corpus.populations.items() if one.kind == "text"}
    rc.save_corpus(replace(corpus, populations=prose), "c.h5")
    assert main(["evaluate", "w.h5", "c.h5", "--right", "r.h5"]) == 2
    told = capsys.readouterr()
    assert "split 'test' has texts alone" in told.err and told.err.count("\n") == 1
    assert not told.out and not Path("r.h5").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a baseline it is the baseline that decides, and the table is what it is without."""
    monkeypatch.chdir(tmp_path)
    rc.save(counting_model(), "w.h5")
    rc.save(counting_model(2), "e.h5")
    rc.save_corpus(by_hand(), "c.h5")
    words = ["evaluate", "e.h5", "c.h5", "--baseline", "w.h5"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert main([*words, "--right", "r.h5"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(table)
    assert "sums: 3 of 4 items right, which r.h5 keeps" in said
    made = rc.load_corpus("r.h5")
    assert len(made.populations["quotes"].tokens) == 2
    source = made.source["provenance"]
    assert source["right"] == {"quotes": [2, 5], "sums": [3, 4]}
    assert set(source["inputs"]) == {"w.h5", "c.h5"}
    assert main(["evaluate", "w.h5", "r.h5"]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", "w.h5", "r.h5", "--right", "s.h5"]) == 0
    said = capsys.readouterr().out
    assert "quotes: 2 of 2 items right" in said and said.endswith(table)
    assert main(["evaluate", "w.h5", "r.h5", "--right", "r.h5"]) == 2
