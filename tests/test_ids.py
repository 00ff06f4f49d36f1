"""files/ids.py, and what is text: files of bare ids, shards, separators, refused suffixes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from refcurv.cli import main
from refcurv.files.documents import NO_TEXT
from refcurv.files.ids import TOKEN_DTYPES
from refcurv.files.texts import build_corpus
from refcurv.law.checks import ConventionError, RefcurvError


def shard(ids: list[int], magic: int, version: int, dtype: str, count: int | None = None) -> bytes:
    """A file of llm.c: 256 int32 of header, then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.array(ids, dtype).tobytes()


# ------------------------------------------------------------------ .bin


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_bare_ids(tmp_path: Path, dtype: str) -> None:
    """nanoGPT's train.bin is its array's bytes."""
    ids = np.array([3, 200, 0, 7, 9], dtype)
    (tmp_path / "train.bin").write_bytes(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    made = build_corpus([tmp_path / "train.bin"], token_dtype=dtype, length=3)
    assert made.tokens.tolist() == [[3, 200, 0], [7, 9, 0]]
    assert made.source["made_from"]["options"]["token_dtype"] == dtype


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "top"),
    [(20240520, 1, "<u2", 50256), (20240801, 7, "<u4", 128000)],
)
def test_shards_of_llm_c(tmp_path: Path, magic: int, version: int, dtype: str, top: int) -> None:
    path = tmp_path / "shard.bin"
    path.write_bytes(shard([top, 1, 2], magic, version, dtype))
    for token_dtype in (None, "uint16" if dtype == "<u2" else "uint32"):
        assert build_corpus([path], token_dtype=token_dtype).tokens.tolist() == [[top, 1, 2]]


WRONG: dict[str, tuple[bytes, str | None, str]] = {
    "unsaid": (b"\1\0\2\0", None, "does not say what it holds. If it is bare token ids, give"),
    "a text": (b"the cat sat on the mat", None, "does not say what it holds"),
    "half an id": (b"\1\0\2", "uint16", "holds 3 bytes, no whole number of uint16"),
    "negative": (b"\xff" * 4, "int32", "[0] is no id: -1"),
    "too large": (b"\xff" * 4, "uint32", "[0] is no id: 4294967295"),
    "floats": (b"\0" * 4, "float32", "token_dtype must be one of uint8, uint16"),
    "big-endian": (b"\0" * 4, ">u2", "token_dtype must be one of uint8, uint16"),
    "empty": (b"", "uint16", "holds no token"),
    "a shard cut off": (shard([1, 2], 20240520, 1, "<u2", 3), None, "declares 3 ids of uint16"),
    "a shard of less": (shard([1, 2], 20240520, 1, "<u2", 1), None, "and holds 4 bytes of them"),
    "a negative count": (shard([1, 2], 20240801, 7, "<u4", -2), None, "declares -2 ids"),
    "another version": (shard([1], 20240520, 2, "<u2"), None, "is llm.c's, of version 2; 1 is"),
    "another dtype": (shard([1], 20240520, 1, "<u2"), "uint32", "is a shard of llm.c that holds u"),
    "questions": (shard([1], 20240522, 1, "<u2"), "uint16", "holds llm.c's questions, not plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_bins(tmp_path: Path, name: str) -> None:
    data, token_dtype, says = WRONG[name]
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(RefcurvError) as caught:
        build_corpus([tmp_path / "a.bin"], token_dtype=token_dtype)
    assert says in str(caught.value)


@pytest.mark.parametrize("count", [256, 257, 300])
def test_ids_that_were_lost_in_writing(count: int, tmp_path: Path) -> None:
    """Ids of 300 letters do not fit a byte: 44 may have been 300. 256 do."""
    (tmp_path / "a.bin").write_bytes(b"\1\2\44")
    made = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(count)}, unk_token="0"))
    made.save(str(tmp_path / "t.json"))
    lost = f"holds uint8, and the tokenizer has {count} ids: those beyond 255"
    with pytest.raises(ConventionError, match=lost) if count > 256 else nullcontext():
        build_corpus([tmp_path / "a.bin"], tmp_path / "t.json", token_dtype="uint8")
    assert build_corpus([tmp_path / "a.bin"], token_dtype="uint8").tokens.size == 3


def test_a_megatron_bin_lacks_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a_text_document.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "a_text_document.idx").write_bytes(b"MMIDIDX\0\0" + bytes(30))
    with pytest.raises(RefcurvError, match=r"its documents are told by 'a_text_document\.idx'"):
        build_corpus([tmp_path / "a_text_document.bin"], token_dtype="uint16")
    (tmp_path / "a_text_document.idx").write_bytes(b"something else")
    assert build_corpus([tmp_path / "a_text_document.bin"], token_dtype="uint16").tokens.size == 2


def test_a_npy_without_a_header(tmp_path: Path) -> None:
    """dolma's .npy files are bare ids."""
    np.arange(9, dtype="<u2").tofile(tmp_path / "part-0.npy")
    with pytest.raises(
        RefcurvError, match=r"If it is bare token ids, as np\.memmap writes them, na"
    ):
        build_corpus([tmp_path / "part-0.npy"])


def declaring(shape: tuple[int, ...], data: bytes = b"", descr: str = "'<i8'") -> bytes:
    """A .npy file that says this of itself."""
    text = f"{{'descr':{descr},'fortran_order':False,'shape':{shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def test_shapes_that_a_npy_cannot_have(tmp_path: Path) -> None:
    """One of many rows without a token was read for hours, or was a bug of refcurv."""
    path = tmp_path / "a.npy"
    for shape, says in (
        ((99999999999, 0), "holds no token"),
        ((0, 10**23), "holds no token"),
        ((0,), "holds no token"),
        ((), r"must be \(T,\) or \(N, T\)"),
        ((1,) * 100, r"must be \(T,\) or \(N, T\)"),
        ((2, 2), "declares"),
        ((2**62, 4), "declares"),
        ((-1, -1), "declares"),
    ):
        path.write_bytes(declaring(shape, b"" if 0 in shape else bytes(8)))
        with pytest.raises(RefcurvError, match=says):
            build_corpus([path])
    path.write_bytes(declaring((1, 0), bytes(8)))
    with pytest.raises(RefcurvError, match="declares"):
        build_corpus([path])
    path.write_bytes(declaring((1,), bytes(8), "1+x"))
    with pytest.raises(RefcurvError, match=r"is no \.npy file") as caught:
        build_corpus([path])
    assert "0x" not in str(caught.value)


def test_the_longest_length_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(RefcurvError, match="and at most 2147483647; got 999999999999999"):
        build_corpus([tmp_path / "a.npy"], length=999999999999999)


def test_an_option_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(ConventionError, match=r"token_dtype is for \.bin files, and none is given"):
        build_corpus([tmp_path / "a.npy"], token_dtype="uint16")
    with pytest.raises(ConventionError, match="the separator '<end>' is in no text file"):
        build_corpus([tmp_path / "a.npy"], separator="<end>")
    with pytest.raises(ConventionError, match="the separator is empty"):
        build_corpus([tmp_path / "a.npy"], separator="")


# ------------------------------------------------------------------ what is text


@pytest.mark.parametrize("suffix", NO_TEXT)
def test_suffixes_that_are_no_text(tmp_path: Path, suffix: str) -> None:
    """Refused by name, whatever the bytes are, with what to do instead."""
    if suffix == ".h5":
        return  # a corpus, in tests/test_texts.py
    path = tmp_path / f"a{suffix.upper()}"
    path.write_text("id,text\n1,the cat\n")
    with pytest.raises(RefcurvError) as caught:
        build_corpus([path], letters(tmp_path))
    assert f"is no text here. {NO_TEXT[suffix]}." in str(caught.value)
    assert len(NO_TEXT[suffix]) < 90
    (tmp_path / "b.jsonl").write_text("no JSON")  # names are looked at before any file is read
    with pytest.raises(RefcurvError, match="is no text here"):
        build_corpus([tmp_path / "b.jsonl", path], letters(tmp_path))


@pytest.mark.parametrize(
    "name", ["a", "a.txt", "a.md", "a.py", "a.tex", "a.html", "wiki.tokens", "a.1"]
)
def test_everything_else_is_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("ab\n")
    assert build_corpus([tmp_path / name], letters(tmp_path)).tokens.tolist() == [[1, 2, 3]]


# ------------------------------------------------------------------ documents of a text


def letters(folder: Path) -> Path:
    """A tokenizer with an id for each letter, and one for <|endoftext|>."""
    known = {letter: i for i, letter in enumerate(["?", "a", "b", "\n", "<", "|", ">"])}
    made = tokenizers.Tokenizer(models.WordLevel(known, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "letters.json"))
    return folder / "letters.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stories")
    letters(made)
    return made


def test_stories_do_not_see_one_another(tmp_path: Path, capsys: Any) -> None:
    """Each a segment; what stands between them is in none; empty ones are counted."""
    (tmp_path / "s.txt").write_text("ab<|endoftext|>\nb<|endoftext|><|endoftext|>a<|endoftext|>")
    lines = tmp_path / "l.jsonl"
    lines.write_text('{"text": "a<|endoftext|>b"}\n')
    made = build_corpus(
        [tmp_path / "s.txt", lines], letters(tmp_path), pack=True, length=8,
        separator="<|endoftext|>", populations=[f"p:text:dev={tmp_path}/s.txt"],
    )  # fmt: skip
    assert made.tokens.tolist() == [[1, 2, 3, 2, 1, 1, 7, 2]]
    assert made.segments.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3]]
    counts = made.source["made_from"]["counts"]
    assert (counts["documents"], counts["empty"]) == (4, 1)
    assert made.source["made_from"]["options"]["separator"] == "<|endoftext|>"
    assert made.populations["p"].tokens.tolist() == [[1, 2], [3, 2], [1, 0]]
    argv = ["corpus", str(tmp_path / "s.txt"), "--tokenizer", str(tmp_path / "letters.json"), "-o",
            str(tmp_path / "c.h5"), "--pack", "--separator", "<|endoftext|>"]  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "3 documents, 5 tokens" in out and "left out: 1 document without a token" in out


@given(
    stories=st.lists(st.text("ab\n<|>", max_size=9), min_size=2, max_size=6),
    separator=st.sampled_from(["<|>", "\n\n", "<", "aa"]),
)
def test_a_separator_splits_as_python_does(
    folder: Path, stories: list[str], separator: str
) -> None:
    text = separator.join(stories)
    parts = text.split(separator)
    (folder / "a.txt").write_text(text, newline="")
    if not any(parts):
        return
    made = build_corpus([folder / "a.txt"], folder / "letters.json", separator=separator)
    known = {letter: i for i, letter in enumerate("?ab\n<|>")}
    want = [[known[letter] for letter in part] for part in parts if part]
    got = [row[real].tolist() for row, real in zip(made.tokens, made.real, strict=True)]
    assert got == want
    empty = sum(not part for part in parts) - (not parts[-1])
    assert made.source["made_from"]["counts"]["empty"] == empty
