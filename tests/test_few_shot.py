"""Tasks: a preamble and shots before every prompt; a limit of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from test_texts import at, counts, write

import refcurv as rc
from refcurv.cli import main
from refcurv.files.texts import build_corpus
from refcurv.law.checks import RefcurvError, SchemaError

assert at  # the fixture: a working folder with tokenizers

SHOTS = [{"prompt": "the cat", "answer": " sat"}, {"prompt": "the dog", "answer": " log"}]
ITEMS = [{"prompt": "the mat", "answer": " on", "split": "dev", "kind": "x"},
         {"prompt": "the log", "answer": " att"}]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "front"),
    [
        ({"preamble": "on the mat\n", "shots": SHOTS}, "on the mat\nthe cat sat\nthe dog log\n"),
        ({"shots": SHOTS, "between": " ; "}, "the cat sat ; the dog log ; "),
        ({"preamble": "the "}, "the "),
        ({"shots": []}, ""),
        (None, ""),
    ],
)
def test_the_ids_are_those_of_the_whole_text(
    at: Path, first: dict[str, Any] | None, front: str
) -> None:
    """<s>, then one text; the prompt ends where the answer begins."""
    write("t.jsonl", [*([] if first is None else [first]), *ITEMS])
    made = build_corpus([], "bpe.json", populations=["t:answer:test=t.jsonl"])
    got, library = made.populations["t"], tokenizers.Tokenizer.from_file("bpe.json")
    text = front + ITEMS[1]["prompt"]
    assert got.tokens.tolist() == [library.encode(text + ITEMS[1]["answer"]).ids]
    assert got.prompt_length.tolist() == [len(library.encode(text).ids)]
    assert counts(made)["populations"]["t"]["other_split"] == 1
    assert counts(made)["ignored_keys"] == ["kind"]


def test_an_item_that_is_a_shot_is_refused(at: Path) -> None:
    """Its answer would stand in its own prompt. A prompt that a shot's begins with is another."""
    shots = {"shots": SHOTS}
    write("t.jsonl", [shots, {"prompt": "the c", "answer": "at"}, ITEMS[1]])
    build_corpus([], "bpe.json", populations=["t:answer:test=t.jsonl"])
    write("t.jsonl", [shots, ITEMS[1], {"prompt": "the dog", "answer": " sat"}])
    with pytest.raises(SchemaError, match="line 3: the prompt is that of a shot, whose answer"):
        build_corpus([], "bpe.json", populations=["t:answer:test=t.jsonl"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"shots": SHOTS, "shot": 1}, *ITEMS], "line 1 has the key 'shot'"),
        ([{"shots": "a"}, *ITEMS], "'shots' must be a list; got str"),
        ([{"shots": [{"prompt": "a"}]}, *ITEMS], "shot 0 must be an object with prompt and answer"),
        ([{"shots": [{**SHOTS[0], "why": ""}]}, *ITEMS], "shot 0 has the key 'why'"),
        ([{"preamble": [1, 2]}, *ITEMS], "'preamble' must be text; got list"),
        ([{"preamble": "", "between": 1}, *ITEMS], "'between' must be text; got int"),
        ([{"preamble": "\ud800"}, *ITEMS], "line 1: 'preamble': 'utf-8' codec can't encode"),
        ([{"shots": [{"prompt": "a", "answer": "\udfff"}]}, *ITEMS], "shot 0: 'answer': 'utf-8'"),
        ([{"preamble": "a"}], "holds no token"),
        (
            [{"preamble": "a"}, {"prefix_ids": [1], "suffix_ids": [2]}],
            "must have prompt and answer",
        ),
        ([{"preamble": "a"}, {"text": "b"}], "must have prompt and answer"),
        ([*ITEMS, {"preamble": "a"}], "line 3 must have either"),
        ([{"prompt": "a"}], "must have either"),
        ([{"preamble": "a", **ITEMS[0]}], "line 1: 'preamble' is read in the file's first line"),
        ([*ITEMS, {"shots": [], **ITEMS[0]}], "line 3: 'shots' is read in the file's first line"),
        ([{"prefix": "a", "answer": "b"}], "must have either"),
    ],
)
def test_a_first_line_that_is_not_understood(at: Path, lines: list[Any], said: str) -> None:
    write("t.jsonl", lines)
    with pytest.raises(RefcurvError, match=said):
        build_corpus([], "bpe.json", populations=["t:answer:test=t.jsonl"])


def test_other_files_keep_such_keys(at: Path) -> None:
    """Beside text or a prefix they are keys like any other, which are ignored."""
    write("d.jsonl", [{"text": "the mat", "prompt": "a", "answer": "b", "preamble": "c"}])
    write("p.jsonl", [{"prefix": "the", "suffix": " mat", "answer": "b", "shots": 3}])
    made = build_corpus(["d.jsonl"], "bpe.json", populations=["p:answer:test=p.jsonl"])
    library = tokenizers.Tokenizer.from_file("bpe.json")
    assert made.tokens.tolist() == made.populations["p"].tokens.tolist()
    assert made.tokens.tolist() == [library.encode("the mat").ids]
    assert counts(made)["ignored_keys"] == ["answer", "preamble", "prompt", "shots"]


def test_a_limit_calls_no_option_unused_for_what_it_left_out(at: Path) -> None:
    """The separator stands in the second file, of which nothing is needed."""
    write("a.txt", "a b c")
    write("b.txt", "a 5 b")
    np.arange(3, dtype=np.uint16).tofile("c.bin")
    how = dict(separator="5", token_dtype="uint16")
    some = build_corpus(["a.txt", "b.txt", "c.bin"], "t.json", **how, limit=3)
    assert some.tokens.tolist() == [[3, 4, 5]]
    with pytest.raises(RefcurvError, match="the separator '5' is in no text file"):
        build_corpus(["a.txt"], "t.json", separator="5", limit=9)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("limit", [2, 3, 5, 8, 9])
def test_a_limit_takes_the_first_tokens(at: Path, pack: bool, limit: int) -> None:
    write("a.txt", "a b c 5 d 5 b")
    write("b.txt", "d d")
    paths = ["a.txt", "b.txt"]
    how = dict(separator="5", length=4, pack=pack)
    whole, some = build_corpus(paths, "t.json", **how), build_corpus(
        paths, "t.json", **how, limit=limit
    )  # fmt: skip
    assert some.tokens[some.real].tolist() == whole.tokens[whole.real].tolist()[:limit]
    assert counts(some)["tokens"] == min(limit, 7)
    assert some.source["made_from"]["options"]["limit"] == limit


def test_the_command_says_where_the_rows_end(at: Path, capsys: Any) -> None:
    write("a.txt", "a b c d")
    words = ["corpus", "a.txt", "--tokenizer", "t.json", "-o", "c.h5", "--limit"]
    assert main([*words, "3"]) == 0
    assert "rows end at 3 tokens, the limit" in capsys.readouterr().out
    assert rc.load_corpus("c.h5").tokens.tolist() == [[3, 4, 5]]
    assert main([*words, "7"]) == 0
    assert "the limit" not in capsys.readouterr().out
    write("p.jsonl", [{"prompt": "a", "answer": " b"}])
    more = ["--population", "p:answer:test=p.jsonl"]
    for texts, limit, said in (([], "9", "none is given"), (["c.h5"], "9", "none is given"),
                               (["a.txt"], "1", "at least 2; got 1")):  # fmt: skip
        words = ["corpus", *texts, "--tokenizer", "t.json", "-o", "d.h5", *more, "--limit", limit]
        assert main(words) == 2
        assert said in capsys.readouterr().err
