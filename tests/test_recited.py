"""evaluation/recited.py and `refcurv recite`: passages that greedy decoding says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import config, random_parameters

import refcurv as rc
from refcurv.cli import main
from refcurv.evaluation import recited as module
from refcurv.evaluation.lines import _checksum
from refcurv.evaluation.recited import _split, longest_runs, recited
from refcurv.law.checks import (
    ConventionError,
    EmptyError,
    RangeError,
    RoomError,
    SchemaError,
    StorageError,
)
from refcurv.report.passages import format_recited

SIZE = dict(prefix=4, suffix=6, stride=3)


@pytest.fixture(scope="module")
def model() -> rc.Model:
    made = config(vocabulary=29, layers=2)
    return rc.Model(made, {k: 3 * x for k, x in random_parameters(made, 3).items()})


def said(model: rc.Model, prompt: np.ndarray, count: int) -> np.ndarray:
    return rc.greedy(model, prompt[None], count)[0]


def texts(
    model: rc.Model, seed: int = 0, many: int = 5, before: tuple[int, ...] = ()
) -> list[np.ndarray]:
    """Random ids, in which a part of most documents is what the model says by itself."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(many):
        ids = rng.integers(0, model.config.vocabulary, 40 + 7 * n)
        if n % 4:
            at = 3 * int(rng.integers(0, 6))
            ids[at + 4 : at + 10] = said(model, np.array([*before, *ids[at : at + 4]]), 6)
        out.append(ids.astype(np.int32))
    return out


def test_a_split_is_as_large_by_passages_not_by_documents() -> None:
    """A document of many passages stands beside many of one."""
    for count, want in (({4: 3, 0: 1, 1: 1, 2: 1}, {4: "dev", 0: "test", 1: "test", 2: "test"}),
                        ({0: 1, 1: 2, 2: 2, 3: 5}, {3: "dev", 1: "test", 2: "test", 0: "test"}),
                        ({7: 4}, {7: "dev"})):  # fmt: skip
        some = [SimpleNamespace(document=d) for d, n in count.items() for _ in range(n)]
        assert {one.document: split for one, split in _split(some)} == want


def test_longest_runs_by_hand() -> None:
    right = np.array([[0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    run, at = longest_runs(right)
    assert run.tolist() == [0, 2, 1, 3, 4] and at.tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("least", [None, 3])
@pytest.mark.parametrize("before", [(), (5, 1)])
def test_greedy_decoding_says_each_passage(
    model: rc.Model, least: int | None, before: tuple[int, ...]
) -> None:
    found = recited(model, texts(model, before=before), **SIZE, least=least, before=before)
    assert len(found.passages) > 1
    for one in found.passages:
        prompt, true = found.ids(one)
        assert prompt[: len(before)].tolist() == list(before) and len(true) == one.said
        assert one.prompt >= 4 and one.said >= (least or 6)
        assert said(model, prompt, one.said).tolist() == true.tolist()
        assert true.tolist() == found.documents[one.document][one.asked].tolist()
    for split in {one.split for one in found.passages}:
        asked = rc.Corpus(np.zeros((1, 2), int), populations={"p": found.population(split)})
        assert rc.evaluate(model, asked, split=split)["p"].after["strict"] == 1


@pytest.mark.parametrize(("seed", "least"), [(0, 6), (1, 2), (2, 4), (3, 1)])
def test_by_loops(model: rc.Model, seed: int, least: int) -> None:
    """Every window decoded by itself; then each rule of what is left out, as it is written."""
    documents = texts(model, seed)
    documents.append(documents[1][3:].copy())  # says what another document says
    documents.append(np.array([1, 2, 3], np.int32))
    found = recited(model, documents, **SIZE, least=least)
    runs, hits, right = [], [], 0
    for d, ids in enumerate(documents):
        for b in range(0, len(ids) - 9, 3):
            own = ids[b : b + 10]
            flags = [int(said(model, own[: 4 + n], 1)[0] == own[4 + n]) for n in range(6)]
            right += sum(flags)
            spans = [(m - n, -n) for n in range(6) for m in range(n, 7) if all(flags[n:m])]
            run, start = max(spans)
            runs.append(run)
            if run >= least:
                hits.append((d, b, 4 - start, run, own[4 - start : 4 - start + run].tolist()))
    assert found.windows == len(runs) and found.short == 1
    assert found.runs.tolist() == [runs.count(n) for n in range(7)]
    assert found.right == pytest.approx(right / (6 * len(runs)), rel=1e-15)

    def repeats(hit: tuple) -> bool:
        d, b, prompt, run, _ = hit
        ids, n = documents[d][b : b + prompt + run].tolist(), (run + 1) // 2
        places = range(prompt, prompt + run - n + 1)
        return any(ids[i : i + n] == ids[j : j + n] for i in places for j in range(i))

    fresh = [hit for hit in hits if not repeats(hit)]
    first = {tuple(hit[4]): hit[0] for hit in reversed(fresh)}
    single = [hit for hit in fresh if first[tuple(hit[4])] == hit[0]]
    kept: list[tuple] = []
    for hit in sorted(single, key=lambda hit: (-hit[3], hit[0], hit[1])):
        spans = [(o[0], p) for o in kept for p in range(o[1] + o[2], o[1] + o[2] + o[3])]
        if not any((hit[0], p) in spans for p in range(hit[1] + hit[2], hit[1] + hit[2] + hit[3])):
            kept.append(hit)
    assert sorted(hit[:4] for hit in kept) == [
        (one.document, one.begin, one.prompt, one.said) for one in found.passages
    ]
    assert found.repeats == len(hits) - len(fresh)
    assert found.doubles == len(fresh) - len(single)
    assert found.overlaps == len(single) - len(kept)
    assert found.doubles > 0 or least == 6


@given(st.integers(0, 99), st.integers(1, 6))
def test_splits_go_by_document_and_are_about_as_large(seed: int, least: int) -> None:
    made = config(vocabulary=5, layers=1)
    model = rc.Model(made, random_parameters(made, seed))
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 5, int(n)) for n in rng.integers(10, 60, 7)]
    found = recited(model, documents, **SIZE, least=least)
    sizes = {"dev": 0, "test": 0}
    for d in range(7):
        assert len({one.split for one in found.passages if one.document == d}) <= 1
    for one in found.passages:
        sizes[one.split] += 1
    largest = max(np.bincount([one.document for one in found.passages] or [0]))
    assert abs(sizes["dev"] - sizes["test"]) <= largest


def test_the_command_line(model: rc.Model, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rc.save(model, "w.h5")
    documents = texts(model)
    lines = [json.dumps({"input_ids": one.tolist()}) + "\n" for one in documents]
    Path("t.jsonl").write_text("".join(lines))
    words = ["recite", "w.h5", "t.jsonl", "-o", "items.jsonl"]
    size = ["--prefix", "4", "--suffix", "6", "--stride", "3", "--run", "3"]
    assert main(words + size) == 0
    told = capsys.readouterr().out
    found = recited(model, documents, **SIZE, least=3)
    rows = [json.loads(line) for line in Path("items.jsonl").read_text().splitlines()]
    assert [(row["token"], row["split"]) for row in rows] == [
        (one.begin, one.split) for one in found.passages
    ]
    assert rows[0]["document"] == f"t.jsonl line {found.passages[0].document + 1}"
    assert f"{found.windows} windows of 5 documents" in told and "dev: " in told
    assert "needs passages of other documents" not in told
    one = [passage for passage in found.passages if passage.split == "dev"]
    told = format_recited(replace(found, passages=tuple(one)))
    assert "\ntest needs passages of other documents: give more, or a lower `--run`" in told
    assert "dev needs" not in told
    for split in ("dev", "test"):
        asked = f"q:recite:{split}=items.jsonl"
        assert main(["corpus", "-o", f"{split}.h5", "--population", asked]) == 0
        made = rc.load_corpus(f"{split}.h5").populations["q"]
        for name in ("tokens", "prompt_length", "length"):
            want = getattr(found.population(split), name)
            assert getattr(made, name).tolist() == want.tolist()
        assert "of the other split" in capsys.readouterr().out


def test_a_killed_run_goes_on(model: rc.Model, tmp_path: Path, monkeypatch) -> None:
    """With the same passages; what was read is not read again, what is of another run refused."""
    monkeypatch.setattr(module, "PIECE", 100)
    documents, lines = texts(model, many=9), tmp_path / "found"
    want, strict = (recited(model, documents, **SIZE, least=n) for n in (1, 5))
    whole, read = module.at_scored, []

    def killed(config, parameters, piece, *given):
        read.append(len(piece.tokens))
        if len(read) == 4:
            raise KeyboardInterrupt
        return whole(config, parameters, piece, *given)

    monkeypatch.setattr(module, "at_scored", killed)
    with pytest.raises(KeyboardInterrupt):
        recited(model, documents, **SIZE, least=1, lines=lines)
    steps: list[tuple[int, int]] = []
    found = recited(  # what counts as a passage is no part of what is kept
        model, documents, **SIZE, least=5, lines=lines, progress=lambda *at: steps.append(at)
    )
    assert found.passages == strict.passages != want.passages
    assert sum(read) - read[3] == want.windows and steps == sorted(steps)
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    done = len(read)
    again = recited(model, documents, **SIZE, least=1, lines=lines)
    assert len(read) == done and again.passages == want.passages
    assert again.runs.tolist() == want.runs.tolist() and again.right == want.right
    for other, says in (({"stride": 2}, "stride is 2 here, 3 there"), ({}, "texts is ")):
        with pytest.raises(ConventionError, match=f"belongs to another run: {says}"):
            recited(model, documents[len(other) - 1 :], **{**SIZE, **other}, lines=lines)
    rc.save(model, tmp_path / "w.h5")
    short = rc.load(tmp_path / "w.h5", dtype="float32")
    other = rc.Model(model.config, random_parameters(model.config, 99))
    for one, more, says in (
        (other, {}, "weights is"),
        (short, {}, "dtype is"),
        (model, {"before": [1]}, "before "),
        (model, {"prefix": 3, "suffix": 7}, "prefix is"),
    ):
        with pytest.raises(ConventionError, match=f"belongs to another run: .*{says}"):
            recited(one, documents, **{**SIZE, **more}, lines=lines)
    monkeypatch.setattr(module, "PIECE", 10 * (want.windows - 2))  # a window is left for the last
    assert recited(model, documents, **SIZE, least=1).passages == want.passages
    monkeypatch.setattr(module, "PIECE", 100)
    kept = lines.read_text()
    for wrong in ("zz", "0", "00", 7, None):
        line = {"what": "windows", "piece": 0, "right": wrong}
        told = json.dumps({**line, "check": _checksum(line)})
        lines.write_text("\n".join([kept.split("\n")[0], told, ""]))
        with pytest.raises(SchemaError, match=r"^recited: '.*found' has a line without its"):
            recited(model, documents, **SIZE, lines=lines)


def test_the_command_goes_on_and_leaves_nothing(
    model: rc.Model, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    rc.save(model, "w.h5")
    Path("t.jsonl").write_text(
        "".join(json.dumps({"input_ids": one.tolist()}) + "\n" for one in texts(model))
    )
    words = ["recite", "w.h5", "t.jsonl", "--prefix", "4", "--suffix", "6", "--run", "2", "-o"]
    assert main([*words, "whole.jsonl"]) == 0
    full = Mock(side_effect=StorageError("the disk is full"))
    with monkeypatch.context() as patched:
        patched.setattr("refcurv.files.disk.write_json_lines", full)
        assert main([*words, "items.jsonl"]) == 3
    assert Path("items.jsonl.unfinished").exists() and not Path("items.jsonl").exists()
    with monkeypatch.context() as patched:
        patched.setattr(module, "at_scored", None)  # nothing is read again
        assert "goes on" not in capsys.readouterr().err
        assert main([*words, "items.jsonl"]) == 0
    said = "refcurv: recite: goes on from 1 of 1 piece, which an earlier run left\n"
    assert capsys.readouterr().err == said
    assert Path("items.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(p.name for p in Path().iterdir()) == [
        "items.jsonl", "t.jsonl", "w.h5", "whole.jsonl",
    ]  # fmt: skip


def test_windows_that_memory_does_not_hold(model: rc.Model, monkeypatch) -> None:
    """A window for each token, a thousand tokens wide: it was killed by the system."""
    monkeypatch.setattr("refcurv.curvature.room.available", lambda: 100_000)
    with monkeypatch.context() as patched:
        patched.setattr(module, "Population", None)  # nothing is made before
        with pytest.raises(
            RoomError, match=r"1,?001 windows of 1,?000 tokens take 12\.0 MB, and 100"
        ):
            recited(model, [np.ones(2000, int)], prefix=990, suffix=10, stride=1)
    assert recited(model, texts(model), **SIZE).windows


def test_refusals(model: rc.Model, tmp_path: Path, monkeypatch, capsys) -> None:
    ids = texts(model)
    for wrong in ({"prefix": 0}, {"suffix": True}, {"stride": 1.0}, {"least": 7}, {"least": 0}):
        with pytest.raises(RangeError, match=next(iter(wrong))):
            recited(model, ids, **{**SIZE, **wrong})
    with pytest.raises(EmptyError, match="none of 5 documents is so long; the longest has 68"):
        recited(model, ids, prefix=60, suffix=20)
    with pytest.raises(RangeError, match="vocabulary"):
        recited(model, [np.full(40, 29)], **SIZE)
    with pytest.raises(EmptyError, match="no passage of split 'test'"):
        recited(model, [ids[0]], **SIZE).population("test")
    monkeypatch.chdir(tmp_path)
    rc.save(model, "w.h5")
    Path("p.jsonl").write_text('{"prefix_ids": [1, 2], "suffix_ids": [3]}\n')
    Path("t.txt").write_text("a text")
    for name, says in (("p.jsonl", "whole texts"), ("t.txt", "tokenizer with --tokenizer")):
        assert main(["recite", "w.h5", name, "-o", "i.jsonl"]) == 2
        told = capsys.readouterr().err
        assert says in told and told.count("\n") == 1 and not Path("i.jsonl").exists()
