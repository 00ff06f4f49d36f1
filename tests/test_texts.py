"""files/texts.py, files/documents.py: tokenizing, cutting, packing, populations, hostile files."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, config, random_parameters
from tokenizers import models, pre_tokenizers, processors, trainers

import refcurv as rc
from refcurv.cli import main
from refcurv.files import documents, encoding
from refcurv.files.texts import build_corpus
from refcurv.law.checks import ConventionError, RefcurvError, SchemaError

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "5": 7}


def word_level(**template: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        made.post_processor = processors.TemplateProcessing(**template, special_tokens=special)
    return made


def byte_pairs() -> tokenizers.Tokenizer:
    """Byte-level BPE that has learnt a few lines, and puts <s> before each text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = ["the cat sat on the mat", "the dog sat on the log", "itude attitude gratitude"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(lines * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return made


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with t.json (words alone), st.json (<s> before, </s> behind), bpe.json."""
    monkeypatch.chdir(tmp_path)
    word_level().save("t.json")
    word_level(single="<s> $A </s>").save("st.json")
    byte_pairs().save("bpe.json")
    return tmp_path


def write(name: str, content: Any) -> str:
    path = Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return name


def counts(corpus: rc.Corpus) -> dict[str, Any]:
    return dict(corpus.source["made_from"]["counts"])


# ------------------------------------------------------------------ rows, by hand


def test_rows_by_hand(at: Path) -> None:
    texts = [write("one.txt", "a b c d a"), write("two.md", "b c"), write("three.txt", "d d d")]
    cut = build_corpus(texts, "t.json", length=4)
    assert cut.tokens.tolist() == [[3, 4, 5, 6], [3, 0, 0, 0], [4, 5, 0, 0], [6, 6, 6, 0]]
    assert cut.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert cut.segments is None and cut.labels is None
    assert cut.label.tolist() == [[4, 5, 6, -1], [-1] * 4, [5, -1, -1, -1], [6, 6, -1, -1]]
    packed = build_corpus(texts, "t.json", length=4, pack=True)
    assert packed.tokens.tolist() == [[3, 4, 5, 6], [3, 4, 5, 6], [6, 6, 0, 0]]
    assert packed.segments.tolist() == [[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 0, 0]]
    assert packed.mask.tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert packed.label.tolist() == [[4, 5, 6, -1], [-1, 5, -1, -1], [6, -1, -1, -1]]
    shared = {"documents": 3, "empty": 0, "tokens": 10, "width": 4}
    assert counts(cut).items() >= {
        **shared, "rows": 4, "padding": 6, "cuts": 1, "unlabelled": 4
    }.items()  # fmt: skip
    assert counts(packed).items() >= {
        **shared, "rows": 3, "padding": 2, "cuts": 2, "unlabelled": 5
    }.items()  # fmt: skip


def test_a_row_is_no_wider_than_the_longest(at: Path) -> None:
    text = write("a.txt", "a b c")
    for pack in (False, True):
        made = build_corpus([text], "t.json", length=10**6, pack=pack)
        assert made.tokens.tolist() == [[3, 4, 5]] and made.mask is None
    assert made.segments.tolist() == [[0, 0, 0]]


# ------------------------------------------------------------------ a second route: loops


def loops_cut(texts: list[list[int]], length: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (token, document, whether real); one piece a row."""
    rows = []
    for d, text in enumerate(texts):
        row: list[tuple[int, int, int]] = []
        for token in text:
            if len(row) == length:
                rows.append(row)
                row = []
            row.append((token, d, 1))
        rows.append(row)
    return rows


def loops_packed(texts: list[list[int]], length: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (token, document, number of the document within the row)."""
    rows: list[list[tuple[int, int, int]]] = [[]]
    for d, text in enumerate(texts):
        for token in text:
            if len(rows[-1]) == length:
                rows.append([])
            row = rows[-1]
            number = 0 if not row else row[-1][2] + (row[-1][1] != d)
            row.append((token, d, number))
    return rows


def loops_labels(rows: list[list[tuple[int, int, int]]], width: int) -> list[list[int]]:
    out = []
    for row in rows:
        line = [-1] * width
        for t in range(len(row) - 1):
            if row[t][1] == row[t + 1][1]:
                line[t] = row[t + 1][0]
        out.append(line)
    return out


IDS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=23), min_size=1, max_size=9)


def built(texts: list[list[int]], length: int, pack: bool, folder: Path) -> rc.Corpus:
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": text}) + "\n" for text in texts))
    return build_corpus([path], length=length, pack=pack)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@given(texts=IDS, length=st.integers(2, 12), pack=st.booleans())
def test_packing_equals_loops(
    folder: Path, texts: list[list[int]], length: int, pack: bool
) -> None:
    made = built(texts, length, pack, folder)
    rows = (loops_packed if pack else loops_cut)(texts, length)
    width = max(map(len, rows))
    assert made.tokens.shape == (len(rows), width)
    for n, row in enumerate(rows):
        assert made.tokens[n, : len(row)].tolist() == [token for token, _, _ in row]
        assert made.real[n].tolist() == [True] * len(row) + [False] * (width - len(row))
        if pack:
            assert made.segments[n, : len(row)].tolist() == [number for _, _, number in row]
    assert made.label.tolist() == loops_labels(rows, width)
    found = counts(made)
    assert found["tokens"] == sum(map(len, texts)) == int(made.real.sum())
    assert found["padding"] == int((~made.real).sum())
    assert found["unlabelled"] == int((made.real & (made.label < 0)).sum())


@given(texts=IDS, length=st.integers(2, 12), pack=st.booleans())
def test_no_token_is_lost_or_doubled(
    folder: Path, texts: list[list[int]], length: int, pack: bool
) -> None:
    """All real tokens in order are all documents in order; each piece lies in one document."""
    made = built(texts, length, pack, folder)
    assert made.tokens[made.real].tolist() == [token for text in texts for token in text]
    pieces = [
        made.tokens[n][made.real[n] & (made.segment[n] == s)].tolist()
        for n in range(len(made.tokens))
        for s in range(int(made.segment[n][made.real[n]].max()) + 1)
    ]
    assert all(pieces)
    left = list(pieces)
    for text in texts:  # joined again, piece by piece, without one token over
        joined: list[int] = []
        while len(joined) < len(text):
            joined += left.pop(0)
        assert joined == text
    assert not left
    assert len(pieces) - len(texts) == counts(made)["cuts"]


@given(texts=IDS)
def test_packed_and_cut_have_the_same_labels(folder: Path, texts: list[list[int]]) -> None:
    """Where no document is cut: one row holds all of them, or each has its own."""
    apart = built(texts, 23, False, folder)
    packed = built(texts, 23 * 9, True, folder)
    assert packed.tokens.shape == (1, sum(map(len, texts)))
    assert packed.label[0].tolist() == apart.label[apart.real].tolist()


# ------------------------------------------------------------------ O52


@pytest.mark.slow
def test_O52_packed_documents_are_separate_documents(at: Path) -> None:
    """S_A and S_G of the packed build are those of the separate one; unsegmented they are not."""
    rng = np.random.default_rng(52)
    texts = [rng.integers(0, 7, n).tolist() for n in (5, 7, 4, 1, 7, 2, 10, 12)]
    write("ids.jsonl", [{"input_ids": text} for text in texts])
    made = config()
    model = rc.Model(made, random_parameters(made, 3), "float64")

    def sums(corpus: rc.Corpus) -> rc.Factors:
        return rc.collect(model, corpus, "**", "empirical")

    packed = build_corpus(["ids.jsonl"], length=12, pack=True)
    assert counts(packed)["cuts"] == 0 and len(packed.tokens) == 4
    together, apart = sums(packed), sums(build_corpus(["ids.jsonl"], length=12))
    merged = sums(rc.Corpus(packed.tokens))
    for name, want in apart.items():
        got = together[name]
        assert (got.n_A, got.n_G) == (want.n_A, want.n_G) == (40, 40), name
        assert_within(got.sum_A, want.sum_A, 1e-13, want.sum_A, f"{name} S_A")
        assert_within(got.sum_G, want.sum_G, 1e-13, want.sum_G, f"{name} S_G")
        for one, two in ((merged[name].sum_A, want.sum_A), (merged[name].sum_G, want.sum_G)):
            assert np.linalg.norm(one - two) > 1e-2 * np.linalg.norm(two), name


# ------------------------------------------------------------------ special tokens, seams


def test_special_tokens(at: Path) -> None:
    write("a.txt", "a b")
    write("p.jsonl", [{"prefix": "a", "suffix": " b c"}, {"prefix": "", "suffix": "d"}])
    wanted = {
        ("t.json", None): [3, 4],
        ("t.json", "</s>"): [3, 4, 2],
        ("t.json", "5"): [3, 4, 7],
        ("st.json", None): [1, 3, 4, 2],
        ("st.json", "<s>"): [1, 3, 4, 2, 1],
    }
    for (file, eos), row in wanted.items():
        assert build_corpus(["a.txt"], file, eos=eos).tokens.tolist() == [row]
    pairs = build_corpus([], "st.json", populations=["p:recite:dev=p.jsonl"]).populations["p"]
    assert pairs.tokens.tolist() == [[1, 3, 4, 5], [1, 6, 0, 0]]
    assert pairs.prompt_length.tolist() == [2, 1] and pairs.length.tolist() == [4, 2]
    spelled = build_corpus([write("s.txt", "a </s> b")], "t.json")
    assert spelled.tokens.tolist() == [[3, 2, 4]]
    with pytest.raises(ConventionError, match="puts '</s>' behind each text by itself"):
        build_corpus(["a.txt"], "st.json", eos="</s>")


def test_prefix_and_suffix_are_one_text(at: Path, capsys: Any) -> None:
    """The seam of the official quotes, "Att" and "itude", lies within a token."""
    tokenizer = tokenizers.Tokenizer.from_file("bpe.json")
    write("q.jsonl", [{"prefix": "the att", "target_suffix": "itude"},
                      {"prefix": "the cat sat", "suffix": " on the mat"}])  # fmt: skip
    made = build_corpus([], "bpe.json", populations=["q:recite:test=q.jsonl"])
    got = made.populations["q"]
    for n, text in enumerate(["the attitude", "the cat sat on the mat"]):
        assert got.tokens[n, : got.length[n]].tolist() == tokenizer.encode(text).ids
    assert tokenizer.encode("the attitude").tokens[-1] == "Ġattitude"
    assert got.prompt_length.tolist() == [got.length[0] - 1, len(tokenizer.encode("the cat sat"))]
    assert counts(made)["populations"]["q"]["straddling"] == 1
    assert main(["corpus", "--tokenizer", "bpe.json", "-o", "q.h5", "--population",
                 "q:answer:dev=q.jsonl"]) == 0  # fmt: skip
    assert "1 prefix cut within a token, which is asked for with" in capsys.readouterr().out
    provenance = rc.load_corpus("q.h5").source["provenance"]
    assert provenance["counts"]["populations"]["q"]["straddling"] == 1


def test_truncation_and_padding_of_the_tokenizer_are_off(at: Path) -> None:
    made = word_level()
    made.enable_truncation(2)
    made.enable_padding(length=9, pad_id=7)
    made.save("cutting.json")
    assert build_corpus([write("a.txt", "a b c")], "cutting.json").tokens.tolist() == [[3, 4, 5]]


def test_long_texts_are_tokenized_in_pieces(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a text stands in a file, how long it is and what it ends with changes no id."""
    text = "".join(f"the cat sat{'!' * (n % 7)} on the log\r\n" for n in range(50))
    write("long.txt", text)
    write("long.jsonl", [{"text": text}, {"text": "a"}, {"prefix": text, "suffix": text}])
    write("line.txt", "!" * 1000)
    names = ("long.txt", "long.jsonl", "line.txt")
    whole = [build_corpus([name], "bpe.json", length=4096) for name in names]
    heard: list[int] = []
    for module in (encoding, documents):
        monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(encoding, "OVERLAP", 64 - 43)
    monkeypatch.setattr(documents, "PARTS", 3)
    for name, want in zip(names, whole, strict=True):
        got = build_corpus([name], "bpe.json", length=4096, progress=lambda i, n: heard.append(i))
        assert got.tokens.tolist() == want.tokens.tolist()
    assert len(heard) > 30
    assert whole[2].tokens.shape == (1, 1001)


def test_characters_are_kept_as_they_are(at: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file("bpe.json")
    text = " the\r\n\tcat\u2028ünïcödé 🐈\x01\r end\n\n"
    write("raw.txt", b"\xef\xbb\xbf" + text.encode())
    write("raw.jsonl", [{"text": text}])
    want = tokenizer.encode(text).ids
    for name in ("raw.txt", "raw.jsonl"):
        assert build_corpus([name], "bpe.json").tokens.tolist() == [want]


# ------------------------------------------------------------------ JSON lines, arrays, populations


def test_keys_of_the_official_files(at: Path) -> None:
    """ids before text, target_suffix before suffix, whatever else is there counted as ignored."""
    write("j.jsonl", [
        {"prefix_ids": [7, 0], "suffix_ids": [7]},
        {"prefix_len": 2, "prefix_text": "a", "suffix_text": "b", "prefix_ids": [6, 5],
         "suffix_ids": [4, 3, 2], "doc_index": 1},
        {"id": 1, "full_quote": "a b", "prefix": "a", "target_suffix": " b", "suffix": "c"},
        {"prefix": [1], "suffix": [2], "prefix_ids": None},
    ])  # fmt: skip
    made = build_corpus([], "t.json", populations=["q:recite:test:0.25=j.jsonl"])
    q = made.populations["q"]
    assert made.tokens.shape[0] == 0
    assert q.tokens.tolist() == [[7, 0, 7, 0, 0], [6, 5, 4, 3, 2], [3, 4, 0, 0, 0],
                                 [1, 2, 0, 0, 0]]  # fmt: skip
    assert q.prompt_length.tolist() == [2, 2, 1, 1] and q.length.tolist() == [3, 5, 2, 2]
    assert (q.kind, q.split, q.chance) == ("recite", "test", 0.25)
    ignored = "doc_index full_quote id prefix_len prefix_text suffix suffix_text"
    assert counts(made)["ignored_keys"] == ignored.split()
    assert counts(made)["populations"]["q"]["asked"] == 1 + 3 + 1 + 1


def test_ids_beyond_the_tokenizer_are_refused_only_with_one(at: Path) -> None:
    write("j.jsonl", [{"input_ids": [3, 99]}])
    assert build_corpus(["j.jsonl"]).tokens.tolist() == [[3, 99]]
    with pytest.raises(RefcurvError, match="line 1 has the id 99, and the tokenizer's are below 8"):
        build_corpus(["j.jsonl"], "t.json")
    assert build_corpus([write("k.jsonl", [{"input_ids": [7]}])], "t.json").tokens == 7


def test_a_population_of_text_is_cut(at: Path) -> None:
    texts = ["clean:text:test=a.txt", "ids:text:dev=a.npy", "pairs:text:dev=p.jsonl"]
    write("a.txt", "a b c d a")
    write("a.npy", np.arange(12).reshape(2, 6) % 8)
    write("p.jsonl", [{"prefix": "a b c", "suffix": " d a b"}])
    made = build_corpus(["a.txt"], "t.json", length=4, populations=texts).populations
    assert list(made) == ["clean", "ids", "pairs"]
    assert made["clean"].tokens.tolist() == [[3, 4, 5, 6], [3, 0, 0, 0]]
    assert made["clean"].length.tolist() == [4, 1]
    assert made["ids"].tokens.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0], [6, 7, 0, 1], [2, 3, 0, 0]]
    assert made["ids"].prompt_length.tolist() == [1] * 4
    assert made["pairs"].tokens.tolist() == [[3, 4, 5, 6, 3, 4]]  # a pair is never cut
    assert made["pairs"].prompt_length.tolist() == [3]


@pytest.mark.parametrize("dtype", ["<i2", ">i4", "u1", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(at: Path, dtype: str, order: Any) -> None:
    array = np.arange(15).reshape(3, 5).astype(dtype)
    np.save("a.npy", np.asarray(array, order=order))
    assert build_corpus(["a.npy"]).tokens.tolist() == array.tolist()
    assert build_corpus(["a.npy"], length=5, pack=True).segments.tolist() == [[0] * 5] * 3
    np.save("flat.npy", array.reshape(-1))
    assert build_corpus(["flat.npy"], length=5).tokens.tolist() == array.tolist()


def test_pairs_and_empty_documents_among_the_rows(at: Path) -> None:
    write("m.jsonl", [{"text": ""}, {"prefix": "a", "suffix": " b c"}, {"text": "d"}])
    made = build_corpus(["m.jsonl"], "st.json")
    assert made.tokens[made.real].tolist() == [1, 3, 4, 5, 1, 6, 2]
    assert counts(made)["empty"] == 1 and counts(made)["documents"] == 2


def test_populations_are_added_to_a_corpus_that_exists(at: Path) -> None:
    write("p.jsonl", [{"prefix": "a", "suffix": " b"}])
    first = build_corpus([write("a.txt", "a b c")], "t.json", pack=True, length=2,
                         populations=["old:text:dev=a.txt"])  # fmt: skip
    rc.save_corpus(first, "c.h5")
    more = build_corpus(["c.h5"], "t.json", populations=["new:recite:test=p.jsonl"])
    assert list(more.populations) == ["old", "new"]
    for name in ("tokens", "mask", "segments"):
        assert getattr(more, name).tolist() == getattr(first, name).tolist()
    assert set(more.source["made_from"]["inputs"]) == {"c.h5", "p.jsonl", "t.json"}
    with pytest.raises(ConventionError, match="two populations are named 'old'"):
        build_corpus(["c.h5"], "t.json", populations=["old:recite:test=p.jsonl"])


# ------------------------------------------------------------------ provenance, determinism


def test_provenance_and_determinism(at: Path) -> None:
    Path("sub").mkdir()
    files = [write("a.txt", "a b c d"), write("sub/a.txt", "d c b")]
    for out in ("one.h5", "two.h5"):
        made = build_corpus(files, "t.json", length=2, eos="</s>", pack=True,
                            populations=["x:text:dev=a.txt"])  # fmt: skip
        rc.save_corpus(made, out)
    assert Path("one.h5").read_bytes() == Path("two.h5").read_bytes()
    got = rc.load_corpus("one.h5").source["provenance"]
    assert set(got["inputs"]) == {"a.txt", str(at / "sub" / "a.txt"), "t.json"}
    for name, sha256 in got["inputs"].items():
        assert sha256 == hashlib.sha256((at / name).read_bytes()).hexdigest()
    assert got["options"] == {"length": 2, "pack": True, "eos": "</s>", "separator": None,
                              "token_dtype": None, "limit": None,
                              "populations": ["x:text:dev=a.txt"]}  # fmt: skip
    facts = got["tokenizer"]
    assert facts["vocabulary"] == 8 and facts["tokenizers"] == tokenizers.__version__
    assert (facts["before"], facts["behind"]) == ([], [2])
    assert got["counts"]["tokens"] == 9


def test_progress_ends_at_the_whole(at: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = [write("a.jsonl", [{"text": "a b"}] * 40), write("b.txt", "a b c")]
    build_corpus(files, "t.json", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    total = sum(Path(file).stat().st_size for file in files)
    assert seen[-1] == (total, total) and all(done < total for done, _ in seen[:-1])
    assert len(seen) >= 40


def test_a_file_that_changes_meanwhile(at: Path) -> None:
    write("a.jsonl", [{"text": "a b"}] * 3)

    def grow(done: int, total: int) -> None:
        os.utime("a.jsonl", ns=(1, 1))

    with pytest.raises(SchemaError, match=r"'.*a\.jsonl' was replaced or changed meanwhile"):
        build_corpus(["a.jsonl"], "t.json", progress=grow)


def test_without_the_library(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", "a")
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConventionError, match=r"pip install 'refcurv\[checkpoints\]'"):
        build_corpus(["a.txt"], "t.json")
    assert build_corpus([write("a.jsonl", [{"input_ids": [1, 2]}])]).tokens.tolist() == [[1, 2]]


# ------------------------------------------------------------------ hostile input


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return magic + len(text).to_bytes(2, "little") + text + data


def described(shape: object, descr: str = "<i4", fortran: object = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def random_bpe() -> str:
    made = byte_pairs()
    made.model.dropout = 0.5
    return made.to_str()


FILES: dict[str, tuple[str, Any, str]] = {
    "no such file": ("nowhere.txt", None, "no file"),
    "a folder": ("t.d", "folder", "a folder"),
    "empty": ("e.txt", b"", "holds no token"),
    "blanks": ("e.txt", b" \n\n", "holds no token"),
    "not UTF-8": ("e.txt", b"a b \xff c", "e.txt' is not UTF-8 text: byte 0xff at 4, invalid"),
    "not UTF-8 behind a mark": ("e.txt", b"\xef\xbb\xbfa\xff", "byte 0xff at 4"),
    "cut UTF-8": ("e.txt", "é".encode()[:1], "not UTF-8"),
    "utf-16": ("e.txt", "a b".encode("utf-16"), "is UTF-16, not UTF-8. Convert it: iconv"),
    "utf-16 of lines": ("e.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf-16 unmarked": ("e.txt", "a b".encode("utf-16-le"), "byte 1 is NUL. Is it binary, or UTF"),
    "utf-32": ("e.txt", "a b".encode("utf-32"), "is UTF-32, not UTF-8"),
    "a NUL": ("e.txt", b"a b\0c", "e.txt' is no text: byte 3 is NUL"),
    "binary without a suffix": ("e", bytes(range(40)), "e' is no text: byte 0 is NUL"),
    "json": ("e.json", b"[]", "Give a .jsonl"),
    "npz": ("e.npz", b"PK", "Give a .npy"),
    "empty jsonl": ("e.jsonl", b"\n \n", "holds no token"),
    "jsonl of empty texts": ("e.jsonl", [{"text": ""}], "holds no token"),
    "broken line": ("e.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3 is not valid JSON"),
    "no object": ("e.jsonl", b'["a"]', "line 1 must be a JSON object"),
    "a key twice": ("e.jsonl", b'{"text": "a", "text": "b"}', "a key occurs twice"),
    "NaN": ("e.jsonl", b'{"text": "a", "score": NaN}', "NaN is not JSON"),
    "deep": ("e.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
    "long number": ("e.jsonl", b'{"input_ids": [' + b"9" * 9999 + b"]}", "line 1 is not valid"),
    "bytes": ("e.jsonl", b'{"text": "a"}\n\xff\n', "line 2 is not UTF-8"),
    "no key": ("e.jsonl", [{}], "its keys are none"),
    "unknown key": ("e.jsonl", [{"txt": "a"}], "its keys are 'txt'"),
    "only a prefix": ("e.jsonl", [{"prefix": "a"}], "line 1 must have either"),
    "only a suffix": ("e.jsonl", [{"suffix": "a", "prefix": None}], "line 1 must have either"),
    "document and pair": ("e.jsonl", [{"text": "a", "prefix": "a", "suffix": "b"}], "either"),
    "null": ("e.jsonl", [{"text": None}], "its keys are none"),
    "a number for a text": ("e.jsonl", [{"text": 3.5}], "must be text or a list of ids; got float"),
    "float id": ("e.jsonl", [{"input_ids": [1, 2.0]}], "input_ids[1] must be an integer; got 2.0"),
    "bool id": ("e.jsonl", [{"input_ids": [True]}], "input_ids[0] must be an integer; got True"),
    "nested ids": ("e.jsonl", [{"input_ids": [[1]]}], "must be an integer; got [1]"),
    "negative id": ("e.jsonl", [{"input_ids": [-1]}], "input_ids[0] is no id: -1"),
    "huge id": ("e.jsonl", [{"input_ids": [2**31]}], "input_ids[0] is no id: 2147483648"),
    "lone surrogate": ("e.jsonl", b'{"text": "\\ud800"}', "line 1: 'text': "),
    "no npy": ("e.npy", b"nonsense", "is no .npy file"),
    "empty npy": ("e.npy", b"", "is no .npy file"),
    "npz as npy": ("e.npy", b"PK\x03\x04" + bytes(40), "is no .npy file"),
    "a pickle": ("e.npy", pickle.dumps(Bomb()), "is no .npy file"),
    "objects": ("e.npy", saved(np.array([Bomb()], object)), "must hold integers; got object"),
    "floats": ("e.npy", saved(np.ones(3)), "must hold integers; got float64"),
    "bools": ("e.npy", saved(np.ones(3, bool)), "must hold integers; got bool"),
    "records": ("e.npy", saved(np.zeros(2, "i4,i4")), "must hold integers"),
    "truncated": ("e.npy", saved(np.arange(9))[:-3], "declares (9,) of int64, and holds 69 bytes"),
    "too long": ("e.npy", saved(np.arange(9)) + b"x", "holds 73 bytes"),
    "lying shape": ("e.npy", npy(described((2**40, 2**40))), "holds 0 bytes"),
    "negative shape": ("e.npy", npy(described((-1, -1)), bytes(4)), "declares (-1, -1)"),
    "shape of text": ("e.npy", npy(described("'x'")), "is no .npy file"),
    "no header": ("e.npy", npy("__import__('os')"), "is no .npy file"),
    "nested header": ("e.npy", npy("(" * 5000), "is no .npy file"),
    "header of nothing": ("e.npy", npy("{}"), "is no .npy file"),
    "version 9": ("e.npy", npy(described((1,)), bytes(4), b"\x93NUMPY\x09\x00"), "is no .npy"),
    "a scalar": ("e.npy", saved(np.int32(3)), "must be (T,) or (N, T); got ()"),
    "three axes": ("e.npy", saved(np.zeros((2, 2, 2), int)), "must be (T,) or (N, T)"),
    "no row": ("e.npy", saved(np.zeros((0, 4), int)), "holds no token"),
    "no column": ("e.npy", saved(np.zeros((4, 0), int)), "holds no token"),
    "negative": ("e.npy", saved(np.array([[1, 2], [3, -4]])), "[1, 1] is no id: -4"),
    "uint64": ("e.npy", saved(np.array([2**64 - 1], np.uint64)), "is no id: 18446744073709551615"),
    "a corpus that is none": ("e.h5", b"", "not HDF5"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("role", ["text", "population"])
def test_hostile_files(at: Path, name: str, role: str, capsys: Any) -> None:
    file, content, says = FILES[name]
    if content == "folder":
        Path(file).mkdir()
    elif content is not None:
        write(file, content)
    arguments = [file] if role == "text" else ["--population", f"p:text:dev={file}"]
    if file.endswith(".h5"):
        arguments += ["--population", f"q:text:dev={write('ok.txt', 'a')}"]
        says = says if role == "text" else "is no text here"
    refused([*arguments, "--tokenizer", "t.json"], says, capsys)
    assert not Path("exploded").exists()


TOKENIZERS: dict[str, tuple[str, str]] = {
    "empty": ("", "as a tokenizer.json"),
    "no object": ("[]", "as a tokenizer.json"),
    "no model": ('{"version": "1.0"}', "as a tokenizer.json"),
    "cut": (word_level().to_str()[:-40], "as a tokenizer.json"),
    "no vocabulary": (tokenizers.Tokenizer(models.BPE()).to_str(), "has no vocabulary"),
    "huge id": (word_level().to_str().replace('"d": 6', '"d": 4294967295').replace(
        '"d":6', '"d":4294967295'), "ids outside its vocabulary or beyond"),
    "special id": (word_level(single="<s> $A").to_str().replace('"ids":[1]', '"ids":[77]').replace(
        '"ids": [\n            1\n          ]', '"ids": [77]'), "ids outside its vocabulary"),
    "twice": (word_level(single="$A <s> $A").to_str(), "its post-processor does more"),
    "dropout": (random_bpe(), "has dropout 0.5, so that a text has other ids each time"),
    "unknown words": (tokenizers.Tokenizer(models.WordLevel({"z": 0}, unk_token="q")).to_str(),
                      "cannot use the tokenizer, on "),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_hostile_tokenizers(at: Path, name: str, capsys: Any) -> None:
    data, says = TOKENIZERS[name]
    write("bad.json", data)
    refused([write("a.txt", "a b"), "--tokenizer", "bad.json"], says, capsys)


OPTIONS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "neither texts nor populations"),
    "no tokenizer": (["a.txt"], "--tokenizer: a tokenizer.json, its folder, or a GGUF file"),
    "weights as tokenizer": (["a.txt", "--tokenizer", "c.h5"], "c.h5' is an HDF5 file, which has"),
    "missing tokenizer": (["a.txt", "--tokenizer", "x.json"], "x.json"),
    "eos without tokenizer": (["a.npy", "--eos", "a"], "give the tokenizer"),
    "unknown eos": (["a.txt", "--tokenizer", "t.json", "--eos", "<end>"], "no token '<end>'"),
    "length 1": (["a.npy", "--length", "1"], "length must be an integer of at least 2"),
    "length 0": (["a.npy", "--length", "0"], "length must be"),
    "length -5": (["a.npy", "--length=-5"], "length must be"),
    "no syntax": (["a.npy", "--population", "p.jsonl"], "a population is NAME:KIND:SPLIT"),
    "no file": (["a.npy", "--population", "p:recite:dev="], "a population is NAME"),
    "no split": (["a.npy", "--population", "p:recite=p.jsonl"], "a population is NAME"),
    "kind": (["a.npy", "--population", "p:recit:dev=p.jsonl"], "Did you mean 'recite'?"),
    "split": (["a.npy", "--population", "p:recite:train=p.jsonl"], "split of population 'p'"),
    "chance": (["a.npy", "--population", "p:recite:dev:2=p.jsonl"], "chance of population 'p'"),
    "chance of text": (["a.npy", "--population", "p:recite:dev:x=p.jsonl"], "must be a number"),
    "name": (["a.npy", "--population", "p.q:recite:dev=p.jsonl"], "no dots"),
    "path": (["a.npy", "--population", "../p:recite:dev=p.jsonl"], "no dots"),
    "slash": (["a.npy", "--population", "p/q:recite:dev=p.jsonl"], "cannot name"),
    "no name": (["a.npy", "--population", ":recite:dev=p.jsonl"], "cannot name"),
    "twice": (["a.npy", *["--population", "p:recite:dev=p.jsonl"] * 2], "two populations"),
    "recite of text": (["a.npy", "--tokenizer", "t.json", "--population", "p:recite:dev=a.txt"],
                       "has no prefix and suffix, which population 'p' of kind 'recite' needs"),
    "answer of ids": (["--population", "p:answer:dev=a.npy"], "has no prefix and suffix"),
    "empty prefix": (["--population", "p:recite:dev=noprefix.jsonl"], "line 1: the prefix has no"),
    "empty suffix": (["--population", "p:text:dev=nosuffix.jsonl"], "line 1: the suffix has no"),
    "corpus and text": (["c.h5", "a.npy", "--population", "p:recite:dev=p.jsonl"], "no other text"),
    "corpus and pack": (["c.h5", "--pack", "--population", "p:recite:dev=p.jsonl"], "do not pack"),
    "corpus alone": (["c.h5"], "no population to add"),
    "weights": (["w.h5", "--population", "p:recite:dev=p.jsonl"], "refcurv-corpus"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(at: Path, name: str, capsys: Any) -> None:
    write("a.txt", "a b c")
    write("a.npy", np.arange(6))
    write("p.jsonl", [{"prefix": [1], "suffix": [2]}])
    write("noprefix.jsonl", [{"prefix": [], "suffix": [1]}])
    write("nosuffix.jsonl", [{"prefix": [1], "suffix": []}])
    rc.save_corpus(rc.Corpus([[1, 2]]), "c.h5")
    if name == "weights":
        made = config()
        rc.save(rc.Model(made, random_parameters(made, 0), "float64"), "w.h5")
    arguments, says = OPTIONS[name]
    refused(arguments, says, capsys)


def refused(arguments: list[str], says: str, capsys: Any) -> None:
    """Status 2, one line, the old output untouched and nothing beside it."""
    Path("out.h5").write_bytes(b"the old output")
    before = sorted(Path().iterdir())
    assert main(["corpus", *arguments, "-o", "out.h5"]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert Path("out.h5").read_bytes() == b"the old output"
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("length", [True, 2.0, "7", None, 2**31])
def test_a_length_that_is_no_length(at: Path, length: Any) -> None:
    with pytest.raises(RefcurvError, match="length must be an integer of at least 2"):
        build_corpus([write("a.npy", np.arange(6))], length=length)


def test_outputs_apart_from_inputs(at: Path, capsys: Any) -> None:
    write("a.txt", "a b")
    write("p.jsonl", [{"prefix": "a", "suffix": "b"}])
    Path("link.h5").symlink_to("a.txt")
    tokenizer = ["--tokenizer", "t.json"]
    pair = ["--population", "p:recite:dev=p.jsonl"]
    for out in ("a.txt", "./a.txt", "link.h5", "t.json", "p.jsonl"):
        before = Path(out).read_bytes()
        assert main(["corpus", "a.txt", *tokenizer, *pair, "-o", out]) == 2
        err = capsys.readouterr().err
        assert "is the same file as" in err and err.count("\n") == 1
        assert Path(out).read_bytes() == before
    assert main(["corpus", "a.txt", *tokenizer, "-o", "nowhere/c.h5"]) == 2
    assert "nowhere" in capsys.readouterr().err


# ------------------------------------------------------------------ the command


def test_the_command(at: Path, capsys: Any) -> None:
    write("a.txt", "a b c d a b")
    write("b.jsonl", [{"text": "c", "id": 3}, {"text": ""}])
    write("p.jsonl", [{"prefix": "a", "suffix": " b c"}, {"prefix": "a b ", "suffix": "c"}])
    arguments = ["corpus", "a.txt", "b.jsonl", "--tokenizer", "t.json", "-o", "c.h5", "--length",
                 "4", "--pack", "--population", "quotes:recite:test=p.jsonl"]  # fmt: skip
    assert main([*arguments, "--json", "c.json"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "2 documents, 7 tokens → 2 rows of 4: 1 position of padding, 1 cut within\n"
        "  documents, 3 tokens without a label\n"
        "quotes: recite, test, 2 rows of at most 3: 6 tokens, 3 of them asked for\n"
        "left out: 1 document without a token\n"
        "keys ignored: 'id'\n"
        "→ c.h5\n"
    )
    got = rc.load_corpus("c.h5")
    assert got.tokens.tolist() == [[3, 4, 5, 6], [3, 4, 5, 0]]
    assert got.segments.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert got.populations["quotes"].prompt_length.tolist() == [1, 2]
    assert json.loads(Path("c.json").read_text())["counts"] == got.source["provenance"]["counts"]
    assert main(["inspect", "c.h5"]) == 0
    assert main(["corpus", "c.h5", "--population", "more:text:dev=a.txt", "--tokenizer", "t.json",
                 "-o", "d.h5"]) == 0  # fmt: skip
    assert "2 rows" not in capsys.readouterr().out.replace("at most", "").split("more:")[-1]
    assert list(rc.load_corpus("d.h5").populations) == ["quotes", "more"]
    with h5py.File("d.h5") as file:
        assert "segments" in file


def test_what_is_built_is_what_the_method_takes(at: Path, capsys: Any) -> None:
    """corpus → collect → evaluate, through the command line."""
    made = config(vocabulary=8)
    rc.save(rc.Model(made, random_parameters(made, 0), "float64"), "w.h5")
    write("a.txt", "a b c d 5 " * 20)
    write("p.jsonl", [{"prefix": "a b", "suffix": "c d"}])
    assert main(["corpus", "a.txt", "--tokenizer", "t.json", "-o", "c.h5", "--length", "16",
                 "--pack", "--population", "p:recite:test=p.jsonl", "--population",
                 "t:text:test=a.txt"]) == 0  # fmt: skip
    assert main(["collect", "w.h5", "c.h5", "-o", "f.h5"]) == 0
    assert main(["evaluate", "w.h5", "c.h5"]) == 0
    capsys.readouterr()


def test_help_shows_examples(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["corpus", "--help"])
    assert stop.value.code == 0
    assert "examples:\n  refcurv corpus " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs ulimit")
def test_memory_is_bounded(at: Path) -> None:
    """6 MB of text at once would take 0.8 GB in the library; in pieces it takes 0.1 GB."""
    write("big.txt", "the cat sat on the mat, the dog on the log\n" * 140_000)
    code = (
        "import resource; from refcurv.files.texts import build_corpus;"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "build_corpus(['big.txt'], 'bpe.json');"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300  # observed 95
